"""Initial states: the same field on every grid, solenoidal, with the spectrum that they promise."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flows import BOTH, TWO_PI, cube, divergence, relative, solver_of, square

from hybridsim.grid import Grid, resample
from hybridsim.solvers.initial import RandomVelocity, RandomWaves, TaylorGreen, Uniform

SCALARS = {"dye": 0.1, "heat": 0.2}
LENGTHS = (TWO_PI, 5.0, 4.0)


def _start(initial, solver, dtype=np.float64, seed=0):
    return np.asarray(initial(jax.random.key(seed), solver.grid, tuple(v.at for v in solver.variables), dtype))


def _on(solver, u, shape):
    """Every channel at the cell centres of a grid of `shape`."""
    centre = solver.grid.centre
    moved = [resample(jnp.asarray(q), shape, v.at, centre) for q, v in zip(u, solver.variables, strict=True)]
    return np.stack([np.asarray(q) for q in moved])


STATES = {
    "random_velocity": (RandomVelocity(3.0, 2.0), 36),
    "taylor_green": (TaylorGreen(1.3), 12),
    "uniform": (Uniform((0.4, -0.2, 0.3)), 8),
}


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("dims", [2, pytest.param(3, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", STATES)
def test_the_field_is_the_same_on_every_grid_and_at_every_place(name, dims):
    initial, cells = STATES[name]
    if name == "uniform":
        initial = Uniform(initial.velocity[:dims])
    if name == "random_velocity" and dims == 2:
        cells = 66  # the modes of the lattice reach 30 in 2D, 14 in 3D
    shapes = [(cells,) * dims, (cells + 1, cells + 4, cells + 3)[:dims], (cells + 2, cells, cells + 5)[:dims]]
    found = []
    for kind, shape in zip(("spectral", "spectral", "finite_volume"), shapes, strict=True):
        solver = solver_of(kind, Grid(shape, LENGTHS[:dims]), scalars=SCALARS)
        u = _start(initial, solver)
        assert u.shape == (dims + 2, *shape)
        assert u.dtype == np.float64
        found.append(_on(solver, u, shapes[0]))
    for other in found[1:]:
        assert np.abs(other - found[0]).max() <= 1e-12 * np.abs(found[0]).max()


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("dims", [2, 3])
def test_a_random_velocity_is_solenoidal_fast_as_told_and_random(dims):
    shape = (48, 40, 44)[:dims] if dims == 3 else (96, 80)
    solver = solver_of("spectral", Grid(shape, LENGTHS[:dims]), scalars=SCALARS)
    initial = RandomVelocity(3.0, 2.0)
    u = _start(initial, solver)
    assert divergence(solver, u) <= 1e-13
    speed = np.sqrt((u[:dims] ** 2).sum(axis=0))
    assert speed.max() == pytest.approx(2.0, rel=0.05)
    assert np.abs(u[dims:]).max(axis=tuple(range(1, dims + 1))) == pytest.approx(1.0, rel=0.1)
    assert np.abs(u.mean(axis=tuple(range(1, dims + 1)))).max() <= 1e-14
    assert (u == _start(initial, solver)).all()
    other = _start(initial, solver, seed=1)
    for c in range(dims + 2):
        assert abs(np.corrcoef(u[c].ravel(), other[c].ravel())[0, 1]) < 0.5
    assert abs(np.corrcoef(u[dims].ravel(), u[dims + 1].ravel())[0, 1]) < 0.5
    single = _start(initial, solver, np.float32)
    assert single.dtype == np.float32
    assert divergence(solver, single) <= 1e-5


def _shells(u, grid):
    """E(n) of the sum of channels, n = |k|/k₀ rounded."""
    axes = tuple(range(1, grid.ndim + 1))
    hat = np.fft.rfftn(u, axes=axes) / grid.cells
    weight = np.where(np.arange(grid.shape[-1] // 2 + 1) == 0, 1.0, 2.0)
    density = 0.5 * (np.abs(hat) ** 2).sum(axis=0) * weight
    n = np.rint(np.sqrt(sum(k**2 for k in grid.wavenumbers())) * grid.lengths[0] / TWO_PI).astype(int)
    return np.bincount(n.ravel(), density.ravel())


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(("dims", "peak"), [(2, 6.0), (3, 4.0)])
def test_spectra_peak_where_they_are_told(dims, peak):
    """E(n) ∝ (1/n) exp(−(ln(n/k_p) − ¼)²/(2 · ¼)), velocity and scalar alike, on average over eight members."""
    solver = solver_of("spectral", square(64) if dims == 2 else cube(32), scalars={"dye": 0.1})
    members = [_start(RandomVelocity(peak, 1.0), solver, seed=s) for s in range(8)]
    n = np.arange(1, 13)
    exact = np.exp(-((np.log(n / peak) - 0.25) ** 2) / 0.5) / n
    for part in (slice(0, dims), slice(dims, dims + 1)):
        spectrum = sum(_shells(u[part], solver.grid) / _shells(u[part], solver.grid).sum() for u in members)[1:13]
        ratio = spectrum / exact
        ratio = ratio / np.median(ratio[1:])
        print(dims, part, ratio.round(2))
        assert (np.abs(ratio[2:] - 1) < 0.4).all()
        assert abs(np.argmax(spectrum) + 1 - peak) <= 1


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("kind", BOTH)
@pytest.mark.parametrize("grid", [Grid((12, 15), LENGTHS[:2]), Grid((12, 10, 9), LENGTHS)], ids=lambda g: f"{g.ndim}d")
def test_taylor_green_is_what_it_says_and_solenoidal(grid, kind):
    solver = solver_of(kind, grid, scalars={"dye": 0.1})
    u = _start(TaylorGreen(1.3), solver)
    mesh = [[TWO_PI * q / length for q, length in zip(grid.mesh(v.at), grid.lengths, strict=True)] for v in solver.variables]
    tail = [np.cos(m[2]) if grid.ndim == 3 else 1.0 for m in mesh]
    exact = [
        1.3 * np.sin(mesh[0][0]) * np.cos(mesh[0][1]) * tail[0],
        -1.3 * grid.lengths[1] / grid.lengths[0] * np.cos(mesh[1][0]) * np.sin(mesh[1][1]) * tail[1],
        *([np.zeros(grid.shape)] if grid.ndim == 3 else []),
        np.cos(mesh[-1][0]),
    ]
    assert np.abs(u - np.stack(exact)).max() <= 1e-14
    if kind == "spectral":
        assert divergence(solver, u) <= 1e-14
    else:  # the discrete divergence of the continuous field is of second order
        assert divergence(solver, u) <= 0.1
        assert divergence(solver, np.asarray(solver.prepare(np.float64).project(jnp.asarray(u)))) <= 1e-13
    # the energy of the vortex, exactly: U²/4 in 2D and U²/8 in 3D for equal lengths
    same = solver_of(kind, square(8) if grid.ndim == 2 else cube(8))
    assert 0.5 * np.mean(np.sum(_start(TaylorGreen(), same) ** 2, axis=0)) == pytest.approx(0.25 if grid.ndim == 2 else 0.125)


def test_uniform_states_are_uniform_and_at_rest_by_default():
    for dims in (2, 3):
        solver = solver_of("spectral", Grid((6, 5, 4)[:dims], LENGTHS[:dims]), scalars=SCALARS)
        assert not _start(Uniform(), solver, np.float32).any()
        u = _start(Uniform((1.0, 2.0, 3.0)[:dims]), solver, np.float32)
        assert u.dtype == np.float32
        for c, value in enumerate((*(1.0, 2.0, 3.0)[:dims], 0.0, 0.0)):
            assert (u[c] == value).all()
    # walls do not matter to it
    assert not Uniform()(jax.random.key(0), Grid((4, 4), (1.0, 1.0), ("periodic", "no_slip")), ((0.5, 0.5),) * 2, np.float32).any()


@pytest.mark.usefixtures("x64")
def test_random_waves_are_long_and_the_same_on_every_grid():
    initial = RandomWaves(2.0, 1.0)
    length = 22.0
    wave = lambda n, at=0.5, key=0: np.asarray(  # noqa: E731
        initial(jax.random.key(key), Grid((n,), (length,)), ((at,),), np.float64)
    )
    u = wave(64)
    assert u.shape == (1, 64)
    for n, at in ((33, 0.5), (96, 1.0), (50, 1.0)):
        assert relative(resample(jnp.asarray(wave(n, at)[0]), (64,), (at,), (0.5,)), u[0]) <= 1e-13
    hat = np.abs(np.fft.rfft(u[0])) / 64
    count = int(length / TWO_PI)
    assert hat[0] <= 1e-15
    assert hat[1 : count + 1].min() > 1e-3
    assert hat[count + 1 :].max() <= 1e-15
    squares = [np.mean(wave(16, key=k) ** 2) for k in range(400)]
    error = np.std(squares) / 20
    assert abs(np.mean(squares) - 4.0) <= 4 * error
    assert error < 0.2
    # at least one wave, however short the line
    assert RandomWaves()(jax.random.key(0), Grid((8,), (1.0,)), ((0.5,),), np.float32).any()


LINE, FLAT = Grid((16,), (22.0,)), Grid((8, 8), (1.0, 1.0))
WALLED = Grid((8, 8), (1.0, 1.0), ("periodic", "no_slip"))


@pytest.mark.parametrize(("make", "grid", "message"), [
    (lambda: RandomVelocity(0.0), FLAT, "peak_wavenumber: must be positive and finite"),
    (lambda: RandomVelocity(25.0), FLAT, "peak_wavenumber: must be at most 24"),
    (lambda: RandomVelocity(13.0), Grid((8, 8, 8), LENGTHS), "peak_wavenumber: in 3D at most 12"),
    (lambda: RandomVelocity(max_speed=float("inf")), FLAT, "max_speed: must be positive and finite"),
    (lambda: RandomVelocity(warm_up=-1.0), FLAT, "warm_up: must be finite and not negative"),
    (lambda: RandomVelocity(), LINE, "needs two or three dimensions; use random_waves"),
    (lambda: RandomVelocity(), WALLED, "random_velocity: needs periodic boundaries"),
    (lambda: TaylorGreen(-1.0), FLAT, "speed: must be positive and finite"),
    (lambda: TaylorGreen(), LINE, "needs two or three dimensions"),
    (lambda: TaylorGreen(), WALLED, "taylor_green: needs periodic boundaries"),
    (lambda: Uniform((float("nan"), 0.0)), FLAT, "velocity: must be finite"),
    (lambda: Uniform((1.0,)), FLAT, "velocity: found 1 entries for 2 axes"),
    (lambda: RandomWaves(0.0), LINE, "amplitude: must be positive and finite"),
    (lambda: RandomWaves(), FLAT, "only one-dimensional states"),
    (lambda: RandomWaves(largest_wavenumber=3.0), LINE, "waves need over 20 cells, not 16"),
    (lambda: RandomWaves(warm_up=float("nan")), LINE, "warm_up: must be finite and not negative"),
])  # fmt: skip
def test_impossible_states_are_refused(make, grid, message):
    with pytest.raises(ValueError, match=message):
        make()(jax.random.key(0), grid, (grid.centre,) * grid.ndim, np.float32)
