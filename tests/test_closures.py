"""Closures at their places: a zero one changes nothing, one file serves both solvers, classical ones and consistency are exact."""

from contextlib import nullcontext

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flows import (
    BOTH,
    TWO_PI,
    cube,
    default_stepper,
    evolve,
    kolmogorov,
    learned,
    random_flow,
    randomised,
    relative,
    sample,
    solver_of,
    square,
    steps,
)

from hybridsim.contract import Flux, PostStep, Replacement, Source, View, place_of
from hybridsim.corrections.eddy import Hyperviscosity, Leith, Smagorinsky, filter_width
from hybridsim.corrections.learned import LearnedCorrection, LearnedFlux, LearnedSource, LearnedStep
from hybridsim.grid import Grid
from hybridsim.model import Model, State, rollout
from hybridsim.solvers.kuramoto_sivashinsky import FiniteVolumeKS, KuramotoSivashinsky, SpectralKS
from hybridsim.solvers.steppers import ETDRK4, SSPRK2, SSPRK3, CrankNicolsonRK4
from hybridsim.train import How, window_loss

pytestmark = pytest.mark.usefixtures("x64")


class Mine(Flux):
    """F = −ν ∂_a u_c: ten lines of a user's own."""

    viscosity: float = 0.05

    def __call__(self, view, memory=None, key=None):
        return -self.viscosity * view.gradient()


class Damp(Source):
    """s = −r u."""

    rate: float = 0.5

    def __call__(self, view, memory=None, key=None):
        return -self.rate * view.u


class Shrink(PostStep):
    """d = −r Δt u."""

    rate: float = 0.5

    def __call__(self, view, memory=None, key=None):
        return -self.rate * view.dt * view.u


def _view(solver, u, dt=0.01):
    u = jnp.asarray(u)
    return View(u, jnp.zeros((), u.dtype), jnp.asarray(dt, u.dtype), solver.prepare(u.dtype))


# --- no closure is no closure ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "stepper", "when", "dtype"), [
    ("spectral", ETDRK4(), "step", np.float32),
    ("spectral", ETDRK4(), "stage", np.float64),
    ("spectral", CrankNicolsonRK4(), "stage", np.float32),
    ("finite_volume", SSPRK3(), "step", np.float64),
    ("finite_volume", SSPRK3(), "stage", np.float32),
])  # fmt: skip
def test_a_zero_initialised_closure_is_the_bare_solver(kind, stepper, when, dtype):
    solver = solver_of(kind, square(16), 1e-3, kolmogorov())
    u = random_flow(solver, 1, mean=(0.3, -0.2), dtype=dtype)
    closure = learned(5)
    assert not np.asarray(closure(_view(solver, u))).any()
    bare, with_closure = (
        np.asarray(steps(Model(solver, stepper, 0.02, c, w), u, 1)[0][1]) for c, w in (((), ()), ((closure,), when))
    )
    limit = 4 * np.finfo(dtype).eps * np.abs(u).max()
    print(kind, type(stepper).__name__, when, dtype.__name__, 4 * np.abs(bare - with_closure).max() / limit, "ulp")
    assert np.abs(bare - with_closure).max() <= limit
    other = np.asarray(steps(Model(solver, stepper, 0.02, (learned(5, 0.1),), when), u, 1)[0][1])
    assert np.abs(bare - other).max() > 10 * limit  # negative control: with weights it is another solver


@pytest.mark.parametrize(
    ("kind", "stepper"), [("spectral", ETDRK4()), ("spectral", CrankNicolsonRK4()), ("finite_volume", SSPRK3())]
)
def test_a_zero_initialised_closure_is_bitwise_the_bare_solver_without_compilation(kind, stepper):
    solver = solver_of(kind, square(8), 1e-3, kolmogorov())
    u = jnp.asarray(random_flow(solver, 1, modes=2))
    out = []
    for closures in ((), (learned(5),)):
        model = Model(solver, stepper, 0.02, closures)
        prepared = model.prepare(u.dtype)
        start = (prepared.solver.encode(u), model.init_carry(u), jnp.zeros((), jnp.int32))
        with jax.disable_jit():
            z, _, _ = model(*start, prepared)
            out.append(np.asarray(prepared.solver.decode(z)))
    np.testing.assert_array_equal(out[0], out[1])
    assert relative(out[0], u) > 1e-4


