"""∂t ω̂ = −ν k² ω̂ − μ ω̂ + P(k) [curl(f − ∇·(u u) − ∇·F + s)]^: pseudo-spectral solvers on periodic boxes.

The state is the velocity at the cell centres; inside, the 2D solver steps the vorticity and the mean flow. Fourier coefficients are
those of the samples at (i + ½) Δx: every operation here is translation-invariant, so the half-cell phase never enters.
"""

from typing import ClassVar, Literal

import equinox as eqx
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Complex, Float, PyTree

from hybridsim.contract import AbstractSolver, Flux, PostStep, Source, Variable
from hybridsim.grid import Grid, resample
from hybridsim.solvers.incompressible import NavierStokes

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


class Spectral2D(AbstractSolver):
    """∂t ω̂ = −(ν k² + μ) ω̂ + P(k) [(k_x² − k_y²) (uv)^ + k_x k_y (v² − u²)^ + curl f^].

    Pseudo-spectral Navier–Stokes in 2D, doubly periodic, with four transforms per evaluation (Basdevant 1983,
    doi:10.1016/0021-9991(83)90064-5). The mean flow ∂t ⟨u⟩ = ⟨f⟩ − μ ⟨u⟩ is kept.

    **Arguments:**

    - `grid`: a two-dimensional periodic `Grid`.
    - `equation`: `NavierStokes(viscosity, forcing)`.
    - `dealias`: `hou_li` (default), `two_thirds` or `none`; see `dealiasing_mask`. Applied to every tendency, never to the state.

    Spectral accuracy in space. With `two_thirds`, energy and enstrophy are conserved exactly in space without viscosity. A Flux
    closure never touches the mean flow: momentum is conserved for any weights. Underresolved runs without eddy viscosity pile
    energy up at the cut-off.
    """

    grid: Grid
    equation: NavierStokes
    dealias: Dealiasing = eqx.field(static=True, default="hou_li")
    arrays: dict[str, Array] | None = None

    places: ClassVar = (Flux, Source, PostStep)

    def __check_init__(self):
        if self.grid.ndim != 2:
            raise ValueError(f"grid: this spectral solver is two-dimensional, found shape {self.grid.shape}")
        if set(self.grid.boundaries) != {"periodic"}:
            raise ValueError("grid: a spectral solver needs periodic boundaries")
        if min(self.grid.shape) < 4:
            raise ValueError(f"grid: a spectral solver needs at least 4 cells per axis, found {self.grid.shape}")
        self.equation.check_grid(self.grid)

    @property
    def variables(self) -> tuple[Variable, ...]:
        return self.equation.velocity((self.grid.centre,) * 2)

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
        arrays = {name: jnp.asarray(a, dtype) for name, a in real.items()}
        if self.equation.forcing is not None:
            force = self.equation.forcing.acceleration(self.grid, (self.grid.centre,) * 2, dtype)
            arrays["force_mean"] = force.mean(axis=(1, 2))
            arrays["force"] = arrays["mask"] * self._curl(jnp.fft.rfft2(force), arrays)
        return eqx.tree_at(lambda s: s.arrays, self, arrays, is_leaf=lambda a: a is None)

    def _arrays(self, dtype) -> dict[str, Array]:
        arrays = self.arrays if self.arrays is not None else self.prepare(dtype).arrays
        assert arrays is not None
        return arrays

    @staticmethod
    def _curl(hat: Complex[Array, "2 *k"], arrays: dict[str, Array]) -> Complex[Array, "*k"]:
        return 1j * (arrays["kx"] * hat[1] - arrays["ky"] * hat[0])

    # -- representation ---------------------------------------------------------------------------------------------------------

    def encode(self, u: Float[Array, "2 *grid"]) -> PyTree:
        arrays = self._arrays(u.dtype)
        mean = u.mean(axis=(1, 2))
        return {"vorticity": self._curl(jnp.fft.rfft2(u), arrays), "mean": mean, "injected": jnp.zeros_like(mean)}

    def decode(self, z: PyTree) -> Float[Array, "2 *grid"]:
        arrays = self._arrays(z["mean"].dtype)
        hat = 1j * z["vorticity"][None] * jnp.stack([arrays["to_u"], arrays["to_v"]])
        return jnp.fft.irfft2(hat, s=self.grid.shape) + z["mean"][:, None, None]

    def constrain(self, z: PyTree) -> PyTree:
        return z

    def project(self, u: Float[Array, "2 *grid"]) -> Float[Array, "2 *grid"]:
        return self.decode(self.encode(u))

    def restrict(self, u: Float[Array, "2 *fine"], grid: Grid, variables: tuple[Variable, ...]) -> Float[Array, "2 *grid"]:
        """Sharp spectral cut at this grid's Nyquist wavenumber, then projection."""
        _same_box(grid, self.grid)
        cut = [resample(q, self.grid.shape, v.at, self.grid.centre) for q, v in zip(u, variables, strict=True)]
        return self.project(jnp.stack(cut))

    # -- what closures see ------------------------------------------------------------------------------------------------------

    def flux_place(self, axis: int, channel: int):
        return self.grid.centre

    def move(self, array, from_, to):
        return array

    def gradient(self, u: Float[Array, "2 *grid"]) -> Float[Array, "2 2 *grid"]:
        arrays = self._arrays(u.dtype)
        hat = jnp.fft.rfft2(u)
        return jnp.fft.irfft2(jnp.stack([1j * arrays["kx"][None] * hat, 1j * arrays["ky"][None] * hat]), s=self.grid.shape)

    def derivative(self, array, at, axis):
        arrays = self._arrays(array.dtype)
        k = arrays["kx"] if axis == 0 else arrays["ky"]
        return jnp.fft.irfft2(1j * k * jnp.fft.rfft2(array), s=self.grid.shape), at

    # -- right-hand side --------------------------------------------------------------------------------------------------------

    def linear(self) -> PyTree:
        kx, ky = self.grid.wavenumbers()
        # The drag of the mean flow is explicit, so that what it takes is counted in `injected` to rounding.
        return {
            "vorticity": -self.equation.viscosity * (kx**2 + ky**2) - self.equation.drag,
            "mean": np.zeros(()),
            "injected": np.zeros(()),
        }

    def explicit(self, z, t, tendency):
        arrays = self._arrays(z["mean"].dtype)
        u, v = self.decode(z)
        products = jnp.fft.rfft2(jnp.stack([u * v, (v - u) * (v + u)]))
        rate = arrays["stretch"] * products[0] + arrays["shear"] * products[1]
        mean = jnp.zeros_like(z["mean"])
        if self.equation.forcing is not None:
            rate = rate + arrays["force"]
            mean = mean + arrays["force_mean"] - jnp.asarray(self.equation.drag, mean.dtype) * z["mean"]
        injected = mean
        extra = tendency(z, t)
        if extra is not None:
            rate = rate + extra["vorticity"]
            mean = mean + extra["mean"]
        return {"vorticity": rate, "mean": mean, "injected": injected}

    def receive(self, flux, source):
        reference = flux if flux is not None else source
        assert reference is not None
        arrays = self._arrays(reference.dtype)
        rate = jnp.zeros((), arrays["mask"].dtype)
        mean = jnp.zeros((2,), reference.dtype)
        if flux is not None:
            kx, ky = arrays["kx"], arrays["ky"]
            hat = jnp.fft.rfft2(jnp.stack([flux[0, 1], flux[1, 0], flux[1, 1] - flux[0, 0]]))
            rate = rate + arrays["mask"] * (kx * kx * hat[0] - ky * ky * hat[1] + kx * ky * hat[2])
        if source is not None:
            rate = rate + arrays["mask"] * self._curl(jnp.fft.rfft2(source), arrays)
            mean = mean + source.mean(axis=(1, 2))
        return {"vorticity": rate, "mean": mean}

    def collect(self, z):
        return {**z, "injected": jnp.zeros_like(z["injected"])}, z["injected"]

    def stable_dt(self, u):
        """1 / max Σ_a |u_a| / Δx_a: advection at Courant number 1, where |λ| Δt = π at the cut-off (ETDRK4 takes about 0.9)."""
        rate = sum(jnp.abs(q) / h for q, h in zip(u, self.grid.spacing, strict=True))
        return 1 / jnp.maximum(jnp.max(rate), jnp.finfo(u.dtype).tiny)


def _same_box(fine: Grid, coarse: Grid) -> None:
    if not np.allclose(fine.lengths, coarse.lengths, rtol=1e-12):
        raise ValueError(f"the fine and the coarse grid must span the same box, found lengths {fine.lengths} and {coarse.lengths}")
