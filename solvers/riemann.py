"""F̂(W_L, W_R): approximate Riemann solvers for the ideal gas, pointwise.

All of them take primitive states (ρ, v, p, c) on both sides of a face as lists of channels and return the flux of the conserved
ones along `axis`. Wave speeds are S_L = min(v_L − a_L, v_R − a_R) and S_R = max(v_L + a_L, v_R + a_R) (Davis 1988,
doi:10.1137/0909030, eq. 4.5) with the sound speed a.
"""

import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
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


class _Waves(NamedTuple):
    """What the three waves of a face are made of."""

    sound_l: Array
    sound_r: Array
    low: Array
    high: Array
    mass_l: Array
    mass_r: Array
    middle: Array


def _waves(gamma: Array, left: Sequence[Array], right: Sequence[Array], axis: int, d: int) -> _Waves:
    """Sound speeds, S_L, S_R, ρ (S − v) on both sides, and the speed S* of the contact."""
    sides = [(w[0], w[1 + axis], w[d + 1]) for w in (left, right)]
    (rho_l, v_l, p_l), (rho_r, v_r, p_r) = sides
    # In gas so cold that v ± a rounds to v the waves would lie on top of one another.
    least = jnp.asarray(4 * float(jnp.finfo(rho_l.dtype).eps), rho_l.dtype)
    sound_l, sound_r = (jnp.maximum(jnp.sqrt(gamma * p / rho), least * jnp.abs(v)) for rho, v, p in sides)
    low, high = jnp.minimum(v_l - sound_l, v_r - sound_r), jnp.maximum(v_l + sound_l, v_r + sound_r)
    mass_l, mass_r = rho_l * (low - v_l), rho_r * (high - v_r)
    middle = (p_r - p_l + mass_l * v_l - mass_r * v_r) / (mass_l - mass_r)
    return _Waves(sound_l, sound_r, low, high, mass_l, mass_r, middle)


class _Fan(NamedTuple):
    """The flux through a face in terms of the mass flux, the pressure, the normal velocity and the specific energy there."""

    mass: Array
    pressure: Array
    normal: Array
    energy: Array


def _fan(gamma: Array, w: Sequence[Array], speed: Array, middle: Array, supersonic: Array, axis: int, d: int) -> _Fan:
    """At the face: the gas of side K itself, or that behind its wave, on which the wave has done work."""
    rho, v, p = w[0], w[1 + axis], w[d + 1]
    through = rho * (speed - v)
    mass = jnp.where(supersonic, rho * v, through / (speed - middle) * middle)
    pressure = jnp.where(supersonic, p, p + through * (middle - v))
    kinetic = _dot(w[1 : d + 1], w[1 : d + 1])
    work = jnp.where(supersonic, 0, (middle - v) * (middle + p / through))
    energy = p / ((gamma - 1) * rho) + 0.5 * kinetic + work
    return _Fan(mass, pressure, jnp.where(supersonic, v, middle), energy)


def _dot(a: Sequence[Array], b: Sequence[Array]) -> Array:
    total = a[0] * b[0]
    for p, q in zip(a[1:], b[1:], strict=True):
        total = total + p * q
    return total


def _flux_of(fan: _Fan, w: Sequence[Array], axis: int, d: int) -> Channels:
    momentum = [fan.mass * fan.normal + fan.pressure if a == axis else fan.mass * q for a, q in enumerate(w[1 : d + 1])]
    return [fan.mass, *momentum, fan.mass * fan.energy + fan.normal * fan.pressure, *(fan.mass * c for c in w[d + 2 :])]


@functools.partial(jax.custom_jvp, nondiff_argnums=(0, 1))
def _hllc(axis: int, d: int, gamma: Array, left: Channels, right: Channels) -> Channels:
    waves = _waves(gamma, left, right, axis, d)
    from_left = waves.middle > 0
    upwind = lambda a, b: jnp.where(from_left, a, b)  # noqa: E731
    w = [upwind(a, b) for a, b in zip(left, right, strict=True)]
    supersonic = upwind(waves.low, -waves.high) > 0
    return _flux_of(_fan(gamma, w, upwind(waves.low, waves.high), waves.middle, supersonic, axis, d), w, axis, d)


