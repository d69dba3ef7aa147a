"""`hybridsim bench` from end to end on a small family, and what it refuses."""

import json
import re
import shutil

import jax
import numpy as np
import pytest
import yaml
from typer.testing import CliRunner

from hybridsim import storage
from hybridsim.bench import FamilyPlan, read_bench, taking_part
from hybridsim.claims import closure_of, headline, method_of
from hybridsim.cli import app
from hybridsim.config import shipped_benches
from hybridsim.diagnostics import crossing_time
from hybridsim.sections import Bench, Family, Run
from hybridsim.verify import verify_folder
from hybridsim.yaml_reader import ConfigError, parse_yaml

pytestmark = pytest.mark.usefixtures("x64")

SMALL = """
title: A small benchmark
rounds: 3
resamples: 50
families:
  waves:
    experiment: ks_scores.yaml
    runs: [ps64_bare, fv64_bare, ps64_learned_0, ps64_learned_1]
    rivals: {cut: {solver: {use: spectral, dealias: two_thirds}, shape: [64], dt: 1.0}}
    ladders: {ps64_bare: [72]}
    long: 40
    limit: {shape: [128]}
    change:
      samples.count: 2
      time.end: 20
      time.frames: 20
      time.statistics_from: 5
      reference.shape: [128]
      reference.precision: float32
      initial.warm_up: 20
    quick: {time.end: 10, time.frames: 10}
    quick_runs: [ps64_bare, ps64_learned_0]
"""


def bench(*args):
    return CliRunner().invoke(app, ["bench", *map(str, args)])


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bench")
    file = folder / "small.yaml"
    file.write_text(SMALL)
    before = jax.config.jax_enable_x64
    result = bench(file, "--out", folder / "out")
    jax.config.update("jax_enable_x64", before)  # the command turns it on, and this is no single test's doing
    assert result.exit_code == 0, result.output
    return file, folder / "out"


def rungs_of(out):
    return {r["label"]: r for r in json.loads((out / "bench.json").read_text())["families"]["waves"]["rungs"]}


def test_every_claim_has_its_numbers(finished):
    _, out = finished
    found = json.loads((out / "bench.json").read_text())
    assert not found["quick"]
    assert found["rounds"] == 3
    assert found["device"]
    assert found["precision"] == "float32"
    family = found["families"]["waves"]
    assert family["metric"] == "t95"
    assert family["measures"] == ["t95", "spectrum_error"]
    rungs = {r["label"]: r for r in family["rungs"]}
    learned = ["ps64_learned_0", "ps64_learned_1"]
    assert {"ps64_bare", "ps64_bare_72", "fv64_bare", "cut", *learned} <= set(rungs)
    assert {r["kind"] for r in rungs.values()} == {"classical", "hybrid"}
    (closure,) = family["closures"].values()
    assert closure["runs"] == learned
    claim = closure["measures"]["t95"]
    low, median, high = claim["best"]["interval"]
    assert 0 < low <= median <= high
    assert family["speedup_best"] == claim["best"]["interval"]
    assert family["best_classical"] == claim["best"]["method"]
    assert family["verdict"] == closure["verdict"] == claim["verdict"]
    assert closure["break_even"] is None or closure["break_even"]["data_seconds"] > 0
    # the accuracies are those of `hybridsim run`
    summary = json.loads((out / "waves" / "summary.json").read_text())["runs"]
    for label, rung in rungs.items():
        assert rung["t95"] == pytest.approx(summary[label]["t95"]) if rung["t95"] else rung["t95_at_least"] == 20
        assert rung["spectrum_error"] == pytest.approx(summary[label]["spectrum_error_common"])
        assert rung["memory"] > 1000
        assert rung["compile_seconds"] > 0
        assert len(rung["seconds_by_round"]) == 3
        assert rung["cost"] == pytest.approx(sorted(rung["seconds_by_round"])[1])


def test_an_interrupted_benchmark_is_unfinished_and_forgets_nothing_that_stood_there(finished, tmp_path, monkeypatch):
    file, out = finished
    folder = tmp_path / "out"
    shutil.copytree(out, folder)
    before = storage.read_manifest(folder / storage.MANIFEST)["files"]

    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("hybridsim.bench.run_family", interrupted)
    for _ in range(2):
        assert bench(file, "--out", folder, "--resume").exit_code == 130
        earlier = storage.read_json(folder / "bench_begun.json")["earlier"]
        assert {name: entry["sha256"] for name, entry in earlier.items()} == {n: e["sha256"] for n, e in before.items()}
        assert not (folder / storage.MANIFEST).exists()
        assert verify_folder(folder)[0].sentence.startswith("unfinished")


