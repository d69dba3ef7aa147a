"""`run` and `train` as a user meets them: files, exit codes, a blow-up, an interruption that resumes bit for bit."""

import dataclasses
import json
import math
import os
import signal

import numpy as np
import pytest
import xarray as xr
import yaml
from rich.console import Console

from hybridsim import blowups, resuming, storage
from hybridsim.config import experiment_from, load_experiment
from hybridsim.experiment import _sentence, _statistics, _statistics_error, evaluate_checks, run_experiment
from hybridsim.progress import Reporter
from hybridsim.signals import STOP, Interrupted
from hybridsim.training import train_experiment
from hybridsim.yaml_reader import ConfigError

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


@pytest.mark.reliability("R5")
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
        run_experiment(experiment(tmp_path), folder, False, console, save_every=0.0)
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


@pytest.mark.skipif(not hasattr(signal, "SIGUSR1"), reason="there is no such signal")
def test_a_signal_saves_and_the_run_goes_on(tmp_path, x64, console, monkeypatch):
    folder, seen = tmp_path / "asked", []
    real = Reporter.progress

    def progress(self, what, fraction, note=""):
        real(self, what, fraction, note)
        if what == "bare":
            kept = folder / "bare.nc"
            seen.append(storage.open_dataset(kept).attrs["outcome"] if kept.exists() else None)
            if len(seen) == 1:
                os.kill(os.getpid(), signal.SIGUSR1)

    monkeypatch.setattr(Reporter, "progress", progress)
    runs = {"bare": SMALL["runs"]["bare"]}
    with STOP.listening():
        assert run_experiment(experiment(tmp_path, runs=runs), folder, False, console) == 0
    assert seen == [None, "interrupted after frame 6 of 12"]
    assert not STOP.wants_save
    assert storage.open_dataset(folder / "bare.nc").attrs["outcome"] == "finished"


def stopped_after_a_chunk(made, folder, console, monkeypatch):
    """Runs until the first state is saved, as if Ctrl-C had been pressed."""
    real = storage.Checkpoints.save

    def save_and_stop(self, step, tree, meta=None):
        real(self, step, tree, meta)
        STOP.requested = 2

    with monkeypatch.context() as patch:
        patch.setattr(storage.Checkpoints, "save", save_and_stop)
        with pytest.raises(Interrupted):
            run_experiment(made, folder, False, console, save_every=0.0)
    STOP.requested = None


def test_another_configuration_is_not_resumed(tmp_path, x64, console, monkeypatch):
    folder = tmp_path / "stopped"
    stopped_after_a_chunk(experiment(tmp_path), folder, console, monkeypatch)
    with pytest.raises(storage.StorageError, match=r"another configuration: samples\.seed was 7, is 8; resume with the same YAML"):
        run_experiment(experiment(tmp_path, samples={"count": 2, "seed": 8}), folder, True, console)
    with pytest.raises(storage.StorageError, match=r"title was 'small', is 'Other'; it changes no state: --force goes on with it"):
        run_experiment(experiment(tmp_path, title="Other"), folder, True, console)
    marker = folder / "state" / "begun.json"
    begun = storage.read_json(marker)
    storage.write_json(marker, {**begun, "environment": {**begun["environment"], "jax": "0.1"}})
    with pytest.raises(storage.StorageError, match=r"was computed with jax 0\.1, here it is .*--force goes on"):
        run_experiment(experiment(tmp_path), folder, True, console)
    assert run_experiment(experiment(tmp_path, title="Other"), folder, True, console, force=True) == 0


