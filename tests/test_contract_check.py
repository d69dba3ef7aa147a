"""A stranger's closure that is wrong is told so in one sentence, one that is right is not, and all this is a test in one line."""

import re
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from typer.testing import CliRunner

from hybridsim import storage
from hybridsim.check import assert_contract, closure_lines, solvers_to_check, violations
from hybridsim.cli import app
from hybridsim.config import load_experiment
from hybridsim.contract import Flux
from hybridsim.corrections.eddy import Smagorinsky
from hybridsim.starting import PLACES, names_of, write_closure
from hybridsim.yaml_reader import ConfigError

CHEAP = "kuramoto_sivashinsky finite_volume"
PLANE = "navier_stokes 2D spectral"
LINE = "compressible 1D"
LABELS = {CHEAP: "kuramoto_sivashinsky 1D finite_volume", PLANE: "navier_stokes 2D spectral", LINE: "compressible 1D finite_volume"}

HEAD = """
import random
from typing import ClassVar

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from hybridsim.contract import AbstractClosure, Flux, Interpolation, PostStep, Source


@jax.custom_vjp
def reversed_square(x):
    return x * x


reversed_square.defvjp(lambda x: (x * x, x), lambda x, w: (3 * x * w,))


@jax.custom_jvp
def square(x):
    return x * x


square.defjvp(lambda at, along: (at[0] * at[0], 2.002 * at[0] * along[0]))


class Weighted(eqx.Module):
    w: Array

    def __init__(self, *, key):
        self.w = jax.random.normal(key, (3,))


@jax.custom_vjp
def right(x):
    return x * x


right.defvjp(lambda x: (x * x, x), lambda x, w: (2 * x * w,))
"""

CALL = "    def __call__(self, view, memory=None, key=None):\n        "

