"""R1 and R3: killed or asked to stop at any instant, runs, trainings, sweeps and benchmarks resume to the same bits."""

import signal
import zlib

import numpy as np
import pytest
from commands import complaint, leftovers

STATE = ("/state/", "/training/seed-", "/unfinished/")


def checkpoint_calls(done):
    """Numbers of the calls that write a checkpoint, its frames or its manifest."""
    return [c["call"] for c in done.calls if any(s in c["path"] for s in STATE) and c["kind"] != "remove"]


def draw(done, rng, number, when=("before", "half", "after")):
    """(fault, seconds): at a call of the writer, half of them while a checkpoint is written, else at an instant from outside."""
    kind = number % 4
    if kind in (0, 2):
        return {"at": int(rng.choice(checkpoint_calls(done))), "when": str(rng.choice(when))}, None
    if kind == 1:
        # the loop itself lasts a moment only; slower calls make it a fair part of the whole
        slow = 0.005
        return {"slow": slow}, float(rng.uniform(0.1, done.seconds + slow * len(done.calls)))
    return {"at": int(rng.integers(1, len(done.calls) + 1)), "when": str(rng.choice(when))}, None


def resumed(command, place):
    """(what is wrong after resuming, the resumed command)."""
    done = command.resume(place)
    if done.code != 0:
        return [f"does not resume: {done.code} {done.err}"], done
    return command.differences(place) + [f"left: {name}" for name in leftovers(place / "out")], done


def killed(command, place, rng, number):
    """One case: what was wrong, or nothing; None if it ended before it was killed."""
    # every fifth begins with an empty cache, so that data and compiled programs are written under fire too
    warm = number % 5 != 4
    command.prepare(place, warm=warm)
    fault, after = draw(command.warm if warm else command.done, rng, number)
    found = command.start(place, fault={"do": "kill", **fault} if after is None else fault, after=after)
    if found.code != -signal.SIGKILL:
        return None if found.code == 0 else f"exit code {found.code} before the kill: {found.err}"
    wrong = command.unwhole(place)
    if rng.random() < 0.3:
        # and once more while it resumes
        fault, after = draw(command.warm, rng, 0)
        command.resume(place, fault={"do": "kill", **fault})
        wrong += command.unwhole(place)
    return "; ".join(wrong + resumed(command, place)[0])


def campaign(command, tmp_path, seed, count, one, row, reliability):
    """`count` cases of one kind; those that ended too early are drawn again."""
    # str hashes differ from process to process
    rng = np.random.default_rng([seed, zlib.crc32(command.name.encode())])
    failures, done, number = [], 0, 0
    while done < count and number < 3 * count + 10:
        wrong = one(command, tmp_path / f"{number}", rng, number)
        if wrong is not None:
            done += 1
            reliability(row, not wrong, wrong and f"{command.name} {number}: {wrong}")
            failures += [f"{number}: {wrong}"] * bool(wrong)
        number += 1
    assert done == count
    assert not failures, "\n".join(failures)


@pytest.mark.reliability("R1")
@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("run", 2),
        pytest.param("train", 2, marks=pytest.mark.slow),
        pytest.param("run", 130, marks=pytest.mark.slow),
        pytest.param("train", 70, marks=pytest.mark.slow),
        *(pytest.param(name, 12, marks=pytest.mark.slow) for name in ("runs", "trainings", "bench")),
    ],
)
def test_kill_9_and_resume(command, tmp_path, name, count, reliability, how_many):
    count = how_many(count) if count > 10 else count
    campaign(command(name), tmp_path, count, count, killed, "R1", reliability)


def stopped(command, place, rng, number):
    """One case: asked to stop by SIGTERM or SIGINT; None if it ended before it noticed."""
    warm = number % 5 != 4
    command.prepare(place, warm=warm)
    asked = (signal.SIGTERM, signal.SIGINT)[number % 2]
    fault, after = draw(command.warm if warm else command.done, rng, number // 2, when=("before", "after"))
    kind = {"signal": int(asked)}
    found = command.start(place, fault={**fault, **kind} if after is not None else {"do": "signal", **fault, **kind}, after=after)
    if found.code == 0:
        return None
    wrong = []
    if found.code != 128 + asked:
        wrong += [f"exit code {found.code} after signal {int(asked)}: {found.err}"]
    elif complaint(found).startswith(("a traceback", "0 lines")) or "--resume" not in found.err:
        wrong += [f"says {found.err!r}"]
    chunks = {(s["folder"], s["step"]) for s in found.saved_after_signal}
    if len(chunks) > 2:
        wrong += [f"went on for {len(chunks)} chunks after it was asked to stop"]
    wrong += command.unwhole(place)
    before = {(s["folder"], s["step"]) for s in found.saved}
    wrong_after, done = resumed(command, place)
    again = before & {(s["folder"], s["step"]) for s in done.saved}
    if again:
        wrong += [f"computed again what was saved: {sorted(again)}"]
    return "; ".join(wrong + wrong_after)


@pytest.mark.reliability("R3")
@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("run", 1),
        pytest.param("run", 34, marks=pytest.mark.slow),
        pytest.param("train", 16, marks=pytest.mark.slow),
        *(pytest.param(name, 3, marks=pytest.mark.slow) for name in ("runs", "trainings", "bench")),
    ],
)
def test_stopped_and_resumed(command, tmp_path, name, count, reliability, how_many):
    count = how_many(count) if count > 10 else count
    campaign(command(name), tmp_path, 1000 + count, count, stopped, "R3", reliability)


def hurried(command, place, rng, number):
    """One case: Ctrl-C, and again at once, so that no chunk is waited for; None if it ended before."""
    command.prepare(place)
    fault, _ = draw(command.warm, rng, 3 * (number % 2))
    found = command.start(place, fault={"do": "signal", "signal": int(signal.SIGINT), "times": 2, **fault})
    if found.code == 0:
        return None
    wrong = [] if found.code == 130 else [f"exit code {found.code}"]
    if "Traceback" in found.err:
        wrong += [f"says {found.err!r}"]
    wrong += command.unwhole(place)
    return "; ".join(wrong + resumed(command, place)[0])


@pytest.mark.reliability("R3")
@pytest.mark.slow
@pytest.mark.parametrize(("name", "count"), [("run", 16), ("train", 8), ("runs", 4), ("bench", 4)])
def test_a_second_ctrl_c_does_not_wait_and_loses_nothing_saved(command, tmp_path, name, count, reliability, how_many):
    campaign(command(name), tmp_path, 2000 + count, min(count, how_many(count)), hurried, "R3", reliability)


@pytest.mark.reliability("R1")
@pytest.mark.parametrize("count", [2, pytest.param(100, marks=pytest.mark.slow)])
def test_killed_while_the_state_of_a_finished_run_is_removed(command, tmp_path, count, reliability):
    """All results are there, and some of the state is gone: that must not stand in the way of a resume."""
    it, rng, failures = command("run"), np.random.default_rng(count), []
    last = [c for c in it.warm.calls if c["kind"] == "remove"]
    last = last[max(i for i, c in enumerate(last) if "/" in c["path"]) + 1 :] or last[-1:]
    for i in rng.permutation(len(last))[:count]:
        place = tmp_path / f"{i}"
        it.prepare(place)
        found = it.start(place, fault={"do": "kill", "at": last[i]["call"], "when": "after"})
        assert found.code == -signal.SIGKILL
        done = it.resume(place)
        wrong = it.differences(place) if done.code == 0 else [done.err.strip()]
        reliability("R1", not wrong, "; ".join(wrong))
        failures += wrong
    assert not failures, "\n".join(failures)
