"""What is compiled does what its operations say one by one, in single precision and on arrays of many cells.

XLA on CPU hands some sums to a library (`__ynn_fusion`, JAX 0.10): compiled, Σ_k a_k b_kj, where b has an axis more than a, may
then be wrong from some row j on if it has more than 32,768 elements. Smaller grids and double precision do not meet it.
"""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compressible_flows import gas
from flows import cube, kolmogorov, solver_of, square
from test_networks import drawn

from hybridsim.check import random_state
from hybridsim.contract import View
from hybridsim.corrections.dynamic import DynamicSmagorinsky
from hybridsim.corrections.eddy import Leith, Smagorinsky
from hybridsim.corrections.gradient_model import GradientModel
from hybridsim.corrections.learned import LearnedFlux, LearnedInterpolation, LearnedSource
from hybridsim.corrections.spectral_eddy import SpectralEddyViscosity
from hybridsim.corrections.tensor_basis import TensorBasisFlux, invariants, tensors
from hybridsim.model import Model, State, rollout
from hybridsim.solvers.compressible import CompressibleNavierStokes
from hybridsim.solvers.spectral_gas import CompressibleSpectral
from hybridsim.solvers.steppers import ForwardEuler

SOLVERS = {
    "spectral_2d": lambda: solver_of("spectral", square(192), 1e-2, kolmogorov(), {"dye": 1e-2}),
    "spectral_3d": lambda: solver_of("spectral", cube(34), 1e-2, kolmogorov(), {"dye": 1e-2}),
    "finite_volume_2d": lambda: solver_of("finite_volume", square(192), 1e-2, kolmogorov(), {"dye": 1e-2}),
    "finite_volume_3d": lambda: solver_of("finite_volume", cube(34), 1e-2, kolmogorov(), {"dye": 1e-2}),
    "gas_2d": lambda: gas(square(192), viscosity=1e-2, scalars={"dye": 1e-2}),
    "gas_3d": lambda: gas(cube(34), viscosity=1e-2, riemann="llf", positivity=False),
    "gas_spectral_2d": lambda: CompressibleSpectral(square(192), CompressibleNavierStokes(viscosity=1e-2, scalars={"dye": 1e-2})),
    "gas_spectral_3d": lambda: CompressibleSpectral(cube(34), CompressibleNavierStokes(viscosity=1e-2)),
}


def learned(kind):
    return lambda solver: drawn(
        lambda: kind(solver.grid.ndim, width=4, depth=1, variables=solver.variables, key=jax.random.key(0)), 0.1, np.float32
    )


def interpolated(solver):
    given = {"variables": solver.variables, "free_weights": solver.free_weights(), "key": jax.random.key(0)}
    return drawn(lambda: LearnedInterpolation(solver.grid.ndim, width=4, depth=1, **given), 0.1, np.float32)


def tensor_basis(solver):
    given = {"variables": solver.variables, "key": jax.random.key(0)}
    return drawn(lambda: TensorBasisFlux(solver.grid.ndim, width=4, depth=1, **given), 0.1, np.float32)


CLOSURES = {
    "smagorinsky": lambda solver: Smagorinsky(0.1),
    "leith": lambda solver: Leith(0.1),
    "dynamic_smagorinsky": lambda solver: DynamicSmagorinsky(),
    "gradient_model": lambda solver: GradientModel(),
    "spectral_eddy_viscosity": lambda solver: SpectralEddyViscosity(),
    "tensor_basis_flux": tensor_basis,
    "learned_flux": learned(LearnedFlux),
    "learned_source": learned(LearnedSource),
    "learned_interpolation": interpolated,
}

ALONE = [pytest.param(name, marks=() if name in ("spectral_2d", "gas_spectral_3d") else pytest.mark.slow) for name in SOLVERS]

