"""The staggered finite-volume solver in three dimensions, with passive scalars and every force, against what is known exactly."""

from functools import partial

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flows import TWO_PI, evolve, kolmogorov, relative, sample, steps
from test_gradients import _dot, _mismatches, _norm, _normal

from hybridsim.contract import Flux, Source, View
from hybridsim.corrections.eddy import Smagorinsky
from hybridsim.corrections.learned import LearnedFlux
from hybridsim.grid import Grid
from hybridsim.model import Model, State, rollout
from hybridsim.solvers.finite_volume import StaggeredFiniteVolume
from hybridsim.solvers.incompressible import (
    AbstractBoundaryVelocity,
    Isotropic,
    Linear,
    LinearDrag,
    Moving,
    NavierStokes,
    Parabola,
)
from hybridsim.solvers.spectral import Spectral2D
from hybridsim.solvers.steppers import SSPRK3, ForwardEuler

BOX = (TWO_PI, 3.0, 5.0)


def flow(grid, viscosity, forcing=None, velocity=None, scalars=None, **options):
    return StaggeredFiniteVolume(grid, NavierStokes(viscosity, forcing, scalars, velocity or {}), **options)


@eqx.filter_jit
def _projected(solver, u):
    return solver.project(u)


def noise(solver, seed=0, dtype=np.float64, mean=0.0):
    """White noise, put onto the constraints."""
    u = mean + np.random.default_rng(seed).standard_normal((len(solver.variables), *solver.grid.shape))
    return np.asarray(_projected(solver, jnp.asarray(u, dtype)))


@eqx.filter_jit
def _rate(solver, u):
    rate = solver.explicit(solver.encode(u), jnp.zeros((), u.dtype), lambda q, t: None)
    return rate["u"], rate["injected"]


def rate(solver, u):
    """(N(u), the mean that forces inject), before projection."""
    return tuple(np.asarray(q) for q in _rate(solver, jnp.asarray(u)))


def alignment(a, b):
    return float(np.vdot(a, b) / (np.linalg.norm(a) * np.linalg.norm(b)))


def rates(errors):
    return np.log2(np.array(errors[:-1]) / errors[1:])


def every_flux(solver):
    """A small `LearnedFlux` for all channels, zero as it starts."""
    return LearnedFlux(solver.grid.ndim, 4, 1, symmetric=False, variables=solver.variables, key=jax.random.key(0))


def drawn(closure, key, std, dtype):
    """Every weight of the closure anew, normal with deviation `std`."""
    weights, fixed = eqx.partition(closure, eqx.is_inexact_array)
    leaves, tree = jax.tree.flatten(weights)
    keys = jax.random.split(key, len(leaves))
    new = [(std * jax.random.normal(k, a.shape, dtype)).astype(dtype) for k, a in zip(keys, leaves, strict=True)]
    return eqx.combine(jax.tree.unflatten(tree, new), fixed)


# --- three dimensions ------------------------------------------------------------------------------------------------------------


