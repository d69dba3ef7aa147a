"""Kuramoto–Sivashinsky in one dimension: growth, order, symmetry, budget, statistics, closures, gradients, and a peer's solver."""

from functools import partial

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flows import TWO_PI, evolve, learned, randomised, relative, steps

from hybridsim.check import wide_values
from hybridsim.contract import Flux, Source, View
from hybridsim.corrections.eddy import Hyperviscosity, Leith, Smagorinsky
from hybridsim.grid import Grid, resample
from hybridsim.model import Model, State, rollout
from hybridsim.solvers.initial import RandomWaves
from hybridsim.solvers.kuramoto_sivashinsky import (
    FiniteVolumeKS,
    KuramotoSivashinsky,
    SpectralKS,
    burgers_flux,
    inverse_real_transform,
    real_transform,
    square_transform,
)
from hybridsim.solvers.steppers import ETDRK2, ETDRK4, SSPRK3, CrankNicolsonRK4

BOTH = ("spectral", "finite_volume")
ALL = [
    ("spectral", {}),
    ("spectral", {"dealias": "two_thirds"}),
    ("spectral", {"dealias": "none"}),
    ("finite_volume", {}),
    ("finite_volume", {"convection": "van_leer"}),
]
IDS = ["hou_li", "two_thirds", "none", "central", "van_leer"]


def ks(kind, n=32, length=22.0, viscosity=1.0, **options):
    make = SpectralKS if kind == "spectral" else FiniteVolumeKS
    return make(Grid((n,), (length,)), KuramotoSivashinsky(viscosity), **options)


def waves(solver, seed=0, mean=0.0, modes=4, dtype=np.float64):
    """A smooth random state of order one, the same function on every grid."""
    rng = np.random.default_rng(seed)
    (x,), (length,) = solver.grid.mesh(), solver.grid.lengths
    u = mean + np.zeros_like(x)
    for m in range(1, modes + 1):
        u = u + rng.standard_normal() * np.cos(TWO_PI * m / length * x + rng.uniform(0, TWO_PI))
    return u[None].astype(dtype)


def view_of(solver, u, dt=0.05):
    u = jnp.asarray(u)
    return View(u, jnp.zeros((), u.dtype), jnp.asarray(dt, u.dtype), solver.prepare(u.dtype))


def bare_rate(solver, z):
    """N(z)."""
    return solver.explicit(z, jnp.zeros(()), lambda q, t: None)


def total_rate(solver, z):
    """dz/dt = L z + N(z)."""
    rate = bare_rate(solver, z)
    return {**rate, "u": rate["u"] + solver.linear()["u"] * z["u"]}


@eqx.filter_jit
def closure_rates(solver, closures, states):
    """What each Flux closure does to each state, in physical space: `(closure, state, 1, n)`."""

    def one(closure, u):
        z = solver.encode(u)
        return solver.decode({**z, **solver.receive(closure(view_of(solver, u)), None)})

    return jnp.stack([jax.vmap(partial(one, closure))(jnp.asarray(states)) for closure in closures])


@eqx.filter_jit
def restricted(solver, u, fine):
    return solver.restrict(u, fine.grid, fine.variables)


# --- the transforms --------------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("n", [4, 12, 30, 33, 512])
def test_real_transforms_are_those_of_numpy(n):
    @jax.jit
    def transforms(u):
        hat = real_transform(u)
        return hat, inverse_real_transform(hat, n), square_transform(hat, n)

    for dtype in (np.float32, np.float64):
        u = np.random.default_rng(n).standard_normal(n).astype(dtype)
        exact, exact_square = (np.fft.rfft(q) for q in (u.astype(np.float64), u.astype(np.float64) ** 2))
        hat, back, square = (np.asarray(a) for a in transforms(jnp.asarray(u)))
        assert back.dtype == hat.real.dtype == dtype
        limit = 8 * np.finfo(dtype).eps
        assert relative(hat, exact) <= limit
        assert hat[0].imag == 0
        assert n % 2 or hat[-1].imag == 0
        assert relative(back, u) <= limit
        assert relative(square, exact_square) <= limit
        assert relative(np.fft.rfft(np.roll(u, 1)), exact) > 10 * limit  # the comparison can fail


def test_burgers_flux_is_godunovs():
    left, right = np.meshgrid(np.linspace(-2, 2, 41), np.linspace(-2, 2, 41), indexing="ij")
    between = np.linspace(left, right, 401)
    exact = np.where(left <= right, (between**2 / 2).min(axis=0), (between**2 / 2).max(axis=0))
    np.testing.assert_allclose(burgers_flux(jnp.asarray(left), jnp.asarray(right)), exact, rtol=0, atol=1e-4)
    np.testing.assert_allclose(burgers_flux(jnp.asarray(left), jnp.asarray(left)), left**2 / 2, rtol=1e-6, atol=1e-7)


# --- linear growth ---------------------------------------------------------------------------------------------------------------

# q² − q⁴ for q = 2πm/22, m = 1 … 6
RATES = (0.0749138065, 0.2198171623, 0.1951958759, -0.3981403718, -2.1190580277, -5.6860996659)


