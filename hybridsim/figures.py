"""Every figure of an experiment's page, each from the folder's results; None where they lack what it shows.

A line (1D) has space–time pictures in place of vorticity, a box with walls has no spectra. A gas has density and temperature in
place of vorticity, its error, its phases and its energy budget.
"""

import math
import re
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import xarray as xr

from hybridsim import diagnostics, gas, storage
from hybridsim.drawing import (
    BAND,
    LIMIT,
    PALETTE,
    REFERENCE_COLOUR,
    SHADE,
    STYLE,
    add_legend,
    add_note,
    add_side_legend,
    new_figure,
    new_panels,
    plain_text,
    png,
)
from hybridsim.results import Folder, Run, has_frames, is_gas, layout_of, plane_of, reference_cost, time_held
from hybridsim.words import judges_statistics, show_number, show_percent, show_place, show_solver, show_unit, stated_time

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def _time_label(folder: Folder) -> str:
    data = next((r.data for r in folder.runs if r.data is not None), None)
    return "time t" + ("" if data is None else show_unit(data["time"]))


def _handles(runs: Sequence[Run], *, reference: str | None = "reference") -> list[Any]:
    from matplotlib.lines import Line2D

    lines = [Line2D([], [], **r.line) for r in runs]
    return lines + ([Line2D([], [], color=REFERENCE_COLOUR, linewidth=2.6, alpha=0.55, label=reference)] if reference else [])


def _sample_mean(data: xr.DataArray, *, skip_broken: bool = False) -> np.ndarray:
    """Mean over samples: NaN as soon as one sample is, or over the finite ones alone."""
    values = np.asarray(data, dtype=np.float64)
    if "sample" not in data.dims:
        return values
    axis = data.dims.index("sample")
    good = np.isfinite(values)
    count = good.sum(axis=axis)
    with np.errstate(invalid="ignore", divide="ignore"):
        mean = np.where(good, values, 0.0).sum(axis=axis) / count
    return mean if skip_broken else np.where(count == values.shape[axis], mean, np.nan)


def _sample_max(data: xr.DataArray) -> np.ndarray:
    return np.asarray(data.max("sample", skipna=False) if "sample" in data.dims else data, dtype=np.float64)


def _end_mark(axes: "Axes", times: np.ndarray, values: np.ndarray, colour: str) -> None:
    """× where a line stops before the window does: the run diverged."""
    good = np.flatnonzero(np.isfinite(values))
    if good.size and good[-1] < len(values) - 1:
        axes.plot(times[good[-1]], values[good[-1]], "x", color=colour, markersize=7, markeredgewidth=2, clip_on=False, zorder=6)


def _shade_unconverged(axes: "Axes", folder: Folder) -> None:
    """Grey where the reference itself is no longer converged."""
    start, end = folder.converged_until, folder.window_end
    if start is not None and end is not None and start < end * (1 - 1e-9):
        axes.axvspan(start, end, label="reference not converged", **SHADE)