def abc(solver, t, mean):
    """Arnold, Beltrami and Childress: a flow along its own vorticity, which decays as exp(−νt), adrift in a mean flow."""
    decay = np.exp(-solver.equation.viscosity * t)
    at = lambda f: lambda x, y, z: f(x - mean[0] * t, y - mean[1] * t, z - mean[2] * t)  # noqa: E731
    return sample(
        solver,
        at(lambda x, y, z: mean[0] + decay * (1.0 * np.sin(z) + 0.8 * np.cos(y))),
        at(lambda x, y, z: mean[1] + decay * (0.6 * np.sin(x) + 1.0 * np.cos(z))),
        at(lambda x, y, z: mean[2] + decay * (0.8 * np.sin(y) + 0.6 * np.cos(x))),
    )


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(("convection", "norm", "least"), [("central", 2, 1.95), ("van_leer", 1, 1.7)])
def test_abc_flow(convection, norm, least):
    errors, mean, time = [], (0.3, -0.2, 0.1), 0.5
    for n in (8, 16, 32):
        solver = flow(Grid((n, n, n), (TWO_PI,) * 3), 0.05, convection=convection)
        u = evolve(solver, SSPRK3(), abc(solver, 0.0, mean), time / n, n)
        errors.append(np.mean(np.abs(u - abc(solver, time, mean)) ** norm) ** (1 / norm))
        if n == 16:
            fine = evolve(solver, SSPRK3(), abc(solver, 0.0, mean), time / (2 * n), 2 * n)
            assert np.mean(np.abs(fine - u)) < 0.01 * errors[-1]
            single = evolve(solver, SSPRK3(), abc(solver, 0.0, mean).astype(np.float32), time / n, n)
            assert single.dtype == np.float32
            assert relative(single, u) <= 1e-5
    print(convection, errors, rates(errors))
    assert rates(errors)[-1] >= least


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("shape", [(6, 5, 8), (7, 9, 5)], ids=str)
def test_central_convection_conserves_energy_in_space(shape):
    found = {}
    for convection in ("central", "van_leer"):
        solver = flow(Grid(shape, BOX), 0.0, convection=convection)
        u = noise(solver)
        found[convection] = alignment(u, _projected(solver, jnp.asarray(rate(solver, u)[0])))
    assert abs(found["central"]) <= 1e-14
    assert found["van_leer"] < -1e-2  # negative control: the limiter takes energy


@pytest.mark.usefixtures("x64")
def test_halving_dt_divides_the_energy_drift_by_the_order():
    solver = flow(Grid((8, 8, 8), (TWO_PI,) * 3), 0.0, convection="central")
    x, y, z = (np.asarray(q) for q in solver.grid.mesh())
    u = np.stack([np.sin(x + z) * np.cos(y), np.cos(x) * np.sin(y + x), np.sin(z) * np.cos(x - y)])
    u = np.asarray(_projected(solver, jnp.asarray(u)))
    drift = [abs(np.sum(evolve(solver, SSPRK3(), u, 0.6 / n, n) ** 2) / np.sum(u**2) - 1) for n in (4, 8)]
    print(drift)
    assert 1e-12 < drift[1] < 1e-3
    assert drift[0] / drift[1] >= 0.85 * 2**3


def _permuted(u, order):
    """Axes and velocity components in another order; scalars turn with the axes."""
    return np.stack([np.transpose(u[c], order) for c in (*order, *range(3, len(u)))])


def _mirrored(u, axis):
    out = [np.flip(q, axis) for q in u]
    out[axis] = -np.roll(out[axis], -1, axis)
    return np.stack(out)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(("convection", "closures"), [("van_leer", ()), ("central", (Smagorinsky(0.3),))], ids=["van_leer", "eddy"])
def test_a_step_commutes_with_permutations_mirrors_and_shifts(convection, closures):
    shape = (7, 6, 9)
    scalars = {"heat": 1e-2} if not closures else None
    make = lambda order: flow(  # noqa: E731
        Grid([shape[a] for a in order], [BOX[a] for a in order]), 1e-2, Linear(0.3), None, scalars, convection=convection
    )
    solver = make((0, 1, 2))
    u = noise(solver, 1, mean=0.2)
    run = lambda s, q: evolve(s, ForwardEuler(), q, 0.03, 2, closures)  # noqa: E731
    after = run(solver, u)
    assert relative(after, u) > 1e-2
    for order in ((1, 2, 0), (1, 0, 2)):
        assert relative(run(make(order), _permuted(u, order)), _permuted(after, order)) <= 1e-13
    for axis in range(3):
        assert relative(run(solver, _mirrored(u, axis)), _mirrored(after, axis)) <= 1e-13
    move = partial(np.roll, shift=(3, -2, 4), axis=(1, 2, 3))
    assert relative(run(solver, move(u)), move(after)) <= 1e-13


