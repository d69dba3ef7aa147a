"""Structured fluxes: no weights raise the energy in a step, the limit is the limit, and nothing else of a closure is changed."""

import dataclasses
import functools
from functools import partial

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compressible_flows import conserved, gas
from flows import TWO_PI, kolmogorov, random_flow, solver_of
from test_compressible import rough_flow

from hybridsim.check import wide_values
from hybridsim.config import blank
from hybridsim.contract import AbstractSolver, Flux, Source, View, with_constants
from hybridsim.corrections.eddy import Smagorinsky
from hybridsim.corrections.learned import LearnedFlux
from hybridsim.corrections.structure import Structured
from hybridsim.grid import Grid
from hybridsim.model import Model, State, rollout
from hybridsim.solvers.finite_volume import StaggeredFiniteVolume
from hybridsim.solvers.hosted import JaxCFDFiniteVolume, JaxCFDSpectral, JaxCFDStepper
from hybridsim.solvers.incompressible import Moving, NavierStokes
from hybridsim.solvers.kuramoto_sivashinsky import FiniteVolumeKS, KuramotoSivashinsky, SpectralKS
from hybridsim.solvers.steppers import ETDRK4, SSPRK2, SSPRK3, CrankNicolsonRK4, ForwardEuler

pytestmark = pytest.mark.usefixtures("x64")

LINE, PLANE, BOX = Grid((16,), (22.0,)), Grid((8, 6), (TWO_PI, 5.0)), Grid((6, 4, 4), (TWO_PI, 5.0, 4.0))
DYE = {"dye": 1e-3}


def between(*sides):
    return Grid((8, 6), (TWO_PI, 5.0), sides)


def through():
    """A channel: in at one end, out at the other, between a wall that moves and one that does not stick."""
    grid = between(("fixed", "outflow"), ("no_slip", "free_slip"))
    sides = {"x_lower": Moving((0.7, 0.1)), "y_lower": Moving((0.5, 0.0))}
    return StaggeredFiniteVolume(grid, NavierStokes(1e-3, None, DYE, sides))


FAMILIES = {
    "ks spectral": lambda: SpectralKS(LINE, KuramotoSivashinsky()),
    "ks spectral cut": lambda: SpectralKS(LINE, KuramotoSivashinsky(), dealias="two_thirds"),
    "ks finite volume": lambda: FiniteVolumeKS(LINE, KuramotoSivashinsky()),
    "spectral": lambda: solver_of("spectral", PLANE, scalars=DYE),
    "spectral cut": lambda: solver_of("spectral", PLANE, dealias="two_thirds"),
    "spectral 3d": lambda: solver_of("spectral", BOX, scalars=DYE),
    "finite volume": lambda: solver_of("finite_volume", PLANE, scalars=DYE),
    "finite volume 3d": lambda: solver_of("finite_volume", BOX),
    "walls": lambda: solver_of("finite_volume", between("no_slip", "periodic"), scalars=DYE),
    "cavity": lambda: solver_of("finite_volume", between("no_slip", "free_slip")),
    "channel": through,
    "hosted": lambda: JaxCFDFiniteVolume(Grid((8, 8), (TWO_PI, TWO_PI)), NavierStokes(1e-3)),
    "hosted spectral": lambda: JaxCFDSpectral(Grid((8, 8), (TWO_PI, TWO_PI)), NavierStokes(0.0), "backward_forward_euler"),
}
PERIODIC = [name for name in FAMILIES if name not in ("walls", "cavity", "channel")]


# small grids, run once: what the compiler saves at run time it would lose many times over
quickly = partial(jax.jit, compiler_options={"xla_backend_optimization_level": "0"})


@functools.cache
def prepared(family, dtype=np.float64):
    return FAMILIES[family]().prepare(dtype)


@functools.cache
def start(family, seed=0, dtype=np.float64):
    """A state of all waves of the grid, on the solver's constraints."""
    solver = prepared(family, dtype)
    u = np.random.default_rng(seed).standard_normal((len(solver.variables), *solver.grid.shape))
    return quickly(lambda u: solver.project(u))(jnp.asarray(u, dtype))


def _weights(solver):
    """1, and ½ for a face at outflow, which has half a cell to its name."""
    weights = np.ones((len(solver.variables), *solver.grid.shape))
    for axis, sides in enumerate(solver.grid.boundaries):
        if sides[1] == "outflow":
            weights[axis][(slice(None),) * axis + (-1,)] = 0.5
    return weights


def energies(solver, u):
    """Of the velocity and of every scalar: (…, block)."""
    each = (0.5 * _weights(solver) * np.asarray(u, np.float64) ** 2).sum(axis=tuple(range(-solver.grid.ndim, 0)))
    velocities = sum(v.name in "uvw" for v in solver.variables)
    return np.concatenate([each[..., :velocities].sum(axis=-1, keepdims=True), each[..., velocities:]], axis=-1)


class Given(Flux):
    """F = what it is given."""

    value: jax.Array

    def __call__(self, view, memory=None, key=None):
        return self.value


