"""Several closures at once are what one computes by hand; memory and noise go through the carry, gradients and ensembles."""

from functools import partial

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compressible_flows import gas
from flows import BOTH, TWO_PI, random_flow, solver_of
from test_compressible import rough_flow

from hybridsim.contract import Flux, Interpolation, PostStep, Source
from hybridsim.grid import Grid
from hybridsim.model import Model, State, ensemble, rollout
from hybridsim.solvers.kuramoto_sivashinsky import FiniteVolumeKS, KuramotoSivashinsky
from hybridsim.solvers.steppers import ETDRK4, SSPRK2, ForwardEuler

pytestmark = pytest.mark.usefixtures("x64")

PLANE = Grid((8, 6), (TWO_PI, 5.0))
LINE = Grid((16,), (22.0,))

quickly = partial(jax.jit, compiler_options={"xla_backend_optimization_level": "0"})


class Eddy(Flux):
    """F = −ν ∇u."""

    viscosity: float = eqx.field(static=True, default=0.02)

    def __call__(self, view, memory=None, key=None):
        return -self.viscosity * view.gradient()


class Shear(Flux):
    """F[a, c] = ε (u_c)² at the flux points, the same for all a."""

    size: float = eqx.field(static=True, default=0.01)

    def __call__(self, view, memory=None, key=None):
        square = self.size * view.centred() ** 2
        return view.to_flux_points(jnp.stack([square] * view.grid.ndim))


class Damp(Source):
    """s = −r u."""

    rate: float = eqx.field(static=True, default=0.3)

    def __call__(self, view, memory=None, key=None):
        return -self.rate * view.u


class Lean(Interpolation):
    """a = ε tanh(u): other weights in every cell and for every channel."""

    size: float = eqx.field(static=True, default=0.05)

    def __call__(self, view, memory=None, key=None):
        shape = (view.grid.ndim, 2, len(view.variables), view.solver.free_weights(), *view.grid.shape)
        return jnp.broadcast_to(self.size * jnp.tanh(view.u)[None, None, :, None], shape)


class Shrink(PostStep):
    """d = −ε u²."""

    size: float = eqx.field(static=True, default=0.01)

    def __call__(self, view, memory=None, key=None):
        return -self.size * view.u**2


def step(solver, stepper, u, dt, closures, evaluate="step"):
    """One model step."""
    model = Model(solver, stepper, dt, closures, evaluate)
    z, _, _ = model(solver.encode(u), model.init_carry(u), jnp.zeros((), jnp.int32))
    return solver.decode(z)


def outflow(grid, flux, ahead):
    """−∇·F by differences; `ahead[a][c]`: whether the flux of c along a lies behind c's own point, as on a staggered grid."""
    out = np.zeros(flux.shape[1:])
    for a, h in enumerate(grid.spacing):
        for c in range(flux.shape[1]):
            f = flux[a, c]
            out[c] -= (np.roll(f, -1, a) - f if ahead[a][c] else f - np.roll(f, 1, a)) / h
    return out


# --- several at once -------------------------------------------------------------------------------------------------------------


def test_four_places_at_once_in_a_gas_by_hand():
    """Flux, Source, Interpolation and two PostStep closures; each of them counts."""
    solver, dt = gas(PLANE, scalars={"dye": 0.0}, positivity=False), 2e-3
    u = jnp.asarray(rough_flow(PLANE, 4, scalars=1))
    closures = (Shrink(0.01), Eddy(), Damp(), Lean(), Shear(), Damp(-0.1), Lean(-0.02), Shrink(0.02))

    @quickly
    def found(u):
        whole = step(solver, ForwardEuler(), u, dt, closures)
        weighted = step(solver, ForwardEuler(), u, dt, (Lean(0.05 - 0.02),))
        return (
            whole,
            weighted,
            solver.gradient(u),
            [step(solver, ForwardEuler(), u, dt, closures[:i] + closures[i + 1 :]) for i in range(8)],
        )

    whole, weighted, gradient, without = found(u)
    square = 0.01 * np.asarray(u) ** 2
    flux = -0.02 * np.asarray(gradient) + np.stack([0.5 * (square + np.roll(square, -1, a + 1)) for a in range(2)])
    by_hand = np.asarray(weighted) + dt * (outflow(PLANE, flux, np.zeros((2, 5))) - (0.3 - 0.1) * np.asarray(u))
    for size in (0.01, 0.02):
        by_hand = by_hand - size * by_hand**2
    np.testing.assert_allclose(whole, by_hand, rtol=0, atol=1e-13 * np.abs(by_hand).max())
    for other in without:
        assert np.abs(np.asarray(other) - by_hand).max() > 1e-6


