"""`sweep:` — cases, their ranking, resuming, and what is written."""

import json
import math
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import yaml
from typer.testing import CliRunner

from hybridsim import ablation, resuming, storage, train
from hybridsim.cli import app
from hybridsim.config import experiment_from, load_experiment
from hybridsim.verify import verify_folder
from hybridsim.yaml_reader import ConfigError

pytestmark = pytest.mark.usefixtures("x64")

CASE = {
    "title": "Which closure?",
    "equation": "kuramoto_sivashinsky",
    "domain": {"lengths": [22]},
    "initial": {"use": "random_waves", "warm_up": 2},
    "samples": {"count": 2},
    "time": {"end": 4, "frames": 4},
    "reference": {"solver": "spectral", "shape": [32]},
    "runs": {
        "bare": {"solver": "spectral", "shape": [16], "dt": 1.0},
        "mine": {
            "solver": "spectral",
            "shape": [16],
            "dt": 1.0,
            "corrections": [{"use": "learned_flux", "width": 2, "depth": 1}],
        },
    },
    "checks": {"bare": {"t95": 1}},
    "train": {
        "run": "mine",
        "data": {"trajectories": 2, "validation": 2, "time": 4, "validation_time": 4, "interval": 1.0},
        "unroll": [1],
        "updates": [2],
        "batch": 2,
        "seeds": [0, 1],
        "validate_every": 1,
        "choose": "correlation",
        "mesh": {"batch": 1},
    },
}
PLACES = {
    "flux": {"runs.mine.corrections[0].use": "learned_flux"},
    "source": {"runs.mine.corrections[0].use": "learned_source"},
}


def case(over, **sweep):
    return {**CASE, "sweep": {"over": over, **sweep}}


def cases(over, **sweep):
    return experiment_from(case(over, **sweep), Path("case.yaml")).cases


def hybridsim(*arguments):
    return CliRunner().invoke(app, list(arguments))


# --- cases -----------------------------------------------------------------------------------------------------------------------


def test_every_combination_is_a_case():
    found = cases({"place": PLACES, "runs.mine.corrections[0].width": [2, 3], "train.unroll": [[1], [2]]})
    assert [c.name for c in found[:3]] == ["flux-width_2-unroll_1", "flux-width_2-unroll_2", "flux-width_3-unroll_1"]
    assert len(found) == 8
    last = found[-1]
    assert last.values == {"place": "source", "width": "3", "unroll": "2"}
    assert last.title == "source, width 3, unroll 2"
    resolved = last.experiment.resolved
    assert list(resolved["runs"]) == ["mine"]
    assert resolved["runs"]["mine"]["corrections"][0]["use"] == "learned_source"
    assert resolved["runs"]["mine"]["corrections"][0]["width"] == 3
    assert resolved["train"]["unroll"] == [2]
    sizes = [train.parameters(c.experiment.closures_for("mine")) for c in found]
    assert sizes == sizes[:4] * 2
    assert sizes[0] < sizes[2]
    assert len({c.experiment.config_hash for c in found}) == 8


def test_cases_are_judged_on_the_modes_of_the_whole_experiment():
    found = cases({"runs.mine.shape": [[16], [8], [24]]})
    assert [c.experiment.modes for c in found] == [7, 3, 7]


def test_a_value_with_arguments_is_named_by_them():
    closures = [
        {"use": "hyperviscosity", "c": 0.5},
        "hyperviscosity",
        {"use": "learned_flux", "network": {"use": "fno", "modes": 4}},
    ]
    titles = [c.title for c in cases({"runs.mine.corrections[0]": closures})]
    assert titles == [
        "corrections[0] hyperviscosity c 0.5",
        "corrections[0] hyperviscosity",
        "corrections[0] learned_flux network fno modes 4",
    ]


@pytest.mark.parametrize(
    ("over", "sweep", "sentence"),
    [
        ({"runs.mine.corrections[0].widht": [2]}, {}, "sweep, case widht_2: runs.mine.corrections[0].widht"),
        ({"runs.yours.dt": [0.5]}, {}, "sweep, case dt_0.5: runs.yours"),
        ({"train.updates": [[1, 2]]}, {}, "sweep, case updates_1_2: train.updates: found 2 phases, but train.unroll has 1"),
        ({"train.power": []}, {}, "sweep.over.train.power: there is nothing to choose from"),
        ({"train.power": list(np.arange(1001.0))}, {}, "sweep.over: 1001 cases are more than 1000"),
        ({"train.power": [0.0, 0.0]}, {}, "sweep.over: two cases are called power_0"),
        ({"train.power": [0.0]}, {"run": "other"}, "sweep.run: there is no run 'other'"),
        ({"train.power": [0.0]}, {"rank": "beauty"}, "sweep.rank: needs one of"),
        ({"train.power": [0.0]}, {"beside": ["bear"]}, "sweep.beside[0]: 'bear' is no other run; did you mean 'bare'?"),
        ({"train.power": [0.0]}, {"beside": ["mine"]}, "sweep.beside[0]: 'mine' is no other run"),
        ({}, {}, "sweep.over: needs at least 1 entry"),
        ({"runs.mine.shape": [16]}, {}, "sweep, case shape_16: runs.mine.shape: needs a list"),
        ({"runs.mine": [3]}, {}, "sweep, case mine_3: runs.mine: needs a mapping"),
        ({"compare": [5]}, {}, "sweep, case compare_5: compare: needs a mapping"),
    ],
)
def test_a_wrong_sweep_is_refused_in_one_sentence(over, sweep, sentence):
    with pytest.raises(ConfigError) as refusal:
        cases(over, **sweep)
    assert str(refusal.value).startswith(sentence), str(refusal.value)


