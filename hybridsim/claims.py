"""What a benchmark claims of a family: accuracies, costs, speed-ups at equal accuracy, and the sentences about them.

How a speed-up comes out of ladders is in `fronts.py`; here the runs of one family become such ladders, once for each rule of time
steps and each kind of cost.
"""

import itertools
import math
import re
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from hybridsim import diagnostics, gas, storage
from hybridsim.config import Experiment
from hybridsim.contract import Replacement
from hybridsim.experiment import coarsest_grid, stated_time
from hybridsim.fronts import (
    BOUND,
    Accuracy,
    Cost,
    Interval,
    Measured,
    Scale,
    Speedup,
    break_even,
    cheapest,
    common_bound,
    cost_on,
    remembered,
    speedup,
    verdict,
    worth,
)
from hybridsim.sections import Run
from hybridsim.yaml_reader import ConfigError

if TYPE_CHECKING:
    import xarray as xr

SCALES: dict[str, Scale] = {
    "t95": "growing",
    "error": "shrinking",
    "velocity_error": "shrinking",
    "temperature_error": "shrinking",
    "spectrum_error": "shrinking",
}
"""Measure → whether more of it is better. Spectra are compared on the shells that all grids of the family hold."""

NAMES = {
    "t95": "t95",
    "error": "error",
    "velocity_error": "velocity error",
    "temperature_error": "phase error",
    "spectrum_error": "spectrum error",
}

Record = dict[str, Any]


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


def _replaces(experiment: Experiment, label: str) -> bool:
    """Whether a network stands in the solver's place."""
    return any(isinstance(closure, Replacement) for closure in experiment.closures_for(label, experiment.solver(label)))


# --- accuracy --------------------------------------------------------------------------------------------------------------------


def accuracy_of(measure: str, run: "xr.Dataset", truth: "xr.Dataset", coarsest: Any, at: float) -> Accuracy | None:
    """The measure of one run over any draw of its starts; None where the flow has no such thing."""
    if measure == "t95":
        times, rho = run["time"].values, run["correlation"].transpose("sample", "time").values

        def time_of(draw: np.ndarray) -> float:
            found, _ = diagnostics.crossing_time(times, np.nan_to_num(rho[draw]).mean(axis=0), 0.95)
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


# --- one family ------------------------------------------------------------------------------------------------------------------


RULES = ("accuracy", "long")
"""Which time step a run takes: the largest that keeps its accuracy, or the largest that lasts the long run too."""


