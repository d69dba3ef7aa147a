"""Grids: places, wavenumbers, block means and Fourier resampling, against closed forms."""

import jax.numpy as jnp
import numpy as np
import pytest
from flows import TWO_PI

from hybridsim.grid import Grid, cell_mean, face_mean, resample

pytestmark = pytest.mark.usefixtures("x64")


@pytest.mark.parametrize(("shape", "lengths", "boundaries", "words"), [
    ((1, 8), (1.0, 1.0), (), "at least 2 cells"),
    ((8, 8), (1.0,), (), "one entry per axis"),
    ((8, 8), (1.0, -1.0), (), "positive and finite"),
    ((8, 8), (1.0, float("nan")), (), "positive and finite"),
    ((8, 8, 8, 8), (1.0,) * 4, (), "one to three axes"),
    ((8, 8), (1.0, 1.0), ("periodic", "wall"), "'wall' is not offered; possible: periodic"),
    ((8, 8), (1.0, 1.0), ("periodic", ("no_slip", "wall")), "'wall' is not offered; possible: periodic"),
    ((8, 8), (1.0, 1.0), ("periodic",), "one entry per axis"),
    ((8, 8), (1.0, 1.0), (("periodic", "no_slip"), "periodic"), "an axis is periodic on both or on neither"),
    ((8, 8), (1.0, 1.0), (("no_slip", "periodic"), "periodic"), "an axis is periodic on both or on neither"),
    ((8, 8), (1.0, 1.0), (("no_slip",), "periodic"), "an axis has two sides"),
    ((8, 8), (1.0, 1.0), (("no_slip",) * 3, "periodic"), "an axis has two sides"),
])  # fmt: skip
def test_impossible_grids_are_refused(shape, lengths, boundaries, words):
    with pytest.raises(ValueError, match=words):
        Grid(shape, lengths, boundaries)


def test_coordinates_and_measures():
    grid = Grid((4, 5), (8.0, 5.0))
    assert grid.spacing == (2.0, 1.0)
    assert (grid.cells, grid.cell_volume, grid.ndim) == (20, 2.0, 2)
    x, y = grid.coordinates()
    np.testing.assert_array_equal(x, [1, 3, 5, 7])
    np.testing.assert_array_equal(y, [0.5, 1.5, 2.5, 3.5, 4.5])
    np.testing.assert_array_equal(grid.coordinates((1.0, 0.5))[0], [2, 4, 6, 8])
    assert grid.mesh()[0].shape == (4, 5)
    assert grid.boundaries == (("periodic", "periodic"),) * 2


def test_boundaries_are_pairs_and_one_word_stands_for_both_sides():
    grid = Grid((4, 5, 6), (1.0, 2.0, 3.0), ("periodic", "no_slip", ("fixed", "outflow")))
    assert grid.boundaries == (("periodic", "periodic"), ("no_slip", "no_slip"), ("fixed", "outflow"))
    assert grid.periodic == (True, False, False)
    other = grid.with_shape((8, 5, 3))
    assert (other.shape, other.lengths, other.boundaries) == ((8, 5, 3), grid.lengths, grid.boundaries)
    assert Grid((4, 5), (1.0, 2.0), (["no_slip", "free_slip"], "periodic")).boundaries[0] == ("no_slip", "free_slip")
    assert Grid((4,), (1.0,)) == Grid((4,), (1.0,), ("periodic",)) != Grid((4,), (1.0,), ("no_slip",))
    assert hash(Grid((4,), (1.0,))) == hash(Grid((4,), (1.0,), (("periodic", "periodic"),)))


def test_flux_places_fold_into_the_cell():
    grid = Grid((4, 4), (1.0, 1.0))
    assert grid.flux_place((1.0, 0.5), 0) == (0.5, 0.5)
    assert grid.flux_place((1.0, 0.5), 1) == (1.0, 1.0)
    assert grid.flux_place((0.5, 0.5), 1) == (0.5, 1.0)


