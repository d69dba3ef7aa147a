"""(q_{j−G+1}, …, q_{j+G}) -> (q_L, q_R): values on both sides of face j + ½ from cell means.

Every scheme takes channels that have G more cells on both sides of `axis` and gives the values at the n + 1 faces of the n cells
inside.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from hybridsim.solvers.staggering import part

Pair = tuple[Array, Array]
"""Values left and right of the faces."""


def windows(q: Array, halo: int, axis: int) -> list[Array]:
    """The 2G cells around each face, from the leftmost to the rightmost."""
    faces = q.shape[axis] - 2 * halo + 1
    return [part(q, k, k + faces, axis) for k in range(2 * halo)]


# --- limited slopes --------------------------------------------------------------------------------------------------------------


@jax.custom_jvp
def van_leer(below: Array, above: Array) -> Array:
    """s = 2ab / (a + b) where ab > 0, else 0 (van Leer 1974, doi:10.1016/0021-9991(74)90019-9)."""
    product, total = below * above, below + above
    alike = product > 0
    return jnp.where(alike, 2 * product / jnp.where(alike, total, 1), 0)


@van_leer.defjvp
def _van_leer_jvp(primals, tangents):
    """ds = 2 (b² da + a² db) / (a + b)²."""
    (below, above), (d_below, d_above) = primals, tangents
    alike = below * above > 0
    per_total = jnp.where(alike, 1, 0) / jnp.where(alike, below + above, 1)
    a, b = below * per_total, above * per_total
    return van_leer(below, above), (2 * b * b) * d_below + (2 * a * a) * d_above


@jax.custom_jvp
def monotonised_central(below: Array, above: Array) -> Array:
    """s = sgn(a) min(½|a + b|, 2|a|, 2|b|) where ab > 0, else 0 (van Leer 1977, doi:10.1016/0021-9991(77)90095-X, eq. 66)."""
    magnitude = jnp.minimum(0.5 * jnp.abs(below + above), 2 * jnp.minimum(jnp.abs(below), jnp.abs(above)))
    return jnp.where(below * above > 0, jnp.where(below > 0, magnitude, -magnitude), 0)


@monotonised_central.defjvp
def _monotonised_central_jvp(primals, tangents):
    """ds = 2 da where 3|a| < |b|, 2 db where 3|b| < |a|, else ½ (da + db)."""
    (below, above), (d_below, d_above) = primals, tangents
    a, b = jnp.abs(below), jnp.abs(above)
    alike = below * above > 0
    of_below = jnp.where(alike, jnp.where(3 * a < b, 2, jnp.where(3 * b < a, 0, 0.5)), 0).astype(below.dtype)
    of_above = jnp.where(alike, jnp.where(3 * b < a, 2, jnp.where(3 * a < b, 0, 0.5)), 0).astype(below.dtype)
    return monotonised_central(below, above), of_below * d_below + of_above * d_above


def _linear(limiter: Callable[[Array, Array], Array]) -> Callable[[Array, Array | None, int], Pair]:
    def reconstruct(q: Array, edge: Array | None, axis: int) -> Pair:
        n = q.shape[axis]
        jump = part(q, 1, n, axis) - part(q, 0, n - 1, axis)
        half = 0.5 * limiter(part(jump, 0, n - 2, axis), part(jump, 1, n - 1, axis))
        inner = part(q, 1, n - 1, axis)
        faces = n - 3
        left = part(inner, 0, faces, axis) + part(half, 0, faces, axis)
        return left, part(inner, 1, faces + 1, axis) - part(half, 1, faces + 1, axis)

    return reconstruct


# --- parabolas -------------------------------------------------------------------------------------------------------------------


def _parabolic_edges(q: Array, axis: int) -> Array:
    """Upwind-biased values of fifth order at both ends of each cell that has two neighbours on each side, stacked in front."""
    cells = q.shape[axis] - 4
    ll, left, own, right, rr = (part(q, k, k + cells, axis) for k in range(5))
    bends = ll - 2 * left + own, left - 2 * own + right, own - 2 * right + rr
    below = _bounded_edge(own, left, (2 * rr - 13 * right + 47 * own + 27 * left - 3 * ll) / 60, bends[1], bends[0])
    above = _bounded_edge(own, right, (2 * ll - 13 * left + 47 * own + 27 * right - 3 * rr) / 60, bends[1], bends[2])
    return jnp.stack([below, above])


def _parabolic(q: Array, edges: Array | None, axis: int) -> Pair:
    """Limited parabolas; smooth extrema are kept."""
    cells = q.shape[axis] - 4
    below, above = _parabolic_edges(q, axis) if edges is None else edges
    ll, left, own, right, rr = (part(q, k, k + cells, axis) for k in range(5))
    minus, plus = own - below, above - own
    d_own = 6 * (below - 2 * own + above)
    extremum = (minus * plus <= 0) | ((own - ll) * (rr - own) <= 0)
    curvature = _curvature(d_own, ll - 2 * left + own, left - 2 * own + right, own - 2 * right + rr)
    tiny = jnp.finfo(q.dtype).eps * jnp.maximum(jnp.abs(ll), jnp.maximum(jnp.abs(own), jnp.abs(rr)))
    flat = jnp.abs(d_own) <= tiny
    keep = jnp.where(flat, 0, curvature / jnp.where(flat, 1, d_own))
    # Where the parabola would have its extremum inside the cell, the nearer edge decides.
    steep_minus = jnp.where(jnp.abs(minus) > 2 * jnp.abs(plus), 2 * plus, minus)
    steep_plus = jnp.where(jnp.abs(plus) > 2 * jnp.abs(minus), 2 * minus, plus)
    low = own - jnp.where(extremum, keep * minus, steep_minus)
    high = own + jnp.where(extremum, keep * plus, steep_plus)
    return part(high, 0, cells - 1, axis), part(low, 1, cells, axis)


def _bounded_edge(own: Array, other: Array, edge: Array, bend: Array, other_bend: Array) -> Array:
    """The value between two cells, bounded by limited second differences where it is not between theirs."""
    curvature = _curvature(3 * (own - 2 * edge + other), bend, other_bend)
    return jnp.where((edge - own) * (other - edge) < 0, 0.5 * (own + other) - curvature / 6, edge)


def _curvature(first: Array, *others: Array, excess: float = 1.25) -> Array:
    """The second difference of least magnitude if all have one sign, the others enlarged by a quarter, else 0."""
    least, alike = jnp.abs(first), jnp.ones(first.shape, bool)
    for other in others:
        least = jnp.minimum(least, excess * jnp.abs(other))
        alike = alike & (first * other > 0)
    return jnp.where(alike, jnp.where(first > 0, least, -least), 0)


# --- weighted essentially non-oscillatory ----------------------------------------------------------------------------------------


_CANDIDATES = (2, -7, 11, 0, 0), (0, -1, 5, 2, 0), (0, 0, 2, 5, -1)
"""Six times the values at the face right of the middle of five cells, by the parabolas through each three."""

_BENDS = (1, -2, 1, 0, 0), (0, 1, -2, 1, 0), (0, 0, 1, -2, 1)
_SLOPES = (1, -4, 3, 0, 0), (0, 1, 0, -1, 0), (0, 0, 3, -4, 1)
_IDEAL = 1, 6, 3


def _dot(row: Sequence[int], cells: Sequence[Array]) -> Array:
    terms = [cell if x == 1 else x * cell for x, cell in zip(row, cells, strict=True) if x]
    return sum(terms[1:], start=terms[0])


class _Weights(NamedTuple):
    """β₀ − β₂, β_k + ε τ, and w_k = d_k (1 + τ/(β_k + ε τ)) with τ = |β₀ − β₂|."""

    difference: Array
    bounded: list[Array]
    weights: list[Array]


def _weights(cells: Sequence[Array]) -> _Weights:
    dtype = cells[0].dtype
    tiny = jnp.asarray(np.sqrt(float(jnp.finfo(dtype).tiny)), dtype)
    beta = [13 / 12 * _dot(bend, cells) ** 2 + 0.25 * _dot(slope, cells) ** 2 for bend, slope in zip(_BENDS, _SLOPES, strict=True)]
    difference = beta[0] - beta[2]
    # Bounded, so that nothing overflows in single precision.
    bounded = [q + 1e-8 * jnp.abs(difference) + tiny for q in beta]
    weights = [ideal * (1 + jnp.abs(difference) / q) for ideal, q in zip(_IDEAL, bounded, strict=True)]
    return _Weights(difference, bounded, weights)


@jax.custom_jvp
def _weno5z_side(*cells: Array) -> Array:
    """The value at the face right of the middle of five cells."""
    weights = _weights(cells).weights
    total = _dot_arrays(weights, [_dot(row, cells) for row in _CANDIDATES])
    return total / (6 * (weights[0] + weights[1] + weights[2]))


@_weno5z_side.defjvp
def _weno5z_side_jvp(cells, tangents):
    """dq = Σ_k w_k dp_k/W + Σ_k B_k dβ_k, gathered into one factor per cell: the backward pass of the rule that JAX would derive
    evaluates the weights anew for each neighbour, and takes three times as long."""
    difference, bounded, weights = _weights(cells)
    tau, sign = jnp.abs(difference), jnp.sign(difference)
    p = [_dot(row, cells) / 6 for row in _CANDIDATES]
    per_total = 1 / (weights[0] + weights[1] + weights[2])
    value = _dot_arrays(weights, p) * per_total
    # dw_k = d_k ((β_k + tiny) dτ − τ dβ_k) / (β_k + ετ + tiny)²; `bounded` is that last sum
    gains = [(x - value) * ideal * per_total / q**2 for x, ideal, q in zip(p, _IDEAL, bounded, strict=True)]
    of_tau = sign * _dot_arrays(gains, [q - 1e-8 * tau for q in bounded])
    of_beta = [of_tau - gains[0] * tau, -gains[1] * tau, -of_tau - gains[2] * tau]
    of_bends = [13 / 6 * x * _dot(row, cells) for x, row in zip(of_beta, _BENDS, strict=True)]
    of_slopes = [0.5 * x * _dot(row, cells) for x, row in zip(of_beta, _SLOPES, strict=True)]
    shares = [w * per_total / 6 for w in weights]
    change = jnp.zeros_like(value)
    for j, tangent in enumerate(tangents):
        column = [row[j] for row in (*_CANDIDATES, *_BENDS, *_SLOPES)]
        change = change + _dot(column, [*shares, *of_bends, *of_slopes]) * tangent
    return _weno5z_side(*cells), change


def _dot_arrays(a: Sequence[Array], b: Sequence[Array]) -> Array:
    return a[0] * b[0] + a[1] * b[1] + a[2] * b[2]


def _weno5z(q: Array, edge: Array | None, axis: int) -> Pair:
    a, b, c, d, e, f = windows(q, 3, axis)
    return _weno5z_side(a, b, c, d, e), _weno5z_side(f, e, d, c, b)


def _constant(q: Array, edge: Array | None, axis: int) -> Pair:
    faces = q.shape[axis] - 1
    return part(q, 0, faces, axis), part(q, 1, faces + 1, axis)


class Reconstruction(NamedTuple):
    """One scheme: G cells of halo, the order that free weights must keep, (q with halo, edges, axis) -> values at the faces, and
    what is worth storing on the way: (q with halo, axis) -> edges (None: nothing; then `faces` takes None)."""

    halo: int
    order: int
    faces: Callable[[Float[Array, "..."], Float[Array, "..."] | None, int], Pair]
    edges: Callable[[Float[Array, "..."], int], Float[Array, "..."]] | None = None


RECONSTRUCTIONS: dict[str, Reconstruction] = {
    "constant": Reconstruction(1, 1, _constant),
    "plm_mc": Reconstruction(2, 2, _linear(monotonised_central)),
    "plm_van_leer": Reconstruction(2, 2, _linear(van_leer)),
    "ppm": Reconstruction(3, 3, _parabolic, _parabolic_edges),
    "weno5z": Reconstruction(3, 5, _weno5z),
}
"""`reconstruction` of the solver.