def test_every_file_is_named_and_says_what_made_it(finished):
    _, out = finished
    findings = verify_folder(out)
    assert [str(f) for f in findings if f.good is not True] == []
    manifest = storage.read_manifest(out / "manifest.json")
    there = {path.relative_to(out).as_posix() for path in out.rglob("*") if path.is_file()}
    assert set(manifest["files"]) == there - {"manifest.json", "log.txt"}
    inner = storage.read_manifest(out / "waves/manifest.json")
    assert {"tuning.json", "limit.json", "turns.json", "summary.json", "reference.nc", "cut.nc"} <= set(inner["files"])
    attrs = dict(storage.open_dataset(out / "bench.nc").attrs)
    attrs |= {"versions": json.loads(attrs["versions"]), "seed": json.loads(attrs["seed"])}
    for found in (manifest, attrs, json.loads((out / "bench.json").read_text())):
        assert found["config_hash"] == manifest["config_hash"]
        assert found["seed"] == {"waves": inner["seed"]}
        assert {"version", "commit", "precision", "device"} <= set(found)
        assert set(storage.PACKAGES) <= set(found["versions"])
    assert manifest["inputs"] == {"waves": inner["config_hash"]}


def test_rivals_take_the_largest_steps_that_keep_their_accuracy(finished):
    _, out = finished
    tuning = json.loads((out / "waves" / "tuning.json").read_text())["rungs"]
    rungs = rungs_of(out)
    for label in ("ps64_bare", "ps64_bare_72", "fv64_bare", "cut"):
        trials = {t["dt"]: t for t in tuning[label]["trials"]}
        chosen = rungs[label]["dt"]
        assert chosen == 1 / tuning[label]["steps"]
        best = trials[min(trials)]["value"]
        assert best is None or trials[chosen]["value"] >= 0.98 * best
        # larger ones were tried, and lost too much
        for dt, trial in trials.items():
            assert dt <= chosen or trial["lost"] or trial["value"] < 0.98 * best
        assert "accuracy" in rungs[label]["rules"]
        lasting = label if tuning[label]["long_steps"] == tuning[label]["steps"] else f"{label}_long"
        assert "long" in rungs[lasting]["rules"]
        assert rungs[lasting]["lasted"] == 40
    # closures too; all seeds of one with the same step
    assert rungs["ps64_learned_0"]["dt"] == rungs["ps64_learned_1"]["dt"]
    assert rungs["ps64_learned_0"]["lasted"] == 40


def test_the_page_says_what_the_numbers_say(finished):
    _, out = finished
    found = json.loads((out / "bench.json").read_text())["families"]["waves"]
    page, html = (out / "bench.md").read_text(), (out / "bench.html").read_text()
    words = re.sub(r"base64,[A-Za-z0-9+/=]+", "", html)  # a picture may spell anything
    for text in (page, words):
        for closure in found["closures"].values():
            assert closure["verdict"] in text
        for rung in found["rungs"]:
            assert rung["title"] in text
        assert "Predictability limit, from pairs of 128 runs" in text
        assert "at most 1.12 apart" in text
        assert "None" not in text
        assert "nan" not in text
    for table in page.split("\n\n"):
        if table.startswith("|"):
            assert len({line.count("|") for line in table.strip().splitlines()}) == 1
    assert {p.name for p in (out / "figures").iterdir()} == {"waves_t95.png", "waves_spectrum_error.png", "waves_time.png"}
    assert html.count("data:image/png;base64,") == 3
    assert "<script" not in html
    assert "http://" not in html
    assert "https://" not in html


def test_raw_numbers_are_kept(finished):
    _, out = finished
    with storage.open_dataset(out / "bench.nc", "waves") as ds:
        rungs = rungs_of(out)
        assert list(ds["run"].values) == list(rungs)
        assert ds["correlation"].dims == ("run", "start", "time")
        assert ds["cost"].shape == (len(rungs), 3)
        assert ds["limit"].sizes["start"] == 2
        np.testing.assert_allclose(ds["limit"].isel(limit_time=0), 1, atol=1e-5)
        for i, rung in enumerate(rungs.values()):
            assert np.median(ds["cost"].values[i]) == pytest.approx(rung["cost"])
            time, _ = crossing_time(ds["time"].values, ds["correlation"].values[i].mean(axis=0), 0.95)
            assert time == pytest.approx(rung["t95"]) if rung["t95"] else time is None


def test_what_is_finished_is_not_done_again(finished):
    file, out = finished
    names = ("summary.json", "turns.json", "tuning.json", "limit.json")
    before = [(out / "waves" / name).stat().st_mtime_ns for name in names]
    verdicts = json.loads((out / "bench.json").read_text())["families"]["waves"]["verdict"]
    result = bench(file, "--resume", "--out", out, "--against", out / "bench.json")
    assert result.exit_code == 0, result.output
    assert before == [(out / "waves" / name).stat().st_mtime_ns for name in names]
    assert json.loads((out / "bench.json").read_text())["families"]["waves"]["verdict"] == verdicts
    page = (out / "bench.md").read_text()
    assert "## Once more" in page
    assert page.count(", both times") == 2


