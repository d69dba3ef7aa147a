"""`sweep:` — the cases of an ablation, one after another, and which of them did best.

`hybridsim train` trains the run of every case with all of its seeds and ranks the cases by what they reached on the validation
starts; `hybridsim run` runs them and ranks them by the keys of `summary.json`. Each case keeps a folder of its own below `cases/`;
what is finished is never done again by `--resume`.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict

import numpy as np

from hybridsim import resuming, storage
from hybridsim.drawing import PALETTE, STYLE, png
from hybridsim.journal import SAVE_EVERY
from hybridsim.progress import Reporter
from hybridsim.reference import FineRunError, initial_state
from hybridsim.signals import STOP
from hybridsim.train import TrainingDiverged, without_closures
from hybridsim.yaml_reader import ConfigError, key_path, show_value

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from rich.console import Console

    from hybridsim.config import Case, Experiment

LEVEL = 0.9
"""Of the intervals: Student's t over seeds, the bootstrap over starts."""

GROWS = ("t95", "t80", "correlation")
"""The larger the better; everything else is an error."""

TRAINED = {
    "t95": "t95",
    "t80": "t80",
    "correlation": "mean_correlation",
    "error": "mean_error",
    "temperature_error": "temperature_error",
}
"""`sweep.rank` -> key of the validation scores."""

Record = dict[str, Any]
"""What is kept of a case; see `sweep.json`."""


class Options(TypedDict):
    """What `run_locked` and `train_locked` take besides."""

    force: bool
    save_every: float


# --- numbers ---------------------------------------------------------------------------------------------------------------------


def interval_of_mean(values: Sequence[float]) -> tuple[float, float] | None:
    """x̄ ± t_{n−1} s/√n: the 90 % interval of the mean of normal values; None for fewer than two."""
    if len(values) < 2:
        return None
    from scipy.stats import t

    mean, half = (
        float(np.mean(values)),
        float(t.ppf(0.5 + LEVEL / 2, len(values) - 1) * np.std(values, ddof=1) / len(values) ** 0.5),
    )
    return mean - half, mean + half


def ranked(records: Sequence[Record], rank: str) -> list[Record]:
    """The cases from the best to the worst; those without a score come last."""
    sign = -1.0 if rank in GROWS else 1.0
    return sorted(records, key=lambda r: math.inf if r["score"] is None else sign * r["score"])


def alike(records: Sequence[Record]) -> list[str]:
    """Names of the cases that cannot be told from the first: their intervals overlap, or neither was followed to its end."""
    scored = [r for r in records if r["score"] is not None]
    if not scored:
        return []
    first, *others = scored
    if first["at_least"]:
        return [r["case"] for r in others if r["at_least"]]
    if first["interval"] is None:
        return []
    low, high = _ends(first)
    spans = {r["case"]: _ends(r) for r in others if r["interval"] is not None}
    return [case for case, span in spans.items() if span[0] <= high and span[1] >= low]


def _ends(record: Record) -> tuple[float, float]:
    """The interval of a case; one that was not followed to its end has none."""
    low, high = record["interval"]
    return low, math.inf if high is None else high


def effects(records: Sequence[Record]) -> dict[str, list[tuple[str, float, int]]]:
    """axis -> (value, mean score over the cases that have it, how many these are), in the order of the file."""
    found: dict[str, list[tuple[str, float, int]]] = {}
    for axis in records[0]["values"] if records else ():
        rows: dict[str, list[float]] = {}
        for record in records:
            rows.setdefault(record["values"][axis], [])
            if record["score"] is not None:
                rows[record["values"][axis]].append(record["score"])
        found[axis] = [(value, float(np.mean(scores)), len(scores)) for value, scores in rows.items() if scores]
    return found


def _reached(scores: Mapping[str, Any], key: str) -> tuple[float | None, bool]:
    """(value, whether it is only a lower bound) of a score that may not have been crossed."""
    value = scores.get(key)
    if value is None and scores.get(f"{key}_at_least") is not None:
        return float(scores[f"{key}_at_least"]), True
    return (None if value is None else float(value)), False


# --- what one case gives ---------------------------------------------------------------------------------------------------------


def _cost(case: "Case") -> dict[str, float]:
    """Seconds per unit time of one start alone, with the closures and without."""
    import jax

    from hybridsim.experiment import cost_of

    experiment, label = case.experiment, case.run
    model = experiment.model_for(label, closures=experiment.closures_for(label, weights=False))
    u = initial_state(experiment.initial(), jax.random.key(0), model.solver, np.dtype(experiment.dtype(label)))
    return {"cost": cost_of(model, u), "cost_bare": cost_of(without_closures(model), u)}


