"""(ρ, u, p)(x/t): the exact solution of the Riemann problem of an ideal gas, by a way of its own, for the tests.

Toro 2009, doi:10.1007/b79761, chapter 4; vacuum included. States are (ρ, u, p); everything is float64 on the host.
"""

from typing import NamedTuple

import numpy as np


class Star(NamedTuple):
    """Between the two outer waves: one pressure and velocity, a density on each side of the contact."""

    pressure: float
    velocity: float
    left: float
    right: float


def _sound(state, gamma):
    return np.sqrt(gamma * state[2] / state[0])


def _jump(p, state, gamma):
    """f_K(p) of Toro's eq. 4.6, 4.7: what the velocity changes by across the wave that leads to pressure p."""
    rho, _, pressure = state
    if p > pressure:
        return (p - pressure) * np.sqrt(2 / ((gamma + 1) * rho) / (p + (gamma - 1) / (gamma + 1) * pressure))
    return 2 * _sound(state, gamma) / (gamma - 1) * ((p / pressure) ** ((gamma - 1) / (2 * gamma)) - 1)


def _behind(p, state, gamma):
    """The density behind the wave that leads to pressure p."""
    rho, _, pressure = state
    ratio, g = p / pressure, (gamma - 1) / (gamma + 1)
    return rho * (ratio + g) / (g * ratio + 1) if p > pressure else rho * ratio ** (1 / gamma)


def makes_vacuum(left, right, gamma):
    """Whether the two states fly apart faster than they can expand."""
    return 2 * (_sound(left, gamma) + _sound(right, gamma)) / (gamma - 1) <= right[1] - left[1]


def star(left, right, gamma):
    """The star region, its pressure by bisection of ln p: slow, and never wrong."""
    if makes_vacuum(left, right, gamma):
        raise ValueError("a vacuum appears: there is no star region")
    excess = lambda p: _jump(p, left, gamma) + _jump(p, right, gamma) + right[1] - left[1]  # noqa: E731
    low = high = np.log(0.5 * (left[2] + right[2]))
    while excess(np.exp(low)) > 0:
        low -= 1.0
    while excess(np.exp(high)) < 0:
        high += 1.0
    for _ in range(200):
        middle = 0.5 * (low + high)
        if not low < middle < high:
            break
        low, high = (middle, high) if excess(np.exp(middle)) < 0 else (low, middle)
    p = np.exp(0.5 * (low + high))
    u = 0.5 * (left[1] + right[1] + _jump(p, right, gamma) - _jump(p, left, gamma))
    return Star(float(p), float(u), float(_behind(p, left, gamma)), float(_behind(p, right, gamma)))


def _one_side(state, gamma, sign, p, u, density):
    """(speeds of the outer wave, function of ξ inside it): `sign` −1 is the left wave; p None: it ends in a vacuum."""
    rho, velocity, pressure = state
    c = _sound(state, gamma)

    def fan(xi):
        share = 2 / (gamma + 1) - sign * (gamma - 1) / ((gamma + 1) * c) * (velocity - xi)
        share = np.maximum(share, 0.0)
        speed = 2 / (gamma + 1) * (-sign * c + (gamma - 1) / 2 * velocity + xi)
        return rho * share ** (2 / (gamma - 1)), speed, pressure * share ** (2 * gamma / (gamma - 1))

    if p is None:
        return (velocity + sign * c, velocity - sign * 2 * c / (gamma - 1)), fan
    if p > pressure:
        shock = velocity + sign * c * np.sqrt((gamma + 1) / (2 * gamma) * p / pressure + (gamma - 1) / (2 * gamma))
        return (shock, shock), fan
    return (velocity + sign * c, u + sign * np.sqrt(gamma * p / density)), fan


def waves(left, right, gamma):
    """Speeds of every kink and jump, in order."""
    return _solution(left, right, gamma)[0]


def _solution(left, right, gamma):
    """(speeds in order, (ρ, u, p) as a function of ξ in each of the intervals between them)."""
    constant = lambda state: lambda xi: tuple(np.full_like(xi, q) for q in state)  # noqa: E731
    if makes_vacuum(left, right, gamma):
        (head, tail), fan = _one_side(left, gamma, -1, None, None, None)
        (end, begin), other = _one_side(right, gamma, 1, None, None, None)
        empty = lambda xi: (np.zeros_like(xi), 0.5 * (tail + begin) + 0 * xi, np.zeros_like(xi))  # noqa: E731
        return (head, tail, begin, end), (constant(left), fan, empty, other, constant(right))
    p, u, rho_left, rho_right = star(left, right, gamma)
    (head, tail), fan = _one_side(left, gamma, -1, p, u, rho_left)
    (end, begin), other = _one_side(right, gamma, 1, p, u, rho_right)
    pieces = (constant(left), fan, constant((rho_left, u, p)), constant((rho_right, u, p)), other, constant(right))
    return (head, tail, u, begin, end), pieces


def sample(left, right, gamma, xi):
    """(3, points): (ρ, u, p) at ξ = x/t."""
    speeds, pieces = _solution(left, right, gamma)
    xi = np.asarray(xi, np.float64)
    which = np.searchsorted(speeds, xi, side="right")
    out = np.empty((3, *xi.shape))
    for i, piece in enumerate(pieces):
        out[:, which == i] = np.stack(piece(xi[which == i]))
    return out


def conserved(primitive, gamma):
    """(ρ, ρu, E) of (ρ, u, p)."""
    rho, u, p = primitive
    return np.stack([rho, rho * u, p / (gamma - 1) + 0.5 * rho * u * u])


def cell_means(left, right, gamma, faces, t):
    """(3, cells): exact means of (ρ, ρu, E) at time t over the cells between `faces`, the jump having been at x = 0.

    Cells are cut at every wave; the pieces are smooth and have ten Gauss points each.
    """
    faces = np.asarray(faces, np.float64)
    speeds, pieces = _solution(left, right, gamma)
    cuts = np.array([-np.inf, *(s * t for s in speeds), np.inf])
    points, weights = np.polynomial.legendre.leggauss(10)
    total = np.zeros((3, faces.size - 1))
    for low, high, piece in zip(cuts[:-1], cuts[1:], pieces, strict=True):
        a, b = np.clip(faces[:-1], low, high), np.clip(faces[1:], low, high)
        inside = b > a
        a, b = a[inside], b[inside]
        x = 0.5 * (a + b)[:, None] + 0.5 * (b - a)[:, None] * points[None]
        values = conserved(np.stack(piece(x / t)), gamma)
        total[:, inside] += 0.5 * (b - a)[None] * (values * weights).sum(axis=-1)
    return total / np.diff(faces)[None]
