"""What is measured on frames of a gas, against states whose answers are known."""

import json

import numpy as np
import pytest
import xarray as xr
from rich.console import Console

from hybridsim import diagnostics, gas, storage
from hybridsim.config import experiment_from
from hybridsim.contract import Variable
from hybridsim.experiment import _at_time, _mean_and_interval, evaluate_checks, run_experiment
from hybridsim.gas import Gas
from hybridsim.grid import Grid
from hybridsim.solvers.compressible import CompressibleNavierStokes
from hybridsim.solvers.cooling import PowerLawCooling
from hybridsim.solvers.finite_volume import StaggeredFiniteVolume
from hybridsim.solvers.godunov import CompressibleFiniteVolume
from hybridsim.solvers.incompressible import NavierStokes

GAMMA = 1.4
BOXES = [
    Grid((16,), (3.0,)),
    Grid((15,), (3.0,)),
    Grid((16, 16), (1.0, 1.0)),
    Grid((12, 9), (2.0, 3.0)),
    Grid((9, 12), (1.0, 1.0)),
    Grid((8, 8, 8), (1.0, 1.0, 1.0)),
    Grid((6, 9, 8), (1.0, 2.0, 0.7)),
    Grid((8, 6, 7), (1.0, 2.0, 0.7)),
]
OPEN = [
    Grid((12, 9), (2.0, 3.0), ("periodic", "outflow")),
    Grid((9, 12), (2.0, 3.0), ("outflow", "periodic")),
    Grid((6, 7, 8), (1.0, 2.0, 3.0), ("periodic", "periodic", "outflow")),
    Grid((6, 7, 8), (1.0, 2.0, 3.0), ("outflow", "periodic", "outflow")),
]


def name_of(grid):
    sides = "".join("p" if p else "o" for p in grid.periodic)
    return "x".join(map(str, grid.shape)) + sides


def channels(grid, scalars=()):
    names = ["density", *diagnostics.MOMENTA[: grid.ndim], "energy", *scalars]
    units = ["mass/length^3", *["mass/(length^2 time)"] * grid.ndim, "mass/(length time^2)", *["mass/length^3"] * len(scalars)]
    return tuple(Variable(name, unit, grid.centre) for name, unit in zip(names, units, strict=True))


def conserved(rho, v, p, *scalars):
    """`(…, *grid)`, `(…, d, *grid)`, `(…, *grid)` and mass fractions -> `(…, c, *grid)`."""
    d = next(d for d in (1, 2, 3) if v.ndim == rho.ndim + 1 and v.shape[-d - 1] == d and v.shape[-d:] == rho.shape[-d:])
    energy = p / (GAMMA - 1) + 0.5 * rho * (v**2).sum(axis=-d - 1)
    parts = [rho[..., None, *(slice(None),) * d], np.expand_dims(rho, -d - 1) * v, np.expand_dims(energy, -d - 1)]
    return np.concatenate([*parts, *(np.expand_dims(rho * c, -d - 1) for c in scalars)], axis=-d - 1)


def random_state(grid, *lead, seed=0, scalars=0):
    rng = np.random.default_rng(seed)
    shape = (*lead, *grid.shape)
    v = rng.standard_normal((*lead, grid.ndim, *grid.shape))
    return conserved(rng.uniform(0.5, 2, shape), v, rng.uniform(1, 3, shape), *(rng.uniform(0, 1, shape) for _ in range(scalars)))


# Pointwise