@pytest.mark.reliability("R9")
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
    # The last finite state is kept, one step before the fault, with what may help.
    last = storage.open_dataset(tmp_path / "wild/blowups/wild.nc")
    assert all(np.isfinite(last[name].values).all() for name in ("u", "v"))
    assert last.attrs["step"] * 0.4 == pytest.approx(float(last["time"][0]) + 0.4, rel=1e-5)
    assert last.attrs["outcome"] in summary["outcome"]
    assert summary["advice"][0].startswith("dt 0.4 ")
    assert "choose less, or cfl" in last.attrs["advice"]
    assert (tmp_path / "wild/figures/blowups.png").exists()
    runs["wild"]["may_diverge"] = True
    allowed = experiment(tmp_path, runs=runs, **rest)
    assert run_experiment(allowed, tmp_path / "allowed", False, console) == 0


def test_the_earliest_blow_up_is_the_one_that_is_kept(tmp_path, x64, console, monkeypatch):
    """Two samples are lost in one chunk: outcome, last finite state and picture are of the same one."""
    real = blowups.locate

    def later(model, state, sample, frames, every):
        found = real(model, state, sample, frames, every)
        return found._replace(blowup=dataclasses.replace(found.blowup, t=found.blowup.t + 1.0)) if sample == 0 else found

    monkeypatch.setattr(blowups, "locate", later)
    runs = {"wild": {"solver": "finite_volume", "shape": [16, 16], "dt": 0.4, "stepper": "forward_euler", "may_diverge": True}}
    initial = {"use": "random_velocity", "peak_wavenumber": 3.0, "max_speed": 8.0}
    window = {"end": 8.0, "frames": 20, "statistics_from": 4.0}
    equation = {"use": "navier_stokes", "viscosity": 5e-2}
    wild = experiment(tmp_path, runs=runs, initial=initial, checks={}, time=window, equation=equation)
    assert run_experiment(wild, tmp_path / "wild", False, console) == 0
    outcome = storage.read_json(tmp_path / "wild/summary.json")["runs"]["wild"]["outcome"]
    kept = storage.open_dataset(tmp_path / "wild/blowups/wild.nc")
    assert "sample 1" in outcome
    assert kept.attrs["sample"] == 1
    assert outcome.startswith(kept.attrs["outcome"])


def test_a_refused_resume_changes_nothing_and_a_killed_run_keeps_what_stood_before(tmp_path, x64, console, monkeypatch):
    runs = {"bare": SMALL["runs"]["bare"]}
    made, folder = experiment(tmp_path, runs=runs), tmp_path / "here"
    about = {"config_hash": "1" * 64}
    storage.write_json(folder / "learned.json", {"of": "a training"})
    storage.write_manifest(folder, ["learned.json"], about)
    stopped_after_a_chunk(made, folder, console, monkeypatch)
    storage.write_manifest(folder, ["learned.json"], about)
    with pytest.raises(storage.StorageError, match="another configuration"):
        run_experiment(experiment(tmp_path, runs=runs, samples={"count": 2, "seed": 8}), folder, True, console)
    assert (folder / "manifest.json").exists()
    (folder / "manifest.json").unlink()
    assert run_experiment(made, folder, True, console) == 0
    named = storage.read_manifest(folder / "manifest.json")["files"]
    assert named["learned.json"]["config_hash"] == "1" * 64
    assert {"bare.nc", "summary.json", "report.html"} <= set(named)


def test_what_an_interrupted_command_has_overwritten_is_no_longer_as_named(tmp_path):
    for name in ("kept.json", "changed.json", "gone.json", "again.json"):
        storage.write_json(tmp_path / name, {"of": name})
    storage.write_manifest(tmp_path, ["*.json"], {"config_hash": "1" * 64})
    marker = tmp_path / "state" / resuming.BEGUN
    storage.write_json(marker, {"earlier": resuming.named_before(tmp_path, marker)})
    storage.forget_manifest(tmp_path)
    (tmp_path / "gone.json").unlink()
    for name in ("changed.json", "again.json"):
        storage.write_json(tmp_path / name, {"of": "another"})
    storage.write_manifest(tmp_path, ["again.json"], {"config_hash": "2" * 64})
    found = resuming.named_before(tmp_path, marker)
    assert {name: entry["config_hash"][0] for name, entry in found.items()} == {"kept.json": "1", "again.json": "2"}


