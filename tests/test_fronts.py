"""Speed-ups at equal accuracy, against ladders whose answer is known."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hybridsim.fronts import Cost, Interval, Measured, Speedup, cheapest, cost_on, remembered, speedup, undominated, verdict, worth

SAMPLES = 8


def exact(label, method, value, cost, rounds=5):
    """A run whose accuracy is the same for every start, and whose cost never varies."""
    return Measured(label, method, lambda draw: value, np.full(rounds, cost))


def spread(label, method, values, costs):
    return Measured(label, method, lambda draw: float(np.mean(values[draw])), np.asarray(costs))


def power_ladder(method="spectral", scale=1.0):
    """Errors n^−2 on n points, costs n³: equal accuracy costs e^−1.5."""
    return [exact(f"{method}{n}", method, n**-2.0, scale * n**3.0) for n in (16, 20, 24, 32, 40)]


def test_interpolation_is_exact_for_a_power_law():
    hybrid = exact("hybrid", "closure", 27**-2.0, 27.0**3 / 2.5)
    found = speedup([hybrid], power_ladder(), SAMPLES, "shrinking", resamples=50)
    assert found is not None
    np.testing.assert_allclose(found.interval, 2.5, rtol=1e-12)
    assert (found.best, found.bound, found.shares) == ("spectral", "", {"spectral": 1.0})


def test_the_cheapest_method_counts_and_a_dear_one_changes_nothing():
    hybrid = exact("hybrid", "closure", 27**-2.0, 27.0**3 / 2.5)
    dear, cheap = power_ladder("volumes", 7.0), power_ladder("eddies", 0.5)
    with_dear = speedup([hybrid], power_ladder() + dear, SAMPLES, "shrinking", resamples=20)
    with_cheap = speedup([hybrid], power_ladder() + cheap + dear, SAMPLES, "shrinking", resamples=20)
    assert with_dear is not None
    assert with_cheap is not None
    assert with_dear.best == "spectral"
    np.testing.assert_allclose(with_dear.interval, 2.5, rtol=1e-12)
    assert with_cheap.best == "eddies"
    np.testing.assert_allclose(with_cheap.interval, 1.25, rtol=1e-12)


def test_a_rung_that_another_beats_is_no_rung():
    # twice the points with a step that is too small: as accurate, dearer
    rungs = [(1.0, 1.0), (1.0, 3.0), (2.0, 4.0), (1.5, 5.0)]
    assert undominated(rungs) == [(1.0, 1.0), (2.0, 4.0)]
    assert cost_on(rungs, 1.5) == Cost(2.0)


def test_nothing_is_extrapolated():
    better = exact("hybrid", "closure", 50**-2.0, 100.0)
    worse = exact("hybrid", "closure", 10**-2.0, 100.0)
    found = speedup([better], power_ladder(), SAMPLES, "shrinking", resamples=5)
    assert found is not None
    assert found.bound == "at least"
    np.testing.assert_allclose(found.interval, 40.0**3 / 100, rtol=1e-12)
    found = speedup([worse], power_ladder(), SAMPLES, "shrinking", resamples=5)
    assert found is not None
    assert found.bound == "at most"
    np.testing.assert_allclose(found.interval, 16.0**3 / 100, rtol=1e-12)


def test_a_ladder_that_does_not_reach_gives_way_to_one_that_does():
    short = [exact("a", "short", 1.0, 1.0), exact("b", "short", 2.0, 2.0)]
    long = [exact("c", "long", 1.0, 10.0), exact("d", "long", 4.0, 1000.0)]
    found = speedup([exact("hybrid", "closure", 3.0, 1.0)], short + long, SAMPLES, "growing", resamples=5)
    assert found is not None
    assert (found.best, found.bound) == ("long", "")
    np.testing.assert_allclose(found.interval, 10.0 * 100 ** (2 / 3), rtol=1e-12)


def test_times_that_were_not_crossed_are_bounds():
    ladder = [exact("a", "m", 1.0, 1.0), exact("b", "m", math.inf, 8.0)]
    # between a known and an unknown rung the cost is at most that of the second
    found = speedup([exact("hybrid", "closure", 2.0, 1.0)], ladder, SAMPLES, "growing", resamples=5)
    assert found is not None
    assert found.bound == "at most"
    assert found.interval.median == pytest.approx(8.0)
    # as good as anyone could see: the cheapest rung that is so too
    found = speedup([exact("hybrid", "closure", math.inf, 1.0)], ladder, SAMPLES, "growing", resamples=5)
    assert found is not None
    assert found.bound == ""
    assert found.interval.median == pytest.approx(8.0)
    found = speedup([exact("hybrid", "closure", math.inf, 1.0)], ladder[:1], SAMPLES, "growing", resamples=5)
    assert found is not None
    assert found.bound == "at least"


def test_runs_that_were_lost_are_on_no_ladder():
    assert speedup([exact("hybrid", "closure", math.nan, 1.0)], power_ladder(), SAMPLES, "shrinking") is None
    gone = [*power_ladder(), exact("gone", "spectral", math.nan, 1e-9)]
    found = speedup([exact("hybrid", "closure", 27**-2.0, 27.0**3)], gone, SAMPLES, "shrinking", resamples=5)
    assert found is not None
    np.testing.assert_allclose(found.interval, 1.0, rtol=1e-12)
    assert speedup([exact("hybrid", "closure", 1.0, 1.0)], [], SAMPLES, "growing") is None


def test_training_seeds_count_by_their_geometric_mean():
    seeds = [exact(f"s{i}", "closure", 27**-2.0, 27.0**3 / gain) for i, gain in enumerate((1.0, 4.0))]
    found = speedup(seeds, power_ladder(), SAMPLES, "shrinking", resamples=400)
    assert found is not None
    assert found.interval.median == pytest.approx(2.0, rel=1e-9)
    assert (found.interval.low, found.interval.high) == (pytest.approx(1.0), pytest.approx(4.0))


def test_starts_are_drawn_together():
    """What makes a start hard for all runs alike moves the accuracies, not the speed-up."""
    hard = np.random.default_rng(1).uniform(0.5, 2.0, SAMPLES)
    rounds = np.full(5, 1.0)
    rivals = [spread(f"n{n}", "m", n**-2.0 * hard, rounds * n**3) for n in (16, 20, 24, 32)]
    found = speedup([spread("h", "closure", 22**-2.0 * hard, rounds * 22**3 / 3)], rivals, SAMPLES, "shrinking", resamples=200)
    assert found is not None
    np.testing.assert_allclose(found.interval, 3.0, rtol=1e-9)
    alone = np.random.default_rng(2).uniform(0.5, 2.0, SAMPLES)
    found = speedup([spread("h", "closure", 22**-2.0 * alone, rounds * 22**3 / 3)], rivals, SAMPLES, "shrinking", resamples=200)
    assert found is not None
    assert found.interval.high > 1.3 * found.interval.low


def test_each_draw_is_computed_once():
    asked = []

    def accuracy(draw):
        asked.append(draw)
        return float(np.mean(draw))

    once = remembered(accuracy)
    assert once(np.array([0, 1, 1])) == once(np.array([1, 0, 1])) == pytest.approx(2 / 3)
    assert once(np.array([0, 0, 1])) == pytest.approx(1 / 3)
    assert len(asked) == 2


def test_noise_of_the_clock_is_in_the_interval():
    random = np.random.default_rng(3)
    noisy = lambda cost: cost * random.uniform(1.0, 2.0, 15)  # noqa: E731
    values = np.ones(SAMPLES)
    rivals = [spread(f"n{n}", "m", n**-2.0 * values, noisy(n**3.0)) for n in (16, 24, 32)]
    found = speedup([spread("h", "closure", 24**-2.0 * values, noisy(24.0**3))], rivals, SAMPLES, "shrinking", resamples=300)
    assert found is not None
    assert found.interval.low < 1.0 < found.interval.high < 1.7


@settings(deadline=None)
@given(
    rungs=st.lists(st.tuples(st.floats(0.1, 10), st.floats(0.1, 100)), min_size=2, max_size=8),
    wanted=st.floats(0.1, 10),
    factor=st.sampled_from([0.125, 0.5, 2.0, 8.0]),  # exact, so that costs which differ by rounding go on to differ
)
def test_cost_grows_with_what_is_wanted_and_scales_with_the_ladder(rungs, wanted, factor):
    cost = cost_on(rungs, wanted)
    assert cost is not None
    more = cost_on(rungs, wanted + 0.5)
    assert more is not None
    assert more.value >= cost.value * (1 - 1e-12)
    scaled = cost_on([(w, factor * c) for w, c in rungs], wanted)
    assert scaled is not None
    assert scaled.value == pytest.approx(factor * cost.value)
    assert scaled.bound == cost.bound
    # one more rung never makes the classical side dearer where the ladder reached already
    if cost.bound == "":
        cheaper = cost_on([*rungs, (wanted, cost.value / 2)], wanted)
        assert cheaper is not None
        assert cheaper.value <= cost.value / 2 * (1 + 1e-9)


def test_errors_are_worth_their_logarithm():
    assert worth(math.exp(-2), "shrinking") == pytest.approx(2.0)
    assert worth(0.0, "shrinking") == math.inf
    assert math.isnan(worth(math.nan, "growing"))
    assert cheapest({"a": None}) is None


def test_one_seed_past_the_end_makes_the_whole_a_bound():
    seeds = [exact(f"s{i}", "closure", n**-2.0, 27.0**3) for i, n in enumerate((27, 50))]
    found = speedup(seeds, power_ladder(), SAMPLES, "shrinking", resamples=20)
    assert found is not None
    assert found.bound == "at least"


@pytest.mark.parametrize(
    ("interval", "bound", "word"),
    [
        ((1.1, 1.3, 1.5), "at least", "above"),
        ((0.5, 0.7, 0.9), "at least", "beyond"),
        ((0.5, 0.7, 0.9), "at most", "below"),
        ((1.1, 1.3, 1.5), "at most", "short"),
    ],
)
def test_a_bound_decides_on_one_side_only(interval, bound, word):
    assert verdict(Speedup(Interval(*interval), "spectral", bound, {})).startswith(word)


@pytest.mark.parametrize(
    ("interval", "word"), [((1.1, 1.3, 1.5), "above"), ((0.5, 0.7, 0.9), "below"), ((0.9, 1.1, 1.3), "on the front")]
)
def test_verdicts_go_by_the_interval(interval, word):
    sentence = verdict(Speedup(Interval(*interval), "spectral", "", {}))
    assert sentence.startswith(word)
    assert f"{interval[1]:.2f}" in sentence