def growth(solver, m, stepper=None, closures=(), evaluate=(), total=1.0):
    """The measured rate of a wave of amplitude 1e-8."""
    (x,), (length,) = solver.grid.mesh(), solver.grid.lengths
    u = 1e-8 * np.cos(TWO_PI * m / length * x + 0.4)[None]
    after = evolve(solver, stepper or ETDRK4(), u, total / 20, 20, closures, evaluate)
    amplitude = [np.abs(np.fft.rfft(q[0])[m]) for q in (u, after)]
    return np.log(amplitude[1] / amplitude[0]) / total


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(("stepper", "n"), [(ETDRK2(), 64), (ETDRK4(), 63)], ids=["etdrk2", "etdrk4"])
def test_linear_growth_of_the_spectral_solver(stepper, n):
    solver = ks("spectral", n)
    for m, rate in enumerate(RATES, 1):
        q = TWO_PI * m / 22
        assert q**2 - q**4 == pytest.approx(rate, abs=1e-10)
        assert growth(solver, m, stepper) == pytest.approx(q**2 - q**4, rel=1e-10)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(
    "options", [{}, pytest.param({"convection": "van_leer"}, marks=pytest.mark.slow)], ids=["central", "van_leer"]
)
def test_linear_growth_of_the_finite_volume_solver(options):
    errors = {m: [] for m in range(1, 7)}
    for n in (64, 129, 256):
        solver = ks("finite_volume", n, **options)
        (h,) = solver.grid.spacing
        for m in errors:
            q = TWO_PI * m / 22
            kappa = 2 / h * np.sin(q * h / 2)
            rate = growth(solver, m, total=3.0 if m < 5 else 1.0)
            assert rate == pytest.approx(kappa**2 - kappa**4, rel=1e-12 if not options else 1e-7)
            errors[m].append((h, abs(rate - (q**2 - q**4))))
    for m, ((h1, e1), (h2, e2)) in ((m, pairs[1:]) for m, pairs in errors.items()):
        order = np.log(e1 / e2) / np.log(h1 / h2)
        print(m, "order", order)
        assert order == pytest.approx(2, abs=0.05)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("kind", BOTH)
def test_a_domain_of_two_pi_with_small_viscosity_is_the_same_flow(kind):
    """x = y/s, t = τ/s², u = s v with s = 2π/L."""
    s = TWO_PI / 22
    long, short = ks(kind, 32), ks(kind, 32, TWO_PI, s * s)
    u = waves(long, 1)
    a = evolve(long, ETDRK4(), u, 0.05, 40)
    b = s * evolve(short, ETDRK4(), u / s, 0.05 * s * s, 40)
    assert relative(b, a) <= 1e-12
    assert relative(evolve(ks(kind, 32, 22, 1.01), ETDRK4(), u, 0.05, 40), a) > 1e-3  # negative control


# --- order in time ---------------------------------------------------------------------------------------------------------------


class Kicks(Source):
    """s = cos(3t) sin(2kx): known only if every stage has its own time."""

    def __call__(self, view, memory=None, key=None):
        (x,) = view.grid.mesh()
        return (jnp.cos(3 * view.t) * jnp.asarray(np.sin(2 * TWO_PI / view.grid.lengths[0] * x), view.u.dtype))[None]


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(("kind", "options"), ALL[:1] + ALL[3:4], ids=["spectral", "finite_volume"])
@pytest.mark.parametrize(
    ("stepper", "order", "counts"),
    [
        (ETDRK2(), 2, (80, 160, 320)),
        (ETDRK4(), 4, (80, 160, 320)),
        pytest.param(CrankNicolsonRK4(), 2, (80, 160, 320), marks=pytest.mark.slow),
    ],
    ids=["etdrk2", "etdrk4", "crank_nicolson_rk4"],
)
def test_order_in_time(kind, options, stepper, order, counts):
    solver = ks(kind, 24, **options)
    u = waves(solver, 2, mean=0.3)
    run = lambda s, n: evolve(solver, s, u, 2.0 / n, n, (Kicks(),), ("stage",))  # noqa: E731
    exact = run(ETDRK4(), 2560)
    errors = np.array([np.abs(run(stepper, n) - exact).max() for n in counts])
    rates = np.log2(errors[:-1] / errors[1:])
    print(kind, type(stepper).__name__, rates, errors)
    assert abs(rates[-1] - order) <= 0.15


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("convection", ["central", pytest.param("van_leer", marks=pytest.mark.slow)])
def test_finite_volumes_are_of_second_order_in_space(convection):
    fine = ks("spectral", 64).prepare(np.float64)
    u = waves(fine, 3)
    exact = evolve(fine, ETDRK4(), u, 0.02, 50)
    errors = []
    for n in (96, 192, 384):
        solver = ks("finite_volume", n, convection=convection)
        start, end = (np.asarray(restricted(solver, q, fine)) for q in (u, exact))
        errors.append(np.sqrt(np.mean((evolve(solver, ETDRK4(), start, 0.02, 50) - end) ** 2)))
    rates = np.log2(np.array(errors[:-1]) / errors[1:])
    print(convection, errors, rates)
    assert abs(rates[-1] - 2) <= (0.1 if convection == "central" else 0.35)  # the limiter clips extrema


# --- sums ------------------------------------------------------------------------------------------------------------------------


def cases(dtype):
    return {
        "bare": (),
        "closed": (Smagorinsky(0.3), Hyperviscosity(0.3), learned(1, 0.1, dtype=dtype, dims=1)),
    }


