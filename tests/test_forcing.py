"""Body forces: what each one adds to the budgets of momentum and energy, on spectral and on staggered places."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flows import (
    BOTH,
    TWO_PI,
    bare_rate,
    beltrami,
    cube,
    default_stepper,
    divergence,
    evolve,
    kolmogorov,
    ledger_sum,
    random_flow,
    relative,
    solver_of,
    square,
    steps,
    taylor_green,
)

from hybridsim.grid import Grid, resample
from hybridsim.model import Model, frames_of
from hybridsim.solvers.incompressible import (
    AbstractStandingForce,
    Isotropic,
    Kolmogorov,
    Linear,
    LinearDrag,
    NavierStokes,
    UniformForce,
)
from hybridsim.solvers.spectral import hermitian
from hybridsim.solvers.steppers import ETDRK4, SSPRK3, CrankNicolsonRK4

FLAT = Grid((12, 15), (TWO_PI, 5.0))
DEEP = Grid((12, 10, 9), (TWO_PI, 5.0, 4.0))


def _axes(grid):
    return tuple(range(-grid.ndim, 0))


# --- linear forces ---------------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("dealias", ["hou_li", "two_thirds"])
@pytest.mark.parametrize("dims", [2, 3])
def test_linear_forcing_grows_at_exactly_its_rate(dims, dealias):
    """exp((A − ν k² − μ) t) for a flow whose nonlinear term vanishes, at any time step; a mean flow feels the drag alone."""
    rate, drag, nu, t = 0.6, 0.1, 0.05, 1.2
    solver = solver_of("spectral", square(12) if dims == 2 else cube(12), nu, Linear(rate, drag), dealias=dealias)
    start = taylor_green(solver) if dims == 2 else beltrami(solver)
    growth = np.exp((rate - nu * (2 if dims == 2 else 1) - drag) * t)
    assert growth > 1.3
    assert relative(evolve(solver, ETDRK4(), start, 0.3, 4), growth * start) <= 1e-12
    still = solver_of("spectral", solver.grid, nu, Linear(rate), dealias=dealias)
    mean = (0.5, -0.3, 0.2)[:dims]
    exact = lambda time: taylor_green(still, t=time, mean=mean) if dims == 2 else beltrami(still, time, mean)  # noqa: E731
    u = evolve(still, ETDRK4(), exact(0.0), 1e-3, 20)
    carried = np.asarray(mean).reshape(-1, *(1,) * dims)
    assert relative(u, carried + np.exp(rate * 0.02) * (exact(0.02) - carried)) <= 1e-11
    assert np.abs(u.mean(axis=tuple(range(1, dims + 1))) - mean).max() <= 1e-15


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("forcing", [Linear(0.4, 0.1), LinearDrag(0.2), Isotropic(0.7, 2, drag=0.1), kolmogorov(0.8, 0.1, 1)],
                         ids=lambda f: type(f).__name__)  # fmt: skip
@pytest.mark.parametrize("grid", [FLAT, DEEP], ids=lambda g: f"{g.ndim}d")
def test_energy_budget_by_the_right_hand_side(grid, forcing):
    """⟨u·∂t u⟩ = P − ν⟨|∇u|²⟩ + A⟨|u'|²⟩ − μ⟨|u|²⟩ + ⟨u·a⟩, and scalars are not forced."""
    nu = 0.02
    solver = solver_of("spectral", grid, nu, forcing, {"dye": 0.0}, dealias="two_thirds").prepare(np.float64)
    z = solver.encode(jnp.asarray(random_flow(solver, 3, modes=2, mean=(0.4, 0.1, 0.2))))
    rate = solver.explicit(z, jnp.asarray(0.3), lambda q, t: None)
    rate = jax.tree.map(lambda f, a, q: f + a * q, rate, solver.linear(), z)
    u, du = np.asarray(solver.decode(z)), np.asarray(solver.decode(rate))
    d, space = grid.ndim, tuple(range(1, grid.ndim + 1))
    flow, slopes = u[:d], np.asarray(solver.gradient(jnp.asarray(u)))[:, :d]
    swirl = flow - flow.mean(axis=space, keepdims=True)
    expected = -nu * np.sum(slopes**2) + solver.equation.growth * np.sum(swirl**2) - forcing.drag * np.sum(flow**2)
    expected = expected / grid.cells + (forcing.power if isinstance(forcing, Isotropic) else 0)
    if isinstance(forcing, AbstractStandingForce):
        expected += np.sum(flow * np.asarray(forcing.acceleration(grid, (grid.centre,) * d, np.float64))) / grid.cells
    assert np.sum(flow * du[:d]) / grid.cells == pytest.approx(expected, rel=1e-12)
    assert abs(np.mean(u[d] * du[d])) <= 1e-14
    # what force and drag do to the mean flow is what the ledger is told
    assert np.abs(du.mean(axis=space) - np.asarray(rate["injected"])).max() <= 1e-15
    drag = -forcing.drag * flow.mean(axis=space)
    assert np.abs(np.asarray(rate["injected"])[:d] - drag).max() <= 1e-15


