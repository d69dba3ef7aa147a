"""A picture of what diverged: the field at fault in the last finite state of each such run, and what may help."""

import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from hybridsim import storage
from hybridsim.blowups import FOLDER

if TYPE_CHECKING:
    import xarray as xr
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def _at_fault(data: "xr.Dataset") -> tuple[np.ndarray, list[str], list[np.ndarray], tuple[int, ...]]:
    """(values, axes, coordinates, cell) of the field at fault; of three dimensions the plane through the cell."""
    field = data[str(data.attrs["field"])].isel(sample=0, time=0)
    cell = tuple(int(i) for i in np.atleast_1d(data.attrs["cell"]))
    if field.ndim == 3:
        field, cell = field.isel({field.dims[2]: cell[2]}), cell[:2]
    return np.asarray(field, np.float64), [str(d) for d in field.dims], [np.asarray(field[d]) for d in field.dims], cell


def blowup_figure(path: Path, runs: Sequence[tuple[str, str, str]]) -> "Figure | None":
    """One row for each of the `runs`, as (label, colour, outcome), whose last finite state lies in the folder; None without."""
    from matplotlib.figure import Figure

    files = [(run, path / FOLDER / f"{run[0]}.nc") for run in runs]
    rows = [(run, storage.open_dataset(file)) for run, file in files if file.exists()]
    if not rows:
        return None
    figure = Figure(figsize=(7.6, 2.7 * len(rows)), layout="constrained")
    for i, ((label, colour, outcome), data) in enumerate(rows):
        axes = figure.add_subplot(len(rows), 2, 2 * i + 1)
        _draw(axes, data)
        words = figure.add_subplot(len(rows), 2, 2 * i + 2)
        words.axis("off")
        words.text(0, 0.97, label, color=colour, weight="bold", fontsize=10, va="top", transform=words.transAxes)
        words.text(0, 0.86, _words(outcome, data), fontsize=8.5, va="top", transform=words.transAxes, linespacing=1.35)
    return figure


def _draw(axes: "Axes", data: "xr.Dataset") -> None:
    values, names, places, cell = _at_fault(data)
    name = str(data.attrs["field"])
    axes.set_title(f"{name} at t = {float(data['time'][0]):.4g}, the last finite state", fontsize=9)
    mark = {"marker": "o", "markersize": 11, "markerfacecolor": "none", "markeredgecolor": "black", "markeredgewidth": 1.3}
    if values.ndim == 1:
        axes.plot(places[0], values, linewidth=1.2)
        axes.plot([places[0][cell[0]]], [values[cell]], linestyle="", **mark)
        axes.set(xlabel=names[0].removesuffix("_face"), ylabel=name)
        return
    low, high = float(np.nanmin(values)), float(np.nanmax(values))
    signed = low < 0 < high
    limit = max(-low, high)
    scale: dict[str, Any] = {"cmap": "RdBu_r", "vmin": -limit, "vmax": limit} if signed else {"cmap": "viridis"}
    image = axes.pcolormesh(places[0], places[1], values.T, shading="nearest", rasterized=True, **scale)
    axes.plot([places[0][cell[0]]], [places[1][cell[1]]], linestyle="", **mark)
    axes.set(xlabel=names[0].removesuffix("_face"), ylabel=names[1].removesuffix("_face"))
    axes.set_aspect("equal", adjustable="box")
    axes.grid(visible=False)
    axes.figure.colorbar(image, ax=axes, shrink=0.85)


def _words(outcome: str, data: "xr.Dataset") -> str:
    """What happened, and what may help, folded to the width of the panel."""
    happened = outcome.replace("diverged", "Diverged", 1)
    said = [f"• {sentence}" for sentence in str(data.attrs["advice"]).split("; ")]
    return "\n".join(textwrap.fill(line, 52, subsequent_indent="  ") for line in [happened, "", "What may help:", *said])