def test_a_refused_run_leaves_the_manifest_and_no_file_of_the_users_goes(tmp_path, x64, console):
    made, folder = experiment(tmp_path, runs={"bare": SMALL["runs"]["bare"]}), tmp_path / "here"
    mine = folder / blowups.FOLDER / "mine.nc"
    mine.parent.mkdir(parents=True)
    mine.write_bytes(b"mine")
    assert run_experiment(made, folder, False, console) == 0
    assert mine.read_bytes() == b"mine"
    (folder / "state").mkdir()
    (folder / "state" / "mine").write_bytes(b"mine")
    with pytest.raises(storage.StorageError, match="did not make this folder"):
        run_experiment(made, folder, False, console)
    assert storage.read_manifest(folder / "manifest.json")


def test_a_failed_check_is_exit_code_1(tmp_path, x64, console):
    runs = {"bare": SMALL["runs"]["bare"]}
    failing = experiment(tmp_path, runs=runs, checks={"bare": {"spectrum_error": 1e-9}})
    assert run_experiment(failing, tmp_path / "failing", False, console) == 1
    row = storage.read_json(tmp_path / "failing/summary.json")["checks"][0]
    assert not row["passed"]
    assert "is not at most" in row["sentence"]


# Lines, three dimensions, walls, scalars

LINE = {
    "equation": {"use": "kuramoto_sivashinsky"},
    "domain": {"lengths": [22.0]},
    "initial": {"use": "random_waves", "warm_up": 20.0},
    "samples": {"count": 2, "seed": 3},
    "time": {"end": 20.0, "frames": 20, "statistics_from": 5.0},
    "reference": {"solver": "spectral", "shape": [64]},
    "runs": {
        "spectral": {"solver": "spectral", "shape": [32], "dt": 0.1},
        "volumes": {"solver": "finite_volume", "shape": [33], "dt": 0.1, "precision": "float64"},
        "wild": {"solver": "spectral", "shape": [32], "dt": 1.0, "stepper": "forward_euler", "may_diverge": True},
    },
    "compare": {"at": 2.5},
    "checks": {
        "all": {"drift": 1e-5},
        "spectral": {"velocity_error": 0.5, "t95": 5.0, "spectrum_error": 0.2, "statistics_error": 0.2},
    },
}
BOX = {
    "equation": {"use": "navier_stokes", "viscosity": 0.05, "scalars": {"dye": 0.05}},
    "domain": {"lengths": [2 * math.pi] * 3},
    "initial": {"use": "taylor_green"},
    "samples": {"count": 1, "seed": 1},
    "time": {"end": 1.0, "frames": 4, "statistics_from": 0.5},
    "reference": {"solver": "spectral", "shape": [16, 16, 16]},
    "runs": {
        "spectral": {"solver": "spectral", "shape": [10, 8, 9], "dt": 0.125},
        "volumes": {"solver": "finite_volume", "shape": [8, 8, 8], "dt": 0.125},
    },
    "checks": {"all": {"drift": 1e-5, "divergence_max": 1e-4}},
}
CAVITY = {
    "equation": {
        "use": "navier_stokes",
        "viscosity": 0.05,
        "boundary_velocity": {"y_upper": {"use": "moving", "velocity": [1.0, 0.0]}},
    },
    "domain": {"lengths": [1.0, 1.0], "boundaries": ["no_slip", "no_slip"]},
    "initial": {"use": "uniform"},
    "samples": {"count": 1, "seed": 1},
    "time": {"end": 1.0, "frames": 10, "statistics_from": 0.5},
    "reference": {"solver": "finite_volume", "shape": [16, 16]},
    "runs": {"coarse": {"solver": "finite_volume", "shape": [8, 8], "dt": 0.02}},
    "checks": {"all": {"divergence_max": 1e-4}, "coarse": {"spectrum_error": 1.0, "drift": 1.0, "t80": 1.0}},
}