def test_quick_takes_what_the_file_says():
    plan = FamilyPlan("waves", Bench.model_validate(parse_yaml(SMALL, "small")).families["waves"], quick=True)
    experiment = plan.experiment()
    assert set(experiment.labels) == {"ps64_bare", "ps64_learned_0"}
    assert (experiment.spec.time.end, experiment.spec.samples.count) == (10, 2)
    assert not plan.tune
    assert plan.long is None
    assert plan.limit is None


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
        ("families: {a: {experiment: ks_scores.yaml, ladders: {ps65: [72]}}}", "families.a.ladders: no run is called 'ps65'"),
        ("families: {a: {experiment: kolmogorov_scores.yaml, ladders: {ps36: [0]}}}", "families.a.ladders.ps36[0]"),
        ("families: {a: {experiment: mixing_layer_scores.yaml, ladders: {mc32: [33]}}}", "no whole number"),
        ("families: {a: {experiment: ks_scores.yaml, rivals: {ps64_bare: {}}}}", "has a run 'ps64_bare' already"),
        ("families: {a: {experiment: ks_scores.yaml, change: {sample.count: 3}}}", "sample"),
        (
            "families: {a: {experiment: ks_scores.yaml, runs: ['ps*'], ladders: {ps64_bare: [72, 72]}}}",
            "a run ps64_bare_72 already",
        ),
        ("families: {a: {experiment: ks_scores.yaml, limit: {shape: [128, 128]}}}", "a.limit.shape: needs 1 numbers"),
        ("families: {a: {experiment: ks_scores.yaml, limit: {shape: [64]}}}", "a.limit.shape: [64] is not finer than"),
        ("families: {a: {experiment: ks_scores.yaml, limit: {shape: [1024]}}}", "at most those of the reference, [512]"),
        ("families: {a: {experiment: ks_scores.yaml, limit: {shape: [128]}, change: {samples.count: 1}}}", "two starts or more"),
        ("families: {a: {experiment: mixing_layer_scores.yaml, limit: {shape: [64, 96]}}}", "must be periodic"),
        (
            "families: {a: {experiment: kolmogorov_scores.yaml, change: {'runs.ps48_learned_0.corrections[0].evaluate': 4}}}",
            "ps48_learned_0 evaluates a correction every 4 of 8 substeps",
        ),
        (
            "families: {a: {experiment: ks_scores.yaml, long: 9, "
            "rivals: {ps64_bare_long: {solver: spectral, shape: [64], dt: 1.0}}}}",
            "ps64_bare_long is what ps64_bare is called",
        ),
        ("families: {a: {experiment: ks_scores.yaml, limit: {shape: [128], time: 3}}}", "families.a.limit"),
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


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--family", "kolmogorow"), "did you mean 'kolmogorov'"),
        (("--against", "nowhere"), "--against: nowhere: there is no bench.json"),
        (("--against", "strange.json"), "these are not the results of a benchmark"),
    ],
)
def test_bad_options_are_refused(arguments, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "strange.json").write_text("[]")
    result = bench("speed", *arguments)
    assert result.exit_code == 2
    assert message in result.stderr
    assert not (tmp_path / "runs").exists()


def test_no_closure_is_left():
    """Every run with a closure was lost: the family says so, and the others go on."""
    found = headline({"metric": "t95", "closures": {}})
    assert found["verdict"] == "no run with a closure finished"
    assert found["speedup_best"] is None


def test_an_experiment_is_a_benchmark_of_one_family():
    spec, name = read_bench("ks_scores.yaml")
    assert name == "ks_scores"
    assert list(spec.families) == ["ks_scores"]


@pytest.mark.parametrize("name", shipped_benches())
@pytest.mark.parametrize("quick", [False, True])
def test_shipped_benchmarks_are_valid(name, quick):
    spec, _ = read_bench(name)
    for family, part in taking_part(spec, quick).items():
        experiment = FamilyPlan(family, part, quick).experiment()
        kinds = {closure_of(run) is None for run in experiment.spec.runs.values()}
        assert kinds == {True, False}, family


def test_a_pattern_chooses_runs():
    experiment = FamilyPlan("x", Family(experiment="ks_scores.yaml", runs=["ps64_*", "ps80_bare"]), quick=False).experiment()
    assert "ps80_bare" in experiment.labels
    assert all(x.startswith("ps64_") or x == "ps80_bare" for x in experiment.labels)
    with pytest.raises(ConfigError, match="no run is called"):
        FamilyPlan("x", Family(experiment="ks_scores.yaml", runs=["fv_*", "zz*"]), quick=False)


