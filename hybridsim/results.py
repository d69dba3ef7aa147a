"""folder -> `Folder`: the results of one experiment in memory, as figures and pages are made from them."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr
import yaml

from hybridsim import diagnostics, storage
from hybridsim.contract import Variable
from hybridsim.drawing import BARE_DASHES, DASHES, PALETTE, plain_text
from hybridsim.grid import Grid


@dataclasses.dataclass(frozen=True)
class Run:
    """One run as the page shows it: its numbers, its frames, and the colour and dash it keeps on every figure.

    `lap`: how often the colours were used up before it.
    """

    label: str
    numbers: Mapping[str, Any]
    config: Mapping[str, Any]
    data: xr.Dataset | None
    colour: str
    lap: int

    @property
    def bare(self) -> bool:
        """No correction: the baseline of its solver and grid."""
        return not self.config.get("corrections")

    @property
    def diverged(self) -> bool:
        return not str(self.numbers.get("outcome", "finished")).startswith("finished")

    @property
    def group(self) -> str:
        return "" if self.data is None else str(self.data.attrs.get("reference_group", ""))

    @property
    def line(self) -> dict[str, Any]:
        """How its line is drawn: thin and broken for a bare run; runs of one colour differ."""
        kinds = BARE_DASHES if self.bare else DASHES
        dash = kinds[self.lap % len(kinds)]
        return {"color": self.colour, "linestyle": dash, "linewidth": 1.5 if self.bare else 1.9, "label": plain_text(self.label)}


@dataclasses.dataclass(frozen=True)
class Folder:
    """A run's folder in memory."""

    path: Path
    config: Mapping[str, Any]
    config_text: str
    summary: Mapping[str, Any]
    runs: tuple[Run, ...]
    references: Mapping[str, xr.Dataset]
    training: Mapping[str, Sequence[Mapping[str, Any]]]

    @property
    def groups(self) -> tuple[str, ...]:
        """Filters with runs, in the order of the runs."""
        return tuple(dict.fromkeys(r.group for r in self.runs if r.group in self.references))

    @property
    def box(self) -> Grid | None:
        """The grid of the first run that has frames; all share its box."""
        data = next((r.data for r in self.runs if r.data is not None), None)
        return None if data is None else layout_of(data)[0]

    @property
    def ndim(self) -> int:
        """Space dimensions; two where nothing says so."""
        return 2 if self.box is None else self.box.ndim

    @property
    def walls(self) -> bool:
        return self.box is not None and not all(self.box.periodic)

    @property
    def gas(self) -> bool:
        """Whether the frames are those of a gas."""
        data = next((r.data for r in self.runs if r.data is not None), None)
        return data is not None and is_gas(data)

    @property
    def radiates(self) -> bool:
        return any(r.data is not None and "mass_per_temperature" in r.data for r in self.runs)

    @property
    def scalars(self) -> tuple[str, ...]:
        """Names of the passive scalars."""
        data = next((r.data for r in self.runs if r.data is not None and "scalar" in r.data.coords), None)
        return () if data is None else tuple(str(name) for name in data["scalar"].values)

    @property
    def early_end(self) -> float | None:
        """End of the part of the window in which runs still follow the reference: all of it, but on a line at most half as long
        again as the best run holds out, or as the line is long in its natural units.
        """
        if self.ndim > 1 or self.box is None or self.window_end is None:
            return self.window_end
        times = [t for r in self.runs if (t := time_held(r.numbers)) is not None]
        return min(self.window_end, max([1.5 * t for t in times] + [self.box.lengths[0]]))

    @property
    def converged_until(self) -> float | None:
        stated = [(self.summary.get("reference") or {}).get("converged_until")]
        if "convergence" in self.references:
            stated.insert(0, self.references["convergence"].attrs.get("converged_until"))
        numbers = [float(v) for v in stated if isinstance(v, int | float | np.number) and math.isfinite(v)]
        return numbers[0] if numbers else None

    @property
    def window_end(self) -> float | None:
        ends = [float(r.data["time"][-1]) for r in self.runs if r.data is not None]
        return max(ends, default=None)


