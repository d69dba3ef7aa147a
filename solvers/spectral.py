"""∂t û = −(ν k² + μ) û + P(k) (1 − kk/k²) · [f − ∇·(u u) − ∇·F + s]^: pseudo-spectral solvers on periodic boxes.

The state is the velocity, and the passive scalars after it, at the cell centres; inside, the 2D solver steps the vorticity, the 3D
solver the velocity, and both the mean of every channel apart from its fluctuations. Fourier coefficients are those of the samples
at (i + ½) Δx: every operation here is translation-invariant, so the half-cell phase never enters.
"""

from typing import Any, ClassVar, Literal

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Complex, Float, PyTree

from hybridsim.contract import AbstractSolver, Flux, PostStep, Real, Replacement, Source, Tendency, Variable
from hybridsim.grid import Grid, resample
from hybridsim.solvers.incompressible import AbstractBandForce, AbstractStandingForce, NavierStokes
from hybridsim.solvers.staggering import cut

Dealiasing = Literal["hou_li", "two_thirds", "none"]


def dealiasing_mask(grid: Grid, kind: Dealiasing) -> np.ndarray:
    """P(k), float64, in the layout of `rfftn`, Nyquist always removed.

    - `hou_li`: Π_a exp(−36 (|k_a|/k_max)^36), k_max = N_a/2 (Hou & Li 2007, doi:10.1016/j.jcp.2007.04.014). Keeps about
      5/6 of the modes of every axis; the better default.
    - `two_thirds`: keeps |k_a| < N_a/3 (Orszag 1971); products of kept modes are then free of aliasing.
    - `none`: only the Nyquist mode is removed.
    """
    mask = np.ones(())
    for k, n, length in zip(grid.wavenumbers(), grid.shape, grid.lengths, strict=True):
        index = np.abs(k) * length / (2 * np.pi)
        if kind == "hou_li":
            factor = np.exp(-36.0 * (index / (n / 2)) ** 36)
        elif kind == "two_thirds":
            factor = (index < n / 3 - 1e-9).astype(float)
        else:
            factor = np.ones_like(index)
        mask = mask * np.where(np.isclose(2 * index, n), 0.0, factor)
    return mask


def hermitian(hat: Complex[Array, "c *k"]) -> Complex[Array, "c *k"]:
    """½ (û(k) + û*(−k)) on the plane k_d = 0 of an `rfftn`: what of it a real field has.

    The inverse transform does not see the rest, and neither do the products; where something amplifies the coefficients
    themselves, rounding errors there would grow for ever.
    """
    plane = hat[..., 0]
    axes = tuple(range(1, plane.ndim))
    mirrored = jnp.conj(jnp.roll(jnp.flip(plane, axes), 1, axes))
    return hat.at[..., 0].set(0.5 * (plane + mirrored))


def _mirrored(hat: Complex[Array, "kx ky"]) -> Complex[Array, "kx ky"]:
    """â(−k_x, k_y)."""
    return jnp.roll(jnp.flip(hat, 0), 1, 0)


def packed_inverse(a: Complex[Array, "nx half"], b: Complex[Array, "nx half"], ny: int) -> Complex[Array, "nx ny"]:
    """a + i b in physical space, from the `rfft2` of real a and b without Nyquist modes: one complex transform, not two real ones.

    With â(−k) = â*(k), (a + ib)^(k) = â + i b̂ and (a + ib)^(−k) = (â − i b̂)*. As with `irfft2`, what is not so on the line k_y = 0
    is not seen.
    """
    above = jax.lax.complex(a.real - b.imag, a.imag + b.real)
    below = jax.lax.complex(a.real + b.imag, b.real - a.imag)
    half = a.shape[1]
    first = 0.5 * (cut(above, 0, 1, 1) + _mirrored(cut(below, 0, 1, 1)))
    beyond = jnp.flip(_mirrored(cut(below, 1, ny - half + 1, 1)), 1)
    return jnp.fft.ifft2(jnp.concatenate([first, cut(above, 1, half, 1), beyond], 1))