def _step(solver, u, dt, closures, stepper=None, evaluate="step", substeps=1):
    """One model step."""
    model = Model(solver, stepper or (JaxCFDStepper() if solver.hosted else ForwardEuler()), dt, closures, evaluate, substeps)
    z, _, _ = model(solver.encode(u), model.init_carry(u), jnp.zeros((), jnp.int32))
    return solver.decode(z)


def rate(solver, flux, u=None):
    """R F: what a flux adds to a forward Euler step of length 1, from two whole steps."""
    u = jnp.zeros(flux.shape[1:], flux.dtype) if u is None else u
    return _step(solver, u, 1.0, (Given(flux),)) - _step(solver, u, 1.0, ())


def alone(solver):
    """The same solver without anything that moves the flow but closures."""
    kind = type(solver)

    class Alone(kind):
        def explicit(self, z, t, tendency):
            still, extra = jax.tree.map(jnp.zeros_like, z), tendency(z, t)
            return still if extra is None else still | {name: still[name] + part for name, part in extra.items()}

        def linear(self):
            symbol = kind.linear(self)
            return None if symbol is None else jax.tree.map(np.zeros_like, symbol)

    return Alone(**{f.name: getattr(solver, f.name) for f in dataclasses.fields(solver)})


def view_of(solver, u, dt=0.1, held=1):
    return View(u, jnp.zeros((), u.dtype), jnp.asarray(dt, u.dtype), solver, held)


def drawn(closure, seed, std):
    """The closure with every weight drawn anew from N(0, std²)."""
    rng = np.random.default_rng(seed)
    draw = lambda a: jnp.asarray(std * rng.standard_normal(a.shape), a.dtype) if eqx.is_inexact_array(a) else a  # noqa: E731
    return jax.tree.map(draw, closure)


def network(solver, seed=0, std=None, dtype=np.float64, **options):
    """A small `LearnedFlux` with weights of that spread; without one its last layer is zero, as where training starts."""
    options = {"symmetric": False} | options
    key = jax.random.key(0)
    made = blank(lambda: LearnedFlux(solver.grid.ndim, 4, 1, variables=solver.variables, key=key, **options))
    made = drawn(jax.tree.map(lambda a: a.astype(dtype) if eqx.is_inexact_array(a) else a, made), seed, std or 0.3)
    if std is not None:
        return made
    return eqx.tree_at(lambda m: m.network.layers[-1], made, replace_fn=lambda layer: jax.tree.map(jnp.zeros_like, layer))


def loosened(closure, c):
    """The same structure with a c beyond what its constructor takes."""
    object.__setattr__(closure, "c", c)
    return closure


# --- what the solvers say of themselves ------------------------------------------------------------------------------------------


SELDOM = ("ks spectral cut", "spectral cut", "cavity", "spectral 3d", "finite volume 3d", "hosted spectral")


@pytest.mark.parametrize("family", [pytest.param(f, marks=[pytest.mark.slow] * (f in SELDOM)) for f in FAMILIES])
def test_solvers_know_the_adjoint_of_what_they_make_of_a_flux_and_its_size(family):
    """Against R itself, column by column, from whole steps; the energy has half a cell at outflow."""
    solver = prepared(family)
    u = start(family)
    shape = (solver.grid.ndim, *u.shape)

    @quickly
    def found(flux):
        one = lambda flux: _step(solver, jnp.zeros_like(u), 1.0, (Given(flux.reshape(shape)),)).ravel()  # noqa: E731
        general = AbstractSolver.adjoint_gradient(solver, u) if family in PERIODIC[:-2] else u
        return jax.vmap(one)(flux) - one(flux[0] * 0)[None], solver.adjoint_gradient(u), general

    response, slope, general = (np.asarray(a) for a in found(jnp.eye(int(np.prod(shape)))))
    homogeneous = np.asarray(u)
    if family == "channel":
        homogeneous = homogeneous - np.asarray(solver.project(jnp.zeros_like(u)))
    weighted = (_weights(solver) * homogeneous).ravel()
    np.testing.assert_allclose(slope.ravel(), response @ weighted, rtol=0, atol=1e-12)
    assert np.abs(slope).max() > 0.3
    if family in PERIODIC[:-2]:
        np.testing.assert_allclose(general, slope, rtol=0, atol=1e-12)
    largest = np.linalg.norm(response * np.sqrt(np.broadcast_to(_weights(solver), u.shape)).ravel(), 2) ** 2
    print(family, largest / solver.flux_response)
    assert 0.6 * solver.flux_response <= largest <= solver.flux_response * (1 + 1e-12)
    # what stands for solvers that say nothing is no less
    assert solver.flux_response <= AbstractSolver.flux_response.fget(solver) * (1 + 1e-12)


def test_a_gas_knows_it_too():
    for sides in ("periodic", "reflecting"):
        solver = gas(Grid((6, 5), (1.0, 0.9), (sides, "periodic")))
        q = np.random.default_rng(0).standard_normal((1, 6, 5))
        response = jax.vmap(lambda f, s=solver: _outflow(s, f.reshape(2, 1, 6, 5)).ravel())(jnp.eye(60))
        np.testing.assert_allclose(solver.adjoint_gradient(jnp.asarray(q)).ravel(), response @ q.ravel(), rtol=0, atol=1e-13)
        assert 0.6 * solver.flux_response <= np.linalg.norm(response, 2) ** 2 <= solver.flux_response


