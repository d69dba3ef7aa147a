"""Radiative cooling: exact at any step, to the floor, through nodes, as α → 1; derivatives; the emission of tiny steps."""

import csv
import decimal
import functools
import itertools
import math
from decimal import Decimal
from pathlib import Path

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hybridsim.check import wide_values
from hybridsim.config import ConfigError, make_part
from hybridsim.contract import Real
from hybridsim.solvers.cooling import (
    AbstractCooling,
    LogNormalCooling,
    MixingLayerCooling,
    PiecewisePowerLaw,
    PowerLawCooling,
    descent,
    lapse,
)

DATA = Path(__file__).parent / "data" / "powerlaw_cooling.csv"
EXACT = decimal.Context(prec=120)

# nodes, rates just above them, exponents, floor, cut-off
CURVES = {
    "continuous": ((0.01, 0.1, 1.0), (0.01, 1.0, 0.1), (2.0, -1.0, 0.5), 0.02, 40.0),
    "jumps": ((0.01, 0.1, 0.3, 1.0), (0.02, 1.0, 0.5, 0.2), (2.0, -0.6, 1.0, 0.5), 0.005, 40.0),
    "nearly_one": ((0.01, 0.1, 0.3, 1.0), (0.02, 1.0, 0.5, 0.2), (1 + 1e-13, 1 - 1e-9, 1.0, 1 + 1e-5), 0.02, 40.0),
    "close_nodes": ((0.01, 0.0101, 0.0102, 0.5), (1e-6, 1.0, 1e-9, 3.0), (4.0, -3.0, 1.0, 0.5), 0.001, 40.0),
    "wide_range": ((1e-3, 1e-2, 1e-1, 1.0), (1e-12, 1.0, 1e-10, 1.0), (4.0, -3.0, 1.0, 0.5), 0.002, math.inf),
}


def piecewise(name):
    nodes, rates, exponents, floor, cutoff = CURVES[name]
    return PiecewisePowerLaw(nodes, rates, floor, cutoff, exponents)


def exactly(curve, temperature, dose):
    """(T', T − T') with 120 digits: the walk from segment to segment, each power law in its textbook form."""
    nodes, rates, exponents, floor, cutoff = curve
    with decimal.localcontext(EXACT):
        start = t = Decimal(float(temperature))
        left, floor = Decimal(float(dose)), Decimal(floor)
        if t <= floor or t > Decimal(cutoff):
            return t, Decimal(0)
        i = max((k for k, node in enumerate(nodes) if Decimal(node) < t), default=0)
        while True:
            bottom = max(floor, Decimal(nodes[i])) if i else floor
            beta = 1 - Decimal(exponents[i])
            pace = t / (Decimal(rates[i]) * ((t / Decimal(nodes[i])).ln() * Decimal(exponents[i])).exp())
            height = (t / bottom).ln()
            time = pace * (height if beta == 0 else (1 - (-beta * height).exp()) / beta)
            if left < time:
                effort = left / pace
                after = t * (-effort if beta == 0 else (1 - beta * effort).ln() / beta).exp()
                return after, start - after
            left, t, i = left - time, bottom, i - 1
            if t <= floor:
                return floor, start - floor


def error(found, exact):
    """Largest |found/exact − 1|."""
    pairs = zip(np.ravel(found), exact, strict=True)
    return max(float(abs(Decimal(float(x)) - y) / (abs(y) if y else Decimal(1))) for x, y in pairs)


@eqx.filter_jit
def both(cooling: AbstractCooling, temperature, density, dt: float | Real = 1.0, gamma: float | Real = 2.0):
    return cooling.cool(temperature, density, dt, gamma), cooling.drop(temperature, density, dt, gamma)


def points(rng, low, high, count):
    return np.exp(rng.uniform(math.log(low), math.log(high), count))


# --- exact solutions -------------------------------------------------------------------------------------------------------------


