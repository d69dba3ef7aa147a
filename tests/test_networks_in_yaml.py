"""Networks by name in YAML: built inside their closures, refused in one sentence, kept with the weights, listed and checked."""

import functools
import re
import types
from pathlib import Path

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_config import refusal
from typer.testing import CliRunner

from hybridsim.check import Line, closure_lines
from hybridsim.cli import app
from hybridsim.config import FROM_RUN, catalogue, experiment_from, load_class, load_experiment, make_part
from hybridsim.corrections.fourier import FNO
from hybridsim.corrections.learned import LearnedFlux
from hybridsim.corrections.networks import CNN, UNet
from hybridsim.show import experiment_tree
from hybridsim.storage import save_weights

TEXT = """\
equation: {use: navier_stokes, viscosity: 1e-3}
domain: {lengths: [2pi, 2pi]}
initial: {use: random_velocity, peak_wavenumber: 2}
time: {end: 1.0, frames: 10}
reference: {solver: spectral, shape: [16, 16]}
runs:
  bare: {solver: finite_volume, shape: [8, 8], dt: 0.05}
  mine: {solver: finite_volume, shape: [8, 8], dt: 0.05, corrections: [{use: learned_flux, network: {use: unet, width: 2}}]}
"""

MY_NET = '''
import equinox as eqx
import jax


class MyNet(eqx.Module):
    """y = s W u."""

    weights: jax.Array
    scale: float = eqx.field(static=True)

    def __init__(self, channels_in: int, channels_out: int, scale: float = 0.1, *, key):
        if scale > 1:
            raise ValueError(f"scale: at most 1, found {scale}")
        self.weights = jax.random.normal(key, (channels_out, channels_in))
        self.scale = scale

    def __call__(self, u, periodic=None):
        return self.scale * jax.numpy.tensordot(self.weights.astype(u.dtype), u, 1)


class NoNet(eqx.Module):
    """A module that cannot know how many channels there are."""

    width: int = 3
'''
AT = "runs.mine.corrections[0]"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "case.yaml").write_text(TEXT)
    (tmp_path / "my_net.py").write_text(MY_NET)
    return tmp_path


def network_in(folder: Path, *overrides: str):
    return load_experiment(folder / "case.yaml", overrides).closures_for("mine", random=False)[0].network


def test_a_network_is_built_inside_its_closure(folder: Path):
    network = network_in(folder)
    assert isinstance(network, UNet)
    assert network.last.weights.shape == (3, 2, 1, 1)  # three components of the stress, two channels
    fno = network_in(folder, f"{AT}.network=fno")
    assert isinstance(fno, FNO)
    assert network_in(folder, f"{AT}.network={{use: fno, modes: [3, 2]}}").spectral[0].modes == (3, 2)
    assert isinstance(network_in(folder, f"{AT}.network=null"), CNN)
    assert network_in(folder, f"{AT}.network.width=5").last.weights.shape == (3, 5, 1, 1)
    assert network_in(folder, f"{AT}.network=my_net.py:MyNet").scale == 0.1
    assert network_in(folder, f"{AT}.network={{use: 'hybridsim.corrections.networks:CNN', depth: 1}}").layers[0].weights.ndim == 4


def test_a_run_is_resolved_in_full_and_loads_again(folder: Path):
    for override in (f"{AT}.network.levels=1", f"{AT}.network={{use: my_net.py:MyNet, scale: 0.5}}", f"{AT}.network=null"):
        case = load_experiment(folder / "case.yaml", [override])
        again = experiment_from(case.resolved, folder / "case.yaml")
        assert (again.resolved, again.config_hash) == (case.resolved, case.config_hash)
    assert case.resolved["runs"]["mine"]["corrections"][0]["network"] is None
    unet = load_experiment(folder / "case.yaml").resolved["runs"]["mine"]["corrections"][0]["network"]
    assert unet == {"use": "unet", "width": 2, "levels": 2, "kernel": 3, "activation": "gelu"}


def test_a_changed_file_of_a_network_is_another_experiment(folder: Path):
    override = [f"{AT}.network=my_net.py:MyNet"]
    before = load_experiment(folder / "case.yaml", override)
    assert set(before.files) == {"my_net.py"}
    (folder / "my_net.py").write_text(MY_NET + "\n\nA = 1\n")
    assert load_experiment(folder / "case.yaml", override).config_hash != before.config_hash


