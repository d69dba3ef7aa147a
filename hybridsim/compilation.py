"""How a solver's programs are compiled for the processor at hand.

XLA on CPU shares each large kernel out among its threads, and goes on from there on one of them. Up to JAX 0.10 a transform that
is called from such a thread runs on it alone (openxla/xla issue 46345). Where transforms are most of the work it is therefore
faster to share out nothing but them, and where kernels are small, sharing them out costs more than it gains. A solver says so by
`AbstractSolver.serial_kernels`, and a `SolverJit` compiles accordingly.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache, update_wrapper
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jax.core import Tracer
from jaxtyping import Array, PyTree

SERIAL_KERNELS = {
    "xla_disable_hlo_passes": "cpu-parallel-task-assigner,while-loop-invariant-code-motion",
    "xla_cpu_scheduler_type": "CPU_SCHEDULER_TYPE_MEMORY_OPTIMIZED",
}
"""Compiler options with which a program on CPU stays on its own thread, and shares out only transforms and matrix products.

Kernels are not cut in pieces, and there are not so many that could run at once that other threads take some: neither by the order
of the schedule, nor because what does not change in a loop is computed before it.
"""

SMALL_CELLS = 2**13
"""Networks on at most so many cells are quicker with kernels that stay on their thread, and with activations that are `stored`."""

REPAIRED = (0, 11)
"""The first JAX whose transforms use all threads wherever they are called."""


@cache
def _understood() -> dict[str, str]:
    """Those of `SERIAL_KERNELS` that this JAX knows."""

    def known(name: str) -> bool:
        try:
            jax.jit(lambda: jnp.zeros(()), compiler_options={name: SERIAL_KERNELS[name]}).lower().compile()
        except jax.errors.JaxRuntimeError:
            return False
        return True

    return {name: SERIAL_KERNELS[name] for name in SERIAL_KERNELS if known(name)}


def compiler_options(solver: Any) -> dict[str, str]:
    """The options for `jax.jit(..., compiler_options=...)` with which programs of this solver, or `Model`, run best.

    Only the outermost `jit` may have any. There are none on other processors than CPUs, where nothing is gained, and where a
    closure has weights on a grid that is large, or in three dimensions: its kernels are then the larger part, and worth sharing.
    """
    closures = getattr(solver, "closures", ())
    learned = any(a.ndim > 0 for a in jax.tree.leaves(eqx.filter(closures, eqx.is_inexact_array)))
    solver = getattr(solver, "solver", solver)
    if jax.default_backend() != "cpu" or jax.__version_info__[:2] >= REPAIRED or not solver.serial_kernels:
        return {}
    if learned and (solver.grid.ndim > 2 or solver.grid.cells > SMALL_CELLS):
        return {}
    return dict(_understood())


@contextmanager
def setting(name: str, value: Any) -> Iterator[None]:
    """One of JAX's settings for a while."""
    before = jax.config.values[name]
    jax.config.update(name, value)
    try:
        yield
    finally:
        jax.config.update(name, before)


def _outermost(arguments: Any) -> bool:
    """Whether a program for these arguments is compiled alone: neither inside another `jit`, nor to be transformed."""
    return not any(isinstance(a, Tracer) for a in [jnp.zeros(()), *jax.tree.leaves(arguments)])


def _jitted(function: Callable, options: tuple[tuple[str, str], ...]) -> Any:
    return eqx.filter_jit(function, compiler_options=dict(options)) if options else eqx.filter_jit(function)  # pyright: ignore[reportCallIssue]


class SolverJit:
    """`eqx.filter_jit(function)` for a function whose first argument is a solver or a `Model`: with its `compiler_options` where it
    is the outermost, and no gradient, `jvp` or `vmap` is taken of it (JAX knows no options there)."""

    def __init__(self, function: Callable):
        self._compiled = cache(lambda options: _jitted(function, options))
        update_wrapper(self, function)

    def _for(self, *args: Any, **kwargs: Any) -> Any:
        options = compiler_options(args[0]) if _outermost((args, kwargs)) else {}
        return self._compiled(tuple(options.items()))

    def __call__(self, first: Any, *args: Any, **kwargs: Any) -> Any:
        return self._for(first, *args, **kwargs)(first, *args, **kwargs)

    def lower(self, first: Any, *args: Any, **kwargs: Any) -> Any:
        """The program lowered for these arguments, to be compiled by `.compile()`."""
        return self._for(first, *args, **kwargs).lower(first, *args, **kwargs)


def written_anew(tree: PyTree, count: Array) -> PyTree:
    """The same values, written by a kernel; `count` is any number ≥ 0 that is known only when the program runs.

    A loop begins with a copy of what it changes, and a large copy would move the program to another thread. Nothing is lost
    elsewhere: this takes the place of that copy.
    """
    keep = jnp.asarray(count) >= 0
    return jax.tree.map(lambda a: jnp.where(keep, a, jnp.zeros((), a.dtype)) if eqx.is_inexact_array(a) else a, tree)