def test_power_laws_agree_with_the_reference_table(x64):
    rows = list(csv.DictReader(DATA.read_text().splitlines()[1:]))
    assert len(rows) == 25
    worst = euler = 0.0
    for row in rows:
        alpha, time, exact = (float(row[name]) for name in ("alpha", "t_over_tc", "T_exact"))
        cooling = PowerLawCooling(amplitude=1.0, exponent=alpha, reference_temperature=1.0, floor=0.05)
        found, drop = both(cooling, jnp.asarray(1.0), jnp.asarray(1.0), dt=jnp.asarray(time))
        worst = max(worst, abs(float(found) / exact - 1), abs(float(drop) / (1 - exact) - 1))
        steps = 1000
        t = 1.0
        for _ in range(steps):
            t -= time / steps * t**alpha
        euler = max(euler, abs(t / exact - 1))
    assert worst < 1e-12
    assert euler > 1e-5  # a thousand explicit sub-steps are far from that


@pytest.mark.parametrize("name", CURVES)
def test_any_step_through_any_nodes_is_exact(name, x64, rng):
    curve, cooling = CURVES[name], piecewise(name)
    temperature = points(rng, curve[3], 60.0, 200)
    dose = points(rng, 1e-18, 1e4, 200)
    exact = [exactly(curve, t, d) for t, d in zip(temperature, dose, strict=True)]
    found, drop = both(cooling, jnp.asarray(temperature), jnp.asarray(dose))
    assert error(found, [e[0] for e in exact]) < 1e-13
    assert error(drop, [e[1] for e in exact]) < 1e-13
    assert (np.asarray(found) >= curve[3]).all()

    single = np.float32
    temperature, dose = temperature.astype(single), dose.astype(single)
    rounded = (*curve[:3], float(single(curve[3])), float(single(curve[4])))
    exact = [exactly(rounded, t, d) for t, d in zip(temperature, dose, strict=True)]
    found, drop = both(cooling, jnp.asarray(temperature), jnp.asarray(dose))
    assert found.dtype == drop.dtype == single
    assert error(found, [e[0] for e in exact]) < 5e-6
    if name != "close_nodes":  # their distance is known to five digits only
        assert error(drop, [e[1] for e in exact]) < 5e-6


def test_a_difference_of_temperatures_would_lose_the_emission_of_a_tiny_step():
    cooling = piecewise("continuous")
    temperature, dose = np.float32(2.0), np.float32(1e-6)
    exact = exactly(CURVES["continuous"], temperature, dose)[1]
    found, drop = both(cooling, jnp.asarray(temperature), jnp.asarray(dose))
    assert error(drop, [exact]) < 1e-6
    assert error(temperature - np.asarray(found), [exact]) > 0.1


def test_drop_and_cool_tell_the_same(x64, rng):
    for name in CURVES:
        temperature, dose = points(rng, 1e-3, 60.0, 500), points(rng, 1e-9, 1e3, 500)
        found, drop = both(piecewise(name), jnp.asarray(temperature), jnp.asarray(dose))
        assert np.abs(temperature - np.asarray(drop) - np.asarray(found)).max() < 1e-14 * temperature.max()
        assert (np.asarray(drop) >= 0).all()


DOSES = (1e-12, 1e-3, 0.3, 1.0)


def from_three(alpha, dose):
    cooling = PowerLawCooling(amplitude=1.0, exponent=alpha, reference_temperature=1.0, floor=0.1)
    temperature = jnp.full(dose.shape, 3.0)
    return cooling.cool(temperature, dose, 1.0, 2.0), cooling.drop(temperature, dose, 1.0, 2.0)


@jax.jit
def from_three_with_slopes(alpha, dose):
    """Values, forward and reverse derivatives by a traced exponent."""
    values, slopes = jax.jvp(lambda a: from_three(a, dose), (alpha,), (jnp.ones_like(alpha),))
    return values, slopes, jax.jacrev(lambda a: from_three(a, dose))(alpha)


@pytest.mark.parametrize("alpha", [1.0, *(1 + s * 10.0**-k for k in (14, 12, 9, 6, 3) for s in (1, -1)), 0.0, -2.0, 4.0])
def test_exponents_about_one_lose_no_digit_and_neither_do_derivatives(alpha, x64):
    curve = ((1.0,), (1.0,), (alpha,), 0.1, math.inf)
    dose = jnp.asarray(DOSES)
    (found, drop), (slope, drop_slope), reverse = from_three_with_slopes(jnp.asarray(alpha), dose)
    exact = [exactly(curve, 3.0, d) for d in DOSES]
    assert error(found, [e[0] for e in exact]) < 1e-14
    assert error(drop, [e[1] for e in exact]) < 1e-14
    on_host = jax.jit(lambda d: from_three(alpha, d))(dose)
    np.testing.assert_allclose(on_host, (found, drop), rtol=1e-14)

    step = Decimal(10) ** -20
    moved = [exactly((*curve[:2], (Decimal(alpha) + s * step,), *curve[3:]), 3.0, d) for s in (1, -1) for d in DOSES]
    with decimal.localcontext(EXACT):
        exact_slope = [(a[0] - b[0]) / (2 * step) for a, b in zip(moved[:4], moved[4:], strict=True)]
    assert error(slope, exact_slope) < 2e-14
    assert error(drop_slope, [-d for d in exact_slope]) < 2e-14
    np.testing.assert_allclose(reverse, (slope, drop_slope), rtol=1e-14)