- `constant`: first order.
- `plm_van_leer`, `plm_mc`: linear with limited slopes, second order; the monotonised central limiter is the less dissipative one.
- `ppm`: parabolas (Colella & Woodward 1984, doi:10.1016/0021-9991(84)90143-8) with limiters that keep smooth extrema (Colella &
  Sekora 2008, doi:10.1016/j.jcp.2008.03.034, section 2), through edge values biased upwind (Suresh & Huynh 1997,
  doi:10.1006/jcph.1997.5745, eq. 2.1): without characteristic tracing, centred ones would not damp the shortest waves. Third order.
- `weno5z`: fifth order (Borges et al. 2008, doi:10.1016/j.jcp.2007.11.038, eqs. 19–28 with power 1: with power 2 weak sound waves
  die out too fast).
"""


def null_space(name: str) -> np.ndarray:
    """Z `(free, 2G)`: orthonormal combinations of the cells around a face that vanish for polynomials below the scheme's order.

    Differences of rising order: the discrete orthogonal polynomials of degrees order, …, 2G − 1 on 2G points, with positive leading
    coefficients, so that trained weights mean the same everywhere. First order leaves nothing free.
    """
    scheme = RECONSTRUCTIONS[name]
    if scheme.order == 1:
        return np.zeros((0, 2 * scheme.halo))
    points = np.arange(2 * scheme.halo) - (scheme.halo - 0.5)
    basis, triangle = np.linalg.qr(np.vander(points, increasing=True))
    return (basis * np.sign(np.diag(triangle)))[:, scheme.order :].T


def characteristic(
    primitive: Sequence[Array], conserved: Sequence[Array], scheme: Reconstruction, gamma: Array, axis: int, d: int
) -> tuple[list[Array], list[Array]]:
    """Reconstruction of L U, L the left eigenvectors of ∂F/∂U at the mean of the two cells of a face; U on both sides.

    With P = (γ − 1)(E − v̄·m + ½ v̄² ρ) and V = (m − v̄ ρ)/ρ̄ along the axis, linear in U = (ρ, m, E, ρc), the amplitudes are P ∓ ρ̄ā V,
    ρ − P/ā², and (m − v̄ ρ)/ρ̄ and (ρc − c̄ ρ)/ρ̄ of what travels with the gas. Means of U, unlike those of pressures, are what the
    solver holds, so no order is lost. Each face has its own combinations: its 2G cells are stacked along a new axis.
    """
    halo = scheme.halo
    mean = [
        0.5 * (part(q, halo - 1, q.shape[axis] - halo, axis) + part(q, halo, q.shape[axis] - halo + 1, axis)) for q in primitive
    ]
    around = list(zip(*(windows(q, halo, axis) for q in conserved), strict=True))
    rho, v = mean[0], mean[1 : d + 1]
    per_rho = 1 / rho
    a2 = gamma * mean[d + 1] * per_rho
    impedance, kinetic = rho * jnp.sqrt(a2), 0.5 * _product(v, v)

    def pressure_of(u: Sequence[Array]) -> Array:
        return (gamma - 1) * (u[d + 1] - _product(v, u[1 : d + 1]) + kinetic * u[0])

    def at_faces(values: list[Array]) -> Pair:
        """The scheme along the new axis has exactly one face inside."""
        left, right = scheme.faces(jnp.stack(values), None, 0)
        return left[0], right[0]

    pressures = [pressure_of(u) for u in around]
    carried = {
        c: at_faces([(u[c] - mean[c] * u[0]) * per_rho for u in around]) for c in range(1, len(mean)) if c not in (1 + axis, d + 1)
    }
    pushes = [impedance * per_rho * (u[1 + axis] - v[axis] * u[0]) for u in around]
    down = at_faces([p - q for p, q in zip(pressures, pushes, strict=True)])
    up = at_faces([p + q for p, q in zip(pressures, pushes, strict=True)])
    entropy = at_faces([u[0] - p / a2 for u, p in zip(around, pressures, strict=True)])
    sides = []
    for side in range(2):
        pressure = 0.5 * (down[side] + up[side])
        density = entropy[side] + pressure / a2
        moving = {**{c: q[side] for c, q in carried.items()}, 1 + axis: (up[side] - down[side]) / (2 * impedance)}
        momentum = [rho * moving[1 + b] + v[b] * density for b in range(d)]
        energy = pressure / (gamma - 1) + _product(v, momentum) - kinetic * density
        scalars = [rho * moving[c] + mean[c] * density for c in range(d + 2, len(mean))]
        sides.append([density, *momentum, energy, *scalars])
    return sides[0], sides[1]


def _product(a: Sequence[Array], b: Sequence[Array]) -> Array:
    total = a[0] * b[0]
    for p, q in zip(a[1:], b[1:], strict=True):
        total = total + p * q
    return total
