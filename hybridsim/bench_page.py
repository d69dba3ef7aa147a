"""What `hybridsim bench` leaves behind: `bench.json`, `bench.nc`, `bench.md`, `bench.html` and the figures."""

import base64
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from hybridsim import storage
from hybridsim.claims import NAMES, SCALES, Record, worth_of
from hybridsim.drawing import LIMIT, PALETTE, REFERENCE_COLOUR, STYLE, png
from hybridsim.fronts import undominated, worth
from hybridsim.sections import Bench

if TYPE_CHECKING:
    import xarray as xr

OUTCOMES = ("above the front", "below the front", "on the front", "beyond the ladders", "short of the ladders")


# --- words -----------------------------------------------------------------------------------------------------------------------


def shown_value(rung: Record, measure: str) -> str:
    """A value with its interval, as it stands in a table."""
    value, bound, interval = rung[measure], rung.get(f"{measure}_at_least"), rung[f"{measure}_interval"]
    if value is None:
        return "–" if bound is None else f"≥ {bound:.3g}"
    low, high = interval or (None, None)
    if SCALES[measure] == "growing":
        digits = ".1f" if value >= 20 else ".2f"
    else:
        digits = ".3f"
    span = "" if low is None else f" [{low:{digits}}, {'beyond' if high is None else format(high, digits)}]"
    return f"{value:{digits}}{span}"


def shown_ratio(claim: Record | None) -> str:
    """A speed-up with its interval."""
    if claim is None:
        return "–"
    low, median, high = claim["interval"]
    bound = f"{claim['bound']} " if claim["bound"] else ""
    return f"{bound}{median:.2f} [{low:.2f}, {high:.2f}]"


def shown_gain(gain: Record | None) -> str:
    return "–" if gain is None else f"{gain['bound']} {gain['value']:.2f}".strip()


def shown_limit(found: Record | None) -> str:
    if found is None:
        return "–"
    if found["measure"] == "t95":
        return f"{found['bound']} {100 * found['ratio']:.0f} %".strip() + f" of {found['limit']:.3g}"
    return f"{found['ratio']:.3g} × {found['limit']:.3g}"


def outcome_of(sentence: str) -> str:
    """Above, below or on the front, or past the ends of the ladders: how a verdict begins."""
    return next((words for words in OUTCOMES if sentence.startswith(words)), "unknown")


@dataclass(frozen=True)
class Table:
    """A table of the page: what stands above it, its header and its rows, all as text; `bold`: rows of closures."""

    caption: str
    header: list[str]
    rows: list[list[str]]
    bold: tuple[int, ...] = ()

    def markdown(self) -> list[str]:
        lines = ["| " + " | ".join(self.header) + " |", "| --- " * len(self.header) + "|"]
        for i, row in enumerate(self.rows):
            first = f"**{row[0]}**" if i in self.bold else row[0]
            lines.append("| " + " | ".join([first, *row[1:]]) + " |")
        return lines


def overview(results: Mapping[str, Record]) -> Table:
    """One row per closure and family by the family's own measure."""
    rows, bold = [], []
    for name, found in results.items():
        metric = found["metric"]
        for closure, entry in found["closures"].items():
            claims = entry["measures"][metric]
            best = claims["best"]
            if closure == found["closure"]:
                bold.append(len(rows))
            rows.append(
                [
                    f"{name.replace('_', ' ')}: {closure}",
                    NAMES[metric],
                    shown_ratio(best),
                    "–" if best is None else best["method"],
                    shown_ratio(claims["same"]),
                    shown_gain(claims["resolution_gain"]),
                    shown_limit(entry["of_limit"]),
                    outcome_of(entry["verdict"]),
                ]
            )
    header = [
        "closure",
        "equal",
        "speed-up over the best classical run",
        "cheapest there",
        "over its own discretisation",
        "points per axis",
        "of the predictability limit",
        "verdict",
    ]
    caption = "Speed-ups at equal accuracy by each family's own measure; bold: its fastest closure."
    return Table(caption, header, rows, tuple(bold))


