"""The spectral solvers in 3D, and passive scalars in 2D and 3D, against what is known exactly."""

from functools import cache
from pathlib import Path

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flows import (
    PRECISION,
    TWO_PI,
    EveryFlux,
    Push,
    alignment,
    bare_rate,
    beltrami,
    cube,
    divergence,
    evolve,
    kolmogorov,
    ledger_sum,
    random_flow,
    randomised,
    relative,
    sample,
    solver_of,
    square,
    steps,
    worst_step,
)

from hybridsim.contract import PostStep, Source, View
from hybridsim.corrections.eddy import Smagorinsky
from hybridsim.grid import Grid, resample
from hybridsim.model import Model, frames_of
from hybridsim.solvers.incompressible import Isotropic, Linear, LinearDrag, NavierStokes, UniformForce
from hybridsim.solvers.initial import TaylorGreen
from hybridsim.solvers.spectral import Spectral2D, Spectral3D, dealiasing_mask
from hybridsim.solvers.steppers import ETDRK4, SSPRK2, SSPRK3, CrankNicolsonRK4

ODD = Grid((12, 15, 10), (TWO_PI, 5.0, 3.0))
SCALARS = {"dye": 3e-3, "heat": 1e-2}


# --- exact solutions -------------------------------------------------------------------------------------------------------------

# wavelength 2π divides every length
BOXES = [
    (cube(12), ETDRK4(), "hou_li"),
    (Grid((15, 24, 12), (TWO_PI, 2 * TWO_PI, TWO_PI)), ETDRK4(), "two_thirds"),
    (Grid((24, 9, 17), (2 * TWO_PI, TWO_PI, TWO_PI)), CrankNicolsonRK4(), "two_thirds"),
    (Grid((10, 12, 33), (TWO_PI, TWO_PI, 3 * TWO_PI)), SSPRK3(), "none"),
]


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(("grid", "stepper", "dealias"), BOXES, ids=[f"{b[0].shape}-{b[2]}" for b in BOXES])
def test_abc_flow_decays_and_moves_exactly(grid, stepper, dealias):
    solver = solver_of("spectral", grid, 0.02, dealias=dealias)
    mean = (0.7, -0.4, 0.3)
    dt, count = (2e-5, 400) if isinstance(stepper, SSPRK3) else (1e-4, 100)
    u = evolve(solver, stepper, beltrami(solver, mean=mean), dt, count)
    exact, still = beltrami(solver, dt * count, mean), beltrami(solver, mean=mean)
    print(type(stepper).__name__, grid.shape, dealias, relative(u, exact))
    assert relative(u, exact) <= 1e-11
    assert relative(still, exact) > 1e-3  # it has moved


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("dealias", ["hou_li", "two_thirds"])
def test_abc_flow_at_rest_decays_exactly_at_any_time_step(dealias):
    """u × ω = 0 and ∇·(u u) is a gradient: only the linear part is left."""
    solver = solver_of("spectral", cube(12), 0.05, dealias=dealias)
    u = evolve(solver, ETDRK4(), beltrami(solver), 0.1, 20)
    assert relative(u, beltrami(solver, 2.0)) <= 1e-12
    single = evolve(solver, ETDRK4(), beltrami(solver).astype(np.float32), 0.1, 20)
    assert single.dtype == np.float32
    assert relative(single, beltrami(solver, 2.0)) <= 2e-6


def _waves_2d(a, b):
    return lambda x, t: [
        jnp.sin(b * x[1] + t) + 0.2 * jnp.cos(t),
        jnp.cos(2 * a * x[0] - 0.7 * t) - 0.1,
        jnp.cos(a * x[0] - t) * jnp.sin(b * x[1] + 0.5 * t),
        0.3 + jnp.sin(a * x[0] + 2 * b * x[1] - t),
    ]


def _waves_3d(a, b, c):
    return lambda x, t: [
        jnp.sin(b * x[1] + t) * jnp.cos(c * x[2]) + 0.2 * jnp.cos(t),
        jnp.cos(2 * a * x[0] - 0.7 * t) + 0.5 * jnp.sin(c * x[2]) - 0.1,
        jnp.sin(a * x[0] + b * x[1] + 0.3 * t),
        jnp.cos(a * x[0] - t) * jnp.sin(b * x[1] + 0.5 * t + c * x[2]),
        0.3 + jnp.sin(a * x[0] + 2 * b * x[1] - t),
    ]


class Manufactured(Source):
    """s = ∂t q + u·∇q − κ ∇²q (+ ∇p) for a given q(x, t), by differentiating that function, not the grid."""

    fields: object = eqx.field(static=True)
    diffusivities: jax.Array

    def __call__(self, view, memory=None, key=None):
        d = view.grid.ndim
        points = jnp.asarray(np.stack([q.ravel() for q in view.grid.mesh()], axis=1), view.u.dtype)
        q = lambda x, t: jnp.stack(self.fields(x, t))  # noqa: E731

        def at(x):
            rate = jax.jacfwd(q, 1)(x, view.t)
            slope = jax.jacfwd(q)(x, view.t)
            curvature = jnp.trace(jax.jacfwd(jax.jacfwd(q))(x, view.t), axis1=1, axis2=2)
            pressure = jax.grad(lambda x: jnp.sin(x[0] * TWO_PI / view.grid.lengths[0]) * jnp.cos(view.t))(x)
            force = jnp.concatenate([pressure, jnp.zeros(len(rate) - d)])
            return rate + slope @ q(x, view.t)[:d] - self.diffusivities * curvature + force

        return jax.vmap(at)(points).T.reshape(view.u.shape)