# --- energy ----------------------------------------------------------------------------------------------------------------------


def change(solver, make, u, dt, seeds, stepper=None, evaluate="step", substeps=1, spread=(-1, 2)):
    """(E₁ − E₀)/E₀ of every block after a model step with the closure alone, for weights with a std of 0.1 to 100; and u₁ − u₀."""
    closures = [make(std, seed) for seed, std in enumerate(10 ** np.linspace(*spread, seeds))]
    arrays, fixed = zip(*(eqx.partition(c, eqx.is_array) for c in closures), strict=True)
    stacked = jax.tree.map(lambda *a: jnp.stack(a), *arrays)
    solver = alone(solver)

    @quickly
    @jax.vmap
    def step(arrays):
        return _step(solver, u, dt, (eqx.combine(arrays, fixed[0]),), stepper, evaluate, substeps)

    after, before = np.asarray(step(stacked), np.float64), np.asarray(u, np.float64)
    return energies(solver, after) / energies(solver, before) - 1, after - before


ROUNDING = {np.float64: 1e-13, np.float32: 3e-6}


@pytest.mark.parametrize(("family", "form", "dtype", "seeds"), [
    ("ks spectral", "pointwise", np.float32, 16),
    ("ks finite volume", "average", np.float64, 16),
    ("spectral", "pointwise", np.float64, 16),
    ("spectral 3d", "average", np.float32, 6),
    ("finite volume", "pointwise", np.float32, 16),
    ("channel", "average", np.float64, 16),
    *(
        pytest.param(family, form, dtype, 50, marks=pytest.mark.slow)
        for family in FAMILIES if "hosted" not in family
        for form in ("pointwise", "average")
        for dtype in (np.float64, np.float32)
    ),
])  # fmt: skip
def test_no_weights_raise_the_energy(family, form, dtype, seeds):
    solver = prepared(family, dtype)
    u = start(family, 0, dtype)
    make = lambda std, seed: Structured(network(solver, seed, std, dtype), form, 1.0)  # noqa: E731
    rises, moved = change(solver, make, u, 0.1, seeds)
    print(family, form, dtype.__name__, "largest rise", rises.max(axis=0), "largest fall", rises.min(axis=0))
    assert np.isfinite(rises).all()
    assert rises.max() <= ROUNDING[dtype]
    assert (rises.min(axis=0) < -1e-3).all()
    space = tuple(range(2, moved.ndim))
    kept = [solver.variables.index(v) for v in solver.variables if v.name in solver.conserved]
    assert np.abs(moved.sum(axis=space))[:, kept].max(initial=0) <= 10 * ROUNDING[dtype] * np.abs(np.asarray(u)).sum()


@pytest.mark.parametrize("family", ["ks spectral", "finite volume"])
def test_the_same_weights_without_structure_do(family):
    """The negative control."""
    solver = prepared(family)
    rises, _ = change(solver, lambda std, seed: network(solver, seed, std), start(family), 0.1, 8)
    assert (rises.max(axis=0) > 1).all()


@pytest.mark.parametrize(("family", "stepper", "evaluate", "substeps"), [
    ("ks spectral", ETDRK4(), "step", 1),
    pytest.param("spectral cut", CrankNicolsonRK4(), 3, 3, marks=pytest.mark.slow),
    ("finite volume", SSPRK3(), 4, 4),
    ("finite volume", SSPRK3(), "stage", 1),
    pytest.param("walls", SSPRK2(), "stage", 2, marks=pytest.mark.slow),
    pytest.param("spectral", SSPRK2(), "stage", 1, marks=pytest.mark.slow),
    pytest.param("ks finite volume", SSPRK3(), "stage", 1, marks=pytest.mark.slow),
    pytest.param("channel", ForwardEuler(), 5, 5, marks=pytest.mark.slow),
])  # fmt: skip
def test_whole_steps_do_not_raise_it_either(family, stepper, evaluate, substeps):
    solver = prepared(family)
    make = lambda std, seed: Structured(network(solver, seed, std), "pointwise", 1.0)  # noqa: E731
    rises, _ = change(solver, make, start(family), 0.1, 12, stepper, evaluate, substeps)
    print(family, type(stepper).__name__, evaluate, rises.max(axis=0), rises.min(axis=0))
    assert rises.max() <= 1e-13
    assert (rises.min(axis=0) < -1e-3).all()


@functools.cache
def shortest_wave(family):
    """u for which |Rᵀu| is as large as it gets, and R Rᵀ u."""
    solver, begin = prepared(family), start(family)

    @quickly
    def found(u):
        gram = lambda u: rate(solver, solver.adjoint_gradient(u))  # noqa: E731
        u = jax.lax.fori_loop(0, 500, lambda _, u: gram(u) / jnp.linalg.norm(gram(u)), u)
        return u, gram(u)

    return found(begin)