# --- places ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", BOTH)
@pytest.mark.parametrize("when", ["stage", "step"])
def test_a_users_flux_is_viscosity(kind, when):
    """A ten-line closure in this file: extra viscosity as a closure equals viscosity of the solver, whatever the solver."""
    u = random_flow(solver_of(kind, square(16)), 2, modes=3)
    options = {"dealias": "two_thirds"} if kind == "spectral" else {}
    run = lambda viscosity, closures, n: evolve(  # noqa: E731
        solver_of(kind, square(16), viscosity, **options), default_stepper(kind), u, 0.2 / n, n, closures, (when,) * len(closures)
    )
    plain = run(0.06, (), 40)
    errors = [relative(run(0.01, (Mine(0.05),), n), plain) for n in (20, 40)]
    if when == "step":  # held: first order in time
        assert errors[1] < 5e-3
        assert 1.7 < errors[0] / errors[1] < 2.3
    elif kind == "finite_volume":
        assert errors[1] < 1e-12  # the same operator, to rounding
    else:
        assert errors[1] < 1e-6
    assert relative(run(0.01, (), 40), plain) > 0.02


@pytest.mark.parametrize(
    "closure", [Mine(0.05), Damp(0.5), Shrink(0.5), Smagorinsky(0.3), Leith(0.4), learned(3, 0.1, inputs="gradient")]
)
def test_the_same_instance_serves_both_solvers(closure):
    """A well-resolved flow: the two solvers, with one and the same closure object, agree and differ from themselves without it."""
    n = 48
    after = {}
    for kind in BOTH:
        solver = solver_of(kind, square(n), 0.02, **({"convection": "central"} if kind == "finite_volume" else {}))
        u = random_flow(solver, 2, modes=2)
        fields = [evolve(solver, SSPRK3(), u, 0.01, 10, c) for c in ((closure,), ())]
        centred = [np.asarray(_view(solver, q).centred()) for q in fields]
        after[kind] = centred
    change = {kind: np.stack(fields[:1]) - np.stack(fields[1:]) for kind, fields in after.items()}
    effect = np.sqrt(np.mean(change["spectral"] ** 2))
    apart = np.sqrt(np.mean((change["spectral"] - change["finite_volume"]) ** 2))
    print(type(closure).__name__, effect, apart)
    assert effect > 1e-5
    assert apart < 0.15 * effect


@pytest.mark.parametrize("kind", BOTH)
def test_source_and_post_step_damp_as_they_say(kind):
    solver = solver_of(kind, square(12), 0.0)
    u = sample(solver, lambda x, y: np.sin(2 * y), lambda x, y: 0 * x)  # a steady flow
    stepper = SSPRK3()
    source = evolve(solver, stepper, u, 0.01, 10, (Damp(0.5),), ("stage",))
    np.testing.assert_allclose(source, np.exp(-0.05) * u, rtol=0, atol=1e-9)
    post = evolve(solver, stepper, u, 0.01, 10, (Shrink(0.5),))
    np.testing.assert_allclose(post, (1 - 0.005) ** 10 * u, rtol=0, atol=1e-13)


def test_closures_add_up():
    solver = solver_of("finite_volume", square(12), 1e-3)
    u = random_flow(solver, 2)
    both = evolve(solver, SSPRK3(), u, 0.02, 3, (Mine(0.02), Damp(0.1), Mine(0.03)), ("stage",) * 3)
    one = evolve(solver, SSPRK3(), u, 0.02, 3, (Mine(0.05), Damp(0.1)), ("stage",) * 2)
    assert relative(both, one) <= 1e-13


def test_a_closure_has_one_place():
    class Nowhere(Mine, Source):
        pass

    assert place_of(Mine()) is Flux
    with pytest.raises(TypeError, match="must derive from exactly one place"):
        place_of(Nowhere())


def test_a_wrong_shape_is_refused_by_name():
    class Short(Flux):
        def __call__(self, view, memory=None, key=None):
            return view.u

    solver = solver_of("spectral", square(8))
    model = Model(solver, ETDRK4(), 0.1, (Short(),))
    u = jnp.asarray(random_flow(solver, modes=2))
    with pytest.raises(ValueError, match=r"corrections\[0\]: Short must return shape \(2, 2, 8, 8\), found \(2, 8, 8\)"):
        model(solver.prepare(u.dtype).encode(u), model.init_carry(u), jnp.zeros((), jnp.int32))


