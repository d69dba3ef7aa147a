"""∂t u + ½ ∂x u² = −∂xx u − ν ∂xxxx u: the Kuramoto–Sivashinsky equation on a periodic line, spectral and by finite volumes.

Both solvers step the Fourier coefficients of their own u, in which the linear part is diagonal, so that exponential steppers treat
it exactly and only advection limits the time step. Fourier coefficients are those of the samples at (i + ½) Δx: every operation is
translation-invariant, so the half-cell phase never enters.
"""

import abc
from typing import Any, ClassVar, Literal

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Complex, Float, PyTree

from hybridsim.contract import AbstractSolver, Flux, PostStep, Replacement, Source, Variable
from hybridsim.grid import Grid, Place, cell_mean, resample
from hybridsim.solvers.reconstruction import van_leer
from hybridsim.solvers.spectral import Dealiasing, dealiasing_mask

Convection = Literal["central", "van_leer"]


def _scalar(value):
    return value if eqx.is_array(value) else float(value)


class KuramotoSivashinsky(eqx.Module):
    """∂t u + ½ ∂x u² = −∂xx u − ν ∂xxxx u: the simplest equation with chaos in space and time, without a discretisation.

    Waves longer than 2π√ν grow, the nonlinear term hands their energy to shorter ones, and these are damped. The form conserves
    ∫ u dx and is invariant under x → x + ct, u → u + c; the height h of u = ∂x h obeys ∂t h + ½ (∂x h)² = −∂xx h − ν ∂xxxx h.

    **Arguments:** `viscosity`, ν > 0, in units in which the coefficient of −∂xx is 1. 1 is the usual choice, with the length of the
    domain as the parameter; a domain of length 2π with ν = (2π/L)² is the same flow (Hyman & Nicolaenko 1986,
    doi:10.1016/0167-2789(86)90166-1). An array is differentiable.

    Good values: L = 22, a small domain whose chaos is well studied (Cvitanović, Davidchack & Siminos 2010, doi:10.1137/070705623),
    or L ≥ 100; between them a run may settle into a steady state after a long time. u is of order 1.3.

    >>> KuramotoSivashinsky().viscosity
    1.0
    """

    viscosity: float | Float[Array, ""] = eqx.field(default=1.0, converter=_scalar)

    def __check_init__(self):
        if isinstance(self.viscosity, float) and not (np.isfinite(self.viscosity) and self.viscosity > 0):
            raise ValueError(f"viscosity: must be positive and finite, or short waves grow without bound; found {self.viscosity}")


# --- transforms -------------------------------------------------------------------------------------------------------------------
#
# On CPU the stock transforms of n real numbers cost up to twice as much as one of n/2 complex ones, and most of a step here are
# transforms. So even and odd points make the real and the imaginary part of n/2 numbers c_j = u_{2j} + i u_{2j+1}; with ĉ* of the
# mirrored index, û_k = ½ (ĉ_k + ĉ*_{−k}) − ½ i e^{−2πik/n} (ĉ_k − ĉ*_{−k}), and the same with k and n/2 − k exchanged.


def _in_pairs(n: int) -> bool:
    return n % 4 == 0 and jax.default_backend() == "cpu"