def test_lapse_and_descent_are_inverse(x64):
    there_and_back = jax.jit(lambda height, beta: descent(lapse(height, -beta), beta))
    for beta, height in itertools.product([-3.0, -1e-3, -1e-13, 0.0, 1e-300, 1e-13, 1e-3, 3.0], [1e-13, 1e-3, 1.0, 3.0]):
        back = there_and_back(jnp.asarray(height), jnp.asarray(beta))
        assert abs(float(back) / height - 1) < 1e-12 * max(1, math.exp(beta * height))


SLOPES = {function: jax.jit(jax.grad(function, (0, 1))) for function in (lapse, descent)}


@pytest.mark.parametrize("beta", [-2.0, -0.4, 1e-3, 1e-6, 1e-12, 0.0, 0.7, 2.5])
def test_derivatives_of_lapse_and_descent_join_smoothly(beta, x64):
    step = Decimal(10) ** -20
    with decimal.localcontext(EXACT):

        def exact_lapse(height, beta):
            return height if beta == 0 else ((beta * height).exp() - 1) / beta

        def exact_descent(effort, beta):
            return effort if beta == 0 else -(1 - beta * effort).ln() / beta

        for height in (1e-6, 0.09, 0.3, 0.39, 1.3):
            for function, exact in ((lapse, exact_lapse), (descent, exact_descent)):
                if function is descent and beta * height >= 1:
                    continue
                h, b = Decimal(height), Decimal(beta)
                slopes = (
                    (exact(h + step, b) - exact(h - step, b)) / (2 * step),
                    (exact(h, b + step) - exact(h, b - step)) / (2 * step),
                )
                found = SLOPES[function](jnp.asarray(height), jnp.asarray(beta))
                assert error(found, slopes) < 2e-14


# --- floor, cut-off, nodes -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_the_floor_is_reached_in_finite_time_and_kept(dtype, x64):
    # Λ = √T: √T' = √T − t/2, so from 1 to 0.3 in 2 (1 − √0.3)
    cooling = PowerLawCooling(amplitude=1.0, exponent=0.5, reference_temperature=1.0, floor=0.3)
    floor = dtype(0.3)
    arrival = 2 * (1 - math.sqrt(float(floor)))
    eps = np.finfo(dtype).eps
    times = jnp.asarray([0.5 * arrival, arrival * (1 - 8 * eps), arrival * (1 + 8 * eps), 2 * arrival, 1e6], dtype)
    found, drop = both(cooling, jnp.ones(5, dtype), times)
    assert float(found[0]) == pytest.approx((1 - 0.25 * arrival) ** 2, rel=4 * float(eps))
    assert floor <= found[1] <= floor * (1 + 40 * eps)
    assert (np.asarray(found[2:]) == floor).all()
    assert (np.asarray(drop[2:]) == dtype(1) - floor).all()
    below = jnp.asarray([0.3, 0.2, 1e-20, 0.0, -1.0], dtype)
    stay, none = both(cooling, below, jnp.full(5, 1e3, dtype))
    assert (stay == below).all()
    assert (none == 0).all()
    assert (cooling.rate(below) == 0).all()


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_the_cutoff_is_sharp(dtype, x64):
    cooling = PowerLawCooling(amplitude=1.0, exponent=0.0, reference_temperature=1.0, floor=0.1, cutoff=0.85)
    cut = dtype(0.85)
    around = jnp.asarray([np.nextafter(cut, dtype(0)), cut, np.nextafter(cut, dtype(1)), 1.0, 1e20], dtype)
    found, drop = both(cooling, around, jnp.full(5, 0.5, dtype))
    np.testing.assert_allclose(found[:2], 0.35, rtol=4 * np.finfo(dtype).eps)
    assert (found[2:] == around[2:]).all()
    assert (drop[2:] == 0).all()
    np.testing.assert_allclose(cooling.rate(around), [1, 1, 0, 0, 0], rtol=4 * np.finfo(dtype).eps)