def claims_table(found: Record) -> Table:
    """Every closure by every measure."""
    rows = []
    for closure, entry in found["closures"].items():
        for measure in found["measures"]:
            claim = entry["measures"][measure]
            best = claim["best"]
            cells = [closure, NAMES[measure], shown_ratio(best), "–" if best is None else best["method"]]
            cells += [shown_ratio(claim["same"])]
            cells += [shown_ratio(claim["long"]), shown_ratio(claim["long_same"])] if found["long"] else []
            cells += [shown_ratio(claim["throughput"]), shown_gain(claim["resolution_gain"])]
            rows.append([*cells, outcome_of(claim["verdict"])])
    header = ["closure", "equal", "speed-up over the best classical run", "cheapest there"]
    header += ["over its own discretisation"]
    header += ["best, Δt that last", "own, Δt that last"] if found["long"] else []
    header += ["best, all starts at once", "points per axis", "verdict"]
    return Table("Speed-ups at equal accuracy.", header, rows)


def rungs_table(found: Record) -> Table:
    """Every run, from the cheapest to the dearest."""
    measures = found["measures"]
    rungs = sorted(found["rungs"], key=lambda r: r["cost"])
    extra = ["t80"] if any("t80" in r for r in rungs) else []
    rows, bold = [], []
    for i, rung in enumerate(rungs):
        title = rung["title"] + ("" if "accuracy" in rung["rules"] else ", lasting Δt")
        cells = [title, *(shown_value(rung, m) for m in measures)]
        cells += [_plain_time(rung, m) for m in extra]
        cells += ["–" if rung["statistics_error"] is None else f"{rung['statistics_error']:.3f}", f"{rung['dt']:.3g}"]
        low, high = (1e3 * x for x in rung["cost_interval"])
        cells += [f"{1e3 * rung['cost']:.3g} [{low:.3g}, {high:.3g}]", f"{1e3 * rung['throughput']:.3g}"]
        cells += [f"{rung['memory'] / 2**20:.2g}", f"{rung['compile_seconds']:.1f}"]
        rows.append(cells)
        if rung["kind"] != "classical":
            bold.append(i)
    header = ["run", *(NAMES[m] for m in measures), *extra, "statistics error", "Δt", "ms per unit time", "all starts at once"]
    return Table("All runs, from the cheapest to the dearest.", [*header, "MiB", "compile s"], rows, tuple(bold))


def _plain_time(rung: Record, measure: str) -> str:
    value, bound = rung.get(measure), rung.get(f"{measure}_at_least")
    if value is None:
        return "–" if bound is None else f"≥ {bound:.3g}"
    return f"{value:.2f}"


def setting(found: Record) -> str:
    """What the family was measured with, in two sentences."""
    reference = found["reference"]
    until, change = reference.get("converged_until"), reference.get("change")
    shape = " × ".join(map(str, reference["shape"]))
    if until is None:
        truth = "a stated fine run: it was not made at half its resolution"
    elif until >= reference["window"] * (1 - 1e-9):
        truth = f"converged over the whole window, t = {reference['window']:g}"
    else:
        truth = f"a stated fine run: half its resolution agrees until t = {until:.3g} of {reference['window']:g}"
    if change:
        parts = [f"{100 * v:.1f} % in {k.replace('_', ' ')}" for k, v in change.items() if v is not None]
        truth += f"; at t = {found['at']:g} it differs by {', '.join(parts)}"
    return (
        f"{found['title']}. {found['samples']} starts; the truth is {shape} in {reference['precision']} ({truth}). Costs are "
        "medians over rounds in which all runs took turns; from round to round a program varies by "
        f"{100 * found['noise']:.0f} % (middle 90 %)."
    )


