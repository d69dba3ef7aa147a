"""Fine runs and their filters, from the cache and anew."""

import os
import shutil
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flows import kolmogorov, solver_of, square

from hybridsim import reference, storage
from hybridsim.config import experiment_from
from hybridsim.experiment import group_name
from hybridsim.grid import Grid
from hybridsim.solvers.compressible import CompressibleNavierStokes
from hybridsim.solvers.incompressible import NavierStokes
from hybridsim.solvers.initial import RandomVelocity
from hybridsim.solvers.kuramoto_sivashinsky import KuramotoSivashinsky, SpectralKS
from hybridsim.solvers.spectral import Spectral2D
from hybridsim.solvers.spectral_gas import CompressibleSpectral
from hybridsim.solvers.steppers import ETDRK4
from hybridsim.training import _recipe_of_data

# --- reference -------------------------------------------------------------------------------------------------------------------


def _frames(initial=RandomVelocity(2.0, 3.0), seed=1, window=0.1, frames=2, **changed):  # noqa: B008
    solver_on = lambda grid: solver_of("spectral", grid, 1e-2, kolmogorov())  # noqa: E731
    targets = {
        "spectral_12x12": solver_of("spectral", square(12), 1e-2),
        "finite_volume_8x8": solver_of("finite_volume", square(8), 1e-2),
        "fine_24x24": solver_of("spectral", square(24), 1e-2),
    }
    options = {"half": "half", "pictures": 2} | changed
    return reference.make_frames(
        {"seed": seed, "initial": repr(initial), "window": window, "frames": frames}, solver_on, ETDRK4(), initial,
        reference.sample_keys(seed, 2), square(24), np.float64, window, frames, targets, **options,
    )  # fmt: skip


@pytest.mark.usefixtures("x64")
def test_frames_are_filtered_cached_and_regenerated_bit_for_bit():
    made = _frames()
    assert not made.cached
    assert {name: a.shape for name, a in made.groups.items()} == {
        "spectral_12x12": (2, 3, 2, 12, 12),
        "finite_volume_8x8": (2, 3, 2, 8, 8),
        "fine_24x24": (2, 3, 2, 24, 24),
        "half": (2, 3, 2, 12, 12),
    }
    np.testing.assert_allclose(made.times, [0, 0.1, 0.2])
    np.testing.assert_allclose(made.picture_times, [0, 0.2])
    assert made.pictures.shape == (2, 2, 24, 24)

    # the staggered frames are free of divergence, the spectral ones are the fine field cut off
    coarse = made.groups["finite_volume_8x8"]
    h = 2 * np.pi / 8
    divergence = sum((coarse[:, :, a] - np.roll(coarse[:, :, a], 1, axis=2 + a)) / h for a in range(2))
    assert np.abs(divergence).max() <= 1e-12
    assert np.abs(np.diff(coarse[:, :, 0], axis=2)).max() > 0.1
    fine = np.fft.fft2(made.groups["fine_24x24"], norm="forward")
    cut = np.fft.fft2(made.groups["spectral_12x12"], norm="forward")
    k = np.arange(-5, 6)
    i, j = np.meshgrid(k, k, indexing="ij")
    shift = np.exp(1j * np.pi * (i + j) * (1 / 12 - 1 / 24))  # cell centres of the two grids differ
    np.testing.assert_allclose(cut[..., i, j], fine[..., i, j] * shift, rtol=0, atol=1e-13)
    assert np.abs(cut[..., 6, :]).max() <= 1e-13
    np.testing.assert_allclose(coarse.mean(axis=(3, 4)), made.groups["fine_24x24"].mean(axis=(3, 4)), rtol=0, atol=1e-13)

    # the run at half the resolution starts from the same states and then leaves them
    same, other = made.groups["half"][:, 0], made.groups["half"][:, 2]
    np.testing.assert_allclose(same, made.groups["spectral_12x12"][:, 0], rtol=0, atol=1e-12)
    assert 1e-8 < np.abs(other - made.groups["spectral_12x12"][:, 2]).max() < 0.5

    again = _frames()
    assert again.cached
    for path in storage.cache_folder().rglob("*.safetensors"):
        path.unlink()
    anew = _frames()
    assert not anew.cached
    for other in (again, anew):
        assert set(other.groups) == set(made.groups)
        for name, array in made.groups.items():
            np.testing.assert_array_equal(other.groups[name], array)
        np.testing.assert_array_equal(other.pictures, made.pictures)
        assert other.dt == made.dt