def test_crossing_a_jump_in_closed_form(x64):
    # Λ = 1 below T = 1, 10 above: T falls by t, ten times as fast at first
    cooling = PiecewisePowerLaw((0.5, 1.0), (1.0, 10.0), floor=0.25, cutoff=4.0, exponents=(0.0, 0.0))
    time = jnp.asarray([0.05, 0.1, 0.1 + 1e-9, 0.4, 0.85, 2.0])
    found, drop = both(cooling, jnp.full(6, 2.0), time)
    np.testing.assert_allclose(found, [1.5, 1.0, 1 - 1e-9, 0.7, 0.25, 0.25], rtol=2e-15)
    np.testing.assert_allclose(drop, [0.5, 1.0, 1 + 1e-9, 1.3, 1.75, 1.75], rtol=2e-15)
    found = cooling.rate(jnp.asarray([0.25, 0.26, 1.0, 1.01, 4.0, 4.1]))
    np.testing.assert_allclose(found, [0, 1, 1, 10, 10, 0], rtol=2e-15)


@pytest.mark.parametrize(
    "cooling",
    [*map(piecewise, CURVES), MixingLayerCooling(1 / 56.2, 1.0, 0.0775), LogNormalCooling(0.1, 0.5, 0.01, 0.1, cutoff=0.9)],
    ids=[*CURVES, "mixing_layer", "log_normal"],
)
def test_two_steps_are_one(cooling, x64, rng):
    temperature = jnp.asarray(points(rng, 0.5 * min(cooling.segments().bottom), 50.0, 400))
    density = jnp.asarray(points(rng, 1e-2, 1e2, 400))
    first, second = (jnp.asarray(points(rng, 1e-8, 1e2, 400)) for _ in range(2))
    run = eqx.filter_jit(jax.vmap(lambda c, *a: (c.cool(*a, 5 / 3), c.drop(*a, 5 / 3)), (None, 0, 0, 0)))
    half, a = run(cooling, temperature, density, first)
    found, b = run(cooling, half, density, second)
    whole, drop = run(cooling, temperature, density, first + second)
    np.testing.assert_allclose(found, whole, rtol=1e-12)
    np.testing.assert_allclose(a + b, drop, rtol=1e-12)


# --- curves ----------------------------------------------------------------------------------------------------------------------


def by_ode(rate, temperature, dose):
    """T' by an adaptive Runge–Kutta method of eighth order in ln T."""

    def solve(t, d):
        term = diffrax.ODETerm(lambda s, x, d: -d * rate(jnp.exp(x)) / jnp.exp(x))
        control = diffrax.PIDController(rtol=1e-13, atol=1e-13)
        found = diffrax.diffeqsolve(
            term, diffrax.Dopri8(), 0.0, 1.0, None, jnp.log(t), d, stepsize_controller=control, max_steps=None
        )
        assert found.ys is not None
        return jnp.exp(found.ys[0])

    return np.asarray(jax.jit(jax.vmap(solve))(jnp.asarray(temperature), jnp.asarray(dose)))


@pytest.mark.parametrize("width", [0.3, 0.8])
def test_a_log_normal_peak_agrees_with_an_ode_solver(width, x64, rng):
    cooling = LogNormalCooling(peak_temperature=0.1, width=width, floor=0.01, amplitude=1.0, cutoff=1.0)
    temperature = points(rng, 0.1 * math.exp(-2 * width), 0.1 * math.exp(2 * width), 60)
    dose = points(rng, 1e-3, 1.0, 60) * np.asarray(cooling.cooling_time(jnp.asarray(temperature), jnp.ones(60), 2.0))
    exact = by_ode(lambda t: jnp.exp(-0.5 * (jnp.log(t / 0.1) / width) ** 2), temperature, dose)
    found = both(cooling, jnp.asarray(temperature), jnp.asarray(dose))[0]
    assert (np.asarray(found) > 0.01).all()
    assert (temperature / np.asarray(found)).max() > 2
    assert np.abs(np.asarray(found) / exact - 1).max() < 1e-8
    few = LogNormalCooling(peak_temperature=0.1, width=width, floor=0.01, amplitude=1.0, cutoff=1.0, segments_per_width=3)
    assert np.abs(np.asarray(both(few, jnp.asarray(temperature), jnp.asarray(dose))[0]) / exact - 1).max() > 1e-4
    np.testing.assert_allclose(cooling.rate(jnp.asarray([0.1, 0.1 * math.exp(width)])), [1, math.exp(-0.5)], rtol=1e-14)


