"""What a run needs is counted from shapes, and refused with numbers where the machine has less."""

import math

import pytest

from hybridsim import estimates
from hybridsim.config import experiment_from
from hybridsim.estimates import Need, check_need, need_of, need_of_training
from hybridsim.storage import StorageError

CASE = {
    "equation": {"use": "navier_stokes", "viscosity": 1e-2, "forcing": "kolmogorov"},
    "domain": {"lengths": [2 * math.pi, 2 * math.pi]},
    "initial": {"use": "random_velocity", "peak_wavenumber": 3.0, "max_speed": 2.0},
    "samples": {"count": 3, "seed": 7},
    "time": {"end": 1.0, "frames": 9, "statistics_from": 0.5},
    "reference": {"solver": "spectral", "shape": [32, 32], "precision": "float64"},
    "runs": {
        "bare": {"solver": "spectral", "shape": [16, 16], "dt": 0.05},
        "learned": {"solver": "finite_volume", "shape": [16, 16], "dt": 0.1, "corrections": [{"use": "learned_flux", "width": 4}]},
    },
    "train": {
        "run": "learned",
        "data": {"trajectories": 6, "validation": 2, "time": 1.0, "validation_time": 2.0, "interval": 0.1, "seed": 1},
        "unroll": [1],
        "updates": [1],
    },
}


def case(tmp_path, **changes):
    return experiment_from({**CASE, **changes}, tmp_path / "case.yaml")


def test_frames_are_counted(tmp_path):
    need = need_of(case(tmp_path))
    # 3 starts × 10 frames × 2 velocities × 16² cells, in double precision under two filters
    kept = 3 * 3 * 10 * 2 * 256 * 8  # two groups, and one of them at half the resolution
    written = 2 * 3 * 10 * 2 * 256 * 4  # two runs in single precision
    assert need.disk == 2 * written + kept
    assert need.cache == 2 * kept + 4 * 3 * 2 * 32**2 * 8
    assert need.memory > kept + written
    twice = need_of(case(tmp_path, samples={"count": 6, "seed": 7}))
    assert twice.disk == 2 * need.disk
    assert twice.memory == pytest.approx(2 * need.memory)


def test_data_of_a_training_are_counted(tmp_path):
    need = need_of_training(case(tmp_path))
    assert need.cache == 2 * (6 * 11 + 2 * 21) * 2 * 256 * 4
    from_disk = {**CASE["train"], "data": {**CASE["train"]["data"], "store": "zarr", "together": 2}}
    assert need_of_training(case(tmp_path, train=from_disk)).memory < need.memory


@pytest.mark.parametrize(
    ("need", "sentence"),
    [
        (Need(3e9, 0.0, 0.0), r"there: this needs about 2\.79 GiB of memory, and the machine has 1 GiB; choose fewer frames"),
        (Need(1.0, 3e9, 0.0), r"there: this run needs about 2\.79 GiB of disk, and 1 GiB are free; .* choose another --out"),
    ],
)
def test_what_the_machine_does_not_have_is_refused_with_numbers(tmp_path, monkeypatch, need, sentence):
    monkeypatch.setattr(estimates, "machine_memory", lambda: 2.0**30)
    monkeypatch.setattr(estimates, "free_disk", lambda _: 2.0**30)
    with pytest.raises(StorageError, match=sentence):
        check_need(need, tmp_path / "there")


def test_a_cache_without_room_is_spoken_of_and_what_is_written_is_not_asked_for_again(tmp_path, monkeypatch):
    monkeypatch.setattr(estimates, "free_disk", lambda place: 1000.0 if place == tmp_path / "there" else 1.0)
    assert "; the cache may want 9.54e-05 MiB and has " in check_need(Need(1.0, 1.0, 100.0), tmp_path / "there")
    state = tmp_path / "state"
    state.mkdir()
    (state / "frames").write_bytes(bytes(600))
    with pytest.raises(StorageError, match="of disk"):
        check_need(Need(1.0, 1500.0, 0.0), tmp_path / "there")
    check_need(Need(1.0, 1500.0, 0.0), tmp_path / "there", state)


def test_what_fits_is_one_line(tmp_path):
    line = check_need(need_of(case(tmp_path)), tmp_path / "not" / "yet")
    assert line.startswith("needs about ")
    assert "of memory (" in line
    assert "of disk (" in line
