"""Every network at every place in every solver: training steps, adjoint tests, memory; and the symmetries of the invariant one."""

from functools import partial
from pathlib import Path

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from closure_matrix import CELLS, DEFAULT, PLACES, SOLVERS, SUPPORTED, TOGETHER, table
from compressible_flows import gas
from flows import TWO_PI, cube, default_stepper, kolmogorov, random_flow, solver_of, square
from test_networks import drawn, jit

from hybridsim.check import random_state
from hybridsim.config import catalogue
from hybridsim.contract import View
from hybridsim.corrections.fourier import FNO
from hybridsim.corrections.graph import GraphFlux, GraphNetwork
from hybridsim.corrections.learned import LearnedCorrection, LearnedFlux, LearnedInterpolation, LearnedSource, LearnedStep
from hybridsim.corrections.networks import CNN, DilatedResNet, UNet
from hybridsim.corrections.tensor_basis import TensorBasisFlux, invariants, tensors
from hybridsim.grid import Grid
from hybridsim.model import Model, State, rollout
from hybridsim.solvers.compressible import CompressibleNavierStokes
from hybridsim.solvers.hosted import JaxCFDFiniteVolume, JaxCFDSpectral, JaxCFDStepper
from hybridsim.solvers.incompressible import NavierStokes
from hybridsim.solvers.kuramoto_sivashinsky import FiniteVolumeKS, KuramotoSivashinsky, SpectralKS
from hybridsim.solvers.spectral_gas import CompressibleSpectral
from hybridsim.solvers.steppers import ETDRK4, SSPRK3, ForwardEuler

DOCS = Path(__file__).parent.parent / "docs" / "closures.md"

AT = {
    "flux": LearnedFlux,
    "source": LearnedSource,
    "interpolation": LearnedInterpolation,
    "post_step": LearnedCorrection,
    "replacement": LearnedStep,
}
SMALL = {
    "cnn": partial(CNN, width=3, depth=1),
    "dilated_resnet": partial(DilatedResNet, blocks=1, width=3, dilations=(1, 2), activation="squareplus"),
    "unet": partial(UNet, width=2, levels=1),
    "fno": partial(FNO, modes=2, width=3, layers=1),
    "graph_network": partial(GraphNetwork, width=3, rounds=2),
}
CLASSES = {"graph_flux": partial(GraphFlux, width=3, rounds=2), "tensor_basis_flux": partial(TensorBasisFlux, width=3, depth=1)}


def solver_at(name):
    """(solver, stepper) of a column of the table, on a grid of a few cells."""
    scalars = {"dye": 1e-2}
    if name.startswith("ks"):
        make = SpectralKS if name == "ks_spectral" else FiniteVolumeKS
        return make(Grid((12,), (22.0,)), KuramotoSivashinsky()), ETDRK4()
    if name.startswith("gas"):
        spectral = name.startswith("gas_spectral")
        dims = int(name.removeprefix("gas_spectral_" if spectral else "gas_")[0])
        grid = Grid((8, 6, 5)[:dims], (1.0, 0.9, 0.8)[:dims])
        if spectral:
            return CompressibleSpectral(grid, CompressibleNavierStokes(viscosity=1e-3)), SSPRK3()
        return gas(grid, viscosity=1e-3, riemann="llf", positivity=False), ForwardEuler()
    if name.startswith("jax_cfd"):
        make = JaxCFDSpectral if name == "jax_cfd_spectral_2d" else JaxCFDFiniteVolume
        return make(Grid((8, 8), (TWO_PI, TWO_PI)), NavierStokes(1e-2)), JaxCFDStepper()
    if name == "walls_2d":
        grid = Grid((8, 7), (TWO_PI, 5.0), ("periodic", "no_slip"))
        return solver_of("finite_volume", grid, 1e-2, scalars=scalars), ForwardEuler()
    kind, dims = name[:-3], int(name[-2])
    return solver_of(
        kind, Grid((8, 7, 6)[:dims], (TWO_PI, 5.0, 4.0)[:dims]), 1e-2, kolmogorov(1.0, 0.1, 1), scalars
    ), default_stepper(kind)