def test_a_sweep_of_trainings_does_not_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("case.yaml").write_text(yaml.safe_dump(case({"train.power": [0.0, 1.0]})))
    result = hybridsim("run", "case.yaml")
    assert result.exit_code == 2
    assert "sweep.over.train.power: a run trains nothing" in result.stderr
    Path("case.yaml").write_text(yaml.safe_dump(case({"train.power": [0.0, 1.0]}, rank="spectrum_error")))
    result = hybridsim("train", "case.yaml")
    assert result.exit_code == 2
    assert "sweep.rank: training measures t95, t80, correlation, error" in result.stderr
    Path("case.yaml").write_text(yaml.safe_dump(case({"train.power": [0.0, 1.0]}, rank="temperature_error")))
    result = hybridsim("train", "case.yaml")
    assert result.exit_code == 2
    assert "sweep.rank: only a gas that radiates has a temperature_error" in result.stderr


# --- ranking ---------------------------------------------------------------------------------------------------------------------


def record(name, score, interval=None, at_least=False, **values):
    return {
        "case": name,
        "title": name,
        "values": values or {"case": name},
        "outcome": "finished" if score is not None else "diverged at t = 1; 2 of 2 samples diverged",
        "score": score,
        "interval": interval,
        "scores": [],
        "at_least": at_least,
    }


def test_interval_of_a_mean_is_students():
    low, high = ablation.interval_of_mean([1.0, 2.0, 3.0])
    # t₂(.95) = 2.920, s = 1
    assert math.isclose(high - 2, 2.9199856 / 3**0.5, rel_tol=1e-6)
    assert math.isclose(2 - low, high - 2)
    assert ablation.interval_of_mean([1.0]) is None


def test_cases_are_ranked_and_what_cannot_be_told_apart_is_said():
    records = [
        record("a", 2.0, [1.0, 3.0]),
        record("b", None),
        record("c", 4.0, [3.5, None]),
        record("d", 3.6, [3.0, 4.2]),
        record("e", 3.0),
    ]
    order = ablation.ranked(records, "t95")
    assert [r["case"] for r in order] == ["c", "d", "e", "a", "b"]
    assert ablation.alike(order) == ["d"]
    assert [r["case"] for r in ablation.ranked(records, "error")] == ["a", "e", "d", "c", "b"]
    ends = [record("a", 5.0, at_least=True), record("b", 5.0, at_least=True), record("c", 4.0, [3.0, 6.0])]
    assert ablation.alike(ends) == ["b"]
    assert ablation.alike([record("b", None)]) == []


def test_what_a_choice_is_worth():
    records = [
        record("1", 1.0, place="flux", width="2"),
        record("2", 3.0, place="flux", width="4"),
        record("3", 0.0, place="source", width="2"),
        record("4", None, place="source", width="4"),
    ]
    assert ablation.effects(records) == {
        "place": [("flux", 2.0, 2), ("source", 0.0, 1)],
        "width": [("2", 0.5, 2), ("4", 3.0, 1)],
    }
    page = ablation.table("Which?", ablation.ranked(records, "t95"), "t95", False, 4, {"bare": record("bare", 0.5)})
    lines = page.splitlines()
    assert lines[0] == "# Which?: 4 cases"
    assert lines[6].startswith("| 1 | flux | 4 | 3.000 |")
    assert lines[9].startswith("| 4 | source | 4 | diverged at t = 1 |")
    assert lines[10].startswith("|  | bare |  | 0.500 |")
    assert "| place | flux | 2.000 | 2 |" in lines


# --- the commands ----------------------------------------------------------------------------------------------------------------