# --- sums and divergence ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [np.float64, np.float32], ids=["float64", "float32"])
@pytest.mark.parametrize(
    ("shape", "scalars"),
    [pytest.param((6, 5, 8), None, marks=pytest.mark.slow), ((12, 9), {"heat": 1e-2, "salt": 0.0})],
    ids=["3d", "scalars"],
)
def test_flux_closures_with_random_weights_keep_every_sum(shape, scalars, dtype, x64):
    """50 seeds at once; what each step changes is compared with Σ|u| + Δt/Δx Σ|F|."""
    solver = flow(Grid(shape, BOX[: len(shape)]), 1e-3, LinearDrag(0.1), None, scalars)
    dt, count, seeds = 0.01, 3, 50
    start = noise(solver, 2, dtype, mean=0.3)
    template = every_flux(solver)

    @eqx.filter_jit
    def run(keys, std):
        def one(key):
            closure = drawn(template, key, std, dtype)
            model = Model(solver, ForwardEuler(), dt, (closure,))
            prepared = model.prepare(dtype)

            def body(state, _):
                u = prepared.solver.decode(state[0])
                flux = closure(View(u, jnp.zeros((), dtype), jnp.asarray(dt, dtype), prepared.solver))
                convected = sum(jnp.abs(u * u[a][None]).sum() for a in range(len(shape)))
                new = model(*state, prepared)
                axes = tuple(range(1, flux.ndim - 1))
                size = jnp.abs(u).sum(axis=axes) + dt / min(solver.grid.spacing) * (
                    jnp.abs(flux).sum(axis=(0, *axes[1:], axes[-1] + 1)) + convected
                )
                # sums and their difference in double precision
                wide = lambda q: prepared.solver.decode(q).astype(jnp.float64).sum(axis=axes)  # noqa: E731
                high, low = (
                    b.astype(jnp.float64) - a.astype(jnp.float64) for a, b in zip(state[1]["ledger"], new[1]["ledger"], strict=True)
                )
                change = wide(new[0]) - wide(state[0]) - solver.grid.cells * (high + low)
                worst = jnp.abs(prepared.solver.divergence(prepared.solver.decode(new[0]))).max()
                speed = jnp.abs(prepared.solver.decode(new[0])).max() / min(solver.grid.spacing)
                return new, (jnp.abs(change) / size, worst / speed)

            state = (prepared.solver.encode(jnp.asarray(start)), model.init_carry(jnp.asarray(start)), jnp.zeros((), jnp.int32))
            return jax.lax.scan(body, state, None, count)[1]

        return jax.vmap(one)(keys)

    worst = divergence = 0.0
    for std in (0.1, 1.0, 10.0, 100.0):
        drift, gap = (np.asarray(q, np.float64) for q in run(jax.random.split(jax.random.key(7), seeds), jnp.asarray(std, dtype)))
        assert np.isfinite(drift[:, 0]).all()
        worst, divergence = max(worst, np.nanmax(drift)), max(divergence, np.nanmax(gap))
    print(shape, dtype.__name__, "drift", worst, "divergence", divergence)
    assert worst <= (1e-14 if dtype == np.float64 else 1e-7)
    assert divergence <= (1e-11 if dtype == np.float64 else 1e-4)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("dtype", [pytest.param(np.float64, marks=pytest.mark.slow), np.float32], ids=["float64", "float32"])
def test_a_zero_initialised_closure_is_the_bare_solver(dtype):
    grid = Grid((6, 5, 8), (TWO_PI, 3.0, 5.0))
    solver = flow(grid, 1e-2, Linear(0.2), None, {"heat": 1e-2}, convection="central")
    u = noise(solver, 3, dtype)
    closure = every_flux(solver)
    bare, zero, other = (
        evolve(solver, ForwardEuler(), u, 0.02, 1, c) for c in ((), (closure,), (drawn(closure, jax.random.key(1), 0.1, dtype),))
    )
    limit = 4 * np.finfo(dtype).eps * np.abs(u).max()
    print(dtype.__name__, np.abs(bare - zero).max() / limit * 4, "ulp")
    assert np.abs(bare - zero).max() <= limit
    assert np.abs(bare - other).max() > 10 * limit  # negative control


# --- scalars ---------------------------------------------------------------------------------------------------------------------