def packed_transform(c: Complex[Array, "nx ny"]) -> tuple[Complex[Array, "nx half"], Complex[Array, "nx half"]]:
    """The `rfft2` of Re c and of Im c, from one complex transform: ½ (ĉ(k) + ĉ*(−k)) and ½ (ĉ(k) − ĉ*(−k))/i."""
    hat, half = jnp.fft.fft2(c), c.shape[1] // 2 + 1
    n = c.shape[1]
    here = cut(hat, 0, half, 1)
    there = _mirrored(jnp.concatenate([cut(hat, 0, 1, 1), jnp.flip(cut(hat, n - half + 1, n, 1), 1)], 1))
    real = jax.lax.complex(0.5 * (here.real + there.real), 0.5 * (here.imag - there.imag))
    imaginary = jax.lax.complex(0.5 * (here.imag + there.imag), 0.5 * (there.real - here.real))
    return real, imaginary


class _Spectral(AbstractSolver):
    """What does not depend on the number of dimensions: transforms, operators for closures, means, scalars."""

    grid: eqx.AbstractVar[Grid]
    equation: eqx.AbstractVar[NavierStokes]
    dealias: eqx.AbstractVar[Dealiasing]
    arrays: eqx.AbstractVar[dict[str, Array] | None]

    places: ClassVar = (Flux, Source, PostStep, Replacement)
    dims: ClassVar[int]

    def __check_init__(self):
        if self.grid.ndim != self.dims:
            name = {2: "two", 3: "three"}[self.dims]
            raise ValueError(f"grid: this spectral solver is {name}-dimensional, found shape {self.grid.shape}")
        if not all(self.grid.periodic):
            raise ValueError("grid: a spectral solver needs periodic boundaries")
        if min(self.grid.shape) < 4:
            raise ValueError(f"grid: a spectral solver needs at least 4 cells per axis, found {self.grid.shape}")
        self.equation.check_grid(self.grid)

    @property
    def variables(self) -> tuple[Variable, ...]:
        return self.equation.variables(self._places, self.grid.centre)

    @property
    def conserved(self) -> tuple[str, ...]:
        return tuple(v.name for v in self.variables)

    @property
    def serial_kernels(self) -> bool:
        return True

    @property
    def _places(self):
        return (self.grid.centre,) * self.dims

    def _arrays(self, dtype) -> dict[str, Array]:
        arrays = self.arrays if self.arrays is not None else self.prepare(dtype).arrays  # pyright: ignore[reportAttributeAccessIssue]
        assert arrays is not None
        return arrays

    def _with_arrays(self, arrays: dict[str, Array]):
        return eqx.tree_at(lambda s: s.arrays, self, arrays, is_leaf=lambda a: a is None)

    @staticmethod
    def _k(arrays: dict[str, Array]) -> list[Array]:
        return [arrays[name] for name in ("kx", "ky", "kz") if name in arrays]

    def _forward(self, u: Array) -> Array:
        return jnp.fft.rfftn(u, axes=tuple(range(-self.dims, 0)))

    def _inverse(self, hat: Array) -> Array:
        return jnp.fft.irfftn(hat, s=self.grid.shape, axes=tuple(range(-self.dims, 0)))

    def _mean(self, u: Array) -> Array:
        return u.mean(axis=tuple(range(1, self.dims + 1)))

    def _to_grid(self, mean: Array) -> Array:
        return mean.reshape(-1, *(1,) * self.dims)

    # -- what closures see ------------------------------------------------------------------------------------------------------

    def project(self, u: Float[Array, "c *grid"]) -> Float[Array, "c *grid"]:
        return self.decode(self.encode(u))

    def restrict(self, u: Float[Array, "c *fine"], grid: Grid, variables: tuple[Variable, ...]) -> Float[Array, "c *grid"]:
        """Sharp spectral cut at this grid's Nyquist wavenumber, then projection."""
        same_box(grid, self.grid)
        cut = [resample(q, self.grid.shape, v.at, self.grid.centre) for q, v in zip(u, variables, strict=True)]
        return self.project(jnp.stack(cut))

    def divergence(self, u: Float[Array, "c *grid"]) -> Float[Array, "*grid"]:
        hat = self._forward(u[: self.dims])
        first, *rest = [k * q for k, q in zip(self._k(self._arrays(u.dtype)), hat, strict=True)]
        return self._inverse(1j * jnp.asarray(sum(rest, first)))

    def centred(self, u: Float[Array, "c *grid"]) -> Float[Array, "c *grid"]:
        return u

    def flux_place(self, axis: int, channel: int):
        return self.grid.centre

    def move(self, array, from_, to):
        return array

    def gradient(self, u: Float[Array, "c *grid"]) -> Float[Array, "axis c *grid"]:
        hat = self._forward(u)
        return self._inverse(jnp.stack([1j * k[None] * hat for k in self._k(self._arrays(u.dtype))]))

    def adjoint_gradient(self, u: Float[Array, "c *grid"]) -> Float[Array, "axis c *grid"]:
        """∂_a P u_c: the mask of the tendencies is its own adjoint, and so is the projection, which leaves u as it is."""
        arrays = self._arrays(u.dtype)
        hat = arrays["mask"][None] * self._forward(u)
        return self._inverse(jnp.stack([1j * k[None] * hat for k in self._k(arrays)]))

    @property
    def flux_response(self) -> float:
        """max P(k)² k²."""
        mask = dealiasing_mask(self.grid, self.dealias)
        return float(np.max(mask**2 * sum(k**2 for k in self.grid.wavenumbers())))

    def derivative(self, array, at, axis):
        k = self._k(self._arrays(array.dtype))[axis]
        return self._inverse(1j * k * self._forward(array)), at

    def stable_dt(self, u):
        """1 / max Σ_a |u_a| / Δx_a: advection at Courant number 1, where |λ| Δt = π at the cut-off (ETDRK4 takes about 0.9)."""
        rate = sum(jnp.abs(q) / h for q, h in zip(u[: self.dims], self.grid.spacing, strict=True))
        return 1 / jnp.maximum(jnp.max(rate), jnp.finfo(u.dtype).tiny)

    # -- parts of the right-hand side -------------------------------------------------------------------------------------------

    @property
    def _amplified(self) -> bool:
        """Whether the linear symbol may be positive, so that what no product sees would grow."""
        growth = self.equation.growth
        return not isinstance(growth, float) or growth > 0

    def _symbol(self) -> tuple[Any, dict[str, Any]]:
        """−ν k² − μ + A of the velocity, and of the rest of z."""
        square = sum(k**2 for k in self.grid.wavenumbers())
        # The drag of the mean flow is explicit, so that what it takes is counted in `injected` to rounding.
        rest: dict[str, Any] = {"mean": np.zeros(()), "injected": np.zeros(())}
        if self.equation.scalars:
            kappa = [-q * square for q in self.equation.scalars.values()]
            rest["scalars"] = np.stack(kappa) if all(isinstance(q, np.ndarray) for q in kappa) else jnp.stack(kappa)
        return -self.equation.viscosity * square - self.equation.drag + self.equation.growth, rest

    def _force_arrays(self, dtype) -> tuple[dict[str, Array], Array | None]:
        """The mean of the force that depends on nothing, by name, and its transform; None where there is none."""
        forcing = self.equation.forcing
        if not isinstance(forcing, AbstractStandingForce):
            return {}, None
        force = forcing.acceleration(self.grid, self._places, dtype)
        return {"force_mean": self._mean(force)}, self._forward(force)

    def _completed(self, rate: dict[str, Array], arrays: dict[str, Array], z: PyTree, t: Real, tendency: Tendency) -> PyTree:
        """The rates of the fluctuations with those of the means and the closures' part."""
        mean = self._mean_rate(arrays, z["mean"])
        rate = {**rate, "mean": mean, "injected": mean}
        extra = tendency(z, t)
        return rate if extra is None else rate | {name: rate[name] + part for name, part in extra.items()}

    def _mean_rate(self, arrays: dict[str, Array], mean: Float[Array, " c"]) -> Float[Array, " c"]:
        """⟨f⟩ − μ ⟨u⟩, and nothing for the scalars."""
        rate = jnp.zeros_like(mean)
        if self.equation.forcing is None:
            return rate
        flow = jnp.zeros_like(mean[: self.dims])
        if "force_mean" in arrays:
            flow = flow + arrays["force_mean"]
        flow = flow - jnp.asarray(self.equation.drag, mean.dtype) * mean[: self.dims]
        return jnp.concatenate([flow, rate[self.dims :]])

    def _outflow(self, arrays: dict[str, Array], flux: list[Complex[Array, "s *k"]]) -> Complex[Array, "s *k"]:
        """−∇·F of scalars, from the transforms of F along each axis."""
        terms = [k[None] * f for k, f in zip(self._k(arrays), flux, strict=True)]
        return -1j * arrays["mask"][None] * sum(terms[1:], terms[0])