@pytest.mark.parametrize("form", ["pointwise", "average"])
@pytest.mark.parametrize("family", ["ks finite volume", pytest.param("spectral", marks=pytest.mark.slow), "finite volume"])
def test_the_limit_is_the_diffusive_one(family, form):
    """At c = 1 the largest eddy viscosity turns the shortest wave over, and with more the energy rises."""
    solver = prepared(family)
    u, response = shortest_wave(family)
    np.testing.assert_allclose(response, solver.flux_response * u, atol=1e-5 * solver.flux_response)

    @quickly
    def ends(u):
        slope = solver.adjoint_gradient(u)
        fluxes = []
        for c in (1.0, 0.5, 4.0):
            closure = Structured(Given(-1e3 * slope), form, 1.0)
            fluxes.append(loosened(closure, c)(view_of(solver, u)))
        return [u + 0.1 * rate(solver, flux) for flux in fluxes], -fluxes[1], slope

    (turned, gone, beyond), half, slope = ends(u)
    np.testing.assert_allclose(turned, -u, atol=1e-5)
    np.testing.assert_allclose(gone, 0, atol=1e-5)
    assert energies(solver, beyond).sum() > 10 * energies(solver, u).sum()
    if family == "finite volume":
        h = np.array(solver.grid.spacing)
        np.testing.assert_allclose(half[:, :2], 0.5 * 2 / (0.1 * 4 * (1 / h**2).sum()) * slope[:, :2], rtol=1e-6, atol=1e-9)


def test_the_time_for_which_a_flux_acts_counts():
    """Held for four steps it may be a fourth; a closure that does not know of it raises the energy."""
    solver = prepared("finite volume")
    u, _ = shortest_wave("finite volume")

    @quickly
    def found(u):
        eddy = Given(-1e3 * solver.adjoint_gradient(u))
        once, four = (Structured(eddy, "average", 1.0)(view_of(solver, u, held=n)) for n in (1, 4))
        closures = [loosened(Structured(eddy, "average", 1.0), c) for c in (1.0, 4.0)]
        return once, four, [_step(alone(solver), u, 0.1, (closure,), None, 4, 4) for closure in closures]

    once, four, ends = found(u)
    np.testing.assert_allclose(once, 4 * four, rtol=1e-12)
    within, beyond = (energies(solver, q).sum() / energies(solver, u).sum() for q in ends)
    assert within <= 1 + 1e-9
    assert beyond > 10


class Seen(Flux):
    """F = 0; remembers in a list what it was shown."""

    views: list

    def __call__(self, view, memory=None, key=None):
        self.views.append((view.held, float(view.dt)))
        return jnp.zeros((view.grid.ndim, *view.u.shape), view.u.dtype)


@pytest.mark.parametrize(("evaluate", "held", "calls"), [("stage", 1, 6), ("step", 1, 2), (2, 2, 1)])
def test_closures_are_told_for_how_long_they_act(evaluate, held, calls):
    seen = Seen([])
    with jax.disable_jit():
        _step(prepared("ks finite volume"), start("ks finite volume"), 0.01, (seen,), SSPRK3(), evaluate, 2)
    assert seen.views == [(held, 0.01)] * calls


@pytest.mark.parametrize("family", ["finite volume", pytest.param("spectral 3d", marks=pytest.mark.slow)])
@pytest.mark.parametrize("form", ["pointwise", "average"])
def test_beside_a_whole_solver_it_adds_no_more_than_the_step_may_by_itself(family, form):
    """½|u₁|² ≤ ½|u|² + Δt u·N + Δt² |N|² for forward Euler steps with c = ½, whatever N does."""
    dt, solver = 0.05, prepared(family)
    weights, fixed = eqx.partition(network(solver), eqx.is_inexact_array)

    @quickly
    def found(weights, u):
        closure = eqx.combine(weights, fixed)
        return [_step(solver, u, dt, closures) for closures in ((), (Structured(closure, form),), (closure,))]

    worst, wild = [], []
    for seed, std in enumerate((0.1, 1.0, 10.0, 100.0)):
        u = start(family, seed)
        bare, ahead, raw = (np.asarray(q) for q in found(drawn(weights, seed, std), u))
        added = bare - np.asarray(u)  # Δt N
        e = partial(energies, solver)
        bound = e(u) + (e(u + added) - e(u - added)) / 2 + 2 * e(added)
        worst.append((e(ahead) / bound).max())
        wild.append((e(raw) / bound).max())
    print(family, form, worst, "raw", wild)
    assert max(worst) <= 1 + 1e-12
    assert max(wild) > 100  # negative control


