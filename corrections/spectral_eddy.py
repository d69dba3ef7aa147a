"""F_a = −ν_t(k) ∗ ∂_a q: an eddy viscosity that knows how far each scale is from the cut-off."""

import equinox as eqx
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from hybridsim.contract import Flux, View
from hybridsim.corrections.eddy import _check_constant, _check_positive, _safe_sqrt, _scalar, filter_width, velocity_channels
from hybridsim.grid import Grid

CUSP, STEEPNESS = 34.47, 3.03
"""ν*(x) = 1 + CUSP exp(−STEEPNESS/x): Chollet & Lesieur's fit to the eddy-damped quasi-normal Markovian theory."""

PLATEAU = 0.441 * 1.4**-1.5
"""0.441 C_K^(−3/2): Kraichnan's eddy viscosity of large scales in units of √(E(k_c)/k_c), with the theory's C_K = 1.4."""

ENSTROPHY = 1.683 * 1.3**-1.5
"""1/(2 C^(3/2) ∫₀¹ x ν*(x) dx) for the cusp alone: with E = C η^⅔ k⁻³ it takes out the enstrophy that the cascade brings, η;
C = 1.3 (Kuznetsov & Sereshchenko 2015, arXiv:1510.09052)."""


def shape(x: Float[np.ndarray, "..."], dims: int) -> Float[np.ndarray, "..."]:
    """ν_t(x k_c) in units of √(E(k_c)/k_c), 0 ≤ x ≤ 1."""
    cusp = CUSP * np.exp(-STEEPNESS / np.maximum(x, 1e-3))
    return PLATEAU * (1 + cusp) if dims == 3 else ENSTROPHY * cusp


def relative_wavenumber(grid: Grid) -> Float[np.ndarray, "..."]:
    """κ = (Σ_a (k_a Δx_a/π)²)^½ in the layout of `rfftn`: 1 at the cut-off of every axis."""
    return np.sqrt(sum((k * h / np.pi) ** 2 for k, h in zip(grid.wavenumbers(), grid.spacing, strict=True)))


class SpectralEddyViscosity(Flux):
    """ν_t(k) = c A [1 + 34.47 exp(−3.03 k_c/k)] √(E(k_c)/k_c),  F = −ν_t(k) ∗ ∇u;  in two dimensions without the 1.

    The eddy viscosity of spectral closure theory in three dimensions, a plateau for large scales and a cusp at the cut-off (Chollet
    & Lesieur 1981, doi:10.1175/1520-0469(1981)038<2747:POSSEB>2.0.CO;2; Kraichnan 1976,
    doi:10.1175/1520-0469(1976)033<1521:EVITAT>2.0.CO;2): A = 0.441 C_K^(−3/2) with C_K = 1.4. E(k_c) is that of the moment, the
    energy in the last shell below the cut-off: nothing is taken from a flow that has not reached it.

    **In two dimensions** the eddy viscosity of the enstrophy cascade scales in the same way, ν_t ∝ η^⅓/k_c² ∝
    √(E(k_c)/k_c) (Kraichnan), but has no positive plateau. What is kept is the cusp alone, with A = 1.14: it then dissipates
    enstrophy at the rate η at which a cascade E = C η^⅔ k⁻³ brings it. The same balance of energy in three dimensions gives 0.462
    in place of 0.441.

    **Arguments:**

    - `c`, the constant: 1 by theory. An array is trained.
    - `cutoff`: k_c Δ/π, Δ = (Π Δx_a)^(1/d), in (0, 1]: where the resolved spectrum ends. Modes that a solver's dealiasing keeps
      from moving hold no energy, and E(k_c) must not be read there: 0.66 for `two_thirds` and `hou_li`, and for finite volumes; 1
      with `dealias: none`. Modes beyond are damped by ν_t(k_c).
    - `schmidt`: Sc_t, eddy viscosity over eddy diffusivity of passive scalars; about 0.7. An array is trained.

    k is (Σ_a (k_a Δx_a)²)^½/Δ, so that on unlike cells each axis has its own cut-off, and E(k_c) an average over a shell that is
    one mode of the coarsest axis thick. Periodic boxes only. Conserves every sum; only removes kinetic energy and scalar variance.
    ν_t is the same everywhere in the box: made for turbulence that is homogeneous.
    """

    constants = ("c",)

    c: float | Float[Array, ""] = eqx.field(default=1.0, converter=_scalar)
    cutoff: float = eqx.field(static=True, default=0.66, converter=float)
    schmidt: float | Float[Array, ""] = eqx.field(default=0.7, converter=_scalar)

    def __check_init__(self):
        _check_constant("c", self.c)
        if not 0 < self.cutoff <= 1:
            raise ValueError(f"cutoff: a share of the largest wavenumber in (0, 1], found {self.cutoff}")
        _check_positive("schmidt", self.schmidt)

    def __call__(self, view: View, memory=None, key=None) -> Float[Array, "axis c *grid"]:
        grid, dtype = view.grid, view.u.dtype
        velocity = velocity_channels(view, "SpectralEddyViscosity")
        if grid.ndim == 1:
            raise ValueError("SpectralEddyViscosity: made for two and three dimensions; use hyperviscosity on a line")
        if not all(grid.periodic):
            raise ValueError(f"SpectralEddyViscosity: needs periodic boundaries, found {grid.boundaries}; use smagorinsky")
        space = tuple(range(1, grid.ndim + 1))
        hat = jnp.fft.rfftn(view.u, axes=space)
        kappa = relative_wavenumber(grid)
        thickness, largest = 2 / min(grid.shape), np.pi / filter_width(view)
        ending = (kappa > max(self.cutoff - thickness, 0)) & (kappa <= self.cutoff + 1e-9)
        last = np.arange(kappa.shape[-1])
        # rfftn keeps one of each conjugate pair, except where k is its own mirror image
        pairs = np.where((last == 0) | (2 * last == grid.shape[-1]), 1.0, 2.0)
        weight = jnp.asarray(0.5 * pairs * ending / (thickness * largest), dtype)
        scaled = jnp.stack([hat[c] for c in velocity]) / grid.cells
        energy = jnp.sum(weight[None] * (scaled.real**2 + scaled.imag**2))
        viscosity = jnp.asarray(self.c, dtype) * _safe_sqrt(energy / (self.cutoff * largest))
        symbol = jnp.asarray(shape(np.minimum(kappa / self.cutoff, 1.0), grid.ndim), dtype)
        # a convolution and a derivative change places: c transforms instead of d c
        damped = jnp.fft.irfftn(symbol[None] * hat, s=grid.shape, axes=space)
        slopes = viscosity * eqx.tree_at(lambda v: v.u, view, damped).gradient()
        mixing = slopes / jnp.asarray(self.schmidt, dtype)
        return -jnp.stack([slopes[:, c] if c in velocity else mixing[:, c] for c in range(view.u.shape[0])], axis=1)