def _failed(error: Exception, say: Reporter) -> Record:
    say.line(str(error))
    return {"outcome": str(error), "score": None, "interval": None, "scores": [], "at_least": False}


def _trained(case: "Case", folder: Path, resume: bool, say: Reporter, rank: str, options: Options) -> Record:
    from hybridsim.training import recipe_of, train_locked

    train = case.experiment.spec.train
    assert train is not None
    try:
        train_locked(case.experiment, recipe_of(train), folder, resume, say, **options)
    except (TrainingDiverged, FineRunError) as error:
        return _failed(error, say)
    card = storage.read_json(folder / f"{train.run}.json")
    found = [_reached(seed["validation"], TRAINED[rank]) for seed in card["seeds"].values()]
    values = [value for value, _ in found if value is not None]
    bare, _ = _reached(card["validation_bare"], TRAINED[rank])
    whole, bound = len(values) == len(found), any(bound for _, bound in found)
    return {
        "outcome": "finished" if whole else "not finite",
        "score": float(np.mean(values)) if whole else None,
        "interval": interval_of_mean(values) if whole and not bound else None,
        "scores": values,
        "at_least": bound,
        "bare": bare,
        "parameters": card["parameters"],
        "training_seconds": float(np.mean([seed["seconds"] for seed in card["seeds"].values()])),
        **_cost(case),
    }


def _run(case: "Case", folder: Path, resume: bool, say: Reporter, rank: str, options: Options) -> Record:
    from hybridsim.experiment import run_locked

    try:
        run_locked(case.experiment, folder, resume, say, **options)
    except FineRunError as error:
        return _failed(error, say)
    runs = storage.read_json(folder / "summary.json")["runs"]
    beside = {label: _of_summary(found, rank) for label, found in runs.items() if label != case.run}
    return {**_of_summary(runs[case.run], rank), "beside": beside}


def _of_summary(summary: Mapping[str, Any], rank: str) -> Record:
    value, bound = _reached(summary, rank)
    interval = summary.get(f"{rank}_interval")
    return {
        "outcome": summary["outcome"],
        "score": value,
        "interval": None if bound or interval is None or interval[0] is None else list(interval),
        "scores": [],
        "at_least": bound,
        "parameters": summary["parameters"],
        "cost": summary["seconds_per_unit_time"],
    }


# --- the command -----------------------------------------------------------------------------------------------------------------


def sweep_experiment(
    experiment: "Experiment",
    folder: Path,
    resume: bool,
    console: "Console",
    training: bool,
    *,
    force: bool = False,
    save_every: float = SAVE_EVERY,
) -> int:
    """Every case of `experiment`, the table, the figure; 0, or 3 where no case reached a score. Options as for `run_experiment`."""
    rank = _rank(experiment, training)
    if training:
        from hybridsim.training import check_fit, recipe_of

        for case in experiment.cases:
            assert case.experiment.spec.train is not None
            try:
                check_fit(case.experiment, recipe_of(case.experiment.spec.train))
            except ConfigError as error:
                raise ConfigError(f"sweep, case {case.name}: {error}") from None
    with storage.FolderLock(folder), Reporter(console, folder / "log.txt") as say:
        return _sweep_locked(experiment, folder, resume, say, training, rank, {"force": force, "save_every": save_every})


def _rank(experiment: "Experiment", training: bool) -> str:
    """What the cases are ranked by; refuses what this command does not measure."""
    from hybridsim.gas import gas_of

    sweep, train = experiment.spec.sweep, experiment.spec.train
    assert sweep is not None
    keys = {key for case in experiment.cases for key in case.changes if key.startswith("train.")}
    if keys and not training:
        raise ConfigError(f"sweep.over.{min(keys)}: a run trains nothing, so its cases would be alike; use hybridsim train")
    of_gas = gas_of(experiment.cases[0].experiment.solver(experiment.cases[0].run))
    if sweep.rank is None:
        return train.choose if training and train is not None else ("error" if of_gas else "t95")
    if training and sweep.rank not in TRAINED:
        raise ConfigError(f"sweep.rank: training measures {', '.join(TRAINED)}; found {sweep.rank!r}")
    if not training and sweep.rank == "correlation":
        raise ConfigError("sweep.rank: a run has no mean correlation; choose t95 or t80")
    if sweep.rank == "error" and not of_gas:
        raise ConfigError("sweep.rank: only a gas has an error; choose t95")
    if sweep.rank == "temperature_error" and (of_gas is None or of_gas.rate is None):
        raise ConfigError("sweep.rank: only a gas that radiates has a temperature_error; choose another")
    if sweep.rank == "velocity_error" and (of_gas or any(c.experiment.spec.compare.at is None for c in experiment.cases)):
        raise ConfigError("sweep.rank: velocity_error is quoted of flows that are no gas, at the time that compare.at says")
    return sweep.rank


