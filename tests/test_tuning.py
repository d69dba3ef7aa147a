"""Time steps of rivals: the largest that keeps the accuracy, and the largest that lasts."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hybridsim.config import experiment_from, read_experiment
from hybridsim.experiment import fine_starts
from hybridsim.tuning import Tuned, advance, as_good, coarser, fewest_lasting, fewest_steps, finer, frames_of_trial, lasts


@settings(deadline=None)
@given(
    given_steps=st.integers(1, 60),
    order=st.integers(1, 4),
    scale=st.floats(1e-3, 10),
    blow_up=st.integers(0, 20),
)
def test_the_steps_found_keep_the_accuracy_and_the_next_fewer_do_not(given_steps, order, scale, blow_up):
    """An error (1 + s n^−p), unstable with `blow_up` steps and fewer."""

    def error(n):
        return math.nan if n <= blow_up else 1 + scale * n**-order

    found = fewest_steps(given_steps, error, "shrinking")
    if found.steps is None:
        assert 16 * given_steps <= blow_up * 2
        return
    converged = min(v for v in found.accuracy.values() if not math.isnan(v))
    assert as_good(error(found.steps), converged, "shrinking")
    tried_fewer = [n for n in found.accuracy if n < found.steps]
    assert all(not as_good(found.accuracy[n], converged, "shrinking") for n in tried_fewer)
    # the next fewer was tried, unless one step per frame is enough or the given ones were too few already
    assert found.steps == 1 or tried_fewer


def test_times_that_end_with_the_window_count_as_equal():
    assert fewest_steps(8, lambda n: math.inf if n >= 4 else 2.0, "growing").steps == 4
    assert not as_good(2.0, math.inf, "growing")
    assert as_good(math.inf, 2.0, "growing")
    assert not as_good(math.nan, 2.0, "growing")


def test_steps_that_do_not_last_are_shortened_until_they_do():
    tuned = Tuned(4)
    found = fewest_lasting(tuned, lambda n: 100.0 if n >= 6 else 73.0, 100.0)
    assert (found.steps, found.long_steps) == (4, 6)
    assert found.lasted == {4: 73.0, 5: 73.0, 6: 100.0}
    never = fewest_lasting(tuned, lambda n: 73.0, 100.0)
    assert never.long_steps is None
    assert max(never.lasted) <= 16
    assert fewest_lasting(Tuned(None), lambda n: 100.0, 100.0).steps is None


@settings(deadline=None)
@given(st.integers(1, 1000))
def test_neighbours_are_near(n):
    assert n < finer(n) <= max(n + 1, 1.2 * n + 1)
    assert 1 <= coarser(n) < max(n, 2)


@pytest.fixture(scope="module")
def waves():
    data, path, shipped = read_experiment("ks_scores.yaml")
    data["runs"] = {
        "bare": {"solver": "spectral", "shape": [64], "dt": 0.5},
        "smagorinsky": {"solver": "spectral", "shape": [64], "dt": 0.5, "corrections": [{"use": "smagorinsky", "cs": 0.2}]},
        "volumes": {"solver": "finite_volume", "shape": [64], "dt": 0.5},
    }
    data["checks"] = {}
    data["samples"]["count"] = 2
    data["time"] = {"end": 10, "frames": 10, "statistics_from": 2}
    data["reference"] |= {"shape": [128], "precision": "float32"}
    data["initial"]["warm_up"] = 20
    return experiment_from(data, path, shipped)


@pytest.mark.parametrize("label", ["bare", "smagorinsky"])
def test_a_trial_is_the_run_itself(waves, label):
    """Frames of a trial beside those of `Model` stepped one by one."""
    import jax

    from hybridsim.experiment import stretch

    starts = np.asarray(
        jax.vmap(lambda u: waves.solver(label).restrict(u, waves.reference_solver().grid, waves.reference_solver().variables))(
            fine_starts(waves)
        )
    )
    frames = frames_of_trial(waves, label, 2, starts)
    assert frames is not None
    assert frames.shape == (2, 11, 1, 64)
    np.testing.assert_array_equal(frames[:, 0], starts.astype(np.float32))
    model = waves.model_for(label)
    keys = jax.random.split(jax.random.key(0), 2)
    alone = np.stack(list(stretch(model, jax.numpy.asarray(starts, jax.numpy.float32), keys, 2, 10)), axis=1)
    np.testing.assert_allclose(frames[:, 1:], alone, atol=2e-4)
    assert lasts(waves, label, 2, starts, 25.0) == 25.0


def test_a_long_run_that_lasts_is_as_long_as_was_asked(waves):
    """Also where the time is no whole number of frame intervals in floating point."""
    data, path, shipped = read_experiment("ks_scores.yaml")
    data |= {"runs": {"bare": {"solver": "spectral", "shape": [64], "dt": 0.2}}, "checks": {}}
    data["time"] = {"end": 5.6, "frames": 28, "statistics_from": 2}
    experiment = experiment_from(data, path, shipped)
    for time in (5.6, 6.0, 7.3):
        assert lasts(experiment, "bare", 1, np.zeros((1, 1, 64)), time) == time


def test_a_step_that_is_too_large_is_noticed(waves):
    """Finite volumes with a step of 1 lose amplified waves within a few time units."""
    starts = 50 * np.random.default_rng(0).normal(size=(2, 1, 64)).astype(np.float32)
    assert frames_of_trial(waves, "volumes", 1, starts) is None
    assert lasts(waves, "volumes", 1, starts, 25.0) < 25.0


def test_watching_may_end_a_trial(waves):
    starts = np.zeros((2, 1, 64), np.float32)
    seen = []

    def watch(u):
        seen.append(u)
        return len(seen) < 4

    assert advance(waves, "bare", 2, starts, 10, watch) == 2
    assert len(seen) == 4
