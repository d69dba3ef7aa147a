"""How every figure looks: colours, lines, letters, legends, and a picture's bytes."""

import io
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


# Okabe and Ito's palette without its yellow, which vanishes on white
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#8C6D46")
DASHES = ("-", (0, (5, 1, 1, 1)), (0, (7, 1)), (0, (5, 1, 1, 1, 1, 1)), (0, (9, 1, 3, 1)))
BARE_DASHES = ((0, (4, 1.6)), (0, (1.4, 1.4)), (0, (8, 2)), (0, (1, 3)), (0, (12, 4)))
"""Of runs with closures, and of bare ones: another each time that the colours begin again."""

REFERENCE_COLOUR = "#222222"
DPI = 160
BAND = 4
"""Panels that fit side by side."""


STYLE: dict[Any, Any] = {
    "font.family": "DejaVu Sans",
    "font.size": 9,
    "axes.titlesize": 9.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.labelsize": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.7,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e6e8eb",
    "grid.linewidth": 0.6,
    "xtick.labelsize": 8,
    "ytick.labelsize": 8,
    "xtick.major.width": 0.7,
    "ytick.major.width": 0.7,
    "legend.frameon": False,
    "legend.fontsize": 8.5,
    "lines.linewidth": 1.7,
    "lines.solid_capstyle": "round",
    "figure.facecolor": "white",
}
SHADE: dict[str, Any] = {"facecolor": "#e9ebef", "zorder": 0, "linewidth": 0}
LIMIT: dict[str, Any] = {"color": "#6b7280", "linewidth": 0.9, "linestyle": (0, (3, 3)), "zorder": 1}


def plain_text(text: str) -> str:
    """Text that matplotlib prints as it stands."""
    return str(text).replace("$", r"\$")


def new_figure(width: float, height: float, layout: Literal["constrained"] | None = "constrained") -> "Figure":
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=DPI, layout=layout)
    FigureCanvasAgg(figure)
    return figure


def new_panels(heights: Sequence[float], columns: int, tall: float, sharex: bool) -> tuple["Figure", np.ndarray, list[int]]:
    """A figure with a panel for each row (of relative `heights`) and column; the panels, `(rows, columns)`, and which columns begin
    a band. Beyond `BAND` columns they go on below, in bands of equal scales.

    `tall`: inches of one band with its legend. A row shares y, a column x, and with `sharex` all do.
    """
    bands = math.ceil(columns / BAND)
    across = math.ceil(columns / bands)
    figure = new_figure(9.2 if columns > 1 else 6.4, bands * (tall - 0.6) + 0.6)
    grid = figure.subplots(bands * len(heights), across, squeeze=False, height_ratios=[*heights] * bands)
    panels = np.empty((len(heights), columns), object)
    for column in range(columns):
        band, place = divmod(column, across)
        for row in range(len(heights)):
            axes = panels[row, column] = grid[band * len(heights) + row, place]
            if column > 0:
                axes.sharey(panels[row, 0])
            if row > 0 or (sharex and column > 0):
                axes.sharex(panels[0, 0 if sharex else column])
            axes.tick_params(which="both", labelleft=place == 0, labelbottom=row == len(heights) - 1)
    for axes in grid.ravel():
        if axes not in panels:
            axes.remove()
    return figure, panels, list(range(0, columns, across))


def add_legend(figure: "Figure", handles: Sequence[Any]) -> None:
    """One legend under all panels, in one row if it fits, else in columns as wide as the longest label; beyond two rows the figure
    grows with it.
    """
    widths, width = [0.068 * len(str(h.get_label())) + 0.62 for h in handles], figure.get_figwidth()
    columns = len(handles) if sum(widths) < width else max(1, int(width / max(widths)))
    figure.set_figheight(figure.get_figheight() + 0.19 * max(0, math.ceil(len(handles) / columns) - 2))
    figure.legend(handles=list(handles), loc="outside lower center", ncols=columns, handlelength=2.6, columnspacing=1.6)


def add_side_legend(figure: "Figure", handles: Sequence[Any]) -> None:
    """A legend at the right, or below all panels where it is too long for that."""
    if 0.27 * len(handles) > figure.get_figheight():
        add_legend(figure, handles)
    else:
        figure.legend(handles=list(handles), loc="outside right upper", handlelength=2.6, labelspacing=0.7)


def add_note(
    axes: "Axes", text: str, xy: tuple[Any, Any], coordinates: Any, offset: tuple[Any, Any], fontsize: float = 7.5, **options: Any
) -> None:
    """Small words beside a place, an offset in points away from it."""
    axes.annotate(text, xy, xycoords=coordinates, xytext=offset, textcoords="offset points", fontsize=fontsize, **options)


def png(figure: "Figure") -> bytes:
    """A figure as the bytes of a picture."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=DPI)
    return buffer.getvalue()
