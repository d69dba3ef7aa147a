"""Fine runs and their filters, from the cache and anew; training: loss, exact resume, batches, updates that are not finite."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flows import kolmogorov, learned, solver_of, square

from hybridsim import reference, storage
from hybridsim.corrections.eddy import Leith
from hybridsim.model import Model, State, rollout
from hybridsim.solvers.initial import RandomVelocity
from hybridsim.solvers.steppers import ETDRK4
from hybridsim.storage import Checkpoints
from hybridsim.train import Recipe, TrainingDiverged, batches, relative_error, spectral_weight, train

# --- reference -------------------------------------------------------------------------------------------------------------------


def _frames(initial=RandomVelocity(2.0, 3.0), seed=1, window=0.1, **changed):  # noqa: B008
    solver_on = lambda grid: solver_of("spectral", grid, 1e-2, kolmogorov())  # noqa: E731
    targets = {
        "spectral_12x12": solver_of("spectral", square(12), 1e-2),
        "finite_volume_8x8": solver_of("finite_volume", square(8), 1e-2),
        "fine_24x24": solver_of("spectral", square(24), 1e-2),
    }
    options = {"half": "half", "pictures": 2} | changed
    return reference.make_frames(
        {"seed": seed, "initial": repr(initial), "window": window}, solver_on, ETDRK4(), initial,
        reference.sample_keys(seed, 2), square(24), np.float64, window, 2, targets, **options,
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


def test_samples_have_their_own_keys():
    keys = [jax.random.key_data(k).tolist() for seed in (0, 1) for k in reference.sample_keys(seed, 3)]
    assert len({tuple(k) for k in keys}) == 6
    assert [jax.random.key_data(k).tolist() for k in reference.sample_keys(0, 2)] == keys[:2]


# --- loss and batches ------------------------------------------------------------------------------------------------------------


def test_the_loss_is_a_relative_error():
    grid = square(12)
    rng = np.random.default_rng(0)
    truth = jnp.asarray(rng.standard_normal((3, 2, 12, 12)), jnp.float32)
    for power in (0.0, 1.0):
        weight = jnp.asarray(spectral_weight(grid, power), jnp.float32)
        np.testing.assert_allclose(relative_error(1.5 * truth, truth, weight), 0.25, rtol=1e-5)
        np.testing.assert_allclose(relative_error(truth, truth, weight), 0, atol=1e-12)
    flat = jnp.asarray(spectral_weight(grid, 0.0), jnp.float32)
    other = jnp.asarray(rng.standard_normal((3, 2, 12, 12)), jnp.float32)
    free = lambda q: np.asarray(q) - np.asarray(q).mean(axis=(2, 3), keepdims=True)  # noqa: E731
    expected = (free(other - truth) ** 2).sum(axis=(1, 2, 3)) / (free(truth) ** 2).sum(axis=(1, 2, 3))
    np.testing.assert_allclose(relative_error(other, truth, flat), expected, rtol=1e-5)


def test_batches_depend_on_seed_and_update_only():
    data = np.random.default_rng(0).standard_normal((3, 20, 1, 2, 2))
    first = batches(data, 4, 8, 1, 7)
    assert first.shape == (8, 5, 1, 2, 2)
    np.random.default_rng(5).standard_normal(100)
    np.testing.assert_array_equal(batches(data, 4, 8, 1, 7), first)
    for seed, update in ((2, 7), (1, 8)):
        assert (batches(data, 4, 8, seed, update) != first).any()
    flat = {tuple(w.ravel()) for w in np.stack([data[i, s : s + 5] for i in range(3) for s in range(16)])}
    drawn = [tuple(w.ravel()) for update in range(30) for w in batches(data, 4, 8, 0, update)]
    assert set(drawn) <= flat
    assert len(set(drawn)) > 0.8 * len(flat)  # every window is in reach, the last ones too


def test_phases_grow():
    recipe = Recipe((1, 2, 4), (3, 2, 1))
    assert [recipe.phase(i) for i in range(7)] == [1, 1, 1, 2, 2, 4, 4]
    assert recipe.total == 6


# --- training --------------------------------------------------------------------------------------------------------------------

TINY = Recipe((2,), (6,), batch=2, rate=1e-2, validate_every=3)


def _problem():
    """Trajectories of a flow with an eddy viscosity, and a model that has to learn it."""
    solver = solver_of("spectral", square(16), 5e-3, kolmogorov())
    truth = Model(solver, ETDRK4(), 0.05, (Leith(0.3),))
    run = jax.jit(lambda u: jnp.concatenate([u[None], rollout(truth, State(u), 8).u]))
    keys = reference.sample_keys(0, 3)
    starts = [RandomVelocity(4.0, 1.0)(k, solver.grid, (solver.grid.centre,) * 2, np.float32) for k in keys]
    data = np.stack([np.asarray(run(u)) for u in starts])
    return Model(solver, ETDRK4(), 0.05, (learned(0, width=4, depth=1, inputs="gradient", kernel=3),)), data


def _train(model, data, recipe=TINY, **options):
    return train(model, data[:2], data[2:], 0.05, 1, recipe, seed=3, modes=5, **options)


class Stopped(Exception):
    pass


def test_loss_falls_and_an_interrupted_training_resumes_bit_for_bit(tmp_path):
    model, data = _problem()
    seen = []
    whole = _train(model, data, report=seen.append)
    assert [r["update"] for r in seen] == list(range(1, 7))
    assert [r["update"] for r in whole.history if "validation" in r] == [3, 6]
    assert whole.history[-1]["loss"] < whole.history[0]["loss"]
    assert whole.best_update in (3, 6)

    checkpoints = Checkpoints(tmp_path / "checkpoints")

    def stop(record):
        if record["update"] == 5:
            raise Stopped

    with pytest.raises(Stopped):
        _train(model, data, checkpoints=checkpoints, report=stop)
    assert checkpoints.steps() == [3, 5]
    resumed_at = []
    rest = _train(model, data, checkpoints=checkpoints, resume=True, report=lambda r: resumed_at.append(r["update"]))
    assert resumed_at == [6]
    assert [r["loss"] for r in rest.history] == [r["loss"] for r in whole.history]
    assert (rest.best_update, rest.best_score) == (whole.best_update, whole.best_score)
    pairs = list(zip(jax.tree.leaves(rest.model.closures), jax.tree.leaves(whole.model.closures), strict=True))
    for a, b in pairs:
        np.testing.assert_array_equal(a, b)
    start = jax.tree.leaves(model.closures)
    assert any((np.asarray(a) != np.asarray(b)).any() for a, b in zip(start, jax.tree.leaves(whole.model.closures), strict=True))


def test_updates_that_are_not_finite_are_skipped_counted_and_bounded():
    model, data = _problem()
    data[0] = np.nan  # windows of the first trajectory are unusable
    recipe = dataclasses.replace(TINY, batch=1, validate_every=100)
    bad = [bool(np.isnan(batches(data[:2], 2, 1, 3, i)).any()) for i in range(recipe.total)]
    assert 0 < sum(bad) < recipe.total
    outcome = _train(model, data, recipe)
    assert [r["loss"] is None for r in outcome.history] == bad
    assert outcome.skipped == sum(bad)
    assert all(np.isfinite(a).all() for a in jax.tree.leaves(outcome.model.closures))
    data[1] = np.nan
    with pytest.raises(TrainingDiverged, match="3 updates in a row were not finite"):
        _train(model, data, dataclasses.replace(recipe, patience=2))
