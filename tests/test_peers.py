"""`hybridsim peers`: both sides of a pair do the same work, costs are read off as stated, and the file says so."""

import json
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rich.console import Console
from typer.testing import CliRunner

from hybridsim.cli import app
from hybridsim.experiments import peers
from hybridsim.grid import Grid
from hybridsim.solvers.incompressible import NavierStokes
from hybridsim.solvers.initial import RandomVelocity
from hybridsim.solvers.spectral import Spectral2D

pytestmark = pytest.mark.filterwarnings("ignore:::jax_cfd", "ignore:::tree_math", "ignore::DeprecationWarning")


@pytest.fixture(autouse=True)
def promotion():
    """exponax multiplies arrays of different rank."""
    with jax.numpy_rank_promotion("allow"):
        yield


def pairs(family, dims, n):
    return [pair for pair in peers.PAIRS[family](False, jnp.float64) if pair.size == (n,) * dims]


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(
    ("family", "dims", "n", "limit"),
    [
        # jax-cfd and exponax leave out the last row of modes that we keep: the flow has little there.
        ("spectral", 2, 256, 2e-6),
        ("ks", 1, 512, 1e-10),
        pytest.param("finite_volume", 2, 32, 1e-10, marks=pytest.mark.slow),
        pytest.param("finite_volume", 3, 16, 1e-10, marks=pytest.mark.slow),
    ],
)
def test_pairs_do_the_same_work(family, dims, n, limit):
    """After ten steps the states agree, where the schemes are the same; limited ones differ in second order."""
    found = pairs(family, dims, n)
    assert found
    for pair in found:
        mine, peer = pair.codes()
        states = [code.values(peers.Timed(code, jnp.float64)(pair.dt, peers.COMPARED_AFTER)[1]) for code in (mine, peer)]
        moved = np.abs(states[0] - mine.values(mine.start)).max() / np.abs(states[0]).max()
        difference = np.abs(states[0] - states[1]).max() / np.abs(states[0]).max()
        print(pair.case, difference, moved)
        assert difference < (0.3 * moved if "van_leer" in pair.case else limit)
        assert moved > 1e-3
        assert peer.name in ("jax-cfd", "exponax")


@pytest.mark.usefixtures("x64")
def test_the_number_of_steps_is_an_argument():
    pair = pairs("ks", 1, 64)[0]
    mine = peers.Timed(pair.codes()[0], jnp.float64)
    once, twice = (mine.code.values(mine(0.02 / n, n)[1]) for n in (32, 64))
    assert 0 < np.abs(once - twice).max() < 1e-5
    assert mine.compile_s > 0
    assert 0 < mine.memory_mb < 1


def run(error, cost, rounds=1):
    return peers.Run(error, [cost] * rounds, 64, "etdrk4", 10)


def test_costs_are_read_between_runs_and_never_beyond():
    runs = [run(1e-1, 1.0), run(1e-2, 4.0), run(5e-2, 8.0), run(1e-3, 16.0)]
    assert peers.cost_at(1e-2, runs, 0)[0] == pytest.approx(4)
    assert peers.cost_at(10**-1.5, runs, 0)[0] == pytest.approx(2)
    assert peers.cost_at(10**-2.5, runs, 0)[0] == pytest.approx(8)
    assert peers.cost_at(0.5, runs, 0)[0] == 1  # no cheaper stable run
    assert peers.cost_at(9e-4, runs, 0) is None


@pytest.mark.usefixtures("x64")
def test_errors_of_interpolants_count_what_is_missing():
    """Parseval: a coarse grid's answer lacks just the energy of the modes that it does not carry."""
    fine, coarse = (Spectral2D(Grid((n, n), (2 * np.pi,) * 2), NavierStokes(1e-3), dealias="none") for n in (64, 16))
    u = fine.project(RandomVelocity(4.0)(jax.random.key(0), fine.grid, (fine.grid.centre,) * 2, jnp.float64))
    error = peers._interpolated(np.asarray(u))
    assert error(np.asarray(u)) < 1e-14
    cut = np.asarray(coarse.restrict(u, fine.grid, fine.variables))
    energy = lambda q: float((np.asarray(q) ** 2).mean())  # noqa: E731
    assert error(cut) == pytest.approx(np.sqrt(1 - energy(cut) / energy(u)), rel=1e-9)
    assert error(1.1 * np.asarray(u)) == pytest.approx(0.1)


