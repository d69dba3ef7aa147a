"""Gradients through solvers and closures: adjoint test, differences, finiteness, and the memory that they need."""

from functools import partial

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flows import (
    BOTH,
    TWO_PI,
    EveryFlux,
    default_stepper,
    kolmogorov,
    learned,
    random_flow,
    randomised,
    solver_of,
    square,
)

from hybridsim.contract import Flux
from hybridsim.corrections.eddy import Leith, Smagorinsky
from hybridsim.grid import Grid
from hybridsim.model import Model, State, rollout
from hybridsim.solvers.incompressible import Isotropic, Linear
from hybridsim.solvers.steppers import ETDRK4


def _setting(kind, convection="van_leer", n=12, dt=0.02):
    """(parameters, function of them, levels and steps -> final state): state, weights, viscosity, force and drag."""
    options = {"convection": convection} if kind == "finite_volume" else {}
    closure = learned(3, 0.1, dtype=np.float64)
    weights, fixed = eqx.partition(closure, eqx.is_inexact_array)
    parameters = {
        "state": jnp.asarray(random_flow(solver_of(kind, square(n)), 4, modes=3, mean=(0.2, -0.1))),
        "weights": weights,
        "viscosity": jnp.asarray(0.01),
        "amplitude": jnp.asarray(0.7),
        "drag": jnp.asarray(0.1),
    }

    def final(p, count, levels):
        solver = solver_of(kind, square(n), p["viscosity"], kolmogorov(p["amplitude"], p["drag"]), **options)
        model = Model(solver, default_stepper(kind), dt, (eqx.combine(p["weights"], fixed),))
        frames = rollout(model, State(p["state"]), 1, every=count, checkpoint_levels=levels)
        return frames.u[0]

    return parameters, final


FORCES = {
    "kolmogorov": (lambda p: kolmogorov(p["amplitude"], p["drag"], 1), {"amplitude": 0.7, "drag": 0.1}),
    "linear": (lambda p: Linear(p["rate"], p["drag"]), {"rate": 0.3, "drag": 0.1}),
    "isotropic": (
        lambda p: Isotropic(p["power"], 1, p["randomness"], 0.3, 1, p["drag"]),
        {"power": 0.5, "randomness": 0.8, "drag": 0.1},
    ),
}


def _scalar_setting(dims, force, closed, dealias="hou_li", n=(8, 9, 6)):
    """The same for a spectral solver with a passive scalar, a given force, with or without a closure at every stage."""
    make, numbers = FORCES[force]
    grid = Grid(n[:dims], (TWO_PI, 5.0, 4.0)[:dims])
    plain = solver_of("spectral", grid, scalars={"dye": 0.1})
    weights, fixed = eqx.partition(
        jax.tree.map(lambda a: a.astype(np.float64), randomised(EveryFlux(plain, jax.random.key(0)), 3, 0.3)), eqx.is_inexact_array
    )
    parameters = {name: jnp.asarray(value) for name, value in numbers.items()} | {
        "state": jnp.asarray(random_flow(plain, 4, modes=2, mean=(0.2, -0.1))),
        "viscosity": jnp.asarray(0.02),
        "diffusivity": jnp.asarray(0.03),
    }
    if closed:
        parameters["weights"] = weights

    def final(p, count, levels):
        solver = solver_of("spectral", grid, p["viscosity"], make(p), {"dye": p["diffusivity"]}, dealias=dealias)
        closures = (eqx.combine(p["weights"], fixed),) if closed else ()
        frames = rollout(Model(solver, ETDRK4(), 0.02, closures), State(p["state"]), 1, every=count, checkpoint_levels=levels)
        return frames.u[0]

    return parameters, final


SETTINGS = [
    (2, "linear", True, "hou_li"),
    (3, "kolmogorov", True, "two_thirds"),
    pytest.param(3, "linear", False, "hou_li", marks=pytest.mark.slow),
    (3, "isotropic", False, "two_thirds"),
]


def _normal(tree, seed):
    leaves, structure = jax.tree.flatten(tree)
    keys = jax.random.split(jax.random.key(seed), len(leaves))
    return jax.tree.unflatten(structure, [jax.random.normal(k, a.shape, a.dtype) for k, a in zip(keys, leaves, strict=True)])


