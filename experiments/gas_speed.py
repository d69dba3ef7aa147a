"""Nanoseconds per cell and step of the compressible solver in three dimensions, and what its gradient costs.

    python -m hybridsim.experiments.gas_speed [--sizes 32 64 128] [--schemes vl2 ssprk2 weno5z ...] [--steps 10] [--rounds 5]
                                              [--gradient 32] [--out gas_speed.json]

Smooth decaying flow, float32, γ = 5/3. Each round times every case once, so that a busy moment hits all alike; least and median
over rounds, compile time apart. Memory is what XLA allots to a step, arguments and results included, in arrays of the state's size.
The machine's copy bandwidth from memory and its matrix product are measured in the same run: compare machines by them. The gradient
is that of ½|u|² after 16 steps of the first scheme, with a checkpoint per step, over 16 steps forward.
"""

import argparse
import statistics
import threading
import time
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from hybridsim.contract import AbstractStepper
from hybridsim.grid import Grid
from hybridsim.model import Model, State, advance, rollout
from hybridsim.solvers.compressible import CompressibleNavierStokes
from hybridsim.solvers.godunov import CompressibleFiniteVolume
from hybridsim.solvers.steppers import SSPRK2, SSPRK3, VL2
from hybridsim.storage import write_json

SCHEMES: dict[str, tuple[str, type[AbstractStepper], float]] = {
    "vl2": ("plm_van_leer", VL2, 0.0),
    "ssprk2": ("plm_van_leer", SSPRK2, 0.0),
    "viscous": ("plm_van_leer", SSPRK2, 1e-3),
    "ppm": ("ppm", SSPRK3, 0.0),
    "weno5z": ("weno5z", SSPRK3, 0.0),
}
"""Name -> reconstruction, stepper, viscosity; HLLC throughout."""


def model(scheme: str, size: int) -> Model:
    reconstruction, stepper, viscosity = SCHEMES[scheme]
    equation = CompressibleNavierStokes(gamma=5 / 3, viscosity=viscosity)
    grid = Grid((size,) * 3, (1.0,) * 3)
    return Model(CompressibleFiniteVolume(grid, equation, reconstruction), stepper(), 0.2 / size)  # pyright: ignore[reportArgumentType]


def flow(solver: CompressibleFiniteVolume) -> jax.Array:
    x, y, z = (2 * np.pi * q for q in solver.grid.mesh(solver.grid.centre))
    w = [
        1 + 0.2 * np.sin(x) * np.cos(y),
        *[0.3 * q for q in (np.sin(y + z), np.cos(x + 0 * y), np.sin(x + y))],
        0.6 + 0.1 * np.cos(z),
    ]
    return solver.equation.conserved(jnp.stack([jnp.asarray(np.broadcast_to(q, solver.grid.shape), jnp.float32) for q in w]))


class Case:
    """One compiled function and its timings."""

    def __init__(self, function: Callable[..., Any], *arguments: Any):
        begin = time.perf_counter()
        self.compiled = eqx.filter_jit(function).lower(*arguments).compile()
        self.compile_seconds = time.perf_counter() - begin
        self.arguments = arguments
        self.seconds: list[float] = []
        jax.block_until_ready(self.compiled(*arguments))

    def run(self) -> None:
        begin = time.perf_counter()
        jax.block_until_ready(self.compiled(*self.arguments))
        self.seconds.append(time.perf_counter() - begin)

    def bytes(self) -> int:
        memory = self.compiled.compiled.memory_analysis()
        return memory.temp_size_in_bytes + memory.argument_size_in_bytes + memory.output_size_in_bytes


def steps_case(scheme: str, size: int, steps: int) -> Case:
    made = model(scheme, size)
    u = flow(made.solver)  # pyright: ignore[reportArgumentType]
    prepared = made.prepare(u.dtype)
    state = (prepared.solver.encode(u), made.init_carry(u), jnp.zeros((), jnp.int32))
    return Case(lambda m, p, s: advance(m, p, s[0], s[1], s[2], steps), made, prepared, state)