def small_of(family):
    """The family's first pair, and the two smallest grids of its first contest."""
    pairs_of, contests_of = peers.PAIRS[family], peers.CONTESTS[family]

    def first_pair(quick, dtype):
        yield next(pairs_of(quick, dtype))

    def contest(quick, dtype):
        found = next(contests_of(quick, dtype))
        entries = found.entries()
        sizes = sorted({entry.size for entry in entries})[:2]
        yield found._replace(entries=lambda: [entry for entry in entries if entry.size in sizes])

    return first_pair, contest


@pytest.mark.parametrize("family", ["ks", pytest.param("finite_volume", marks=pytest.mark.slow)])
def test_the_table_and_the_file(tmp_path, monkeypatch, family):
    first_pair, contest = small_of(family)
    monkeypatch.setitem(peers.PAIRS, family, first_pair)
    monkeypatch.setitem(peers.CONTESTS, family, contest)
    monkeypatch.setattr(peers, "SECONDS", 1e-3)
    path, console = tmp_path / "peers.json", Console(width=170, record=True)
    peers.run_peers((family,), True, 3, "float32", str(path), console)
    text, found = console.export_text(), json.loads(path.read_text())
    assert set(found) == {"date", "versions", "compiler_options", "rows", "equal_accuracy"}
    (row,) = found["rows"]
    expected = "family case size dtype scheme ours_ns peer peer_ns ratio memory_mb peer_memory_mb compile_s peer_compile_s error"
    assert list(row) == expected.split()
    assert row["ratio"] == sorted(row["ratio"])
    assert row["dtype"] == "float32"
    assert min(row["ours_ns"], row["peer_ns"], row["ratio"][0]) > 0
    assert found["equal_accuracy"]
    for contest in found["equal_accuracy"]:
        assert contest["ours"]["error"] <= contest["error"] * 1.0001
        assert contest["peers"]["error"] <= contest["error"] * 1.0001
        assert contest["ratio"][0] > 0
    assert "ratio [low, high]" in text
    assert "…" not in text


def test_a_peer_that_is_missing_is_named(tmp_path, monkeypatch):
    def broken(quick, dtype):
        def codes():
            raise ImportError("No module named 'exponax'")

        yield peers.Pair("ks", "ETDRK4", (8,), 8, 0.1, codes)

    monkeypatch.setitem(peers.PAIRS, "ks", broken)
    monkeypatch.setitem(peers.CONTESTS, "ks", lambda quick, dtype: iter(()))
    console = Console(width=170, record=True)
    peers.run_peers(("ks",), True, 3, "float32", str(tmp_path / "peers.json"), console)
    assert "not timed: ETDRK4, 8: No module named 'exponax'" in console.export_text()
    assert json.loads((tmp_path / "peers.json").read_text())["rows"] == []


def test_what_was_found_is_saved_when_it_is_stopped(tmp_path, monkeypatch):
    first_pair = small_of("ks")[0]

    def stopped(quick, dtype):
        yield from first_pair(quick, dtype)
        raise KeyboardInterrupt

    monkeypatch.setitem(peers.PAIRS, "ks", stopped)
    monkeypatch.setattr(peers, "SECONDS", 1e-3)
    with pytest.raises(KeyboardInterrupt):
        peers.run_peers(("ks",), True, 3, "float32", str(tmp_path / "peers.json"), Console(width=170, record=True))
    assert len(json.loads((tmp_path / "peers.json").read_text())["rows"]) == 1


@pytest.mark.slow
def test_without_exponax_the_others_go_on(monkeypatch):
    """The contest with jax-cfd does not need it, and the refusal says what to do."""
    monkeypatch.setitem(sys.modules, "exponax", None)
    # The converged answer takes long, and who enters does not depend on it.
    monkeypatch.setattr(peers, "solved", lambda solver, u, end, steps: u)
    first, second = peers.spectral_contests(True, jnp.float32)
    assert {entry.code.name for entry in first.entries()} == {"hybridsim", "jax-cfd"}
    with pytest.raises(ValueError, match="pip install exponax"):
        second.entries()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["euler"], "family: 'euler' is not one of spectral, ks, finite_volume"),
        (["ks", "--precision", "float16"], "--precision: 'float16' is not one of float32, float64"),
        (["ks", "--out", "no/such/folder/peers.json"], "its folder does not exist"),
    ],
)
def test_refusals(arguments, said):
    result = CliRunner().invoke(app, ["peers", *arguments])
    assert result.exit_code == 2
    assert said in result.stderr