def strict(path):
    """JSON without NaN and infinity."""

    def refuse(word):
        raise AssertionError(f"{word} in {path}")

    return json.loads(path.read_text(encoding="utf-8"), parse_constant=refuse)


def test_a_line_is_run_and_judged(tmp_path, x64, console):
    assert run_experiment(experiment_from(LINE, tmp_path / "line.yaml"), tmp_path / "line", False, console) == 0
    summary = strict(tmp_path / "line/summary.json")
    row = summary["runs"]["spectral"]
    assert list(row["statistics"]) == ["mean_square", "mean_square_slope", "mean_square_curvature"]
    for numbers in row["statistics"].values():
        assert numbers["standard_error"] > 0
        assert numbers["difference"] == pytest.approx(numbers["mean"] / numbers["reference"] - 1)
    assert row["statistics_error"] == max(abs(n["difference"]) for n in row["statistics"].values())
    assert 0 < row["wasserstein"] < 0.3
    assert row["divergence_max"] is None
    assert "divergence_max" in row["not_defined"]
    assert row["accuracy"]["metric"] == "t95"
    ds = storage.open_dataset(tmp_path / "line/spectral.nc")
    window = ds["mean_square"].sel(time=slice(5, None))
    assert row["statistics"]["mean_square"]["mean"] == pytest.approx(float(window.mean()))
    # independent starts: the error of the mean is the spread of their means
    assert row["statistics"]["mean_square"]["standard_error"] == pytest.approx(float(window.mean("time").std(ddof=1)) / 2**0.5)
    truth = storage.open_dataset(tmp_path / "line/reference.nc", row["group"])
    np.testing.assert_allclose(ds["pdf"]["value"], truth["pdf"]["value"])
    width = float(truth["pdf"]["value"][1] - truth["pdf"]["value"][0])
    assert float(truth["pdf"].sum()) * width == pytest.approx(1)
    # between the frames at 2 and 3, the mean over starts
    errors = ds["velocity_error"].mean("sample")
    assert row["velocity_error"] == pytest.approx(0.5 * float(errors[2] + errors[3]))
    assert row["velocity_error_interval"][0] <= row["velocity_error"] <= row["velocity_error_interval"][1]
    # 32 and 33 points: shells up to ⅔ of 16 are common; the finer grid's own end at 11
    fine, fine_truth = (
        storage.open_dataset(*where)["spectrum"].mean("sample").values
        for where in ((tmp_path / "line/volumes.nc",), (tmp_path / "line/reference.nc", summary["runs"]["volumes"]["group"]))
    )
    distance = np.abs(np.log(fine / fine_truth))
    assert summary["runs"]["volumes"]["spectrum_error_common"] == pytest.approx(distance[1:11].mean())
    assert summary["runs"]["volumes"]["spectrum_error"] == pytest.approx(distance[1:12].mean())
    assert row["spectrum_error_common"] == row["spectrum_error"]
    wild = summary["runs"]["wild"]
    assert "diverged" in wild["outcome"]
    assert wild["statistics_error"] is None
    assert wild["wasserstein"] is None
    assert wild["statistics"]["mean_square"]["mean"] is None
    figures = {f.stem for f in (tmp_path / "line/figures").iterdir()}
    assert {"spacetime", "spectra", "distribution", "statistics", "energy", "conservation"} <= figures
    assert "vorticity" not in figures
    assert "statistics error –" in _sentence("wild", wild)