def analyse(name: str, experiment: Experiment, folder: Path, summary: Record, evidence: Record, resamples: int) -> Record:
    """Everything that is claimed of a family, in JSON's types.

    **Arguments:**

    - `summary`: the `summary.json` of the family's runs in `folder`.
    - `evidence`: `timings` (label → seconds per unit time of every round, alone and of all starts at once, memory, compile time),
      `tuning` (label → what was tried, and the labels that stand for it by each rule), `limit` (or None), `data_seconds`.
    """
    runs, timings, tuning = experiment.spec.runs, evidence["timings"], evidence["tuning"]
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
    accuracies: dict[str, dict[str, Accuracy | None]] = {measure: {} for measure in measures}
    for measure in measures:
        for label in labels:
            truth = truths[datasets[label].attrs["reference_group"]]
            accuracy = accuracy_of(measure, datasets[label], truth, coarsest, at)
            accuracies[measure][label] = None if accuracy is None else remembered(accuracy)
    rungs = []
    for label in labels:
        seconds, batch = np.array(timings[label]["seconds"]), np.array(timings[label]["batch"])
        run, told = runs[label], summary["runs"][label]
        kind = "classical" if closure_of(run) is None else "alone" if _replaces(experiment, label) else "hybrid"
        rungs.append(
            {
                "label": label,
                "title": run.title or label,
                "kind": kind,
                "closure": closure_of(run),
                "method": method_of(run),
                "discretisation": run.solver.use,
                "shape": list(run.shape),
                "dt": told["dt"],
                "rules": _rules(label, tuning, bool(evidence["long"])),
                "lasted": _lasted(label, tuning),
                "cost": float(np.median(seconds)),
                "cost_least": float(seconds.min()),
                "cost_interval": [float(q) for q in np.quantile(seconds, [0.05, 0.95])],
                "throughput": float(np.median(batch)),
                "throughput_interval": [float(q) for q in np.quantile(batch, [0.05, 0.95])],
                "memory": timings[label]["memory"],
                "compile_seconds": timings[label]["compile_seconds"],
                "seconds_by_round": seconds.tolist(),
                "batch_by_round": batch.tolist(),
                "parameters": told["parameters"],
                "statistics_error": told["statistics_error"],
                **({"t80": told["t80"], "t80_at_least": told["t80_at_least"]} if primary == "t95" else {}),
                **_values({m: accuracies[m][label] for m in measures}, samples, resamples, experiment.spec.time.end),
            }
        )
    for rung in rungs:  # training seeds share a program: what compiled it counts for all of them
        alike = [r for r in rungs if r["closure"] == rung["closure"] and r["closure"] and r["shape"] == rung["shape"]]
        rung["compile_seconds"] = max([rung["compile_seconds"], *(r["compile_seconds"] for r in alike)])
    found: Record = {
        "experiment": experiment.name,
        "config_hash": experiment.config_hash,
        "title": experiment.title,
        "metric": primary,
        "measures": measures,
        "at": at,
        "samples": samples,
        "seed": experiment.spec.samples.seed,
        "precision": summary["precision"],
        "long": evidence["long"],
        "reference": {
            **{
                k: summary["reference"].get(k) for k in ("shape", "precision", "converged_until", "seconds_per_unit_time", "change")
            },
            "window": experiment.spec.time.end,
        },
        "rungs": rungs,
        "lost": [label for label in experiment.labels if label not in timings],
        "unstable": [label for label, rung in tuning.items() if rung["steps"] is None],
        "noise": noise_of(timings),
        "ladders": _ladders(rungs, primary),
        "limit": evidence["limit"],
        "closures": {},
    }
    costs = {kind: {label: np.array(timings[label][kind]) for label in labels} for kind in ("seconds", "batch")}
    measured = {
        kind: {
            (measure, r["label"]): Measured(r["label"], r["method"], accuracy, costs[kind][r["label"]])
            for measure in measures
            for r in rungs
            if (accuracy := accuracies[measure][r["label"]]) is not None
        }
        for kind in costs
    }
    by_rule = {rule: [r for r in rungs if rule in r["rules"]] for rule in RULES if rule == "accuracy" or evidence["long"]}
    for closure in dict.fromkeys(r["closure"] for r in rungs if r["closure"]):
        mine = [r for r in by_rule["accuracy"] if r["closure"] == closure]
        if not mine:
            continue
        entry: Record = {"runs": [r["label"] for r in mine], "kind": mine[0]["kind"], "measures": {}}
        for measure in measures:
            claims = _claims(mine, by_rule["accuracy"], measured["seconds"], measure, samples, resamples)
            claims["throughput"] = _over_best(mine, by_rule["accuracy"], measured["batch"], measure, samples, resamples)
            if "long" in by_rule:
                lasting = [r for r in by_rule["long"] if r["closure"] == closure]
                claims["long"] = _over_best(lasting, by_rule["long"], measured["seconds"], measure, samples, resamples)
                same = [r for r in by_rule["long"] if r["discretisation"] == mine[0]["discretisation"]]
                claims["long_same"] = _over_best(lasting, same, measured["seconds"], measure, samples, resamples)
            entry["measures"][measure] = claims
        entry["verdict"] = entry["measures"][primary]["verdict"]
        entry["break_even"] = _break_even(experiment, mine, entry["measures"][primary], evidence["data_seconds"].get(closure))
        entry["of_limit"] = _of_limit(mine, summary, evidence["limit"], primary)
        found["closures"][closure] = entry
    return found | headline(found)


