"""`hybridsim card` — who is what among the runs, what is said, and what is refused."""

import json
import re
import shutil
from pathlib import Path

import pytest
import yaml
from test_ablation import CASE, hybridsim

from hybridsim import cards
from hybridsim.yaml_reader import ConfigError

pytestmark = pytest.mark.usefixtures("x64")


def evidence(runs, metric="t95", **summary):
    """A finished run, from (value, cost, [solver use], [corrections]) of each label."""
    config, found = {}, {}
    for label, (value, cost, shape, corrections) in runs.items():
        config[label] = {"solver": {"use": "spectral"}, "shape": [shape], "precision": "float32", "corrections": corrections}
        found[label] = {
            "accuracy": {"metric": metric, "value": value},
            metric: value,
            f"{metric}_interval": [0.9 * value, 1.1 * value] if value is not None else [None, None],
            "seconds_per_unit_time": cost,
            "outcome": "finished" if value is not None else "diverged",
            "dt": 0.5,
            "steps": 100_000,
            "statistics": {"energy": {"mean": 1.02, "reference": 1.0, "reference_standard_error": 0.01, "difference": 0.02}},
            "spectrum_error_common": 0.1,
            "statistics_error": 0.2,
        }
    base = {"name": "scores", "title": "Scores", "samples": 8, "date": "2026-01-01", "device": "a machine", "modes": 7}
    base |= {"versions": {"commit": "abc"}, "reference": {"shape": [64], "precision": "float64", "converged_until": 5.0}}
    return cards.Evidence(Path("scores"), {"runs": config}, {**base, **summary, "runs": found})


LEARNED = [{"use": "learned_flux", "weights": "mine_seed0"}]
EDDY = [{"use": "smagorinsky", "cs": 0.1}]


def test_rivals_are_found_by_what_they_are():
    found = cards.scores_of(
        evidence(
            {
                "bare": (1.0, 1e-3, 16, []),
                "bare_other_dt": (1.2, 2e-3, 16, []),
                "eddy": (2.0, 2e-3, 16, EDDY),
                "eddy_worse": (1.1, 2e-3, 16, EDDY),
                "learned_0": (4.0, 4e-3, 16, LEARNED),
                "learned_1": (5.0, 6e-3, 16, [{"use": "learned_flux", "weights": "mine_seed1"}]),
                "chosen": (4.0, 4e-3, 16, [{"use": "learned_flux", "weights": "mine"}]),
                "another": (9.0, 1e-3, 16, [{"use": "learned_flux", "weights": "mine_too_seed0"}]),
                "finer": (4.4, 5.1e-3, 24, []),
                "finest": (6.0, 9e-3, 32, []),
                "broken": (None, 1e-3, 32, []),
            }
        ),
        "mine",
    )
    assert [r["run"] for r in found["closure"]["seeds"]] == ["learned_0", "learned_1"]
    assert (found["closure"]["value"], found["closure"]["least"], found["closure"]["largest"]) == (4.5, 4.0, 5.0)
    assert found["closure"]["cost"] == pytest.approx(5e-3)
    assert found["bare"]["run"] == "bare_other_dt"
    assert [r["run"] for r in found["classical"]] == ["eddy", "eddy_worse"]
    assert found["equal_cost"]["run"] == "finer"  # within 5 % of the cost
    assert found["cheapest_as_good"]["run"] == "finest"
    said = " ".join(cards.sentences(found))
    assert "3.75 times as good as that of the bare solver on the same grid (bare_other_dt)" in said
    assert "1.02 times as good as that of the best classical run that costs no more (finer)" in said
    assert "does as well by t95 (finest) takes 1.80 times its cost" in said
    # all have the same here; a mean is compared on the closure's own grid
    assert found["cheapest_as_good_by"]["spectrum_error_common"]["cost"] == 1e-3
    assert found["cheapest_as_good_by"]["statistics_error"]["run"] == "bare"


def test_errors_are_better_when_they_are_smaller():
    runs = {"bare": (0.4, 1e-3, 16, []), "learned": (0.1, 4e-3, 16, LEARNED), "finer": (0.05, 2e-3, 24, [])}
    found = cards.scores_of(evidence(runs, "error"), "mine")
    assert found["equal_cost"]["run"] == found["cheapest_as_good"]["run"] == "finer"
    said = " ".join(cards.sentences(found))
    assert "4.00 times as good as that of the bare solver" in said
    assert "2.00 times worse than that of the best classical run" in said
    assert "takes 0.50 of its cost: there the closure does not pay" in said
    found = cards.scores_of(evidence({label: runs[label] for label in ("bare", "learned")}, "error"), "mine")
    said = " ".join(cards.sentences(found))
    assert "No classical run in the table does as well by error; the best of them (bare) has 0.400, at 0.25 times its cost." in said


def test_means_are_compared_on_one_grid_and_spectra_on_all():
    runs = {"learned": (1.0, 4e-3, 16, LEARNED), "finer": (2.0, 1e-3, 24, [])}
    given = evidence(runs)
    found = cards.scores_of(given, "mine")
    assert found["cheapest_as_good_by"] == {"spectrum_error_common": found["rivals"][0], "statistics_error": None}
    said = " ".join(cards.sentences(found))
    assert "does as well by spectrum error (finer) takes 0.25 of its cost" in said
    assert "No classical run on this grid does as well by statistics error" in said
    given.summary["runs"]["finer"]["spectrum_error_common"] = 0.3
    said = " ".join(cards.sentences(cards.scores_of(given, "mine")))
    assert "No classical run in the table does as well by spectrum error; the best of them (finer) has 0.300" in said


