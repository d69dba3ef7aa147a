"""Configurations: what is understood, what is refused and in which words; nothing wrong is ever accepted."""

import copy
import json
import math
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import yaml
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from hybridsim import config
from hybridsim.config import ConfigError, Experiment, apply_override, experiment_from, load_experiment
from hybridsim.contract import Flux, place_of
from hybridsim.model import Model
from hybridsim.sections import parse_length
from hybridsim.yaml_reader import MOST_BYTES, parse_yaml

CLOSURE = '''
import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from hybridsim.contract import Flux, PostStep


class Mine(Flux):
    """F = −w ∂_a u_c."""

    weight: Float[Array, "n"]
    width: int = eqx.field(static=True)

    def __init__(self, width: int = 4, scale: float = 0.01, *, key):
        if width > 100:
            raise ValueError(f"width: at most 100, found {width}")
        self.weight = scale * jax.random.normal(key, (width,))
        self.width = width

    def __call__(self, view, memory=None, key=None):
        return -jnp.sum(self.weight) * view.gradient()


class After(PostStep):
    """d = 0."""

    def __call__(self, view, memory=None, key=None):
        return 0 * view.u


class Unfinished(Flux):
    """F = ?"""


class NoClosure(eqx.Module):
    """Nothing."""


class Table(Flux):
    """F = 0, with an argument that YAML cannot write."""

    table: dict[str, Array]

    def __call__(self, view, memory=None, key=None):
        return 0 * view.gradient()


def function():
    raise AssertionError("called")
'''

