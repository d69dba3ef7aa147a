"""`run` and `train` as a user meets them: files, exit codes, a blow-up, an interruption that resumes bit for bit."""

import json
import math

import numpy as np
import pytest
import yaml
from rich.console import Console

from hybridsim import storage
from hybridsim.config import experiment_from, load_experiment
from hybridsim.experiment import run_experiment
from hybridsim.signals import STOP, Interrupted
from hybridsim.train import train_experiment

SMALL = {
    "equation": {"use": "navier_stokes", "viscosity": 1e-2, "forcing": "kolmogorov"},
    "domain": {"lengths": [2 * math.pi, 2 * math.pi]},
    "initial": {"use": "random_velocity", "peak_wavenumber": 3.0, "max_speed": 2.0, "warm_up": 0.5, "warm_up_shape": [24, 24]},
    "samples": {"count": 2, "seed": 7},
    "time": {"end": 1.2, "frames": 12, "statistics_from": 0.6},
    "reference": {"solver": "spectral", "shape": [32, 32]},
    "runs": {
        "bare": {"solver": "finite_volume", "shape": [16, 16], "dt": 0.05},
        "spectral": {"solver": "spectral", "shape": [16, 16], "cfl": 0.5, "precision": "float64"},
        "both": {
            "solver": "finite_volume",
            "shape": [16, 16],
            "dt": 0.025,
            "substeps": 2,
            "corrections": [
                {"use": "smagorinsky", "cs": 0.1, "evaluate": "stage"},
                {"use": "learned_flux", "width": 4, "depth": 1, "evaluate": 2},
            ],
        },
    },
    "checks": {"all": {"drift": 1e-5, "divergence_max": 1e-4}},
}


def experiment(tmp_path, **changes):
    data = json.loads(json.dumps(SMALL)) | changes
    return experiment_from(data, tmp_path / "small.yaml")


@pytest.fixture
def console():
    with open("/dev/null", "w") as sink:  # noqa: PTH123
        yield Console(file=sink)


@pytest.fixture
def finished(tmp_path, x64, console):
    folder = tmp_path / "finished"
    assert run_experiment(experiment(tmp_path), folder, False, console) == 0
    return folder


def test_a_run_leaves_what_it_promises(finished, tmp_path):
    names = {p.name for p in finished.iterdir()}
    assert {"config.yaml", "bare.nc", "spectral.nc", "both.nc", "reference.nc", "summary.json", "report.html", "log.txt"} <= names
    assert "state" not in names
    summary = storage.read_json(finished / "summary.json")
    assert set(summary["runs"]) == {"bare", "spectral", "both"}
    row = summary["runs"]["both"]
    assert row["outcome"] == "finished"
    assert row["parameters"] > 0
    assert row["steps"] == 48
    assert row["dt"] == pytest.approx(0.025)
    assert 0 < row["seconds_per_unit_time"] < 60
    assert all(check["passed"] for check in summary["checks"])
    ds = storage.open_dataset(finished / "bare.nc")
    assert ds["u"].dims == ("sample", "time", "x_face", "y")
    assert ds["u"].dtype == np.float32
    assert float(ds["correlation"][:, 0].min()) == pytest.approx(1.0, abs=1e-6)
    assert float(ds["correlation"][:, -1].min()) > 0.8
    groups = storage.dataset_groups(finished / "reference.nc")
    assert {"finite_volume_16x16", "spectral_16x16", "fine", "convergence"} <= {g.strip("/") for g in groups}
    again = load_experiment(finished / "config.yaml")
    assert again.resolved == yaml.safe_load((finished / "config.yaml").read_text())


def test_an_interrupted_run_resumes_bit_for_bit(finished, tmp_path, console, monkeypatch):
    folder = tmp_path / "stopped"
    real = storage.Checkpoints.save
    saves = []

    def save_and_stop(self, step, tree, meta=None):
        real(self, step, tree, meta)
        saves.append(step)
        if len(saves) == 4:
            STOP.requested = 15

    monkeypatch.setattr(storage.Checkpoints, "save", save_and_stop)
    with pytest.raises(Interrupted) as stop:
        run_experiment(experiment(tmp_path), folder, False, console)
    STOP.requested = None
    assert stop.value.exit_code == 143
    assert (folder / "both.nc").exists() or (folder / "spectral.nc").exists()
    assert not (folder / "summary.json").exists()
    monkeypatch.setattr(storage.Checkpoints, "save", real)
    assert run_experiment(experiment(tmp_path), folder, True, console) == 0
    for label in ("bare", "spectral", "both"):
        one, two = (storage.open_dataset(f / f"{label}.nc") for f in (finished, folder))
        for name in ("u", "v", "drift"):
            assert np.array_equal(one[name].values, two[name].values, equal_nan=True), (label, name)


