"""F[a, c] = −2 ν_t S_ac: classical eddy viscosities."""

import equinox as eqx
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from hybridsim.contract import Flux, View


def _scalar(value):
    return value if eqx.is_array(value) else float(value)


def _check_constant(name: str, value) -> None:
    if isinstance(value, float) and not (np.isfinite(value) and value >= 0):
        raise ValueError(f"{name}: must be finite and not negative, found {value}")


def _safe_sqrt(x: Array) -> Array:
    """√x with gradient 0 instead of ∞ at 0."""
    positive = x > 0
    return jnp.where(positive, jnp.sqrt(jnp.where(positive, x, 1)), 0)


def filter_width(view: View) -> float:
    """Δ = (Π Δx_a)^(1/d)."""
    return float(np.prod(view.grid.spacing)) ** (1 / view.grid.ndim)


def strain(view: View) -> Float[Array, "axis c *grid"]:
    """S_ac = ½ (∂_a u_c + ∂_c u_a) at the flux points (those of (a, c) and (c, a) coincide)."""
    gradient = view.gradient()
    return 0.5 * (gradient + jnp.swapaxes(gradient, 0, 1))


def eddy_flux(view: View, viscosity: Float[Array, "*grid"]) -> Float[Array, "axis c *grid"]:
    """F = −2 ν_t S for ν_t at the cell centres."""
    dims = view.grid.ndim
    tensor = jnp.broadcast_to(viscosity, (dims, dims, *viscosity.shape))
    return -2 * view.to_flux_points(tensor) * strain(view)


class Smagorinsky(Flux):
    """ν_t = (c_s Δ)² |S|,  |S| = √(2 S:S).

    The eddy viscosity of large-eddy simulation (Smagorinsky 1963, doi:10.1175/1520-0493(1963)091<0099:GCEWTP>2.3.CO;2).

    **Arguments:** `cs`, the constant: 0.17 in 3D (Lilly 1967), 0.05–0.2 in 2D. An array is trained.

    Conserves momentum; only removes kinetic energy. Too dissipative in laminar regions.
    """

    cs: float | Float[Array, ""] = eqx.field(default=0.17, converter=_scalar)

    def __check_init__(self):
        _check_constant("cs", self.cs)

    def __call__(self, view: View, memory=None, key=None) -> Float[Array, "axis c *grid"]:
        square = 2 * jnp.sum(view.to_centre(strain(view) ** 2), axis=(0, 1))
        width = jnp.asarray(self.cs, view.u.dtype) * filter_width(view)
        return eddy_flux(view, width**2 * _safe_sqrt(square))


class Leith(Flux):
    """ν_t = (c Δ)³ |∇ω|: the eddy viscosity of the enstrophy cascade, for two dimensions.

    Leith 1996, doi:10.1016/0167-2789(96)00107-8.

    **Arguments:** `c`, the constant: 0.1–0.5. An array is trained.

    Conserves momentum; only removes kinetic energy. Acts more sharply at small scales than `Smagorinsky`.
    """

    c: float | Float[Array, ""] = eqx.field(default=0.2, converter=_scalar)

    def __check_init__(self):
        _check_constant("c", self.c)

    def __call__(self, view: View, memory=None, key=None) -> Float[Array, "axis c *grid"]:
        if view.grid.ndim != 2:
            raise ValueError("Leith: the enstrophy cascade is two-dimensional; use Smagorinsky in 3D")
        gradient = view.gradient()
        place = view.flux_place(0, 1)
        vorticity = gradient[0, 1] - gradient[1, 0]
        square = jnp.zeros((), view.u.dtype)
        for axis in range(2):
            slope, at = view.derivative(vorticity, place, axis)
            square = square + view.to(slope**2, at, view.grid.centre)
        width = jnp.asarray(self.c, view.u.dtype) * filter_width(view)
        return eddy_flux(view, width**3 * _safe_sqrt(square))