@pytest.mark.parametrize("kind", BOTH)
def test_the_view_names_channels_and_differentiates(kind):
    solver = solver_of(kind, Grid((32, 24), (TWO_PI, 4.0)))
    u = sample(solver, lambda x, y: np.sin(x) + 0 * y, lambda x, y: np.cos(TWO_PI / 4 * y) + 0 * x)
    view = _view(solver, u)
    np.testing.assert_array_equal(view["v"], u[1])
    with pytest.raises(KeyError, match="no channel 'rho'; this solver has u, v"):
        view["rho"]
    gradient = np.asarray(view.gradient())
    for a in range(2):
        for c in range(2):
            x, y = solver.grid.mesh(view.flux_place(a, c))
            exact = {(0, 0): np.cos(x), (1, 1): -TWO_PI / 4 * np.sin(TWO_PI / 4 * y)}.get((a, c), 0 * x)
            tolerance = 1e-12 if kind == "spectral" else 2e-2
            np.testing.assert_allclose(gradient[a, c], exact, rtol=0, atol=tolerance)
    tensor = jnp.asarray(np.random.default_rng(0).standard_normal((2, 2, 32, 24)))
    moved = np.asarray(view.to_flux_points(tensor))
    np.testing.assert_allclose(moved.sum(axis=(2, 3)), np.asarray(tensor).sum(axis=(2, 3)), rtol=0, atol=1e-11)


# --- eddy viscosities ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", BOTH)
def test_eddy_viscosities_of_a_shear_flow(kind):
    """u = sin y: |S| = |cos y| = |∂_y u| and |∇ω| = |sin y|, so that F[y, x] is known in closed form."""
    solver = solver_of(kind, square(64), 0.0)
    u = sample(solver, lambda x, y: np.sin(y) + 0 * x, lambda x, y: 0 * x)
    view = _view(solver, u)
    assert filter_width(view) == pytest.approx(TWO_PI / 64)
    y = solver.grid.mesh(view.flux_place(1, 0))[1]
    width = TWO_PI / 64
    for closure, exact in (
        (Smagorinsky(0.2), -((0.2 * width) ** 2) * np.abs(np.cos(y)) * np.cos(y)),
        (Leith(0.3), -((0.3 * width) ** 3) * np.abs(np.sin(y)) * np.cos(y)),
    ):
        flux = np.asarray(closure(view))
        tolerance = 1e-12 if kind == "spectral" else 2e-2  # the kinks of |·| are smoothed by averages
        assert np.sqrt(np.mean((flux[1, 0] - exact) ** 2)) <= tolerance * np.abs(exact).max()
        np.testing.assert_allclose(flux[0, 1], flux[1, 0], rtol=0, atol=1e-15)


@eqx.filter_jit
def _rates(solver, closures, u):
    """What each Flux closure does to u, projected, in physical space: `(closure, c, *grid)`."""
    solver = solver.prepare(u.dtype)
    z = solver.encode(u)
    rates = [solver.constrain({**z, **solver.receive(closure(_view(solver, u)), None)}) for closure in closures]
    return jnp.stack([solver.decode(rate) for rate in rates])


EDDIES = [Smagorinsky(0.2), Hyperviscosity(0.5, 1), Hyperviscosity(0.5, 2), Hyperviscosity(0.5, 4)]


@pytest.mark.parametrize("kind", BOTH)
@pytest.mark.parametrize(
    "grid", [square(16), Grid((15, 12), (TWO_PI, 3.0)), Grid((8, 6, 7), (TWO_PI, 3.0, 5.0))], ids=lambda g: str(g.shape)
)
def test_eddy_viscosities_only_remove_energy_and_scalar_variance(kind, grid):
    solver = solver_of(kind, grid, scalars={"c": 1e-3, "e": 1e-3})
    closures = EDDIES if grid.ndim == 3 else [*EDDIES, Leith(0.5)]
    project = jax.jit(lambda q: solver.project(q))
    for seed in range(3):
        u = project(jnp.asarray(np.random.default_rng(seed).standard_normal((grid.ndim + 2, *grid.shape))))
        rates = np.asarray(_rates(solver, closures, u))
        work = (np.asarray(u)[None] * rates).reshape(*rates.shape[:2], -1).sum(axis=2)
        assert (work[:, : grid.ndim].sum(axis=1) < 0).all()
        assert (work[:, grid.ndim :] < 0).all()
        sums = np.abs(rates.reshape(*work.shape, -1).sum(axis=2))
        assert (sums <= 1e-12 * np.abs(rates).reshape(*work.shape, -1).sum(axis=2)).all()


