"""Costs measured in turn: what slows the machine for a while slows all programs, as they take turns round after round."""

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from jaxtyping import Float

SHORTEST_TURN = 0.02
"""Seconds that a turn takes at least: the clock and the call cost nothing beside it."""


@dataclass(frozen=True)
class Program:
    """A compiled stretch of a run from one start, to be executed again and again.

    - `span`: the time that it covers, in the units of the run.
    - `memory`: bytes that it holds while it runs, arguments and results included; 0 where the compiler does not say.
    """

    compiled: Any
    arguments: tuple[Any, ...]
    span: float
    memory: float = 0.0

    def execute(self) -> None:
        jax.block_until_ready(self.compiled(*self.arguments))


def held_by(compiled: Any) -> float:
    """Bytes that a compiled program holds: arguments, results and what it works with; 0 where that is not known."""
    compiled = getattr(compiled, "compiled", compiled)  # what equinox wraps
    try:
        found = compiled.memory_analysis()
        return float(found.argument_size_in_bytes + found.output_size_in_bytes + found.temp_size_in_bytes)
    except (AttributeError, NotImplementedError, jax.errors.JaxRuntimeError):
        return 0.0


def in_turn(
    programs: Mapping[str, Program],
    rounds: int,
    tell: Callable[[float], None] = lambda _: None,
    *,
    fewest: int | None = None,
    seconds: float = math.inf,
    shortest: float = SHORTEST_TURN,
) -> dict[str, Float[np.ndarray, " round"]]:
    """Seconds per unit time of every program in every round; each round begins with another one.

    Each is executed twice before, which is not counted, and in its turn as often as it takes to fill `shortest` seconds. The rounds
    end early, but not before the `fewest`, when all of them have taken `seconds`. `tell` is told how much is done, between rounds.
    """
    labels = list(programs)
    often: dict[str, int] = {}
    for label, program in programs.items():
        program.execute()
        begin = time.perf_counter()
        program.execute()
        often[label] = max(1, math.ceil(shortest / max(time.perf_counter() - begin, 1e-9)))
    found: dict[str, list[float]] = {label: [] for label in labels}
    start = time.perf_counter()
    for i in range(rounds):
        first = i % len(labels)
        for label in labels[first:] + labels[:first]:
            begin = time.perf_counter()
            for _ in range(often[label]):
                programs[label].execute()
            found[label].append((time.perf_counter() - begin) / (often[label] * programs[label].span))
        tell((i + 1) / rounds)
        if i + 1 >= (rounds if fewest is None else fewest) and time.perf_counter() - start > seconds:
            break
    return {label: np.array(values) for label, values in found.items()}