def _sweep_locked(
    experiment: "Experiment", folder: Path, resume: bool, say: Reporter, training: bool, rank: str, options: Options
) -> int:
    import yaml

    from hybridsim.experiment import provenance

    marker, cases = folder / "sweep_begun.json", folder / "cases"
    # each case keeps its own with all defaults; here they would stand in the way of choices between classes
    given = storage.to_plain({**(experiment.plain or {}), "name": experiment.name})
    begun = {"command": "train" if training else "run", "config": given, "files": experiment.files}
    going_on, environment = resume and marker.exists(), resuming.environment()
    if going_on:
        old = storage.read_json(marker)
        if not isinstance(old, dict):
            raise storage.CorruptError(f"{marker}: damaged; start again without --resume")
        for path, before, now in resuming.differences({key: old.get(key) for key in begun}, begun):
            raise storage.StorageError(
                f"{folder}: holds another sweep: {key_path(path)} was {show_value(before)}, is {show_value(now)}; resume with the "
                "same YAML, or choose another --out"
            )
        if not options["force"]:
            resuming.check_bits(folder, old.get("environment"), environment, "--force goes on")
    begun["environment"] = environment
    parts = (cases, folder / "others")
    if not going_on:
        for part in parts:
            storage.check_removable(part, marker)
    earlier = resuming.named_before(folder, marker)
    storage.write_json(marker, {**begun, "earlier": earlier})
    storage.forget_manifest(folder)
    if not going_on:
        for part in parts:
            storage.remove_folder(part, marker)
    storage.atomic_write(folder / "config.yaml", yaml.safe_dump(given, sort_keys=False, allow_unicode=True))
    count = len(experiment.cases)
    say.line(f"sweep of {experiment.name}: {count} cases → {folder}")
    baselines = {} if training else _baselines(experiment, folder, resume, say, rank, options)
    records: list[Record] = []
    one: Callable[..., Record] = _trained if training else _run
    for i, case in enumerate(experiment.cases):
        STOP.check()
        place, kept = cases / case.name, cases / case.name / "case.json"
        done = storage.read_json(kept) if kept.exists() else None
        if done is not None and done["config_hash"] == case.experiment.config_hash:
            say.line(f"case {i + 1} of {count}, {case.name}: done before")
            record = done
        else:
            say.line(f"case {i + 1} of {count}, {case.name}")
            with storage.FolderLock(place):
                record = {
                    "case": case.name,
                    "title": case.title,
                    "values": case.values,
                    "changes": case.changes,
                    "config_hash": case.experiment.config_hash,
                    **one(case, place, resume, say, rank, options),
                }
                storage.write_json(kept, record)
        records.append(record)
        write_results(folder, experiment, records, rank, training, baselines)
    sweep = experiment.spec.sweep
    assert sweep is not None
    for line in _lines(records if sweep.order == "file" else ranked(records, rank), rank, sweep.order == "rank"):
        say.line(line)
    names = ["config.yaml", "sweep_begun.json", "sweep.json", "sweep.md", "figures/sweep.png", "cases", "others"]
    about = {"command": "sweep", "measured_by": begun["command"], **provenance(experiment)}
    storage.write_json(marker, begun)
    storage.write_manifest(folder, names, about, earlier)
    say.line(f"table: {folder / 'sweep.md'}; figure: {folder / 'figures' / 'sweep.png'}")
    return 3 if all(r["score"] is None for r in records) else 0


def _baselines(
    experiment: "Experiment", folder: Path, resume: bool, say: Reporter, rank: str, options: Options
) -> dict[str, Record]:
    """The other runs of the experiment, once: label -> what they reached."""
    from hybridsim.experiment import run_locked

    others = experiment.without_sweep()
    if others is None:
        return {}
    place = folder / "others"
    summary = place / "summary.json"
    whole = summary.exists() and not (place / "state" / resuming.BEGUN).exists()
    if not (whole and storage.read_json(summary)["config_hash"] == others.config_hash):
        say.line(f"the other runs: {', '.join(others.labels)}")
        with storage.FolderLock(place):
            run_locked(others, place, resume, say, **options)
    return {label: _of_summary(found, rank) for label, found in storage.read_json(summary)["runs"].items()}