@cache
def _manufactured(dims, dealias="hou_li"):
    grid = Grid((16, 18), (TWO_PI, 5.0)) if dims == 2 else Grid((12, 15, 12), (TWO_PI, 5.0, 4.0))
    scalars = {"dye": 0.02, "heat": 0.05}
    solver = solver_of("spectral", grid, 0.03, None, scalars, dealias=dealias)
    k = [TWO_PI / length for length in grid.lengths]
    fields = (_waves_2d if dims == 2 else _waves_3d)(*k)
    closure = Manufactured(fields, jnp.array((0.03,) * dims + (0.02, 0.05)))

    def exact(t):
        points = jnp.asarray(np.stack([q.ravel() for q in grid.mesh()], axis=1))
        return np.asarray(jax.vmap(lambda x: jnp.stack(fields(x, jnp.asarray(t))))(points)).T.reshape(-1, *grid.shape)

    return solver, closure, exact


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(("dims", "stepper", "order", "dealias"), [
    (2, ETDRK4(), 4, "hou_li"),
    (3, ETDRK4(), 4, "hou_li"),
    (3, SSPRK3(), 3, "none"),
    (3, CrankNicolsonRK4(), 2, "two_thirds"),
], ids=lambda p: type(p).__name__ if not isinstance(p, int | str) else str(p))  # fmt: skip
def test_a_manufactured_flow_with_scalars(dims, stepper, order, dealias):
    """Velocity, mean flow, pressure and two scalars, all moving: exact in space, of the stepper's order in time."""
    solver, closure, exact = _manufactured(dims, dealias)
    run = lambda dt, n: evolve(solver, stepper, exact(0.0), dt, n, (closure,), ("stage",))  # noqa: E731
    errors = [relative(run(0.4 / n, n), exact(0.4)) for n in (4, 8, 16)]
    rates = np.log2(np.array(errors[:-1]) / errors[1:])
    fine = relative(run(1e-4, 20), exact(2e-3))
    print(dims, type(stepper).__name__, dealias, "rates", rates, "errors", errors, "at a small step", fine)
    assert rates[-1] >= order - 0.15
    assert fine <= 1e-11
    assert relative(exact(0.0), exact(2e-3)) > 1e-4


@pytest.mark.usefixtures("x64")
def test_the_manufactured_source_is_no_other():
    """Negative control: a source that is wrong by one percent of the diffusion is seen."""
    solver, closure, exact = _manufactured(3)
    wrong = Manufactured(closure.fields, 1.01 * closure.diffusivities)
    assert relative(evolve(solver, ETDRK4(), exact(0.0), 1e-2, 20, (wrong,), ("stage",)), exact(0.2)) > 1e-6


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("grid", [Grid((8, 16, 6), (TWO_PI,) * 3), Grid((9, 17, 10), (3.0, TWO_PI, 4.0))], ids=str)
def test_kolmogorov_laminar_state_is_steady(grid):
    solver = solver_of("spectral", grid, 0.02, kolmogorov(0.3, 0.1, 3))
    k = TWO_PI * 3 / grid.lengths[1]
    rest = lambda x, y, z: 0 * x  # noqa: E731
    laminar = sample(solver, lambda x, y, z: 0.3 * np.sin(k * y) / (0.02 * k * k + 0.1), rest, rest)
    growth = 1 - np.exp(-(0.02 * k * k + 0.1) * 2.0)
    for start, factor in ((laminar, 1.0), (0 * laminar, growth)):
        u = evolve(solver, ETDRK4(), start, 0.02, 100)
        assert np.abs(u - factor * laminar).max() <= 1e-12 * np.abs(laminar).max()


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("grid", [Grid((12, 15), (TWO_PI, 5.0)), ODD], ids=str)
def test_a_scalar_wave_in_a_uniform_flow(grid):
    """c = exp(−κ k² t) cos(k·(x − U t)), for each scalar with its own κ, and its mean is kept."""
    solver = solver_of("spectral", grid, 1e-3, None, SCALARS)
    flow = (0.8, -0.5, 0.3)[: grid.ndim]
    waves = (2, 1, 1)[: grid.ndim]
    k = [TWO_PI * n / length for n, length in zip(waves, grid.lengths, strict=True)]
    square, speed = sum(q * q for q in k), sum(q * v for q, v in zip(k, flow, strict=True))

    def exact(t):
        phase = sum(q * x for q, x in zip(k, grid.mesh(), strict=True)) - speed * t
        scalars = [1.5 + np.exp(-kappa * square * t) * np.cos(phase) for kappa in SCALARS.values()]
        return np.stack([np.full(grid.shape, v) for v in flow] + scalars)

    u = evolve(solver, ETDRK4(), exact(0.0), 2e-4, 100)
    print(grid.shape, relative(u, exact(0.02)))
    assert relative(u, exact(0.02)) <= 1e-11
    assert relative(exact(0.0), exact(0.02)) > 1e-3
    rest = evolve(solver, ETDRK4(), exact(0.0) * np.array([0.0] * grid.ndim + [1, 1]).reshape(-1, *(1,) * grid.ndim), 0.5, 10)
    decayed = np.exp(-np.array(list(SCALARS.values())) * square * 5.0).reshape(-1, *(1,) * grid.ndim)
    assert relative(rest[grid.ndim :] - 1.5, decayed * (exact(0.0)[grid.ndim :] - 1.5)) <= 1e-12