def test_power_laws_converge_to_a_smooth_curve_with_third_order(x64, rng):
    curve = lambda t: t**2 / (1 + t**3.5) + 0.1 * t**0.5  # noqa: E731
    temperature, dose = points(rng, 0.3, 5.0, 60), points(rng, 0.05, 1.0, 60)
    exact = by_ode(curve, temperature, dose)
    errors = []
    for segments in (32, 64, 128, 1024):
        cooling = PiecewisePowerLaw.from_function(curve, 0.01, 10.0, segments, floor=0.01)
        found = np.asarray(both(cooling, jnp.asarray(temperature), jnp.asarray(dose))[0])
        errors.append(np.sqrt(np.mean((found / exact - 1) ** 2)))
    assert math.log2(errors[1] / errors[2]) > 2.7
    assert errors[3] < 1e-7


def test_a_continuous_curve_passes_its_nodes_and_goes_on_outside(x64):
    cooling = PiecewisePowerLaw((0.1, 1.0, 10.0), (0.5, 2.0, 1.0), floor=0.01, exponent_below=2.0, exponent_above=-1.0)
    found = cooling.rate(jnp.asarray([0.05, 0.1, 1.0, 10.0, 40.0]))
    np.testing.assert_allclose(found, [0.125, 0.5, 2, 1, 0.25], rtol=1e-14)
    above = PiecewisePowerLaw((0.1, 1.0, 10.0), (0.5, 2.0, 1.0), floor=0.2, exponent_below=2.0)
    np.testing.assert_allclose(above.rate(jnp.asarray([0.2, 0.5, 100.0])), [0, 2 * 0.5 ** math.log10(4), 0.5], rtol=1e-14)
    np.testing.assert_allclose(cooling.rate(jnp.asarray([0.5]))[0], above.rate(jnp.asarray([0.5]))[0], rtol=1e-14)


def test_the_mixing_layer_cools_fastest_at_its_peak(x64):
    cold, hot, time = 1 / 56.2, 1.0, 0.0775
    cooling = MixingLayerCooling(cold, hot, cooling_time_at_peak=time, pressure=2.0, gamma=1.4)
    t = jnp.asarray(np.geomspace(1.001 * cold, 0.849 * hot, 401))
    expected = time * (t / (4.64 * cold)) ** jnp.where(t < 4.64 * cold, -2.0, 3.0)
    np.testing.assert_allclose(cooling.cooling_time(t, 2.0 / t, 1.4), expected, rtol=1e-12)
    amplitude = float(cooling.rate(jnp.asarray(4.64 * cold)))
    direct = MixingLayerCooling(cold, hot, amplitude=amplitude)
    np.testing.assert_allclose(direct.rate(t), cooling.rate(t), rtol=1e-14)
    assert np.isinf(cooling.cooling_time(jnp.asarray([cold, 0.851]), jnp.asarray([1.0, 1.0]), 1.4)).all()
    cooling.check_gamma(1.4)
    direct.check_gamma(1.1)
    with pytest.raises(ValueError, match=r"cooling\.gamma: .* 1\.4, but the equation has 1\.3"):
        cooling.check_gamma(1.3)


# --- derivatives and types -------------------------------------------------------------------------------------------------------

SPECIAL = (0.001, 0.005, 0.02, 0.0200001, 0.05, 0.1, 0.3, 0.31, 1.0, 2.0, 39.9, 40.0, 41.0)
"""Below, at and above floors, nodes and cut-offs of the curves."""