def headline(found: Record) -> Record:
    """What is said of the family as a whole: what its fastest closure at equal accuracy reaches."""
    primary = found["metric"]
    if not found["closures"]:
        nothing = ("closure", "speedup_same", "speedup_best", "best_classical", "resolution_gain", "break_even", "limit_t95")
        return {"verdict": "no run with a closure finished"} | dict.fromkeys(nothing)

    def speed(item: tuple[str, Record]) -> float:
        best = item[1]["measures"][primary]["best"]
        return -math.inf if best is None else best["interval"][1]

    closure, entry = max(found["closures"].items(), key=speed)
    claims, limit = entry["measures"][primary], entry["of_limit"]
    return {
        "closure": closure,
        "verdict": entry["verdict"],
        "speedup_same": None if claims["same"] is None else claims["same"]["interval"],
        "speedup_best": None if claims["best"] is None else claims["best"]["interval"],
        "best_classical": None if claims["best"] is None else claims["best"]["method"],
        "resolution_gain": claims["resolution_gain"],
        "break_even": entry["break_even"],
        "limit_t95": limit["limit"] if limit and limit["measure"] == "t95" else None,
    }


def _rules(label: str, tuning: Mapping[str, Record], long: bool) -> list[str]:
    """By which rules of time steps a run is on the ladders; one that was not tuned by all."""
    for rung in tuning.values():
        if label in rung["labels"].values():
            return [rule for rule in RULES if rung["labels"].get(rule) == label]
    return list(RULES) if long else ["accuracy"]


def _lasted(label: str, tuning: Mapping[str, Record]) -> float | None:
    """How long a run was stable with its time step in the long run; None where that was not tried."""
    for rung in tuning.values():
        if label in rung["labels"].values():
            steps = rung["steps"] if rung["labels"]["accuracy"] == label else rung["long_steps"]
            return rung["lasted"].get(str(steps))
    return None


def worth_of(rung: Record, measure: str) -> float:
    """What a rung's accuracy is worth: ∞ where it was not followed to its end, NaN where there is none."""
    value, scale = rung[measure], SCALES[measure]
    if value is None:
        return math.inf if rung.get(f"{measure}_at_least") else math.nan
    return worth(value, scale)


def _ladders(rungs: Sequence[Record], measure: str) -> Record:
    """How close the ladders' rungs are, and how many classical runs are more accurate than every closure.

    `widest`: method → the largest ratio of points per axis between neighbours, of those with several grids.
    """
    sizes: dict[str, set[int]] = {}
    for r in rungs:
        if r["kind"] == "classical" and "accuracy" in r["rules"]:
            sizes.setdefault(r["method"], set()).add(r["shape"][0])
    widest = {method: max(b / a for a, b in itertools.pairwise(sorted(found))) for method, found in sizes.items() if len(found) > 1}
    hybrids = [v for r in rungs if r["kind"] != "classical" and not math.isnan(v := worth_of(r, measure))]
    best = max(hybrids, default=math.nan)
    beyond = [r["label"] for r in rungs if r["kind"] == "classical" and "accuracy" in r["rules"] and worth_of(r, measure) > best]
    return {"widest": widest, "beyond": beyond}


def _of_limit(mine: Sequence[Record], summary: Record, limit: Record | None, primary: str) -> Record | None:
    """What the closure reaches of the predictability limit of its grid; of a time the share, of an error the ratio."""
    group = summary["runs"][mine[0]["label"]]["group"]
    if limit is None or group not in limit["groups"]:
        return None
    found = limit["groups"][group]
    values = [r[found["measure"]] for r in mine]
    if any(v is None for v in values):
        return None
    reached = statistics.fmean(values)
    bound = found["value"] is None
    known = limit["end"] if bound else found["value"]
    return {
        "measure": found["measure"],
        "reached": reached,
        "limit": known,
        "ratio": reached / known,
        "bound": "at most" if bound else "",
    }


