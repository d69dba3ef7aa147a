"""The compressible solver against exact and published solutions: waves, shocks, vortices, viscosity, and what it must conserve."""

import dataclasses
import json
import math
from functools import partial
from pathlib import Path

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import riemann_exact
from compressible_flows import (
    RECONSTRUCTIONS,
    RIEMANN,
    along,
    back,
    conserved,
    fastest,
    gas,
    means,
    primitive,
    rates,
    run,
    steps_for,
    tube,
    two_states,
)
from flows import TWO_PI, EveryFlux, randomised, relative, steps

from hybridsim.check import wide_values
from hybridsim.contract import Source
from hybridsim.grid import Grid, cell_mean
from hybridsim.model import Model
from hybridsim.solvers import sweep
from hybridsim.solvers.compressible import UniformInflow
from hybridsim.solvers.steppers import SSPRK2, SSPRK3, VL2

pytestmark = pytest.mark.usefixtures("x64")

DATA = Path(__file__).parent / "data"
ATHENA = json.loads((DATA / "athena_linear_wave_and_sod.json").read_text())
RIEMANN_PROBLEMS = {
    name: case for name, case in json.loads((DATA / "riemann_exact.json").read_text()).items() if not name.startswith("_")
}
CLOSED_FORMS = json.loads((DATA / "closed_forms.json").read_text())


slow = partial(pytest.param, marks=pytest.mark.slow)


def stepper_for(reconstruction):
    return VL2() if reconstruction.startswith("plm") else SSPRK3()


def rms_l1(u, exact):
    """√(Σ_c ⟨|q_c − exact|⟩²) over the conserved variables: Athena++'s measure."""
    return float(np.sqrt(sum(np.abs(a - b).mean() ** 2 for a, b in zip(u, exact, strict=True))))


# --- linear waves ----------------------------------------------------------------------------------------------------------------

# A wave of N cells in a box of 256: the equations have no scale of their own, so that m waves in the box at t = 1/m are one wave of
# 256/m cells at t = 1, and all resolutions share one compiled program.


def linear_wave(grid, kind, modes, gamma=5 / 3, amplitude=1e-6):
    """ρ = 1, p = 1/γ and an eigenvector of amplitude 1e-6 along k = 2π modes/L: (u, |k|, speed of the fastest wave)."""
    k = TWO_PI * np.array(modes) / np.array(grid.lengths)
    n = k / np.linalg.norm(k)
    flow = n if kind == "entropy" else 0 * n
    sign = {"right": 1.0, "left": -1.0, "entropy": 0.0}[kind]
    kinetic = 0.5 * flow @ flow
    enthalpy = 1 / (gamma - 1) + kinetic if sign else kinetic
    vector = np.array([1.0, *(flow + sign * n), enthalpy + sign * (flow @ n)])
    base = np.array([1.0, *flow, 1 / gamma / (gamma - 1) + kinetic])
    phase = sum(q * x for q, x in zip(k, grid.mesh(), strict=True))
    column = (slice(None), *(None,) * grid.ndim)
    return base[column] + amplitude * vector[column] * np.sin(phase), np.linalg.norm(k), 1 + np.linalg.norm(flow)


def wave_error(solver, stepper, kind, modes, courant, amplitude=1e-6):
    """RMS-L1 after one period, Δt = courant · Δx / fastest wave."""
    u, k, fastest_wave = linear_wave(solver.grid, kind, modes, solver.equation.gamma, amplitude)
    found = run(solver, stepper, u, *steps_for(TWO_PI / k, courant * min(solver.grid.spacing) / fastest_wave))
    return rms_l1(found.u, u), found


