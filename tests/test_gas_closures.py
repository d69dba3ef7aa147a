"""Closures of a gas, at all five places: what they conserve, what they are when untrained, orders, units, the classical one."""

from functools import partial

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compressible_flows import conserved, gas, means, rates, run, steps_for, tube
from flows import TWO_PI
from test_compressible import rough_flow
from test_positivity import COURANT, GAMMA, random_problems, run_all

from hybridsim.config import FROM_RUN, blank, catalogue, load_class, make_part
from hybridsim.contract import Flux, Interpolation, PostStep, Source, View
from hybridsim.corrections.dynamic import DynamicSmagorinsky
from hybridsim.corrections.eddy import Hyperviscosity, Leith, Smagorinsky, filter_width, gas_eddy_flux
from hybridsim.corrections.gas import gas_of
from hybridsim.corrections.gradient_model import GradientModel
from hybridsim.corrections.learned import LearnedCorrection, LearnedFlux, LearnedInterpolation, LearnedSource, LearnedStep
from hybridsim.corrections.spectral_eddy import SpectralEddyViscosity
from hybridsim.grid import Grid
from hybridsim.model import Model, State, rollout
from hybridsim.solvers.reconstruction import RECONSTRUCTIONS, null_space
from hybridsim.solvers.steppers import SSPRK2, SSPRK3, VL2, ForwardEuler
from hybridsim.train import How, window_loss

pytestmark = pytest.mark.usefixtures("x64")

BOXES = {1: Grid((12,), (1.0,)), 2: Grid((10, 8), (1.0, 0.9)), 3: Grid((8, 6, 5), (1.0, 0.9, 0.7))}
INCOMPRESSIBLE = ("leith", "hyperviscosity", "dynamic_smagorinsky", "gradient_model", "spectral_eddy_viscosity")
TENDENCIES = (LearnedFlux, LearnedSource, LearnedInterpolation)


def view_of(solver, u, dt=0.01, t=0.0):
    u = jnp.asarray(u)
    return View(u, jnp.asarray(t, u.dtype), jnp.asarray(dt, u.dtype), solver)


def network(kind, solver, std=None, seed=0, dtype=np.float64, **options):
    """One of the learned closures, small, as it starts or with weights drawn from N(0, std²)."""
    supplied = {"free_weights": solver.free_weights()} if kind is LearnedInterpolation else {}
    options = {"width": 4, "depth": 1, "density_scale": 0.8, "temperature_scale": 1.2, "velocity_scale": 0.9} | options
    build = lambda: kind(solver.grid.ndim, **options, **supplied, variables=solver.variables, key=jax.random.key(seed))  # noqa: E731
    if std is None:
        return jax.tree.map(lambda a: a.astype(dtype) if eqx.is_inexact_array(a) else a, build())
    rng = np.random.default_rng(seed)
    draw = lambda a: jnp.asarray(std * rng.standard_normal(a.shape), dtype) if eqx.is_inexact_array(a) else a  # noqa: E731
    return jax.tree.map(draw, blank(build))


def noise(grid, seed=0, scalars=1):
    """W without any smoothness: every cell another gas."""
    rng = np.random.default_rng(seed)
    rho, p = 2 ** rng.uniform(-1, 1, (2, *grid.shape))
    return np.stack([rho, *rng.standard_normal((grid.ndim, *grid.shape)), p, *rng.uniform(0, 1, (scalars, *grid.shape))])


def flux_divergence(grid, flux):
    """Σ_a ∂_a F[a, c] in a periodic box."""
    flux = np.asarray(flux)
    return sum((flux[a] - np.roll(flux[a], 1, a + 1)) / h for a, h in enumerate(grid.spacing))


# --- what is conserved -----------------------------------------------------------------------------------------------------------


class Given(Flux):
    """F = what it is given."""

    value: jax.Array

    def __call__(self, view, memory=None, key=None):
        return self.value


class GivenWeights(Interpolation):
    """a = what it is given."""

    value: jax.Array

    def __call__(self, view, memory=None, key=None):
        return self.value


