"""∂t u + ∇·(u u) = −∇p + ν ∇²u + f − μ u,  ∇·u = 0: the physics of incompressible flow, without a grid."""

import equinox as eqx
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from hybridsim.contract import Real, Variable
from hybridsim.grid import Grid, Place


def _scalar(value: float | Array) -> float | Array:
    return value if eqx.is_array(value) else float(value)


class Kolmogorov(eqx.Module):
    """f = A sin(n y) e_x − μ u: a standing shear force and a linear drag.

    **Arguments:**

    - `wavenumber`: n, in units of 2π/L_y, a positive integer.
    - `amplitude`: A, an acceleration.
    - `drag`: μ ≥ 0, an inverse time. Keeps the energy of a 2D cascade finite.

    Good values: n = 4, A = 1, μ = 0.1 in a box 2π at ν = 10⁻³ (Kochkov et al. 2021, doi:10.1073/pnas.2101784118, "Kolmogorov
    flow"). `amplitude` and `drag` may be arrays and are then differentiable. The laminar state is u = A sin(ky) / (ν k² + μ) with
    k = 2πn/L_y.
    """

    wavenumber: int = eqx.field(static=True, default=4)
    amplitude: float | Float[Array, ""] = eqx.field(default=1.0, converter=_scalar)
    drag: float | Float[Array, ""] = eqx.field(default=0.1, converter=_scalar)

    def __check_init__(self):
        if self.wavenumber < 1:
            raise ValueError(f"wavenumber: a Kolmogorov force needs a positive whole number, found {self.wavenumber}")
        if isinstance(self.drag, float) and not self.drag >= 0:
            raise ValueError(f"drag: must not be negative, found {self.drag}")

    def acceleration(self, grid: Grid, places: tuple[Place, ...], dtype) -> Float[Array, "c *grid"]:
        """The part of f that does not depend on u, each component at its own place."""
        y = grid.mesh(places[0])[1]
        shape = jnp.asarray(np.sin(2 * np.pi * self.wavenumber / grid.lengths[1] * y), dtype)
        force = jnp.asarray(self.amplitude, dtype) * shape
        return jnp.stack([force] + [jnp.zeros_like(force)] * (grid.ndim - 1))


class LinearDrag(eqx.Module):
    """f = −μ u: friction alone.

    **Arguments:** `drag`, μ ≥ 0, an inverse time.
    """

    drag: float | Float[Array, ""] = eqx.field(default=0.1, converter=_scalar)

    def __check_init__(self):
        if isinstance(self.drag, float) and not self.drag >= 0:
            raise ValueError(f"drag: must not be negative, found {self.drag}")

    def acceleration(self, grid: Grid, places: tuple[Place, ...], dtype) -> Float[Array, "c *grid"]:
        return jnp.zeros((len(places), *grid.shape), dtype)


class NavierStokes(eqx.Module):
    """∂t u + ∇·(u u) = −∇p + ν ∇²u + f − μ u,  ∇·u = 0.

    **Arguments:**

    - `viscosity`: ν ≥ 0, length² per time; may be an array and is then differentiable.
    - `forcing`: None (decaying flow), `Kolmogorov` or `LinearDrag`.
    """

    viscosity: float | Float[Array, ""] = eqx.field(default=1e-3, converter=_scalar)
    forcing: Kolmogorov | LinearDrag | None = None

    def __check_init__(self):
        if isinstance(self.viscosity, float) and not (np.isfinite(self.viscosity) and self.viscosity >= 0):
            raise ValueError(f"viscosity: must be finite and not negative, found {self.viscosity}")

    @property
    def drag(self) -> float | Real:
        return 0.0 if self.forcing is None else self.forcing.drag

    def check_grid(self, grid: Grid) -> None:
        """Raises `ValueError` where the force cannot be represented on the grid."""
        wavenumber = getattr(self.forcing, "wavenumber", 0)
        if grid.ndim > 1 and 2 * wavenumber >= grid.shape[1]:
            raise ValueError(
                f"equation.forcing.wavenumber: {wavenumber} waves need over {2 * wavenumber} cells along y, not {grid.shape[1]}"
            )

    def velocity(self, places: tuple[Place, ...]) -> tuple[Variable, ...]:
        """The channels u, v(, w) at the given places."""
        return tuple(Variable(name, "length/time", at) for name, at in zip("uvw", places, strict=False))
