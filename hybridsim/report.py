"""folder -> figures/*.png + report.html: the evidence of one experiment on one page that needs nothing but itself.

`write_report` reads what a run has written (`config.yaml`, `summary.json`, `<label>.nc`, `reference.nc`, `training.json`)
and computes nothing new beyond means over samples and the pictures of vorticity. A file or variable that is missing leaves
its figure out.
"""

import base64
import datetime
import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from hybridsim import diagnostics, figures, gas, storage
from hybridsim.blowup_figure import blowup_figure
from hybridsim.drawing import STYLE, plain_text, png
from hybridsim.results import Folder, plane_of, read_folder, reference_cost, time_held
from hybridsim.words import (
    judges_statistics,
    show_number,
    show_part,
    show_scheme,
    show_solver,
    show_unit,
    stated_time,
    statistics_words,
    unbroken,
    verdict,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure


COLUMNS = {
    "dt": ("dt",),
    "error": ("error",),
    "velocity_error": ("velocity", "error"),
    "temperature_error": ("phase", "error"),
    "t95": ("t95",),
    "t80": ("t80",),
    "spectrum_error": ("spectrum", "error"),
    "spectrum_error_common": ("the same on", "common shells"),
    "statistics_error": ("statistics", "error"),
    "drift": ("drift",),
    "divergence_max": ("divergence", "[U/Δx]"),
    "floors": ("floor", "events"),
    "seconds": ("seconds per", "unit time"),
    "speed": ("× faster than", "reference"),
}


ERRORS = ("error", "velocity_error", "temperature_error", "spectrum_error", "spectrum_error_common", "statistics_error")


def _columns(folder: Folder) -> list[str]:
    """Keys of the columns of numbers: those that say something about these runs."""
    gone = [set(r.numbers.get("not_defined") or ()) for r in folder.runs]
    nowhere = set.intersection(*gone) if gone else set()
    if not judges_statistics(folder.summary, folder.config):
        nowhere.add("statistics_error")
    if all("velocity_error" not in r.numbers for r in folder.runs):
        nowhere.add("velocity_error")
    if all(r.numbers.get("spectrum_error_common") in (None, r.numbers.get("spectrum_error")) for r in folder.runs):
        nowhere.add("spectrum_error_common")
    nowhere |= {"t80"} if folder.gas else {"error", "temperature_error"}
    if not any((r.numbers.get("floors") or {}).get("events") for r in folder.runs):
        nowhere.add("floors")
    return [key for key in COLUMNS if key not in nowhere]


def _cell(text: str, rank: float | None = None, interval: str = "") -> dict[str, Any]:
    """What a cell shows; the largest `rank` of a column is its best."""
    return {"text": text, "rank": rank, "range": interval, "best": False}


def _rows(folder: Folder) -> list[dict[str, Any]]:
    """One line of the table per run, the best of each column marked."""
    cost, columns = reference_cost(folder), _columns(folder)
    rows = []
    for run in folder.runs:
        n = run.numbers
        seconds = n.get("seconds_per_unit_time")
        ranges: dict[str, str] = {}
        # fewer than eight samples carry no interval
        if run.data is not None and "correlation" in run.data and run.data.sizes.get("sample", 1) >= 8:
            data = run.data["correlation"].transpose("sample", "time")
            for key, level in (("t95", 0.95), ("t80", 0.8)):
                found = diagnostics.t_correlated(np.asarray(data["time"]), np.asarray(data), level)
                if found.low is not None and n.get(key) is not None:
                    ranges[key] = f"{found.low:.2f} – {'beyond' if found.high is None else f'{found.high:.2f}'}"
        drifts = [v for v in (n.get("drift") or {}).values() if v is not None]

        def time_cell(key: str, n: Mapping[str, Any] = n, ranges: dict[str, str] = ranges) -> dict[str, Any]:
            value = time_held(n, key)
            text = "–" if value is None else f"{'≥ ' if n.get(key) is None else ''}{value:.2f}"
            return _cell(text, value, ranges.get(key, ""))

        speed = cost / seconds if cost and seconds else None
        errors = {key: n.get(key) for key in ERRORS}
        for key in ("error", "velocity_error"):
            interval = n.get(f"{key}_interval", [None])
            if run.data is not None and run.data.sizes.get("sample", 1) >= 8 and None not in interval:
                ranges[key] = " – ".join(show_number(x, 2) for x in interval)
        cells = {
            "dt": _cell(show_number(n.get("dt"), 4)),
            "t95": time_cell("t95"),
            "t80": time_cell("t80"),
            **{
                key: _cell(show_number(error, 2), None if error is None else -error, ranges.get(key, ""))
                for key, error in errors.items()
            },
            "drift": _cell(show_number(max(drifts) if drifts else None, 2)),
            "divergence_max": _cell(show_number(n.get("divergence_max"), 2)),
            "floors": _cell(show_number((n.get("floors") or {}).get("events"))),
            "seconds": _cell(show_number(seconds), -seconds if seconds else None),
            "speed": _cell(show_number(speed, 2), speed),
        }
        outcome = str(n.get("outcome", "finished"))
        rows.append(
            {
                "label": run.label,
                "bare": run.bare,
                "colour": run.colour,
                "solver": unbroken(show_solver(run.config) + show_scheme(run.config.get("solver"))),
                "closure": ", ".join(show_part(c) for c in run.config.get("corrections") or ()) or "none",
                "cells": [cells[key] for key in columns],
                "outcome": unbroken(outcome),
                "diverged": run.diverged,
            }
        )
    for column in range(len(columns)):
        scores = [r["cells"][column]["rank"] for r in rows if not r["diverged"]]
        scores = [s for s in scores if s is not None and math.isfinite(s)]
        for row in rows if len(rows) > 1 else ():
            cell = row["cells"][column]
            cell["best"] = bool(scores) and not row["diverged"] and cell["rank"] == max(scores)
    return rows


def _reference_row(folder: Folder) -> dict[str, Any] | None:
    reference = folder.summary.get("reference") or {}
    if not reference:
        return None
    shape = " × ".join(str(n) for n in reference.get("shape") or ())
    settings = folder.config.get("reference") or {}
    scheme, solver = show_scheme(settings.get("solver")), settings.get("solver") or ""
    solver = solver.get("use", "") if isinstance(solver, Mapping) else solver
    stated = {"dt": show_number(reference.get("dt"), 4), "seconds": show_number(reference_cost(folder))}
    cells = [_cell(stated.get(key, "")) for key in _columns(folder)]
    until = folder.converged_until
    outcome = f"converged to t\u00a0=\u00a0{show_number(until)}" if until is not None else ""
    solver = unbroken(f"{shape} {str(solver).replace('_', ' ')}{scheme}".strip())
    return {"label": "reference", "solver": solver, "colour": "var(--ink)", "cells": cells, "outcome": outcome}


def _setting(folder: Folder) -> str:
    """What was computed, in one line."""
    parts = []
    equation = folder.config.get("equation")
    if isinstance(equation, Mapping):
        name = str(equation.get("use", "")).replace("_", " ")
        viscosity = equation.get("viscosity")
        forcing = equation.get("forcing")
        forced = forcing.get("use") if isinstance(forcing, Mapping) else forcing
        if folder.gas and equation.get("gamma") is not None:
            name += f", γ {equation['gamma']}"
        cooling = equation.get("cooling")
        cooled = cooling.get("use") if isinstance(cooling, Mapping) else cooling
        parts.append(
            name
            + (f", viscosity {viscosity}" if viscosity is not None else "")
            + (f", {forced} forcing" if forced else "")
            + (f", {str(cooled).replace('_', ' ')} cooling" if cooled else "")
        )
    if folder.ndim == 1 and folder.box is not None:
        parts.append(f"L = {show_number(folder.box.lengths[0])}")
    if folder.walls and folder.box is not None:
        sides = zip(diagnostics.AXES, folder.box.boundaries, strict=False)
        named = [f"{' to '.join(dict.fromkeys(pair))} across {axis}" for axis, pair in sides if pair[0] != "periodic"]
        walls = "between walls" if not any(folder.box.periodic) else "with walls"
        parts.append(", ".join(named).replace("_", " ") if folder.gas else walls)
    if folder.scalars:
        parts.append(f"passive scalar{'s' if len(folder.scalars) > 1 else ''} {', '.join(folder.scalars)}")
    sizes = [r.data.sizes.get("sample") for r in folder.runs if r.data is not None]
    if sizes:
        parts.append(f"{sizes[0]} starts" if sizes[0] != 1 else "one start")
    if folder.window_end is not None:
        parts.append(f"t = 0 … {show_number(folder.window_end)}")
    data = next((r.data for r in folder.runs if r.data is not None), None)
    if data is not None and not show_unit(data["time"]):
        parts.append("all quantities dimensionless")
    return " · ".join(p for p in parts if p)


def _provenance(folder: Folder) -> list[tuple[str, str]]:
    summary = folder.summary
    attrs = next((r.data.attrs for r in folder.runs if r.data is not None), {})
    versions = summary.get("versions") or {}
    listed = ", ".join(f"{k} {v}" for k, v in versions.items()) if isinstance(versions, Mapping) else str(versions)
    written = datetime.datetime.fromtimestamp((folder.path / "summary.json").stat().st_mtime, datetime.UTC)
    reference = summary.get("reference") or {}
    reused = f"{show_number(reference.get('seconds'))} s" + (", from the cache" if reference.get("cached") else "")
    compile_seconds = [n.get("compile_seconds") for n in summary.get("runs", {}).values() if n.get("compile_seconds")]
    found = [
        ("hybridsim", str(versions.get("hybridsim", attrs.get("version", "")) if isinstance(versions, Mapping) else "")),
        ("commit", str(attrs.get("commit", ""))),
        ("device", summary.get("device", "")),
        ("precision", summary.get("precision", "")),
        ("seed", summary.get("seed", "")),
        ("configuration", summary.get("config_hash", "")),
        ("finished", written.strftime("%Y-%m-%d %H:%M UTC")),
        ("reference", reused if reference.get("seconds") is not None else ""),
        ("compilation", f"{show_number(sum(compile_seconds))} s for {len(compile_seconds)} runs" if compile_seconds else ""),
        ("versions", listed),
    ]
    return [(key, str(value)) for key, value in found if value]


def _caption_words(folder: Folder) -> dict[str, str]:
    """What the captions say differently of a line, a box with walls, three dimensions, scalars and decay."""
    modes = next(
        (r.data["correlation"].attrs.get("modes") for r in folder.runs if r.data is not None and "correlation" in r.data), None
    )
    window = ""
    for run in folder.runs:
        if run.data is not None and "spectrum" in run.data and "window" in run.data["spectrum"].attrs:
            start, end = np.atleast_1d(run.data["spectrum"].attrs["window"])
            window = f" over t = {show_number(float(start))} … {show_number(float(end))}"
            break
    data = [r.data for r in folder.runs if r.data is not None]
    along = next(
        (str(d["spectrum"].attrs["along"]).replace(" ", ", ") for d in data if "spectrum" in d and "along" in d["spectrum"].attrs),
        "",
    )
    split = any("spectrum_parts" in d for d in data)
    drifts = any("drift" in d for d in data)
    divergence = any("divergence_max" in d for d in data)
    several = any(d.sizes.get("sample", 1) > 1 for d in data)
    per_axis = " per axis" if folder.ndim > 1 else ""
    rate = any(key == "energy_rate" for key, _ in figures.series_keys(folder)) and any("energy_rate" in d for d in data)
    drift = (
        "Drift is the change of the sum, less what forcing and drag are known to add, over Σ|u| at the start. "
        "A line that leaves a panel downwards is exactly zero; "
    )
    if folder.gas:
        drift = drift.replace(
            "forcing and drag are known to add, over Σ|u| at the start",
            "forces, sides, floors and radiation are known to add, over Σ|q| at the start (momentum: Σ|ρv|)",
        )
    elif folder.scalars and drifts:
        drift = drift.replace("Σ|u| at the start", "Σ|u| (scalars: Σ|c|) at the start")
    return {
        "band": f" on the modes |n| ≤ {modes}{per_axis}" if modes is not None else "",
        "window": window,
        "compared": "The density's fluctuation ρ − ⟨ρ⟩" if folder.gas else "u" if folder.ndim == 1 else "Vorticity",
        "values": "ln ρ/⟨ρ⟩" if folder.gas else "Values" if folder.ndim == 1 else "All three components",
        "vorticity": "Vorticity along z of the first start" if folder.ndim == 3 else "Vorticity of the first start",
        "plane": f" Shown on the plane in the middle of the box, normal to {_normal(folder)}." if folder.ndim == 3 else "",
        "differences": " Differences of the velocities at the cell centres, one-sided at walls." if folder.walls else "",
        "error": "over starts" if several else "over blocks of time, where the window holds enough of them",
        "conservation": " and ".join(["Conservation"] * drifts + ["divergence"] * divergence).capitalize(),
        "drift": f"Largest over the starts. {drift if drifts else ''}× ends a diverged run.",
        "series": "Mach number, density fluctuation, kinetic energy and dilatation" + (", emission" if folder.radiates else "")
        if folder.gas
        else "Mean squares of u and its derivatives"
        if folder.ndim == 1
        else f"Energy{',' if rate else ' and'} enstrophy" + (" and dissipation" if rate else ""),
        "spectra": f"Along {along}, the mean over the other axes. " if along else "",
        "split": " Below: the share of the compressive part in the Helmholtz split." if split else "",
        "converged": _convergence_words(folder),
        "stated": show_number(stated_time(folder.summary, folder.config)),
        "rate": " −dE/dt by differences between frames." if rate else "",
    }


def _convergence_words(folder: Folder) -> str:
    until = folder.converged_until
    if folder.gas:
        about = "What half its resolution changes in the filtered reference, mean over starts"
        return f"{about}. " + (
            f"ρ and √ρ v stay within {100 * gas.TOLERANCE:g} % to t = {show_number(until)}." if until is not None else ""
        )
    about = "The reference against the same run at half its resolution: mean (black) and every start (grey). "
    return about + (f"ρ stays above 0.99 to t = {show_number(until)}." if until is not None else "")


def _normal(folder: Folder) -> str:
    """The axis across the plane that pictures show."""
    grid = folder.box
    return "z" if grid is None else next(diagnostics.AXES[a] for a in range(grid.ndim) if a not in plane_of(grid))


def _figures(folder: Folder) -> list[tuple[str, str, str, "Figure"]]:
    """(name, title, caption, figure) of every figure that the folder has data for."""
    words = _caption_words(folder)
    compared, window = words["compared"], words["window"]
    recipes = (
        (
            "spacetime",
            f"{'Density' if folder.gas else 'u'} of the first start in space and time",
            "Time runs to the right, x upwards; one colour scale throughout. Each run stands under the reference with its own "
            "filter"
            + ("." if folder.gas else "; the black line is where the correlation of this start falls below 0.95.")
            + (" Later times are left out." if folder.early_end != folder.window_end else ""),
            figures.spacetime_figure,
        ),
        (
            "vorticity",
            words["vorticity"],
            "One colour scale throughout; ρ is the correlation of this start with its filtered reference"
            + f"{words['band']}.{words['plane']}{words['differences']}",
            figures.vorticity_figure,
        ),
        (
            "scalar",
            f"Scalar {folder.scalars[0]} of the first start" if folder.scalars else "",
            f"One colour scale throughout.{words['plane']}",
            figures.scalar_figure,
        ),
        (
            "density",
            "Density of the first start",
            f"One colour scale throughout; percent: the relative L2 error of this start's density{words['band']}.{words['plane']}",
            figures.density_figure,
        ),
        (
            "temperature",
            "Temperature of the first start",
            f"T = p/ρ. One colour scale throughout.{words['plane']}",
            figures.temperature_figure,
        ),
        (
            "error",
            "Error over time",
            f"‖q − q_ref‖/‖q_ref‖{words['band']}, each run against the reference under its own filter. Lines: mean over starts; "
            f"bands: smallest to largest; dots: the stated time, t = {words['stated']}; thin and broken: bare runs; × ends a "
            "diverged run. Dotted in black: what half its resolution changes in the reference itself.",
            figures.error_figure,
        ),
        (
            "correlation",
            "Correlation with the reference over time",
            f"{compared}{words['band']}, each run against the reference under its own filter. Lines: mean over starts; "
            "bands: smallest to largest; dots: t95 and t80; thin and broken: bare runs; a run that diverges counts as 0 from "
            "then on." + (" Later times are left out." if folder.early_end != folder.window_end else ""),
            figures.correlation_figure,
        ),
        (
            "spectra",
            ("Spectra" if folder.ndim == 1 else "Compensated spectra")
            + (" of √ρ v" if folder.gas else "")
            + " against the reference",
            f"{words['spectra']}Mean over starts and{window or ' time'}; the reference has the same filter as the runs beside it. "
            f"The grey band, above two thirds of Nyquist, does not enter the spectrum error.{words['split']}",
            figures.spectrum_figure,
        ),
        (
            "distribution",
            f"Distribution of {'the density' if folder.gas else 'u' if folder.ndim == 1 else 'the vorticity'}",
            f"{words['values']} at all points, over starts and{window or ' time'}; the "
            "reference has the same filter as the runs beside it.",
            figures.distribution_figure,
        ),
        (
            "phases",
            "Phases: mass and emission per temperature",
            f"Bins of 1/{gas.BINS_PER_DECADE} decade; box means over starts and{window or ' time'}; the reference has the same "
            "filter as the runs beside it.",
            figures.phase_figure,
        ),
        (
            "budget",
            "Energy budget",
            "Box means over starts. Kinetic and internal energy: change since the start. Floors count as added. Left over: "
            "|E(t) − E(0) − what was added + what was radiated|/E(0), the largest over starts; a line that leaves the panel "
            "downwards is exactly zero.",
            figures.budget_figure,
        ),
        (
            "statistics",
            "Means against the reference",
            f"Relative to the reference under the same filter, over starts and{window or ' time'}. Bars, and grey bands for the "
            f"reference: one standard error, {words['error']}. Hollow: bare runs. Runs that diverged are left out.",
            figures.statistics_figure,
        ),
        (
            "conservation",
            words["conservation"],
            words["drift"],
            figures.conservation_figure,
        ),
        (
            "cost",
            "Accuracy against cost",
            "Down and left is better. Hollow: bare runs."
            if folder.gas
            else "Up and left is better. Hollow: bare runs; triangles: still above 0.95 when the window ends.",
            figures.cost_figure,
        ),
        (
            "energy",
            words["series"],
            "Means over starts, beside the reference under the same filter; × ends a diverged run." + words["rate"],
            figures.energy_figure,
        ),
        (
            "blowups",
            "What diverged",
            "The field at fault in the last finite state, one step before it was lost. Circle: where it was largest.",
            lambda f: blowup_figure(f.path, [(plain_text(r.label), r.colour, str(r.numbers.get("outcome", ""))) for r in f.runs]),
        ),
        (
            "convergence",
            "Is the reference converged?",
            words["converged"],
            figures.convergence_figure,
        ),
        (
            "training",
            "Training",
            "Loss of every update (pale) and its running geometric mean; vertical lines: the unrolled horizon grows.",
            lambda f: figures.loss_figure(f.training) if f.training else None,
        ),
    )
    drawn = ((name, title, caption, recipe(folder)) for name, title, caption, recipe in recipes)
    return [(name, title, caption, figure) for name, title, caption, figure in drawn if figure is not None]


def write_report(folder: Path) -> Path:
    """runs/<name>/ -> runs/<name>/report.html and figures/*.png: one page with everything inlined, readable offline.

    Reads only what stands in the folder. Returns the path of the page.
    """
    with storage.renewed(folder, ["report.html", "figures/*.png"]):
        return _write_page(Path(folder))


def _write_page(folder: Path) -> Path:
    import jinja2
    import matplotlib

    found = read_folder(folder)
    drawn = []
    with matplotlib.rc_context(STYLE):
        for name, title, caption, figure in _figures(found):
            content = png(figure)
            storage.atomic_write(found.path / "figures" / f"{name}.png", content)
            width = round(100 * figure.get_figwidth())
            data = base64.b64encode(content).decode("ascii")
            drawn.append({"name": name, "title": title, "caption": caption, "data": data, "width": width})
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("hybridsim", "templates"), autoescape=True, trim_blocks=True, undefined=jinja2.StrictUndefined
    )
    checks = sorted(found.summary.get("checks", []), key=lambda c: bool(c.get("passed")))
    intervals = any(r.data is not None and r.data.sizes.get("sample", 1) >= 8 for r in found.runs)
    columns = _columns(found)
    sentences = {
        "spectrum_error": " Spectrum error: mean |ln E/E_ref| to two thirds of each grid's Nyquist wavenumber.",
        "spectrum_error_common": " On common shells: to two thirds of the coarsest grid's; compare unlike grids by this one.",
        "statistics_error": f" Statistics error: largest relative error of {statistics_words(found.config, found.summary)}.",
        "drift": " Drift: largest over variables.",
        "floors": " Floor events: how often a floor stood in for a density or pressure.",
    }
    at = show_number(stated_time(found.summary, found.config))
    sentences["velocity_error"] = f" Velocity error: relative L2 error at t = {at} on the compared modes, mean over starts."
    times = "t95, t80: first time the mean correlation falls below 0.95, 0.80 (≥: not within the window)"
    if found.gas:
        times = f"Error: the larger of the relative L2 errors of ρ and √ρ v at t = {at}, mean over starts. "
        if "temperature_error" in columns:
            times += "Phase error: Σ|m − m_ref|/Σm_ref of the mean mass m per temperature bin. "
        times += "t95: first time the mean correlation of the density's fluctuation falls below 0.95 (≥: not within the window)"
    note = (
        times
        + ("; below them the 90 % bootstrap interval over starts" if intervals else "")
        + "."
        + "".join(text for key, text in sentences.items() if key in columns)
        + " Cost: after compilation. Bold: best of the runs that finished."
    )
    page = environment.get_template("report.html.j2").render(
        name=str(found.summary.get("title") or found.summary.get("name", found.path.name)),
        verdict=unbroken(verdict(found.summary, found.config)),
        passed=all(c.get("passed") for c in checks),
        setting=_setting(found),
        columns=[("run",), ("grid, solver",), ("closure",), *(COLUMNS[key] for key in columns), ("outcome",)],
        rows=_rows(found),
        reference_row=_reference_row(found),
        table_note=note,
        checks=[{"passed": bool(c.get("passed")), "sentence": c.get("sentence", c.get("name", ""))} for c in checks],
        figures=drawn,
        provenance=_provenance(found),
        config_text=found.config_text,
    )
    target = found.path / "report.html"
    storage.atomic_write(target, page)
    return target