@pytest.mark.parametrize("network", ["{use: unet, width: 2, levels: 1}", "{use: my_net.py:MyNet, scale: 0.25}"])
def test_weights_alone_bring_their_network_back(folder: Path, network: str):
    made = load_experiment(folder / "case.yaml", [f"{AT}.network={network}"])
    (closure,) = made.closures_for("mine", random=False)
    closure = jax.tree.map(lambda a: jnp.arange(a.size, dtype=a.dtype).reshape(a.shape) if eqx.is_array(a) else a, closure)
    save_weights(folder / "trained.safetensors", closure, made.weights_header("mine"))
    for extra in ("", f", network: {network}", ", width: 16"):
        lean = f"runs.mine.corrections=[{{use: learned_flux, weights: trained.safetensors{extra}}}]"
        case = load_experiment(folder / "case.yaml", [lean])
        (found,) = case.closures_for("mine")
        for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(closure), strict=True):
            np.testing.assert_array_equal(a, b)
        assert case.resolved["runs"]["mine"]["corrections"][0]["network"] == made.weights_header("mine")["arguments"]["network"]
    other = "runs.mine.corrections=[{use: learned_flux, weights: trained.safetensors, network: {use: fno}}]"
    assert refusal(folder, other).startswith(
        f"{AT}.network: found {{use: 'fno'}}, but the weights trained.safetensors were trained"
    )


def test_without_a_network_the_weights_are_those_that_they_were(folder: Path):
    """The names of the arrays of shipped weights: none may change."""
    (closure,) = load_experiment(folder / "case.yaml", [f"{AT}.network=null"]).closures_for("mine", random=False)
    names = [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(eqx.filter(closure, eqx.is_array))]
    assert names == [f".network.layers[{i}].{part}" for i in range(4) for part in ("weights", "bias")]


SENTENCES = [
    (f"{AT}.network.width=0", f"{AT}.network.width: must be positive, found 0"),
    (f"{AT}.network.width=2.5", f"{AT}.network.width: needs a whole number, found 2.5"),
    (f"{AT}.network.wdth=2", f"{AT}.network.wdth: UNet takes no 'wdth'; did you mean 'width'?"),
    (f"{AT}.network=unett", f"{AT}.network: there is no network 'unett'; did you mean 'unet'?"),
    (f"{AT}.network={{use: unet, key: 3}}", f"{AT}.network.key: 'key' is supplied by the run and not written in YAML; remove it"),
    (f"{AT}.network={{use: fno, modes: [3]}}", f"{AT}.network.modes: needs one number, or one per axis (2); found [3]"),
    (f"{AT}.network={{use: my_net.py:MyNet, scale: 2}}", f"{AT}.network.scale: at most 1, found 2.0"),
    (
        f"{AT}.network=my_net.py:NoNet",
        f"{AT}.network: NoNet is no network; a network takes channels_in and channels_out",
    ),
    (f"{AT}.network=hybridsim.corrections.eddy:Leith", f"{AT}.network: Leith is a closure, not a network"),
    (f"{AT}.width=8", f"{AT}.width: found 8 beside a network of its own; give it inside `network`, or leave it out"),
]


@pytest.mark.parametrize(("override", "sentence"), SENTENCES, ids=[o.removeprefix(AT)[:40] for o, _ in SENTENCES])
def test_refusals_word_for_word(folder: Path, override: str, sentence: str):
    assert refusal(folder, override) == sentence


def test_an_argument_called_network_may_be_plain_or_needed(folder: Path):
    (folder / "mine.py").write_text(
        "import equinox as eqx\nfrom hybridsim.contract import Source\n\n\n"
        "class Plain(Source):\n    network: str = eqx.field(static=True, default='x')\n\n"
        "    def __call__(self, view, memory=None, key=None):\n        return 0 * view.u\n\n\n"
        "class Needs(Source):\n    network: eqx.Module\n\n"
        "    def __call__(self, view, memory=None, key=None):\n        return self.network(view.u)\n"
    )
    case = load_experiment(folder / "case.yaml", ["runs.mine.corrections=[{use: mine.py:Plain, network: wide}]"])
    assert case.closures_for("mine")[0].network == "wide"
    sentence = refusal(folder, "runs.mine.corrections=[{use: mine.py:Needs}]")
    assert sentence == f"{AT}.network: Needs needs a network, found nothing"


