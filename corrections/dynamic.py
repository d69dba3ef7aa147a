"""L_ac = C M_ac: an eddy viscosity that reads its own constant from the resolved scales."""

from typing import Literal, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from hybridsim.contract import Flux, View
from hybridsim.corrections.eddy import (
    _check_constant,
    _check_positive,
    _safe_sqrt,
    _scalar,
    eddy_flux,
    filter_width,
    velocity_channels,
)
from hybridsim.grid import Grid

NAME = "DynamicSmagorinsky"

Average = Literal["volume", "local"]


def smoothed(q: Float[Array, "..."], grid: Grid) -> Float[Array, "..."]:
    """q̂_i = ¼ q_{i−1} + ½ q_i + ¼ q_{i+1} along every axis of space, the last axes of q: the mean over a box of side 2Δx by the
    trapezoidal rule. At walls and open sides the outermost value goes on."""
    for a, periodic in enumerate(grid.periodic):
        axis = q.ndim - grid.ndim + a
        if periodic:
            below, above = jnp.roll(q, 1, axis), jnp.roll(q, -1, axis)
        else:
            n = q.shape[axis]
            first, last = (jax.lax.slice_in_dim(q, i, i + 1, axis=axis) for i in (0, n - 1))
            below = jnp.concatenate([first, jax.lax.slice_in_dim(q, 0, n - 1, axis=axis)], axis)
            above = jnp.concatenate([jax.lax.slice_in_dim(q, 1, n, axis=axis), last], axis)
        q = 0.5 * q + 0.25 * (below + above)
    return q


def centred_deformation(view: View) -> Float[Array, "d d *grid"]:
    """2 S at the cell centres; in one dimension ∂x u."""
    gradient = view.to_centre(view.gradient())[:, np.asarray(velocity_channels(view, NAME))]
    return gradient if view.grid.ndim == 1 else gradient + jnp.swapaxes(gradient, 0, 1)


def magnitude(deformation: Float[Array, "d d *grid"]) -> Float[Array, "*grid"]:
    """|S| = √(2 S:S) from 2 S; in one dimension |∂x u| from ∂x u."""
    square = jnp.sum(deformation**2, axis=(0, 1))
    return _safe_sqrt(square if deformation.shape[0] == 1 else 0.5 * square)


class GermanoPair(NamedTuple):
    """L and M of the identity L = C M, cell by cell."""

    leonard: Float[Array, "d d *grid"]
    basis: Float[Array, "d d *grid"]


def germano_pair(
    u: Float[Array, "d *grid"], deformation: Float[Array, "d d *grid"], grid: Grid, width: float, ratio: float
) -> GermanoPair:
    """L_ac = (u_a u_c)^ − û_a û_c less its trace,  M_ac = −Δ² [α² |Ŝ| 2Ŝ_ac − (|S| 2S_ac)^],  q^ = `smoothed` q.

    The stress between the scales Δ and αΔ as the resolved flow has it, and as a Smagorinsky model F = −C Δ² |S| 2S at both scales
    wants it, over C (Germano et al. 1991, doi:10.1063/1.857955). In one dimension 2S is ∂x u, and L is halved, as the flux is ½u².

    **Arguments:** `u` and `deformation`, 2S, at the cell centres; `width`, Δ; `ratio`, α > 1.
    """
    d = grid.ndim
    smooth = smoothed(u, grid)
    leonard = smoothed(u[:, None] * u[None], grid) - smooth[:, None] * smooth[None]
    if d == 1:
        leonard = 0.5 * leonard
    else:
        trace = sum(leonard[a, a] for a in range(d)) / d
        leonard = leonard - jnp.eye(d, dtype=u.dtype).reshape(d, d, *(1,) * d) * jnp.asarray(trace)[None, None]
    coarse = smoothed(deformation, grid)
    model = smoothed(magnitude(deformation)[None, None] * deformation, grid)
    return GermanoPair(leonard, -(width**2) * (ratio**2 * magnitude(coarse)[None, None] * coarse - model))


