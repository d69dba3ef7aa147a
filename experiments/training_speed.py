"""What training costs: the gradient of networks inside a scan against stock convolutions, and whole updates, part by part.

    python -m hybridsim.experiments.training_speed [--rounds 5] [--quick] [--out training_speed.json]

Convolutions: the gradient of a chain of layers inside `lax.scan`, float32, ours in turn with the stock one in one process. Updates:
the median of one update of the trainer per unroll length, what compiling each length took, and the share that fetching windows and
writing logs has of it.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from hybridsim.contract import AbstractSolver, AbstractStepper
from hybridsim.convolution import convolution
from hybridsim.corrections.learned import LearnedFlux
from hybridsim.grid import Grid
from hybridsim.model import Model, State, rollout
from hybridsim.samples import use_all_cores
from hybridsim.solvers.compressible import CompressibleNavierStokes
from hybridsim.solvers.finite_volume import StaggeredFiniteVolume
from hybridsim.solvers.godunov import CompressibleFiniteVolume
from hybridsim.solvers.incompressible import Kolmogorov, NavierStokes
from hybridsim.solvers.initial import RandomVelocity, RandomWaves
from hybridsim.solvers.kuramoto_sivashinsky import KuramotoSivashinsky, SpectralKS
from hybridsim.solvers.spectral import Spectral2D
from hybridsim.solvers.steppers import ETDRK4, SSPRK3, VL2
from hybridsim.storage import environment, write_json
from hybridsim.train import Recipe, Task, train
from hybridsim.training_log import JsonLines
from hybridsim.windows import batch

CHAINS = (
    ("2D 64², 3 layers of 16", (64, 64), 3, 16),
    ("2D 64², 7 layers of 32", (64, 64), 7, 32),
    ("2D 64², 7 layers of 64", (64, 64), 7, 64),
    ("3D 16³, 3 layers of 16", (16, 16, 16), 3, 16),
)
"""Name, grid, layers and channels."""


def chain(shape: tuple[int, ...], layers: int, channels: int, method: str, count: int = 4) -> tuple[Callable, tuple]:
    """The gradient of `count` passes through a chain of layers in a scan, and its arguments."""
    keys = jax.random.split(jax.random.key(0), layers + 1)
    kernel = (3,) * len(shape)
    spread = (2 / (channels * 3 ** len(shape))) ** 0.5
    weights = [spread * jax.random.normal(k, (channels, channels, *kernel), jnp.float32) for k in keys[1:]]
    u = jax.random.normal(keys[0], (channels, *shape), jnp.float32)

    def loss(weights, u):
        def body(u, _):
            v = u
            for w in weights:
                v = jax.nn.relu(convolution(v, w, method=method))
            return u + 0.1 * v, None

        return jnp.sum(jax.lax.scan(body, u, None, count)[0] ** 2)

    return jax.jit(jax.grad(loss)), (weights, u)


def in_turn(pair: list[tuple[Callable, tuple]], rounds: int) -> list[list[float]]:
    """Seconds of each of the functions, called one after the other, `rounds` times."""
    for function, arguments in pair:
        jax.block_until_ready(function(*arguments))
    seconds: list[list[float]] = [[] for _ in pair]
    for _ in range(rounds):
        for (function, arguments), each in zip(pair, seconds, strict=True):
            begin = time.perf_counter()
            jax.block_until_ready(function(*arguments))
            each.append(time.perf_counter() - begin)
    return seconds


def gas(n: int, reconstruction: Literal["plm_mc", "weno5z"]) -> AbstractSolver:
    equation = CompressibleNavierStokes(gamma=5 / 3, viscosity=1.5e-3, prandtl=0.7)
    return CompressibleFiniteVolume(Grid((n,) * 3, (1.0,) * 3), equation, reconstruction)


def gas_state(solver: AbstractSolver, key: jax.Array) -> jax.Array:
    """ρ = 1, p = 0.6, a few waves of velocity."""
    mesh = solver.grid.mesh()
    phases = np.asarray(jax.random.uniform(key, (3, 3))) * 2 * np.pi
    v = [0.3 * sum(np.sin(2 * np.pi * x + p) for x, p in zip(mesh, row, strict=True)) for row in phases]
    energy = 0.6 / (2 / 3) + 0.5 * sum(q * q for q in v)
    return jnp.asarray(np.stack([np.ones(solver.grid.shape), *v, energy]), jnp.float32)


def problems(quick: bool) -> list[tuple[str, AbstractSolver, AbstractStepper, float, int, dict[str, Any]]]:
    """(name, solver, stepper, Δt, model steps per frame, options of `LearnedFlux`)."""
    square = lambda n: Grid((n, n), (2 * np.pi,) * 2)  # noqa: E731
    flow = NavierStokes(1e-3, Kolmogorov())
    found: list[tuple[str, AbstractSolver, AbstractStepper, float, int, dict[str, Any]]] = [
        ("KS, 64 points, CNN 3×16", SpectralKS(Grid((64,), (22.0,)), KuramotoSivashinsky()), ETDRK4(), 0.1, 1, {"dims": 1}),
        ("spectral 32², CNN 3×16", Spectral2D(square(32), flow), ETDRK4(), 0.025, 2, {}),
        ("finite volume 64², CNN 3×16", StaggeredFiniteVolume(square(64), flow, "central"), SSPRK3(), 0.0125, 4, {}),
    ]
    if not quick:
        options = {"dims": 3, "width": 8, "depth": 2}
        found.append(("gas 16³, MC + HLLC, CNN 2×8", gas(16, "plm_mc"), VL2(), 0.01, 1, options))
        found.append(("gas 16³, WENO5-Z + HLLC, CNN 2×8", gas(16, "weno5z"), SSPRK3(), 0.01, 1, options))
    return found


def trajectories(model: Model, count: int, frames: int, every: int) -> np.ndarray:
    """What the model does from random starts: data to time on, not to learn from."""
    solver = model.solver
    places = tuple(v.at for v in solver.variables)
    out = []
    for i in range(count):
        key = jax.random.key(i)
        if solver.grid.ndim == 3:
            u = gas_state(solver, key)
        else:
            initial = RandomWaves() if solver.grid.ndim == 1 else RandomVelocity()
            u = solver.project(initial(key, solver.grid, places, jnp.float32))
        run = rollout(model, State(u), frames, every=every)
        out.append(np.concatenate([np.asarray(u)[None], np.asarray(run.u)]))
    return np.stack(out)


def update_times(
    solver: AbstractSolver, stepper: AbstractStepper, dt: float, every: int, options: dict[str, Any], rounds: int, devices: int
) -> dict[str, Any]:
    """Seconds of an update per unroll length, of compiling it, and the share of fetching and logging."""
    bare = Model(solver, stepper, dt)
    data = trajectories(bare, 4, 24, every)
    closure = LearnedFlux(variables=solver.variables, key=jax.random.key(0), **options)
    model = Model(solver, stepper, dt, (closure,))
    lengths = (1, 4, 16)
    recipe = Recipe(lengths, (rounds + 2,) * 3, validate_every=10**6, devices=devices)
    task = Task(model, data[:3], data[3:, :2], interval=every * dt, every=every, modes=4)
    stamps: list[float] = []
    written = 0.0
    with tempfile.TemporaryDirectory() as folder:
        log = JsonLines(Path(folder) / "log.jsonl")

        def report(record: dict[str, Any]) -> None:
            nonlocal written
            begin = time.perf_counter()
            log.write(record)
            written += time.perf_counter() - begin
            stamps.append(time.perf_counter())

        outcome = train(task, recipe, report=report)
        log.close()
    row: dict[str, Any] = {"parameters": sum(a.size for a in jax.tree.leaves(closure) if hasattr(a, "size")), "devices": devices}
    for i, length in enumerate(lengths):
        begin = time.perf_counter()
        for n in range(20):
            batch(task.windows, length, recipe.batch, 0, n)
        fetching = (time.perf_counter() - begin) / 20
        part = stamps[i * (rounds + 2) + 1 : (i + 1) * (rounds + 2)]
        update = statistics.median(np.diff(part))
        row[f"unroll {length}"] = {
            "update_s": update,
            "compile_s": outcome.compile_seconds[length],
            # windows are fetched by a thread while the last update computes; here as if nothing overlapped
            "overhead": (fetching + written / len(stamps)) / update,
        }
    return row


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--quick", action="store_true", help="without the largest networks and the gas")
    parser.add_argument("--out", default=None, help="also write the rows as JSON")
    options = parser.parse_args(arguments)
    use_all_cores()
    rows: dict[str, Any] = {"convolutions": {}, "updates": {}}
    print("gradient of a chain of 3×3(×3) convolutions inside a scan of 4, float32: stock over ours")
    for name, shape, layers, channels in CHAINS[:1] if options.quick else CHAINS:
        ours, stock = in_turn([chain(shape, layers, channels, method) for method in ("products", "stock")], options.rounds)
        ratios = sorted(b / a for a, b in zip(ours, stock, strict=True))
        rows["convolutions"][name] = {"ours_s": statistics.median(ours), "stock_s": statistics.median(stock), "ratio": ratios}
        print(f"{name:26s} {1e3 * statistics.median(ours):8.1f} ms, {statistics.median(ratios):5.1f} times faster", flush=True)
    print("one update of 8 windows (unroll: seconds; compiling; fetching and logging)")
    for name, solver, stepper, dt, every, closure in problems(options.quick):
        for devices in sorted({1, jax.local_device_count()}):
            row = update_times(solver, stepper, dt, every, closure, options.rounds, devices)
            rows["updates"][f"{name}, {devices} devices"] = row
            parts = [
                f"{length}: {1e3 * r['update_s']:.1f} ms; {r['compile_s']:.1f} s; {100 * r['overhead']:.1f} %"
                for length, r in row.items()
                if isinstance(r, dict)
            ]
            print(f"{name:34s} {devices} device{'s' if devices > 1 else ' '}  " + "   ".join(parts), flush=True)
    if options.out:
        write_json(options.out, {"versions": environment(), **rows})


if __name__ == "__main__":
    main()
