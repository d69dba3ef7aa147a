"""`hybridsim bench`: what a closure saves at equal accuracy, against its own discretisation and against the best classical run.

Each family is an experiment with closures, their rivals and a fine reference. It is run as by `hybridsim run`; then all its runs
are timed in turn, one round after another, so that whatever slows the machine for a while slows all of them. How the speed-ups come
out of that is in `fronts.py`; this file gathers the evidence and writes `bench.json`, `bench.md` and the figures.
"""

import fnmatch
import math
import re
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from hybridsim import diagnostics, gas, storage
from hybridsim.config import Experiment, experiment_from, read_experiment, set_key, shipped_benches
from hybridsim.experiment import coarsest_grid, compiled_run, run_locked, stated_time
from hybridsim.fronts import (
    Accuracy,
    Cost,
    Measured,
    Scale,
    Speedup,
    break_even,
    cheapest,
    cost_on,
    speedup,
    undominated,
    verdict,
    worth,
)
from hybridsim.progress import Reporter
from hybridsim.reference import FineRunError
from hybridsim.sections import Bench, Family, Run, explain
from hybridsim.signals import STOP
from hybridsim.turns import in_turn
from hybridsim.yaml_reader import ConfigError, parse_yaml, suggestion

if TYPE_CHECKING:
    import xarray as xr
    from rich.console import Console

SCALES: dict[str, Scale] = {
    "t95": "growing",
    "t80": "growing",
    "error": "shrinking",
    "velocity_error": "shrinking",
    "temperature_error": "shrinking",
    "spectrum_error": "shrinking",
}
"""Measure → whether more of it is better. Spectra are compared on the shells that all grids of the family hold."""

NAMES = {
    "t95": "t95",
    "t80": "t80",
    "error": "error",
    "velocity_error": "velocity error",
    "temperature_error": "phase error",
    "spectrum_error": "spectrum error",
}

Record = dict[str, Any]


# --- reading ---------------------------------------------------------------------------------------------------------------------


def read_bench(name: str) -> tuple[Bench, str]:
    """The checked YAML of a benchmark, and its name; an experiment's name makes a benchmark of that one family."""
    shipped = shipped_benches()
    path = Path(name)
    stem = path.stem if path.suffix in (".yaml", ".yml") else path.name
    if path.is_file() or (path.name == name and stem in shipped):
        file = path if path.is_file() else shipped[stem]
        data = parse_yaml(file.read_text(encoding="utf-8"), file.name)
        if isinstance(data, dict) and "families" in data:
            from pydantic import ValidationError

            try:
                return Bench.model_validate(data), stem
            except ValidationError as error:
                raise ConfigError(explain(error, Bench, data)) from None
    read_experiment(name)  # says what is wrong with it
    return Bench(families={stem: Family(experiment=name)}), stem


def family_experiment(name: str, family: Family, quick: bool) -> Experiment:
    """The experiment of a family, with the runs that are asked for."""
    data, path, shipped = read_experiment(family.experiment)
    data.pop("sweep", None)
    for key, value in (family.quick if quick else {}).items():
        set_key(data, tuple(key.split(".")), value)
    if family.runs:
        runs: dict[str, Any] = data.get("runs") or {}
        for pattern in family.runs:
            if not fnmatch.filter(runs, pattern):
                raise ConfigError(f"families.{name}.runs: no run is called {pattern!r}; {suggestion(pattern, runs, 'there are')}")
        data["runs"] = {label: run for label, run in runs.items() if any(fnmatch.fnmatch(label, p) for p in family.runs)}
        data["checks"] = {k: v for k, v in (data.get("checks") or {}).items() if k == "all" or k in data["runs"]}
    return experiment_from(data, path, shipped)


# --- who is what -----------------------------------------------------------------------------------------------------------------


def method_of(run: Run) -> str:
    """The name of a run's ladder: discretisation, options, stepper, classical closures without their constants."""
    parts = [run.solver.use]
    if run.solver.model_extra:
        parts.append("(" + ", ".join(str(value) for value in run.solver.model_extra.values()) + ")")
    if run.stepper:
        parts.append(run.stepper.use)
    parts += [f"+ {correction.use}" for correction in run.corrections]
    return " ".join(parts).replace("_", " ")


def closure_of(run: Run) -> str | None:
    """The name of the weights that a run has, without their training seed; None for a classical run."""
    stems = [Path(correction.weights).stem for correction in run.corrections if correction.weights]
    return re.sub(r"[_-]seed\d+$", "", stems[0]) if stems else None