@pytest.mark.parametrize("shape", [(8,), (7,), (6, 8), (5, 9), (4, 5, 6)], ids=str)
def test_wavenumbers_differentiate_every_resolved_mode(shape):
    lengths = (TWO_PI, 3.0, 1.5)[: len(shape)]
    grid = Grid(shape, lengths)
    axes = grid.mesh()
    rng = np.random.default_rng(0)
    phase = sum(
        2 * np.pi * int(rng.integers(-((n - 1) // 2), (n - 1) // 2 + 1)) * x / length
        for n, length, x in zip(shape, lengths, axes, strict=True)
    )
    field = np.cos(phase + 0.4)
    for axis, k in enumerate(grid.wavenumbers()):
        slope = np.fft.irfftn(1j * k * np.fft.rfftn(field), s=shape, axes=range(len(shape)))
        h = 1e-6
        moved = [list(axes) for _ in range(2)]
        moved[0][axis] = axes[axis] + h
        moved[1][axis] = axes[axis] - h
        rng = np.random.default_rng(0)
        modes = [int(rng.integers(-((n - 1) // 2), (n - 1) // 2 + 1)) for n in shape]
        value = [
            np.cos(sum(2 * np.pi * m * x / length for m, length, x in zip(modes, lengths, at, strict=True)) + 0.4) for at in moved
        ]
        np.testing.assert_allclose(slope, (value[0] - value[1]) / (2 * h), rtol=0, atol=1e-7)
    assert (grid.wavenumbers()[-1] >= 0).all()


def test_cell_means_keep_the_sum_and_refuse_bad_blocks():
    u = np.random.default_rng(0).standard_normal((3, 12, 8))
    mean = np.asarray(cell_mean(jnp.asarray(u), (3, 2)))
    np.testing.assert_allclose(mean[1, 0, 0], u[1, :3, :2].mean(), rtol=1e-14)
    np.testing.assert_allclose(mean.sum(axis=(1, 2)) * 6, u.sum(axis=(1, 2)), rtol=1e-13)
    with pytest.raises(ValueError, match="cannot average 12 cells in blocks of 5"):
        cell_mean(jnp.asarray(u), (5, 2))


def _divergence(u, spacing):
    return sum((q - np.roll(q, 1, axis=a)) / h for a, (q, h) in enumerate(zip(u, spacing, strict=True)))


@pytest.mark.parametrize(("shape", "factors"), [((12, 8), (3, 2)), ((8, 6, 4), (2, 3, 1))], ids=str)
def test_divergence_of_face_means_is_the_cell_mean_of_the_divergence(shape, factors):
    rng = np.random.default_rng(1)
    fine = np.array([0.1, 0.3, 0.2][: len(shape)])
    u = rng.standard_normal((len(shape), *shape))
    coarse = [np.asarray(face_mean(jnp.asarray(q), factors, a)) for a, q in enumerate(u)]
    expected = np.asarray(cell_mean(jnp.asarray(_divergence(u, fine)), factors))
    np.testing.assert_allclose(_divergence(coarse, fine * factors), expected, rtol=0, atol=1e-12)
    means = [np.asarray(cell_mean(jnp.asarray(q), factors)) for q in u]
    assert np.abs(_divergence(means, fine * factors) - expected).max() > 0.1  # negative control: cell means do not


def _modes(shape, lengths, at, limit, seed=0, average=(False, False)):
    """A real trigonometric polynomial of modes ≤ limit, as point values or cell means per axis, from its formula."""
    rng = np.random.default_rng(seed)
    grid = Grid(shape, lengths)
    axes = grid.mesh(at)
    out = np.zeros(shape)
    for m in range(-limit, limit + 1):
        for n in range(-limit, limit + 1):
            a, phase = rng.standard_normal(), rng.uniform(0, 6)
            k = (TWO_PI * m / lengths[0], TWO_PI * n / lengths[1])
            factor = np.prod(
                [np.sinc(q * h / TWO_PI) if mean else 1.0 for q, h, mean in zip(k, grid.spacing, average, strict=True)]
            )
            out += a * factor * np.cos(k[0] * axes[0] + k[1] * axes[1] + phase)
    return out


BOX = (TWO_PI, 3.0)


@pytest.mark.parametrize(
    ("old", "new"), [((16, 15), (24, 20)), ((16, 15), (16, 15)), ((24, 21), (10, 9)), ((12, 16), (32, 9))], ids=str
)
@pytest.mark.parametrize(
    ("source", "target"), [((0.5, 0.5), (0.5, 0.5)), ((0.5, 0.5), (1.0, 0.5)), ((1.0, 0.5), (0.5, 1.0))], ids=str
)
def test_resample_is_exact_for_resolved_modes(old, new, source, target):
    u = _modes(old, BOX, source, 4)
    found = np.asarray(resample(jnp.asarray(u)[None], new, source, target))[0]
    np.testing.assert_allclose(found, _modes(new, BOX, target, 4), rtol=0, atol=1e-12)


@pytest.mark.parametrize("new", [(8, 6), (7, 5), (16, 15), (20, 18)], ids=str)
@pytest.mark.parametrize("average", [(True, False), (False, True), (True, True)], ids=str)
def test_resample_gives_exact_means_over_cells_and_faces(new, average):
    u = _modes((16, 15), BOX, (0.5, 0.5), 6)
    target = tuple(0.5 if mean else 1.0 for mean in average)
    found = np.asarray(resample(jnp.asarray(u), new, (0.5, 0.5), target, average, alias=True))
    np.testing.assert_allclose(found, _modes(new, BOX, target, 6, average=average), rtol=0, atol=1e-12)


def test_resample_cuts_what_the_new_grid_cannot_carry():
    u = _modes((24, 24), (TWO_PI, TWO_PI), (0.5, 0.5), 8)
    cut = np.asarray(resample(jnp.asarray(u), (12, 12), (0.5, 0.5), (0.5, 0.5)))
    spectrum = np.abs(np.fft.fft2(cut))
    assert spectrum[6].max() < 1e-10  # the coarse Nyquist modes are empty
    assert spectrum[:, 6].max() < 1e-10
    again = resample(resample(jnp.asarray(cut), (24, 24), (0.5, 0.5), (0.5, 0.5)), (12, 12), (0.5, 0.5), (0.5, 0.5))
    np.testing.assert_allclose(again, cut, rtol=0, atol=1e-12)
    aliased = np.asarray(resample(jnp.asarray(u), (12, 12), (0.5, 0.5), (0.5, 0.5), alias=True))
    assert np.abs(aliased - cut).max() > 0.1
    np.testing.assert_allclose(aliased, _modes((12, 12), (TWO_PI, TWO_PI), (0.5, 0.5), 8), rtol=0, atol=1e-12)


def test_resample_keeps_the_precision():
    u = jnp.ones((8, 8), jnp.float32)
    assert resample(u, (4, 4), (0.5, 0.5), (0.5, 1.0)).dtype == np.float32
