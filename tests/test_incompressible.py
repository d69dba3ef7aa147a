"""Incompressible flow in 2D against what is known exactly: solutions, orders, symmetries, invariants, conserved sums."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flows import (
    BOTH,
    PRECISION,
    TWO_PI,
    Push,
    alignment,
    bare_rate,
    default_stepper,
    divergence,
    evolve,
    kolmogorov,
    learned,
    ledger_sum,
    random_flow,
    relative,
    sample,
    solver_of,
    square,
    steps,
    taylor_green,
    worst_step,
)

from hybridsim.corrections.eddy import Leith, Smagorinsky
from hybridsim.grid import Grid
from hybridsim.model import Model
from hybridsim.solvers.spectral import dealiasing_mask
from hybridsim.solvers.steppers import ETDRK4, SSPRK3, CrankNicolsonRK4

pytestmark = pytest.mark.usefixtures("x64")

# --- exact solutions -------------------------------------------------------------------------------------------------------------

BOXES = [
    (Grid((16, 16), (TWO_PI, TWO_PI)), 1, 1),
    (Grid((16, 24), (TWO_PI, 3.0)), 2, 3),
    (Grid((15, 21), (TWO_PI, 5.0)), 1, 4),
    (Grid((17, 12), (1.5, TWO_PI)), 3, 1),
]


MOVING = [(ETDRK4(), *box) for box in BOXES] + [(CrankNicolsonRK4(), *BOXES[1]), (SSPRK3(), *BOXES[2])]


@pytest.mark.parametrize(("stepper", "grid", "kx", "ky"), MOVING, ids=[f"{type(m[0]).__name__}-{m[1].shape}" for m in MOVING])
def test_spectral_taylor_green_in_a_moving_frame(stepper, grid, kx, ky):
    solver = solver_of("spectral", grid, 2e-3, dealias="two_thirds" if grid.shape[0] != 16 else "hou_li")
    mean = (0.7, -0.4)
    dt, count = (2e-5, 400) if isinstance(stepper, SSPRK3) else (1e-4, 100)
    u = evolve(solver, stepper, taylor_green(solver, kx, ky, mean=mean), dt, count)
    exact = taylor_green(solver, kx, ky, dt * count, mean)
    still = taylor_green(solver, kx, ky, 0.0, mean)
    print(type(stepper).__name__, grid.shape, relative(u, exact))
    assert np.abs(u - exact).max() <= 1e-11 * np.abs(exact).max()
    assert np.abs(still - exact).max() > 1e-3  # it has moved


@pytest.mark.parametrize(("kx", "ky"), [(3, 2), (5, 0), (0, 4)])
def test_spectral_taylor_green_at_rest_decays_exactly(kx, ky):
    solver = solver_of("spectral", Grid((18, 16), (TWO_PI, 4.0)), 0.05)
    u = evolve(solver, ETDRK4(), taylor_green(solver, kx, ky), 0.05, 20)
    exact = taylor_green(solver, kx, ky, 1.0)
    assert np.abs(u - exact).max() <= 1e-12 * np.abs(taylor_green(solver, kx, ky)).max()


def _finite_volume_errors(convection, norm, swap=False, mirror=False, shape=1):
    errors = []
    for n in (16, 32, 64):
        lengths = (TWO_PI, 2 * TWO_PI) if shape == 2 else (TWO_PI, TWO_PI)
        wave = (1, 2)
        mean = (0.5, 0.25)
        if swap:
            lengths, wave, mean = lengths[::-1], wave[::-1], mean[::-1]
        if mirror:
            mean = (-mean[0], mean[1])
        grid = Grid(tuple(round(n * x / TWO_PI) for x in lengths), lengths)
        solver = solver_of("finite_volume", grid, 0.02, convection=convection)
        count = 2 * n
        u = evolve(solver, SSPRK3(), taylor_green(solver, *wave, mean=mean), 0.5 / count, count)
        difference = u - taylor_green(solver, *wave, 0.5, mean)
        errors.append(np.mean(np.abs(difference) ** norm) ** (1 / norm))
    return np.log2(np.array(errors[:-1]) / errors[1:]), errors


@pytest.mark.parametrize("case", [{}, {"swap": True}, {"mirror": True}, {"shape": 2}], ids=["plain", "swapped", "mirrored", "long"])
def test_finite_volume_taylor_green_is_second_order(case):
    rates, errors = _finite_volume_errors("central", 2, **case)
    print("central", case, rates, errors)
    assert 1.95 <= rates[-1] <= 2.1


@pytest.mark.parametrize("norm", [1, 2])
def test_limited_finite_volume_taylor_green(norm):
    rates, errors = _finite_volume_errors("van_leer", norm)
    print("van_leer", norm, rates, errors)
    assert rates[-1] >= 1.7
    assert errors[-1] < 2e-2


def test_finite_volume_time_error_is_below_one_percent_of_the_space_error():
    solver = solver_of("finite_volume", square(64), 0.02, convection="central")
    start, exact = taylor_green(solver, 1, 2, mean=(0.5, 0.25)), taylor_green(solver, 1, 2, 0.5, (0.5, 0.25))
    a, b = (evolve(solver, SSPRK3(), start, 0.5 / n, n) for n in (128, 256))
    assert np.abs(a - b).max() < 0.01 * np.abs(a - exact).max()


@pytest.mark.parametrize("stepper", [ETDRK4(), CrankNicolsonRK4()], ids=lambda s: type(s).__name__)
@pytest.mark.parametrize("grid", [square(24), Grid((15, 21), (3.0, TWO_PI))], ids=str)
def test_spectral_kolmogorov_laminar_state_is_steady(grid, stepper):
    forcing = kolmogorov(0.3, 0.1, 3)
    solver = solver_of("spectral", grid, 0.02, forcing)
    k = TWO_PI * 3 / grid.lengths[1]
    laminar = sample(solver, lambda x, y: 0.3 * np.sin(k * y) / (0.02 * k * k + 0.1), lambda x, y: 0 * x)
    for start in (laminar, 0 * laminar):
        # the flow started from rest stays a shear flow, for which the scheme is exact at any dt
        u = evolve(solver, stepper, start, 0.02, 100)
        growth = 1 - np.exp(-(0.02 * k * k + 0.1) * 2.0) if not start.any() else 1.0
        limit = 1e-12 if start.any() or isinstance(stepper, ETDRK4) else 1e-5
        assert np.abs(u - growth * laminar).max() <= limit * np.abs(laminar).max()


@pytest.mark.parametrize("convection", ["van_leer", "central"])
@pytest.mark.parametrize("grid", [square(24), Grid((15, 21), (3.0, TWO_PI))], ids=str)
def test_finite_volume_kolmogorov_laminar_state_with_its_discrete_symbol(grid, convection):
    solver = solver_of("finite_volume", grid, 0.02, kolmogorov(0.3, 0.1, 3), convection=convection)
    k, h = TWO_PI * 3 / grid.lengths[1], grid.spacing[1]
    symbol = (2 / h * np.sin(k * h / 2)) ** 2
    laminar, continuous = (
        sample(solver, lambda x, y, q=q: 0.3 * np.sin(k * y) / (0.02 * q + 0.1), lambda x, y: 0 * x) for q in (symbol, k * k)
    )
    assert relative(evolve(solver, SSPRK3(), laminar, 0.02, 100), laminar) <= 1e-12
    assert relative(evolve(solver, SSPRK3(), continuous, 0.02, 100), continuous) > 1e-4  # negative control


# --- symmetries ------------------------------------------------------------------------------------------------------------------


def _swapped(u):
    return np.stack([u[1].T, u[0].T])


def _mirrored(u, kind):
    """x -> L − x, u -> −u."""
    flipped = u[:, ::-1]
    first = np.roll(flipped[0], -1, axis=0) if kind == "finite_volume" else flipped[0]
    return np.stack([-first, flipped[1]])


CLOSURES = {"none": (), "smagorinsky": (Smagorinsky(0.2),), "leith": (Leith(0.3),)}


@pytest.mark.parametrize(("kind", "options", "closure"), [
    ("spectral", {}, "smagorinsky"),
    ("spectral", {}, "leith"),
    ("finite_volume", {"convection": "van_leer"}, "none"),
    ("finite_volume", {"convection": "van_leer"}, "smagorinsky"),
    ("finite_volume", {"convection": "central"}, "leith"),
])  # fmt: skip
def test_a_step_commutes_with_swapped_axes_mirrors_and_shifts(kind, options, closure):
    closures = CLOSURES[closure]
    grid = Grid((16, 12), (TWO_PI, 5.0))
    solver = solver_of(kind, grid, 1e-3, **options)
    turned = solver_of(kind, Grid((12, 16), (5.0, TWO_PI)), 1e-3, **options)
    u = random_flow(solver, 3, mean=(0.3, -0.2))
    run = lambda s, q: evolve(s, default_stepper(kind), q, 0.05, 2, closures)  # noqa: E731
    after = run(solver, u)
    assert relative(after, u) > 1e-3
    assert relative(_mirrored(_mirrored(u, kind), kind), u) == 0
    assert relative(run(turned, _swapped(u)), _swapped(after)) <= 1e-13
    assert relative(run(solver, _mirrored(u, kind)), _mirrored(after, kind)) <= 1e-13
    assert relative(run(solver, np.roll(u, (3, 5), (1, 2))), np.roll(after, (3, 5), (1, 2))) <= 1e-13


# --- invariants ------------------------------------------------------------------------------------------------------------------


def _noise(grid, seed=0):
    return np.random.default_rng(seed).standard_normal((2, *grid.shape))


def _vorticity(solver, u):
    gradient = np.asarray(solver.gradient(jnp.asarray(u)))
    return gradient[0, 1] - gradient[1, 0]


@pytest.mark.parametrize("grid", [square(24), Grid((15, 20), (TWO_PI, 3.0)), Grid((17, 21), (2.0, 2.5))], ids=str)
def test_spectral_two_thirds_conserves_energy_and_enstrophy_in_space(grid):
    kept = dealiasing_mask(grid, "two_thirds")
    found = {}
    for dealias in ("two_thirds", "none"):
        solver = solver_of("spectral", grid, 0.0, dealias=dealias).prepare(np.float64)
        noise = np.fft.irfft2(np.fft.rfft2(_noise(grid)) * (kept if dealias == "two_thirds" else 1), s=grid.shape)
        u, rate = bare_rate(solver, noise)
        found[dealias] = alignment(u, rate), alignment(_vorticity(solver, u), _vorticity(solver, rate))
    assert max(map(abs, found["two_thirds"])) <= 1e-14
    assert min(map(abs, found["none"])) > 1e-4  # negative control: aliasing breaks both


@pytest.mark.parametrize("grid", [square(16), Grid((15, 20), (TWO_PI, 3.0))], ids=str)
def test_central_finite_volume_conserves_energy_in_space(grid):
    found = {}
    for convection in ("central", "van_leer"):
        solver = solver_of("finite_volume", grid, 0.0, convection=convection).prepare(np.float64)
        found[convection] = alignment(*bare_rate(solver, _noise(grid)))
    assert abs(found["central"]) <= 1e-14
    assert found["van_leer"] < -1e-2  # negative control: the limiter takes energy


@pytest.mark.parametrize(
    ("kind", "options", "stepper"),
    [
        ("spectral", {"dealias": "two_thirds"}, CrankNicolsonRK4()),
        ("spectral", {"dealias": "two_thirds"}, ETDRK4()),
        ("finite_volume", {"convection": "central"}, SSPRK3()),
    ],
    ids=["CrankNicolsonRK4", "ETDRK4", "SSPRK3"],
)
def test_halving_dt_divides_the_energy_drift_by_the_order(kind, options, stepper):
    solver = solver_of(kind, square(16), 0.0, **options)
    u = random_flow(solver, 5, modes=4)
    if kind == "finite_volume":
        u = np.asarray(solver.project(jnp.asarray(u)))
    drift = [abs(np.sum(evolve(solver, stepper, u, 1.0 / n, n) ** 2) / np.sum(u**2) - 1) for n in (10, 20)]
    order = 3 if isinstance(stepper, SSPRK3) else 4
    assert 1e-12 < drift[1] < 1e-3
    assert drift[0] / drift[1] >= 0.85 * 2**order


# --- conserved sums and divergence -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", PRECISION, ids=["float64", "float32"])
@pytest.mark.parametrize("kind", BOTH)
@pytest.mark.parametrize("case", ["bare", "smagorinsky", "learned"])
def test_momentum_and_divergence_in_a_forced_flow(kind, dtype, case):
    closures = {"bare": (), "smagorinsky": (Smagorinsky(0.2),), "learned": (learned(std=0.1, dtype=dtype),)}[case]
    solver = solver_of(kind, square(16), 1e-3, kolmogorov(1.0, 0.1, 2))
    model = Model(solver, default_stepper(kind), 0.02, closures)
    u = random_flow(solver, 1, mean=(0.3, -0.2), dtype=dtype)
    frames, ledger = steps(model, u, 30)
    frames = np.asarray(frames)
    assert frames.dtype == dtype
    drift, most, taken = worst_step(model, frames, ledger)
    print(kind, dtype.__name__, case, "drift", drift, "divergence", most)
    limit, limit_root, limit_divergence = PRECISION[dtype]
    assert taken == 30
    assert drift <= limit
    double = frames.astype(np.float64)
    change = np.abs((double - double[0]).sum(axis=(2, 3))[1:] - solver.grid.cells * ledger_sum(ledger))
    steady = change / np.abs(double[0]).sum(axis=(1, 2)) / np.sqrt(np.arange(1, 31))[:, None]
    print("accumulated, over √steps", steady.max())
    assert steady.max() <= limit_root
    assert most <= limit_divergence
    # the force and the drag have been at work, and the ledger tells
    assert np.abs(ledger_sum(ledger)[-1]).max() > 1e-3


@pytest.mark.parametrize("dtype", PRECISION, ids=["float64", "float32"])
@pytest.mark.parametrize("kind", BOTH)
def test_flux_closures_keep_momentum_for_any_weights(kind, dtype):
    solver = solver_of(kind, Grid((12, 15), (TWO_PI, 5.0)), 1e-3)
    u = random_flow(solver, 1, mean=(0.3, -0.2), dtype=dtype)
    worst = worst_divergence = 0.0
    stopped = 0
    for symmetric in (True, False):
        for std in (0.1, 1.0, 10.0, 100.0):
            for seed in range(4):
                closure = learned(seed, std, symmetric=symmetric, dtype=dtype)
                model = Model(solver, default_stepper(kind), 0.01, (closure,))
                frames, ledger = steps(model, u, 6)
                drift, most, taken = worst_step(model, np.asarray(frames), ledger, wild=True)
                stopped += taken < 6
                worst, worst_divergence = max(worst, drift), max(worst_divergence, most)
                assert std > 1 or taken > 0
    print(kind, dtype.__name__, "random weights: drift", worst, "divergence", worst_divergence, "blown up", stopped)
    limit, _, limit_divergence = PRECISION[dtype]
    assert worst <= limit
    assert worst_divergence <= limit_divergence


@pytest.mark.parametrize("kind", BOTH)
def test_a_source_closure_breaks_the_sums(kind):
    solver = solver_of(kind, square(12), 1e-3)
    model = Model(solver, default_stepper(kind), 0.01, (Push(1.0),))
    frames, ledger = steps(model, random_flow(solver, 1), 5)
    drift, most, _ = worst_step(model, np.asarray(frames), ledger)
    assert drift > 1e-3
    assert most <= 1e-11


def test_the_divergence_check_sees_divergence():
    for kind in BOTH:
        solver = solver_of(kind, square(12)).prepare(np.float64)
        u = _noise(solver.grid)
        assert divergence(solver, u) > 0.1
        assert divergence(solver, np.asarray(solver.project(jnp.asarray(u)))) <= 1e-13


@pytest.mark.parametrize("kind", BOTH)
def test_projection_is_orthogonal_and_idempotent(kind):
    solver = solver_of(kind, Grid((15, 16), (TWO_PI, 3.0))).prepare(np.float64)
    u = jnp.asarray(_noise(solver.grid))
    once = solver.project(u)
    assert relative(solver.project(once), once) <= 1e-13
    assert abs(alignment(np.asarray(once), np.asarray(u - once))) <= 1e-14


# --- filters ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("coarse", [(16, 16), (12, 15), (8, 32)], ids=str)
@pytest.mark.parametrize("fine_kind", BOTH)
def test_restriction_to_the_staggered_grid_keeps_the_divergence_zero(fine_kind, coarse):
    fine = solver_of(fine_kind, Grid((33, 48), (TWO_PI, 5.0)) if fine_kind == "spectral" else Grid((32, 64), (TWO_PI, 5.0)))
    if fine_kind == "finite_volume" and coarse == (12, 15):
        pytest.skip("block means need a grid that divides the fine one")
    solver = solver_of("finite_volume", Grid(coarse, (TWO_PI, 5.0))).prepare(np.float64)
    u = np.asarray(fine.prepare(np.float64).project(jnp.asarray(_noise(fine.grid))))
    out = np.asarray(solver.restrict(jnp.asarray(u), fine.grid, fine.variables))
    assert out.shape == (2, *coarse)
    assert divergence(solver, out) <= 1e-12
    assert np.allclose(out.mean(axis=(1, 2)), u.mean(axis=(1, 2)), rtol=0, atol=1e-14)


def test_spectral_restriction_is_the_band_limited_field():
    fine = solver_of("spectral", Grid((48, 45), (TWO_PI, 5.0)))
    coarse = solver_of("spectral", Grid((16, 15), (TWO_PI, 5.0)))
    u = random_flow(fine, 2, modes=6, mean=(0.2, 0.1))
    out = coarse.restrict(jnp.asarray(u), fine.grid, fine.variables)
    assert relative(out, random_flow(coarse, 2, modes=6, mean=(0.2, 0.1))) <= 1e-13
    assert relative(random_flow(coarse, 2, modes=5, mean=(0.2, 0.1)), np.asarray(out)) > 0.01


def test_stable_dt_scales_with_the_flow():
    for kind in BOTH:
        solver = solver_of(kind, square(16), 0.0)
        u = np.stack([np.full((16, 16), 2.0), np.full((16, 16), 1.0)])
        assert float(solver.stable_dt(jnp.asarray(u))) == pytest.approx(TWO_PI / 16 / 3)
        assert np.isfinite(float(solver.stable_dt(jnp.zeros((2, 16, 16)))))


def test_a_stable_run_is_stable_at_its_own_dt():
    solver = solver_of("finite_volume", square(16), 1e-3)
    u = random_flow(solver, 4, speed=2.0)
    dt = 0.5 * float(solver.stable_dt(jnp.asarray(u)))
    calm, wild = (evolve(solver, SSPRK3(), u, scale * dt, 100) for scale in (1, 12))
    assert np.sum(calm**2) <= np.sum(u**2)
    assert not np.isfinite(wild).all() or np.sum(wild**2) > np.sum(u**2)


def test_arrays_of_the_equation_are_leaves():
    solver = solver_of("spectral", square(8), jnp.asarray(1e-3), kolmogorov(jnp.asarray(1.0), jnp.asarray(0.1)))
    assert len(jax.tree.leaves(eqx.filter(solver, eqx.is_inexact_array))) == 3