class Spectral2D(_Spectral):
    """∂t ω̂ = −(ν k² + μ − A) ω̂ + P(k) [(k_x² − k_y²) (uv)^ + k_x k_y (v² − u²)^ + curl f^],  ∂t ĉ = −κ k² ĉ − P(k) i k·(u c)^.

    Pseudo-spectral Navier–Stokes in 2D, doubly periodic, with four real transforms per evaluation (Basdevant 1983,
    doi:10.1016/0021-9991(83)90064-5), done as two complex ones, and three for each scalar. The mean flow ∂t ⟨u⟩ = ⟨f⟩ − μ ⟨u⟩ is
    kept.

    **Arguments:**

    - `grid`: a two-dimensional periodic `Grid`.
    - `equation`: `NavierStokes(viscosity, forcing, scalars)`.
    - `dealias`: `hou_li` (default), `two_thirds` or `none`; see `dealiasing_mask`. Applied to every tendency, never to the state.

    Spectral accuracy in space. With `two_thirds`, energy, enstrophy and scalar variance are conserved exactly in space without
    viscosity and diffusivity. A Flux closure never touches the means: momentum and scalars are conserved for any weights.
    Underresolved runs without eddy viscosity pile energy up at the cut-off.
    """

    grid: Grid
    equation: NavierStokes
    dealias: Dealiasing = eqx.field(static=True, default="hou_li")
    arrays: dict[str, Array] | None = None

    dims: ClassVar[int] = 2

    # -- arrays that no step changes --------------------------------------------------------------------------------------------

    def prepare(self, dtype) -> "Spectral2D":
        kx, ky = self.grid.wavenumbers()
        keep = dealiasing_mask(self.grid, "none")
        square = kx**2 + ky**2
        inverse = np.where(square > 0, keep / np.where(square > 0, square, 1.0), 0.0)
        mask = dealiasing_mask(self.grid, self.dealias)
        real = {
            "to_u": ky * inverse,
            "to_v": -kx * inverse,
            "kx": kx * keep,
            "ky": ky * keep,
            "stretch": mask * (kx**2 - ky**2),
            "shear": mask * (kx * ky),
            "mask": mask,
        }
        if self.equation.scalars:
            real["fluctuation"] = np.where(square > 0, keep, 0.0)
        arrays = {name: jnp.asarray(a, dtype) for name, a in real.items()}
        means, force = self._force_arrays(dtype)
        arrays |= means
        if force is not None:
            arrays["force"] = arrays["mask"] * self._curl(force, arrays)
        return self._with_arrays(arrays)

    @staticmethod
    def _curl(hat: Complex[Array, "2 *k"], arrays: dict[str, Array]) -> Complex[Array, "*k"]:
        return 1j * (arrays["kx"] * hat[1] - arrays["ky"] * hat[0])

    @staticmethod
    def _velocity(vorticity: Complex[Array, "*k"], arrays: dict[str, Array]) -> tuple[Complex[Array, "*k"], Complex[Array, "*k"]]:
        x, y = vorticity.real, vorticity.imag
        u, v = (jax.lax.complex(-a * y, a * x) for a in (arrays["to_u"], arrays["to_v"]))
        return u, v

    # -- representation ---------------------------------------------------------------------------------------------------------

    def encode(self, u: Float[Array, "c *grid"]) -> PyTree:
        arrays = self._arrays(u.dtype)
        mean = self._mean(u)
        hat = self._forward(u)
        z = {"vorticity": self._curl(hat[:2], arrays), "mean": mean, "injected": jnp.zeros_like(mean)}
        if self.equation.scalars:
            z["scalars"] = arrays["fluctuation"][None] * hat[2:]
        return z

    def decode(self, z: PyTree) -> Float[Array, "c *grid"]:
        flow = self._flow(z)
        u = jnp.stack([flow.real, flow.imag])
        return jnp.concatenate([u, self._carried(z)]) if self.equation.scalars else u

    def _flow(self, z: PyTree) -> Complex[Array, "nx ny"]:
        """u + i v."""
        mean = z["mean"]
        flow = packed_inverse(*self._velocity(z["vorticity"], self._arrays(mean.dtype)), self.grid.shape[1])
        return flow + jax.lax.complex(mean[0], mean[1])

    def _carried(self, z: PyTree) -> Float[Array, "s nx ny"]:
        """The scalars."""
        return self._inverse(z["scalars"]) + self._to_grid(z["mean"][2:])

    def constrain(self, z: PyTree) -> PyTree:
        return z

    def collect(self, z):
        if self._amplified:
            z = {**z, "vorticity": hermitian(z["vorticity"][None])[0]}
        return {**z, "injected": jnp.zeros_like(z["injected"])}, z["injected"]

    # -- right-hand side --------------------------------------------------------------------------------------------------------

    def linear(self) -> PyTree:
        symbol, rest = self._symbol()
        return {"vorticity": symbol, **rest}

    def explicit(self, z, t, tendency):
        arrays = self._arrays(z["mean"].dtype)
        flow = self._flow(z)
        u, v = flow.real, flow.imag
        uv, difference = packed_transform(jax.lax.complex(u * v, (v - u) * (v + u)))
        stretch, shear = arrays["stretch"], arrays["shear"]
        real = stretch * uv.real + shear * difference.real
        rate = {"vorticity": jax.lax.complex(real, stretch * uv.imag + shear * difference.imag)}
        if self.equation.scalars:
            scalars = self._carried(z)
            carried = self._forward(jnp.concatenate([u[None] * scalars, v[None] * scalars]))
            rate["scalars"] = self._outflow(arrays, jnp.split(carried, 2))
        if "force" in arrays:
            rate["vorticity"] = rate["vorticity"] + arrays["force"]
        forcing = self.equation.forcing
        if isinstance(forcing, AbstractBandForce):
            velocity = jnp.stack(self._velocity(z["vorticity"], arrays))
            rate["vorticity"] = rate["vorticity"] + self._curl(forcing.band_force(velocity, t, self.grid, self._places), arrays)
        return self._completed(rate, arrays, z, t, tendency)

    def receive(self, flux, source):
        reference = flux if flux is not None else source
        assert reference is not None
        arrays = self._arrays(reference.dtype)
        scalars = len(self.equation.scalars)
        rate = jnp.zeros((), arrays["mask"].dtype)
        mean = jnp.zeros((2 + scalars,), reference.dtype)
        carried = jnp.zeros((), arrays["mask"].dtype)
        if flux is not None:
            kx, ky = arrays["kx"], arrays["ky"]
            hat = self._forward(jnp.stack([flux[0, 1], flux[1, 0], flux[1, 1] - flux[0, 0]]))
            rate = rate + arrays["mask"] * (kx * kx * hat[0] - ky * ky * hat[1] + kx * ky * hat[2])
            if scalars:
                carried = carried + self._outflow(arrays, list(self._forward(flux[:, 2:])))
        if source is not None:
            hat = self._forward(source)
            rate = rate + arrays["mask"] * self._curl(hat[:2], arrays)
            mean = mean + self._mean(source)
            if scalars:
                carried = carried + (arrays["mask"] * arrays["fluctuation"])[None] * hat[2:]
        return {"vorticity": rate, "mean": mean} | ({"scalars": carried} if scalars else {})


