"""F̂(W_L, W_R): approximate Riemann solvers for the ideal gas, pointwise.

All of them take primitive states (ρ, v, p, c) on both sides of a face as lists of channels and return the flux of the conserved
ones along `axis`. Wave speeds are S_L = min(v_L − a_L, v_R − a_R) and S_R = max(v_L + a_L, v_R + a_R) (Davis 1988,
doi:10.1137/0909030, eq. 4.5) with the sound speed a.
"""

from collections.abc import Callable, Sequence

import jax.numpy as jnp
from jaxtyping import Array

from hybridsim.solvers.compressible import Channels, CompressibleNavierStokes

RiemannSolver = Callable[[CompressibleNavierStokes, Sequence[Array], Sequence[Array], int, int], Channels]
"""(equation, W_L, W_R, axis, dimensions) -> flux of ρ, ρv, E, ρc along the axis."""


def _speeds(equation: CompressibleNavierStokes, left, right, axis: int, d: int) -> tuple[Array, Array]:
    """(S_L, S_R)."""
    gamma = jnp.asarray(equation.gamma, left[0].dtype)
    a = [jnp.sqrt(gamma * w[d + 1] / w[0]) for w in (left, right)]
    v = [w[1 + axis] for w in (left, right)]
    return jnp.minimum(v[0] - a[0], v[1] - a[1]), jnp.maximum(v[0] + a[0], v[1] + a[1])


def largest_speed(equation: CompressibleNavierStokes, left, right, axis: int, d: int) -> Array:
    """α = max(|v| + a) of both sides."""
    gamma = jnp.asarray(equation.gamma, left[0].dtype)
    speeds = [jnp.abs(w[1 + axis]) + jnp.sqrt(gamma * w[d + 1] / w[0]) for w in (left, right)]
    return jnp.maximum(speeds[0], speeds[1])


def llf(equation: CompressibleNavierStokes, left: Sequence[Array], right: Sequence[Array], axis: int, d: int) -> Channels:
    """F̂ = ½ (F_L + F_R) − ½ α (U_R − U_L),  α = max(|v| + a).

    The local Lax–Friedrichs (Rusanov) flux: the most dissipative one, and positive with first-order states while
    Δt Σ_a α_a/Δx_a ≤ ½.
    """
    alpha = largest_speed(equation, left, right, axis, d)
    fluxes = [equation.flux(w, axis, d) for w in (left, right)]
    states = [equation.conserved_channels(w, d) for w in (left, right)]
    return [0.5 * (f + g - alpha * (q - p)) for f, g, p, q in zip(fluxes[0], fluxes[1], states[0], states[1], strict=True)]


def hlle(equation: CompressibleNavierStokes, left: Sequence[Array], right: Sequence[Array], axis: int, d: int) -> Channels:
    """F̂ = (S_R⁺ F_L − S_L⁻ F_R + S_L⁻ S_R⁺ (U_R − U_L)) / (S_R⁺ − S_L⁻).

    Two waves (Harten, Lax & van Leer 1983, doi:10.1137/1025002, eq. 3.6; Einfeldt 1988, doi:10.1137/0725021): contacts and shear
    layers are smeared.
    """
    low, high = _speeds(equation, left, right, axis, d)
    low, high = jnp.minimum(low, 0), jnp.maximum(high, 0)
    per_width = 1 / (high - low)
    fluxes = [equation.flux(w, axis, d) for w in (left, right)]
    states = [equation.conserved_channels(w, d) for w in (left, right)]
    return [
        (high * f - low * g + low * high * (q - p)) * per_width
        for f, g, p, q in zip(fluxes[0], fluxes[1], states[0], states[1], strict=True)
    ]