@pytest.mark.parametrize("grid", [BOXES[0], BOXES[3], BOXES[6]], ids=name_of)
def test_primitive_variables(grid):
    rng = np.random.default_rng(1)
    rho, p = rng.uniform(0.5, 2, (2, 3, *grid.shape)), rng.uniform(1, 3, (2, 3, *grid.shape))
    v = rng.standard_normal((2, 3, grid.ndim, *grid.shape))
    u = conserved(rho, v, p)
    w = gas.primitive(u, grid, GAMMA)
    np.testing.assert_allclose(w.density, rho)
    np.testing.assert_allclose(w.velocity, v, rtol=1e-12)
    np.testing.assert_allclose(w.pressure, p, rtol=1e-12)
    np.testing.assert_allclose(gas.velocity(u, grid), v, rtol=1e-12)
    np.testing.assert_allclose(gas.temperature(u, grid, GAMMA), p / rho, rtol=1e-12)
    np.testing.assert_allclose(gas.weighted_velocity(u, grid), np.sqrt(rho)[:, :, None] * v, rtol=1e-12)
    s = gas.log_density(u, grid)
    np.testing.assert_allclose(np.exp(s).mean(axis=tuple(range(2, s.ndim))), 1, rtol=1e-12)


def test_who_is_a_gas():
    grid = BOXES[3]
    assert diagnostics.is_gas(channels(grid))
    assert diagnostics.is_gas(channels(grid, ("dye",)))
    assert not diagnostics.is_gas(channels(grid)[::-1])
    solver = StaggeredFiniteVolume(grid, NavierStokes(0.1, None, {"density": 0.1}))
    assert not diagnostics.is_gas(solver.variables)
    assert gas.gas_of(solver) is None
    assert gas.gas_of(CompressibleFiniteVolume(grid, CompressibleNavierStokes(1.5))) == Gas(1.5, None)
    cooling = PowerLawCooling(amplitude=3.0, exponent=0.5, reference_temperature=1.0, floor=0.1)
    found = gas.gas_of(CompressibleFiniteVolume(grid, CompressibleNavierStokes(1.5, cooling=cooling)))
    assert found is not None
    assert found.rate is not None
    np.testing.assert_allclose(found.rate(np.array([1.0, 4.0, 0.05])), [3, 6, 0], rtol=1e-6)


def test_means_of_known_flows():
    """A shear flow on a uniform gas, a standing compression, and two layers of density."""
    grid = Grid((64, 32), (2 * np.pi, 2 * np.pi))
    x, y = grid.mesh()
    one = np.ones(grid.shape)
    shear = gas.series(conserved(one, np.stack([0.2 * np.sin(y), 0 * y]), 2 * one), grid, Gas(GAMMA))
    assert shear["mach"] == pytest.approx(0.2 * np.sqrt(0.5 / (GAMMA * 2)))
    assert shear["kinetic_energy"] == pytest.approx(0.5 * 0.02)
    assert shear["internal_energy"] == pytest.approx(2 / (GAMMA - 1))
    assert shear["total_energy"] == pytest.approx(float(shear["kinetic_energy"] + shear["internal_energy"]))
    assert shear["density_rms"] == pytest.approx(0, abs=1e-15)
    assert shear["dilatation"] == pytest.approx(0, abs=1e-14)
    h = grid.spacing[1]
    assert shear["enstrophy"] == pytest.approx(0.5 * 0.5 * (0.2 * np.sin(h) / h) ** 2)
    assert "emission" not in shear
    squeezed = gas.series(conserved(one, np.stack([np.sin(x), 0 * y]), one), grid, Gas(GAMMA, lambda t: 5 * t**2))
    h = grid.spacing[0]
    assert squeezed["dilatation"] == pytest.approx(np.sqrt(0.5) * np.sin(h) / h)
    assert squeezed["enstrophy"] == pytest.approx(0, abs=1e-15)
    assert squeezed["emission"] == pytest.approx(5)
    layered = gas.series(conserved(np.where(x < np.pi, 3.0, 1.0), np.zeros((2, *grid.shape)), one), grid, Gas(GAMMA))
    assert layered["density_rms"] == pytest.approx(0.5)


def test_scalar_variance_is_by_mass():
    grid = BOXES[2]
    left = grid.mesh()[0] < 0.5
    u = conserved(np.where(left, 3.0, 1.0), np.zeros((2, *grid.shape)), np.ones(grid.shape), np.where(left, 1.0, 0.0))
    np.testing.assert_allclose(gas.scalar_variance(u, grid), [0.75 * 0.25])
    assert gas.scalar_variance(random_state(grid, 2, 3), grid).shape == (2, 3, 0)