def _replaces(run: Run) -> bool:
    """Whether a network stands in the solver's place."""
    return any("replacement" in correction.use for correction in run.corrections)


# --- accuracy --------------------------------------------------------------------------------------------------------------------


def accuracy_of(measure: str, run: "xr.Dataset", truth: "xr.Dataset", coarsest: Any, at: float) -> Accuracy | None:
    """The measure of one run over any draw of its starts; None where the flow has no such thing."""
    if measure in ("t95", "t80"):
        level = 0.95 if measure == "t95" else 0.80
        times, rho = run["time"].values, run["correlation"].transpose("sample", "time").values

        def time_of(draw: np.ndarray) -> float:
            found, _ = diagnostics.crossing_time(times, np.nan_to_num(rho[draw]).mean(axis=0), level)
            return math.inf if found is None else found

        return time_of
    if measure in ("error", "velocity_error"):
        if measure not in run:
            return None
        values = run[measure]
        if measure == "error":
            series = values.transpose("field", "sample", "time").values
            fields = [str(name) for name in values["field"].values]
            found = gas.error_of({name: _at(run["time"].values, row, at) for name, row in zip(fields, series, strict=True)})
        else:
            found = _at(run["time"].values, values.transpose("sample", "time").values, at)
        return lambda draw: float(np.mean(found[draw]))
    if measure == "temperature_error":
        if "mass_per_temperature" not in run:
            return None
        mass, known = (_by_sample(d["mass_per_temperature"]) for d in (run, truth))
        return lambda draw: gas.phase_distance(mass[draw].mean(axis=0), known[draw].mean(axis=0))
    if "spectrum" not in run:
        return None
    numbers = np.rint(run["wavenumber"].values * max(coarsest.lengths) / (2 * np.pi)).astype(int)
    ours, theirs = (_by_sample(d["spectrum"]) for d in (run, truth))

    def spectrum_of(draw: np.ndarray) -> float:
        pair = ours[draw].mean(axis=0), theirs[draw].mean(axis=0)
        return float(diagnostics.spectrum_error(*pair, numbers, coarsest.shape, coarsest.lengths))

    return spectrum_of


def _by_sample(values: "xr.DataArray") -> np.ndarray:
    return values.transpose("sample", ...).values


def _at(times: np.ndarray, series: np.ndarray, t: float) -> np.ndarray:
    """`(sample, time)` at t, linear between frames."""
    return np.array([np.interp(t, times, row) if np.isfinite(row).all() else np.nan for row in series])


def measures_of(primary: str, datasets: Sequence["xr.Dataset"], stated: bool) -> list[str]:
    """The family's own measure first, then the others that all of its runs have."""
    names = [primary]
    names += [m for m in ("error",) if m != primary and all(m in d for d in datasets)]
    if stated and all("velocity_error" in d for d in datasets):
        names.append("velocity_error")
    if all("spectrum" in d for d in datasets):
        names.append("spectrum_error")
    return names


# --- cost ------------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Timing:
    """A run's costs: seconds per unit time of one start alone, one per round; bytes that its program holds; seconds to compile."""

    seconds: np.ndarray
    memory: float
    compile_seconds: float


def measure_costs(
    experiment: Experiment, labels: Sequence[str], folder: Path, rounds: int, say: Reporter, name: str
) -> dict[str, Timing]:
    """The timings of the runs, from their own starts as they stand in the family's folder."""
    programs, seconds = {}, {}
    for i, label in enumerate(labels):
        ds = storage.open_dataset(folder / f"{label}.nc").isel(time=0)
        starts = np.stack([ds[variable.name].values for variable in experiment.solver(label).variables], axis=1)
        begin = time.perf_counter()
        programs[label] = compiled_run(experiment, label, starts)
        seconds[label] = time.perf_counter() - begin
        say.progress(f"{name}: compiling", (i + 1) / len(labels))
        STOP.check()

    def tell(part: float) -> None:
        say.progress(f"{name}: timing in turn", part)
        STOP.check()

    found = in_turn(programs, rounds, tell)
    return {label: Timing(found[label], programs[label].memory, seconds[label]) for label in labels}


# --- one family ------------------------------------------------------------------------------------------------------------------