# name: (what stands behind `class name`, where it is checked, all that is said)
WRONG: dict[str, tuple[str, ...]] = {
    # place
    "Plain": (
        "():\n" + CALL + "return view.u",
        CHEAP,
        "check: 'Plain' in wrong.py is not an equinox Module; a closure derives from one of Flux, Source, Interpolation, PostStep, "
        "Replacement",
    ),
    "Other": (
        "(eqx.Module):\n" + CALL + "return view.u",
        CHEAP,
        "check: Other is no closure; a closure derives from one of Flux, Source, Interpolation, PostStep, Replacement",
    ),
    "Nowhere": (
        "(AbstractClosure):\n" + CALL + "return view.u",
        CHEAP,
        "check: Nowhere must derive from exactly one place (Flux, Source, Interpolation, PostStep, Replacement), found nothing",
    ),
    "Twice": (
        "(Flux, Source):\n" + CALL + "return view.u",
        CHEAP,
        "check: Twice must derive from exactly one place (Flux, Source, Interpolation, PostStep, Replacement), found Flux and "
        "Source",
    ),
    "Silent": (
        "(Flux):\n    strength: float = 0.1",
        CHEAP,
        "check: Silent is abstract; it does not define __call__",
    ),
    "Elsewhere": (
        "(Interpolation):\n" + CALL + "return view.u",
        CHEAP,
        "place: no solver of kuramoto_sivashinsky finite_volume takes an Interpolation closure (every solver)",
    ),
    # names of arguments
    "Narrow": (
        "(Flux):\n    def __call__(self, view):\n        return view.gradient()",
        CHEAP,
        "call: Narrow.__call__ takes (view), but is called with (view, memory, key); write def __call__(self, view, memory=None, "
        "key=None) (every solver)",
    ),
    "Reversed": (
        "(Flux):\n    def __call__(self, view, key=None, memory=None):\n        return view.gradient()",
        CHEAP,
        "call: Reversed.__call__ takes (view, key, memory), but is called with (view, memory, key) in this order; write def "
        "__call__(self, view, memory=None, key=None) (every solver)",
    ),
    "Dim": (
        "(Flux):\n    def __init__(self, dim: int):\n        pass\n\n" + CALL + "return view.gradient()",
        CHEAP,
        "Dim.dim: Dim needs 'dim'; did you mean 'dims', which the run supplies?",
    ),
    "Undeclared": (
        "(Flux):\n    def __init__(self):\n        self.w = jnp.ones(3)\n\n" + CALL + "return self.w[0] * view.gradient()",
        CHEAP,
        "Undeclared: Undeclared cannot be built: cannot assign to field 'w'; declare w: Array in the body of the class",
    ),
    # shape
    "Short": (
        "(Flux):\n" + CALL + "return view.u",
        PLANE,
        "shape: Short is a Flux and must return (axis, c, x, y) = (2, 2, 16, 12), found (2, 16, 12): 'axis' is missing",
    ),
    "Long": (
        "(Source):\n" + CALL + "return view.gradient()",
        PLANE,
        "shape: Long is a Source and must return (c, x, y) = (2, 16, 12), found (2, 2, 16, 12): an axis is too many, at position 0",
    ),
    "Moved": (
        "(Flux):\n" + CALL + "return jnp.moveaxis(view.gradient(), 0, -1)",
        PLANE,
        "shape: Moved is a Flux and must return (axis, c, x, y) = (2, 2, 16, 12), found (2, 16, 12, 2): the order of the axes is "
        "another one",
    ),
    "Padded": (
        "(PostStep):\n" + CALL + "return jnp.pad(view.u, ((0, 0), (1, 1), (0, 0)))",
        PLANE,
        "shape: Padded is a PostStep and must return (c, x, y) = (2, 16, 12), found (2, 18, 12): 'x' has length 18",
    ),
    "Faces": (
        "(Interpolation):\n" + CALL + "return 0 * view.u",
        LINE,
        "shape: Faces is an Interpolation and must return (axis, side, c, free, x) = (1, 2, 3, 2, 16), found (3, 16): 'axis' and "
        "'side' and 'free' are missing",
    ),
    "Nothing": (
        "(Source):\n" + CALL + "view.u",
        PLANE,
        "shape: Nothing is a Source and must return (c, x, y) = (2, 16, 12), found nothing",
    ),
    "Whole": (
        "(Source):\n" + CALL + "return jnp.ones(view.u.shape, int)",
        PLANE,
        "dtype: Whole must return real floating-point numbers, found int64",
    ),
    "Raises": (
        "(Source):\n" + CALL + "return view.vorticity",
        PLANE,
        "shape: Raises raised AttributeError: 'View' object has no attribute 'vorticity' (wrong.py:LINE)",
    ),
    "Branches": (
        "(Source):\n" + CALL + "return view.u if view.u.max() > 0 else -view.u",
        PLANE,
        "shape: Branches raised TracerBoolConversionError: Attempted boolean conversion of traced array with shape bool[]. "
        "(wrong.py:LINE)",
    ),
    # memory and keys
    "Pair": (
        "(Source):\n" + CALL + "return view.u, None",
        CHEAP,
        "memory: Pair returns a pair, but has no memory; return one array, or define init_memory",
    ),
    "Forgetful": (
        "(Source):\n    def init_memory(self, view):\n        return view.u\n\n" + CALL + "return view.u",
        CHEAP,
        "memory: Forgetful has init_memory, so that it must return (array, new_memory); found one array",
    ),
    "Growing": (
        "(Source):\n    def init_memory(self, view):\n        return view.u[0]\n\n" + CALL + "return view.u, view.u",
        CHEAP,
        "memory: the new memory of Growing has ((1, 16), 'float64') where init_memory returns ((16,), 'float64'); both must be "
        "alike",
    ),
    "Keyless": (
        "(Source):\n" + CALL + "return view.u * jax.random.normal(key, view.u.shape, view.u.dtype)",
        CHEAP,
        "key: Keyless draws random numbers, but is given no key; write stochastic: ClassVar[bool] = True in the class",
    ),
    "Unmoved": (
        "(Source):\n    stochastic: ClassVar[bool] = True\n\n" + CALL + "return view.u",
        CHEAP,
        "key: Unmoved is declared stochastic, but another key gives the same output; draw random numbers from `key`, or remove "
        "the declaration",
    ),
    "Dice": (
        "(Source):\n" + CALL + "return view.u * random.random()",
        CHEAP,
        "repetition: two calls of Dice with the same arguments differ by NUMBER: draw random numbers from `key` alone "
        "(stochastic: ClassVar[bool] = True), and keep what is remembered in the memory",
    ),
    # weights
    "Static": (
        "(Flux):\n    w: Array = eqx.field(static=True)\n\n    def __init__(self, *, key):\n"
        "        self.w = jax.random.normal(key, ())\n\n" + CALL + "return self.w * view.gradient()",
        CHEAP,
        "weights: 'w' is declared static in Static but holds an array, which would be neither trained nor saved; remove "
        "static=True, or make tuples of numbers of what shall stay fixed",
    ),
    "StaticNumPy": (
        "(Flux):\n    w: np.ndarray = eqx.field(static=True)\n\n    def __init__(self):\n        self.w = np.ones(3)\n\n"
        + CALL
        + "return self.w[0] * view.gradient()",
        CHEAP,
        "weights: 'w' is declared static in StaticNumPy but holds an array, which would be neither trained nor saved; remove "
        "static=True, or make tuples of numbers of what shall stay fixed",
    ),
    "Cut": (
        "(Weighted, Flux):\n" + CALL + "return jax.lax.stop_gradient(self.w[0]) * view.gradient()",
        CHEAP,
        "weights: the gradient of Cut with respect to the weights is zero everywhere, so that nothing can be trained: "
        "jax.lax.stop_gradient, or a rounding, cuts it off",
    ),
    "Unused": (
        "(Weighted, Flux):\n" + CALL + "return -view.gradient()",
        CHEAP,
        "weights: the gradient of Unused with respect to the weights is zero everywhere, so that nothing can be trained: the "
        "output does not depend on them",
    ),
    "Misnamed": (
        "(Flux):\n    constants = ('strength',)\n    strenght: float = 0.1\n\n" + CALL + "return self.strenght * view.gradient()",
        CHEAP,
        "constants: 'strength' is no field of Misnamed; did you mean 'strenght'?",
    ),
    "Untunable": (
        "(Flux):\n    constants = ('c',)\n    c: float = eqx.field(static=True, default=0.1)\n\n"
        + CALL
        + "return self.c * view.gradient()",
        CHEAP,
        "constants: 'c' is declared static in Untunable, so that training cannot turn it into a parameter; remove static=True",
    ),
    "Rounded": (
        "(Flux):\n    constants = ('c',)\n    c: float = 0.1\n\n" + CALL + "return jnp.round(self.c) * view.gradient()",
        CHEAP,
        "weights: the gradient of Rounded with respect to the weights is zero everywhere, so that nothing can be trained: the "
        "output does not depend on them",
    ),
    # finiteness
    "Logarithm": (
        "(Flux):\n" + CALL + "return jnp.log(view.u - 10)[None]",
        CHEAP,
        "finite: the output of Logarithm has 16 values that are not finite at rest",
    ),
    "Root": (
        "(Flux):\n" + CALL + "return -jnp.sqrt(view.gradient() ** 2) * view.gradient()",
        CHEAP,
        "finite: the gradient of Root is not finite at rest, as that of √x is not at 0; replace x by 1 there with jnp.where "
        "before the root, and choose the result with jnp.where after it",
    ),
    "Floor": (
        "(Flux):\n" + CALL + "return -jnp.sqrt(view.gradient() ** 2 + 1e-60) * view.gradient()",
        CHEAP,
        "finite: the gradient of Floor is not finite at rest in float32, as that of √x is not at 0; replace x by 1 there with "
        "jnp.where before the root, and choose the result with jnp.where after it",
    ),
    "Unbounded": (
        "(Weighted, Flux):\n" + CALL + "return jnp.exp(self.w[0] ** 2) * view.gradient()",
        CHEAP,
        "conservation: with random weights of standard deviation 0.1 to 100 the outputs of Unbounded, or the step that takes "
        "them, are not finite in float64; bound what may grow",
    ),
    # gradients
    "WrongReverse": (
        "(Flux):\n" + CALL + "return reversed_square(view.gradient())",
        CHEAP,
        "adjoint: WrongReverse uses jax.custom_vjp, which forward mode (jax.jvp) cannot differentiate; use jax.custom_jvp",
        "gradient against differences: the gradient of WrongReverse with respect to the state differs by 50.0% from central "
        "differences: a custom derivative rule is wrong, or jax.lax.stop_gradient cuts off a part of it",
    ),
    "OnlyReverse": (
        "(Flux):\n" + CALL + "return right(view.gradient())",
        CHEAP,
        "adjoint: OnlyReverse uses jax.custom_vjp, which forward mode (jax.jvp) cannot differentiate; use jax.custom_jvp",
    ),
    "WrongForward": (
        "(Flux):\n" + CALL + "return square(view.gradient())",
        CHEAP,
        "gradient against differences: the gradient of WrongForward with respect to the state differs by 0.1% from central "
        "differences: a custom derivative rule is wrong, or jax.lax.stop_gradient cuts off a part of it",
    ),
    "HalfCut": (
        "(Flux):\n" + CALL + "return jax.lax.stop_gradient(view.gradient()) * view.gradient()",
        CHEAP,
        "gradient against differences: the gradient of HalfCut with respect to the state differs by 50.0% from central "
        "differences: a custom derivative rule is wrong, or jax.lax.stop_gradient cuts off a part of it",
    ),
    # precision
    "Double": (
        "(Flux):\n" + CALL + "return view.gradient() * jnp.ones((), np.float64)",
        CHEAP,
        "float32 stays float32: Double computes in float64 in a float32 step, as convert_element_type float64[1,1,16] "
        "(wrong.py:LINE); make arrays with the dtype of view.u",
    ),
    "Single": (
        "(Flux):\n" + CALL + "return jnp.sin(view.gradient().astype(np.float32))",
        CHEAP,
        "adjoint: forward and reverse derivatives of Single differ by NUMBER in float64, at most 1e-12 is possible: a derivative "
        "rule is wrong, or some of it is computed in float32",
    ),
}