TEXT = """\
equation: {use: navier_stokes, viscosity: 1e-3, forcing: {use: kolmogorov, wavenumber: 4, amplitude: 1.0, drag: 0.1}}
domain: {lengths: [2pi, 2pi]}
initial: {use: random_velocity, peak_wavenumber: 4, max_speed: 7, warm_up: 1}
samples: {count: 2, seed: 1}
time: {end: 1.0, frames: 10, statistics_from: 0.5}
reference: {solver: spectral, shape: [32, 32], precision: float64}
runs:
  bare: {solver: finite_volume, shape: [16, 16], dt: 0.014, stepper: ssprk3}
  smagorinsky: {solver: spectral, shape: [16, 16], cfl: 0.4, corrections: [{use: smagorinsky, cs: 0.17}]}
  mine: {solver: finite_volume, shape: [16, 16], dt: 0.01, corrections: [{use: my_closure.py:Mine, width: 8}], may_diverge: true}
compare: {modes: 5}
checks: {all: {drift: 1e-6, divergence_max: 1.0e-4}, bare: {t95: 0.1}}
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "case.yaml").write_text(TEXT)
    (tmp_path / "my_closure.py").write_text(CLOSURE)
    return tmp_path


@pytest.fixture
def case(folder: Path) -> Experiment:
    return load_experiment(folder / "case.yaml")


def refusal(folder: Path, *overrides: str, text: str | None = None) -> str:
    """The sentence with which a configuration is refused."""
    file = folder / "case.yaml"
    if text is not None:
        file.write_text(text)
    with pytest.raises(ConfigError) as caught:
        load_experiment(file, overrides)
    sentence = str(caught.value)
    assert "\n" not in sentence
    return sentence


def attempt(action: Callable[[], Any]) -> tuple[Any, str]:
    """(result, "") or (None, the sentence of the refusal); nothing else may be raised."""
    try:
        return action(), ""
    except ConfigError as error:
        return None, str(error)


# --- what is understood ----------------------------------------------------------------------------------------------------------


def test_numbers_are_what_their_author_meant():
    text = "{a: 1e-3, b: 1E3, c: 1_000, d: .5, e: -2., f: 1.5e+2, g: '1e-3', h: 2001-01-01, i: ~, j: true, k: 0, l: -0.0}"
    want = {"a": 1e-3, "b": 1e3, "c": 1000, "d": 0.5, "e": -2.0, "f": 150.0, "g": "1e-3", "h": "2001-01-01", "i": None, "j": True}
    assert parse_yaml(text) == {**want, "k": 0, "l": -0.0}
    assert isinstance(parse_yaml(text)["c"], int)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("2pi", 2 * math.pi),
        ("2*pi", 2 * math.pi),
        ("pi", math.pi),
        ("pi/2", math.pi / 2),
        ("0.5 * π", math.pi / 2),
        ("2pi/3", 2 * math.pi / 3),
    ],
)
def test_lengths_may_be_written_with_pi(text, value):
    assert parse_length(text) == pytest.approx(value, rel=1e-15)


@pytest.mark.parametrize("text", ["pie", "2pi2", "epi", "pi/0", "__import__('os')", "2**pi", "pi/pi", ""])
def test_other_words_are_no_lengths(text):
    assert parse_length(text) == text


def test_the_experiment_builds_its_objects(case: Experiment):
    assert case.name == "case"
    assert case.labels == ("bare", "smagorinsky", "mine")
    assert case.equation().viscosity == 1e-3
    assert case.equation().forcing.wavenumber == 4
    assert case.grid((8, 4)).lengths == (2 * math.pi, 2 * math.pi)
    assert case.reference_solver().grid.shape == (32, 32)
    assert case.solver_for("finite_volume", (12, 12)).grid.shape == (12, 12)
    assert type(case.stepper("reference")).__name__ == "ETDRK4"
    assert type(case.stepper("mine")).__name__ == "SSPRK3"
    model = case.model_for("smagorinsky", dt=0.02)
    assert isinstance(model, Model)
    assert model.closures[0].cs == 0.17
    assert case.cfl("smagorinsky") == 0.4
    assert case.cfl("bare") is None
    assert case.cfl("reference") == 0.5
    assert case.modes == 5


def test_the_time_step_lands_on_the_frames(case: Experiment, folder: Path):
    steps, dt = case.steps_per_frame("bare")
    assert (steps, dt) == (8, 0.0125)
    assert case.model_for("bare").dt == dt
    assert case.shortened("bare", dt) == "dt 0.014 shortened to 0.0125, to land on frames 0.1 apart (time.end / time.frames)"
    assert case.shortened("mine", 0.01) == case.shortened("smagorinsky", 0.025) == ""
    several = load_experiment(folder / "case.yaml", ["runs.bare.dt=0.025", "runs.bare.substeps=3"])
    assert several.shortened("bare", several.steps_per_frame("bare").dt) == (
        "dt 0.025 shortened to 0.0166667, to land in model steps of 3 solver steps on frames 0.1 apart (time.end / time.frames)"
    )
    # a dt that divides the interval up to rounding is kept
    assert case.steps_per_frame("mine") == (10, 0.01)
    assert case.steps_per_frame("bare", 0.1).steps == 1
    assert case.steps_per_frame("smagorinsky", 0.03) == (4, 0.025)
    with pytest.raises(ConfigError, match="has a cfl"):
        case.steps_per_frame("smagorinsky")


def test_substeps_count_in_the_time_step(folder: Path):
    case = load_experiment(folder / "case.yaml", ["runs.bare.substeps=4"])
    steps, dt = case.steps_per_frame("bare")
    assert (steps, dt) == (2, 0.0125)
    assert case.model_for("bare").step_time * steps == pytest.approx(0.1, rel=1e-15)


def test_closures_have_the_precision_of_their_run(folder: Path, x64):
    case = load_experiment(folder / "case.yaml", ["runs.smagorinsky.corrections=[{use: learned_flux, width: 4}]"])
    for label, dtype in (("mine", np.float32), ("smagorinsky", np.float32)):
        leaves = [a for a in jax.tree.leaves(case.closures_for(label, random=False)) if hasattr(a, "dtype")]
        assert leaves
        assert {a.dtype for a in leaves} == {np.dtype(dtype)}


def test_a_seed_names_the_random_weights(folder: Path):
    seeds = [
        load_experiment(folder / "case.yaml", [f"runs.mine.corrections[0].seed={s}"]).closures_for("mine")[0].weight
        for s in (1, 1, 2)
    ]
    np.testing.assert_array_equal(seeds[0], seeds[1])
    assert not np.array_equal(seeds[0], seeds[2])


def test_the_users_file_is_one_class_however_often_it_is_loaded(folder: Path):
    first, second = (load_experiment(folder / "case.yaml").origins["runs.mine.corrections[0]"] for _ in range(2))
    assert first.cls is second.cls
    assert issubclass(first.cls, Flux)
    assert not (folder / "__pycache__").exists()
    (folder / "my_closure.py").write_text(CLOSURE + "\n# changed\n")
    third = load_experiment(folder / "case.yaml").origins["runs.mine.corrections[0]"]
    assert third.cls is not first.cls
    assert third.digest != first.digest


def test_the_resolved_configuration_loads_to_itself(case: Experiment):
    assert case.resolved["runs"]["bare"]["precision"] == "float32"
    assert case.resolved["runs"]["mine"]["corrections"][0]["scale"] == 0.01
    assert case.resolved["reference"]["stepper"] == {"use": "etdrk4"}
    assert case.resolved["samples"] == {"count": 2, "seed": 1}
    text = yaml.safe_dump(case.resolved, sort_keys=False)
    again = experiment_from(parse_yaml(text), case.path)
    assert again.resolved == case.resolved
    assert again.config_hash == case.config_hash
    json.dumps(case.resolved, allow_nan=False)


def test_the_hash_sees_every_number_and_the_users_file(case: Experiment, folder: Path):
    hashes = {case.config_hash}
    for override in ("equation.viscosity=2e-3", "samples.seed=2", "runs.mine.corrections[0].width=9", "checks.bare.t95=0.2"):
        hashes.add(load_experiment(folder / "case.yaml", [override]).config_hash)
    (folder / "my_closure.py").write_text(CLOSURE + "\n# changed\n")
    hashes.add(load_experiment(folder / "case.yaml").config_hash)
    assert len(hashes) == 6
    # how a number is written does not matter
    assert load_experiment(folder / "case.yaml", ["time.end=1"]).config_hash in hashes


def test_overrides_reach_everything(folder: Path):
    case = load_experiment(
        folder / "case.yaml",
        [
            "runs.bare.shape=[8, 8]",
            "runs.bare.solver.convection=central",
            "runs.smagorinsky.corrections[0].cs=0.1",
            "runs.smagorinsky.dt=0.05",
            "runs.new={solver: spectral, shape: [16, 16]}",
            "checks.new.drift=1e-3",
            "compare.modes=2",
            "equation.forcing=null",
        ],
    )
    assert case.solver("bare").convection == "central"
    assert case.closures_for("smagorinsky")[0].cs == 0.1
    assert case.spec.runs["smagorinsky"].cfl is None
    assert case.labels[-1] == "new"
    assert case.spec.checks["new"].drift == 1e-3
    assert parse_yaml("a: &a [1, 2]\nb: *a") == {"a": [1, 2], "b": [1, 2]}
    assert case.equation().forcing is None


def test_shipped_experiments_are_found_by_name():
    assert "coarse_turbulence" in config.shipped_experiments()
    assert load_experiment("ks.yaml").name == "ks"


@pytest.mark.parametrize("name", config.shipped_experiments())
def test_a_shipped_experiment_is_valid_from_anywhere(name: str, tmp_path: Path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    loaded = load_experiment(name)
    assert loaded.name == name
    assert loaded.spec.train is None or load_experiment(name, for_training=True).name == name


def test_a_shipped_experiment_takes_a_closure_from_here(folder: Path, monkeypatch):
    monkeypatch.chdir(folder)
    run = "{solver: finite_volume, shape: [64, 64], dt: 0.01, corrections: [{use: my_closure.py:Mine}]}"
    case = load_experiment("coarse_turbulence", ["runs={mine: " + run + "}", "checks={}", "train=null"])
    assert place_of(case.closures_for("mine")[0]) is Flux


def test_weights_bring_the_arguments_of_their_closure(folder: Path, monkeypatch):
    from hybridsim.storage import save_weights

    made = load_experiment(folder / "case.yaml", ["runs.mine.corrections[0].seed=5"])
    closure = made.closures_for("mine")[0]
    header = made.weights_header("mine")
    assert header == {"closure": "my_closure.py:Mine", "arguments": {"width": 8, "scale": 0.01}}
    save_weights(folder / "trained.safetensors", closure, header)
    lean = "runs.mine.corrections=[{use: my_closure.py:Mine, weights: trained.safetensors}]"
    case = load_experiment(folder / "case.yaml", [lean])
    loaded = case.closures_for("mine")[0]
    assert loaded.width == 8
    np.testing.assert_array_equal(loaded.weight, closure.weight)
    assert not np.array_equal(case.closures_for("mine", weights=False)[0].weight, closure.weight)
    assert set(case.files) == {"my_closure.py", "trained.safetensors"}
    assert case.resolved["runs"]["mine"]["corrections"][0]["width"] == 8

    at = "runs.mine.corrections[0]"
    sentence = refusal(folder, lean, "runs.mine.corrections[0].width=9")
    assert sentence == (
        f"{at}.width: found 9, but the weights trained.safetensors were trained with 8; remove the key or choose other weights"
    )
    sentence = refusal(folder, "runs.mine.corrections=[{use: leith, weights: trained.safetensors}]")
    assert sentence == f"{at}.weights: the weights trained.safetensors belong to 'my_closure.py:Mine', not to 'leith'"
    (folder / "trained.safetensors").write_bytes(b"\x80\x04K\x01." * 20)
    assert refusal(folder, lean).startswith(f"{at}.weights: ")


def test_a_structure_goes_around_a_closure_and_travels_with_its_weights(folder: Path):
    from hybridsim.corrections.structure import Structured
    from hybridsim.storage import save_weights

    at = "runs.mine.corrections[0]"
    inside = {"form": "average", "c": 0.25}
    made = load_experiment(folder / "case.yaml", [f"{at}.structure={{form: average, c: 0.25}}", f"{at}.seed=5"])
    closure, header = made.closures_for("mine")[0], made.weights_header("mine")
    assert isinstance(closure, Structured)
    assert place_of(closure) is Flux
    assert (closure.form, closure.c, type(closure.closure).__name__) == ("average", 0.25, "Mine")
    assert header == {"closure": "my_closure.py:Mine", "arguments": {"width": 8, "scale": 0.01}, "structure": inside}
    assert made.resolved["runs"]["mine"]["corrections"][0]["structure"] == inside
    assert made.config_hash != load_experiment(folder / "case.yaml", [f"{at}.seed=5"]).config_hash
    # weights that were trained within a structure bring it along
    save_weights(folder / "trained.safetensors", closure, header)
    lean = "runs.mine.corrections=[{use: my_closure.py:Mine, weights: trained.safetensors}]"
    case = load_experiment(folder / "case.yaml", [lean])
    loaded = case.closures_for("mine")[0]
    assert case.resolved["runs"]["mine"]["corrections"][0]["structure"] == inside
    assert (loaded.form, loaded.c) == ("average", 0.25)
    np.testing.assert_array_equal(loaded.closure.weight, closure.closure.weight)
    assert refusal(folder, lean, f"{at}.structure=pointwise") == (
        f"{at}.structure: found {{form: 'pointwise', c: 0.5}}, but the weights trained.safetensors were trained with "
        "{form: 'average', c: 0.25}; remove the key or choose other weights"
    )
    # around others one may be put afterwards
    plain = load_experiment(folder / "case.yaml", [f"{at}.seed=6"])
    save_weights(folder / "trained.safetensors", plain.closures_for("mine")[0], plain.weights_header("mine"))
    loaded = load_experiment(folder / "case.yaml", [lean, f"{at}.structure=pointwise"]).closures_for("mine")[0]
    assert (loaded.form, loaded.c) == ("pointwise", 0.5)
    np.testing.assert_array_equal(loaded.closure.weight, plain.closures_for("mine")[0].weight)
    assert type(load_experiment(folder / "case.yaml", [lean]).closures_for("mine")[0]).__name__ == "Mine"


def test_the_schema_knows_every_key_and_every_short_name():
    schema = config.json_schema()
    text = json.dumps(schema)
    for key in config.Spec.model_fields:
        assert key in schema["properties"]
    kinds = (
        "steppers",
        "equations",
        "forcings",
        "cooling",
        "boundary_states",
        "boundary_velocities",
        "initial",
        "closures",
        "networks",
    )
    names = [name for kind in kinds for name in config.catalogue(kind)]
    for name in [*names, *(n for table in config.solver_tables().values() for n in table)]:
        assert f'"{name}"' in text
    assert '"convection"' in text
    references = set(re.findall(r'"#/\$defs/(\w+)"', text))
    assert references <= set(schema["$defs"])


WALLS: dict[str, Any] = {
    "equation": {
        "use": "navier_stokes",
        "viscosity": 0.01,
        "scalars": {"dye": 0.001},
        "boundary_velocity": {"y_upper": {"use": "moving", "velocity": [1.0, 0.0]}},
    },
    "domain": {"lengths": [1, 1], "boundaries": ["periodic", "no_slip"]},
    "initial": "uniform",
    "time": {"end": 1.0, "frames": 5},
    "reference": {"solver": "finite_volume", "shape": [16, 16]},
    "runs": {"bare": {"solver": "finite_volume", "shape": [8, 8], "dt": 0.01}},
}


def test_walls_and_scalars_come_from_yaml(folder: Path):
    found = experiment_from(WALLS, folder / "walls.yaml")
    solver = found.solver("bare")
    assert solver.grid.boundaries == (("periodic", "periodic"), ("no_slip", "no_slip"))
    assert [v.name for v in solver.variables] == ["u", "v", "dye"]
    assert found.equation().scalars == {"dye": 0.001}
    assert found.equation().boundary_velocity["y_upper"].velocity == (1.0, 0.0)
    again = experiment_from(found.resolved, folder / "walls.yaml")
    assert (again.resolved, again.config_hash) == (found.resolved, found.config_hash)


def test_a_solver_is_chosen_by_the_number_of_dimensions(folder: Path):
    box = {**WALLS, "equation": "navier_stokes", "initial": "taylor_green", "reference": {"shape": [8, 8, 8]}}
    box |= {"domain": {"lengths": [1, 1, 1]}, "runs": {"bare": {"solver": "spectral", "shape": [8, 8, 8], "dt": 0.01}}}
    assert type(experiment_from(box, folder / "box.yaml").solver("bare")).__name__ == "Spectral3D"
    box |= {"domain": {"lengths": [1]}, "runs": {"bare": {"solver": "spectral", "shape": [8], "dt": 0.01}}}
    with pytest.raises(ConfigError, match=r"reference.solver: 'spectral' of navier_stokes takes 2 and 3 space dimensions, but"):
        experiment_from({**box, "reference": {"shape": [8]}}, folder / "box.yaml")


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("domain.boundaries=[no_slip]", "domain.boundaries: found 1 entries, but domain.lengths has 2"),
        (
            "domain.boundaries=[periodic, noslip]",
            "domain.boundaries[1]: needs one of 'periodic', 'no_slip', 'free_slip', 'reflecting', 'fixed' or 'outflow' or a "
            "list, found 'noslip'; did you mean 'no_slip'?",
        ),
        (
            "domain.boundaries=[periodic, [periodic, no_slip]]",
            "domain.boundaries[1]: an axis is periodic on both sides or on neither, found ['periodic', 'no_slip']",
        ),
        ("equation.scalars={dye: a}", "equation.scalars.dye: needs a number, found 'a'"),
        ("equation.scalars={dye: -1}", "equation.scalars.dye: the diffusivity must be finite and not negative, found -1.0"),
        (
            "equation.scalars={u: 1}",
            "equation.scalars: 'u' cannot name a scalar: it is no plain word, or has a meaning in the files; choose another",
        ),
        ("equation.scalars=3", "equation.scalars: needs a mapping (key: value), found 3"),
        (
            "equation.boundary_velocity={z_upper: moving}",
            "equation.boundary_velocity.z_upper: there is no such side; possible: x_lower, x_upper, y_lower, y_upper",
        ),
        (
            "equation.boundary_velocity={y_upper: movin}",
            "equation.boundary_velocity.y_upper: there is no boundary velocity 'movin'; did you mean 'moving'?",
        ),
        (
            "equation.boundary_velocity.y_upper.omega=2",
            "equation.boundary_velocity.y_upper.omega: Moving takes no 'omega'; it takes: angular_frequency and velocity",
        ),
        ("equation.boundary_velocity=[1]", "equation.boundary_velocity: needs a mapping (key: value), found [1]"),
        ("runs.bare.solver=spectral", "runs.bare.shape: a spectral solver needs periodic boundaries"),
    ],
)
def test_walls_and_scalars_are_refused_word_for_word(folder: Path, override: str, sentence: str):
    data = copy.deepcopy(WALLS)
    apply_override(data, override)
    with pytest.raises(ConfigError) as error:
        experiment_from(data, folder / "walls.yaml")
    assert str(error.value) == sentence


# --- what is refused, word for word ----------------------------------------------------------------------------------------------

FINE = "runs.fine={solver: spectral, shape: [16, 16], "
SENTENCES = [
    ("runs.smagorinsky.corrections[0].c=1", "runs.smagorinsky.corrections[0].c: Smagorinsky takes no 'c'; did you mean 'cs'?"),
    (
        "runs.smagorinsky.corrections[0].cs='1e-3'",
        "runs.smagorinsky.corrections[0].cs: needs a number, found '1e-3'; remove the quotes",
    ),
    ("runs.smagorinsky.corrections[0].cs=true", "runs.smagorinsky.corrections[0].cs: needs a number, found true"),
    ("runs.bare.shpe=[16,16]", "runs.bare.shpe: a run takes no 'shpe'; did you mean 'shape'?"),
    ("runs.bear.dt=0.1", "runs.bear: the experiment has no 'bear' here; did you mean 'bare'?"),
    ("tiem.end=1", "tiem: the experiment has no 'tiem' here; did you mean 'time'?"),
    ("resolution=3", "resolution: an experiment takes no 'resolution'; did you mean 'equation'?"),
    ("equation.viscosity=-1e-3", "equation.viscosity: must be finite and not negative, found -0.001"),
    ("equation.viscosity=true", "equation.viscosity: needs a number, found true"),
    ("equation.viscosity='1e-3'", "equation.viscosity: needs a number, found '1e-3'; remove the quotes"),
    ("equation.viscosity=.nan", "equation.viscosity: found .nan, which is not finite; write a finite number"),
    ("equation.viscosity=1e999", "equation.viscosity: found 1e999, which is too large for a double; write a finite number"),
    ("equation.viscocity=1", "equation.viscocity: NavierStokes takes no 'viscocity'; did you mean 'viscosity'?"),
    ("equation.forcing.drag=-1", "equation.forcing.drag: must not be negative, found -1.0"),
    ("equation.forcing.use=kolmogorow", "equation.forcing: there is no forcing 'kolmogorow'; did you mean 'kolmogorov'?"),
    ("equation.forcing.wavenumber=1.5", "equation.forcing.wavenumber: needs a whole number, found 1.5"),
    ("equation=navier_stoke", "equation: there is no equation 'navier_stoke'; did you mean 'navier_stokes'?"),
    ("equation=hybridsim.corrections.eddy:Leith", "equation: Leith is a closure, not an equation"),
    ("initial={use: my_closure.py:Mine}", "initial: Mine is a closure, not an initial state"),
    ("domain.lengths=[0, 1]", "domain.lengths[0]: needs a number > 0, found 0"),
    ("domain.lengths=[2pie, 1]", "domain.lengths[0]: needs a number, found '2pie'"),
    ("domain.lengths=6.28", "domain.lengths: needs a list, found 6.28"),
    ("domain.lengths=[1, 1, 1]", "reference.shape: found 2 entries, but domain.lengths has 3"),
    ("samples.count=0", "samples.count: needs a number ≥ 1, found 0"),
    ("samples.count=2.0", "samples.count: needs a whole number, found 2.0"),
    ("samples.count=yes", "samples.count: found yes, which YAML reads as the boolean true; write true, or put the word in quotes"),
    ("time.end=0", "time.end: needs a number > 0, found 0"),
    ("time.end=1:30", "time.end: found 1:30, which YAML reads in base 60; write a decimal number"),
    ("time.frames=010", "time.frames: found 010, which YAML reads in base 8; write it without the leading zero"),
    ("time.frames=0x10", "time.frames: found 0x10, which is no decimal number; write it as one"),
    ("time.statistics_from=2", "time.statistics_from: 2 leaves nothing to average before time.end = 1"),
    ("reference.shape=[8, 8]", "runs.bare.shape: [16, 16] is finer than reference.shape = [8, 8]"),
    (
        "reference.precision=float46",
        "reference.precision: needs one of 'float32' or 'float64', found 'float46'; did you mean 'float64'?",
    ),
    ("runs.bare.shape=[16, 1]", "runs.bare.shape[1]: needs a number ≥ 2, found 1"),
    ("runs.bare.shape=[3, 3]", "runs.bare.shape: a finite-volume solver needs at least 4 cells per axis, found (3, 3)"),
    ("runs.bare.shape=[]", "runs.bare.shape: needs at least 1 entry, found 0"),
    ("runs.bare.shape=[16]", "runs.bare.shape: found 1 entries, but domain.lengths has 2"),
    ("runs.bare.dt=-0.1", "runs.bare.dt: needs a number > 0, found -0.1"),
    ("runs.bare.dt=5", "runs.bare.dt: needs a number > 0 and ≤ time.end = 1, found 5"),
    ("runs.bare.dt=1e-12", "runs.bare.dt: 1e-12 makes 1e+12 steps to reach time.end = 1; at most 1e+09 are possible"),
    (
        "runs.bare.may_diverge=no",
        "runs.bare.may_diverge: found no, which YAML reads as the boolean false; write false, or put the word in quotes",
    ),
    ("runs.bare.may_diverge=1", "runs.bare.may_diverge: needs true or false, found 1"),
    ("runs.bare.solver=finite_volumes", "runs.bare.solver: there is no solver 'finite_volumes'; did you mean 'finite_volume'?"),
    (
        "runs.bare.solver.convection=centrl",
        "runs.bare.solver.convection: needs one of 'van_leer' or 'central', found 'centrl'; did you mean 'central'?",
    ),
    ("runs.bare.solver.grid=3", "runs.bare.solver.grid: 'grid' is supplied by the run and not written in YAML; remove it"),
    (
        "runs.bare.stepper=etdrk4",
        "runs.bare.stepper: ETDRK4 needs a linear part, which StaggeredFiniteVolume does not offer; "
        "use an explicit one: forward_euler, "
        "ssprk2 or ssprk3",
    ),
    ("runs.bare.stepper=rk4", "runs.bare.stepper: there is no stepper 'rk4'; did you mean 'etdrk4'?"),
    (
        FINE + "dt: 0.1, cfl: 0.5}",
        "runs.fine: found both dt and cfl; remove one, or set adaptive: true, where dt is the largest step",
    ),
    ("runs.fine={shape: [16, 16]}", "runs.fine.solver: a run needs 'solver', which is missing"),
    ("runs.fine={sovler: spectral, shape: [8, 8]}", "runs.fine.sovler: a run takes no 'sovler'; did you mean 'solver'?"),
    ("runs.fine=3", "runs.fine: there is no run 'fine'; did you mean 'mine'?"),
    ("runs={}", "runs: needs at least 1 entry, found 0"),
    (
        "runs={a/b: {solver: spectral, shape: [8, 8]}}",
        "runs.a/b: needs a name of letters, digits, '_', '-' and '.' that starts with a letter or a "
        "digit (it names files), found 'a/b'",
    ),
    ("runs={all: {solver: spectral, shape: [16, 16]}}", "runs.all: 'all' has a meaning of its own; choose another label"),
    (
        "runs={a: {solver: spectral, shape: [16, 16]}, A: {solver: spectral, shape: [16, 16]}}",
        "runs: two labels differ in capitals only, and some file systems cannot tell them apart; rename one",
    ),
    ("runs.bare.corrections={use: leith}", "runs.bare.corrections: needs a list, found {use: 'leith'}"),
    ("runs.bare.corrections=[{uze: leith}]", "runs.bare.corrections[0]: a mapping here needs 'use'; did you mean that by 'uze'?"),
    ("runs.bare.corrections=[5]", "runs.bare.corrections[0]: needs a name, or a mapping with 'use', found 5"),
    ("runs.bare.corrections=[leeth]", "runs.bare.corrections[0]: there is no closure 'leeth'; did you mean 'leith'?"),
    (
        "runs.mine.corrections[0].evaluate=3",
        "runs.mine.corrections[0].evaluate: needs 'stage', 'step' or a number of solver steps that divides substeps = 1, found 3",
    ),
    (
        "runs.mine.corrections[1].evaluate=3",
        "runs.mine.corrections[1]: the list has 1 entries; write runs.mine.corrections[0] for the first",
    ),
    ("runs.mine.corrections[0].width=101", "runs.mine.corrections[0].width: at most 100, found 101"),
    ("runs.mine.corrections[0].width=wide", "runs.mine.corrections[0].width: needs a whole number, found 'wide'"),
    (
        "runs.mine.corrections[0].use=my_closure.py:Mime",
        "runs.mine.corrections[0]: my_closure.py has no class 'Mime'; did you mean 'Mine'?",
    ),
    (
        "runs.mine.corrections=[my_closur.py:Mine]",
        "runs.mine.corrections[0]: there is no file 'my_closur.py'; did you mean 'my_closure.py'?",
    ),
    (
        "runs.mine.corrections=[my_closure.py:Unfinished]",
        "runs.mine.corrections[0]: Unfinished is abstract; it does not define __call__",
    ),
    (
        "runs.mine.corrections=[my_closure.py:NoClosure]",
        "runs.mine.corrections[0]: NoClosure is no closure; a closure derives from one of Flux, Source, Interpolation, PostStep, "
        "Replacement",
    ),
    (
        "runs.mine.corrections=[my_closure.py:Table]",
        "runs.mine.corrections[0]: Table needs table, which YAML cannot write; give it a default",
    ),
    (
        "runs.mine.corrections=[{use: my_closure.py:After, evaluate: stage}]",
        "runs.mine.corrections[0].evaluate: a PostStep closure acts after steps, not stages",
    ),
    (
        "runs.mine.corrections=[{use: my_closure.py:After, structure: average}]",
        "runs.mine.corrections[0].structure: After is a PostStep closure, and only Flux closures can have one",
    ),
    (
        "runs.mine.corrections[0].structure=pontwise",
        "runs.mine.corrections[0].structure: needs one of 'pointwise' or 'average' or a mapping (key: value), "
        "found 'pontwise'; did you mean 'pointwise'?",
    ),
    ("runs.mine.corrections[0].structure={c: 2}", "runs.mine.corrections[0].structure.c: needs a number ≤ 1, found 2"),
    (
        "runs.mine.corrections[0].structure={k: 1}",
        "runs.mine.corrections[0].structure.k: structure takes no 'k'; it takes: c and form",
    ),
    (
        "runs.mine.corrections=[{use: my_closure.py:Mine, key: 3}]",
        "runs.mine.corrections[0].key: 'key' is supplied by the run and not written in YAML; remove it",
    ),
    (
        "runs.mine.corrections=[../my_closure.py:Mine]",
        "runs.mine.corrections[0]: file '../my_closure.py' lies outside the experiment's folder; "
        "copy it there and name it relatively",
    ),
    (
        "runs.mine.corrections=[{use: leith, weights: ../../secret.safetensors}]",
        "runs.mine.corrections[0].weights: file '../../secret.safetensors' lies outside the "
        "experiment's folder; copy it there and name "
        "it relatively",
    ),
    ("compare.modes=8", "compare.modes: the coarsest run carries fewer than 8 modes; at most 7 are possible"),
    ("checks.bear.t95=1", "checks.bear: there is no run 'bear'; did you mean 'bare'?"),
    ("checks.all.t59=1", "checks.all.t59: checks takes no 't59'; did you mean 't95'?"),
    ("checks.all.drift=-1", "checks.all.drift: needs a number ≥ 0, found -1"),
    ("train={run: mime}", "train.run: there is no run 'mime'; did you mean 'mine'?"),
    ("train={run: bare}", "train.run: the run 'bare' has no corrections, so there is nothing to train"),
    (
        "train={run: mine, unroll: [1, 2], updates: [3]}",
        "train.updates: found 1 phases, but train.unroll has 2; give one entry each",
    ),
    ("initial.max_speed=-7", "initial.max_speed: must be positive and finite, found -7.0"),
    ("initial.warm_up=1e300", "initial.warm_up: 1e+300 makes about 7.13e+301 steps of reference; at most 1e+09 are possible"),
    (
        "name=../../etc",
        "name: needs a name of letters, digits, '_', '-' and '.' that starts with a letter or a digit (it names files), found",
    ),
    ("shape", "shape: an override is key=value, for example runs.bare.shape=[32,32]"),
    ("runs..bare=1", "runs..bare: this is not a key path; write for example runs.bare.shape=[32,32]"),
    ("runs.bare.dt.x=1", "runs.bare.dt.x: there is nothing below runs.bare.dt; give runs.bare.dt as a whole"),
]


@pytest.mark.reliability("R8")
@pytest.mark.parametrize(("override", "sentence"), SENTENCES, ids=[o[:50] for o, _ in SENTENCES])
def test_refusals_word_for_word(folder: Path, override: str, sentence: str):
    found = refusal(folder, override)
    assert found == sentence or (sentence.endswith("found") and found.startswith(sentence))


@pytest.mark.reliability("R4")
def test_a_grid_beyond_the_memory_is_refused_with_its_size(folder: Path, monkeypatch):
    monkeypatch.setattr(config, "machine_memory", lambda: 16.0 * config.GIB)
    sentence = refusal(folder, "reference.shape=[100000, 100000]")
    assert sentence == (
        "reference.shape: [100000, 100000] with 2 samples in float64 needs about 3.58e+03 GiB, and "
        "this machine has 16 GiB; choose a "
        "smaller shape or fewer samples"
    )
    assert refusal(folder, "time.frames=100000000").startswith("time.frames: 100000000 frames of runs.bare take about 381 GiB")
    assert "GiB" in refusal(folder, "reference.shape=[2000000000, 2000000000]")
    assert "GiB" in refusal(folder, "samples.count=2000000000")


@pytest.mark.parametrize("use", ["os:system", "subprocess:Popen", "builtins:eval", "my_closure.py:function", "jax.numpy:array"])
def test_only_modules_are_ever_called(folder: Path, use: str):
    sentence = refusal(folder, f"runs.mine.corrections=['{use}']")
    assert "is not an equinox Module" in sentence


def test_classes_that_do_not_go_together_are_refused(folder: Path):
    # with annotations executed, as here, the constructor refuses; without, the solver that misses something
    sentence = refusal(folder, "equation.forcing={use: my_closure.py:NoClosure}")
    assert re.match(
        r"equation: NavierStokes cannot be built: |reference: NavierStokes and Spectral2D do not go together: ", sentence
    )


def test_a_users_file_that_fails_is_named_with_its_line(folder: Path):
    (folder / "my_closure.py").write_text("x = 1\nclass Mine(\n")
    assert refusal(folder).startswith("runs.mine.corrections[0]: my_closure.py line 2: this is not valid Python: ")
    (folder / "my_closure.py").write_text("x = 1\ny = x / 0\n")
    want = "runs.mine.corrections[0]: my_closure.py cannot be imported: ZeroDivisionError: division by zero (my_closure.py:2)"
    assert refusal(folder) == want


# --- hostile and broken text -----------------------------------------------------------------------------------------------------

TEXTS = {
    "duplicate": (TEXT + "time: {end: 2.0, frames: 3}\n", "case.yaml line 13: time: found twice (first in line 5); remove one"),
    "deep duplicate": (
        TEXT.replace("dt: 0.014", "dt: 0.014, dt: 0.1"),
        "case.yaml line 8: runs.bare.dt: found twice (first in line 8); remove one",
    ),
    "tag": (
        TEXT.replace("count: 2", "count: !!python/object/apply:os.getcwd []"),
        "case.yaml line 4: samples.count: found the tag ",
    ),
    "exotic tag": ("!!python/name:os.system\n", "case.yaml line 1: found the tag "),
    "no key": (
        TEXT.replace("frames: 10", "no: 10"),
        "time.no: found no, which YAML reads as the boolean false; write false, or put",
    ),
    "number key": (
        TEXT.replace("  bare:", "  64:"),
        "case.yaml line 8: runs.64: found the key 64, which is not a word; put it in quotes",
    ),
    "list key": ("? [a, b]\n: 1\n", "case.yaml line 1: the top: found a key that is not a word; keys are words"),
    "merge": (TEXT + "<<: {a: 1}\n", "<<: found <<, a merge key, which is not offered; write the keys out"),
    "empty": ("", "case.yaml: an experiment is a mapping with the keys "),
    "list": ("- 1\n- 2\n", "case.yaml: an experiment is a mapping with the keys "),
    "word": ("hello\n", "case.yaml: an experiment is a mapping with the keys "),
    "two documents": (TEXT + "---\na: 1\n", "case.yaml line 13: found a second document; one file is one experiment"),
    "tab": (
        "time:\n\tend: 1\n",
        "case.yaml line 2, column 1: this is not valid YAML: found character '\\t' that cannot start any token; indent",
    ),
    "colon": ("time: end: 1\n", "case.yaml line 1, column 10: this is not valid YAML: mapping values are not allowed here"),
    "bracket": ("runs: [1, 2\n", "case.yaml line 2, column 1: this is not valid YAML: expected ',' or ']'"),
    "deep": ("[" * 5000, "case.yaml line 1: found values nested more than 24 deep"),
    "alias": ("a: *b\n", "case.yaml line 1: the alias *b stands before or inside what it names"),
    "loop": ("a: &a [*a]\n", "case.yaml line 1: the alias *a stands before or inside what it names"),
    "nul": ("a: \0\n", "case.yaml: this is not valid YAML: "),
    "bomb": (
        "a: &a [x,x,x,x,x,x,x,x,x,x]\n"
        + "".join(f"{b}: &{b} [{','.join(['*' + a] * 10)}]\n" for a, b in zip("abcdefgh", "bcdefghi", strict=True)),
        "case.yaml line 5: found more than 20000 values (aliases counted out)",
    ),
    "long": ("a" * (MOST_BYTES + 1), "case.yaml: longer than 1 MiB"),
    "digits": (TEXT.replace("count: 2", "count: " + "9" * 5000), "samples.count: found a whole number of 5000 digits"),
}


@pytest.mark.reliability("R8")
@pytest.mark.parametrize(("text", "sentence"), TEXTS.values(), ids=TEXTS)
def test_broken_and_hostile_text(folder: Path, text: str, sentence: str):
    before = time.process_time()
    assert refusal(folder, text=text).startswith(sentence)
    assert time.process_time() - before < 2


def test_files_that_are_no_experiments(tmp_path: Path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00\x80")
    (tmp_path / "mine.yaml").write_text(TEXT)
    sentences = {
        "coarse_turbulance": "coarse_turbulance: there is no such file and no shipped experiment of that name; did you mean "
        "'coarse_turbulence'?",
        "mien.yaml": "mien.yaml: there is no such file and no shipped experiment of that name; did you mean 'mine.yaml'?",
        "binary.yaml": "binary.yaml: this is not a text file (UTF-8)",
        str(tmp_path): f"{tmp_path}: this is a folder; name an experiment's YAML file in it",
        "no/such/place.yaml": "no/such/place.yaml: there is no such file",
        "a\0b": "'a\\x00b': this cannot be the name of a file",
        "x" * 300: "'xxxxxx",
    }
    for name, sentence in sentences.items():
        with pytest.raises(ConfigError) as caught:
            load_experiment(name)
        assert str(caught.value).startswith(sentence)


# --- fuzz: one key at a time -----------------------------------------------------------------------------------------------------


def _paths(value: Any, at: tuple = ()) -> list[tuple]:
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [p for k, v in items for p in [(*at, k), *_paths(v, (*at, k))]]


PLAIN = parse_yaml(TEXT)
JUNK = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 70),
    st.sampled_from([10**6, 2**31, 2**63, 10**30, -(10**30)]),
    st.floats(allow_nan=True, allow_infinity=True),
    st.sampled_from(
        [0.0, -0.0, 1e-320, 1e-30, 1e30, 1e300, "1e-3", "", "no", "2pi", "nan", "../x", "os:system", "spectral", "leith"]
    ),
    st.text(max_size=8),
    st.lists(st.one_of(st.integers(-3, 40), st.floats(), st.text(max_size=3)), max_size=3),
    st.dictionaries(
        st.sampled_from(["use", "x", "shape", "dt", "drift"]), st.one_of(st.integers(-3, 40), st.text(max_size=4)), max_size=2
    ),
)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _is_whole(value: Any, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


# an oracle of its own: what each key may be, whatever the configuration thinks
MAY_BE = {
    ("equation", "viscosity"): lambda v: _is_number(v) and v >= 0,
    ("equation", "forcing", "drag"): lambda v: _is_number(v) and v >= 0,
    ("equation", "forcing", "amplitude"): _is_number,
    ("equation", "forcing", "wavenumber"): lambda v: _is_whole(v, 1),
    ("domain", "lengths", 0): lambda v: (_is_number(v) and v > 0) or v == "2pi",
    ("initial", "max_speed"): lambda v: _is_number(v) and v > 0,
    ("initial", "peak_wavenumber"): lambda v: _is_number(v) and v > 0,
    ("samples", "count"): lambda v: _is_whole(v, 1),
    ("samples", "seed"): lambda v: _is_whole(v, 0),
    ("time", "end"): lambda v: _is_number(v) and v > 0.5,
    ("time", "frames"): lambda v: _is_whole(v, 1),
    ("time", "statistics_from"): lambda v: v is None or (_is_number(v) and 0 <= v < 1),
    ("reference", "shape", 0): lambda v: _is_whole(v, 16),
    ("reference", "precision"): lambda v: v in ("float32", "float64"),
    ("runs", "bare", "shape", 0): lambda v: _is_whole(v, 4) and v <= 32,
    ("runs", "bare", "dt"): lambda v: v is None or (_is_number(v) and 1e-9 < v <= 1),
    ("runs", "smagorinsky", "cfl"): lambda v: v is None or (_is_number(v) and 0 < v <= 10),
    ("runs", "smagorinsky", "corrections", 0, "cs"): lambda v: _is_number(v) and v >= 0,
    ("runs", "mine", "corrections", 0, "width"): lambda v: _is_whole(v, 0) and v <= 100,
    ("runs", "mine", "may_diverge"): lambda v: isinstance(v, bool),
    ("compare", "modes"): lambda v: v is None or (_is_whole(v, 1) and v <= 7),
    ("checks", "all", "drift"): lambda v: v is None or (_is_number(v) and v >= 0),
}


@settings(max_examples=120, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
@given(st.sampled_from(_paths(PLAIN)), JUNK, st.sampled_from(["replace", "replace", "replace", "delete", "rename"]))
@example(("runs",), None, "replace")
@example(("runs", "bare"), None, "replace")
@example(("samples", "count"), 2**31, "replace")
@example(("runs", "smagorinsky", "corrections", 0, "cs"), "1e-3", "replace")
@example(("equation", "forcing"), {"use": "x"}, "replace")
@example(("runs", "mine", "corrections", 0, "use"), "os:system", "replace")
def test_fuzzed_configurations(folder: Path, path: tuple, junk: Any, how: str):
    data = copy.deepcopy(PLAIN)
    here = data
    for part in path[:-1]:
        here = here[part]
    if how == "replace":
        here[path[-1]] = junk
    else:
        value = here.pop(path[-1])
        if how == "rename" and isinstance(here, dict):
            here[str(path[-1])[:-1] + "_"] = value
    case, sentence = attempt(lambda: experiment_from(data, folder / "case.yaml"))
    if case is None:
        assert "\n" not in sentence
        assert len(sentence) < 600
        return
    # whatever is accepted is right, complete and stable
    if how == "replace" and path in MAY_BE:
        assert MAY_BE[path](junk), f"{path} accepted {junk!r}"
    assert how != "rename" or path[0] == "runs", f"a renamed {path} was accepted"
    again = experiment_from(parse_yaml(yaml.safe_dump(case.resolved)), folder / "case.yaml")
    assert again.config_hash == case.config_hash


@settings(max_examples=80, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
@given(st.integers(0, len(TEXT) - 1), st.text(max_size=3), st.integers(0, 12))
def test_fuzzed_text_is_parsed_or_refused(position: int, new: str, removed: int):
    text = TEXT[:position] + new + TEXT[position + removed :]
    assert "\n" not in attempt(lambda: parse_yaml(text))[1]


@settings(max_examples=80, deadline=None)
@given(st.text(alphabet="runsbaetimdhp.[]=0123{}:, ", max_size=40))
def test_fuzzed_overrides_are_applied_or_refused(override: str):
    assert "\n" not in attempt(lambda: apply_override(copy.deepcopy(PLAIN), override))[1]
