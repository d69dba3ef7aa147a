"""Seconds per step of our 2D solvers against jax-cfd's, same scheme, in turn in one process.

    python -m hybridsim.experiments.paired_step [--size 256] [--steps 50] [--rounds 7] [--out paired_step.json]

Every pair starts from the same decaying flow in float32 and takes the same number of steps of the same Δt inside one compiled
`lax.scan`. Rounds alternate between the two, after one warm-up each; compile time is apart. The ratio is peer over ours: above 1
means that ours is faster. The difference of the velocities after all steps shows that both did the same work.
"""

import argparse
import functools
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from hybridsim.contract import AbstractSolver, AbstractStepper
from hybridsim.grid import Grid
from hybridsim.model import Model, advance
from hybridsim.solvers.finite_volume import StaggeredFiniteVolume
from hybridsim.solvers.incompressible import NavierStokes
from hybridsim.solvers.initial import RandomVelocity
from hybridsim.solvers.spectral import Spectral2D
from hybridsim.solvers.steppers import CrankNicolsonRK4, ForwardEuler
from hybridsim.storage import write_json

VISCOSITY = 1e-3
Stepped = tuple[Callable[[Any], Any], Any, Callable[[Any], np.ndarray]]
"""(compiled function of the start, the start, from the result to velocities)."""


def ours(solver: AbstractSolver, stepper: AbstractStepper, u: jax.Array, dt: float, steps: int) -> Stepped:
    model = Model(solver, stepper, dt)
    prepared = jax.jit(lambda: model.prepare(u.dtype))()

    def run(z, prepared):
        return advance(model, prepared, z, model.init_carry(u), jnp.zeros((), jnp.int32), steps)[0]

    compiled = jax.jit(run)
    z = prepared.solver.encode(u)
    return (lambda z: compiled(z, prepared)), z, lambda z: np.asarray(prepared.solver.decode(z))


def jax_cfd_spectral(solver: Spectral2D, u: jax.Array, dt: float, steps: int) -> Stepped:
    from jax_cfd.base import grids
    from jax_cfd.spectral import equations, time_stepping

    grid = grids.Grid(solver.grid.shape, domain=tuple((0, length) for length in solver.grid.lengths))
    # The peer's `smooth` is a 2/3-type filter.
    equation = equations.NavierStokes2D(VISCOSITY, grid, smooth=True)
    step = time_stepping.crank_nicolson_rk4(equation, dt)
    prepared = solver.prepare(u.dtype)

    @jax.jit
    def run(z):
        return jax.lax.scan(lambda q, _: (step(q), None), z, None, steps)[0]

    def velocities(z):
        return np.asarray(prepared.decode({"vorticity": z, "mean": jnp.zeros(2, u.dtype)}))

    return run, prepared.encode(u)["vorticity"], velocities


def jax_cfd_finite_volume(solver: StaggeredFiniteVolume, u: jax.Array, dt: float, steps: int) -> Stepped:
    from jax_cfd.base import advection, boundaries, equations, grids

    grid = grids.Grid(solver.grid.shape, domain=tuple((0, length) for length in solver.grid.lengths))
    periodic = boundaries.periodic_boundary_conditions(2)
    start = tuple(
        grids.GridVariable(grids.GridArray(q, at, grid), periodic) for q, at in zip(u, ((1.0, 0.5), (0.5, 1.0)), strict=True)
    )
    if solver.convection == "central":
        convect = advection.convect_linear
    else:

        def convect(v):
            return tuple(advection.advect_van_leer(c, v, dt) for c in v)

    step = equations.semi_implicit_navier_stokes(1.0, VISCOSITY, dt, grid, convect=convect)

    @jax.jit
    def run(v):
        return jax.lax.scan(lambda q, _: (step(q), None), v, None, steps)[0]

    return run, start, lambda v: np.stack([np.asarray(q.data) for q in v])


def pair(name: str, mine: Stepped, peer: Stepped, cells: int, steps: int, rounds: int) -> dict[str, Any]:
    """One row: both functions in turn, `rounds` times each."""
    seconds: dict[str, list[float]] = {"ours": [], "peer": []}
    compile_seconds, results = {}, {}
    for label, (run, start, _) in (("ours", mine), ("peer", peer)):
        begin = time.perf_counter()
        results[label] = jax.block_until_ready(run(start))
        compile_seconds[label] = time.perf_counter() - begin
    for _ in range(rounds):
        for label, (run, start, _) in (("ours", mine), ("peer", peer)):
            begin = time.perf_counter()
            jax.block_until_ready(run(start))
            seconds[label].append(time.perf_counter() - begin)
    ratios = sorted(b / a for a, b in zip(seconds["ours"], seconds["peer"], strict=True))
    to_ns = 1e9 / (cells * steps)
    a, b = mine[2](results["ours"]), peer[2](results["peer"])
    return {
        "case": name,
        "ours_ns": statistics.median(seconds["ours"]) * to_ns,
        "peer_ns": statistics.median(seconds["peer"]) * to_ns,
        "ratio": [ratios[0], statistics.median(ratios), ratios[-1]],
        "compile_s": [compile_seconds["ours"], compile_seconds["peer"]],
        "difference": float(np.abs(a - b).max() / np.abs(b).max()),
    }


def cases(size: int, steps: int) -> dict[str, Callable[[], tuple[Stepped, Stepped]]]:
    """Name -> the pair, made when asked for."""
    grid = Grid((size, size), (2 * np.pi, 2 * np.pi))
    equation = NavierStokes(VISCOSITY)
    initial = RandomVelocity(peak_wavenumber=4, max_speed=7)
    dt = 0.5 * grid.spacing[0] / 7

    def spectral():
        solver = Spectral2D(grid, equation, dealias="two_thirds")
        u = initial(jax.random.key(0), grid, (grid.centre,) * 2, jnp.float32)
        return ours(solver, CrankNicolsonRK4(), u, dt, steps), jax_cfd_spectral(solver, u, dt, steps)

    def finite_volume(convection):
        solver = StaggeredFiniteVolume(grid, equation, convection)
        u = initial(jax.random.key(0), grid, ((1.0, 0.5), (0.5, 1.0)), jnp.float32)
        u = solver.project(u)
        return ours(solver, ForwardEuler(), u, dt / 2, steps), jax_cfd_finite_volume(solver, u, dt / 2, steps)

    return {
        f"spectral CN-RK4 {size}²": spectral,
        f"finite volume van Leer Euler {size}²": functools.partial(finite_volume, "van_leer"),
        f"finite volume central Euler {size}²": functools.partial(finite_volume, "central"),
    }


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--size", type=int, default=256)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--out", default=None, help="also write the rows as JSON")
    options = parser.parse_args(arguments)
    device = jax.devices()[0]
    print(f"{device.device_kind}, jax {jax.__version__}, float32, ns per cell and step, ratio = peer / ours [low, median, high]")
    rows = []
    for name, make in cases(options.size, options.steps).items():
        mine, peer = make()
        row = pair(name, mine, peer, options.size**2, options.steps, options.rounds)
        rows.append(row)
        low, median, high = row["ratio"]
        print(
            f"{name:38s} ours {row['ours_ns']:6.1f}  jax-cfd {row['peer_ns']:6.1f}  ratio {median:.2f} [{low:.2f}, {high:.2f}]  "
            f"compile {row['compile_s'][0]:.1f} / {row['compile_s'][1]:.1f} s  difference {row['difference']:.1e}"
        )
    if options.out:
        write_json(options.out, {"device": device.device_kind, "jax": jax.__version__, "rows": rows})


if __name__ == "__main__":
    main()
