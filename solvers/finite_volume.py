"""∂t ū_c = −Σ_a [F_{a,c}]/Δx_a − [p]/Δx_c + f: finite volumes on the staggered (MAC) grid.

The arrangement is that of Harlow & Welch 1965, doi:10.1063/1.1761178.

Velocity component a lives at the right face of axis a. The flux of component c along axis a lives at the flux point `at_c + ½ e_a`
folded into (0, 1]: the cell centre if a = c, the edge between the two faces otherwise.
"""

from typing import ClassVar, Literal

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PyTree

from hybridsim.contract import AbstractSolver, Flux, PostStep, Source, Variable
from hybridsim.grid import Grid, face_mean, resample
from hybridsim.solvers.incompressible import NavierStokes

Convection = Literal["van_leer", "central"]


def shift(u: Float[Array, "*grid"], offset: int, axis: int) -> Float[Array, "*grid"]:
    """u_{i + offset} along `axis`, periodic."""
    return jnp.roll(u, -offset, axis)


def limited_slope(below: Float[Array, "*grid"], above: Float[Array, "*grid"]) -> Float[Array, "*grid"]:
    """s = 2ab / (a + b) where ab > 0, else 0: the harmonic limiter (van Leer 1974, doi:10.1016/0021-9991(74)90019-9)."""
    product = below * above
    total = below + above
    safe = jnp.where(product > 0, total, 1)
    return jnp.where(product > 0, 2 * product / safe, 0)


