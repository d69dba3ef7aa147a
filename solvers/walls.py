"""u = U on ∂Ω: what is known on the sides of the box, and the values that a stencil finds beyond them.

Velocity component a has faces at x = Δx, …, L along axis a: the last one lies on the upper side, and the one on the lower side is
not stored. Between walls both are known.
"""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, Float

from hybridsim.contract import Real
from hybridsim.grid import Grid, Place
from hybridsim.solvers.incompressible import AXES, SIDES, AbstractBandForce, NavierStokes

HALO = 2
"""Layers beyond each side: what a limited slope needs."""


def side_name(axis: int, side: int) -> str:
    """`x_lower`, …"""
    return f"{AXES[axis]}_{SIDES[side]}"


def boundary_velocity(
    equation: NavierStokes, grid: Grid, axis: int, side: int, component: int, place: Place, t: Real
) -> Float[Array, "*side"]:
    """U_component on one side of `axis`, with one entry along `axis`; zero where nothing is given.

    A tangential component is given at the points of `place`; the normal one as the mean over each face (two Gauss points per
    direction, exact for cubic profiles), so that what flows in does not depend on the resolution.
    """
    shape = tuple(1 if a == axis else n for a, n in enumerate(grid.shape))
    given = equation.boundary_velocity.get(side_name(axis, side))
    if given is None:
        return jnp.zeros(shape, t.dtype)
    reach = [0.5 / np.sqrt(3) if component == axis else 0.0] * grid.ndim
    total = jnp.zeros(shape, t.dtype)
    points = list(itertools.product(*[(-r, r) if r and a != axis else (0.0,) for a, r in enumerate(reach)]))
    for point in points:
        position = tuple(
            (np.full(1, side * length) if a == axis else (np.arange(n) + place[a] + point[a]) * length / n).reshape(
                [-1 if b == a else 1 for b in range(grid.ndim)]
            )
            for a, (n, length) in enumerate(zip(grid.shape, grid.lengths, strict=True))
        )
        total = total + jnp.broadcast_to(jnp.asarray(given(component, position, t), t.dtype), shape)
    return total / len(points)


def fixed_velocities(equation: NavierStokes, grid: Grid, places: tuple[Place, ...], dtype) -> dict[str, Float[Array, "..."]]:
    """Side -> normal velocity there, for the sides that are `fixed`.

    Where no side is `outflow`, what is left of the net inflow (rounding, quadrature) is spread over all of them, because no
    divergence-free flow has any.
    """
    t = jnp.zeros((), dtype)
    fixed = [(a, s) for a, sides in enumerate(grid.boundaries) for s, kind in enumerate(sides) if kind == "fixed"]
    normal = {(a, s): boundary_velocity(equation, grid, a, s, a, places[a], t) for a, s in fixed}
    if fixed and not any("outflow" in sides for sides in grid.boundaries):
        area = {a: grid.cell_volume / grid.spacing[a] for a, _ in fixed}
        inflow = sum((1 - 2 * s) * area[a] * u.sum() for (a, s), u in normal.items())
        excess = inflow / sum(area[a] * u.size for (a, _), u in normal.items())
        normal = {(a, s): u - (1 - 2 * s) * excess for (a, s), u in normal.items()}
    return {side_name(*key): u for key, u in normal.items()}


