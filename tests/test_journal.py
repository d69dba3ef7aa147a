"""Pieces and states together: nothing that was saved is lost, nothing that is damaged is used, and saving stays cheap."""

import numpy as np
import pytest

from hybridsim import journal as journals
from hybridsim import storage
from hybridsim.journal import Cadence, Journal
from hybridsim.signals import STOP

LIKE = {"z": np.zeros(3)}


def filled(folder, steps=(2, 4, 6)):
    """A journal with a save after every second piece."""
    journal = Journal(folder, every=0.0)
    for step in range(1, steps[-1] + 1):
        journal.add({"u": np.full((1, 2), float(step))})
        if step in steps:
            journal.save(step, {"z": np.full(3, float(step))}, {"note": step})
    return journal


def read(folder):
    journal = Journal(folder)
    found = journal.latest(LIKE)
    assert found is not None
    step, state, meta = found
    assert meta["note"] == step
    np.testing.assert_array_equal(state["z"], float(step))
    assert [float(p["u"][0, 0]) for p in journal.pieces] == list(range(1, step + 1))
    return journal, step


def test_pieces_and_states_come_back_together(tmp_path):
    filled(tmp_path)
    journal, step = read(tmp_path)
    assert step == 6
    journal.add({"u": np.full((1, 2), 7.0)})
    journal.save(7, {"z": np.full(3, 7.0)}, {"note": 7})
    assert read(tmp_path)[1] == 7


def test_nothing_saved_is_nothing(tmp_path):
    assert Journal(tmp_path / "new").latest(LIKE) is None
    in_memory = Journal(None, every=0.0)
    in_memory.add({"u": np.zeros(2)})
    assert not in_memory.due()
    in_memory.save(1, LIKE)
    assert in_memory.latest(LIKE) is None
    assert len(in_memory.pieces) == 1


def flip(path):
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("damage", ["checkpoints/000000000006.safetensors", "frames-000000000004.safetensors"])
@pytest.mark.parametrize("how", ["flipped", "gone"])
def test_what_is_damaged_is_passed_over_for_the_one_before(tmp_path, damage, how):
    filled(tmp_path)
    path = tmp_path / damage
    if how == "flipped":
        flip(path)
    else:
        path.unlink()
    with pytest.warns(storage.StorageWarning, match="going on from the checkpoint of step 4"):
        journal, step = read(tmp_path)
    assert step == 4
    # and what follows takes the place of what was damaged, with other bounds too
    journal.add({"u": np.full((1, 2), 5.0)})
    journal.save(5, {"z": np.full(3, 5.0)}, {"note": 5})
    assert read(tmp_path)[1] == 5


def test_where_the_first_frames_are_lost_nothing_is_taken(tmp_path):
    filled(tmp_path)
    flip(tmp_path / "frames-000000000000.safetensors")
    with pytest.raises(storage.StorageError, match="no checkpoint can be used; start again without resuming"):
        Journal(tmp_path).latest(LIKE)


def test_frames_under_another_name_are_noticed(tmp_path):
    filled(tmp_path)
    first, second = (tmp_path / f"frames-{n:012d}.safetensors" for n in (2, 4))
    second.write_bytes(first.read_bytes())
    with pytest.warns(storage.StorageWarning, match="holds other frames than its name says"):
        assert read(tmp_path)[1] == 4


def test_clearing_forgets_everything(tmp_path):
    journal = filled(tmp_path / "here")
    journal.clear()
    assert not (tmp_path / "here").exists()
    assert journal.pieces == []
    journal.add({"u": np.full((1, 2), 1.0)})
    journal.save(1, {"z": np.ones(3)}, {"note": 1})
    assert read(tmp_path / "here")[1] == 1


def test_saving_takes_a_small_share_of_the_time(monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(journals.time, "monotonic", lambda: clock[0])
    cadence, spent = Cadence(10.0), 0.0
    for _ in range(4000):
        clock[0] += 1.0
        if cadence.due():
            clock[0] += 3.0  # a dear one: three seconds each
            spent += 3.0
            cadence.saved(3.0)
    assert 0 < spent / clock[0] <= 1.05 * journals.SHARE  # the first one comes before its price is known
    with pytest.raises(ValueError, match=r"every: -1.0 seconds; 0 or more are possible"):
        Cadence(-1.0)


def test_a_signal_makes_a_save_due():
    cadence = Cadence(1000.0)
    assert not cadence.due()
    STOP.wants_save = True
    assert cadence.due()
    assert not STOP.wants_save
    STOP.wants_save = True  # while that one is saved: the next is due, too
    cadence.saved(0.0)
    assert cadence.due()
    assert not cadence.due()


def test_a_journal_of_a_cache_forgives(tmp_path, monkeypatch):
    filled(tmp_path)
    flip(tmp_path / "frames-000000000000.safetensors")
    journal = Journal(tmp_path, every=0.0, forgiving=True)
    with pytest.warns(storage.StorageWarning, match="making it anew"):
        assert journal.latest(LIKE) is None
    assert not tmp_path.exists()

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(storage.os, "fsync", full)
    journal.add({"u": np.zeros(2)})
    assert journal.due()
    with pytest.warns(storage.StorageWarning, match="the disk is full.*; going on without saving"):
        journal.save(1, LIKE)
    assert not journal.due()
    assert len(journal.pieces) == 1