# Spectra


@pytest.mark.parametrize("grid", BOXES, ids=name_of)
def test_spectra_hold_all_the_energy(grid):
    u = random_state(grid, 2)
    for v in (gas.weighted_velocity(u, grid), gas.velocity(u, grid)):
        n, found = gas.spectrum(v, grid)
        assert found.shape == (2, 3, n.size)
        k0 = 2 * np.pi / max(grid.lengths)
        energy = 0.5 * (v**2).sum(axis=1).reshape(2, -1).mean(axis=1)
        np.testing.assert_allclose(found[:, 0].sum(axis=-1) * k0, energy, rtol=1e-14)
        np.testing.assert_allclose(found[:, 0], diagnostics.shell_spectrum(v, grid)[1], rtol=1e-13)
        np.testing.assert_allclose(found[:, 1] + found[:, 2], found[:, 0], rtol=1e-13, atol=1e-15 * found.max())
        assert (found[:, 2] > 0).any()
        # the mean flow is solenoidal
        assert (found[:, 2, 0] == 0).all()
        for part, field in zip(found[:, 1:].swapaxes(0, 1), gas.helmholtz(v, grid), strict=True):
            np.testing.assert_allclose(part, diagnostics.shell_spectrum(field, grid)[1], rtol=1e-12, atol=1e-14 * found.max())


@pytest.mark.parametrize("grid", BOXES, ids=name_of)
def test_the_helmholtz_split(grid):
    """v_s has no divergence, v_c no curl, both are real, orthogonal, and add up; what is pure stays so."""
    v = np.random.default_rng(2).standard_normal((grid.ndim, *grid.shape))
    solenoidal, compressive = gas.helmholtz(v, grid)
    np.testing.assert_allclose(solenoidal + compressive, v, atol=1e-14)
    assert np.abs(diagnostics.divergence_spectral(solenoidal, grid)).max() < 1e-11
    assert abs((solenoidal * compressive).mean()) < 1e-14
    np.testing.assert_allclose(compressive.reshape(grid.ndim, -1).mean(axis=1), 0, atol=1e-15)
    again = gas.helmholtz(compressive, grid)[1]
    np.testing.assert_allclose(again, compressive, atol=1e-13)
    np.testing.assert_allclose(gas.helmholtz(solenoidal, grid)[1], 0, atol=1e-13)
    if grid.ndim > 1:
        names = [Variable(name, "1", grid.centre) for name in "uvw"[: grid.ndim]]
        assert np.abs(diagnostics.vorticity(compressive, grid, names)).max() < 1e-11


def test_a_potential_flow_is_compressive_and_a_shear_is_not():
    grid = Grid((16, 24), (2 * np.pi, 2 * np.pi))
    x, y = grid.mesh()
    potential = np.stack([np.cos(2 * x + 3 * y) * 2, np.cos(2 * x + 3 * y) * 3])
    shear = np.stack([0.5 + np.cos(4 * y), 0 * y])
    n, found = gas.spectrum(potential + shear, grid)
    np.testing.assert_allclose(found[2], np.where(n == 4, 0.25 * 13, 0), atol=1e-14)
    np.testing.assert_allclose(found[1], np.where(n == 4, 0.25, np.where(n == 0, 0.125, 0)), atol=1e-14)


