"""Diagnostics against closed forms: single modes, Parseval, Taylor–Green on the staggered grid, profiles between walls."""

import jax.numpy as jnp
import numpy as np
import pytest

from hybridsim import diagnostics as d
from hybridsim.contract import Variable
from hybridsim.grid import Grid
from hybridsim.solvers.finite_volume import StaggeredFiniteVolume
from hybridsim.solvers.incompressible import Moving, NavierStokes
from hybridsim.solvers.kuramoto_sivashinsky import FiniteVolumeKS, KuramotoSivashinsky, SpectralKS

TWO_PI = 2 * np.pi


def centred(grid, unit="1"):
    return tuple(Variable(name, unit, grid.centre) for name in "uvw"[: grid.ndim])


def staggered(grid, unit="1"):
    places = [tuple(1.0 if b == a else 0.5 for b in range(grid.ndim)) for a in range(grid.ndim)]
    return tuple(Variable(name, unit, at) for name, at in zip("uvw", places, strict=False))


def sample(grid, variables, *functions):
    return np.stack([np.broadcast_to(f(*grid.mesh(v.at)), grid.shape) for f, v in zip(functions, variables, strict=True)])


def taylor_green(grid, variables, kx=1, ky=1):
    return sample(
        grid,
        variables,
        lambda x, y: ky * np.sin(kx * x) * np.cos(ky * y),
        lambda x, y: -kx * np.cos(kx * x) * np.sin(ky * y),
    )


def noise(shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape)


GRIDS = [
    Grid((17,), (3.0,)),
    Grid((16, 16), (TWO_PI, TWO_PI)),
    Grid((15, 21), (TWO_PI, 3.0)),
    Grid((12, 9), (1.0, 4.0)),
    Grid((7, 8, 10), (1.0, 2.0, 1.5)),
]


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_spectrum_sums_to_the_energy(grid):
    u = noise((3, 2, grid.ndim, *grid.shape)) + 0.3
    n, spectrum = d.shell_spectrum(u, grid)
    energy = 0.5 * (u**2).sum(axis=2).reshape(3, 2, -1).mean(axis=-1)
    k0 = TWO_PI / max(grid.lengths)
    assert spectrum.shape == (3, 2, n.size)
    np.testing.assert_allclose(spectrum.sum(axis=-1) * k0, energy, rtol=1e-14)
    np.testing.assert_allclose(d.kinetic_energy(u, grid, centred(grid)), energy, rtol=1e-14)


def test_spectrum_of_large_field_is_exact():
    grid = Grid((256, 128), (TWO_PI, TWO_PI))
    u = noise((2, *grid.shape))
    _, spectrum = d.shell_spectrum(u, grid)
    assert abs(spectrum.sum() / (0.5 * (u**2).sum(axis=0).mean()) - 1) < 1e-14


@pytest.mark.parametrize(
    ("grid", "mode", "shell"),
    [
        (Grid((32, 32), (TWO_PI, TWO_PI)), (3, 4), 5),
        (Grid((32, 32), (TWO_PI, TWO_PI)), (0, 16), 16),  # Nyquist of the halved axis
        (Grid((32, 32), (TWO_PI, TWO_PI)), (16, 16), 23),  # the corner
        (Grid((32, 32), (TWO_PI, TWO_PI)), (0, 0), 0),
        (Grid((31, 33), (TWO_PI, TWO_PI)), (-2, 1), 2),
        (Grid((16, 16), (TWO_PI, np.pi)), (0, 3), 6),  # k₀ is set by the longer side
        (Grid((16, 16), (TWO_PI, TWO_PI * 2 / 3)), (0, 1), 2),  # |k| = 1.5 k₀ opens shell 2
    ],
)
def test_single_mode_falls_into_its_shell(grid, mode, shell):
    x, y = grid.mesh((0.0, 0.0))
    wave = np.cos(TWO_PI * (mode[0] * x / grid.lengths[0] + mode[1] * y / grid.lengths[1]))
    n, spectrum = d.shell_spectrum(np.stack([wave, 0 * wave]), grid)
    assert n[np.argmax(spectrum)] == shell
    k0 = TWO_PI / max(grid.lengths)
    assert spectrum[shell] * k0 == pytest.approx(0.5 * (wave**2).mean(), rel=1e-13)
    assert np.delete(spectrum, shell).max() < 1e-28


def test_spectrum_does_not_depend_on_the_place():
    grid = Grid((24, 20), (TWO_PI, TWO_PI))
    spectra = [d.shell_spectrum(taylor_green(grid, v(grid), 3, 2), grid)[1] for v in (centred, staggered)]
    np.testing.assert_allclose(*spectra, atol=1e-15)


