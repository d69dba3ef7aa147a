"""R11 and R12: a folder has one owner, a reader sees whole files, and a second process computes the same bits."""

import os
import subprocess
import sys
import warnings

import numpy as np
import pytest
from commands import complaint

from hybridsim import storage


@pytest.mark.reliability("R11")
@pytest.mark.parametrize("name", ["run", pytest.param("train", marks=pytest.mark.slow)])
def test_the_second_of_two_is_refused_with_the_owners_process(command, tmp_path, name):
    it, place = command(name), tmp_path / "case"
    it.prepare(place)
    with storage.FolderLock(place / "out"):
        before = sorted(p.name for p in (place / "out").iterdir())
        found = it.start(place)
        assert found.code == 2
        assert not complaint(found)
        assert f"process {os.getpid()}" in found.err
        assert sorted(p.name for p in (place / "out").iterdir()) == before
    assert it.resume(place).code == 0
    assert not it.differences(place)


WRITER = """
import sys, itertools, warnings
import numpy as np, xarray as xr
from hybridsim import storage
folder = storage.Path(sys.argv[1])
checkpoints = storage.Checkpoints(folder / "c")
for n in itertools.count(1):
    full = np.full((4, 30, 200), float(n))
    storage.save_dataset(folder / "run.nc", xr.Dataset({"u": (("a", "b", "c"), full), "n": ((), n)}))
    checkpoints.save(n, {"u": full, "n": n})
    storage.write_json(folder / "summary.json", {"n": n, "text": "x" * 5000, "again": n})
    if n == 1:
        print("begun", flush=True)
"""


@pytest.mark.reliability("R11")
@pytest.mark.parametrize("count", [150, pytest.param(5_000, marks=pytest.mark.slow)])
def test_a_reader_sees_whole_files_while_a_writer_writes(tmp_path, count, reliability):
    writer = subprocess.Popen([sys.executable, "-c", WRITER, str(tmp_path)], stdout=subprocess.PIPE)
    assert writer.stdout is not None
    like, seen, wrong, passed = {"u": np.zeros((4, 30, 200)), "n": 0}, set(), [], 0
    try:
        writer.stdout.readline()
        for _ in range(count):
            ds = storage.open_dataset(tmp_path / "run.nc")
            if not (ds["u"].values == float(ds["n"])).all():
                wrong.append("run.nc")
            told = storage.read_json(tmp_path / "summary.json") if (tmp_path / "summary.json").exists() else {"n": 0, "again": 0}
            if told["n"] != told["again"]:
                wrong.append("summary.json")
            with warnings.catch_warnings():
                # the one that was read is gone when its turn comes: passed over, never half of one
                warnings.simplefilter("ignore", storage.StorageWarning)
                try:
                    found = storage.Checkpoints(tmp_path / "c").latest(like)
                except storage.StorageError:
                    passed += 1
                    continue
            if found is not None and not (found[1]["u"] == found[0]).all():
                wrong.append("checkpoint")
            seen.add(int(ds["n"]))
    finally:
        writer.kill()
        writer.wait()
        writer.stdout.close()
    reliability("R11", not wrong, ", ".join(wrong), cases=count, failed=len(wrong))
    assert not wrong
    assert len(seen) > 3
    assert passed < count / 2


@pytest.mark.reliability("R12")
@pytest.mark.parametrize("name", ["run", pytest.param("train", marks=pytest.mark.slow)])
def test_two_processes_compute_the_same_bits(command, tmp_path, name):
    """Nothing is shared: data are made and programs compiled anew."""
    it, place = command(name), tmp_path / "case"
    it.prepare(place, warm=False)
    assert it.start(place).code == 0
    assert not it.differences(place)


@pytest.mark.slow
@pytest.mark.reliability("R12")
def test_two_processes_with_two_devices_compute_the_same_bits(tmp_path):
    """As from the shell, with all that the command line switches on."""
    from commands import RUN, differences

    (tmp_path / "case.yaml").write_text(RUN)
    for name in ("one", "two"):
        words = [sys.executable, "-m", "hybridsim.cli", "run", "case.yaml", "--out", name]
        environment = {**os.environ, "HYBRIDSIM_CACHE": str(tmp_path / f"cache-{name}")}
        done = subprocess.run(words, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
    found = [d for d in differences(tmp_path / "one", tmp_path / "two") if "summary" not in d]
    assert not found