def test_another_configuration_is_not_resumed(tmp_path, x64, console, monkeypatch):
    folder = tmp_path / "stopped"
    real = storage.Checkpoints.save

    def save_and_stop(self, step, tree, meta=None):
        real(self, step, tree, meta)
        STOP.requested = 2

    monkeypatch.setattr(storage.Checkpoints, "save", save_and_stop)
    with pytest.raises(Interrupted):
        run_experiment(experiment(tmp_path), folder, False, console)
    STOP.requested = None
    with pytest.raises(storage.StorageError, match="another configuration"):
        run_experiment(experiment(tmp_path, samples={"count": 1, "seed": 8}), folder, True, console)


def test_a_blow_up_is_an_outcome(tmp_path, x64, console):
    runs = {"wild": {"solver": "finite_volume", "shape": [16, 16], "dt": 0.4, "stepper": "forward_euler"}}
    initial = {"use": "random_velocity", "peak_wavenumber": 3.0, "max_speed": 8.0}
    rest = {
        "initial": initial,
        "checks": {},
        "equation": {"use": "navier_stokes", "viscosity": 5e-2},
        "time": {"end": 8.0, "frames": 20, "statistics_from": 4.0},
    }
    wild = experiment(tmp_path, runs=runs, **rest)
    assert run_experiment(wild, tmp_path / "wild", False, console) == 3
    summary = storage.read_json(tmp_path / "wild/summary.json")["runs"]["wild"]
    assert summary["outcome"].startswith("diverged at t = ")
    assert "field " in summary["outcome"]
    assert "2 of 2 samples" in summary["outcome"]
    u = storage.open_dataset(tmp_path / "wild/wild.nc")["u"].values
    good = np.isfinite(u).all(axis=(2, 3))
    assert good[:, 0].all()
    assert not good[:, -1].any()
    # No frame is half good, and nothing good follows a bad one.
    assert (np.isnan(u).all(axis=(2, 3)) == ~good).all()
    runs["wild"]["may_diverge"] = True
    allowed = experiment(tmp_path, runs=runs, **rest)
    assert run_experiment(allowed, tmp_path / "allowed", False, console) == 0


def test_a_failed_check_is_exit_code_1(tmp_path, x64, console):
    runs = {"bare": SMALL["runs"]["bare"]}
    failing = experiment(tmp_path, runs=runs, checks={"bare": {"spectrum_error": 1e-9}})
    assert run_experiment(failing, tmp_path / "failing", False, console) == 1
    row = storage.read_json(tmp_path / "failing/summary.json")["checks"][0]
    assert not row["passed"]
    assert "is not at most" in row["sentence"]


TRAINING = {
    "runs": {
        "learned": {
            "solver": "spectral",
            "shape": [16, 16],
            "dt": 0.05,
            "corrections": [{"use": "learned_flux", "width": 4, "depth": 1}],
        }
    },
    "checks": {},
    "train": {
        "run": "learned",
        "data": {"trajectories": 3, "validation": 2, "time": 1.0, "validation_time": 1.0, "interval": 0.1, "shape": [32, 32]},
        "unroll": [1, 3],
        "updates": [6, 6],
        "batch": 2,
        "validate_every": 4,
        "seeds": [0, 3],
    },
}


def test_training_writes_weights_that_the_run_takes(tmp_path, x64, console, monkeypatch):
    trained = experiment(tmp_path, **TRAINING)
    folder = tmp_path / "trained"
    left = folder / "training/seed-0/000000000012.json"
    left.parent.mkdir(parents=True)
    left.write_text("of another recipe")
    assert train_experiment(trained, folder, False, console) == 0
    assert left.read_text() != "of another recipe"
    card = storage.read_json(folder / "learned.json")
    assert set(card["seeds"]) == {"0", "3"}
    assert card["parameters"] > 0
    for name in ("learned", "learned-seed0", "learned-seed3"):
        assert storage.read_header(folder / f"{name}.safetensors")["closure"] == "learned_flux"

    # Stopped in the middle and resumed, training gives the same bits.
    stopped = tmp_path / "stopped"
    real = storage.Checkpoints.save
    saves = []

    def save_and_stop(self, step, tree, meta=None):
        real(self, step, tree, meta)
        saves.append(step)
        if len(saves) == 2:
            STOP.requested = 2

    monkeypatch.setattr(storage.Checkpoints, "save", save_and_stop)
    with pytest.raises(Interrupted):
        train_experiment(trained, stopped, False, console)
    STOP.requested = None
    monkeypatch.setattr(storage.Checkpoints, "save", real)
    assert train_experiment(trained, stopped, True, console) == 0
    one, two = (trained.closures_for("learned", weights=False)[0] for _ in range(2))
    for seed in (0, 3):
        one = storage.load_weights(folder / f"learned-seed{seed}.safetensors", one)
        two = storage.load_weights(stopped / f"learned-seed{seed}.safetensors", two)
        for a, b in zip(one.network.layers, two.network.layers, strict=True):
            assert np.array_equal(a.weights, b.weights)

    runs = json.loads(json.dumps(TRAINING["runs"]))
    runs["learned"]["corrections"][0]["weights"] = "trained/learned.safetensors"
    used = experiment(tmp_path, runs=runs, checks={})
    assert run_experiment(used, folder, False, console) == 0
    assert (folder / "figures/training.png").exists()