@pytest.mark.parametrize(
    ("family", "form"), [("finite volume", "pointwise"), pytest.param("ks spectral", "average", marks=pytest.mark.slow)]
)
def test_a_run_with_huge_weights_stays_bounded(family, form):
    """In single precision, where the same network alone ends it."""
    dtype, dt = np.float32, 0.02
    if family == "finite volume":
        solver = solver_of("finite_volume", PLANE, 1e-2, kolmogorov(1.0, 0.1, 1)).prepare(dtype)
        u = jnp.asarray(random_flow(solver, 0, modes=1, dtype=dtype))
    else:
        solver = prepared(family, dtype)
        u = jnp.asarray(np.cos(TWO_PI / 22 * 2 * solver.grid.mesh()[0])[None], dtype)
    stepper = SSPRK3() if family == "finite volume" else ETDRK4()
    run = lambda closures: rollout(Model(solver, stepper, dt, closures), State(u), 20, every=25).u  # noqa: E731
    closure = network(solver, 1, 100.0, dtype)
    kept, raw, bare = (np.asarray(run(c), np.float64) for c in ((Structured(closure, form),), (closure,), ()))
    print(family, form, [np.abs(q[-1]).max() for q in (kept, raw, bare)])
    assert np.isfinite(kept).all()
    assert np.abs(kept).max() < 2 * np.abs(bare).max()
    assert np.abs(kept[-1] - bare[-1]).max() > 1e-2
    assert not np.isfinite(raw).all()


# --- a gas -----------------------------------------------------------------------------------------------------------------------


def kinetic(solver, u):
    """½Σ|ρv|²/ρ, and ½Σ(ρc)²/ρ of every scalar."""
    d, u = solver.grid.ndim, np.asarray(u, np.float64)
    squares = np.concatenate([(u[1 : d + 1] ** 2).sum(axis=0)[None], u[d + 2 :] ** 2]) / u[0]
    return 0.5 * squares.reshape(len(squares), -1).sum(axis=1)


@pytest.mark.parametrize(("sides", "form", "dtype"), [
    ("periodic", "pointwise", np.float64),
    ("reflecting", "average", np.float64),
    pytest.param("periodic", "average", np.float32, marks=pytest.mark.slow),
    pytest.param("reflecting", "pointwise", np.float64, marks=pytest.mark.slow),
])  # fmt: skip
def test_no_weights_raise_the_kinetic_energy_of_a_gas(sides, form, dtype):
    solver = gas(Grid((8, 6), (1.0, 0.9), (sides, "periodic")), scalars={"dye": 0.0}, positivity=False)
    u = jnp.asarray(rough_flow(solver.grid, 4, scalars=1), dtype)
    dt, before = 1e-2, kinetic(solver, u)
    weights, fixed = eqx.partition(network(solver, 0, None, dtype), eqx.is_inexact_array)
    many = [drawn(weights, seed, std) for seed, std in enumerate(10 ** np.linspace(-1, 2, 8))]

    @quickly
    @jax.vmap
    def added(weights):
        closure, view = eqx.combine(weights, fixed), view_of(solver, u, dt)
        fluxes = Structured(closure, form, 1.0)(view), closure(view)
        return fluxes[0], *(dt * _outflow(solver, flux) for flux in fluxes)

    # Density and pressure may become anything here: what a closure adds is looked at by itself.
    fluxes, kept, raw = (np.array(a, np.float64) for a in added(jax.tree.map(lambda *a: jnp.stack(a), *many)))
    assert not fluxes[:, :, 0].any()
    falls = np.array([kinetic(solver, np.asarray(u, np.float64) + change) for change in kept]) / before - 1
    raw[:, 0] = 0
    rises = np.array([kinetic(solver, np.asarray(u, np.float64) + change) for change in raw]) / before - 1
    print(sides, form, falls.max(axis=0), falls.min(axis=0), "raw", rises.max(axis=0))
    assert falls.max() <= ROUNDING[dtype]
    assert (falls.min(axis=0) < -1e-3).all()
    assert (rises.max(axis=0) > 0.1).all()  # negative control
    sums = np.abs(kept.reshape(*kept.shape[:2], -1).sum(axis=2)) / np.abs(kept).sum()
    assert sums.max() <= ROUNDING[dtype]


def _outflow(solver, flux):
    """−∇·F with nothing through sides."""
    total = jnp.zeros_like(flux[0])
    for a, h in enumerate(solver.grid.spacing):
        f = flux[a]
        if not solver.grid.periodic[a]:
            f = f.at[(slice(None),) * (a + 1) + (-1,)].set(0)
        total = total - (f - jnp.roll(f, 1, a + 1)) / h
    return total


def test_a_flux_of_a_gas_is_unfolded_and_folded_up_again():
    """Without a structure to enforce nothing changes but the mass flux; what a step adds to kinetic energy it takes from heat."""
    solver = gas(PLANE, 1.4, scalars={"dye": 0.0})
    w = np.stack(np.broadcast_arrays(0.8, 0.5, -0.3, 1.0, 0.2, np.ones(PLANE.shape))[:5])
    u = jnp.asarray(conserved(w, 1.4, 2))
    rng = np.random.default_rng(0)
    heat, mass = (jnp.asarray(rng.standard_normal((2, *PLANE.shape))) for _ in range(2))
    v, zero = jnp.asarray([0.5, -0.3]), jnp.zeros_like(heat)
    # an observer who moves with the gas sees mass and heat flow, and no stress
    rows = [mass, mass * v[0], mass * v[1], heat + 0.5 * mass * jnp.sum(v * v), 0.2 * mass]
    found = quickly(lambda flux, u: Structured(Given(flux))(view_of(solver, u)))(jnp.stack(rows, axis=1), u)
    np.testing.assert_allclose(found, jnp.stack([zero, zero, zero, heat, zero], axis=1), atol=1e-14)


