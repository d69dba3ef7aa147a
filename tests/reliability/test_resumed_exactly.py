"""R5: a state that was stored and read goes on to the same bits, for every solver, stepper, precision and kind of closure.

Two samples are stepped in four chunks. After the second the state goes to disk, comes back into objects that were built anew from
the same YAML, and both go on (DESIGN: the promise holds for the same version, precision, threads, devices and kind of processor).
"""

import copy
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hybridsim import storage
from hybridsim.config import catalogue, experiment_from, solver_tables
from hybridsim.experiment import _begin, _chunk, _prepare, model_from
from hybridsim.reference import initial_state
from hybridsim.samples import gathered
from hybridsim.yaml_reader import ConfigError

pytestmark = pytest.mark.usefixtures("x64")

NOISY = '''
import jax
import jax.numpy as jnp

from hybridsim.contract import Source


class Noisy(Source):
    """s = ε m ξ: noise ξ with a running mean m of |u|."""

    stochastic = True

    def init_memory(self, view):
        return jnp.ones(view.grid.shape, view.u.dtype)

    def __call__(self, view, memory=None, key=None):
        memory = 0.7 * memory + 0.3 * jnp.mean(jnp.abs(view.centred()), axis=0)
        noise = jax.random.normal(key, view.u.shape, view.u.dtype)
        return 1e-3 * memory[None] * noise, memory
'''

STARTS = {
    "kuramoto_sivashinsky": {"use": "random_waves", "warm_up": 0.0},
    "navier_stokes": {"use": "random_velocity", "peak_wavenumber": 2.0, "max_speed": 1.0, "warm_up": 0.0},
    "compressible": {"use": "compressible_turbulence", "mach": 0.3, "pressure": 1.0, "highest_mode": 2},
}
EQUATIONS = {
    "kuramoto_sivashinsky": {"use": "kuramoto_sivashinsky"},
    "navier_stokes": {"use": "navier_stokes", "viscosity": 0.01, "forcing": {"use": "kolmogorov", "wavenumber": 1}},
    "compressible": {"use": "compressible", "gamma": 1.4, "viscosity": 1e-3, "prandtl": 0.7},
}
CELLS = {1: [16], 2: [8, 8], 3: [8, 8, 8]}
STEP = {"kuramoto_sivashinsky": 0.02, "navier_stokes": 0.01, "compressible": 0.004}


def case(family: str, solver: str, dims: int, **run: Any) -> dict[str, Any]:
    """An experiment with one run of eight frames, three steps apart."""
    length = 22.0 if family == "kuramoto_sivashinsky" else 1.0 if family == "compressible" else 6.283185307179586
    dt, shape = STEP[family], CELLS[dims]
    initial = STARTS[family]
    if dims == 1 and family == "compressible":
        initial = {"use": "linear_wave"}
    return {
        "equation": copy.deepcopy(EQUATIONS[family]),
        "domain": {"lengths": [length] * dims},
        "initial": initial,
        "samples": {"count": 2, "seed": 5},
        "time": {"end": 8 * 3 * dt, "frames": 8},
        "reference": {"solver": solver, "shape": shape},
        "runs": {"one": {"solver": solver, "shape": shape, "dt": dt, **run}},
    }


def _bits(tree: Any) -> list[bytes]:
    keys = lambda a: jax.random.key_data(a) if jnp.issubdtype(a.dtype, jax.dtypes.prng_key) else a  # noqa: E731
    return [np.asarray(keys(a)).tobytes() for a in jax.tree.leaves(tree)]


def differences(data: dict[str, Any], folder: Path) -> list[str]:
    """Names of what is not the same after the detour over the disk; `ConfigError` where there is no such run."""
    folder.mkdir()
    (folder / "mine.py").write_text(NOISY)

    def built():
        made = experiment_from(copy.deepcopy(data), folder / "case.yaml")
        solver, keys = made.solver("one"), jax.random.split(jax.random.key(5), 2)
        dtype = np.dtype(made.dtype("one"))
        start = np.stack([np.asarray(initial_state(made.initial(), k, solver, np.dtype(np.float64))) for k in keys])
        model = model_from(made, "one", start)
        every = made.steps_per_frame("one", model.dt).steps
        state = _begin(model, jnp.asarray(start, dtype), keys)
        return model, _prepare(model, dtype), state, every

    model, prepared, state, every = built()
    compiled = _chunk.lower(model, prepared, state, 2, every).compile()
    checkpoints, shown = storage.Checkpoints(folder / "checkpoints"), []
    begun = _bits(state)
    for n in range(4):
        state, out = compiled(model, prepared, state, 2, every)
        state = gathered(state)
        shown.append(out)
        if n == 1:
            checkpoints.save(4, state)
    assert _bits(state) != begun
    assert all(np.isfinite(np.asarray(a)).all() for a in jax.tree.leaves(shown))
    model, prepared, like, every = built()
    found = checkpoints.latest(like)
    assert found is not None
    again = found[1]
    wrong = []
    for n in (2, 3):
        again, out = compiled(model, prepared, again, 2, every)
        again = gathered(again)
        if _bits(out) != _bits(shown[n]):
            wrong.append(f"frames of chunk {n + 1}")
    named = jax.tree_util.tree_flatten_with_path(state)[0]
    wrong += [jax.tree_util.keystr(p) for (p, _), a, b in zip(named, _bits(state), _bits(again), strict=True) if a != b]
    return wrong


