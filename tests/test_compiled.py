"""A compiled step and its gradient are what their operations say one by one, in single precision and on arrays of many cells.

XLA on CPU hands some sums to a library (`__ynn_fusion`, JAX 0.10) that gets Σ_k a_k b_kj wrong from the 32,768th element on, where
b has one axis more than a. Small grids and double precision never meet it.
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
    "alone": None,
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

QUICK = [
    ("spectral_2d", "learned_flux"),
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
    and not (
        closure in ("leith", "spectral_eddy_viscosity", "dynamic_smagorinsky", "tensor_basis_flux") and solver.startswith("gas")
    )
    and not (closure == "spectral_eddy_viscosity" and solver.startswith("finite"))
    and not (closure == "learned_interpolation" and "spectral" in solver)
]


@pytest.mark.parametrize(
    ("name", "closure"), [*QUICK, *(pytest.param(*case, marks=pytest.mark.slow) for case in SLOW)], ids=lambda part: part
)
def test_compiled_is_what_the_operations_say(name, closure, x64, rng):
    solver = SOLVERS[name]()
    make = CLOSURES[closure]
    closures = () if make is None else (make(solver),)
    weights, fixed = eqx.partition(closures, eqx.is_inexact_array)
    u = random_state(solver, np.float32)
    slope = jnp.asarray(rng.standard_normal(u.shape), jnp.float32)

    def step(weights, u):
        return rollout(Model(solver, ForwardEuler(), 1e-3, eqx.combine(weights, fixed)), State(u), 1, every=1).u[0]

    def both(weights, u, slope):
        end, pull = jax.vjp(step, weights, u)
        return end - u, pull(slope)

    found = jax.jit(both)(weights, u, slope)
    with jax.disable_jit():
        known = both(weights, u, slope)
    assert {a.dtype for a in jax.tree.leaves(found)} == {np.dtype(np.float32)}
    # the bias of a flux has no gradient but rounding
    whole = max(float(np.linalg.norm(np.ravel(b))) for b in jax.tree.leaves(known))
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(known), strict=True):
        size = float(np.linalg.norm(np.ravel(b)))
        assert np.linalg.norm(np.ravel(np.asarray(a) - np.asarray(b))) <= 1e-3 * size + 1e-6 * whole, (a.shape, size)


def test_the_tensor_basis_of_many_cells(rng):
    s, w = (jnp.asarray(rng.standard_normal((3, 3, 34, 34, 34)), jnp.float32) for _ in range(2))
    for made in (lambda s, w: tensors(s, w, 10), invariants):
        found = jax.jit(made)(s, w)
        with jax.disable_jit():
            known = made(s, w)
        for a, b in zip(found, known, strict=True):
            np.testing.assert_allclose(a, b, atol=1e-5 * float(jnp.max(jnp.abs(b))))
