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
from hybridsim.solvers.compressible import AXES, SIDES, Channels, CompressibleNavierStokes, channels_of, is_zero
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
    - `reconstruct`: `primitive` (default) or `characteristic` variables, those of the conserved state: they ring less behind strong
      shocks, keep a high order in waves that are not weak, and cost more.
    - `positivity`: whether the total flux is limited so that density and pressure stay positive (default), as below.
    - `density_floor`, `pressure_floor`: bounds of ρ and p inside the primitive conversion.

    Order 2 in space with `plm_*`. In one dimension `ppm` and `weno5z` have order 3 and 5 with characteristic variables; with
    primitive ones, whose means are taken from the means of the conserved ones, that holds while the gas is only advected or waves
    are weak. In two and three dimensions they are of order 2 with smaller errors, since each face has one flux point. Viscous terms
    are of order 2. Mass, momentum, energy and scalars are conserved to rounding for any Flux closure; what enters through sides
    that are not periodic is in the ledger.

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
        events = jnp.zeros((len(EVENTS),), u.dtype).at[:3].set(self._floors(u))
        z = {"u": u, "injected": jnp.zeros((u.shape[0] + 1,), u.dtype), "events": events}
        if self.equation.forcing is not None:
            z["memory"] = self.equation.forcing.init_memory(self.grid)
        return z

    def decode(self, z: PyTree) -> Float[Array, "c *grid"]:
        return z["u"]

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
        return {name: part for name, part in (("flux", flux), ("source", source)) if part is not None}

    def receive_weights(self, weights: Float[Array, "d side c free *grid"]) -> PyTree:
        """What `euler` will use for the output of an Interpolation closure."""
        return {"weights": weights}

    # -- primitive variables ----------------------------------------------------------------------------------------------------

    def _primitive(self, u: Float[Array, "c *grid"]) -> Float[Array, "c *grid"]:
        """W, with ρ and p no lower than their floors."""
        d, (rho, *others) = self.grid.ndim, channels_of(u)
        w = self.equation.primitive_channels([jnp.maximum(rho, jnp.asarray(self.density_floor, u.dtype)), *others], d)
        w[d + 1] = jnp.maximum(w[d + 1], jnp.asarray(self.pressure_floor, u.dtype))
        return jnp.stack(w)

    def _pressure(self, u: Float[Array, "c *grid"]) -> Float[Array, "*grid"]:
        """p without a floor."""
        rho, *others = channels_of(u)
        w = self.equation.primitive_channels([jnp.maximum(rho, jnp.asarray(self.density_floor, u.dtype)), *others], self.grid.ndim)
        return w[self.grid.ndim + 1]

    def _floors(self, u: Float[Array, "c *grid"]) -> Float[Array, "3"]:
        """(cells below a floor, and the box means of the mass and the energy that the floors stand for)."""
        u = jax.lax.stop_gradient(u)
        low, high = jnp.asarray(self.density_floor, u.dtype), jnp.asarray(self.pressure_floor, u.dtype)
        p = self._pressure(u)
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
        if self.grid.periodic[axis]:
            return part(u, n - halo, n, axis + 1), u, part(u, 0, halo, axis + 1)
        return self._beyond(u, axis, 0, halo, t), u, self._beyond(u, axis, 1, halo, t)

    def _extended(self, u: Float[Array, "c *grid"], axis: int, halo: int, t: Real) -> Float[Array, "c *more"]:
        """The primitive variables of u with `halo` more layers on both sides of `axis`.

        Made from u for each axis again: a bare concatenation runs on one thread and would cost a pass of its own.
        """
        return stored(t, lambda three: self._primitive(jnp.concatenate(three, axis + 1)), self._around(u, axis, halo, t))

    def _extended_everywhere(self, u: Float[Array, "c *grid"], t: Real) -> Float[Array, "c *more"]:
        """The primitive variables of u with one more layer on all sides, corners included."""
        d, out = self.grid.ndim, u
        for axis, n in enumerate(self.grid.shape):
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
        return self._primitive(out)

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
                weights = self._on_all_faces(extra["weights"][axis], axis, 3)
            left, right = self._face_states(u, axis, scheme, t, weights)

            def summed(left: Array, right: Array, u: Array, given: list[Array]) -> Array:
                flux = RIEMANN_SOLVERS[self.riemann](self.equation, channels_of(left), channels_of(right), axis, d)
                if not self.equation.ideal:
                    flux = [f + g for f, g in zip(flux, self._viscous(u, axis, t), strict=True)]
                total = jnp.stack(flux)
                return total + self._on_all_faces(given[0], axis, 1) if given else total

            return stored(t, summed, left, right, u, [extra["flux"][axis]] if "flux" in extra else [])

    def _on_all_faces(self, q: Array, axis: int, lead: int) -> Array:
        """What a closure gives at the right faces, at all n + 1 faces: nothing passes sides that are not periodic."""
        n, along = self.grid.shape[axis], axis + lead
        if self.grid.periodic[axis]:
            return jnp.concatenate([part(q, n - 1, n, along), q], along)
        zero = jnp.zeros_like(part(q, 0, 1, along))
        return jnp.concatenate([zero, part(q, 0, n - 1, along), zero], along)

    def _passing(self, flux: Float[Array, "c *faces"], axis: int, dt: Real) -> Float[Array, " c"]:
        """What the sides of `axis` add to the box means, if it is not periodic."""
        if self.grid.periodic[axis]:
            return jnp.zeros((flux.shape[0],), flux.dtype)
        n, over = self.grid.shape[axis], tuple(range(1, flux.ndim))
        net = part(flux, 0, 1, axis + 1).mean(over) - part(flux, n, n + 1, axis + 1).mean(over)
        return (dt / self.grid.lengths[axis]) * net

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

    def _cell_speeds(self, u: Float[Array, "c *grid"], t: Real) -> Float[Array, "*grid"]:
        """Σ_a α_a/Δx_a of each cell."""
        total = self._cell_speed(u, 0, t)
        for axis in range(1, self.grid.ndim):
            total = total + self._cell_speed(u, axis, t)
        return total

    def limiter_dt(self, u: Float[Array, "c *grid"], t: Real | float = 0.0) -> Real:
        """½ / max Σ_a α_a/Δx_a: the largest Δt for which the limiter keeps ρ and p positive."""
        return 0.5 / jnp.max(self._cell_speeds(u, jnp.asarray(t, u.dtype)))

    def _share(self, u: Float[Array, "c *grid"], total: Array, high: Array, axis: int, t: Real, dt: Real) -> Float[Array, "*faces"]:
        """θ at the n + 1 faces along `axis`, for the cells of `u` with `total` = Σ α/Δx."""
        d, n = self.grid.ndim, self.grid.shape[axis]
        left, right, _ = self._neighbours(u, axis, t)
        low = jnp.stack(llf(self.equation, left, right, axis, d))
        # Each cell is a mean of states, one per face, with weights in proportion to the speeds along the axes.
        factor = 2 * dt * total / (self._cell_speed(u, axis, t) * self.grid.spacing[axis])
        first, last = part(factor, 0, 1, axis), part(factor, n - 1, n, axis)
        scale = jnp.concatenate([last, factor, first] if self.grid.periodic[axis] else [first, factor, last], axis)
        theta = jnp.ones_like(low[0])
        for side, (sign, inner) in enumerate(((-1.0, left), (1.0, right))):
            cells = jnp.stack(self.equation.conserved_channels(inner, d))
            step = sign * part(scale, side, side + n + 1, axis)[None]
            found = self._largest_share(cells + step * low, cells + step * high)
            if not self.grid.periodic[axis]:
                # Ghost cells need not stay positive.
                at = jax.lax.broadcasted_iota(jnp.int32, found.shape, axis)
                found = jnp.where(at == side * n, 1, found)
            theta = jnp.minimum(theta, found)
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
        p_safe, p = self._pressure(safe), self._pressure(safe + theta[None] * (full - safe))
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

    # -- steps ------------------------------------------------------------------------------------------------------------------

    def linear(self) -> PyTree | None:
        return None

    def explicit(self, z, t, tendency):
        """dz/dt without the positivity limiter; `euler` is what steppers use."""
        u = z["u"]
        extra = tendency(z, t) or {}
        one = jnp.ones((), u.dtype)
        rate, passing, _ = self._swept(jnp.zeros_like(u), u, extra, jnp.asarray(t, u.dtype), one, self.reconstruction)
        injected = jnp.concatenate([passing, jnp.zeros((1,), u.dtype)])
        return {"u": rate, "injected": injected, "events": jnp.zeros_like(z["events"])}

    def _swept(
        self, base: Array, u: Array, extra: PyTree, t: Real, dt: Real, scheme: str, limit: bool = False
    ) -> tuple[Float[Array, "c *grid"], Float[Array, " c"], Float[Array, "2"]]:
        """(`base` + Δt dŪ/dt(u), what came through the sides, what the limiter did), one axis after another."""
        new = base
        passing, count = jnp.zeros((u.shape[0],), u.dtype), jnp.zeros((), u.dtype)
        beyond = jnp.zeros((), bool)
        if limit:
            # The mean that must stay positive is that of `base`.
            total = stored(t, lambda base: self._cell_speeds(base, t), base)
            slack = 1 + 16 * float(jnp.finfo(u.dtype).eps)
            beyond = dt * jnp.max(total) > jnp.asarray(0.5 * slack, u.dtype)
        for axis, (n, h) in enumerate(zip(self.grid.shape, self.grid.spacing, strict=True)):
            flux = self._total_flux(u, extra, axis, t, RECONSTRUCTIONS[scheme])
            if limit:
                theta = stored(
                    t, lambda base, total, flux, axis=axis: self._share(base, total, flux, axis, t, dt), base, total, flux
                )
                flux = stored(t, lambda theta, base, flux, axis=axis: self._limited(theta, base, flux, axis, t), theta, base, flux)
                count = count + jnp.sum(part(theta, 1, n + 1, axis) < 1).astype(u.dtype)
            passing = passing + self._passing(flux, axis, dt)

            def updated(q: Array, flux: Array, axis: int = axis, n: int = n, h: float = h) -> Array:
                return q - (dt / h) * (part(flux, 1, n + 1, axis + 1) - part(flux, 0, n, axis + 1))

            new = stored(t, updated, new, flux)
        if "source" in extra:
            new = new + dt * extra["source"]
        return new, passing, jnp.stack([count, beyond.astype(u.dtype)])

    def euler(self, z, t, dt, tendency, at=None, rough=False):
        base = z["u"]
        time = jnp.asarray(t, base.dtype)
        from_ = z if at is None else at
        extra = tendency(from_, t) or {}
        scheme = "constant" if rough else self.reconstruction
        new, passing, _ = self._swept(base, from_["u"], extra, time, dt, scheme)
        nothing = jnp.zeros((len(EVENTS),), base.dtype)

        def again(base: Array, u: Array, extra: PyTree) -> tuple[Array, Array, Array]:
            safe, through, limited = self._swept(base, base if at is None else u, extra, time, dt, scheme, limit=True)
            return safe, through, jnp.concatenate([self._floors(safe), limited])

        def counted(new: Array, passing: Array) -> tuple[Array, Array, Array]:
            return new, passing, nothing.at[:3].set(self._floors(new))

        share = jnp.asarray(SUSPICIOUS_SHARE if self.positivity else 0, base.dtype)

        def margin(old: Array, new: Array) -> Array:
            pairs = ((old[0], new[0], self.density_floor), (self._pressure(old), self._pressure(new), self.pressure_floor))
            left = [q - jnp.maximum(share * p, jnp.asarray(floor, base.dtype)) for p, q, floor in pairs]
            return jnp.minimum(left[0], left[1])

        worst = jnp.min(stored(time, margin, jax.lax.stop_gradient(base), jax.lax.stop_gradient(new)))
        plain = lambda: (new, passing, nothing)  # noqa: E731
        if self.positivity:
            done = jax.lax.cond(worst > 0, plain, lambda: jax.checkpoint(again)(base, from_["u"], extra))
        else:
            done = jax.lax.cond(worst > 0, plain, lambda: counted(new, passing))
        injected = z["injected"] + jnp.concatenate([done[1], jnp.zeros((1,), base.dtype)])
        return {**from_, "u": done[0], "injected": injected, "events": from_["events"] + done[2]}

    def enter(self, z, t, dt):
        forcing = self.equation.forcing
        if forcing is not None:
            # Half of the work with the force before the step, half with that after it.
            z = self._kicked(z, 0.5 * dt)
            z = {**z, "memory": forcing.advance(z["memory"], t, dt)}
        return z if self.equation.cooling is None else self._cooled(z, 0.5 * dt)

    def leave(self, z, t, dt):
        z = z if self.equation.cooling is None else self._cooled(z, 0.5 * dt)
        return z if self.equation.forcing is None else self._kicked(z, 0.5 * dt)

    def _kicked(self, z: PyTree, dt: Real) -> PyTree:
        """ρv ← ρv + Δt ρa and E ← E + the work done, which leaves the internal energy as it is."""
        d, u, forcing = self.grid.ndim, z["u"], self.equation.forcing
        assert forcing is not None
        a = forcing.acceleration(z["memory"], self.grid, u.dtype)
        push = dt * u[0][None] * a
        work = jnp.sum(dt * a * (u[1 : d + 1] + 0.5 * push), axis=0)
        gained = jnp.concatenate([jnp.zeros_like(u[:1]), push, work[None], jnp.zeros_like(u[d + 2 :])])
        means = gained.mean(axis=tuple(range(1, u.ndim)))
        return {**z, "u": u + gained, "injected": z["injected"].at[:-1].add(means)}

    def _cooled(self, z: PyTree, dt: Real) -> PyTree:
        """E ← E − ρ (T − T')/(γ − 1), T' after Δt of cooling at constant density."""
        d, u, cooling = self.grid.ndim, z["u"], self.equation.cooling
        assert cooling is not None
        w = self._primitive(u)
        gamma = jnp.asarray(self.equation.gamma, u.dtype)
        energy = u[d + 1] - w[0] * cooling.drop(w[d + 1] / w[0], w[0], dt, gamma) / (gamma - 1)
        # What has left the state, rounding included.
        lost = jnp.mean(u[d + 1] - energy)
        cooled = jnp.concatenate([u[: d + 1], energy[None], u[d + 2 :]])
        return {**z, "u": cooled, "injected": z["injected"].at[d + 1].add(-lost).at[-1].add(lost)}

    def stable_dt(self, u):
        """1 / max Σ_a ((|v_a| + a)/Δx_a + 2 D/Δx_a²): waves and explicit diffusion at Courant number 1.

        a is the sound speed, D the largest of 4μ/(3ρ), γμ/(ρ Pr) and the scalars' κ. The positivity limiter's bound is Courant
        number ½ of the waves alone.
        """
        d = self.grid.ndim
        w = self._primitive(u)
        gamma = jnp.asarray(self.equation.gamma, u.dtype)
        sound = jnp.sqrt(gamma * w[d + 1] / w[0])
        rate = jnp.zeros_like(sound)
        for axis, h in enumerate(self.grid.spacing):
            rate = rate + (jnp.abs(w[1 + axis]) + sound) / h
        if not self.equation.ideal:
            kinematic = self.equation.dynamic_viscosity(w[d + 1] / w[0]) / w[0]
            diffusivity = kinematic * jnp.maximum(4 / 3, gamma / jnp.asarray(self.equation.prandtl, u.dtype))
            for kappa in self.equation.scalars.values():
                if not is_zero(kappa):
                    diffusivity = jnp.maximum(diffusivity, jnp.asarray(kappa, u.dtype))
            rate = rate + 2 * diffusivity * sum(1 / h**2 for h in self.grid.spacing)
        return 1 / jnp.maximum(jnp.max(rate), jnp.finfo(u.dtype).tiny)
