"""The time step of a run: the largest that leaves its accuracy as it is, and the largest that lasts a long run too.

A rival with a step that is smaller than it needs would make every closure look good. So each rung of a ladder steps as far as it
can: all of them are tried at whole numbers of steps per frame, and what counts is the same accuracy that is compared later.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from hybridsim.fronts import Scale
from hybridsim.signals import STOP

if TYPE_CHECKING:
    from hybridsim.config import Experiment

TOLERANCE = 0.02
"""How much of its accuracy a run may lose to a larger time step."""

FINER = 2**0.25
"""How much more steps per frame are taken from one trial to the next."""

DOUBLINGS = 3
"""How often the steps are halved in search of one that is stable at all."""


def as_good(value: float, converged: float, scale: Scale, tolerance: float = TOLERANCE) -> bool:
    """Whether an accuracy is the converged one within the tolerance, or better; a time that was not crossed is ∞, a lost run NaN.

    >>> as_good(1.97, 2.0, "growing"), as_good(1.95, 2.0, "growing"), as_good(0.101, 0.1, "shrinking")
    (True, False, True)
    """
    if math.isnan(value) or math.isnan(converged):
        return False
    if scale == "growing":
        return value >= (1 - tolerance) * converged
    return value <= (1 + tolerance) * converged


def finer(n: int) -> int:
    """The next number of steps per frame after n.

    >>> [finer(n) for n in (1, 2, 7, 20)]
    [2, 3, 8, 24]
    """
    return max(n + 1, round(FINER * n))


def coarser(n: int) -> int:
    """The number of steps per frame before n, at least 1.

    >>> [coarser(n) for n in (2, 3, 8, 24)]
    [1, 2, 7, 20]
    """
    return max(1, min(n - 1, round(n / FINER)))


@dataclass
class Tuned:
    """Steps per frame by both rules, and everything that was tried.

    - `steps`: the fewest that keep the accuracy; None where no number of them was stable.
    - `long_steps`: the fewest from there on that last the long run; None without that rule, or where none does.
    - `accuracy`: steps → what was reached with them, NaN where a start was lost.
    - `lasted`: steps → how long they were stable in the long run.
    """

    steps: int | None
    long_steps: int | None = None
    accuracy: dict[int, float] = field(default_factory=dict)
    lasted: dict[int, float] = field(default_factory=dict)


def fewest_steps(given: int, accuracy: Callable[[int], float], scale: Scale, tolerance: float = TOLERANCE) -> Tuned:
    """The fewest steps per frame with which the accuracy is that of twice the `given` ones, within the tolerance.

    Where the given ones do, fewer are tried, one after the other, until they do no longer; else more of them.

    >>> error = lambda n: 0.1 * (1 + 1 / n**2)  # two per cent more than with ten steps: five are too few
    >>> fewest_steps(5, error, "shrinking").steps
    6
    """
    found: dict[int, float] = {}

    def at(n: int) -> float:
        if n not in found:
            found[n] = accuracy(n)
        return found[n]

    n = given
    for _ in range(DOUBLINGS):
        if not math.isnan(at(2 * n)):
            break
        n *= 2
    else:
        return Tuned(None, accuracy=found)
    converged, most = at(2 * n), 2 * n
    if as_good(at(n), converged, scale, tolerance):
        while n > 1 and as_good(at(coarser(n)), converged, scale, tolerance):
            n = coarser(n)
    else:
        while n < most and not as_good(at(n), converged, scale, tolerance):
            n = min(finer(n), most)
    return Tuned(n, accuracy=found)


def fewest_lasting(tuned: Tuned, lasted: Callable[[int], float], time: float) -> Tuned:
    """`tuned` with the fewest steps, not fewer than its own, that are stable for `time`; four times as many are the most tried."""
    if tuned.steps is None:
        return tuned
    n, found = tuned.steps, {}
    while n <= 4 * tuned.steps:
        found[n] = lasted(n)
        if found[n] >= time:
            return Tuned(tuned.steps, n, tuned.accuracy, found)
        n = finer(n)
    return Tuned(tuned.steps, None, tuned.accuracy, found)


# --- trials ----------------------------------------------------------------------------------------------------------------------


def frames_of_trial(experiment: "Experiment", label: str, steps: int, starts: np.ndarray) -> np.ndarray | None:
    """`(sample, frame, c, *grid)` of a run with so many steps per frame, its starts first; None where one of them was lost."""
    kept: list[np.ndarray] = []

    def watch(u: np.ndarray) -> bool:
        kept.append(u)
        return bool(np.isfinite(u).all())

    frames = experiment.spec.time.frames
    return np.stack(kept, axis=1) if advance(experiment, label, steps, starts, frames, watch) == frames else None


def lasts(experiment: "Experiment", label: str, steps: int, starts: np.ndarray, time: float) -> float:
    """How long a run with so many steps per frame stays finite with all its starts, at most `time`."""
    interval = experiment.spec.time.end / experiment.spec.time.frames
    frames = math.ceil(time / interval * (1 - 1e-9))
    good = advance(experiment, label, steps, starts, frames, lambda u: bool(np.isfinite(u).all()))
    return time if good == frames else good * interval


class _Stop(Exception):
    """A trial need not go on."""


def advance(
    experiment: "Experiment", label: str, steps: int, starts: np.ndarray, frames: int, watch: Callable[[np.ndarray], bool]
) -> int:
    """Steps all starts together and shows every frame, the starts too, to `watch`, which says whether it is good; how many were.

    The starts do not count. Runs without closures share one program for all numbers of steps.
    """
    import jax
    import jax.numpy as jnp

    from hybridsim.experiment import stretch
    from hybridsim.reference import FineRunError, fine_run

    interval = experiment.spec.time.end / experiment.spec.time.frames
    model = experiment.model_for(label, dt=interval / steps)
    u = jnp.asarray(starts, experiment.dtype(label))
    good = 0
    if model.closures:
        if steps % model.substeps:
            raise ValueError(f"{label}: {steps} steps per frame are no whole number of model steps")
        keys = jax.random.split(jax.random.key(experiment.spec.samples.seed), len(starts))
        watch(np.asarray(u))
        for frame in stretch(model, u, keys, steps // model.substeps, frames):
            STOP.check()
            if not watch(frame):
                break
            good += 1
        return good

    def look(frame: int, q: Any) -> None:
        nonlocal good
        STOP.check()
        if not watch(np.asarray(q)):
            raise _Stop
        good = frame

    try:
        fine_run(model.solver, model.stepper, u, interval, frames, look, dt=interval / steps)
    except (FineRunError, _Stop):
        return good
    return frames
