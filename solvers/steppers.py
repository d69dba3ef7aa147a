"""z(t) -> z(t + Δt): the time steppers, each one as its textbook formula.

All of them step any pytree z. Explicit ones take L z + N(z) together; exponential and implicit-explicit ones treat the diagonal
symbol L exactly or implicitly. `jax.lax.optimization_barrier` ends each stage: without it XLA on CPU fuses earlier stages into
later ones and computes them again.
"""

import abc
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, PyTree

from hybridsim.contract import AbstractSolver, AbstractStepper, Real, Tendency


def _map(function, *trees: PyTree) -> PyTree:
    return jax.tree.map(function, *trees)


def _mix(function, *zs: PyTree) -> PyTree:
    """`function` of states of which each came from the one before; what is no flow is as in the last."""
    last = zs[-1]
    whole = ("events", "memory")
    return {name: last[name] if name in whole else _map(function, *(z[name] for z in zs)) for name in last}


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
        if "linear" not in coefficients:
            return solver.euler(z, t, dt, tendency)
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
        return _stage(_mix(lambda a, b: 0.5 * (a + b), z, z2))


class SSPRK3(_Explicit):
    """z₁ = E(z₀);  z₂ = ¾ z₀ + ¼ E(z₁);  z = ⅓ z₀ + ⅔ E(z₂),  E(z) = z + Δt f(z).

    Third order, strong-stability preserving up to Courant number 1 (Shu & Osher 1988, doi:10.1016/0021-9991(88)90177-5, eq. 2.18);
    also stable for central convection (|λ| Δt ≤ 1.73 on the imaginary axis). Where E is a large program the stages are a loop
    that compiles it once.
    """

    order: ClassVar[int] = 3
    stages: ClassVar[int] = 3

    def __call__(self, solver, coefficients, z, t, dt, tendency):
        euler = lambda q, time: self._euler(solver, coefficients, q, time, dt, tendency)  # noqa: E731
        if solver.large_program:

            def stage(q: PyTree, of: tuple[Array, Array]) -> tuple[PyTree, None]:
                weight, node = of
                # the first stage is E(z₀) itself: a + (b − a) is not b where b is tiny
                mixed = lambda a, b: jnp.where(weight == 1, b, a + weight.astype(a.dtype) * (b - a))  # noqa: E731
                return _stage(_mix(mixed, z, euler(q, t + node * dt))), None

            weights, nodes = jnp.asarray([1, 1 / 4, 2 / 3], dt.dtype), jnp.asarray([0, 1, 1 / 2], dt.dtype)
            return jax.lax.scan(stage, z, (weights, nodes))[0]
        z1 = _stage(euler(z, t))
        z2 = _stage(_mix(lambda a, b: 0.75 * a + 0.25 * b, z, euler(z1, t + dt)))
        z3 = euler(z2, t + 0.5 * dt)
        # ⅓ a + ⅔ b with rounded weights would change a constant by 2e-8 a step in single precision.
        return _stage(_mix(lambda a, b: a + (2 / 3) * (b - a), z, z3))


class VL2(_Explicit):
    """z½ = z₀ + ½ Δt f₁(z₀);  z = z₀ + Δt f(z½),  f₁ of first order in space.

    Van Leer's predictor–corrector without its transverse steps (Stone & Gardiner 2009, doi:10.1016/j.newast.2008.06.003, section
    3): second order, one full evaluation of the right-hand side and a cheap one. Solvers that know no cheap one take the full one
    twice (the midpoint rule).
    """

    order: ClassVar[int] = 2
    stages: ClassVar[int] = 2

    def __call__(self, solver, coefficients, z, t, dt, tendency):
        half = _stage(solver.euler(z, t, 0.5 * dt, tendency, rough=True))
        return _stage(solver.euler(z, t + 0.5 * dt, dt, tendency, at=half))

    def check(self, solver, closures) -> None:
        if solver.linear() is not None:
            raise ValueError("stepper: vl2 is for solvers without a linear part; use etdrk4 or ssprk3")

    def prepare(self, solver, dt, dtype) -> PyTree:
        self.check(solver, ())
        return {}


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
            q = _map(lambda a, b, f: (1 / (1 - half * a)) * ((1 + half * a) * b + gamma * f), linear, q, h)
            return (q, h), None

        per_stage = tuple(coefficients[name] for name in ("half", "beta", "gamma", "time"))
        (z, _), _ = jax.lax.scan(stage, (z, _map(jnp.zeros_like, z)), per_stage)
        return z


