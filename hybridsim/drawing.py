"""How every figure looks: colours, lines, letters, legends, and a picture's bytes."""

import io
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


# Okabe and Ito's palette without its yellow, which vanishes on white
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#8C6D46")
REFERENCE_COLOUR = "#222222"
DPI = 160


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


def add_legend(figure: "Figure", handles: Sequence[Any], width: float) -> None:
    """One legend under all panels, in one row if it fits, else in columns as wide as the longest label."""
    widths = [0.068 * len(str(h.get_label())) + 0.62 for h in handles]
    columns = len(handles) if sum(widths) < width else max(1, int(width / max(widths)))
    figure.legend(handles=list(handles), loc="outside lower center", ncols=columns, handlelength=2.6, columnspacing=1.6)


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
