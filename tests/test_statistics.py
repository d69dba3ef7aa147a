"""Turbulence statistics against closed forms: single modes, triads by hand, Taylor–Green, ABC, Gaussian numbers, AR(1) series."""

import itertools
from statistics import NormalDist

import jax.numpy as jnp
import numpy as np
import pytest
import xarray as xr

from hybridsim import diagnostics as d
from hybridsim import statistics as s
from hybridsim.contract import Variable
from hybridsim.grid import Grid, resample

TWO_PI = 2 * np.pi
GRIDS = [
    Grid((17,), (3.0,)),
    Grid((16,), (22.0,)),
    Grid((16, 16), (TWO_PI, TWO_PI)),
    Grid((15, 21), (TWO_PI, 3.0)),
    Grid((12, 9), (1.0, 4.0)),
    Grid((2, 3), (1.0, 4.0)),
    Grid((7, 8, 10), (1.0, 2.0, 1.5)),
    Grid((6, 5, 9), (2.0, 2.0, 2.0)),
]
LABELS = s.Labels(None, "m", "s")


def centred(grid, unit="m/s"):
    return tuple(Variable(name, unit, grid.centre) for name in "uvw"[: grid.ndim])


def staggered(grid, unit="m/s"):
    places = [tuple(1.0 if b == a else 0.5 for b in range(grid.ndim)) for a in range(grid.ndim)]
    return tuple(Variable(name, unit, at) for name, at in zip("uvw", places, strict=False))


def sample(grid, variables, *functions):
    return np.stack([np.broadcast_to(f(*grid.mesh(v.at)), grid.shape) for f, v in zip(functions, variables, strict=True)])


def noise(shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape)


def box(n, d=2):
    return Grid((n,) * d, (TWO_PI,) * d)


def k0(grid):
    return TWO_PI / max(grid.lengths)


def taylor_green(grid, variables, kx=1, ky=1):
    return sample(
        grid,
        variables,
        lambda x, y: ky * np.sin(kx * x) * np.cos(ky * y),
        lambda x, y: -kx * np.cos(kx * x) * np.sin(ky * y),
    )


def abc(grid, variables):
    return sample(
        grid,
        variables,
        lambda x, y, z: np.sin(z) + np.cos(y),
        lambda x, y, z: np.sin(x) + np.cos(z),
        lambda x, y, z: np.sin(y) + np.cos(x),
    )


class Modes:
    """u_c(x) = Re Σ_m a_mc exp(i k_m · x), solenoidal: a field that is known at every point."""

    def __init__(self, lengths, count=12, reach=3, seed=0, solenoidal=True):
        rng = np.random.default_rng(seed)
        self.n = rng.integers(-reach, reach + 1, (count, len(lengths)))
        self.n = self.n[np.abs(self.n).sum(axis=1) > 0]
        self.k = TWO_PI * self.n / np.array(lengths)
        self.a = rng.standard_normal((*self.k.shape, 2)) @ np.array([1.0, 1j])
        if solenoidal and len(lengths) > 1:
            along = (self.a * self.k).sum(axis=1) / (self.k**2).sum(axis=1)
            self.a = self.a - along[:, None] * self.k

    def component(self, c, *x):
        phase = np.tensordot(self.k, np.stack(x), axes=1)
        return np.tensordot(self.a[:, c], np.exp(1j * phase), axes=1).real

    def on(self, grid, variables):
        return np.stack([self.component(c, *grid.mesh(v.at)) for c, v in enumerate(variables)])


# Spectra


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_spectra_keep_every_bit_of_energy(grid):
    u = noise((3, 2, grid.ndim, *grid.shape)) + 0.3
    energy = 0.5 * (u**2).sum(axis=2).reshape(3, 2, -1).mean(axis=-1)
    whole = s.energy_spectrum(u, grid, centred(grid))
    parts = s.energy_spectrum(u, grid, centred(grid), components=True)
    assert whole.dims == ("sample", "time", "wavenumber")
    assert parts.dims == ("sample", "time", "component", "wavenumber")
    np.testing.assert_allclose(whole.sum("wavenumber") * k0(grid), energy, rtol=1e-14)
    np.testing.assert_allclose(parts.sum("component"), whole, rtol=1e-13, atol=1e-18)
    for c, name in enumerate("uvw"[: grid.ndim]):
        q = s.scalar_spectrum(u, grid, centred(grid), name)
        np.testing.assert_allclose(q.sum("wavenumber") * k0(grid), (u[:, :, c] ** 2).reshape(3, 2, -1).mean(-1), rtol=1e-14)
        np.testing.assert_allclose(q, 2 * parts.isel(component=c), rtol=1e-13, atol=1e-18)
    # the generic sum over shells agrees with the one of the diagnostics, shell by shell
    hat = np.fft.rfftn(u, axes=tuple(range(-grid.ndim, 0))) / grid.cells
    density = 0.5 * (np.abs(hat) ** 2).sum(axis=2)
    np.testing.assert_allclose(d.shell_sum(density, grid) / k0(grid), whole, rtol=1e-13, atol=1e-18)
    np.testing.assert_allclose(d.shell_sum(density, grid).sum(-1), energy, rtol=1e-14)


def test_parseval_holds_for_a_large_field_on_a_large_mean():
    grid = Grid((64, 63, 65), (TWO_PI, TWO_PI, 5.0))
    u = noise((3, *grid.shape)) + np.array([100.0, 0, 0])[:, None, None, None]
    spectrum = s.energy_spectrum(u, grid, centred(grid))
    assert abs(float(spectrum.sum()) * k0(grid) / (0.5 * (u**2).sum(axis=0).mean()) - 1) < 1e-14


def test_a_mode_on_the_edge_of_a_shell_opens_the_upper_one():
    for lengths in ((0.3, 0.2), (0.7, 0.2), (3.0, 2.0)):  # the ratio 0.3/0.2 is rounded to below 1.5, 0.7/0.2 to below 3.5
        grid = Grid((8, 8), lengths)
        hat = np.zeros((8, 5))
        hat[0, 1] = 1.0
        ratio = round(2 * lengths[0] / lengths[1]) / 2
        assert np.flatnonzero(d.shell_sum(hat, grid)).tolist() == [int(ratio + 0.5)]


def test_spectrum_of_one_mode_and_its_labels():
    grid = Grid((32, 24), (TWO_PI, TWO_PI))
    variables = (*centred(grid), Variable("c", "kg", grid.centre))
    x, y = grid.mesh()
    u = np.stack([0 * x, 2 * np.cos(3 * x + 0.2), 1 + np.sin(4 * y)])
    found = s.energy_spectrum(u[None], grid, variables, s.Labels([0.5], "m", "s"))
    assert found.dims == ("time", "wavenumber")
    assert float(found.isel(time=0, wavenumber=3)) == pytest.approx(1.0, rel=1e-14)
    assert float(found.where(found.shell != 3).max()) < 1e-28
    assert found.attrs["units"] == "(m/s)^2 m"
    assert found["wavenumber"].attrs["units"] == "1 / m"
    assert found["time"].attrs["units"] == "s"
    assert float(found["time"][0]) == 0.5
    scalar = s.scalar_spectrum(u, grid, variables, "c", LABELS)
    assert scalar.dims == ("wavenumber",)
    np.testing.assert_allclose(scalar[[0, 4]], [1.0, 0.5], rtol=1e-14)
    assert scalar.attrs["units"] == "(kg)^2 m"
    with pytest.raises(ValueError, match="no channel 'd'"):
        s.scalar_spectrum(u, grid, variables, "d")


# Transfer