def test_a_closure_that_blows_up_is_not_praised():
    both = [{"use": "learned_flux", "weights": "mine_seed1"}]
    runs = {"bare": (1.0, 1e-3, 16, []), "a": (4.0, 4e-3, 16, LEARNED), "b": (None, 4e-3, 16, both)}
    found = cards.scores_of(evidence(runs), "mine")
    assert found["closure"]["failed"] == 1
    assert cards.sentences(found)[0] == "1 of 2 runs of it failed."
    found = cards.scores_of(evidence({"bare": (1.0, 1e-3, 16, []), "a": (None, 4e-3, 16, LEARNED)}), "mine")
    assert cards.sentences(found) == ["Every run of it failed."]
    with pytest.raises(ConfigError, match="no run there has the weights 'other'"):
        cards.scores_of(evidence(runs), "other")


@pytest.mark.slow
def test_a_card_from_the_first_training_to_the_last_table(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HYBRIDSIM_CACHE", str(tmp_path / "cache"))
    (tmp_path / "case.yaml").write_text(yaml.safe_dump(CASE))
    assert hybridsim("train", "case.yaml", "--out", "trained").exit_code == 0
    scored = {**CASE, "runs": dict(CASE["runs"])}
    del scored["train"]
    for seed in (0, 1):
        closure = {**CASE["runs"]["mine"]["corrections"][0], "weights": f"trained/mine-seed{seed}.safetensors"}
        scored["runs"][f"mine_{seed}"] = {**CASE["runs"]["mine"], "corrections": [closure]}
    del scored["runs"]["mine"]
    scored["runs"]["eddy"] = {**CASE["runs"]["bare"], "corrections": EDDY}
    scored["runs"]["finer"] = {**CASE["runs"]["bare"], "shape": [24]}
    (tmp_path / "scores.yaml").write_text(yaml.safe_dump(scored))
    assert hybridsim("run", "scores.yaml", "--out", "scores").exit_code in (0, 1)
    away = {**scored, "sweep": {"run": "mine_0", "beside": ["bare"], "order": "file", "over": {"flow": {}}}}
    away["sweep"]["over"]["flow"] = {"as trained": {}, "half the time step": {"runs.mine_0.dt": 0.5, "runs.bare.dt": 0.5}}
    away["title"] = "Away from its training"
    away["runs"] = {label: scored["runs"][label] for label in ("bare", "mine_0")}
    (tmp_path / "away.yaml").write_text(yaml.safe_dump(away))
    assert hybridsim("run", "away.yaml", "--out", "away").exit_code in (0, 1)

    done = hybridsim("card", "trained/mine.safetensors", "scores", "away", "scores", "--out", "cards")
    assert done.exit_code == 0, done.output
    card = json.loads((tmp_path / "cards" / "mine.json").read_text())
    assert {"closure", "family", "solver", "parameters", "recipe", "data", "seeds"} <= set(card)
    assert {"closure", "bare", "classical", "equal_cost"} <= set(card["scores"])
    assert card["scores"]["bare"]["run"] == "bare"
    assert [r["run"] for r in card["scores"]["classical"]] == ["eddy"]
    assert {r["run"] for r in card["scores"]["closure"]["seeds"]} == {"mine_0", "mine_1"}
    summary = json.loads((tmp_path / "scores" / "summary.json").read_text())
    assert card["scores"]["bare"]["cost"] == summary["runs"]["bare"]["seconds_per_unit_time"]
    text = (tmp_path / "cards" / "mine.md").read_text()
    for heading in ("# mine", "## Scores", "## Training", "## Away from its training"):
        assert f"{heading}\n" in text
    assert "half the time step" in text
    widths = []
    for block in re.findall(r"(?:^\|.*\n)+", text, re.M):
        widths.append({line.count("|") for line in block.splitlines()})
    assert widths
    assert all(len(found) == 1 for found in widths)
    assert not re.search(r"nan|None", text)
    # the same evidence gives the same card
    before = (tmp_path / "cards" / "mine.md").read_bytes()
    assert hybridsim("card", "trained/mine.safetensors", "scores", "away", "scores", "--out", "cards").exit_code == 0
    assert (tmp_path / "cards" / "mine.md").read_bytes() == before

    # evidence that comes later takes the place of what it replaces, and leaves the scores as they are
    assert hybridsim("card", "trained/mine.safetensors", "away", "--add").exit_code == 2
    shutil.copy(tmp_path / "cards" / "mine.json", tmp_path / "trained" / "mine.json")
    assert hybridsim("card", "trained/mine.safetensors", "away", "scores", "--add").exit_code == 0
    assert (tmp_path / "trained" / "mine.md").read_bytes() == before
    renamed = json.loads((tmp_path / "away" / "sweep.json").read_text()) | {"title": "Far away"}
    (tmp_path / "away" / "sweep.json").write_text(json.dumps(renamed))
    assert hybridsim("card", "trained/mine.safetensors", "away", "--add").exit_code == 0
    text = (tmp_path / "trained" / "mine.md").read_text()
    assert "## Away from its training\n" in text
    assert "## Far away\n" in text

    for arguments, sentence in (
        (("ks_ps46", "scores"), "ks_ps46: no weights of that name are shipped; did you mean 'ks_ps64'?"),
        (("nowhere.safetensors", "scores"), "nowhere.safetensors: there is no such file"),
        (("trained/mine.safetensors", "trained"), "trained: neither a finished run"),
        (("trained/mine.safetensors", "away", "--out", "other"), "mine: a card needs the folder of at least one finished run"),
        (("ks_ps64", "scores"), "scores: no run there has the weights 'ks_ps64'"),
        (("trained/mine-seed0.safetensors", "scores"), "trained/mine-seed0.json: the record"),
    ):
        refused = hybridsim("card", *arguments)
        assert refused.exit_code == 2
        assert sentence in " ".join(refused.output.split()), refused.output