def _drifting_wave(solver, speed, t):
    decay = np.exp(-2 * solver.equation.scalars["dye"] * t)
    return sample(
        solver,
        lambda x, y: speed[0] + 0 * x,
        lambda x, y: speed[1] + 0 * x,
        lambda x, y: 0.3 + decay * np.cos(x + y - (speed[0] + speed[1]) * t),
    )


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(("convection", "norm", "least"), [("central", 2, 1.95), ("van_leer", 1, 1.7)])
def test_a_wave_of_a_scalar_drifts_and_decays(convection, norm, least):
    """c = cos(k·(x − Ut)) e^{−κk²t} in a uniform flow."""
    speed, kappa, time = (0.8, -0.5), 0.02, 1.0
    errors = []
    for n in (16, 32, 64):
        solver = flow(Grid((n, 2 * n), (TWO_PI, 2 * TWO_PI)), 0.1, None, None, {"dye": kappa}, convection=convection)
        exact = partial(_drifting_wave, solver, speed)
        u = evolve(solver, SSPRK3(), exact(0.0), time / (2 * n), 2 * n)
        np.testing.assert_allclose(u[:2], exact(0.0)[:2], rtol=1e-14)
        assert abs(u[2].sum() - exact(0.0)[2].sum()) <= 1e-13 * np.abs(exact(0.0)[2]).sum() * np.sqrt(2 * n)
        errors.append(np.mean(np.abs(u[2] - exact(time)[2]) ** norm) ** (1 / norm))
        if n == 32:
            turned = flow(Grid((2 * n, n), (2 * TWO_PI, TWO_PI)), 0.1, None, None, {"dye": kappa}, convection=convection)
            there = evolve(turned, SSPRK3(), exact(0.0)[[1, 0, 2]].transpose(0, 2, 1), time / (2 * n), 2 * n)
            assert relative(there, u[[1, 0, 2]].transpose(0, 2, 1)) <= 1e-13
            if convection == "van_leer":
                assert np.abs(u[2] - 0.3).max() <= 1 + 1e-12
    print(convection, errors, rates(errors))
    assert rates(errors)[-1] >= least


@pytest.mark.usefixtures("x64")
def test_scalars_are_passive_and_keep_their_own_diffusivity():
    grid = Grid((12, 10), (TWO_PI, 3.0))
    solver = flow(grid, 1e-2, kolmogorov(), None, {"fast": 0.1, "slow": 0.0})
    assert [v.name for v in solver.variables] == ["u", "v", "fast", "slow"]
    assert [v.at for v in solver.variables[2:]] == [grid.centre] * 2
    assert solver.conserved == ("u", "v", "fast", "slow")
    u = noise(solver, 4)
    u = np.stack([*u[:3], u[2]])
    after = evolve(solver, SSPRK3(), u, 0.02, 5)
    bare = evolve(flow(grid, 1e-2, kolmogorov()), SSPRK3(), u[:2], 0.02, 5)
    # the same sums, which a compiler may fuse, and so round, in another way beside other variables
    np.testing.assert_allclose(after[:2], bare, rtol=0, atol=1e-14)
    variance = after[2:].var(axis=(1, 2))
    assert variance[0] < 0.9 * variance[1] <= u[3].var()
    # the same scheme: a scalar with the place of no velocity, and velocity as if it were a scalar, in a uniform flow
    uniform = np.stack([np.full(grid.shape, 0.7), np.full(grid.shape, -0.3), u[2], u[2]])
    found, _ = rate(flow(grid, 0.1, None, None, {"a": 0.1, "b": 0.1}), uniform)
    np.testing.assert_array_equal(found[2], found[3])


@pytest.mark.usefixtures("x64")
def test_a_scalar_flux_of_a_closure_is_diffusion():
    class Diffusion(Flux):
        def __call__(self, view, memory=None, key=None):
            flux = -0.05 * view.gradient()
            return flux.at[:, : view.grid.ndim].set(0)

    grid = Grid((8, 6, 5), BOX)
    u = noise(flow(grid, 1e-2, None, None, {"heat": 0.01}), 5)
    a = evolve(flow(grid, 1e-2, None, None, {"heat": 0.01}), SSPRK3(), u, 0.02, 3, (Diffusion(),), "stage")
    b = evolve(flow(grid, 1e-2, None, None, {"heat": 0.06}), SSPRK3(), u, 0.02, 3)
    assert relative(a, b) <= 1e-13