def test_families_are_chosen_by_name():
    spec, _ = read_bench("speed")
    assert list(taking_part(spec, quick=False, only=["mixing_layer"])) == ["mixing_layer"]
    assert set(taking_part(spec, quick=True)) < set(taking_part(spec, quick=False))
    with pytest.raises(ConfigError, match="did you mean 'kolmogorov'"):
        taking_part(spec, quick=False, only=["kolmogorow"])


def test_what_is_held_is_held_for_as_long_whatever_the_step():
    plan = FamilyPlan("x", Family(experiment="kolmogorov_scores.yaml", runs=["ps40*", "fv64_learned_0"]), quick=False)
    # 0.1 between two evaluations: five steps of 0.02, or three of 0.0333
    experiment = plan.variant("fv64_learned_0", 6, 0.2, 2)
    run = experiment.spec.runs["fv64_learned_0"]
    assert (run.substeps, run.corrections[0].evaluate) == (3, 3)
    assert run.dt == pytest.approx(0.2 / 6)
    assert experiment.model_for("fv64_learned_0").step_time == pytest.approx(0.1)
    assert plan.runs["fv64_learned_0"]["substeps"] == 5
    run = plan.variant("ps40_smagorinsky", 4, 0.2, 1).spec.runs["ps40_smagorinsky"]
    assert (run.substeps, run.corrections[0].evaluate) == (4, 4)


def test_ladders_scale_the_grid_and_the_step():
    family = Family(experiment="mixing_layer_scores.yaml", runs=["mc32", "learned_*"], ladders={"mc32": [48]})
    experiment = FamilyPlan("x", family, quick=False).experiment()
    assert experiment.spec.runs["mc32_48"].shape == [48, 72]
    assert experiment.spec.runs["mc32_48"].dt == pytest.approx(experiment.spec.runs["mc32"].dt / 1.5)
    assert experiment.spec.runs["mc32_48"].solver == experiment.spec.runs["mc32"].solver


@pytest.mark.slow
def test_the_benchmark_for_gpus_runs_on_a_tiny_case(tmp_path):
    """The shipped file for GPUs, on this processor: fewer runs, a coarse truth, a short window."""
    spec = yaml.safe_load(shipped_benches()["speed_gpu"].read_text())
    family = spec["families"]["kolmogorov"]
    family |= {"runs": ["ps32_bare", "ps32_learned_0", "ps36"], "ladders": {"ps36": [40]}, "long": 2}
    family["limit"] = {"shape": [48, 48], "end": 1}
    family["change"] |= {
        "samples.count": 2,
        "time.end": 1.0,
        "time.frames": 5,
        "time.statistics_from": 0.4,
        "reference.shape": [64, 64],
        "reference.precision": "float32",
        "initial.warm_up": 2,
        "initial.warm_up_shape": [64, 64],
    }
    spec |= {"families": {"kolmogorov": family}, "rounds": 3, "resamples": 20}
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(spec))
    result = bench(tmp_path / "tiny.yaml", "--out", tmp_path / "out")
    assert result.exit_code == 0, result.output
    found = json.loads((tmp_path / "out" / "bench.json").read_text())["families"]["kolmogorov"]
    assert set(found["closures"]) == {"kolmogorov_ps32"}
    assert {"ps32_bare", "ps36", "ps36_40"} <= {r["label"] for r in found["rungs"]}
    assert all(r["throughput"] > 0 for r in found["rungs"])


def test_rivals_of_other_codes_take_part_where_they_are_installed():
    rival = {"solver": {"use": "spectral", "dealias": "two_thirds"}, "shape": [64], "dt": 0.5}
    runs = ["ps64_bare", "ps64_learned_0"]
    family = Family(
        experiment="ks_scores.yaml",
        runs=runs,
        peers={"exponax": {"theirs": {**rival, "stepper": "exponax"}}, "no_such_package": {"others": rival}},
        ladders={"theirs": [80], "others": [80]},
    )
    plan = FamilyPlan("waves", family, quick=False)
    assert list(plan.runs) == ["ps64_bare", "ps64_learned_0", "theirs", "theirs_80"]
    assert plan.missing == {"no_such_package": ["others"]}
    assert method_of(Run.model_validate(plan.runs["theirs_80"])) == "spectral (two thirds) exponax"
    with pytest.raises(ConfigError, match=r"families.waves.peers: 'os.path' is not the name of a package"):
        FamilyPlan("waves", Family(experiment="ks_scores.yaml", peers={"os.path": {"x": rival}}), quick=False)