class _Exponential(AbstractStepper):
    """Shared by the exponential methods: e^{LΔt}, and functions of LΔt as means over a circle in the complex plane.

    The means (Kassam & Trefethen 2005, doi:10.1137/S1064827502410633, §2) have none of the cancellation of the closed forms near
    L = 0; they are added up point by point, so that no array with an extra axis is made.
    """

    needs_linear: ClassVar[bool] = True
    names: ClassVar[tuple[str, ...]]

    @abc.abstractmethod
    def _exponentials(self, x: Array) -> tuple[Array, ...]:
        """The entire exponentials among the coefficients, the first of `names`, at real x = LΔt."""

    @abc.abstractmethod
    def _functions(self, r: Array) -> tuple[Array, ...]:
        """The others, over Δt, at complex r."""

    def prepare(self, solver, dt, dtype) -> PyTree:
        work = _working(dtype)
        points = 16
        step = jnp.asarray(dt, work)
        roots = np.exp(1j * np.pi * (np.arange(points) + 0.5) / points)
        complex_dtype = jnp.complex128 if work == np.float64 else jnp.complex64
        symbols, tree = jax.tree.flatten(solver.linear())
        found = []
        for symbol in symbols:
            x = step * jnp.asarray(symbol, work)
            exponentials = self._exponentials(x)

            def add(sums, root, x=x):
                return tuple(s + f.real for s, f in zip(sums, self._functions(x + root), strict=True)), None

            zero = (jnp.zeros_like(x),) * (len(self.names) - len(exponentials))
            sums, _ = jax.lax.scan(jax.checkpoint(add), zero, jnp.asarray(roots, complex_dtype))
            found.append((*exponentials, *(step * s / points for s in sums)))
        by_name = zip(self.names, zip(*found, strict=True), strict=True)
        return {name: jax.tree.unflatten(tree, [a.astype(dtype) for a in leaves]) for name, leaves in by_name}


class ETDRK2(_Exponential):
    """a = e^{LΔt} z + f₁ N(z);  z₁ = a + f₂ (N(a) − N(z)),  f₁ = (e^{LΔt} − 1)/L,  f₂ = (e^{LΔt} − 1 − LΔt)/(L² Δt).

    Exponential time differencing, second order for a diagonal L that it treats exactly (Cox & Matthews 2002,
    doi:10.1006/jcph.2002.6995, eqs. 20–22). Half the evaluations of `ETDRK4` in a step, and some 70 times its error at equal
    cost in smooth flows: the choice where something else makes the step inaccurate, such as a held closure.
    """

    order: ClassVar[int] = 2
    stages: ClassVar[int] = 2
    names: ClassVar[tuple[str, ...]] = ("e", "f1", "f2")

    def _exponentials(self, x):
        return (jnp.exp(x),)

    def _functions(self, r):
        e = jnp.exp(r)
        return (e - 1) / r, (e - 1 - r) / r**2

    def __call__(self, solver, coefficients, z, t, dt, tendency):
        e, f1, f2 = (coefficients[name] for name in self.names)
        nz = solver.explicit(z, t, tendency)
        a = _stage(_map(lambda e, f1, z, n: e * z + f1 * n, e, f1, z, nz))
        na = solver.explicit(a, t + dt, tendency)
        return _stage(_map(lambda a, f2, na, nz: a + f2 * (na - nz), a, f2, na, nz))


class ETDRK4(_Exponential):
    """a = e^{LΔt/2} z + Q N(z);  b = e^{LΔt/2} z + Q N(a);  c = e^{LΔt/2} a + Q (2N(b) − N(z));
    z₁ = e^{LΔt} z + f₁ N(z) + 2 f₂ (N(a) + N(b)) + f₃ N(c).

    Exponential time differencing, fourth order for a diagonal L that it treats exactly (Cox & Matthews 2002,
    doi:10.1006/jcph.2002.6995, eqs. 26–29).
    """

    order: ClassVar[int] = 4
    stages: ClassVar[int] = 4
    names: ClassVar[tuple[str, ...]] = ("e", "e2", "q", "f1", "f2", "f3")

    def _exponentials(self, x):
        return jnp.exp(x), jnp.exp(x / 2)

    def _functions(self, r):
        e = jnp.exp(r)
        return (
            (jnp.exp(r / 2) - 1) / r,
            (-4 - r + e * (4 - 3 * r + r * r)) / r**3,
            (2 + r + e * (-2 + r)) / r**3,
            (-4 - 3 * r - r * r + e * (4 - r)) / r**3,
        )

    def __call__(self, solver, coefficients, z, t, dt, tendency):
        e, e2, q, f1, f2, f3 = (coefficients[name] for name in self.names)
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
