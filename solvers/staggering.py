"""Averages and differences between the centres and the faces of cells, for finite-volume solvers."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from hybridsim.grid import Grid, Place


def part(q: Array, start: int, stop: int, axis: int) -> Array:
    """q[start:stop] along `axis`."""
    return jax.lax.slice_in_dim(q, start, stop, axis=axis)


def cut(q: Array, start: int, stop: int, axis: int) -> Array:
    """q[start:stop] along `axis`, for arrays that many shifted copies are taken of.

    It is a piece of a split, whose transpose is a concatenation. XLA on CPU stores one, and so adds up many at once, where it would
    compute what a slice hands back again for each cell that it reaches, with a branch for each slice.
    """
    lengths = [start, stop - start, q.shape[axis] - stop]
    return jax.lax.split(q, [n for n in lengths if n], axis)[1 if start else 0]


def faces_around(grid: Grid, array: Float[Array, "*grid"], axis: int) -> tuple[Array, Array]:
    """(f_{i−1}, f_i): the faces below and above each cell. Those on a side of the box count as their inner neighbours: the lower
    one is not stored, and both sides are to be treated alike."""
    if grid.periodic[axis]:
        return jnp.roll(array, 1, axis), array
    n = array.shape[axis]
    inner = part(array, 0, n - 1, axis)
    lower = jnp.concatenate([part(array, 0, 1, axis), inner], axis)
    upper = jnp.concatenate([inner, part(array, n - 2, n - 1, axis)], axis)
    return lower, upper


def cells_around(grid: Grid, array: Float[Array, "*grid"], axis: int) -> tuple[Array, Array]:
    """(q_i, q_{i+1}): the cells below and above each face; a face on the upper side sees its only cell twice."""
    if grid.periodic[axis]:
        return array, jnp.roll(array, -1, axis)
    n = array.shape[axis]
    return array, jnp.concatenate([part(array, 1, n, axis), part(array, n - 1, n, axis)], axis)


def move(grid: Grid, array: Float[Array, "*grid"], from_: Place, to: Place) -> Float[Array, "*grid"]:
    """Means of the two neighbours along each axis that differs; next to walls and open sides, of those that are inside."""
    for axis, (a, b) in enumerate(zip(from_, to, strict=True)):
        if a != b:
            below, above = (cells_around if b > a else faces_around)(grid, array, axis)
            array = 0.5 * (below + above)
    return array


def derivative(grid: Grid, array: Float[Array, "*grid"], at: Place, axis: int) -> tuple[Float[Array, "*grid"], Place]:
    """Differences of neighbours; a cell or face at a wall or open side takes the difference of its inner neighbour."""
    n, h = grid.shape[axis], grid.spacing[axis]
    below, above = (faces_around if at[axis] == 1 else cells_around)(grid, array, axis)
    slope = (above - below) / h
    if not grid.periodic[axis]:
        parts = [part(slope, 1, n - 1, axis), part(slope, n - 2, n - 1, axis)]
        parts = [part(slope, 1, 2, axis) if at[axis] == 1 else part(slope, 0, 1, axis), *parts]
        slope = jnp.concatenate(parts, axis)
    return slope, grid.flux_place(at, axis)
