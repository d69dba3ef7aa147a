"""z(t) -> z(t + Δt): the time steppers, each one as its textbook formula.

All of them step any pytree z. Explicit ones take L z + N(z) together; exponential and implicit-explicit ones treat the diagonal
symbol L exactly or implicitly. `jax.lax.optimization_barrier` ends each stage: without it XLA on CPU fuses earlier stages into
later ones and computes them again.
"""

from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

from hybridsim.contract import AbstractSolver, AbstractStepper, Real, Tendency


def _map(function, *trees: PyTree) -> PyTree:
    return jax.tree.map(function, *trees)


def _stage(z: PyTree) -> PyTree:
    return jax.lax.optimization_barrier(z)


def _working(dtype) -> np.dtype:
    """Coefficients are computed in double precision where JAX has it, and cast to the state's dtype afterwards."""
    return max(np.dtype(jnp.result_type(float)), np.dtype(dtype), key=lambda d: d.itemsize)


def _cast(tree: PyTree, dtype) -> PyTree:
    return _map(lambda a: a.astype(dtype), tree)


class _Explicit(AbstractStepper):
    """Shared by the explicit Runge–Kutta methods: the right-hand side with L z folded in, and one Euler step."""

    needs_linear: ClassVar[bool] = False

    def prepare(self, solver, dt, dtype) -> PyTree:
        linear = solver.linear()
        return {} if linear is None else {"linear": _cast(_map(jnp.asarray, linear), dtype)}

    def _rate(self, solver: AbstractSolver, coefficients: PyTree, z: PyTree, t: Real, tendency: Tendency) -> PyTree:
        rate = solver.explicit(z, t, tendency)
        if "linear" in coefficients:
            rate = _map(lambda f, a, q: f + a * q, rate, coefficients["linear"], z)
        return rate

    def _euler(self, solver, coefficients, z, t, dt, tendency) -> PyTree:
        rate = self._rate(solver, coefficients, z, t, tendency)
        return solver.constrain(_map(lambda q, f: q + dt * f, z, rate))


class ForwardEuler(_Explicit):
    """z₁ = z₀ + Δt f(z₀).

    First order. For pairing with other codes; unstable for central convection without viscosity.
    """

    order: ClassVar[int] = 1
    stages: ClassVar[int] = 1

    def __call__(self, solver, coefficients, z, t, dt, tendency):
        return _stage(self._euler(solver, coefficients, z, t, dt, tendency))


class SSPRK2(_Explicit):
    """z₁ = E(z₀);  z = ½ z₀ + ½ E(z₁),  E(z) = z + Δt f(z).

    Second order, strong-stability preserving up to Courant number 1 (Shu & Osher 1988, doi:10.1016/0021-9991(88)90177-5, eq. 2.16).
    """

    order: ClassVar[int] = 2
    stages: ClassVar[int] = 2

    def __call__(self, solver, coefficients, z, t, dt, tendency):
        euler = lambda q, time: self._euler(solver, coefficients, q, time, dt, tendency)  # noqa: E731
        z1 = _stage(euler(z, t))
        z2 = euler(z1, t + dt)
        return _stage(_map(lambda a, b: 0.5 * (a + b), z, z2))


class SSPRK3(_Explicit):
    """z₁ = E(z₀);  z₂ = ¾ z₀ + ¼ E(z₁);  z = ⅓ z₀ + ⅔ E(z₂),  E(z) = z + Δt f(z).

    Third order, strong-stability preserving up to Courant number 1 (Shu & Osher 1988, doi:10.1016/0021-9991(88)90177-5, eq. 2.18);
    also stable for central convection (|λ| Δt ≤ 1.73 on the imaginary axis).
    """

    order: ClassVar[int] = 3
    stages: ClassVar[int] = 3

    def __call__(self, solver, coefficients, z, t, dt, tendency):
        euler = lambda q, time: self._euler(solver, coefficients, q, time, dt, tendency)  # noqa: E731
        z1 = _stage(euler(z, t))
        z2 = _stage(_map(lambda a, b: 0.75 * a + 0.25 * b, z, euler(z1, t + dt)))
        z3 = euler(z2, t + 0.5 * dt)
        # ⅓ a + ⅔ b with rounded weights would change a constant by 2e-8 a step in single precision.
        return _stage(_map(lambda a, b: a + (2 / 3) * (b - a), z, z3))