@pytest.mark.parametrize("grid", OPEN, ids=name_of)
def test_spectra_along_the_periodic_axes(grid):
    """Between open sides: the mean over planes of the spectra in them; Parseval holds, and a wave along x is found at its shell."""
    v = gas.weighted_velocity(random_state(grid, 2, 3), grid)
    along = gas.spectral_grid(grid)
    assert along is not None
    n, found = gas.spectrum(v, grid)
    assert found.shape == (2, 3, 1, n.size)
    energy = 0.5 * (v**2).sum(axis=2).reshape(2, 3, -1).mean(axis=-1)
    np.testing.assert_allclose(found[:, :, 0].sum(axis=-1) * 2 * np.pi / max(along.lengths), energy, rtol=1e-14)
    first = grid.periodic.index(True)
    wave = np.zeros((grid.ndim, *grid.shape))
    other = next(a for a in range(grid.ndim) if not grid.periodic[a])
    x = grid.mesh()
    wave[0] = np.cos(4 * np.pi * x[first] / grid.lengths[first]) * (1 + x[other])
    _, found = gas.spectrum(wave, grid)
    shell = round(2 * max(along.lengths) / grid.lengths[first])
    assert np.flatnonzero(found[0] > 1e-14 * found.max()).tolist() == [shell]


def test_no_periodic_axis_no_spectrum():
    grid = Grid((8, 8), (1.0, 1.0), ("outflow", "outflow"))
    assert gas.spectral_grid(grid) is None
    with pytest.raises(ValueError, match="no spectra without a periodic axis"):
        gas.spectrum(np.zeros((2, 8, 8)), grid)
    with pytest.raises(ValueError, match="needs a periodic box"):
        gas.helmholtz(np.zeros((2, 12, 9)), OPEN[0])


# Against a reference


@pytest.mark.parametrize("grid", BOXES + OPEN, ids=name_of)
def test_modes_hold_everything_and_the_band_only(grid):
    q = np.random.default_rng(3).standard_normal((2, *grid.shape))
    inner = tuple(range(1, q.ndim))
    hat, weights = gas._modes(q, grid, max(grid.shape))
    np.testing.assert_allclose((weights * np.abs(hat) ** 2).sum(axis=inner), (q**2).mean(axis=inner), rtol=1e-13)
    np.testing.assert_allclose(hat[(..., *(0,) * grid.ndim)], q.mean(axis=inner), rtol=1e-12)
    hat, weights = gas._modes(q, grid, 2)
    if all(grid.periodic):
        banded = diagnostics.band_limit(q, grid, 2)
        np.testing.assert_allclose((weights * np.abs(hat) ** 2).sum(axis=inner), (banded**2).mean(axis=inner), rtol=1e-13)
    else:
        a = grid.periodic.index(False)
        n = grid.shape[a]
        for m, inside in ((4, True), (5, False)):
            wave = np.moveaxis(
                np.broadcast_to(np.cos(np.pi * m * (np.arange(n) + 0.5) / n), (*grid.shape[:a], *grid.shape[a + 1 :], n)), -1, a
            )
            hat, weights = gas._modes(wave, grid, 2)
            assert (weights * np.abs(hat) ** 2).sum() == pytest.approx(0.5 * inside, abs=1e-14)


@pytest.mark.parametrize("grid", [BOXES[1], BOXES[3], BOXES[7], OPEN[0], OPEN[2]], ids=name_of)
def test_known_errors(grid):
    """Twice the density at the same velocity and pressure: e_ρ = 1, e_√ρv = √2 − 1, e_p = 0."""
    rng = np.random.default_rng(4)
    rho, p = rng.uniform(0.5, 2, (2, *grid.shape)), rng.uniform(1, 3, (2, *grid.shape))
    v = rng.standard_normal((2, grid.ndim, *grid.shape))
    u_ref, u = conserved(rho, v, p), conserved(2 * rho, v, p)
    errors, rho_rho = gas.compare(u, u_ref, grid, GAMMA, 3)
    np.testing.assert_allclose(errors["density"], 1, rtol=1e-12)
    np.testing.assert_allclose(errors["weighted_velocity"], np.sqrt(2) - 1, rtol=1e-12)
    np.testing.assert_allclose(errors["pressure"], 0, atol=1e-13)
    np.testing.assert_allclose(rho_rho, 1, rtol=1e-12)
    np.testing.assert_allclose(gas.error_of(errors), 1, rtol=1e-12)
    same, _ = gas.compare(u_ref, u_ref, grid, GAMMA, 3)
    assert all((e == 0).all() for e in same.values())


