"""dŪ/dt = −Σ_a [F̂_a]/Δx_a + S: finite volumes for compressible flow, after Godunov.

All channels are means over cells. The flux of every channel along axis a lives at the right face of axis a.
"""

import math
from collections.abc import Sequence
from typing import ClassVar, Literal

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PyTree

from hybridsim.contract import AbstractSolver, Flux, Interpolation, PostStep, Real, Replacement, Source, Variable
from hybridsim.grid import Grid, cell_mean
from hybridsim.solvers import staggering
from hybridsim.solvers.compressible import AXES, SIDES, Channels, CompressibleNavierStokes, is_zero
from hybridsim.solvers.reconstruction import RECONSTRUCTIONS, Reconstruction, characteristic, null_space, windows
from hybridsim.solvers.riemann import RIEMANN_SOLVERS, largest_speed, llf
from hybridsim.solvers.staggering import part
from hybridsim.solvers.stored import stored

EVENTS = ("floor_events", "floor_mass", "floor_energy", "limited_faces", "bound_violations")
"""What the solver keeps count of, besides what was injected and radiated."""

KEPT_SHARE = 1e-2
"""The positivity limiter leaves at least this share of the density and pressure that the first-order scheme would give."""

SUSPICIOUS_SHARE = 5e-2
"""A cell whose density or pressure falls below this share of itself in one stage calls for the positivity limiter."""


def _mean(q: Array) -> Array:
    return jnp.mean(q)