# --- forces ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("shape", [(8, 9), (8, 9, 7)], ids=str)
def test_linear_forcing_amplifies_fluctuations_alone(shape):
    grid = Grid(shape, BOX[: len(shape)])
    forced = flow(grid, 1e-2, Linear(0.4, 0.1), None, {"heat": 1e-2})
    u = noise(forced, 6, mean=0.5)
    found, injected = rate(forced, u)
    force = found - rate(flow(grid, 1e-2, None, None, {"heat": 1e-2}), u)[0]
    d = len(shape)
    axes = tuple(range(1, d + 1))
    mean = u[:d].mean(axis=axes, keepdims=True)
    np.testing.assert_allclose(force[:d], 0.4 * (u[:d] - mean) - 0.1 * u[:d], rtol=0, atol=1e-12 * np.abs(found).max())
    np.testing.assert_allclose(force[d:], 0, atol=1e-14 * np.abs(found).max())  # what is left when two equal sums are subtracted
    np.testing.assert_allclose(injected[:d], -0.1 * mean.ravel(), rtol=1e-12)
    assert not injected[d:].any()
    after = evolve(forced, SSPRK3(), u, 0.02, 10)
    np.testing.assert_allclose(after[:d].mean(axis=axes), np.exp(-0.1 * 0.2) * mean.ravel(), rtol=1e-8)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("shape", [(12, 11), (9, 8, 10)], ids=str)
def test_isotropic_forcing_has_its_power(shape):
    """⟨u·Pf⟩ = P in the scheme's own inner product, the force projected."""
    grid, d = Grid(shape, BOX[: len(shape)]), len(shape)
    axes = tuple(range(1, d + 1))
    for randomness in (0.0, 1.5):
        forcing = Isotropic(0.7, 2, jnp.asarray(randomness), 0.5, 3)
        forced, bare = (flow(grid, 1e-2, f, None, {"heat": 1e-2}, convection="central") for f in (forcing, None))
        u, other = (noise(forced, seed, mean=0.2) for seed in (6, 7))
        force = np.asarray(_projected(forced, jnp.asarray(rate(forced, u)[0] - rate(bare, u)[0])))
        np.testing.assert_allclose(force[d:], 0, atol=1e-13)
        assert np.sum(u[:d] * force[:d]) / grid.cells == pytest.approx(0.7, rel=1e-12)
        assert abs(np.sum(other[:d] * force[:d]) / grid.cells - 0.7) > 0.05  # negative control: on another flow it does other work
        np.testing.assert_allclose(force[:d].mean(axis=axes), 0, atol=1e-13)
    frames, ledger = steps(Model(forced, ForwardEuler(), 0.01), u, 3)
    assert np.abs(np.asarray(ledger[0][-1]) + np.asarray(ledger[1][-1])).max() <= 1e-13
    np.testing.assert_allclose(np.asarray(frames)[-1].mean(axis=axes), u.mean(axis=axes), atol=1e-13)


