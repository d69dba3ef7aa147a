"""What a coarse start does not hold is another start's; what it holds stays."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hybridsim.config import experiment_from, read_experiment
from hybridsim.grid import Grid
from hybridsim.predictability import limits, with_other_small_scales
from hybridsim.solvers.incompressible import NavierStokes
from hybridsim.solvers.kuramoto_sivashinsky import KuramotoSivashinsky, SpectralKS
from hybridsim.solvers.spectral import Spectral2D


def test_large_scales_are_kept_and_small_ones_are_the_neighbours(rng, x64):
    solver = Spectral2D(equation=NavierStokes(1e-3), grid=Grid((32, 32), (2 * np.pi, 2 * np.pi))).prepare(np.float64)
    u = jax.vmap(solver.project)(jnp.asarray(rng.normal(size=(3, 2, 32, 32))))
    mixed = with_other_small_scales(u, solver, (12, 12))
    hat, new = (np.fft.fft2(np.asarray(q)) for q in (u, mixed))
    k = np.abs(np.fft.fftfreq(32, 1 / 32))
    kept = (k[:, None] < 6) & (k[None, :] < 6)
    held = (k[:, None] < 16) & (k[None, :] < 16)
    np.testing.assert_allclose(new[..., kept], hat[..., kept], atol=1e-10)
    np.testing.assert_allclose(new[..., held & ~kept], np.roll(hat, -1, axis=0)[..., held & ~kept], atol=1e-10)
    assert float(jnp.abs(jax.vmap(solver.divergence)(mixed)).max()) < 1e-10


def test_one_start_alone_keeps_its_own(rng, x64):
    solver = SpectralKS(equation=KuramotoSivashinsky(), grid=Grid((64,), (22.0,))).prepare(np.float64)
    u = jax.vmap(solver.project)(jnp.asarray(rng.normal(size=(1, 1, 64))))
    low = np.fft.rfft(np.asarray(u))[..., :31]
    np.testing.assert_allclose(np.fft.rfft(np.asarray(with_other_small_scales(u, solver, (16,))))[..., :31], low, atol=1e-10)


@pytest.fixture(scope="module")
def found():
    data, path, shipped = read_experiment("ks_scores.yaml")
    data["runs"] = {f"n{n}": {"solver": "spectral", "shape": [n], "dt": 0.5} for n in (24, 32, 48)}
    data |= {"checks": {}, "compare": {"modes": 11}, "time": {"end": 60, "frames": 60, "statistics_from": 10}}
    data["samples"]["count"] = 3
    data["reference"] |= {"shape": [128], "precision": "float32"}
    data["initial"]["warm_up"] = 100
    experiment = experiment_from(data, path, shipped)
    return limits(experiment, {label: experiment.solver(label) for label in experiment.labels}, [128], 90)


def test_finer_grids_are_predictable_for_longer(found):
    times, series = found
    assert times[-1] == pytest.approx(90)
    assert all(values.shape == (3, 91) for values in series.values())
    for values in series.values():
        np.testing.assert_allclose(values[:, 0], 1, atol=1e-5)
    mean = {label: values.mean(axis=0) for label, values in series.items()}
    # each pair parts in the end on the coarsest grid, and stays together longer on every finer one
    assert mean["n24"][-10:].mean() < 0.9
    assert mean["n24"].sum() < mean["n32"].sum() < mean["n48"].sum()