def test_smagorinskys_stress_in_a_gas_is_left_alone():
    solver = gas(PLANE, 1.4)
    u = jnp.asarray(rough_flow(PLANE, 2))
    closures = Smagorinsky(0.1), Structured(Smagorinsky(0.1), "average")
    raw, kept = quickly(lambda u: [c(view_of(solver, u, 1e-4)) for c in closures])(u)
    np.testing.assert_allclose(raw, kept, rtol=0, atol=1e-15)
    assert np.abs(raw[:, 1:]).max() > 1e-4


# --- what it leaves alone --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("form", "dtype"), [
    ("pointwise", np.float32),
    pytest.param("average", np.float64, marks=pytest.mark.slow),
])  # fmt: skip
def test_an_untrained_network_stays_the_bare_solver(form, dtype):
    for family in ("ks finite volume", "spectral", "walls"):
        solver = prepared(family, dtype)
        weights, fixed = eqx.partition(network(solver, 0, None, dtype), eqx.is_inexact_array)
        output = quickly(lambda w, u, s=solver, fixed=fixed: Structured(eqx.combine(w, fixed), form)(view_of(s, u)))
        untrained, trained = (output(w, start(family, 0, dtype)) for w in (weights, drawn(weights, 0, 0.1)))
        assert untrained.dtype == dtype
        assert not np.asarray(untrained).any()
        assert np.asarray(trained).any()
    solver = gas(Grid((8, 6), (1.0, 0.9)), scalars={"dye": 0.0})
    u = jnp.asarray(rough_flow(solver.grid, 4, scalars=1), dtype)
    untrained = Structured(network(solver, 0, None, dtype), form)
    assert not np.asarray(quickly(lambda u: untrained(view_of(solver, u)))(u)).any()


@pytest.mark.parametrize("family", ["spectral", "finite volume"])
def test_what_is_dissipative_already_stays_to_the_last_bit(family):
    solver = prepared(family)
    u = random_flow(solver, 2, modes=1)

    @quickly
    def found(u):
        view = view_of(solver, u, 0.01)
        raw = Smagorinsky(0.2)(view), -1e-2 * view.adjoint_gradient()
        return raw, [Structured(Given(flux), form)(view) for flux, form in zip(raw, ("average", "pointwise"), strict=True)]

    for raw, kept in zip(*found(jnp.asarray(u)), strict=True):
        np.testing.assert_array_equal(raw, kept)
        assert np.abs(np.asarray(raw)).max() > 1e-4


def test_the_nearest_point_is_the_nearest():
    """Against a search: no other point of the ball is closer to the raw flux."""
    solver = prepared("finite volume")
    u, rng = start("finite volume"), np.random.default_rng(5)
    raw = jnp.asarray(rng.standard_normal((2, 3, *PLANE.shape)))
    forms = {"pointwise": (0, 1), "average": (0, 1, 2, 3)}
    bounded = quickly(lambda u: [Structured(Given(raw), form)(view_of(solver, u)) for form in forms])(u)
    slope = np.asarray(solver.adjoint_gradient(u))
    viscosity = 1.0 / (0.1 * solver.flux_response)
    for kept, axes in zip(map(np.asarray, bounded), forms.values(), strict=True):
        norm = lambda q, axes=axes: np.sqrt((q**2).sum(axis=axes, keepdims=True))  # noqa: E731
        for block in ([0, 1], [2]):
            h, f, best = slope[:, block], np.asarray(raw)[:, block], kept[:, block]
            centre, radius = -0.5 * viscosity * h, 0.5 * viscosity * norm(h)
            assert (norm(best - centre) <= radius * (1 + 1e-12)).all()
            for _ in range(50):
                other = rng.standard_normal(f.shape)
                other = centre + radius * other / norm(other) * rng.uniform(0, 1)
                assert (norm(f - best) <= norm(f - other) + 1e-12).all()


@pytest.mark.parametrize("family", ["walls", "channel"])
def test_dead_values_change_nothing(family):
    solver = prepared(family)
    raw = np.random.default_rng(2).standard_normal((2, 3, *PLANE.shape))
    soiled = raw.copy()
    for a in range(2):
        if not solver.grid.periodic[a]:
            for c in range(3):
                if c != a:
                    soiled[a, c][(slice(None),) * a + (-1,)] = 1e6
    moved = quickly(
        lambda flux, u: [rate(solver, Structured(Given(flux), form)(view_of(solver, u)), u) for form in ("pointwise", "average")]
    )
    for clean, dirty in zip(*(moved(jnp.asarray(f), start(family)) for f in (raw, soiled)), strict=True):
        np.testing.assert_array_equal(clean, dirty)
        assert np.abs(np.asarray(clean)).max() > 1e-3