def closure_at(network, place, solver, std=0.3, dtype=np.float64):
    """The closure of one cell of the table, with random weights."""
    given = {"variables": solver.variables, "key": jax.random.key(0)}
    if place == "interpolation":
        given["free_weights"] = solver.free_weights()
    if network in CLASSES:
        return drawn(lambda: CLASSES[network](solver.grid.ndim, **given), std, dtype)
    return drawn(lambda: AT[place](solver.grid.ndim, network=SMALL[network], **given), std, dtype)


def train_and_compare(network, places, name):
    """A training step of closures at some places at once, and ⟨Jv, w⟩ = ⟨v, Jᵀw⟩ in the state and in the weights of each."""
    solver, stepper = solver_at(name)
    # many layers in a row grow what random weights make: there a gas would blow up within the two steps
    std = 0.1 if network == "dilated_resnet" else 0.3
    weights, fixed = eqx.partition(tuple(closure_at(network, place, solver, std) for place in places), eqx.is_inexact_array)
    u = random_state(solver, np.float64)

    def run(weights, u):
        model = Model(solver, stepper, 1e-2, eqx.combine(weights, fixed))
        return rollout(model, State(u), 1, every=2, checkpoint_levels=1).u[0]

    # The gradient of the loss and that of the adjoint test are one backward pass of two cotangents; to compile is what costs.
    rng = np.random.default_rng(6)
    v = jax.tree.map(lambda a: jnp.asarray(rng.standard_normal(a.shape)), (weights, u))
    target, w = u + 0.1 * rng.standard_normal(u.shape), jnp.asarray(rng.standard_normal(u.shape))
    zero = jax.tree.map(jnp.zeros_like, v)
    parts = [((*zero[0][:i], v[0][i], *zero[0][i + 1 :]), zero[1]) for i in range(len(places))] + [(zero[0], v[1])]
    directions = jax.tree.map(lambda *a: jnp.stack(a), *parts)

    @jit
    def forwards(weights):
        one = lambda v: jax.jvp(run, (weights, u), v)  # noqa: E731
        return jax.vmap(one, out_axes=(None, 0))(directions)

    @jit
    def backwards(weights):
        end, pull = jax.vjp(run, weights, u)
        slope = jax.grad(lambda q: jnp.mean((q - target) ** 2))(end)
        return jax.vmap(pull)(jnp.stack([slope, w]))

    end, pushed = forwards(weights)
    pulled = backwards(weights)
    gradient = jax.tree.map(lambda g: g[0], pulled[0])
    for each in gradient:
        leaves = [np.asarray(g) for g in jax.tree.leaves(each)]
        assert all(np.isfinite(g).all() for g in leaves)
        # a constant flux does nothing, so that the bias of the last layer may have no slope
        assert sum(not g.any() for g in leaves) <= (1 if "flux" in places else 0)
    optimiser = optax.adam(1e-6)
    updates, _ = optimiser.update(gradient, optimiser.init(weights))
    after = optax.apply_updates(weights, updates)
    loss = lambda end: float(jnp.mean((end - target) ** 2))  # noqa: E731
    assert 0 < loss(forwards(after)[0]) < loss(end)

    gaps = []
    back = jax.tree.map(lambda g: g[1], pulled)
    for forward, direction in zip(pushed, parts, strict=True):
        pairs = zip(jax.tree.leaves(direction), jax.tree.leaves(back), strict=True)
        gap = abs(float(jnp.vdot(forward, w)) - sum(float(jnp.vdot(a, b)) for a, b in pairs))
        size = float(jnp.linalg.norm(forward)) * float(jnp.linalg.norm(w))
        assert size > 1e-9
        gaps.append(gap / size)
    print(network, name, dict(zip((*places, "state"), gaps, strict=True)))
    assert max(gaps) <= 1e-12


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(("network", "place", "name"), sorted(DEFAULT))
def test_a_training_step_runs_and_its_gradient_is_one(network, place, name):
    train_and_compare(network, (place,), name)


@pytest.mark.slow
@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(("network", "name", "places"), TOGETHER, ids=lambda q: q if isinstance(q, str) else "+".join(q))
def test_training_steps_in_the_whole_table(network, name, places):
    train_and_compare(network, places, name)