# what is right, though it is not smooth, remembers, draws random numbers, or mends a root
RIGHT = {
    "Kinked": "(Weighted, Flux):\n" + CALL + "return self.w[0] * jax.nn.relu(view.gradient()) + jnp.abs(view.gradient())",
    "Clipped": "(Flux):\n" + CALL + "return jnp.clip(view.gradient(), -0.1, 0.1) + jnp.round(view.gradient())",
    "Mended": "(Flux):\n"
    + CALL
    + "q = view.gradient() ** 2\n        return -jnp.where(q > 0, jnp.sqrt(jnp.where(q > 0, q, 1)), 0)",
    "Remembering": "(Source):\n    def init_memory(self, view):\n        return {'mean': view.u}\n\n"
    + CALL
    + "mean = 0.9 * memory['mean'] + 0.1 * view.u\n        return mean, {'mean': mean}",
    "Noisy": "(Flux):\n    stochastic: ClassVar[bool] = True\n\n"
    + CALL
    + "return view.gradient() * jax.random.normal(key, view.gradient().shape, view.u.dtype)",
    "Constants": "(Flux):\n    c: tuple = eqx.field(static=True, default=(0.1, 0.2))\n\n"
    + CALL
    + "return self.c[1] * view.gradient()",
}


@pytest.fixture
def file(tmp_path: Path, monkeypatch) -> Path:
    path = tmp_path / "wrong.py"
    classes = [f"class {name}{body}\n" for name, body in ({n: w[0] for n, w in WRONG.items()} | RIGHT).items()]
    path.write_text("\n\n".join([HEAD, *classes]))
    monkeypatch.chdir(tmp_path)
    return path