def test_four_places_at_every_stage_in_a_gas_by_hand():
    """z₁ = E(z), z₂ = ½ z + ½ E(z₁) with everything evaluated anew, then the correction."""
    solver, dt = gas(LINE, positivity=False), 2e-3
    u = jnp.asarray(rough_flow(LINE, 4))
    closures = (Eddy(), Damp(), Lean(), Shrink())

    @quickly
    def found(u):
        whole = step(solver, SSPRK2(), u, dt, closures, ("stage", "stage", "stage", "step"))
        euler = lambda u: step(solver, ForwardEuler(), u, dt, closures[:3])  # noqa: E731
        by_hand = 0.5 * u + 0.5 * euler(euler(u))
        return whole, by_hand - 0.01 * by_hand**2, step(solver, SSPRK2(), u, dt, closures)

    whole, by_hand, held = found(u)
    np.testing.assert_allclose(whole, by_hand, rtol=0, atol=1e-13 * np.abs(by_hand).max())
    assert np.abs(held - by_hand).max() > 1e-7  # negative control


@pytest.mark.parametrize("kind", BOTH)
def test_three_places_at_once_in_a_liquid_by_hand(kind):
    """P(u + Δt (N − ∇·F + s)), then P(u + d)."""
    options = {"dealias": "none"} if kind == "spectral" else {}
    solver, dt = solver_of(kind, PLANE, scalars={"dye": 1e-3}, **options).prepare(np.float64), 0.01
    u = jnp.asarray(random_flow(solver, 3, modes=1, mean=(0.3, -0.2)))
    closures = (Eddy(), Damp(), Shrink(), Shear(), Shrink(0.02))

    @quickly
    def found(u):
        u = solver.project(u)
        whole = step(solver, ForwardEuler(), u, dt, closures)
        square = 0.01 * solver.centred(u) ** 2
        flux = -0.02 * solver.gradient(u) + jnp.stack(
            [jnp.stack([solver.move(q, PLANE.centre, solver.flux_place(a, c)) for c, q in enumerate(square)]) for a in range(2)]
        )
        terms = [[solver.derivative(flux[a, c], solver.flux_place(a, c), a)[0] for c in range(3)] for a in range(2)]
        outflow = -jnp.stack([terms[0][c] + terms[1][c] for c in range(3)])
        q = step(solver, ForwardEuler(), u, dt, ()) + solver.project(dt * (outflow - 0.3 * u))
        for size in (0.01, 0.02):
            q = solver.project(q - size * q**2)
        return whole, q, step(solver, ForwardEuler(), u, dt, ())

    whole, by_hand, bare = found(u)
    np.testing.assert_allclose(whole, by_hand, rtol=0, atol=1e-13)
    assert np.abs(bare - by_hand).max() > 1e-3


# --- memory and noise ------------------------------------------------------------------------------------------------------------


class Diary(Source):
    """s = noise; remembers the random key of every evaluation."""

    stochastic = True
    pages: int = eqx.field(static=True, default=12)

    def init_memory(self, view):
        return {"keys": jnp.zeros((self.pages, 2), jnp.uint32), "calls": jnp.zeros((), jnp.int32)}

    def __call__(self, view, memory=None, key=None):
        keys = memory["keys"].at[memory["calls"]].set(jax.random.key_data(key))
        return 1e-2 * jax.random.normal(key, view.u.shape, view.u.dtype), {"keys": keys, "calls": memory["calls"] + 1}


