"""Seconds per step of many samples as one ensemble against the same samples one after another, in turn in one process.

    python -m hybridsim.experiments.ensemble_speed [--size 64] [--samples 16] [--steps 100] [--rounds 7] [--out ensemble_speed.json]

One after another means a compiled `rollout` of one sample, called once per sample; the ensemble is one compiled `ensemble` on all
cores. Both start from the same decaying flows in float32. Rounds alternate between the two, after one warm-up each; compile time is
apart. A ratio above 1 means that the ensemble is faster. The difference of the velocities after all steps shows that both did the
same work.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from hybridsim.grid import Grid
from hybridsim.model import Model, State, ensemble, rollout
from hybridsim.samples import use_all_cores
from hybridsim.solvers.finite_volume import StaggeredFiniteVolume
from hybridsim.solvers.incompressible import NavierStokes
from hybridsim.solvers.initial import RandomVelocity
from hybridsim.solvers.spectral import Spectral2D
from hybridsim.solvers.steppers import ETDRK4, SSPRK3
from hybridsim.storage import write_json

VISCOSITY = 1e-3
SPEED = 7.0


def models(size: int) -> dict[str, Model]:
    grid = Grid((size, size), (2 * np.pi, 2 * np.pi))
    equation = NavierStokes(VISCOSITY)
    dt = 0.25 * grid.spacing[0] / SPEED
    return {
        f"spectral ETDRK4 {size}²": Model(Spectral2D(grid, equation), ETDRK4(), dt),
        f"finite volume SSPRK3 {size}²": Model(StaggeredFiniteVolume(grid, equation), SSPRK3(), dt),
    }


def pair(name: str, model: Model, samples: int, steps: int, rounds: int) -> dict[str, Any]:
    """One row: both ways in turn, `rounds` times each."""
    solver = model.solver
    initial = RandomVelocity(peak_wavenumber=4, max_speed=SPEED)
    places = tuple(v.at for v in solver.variables)
    starts = [initial(jax.random.key(s), solver.grid, places, jnp.float32) for s in range(samples)]
    together = jnp.stack(starts)
    ways: dict[str, Callable[[], Any]] = {
        "sequence": lambda: [rollout(model, State(u), 1, every=steps).u for u in starts],
        "ensemble": lambda: ensemble(model, together, 1, every=steps).u,
    }
    seconds: dict[str, list[float]] = {way: [] for way in ways}
    compile_seconds, results = {}, {}
    for way, run in ways.items():
        begin = time.perf_counter()
        results[way] = np.stack([np.asarray(u) for u in run()])
        compile_seconds[way] = time.perf_counter() - begin
    for _ in range(rounds):
        for way, run in ways.items():
            begin = time.perf_counter()
            jax.block_until_ready(run())
            seconds[way].append(time.perf_counter() - begin)
    ratios = sorted(a / b for a, b in zip(seconds["sequence"], seconds["ensemble"], strict=True))
    to_ns = 1e9 / (solver.grid.cells * steps * samples)
    one, many = results["sequence"], results["ensemble"]
    return {
        "case": name,
        "samples": samples,
        "sequence_ns": statistics.median(seconds["sequence"]) * to_ns,
        "ensemble_ns": statistics.median(seconds["ensemble"]) * to_ns,
        "ratio": [ratios[0], statistics.median(ratios), ratios[-1]],
        "compile_s": [compile_seconds["sequence"], compile_seconds["ensemble"]],
        "difference": float(np.abs(one - many).max() / np.abs(one).max()),
    }


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--size", type=int, default=64)
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--out", default=None, help="also write the rows as JSON")
    options = parser.parse_args(arguments)
    use_all_cores()
    devices = jax.devices()
    print(
        f"{len(devices)} × {devices[0].device_kind}, jax {jax.__version__}, float32, {options.samples} samples, ns per cell, step "
        "and sample, ratio = sequence / ensemble [low, median, high]"
    )
    rows = []
    for name, model in models(options.size).items():
        row = pair(name, model, options.samples, options.steps, options.rounds)
        rows.append(row)
        low, median, high = row["ratio"]
        print(
            f"{name:28s} sequence {row['sequence_ns']:6.1f}  ensemble {row['ensemble_ns']:6.1f}  ratio {median:.2f} [{low:.2f}, "
            f"{high:.2f}]  compile {row['compile_s'][0]:.1f} / {row['compile_s'][1]:.1f} s  difference {row['difference']:.1e}"
        )
    if options.out:
        write_json(options.out, {"device": devices[0].device_kind, "devices": len(devices), "jax": jax.__version__, "rows": rows})


if __name__ == "__main__":
    main()