def test_the_default_suite_has_each_network_each_place_and_each_solver():
    assert set(CELLS) >= DEFAULT
    for i, column in enumerate((SUPPORTED, PLACES, SOLVERS)):
        assert {cell[i] for cell in DEFAULT} == set(column)
    assert sorted((n, p, s) for n, s, places in TOGETHER for p in places) == sorted(CELLS)
    assert set(catalogue("networks")) | {"graph_flux", "tensor_basis_flux"} == set(SUPPORTED)


def test_the_page_shows_the_table():
    assert table() in DOCS.read_text(encoding="utf-8"), f"the table of docs/closures.md should be\n{table()}"


# --- memory ----------------------------------------------------------------------------------------------------------------------


def gradient_memory(network, place, count, budget=None):
    """Bytes of temporaries of the compiled gradient through `count` steps, in float32; nothing is run."""
    solver = solver_of("finite_volume", square(32), 1e-3)
    weights, fixed = eqx.partition(closure_at(network, place, solver, dtype=np.float32), eqx.is_inexact_array)

    def loss(weights, u):
        model = Model(solver, ForwardEuler(), 0.005, (eqx.combine(weights, fixed),))
        return jnp.sum(rollout(model, State(u), 1, every=count, gradient_memory=budget).u ** 2)

    shapes = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), weights)
    compiled = jit(jax.grad(loss)).lower(shapes, jax.ShapeDtypeStruct((2, 32, 32), np.float32)).compile()
    return compiled.memory_analysis().temp_size_in_bytes / 2**20


@pytest.mark.parametrize("network", [n if n == "cnn" else pytest.param(n, marks=pytest.mark.slow) for n in SUPPORTED])
def test_the_gradient_through_64_steps_keeps_to_its_budget(network):
    """One step's own backward pass comes on top."""
    step, free = gradient_memory(network, "flux", 1), gradient_memory(network, "flux", 64, 1e6)
    budget = 0.1 * free
    found = gradient_memory(network, "flux", 64, budget)
    print(f"{network}: one step {step:.2f} MiB, all kept {free:.2f} MiB, budget {budget:.2f} MiB: {found:.2f} MiB")
    assert found < budget + 2 * step
    assert found < 0.5 * free


# --- the invariant network -------------------------------------------------------------------------------------------------------


class Turn:
    """x'_a = s_a x_{p(a)}: axes that change places, some of them mirrored; a symmetry of square and cubic grids."""

    def __init__(self, axes, signs):
        self.axes, self.signs = axes, signs

    def array(self, q, at):
        """A scalar at `at`, seen from the turned axes; there it lives at the turned place."""
        q = np.transpose(q, self.axes)
        for a, (sign, b) in enumerate(zip(self.signs, self.axes, strict=True)):
            # the point (i + p) h goes to −(i + p) h, which is (j + p) h with j = −i − 2 p
            q = np.roll(np.flip(q, a), 1 - round(2 * at[b]), a) if sign < 0 else q
        return q

    def state(self, solver, u):
        """The turned flow: velocities change places, too."""
        d = solver.grid.ndim
        velocity = [s * self.array(u[b], solver.variables[b].at) for s, b in zip(self.signs, self.axes, strict=True)]
        return np.stack([*velocity, *(self.array(q, v.at) for q, v in zip(u[d:], solver.variables[d:], strict=True))])

    def flux(self, solver, flux):
        """The turned flux."""
        d, count = solver.grid.ndim, len(solver.variables)
        channels = [*zip(self.signs, self.axes, strict=True), *((1, c) for c in range(d, count))]
        rows = []
        for s, a in zip(self.signs, self.axes, strict=True):
            rows.append(np.stack([s * t * self.array(flux[a, c], solver.flux_place(a, c)) for t, c in channels]))
        return np.stack(rows)


TURNS = {
    2: {"turn": Turn((1, 0), (-1, 1)), "reflection": Turn((0, 1), (-1, 1)), "exchange": Turn((1, 0), (1, 1))},
    3: {"turn": Turn((0, 2, 1), (1, -1, 1)), "cycle": Turn((2, 0, 1), (1, 1, 1)), "reflection": Turn((0, 1, 2), (1, -1, 1))},
}


