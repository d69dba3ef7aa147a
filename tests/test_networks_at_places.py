"""Every network at every place in every solver: a training step, the adjoint test, memory; and the symmetries of the invariant one."""

from functools import partial
from pathlib import Path

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from closure_matrix import CELLS, DEFAULT, PLACES, SOLVERS, SUPPORTED, TOGETHER
from compressible_flows import gas
from flows import TWO_PI, cube, default_stepper, kolmogorov, random_flow, solver_of, square
from test_networks import drawn, jit

from hybridsim.check import random_state
from hybridsim.config import catalogue, constructor_of
from hybridsim.contract import View
from hybridsim.corrections.fourier import FNO
from hybridsim.corrections.graph import GraphFlux, GraphNetwork
from hybridsim.corrections.learned import LearnedCorrection, LearnedFlux, LearnedInterpolation, LearnedSource, LearnedStep
from hybridsim.corrections.networks import CNN, DilatedResNet, UNet
from hybridsim.corrections.tensor_basis import TensorBasisFlux, invariants, tensors
from hybridsim.grid import Grid
from hybridsim.model import Model, State, rollout
from hybridsim.solvers.hosted import JaxCFDFiniteVolume, JaxCFDSpectral, JaxCFDStepper
from hybridsim.solvers.incompressible import NavierStokes
from hybridsim.solvers.kuramoto_sivashinsky import FiniteVolumeKS, KuramotoSivashinsky, SpectralKS
from hybridsim.solvers.steppers import ETDRK4, ForwardEuler

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
        dims = int(name[4])
        grid = Grid((8, 6, 5)[:dims], (1.0, 0.9, 0.8)[:dims])
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
    """A training step of closures at some places at once, and ⟨Jv, w⟩ = ⟨v, Jᵀw⟩ in the state and in the weights of each of them."""
    solver, stepper = solver_at(name)
    weights, fixed = eqx.partition(tuple(closure_at(network, place, solver) for place in places), eqx.is_inexact_array)
    u = random_state(solver, np.float64)

    def run(weights, u):
        model = Model(solver, stepper, 1e-2, eqx.combine(weights, fixed))
        return rollout(model, State(u), 1, every=2, checkpoint_levels=1).u[0]

    # The gradient of the loss and that of the adjoint test are one backward pass of two cotangents; to compile is what costs.
    rng = np.random.default_rng(6)
    v = jax.tree.map(lambda a: jnp.asarray(rng.standard_normal(a.shape)), (weights, u))
    target, w = u + 0.1 * rng.standard_normal(u.shape), jnp.asarray(rng.standard_normal(u.shape))
    parts = [jax.tree.map(lambda a, i=i: jnp.where(i == len(places), a, 0), v[1]) for i in range(len(places) + 1)]
    parts = [
        (tuple(jax.tree.map(lambda a, same=i == j: a * same, each) for j, each in enumerate(v[0])), part)
        for i, part in enumerate(parts)
    ]
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
        assert all(g.any() for g in leaves)
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
@pytest.mark.parametrize(
    ("network", "name", "places"), [key for key in TOGETHER if key[2]], ids=lambda q: q if isinstance(q, str) else "+".join(q)
)
def test_training_steps_in_the_whole_table(network, name, places):
    train_and_compare(network, places, name)