# --- invariants ------------------------------------------------------------------------------------------------------------------


def _noise(solver, dealias, seed=0):
    """White noise in the kept modes."""
    grid = solver.grid
    axes = tuple(range(1, grid.ndim + 1))
    noise = np.random.default_rng(seed).standard_normal((len(solver.variables), *grid.shape))
    kept = dealiasing_mask(grid, dealias) > 0.5
    return np.fft.irfftn(np.fft.rfftn(noise, axes=axes) * kept, s=grid.shape, axes=axes)


def _curl(solver, u):
    g = np.asarray(solver.gradient(jnp.asarray(u)))
    return np.stack([g[1, 2] - g[2, 1], g[2, 0] - g[0, 2], g[0, 1] - g[1, 0]])


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("grid", [cube(12), ODD, Grid((9, 11, 13), (2.0, 2.5, 3.0))], ids=str)
def test_energy_helicity_and_scalar_variance_are_conserved_in_space(grid):
    found = {}
    for dealias in ("two_thirds", "none", "hou_li"):
        solver = solver_of("spectral", grid, 0.0, None, {"dye": 0.0}, dealias=dealias).prepare(np.float64)
        u, rate = bare_rate(solver, _noise(solver, dealias))
        found[dealias] = [alignment(u[:3], rate[:3]), alignment(_curl(solver, u), rate[:3]), alignment(u[3], rate[3])]
    print(grid.shape, found)
    assert max(map(abs, found["two_thirds"])) <= 1e-14
    assert max(map(abs, found["none"][:2])) <= 1e-14  # the rotational form does no work even where it is aliased
    assert abs(found["none"][2]) > 1e-4  # negative controls
    assert min(map(abs, found["hou_li"])) > 1e-4


@pytest.mark.usefixtures("x64")
def test_both_forms_of_the_nonlinear_term_agree_where_nothing_is_aliased():
    """u × ω and −∇·(u u) after projection, the one by the mask `none`, the other by `two_thirds`, for a flow of few modes."""
    rates = []
    for dealias in ("none", "two_thirds"):
        solver = solver_of("spectral", Grid((16, 18, 20), (TWO_PI, 5.0, 3.0)), 0.0, dealias=dealias).prepare(np.float64)
        rates.append(bare_rate(solver, random_flow(solver, 2, modes=2, mean=(0.3, 0.2, -0.1)))[1])
    assert relative(*rates) <= 1e-13


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(("stepper", "order"), [(CrankNicolsonRK4(), 4), (ETDRK4(), 4), (SSPRK3(), 3)],
                         ids=lambda s: str(s) if isinstance(s, int) else type(s).__name__)  # fmt: skip
def test_halving_dt_divides_the_drift_of_energy_and_helicity_by_the_order(stepper, order):
    solver = solver_of("spectral", cube(12), 0.0, dealias="two_thirds")
    u = random_flow(solver, 5, modes=3)
    ready = solver.prepare(np.float64)
    invariants = lambda q: np.array([np.sum(q**2), np.sum(q * _curl(ready, q))])  # noqa: E731
    drift = [np.abs(invariants(evolve(solver, stepper, u, 1.0 / n, n)) / invariants(u) - 1) for n in (10, 20)]
    print(type(stepper).__name__, drift, drift[0] / drift[1])
    assert (drift[1] > 1e-12).all()
    assert (drift[1] < 1e-2).all()
    assert (drift[0] / drift[1] >= 0.85 * 2**order).all()


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("grid", [square(16), cube(12)], ids=str)
def test_scalar_variance_decays_as_its_gradients_say(grid):
    """½ d⟨c²⟩/dt = −κ ⟨|∇c|²⟩, by the right-hand side with the linear part, not by differences in time."""
    solver = solver_of("spectral", grid, 1e-2, None, SCALARS, dealias="two_thirds").prepare(np.float64)
    z = solver.encode(jnp.asarray(random_flow(solver, 3, modes=3, mean=(0.4, 0.1))))
    rate = solver.explicit(z, jnp.zeros(()), lambda q, t: None)
    rate = jax.tree.map(lambda f, a, q: f + a * q, rate, solver.linear(), z)
    u, du = np.asarray(solver.decode(z)), np.asarray(solver.decode(rate))
    slopes = np.asarray(solver.gradient(jnp.asarray(u)))
    for i, kappa in enumerate(SCALARS.values()):
        c = grid.ndim + i
        lost = kappa * np.mean(np.sum(slopes[:, c] ** 2, axis=0))
        assert np.mean(u[c] * du[c]) == pytest.approx(-lost, rel=1e-12)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(("grid", "dealias"), [(square(12), "hou_li"), (ODD, "hou_li"), (ODD, "two_thirds")], ids=str)
def test_scalars_change_nothing_of_the_flow(grid, dealias):
    rates = []
    for scalars in (None, SCALARS):
        solver = solver_of("spectral", grid, 1e-3, None, scalars, dealias=dealias).prepare(np.float64)
        u = random_flow(solver, 1, mean=(0.2, 0.1))
        rates.append(bare_rate(solver, u)[1])
    assert relative(rates[1][: grid.ndim], rates[0]) <= 1e-14