@pytest.mark.parametrize("form", ["pointwise", "average"])
def test_overflow_and_nan_give_a_bounded_flux(form):
    solver, u = prepared("finite volume", np.float32), start("finite volume", 0, np.float32)
    raw = np.random.default_rng(3).standard_normal((2, 3, *PLANE.shape)).astype(np.float32)
    raw[0, 0, 2, 3], raw[1, 0, 2, 4], raw[0, 1, 5, 1], raw[1, 2, 1, 1] = np.nan, np.inf, -np.inf, 3e38

    @quickly
    def found(raw, u):
        flux = Structured(Given(raw), form, 1.0)(view_of(solver, u))
        return flux, _step(alone(solver), u, 0.1, (Given(flux),)), solver.adjoint_gradient(u)

    flux, after, slope = (np.asarray(a, np.float64) for a in found(jnp.asarray(raw), u))
    assert np.isfinite(flux).all()
    assert np.linalg.norm(flux) <= 2 / (0.1 * solver.flux_response) * np.linalg.norm(slope)
    assert (energies(solver, after) <= energies(solver, u) * (1 + 1e-6)).all()


# --- gradients -------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("family", "form"), [
    ("ks spectral", "average"),
    ("spectral", "pointwise"),
    ("walls", "average"),
    pytest.param("gas", "pointwise", marks=pytest.mark.slow),
    pytest.param("finite volume 3d", "pointwise", marks=pytest.mark.slow),
    pytest.param("channel", "pointwise", marks=pytest.mark.slow),
    pytest.param("spectral 3d", "average", marks=pytest.mark.slow),
])  # fmt: skip
def test_gradients_are_adjoint_and_right(family, form):
    """⟨Jv, w⟩ = ⟨v, Jᵀw⟩ in state, weights and time step, and Jv is what differences give."""
    solver = gas(PLANE, scalars={"dye": 0.0}) if family == "gas" else prepared(family)
    u = jnp.asarray(rough_flow(PLANE, 4, scalars=1)) if family == "gas" else start(family, 3)
    weights, fixed = eqx.partition(network(solver, 2, 0.5), eqx.is_inexact_array)
    at = {"u": u, "weights": weights, "dt": jnp.asarray(0.1)}

    def out(p):
        return Structured(eqx.combine(p["weights"], fixed), form)(view_of(solver, p["u"], p["dt"]))

    v = drawn(at, 1, 1.0)
    w = jnp.asarray(np.random.default_rng(2).standard_normal((solver.grid.ndim, *u.shape)))

    @quickly
    def both(at, v, w):
        value, pushed = jax.jvp(out, (at,), (v,))
        raw = eqx.combine(at["weights"], fixed)(view_of(solver, at["u"]))
        return value, raw, pushed, jax.vjp(out, at)[1](w)[0]

    value, raw, pushed, pulled = both(at, v, w)
    dot = lambda a, b: sum(float(jnp.vdot(x, y)) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True))  # noqa: E731
    size = dot(pushed, pushed) ** 0.5
    assert size > 1e-3
    assert abs(dot(pushed, w) - dot(v, pulled)) <= 1e-12 * size * dot(w, w) ** 0.5
    h, shifted = 1e-6, quickly(lambda s: out(jax.tree.map(lambda a, b: a + s * b, at, v)))
    np.testing.assert_allclose((shifted(h) - shifted(-h)) / (2 * h), pushed, rtol=0, atol=1e-5 * np.abs(pushed).max())
    assert np.abs(np.asarray(value) - np.asarray(raw)).max() > 1e-2  # the structure had something to do


@pytest.mark.parametrize(("family", "form"), [
    ("spectral", "pointwise"),
    ("gas", "average"),
    *(
        pytest.param(family, form, marks=pytest.mark.slow)
        for family in ("ks spectral", "spectral", "walls", "gas")
        for form in ("pointwise", "average")
        if (family, form) not in (("spectral", "pointwise"), ("gas", "average"))
    ),
])  # fmt: skip
def test_gradients_are_finite_at_rest_and_in_uniform_flow(family, form):
    """With the weights that a network starts with, where the flux is zero and on the sphere, and with others."""
    solver = gas(PLANE, scalars={"dye": 0.0}) if family == "gas" else prepared(family)
    weights, fixed = eqx.partition(network(solver, 2), eqx.is_inexact_array)

    @quickly
    def gradients(weights, u):
        total = lambda w, q: jnp.sum(Structured(eqx.combine(w, fixed), form)(view_of(solver, q)))  # noqa: E731
        return jax.grad(total, argnums=(0, 1))(weights, u)

    calm = jnp.ones((len(solver.variables), *solver.grid.shape))
    flows = [0.3 * calm, rough_flow(PLANE, 4, scalars=1)] if family == "gas" else [0 * calm, 0.3 * calm, start(family)]
    for u in flows:
        for w in (weights, drawn(weights, 0, 1.0)):
            leaves = jax.tree.leaves(gradients(w, jnp.asarray(u)))
            assert all(np.isfinite(a).all() for a in leaves)
    assert any(a.any() for a in leaves)