@pytest.mark.parametrize("name", WRONG)
def test_what_is_wrong_is_told_in_one_sentence(file: Path, name: str):
    body, solver, *expected = WRONG[name]
    found = [re.sub(r"differ by \d[\d.e+-]+", "differ by NUMBER", s) for s in violations(f"wrong.py:{name}", solver=solver)]
    begin = file.read_text().splitlines().index(f"class {name}{body.splitlines()[0]}") + 1
    for i, sentence in enumerate(found):
        sentence = sentence.removesuffix(f" ({LABELS[solver]})")
        if match := re.search(r"wrong\.py:(\d+)", sentence):
            assert begin < int(match[1]) <= begin + body.count("\n")
            sentence = sentence.replace(match[0], "wrong.py:LINE")
        found[i] = sentence
    assert found == expected


@pytest.mark.parametrize("name", RIGHT)
def test_what_is_right_is_not_complained_about(file: Path, name: str):
    assert violations(f"wrong.py:{name}", solver=CHEAP) == []


def test_no_place_in_the_file_is_named_where_the_error_is_elsewhere(file: Path):
    assert violations("wrong.py:Weightd", solver=CHEAP) == ["check: wrong.py has no class 'Weightd'; did you mean 'Weighted'?"]
    assert violations("wrnog.py:Root") == ["check: there is no file 'wrnog.py'; did you mean 'wrong.py'?"]