@pytest.mark.parametrize("places", [centred, staggered])
@pytest.mark.parametrize("shape", [(16, 16), (15, 18)])
def test_vorticity_of_taylor_green(places, shape):
    grid = Grid(shape, (TWO_PI, TWO_PI))
    variables = places(grid)
    x, y = grid.mesh()
    exact = (2**2 + 3**2) * np.sin(2 * x) * np.sin(3 * y)
    u = taylor_green(grid, variables, 2, 3)
    np.testing.assert_allclose(d.vorticity(u, grid, variables), exact, atol=1e-12)
    assert d.enstrophy(u, grid, variables) == pytest.approx(0.5 * (exact**2).mean(), rel=1e-12)
    assert d.kinetic_energy(u, grid, variables) == pytest.approx((2**2 + 3**2) / 8, rel=1e-12)


def test_vorticity_in_a_box_that_is_not_square_and_with_other_channels():
    grid = Grid((20, 12), (3.0, 1.0))
    a, b = TWO_PI / 3.0, TWO_PI
    variables = (Variable("density", "1", grid.centre), *staggered(grid))
    u = np.concatenate(
        [np.ones((1, *grid.shape)), sample(grid, variables[1:], lambda x, y: np.sin(b * y), lambda x, y: np.cos(a * x))]
    )
    x, y = grid.mesh()
    np.testing.assert_allclose(d.vorticity(u, grid, variables), -a * np.sin(a * x) - b * np.cos(b * y), atol=1e-12)


def test_vorticity_in_three_dimensions_is_that_of_an_abc_flow():
    grid = Grid((12, 10, 9), (TWO_PI,) * 3)
    for variables in (centred(grid), staggered(grid)):
        u = sample(
            grid,
            variables,
            lambda x, y, z: np.sin(z) + np.cos(y),
            lambda x, y, z: np.sin(x) + np.cos(z),
            lambda x, y, z: np.sin(y) + np.cos(x),
        )
        at_centres = sample(
            grid,
            centred(grid),
            lambda x, y, z: np.sin(z) + np.cos(y),
            lambda x, y, z: np.sin(x) + np.cos(z),
            lambda x, y, z: np.sin(y) + np.cos(x),
        )
        np.testing.assert_allclose(d.vorticity(u, grid, variables), at_centres, atol=1e-12)  # curl u = u
        assert d.divergence_max(u, grid, variables) < 1e-12


def test_vorticity_drops_nyquist():
    grid = Grid((8, 8), (TWO_PI, TWO_PI))
    x, _ = grid.mesh((0.0, 0.0))
    u = np.stack([0 * x, np.cos(4 * x)])
    assert np.abs(d.vorticity(u, grid, centred(grid))).max() < 1e-13


def test_band_limit_keeps_whole_axes_and_is_idempotent():
    grid = Grid((16, 18), (TWO_PI, 3.0))
    x, y = grid.mesh()
    q = TWO_PI / 3.0
    low, high = np.cos(3 * x) * np.sin(3 * q * y), np.cos(4 * x) + np.sin(5 * q * y)
    np.testing.assert_allclose(d.band_limit(low + high, grid, 3), low, atol=1e-13)
    w = noise((2, *grid.shape))
    once = d.band_limit(w, grid, 3)
    np.testing.assert_allclose(d.band_limit(once, grid, 3), once, atol=1e-13)
    np.testing.assert_allclose(d.band_limit(w, grid, 9), w, atol=1e-13)


def test_correlation_of_mixed_fields():
    grid = Grid((32, 32), (TWO_PI, TWO_PI))
    variables = staggered(grid)
    a, b = taylor_green(grid, variables, 2, 2), taylor_green(grid, variables, 3, 1)
    a, b = (w / np.sqrt((d.vorticity(w, grid, variables) ** 2).mean()) for w in (a, b))
    angles = np.linspace(0, np.pi, 7).reshape(7, 1, 1, 1)
    u = np.cos(angles) * a + np.sin(angles) * b
    rho = d.correlation(u, np.broadcast_to(a, u.shape), grid, variables, 15)
    np.testing.assert_allclose(rho, np.cos(angles.ravel()), atol=1e-13)
    # what lies outside the band does not count
    far = u + 5 * taylor_green(grid, variables, 12, 12)
    np.testing.assert_allclose(d.correlation(far, np.broadcast_to(a, u.shape), grid, variables, 8), rho, atol=1e-12)
    assert d.correlation(far, np.broadcast_to(a, u.shape), grid, variables, 15)[0] < 0.5