# --- what is written -------------------------------------------------------------------------------------------------------------


def _number(value: float | None, bound: bool = False) -> str:
    return "–" if value is None else f"{'≥ ' if bound else ''}{value:.3f}"


def _with_interval(record: Record) -> str:
    text = _number(record["score"], record["at_least"])
    if record["interval"] is not None:
        low, high = _ends(record)
        text += f" [{low:.3f}, {'beyond the end' if high == math.inf else f'{high:.3f}'}]"
    return text


def _lines(order: Sequence[Record], rank: str, placed: bool) -> list[str]:
    lines = []
    for i, r in enumerate(order):
        beside = "".join(f"; {label} {_with_interval(other)}" for label, other in r.get("beside", {}).items())
        lines.append(f"{f'{i + 1:3d}. ' if placed else '  '}{r['case']}: {rank} {_with_interval(r)}{beside}")
    if placed and (same := alike(order)):
        lines.append(f"not to be told from the first: {', '.join(same)}")
    return lines


def table(
    title: str,
    order: Sequence[Record],
    rank: str,
    training: bool,
    count: int,
    others: Mapping[str, Record],
    placed: bool = True,
    run: str = "",
) -> str:
    """The table as Markdown, with what each choice is worth; `placed`: the cases are in the order of their rank."""
    axes, beside = list(order[0]["values"]), list(next((r["beside"] for r in order if "beside" in r), {}))
    of = "validation starts, mean over seeds" if training else "test starts"
    spread = f"{100 * LEVEL:.0f} % interval: " + ("Student's t over seeds" if training else "bootstrap over starts")
    better = "the larger the better" if rank in GROWS else "the smaller the better"
    seeds, bare = any(r["scores"] for r in order), any(r.get("bare") is not None for r in order)
    heads = [*([""] if placed else []), *axes]
    heads += [f"{label}, {rank}" for label in (run, *beside)] if beside else [f"{rank} [interval]"]
    heads += [*(["each seed"] if seeds else []), *(["without closure"] if bare else []), "parameters", "ms per unit time"]
    heads += ["× the bare cost", "training, s"] if training else []
    lines = [f"# {title}: {count} cases", ""]
    if len(order) < count:
        lines += [f"{len(order)} of {count} cases are finished.", ""]
    lines += [f"{rank} on {of}, {better}; {spread}.", "", "| " + " | ".join(heads) + " |", "| --- " * len(heads) + "|"]

    def reached(r: Record) -> str:
        return _with_interval(r) if r["score"] is not None else r["outcome"].split(";")[0]

    def row(place: str, names: Sequence[str], r: Record) -> str:
        cells = [*([place] if placed else []), *names, reached(r)]
        cells += [reached(r["beside"][label]) if label in r.get("beside", {}) else "" for label in beside]
        cells += [" · ".join(_number(x) for x in r["scores"])] if seeds else []
        cells += [_number(r.get("bare"))] if bare else []
        cost = r.get("cost")
        cells += [str(r.get("parameters", "–")), "–" if cost is None else f"{1e3 * cost:.3g}"]
        if training:
            cells += ["–" if cost is None else f"{cost / r['cost_bare']:.2f}", f"{r.get('training_seconds', math.nan):.0f}"]
        return "| " + " | ".join(cells) + " |"

    lines += [row(str(i + 1), list(r["values"].values()), r) for i, r in enumerate(order)]
    for label, r in others.items():
        lines.append(row("", [label, *[""] * (len(axes) - 1)], r))
    if placed and (same := alike(order)):
        lines += ["", f"Not to be told from the first (the intervals overlap, or both reach the end): {', '.join(same)}."]
    if len(axes) > 1:
        lines += ["", f"What each choice is worth: mean {rank} over the cases that made it.", "", "| | | mean | cases |"]
        lines += ["| --- | --- | --- | --- |"]
        for axis, rows in effects(order).items():
            best_first = sorted(rows, key=lambda x: -x[1] if rank in GROWS else x[1])
            lines += [f"| {axis} | {value} | {mean:.3f} | {number} |" for value, mean, number in best_first]
    return "\n".join(lines) + "\n"