def check_walls(equation: NavierStokes, grid: Grid, places: tuple[Place, ...]) -> None:
    """Raises `ValueError` where the sides of the box contradict the equation or each other."""
    if all(grid.periodic):
        return
    for axis, sides in enumerate(grid.boundaries):
        if "reflecting" in sides:
            raise ValueError(f"domain.boundaries: incompressible flow has free_slip walls, not reflecting ones, along {AXES[axis]}")
        if sides[0] == "outflow":
            raise ValueError(
                f"grid: outflow through {side_name(axis, 0)} is not offered (velocities live on the upper faces of the "
                f"cells); mirror the case along {AXES[axis]} so that the flow leaves through {side_name(axis, 1)}"
            )
    if isinstance(equation.forcing, AbstractBandForce):
        raise ValueError(f"equation.forcing: {type(equation.forcing).__name__} acts on Fourier modes and needs periodic boundaries")
    if any(isinstance(leaf, Tracer) for leaf in jax.tree.leaves(equation.boundary_velocity)):
        return
    with jax.ensure_compile_time_eval():
        inflow = gross = 0.0
        for axis, sides in enumerate(grid.boundaries):
            for side, kind in enumerate(sides):
                name = side_name(axis, side)
                if name not in equation.boundary_velocity:
                    continue
                velocities = {}
                for component in range(grid.ndim):
                    times = [jnp.asarray(t, jnp.result_type(float)) for t in (0.0, 0.37, 1.0)]
                    try:
                        values = [boundary_velocity(equation, grid, axis, side, component, places[component], t) for t in times]
                    except IndexError as error:
                        raise ValueError(
                            f"equation.boundary_velocity.{name}: has no component {component}; a velocity needs {grid.ndim} entries"
                        ) from error
                    velocities[component] = np.stack([np.asarray(u, np.float64) for u in values])
                normal = velocities[axis]
                if not all(np.isfinite(u).all() for u in velocities.values()):
                    raise ValueError(f"equation.boundary_velocity.{name}: must be finite")
                if kind == "no_slip" and normal.any():
                    raise ValueError(
                        f"equation.boundary_velocity.{name}: a no_slip side moves along itself only; where fluid passes it is fixed"
                    )
                if (normal != normal[:1]).any():
                    raise ValueError(f"equation.boundary_velocity.{name}: the velocity normal to the side must not depend on time")
                area = grid.cell_volume / grid.spacing[axis]
                inflow += (1 - 2 * side) * area * normal[0].sum()
                gross += area * np.abs(normal[0]).sum()
    if abs(inflow) > 0.01 * gross and not any("outflow" in sides for sides in grid.boundaries):
        raise ValueError(
            f"equation.boundary_velocity: the fixed sides take in {inflow:.3g} more than they let out, and there is no other way; "
            "balance them, or make an upper side outflow"
        )


def _spread(value: Array, grid: Grid, axis: int) -> Array:
    """The value of a side, continued beyond those axes that are padded before `axis`."""
    for a in range(axis):
        width = [(HALO, HALO) if b == a else (0, 0) for b in range(grid.ndim)]
        value = jnp.pad(value, width, mode="wrap" if grid.periodic[a] else "edge")
    return value


def value_on_side(beyond: Array, first: Array, second: Array) -> Array:
    """U = (3 q₋₁ + 6 q₀ − q₁)/8: what `padded` continued the velocity along a side from."""
    return (3 * beyond + 6 * first - second) / 8


def padded(
    u: Float[Array, "c *grid"], equation: NavierStokes, grid: Grid, places: tuple[Place, ...], normal: dict[str, Array], t: Real
) -> Float[Array, "c *padded"]:
    """u with `HALO` more layers on every side.

    The velocity along a `no_slip` or `fixed` side goes on along the parabola through U on the side and the two values next to it,
    (8U − 6q₀ + q₁)/3, which makes parabolic profiles exact; `value_on_side` takes U back out of it. Along a `free_slip` side, for
    scalars, and for all channels at `outflow` there is no gradient: q₀. The normal velocity has a face on the side itself: there it
    is U, and 2U − q₀ beyond.
    """
    d = grid.ndim

    def beyond(q: Array, c: int, axis: int, side: int) -> Array:
        """Both layers of channel c beyond one side, from the channel as padded so far."""
        n, kind = grid.shape[axis], grid.boundaries[axis][side]

        def layer(i: int) -> Array:
            return jax.lax.slice_in_dim(q, i, i + 1, axis=axis)

        nearest = layer(side * (n - 1))
        if c == axis and kind != "outflow":
            given = normal.get(side_name(axis, side))
            wall = jnp.zeros_like(nearest) if given is None else _spread(given, grid, axis)
            # The face on the upper side is one of the stored ones.
            both = [2 * wall - layer(0), wall] if side == 0 else [2 * wall - layer(n - 2)] * 2
        elif c < d and kind in ("no_slip", "fixed"):
            wall = _spread(boundary_velocity(equation, grid, axis, side, c, places[c], t), grid, axis)
            second = layer(1 if side == 0 else n - 2)
            both = [(8 * wall - 6 * nearest + second) / 3] * 2
        else:
            both = [nearest] * 2
        return jnp.concatenate(both, axis)

    out = u
    for axis, n in enumerate(grid.shape):
        if grid.periodic[axis]:
            below, above = (jax.lax.slice_in_dim(out, i, i + HALO, axis=axis + 1) for i in (n - HALO, 0))
        else:
            below, above = (jnp.stack([beyond(q, c, axis, side) for c, q in enumerate(out)]) for side in range(2))
        out = jnp.concatenate([below, out, above], axis=axis + 1)
    return out
