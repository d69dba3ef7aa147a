"""How much cheaper, at equal accuracy: ladders of classical runs, and what stands above or below them.

A *rung* is a run with an accuracy and a cost; a *ladder* is one method on grids of rising size. What a method costs at an accuracy
that none of its rungs has is interpolated between two of them, in the logarithm of the cost; beyond its ends nothing is ever
extrapolated. Nothing here knows a solver: accuracies are functions of which starts are drawn, so that intervals come from drawing
them again.
"""

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Literal, NamedTuple

import numpy as np
from jaxtyping import Float, Int

LEVEL = 0.9
"""Confidence of every interval."""

Accuracy = Callable[[Int[np.ndarray, " sample"]], float]
"""Accuracy over the starts that are drawn; ∞ where it was not followed to its end (a lower bound), NaN where the run was lost."""


def remembered(accuracy: Accuracy) -> Accuracy:
    """The same function, which computes each draw once, in whatever order its starts stand."""
    known: dict[bytes, float] = {}

    def found(draw: Int[np.ndarray, " sample"]) -> float:
        key = np.sort(draw).tobytes()
        if key not in known:
            known[key] = accuracy(draw)
        return known[key]

    return found


Scale = Literal["growing", "shrinking"]
"""Whether more is better (a time) or less is (an error)."""


def worth(accuracy: float, scale: Scale) -> float:
    """A number that grows with what the accuracy is worth: a time as it is, an error as −ln e.

    In a chaotic flow an error grows like a power of e in time, so that both are linear in the same thing: how far off the start is.

    >>> worth(2.0, "growing"), worth(1.0, "shrinking")
    (2.0, -0.0)
    """
    if scale == "growing" or math.isnan(accuracy):
        return accuracy
    return -math.log(accuracy) if accuracy > 0 else math.inf


class Cost(NamedTuple):
    """What an accuracy costs, or a bound of that.

    "at most": every rung is more accurate than what is wanted; "more than": none is as accurate.
    """

    value: float
    bound: Literal["", "at most", "more than"] = ""