class CrankNicolsonRK4(AbstractStepper):
    """hⱼ = f(zⱼ) + βⱼ hⱼ₋₁;  (1 − μⱼ L) zⱼ₊₁ = (1 + μⱼ L) zⱼ + γⱼ Δt hⱼ,  μⱼ = ½ Δt (αⱼ₊₁ − αⱼ).

    Five-stage fourth-order low-storage Runge–Kutta for the explicit part (Carpenter & Kennedy 1994, NASA TM-109112, table 1)
    with Crank–Nicolson for the linear part (Canuto et al. 2007, doi:10.1007/978-3-540-30728-0, appendix D.3): fourth
    order where the explicit terms dominate, second order in the linear ones.
    """

    needs_linear: ClassVar[bool] = True
    order: ClassVar[int] = 2
    stages: ClassVar[int] = 5

    def prepare(self, solver, dt, dtype) -> PyTree:
        work = _working(dtype)
        step = jnp.asarray(dt, work)
        beta = np.array(
            [
                0.0,
                -567301805773 / 1357537059087,
                -2404267990393 / 2016746695238,
                -3550918686646 / 2091501179385,
                -1275806237668 / 842570457699,
            ]
        )
        gamma = np.array(
            [
                1432997174477 / 9575080441755,
                5161836677717 / 13612068292357,
                1720146321549 / 2090206949498,
                3134564353537 / 4481467310338,
                2277821191437 / 14882151754819,
            ]
        )
        alpha = np.array(
            [
                0.0,
                1432997174477 / 9575080441755,
                2526269341429 / 6820363962896,
                2006345519317 / 3224310063776,
                2802321613138 / 2924317926251,
                1.0,
            ]
        )
        linear = _map(lambda a: jnp.asarray(a, work), solver.linear())
        half = jnp.asarray(0.5 * np.diff(alpha), work) * step
        return {
            "half": half.astype(dtype),
            "linear": _cast(linear, dtype),
            "time": (jnp.asarray(alpha[:-1], work) * step).astype(dtype),
            "beta": jnp.asarray(beta, dtype),
            "gamma": (jnp.asarray(gamma, work) * step).astype(dtype),
        }

    def __call__(self, solver, coefficients, z, t, dt, tendency):
        linear = coefficients["linear"]

        def stage(state, stage_coefficients):
            q, h = state
            half, beta, gamma, time = stage_coefficients
            rate = solver.explicit(q, t + time, tendency)
            h = _map(lambda f, old: f + beta * old, rate, h)
            q = _map(lambda a, b, f: ((1 + half * a) * b + gamma * f) / (1 - half * a), linear, q, h)
            return (q, h), None

        per_stage = tuple(coefficients[name] for name in ("half", "beta", "gamma", "time"))
        (z, _), _ = jax.lax.scan(stage, (z, _map(jnp.zeros_like, z)), per_stage)
        return z


class ETDRK4(AbstractStepper):
    """a = e^{LΔt/2} z + Q N(z);  b = e^{LΔt/2} z + Q N(a);  c = e^{LΔt/2} a + Q (2N(b) − N(z));
    z₁ = e^{LΔt} z + f₁ N(z) + 2 f₂ (N(a) + N(b)) + f₃ N(c).

    Exponential time differencing, fourth order for a diagonal L that it treats exactly (Cox & Matthews 2002,
    doi:10.1006/jcph.2002.6995, eqs. 26–29). Q, f₁, f₂, f₃ are means over a circle in the complex plane (Kassam & Trefethen 2005,
    doi:10.1137/S1064827502410633, §2), added up point by point so that no array with an extra axis is made.
    """

    needs_linear: ClassVar[bool] = True
    order: ClassVar[int] = 4
    stages: ClassVar[int] = 4

    def prepare(self, solver, dt, dtype) -> PyTree:
        work = _working(dtype)
        points = 16
        step = jnp.asarray(dt, work)
        roots = np.exp(1j * np.pi * (np.arange(points) + 0.5) / points)

        def leaf(symbol):
            x = step * jnp.asarray(symbol, work)
            complex_dtype = jnp.complex128 if work == np.float64 else jnp.complex64

            def add(sums, root):
                r = x + root
                e = jnp.exp(r)
                q = (jnp.exp(r / 2) - 1) / r
                f1 = (-4 - r + e * (4 - 3 * r + r * r)) / r**3
                f2 = (2 + r + e * (-2 + r)) / r**3
                f3 = (-4 - 3 * r - r * r + e * (4 - r)) / r**3
                return tuple(s + new.real for s, new in zip(sums, (q, f1, f2, f3), strict=True)), None

            zero = jnp.zeros_like(x)
            sums, _ = jax.lax.scan(jax.checkpoint(add), (zero,) * 4, jnp.asarray(roots, complex_dtype))
            q, f1, f2, f3 = (step * s / points for s in sums)
            return {"e": jnp.exp(x), "e2": jnp.exp(x / 2), "q": q, "f1": f1, "f2": f2, "f3": f3}

        per_leaf = _map(leaf, solver.linear())
        is_leaf = lambda node: isinstance(node, dict) and "e2" in node  # noqa: E731
        names = ("e", "e2", "q", "f1", "f2", "f3")
        return {name: jax.tree.map(lambda node: node[name].astype(dtype), per_leaf, is_leaf=is_leaf) for name in names}  # noqa: B023

    def __call__(self, solver, coefficients, z, t, dt, tendency):
        e, e2, q, f1, f2, f3 = (coefficients[name] for name in ("e", "e2", "q", "f1", "f2", "f3"))
        rate = lambda state, time: solver.explicit(state, time, tendency)  # noqa: E731
        middle = t + 0.5 * dt
        nz = rate(z, t)
        a = _stage(_map(lambda e2, q, z, n: e2 * z + q * n, e2, q, z, nz))
        na = rate(a, middle)
        b = _stage(_map(lambda e2, q, z, n: e2 * z + q * n, e2, q, z, na))
        nb = rate(b, middle)
        c = _stage(_map(lambda e2, q, a, nb, nz: e2 * a + q * (2 * nb - nz), e2, q, a, nb, nz))
        nc = rate(c, t + dt)
        return _stage(
            _map(
                lambda e, f1, f2, f3, z, nz, na, nb, nc: e * z + (f1 * nz + 2 * f2 * (na + nb) + f3 * nc),
                e, f1, f2, f3, z, nz, na, nb, nc,
            )
        )  # fmt: skip