def notes(found: Record) -> list[str]:
    """What a reader must know before the numbers are believed."""
    lines = []
    ladders = found["ladders"]
    if ladders["widest"]:
        method, ratio = max(ladders["widest"].items(), key=lambda item: item[1])
        lines.append(f"Neighbouring rungs of a ladder are at most {ratio:.2f} apart in points per axis ({method}).")
    count = len(ladders["beyond"])
    runs = "run is" if count == 1 else "runs are"
    lines.append(f"{count or 'No'} classical {runs} more accurate than every closure by {NAMES[found['metric']]}.")
    if found["long"]:
        lines.append(_stability(found))
    limit = found["limit"]
    if limit:
        grid = " × ".join(map(str, limit["shape"]))
        parts = []
        for group in limit["groups"].values():
            value = f"beyond {limit['end']:.3g}" if group["value"] is None else f"{group['value']:.3g}"
            parts.append(f"{value} ({NAMES[group['measure']]}) on {' × '.join(map(str, group['shape']))}")
        lines.append(
            f"Predictability limit, from pairs of {grid} runs that differ only in modes which the coarse grid does not hold: "
            + ", ".join(parts)
            + "."
        )
    for closure, entry in found["closures"].items():
        even = entry["break_even"]
        if even is not None:
            data = "" if even["data_seconds"] is None else f", its data {even['data_seconds']:.0f} s (estimated)"
            won = "nothing is won back" if even["unit_times"] is None else f"won back after {even['unit_times']:.2g} unit times"
            lines.append(f"{closure}: a training took {even['training_seconds']:.0f} s{data}; {won}.")
    if found["lost"]:
        lines.append(f"Lost a start, and so on no ladder: {', '.join(found['lost'])}.")
    if found["unstable"]:
        lines.append(f"Unstable with all time steps tried: {', '.join(found['unstable'])}.")
    return lines


def _stability(found: Record) -> str:
    tried = [r for r in found["rungs"] if r["lasted"] is not None]
    short = [r["title"] for r in tried if r["lasted"] < found["long"] and "accuracy" in r["rules"] and r["kind"] == "classical"]
    words = f"none fails before t = {found['long']:g}" if not short else f"not until t = {found['long']:g}: {', '.join(short)}"
    closures = [r for r in tried if r["kind"] != "classical" and "accuracy" in r["rules"]]
    lasting = sum(r["lasted"] >= found["long"] for r in closures)
    return (
        f"Long runs of all starts with the time steps that keep the accuracy: {words}. "
        f"Of the runs with closures {lasting} of {len(closures)} last."
    )


def compared(before: Record, results: Mapping[str, Record]) -> Table:
    """This benchmark beside an earlier one: the same verdicts?"""
    rows = []
    for name, found in results.items():
        old = before["families"].get(name)
        for closure, entry in found["closures"].items():
            was = None if old is None else old["closures"].get(closure)
            for measure in found["measures"]:
                now = entry["measures"][measure]
                then = None if was is None else was["measures"].get(measure)
                if then is None:
                    continue
                was_there, is_there = outcome_of(then["verdict"]), outcome_of(now["verdict"])
                rows.append(
                    [
                        f"{name.replace('_', ' ')}: {closure}",
                        NAMES[measure],
                        shown_ratio(then["best"]),
                        shown_ratio(now["best"]),
                        f"{is_there}, both times" if was_there == is_there else f"{was_there}, then {is_there}",
                    ]
                )
    date, device = str(before.get("date", "an earlier run"))[:10], before.get("device")
    caption = f"Speed-ups over the best classical run, beside those of {date} ({device})."
    return Table(caption, ["closure", "equal", "then", "now", "verdict"], rows)


# --- figures ---------------------------------------------------------------------------------------------------------------------

MARKERS = ("D", "s", "^", "v", "P", "X")
LINES = ("-", "--", ":", "-.")