def _dot(a, b):
    return sum(float(jnp.vdot(x, y)) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True))


def _norm(a):
    return _dot(a, a) ** 0.5


def _mismatches(parameters, final, count, levels):
    """|⟨Jv, w⟩ − ⟨v, Jᵀw⟩| / (|Jv| |w|) per parameter: Jv by forward mode, Jᵀw by reverse mode with each of `levels`."""
    names = sorted(parameters)  # jit hands dicts on in this order
    directions = {name: _normal(parameters[name], i) for i, name in enumerate(names)}
    w = _normal(parameters["state"], 99)

    @jax.jit
    def forwards(parameters):
        run = partial(final, count=count, levels=0)
        zero = jax.tree.map(jnp.zeros_like, parameters)
        rows = [{**zero, name: directions[name]} for name in names]
        tangents = jax.tree.map(lambda *leaves: jnp.stack(leaves), *rows)
        return jax.lax.map(lambda v: jax.jvp(run, (parameters,), (v,))[1], tangents)

    pushed = dict(zip(names, forwards(parameters), strict=True))
    out = {}
    for level in levels:
        pulled = jax.jit(lambda p, level=level: jax.vjp(partial(final, count=count, levels=level), p)[1](w)[0])(parameters)
        for name in names:
            assert _norm(pushed[name]) > 1e-6
            assert np.isfinite(_norm(pulled[name]))
            gap = abs(_dot(pushed[name], w) - _dot(directions[name], pulled[name]))
            out[level, name] = gap / (_norm(pushed[name]) * _norm(w))
    return out, pulled


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(("kind", "convection"), [
    ("spectral", ""),
    pytest.param("finite_volume", "van_leer", marks=pytest.mark.slow),
    pytest.param("finite_volume", "central", marks=pytest.mark.slow),
])  # fmt: skip
def test_adjoint_through_a_hundred_steps(kind, convection):
    parameters, final = _setting(kind, convection)
    found, _ = _mismatches(parameters, final, 100, (0, 2) if convection != "central" else (1,))
    print(kind, convection, {k: f"{v:.1e}" for k, v in found.items()})
    assert max(found.values()) <= 1e-12


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(
    ("dims", "force", "closed", "dealias"),
    [SETTINGS[2], *(pytest.param(*SETTINGS[i], marks=pytest.mark.slow) for i in (0, 1, 3))],
)
def test_adjoint_with_scalars_and_forces(dims, force, closed, dealias):
    parameters, final = _scalar_setting(dims, force, closed, dealias)
    found, _ = _mismatches(parameters, final, 20, (0, 2))
    print(dims, force, {k: f"{v:.1e}" for k, v in found.items()})
    assert len(found) == 2 * len(parameters)
    assert max(found.values()) <= 1e-12


@pytest.mark.usefixtures("x64")
def test_the_adjoint_test_can_fail():
    """A rule whose reverse mode forgets a factor is found out."""

    @jax.custom_jvp
    def odd(x):
        return jnp.sin(x)

    odd.defjvp(lambda primals, tangents: (jnp.sin(primals[0]), jnp.real(_biased(jnp.cos(primals[0]), tangents[0]))))
    parameters = {"state": jnp.linspace(0.1, 1.0, 7)}
    found, _ = _mismatches(parameters, lambda p, count, levels: odd(p["state"]), 1, (0,))
    assert found[0, "state"] > 1e-3


def _biased(slope, tangent):
    return jax.custom_derivatives.linear_call(lambda s, t: s * t, lambda s, c: 1.01 * s * c, slope, tangent)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(("kind", "convection"), [
    ("spectral", ""),
    pytest.param("finite_volume", "van_leer", marks=pytest.mark.slow),
    pytest.param("finite_volume", "central", marks=pytest.mark.slow),
])  # fmt: skip
def test_gradients_equal_central_differences_over_a_short_horizon(kind, convection):
    parameters, final = _setting(kind, convection)
    target = jnp.asarray(random_flow(solver_of(kind, square(12)), 11, modes=3))
    # kinks of the limiter: a smaller step
    worst = _against_differences(parameters, final, target, small=convection == "van_leer")
    print(kind, convection, {k: f"{v:.1e}" for k, v in worst.items()})
    assert max(worst.values()) <= 1e-8