# --- as a test -------------------------------------------------------------------------------------------------------------------


class Diffusion(Flux):
    """F = −w ∂_a u_c."""

    w: jax.Array

    def __init__(self, strength: float = 1.0, *, key: jax.Array):
        self.w = strength * jax.random.normal(key, ())

    def __call__(self, view, memory=None, key=None):
        return -self.w * view.gradient()


class Flat(Diffusion):
    """F of the wrong shape."""

    def __call__(self, view, memory=None, key=None):
        return self.w * view.u


def test_the_contract_is_a_test_in_one_line():
    before = jax.config.jax_enable_x64
    assert_contract(Diffusion, solver=CHEAP, strength=2.0)
    assert_contract("smagorinsky", solver=CHEAP, cs=0.2)
    with pytest.raises(AssertionError) as caught:
        assert_contract(Flat, solver="navier_stokes spectral 2D")
    assert str(caught.value).splitlines() == [
        "Flat breaks the contract of closures",
        "- shape: Flat is a Flux and must return (axis, c, x, y) = (2, 2, 16, 12), found (2, 16, 12): 'axis' is missing "
        "(navier_stokes 2D spectral)",
    ]
    with pytest.raises(AssertionError, match="Diffusion takes no 'strenght'; did you mean 'strength'"):
        assert_contract(Diffusion, solver=CHEAP, strenght=2.0)
    assert jax.config.jax_enable_x64 == before


def test_one_sentence_names_every_solver_that_a_mistake_is_found_in():
    (sentence,) = violations(Flat, solver="spectral")
    assert sentence.startswith("shape: Flat is a Flux and must return (axis, c, x) = (1, 3, 16), found (3, 16): 'axis' is missing")
    assert sentence.endswith("(compressible 1D spectral and 5 more)")


def test_quick_takes_each_solver_in_the_fewest_dimensions_that_fit():
    labels = lambda **options: list(dict.fromkeys(line.solver for line in closure_lines(Smagorinsky, **options)))  # noqa: E731
    assert labels(solver="navier_stokes spectral", quick=True) == ["navier_stokes 2D spectral"]
    assert [label for *label, _ in solvers_to_check("navier_stokes 2D")] == [
        ["navier_stokes", 2, "finite_volume"],
        ["navier_stokes", 2, "spectral"],
    ]
    assert len(solvers_to_check()) == 12
    with pytest.raises(ConfigError, match="solver: no solver is called '4d'; the words are: 1d, 2d, 3d, compressible"):
        solvers_to_check("4D")
    with pytest.raises(ConfigError, match="no solver is 'kuramoto_sivashinsky 2d'; there are compressible 1D finite_volume"):
        solvers_to_check("kuramoto_sivashinsky 2d")