@pytest.mark.usefixtures("x64")
def test_a_long_run_amplifies_no_rounding_errors():
    """The symbol also amplifies what no product drains: ∇·u, and coefficients that no real field has. `collect` removes them."""
    solver = solver_of("spectral", cube(8), 0.3, Linear(1.0), dealias="two_thirds")
    ready = solver.prepare(np.float64)
    stepper, dt = ETDRK4(), jnp.asarray(0.1)
    coefficients = stepper.prepare(ready, dt, np.float64)
    start = ready.encode(jnp.asarray(random_flow(solver, 1, modes=2)))
    rng = np.random.default_rng(0)
    errors = 1e-14 * rng.standard_normal((2, 3, 8, 8, 5))
    start["velocity"] = start["velocity"] + ready.arrays["keep"][None] * (errors[0] + 1j * errors[1])

    @eqx.filter_jit
    def run(ready, coefficients, z, clean):
        def body(i, z):
            z = stepper(ready, coefficients, z, i * dt, dt, lambda q, t: None)
            return ready.collect(z)[0] if clean else z

        return jax.lax.fori_loop(0, 500, body, z)

    ghosts, gaps = {}, {}
    for clean in (True, False):
        z = run(ready, coefficients, start, clean)
        hat = np.asarray(z["velocity"])
        ghosts[clean] = np.abs(hat - np.asarray(hermitian(z["velocity"]))).max() / np.abs(hat).max()
        gaps[clean] = divergence(ready, np.asarray(ready.decode(z)))
    print("invisible part", ghosts, "divergence", gaps)
    assert ghosts[True] <= 1e-15
    assert gaps[True] <= 1e-13
    assert ghosts[False] > 1e-6  # negative control
    assert gaps[False] > 1e-6


@pytest.mark.usefixtures("x64")
def test_the_hermitian_part_is_what_the_field_keeps():
    for grid in (FLAT, DEEP, Grid((9, 8, 7), (1.0, 1.0, 1.0))):
        rng = np.random.default_rng(0)
        real = np.fft.rfftn(rng.standard_normal((2, *grid.shape)), axes=_axes(grid))
        assert relative(hermitian(jnp.asarray(real)), real) <= 1e-14
        noise = np.zeros_like(real)
        noise[..., 0] = rng.standard_normal(real.shape[:-1]) + 1j * rng.standard_normal(real.shape[:-1])
        both = real + noise
        kept = np.asarray(hermitian(jnp.asarray(both)))
        back = lambda q, grid=grid: np.fft.irfftn(q, s=grid.shape, axes=_axes(grid))  # noqa: E731
        assert relative(np.fft.rfftn(back(kept), axes=_axes(grid)), kept) <= 1e-14
        assert relative(back(kept), back(both)) <= 1e-13
        assert relative(kept, both) > 1e-2


# --- constant forces -------------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("kind", BOTH)
@pytest.mark.parametrize("dims", [2, 3])
def test_a_uniform_force_accelerates_the_mean_flow_and_the_ledger_tells(dims, kind):
    grid = Grid((8, 6, 4)[:dims], (TWO_PI, 5.0, 4.0)[:dims])
    push, drag = np.array((0.5, -0.2, 0.3))[:dims], 0.4
    solver = solver_of(kind, grid, 0.1, UniformForce(tuple(push), drag))
    model = Model(solver, default_stepper(kind), 0.01, ())
    u = random_flow(solver, 1, modes=1, mean=(0.1, 0.2, -0.3)[:dims])
    frames, ledger = steps(model, u, 50)
    means = np.asarray(frames).mean(axis=tuple(range(2, 2 + dims)))
    exact = push / drag + (means[0] - push / drag) * np.exp(-drag * 0.5)
    assert np.abs(means[-1] - exact).max() <= 1e-8
    assert np.abs(means[-1] - means[0] - ledger_sum(ledger)[-1]).max() <= 1e-14