@pytest.mark.slow
def test_three_dimensions_are_run_and_judged(tmp_path, x64, console):
    assert run_experiment(experiment_from(BOX, tmp_path / "box.yaml"), tmp_path / "box", False, console) == 0
    rows = strict(tmp_path / "box/summary.json")["runs"]
    for row in rows.values():
        assert list(row["statistics"]) == ["energy", "enstrophy", "energy_rate", "scalar_variance:dye"]
        # one start, three frames: no blocks, no error, and nothing fails
        assert row["statistics"]["energy"]["standard_error"] is None
        assert row["statistics_error"] < 0.5
        assert row["spectrum_error"] is not None
        assert row["spectrum_error_common"] is not None
        assert set(row["drift"]) == {"u", "v", "w", "dye"}
        assert row["not_defined"] == {}
    ds = storage.open_dataset(tmp_path / "box/spectral.nc")
    assert ds["dye"].dims == ("sample", "time", "x", "y", "z")
    assert (ds["energy_rate"] < 0).all()
    assert {"vorticity", "scalar", "spectra", "energy"} <= {f.stem for f in (tmp_path / "box/figures").iterdir()}


def test_a_cavity_is_run_and_judged(tmp_path, x64, console):
    """Limits on what a box with walls does not have are not met, and the sentences say why."""
    assert run_experiment(experiment_from(CAVITY, tmp_path / "cavity.yaml"), tmp_path / "cavity", False, console) == 1
    summary = strict(tmp_path / "cavity/summary.json")
    row = summary["runs"]["coarse"]
    assert row["spectrum_error"] is None
    assert row["drift"] == {}
    assert set(row["not_defined"]) == {"spectrum_error", "spectrum_error_common", "spectrum_worst", "drift"}
    assert row["divergence_max"] < 1e-4
    assert row["t95_at_least"] == 1.0
    assert row["statistics_error"] < 0.6
    failed = {c["name"]: c["sentence"] for c in summary["checks"] if not c["passed"]}
    assert set(failed) == {"spectrum_error", "drift"}
    assert failed["spectrum_error"] == (
        "coarse: spectrum_error has no value (there are no spectra between walls), so it cannot be at most 1"
    )
    groups = storage.dataset_groups(tmp_path / "cavity/reference.nc")
    for group in groups:
        if "convergence" not in group:
            assert "vorticity" in storage.open_dataset(tmp_path / "cavity/reference.nc", group), group
    figures = {f.stem for f in (tmp_path / "cavity/figures").iterdir()}
    assert "vorticity" in figures
    assert "spectra" not in figures


def test_statistics_of_known_means(tmp_path):
    """mean ± error over starts, relative to the reference; the mean of dE/dt does not count."""
    times = np.linspace(0, 1.2, 13)
    known = experiment(tmp_path)

    def dataset(energy, rate, variance):
        series = ("sample", "time")
        late = np.where(times >= 0.6 - 1e-9, 1.0, 77.0)
        return xr.Dataset(
            {
                "energy": (series, np.array(energy)[:, None] * late),
                "energy_rate": (series, np.array(rate)[:, None] * late),
                "scalar_variance": (("scalar", *series), np.array(variance)[None, :, None] * late),
            },
            {"time": times, "scalar": ["dye"]},
        )

    one, two = dataset([1.0, 3.0], [5.0, 5.0], [0.0, 0.0]), dataset([4.0, 4.0], [0.1, -0.1], [0.0, 0.0])
    found = _statistics(known, one, two)
    assert found["energy"] == {
        "mean": 2.0,
        "standard_error": pytest.approx(1.0),
        "reference": 4.0,
        "reference_standard_error": 0.0,
        "difference": -0.5,
    }
    assert found["scalar_variance:dye"]["difference"] == 0
    assert _statistics_error(found) == 0.5
    gone = _statistics(known, dataset([1.0, np.nan], [0.0, 0.0], [0.0, 0.0]), two)
    assert gone["energy"]["mean"] is None
    assert _statistics_error(gone) is None