@pytest.mark.usefixtures("x64")
def test_two_dimensional_flow_is_the_same_in_both_solvers():
    """A flow that does not depend on z, with a scalar: Spectral3D against Spectral2D."""
    flat = solver_of("spectral", Grid((12, 15), (TWO_PI, 5.0)), 1e-3, kolmogorov(), {"dye": 1e-2}, dealias="two_thirds")
    deep = solver_of("spectral", Grid((12, 15, 4), (TWO_PI, 5.0, 1.0)), 1e-3, kolmogorov(), {"dye": 1e-2}, dealias="two_thirds")
    u = random_flow(flat, 1, mean=(0.3, -0.2, 0.5))
    lifted = np.stack([u[0], u[1], 0 * u[0], u[2]])
    a = evolve(flat, ETDRK4(), u, 0.02, 10)
    b = evolve(deep, ETDRK4(), np.repeat(lifted[..., None], 4, axis=-1), 0.02, 10)
    assert relative(b[[0, 1, 3]], np.repeat(a[..., None], 4, axis=-1)) <= 1e-12
    assert np.abs(b[2]).max() <= 1e-14


# --- symmetries ------------------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(("dealias", "closures", "scalars"), [
    ("hou_li", (Smagorinsky(0.2),), None),
    ("two_thirds", (), {"dye": 1e-2}),
], ids=["hou_li-smagorinsky", "two_thirds-scalar"])  # fmt: skip
def test_a_step_commutes_with_permuted_axes_mirrors_and_shifts(dealias, closures, scalars):
    on = lambda grid: solver_of("spectral", grid, 1e-3, None, scalars, dealias=dealias)  # noqa: E731
    solver = on(ODD)
    u = random_flow(solver, 3, mean=(0.3, -0.2, 0.1))
    run = lambda s, q: evolve(s, ETDRK4(), q, 0.05, 2, closures)  # noqa: E731
    after = run(solver, u)
    assert relative(after, u) > 1e-3

    def permuted(q, order):
        moved = np.transpose(q, (0, *(1 + a for a in order)))
        return np.concatenate([moved[:3][list(order)], moved[3:]])

    for order in ((1, 2, 0), (1, 0, 2)):
        turned = on(Grid([ODD.shape[a] for a in order], [ODD.lengths[a] for a in order]))
        assert relative(run(turned, permuted(u, order)), permuted(after, order)) <= 1e-13
    for axis in range(3):
        sign = np.ones(len(u)).reshape(-1, 1, 1, 1)
        sign[axis] = -1
        mirrored = lambda q, axis=axis, sign=sign: sign * np.flip(q, axis + 1)  # noqa: E731
        assert relative(run(solver, mirrored(u)), mirrored(after)) <= 1e-13
    rolled = lambda q: np.roll(q, (3, 5, 2), (1, 2, 3))  # noqa: E731
    assert relative(run(solver, rolled(u)), rolled(after)) <= 1e-13


# --- conserved sums and divergence -----------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("dtype", PRECISION, ids=["float64", "float32"])
@pytest.mark.parametrize("case", ["bare-2d", "bare", "every", "linear", "isotropic"])
def test_sums_and_divergence_in_a_forced_flow(dtype, case):
    grid = square(16) if case == "bare-2d" else Grid((12, 10, 9), (TWO_PI, 5.0, 4.0))
    forcing = {"linear": Linear(0.5, 0.1), "isotropic": Isotropic(0.5, 1, drag=0.1)}.get(case, kolmogorov(1.0, 0.1, 2))
    solver = solver_of("spectral", grid, 1e-3, forcing, SCALARS)
    closures = ()
    if case == "every":
        closures = (jax.tree.map(lambda a: a.astype(dtype), randomised(EveryFlux(solver, jax.random.key(0)), 0, 0.1)),)
    model = Model(solver, ETDRK4(), 0.02, closures)
    u = random_flow(solver, 1, mean=(0.3, -0.2, 0.1, 0.4, 0.2)[-len(solver.variables) :], dtype=dtype)
    frames, ledger = steps(model, u, 30)
    frames = np.asarray(frames)
    assert frames.dtype == dtype
    drift, most, taken = worst_step(model, frames, ledger)
    limit, limit_root, limit_divergence = PRECISION[dtype]
    assert taken == 30
    double = frames.astype(np.float64)
    space = tuple(range(2, double.ndim))
    change = np.abs((double - double[0]).sum(axis=space)[1:] - solver.grid.cells * ledger_sum(ledger))
    scale = np.abs(double[:1]).sum(axis=space) * np.sqrt(np.arange(1, 31))[:, None]
    steady = (change / scale).max()
    print(case, dtype.__name__, "drift", drift, "accumulated, over √steps", steady, "divergence", most)
    assert drift <= limit
    assert steady <= limit_root
    assert most <= limit_divergence
    moved = np.abs(ledger_sum(ledger)[-1])
    assert moved[: grid.ndim].max() > 1e-3  # drag, at least, has been at work on the mean flow, and the ledger tells
    assert not moved[grid.ndim :].any()