@pytest.mark.usefixtures("x64")
def test_kolmogorov_force_is_the_same_at_every_place():
    forcing = Kolmogorov(2, 0.7, 0.1)
    for kind in BOTH:
        solver = solver_of(kind, DEEP)
        places = tuple(v.at for v in solver.variables)
        force = np.asarray(forcing.acceleration(DEEP, places, np.float64))
        y = DEEP.mesh(places[0])[1]
        assert relative(force[0], 0.7 * np.sin(2 * TWO_PI / 5.0 * y)) <= 1e-14
        assert not force[1:].any()


@pytest.mark.parametrize("forcing", [Kolmogorov(2), UniformForce((1.0, 0.0, 0.0)), Isotropic(1.0)], ids=lambda f: type(f).__name__)
def test_forces_have_the_precision_of_the_state(forcing):
    places = (DEEP.centre,) * 3
    hat = jnp.fft.rfftn(jnp.asarray(random_flow(solver_of("spectral", DEEP), 1), jnp.float32), axes=(1, 2, 3))
    if isinstance(forcing, AbstractStandingForce):
        force, dtype = forcing.acceleration(DEEP, places, np.float32), np.float32
    else:
        force, dtype = forcing.band_force(hat, jnp.zeros(()), DEEP, places), np.complex64
    assert force.dtype == dtype
    assert bool(jnp.any(force != 0))


# --- isotropic forcing -----------------------------------------------------------------------------------------------------------


def _places(solver):
    return tuple(v.at for v in solver.variables[: solver.grid.ndim])


def _isotropic(power=0.7, randomness=1.0, seed=3):
    """K = 2, τ = 0.8; arrays, so that other numbers compile nothing."""
    return Isotropic(jnp.asarray(power), 2, jnp.asarray(randomness), 0.8, seed)


@eqx.filter_jit
def _force(forcing, u, t, grid, places):
    hat = jnp.fft.rfftn(u, axes=_axes(grid))
    return jnp.fft.irfftn(forcing.band_force(hat, t, grid, places), s=grid.shape, axes=_axes(grid))