def test_correlation_compares_like_with_like():
    """The staggered and the centred samples of one flow have the same vorticity; read at the wrong places they do not."""
    grid = Grid((16, 16), (TWO_PI, TWO_PI))
    u = taylor_green(grid, staggered(grid), 3, 3)
    wrong = taylor_green(grid, centred(grid), 3, 3)
    assert d.correlation(u, u, grid, staggered(grid), 7) == pytest.approx(1, abs=1e-14)
    assert d.correlation(u, wrong, grid, staggered(grid), 7) < 0.95


def test_diverged_frames_are_uncorrelated():
    grid = Grid((16, 16), (TWO_PI, TWO_PI))
    variables = centred(grid)
    u_ref = noise((2, 4, 2, 16, 16))
    u = u_ref.copy()
    u[0, 2:] = np.nan
    u[1, 3, 0, 5, 5] = np.inf
    rho = d.correlation(u, u_ref, grid, variables, 7)
    np.testing.assert_allclose(rho, [[1, 1, 0, 0], [1, 1, 1, 0]], atol=1e-13)
    np.testing.assert_allclose(d.correlation(1e200 * u_ref, u_ref, grid, variables, 7), 1, atol=1e-13)
    rest = d.correlation(0 * u_ref, u_ref, grid, variables, 7)
    assert (rest == 0).all()
    assert (d.correlation(0 * u_ref, 0 * u_ref, grid, variables, 7) == 1).all()
    with pytest.raises(ValueError, match="reference"):
        d.correlation(u_ref, u, grid, variables, 7)


def test_correlation_in_one_dimension_is_of_the_field():
    grid = Grid((32,), (TWO_PI,))
    (x,) = grid.mesh()
    u, u_ref = (np.sin(x) + np.cos(2 * x))[None], np.sin(x)[None]
    assert d.correlation(u, u_ref, grid, centred(grid), 10) == pytest.approx(np.sqrt(0.5), abs=1e-14)


def test_independent_random_fields_are_uncorrelated():
    grid = Grid((64, 64), (TWO_PI, TWO_PI))
    rho = d.correlation(noise((8, 2, 64, 64), 1), noise((8, 2, 64, 64), 2), grid, centred(grid), 31)
    assert np.abs(rho).max() < 0.1


def test_crossing_time():
    t = np.linspace(0, 10, 11)
    rho = 1 - 0.07 * t
    assert d.crossing_time(t, rho, 0.8)[0] == pytest.approx(0.2 / 0.07)
    assert d.crossing_time(t, rho, 0.8)[1] is None
    assert d.crossing_time(t, rho, 0.1) == (None, 10.0)
    assert d.crossing_time(t, np.full(11, 0.95), 0.95) == (None, 10.0)
    assert d.crossing_time(t, rho, 1.1) == (0.0, None)
    comes_back = np.array([1, 1, 0.5, 1, 1, 0, 0, 0, 0, 0, 0])
    assert d.crossing_time(t, comes_back, 0.75)[0] == pytest.approx(1.5)
    broken = np.where(t > 4.5, np.nan, 1.0)
    assert d.crossing_time(t, broken, 0.5)[0] == pytest.approx(4.5)


def test_t_correlated_and_its_interval():
    t = np.linspace(0, 10, 101)
    ends = np.array([4.0, 5.0, 6.0, 7.0])
    corr = np.clip(1 - 0.2 * t / ends[:, None], 0, 1)  # falls to 0.8 at `ends`, straight
    found = d.t_correlated(t, corr, 0.8)
    exact = 1 / np.mean(1 / ends)
    assert found.time == pytest.approx(exact)
    assert found.at_least is None
    assert 4.0 <= found.low < exact < found.high <= 7.0
    assert found == d.t_correlated(t, corr, 0.8)
    never = d.t_correlated(t, corr, 0.1)
    assert never == d.CorrelationTime(None, 10.0, None, None)
    single = d.t_correlated(t, corr[:1], 0.8)
    assert single.low == single.high == pytest.approx(4.0)


def test_bootstrap_covers_the_truth():
    """Nine in ten intervals of many experiments hold the true crossing (fewer with so few samples, never half)."""
    rng = np.random.default_rng(3)
    t = np.linspace(0, 10, 51)
    hits = 0
    for seed in range(60):
        rate = 0.04 * (1 + 0.3 * rng.uniform(-1, 1, 16))
        found = d.t_correlated(t, 1 - rate[:, None] * t, 0.8, resamples=200, seed=seed)
        hits += found.low <= 5.0 <= found.high
    assert 45 <= hits <= 60


