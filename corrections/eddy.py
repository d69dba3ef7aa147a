"""F[a, c] = −2 ν_t S_ac: classical eddy viscosities, for a gas too, and hyperviscosity."""

from collections.abc import Callable

import equinox as eqx
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from hybridsim.contract import Flux, View
from hybridsim.corrections.gas import gas_of, is_gas


def _scalar(value):
    return value if eqx.is_array(value) else float(value)


def _check_constant(name: str, value) -> None:
    if isinstance(value, float) and not (np.isfinite(value) and value >= 0):
        raise ValueError(f"{name}: must be finite and not negative, found {value}")


def _check_positive(name: str, value) -> None:
    if isinstance(value, float) and not (np.isfinite(value) and value > 0):
        raise ValueError(f"{name}: must be positive and finite, found {value}")


def _safe_sqrt(x: Array) -> Array:
    """√x with gradient 0 instead of ∞ at 0."""
    positive = x > 0
    return jnp.where(positive, jnp.sqrt(jnp.where(positive, x, 1)), 0)


def filter_width(view: View) -> float:
    """Δ = (Π Δx_a)^(1/d)."""
    return float(np.prod(view.grid.spacing)) ** (1 / view.grid.ndim)


def velocity_channels(view: View, name: str) -> tuple[int, ...]:
    """Where u, v, w stand among the channels; `name` is who asks."""
    names = [v.name for v in view.variables]
    wanted = "uvw"[: view.grid.ndim]
    if is_gas(names, view.grid.ndim):
        raise ValueError(f"{name}: made for incompressible flow, not for a gas ({', '.join(names)}); smagorinsky serves both")
    if missing := [q for q in wanted if q not in names]:
        raise ValueError(f"{name}: needs the velocity {', '.join(wanted)}; this solver has {', '.join(names)}, no {missing[0]}")
    return tuple(names.index(q) for q in wanted)


def deformation(view: View, name: str) -> Float[Array, "axis c *grid"]:
    """2 S_ac = ∂_a u_c + ∂_c u_a at the flux points (those of (a, c) and (c, a) coincide); in one dimension ∂_x u."""
    gradient = view.gradient()[:, np.asarray(velocity_channels(view, name))]
    return gradient if view.grid.ndim == 1 else gradient + jnp.swapaxes(gradient, 0, 1)


def eddy_flux(
    view: View, viscosity: Float[Array, "*grid"], schmidt: float | Array = 0.7, name: str = "eddy_flux"
) -> Float[Array, "axis c *grid"]:
    """F_ac = −2 ν_t S_ac for the velocity, −(ν_t / Sc_t) ∂_a c for every other channel, from ν_t at the cell centres."""
    scalars = view.gradient() / jnp.asarray(schmidt, view.u.dtype)
    columns = list(jnp.swapaxes(scalars, 0, 1))
    for c, column in zip(velocity_channels(view, name), jnp.swapaxes(deformation(view, name), 0, 1), strict=True):
        columns[c] = column
    slopes = jnp.stack(columns, axis=1)
    return -view.to_flux_points(jnp.broadcast_to(viscosity, slopes.shape)) * slopes


def gas_eddy_flux(
    view: View,
    viscosity: Callable[[Float[Array, "*grid"]], Float[Array, "*grid"]],
    pressure: Callable[[Float[Array, "*grid"]], Float[Array, "*grid"]],
    prandtl: float | Array = 0.7,
    schmidt: float | Array = 0.7,
) -> Float[Array, "axis c *grid"]:
    """τ = −μ_t (∇v + ∇vᵀ − ⅔ ∇·v) + p_t for the momentum, τ·v − (μ_t c_p / Pr_t) ∇T for the energy, −(μ_t / Sc_t) ∇c for scalars.

    **Arguments:** `viscosity` and `pressure`: μ_t ≥ 0 and p_t at the cell centres from |S|² = 2 S:S there.

    Mass does not flow. In periodic boxes −τ takes at least Σ 2 μ_t S*:S* ≥ 0 from the kinetic energy (S* is S without its trace),
    whatever the state and μ_t: slopes along other axes (∂_b v_a and ∂_b v_b at the faces of axis a) are multiplied by μ_t in the
    cells and averaged to the faces thereafter, which makes the sum over faces one of squares over cells.
    """
    gas, grid = gas_of(view), view.grid
    axes, centre, faces = range(grid.ndim), grid.centre, [view.flux_place(a, 0) for a in range(grid.ndim)]
    slope = [[view.derivative(v, centre, a)[0] for v in gas.velocity] for a in axes]
    mean = [[view.to(q, faces[a], centre) for q in slope[a]] for a in axes]
    square, dilatation = jnp.zeros((), view.u.dtype), jnp.zeros((), view.u.dtype)
    for a in axes:
        dilatation = dilatation + mean[a][a]
        for b in axes:
            square = square + view.to(slope[a][b] ** 2, faces[a], centre) + mean[a][b] * mean[b][a]
    mu, isotropic = viscosity(square), pressure(square)
    heat = gas.gamma / (gas.gamma - 1) / jnp.asarray(prandtl, view.u.dtype)
    rows = []
    for a in axes:

        def at_face(q: Array, a: int = a) -> Array:
            return view.to(q, centre, faces[a])

        mu_face = at_face(mu)
        stress = [-mu_face * slope[a][b] - at_face(mu * mean[b][a]) for b in axes]
        across = dilatation - mean[a][a]
        stress[a] = -(4 / 3) * mu_face * slope[a][a] + at_face((2 / 3) * mu * across + isotropic)
        energy = -heat * mu_face * view.derivative(gas.temperature, centre, a)[0]
        for tau, v in zip(stress, gas.velocity, strict=True):
            energy = energy + tau * at_face(v)
        mixing = -mu_face / jnp.asarray(schmidt, view.u.dtype)
        scalars = [mixing * view.derivative(c, centre, a)[0] for c in gas.fractions]
        rows.append(jnp.stack([jnp.zeros_like(energy), *stress, energy, *scalars]))
    return jnp.stack(rows)