def run_family(name: str, experiment: Experiment, folder: Path, rounds: int, resume: bool, say: Reporter) -> tuple[Record, Record]:
    """(summary of the runs, label → their costs round by round); on `resume` what is there of the same configuration is kept."""
    done = folder / "summary.json"
    if not (resume and done.exists() and storage.read_json(done)["config_hash"] == experiment.config_hash):
        done.unlink(missing_ok=True)
        run_locked(experiment, folder, resume and (folder / "state").exists(), say)
    summary = storage.read_json(done)
    turns = folder / "turns.json"
    if resume and turns.exists():
        kept = storage.read_json(turns)
        if kept["config_hash"] == experiment.config_hash and kept["rounds"] == rounds:
            return summary, kept["timings"]
    finished = [label for label in experiment.labels if summary["runs"][label]["outcome"] == "finished"]
    found = measure_costs(experiment, finished, folder, rounds, say, name)
    timings = {
        label: {"seconds": [float(x) for x in t.seconds], "memory": t.memory, "compile_seconds": t.compile_seconds}
        for label, t in found.items()
    }
    storage.write_json(turns, {"config_hash": experiment.config_hash, "rounds": rounds, "timings": timings})
    return summary, timings


def analyse(name: str, experiment: Experiment, folder: Path, summary: Record, timings: Record, resamples: int) -> Record:
    """Everything that is claimed of a family, in JSON's types."""
    runs = experiment.spec.runs
    labels = [label for label in experiment.labels if label in timings]
    if not labels:
        raise ConfigError(f"families.{name}: no run finished, so there is nothing to compare")
    datasets = {label: storage.open_dataset(folder / f"{label}.nc") for label in labels}
    groups = {ds.attrs["reference_group"] for ds in datasets.values()}
    truths = {group: storage.open_dataset(folder / "reference.nc", group) for group in groups}
    coarsest = coarsest_grid(experiment)
    at = stated_time(experiment)
    primary = summary["runs"][labels[0]]["accuracy"]["metric"]
    samples = int(experiment.spec.samples.count)
    measures = measures_of(primary, list(datasets.values()), experiment.spec.compare.at is not None)
    accuracies = {
        measure: {
            label: accuracy_of(measure, datasets[label], truths[datasets[label].attrs["reference_group"]], coarsest, at)
            for label in labels
        }
        for measure in measures
    }
    rungs = []
    for label in labels:
        seconds = np.array(timings[label]["seconds"])
        run = runs[label]
        kind = "classical" if closure_of(run) is None else "alone" if _replaces(run) else "hybrid"
        rungs.append(
            {
                "label": label,
                "title": run.title or label,
                "kind": kind,
                "closure": closure_of(run),
                "method": method_of(run),
                "discretisation": run.solver.use,
                "shape": list(run.shape),
                "dt": summary["runs"][label]["dt"],
                "cost": float(np.median(seconds)),
                "cost_least": float(seconds.min()),
                "cost_interval": [float(q) for q in np.quantile(seconds, [0.05, 0.95])],
                "throughput": summary["runs"][label]["seconds_per_unit_time_throughput"],
                "memory": timings[label]["memory"],
                "compile_seconds": timings[label]["compile_seconds"],
                **_values({m: accuracies[m][label] for m in measures}, samples, resamples, experiment.spec.time.end),
            }
        )
    lost = [label for label in experiment.labels if label not in timings]
    found: Record = {
        "experiment": experiment.name,
        "title": experiment.title,
        "metric": primary,
        "measures": measures,
        "at": at,
        "samples": samples,
        "reference": {
            **{k: summary["reference"].get(k) for k in ("shape", "precision", "converged_until", "seconds_per_unit_time")},
            "window": experiment.spec.time.end,
        },
        "rungs": rungs,
        "lost": lost,
        "noise": noise_of(timings),
        "closures": {},
    }
    measured = {
        (measure, r["label"]): Measured(r["label"], r["method"], accuracy, np.array(timings[r["label"]]["seconds"]))
        for measure in measures
        for r in rungs
        if (accuracy := accuracies[measure][r["label"]]) is not None
    }
    for closure in dict.fromkeys(r["closure"] for r in rungs if r["closure"]):
        mine = [r for r in rungs if r["closure"] == closure]
        entry: Record = {"runs": [r["label"] for r in mine], "kind": mine[0]["kind"], "measures": {}}
        for measure in measures:
            entry["measures"][measure] = _claims(mine, rungs, measured, measure, samples, resamples)
        entry["verdict"] = entry["measures"][primary]["verdict"]
        entry["break_even"] = _break_even(experiment, mine, entry["measures"][primary])
        found["closures"][closure] = entry
    return found