def hllc(equation: CompressibleNavierStokes, left: Sequence[Array], right: Sequence[Array], axis: int, d: int) -> Channels:
    """F̂ = F_K where the flow is supersonic, else F*_K = (ρ* S*, ρ* S* v + p*, S* (E* + p*)), K the side that S* comes from.

    Three waves, contacts included (Toro, Spruce & Speares 1994, doi:10.1007/BF01414629; Batten et al. 1997,
    doi:10.1137/S1064827593260140): isolated contacts, shear waves and shocks are resolved exactly.
    """
    rho_l, v_l, p_l = left[0], left[1 + axis], left[d + 1]
    rho_r, v_r, p_r = right[0], right[1 + axis], right[d + 1]
    low, high = _speeds(equation, left, right, axis, d)
    mass_l, mass_r = rho_l * (low - v_l), rho_r * (high - v_r)
    middle = (p_r - p_l + mass_l * v_l - mass_r * v_r) / (mass_l - mass_r)
    from_left = middle > 0
    upwind = lambda a, b: jnp.where(from_left, a, b)  # noqa: E731
    supersonic = upwind(low, -high) > 0
    rho, v, p, speed = upwind(rho_l, rho_r), upwind(v_l, v_r), upwind(p_l, p_r), upwind(low, high)
    through = rho * (speed - v)
    star_density = through / (speed - middle)
    mass = jnp.where(supersonic, rho * v, star_density * middle)
    pressure = jnp.where(supersonic, p, p + through * (middle - v))
    normal = jnp.where(supersonic, v, middle)
    velocity = [normal if a == axis else upwind(left[1 + a], right[1 + a]) for a in range(d)]
    gamma = jnp.asarray(equation.gamma, rho.dtype)
    # Energy per mass behind the wave: that of side K, and the work that the wave has done on the gas.
    own = [upwind(left[1 + a], right[1 + a]) for a in range(d)]
    kinetic = own[0] * own[0]
    for q in own[1:]:
        kinetic = kinetic + q * q
    specific = p / ((gamma - 1) * rho) + 0.5 * kinetic
    work = jnp.where(supersonic, 0, (middle - v) * (middle + p / through))
    momentum = [mass * q + pressure if a == axis else mass * q for a, q in enumerate(velocity)]
    energy = mass * (specific + work) + normal * pressure
    return [mass, *momentum, energy, *(mass * upwind(a, b) for a, b in zip(left[d + 2 :], right[d + 2 :], strict=True))]


def hllc_low_mach(equation: CompressibleNavierStokes, left: Sequence[Array], right: Sequence[Array], axis: int, d: int) -> Channels:
    """`hllc` of v_{L,R} = ½ (v_L + v_R) ± ½ z (v_L − v_R),  z = min(1, max(M_L, M_R)).

    The jump of the velocity is scaled by the local Mach number M = |v|/a, so that the dissipation of kinetic energy no longer grows
    as 1/M in slow flow (Thornber et al. 2008, doi:10.1016/j.jcp.2008.01.036, eqs. 26–27). Where M ≥ 1 it is `hllc`.
    """
    gamma = jnp.asarray(equation.gamma, left[0].dtype)

    def squared_mach(w: Sequence[Array]) -> Array:
        square = w[1] * w[1]
        for q in w[2 : d + 1]:
            square = square + q * q
        return square * w[0] / (gamma * w[d + 1])

    square = jnp.minimum(jnp.maximum(squared_mach(left), squared_mach(right)), 1)
    moving = square > 0
    z = jnp.where(moving, jnp.sqrt(jnp.where(moving, square, 1)), 0)
    left, right = list(left), list(right)
    for a in range(1, d + 1):
        mean, half = 0.5 * (left[a] + right[a]), 0.5 * z * (left[a] - right[a])
        left[a], right[a] = mean + half, mean - half
    return hllc(equation, left, right, axis, d)


RIEMANN_SOLVERS: dict[str, RiemannSolver] = {"hllc": hllc, "hllc_low_mach": hllc_low_mach, "hlle": hlle, "llf": llf}
"""`riemann` of the solver."""