def _shots(data: xr.Dataset, times: np.ndarray, name: str) -> list[np.ndarray] | None:
    """The vorticity (in 3D along z), a scalar, or density or temperature of a gas, of sample 0 at some times: on `plane_of`."""
    grid, variables = layout_of(data)
    shots = data.isel(sample=0) if "sample" in data.dims else data
    plane = plane_of(grid)
    middle = {diagnostics.AXES[a]: grid.shape[a] // 2 for a in range(grid.ndim) if a not in plane}
    walls = not all(grid.periodic)
    if is_gas(data):
        near = shots[[v.name for v in variables]].sel(time=times, method="nearest").isel(middle)
        near = near.transpose("time", *(diagnostics.AXES[a] for a in plane))
        return list(np.asarray(near["density"] if name == "density" else _temperature(near, float(data.attrs["gamma"]))))
    if name != "vorticity" or walls:
        if name not in data:
            return None
        found = shots[name].sel(time=times, method="nearest").isel(middle)
        return list(np.asarray(found.transpose("time", *(diagnostics.AXES[a] for a in plane))))
    near = shots[[v.name for v in variables]].sel(time=times, method="nearest")
    frames = np.stack([np.asarray(near[v.name].transpose("time", *diagnostics.dimensions(v.at))) for v in variables], axis=1)
    found = diagnostics.in_pieces(lambda u: diagnostics.vorticity(u, grid, variables), grid, frames)
    return list(found[:, 2, ..., grid.shape[2] // 2] if grid.ndim == 3 else found)


def _temperature(data: xr.Dataset, gamma: float) -> xr.DataArray:
    """T = p/ρ of the channels of a gas."""
    rho = data["density"].astype(np.float64)
    momentum = sum(data[name].astype(np.float64) ** 2 for name in diagnostics.MOMENTA if name in data)
    return (gamma - 1) * (data["energy"] - 0.5 * momentum / rho) / rho


def vorticity_figure(folder: Folder) -> "Figure | None":
    """ω(x, y) of sample 0: a row per field, a column per time, one colour scale; in 3D ω_z on the middle plane across z."""
    if folder.gas:
        return None
    return _picture_figure(folder, "vorticity", "vorticity ω$_z$" if folder.ndim == 3 else "vorticity ω", " [1 / time]")


def scalar_figure(folder: Folder) -> "Figure | None":
    """c(x, y) of sample 0, the first of the passive scalars: a row per field, a column per time, one colour scale."""
    if not folder.scalars or folder.gas:
        return None
    return _picture_figure(folder, folder.scalars[0], f"scalar {plain_text(folder.scalars[0])}", "")


def density_figure(folder: Folder) -> "Figure | None":
    """ρ(x, y) of sample 0 on the plane of `plane_of`: a row per field, a column per time, one colour scale."""
    return _picture_figure(folder, "density", "density ρ", "") if folder.gas else None


def temperature_figure(folder: Folder) -> "Figure | None":
    """T(x, y) of sample 0 on the plane of `plane_of`: a row per field, a column per time, one colour scale."""
    return _picture_figure(folder, "temperature", "temperature p/ρ", "") if folder.gas else None


CONTRAST = 8.0
"""Fields whose values differ by more than this factor are shown on a logarithmic scale."""


def _sequential_scale(values: np.ndarray, name: str) -> dict[str, Any] | None:
    """Colours from the lowest to the highest of almost all values; None where they are all alike."""
    from matplotlib.colors import LogNorm

    low, high = (float(q) for q in np.quantile(values, (0.002, 0.998)))
    if not high - low > 1e-6 * max(abs(low), abs(high)):
        return None
    colours = "inferno" if name == "temperature" else "viridis"
    if name in ("density", "temperature") and low > 0 and high > CONTRAST * low:
        return {"cmap": colours, "norm": LogNorm(low, high)}
    return {"cmap": colours, "vmin": low, "vmax": high}


def _colour_bar(figure: "Figure", image: Any, right: float, top: float, tall: float) -> Any:
    """A colour bar in the right margin, below the top one; all in inches."""
    width, height = figure.get_size_inches()
    axes = figure.add_axes(((width - right + 0.12) / width, (height - top - tall) / height, 0.13 / width, tall / height))
    axes.grid(visible=False)
    bar = figure.colorbar(image, cax=axes, extend="both")
    bar.outline.set_linewidth(0.5)  # pyright: ignore[reportCallIssue, reportAttributeAccessIssue]
    return bar


def _picture_figure(folder: Folder, name: str, label: str, unit: str) -> "Figure | None":
    """A field of sample 0: a row per run and reference, a column per time."""
    runs = [r for r in folder.runs if r.data is not None and has_frames(r.data)]
    if not runs or folder.ndim < 2:
        return None
    box = layout_of(runs[0].data)[0]  # pyright: ignore[reportArgumentType]
    lengths = [box.lengths[a] for a in plane_of(box)]
    aspect = min(4.0, max(0.1, lengths[1] / lengths[0]))
    # flat boxes have few and wide pictures
    columns = 5 if aspect > 0.4 else 3 if aspect > 0.2 else 2
    fine = folder.references.get("fine")
    times = np.asarray(fine["time"] if fine is not None else runs[0].data["time"], dtype=np.float64)  # pyright: ignore[reportOptionalSubscript]
    times = times[np.unique(np.linspace(0, len(times) - 1, min(len(times), columns)).round().astype(int))]
    rows: list[tuple[str, str, str, list[np.ndarray], np.ndarray | None]] = []

    def add(words: str, detail: str, colour: str, data: xr.Dataset, rho: np.ndarray | None = None) -> None:
        shots = _shots(data, times, name)
        if shots is not None:
            rows.append((words, detail, colour, shots, rho))

    if fine is not None:
        add("reference", " × ".join(str(n) for n in layout_of(fine)[0].shape), REFERENCE_COLOUR, fine)
    whole = bool(rows)
    for group in folder.groups or ("",):
        if group in folder.references and has_frames(folder.references[group]):
            add("reference, filtered", show_place(folder, group), REFERENCE_COLOUR, folder.references[group])
        for run in runs:
            if run.data is not None and (run.group == group or not folder.groups):
                rho = None
                if "correlation" in run.data and name == "vorticity":
                    rho = np.asarray(run.data["correlation"].isel(sample=0).sel(time=times, method="nearest"))
                if "error" in run.data and name == "density":
                    rho = np.asarray(run.data["error"].sel(field=name).isel(sample=0).sel(time=times, method="nearest"))
                add(run.label, show_solver(run.config), run.colour, run.data, rho)
    if not rows:
        return None
    pool = rows[0][3] if whole else [w for row in rows for w in row[3]]
    values = np.concatenate([w[np.isfinite(w)] for w in pool])
    if name == "vorticity":
        # the layers along walls are thin and strong, and would leave the rest pale
        limit = float(np.quantile(np.abs(values), 0.97 if folder.walls else 0.995)) or 1.0
        scale = {"cmap": "RdBu_r", "vmin": -limit, "vmax": limit}
    else:
        scale = _sequential_scale(values, name)
        if scale is None:
            return None

    room = 5 * (1.5 if len(rows) < 6 else 1.28)
    side = room / columns if aspect <= 1.35 else room / columns * 1.35 / aspect
    gap, left, right, top, bottom = 0.07, 1.75, 0.85, 0.32, 0.08
    width = left + len(times) * (side + gap) + right
    height = top + len(rows) * (side * aspect + gap) + bottom
    figure = new_figure(width, height, layout=None)
    image = None
    for i, (words, detail, colour, shots, rho) in enumerate(rows):
        y = height - top - (i + 1) * (side * aspect + gap) + gap
        middle = (y + side * aspect / 2) / height
        words = textwrap.fill(plain_text(words).replace("_", "_ "), 19).replace("_ ", "_")
        x = (left - 0.14) / width
        figure.text(x, middle + 0.02 / height, words, ha="right", va="bottom", color=colour, weight="bold", fontsize=9)
        figure.text(x, middle - 0.04 / height, textwrap.fill(plain_text(detail), 22), ha="right", va="top", fontsize=7.5)
        for j, w in enumerate(shots):
            axes = figure.add_axes(((left + j * (side + gap)) / width, y / height, side / width, side * aspect / height))
            axes.set(xticks=[], yticks=[], facecolor="#eceef1")
            axes.grid(visible=False)
            for spine in axes.spines.values():
                spine.set(visible=True, color="#9aa0a8", linewidth=0.5)
            if i == 0:
                axes.set_title(f"t = {show_number(float(times[j]))}", loc="center", pad=4)
            if not np.isfinite(w).all():
                axes.text(0.5, 0.5, "diverged", ha="center", va="center", transform=axes.transAxes, color="#5c6370", fontsize=9)
                continue
            extent = (0, lengths[0], 0, lengths[1])
            image = axes.imshow(w.T, origin="lower", extent=extent, aspect="auto", **scale)
            if rho is not None:
                box = {"boxstyle": "round,pad=0.22", "facecolor": "white", "edgecolor": "none", "alpha": 0.85}
                text = f"ρ {rho[j] + 0.0:.2f}".replace("-0.00", "0.00").replace("-", "−")
                # single precision is no error
                text = show_percent(float(rho[j]) if rho[j] > 1e-6 else 0.0) if name == "density" else text
                axes.text(0.06 / side, 0.075 / (side * aspect), text, transform=axes.transAxes, fontsize=7.5, bbox=box)
    if image is not None:
        bar = _colour_bar(figure, image, right, top, min(height - top - bottom, 3.2))
        plain = name != "vorticity" or show_unit(runs[0].data["u"]) == ""  # pyright: ignore[reportOptionalSubscript]
        if scale.get("norm") is not None:
            bar.ax.yaxis.set_major_formatter(lambda x, _: show_number(x))
            bar.ax.yaxis.set_minor_formatter(lambda x, _: "")
        bar.set_label(label + ("" if plain else unit))
        axes.grid(visible=False)
    return figure


def spacetime_figure(folder: Folder) -> "Figure | None":
    """u(x, t), or the density of a gas, of sample 0: time to the right, x upwards; each run under its filtered reference."""
    name = "density" if folder.gas else "u"
    runs = [r for r in folder.runs if r.data is not None and has_frames(r.data)]
    if not runs or folder.ndim > 1:
        return None
    end = folder.early_end
    rows: list[tuple[str, str, str, xr.DataArray, float | None]] = []

    def field(data: xr.Dataset) -> xr.DataArray:
        u = data[name].isel(sample=0) if "sample" in data[name].dims else data[name]
        space = next(str(d) for d in u.dims if d != "time")
        return u.transpose(space, "time").sel(time=slice(None, None if end is None else end * (1 + 1e-9)))

    for group in folder.groups or ("",):
        if group in folder.references and has_frames(folder.references[group]):
            where = show_place(folder, group)
            rows.append(("reference, filtered", where, REFERENCE_COLOUR, field(folder.references[group]), None))
        for run in runs:
            if run.data is not None and (run.group == group or not folder.groups):
                lost = None
                if "correlation" in run.data and not folder.gas:
                    rho = run.data["correlation"].isel(sample=0)
                    lost = diagnostics.crossing_time(np.asarray(rho["time"]), np.asarray(rho), 0.95)[0]
                rows.append((run.label, show_solver(run.config), run.colour, field(run.data), lost))
    known = [row[3] for row in rows if row[2] == REFERENCE_COLOUR] or [row[3] for row in rows]
    pool = np.concatenate([np.asarray(u)[np.isfinite(u)] for u in known])
    limit = float(np.quantile(np.abs(pool), 0.998)) or 1.0
    scale = {"cmap": "RdBu_r", "vmin": -limit, "vmax": limit}
    if folder.gas:
        scale = _sequential_scale(pool, name) or {"cmap": "viridis"}

    left, right, top, bottom, gap, wide = 1.8, 0.85, 0.08, 0.46, 0.09, 6.6
    span = end or 1.0
    length = folder.box.lengths[0] if folder.box else 1.0
    # long lines get taller pictures, so that their stripes stay apart, and many rows share one page
    tall = max(0.92, min(2.0, max(1.15, 0.32 * wide * length / span), 12.5 / len(rows)))
    width, height = left + wide + right, top + len(rows) * (tall + gap) + bottom
    figure = new_figure(width, height, layout=None)
    image = None
    for i, (words, detail, colour, u, lost) in enumerate(rows):
        y = height - top - (i + 1) * (tall + gap) + gap
        middle, x = (y + tall / 2) / height, (left - 0.42) / width
        words = textwrap.fill(plain_text(words).replace("_", "_ "), 17).replace("_ ", "_")
        figure.text(x, middle + 0.02 / height, words, ha="right", va="bottom", color=colour, weight="bold", fontsize=9)
        figure.text(x, middle - 0.04 / height, textwrap.fill(plain_text(detail), 22), ha="right", va="top", fontsize=7.5)
        axes = figure.add_axes((left / width, y / height, wide / width, tall / height))
        times = np.asarray(u["time"], dtype=np.float64)
        # a window in which a single frame lies
        last = float(times[-1]) if times[-1] > times[0] else float(times[0]) + span
        extent = (float(times[0]), last, 0.0, length)
        values = np.ma.masked_invalid(np.asarray(u, dtype=np.float64))
        image = axes.imshow(values, origin="lower", extent=extent, aspect="auto", interpolation="none", **scale)
        axes.set(facecolor="#eceef1", yticks=[0, length])
        for tick, va in zip(axes.set_yticklabels(["0", show_number(length)], fontsize=7.5), ("bottom", "top"), strict=True):
            tick.set_verticalalignment(va)
        add_note(axes, "x", (0, 0.5), "axes fraction", (-9, 0), ha="center", va="center", fontsize=9.0)
        axes.grid(visible=False)
        for spine in axes.spines.values():
            spine.set(visible=True, color="#9aa0a8", linewidth=0.5)
        if i < len(rows) - 1:
            axes.set_xticklabels([])
        else:
            axes.set_xlabel(_time_label(folder))
        box = {"boxstyle": "round,pad=0.22", "facecolor": "white", "edgecolor": "none", "alpha": 0.85}
        broken = np.flatnonzero(np.ma.getmaskarray(values).any(axis=0))
        if broken.size and times[-1] - times[broken[0]] > 0.15 * (times[-1] - times[0]):
            middle_time = 0.5 * (float(times[broken[0]]) + float(times[-1]))
            axes.text(middle_time, 0.5 * length, "diverged", ha="center", va="center", color="#5c6370", fontsize=9)
        if lost is not None and lost <= times[-1]:
            axes.axvline(lost, color="black", linewidth=1.3)
            late = lost > times[0] + 0.8 * (times[-1] - times[0])
            at = {"xycoords": ("data", "axes fraction"), "textcoords": "offset points", "ha": "right" if late else "left"}
            axes.annotate(
                f"ρ < 0.95 from t = {lost:.3g}", (lost, 0), xytext=(-6 if late else 6, 6), fontsize=7.5, va="bottom", bbox=box, **at
            )
    if image is not None:
        bar = _colour_bar(figure, image, right, top, min(height - top - bottom, 2.6))
        bar.set_label("density ρ" if folder.gas else "u")
    return figure


def correlation_figure(folder: Folder) -> "Figure | None":
    """ρ(t) per run, mean and range over samples, with t95 and t80."""
    runs = [r for r in folder.runs if r.data is not None and "correlation" in r.data]
    if not runs:
        return None
    figure = new_figure(9.2, 4.1)
    axes = figure.subplots()
    _shade_unconverged(axes, folder)
    lowest = 1.0
    for run in runs:
        data = run.data["correlation"]  # pyright: ignore[reportOptionalSubscript]
        times, values = np.asarray(data["time"], dtype=np.float64), np.asarray(data.transpose("sample", "time"), dtype=np.float64)
        axes.fill_between(times, values.min(axis=0), values.max(axis=0), color=run.colour, alpha=0.13, linewidth=0)
        axes.plot(times, values.mean(axis=0), **run.line, zorder=4)
        lowest = min(lowest, float(values.mean(axis=0).min()))
        for level, key in ((0.95, "t95"), (0.8, "t80")):
            if run.numbers.get(key) is not None:
                axes.plot(
                    run.numbers[key],
                    level,
                    "o",
                    color=run.colour,
                    markersize=6,
                    markeredgecolor="white",
                    markeredgewidth=0.9,
                    zorder=5,
                )
    if "convergence" in folder.references and "correlation" in folder.references["convergence"]:
        half = folder.references["convergence"]["correlation"]
        axes.plot(half["time"], _sample_mean(half), ":", color=REFERENCE_COLOUR, linewidth=1.1, label="half-resolution reference")
    for level in (0.95, 0.8):
        axes.axhline(level, **LIMIT)
        axes.annotate(
            f"{level:.2f}",
            (1, level),
            xycoords=("axes fraction", "data"),
            xytext=(4, 0),
            textcoords="offset points",
            va="center",
            fontsize=8,
        )
    # where nothing is lost the axis ends below 0.80
    bottom = 0.74 if lowest > 0.8 else max(-0.25, min(0.0, lowest) - 0.03)
    label = "correlation of the density's fluctuation" if folder.gas else "correlation ρ with the reference"
    axes.set(xlabel=_time_label(folder), ylabel=label, ylim=(bottom, 1.015))
    axes.set_xlim(0 if float(times[0]) >= 0 else float(times[0]), folder.early_end)
    handles, _ = axes.get_legend_handles_labels()
    handles.sort(key=lambda h: h.get_label() == "reference not converged")
    add_side_legend(figure, handles)
    return figure


FIELDS = {"density": "density ρ", "weighted_velocity": "√ρ v", "pressure": "pressure p"}


def error_figure(folder: Folder) -> "Figure | None":
    """‖q − q_ref‖/‖q_ref‖ over time for ρ, √ρ v and p: a panel per field, mean and range over samples, dots at the stated time."""
    runs = [r for r in folder.runs if r.data is not None and "error" in r.data]
    if not runs:
        return None
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    figure = new_figure(9.2, 3.4)
    panels = figure.subplots(1, len(FIELDS), sharex=True, sharey=True)
    half = folder.references.get("convergence")
    pool = []
    for axes, (name, title) in zip(panels, FIELDS.items(), strict=True):
        _shade_unconverged(axes, folder)
        for run in runs:
            data = run.data["error"].sel(field=name)  # pyright: ignore[reportOptionalSubscript]
            times, values = np.asarray(data["time"], dtype=np.float64), np.asarray(data.transpose("sample", "time"))
            # the start is the same for all, but for rounding
            values = np.where(times[None] > times[0], values, np.nan)
            mean = values.mean(axis=0)
            axes.fill_between(times, values.min(axis=0), values.max(axis=0), color=run.colour, alpha=0.13, linewidth=0)
            axes.semilogy(times, mean, **run.line, zorder=4)
            _end_mark(axes, times, mean, run.colour)
            pool.append(mean[np.isfinite(mean) & (mean > 0)])
            at, stated = data.attrs.get("at"), run.numbers.get(f"{name}_error")
            if at is not None and stated:
                dot = {"markersize": 6, "markeredgecolor": "white", "markeredgewidth": 0.9}
                axes.plot(at, stated, "o", color=run.colour, zorder=5, clip_on=False, **dot)
        if half is not None and "error" in half:
            mean = _sample_mean(half["error"].sel(field=name))
            axes.semilogy(half["time"][1:], mean[1:], ":", color=REFERENCE_COLOUR, linewidth=1.3)
            pool.append(mean[1:][np.isfinite(mean[1:]) & (mean[1:] > 0)])
        axes.set_title(title)
        axes.set_xlabel(_time_label(folder))
        axes.set_xlim(float(times[0]), folder.window_end)
    values = np.concatenate(pool)
    if values.size:
        panels[0].set_ylim(max(float(values.min()), 1e-4 * float(values.max())) / 2, min(float(values.max()) * 2, 10))
    panels[0].set_ylabel("relative L2 error")
    handles = _handles(runs, reference=None)
    if half is not None and "error" in half:
        handles.append(Line2D([], [], color=REFERENCE_COLOUR, linewidth=1.3, linestyle=":", label="half-resolution reference"))
    if folder.converged_until is not None and folder.converged_until < (folder.window_end or 0.0) * (1 - 1e-9):
        handles.append(Patch(**SHADE, label="reference not converged"))
    add_legend(figure, handles)
    return figure


def _over_panel(folder: Folder, group: str, columns: int) -> str:
    """The filter and grid of a group, in two lines where panels are narrow and it is long."""
    name = show_place(folder, group)
    return re.sub(r" (?=[a-z])", "\n", name, count=1) if columns >= BAND and len(name) > 22 else name


def phase_figure(folder: Folder) -> "Figure | None":
    """m(T) and ε(T), mass and emission per temperature bin, means over samples and the window: a column per filter."""
    key, other = "mass_per_temperature", "emission_per_temperature"
    runs = [r for r in folder.runs if r.data is not None and key in r.data]
    groups = [g for g in folder.groups if key in folder.references[g] and any(r.group == g for r in runs)]
    if not groups:
        return None
    figure, panels, first = new_panels((1.0, 1.0), len(groups), 4.9, sharex=True)
    drawn, seen = [], ([], [])
    for column, group in enumerate(groups):
        for row, name in enumerate((key, other)):
            axes, truth = panels[row, column], folder.references[group][name]
            bins = np.asarray(truth["temperature"])
            known = _sample_mean(truth, skip_broken=True)
            seen[row].append(known[known > 0])
            axes.step(bins, np.where(known > 0, known, np.nan), where="mid", color=REFERENCE_COLOUR, linewidth=3, alpha=0.5)
            for run in (r for r in runs if r.group == group):
                found = _sample_mean(run.data[name], skip_broken=True)  # pyright: ignore[reportOptionalSubscript]
                if np.isfinite(found).all():
                    axes.step(run.data["temperature"], np.where(found > 0, found, np.nan), where="mid", **run.line)  # pyright: ignore
                    drawn.append(run)
                    seen[row].append(found[found > 0])
            axes.set_xscale("log")
            axes.set_yscale("log")
        panels[0, column].set_title(_over_panel(folder, group, len(groups)))
        unit = show_unit(folder.references[group]["temperature"])
        panels[1, column].set_xlabel("temperature p/ρ" + (unit.replace(" ", "\n") if len(groups) >= BAND else unit))
    for row, parts in enumerate(seen):
        values = np.concatenate(parts)
        if values.size:
            panels[row, 0].set_ylim(max(float(values.min()) / 2, 1e-4 * float(values.max())), 3 * float(values.max()))
    for column in first:
        panels[0, column].set_ylabel("mass per bin")
        panels[1, column].set_ylabel("emission per bin")
    add_legend(figure, _handles(list({r.label: r for r in drawn}.values())))
    return figure


def budget_figure(folder: Folder) -> "Figure | None":
    """Where the energy went: changes of the kinetic and the internal energy, what was radiated and added, and what is left over."""
    runs = [r for r in folder.runs if r.data is not None and "energy_added" in r.data]
    if not runs:
        return None
    titles = {
        "kinetic_energy": "kinetic energy (change)",
        "internal_energy": "internal energy (change)",
        "added": "added by forces and sides",
        "radiated": "radiated",
        "residual": "left over, relative",
    }

    def of(run: Run, name: str) -> np.ndarray:
        data: Any = run.data
        if name in ("added", "radiated"):
            radiated = _sample_mean(data["radiated"]) if "radiated" in data else 0.0
            return np.asarray(radiated if name == "radiated" else _sample_mean(data["energy_added"]) + radiated)
        if name == "residual":
            total = data["total_energy"]
            return _sample_max(np.abs(total - total.isel(time=0) - data["energy_added"]) / total.isel(time=0))
        values = _sample_mean(data[name])
        return values - values[0]

    shown = [name for name in titles if any(np.nanmax(np.abs(np.atleast_1d(of(r, name)))) > 0 for r in runs) or name == "residual"]
    columns = 2 if len(shown) == 4 else min(3, len(shown))
    rows = -(-len(shown) // columns)
    figure = new_figure(9.2, 2.5 * rows + 0.4)
    grid = figure.subplots(rows, columns, squeeze=False, sharex=True)
    for axes in grid.ravel()[len(shown) :]:
        axes.set_visible(False)
    for i, (axes, name) in enumerate(zip(grid.ravel(), shown, strict=False)):
        known = [folder.references[g] for g in folder.groups if name in folder.references[g]]
        reach = 0.0
        for data in known:
            values = _sample_mean(data[name])
            axes.plot(data["time"], values - values[0], color=REFERENCE_COLOUR, linewidth=3, alpha=0.5)
            reach = max(reach, float(np.nanmax(np.abs(values - values[0]))))
        for run in runs:
            data: Any = run.data
            times, values = np.asarray(data["time"], dtype=np.float64), np.atleast_1d(of(run, name))
            if name == "residual":
                values = np.where(values > 0, values, np.where(times == times[0], np.nan, 1e-300))
                axes.semilogy(times, values, **run.line)
            else:
                values = np.where(np.abs(values) < 10 * reach, values, np.nan) if reach > 0 else values
                axes.plot(times, values, **run.line)
            _end_mark(axes, times, values, run.colour)
        if name == "residual":
            drawn = np.concatenate([line.get_ydata() for line in axes.lines if len(line.get_ydata()) > 1])
            drawn = drawn[np.isfinite(drawn) & (drawn > 1e-300)]
            axes.set_ylim(max(float(drawn.min(initial=1e-8)), 1e-18) / 3, min(float(drawn.max(initial=1e-17)), 1e3) * 3)
        axes.set_title(titles[name])
        axes.set_xlim(0, folder.window_end)
        if i >= len(shown) - columns:
            axes.set_xlabel(_time_label(folder))
            axes.tick_params(labelbottom=True)
    add_legend(figure, _handles(runs, reference="reference, same filter"))
    return figure


def spectrum_figure(folder: Folder) -> "Figure | None":
    """k³ E(k) over k (3D and gas: k^5/3 E(k), 1D: E(k)), and E / E_ref below it: a column per filter.

    Of a gas the spectrum of √ρ v, and below the share of its compressive part.
    """
    runs = [r for r in folder.runs if r.data is not None and "spectrum" in r.data]
    groups = [g for g in folder.groups if "spectrum" in folder.references[g] and any(r.group == g for r in runs)]
    if not groups:
        return None
    from matplotlib.patches import Patch

    ndim = layout_of(folder.references[groups[0]])[0].ndim
    power, text = {1: (0.0, "E(k)"), 2: (3.0, "k³ E(k)"), 3: (5 / 3, "k$^{5/3}$ E(k)")}[3 if folder.gas and ndim > 1 else ndim]
    split = [g for g in groups if "spectrum_parts" in folder.references[g]]
    heights = (2.2, 1.0, 1.0) if split else (2.2, 1.0)
    figure, panels, first = new_panels(heights, len(groups), 6.6 if split else 5.2, sharex=False)
    tops, drawn, worst = [], [], 1.0
    for column, group in enumerate(groups):
        upper, lower = panels[0, column], panels[1, column]
        reference = folder.references[group]
        grid = layout_of(reference)[0]
        grid = gas.spectral_grid(grid) or grid
        k = np.asarray(reference["wavenumber"], dtype=np.float64)
        truth = _sample_mean(reference["spectrum"], skip_broken=True)
        k0 = 2 * np.pi / max(grid.lengths)
        nyquist = k0 * min(n * max(grid.lengths) / (2 * length) for n, length in zip(grid.shape, grid.lengths, strict=True))
        # modes that a solver has cut hold rounding only
        shown = (k > 0) & (k <= nyquist * 1.001) & (truth > 1e-13 * truth.sum())
        compensated = k**power * truth
        tops.append(compensated[shown])
        upper.loglog(k[shown], compensated[shown], color=REFERENCE_COLOUR, linewidth=3, alpha=0.5)
        for run in (r for r in runs if r.group == group):
            found = _sample_mean(run.data["spectrum"], skip_broken=True)  # pyright: ignore[reportOptionalSubscript]
            good = shown & np.isfinite(found) & (found > 0) & (truth > 0)
            if good.any():
                upper.loglog(k[good], (k**power * found)[good], **run.line)
                lower.loglog(k[good], (found / truth)[good], **run.line)
                drawn.append(run)
                scored = good & (k <= 2 / 3 * nyquist)
                worst = max([worst, *np.exp(np.abs(np.log((found / truth)[scored])))])
        lower.axhline(1, color=REFERENCE_COLOUR, linewidth=3, alpha=0.5, zorder=1)
        if split:
            share = panels[2, column]
            share.plot(k[shown], _compressive_share(reference)[shown], color=REFERENCE_COLOUR, linewidth=3, alpha=0.5)
            for run in (r for r in runs if r.group == group and r in drawn):
                share.plot(k[shown], _compressive_share(run.data)[shown], **run.line)
        for axes in panels[:, column]:
            axes.axvspan(2 / 3 * nyquist, nyquist, **SHADE)
            axes.set_xlim(k[shown][0], nyquist)
        upper.set_title(_over_panel(folder, group, len(groups)))
        ticks = [k0 * 2.0**i for i in range(12) if 2.0**i * k0 <= nyquist * 1.001]
        if abs(k0 - round(k0)) > 1e-3:
            decimal = [digit * 10.0**i for i in range(-4, 5) for digit in (1, 2, 5)]
            ticks = [t for t in decimal if k0 * 0.999 <= t <= nyquist * 1.001]
        lowest = panels[-1, column]
        lowest.set_xscale("log")
        lowest.set_xticks(ticks, [show_number(t) for t in ticks])
        lowest.minorticks_off()
        lowest.set_xlabel("wavenumber k" + show_unit(reference["wavenumber"]))
    pool = np.concatenate(tops)
    pool = pool[pool > 0]
    panels[0, 0].set_ylim(pool.min() / 3, pool.max() * 3)
    for column in first:
        for axes, label in zip(panels[:, column], (text, "E / E reference", "compressive\nshare"), strict=False):
            axes.set_ylabel(label)
    # the scored part sets the range, in one of four sizes
    reach = next((m for m in (1.5, 2.0, 4.0) if worst <= 0.95 * m), 10.0)
    panels[1, 0].set_ylim(1 / reach, reach)
    panels[1, 0].set_yticks([1 / reach, 1, reach], [show_number(1 / reach, 2), "1", show_number(reach)])
    panels[1, 0].minorticks_off()
    if split:
        shares = np.concatenate([line.get_ydata() for axes in panels[2] for line in axes.lines])
        panels[2, 0].set_ylim(0, min(1.0, 1.15 * float(np.nanmax(shares))))
    add_legend(figure, [*_handles(drawn), Patch(**SHADE, label="not scored")])
    return figure


def _compressive_share(data: Any) -> np.ndarray:
    """E_c(k)/E(k) of the mean spectra."""
    parts = {name: _sample_mean(data["spectrum_parts"].sel(part=name), skip_broken=True) for name in gas.PARTS}
    with np.errstate(invalid="ignore", divide="ignore"):
        return parts["compressive"] / (parts["compressive"] + parts["solenoidal"])


def distribution_figure(folder: Folder) -> "Figure | None":
    """The density of u (1D), the vorticity (3D) or ln ρ/⟨ρ⟩ (gas) over samples and the window, and the reference's: a column per
    filter.
    """
    runs = [r for r in folder.runs if r.data is not None and "pdf" in r.data]
    groups = [g for g in folder.groups if "pdf" in folder.references[g] and any(r.group == g for r in runs)]
    if not groups or (folder.ndim == 2 and not folder.gas):
        return None
    logarithmic = folder.ndim == 3 or folder.gas
    figure, (panels,), first = new_panels((1.0,), len(groups), 3.3, sharex=False)
    drawn, top, low, ends = [], 0.0, math.inf, []
    for axes, group in zip(panels, groups, strict=True):
        truth = folder.references[group]["pdf"]
        values, density = np.asarray(truth["value"]), np.asarray(truth, dtype=np.float64)
        axes.plot(values, np.where(density > 0, density, np.nan), color=REFERENCE_COLOUR, linewidth=3, alpha=0.5)
        tops = [float(np.nanmax(density))]
        low = min(low, float(density[density > 0].min()))
        seen = values[density > 0]
        ends += [float(seen[0]), float(seen[-1])]
        for run in (r for r in runs if r.group == group):
            density = np.asarray(run.data["pdf"], dtype=np.float64)  # pyright: ignore[reportOptionalSubscript]
            if np.isfinite(density).all():
                axes.plot(run.data["pdf"]["value"], np.where(density > 0, density, np.nan), **run.line)  # pyright: ignore[reportOptionalSubscript]
                drawn.append(run)
                tops.append(min(float(density.max()), 2 * tops[0]))
        top = max(top, *tops)
        axes.set_title(_over_panel(folder, group, len(groups)))
        axes.set_xlabel("ln ρ/⟨ρ⟩" if folder.gas else "vorticity component" if logarithmic else "u")
    span = max(ends) - min(ends)
    for axes in panels:
        axes.set_xlim(min(ends) - 0.08 * span, max(ends) + 0.08 * span)
    if logarithmic:
        panels[0].set_yscale("log")
        panels[0].set_ylim(max(low / 3, 1e-6 * top), 3 * top)
    else:
        panels[0].set_ylim(0, 1.12 * top)
    for column in first:
        panels[column].set_ylabel("probability density")
    add_legend(figure, _handles(drawn))
    return figure


STATISTICS = {
    "mean_square": "⟨u²⟩",
    "mean_square_slope": "⟨uₓ²⟩",
    "mean_square_curvature": "⟨uₓₓ²⟩",
    "energy": "kinetic energy",
    "enstrophy": "enstrophy",
    "energy_rate": "dE/dt",
    "mach": "rms Mach",
    "density_rms": "ρ rms/⟨ρ⟩",
    "kinetic_energy": "kinetic energy",
    "internal_energy": "internal energy",
    "dilatation": "rms ∇·v",
    "emission": "emission",
}


def statistics_figure(folder: Folder) -> "Figure | None":
    """Means over the window with their standard errors, each relative to the run's own filtered reference."""
    runs = [r for r in folder.runs if r.numbers.get("statistics") and r.numbers.get("statistics_error") is not None]
    if not runs or not judges_statistics(folder.summary, folder.config):
        return None
    names = list(dict.fromkeys(name for r in runs for name in r.numbers["statistics"] if name != "energy_rate"))
    figure = new_figure(9.2, 0.34 * len(runs) + 1.15)
    panels = figure.subplots(1, len(names), squeeze=False, sharey=True)[0]
    for axes, name in zip(panels, names, strict=True):
        ends = [0.0]
        for i, run in enumerate(runs):
            row = run.numbers["statistics"].get(name)
            if row is None or row["difference"] is None or not row["reference"]:
                continue
            percent = 100 / abs(row["reference"])
            at, error, known = 100 * row["difference"], row["standard_error"], row["reference_standard_error"]
            if known is not None:
                axes.barh(
                    i, 2 * known * percent, left=-known * percent, height=0.62, color=REFERENCE_COLOUR, alpha=0.16, linewidth=0
                )
                ends += [known * percent, -known * percent]
            spread = 0.0 if error is None else error * percent
            ends += [at - spread, at + spread]
            face = "white" if run.bare else run.colour
            axes.errorbar(
                at, i, xerr=spread or None, fmt="o", color=run.colour, markersize=6, markerfacecolor=face, markeredgewidth=1.6
            )
        axes.axvline(0, color=REFERENCE_COLOUR, linewidth=1.2, zorder=1)
        room = 0.12 * (max(ends) - min(ends)) or 1.0
        axes.set_xlim(min(ends) - room, max(ends) + room)
        axes.locator_params(axis="x", nbins=5 if len(names) < 5 else 3)
        axes.set_ylim(len(runs) - 0.4, -0.6)
        kind, _, scalar = name.partition(":")
        axes.set_title(f"variance of {plain_text(scalar)}" if scalar else STATISTICS.get(kind, kind))
        axes.set_xlabel("off by %")
        axes.tick_params(axis="y", length=0)
    panels[0].set_yticks(range(len(runs)), [textwrap.fill(plain_text(r.label), 24) for r in runs])
    for tick, run in zip(panels[0].get_yticklabels(), runs, strict=True):
        tick.set_color(run.colour)
    return figure


SUMS = {"density": "ρ", **{name: f"ρv$_{axis}$" for name, axis in zip(diagnostics.MOMENTA, "xyz", strict=True)}, "energy": "E"}
"""What the sums of a gas are sums of."""


def conservation_figure(folder: Folder) -> "Figure | None":
    """Drift of each conserved sum and the largest divergence over time, log scale, worst sample."""
    runs = [r for r in folder.runs if r.data is not None and ("drift" in r.data or "divergence_max" in r.data)]
    names = list(dict.fromkeys(str(v) for r in runs if "drift" in r.data for v in np.asarray(r.data["variable"])))  # pyright: ignore
    panels: list[tuple[str, str]] = [("drift", name) for name in names]
    if any("divergence_max" in r.data for r in runs):  # pyright: ignore[reportOperatorIssue]
        panels.append(("divergence_max", ""))
    if not panels:
        return None
    from matplotlib.lines import Line2D

    columns = 2 if len(panels) == 4 else min(3, len(panels))
    rows = -(-len(panels) // columns)
    figure = new_figure(9.2, 2.75 * rows + 0.35)
    grid = figure.subplots(rows, columns, squeeze=False, sharex=True)
    limited = False
    for axes in grid.ravel()[len(panels) :]:
        axes.set_visible(False)
    for i, (axes, (key, name)) in enumerate(zip(grid.ravel(), panels, strict=False)):
        low, high = math.inf, 0.0
        for run in runs:
            if run.data is None or key not in run.data or (name and name not in np.asarray(run.data["variable"])):
                continue
            data = run.data[key].sel(variable=name) if name else run.data[key]
            times, values = np.asarray(data["time"], dtype=np.float64), _sample_max(data)
            # zero has no logarithm: the trivial one at the start is left out, any other lies below the panel
            values = np.where(values == 0, np.where(times == times[0], np.nan, 1e-300), values)
            # A run that is blowing up leaves the panel at its top instead of stretching the page.
            values = np.minimum(values, 1e3)
            axes.semilogy(times, values, **run.line)
            _end_mark(axes, times, values, run.colour)
            shown = values[np.isfinite(values) & (values > 1e-300)]
            if shown.size:
                low, high = min(low, float(shown.min())), max(high, float(shown.max()))
        limits = {c["limit"] for c in folder.summary.get("checks", []) if c.get("name", "").split(".")[0] == key and c.get("limit")}
        for limit in limits:
            axes.axhline(limit, **LIMIT)
        limited = limited or bool(limits)
        # where all is exactly zero there is nothing but the limit
        low = min(limits, default=1e-15) / 1e3 if math.isinf(low) else low
        low, high = min([low, 1.0, *limits]), min(max([high, 1e-17, *limits]), 1e3)
        axes.set_ylim(max(low, 1e-18) / 4, high * 4)
        of = SUMS.get(name, plain_text(name)) if folder.gas else plain_text(name)
        axes.set_title(f"drift of Σ{of}, relative" if name else "max |∇·u| Δx / max |u|")
        if i >= len(panels) - columns:
            axes.set_xlabel(_time_label(folder))
            axes.tick_params(labelbottom=True)
    handles = _handles(runs, reference=None)
    add_legend(figure, [*handles, Line2D([], [], **LIMIT, label="limit of the checks")] if limited else handles)
    return figure


def _place_labels(figure: "Figure", axes: "Axes", points: Sequence[tuple[float, float, str, str]]) -> None:
    """Names beside points, each at the first of several offsets where it covers no point and no other name."""
    from matplotlib.transforms import Bbox

    renderer = figure.canvas.get_renderer()  # pyright: ignore[reportAttributeAccessIssue]
    dots = [axes.transData.transform((x, y)) for x, y, _, _ in points]
    scale = figure.dpi / 72
    taken = [Bbox.from_bounds(px - 6 * scale, py - 6 * scale, 12 * scale, 12 * scale) for px, py in dots]
    frame = axes.get_window_extent(renderer)
    for i, (x, y, text, colour) in enumerate(points):
        best = None
        for distance in (9, 16, 26, 38):
            for dx, dy in ((1, 0), (-1, 0), (0, 1), (0, -1), (0.7, 0.8), (0.7, -0.8), (-0.7, 0.8), (-0.7, -0.8)):
                note = axes.annotate(
                    text,
                    (x, y),
                    xytext=(dx * distance, dy * distance),
                    textcoords="offset points",
                    ha="left" if dx > 0 else "right" if dx < 0 else "center",
                    va="bottom" if dy > 0 else "top" if dy < 0 else "center",
                    color=colour,
                    fontsize=8.5,
                    arrowprops={"arrowstyle": "-", "color": colour, "linewidth": 0.6, "shrinkB": 4} if distance > 16 else None,
                )
                box = note.get_window_extent(renderer).padded(1.5 * scale)
                inside = box.x0 >= frame.x0 and box.x1 <= frame.x1 and box.y0 >= frame.y0 and box.y1 <= frame.y1
                if inside and not any(box.overlaps(other) for j, other in enumerate(taken) if j != i):
                    best = box
                    break
                note.remove()
            if best is not None:
                taken.append(best)
                break


def cost_figure(folder: Folder) -> "Figure | None":
    """t95 over seconds per unit time: up and left is better; the error of a gas instead: down and left."""
    points = []
    measure = "temperature_error" if folder.radiates else "error"
    for run in folder.runs:
        cost = run.numbers.get("seconds_per_unit_time")
        value = run.numbers.get(measure) if folder.gas else time_held(run.numbers)
        if cost and value is not None and (value > 0 or not folder.gas):
            points.append((float(cost), float(value), run))
    if not points:
        return None
    figure = new_figure(7.2, 3.7)
    axes = figure.subplots()
    costs = [p[0] for p in points]
    cost = reference_cost(folder)
    if cost:
        axes.axvline(cost, color=REFERENCE_COLOUR, linewidth=3, alpha=0.5)
        costs.append(cost)
    top = max(p[1] for p in points)
    axes.set_xscale("log")
    axes.set_xlim(min(costs) / 2.6, max(costs) * 2.6)
    axes.set_ylim(0, top * 1.22 or 1)
    if folder.gas:
        axes.set_yscale("log")
        axes.set_ylim(min(p[1] for p in points) / 1.8, top * 1.8)
        axes.yaxis.set_major_formatter(lambda y, _: show_number(y))
        axes.yaxis.set_minor_formatter(lambda y, _: show_number(y) if f"{y:e}"[0] in "235" else "")
        axes.tick_params(axis="y", which="minor", labelsize=8)
    for x, y, run in points:
        never = run.numbers.get("t95") is None and not folder.gas
        face = "white" if run.bare else run.colour
        axes.plot(
            x,
            y,
            "^" if never else "o",
            markersize=9,
            markerfacecolor=face,
            markeredgecolor=run.colour,
            markeredgewidth=1.8,
            zorder=5,
        )
    label = "t95: time with ρ ≥ 0.95"
    if folder.gas:
        at = show_number(stated_time(folder.summary, folder.config))
        label = "error of the mass\nper temperature" if folder.radiates else f"error of ρ and √ρ v at t = {at}"
    axes.set(xlabel="seconds per unit of simulated time", ylabel=label)
    figure.draw_without_rendering()
    figure.set_layout_engine("none")
    labels = [(x, y, plain_text(r.label), r.colour) for x, y, r in points]
    if cost:
        axes.annotate(
            "reference",
            (cost, 0.02),
            xycoords=("data", "axes fraction"),
            xytext=(-4, 0),
            textcoords="offset points",
            ha="right",
            fontsize=8.5,
        )
    _place_labels(figure, axes, labels)
    return figure


def series_keys(folder: Folder) -> list[tuple[str, str]]:
    """Names of the series in the files that the page follows over time, and how it calls them."""
    if folder.gas:
        emission = [("emission", "emission\n⟨ρ²Λ⟩")] if folder.radiates else []
        means = [
            ("mach", "rms\nMach number"),
            ("density_rms", "density\nρ rms/⟨ρ⟩"),
            ("kinetic_energy", "kinetic energy\n½⟨ρ|v|²⟩"),
        ]
        return [*means, ("dilatation", "rms\n∇·v"), *emission]
    if folder.ndim == 1:
        return [("mean_square", "⟨u²⟩"), ("mean_square_slope", "⟨uₓ²⟩"), ("mean_square_curvature", "⟨uₓₓ²⟩")]
    keys = [("energy", "kinetic energy ½⟨|u|²⟩"), ("enstrophy", "enstrophy ½⟨|ω|²⟩")]
    equation = folder.config.get("equation")
    decaying = isinstance(equation, Mapping) and not equation.get("forcing") and not folder.walls
    return [*keys, ("energy_rate", "dissipation −dE/dt")] if decaying else keys


def energy_figure(folder: Folder) -> "Figure | None":
    """½⟨|u|²⟩, ½⟨|ω|²⟩ and, in a decaying flow, −dE/dt (1D: ⟨u²⟩, ⟨uₓ²⟩, ⟨uₓₓ²⟩; gas: Mach number, ρ rms, …) over time beside the
    reference under the same filter: a column per filter.
    """
    keys = series_keys(folder)
    runs = [r for r in folder.runs if r.data is not None and keys[0][0] in r.data]
    groups = [g for g in folder.groups if keys[0][0] in folder.references[g]] or ([""] if runs else [])
    if not runs:
        return None
    keys = [(key, title) for key, title in keys if any(r.data is not None and key in r.data for r in runs)]
    figure, panels, first = new_panels(
        [1.0] * len(keys), len(groups), (2.3 if len(keys) < 3 else 1.75) * len(keys) + 0.6, sharex=True
    )
    marks: list[tuple[int, Axes, np.ndarray, np.ndarray, str]] = []
    for column, group in enumerate(groups):
        for row, (key, title) in enumerate(keys):
            axes = panels[row, column]
            low, high = [], []
            if group and key in folder.references[group]:
                truth = folder.references[group][key]
                values = (-1 if key == "energy_rate" else 1) * _sample_mean(truth)
                axes.plot(truth["time"], values, color=REFERENCE_COLOUR, linewidth=3, alpha=0.5)
                low.append(np.nanmin(values))
                high.append(np.nanmax(values))
            for run in (r for r in runs if r.group == group or not group):
                if run.data is None or key not in run.data:
                    continue
                times, values = np.asarray(run.data["time"], dtype=np.float64), _sample_mean(run.data[key])
                values = -values if key == "energy_rate" else values
                values = np.where(np.abs(values) < 10 * max([*high, 1e-300]), values, np.nan) if high else values
                axes.plot(times, values, **run.line)
                marks.append((row, axes, times, values, run.colour))
                if not run.diverged and np.isfinite(values).any():
                    low.append(np.nanmin(values))
                    high.append(np.nanmax(values))
            if column in first:
                axes.set_ylabel(title.replace(" ½", "\n½"))
            if row == 0 and group:
                axes.set_title(_over_panel(folder, group, len(groups)))
            if row == len(keys) - 1:
                axes.set_xlabel(_time_label(folder))
            axes.set_xlim(0 if len(groups) else None, folder.window_end)
            if low:
                axes.update_datalim([(0, min(low)), (0, max(high))])
    for row in range(len(keys)):
        values = np.concatenate([line.get_ydata() for axes in panels[row] for line in axes.lines if len(line.get_ydata()) > 1])
        ceiling = 2.5 * max(
            (np.nanmax(line.get_ydata()) for axes in panels[row] for line in axes.lines[:1]), default=float(np.nanmax(values))
        )
        top = min(1.12 * float(np.nanmax(values)), ceiling)
        low = min(0.0, 1.12 * float(np.nanmin(values))) if keys[row][0] == "energy_rate" else 0.0
        if folder.gas and float(np.nanmin(values)) > 0.7 * top:
            # what hardly changes is seen from near
            span = max(top / 1.12 - float(np.nanmin(values)), 0.02 * top)
            low, top = float(np.nanmin(values)) - 0.15 * span, top / 1.12 + 0.15 * span
        panels[row, 0].set_ylim(max(low, -top), top or 1.0)
        for at, axes, times, line, colour in marks:
            if at == row:
                _end_mark(axes, times, np.clip(line, *axes.get_ylim()), colour)
    add_legend(figure, _handles(runs, reference="reference, same filter" if groups != [""] else None))
    return figure


def convergence_figure(folder: Folder) -> "Figure | None":
    """1 - ρ(t) between the reference and its half-resolution twin; the window should end below 0.01."""
    data = folder.references.get("convergence")
    if data is None or "correlation" not in data:
        return None
    figure = new_figure(6.4, 3.0)
    axes = figure.subplots()
    _shade_unconverged(axes, folder)
    times = np.asarray(data["time"], dtype=np.float64)
    if "error" in data:
        return _change_figure(folder, figure, axes, data["error"])
    values = np.asarray(data["correlation"], dtype=np.float64).reshape(-1, times.size)
    for sample in values:
        axes.semilogy(times, np.maximum(1 - sample, 1e-16), color="#9aa0a8", linewidth=0.7)
    axes.semilogy(times, np.maximum(1 - values.mean(axis=0), 1e-16), color=REFERENCE_COLOUR, linewidth=2)
    axes.axhline(0.01, **LIMIT)
    add_note(axes, "ρ = 0.99", (1, 0.01), ("axes fraction", "data"), (4, 0), va="center", fontsize=8.0)
    positive = (1 - values)[1 - values > 1e-16]
    axes.set_ylim(max(1e-16, float(positive.min()) / 3) if positive.size else 1e-16, 2)
    axes.set(xlabel=_time_label(folder), ylabel="1 − ρ,\nhalf against full resolution")
    axes.set_xlim(float(times[0]), float(times[-1]))
    return figure


def _change_figure(folder: Folder, figure: "Figure", axes: "Axes", error: xr.DataArray) -> "Figure":
    """How far half the resolution moves the filtered state of a gas."""
    times = np.asarray(error["time"], dtype=np.float64)
    styles = {"density": ("-", 2.0), "weighted_velocity": ("--", 1.6), "pressure": (":", 1.4)}
    drawn = []
    for name, (dash, width) in styles.items():
        values = np.where(times > times[0], _sample_mean(error.sel(field=name)), np.nan)
        axes.semilogy(times, values, linestyle=dash, linewidth=width, color=REFERENCE_COLOUR, label=FIELDS[name])
        drawn.append(values[np.isfinite(values) & (values > 0)])
    axes.axhline(gas.TOLERANCE, **LIMIT)
    add_note(axes, f"{100 * gas.TOLERANCE:g} %", (1, gas.TOLERANCE), ("axes fraction", "data"), (4, 0), va="center", fontsize=8.0)
    found = np.concatenate(drawn)
    low, high = (float(found.min()), float(found.max())) if found.size else (1e-3, 1.0)
    axes.set_ylim(max(low, 1e-4 * high) / 2, max(2 * high, 2 * gas.TOLERANCE))
    axes.set(xlabel=_time_label(folder), ylabel="relative L2 change,\nhalf against full resolution")
    axes.set_xlim(float(times[0]), float(times[-1]))
    handles, _ = axes.get_legend_handles_labels()
    add_side_legend(figure, handles)
    return figure


def _flat(record: Mapping[str, Any]) -> dict[str, Any]:
    """`{validation: {t95: 3.1}}` -> `{validation t95: 3.1}`."""
    flat: dict[str, Any] = {}
    for key, value in record.items():
        flat |= {f"{key} {k}": v for k, v in value.items()} if isinstance(value, Mapping) else {key: value}
    return flat


def loss_figure(histories: Mapping[str, Sequence[Mapping[str, Any]]]) -> "Figure":
    """Loss over updates, with the unroll lengths and the validation scores."""
    histories = {name: [_flat(r) for r in records] for name, records in histories.items()}
    first = next(iter(histories.values()))
    # a score that has no number in any record (nothing was crossed, say) has no panel
    named = (k for h in histories.values() for r in h for k, v in r.items() if isinstance(v, int | float))
    scores = list(dict.fromkeys(k for k in named if str(k).startswith(("validation", "score"))))[:2]
    figure = new_figure(7.6, 2.9 + 1.6 * len(scores))
    panels = figure.subplots(1 + len(scores), 1, squeeze=False, sharex=True, height_ratios=(2.2, *(1.0 for _ in scores)))[:, 0]
    key = next((k for k in ("update", "step", "epoch") if k in first[0]), None)

    def column(records: Sequence[Mapping[str, Any]], name: str | None) -> np.ndarray:
        if name is None:
            return np.arange(len(records), dtype=float)
        values = [r.get(name) for r in records]
        return np.array([np.nan if not isinstance(v, int | float) else v for v in values], dtype=float)

    for i, (name, records) in enumerate(histories.items()):
        colour, x, loss = PALETTE[i % len(PALETTE)], column(records, key), column(records, "loss")
        width = max(1, len(loss) // 60)
        panels[0].semilogy(x, np.where(loss > 0, loss, np.nan), color=colour, linewidth=0.7, alpha=0.35 if width > 1 else 1.0)
        horizon = np.nan_to_num(column(records, "unroll"))
        pieces = np.split(np.arange(len(loss)), np.flatnonzero(np.diff(horizon)) + 1)
        for piece in pieces if width > 1 else ():
            piece = piece[np.isfinite(loss[piece]) & (loss[piece] > 0)]
            window = np.ones(min(width, max(1, len(piece))))
            count = np.convolve(np.ones(len(piece)), window, mode="same") if len(piece) else np.ones(0)
            logs = np.convolve(np.log(loss[piece]), window, mode="same") / count if len(piece) else np.ones(0)
            panels[0].semilogy(x[piece], np.exp(logs), color=colour, linewidth=1.9)
        for axes, score in zip(panels[1:], scores, strict=True):
            values = column(records, score)
            good = np.isfinite(values)
            axes.plot(x[good], values[good], "o-", color=colour, markersize=4, linewidth=1.4, label=plain_text(name))
            axes.set_ylabel(textwrap.fill(plain_text(score).replace("_", " "), 16))
    x, unroll = column(first, key), column(first, "unroll")
    changes = [i for i in range(len(unroll)) if np.isfinite(unroll[i]) and (i == 0 or unroll[i] != unroll[i - 1])]
    span = float(x[-1] - x[0]) or 1.0
    last = -math.inf
    for i in changes:
        if i:
            for axes in panels:
                axes.axvline(x[i], color="#b6bbc3", linewidth=0.8)
        # a label needs room: horizons that change within a few percent of the axis go without one
        if x[i] - last > 0.055 * span:
            text = f"unroll {unroll[i]:g}" if i == 0 and (len(changes) == 1 or x[changes[1]] > 0.13 * span) else f"{unroll[i]:g}"
            panels[0].annotate(
                text,
                (x[i], 1),
                xycoords=("data", "axes fraction"),
                xytext=(3, 3),
                textcoords="offset points",
                fontsize=7.5,
                va="bottom",
            )
            last = x[i]
    panels[0].set_ylabel("training loss")
    panels[-1].set_xlabel(str(key or "record"))
    panels[-1].set_xlim(float(x[0]), float(x[-1]))
    if len(histories) > 1:
        from matplotlib.lines import Line2D

        handles = [
            Line2D([], [], color=PALETTE[i % len(PALETTE)], linewidth=2, label=plain_text(name)) for i, name in enumerate(histories)
        ]
        figure.legend(handles=handles, loc="outside right upper")
    return figure


def training_figure(history: list[dict], path: Path) -> Path:
    """The loss over updates as a picture at `path`.

    A record has `update` (or `epoch`) and `loss`; `unroll` and any key that starts with `validation` are drawn where they stand.
    """
    import matplotlib

    if not history or not any("loss" in record for record in history):
        raise ValueError("the training history holds no record with a loss")
    with matplotlib.rc_context(STYLE):
        figure = loss_figure({"": history})
        storage.atomic_write(path, png(figure))
    return Path(path)