def read_folder(path: Path) -> Folder:
    """Everything the report needs, read once; unreadable or missing optional parts are left out."""
    path = Path(path)
    summary_file, config_file = path / "summary.json", path / "config.yaml"
    if not summary_file.is_file():
        raise FileNotFoundError(f"{path}: no summary.json; the folder holds no finished experiment")
    summary = storage.read_json(summary_file)
    config_text = config_file.read_text(encoding="utf-8") if config_file.is_file() else ""
    config = yaml.safe_load(config_text) or {}
    inside = {file.stem: file for file in path.glob("*.nc")}
    runs = []
    for i, (label, numbers) in enumerate(summary.get("runs", {}).items()):
        data = storage.open_dataset(inside[label]) if label in inside else None
        settings = (config.get("runs") or {}).get(label) or {}
        runs.append(Run(label, numbers, settings, data, PALETTE[i % len(PALETTE)], i // len(PALETTE)))
    references = {}
    if "reference" in inside:
        references = {
            group: storage.open_dataset(inside["reference"], group) for group in storage.dataset_groups(inside["reference"])
        }
    return Folder(path, config, config_text, summary, tuple(runs), references, _read_training(path))


def _read_training(path: Path) -> dict[str, list[dict[str, Any]]]:
    """Training histories by name: `training.json` holds one list of records, or a mapping from name (a seed, say) to such lists."""
    if (path / "training.json").is_file():
        found = storage.read_json(path / "training.json")
        if isinstance(found, dict) and isinstance(found.get("history"), list):
            found = found["history"]
        if isinstance(found, list):
            found = {"": found}
        return {str(n): records for n, records in found.items() if isinstance(records, list) and any("loss" in r for r in records)}
    return {}


def is_gas(data: xr.Dataset) -> bool:
    return all(name in data.data_vars for name in ("density", "momentum_x", "energy"))


def has_frames(data: xr.Dataset) -> bool:
    return "u" in data.data_vars or is_gas(data)


def layout_of(data: xr.Dataset) -> tuple[Grid, tuple[Variable, ...]]:
    """Grid and channels of a labelled dataset (its velocities, or those of a gas), from its dimensions and coordinates."""
    known = ("density", *diagnostics.MOMENTA, "energy") if is_gas(data) else diagnostics.VELOCITIES
    names = [name for name in known if name in data.data_vars]
    variables, shape, lengths, boundaries = [], (), (), ()
    for name in names:
        dims = [d for d in data[name].dims if d not in ("sample", "time")]
        boundaries = tuple(tuple(data[d].attrs.get("boundaries", "periodic periodic").split()) for d in dims)
        at = tuple(1.0 if str(d).endswith("_face") else 0.5 for d in dims)
        shape = tuple(data.sizes[d] for d in dims)
        lengths = tuple(float(data[d][1] - data[d][0]) * data.sizes[d] for d in dims)
        variables.append(Variable(name, data[name].attrs.get("units", "1"), at))
    return Grid(shape, lengths, boundaries), tuple(variables)


def plane_of(grid: Grid) -> tuple[int, ...]:
    """The axes of the plane that pictures show: in 3D across the last periodic axis, so that it cuts through every side."""
    if grid.ndim < 3:
        return tuple(range(grid.ndim))
    across = max((a for a in range(grid.ndim) if grid.periodic[a]), default=grid.ndim - 1)
    return tuple(a for a in range(grid.ndim) if a != across)


def time_held(numbers: Mapping[str, Any], level: str = "t95") -> float | None:
    """The correlation time, or the end of the window where it was not reached."""
    value = numbers.get(level)
    return numbers.get(f"{level}_at_least") if value is None else value


def reference_cost(folder: Folder) -> float | None:
    """Seconds per unit time of the reference, stated or from its total."""
    reference = folder.summary.get("reference") or {}
    if reference.get("seconds_per_unit_time"):
        return float(reference["seconds_per_unit_time"])
    if reference.get("seconds") and folder.window_end:
        return float(reference["seconds"]) / folder.window_end
    return None