class CompressibleFiniteVolume(AbstractSolver):
    """Ū_i ← Ū_i − Δt Σ_a (F̂_{a,i+½} − F̂_{a,i−½})/Δx_a,  F̂ = (1 − θ) F_LLF + θ (F_Riemann(W_L, W_R) − F_v + F_closure).

    Compressible Euler and Navier–Stokes equations with passive scalars, in one to three dimensions, unsplit: reconstruction of
    primitive variables, an approximate Riemann solver, central differences for viscosity and conduction.

    **Arguments:**

    - `grid`: a `Grid` of at least 4 cells per axis; each axis is periodic, or has two sides of these kinds:
        - `outflow`: no gradient normal to the side;
        - `reflecting`: a wall without friction that lets no heat through;
        - `fixed`: the gas beyond the side is what `equation.boundary_state` says, an inflow for example.
    - `equation`: `CompressibleNavierStokes`.
    - `reconstruction`: `plm_van_leer` (default), `plm_mc`, `ppm`, `weno5z`, or `constant`.
    - `riemann`: `hllc` (default), `hllc_low_mach`, `hlle`, or `llf`.
    - `reconstruct`: `primitive` (default) or `characteristic` variables; these ring less behind strong shocks and cost more.
    - `positivity`: whether the total flux is limited so that density and pressure stay positive (default), as below.
    - `density_floor`, `pressure_floor`: bounds of ρ and p inside the primitive conversion.

    Order 2 in space with `plm_*`; `ppm` and `weno5z` have order 3 and 5 in one dimension, and order 2 with smaller errors in two
    and three, since each face has one flux point. Viscous terms are of order 2. Mass, momentum, energy and scalars are conserved
    to rounding for any Flux closure; what enters through sides that are not periodic is in the ledger.

    **Positivity.** After each Euler step of a strong-stability-preserving method the cell means are looked at. Where density or
    pressure has all but vanished, the step is done again with θ < 1 at the faces that are to blame: the largest θ for which each
    cell stays positive by itself (Hu, Adams & Shu 2013, doi:10.1016/j.jcp.2013.01.024, section 2.3, with the pressure's concavity
    instead of a search). F_LLF is positive while Δt Σ_a α_a/Δx_a ≤ ½, α_a the largest |v_a| + sound speed of a face's cells; steps
    beyond that bound are counted (`bound_violations`), and so are the faces with θ < 1 (`limited_faces`). Conserved means are never
    changed: where ρ or p lies below its floor all the same (too large a step, a Source or PostStep closure, single precision), the
    primitive variables use the floor, and each such cell is counted with the mass and energy that this stands for.
    """

    grid: Grid
    equation: CompressibleNavierStokes
    reconstruction: Literal["plm_van_leer", "plm_mc", "ppm", "weno5z", "constant"] = eqx.field(static=True, default="plm_van_leer")
    riemann: Literal["hllc", "hllc_low_mach", "hlle", "llf"] = eqx.field(static=True, default="hllc")
    reconstruct: Literal["primitive", "characteristic"] = eqx.field(static=True, default="primitive")
    positivity: bool = eqx.field(static=True, default=True)
    density_floor: float = eqx.field(static=True, default=1e-12, converter=float)
    pressure_floor: float = eqx.field(static=True, default=1e-12, converter=float)

    places: ClassVar = (Flux, Source, Interpolation, PostStep, Replacement)

    def __check_init__(self):
        if min(self.grid.shape) < 4:
            raise ValueError(f"grid: a finite-volume solver needs at least 4 cells per axis, found {self.grid.shape}")
        if self.reconstruction not in RECONSTRUCTIONS:
            raise ValueError(f"reconstruction: possible are {', '.join(RECONSTRUCTIONS)}; found {self.reconstruction!r}")
        if self.riemann not in RIEMANN_SOLVERS:
            raise ValueError(f"riemann: possible are {', '.join(RIEMANN_SOLVERS)}; found {self.riemann!r}")
        if self.reconstruct not in ("primitive", "characteristic"):
            raise ValueError(f"reconstruct: possible are primitive, characteristic; found {self.reconstruct!r}")
        for name in ("density_floor", "pressure_floor"):
            if not (math.isfinite(getattr(self, name)) and getattr(self, name) > 0):
                raise ValueError(f"{name}: must be positive and finite, found {getattr(self, name)}")
        for axis, sides in enumerate(self.grid.boundaries):
            for side, kind in enumerate(sides):
                if kind not in ("periodic", "outflow", "reflecting", "fixed"):
                    raise ValueError(
                        f"domain.boundaries: a compressible solver takes periodic, outflow, reflecting or fixed sides, not {kind} "
                        f"at {AXES[axis]}_{SIDES[side]}"
                    )
        self.equation.check_grid(self.grid)

    # -- what the state is ------------------------------------------------------------------------------------------------------

    @property
    def variables(self) -> tuple[Variable, ...]:
        return self.equation.variables(self.grid.centre)

    @property
    def ledger_rows(self) -> tuple[str, ...]:
        return (*(v.name for v in self.variables), "radiated", *EVENTS)

    @property
    def conserved(self) -> tuple[str, ...]:
        """All channels: what forces, cooling and open sides do to their sums is in the ledger."""
        return tuple(v.name for v in self.variables)

    def prepare(self, dtype) -> "CompressibleFiniteVolume":
        return self

    def encode(self, u: Float[Array, "c *grid"]) -> PyTree:
        channels = tuple(u)
        events = jnp.zeros((len(EVENTS),), u.dtype).at[:3].set(self._floors(channels))
        z = {"u": channels, "injected": jnp.zeros((len(channels) + 1,), u.dtype), "events": events}
        if self.equation.forcing is not None:
            z["memory"] = self.equation.forcing.init_memory(self.grid)
        return z

    def decode(self, z: PyTree) -> Float[Array, "c *grid"]:
        return jnp.stack(z["u"])

    def constrain(self, z: PyTree) -> PyTree:
        return z

    def project(self, u: Float[Array, "c *grid"]) -> Float[Array, "c *grid"]:
        return u

    def divergence(self, u: Float[Array, "c *grid"]) -> None:
        return None

    def centred(self, u: Float[Array, "c *grid"]) -> Float[Array, "c *grid"]:
        return u

    def collect(self, z: PyTree) -> tuple[PyTree, Float[Array, " row"]]:
        emptied = {**z, "injected": jnp.zeros_like(z["injected"]), "events": jnp.zeros_like(z["events"])}
        return emptied, jnp.concatenate([z["injected"], z["events"]])

    def restrict(self, u: Float[Array, "c *fine"], grid: Grid, variables: tuple[Variable, ...]) -> Float[Array, "c *grid"]:
        """Exact means over the coarse cells of the fine cells' contents: sums are kept, and so is positivity."""
        if not np.allclose(grid.lengths, self.grid.lengths, rtol=1e-12):
            raise ValueError(f"the fine and the coarse grid must span the same box, found {grid.lengths} and {self.grid.lengths}")
        if grid.boundaries != self.grid.boundaries:
            raise ValueError(
                f"the fine and the coarse grid must have the same boundaries, found {grid.boundaries} and {self.grid.boundaries}"
            )
        if all(n % m == 0 for n, m in zip(grid.shape, self.grid.shape, strict=True)):
            factors = tuple(n // m for n, m in zip(grid.shape, self.grid.shape, strict=True))
            return jnp.stack([cell_mean(q, factors) for q in u])
        for axis, (n, m) in enumerate(zip(grid.shape, self.grid.shape, strict=True)):
            fine, coarse = np.arange(n + 1) / n, np.arange(m + 1) / m
            shared = np.minimum(fine[None, 1:], coarse[1:, None]) - np.maximum(fine[None, :-1], coarse[:-1, None])
            weights = jnp.asarray(m * np.maximum(shared, 0), u.dtype)
            u = jnp.moveaxis(jnp.tensordot(u, weights, (axis + 1, 1), precision="highest"), -1, axis + 1)
        return u

    # -- what closures see ------------------------------------------------------------------------------------------------------

    def flux_place(self, axis: int, channel: int):
        return self.grid.flux_place(self.grid.centre, axis)

    def gradient(self, u: Float[Array, "c *grid"]) -> Float[Array, "d c *grid"]:
        """Differences of neighbours at the right faces; a face on a side takes the difference of its inner neighbour."""
        axes = range(self.grid.ndim)
        return jnp.stack([jnp.stack([self.derivative(q, self.grid.centre, a)[0] for q in u]) for a in axes])

    def derivative(self, array, at, axis):
        return staggering.derivative(self.grid, array, at, axis)

    def move(self, array, from_, to):
        return staggering.move(self.grid, array, from_, to)

    def free_weights(self) -> int:
        """How many free coefficients an Interpolation closure has per face, side and channel."""
        return len(null_space(self.reconstruction))

    def receive(self, flux, source) -> PyTree:
        return {name: tuple(q) for name, q in (("source", source),) if q is not None} | (
            {} if flux is None else {"flux": tuple(tuple(row) for row in flux)}
        )

    def receive_weights(self, weights: Float[Array, "d side c free *grid"]) -> PyTree:
        """What `euler` will use for the output of an Interpolation closure."""
        return {"weights": weights}

    # -- primitive variables ----------------------------------------------------------------------------------------------------

    def _primitive(self, u: Sequence[Array]) -> Channels:
        """W, with ρ and p no lower than their floors."""
        d = self.grid.ndim
        rho = jnp.maximum(u[0], jnp.asarray(self.density_floor, u[0].dtype))
        w = self.equation.primitive_channels([rho, *u[1:]], d)
        w[d + 1] = jnp.maximum(w[d + 1], jnp.asarray(self.pressure_floor, u[0].dtype))
        return w

    def _pressure(self, u: Sequence[Array]) -> Array:
        """p without a floor."""
        rho = jnp.maximum(u[0], jnp.asarray(self.density_floor, u[0].dtype))
        return self.equation.primitive_channels([rho, *u[1:]], self.grid.ndim)[self.grid.ndim + 1]

    def _floors(self, u: Sequence[Array]) -> Float[Array, "3"]:
        """(cells below a floor, and the box means of the mass and the energy that the floors stand for)."""
        dtype = u[0].dtype
        low, high = jnp.asarray(self.density_floor, dtype), jnp.asarray(self.pressure_floor, dtype)
        p = self._pressure(u)
        below = (u[0] < low) | (p < high)
        mass = jnp.maximum(low - u[0], 0)
        energy = jnp.maximum(high - p, 0) / (jnp.asarray(self.equation.gamma, dtype) - 1)
        return jnp.stack([jnp.sum(below).astype(dtype), _mean(mass), _mean(energy)])

    def _beyond(self, w: Sequence[Array], axis: int, side: int, halo: int, t: Real) -> Channels:
        """`halo` layers of primitive variables beyond one side, in the order of the axis."""
        n, kind = self.grid.shape[axis], self.grid.boundaries[axis][side]
        d = self.grid.ndim
        if kind == "fixed":
            h = self.grid.spacing[axis]
            along = (np.arange(-halo, 0) + 0.5) * h if side == 0 else self.grid.lengths[axis] + (np.arange(halo) + 0.5) * h
            position = [
                jnp.asarray((along if a == axis else x).reshape([-1 if b == a else 1 for b in range(d)]), w[0].dtype)
                for a, x in enumerate(self.grid.coordinates(self.grid.centre))
            ]
            given = self.equation.boundary_state[f"{AXES[axis]}_{SIDES[side]}"](position, t)
            shape = tuple(halo if a == axis else m for a, m in enumerate(w[0].shape))
            return [jnp.broadcast_to(q.astype(w[0].dtype), shape) for q in given]
        out = []
        for c, q in enumerate(w):
            if kind == "reflecting":
                layers = jnp.flip(part(q, 0, halo, axis) if side == 0 else part(q, n - halo, n, axis), axis)
                out.append(-layers if c == 1 + axis else layers)
            else:
                edge = part(q, 0, 1, axis) if side == 0 else part(q, n - 1, n, axis)
                out.append(jnp.concatenate([edge] * halo, axis))
        return out

    def _around(self, w: Sequence[Array], axis: int, halo: int, t: Real) -> list[tuple[Array, Array, Array]]:
        """(below, inside, above) of each channel: `halo` layers beyond both sides of `axis`."""
        n = self.grid.shape[axis]
        if self.grid.periodic[axis]:
            below, above = ([part(q, i, i + halo, axis) for q in w] for i in (n - halo, 0))
        else:
            below, above = (self._beyond(w, axis, side, halo, t) for side in range(2))
        return list(zip(below, w, above, strict=True))

    def _extended(self, w: Sequence[Array], axis: int, halo: int, t: Real) -> Channels:
        """w with `halo` more layers on both sides of `axis`."""
        return [jnp.concatenate(three, axis) for three in self._around(w, axis, halo, t)]

    # -- fluxes -----------------------------------------------------------------------------------------------------------------

    def _face_states(
        self, w: Sequence[Array], axis: int, scheme: Reconstruction, t: Real, weights: Array | None
    ) -> tuple[Channels, Channels]:
        """(W_L, W_R) at the n + 1 faces; first order where the scheme would give a density or pressure that is not positive."""
        d = self.grid.ndim
        if self.reconstruct == "primitive" and weights is None and scheme.order <= 2:
            # Channel by channel, so that no more than one is in memory with its halo.
            faces = lambda three: scheme.faces(jnp.concatenate(three, axis), axis)  # noqa: E731
            pairs = [stored(t, faces, three) for three in self._around(w, axis, scheme.halo, t)]
            return [p[0] for p in pairs], [p[1] for p in pairs]
        around = stored(t, lambda w: self._extended(w, axis, scheme.halo, t), w)
        if self.reconstruct == "characteristic" and scheme.order > 1:
            gamma = jnp.asarray(self.equation.gamma, w[0].dtype)
            left, right = characteristic(around, scheme.faces, scheme.halo, gamma, axis, d)
        else:
            pairs = [stored(t, lambda q: scheme.faces(q, axis), q) for q in around]
            left, right = [p[0] for p in pairs], [p[1] for p in pairs]
        if weights is not None:
            basis = null_space(self.reconstruction)
            for c, q in enumerate(around):
                cells = windows(q, scheme.halo, axis)
                for f, row in enumerate(basis):
                    combined = sum(float(x) * cell for x, cell in zip(row, cells, strict=True))
                    mirrored = sum(float(x) * cell for x, cell in zip(row[::-1], cells, strict=True))
                    left[c] = left[c] + weights[0, c, f] * combined
                    right[c] = right[c] + weights[1, c, f] * mirrored
        sides = []
        for k, state in enumerate((left, right)):
            cell = [part(q, scheme.halo - 1 + k, q.shape[axis] - scheme.halo + k, axis) for q in around]
            share = jnp.asarray(KEPT_SHARE, w[0].dtype)
            good = (state[0] > share * cell[0]) & (state[d + 1] > share * cell[d + 1])
            sides.append([jnp.where(good, q, own) for q, own in zip(state, cell, strict=True)])
        return sides[0], sides[1]

    def _viscous(self, w: Sequence[Array], axis: int, t: Real) -> Channels:
        """−F_v: the flux of momentum by τ, of energy by τ·v and conduction, of scalars by diffusion; order 2."""
        d, dtype = self.grid.ndim, w[0].dtype
        around = list(w)
        for a in range(d):
            around = self._extended_with(around, a, t)
        spacing = self.grid.spacing

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
        gamma = jnp.asarray(self.equation.gamma, dtype)
        heat = gamma / (gamma - 1) / jnp.asarray(self.equation.prandtl, dtype)
        dilatation = slope(v[0], 0)
        for b in range(1, d):
            dilatation = dilatation + slope(v[b], b)
        stress = [slope(v[b], axis) + (slope(v[axis], b) if b != axis else slope(v[b], axis)) for b in range(d)]
        stress[axis] = stress[axis] - (2 / 3) * dilatation
        stress = [mu * q for q in stress]
        energy = heat * mu * slope(temperature, axis)
        for b in range(d):
            energy = energy + stress[b] * mean(v[b])
        scalars = [
            jnp.asarray(kappa, dtype) * mean(rho) * slope(q, axis)
            for kappa, q in zip(self.equation.scalars.values(), around[d + 2 :], strict=True)
        ]
        return [jnp.zeros_like(energy), *(-q for q in stress), -energy, *(-q for q in scalars)]

    def _extended_with(self, w: Sequence[Array], axis: int, t: Real) -> Channels:
        """One more layer on both sides of `axis`, of channels that may have been extended along earlier axes."""
        n = self.grid.shape[axis]
        if self.grid.periodic[axis]:
            return [jnp.concatenate([part(q, n - 1, n, axis), q, part(q, 0, 1, axis)], axis) for q in w]
        sides = []
        for side, kind in enumerate(self.grid.boundaries[axis]):
            edge = [part(q, side * (n - 1), side * (n - 1) + 1, axis) for q in w]
            if kind == "reflecting":
                edge[1 + axis] = -edge[1 + axis]
            elif kind == "fixed":
                inner = list(w)
                for a in range(axis):
                    inner = [part(q, 1, self.grid.shape[a] + 1, a) for q in inner]
                given = self._beyond(inner, axis, side, 1, t)
                for a in range(axis):
                    width = [(1, 1) if b == a else (0, 0) for b in range(self.grid.ndim)]
                    given = [jnp.pad(q, width, mode="wrap" if self.grid.periodic[a] else "edge") for q in given]
                edge = given
            sides.append(edge)
        return [jnp.concatenate(three, axis) for three in zip(sides[0], w, sides[1], strict=True)]

    def _total_flux(self, w: Channels, axis: int, t: Real, extra: PyTree, scheme: Reconstruction) -> Channels:
        """The flux of the scheme, of viscosity and of closures at the n + 1 faces along `axis`."""
        d = self.grid.ndim
        with jax.named_scope(f"flux_{AXES[axis]}"):
            weights = None
            if "weights" in extra and scheme.order > 1:
                weights = self._on_all_faces(extra["weights"][axis], axis, 3)
            left, right = self._face_states(w, axis, scheme, t, weights)
            terms = [f for f in (extra["flux"][axis] if "flux" in extra else ())]

            def summed(left: Channels, right: Channels, w: Channels, terms: list[Array]) -> Channels:
                flux = RIEMANN_SOLVERS[self.riemann](self.equation, left, right, axis, d)
                if not self.equation.ideal:
                    flux = [f + g for f, g in zip(flux, self._viscous(w, axis, t), strict=True)]
                if terms:
                    flux = [f + self._on_all_faces(g, axis) for f, g in zip(flux, terms, strict=True)]
                return flux

            return stored(t, summed, left, right, w, terms)

    def _on_all_faces(self, q: Array, axis: int, lead: int = 0) -> Array:
        """What a closure gives at the right faces, at all n + 1 faces: nothing passes sides that are not periodic."""
        n, axis = self.grid.shape[axis], axis + lead
        if self.grid.periodic[axis - lead]:
            return jnp.concatenate([part(q, n - 1, n, axis), q], axis)
        zero = jnp.zeros_like(part(q, 0, 1, axis))
        return jnp.concatenate([zero, part(q, 0, n - 1, axis), zero], axis)

    def _updated(self, q: Sequence[Array], flux: Channels, axis: int, dt: Real) -> Channels:
        """q − Δt (F_{i+½} − F_{i−½})/Δx_axis."""
        n, h = self.grid.shape[axis], self.grid.spacing[axis]
        return [c - (dt / h) * (part(f, 1, n + 1, axis) - part(f, 0, n, axis)) for c, f in zip(q, flux, strict=True)]

    def _passing(self, flux: Channels, axis: int, dt: Real) -> Float[Array, " c"]:
        """What the sides of `axis` add to the box means, if it is not periodic."""
        n, length = self.grid.shape[axis], self.grid.lengths[axis]
        if self.grid.periodic[axis]:
            return jnp.zeros((len(flux),), flux[0].dtype)
        return (dt / length) * jnp.stack([_mean(part(f, 0, 1, axis)) - _mean(part(f, n, n + 1, axis)) for f in flux])

    # -- positivity -------------------------------------------------------------------------------------------------------------

    def _speed(self, w: Channels, axis: int, t: Real) -> tuple[Channels, Channels, Array]:
        """The cells on both sides of each face along `axis`, and α/Δx there."""
        n, h = self.grid.shape[axis], self.grid.spacing[axis]
        around = self._extended(w, axis, 1, t)
        left, right = ([part(q, k, k + n + 1, axis) for q in around] for k in (0, 1))
        return left, right, largest_speed(self.equation, left, right, axis, self.grid.ndim) / h

    def _cell_speed(self, w: Channels, axis: int, t: Real) -> Array:
        """The larger α/Δx of the two faces of each cell along `axis`."""
        n, speed = self.grid.shape[axis], self._speed(w, axis, t)[2]
        return jnp.maximum(part(speed, 0, n, axis), part(speed, 1, n + 1, axis))

    def _cell_speeds(self, w: Channels, t: Real) -> Array:
        """Σ_a α_a/Δx_a of each cell."""
        total = self._cell_speed(w, 0, t)
        for axis in range(1, self.grid.ndim):
            total = total + self._cell_speed(w, axis, t)
        return total

    def limiter_dt(self, u: Float[Array, "c *grid"], t: Real | float = 0.0) -> Real:
        """½ / max Σ_a α_a/Δx_a: the largest Δt for which the limiter keeps ρ and p positive."""
        return 0.5 / jnp.max(self._cell_speeds(self._primitive(tuple(u)), jnp.asarray(t, u.dtype)))

    def _share(self, w: Channels, total: Array, high: Channels, axis: int, t: Real, dt: Real) -> Array:
        """θ at the n + 1 faces along `axis`, for cells of primitive variables `w` with `total` = Σ α/Δx."""
        d, n = self.grid.ndim, self.grid.shape[axis]
        left, right, _ = self._speed(w, axis, t)
        low = llf(self.equation, left, right, axis, d)
        # Each cell is a mean of states, one per face, with weights in proportion to the speeds along the axes.
        factor = 2 * dt * total / (self._cell_speed(w, axis, t) * self.grid.spacing[axis])
        first, last = part(factor, 0, 1, axis), part(factor, n - 1, n, axis)
        scale = jnp.concatenate([last, factor, first] if self.grid.periodic[axis] else [first, factor, last], axis)
        theta = jnp.ones_like(low[0])
        for side, (sign, inner) in enumerate(((-1.0, left), (1.0, right))):
            cells = self.equation.conserved_channels(inner, d)
            step = sign * part(scale, side, side + n + 1, axis)
            safe = [q + step * f for q, f in zip(cells, low, strict=True)]
            full = [q + step * f for q, f in zip(cells, high, strict=True)]
            found = self._largest_share(safe, full)
            if not self.grid.periodic[axis]:
                # Ghost cells need not stay positive.
                at = jax.lax.broadcasted_iota(jnp.int32, found.shape, axis)
                found = jnp.where(at == (0 if side == 0 else n), 1, found)
            theta = jnp.minimum(theta, found)
        return theta

    def _limited(self, theta: Array, w: Channels, high: Channels, axis: int, t: Real) -> Channels:
        """(1 − θ) F_LLF + θ F."""
        left, right, _ = self._speed(w, axis, t)
        low = llf(self.equation, left, right, axis, self.grid.ndim)
        return [a + theta * (b - a) for a, b in zip(low, high, strict=True)]

    def _largest_share(self, safe: Channels, full: Channels) -> Array:
        """The largest θ for which safe + θ (full − safe) keeps ρ and p above `KEPT_SHARE` of those of `safe`."""
        share = jnp.asarray(KEPT_SHARE, safe[0].dtype)
        least = share * safe[0]
        falls = full[0] < least
        theta = jnp.where(falls, (safe[0] - least) / jnp.where(falls, safe[0] - full[0], 1), 1)
        state = [a + theta * (b - a) for a, b in zip(safe, full, strict=True)]
        p_safe, p = self._pressure(safe), self._pressure(state)
        least = share * p_safe
        falls = p < least
        # The pressure is concave along the segment, so the chord is a lower bound.
        second = jnp.where(falls, (p_safe - least) / jnp.where(falls, p_safe - p, 1), 1)
        possible = (safe[0] > 0) & (p_safe > 0)
        return jnp.where(possible, jnp.clip(theta * second, 0, 1), 0)

    # -- steps ------------------------------------------------------------------------------------------------------------------

    def linear(self) -> PyTree | None:
        return None

    def explicit(self, z, t, tendency):
        """dz/dt without the positivity limiter; `euler` is what steppers use."""
        dtype = z["u"][0].dtype
        still = [jnp.zeros_like(q) for q in z["u"]]
        extra = tendency(z, t) or {}
        rate, passing, _ = self._swept(still, z["u"], extra, jnp.asarray(t, dtype), jnp.ones((), dtype), self.reconstruction)
        injected = jnp.concatenate([passing, jnp.zeros((1,), dtype)])
        return {"u": tuple(rate), "injected": injected, "events": jnp.zeros_like(z["events"])}

    def _swept(
        self, base: Sequence[Array], u: Sequence[Array], extra: PyTree, t: Real, dt: Real, scheme: str, limit: bool = False
    ) -> tuple[Channels, Float[Array, " c"], Float[Array, "2"]]:
        """(`base` + Δt dŪ/dt(u), what came through the sides, what the limiter did), one axis after another."""
        new, dtype = list(base), u[0].dtype
        passing, count = jnp.zeros((len(new),), dtype), jnp.zeros((), dtype)
        w = stored(t, lambda u: self._primitive(u), tuple(u))
        beyond = jnp.zeros((), bool)
        if limit:
            # The mean that must stay positive is that of `base`.
            before = w if base is u else stored(t, lambda u: self._primitive(u), tuple(base))
            total = stored(t, lambda w: self._cell_speeds(w, t), before)
            slack = 1 + 16 * float(jnp.finfo(dtype).eps)
            beyond = dt * jnp.max(total) > jnp.asarray(0.5 * slack, dtype)
        for axis in range(self.grid.ndim):
            flux = self._total_flux(w, axis, t, extra, RECONSTRUCTIONS[scheme])
            if limit:
                theta = stored(t, lambda w, total, flux, axis=axis: self._share(w, total, flux, axis, t, dt), before, total, flux)
                flux = stored(t, lambda theta, w, flux, axis=axis: self._limited(theta, w, flux, axis, t), theta, before, flux)
                count = count + jnp.sum(part(theta, 1, self.grid.shape[axis] + 1, axis) < 1).astype(dtype)
            passing = passing + self._passing(flux, axis, dt)
            new = stored(t, lambda q, flux, axis=axis: self._updated(q, flux, axis, dt), new, flux)
        if "source" in extra:
            new = [q + dt * s for q, s in zip(new, extra["source"], strict=True)]
        return new, passing, jnp.stack([count, beyond.astype(dtype)])

    def euler(self, z, t, dt, tendency, at=None, rough=False):
        base, time = z["u"], jnp.asarray(t, z["u"][0].dtype)
        from_ = z if at is None else at
        extra = tendency(from_, t) or {}
        scheme = "constant" if rough else self.reconstruction
        new, passing, _ = self._swept(base, from_["u"], extra, time, dt, scheme)
        nothing = jnp.zeros((len(EVENTS),), base[0].dtype)

        def again() -> tuple[tuple[Array, ...], Array, Array]:
            if not self.positivity:
                return tuple(new), passing, nothing.at[:3].set(self._floors(new))
            safe, through, limited = self._swept(base, from_["u"], extra, time, dt, scheme, limit=True)
            return tuple(safe), through, jnp.concatenate([self._floors(safe), limited])

        share = jnp.asarray(SUSPICIOUS_SHARE if self.positivity else 0, base[0].dtype)
        p_old, p_new = self._pressure(base), self._pressure(new)
        worst = jnp.minimum(jnp.min(new[0] - share * base[0]), jnp.min(p_new - share * p_old))
        new, passing, events = jax.lax.cond(worst > 0, lambda: (tuple(new), passing, nothing), jax.checkpoint(again))
        injected = z["injected"] + jnp.concatenate([passing, jnp.zeros((1,), passing.dtype)])
        return {**from_, "u": new, "injected": injected, "events": from_["events"] + events}

    def enter(self, z, t, dt):
        forcing = self.equation.forcing
        if forcing is not None:
            z = self._kicked({**z, "memory": forcing.advance(z["memory"], t, dt)}, 0.5 * dt)
        return z if self.equation.cooling is None else self._cooled(z, 0.5 * dt)

    def leave(self, z, t, dt):
        z = z if self.equation.cooling is None else self._cooled(z, 0.5 * dt)
        return z if self.equation.forcing is None else self._kicked(z, 0.5 * dt)

    def _kicked(self, z: PyTree, dt: Real) -> PyTree:
        """ρv ← ρv + Δt ρa and E ← E + the work done, which leaves the internal energy as it is."""
        d, u, forcing = self.grid.ndim, list(z["u"]), self.equation.forcing
        assert forcing is not None
        gained = [jnp.zeros((), u[0].dtype)] * len(u)
        work = jnp.zeros_like(u[0])
        for axis, a in enumerate(forcing.acceleration(z["memory"], self.grid, u[0].dtype), start=1):
            push = dt * u[0] * a
            work = work + dt * a * (u[axis] + 0.5 * push)
            u[axis], gained[axis] = u[axis] + push, _mean(push)
        u[d + 1], gained[d + 1] = u[d + 1] + work, _mean(work)
        return {**z, "u": tuple(u), "injected": z["injected"].at[:-1].add(jnp.stack(gained))}

    def _cooled(self, z: PyTree, dt: Real) -> PyTree:
        """E ← E − ρ (T − T')/(γ − 1), T' after Δt of cooling at constant density."""
        d, u, cooling = self.grid.ndim, list(z["u"]), self.equation.cooling
        assert cooling is not None
        w = self._primitive(u)
        gamma = jnp.asarray(self.equation.gamma, u[0].dtype)
        temperature = w[d + 1] / w[0]
        cooled = cooling.cool(temperature, w[0], dt, gamma)
        energy = u[d + 1] - w[0] * (temperature - cooled) / (gamma - 1)
        lost = _mean(u[d + 1] - energy)
        u[d + 1] = energy
        return {**z, "u": tuple(u), "injected": z["injected"].at[d + 1].add(-lost).at[-1].add(lost)}

    def stable_dt(self, u):
        """1 / max Σ_a ((|v_a| + a)/Δx_a + 2 D/Δx_a²): waves and explicit diffusion at Courant number 1.

        a is the sound speed, D the largest of 4μ/(3ρ), γμ/(ρ Pr) and the scalars' κ. The positivity limiter's bound is Courant
        number ½ of the waves alone.
        """
        d, dtype = self.grid.ndim, u.dtype
        w = self._primitive(tuple(u))
        gamma = jnp.asarray(self.equation.gamma, dtype)
        sound = jnp.sqrt(gamma * w[d + 1] / w[0])
        rate = jnp.zeros_like(sound)
        for axis, h in enumerate(self.grid.spacing):
            rate = rate + (jnp.abs(w[1 + axis]) + sound) / h
        if not self.equation.ideal:
            kinematic = self.equation.dynamic_viscosity(w[d + 1] / w[0]) / w[0]
            diffusivity = kinematic * jnp.maximum(4 / 3, gamma / jnp.asarray(self.equation.prandtl, dtype))
            for kappa in self.equation.scalars.values():
                if not is_zero(kappa):
                    diffusivity = jnp.maximum(diffusivity, jnp.asarray(kappa, dtype))
            rate = rate + 2 * diffusivity * sum(1 / h**2 for h in self.grid.spacing)
        return 1 / jnp.maximum(jnp.max(rate), jnp.finfo(dtype).tiny)