def drifts(frames):
    """|Σu_n − Σu_0| / Σ|u_0| in double precision, from the second frame on."""
    double = np.asarray(frames, np.float64)[:, 0]
    return np.abs((double - double[0]).sum(axis=1)[1:]) / np.abs(double[0]).sum()


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(("case", "n"), [("bare", 33), ("closed", 32)])
@pytest.mark.parametrize("kind", BOTH)
def test_the_mean_is_conserved(kind, case, n):
    for dtype, limit, root in ((np.float64, 1e-13, 1e-13), (np.float32, 1e-7, 5e-8)):
        solver = ks(kind, n)
        model = Model(solver, ETDRK4(), 0.1, cases(dtype)[case])
        frames = np.asarray(steps(model, waves(solver, 4, mean=0.4, dtype=dtype), 200)[0])
        assert frames.dtype == dtype
        assert np.isfinite(frames).all()
        each = [drifts(frames[i : i + 2])[0] for i in range(200)]
        over = drifts(frames) / np.sqrt(np.arange(1, 201))
        print(kind, case, dtype.__name__, "one step", max(each), "accumulated over √steps", over.max())
        assert max(each) <= limit
        assert over.max() <= root
        assert relative(frames[-1], frames[0]) > 0.1


class Lift(Source):
    """s = 1."""

    def __call__(self, view, memory=None, key=None):
        return jnp.ones_like(view.u)


def worst_drift(solver, make, weights, dtype, count=6, dt=0.01):
    """Drift of one step over Σ|u| + Δt/Δx Σ|F|, up to the first step that is not finite; weights are many at once."""
    u = jnp.asarray(waves(solver, 1, mean=0.3, dtype=dtype))

    @jax.jit
    @jax.vmap
    def run(arrays):
        closure = make(arrays)
        frames, _ = steps(Model(solver, ETDRK4(), dt, (closure,)), u, count)

        def fluxes(q):
            out = closure(view_of(solver, q, dt))
            return jnp.sum(q * q) + (jnp.sum(jnp.abs(out)) if isinstance(closure, Flux) else 0)

        return frames, jax.vmap(fluxes)(frames[:-1])

    frames, flux = (np.asarray(a, np.float64) for a in run(weights))
    frames = frames[:, :, 0]
    finite = np.isfinite(frames).all(axis=2)
    finite = np.cumprod(finite, axis=1).astype(bool)[:, 1:]
    sums = np.abs(np.where(np.isfinite(frames), frames, 0)).sum(axis=2)
    # the fluxes of later stages are those of what the first one left
    scale = np.maximum(sums[:, :-1] + dt / solver.grid.spacing[0] * flux, sums[:, 1:])
    with np.errstate(invalid="ignore", over="ignore"):
        change = np.abs(np.diff(frames, axis=1).sum(axis=2)) / scale
    return change[finite].max(), finite


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("inputs", ["velocity", pytest.param("gradient", marks=pytest.mark.slow)])
@pytest.mark.parametrize("kind", BOTH)
def test_flux_closures_keep_the_sum_for_any_weights(kind, inputs):
    for dtype, limit in ((np.float64, 1e-14), (np.float32, 1e-7)):
        made = [
            randomised(learned(0, dtype=dtype, dims=1, inputs=inputs), seed, std)
            for std in (0.1, 1.0, 10.0, 100.0)
            for seed in range(50)
        ]
        weights = jax.tree.map(lambda *a: jnp.stack(a), *[eqx.filter(c, eqx.is_inexact_array) for c in made])
        fixed = eqx.filter(made[0], eqx.is_inexact_array, inverse=True)
        solver = ks(kind, 33 if dtype == np.float64 else 32)
        worst, finite = worst_drift(solver, lambda arrays, fixed=fixed: eqx.combine(arrays, fixed), weights, dtype)
        print(kind, inputs, dtype.__name__, "random weights: drift", worst, "blown up", (~finite[:, -1]).sum())
        assert worst <= limit
        assert finite[:50].all()


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("kind", BOTH)
def test_a_source_closure_breaks_the_sum(kind):
    worst, finite = worst_drift(ks(kind), lambda _: Lift(), jnp.zeros((1,)), np.float64)
    assert finite.all()
    assert worst > 1e-3


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(("kind", "options"), ALL, ids=IDS)
def test_the_nyquist_mode_is_benign(kind, options):
    """The fastest wave that the grid has: dropped by the spectral solver, real and damped in the other, never growing."""
    solver = ks(kind, 32, **options)
    u = waves(solver, 1)
    fast = 0.1 * np.cos(np.pi * np.arange(32))[None]
    z = jax.jit(solver.encode)(jnp.asarray(u + fast))
    assert z["u"][0].imag == z["u"][-1].imag == 0
    rate = jax.jit(lambda z: total_rate(solver, z))(z)
    assert rate["u"][0] == 0
    assert rate["u"][-1].imag == 0
    if kind == "spectral":
        assert z["u"][-1] == rate["u"][-1] == 0
    else:
        assert relative(jax.jit(solver.decode)(z), u + fast) <= 1e-14
    after = evolve(solver, ETDRK4(), u + fast, 0.1, 50)
    assert np.isfinite(after).all()
    assert abs(np.fft.rfft(after[0])[-1]) < 0.01 * abs(np.fft.rfft(fast[0])[-1])