def test_only_the_band_is_compared():
    grid = Grid((32, 24), (1.0, 2.0))
    x, y = grid.mesh()
    one, still = np.ones(grid.shape), np.zeros((2, *grid.shape))
    fine, coarse = 0.1 * np.cos(2 * np.pi * 9 * x), 0.1 * np.cos(2 * np.pi * 3 * y / 2)
    ref = conserved(one, still, one)[None]
    assert gas.compare(conserved(one + fine, still, one)[None], ref, grid, GAMMA, 8)[0]["density"] == pytest.approx(0, abs=1e-14)
    errors, _ = gas.compare(conserved(one + coarse, still, one)[None], ref, grid, GAMMA, 8)
    assert errors["density"] == pytest.approx(0.1 * np.sqrt(0.5))


def test_correlation_of_the_fluctuation():
    grid = Grid((24, 16), (1.0, 1.0))
    x = grid.mesh()[0]
    one, still = np.ones(grid.shape), np.zeros((2, *grid.shape))
    ref = conserved(3 + 0.1 * np.cos(2 * np.pi * x), still, one)
    turned = conserved(5 + 0.4 * np.cos(2 * np.pi * x + 0.7), still, one)
    flat = conserved(7 * one, still, one)
    frames = np.stack([ref, turned, flat, np.full_like(flat, np.nan)])
    errors, rho = gas.compare(frames, np.stack([ref] * 4), grid, GAMMA, 4)
    np.testing.assert_allclose(rho, [1, np.cos(0.7), 0, 0], atol=1e-12)
    assert np.isfinite(errors["density"]).tolist() == [True, True, True, False]
    # rounding is no fluctuation
    noisy = flat * (1 + 1e-7 * np.random.default_rng(0).standard_normal(flat.shape))
    assert gas.compare(noisy.astype(np.float32), flat, grid, GAMMA, 4)[1] == 1
    with pytest.raises(ValueError, match="reference has frames that are not finite"):
        gas.compare(frames, frames, grid, GAMMA, 4)


def test_a_density_below_zero_has_no_error():
    grid = BOXES[2]
    ref = random_state(grid, 1)
    bad = ref.copy()
    bad[0, 0, 2, 2] = -0.1
    errors, rho = gas.compare(bad, ref, grid, GAMMA, 4)
    assert np.isnan(errors["weighted_velocity"]).all()
    assert np.isnan(gas.error_of(errors)).all()
    assert np.isfinite(rho).all()


# Phases


def test_mass_and_emission_per_temperature():
    grid = Grid((20, 10), (1.0, 1.0))
    share = grid.mesh()[0] < 0.25
    t, rho = np.where(share, 1.3, 130.0), np.where(share, 100.0, 1.0)
    u = conserved(rho, np.zeros((2, *grid.shape)), rho * t)[None]
    bins = gas.temperature_bins(1.3, 130.0)
    assert bins[0] < 1.3
    assert bins[-1] > 130
    np.testing.assert_allclose(np.diff(np.log10(bins)), 0.1)
    mass, emission = gas.phases(u, grid, Gas(GAMMA, np.sqrt), bins)[0]
    cold, hot = (int(np.argmin(np.abs(np.log(bins / value)))) for value in (1.3, 130.0))
    assert np.flatnonzero(mass).tolist() == [cold, hot]
    np.testing.assert_allclose(mass[[cold, hot]], [25, 0.75])
    np.testing.assert_allclose(emission[[cold, hot]], [0.25 * 1e4 * np.sqrt(1.3), 0.75 * np.sqrt(130)])
    # the outermost bins hold what lies beyond
    narrow = gas.temperature_bins(10.0, 20.0)
    found = gas.phases(u, grid, Gas(GAMMA, np.sqrt), narrow)[0, 0]
    np.testing.assert_allclose(found[[0, -1]], [25, 0.75])
    assert gas.phase_distance(mass, mass) == 0
    assert gas.phase_distance(np.roll(mass, 1), mass) == pytest.approx(2)
    assert gas.phase_distance(1.1 * mass, mass) == pytest.approx(0.1)