def _claims(
    mine: Sequence[Record], rungs: Sequence[Record], measured: Mapping, measure: str, samples: int, resamples: int
) -> Record:
    """A closure's speed-ups by one measure over all classical runs and over those of its own discretisation; its gain in points."""
    scale = SCALES[measure]
    hybrids = [measured[measure, r["label"]] for r in mine if (measure, r["label"]) in measured]
    classical = [r for r in rungs if r["kind"] == "classical" and (measure, r["label"]) in measured]
    same = [r for r in classical if r["discretisation"] == mine[0]["discretisation"]]
    best = (
        speedup(hybrids, [measured[measure, r["label"]] for r in classical], samples, scale, resamples=resamples)
        if hybrids
        else None
    )
    own = speedup(hybrids, [measured[measure, r["label"]] for r in same], samples, scale, resamples=resamples) if hybrids else None
    return {
        "best": _plain(best),
        "same": _plain(own),
        "resolution_gain": _resolution_gain(mine, same, measure),
        "verdict": "no rival finished" if best is None else verdict(best),
    }


def _plain(found: Speedup | None) -> Record | None:
    if found is None:
        return None
    return {"interval": list(found.interval), "method": found.best, "bound": found.bound, "shares": found.shares}


def _resolution_gain(mine: Sequence[Record], same: Sequence[Record], measure: str) -> Record | None:
    """How many times as many points per axis the best method of the same discretisation needs without the closure."""
    gains: list[tuple[float, str]] = []
    for r in mine:
        if r[measure] is None and not r.get(f"{measure}_at_least"):
            return None
        wanted = worth(math.inf if r[measure] is None else r[measure], SCALES[measure])
        ladders: dict[str, list[tuple[float, float]]] = {}
        for rival in same:
            value = math.inf if rival[measure] is None else rival[measure]
            ladders.setdefault(rival["method"], []).append((worth(value, SCALES[measure]), float(rival["shape"][0])))
        found = cheapest({method: cost_on(rungs, wanted) for method, rungs in ladders.items()})
        if found is None:
            return None
        points: Cost = found[1]
        gains.append((points.value / r["shape"][0], {"": "", "at most": "at most", "more than": "at least"}[points.bound]))
    value = math.exp(statistics.fmean(math.log(g) for g, _ in gains))
    bounds = {b for _, b in gains}
    return {"value": value, "bound": bounds.pop() if len(bounds) == 1 else ""}


def _break_even(experiment: Experiment, mine: Sequence[Record], claims: Record) -> Record | None:
    """Unit times after which the training (without its data) is won back against the best classical run, and what it took."""
    label = mine[0]["label"]
    for i, correction in enumerate(experiment.spec.runs[label].corrections):
        if correction.weights is None:
            continue
        file = experiment.weights_file(correction, ("runs", label, "corrections", i))
        card = file.with_name(f"{mine[0]['closure']}.json")
        if not card.exists() or claims["best"] is None:
            return None
        seeds = storage.read_json(card)["seeds"].values()
        training = statistics.fmean(seed["seconds"] for seed in seeds)
        hybrid = statistics.median(r["cost"] for r in mine)
        rival = claims["best"]["interval"][1] * hybrid
        return {"training_seconds": training, "unit_times": break_even(training, rival, hybrid)}
    return None


def noise_of(timings: Mapping[str, Record]) -> float:
    """How much the same program's time varies from round to round: the median over runs of (95 % − 5 % quantile) / median."""
    spreads = []
    for t in timings.values():
        low, mid, high = np.quantile(t["seconds"], [0.05, 0.5, 0.95])
        spreads.append((high - low) / mid)
    return float(np.median(spreads))


def _values(accuracies: Mapping[str, Accuracy | None], samples: int, resamples: int, end: float) -> Record:
    """Each measure over all starts with its interval; a time that was not crossed is null, beside `…_at_least`."""
    found: Record = {}
    for measure, accuracy in accuracies.items():
        value = math.nan if accuracy is None else accuracy(np.arange(samples))
        found[measure] = float(value) if math.isfinite(value) else None
        found[f"{measure}_interval"] = _interval(accuracy, samples, resamples)
        if SCALES[measure] == "growing":
            found[f"{measure}_at_least"] = end if value == math.inf else None
    return found


def _interval(accuracy: Accuracy | None, samples: int, resamples: int) -> list[float | None] | None:
    """The middle 90 % over draws of the starts; an end of None lies beyond the window."""
    if accuracy is None:
        return None
    draws = np.random.default_rng(0).integers(samples, size=(resamples, samples))
    low, high = np.quantile([accuracy(draw) for draw in draws], [0.05, 0.95], method="nearest")
    return [float(x) if math.isfinite(x) else None for x in (low, high)]