# --- symmetries ------------------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(("kind", "options"), ALL, ids=IDS)
def test_translation_and_reflection(kind, options):
    n = 33 if options else 32
    solver = ks(kind, n, **options)
    closures = (Smagorinsky(0.2), Hyperviscosity(0.2))
    u = waves(solver, 5, mean=0.2)
    run = lambda q: evolve(solver, ETDRK4(), q, 0.05, 60, closures, ("stage", "step"))  # noqa: E731
    plain = run(u)
    moved, mirrored = np.roll(run(np.roll(u, 7, 1)), -7, 1), -run(-u[:, ::-1])[:, ::-1]
    print(kind, options, n, relative(moved, plain), relative(mirrored, plain))
    assert relative(moved, plain) <= 1e-12
    assert relative(mirrored, plain) <= 1e-12
    assert relative(run(u[:, ::-1])[:, ::-1], plain) > 0.1  # negative control: reflection without the sign


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(("stepper", "counts"), [(ETDRK2(), (80, 160, 320)), (ETDRK4(), (80, 160, 320))], ids=["etdrk2", "etdrk4"])
def test_galilean_invariance_to_the_order_in_time(stepper, counts):
    """u + c seen by an observer who moves with c, here 5 cells in a unit of time."""
    solver = ks("spectral", 32, dealias="two_thirds")
    u = waves(solver, 6)
    c = 5 * solver.grid.spacing[0]
    errors = []
    for n in counts:
        rest, moving = (evolve(solver, stepper, u + mean, 2.0 / n, n) for mean in (0.0, c))
        errors.append(np.abs(np.roll(rest, 10, 1) + c - moving).max())
    rates = np.log2(np.array(errors[:-1]) / errors[1:])
    print(type(stepper).__name__, errors, rates)
    assert abs(rates[-1] - stepper.order) <= 0.15


