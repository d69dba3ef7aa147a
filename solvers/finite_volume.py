"""∂t ū_c = −Σ_a [F_{a,c}]/Δx_a − [p]/Δx_c + f: finite volumes on the staggered (MAC) grid.

The arrangement is that of Harlow & Welch 1965, doi:10.1063/1.1761178.

Velocity component a lives at the right face of axis a, a scalar at the cell centre. The flux of channel c along axis a lives at the
flux point `at_c + ½ e_a` folded into (0, 1]: the cell centre if a = c, a face for a scalar, otherwise the edge between two faces.
"""

import functools
import math
from typing import Any, ClassVar, Literal

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PyTree

from hybridsim.contract import AbstractSolver, Flux, Interpolation, PostStep, Replacement, Source, Variable
from hybridsim.grid import Grid, Place, cell_mean, face_mean, resample
from hybridsim.solvers import staggering
from hybridsim.solvers.incompressible import (
    AXES,
    SIDES,
    AbstractBandForce,
    AbstractGrowth,
    AbstractStandingForce,
    NavierStokes,
)
from hybridsim.solvers.poisson import Poisson
from hybridsim.solvers.reconstruction import null_space, van_leer
from hybridsim.solvers.staggering import cut, part
from hybridsim.solvers.walls import HALO, boundary_velocity, check_walls, fixed_velocities, padded, side_name, value_on_side

Convection = Literal["van_leer", "central"]

COMBINATIONS = tuple(tuple(float(z) for z in row) for row in null_space("plm_mc"))
"""Z: what is free in a value between the middle ones of four cells once linear profiles are met."""

SERIAL_CELLS = 2**14
"""On a CPU sharing kernels out among threads costs more than it gains up to so many cells (measured: 128², not 256² or 32³)."""


def shift(u: Float[Array, "*grid"], offset: int, axis: int) -> Float[Array, "*grid"]:
    """u_{i + offset} along `axis`, periodic."""
    return jnp.roll(u, -offset, axis)


def _is_zero(value: float | Array) -> bool:
    """Whether a coefficient is known to vanish before anything is traced."""
    return isinstance(value, float) and value == 0


