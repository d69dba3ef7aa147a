"""q → R q(R⁻¹ x): turns and mirror images of a flow in its box, under which an unforced flow is as good as before.

The group is that of the box: an axis may be mirrored if it is periodic, and two axes change places if cells, length and boundaries
are the same along both. Grids go over into themselves, so that nothing is interpolated.
"""

import itertools
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float

from hybridsim.contract import AbstractSolver
from hybridsim.diagnostics import is_gas

Symmetry = tuple[tuple[int, ...], tuple[bool, ...]]
"""(which axis becomes the first, the second …; which of the new axes are mirrored then)."""


def symmetries(solver: AbstractSolver) -> list[Symmetry]:
    """The turns and mirror images that leave the box and the equation as they are, the identity first.

    A cube has 48, a square 8, a line 2. Raises `ValueError` (one sentence) where a force, or something else in the equation, knows
    of directions.
    """
    grid = solver.grid
    if getattr(getattr(solver, "equation", None), "forcing", None) is not None:
        raise ValueError("a forced flow is not the same when it is turned or mirrored")
    axes = range(grid.ndim)
    alike = lambda a, b: all(q[a] == q[b] for q in (grid.shape, grid.lengths, grid.boundaries))  # noqa: E731
    orders = [order for order in itertools.permutations(axes) if all(alike(a, b) for a, b in zip(order, axes, strict=True))]
    mirrors = list(itertools.product(*[(False, True) if grid.periodic[a] else (False,) for a in axes]))
    return list(itertools.product(orders, mirrors))


def _vector(solver: AbstractSolver) -> tuple[int, ...]:
    """Channels that turn with the box: the velocity or the momentum, one per axis."""
    d = solver.grid.ndim
    names = [v.name for v in solver.variables]
    if is_gas(solver.variables):
        return tuple(range(1, d + 1))
    return tuple(names.index(q) for q in "uvw"[:d])


def applied(solver: AbstractSolver, symmetry: Symmetry, u: Float[np.ndarray, "..."]) -> Float[np.ndarray, "..."]:
    """R u of `(*some, c, *grid)`: values go to their new cells, and a vector's components change places and signs as the axes do.

    A value at (i + s) Δx goes to (n − i − s) Δx, the place of cell n − i − 2s, so s is kept.
    """
    order, mirrored = symmetry
    d, vector = solver.grid.ndim, _vector(solver)
    lead = u.ndim - d - 1
    channels = list(range(u.shape[lead]))
    for a, old in enumerate(order):
        channels[vector[a]] = vector[old]
    u = np.moveaxis(u, lead, 0)[channels]
    u = u.transpose(*range(lead + 1), *(lead + 1 + old for old in order))
    rows = []
    for c, q in enumerate(u):
        at = solver.variables[c].at
        for a in range(d):
            if mirrored[a]:
                axis = q.ndim - d + a
                q = np.roll(np.flip(q, axis), 1 - round(2 * at[a]), axis)
                q = -q if c == vector[a] else q
        rows.append(q)
    return np.moveaxis(np.stack(rows), 0, lead)


def turned(
    solver: AbstractSolver, among: Sequence[Symmetry], windows: Float[np.ndarray, "window frame c *grid"], rng: np.random.Generator
) -> Float[np.ndarray, "window frame c *grid"]:
    """Each window under a symmetry drawn from `among`."""
    drawn = rng.integers(len(among), size=len(windows))
    return np.stack([applied(solver, among[int(n)], window) for n, window in zip(drawn, windows, strict=True)])