def test_bins_are_the_same_for_everyone():
    """Bins of different runs lie on one lattice."""
    one, two = gas.temperature_bins(0.9, 110.0), gas.temperature_bins(0.013, 2.0)
    np.testing.assert_allclose([t for t in two if t > one[0] / 1.01], [t for t in one if t < two[-1] * 1.01])


# Labelled data


def labelled(grid, *, scalars=(), broken=False, **options):
    times = np.linspace(0, 1, 5)
    u = random_state(grid, 2, 5, scalars=len(scalars)).astype(np.float32)
    if broken:
        u[1, 3:] = np.nan
    variables = channels(grid, scalars)
    ds = diagnostics.field_dataset(u, times, grid, variables, {"label": "made up"})
    reference = random_state(grid, 2, 5, scalars=len(scalars))
    return gas.with_diagnostics(
        ds, u, grid, variables, Gas(GAMMA, lambda t: t**0.5), reference=reference, modes=3, statistics_from=0.5, **options
    )


@pytest.mark.parametrize("grid", [BOXES[0], BOXES[3], BOXES[6], OPEN[0], OPEN[3]], ids=name_of)
def test_files_tell_what_they_hold(grid, tmp_path):
    ledger = {"energy_added": np.ones((2, 5)), "radiated": np.ones((2, 5)), "floor_events": np.zeros((2, 5))}
    labelled(grid, scalars=("dye",), ledger=ledger).to_netcdf(tmp_path / "run.nc")
    ds = xr.open_dataset(tmp_path / "run.nc")
    for name in ds.variables:
        assert ds[name].attrs.get("long_name") or name in ("scalar", "variable"), name
        if ds[name].dtype.kind == "f":
            assert ds[name].attrs.get("units"), name
    assert ds["density"].attrs == {"long_name": "density ρ", "units": "mass/length^3"}
    assert ds["dye"].attrs["long_name"] == "density of the scalar dye"
    assert ds["kinetic_energy"].attrs["units"] == ds["energy"].attrs["units"]
    assert ds.attrs["gamma"] == GAMMA
    assert ds["error"].dims == ("field", "sample", "time")
    assert ds["correlation"].dims == ds["mach"].dims == ("sample", "time")
    assert ds["spectrum"].dims == ("sample", "wavenumber")
    np.testing.assert_allclose(ds["spectrum"].attrs["window"], [0.5, 1])
    assert ("enstrophy" in ds) == (grid.ndim > 1)
    if all(grid.periodic):
        assert ds["spectrum_parts"].dims == ("part", "sample", "wavenumber")
        np.testing.assert_allclose(ds["spectrum_parts"].sum("part"), ds["spectrum"], rtol=1e-12)
        assert "along" not in ds["spectrum"].attrs
    else:
        assert "spectrum_parts" not in ds
        assert ds["spectrum"].attrs["along"] == " ".join("xyz"[a] for a in range(grid.ndim) if grid.periodic[a])
    # means over the window
    energy = ds["kinetic_energy"].sel(time=slice(0.5, None)).mean("time")
    k0 = float(ds["wavenumber"][1])
    np.testing.assert_allclose(ds["spectrum"].sum("wavenumber") * k0, energy, rtol=1e-12)
    mass = ds["density"].sel(time=slice(0.5, None)).mean([d for d in ds["density"].dims if d != "sample"])
    np.testing.assert_allclose(ds["mass_per_temperature"].sum("temperature"), mass, rtol=1e-6)
    emission = ds["emission"].sel(time=slice(0.5, None)).mean("time")
    np.testing.assert_allclose(ds["emission_per_temperature"].sum("temperature"), emission, rtol=1e-12)


