"""Training: losses, windows, exact resume, what is not finite, several references, devices, constants."""

import dataclasses
import json
import os
import re
import subprocess
import sys
import textwrap
from pathlib import Path

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import yaml
from compressible_flows import gas
from flows import kolmogorov, learned, random_flow, solver_of, square
from test_compressible import rough_flow

from hybridsim import losses, reference, storage, windows
from hybridsim import train as training_loop
from hybridsim.config import experiment_from
from hybridsim.contract import with_constants
from hybridsim.corrections.eddy import Hyperviscosity, Leith, Smagorinsky
from hybridsim.corrections.learned import LearnedFlux
from hybridsim.gas import Gas, phase_distance, phases, primitive, temperature_bins
from hybridsim.grid import Grid
from hybridsim.model import Model, State, rollout
from hybridsim.solvers.cooling import PowerLawCooling
from hybridsim.solvers.initial import RandomVelocity
from hybridsim.solvers.kuramoto_sivashinsky import KuramotoSivashinsky, SpectralKS
from hybridsim.solvers.steppers import ETDRK4, ForwardEuler
from hybridsim.storage import Checkpoints, CorruptError, StorageError
from hybridsim.train import Recipe, Task, TrainingDiverged, correlation_scores, gradient_of, parameters, score_of, train
from hybridsim.training import model_to_train, recipe_of
from hybridsim.training_log import JsonLines

# --- windows ---------------------------------------------------------------------------------------------------------------------


def test_windows_depend_on_seed_and_update_only():
    data = windows.InMemory(np.random.default_rng(0).standard_normal((3, 20, 1, 2, 2)))
    first = windows.batch(data, 4, 8, 1, 7)
    assert first.shape == (8, 5, 1, 2, 2)
    np.random.default_rng(5).standard_normal(100)
    np.testing.assert_array_equal(windows.batch(data, 4, 8, 1, 7), first)
    for other in ((2, 7), (1, 8), (1, 7, 1)):
        assert (windows.batch(data, 4, 8, *other) != first).any()
    flat = {tuple(w.ravel()) for w in np.stack([data.data[i, s : s + 5] for i in range(3) for s in range(16)])}
    drawn = [tuple(w.ravel()) for update in range(30) for w in windows.batch(data, 4, 8, 0, update)]
    assert set(drawn) <= flat
    assert len(set(drawn)) > 0.8 * len(flat)  # every window is in reach, the last ones too