def _twiddle(n: int, dtype: Any) -> Complex[Array, " k"]:
    """½ i e^{2πik/n}, k = 0 … n/2 − 1."""
    return jnp.asarray(0.5j * np.exp(2j * np.pi * np.arange(n // 2) / n), jnp.result_type(dtype, jnp.complex64))


def _pairs_of(hat: Complex[Array, " k"], n: int) -> Complex[Array, " half"]:
    """û -> u_{2j} + i u_{2j+1}."""
    above, below = hat[:-1], jnp.conj(hat[:0:-1])
    return jnp.fft.ifft(0.5 * (above + below) + _twiddle(n, hat.real.dtype) * (above - below))


def _spectrum_of(even: Float[Array, " half"], odd: Float[Array, " half"]) -> Complex[Array, " k"]:
    """u_{2j}, u_{2j+1} -> û."""
    c = jnp.fft.fft(jax.lax.complex(even, odd))
    half = c.shape[0] // 2
    above = c[: half + 1]
    below = jnp.conj(jnp.concatenate([c[:1], c[half:][::-1]]))
    plain = 0.5 * (above + below)
    turned = jnp.conj(_twiddle(4 * half, even.dtype)[: half + 1]) * (above - below)
    return jnp.concatenate([plain + turned, jnp.conj(plain - turned)[:half][::-1]])


def real_transform(u: Float[Array, " n"]) -> Complex[Array, " k"]:
    """û_k = Σ_j u_j e^{−2πijk/n}, k = 0 … n/2: `rfft`."""
    if not _in_pairs(u.shape[0]):
        return jnp.fft.rfft(u)
    pairs = u.reshape(-1, 2)
    return _spectrum_of(pairs[:, 0], pairs[:, 1])


def inverse_real_transform(hat: Complex[Array, " k"], n: int) -> Float[Array, " n"]:
    """u_j = n⁻¹ Σ_k û_k e^{2πijk/n}: `irfft`, for û_0 and û_{n/2} that are real."""
    if not _in_pairs(n):
        return jnp.fft.irfft(hat, n=n)
    c = _pairs_of(hat, n)
    return jnp.stack([c.real, c.imag], axis=1).reshape(n)


def square_transform(hat: Complex[Array, " k"], n: int) -> Complex[Array, " k"]:
    """û -> (u²)^, with the points left in pairs between the two transforms."""
    if not _in_pairs(n):
        return jnp.fft.rfft(jnp.fft.irfft(hat, n=n) ** 2)
    c = _pairs_of(hat, n)
    return _spectrum_of(c.real**2, c.imag**2)


# --- solvers ---------------------------------------------------------------------------------------------------------------------


class CellMean(Variable):
    """ū_i = Δx⁻¹ ∫ u dx over cell i: a channel of means, where a plain `Variable` has values at points."""


class _Line(AbstractSolver):
    """Shared by both solvers: z is the `rfft` of u, of which nothing but a Source ever changes the mean."""

    grid: eqx.AbstractVar[Grid]
    equation: eqx.AbstractVar[KuramotoSivashinsky]
    arrays: eqx.AbstractVar[dict[str, Array] | None]

    places: ClassVar = (Flux, Source, PostStep, Replacement)

    def __check_init__(self):
        if self.grid.ndim != 1:
            raise ValueError(f"grid: the Kuramoto–Sivashinsky equation is one-dimensional here, found shape {self.grid.shape}")
        if not all(self.grid.periodic):
            raise ValueError("grid: the Kuramoto–Sivashinsky equation needs periodic boundaries")
        if min(self.grid.shape) < 4:
            raise ValueError(f"grid: the Kuramoto–Sivashinsky equation needs at least 4 cells, found {self.grid.shape}")

    @property
    def conserved(self) -> tuple[str, ...]:
        return ("u",)

    # -- arrays that no step changes --------------------------------------------------------------------------------------------

    @abc.abstractmethod
    def _constants(self) -> dict[str, np.ndarray]:
        """In double precision, with the layout of `rfft`: `keep`, the modes of the state, and what N(u) and closures need."""

    def prepare(self, dtype) -> "_Line":
        complex_dtype = jnp.result_type(dtype, jnp.complex64)
        arrays = {name: jnp.asarray(a, complex_dtype if np.iscomplexobj(a) else dtype) for name, a in self._constants().items()}
        return eqx.tree_at(lambda s: s.arrays, self, arrays, is_leaf=lambda a: a is None)

    def _arrays(self, dtype) -> dict[str, Array]:
        arrays = self.arrays if self.arrays is not None else self.prepare(dtype).arrays
        assert arrays is not None
        return arrays

    def _values(self, hat: Complex[Array, " k"]) -> Float[Array, " n"]:
        return inverse_real_transform(hat, self.grid.shape[0])

    # -- representation ---------------------------------------------------------------------------------------------------------

    def encode(self, u: Float[Array, "1 n"]) -> PyTree:
        return {"u": self._arrays(u.dtype)["keep"] * real_transform(u[0]), "injected": jnp.zeros((1,), u.dtype)}

    def decode(self, z: PyTree) -> Float[Array, "1 n"]:
        return self._values(z["u"])[None]

    def constrain(self, z: PyTree) -> PyTree:
        return z

    def project(self, u: Float[Array, "1 n"]) -> Float[Array, "1 n"]:
        return self.decode(self.encode(u))

    def _check_box(self, grid: Grid) -> None:
        if not np.allclose(grid.lengths, self.grid.lengths, rtol=1e-12):
            raise ValueError(
                f"the fine and the coarse grid must span the same box, found lengths {grid.lengths} and {self.grid.lengths}"
            )

    # -- what closures see ------------------------------------------------------------------------------------------------------

    def divergence(self, u: Float[Array, "1 n"]) -> None:
        return None

    def centred(self, u: Float[Array, "1 n"]) -> Float[Array, "1 n"]:
        return u

    def gradient(self, u: Float[Array, "1 n"]) -> Float[Array, "1 1 n"]:
        return self.derivative(u[0], self.grid.centre, 0)[0][None, None]

    def adjoint_gradient(self, u: Float[Array, "1 n"]) -> Float[Array, "1 1 n"]:
        """The symbol of −∂x, mask included, made into its adjoint."""
        return self._values(jnp.conj(self._arrays(u.dtype)["divergence"]) * real_transform(u[0]))[None, None]

    @property
    def flux_response(self) -> float:
        """max |d(k)|², d the symbol of −∂x, mask included."""
        return float(np.max(np.abs(self._constants()["divergence"]) ** 2))

    # -- right-hand side --------------------------------------------------------------------------------------------------------

    @abc.abstractmethod
    def _square(self) -> np.ndarray:
        """κ², the eigenvalues of −∂xx, in double precision."""

    def linear(self) -> PyTree:
        square = self._square()
        return {"u": square * (1 - self.equation.viscosity * square), "injected": np.zeros(())}

    @abc.abstractmethod
    def _nonlinear(self, hat: Complex[Array, " k"]) -> Complex[Array, " k"]:
        """û -> −½ (∂x u²)^."""

    def explicit(self, z, t, tendency):
        rate = self._nonlinear(z["u"])
        extra = tendency(z, t)
        if extra is not None:
            rate = rate + extra["u"]
        return {"u": rate, "injected": jnp.zeros_like(z["injected"])}

    def receive(self, flux, source):
        reference = flux if flux is not None else source
        assert reference is not None
        arrays = self._arrays(reference.dtype)
        rate = jnp.zeros((), reference.dtype)
        if flux is not None:
            rate = rate + arrays["divergence"] * real_transform(flux[0, 0])
        if source is not None:
            rate = rate + arrays["mask"] * real_transform(source[0])
        return {"u": rate}

    def collect(self, z):
        return {**z, "injected": jnp.zeros_like(z["injected"])}, z["injected"]

    def stable_dt(self, u):
        """Δx / max |u|: advection at Courant number 1.

        The linear part sets no limit: exponential steppers treat it exactly. Explicit steppers, which this does not know of, need
        Δt below about Δx⁴ / (8ν) with finite volumes and Δx⁴ / (49ν) with spectra.
        """
        return self.grid.spacing[0] / jnp.maximum(jnp.max(jnp.abs(u)), jnp.finfo(u.dtype).tiny)


class SpectralKS(_Line):
    """∂t û = (k² − ν k⁴) û − ½ i k P(k) (u²)^: pseudo-spectral Kuramoto–Sivashinsky, two transforms per evaluation.

    **Arguments:**

    - `grid`: a one-dimensional periodic `Grid`.
    - `equation`: `KuramotoSivashinsky()`.
    - `dealias`: `hou_li` (default), `two_thirds` or `none`; see `dealiasing_mask`.

    Spectral accuracy in space; the mean of u is conserved to the last bit in z with any Flux closure. With `two_thirds` the state,
    too, is cut at N/3: what is left is Galerkin's method, without aliasing, in which ½∂x u² conserves ∫ u² dx exactly. The masks of
    the others act on tendencies only, and the state keeps all but the Nyquist mode. A grid needs π/Δx well above 1/√ν: where no
    damped mode is left to take their energy, waves grow without bound. At L = 60, ν = 1, ⟨u²⟩ comes out within 2 % up to Δx = 1.25
    with `hou_li` and 0.94 with `two_thirds`, and runs blow up from Δx of about 1.7 with either.

    >>> SpectralKS(Grid((64,), (22.0,)), KuramotoSivashinsky()).variables
    (Variable(name='u', unit='length/time', at=(0.5,)),)
    """

    grid: Grid
    equation: KuramotoSivashinsky
    dealias: Dealiasing = eqx.field(static=True, default="hou_li")
    arrays: dict[str, Array] | None = None

    @property
    def variables(self) -> tuple[Variable, ...]:
        return (Variable("u", "length/time", self.grid.centre),)

    def _constants(self) -> dict[str, np.ndarray]:
        (k,) = self.grid.wavenumbers()
        mask, no_nyquist = dealiasing_mask(self.grid, self.dealias), dealiasing_mask(self.grid, "none")
        keep = mask if self.dealias == "two_thirds" else no_nyquist
        return {"keep": keep, "mask": mask, "ik": 1j * k * no_nyquist, "divergence": -1j * k * mask, "convection": -0.5j * k * mask}

    def restrict(self, u: Float[Array, "1 fine"], grid: Grid, variables: tuple[Variable, ...]) -> Float[Array, "1 n"]:
        """Sharp spectral cut to the modes that this solver keeps."""
        self._check_box(grid)
        return self.project(resample(u, self.grid.shape, variables[0].at, self.grid.centre))

    @property
    def filter_option(self) -> str:
        return "two_thirds" if self.dealias == "two_thirds" else ""

    def flux_place(self, axis: int, channel: int) -> Place:
        return self.grid.centre

    def move(self, array, from_, to):
        return array

    def derivative(self, array, at, axis):
        return self._values(self._arrays(array.dtype)["ik"] * real_transform(array)), at

    def _square(self) -> np.ndarray:
        return self.grid.wavenumbers()[0] ** 2

    def _nonlinear(self, hat: Complex[Array, " k"]) -> Complex[Array, " k"]:
        return self._arrays(hat.real.dtype)["convection"] * square_transform(hat, self.grid.shape[0])


class FiniteVolumeKS(_Line):
    """∂t ū = −δ (F + δū + ν δ³ū),  δf_i = (f_{i+½} − f_{i−½})/Δx,  F = (u_i² + u_i u_{i+1} + u_{i+1}²)/6.

    Finite-volume Kuramoto–Sivashinsky for means over cells, second order in space. The linear fluxes have constant coefficients, so
    that Fourier modes are their exact eigenvectors, with κ = (2/Δx) sin(k Δx/2) in place of k.

    **Arguments:**

    - `grid`: a one-dimensional periodic `Grid`.
    - `equation`: `KuramotoSivashinsky()`.
    - `convection`: `central` (F as above; default) or `van_leer` (Godunov's flux between values from limited slopes: harmonic
      limiter, exact Riemann solution of ∂t u + ½∂x u² = 0).

    Order 2 (1 at extrema with the limiter). The mean of u is conserved to the last bit in z with any Flux closure. `central`
    conserves Σ u² exactly in space (Tadmor 1987, doi:10.1090/S0025-5718-1987-0890255-3: the entropy-conservative flux of ½u²);
    `van_leer` only removes it, and so stays stable where grids are too coarse for the other, with far too little motion.

    >>> FiniteVolumeKS(Grid((64,), (22.0,)), KuramotoSivashinsky()).variables
    (CellMean(name='u', unit='length/time', at=(0.5,)),)
    """

    grid: Grid
    equation: KuramotoSivashinsky
    convection: Convection = eqx.field(static=True, default="central")
    arrays: dict[str, Array] | None = None

    @property
    def variables(self) -> tuple[Variable, ...]:
        return (CellMean("u", "length/time", self.grid.centre),)

    def _constants(self) -> dict[str, np.ndarray]:
        (k,), (h,), (n,) = self.grid.wavenumbers(), self.grid.spacing, self.grid.shape
        divergence = -2j / h * np.sin(k * h / 2) * np.exp(-0.5j * k * h)
        # real fluxes make real rates: the Nyquist factor is −2/Δx, without the rounding of e^{−iπ/2}
        divergence = np.where(2 * np.arange(k.size) == n, divergence.real, divergence)
        ones = np.ones(k.size)
        return {"keep": ones, "mask": ones, "divergence": divergence}

    def restrict(self, u: Float[Array, "1 fine"], grid: Grid, variables: tuple[Variable, ...]) -> Float[Array, "1 n"]:
        """Exact means over the coarse cells: of fine means where the cells divide, else of the trigonometric interpolant."""
        self._check_box(grid)
        if isinstance(variables[0], CellMean) and grid.shape[0] % self.grid.shape[0] == 0:
            return cell_mean(u, (grid.shape[0] // self.grid.shape[0],))
        return resample(u, self.grid.shape, variables[0].at, self.grid.centre, average=(True,), alias=True)

    def flux_place(self, axis: int, channel: int) -> Place:
        return (1.0,)

    def move(self, array, from_, to):
        if from_ == to:
            return array
        return 0.5 * (array + jnp.roll(array, -1 if to[0] > from_[0] else 1))

    def derivative(self, array, at, axis):
        difference = array - jnp.roll(array, 1) if at[0] == 1 else jnp.roll(array, -1) - array
        return difference / self.grid.spacing[0], self.grid.flux_place(at, axis)

    def _square(self) -> np.ndarray:
        (k,), (h,) = self.grid.wavenumbers(), self.grid.spacing
        return (2 / h * np.sin(k * h / 2)) ** 2

    def _nonlinear(self, hat: Complex[Array, " k"]) -> Complex[Array, " k"]:
        u = self._values(hat)
        right = jnp.roll(u, -1)
        if self.convection == "central":
            flux = (u * u + u * right + right * right) / 6
        else:
            jump = right - u
            half = 0.5 * van_leer(jnp.roll(jump, 1), jump)
            flux = burgers_flux(u + half, right - jnp.roll(half, -1))
        return self._arrays(u.dtype)["divergence"] * real_transform(flux)


def burgers_flux(left: Float[Array, "*grid"], right: Float[Array, "*grid"]) -> Float[Array, "*grid"]:
    """F = ½ max(u_L⁺, (−u_R)⁺)²: Godunov's flux of ½u² (LeVeque 2002, doi:10.1017/CBO9780511791253, §12.1)."""
    upwind = jnp.maximum(jnp.maximum(left, 0), jnp.maximum(-right, 0))
    return 0.5 * upwind * upwind