def front_figure(found: Record, measure: str) -> Any:
    """Accuracy over cost: the ladders as lines, the front of the classical runs thick, closures as black marks."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8.2, 4.6), layout="constrained")
    ax = figure.subplots()
    rungs = [r for r in found["rungs"] if r[measure] is not None and "accuracy" in r["rules"]]
    classical = [r for r in rungs if r["kind"] == "classical"]
    scale = SCALES[measure]
    front = undominated([(worth(r[measure], scale), r["cost"]) for r in classical])
    values = [w if scale == "growing" else math.exp(-w) for w, _ in front]
    wide: dict[str, Any] = {"color": "0.82", "linewidth": 8, "zorder": 0, "solid_capstyle": "round"}
    ax.plot([1e3 * c for _, c in front], values, label="front of the classical runs", **wide)
    for i, method in enumerate(dict.fromkeys(r["method"] for r in classical)):
        mine = sorted((r for r in classical if r["method"] == method), key=lambda r: r["cost"])
        look: dict[str, Any] = {"color": PALETTE[i % len(PALETTE)], "linestyle": LINES[i // len(PALETTE) % len(LINES)]}
        # the line is what a ladder offers; rungs that another one of it beats in both stand beside it, hollow
        best = undominated([(worth(r[measure], scale), r["cost"]) for r in mine])
        kept = [r for r in mine if (worth(r[measure], scale), r["cost"]) in best]
        beaten = [r for r in mine if r not in kept]
        dots = {"marker": "o", "markersize": 3.5, "color": look["color"]}
        ax.plot([1e3 * r["cost"] for r in kept], [r[measure] for r in kept], linewidth=1, label=method, **{**dots, **look})
        ax.plot([1e3 * r["cost"] for r in beaten], [r[measure] for r in beaten], linestyle="", markerfacecolor="white", **dots)
    for i, closure in enumerate(found["closures"]):
        mine = [r for r in rungs if r["closure"] == closure]
        look = {"color": "black", "markersize": 6.5, "markeredgecolor": "white", "linestyle": "none", "zorder": 5}
        label = f"{closure}, {len(mine)} training seed{'' if len(mine) == 1 else 's'}"
        ax.plot([1e3 * r["cost"] for r in mine], [r[measure] for r in mine], MARKERS[i % len(MARKERS)], label=label, **look)
    ax.set_xscale("log")
    if scale == "shrinking":
        ax.set_yscale("log")
        ax.invert_yaxis()
        ax.yaxis.set_major_formatter("{x:.3g}")
        ax.yaxis.set_minor_formatter("{x:.1g}" if len(values) and max(values) / max(min(values), 1e-9) < 5 else "")
    ax.xaxis.set_major_formatter("{x:g}")
    ax.set_xlabel("ms per unit time, one start, median of rounds in turn (left is cheaper)")
    ax.set_ylabel(f"{NAMES[measure]} (up is better)")
    ax.legend(loc="center left", bbox_to_anchor=(1.01, 0.5), fontsize=7.5)
    return figure


def series_figure(found: Record, series: "xr.Dataset") -> Any:
    """How long runs stay with the truth: closures, their own solver alone, the fine run at half its resolution, and the limit."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8.2, 5.0), layout="constrained")
    ax = figure.subplots()
    gas = found["metric"] in ("error", "temperature_error")
    name = "error" if gas else "correlation"
    by_label = {r["label"]: r for r in found["rungs"]}
    for i, (closure, entry) in enumerate(found["closures"].items()):
        colour = PALETTE[i % len(PALETTE)]
        rows = series[name].sel(run=entry["runs"]).mean("start").transpose("run", "time").values
        times = series["time"].values
        ax.fill_between(times, rows.min(axis=0), rows.max(axis=0), color=colour, alpha=0.25, linewidth=0)
        ax.plot(times, rows.mean(axis=0), color=colour, label=closure)
        rung = by_label[entry["runs"][0]]
        alone = [
            r
            for r in found["rungs"]
            if r["kind"] == "classical" and r["discretisation"] == rung["discretisation"] and r["shape"] == rung["shape"]
        ]
        if alone:
            best = max(alone, key=lambda r: worth_of(r, found["metric"]))
            values = series[name].sel(run=best["label"]).mean("start").values
            ax.plot(
                times, values, color=colour, linewidth=1, linestyle="--", label=f"best classical run on its grid: {best['title']}"
            )
    limit = found["limit"]
    for i, (name_of, group) in enumerate((limit or {"groups": {}})["groups"].items()):
        values = np.asarray(group["series"], float).mean(axis=0)
        grid = f"{name_of.rpartition('_')[0].replace('_', ' ')} {' × '.join(map(str, group['shape']))}"
        look = {"color": "0.45", "linestyle": LINES[(i + 1) % len(LINES)], "linewidth": 1.4}
        ax.plot(limit["times"], values, label=f"predictability limit of {grid}", **look)
    if "half" in series:
        ax.plot(
            series["time"].values,
            series["half"].mean("start").values,
            color=REFERENCE_COLOUR,
            linewidth=1.2,
            label="truth at half its resolution",
        )
    if gas:
        ax.set_yscale("log")
        ax.yaxis.set_major_formatter("{x:g}")
    else:
        ax.axhline(0.95, **LIMIT)
        ax.set_ylim(top=1.01)
    ax.set_xlabel("time")
    ax.set_ylabel("error (mean over starts)" if gas else "correlation with the truth (mean over starts)")
    figure.legend(loc="outside lower center", ncols=2, fontsize=7.5)
    return figure