def _over_best(
    mine: Sequence[Record], rungs: Sequence[Record], measured: Mapping, measure: str, samples: int, resamples: int
) -> Record | None:
    """A closure's speed-up over the best of the classical runs."""
    hybrids = [measured[measure, r["label"]] for r in mine if (measure, r["label"]) in measured]
    rivals = [measured[measure, r["label"]] for r in rungs if r["kind"] == "classical" and (measure, r["label"]) in measured]
    return _plain(speedup(hybrids, rivals, samples, SCALES[measure], resamples=resamples)) if hybrids else None


def _claims(
    mine: Sequence[Record], rungs: Sequence[Record], measured: Mapping, measure: str, samples: int, resamples: int
) -> Record:
    """A closure's speed-ups by one measure over all classical runs and over those of its own discretisation; its gain in points."""
    same = [r for r in rungs if r["discretisation"] == mine[0]["discretisation"]]
    best = _over_best(mine, rungs, measured, measure, samples, resamples)
    classical = [r for r in same if r["kind"] == "classical" and (measure, r["label"]) in measured]
    return {
        "best": best,
        "same": _over_best(mine, same, measured, measure, samples, resamples),
        "resolution_gain": _resolution_gain(mine, classical, measure),
        "verdict": "no rival finished" if best is None else verdict(_speedup(best)),
    }


def _plain(found: Speedup | None) -> Record | None:
    if found is None:
        return None
    return {"interval": list(found.interval), "method": found.best, "bound": found.bound, "shares": found.shares}


def _speedup(plain: Record) -> Speedup:
    return Speedup(Interval(*plain["interval"]), plain["method"], plain["bound"], plain["shares"])


def _resolution_gain(mine: Sequence[Record], same: Sequence[Record], measure: str) -> Record | None:
    """How many times as many points per axis the best method of the same discretisation needs without the closure."""
    gains: list[tuple[float, str]] = []
    for r in mine:
        wanted = worth_of(r, measure)
        if math.isnan(wanted):
            return None
        ladders: dict[str, list[tuple[float, float]]] = {}
        for rival in same:
            ladders.setdefault(rival["method"], []).append((worth_of(rival, measure), float(rival["shape"][0])))
        found = cheapest({method: cost_on(rungs, wanted) for method, rungs in ladders.items()})
        if found is None:
            return None
        points: Cost = found[1]
        gains.append((points.value / r["shape"][0], BOUND[points.bound]))
    value = math.exp(statistics.fmean(math.log(g) for g, _ in gains))
    return {"value": value, "bound": common_bound([b for _, b in gains])}


def card_of(experiment: Experiment, label: str, closure: str) -> Record | None:
    """The card of a run's weights, as JSON; None where there is none."""
    for i, correction in enumerate(experiment.spec.runs[label].corrections):
        if correction.weights is not None:
            file = experiment.weights_file(correction, ("runs", label, "corrections", i)).with_name(f"{closure}.json")
            return storage.read_json(file) if file.exists() else None
    return None


def _break_even(experiment: Experiment, mine: Sequence[Record], claims: Record, data_seconds: float | None) -> Record | None:
    """Unit times after which data and training are won back against the best classical run, and what they took."""
    card = card_of(experiment, mine[0]["label"], mine[0]["closure"])
    if card is None or claims["best"] is None or claims["best"]["bound"] == "at most":
        return None
    training = statistics.fmean(seed["seconds"] for seed in card["seeds"].values())
    hybrid = statistics.median(r["cost"] for r in mine)
    rival = claims["best"]["interval"][1] * hybrid
    return {
        "training_seconds": training,
        "data_seconds": data_seconds,
        "unit_times": break_even(training + (data_seconds or 0.0), rival, hybrid),
    }


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
