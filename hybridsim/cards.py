"""Cards: what a trained closure is, what made it, how good it is beside its rivals, and where it fails, in numbers that runs wrote.

`hybridsim card NAME FOLDER …` reads the record that training left beside the weights and the folders of finished runs and
sweeps, and writes `NAME.json` and `NAME.md`. Who is what follows from the runs themselves: the closure's runs carry its weights
(one run per training seed), bare runs are the same solver on the same grid with nothing added, classical ones have a classical
closure there, and every run without learned weights, on any grid, may be the rival at equal cost.
"""

import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hybridsim import storage
from hybridsim.ablation import GROWS
from hybridsim.yaml_reader import ConfigError, parse_yaml

Row = dict[str, Any]

SLACK = 1.05
"""Costs within 5 % are equal: what a quiet machine repeats."""

FURTHER = (
    "t80",
    "velocity_error",
    "spectrum_error_common",
    "statistics_error",
    "density_error",
    "pressure_error",
    "error",
    "temperature_error",
)
"""Keys of a run that a card shows beside its accuracy, where they are defined."""

ALSO_JUDGED = {"velocity_error": True, "spectrum_error_common": True, "statistics_error": False, "error": True}
"""Measures by which a card asks, beside the accuracy, which classical run does as well, and whether runs on all grids are asked:
means cover what each grid holds, so they are compared on the closure's grid only."""

WORDS = {
    "t95": "t95",
    "t80": "t80",
    "error": "error",
    "velocity_error": "velocity error",
    "spectrum_error": "spectrum error",
    "spectrum_error_common": "spectrum error",
    "statistics_error": "statistics error",
    "density_error": "density error",
    "pressure_error": "pressure error",
    "temperature_error": "error of mass per temperature",
}


@dataclass(frozen=True)
class Evidence:
    """A finished run's folder: its resolved configuration and its summary."""

    folder: Path
    config: Mapping[str, Any]
    summary: Mapping[str, Any]

    @property
    def title(self) -> str:
        return str(self.summary.get("title") or self.summary["name"])

    def weights(self, label: str) -> list[str]:
        """Names of the weights that a run's closures were given."""
        found = [c.get("weights") for c in self.config["runs"][label].get("corrections", [])]
        return [Path(str(w)).name.removesuffix(".safetensors") for w in found if w]

    def learned(self, name: str) -> list[str]:
        """Labels of the runs with the closure `name`, one per seed; without runs of single seeds, those of the chosen one."""
        seeds = [label for label in self.config["runs"] if any(_seed_of(w, name) is not None for w in self.weights(label))]
        return seeds or [label for label in self.config["runs"] if name in self.weights(label)]


def _seed_of(weights: str, name: str) -> int | None:
    """The training seed of `NAME_seed0` or `NAME-seed0`."""
    for mark in ("_seed", "-seed"):
        if weights.startswith(name + mark) and weights[len(name + mark) :].isdigit():
            return int(weights[len(name + mark) :])
    return None


# --- reading ---------------------------------------------------------------------------------------------------------------------


def read_folder(folder: Path) -> Evidence | dict[str, Any]:
    """The evidence in a run's folder, or the results of a sweep."""
    if (folder / "sweep.json").is_file():
        return storage.read_json(folder / "sweep.json")
    summary, config = folder / "summary.json", folder / "config.yaml"
    if not (summary.is_file() and config.is_file()):
        raise ConfigError(f"{folder}: neither a finished run (summary.json, config.yaml) nor a sweep (sweep.json)")
    return Evidence(folder, parse_yaml(config.read_text(encoding="utf-8"), str(config)), storage.read_json(summary))


def find_weights(name: str) -> Path:
    """The weights file that `name` stands for: a path, or the name of shipped weights."""
    from hybridsim.config import shipped_weights
    from hybridsim.yaml_reader import suggestion

    path = Path(name)
    if path.suffix == ".safetensors" or path.is_file():
        if not path.is_file():
            raise ConfigError(f"{path}: there is no such file")
        return path
    shipped = shipped_weights()
    if name not in shipped:
        raise ConfigError(f"{name}: no weights of that name are shipped; {suggestion(name, list(shipped), 'there are')}")
    return shipped[name]