@pytest.mark.usefixtures("x64")
def test_galilean_invariance_of_the_default_mask_and_of_finite_volumes():
    errors = {}
    for kind, sizes in (("spectral", (64,)), ("finite_volume", (64, 128, 256))):
        for n in sizes:
            solver = ks(kind, n)
            u = waves(solver, 6)
            c = 22 / 16
            rest, moving = (evolve(solver, ETDRK4(), u + mean, 0.002, 500) for mean in (0.0, c))
            errors[kind, n] = np.abs(np.roll(rest, n // 16, 1) + c - moving).max()
    print(errors)
    assert errors["spectral", 64] <= 1e-8
    assert errors["finite_volume", 128] / errors["finite_volume", 256] == pytest.approx(4, abs=0.2)


# --- the budget of u² ------------------------------------------------------------------------------------------------------------


@eqx.filter_jit
def budget(solver, u):
    """⟨u, du/dt⟩, ⟨u_x²⟩, ⟨u_xx²⟩ and ⟨u, N(u)⟩ Δx / ⟨|u|³⟩ of the state next to u, by the solver's own operators."""
    z = solver.encode(u)
    u = solver.decode(z)
    slope = solver.gradient(u)[0, 0]
    curvature, _ = solver.derivative(slope, solver.flux_place(0, 0), 0)
    work = [jnp.mean(u * solver.decode({**z, **rate(solver, z)})) for rate in (total_rate, bare_rate)]
    return work[0], jnp.mean(slope**2), jnp.mean(curvature**2), work[1] * solver.grid.spacing[0] / jnp.mean(jnp.abs(u) ** 3)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("n", [32, 33, 48])
def test_the_budget_of_the_square(n):
    for seed in range(5):
        u = 0.3 + np.random.default_rng(seed).standard_normal((1, n))
        for solver in (ks("spectral", n, dealias="two_thirds"), ks("finite_volume", n)):
            change, gained, lost, nonlinear = budget(solver, u)
            assert abs(change - gained + lost) <= 1e-12 * (gained + lost)
            assert abs(nonlinear) <= 1e-14
        # negative controls: aliasing makes u², limited upwind fluxes take it
        assert abs(budget(ks("spectral", n, dealias="none"), u)[3]) > 1e-4
        assert budget(ks("finite_volume", n, convection="van_leer"), u)[3] < -1e-3


# --- statistics ------------------------------------------------------------------------------------------------------------------

MEAN_SQUARE = {22.0: 1.407, 60.0: 1.711, 100.0: 1.734}


def mean_square(solver, members, total, dt=0.25, spin_up=200.0, dtype=np.float64):
    """⟨u²⟩ per member, in time and space, on the attractor."""
    model = Model(solver, ETDRK4(), dt)

    @eqx.filter_jit
    @jax.vmap
    def one(key):
        u = RandomWaves()(key, solver.grid, (solver.grid.centre,), dtype)
        u = rollout(model, State(u), 1, every=round(spin_up / dt)).u[0]
        return jnp.mean(rollout(model, State(u), round(total / 2), every=round(2 / dt)).u ** 2)

    return np.asarray(one(jax.random.split(jax.random.key(3), members)))


@pytest.mark.usefixtures("x64")
def test_mean_square_of_the_small_domain():
    found = mean_square(ks("spectral", 32), 128, 1000.0)
    error = found.std(ddof=1) / np.sqrt(found.size)
    print("<u²> at L = 22:", found.mean(), "±", error)
    assert error < 0.005
    assert found.mean() == pytest.approx(MEAN_SQUARE[22.0], rel=0.02)
    assert found.min() > 1  # every member is still chaotic


@pytest.mark.slow
@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(("kind", "dtype"), [("spectral", np.float64), ("spectral", np.float32), ("finite_volume", np.float64)])
@pytest.mark.parametrize(("length", "n"), [(22.0, 48), (60.0, 128), (100.0, 192)])
def test_mean_square(length, n, kind, dtype):
    solver = ks(kind, n if kind == "spectral" else 4 * n, length)
    found = mean_square(solver, 64, 2000.0, 0.25 if kind == "spectral" else 0.1, dtype=dtype)
    error = found.std(ddof=1) / np.sqrt(found.size)
    print(kind, np.dtype(dtype), "<u²> at L =", length, ":", found.mean(), "±", error)
    assert error < 0.005
    assert found.mean() == pytest.approx(MEAN_SQUARE[length], rel=0.02)


# --- filters and consistency -----------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("n", [16, 15, 24])
def test_restriction(n):
    fine = ks("spectral", 48)
    u = waves(fine, 7, mean=0.2, modes=7)
    for options in ({}, {"dealias": "none"}):
        cut = restricted(ks("spectral", n, **options), u, fine)
        assert relative(cut, waves(ks("spectral", n), 7, mean=0.2, modes=7)) <= 1e-13
    shorter = np.asarray(restricted(ks("spectral", n, dealias="two_thirds"), u, fine))
    assert np.abs(np.fft.rfft(shorter[0]))[: int(np.ceil(n / 3))].min() > 1e-3
    assert np.abs(np.fft.rfft(shorter[0]))[int(np.ceil(n / 3)) :].max(initial=0) <= 1e-13
    # the mean over a cell of a function is the difference of its integral at the faces
    coarse = ks("finite_volume", n)
    (x,), (h,) = coarse.grid.coordinates((1.0,)), coarse.grid.spacing
    k = TWO_PI / 22 * np.fft.rfftfreq(48, 1 / 48)
    hat = np.fft.rfft(u[0]) / 48 * np.exp(-0.5j * k * 22 / 48) * np.where(k > 0, 2, 1)
    integral = lambda at: sum((c / (1j * q) * np.exp(1j * q * at)).real for c, q in zip(hat[1:], k[1:], strict=True))  # noqa: E731
    exact = hat[0].real + (integral(x) - integral(x - h)) / h
    means = restricted(coarse, u, fine)
    assert relative(means, exact[None]) <= 1e-13
    assert relative(jax.jit(coarse.project)(means), means) <= 1e-14


@pytest.mark.usefixtures("x64")
def test_restriction_between_finite_volumes_takes_means_of_means():
    fine = ks("finite_volume", 48)
    u = np.random.default_rng(1).standard_normal((1, 48))
    found = restricted(ks("finite_volume", 16), u, fine)
    np.testing.assert_allclose(found, u.reshape(1, 16, 3).mean(axis=2), rtol=0, atol=1e-15)
    np.testing.assert_array_equal(restricted(fine, u, fine), u)
    for kind in BOTH:
        with pytest.raises(ValueError, match="must span the same box"):
            restricted(ks(kind, 16, 23.0), u, fine)


class Recorded(Source):
    """s at every stage from a list made beforehand; notes the states that it was called with."""

    sources: list
    seen: list

    def __call__(self, view, memory=None, key=None):
        self.seen.append(view.u)
        return self.sources[len(self.seen) - 1]


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(("kind", "stepper", "dt"), [
    ("spectral", ETDRK2(), 0.05),
    ("spectral", ETDRK4(), 0.05),
    ("finite_volume", SSPRK3(), 0.01),  # coarse and fine symbols of finite volumes differ: all of the rate must be explicit
], ids=["etdrk2", "etdrk4", "ssprk3"])  # fmt: skip
def test_with_the_exact_source_the_coarse_run_is_the_filtered_fine_run(kind, stepper, dt):
    """s = restrict(N(u_fine)) − N_coarse(restrict(u_fine)) at every stage: what is missing, and nothing else."""
    options = {"dealias": "two_thirds"} if kind == "spectral" else {}
    fine, coarse = (ks(kind, n, **options).prepare(np.float64) for n in (48, 24))
    average = kind == "spectral"  # the other filter: means instead of a cut, or a cut instead of means
    filters = {
        "own": lambda q: coarse.restrict(q, fine.grid, fine.variables),
        "other": lambda q: coarse.project(resample(q, (24,), (0.5,), (0.5,), (average,), average)),
    }
    of = total_rate if kind == "finite_volume" else bare_rate
    rate = lambda solver, z: solver.decode({**z, **of(solver, z)})  # noqa: E731

    @jax.jit
    def fine_step(z):
        stages, sources = [], {name: [] for name in filters}

        def watch(z, t):
            q = fine.decode(z)
            stages.append(filters["own"](q))
            for name, restrict in filters.items():
                sources[name].append(restrict(rate(fine, z)) - rate(coarse, coarse.encode(restrict(q))))

        coefficients = stepper.prepare(fine, dt, np.float64)
        z = stepper(fine, coefficients, z, jnp.zeros(()), jnp.asarray(dt), watch)
        return z, stages, sources, filters["own"](fine.decode(z))

    @jax.jit
    def coarse_step(z, sources):
        closure = Recorded(sources, [])
        model = Model(coarse, stepper, dt, (closure,), "stage")
        z, _, _ = model(z, model.init_carry(coarse.decode(z)), jnp.zeros((), jnp.int32))
        assert len(closure.seen) == len(sources) == stepper.stages
        return z, closure.seen, coarse.decode(z)

    z = jax.jit(lambda q: fine.encode(q))(jnp.asarray(waves(fine, 8, mean=0.2, modes=10)))
    start = jax.jit(lambda z: filters["own"](fine.decode(z)))(z)
    runs = dict.fromkeys(filters, jax.jit(lambda q: coarse.encode(q))(start))
    errors = dict.fromkeys(filters, 0.0)
    for _ in range(10):
        z, stages, sources, end = fine_step(z)
        for name in filters:
            runs[name], seen, after = coarse_step(runs[name], sources[name])
            errors[name] = max(errors[name], *(relative(x, y) for x, y in zip([*seen, after], [*stages, end], strict=True)))
    bare = relative(evolve(coarse, stepper, np.asarray(start), dt, 10), end)
    print(kind, type(stepper).__name__, errors, "bare", bare)
    assert errors["own"] <= 1e-12
    assert errors["other"] > 1e-3  # negative control
    assert bare > 1e-3


# --- closures --------------------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(("kind", "stepper", "when", "dtype"), [
    ("spectral", ETDRK4(), "step", np.float32),
    ("spectral", ETDRK2(), "stage", np.float64),
    ("finite_volume", ETDRK4(), "stage", np.float32),
    ("finite_volume", ETDRK2(), "step", np.float64),
])  # fmt: skip
def test_a_zero_initialised_closure_is_the_bare_solver(kind, stepper, when, dtype):
    solver = ks(kind)
    u = waves(solver, 1, mean=0.3, dtype=dtype)
    bare, same, other = (
        np.asarray(steps(Model(solver, stepper, 0.05, c, when if c else ()), u, 1)[0][1])
        for c in ((), (learned(5, dims=1),), (learned(5, 0.1, dims=1),))
    )
    limit = 4 * np.finfo(dtype).eps * np.abs(u).max()
    assert np.abs(bare - same).max() <= limit
    assert np.abs(bare - other).max() > 10 * limit