def test_frozen_samples_are_counted():
    t = np.linspace(0, 100, 1001)
    chaotic = np.random.default_rng(0).standard_normal((4, 1001)) + 2
    ends = np.where(t < 60, chaotic[0], 2.0 + 1e-3 * np.sin(t))
    assert d.frozen(chaotic, chaotic) == 0
    assert d.frozen(np.stack([ends, chaotic[1], 0.05 * chaotic[2], ends]), chaotic) == 3
    assert d.frozen(np.stack([np.where(t < 95, ends, chaotic[0]), np.full(1001, np.nan)]), chaotic) == 0


def test_velocity_error_is_that_of_the_band():
    grid = Grid((32, 32), (2 * np.pi, 2 * np.pi))
    x, y = grid.mesh()
    u_ref = np.stack([np.sin(y), 2 * np.cos(x)])
    u = u_ref + 0.3 * np.stack([np.cos(2 * y), np.sin(x)]) + np.stack([np.cos(9 * y), 0 * x])
    frames, truth = np.stack([u, u_ref, np.full_like(u, np.nan), -1e200 * u_ref]), np.stack([u_ref] * 3 + [1e200 * u_ref])
    found = d.velocity_error(frames, truth, grid, centred(grid), 4)
    np.testing.assert_allclose(found, [0.3 * np.sqrt(2 / 5), 0, np.nan, 2], rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(d.velocity_error(u, u_ref, grid, centred(grid), 9), np.sqrt((2 * 0.09 + 1) / 5), rtol=1e-12)
    walls = Grid((32, 32), (2 * np.pi, 2 * np.pi), ("periodic", "no_slip"))
    assert d.velocity_error(u, u_ref, walls, centred(walls), 1) == pytest.approx(
        np.sqrt(((u - u_ref) ** 2).sum() / (u_ref**2).sum())
    )


def test_spectrum_error():
    n = np.arange(46)
    reference = np.maximum(n, 1.0) ** -3.0
    assert d.spectrum_error(reference, reference, n, (64, 64)) == 0
    assert d.spectrum_error(2 * reference, reference, n, (64, 64)) == pytest.approx(np.log(2))
    # shells 1 … 21 count for 64², 1 … 10 for 32², the mean flow and the rest do not
    beyond = np.where((n == 0) | (n > 21), 100 * reference, reference)
    assert d.spectrum_error(beyond, reference, n, (64, 64)) == 0
    at_edge = np.where(n == 21, np.e * reference, reference)
    assert d.spectrum_error(at_edge, reference, n, (64, 80)) == pytest.approx(1 / 21)
    assert d.spectrum_error(at_edge, reference, n, (64, 80), worst=True) == pytest.approx(1)
    assert d.spectrum_error(at_edge, reference, n, (32, 32)) == 0
    assert d.spectrum_error(at_edge, reference, n, (32, 32), (1.0, 1.0)) == 0
    assert d.spectrum_error(at_edge, reference, n, (64, 32), (2.0, 1.0)) == pytest.approx(1 / 21)
    # what rounding leaves of a mode that both have cut is no error, but a mode that only one has cut is
    cut = np.where(n == 21, 1e-32, reference)
    assert d.spectrum_error(np.where(n == 21, 1e-15, reference), cut, n, (64, 64)) == 0
    assert d.spectrum_error(reference, cut, n, (64, 64)) > 1
    several = d.spectrum_error(np.stack([reference, np.nan * reference, 0 * reference]), reference, n, (64, 64))
    np.testing.assert_array_equal(several, [0, np.inf, np.inf])


def test_conserved_sums_and_drift():
    grid = Grid((8, 6), (2.0, 3.0))
    variables = centred(grid)
    u0 = noise((3, 2, 8, 6))
    added = np.array([0.1, -0.2])
    frames = np.stack([u0, u0 + added[:, None, None], u0 + 2 * added[:, None, None]], axis=1)
    sums = d.conserved_sums(frames, grid)
    np.testing.assert_allclose(sums[:, 1] - sums[:, 0], np.broadcast_to(added * 6.0, (3, 2)), rtol=1e-12)
    scale = d.drift_scale(u0, grid, variables)
    np.testing.assert_allclose(scale[:, 0], np.hypot(u0[:, 0], u0[:, 1]).mean(axis=(1, 2)) * 6.0)
    found = d.drift(sums, scale)
    np.testing.assert_allclose(found[:, 2], 2 * np.abs(added) * 6.0 / scale, rtol=1e-12)
    expected = sums[:, :1] + added * 6.0 * np.arange(3)[:, None]
    assert d.drift(sums, scale, expected).max() < 1e-15
    assert d.drift(0 * sums, 0 * scale).max() == 0
    assert np.isinf(d.drift(sums, 0 * scale)[:, 1]).all()


def test_drift_sees_float32_frames_in_float64():
    grid = Grid((64, 64), (TWO_PI, TWO_PI))
    u = jnp.full((2, 64, 64), 0.1, jnp.float32)
    assert d.conserved_sums(u, grid)[0] == pytest.approx(float(np.float32(0.1)) * TWO_PI**2, rel=1e-14)


def test_divergence_of_taylor_green_by_the_mac_operator():
    grid = Grid((16, 24), (TWO_PI, TWO_PI))
    x, _ = grid.mesh()
    # exact face means of the flow: u over the right face, v over the upper one
    dx, dy = grid.spacing
    u = taylor_green(grid, staggered(grid)) * np.array([np.sinc(dy / TWO_PI), np.sinc(dx / TWO_PI)])[:, None, None]
    assert np.abs(d.divergence_staggered(u, grid)).max() < 1e-14
    assert d.divergence_max(u, grid, staggered(grid)) < 1e-14
    compressing = sample(grid, staggered(grid), lambda x, y: np.sin(x), lambda x, y: 0 * x)
    exact = np.cos(x) * np.sinc(dx / TWO_PI)
    np.testing.assert_allclose(d.divergence_staggered(compressing, grid), exact, atol=1e-13)


@pytest.mark.parametrize("places", [centred, staggered])
def test_spectral_divergence(places):
    grid = Grid((15, 16), (TWO_PI, 3.0))
    q = TWO_PI / 3.0
    variables = places(grid)
    u = sample(grid, variables, lambda x, y: np.sin(2 * x), lambda x, y: np.cos(q * y))
    x, y = grid.mesh()
    found = d.divergence_spectral(u, grid, [v.at for v in variables])
    np.testing.assert_allclose(found, 2 * np.cos(2 * x) - q * np.sin(q * y), atol=1e-12)


def test_divergence_max_is_in_speed_over_spacing():
    grid = Grid((32, 32), (TWO_PI, TWO_PI))
    x, _ = grid.mesh()
    u = 3.0 * np.stack([np.sin(x), 0 * x])
    found = d.divergence_max(np.stack([u, 0 * u, np.nan * u]), grid, centred(grid))
    size = np.abs(np.cos(x)).max() / np.abs(np.sin(x)).max() * grid.spacing[0]
    assert found[0] == pytest.approx(size, rel=1e-12)
    assert found[1] == 0
    assert np.isnan(found[2])


def test_time_mean_spectrum():
    grid = Grid((16, 16), (TWO_PI, TWO_PI))
    variables = centred(grid)
    times = np.linspace(0, 2, 5)
    u = np.sqrt(times)[:, None, None, None] * sample(grid, variables, lambda x, y: 0 * x, lambda x, y: 3 * np.cos(3 * x))
    u = np.stack([u, u])
    u[1, 3] = np.nan
    n, spectrum = d.time_mean_spectrum(u, times, grid, variables, 1.0)
    assert spectrum.shape == (2, n.size)
    assert spectrum[0, 3] == pytest.approx(1.5 * 0.25 * 9)
    assert np.isnan(spectrum[1]).all()
    with pytest.raises(ValueError, match="no frame"):
        d.time_mean_spectrum(u, times, grid, variables, 3.0)


@pytest.mark.parametrize("places", [centred, staggered])
@pytest.mark.parametrize("grid", [GRIDS[0], GRIDS[3], GRIDS[4]], ids=str)
def test_dataset_round_trip(tmp_path, grid, places):
    import xarray as xr

    variables = places(grid, "m/s")
    times = np.linspace(0, 1, 4)
    u = noise((2, 4, grid.ndim, *grid.shape)).astype(np.float32)
    u_ref = u + 0.1 * noise(u.shape, 1)
    attrs = {"label": "bare", "shape": grid.shape, "dealias": True, "closure": None}
    ds = d.field_dataset(u, times, grid, variables, attrs, length_unit="m", time_unit="s")
    reference = d.field_dataset(u_ref, times, grid, variables, length_unit="m", time_unit="s")
    ds = d.with_diagnostics(ds, grid, variables, reference=reference, modes=2, statistics_from=0.5)
    ds.to_netcdf(tmp_path / "bare.nc")
    with xr.open_dataset(tmp_path / "bare.nc") as found:
        np.testing.assert_array_equal(d.frames(found, variables), u)
        assert found["u"].dtype == np.float32
        assert found["u"].dims == ("sample", "time", *d.dimensions(variables[0].at))
        np.testing.assert_allclose(found[d.dimensions(variables[0].at)[0]], grid.coordinates(variables[0].at)[0])
        np.testing.assert_allclose(found["correlation"], d.correlation(u, u_ref, grid, variables, 2), atol=1e-14)
        if grid.ndim > 1:
            np.testing.assert_allclose(found["energy"], d.kinetic_energy(u, grid, variables))
        assert found["drift"].dims == ("variable", "sample", "time")
        assert found["drift"].sel(variable="u").values[:, 0].max() == 0
        k0 = TWO_PI / max(grid.lengths)
        energy = d.kinetic_energy(u, grid, variables)
        np.testing.assert_allclose(found["spectrum"].sum("wavenumber") * k0, energy[:, 2:].mean(axis=1))
        assert found["spectrum"].attrs["units"] == "(m/s)^2 m"
        assert found["wavenumber"].attrs["units"] == "1 / m"
        assert found.attrs["label"] == "bare"
        for name in (*found.data_vars, *found.coords):
            if name != "variable":
                assert found[name].attrs["long_name"], name
        for name in (*found.data_vars, "time"):
            assert found[name].attrs["units"], name


def test_units_of_pure_numbers():
    grid = Grid((8, 8), (1.0, 1.0))
    ds = d.with_diagnostics(d.field_dataset(noise((1, 2, 2, 8, 8)), np.arange(2.0), grid, centred(grid)), grid, centred(grid))
    assert {ds[name].attrs["units"] for name in ds.data_vars} == {"1"}


def test_wrong_shapes_are_refused():
    grid = Grid((8, 8), (1.0, 1.0))
    with pytest.raises(ValueError, match="do not end with"):
        d.vorticity(noise((2, 8, 9)), grid, centred(grid))
    with pytest.raises(ValueError, match="channels"):
        d.kinetic_energy(noise((3, 8, 8)), grid, centred(grid))
    with pytest.raises(ValueError, match="no velocity v"):
        d.kinetic_energy(noise((1, 8, 8)), grid, centred(grid)[:1])
    with pytest.raises(ValueError, match="neither at centres"):
        d.dimensions((0.25, 0.5))


# Lines


@pytest.mark.parametrize("n", [32, 33])
def test_mean_squares_of_two_waves(n):
    grid = Grid((n,), (22.0,))
    (x,) = grid.mesh()
    k, q = 2 * TWO_PI / 22.0, 5 * TWO_PI / 22.0
    u = 0.5 + 3.0 * np.sin(k * x) + 0.2 * np.cos(q * x)
    square, slope, curvature = d.mean_squares(np.stack([u, 2 * u])[:, None], grid, centred(grid))
    np.testing.assert_allclose(square, [0.25 + 4.5 + 0.02, 4 * (0.25 + 4.5 + 0.02)], rtol=1e-13)
    np.testing.assert_allclose(slope[0], 4.5 * k**2 + 0.02 * q**2, rtol=1e-12)
    np.testing.assert_allclose(curvature[0], 4.5 * k**4 + 0.02 * q**4, rtol=1e-12)


def test_mean_squares_drop_nyquist():
    grid = Grid((16,), (TWO_PI,))
    (x,) = grid.mesh((0.0,))
    square, slope, curvature = d.mean_squares(np.cos(8 * x)[None], grid, centred(grid))
    assert square == pytest.approx(1.0)
    assert slope < 1e-25
    assert curvature < 1e-25


@pytest.mark.parametrize("kind", [SpectralKS, FiniteVolumeKS])
def test_a_line_has_its_own_series(kind):
    solver = kind(Grid((24,), (22.0,)), KuramotoSivashinsky())
    times = np.linspace(0, 3, 7)
    u = noise((2, 7, 1, 24))
    u = u - u.mean(axis=-1, keepdims=True)
    u[1, 4:] = np.nan
    ds = d.field_dataset(u, times, solver.grid, solver.variables)
    truth = d.field_dataset(np.nan_to_num(u, nan=0.1), times, solver.grid, solver.variables)
    ds = d.with_diagnostics(ds, solver.grid, solver.variables, solver=solver, reference=truth, modes=9)
    assert {"mean_square", "mean_square_slope", "mean_square_curvature", "spectrum", "drift", "correlation"} <= set(ds.data_vars)
    assert not {"energy", "enstrophy", "divergence_max", "energy_rate", "vorticity"} & set(ds.data_vars)
    assert ds["variable"].values.tolist() == ["u"]
    np.testing.assert_allclose(ds["mean_square"][0], (u[0, :, 0] ** 2).mean(axis=-1))
    assert ds["correlation"].attrs["long_name"] == "correlation of u with the reference"
    assert float(ds["correlation"][0].min()) == pytest.approx(1.0)
    assert float(ds["correlation"][1, 5]) == 0
    assert np.isnan(ds["mean_square_slope"][1, 4:]).all()
    assert np.isfinite(ds["mean_square_slope"][1, :4]).all()


# Rates and scalars


def test_energy_rate_is_exact_for_parabolas_at_any_times():
    times = np.array([0.0, 0.1, 0.4, 0.5, 1.1])
    energy = np.stack([3 - 2 * times + 0.7 * times**2, 0 * times + 1])
    np.testing.assert_allclose(d.energy_rate(energy, times), [-2 + 1.4 * times, 0 * times], atol=1e-13)
    np.testing.assert_allclose(d.energy_rate(energy[:, :2], times[:2]), np.diff(energy[:, :2]) / 0.1 @ np.ones((1, 2)))


def test_scalar_variance_and_names():
    grid = Grid((9, 12, 6), (TWO_PI, 3.0, 1.0))
    equation = NavierStokes(0.01, None, {"heat": 0.1, "dye": 0.2})
    solver = StaggeredFiniteVolume(grid, equation)
    x, y, _ = grid.mesh()
    u = noise((1, 3, 5, *grid.shape))
    u[:, :, 3] = 2.0 + 3.0 * np.cos(x)  # dye: names are in alphabetical order
    u[:, :, 4] = np.sin(TWO_PI * y / 3.0)
    np.testing.assert_allclose(d.scalar_variance(u[0, 0], grid, solver.variables), [4.5, 0.5])
    ds = d.with_diagnostics(d.field_dataset(u, np.arange(3.0), grid, solver.variables), grid, solver.variables, solver=solver)
    assert ds["scalar"].values.tolist() == ["dye", "heat"]
    np.testing.assert_allclose(ds["scalar_variance"].sel(scalar="heat"), 0.5 * np.ones((1, 3)))
    assert ds["dye"].attrs["long_name"] == "scalar dye"
    assert set(ds["variable"].values.tolist()) == {"u", "v", "w", "dye", "heat"}
    # scalars enter neither energy nor vorticity nor spectra
    plain = d.with_diagnostics(d.field_dataset(u[:, :, :3], np.arange(3.0), grid, solver.variables[:3]), grid, solver.variables[:3])
    for name in ("energy", "enstrophy", "spectrum", "energy_rate"):
        np.testing.assert_allclose(ds[name], plain[name], rtol=1e-12)


def test_pieces_do_not_show(monkeypatch):
    grid = Grid((7, 8, 10), (1.0, 2.0, 1.5))
    variables = staggered(grid)
    u = noise((2, 5, 3, *grid.shape))
    times = np.arange(5.0)

    def measured():
        ds, truth = (d.field_dataset(q, times, grid, variables) for q in (u, u + 0.1))
        return d.with_diagnostics(ds, grid, variables, reference=truth, modes=2)

    whole = measured()
    monkeypatch.setattr(d, "PIECE", 1000)
    for name, values in measured().items():
        np.testing.assert_array_equal(values, whole[name])


# Walls


def channel(shape=(8, 12), lengths=(2.0, 1.0), kinds=("periodic", "no_slip"), **options):
    return StaggeredFiniteVolume(Grid(shape, lengths, kinds), NavierStokes(0.01, **options))


def test_vorticity_between_walls_is_exact_for_parabolas(x64):
    """u = 4 y (1 − y) e_x: ω = −4 (1 − 2y), in the cells at the walls as well."""
    solver = channel()
    _, y = solver.grid.mesh(solver.variables[0].at)
    u = np.stack([4 * y * (1 - y), 0 * y])
    _, y = solver.grid.mesh()
    w = d.vorticity(u, solver.grid, solver.variables, solver)
    np.testing.assert_allclose(w, -4 * (1 - 2 * y), atol=1e-12)
    assert d.enstrophy(u, solver.grid, solver.variables, solver) == pytest.approx(0.5 * (w**2).mean())
    with pytest.raises(ValueError, match="solver must be given"):
        d.vorticity(u, solver.grid, solver.variables)
    with pytest.raises(ValueError, match="solver must be given"):
        d.divergence_max(u, solver.grid, solver.variables)


def test_vorticity_between_walls_in_three_dimensions(x64):
    solver = channel((4, 10, 5), (1.0, 1.0, 1.0), ("periodic", "no_slip", "periodic"))
    _, y, _ = solver.grid.mesh(solver.variables[0].at)
    u = np.stack([4 * y * (1 - y), 0 * y, y**2])
    w = d.vorticity(u, solver.grid, solver.variables, solver)
    np.testing.assert_allclose(w[2], -4 * (1 - 2 * y), atol=1e-12)
    np.testing.assert_allclose(w[0], 2 * y, atol=1e-12)
    np.testing.assert_allclose(w[1], 0, atol=1e-12)


def test_correlation_between_walls(x64):
    """Mixed from two flows with orthogonal vorticities, ρ is the cosine; the lid's own velocity does not blur it."""
    lid = {"y_upper": Moving((1.0, 0.0))}
    for solver in (channel(), channel(kinds=("no_slip", "no_slip"), boundary_velocity=lid)):
        grid, variables = solver.grid, solver.variables
        a, b = (noise((2, *grid.shape), seed) for seed in (1, 2))
        wa, wb = (d.vorticity(q, grid, variables, solver) for q in (a, b))
        b = b - a * (wa * wb).sum() / (wa**2).sum()
        wb = d.vorticity(b, grid, variables, solver)
        a, b = a / np.sqrt((wa**2).sum()), b / np.sqrt((wb**2).sum())
        angles = np.linspace(0, np.pi, 5).reshape(5, 1, 1, 1)
        u = 1e6 * (np.cos(angles) * a + np.sin(angles) * b)
        rho = d.correlation(u, np.broadcast_to(a, u.shape), grid, variables, 3, solver)
        np.testing.assert_allclose(rho, np.cos(angles.ravel()), atol=1e-11)
        assert d.correlation(0 * a, 0 * a, grid, variables, 3, solver) == 1
        assert d.correlation(0 * a, a, grid, variables, 3, solver) == 0
        assert d.correlation(np.nan * a, a, grid, variables, 3, solver) == 0


def test_divergence_knows_the_walls(x64):
    """A uniform flow through walls: periodic differences see nothing, the solver's see the cells at the lower wall."""
    solver = channel(kinds=("no_slip", "no_slip"))
    u = np.stack([np.ones(solver.grid.shape), np.zeros(solver.grid.shape)])
    assert np.abs(d.divergence_staggered(u, solver.grid)).max() == 0
    h = solver.grid.spacing
    assert d.divergence_max(u, solver.grid, solver.variables, solver) == pytest.approx(min(h) / h[0])
    projected = np.asarray(solver.project(jnp.asarray(noise(u.shape))))
    assert d.divergence_max(projected, solver.grid, solver.variables, solver) < 1e-13
    assert d.divergence_max(0 * u, solver.grid, solver.variables, solver) == 0


def test_a_box_with_walls_has_no_spectra(x64, tmp_path):
    solver = channel(scalars={"heat": 0.02})
    grid, variables = solver.grid, solver.variables
    u = noise((2, 4, 3, *grid.shape)).astype(np.float32)
    u[1, 2:] = np.nan
    times = np.linspace(0, 1, 4)
    truth = d.field_dataset(np.nan_to_num(u), times, grid, variables)
    ds = d.field_dataset(u, times, grid, variables)
    ds = d.with_diagnostics(ds, grid, variables, solver=solver, reference=truth, modes=3)
    ds.to_netcdf(tmp_path / "walls.nc")
    assert "spectrum" not in ds
    assert "wavenumber" not in ds.coords
    assert "modes" not in ds["correlation"].attrs
    assert ds["variable"].values.tolist() == list(solver.conserved) == ["heat"]
    assert ds["vorticity"].dims == ("sample", "time", "x", "y")
    assert ds["vorticity"].dtype == np.float32
    np.testing.assert_allclose(ds["vorticity"][0], d.vorticity(u[0], grid, variables, solver), rtol=1e-5, atol=1e-4)
    assert np.isnan(ds["vorticity"][1, 2:]).all()
    assert ds["y"].attrs["boundaries"] == "no_slip no_slip"
    assert ds["x_face"].attrs["boundaries"] == "periodic periodic"
    np.testing.assert_allclose(ds["correlation"], [[1, 1, 1, 1], [1, 1, 0, 0]], atol=1e-12)


def test_only_what_a_solver_conserves_may_not_drift(x64):
    solver = channel(kinds=("no_slip", "no_slip"))
    u = np.zeros((1, 2, 2, *solver.grid.shape))
    ds = d.with_diagnostics(
        d.field_dataset(u, np.arange(2.0), solver.grid, solver.variables), solver.grid, solver.variables, solver=solver
    )
    assert "drift" not in ds
    assert "variable" not in ds.coords
    assert float(ds["energy_rate"].max()) == 0