@_hllc.defjvp
def _hllc_jvp(axis: int, d: int, primals, tangents):
    """dF̂ as sums of products of tangents with coefficients that are computed once.

    The transpose of this is nine times cheaper on CPU than what automatic differentiation makes of all the divisions, square roots
    and choices, which XLA would evaluate again for each of the ten channels.
    """
    (gamma, left, right), (d_gamma, d_left, d_right) = primals, tangents
    s = _waves(gamma, left, right, axis, d)
    (rho_l, v_l, p_l), (rho_r, v_r, p_r) = ((w[0], w[1 + axis], w[d + 1]) for w in (left, right))
    (d_rho_l, d_v_l, d_p_l), (d_rho_r, d_v_r, d_p_r) = ((w[0], w[1 + axis], w[d + 1]) for w in (d_left, d_right))
    # da = (γ dp − γ (p/ρ) dρ + p dγ) / (2 ρ a)
    per_l, per_r = 0.5 / (rho_l * s.sound_l), 0.5 / (rho_r * s.sound_r)
    d_sound_l = (per_l * gamma) * d_p_l - (per_l * gamma * p_l / rho_l) * d_rho_l + (per_l * p_l) * d_gamma
    d_sound_r = (per_r * gamma) * d_p_r - (per_r * gamma * p_r / rho_r) * d_rho_r + (per_r * p_r) * d_gamma
    slower = jnp.where(v_l - s.sound_l <= v_r - s.sound_r, 1, 0).astype(rho_l.dtype)
    faster = jnp.where(v_l + s.sound_l >= v_r + s.sound_r, 1, 0).astype(rho_l.dtype)
    d_low = slower * (d_v_l - d_sound_l) + (1 - slower) * (d_v_r - d_sound_r)
    d_high = faster * (d_v_l + d_sound_l) + (1 - faster) * (d_v_r + d_sound_r)
    d_mass_l = (s.low - v_l) * d_rho_l + rho_l * (d_low - d_v_l)
    d_mass_r = (s.high - v_r) * d_rho_r + rho_r * (d_high - d_v_r)
    per = 1 / (s.mass_l - s.mass_r)
    d_middle = (
        per * (d_p_r - d_p_l)
        + (per * (v_l - s.middle)) * d_mass_l
        + (per * s.mass_l) * d_v_l
        - (per * (v_r - s.middle)) * d_mass_r
        - (per * s.mass_r) * d_v_r
    )
    from_left = s.middle > 0
    upwind = lambda a, b: jnp.where(from_left, a, b)  # noqa: E731
    w, d_w = ([upwind(a, b) for a, b in zip(*pair, strict=True)] for pair in ((left, right), (d_left, d_right)))
    speed, d_speed = upwind(s.low, s.high), upwind(d_low, d_high)
    supersonic = upwind(s.low, -s.high) > 0
    fan = _fan(gamma, w, speed, s.middle, supersonic, axis, d)
    rho, v, p = w[0], w[1 + axis], w[d + 1]
    d_rho, d_v, d_p = d_w[0], d_w[1 + axis], d_w[d + 1]
    # Below: of the gas behind the wave, with coefficients that vanish where the flow is supersonic.
    behind = lambda q: jnp.where(supersonic, 0, q)  # noqa: E731
    through, ratio = rho * (speed - v), 1 / (speed - s.middle)
    d_through = (speed - v) * d_rho + rho * (d_speed - d_v)
    push = s.middle - v
    star = through * ratio
    d_mass = (
        jnp.where(supersonic, v, 0) * d_rho
        + jnp.where(supersonic, rho, 0) * d_v
        + behind(ratio * s.middle) * d_through
        + behind(star * speed * ratio) * d_middle
        - behind(star * s.middle * ratio) * d_speed
    )
    d_pressure = d_p + behind(push) * d_through + behind(through) * (d_middle - d_v)
    moving = jnp.where(supersonic, 1, 0).astype(rho.dtype)
    d_normal = moving * d_v + (1 - moving) * d_middle
    per_through = behind(1 / through)
    inner = 1 / ((gamma - 1) * rho)
    against = behind(s.middle) + p * per_through
    d_energy = (
        (inner + behind(push) * per_through) * d_p
        - (inner * p / rho) * d_rho
        - (inner * p / (gamma - 1)) * d_gamma
        + _dot(w[1 : d + 1], d_w[1 : d + 1])
        + (against + behind(push)) * d_middle
        - against * d_v
        - (behind(push) * p * per_through * per_through) * d_through
    )
    d_momentum = [
        fan.mass * d_normal + fan.normal * d_mass + d_pressure if a == axis else fan.mass * d_w[1 + a] + w[1 + a] * d_mass
        for a in range(d)
    ]
    d_total = fan.mass * d_energy + fan.energy * d_mass + fan.normal * d_pressure + fan.pressure * d_normal
    scalars = [fan.mass * dc + c * d_mass for c, dc in zip(w[d + 2 :], d_w[d + 2 :], strict=True)]
    return _flux_of(fan, w, axis, d), [d_mass, *d_momentum, d_total, *scalars]


def hllc(equation: CompressibleNavierStokes, left: Sequence[Array], right: Sequence[Array], axis: int, d: int) -> Channels:
    """F̂ = F_K where the flow is supersonic, else F*_K = (ρ* S*, ρ* S* v + p*, S* (E* + p*)), K the side that S* comes from.

    Three waves, contacts included (Toro, Spruce & Speares 1994, doi:10.1007/BF01414629; Batten et al. 1997,
    doi:10.1137/S1064827593260140): isolated contacts and shear waves are resolved exactly; shocks are not, with these wave speeds.
    """
    return _hllc(axis, d, jnp.asarray(equation.gamma, left[0].dtype), list(left), list(right))


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