def _band(forcing, solver, u, t):
    """The band force in physical space, each component at its place."""
    return np.asarray(_force(forcing, jnp.asarray(u), jnp.asarray(t, u.dtype), solver.grid, _places(solver)))


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(("kind", "grid", "dtype"), [
    ("spectral", FLAT, np.float64),
    ("spectral", DEEP, np.float64),
    ("spectral", cube(8), np.float32),
    ("finite_volume", square(9), np.float64),
    ("finite_volume", DEEP, np.float64),
    ("finite_volume", DEEP, np.float32),
], ids=lambda p: p if isinstance(p, str) else getattr(p, "__name__", None) or f"{p.shape}")  # fmt: skip
def test_isotropic_forcing_does_exactly_its_power_and_nothing_else(kind, grid, dtype):
    solver = solver_of(kind, grid)
    forcing = _isotropic(randomness=1.5)
    u = random_flow(solver, 1, modes=3, mean=(0.3, -0.2, 0.1)[: grid.ndim], dtype=dtype)
    for t in (0.0, 0.31, 0.8, 17.9):
        f = _band(forcing, solver, u, t)
        assert f.dtype == dtype
        assert np.mean(np.sum(u.astype(float) * f, axis=0)) == pytest.approx(0.7, rel=1e-13 if dtype == np.float64 else 1e-6)
        assert np.abs(f.mean(axis=_axes(grid))).max() <= (1e-15 if dtype == np.float64 else 1e-6)
        # a random part beside the one along u: r² P²/⟨|u_b|²⟩ at most
        along = _band(_isotropic(randomness=0.0), solver, u, t)
        across = f - along
        assert abs(np.mean(np.sum(across * along, axis=0))) <= (1e-14 if dtype == np.float64 else 1e-6)
        assert 0.1 < np.mean(across**2) / np.mean(along**2) / 1.5**2 <= 1.001
        slopes = []
        for axis, (q, at) in enumerate(zip(f.astype(float), _places(solver), strict=True)):
            hat = np.fft.rfftn(np.asarray(resample(jnp.asarray(q), grid.shape, at, grid.centre)))
            slopes.append(1j * grid.wavenumbers()[axis] * hat)
            index = np.sqrt(sum(k**2 for k in grid.wavenumbers())) * max(grid.lengths) / TWO_PI
            assert np.abs(np.where(index > 2.5, hat, 0)).max() <= 1e-6 * np.abs(hat).max()
        assert np.abs(sum(slopes)).max() <= (1e-13 if dtype == np.float64 else 1e-5) * np.abs(slopes).max()


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("dims", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_the_stirring_is_the_same_on_every_grid_at_every_place_and_in_every_precision(dims):
    lengths = (TWO_PI, 5.0, 4.0)[:dims]
    forcing = _isotropic()
    found = []
    for kind, shape, dtype in (
        ("spectral", (24, 24, 24), np.float64),
        ("spectral", (16, 13, 14), np.float64),
        ("finite_volume", (16, 18, 14), np.float64),
        ("finite_volume", (13, 16, 15), np.float32),
    ):
        solver = solver_of(kind, Grid(shape[:dims], lengths))
        f = _band(forcing, solver, random_flow(solver, 1, modes=4, dtype=dtype), 1.3).astype(float)
        common = [resample(jnp.asarray(q), (24,) * dims, at, (0.5,) * dims) for q, at in zip(f, _places(solver), strict=True)]
        found.append(np.stack([np.asarray(q) for q in common]))
    for other, limit in zip(found[1:], (1e-12, 1e-12, 1e-5), strict=True):
        assert relative(other, found[0]) <= limit


@pytest.mark.usefixtures("x64")
def test_the_random_stream_depends_on_seed_and_time_alone_and_is_smooth():
    solver = solver_of("spectral", DEEP)
    u = random_flow(solver, 1, modes=3)
    at = lambda t, seed=3: _band(_isotropic(seed=seed), solver, u, t)  # noqa: E731
    assert (at(1.1) == at(1.1)).all()
    assert relative(at(1.1, 4), at(1.1)) > 0.1
    assert relative(at(1.9), at(1.1)) > 0.1
    # the noise is of single precision, and its last digit depends on the program that it is compiled into
    for draw in (0.8, 1.6, 8.0):
        before, now, after = at(draw - 1e-3), at(draw), at(draw + 1e-3)
        # continuous, and the first derivative is zero on both sides of a draw
        assert relative(before, now) <= 2e-5
        assert relative(after, now) <= 2e-5
    assert relative(at(1.2 + 1e-3), at(1.2)) > 2e-4  # but not between draws
    single = _band(_isotropic(), solver, u.astype(np.float32), 1.1)
    assert relative(single, at(1.1)) <= 1e-4


@pytest.mark.usefixtures("x64")
def test_isotropic_forcing_starts_a_fluid_at_rest_gently():
    solver = solver_of("spectral", cube(8), 0.05)
    u = random_flow(solver, 1, modes=3)
    forcing = _isotropic()
    typical = np.sqrt(np.mean(_band(forcing, solver, u, 0.3) ** 2))
    sizes = []
    for scale in (1e-3, 1e-6, 1e-12, 0.0):
        f = _band(forcing, solver, scale * u, 0.3)
        sizes.append(np.sqrt(np.mean(f**2)))
        assert np.mean(np.sum(scale * u * f, axis=0)) <= 0.7
    assert max(sizes) <= 20 * typical
    assert sizes[-1] == pytest.approx(sizes[-2], rel=1e-6)
    assert not _band(_isotropic(randomness=0.0), solver, 0 * u, 0.3).any()
    assert not _band(_isotropic(power=0.0), solver, u, 0.3).any()
    started = evolve(solver_of("spectral", cube(8), 0.05, forcing), ETDRK4(), 0 * u, 0.02, 100)
    assert 0.05 < np.mean(np.sum(started**2, axis=0)) < 5

    def work(power, randomness, scale):
        return jnp.sum(
            _force(_isotropic(power, randomness), scale * jnp.asarray(u), jnp.asarray(0.3), solver.grid, _places(solver)) ** 2
        )

    cases = jnp.array([(0.7, 1.0, 1.0), (0.7, 1.0, 0.0), (0.0, 1.0, 1.0), (0.0, 1.0, 0.0), (0.7, 0.0, 0.0)])
    assert np.isfinite(jax.jit(jax.vmap(jax.grad(work, argnums=(0, 1, 2))))(*cases.T)).all()


@pytest.mark.usefixtures("x64")
def test_isotropic_forcing_does_not_see_what_no_real_solenoidal_field_has():
    solver = solver_of("spectral", DEEP)
    forcing = _isotropic()
    hat = np.fft.rfftn(random_flow(solver, 1, modes=3), axes=(1, 2, 3))
    rng = np.random.default_rng(0)
    ghost = np.zeros_like(hat)
    ghost[..., 0] = rng.standard_normal(hat.shape[:-1]) + 1j * rng.standard_normal(hat.shape[:-1])
    ghost = ghost - np.asarray(hermitian(jnp.asarray(ghost)))
    k = np.stack(np.broadcast_arrays(*DEEP.wavenumbers()))
    ghost = ghost + 1j * k * np.fft.rfftn(rng.standard_normal(DEEP.shape))[None]
    force = jax.jit(lambda q: forcing.band_force(q, jnp.asarray(0.3), DEEP, _places(solver)))
    assert relative(hat + ghost, hat) > 0.1
    assert relative(force(hat + ghost), force(hat)) <= 1e-12


def _forced(solver, u, dt, count, every, stepper=None):
    """t, E and ε = ν⟨|∇u|²⟩ each `every` steps, and the energy in the band, of a run."""
    model = Model(solver, stepper or ETDRK4(), dt)
    grid = solver.grid
    square = jnp.asarray(sum(k**2 for k in grid.wavenumbers()), u.dtype)
    weight = jnp.asarray(np.where(np.arange(grid.shape[-1] // 2 + 1) == 0, 1.0, 2.0).reshape(1, 1, -1) / grid.cells**2, u.dtype)
    inside = square <= 2.5**2

    def observe(prepared, z, carry):
        density = weight * jnp.sum(jnp.abs(z["velocity"]) ** 2, axis=0)
        return jnp.stack([density.sum() / 2, solver.equation.viscosity * (square * density).sum(), (inside * density).sum()])

    @eqx.filter_jit
    def run(prepared, u):
        state = (prepared.solver.encode(u), model.init_carry(u), jnp.zeros((), jnp.int32))
        return frames_of(model, prepared, *state, count // every, every, 0, observe)[1]

    return dt * every * np.arange(1, count // every + 1), *np.asarray(run(model.prepare(u.dtype), jnp.asarray(u)), np.float64).T


@pytest.mark.usefixtures("x64")
def test_forced_turbulence_becomes_stationary_and_its_budget_closes():
    """E(t) − E(t₀) = P (t − t₀) − ∫ ε dt all along, and ⟨ε⟩ = P in the end."""
    power = 0.5
    solver = solver_of("spectral", cube(16), 0.04, Isotropic(power, 2, seed=1), dealias="two_thirds")
    u = random_flow(solver, 1, modes=3)
    t, energy, dissipation, band = _forced(solver, u, 0.02, 1500, 1)
    spent = np.concatenate([[0.0], np.cumsum((dissipation[1:] + dissipation[:-1]) / 2) * 0.02])
    gap = energy - energy[0] - power * (t - t[0]) + spent
    late = t > 10
    natural = (power / 2) ** (2 / 3)
    print("budget", np.abs(gap).max(), "late ε/P", dissipation[late].mean() / power, "±", dissipation[late].std() / power,
          "E", energy[late].mean(), "⟨|u_b|²⟩ over (P/K k₀)^⅔", band[late].mean() / natural)  # fmt: skip
    assert np.abs(gap).max() <= 1e-4 * power * t[-1]
    assert dissipation[late].mean() == pytest.approx(power, rel=0.1)
    assert dissipation[late].std() < 0.5 * power
    assert abs(energy[late].mean() / energy[t > 20].mean() - 1) < 0.2
    # far above where the force is held back (a sixteenth)
    assert band[late].min() / natural > 50 / 16


@pytest.mark.usefixtures("x64")
def test_a_forced_run_can_be_taken_up_again_and_has_the_order_of_its_stepper():
    solver = solver_of("spectral", cube(12), 0.02, Isotropic(0.5, 1, interval=0.3))
    u = random_flow(solver, 1, modes=3)
    model = Model(solver, ETDRK4(), 0.02)
    whole = model_run(model, u, 0.0, 10)
    half = model_run(model, u, 0.0, 5)
    assert relative(model_run(model, half, 0.1, 5), whole) <= 1e-13
    assert relative(model_run(model, half, 0.0, 5), whole) > 1e-4  # the stirring has its own clock
    for stepper, order in ((ETDRK4(), 4), (SSPRK3(), 3), (CrankNicolsonRK4(), 2)):
        fine = evolve(solver, ETDRK4(), u, 0.3 / 240, 240)
        errors = [relative(evolve(solver, stepper, u, 0.3 / n, n), fine) for n in (7, 15, 30)]
        rates = np.log2(np.array(errors[:-1]) / errors[1:])
        print(type(stepper).__name__, rates, errors)
        assert rates[-1] >= order - 0.2


@eqx.filter_jit
def _model_run(model, u, start, count):
    prepared = model.prepare(u.dtype)
    state = (prepared.solver.encode(u), model.init_carry(u, start=start), jnp.zeros((), jnp.int32))
    return prepared.solver.decode(jax.lax.fori_loop(0, count, lambda _, s: model(*s, prepared), state)[0])


def model_run(model, u, start, count):
    return np.asarray(_model_run(model, jnp.asarray(u), jnp.asarray(start), jnp.asarray(count)))


@pytest.mark.usefixtures("x64")
def test_two_dimensional_band_force_acts_on_the_velocity():
    """Spectral2D steps the vorticity: its rate is that of the velocity with the same force."""
    forcing = _isotropic()
    with_force, without = (solver_of("spectral", FLAT, 0.0, f).prepare(np.float64) for f in (forcing, None))
    u = random_flow(without, 1, mean=(0.2, 0.1))
    gained = bare_rate(with_force, u)[1] - bare_rate(without, u)[1]
    # the noise is of single precision, and its last digit depends on the program that it is compiled into
    assert relative(gained, _band(forcing, without, u, 0.0)) <= 2e-7


# --- what cannot be --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("make", "message"), [
    (lambda: Kolmogorov(0), "wavenumber: a Kolmogorov force needs a positive whole number, found 0"),
    (lambda: LinearDrag(-0.1), "drag: must not be negative, found -0.1"),
    (lambda: Linear(float("nan")), "rate: must be finite"),
    (lambda: Isotropic(-1.0), "power: must be finite and not negative"),
    (lambda: Isotropic(randomness=float("inf")), "randomness: must be finite and not negative"),
    (lambda: Isotropic(wavenumber=0), "wavenumber: needs a positive whole number"),
    (lambda: Isotropic(interval=0.0), "interval: must be positive and finite"),
    (lambda: Isotropic(seed=-1), "seed: needs a whole number"),
    (lambda: NavierStokes(-1.0), "viscosity: must be finite and not negative"),
    (lambda: NavierStokes(scalars={"u": 0.1}), "'u' cannot name a scalar"),
    (lambda: NavierStokes(scalars={"energy": 0.1}), "'energy' cannot name a scalar"),
    (lambda: NavierStokes(scalars={"my dye": 0.1}), "'my dye' cannot name a scalar"),
    (lambda: NavierStokes(scalars={"dye": -0.1}), "scalars.dye: the diffusivity must be finite and not negative"),
    (lambda: solver_of("spectral", cube(8), 0.1, Isotropic(1.0, 4)), "the band up to 4 does not fit on a grid of shape"),
    (lambda: solver_of("spectral", cube(8), 0.1, Kolmogorov(4)), "4 waves need over 8 cells along y, not 8"),
    (lambda: solver_of("spectral", cube(8), 0.1, UniformForce((1.0, 0.0))), "found 2 entries for 3 axes"),
])  # fmt: skip
def test_impossible_forces_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_isotropic_forcing_needs_a_periodic_box():
    grid = Grid((8, 8), (1.0, 1.0), ("periodic", "no_slip"))
    with pytest.raises(ValueError, match="needs periodic boundaries"):
        Isotropic(1.0).check_grid(grid)