class Smagorinsky(Flux):
    """ν_t = (c_s Δ)² |S|,  |S| = √(2 S:S);  in one dimension ν_t = (c_s Δ)² |∂x u| and F = −ν_t ∂x u.

    The eddy viscosity of large-eddy simulation (Smagorinsky 1963, doi:10.1175/1520-0493(1963)091<0099:GCEWTP>2.3.CO;2).

    **In a gas** τ = −2 ρ ν_t (S − ⅓ ∇·v) + ⅔ ρ k,  k = c_I Δ² |S|²; the energy flux is τ·v − ρ ν_t c_p/Pr_t ∇T. S and |S| are those
    of three dimensions in one and two, too (Moin et al. 1991, doi:10.1063/1.858164, with constant coefficients; Garnier, Adams &
    Sagaut 2009, doi:10.1007/978-90-481-2819-8).

    **Arguments:**

    - `cs`, the constant: 0.17 in 3D (Lilly 1967), 0.05–0.2 in 2D; 0.09 in compressible turbulence (Erlebacher et al. 1992,
      doi:10.1017/S0022112092001678). An array is trained.
    - `schmidt`: Sc_t, eddy viscosity over eddy diffusivity of passive scalars; about 0.7. An array is trained.
    - `prandtl`: Pr_t, eddy viscosity over eddy conductivity of a gas; 0.4–0.9. An array is trained.
    - `ci`: c_I, the energy of what is not resolved (Yoshizawa 1986, doi:10.1063/1.865552). 0 by default, since ρk is small beside p
      while the flow is not highly supersonic (Erlebacher et al. 1992); 0.0066 by simulations, 0.09 by theory. An array is trained.

    Conserves mass, momentum, energy and scalars; only removes kinetic energy (in a gas if c_I = 0, and it becomes heat) and scalar
    variance. Too dissipative in laminar regions.
    """

    constants = ("cs",)

    cs: float | Float[Array, ""] = eqx.field(default=0.17, converter=_scalar)
    schmidt: float | Float[Array, ""] = eqx.field(default=0.7, converter=_scalar)
    prandtl: float | Float[Array, ""] = eqx.field(default=0.7, converter=_scalar)
    ci: float | Float[Array, ""] = eqx.field(default=0.0, converter=_scalar)

    def __check_init__(self):
        _check_constant("cs", self.cs)
        _check_constant("ci", self.ci)
        _check_positive("schmidt", self.schmidt)
        _check_positive("prandtl", self.prandtl)

    def __call__(self, view: View, memory=None, key=None) -> Float[Array, "axis c *grid"]:
        width = jnp.asarray(self.cs, view.u.dtype) * filter_width(view)
        if is_gas([v.name for v in view.variables], view.grid.ndim):
            density = jnp.maximum(view.u[0], 0)
            energy = jnp.asarray(self.ci, view.u.dtype) * filter_width(view) ** 2
            return gas_eddy_flux(
                view,
                lambda square: density * width**2 * _safe_sqrt(square),
                lambda square: (2 / 3) * density * energy * square,
                self.prandtl,
                self.schmidt,
            )
        name, place = "Smagorinsky", view.grid.centre
        double = deformation(view, name)
        square = jnp.zeros((), view.u.dtype)
        for j, c in enumerate(velocity_channels(view, name)):
            for a in range(view.grid.ndim):
                square = square + view.to(double[a, j] ** 2, view.flux_place(a, c), place)
        # 2 S:S is half the square of 2 S; in one dimension there is nothing to count twice
        square = square if view.grid.ndim == 1 else 0.5 * square
        return eddy_flux(view, width**2 * _safe_sqrt(square), self.schmidt, name)