@eqx.filter_jit
def _seeds(model, closures, u, count):
    """Of one run per closure in the stack: frames, Σ|F| per channel, of convection and closure, and max |∇·u| at each frame."""
    weights, fixed = eqx.partition(closures, eqx.is_inexact_array)

    def run(weights):
        closure = eqx.combine(weights, fixed)
        one = eqx.tree_at(lambda m: m.closures, model, (closure,))
        prepared = one.prepare(u.dtype)
        solver = prepared.solver
        state = (solver.encode(u), one.init_carry(u), jnp.zeros((), jnp.int32))

        def body(state, _):
            state = one(*state, prepared)
            return state, solver.decode(state[0])

        _, frames = jax.lax.scan(body, state, None, count)
        frames = jnp.concatenate([solver.decode(state[0])[None], frames])

        def measure(u):
            space = tuple(range(1, u.ndim))
            carried = sum(jnp.abs(u * q[None]).sum(axis=space) for q in u[: solver.grid.ndim])
            flux = jnp.abs(closure(View(u, prepared.dt, prepared.dt, solver)))
            wide = u.astype(np.float64)
            largest = jnp.abs(solver.prepare(np.float64).divergence(wide)).max() / jnp.abs(wide[: solver.grid.ndim]).max()
            return carried + flux.sum(axis=(0, *range(2, flux.ndim))), largest * min(solver.grid.spacing)

        return frames, *jax.lax.map(measure, frames)

    return jax.vmap(run)(weights)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("dtype", PRECISION, ids=["float64", "float32"])
@pytest.mark.parametrize("dims", [2, 3])
def test_flux_closures_keep_every_sum_for_any_weights(dims, dtype):
    """50 seeds for each spread of the weights; a Source closure fails the same check."""
    solver = solver_of("spectral", Grid((8, 6, 9)[:dims], (TWO_PI, 5.0, 4.0)[:dims]), 1e-3, None, SCALARS)
    u = random_flow(solver, 1, modes=2, mean=(0.3, -0.2, 0.1, 0.5, 0.4)[-dims - 2 :], dtype=dtype)
    space = tuple(range(3, 3 + dims))
    limit, _, limit_divergence = PRECISION[dtype]
    stack = eqx.filter_vmap(lambda key: EveryFlux(solver, key))(jax.random.split(jax.random.key(1), 50))
    rng = np.random.default_rng(2)
    worst = most = 0.0
    finished = []
    for std in (0.1, 1.0, 10.0, 100.0):
        drawn = jax.tree.map(lambda a, std=std: jnp.asarray(std * rng.standard_normal(a.shape), dtype), stack)
        model = Model(solver, ETDRK4(), 0.01, (jax.tree.map(lambda a: a[0], drawn),))
        frames, flux, gap = (np.asarray(a, np.float64) for a in _seeds(model, drawn, jnp.asarray(u), 4))
        with np.errstate(all="ignore"):
            change = np.abs(np.diff(frames, axis=1).sum(axis=space))
            size = np.abs(frames).sum(axis=space)
            # the fluxes of later stages are those of what the first one left
            scale = np.maximum(size[:, :-1], size[:, 1:]) + 0.01 / min(solver.grid.spacing) * flux[:, :-1]
        until = np.isfinite(frames).all(axis=(2, *space))[:, 1:]
        finished.append(int(until[:, -1].sum()))
        assert until[:, 0].sum() >= 50 * (std <= 1)
        worst = max(worst, np.where(until[..., None], change / scale, 0).max())
        most = max(most, np.where(until, gap[:, 1:], 0).max())
    print(dims, dtype.__name__, "random weights: drift", worst, "divergence", most, "finished", finished)
    assert finished[0] == 50
    assert worst <= limit
    assert most <= limit_divergence
    model = Model(solver, ETDRK4(), 0.01, (Push(1.0),))
    frames, ledger = steps(model, u, 4)
    assert worst_step(model, np.asarray(frames), ledger)[0] > 1e-3


@pytest.mark.usefixtures("x64")
def test_a_closure_that_starts_at_zero_changes_nothing():
    grid = Grid((8, 9, 10), (TWO_PI, 5.0, 4.0))
    solver = solver_of("spectral", grid, 1e-3, kolmogorov(1.0, 0.1, 1), SCALARS)
    u = random_flow(solver, 1, modes=2, mean=(0.3, -0.2), dtype=np.float32)
    closure = EveryFlux(solver, jax.random.key(0))
    bare, loaded, wild = (evolve(solver, ETDRK4(), u, 0.02, 1, c) for c in ((), (closure,), (randomised(closure),)))
    assert np.abs(bare - loaded).max() <= 4 * np.finfo(np.float32).eps * np.abs(bare).max()
    assert relative(wild, bare) > 1e-4


# --- closures --------------------------------------------------------------------------------------------------------------------


class Given(Source):
    """s: a given array, whatever the state."""

    array: jax.Array

    def __call__(self, view, memory=None, key=None):
        return self.array


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("grid", [Grid((12, 15), (TWO_PI, 5.0)), ODD], ids=str)
def test_fluxes_and_sources_act_as_the_equation_says(grid):
    """receive(F, s) = projected −∇·F + s, by derivatives in physical space; means only from s."""
    solver = solver_of("spectral", grid, 1e-3, None, SCALARS, dealias="none").prepare(np.float64)
    d, channels = grid.ndim, len(solver.variables)
    axes = tuple(range(-d, 0))
    rng = np.random.default_rng(4)
    flux, source = rng.standard_normal((d, channels, *grid.shape)), rng.standard_normal((channels, *grid.shape))
    kept = dealiasing_mask(grid, "none")
    flux, source = (np.fft.irfftn(np.fft.rfftn(q, axes=axes) * kept, s=grid.shape, axes=axes) for q in (flux, source))
    outflow = sum(np.stack([np.asarray(solver.derivative(jnp.asarray(f), grid.centre, a)[0]) for f in flux[a]]) for a in range(d))
    for f, s, expected in ((flux, None, -outflow), (None, source, source), (flux, source, source - outflow)):
        got = solver.receive(None if f is None else jnp.asarray(f), None if s is None else jnp.asarray(s))
        got = solver.decode({**solver.encode(jnp.zeros((channels, *grid.shape))), **got})
        assert relative(got, solver.project(jnp.asarray(expected))) <= 1e-13