def test_a_broken_sample_spoils_itself_only():
    ds = labelled(BOXES[3], broken=True)
    for name in ("spectrum", "mass_per_temperature"):
        assert np.isfinite(ds[name][0]).all(), name
        assert np.isnan(ds[name][1]).all(), name
    assert np.isnan(ds["mach"][1, 3:]).all()
    assert np.isfinite(ds["mach"][1, :3]).all()
    assert (ds["correlation"][1, 3:] == 0).all()
    assert np.isnan(ds["error"][:, 1, 3:]).all()


def test_drift_of_a_gas():
    """Momentum is measured against Σ|ρv| of the vector, and against Σρc where all is at rest."""
    grid = Grid((8, 4), (1.0, 1.0))
    one = np.ones(grid.shape)
    variables = channels(grid)
    gains = np.zeros((1, 2, 4))
    gains[:, 1, 2] = 0.01
    for speed, scale in ((0.5, 0.5), (0.0, np.sqrt(GAMMA))):
        start = conserved(one, np.stack([speed * one, 0 * one]), one)
        end = start.copy()
        end[2] += 0.01
        u = np.stack([start, end])[None]
        ds = diagnostics.field_dataset(u, np.array([0.0, 1.0]), grid, variables)
        ds_plain = gas.with_diagnostics(ds, u, grid, variables, Gas(GAMMA))
        np.testing.assert_allclose(ds_plain["drift"].sel(variable="momentum_y")[0], [0, 0.01 / scale], rtol=1e-12)
        sums = diagnostics.conserved_sums(u[:, :1], grid) + gains
        known = gas.with_diagnostics(ds, u, grid, variables, Gas(GAMMA), expected_sums=sums, conserved=("density", "momentum_y"))
        assert known["variable"].values.tolist() == ["density", "momentum_y"]
        assert float(known["drift"].max()) < 1e-14


# Runs

CHEAP = {"solver": {"use": "finite_volume", "reconstruction": "constant", "riemann": "llf"}, "stepper": "forward_euler"}
LAYER = {
    "equation": {
        "use": "compressible",
        "gamma": 1.5,
        "viscosity": 1e-2,
        "scalars": {"dye": 1e-2},
        "cooling": {"use": "power_law", "amplitude": 0.5, "exponent": 0.5, "reference_temperature": 1.0, "floor": 0.01},
    },
    "domain": {"lengths": [1.0, 2.0], "boundaries": ["periodic", "outflow"]},
    "initial": {"use": "mixing_layer", "contrast": 10.0, "width": 0.1, "highest_mode": 3},
    "samples": {"count": 2, "seed": 1},
    "time": {"end": 0.2, "frames": 4, "statistics_from": 0.1},
    "reference": {**CHEAP, "shape": [16, 32]},
    "runs": {"bare": {**CHEAP, "shape": [8, 16]}},
    "compare": {"modes": 3, "at": 0.125},
    "checks": {
        "all": {"drift": 1e-5, "floors": {"events": 0, "mass": 0.0}, "bound_violations": 0, "error": 0.2, "temperature_error": 0.5},
        "bare": {"spectrum_error": 2.0, "density_error": 1e-9, "divergence_max": 1.0},
    },
}


