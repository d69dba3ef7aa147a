"""`hybridsim bench` from end to end on a small family, and what it refuses."""

import json

import pytest
from typer.testing import CliRunner

from hybridsim.bench import closure_of, family_experiment, method_of, read_bench
from hybridsim.cli import app
from hybridsim.config import shipped_benches
from hybridsim.sections import Family, Run
from hybridsim.yaml_reader import ConfigError

SMALL = """
title: A small benchmark
rounds: 3
resamples: 50
families:
  waves:
    experiment: ks_scores.yaml
    runs: [ps64_bare, "ps64_learned_*", ps96_bare]
    quick:
      samples.count: 3
      time.end: 30
      time.frames: 30
      time.statistics_from: 10
      reference.shape: [192]
      reference.precision: float32
      initial.warm_up: 20
"""


def bench(*args):
    return CliRunner().invoke(app, ["bench", *map(str, args)])


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bench")
    file = folder / "small.yaml"
    file.write_text(SMALL)
    result = bench(file, "--quick", "--out", folder / "out")
    assert result.exit_code == 0, result.output
    return file, folder / "out"


def test_every_claim_has_its_numbers(finished):
    _, out = finished
    found = json.loads((out / "bench.json").read_text())
    assert found["quick"]
    assert found["rounds"] == 3
    assert found["device"]
    family = found["families"]["waves"]
    assert family["metric"] == "t95"
    assert family["measures"] == ["t95", "spectrum_error"]
    rungs = {r["label"]: r for r in family["rungs"]}
    assert set(rungs) == {"ps64_bare", "ps64_learned_0", "ps64_learned_1", "ps64_learned_2", "ps96_bare"}
    assert {r["kind"] for r in rungs.values()} == {"classical", "hybrid"}
    (closure,) = family["closures"].values()
    assert closure["runs"] == ["ps64_learned_0", "ps64_learned_1", "ps64_learned_2"]
    claim = closure["measures"]["t95"]
    low, median, high = claim["best"]["interval"]
    assert 0 < low <= median <= high
    # one discretisation: both claims are the same
    assert claim["best"]["interval"] == claim["same"]["interval"]
    assert closure["break_even"]["training_seconds"] > 0
    # the accuracies are those of `hybridsim run`
    summary = json.loads((out / "waves" / "summary.json").read_text())["runs"]
    for label, rung in rungs.items():
        assert rung["t95"] == pytest.approx(summary[label]["t95"]) if rung["t95"] else rung["t95_at_least"] == 30
        assert rung["spectrum_error"] == pytest.approx(summary[label]["spectrum_error_common"])
    page = (out / "bench.md").read_text()
    assert closure["verdict"] in page
    assert "spectral 96" in page
    for table in page.split("\n\n"):
        if table.startswith("|"):
            assert len({line.count("|") for line in table.strip().splitlines()}) == 1
    assert {p.name for p in (out / "figures").iterdir()} == {"waves_t95.png", "waves_spectrum_error.png"}


def test_what_is_finished_is_not_done_again(finished):
    file, out = finished
    before = (out / "waves" / "summary.json").stat().st_mtime_ns, (out / "waves" / "turns.json").stat().st_mtime_ns
    verdicts = json.loads((out / "bench.json").read_text())["families"]["waves"]["closures"]["ks_ps64"]["verdict"]
    assert bench(file, "--quick", "--resume", "--out", out).exit_code == 0
    assert before == ((out / "waves" / "summary.json").stat().st_mtime_ns, (out / "waves" / "turns.json").stat().st_mtime_ns)
    assert json.loads((out / "bench.json").read_text())["families"]["waves"]["closures"]["ks_ps64"]["verdict"] == verdicts


def test_names_of_ladders():
    run = Run.model_validate({"solver": {"use": "finite_volume", "convection": "central"}, "shape": [8, 8], "dt": 0.1})
    assert method_of(run) == "finite volume (central)"
    assert closure_of(run) is None
    learned = {"use": "learned_flux", "weights": "runs/mine/kolmogorov_ps32_seed12.safetensors"}
    run = Run.model_validate({"solver": "spectral", "shape": [8, 8], "dt": 0.1, "corrections": [learned]})
    assert closure_of(run) == "kolmogorov_ps32"
    assert method_of(run) == "spectral + learned flux"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("families: {}", "families"),
        ("families: {a: {}}", "families.a.experiment"),
        ("families: {a: {experiment: ks_scores.yaml, run: [x]}}", "did you mean 'runs'"),
        ("families: {a: {experiment: ks_scores.yaml, runs: [ps65]}}", "no run is called 'ps65'"),
        ("families: {a: {experiment: ks_scores.yaml, runs: [ps64_bare]}}", "to compare them"),
        ("families: {a: {experiment: nothing.yaml}}", "nothing.yaml"),
        ("families: {a: {experiment: ks_scores.yaml}}\nrounds: 0", "rounds"),
    ],
)
def test_bad_benchmarks_are_refused_in_one_line(tmp_path, text, message):
    (tmp_path / "bad.yaml").write_text(text)
    result = bench(tmp_path / "bad.yaml", "--out", tmp_path / "out")
    assert result.exit_code == 2
    assert message in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1
    assert not (tmp_path / "out").exists()


def test_a_name_that_is_nothing_is_refused():
    result = bench("no_such_benchmark.yaml")
    assert result.exit_code == 2
    assert "no_such_benchmark" in result.stderr


def test_an_experiment_is_a_benchmark_of_one_family():
    spec, name = read_bench("ks_scores.yaml")
    assert name == "ks_scores"
    assert list(spec.families) == ["ks_scores"]


@pytest.mark.parametrize("name", shipped_benches())
@pytest.mark.parametrize("quick", [False, True])
def test_shipped_benchmarks_are_valid(name, quick):
    spec, _ = read_bench(name)
    for family, part in spec.families.items():
        experiment = family_experiment(family, part, quick)
        kinds = {closure_of(run) is None for run in experiment.spec.runs.values()}
        assert kinds == {True, False}, family


def test_a_pattern_chooses_runs():
    experiment = family_experiment("x", Family(experiment="ks_scores.yaml", runs=["ps64_*", "ps80_bare"]), quick=False)
    assert "ps80_bare" in experiment.labels
    assert all(x.startswith("ps64_") or x == "ps80_bare" for x in experiment.labels)
    with pytest.raises(ConfigError, match="no run is called"):
        family_experiment("x", Family(experiment="ks_scores.yaml", runs=["fv_*", "zz*"]), quick=False)