def family(strength, shape):
    """A cooling whose parameters are traced."""
    return {
        "power_law": lambda: PowerLawCooling(strength, shape, 1.0 + 0 * strength, floor=0.02, cutoff=40.0),
        "piecewise": lambda: PiecewisePowerLaw((0.1, 0.3, 1.0), jnp.stack([strength, 1 + shape, strength]), 0.02, 40.0),
        "mixing_layer": lambda: MixingLayerCooling(0.02, 40.0, strength, pressure=1 + shape),
        "log_normal": lambda: LogNormalCooling(0.2, 0.6, 0.02, amplitude=strength * (1 + shape), cutoff=40.0),
    }


@pytest.mark.parametrize("name", ["power_law", "piecewise", "mixing_layer", "log_normal"])
def test_the_adjoint_is_the_transpose_of_the_tangent(name, x64, rng):
    temperature = np.concatenate([np.repeat(SPECIAL, 8), points(rng, 0.01, 60.0, 96)])
    density = points(rng, 1e-6, 1e3, len(temperature))

    def run(temperature, density, dt, gamma, strength, shape):
        cooling = family(strength, shape)[name]()
        return jnp.stack([f(temperature, density, dt, gamma) for f in (cooling.cool, cooling.drop)])

    inputs = tuple(map(jnp.asarray, (temperature, density, 0.3, 5 / 3, 0.7, 0.4)))
    tangent = tuple(jnp.asarray(rng.normal(size=x.shape)) for x in inputs)
    out, forward = jax.jit(lambda i, v: jax.jvp(run, i, v))(inputs, tangent)
    weight = jnp.asarray(rng.normal(size=out.shape))
    # cells that hardly matter and those that matter much are weighed alike
    weight = weight / (1e-3 + jnp.abs(forward))
    backward = jax.jit(lambda i, w: jax.vjp(run, *i)[1](w))(inputs, weight)
    assert all(np.isfinite(x).all() for x in (forward, *backward))
    left, right = float(jnp.vdot(forward, weight)), sum(float(jnp.vdot(a, b)) for a, b in zip(tangent, backward, strict=True))
    scale = float(jnp.abs(forward * weight).sum())
    assert abs(left - right) < 1e-12 * scale
    assert all(float(jnp.abs(x).max()) > 0 for x in backward)


@pytest.mark.parametrize("name", CURVES)
def test_derivatives_are_those_of_the_flow(name, x64, rng):
    """dT'/dT = Λ(T')/Λ(T), dT'/dt = −(γ−1) ρ Λ(T'); 1 and 0 where nothing cools, 0 at the floor."""
    cooling, floor, cutoff = piecewise(name), *CURVES[name][3:]
    temperature, dose = points(rng, 0.5 * floor, 60.0, 300), points(rng, 1e-12, 1e3, 300)
    run = jax.vmap(jax.value_and_grad(lambda t, d: cooling.cool(t, d, 1.0, 2.0), (0, 1)))
    found, (by_temperature, by_dose) = jax.jit(run)(jnp.asarray(temperature), jnp.asarray(dose))
    before, after = np.asarray(cooling.rate(jnp.asarray(temperature))), np.asarray(cooling.rate(found))
    idle = (temperature <= floor) | (temperature > cutoff)
    np.testing.assert_allclose(by_temperature[~idle], (after / np.where(idle, 1, before))[~idle], rtol=1e-12, atol=1e-300)
    np.testing.assert_allclose(by_dose, np.where(idle, 0, -after), rtol=1e-12, atol=1e-300)
    assert (np.asarray(by_temperature)[idle] == 1).all()
    assert (np.asarray(by_temperature)[np.asarray(found) == floor] == 0).all()


@pytest.mark.parametrize(
    ("name", "dtype"),
    [*((n, np.float32) for n in ("power_law", "piecewise", "mixing_layer", "log_normal")), ("piecewise", np.float64)],
)
def test_gradients_are_finite_everywhere(name, dtype, x64):
    cells = np.array(list(itertools.product((*SPECIAL, -1.0, 0.0, 1e-30, 1e30), (0.0, 1e-30, 1.0, 1e20), (0.0, 1e-30, 1.0, 1e10))))
    temperature, density, dt = jnp.asarray(cells.T, dtype)

    def total(temperature, density, dt, strength, shape):
        cooling = family(strength, shape)[name]()
        run = lambda t, d, s: cooling.cool(t, d, s, 5 / 3) + cooling.drop(t, d, s, 5 / 3) + cooling.rate(t)  # noqa: E731
        time = jax.vmap(lambda t, d: cooling.cooling_time(t, d, 5 / 3))(temperature, density)
        return jnp.sum(jax.vmap(run)(temperature, density, dt)), jnp.isnan(time).any()

    inputs = (temperature, density, dt, jnp.asarray(0.7, dtype), jnp.asarray(0.4, dtype))
    (_, undefined), found = jax.jit(jax.value_and_grad(total, tuple(range(5)), has_aux=True))(*inputs)
    assert not undefined
    assert all(x.dtype == dtype and np.isfinite(x).all() for x in found[:3])
    assert not any(np.isnan(x).any() for x in found)


