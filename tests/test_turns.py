"""Costs measured in turn."""

import time

import numpy as np

from hybridsim.turns import Program, in_turn


def test_every_program_has_its_turn_in_every_round():
    calls = []

    class Counted(Program):
        def execute(self):
            calls.append(self.compiled)

    programs = {label: Counted(label, (), 2.0) for label in "abc"}
    found = in_turn(programs, 6, shortest=1e-12)
    assert calls[:6] == ["a", "a", "b", "b", "c", "c"]  # not counted
    rounds = np.array(calls[6:]).reshape(6, 3)
    assert [sorted(row) for row in rounds.tolist()] == [["a", "b", "c"]] * 6
    assert rounds[:, 0].tolist() == ["a", "b", "c"] * 2
    assert {len(times) for times in found.values()} == {6}


def test_a_turn_lasts_long_enough_and_rounds_end_in_time():
    class Slow(Program):
        def execute(self):
            time.sleep(self.compiled)

    found = in_turn({"a": Slow(0.002, (), 1.0), "b": Slow(0.02, (), 4.0)}, 100, fewest=2, seconds=0.01, shortest=0.01)
    assert len(found["a"]) == len(found["b"]) == 2
    assert 0.002 <= found["a"].min() < 0.02
    assert 0.005 <= found["b"].min() < 0.05
    told = []
    in_turn({"a": Slow(0.0, (), 1.0)}, 4, told.append, shortest=1e-12)
    assert told == [0.25, 0.5, 0.75, 1.0]