class StaggeredFiniteVolume(AbstractSolver):
    """∂t u_c = −Σ_a δ_a (ū_a û_c − ν δ_a u_c) − δ_c p + f_c,  Σ_a δ_a u_a = 0.

    Finite-volume Navier–Stokes on the staggered grid, periodic, second order in space; direct projection by Fourier transforms
    with the eigenvalues of the discrete Laplacian.

    **Arguments:**

    - `grid`: a periodic `Grid`.
    - `equation`: `NavierStokes(viscosity, forcing)`.
    - `convection`: `van_leer` (upwind with the harmonic limiter; default) or `central` (conserves kinetic energy exactly in
      space without viscosity).

    Order 2 (1 at extrema with the limiter). Momentum and, by projection, ∇·u = 0 hold to rounding with any Flux closure. Central
    convection rings where the cell Reynolds number is large.
    """

    grid: Grid
    equation: NavierStokes
    convection: Convection = eqx.field(static=True, default="van_leer")
    arrays: dict[str, Array] | None = None

    places: ClassVar = (Flux, Source, PostStep)

    def __check_init__(self):
        if self.grid.ndim < 2:
            raise ValueError(f"grid: incompressible flow needs two or three axes, found shape {self.grid.shape}")
        if min(self.grid.shape) < 4:
            raise ValueError(f"grid: a finite-volume solver needs at least 4 cells per axis, found {self.grid.shape}")
        self.equation.check_grid(self.grid)

    @property
    def variables(self) -> tuple[Variable, ...]:
        return self.equation.velocity(self._places)

    @property
    def _places(self):
        return tuple(tuple(1.0 if b == a else 0.5 for b in range(self.grid.ndim)) for a in range(self.grid.ndim))

    # -- arrays that no step changes --------------------------------------------------------------------------------------------

    def prepare(self, dtype) -> "StaggeredFiniteVolume":
        eigenvalues = np.zeros(())
        for k, h in zip(self.grid.wavenumbers(), self.grid.spacing, strict=True):
            eigenvalues = eigenvalues - (2 / h * np.sin(k * h / 2)) ** 2
        inverse = np.where(eigenvalues < 0, 1 / np.where(eigenvalues < 0, eigenvalues, 1.0), 0.0)
        arrays = {"inverse_laplacian": jnp.asarray(inverse, dtype)}
        if self.equation.forcing is not None:
            arrays["force"] = self.equation.forcing.acceleration(self.grid, self._places, dtype)
        return eqx.tree_at(lambda s: s.arrays, self, arrays, is_leaf=lambda a: a is None)

    def _arrays(self, dtype) -> dict[str, Array]:
        arrays = self.arrays if self.arrays is not None else self.prepare(dtype).arrays
        assert arrays is not None
        return arrays

    # -- representation ---------------------------------------------------------------------------------------------------------

    def encode(self, u: Float[Array, "d *grid"]) -> PyTree:
        return {"u": self.project(u), "injected": jnp.zeros((u.shape[0],), u.dtype)}

    def decode(self, z: PyTree) -> Float[Array, "d *grid"]:
        return z["u"]

    def constrain(self, z: PyTree) -> PyTree:
        return {**z, "u": self.project(z["u"])}

    def divergence(self, u: Float[Array, "d *grid"]) -> Float[Array, "*grid"]:
        """Σ_a (u_{a,i} − u_{a,i−1}) / Δx_a at the cell centres."""
        total = jnp.zeros_like(u[0])
        for a, (q, h) in enumerate(zip(u, self.grid.spacing, strict=True)):
            total = total + (q - shift(q, -1, a)) / h
        return total

    def project(self, u: Float[Array, "d *grid"]) -> Float[Array, "d *grid"]:
        """u − δφ with δ·δφ = δ·u: the orthogonal projection onto discretely divergence-free fields."""
        hat = jnp.fft.rfftn(self.divergence(u)) * self._arrays(u.dtype)["inverse_laplacian"]
        phi = jnp.fft.irfftn(hat, s=self.grid.shape)
        return jnp.stack([q - (shift(phi, 1, a) - phi) / h for a, (q, h) in enumerate(zip(u, self.grid.spacing, strict=True))])

    def restrict(self, u: Float[Array, "d *fine"], grid: Grid, variables: tuple[Variable, ...]) -> Float[Array, "d *grid"]:
        """Exact means over the coarse faces: sums of fine fluxes, so that δ·u stays zero.

        From a staggered grid that this one divides these are block means; from cell-centred values they are the face means of the
        trigonometric interpolant (phase shift to the face, times sinc(k Δx/2) along it).
        """
        if not np.allclose(grid.lengths, self.grid.lengths, rtol=1e-12):
            raise ValueError(f"the fine and the coarse grid must span the same box, found {grid.lengths} and {self.grid.lengths}")
        out = []
        for a, (q, fine) in enumerate(zip(u, variables, strict=True)):
            at = self._places[a]
            if fine.at == at and all(n % m == 0 for n, m in zip(grid.shape, self.grid.shape, strict=True)):
                out.append(face_mean(q, tuple(n // m for n, m in zip(grid.shape, self.grid.shape, strict=True)), a))
            else:
                across = tuple(b != a for b in range(self.grid.ndim))
                out.append(resample(q, self.grid.shape, fine.at, at, average=across, alias=True))
        return jnp.stack(out)

    # -- what closures see ------------------------------------------------------------------------------------------------------

    def flux_place(self, axis: int, channel: int):
        return self.grid.flux_place(self._places[channel], axis)

    def move(self, array, from_, to):
        for axis, (a, b) in enumerate(zip(from_, to, strict=True)):
            if a != b:
                array = 0.5 * (array + shift(array, 1 if b > a else -1, axis))
        return array

    def derivative(self, array, at, axis):
        h = self.grid.spacing[axis]
        step = (array - shift(array, -1, axis)) if at[axis] == 1 else (shift(array, 1, axis) - array)
        return step / h, self.grid.flux_place(at, axis)

    def _difference(self, q: Array, axis: int, channel: int) -> Array:
        """∂_axis of component `channel`, at its flux point."""
        return self.derivative(q, self._places[channel], axis)[0]

    def gradient(self, u: Float[Array, "d *grid"]) -> Float[Array, "d d *grid"]:
        dims = range(self.grid.ndim)
        return jnp.stack([jnp.stack([self._difference(u[c], a, c) for c in dims]) for a in dims])

    def flux_divergence(self, flux: Float[Array, "d d *grid"]) -> Float[Array, "d *grid"]:
        """Σ_a δ_a F[a, c] at the faces of component c."""
        out = []
        for c in range(self.grid.ndim):
            terms = []
            for a, h in enumerate(self.grid.spacing):
                f = flux[a][c]
                terms.append(((shift(f, 1, a) - f) if a == c else (f - shift(f, -1, a))) / h)
            out.append(sum(terms[1:], terms[0]))
        return jnp.stack(out)

    # -- right-hand side --------------------------------------------------------------------------------------------------------

    def linear(self) -> PyTree | None:
        return None

    def _face_value(self, window, carrier: Array, left: Array, right: Array, jump: Array) -> Array:
        """û between two neighbours: their mean, or the upwind one with a limited slope."""
        if self.convection == "central":
            return 0.5 * (left + right)
        upwards = carrier > 0
        beyond = jnp.where(upwards, left - window(-2), window(1) - right)
        half = 0.5 * limited_slope(jump, beyond)
        return jnp.where(upwards, left + half, right - half)

    def _flux_divergence_of(self, u: Float[Array, "d *grid"], viscosity: Array) -> Float[Array, "d *grid"]:
        """Σ_a δ_a (ū_a û_c − ν δ_a u_c), from one padded copy of u so that every shift is a slice that XLA fuses.

        Along each axis n + 1 fluxes are computed, the first and the last from the same numbers: periodic sums cancel exactly.
        """
        halo = 2
        padded = u
        for axis in range(1, u.ndim):
            n = u.shape[axis]
            below = jax.lax.slice_in_dim(padded, n - halo, n, axis=axis)
            above = jax.lax.slice_in_dim(padded, 0, halo, axis=axis)
            padded = jnp.concatenate([below, padded, above], axis=axis)
        out = []
        for c in range(self.grid.ndim):
            total = None
            for a, (n, h) in enumerate(zip(self.grid.shape, self.grid.spacing, strict=True)):

                def window(offset: int, component: int = c, axis: int = a, aside: int = 0, across: int = c) -> Array:
                    """Values `offset` cells along `axis` from the right neighbour of fluxes 0 … n, `aside` cells along `across`."""
                    start = [halo] * self.grid.ndim
                    size = list(self.grid.shape)
                    start[axis] += offset
                    size[axis] += 1
                    start[across] += aside
                    return jax.lax.slice(padded[component], start, [i + m for i, m in zip(start, size, strict=True)])

                left, right = window(-1), window(0)
                jump = right - left
                carrier = 0.5 * (left + right) if a == c else 0.5 * (window(-1, a) + window(-1, a, aside=1))
                flux = carrier * self._face_value(window, carrier, left, right, jump) - (viscosity / h) * jump
                # Each flux serves two cells; without the barrier XLA on CPU computes it twice.
                flux = jax.lax.optimization_barrier(flux)
                upper = jax.lax.slice_in_dim(flux, 1, n + 1, axis=a)
                term = (upper - jax.lax.slice_in_dim(flux, 0, n, axis=a)) / h
                total = term if total is None else total + term
            out.append(total)
        return jnp.stack(out)

    def explicit(self, z, t, tendency):
        u = z["u"]
        arrays = self._arrays(u.dtype)
        viscosity = jnp.asarray(self.equation.viscosity, u.dtype)
        rate = -self._flux_divergence_of(u, viscosity)
        injected = jnp.zeros_like(z["injected"])
        if self.equation.forcing is not None:
            force = arrays["force"] - jnp.asarray(self.equation.drag, u.dtype) * u
            rate = rate + force
            injected = force.mean(axis=tuple(range(1, u.ndim)))
        extra = tendency(z, t)
        if extra is not None:
            rate = rate + extra["u"]
        return {"u": rate, "injected": injected}

    def receive(self, flux, source):
        rate = None if flux is None else -self.flux_divergence(flux)
        if source is not None:
            rate = source if rate is None else rate + source
        return {"u": rate}

    def collect(self, z):
        return {**z, "injected": jnp.zeros_like(z["injected"])}, z["injected"]

    def stable_dt(self, u):
        """1 / (max Σ_a |u_a| / Δx_a + 2 ν Σ_a 1/Δx_a²): advection and explicit diffusion at Courant number 1."""
        advection = sum(jnp.abs(q) / h for q, h in zip(u, self.grid.spacing, strict=True))
        diffusion = 2 * jnp.asarray(self.equation.viscosity, u.dtype) * sum(1 / h**2 for h in self.grid.spacing)
        return 1 / jnp.maximum(jnp.max(advection) + diffusion, jnp.finfo(u.dtype).tiny)