@pytest.mark.usefixtures("x64")
@pytest.mark.slow
@pytest.mark.parametrize(("dims", "force", "closed", "dealias"), [SETTINGS[0], SETTINGS[3]])
def test_gradients_with_scalars_and_forces_equal_central_differences(dims, force, closed, dealias):
    parameters, final = _scalar_setting(dims, force, closed, dealias)
    target = 0.3 * _normal(parameters["state"], 7)
    worst = _against_differences(parameters, final, target)
    print(dims, force, {k: f"{v:.1e}" for k, v in worst.items()})
    assert max(worst.values()) <= 1e-8


def _against_differences(parameters, final, target, small=False):
    """Per parameter, the relative error of the slope of a mean square error after five steps."""
    loss = jax.jit(lambda p: jnp.mean((final(p, 5, 0) - target) ** 2))
    gradient = jax.jit(jax.grad(lambda p: jnp.mean((final(p, 5, 2) - target) ** 2)))(parameters)
    worst = {}
    for i, name in enumerate(parameters):
        direction = _normal(parameters[name], 50 + i)
        slope = _dot(gradient[name], direction)

        def difference(h, name=name, direction=direction):
            def at(step):
                return float(loss({**parameters, name: jax.tree.map(lambda p, d: p + step * d, parameters[name], direction)}))

            return (at(h) - at(-h)) / (2 * h)

        h = 1e-3 * _norm(parameters[name]) / _norm(direction)
        best = (4 * difference(h / 2) - difference(h)) / 3  # Richardson: fourth order
        if small:
            best = difference(1e-2 * h)
        worst[name] = abs(best - slope) / (abs(slope) + 1e-3 * _norm(gradient[name]) * _norm(direction))
    return worst


class Naive(Flux):
    """F = −√(∇u : ∇u) ∇u: its derivative is infinite in a uniform flow."""

    def __call__(self, view, memory=None, key=None):
        gradient = view.gradient()
        return -jnp.sqrt(jnp.sum(view.to_centre(gradient) ** 2, axis=(0, 1)))[None, None] * gradient


def _gradient_of_a_calm_flow(kind, closure, mean, **options):
    u = jnp.asarray(mean)[:, None, None] * jnp.ones((2, 8, 8))
    parameters = (u, closure, jnp.asarray(1e-3), jnp.asarray(0.1))

    @eqx.filter_jit
    def gradient(parameters):
        def loss(parameters):
            u, closure, viscosity, amplitude = parameters
            solver = solver_of(kind, square(8), viscosity, kolmogorov(amplitude), **options)
            model = Model(solver, default_stepper(kind), 0.02, () if closure is None else (closure,))
            return jnp.sum(rollout(model, State(u), 1, every=2).u ** 2)

        return eqx.filter_grad(loss)(parameters)

    return [np.asarray(a) for a in jax.tree.leaves(gradient(parameters))]


CALM = {
    "smagorinsky": Smagorinsky(jnp.asarray(0.2, jnp.float32)),
    "leith": Leith(jnp.asarray(0.2, jnp.float32)),
    "learned": learned(0, 0.1),
    "none": None,
}


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(
    ("kind", "closure"),
    [
        pytest.param(
            kind, c, id=f"{kind}-{name}", marks=[pytest.mark.slow] * (name != "none" and (kind, name) != ("spectral", "learned"))
        )
        for kind in BOTH
        for name, c in CALM.items()
    ],
)
def test_gradients_are_finite_at_rest_and_in_uniform_flow(kind, closure):
    for mean in ((0.0, 0.0), (1.0, -0.5)):
        for options in ({},) if kind == "spectral" else ({"convection": "van_leer"}, {"convection": "central"}):
            leaves = _gradient_of_a_calm_flow(kind, closure, mean, **options)
            assert len(leaves) >= 3
            assert all(np.isfinite(a).all() for a in leaves)
            assert any(a.any() for a in leaves)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(
    ("dims", "force"), [(2, "linear"), (3, "kolmogorov"), pytest.param(3, "isotropic", marks=pytest.mark.slow)]
)
def test_gradients_with_scalars_and_forces_are_finite_at_rest(dims, force):
    parameters, final = _scalar_setting(dims, force, force == "linear")
    gradient = jax.jit(jax.grad(lambda p: jnp.sum((final(p, 2, 0) - 1) ** 2)))
    for mean in (0.0, 0.7):
        leaves = jax.tree.leaves(gradient({**parameters, "state": jnp.full_like(parameters["state"], mean)}))
        assert all(np.isfinite(a).all() for a in leaves)
        assert any(a.any() for a in leaves)