# --- the page --------------------------------------------------------------------------------------------------------------------


def _shown(rung: Record, measure: str) -> str:
    """A value with its interval, as it stands in a table."""
    value, bound, interval = rung[measure], rung.get(f"{measure}_at_least"), rung[f"{measure}_interval"]
    if value is None:
        return "–" if bound is None else f"≥ {bound:.3g}"
    digits = ".2f" if SCALES[measure] == "growing" else ".3f"
    low, high = interval or (None, None)
    span = "" if low is None else f" [{low:{digits}}, {'beyond' if high is None else format(high, digits)}]"
    return f"{value:{digits}}{span}"


def _times(claim: Record | None) -> str:
    if claim is None:
        return "–"
    low, median, high = claim["interval"]
    bound = f"{claim['bound']} " if claim["bound"] else ""
    return f"{bound}{median:.2f} [{low:.2f}, {high:.2f}]"


def family_lines(name: str, found: Record) -> list[str]:
    """A family's part of `bench.md`."""
    metric, measures = found["metric"], found["measures"]
    reference = found["reference"]
    until = reference.get("converged_until")
    truth = "a stated fine run" if until is None or until < reference["window"] * (1 - 1e-9) else "converged over the window"
    if until is not None and truth.startswith("a stated"):
        truth += f", converged until t = {until:.3g}"
    shape = " × ".join(map(str, reference["shape"]))
    lines = [
        f"## {name}",
        "",
        f"{found['title']}. {found['samples']} starts; reference {shape} in {reference['precision']} ({truth}). Costs are medians "
        "over rounds in which all runs took turns; between rounds the time of a program varies by "
        f"{100 * found['noise']:.0f} % (middle 90 %).",
        "",
    ]
    for closure, entry in found["closures"].items():
        lines.append(f"- **{closure}**, by {NAMES[metric]}: {entry['verdict']}.")
    lines += [
        "",
        "| closure | measure | over the best classical run | cheapest there | over its own discretisation | points per axis |",
    ]
    lines.append("| --- | --- | --- | --- | --- | --- |")
    for closure, entry in found["closures"].items():
        for measure in measures:
            claim = entry["measures"][measure]
            gain = claim["resolution_gain"]
            points = "–" if gain is None else f"{gain['bound']} {gain['value']:.2f} times".strip()
            method = "–" if claim["best"] is None else claim["best"]["method"]
            cells = (closure, NAMES[measure], _times(claim["best"]), method, _times(claim["same"]), points)
            lines.append("| " + " | ".join(cells) + " |")
    lines += ["", "| run | " + " | ".join(NAMES[m] for m in measures) + " | ms per unit time | throughput | MiB |"]
    lines.append("| --- " * (len(measures) + 4) + "|")
    for rung in sorted(found["rungs"], key=lambda r: r["cost"]):
        title = f"**{rung['title']}**" if rung["kind"] != "classical" else rung["title"]
        cost, throughput = 1e3 * rung["cost"], rung["throughput"]
        cells = [title, *(_shown(rung, m) for m in measures), f"{cost:.3g}"]
        cells += ["–" if throughput is None else f"{1e3 * throughput:.3g}", f"{rung['memory'] / 2**20:.2g}"]
        lines.append("| " + " | ".join(cells) + " |")
    if found["lost"]:
        lines += ["", f"Blew up, and so not on any ladder: {', '.join(found['lost'])}."]
    return [*lines, ""]


def page(bench: Bench, results: Mapping[str, Record], versions: Mapping[str, Any], date: str) -> str:
    """`bench.md`."""
    lines = [
        f"# {bench.title}",
        "",
        f"{versions['device']}, {versions['threads']} threads, JAX {versions['jax']}, hybridsim {versions['hybridsim']}, {date}. "
        f"{bench.rounds} rounds; intervals: 90 %, starts, rounds and training seeds drawn again {bench.resamples} times.",
        "",
    ]
    for name, found in results.items():
        lines += family_lines(name, found)
    return "\n".join(lines).rstrip() + "\n"