# --- from a package --------------------------------------------------------------------------------------------------------------

PACKAGED = """\
equation: {use: kuramoto_sivashinsky}
domain: {lengths: [22]}
initial: {use: random_waves}
time: {end: 1.0, frames: 2}
reference: {solver: spectral, shape: [32]}
runs:
  mine: {solver: spectral, shape: [16], dt: 0.25, corrections: [{use: stranger_closures.waves:Damping, strength: 3.0}]}
"""


def test_a_closure_of_an_installed_package_is_used_by_its_name_and_keeps_its_weights(tmp_path: Path, monkeypatch):
    package = tmp_path / "site" / "stranger_closures"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("")
    (package / "waves.py").write_text(
        "import jax\nfrom hybridsim.contract import Flux\n\n\n"
        "class Damping(Flux):\n    w: jax.Array\n\n"
        "    def __init__(self, strength: float = 1.0, *, key):\n        self.w = strength * jax.random.normal(key, (2,))\n\n"
        "    def __call__(self, view, memory=None, key=None):\n        return -self.w[0] * view.gradient() - self.w[1]\n"
    )
    monkeypatch.syspath_prepend(tmp_path / "site")
    (tmp_path / "case.yaml").write_text(PACKAGED)
    assert violations("stranger_closures.waves:Damping", solver=CHEAP, strength=2.0) == []
    experiment = load_experiment(tmp_path / "case.yaml")
    (closure,) = experiment.closures_for("mine")
    assert type(closure).__module__ == "stranger_closures.waves"
    trained = eqx.tree_at(lambda c: c.w, closure, jnp.asarray([0.125, -2.5], closure.w.dtype))
    storage.save_weights(tmp_path / "mine.safetensors", trained, experiment.weights_header("mine"))
    # the file alone is enough: it knows the arguments
    use = "{use: 'stranger_closures.waves:Damping', weights: mine.safetensors}"
    again = load_experiment(tmp_path / "case.yaml", [f"runs.mine.corrections=[{use}]"])
    (loaded,) = again.closures_for("mine")
    np.testing.assert_array_equal(loaded.w, [0.125, -2.5])
    assert again.resolved["runs"]["mine"]["corrections"][0]["strength"] == 3.0
    with pytest.raises(ConfigError, match=r"belong to 'stranger_closures.waves:Damping', not to 'smagorinsky'"):
        load_experiment(tmp_path / "case.yaml", ["runs.mine.corrections=[{use: smagorinsky, weights: mine.safetensors}]"])
    with pytest.raises(ConfigError, match=r"the module 'stranger_closures.wave' cannot be imported"):
        load_experiment(tmp_path / "case.yaml", ["runs.mine.corrections=[{use: 'stranger_closures.wave:Damping'}]"])


# --- new -------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("place", PLACES)
def test_what_is_written_to_start_from_keeps_the_contract(tmp_path: Path, place: str):
    result = CliRunner().invoke(app, ["new", "closure", "SubgridModel", "--place", place, "--out", str(tmp_path / "new")])
    assert result.exit_code == 0, result.output
    lines = result.stdout.splitlines()
    assert lines[2] == f"  cd {tmp_path / 'new'}"
    assert lines[3].startswith("  hybridsim check subgrid_model.py:SubgridModel --quick")
    assert sorted(p.name for p in (tmp_path / "new").iterdir()) == [
        "subgrid_model.py",
        "subgrid_model.yaml",
        "test_subgrid_model.py",
    ]
    text = (tmp_path / "new" / "subgrid_model.py").read_text()
    assert len([line for line in text.splitlines() if line.strip() and not line.strip().startswith("#")]) <= 30
    test = runpy.run_path(str(tmp_path / "new" / "test_subgrid_model.py"))["test_subgrid_model_keeps_the_contract"]
    if place == "interpolation":
        test()  # only one solver takes this place, so it costs no more than the line below
    else:
        assert violations(f"{tmp_path / 'new' / 'subgrid_model.py'}:SubgridModel", solver=CHEAP) == []
    experiment = load_experiment(tmp_path / "new" / "subgrid_model.yaml")
    assert experiment.labels == ("bare", "subgrid_model")
    assert experiment.spec.train is not None
    assert experiment.spec.train.run == "subgrid_model"