# --- files -----------------------------------------------------------------------------------------------------------------------


def family_dataset(found: Record, folder: Path) -> "xr.Dataset":
    """Every raw number of a family: what each run did for each start, and what it cost in each round."""
    import xarray as xr

    from hybridsim import gas

    labels = [r["label"] for r in found["rungs"]]
    runs = [storage.open_dataset(folder / f"{label}.nc") for label in labels]
    dims = ("run", "start", "time")

    def stacked(of: Any, long_name: str) -> Any:
        return (dims, np.stack([of(ds) for ds in runs]), {"long_name": long_name, "units": "1"})

    data: dict[str, Any] = {
        "correlation": stacked(lambda ds: ds["correlation"].transpose("sample", "time").values, "correlation with the truth")
    }
    if all("error" in ds for ds in runs):

        def error(ds: Any) -> np.ndarray:
            values = ds["error"].transpose("field", "sample", "time").values
            return gas.error_of(dict(zip(map(str, ds["field"].values), values, strict=True)))

        data["error"] = stacked(error, "relative L2 error, the larger of those of ρ and √ρ v")
    for key, name, text in (
        ("seconds_by_round", "cost", "one start alone"),
        ("batch_by_round", "cost_batch", "each of all starts at once"),
    ):
        values = np.array([r[key] for r in found["rungs"]])
        data[name] = (("run", name + "_round"), values, {"long_name": f"seconds per unit time, {text}", "units": "s"})
    for key, units in (("dt", "time"), ("memory", "byte"), ("compile_seconds", "s")):
        data[key] = ("run", np.array([float(r[key]) for r in found["rungs"]]), {"units": units})
    for measure in found["measures"]:
        values = [np.nan if r[measure] is None else r[measure] for r in found["rungs"]]
        data[measure if measure not in data else f"{measure}_stated"] = ("run", np.array(values), {"long_name": NAMES[measure]})
    if found["reference"]["converged_until"] is not None:
        half = storage.open_dataset(folder / "reference.nc", "convergence")
        values = half["correlation"].values
        if "error" in half:
            values = gas.error_of({str(f): half["error"].sel(field=f).values for f in half["field"].values})
        data["half"] = (("start", "time"), values, {"long_name": "the same of the truth at half its resolution", "units": "1"})
    coords: dict[str, Any] = {"run": ("run", labels), "time": ("time", runs[0]["time"].values)}
    limit = found["limit"]
    if limit:
        groups = limit["groups"]
        coords |= {"limit_time": ("limit_time", np.array(limit["times"])), "group": ("group", list(groups))}
        values = np.array([g["series"] for g in groups.values()], float)
        data["limit"] = (
            ("group", "start", "limit_time"),
            values,
            {"long_name": "pairs of fine runs that share the coarse start", "units": "1"},
        )
    return xr.Dataset(data, coords=coords, attrs={"title": found["title"], "config_hash": found["config_hash"]})


def page(bench: Bench, results: Mapping[str, Record], versions: Mapping[str, Any], date: str, before: Record | None) -> str:
    """`bench.md`."""
    lines = [f"# {bench.title}", "", provenance(bench, versions, date), ""]
    top = overview(results)
    lines += [*top.markdown(), ""]
    for name, found in results.items():
        lines += [f"## {name.replace('_', ' ').capitalize()}", "", setting(found), ""]
        lines += [
            f"- **{closure}**, by {NAMES[found['metric']]}: {entry['verdict']}." for closure, entry in found["closures"].items()
        ]
        lines += [f"- {line}" for line in notes(found)]
        for table in (claims_table(found), rungs_table(found)):
            lines += ["", *table.markdown()]
        lines += [""]
    if before is not None:
        table = compared(before, results)
        lines += ["## Once more", "", table.caption, "", *table.markdown(), ""]
    return "\n".join(lines).rstrip() + "\n"