class Spectral3D(_Spectral):
    """∂t û = −(ν k² + μ − A) û + P(k) (1 − kk/k²) · [f + u × ω]^,  ∂t ĉ = −κ k² ĉ − P(k) i k·(u c)^.

    Pseudo-spectral Navier–Stokes in 3D, triply periodic; the pressure is taken out by projection (Orszag & Patterson 1972,
    doi:10.1103/PhysRevLett.28.76). One evaluation takes nine transforms, and four more for each scalar. With `two_thirds` it takes
    eight: u × ω is then the same as −∇·(u u), and the stress less its last diagonal component has five entries (Basdevant 1983,
    doi:10.1016/0021-9991(83)90064-5). Where products are aliased the rotational form is the safe one: u · (u × ω) = 0 even then,
    while −∇·(u u) blows up on coarse grids. The mean flow ∂t ⟨u⟩ = ⟨f⟩ − μ ⟨u⟩ is kept.

    **Arguments:**

    - `grid`: a three-dimensional periodic `Grid`; lengths and cells may differ from axis to axis.
    - `equation`: `NavierStokes(viscosity, forcing, scalars)`.
    - `dealias`: `hou_li` (default), `two_thirds` or `none`; see `dealiasing_mask`. Applied to every tendency, never to the state.

    Spectral accuracy in space. With `two_thirds`, energy, helicity and scalar variance are conserved exactly in space without
    viscosity and diffusivity; with `none`, energy and helicity are. A Flux closure never touches the means: momentum and scalars
    are conserved for any weights. Underresolved runs without eddy viscosity pile energy up at the cut-off.
    """

    grid: Grid
    equation: NavierStokes
    dealias: Dealiasing = eqx.field(static=True, default="hou_li")
    arrays: dict[str, Array] | None = None

    dims: ClassVar[int] = 3

    # -- arrays that no step changes --------------------------------------------------------------------------------------------

    def prepare(self, dtype) -> "Spectral3D":
        k = self.grid.wavenumbers()
        square = k[0] ** 2 + k[1] ** 2 + k[2] ** 2
        keep = np.where(square > 0, dealiasing_mask(self.grid, "none"), 0.0)
        # One vector per axis: broadcast inside the loops they cost no memory traffic.
        real = {
            name: np.where(np.isclose(2 * np.abs(q) * length, 2 * np.pi * n), 0.0, q)
            for name, q, n, length in zip(("kx", "ky", "kz"), k, self.grid.shape, self.grid.lengths, strict=True)
        }
        real |= {
            "keep": keep,
            "mask": keep * dealiasing_mask(self.grid, self.dealias),
            "inverse": keep / np.where(square > 0, square, 1.0),
        }
        arrays = {name: jnp.asarray(a, dtype) for name, a in real.items()}
        means, force = self._force_arrays(dtype)
        arrays |= means
        if force is not None:
            arrays["force"] = self._solenoidal(arrays["mask"][None] * force, arrays)
        return self._with_arrays(arrays)

    def _solenoidal(self, hat: Complex[Array, "3 *k"], arrays: dict[str, Array]) -> Complex[Array, "3 *k"]:
        """û − k (k·û) / k²."""
        k = self._k(arrays)
        along = (k[0] * hat[0] + k[1] * hat[1] + k[2] * hat[2]) * arrays["inverse"]
        return jnp.stack([q - kk * along for q, kk in zip(hat, k, strict=True)])

    def _curl(self, hat: Complex[Array, "3 *k"], arrays: dict[str, Array]) -> Complex[Array, "3 *k"]:
        kx, ky, kz = self._k(arrays)
        return 1j * jnp.stack([ky * hat[2] - kz * hat[1], kz * hat[0] - kx * hat[2], kx * hat[1] - ky * hat[0]])

    # -- representation ---------------------------------------------------------------------------------------------------------

    def encode(self, u: Float[Array, "c *grid"]) -> PyTree:
        arrays = self._arrays(u.dtype)
        mean = self._mean(u)
        hat = arrays["keep"][None] * self._forward(u)
        z = {"velocity": self._solenoidal(hat[:3], arrays), "mean": mean, "injected": jnp.zeros_like(mean)}
        if self.equation.scalars:
            z["scalars"] = hat[3:]
        return z

    def decode(self, z: PyTree) -> Float[Array, "c *grid"]:
        hat = z["velocity"]
        if self.equation.scalars:
            hat = jnp.concatenate([hat, z["scalars"]])
        return self._inverse(hat) + self._to_grid(z["mean"])

    def constrain(self, z: PyTree) -> PyTree:
        return z

    def collect(self, z):
        if self._amplified:
            arrays = self._arrays(z["mean"].dtype)
            z = {**z, "velocity": self._solenoidal(hermitian(z["velocity"]), arrays)}
        return {**z, "injected": jnp.zeros_like(z["injected"])}, z["injected"]

    # -- right-hand side --------------------------------------------------------------------------------------------------------

    def linear(self) -> PyTree:
        symbol, rest = self._symbol()
        return {"velocity": symbol[None], **rest}

    def explicit(self, z, t, tendency):
        arrays = self._arrays(z["mean"].dtype)
        kx, ky, kz = self._k(arrays)
        u, v, w, *scalars = self.decode(z)
        carried = [q * c for q in (u, v, w) for c in scalars]
        if self.dealias == "two_thirds":
            square = w * w
            products = self._forward(jnp.stack([u * u - square, v * v - square, u * v, u * w, v * w, *carried]))
            xx, yy, xy, xz, yz = products[:5]
            force = -1j * jnp.stack([kx * xx + ky * xy + kz * xz, kx * xy + ky * yy + kz * yz, kx * xz + ky * yz])
            # Every component of the projection needs all three; without the barrier XLA on CPU computes them three times.
            force = jax.lax.optimization_barrier(force)
        else:
            a, b, c = self._inverse(self._curl(z["velocity"], arrays))
            products = self._forward(jnp.stack([v * c - w * b, w * a - u * c, u * b - v * a, *carried]))
            force = products[:3]
        rate = {"velocity": arrays["mask"][None] * self._solenoidal(force, arrays)}
        if scalars:
            rate["scalars"] = self._outflow(arrays, jnp.split(products[-len(carried) :], 3))
        if "force" in arrays:
            rate["velocity"] = rate["velocity"] + arrays["force"]
        forcing = self.equation.forcing
        if isinstance(forcing, AbstractBandForce):
            rate["velocity"] = rate["velocity"] + forcing.band_force(z["velocity"], t, self.grid, self._places)
        return self._completed(rate, arrays, z, t, tendency)

    def receive(self, flux, source):
        reference = flux if flux is not None else source
        assert reference is not None
        arrays = self._arrays(reference.dtype)
        scalars = len(self.equation.scalars)
        kx, ky, kz = self._k(arrays)
        force = jnp.zeros((), arrays["mask"].dtype)
        mean = jnp.zeros((3 + scalars,), reference.dtype)
        carried = jnp.zeros((), arrays["mask"].dtype)
        if flux is not None:
            # The (3, 3) component, taken off the diagonal, is a part of the pressure.
            parts = [flux[a, c] - flux[2, 2] if a == c else flux[a, c] for a in range(3) for c in range(3)][:8]
            xx, xy, xz, yx, yy, yz, zx, zy = self._forward(jnp.stack(parts))
            outflow = jnp.stack([kx * xx + ky * yx + kz * zx, kx * xy + ky * yy + kz * zy, kx * xz + ky * yz])
            force = force - 1j * outflow
            if scalars:
                carried = carried + self._outflow(arrays, list(self._forward(flux[:, 3:])))
        if source is not None:
            hat = self._forward(source)
            force = force + hat[:3]
            mean = mean + self._mean(source)
            if scalars:
                carried = carried + arrays["mask"][None] * hat[3:]
        force = jax.lax.optimization_barrier(force)
        rate = arrays["mask"][None] * self._solenoidal(force, arrays)
        return {"velocity": rate, "mean": mean} | ({"scalars": carried} if scalars else {})


def same_box(fine: Grid, coarse: Grid) -> None:
    if not np.allclose(fine.lengths, coarse.lengths, rtol=1e-12):
        raise ValueError(f"the fine and the coarse grid must span the same box, found lengths {fine.lengths} and {coarse.lengths}")