@pytest.mark.parametrize(("stepper", "limit"), [(VL2(), 1.01), (SSPRK2(), 1.7)], ids=["vl2", "ssprk2"])
def test_linear_waves_are_as_accurate_as_athena(stepper, limit):
    """With Athena++'s own stepper its errors, to their digits; another one of second order has a larger error in time."""
    measured = ATHENA["measured_1D_VL2_PLM_hllc"]
    solver = gas(tube(256, boundary="periodic"), 5 / 3)
    found = {
        kind: [wave_error(solver, stepper, kind, (256 // n,), 0.3)[0] for n in (32, 64, 128, 256)]
        for kind in ("right", "left", "entropy")
    }
    for kind, errors in found.items():
        peer = list(measured["entropy" if kind == "entropy" else "sound"].values())
        ratio = np.array(errors) / peer
        print(kind, [f"{e:.4e}" for e in errors], "over Athena++:", ratio.round(3), "rates:", rates(errors).round(3))
        assert (ratio <= limit).all()
        assert rates(errors)[-1] >= 1.9
    apart = np.abs(np.array(found["right"]) / np.array(found["left"]) - 1)
    print("left against right:", apart)
    assert apart.max() <= 1e-7  # the errors are 1e-8 of the sums that they are differences of
    assert np.abs(np.array(found["right"]) - found["left"]).max() <= 1e-10 * 1e-6


@pytest.mark.parametrize("n", [16, pytest.param(32, marks=pytest.mark.slow)])
def test_oblique_linear_waves_in_three_dimensions(n):
    """A box of 3 × 1.5 × 1.5 and one wave of length 1 along its diagonal, on 2n × n × n cells."""
    gates = ATHENA["tolerance_3D_64x32x32_VL2_PLM_hllc"]
    solver = gas(Grid((2 * n, n, n), (3.0, 1.5, 1.5)), 5 / 3)
    for kind in ("right", "left", "entropy"):
        name = "entropy" if kind == "entropy" else "sound"
        coarse = wave_error(solver, VL2(), kind, (2, 2, 2), 0.3)[0]
        fine = wave_error(solver, VL2(), kind, (1, 1, 1), 0.3)[0]
        # On 32 cells at most 1.5 times what Athena++ allows itself; on 16 the same less what its order adds.
        limit = gates[f"{name}_RMS_L1_max"] * (1.5 if n == 32 else 1.05 * (32 / n) ** 2)
        print(n, kind, f"{coarse:.3e} {fine:.3e}, ratio {fine / coarse:.3f}, limit {limit:.2e}")
        assert fine <= limit
        # Athena++ allows itself 0.325 and 0.33 here, which 32 cells do not reach.
        assert fine / coarse <= (
            0.37 if n == 32 else gates["sound_ratio_64_over_32_max" if name == "sound" else "entropy_ratio_max"]
        )


@pytest.mark.parametrize("reconstruction", ["weno5z", "ppm"])
def test_high_order_in_linear_waves(reconstruction):
    """Weaker waves, which steepen less: at 1e-6 that alone is an error of 5e-12."""
    solver = gas(tube(64, boundary="periodic"), 5 / 3, reconstruction=reconstruction)
    for kind in ("right", "left", "entropy"):
        errors = [wave_error(solver, SSPRK3(), kind, (64 // n,), 0.4, 1e-7)[0] for n in (16, 32, 64)]
        print(reconstruction, kind, [f"{e:.3e}" for e in errors], rates(errors).round(2))
        assert rates(errors)[-1] >= 2.9
        assert errors[-1] <= 1e-4 * 1e-7


# --- smooth flow that is not weak ------------------------------------------------------------------------------------------------


def advected_density(grid, waves, t, velocity=1.0, gamma=1.4):
    """ρ = 1 + ½ sin(2πm(x − Vt)), exactly; m waves in a box of length 1."""
    return means(grid, gamma, lambda x: (1 + 0.5 * np.sin(TWO_PI * waves * (x - velocity * t)), velocity + 0 * x, 1 + 0 * x), 6)


def simple_wave(grid, waves, t, amplitude=0.2, gamma=1.4):
    """u = A sin(2πm(x − (u + c) t)), c = 1 + (γ − 1) u / 2, isentropic: exact until it breaks at 1/(πmA(γ + 1))."""

    def flow(x):
        k, half = TWO_PI * waves, 0.5 * (gamma + 1)
        u = amplitude * np.sin(k * x)
        for _ in range(100):
            phase = k * (x - (1 + half * u) * t)
            u = u - (u - amplitude * np.sin(phase)) / (1 + amplitude * np.cos(phase) * k * half * t)
        c = 1 + (gamma - 1) / 2 * u
        return c ** (2 / (gamma - 1)), u, c ** (2 * gamma / (gamma - 1)) / gamma

    return means(grid, gamma, flow, 6)


ORDERS = {  # (reconstruction, reconstruct): what advection and a simple wave must show
    ("plm_van_leer", "primitive"): (1.9, 1.9),
    ("plm_mc", "characteristic"): (1.9, 1.9),
    ("ppm", "characteristic"): (2.9, 2.5),
    ("weno5z", "characteristic"): (2.9, 2.9),
    ("weno5z", "primitive"): (2.9, 1.9),
}


@pytest.mark.parametrize(("reconstruction", "reconstruct"), list(ORDERS))
def test_order_in_smooth_flow(reconstruction, reconstruct):
    cells = 256 if reconstruction == "ppm" else 128  # its limiter still sees the crests of the finest of three waves
    grid = tube(cells, boundary="periodic")
    solver = gas(grid, 1.4, reconstruction=reconstruction, reconstruct=reconstruct)
    stepper = stepper_for(reconstruction)
    for order, exact, time in zip(ORDERS[reconstruction, reconstruct], (advected_density, simple_wave), (0.5, 0.3), strict=True):
        errors = []
        for waves in (4, 2, 1):
            end = time / waves
            u = run(solver, stepper, exact(grid, waves, 0.0), *steps_for(end, 0.2 / cells)).u
            errors.append(np.abs(u[0] - exact(grid, waves, end)[0]).mean())
        print(reconstruction, reconstruct, exact.__name__, [f"{e:.2e}" for e in errors], rates(errors).round(2))
        assert rates(errors)[-1] >= order
        assert errors[-1] < 0.01


# --- Riemann problems ------------------------------------------------------------------------------------------------------------


def test_the_exact_solution_agrees_with_the_published_star_states():
    for name, case in RIEMANN_PROBLEMS.items():
        found = riemann_exact.star(case["left"], case["right"], case["gamma"])
        expected = [case["star"][key] for key in ("p", "u", "rhoL", "rhoR")]
        np.testing.assert_allclose(found, expected, rtol=1e-13, atol=1e-13, err_msg=name)
    table = np.loadtxt(DATA / "sod_exact_256.csv", delimiter=",", skiprows=2).T
    sod = RIEMANN_PROBLEMS["sod"]
    points = riemann_exact.sample(sod["left"], sod["right"], 1.4, table[0] / 0.25)
    np.testing.assert_allclose(points, table[1:4], rtol=0, atol=1e-9)
    averages = riemann_exact.cell_means(sod["left"], sod["right"], 1.4, np.linspace(-0.5, 0.5, 257), 0.25)
    np.testing.assert_allclose(averages.mean(axis=1), [0.5625, 0.225, 1.375], rtol=1e-14)
    wrong = np.abs(averages - table[4:]) > 1e-7
    assert wrong.any(axis=0).sum() <= 2  # the two cells with a jump inside: the table's quadrature is only good to 3e-4 there
    assert np.abs(averages - table[4:]).max() < 5e-4


def self_similar_errors(solver, stepper, left, right, time, sizes, courant=0.4):
    """Per size N: mean |q − exact| of the conserved variables on N cells at `time`.

    The solution depends on x/t alone: the middle N of n cells at time · N/n are a run of N cells, so that one run has all sizes.
    """
    grid, gamma = solver.grid, solver.equation.gamma
    n = grid.shape[0]
    u = two_states(grid, left, right, gamma)
    largest = courant * grid.spacing[0] / fastest(left, right, gamma)
    errors, low, start = [], [], 0.0
    for size in sizes:
        end = time * grid.lengths[0] * size / n
        found = run(solver, stepper, u, *steps_for(end - start, largest), start=start)
        u, start = found.u, end
        faces = (np.arange(n + 1) - n / 2) * grid.spacing[0]
        middle = slice((n - size) // 2, (n + size) // 2)
        exact = riemann_exact.cell_means(left, right, gamma, faces, end)
        errors.append(np.abs(u - exact)[:, middle].mean(axis=1))
        low.append((found.density, found.pressure, found.ledger["bound_violations"]))
    return np.array(errors), np.array(low)


def test_sod_is_as_accurate_as_athena():
    sod, peer = RIEMANN_PROBLEMS["sod"], ATHENA["measured_1D_VL2_PLM_hllc"]
    errors, low = self_similar_errors(gas(tube(512)), VL2(), sod["left"], sod["right"], 0.25, (128, 256, 512))
    norm = np.sqrt((errors**2).sum(axis=1))
    print("RMS-L1", norm, "Athena++", list(peer["sod_RMS_L1"].values()))
    print("density", errors[:, 0], "Athena++", list(peer["sod_rho_L1"].values()))
    assert norm[0] <= ATHENA["tolerance_sod"]["N128_RMS_max"]
    assert (norm[1:] / norm[:-1] <= ATHENA["tolerance_sod"]["ratio_per_doubling_max"]).all()
    assert (low[:, :2] > 0).all()


# relative L1 error of the density on 64, 128 and 256 cells: what no scheme may exceed, and what HLLC may not with the better ones
DENSITY_ERRORS = {
    "sod": ((0.02, 0.01, 0.005), (0.014, 0.007, 0.0036)),
    "lax": ((0.065, 0.036, 0.022), (0.044, 0.025, 0.015)),
    "toro1_modsod": ((0.021, 0.013, 0.0065), (0.013, 0.008, 0.004)),
    "toro2_123": ((0.014, 0.0072, 0.0033), (0.013, 0.0065, 0.003)),
    "toro3_wcL": ((0.21, 0.13, 0.07), (0.18, 0.105, 0.055)),
    "toro4_wcR": ((0.17, 0.115, 0.062), (0.135, 0.09, 0.048)),
    "toro5_collision": ((0.115, 0.07, 0.046), (0.085, 0.056, 0.037)),
}
PAIRS = [
    (pytest.param if b == "hllc" or (a, b) == ("plm_van_leer", "llf") else slow)(a, b) for a in RECONSTRUCTIONS for b in RIEMANN
]


@pytest.mark.parametrize(("reconstruction", "riemann"), PAIRS)
def test_riemann_problems(reconstruction, riemann):
    solver = gas(tube(256), reconstruction=reconstruction, riemann=riemann)
    for name, case in RIEMANN_PROBLEMS.items():
        left, right = case["left"], case["right"]
        errors, low = self_similar_errors(solver, stepper_for(reconstruction), left, right, case["t_end"], (64, 128, 256))
        density = errors[:, 0] / (0.5 * (left[0] + right[0]))
        print(reconstruction, riemann, name, density, "ratio", density[1:] / density[:-1], "lowest", low[:, :2].min(axis=0))
        assert np.isfinite(errors).all()
        assert (low[:, :2] > 0).all()
        assert (low[:, 2] == 0).all()
        assert (density <= DENSITY_ERRORS[name][riemann.startswith("hllc") and reconstruction != "plm_van_leer"]).all()
        if name == "sod" and riemann != "llf":
            norm = np.sqrt((errors**2).sum(axis=1))
            print("Sod RMS-L1", norm)
            assert norm[1] <= ATHENA["tolerance_sod"]["N128_RMS_max"]
            assert (norm[1:] / norm[:-1] <= ATHENA["tolerance_sod"]["ratio_per_doubling_max"]).all()


@pytest.mark.parametrize("reconstruction", ["plm_van_leer", slow("plm_mc"), slow("ppm"), slow("weno5z")])
def test_a_riemann_problem_in_float32(reconstruction):
    """Sod's problem and the strongest blast of Toro's: the solution of float64, and no floor. (Limiters of parabolas decide by the
    signs of differences, noise in uniform gas included.)"""
    solver = gas(tube(128), reconstruction=reconstruction)
    stepper = stepper_for(reconstruction)
    for name, tolerance in (("sod", 1e-3 if reconstruction == "ppm" else 1e-5), ("toro3_wcL", 1e-3)):
        case = RIEMANN_PROBLEMS[name]
        u = two_states(solver.grid, case["left"], case["right"], 1.4)
        pace = steps_for(case["t_end"], 0.4 / 128 / fastest(case["left"], case["right"], 1.4))
        wide, narrow = (run(solver, stepper, u.astype(dtype), *pace) for dtype in (np.float64, np.float32))
        assert narrow.u.dtype == np.float32
        print(reconstruction, name, relative(narrow.u[0], wide.u[0]), "lowest", narrow.density, narrow.pressure, narrow.ledger)
        assert relative(narrow.u[0], wide.u[0]) <= tolerance
        assert min(narrow.density, narrow.pressure) > 0


# --- rotated and mirrored --------------------------------------------------------------------------------------------------------


SOME = ["plm_van_leer", slow("weno5z"), slow("plm_mc"), slow("ppm")]


@pytest.mark.parametrize("dims", [2, slow(3)])
@pytest.mark.parametrize("reconstruction", SOME)
def test_a_tube_along_any_axis_and_mirrored(reconstruction, dims):
    case = RIEMANN_PROBLEMS["sod"]
    stepper = stepper_for(reconstruction)
    pace = (0.4 / 32 / fastest(case["left"], case["right"], 1.4), 12)
    line = gas(tube(32), reconstruction=reconstruction)
    u = two_states(line.grid, case["left"], case["right"], 1.4)
    expected = run(line, stepper, u, *pace).u
    sign = np.array([1, -1, 1])[:, None]
    mirrored = run(line, stepper, sign * u[:, ::-1], *pace).u
    np.testing.assert_allclose(sign * mirrored[:, ::-1], expected, rtol=0, atol=1e-14)
    for axis in range(dims):
        solver = gas(tube(32, axis=axis, dims=dims), reconstruction=reconstruction)
        found, spread = back(solver.grid, axis, run(solver, stepper, along(solver.grid, axis, u), *pace).u)
        print(reconstruction, dims, axis, np.abs(found - expected).max(), spread)
        assert spread <= 1e-15
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-13)


def rough_flow(grid, seed=0, gamma=1.4, mach=0.8, scalars=0, modes=2):
    """A smooth random flow that will steepen: density and pressure vary by a factor of four, speeds reach `mach`."""
    rng = np.random.default_rng(seed)

    def field(x):
        total = 0.0
        for _ in range(6):
            n = rng.integers(-modes, modes + 1, grid.ndim)
            phase = sum(TWO_PI * k * q / length for k, q, length in zip(n, x, grid.lengths, strict=True))
            total = total + rng.standard_normal() * np.sin(phase + rng.uniform(0, TWO_PI))
        return np.broadcast_to(total / max(np.abs(total).max(), 1e-3), grid.shape)

    x = grid.mesh()
    w = [2.0 ** field(x), *(mach * np.sqrt(gamma) * field(x) for _ in x), 2.0 ** field(x), *(field(x) for _ in range(scalars))]
    return conserved(np.stack(w), gamma, grid.ndim)


@pytest.mark.parametrize(("reconstruction", "dims"), [
    ("plm_van_leer", 2),
    slow("plm_van_leer", 3),
    slow("weno5z", 2),
    slow("weno5z", 3),
])  # fmt: skip
def test_rotated_and_mirrored_flows(reconstruction, dims):
    """Unlike axes, viscosity and a scalar; axes permuted, and one after another mirrored."""
    shape, lengths = (12, 10, 8)[:dims], (1.0, 0.9, 0.7)[:dims]
    stepper, dt = stepper_for(reconstruction), 0.01

    def after(grid, u):
        solver = gas(grid, reconstruction=reconstruction, viscosity=1e-3, scalars={"dye": 1e-3})
        return run(solver, stepper, u, dt, 6).u

    grid = Grid(shape, lengths)
    u = rough_flow(grid, 3, scalars=1)
    expected = after(grid, u)
    assert relative(expected, u) > 0.05
    order = (*range(1, dims), 0)
    turn = lambda q: np.transpose(q[[0, *(1 + a for a in order), *range(dims + 1, len(q))]], (0, *(1 + a for a in order)))  # noqa: E731
    turned = after(Grid([shape[a] for a in order], [lengths[a] for a in order]), turn(u))
    np.testing.assert_allclose(turned, turn(expected), rtol=0, atol=1e-13)
    for axis in range(dims):
        sign = np.ones((len(u), *(1,) * dims))
        sign[1 + axis] = -1
        np.testing.assert_allclose(sign * np.flip(after(grid, sign * np.flip(u, 1 + axis)), 1 + axis), expected, rtol=0, atol=1e-13)


# --- Shu–Osher -------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("reconstruction", "gain"), [("weno5z", 2.0), slow("ppm", 2.0), slow("plm_mc", 1.0)])
def test_shu_osher_needs_high_order(reconstruction, gain):
    """A Mach 3 shock runs into density waves: L1 of the density on 200 cells, against 12800 cells of Athena++."""
    table = np.loadtxt(DATA / "shu_osher_athena12800_400.csv", delimiter=",", skiprows=2).T
    reference = table[1].reshape(200, 2).mean(axis=1)
    grid = tube(200, 2.0)

    def flow(x):
        behind = x - 1.0 < -0.8
        wave = 1 + 0.2 * np.sin(5 * np.pi * (x - 1.0))
        return tuple(np.where(behind, a, b) for a, b in ((3.857143, wave), (2.629369, 0.0), (10.33333, 1.0)))

    u = means(grid, 1.4, flow)
    errors = {}
    for name in ("plm_van_leer", reconstruction):
        solver = gas(grid, reconstruction=name, reconstruct="primitive" if name.startswith("plm") else "characteristic")
        found = run(solver, stepper_for(name), u, *steps_for(0.47, 0.4 * 0.01 / 4.6))
        errors[name] = float(np.abs(found.u[0] - reference).mean())
        assert min(found.density, found.pressure) > 0
    print("Shu–Osher, L1 of the density:", errors)
    assert gain * errors[reconstruction] < errors["plm_van_leer"]


# --- shocks, walls and open ends -------------------------------------------------------------------------------------------------


def behind_shock(mach, gamma=1.4):
    """(ρ, u, p) behind a shock of that Mach number running to the right into gas at rest with ρ = 1, p = 1; and its speed."""
    pressure = 1 + 2 * gamma / (gamma + 1) * (mach**2 - 1)
    density = (gamma + 1) * mach**2 / ((gamma - 1) * mach**2 + 2)
    speed = mach * np.sqrt(gamma)
    return (density, speed * (1 - 1 / density), pressure), speed


@pytest.mark.parametrize("mach", [slow(1.5), slow(2.0), slow(3.0), 10.0])
def test_shocks_jump_as_rankine_and_hugoniot_say(mach):
    """A piston, that is gas thrown against a wall, makes the shock; the state behind it and its speed are known."""
    pressure, density = CLOSED_FORMS["rankine_hugoniot_g1.4"][f"{mach:g}"]
    (rho, u, p), speed = behind_shock(mach)
    np.testing.assert_allclose((p, rho), (pressure, density), rtol=1e-9)
    grid = Grid((128,), (1.0,), (("reflecting", "outflow"),))
    thrown = conserved(np.stack([np.ones(128), np.full(128, -u), np.ones(128)]), 1.4, 1)
    time = 0.7 / (speed - u)
    for reconstruction, reconstruct in (("plm_van_leer", "primitive"), ("weno5z", "characteristic")):
        solver = gas(grid, reconstruction=reconstruction, reconstruct=reconstruct)
        found = run(solver, stepper_for(reconstruction), thrown, *steps_for(time, 0.3 / 128 / (speed + 1.2)))
        w = primitive(found.u, 1.4, 1)
        plateau = slice(20, 80)  # away from the heated cells at the wall and from the shock
        print(mach, reconstruction, [float(np.abs(w[c, plateau] / q - 1).max()) for c, q in ((0, density), (2, pressure))])
        np.testing.assert_allclose(w[0, plateau], density, rtol=2e-2)
        np.testing.assert_allclose(w[2, plateau], pressure, rtol=2e-2)
        np.testing.assert_allclose(w[0, plateau].mean(), density, rtol=3e-3)
        np.testing.assert_allclose(w[2, plateau].mean(), pressure, rtol=3e-3)
        piled = (found.u[0] - 1).sum() / 128  # no mass passes the wall: what the open end let in has stayed
        np.testing.assert_allclose(piled, u * time, rtol=1e-12)
        where = (found.u[0] > 0.5 * (1 + density)).sum() / 128
        assert abs(where - 0.7) <= 2 / 128


@pytest.mark.parametrize("reconstruction", SOME)
@pytest.mark.parametrize("axis", [slow(0), 1])
def test_a_wall_is_a_mirror(axis, reconstruction):
    """Half a box with walls on both sides is the whole box, bit for bit or nearly."""
    stepper = stepper_for(reconstruction)
    half = rough_flow(Grid((16, 8), (1.0, 0.5)), 5, scalars=1)
    at = 1 + axis
    q = half if axis == 0 else np.swapaxes(half, 1, 2)[[0, 2, 1, 3, 4]]
    sign = np.ones((5, 1, 1))
    sign[at] = -1
    shape = q.shape[1:]
    lengths = tuple(n / 16 for n in shape)
    double = tuple(2 * n if a == axis else n for a, n in enumerate(shape))
    box = {"reconstruction": reconstruction, "viscosity": 1e-3, "scalars": {"dye": 1e-3}}
    whole = gas(Grid(double, tuple(n / 16 for n in double)), **box)
    expected = run(whole, stepper, np.concatenate([q, sign * np.flip(q, at)], axis=at), 0.005, 8).u
    boundaries = tuple("reflecting" if a == axis else "periodic" for a in (0, 1))
    found = run(gas(Grid(shape, lengths, boundaries), **box), stepper, q, 0.005, 8)
    n = shape[axis]
    np.testing.assert_allclose(found.u, np.take(expected, range(n), axis=at), rtol=0, atol=1e-13)
    # nothing but momentum passes a wall
    sums = (found.u - q).sum(axis=(1, 2)) / np.abs(q).sum(axis=(1, 2))
    assert np.abs(sums[[0, 2 - axis, 3, 4]]).max() <= 1e-13
    assert abs(sums[at]) > 1e-6


def test_a_shock_reflects_from_a_wall_as_it_must():
    """The shock of Mach 2 meets a wall: p behind its reflection is known."""
    (rho, u, p), speed = behind_shock(2.0)
    star = riemann_exact.star((rho, u, p), (rho, -u, p), 1.4)
    grid = Grid((200,), (1.0,), (("outflow", "reflecting"),))
    x = grid.mesh()[0]
    state = conserved(np.where((x < 0.5)[None], np.array([rho, u, p])[:, None], np.array([1.0, 0.0, 1.0])[:, None]), 1.4, 1)
    found = run(gas(grid), VL2(), state, *steps_for(0.5 / speed + 0.25, 0.4 / 200 / 4.5))
    w = primitive(found.u, 1.4, 1)
    near = slice(150, 190)
    print("reflected:", w[2, near].mean(), star.pressure, w[0, near].mean(), star.left)
    np.testing.assert_allclose(w[2, near], star.pressure, rtol=1e-2)
    np.testing.assert_allclose(w[0, near], star.left, rtol=3e-2)
    np.testing.assert_allclose(w[1, near], 0, atol=0.02)


@pytest.mark.parametrize("side", [0, 1])
def test_a_pulse_leaves_through_an_open_end(side):
    """A sound pulse of amplitude 1e-3, whole inside the box, is gone after it left; so is a strong one."""
    solver = gas(tube(200), 1.4)
    direction = 1.0 if side else -1.0
    for amplitude in (1e-3, 0.5):

        def flow(x, amplitude=amplitude):
            c = 1 + 0.2 * amplitude * np.exp(-(((x - 0.5) / 0.05) ** 2))
            return c**5, direction * 5 * (c - 1), c**7 / 1.4

        u = means(solver.grid, 1.4, flow)
        rest = conserved(np.array([1.0, 0.0, 1 / 1.4])[:, None], 1.4, 1)
        found = run(solver, VL2(), u, *steps_for(1.5, 0.4 / 200 / (1 + 1.2 * amplitude)))
        left = np.abs(found.u - rest).max() / np.abs(u - rest).max()
        print("left behind of a pulse of", amplitude, "on side", side, ":", left)
        assert left <= 0.02
        total = found.u.sum(axis=1) / 200 - u.sum(axis=1) / 200
        rows = [found.ledger[name] for name in list(solver.ledger_rows)[:3]]
        np.testing.assert_allclose(rows, total, rtol=0, atol=1e-13)


@pytest.mark.parametrize("dims", [1, slow(2)])
def test_what_flows_in_is_what_is_prescribed(dims):
    """A supersonic stream of other gas enters and fills the box; a subsonic uniform stream stays as it is."""
    for mach in (2.0, 0.4):
        inside, outside = (1.0, 0.5, 1.0), (1.3, mach * np.sqrt(1.4 * 0.9 / 1.3), 0.9)
        if mach < 1:
            inside = outside
        state = UniformInflow(outside[0], (outside[1], 0.0)[:dims], outside[2])
        grid = Grid((40, 4)[:dims], (1.0, 0.1)[:dims], (("fixed", "outflow"), "periodic")[:dims])
        solver = gas(grid, boundary_state={"x_lower": state})
        column = (slice(None), *(None,) * dims)

        def w(q, column=column, grid=grid):
            return np.broadcast_to(np.array([q[0], q[1], *[0.0] * (dims - 1), q[2]])[column], (dims + 2, *grid.shape))

        u = conserved(w(inside), 1.4, dims)
        found = run(solver, VL2(), u, *steps_for(4.0, 0.4 / 40 / 4))
        np.testing.assert_allclose(found.u, conserved(w(outside), 1.4, dims), rtol=0, atol=1e-12 if mach < 1 else 1e-6)
        added = (found.u - u).reshape(dims + 2, -1).mean(axis=1)
        np.testing.assert_allclose([found.ledger[v.name] for v in solver.variables], added, rtol=0, atol=1e-12)


# --- vortices --------------------------------------------------------------------------------------------------------------------


def isentropic_vortex(grid, t, velocity=(1.0, 1.0), beta=5.0, gamma=1.4):
    """δv = β/2π e^{(1 − r²)/2} (−y, x), δT = −(γ − 1) β²/(8γπ²) e^{1 − r²}, carried along (Shu 1998, doi:10.1007/BFb0096355)."""

    def flow(x, y):
        x, y = (
            (q - v * t) % length - 0.5 * length for q, v, length in zip((x, y), velocity, grid.lengths, strict=True)
        )  # fmt: skip
        bell = np.exp(0.5 * (1 - x * x - y * y))
        temperature = 1 - (gamma - 1) * beta**2 / (8 * gamma * np.pi**2) * bell**2
        rho = temperature ** (1 / (gamma - 1))
        return rho, velocity[0] - beta / TWO_PI * bell * y, velocity[1] + beta / TWO_PI * bell * x, rho * temperature

    return means(grid, gamma, flow)


def test_the_vortex_is_the_published_one():
    point = Grid((2, 2), (2e-9, 2e-9))
    w = primitive(isentropic_vortex(point, 0.0), 1.4, 2)
    known = CLOSED_FORMS["isentropic_vortex_beta5_gamma1.4"]
    np.testing.assert_allclose((w[0, 0, 0], w[3, 0, 0]), (known["rho_c"], known["p_c"]), rtol=2e-8)


VORTEX = [
    slow("plm_van_leer", "primitive", (32, 64, 128), 4e-3),
    slow("plm_mc", "primitive", (32, 64, 128), 4e-3),
    slow("ppm", "primitive", (32, 64, 128), 4e-3),
    slow("weno5z", "primitive", (16, 32, 64), 4e-3),
    slow("weno5z", "characteristic", (32, 64, 128), 4e-3),
]


@pytest.mark.parametrize(("reconstruction", "reconstruct", "cells", "limit"), VORTEX)
def test_an_isentropic_vortex(reconstruction, reconstruct, cells, limit):
    """Two units of time in a box of 20: one flux point per face, so second order whatever the reconstruction."""
    errors = []
    for n in cells:
        grid = Grid((n, n), (20.0, 20.0))
        solver = gas(grid, reconstruction=reconstruction, reconstruct=reconstruct)
        u = run(solver, stepper_for(reconstruction), isentropic_vortex(grid, 0.0), *steps_for(2.0, 0.4 * 20 / n / 6)).u
        errors.append(float(np.abs(u - isentropic_vortex(grid, 2.0)).mean(axis=(1, 2)).max()))
    print(reconstruction, reconstruct, [f"{e:.2e}" for e in errors], rates(errors).round(2))
    assert rates(errors)[-1] >= 1.9
    assert errors[-1] <= limit


def gresho(grid, mach, gamma=1.4):
    """v_φ = 5r, then 2 − 5r, then 0, in balance with the pressure (Gresho & Chan 1990, doi:10.1002/fld.1650110510)."""

    def flow(x, y):
        x, y = x - 0.5, y - 0.5
        r = np.maximum(np.hypot(x, y), 1e-12)
        speed = np.where(r < 0.2, 5 * r, np.where(r < 0.4, 2 - 5 * r, 0.0))
        inner, middle = 12.5 * r * r, 12.5 * r * r + 4 * (1 - 5 * r - np.log(0.2) + np.log(r))
        p = 1 / (gamma * mach**2) - 0.5 + np.where(r < 0.2, inner, np.where(r < 0.4, middle, 4 * np.log(2.0) - 2))
        return 1 + 0 * x, -speed * y / r, speed * x / r, p

    return means(grid, gamma, flow)


def kinetic(u, grid):
    return float(0.5 * (sum(q * q for q in u[1 : 1 + grid.ndim]) / u[0]).sum() * grid.cell_volume)


def test_low_mach_hllc_keeps_a_slow_vortex():
    """Gresho's vortex at Mach 0.01 for a tenth of a unit of time."""
    grid = Grid((32, 32), (1.0, 1.0))
    u = gresho(grid, 0.01)
    begin, fine = kinetic(u, grid), grid.with_shape((256, 256))
    np.testing.assert_allclose(kinetic(gresho(fine, 0.01), fine), CLOSED_FORMS["gresho_total_KE_rho1"], rtol=3e-4)
    kept = {}
    for riemann in ("hllc", "hllc_low_mach"):
        solver = gas(grid, riemann=riemann)
        found = run(solver, VL2(), u, *steps_for(0.1, 0.3 / 32 / 101))
        kept[riemann] = kinetic(found.u, grid) / begin
    print("kinetic energy kept:", kept)
    assert kept["hllc_low_mach"] > 0.98
    assert 1 - kept["hllc_low_mach"] < 0.3 * (1 - kept["hllc"])


def kelvin_helmholtz(grid, gamma=5 / 3):
    """Two smooth shear layers, no stratification (Lecoanet et al. 2016, doi:10.1093/mnras/stv2564, eqs. 8–11)."""

    def flow(x, y):
        layers = np.tanh((y - 0.5) / 0.05) - np.tanh((y - 1.5) / 0.05) - 1
        bells = np.exp(-(((y - 0.5) / 0.2) ** 2)) + np.exp(-(((y - 1.5) / 0.2) ** 2))
        ones = 1 + 0 * x
        return ones, layers * ones, 0.01 * np.sin(TWO_PI * x) * bells, 10 * ones, 0.5 * (layers + 1) * ones

    return means(grid, gamma, flow)


def _converging(shapes, reconstruction, viscosity, time, courant):
    found = []
    for n in shapes:
        grid = Grid((n, 2 * n), (1.0, 2.0))
        solver = gas(grid, 5 / 3, reconstruction=reconstruction, viscosity=viscosity, prandtl=1.0, scalars={"dye": viscosity})
        pace = steps_for(time, courant / n)
        found.append(run(solver, stepper_for(reconstruction), kelvin_helmholtz(grid), *pace).u)
    coarse = [np.asarray(cell_mean(jnp.asarray(q), (2, 2))) for q in found[1:]]
    apart = np.array([np.abs(a - b).mean(axis=(1, 2)) / np.abs(a).mean(axis=(1, 2)) for a, b in zip(found, coarse, strict=False)])
    print("Kelvin–Helmholtz", reconstruction, [[f"{e:.1e}" for e in row] for row in apart], rates(apart).round(2).tolist())
    return apart


@pytest.mark.slow
def test_kelvin_helmholtz_converges_to_itself():
    apart = _converging((32, 64, 128), "plm_van_leer", 1e-2, 0.3, 0.04)
    assert (rates(apart)[-1][[0, 1, 3, 4]] >= 1.8).all()


@pytest.mark.slow
@pytest.mark.parametrize("reconstruction", ["plm_van_leer", "weno5z"])
def test_kelvin_helmholtz_converges_to_itself_as_it_rolls_up(reconstruction):
    apart = _converging((64, 128, 256), reconstruction, 1e-3, 2.0, 0.05)
    assert (rates(apart)[-1] >= 1.5).all()
    assert apart[-1].max() <= 0.03


# --- viscosity and conduction ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [slow(1.0), 2.5])
def test_a_shear_wave_decays_by_the_schemes_own_symbol(temperature):
    """v = ε sin(2πx), ρ = 1: a factor of R(−ν k̂² Δt) a step, k̂ = 2 sin(kΔx/2)/Δx; ν = μ₀ (T/T₀)^0.76 / ρ."""
    n, dt, count, rho = 32, 2e-3, 50, 1.3
    grid = Grid((n, 4), (1.0, 0.125))
    viscosity = 0.02 * temperature**0.76 / rho
    solver = gas(grid, viscosity=0.02, viscosity_exponent=0.76, reference_temperature=1.0)
    wave = 1e-6 * np.sin(TWO_PI * grid.mesh()[0])
    w = np.stack([np.full(grid.shape, rho), 0 * wave, wave, np.full(grid.shape, rho * temperature)])
    symbol = -viscosity * (2 * n * np.sin(np.pi / n)) ** 2 * dt
    growth = 1 + symbol + symbol**2 / 2
    found = primitive(run(solver, SSPRK2(), conserved(w, 1.4, 2), dt, count).u, 1.4, 2)
    print(temperature, relative(found[2], growth**count * wave))
    np.testing.assert_allclose(found[2], growth**count * wave, rtol=0, atol=1e-9 * 1e-6)
    assert relative(found[2], wave) > 0.03
    exact = np.exp(-viscosity * TWO_PI**2 * dt * count)
    assert abs(found[2].max() / wave.max() / exact - 1) < 0.01


def modes_of_a_gas(k, viscosity, prandtl, gamma=1.4):
    """Growth rates and (ρ, u, p) of the three modes e^{ikx + σt} of a viscous, conducting gas at rest, ρ = 1, p = 1/γ."""
    ik, cool = 1j * k, gamma * viscosity / prandtl * k * k
    matrix = np.array(
        [
            [0, -ik, 0],
            [0, -4 / 3 * viscosity * k * k, -ik],
            [cool / gamma, -ik, -cool],
        ]
    )
    sigma, vectors = np.linalg.eig(matrix)
    order = np.argsort(sigma.imag)  # left in time, heat, right
    return sigma[order], (vectors / vectors[0])[:, order]


@pytest.mark.parametrize("reconstruction", ["plm_van_leer", slow("weno5z")])
def test_sound_and_heat_waves_of_a_viscous_gas(reconstruction):
    """Linear modes, exactly: the attenuation of sound (Stokes, Kirchhoff) and the diffusion of heat, of second order."""
    gamma, prandtl, viscosity = 1.4, 0.72, 5e-3
    k = TWO_PI
    sigma, vectors = modes_of_a_gas(k, viscosity, prandtl)
    classical = -0.5 * k * k * viscosity * (4 / 3 + (gamma - 1) / prandtl)
    np.testing.assert_allclose(sigma[[0, 2]].real, classical, rtol=3e-3)
    np.testing.assert_allclose(sigma[1], -viscosity / prandtl * k * k, rtol=3e-3)
    n, stepper = 128, stepper_for(reconstruction)
    for which, name in ((0, "sound"), (1, "heat")):
        errors = []
        for size in (32, 64, 128):
            waves = n // size  # of this many waves in the box, with viscosity to match
            grid = tube(n, boundary="periodic")
            solver = gas(grid, gamma, reconstruction=reconstruction, viscosity=jnp.asarray(viscosity / waves), prandtl=prandtl)

            def mode(t, waves=waves, grid=grid, which=which):
                wave = vectors[:, which][:, None] * np.exp(1j * TWO_PI * waves * grid.mesh()[0] + waves * t * sigma[which])[None]
                return conserved(np.array([1.0, 0.0, 1 / gamma])[:, None] + 1e-6 * wave.real, gamma, 1)

            found = run(solver, stepper, mode(0.0), *steps_for(1.0 / waves, 0.1 / n))
            errors.append(rms_l1(found.u, mode(1.0 / waves)) / rms_l1(mode(1.0 / waves), mode(1e9)))
        print(reconstruction, name, [f"{e:.2e}" for e in errors], rates(errors).round(2))
        assert rates(errors)[-1] >= 1.9
        assert errors[-1] < 0.01


# --- what must stay --------------------------------------------------------------------------------------------------------------

BOXES = {1: ((32,), (1.0,)), 2: ((16, 12), (1.0, 0.8)), 3: ((12, 10, 8), (1.0, 0.9, 0.7))}
CONSERVED = {np.float64: 1e-13, np.float32: 5e-8}


def sums(u):
    return np.asarray(u, np.float64).reshape(len(u), -1).sum(axis=1)


SCHEMES = (("plm_van_leer", "hllc"), ("weno5z", "hlle"), ("ppm", "hllc_low_mach"))
BY_DEFAULT = {("plm_van_leer", 3, np.float64), ("weno5z", 2, np.float32), ("ppm", 1, np.float64)}
CASES = [
    (pytest.param if (scheme[0], d, dtype) in BY_DEFAULT else slow)(*scheme, d, dtype)
    for scheme in SCHEMES
    for d in (1, 2, 3)
    for dtype in (np.float64, np.float32)
]


@pytest.mark.parametrize(("reconstruction", "riemann", "dims", "dtype"), CASES)
def test_sums_are_conserved(reconstruction, riemann, dims, dtype):
    """Shocked, viscous, with a scalar; the energy of a box with nothing flowing through is all there, kinetic and thermal."""
    grid = Grid(*BOXES[dims])
    solver = gas(grid, reconstruction=reconstruction, riemann=riemann, viscosity=1e-3, scalars={"dye": 1e-3})
    u = rough_flow(grid, 7, mach=1.5, scalars=1).astype(dtype)
    count, dt = 60, 0.2 * min(grid.spacing) / 6 / dims
    found = run(solver, stepper_for(reconstruction), u, dt, count)
    drift = np.abs(sums(found.u) - sums(u)) / sums(np.abs(u))
    print(reconstruction, riemann, dims, dtype.__name__, drift / np.sqrt(count), "lowest", found.density, found.pressure)
    assert found.u.dtype == dtype
    assert relative(found.u, u) > 0.1
    assert (drift <= CONSERVED[dtype] * np.sqrt(count)).all()
    assert min(found.density, found.pressure) > 0


class Heat(Source):
    """s = 1 for the energy: what does not conserve it."""

    def __call__(self, view, memory=None, key=None):
        return jnp.zeros_like(view.u).at[view.grid.ndim + 1].set(1.0)


@pytest.mark.parametrize("dims", [1, slow(2), slow(3)])
def test_sums_are_conserved_with_any_flux_closure(dims):
    """Weights drawn with deviations up to 100, the limiter at work: no sum moves, no density or pressure is lost."""
    grid = Grid(*BOXES[dims])
    solver = gas(grid, scalars={"dye": 0.0})
    u = rough_flow(grid, 8, mach=1.0, scalars=1)
    closure = EveryFlux(solver, jax.random.key(0))
    dt = 0.15 * min(grid.spacing) / 5 / dims
    limited = []
    for seed in range({1: 30, 2: 12, 3: 8}[dims]):
        std = (0.1, 1.0, 10.0, 100.0)[seed % 4]
        given = jax.tree.map(lambda a: a.astype(np.float64), randomised(closure, seed, std))
        for dtype in (np.float64, np.float32):
            narrow = jax.tree.map(lambda a, dtype=dtype: a.astype(dtype) if eqx.is_inexact_array(a) else a, given)
            frames, ledger = steps(Model(solver, SSPRK2(), dt, (narrow,)), u.astype(dtype), 10)
            frames = np.asarray(frames, np.float64)
            finite = np.isfinite(frames).reshape(len(frames), -1).all(axis=1)
            last = len(frames) if finite.all() else int(np.argmin(finite))
            if dtype == np.float64:
                assert last == len(frames)
            rows = np.asarray(ledger[0], np.float64) + np.asarray(ledger[1], np.float64)
            injected = np.concatenate([np.zeros((1, rows.shape[1])), rows])[:, : len(u)] * grid.cells
            for i in range(last - 1):
                before, after = frames[i], frames[i + 1]
                scale = np.maximum(sums(np.abs(before)), sums(np.abs(after)))
                drift = np.abs(sums(after) - sums(before) - injected[i + 1] + injected[i]) / scale
                assert (drift <= (1e-13 if dtype == np.float64 else 1e-7)).all(), (seed, std, i, drift)
            if dtype == np.float64:
                w = np.stack([primitive(q, 1.4, dims) for q in frames])
                assert (w[:, 0] > 0).all()
                assert (w[:, dims + 1] > 0).all()
                assert np.abs(injected).max() == 0
                limited.append(rows[-1][list(solver.ledger_rows).index("limited_faces")])
    print(dims, "limited faces:", limited)
    assert max(limited) > 0
    frames, ledger = steps(Model(solver, SSPRK2(), dt, (Heat(),)), u, 10)
    gain = (sums(np.asarray(frames[-1])) - sums(u)) / grid.cells
    np.testing.assert_allclose(gain[dims + 1], 10 * dt, rtol=1e-9)  # negative control
    assert np.abs(np.delete(gain, dims + 1)).max() < 1e-13


# --- precision -------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dims", [1, slow(2), slow(3)])
@pytest.mark.parametrize("reconstruction", RECONSTRUCTIONS)
def test_float32_stays_float32(reconstruction, dims):
    """Every reconstruction with another Riemann solver, another stepper, and variables of either kind."""
    grid, which = Grid(*BOXES[dims]), RECONSTRUCTIONS.index(reconstruction)
    options = {"riemann": RIEMANN[which], "reconstruct": ("primitive", "characteristic")[(which + dims) % 2]}
    solver = gas(grid, reconstruction=reconstruction, viscosity=1e-3, viscosity_exponent=0.7, scalars={"dye": 1e-3}, **options)
    u = jnp.asarray(rough_flow(grid, 1, scalars=1), jnp.float32)
    model = Model(solver, stepper_for(reconstruction), 0.01)
    prepared = eqx.filter_eval_shape(model.prepare, u.dtype)
    z, carry = jax.eval_shape(solver.encode, u), jax.eval_shape(model.init_carry, u)
    step = lambda model, prepared, z, carry: model(z, carry, jnp.asarray(0, jnp.int32), prepared)[0]  # noqa: E731
    assert not wide_values(eqx.filter_make_jaxpr(step)(model, prepared, z, carry)[0])
    assert not wide_values(jax.make_jaxpr(lambda u: solver.stable_dt(u))(u))
    assert not wide_values(jax.make_jaxpr(lambda u: solver.limiter_dt(u))(u))


# --- decaying turbulence ---------------------------------------------------------------------------------------------------------


def isotropic_turbulence(n, mach, seed=0, gamma=1.4, peak=4):
    """Solenoidal velocity with E(k) ∝ k⁴ exp(−2 k²/k₀²), shell by shell, and ⟨|v|²⟩ = 1; ρ = 1, p = 1/(γ M_t²): all uniform."""
    rng = np.random.default_rng(seed)
    k = np.stack(np.meshgrid(*(np.fft.fftfreq(n, 1 / n),) * 3, indexing="ij"))
    square = np.maximum((k * k).sum(axis=0), 1e-300)
    hat = np.fft.fftn(rng.standard_normal((3, n, n, n)), axes=(1, 2, 3))
    hat = hat - k * ((k * hat).sum(axis=0) / square)[None]
    hat = hat * ((square > 0.5) & (square < (n / 2) ** 2))[None]
    shell = np.rint(np.sqrt(square)).astype(int)
    found = np.bincount(shell.ravel(), (np.abs(hat) ** 2).sum(axis=0).ravel())
    wanted = np.arange(found.size) ** 4.0 * np.exp(-2 * np.arange(found.size) ** 2 / peak**2)
    hat = hat * np.sqrt(wanted / np.where(found > 0, found, np.inf))[shell][None]
    v = np.fft.ifftn(hat, axes=(1, 2, 3)).real
    v = v / np.sqrt((v * v).sum(axis=0).mean())
    pressure = np.full((n, n, n), 1 / (gamma * mach**2))
    return conserved(np.stack([np.ones_like(pressure), *v, pressure]), gamma, 3)


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize(("case", "mach"), [(1, 0.2), (2, 0.4), (3, 0.6)])
def test_density_fluctuations_of_decaying_turbulence(case, mach, seed):
    """ρ_rms(t) of Spyropoulos & Blaisdell 1996, on 64³ cells; the row at the start is without fluctuations."""
    table = np.loadtxt(DATA / "hit_spyropoulos_density_rms.csv", delimiter=",", skiprows=2)
    table = table[table[:, 0] == case][1:, 1:]
    solver = gas(
        Grid((64,) * 3, (TWO_PI,) * 3),
        reconstruction="weno5z",
        viscosity=0.0028,
        viscosity_exponent=0.76,
        reference_temperature=1 / (1.4 * mach**2),
        prandtl=0.72,
    )
    u = isotropic_turbulence(64, mach, seed).astype(np.float32)
    largest, t, found = 0.7 * TWO_PI / 64 / 3 / (1 / mach + 1.2), 0.0, []
    for end in 0.85 * table[:, 0]:
        u = run(solver, SSPRK3(), u, *steps_for(end - t, largest), start=t).u
        t = end
        found.append(float(np.std(u[0].astype(np.float64))))
    ratio = np.array(found) / table[:, 1]
    print("Mach", mach, "seed", seed, "ρ_rms over the published", ratio.round(3))
    assert np.abs(ratio - 1).max() <= 0.2


# --- slabs -----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("reconstruction", "reconstruct", "boundary", "viscosity", "dims", "limit"),
    [
        slow("plm_van_leer", "primitive", "periodic", 0.0, 2, False),
        slow("weno5z", "primitive", "outflow", 1e-2, 2, True),
        slow("ppm", "characteristic", "reflecting", 0.0, 3, True),
        slow("plm_mc", "primitive", "fixed", 1e-2, 3, True),
        slow("plm_van_leer", "primitive", "periodic", 1e-2, 3, False),
    ],
)
def test_slabs_change_nothing(monkeypatch, rng, reconstruction, reconstruct, boundary, viscosity, dims, limit):
    """A grid in slabs and the same grid at once: values, what passes the sides, the limiter's work; or else gradients."""
    grid = Grid((24, 6, 5)[:dims], (3.0, 0.75, 0.625)[:dims], (boundary, "reflecting", "periodic")[:dims])
    speeds = (2.0, 0.0, 0.0)[:dims]
    state = {side: UniformInflow(1.0, speeds, 1.0) for side in ("x_lower", "x_upper")} if boundary == "fixed" else {}
    solver = gas(grid, 1.4, reconstruction=reconstruction, reconstruct=reconstruct, viscosity=viscosity, boundary_state=state)
    rho, p = 10 ** rng.uniform(-2, 1, (2, *grid.shape)) if limit else 1 + 0.3 * rng.uniform(size=(2, *grid.shape))
    w = np.stack([rho, *(rng.uniform(-2, 2, (dims, *grid.shape)) * np.sqrt(p / rho)), p])
    base = jnp.asarray(conserved(w, 1.4, dims))
    u = base * jnp.asarray(1 + 0.01 * rng.standard_normal(base.shape))
    extra = {
        "flux": jnp.asarray(0.1 * rng.standard_normal((dims, *base.shape))),
        "source": jnp.asarray(0.1 * rng.standard_normal(base.shape)),
        "weights": jnp.asarray(0.1 * rng.standard_normal((dims, 2, dims + 2, solver.free_weights(), *grid.shape))),
    }
    t, dt = jnp.asarray(0.0), 0.9 * solver.limiter_dt(base)
    whole = sweep.Sweep(grid, solver.equation, reconstruction, "hllc", reconstruct, 1e-12, 1e-12)

    def run(cells):
        monkeypatch.setattr(sweep, "SLAB_CELLS", cells)
        stage = jax.jit(lambda base, u, extra: whole(base, u, extra, t, dt, limit=limit))
        if limit:
            return [stage(base, u, extra)]
        made = lambda base, extra: jnp.sum(jnp.sin(whole(base, None, extra, t, dt).new))  # noqa: E731
        return [stage(base, u, extra), jax.jit(jax.grad(made, (0, 1)))(base, extra)]

    one, many = run(2**30), run(math.prod(grid.shape) // 3)
    assert "scan[" in str(jax.make_jaxpr(lambda q: whole(q, None, {}, t, dt))(base))
    assert not limit or float(one[0].limited) > 0
    for tolerance, a, b in zip((1e-12, 1e-10), one, many, strict=False):
        close = lambda p, q, tol=tolerance: np.testing.assert_allclose(p, q, rtol=tol, atol=tol * float(jnp.abs(p).max()))  # noqa: E731
        jax.tree.map(close, a, b)


@pytest.mark.parametrize(
    ("reconstruction", "reconstruct", "viscosity", "limit"),
    [
        ("plm_mc", "primitive", 0.0, False),
        ("plm_mc", "primitive", 0.0, True),
        pytest.param("plm_mc", "primitive", 0.01, False, marks=pytest.mark.slow),
        pytest.param("weno5z", "characteristic", 0.01, True, marks=pytest.mark.slow),
        pytest.param("ppm", "primitive", 0.0, False, marks=pytest.mark.slow),
    ],
)
@pytest.mark.usefixtures("x64")
def test_one_program_for_three_axes_is_the_three(reconstruction, reconstruct, viscosity, limit, rng):
    """A cube that is turned for each axis: same state, limited faces and gradient, with what closures give."""
    grid = Grid((6, 6, 6), (1.0, 1.0, 1.0))
    solver = gas(grid, 1.4, reconstruction=reconstruction, reconstruct=reconstruct, viscosity=viscosity, scalars={"dye": 0.01})
    rho, p = 10 ** rng.uniform(-2, 1, (2, 6, 6, 6)) if limit else 1 + 0.3 * rng.uniform(size=(2, 6, 6, 6))
    w = np.stack([rho, *(rng.uniform(-2, 2, (3, 6, 6, 6)) * np.sqrt(p / rho)), p])
    base = jnp.concatenate([jnp.asarray(conserved(w, 1.4, 3)), jnp.asarray(rho * rng.uniform(size=rho.shape))[None]])
    u = base * jnp.asarray(1 + 0.01 * rng.standard_normal(base.shape))
    extra = {
        "flux": jnp.asarray(0.1 * rng.standard_normal((3, *base.shape))),
        "source": jnp.asarray(0.1 * rng.standard_normal(base.shape)),
        "weights": jnp.asarray(0.1 * rng.standard_normal((3, 2, 6, solver.free_weights(), 6, 6, 6))),
    }
    t, dt = jnp.asarray(0.0), 0.9 * solver.limiter_dt(base)

    def run(compact):
        euler = dataclasses.replace(solver, compact=compact)._sweep
        assert euler._by_turns == compact
        stage = jax.jit(lambda base, u, extra: euler(base, u, extra, t, dt, limit=limit))
        if limit:
            return [stage(base, u, extra)]
        made = lambda base, extra: jnp.sum(jnp.sin(euler(base, None, extra, t, dt).new))  # noqa: E731
        return [stage(base, u, extra), jax.jit(jax.grad(made, (0, 1)))(base, extra)]

    three, one = run(False), run(True)
    assert not limit or float(one[0].limited) > 0
    for tolerance, a, b in zip((1e-12, 1e-10), three, one, strict=False):
        close = lambda p, q, tol=tolerance: np.testing.assert_allclose(p, q, rtol=tol, atol=tol * float(jnp.abs(p).max()))  # noqa: E731
        jax.tree.map(close, a, b)


def test_a_box_whose_axes_differ_is_swept_axis_by_axis():
    for shape, lengths, sides in (
        ((6, 6, 8), (1.0, 1.0, 1.0), "periodic"),
        ((6, 6, 6), (1.0, 1.0, 2.0), "periodic"),
        ((6, 6, 6), (1.0, 1.0, 1.0), "outflow"),
        ((6, 6), (1.0, 1.0), "periodic"),
    ):
        solver = gas(Grid(shape, lengths, (sides, *["periodic"] * (len(shape) - 1))), 1.4)
        assert not solver.for_training()._sweep._by_turns


@pytest.mark.parametrize("dtype", [np.float64, np.float32])
@pytest.mark.usefixtures("x64")
def test_stages_in_a_loop_are_the_stages(monkeypatch, dtype):
    """Near a vacuum, too, where the first stage has to be exactly that of forward Euler."""
    solver = gas(Grid((12,), (1.0,)))
    u = jnp.asarray(rough_flow(solver.grid, 3), dtype).at[:, 4:7].multiply(1e-9)
    found = []
    for loop in (False, True):
        monkeypatch.setattr(type(solver), "large_program", property(lambda _, loop=loop: loop))
        # a function of its own, since the property is no part of what a compiled one is known by
        step = jax.jit(
            lambda u: Model(solver, SSPRK3(), 1e-3)(solver.encode(u), Model(solver, SSPRK3(), 1e-3).init_carry(u), jnp.asarray(0))[
                0
            ]
        )
        found.append(step(u))
    one, two = (np.asarray(z["u"]) for z in found)
    assert two.dtype == dtype
    np.testing.assert_allclose(two, one, rtol=64 * np.finfo(dtype).eps, atol=8 * np.finfo(dtype).eps * np.abs(u).max())
    assert (two[0] > 0).all()
    for name in ("injected", "events"):
        np.testing.assert_allclose(found[1][name], found[0][name], rtol=0, atol=8 * np.finfo(dtype).eps)