# --- who is what -----------------------------------------------------------------------------------------------------------------


def _row(evidence: Evidence, label: str) -> Row:
    """What a card keeps of a run."""
    found, run = evidence.summary["runs"][label], evidence.config["runs"][label]
    metric = found["accuracy"]["metric"]
    bound = found.get(f"{metric}_at_least") if found.get(metric) is None else None
    interval = found.get(f"{metric}_interval")
    return {
        "run": label,
        "title": run.get("title") or label,
        "value": found["accuracy"]["value"],
        "at_least": bound is not None,
        "interval": None if interval is None or None in interval else interval,
        "cost": found["seconds_per_unit_time"],
        "outcome": found["outcome"],
        "dt": found.get("dt"),
        **{name: found[name] for name in FURTHER if name != metric and found.get(name) is not None},
    }


def _solved(run: Mapping[str, Any]) -> tuple[Any, ...]:
    """What makes two runs the same coarse solver: grid and precision, and the family of the discretisation."""
    solver = run["solver"]
    return (solver["use"] if isinstance(solver, Mapping) else solver, list(run["shape"]), run.get("precision"))


def _better(metric: str) -> Callable[[Row], float]:
    """A key that is larger for better rows."""
    return (lambda r: r["value"]) if metric in GROWS else (lambda r: -r["value"])


def _usable(rows: Iterable[Row]) -> list[Row]:
    return [r for r in rows if r["value"] is not None and r["outcome"] == "finished"]


def _mean(rows: Sequence[Row], key: str) -> float | None:
    values = [r[key] for r in rows if r.get(key) is not None]
    return statistics.fmean(values) if len(values) == len(rows) and values else None


def scores_of(evidence: Evidence, name: str) -> dict[str, Any]:
    """The closure and its rivals in one finished run: `{closure, bare, classical, equal_cost, cheapest_as_good, …}`.

    - `closure`: mean over training seeds, least and largest, each seed.
    - `bare`: the best run of the same solver on the same grid without closures (whatever its scheme and step, and even if it ended
      in a blow-up); `all_bare`: all of them.
    - `classical`: runs there with classical closures, best first.
    - `equal_cost`: the best finished run without learned weights on any grid that costs no more than the closure (within 5 %).
    - `cheapest_as_good`: the cheapest such run that is at least as accurate, if there is one; `cheapest_as_good_by`: by other
      measures: spectra on the shells that all runs hold, errors of fields, and means among runs on the same grid.
    """
    labels = evidence.learned(name)
    if not labels:
        raise ConfigError(f"{evidence.folder}: no run there has the weights {name!r}")
    runs = evidence.config["runs"]
    metric = evidence.summary["runs"][labels[0]]["accuracy"]["metric"]
    rows = [_row(evidence, label) for label in labels]
    key = _better(metric)
    place = _solved(runs[labels[0]])
    plain = [label for label in runs if not evidence.weights(label)]
    others = {label: _row(evidence, label) for label in plain}
    here = [label for label in plain if _solved(runs[label]) == place]
    known = [x for x in here if others[x]["value"] is not None]
    bare = sorted((others[x] for x in known if not runs[x].get("corrections")), key=key, reverse=True)
    classical = sorted((others[x] for x in known if runs[x].get("corrections")), key=key, reverse=True)
    good = _usable(rows)
    closure: dict[str, Any] = {"seeds": rows, "value": None, "least": None, "largest": None}
    if good:
        values = [r["value"] for r in good]
        closure |= {"value": statistics.fmean(values), "least": min(values), "largest": max(values)}
    closure |= {"at_least": any(r["at_least"] for r in good), "cost": statistics.median(r["cost"] for r in rows)}
    closure |= {"failed": len(rows) - len(good)}
    closure |= {name: mean for name in FURTHER if (mean := _mean(rows, name)) is not None}
    affordable = [r for r in _usable(others.values()) if r["cost"] <= SLACK * closure["cost"]]
    as_good = [r for r in _usable(others.values()) if good and key(r) >= key(closure)]
    means = {}
    same_grid = [r for r in _usable(others.values()) if runs[r["run"]]["shape"] == runs[labels[0]]["shape"]]
    for measure, on_any_grid in ALSO_JUDGED.items():
        if measure != metric and closure.get(measure) is not None:
            asked = _usable(others.values()) if on_any_grid else same_grid
            there = [r for r in asked if r.get(measure) is not None and r[measure] <= closure[measure]]
            means[measure] = min(there, key=lambda r: r["cost"]) if there else None
    return {
        "experiment": evidence.summary["name"],
        "metric": metric,
        "at": evidence.summary["runs"][labels[0]]["accuracy"].get("at"),
        "samples": evidence.summary["samples"],
        "modes": evidence.summary.get("modes"),
        "date": evidence.summary["date"],
        "device": evidence.summary["device"],
        "commit": evidence.summary["versions"].get("commit"),
        "reference": {k: evidence.summary["reference"].get(k) for k in ("shape", "precision", "converged_until")},
        "closure": closure,
        "bare": bare[0] if bare else None,
        "all_bare": bare,
        "classical": classical,
        "equal_cost": max(affordable, key=key) if affordable else None,
        "cheapest_as_good": min(as_good, key=lambda r: r["cost"]) if as_good else None,
        "cheapest_as_good_by": means,
        "rivals": list(others.values()),
    }