def undominated(rungs: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Of (worth, cost): those that no other is as good as for less, from the cheapest to the dearest.

    >>> undominated([(1.0, 2.0), (0.5, 3.0), (2.0, 5.0)])
    [(1.0, 2.0), (2.0, 5.0)]
    """
    kept: list[tuple[float, float]] = []
    for value, cost in sorted(rungs, key=lambda r: (r[1], -r[0])):
        if not math.isnan(value) and (not kept or value > kept[-1][0]):
            kept.append((value, cost))
    return kept


def cost_on(ladder: Sequence[tuple[float, float]], wanted: float) -> Cost | None:
    """What `wanted` costs on a ladder of (worth, cost), ln cost linear in worth between two rungs; None for a ladder without rungs.

    A rung of unknown worth (∞: it was as good as wanted to the end of its window) is never interpolated to.

    >>> cost_on([(1.0, 1.0), (2.0, 4.0)], 1.5)
    Cost(value=2.0, bound='')
    >>> cost_on([(1.0, 1.0), (2.0, 4.0)], 0.5), cost_on([(1.0, 1.0), (2.0, 4.0)], 3.0)
    (Cost(value=1.0, bound='at most'), Cost(value=4.0, bound='more than'))
    """
    rungs = undominated(ladder)
    if not rungs:
        return None
    if wanted <= rungs[0][0]:
        return Cost(rungs[0][1], "" if wanted == rungs[0][0] else "at most")
    for (low, cheap), (high, dear) in itertools.pairwise(rungs):
        if wanted <= high:
            if math.isinf(high):
                return Cost(dear, "at most") if math.isfinite(wanted) else Cost(dear)
            part = (wanted - low) / (high - low)
            return Cost(cheap * (dear / cheap) ** part)
    return Cost(rungs[-1][1], "more than")


def cheapest(costs: Mapping[str, Cost | None]) -> tuple[str, Cost] | None:
    """(method, cost) of the ladder on which it is cheapest; where none reaches it, the dearest of their last rungs.

    >>> cheapest({"a": Cost(2.0), "b": Cost(1.0, "more than"), "c": None})
    ('a', Cost(value=2.0, bound=''))
    """
    known = {name: cost for name, cost in costs.items() if cost is not None}
    reached = {name: cost for name, cost in known.items() if cost.bound != "more than"}
    if reached:
        return min(reached.items(), key=lambda item: item[1].value)
    return max(known.items(), key=lambda item: item[1].value) if known else None


class Measured(NamedTuple):
    """A run: its accuracy over any starts, and its costs in rounds that were measured in turn with those of the others."""

    label: str
    method: str
    accuracy: Accuracy
    costs: Float[np.ndarray, " round"]


class Interval(NamedTuple):
    """Low end, median, high end."""

    low: float
    median: float
    high: float


class Speedup(NamedTuple):
    """Cost of the rivals at equal accuracy over the cost of the hybrids.

    `best` is the method that is cheapest there; `bound`: "at least" where no rival is as accurate, "at most" where all are more.
    `shares` tells how often each method was the cheapest when starts, rounds and training seeds were drawn again.
    """

    interval: Interval
    best: str
    bound: Literal["", "at least", "at most"]
    shares: dict[str, float]


BOUND = {"": "", "at most": "at most", "more than": "at least"}
"""What a bound of a rival's cost says of the ratio to it."""


def common_bound(bounds: Sequence[str]) -> str:
    """What several values are together: "at least" if some are and none is "at most", and the other way round; else nothing.

    >>> common_bound(["", "at least"]), common_bound(["at most", "at most"]), common_bound(["at least", "at most"])
    ('at least', 'at most', '')
    """
    kinds = set(bounds) - {""}
    return kinds.pop() if len(kinds) == 1 else ""


Rungs = Mapping[str, Sequence[tuple[float, float]]]
"""Method → the (worth, cost) of its rungs, for one draw of starts and rounds."""


def _rungs(ladders: Mapping[str, Sequence[Measured]], starts: np.ndarray, rounds: np.ndarray, scale: Scale) -> Rungs:
    runs = [run for ladder in ladders.values() for run in ladder]
    costs = iter(np.median(np.stack([run.costs for run in runs])[:, rounds], axis=1).tolist()) if runs else iter(())
    return {method: [(worth(run.accuracy(starts), scale), next(costs)) for run in ladder] for method, ladder in ladders.items()}


def _ratio(hybrid: Measured, rungs: Rungs, starts: np.ndarray, rounds: np.ndarray, scale: Scale) -> tuple[float, str, str] | None:
    """(rivals' cost over the hybrid's, method, bound) for one draw of starts and rounds."""
    wanted = worth(hybrid.accuracy(starts), scale)
    if math.isnan(wanted):
        return None
    found = cheapest({method: cost_on(ladder, wanted) for method, ladder in rungs.items()})
    if found is None:
        return None
    method, cost = found
    return cost.value / float(np.median(hybrid.costs[rounds])), method, BOUND[cost.bound]


def speedup(
    hybrids: Sequence[Measured],
    rivals: Sequence[Measured],
    samples: int,
    scale: Scale,
    *,
    resamples: int = 1000,
    seed: int = 0,
) -> Speedup | None:
    """Speed-up at equal accuracy of a closure (one run per training seed) over the cheapest of the rivals' methods.

    Each draw takes as many starts, rounds of timing and training seeds as there are, with repetition, the same for all runs: they
    are paired. Its value is the geometric mean over the seeds. The interval holds the middle 90 % of the draws, the median is that
    of the draws; None where a hybrid was lost or there is no rival.
    """
    ladders: dict[str, list[Measured]] = {}
    for run in rivals:
        ladders.setdefault(run.method, []).append(run)
    rounds = len(hybrids[0].costs)
    whole = np.arange(samples), np.arange(rounds)
    all_rungs = _rungs(ladders, *whole, scale)
    central = [_ratio(hybrid, all_rungs, *whole, scale) for hybrid in hybrids]
    if any(row is None for row in central):
        return None
    # the same starts whatever else is drawn, so that what they give need be found only once
    draws = np.random.default_rng(seed).integers(samples, size=(resamples, samples))
    random = np.random.default_rng(seed + 1)
    values, winners = [], []
    for starts in draws:
        turn = random.integers(rounds, size=rounds)
        rungs = _rungs(ladders, starts, turn, scale)
        drawn = [_ratio(hybrids[i], rungs, starts, turn, scale) for i in random.integers(len(hybrids), size=len(hybrids))]
        good = [row for row in drawn if row is not None]
        if good:
            values.append(math.exp(float(np.mean([math.log(row[0]) for row in good]))))
            winners += [row[1] for row in good]
    low, median, high = np.quantile(values, [(1 - LEVEL) / 2, 0.5, (1 + LEVEL) / 2])
    names = [row[1] for row in central if row is not None]
    bounds = [row[2] for row in central if row is not None]
    best = max(set(names), key=names.count)
    bound = common_bound(bounds)
    shares = {name: winners.count(name) / len(winners) for name in sorted(set(winners))}
    return Speedup(Interval(float(low), float(median), float(high)), best, bound, shares)  # pyright: ignore[reportArgumentType]


def break_even(training_seconds: float, rival: float, hybrid: float) -> float | None:
    """After how many unit times the time for data and training is won back; None where nothing is won.

    >>> break_even(100.0, 0.3, 0.1)
    500.0
    """
    saved = rival - hybrid
    return round(training_seconds / saved, 6) if saved > 0 else None


def verdict(found: Speedup, rivals: str = "the best classical run") -> str:
    """One sentence: whether the closure is above the classical front, below it, or cannot be told from it; a bound decides nothing
    on its open side.

    >>> verdict(Speedup(Interval(1.2, 1.4, 1.7), "spectral", "", {"spectral": 1.0}))
    'above the front: 1.40 times as fast as the best classical run (spectral) at equal accuracy [1.20, 1.70]'
    >>> verdict(Speedup(Interval(0.5, 0.7, 0.9), "spectral", "at least", {"spectral": 1.0}))
    'beyond the ladders: not all of its accuracy is reached; at least 0.70 times the speed of the best ...'
    >>> verdict(Speedup(Interval(1.1, 1.3, 1.5), "spectral", "at most", {"spectral": 1.0}))
    'short of the ladders: they begin above it; at most 1.30 times the speed of the best classical run (spectral) [1.10, 1.50]'
    """
    low, median, high = found.interval
    rival = f"{rivals} ({found.best}) at equal accuracy"
    value, span = f"{found.bound} {median:.2f}".strip(), f"[{low:.2f}, {high:.2f}]"
    if low > 1 and found.bound != "at most":
        return f"above the front: {value} times as fast as {rival} {span}"
    if high < 1 and found.bound != "at least":
        return f"below the front: no gain, {value} of the speed of {rival} {span}"
    if found.bound == "at least":
        return f"beyond the ladders: not all of its accuracy is reached; {value} times the speed of {rivals} ({found.best}) {span}"
    if found.bound == "at most":
        return f"short of the ladders: they begin above it; {value} times the speed of {rivals} ({found.best}) {span}"
    return f"on the front: {value} times the speed of {rival}, not told from 1 {span}"