def test_the_examples_of_the_page_are_understood(folder: Path):
    page = (Path(__file__).parent.parent / "docs" / "closures.md").read_text(encoding="utf-8")
    yaml, python = (re.findall(rf"```{kind}\n(.*?)```", page, re.S)[0] for kind in ("yaml", "python"))
    (folder / "my_net.py").write_text(python)
    (folder / "case.yaml").write_text(
        TEXT.split("  mine:")[0] + "  mine:\n    solver: finite_volume\n    shape: [8, 8]\n    dt: 0.05\n"
    )
    with (folder / "case.yaml").open("a") as file:
        file.write("".join(f"    {line}\n" for line in yaml.splitlines()))
    closures = load_experiment(folder / "case.yaml").closures_for("mine", random=False)
    assert [type(c.network).__name__ for c in closures] == ["CNN", "FNO", "UNet", "MyNet"]
    assert closures[3].network.scale == 2.0


# --- from the command line -------------------------------------------------------------------------------------------------------


def test_networks_are_listed_with_their_arguments(x64):
    result = CliRunner().invoke(app, ["list", "networks"], env={"COLUMNS": "200"})
    assert result.exit_code == 0
    for name in catalogue("networks"):
        (line,) = [line for line in result.stdout.splitlines() if f"│ {name} " in line]
        assert "width" in line
        assert "channels" not in line.rpartition("│ ")[0].rpartition("│")[2]


def test_the_tree_of_a_run_shows_the_network(folder: Path, capsys):
    from rich.console import Console

    console = Console(width=200)
    console.print(experiment_tree(load_experiment(folder / "case.yaml"), timing=False))
    shown = capsys.readouterr().out
    assert "network  UNet  corrections/networks.py:" in shown


def test_check_builds_the_network(x64, tmp_path, monkeypatch):
    """`hybridsim check learned_flux 'network={use: my_net.py:MyNet}'`; what is checked then is in the slow test below."""
    (tmp_path / "my_net.py").write_text(MY_NET)
    seen = []

    def look(label, solver, closure, file, first):
        seen.append((type(closure.network).__name__, closure.network.scale))
        return types.SimpleNamespace(lines=[Line("place", label, "Flux", "", True)])

    monkeypatch.setattr("hybridsim.check._Checks", look)
    closure_lines("learned_flux", {"network": {"use": "my_net.py:MyNet", "scale": 1.0}}, tmp_path)
    assert set(seen) == {("MyNet", 1.0)}
    assert len(seen) >= 9


@pytest.mark.slow
@pytest.mark.parametrize(
    ("use", "arguments"),
    [("learned_flux", {"network": name}) for name in sorted(catalogue("networks"))]
    + [("graph_flux", {"width": 4}), ("tensor_basis_flux", {"width": 4})],
    ids=lambda q: q if isinstance(q, str) else str(next(iter(q.values()))),
)
def test_every_network_keeps_what_a_closure_promises(x64, tmp_path, use, arguments):
    failed = [line for line in closure_lines(use, arguments, tmp_path) if line.passed is False]
    assert failed == []


# --- from Python -----------------------------------------------------------------------------------------------------------------


def test_a_factory_is_a_class_or_part_of_one():
    for factory, kind in ((FNO, FNO), (functools.partial(UNet, width=2, levels=1), UNet), (None, CNN)):
        closure = eqx.filter_eval_shape(lambda f=factory: LearnedFlux(1, network=f, key=jax.random.key(0)))
        assert isinstance(closure.network, kind)


@pytest.mark.parametrize("use", [name for name in catalogue("closures") if name.startswith("learned")])
def test_every_learned_closure_takes_a_network(use):
    part = make_part(use, load_class(catalogue("closures")[use]), {"network": "graph_network"}, ("corrections",), FROM_RUN)
    closure = eqx.filter_eval_shape(lambda: part.build(dims=2, free_weights=1, variables=None, key=jax.random.key(0)))
    assert type(closure.network).__name__ == "GraphNetwork"