def front_figure(found: Record, measure: str) -> Any:
    """Accuracy over cost: the ladders as lines, the front of the classical runs thick, closures as filled marks."""
    from matplotlib.figure import Figure

    from hybridsim.report import PALETTE

    figure = Figure(figsize=(7.5, 4.6), layout="constrained")
    ax = figure.subplots()
    rungs = [r for r in found["rungs"] if r[measure] is not None]
    classical = [r for r in rungs if r["kind"] == "classical"]
    methods = list(dict.fromkeys(r["method"] for r in classical))
    for i, method in enumerate(methods):
        mine = sorted((r for r in classical if r["method"] == method), key=lambda r: r["cost"])
        colour = PALETTE[i % len(PALETTE)]
        ax.plot(
            [1e3 * r["cost"] for r in mine],
            [r[measure] for r in mine],
            "o-",
            color=colour,
            markersize=4,
            linewidth=1,
            alpha=0.8,
            label=method,
        )
    scale = SCALES[measure]
    front = undominated([(worth(r[measure], scale), r["cost"]) for r in classical])
    values = [w if scale == "growing" else math.exp(-w) for w, _ in front]
    ax.plot(
        [1e3 * c for _, c in front],
        values,
        color="0.75",
        linewidth=7,
        zorder=0,
        label="front of the classical runs",
        solid_capstyle="round",
    )
    closures = list(found["closures"])
    for i, closure in enumerate(closures):
        mine = [r for r in rungs if r["closure"] == closure]
        marker = ("D", "s", "^", "v", "P", "X")[i % 6]
        look: dict[str, Any] = {"color": "black", "markersize": 7, "markeredgecolor": "white", "linestyle": "none", "zorder": 5}
        label = f"{closure}, {len(mine)} training seed{'s' if len(mine) > 1 else ''}"
        ax.plot([1e3 * r["cost"] for r in mine], [r[measure] for r in mine], marker, label=label, **look)
    ax.set_xscale("log")
    if scale == "shrinking":
        ax.set_yscale("log")
        ax.invert_yaxis()
    ax.set_xlabel("ms per unit time, one start, median of rounds in turn (left is cheaper)")
    ax.set_ylabel(f"{NAMES[measure]} (up is better)")
    ax.set_title(found["title"], loc="left", fontsize=10)
    figure.legend(loc="outside lower center", ncols=2, fontsize=8)
    return figure


# --- the command -----------------------------------------------------------------------------------------------------------------


def bench_command(name: str, out: Path | None, quick: bool, resume: bool, console: "Console") -> int:
    """Everything that `hybridsim bench` does; the exit code."""
    bench, stem = read_bench(name)
    experiments = {family: family_experiment(family, spec, quick) for family, spec in bench.families.items()}
    for family, experiment in experiments.items():
        learned = [closure_of(run) is not None for run in experiment.spec.runs.values()]
        if all(learned) or not any(learned):
            raise ConfigError(f"families.{family}: needs runs with trained weights and runs without, to compare them")
    folder = Path("runs") / f"bench_{stem}" if out is None else out
    with storage.FolderLock(folder), Reporter(console, folder / "log.txt") as say:
        results: dict[str, Record] = {}
        for family, experiment in experiments.items():
            place = folder / family
            place.mkdir(parents=True, exist_ok=True)
            try:
                summary, timings = run_family(family, experiment, place, bench.rounds, resume, say)
            except FineRunError as error:
                say.line(f"{family}: {error}; lower reference.cfl or refine reference.shape")
                return 3
            results[family] = analyse(family, experiment, place, summary, timings, bench.resamples)
            for closure, entry in results[family]["closures"].items():
                say.line(f"{family}, {closure}: {entry['verdict']}")
            write_results(folder, bench, results, quick)
    return 0


def write_results(folder: Path, bench: Bench, results: Mapping[str, Record], quick: bool) -> None:
    """`bench.json`, `bench.md` and the figures of the families that are finished."""
    import datetime

    import matplotlib

    from hybridsim.report import STYLE, png

    versions = storage.environment()
    date = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    storage.write_json(
        folder / "bench.json",
        {
            "title": bench.title,
            "date": date,
            "quick": quick,
            "device": versions["device"],
            "versions": versions,
            "rounds": bench.rounds,
            "resamples": bench.resamples,
            "families": dict(results),
        },
    )
    storage.atomic_write(folder / "bench.md", page(bench, results, versions, date[:10]))
    (folder / "figures").mkdir(exist_ok=True)
    with matplotlib.rc_context(STYLE):
        for name, found in results.items():
            for measure in found["measures"]:
                storage.atomic_write(folder / "figures" / f"{name}_{measure}.png", png(front_figure(found, measure)))