@pytest.mark.usefixtures("x64")
def test_a_correction_after_the_step_is_projected():
    class Kick(PostStep):
        array: jax.Array

        def __call__(self, view, memory=None, key=None):
            return self.array

    solver = solver_of("spectral", ODD, 1e-3, None, SCALARS)
    ready = solver.prepare(np.float64)
    u = random_flow(solver, 1)
    kick = np.random.default_rng(0).standard_normal(u.shape)
    bare = evolve(solver, ETDRK4(), u, 0.02, 1)
    after = evolve(solver, ETDRK4(), u, 0.02, 1, (Kick(jnp.asarray(kick)),))
    assert relative(after, bare + np.asarray(ready.project(jnp.asarray(kick)))) <= 1e-13
    assert divergence(ready, bare + kick) > 0.1
    assert divergence(ready, after) <= 1e-12


def _eager(solver, stepper, u, dt, count, tendency):
    coefficients = stepper.prepare(solver, dt, u.dtype)
    z = solver.encode(u)
    for i in range(count):
        z = stepper(solver, coefficients, z, jnp.asarray(i * dt), jnp.asarray(dt), tendency)
    return solver.decode(z)


@pytest.mark.slow
@pytest.mark.usefixtures("x64")
def test_with_the_exact_source_the_coarse_run_is_the_filtered_fine_run():
    """s = restrict(N(u_fine)) − N_coarse(restrict(u_fine)) at every stage, with a scalar: what is missing, and nothing else."""
    fine, coarse = (
        solver_of(
            "spectral", Grid((n, n + 3, n - 2), (TWO_PI, 5.0, 4.0)), 5e-3, kolmogorov(), {"dye": 1e-2}, dealias="none"
        ).prepare(np.float64)
        for n in (16, 8)
    )
    stepper, dt, count = ETDRK4(), 0.02, 5
    u = fine.project(jnp.asarray(random_flow(fine, 8, modes=5, mean=(0.2, 0.1))))
    own = lambda q: coarse.restrict(q, fine.grid, fine.variables)  # noqa: E731

    def other(q):
        return coarse.project(
            jnp.stack([resample(c, coarse.grid.shape, fine.grid.centre, coarse.grid.centre, (True,) * 3) for c in q])
        )

    rate = lambda s: lambda z: s.decode({**z, **s.explicit(z, jnp.zeros(()), lambda q, t: None)})  # noqa: E731
    filters = {"own": jax.jit(own), "other": jax.jit(other)}
    rate_fine, rate_coarse = jax.jit(rate(fine)), jax.jit(rate(coarse))
    decode, encode = jax.jit(lambda z: fine.decode(z)), jax.jit(lambda q: coarse.encode(q))
    sources = {"own": [], "other": []}

    def watch(z, t):
        q, known = decode(z), rate_fine(z)
        for name, restrict in filters.items():
            sources[name].append(restrict(known) - rate_coarse(encode(restrict(q))))

    end = filters["own"](_eager(fine, stepper, u, dt, count, watch))
    errors = {}
    for name, series in sources.items():
        feed = iter(series)
        run = _eager(coarse, stepper, filters["own"](u), dt, count, lambda z, t, feed=feed: coarse.receive(None, next(feed)))
        errors[name] = relative(run, end)
    bare = relative(_eager(coarse, stepper, filters["own"](u), dt, count, lambda z, t: None), end)
    print("consistency", errors, "bare", bare)
    assert errors["own"] <= 1e-12
    assert errors["other"] > 1e-3  # negative control
    assert bare > 1e-3


# --- what is promised to others --------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("grid", [cube(8), ODD, Grid((7, 9, 11), (3.0, TWO_PI, 5.0))], ids=str)
def test_projection_is_orthogonal_and_idempotent_and_keeps_scalars(grid):
    solver = solver_of("spectral", grid, 1e-3, None, SCALARS).prepare(np.float64)
    u = jnp.asarray(_noise(solver, "none"))
    once = solver.project(u)
    assert relative(solver.project(once), once) <= 1e-13
    assert abs(alignment(np.asarray(once[:3]), np.asarray((u - once)[:3]))) <= 1e-14
    assert relative(once[3:], u[3:]) <= 1e-13
    assert float(jnp.abs(solver.divergence(u)).max()) > 1
    assert float(jnp.abs(solver.divergence(once)).max()) <= 1e-12
    assert np.abs(np.asarray((once - u).mean(axis=(1, 2, 3)))).max() <= 1e-15