def test_central_differences_agree(x64):
    def run(x):
        cooling = MixingLayerCooling(0.02, 1.0, x[2], pressure=x[3])
        return cooling.cool(x[0], x[1], 0.3, 5 / 3)

    x = np.array([0.2, 6.0, 0.02, 1.2])
    assert float(run(jnp.asarray(x))) < 0.09  # past the peak
    found = np.asarray(jax.grad(run)(jnp.asarray(x)))
    for i, h in itertools.product(range(4), [1e-4]):
        e = h * np.eye(4)[i]
        fourth = (
            8 * (run(jnp.asarray(x + e)) - run(jnp.asarray(x - e))) - run(jnp.asarray(x + 2 * e)) + run(jnp.asarray(x - 2 * e))
        ) / (12 * h)
        assert float(fourth) == pytest.approx(float(found[i]), rel=1e-8)


@pytest.mark.parametrize(
    "cooling",
    [
        PowerLawCooling(1.0, 0.5, 1.0, 0.1, 5.0),
        piecewise("jumps"),
        MixingLayerCooling(1 / 56.2, 1.0, 0.0775),
        LogNormalCooling(0.1, 0.5, 0.01, 0.1),
    ],
    ids=lambda c: type(c).__name__,
)
def test_single_precision_contains_no_double(cooling: AbstractCooling, x64):
    dtype = jnp.float32
    field, dt = jnp.ones((4, 3), dtype), jnp.ones((), dtype)

    def run(t, r, dt):
        loss = lambda t, r, dt: jnp.sum(cooling.cool(t, r, dt, 5 / 3) + cooling.drop(t, r, dt, 5 / 3))  # noqa: E731
        return (
            jax.grad(loss, (0, 1, 2))(t, r, dt),
            jax.grad(lambda t: jnp.sum(cooling.rate(t)))(t),
            cooling.cooling_time(t, r, 5 / 3),
        )

    assert wide_values(jax.make_jaxpr(run)(field, field, dt)) == set()
    assert wide_values(jax.make_jaxpr(run)(field.astype(float), field.astype(float), dt.astype(float)))


def test_a_field_is_cooled_cell_by_cell(rng):
    cooling = MixingLayerCooling(1 / 56.2, 1.0, 0.0775)
    temperature = jnp.asarray(points(rng, 0.01, 1.2, 120).reshape(4, 5, 6), jnp.float32)
    density = 1 / temperature
    run = functools.partial(both, cooling, dt=0.05, gamma=5 / 3)
    field = run(temperature, density)
    cells = [run(t, d) for t, d in zip(temperature.ravel(), density.ravel(), strict=True)]
    for a, b in zip(field, zip(*cells, strict=True), strict=True):
        assert a.shape == temperature.shape
        np.testing.assert_allclose(a.ravel(), jnp.stack(b), rtol=1e-6)


# --- arguments -------------------------------------------------------------------------------------------------------------------

GOOD = {
    PowerLawCooling: {"amplitude": 1, "exponent": 0.5, "reference_temperature": 1, "floor": 0.1},
    PiecewisePowerLaw: {"temperatures": [1, 2, 3], "rates": [1, 2, 1], "floor": 0.1},
    MixingLayerCooling: {"cold_temperature": 0.02, "hot_temperature": 1, "cooling_time_at_peak": 0.1},
    LogNormalCooling: {"peak_temperature": 0.1, "width": 0.5, "floor": 0.01, "cooling_time_at_peak": 0.1},
}