@pytest.mark.usefixtures("x64")
def test_gradients_through_an_eddy_viscosity_in_3d_are_finite_at_rest():
    grid = Grid((6, 5, 4), (TWO_PI, 5.0, 4.0))

    def loss(u, cs, nu):
        model = Model(solver_of("spectral", grid, nu, kolmogorov(1.0, 0.1, 1)), ETDRK4(), 0.02, (Smagorinsky(cs),))
        return jnp.sum(rollout(model, State(u), 1, every=2).u ** 2)

    gradient = jax.jit(jax.grad(loss, argnums=(0, 1, 2)))
    for mean in (0.0, 0.7):
        leaves = gradient(jnp.full((3, *grid.shape), mean), jnp.asarray(0.2), jnp.asarray(1e-2))
        assert all(np.isfinite(a).all() for a in leaves)
        assert np.asarray(leaves[0]).any()


@pytest.mark.usefixtures("x64")
def test_the_finiteness_test_can_fail():
    assert not all(np.isfinite(a).all() for a in _gradient_of_a_calm_flow("finite_volume", Naive(), (1.0, 0.5)))


def _gradient_memory(kind, levels, closures, count=256, n=128, budget=None):
    """Bytes of temporaries of the compiled gradient through `count` steps, in float32; nothing is run."""
    solver = solver_of(kind, square(n), 1e-3, kolmogorov())
    model = Model(solver, default_stepper(kind), 0.005, closures)

    @jax.jit
    def loss(u, viscosity):
        changed = eqx.tree_at(lambda m: m.solver.equation.viscosity, model, viscosity)
        frames = rollout(changed, State(u), 1, every=count, checkpoint_levels=levels, gradient_memory=budget)
        return jnp.sum(frames.u**2)

    shape = jax.ShapeDtypeStruct((2, n, n), np.float32)
    compiled = jax.jit(jax.grad(loss, argnums=(0, 1))).lower(shape, jax.ShapeDtypeStruct((), np.float32)).compile()
    return compiled.memory_analysis().temp_size_in_bytes


@pytest.mark.parametrize("kind", ["spectral", pytest.param("finite_volume", marks=pytest.mark.slow)])
def test_memory_of_the_gradient_through_256_steps(kind):
    mebibytes = {levels: _gradient_memory(kind, levels, ()) / 2**20 for levels in (0, 2)}
    print(kind, "bare", {k: f"{v:.1f} MiB" for k, v in mebibytes.items()})
    assert mebibytes[0] < {"spectral": 380, "finite_volume": 140}[kind]
    assert mebibytes[2] < {"spectral": 5, "finite_volume": 14}[kind]


@pytest.mark.parametrize("kind", [pytest.param("spectral", marks=pytest.mark.slow), "finite_volume"])
def test_the_gradient_keeps_to_its_budget(kind):
    """One step's own backward pass comes on top."""
    step = _gradient_memory(kind, 0, (), count=1) / 2**20
    for budget in (40, 8):
        found = _gradient_memory(kind, 0, (), budget=budget) / 2**20
        print(kind, f"one step {step:.1f} MiB, budget {budget} MiB: {found:.1f} MiB")
        assert found < budget + 2 * step


@pytest.mark.slow
@pytest.mark.parametrize("kind", BOTH)
def test_memory_of_the_gradient_with_a_closure(kind):
    mebibytes = {levels: _gradient_memory(kind, levels, (learned(width=16, depth=3),)) / 2**20 for levels in (0, 1, 2, 3, 4)}
    print(kind, "with a closure", {k: f"{v:.1f} MiB" for k, v in mebibytes.items()})
    assert mebibytes[2] < mebibytes[0] / 20
    assert mebibytes[1] < mebibytes[0]