def test_an_untrained_network_can_start_to_learn():
    """At zero weights the slope is not zero, and training on what a viscosity does lowers the loss."""
    solver = prepared("finite volume")
    viscous = solver_of("finite_volume", PLANE, 0.05, scalars={"dye": 0.05}).prepare(np.float64)
    u = jnp.asarray(random_flow(solver, 1, modes=1))
    target = quickly(lambda u: _step(viscous, u, 0.02, ()))(u)
    weights, fixed = eqx.partition(network(solver, 2, inputs="gradient"), eqx.is_inexact_array)

    @quickly
    def slope_of(weights):
        def loss(weights):
            return jnp.mean((_step(solver, u, 0.02, (Structured(eqx.combine(weights, fixed)),)) - target) ** 2)

        return jax.value_and_grad(loss)(weights)

    losses = []
    for _ in range(60):
        value, slope = slope_of(weights)
        losses.append(float(value))
        size = sum(float(jnp.sum(a * a)) for a in jax.tree.leaves(slope)) ** 0.5
        assert size > 0
        weights = jax.tree.map(lambda w, g, size=size: w - 0.03 * g / size, weights, slope)
    print("loss", losses[0], min(losses))
    assert min(losses) < 0.5 * losses[0]


# --- memory, noise, precision, refusals ------------------------------------------------------------------------------------------


class Wandering(Flux):
    """F = noise about a running mean: memory and random numbers at once."""

    stochastic = True

    def init_memory(self, view):
        return jnp.zeros((view.grid.ndim, *view.u.shape), view.u.dtype)

    def __call__(self, view, memory=None, key=None):
        new = 0.9 * memory + jax.random.normal(key, memory.shape, memory.dtype)
        return new, new


class Noise(Flux):
    """F = noise."""

    stochastic = True

    def __call__(self, view, memory=None, key=None):
        return jax.random.normal(key, (view.grid.ndim, *view.u.shape), view.u.dtype)


def test_memory_and_random_numbers_pass_through():
    solver = alone(prepared("finite volume"))
    u = start("finite volume")
    for closure in (Wandering(), Noise()):
        carries, ends = [], []
        for each in (closure, Structured(closure)):
            model = Model(solver, SSPRK2(), 0.1, (each,), 2, 4)
            step = quickly(lambda u, model=model: model(solver.encode(u), model.init_carry(u, 3), jnp.zeros((), jnp.int32))[:2])
            z, carry = step(u)
            carries.append(carry["closures"][0])
            ends.append(np.asarray(solver.decode(z)))
        raw, kept = carries
        assert raw.keys() == kept.keys()
        np.testing.assert_array_equal(jax.random.key_data(raw["key"]), jax.random.key_data(kept["key"]))
        if "memory" in raw:
            np.testing.assert_array_equal(raw["memory"], kept["memory"])
            assert np.asarray(raw["memory"]).any()
        before, raw_after, kept_after = (energies(solver, q) for q in (u, *ends))
        assert (kept_after < before).all()
        assert (raw_after > before).all()


@pytest.mark.parametrize(
    "family", ["ks spectral", "ks finite volume", "spectral", "spectral 3d", "finite volume", "channel", "gas"]
)
def test_no_double_precision_in_a_single_precision_step(family):
    solver = gas(PLANE, scalars={"dye": 0.0}) if family == "gas" else FAMILIES[family]()
    shape = jax.ShapeDtypeStruct((len(solver.variables), *solver.grid.shape), np.float32)
    ready = eqx.filter_eval_shape(solver.prepare, np.float32)
    for form in ("pointwise", "average"):
        closure = Structured(network(solver, 0, None, np.float32), form)
        jaxpr, out, _ = eqx.filter_make_jaxpr(lambda solver, u, dt, c=closure: c(View(u, dt, dt, solver)))(
            ready, shape, jax.ShapeDtypeStruct((), np.float32)
        )
        assert out.dtype == np.float32
        assert wide_values(jaxpr) == set()


class Push(Source):
    """s = 1."""

    def __call__(self, view, memory=None, key=None):
        return jnp.ones_like(view.u)


def test_what_has_no_structure_is_refused():
    with pytest.raises(ValueError, match="structure: Push is a Source closure, and only Flux closures can have one"):
        Structured(Push())  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match=r"structure\.form: possible are pointwise, average; found 'skew'"):
        Structured(Smagorinsky(), "skew")  # pyright: ignore[reportArgumentType]
    for c in (0.0, 1.5, float("nan")):
        with pytest.raises(ValueError, match=r"structure\.c: needs a number > 0 and ≤ 1, found"):
            Structured(Smagorinsky(), c=c)
    solver = prepared("spectral")
    model = Model(solver, ETDRK4(), 0.1, (Structured(Given(jnp.zeros((2, 2, 8, 6)))),))
    with pytest.raises(ValueError, match=r"corrections\[0\]: Structured must return shape \(2, 3, 8, 6\), found \(2, 2, 8, 6\)"):
        model.try_closures(start("spectral"))


def test_constants_inside_a_structure_are_trained():
    closure = with_constants(Structured(Smagorinsky(0.2)), jnp.float32)
    assert isinstance(closure, Structured)
    assert [(a.shape, float(a)) for a in jax.tree.leaves(eqx.filter(closure, eqx.is_inexact_array))] == [((), np.float32(0.2))]