# --- restriction -----------------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("x64")
def test_restriction_with_scalars_from_both_kinds_of_grid():
    lengths = (TWO_PI, 3.0)
    coarse = flow(Grid((6, 8), lengths), 1e-2, None, None, {"heat": 1e-2})
    wave = lambda x, y: 0.4 + np.cos(2 * x - 2 * TWO_PI / 3 * y)  # noqa: E731
    still = lambda x, y: 0 * x  # noqa: E731
    staggered = flow(Grid((12, 24), lengths), 1e-2, None, None, {"heat": 1e-2})
    fine = sample(staggered, still, still, wave)
    blocks = coarse.restrict(jnp.asarray(fine), staggered.grid, staggered.variables)
    np.testing.assert_allclose(blocks[2], fine[2].reshape(6, 2, 8, 3).mean(axis=(1, 3)), rtol=0, atol=1e-14)
    spectral = Spectral2D(Grid((12, 24), lengths), NavierStokes(1e-2, None, {"heat": 1e-2}))
    values = np.stack([still(*spectral.grid.mesh()), still(*spectral.grid.mesh()), wave(*spectral.grid.mesh())])
    means = coarse.restrict(jnp.asarray(values), spectral.grid, spectral.variables)
    x, y = coarse.grid.mesh()
    shrink = np.sinc(2 / 6) * np.sinc(2 / 8)  # of the wave's cell means
    np.testing.assert_allclose(means[2], 0.4 + shrink * np.cos(2 * x - 2 * TWO_PI / 3 * y), rtol=0, atol=1e-13)
    u = noise(flow(Grid((8, 6, 10), BOX), 1e-2), 1)
    small = flow(Grid((4, 6, 5), BOX), 1e-2)
    out = small.restrict(jnp.asarray(u), Grid((8, 6, 10), BOX), small.variables)
    assert np.abs(small.divergence(out)).max() <= 1e-13
    assert relative(_projected(small, out), out) <= 1e-13


# --- consistency -----------------------------------------------------------------------------------------------------------------


class Staged(Source):
    """s at every stage of one step, and the states that it was called with."""

    sources: list
    seen: list

    def __call__(self, view, memory=None, key=None):
        self.seen.append(view.u)
        return self.sources[len(self.seen) - 1]


