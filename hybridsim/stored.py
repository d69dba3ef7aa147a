"""y = f(x), written to memory before anything reads it."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.core import Tracer

from hybridsim.contract import Real


def stored(t: Real, function: Callable[..., Any], *arrays: Any) -> Any:
    """`function(*arrays)`, whose results XLA computes once, however many operations read them.

    XLA on CPU has no loops with several results: each consumer of a flux would compute the whole flux again, for both of its
    neighbours, and each shift of a convolution the activation before it. Nothing is fused across a conditional, so the function is
    put into one that is always taken while the number `t` (the time, or a weight) is finite, which the compiler cannot know.
    Otherwise everything is NaN. (An optimisation barrier does not do: it is gone before fusion.) Elsewhere this is a plain call.

    In the backward pass the function is evaluated again from its arguments, of which alone a copy is kept. Where nothing is traced
    this is a plain call, too; and where `t` is a constant of the program, such as the weight of a network that a compiled function
    closes over, the compiler does know, and stores nothing.
    """
    traced = any(isinstance(leaf, Tracer) for leaf in jax.tree.leaves((t, arrays)))
    if jax.default_backend() != "cpu" or not traced:
        return function(*arrays)
    shapes = jax.eval_shape(function, *arrays)

    def lost(*_: Any) -> Any:
        filling = lambda s: jnp.nan if jnp.issubdtype(s.dtype, jnp.inexact) else 0  # noqa: E731
        return jax.tree.map(lambda s: jnp.full(s.shape, filling(s), s.dtype), shapes)

    return jax.lax.cond(t < jnp.inf, jax.checkpoint(function), lost, *arrays)