def long_run_of(evidence: Evidence, name: str) -> dict[str, Any]:
    """How the closure's runs end, and their long-run means beside the reference's."""
    found = {}
    for label in evidence.learned(name):
        run = evidence.summary["runs"][label]
        found[label] = {
            "outcome": run["outcome"],
            "steps": run["steps"],
            "dt": run["dt"],
            "statistics": run["statistics"],
            **{k: run[k] for k in ("statistics_error", "spectrum_error", "spectrum_worst", "frozen") if run.get(k) is not None},
        }
    summary = evidence.summary
    lengths = evidence.config.get("domain", {}).get("lengths")
    kept = {k: summary[k] for k in ("name", "samples", "date", "device")}
    return {**kept, "title": evidence.title, "lengths": lengths, "runs": found}


# --- writing ---------------------------------------------------------------------------------------------------------------------


def _number(value: float | None, bound: bool = False) -> str:
    if value is None:
        return "–"
    return ("≥ " if bound else "") + (f"{value:.3f}" if 1e-2 <= abs(value) < 100 else f"{value:.3g}")


def _milliseconds(cost: float | None) -> str:
    return "–" if cost is None else f"{1e3 * cost:.3g}"


def _line(cells: Iterable[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def _table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    return ["", _line(heads), _line(["---"] * len(heads)), *map(_line, rows), ""]


def _with_interval(row: Row) -> str:
    text = _number(row["value"], row["at_least"]) if row["value"] is not None else row["outcome"]
    low_high = row.get("interval")
    text += f" [{_number(low_high[0])}, {_number(low_high[1])}]" if low_high else ""
    return text if row["outcome"] == "finished" or row["value"] is None else f"{text}; {row['outcome'].split(';')[0]}"


def _ratio(scores: Mapping[str, Any], rival: Row | None) -> float | None:
    """How many times better the closure is than a rival."""
    ours = scores["closure"]["value"]
    if rival is None or not ours or not rival["value"]:
        return None
    return ours / rival["value"] if scores["metric"] in GROWS else rival["value"] / ours


def _on_any_grid(measure: str, scores: Mapping[str, Any]) -> bool:
    return measure == scores["metric"] or ALSO_JUDGED[measure]


def sentences(scores: Mapping[str, Any]) -> list[str]:
    """The verdicts that follow from the scores."""
    out, metric, closure = [], WORDS[scores["metric"]], scores["closure"]
    if closure["value"] is None:
        return ["Every run of it failed."]
    if closure["failed"]:
        out.append(f"{closure['failed']} of {len(closure['seeds'])} runs of it failed.")

    def compared(rival: Row, what: str) -> str:
        ratio = _ratio(scores, rival)
        if ratio is None:
            return f"{what} ({rival['title']}) reaches {_number(rival['value'])}."
        better = f"{ratio:.2f} times as good as" if ratio >= 1 else f"{1 / ratio:.2f} times worse than"
        return f"Its {metric} is {better} that of {what} ({rival['title']})."

    if scores["bare"]:
        out.append(compared(scores["bare"], "the bare solver on the same grid"))
    if scores["classical"]:
        out.append(compared(scores["classical"][0], "the best classical closure there"))
    if scores["equal_cost"]:
        out.append(compared(scores["equal_cost"], "the best classical run that costs no more"))
    for measure, rival in {scores["metric"]: scores["cheapest_as_good"], **scores["cheapest_as_good_by"]}.items():
        word = WORDS[measure]
        if rival is not None:
            cost = rival["cost"] / closure["cost"]
            price = f"{cost:.2f} times its cost" if cost >= 1 else f"{cost:.2f} of its cost: there the closure does not pay"
            where = "" if _on_any_grid(measure, scores) else " on this grid"
            out.append(f"The cheapest classical run{where} that does as well by {word} ({rival['title']}) takes {price}.")
            continue
        if not _on_any_grid(measure, scores):
            out.append(f"No classical run on this grid does as well by {word} (on other grids it covers other scales).")
            continue
        value = "value" if measure == scores["metric"] else measure
        ranked = sorted((r for r in _usable(scores["rivals"]) if r.get(value) is not None), key=lambda r: r[value])
        sentence = f"No classical run in the table does as well by {word}"
        if ranked:
            best = ranked[-1] if measure in GROWS else ranked[0]
            sentence += (
                f"; the best of them ({best['title']}) has {_number(best[value])}, at {best['cost'] / closure['cost']:.2f} times"
            )
            sentence += " its cost"
        out.append(sentence + ".")
    return out


def _score_lines(scores: Mapping[str, Any]) -> list[str]:
    metric, closure = scores["metric"], scores["closure"]
    shown = [name for name in FURTHER if name != metric and closure.get(name) is not None]
    at = f" at t = {scores['at']:g}" if scores.get("at") else ""
    heads = ["", f"{WORDS[metric]}{at}", *(WORDS[name] for name in shown), "ms per unit time"]

    def row(what: str, r: Row) -> list[str]:
        return [what, _with_interval(r), *(_number(r.get(name)) for name in shown), _milliseconds(r["cost"])]

    spread = "" if closure["value"] is None else f" ({_number(closure['least'])} to {_number(closure['largest'])})"
    mean = [f"**mean of {len(closure['seeds'])}**" if len(closure["seeds"]) > 1 else "**the closure**"]
    mean += [f"**{_number(closure['value'], closure['at_least'])}**{spread}"]
    mean += [*(f"**{_number(closure.get(name))}**" for name in shown), f"**{_milliseconds(closure['cost'])}**"]
    rows = [mean, *(row(r["title"], r) for r in closure["seeds"])]
    rows += [row(f"bare: {r['title']}", r) for r in scores["all_bare"]]
    rows += [row(f"classical: {r['title']}", r) for r in scores["classical"]]
    listed = {r["run"] for r in (*scores["all_bare"], *scores["classical"])}
    rows += [row(r["title"], r) for r in scores["rivals"] if r["run"] not in listed]
    better = "the larger the better" if metric in GROWS else "the smaller the better"
    shape = " × ".join(map(str, scores["reference"]["shape"]))
    intro = f"{WORDS[metric]}{at}, {better}; {scores['samples']} starts that no training has seen, against {shape}"
    intro += f" in {scores['reference']['precision']}; brackets: 90 % bootstrap over starts, parentheses: least and largest seed."
    if "spectrum_error_common" in shown:
        intro += " Spectra on the shells that every grid in the table holds."
    return [intro, *_table(heads, rows)]


def _sweep_lines(sweep: Mapping[str, Any]) -> list[str]:
    rank, cases = sweep["rank"], sweep["cases"]
    beside = list(cases[0].get("beside", {}))

    def cell(r: Mapping[str, Any] | None) -> str:
        if r is None:
            return ""
        if r["score"] is None:
            return r["outcome"].split(";")[0]
        low_high = r.get("interval")
        tail = f" [{_number(low_high[0])}, {_number(low_high[1])}]" if low_high else ""
        return _number(r["score"], r.get("at_least", False)) + tail

    better = "the larger the better" if rank in GROWS else "the smaller the better"
    rows = [[", ".join(map(str, c["values"].values())), cell(c), *(cell(c["beside"].get(x)) for x in beside)] for c in cases]
    heads = ["", sweep.get("run", "learned"), *beside]
    return [f"{WORDS.get(rank, rank)}, {better} [90 % interval over starts].", *_table(heads, rows)]


def _long_lines(found: Mapping[str, Any]) -> list[str]:
    runs = found["runs"]
    steps = max((r["steps"] for r in runs.values()), default=0)
    ended = "; ".join(sorted({f"{label}: {r['outcome']}" for label, r in runs.items()}))
    box = f"Box {' × '.join(f'{x:g}' for x in found['lengths'])}; " if found.get("lengths") else ""
    lines = [f"{box}{found['samples']} starts, {steps:,} steps each ({found['name']}). {ended}."]
    # the mean of dE/dt is the difference of two frames, or nothing
    names = [name for name in next(iter(runs.values()))["statistics"] if name != "energy_rate"] if runs else []
    rows = []
    for name in names:
        first = next(iter(runs.values()))["statistics"][name]
        reference, error = first.get("reference"), first.get("reference_standard_error")
        cells = [name.replace("_", " "), f"{_number(reference)} ± {_number(error)}"]
        for r in runs.values():
            s = r["statistics"][name]
            gap = s.get("difference")
            cells.append(_number(s.get("mean")) + ("" if gap is None else f" ({100 * gap:+.1f} %)"))
        rows.append(cells)
    for key, word in (("spectrum_worst", "largest ln(E/E_ref) of a shell, up or down"), ("frozen", "samples no longer chaotic")):
        if any(key in r for r in runs.values()):
            rows.append([word, "", *(_number(r.get(key)) if key != "frozen" else str(r.get(key, "–")) for r in runs.values())])
    if rows:
        lines += _table(["mean over the long run", "reference", *runs], rows)
    return lines


def _training_lines(card: Mapping[str, Any]) -> list[str]:
    recipe, data, seeds = card["recipe"], card["data"], card["seeds"]
    seconds = [row["seconds"] for row in seeds.values()]
    shape = data.get("shape")
    phases = ", ".join(f"{n} × {u}" for n, u in zip(recipe["updates"], recipe["unroll"], strict=True))
    loss = recipe.get("loss") or [["state", 1.0]]
    terms = ", ".join(f"{weight:g} {name}" for name, weight in loss)
    lines = [
        f"- Made by `hybridsim train {card['experiment']}.yaml` on {card['date']} ({card['device']}, hybridsim "
        f"{card['versions']['hybridsim']}, JAX {card['versions']['jax']}).",
        f"- Data: {data['trajectories']} filtered trajectories of length {data['time']:g} for training, {data['validation']} "
        f"others of {data['validation_time']:g} for choosing, a frame every {data['interval']:g}"
        + (f", from {' × '.join(map(str, shape))}" if shape else ", from the reference's grid")
        + f" in {data['precision']}.",
        f"- Updates × unrolled frames: {phases}; batch {recipe['batch']}, peak rate {recipe['rate']:g}, loss {terms}"
        + (f", weighted by |k|^{2 * recipe['power']:g}." if recipe["power"] else "."),
        f"- Seeds: {len(seeds)}, {min(seconds):.0f} to {max(seconds):.0f} s each; shipped is seed {card['chosen_seed']}, by "
        f"{card['chosen_by']}.",
    ]
    rows = []
    for seed, row in seeds.items():
        v = row["validation"]
        t95 = _number(v["t95"] if v["t95"] is not None else v["t95_at_least"], v["t95"] is None)
        rows.append([seed, t95, _number(v.get("mean_error")), str(row["best_update"]), str(row["skipped_updates"])])
    return [*lines, *_table(["seed", "validation t95", "validation error", "best update", "updates skipped"], rows)]


def card_text(card: Mapping[str, Any], name: str) -> str:
    """The card as Markdown."""
    shape = " × ".join(map(str, card["shape"]))
    solver = card["solver"]
    scheme = ", ".join(v for v in (solver.values() if isinstance(solver, Mapping) else [solver]) if isinstance(v, str))
    lines = [
        f"# {name}",
        "",
        f"`{card['closure']}`, {card['parameters']:,} parameters, for `{card['family']}` on {shape} ({scheme}) with Δt = "
        f"{card['dt']:g}.",
        "",
        *(f"- {sentence}" for sentence in sentences(card["scores"])),
        "",
        "## Scores",
        "",
        *_score_lines(card["scores"]),
        "## Training",
        "",
        *_training_lines(card),
    ]
    for sweep in card.get("away", []):
        lines += [f"## {sweep['title']}", "", *_sweep_lines(sweep)]
    for found in card.get("long_runs", []):
        lines += [f"## {found['title']}", "", *_long_lines(found)]
    return "\n".join(lines).rstrip("\n") + "\n"


def _merged(old: Sequence[Mapping[str, Any]], new: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """New entries in the place of old ones of their title and box, the others after them."""

    def key(entry: Mapping[str, Any]) -> tuple[str, str]:
        return entry["title"], str(entry.get("lengths"))

    return list(({key(entry): entry for entry in old} | {key(entry): entry for entry in new}).values())


def write_card(name: str, folders: Sequence[Path], out: Path | None = None, *, add: bool = False) -> tuple[Path, Path]:
    """`NAME.json` and `NAME.md` beside the weights, or in `out`: the record of the training, with the evidence of `folders`.

    **Arguments:**

    - `name`: shipped weights, or a `.safetensors` with the `.json` that training left beside it.
    - `folders`: of finished runs and sweeps. The first run with the closure gives the scores; further runs are long runs, sweeps
      are tables of where it holds.
    - `out`: another folder for the two files.
    - `add`: the card keeps its scores and what else it shows; the folders are further long runs and sweeps, in the place of those
      of the same title and box.

    Raises `ConfigError` (one sentence) where something does not fit.
    """
    weights = find_weights(name)
    record = weights.with_suffix(".json")
    if not record.is_file():
        raise ConfigError(f"{record}: the record that `hybridsim train` writes beside the weights is missing")
    card, stem = storage.read_json(record), weights.stem
    found = [read_folder(folder) for folder in folders]
    runs = [f for f in found if isinstance(f, Evidence)]
    away = [f for f in found if not isinstance(f, Evidence)]
    if add:
        if "scores" not in card:
            raise ConfigError(f"{stem}: there is no card yet that something could be added to; leave out --add")
        card["away"] = _merged(card.get("away", []), away)
        card["long_runs"] = _merged(card.get("long_runs", []), [long_run_of(f, stem) for f in runs])
    else:
        if not runs:
            raise ConfigError(f"{stem}: a card needs the folder of at least one finished run with the closure and its rivals")
        card["scores"] = scores_of(runs[0], stem)
        card["away"] = away
        card["long_runs"] = [long_run_of(f, stem) for f in runs[1:]]
    folder = weights.parent if out is None else out
    folder.mkdir(parents=True, exist_ok=True)
    paths = folder / f"{stem}.json", folder / f"{stem}.md"
    with storage.renewed(folder, [path.name for path in paths]):
        storage.write_json(paths[0], card)
        storage.atomic_write(paths[1], card_text(card, stem))
    return paths
