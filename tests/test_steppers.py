"""Orders of the time steppers, where closures and forces depend on time, and what each one treats exactly."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flows import EXPLICIT, STEPPERS, evolve, kolmogorov, random_flow, solver_of, square

from hybridsim.contract import Source
from hybridsim.grid import Grid
from hybridsim.model import Model
from hybridsim.solvers.steppers import ETDRK2, ETDRK4, SSPRK2, SSPRK3, CrankNicolsonRK4, ForwardEuler

pytestmark = pytest.mark.usefixtures("x64")

EVERY = (*(s for s in STEPPERS if s is not ETDRK2), ETDRK2)


class Waves(Source):
    """s = (cos 3t sin 2y, sin(2t) cos x): known only if every stage has its own time."""

    def __call__(self, view, memory=None, key=None):
        x, y = (jnp.asarray(q, view.u.dtype) for q in view.grid.mesh())
        return jnp.stack([jnp.cos(3 * view.t) * jnp.sin(2 * y), jnp.sin(2 * view.t) * jnp.cos(x)])


def _rates(solver, stepper, counts, total=0.5, reference=None):
    """log₂ of the ratios of errors, dt halved again and again, against a solution whose error is below one percent of theirs."""
    u = random_flow(solver, 7, modes=3, mean=(0.3, -0.2))
    run = lambda s, n: evolve(solver, s, u, total / n, n, (Waves(),), ("stage",))  # noqa: E731
    exact = run(*(reference or (SSPRK3() if solver.linear() is None else ETDRK4(), 640)))
    errors = np.array([np.abs(run(stepper, n) - exact).max() for n in counts])
    return np.log2(errors[:-1] / errors[1:]), errors


CASES = [
    ("spectral", ForwardEuler(), 1, (80, 160, 320)),
    ("spectral", SSPRK2(), 2, (40, 80, 160)),
    ("spectral", SSPRK3(), 3, (20, 40, 80)),
    ("spectral", CrankNicolsonRK4(), 4, (10, 20, 40)),
    ("spectral", ETDRK2(), 2, (40, 80, 160)),
    ("spectral", ETDRK4(), 4, (10, 20, 40)),
    ("finite_volume", ForwardEuler(), 1, (80, 160, 320)),
    ("finite_volume", SSPRK2(), 2, (40, 80, 160)),
    ("finite_volume", SSPRK3(), 3, (20, 40, 80)),
]


@pytest.mark.parametrize(("kind", "stepper", "order", "counts"), CASES, ids=[f"{c[0]}-{type(c[1]).__name__}" for c in CASES])
def test_order_in_time(kind, stepper, order, counts):
    # hardly any viscosity: the explicit terms dominate
    options = {"convection": "central"} if kind == "finite_volume" else {}
    solver = solver_of(kind, square(12), 1e-4, kolmogorov(1.0, 0.0, 2), **options)
    rates, errors = _rates(solver, stepper, counts)
    print(kind, type(stepper).__name__, rates, errors)
    assert abs(rates[-1] - order) <= 0.15
    assert stepper.order in (order, 2)


def test_crank_nicolson_is_second_order_where_the_linear_part_dominates():
    solver = solver_of("spectral", square(12), 0.5, kolmogorov(1.0, 0.1, 2))
    rates, errors = _rates(solver, CrankNicolsonRK4(), (20, 40, 80))
    print(rates, errors)
    assert abs(rates[-1] - 2) <= 0.15


@pytest.mark.parametrize(("stepper", "counts"), [(ETDRK2(), (20, 40, 80)), (ETDRK4(), (10, 20, 40))], ids=["etdrk2", "etdrk4"])
def test_exponential_steppers_keep_their_order_where_the_linear_part_dominates(stepper, counts):
    solver = solver_of("spectral", square(12), 0.1, kolmogorov(1.0, 0.1, 2))
    rates, errors = _rates(solver, stepper, counts)
    print(rates, errors)
    assert abs(rates[-1] - stepper.order) <= 0.15


def test_exponential_steppers_are_exact_where_nothing_but_the_linear_part_acts():
    """A shear flow without a force: u = sin 2y decays as exp(−4νt), at any step."""
    solver = solver_of("spectral", square(12), 0.3)
    u = np.stack([np.sin(2 * solver.grid.mesh()[1]), np.zeros((12, 12))])
    for stepper in (ETDRK2(), ETDRK4()):
        np.testing.assert_allclose(evolve(solver, stepper, u, 2.0, 3), np.exp(-4 * 0.3 * 6) * u, rtol=0, atol=1e-16)
    assert np.abs(evolve(solver, CrankNicolsonRK4(), u, 2.0, 3) - np.exp(-4 * 0.3 * 6) * u).max() > 1e-6


def test_a_held_closure_is_first_order():
    solver = solver_of("spectral", square(12), 1e-4)
    u = random_flow(solver, 7, modes=3)
    exact = evolve(solver, ETDRK4(), u, 0.5 / 640, 640, (Waves(),), ("stage",))
    errors = [np.abs(evolve(solver, ETDRK4(), u, 0.5 / n, n, (Waves(),), ("step",)) - exact).max() for n in (20, 40, 80)]
    assert abs(np.log2(errors[1] / errors[2]) - 1) <= 0.15


def _coefficients(stepper, symbol, dt, dtype=np.float64):
    class One(eqx.Module):
        def linear(self):
            return {"z": np.array([symbol])}

    return stepper.prepare(One(), dt, dtype)


@pytest.mark.parametrize("x", [0.0, -1e-9, 1e-4, -1e-4, 0.3, -0.3, -2.0, -40.0, -3000.0])
def test_exponential_coefficients_equal_their_closed_forms(x):
    from fractions import Fraction

    # phi functions by their series in exact arithmetic where these converge fast, by the closed form elsewhere
    if abs(x) < 1:
        q = Fraction(x)
        phi = [sum(q**n / _factorial(n + j) for n in range(25)) for j in range(4)]
        half = sum((q / 2) ** n / _factorial(n + 1) for n in range(25)) / 2
    else:
        e = np.exp(x)
        phi = [e, (e - 1) / x, (e - 1 - x) / x**2, (e - 1 - x - x**2 / 2) / x**3]
        half = (np.exp(x / 2) - 1) / x
    dt = 0.5
    expected = {
        ETDRK2(): {"e": phi[0], "f1": dt * phi[1], "f2": dt * phi[2]},
        ETDRK4(): {
            "e": phi[0],
            "e2": np.exp(x / 2),
            "q": dt * half,
            "f1": dt * (phi[1] - 3 * phi[2] + 4 * phi[3]),
            "f2": dt * (phi[2] - 2 * phi[3]),
            "f3": dt * (4 * phi[3] - phi[2]),
        },
    }
    for stepper, values in expected.items():
        found = _coefficients(stepper, x / dt, dt)
        assert set(found) == set(values)
        for name, value in values.items():
            assert float(found[name]["z"][0]) == pytest.approx(float(value), rel=1e-12, abs=1e-16), name


def _factorial(n):
    return int(np.prod(np.arange(1, n + 1), dtype=object))


def test_single_precision_coefficients_are_those_of_double_rounded():
    for stepper in (ETDRK2(), ETDRK4()):
        single, double = (_coefficients(stepper, -0.37, 0.01, dtype) for dtype in (np.float32, np.float64))
        for a, b in zip(jax.tree.leaves(single), jax.tree.leaves(double), strict=True):
            assert a.dtype == np.float32
            np.testing.assert_array_equal(a, b.astype(np.float32))


@pytest.mark.parametrize("stepper", EVERY, ids=lambda s: s.__name__)
def test_steppers_that_need_a_linear_part_are_refused_by_name(stepper):
    solver = solver_of("finite_volume", Grid((8, 8), (1.0, 1.0)))
    if stepper in EXPLICIT:
        Model(solver, stepper(), 0.1)
    else:
        with pytest.raises(ValueError, match=f"{stepper.__name__} needs a linear part.*forward_euler, ssprk2 or ssprk3"):
            Model(solver, stepper(), 0.1)


def test_stages_tell_how_often_the_right_hand_side_is_called():
    for stepper in EVERY:
        if stepper is CrankNicolsonRK4:  # a scan: its body is traced once
            continue
        solver = solver_of("spectral", square(8)).prepare(np.float64)
        calls = []
        z = solver.encode(jnp.asarray(random_flow(solver, 1, modes=2)))
        coefficients = stepper().prepare(solver, 0.1, np.float64)
        stepper()(solver, coefficients, z, jnp.zeros(()), jnp.asarray(0.1), lambda q, t, calls=calls: calls.append(t))
        assert len(calls) == stepper.stages
