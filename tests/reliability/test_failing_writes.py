"""R2: every call of the writer may fail: one line with the path and the way out, the last checkpoint whole, a resume to the bit."""

import errno
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from commands import complaint, differences, half_written, leftovers, make_command
from forked import Forked

ERRORS = {"open": (errno.ENOSPC, errno.EACCES, errno.EIO), "netcdf": (errno.ENOSPC, errno.EIO)}
USUAL = (errno.ENOSPC, errno.EIO)


def fault_at(call, rng):
    """A fault for one call: an error, at times after half of the data, or a write that is short without saying so."""
    if call["kind"] == "write" and rng.random() < 0.3:
        return {"do": "short", "at": call["call"]}
    code = int(rng.choice(ERRORS.get(call["kind"], USUAL)))
    when = "half" if call["kind"] in ("write", "netcdf") and rng.random() < 0.5 else "before"
    # a full disk stays full; a device may recover
    return {
        "do": "error",
        "at": call["call"],
        "errno": code,
        "on": int(rng.choice([0, 1])) if code == errno.ENOSPC else 1,
        "when": when,
    }


def failed(command, place, fault, call):
    """One case: what was wrong, or nothing."""
    command.prepare(place)
    cached = "/cache/" in call["path"]
    found = command.start(place, fault=fault)
    wrong = []
    if found.code != 0:
        wrong += [text for text in [complaint(found)] if text]
    elif not cached and not any(c["call"] == fault["at"] for c in found.calls):
        return None
    elif not cached and call["kind"] != "log":
        # without a line of its log a command is as good
        wrong += [f"exit code 0 although {call['kind']} of {call['path']} failed: {found.err}"]
    wrong += command.unwhole(place)
    if call["kind"] != "remove":  # what cannot be removed stays, out of sight
        wrong += [f"left: {name}" for name in leftovers(place)]
    done = command.resume(place)
    if done.code != 0:
        return f"does not resume: {done.code} {done.err} {wrong}"
    wrong += [f"left after resuming: {name}" for name in leftovers(place)]
    return "; ".join([*wrong, *command.differences(place)])


@pytest.mark.reliability("R2")
@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("run", 2),
        pytest.param("run", 10_000, marks=pytest.mark.slow),
        pytest.param("train", 10_000, marks=pytest.mark.slow),
    ],
)
def test_every_call_of_the_writer_may_fail(command, tmp_path, name, count, reliability, how_many):
    """All calls of a run, or a few of each kind; of a training, where they repeat themselves, one in eight."""
    count = how_many(count) if count > 10 else count
    it, rng = command(name), np.random.default_rng(count)
    calls = it.warm.calls if name == "run" else it.warm.calls[::8]
    if count < len(calls):
        by_kind = {kind: [c for c in calls if c["kind"] == kind] for kind in sorted({c["kind"] for c in calls})}
        calls = [rng.choice(list(by_kind.values())[i % len(by_kind)]) for i in range(count)]
    failures = []
    for i, call in enumerate(calls):
        fault = fault_at(call, rng)
        wrong = failed(it, tmp_path / f"{i}", fault, call)
        if wrong is None:
            continue
        shutil.rmtree(tmp_path / f"{i}")  # hundreds of them
        reliability("R2", not wrong, wrong and f"{name} {call['kind']} {call['path']} {fault}: {wrong}")
        failures += [f"{call['kind']} {call['path']} {fault}: {wrong}"] * bool(wrong)
    assert not failures, "\n".join(failures)


@pytest.mark.reliability("R2")
@pytest.mark.parametrize(
    "largest", [2_000, pytest.param(6_000, marks=pytest.mark.slow), pytest.param(20_000, marks=pytest.mark.slow)]
)
def test_files_beyond_the_limit_of_the_system(command, tmp_path, largest):
    """A real fault inside a write: no file may be longer than so many bytes."""
    it, place = command("run"), tmp_path / "case"
    it.prepare(place)
    found = it.start(place, largest=largest)
    assert not complaint(found)
    assert not it.unwhole(place)
    assert not leftovers(place)
    assert it.resume(place).code == 0
    assert not it.differences(place)


def may_mount():
    words = ["unshare", "-rm", "sh", "-c", "mount -t tmpfs -o size=64k tmpfs /mnt"]
    try:
        return subprocess.run(words, capture_output=True, check=False).returncode == 0
    except OSError:
        return False


@pytest.mark.slow
@pytest.mark.reliability("R2")
def test_a_full_disk(tmp_path, reliability):
    """A file system of its own that is too small by more and more, then is given space: nothing is lost."""
    if not may_mount():
        pytest.skip("no file system can be mounted here")
    disk = tmp_path / "disk"
    disk.mkdir()
    prefix = ("unshare", "-rm", "sh", "-c", f'mount -t tmpfs -o size=200m tmpfs {disk} && exec "$@"', "sh")
    server = Forked(prefix)
    failures, refused = [], 0
    try:
        root = f"/proc/{server.process}/root"
        seen = Path(root + str(disk))
        whole = make_command("run", server, tmp_path / "uninterrupted")
        for i, free in enumerate(np.random.default_rng(5).integers(4, 120, 20)):
            case = tmp_path / f"{i}"
            whole.prepare(case)
            assert server.shell(f"rm -rf {disk}/out && mount -o remount,size={int(free) * 4}k {disk}") == 0
            words = ["run", "case.yaml", "--out", str(disk / "out")]
            found = server.run(words, case, cache=case / "cache")
            refused += found.code != 0
            wrong = [text for text in [complaint(found)] if text] if found.code else []
            wrong += [*half_written(seen / "out"), *leftovers(seen / "out")]
            assert server.shell(f"mount -o remount,size=200m {disk}") == 0
            done = server.run([*words, "--resume"], case, cache=case / "cache")
            wrong += [f"does not resume: {done.err}"] if done.code else differences(whole.folder / "out", seen / "out")
            text = "; ".join(wrong)
            reliability("R2", not wrong, text and f"{int(free) * 4} KiB: {text}")
            failures += [f"{int(free) * 4} KiB: {text}"] * bool(wrong)
    finally:
        server.close()
    assert refused > 9
    assert not failures, "\n".join(failures)