def provenance(bench: Bench, versions: Mapping[str, Any], date: str) -> str:
    commit = f" ({str(versions['commit'])[:10]})" if versions.get("commit") else ""
    return (
        f"{versions['device']}, {versions['threads']} threads, JAX {versions['jax']}, hybridsim {versions['hybridsim']}{commit}, "
        f"{date}. {bench.rounds} rounds; intervals: 90 %, starts, rounds and training seeds drawn again {bench.resamples} times."
    )


def write_results(
    folder: Path, bench: Bench, results: Mapping[str, Record], quick: bool, before: Record | None, origins: Record
) -> Path:
    """All files about the families that are finished; the path of the page. `origins` is what `storage.provenance` says."""
    import jinja2
    import matplotlib

    versions, date = origins["versions"], origins["date"]
    about = {"title": bench.title, "quick": quick, **origins}
    numbers = {"precision": ", ".join(origins["precision"]), "rounds": bench.rounds, "resamples": bench.resamples}
    storage.write_json(folder / "bench.json", {**about, **numbers, "families": dict(results)})
    storage.atomic_write(folder / "bench.md", page(bench, results, versions, date[:10], before))
    datasets = {name: family_dataset(found, folder / name) for name, found in results.items()}
    storage.save_groups(folder / "bench.nc", datasets, storage.as_attributes({"title": bench.title, **origins}))
    (folder / "figures").mkdir(exist_ok=True)
    parts = []
    with matplotlib.rc_context(STYLE):
        for name, found in results.items():
            figures = [
                (f"{name}_{m}", f"Accuracy over cost, by {NAMES[m]}", front_caption(m), front_figure(found, m))
                for m in found["measures"]
            ]
            figures.append(
                (f"{name}_time", "How long runs stay with the truth", SERIES_CAPTION, series_figure(found, datasets[name]))
            )
            drawn = []
            for file, title, caption, figure in figures:
                content = png(figure)
                storage.atomic_write(folder / "figures" / f"{file}.png", content)
                data, width = base64.b64encode(content).decode("ascii"), round(100 * figure.get_figwidth())
                drawn.append({"name": file, "title": title, "caption": caption, "data": data, "width": width})
            verdicts = [
                {"closure": closure, "sentence": entry["verdict"], "above": outcome_of(entry["verdict"]) == OUTCOMES[0]}
                for closure, entry in found["closures"].items()
            ]
            parts.append(
                {
                    "name": name.replace("_", " ").capitalize(),
                    "setting": setting(found),
                    "measure": NAMES[found["metric"]],
                    "verdicts": verdicts,
                    "notes": notes(found),
                    "tables": [claims_table(found), rungs_table(found)],
                    "figures": drawn,
                }
            )
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("hybridsim", "templates"), autoescape=True, trim_blocks=True, undefined=jinja2.StrictUndefined
    )
    text = environment.get_template("bench.html.j2").render(
        title=bench.title,
        provenance=provenance(bench, versions, date[:10]),
        quick=quick,
        overview=overview(results),
        families=parts,
        again=None if before is None else compared(before, results),
        versions={k: v for k, v in versions.items() if isinstance(v, str | int | float)},
    )
    target = folder / "bench.html"
    storage.atomic_write(target, text)
    return target


SERIES_CAPTION = (
    "Bands: training seeds. The predictability limit is where pairs of fine runs part that share the coarse start, "
    "and nothing below it."
)


def front_caption(measure: str) -> str:
    """What a front shows, and which way is better."""
    direction = "Up and left is better" if SCALES[measure] == "growing" else "Up (smaller) and left is better"
    return (
        f"{direction}. Lines: ladders of classical runs, each rung with the largest time step that keeps its accuracy; "
        "hollow: rungs that another one of the same ladder beats in both; black: closures."
    )