@pytest.mark.slow
@pytest.mark.usefixtures("x64")
def test_warmed_up_frames_are_regenerated_bit_for_bit(monkeypatch, tmp_path):
    initial = RandomVelocity(2.0, 3.0, warm_up=0.2, warm_up_shape=(16, 16))
    made = _frames(initial)
    monkeypatch.setenv("HYBRIDSIM_CACHE", str(tmp_path / "another"))
    anew = _frames(initial)
    assert not anew.cached
    for name, array in made.groups.items():
        np.testing.assert_array_equal(anew.groups[name], array)
    cold, other = _frames(half=None), _frames(initial, seed=2, half=None)
    for frames in (cold, other):  # the warm-up and the seed decide the flow
        assert np.abs(frames.groups["spectral_12x12"] - made.groups["spectral_12x12"]).max() > 0.1


def test_a_fine_run_that_blows_up_says_when():
    solver = solver_of("spectral", square(8), 0.0)
    u = jnp.full((1, 2, 8, 8), jnp.nan)
    with pytest.raises(reference.FineRunError, match="blew up before t = 0"):
        reference.fine_run(solver, ETDRK4(), u, 0.1, 1, lambda _f, _u: None)


@pytest.mark.usefixtures("x64")
def test_starts_are_kept_for_other_windows(monkeypatch):
    made = []
    real = reference.warm_starts
    monkeypatch.setattr(reference, "warm_starts", lambda *a: made.append(a) or real(*a))
    initial = RandomVelocity(2.0, 1.0, warm_up=0.2)
    first = _frames(initial, starts={"a": 1}, half=None)
    second = _frames(initial, starts={"a": 1}, half=None, window=0.05)  # another recipe in all but the starts
    assert len(made) == 1
    assert not second.cached
    third = _frames(RandomVelocity(2.0, 1.0, warm_up=0.3), starts={"a": 2}, half=None)
    assert len(made) == 2
    np.testing.assert_array_equal(first.groups["fine_24x24"][:, 0], second.groups["fine_24x24"][:, 0])
    assert not np.array_equal(first.groups["fine_24x24"][:, 0], third.groups["fine_24x24"][:, 0])


@pytest.mark.parametrize("kind", [SpectralKS, Spectral2D, CompressibleSpectral])
def test_runs_share_a_reference_only_if_they_filter_alike(kind, x64, rng):
    """An option that changes the filter is part of the name under which reference frames are kept."""
    dims = 1 if kind is SpectralKS else 2
    equation = {
        SpectralKS: KuramotoSivashinsky(),
        Spectral2D: NavierStokes(1e-3),
        CompressibleSpectral: CompressibleNavierStokes(),
    }[kind]
    fine, coarse = (Grid((n,) * dims, (1.0,) * dims) for n in (48, 24))
    solvers = [kind(coarse, equation, dealias=option) for option in ("hou_li", "two_thirds", "none")]
    u = jnp.asarray(1 + 0.1 * rng.standard_normal((len(solvers[0].variables), *fine.shape)))
    known: dict[str, np.ndarray] = {}
    for solver in solvers:
        found = np.asarray(solver.prepare(u.dtype).restrict(u, fine, solvers[0].variables))
        np.testing.assert_array_equal(known.setdefault(solver.filter_option, found), found)
    different = list(known.values())
    assert all((a != b).any() for i, a in enumerate(different) for b in different[:i])


def test_a_group_is_named_by_solver_option_and_grid(tmp_path):
    run = {"solver": "spectral", "shape": [32], "dt": 0.1}
    data = {
        "equation": {"use": "kuramoto_sivashinsky"},
        "domain": {"lengths": [22.0]},
        "initial": {"use": "random_waves"},
        "time": {"end": 1.0, "frames": 2},
        "reference": {"solver": "spectral", "shape": [64]},
        "runs": {"one": run, "cut": {**run, "solver": {"use": "spectral", "dealias": "two_thirds"}}},
    }
    made = experiment_from(data, tmp_path / "case.yaml")
    assert [group_name(made, label) for label in ("one", "cut")] == ["spectral_32", "spectral_two_thirds_32"]


def test_training_data_are_kept_apart_too(tmp_path):
    keys = []
    for option in ("hou_li", "two_thirds", "hou_li"):
        closure = {"use": "learned_flux", "width": 4}
        run = {"solver": {"use": "spectral", "dealias": option}, "shape": [32], "dt": 0.1, "corrections": [closure]}
        data = {
            "equation": {"use": "kuramoto_sivashinsky"},
            "domain": {"lengths": [22.0]},
            "initial": {"use": "random_waves"},
            "time": {"end": 1.0, "frames": 2},
            "reference": {"solver": "spectral", "shape": [64]},
            "runs": {"one": run},
            "train": {"run": "one", "data": {"interval": 0.1}, "unroll": [1], "updates": [1]},
        }
        keys.append(_recipe_of_data(experiment_from(data, tmp_path / "case.yaml"), "training"))
    assert keys[0] == keys[2] != keys[1]


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("order", [(np.float32, np.float64), (np.float64, np.float32)])
def test_frames_kept_in_another_precision_are_others(order):
    for dtype in order:
        found = _frames(half=None, store_as=dtype)
        assert not found.cached
        assert found.groups["fine_24x24"].dtype == dtype
    assert _frames(half=None, store_as=order[0]).groups["fine_24x24"].dtype == order[0]