class Leith(Flux):
    """ν_t = (c Δ)³ |∇ω|: the eddy viscosity of the enstrophy cascade, for two dimensions.

    Leith 1996, doi:10.1016/0167-2789(96)00107-8.

    **Arguments:**

    - `c`, the constant: 0.1–0.5. An array is trained.
    - `schmidt`: Sc_t, eddy viscosity over eddy diffusivity of passive scalars; about 0.7. An array is trained.

    Conserves momentum and scalars; only removes kinetic energy and scalar variance. Acts more sharply at small scales than
    `Smagorinsky`.
    """

    constants = ("c",)

    c: float | Float[Array, ""] = eqx.field(default=0.2, converter=_scalar)
    schmidt: float | Float[Array, ""] = eqx.field(default=0.7, converter=_scalar)

    def __check_init__(self):
        _check_constant("c", self.c)
        _check_positive("schmidt", self.schmidt)

    def __call__(self, view: View, memory=None, key=None) -> Float[Array, "axis c *grid"]:
        if view.grid.ndim != 2:
            raise ValueError("Leith: the enstrophy cascade is two-dimensional; use Smagorinsky or Hyperviscosity")
        u, v = velocity_channels(view, "Leith")
        gradient = view.gradient()
        place = view.flux_place(0, v)
        vorticity = gradient[0, v] - gradient[1, u]
        square = jnp.zeros((), view.u.dtype)
        for axis in range(2):
            slope, at = view.derivative(vorticity, place, axis)
            square = square + view.to(slope**2, at, view.grid.centre)
        width = jnp.asarray(self.c, view.u.dtype) * filter_width(view)
        return eddy_flux(view, width**3 * _safe_sqrt(square), self.schmidt, "Leith")


class Hyperviscosity(Flux):
    """F_a = (c U/Δ) (Δx_a/π)² ∂_a (−∇̃²)^(p−1) q,  ∇̃² = Σ_a (Δx_a/π)² ∂_a²: ∂t q = … − (c U/Δ) (−∇̃²)^p q for every channel q.

    Damping by (k/k_max)^{2p}, the same along every axis: small scales are smoothed and large ones hardly touched, the larger p the
    less; where cells are cubes this is −(−1)^p ν_p ∇^{2p} q with ν_p = c U Δ^{2p−1} / π^{2p}. Large p piles energy up in front of
    the cut-off (Frisch et al. 2008, doi:10.1103/PhysRevLett.101.144501).

    **Arguments:**

    - `c`: the damping rate at k_max = π/Δx in units of U/Δ, so that it carries over to other grids and flows; U is the
      root mean square of the velocity less its mean, Δ = (Π Δx_a)^(1/d). 0.1–1. An array is trained.
    - `order`: p ≥ 1; 1 is viscosity, 2–4 usual.

    Conserves every sum; only removes kinetic energy and the variance of scalars. Nothing moves at rest or in uniform flow, whatever
    c is. Held or in explicit stages it is stable up to c d^p Δt U/Δ of about 2. Periodic grids only for p ≥ 2, as walls would need
    more boundary conditions than the flow has.
    """

    constants = ("c",)

    c: float | Float[Array, ""] = eqx.field(default=0.5, converter=_scalar)
    order: int = eqx.field(static=True, default=2)

    def __check_init__(self):
        _check_constant("c", self.c)
        if self.order < 1:
            raise ValueError(f"order: needs a positive whole number, found {self.order}")

    def __call__(self, view: View, memory=None, key=None) -> Float[Array, "axis c *grid"]:
        grid, dims = view.grid, range(view.grid.ndim)
        if self.order > 1 and not all(grid.periodic):
            raise ValueError("Hyperviscosity: order 2 and more needs periodic boundaries; use order 1")
        weights = [(h / np.pi) ** 2 for h in grid.spacing]
        q = view.u
        for _ in range(self.order - 1):
            slopes = eqx.tree_at(lambda v: v.u, view, q).gradient()
            q = -jnp.stack([
                sum(w * view.derivative(slopes[a, c], view.flux_place(a, c), a)[0] for a, w in zip(dims, weights, strict=True))
                for c in range(q.shape[0])
            ])  # fmt: skip
        velocity = view.centred()[np.asarray(velocity_channels(view, "Hyperviscosity"))]
        fluctuation = velocity - velocity.mean(axis=tuple(range(1, velocity.ndim)), keepdims=True)
        speed = _safe_sqrt(jnp.mean(jnp.sum(fluctuation**2, axis=0)))
        rate = jnp.asarray(self.c, q.dtype) * speed / filter_width(view)
        slopes = eqx.tree_at(lambda v: v.u, view, q).gradient()
        return -rate * jnp.stack([w * slopes[a] for a, w in zip(dims, weights, strict=True)])