def write_results(
    folder: Path, experiment: "Experiment", records: Sequence[Record], rank: str, training: bool, others: Mapping[str, Record]
) -> None:
    """`sweep.json`, `sweep.md` and `figures/sweep.png` of the cases that are finished."""
    import matplotlib

    from hybridsim.experiment import provenance

    assert experiment.spec.sweep is not None
    placed, title, count = experiment.spec.sweep.order == "rank", experiment.title, len(experiment.cases)
    best_first = ranked(records, rank)
    order = best_first if placed else records
    storage.write_json(
        folder / "sweep.json",
        {
            "title": title,
            "run": experiment.cases[0].run,
            "rank": rank,
            "measured_on": "validation" if training else "test",
            "cases": [{**r, "place": best_first.index(r) + 1} for r in order],
            "others": dict(others),
            "not_told_from_the_first": alike(best_first),
            "effects": effects(records),
            "finished": len(records),
            "count": count,
            **provenance(experiment),
        },
    )
    text = table(title, order, rank, training, count, others, placed, experiment.cases[0].run)
    storage.atomic_write(folder / "sweep.md", text)
    (folder / "figures").mkdir(exist_ok=True)
    with matplotlib.rc_context(STYLE):
        figure = _figure(title, order, rank, training, others, experiment.cases[0].run)
        storage.atomic_write(folder / "figures" / "sweep.png", png(figure))


def _draw(ax: Any, y: float, r: Record, colour: str, marker: str, spans: list) -> None:
    """One result at height y: its seeds, its mean; what has an interval goes to `spans`, to be drawn when the axis is known."""
    if r["interval"] is not None:
        low, high = _ends(r)
        spans.append((y, low, high, colour))
        ax.plot([low, high if math.isfinite(high) else r["score"]], [y, y], alpha=0)
    ax.plot(r["scores"], [y] * len(r["scores"]), "o", color=colour, markersize=3.5, alpha=0.7)
    ax.plot(r["score"], y, ">" if r["at_least"] else marker, color=colour, markersize=6, markeredgecolor="white")


def _figure(title: str, order: Sequence[Record], rank: str, training: bool, others: Mapping[str, Record], run: str) -> "Figure":
    """One row per case: seeds as small dots, means with their intervals, runs beside it below; bare and other runs as lines."""
    from matplotlib.figure import Figure

    axes, labels = list(order[0]["values"]), list(next((r["beside"] for r in order if "beside" in r), {}))
    kinds = list(dict.fromkeys(r["values"][axes[0]] for r in order))
    markers = ("D", "s", "^", "v", "P", "X")
    figure = Figure(figsize=(7.5, 1.5 + (0.32 + 0.16 * len(labels)) * len(order)), layout="constrained")
    ax = figure.subplots()
    spans: list[tuple[float, float, float, str]] = []
    for i, r in enumerate(order):
        shown = [(run, r), *((label, r["beside"][label]) for label in labels if label in r.get("beside", {}))]
        for j, (label, one) in enumerate(shown):
            y = i + 0.75 * (j / len(shown) - 0.5 * (len(shown) - 1) / len(shown))
            colour = PALETTE[([run, *labels].index(label) if labels else kinds.index(r["values"][axes[0]])) % len(PALETTE)]
            if one["score"] is not None:
                _draw(ax, y, one, colour, markers[j % len(markers)], spans)
                continue
            text = " " + one["outcome"].split(";")[0]
            ax.text(0.01, y, text, transform=ax.get_yaxis_transform(), va="center", fontsize=8, color=colour if labels else "0.4")
    bare = {r["bare"] for r in order if r.get("bare") is not None}
    if len(bare) == 1:
        others = {"without closure": {"score": bare.pop()}, **others}
    for i, (label, r) in enumerate((name, r) for name, r in others.items() if r["score"] is not None):
        ax.axvline(r["score"], color="0.35", linewidth=1.2, linestyle=("--", ":", "-.", (0, (5, 1, 1, 1)))[i % 4], label=label)
    for j, label in enumerate([run, *labels] if labels else []):
        ax.plot([], [], markers[j % len(markers)], color=PALETTE[j % len(PALETTE)], label=label)
    ax.autoscale(axis="x")
    right = ax.get_xlim()[1]
    for y, low, high, colour in spans:
        ax.plot([low, min(high, right)], [y, y], color=colour, linewidth=2.5, alpha=0.35, solid_capstyle="butt", zorder=1)
        if high == math.inf:
            ax.plot(right, y, ">", color=colour, markersize=6, clip_on=False)
    ax.set_xlim(right=right)
    ax.set_yticks(range(len(order)), [r["title"] for r in order])
    ax.set_ylim(len(order) - 0.4, -0.6)
    ax.set_xlabel(f"{rank} on {'validation' if training else 'test'} starts, {100 * LEVEL:.0f} % interval")
    ax.set_title(title, loc="left")
    ax.grid(axis="y", visible=False)
    if ax.get_legend_handles_labels()[0]:
        figure.legend(loc="outside lower center", ncols=4)
    return figure