def invariant(solver, count=None):
    return drawn(lambda: TensorBasisFlux(solver.grid.ndim, count, 6, 1, variables=solver.variables, key=jax.random.key(0)), 1.0)


def flux_of(solver, closure):
    """u -> F, compiled."""

    def flux(u):
        return closure(View(u, jnp.zeros((), u.dtype), jnp.asarray(0.01, u.dtype), solver.prepare(u.dtype)))

    compiled = jit(flux)
    return lambda u: np.asarray(compiled(jnp.asarray(u)))


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(("kind", "grid", "count"), [
    ("spectral", square(12), None),
    ("finite_volume", square(12), None),
    ("spectral", cube(8), 10),
    ("finite_volume", cube(8), 10),
], ids=["spectral_2d", "finite_volume_2d", "spectral_3d", "finite_volume_3d"])  # fmt: skip
def test_the_invariant_network_turns_with_the_flow(kind, grid, count):
    """Turned by 90°, reflected or moved along, the flux is the turned flux, to rounding; that of another network is not."""
    solver = solver_of(kind, grid, scalars={"dye": 1e-2})
    u = random_flow(solver, 3, modes=2, mean=(0.3, -0.2))
    flux = flux_of(solver, invariant(solver, count))
    here = flux(u)
    size = np.abs(here).max()
    errors = {}
    for name, turn in TURNS[grid.ndim].items():
        expected = turn.flux(solver, here)
        errors[name] = np.abs(flux(turn.state(solver, u)) - expected).max() / size
        assert np.abs(expected - here).max() > 0.1 * size
    moving = u + np.arange(1, len(u) + 1).reshape(-1, *(1,) * grid.ndim) * (np.arange(len(u)) < grid.ndim).reshape(
        -1, *(1,) * grid.ndim
    )
    errors["moving"] = np.abs(flux(moving) - here).max() / size
    print(kind, grid.ndim, errors)
    assert max(errors.values()) <= 1e-12
    plain = flux_of(solver, closure_at("cnn", "flux", solver))
    turn = TURNS[grid.ndim]["turn"]
    expected = turn.flux(solver, plain(u))
    assert np.abs(plain(turn.state(solver, u)) - expected).max() > 1e-3 * np.abs(expected).max()


def test_the_tensors_are_those_of_pope(x64, rng):
    """Symmetric, without trace, turning with S and Ω; products written out."""
    g = rng.standard_normal((3, 3))
    g = g - np.trace(g) / 3 * np.eye(3)
    s, w = 0.5 * (g + g.T), 0.5 * (g - g.T)
    one, tr = np.eye(3), np.trace
    expected = [
        s,
        s @ w - w @ s,
        s @ s - one * tr(s @ s) / 3,
        w @ w - one * tr(w @ w) / 3,
        w @ s @ s - s @ s @ w,
        w @ w @ s + s @ w @ w - 2 / 3 * one * tr(s @ w @ w),
        w @ s @ w @ w - w @ w @ s @ w,
        s @ w @ s @ s - s @ s @ w @ s,
        w @ w @ s @ s + s @ s @ w @ w - 2 / 3 * one * tr(s @ s @ w @ w),
        w @ s @ s @ w @ w - w @ w @ s @ s @ w,
    ]
    cell = lambda a: jnp.asarray(a)[..., None]  # noqa: E731
    found = [np.asarray(t)[..., 0] for t in tensors(cell(s), cell(w), 10)]
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-13)
        assert np.abs(b).max() > 1e-3
    known = [tr(s @ s), tr(w @ w), tr(s @ s @ s), tr(w @ w @ s), tr(w @ w @ s @ s)]
    np.testing.assert_allclose(np.concatenate(invariants(cell(s), cell(w))), known, rtol=1e-12)