class Whim(Flux):
    """F = noise, with neither memory nor parameters; tells a list what key it was given."""

    stochastic = True
    seen: list

    def __call__(self, view, memory=None, key=None):
        self.seen.append(np.asarray(jax.random.key_data(key)).tolist())
        return 1e-2 * jax.random.normal(key, (view.grid.ndim, *view.u.shape), view.u.dtype)


class Fading(Flux):
    """F = −w₀ ⟨|∇u|²⟩ₜ ∇u + w₁ |∇u| ξ: an eddy viscosity from a running mean and multiplicative noise, both with weights."""

    stochastic = True
    weights: jax.Array

    def init_memory(self, view):
        return jnp.ones((), view.u.dtype)

    def __call__(self, view, memory=None, key=None):
        slope = view.gradient()
        mean = 0.8 * memory + 0.2 * jnp.mean(slope**2)
        noise = jax.random.normal(key, slope.shape, slope.dtype) * jnp.sqrt(slope**2 + 1e-2)
        return -self.weights[0] * mean * slope + self.weights[1] * noise, mean


def line():
    return FiniteVolumeKS(LINE, KuramotoSivashinsky())


def waves(count=1):
    x = LINE.mesh()[0]
    return np.stack([np.cos(TWO_PI / 22 * (2 * x + s))[None] * (1 + 0.2 * s) for s in range(count)])


def test_keys_differ_from_evaluation_to_evaluation_closure_to_closure_and_sample_to_sample():
    model = Model(line(), ETDRK4(), 0.05, (Diary(), Diary()), ("step", 2), substeps=2)
    out = ensemble(model, jnp.asarray(waves(3)), 2, every=3, seed=4)
    slots = out.final.carry["closures"]
    calls = [np.asarray(slot["memory"]["calls"]) for slot in slots]
    np.testing.assert_array_equal(calls[0], 12)
    np.testing.assert_array_equal(calls[1], 6)
    keys = np.concatenate(
        [np.asarray(slots[0]["memory"]["keys"]).reshape(-1, 2), np.asarray(slots[1]["memory"]["keys"])[:, :6].reshape(-1, 2)]
    )
    assert len(np.unique(keys, axis=0)) == len(keys) == 3 * (12 + 6)
    # the same seed, the same numbers; another seed, others; whoever the neighbours are
    again = ensemble(model, jnp.asarray(waves(3)), 2, every=3, seed=4)
    np.testing.assert_array_equal(out.u, again.u)
    np.testing.assert_array_equal(again.final.carry["closures"][0]["memory"]["keys"], slots[0]["memory"]["keys"])
    alone = ensemble(model, jnp.asarray(waves(3))[:1], 2, every=3, seed=4)
    np.testing.assert_array_equal(alone.final.carry["closures"][0]["memory"]["keys"][0], slots[0]["memory"]["keys"][0])
    other = ensemble(model, jnp.asarray(waves(3)), 2, every=3, seed=5)
    assert not np.isin(np.asarray(other.final.carry["closures"][0]["memory"]["keys"]), keys).any()


def test_the_stages_of_a_step_share_a_key_and_steps_do_not():
    whim = Whim([])
    with jax.disable_jit():
        model = Model(line(), SSPRK2(), 0.001, (whim,), "stage", 2)
        u = jnp.asarray(waves()[0])
        state = model.solver.encode(u), model.init_carry(u), jnp.zeros((), jnp.int32)
        model(*model(*state))
    # substeps are a loop of which every turn is seen without compilation
    stages = [tuple(key) for key in whim.seen]
    assert len(stages) == 8
    assert stages[::2] == stages[1::2]
    assert len(set(stages)) == 4