def drift(solver, make, dtype, seeds):
    """The largest |Σu₁ − Σu₀| over Σ|u| + Δt/Δx Σ|F|, after one step with closures whose weights are drawn with std 0.1 to 100."""
    dt, u = 1e-3, rough_flow(solver.grid, 4, scalars=1).astype(dtype)
    spreads = 10 ** np.linspace(-1, 2, seeds)
    closures = [make(std, seed, dtype) for seed, std in enumerate(spreads)]
    arrays, fixed = zip(*(eqx.partition(c, eqx.is_array) for c in closures), strict=True)
    stacked = jax.tree.map(lambda *a: jnp.stack(a), *arrays)

    @jax.jit
    @partial(jax.vmap, in_axes=(0, None))
    def step(arrays, u):
        closures = eqx.combine(arrays, fixed[0])
        model = Model(solver, ForwardEuler(), dt, closures)
        z, carry, _ = model(solver.encode(u), model.init_carry(u), jnp.zeros((), jnp.int32))
        fluxes = [jnp.abs(c(view_of(solver, u, dt))) for c in closures if isinstance(c, Flux)]
        space = tuple(range(2, u.ndim + 1))
        total = jnp.zeros((len(u),), u.dtype)
        for flux in fluxes:
            total = total + flux.sum(axis=space).sum(axis=0)
        return solver.decode(z), total, carry["ledger"][0]

    after, fluxes, ledger = (np.asarray(a, np.float64) for a in step(stacked, jnp.asarray(u)))
    before = u.astype(np.float64).reshape(len(u), -1)
    change = np.abs((after.reshape(seeds, len(u), -1) - before[None]).sum(axis=2))
    scale = np.abs(before).sum(axis=1)[None] + dt / min(solver.grid.spacing) * fluxes
    assert np.isfinite(after).all()
    assert np.abs(after - u).max() > 1e-5
    assert not ledger[:, : len(u)].any()
    return (change / scale).max()


@pytest.mark.parametrize(("dims", "dtype"), [
    (1, np.float64),
    (1, np.float32),
    (2, np.float32),
    pytest.param(2, np.float64, marks=pytest.mark.slow),
    pytest.param(3, np.float64, marks=pytest.mark.slow),
    pytest.param(3, np.float32, marks=pytest.mark.slow),
])  # fmt: skip
def test_fluxes_and_weights_conserve_every_sum_whatever_they_are(dims, dtype):
    solver = gas(BOXES[dims], viscosity=1e-3, scalars={"dye": 1e-3})

    def make(std, seed, dtype):
        learned = [network(kind, solver, std, seed, dtype) for kind in (LearnedFlux, LearnedInterpolation)]
        return (*learned, Smagorinsky(jnp.asarray(0.1 + 0.01 * std, dtype)))

    found = drift(solver, make, dtype, 24)
    print(dims, dtype.__name__, found)
    assert found <= {np.float64: 1e-14, np.float32: 1e-7}[dtype]


def test_sources_do_not():
    """The negative control."""
    solver = gas(BOXES[1], scalars={"dye": 1e-3})
    assert drift(solver, lambda std, seed, dtype: (network(LearnedSource, solver, std, seed, dtype),), np.float64, 6) > 1e-6


# --- untrained closures ----------------------------------------------------------------------------------------------------------