def least_squares(pair: GermanoPair, grid: Grid, average: Average = "volume") -> Float[Array, "*grid"]:
    """C = ⟨L:M⟩ / ⟨M:M⟩, a number for `volume`, a field for `local`; 0 where M vanishes.

    The C with the least ⟨(L − C M)²⟩ (Lilly 1992, doi:10.1063/1.858280). Averages are over the box, or local ones,
    `smoothed`. M vanishes where M:M ≤ ε², ε the rounding unit: its scale must be of order one.
    """
    over = (lambda q: q.mean()) if average == "volume" else (lambda q: smoothed(q, grid))
    above = over(jnp.sum(pair.leonard * pair.basis, axis=(0, 1)))
    below = over(jnp.sum(pair.basis**2, axis=(0, 1)))
    known = below > jnp.finfo(below.dtype).eps ** 2
    return jnp.where(known, above / jnp.where(known, below, 1), 0)


class DynamicSmagorinsky(Flux):
    """ν_t = c C Δ² |S|,  C = ⟨L:M⟩/⟨M:M⟩ ≥ 0;  in one dimension |S| is |∂x u| and F = −ν_t ∂x u.

    Smagorinsky's eddy viscosity with the constant C = c_s² that makes the stresses at the scales Δ and αΔ agree with what the
    resolved flow has between the two (Germano et al. 1991, doi:10.1063/1.857955; least squares of Lilly 1992,
    doi:10.1063/1.858280). C vanishes in laminar shear and where nothing is unresolved; no constant is chosen by hand.

    **Arguments:**

    - `c`, what the dynamic constant is multiplied by: about 1. An array is trained.
    - `average`: `volume`, one C for the whole box, or `local`, averages over 2 cells along every axis, C then varies in space (for
      flows that are not homogeneous; rougher and less stable).
    - `ratio`: α, the width of the test filter over that of the grid's; 2 (Germano et al.), or √6 for the filter's second moment.
    - `schmidt`: Sc_t, eddy viscosity over eddy diffusivity of passive scalars; about 0.7. An array is trained.
    - `largest`: an upper bound of √C, as local averages may be of any size where M almost vanishes; 0.1–1.

    The test filter is `smoothed`, ¼, ½, ¼ along each axis at the cell centres, between walls too. L is made of the velocity less
    its mean, so that mean flows change nothing even in single precision; C is zero where |S| is below √ε of the mean |∇u|, ε the
    rounding unit. Conserves momentum and scalars; only removes kinetic energy and scalar variance, as negative C (backscatter) is
    cut off. In three-dimensional turbulence √C comes out at Lilly's 0.17 in spectral solvers, and at 0.2 with central differences.
    """

    constants = ("c",)

    c: float | Float[Array, ""] = eqx.field(default=1.0, converter=_scalar)
    average: Average = eqx.field(static=True, default="volume")
    ratio: float = eqx.field(static=True, default=2.0, converter=float)
    schmidt: float | Float[Array, ""] = eqx.field(default=0.7, converter=_scalar)
    largest: float = eqx.field(static=True, default=0.5, converter=float)

    def __check_init__(self):
        _check_constant("c", self.c)
        if self.average not in ("volume", "local"):
            raise ValueError(f"average: found {self.average!r}, possible are volume, local")
        if not (np.isfinite(self.ratio) and self.ratio > 1):
            raise ValueError(f"ratio: the test filter must be wider than the grid's, found {self.ratio}")
        _check_positive("schmidt", self.schmidt)
        _check_positive("largest", self.largest)

    def coefficient(self, view: View) -> Float[Array, "*grid"]:
        """C, within [0, `largest`²]: a number, or a field."""
        channels = np.asarray(velocity_channels(view, NAME))
        gradient = view.to_centre(view.gradient())[:, channels]
        # C has no unit, so the flow's own drops out, of its derivatives too; fourth powers stay within single precision
        square = jnp.mean(jnp.sum(jax.lax.stop_gradient(gradient) ** 2, axis=(0, 1)))
        scale = jnp.where(square > 0, _safe_sqrt(square), 1)
        u = view.centred()[channels]
        u = (u - u.mean(axis=tuple(range(1, u.ndim)), keepdims=True)) / (scale * filter_width(view))
        # in units of Δ and of the mean gradient, hence width 1
        pair = germano_pair(u, centred_deformation(view) / scale, view.grid, 1.0, self.ratio)
        found = least_squares(pair, view.grid, self.average)
        return jnp.minimum(jnp.maximum(found, 0), jnp.asarray(self.largest**2, found.dtype))

    def __call__(self, view: View, memory=None, key=None) -> Float[Array, "axis c *grid"]:
        strength = jnp.asarray(self.c, view.u.dtype) * filter_width(view) ** 2 * self.coefficient(view)
        return eddy_flux(view, strength * magnitude(centred_deformation(view)), self.schmidt, NAME)
