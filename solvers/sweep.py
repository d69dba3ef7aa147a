"""Ū + Δt dŪ/dt of a gas: reconstruction, Riemann solver, viscosity, closures and the positivity limiter, on slabs of cells.

Most of the time of a step goes to moving intermediate results to memory and back. Where the cells outnumber what a cache holds,
the sweep takes the grid in slabs along its first axis, one after another, each with the layers of its neighbours that the scheme
looks at. The backward pass keeps the arguments of each sweep and evaluates it again, slab by slab.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PyTree

from hybridsim.contract import Real
from hybridsim.grid import Grid
from hybridsim.solvers.compressible import AXES, SIDES, Channels, CompressibleNavierStokes, channels_of
from hybridsim.solvers.reconstruction import RECONSTRUCTIONS, Reconstruction, characteristic, null_space, windows
from hybridsim.solvers.riemann import RIEMANN_SOLVERS, largest_speed, llf
from hybridsim.solvers.staggering import part
from hybridsim.stored import stored

KEPT_SHARE = 1e-2
"""The positivity limiter leaves at least this share of the density and pressure that the first-order scheme would give."""

SUSPICIOUS_SHARE = 5e-2
"""A cell whose density or pressure falls below this share of itself in one stage calls for the positivity limiter."""

SLAB_CELLS = 2**15
"""No more cells than this are treated at once on a CPU, if the first axis can be divided so."""

SLAB_LAYERS = 8
"""No slab is thinner than this: its neighbours' layers are reconstructed twice."""


class Stage(NamedTuple):
    """What one sweep gives: Ū + Δt dŪ/dt; what came through the sides, per channel of the box means; how many faces were limited;
    the least excess of any cell's density and pressure over what the limiter is called for; the largest Δt for which the limiter
    keeps them positive (∞ where it was not asked)."""

    new: Float[Array, "c *grid"]
    passed: Float[Array, " c"]
    limited: Float[Array, ""]
    margin: Float[Array, ""]
    limiter_dt: Float[Array, ""]