def test_a_constant_coefficient_is_an_eddy_viscosity(x64):
    """g_1 = 2 c² alone: F = −2 ν S with ν = c² Δ² |∇u|, in any unit of velocity."""
    solver = solver_of("spectral", square(16), scalars={"dye": 0.0})
    u = random_flow(solver, 1, modes=2)
    zero = jax.tree.map(jnp.zeros_like, invariant(solver))
    closure = eqx.tree_at(lambda c: c.network.layers[-1].bias, zero, jnp.asarray([2 * 0.2**2, 0.0, 0.2**2 / 0.7, 0.0, 0.0]))
    view = View(jnp.asarray(u), jnp.zeros(()), jnp.asarray(0.01), solver)
    slopes = np.asarray(view.gradient())
    gradient = slopes[:, :2]
    viscosity = (0.2 * TWO_PI / 16) ** 2 * np.sqrt((gradient**2).sum(axis=(0, 1)))
    expected = -viscosity * np.concatenate([gradient + np.swapaxes(gradient, 0, 1), slopes[:, 2:] / 0.7], axis=1)
    # slopes below a thousandth of U/Δ are smoothed
    np.testing.assert_allclose(flux_of(solver, closure)(u), expected, rtol=0, atol=1e-5 * np.abs(expected).max())


@pytest.mark.usefixtures("x64")
def test_the_invariant_network_says_what_it_is_not_made_for():
    make = lambda dims=2, **given: TensorBasisFlux(dims, **given, key=jax.random.key(0))  # noqa: E731
    with pytest.raises(ValueError, match="TensorBasisFlux: in one dimension nothing turns"):
        make(1)
    with pytest.raises(ValueError, match="tensors: in 2 dimensions 1 to 2 are possible, found 3"):
        make(tensors=3)
    with pytest.raises(ValueError, match="velocity_scale: must be positive and finite, found 0"):
        make(velocity_scale=0.0)
    with pytest.raises(ValueError, match="TensorBasisFlux: made for incompressible flow, not for a gas"):
        make(variables=solver_at("gas_2d")[0].variables)
    solver = solver_of("spectral", square(8), scalars={"c": 0.0})
    with pytest.raises(ValueError, match="TensorBasisFlux: made for u, v; found u, v, c"):
        flux_of(solver, drawn(make))(np.zeros((3, 8, 8)))


# --- the graph flux --------------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("name", ["spectral_2d", "finite_volume_2d", "ks_finite_volume"])
def test_messages_move_from_the_faces_to_the_flux_points(name):
    """Each flux is the mean of the messages nearest to its point, wherever the solver keeps its channels."""
    solver, _ = solver_at(name)
    closure = closure_at("graph_flux", "flux", solver)
    u = random_state(solver, np.float64)
    view = View(u, jnp.zeros(()), jnp.asarray(0.01), solver)
    messages = np.asarray(closure.network.messages(closure.scaling.features(view), solver.grid.periodic))
    flux = flux_of(solver, closure)(u)
    for a in range(solver.grid.ndim):
        for c in range(len(solver.variables)):
            expected = messages[a, c]
            for axis, at in enumerate(solver.flux_place(a, c)):
                if axis == a and at == 0.5:
                    expected = 0.5 * (expected + np.roll(expected, 1, axis))
                elif axis != a and at == 1.0:
                    expected = 0.5 * (expected + np.roll(expected, -1, axis))
            np.testing.assert_allclose(flux[a, c], expected, rtol=0, atol=1e-13)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("mass_flux", [True, False])
def test_a_graph_flux_of_a_gas_moves_with_it(mass_flux):
    """What an observer sees who moves along: Galilei's transformation of the flux, at the faces."""
    solver, _ = solver_at("gas_2d")
    make = lambda: GraphFlux(2, 3, 1, inputs="gradient", mass_flux=mass_flux, variables=solver.variables, key=jax.random.key(0))  # noqa: E731
    flux = flux_of(solver, drawn(make, 1.0))
    u, (a, b) = np.asarray(random_state(solver, np.float64)), (0.7, -0.4)
    moving = np.stack([u[0], u[1] + a * u[0], u[2] + b * u[0], u[3] + a * u[1] + b * u[2] + 0.5 * (a * a + b * b) * u[0]])
    here, there = flux(u), flux(moving)
    mass, x, y, energy = (here[:, c] for c in range(4))
    expected = np.stack([mass, x + a * mass, y + b * mass, energy + a * x + b * y + 0.5 * (a * a + b * b) * mass], axis=1)
    assert np.abs(there - expected).max() <= 1e-12 * np.abs(expected).max()
    assert (np.abs(mass).max() > 1e-3) == mass_flux