class Viscous(Flux):
    """F = −ν ∂x u."""

    viscosity: float = 0.3

    def __call__(self, view, memory=None, key=None):
        return -self.viscosity * view.gradient()


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("kind", BOTH)
def test_a_flux_closure_enters_with_the_right_sign_and_place(kind):
    solver = ks(kind, 64)
    (h,) = solver.grid.spacing
    for m in (1, 3, 5):
        q = TWO_PI * m / 22
        q = q if kind == "spectral" else 2 / h * np.sin(q * h / 2)
        found = growth(solver, m, closures=(Viscous(0.3),), evaluate=("stage",))
        assert found == pytest.approx(0.7 * q**2 - q**4, rel=1e-5)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(("kind", "n"), [("spectral", 64), ("finite_volume", 63)])
def test_hyperviscosity_damps_each_mode_as_it_says(kind, n):
    solver = ks(kind, n)
    (x,), (h,) = solver.grid.mesh(), solver.grid.spacing
    modes, orders = TWO_PI / 22 * np.array([1, 5, 11]), (1, 2, 3)
    fluctuation = 1.3 * np.cos(modes[:, None, None] * x + 0.2)
    found = closure_rates(solver, [Hyperviscosity(0.7, p) for p in orders], 0.4 + fluctuation)
    kappa = modes if kind == "spectral" else 2 / h * np.sin(modes * h / 2)
    for p, rates in zip(orders, found, strict=True):
        damping = 0.7 * 1.3 / np.sqrt(2) / h * (kappa * h / np.pi) ** (2 * p)
        np.testing.assert_allclose(rates, -damping[:, None, None] * fluctuation, rtol=0, atol=1e-13)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("kind", BOTH)
def test_smagorinsky_in_one_dimension(kind):
    """F = −(c_s Δ)² |∂x u| ∂x u for u = sin kx."""
    solver = ks(kind, 64).prepare(np.float64)
    (x,), (h,), k = solver.grid.mesh(), solver.grid.spacing, TWO_PI / 22 * 2
    flux = np.asarray(Smagorinsky(0.3)(view_of(solver, np.sin(k * x)[None])))
    (face,) = solver.grid.mesh(solver.flux_place(0, 0))
    exact = -((0.3 * h) ** 2) * np.abs(k * np.cos(k * face)) * k * np.cos(k * face)
    tolerance = 1e-12 if kind == "spectral" else 2e-2
    assert np.abs(flux[0, 0] - exact).max() <= tolerance * np.abs(exact).max()
    with pytest.raises(ValueError, match="Leith: the enstrophy cascade is two-dimensional"):
        Leith(0.2)(view_of(solver, np.sin(k * x)[None]))


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(("kind", "options"), ALL[:4], ids=IDS[:4])
def test_eddy_viscosities_only_remove_energy(kind, options):
    n = 33 if options else 32
    solver = ks(kind, n, **options)
    states = np.random.default_rng(0).standard_normal((5, 1, n))
    states = np.asarray(jax.jit(jax.vmap(solver.project))(jnp.asarray(states)))
    rates = np.asarray(closure_rates(solver, [Smagorinsky(0.3), Hyperviscosity(0.5, 1), Hyperviscosity(0.5, 3)], states))
    assert ((states * rates).sum(axis=(2, 3)) < 0).all()
    assert (np.abs(rates.sum(axis=3)) <= 1e-13 * np.abs(rates).sum(axis=3)).all()


@pytest.mark.usefixtures("x64")
def test_the_same_instance_serves_both_solvers():
    """A well-resolved state: one and the same closure object does the same in both solvers."""
    closures = [Smagorinsky(0.4), Hyperviscosity(0.5), learned(3, 0.3, dims=1, inputs="gradient"), learned(3, 0.3, dims=1)]
    rates = [np.asarray(closure_rates(ks(kind, 128), closures, waves(ks(kind, 128), 2)[None])) for kind in BOTH]
    for spectral, finite_volume in zip(*rates, strict=True):
        assert np.abs(spectral).max() > 1e-5
        assert np.linalg.norm(spectral - finite_volume) < 0.05 * np.linalg.norm(spectral)


# --- gradients -------------------------------------------------------------------------------------------------------------------