def brute_force_transfer(u, grid):
    """Σ over all pairs p + q = k of the triads, mode by mode, without any transform of products."""
    d_, axes = grid.ndim, tuple(range(1, grid.ndim + 1))
    full = np.fft.fftn(u, axes=axes) / grid.cells
    reach = [(n - 1) // 2 for n in grid.shape]
    modes = list(itertools.product(*(range(-m, m + 1) for m in reach)))
    hat = {n: full[(slice(None), *n)] for n in modes}
    unit = np.array([TWO_PI / length for length in grid.lengths])
    if d_ > 1:
        for n in modes:
            k = unit * n
            if any(n):
                hat[n] = hat[n] - k * (k @ hat[n]) / (k @ k)
    shells = s.energy_spectrum(u, grid, centred(grid)).size
    total = np.zeros(shells)
    for n in modes:
        k = unit * n
        product = np.zeros((d_, d_), dtype=complex)
        for p in modes:
            q = tuple(int(i) for i in np.subtract(n, p))
            if q in hat:
                product += np.outer(hat[p], hat[q])
        force = -1j * (k @ product) * (0.5 if d_ == 1 else 1.0)
        if d_ > 1 and any(n):
            force = force - k * (k @ force) / (k @ k)
        total[int(np.sqrt(k @ k) / k0(grid) + 0.5)] += (np.conj(hat[n]) @ force).real
    return total / k0(grid)


@pytest.mark.parametrize("grid", [GRIDS[0], GRIDS[1], Grid((8, 7), (TWO_PI, 5.0)), Grid((5, 4, 6), (1.0, 2.0, 1.5))], ids=str)
def test_transfer_is_the_sum_over_all_triads(grid):
    u = noise((grid.ndim, *grid.shape)) + 0.4
    found = s.energy_transfer(u, grid, centred(grid))
    expected = brute_force_transfer(u, grid)
    np.testing.assert_allclose(found, expected, atol=1e-13 * np.abs(expected).max())
    assert np.abs(expected).max() > 1e-3


def test_transfer_of_a_triad_by_hand():
    """u = a sin x + b sin 2x: −½ ∂x u² = ½ab sin x − ½a² sin 2x + …, so T(1) = a²b/4 = −T(2)."""
    grid, a, b = Grid((12,), (TWO_PI,)), 0.7, 1.3
    (x,) = grid.mesh()
    u = (a * np.sin(x) + b * np.sin(2 * x))[None]
    transfer = s.energy_transfer(u, grid, centred(grid), LABELS)
    flux = s.energy_flux(u, grid, centred(grid), LABELS)
    expected = np.zeros(7)
    expected[1], expected[2] = a * a * b / 4, -a * a * b / 4
    np.testing.assert_allclose(transfer, expected, atol=1e-15)
    np.testing.assert_allclose(flux, [0, -a * a * b / 4, 0, 0, 0, 0, 0], atol=1e-15)
    assert transfer.attrs["units"] == "(m/s)^3"
    assert flux.attrs["units"] == "(m/s)^3 / m"


@pytest.mark.parametrize("places", [centred, staggered])
@pytest.mark.parametrize("grid", GRIDS[2:], ids=str)
def test_transfer_sums_to_zero_and_flux_is_its_sum(grid, places):
    u = noise((2, grid.ndim, *grid.shape), 4)
    transfer = s.energy_transfer(u, grid, places(grid))
    size = float(np.abs(transfer).sum())
    assert np.abs(transfer.sum("wavenumber")).max() <= 1e-13 * size + 1e-16
    flux = s.energy_flux(u, grid, places(grid))
    np.testing.assert_allclose(flux, -np.cumsum(transfer.values, axis=-1) * k0(grid), atol=1e-12 * size + 1e-16)
    moving = u + np.array([3.0, -2.0, 1.0])[: grid.ndim].reshape(-1, *(1,) * grid.ndim)
    np.testing.assert_allclose(s.energy_transfer(moving, grid, places(grid)), transfer, atol=1e-12 * size + 1e-16)


def test_transfer_without_dealiasing_would_not_sum_to_zero():
    grid = box(16)
    hat = np.fft.rfft2(noise((2, 16, 16), 4))
    kx, ky = grid.wavenumbers()
    square = np.where(kx**2 + ky**2 > 0, kx**2 + ky**2, 1)
    keep = (np.abs(kx) < 8) & (np.abs(ky) < 8)
    hat = (hat - np.stack([kx * (kx * hat[0] + ky * hat[1]), ky * (kx * hat[0] + ky * hat[1])]) / square) * keep
    u = np.fft.irfft2(hat)
    product = np.fft.rfft2(u[:, None] * u[None])
    force = -1j * (kx * product[0] + ky * product[1])
    density = (np.conj(hat) * force).real.sum(axis=0) / grid.cells**2
    aliased = d.shell_sum(density, grid)
    assert abs(aliased.sum()) > 1e-3 * np.abs(aliased).sum()
    clean = s.energy_transfer(u, grid, centred(grid))
    assert abs(float(clean.sum())) < 1e-14 * float(np.abs(clean).sum())


@pytest.mark.parametrize("places", [centred, staggered])
def test_taylor_green_and_abc_transfer_nothing(places):
    grid = box(16)
    assert np.abs(s.energy_transfer(taylor_green(grid, places(grid), 2, 3), grid, places(grid))).max() < 1e-14
    grid = Grid((8, 9, 10), (TWO_PI,) * 3)
    assert np.abs(s.energy_transfer(abc(grid, places(grid)), grid, places(grid))).max() < 1e-14


def test_statistics_do_not_depend_on_the_places():
    grid = Grid((16, 15), (TWO_PI, 5.0))
    flow = Modes(grid.lengths)
    a, b = (flow.on(grid, places(grid)) for places in (centred, staggered))
    for statistic in (s.energy_transfer, s.energy_flux, s.energy_spectrum, s.velocity_gradient):
        left, right = statistic(a, grid, centred(grid)), statistic(b, grid, staggered(grid))
        np.testing.assert_allclose(left, right, atol=1e-12 * float(np.abs(left).max()))
        if statistic is s.energy_transfer:
            assert np.abs(left - statistic(b, grid, centred(grid))).max() > 1e-3 * np.abs(left).max()


# Gradients and dissipation


@pytest.mark.parametrize("places", [centred, staggered])
def test_dissipation_and_vorticity_moments_of_taylor_green(places):
    grid, nu, square = box(16), 0.03, 2**2 + 3**2
    u = taylor_green(grid, places(grid), 2, 3)
    energy = square / 8
    found = s.dissipation(u, grid, places(grid), nu, LABELS)
    assert float(found) == pytest.approx(2 * nu * square * energy, rel=1e-12)
    assert found.attrs["units"] == "(m/s)^3 / m"
    moments = s.vorticity_moments(u, grid, places(grid), LABELS)
    assert float(moments["enstrophy"]) == pytest.approx(square * energy, rel=1e-12)
    assert float(moments["palinstrophy"]) == pytest.approx(square**2 * energy, rel=1e-12)
    assert moments["enstrophy"].attrs["units"] == "(m/s)^2 / (m)^2"
    assert moments["palinstrophy"].attrs["units"] == "(m/s)^2 / (m)^4"


def test_dissipation_of_abc_shear_and_compression():
    grid = Grid((8, 9, 10), (TWO_PI,) * 3)
    u = abc(grid, centred(grid))
    assert float(s.dissipation(u, grid, centred(grid), 2)) == pytest.approx(2 * 2 * 1.5, rel=1e-12)
    moments = s.vorticity_moments(u, grid, centred(grid))  # ω = u
    assert float(moments["enstrophy"]) == pytest.approx(1.5, rel=1e-12)
    assert float(moments["palinstrophy"]) == pytest.approx(1.5, rel=1e-12)
    x = grid.mesh()[0]
    compression = np.stack([np.sin(2 * x), 0 * x, 0 * x])  # 2ν⟨S:S⟩ = 2ν · 4 · ½, no vorticity
    assert float(s.dissipation(compression, grid, centred(grid), 1.0)) == pytest.approx(4.0, rel=1e-12)
    assert abs(float(s.vorticity_moments(compression, grid, centred(grid))["palinstrophy"])) < 1e-12


@pytest.mark.parametrize("grid", [GRIDS[3], GRIDS[6]], ids=str)
def test_dissipation_is_viscosity_times_mean_square_vorticity(grid):
    nu, variables = 0.1, centred(grid)
    u = Modes(grid.lengths).on(grid, variables)
    found = s.dissipation(u, grid, variables, nu)
    assert float(found) == pytest.approx(2 * nu * float(d.enstrophy(u, grid, variables)), rel=1e-12)
    gradient = s.velocity_gradient(u, grid, variables).values
    strain = 0.5 * (gradient + gradient.swapaxes(0, 1))
    assert float(found) == pytest.approx(2 * nu * (strain**2).sum(axis=(0, 1)).mean(), rel=1e-12)
    spectrum = s.dissipation_spectrum(u, grid, variables, nu)
    assert float(spectrum.sum() * k0(grid)) == pytest.approx(float(found), rel=1e-13)


def test_dissipation_spectrum_is_two_nu_k_squared_times_energy():
    grid, nu = box(16), 0.2
    u = taylor_green(grid, centred(grid), 3, 4)
    energy, lost = s.energy_spectrum(u, grid, centred(grid)), s.dissipation_spectrum(u, grid, centred(grid), nu)
    np.testing.assert_allclose(lost, 2 * nu * energy["wavenumber"] ** 2 * energy, atol=1e-13)


def test_gradient_of_a_staggered_field():
    grid = Grid((12, 16), (3.0, TWO_PI))
    flow = Modes(grid.lengths)
    x = grid.mesh()
    found = s.velocity_gradient(flow.on(grid, staggered(grid)), grid, staggered(grid), LABELS)
    for a in range(2):
        for c in range(2):
            phase = np.tensordot(flow.k, np.stack(x), axes=1)
            exact = np.tensordot(1j * flow.k[:, a] * flow.a[:, c], np.exp(1j * phase), axes=1).real
            np.testing.assert_allclose(found[a, c], exact, atol=1e-12)
    assert found.attrs["units"] == "m/s / m"
    assert found["x"].attrs["units"] == "m"


def test_budget_of_kuramoto_sivashinsky():
    grid = Grid((32,), (22.0,))
    (x,) = grid.mesh()
    a, b = 2 * k0(grid), 5 * k0(grid)
    u = (0.3 * np.cos(a * x) + 1.1 * np.sin(b * x))[None]
    found = s.kuramoto_sivashinsky_budget(u, grid, centred(grid, "1"))
    assert float(found["production"]) == pytest.approx(0.5 * (0.3**2 * a**2 + 1.1**2 * b**2), rel=1e-12)
    assert float(found["dissipation"]) == pytest.approx(0.5 * (0.3**2 * a**4 + 1.1**2 * b**4), rel=1e-12)
    assert found["production"].attrs["units"] == "1"
    with pytest.raises(ValueError, match="for 1 dimensions"):
        s.kuramoto_sivashinsky_budget(noise((2, 8, 8)), box(8), centred(box(8)))


def test_skewness_and_flatness_of_derivatives():
    """s = cos x + a cos 2x: ⟨s²⟩ = (1 + a²)/2, ⟨s³⟩ = ¾a, ⟨s⁴⟩ = ⅜(1 + a⁴) + 1.5a²."""
    grid, a = Grid((32,), (TWO_PI,)), -0.4
    (x,) = grid.mesh()
    u = (np.sin(x) + a / 2 * np.sin(2 * x))[None]
    second = (1 + a * a) / 2
    found = s.derivative_moments(u, grid, centred(grid))
    assert float(found["skewness"]) == pytest.approx(0.75 * a / second**1.5, rel=1e-12)
    assert float(found["flatness"]) == pytest.approx((0.375 * (1 + a**4) + 1.5 * a * a) / second**2, rel=1e-12)
    mirrored = s.derivative_moments(-u[:, ::-1], grid, centred(grid))  # a reflection keeps ∂x u
    assert float(mirrored["skewness"]) == pytest.approx(float(found["skewness"]), rel=1e-12)
    assert float(s.derivative_moments(-u, grid, centred(grid))["skewness"]) == pytest.approx(-float(found["skewness"]), rel=1e-12)


def test_scales_of_taylor_green():
    grid, nu, k = box(24), 0.01, 3.0
    u = taylor_green(grid, staggered(grid), 3, 3) / 3
    moving = u + np.array([5.0, -1.0])[:, None, None]
    rms, epsilon = 0.5, 2 * nu * 2 * k * k * 0.25
    for frame in (u, moving):
        found = s.turbulence_scales(frame, grid, staggered(grid), nu, LABELS)
        expected = {
            "velocity_rms": rms,
            "dissipation": epsilon,
            "taylor_microscale": np.sqrt(8 * nu / epsilon) * rms,
            "reynolds_lambda": np.sqrt(8 / (nu * epsilon)) * rms**2,
            "kolmogorov_length": (nu**3 / epsilon) ** 0.25,
            "kolmogorov_time": (nu / epsilon) ** 0.5,
            "integral_length": 2 / (k * np.sqrt(2)),
            "turnover_time": 2 / (k * np.sqrt(2)) / rms,
            "resolution": 12 * (nu**3 / epsilon) ** 0.25,
            "enstrophy_scale": (nu**3 / (2 * nu * (2 * k * k) ** 2 * 0.25)) ** (1 / 6),
        }
        assert set(found.data_vars) == set(expected)
        for name, value in expected.items():
            assert float(found[name]) == pytest.approx(value, rel=1e-12), name
    units = {name: found[name].attrs["units"] for name in found}
    assert units["taylor_microscale"] == units["integral_length"] == units["kolmogorov_length"] == "m"
    assert units["kolmogorov_time"] == units["turnover_time"] == "m / (m/s)"
    assert units["reynolds_lambda"] == units["resolution"] == "1"
    with pytest.raises(ValueError, match="positive viscosity"):
        s.turbulence_scales(u, grid, staggered(grid), 0.0)


def test_scales_of_an_abc_flow():
    grid = box(8, 3)
    found = s.turbulence_scales(abc(grid, centred(grid)), grid, centred(grid), 1)
    assert float(found["velocity_rms"]) == pytest.approx(1.0, rel=1e-12)
    assert float(found["dissipation"]) == pytest.approx(3.0, rel=1e-12)
    assert float(found["taylor_microscale"]) == pytest.approx(np.sqrt(5.0), rel=1e-12)  # √(15 ν u′²/ε)
    assert float(found["integral_length"]) == pytest.approx(0.75 * np.pi, rel=1e-12)  # π/2 E/(k u′²)
    assert "enstrophy_scale" not in found


def test_fields_for_distributions():
    grid = box(12, 3)
    u = abc(grid, staggered(grid))[None, None]
    vorticity = s.field(u, grid, staggered(grid), "vorticity", LABELS)
    velocity = s.field(u, grid, staggered(grid), "velocity", LABELS)
    assert vorticity.dims == ("sample", "time", "component", "x", "y", "z")
    np.testing.assert_allclose(velocity[0, 0], abc(grid, centred(grid)), atol=1e-13)
    np.testing.assert_allclose(vorticity, velocity, atol=1e-12)  # curl u = u
    np.testing.assert_allclose(s.field(u, grid, staggered(grid), "speed") ** 2, (velocity**2).sum("component"), atol=1e-12)
    along = s.field(u, grid, staggered(grid), "longitudinal_gradient")
    assert along.dims == ("sample", "time", "axis", "x", "y", "z")
    assert np.abs(along).max() < 1e-12  # no component of an ABC flow varies along itself
    assert s.field(u, grid, staggered(grid), "gradient").shape == (1, 1, 3, 3, 12, 12, 12)
    one = s.field(u, grid, staggered(grid), "v", LABELS)
    assert one.dims == ("sample", "time", "x", "y_face", "z")
    np.testing.assert_array_equal(one, u[:, :, 1])
    assert vorticity.attrs["units"] == "m/s / m"
    with pytest.raises(ValueError, match="no field 'helicity'"):
        s.field(u, grid, staggered(grid), "helicity")
    flat = box(8)
    x, y = flat.mesh()
    shear = np.stack([np.sin(2 * y), 0 * y])
    np.testing.assert_allclose(s.field(shear, flat, centred(flat), "vorticity"), -2 * np.cos(2 * y), atol=1e-13)
    stretching = s.field(np.stack([np.sin(x), np.cos(3 * y)]), flat, centred(flat), "longitudinal_gradient")
    np.testing.assert_allclose(stretching, np.stack([np.cos(x), -3 * np.sin(3 * y)]), atol=1e-13)


# Two points


def test_structure_functions_of_one_mode():
    """A cos kx: S₂ = A² (1 − cos kr), S₄ = 6A⁴ sin⁴(kr/2), odd ones cancel; |δu| averages to 4A|sin(kr/2)|/π."""
    grid, amplitude, k = Grid((64,), (TWO_PI,)), 1.7, 3
    u = amplitude * np.cos(k * grid.mesh()[0])[None]
    found = s.structure_functions(u, grid, centred(grid), (1, 2, 3, 4), LABELS)
    r = found["separation"].values[0]
    np.testing.assert_allclose(r, np.arange(33) * TWO_PI / 64)
    values = found["longitudinal"].isel(axis=0)
    np.testing.assert_allclose(values.sel(order=2), amplitude**2 * (1 - np.cos(k * r)), atol=1e-14)
    np.testing.assert_allclose(values.sel(order=4), 6 * amplitude**4 * np.sin(k * r / 2) ** 4, atol=1e-13)
    np.testing.assert_allclose(values.sel(order=[1, 3]), 0, atol=1e-13)
    assert "transverse" not in found
    size = s.structure_functions(u, grid, centred(grid), (1,), absolute=True)["longitudinal"].values.ravel()
    np.testing.assert_allclose(size, 4 * amplitude * np.abs(np.sin(k * r / 2)) / np.pi, rtol=2e-3, atol=1e-14)
    assert found["longitudinal"].attrs["units"] == "(m/s)^p"
    assert found["separation"].attrs["units"] == "m"


@pytest.mark.parametrize("places", [centred, staggered])
def test_structure_functions_are_means_of_differences_of_the_known_field(places):
    """u(x + r e_a) is evaluated from the modes, not shifted."""
    grid = Grid((12, 10), (TWO_PI, 4.0))
    flow, variables = Modes(grid.lengths), places(grid)
    found = s.structure_functions(flow.on(grid, variables), grid, variables, (3, 2), cells=(1, 4, 6))
    assert "longitudinal_mean" not in found  # Δx differs
    for a, p, (i, cells) in itertools.product(range(2), (2, 3), enumerate((1, 4, 6))):
        if 2 * cells > grid.shape[a]:
            assert np.isnan(found["longitudinal"].sel(order=p)[a, i])
            continue
        moments = []
        for c in range(2):
            x = grid.mesh(variables[c].at)
            moved = [x[b] + (cells * grid.spacing[a] if b == a else 0) for b in range(2)]
            moments.append(((flow.component(c, *moved) - flow.component(c, *x)) ** p).mean())
        assert float(found["longitudinal"].sel(order=p)[a, i]) == pytest.approx(moments[a], abs=1e-11)
        assert float(found["transverse"].sel(order=p)[a, i]) == pytest.approx(moments[1 - a], abs=1e-11)


def test_structure_functions_and_correlations_of_an_abc_flow():
    """Along y, u = … + cos y and w = sin y + …: both halves of their variance vary, v does not."""
    grid = box(12, 3)
    u = abc(grid, centred(grid))[None]
    r = grid.coordinates((0.0,) * 3)[0][:7]
    found = s.structure_functions(u, grid, centred(grid), (2,))
    correlation = s.space_correlation(u, grid, centred(grid))
    for a in range(3):
        np.testing.assert_allclose(found["transverse"].isel(axis=a, order=0, time=0), 1 - np.cos(r), atol=1e-14)
        np.testing.assert_allclose(found["longitudinal"].isel(axis=a), 0, atol=1e-14)
        np.testing.assert_allclose(correlation["transverse"].isel(axis=a, time=0), 0.5 * (1 + np.cos(r)), atol=1e-14)
        np.testing.assert_allclose(correlation["longitudinal"].isel(axis=a), 1, atol=1e-14)
    np.testing.assert_allclose(found["transverse_mean"].isel(order=0, time=0), 1 - np.cos(r), atol=1e-14)


@pytest.mark.parametrize("grid", [GRIDS[0], GRIDS[3], GRIDS[7]], ids=str)
def test_second_order_structure_function_follows_from_the_covariance(grid):
    u = noise((2, 3, grid.ndim, *grid.shape)) + 7.0
    structure = s.structure_functions(u, grid, centred(grid), (2,)).isel(order=0)
    covariance = s.space_correlation(u, grid, centred(grid), LABELS, normalised=False)
    rho = s.space_correlation(u, grid, centred(grid))
    for name in ("longitudinal", "transverse")[: min(grid.ndim, 2)]:
        np.testing.assert_allclose(structure[name], 2 * (covariance[name].isel(cells=[0]).values - covariance[name]), atol=1e-12)
        np.testing.assert_allclose(rho[name] * covariance[name].isel(cells=[0]).values, covariance[name], atol=1e-12)
    assert covariance["longitudinal"].attrs["units"] == "(m/s)^2"
    assert ("longitudinal_mean" in rho) == (len(set(grid.spacing)) == 1)


def test_a_uniform_component_has_no_correlation():
    grid = box(8)
    u = np.stack([np.full(grid.shape, 0.1), np.cos(grid.mesh()[1])])
    found = s.space_correlation(u, grid, centred(grid))
    assert np.isnan(found["longitudinal"].isel(axis=0)).all()
    np.testing.assert_allclose(found["longitudinal"].isel(axis=1), np.cos(np.arange(5) * TWO_PI / 8), atol=1e-14)


def test_integral_length_of_one_mode():
    """∫ cos kr dr to the first zero is 1/k (second order in Δx), over half the box 0."""
    errors = []
    for n in (32, 64, 128):
        grid = Grid((n,), (TWO_PI,))
        u = np.cos(2 * grid.mesh()[0])[None]
        found = s.integral_length(u, grid, centred(grid), LABELS)["longitudinal"]
        errors.append(abs(float(found[0]) - 0.5))
        assert abs(float(s.integral_length(u, grid, centred(grid), window="full")["longitudinal"][0])) < 1e-14
    assert found.attrs["units"] == "m"
    assert errors[-1] < 5e-4
    assert np.log2(errors[-2] / errors[-1]) == pytest.approx(2, abs=0.1)


@pytest.mark.parametrize("dimensions", [2, 3])
def test_integral_lengths_of_spectrum_and_correlation_agree_for_an_isotropic_flow(dimensions):
    """Φ(k) ∝ P(k) k² exp(−k²/k_p²) on every mode, random phases: the factors 2 and π/2 of the isotropic relations."""
    n = 96 if dimensions == 2 else 32
    grid = box(n, dimensions)
    k = grid.wavenumbers()
    square = sum(q * q for q in k)
    reference = np.fft.rfftn(noise((1, *grid.shape)), axes=tuple(range(-dimensions, 0)))[0]
    below = np.logical_and.reduce(np.broadcast_arrays(*(np.abs(q) < n / 2 for q in k)))
    phase = reference / np.abs(reference) * below
    width = 10.0 if dimensions == 2 else 4.0
    if dimensions == 2:
        psi = phase * np.exp(-square / (2 * width**2))
        hat = np.stack([1j * k[1] * psi, -1j * k[0] * psi])
        u = np.fft.irfftn(hat, s=grid.shape, axes=(-2, -1))
        found = s.integral_length(u, grid, centred(grid), window="full")
        along = float(found["longitudinal"].mean())
        assert float(found["spectral"]) == pytest.approx(along, rel=2e-3)
        # f(r) = exp(−r²k_p²/4) for this spectrum
        assert along == pytest.approx(np.sqrt(np.pi) / width, rel=2e-3)
    else:
        hats = []
        for seed in range(3):
            psi = np.fft.rfftn(noise((1, *grid.shape), seed), axes=(-3, -2, -1))[0]
            hats.append(psi / np.abs(psi) * below * np.exp(-square / (2 * width**2)))
        u = np.fft.irfftn(np.stack(hats), s=grid.shape, axes=(-3, -2, -1))
        hat = np.fft.rfftn(u, axes=(-3, -2, -1))
        curl = [1j * (k[(c + 1) % 3] * hat[(c + 2) % 3] - k[(c + 2) % 3] * hat[(c + 1) % 3]) for c in range(3)]
        u = np.fft.irfftn(np.stack(curl), s=grid.shape, axes=(-3, -2, -1))
        spectral = float(s.integral_length(u, grid, centred(grid))["spectral"])
        assert spectral == pytest.approx(np.sqrt(np.pi) / width, rel=1e-2)


def test_correlation_in_time_of_a_travelling_wave():
    grid, speed = box(16), 1.5
    times = 0.05 * np.arange(400)
    _, y = grid.mesh()
    u = np.stack([np.stack([0.2 + np.sin(2 * y - speed * t), 0.0 * y]) for t in times])
    frames = np.stack([u, u])
    frames[1, 3] = np.nan
    labels = s.Labels(times, "m", "s")
    rho = s.time_correlation(frames, grid, centred(grid), labels, mean=np.array([0.2, 0.0]).reshape(2, 1, 1), longest=3.0)
    assert rho.dims == ("sample", "lag")
    assert rho["lag"].attrs["units"] == "s"
    np.testing.assert_allclose(rho[0], np.cos(speed * rho["lag"]), atol=1e-13)
    assert np.isnan(rho[1]).all()
    found = s.integral_time(rho)
    assert float(found[0]) == pytest.approx(1 / speed, rel=1e-3)
    assert np.isnan(found[1])
    assert found.attrs["units"] == "s"
    whole = s.integral_time(rho, window="full")
    assert float(whole[0]) == pytest.approx(np.sin(3 * speed) / speed, rel=1e-3)
    # the mean of the box and of the window is found without being told; here it differs from point to point of the window
    own = s.time_correlation(frames[:1], grid, centred(grid), labels, longest=3.0)
    np.testing.assert_allclose(own[0], rho[0], atol=1e-12)


def test_autocorrelation_of_a_series_and_of_a_labelled_array():
    times = np.linspace(0, 20, 2001)
    wave = np.cos(TWO_PI * times[:-1] * 0.25)
    rho = s.autocorrelation(wave[None], s.Labels(times[:-1]), longest=2.0)
    assert rho.shape == (1, 201)
    np.testing.assert_allclose(rho[0], np.cos(TWO_PI * 0.25 * rho["lag"]), atol=0.05)  # pairs at the ends of the window
    labelled = xr.DataArray(np.stack([wave, 2 * wave]), {"time": times[:-1]}, ("sample", "time"))
    np.testing.assert_allclose(s.autocorrelation(labelled, longest=2.0)[1], rho[0], atol=1e-13)
    assert s.autocorrelation(labelled)["lag"].size == 1001
    short = s.autocorrelation(np.array([1.0, 2.0, 4.0]), mean=0.0, longest=2)  # 21/3, 10/2 and 4/1: the series is not periodic
    np.testing.assert_allclose(short, [1, 5 / 7, 4 / 7], rtol=1e-14)
    with pytest.raises(ValueError, match="equally spaced"):
        s.autocorrelation(wave, s.Labels(times[:-1] ** 2))
    with pytest.raises(ValueError, match="does not fit"):
        s.autocorrelation(wave, s.Labels(times[:-1]), longest=30)


def autoregressive(phi, members, steps, seed=0):
    """x(t + 1) = φ x(t) + ξ: ρ(m) = φᵐ, variance 1."""
    rng = np.random.default_rng(seed)
    x = np.empty((members, steps))
    x[:, 0] = rng.standard_normal(members)
    kicks = np.sqrt(1 - phi * phi) * rng.standard_normal((members, steps))
    for t in range(1, steps):
        x[:, t] = phi * x[:, t - 1] + kicks[:, t]
    return x


@pytest.mark.parametrize("phi", [0.0, 0.5, 0.9])
def test_integral_time_of_an_autoregressive_series(phi):
    x = autoregressive(phi, 16, 20000)
    rho = s.autocorrelation(x, s.Labels(0.1 * np.arange(20000)), mean=0.0, longest=10.0)
    mean = rho.mean("sample")
    np.testing.assert_allclose(mean, phi ** np.arange(101.0), atol=0.02)
    found = float(s.integral_time(mean))
    assert found == pytest.approx(0.05 * (1 + phi) / (1 - phi), rel=0.05)


# Distributions


def test_density_of_gaussian_numbers():
    x = noise((4, 50000))
    density = s.pdf(x, 60, (-6.0, 6.0), keep=1)
    assert density.dims == ("time", "value")
    width = density["upper"] - density["lower"]
    np.testing.assert_allclose((density * width).sum("value"), 1, rtol=1e-14)
    q = density["value"]
    np.testing.assert_allclose(density.mean("time"), np.exp(-0.5 * q**2) / np.sqrt(TWO_PI), atol=0.01)
    np.testing.assert_allclose((density * width).sum("value") + density["outside"], 1, rtol=1e-14)
    cut = s.pdf(x, np.array([-1.0, 0.0, 1.0]))
    inside = NormalDist().cdf(1) - NormalDist().cdf(-1)
    assert float((cut * (cut["upper"] - cut["lower"])).sum()) == pytest.approx(inside, abs=0.005)
    assert float(cut["outside"]) == pytest.approx(1 - inside, abs=0.005)


def test_density_of_a_labelled_field():
    grid = box(16)
    u = taylor_green(grid, centred(grid))[None, None]
    density = s.pdf(s.field(u, grid, centred(grid), "vorticity", LABELS), 20, keep=1)
    assert density.dims == ("sample", "value")
    assert density["value"].attrs["units"] == "m/s / m"
    assert density.attrs["units"] == "1 / (m/s / m)"
    assert density.attrs["samples"] == 256
    even = s.pdf(np.linspace(0, 1, 1001)[:-1], 10)
    np.testing.assert_allclose(even, 1 / (0.999), rtol=0.02)
    assert float(s.pdf(np.full(7, 3.0), 1)[0]) == 1.0


def test_wasserstein_distance():
    x = noise(20000)
    assert float(s.wasserstein(x + 0.7, x)) == pytest.approx(0.7, rel=1e-12)
    assert float(s.wasserstein(x, x)) == 0
    y = noise(30000, 1)
    assert float(s.wasserstein(y - 0.7, x)) == pytest.approx(0.7, abs=0.02)
    quantiles = np.array([NormalDist().inv_cdf((i + 0.5) / 20000) for i in range(20000)])
    assert float(s.wasserstein(3 * quantiles, quantiles)) == pytest.approx(2 * np.sqrt(2 / np.pi), rel=1e-3)
    assert float(s.wasserstein(2 * quantiles + 2, 2 * quantiles, normalised=True)) == pytest.approx(1.0, rel=1e-3)
    # by hand, of unequal sizes
    assert float(s.wasserstein([0.0], [0.0, 1.0])) == 0.5
    assert float(s.wasserstein([0.0, 3.0], [1.0])) == 1.5
    assert float(s.wasserstein([0.0, 1.0], [0.0, 0.0, 1.0, 1.0, 1.0])) == pytest.approx(0.1)
    kept = s.wasserstein(np.stack([x, x + 1, np.where(x > 3, np.nan, x)]), x, keep=1)
    assert kept.dims == ("time",)
    np.testing.assert_allclose(kept[:2], [0, 1], atol=1e-12)
    assert np.isnan(kept[2])
    labelled = xr.DataArray(x, dims=("x",), attrs={"units": "m/s"})
    assert s.wasserstein(labelled, x).attrs["units"] == "m/s"
    assert s.wasserstein(labelled, x, normalised=True).attrs["units"] == "1"


def test_wasserstein_distance_of_densities():
    x, y = noise(20000), 1.5 * noise(30000, 1) + 0.4
    p, q = s.pdf(x, 200, (-8.0, 8.0)), s.pdf(y, 150, (-9.0, 9.0))
    assert float(s.wasserstein_of_pdfs(p, q)) == pytest.approx(float(s.wasserstein(x, y)), abs=2e-3)
    ratio = float(s.wasserstein_of_pdfs(p, q, normalised=True) / s.wasserstein_of_pdfs(p, q))
    assert 1 / ratio == pytest.approx(y.std(), rel=2e-3)
    # evenly spread on [0, 1] and on [½, 2]: no quantile of the second lies left of the first, so W₁ = 1.25 − 0.5
    one, two = s.pdf([0.5], 1, (0.0, 1.0)), s.pdf([1.0], 1, (0.5, 2.0))
    assert float(s.wasserstein_of_pdfs(one, two)) == pytest.approx(0.75, rel=1e-14)
    assert float(s.wasserstein_of_pdfs(one, two, normalised=True)) == pytest.approx(0.75 / (1.5 / np.sqrt(12)), rel=1e-14)
    # [0, 1] against [¼, ¾]: F and F_ref cross at ½, between the edges; the distance is that of the quantiles, ∫|½ − s|/2 ds
    narrow = s.pdf([0.5], 1, (0.25, 0.75))
    assert float(s.wasserstein_of_pdfs(one, narrow)) == pytest.approx(0.125, rel=1e-14)
    with pytest.raises(ValueError, match="one density"):
        s.wasserstein_of_pdfs(one, s.pdf(noise((2, 10)), 3, keep=1))


# Filters


def dirichlet(factor, theta):
    return np.sin(factor * theta / 2) / (factor * np.sin(theta / 2))


TRANSFERS = {
    "sharp": lambda k, width, h: 1.0 if k * width < np.pi else 0.0,
    "box": lambda k, width, h: np.sin(k * width / 2) / (k * width / 2),
    "gaussian": lambda k, width, h: np.exp(-((k * width) ** 2) / 24),
    "cells": lambda k, width, h: dirichlet(width / h, k * h),
}


@pytest.mark.parametrize("kind", TRANSFERS)
@pytest.mark.parametrize("length", [TWO_PI, 5.0])
def test_filter_of_one_mode(kind, length):
    grid = Grid((45, 30), (length, 3.0))
    width = (5 * grid.spacing[0], 3 * grid.spacing[1])
    x, y = grid.mesh()
    for n in (2, 4, 6, 14):
        k, m = TWO_PI * n / length, TWO_PI * 2 / 3.0
        u = np.stack([1 + np.cos(k * x + 0.3), np.cos(k * x) * np.sin(m * y)])
        gains = [TRANSFERS[kind](q, w, h) for q, w, h in zip((k, m), width, grid.spacing, strict=True)]
        found = s.filtered(u, grid, centred(grid), kind, width)
        expected = np.stack([1 + gains[0] * np.cos(k * x + 0.3), gains[0] * gains[1] * np.cos(k * x) * np.sin(m * y)])
        np.testing.assert_allclose(found, expected, atol=1e-13)


def test_a_sharp_filter_drops_the_mode_at_its_cut_as_a_coarse_grid_does():
    grid, coarse = box(32), box(8)
    transfer = s.transfer_function("sharp", coarse.spacing[0], grid)
    kept = np.flatnonzero(transfer[:, 0])
    np.testing.assert_array_equal(kept, [0, 1, 2, 3, 29, 30, 31])
    np.testing.assert_array_equal(np.flatnonzero(transfer[0]), [0, 1, 2, 3])


@pytest.mark.parametrize("places", [centred, staggered])
def test_filters_onto_a_coarse_grid_are_those_of_the_solvers(places, x64):
    """A sharp cut is `resample`; a box is `resample` with exact cell means. Shapes need not divide each other."""
    grid, coarse = Grid((24, 20), (TWO_PI, 4.0)), Grid((9, 8), (TWO_PI, 4.0))
    u = noise((2, *grid.shape))
    cut = s.filtered(u, grid, places(grid), "sharp", onto=coarse)
    mean = s.filtered(u, grid, places(grid), "box", onto=coarse)
    for c, v in enumerate(places(grid)):
        np.testing.assert_allclose(cut[c], resample(jnp.asarray(u[c]), coarse.shape, v.at, v.at), atol=1e-12)
        exact = resample(jnp.asarray(u[c]), coarse.shape, v.at, v.at, (True, True), alias=True)
        np.testing.assert_allclose(mean[c], exact, atol=1e-12)
        wrong = s.filtered(u, grid, places(grid), "gaussian", onto=coarse)
        assert np.abs(wrong[c] - exact).max() > 1e-3


@pytest.mark.parametrize("factor", [2, 3, 4])
def test_cell_means_of_a_coarse_state_are_its_cell_means(factor):
    coarse = Grid((6, 5), (TWO_PI, 3.0))
    grid = coarse.with_shape([factor * n for n in coarse.shape])
    state = noise((2, 3, 2, *coarse.shape))
    fine = np.repeat(np.repeat(state, factor, axis=-2), factor, axis=-1)
    np.testing.assert_allclose(s.filtered(fine, grid, centred(grid), "cells", onto=coarse), state, rtol=1e-14)
    tau = s.subgrid_stress(fine, grid, centred(grid), "cells", onto=coarse)
    assert np.abs(tau).max() < 1e-13  # nothing varies inside a coarse cell
    varied = fine + noise(fine.shape, 1)
    found = s.subgrid_stress(varied, grid, centred(grid), "cells", onto=coarse)
    blocks = varied.reshape(2, 3, 2, 6, factor, 5, factor)
    variance = (blocks**2).mean(axis=(4, 6)) - blocks.mean(axis=(4, 6)) ** 2
    np.testing.assert_allclose(found.values[:, :, 0, 0], variance[:, :, 0], atol=1e-12)
    np.testing.assert_allclose(found.values[:, :, 1, 1], variance[:, :, 1], atol=1e-12)
    smooth = s.filtered(fine, grid, centred(grid), "box", onto=coarse)
    assert np.abs(smooth - state).max() > 1e-3  # a box over the interpolated values is another filter


def test_means_over_odd_numbers_of_cells_on_the_same_grid():
    grid = Grid((16, 9), (1.0, 1.0))
    u = noise((2, *grid.shape))
    found = s.filtered(u, grid, centred(grid), "cells", (3 / 16, 5 / 9))
    moving = sum(np.roll(u, (a, b), (1, 2)) for a in (-1, 0, 1) for b in (-2, -1, 0, 1, 2)) / 15
    np.testing.assert_allclose(found, moving, atol=1e-14)
    with pytest.raises(ValueError, match="use odd numbers"):
        s.filtered(u, grid, centred(grid), "cells", (2 / 16, 3 / 9))
    with pytest.raises(ValueError, match="whole cells"):
        s.filtered(u, grid, centred(grid), "cells", 0.1)


@pytest.mark.parametrize("grid", [Grid((12, 8), (TWO_PI, 2.0)), Grid((8, 4, 12), (1.0, 2.0, 1.5))], ids=str)
def test_means_over_coarse_faces_stay_free_of_divergence(grid):
    coarse = grid.with_shape([n // 2 for n in grid.shape])
    potential = noise((3, *grid.shape))
    if grid.ndim == 2:
        dx, dy = grid.spacing
        u = np.stack([potential[0] - np.roll(potential[0], 1, 1), np.roll(potential[0], 1, 0) - potential[0]])
        u /= np.array([dy, dx]).reshape(2, 1, 1)
    else:
        # edges carry the potential: the flux through a face is its circulation
        back = [(q - np.roll(q, 1, a)) / grid.spacing[a] for q, a in ((potential[2], 1), (potential[1], 2))]
        u = [back[0] - back[1]]
        back = [(q - np.roll(q, 1, a)) / grid.spacing[a] for q, a in ((potential[0], 2), (potential[2], 0))]
        u.append(back[0] - back[1])
        back = [(q - np.roll(q, 1, a)) / grid.spacing[a] for q, a in ((potential[1], 0), (potential[0], 1))]
        u = np.stack([*u, back[0] - back[1]])
    assert np.abs(d.divergence_staggered(u, grid)).max() < 1e-10
    found = s.filtered(u, grid, staggered(grid), "cells", onto=coarse)
    assert np.abs(d.divergence_staggered(found, coarse)).max() < 1e-10
    wrong = s.filtered(u, grid, centred(grid), "cells", onto=coarse)
    assert np.abs(d.divergence_staggered(wrong, coarse)).max() > 0.1


def one_mode_stress(kind, k, width, h, x):
    """u = cos kx: τ = ½ (1 + G(2k) cos 2kx) − G(k)² ½ (1 + cos 2kx)."""
    once, twice = TRANSFERS[kind](k, width, h), TRANSFERS[kind](2 * k, width, h)
    return 0.5 * (1 + twice * np.cos(2 * k * x)) - once**2 * 0.5 * (1 + np.cos(2 * k * x))


@pytest.mark.parametrize("kind", TRANSFERS)
@pytest.mark.parametrize("k", [1, 2, 4, 7])
def test_subgrid_stress_of_one_mode(kind, k):
    grid = Grid((45,), (TWO_PI,))
    width = 5 * grid.spacing[0]
    (x,) = grid.mesh()
    found = s.subgrid_stress(np.cos(k * x)[None], grid, centred(grid), kind, width, LABELS)
    np.testing.assert_allclose(found[0, 0], one_mode_stress(kind, k, width, grid.spacing[0], x), atol=1e-13)
    assert found.attrs["units"] == "(m/s)^2"
    assert found.attrs["filter"] == kind
    coarse = Grid((9,), (TWO_PI,))
    if kind != "cells":
        (X,) = coarse.mesh()
        found = s.subgrid_stress(np.cos(k * x)[None], grid, centred(grid), kind, onto=coarse)
        np.testing.assert_allclose(found[0, 0], one_mode_stress(kind, k, width, grid.spacing[0], X), atol=1e-13)


def test_products_are_formed_without_aliasing():
    """2k is beyond the grid: its filtered product is exact on twice as many cells only."""
    grid, k, width = Grid((32,), (TWO_PI,)), 13, 0.3
    (x,) = grid.mesh()
    exact = one_mode_stress("gaussian", k, width, grid.spacing[0], x)
    u = np.cos(k * x)[None]
    found = s.subgrid_stress(u, grid, centred(grid), "gaussian", width)[0, 0]
    np.testing.assert_allclose(found, exact, atol=1e-13)
    folded = s.subgrid_stress(u, grid, centred(grid), "gaussian", width, oversampling=1)[0, 0]
    assert np.abs(folded - exact).max() > 1e-2


@pytest.mark.parametrize("kind", TRANSFERS)
@pytest.mark.parametrize("shape", [(30, 25), (15, 10, 20)])
def test_subgrid_stress_is_galilean_invariant_symmetric_and_independent_of_places(kind, shape):
    grid = Grid(shape, (TWO_PI, 4.0, 5.0)[: len(shape)])
    flow = Modes(grid.lengths, reach=2)
    coarse = grid.with_shape([n // 5 for n in shape])
    for onto in (None, coarse):
        arguments = {"width": tuple(5 * h for h in grid.spacing), "onto": onto}
        u = flow.on(grid, centred(grid))
        tau = s.subgrid_stress(u, grid, centred(grid), kind, **arguments)
        size = float(np.abs(tau).max())
        assert size > 1e-2
        np.testing.assert_allclose(tau, tau.transpose("component", "axis", ...), atol=1e-14 * size)
        moving = u + np.array([5.0, -3.0, 2.0])[: grid.ndim].reshape(-1, *(1,) * grid.ndim)
        np.testing.assert_allclose(
            s.subgrid_stress(moving, grid, centred(grid), kind, **arguments), tau, atol=1e-12 * max(size, 100)
        )
        faces = s.subgrid_stress(flow.on(grid, staggered(grid)), grid, staggered(grid), kind, **arguments)
        np.testing.assert_allclose(faces, tau, atol=1e-11 * size)
        free = s.subgrid_stress(u, grid, centred(grid), kind, deviatoric=True, **arguments)
        np.testing.assert_allclose(np.einsum("aa...", free.values), 0, atol=1e-13 * size)
        off = free.values - tau.values
        np.testing.assert_allclose(off[0, 1], 0, atol=1e-14 * size)
        np.testing.assert_allclose(off[0, 0], off[1, 1], atol=1e-13 * size)


def test_subgrid_stress_of_two_crossed_waves():
    """u = cos ay, v = cos bx: τ_uv = G_x(b) G_y(a) cos(ay) cos(bx) − the same = 0; the diagonal is that of one mode."""
    grid = Grid((30, 40), (TWO_PI, TWO_PI))
    a, b, width = 3, 2, 0.8
    x, y = grid.mesh()
    tau = s.subgrid_stress(np.stack([np.cos(a * y), np.cos(b * x)]), grid, centred(grid), "gaussian", width)
    np.testing.assert_allclose(tau[0, 1], 0, atol=1e-14)
    np.testing.assert_allclose(tau[0, 0], one_mode_stress("gaussian", a, width, 1.0, y), atol=1e-13)
    np.testing.assert_allclose(tau[1, 1], one_mode_stress("gaussian", b, width, 1.0, x), atol=1e-13)


def test_stress_sampled_on_a_coarse_grid_is_the_fine_one_where_centres_coincide():
    grid, coarse = Grid((30, 21), (TWO_PI, 5.0)), Grid((10, 7), (TWO_PI, 5.0))
    u = Modes(grid.lengths).on(grid, centred(grid))
    for kind in TRANSFERS:
        fine = s.subgrid_dissipation(u, grid, centred(grid), kind, coarse.spacing)
        sampled = s.subgrid_dissipation(u, grid, centred(grid), kind, onto=coarse)
        np.testing.assert_allclose(sampled["dissipation"], fine["dissipation"][1::3, 1::3], atol=1e-11)
        np.testing.assert_allclose(sampled["x"], coarse.coordinates()[0])


def test_backscatter_of_one_mode():
    """τ > 0 and S̄ = −k G sin kx: −τS̄ has the sign of sin kx, half the points and half the exchange are backscatter."""
    grid, k, width = Grid((64,), (TWO_PI,)), 3, 0.9
    (x,) = grid.mesh()
    found = s.subgrid_dissipation(np.cos(k * x)[None, None], grid, centred(grid), "gaussian", width, LABELS)
    strain = -k * TRANSFERS["gaussian"](k, width, 1) * np.sin(k * x)
    exact = -one_mode_stress("gaussian", k, width, 1, x) * strain
    np.testing.assert_allclose(found["dissipation"][0], exact, atol=1e-13)
    assert float(found["backscatter_points"][0]) == 0.5
    assert float(found["backscatter_share"][0]) == pytest.approx(0.5, rel=1e-12)
    assert abs(float(found["mean"][0])) < 1e-14
    assert found["mean"].attrs["units"] == "(m/s)^3 / m"


@pytest.mark.parametrize("kind", TRANSFERS)
def test_backscatter_of_a_known_field_and_of_its_reverse(kind):
    grid = Grid((30, 25), (TWO_PI, 4.0))
    u = Modes(grid.lengths).on(grid, centred(grid))[None]
    width = tuple(5 * h for h in grid.spacing)
    found = s.subgrid_dissipation(u, grid, centred(grid), kind, width)
    tau = s.subgrid_stress(u, grid, centred(grid), kind, width).values
    gradient = s.velocity_gradient(s.filtered(u, grid, centred(grid), kind, width), grid, centred(grid)).values
    exact = -np.einsum("tacxy,tacxy->txy", tau, gradient)
    np.testing.assert_allclose(found["dissipation"], exact, atol=1e-11)
    assert float(found["mean"][0]) == pytest.approx(exact.mean(), rel=1e-9, abs=1e-12)
    assert float(found["backscatter_points"][0]) == (exact < 0).mean()
    share = -exact[exact < 0].sum() / np.abs(exact).sum()
    assert 0.01 < share < 0.99
    assert float(found["backscatter_share"][0]) == pytest.approx(share, rel=1e-9)
    back = s.subgrid_dissipation(-u, grid, centred(grid), kind, width)  # time runs backwards
    assert float(back["backscatter_share"][0]) == pytest.approx(1 - share, rel=1e-9)
    assert float(back["backscatter_points"][0]) == pytest.approx(1 - (exact < 0).mean(), rel=1e-12)
    free = s.subgrid_dissipation(u, grid, centred(grid), kind, width, deviatoric=True)
    np.testing.assert_allclose(free["dissipation"], found["dissipation"], atol=1e-11)


@pytest.mark.parametrize("dimensions", [1, 2])
def test_mean_subgrid_dissipation_of_a_sharp_filter_is_the_flux_through_it(dimensions):
    """Where the cube |k_a| ≤ 4 and the shells 0 … 4 hold the same modes, the mean is Π(4), in 1D (flux ½u²) twice that."""
    grid = box(24, dimensions)
    keep = np.ones((1,) * dimensions, dtype=bool)
    cube = np.ones((1,) * dimensions, dtype=bool)
    for q in grid.wavenumbers():
        cube = cube & (np.abs(q) <= 4)
        keep = keep & (np.abs(q) < 12)
    radius = np.sqrt(sum(q * q for q in grid.wavenumbers()))
    keep = keep & ~(cube & (radius >= 4.5))
    hat = np.fft.rfftn(noise((dimensions, *grid.shape)), axes=tuple(range(-dimensions, 0))) * keep
    u = np.fft.irfftn(hat, s=grid.shape, axes=tuple(range(-dimensions, 0)))
    if dimensions == 2:
        w = hat[0] / np.where(radius > 0, radius, 1)
        k = grid.wavenumbers()
        u = np.fft.irfftn(np.stack([1j * k[1] * w, -1j * k[0] * w]), s=grid.shape, axes=(-2, -1))
    flux = float(s.energy_flux(u, grid, centred(grid)).isel(wavenumber=4))
    mean = float(s.subgrid_dissipation(u, grid, centred(grid), "sharp", np.pi / 4.5)["mean"])
    assert abs(flux) > 1e-3
    assert mean == pytest.approx(flux * (2 if dimensions == 1 else 1), rel=1e-11)


def test_filters_refuse_what_they_cannot_do():
    grid = box(16)
    u, v = noise((2, 16, 16)), centred(grid)
    with pytest.raises(ValueError, match="needs a width"):
        s.filtered(u, grid, v, "box")
    with pytest.raises(ValueError, match="is not that of the frames"):
        s.filtered(u, grid, v, "box", onto=Grid((8, 8), (1.0, 1.0)))
    with pytest.raises(ValueError, match="positive and finite"):
        s.filtered(u, grid, v, "box", -1.0)
    with pytest.raises(ValueError, match="one per axis"):
        s.filtered(u, grid, v, "box", (1.0, 1.0, 1.0))
    with pytest.raises(ValueError, match="must be"):
        s.filtered(u, grid, v, "cells", grid.spacing[0], onto=box(8))


# Errors


def test_error_over_members_is_the_textbook_one():
    x = noise((20, 1, 5))
    found = s.standard_error(x, over="members")
    np.testing.assert_allclose(found["standard_error"], x[:, 0].std(axis=0, ddof=1) / np.sqrt(20))
    np.testing.assert_allclose(found["effective_samples"], 20 * 19 / 20)
    assert int(found["blocks"]) == 20
    whole = s.mean_with_error(x)
    np.testing.assert_allclose(whole["mean"], x.mean(axis=(0, 1)))
    np.testing.assert_allclose(whole["standard_error"], found["standard_error"])
    assert s.standard_error(x[:2], over="members")["blocks"] == 2
    with pytest.raises(ValueError, match="at least 2 members"):
        s.standard_error(x[:1], over="members")
    with pytest.raises(ValueError, match="at least 8 blocks"):
        s.mean_with_error(x[:7])


@pytest.mark.parametrize("phi", [0.0, 0.8, 0.95])
def test_error_of_blocks_of_an_autoregressive_series(phi):
    """The variance of the mean of N values is (1 + φ)/((1 − φ) N) σ²; blocks find it, single values do not."""
    members, steps = 64, 4096
    x = autoregressive(phi, members, steps, seed=2)
    exact = np.sqrt((1 + phi) / (1 - phi) / (members * steps))
    found = s.mean_with_error(x)
    assert float(found["standard_error"]) == pytest.approx(exact, rel=0.12)
    assert float(found["effective_samples"]) == pytest.approx((1 - phi) / (1 + phi) * members * steps, rel=0.25)
    assert abs(float(found["mean"])) < 4 * exact
    length = found["blocks"].attrs["block_frames"]
    assert length >= 10 * 0.5 * (1 + phi) / (1 - phi) * 0.8
    naive = s.standard_error(x, blocks=steps)
    assert float(naive["standard_error"]) == pytest.approx(1 / np.sqrt(members * steps), rel=0.02)
    if phi:
        assert float(naive["standard_error"]) < 0.5 * float(found["standard_error"])


def test_nineteen_in_twenty_means_lie_within_two_errors():
    hits = 0
    for seed in range(200):
        found = s.mean_with_error(autoregressive(0.7, 4, 400, seed))
        hits += abs(float(found["mean"])) < 2.1 * float(found["standard_error"])
    assert 178 <= hits <= 200


def test_blocks_of_labelled_values():
    x = xr.DataArray(
        noise((3, 25, 4)).transpose(2, 0, 1),
        {"time": np.arange(25.0), "wavenumber": np.arange(4.0)},
        ("wavenumber", "sample", "time"),
        attrs={"units": "(m/s)^2", "long_name": "energy"},
    )
    found = s.mean_with_error(x, blocks=4)
    used = x.isel(time=slice(1, None)).values.reshape(4, 12, 6).mean(axis=-1)  # 25 = 1 + 4 · 6
    assert found["mean"].dims == ("wavenumber",)
    np.testing.assert_allclose(found["mean"], used.mean(axis=-1), rtol=1e-13)
    np.testing.assert_allclose(found["standard_error"], used.std(axis=-1, ddof=1) / np.sqrt(12), rtol=1e-13)
    np.testing.assert_array_equal(found["wavenumber"], np.arange(4.0))
    assert int(found["blocks"]) == 12
    assert found["mean"].attrs["units"] == found["standard_error"].attrs["units"] == "(m/s)^2"
    with pytest.raises(ValueError, match="cannot cut 25 frames"):
        s.mean_with_error(x, blocks=26)
    with pytest.raises(ValueError, match="at least 8 blocks"):
        s.mean_with_error(x, blocks=2)
    with pytest.raises(ValueError, match="the dimension sample or time"):
        s.mean_with_error(x.isel(sample=0, time=0))
    with pytest.raises(ValueError, match="are not"):
        s.mean_with_error(np.arange(5.0))
    assert int(s.mean_with_error(x.isel(sample=0), blocks=8)["blocks"]) == 8


def test_errors_of_a_spectrum_with_a_broken_member():
    grid = box(8)
    u = noise((9, 3, 2, 8, 8))
    good = s.mean_with_error(s.energy_spectrum(u, grid, centred(grid)), blocks=1)
    assert good["standard_error"].shape == (7,)
    assert np.isfinite(good["standard_error"]).all()
    u[4, 2, 0, 1, 1] = np.nan
    broken = s.mean_with_error(s.energy_spectrum(u, grid, centred(grid)))
    assert np.isnan(broken["standard_error"]).all()
    assert np.isnan(broken["mean"]).all()


# All together


def statistics_of(u, grid, variables, labels):
    """Every statistic of a set of frames (sample, time, …)."""
    out = {
        "spectrum": s.energy_spectrum(u, grid, variables, labels),
        "components": s.energy_spectrum(u, grid, variables, labels, components=True),
        "scalar": s.scalar_spectrum(u, grid, variables, "u", labels),
        "transfer": s.energy_transfer(u, grid, variables, labels),
        "flux": s.energy_flux(u, grid, variables, labels),
        "derivatives": s.derivative_moments(u, grid, variables, labels),
        "gradient": s.velocity_gradient(u, grid, variables, labels),
        "velocity": s.field(u, grid, variables, "velocity", labels),
        "speed": s.field(u, grid, variables, "speed", labels),
        "structure": s.structure_functions(u, grid, variables, labels=labels),
        "absolute": s.structure_functions(u, grid, variables, (1, 3), labels, absolute=True),
        "correlation": s.space_correlation(u, grid, variables, labels),
        "length": s.integral_length(u, grid, variables, labels),
        "stress": s.subgrid_stress(u, grid, variables, "box", 1.0, labels, deviatoric=True),
        "subgrid": s.subgrid_dissipation(u, grid, variables, "gaussian", 1.0, labels),
        "pdf": s.pdf(s.field(u, grid, variables, "u", labels), 10, (-3.0, 3.0), keep=2),
        "distance": s.wasserstein(s.field(u, grid, variables, "u", labels), np.arange(10.0), keep=2),
    }
    if grid.ndim == 1:
        out["budget"] = s.kuramoto_sivashinsky_budget(u, grid, variables, labels)
    else:
        out["dissipation"] = s.dissipation(u, grid, variables, 0.1, labels)
        out["lost"] = s.dissipation_spectrum(u, grid, variables, 0.1, labels)
        out["moments"] = s.vorticity_moments(u, grid, variables, labels)
        out["scales"] = s.turbulence_scales(u, grid, variables, 0.1, labels)
        out["vorticity"] = s.field(u, grid, variables, "vorticity", labels)
    return out


def arrays_of(found):
    for name, value in found.items():
        parts = value.data_vars.values() if isinstance(value, xr.Dataset) else [value]
        yield from ((f"{name}/{part.name}", part) for part in parts)


@pytest.mark.parametrize("grid", [Grid((9,), (3.0,)), Grid((8, 8), (TWO_PI, TWO_PI)), Grid((6, 5, 6), (2.0, 1.0, 2.0))], ids=str)
@pytest.mark.parametrize("places", [centred, staggered])
def test_broken_frames_give_nan_and_touch_no_other(grid, places):
    labels = s.Labels(np.array([0.0, 0.5]), "m", "s")
    u = noise((3, 2, grid.ndim, *grid.shape))
    clean = dict(arrays_of(statistics_of(u, grid, places(grid), labels)))
    broken = u.copy()
    broken[1] = np.nan
    broken[2, 1, 0, (2,) * grid.ndim] = np.inf
    broken[2, 1, (0,) * (grid.ndim + 1)] = np.inf
    for name, found in arrays_of(statistics_of(broken, grid, places(grid), labels)):
        assert found.dims[:2] == ("sample", "time"), name
        assert found.attrs["long_name"], name
        assert found.attrs["units"], name
        for coordinate in found.coords.values():
            assert coordinate.attrs["long_name"], (name, coordinate.name)
        np.testing.assert_array_equal(found.values[0], clean[name].values[0], name)
        np.testing.assert_array_equal(found.values[2, 0], clean[name].values[2, 0], name)
        assert np.isnan(found.values[1]).all(), name
        assert np.isnan(found.values[2, 1]).all(), name
    assert np.isnan(s.filtered(broken, grid, places(grid), "box", 1.0)[2, 1]).all()


def test_results_can_be_stored(tmp_path):
    grid = box(8)
    u = noise((3, 2, 2, 8, 8))
    for name in ("subgrid_dissipation", "turbulence_scales", "structure_functions", "energy_transfer"):
        arguments = {"subgrid_dissipation": ("box", 1.0), "turbulence_scales": (0.1,)}.get(name, ())
        found = getattr(s, name)(u, grid, staggered(grid), *arguments)
        found.to_netcdf(tmp_path / f"{name}.nc")
        with xr.open_dataset(tmp_path / f"{name}.nc") as read:
            for key, value in (
                found if isinstance(found, xr.Dataset) else found.to_dataset(name="__xarray_dataarray_variable__")
            ).items():
                np.testing.assert_array_equal(read[key], value)
                assert read[key].attrs["units"] == value.attrs["units"]


def test_frames_may_have_fewer_axes_in_front():
    grid = box(8)
    u = noise((3, 2, 2, 8, 8))
    whole = dict(arrays_of(statistics_of(u, grid, centred(grid), s.PLAIN)))
    series = s.energy_transfer(u[1], grid, centred(grid))
    assert series.dims == ("time", "wavenumber")
    np.testing.assert_array_equal(series, whole["transfer/None"][1])
    single = s.turbulence_scales(u[1, 1], grid, centred(grid), 0.1)
    assert single["dissipation"].dims == ()
    assert float(single["dissipation"]) == float(whole["scales/dissipation"][1, 1])
    with pytest.raises(ValueError, match="at most"):
        s.energy_transfer(u[None], grid, centred(grid))
    with pytest.raises(ValueError, match="3 times for 2 frames"):
        s.energy_transfer(u, grid, centred(grid), s.Labels(np.arange(3.0)))


def test_frames_in_float32_are_seen_in_float64():
    grid = box(16)
    u = noise((2, 16, 16)).astype(np.float32)
    found = s.energy_transfer(u, grid, centred(grid))
    assert found.dtype == np.float64
    np.testing.assert_array_equal(found, s.energy_transfer(u.astype(np.float64), grid, centred(grid)))


def test_walls_are_refused():
    grid = Grid((8, 8), (1.0, 1.0), ("periodic", "no_slip"))
    with pytest.raises(ValueError, match="periodic box"):
        s.energy_spectrum(noise((2, 8, 8)), grid, centred(grid))
    with pytest.raises(ValueError, match="periodic box"):
        s.filtered(noise((2, 8, 8)), grid, centred(grid), "box", 0.5)
    with pytest.raises(ValueError, match="2 or 3 dimensions"):
        s.dissipation(noise((1, 8)), Grid((8,), (1.0,)), centred(Grid((8,), (1.0,))), 0.1)