class Sweep(eqx.Module):
    """One Euler step of the finite volumes in `grid`.

    `ends`: conserved variables in the layers below and above the first axis, as many as the scheme looks at, where the cells are a
    slab of a larger grid; None where the grid has sides of its own. `compact`: whether one program may sweep all axes.
    """

    grid: Grid
    equation: CompressibleNavierStokes
    reconstruction: str = eqx.field(static=True)
    riemann: str = eqx.field(static=True)
    reconstruct: str = eqx.field(static=True)
    density_floor: float = eqx.field(static=True)
    pressure_floor: float = eqx.field(static=True)
    ends: tuple[Array, Array] | None = None
    compact: bool = eqx.field(static=True, default=False)

    # -- primitive variables ----------------------------------------------------------------------------------------------------

    def primitive(self, u: Float[Array, "c *grid"]) -> Float[Array, "c *grid"]:
        """W, with ρ and p no lower than their floors."""
        d, (rho, *others) = self.grid.ndim, channels_of(u)
        w = self.equation.primitive_channels([jnp.maximum(rho, jnp.asarray(self.density_floor, u.dtype)), *others], d)
        w[d + 1] = jnp.maximum(w[d + 1], jnp.asarray(self.pressure_floor, u.dtype))
        return jnp.stack(w)

    def pressure(self, u: Float[Array, "c *grid"]) -> Float[Array, "*grid"]:
        """p without a floor."""
        rho, *others = channels_of(u)
        w = self.equation.primitive_channels([jnp.maximum(rho, jnp.asarray(self.density_floor, u.dtype)), *others], self.grid.ndim)
        return w[self.grid.ndim + 1]

    def floors(self, u: Float[Array, "c *grid"]) -> Float[Array, "3"]:
        """(cells below a floor, and the box means of the mass and the energy that the floors stand for)."""
        u = jax.lax.stop_gradient(u)
        low, high = jnp.asarray(self.density_floor, u.dtype), jnp.asarray(self.pressure_floor, u.dtype)
        p = self.pressure(u)
        mass = jnp.maximum(low - u[0], 0)
        energy = jnp.maximum(high - p, 0) / (jax.lax.stop_gradient(jnp.asarray(self.equation.gamma, u.dtype)) - 1)
        return jnp.stack([jnp.sum((u[0] < low) | (p < high)).astype(u.dtype), jnp.mean(mass), jnp.mean(energy)])

    def _beyond(self, u: Float[Array, "c *grid"], axis: int, side: int, halo: int, t: Real) -> Float[Array, "c *ghosts"]:
        """`halo` layers of conserved variables beyond one side, in the order of the axis."""
        n, kind, d = self.grid.shape[axis], self.grid.boundaries[axis][side], self.grid.ndim
        if kind == "fixed":
            h = self.grid.spacing[axis]
            along = (np.arange(-halo, 0) + 0.5) * h if side == 0 else self.grid.lengths[axis] + (np.arange(halo) + 0.5) * h
            position = [
                jnp.asarray((along if a == axis else x).reshape([-1 if b == a else 1 for b in range(d)]), u.dtype)
                for a, x in enumerate(self.grid.coordinates(self.grid.centre))
            ]
            given = self.equation.boundary_state[f"{AXES[axis]}_{SIDES[side]}"](position, t)
            shape = tuple(halo if a == axis else m for a, m in enumerate(self.grid.shape))
            return self.equation.conserved(jnp.stack([jnp.broadcast_to(q.astype(u.dtype), shape) for q in given]))
        if kind == "reflecting":
            layers = part(u, 0, halo, axis + 1) if side == 0 else part(u, n - halo, n, axis + 1)
            return self._mirrored(jnp.flip(layers, axis + 1), axis)
        edge = part(u, 0, 1, axis + 1) if side == 0 else part(u, n - 1, n, axis + 1)
        return jnp.concatenate([edge] * halo, axis + 1)

    def _mirrored(self, u: Float[Array, "c *grid"], axis: int) -> Float[Array, "c *grid"]:
        """The momentum along `axis` with the other sign."""
        return jnp.concatenate([u[: axis + 1], -u[axis + 1 : axis + 2], u[axis + 2 :]])

    def _around(self, u: Float[Array, "c *grid"], axis: int, halo: int, t: Real) -> tuple[Array, Array, Array]:
        """(below, inside, above): `halo` layers beyond both sides of `axis`."""
        n = self.grid.shape[axis]
        if axis == 0 and self.ends is not None:
            below, above = self.ends
            return part(below, below.shape[1] - halo, below.shape[1], 1), u, part(above, 0, halo, 1)
        if self.grid.periodic[axis]:
            return part(u, n - halo, n, axis + 1), u, part(u, 0, halo, axis + 1)
        return self._beyond(u, axis, 0, halo, t), u, self._beyond(u, axis, 1, halo, t)

    def _extended(self, u: Float[Array, "c *grid"], axis: int, halo: int, t: Real) -> Float[Array, "c *more"]:
        """The primitive variables of u with `halo` more layers on both sides of `axis`.

        Made from u for each axis again: a bare concatenation runs on one thread and would cost a pass of its own.
        """
        return stored(t, lambda three: self.primitive(jnp.concatenate(three, axis + 1)), self._around(u, axis, halo, t))

    def _extended_everywhere(self, u: Float[Array, "c *grid"], t: Real) -> Float[Array, "c *more"]:
        """The primitive variables of u with one more layer on all sides, corners included."""
        d, out = self.grid.ndim, u
        for axis, n in enumerate(self.grid.shape):
            if axis == 0 and self.ends is not None:
                out = jnp.concatenate(self._around(u, 0, 1, t), 1)
                continue
            ghosts = []
            for side, kind in enumerate(self.grid.boundaries[axis]):
                if kind == "periodic":
                    at = 0 if side else n - 1
                else:
                    at = side * (n - 1)
                edge = part(out, at, at + 1, axis + 1)
                if kind == "reflecting":
                    edge = self._mirrored(edge, axis)
                elif kind == "fixed":
                    edge = self._beyond(u, axis, side, 1, t)
                    for a in range(axis):
                        width = [(1, 1) if b == a + 1 else (0, 0) for b in range(d + 1)]
                        edge = jnp.pad(edge, width, mode="wrap" if self.grid.periodic[a] else "edge")
                ghosts.append(edge)
            out = jnp.concatenate([ghosts[0], out, ghosts[1]], axis + 1)
        return self.primitive(out)

    # -- fluxes -----------------------------------------------------------------------------------------------------------------

    def _face_states(
        self, u: Float[Array, "c *grid"], axis: int, scheme: Reconstruction, t: Real, weights: Array | None
    ) -> tuple[Float[Array, "c *faces"], Float[Array, "c *faces"]]:
        """(W_L, W_R) at the n + 1 faces; first order where the scheme would all but lose density or pressure."""
        d = self.grid.ndim
        around = self._extended(u, axis, scheme.halo, t)
        if self.reconstruct == "characteristic" and scheme.order > 1:
            gamma = jnp.asarray(self.equation.gamma, u.dtype)
            sides = stored(t, lambda q: self._by_characteristics(q, scheme, gamma, axis), around)
        else:
            given = scheme.edges
            edges = None if given is None else stored(t, lambda q: given(q, axis + 1), around)
            sides = stored(t, lambda q, e: scheme.faces(q, e, axis + 1), around, edges)
        owns = [part(around, scheme.halo - 1 + k, around.shape[axis + 1] - scheme.halo + k, axis + 1) for k in range(2)]

        def guarded(states: tuple[Array, Array], others: Sequence[Array]) -> tuple[Array, Array]:
            """The states, or the others where they would all but lose density or pressure."""
            share, out = jnp.asarray(KEPT_SHARE, u.dtype), []
            for state, other, own in zip(states, others, owns, strict=True):
                good = (state[0] > share * own[0]) & (state[d + 1] > share * own[d + 1])
                out.append(jnp.where(good[None], state, other))
            return out[0], out[1]

        if scheme.order > 2 or self.reconstruct == "characteristic":
            sides = guarded(sides, owns)
        if weights is None:
            return sides
        changed, cells = list(sides), windows(around, scheme.halo, axis + 1)
        for f, row in enumerate(null_space(self.reconstruction)):
            for k, order in enumerate((row, row[::-1])):
                combined = order[0].item() * cells[0]
                for x, cell in zip(order[1:], cells[1:], strict=True):
                    combined = combined + x.item() * cell
                changed[k] = changed[k] + weights[k, :, f] * combined
        return guarded((changed[0], changed[1]), sides)

    def _by_characteristics(self, around: Array, scheme: Reconstruction, gamma: Array, axis: int) -> tuple[Array, Array]:
        w = channels_of(around)
        sides = characteristic(w, self.equation.conserved_channels(w, self.grid.ndim), scheme, gamma, axis, self.grid.ndim)
        left, right = (jnp.stack(self.equation.primitive_channels(side, self.grid.ndim)) for side in sides)
        return left, right

    def _viscous(self, u: Float[Array, "c *grid"], axis: int, t: Real) -> Channels:
        """−F_v: the flux of momentum by τ, of energy by τ·v and conduction, of scalars by diffusion; order 2."""
        d, spacing = self.grid.ndim, self.grid.spacing
        around = channels_of(self._extended_everywhere(u, t))

        def cells(q: Array, along: int, across: int | None = None, offset: int = 0) -> Array:
            """Values beside the faces: `along` 0 or 1 cells further on the axis, `offset` aside on `across`."""
            start, stop = [1] * d, [1 + n for n in self.grid.shape]
            start[axis], stop[axis] = along, along + self.grid.shape[axis] + 1
            if across is not None:
                start[across], stop[across] = start[across] + offset, stop[across] + offset
            return jax.lax.slice(q, start, stop)

        def mean(q: Array) -> Array:
            return 0.5 * (cells(q, 0) + cells(q, 1))

        def slope(q: Array, b: int) -> Array:
            if b == axis:
                return (cells(q, 1) - cells(q, 0)) / spacing[axis]
            ahead, behind = (cells(q, 0, b, o) + cells(q, 1, b, o) for o in (1, -1))
            return (ahead - behind) / (4 * spacing[b])

        rho, v = around[0], around[1 : d + 1]
        temperature = around[d + 1] / rho
        mu = self.equation.dynamic_viscosity(mean(temperature))
        gamma = jnp.asarray(self.equation.gamma, u.dtype)
        heat = gamma / (gamma - 1) / jnp.asarray(self.equation.prandtl, u.dtype)
        along = [slope(v[b], axis) for b in range(d)]
        dilatation = along[axis]
        for b in range(d):
            if b != axis:
                dilatation = dilatation + slope(v[b], b)
        stress = [mu * (q + (along[axis] if b == axis else slope(v[axis], b))) for b, q in enumerate(along)]
        stress[axis] = stress[axis] - (2 / 3) * mu * dilatation
        energy = heat * mu * slope(temperature, axis)
        for b in range(d):
            energy = energy + stress[b] * mean(v[b])
        scalars = [
            jnp.asarray(kappa, u.dtype) * mean(rho) * slope(q, axis)
            for kappa, q in zip(self.equation.scalars.values(), around[d + 2 :], strict=True)
        ]
        return [jnp.zeros_like(energy), *(-q for q in stress), -energy, *(-q for q in scalars)]

    def _total_flux(
        self, u: Float[Array, "c *grid"], extra: PyTree, axis: int, t: Real, scheme: Reconstruction
    ) -> Float[Array, "c *faces"]:
        """The flux of the scheme, of viscosity and of closures at the n + 1 faces along `axis`."""
        d = self.grid.ndim
        with jax.named_scope(f"flux_{AXES[axis]}"):
            weights = None
            if "weights" in extra and scheme.order > 1:
                weights = self._on_all_faces(extra["weights"][axis], extra.get("first_weights"), axis, 3)
            left, right = self._face_states(u, axis, scheme, t, weights)

            def summed(left: Array, right: Array, u: Array, given: tuple[Array, Array | None] | None) -> Array:
                flux = RIEMANN_SOLVERS[self.riemann](self.equation, channels_of(left), channels_of(right), axis, d)
                if not self.equation.ideal:
                    flux = [f + g for f, g in zip(flux, self._viscous(u, axis, t), strict=True)]
                total = jnp.stack(flux)
                return total if given is None else total + self._on_all_faces(*given, axis, 1)

            given = (extra["flux"][axis], extra.get("first_flux")) if "flux" in extra else None
            return stored(t, summed, left, right, u, given)

    def _on_all_faces(self, q: Array, first: Array | None, axis: int, lead: int) -> Array:
        """What a closure gives at the right faces, at all n + 1 faces: nothing passes sides that are not periodic.

        `first`: the lowest one along the first axis of a slab.
        """
        n, along = self.grid.shape[axis], axis + lead
        if axis == 0 and first is not None:
            return jnp.concatenate([first, q], along)
        if self.grid.periodic[axis]:
            return jnp.concatenate([part(q, n - 1, n, along), q], along)
        zero = jnp.zeros_like(part(q, 0, 1, along))
        return jnp.concatenate([zero, part(q, 0, n - 1, along), zero], along)

    # -- positivity -------------------------------------------------------------------------------------------------------------

    def _neighbours(self, u: Float[Array, "c *grid"], axis: int, t: Real) -> tuple[Channels, Channels, Array]:
        """The cells on both sides of each face along `axis`, and α/Δx there."""
        n, h = self.grid.shape[axis], self.grid.spacing[axis]
        around = self._extended(u, axis, 1, t)
        left, right = (channels_of(part(around, k, k + n + 1, axis + 1)) for k in (0, 1))
        return left, right, largest_speed(self.equation, left, right, axis, self.grid.ndim) / h

    def _cell_speed(self, u: Float[Array, "c *grid"], axis: int, t: Real) -> Float[Array, "*grid"]:
        """The larger α/Δx of the two faces of each cell along `axis`."""
        n, speed = self.grid.shape[axis], self._neighbours(u, axis, t)[2]
        return jnp.maximum(part(speed, 0, n, axis), part(speed, 1, n + 1, axis))

    def cell_speeds(self, u: Float[Array, "c *grid"], t: Real) -> Float[Array, "*grid"]:
        """Σ_a α_a/Δx_a of each cell."""
        total = self._cell_speed(u, 0, t)
        for axis in range(1, self.grid.ndim):
            total = total + self._cell_speed(u, axis, t)
        return total

    def _factor(self, u: Array, total: Array, axis: int, t: Real, dt: Real) -> Float[Array, "*grid"]:
        """λ_i: cell i is a mean of its states Ū_i ± λ_i F̂, one for each face, with weights in proportion to the axes' speeds."""
        return 2 * dt * total / (self._cell_speed(u, axis, t) * self.grid.spacing[axis])

    def _share(
        self, u: Float[Array, "c *grid"], factor: Float[Array, "*more"], high: Array, axis: int, t: Real
    ) -> Float[Array, "*faces"]:
        """θ at the n + 1 faces along `axis`; `factor` has one more layer on both sides, 0 where cells need not stay positive."""
        d, n = self.grid.ndim, self.grid.shape[axis]
        left, right, _ = self._neighbours(u, axis, t)
        low = jnp.stack(llf(self.equation, left, right, axis, d))
        theta = jnp.ones_like(low[0])
        for side, (sign, inner) in enumerate(((-1.0, left), (1.0, right))):
            cells = jnp.stack(self.equation.conserved_channels(inner, d))
            step = sign * part(factor, side, side + n + 1, axis)[None]
            theta = jnp.minimum(theta, self._largest_share(cells + step * low, cells + step * high))
        return theta

    def _largest_share(self, safe: Float[Array, "c *faces"], full: Float[Array, "c *faces"]) -> Float[Array, "*faces"]:
        """The largest θ for which safe + θ (full − safe) keeps ρ and p above `KEPT_SHARE` of those of `safe`, off the floors."""
        share = jnp.asarray(KEPT_SHARE, safe.dtype)

        def least_of(q: Array, floor: float) -> Array:
            # Twice the floor, so that rounding does not carry a cell below it; a flux of first order may go where it must.
            return jnp.maximum(share * q, jnp.minimum(q, jnp.asarray(2 * floor, q.dtype)))

        least = least_of(safe[0], self.density_floor)
        falls = full[0] < least
        theta = jnp.where(falls, (safe[0] - least) / jnp.where(falls, safe[0] - full[0], 1), 1)
        p_safe, p = self.pressure(safe), self.pressure(safe + theta[None] * (full - safe))
        least = least_of(p_safe, self.pressure_floor)
        falls = p < least
        # The pressure is concave along the segment, so the chord is a lower bound.
        second = jnp.where(falls, (p_safe - least) / jnp.where(falls, p_safe - p, 1), 1)
        possible = (safe[0] > 0) & (p_safe > 0)
        return jnp.where(possible, jnp.clip(theta * second, 0, 1), 0)

    def _limited(self, theta: Array, u: Array, high: Array, axis: int, t: Real) -> Float[Array, "c *faces"]:
        """(1 − θ) F_LLF + θ F."""
        left, right, _ = self._neighbours(u, axis, t)
        low = jnp.stack(llf(self.equation, left, right, axis, self.grid.ndim))
        return low + theta[None] * (high - low)

    # -- all axes ---------------------------------------------------------------------------------------------------------------

    def __call__(
        self,
        base: Float[Array, "c *grid"],
        u: Array | None,
        extra: PyTree,
        t: Real,
        dt: Real,
        rough: bool = False,
        limit: bool = False,
    ) -> Stage:
        """`base` + Δt dŪ/dt(`u`), u = `base` where it is None; `rough`: first order; `limit`: with the positivity limiter."""
        slabs, limiter_dt = self._slabs(), jnp.full((), jnp.inf, base.dtype)
        if slabs == 1:
            aids: PyTree = {}
            if limit:
                aids = self._speeds(base, t, dt)
                aids["factor_ends"] = self._wrapped(aids["factor"], 0, 0)
                limiter_dt = 0.5 / jnp.max(aids["total"])

            def whole(base: Array, u: Array | None, extra: PyTree, aids: PyTree) -> tuple:
                return self._all_axes(base, u, extra, aids, t, dt, rough)

            new, through, limited, margin = jax.checkpoint(whole)(base, u, extra, aids)
        else:
            shape = (self.grid.shape[0] // slabs, *self.grid.shape[1:])
            lengths = (shape[0] * self.grid.spacing[0], *self.grid.lengths[1:])
            slab = dataclasses.replace(self, grid=Grid(shape, lengths, (("outflow", "outflow"), *self.grid.boundaries[1:])))
            pieces = self._cut(base, u, extra, t, slabs)
            if limit:
                below, _, above = self._around(base, 0, 1, t)
                ends = _between(pieces["base"], 2, below, above)

                def speeds(_: None, piece: PyTree) -> tuple[None, PyTree]:
                    return None, dataclasses.replace(slab, ends=piece[1])._speeds(piece[0], t, dt)

                _, aids = jax.lax.scan(speeds, None, (pieces["base"], ends))
                limiter_dt = 0.5 / jnp.max(aids["total"])
                outside = [self._wrapped(_joined(aids["factor"], 0), 0, 0)[k] for k in range(2)]
                pieces["aids"] = {**aids, "factor_ends": _between(aids["factor"], 1, *outside), "base_ends": ends}

            def one(_: None, piece: PyTree) -> tuple[None, tuple]:
                there = dataclasses.replace(slab, ends=piece["ends"])
                return None, there._all_axes(piece["base"], piece["u"], piece["extra"], piece["aids"], t, dt, rough)

            _, (new, through, limited, margin) = jax.lax.scan(jax.checkpoint(one), None, pieces)
            new = _joined(new, 1)
            # Between slabs nothing is gained or lost.
            through = jnp.concatenate([jnp.stack([through[:1, 0, 0], through[-1:, 0, 1]], 1), through[:, 1:].mean(axis=0)])
            limited, margin = limited.sum(), margin.min()
        passed = jnp.zeros((base.shape[0],), base.dtype)
        for axis, length in enumerate(self.grid.lengths):
            if not self.grid.periodic[axis]:
                passed = passed + (dt / length) * (through[axis, 0] - through[axis, 1])
        return Stage(new, passed, limited, margin, limiter_dt)

    def _slabs(self) -> int:
        """How many slabs the grid is cut into."""
        n, d = self.grid.shape[0], self.grid.ndim
        prescribed = any("fixed" in sides for sides in self.grid.boundaries[1:])
        if jax.default_backend() != "cpu" or d == 1 or prescribed:
            return 1
        possible = [k for k in range(1, n // SLAB_LAYERS + 1) if n % k == 0]
        fitting = [k for k in possible if math.prod(self.grid.shape) <= k * SLAB_CELLS]
        return min(fitting, default=max(possible, default=1))

    def _wrapped(self, q: Array, axis: int, lead: int) -> tuple[Array, Array]:
        """The layers beyond both sides of `axis`, which has `lead` others in front; 0 beyond sides that are not periodic."""
        n = self.grid.shape[axis]
        ends = part(q, n - 1, n, axis + lead), part(q, 0, 1, axis + lead)
        return ends if self.grid.periodic[axis] else (jnp.zeros_like(ends[0]), jnp.zeros_like(ends[1]))

    def _speeds(self, base: Array, t: Real, dt: Real) -> dict[str, Array]:
        """Σ_a α_a/Δx_a, and λ along the first axis, of the means that must stay positive."""
        total = stored(t, lambda q: self.cell_speeds(q, t), base)
        return {"total": total, "factor": stored(t, lambda q, total: self._factor(q, total, 0, t, dt), base, total)}

    def _cut(self, base: Array, u: Array | None, extra: PyTree, t: Real, slabs: int) -> dict[str, Any]:
        """The arguments of `_all_axes` and the `ends` of every slab, in a new first axis."""
        pieces: dict[str, Any] = {"base": _divided(base, 1, slabs), "u": None if u is None else _divided(u, 1, slabs)}
        below, _, above = self._around(base if u is None else u, 0, RECONSTRUCTIONS[self.reconstruction].halo, t)
        pieces["ends"] = _between(pieces["base" if u is None else "u"], 2, below, above)
        cut: PyTree = {"source": _divided(extra["source"], 1, slabs)} if "source" in extra else {}
        for name, lead in (("flux", 1), ("weights", 3)):
            if name in extra:
                # As `_on_all_faces` has it.
                along = extra[name][0]
                lowest, _ = self._wrapped(along, 0, lead)
                if not self.grid.periodic[0]:
                    along = jnp.concatenate([part(along, 0, self.grid.shape[0] - 1, lead), lowest], lead)
                cut[name] = [_divided(q, lead, slabs) for q in (along, *extra[name][1:])]
                cut[f"first_{name}"] = _between(cut[name][0], lead + 1, lowest, lowest)[0]
        return {**pieces, "extra": cut, "aids": {}}

    def _all_axes(
        self, base: Array, u: Array | None, extra: PyTree, aids: PyTree, t: Real, dt: Real, rough: bool
    ) -> tuple[Array, Float[Array, "d sides c"], Array, Array]:
        """(new, mean fluxes at both sides of each axis, limited faces, least margin) of the cells in `grid`."""
        scheme = RECONSTRUCTIONS["constant" if rough else self.reconstruction]
        if self._by_turns:
            new, through, limited = self._turning(base, u, extra, aids, t, dt, scheme)
        else:
            new, from_ = base, base if u is None else u
            limited, through = jnp.zeros((), base.dtype), []
            for axis in range(self.grid.ndim):
                new, passed, count = self._one_axis(new, base, from_, extra, aids, axis, t, dt, scheme)
                limited = limited + count
                through.append(passed)
            through = jnp.stack(through)
        if "source" in extra:
            new = new + dt * extra["source"]
        margin = jnp.full((), jnp.inf, base.dtype)
        if not aids:
            margin = jnp.min(stored(t, lambda old, new: self._margin(old, new), *jax.lax.stop_gradient((base, new))))
        return new, through, limited, margin

    def _one_axis(
        self,
        new: Array,
        base: Array,
        from_: Array,
        extra: PyTree,
        aids: PyTree,
        axis: int,
        t: Real,
        dt: Real,
        scheme: Reconstruction,
    ) -> tuple[Array, Float[Array, "sides c"], Array]:
        """(`new` less what the fluxes along `axis` carry away in Δt, their means at both sides, limited faces)."""
        n, h = self.grid.shape[axis], self.grid.spacing[axis]
        at_base = self if "base_ends" not in aids else dataclasses.replace(self, ends=aids["base_ends"])
        limited = jnp.zeros((), base.dtype)
        flux = self._total_flux(from_, extra, axis, t, scheme)
        if aids:

            def shares(base: Array, flux: Array, aids: PyTree) -> Array:
                if axis == 0 and "factor" in aids:
                    factor, (below, above) = aids["factor"], aids["factor_ends"]
                else:
                    factor = at_base._factor(base, aids["total"], axis, t, dt)
                    below, above = self._wrapped(factor, axis, 0)
                return at_base._share(base, jnp.concatenate([below, factor, above], axis), flux, axis, t)

            theta = stored(t, shares, base, flux, aids)
            flux = stored(t, lambda theta, base, flux: at_base._limited(theta, base, flux, axis, t), theta, base, flux)
            limited = jnp.sum(part(theta, 1, n + 1, axis) < 1).astype(base.dtype)
        sides = [part(flux, k, k + 1, axis + 1) for k in (0, n)]
        closed = self.grid.periodic[axis]
        through = [jnp.zeros_like(q, shape=q.shape[:1]) if closed else q.mean(tuple(range(1, q.ndim))) for q in sides]

        def updated(q: Array, flux: Array) -> Array:
            return q - (dt / h) * (part(flux, 1, n + 1, axis + 1) - part(flux, 0, n, axis + 1))

        return stored(t, updated, new, flux), jnp.stack(through), limited

    # -- one program for three axes ---------------------------------------------------------------------------------------------

    @property
    def _by_turns(self) -> bool:
        """Whether the sweep is `compact` and the axes are alike: a periodic cube of three dimensions, not cut into slabs."""
        grid = self.grid
        alike = all(grid.periodic) and len({*grid.shape}) == 1 and len({*grid.spacing}) == 1
        return self.compact and grid.ndim == 3 and alike and self._slabs() == 1

    def _turning(
        self, base: Array, u: Array | None, extra: PyTree, aids: PyTree, t: Real, dt: Real, scheme: Reconstruction
    ) -> tuple[Array, Float[Array, "d sides c"], Array]:
        """(new, through, limited): the cube is turned so that each axis is the first one in its turn.

        A loop then compiles the sweep along one axis where it would compile three.
        """

        def turned(q: Array | None) -> Array | None:
            return None if q is None else jnp.stack([_turned(q, k) for k in range(3)])

        given: dict[str, Any] = {"base": turned(base), "u": turned(u), "aids": {}, "extra": {}}
        if aids:
            given["aids"] = {"total": turned(aids["total"])}
        for name in ("flux", "weights"):
            if name in extra:
                given["extra"][name] = jnp.stack([_turned(extra[name][k], k) for k in range(3)])

        def one(_: None, of: PyTree) -> tuple[None, tuple]:
            at = {name: q[None] for name, q in of["extra"].items()}
            from_ = of["base"] if of["u"] is None else of["u"]
            return None, self._one_axis(jnp.zeros_like(base), of["base"], from_, at, of["aids"], 0, t, dt, scheme)

        _, (changes, through, limited) = jax.lax.scan(one, None, given)
        new = base
        for k in range(3):
            new = new + _turned(changes[k], -k)
        return new, jnp.stack([_turned_channels(q, -k, 1) for k, q in enumerate(through)]), limited.sum()

    def _margin(self, old: Float[Array, "c *grid"], new: Float[Array, "c *grid"]) -> Float[Array, "*grid"]:
        """How far ρ and p are above their floors and above what looks suspicious after one stage."""
        left = []
        for p, q, floor in ((old[0], new[0], self.density_floor), (self.pressure(old), self.pressure(new), self.pressure_floor)):
            left.append(q - jnp.maximum(SUSPICIOUS_SHARE * p, jnp.asarray(floor, q.dtype)))
        return jnp.minimum(left[0], left[1])


def _turned_channels(q: Array, times: int, axis: int) -> Array:
    """The components of momentum after `times` turns by which y becomes x, z becomes y and x becomes z."""
    first, momentum, rest = (jax.lax.slice_in_dim(q, a, b, axis=axis) for a, b in ((0, 1), (1, 4), (4, q.shape[axis])))
    return jnp.concatenate([first, jnp.roll(momentum, -times, axis), rest], axis)


def _turned(q: Float[Array, "*c x y z"], times: int) -> Float[Array, "*c x y z"]:
    """An array after `times` turns, as `_turned_channels` has them; (c, *grid), (side, c, free, *grid) or a scalar field."""
    if times % 3 == 0:
        return q
    lead = q.ndim - 3
    if lead:
        q = _turned_channels(q, times, 0 if lead == 1 else 1)
    return jnp.transpose(q, (*range(lead), *(lead + (a + times) % 3 for a in range(3))))


def _divided(q: Array, axis: int, slabs: int) -> Array:
    """`axis` as two: the slabs, which come first of all, and the layers of each."""
    shape = q.shape
    return jnp.moveaxis(q.reshape(*shape[:axis], slabs, shape[axis] // slabs, *shape[axis + 1 :]), axis, 0)


def _joined(q: Array, axis: int) -> Array:
    """The inverse of `_divided`."""
    q = jnp.moveaxis(q, 0, axis)
    return q.reshape(*q.shape[:axis], q.shape[axis] * q.shape[axis + 1], *q.shape[axis + 2 :])


def _between(divided: Array, axis: int, below: Array, above: Array) -> tuple[Array, Array]:
    """The layers of the neighbours below and above each slab along `axis`, those beyond the ends as given."""
    layers, count = divided.shape[axis], below.shape[axis - 1]
    lower = jnp.concatenate([below[None], part(divided, layers - count, layers, axis)[:-1]])
    return lower, jnp.concatenate([part(divided, 0, count, axis)[1:], above[None]])