@pytest.mark.parametrize("kind", BOTH)
def test_a_scalar_is_mixed_by_the_eddy_viscosity_over_the_schmidt_number(kind):
    """u = sin y, c = cos 2y: F[y, c] = −(ν_t / Sc) ∂_y c with the ν_t of the flow; the velocity does not feel c."""
    grid = square(64)
    solver, bare = solver_of(kind, grid, 0.0, scalars={"c": 0.0}), solver_of(kind, grid, 0.0)
    flow = (lambda x, y: np.sin(y) + 0 * x, lambda x, y: 0 * x)
    u = sample(solver, *flow, lambda x, y: np.cos(2 * y) + 0 * x)
    view, plain = _view(solver, u), _view(bare, sample(bare, *flow))
    y, width = grid.mesh(view.flux_place(1, 2))[1], TWO_PI / 64
    tolerance = 1e-12 if kind == "spectral" else 2e-2
    for make, viscosity in (
        (lambda sc: Smagorinsky(0.2, sc), (0.2 * width) ** 2 * np.abs(np.cos(y))),
        (lambda sc: Leith(0.3, sc), (0.3 * width) ** 3 * np.abs(np.sin(y))),
    ):
        for schmidt in (0.7, 2.0):
            flux = np.asarray(make(schmidt)(view))
            exact = viscosity / schmidt * 2 * np.sin(2 * y)
            assert np.sqrt(np.mean((flux[1, 2] - exact) ** 2)) <= tolerance * np.abs(exact).max()
            np.testing.assert_allclose(flux[:, :2], make(schmidt)(plain), rtol=0, atol=1e-16)
            assert np.abs(flux[0, 2]).max() <= 1e-14


@pytest.mark.parametrize("kind", BOTH)
def test_hyperviscosity_damps_each_mode_as_it_says(kind):
    """−(c U/Δ) (Σ_a (k_a Δx_a / π)²)^p, with each solver's own k, on unlike axes."""
    grid = Grid((32, 24), (TWO_PI, 4.0))
    solver = solver_of(kind, grid, scalars={"c": 0.0})
    k, h = np.array([5, 3 * TWO_PI / 4]), np.array(grid.spacing)
    wave = lambda x, y: np.cos(k[0] * x + k[1] * y + 0.2)  # noqa: E731
    u = sample(solver, lambda x, y: 0.3 + 0 * x, lambda x, y: -0.1 + np.sin(x) + 0 * y, wave)
    if kind == "finite_volume":
        k = 2 / h * np.sin(k * h / 2)
    found = np.asarray(_rates(solver, EDDIES[1:], jnp.asarray(u)))
    for closure, rates in zip(EDDIES[1:], found, strict=True):
        damping = 0.5 * np.sqrt(0.5) / np.sqrt(h.prod()) * np.sum((k * h / np.pi) ** 2) ** closure.order
        np.testing.assert_allclose(rates[2], -damping * u[2], rtol=0, atol=1e-12)


def test_hyperviscosity_keeps_to_periodic_boxes():
    solver = solver_of("finite_volume", Grid((8, 8), (1.0, 1.0), ("periodic", "no_slip")))
    view = _view(solver, np.random.default_rng(0).standard_normal((2, 8, 8)))
    assert np.isfinite(Hyperviscosity(0.5, 1)(view)).all()
    with pytest.raises(ValueError, match="order 2 and more needs periodic boundaries"):
        Hyperviscosity(0.5, 2)(view)


def test_constants_are_checked():
    for make in (lambda: Smagorinsky(-0.1), lambda: Leith(float("nan")), lambda: Hyperviscosity(-1.0)):
        with pytest.raises(ValueError, match="must be finite and not negative"):
            make()
    for make in (lambda: Smagorinsky(0.1, 0.0), lambda: Leith(0.1, -1.0)):
        with pytest.raises(ValueError, match="schmidt: must be positive and finite"):
            make()
    with pytest.raises(ValueError, match="order: needs a positive whole number, found 0"):
        Hyperviscosity(0.1, 0)