def _normal(tree, seed):
    leaves, structure = jax.tree.flatten(tree)
    keys = jax.random.split(jax.random.key(seed), len(leaves))
    return jax.tree.unflatten(structure, [jax.random.normal(k, a.shape, a.dtype) for k, a in zip(keys, leaves, strict=True)])


def _dot(a, b):
    return sum(float(jnp.vdot(x, y)) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True))


def _norm(a):
    return _dot(a, a) ** 0.5


def setting(kind, stepper, dt, closures, n=16, **options):
    """(parameters, function of them, steps and levels -> final state)."""
    weights, fixed = eqx.partition(closures, eqx.is_inexact_array)
    parameters = {"state": jnp.asarray(waves(ks(kind, n), 4, mean=0.2)), "viscosity": jnp.asarray(1.1)}
    if closures:
        parameters["weights"] = weights

    def final(p, count, levels):
        solver = ks(kind, n, 22.0, p["viscosity"], **options)
        model = Model(solver, stepper, dt, eqx.combine(p["weights"], fixed) if closures else ())
        return rollout(model, State(p["state"]), 1, every=count, checkpoint_levels=levels).u[0]

    return parameters, final


def mismatch(parameters, final, count, levels):
    """|⟨Jv, w⟩ − ⟨v, Jᵀw⟩| / (|Jv| |w|), the worst parameter: Jv by forward mode, Jᵀw by reverse mode."""
    names = sorted(parameters)
    directions = {name: _normal(parameters[name], i) for i, name in enumerate(names)}
    w = _normal(parameters["state"], 99)
    zero = jax.tree.map(jnp.zeros_like, parameters)
    rows = [{**zero, name: directions[name]} for name in names]
    tangents = jax.tree.map(lambda *leaves: jnp.stack(leaves), *rows)
    pushed = jax.jit(lambda p: jax.lax.map(lambda v: jax.jvp(partial(final, count=count, levels=0), (p,), (v,))[1], tangents))(
        parameters
    )
    worst = 0.0
    for level in levels:
        pulled = jax.jit(lambda p, level=level: jax.vjp(partial(final, count=count, levels=level), p)[1](w)[0])(parameters)
        for i, name in enumerate(names):
            assert _norm(pushed[i]) > 1e-6
            gap = abs(_dot(pushed[i], w) - _dot(directions[name], pulled[name]))
            worst = max(worst, gap / (_norm(pushed[i]) * _norm(w)))
    return worst


def closures_for_gradients():
    return {
        "bare": (),
        "learned": (learned(3, 0.1, dtype=np.float64, dims=1),),
        "smagorinsky": (Smagorinsky(jnp.asarray(0.3)),),
        "hyperviscosity": (Hyperviscosity(jnp.asarray(0.3)),),
    }


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(("kind", "stepper", "dt", "case", "options"), [
    ("spectral", ETDRK4(), 0.1, "learned", {}),
    ("finite_volume", ETDRK2(), 0.05, "bare", {}),
    *(pytest.param(*row, marks=pytest.mark.slow) for row in (
        ("spectral", ETDRK4(), 0.1, "bare", {}),
        ("spectral", ETDRK2(), 0.05, "bare", {"dealias": "two_thirds"}),
        ("spectral", ETDRK2(), 0.05, "hyperviscosity", {}),
        ("spectral", CrankNicolsonRK4(), 0.05, "bare", {}),
        ("spectral", SSPRK3(), 0.01, "bare", {}),
        ("finite_volume", ETDRK4(), 0.1, "bare", {}),
        ("finite_volume", ETDRK4(), 0.1, "learned", {"convection": "van_leer"}),
        ("finite_volume", ETDRK2(), 0.05, "smagorinsky", {}),
        ("finite_volume", CrankNicolsonRK4(), 0.05, "bare", {}),
        ("finite_volume", SSPRK3(), 0.01, "bare", {}),
    )),
])  # fmt: skip
def test_adjoint_through_a_hundred_steps(kind, stepper, dt, case, options):
    parameters, final = setting(kind, stepper, dt, closures_for_gradients()[case], **options)
    found = mismatch(parameters, final, 100, (0, 2))
    print(kind, type(stepper).__name__, case, found)
    assert found <= 1e-12


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(("kind", "stepper", "case"), [("spectral", ETDRK4(), "learned"), ("finite_volume", ETDRK2(), "bare")])
def test_gradients_equal_central_differences(kind, stepper, case):
    parameters, final = setting(kind, stepper, 0.1, closures_for_gradients()[case])
    target = jnp.asarray(waves(ks(kind, 16), 11))
    loss = jax.jit(lambda p: jnp.mean((final(p, 5, 0) - target) ** 2))
    gradient = jax.jit(jax.grad(loss))(parameters)
    for i, name in enumerate(parameters):
        direction = _normal(parameters[name], 50 + i)
        slope = _dot(gradient[name], direction)

        def difference(h, name=name, direction=direction):
            at = lambda s: float(loss({**parameters, name: jax.tree.map(lambda p, d: p + s * d, parameters[name], direction)}))  # noqa: E731
            return (at(h) - at(-h)) / (2 * h)

        h = 1e-3 * _norm(parameters[name]) / _norm(direction)
        best = (4 * difference(h / 2) - difference(h)) / 3  # Richardson: fourth order
        error = abs(best - slope) / (abs(slope) + 1e-3 * _norm(gradient[name]) * _norm(direction))
        print(kind, name, error)
        assert error <= 1e-8


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(("kind", "options"), [ALL[0], *ALL[3:]], ids=["spectral", "central", "van_leer"])
def test_gradients_are_finite_at_rest_and_in_uniform_flow(kind, options):
    closures = sum(closures_for_gradients().values(), ())
    parameters, final = setting(kind, ETDRK2(), 0.1, closures, n=8, **options)
    gradient = jax.jit(jax.grad(lambda p: jnp.sum(final(p, 2, 0) ** 2)))
    for mean in (0.0, 1.0):
        leaves = jax.tree.leaves(gradient({**parameters, "state": jnp.full((1, 8), mean)}))
        assert all(np.isfinite(a).all() for a in leaves)
        assert mean == 0 or any(np.asarray(a).any() for a in leaves)