BAD = [
    (PowerLawCooling, {"amplitude": -1}, "amplitude: must be finite and not negative, found -1"),
    (PowerLawCooling, {"exponent": math.inf}, "exponent: needs a finite number"),
    (PowerLawCooling, {"reference_temperature": 0}, "reference_temperature: must be positive and finite"),
    (PowerLawCooling, {"floor": 0}, "floor: must be positive and finite, found 0"),
    (PowerLawCooling, {"cutoff": 0.1}, "cutoff: must lie above the floor 0.1, found 0.1"),
    (PiecewisePowerLaw, {"temperatures": [1]}, "temperatures: a continuous curve needs at least two nodes"),
    (PiecewisePowerLaw, {"temperatures": [1, 3, 2]}, "temperatures: must be positive, finite and ascending"),
    (PiecewisePowerLaw, {"rates": [1, 2]}, "rates: found 2 for 3 temperatures"),
    (PiecewisePowerLaw, {"rates": [1, 0, 1]}, "rates: must be positive and finite"),
    (PiecewisePowerLaw, {"exponents": [1, 2]}, "exponents: found 2 for 3 temperatures"),
    (PiecewisePowerLaw, {"exponents": [1, 2, math.nan]}, "exponents[2]: needs a finite number"),
    (PiecewisePowerLaw, {"exponents": [1, 2, 3], "exponent_above": 1}, "exponent_above: where exponents are given"),
    (PiecewisePowerLaw, {"exponent_below": math.inf}, "exponent_below: needs a finite number"),
    (MixingLayerCooling, {"hot_temperature": 0.01}, "hot_temperature: must be above the cold one"),
    (MixingLayerCooling, {"amplitude": 1}, "cooling_time_at_peak: give either this or the amplitude, found both"),
    (MixingLayerCooling, {"cooling_time_at_peak": None}, "cooling_time_at_peak: give either this or the amplitude, found neither"),
    (MixingLayerCooling, {"cooling_time_at_peak": 0}, "cooling_time_at_peak: must be positive"),
    (MixingLayerCooling, {"pressure": 0}, "pressure: must be positive"),
    (MixingLayerCooling, {"gamma": 1}, "gamma: must be above 1"),
    (MixingLayerCooling, {"time_exponents": [0, math.inf]}, "time_exponents[1]: needs a finite number"),
    (MixingLayerCooling, {"cutoff_over_hot": 0.01}, "cutoff_over_hot: the cut-off 0.01 must lie above the floor 0.02"),
    (LogNormalCooling, {"width": 0}, "width: must be positive"),
    (LogNormalCooling, {"floor": 1000}, "floor: 1000.0 is more than 16 widths above the peak"),
    (LogNormalCooling, {"floor": 1e-8, "cutoff": 1e-6}, "cutoff: 1e-06 is more than 16 widths below the peak"),
    (LogNormalCooling, {"segments_per_width": 0}, "segments_per_width: needs at least one"),
]


@pytest.mark.parametrize("cls", GOOD, ids=lambda c: c.__name__)
def test_yaml_can_write_them(cls):
    part = make_part("name", cls, GOOD[cls], ("equation", "cooling"))
    cooling = part.build()
    assert isinstance(cooling, cls)
    t = jnp.asarray([0.05, 0.5, 1.5], jnp.float32)
    assert (cooling.cool(t, t, 0.1, 5 / 3) <= t).all()


@pytest.mark.parametrize(("cls", "change", "sentence"), BAD, ids=lambda x: x if isinstance(x, str) else "")
def test_bad_arguments_are_refused(cls, change, sentence):
    with pytest.raises(ConfigError) as caught:
        make_part("name", cls, {**GOOD[cls], **change}, ("equation", "cooling")).build()
    assert f"equation.cooling.{sentence}" in str(caught.value)


def test_a_function_that_is_not_positive_is_refused():
    with pytest.raises(ValueError, match=r"rate: must be positive and finite from 0\.1 to 10"):
        PiecewisePowerLaw.from_function(lambda t: 1 - t, 0.1, 10.0, 8, floor=0.1)
    with pytest.raises(ValueError, match="segments: needs at least one"):
        PiecewisePowerLaw.from_function(lambda t: t, 0.1, 10.0, 0, floor=0.1)
    with pytest.raises(ValueError, match="highest: needs 0 < lowest < highest"):
        PiecewisePowerLaw.from_function(lambda t: t, 10.0, 0.1, 8, floor=0.1)