# --- learned fluxes --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", BOTH)
@pytest.mark.parametrize("inputs", ["velocity", "gradient"])
@pytest.mark.parametrize("grid", [square(12), cube(8)], ids=["2d", "3d"])
def test_a_learned_flux_serves_passive_scalars(kind, inputs, grid):
    solver = solver_of(kind, grid, scalars={"c": 1e-3, "e": 1e-3})
    u = random_flow(solver, 3, modes=2, mean=(0.2,))
    options = {"dims": grid.ndim, "inputs": inputs, "scalar_scale": 2.0, "velocity_scale": 0.5}
    closure = learned(2, 0.3, variables=solver.variables, dtype=np.float64, **options)
    assert closure.scalars == ("c", "e")

    @eqx.filter_jit
    def flux(closure, u):
        return closure(_view(solver, u))

    out = np.asarray(flux(closure, u))
    assert out.shape == (grid.ndim, grid.ndim + 2, *grid.shape)
    assert all(np.abs(q).max() > 1e-4 for row in out for q in row)
    # twice the scalars seen in twice the unit: the same stress, and twice the scalar fluxes
    doubled = u.copy()
    doubled[grid.ndim :] *= 2
    other = eqx.tree_at(
        lambda c: c.network, learned(2, 0.3, variables=solver.variables, **{**options, "scalar_scale": 4.0}), closure.network
    )
    again = np.asarray(flux(other, doubled))
    np.testing.assert_allclose(again[:, : grid.ndim], out[:, : grid.ndim], rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(again[:, grid.ndim :], 2 * out[:, grid.ndim :], rtol=1e-12, atol=1e-12)
    rate = np.asarray(_rates(solver, [closure], jnp.asarray(u)))[0]
    assert np.abs(rate.reshape(len(rate), -1).sum(axis=1)).max() <= 1e-11 * np.abs(rate).sum()
    assert np.abs(rate[grid.ndim :]).max() > 1e-3


def test_without_scalars_the_learned_flux_is_what_it_was():
    """The network of weights that were trained before scalars were known: the same shapes, in the same order."""
    made = [
        LearnedFlux(width=4, depth=1, variables=v, key=jax.random.key(0))
        for v in (None, solver_of("spectral", square(8)).variables)
    ]
    for closure in made:
        assert closure.scalars == ()
        shapes = [a.shape for a in jax.tree.leaves(eqx.filter(closure, eqx.is_array))]
        assert shapes == [(4, 2, 3, 3), (4,), (3, 4, 3, 3), (3,)]


def test_a_learned_flux_is_refused_where_the_channels_are_others():
    solver, other = solver_of("spectral", square(8), scalars={"c": 0.0}), solver_of("spectral", square(8))
    u = np.zeros((3, 8, 8))
    with pytest.raises(ValueError, match="LearnedFlux: made for u, v; found u, v, c"):
        randomised(learned(0))(_view(solver, u))
    with pytest.raises(ValueError, match="LearnedFlux: made for u, v, c; found u, v"):
        learned(0, variables=solver.variables)(_view(other, u[:2]))
    with pytest.raises(ValueError, match="needs velocity channels; this solver has c, no u"):
        learned(0, variables=solver.variables[2:])
    with pytest.raises(ValueError, match="scalar_scale: must be positive"):
        learned(0, scalar_scale=0.0)


# --- networks at the other places ------------------------------------------------------------------------------------------------


def _family(name):
    """(solver, stepper, a state) of each family and discretisation."""
    if name.endswith("ks"):
        make = SpectralKS if name == "spectral_ks" else FiniteVolumeKS
        solver = make(Grid((16,), (22.0,)), KuramotoSivashinsky())
        (x,) = solver.grid.mesh()
        return solver, ETDRK4(), np.cos(TWO_PI * x / 22)[None] + 0.3 * np.sin(TWO_PI * 2 * x / 22 + 1)[None]
    solver = solver_of(name, square(12), 1e-3, kolmogorov(), scalars={"c": 1e-3})
    return solver, default_stepper(name), random_flow(solver, 1, modes=2, mean=(0.3, -0.2))


FAMILIES = (*BOTH, "spectral_ks", "finite_volume_ks")


def _network(kind, solver, std=None, seed=0, **options):
    made = kind(solver.grid.ndim, width=4, depth=1, variables=solver.variables, key=jax.random.key(seed), **options)
    made = made if std is None else randomised(made, seed, std)
    return jax.tree.map(lambda a: a.astype(np.float64) if eqx.is_inexact_array(a) else a, made)


@pytest.mark.parametrize("name", FAMILIES)
def test_untrained_networks_change_nothing_at_any_place(name):
    solver, stepper, u = _family(name)
    kinds = (LearnedFlux, LearnedSource, LearnedCorrection)
    bare = evolve(solver, stepper, u, 0.01, 1)
    closures = [_network(kind, solver) for kind in kinds]
    limit = 4 * np.finfo(float).eps * np.abs(u).max()
    assert np.abs(evolve(solver, stepper, u, 0.01, 1, closures) - bare).max() <= limit
    for i, kind in enumerate(kinds):
        trained = [*closures[:i], _network(kind, solver, 0.3), *closures[i + 1 :]]
        assert np.abs(evolve(solver, stepper, u, 0.01, 1, trained) - bare).max() > 1e-4, kind


@pytest.mark.parametrize("name", FAMILIES)
def test_a_replacement_takes_the_whole_step(name):
    """u ← P(u + d), d at the start of the step; the stepper and the physics of the solver are out of it."""
    solver, stepper, u = _family(name)
    u = np.asarray(solver.project(jnp.asarray(u)))
    still = evolve(solver, stepper, u, 0.1, 2, (_network(LearnedStep, solver),))
    np.testing.assert_allclose(still, u, rtol=0, atol=1e-13)
    closure = _network(LearnedStep, solver, 0.3)
    found, ledger = steps(Model(solver, stepper, 0.1, (closure,)), u, 2)
    expected = jnp.asarray(u)
    for _ in range(2):
        expected = solver.project(expected + closure(_view(solver, expected, 0.1)))
    np.testing.assert_allclose(found[-1], expected, rtol=0, atol=1e-12)
    assert not np.asarray(ledger[0]).any()
    assert np.abs(np.asarray(found[-1]) - u).max() > 1e-2


@pytest.mark.parametrize("name", ["finite_volume", "spectral_ks"])
def test_a_replacement_learns(name):
    """Its gradient is finite, and one step along it lowers the loss."""
    solver, stepper, u = _family(name)
    truth = rollout(Model(solver, stepper, 0.02, substeps=5), State(jnp.asarray(u)), 2).u
    window = jnp.concatenate([jnp.asarray(u)[None], truth])
    weights, fixed = eqx.partition(_network(LearnedStep, solver, 0.1), eqx.is_inexact_array)

    @jax.jit
    def loss(weights):
        return window_loss(Model(solver, stepper, 0.1, (eqx.combine(weights, fixed),)), window, jax.random.key(0), How())[0]

    value, gradient = jax.jit(jax.value_and_grad(loss))(weights)
    leaves = jax.tree.leaves(gradient)
    assert all(np.isfinite(g).all() for g in leaves)
    assert all(np.asarray(g).any() for g in leaves)
    size = sum(float(jnp.sum(g * g)) for g in leaves)
    lower = loss(jax.tree.map(lambda w, g: w - 0.05 * value / size * g, weights, gradient))
    assert 0.9 * value < lower < value


class Swap(Replacement):
    """d = −2 u, and it remembers how often it was asked."""

    def init_memory(self, view):
        return jnp.zeros((), jnp.int32)

    def __call__(self, view, memory=None, key=None):
        return -2 * view.u, memory + 1


def test_a_replacement_remembers_and_counts_steps():
    solver, stepper, u = _family("spectral")
    final = eqx.filter_jit(rollout)(Model(solver, stepper, 0.1, (Swap(),), substeps=3), State(jnp.asarray(u)), 3).final
    assert int(final.carry["closures"][0]["memory"]) == 9
    np.testing.assert_allclose(final.u, -u, rtol=0, atol=1e-12)


def test_a_replacement_stands_alone():
    solver, stepper, _ = _family("spectral")
    step = _network(LearnedStep, solver)
    with pytest.raises(ValueError, match=r"corrections\[1\]: LearnedStep is a Replacement closure.*remove corrections\[0\], Mine"):
        Model(solver, stepper, 0.1, (Mine(), step))
    with pytest.raises(ValueError, match=r"corrections\[0\]: LearnedStep is a Replacement closure.*remove corrections\[1\], Damp"):
        Model(solver, stepper, 0.1, (step, Damp()))
    for when, substeps in (("stage", 1), (2, 2)):
        with pytest.raises(ValueError, match=r"corrections\[0\].evaluate: a Replacement closure is the step itself; found"):
            Model(solver, stepper, 0.1, (step,), when, substeps)


# --- consistency -----------------------------------------------------------------------------------------------------------------


class Recorded(Source):
    """s at every stage from a list made beforehand, and the states that it was called with."""

    sources: list
    seen: list

    def __call__(self, view, memory=None, key=None):
        self.seen.append(np.asarray(view.u))
        return self.sources[len(self.seen) - 1]


def _eager_run(solver, stepper, u, dt, count, tendency):
    """`count` steps without compilation; every stage's state passes through `tendency`."""
    coefficients = stepper.prepare(solver, dt, u.dtype)
    z = solver.encode(u)
    for i in range(count):
        z = stepper(solver, coefficients, z, jnp.asarray(i * dt), jnp.asarray(dt), tendency)
    return solver.decode(z)


def _nonlinear(solver, z):
    """N(z) after projection, as a velocity."""
    rate = solver.constrain(solver.explicit(z, jnp.zeros(()), lambda q, t: None))
    return solver.decode({**z, **rate})


CONSISTENT = [
    pytest.param("spectral", ETDRK4(), marks=pytest.mark.slow),
    pytest.param("spectral", CrankNicolsonRK4(), marks=pytest.mark.slow),
    pytest.param("finite_volume", SSPRK2(), marks=pytest.mark.slow),
    pytest.param("finite_volume", SSPRK3(), marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("kind", "stepper"), CONSISTENT, ids=lambda s: s if isinstance(s, str) else type(s).__name__)
def test_with_the_exact_source_the_coarse_run_is_the_filtered_fine_run(kind, stepper):
    """s = restrict(N(u_fine)) − N_coarse(restrict(u_fine)) at every stage: what is missing, and nothing else."""
    fine, coarse = (solver_of(kind, square(n), 5e-3, kolmogorov(), **_plain(kind)).prepare(np.float64) for n in (24, 12))
    dt, count = 0.02, 10
    u = fine.project(jnp.asarray(random_flow(fine, 8, modes=7, mean=(0.2, 0.1))))
    other = _other_filter(coarse)
    filters = {"own": jax.jit(lambda q: coarse.restrict(q, fine.grid, fine.variables)), "other": jax.jit(other(fine))}
    rate_fine, rate_coarse = (jax.jit(lambda z, s=s: _nonlinear(s, z)) for s in (fine, coarse))
    stages, sources = [], {"own": [], "other": []}

    def watch(z, t):
        q, rate = fine.decode(z), rate_fine(z)
        stages.append(np.asarray(filters["own"](q)))
        for name, restrict in filters.items():
            sources[name].append(restrict(rate) - rate_coarse(coarse.encode(restrict(q))))

    # a scan over stages would trace `watch` once
    with jax.disable_jit() if isinstance(stepper, CrankNicolsonRK4) else nullcontext():
        end = np.asarray(filters["own"](_eager_run(fine, stepper, u, dt, count, lambda z, t: watch(z, t))))
        errors = {}
        for name, series in sources.items():
            closure = Recorded(series, [])
            model = Model(coarse, stepper, dt, (closure,), "stage")
            prepared = model.prepare(u.dtype)
            start = filters["own"](u)
            z, carry, step = prepared.solver.encode(start), model.init_carry(start), jnp.zeros((), jnp.int32)
            for _ in range(count):
                z, carry, step = model(z, carry, step, prepared)
            assert len(closure.seen) == len(series) == stepper.stages * count
            each = max(relative(a, b) for a, b in zip(closure.seen, stages, strict=True))
            errors[name] = max(each, relative(prepared.solver.decode(z), end))
    bare = evolve(coarse, stepper, np.asarray(filters["own"](u)), dt, count)
    print(kind, type(stepper).__name__, errors, "bare", relative(bare, end))
    assert errors["own"] <= 1e-12
    assert errors["other"] > 1e-3  # negative control
    assert relative(bare, end) > 1e-3


def _plain(kind):
    # the mask of a dealiased coarse run would also cut the source
    return {"dealias": "none"} if kind == "spectral" else {}


def _other_filter(coarse):
    """Means over cells instead of a cut, or a cut instead of face means."""
    from hybridsim.grid import resample

    def make(fine):
        average = (True, True) if coarse.flux_place(0, 0) == coarse.flux_place(0, 1) else (False, False)

        def restrict(q):
            out = [
                resample(c, coarse.grid.shape, v.at, w.at, average=average)
                for c, v, w in zip(q, fine.variables, coarse.variables, strict=True)
            ]
            return coarse.project(jnp.stack(out))

        return restrict

    return make