@pytest.mark.usefixtures("x64")
def test_operators_differentiate_and_restrict_exactly():
    fine = solver_of("spectral", Grid((20, 15, 18), (TWO_PI, 5.0, 3.0)), scalars=SCALARS)
    coarse = solver_of("spectral", Grid((12, 11, 14), (TWO_PI, 5.0, 3.0)), scalars=SCALARS)
    mean = (0.2, 0.1, 0.3, 0.5, -0.4)
    u = random_flow(fine, 2, modes=5, mean=mean)
    assert relative(coarse.restrict(jnp.asarray(u), fine.grid, fine.variables), random_flow(coarse, 2, modes=5, mean=mean)) <= 1e-13
    assert coarse.conserved == ("u", "v", "w", "dye", "heat")
    ready = fine.prepare(np.float64)
    x, y, z = fine.grid.mesh()
    a, b, c = (TWO_PI / length for length in fine.grid.lengths)
    q = np.sin(2 * a * x) * np.cos(3 * b * y) * np.sin(c * z + 1)
    exact = [
        2 * a * np.cos(2 * a * x) * np.cos(3 * b * y) * np.sin(c * z + 1),
        -3 * b * np.sin(2 * a * x) * np.sin(3 * b * y) * np.sin(c * z + 1),
        c * np.sin(2 * a * x) * np.cos(3 * b * y) * np.cos(c * z + 1),
    ]
    gradient = ready.gradient(jnp.asarray(np.stack([q] * 5)))
    assert gradient.shape == (3, 5, *fine.grid.shape)
    for axis in range(3):
        slope, at = ready.derivative(jnp.asarray(q), fine.grid.centre, axis)
        assert at == fine.grid.centre
        assert relative(slope, exact[axis]) <= 1e-13
        assert relative(gradient[axis, 4], exact[axis]) <= 1e-13
    view = View(jnp.asarray(u), jnp.zeros(()), jnp.asarray(0.1), ready)
    np.testing.assert_array_equal(np.asarray(view.centred()), u)
    np.testing.assert_array_equal(np.asarray(view["heat"]), u[4])


@pytest.mark.usefixtures("x64")
def test_stable_dt_looks_at_the_velocity_alone():
    for grid in (square(16), Grid((16, 8, 8), (TWO_PI, TWO_PI, TWO_PI))):
        solver = solver_of("spectral", grid, 0.0, None, {"dye": 0.0})
        speeds = (2.0, 1.0, 0.5)[: grid.ndim]
        u = np.stack([np.full(grid.shape, q) for q in (*speeds, 100.0)])
        expected = 1 / sum(q / h for q, h in zip(speeds, grid.spacing, strict=True))
        assert float(solver.stable_dt(jnp.asarray(u))) == pytest.approx(expected)
        assert np.isfinite(float(solver.stable_dt(0 * jnp.asarray(u))))


def test_unfit_grids_are_refused():
    with pytest.raises(ValueError, match="this spectral solver is three-dimensional, found shape"):
        Spectral3D(square(8), NavierStokes())
    with pytest.raises(ValueError, match="this spectral solver is two-dimensional, found shape"):
        Spectral2D(cube(8), NavierStokes())
    with pytest.raises(ValueError, match="needs periodic boundaries"):
        Spectral3D(Grid((8, 8, 8), (1.0, 1.0, 1.0), ("periodic", "no_slip", "periodic")), NavierStokes())
    with pytest.raises(ValueError, match="at least 4 cells per axis"):
        Spectral3D(Grid((8, 8, 3), (1.0, 1.0, 1.0)), NavierStokes())
    with pytest.raises(ValueError, match=r"acceleration_vector: found 2 entries for 3 axes"):
        Spectral3D(cube(8), NavierStokes(1e-3, UniformForce((1.0, 0.0))))


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(("forcing", "stepper", "dealias"), [
    (kolmogorov(1.0, 0.1, 1), ETDRK4(), "two_thirds"),
    (Linear(0.3), ETDRK4(), "hou_li"),
    (Isotropic(0.5, 1), CrankNicolsonRK4(), "two_thirds"),
    (LinearDrag(0.1), SSPRK2(), "hou_li"),
], ids=lambda p: p if isinstance(p, str) else type(p).__name__)  # fmt: skip
def test_single_precision_runs_hold_no_double(forcing, stepper, dealias):
    """With x64 on: every value of a float32 step, constants included, is at most 32 bits wide."""
    for dims in (2, 3):
        grid = Grid((8, 9, 10)[:dims], (TWO_PI, 5.0, 4.0)[:dims])
        solver = solver_of("spectral", grid, 1e-3, forcing, {"dye": 0.1}, dealias=dealias)
        model = Model(solver, stepper, 0.02, (EveryFlux(solver, jax.random.key(0)), Push(1.0)))
        u = jnp.asarray(random_flow(solver, 1, modes=2, dtype=np.float32))
        arrays, fixed = eqx.partition(model.prepare(np.float32), eqx.is_array)
        assert not [a for a in jax.tree.leaves(arrays) if a.dtype in (np.float64, np.complex128)]

        def step(u, carry, arrays, model=model, fixed=fixed):
            ready = eqx.combine(arrays, fixed)
            z, *rest = model(ready.solver.encode(u), carry, jnp.zeros((), jnp.int32), ready)
            return ready.solver.decode(z), ready.solver.divergence(u), ready.solver.gradient(u), ready.solver.stable_dt(u), rest

        text = str(jax.make_jaxpr(step)(u, model.init_carry(u), arrays))
        assert "f32" in text
        assert "f64" not in text
        assert "c128" not in text


# --- the Taylor–Green vortex -----------------------------------------------------------------------------------------------------

