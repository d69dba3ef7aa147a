"""Initial states of the compressible family: exact solutions, exact cell means, and spectra that are what they promise."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flows import TWO_PI, relative

from hybridsim.grid import Grid, cell_mean
from hybridsim.solvers.compressible import CompressibleNavierStokes
from hybridsim.solvers.compressible_initial import (
    Blast,
    CompressibleTurbulence,
    Gresho,
    IsentropicVortex,
    KelvinHelmholtz,
    LinearWave,
    MixingLayer,
    ShockTube,
    ShuOsher,
    TaylorGreenGas,
    UniformGas,
    cell_means,
)

MONATOMIC = CompressibleNavierStokes(5 / 3)
DYED = CompressibleNavierStokes(5 / 3, scalars={"dye": 0.0, "heat": 0.1})
LENGTHS = (3.0, 1.5, 1.5)


def _start(state, grid, equation=MONATOMIC, dtype=np.float64, seed=0):
    return np.asarray(state(jax.random.key(seed), grid, (), dtype, equation))


def _refined(grid, factor=2):
    return grid.with_shape([factor * n for n in grid.shape])


STATES = {
    "uniform": UniformGas(1.3, 0.7, (0.1, -0.2, 0.3)),
    "sound": LinearWave("sound_right", 0.01),
    "entropy": LinearWave("entropy", 0.01, velocity=1.0),
    "shear": LinearWave("shear", 0.01, velocity=0.5),
    "vortex": IsentropicVortex(radius=0.3),
    "gresho": Gresho(),
    "sod": ShockTube(axis=1),
    "shu_osher": ShuOsher(axis=1),
    "blast": Blast(radius=0.4, edge=0.3),
    "kelvin_helmholtz": KelvinHelmholtz(1.0, width=0.3, envelope=0.4),
    "taylor_green": TaylorGreenGas(0.2),
    "turbulence": CompressibleTurbulence(highest_mode=5.0),
    "mixing_layer": MixingLayer(highest_mode=5.0),
    "sine": MixingLayer(seeds="sine", waves=2),
}
EXACT_MEANS = ("uniform", "sod", "shu_osher", "turbulence", "mixing_layer", "sine")


def _grid(dims, name=""):
    return Grid((10, 9, 8)[:dims], LENGTHS[:dims], ("periodic",) * (dims - 1) + ("outflow",) if "layer" in name else ())


def _fitting(name, dims):
    return UniformGas(1.3, 0.7, STATES[name].velocity[:dims]) if name == "uniform" else STATES[name]


# --- all of them -----------------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("dims", [2, 3])
@pytest.mark.parametrize("name", STATES)
def test_states_have_all_channels_and_are_physical(name, dims):
    state, grid = _fitting(name, dims), _grid(dims, name)
    u = _start(state, grid, DYED)
    assert u.shape == (dims + 4, *grid.shape)
    assert u.dtype == np.float64
    w = np.asarray(DYED.primitive(jnp.asarray(u)))
    assert w[0].min() > 0
    assert w[dims + 1].min() > 0
    assert w[dims + 2 :].min() >= 0
    assert w[dims + 2 :].max() <= 1 + 1e-12
    assert (w[dims + 2] == w[dims + 3]).all()
    if name not in ("turbulence", "mixing_layer", "sine"):
        assert (u[: dims + 2] == _start(state, grid, MONATOMIC)).all()
    # single precision is the same state, and holds no other number
    single = _start(state, grid, DYED, np.float32)
    assert single.dtype == np.float32
    for a, b in zip(single, u, strict=True):
        assert np.abs(a - b).max() <= 2e-6 * np.abs(u[: dims + 2]).max()
    trace = jax.make_jaxpr(lambda key: state(key, grid, (), "float32", DYED))(jax.random.key(0))
    assert "f64" not in str(trace)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("dims", [2, 3])
@pytest.mark.parametrize("name", EXACT_MEANS)
def test_a_coarse_grid_starts_from_the_block_means_of_a_fine_one(name, dims):
    state, grid = _fitting(name, dims), _grid(dims, name)
    u, fine = _start(state, grid, DYED), _start(state, _refined(grid), DYED)
    error = np.abs(u - cell_mean(jnp.asarray(fine), (2,) * dims)).max() / np.abs(u).max()
    print(name, error)
    assert error <= 1e-12
    assert relative(np.roll(u, 1, axis=1), u) > 1e-3 or name in ("uniform", "sod", "shu_osher")


@pytest.mark.usefixtures("x64")
def test_what_is_uniform_in_a_cell_is_so_to_the_last_bit():
    u = _start(UniformGas(0.1, 0.3, (0.7, 1 / 3)), Grid((6, 5), (1.0, 1.0)), DYED)
    exact = np.asarray(DYED.conserved(jnp.asarray([0.1, 0.7, 1 / 3, 0.3, 0.0, 0.0]).reshape(6, 1, 1)))
    assert (u == exact).all()
    # discontinuities at faces are seen by no quadrature point
    sharp = cell_means(
        lambda x: (np.where(x[0] < 0.3, 0.1, 0.7), 1 / 3, 0.0, np.where(x[1] < 0.6, 0.3, 0.9)),
        Grid((10, 5), (1.0, 1.0)),
        np.float64,
        MONATOMIC,
    )
    for q in np.asarray(sharp)[:3]:
        assert np.unique(q).size <= 2
    assert np.unique(sharp[3]).size == 4


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("name", ["sound", "vortex", "kelvin_helmholtz", "taylor_green"])
def test_quadrature_converges_with_order_six(name):
    state = STATES[name]
    errors = []
    # a periodic box would cut the tail of the vortex
    fine = Grid((256, 256), (3.0, 3.0), ("outflow", "outflow") if name == "vortex" else ())
    exact = jnp.asarray(_start(state, fine))
    for n in (16, 32, 64):
        u = _start(state, fine.with_shape((n, n)))
        errors.append(np.abs(u - cell_mean(exact, (256 // n,) * 2)).mean())
    rates = np.log2(np.array(errors[:-1]) / errors[1:])
    print(name, errors, rates)
    assert errors[1] <= 0.01 * np.abs(exact).max()
    assert rates[-1] >= 5.7


# --- exact solutions -------------------------------------------------------------------------------------------------------------


def _residual(state, grid, equation, points, t=0.3, step=2e-3, spoil=1.0):
    """max |∂t U + ∇·F| at points of the box, by central differences of order 8, over max |∂t U|; with p times `spoil`."""
    d = grid.ndim
    stencil = {1: 4 / 5, 2: -1 / 5, 3: 4 / 105, 4: -1 / 280}

    def primitive(x, time):
        shape = x[0].shape
        w = [jnp.asarray(np.broadcast_to(q, shape)) for q in state.primitive_at(tuple(x), grid, equation, time)]
        return [q * spoil if c == d + 1 else q for c, q in enumerate(w)]

    total, largest = 0.0, 0.0
    for j, weight in stencil.items():
        for sign in (1, -1):
            w = primitive(points, t + sign * j * step)
            change = sign * weight / step * np.stack(equation.conserved_channels(w, d))
            total, largest = total + change, largest + change
            for a in range(d):
                x = [q + sign * j * step * (b == a) for b, q in enumerate(points)]
                total = total + sign * weight / step * np.stack(equation.flux(primitive(x, t), a, d))
    return np.abs(total).max() / max(np.abs(largest).max(), 1e-6)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(("state", "dims"), [
    (UniformGas(1.3, 0.7, (0.1, -0.2, 0.3)), 3),
    (IsentropicVortex(radius=0.3, velocity=(0.7, -0.4)), 2),
    (IsentropicVortex(radius=0.3, velocity=(0.7, -0.4, 0.2), axis=1, strength=3.0), 3),
    (Gresho(0.3, radius=0.35, velocity=(0.7, -0.4)), 2),
    (Gresho(0.3, radius=0.35, velocity=(0.7, -0.4, 0.2), axis=0), 3),
], ids=lambda v: type(v).__name__)  # fmt: skip
def test_solutions_solve_the_euler_equations(state, dims, rng):
    grid = Grid((8,) * dims, LENGTHS[:dims], ("outflow",) * dims if isinstance(state, IsentropicVortex) else ())
    points = [rng.uniform(0, length, 400) for length in grid.lengths]
    if isinstance(state, Gresho):  # not across the kinks
        middle = [length / 2 + v * 0.3 for length, v in zip(grid.lengths, state.velocity, strict=True)]
        inner = [x - length * np.rint((x - m) / length) - m for x, m, length in zip(points, middle, grid.lengths, strict=True)]
        r = np.sqrt(sum(q**2 for a, q in enumerate(inner) if dims == 2 or a != state.axis)) / state.radius
        away = (np.abs(r - 1) > 0.1) & (np.abs(r - 2) > 0.1)
        points = [q[away] for q in points]
        assert away.sum() > 200
    found = _residual(state, grid, DYED, points)
    print(type(state).__name__, dims, found)
    assert found <= 1e-7
    if not isinstance(state, UniformGas):
        assert _residual(state, grid, DYED, points, spoil=1.01) > 1e-3


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("kind", ["sound_right", "sound_left", "entropy", "shear"])
@pytest.mark.parametrize(("dims", "axis"), [(1, None), (2, None), (3, None), (2, 1), (3, 2)])
def test_linear_waves_are_linear_and_come_back(kind, dims, axis, rng):
    if dims == 1 and kind == "shear":
        return
    grid = Grid((8,) * dims, LENGTHS[:dims])
    points = [rng.uniform(0, length, 200) for length in grid.lengths]
    residuals = []
    for amplitude in (1e-3, 1e-4):
        # sampled coarsely, so that rounding does not count against a small wave
        state = LinearWave(kind, amplitude, axis, velocity=0.4)
        residuals.append(_residual(state, grid, DYED, points, step=0.01))
    print(kind, dims, axis, residuals)
    # an entropy or a shear wave solves the equations as it is, sound up to the square of its amplitude
    if "sound" in kind:
        assert residuals[1] == pytest.approx(0.1 * residuals[0], rel=0.05)
    assert residuals[0] <= (5e-3 if "sound" in kind else 1e-8)
    state = LinearWave(kind, 1e-3, axis, velocity=0.4)
    period = state.period(grid)
    start = _start(state, grid)
    later = np.asarray(state.solution(period, grid, np.float64, MONATOMIC))
    assert np.abs(later - start).max() <= 1e-14
    half = np.asarray(state.solution(0.5 * period, grid, np.float64, MONATOMIC))
    assert np.abs(half - start).max() > 1e-3
    # across the wave nothing changes, and its mean is the stream
    assert start[0].mean() == pytest.approx(1.0, abs=1e-15)
    if axis is not None:
        assert (start == np.take(start, [0], axis=1)).all()


@pytest.mark.usefixtures("x64")
def test_the_diagonal_wave_is_athenas():
    """Box 3 × 1.5 × 1.5, k = 2π (1, 2, 2)/3, wavelength 1, one period of sound in the time 1; left and right are mirror images."""
    grid = Grid((12, 6, 6), LENGTHS)
    right, left = LinearWave("sound_right"), LinearWave("sound_left")
    assert right.wavevector(grid) == pytest.approx(TWO_PI * np.array([1, 2, 2]) / 3, rel=1e-15)
    assert right.period(grid) == pytest.approx(1.0, rel=1e-15)
    assert LinearWave("entropy", velocity=1.0).period(grid) == pytest.approx(1.0, rel=1e-15)
    assert LinearWave("entropy").period(grid) == float("inf")
    a, b = _start(right, grid), _start(left, grid)
    assert (a[[0, 4]] == b[[0, 4]]).all()
    assert (a[1:4] == -b[1:4]).all()
    # the right eigenvector of conserved variables, (1, v + c, v_t, H + v c) with H = c²/(γ − 1)
    wave = np.asarray(a[0] - 1) / np.abs(a[0] - 1).max()
    speed = (a[1:4] * np.array([1, 2, 2]).reshape(3, 1, 1, 1) / 3).sum(axis=0)
    assert speed == pytest.approx(a[0] - 1, abs=3e-12)
    assert a[4] - 0.9 == pytest.approx(1.5 * (a[0] - 1), abs=3e-12)
    assert wave.max() == pytest.approx(1.0)


@pytest.mark.usefixtures("x64")
def test_the_vortex_is_where_the_stream_carried_it():
    grid = Grid((24, 20), (24.0, 20.0))
    state = IsentropicVortex(centre=(7.0, 9.0), velocity=(2.0, -1.0))
    start = _start(state, grid, DYED)
    moved = np.asarray(state.solution(3.0, grid, np.float64, DYED))
    assert np.abs(moved - np.roll(start, (6, -3), axis=(1, 2))).max() <= 1e-12
    around = np.asarray(state.solution(60.0, grid, np.float64, DYED))
    assert np.abs(around - np.roll(start, (0, 0), axis=(1, 2))).max() <= 1e-12
    # γ = 1.4, β = 5: the temperature at the centre
    cold = 1 - 0.4 * 25 / (8 * 1.4 * np.pi**2) * np.e
    density, *_, pressure = state.primitive_at((np.array([7.0]), np.array([9.0])), grid, CompressibleNavierStokes(1.4))
    assert pressure / density == pytest.approx(cold, rel=1e-14)
    assert density == pytest.approx(cold**2.5, rel=1e-14)
    # without periods it leaves the box
    open_box = Grid((24, 20), (24.0, 20.0), ("outflow", "outflow"))
    gone = np.asarray(state.solution(60.0, open_box, np.float64, DYED))
    assert np.abs(gone[0] - 1).max() <= 1e-12


@pytest.mark.usefixtures("x64")
def test_greshos_vortex_has_its_mach_number_where_it_is_fastest():
    grid = Grid((8, 8), (1.0, 1.0))
    for gamma, mach in ((1.4, 0.1), (5 / 3, 1e-3)):
        equation = CompressibleNavierStokes(gamma)
        at = (np.array([0.7]), np.array([0.5]))
        density, u, v, pressure = Gresho(mach, 2.0, density=3.0).primitive_at(at, grid, equation)
        assert (u[0], v[0]) == pytest.approx((0.0, 2.0), abs=1e-14)
        assert v / np.sqrt(gamma * pressure / density) == pytest.approx(mach, rel=1e-12)
        outside = Gresho(mach).primitive_at((np.array([0.95]), np.array([0.5])), grid, equation)
        assert outside[1:3] == (0.0, 0.0)
        assert outside[3] - 1 / (gamma * mach**2) == pytest.approx(4 * np.log(2) - 2.5, rel=1e-9, abs=1e-9)


# --- discontinuities -------------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(("shape", "lengths", "axis"), [((128,), (1.0,), 0), ((4, 60), (1.0, 2.0), 1), ((5, 4, 30), LENGTHS, 2)])
def test_shock_tubes_are_exact_on_every_grid(shape, lengths, axis):
    equation = CompressibleNavierStokes(1.4, scalars={"dye": 0.0})
    left, right = (1.0, 0.75, 1.0), (0.125, -0.3, 0.1)
    grid = Grid(shape, lengths)
    d = grid.ndim
    for position in (0.5, 0.3, 0.317):
        u = np.moveaxis(_start(ShockTube(left, right, position, axis), grid, equation), axis + 1, 1)
        sides = []
        for (rho, v, p), c in ((left, 1.0), (right, 0.0)):
            velocity = [v if a == axis else 0.0 for a in range(d)]
            w = jnp.asarray([rho, *velocity, p, c]).reshape(d + 3, *[1] * d)
            sides.append(np.asarray(equation.conserved(w))[(slice(None),) + (0,) * (d - 1)])
        cells = grid.shape[axis]
        cut = position * cells
        whole = int(np.floor(cut + 1e-9))
        first = u[:, :whole]
        assert np.abs(first - sides[0].reshape(-1, *[1] * d)).max() <= 1e-15
        beyond = u[:, whole + (abs(cut - whole) > 1e-9) :]
        assert np.abs(beyond - sides[1].reshape(-1, *[1] * d)).max() <= 1e-15
        assert whole + beyond.shape[1] + (abs(cut - whole) > 1e-9) == cells
        mean = u.mean(axis=tuple(range(1, d + 1)))
        exact = position * sides[0][:, 0] + (1 - position) * sides[1][:, 0]
        assert mean == pytest.approx(exact, rel=1e-13)


@pytest.mark.usefixtures("x64")
def test_shu_oshers_waves_are_athenas():
    equation = CompressibleNavierStokes(1.4)
    u = _start(ShuOsher(), Grid((400,), (2.0,)), equation)
    # the undisturbed state to the left, as Athena++ has it
    assert (u[:, :40] == u[:, :1]).all()
    assert u[:, 0] == pytest.approx([3.857143, 10.1418522, 39.1666609], rel=1e-6)
    x = np.linspace(-1, 1, 400 * 200 + 1)
    middle = 0.5 * (x[1:] + x[:-1])
    exact = np.where(middle < -0.8, 3.857143, 1 + 0.2 * np.sin(5 * np.pi * middle)).reshape(400, 200).mean(axis=1)
    assert np.abs(u[0] - exact).max() <= 1e-7
    assert u[2, 41:] == pytest.approx(2.5, rel=1e-15)
    assert not u[1, 40:].any()
    assert (_start(ShuOsher(axis=1), Grid((3, 400), (1.0, 2.0)), equation)[:, 0][[0, 2, 3]] == u).all()


@pytest.mark.usefixtures("x64")
def test_blasts_hold_their_energy():
    equation = CompressibleNavierStokes(1.4)
    for dims, volume in ((1, 0.4), (2, np.pi * 0.04), (3, 4 / 3 * np.pi * 0.008)):
        grid = Grid((60, 60, 60)[:dims], (1.0,) * dims)
        u = _start(Blast(10.0, 0.1, 1.0, 0.2), grid, equation)
        assert (u[-1].mean() - 0.25) * 0.4 == pytest.approx(9.9 * volume, rel=5e-3)
        # mirror images of itself
        for a in range(1, dims + 1):
            assert np.abs(u - np.flip(u, a)).max() <= 1e-12
    off = _start(Blast(centre=(0.95, 0.5), radius=0.1, edge=0.02), Grid((20, 20), (1.0, 1.0)), equation)
    assert off[-1][0, 10] > 10  # through the periodic side
    walled = _start(Blast(centre=(0.95, 0.5), radius=0.1, edge=0.02), Grid((20, 20), (1.0, 1.0), ("outflow", "outflow")), equation)
    assert walled[-1][0, 10] == pytest.approx(0.25)


# --- instabilities ---------------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("contrast", [0.0, 1.0])
def test_kelvin_helmholtz_is_lecoanets(contrast):
    grid = Grid((32, 64), (1.0, 2.0))
    state = KelvinHelmholtz(contrast)
    x, z = grid.mesh()
    w = state.primitive_at((x, z), grid, DYED)
    # eq. 8 of the paper
    a, sigma, z1, z2 = 0.05, 0.2, 0.5, 1.5
    exact = (
        1 + contrast / 2 * (np.tanh((z - z1) / a) - np.tanh((z - z2) / a)),
        np.tanh((z - z1) / a) - np.tanh((z - z2) / a) - 1,
        0.01 * np.sin(TWO_PI * x) * (np.exp(-((z - z1) ** 2) / sigma**2) + np.exp(-((z - z2) ** 2) / sigma**2)),
        10.0,
        0.5 * (np.tanh((z - z2) / a) - np.tanh((z - z1) / a) + 2),
    )
    for q, p in zip(w, exact, strict=False):
        assert np.abs(q - p).max() <= 1e-14
    # the same flow twice: shifted by half a box and mirrored
    u = _start(state, grid, DYED)
    twin = np.flip(np.roll(u, 16, axis=1), axis=2)
    twin[2] = -twin[2]
    assert np.abs(u - twin).max() <= 1e-13
    flat = _start(state, Grid((32, 3, 64), (1.0, 0.1, 2.0)), DYED)
    assert (flat[[0, 1, 3, 4]] == u[[0, 1, 2, 3]][:, :, None]).all()
    assert not flat[2].any()


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("lengths", [(2.0, 2.0), (2.0, 3.0), (2.0, 2.0, 2.0), (2.0, 3.0, 2.5)])
def test_taylor_green_is_isothermal_with_the_pressure_of_an_incompressible_flow(lengths):
    """−∇²p = ρ₀ ∂_i u_j ∂_j u_i, spectrally."""
    grid = Grid((16,) * len(lengths), lengths)
    equation = CompressibleNavierStokes(1.4)
    state = TaylorGreenGas(0.2, 1.3, 0.7)
    w = [np.broadcast_to(q, grid.shape) for q in state.primitive_at(grid.mesh(), grid, equation)]
    density, velocity, pressure = w[0], w[1 : grid.ndim + 1], w[grid.ndim + 1]
    k = [np.where(2 * np.abs(q) * length / TWO_PI == 16, 0, q) for q, length in zip(grid.wavenumbers(), lengths, strict=True)]

    def derivative(q, a):
        return np.fft.irfftn(1j * k[a] * np.fft.rfftn(q), s=grid.shape, axes=range(grid.ndim))

    dims = range(grid.ndim)
    source = sum(derivative(velocity[j], i) * derivative(velocity[i], j) for i in dims for j in dims)
    laplacian = sum(derivative(derivative(pressure, a), a) for a in dims)
    assert np.abs(laplacian + 0.7 * source).max() <= 1e-10 * np.abs(laplacian).max()
    assert np.abs(sum(derivative(velocity[a], a) for a in dims)).max() <= 1e-13
    temperature = pressure / density
    assert np.ptp(temperature) <= 1e-13 * temperature.mean()
    assert 1.3 / np.sqrt(1.4 * temperature.mean()) == pytest.approx(0.2, rel=1e-13)
    assert density.mean() == pytest.approx(0.7, rel=1e-13)
    if lengths == (2.0, 2.0, 2.0):
        x, y, z = (np.pi * q for q in grid.mesh())
        brachet = 0.7 * 1.3**2 / 16 * (np.cos(2 * x) + np.cos(2 * y)) * (np.cos(2 * z) + 2)
        assert np.abs(pressure - pressure.mean() - brachet).max() <= 1e-12


# --- turbulence ------------------------------------------------------------------------------------------------------------------


def _velocity_modes(u, grid):
    """v̂ of a gas of uniform density from its cell means, and |k|/k₀."""
    axes = tuple(range(1, grid.ndim + 1))
    hat = np.fft.rfftn(u[1 : grid.ndim + 1] / u[0], axes=axes) / grid.cells
    k = grid.wavenumbers()
    for q, h in zip(k, grid.spacing, strict=True):
        hat = hat / np.sinc(q * h / TWO_PI)[None]
    radius = np.sqrt(sum(q**2 for q in k)) * max(grid.lengths) / TWO_PI
    weight = np.where(np.arange(grid.shape[-1] // 2 + 1) == 0, 1.0, 2.0)
    return hat, np.broadcast_to(radius, hat.shape[1:]), np.broadcast_to(weight, hat.shape[1:])


def _solenoidal_energy(u, grid):
    """⟨½|v|²⟩ and its solenoidal share."""
    hat, _, weight = _velocity_modes(u, grid)
    k = np.stack(np.broadcast_arrays(*grid.wavenumbers()))
    square = np.where((k**2).sum(axis=0) > 0, (k**2).sum(axis=0), 1.0)
    along = np.abs((k * hat).sum(axis=0)) ** 2 / square
    total = (np.abs(hat) ** 2).sum(axis=0)
    energy = 0.5 * (weight * total).sum()
    return energy, 1 - 0.5 * (weight * along).sum() / energy


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("shape", [(24,), (24, 20), (36, 40), (20, 14, 16)])
def test_turbulence_has_the_energy_it_is_told_and_no_momentum(shape):
    d = len(shape)
    grid = Grid(shape, LENGTHS[:d])
    share = 0.0 if d == 1 else 0.5
    u = _start(CompressibleTurbulence(0.8, None, 1.7, 0.9, highest_mode=7.0, solenoidal_share=share), grid, DYED)
    assert np.abs(u[1 : d + 1].mean(axis=tuple(range(1, d + 1)))).max() <= 1e-15
    assert (u[0] == 1.7).all()
    speed = 0.8 * np.sqrt(5 / 3 * 0.9 / 1.7)
    # of the flow itself, on whatever grid
    assert u[d + 1].mean() == pytest.approx(0.9 * 1.5 + 0.5 * 1.7 * speed**2, rel=1e-13)
    if all(n > 14 * length / 3 + 1 for n, length in zip(shape, grid.lengths, strict=True)):
        energy, _ = _solenoidal_energy(u, grid)
        assert energy == pytest.approx(0.5 * speed**2, rel=1e-12)
    given = _start(CompressibleTurbulence(0.8, 2.5, highest_mode=7.0, solenoidal_share=share), grid, DYED)
    assert given[d + 1].mean() == pytest.approx(1.5 + 2.5, rel=1e-13)
    other = _start(CompressibleTurbulence(0.8, 2.5, highest_mode=7.0, solenoidal_share=share), grid, DYED, seed=1)
    assert abs(np.corrcoef(given[1].ravel(), other[1].ravel())[0, 1]) < 0.6


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("dims", [2, 3])
@pytest.mark.parametrize("share", [0.0, 0.5, 0.7, 1.0])
def test_turbulence_is_as_solenoidal_as_it_is_told(dims, share):
    grid = Grid((20,) * dims, (1.0,) * dims)
    # a flat spectrum has many modes, and so little scatter
    state = CompressibleTurbulence(1.0, exponent=0.0, highest_mode=8.0, solenoidal_share=share)
    found = np.mean([_solenoidal_energy(_start(state, grid, seed=s), grid)[1] for s in range(4)])
    exact = share**2 * (dims - 1) / (share**2 * (dims - 1) + (1 - share) ** 2)
    print(dims, share, found, exact)
    assert found == pytest.approx(exact, abs=1e-12 if share in (0.0, 1.0) else 0.03)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(("dims", "state", "exact"), [
    (2, CompressibleTurbulence(exponent=2.0, highest_mode=14.0), lambda n: n**-2.0),
    (2, CompressibleTurbulence(exponent=5 / 3, lowest_mode=3.0, highest_mode=14.0), lambda n: n ** (-5 / 3) * (n >= 3)),
    (3, CompressibleTurbulence(exponent=2.0, highest_mode=12.0), lambda n: n**-2.0),
    (3, CompressibleTurbulence(spectrum="exponential", highest_mode=12.0), lambda n: n**4 * np.exp(-(n**2) / 8)),
])  # fmt: skip
def test_turbulence_has_the_spectrum_it_is_told(dims, state, exact):
    """E(n) per mode n^(1 − d), so that shells which the lattice fills unevenly do not matter."""
    grid = Grid((32,) * dims, (1.0,) * dims)
    ratios = []
    for seed in range(16 if dims == 2 else 4):
        hat, radius, weight = _velocity_modes(_start(state, grid, seed=seed), grid)
        expected = np.where(radius > 0, exact(np.maximum(radius, 1e-9)) * np.maximum(radius, 1.0) ** (1 - dims), 0.0)
        inside = (radius >= state.lowest_mode) & (radius <= state.highest_mode)
        square = np.where(inside, (np.abs(hat) ** 2).sum(axis=0), 0.0)
        # nothing outside of the band
        assert np.abs(hat[:, ~inside]).max() <= 1e-15
        shell = np.rint(radius).astype(int)
        ratios.append(np.bincount(shell.ravel(), (weight * square).ravel())[:15] / np.sum(weight * square))
        of_exact = np.bincount(shell.ravel(), (weight * np.where(inside, expected, 0.0)).ravel())[:15]
    ratio = np.mean(ratios, axis=0) / np.where(of_exact > 0, of_exact / of_exact.sum(), np.inf)
    n = np.arange(15)
    kept = ratio[(n >= max(2, state.lowest_mode)) & (n <= state.highest_mode - 1)]
    print(dims, kept.round(2))
    assert np.abs(kept - 1).max() <= 0.3
    # no trend over the band
    trend = np.polyfit(np.log(n[(n >= 3) & (n <= 11)]), np.log(ratio[(n >= 3) & (n <= 11)]), 1)[0]
    assert abs(trend) <= 0.15


@pytest.mark.usefixtures("x64")
def test_turbulence_is_the_same_on_every_grid_and_in_every_precision():
    state = CompressibleTurbulence(highest_mode=6.0)
    box = (1.0, 1.5)
    found = []
    for shape in ((24, 24), (25, 30), (48, 36)):
        grid = Grid(shape, box)
        phase = sum(0.5 * k * h for k, h in zip(grid.wavenumbers(), grid.spacing, strict=True))
        found.append(_velocity_modes(_start(state, grid), grid)[0] * np.exp(-1j * phase)[None])
    for hat in found[1:]:
        for nx in range(-4, 5):
            for ny in range(7):
                assert hat[:, nx, ny] == pytest.approx(found[0][:, nx, ny], abs=1e-14)
    # on a grid that cannot carry the band the means still are means
    coarse = _start(state, Grid((4, 6), box))
    fine = cell_mean(jnp.asarray(_start(state, Grid((24, 24), box))), (6, 4))
    assert np.abs(coarse - fine).max() <= 1e-13


# --- mixing layers ---------------------------------------------------------------------------------------------------------------


def _layer_box(n, dims=2, height=1.5):
    shape, lengths = (n,) * (dims - 1) + (int(height * n),), (1.0,) * (dims - 1) + (height,)
    return Grid(shape, lengths, ("periodic",) * (dims - 1) + ("outflow",))


@pytest.mark.usefixtures("x64")
def test_mixing_layers_are_hot_above_and_cold_below():
    grid = _layer_box(16, 3)
    u = _start(MixingLayer(envelope=0.03, highest_mode=4.0), grid, DYED)
    w = np.asarray(DYED.primitive(jnp.asarray(u)))
    speed = 0.6454972243679028
    for cell, rho, v, c in ((0, 10**1.75, -speed / 2, 1.0), (-1, 1.0, speed / 2, 0.0)):
        assert np.abs(w[..., cell] - np.array([rho, v, 0, 0, 1, c, c]).reshape(7, 1, 1)).max() <= 1e-9
    # Mach ½ in hot gas
    assert speed / np.sqrt(5 / 3) == pytest.approx(0.5, rel=1e-6)
    # total masses: the layer is antisymmetric about a third of the box
    assert u[0].mean() == pytest.approx((10**1.75 + 2) / 3, rel=1e-12)
    thin = MixingLayer(width=0.1, seed_speed=0.0, cold_velocity=0.0, velocity=0.7, contrast=3.0, hot_density=2.0, pressure=0.9)
    u = _start(thin, grid, DYED)
    h = grid.spacing[-1]
    edges = np.arange(25) * h - 0.5
    integral = 0.1 * np.log(np.cosh(edges / 0.1))
    step = np.diff(integral) / h
    assert u[0][0, 0] == pytest.approx(2 * (1 + 2 * 0.5 * (1 - step)), rel=1e-9)
    assert (u[1] == u[1][0, 0]).all()
    w = np.asarray(DYED.primitive(jnp.asarray(u)))
    assert w[1][0, 0, [0, -1]] == pytest.approx([0.0, 0.7], abs=1e-3)
    assert w[4][0, 0, [0, -1]] == pytest.approx([0.9, 0.9], rel=1e-4)
    assert not w[2:4].any()


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("dims", [2, 3])
def test_random_seeds_are_solenoidal_and_as_strong_as_told(dims):
    """In gas of almost one density at rest the momentum is that of the seeds, and periodic where the envelope is zero."""
    grid = _layer_box(64 if dims == 2 else 48, dims)
    still = {"contrast": 1 + 1e-12, "velocity": 0.0, "envelope": 0.055, "lowest_mode": 2.0, "seed_speed": 0.1}
    still["highest_mode"] = 6.0 if dims == 2 else 3.0
    rms = []
    for seed in range(8 if dims == 2 else 2):
        u = _start(MixingLayer(**still), grid, seed=seed)
        hat, _, weight = _velocity_modes(u, grid)
        k = np.stack(np.broadcast_arrays(*grid.wavenumbers()))
        size = np.sqrt((k**2).sum(axis=0)[None] * np.abs(hat) ** 2).max()
        assert np.abs((k * hat).sum(axis=0)).max() <= 1e-9 * size
        # kinetic energy is that of the seeds, by Parseval
        energy = 0.5 * (weight * (np.abs(hat) ** 2).sum(axis=0)).sum()
        assert u[dims + 1].mean() - 1.5 == pytest.approx(energy, rel=1e-6)
        assert np.abs(u[1 : dims + 1].mean(axis=tuple(range(1, dims + 1)))).max() <= 1e-9
        cell = grid.shape[-1] // 3
        at_interface = 0.5 * (u[1 : dims + 1, ..., cell - 1] + u[1 : dims + 1, ..., cell])
        rms.append((at_interface**2).sum(axis=0).mean())
    print(dims, np.sqrt(np.mean(rms)))
    assert np.sqrt(np.mean(rms)) == pytest.approx(0.1, rel=0.2)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("state", [
    MixingLayer(highest_mode=6.0, width=0.05),
    MixingLayer(seeds="sine", waves=2, width=0.05, seed_speed=0.2),
], ids=["random", "sine"])  # fmt: skip
def test_a_resolved_layer_has_the_pressure_it_is_told(state):
    """What is left of the kinetic energy within a cell counts as heat, and vanishes with h²."""
    errors = []
    for n in (64, 128, 256):
        u = _start(state, _layer_box(n), DYED)
        errors.append(np.abs(np.asarray(DYED.primitive(jnp.asarray(u)))[3] - 1).max())
    rates = np.log2(np.array(errors[:-1]) / errors[1:])
    print(errors, rates)
    assert rates[-1] == pytest.approx(2.0, abs=0.1)
    assert errors[-1] < 0.01


@pytest.mark.usefixtures("x64")
def test_sines_are_sines():
    state = MixingLayer(seeds="sine", waves=2, seed_speed=0.2, velocity=0.0, contrast=1 + 1e-12, envelope=0.2)
    grid = _layer_box(40, 3)
    u = _start(state, grid)
    x, y, z = grid.mesh()
    exact = 0.2 * np.sin(4 * np.pi * x) * np.sin(4 * np.pi * y) * np.exp(-0.5 * ((z - 0.5) / 0.2) ** 2)
    assert np.abs(u[3] - exact).max() <= 0.02 * 0.2
    assert np.abs(u[1:3]).max() <= 1e-15


# --- refusals --------------------------------------------------------------------------------------------------------------------

LINE, FLAT, DEEP = Grid((8,), (1.0,)), Grid((8, 8), (1.0, 1.0)), Grid((4, 4, 4), (1.0, 1.0, 1.0))
OPEN = Grid((8, 8), (1.0, 1.0), ("outflow", "periodic"))


@pytest.mark.parametrize(("make", "grid", "message"), [
    (lambda: UniformGas(-1.0), FLAT, "density: must be positive and finite, found -1.0"),
    (lambda: UniformGas(velocity=(1.0,)), FLAT, "velocity: found 1 entries for 2 axes"),
    (lambda: UniformGas(velocity=(1.0, float("nan"))), FLAT, "velocity: must be finite"),
    (lambda: LinearWave("alfven"), FLAT, "kind"),
    (lambda: LinearWave(amplitude=2.0), FLAT, "amplitude: must be positive and far below 1"),
    (lambda: LinearWave(axis=2), FLAT, "axis: the box has axes 0 to 1, found 2"),
    (lambda: LinearWave("shear"), LINE, "kind: a shear wave needs two or three dimensions"),
    (lambda: IsentropicVortex(), LINE, "needs two or three dimensions"),
    (lambda: IsentropicVortex(radius=0.0), FLAT, "radius: must be positive and finite"),
    (lambda: IsentropicVortex(strength=12.0), FLAT, "strength: 12.0 leaves no temperature"),
    (lambda: IsentropicVortex(axis=3), DEEP, "axis: the box has axes 0 to 2, found 3"),
    (lambda: Gresho(mach=2.0), FLAT, "mach: 2.0 leaves no pressure"),
    (lambda: Gresho(radius=-1.0), FLAT, "radius: must be positive"),
    (lambda: ShockTube(left=(1.0, 0.0)), LINE, "left: needs a density, a velocity and a pressure"),
    (lambda: ShockTube(right=(1.0, 0.0, -1.0)), LINE, "right: density and pressure must be positive"),
    (lambda: ShockTube(position=1.5), LINE, "position: must lie between 0 and 1"),
    (lambda: ShockTube(axis=1), LINE, "axis: the box has axes 0 to 0, found 1"),
    (lambda: ShuOsher(amplitude=1.0), LINE, "amplitude: must be at least 0 and below 1"),
    (lambda: Blast(edge=-0.1), FLAT, "edge: must be finite and not negative"),
    (lambda: Blast(centre=(0.5,)), FLAT, "centre: found 1 entries for 2 axes"),
    (lambda: KelvinHelmholtz(), LINE, "needs two or three dimensions"),
    (lambda: KelvinHelmholtz(-0.5), FLAT, "density_contrast: must be finite and not negative"),
    (lambda: TaylorGreenGas(), LINE, "needs two or three dimensions"),
    (lambda: TaylorGreenGas(), OPEN, "taylor_green_gas: needs periodic boundaries"),
    (lambda: TaylorGreenGas(mach=3.0), FLAT, "mach: 3.0 leaves no pressure"),
    (lambda: CompressibleTurbulence(), OPEN, "compressible_turbulence: needs periodic boundaries"),
    (lambda: CompressibleTurbulence(), LINE, "solenoidal_share: in one dimension all motion is compressive"),
    (lambda: CompressibleTurbulence(mach=0.0), FLAT, "mach: must be positive and finite"),
    (lambda: CompressibleTurbulence(kinetic_energy=-1.0), FLAT, "kinetic_energy: must be positive and finite"),
    (lambda: CompressibleTurbulence(solenoidal_share=1.5), FLAT, "solenoidal_share: must lie between 0 and 1"),
    (lambda: CompressibleTurbulence(lowest_mode=0.0), FLAT, "lowest_mode: must be positive"),
    (lambda: CompressibleTurbulence(lowest_mode=20.0), FLAT, "highest_mode: must lie between lowest_mode = 20.0 and 64"),
    (lambda: CompressibleTurbulence(lowest_mode=1.1, highest_mode=1.2), FLAT, "highest_mode: no mode of the box lies between"),
    (lambda: CompressibleTurbulence(spectrum="box"), FLAT, "spectrum"),
    (lambda: CompressibleTurbulence(spectrum="exponential", peak_wavenumber=8.0), FLAT, "peak_wavenumber: must be at most a third"),
    (lambda: MixingLayer(), LINE, "needs two or three dimensions"),
    (lambda: MixingLayer(), OPEN, "mixing_layer: needs periodic boundaries along the interface"),
    (lambda: MixingLayer(1.0), FLAT, "contrast: must be above 1"),
    (lambda: MixingLayer(seeds="none"), FLAT, "seeds"),
    (lambda: MixingLayer(seed_speed=-1.0), FLAT, "seed_speed: must be finite and not negative"),
    (lambda: MixingLayer(waves=0), FLAT, "waves: needs a positive whole number"),
    (lambda: MixingLayer(interface=2.0), FLAT, "interface: must lie between 0 and 1"),
])  # fmt: skip
def test_impossible_states_are_refused(make, grid, message):
    with pytest.raises((ValueError, TypeError), match=message):
        jax.eval_shape(lambda key: make()(key, grid, (), np.float32, MONATOMIC), jax.random.key(0))