def test_trainings_are_ranked_and_resumed(tmp_path, monkeypatch):
    """Stopped between two cases, the sweep goes on with what is missing, and ends with the same bits."""
    monkeypatch.chdir(tmp_path)
    Path("case.yaml").write_text(yaml.safe_dump(case({"place": PLACES})))
    result = hybridsim("train", "case.yaml", "--out", "out")
    assert result.exit_code == 0, result.output
    whole = json.loads(Path("out/sweep.json").read_text())
    assert whole["rank"] == "correlation"
    assert {c["case"] for c in whole["cases"]} == {"flux", "source"}
    scores = [c["score"] for c in whole["cases"]]
    assert scores == sorted(scores, reverse=True)
    for found in whole["cases"]:
        card = json.loads(Path("out/cases", found["case"], "mine.json").read_text())
        reached = [card["seeds"][seed]["validation"]["mean_correlation"] for seed in ("0", "1")]
        assert found["scores"] == reached
        assert found["score"] == np.mean(reached)
        assert found["bare"] == card["validation_bare"]["mean_correlation"]
        assert found["cost"] > 0
        assert found["cost_bare"] > 0
        assert Path("out/cases", found["case"], "mine.safetensors").exists()
    assert Path("out/sweep.md").read_text().count("\n| ") >= 3
    assert Path("out/figures/sweep.png").read_bytes()[:4] == b"\x89PNG"

    again = load_experiment("out/config.yaml", for_training=True)
    assert [c.experiment.config_hash for c in again.cases] == [
        c["config_hash"] for c in sorted(whole["cases"], key=lambda c: list(PLACES).index(c["case"]))
    ]
    shutil.rmtree("out/cases/source")
    stamp = Path("out/cases/flux/mine.safetensors").stat().st_mtime_ns
    result = hybridsim("train", "case.yaml", "--out", "out", "--resume")
    assert result.exit_code == 0, result.output
    assert "case 1 of 2, flux: done before" in result.output
    assert Path("out/cases/flux/mine.safetensors").stat().st_mtime_ns == stamp
    again = json.loads(Path("out/sweep.json").read_text())
    assert [(c["case"], c["scores"]) for c in again["cases"]] == [(c["case"], c["scores"]) for c in whole["cases"]]
    assert [str(f) for f in verify_folder(Path("out")) if f.good is not True] == []
    assert "cases/flux/mine.safetensors" in storage.read_manifest("out/manifest.json")["files"]
    found = resuming.environment()
    with monkeypatch.context() as patch:
        patch.setattr(resuming, "environment", lambda: {**found, "sources": "0" * 64})
        result = hybridsim("train", "case.yaml", "--out", "out", "--resume")
        assert result.exit_code == 2
        assert "with sources " in result.stderr
        assert hybridsim("train", "case.yaml", "--out", "out", "--resume", "--force").exit_code == 0
    result = hybridsim("train", "case.yaml", "train.power=1.0", "--out", "out", "--resume")
    assert result.exit_code == 2
    assert "holds another sweep: config.train.power was null, is 1.0" in result.stderr


@pytest.mark.slow
def test_runs_are_ranked_beside_the_others(tmp_path, monkeypatch):
    """What a case cannot change is run once; a constant at which the run blows up is a case like any other."""
    monkeypatch.chdir(tmp_path)
    text = case({"runs.mine.corrections[0].c": [0.5, 1e9]}, rank="t80", beside=["bare"], order="file")
    text["runs"] = {**text["runs"], "finer": {"solver": "spectral", "shape": [20], "dt": 1.0}}
    text["runs"]["mine"] = {**text["runs"]["mine"], "corrections": [{"use": "hyperviscosity", "c": 1.0, "evaluate": "stage"}]}
    del text["train"]
    text["sweep"]["run"] = "mine"
    Path("case.yaml").write_text(yaml.safe_dump(text))
    result = hybridsim("run", "case.yaml", "--out", "out")
    assert result.exit_code == 0, result.output
    found = json.loads(Path("out/sweep.json").read_text())
    assert [c["case"] for c in found["cases"]] == ["c_0.5", "c_1e_09"]
    assert list(found["others"]) == ["finer"]
    assert "| c | mine, t80 | bare, t80 |" in Path("out/sweep.md").read_text()
    for c in found["cases"]:
        runs = json.loads(Path("out/cases", c["case"], "summary.json").read_text())["runs"]
        summary, bare = runs["mine"], runs["bare"]
        assert c["beside"]["bare"]["score"] == (bare["t80_at_least"] if bare["t80"] is None else bare["t80"])
        assert c["outcome"] == summary["outcome"]
        assert c["score"] == (summary["t80_at_least"] if summary["t80"] is None else summary["t80"])
    assert Path("out/others/report.html").exists()
    assert [str(f) for f in verify_folder(Path("out")) if f.good is not True] == []
    assert "cases/c_0.5/manifest.json" in storage.read_manifest("out/manifest.json")["files"]


# --- the page --------------------------------------------------------------------------------------------------------------------


def test_the_page_on_ablations_is_true():
    page = (Path(__file__).parent.parent / "docs" / "ablation.md").read_text(encoding="utf-8")
    (block,) = re.findall(r"^```yaml\n(.*?)^```$", page, re.M | re.S)
    training = {**CASE["train"], "unroll": [1, 2, 4], "updates": [2, 2, 2]}
    found = experiment_from({**CASE, "train": training, **yaml.safe_load(block)}, Path("page.yaml"))
    assert "These are sixteen cases." in page
    assert len(found.cases) == 16
    assert found.cases[0].title == "flux, width 8, unroll 1×2×4, loss state 1"