def _every_other(coarse, u):
    """Another filter: the values of the fine grid nearest to the upper corner of each coarse cell."""
    factors = [n // m for n, m in zip(u.shape[1:], coarse.grid.shape, strict=True)]
    return coarse.project(u[(slice(None), *(slice(f - 1, None, f) for f in factors))])


SIDES = {
    "3d": (((8, 12, 8), (4, 6, 4)), (), {}, Linear(0.2)),
    "cavity": (((12, 16), (6, 8)), ("no_slip", "no_slip"), {"y_upper": Moving((1.0, 0.0), 3.0)}, None),
    "channel": (((12, 16), (6, 8)), ("periodic", ("no_slip", "free_slip")), {}, LinearDrag(0.2)),
}  # fmt: skip


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("case", [pytest.param(c, marks=[] if c == "channel" else pytest.mark.slow) for c in SIDES])
def test_with_the_exact_source_the_coarse_run_is_the_filtered_fine_run(case):
    """s = restrict(N(u_fine)) − N_coarse(restrict(u_fine)) at every stage, with scalars: what is missing, and nothing else."""
    shapes, boundaries, velocity, forcing = SIDES[case]
    fine, coarse = (
        flow(Grid(shape, BOX[: len(shape)], boundaries), 5e-3, forcing, velocity, {"heat": 5e-3}).prepare(np.float64)
        for shape in shapes
    )
    dt, count, stepper = 0.02, 10, SSPRK3()
    u = jnp.asarray(noise(fine, 8, mean=0.2))
    filters = {"own": lambda q: coarse.restrict(q, fine.grid, fine.variables), "points": lambda q: _every_other(coarse, q)}

    def projected_rate(solver, z, t):
        return solver.decode(solver.constrain(solver.explicit(z, t, lambda q, time: None)))

    @jax.jit
    def fine_step(z, t):
        stages, sources = [], {name: [] for name in filters}

        def watch(q, time):
            change = projected_rate(fine, q, time)
            stages.append(filters["own"](fine.decode(q)))
            for name, restrict in filters.items():
                sources[name].append(restrict(change) - projected_rate(coarse, coarse.encode(restrict(fine.decode(q))), time))

        return stepper(fine, stepper.prepare(fine, dt, u.dtype), z, t, jnp.asarray(dt), watch), stages, sources

    @jax.jit
    def coarse_step(state, sources):
        closure = Staged(sources, [])
        return Model(coarse, stepper, dt, (closure,), "stage")(*state), closure.seen

    z, stages, sources = fine.encode(u), [], {name: [] for name in filters}
    for i in range(count):
        z, found, given = fine_step(z, jnp.asarray(i * dt))
        stages += [np.asarray(q) for q in found]
        for name, series in given.items():
            sources[name].append(series)
    end = np.asarray(filters["own"](fine.decode(z)))
    start, errors = filters["own"](u), {}
    for name, series in sources.items():
        state, seen = (coarse.encode(start), Model(coarse, stepper, dt).init_carry(start), jnp.zeros((), jnp.int32)), []
        state = (state[0], {**state[1], "closures": [{}]}, state[2])
        for given in series:
            state, found = coarse_step(state, given)
            seen += found
        assert len(seen) == len(stages) == stepper.stages * count
        errors[name] = max(max(relative(a, b) for a, b in zip(seen, stages, strict=True)), relative(coarse.decode(state[0]), end))
    bare = evolve(coarse, stepper, np.asarray(start), dt, count)
    print(case, errors, "bare", relative(bare, end))
    assert errors["own"] <= 1e-12
    assert errors["points"] > 1e-3  # negative control
    assert relative(bare, end) > 1e-3


# --- gradients -------------------------------------------------------------------------------------------------------------------


class Sliding(AbstractBoundaryVelocity):
    """U = (U₀, 0) with U₀ an array."""

    speed: jax.Array

    def __call__(self, component, position, t):
        return self.speed * jnp.cos(2 * t) if component == 0 else 0 * self.speed


class Inflow(AbstractBoundaryVelocity):
    """U = (U₀ · 4 s (1 − s), 0), U₀ an array."""

    speed: jax.Array

    def __call__(self, component, position, t):
        return self.speed * jnp.asarray(Parabola(1.0, length=1.0)(component, position, t), self.speed.dtype)


GRADIENTS = {
    "cavity": ((12, 10), ("no_slip", "no_slip"), "y_upper", Sliding),
    "through": ((8, 10), (("fixed", "outflow"), "no_slip"), "x_lower", Inflow),
    "3d": ((6, 5, 4), ("periodic", "no_slip", "free_slip"), "y_upper", Sliding),
}


def _setting(case, convection="van_leer"):
    shape, boundaries, side, moving = GRADIENTS[case]
    grid = Grid(shape, (1.2, 1.0, 0.8)[: len(shape)], boundaries)
    make = lambda p: flow(  # noqa: E731
        grid,
        p["viscosity"],
        Linear(p["growth"], p["drag"]),
        {side: moving(p["speed"])},
        {"dye": p["diffusivity"]},
        convection=convection,
    )
    parameters = {
        "viscosity": jnp.asarray(0.01), "growth": jnp.asarray(0.1), "drag": jnp.asarray(0.2), "speed": jnp.asarray(0.8),
        "diffusivity": jnp.asarray(0.02),
    }  # fmt: skip
    solver = make({name: float(value) if name != "speed" else value for name, value in parameters.items()})
    closure = drawn(every_flux(solver), jax.random.key(3), 0.1, np.float64)
    weights, fixed = eqx.partition(closure, eqx.is_inexact_array)
    parameters = {**parameters, "state": jnp.asarray(0.3 * noise(solver, 4)), "weights": weights}

    def final(p, count, levels):
        model = Model(make(p), ForwardEuler(), 0.01, (eqx.combine(p["weights"], fixed),))
        return rollout(model, State(p["state"]), 1, every=count, checkpoint_levels=levels).u[0]

    return parameters, final


def slow(*values):
    return pytest.param(*values, marks=pytest.mark.slow)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(("case", "level"), [slow("cavity", 2), slow("cavity", 0), slow("through", 2), slow("3d", 2)])
def test_adjoint_through_fifty_steps_between_walls(case, level):
    parameters, final = _setting(case)
    found, _ = _mismatches(parameters, final, 50, (level,))
    print(case, {k: f"{v:.1e}" for k, v in found.items()})
    assert max(found.values()) <= 1e-12


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("case", ["cavity", slow("through"), slow("3d")])
def test_gradients_between_walls_equal_central_differences(case):
    parameters, final = _setting(case, "central")
    target = _normal(parameters["state"], 11)
    loss = jax.jit(lambda p: jnp.mean((final(p, 3, 0) - target) ** 2))
    gradient = jax.jit(jax.grad(lambda p: jnp.mean((final(p, 3, 1) - target) ** 2)))(parameters)
    worst = {}
    for i, name in enumerate(parameters):
        direction = _normal(parameters[name], 50 + i)
        slope = _dot(gradient[name], direction)

        def difference(h, name=name, direction=direction):
            at = lambda step: float(  # noqa: E731
                loss({**parameters, name: jax.tree.map(lambda p, d: p + step * d, parameters[name], direction)})
            )
            return (at(h) - at(-h)) / (2 * h)

        h = 4e-3 * _norm(parameters[name]) / _norm(direction)
        best = (4 * difference(h / 2) - difference(h)) / 3  # Richardson: fourth order
        worst[name] = abs(best - slope) / (abs(slope) + 1e-3 * _norm(gradient[name]) * _norm(direction))
    print(case, {k: f"{v:.1e}" for k, v in worst.items()})
    assert max(worst.values()) <= 1e-8


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("case", [slow("cavity"), "through"])
def test_gradients_are_finite_at_rest_and_in_uniform_flow_next_to_walls(case):
    parameters, final = _setting(case)
    gradient_of = jax.jit(jax.grad(lambda p: jnp.sum((final(p, 2, 0) - 0.1) ** 2)))
    for value in (0.0, 0.5):
        changed = {**parameters, "state": jnp.full_like(parameters["state"], value), "speed": jnp.asarray(value)}
        gradient = gradient_of(changed)
        assert all(np.isfinite(np.asarray(a)).all() for a in jax.tree.leaves(gradient))
        assert np.asarray(gradient["state"]).any()
        assert np.asarray(gradient["speed"]).any()


# --- precision -------------------------------------------------------------------------------------------------------------------


def _types(jaxpr, found):
    for equation in jaxpr.eqns:
        found.update(str(v.aval.dtype) for v in (*equation.invars, *equation.outvars) if hasattr(v.aval, "dtype"))
        for inner in jax.tree.leaves(equation.params, is_leaf=lambda q: hasattr(q, "eqns") or hasattr(q, "jaxpr")):
            inner = getattr(inner, "jaxpr", inner)
            if hasattr(inner, "eqns"):
                _types(inner, found)
    return found


SINGLE = {
    "3d": (Grid((6, 5, 8), BOX), Isotropic(0.7, 1, 1.0, 0.5, 3), {}),
    "linear": (Grid((6, 8), BOX[:2]), Linear(0.3, 0.1), {}),
    "cavity": (Grid((6, 8), BOX[:2], ("no_slip", "no_slip")), None, {"y_upper": Moving((1.0, 0.0), 3.0)}),
    "through": (Grid((6, 8), (1.0, 1.0), (("fixed", "fixed"), "free_slip")), None, {"x_lower": Parabola(), "x_upper": Parabola()}),
}


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("case", SINGLE)
def test_no_double_precision_in_a_single_precision_step(case):
    grid, forcing, velocity = SINGLE[case]
    solver = flow(grid, 1e-2, forcing, velocity, {"heat": 1e-2})
    closure = every_flux(solver)
    model = Model(solver, SSPRK3(), 0.01, (closure,))
    u = jnp.asarray(noise(solver, 0, np.float32))

    def step(u):
        prepared = model.prepare(u.dtype)
        z, _, _ = model(prepared.solver.encode(u), model.init_carry(u), jnp.zeros((), jnp.int32), prepared)
        view = View(u, jnp.zeros((), u.dtype), jnp.asarray(0.01, u.dtype), prepared.solver)
        return prepared.solver.decode(z), solver.stable_dt(u), solver.divergence(u), view.gradient()

    found = _types(jax.make_jaxpr(step)(u).jaxpr, set())
    assert "float32" in found
    assert not {"float64", "complex128"} & found
    assert "float64" in _types(jax.make_jaxpr(step)(u.astype(np.float64)).jaxpr, set())  # negative control
