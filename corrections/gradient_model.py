"""F_ac = Σ_k (Δ_k²/12) ∂_k u_a ∂_k u_c + …: what a smooth filter does to a product, expanded in its width."""

from typing import Literal

import equinox as eqx
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from hybridsim.contract import Flux, View
from hybridsim.corrections.eddy import _check_constant, _check_positive, _scalar, velocity_channels


class GradientModel(Flux):
    """F_ac = c [Σ_k (Δ_k²/12) ∂_k u_a ∂_k q_c + ½ Σ_kl (Δ_k²/12)(Δ_l²/12) ∂_k∂_l u_a ∂_k∂_l q_c];  in one dimension half of it.

    The first terms of the exact stress filter(u_a q_c) − ū_a q̄_c of a filter with second moment Δ²/12, for the velocity (q = u) and
    for passive scalars alike (Leonard 1974, doi:10.1016/S0065-2687(08)60464-1; Clark, Ferziger & Reynolds 1979,
    doi:10.1017/S002211207900001X). For the Gaussian filter the whole series is exp(σ² ∂·∂′) u q, σ² = Δ²/12: modes k and k′ of the
    filtered fields, whose product has the transfer function exp(−½σ²(k + k′)²) and who have exp(−½σ²k²) each, differ by
    exp(−σ² k·k′). Its terms are (σ²)ⁿ/n! (∂·∂′)ⁿ, and each one taken raises the order by two (Carati, Winckelmans & Jeanmart 2001,
    doi:10.1017/S0022112001004773). In Kuramoto–Sivashinsky, where the flux is ½u², F = (Δ²/24)(∂x u)² + … .

    **Arguments:**

    - `c`, the constant: 1 by theory. An array is trained.
    - `order`: 2, the first term, with an error of Δ⁴; or 4, both, with an error of Δ⁶ under a Gaussian filter. A box has the same
      first term and another second one.
    - `width`: Δ_k/Δx_k, the width of the filter in cells; 1–4, and 1 where only the grid filters.

    Conserves every sum; invariant under mean flows. It correlates with the exact stress far better than eddy viscosities do, but it
    is not dissipative: along directions in which the flow is stretched it gives energy back, and alone it lets small scales grow.
    In practice it is one half of a mixed model, the other being an eddy viscosity: two corrections, this one and `smagorinsky` or
    `dynamic_smagorinsky`. Derivatives are the solver's own, taken and multiplied at the cell centres: exact in spectral solvers but
    for the aliasing of the product; second order in finite volumes, where their error is of the size of the second term.
    """

    constants = ("c",)

    c: float | Float[Array, ""] = eqx.field(default=1.0, converter=_scalar)
    order: Literal[2, 4] = eqx.field(static=True, default=2)
    width: float = eqx.field(static=True, default=1.0, converter=float)

    def __check_init__(self):
        _check_constant("c", self.c)
        if self.order not in (2, 4):
            raise ValueError(f"order: found {self.order}, possible are 2 and 4")
        _check_positive("width", self.width)

    def __call__(self, view: View, memory=None, key=None) -> Float[Array, "axis c *grid"]:
        velocity = np.asarray(velocity_channels(view, "GradientModel"))
        dims, centre = range(view.grid.ndim), view.grid.centre
        moments = [(self.width * h) ** 2 / 12 for h in view.grid.spacing]
        slopes = view.to_centre(view.gradient())

        def product(slope: Float[Array, "c *grid"], weight: float) -> Float[Array, "a c *grid"]:
            return weight * slope[velocity][:, None] * slope[None]

        stress = jnp.zeros((), view.u.dtype)
        for k in dims:
            stress = stress + product(slopes[k], moments[k])
        if self.order == 4:
            for k in dims:
                for other in range(k, view.grid.ndim):
                    second = jnp.stack([view.to(*view.derivative(q, centre, other), centre) for q in slopes[k]])
                    # ½ Σ_kl counts a pair of unlike axes twice
                    twice = 1.0 if other == k else 2.0
                    stress = stress + product(second, 0.5 * twice * moments[k] * moments[other])
        factor = jnp.asarray(self.c, view.u.dtype) * (0.5 if view.grid.ndim == 1 else 1.0)
        return factor * view.to_flux_points(stress)
