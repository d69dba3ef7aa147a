"""What a gradient through many steps costs, in forward runs and in memory, for each solver and kind of checkpoints.

    python -m hybridsim.experiments.gradient_cost [--size 256] [--steps 64] [--rounds 5] [--out gradient_cost.json]

The gradient of Σ u(T)² with respect to the initial state, float32, in turn with the forward run in one process. Checkpoints
are those of `rollout`; memory is what the compiled gradient allocates.
"""

import argparse
import statistics
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from hybridsim.contract import AbstractSolver, AbstractStepper
from hybridsim.grid import Grid
from hybridsim.model import Model, State, rollout
from hybridsim.solvers.finite_volume import StaggeredFiniteVolume
from hybridsim.solvers.incompressible import NavierStokes
from hybridsim.solvers.initial import RandomVelocity, RandomWaves
from hybridsim.solvers.kuramoto_sivashinsky import KuramotoSivashinsky, SpectralKS
from hybridsim.solvers.spectral import Spectral2D
from hybridsim.solvers.steppers import ETDRK4, SSPRK3, CrankNicolsonRK4, ForwardEuler
from hybridsim.storage import environment, write_json

CHECKPOINTS: tuple[dict[str, Any], ...] = (
    {"checkpoint_levels": 0},
    {"checkpoint_levels": 1},
    {"checkpoint_levels": 2},
    {"gradient_memory": 48},
)


def told(checkpoints: dict[str, Any]) -> str:
    """What a row says of them."""
    ((name, value),) = checkpoints.items()
    return f"{value} levels" if name == "checkpoint_levels" else f"within {value} MiB"


def cases(size: int) -> list[tuple[str, AbstractSolver, AbstractStepper, float]]:
    """(name, solver, stepper, Δt)."""
    grid, equation = Grid((size, size), (2 * np.pi,) * 2), NavierStokes(1e-3)
    dt = 0.5 * grid.spacing[0] / 7
    line = Grid((2 * size,), (size / 4,))
    found: list[tuple[str, AbstractSolver, AbstractStepper, float]] = [
        ("spectral, CN-RK4", Spectral2D(grid, equation), CrankNicolsonRK4(), dt),
        ("spectral, ETDRK4", Spectral2D(grid, equation), ETDRK4(), dt),
        ("Kuramoto–Sivashinsky, ETDRK4", SpectralKS(line, KuramotoSivashinsky()), ETDRK4(), 0.05),
    ]
    for convection in ("central", "van_leer"):
        for name, stepper in (("Euler", ForwardEuler()), ("SSP-RK3", SSPRK3())):
            solver = StaggeredFiniteVolume(grid, equation, convection)
            found.append((f"finite volume {convection}, {name}", solver, stepper, dt / 2))
    return found


def measured(
    solver: AbstractSolver, stepper: AbstractStepper, dt: float, steps: int, rounds: int, **checkpoints: Any
) -> dict[str, Any]:
    model = Model(solver, stepper, dt)
    places = tuple(v.at for v in solver.variables)
    initial = RandomWaves() if solver.grid.ndim == 1 else RandomVelocity()
    u = solver.project(initial(jax.random.key(0), solver.grid, places, jnp.float32))

    def last(u):
        return rollout(model, State(u), 1, every=steps, **checkpoints).u[-1]

    compiled = []
    for function in (last, jax.grad(lambda u: jnp.sum(last(u) ** 2))):
        begin = time.perf_counter()
        made = jax.jit(function).lower(u).compile()
        compiled.append((made, time.perf_counter() - begin))
        jax.block_until_ready(made(u))
    seconds: list[list[float]] = [[], []]
    for _ in range(rounds):
        for (made, _), each in zip(compiled, seconds, strict=True):
            begin = time.perf_counter()
            jax.block_until_ready(made(u))
            each.append(time.perf_counter() - begin)
    ratios = sorted(b / a for a, b in zip(*seconds, strict=True))
    memory = compiled[1][0].memory_analysis()
    return {
        **checkpoints,
        "forward_s": statistics.median(seconds[0]),
        "forward_runs": [ratios[0], statistics.median(ratios), ratios[-1]],
        "memory_mb": memory.temp_size_in_bytes / 2**20,
        "compile_s": compiled[1][1],
    }


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--size", type=int, default=256)
    parser.add_argument("--steps", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", default=None, help="also write the rows as JSON")
    options = parser.parse_args(arguments)
    rows = []
    print(f"gradient through {options.steps} steps at {options.size}² ({2 * options.size} on the line), float32")
    for name, solver, stepper, dt in cases(options.size):
        for checkpoints in CHECKPOINTS:
            row = {"case": name} | measured(solver, stepper, dt, options.steps, options.rounds, **checkpoints)
            rows.append(row)
            low, median, high = row["forward_runs"]
            runs = f"{median:5.2f} [{low:.2f}, {high:.2f}] forward runs"
            took = f"{row['memory_mb']:8.1f} MB  compile {row['compile_s']:.1f} s"
            print(f"{name:32s} {told(checkpoints):14s} {runs} {took}", flush=True)
    if options.out:
        write_json(options.out, {"versions": environment(), "size": options.size, "steps": options.steps, "rows": rows})


if __name__ == "__main__":
    main()