def steep(grid):
    """Density and pressure fall by e⁷ from cell to cell and rise again: there a guard of the scheme with weights would act."""
    n = grid.shape[0]
    height = -7.0 * np.minimum(np.abs(np.arange(n) - n // 2), 3)
    w = np.stack([np.exp(height), 0.3 + 0 * height, np.exp(height), 0.5 + 0 * height])
    return conserved(w, 1.4, 1)


@pytest.mark.parametrize(
    ("reconstruction", "stepper", "dims", "dtype", "when"),
    [
        ("plm_van_leer", VL2(), 1, np.float32, "step"),
        ("weno5z", SSPRK3(), 1, np.float64, "stage"),
        pytest.param("plm_mc", SSPRK3(), 2, np.float64, "stage", marks=pytest.mark.slow),
        pytest.param("ppm", SSPRK3(), 3, np.float32, "step", marks=pytest.mark.slow),
    ],
)
def test_an_untrained_closure_is_none(reconstruction, stepper, dims, dtype, when):
    solver = gas(BOXES[dims], reconstruction=reconstruction, scalars={"dye": 0.0})
    kinds = (*TENDENCIES, LearnedCorrection)
    untrained = [network(kind, solver, dtype=dtype) for kind in kinds]
    evaluate = (*(when,) * len(TENDENCIES), "step")
    for start in (rough_flow(solver.grid, 1, scalars=1), *([steep(solver.grid)] if dims == 1 else ())):
        u = start.astype(dtype)
        bare = run(solver, stepper, u, 1e-3, 1).u
        limit = 4 * np.finfo(dtype).eps * np.abs(u).max(axis=tuple(range(1, u.ndim)), keepdims=True)
        assert (np.abs(run(solver, stepper, u, 1e-3, 1, untrained, evaluate).u - bare) <= limit).all()
        assert np.abs(bare - u).max() > 1e-3
        for i, kind in enumerate(kinds):  # negative control: with weights each of them is another solver
            trained = [*untrained[:i], network(kind, solver, 0.5, dtype=dtype), *untrained[i + 1 :]]
            assert (np.abs(run(solver, stepper, u, 1e-3, 1, trained, evaluate).u - bare) > 10 * limit).any(), kind


def test_an_untrained_step_moves_nothing():
    solver = gas(BOXES[1])
    u = rough_flow(solver.grid, 1)
    np.testing.assert_array_equal(run(solver, SSPRK3(), u, 0.1, 3, (network(LearnedStep, solver),)).u, u)


# --- learned interpolation -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("reconstruction", "cells", "least"),
    [("plm_mc", (64, 128, 256), 1.9), pytest.param("weno5z", (16, 32, 64), 4.9, marks=pytest.mark.slow)],
)
def test_no_weights_can_lower_the_order(reconstruction, cells, least):
    """An entropy wave, in time steps that are small enough for the error of the stepper not to count."""
    stepper = SSPRK2() if least < 2 else SSPRK3()
    wave = lambda t: lambda x: (1 + 0.2 * np.sin(TWO_PI * (x - t)), 1 + 0 * x, 1 + 0 * x)  # noqa: E731
    errors = {std: [] for std in (0.3, 10.0)}
    for n in cells:
        grid = tube(n, boundary="periodic")
        solver = gas(grid, 1.4, reconstruction=reconstruction)
        dt, count = steps_for(0.25, 0.15 / n * (cells[0] / n) ** (0 if least < 2 else 2 / 3))
        for std, found in errors.items():
            closure = network(LearnedInterpolation, solver, std, 3, depth=2)
            end = run(solver, stepper, means(grid, 1.4, wave(0.0)), dt, count, (closure,), "stage").u
            found.append(np.abs(end[0] - means(grid, 1.4, wave(0.25))[0]).mean())
    print(reconstruction, {std: (found, rates(found)) for std, found in errors.items()})
    assert abs(errors[0.3][-1] - errors[10.0][-1]) > 0.05 * errors[0.3][-1]  # the weights do something
    for found in errors.values():
        assert found[-1] < 1e-2
        assert rates(found)[-1] >= least


def test_what_is_free_is_the_same_on_every_machine():
    """Trained weights belong to these combinations: differences of rising order, signs included."""
    np.testing.assert_allclose(null_space("plm_mc"), [[0.5, -0.5, -0.5, 0.5], np.array([-1, 3, -3, 1]) / 20**0.5], atol=1e-14)
    for name, scheme in RECONSTRUCTIONS.items():
        z, edges = null_space(name), np.arange(-scheme.halo, scheme.halo + 1, dtype=float)
        np.testing.assert_allclose(z @ z.T, np.eye(len(z)), atol=1e-13)
        signs = (-1.0) ** np.arange(scheme.order, scheme.order + len(z))
        np.testing.assert_allclose(z[:, ::-1], signs[:, None] * z, atol=1e-12)
        for degree in range(scheme.order):
            assert np.abs(z @ np.diff(edges ** (degree + 1))).max(initial=0) <= 1e-11 * scheme.halo**degree
    assert gas(BOXES[1], reconstruction="constant").free_weights() == 0


class Constant(Interpolation):
    """a = the same everywhere."""

    value: float = eqx.field(static=True, default=0.1)

    def __call__(self, view, memory=None, key=None):
        shape = (view.grid.ndim, 2, len(view.variables), view.solver.free_weights(), *view.grid.shape)
        return jnp.full(shape, self.value, view.u.dtype)


def test_weights_of_the_two_sides_are_mirror_images():
    """The same coefficients on both sides: a mirrored flow stays one."""
    solver = gas(BOXES[1])
    u = rough_flow(solver.grid, 3)
    mirror = lambda q: np.flip(q, 1) * np.array([1.0, -1.0, 1.0])[:, None]  # noqa: E731
    ahead, behind = (run(solver, VL2(), q, 1e-3, 5, (Constant(),)).u for q in (u, mirror(u)))
    np.testing.assert_allclose(mirror(behind), ahead, rtol=0, atol=1e-14)
    assert np.abs(run(solver, VL2(), u, 1e-3, 5).u - ahead).max() > 1e-5


@pytest.mark.parametrize(
    ("reconstruction", "stepper"), [("plm_van_leer", VL2()), pytest.param("weno5z", SSPRK3(), marks=pytest.mark.slow)]
)
def test_no_weights_lose_a_density_or_pressure(reconstruction, stepper):
    count = 500
    solver = gas(tube(16), GAMMA, reconstruction=reconstruction)
    made = network(LearnedInterpolation, solver)
    rng = np.random.default_rng(0)
    spread = 10 ** rng.uniform(-1, 2, count)
    draw = lambda a: jnp.asarray(rng.standard_normal((count, *a.shape)) * spread[(slice(None), *(None,) * a.ndim)])  # noqa: E731
    arrays, fixed = eqx.partition(made, eqx.is_inexact_array)
    u = random_problems(count)
    end, rows, low, _ = run_all(solver, stepper, u, COURANT, (eqx.combine(jax.tree.map(draw, arrays), fixed),))
    print(reconstruction, "lowest ρ, p:", low.min(axis=0), "limited faces:", rows["limited_faces"].sum())
    assert np.isfinite(end).all()
    # As with fluxes: gas may be heated within one stage until Δt is beyond the limiter's bound, and then that is on record.
    within = rows["bound_violations"] == 0
    assert within.mean() >= 0.998
    assert (low[within] > 0).all()
    assert not rows["floor_events"][within].any()


def test_constructor_and_solver_check_what_is_free():
    solver = gas(BOXES[1])
    with pytest.raises(ValueError, match="the solver has no face interpolation"):
        LearnedInterpolation(1, free_weights=0, variables=solver.variables, key=jax.random.key(0))
    with pytest.raises(ValueError, match="bound: must be positive and finite, found 0"):
        LearnedInterpolation(1, bound=0.0, free_weights=2, variables=solver.variables, key=jax.random.key(0))
    other = gas(BOXES[1], reconstruction="weno5z")
    model = Model(other, SSPRK3(), 1e-3, (network(LearnedInterpolation, solver),))
    with pytest.raises(ValueError, match=r"must return shape \(1, 2, 3, 1, 12\), found \(1, 2, 3, 2, 12\)"):
        model.try_closures(jnp.asarray(rough_flow(other.grid)))
    per_channel = network(LearnedInterpolation, solver, 0.3, shared=False)
    found = np.asarray(per_channel(view_of(solver, rough_flow(solver.grid))))
    assert found.shape == (1, 2, 3, 2, 12)
    assert np.abs(found[:, :, 0] - found[:, :, 1]).max() > 1e-3
    assert np.abs(found).max() <= per_channel.bound


# --- when closures are evaluated -------------------------------------------------------------------------------------------------


def test_held_closures_are_first_order_in_time_and_staged_ones_follow_the_stepper():
    solver = gas(BOXES[1], reconstruction="weno5z", viscosity=5e-3)
    closures = [network(kind, solver, 0.3, 2) for kind in (LearnedFlux, LearnedInterpolation)]
    u = rough_flow(solver.grid, 2, mach=0.3, modes=1)
    time = 0.02
    final = lambda n, when: run(solver, SSPRK2(), u, time / n, n, closures, when).u  # noqa: E731
    exact = final(160, "stage")
    held, staged = ([np.abs(final(n, when) - exact).max() for n in (10, 20, 40)] for when in ("step", "stage"))
    print(held, rates(held), staged, rates(staged))
    assert 0.9 < rates(held)[-1] < 1.2
    assert rates(staged)[-1] > 1.8
    assert staged[-1] < 0.1 * held[-1]


def test_groups_that_contribute_different_things_are_added_up_by_name():
    """A flux and weights, held and at stages, in any grouping: they are constants, so nothing may change."""
    solver = gas(BOXES[1])
    rng = np.random.default_rng(0)
    flux = Given(jnp.asarray(0.1 * rng.standard_normal((1, 3, 12))))
    weights = GivenWeights(jnp.asarray(0.1 * rng.standard_normal((1, 2, 3, 2, 12))))
    u = rough_flow(solver.grid, 5)
    closures = (flux, weights, flux, weights)
    runs = [run(solver, SSPRK2(), u, 1e-3, 3, closures, when).u for when in ("step", ("stage", "step", "step", "stage"))]
    doubled = (Given(2 * flux.value), GivenWeights(2 * weights.value))
    runs.append(run(solver, SSPRK2(), u, 1e-3, 3, doubled).u)
    for other in runs[1:]:
        np.testing.assert_allclose(other, runs[0], rtol=0, atol=1e-13)
    assert np.abs(run(solver, SSPRK2(), u, 1e-3, 3, (flux, weights)).u - runs[0]).max() > 1e-4


# --- learned fluxes, sources and steps -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("staggered", [False, True])
def test_a_learned_flux_has_every_channel_and_knows_no_mean_flow(staggered):
    """F = (J, σ + Jv, q + σ·v + ½Jv², j + Jc): with gradients as inputs, another observer sees what Galilei says."""
    grid, boost = BOXES[2], np.array([0.7, -1.3])
    solver = gas(grid, scalars={"dye": 0.0})
    options = {"staggered": staggered, "symmetric": not staggered}
    closure = network(LearnedFlux, solver, 0.5, 1, inputs="gradient", scalar_scale=0.5, **options)
    w = noise(grid, 3)
    moving = w.copy()
    moving[1:3] += boost[:, None, None]
    one, other = (np.asarray(closure(view_of(solver, conserved(q, 1.4, 2)))) for q in (w, moving))
    assert one.shape == (2, 5, 10, 8)
    assert all(np.abs(q).max() > 1e-3 for row in one for q in row)
    mass, force, energy = one[:, 0], one[:, 1:3], one[:, 3]
    expected = one.copy()
    expected[:, 1:3] = force + mass[:, None] * boost[None, :, None, None]
    expected[:, 3] = energy + np.einsum("acxy,c->axy", force, boost) + 0.5 * mass * (boost @ boost)
    np.testing.assert_allclose(other, expected, rtol=0, atol=1e-12 * np.abs(one).max())
    seen = network(LearnedFlux, solver, 0.5, 1)
    plain, moved = (np.asarray(seen(view_of(solver, conserved(q, 1.4, 2)))) for q in (w, moving))
    assert np.abs(plain[:, 0] - moved[:, 0]).max() > 1e-2  # negative control: velocities as inputs know of it


def test_mass_stays_where_it_is_if_asked_to():
    solver = gas(BOXES[2], scalars={"dye": 0.0})
    closure = network(LearnedFlux, solver, 0.5, mass_flux=False)
    assert closure.scalars == ("energy", "dye")
    assert network(LearnedFlux, solver).scalars == ("density", "energy", "dye")
    flux = np.asarray(closure(view_of(solver, conserved(noise(BOXES[2]), 1.4, 2))))
    assert not flux[:, 0].any()
    assert all(np.abs(q).max() > 1e-3 for row in flux[:, 1:] for q in row)


def test_a_staggered_flux_takes_no_average():
    """Where the averaged flux is (F_i + F_{i+1})/2 of what the network says of the gas in each cell, the staggered one is what it
    says at the face."""
    solver = gas(BOXES[2], scalars={"dye": 0.0})
    options = {"symmetric": False, "std": 0.5, "density_scale": 1.0, "temperature_scale": 1.0}
    centred, staggered = (network(LearnedFlux, solver, staggered=s, **options) for s in (False, True))
    rest = noise(BOXES[2], 3)
    rest[0], rest[1:3], rest[4] = 1.0, 0.0, 0.0  # what is carried along is the same on both sides of a face
    view = view_of(solver, conserved(rest, 1.4, 2))
    at_faces, averaged = np.asarray(staggered(view)), np.asarray(centred(view))
    half = np.stack([0.5 * (q + np.roll(q, -1, a + 1)) for a, q in enumerate(at_faces)])
    np.testing.assert_allclose(averaged, half, rtol=0, atol=1e-13 * np.abs(half).max())
    assert np.abs(averaged - at_faces).max() > 0.1 * np.abs(at_faces).max()
    with pytest.raises(ValueError, match=r"symmetric: not possible with staggered fluxes of a gas"):
        network(LearnedFlux, solver, staggered=True)


@pytest.mark.parametrize("inputs", ["velocity", "gradient"])
@pytest.mark.parametrize("dims", [1, 2, pytest.param(3, marks=pytest.mark.slow)])
def test_learned_closures_have_no_units_of_their_own(dims, inputs):
    """The same flow in other units of mass, time and concentration."""
    mass, speed, concentration = 3.0, 0.25, 2.0
    grid = BOXES[dims]
    solver = gas(grid, scalars={"dye": 0.0})
    w = noise(grid, 2)
    units = np.array([mass, *(speed,) * dims, mass * speed**2, concentration])
    flow = np.array([mass, *(mass * speed,) * dims, mass * speed**2, mass * concentration])
    column = (slice(None), *(None,) * dims)
    scales = {"density_scale": 0.8, "velocity_scale": 0.9, "temperature_scale": 1.2, "scalar_scale": 0.6}
    factors = dict(zip(scales, (mass, speed, speed**2, concentration), strict=True))
    for kind in (LearnedFlux, LearnedSource, LearnedCorrection, LearnedStep, LearnedInterpolation):
        found = []
        for state, dt, used in (
            (w, 0.01, scales),
            (w * units[column], 0.01 / speed, {name: value * factors[name] for name, value in scales.items()}),
        ):
            closure = network(kind, solver, 0.4, 1, inputs=inputs, **used)
            found.append(np.asarray(closure(view_of(solver, conserved(state, 1.4, dims), dt))))
        factor = {LearnedFlux: speed, LearnedSource: speed}.get(kind, 1.0) * flow[column]
        factor = 1.0 if kind is LearnedInterpolation else factor
        np.testing.assert_allclose(found[1], factor * found[0], rtol=1e-11, atol=1e-12 * np.abs(found[1]).max())
        assert np.abs(found[0]).max() > 1e-5


class Chill(PostStep):
    """d takes nearly all energy out of one cell in four: its pressure becomes negative."""

    def __call__(self, view, memory=None, key=None):
        cold = jnp.arange(view.grid.shape[0]) % 4 == 0
        return jnp.zeros_like(view.u).at[-1].set(jnp.where(cold, -0.9999 * view.u[-1], 0))


def test_what_a_correction_breaks_is_counted():
    solver = gas(BOXES[1])
    u = rough_flow(solver.grid, 2)
    found = run(solver, SSPRK3(), u, 1e-3, 2, (Chill(),))
    assert found.ledger["floor_events"] >= 3
    assert found.ledger["floor_energy"] > 0
    assert run(solver, SSPRK3(), u, 1e-3, 2).ledger["floor_events"] == 0


@pytest.mark.parametrize("dims", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_a_network_instead_of_the_solver_learns(dims):
    """Its gradient is finite, and one step along it lowers the loss."""
    solver = gas(BOXES[dims], scalars={"dye": 1e-3})
    dt, u = 0.02, rough_flow(solver.grid, 2, mach=0.3, scalars=1)
    truth = rollout(Model(solver, SSPRK3(), dt / 8, substeps=8), State(jnp.asarray(u)), 2).u
    window = jnp.concatenate([jnp.asarray(u)[None], truth])
    closure = network(LearnedStep, solver, 0.1)
    weights, fixed = eqx.partition(closure, eqx.is_inexact_array)

    @jax.jit
    def loss(weights):
        return window_loss(Model(solver, SSPRK3(), dt, (eqx.combine(weights, fixed),)), window, jax.random.key(0), How())[0]

    value, gradient = jax.jit(jax.value_and_grad(loss))(weights)
    leaves = jax.tree.leaves(gradient)
    assert all(np.isfinite(g).all() for g in leaves)
    assert all(np.asarray(g).any() for g in leaves)
    size = sum(float(jnp.sum(g * g)) for g in leaves)
    lower = loss(jax.tree.map(lambda w, g: w - 0.05 * value / size * g, weights, gradient))
    assert 0.9 * value < lower < value


def test_gradients_are_finite_at_every_place():
    """At rest, in a flow, where a pressure is negative; and of the closures alone where a density is."""
    solver = gas(BOXES[1], scalars={"dye": 0.0}, positivity=False)
    closures = (*(network(kind, solver, 0.3) for kind in (*TENDENCIES, LearnedCorrection)), Smagorinsky(jnp.asarray(0.1)))
    arrays, fixed = eqx.partition(closures, eqx.is_inexact_array)

    @jax.jit
    @jax.grad
    def through_a_step(parameters):
        arrays, u = parameters
        return jnp.sum(rollout(Model(solver, ForwardEuler(), 1e-3, eqx.combine(arrays, fixed)), State(u), 1).u ** 2)

    @jax.jit
    @jax.grad
    def through_closures(parameters):
        arrays, u = parameters
        return sum(jnp.sum(closure(view_of(solver, u)) ** 2) for closure in eqx.combine(arrays, fixed))

    finite = lambda tree: all(np.isfinite(g).all() for g in jax.tree.leaves(tree))  # noqa: E731
    u = rough_flow(solver.grid, 2, scalars=1)
    still = conserved(np.array([1.0, 0.0, 1.0, 0.5])[:, None] * np.ones((1, 12)), 1.4, 1)
    cold, empty = u.copy(), u.copy()
    cold[2, 6], empty[0, 3] = 0.1, -1e-3
    for start in (u, still, cold, empty):
        assert finite(through_closures((arrays, jnp.asarray(start))))
        assert start is empty or finite(through_a_step((arrays, jnp.asarray(start))))
    assert all(np.asarray(g).any() for g in jax.tree.leaves(through_a_step((arrays, jnp.asarray(u)))))


# --- the classical one -----------------------------------------------------------------------------------------------------------


def linear_flow(slopes, dims, n=6, base=(1.3, 0.9), heat=(), mix=()):
    """v_b = Σ_a slopes[a][b] x_a, T = 1 + Σ heat_a x_a and c = Σ mix_a x_a in a box with open sides: (grid, W)."""
    grid = Grid((n,) * dims, tuple(1.0 + 0.2 * a for a in range(dims)), ("outflow",) * dims)
    x = [q - length / 2 for q, length in zip(grid.mesh(), grid.lengths, strict=True)]
    v = [sum(slopes[a][b] * x[a] for a in range(dims)) for b in range(dims)]
    along = lambda slope: sum((s * q for s, q in zip(slope, x, strict=False)), 0 * x[0])  # noqa: E731
    rho = np.full(grid.shape, base[0])
    return grid, np.stack([rho, *v, rho * (base[1] + along(heat)), 0.5 + along(mix)])


INNER = {1: np.s_[2:4], 2: np.s_[2:4, 2:4], 3: np.s_[2:4, 2:4, 2:4]}


@pytest.mark.parametrize("dims", [1, 2, 3])
def test_stress_heat_and_mixing_of_a_linear_flow(dims):
    """Velocity, temperature and concentration are linear and the density is constant: every difference is exact."""
    rng = np.random.default_rng(dims)
    slopes, heat, mix = rng.standard_normal((dims, dims)), 0.1 * rng.standard_normal(dims), 0.1 * rng.standard_normal(dims)
    grid, w = linear_flow(slopes, dims, heat=heat, mix=mix)
    solver = gas(grid, 5 / 3, scalars={"dye": 0.0})
    closure = Smagorinsky(0.2, schmidt=0.5, prandtl=0.4, ci=0.3)
    view = view_of(solver, conserved(w, 5 / 3, dims))
    flux = np.asarray(closure(view))
    strain = 0.5 * (slopes + slopes.T)
    magnitude = np.sqrt(2 * (strain**2).sum())
    width = np.prod(grid.spacing) ** (1 / dims)
    assert filter_width(view) == pytest.approx(width)
    mu = 1.3 * (0.2 * width) ** 2 * magnitude
    tau = -2 * mu * (strain - np.trace(slopes) / 3 * np.eye(dims)) + 2 / 3 * 1.3 * 0.3 * width**2 * magnitude**2 * np.eye(dims)
    heat_flux = -mu / 0.4 * 2.5 * heat
    for a in range(dims):
        at = list(grid.centre)
        at[a] = 1.0
        x = [q - length / 2 for q, length in zip(grid.mesh(tuple(at)), grid.lengths, strict=True)]
        v = [sum(slopes[b][c] * x[b] for b in range(dims)) for c in range(dims)]
        energy = heat_flux[a] + sum(tau[a, c] * v[c] for c in range(dims))
        expected = [0 * x[0], *(tau[a, c] + 0 * x[0] for c in range(dims)), energy, -mu / 0.5 * mix[a] + 0 * x[0]]
        for c, q in enumerate(expected):
            np.testing.assert_allclose(flux[a, c][INNER[dims]], q[INNER[dims]], rtol=0, atol=1e-14, err_msg=f"{a} {c}")


def test_shear_and_compression_by_hand():
    grid, w = linear_flow([[0.0, 0.0], [2.0, 0.0]], 2)  # v_x = 2 y: |S| = 2
    flux = np.asarray(Smagorinsky(0.1)(view_of(gas(grid, scalars={"dye": 0.0}), conserved(w, 1.4, 2))))
    mu = 1.3 * 0.01 * (1.0 * 1.2 / 36) * 2
    np.testing.assert_allclose(flux[1, 1][INNER[2]], -2 * mu, rtol=1e-13)
    np.testing.assert_allclose(flux[0, 2][INNER[2]], -2 * mu, rtol=1e-13)
    assert np.abs(flux[0, 1][INNER[2]]).max() <= 1e-15
    grid, w = linear_flow(-np.eye(3), 3)  # compression alike along all axes is no deformation
    assert np.abs(np.asarray(Smagorinsky(0.1)(view_of(gas(grid, scalars={"dye": 0.0}), conserved(w, 1.4, 3))))).max() <= 1e-15
    grid, w = linear_flow([[-3.0]], 1)  # along one axis: τ = −(4/3) ρ (c_s Δ)² √2 |s| s
    flux = np.asarray(Smagorinsky(0.1)(view_of(gas(grid, scalars={"dye": 0.0}), conserved(w, 1.4, 1))))
    np.testing.assert_allclose(flux[0, 1][INNER[1]], 4 / 3 * 1.3 * 0.01 / 36 * 2**0.5 * 9, rtol=1e-13)


@pytest.mark.parametrize("dims", [1, 2, 3])
def test_kinetic_energy_becomes_heat_in_any_flow(dims):
    """Flows without smoothness: dK/dt ≤ −Σ 2 μ_t S*:S* for any μ_t ≥ 0, and what it loses is all that heats the gas."""
    grid = BOXES[dims]
    solver = gas(grid, scalars={"dye": 0.0})
    samples = 20
    u = np.stack([conserved(noise(grid, seed), 1.4, dims) for seed in range(samples)])
    rng = np.random.default_rng(1)
    factor = jnp.asarray(10 ** rng.uniform(-2, 2, (samples, *grid.shape)))

    @jax.jit
    @jax.vmap
    def fluxes(u, factor):
        view = view_of(solver, u)
        given = gas_eddy_flux(view, lambda s: factor, jnp.zeros_like)
        return Smagorinsky(0.2)(view), given, Smagorinsky(0.2, ci=0.5)(view)

    gained = np.zeros((3, samples))
    for i, each in enumerate(fluxes(jnp.asarray(u), factor)):
        for sample, flux in enumerate(np.asarray(each)):
            rate = -flux_divergence(grid, flux)
            assert not rate[0].any()
            v = u[sample, 1 : dims + 1] / u[sample, 0]
            gained[i, sample] = (v * rate[1 : dims + 1]).sum()
            assert abs(rate[dims + 1].sum()) <= 1e-12 * np.abs(rate[dims + 1]).sum()
            variance = (u[sample, -1] / u[sample, 0] * rate[-1]).sum()
            assert variance < 0
    assert (gained[:2] < 0).all()
    assert dims > 1 or (gained[2] > 0).any()  # negative control: the pressure of what is not resolved may do work on the flow
    for sample in range(samples):
        slopes = [
            [(np.roll(q, -1, a) - np.roll(q, 1, a)) / (2 * h) for q in u[sample, 1 : dims + 1] / u[sample, 0]]
            for a, h in enumerate(grid.spacing)
        ]
        square = sum(0.5 * (slopes[a][b] + slopes[b][a]) ** 2 for a in range(dims) for b in range(dims))
        square = square - 2 / 3 * sum(slopes[a][a] for a in range(dims)) ** 2
        assert gained[1, sample] <= -(np.asarray(factor[sample]) * square).sum() * (1 - 1e-12)


@pytest.mark.parametrize("dims", [1, 2, pytest.param(3, marks=pytest.mark.slow)])
def test_a_constant_eddy_viscosity_is_the_viscosity_of_the_solver(dims):
    """The closure's stress, work, heat and mixing are the solver's own viscous terms, to rounding."""
    grid, mu = BOXES[dims], 0.3
    bare, viscous = (gas(grid, 1.4, viscosity=q, prandtl=0.6, scalars={"dye": q}) for q in (0.0, mu))
    u = jnp.asarray(conserved(noise(grid), 1.4, dims))

    @jax.jit
    def rates_of(u):
        nothing, zero = lambda z, t: None, jnp.zeros(())
        each = [solver.explicit(solver.encode(u), zero, nothing) for solver in (viscous, bare)]
        return [solver.decode({**solver.encode(u), "u": z["u"]}) for solver, z in zip((viscous, bare), each, strict=True)]

    own, rest = (np.asarray(q) for q in rates_of(u))
    density = gas_of(view_of(bare, u)).density
    flux = gas_eddy_flux(view_of(bare, u), lambda s: jnp.full(density.shape, mu), jnp.zeros_like, 0.6)
    mixed = gas_eddy_flux(view_of(bare, u), lambda s: mu * density, jnp.zeros_like, 0.6, 1.0)
    closed = -flux_divergence(grid, jnp.concatenate([flux[:, :-1], mixed[:, -1:]], axis=1))
    for c in range(1, dims + 3):
        assert np.abs(own[c] - rest[c] - closed[c]).max() <= 1e-12 * np.abs(own[c]).max()
        assert np.abs(closed[c]).max() > 0.1 * np.abs(own[c]).max()


def test_classical_closures_of_incompressible_flow_say_that_they_are():
    solver = gas(BOXES[2])
    view = view_of(solver, rough_flow(solver.grid))
    for closure in (Leith(), Hyperviscosity(), DynamicSmagorinsky(), GradientModel(), SpectralEddyViscosity()):
        with pytest.raises(
            ValueError, match=f"{type(closure).__name__}: made for incompressible flow, not for a gas .*smagorinsky"
        ):
            closure(view)


def test_eddy_constants_of_a_gas_are_checked():
    with pytest.raises(ValueError, match="prandtl: must be positive and finite, found 0"):
        Smagorinsky(0.1, prandtl=0.0)
    with pytest.raises(ValueError, match="ci: must be finite and not negative, found -1"):
        Smagorinsky(0.1, ci=-1.0)


# --- from YAML -------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("use", [name for name in catalogue("closures") if name not in (*INCOMPRESSIBLE, "tensor_basis_flux")])
def test_every_closure_for_a_gas_is_built_from_its_short_name(use):
    solver = gas(BOXES[2], scalars={"dye": 0.0})
    given = {"cs": 0.1, "prandtl": 0.9} if use == "smagorinsky" else {"width": 4, "velocity_scale": 0.5}
    given |= {"depth": 1} if use.startswith("learned") else {}
    part = make_part(use, load_class(catalogue("closures")[use]), given, ("corrections",), FROM_RUN)
    supplied = {"dims": 2, "grid": solver.grid, "variables": solver.variables, "free_weights": solver.free_weights()}
    closure = blank(lambda: part.build(**supplied, key=jax.random.key(0)))
    assert part.resolved["use"] == use
    assert not set(FROM_RUN) & set(part.resolved)
    evaluate = "step" if use in ("learned_correction", "learned_step") else "stage"
    model = Model(solver, VL2(), 1e-3, (closure,), evaluate)
    model.try_closures(jnp.asarray(rough_flow(solver.grid, scalars=1)))


# --- what is refused -------------------------------------------------------------------------------------------------------------


def test_a_network_is_refused_where_the_channels_are_others():
    solver, other = gas(BOXES[1]), gas(BOXES[1], scalars={"dye": 0.0})
    u = rough_flow(other.grid, scalars=1)
    for kind in (LearnedFlux, LearnedSource, LearnedCorrection, LearnedStep, LearnedInterpolation):
        with pytest.raises(
            ValueError, match=f"{kind.__name__}: made for density, momentum_x, energy; found density, momentum_x, energy, dye"
        ):
            network(kind, solver)(view_of(other, u))
    for name in ("density_scale", "temperature_scale", "velocity_scale", "scalar_scale"):
        with pytest.raises(ValueError, match=f"{name}: must be positive and finite, found 0"):
            network(LearnedFlux, solver, **{name: 0.0})


def test_sources_of_a_gas_are_what_they_say():
    """s as rates of the state: what a source adds in a short step, and the ledger of what sources are not in."""
    solver = gas(BOXES[1], scalars={"dye": 0.0})
    closure = network(LearnedSource, solver, 0.3)
    u = rough_flow(solver.grid, 2, scalars=1)
    source = np.asarray(closure(view_of(solver, u)))
    assert isinstance(closure, Source)
    with_it, without = (run(solver, ForwardEuler(), u, 1e-4, 1, c).u for c in ((closure,), ()))
    np.testing.assert_allclose(with_it - without, 1e-4 * source, rtol=0, atol=1e-15)