def test_checks_on_statistics(tmp_path):
    rows = {
        "bare": {"outcome": "finished", "statistics_error": 0.05, "not_defined": {}},
        "spectral": {"outcome": "finished", "statistics_error": 0.2, "not_defined": {}},
        "both": {"outcome": "diverged at t = 1", "statistics_error": None, "not_defined": {}},
    }
    found = evaluate_checks(experiment(tmp_path, checks={"all": {"statistics_error": 0.1}}), rows)
    assert [row["passed"] for row in found] == [True, False, False]
    assert found[2]["sentence"] == "both: statistics_error = not finite is not at most 0.1"


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
    with pytest.raises(storage.StorageError, match="hybridsim did not make this folder"):
        train_experiment(trained, folder, False, console)
    assert left.read_text() == "of another recipe"
    storage.write_json(folder / "training/begun.json", "of another recipe")
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


@pytest.mark.slow
def test_constants_are_tuned_on_several_references_from_disk(tmp_path, x64, console):
    runs = json.loads(json.dumps(TRAINING["runs"]))
    runs["learned"]["corrections"] = [{"use": "smagorinsky", "cs": 0.1}]
    train = {
        **TRAINING["train"],
        "data": {**TRAINING["train"]["data"], "store": "zarr", "together": 2},
        "variants": [{"equation.viscosity": 2.0e-2}],
        "loss": {"state": 1.0, "dissipation": 0.1},
        "unroll": [2],
        "updates": [4],
        "seeds": [0],
        "rate": 0.05,
        "average": 0.5,
        "log": ["jsonl", "tensorboard"],
    }
    trained = experiment(tmp_path, runs=runs, checks={}, train=train)
    folder = tmp_path / "tuned"
    assert train_experiment(trained, folder, False, console) == 0
    assert len(list(storage.cache_folder().glob("training/*.zarr"))) == 2
    lines = [json.loads(line) for line in (folder / "training/seed-0.jsonl").read_text().splitlines()]
    assert [line["update"] for line in lines] == [1, 2, 3, 4]
    assert set(lines[0]["terms"]) == {"state", "dissipation"}
    assert set(lines[-1]["validation"]["others"]) == {"equation.viscosity = 0.02"}
    assert list((folder / "training/tensorboard/seed-0").iterdir())

    runs["learned"]["corrections"][0]["weights"] = "tuned/learned.safetensors"
    closure = experiment(tmp_path, runs=runs, checks={}).closures_for("learned")[0]
    assert closure.cs.shape == ()
    assert closure.cs.dtype == np.float32
    assert float(closure.cs) > 0
    assert float(closure.cs) != pytest.approx(0.1, rel=1e-4)


@pytest.mark.parametrize(("changed", "sentence"), [
    ({"variants": [{"equation.viscosty": 1.0}]}, "train.variants[0]: equation.viscosty: NavierStokes takes no 'viscosty'"),
    ({"loss": {"state": 0.0}}, "train.loss: every weight is zero"),
    ({"loss": {"stat": 1.0}}, "did you mean 'state'?"),
    ({"truncate": 2}, "train.truncate: unrolls beyond 2 frames must be multiples of it, found 3"),
    ({"warm_up": 9}, "train.unroll: 12 frames of 0.1 are longer than train.data.time = 1"),
    ({"choose": "error"}, "train.choose: only a gas has an error"),
    ({"choose": "temperature_error"}, "train.choose: only a gas that radiates has a temperature_error"),
    ({"keep": "last", "stop_after": 3}, "train.stop_after: ends a training that gets no better"),
    ({"symmetries": True}, "train.symmetries: a forced flow is not the same"),
    ({"mesh": {"batch": 64}, "batch": 64}, "train.mesh.batch: 64 cannot share 64 windows"),
])  # fmt: skip
def test_trainings_that_make_no_sense_are_refused(tmp_path, x64, console, changed, sentence):
    with pytest.raises(ConfigError) as refusal:
        train_experiment(
            experiment(tmp_path, **{**TRAINING, "train": {**TRAINING["train"], **changed}}), tmp_path / "x", False, console
        )
    assert sentence in str(refusal.value)