def test_zarr_windows_are_those_of_memory_and_a_stopped_writing_goes_on(tmp_path, monkeypatch):
    monkeypatch.setattr(windows, "CHUNK_BYTES", 2 * 4 * 8 * 8 * 4)  # four frames, so that windows cross chunks
    data = np.random.default_rng(0).standard_normal((5, 23, 2, 8, 8)).astype(np.float32)
    made = []

    def pieces(stop=False):
        for first in (0, 2, 4):

            def make(first=first):
                if stop and first == 4:
                    raise KeyboardInterrupt
                made.append(first)
                return data[first : first + 2]

            yield first, make

    folder = tmp_path / "data.zarr"
    with pytest.raises(KeyboardInterrupt):
        windows.write_zarr(folder, data.shape, data.dtype, pieces(stop=True))
    assert not folder.exists()
    with storage.FolderLock(folder.with_suffix(".making")), pytest.raises(storage.LockedError, match="in use by process"):
        windows.write_zarr(folder, data.shape, data.dtype, pieces())
    read = windows.write_zarr(folder, data.shape, data.dtype, pieces())
    assert made == [0, 2, 4]
    assert list(tmp_path.iterdir()) == [folder]
    again = windows.write_zarr(folder, data.shape, data.dtype, pieces())
    assert made == [0, 2, 4]
    memory = windows.InMemory(data)
    for update in range(5):
        expected = windows.batch(memory, 9, 4, 0, update)
        np.testing.assert_array_equal(windows.batch(read, 9, 4, 0, update), expected)
        np.testing.assert_array_equal(windows.batch(again, 9, 4, 0, update), expected)
    assert windows.digest_of(read) == windows.digest_of(memory)

    chunk = next(p for p in sorted(folder.rglob("*")) if p.is_file() and p.suffix != ".json")
    damaged = bytearray(chunk.read_bytes())
    damaged[len(damaged) // 2] ^= 1
    chunk.write_bytes(damaged)
    with pytest.raises(CorruptError, match="damaged"):
        windows.batch(windows.Zarr(folder), 9, 40, 0, 0)


def test_windows_are_fetched_ahead_in_order():
    made = []
    with windows.Prefetch(lambda n: made.append(n) or 10 * n, 6) as fetched:
        assert [fetched(n) for n in range(6)] == [0, 10, 20, 30, 40, 50]
    assert made == list(range(6))
    with windows.Prefetch(lambda n: 1 // (n - 1), 3) as fetched:
        assert fetched(0) == -1
        with pytest.raises(ZeroDivisionError):
            fetched(1)


# --- losses ----------------------------------------------------------------------------------------------------------------------


def test_the_loss_is_a_relative_error():
    grid = square(12)
    rng = np.random.default_rng(0)
    truth = jnp.asarray(rng.standard_normal((3, 2, 12, 12)), jnp.float32)
    for power in (0.0, 1.0):
        weight = jnp.asarray(losses.spectral_weight(grid, power), jnp.float32)
        np.testing.assert_allclose(losses.relative_error(1.5 * truth, truth, weight), 0.25, rtol=1e-5)
        np.testing.assert_allclose(losses.relative_error(truth, truth, weight), 0, atol=1e-12)
    flat = jnp.asarray(losses.spectral_weight(grid, 0.0), jnp.float32)
    other = jnp.asarray(rng.standard_normal((3, 2, 12, 12)), jnp.float32)
    free = lambda q: np.asarray(q) - np.asarray(q).mean(axis=(2, 3), keepdims=True)  # noqa: E731
    expected = (free(other - truth) ** 2).sum(axis=(1, 2, 3)) / (free(truth) ** 2).sum(axis=(1, 2, 3))
    np.testing.assert_allclose(losses.relative_error(other, truth, flat), expected, rtol=1e-5)


def _context(solver, u, bare=lambda u: u):
    return losses.context_of(solver.prepare(u.dtype), 0.5, u.dtype, bare)


def test_statistical_terms_are_those_of_the_statistics_module():
    from hybridsim import diagnostics

    solver = solver_of("spectral", square(16), 1e-2)
    rng = np.random.default_rng(1)
    u, truth = (jnp.stack([solver.project(jnp.asarray(q, jnp.float32)) for q in rng.standard_normal((3, 2, 16, 16))]) for _ in "ab")
    context = _context(solver, u)
    energies = [diagnostics.shell_spectrum(np.asarray(q), solver.grid)[1].mean(axis=0)[1:6] for q in (u, truth)]
    expected = np.mean(np.log(energies[0] / energies[1]) ** 2)
    np.testing.assert_allclose(losses.spectrum(context, u, truth, u[0]), expected, rtol=1e-4)
    # of one Fourier mode v = (0, cos 3x): ⟨|∇v|²⟩ = 9/2
    x = solver.grid.mesh()[0]
    mode = jnp.asarray(np.stack([0 * x, np.cos(3 * x)]) + 0 * solver.grid.mesh()[1], jnp.float32)[None]
    ratio = np.log(9 * 4 / 1) ** 2
    slow = jnp.asarray(np.stack([0 * x, np.cos(x)]) + 0 * solver.grid.mesh()[1], jnp.float32)[None]
    np.testing.assert_allclose(losses.dissipation(context, 2 * mode, slow, slow[0]), ratio, rtol=1e-4)
    # a shear flow carries no energy to other scales; the true flux of another flow is missed as a whole
    np.testing.assert_allclose(losses.transfer(context, jnp.concatenate([mode] * 3), truth, mode[0]), 1, rtol=1e-5)


def test_the_energy_flux_is_that_of_the_statistics_module():
    from hybridsim import statistics

    solver = solver_of("spectral", square(16), 1e-2)
    u, truth = (jnp.asarray(random_flow(solver, seed, modes=3), jnp.float32) for seed in (0, 1))
    ours, theirs = (statistics.energy_flux(np.asarray(q)[None], solver.grid, solver.variables).values[0, 1:6] for q in (u, truth))
    found = losses.transfer(_context(solver, u[None]), jnp.stack([u, u]), jnp.stack([truth, truth]), truth)
    np.testing.assert_allclose(found, ((ours - theirs) ** 2).sum() / (theirs**2).sum(), rtol=1e-3)


def test_the_residual_is_the_distance_from_the_bare_solver():
    solver = solver_of("spectral", square(12), 1e-2)
    rng = np.random.default_rng(1)
    u, start = jnp.asarray(rng.standard_normal((2, 2, 12, 12)), jnp.float32), jnp.zeros((2, 12, 12), jnp.float32)
    context = _context(solver, u, bare=lambda q: q + 1.0)
    assert float(losses.residual(context, jnp.stack([start + 1, start + 2]), u, start)) == 0
    np.testing.assert_allclose(losses.residual(context, jnp.stack([start + 3, start + 4]), u, start), (4 + 0) / 2, rtol=1e-6)


def test_terms_that_make_no_sense_are_refused():
    walls = solver_of("finite_volume", Grid((8, 8), (1.0, 1.0), ("periodic", "no_slip")), 1e-2)
    with pytest.raises(ValueError, match="spectrum: counts Fourier modes"):
        losses.check_terms({"spectrum": 1.0}, walls)
    losses.check_terms({"state": 1.0, "dissipation": 1.0, "residual": 1.0}, walls)
    for changed, sentence in (
        ({"loss": (("states", 1.0),)}, "no term 'states'"),
        ({"loss": (("state", 0.0),)}, "nothing to learn"),
        ({"unroll": (2, 3), "updates": (1, 1), "truncate": 2}, "multiples"),
        ({"unroll": (2, 3)}, "one entry each"),
    ):
        with pytest.raises(ValueError, match=sentence):
            Recipe(**changed)


# --- training --------------------------------------------------------------------------------------------------------------------

TINY = Recipe((2,), (6,), batch=2, rate=1e-2, validate_every=3, devices=1)


def test_phases_grow():
    recipe = Recipe((1, 2, 4), (3, 2, 1), warm_up=2)
    assert [recipe.phase(i) for i in range(7)] == [1, 1, 1, 2, 2, 4, 4]
    assert recipe.total == 6
    assert recipe.longest == 6


def test_learning_rates_rise_and_fall():
    for schedule, halfway in (("cosine", 0.51), ("linear", 0.51), ("exponential", 0.02**0.5), ("constant", 1.0)):
        recipe = Recipe((1,), (110,), schedule=schedule, rate=1e-2, rate_warm_up=10)
        found = [float(recipe.rate_of(i)) for i in (0, 5, 10, 60, 110)]
        last = 1.0 if schedule == "constant" else 0.02
        np.testing.assert_allclose(found, [0, 5e-3, 1e-2, 1e-2 * halfway, 1e-2 * last], rtol=1e-4)


def _trajectories(model, starts, frames):
    run = jax.jit(lambda u: jnp.concatenate([u[None], rollout(model, State(u), frames).u]))
    return np.stack([np.asarray(run(u)) for u in starts])


def _flow_data(closure, n=12, frames=8, count=3):
    """A solver in two dimensions, and trajectories of it with a closure."""
    solver = solver_of("spectral", square(n), 5e-3, kolmogorov())
    keys = reference.sample_keys(0, count)
    starts = [RandomVelocity(4.0, 1.0)(k, solver.grid, (solver.grid.centre,) * 2, np.float32) for k in keys]
    return solver, _trajectories(Model(solver, ETDRK4(), 0.05, (closure,)), starts, frames)


def _problem(closure=None, viscosity=1.0, n=16):
    """Trajectories of a line with an eddy viscosity, and a model that has to learn it."""
    solver = SpectralKS(Grid((n,), (22.0,)), KuramotoSivashinsky(viscosity))
    rng = np.random.default_rng(0)
    waves = rng.standard_normal((3, 3, 2))
    (x,) = (2 * np.pi / 22 * q for q in solver.grid.mesh())
    starts = [sum(a * np.cos(k * x) + b * np.sin(k * x) for k, (a, b) in enumerate(w, 1))[None] for w in waves]
    data = _trajectories(Model(solver, ETDRK4(), 0.05, (Smagorinsky(0.3),)), jnp.asarray(starts, jnp.float32), 8)
    closure = learned(0, dims=1, width=4, depth=1, inputs="gradient", kernel=3) if closure is None else closure
    return Model(solver, ETDRK4(), 0.05, (closure,)), data


def _task(model, data, name=""):
    return Task(model, data[:2], data[2:], interval=0.05, every=1, modes=4, name=name)


def _train(model, data, recipe=TINY, **options):
    return train(_task(model, data), recipe, seed=3, **options)


class Stopped(Exception):
    pass


FULL = dataclasses.replace(
    TINY,
    average=0.9,
    noise=0.01,
    symmetries=True,
    warm_up=1,
    loss=(("state", 1.0), ("spectrum", 0.1), ("residual", 0.01)),
    schedule="linear",
)


@pytest.mark.reliability("R5")
@pytest.mark.parametrize("recipe", [TINY, FULL], ids=["plain", "everything"])
def test_loss_falls_and_an_interrupted_training_resumes_bit_for_bit(tmp_path, recipe):
    model, data = _problem()
    seen = []
    whole = _train(model, data, recipe, report=seen.append)
    assert [r["update"] for r in seen] == list(range(1, 7))
    assert [r["update"] for r in whole.history if "validation" in r] == [3, 6]
    if recipe is TINY:
        assert whole.history[-1]["loss"] < whole.history[0]["loss"]
    else:
        assert set(whole.history[0]["terms"]) == {"state", "spectrum", "residual"}
        total = sum(weight * whole.history[0]["terms"][name] for name, weight in recipe.loss)
        assert whole.history[0]["loss"] == pytest.approx(total, rel=1e-5)
    assert whole.best_update in (3, 6)
    assert set(whole.compile_seconds) == {2}
    again = _train(model, data, recipe)
    assert [r["loss"] for r in again.history] == [r["loss"] for r in whole.history]

    checkpoints = Checkpoints(tmp_path / "checkpoints")

    def stop(record):
        if record["update"] == 5:
            raise Stopped

    with pytest.raises(Stopped):
        _train(model, data, recipe, checkpoints=checkpoints, report=stop)
    assert checkpoints.steps() == [3, 5]
    resumed_at = []
    rest = _train(model, data, recipe, checkpoints=checkpoints, resume=True, report=lambda r: resumed_at.append(r["update"]))
    assert resumed_at == [6]
    assert [r["loss"] for r in rest.history] == [r["loss"] for r in whole.history]
    assert (rest.best_update, rest.best_score) == (whole.best_update, whole.best_score)
    pairs = list(zip(jax.tree.leaves(rest.model.closures), jax.tree.leaves(whole.model.closures), strict=True))
    for a, b in pairs:
        np.testing.assert_array_equal(a, b)
    start = jax.tree.leaves(model.closures)
    assert any((np.asarray(a) != np.asarray(b)).any() for a, b in zip(start, jax.tree.leaves(whole.model.closures), strict=True))
    with pytest.raises(StorageError, match="other data"):
        _train(model, 2 * data, recipe, checkpoints=checkpoints, resume=True)


def test_a_long_history_is_thinned_by_itself(monkeypatch):
    monkeypatch.setattr(training_loop, "MOST_RECORDS", 3)
    model, data = _problem()
    found = [(r["update"], "validation" in r) for r in _train(model, data).history]
    assert found == [(3, True), (5, False), (6, True)]


@pytest.mark.reliability("R9")
def test_a_poisoned_batch_is_skipped_and_too_many_lead_back():
    model, data = _problem()
    data[0] = np.nan  # windows of the first trajectory are unusable
    recipe = dataclasses.replace(TINY, batch=1, validate_every=2)
    bad = [bool(np.isnan(windows.batch(windows.InMemory(data[:2]), 2, 1, 3, i)).any()) for i in range(recipe.total)]
    assert 0 < sum(bad) < recipe.total
    outcome = _train(model, data, recipe)
    assert [r["loss"] is None for r in outcome.history] == bad
    assert outcome.skipped == sum(bad)
    assert all(np.isfinite(a).all() for a in jax.tree.leaves(outcome.model.closures))

    # nothing but poison: back to the validated weights with half the rate, as often as allowed, then it says so
    data[1] = np.nan
    records = []
    impatient = dataclasses.replace(recipe, updates=(12,), patience=2, rollbacks=2, schedule="constant", rate_warm_up=0)
    with pytest.raises(TrainingDiverged, match=r"3 updates in a row were not finite .* after going back 2 times"):
        _train(model, data, impatient, report=records.append)
    assert [r["update"] for r in records if r.get("rolled_back")] == [3, 6]
    np.testing.assert_allclose([records[i]["rate"] / impatient.rate for i in (2, 3, 6)], [1, 0.5, 0.25])


@pytest.mark.reliability("R9")
def test_going_back_restores_the_validated_weights():
    model, data = _problem()
    recipe = dataclasses.replace(TINY, updates=(9,), validate_every=2, patience=1, stop_after=0)
    whole = []
    poisoned = windows.InMemory(data[:2])
    real = poisoned.read
    calls = []

    def read(i, start, stop):
        calls.append(None)
        q = real(i, start, stop)
        return q * np.nan if 8 < len(calls) <= 12 else q  # the digest reads twice, each update too: the fourth and the fifth

    poisoned.read = read
    task = Task(model, poisoned, data[2:], interval=0.05, every=1, modes=4)
    outcome = train(task, recipe, seed=3, report=whole.append)
    assert [r["loss"] is None for r in whole][:6] == [False, False, False, True, True, False]
    assert [r["update"] for r in whole if r.get("rolled_back")] == [5]
    assert outcome.rollbacks == 1
    assert outcome.skipped == 2


def test_training_stops_when_validation_no_longer_improves():
    model, data = _problem()
    recipe = dataclasses.replace(TINY, updates=(40,), validate_every=1, rate=1e-30, stop_after=2, choose="correlation")
    outcome = _train(model, data, recipe)
    assert outcome.stopped_early
    assert len(outcome.history) < 40
    assert outcome.history[-1]["update"] >= outcome.best_update + 2


def test_the_last_weights_are_kept_where_they_are_asked_for():
    model, data = _problem()
    recipe = dataclasses.replace(TINY, updates=(6,), unroll=(1,), validate_every=2, choose="correlation", average=0.5)
    best, last = (_train(model, data, dataclasses.replace(recipe, keep=keep)) for keep in ("best", "last"))
    assert last.best_update == 6
    scores = [r["validation"]["mean_correlation"] for r in last.history if "validation" in r]
    assert [r["validation"]["mean_correlation"] for r in best.history if "validation" in r] == scores
    assert best.best_score == pytest.approx(max(scores))
    assert last.best_score == pytest.approx(scores[-1])
    # a rate that ruins the weights: the last that did not blow up are kept
    ruin = dataclasses.replace(recipe, rate=1e6, rate_warm_up=6, schedule="constant", validate_every=1, clip=1e30, keep="last")
    lost = _train(model, data, ruin)
    sound = [r["update"] for r in lost.history if "validation" in r and r["validation"]["score"] is not None]
    assert lost.best_update == (sound[-1] if sound else 1)
    with pytest.raises(ValueError, match="stop_after: ends a training"):
        dataclasses.replace(recipe, keep="last", stop_after=3)


@pytest.mark.slow
def test_gradients_are_cut_where_they_are_said_to_be():
    """With truncation at one frame the gradient of two frames is that of each by itself, from where the model was."""
    model, data = _problem()
    weights, fixed = eqx.partition(model.closures, eqx.is_inexact_array)
    weights = jax.tree.map(lambda a: a + 0.03 * jnp.cos(jnp.arange(a.size, dtype=a.dtype)).reshape(a.shape), weights)
    skeleton = eqx.tree_at(lambda m: m.closures, model, fixed)
    from hybridsim.train import _how

    def gradient(frames, **changed):
        recipe = dataclasses.replace(TINY, unroll=(frames,), updates=(1,), **changed)
        how = _how(recipe, _task(model, data), 2)
        loss, _, g = gradient_of(skeleton, weights, jnp.asarray(data[:2, : frames + recipe.warm_up + 1]), jax.random.key(0), how)
        return float(loss), np.concatenate([np.ravel(a) for a in jax.tree.leaves(g)])

    loss, through = gradient(2)
    same, cut = gradient(2, truncate=1)
    assert loss == pytest.approx(same, rel=1e-6)
    first_loss, first = gradient(1)
    # the second frame alone, from where the first one led, without gradient through the first
    second_loss, second = gradient(1, warm_up=1)
    assert loss == pytest.approx((first_loss + second_loss) / 2, rel=1e-5)
    np.testing.assert_allclose(cut, (first + second) / 2, rtol=1e-4, atol=1e-6 * np.abs(cut).max())
    assert np.abs(cut - through).max() > 1e-2 * np.abs(through).max()

    blocks_loss, blocks = gradient(2, memory=0.01, noise=0.0)
    assert blocks_loss == pytest.approx(loss, rel=1e-6)
    np.testing.assert_allclose(blocks, through, rtol=1e-4, atol=1e-6 * np.abs(through).max())


@pytest.mark.slow
def test_several_references_share_the_weights_and_one_program():
    traces = []

    class Counted(type(learned(0))):
        def __call__(self, view, memory=None, key=None):
            traces.append(view.grid.shape[0])
            return super().__call__(view, memory, key)

    closure = Counted(1, width=4, depth=1, inputs="gradient", key=jax.random.key(0))
    tasks = []
    for i, viscosity in enumerate((1.0, 1.1)):
        model, data = _problem(closure, viscosity=viscosity)
        tasks.append(_task(model, data, f"viscosity {viscosity}" if i else ""))
    larger, coarse = _problem(closure, n=12)
    recipe = dataclasses.replace(TINY, batch=4, validate_every=100)
    both = train(tasks, recipe, seed=3)
    assert len(set(map(float, (r["loss"] for r in both.history)))) == recipe.total
    compiled = traces.count(16)
    train(tasks, recipe, seed=4)  # another seed: nothing is traced again for the gradients
    assert traces.count(16) == compiled
    three = train([*tasks, _task(larger, coarse, "12 cells")], recipe, seed=3)
    assert set(three.best_validation["others"]) == {"viscosity 1.1", "12 cells"}
    assert traces.count(12) > 0

    # the loss is the mean over the references
    lone = [train(t, dataclasses.replace(recipe, batch=2), seed=3).history[0]["loss"] for t in tasks[:1]]
    assert both.history[0]["loss"] != lone[0]


@pytest.mark.parametrize(
    "planted",
    [Smagorinsky(0.15), *(pytest.param(c, marks=pytest.mark.slow) for c in (Leith(0.25), Hyperviscosity(0.3)))],
    ids=lambda c: type(c).__name__,
)
def test_a_planted_constant_is_recovered(planted):
    name = planted.constants[0]
    value = getattr(planted, name)
    solver, data = _flow_data(planted, count=4)
    start = with_constants(type(planted)(**{name: 0.3 * value}), jnp.float32)
    model = Model(solver, ETDRK4(), 0.05, (start,))
    recipe = Recipe((4,), (80,), batch=4, rate=1.5e-2, validate_every=80, rate_warm_up=5, devices=1, checkpoint_levels=0)
    outcome = train(Task(model, data[:3], data[3:], interval=0.05, every=1, modes=4), recipe, seed=0)
    assert float(getattr(outcome.model.closures[0], name)) == pytest.approx(value, rel=0.02)


def test_constants_never_become_negative():
    solver, data = _flow_data(Leith(0.0))
    model = Model(solver, ETDRK4(), 0.05, (with_constants(Leith(0.5), jnp.float32),))
    outcome = train(_task(model, data), dataclasses.replace(TINY, updates=(10,), rate=0.5, validate_every=1), seed=0)
    assert 0 <= float(outcome.model.closures[0].c) < 0.5
    assert all(r["loss"] is not None for r in outcome.history)


def test_a_gas_is_judged_by_velocity_density_and_pressure():
    solver = gas(Grid((8, 8), (1.0, 1.0)), viscosity=1e-3, scalars={"dye": 1e-3})
    u = np.stack([rough_flow(solver.grid, seed, mach=0.3, scalars=1) for seed in range(2)])
    context = _context(solver, jnp.asarray(u, jnp.float32))
    w = primitive(u, solver.grid, 1.4)
    weighted = np.sqrt(w.density)[:, None] * w.velocity
    fields = losses.fields_of(solver, jnp.asarray(u, jnp.float32))
    np.testing.assert_allclose(fields.velocity, weighted, rtol=1e-5, atol=1e-6)
    assert [name for name, _ in fields.others] == ["density", "pressure", "dye"]
    np.testing.assert_allclose(fields.others[1][1][:, 0], w.pressure, rtol=1e-5)
    truth = jnp.asarray(u, jnp.float32)
    assert float(losses.state(context, truth, truth, truth[0])) == 0
    other = truth.at[:, 4].multiply(1.01)  # the dye alone is wrong
    small = float(losses.state(context, other, truth, truth[0]))
    assert 0 < small < 1e-3
    for name in ("dissipation", "spectrum"):
        assert float(losses.TERMS[name](context, truth, truth, truth[0])) == 0
        assert float(losses.TERMS[name](context, truth.at[:, 1].multiply(2.0), truth, truth[0])) > 1e-3
    with pytest.raises(ValueError, match=r"transfer: .* not for a gas"):
        losses.check_terms({"transfer": 1.0}, solver)


def test_hot_thin_gas_beside_cold_dense_gas_counts_by_its_temperature():
    """Two phases in pressure balance, all but at rest: their temperatures 1 and 1/56 fill half of the box each."""
    solver = gas(Grid((8, 8), (1.0, 1.0), boundaries=("periodic", "outflow")))
    density = np.where(np.arange(8) < 4, 56.0, 1.0) * np.ones((8, 1))
    pressure = 0.6
    cold, hot = pressure / 56, pressure

    def state(rho):
        drift = 1e-3
        return jnp.asarray(np.stack([rho, drift * rho, 0 * rho, pressure / 0.4 + 0.5 * drift**2 * rho])[None], jnp.float32)

    truth = state(density)
    context = _context(solver, truth)
    assert float(losses.temperature(context, truth, truth, truth[0])) == 0
    # a tenth hotter in the hot gas: (0.1 T_hot)² over half of the cells, beside the variance ((T_hot − T_cold)/2)²
    heated = state(np.where(density > 1, density, density / 1.1))
    expected = 0.5 * (0.1 * hot) ** 2 / (0.25 * (hot - cold) ** 2)
    np.testing.assert_allclose(losses.temperature(context, heated, truth, truth[0]), expected, rtol=1e-3)
    assert float(losses.state(context, heated, truth, truth[0])) < 1e-3 * expected
    # and a gas that is still uniform: the scale is what its motion will make of it, so nothing divides by zero
    moving = truth.at[:, 0].set(1.0).at[:, 1].set(0.1)
    value, slope = jax.value_and_grad(lambda u: losses.temperature(context, u, moving, moving[0]))(moving)
    assert float(value) == 0
    assert bool(jnp.all(jnp.isfinite(slope)))
    line = SpectralKS(Grid((8,), (22.0,)), KuramotoSivashinsky())
    for name in ("temperature", "phases"):
        with pytest.raises(ValueError, match=rf"{name}: only a gas"):
            losses.check_terms({name: 1.0}, line)


def test_the_masses_of_the_phases_count_wherever_they_are(x64, rng):
    solver = gas(Grid((8, 8), (1.0, 1.0), boundaries=("periodic", "outflow")))

    def state(temperatures, density):
        momentum = 0.1 * density
        energy = temperatures * density / 0.4 + 0.5 * momentum**2 / density
        return jnp.asarray(np.stack([density, momentum, 0 * density, energy], axis=1))

    # temperatures at the centres of the report's bins, where all mass belongs to one: the two measures then know the same masses
    bins = temperature_bins(1e-3, 1.0)[1:-1]

    def draw():
        density = rng.uniform(0.5, 50.0, (3, 8, 8))
        return state(rng.choice(bins, (3, 8, 8)), density / density.mean())

    truth, other = draw(), draw()
    context = _context(solver, truth)
    loss = jax.jit(lambda u: losses.phases(context, u, truth, truth[0]))
    centres = temperature_bins(1e-3, 1.0)
    found, known = (phases(u, solver.grid, Gas(1.4), centres)[:, 0].mean(axis=0) for u in (other, truth))
    apart = phase_distance(found, known)
    expected = ((found - known) ** 2 / (found + known + 1e-7 * known.sum())).sum() / known.sum()
    np.testing.assert_allclose(float(loss(other)), expected, rtol=1e-6)
    assert 0.5 * apart**2 <= float(loss(other)) * (1 + 1e-5) <= apart
    # where the gas is, and when, does not count
    moved = truth[::-1, :, ::-1, :]
    assert float(loss(moved)) < 1e-12 < float(losses.temperature(context, moved, truth, truth[0]))
    # half of the mass in a bin that the truth has none in, and none where half of it is
    halves = [np.where(np.arange(8) < 4, t, bins[3]) * np.ones((3, 8, 1)) for t in (bins[10], bins[20])]
    one, two = (state(t, np.ones((3, 8, 8))) for t in halves)
    np.testing.assert_allclose(float(losses.phases(context, one, two, two[0])), 1.0, rtol=1e-5)
    # and between the centres it has the gradient that differences find
    smooth = state(np.exp(rng.uniform(-6, 0, (3, 8, 8))), rng.uniform(0.5, 50.0, (3, 8, 8)))
    step = jnp.asarray(rng.standard_normal(smooth.shape)) * smooth
    slope = float(jnp.sum(jax.grad(loss)(smooth) * step))
    h = 1e-6
    np.testing.assert_allclose(slope, float(loss(smooth + h * step) - loss(smooth - h * step)) / (2 * h), rtol=1e-5)


@pytest.mark.parametrize("density", [0.01, 1.0, 56.0])
def test_cells_without_a_temperature_leave_the_phases_finite(density):
    """A cut of the short waves may leave a pressure below zero, in a run as in the truth."""
    solver = gas(Grid((8, 8), (1.0, 1.0), boundaries=("periodic", "outflow")))
    half = (np.arange(64) < 32).reshape(8, 8)

    def state(hot, lost=False):
        temperature = np.where(half, hot, 0.02)
        rho = np.where(half, 1.0, 50.0)
        energy = temperature * rho / 0.4
        if lost:
            rho[3, 3], energy[3, 3] = density, -1.0
        return jnp.asarray(np.stack([rho, 0 * rho, 0 * rho, energy])[None], jnp.float32)

    context = _context(solver, state(1.0))
    clean = float(losses.phases(context, state(1.1), state(1.0), state(1.0)[0]))
    for ours, theirs in ((state(1.1, lost=True), state(1.0)), (state(1.1), state(1.0, lost=True))):
        value, slope = jax.value_and_grad(lambda u, theirs=theirs: losses.phases(context, u, theirs, theirs[0]))(ours)
        assert abs(float(value) - clean) < 0.1
        assert bool(jnp.all(jnp.isfinite(slope)))
    # and gas hotter than all ranges is in the last one
    far = state(1e12)
    np.testing.assert_allclose(float(losses.phases(context, far, state(1.0), far[0])), 2 * 32 / (32 + 32 * 50), rtol=1e-3)


@pytest.mark.slow
def test_gases_of_several_kinds_are_learnt_from_at_once():
    tasks = []
    for viscosity in (1e-3, 2e-3):
        solver = gas(Grid((12,), (1.0,)), gamma=1.4 + 100 * viscosity, viscosity=viscosity)
        starts = jnp.asarray(np.stack([rough_flow(solver.grid, seed, mach=0.3) for seed in range(3)]), jnp.float32)
        data = _trajectories(Model(solver, ForwardEuler(), 1e-3, (Smagorinsky(0.3),)), starts, 6)
        closure = LearnedFlux(1, 4, 1, 3, variables=solver.variables, key=jax.random.key(0))
        model = Model(solver, ForwardEuler(), 1e-3, (closure,))
        tasks.append(Task(model, data[:2], data[2:], interval=1e-3, every=1, modes=4, name=f"{viscosity}"))
    recipe = dataclasses.replace(TINY, choose="error", loss=(("state", 1.0), ("dissipation", 0.1)))
    outcome = train(tasks, recipe, seed=0)
    assert all(r["loss"] is not None for r in outcome.history)
    assert outcome.best_validation["mean_error"] > 0


def test_a_validation_that_blows_up_can_be_written_down():
    solver = gas(Grid((12,), (1.0,)), positivity=False)
    starts = jnp.asarray(np.stack([rough_flow(solver.grid, seed, mach=0.3) for seed in range(2)]), jnp.float32)
    data = _trajectories(Model(solver, ForwardEuler(), 1e-3), starts, 40)
    closure = LearnedFlux(1, 4, 1, 3, variables=solver.variables, key=jax.random.key(0))
    task = Task(Model(solver, ForwardEuler(), 1e-3, (closure,)), data[:1], data[1:], interval=1e-3, every=1, modes=4)
    recipe = dataclasses.replace(TINY, choose="error", unroll=(1,), updates=(2,), rate=1e9, rate_warm_up=0, validate_every=1)
    outcome = train([task], recipe, seed=0)
    assert None in [record["validation"]["score"] for record in outcome.history]
    json.dumps(outcome.history, allow_nan=False)


def test_of_rollouts_that_blow_up_the_one_that_lasts_longer_is_better():
    scores = [
        {"mean_error": None, "mean_correlation": 0.3},
        {"mean_error": None, "mean_correlation": 0.5},
        {"mean_error": 2.0, "mean_correlation": 0.1},
        {"mean_error": 0.1, "mean_correlation": 0.9},
    ]
    found = [score_of(s, "error") for s in scores]
    assert found == sorted(found)
    assert len(set(np.float32(found))) == 4  # the precision in which the best one is kept


def test_weights_are_chosen_by_the_mass_in_each_range_of_temperature():
    """Validation says how far the mean masses per bin are from the truth's: not at all, and the further the hotter the truth is."""
    cooling = PowerLawCooling(amplitude=3.0, exponent=0.5, reference_temperature=1.0, floor=0.1)
    solver = gas(Grid((12,), (1.0,)), cooling=cooling)
    model = Model(solver, ForwardEuler(), 1e-3)
    starts = jnp.asarray(np.stack([rough_flow(solver.grid, seed, mach=0.3) for seed in range(2)]), jnp.float32)
    data = _trajectories(model, starts, 9)
    assert correlation_scores(model, data, 1e-3, 1, 4)["temperature_error"] == 0
    errors = []
    for factor in (1.05, 3.0):
        hotter = data.copy()
        hotter[:, 1:, 2] *= factor
        errors.append(correlation_scores(model, hotter, 1e-3, 1, 4)["temperature_error"])
    assert 0 < errors[0] < errors[1] <= 2
    lost = Model(gas(Grid((12,), (1.0,)), cooling=cooling, positivity=False), ForwardEuler(), 1.0)
    assert correlation_scores(lost, data, 1.0, 1, 4)["temperature_error"] is None
    ranked = [{"temperature_error": e, "mean_correlation": 0.5} for e in (None, 0.4, 0.1)]
    found = [score_of(scores, "temperature_error") for scores in ranked]
    assert found == sorted(found)
    with pytest.raises(ValueError, match=r"choose: only a gas that radiates has a temperature_error"):
        score_of({"mean_error": 0.1}, "temperature_error")


# --- devices ---------------------------------------------------------------------------------------------------------------------

TWO_DEVICES = """
    import sys
    import jax, json
    import jax.numpy as jnp
    import numpy as np
    sys.path.insert(0, {tests!r})
    import test_training as t
    assert jax.local_device_count() == 2
    model, data = t._problem()
    weights, fixed = t.eqx.partition(model.closures, t.eqx.is_inexact_array)
    weights = jax.tree.map(lambda a: a + 0.03 * jnp.cos(jnp.arange(a.size, dtype=a.dtype)).reshape(a.shape), weights)
    skeleton = t.eqx.tree_at(lambda m: m.closures, model, fixed)
    from hybridsim.train import _how
    found = []
    for devices in (1, 2, 0):
        how = _how(t.dataclasses.replace(t.TINY, devices=devices, noise=0.01), t._task(model, data), 4)
        assert how.devices == (devices or 2)
        windows = jnp.asarray(np.concatenate([data[:2, :3], data[:2, 3:6]]))
        _, _, g = t.gradient_of(skeleton, weights, windows, jax.random.key(0), how)
        found.append(np.concatenate([np.ravel(a) for a in jax.tree.leaves(g)]))
    one, two, auto = found
    outcome = t._train(model, data, t.dataclasses.replace(t.TINY, devices=2))
    try:
        t._train(model, data, t.dataclasses.replace(t.TINY, devices=2, batch=3))
    except ValueError as error:
        refusal = str(error)
    print(json.dumps([float(np.abs(one - two).max() / np.abs(one).max()), bool((two == auto).all()),
                      [r["loss"] for r in outcome.history], refusal]))
"""


@pytest.mark.slow
def test_two_devices_give_the_gradient_of_one():
    environment = {**os.environ, "JAX_NUM_CPU_DEVICES": "2", "JAX_PLATFORMS": "cpu"}
    code = textwrap.dedent(TWO_DEVICES.format(tests=str(Path(__file__).parent)))
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    apart, same, history, refusal = json.loads(done.stdout.splitlines()[-1])
    assert apart <= 1e-6
    assert same
    assert history[-1] < history[0]
    assert "must divide the batch" in refusal


# --- logs ------------------------------------------------------------------------------------------------------------------------


def test_json_lines_drop_what_comes_after_the_update_that_is_done_again(tmp_path):
    path = tmp_path / "log.jsonl"
    log = JsonLines(path)
    for n in range(1, 6):
        log.write({"update": n, "loss": 0.5})
    log.close()
    with path.open("a") as file:
        file.write('{"update": 6, "lo')  # killed while writing
    log = JsonLines(path)
    log.write({"update": 4, "loss": 0.25})
    log.close()
    assert [(r["update"], r["loss"]) for r in map(json.loads, path.read_text().splitlines())] == [
        (1, 0.5), (2, 0.5), (3, 0.5), (4, 0.25),
    ]  # fmt: skip


def test_tensorboard_reads_what_is_logged(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    from hybridsim.training_log import TensorBoard

    log = TensorBoard(tmp_path)
    for n in range(1, 4):
        log.write({"update": n, "loss": 1.0 / n, "validation": {"t95": 2.0 * n, "t80": None}})
    log.close()
    found = EventAccumulator(str(tmp_path)).Reload()
    assert [(e.step, round(e.value, 4)) for e in found.Scalars("loss")] == [(1, 1.0), (2, 0.5), (3, 0.3333)]
    assert [e.value for e in found.Scalars("validation/t95")] == [2, 4, 6]


# --- the page --------------------------------------------------------------------------------------------------------------------


def test_the_page_on_training_is_true():
    """Its YAML is a training, and it names every term of the loss and nothing else."""
    page = (Path(__file__).parent.parent / "docs" / "training.md").read_text(encoding="utf-8")
    (block,) = re.findall(r"^```yaml\n(.*?)^```$", page, re.M | re.S)
    data = {
        "equation": "navier_stokes",
        "domain": {"lengths": [6.28, 6.28]},
        "initial": "random_velocity",
        "time": {"end": 1.0, "frames": 10},
        "reference": {"solver": "spectral", "shape": [128, 128]},
        "runs": {"mine": {"solver": "spectral", "shape": [64, 64], "dt": 0.0125, "corrections": ["smagorinsky"]}},
        **yaml.safe_load(block),
    }
    experiment = experiment_from(data, Path("page.yaml"))
    assert experiment.spec.train is not None
    recipe = recipe_of(experiment.spec.train)
    assert len(experiment.variants) == 2
    assert recipe.longest == 18
    assert set(dict(recipe.loss)) == set(losses.TERMS) - {"temperature", "phases"}  # the example is no gas
    assert re.findall(r"^\| `(\w+)` \|", page, re.M) == list(losses.TERMS)
    for task in (experiment, *experiment.variants):
        assert parameters(model_to_train(task, 0)[0].closures) == 1