QUICK = [
    ("spectral_3d", "tensor_basis_flux"),
    ("finite_volume_2d", "learned_interpolation"),
    ("gas_spectral_3d", "learned_flux"),
]
SLOW = [
    (solver, closure)
    for solver in SOLVERS
    for closure in CLOSURES
    if (solver, closure) not in QUICK
    and not (closure == "leith" and solver.endswith("3d"))
    and not (closure in ("leith", "spectral_eddy_viscosity", "tensor_basis_flux") and solver.startswith("gas"))
    and not (closure == "spectral_eddy_viscosity" and solver.startswith("finite"))
    and not (closure == "learned_interpolation" and "spectral" in solver)
]


def compare(made, *args):
    """One program and its operations, array by array; 1e-6 of the whole is rounding, such as the slope of a bias of a flux."""
    found = jax.jit(made)(*args)
    with jax.disable_jit():
        known = made(*args)
    assert {a.dtype for a in jax.tree.leaves(found)} == {np.dtype(np.float32)}
    sizes = [float(np.linalg.norm(np.ravel(b))) for b in jax.tree.leaves(known)]
    assert max(sizes) > 0
    for a, b, size in zip(jax.tree.leaves(found), jax.tree.leaves(known), sizes, strict=True):
        assert np.linalg.norm(np.ravel(np.asarray(a) - np.asarray(b))) <= 1e-3 * size + 1e-6 * max(sizes), (a.shape, size)


@pytest.mark.parametrize("name", ALONE)
def test_a_step(name, x64, rng):
    """u₁ − u₀ and its vector-Jacobian product."""
    solver = SOLVERS[name]()
    u = random_state(solver, np.float32)
    slope = jnp.asarray(rng.standard_normal(u.shape), jnp.float32)

    def change(u, slope):
        end, pull = jax.vjp(lambda u: rollout(Model(solver, ForwardEuler(), 1e-3), State(u), 1, every=1).u[0], u)
        return end - u, pull(slope)[0] - slope

    compare(change, u, slope)
    # as it is run: outermost, with the options that the solver asks for
    whole = rollout(Model(solver, ForwardEuler(), 1e-3), State(u), 1, every=1).u[0] - u
    inner = jax.jit(change)(u, slope)[0]
    assert np.linalg.norm(np.ravel(whole - inner)) <= 1e-3 * np.linalg.norm(np.ravel(inner))


@pytest.mark.parametrize(
    ("name", "closure"), [*QUICK, *(pytest.param(*case, marks=pytest.mark.slow) for case in SLOW)], ids=lambda part: part
)
def test_a_closure(name, closure, x64, rng):
    """Its numbers, and their vector-Jacobian product in state and weights."""
    solver = SOLVERS[name]().prepare(jnp.float32)
    weights, fixed = eqx.partition(CLOSURES[closure](solver), eqx.is_inexact_array)
    u = random_state(solver, np.float32)
    time, step = jnp.zeros((), jnp.float32), jnp.asarray(1e-3, jnp.float32)

    def numbers(weights, u):
        made, view = eqx.combine(weights, fixed), View(u, time, step, solver)
        return made(view, made.init_memory(view), jax.random.key(3))

    slope = jax.tree.map(lambda a: jnp.asarray(rng.standard_normal(a.shape), a.dtype), jax.eval_shape(numbers, weights, u))

    def both(weights, u, slope):
        end, pull = jax.vjp(numbers, weights, u)
        return end, pull(slope)

    compare(both, weights, u, slope)


def test_the_tensor_basis_of_many_cells(rng):
    s, w = (jnp.asarray(rng.standard_normal((3, 3, 34, 34, 34)), jnp.float32) for _ in range(2))
    for made in (lambda s, w: tensors(s, w, 10), invariants):
        found = jax.jit(made)(s, w)
        with jax.disable_jit():
            known = made(s, w)
        for a, b in zip(found, known, strict=True):
            np.testing.assert_allclose(a, b, atol=1e-5 * float(jnp.max(jnp.abs(b))))
