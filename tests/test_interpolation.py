"""Learned interpolation on the staggered grid: what is free, what it keeps, and which side counts."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flows import TWO_PI, kolmogorov, random_flow, solver_of, square
from hypothesis import given, settings
from hypothesis import strategies as st

from hybridsim.contract import Interpolation, View
from hybridsim.corrections.learned import LearnedInterpolation
from hybridsim.grid import Grid
from hybridsim.model import Model, State, rollout
from hybridsim.solvers.finite_volume import COMBINATIONS
from hybridsim.solvers.steppers import SSPRK3, ForwardEuler

pytestmark = pytest.mark.usefixtures("x64")

WALLS = Grid((8, 7), (TWO_PI, 5.0), ("periodic", "no_slip"))


class Given(Interpolation):
    """a = what it is given."""

    value: jax.Array

    def __call__(self, view, memory=None, key=None):
        return jnp.broadcast_to(self.value, (view.grid.ndim, 2, len(view.variables), 2, *view.grid.shape))


def rate(solver, u, value=None):
    """P N(u) by one step of forward Euler."""
    closures = () if value is None else (Given(jnp.asarray(value)),)
    model = Model(solver, ForwardEuler(), 1e-3, closures)
    u = jnp.asarray(u)
    z, _, _ = jax.jit(lambda u: model(solver.encode(u), model.init_carry(u), jnp.asarray(0)))(u)
    return (np.asarray(solver.decode(z)) - np.asarray(u)) / 1e-3


def random_weights(solver, std, seed=0):
    shape = (solver.grid.ndim, 2, len(solver.variables), 2, *solver.grid.shape)
    return std * np.random.default_rng(seed).standard_normal(shape)


def by_hand(solver, u, value):
    """−Σ_a δ_a (ū_a Σ_f a_f Z_f · cells) in a periodic box, with rolls; before projection."""
    out = np.zeros_like(u)
    for c in range(len(u)):
        for a, h in enumerate(solver.grid.spacing):
            along = a == c
            # cells around the flux stored at i: at the centre i for the component along the axis, else at the face i + ½
            first = -2 if along else -1
            cells = [np.roll(u[c], -(first + k), a) for k in range(4)]
            carrier = u[a]
            if along:
                carrier = 0.5 * (cells[1] + cells[2])
            elif c < solver.grid.ndim:
                carrier = 0.5 * (u[a] + np.roll(u[a], -1, c))
            weights = np.where(carrier > 0, value[a, 0, c], value[a, 1, c])
            flux = carrier * sum(weights[f] * sum(z * q for z, q in zip(COMBINATIONS[f], cells, strict=True)) for f in range(2))
            out[c] -= ((np.roll(flux, -1, a) - flux) if along else (flux - np.roll(flux, 1, a))) / h
    return out


@pytest.mark.parametrize("convection", ["van_leer", "central"])
def test_the_values_at_the_flux_points_change_as_they_are_told(convection):
    solver = solver_of("finite_volume", Grid((8, 6), (TWO_PI, 5.0)), 1e-2, scalars={"dye": 1e-3}, convection=convection)
    u, value = np.asarray(solver.project(jnp.asarray(random_flow(solver, 1, mean=(0.2, -0.1))))), random_weights(solver, 0.3)
    change = rate(solver, u, value) - rate(solver, u)
    expected = by_hand(solver, u, value)
    projected = np.asarray(solver.project(jnp.asarray(u + expected))) - u
    np.testing.assert_allclose(change, projected, rtol=0, atol=1e-9 * np.abs(expected).max())
    assert np.abs(expected).max() > 0.1


def test_what_is_free_vanishes_for_linear_profiles():
    z = np.asarray(COMBINATIONS)
    points = np.arange(4) - 1.5
    np.testing.assert_allclose(z @ np.ones(4), 0, atol=1e-15)
    np.testing.assert_allclose(z @ points, 0, atol=1e-15)
    np.testing.assert_allclose(z @ z.T, np.eye(2), atol=1e-15)


@pytest.mark.parametrize("dtype", [np.float64, np.float32])
@settings(max_examples=8, deadline=None)
@given(exponent=st.floats(-1, 2), seed=st.integers(0, 99))
def test_momentum_and_scalars_are_kept_and_the_flow_stays_solenoidal(dtype, exponent, seed):
    solver = solver_of("finite_volume", square(6), 1e-2, scalars={"dye": 1e-3})
    u = random_flow(solver, 2, mean=(0.3, 0.1), dtype=dtype)
    value = random_weights(solver, 10**exponent, seed).astype(dtype)
    after = u + 1e-3 * rate(solver, u, value)
    scale = np.abs(u).sum(axis=(1, 2)) + np.abs(after).sum(axis=(1, 2))
    drift = np.abs(after.astype(np.float64).sum(axis=(1, 2)) - u.astype(np.float64).sum(axis=(1, 2))) / scale
    assert drift.max() <= {np.float64: 1e-14, np.float32: 3e-7}[dtype]
    divergence = np.abs(np.asarray(solver.divergence(jnp.asarray(after)))).max() * solver.grid.spacing[0] / np.abs(after).max()
    assert divergence <= {np.float64: 1e-12, np.float32: 1e-4}[dtype]


def test_the_side_that_the_flow_comes_from_counts():
    solver = solver_of("finite_volume", square(6), 1e-2)
    u = random_flow(solver, 3, speed=0.2, mean=(1.0, 1.0))
    value = random_weights(solver, 0.3)
    other = value.copy()
    other[:, 1] = 7.0
    np.testing.assert_array_equal(rate(solver, u, value), rate(solver, u, other))
    other[:, 0] += 0.1
    assert np.abs(rate(solver, u, value) - rate(solver, u, other)).max() > 1e-3
    np.testing.assert_array_equal(
        rate(solver, -u, value), rate(solver, -u, np.where(np.arange(2)[:, None, None, None, None], value, 7.0))
    )


def test_an_untrained_one_is_the_bare_solver():
    for solver in (solver_of("finite_volume", square(6), 1e-2, kolmogorov()), solver_of("finite_volume", WALLS, 1e-2)):
        u = (
            random_flow(solver, 0)
            if solver.grid is not WALLS
            else np.asarray(solver.project(jnp.asarray(np.random.default_rng(0).standard_normal((2, 8, 7)))))
        )
        closure = LearnedInterpolation(
            2, 4, 1, variables=solver.variables, free_weights=solver.free_weights(), key=jax.random.key(0)
        )
        closure = jax.tree.map(lambda a: a.astype(np.float64) if eqx.is_inexact_array(a) else a, closure)
        start = State(jnp.asarray(u))
        bare = rollout(Model(solver, SSPRK3(), 1e-2), start, 1, every=3).u
        closed = rollout(Model(solver, SSPRK3(), 1e-2, (closure,)), start, 1, every=3).u
        np.testing.assert_allclose(closed, bare, rtol=0, atol=16 * np.finfo(np.float64).eps * np.abs(bare).max())


def test_nothing_is_free_on_walls():
    """Weights of fluxes that lie on a side, or beyond it, are dead."""
    solver = solver_of("finite_volume", WALLS, 1e-2)
    u = np.asarray(solver.project(jnp.asarray(np.random.default_rng(0).standard_normal((2, 8, 7)))))
    value = random_weights(solver, 0.3)
    other = value.copy()
    other[1, :, 0, :, :, -1] = 50.0  # the flux of u through the upper wall
    np.testing.assert_array_equal(rate(solver, u, value), rate(solver, u, other))
    other[1, :, 0, :, :, -2] = 50.0
    assert np.abs(rate(solver, u, value) - rate(solver, u, other)).max() > 1.0


@pytest.mark.parametrize("size", [0.25, 3.0])
def test_no_weights_can_unlearn_the_order(size):
    """The rate of a smooth flow, against four times as many cells, for weights that do not change with the grid."""
    errors = []
    for n in (16, 32, 64):
        found = []
        for value in (None, size):
            solver = solver_of("finite_volume", square(n), 1e-2, convection="central")
            found.append(rate(solver, random_flow(solver, 4, modes=2), value))
        errors.append(np.sqrt(np.mean((found[1] - found[0]) ** 2)))
    rates = np.log2(np.divide(errors[:-1], errors[1:]))
    assert rates[-1] >= 1.9
    assert errors[0] > 1e-3


@pytest.mark.parametrize("shared", [True, False])
def test_a_network_gives_each_channel_its_own_places(shared):
    solver = solver_of("finite_volume", square(6), 1e-2, scalars={"dye": 1e-3})
    made = LearnedInterpolation(
        2, 4, 1, shared=shared, variables=solver.variables, free_weights=2, key=jax.random.key(0), bound=0.3
    )
    rng = np.random.default_rng(0)
    closure = jax.tree.map(lambda a: jnp.asarray(rng.standard_normal(a.shape)) if eqx.is_inexact_array(a) else a, made)
    u = jnp.asarray(random_flow(solver, 1))
    view = View(u, jnp.zeros(()), jnp.asarray(0.01), solver)
    out = closure(view)
    assert out.shape == (2, 2, 3, 2, 6, 6)
    assert float(jnp.abs(out).max()) <= 0.3
    centred = 0.3 * jnp.tanh(closure.network(closure.scaling.features(view), (True, True)))
    first = centred.reshape(2, 2, -1, 2, 6, 6)[0, :, :, :]
    # of u along x the flux points are the cell centres themselves, of the dye the faces
    np.testing.assert_array_equal(out[0, :, 0], first[:, 0])
    np.testing.assert_allclose(out[0, :, 2], 0.5 * (first[:, -1] + jnp.roll(first[:, -1], -1, axis=2)), rtol=1e-12)