def test_what_is_written_is_formatted_and_clean(tmp_path: Path):
    ruff = shutil.which("ruff", path=str(Path(sys.executable).parent)) or shutil.which("ruff")
    if ruff is None:
        pytest.skip("ruff is not installed")
    for place in PLACES:
        write_closure(f"my_{place}", place, tmp_path)
    rules = Path(__file__).parent.parent / "pyproject.toml"
    for command in (["check"], ["format", "--check"]):
        done = subprocess.run([ruff, *command, "--config", rules, tmp_path], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr


def test_nothing_is_written_over(tmp_path: Path):
    (tmp_path / "test_drag.py").write_text("mine")
    with pytest.raises(ConfigError, match=r"test_drag\.py: this file exists, and nothing is written over it"):
        write_closure("drag", "source", tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["test_drag.py"]
    assert (tmp_path / "test_drag.py").read_text() == "mine"


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("my-closure", "NAME: found 'my-closure'; a name has up to 40 letters, digits and underscores, and starts with a letter"),
        ("2d", "a name has up to 40 letters"),
        ("../drag", "a name has up to 40 letters"),
        ("class", "NAME: 'class' is a word of Python; choose another name"),
        ("none", "NAME: 'none' is a word of Python"),
        ("statistics", "NAME: 'statistics' is a module of Python"),
        ("hybridsim", "NAME: 'hybridsim' is a module of hybridsim"),
        ("Eddy", "NAME: 'eddy' is a module of hybridsim"),
        ("Flux", "NAME: 'flux' is a name that the closure's file imports"),
        ("bare", "NAME: 'bare' is a label that experiments use otherwise"),
        ("test_drag", "NAME: 'test_drag' is a name by which pytest finds tests"),
        ("no", "NAME: 'no' is a word that YAML reads otherwise"),
        ("optax", "NAME: 'optax' is a module that Python finds already"),
    ],
)
def test_names_that_would_collide_are_refused(tmp_path: Path, name: str, sentence: str):
    result = CliRunner().invoke(app, ["new", "closure", name, "--place", "flux", "--out", str(tmp_path)])
    assert result.exit_code == 2
    assert result.stdout == ""
    assert result.stderr.count("\n") == 1
    assert sentence in result.stderr
    assert list(tmp_path.iterdir()) == []


def test_names_in_either_spelling_are_one():
    assert names_of("LearnedLES3D") == ("learned_les3d", "LearnedLES3D")
    assert names_of("eddyFlux") == ("eddy_flux", "EddyFlux")
    assert names_of("my_2d_closure") == ("my_2d_closure", "My2dClosure")


def test_a_place_and_a_folder_are_checked(tmp_path: Path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="--place: there is no place 'fluxes'; did you mean 'flux'"):
        write_closure("drag", "fluxes", tmp_path)
    with pytest.raises(ConfigError, match=r"--out: .*file is a file; choose another folder"):
        write_closure("drag", "flux", tmp_path / "file" / "here")


@pytest.mark.slow
@pytest.mark.parametrize("place", PLACES)
def test_what_is_written_trains_and_runs(tmp_path: Path, monkeypatch, x64, place: str):
    monkeypatch.chdir(tmp_path)
    write_closure("mine", place, Path())
    assert CliRunner().invoke(app, ["train", "mine.yaml"]).exit_code == 0
    result = CliRunner().invoke(app, ["run", "mine.yaml", "runs.mine.corrections[0].weights=runs/mine/mine.safetensors"])
    assert result.exit_code == 0, result.output
    summary = storage.read_json(Path("runs/mine/summary.json"))
    assert summary["runs"]["bare"]["outcome"] == "finished"
    if place in ("flux", "interpolation"):
        assert summary["runs"]["mine"]["spectrum_error"] < summary["runs"]["bare"]["spectrum_error"]