class Killed(BaseException):
    pass


@pytest.mark.reliability("R5")
@pytest.mark.usefixtures("x64")
def test_a_fine_run_that_was_stopped_goes_on_bit_for_bit(monkeypatch, tmp_path):
    initial = RandomVelocity(2.0, 1.0, warm_up=2.0, warm_up_shape=(16, 16))
    how = {"starts": {"a": 1}, "frames": 3}
    whole = _frames(initial, **how)
    monkeypatch.setenv("HYBRIDSIM_CACHE", str(tmp_path / "another"))
    said: list[list[tuple[str, float]]] = []

    def stop_after(count):
        said.append([])

        def progress(what, fraction):
            said[-1].append((what, fraction))
            if len(said[-1]) == count:
                raise Killed

        return progress

    # stopped in the coarse warm-up, in the fine one, in the run itself, in that at half the resolution
    for count in (1, 2, 3, 3):
        with pytest.raises(Killed):
            _frames(initial, **how, progress=stop_after(count))
    last = [steps[-1][0] for steps in said]
    assert last[0] == "warm-up"
    assert last[-2:] == ["reference", "reference: half resolution"]
    assert [steps[0][1] for steps in said] == sorted(steps[0][1] for steps in said)  # each goes on where the one before was
    resumed = _frames(initial, **how)
    assert not resumed.cached
    for name, array in whole.groups.items():
        np.testing.assert_array_equal(resumed.groups[name], array)
    np.testing.assert_array_equal(resumed.pictures, whole.pictures)
    assert resumed.dt == whole.dt
    assert not list((tmp_path / "another" / "unfinished").iterdir())


@pytest.mark.usefixtures("x64")
def test_damage_and_a_full_disk_cost_a_fine_run_time_only(monkeypatch):
    whole = _frames(half=None)
    for path in storage.cache_folder().rglob("*.safetensors"):
        path.unlink()

    def stop(what, fraction):
        if what == "reference" and fraction > 0.3:
            raise Killed

    with pytest.raises(Killed):
        _frames(half=None, progress=stop)
    (frames,) = (storage.cache_folder() / "unfinished").rglob("frames-*.safetensors")
    frames.write_bytes(frames.read_bytes()[:-1])
    with pytest.warns(storage.StorageWarning, match="making it anew"):
        again = _frames(half=None)
    np.testing.assert_array_equal(again.groups["fine_24x24"], whole.groups["fine_24x24"])
    monkeypatch.setattr(storage.os, "fsync", lambda *_: (_ for _ in ()).throw(OSError(28, "full")))
    with pytest.warns(storage.StorageWarning, match="going on without saving"), pytest.raises(Killed):
        _frames(half=None, seed=5, progress=stop)


@pytest.mark.usefixtures("x64")
def test_a_cache_that_goes_away_costs_a_fine_run_nothing():
    def remove(what, fraction):
        shutil.rmtree(storage.cache_folder(), ignore_errors=True)

    _frames(half=None, progress=remove)


@pytest.mark.usefixtures("x64")
def test_what_nobody_has_asked_for_in_a_month_is_forgotten():
    place = storage.cache_folder() / "unfinished"
    for name, age in (("b", 31), ("c", 1)):
        file = place / (64 * name) / "fine" / "frames"
        file.parent.mkdir(parents=True)
        file.write_bytes(b"")
        os.utime(file, (time.time() - 86400 * age,) * 2)
    with reference.Unfinished(64 * "a"):
        assert sorted(path.name[0] for path in place.iterdir()) == ["a", "c"]


@pytest.mark.usefixtures("x64")
def test_two_processes_may_make_the_same_reference():
    with reference.Unfinished(64 * "a") as mine:
        late = reference.Unfinished(64 * "a")
        with pytest.warns(storage.StorageWarning, match="in use by process .* is not kept"):
            late.__enter__()
        assert late.journal("fine").folder is None
        late.clear()
        late.__exit__(None, None, None)
        assert mine.journal("fine").folder is not None
    assert not (storage.cache_folder() / "unfinished" / (64 * "a")).exists()


def test_samples_have_their_own_keys():
    keys = [jax.random.key_data(k).tolist() for seed in (0, 1) for k in reference.sample_keys(seed, 3)]
    assert len({tuple(k) for k in keys}) == 6
    assert [jax.random.key_data(k).tolist() for k in reference.sample_keys(0, 2)] == keys[:2]
