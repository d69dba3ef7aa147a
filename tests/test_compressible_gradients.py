"""Gradients through the compressible solver: adjoint test through every scheme, differences, finiteness in hard states."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compressible_flows import RECONSTRUCTIONS, RIEMANN, conserved, gas
from flows import TWO_PI, EveryFlux, randomised
from test_compressible import rough_flow
from test_gradients import _mismatches, _norm, _normal

from hybridsim.grid import Grid
from hybridsim.model import Model, State, rollout
from hybridsim.solvers import reconstruction as reconstruction_module
from hybridsim.solvers.cooling import PowerLawCooling
from hybridsim.solvers.steppers import SSPRK2, SSPRK3, VL2

pytestmark = pytest.mark.usefixtures("x64")

BOXES = {1: ((14,), (1.0,)), 2: ((8, 6), (1.0, 0.8)), 3: ((6, 5, 4), (1.0, 0.9, 0.7))}
NUMBERS = {"gamma": 1.4, "viscosity": 5e-3, "prandtl": 0.7, "diffusivity": 4e-3}


def setting(
    dims,
    reconstruction="plm_van_leer",
    riemann="hllc",
    stepper=None,
    closed=False,
    start=None,
    boundaries=(),
    speed=4.0,
    make=None,
    **options,
):
    """(parameters, function of them, steps and levels -> final state): state, γ, viscosity, Prandtl number, diffusivity, and
    the weights of a closure."""
    shape, lengths = BOXES[dims]
    grid = Grid(shape, lengths, boundaries)
    stepper = stepper or (VL2() if reconstruction.startswith("plm") else SSPRK3())
    make = make or (lambda p: {})
    plain = gas(grid, scalars={"dye": 0.1})
    u = rough_flow(grid, 2, mach=0.9, scalars=1) if start is None else start(grid)
    parameters = {name: jnp.asarray(value) for name, value in NUMBERS.items()} | {"state": jnp.asarray(u)}
    closure = jax.tree.map(lambda a: a.astype(np.float64), randomised(EveryFlux(plain, jax.random.key(0)), 3, 0.3))
    weights, fixed = eqx.partition(closure, eqx.is_inexact_array)
    if closed:
        parameters["weights"] = weights
    dt = 0.3 * min(grid.spacing) / speed / dims

    def final(p, count, levels):
        physics = {"viscosity": p["viscosity"], "prandtl": p["prandtl"], "scalars": {"dye": p["diffusivity"]}, **make(p)}
        solver = gas(grid, p["gamma"], reconstruction=reconstruction, riemann=riemann, **options, **physics)
        closures = (eqx.combine(p["weights"], fixed),) if closed else ()
        frames = rollout(Model(solver, stepper, dt, closures), State(p["state"]), 1, every=count, checkpoint_levels=levels)
        return frames.u[0]

    return parameters, final


def check(found, *names):
    print(*names, {k: f"{v:.1e}" for k, v in found.items()})
    assert max(found.values()) <= 1e-12


PAIRS = [(a, b) for a in RECONSTRUCTIONS for b in RIEMANN]


def test_rules_by_hand_are_the_derivatives(rng):
    """The rules of limiters and of WENO5-Z against those that JAX derives, kinks aside, and where all cells are equal."""
    for function, cells in (
        (reconstruction_module.van_leer, 2),
        (reconstruction_module.monotonised_central, 2),
        (reconstruction_module._weno5z_side, 5),
    ):
        q, dq = jnp.asarray(rng.standard_normal((2, cells, 400)))
        value, change = jax.jvp(function, tuple(q), tuple(dq))
        expected_value, expected = jax.jvp(function.fun, tuple(q), tuple(dq))
        np.testing.assert_array_equal(value, expected_value)
        np.testing.assert_allclose(change, expected, rtol=1e-10, atol=1e-12)
    for dtype in (jnp.float32, jnp.float64):
        level = [jnp.full((1,), 1e3, dtype)] * 5
        _, change = jax.jvp(reconstruction_module._weno5z_side, level, [jnp.ones((1,), dtype)] * 5)
        np.testing.assert_allclose(change, 1, rtol=8 * float(jnp.finfo(dtype).eps))


@pytest.mark.slow
@pytest.mark.parametrize(("reconstruction", "riemann"), PAIRS)
def test_adjoint_through_every_scheme(reconstruction, riemann):
    reconstruct = "characteristic" if riemann in ("hllc", "llf") else "primitive"
    parameters, final = setting(1, reconstruction, riemann, reconstruct=reconstruct)
    found, _ = _mismatches(parameters, final, 20, (0,))
    check(found, reconstruction, riemann, reconstruct)


CASES = [
    pytest.param(1, "plm_van_leer", "hllc", SSPRK2(), ("reflecting",), marks=pytest.mark.slow),
    pytest.param(1, "weno5z", "hllc", SSPRK3(), ("outflow",), marks=pytest.mark.slow),
    pytest.param(2, "plm_van_leer", "hllc", VL2(), (), marks=pytest.mark.slow),
    pytest.param(2, "weno5z", "hllc_low_mach", SSPRK3(), ("periodic", ("reflecting", "outflow")), marks=pytest.mark.slow),
    pytest.param(3, "ppm", "hllc", SSPRK3(), (), marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("dims", "reconstruction", "riemann", "stepper", "boundaries"), CASES)
def test_adjoint_with_a_closure_and_checkpoints(dims, reconstruction, riemann, stepper, boundaries):
    parameters, final = setting(dims, reconstruction, riemann, stepper, True, boundaries=boundaries)
    found, _ = _mismatches(parameters, final, 20, (0, 2))
    check(found, dims, reconstruction, riemann)
    assert len(found) == 2 * len(parameters)


def blast(grid, ratio=1e4):
    """Gas at rest, one cell in four under high pressure: shocks, contacts and strong rarefactions at once."""
    x = grid.mesh()[0]
    hot = (np.arange(grid.shape[0]) % 7 < 2).reshape(-1, *(1,) * (grid.ndim - 1)) * np.ones(grid.shape)
    w = np.stack([1 + 0.3 * np.cos(TWO_PI * x), *(0.1 + 0 * q for q in grid.mesh()), 1 + ratio * hot, 0.5 + 0.2 * hot])
    return conserved(w, 1.4, grid.ndim)


def nearly_empty(grid):
    """Two streams that part at Mach 20: what is left between them is close to a vacuum."""
    x = grid.mesh()[0] / grid.lengths[0]
    away = np.where(x < 0.5, -20.0, 20.0)
    w = np.stack([1 + 0.1 * np.sin(TWO_PI * x), away, *(0 * q for q in grid.mesh()[1:]), 0.7 + 0 * x, 0.5 + 0 * x])
    return conserved(w, 1.4, grid.ndim)


def colder_than_possible(grid):
    """A smooth flow with a negative pressure in a few cells: floors stand in."""
    u = rough_flow(grid, 2, mach=0.9, scalars=1)
    u[grid.ndim + 1, ..., 2:4] = 0.3 * (0.5 * (u[1 : grid.ndim + 1] ** 2).sum(axis=0) / u[0])[..., 2:4]
    return u


def thinner_than_possible(grid):
    """The same with one cell all but empty, below the floors of density and pressure."""
    u = rough_flow(grid, 2, mach=0.9, scalars=1)
    u[:, ..., 3] *= 1e-14 / u[0, ..., 3]
    return u


def uniform(speed):
    def start(grid):
        w = np.stack([np.ones(grid.shape), *(np.full(grid.shape, speed) for _ in grid.shape), *(np.ones(grid.shape),) * 2])
        return conserved(w, 1.4, grid.ndim)

    return start


HARD = {  # start, fastest wave
    "blast": (blast, 300.0),
    "nearly empty": (nearly_empty, 60.0),
    "negative pressure": (colder_than_possible, 40.0),
    "an empty cell": (thinner_than_possible, 40.0),
}


@pytest.mark.parametrize(
    ("start", "speed"),
    [pytest.param(*case, id=name, marks=[] if name == "blast" else [pytest.mark.slow]) for name, case in HARD.items()],
)
@pytest.mark.parametrize("reconstruction", ["plm_van_leer", pytest.param("weno5z", marks=pytest.mark.slow)])
def test_adjoint_through_limiter_and_floors(reconstruction, start, speed):
    parameters, final = setting(1, reconstruction, start=start, closed=True, speed=speed)
    found, pulled = _mismatches(parameters, lambda p, count, levels: _scaled(final(p, count, levels)), 4, (0,))
    check(found, reconstruction, start.__name__)
    assert all(np.isfinite(a).all() for a in jax.tree.leaves(pulled))


def _scaled(u):
    """Channels of like size, so that no one hides the others."""
    return u / jax.lax.stop_gradient(jnp.abs(u).max(axis=tuple(range(1, u.ndim)), keepdims=True))


EASY = {name: (uniform(v), 40.0) for name, v in {"at rest": 0.0, "uniform flow": 0.7, "supersonic": 5.0, "sonic": 1.4**0.5}.items()}


@pytest.mark.parametrize(
    "reconstruction", [r if r == "plm_van_leer" else pytest.param(r, marks=pytest.mark.slow) for r in RECONSTRUCTIONS]
)
def test_gradients_are_finite(reconstruction):
    """At rest, in uniform flow, at the sonic point, in blasts, near a vacuum, under floors: in state and parameters."""
    for riemann in [RIEMANN[RECONSTRUCTIONS.index(reconstruction)]]:
        parameters, final = setting(1, reconstruction, riemann, speed=300.0)
        gradient = jax.jit(jax.grad(lambda p, final=final: jnp.sum((final(p, 2, 0) - 1) ** 2)))
        for name, (start, _) in (EASY | HARD).items():
            leaves = jax.tree.leaves(gradient({**parameters, "state": jnp.asarray(start(Grid(*BOXES[1])))}))
            assert all(np.isfinite(a).all() for a in leaves), (reconstruction, riemann, name)
            assert any(a.any() for a in leaves)


@pytest.mark.slow
@pytest.mark.parametrize("dims", [2, 3])
def test_gradients_are_finite_in_more_dimensions(dims):
    parameters, final = setting(dims, closed=True, speed=300.0)
    gradient = jax.jit(jax.grad(lambda p: jnp.sum((final(p, 2, 2) - 1) ** 2)))
    for name, (start, _) in (EASY | HARD).items():
        leaves = jax.tree.leaves(gradient({**parameters, "state": jnp.asarray(start(Grid(*BOXES[dims])))}))
        assert all(np.isfinite(a).all() for a in leaves), (dims, name)
        assert any(a.any() for a in leaves)


def smooth(grid):
    """A subsonic stream whose waves are far from every switch but that of limiters at extrema."""
    x = grid.mesh()
    wave = (
        sum(np.sin(TWO_PI * q / length + 0.37 + a) for a, (q, length) in enumerate(zip(x, grid.lengths, strict=True))) / grid.ndim
    )
    w = np.stack([1 + 0.3 * wave, *(0.5 + 0.1 * a + 0.1 * wave for a in range(grid.ndim)), 1 + 0.2 * wave, 0.5 + 0.2 * wave])
    return conserved(w, 1.4, grid.ndim)


def _slopes(parameters, final, count=5):
    """|Jv − difference| / |Jv| per parameter: v is the parameter itself, or noise of a thousandth of the state."""
    run = jax.jit(lambda p: final(p, count, 0))
    push = jax.jit(lambda p, v: jax.jvp(lambda p: final(p, count, 0), (p,), (v,))[1])
    still = jax.tree.map(jnp.zeros_like, parameters)
    out = {}
    for i, name in enumerate(sorted(parameters)):
        size = 1e-3 if name == "state" else 1.0
        direction = jax.tree.map(lambda a, d, size=size: size * a * d, parameters[name], _normal(parameters[name], i + 1))
        slope = push(parameters, {**still, name: direction})

        def difference(h, name=name, direction=direction):
            at = lambda s: run({**parameters, name: jax.tree.map(lambda p, d: p + s * d, parameters[name], direction)})  # noqa: E731
            return (at(h) - at(-h)) / (2 * h)

        h = {"state": 1.5e-4, "gamma": 1e-4, "weights": 1e-4}.get(name, 1e-3)  # small: limiters and weights have kinks
        best = (4 * difference(h / 2) - difference(h)) / 3
        assert _norm(slope) > 0
        out[name] = _norm(slope - best) / _norm(slope)
    return out


# By default the test through cooling takes differences of this scheme, too.
SMOOTH = [
    pytest.param(1, "plm_van_leer", "hllc", False, marks=pytest.mark.slow),
    pytest.param(1, "weno5z", "hllc", True, marks=pytest.mark.slow),
    pytest.param(1, "ppm", "hlle", False, marks=pytest.mark.slow),
    pytest.param(1, "plm_mc", "llf", False, marks=pytest.mark.slow),
    pytest.param(1, "weno5z", "hllc_low_mach", False, marks=pytest.mark.slow),
    pytest.param(2, "weno5z", "hllc", True, marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("dims", "reconstruction", "riemann", "closed"), SMOOTH)
def test_gradients_equal_central_differences_on_smooth_flow(dims, reconstruction, riemann, closed):
    parameters, final = setting(dims, reconstruction, riemann, closed=closed, start=smooth)
    worst = _slopes(parameters, final)
    print(dims, reconstruction, riemann, {k: f"{v:.1e}" for k, v in worst.items()})
    assert max(worst.values()) <= 1e-8


@pytest.mark.slow
def test_checkpoints_change_no_gradient():
    parameters, final = setting(1, "weno5z", closed=True)
    plain, nested = (
        jax.jit(jax.grad(lambda p, levels=levels: jnp.sum(final(p, 30, levels) ** 2)))(parameters) for levels in (0, 2)
    )
    assert _norm(jax.tree.map(lambda a, b: a - b, plain, nested)) <= 1e-13 * _norm(plain)
    assert _norm(plain) > 0


def cooled(p):
    """Power-law cooling that takes about a third of the heat in the time of the test; its strength and exponent are parameters."""
    return {"cooling": PowerLawCooling(p["strength"], p["exponent"], jnp.asarray(1.0), floor=0.3)}


@pytest.mark.slow
@pytest.mark.parametrize("floor", [pytest.param(False, id=""), pytest.param(True, id="down to its floor")])
def test_adjoint_and_differences_through_cooling(floor):
    """Half of the cooling before and half after each step; where gas has reached the floor of temperature it stays."""
    parameters, final = setting(1, start=smooth, make=cooled)
    parameters |= {"strength": jnp.asarray(100.0 if floor else 2.0), "exponent": jnp.asarray(0.5)}
    found, pulled = _mismatches(parameters, final, 10, (0, 2))
    check(found, "cooling", floor)
    assert all(np.isfinite(a).all() for a in jax.tree.leaves(pulled))
    if not floor:
        worst = _slopes(parameters, final)
        print({k: f"{v:.1e}" for k, v in worst.items()})
        assert max(worst.values()) <= 1e-8


def test_the_finiteness_test_can_fail():
    """The square root of a pressure that a floor replaces: finite, with an infinite derivative."""
    gradient = jax.grad(lambda p: jnp.sum(jnp.where(p > 0, jnp.sqrt(p), 0.0)))(jnp.array([0.0, 1.0]))
    assert not np.isfinite(gradient).all()