REFERENCE = Path(__file__).parent / "data" / "tgv3d_re1600_spectral512.csv"


def _taylor_green(n, dt, end, every, dtype=np.float32, dealias="hou_li"):
    """(t, E, 2ν·enstrophy) of the vortex at Re 1600, each `every` steps."""
    solver = solver_of("spectral", cube(n), 1 / 1600, dealias=dealias)
    model = Model(solver, ETDRK4(), dt)
    u = TaylorGreen()(jax.random.key(0), solver.grid, (solver.grid.centre,) * 3, dtype)
    weight = jnp.asarray(np.where(np.arange(n // 2 + 1) == 0, 1.0, 2.0).reshape(1, 1, -1) / n**6, dtype)
    square = jnp.asarray(sum(k**2 for k in solver.grid.wavenumbers()), dtype)

    def observe(prepared, z, carry):
        density = weight * jnp.sum(z["velocity"].real ** 2 + z["velocity"].imag ** 2, axis=0)
        return jnp.stack([0.5 * density.sum(), (square * density).sum() / 1600])

    @eqx.filter_jit
    def run(prepared, u):
        state = (prepared.solver.encode(u), model.init_carry(u), jnp.zeros((), jnp.int32))
        return frames_of(model, prepared, *state, round(end / (dt * every)), every, 0, observe)[1]

    series = np.asarray(run(model.prepare(dtype), u), np.float64)
    return dt * every * np.arange(1, len(series) + 1), *series.T


def _against_reference(t, energy, dissipation):
    """Relative errors of E and of 2ν·enstrophy at the times that the reference has, within half a step of its table."""
    table = np.loadtxt(REFERENCE, delimiter=",", skiprows=3)
    nearest = np.abs(table[:, :1] - t[None]).argmin(axis=1)
    rows = np.abs(t[nearest] - table[:, 0]) < 1e-6
    rows &= table[:, 0] > 0
    i = nearest[rows]
    return table[rows, 0], energy[i] / table[rows, 1] - 1, dissipation[i] / (table[rows, 3] / 800) - 1


def _each_half(times, energy, dissipation):
    return {f"{t:.1f}": f"{e:.1e} {d:.1e}" for t, e, d in zip(times, energy, dissipation, strict=True) if abs(2 * t % 1) < 1e-6}


def test_early_taylor_green_vortex_on_a_small_grid():
    """Single precision, 32³: the vortex stretches for a while before the grid is too coarse."""
    times, energy, dissipation = _against_reference(*_taylor_green(32, 0.05, 2.5, 1))
    print(_each_half(times, energy, dissipation))
    assert len(times) == 50
    assert np.abs(energy).max() <= 1e-4
    assert np.abs(dissipation[times <= 2.4]).max() <= 5e-3
    assert np.abs(dissipation[times <= 1.5]).max() <= 1e-4


@pytest.mark.slow
@pytest.mark.parametrize("dealias", ["hou_li", "two_thirds"])
def test_early_taylor_green_vortex(dealias):
    """64³ within half a percent wherever the reference has early rows (t ≤ 2.5; its next row is t = 5.5), and bounded later."""
    times, energy, dissipation = _against_reference(*_taylor_green(64, 0.025, 10.0, 2, dealias=dealias))
    print(dealias, _each_half(times, energy, dissipation))
    early = times <= 2.5
    assert early.sum() == 50
    assert np.abs(energy[early]).max() <= 1e-5
    assert np.abs(dissipation[early]).max() <= 5e-3
    assert np.abs(energy[times <= 5.5]).max() <= 1e-2
    assert np.isfinite(energy).all()
    assert np.abs(energy).max() <= 0.1


def _peak(t, dissipation):
    """The time and the height of the largest value, by a parabola through its neighbours."""
    i = int(dissipation.argmax())
    a, b, c = np.polyfit(t[i - 1 : i + 2] - t[i], dissipation[i - 1 : i + 2], 2)
    return t[i] - b / (2 * a), c - b * b / (4 * a)


@pytest.mark.slow
def test_dissipation_peak_of_the_taylor_green_vortex_at_128():
    t, energy, dissipation = _taylor_green(128, 0.0125, 10.0, 4)
    when, height = _peak(t, dissipation)
    rate = -np.gradient(energy, t)
    print(
        f"128³: peak of 2ν·enstrophy {height:.6f} at t = {when:.2f}; of −dE/dt {_peak(t, rate)[1]:.6f} at {_peak(t, rate)[0]:.2f}"
    )
    times, energy, dissipation = _against_reference(t, energy, dissipation)
    print(_each_half(times, energy, dissipation))
    assert np.abs(energy[times <= 6]).max() <= 5e-3
    assert height == pytest.approx(0.0128575, rel=0.1)
    assert when == pytest.approx(8.97, abs=0.5)


@pytest.mark.gpu
@pytest.mark.slow
def test_dissipation_peak_of_the_taylor_green_vortex_at_256():
    t, energy, dissipation = _taylor_green(256, 0.00625, 10.0, 8)
    when, height = _peak(t, dissipation)
    print(f"256³: peak of 2ν·enstrophy {height:.6f} at t = {when:.2f}")
    times, energy, dissipation = _against_reference(t, energy, dissipation)
    print(_each_half(times, energy, dissipation))
    assert np.abs(energy).max() <= 5e-3
    assert height == pytest.approx(0.0128575, rel=1e-2)
    assert when == pytest.approx(8.97, abs=0.1)