class StaggeredFiniteVolume(AbstractSolver):
    """∂t u_c = −Σ_a δ_a (ū_a û_c − ν δ_a u_c) − δ_c p + f_c,  Σ_a δ_a u_a = 0,  ∂t c = −Σ_a δ_a (u_a ĉ − κ δ_a c).

    Finite-volume Navier–Stokes with passive scalars on the staggered grid, second order in space, in two and three dimensions;
    direct projection by the eigenvectors of the discrete Laplacian.

    **Arguments:**

    - `grid`: a `Grid`; each of its axes is periodic, or has two sides of these kinds:
        - `no_slip`: u = U_wall, which slides along itself as `equation.boundary_velocity` says (at rest if that says nothing);
        - `free_slip`: no flow through the side, no shear stress on it;
        - `fixed`: the velocity that `equation.boundary_velocity` gives, an inflow for example. Without an outflow side, what flows
          in through all fixed sides flows out through them: more than 1 % amiss is refused, less is spread over them;
        - `outflow`, upper sides only: no normal gradient of u, p = 0 on the side.
    - `equation`: `NavierStokes(viscosity, forcing, scalars, boundary_velocity)`.
    - `convection`: `van_leer` (upwind with the harmonic limiter; default) or `central` (conserves kinetic energy exactly in
      space without viscosity).

    An Interpolation closure changes û at the flux points, û ← û + Σ_f a_f Z_f · (u_{−3/2}, …, u_{3/2}): two combinations of the
    four neighbours along the axis that vanish for linear profiles, the second and the third difference, so that the order stays
    (Kochkov et al. 2021, doi:10.1073/pnas.2101784118). a of side 0 counts where the flow goes upwards, of side 1 where it goes
    downwards. On walls and open sides û stays as it is.

    The last face of the velocity normal to a wall or `fixed` side lies on that side: it holds the side's own velocity, whatever
    forces and closures say there. At `outflow` it moves with the flow. Scalars have no gradient normal to any side, so that nothing
    passes a wall, and what enters through a `fixed` side carries the value of the first cell: a uniform scalar stays uniform.

    Order 2 (1 at extrema with the limiter); parabolic profiles between walls are exact. Momentum (periodic boxes), sums of
    scalars (no fluid through any side) and, by projection, ∇·u = 0 hold to rounding with any Flux closure: its fluxes through
    walls and open sides count as zero. Central convection rings where the cell Reynolds number is large. Backflow through
    `outflow` brings in what is just inside; with central convection, vortices as strong as the stream may linger there: put the
    side further downstream.
    """

    grid: Grid
    equation: NavierStokes
    convection: Convection = eqx.field(static=True, default="van_leer")
    arrays: dict[str, Any] | None = None

    places: ClassVar = (Flux, Source, Interpolation, PostStep, Replacement)

    def __check_init__(self):
        if self.grid.ndim < 2:
            raise ValueError(f"grid: incompressible flow needs two or three axes, found shape {self.grid.shape}")
        if min(self.grid.shape) < 4:
            raise ValueError(f"grid: a finite-volume solver needs at least 4 cells per axis, found {self.grid.shape}")
        self.equation.check_grid(self.grid)
        check_walls(self.equation, self.grid, self._places)

    @property
    def variables(self) -> tuple[Variable, ...]:
        return self.equation.variables(self._places, self.grid.centre)

    @property
    def _places(self) -> tuple[Place, ...]:
        """Of the velocity components."""
        return tuple(tuple(1.0 if b == a else 0.5 for b in range(self.grid.ndim)) for a in range(self.grid.ndim))

    def _place(self, channel: int) -> Place:
        return self._places[channel] if channel < self.grid.ndim else self.grid.centre

    # -- arrays that no step changes --------------------------------------------------------------------------------------------

    def prepare(self, dtype) -> "StaggeredFiniteVolume":
        arrays: dict[str, Any] = {"poisson": Poisson(self.grid, dtype)}
        arrays["normal"] = fixed_velocities(self.equation, self.grid, self._places, dtype)
        if isinstance(self.equation.forcing, AbstractStandingForce):
            arrays["force"] = self.equation.forcing.acceleration(self.grid, self._places, dtype)
        return eqx.tree_at(lambda s: s.arrays, self, arrays, is_leaf=lambda a: a is None)

    def _arrays(self, dtype) -> dict[str, Any]:
        arrays = self.arrays if self.arrays is not None else self.prepare(dtype).arrays
        assert arrays is not None
        return arrays

    # -- sides ------------------------------------------------------------------------------------------------------------------

    def _normal(self, dtype) -> dict[str, Array]:
        if self.arrays is None:
            return fixed_velocities(self.equation, self.grid, self._places, dtype)
        return self.arrays["normal"]

    def _side(self, q: Array, axis: int, side: int) -> Array:
        """The normal velocity on a side of `axis` that is no outflow; one entry along `axis`."""
        given = self._normal(q.dtype).get(side_name(axis, side))
        return jnp.zeros_like(part(q, 0, 1, axis)) if given is None else given

    def _on_upper_side(self, axis: int) -> Array:
        """Which entries lie on the upper side, if they live on faces of `axis`."""
        return jax.lax.broadcasted_iota(jnp.int32, self.grid.shape, axis) == self.grid.shape[axis] - 1

    def _with_sides(self, q: Array, axis: int) -> Array:
        """Velocity component `axis` with the value that its upper side prescribes."""
        if self.grid.boundaries[axis][1] in ("periodic", "outflow"):
            return q
        return jnp.where(self._on_upper_side(axis), jnp.broadcast_to(self._side(q, axis, 1), q.shape), q)

    def _still_on_sides(self, rate: Float[Array, "c *grid"], outflow: bool) -> Float[Array, "c *grid"]:
        """Zero rates of normal velocities on upper sides; at `outflow` only if told so."""
        fixed = [a for a, s in enumerate(self.grid.boundaries) if s[1] != "periodic" and (outflow or s[1] != "outflow")]
        if not fixed:
            return rate
        return jnp.stack([jnp.where(self._on_upper_side(c), 0, q) if c in fixed else q for c, q in enumerate(rate)])

    def _below(self, q: Array, axis: int) -> Array:
        """u_{i−1} of velocity component `axis`, the lower side included."""
        if self.grid.periodic[axis]:
            return shift(q, -1, axis)
        return jnp.concatenate([self._side(q, axis, 0), part(q, 0, q.shape[axis] - 1, axis)], axis)

    # -- representation ---------------------------------------------------------------------------------------------------------

    def encode(self, u: Float[Array, "c *grid"]) -> PyTree:
        return {"u": self.project(u), "injected": jnp.zeros((u.shape[0],), u.dtype)}

    def decode(self, z: PyTree) -> Float[Array, "c *grid"]:
        return z["u"]

    def constrain(self, z: PyTree) -> PyTree:
        return {**z, "u": self.project(z["u"])}

    def divergence(self, u: Float[Array, "c *grid"]) -> Float[Array, "*grid"]:
        """Σ_a (u_{a,i} − u_{a,i−1}) / Δx_a at the cell centres."""
        return self._divergence(list(u))

    def _divergence(self, channels: list[Array]) -> Array:
        total = jnp.zeros_like(channels[0])
        for a, (q, h) in enumerate(zip(channels, self.grid.spacing, strict=False)):
            total = total + (q - self._below(q, a)) / h
        return total

    def project(self, u: Float[Array, "c *grid"]) -> Float[Array, "c *grid"]:
        """u − δφ with δ·δφ = δ·u: the orthogonal projection onto discretely divergence-free fields with the sides' own normal
        velocities (a face at outflow, with half a cell to its name, counts half)."""
        d = self.grid.ndim
        velocity = [self._with_sides(q, a) for a, q in enumerate(u[:d])]
        phi = self._arrays(u.dtype)["poisson"](self._divergence(velocity))
        return jnp.stack([*(q - self._pressure_gradient(phi, a) for a, q in enumerate(velocity)), *u[d:]])

    def _pressure_gradient(self, phi: Array, axis: int) -> Array:
        """δ_axis φ at the faces: zero on walls; at outflow φ = 0 halfway to the next centre."""
        if self.grid.periodic[axis]:
            above = shift(phi, 1, axis)
        else:
            n = phi.shape[axis]
            last = part(phi, n - 1, n, axis)
            above = jnp.concatenate([part(phi, 1, n, axis), -last if self.grid.boundaries[axis][1] == "outflow" else last], axis)
        return (above - phi) / self.grid.spacing[axis]

    def restrict(self, u: Float[Array, "c *fine"], grid: Grid, variables: tuple[Variable, ...]) -> Float[Array, "c *grid"]:
        """Exact means over the coarse faces (scalars: cells): sums of fine fluxes, so that δ·u stays zero.

        From a staggered grid that this one divides these are block means; from other periodic states they are the means of the
        trigonometric interpolant (phase shift to the face, times sinc(k Δx/2) along it).
        """
        if not np.allclose(grid.lengths, self.grid.lengths, rtol=1e-12):
            raise ValueError(f"the fine and the coarse grid must span the same box, found {grid.lengths} and {self.grid.lengths}")
        if grid.boundaries != self.grid.boundaries:
            raise ValueError(
                f"the fine and the coarse grid must have the same boundaries, found {grid.boundaries} and {self.grid.boundaries}"
            )
        dims = self.grid.ndim
        nested = all(n % m == 0 for n, m in zip(grid.shape, self.grid.shape, strict=True))
        staggered = all(v.at == at for v, at in zip(variables, self._places, strict=False))
        if nested and staggered:
            factors = tuple(n // m for n, m in zip(grid.shape, self.grid.shape, strict=True))
            return jnp.stack([face_mean(q, factors, c) if c < dims else cell_mean(q, factors) for c, q in enumerate(u)])
        if not all(self.grid.periodic):
            raise ValueError(
                f"between walls a state on {grid.shape} cells can only be restricted to a staggered grid whose shape divides it, "
                f"found {self.grid.shape}"
            )
        out = []
        for c, (q, fine) in enumerate(zip(u, variables, strict=True)):
            across = tuple(b != c for b in range(dims))
            out.append(resample(q, self.grid.shape, fine.at, self._place(c), average=across, alias=True))
        return jnp.stack(out)

    @property
    def serial_kernels(self) -> bool:
        return math.prod(self.grid.shape) <= SERIAL_CELLS

    @property
    def conserved(self) -> tuple[str, ...]:
        """Scalars, where no fluid passes a side; velocities along periodic axes, where nothing but `free_slip` stands elsewhere."""
        kinds = {kind for sides in self.grid.boundaries for kind in sides}
        names = []
        for c, variable in enumerate(self.variables):
            along = c >= self.grid.ndim or self.grid.periodic[c]
            allowed = {"periodic", "free_slip"} if c < self.grid.ndim else {"periodic", "free_slip", "no_slip"}
            if along and kinds <= allowed:
                names.append(variable.name)
        return tuple(names)

    def centred(self, u: Float[Array, "c *grid"]) -> Float[Array, "c *grid"]:
        out = []
        for c, q in enumerate(u):
            if c < self.grid.ndim:
                q = self._with_sides(q, c)
                q = 0.5 * (q + self._below(q, c))
            out.append(q)
        return jnp.stack(out)

    # -- what closures see ------------------------------------------------------------------------------------------------------

    def flux_place(self, axis: int, channel: int):
        return self.grid.flux_place(self._place(channel), axis)

    def move(self, array, from_, to):
        return staggering.move(self.grid, array, from_, to)

    def derivative(self, array, at, axis):
        return staggering.derivative(self.grid, array, at, axis)

    def _difference(self, q: Array, axis: int, channel: int) -> Array:
        """∂_axis of a channel of the state, at its flux point."""
        if axis == channel:
            q = self._with_sides(q, axis)
            return (q - self._below(q, axis)) / self.grid.spacing[axis]
        return self.derivative(q, self._place(channel), axis)[0]

    def gradient(self, u: Float[Array, "c *grid"]) -> Float[Array, "d c *grid"]:
        dims = range(self.grid.ndim)
        return jnp.stack([jnp.stack([self._difference(q, a, c) for c, q in enumerate(u)]) for a in dims])

    def adjoint_gradient(self, u: Float[Array, "c *grid"]) -> Float[Array, "d c *grid"]:
        """The gradient; zero on walls and open sides, and of the flow less the potential flow through `fixed` sides.

        A projection is orthogonal (a face at outflow counts half, but no flux pushes it), so that R F needs none.
        """
        if all(self.grid.periodic):
            return self.gradient(u)
        if any("fixed" in sides for sides in self.grid.boundaries):
            # No flux changes what the sides prescribe, nor does work on it.
            u = u - self.project(jnp.zeros_like(u))
        flux = jax.ShapeDtypeStruct((self.grid.ndim, *u.shape), u.dtype)
        return jax.linear_transpose(lambda f: -self.flux_divergence(f), flux)(u)[0]

    @property
    def flux_response(self) -> float:
        """Σ_a 4/Δx_a²: the largest eigenvalue of −δ·δ, sides only lower it."""
        return sum(4 / h**2 for h in self.grid.spacing)

    def flux_divergence(self, flux: Float[Array, "d c *grid"]) -> Float[Array, "c *grid"]:
        """Σ_a δ_a F[a, c] where channel c lives, for fluxes that vanish on walls and open sides."""
        out = []
        for c in range(flux.shape[1]):
            terms = []
            for a, h in enumerate(self.grid.spacing):
                f = flux[a][c]
                if a == c:
                    below, above = staggering.cells_around(self.grid, f, a)
                elif self.grid.periodic[a]:
                    below, above = shift(f, -1, a), f
                else:
                    inner, zero = part(f, 0, f.shape[a] - 1, a), jnp.zeros_like(part(f, 0, 1, a))
                    below, above = jnp.concatenate([zero, inner], a), jnp.concatenate([inner, zero], a)
                terms.append((above - below) / h)
            out.append(sum(terms[1:], terms[0]))
        return self._still_on_sides(jnp.stack(out), outflow=True)

    # -- right-hand side --------------------------------------------------------------------------------------------------------

    def linear(self) -> PyTree | None:
        return None

    def _face_value(self, window, carrier: Array, left: Array, right: Array, jump: Array) -> Array:
        """û between two neighbours: their mean, or the upwind one with a limited slope."""
        if self.convection == "central":
            return 0.5 * (left + right)
        upwards = carrier > 0
        beyond = jnp.where(upwards, left - window(-2), window(1) - right)
        half = 0.5 * van_leer(jump, beyond)
        return jnp.where(upwards, left + half, right - half)

    def free_weights(self) -> int:
        return len(COMBINATIONS)

    def receive_weights(self, weights: Float[Array, "d side c free *grid"]) -> PyTree:
        return {"weights": weights}

    def _free_value(self, window, carrier: Array, weights: Float[Array, "side free *grid"], axis: int, along: bool) -> Array:
        """Σ_f a_f Z_f · cells for fluxes 0 … n, with a of the side that the flow comes from; `along`: of velocity `axis` itself."""
        upwards, cells = carrier > 0, [window(offset) for offset in range(-2, 2)]
        terms = []
        for f, row in enumerate(COMBINATIONS):
            below, above = (self._at_fluxes(weights[side, f], axis, along) for side in (0, 1))
            combined = [factor * q for factor, q in zip(row, cells, strict=True)]
            terms.append(jnp.where(upwards, below, above) * sum(combined[1:], combined[0]))
        return sum(terms[1:], terms[0])

    def _at_fluxes(self, a: Float[Array, "*grid"], axis: int, along: bool) -> Array:
        """What is stored at the flux points of a channel, at the n + 1 fluxes along `axis`; zero on sides and beyond."""
        n = self.grid.shape[axis]
        first, last = part(a, 0, 1, axis), part(a, n - 1, n, axis)
        if self.grid.periodic[axis]:
            return jnp.concatenate([a, first] if along else [last, a], axis)
        zero = jnp.zeros_like(first)
        return jnp.concatenate([a, zero] if along else [zero, part(a, 0, n - 1, axis), zero], axis)

    def _flux_divergence_of(
        self, u: Float[Array, "c *grid"], t: Array, weights: Float[Array, "d side c free *grid"] | None = None
    ) -> Float[Array, "c *grid"]:
        """Σ_a δ_a (ū_a û_c − ν δ_a u_c), from one padded copy of u so that every shift is a slice that XLA fuses.

        Along each axis n + 1 fluxes are computed; in periodic boxes the first and the last come from the same numbers, and sums
        cancel exactly. On `fixed` sides the value carried is the side's own.
        """
        d = self.grid.ndim
        around = tuple(padded(u, self.equation, self.grid, self._places, self._normal(u.dtype), t))

        @functools.cache
        def strip(component: int, axis: int, aside: int, across: int) -> Array:
            """A channel without the layers beside `axis`, `aside` cells along `across`."""
            q = around[component]
            for other, n in enumerate(self.grid.shape):
                if other != axis:
                    first = HALO + (aside if other == across else 0)
                    q = cut(q, first, first + n, other)
            return q

        diffusivities = [*[self.equation.viscosity] * d, *self.equation.scalars.values()]
        out = []
        for c, diffusivity in enumerate(diffusivities):
            diffusivity = jnp.asarray(diffusivity, u.dtype)
            total = None
            for a, (n, h) in enumerate(zip(self.grid.shape, self.grid.spacing, strict=True)):

                def window(offset: int, component: int = c, axis: int = a, aside: int = 0, across: int = c) -> Array:
                    """Values `offset` cells along `axis` from the right neighbour of fluxes 0 … n, `aside` cells along `across`."""
                    first = HALO + offset
                    q = strip(component, axis, aside, across if aside else axis)
                    return cut(q, first, first + self.grid.shape[axis] + 1, axis)

                left, right = window(-1), window(0)
                jump = right - left
                if a == c:
                    carrier = 0.5 * (left + right)
                elif c < d:
                    carrier = 0.5 * (window(-1, a) + window(-1, a, aside=1))
                else:
                    carrier = window(-1, a)
                value = self._face_value(window, carrier, left, right, jump)
                if weights is not None:
                    value = value + self._free_value(window, carrier, weights[a, :, c], a, a == c)
                for side, kind in enumerate(self.grid.boundaries[a]):
                    if kind == "fixed" and a != c and c < d:
                        on_side = jax.lax.broadcasted_iota(jnp.int32, value.shape, a) == side * n
                        given = value_on_side(left, right, window(1)) if side == 0 else value_on_side(right, left, window(-2))
                        value = jnp.where(on_side, given, value)
                flux = carrier * value - (diffusivity / h) * jump
                # Each flux serves two cells; without the barrier XLA on CPU computes it twice.
                flux = jax.lax.optimization_barrier(flux)
                term = (cut(flux, 1, n + 1, a) - cut(flux, 0, n, a)) / h
                total = term if total is None else total + term
            out.append(total)
        return jnp.stack(out)

    def _force(self, u: Float[Array, "d *grid"], t: Array) -> Float[Array, "d *grid"]:
        """f at the faces."""
        forcing = self.equation.forcing
        assert forcing is not None
        force = self._arrays(u.dtype)["force"] if isinstance(forcing, AbstractStandingForce) else jnp.zeros_like(u)
        if not _is_zero(forcing.drag):
            force = force - jnp.asarray(forcing.drag, u.dtype) * u
        axes = tuple(range(1, u.ndim))
        if isinstance(forcing, AbstractGrowth):
            mean = self.centred(u).mean(axis=axes, keepdims=True)
            force = force + jnp.asarray(forcing.rate, u.dtype) * (u - jnp.broadcast_to(mean, u.shape))
        if isinstance(forcing, AbstractBandForce):
            hat = forcing.band_force(jnp.fft.rfftn(u, axes=axes), t, self.grid, self._places)
            force = force + jnp.fft.irfftn(hat, s=self.grid.shape, axes=axes)
        return self._still_on_sides(force, outflow=False)

    def explicit(self, z, t, tendency):
        u, d = z["u"], self.grid.ndim
        time = jnp.asarray(t, u.dtype)
        extra = tendency(z, t) or {}
        # Evaluated again in the backward pass: to keep slopes and fluxes takes seven times the memory, and more time.
        rate = -eqx.filter_checkpoint(StaggeredFiniteVolume._flux_divergence_of)(self, u, time, extra.get("weights"))
        injected = jnp.zeros_like(z["injected"])
        if self.equation.forcing is not None:
            force = self._force(u[:d], time)
            rate = rate + force if u.shape[0] == d else jnp.concatenate([rate[:d] + force, rate[d:]])
            injected = jnp.concatenate([force.mean(axis=tuple(range(1, u.ndim))), injected[d:]])
        rate = self._still_on_sides(rate, outflow=False)
        if "u" in extra:
            rate = rate + extra["u"]
        return {"u": rate, "injected": injected}

    def receive(self, flux, source):
        rate = None if flux is None else -self.flux_divergence(flux)
        if source is not None:
            source = self._still_on_sides(source, outflow=True)
            rate = source if rate is None else rate + source
        return {"u": rate}

    def collect(self, z):
        return {**z, "injected": jnp.zeros_like(z["injected"])}, z["injected"]

    def stable_dt(self, u):
        """1 / (max Σ_a |u_a| / Δx_a + 2 max(ν, κ) Σ_a w_a/Δx_a²): advection and explicit diffusion at Courant number 1.

        Walls and inflows count with their velocity at t = 0. w = 2/√3 along axes with a `no_slip` or `fixed` side, where the
        largest eigenvalue of diffusion is 8/√3 instead of 4 in units of ν/Δx², and 1 otherwise.
        """
        spacing = self.grid.spacing
        advection = jnp.max(sum(jnp.abs(q) / h for q, h in zip(u, spacing, strict=False)))
        for name in self.equation.boundary_velocity:
            axis, side = AXES.index(name[0]), SIDES.index(name[2:])
            start = jnp.zeros((), u.dtype)
            on_side = [boundary_velocity(self.equation, self.grid, axis, side, c, at, start) for c, at in enumerate(self._places)]
            advection = jnp.maximum(advection, sum(jnp.max(jnp.abs(q)) / h for q, h in zip(on_side, spacing, strict=True)))
        diffusivity = jnp.asarray(self.equation.viscosity, u.dtype)
        for value in self.equation.scalars.values():
            diffusivity = jnp.maximum(diffusivity, jnp.asarray(value, u.dtype))
        weights = [2 / 3**0.5 if {"no_slip", "fixed"} & set(sides) else 1.0 for sides in self.grid.boundaries]
        diffusion = 2 * diffusivity * sum(w / h**2 for w, h in zip(weights, spacing, strict=True))
        return 1 / jnp.maximum(advection + diffusion, jnp.finfo(u.dtype).tiny)