def gradient_cases(scheme: str, size: int) -> tuple[Case, Case]:
    made = model(scheme, size)
    u = flow(made.solver)  # pyright: ignore[reportArgumentType]

    def last(u: jax.Array, levels: int) -> jax.Array:
        return rollout(made, State(u), 1, every=16, checkpoint_levels=levels).u[-1]

    return Case(lambda u: last(u, 0), u), Case(jax.grad(lambda u: 0.5 * jnp.sum(last(u, 1) ** 2)), u)


def machine() -> dict[str, float]:
    """GB/s of a copy from memory by two threads (read and written), and GFLOP/s of a float32 matrix product."""
    pieces = [(np.ones(1 << 25, np.float32), np.empty(1 << 25, np.float32)) for _ in range(2)]
    copies = []
    for _ in range(5):
        threads = [threading.Thread(target=np.copyto, args=(b, a)) for a, b in pieces]
        begin = time.perf_counter()
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        copies.append(time.perf_counter() - begin)
    a = jnp.ones((2048, 2048), jnp.float32)
    product = Case(lambda a: a @ a, a)
    for _ in range(5):
        product.run()
    return {"copy_gb_s": 2 * 2 * 2**27 / min(copies) / 1e9, "sgemm_gflop_s": 2 * 2048**3 / min(product.seconds) / 1e9}


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--sizes", type=int, nargs="+", default=[32, 64, 128])
    parser.add_argument("--schemes", nargs="+", choices=list(SCHEMES), default=list(SCHEMES))
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--gradient", type=int, default=32, help="cells per axis of the gradient's flow; 0 leaves it out")
    parser.add_argument("--out", default=None, help="also write the rows as JSON")
    options = parser.parse_args(arguments)
    device = jax.devices()[0].device_kind
    ceilings = machine()
    print(
        f"{device}, jax {jax.__version__}, float32; copy {ceilings['copy_gb_s']:.0f} GB/s, "
        f"sgemm {ceilings['sgemm_gflop_s']:.0f} GFLOP/s"
    )
    rows = []
    for size in options.sizes:
        cases = {scheme: steps_case(scheme, size, options.steps) for scheme in options.schemes}
        for _ in range(options.rounds):
            for case in cases.values():
                case.run()
        for scheme, case in cases.items():
            to_ns = 1e9 / (size**3 * options.steps)
            row = {
                "scheme": scheme,
                "size": size,
                "ns": [min(case.seconds) * to_ns, statistics.median(case.seconds) * to_ns],
                "compile_s": case.compile_seconds,
                "memory_states": case.bytes() / (5 * 4 * size**3),
            }
            rows.append(row)
            print(
                f"{scheme:8s} {size:4d}³  {row['ns'][0]:6.1f} ns per cell and step (median {row['ns'][1]:6.1f})  compile "
                f"{row['compile_s']:.1f} s  memory {row['memory_states']:.1f} states",
                flush=True,
            )
    gradient = None
    if options.gradient:
        forward, backward = gradient_cases(options.schemes[0], options.gradient)
        for _ in range(options.rounds):
            forward.run()
            backward.run()
        ratios = sorted(b / a for a, b in zip(forward.seconds, backward.seconds, strict=True))
        gradient = {
            "scheme": options.schemes[0],
            "size": options.gradient,
            "ratio": [ratios[0], statistics.median(ratios), ratios[-1]],
            "compile_s": backward.compile_seconds,
            "memory_states": backward.bytes() / (5 * 4 * options.gradient**3),
        }
        low, median, high = gradient["ratio"]
        print(
            f"gradient through 16 steps of {gradient['scheme']} at {options.gradient}³: {median:.1f} [{low:.1f}, {high:.1f}] "
            f"forward runs, compile {gradient['compile_s']:.1f} s, memory {gradient['memory_states']:.0f} states"
        )
    if options.out:
        write_json(options.out, {"device": device, "jax": jax.__version__, **ceilings, "rows": rows, "gradient": gradient})


if __name__ == "__main__":
    main()