def record(reliability, folder: Path, name: str, data: dict[str, Any], possible: bool = False) -> bool:
    """One case; whether there is such a run at all."""
    try:
        wrong = differences(data, folder)
    except (ConfigError, ValueError) as error:
        # whether the configuration says so itself is tested with the others
        if possible or not (isinstance(error, ConfigError) or str(error).startswith("stepper: ")):
            raise
        return False
    reliability("R5", not wrong, wrong and f"{name}: {', '.join(wrong)}")
    assert not wrong, f"{name}: {wrong}"
    return True


SOLVERS = [(f, s, d) for f, table in solver_tables().items() for s, dims in table.items() for d in dims]


@pytest.mark.slow
@pytest.mark.reliability("R5")
@pytest.mark.parametrize("precision", ["float32", "float64"])
@pytest.mark.parametrize(("family", "solver", "dims"), SOLVERS, ids=["-".join(map(str, s)) for s in SOLVERS])
def test_every_stepper(tmp_path: Path, reliability, family: str, solver: str, dims: int, precision: str):
    count = 0
    for stepper in catalogue("steppers"):
        name = f"{family} {solver} {dims}D {stepper} {precision}"
        data = case(family, solver, dims, stepper=stepper, precision=precision)
        count += record(reliability, tmp_path / stepper, name, data)
    assert count


CLOSURES: dict[str, dict[str, Any]] = {
    "learned_flux": {"width": 4, "depth": 1},
    "learned_source": {"width": 4, "depth": 1},
    "learned_correction": {"width": 4, "depth": 1},
    "learned_step": {"width": 4, "depth": 1},
    "learned_interpolation": {"width": 4, "depth": 1},
    "graph_flux": {"width": 4},
    "tensor_basis_flux": {"width": 4, "depth": 1},
    "mine.py:Noisy": {},
}


def with_closure(family: str, solver: str, dims: int, use: str, **run: Any) -> dict[str, Any]:
    correction = {"use": use, **CLOSURES.get(use, {})}
    plain = {"use": "none", "like": solver} if use == "learned_step" else solver
    data = case(family, solver, dims, corrections=[correction], **run)
    data["runs"]["one"]["solver"] = plain
    return data


PLACES = [("kuramoto_sivashinsky", "finite_volume", 1), ("navier_stokes", "spectral", 2), ("navier_stokes", "finite_volume", 2)]
PLACES += [("navier_stokes", "finite_volume", 3), ("compressible", "finite_volume", 2)]


@pytest.mark.slow
@pytest.mark.reliability("R5")
@pytest.mark.parametrize(("family", "solver", "dims"), PLACES, ids=["-".join(map(str, s)) for s in PLACES])
def test_every_closure(tmp_path: Path, reliability, family: str, solver: str, dims: int):
    count = 0
    for i, use in enumerate([*catalogue("closures"), "mine.py:Noisy"]):
        for evaluate in ("step", "stage", 2):
            if use == "learned_step" or (evaluate == 2 and use != "learned_flux"):
                continue
            data = with_closure(family, solver, dims, use, substeps=2 if evaluate == 2 else 1)
            data["runs"]["one"]["corrections"][0]["evaluate"] = evaluate
            data["time"]["end"] *= 2 if evaluate == 2 else 1
            count += record(reliability, tmp_path / f"{i}-{evaluate}", f"{family} {solver} {dims}D {use} {evaluate}", data)
    assert count > 5


def stirred(**run: Any) -> dict[str, Any]:
    """A random force that remembers."""
    data = case("compressible", "finite_volume", 2, **run)
    data["equation"]["forcing"] = {"use": "ornstein_uhlenbeck"}
    return data


ADAPTIVE = {"adaptive": True, "cfl": 0.4, "dt": None}
SOME = {
    "waves": case("kuramoto_sivashinsky", "spectral", 1, stepper="etdrk4"),
    "flow, noise and memory": with_closure("navier_stokes", "finite_volume", 2, "mine.py:Noisy", precision="float64"),
    "flow, learned flux": with_closure("navier_stokes", "spectral", 2, "learned_flux", stepper="crank_nicolson_rk4"),
    "gas, adaptive": case("compressible", "finite_volume", 2, stepper="vl2", **ADAPTIVE),
}
MORE = {
    "gas, random force": stirred(precision="float64"),
    "waves, adaptive": case("kuramoto_sivashinsky", "finite_volume", 1, **ADAPTIVE, stepper="etdrk2"),
    "flow, adaptive": case("navier_stokes", "spectral", 2, **ADAPTIVE, precision="float64"),
    "flow, adaptive, noise and memory": with_closure("navier_stokes", "finite_volume", 2, "mine.py:Noisy", **ADAPTIVE),
    "gas, adaptive, random force": stirred(**ADAPTIVE),
}


@pytest.mark.reliability("R5")
@pytest.mark.parametrize("name", [*SOME, *(pytest.param(n, marks=pytest.mark.slow) for n in MORE)])
def test_some_runs(tmp_path: Path, reliability, name: str):
    record(reliability, tmp_path / "case", name, (SOME | MORE)[name], possible=True)