def test_a_gas_is_run_and_judged(tmp_path, x64):
    console = Console(file=(tmp_path / "out.txt").open("w"))
    assert run_experiment(experiment_from(LAYER, tmp_path / "layer.yaml"), tmp_path / "layer", False, console) == 1
    console.file.close()
    summary = json.loads((tmp_path / "layer/summary.json").read_text(encoding="utf-8"), parse_constant=pytest.fail)
    row = summary["runs"]["bare"]
    failed = {c["name"]: c["sentence"] for c in summary["checks"] if not c["passed"]}
    assert set(failed) == {"density_error", "divergence_max"}
    assert "need not be free of divergence" in failed["divergence_max"]
    assert row["accuracy"] == {"metric": "temperature_error", "value": row["temperature_error"], "window": [0.1, 0.2]}
    assert row["error_at"] == 0.125
    assert row["error"] >= max(row["density_error"], row["weighted_velocity_error"]) * (1 - 1e-12) > 0
    assert row["error_interval"][0] <= row["error"] <= row["error_interval"][1]
    assert row["floors"] == {"events": 0, "mass": 0, "energy": 0}
    assert row["bound_violations"] == 0
    assert set(row["drift"]) == {"density", "momentum_x", "momentum_y", "energy", "dye"}
    assert {"mach", "density_rms", "kinetic_energy", "dilatation", "emission", "scalar_variance:dye"} <= set(row["statistics"])
    assert "energy" not in row["statistics"]
    budget = row["energy_budget"]
    assert budget["radiated"] > 1e-3
    assert budget["residual"] < 1e-5 * budget["start"]
    assert budget["end"] == pytest.approx(budget["start"] + budget["added"] - budget["radiated"], rel=1e-5)
    assert set(summary["reference"]["change"]) == set(gas.FIELDS)
    ds = storage.open_dataset(tmp_path / "layer/bare.nc")
    truth = storage.open_dataset(tmp_path / "layer/reference.nc", row["group"])
    np.testing.assert_array_equal(ds["temperature"], truth["temperature"])
    distance = gas.phase_distance(*(d["mass_per_temperature"].mean("sample").values for d in (ds, truth)))
    assert row["temperature_error"] == pytest.approx(distance)
    middle = ds["error"].sel(field="density").isel(time=[2, 3]).mean()
    assert row["density_error"] == pytest.approx(float(middle))
    # at t = 0 the two are the same, but for single precision
    assert float(ds["error"].isel(time=0).max()) < 1e-6
    # what was radiated is what the emission says, to the width of a frame
    emitted = np.trapezoid(ds["emission"], ds["time"], axis=-1)
    np.testing.assert_allclose(ds["radiated"].isel(time=-1), emitted, rtol=0.1)
    figures = {f.stem for f in (tmp_path / "layer/figures").iterdir()}
    assert {"density", "temperature", "error", "phases", "budget", "spectra", "distribution", "energy", "convergence"} <= figures


def test_values_at_a_time():
    values = xr.DataArray([[0.0, 1.0, 5.0]], {"time": [0.0, 1.0, 2.0]}, ("sample", "time"))
    assert [float(_at_time(values, t)[0]) for t in (0.0, 0.5, 1.0, 1.25, 2.0)] == pytest.approx([0, 0.5, 1, 2, 5])
    broken = values.copy(data=[[0.0, 1.0, np.nan]])
    assert float(_at_time(broken, 1.0)[0]) == 1
    assert np.isnan(_at_time(broken, 1.5)[0])
    mean, (low, high) = _mean_and_interval(np.array([1.0, 2.0, 3.0, 6.0]))
    assert mean == 3
    assert 1 < low < 3 < high < 6
    assert _mean_and_interval(np.array([2.0])) == (2, [2, 2])
    assert _mean_and_interval(np.array([2.0, np.nan])) == (None, [None, None])


def test_checks_on_floors(tmp_path):
    limits = {"all": {"floors": {"events": 2, "mass": 1e-6}, "limited_faces": 5}}
    experiment = experiment_from(LAYER | {"checks": limits}, tmp_path / "layer.yaml")
    row = {"outcome": "finished", "floors": {"events": 3, "mass": 1e-7, "energy": 9.0}, "limited_faces": 4, "not_defined": {}}
    found = {r["name"]: r for r in evaluate_checks(experiment, {"bare": row})}
    assert {name: r["passed"] for name, r in found.items()} == {"floors.events": False, "floors.mass": True, "limited_faces": True}
    assert found["floors.events"]["sentence"] == "bare: floors.events = 3 is not at most 2"
    found = evaluate_checks(experiment, {"bare": {"outcome": "finished", "not_defined": {}}})
    assert not any(r["passed"] for r in found)
    assert found[0]["sentence"] == "bare: floors.events has no value (this flow has none), so it cannot be at most 2"