def test_samples_remember_for_themselves_and_go_on():
    """An ensemble is its rollouts; in two halves, or through `State`s, it is the same."""
    model = Model(line(), ETDRK4(), 0.05, (Fading(jnp.asarray([0.1, 0.02])), Diary()))
    u = jnp.asarray(waves(2))
    whole = ensemble(model, u, 4, every=2, seed=3)
    half = ensemble(model, u, 2, every=2, seed=3)
    rest = ensemble(model, half.final, 2, every=2)
    np.testing.assert_allclose(rest.u, whole.u[:, 2:], rtol=0, atol=1e-12)
    keys = lambda out: np.asarray(out.final.carry["closures"][1]["memory"]["keys"])  # noqa: E731
    np.testing.assert_array_equal(keys(rest), keys(whole))
    means = np.asarray(whole.final.carry["closures"][0]["memory"])
    np.testing.assert_allclose(rest.final.carry["closures"][0]["memory"], means, rtol=1e-12)
    assert abs(means[0] - means[1]) > 1e-3
    for s in range(2):
        alone = rollout(model, State(u[s]), 4, every=2, seed=jax.random.fold_in(jax.random.key(3), s))
        np.testing.assert_allclose(whole.u[s], alone.u, rtol=0, atol=1e-12)
    # negative control: what is forgotten is missed
    forgetful = half.final.carry | {
        "closures": [half.final.carry["closures"][0] | {"memory": 0 * means}, half.final.carry["closures"][1]]
    }
    lost = ensemble(model, State(half.final.u, half.final.step, half.final.t, forgetful), 2, every=2)
    assert np.abs(np.asarray(lost.u) - np.asarray(whole.u[:, 2:])).max() > 1e-4


def test_gradients_flow_through_memory_and_past_noise():
    """Adjoint test, differences, and the same gradient whatever is stored on the way."""
    solver, u = line(), jnp.asarray(waves()[0])
    at = {"u": u, "weights": jnp.asarray([0.05, 0.02])}

    def final(p, levels=0):
        model = Model(solver, ETDRK4(), 0.05, (Fading(p["weights"]),))
        return rollout(model, State(p["u"]), 1, every=12, checkpoint_levels=levels, seed=9).u[0]

    rng = np.random.default_rng(0)
    v = {name: jnp.asarray(rng.standard_normal(a.shape)) for name, a in at.items()}
    w = jnp.asarray(rng.standard_normal(u.shape))
    pushed = quickly(lambda p: jax.jvp(final, (p,), (v,))[1])(at)
    pulled = [quickly(lambda p, n=n: jax.vjp(lambda q: final(q, n), p)[1](w)[0])(at) for n in (0, 2)]
    dot = lambda a, b: sum(float(jnp.vdot(a[k], b[k])) for k in a)  # noqa: E731
    size = float(jnp.linalg.norm(pushed) * jnp.linalg.norm(w))
    for each in pulled:
        assert abs(float(jnp.vdot(pushed, w)) - dot(v, each)) <= 1e-12 * size
        assert np.asarray(each["weights"]).all()
    shifted, h = quickly(lambda s: final(jax.tree.map(lambda a, b: a + s * b, at, v))), 1e-6
    np.testing.assert_allclose((shifted(h) - shifted(-h)) / (2 * h), pushed, rtol=0, atol=1e-7 * np.abs(pushed).max())


@pytest.mark.slow
def test_noise_and_memory_can_be_trained():
    """The weights of a flow that the same noise has stirred are found again."""
    solver, u = line(), jnp.asarray(waves(4))
    truth = jnp.asarray([0.05, 0.03])

    def frames(weights):
        return ensemble(Model(solver, ETDRK4(), 0.05, (Fading(weights),)), u, 2, every=3, seed=2).u

    target = jax.jit(frames)(truth)
    value_and_slope = jax.jit(jax.value_and_grad(lambda w: jnp.mean((frames(w) - target) ** 2)))
    curvature = jax.jit(lambda w: jax.jacfwd(lambda q: frames(q).ravel())(w))
    weights = jnp.asarray([0.02, 0.01])
    first, _ = value_and_slope(weights)
    for _ in range(4):  # Gauss and Newton
        _, slope = value_and_slope(weights)
        jacobian = curvature(weights)
        weights = weights - jnp.linalg.solve(2 * jacobian.T @ jacobian / target.size, slope)
    np.testing.assert_allclose(weights, truth, rtol=1e-6)
    assert first > 1e-6