# --- precision -------------------------------------------------------------------------------------------------------------------


class DoubleInside(Flux):
    """F = 0 by way of double precision."""

    def __call__(self, view, memory=None, key=None):
        return 0 * view.gradient() * jnp.asarray(np.float64(2.0))


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(
    ("case", "stepper"), [(0, ETDRK4()), (1, ETDRK2()), (2, CrankNicolsonRK4()), (3, SSPRK3()), (3, ETDRK2()), (4, ETDRK4())]
)
def test_no_double_precision_in_a_single_precision_step(case, stepper):
    kind, options = ALL[case]

    def wide(closures, evaluate):
        model = Model(ks(kind, 16, **options), stepper, 0.05, closures, evaluate)
        u = jax.ShapeDtypeStruct((1, 16), np.float32)

        def step(u):
            z, _, _ = model(coefficients.solver.encode(u), model.init_carry(u), jnp.zeros((), jnp.int32), coefficients)
            return coefficients.solver.decode(z)

        # the coefficients are made in double precision, once, and cast
        coefficients = model.prepare(np.float32)
        assert all(a.dtype in (np.float32, np.complex64) for a in jax.tree.leaves(eqx.filter(coefficients, eqx.is_array)))
        return wide_values(jax.make_jaxpr(step)(u))

    closures = (Smagorinsky(0.1), Hyperviscosity(0.1), learned(0, 0.1, dims=1), Lift())
    assert wide(closures, ("stage", "step", "step", "stage")) == set()
    assert wide((DoubleInside(),), "step")  # negative control


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("kind", BOTH)
def test_single_precision_follows_double_precision(kind):
    solver = ks(kind, 48)
    double, single = (evolve(solver, ETDRK4(), waves(solver, 3, dtype=dtype), 0.1, 50) for dtype in (np.float64, np.float32))
    assert single.dtype == np.float32
    assert relative(single, double) <= 1e-4


# --- what is offered -------------------------------------------------------------------------------------------------------------


def test_stable_dt_is_that_of_advection():
    for kind in BOTH:
        solver = ks(kind, 32)
        assert float(solver.stable_dt(jnp.full((1, 32), -2.0))) == pytest.approx(22 / 32 / 2)
        assert np.isfinite(float(solver.stable_dt(jnp.zeros((1, 32)))))


def test_what_does_not_fit_is_refused():
    equation = KuramotoSivashinsky()
    for make in (SpectralKS, FiniteVolumeKS):
        with pytest.raises(ValueError, match="is one-dimensional here, found shape"):
            make(Grid((8, 8), (1.0, 1.0)), equation)
        with pytest.raises(ValueError, match="needs periodic boundaries"):
            make(Grid((8,), (1.0,), ("no_slip",)), equation)
        with pytest.raises(ValueError, match="at least 4 cells"):
            make(Grid((3,), (1.0,)), equation)
    for viscosity in (0.0, -1.0, float("nan")):
        with pytest.raises(ValueError, match="viscosity: must be positive and finite"):
            KuramotoSivashinsky(viscosity)


def test_what_the_solvers_say_of_themselves():
    for kind in BOTH:
        solver = ks(kind, 16)
        u = jnp.asarray(waves(solver, dtype=np.float32))
        assert [(v.name, v.unit, v.at) for v in solver.variables] == [("u", "length/time", (0.5,))]
        assert solver.conserved == ("u",)
        assert solver.divergence(u) is None
        np.testing.assert_array_equal(solver.centred(u), u)
        slope, place = solver.derivative(u[0], (0.5,), 0)
        assert place == solver.flux_place(0, 0)
        np.testing.assert_array_equal(slope, solver.gradient(u)[0, 0])
        assert solver.derivative(slope, place, 0)[1] == (0.5,)
        np.testing.assert_allclose(solver.move(u[0], (0.5,), place).sum(), u.sum(), rtol=0, atol=1e-5)
        assert len(jax.tree.leaves(eqx.filter(ks(kind, 16, 22.0, jnp.asarray(1.0)), eqx.is_inexact_array))) == 1


# --- a peer's solver -------------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("x64")
def test_a_trajectory_of_exponax():
    exponax = pytest.importorskip("exponax")
    solver = ks("spectral", 128, 32.0)
    u = waves(solver, 9, modes=6)
    peer = exponax.stepper.KuramotoSivashinskyConservative(1, 32.0, 128, 0.05, order=4)
    with jax.numpy_rank_promotion("allow"):
        theirs = jax.jit(lambda q: jax.lax.fori_loop(0, 200, lambda _, v: peer(v), q))(jnp.asarray(u))
    ours = evolve(solver, ETDRK4(), u, 0.05, 200)
    print("apart from exponax after 10 time units:", relative(ours, theirs))
    assert relative(ours, theirs) <= 1e-9
    assert relative(ours, u) > 0.5
