"""What a run will need, before anything is allocated: memory, disk, and, once its first chunk is done, time.

The numbers are counted from shapes: frames that are kept, states that are stepped, files that are written. They are rough, and on
the safe side; memory or disk that this machine does not have is refused with both numbers. A cache that has too little room is only
spoken of: what does not fit there is made anew next time.
"""

import math
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from hybridsim.config import estimate_memory, machine_memory
from hybridsim.storage import GIB, StorageError, cache_folder, existing_parent

if TYPE_CHECKING:
    from hybridsim.config import Experiment


class Need(NamedTuple):
    """Bytes: `memory` at the same time, `disk` in the results' folder at its fullest, `cache` of what the reference keeps."""

    memory: float
    disk: float
    cache: float


def _frames_bytes(samples: int, frames: int, channels: int, shape: tuple[int, ...], precision: str) -> float:
    return float(samples) * (frames + 1) * channels * math.prod(shape) * np.dtype(precision).itemsize


def need_of(experiment: "Experiment") -> Need:
    """What `hybridsim run` needs for an experiment."""
    spec = experiment.spec
    samples, frames = spec.samples.count, spec.time.frames
    fine = spec.reference
    groups: dict[tuple, float] = {}
    kept, written = [], 0.0
    for label in experiment.labels:
        solver, precision = experiment.solver(label), spec.runs[label].precision
        shape, channels = solver.grid.shape, len(solver.variables)
        groups[type(solver).__name__, solver.filter_option, shape] = _frames_bytes(samples, frames, channels, shape, fine.precision)
        run = _frames_bytes(samples, frames, channels, shape, precision)
        # a run's frames, a copy in double precision while they are judged, and what stepping takes
        kept.append(3 * run + experiment.memory(label))
        written += 2 * run  # its file, and its frames until the end
    cached = sum(groups.values()) + max(groups.values(), default=0.0)  # and the run at half the resolution, under one filter
    memory = max(experiment.memory("reference") + 2 * cached, cached + max(kept, default=0.0))
    return Need(memory, written + cached, 2 * cached + _starts_bytes(experiment))


def _starts_bytes(experiment: "Experiment") -> float:
    """The states after the warm-up, and the fine states that an interrupted reference keeps."""
    solver = experiment.reference_solver()
    return 4 * _frames_bytes(
        experiment.spec.samples.count, 0, len(solver.variables), solver.grid.shape, experiment.spec.reference.precision
    )


def need_of_training(experiment: "Experiment") -> Need:
    """What the data of `hybridsim train` need: trajectories in memory or on disk, and the fine runs that make them."""
    train = experiment.spec.train
    assert train is not None
    data, solver, precision = train.data, experiment.solver(train.run), experiment.dtype(train.run)
    channels, shape = len(solver.variables), solver.grid.shape
    counts = ((data.trajectories, data.time), (data.validation, data.validation_time))
    training, validation = (_frames_bytes(n, round(t / data.interval), channels, shape, precision) for n, t in counts)
    together = min(data.together or data.trajectories, data.trajectories)
    fine = estimate_memory(data.shape or experiment.spec.reference.shape, channels, data.precision, together)
    held = training if data.store == "memory" else training * together / data.trajectories
    variants = len(experiment.variants) + 1
    return Need(2 * held * variants + validation * variants + fine, 0.0, 2 * (training + validation) * variants)


def free_disk(folder: Path) -> float:
    """Bytes that this process may still write where `folder` is or will be."""
    return float(shutil.disk_usage(existing_parent(folder)).free)


def check_need(need: Need, folder: Path, state: Path | None = None) -> str:
    """One line with what is needed and what there is; raises `StorageError` where memory or the results' disk do not suffice.

    `state`: the folder with what an interrupted computation has written, which is gone on with or removed.
    """
    memory, free, cache = machine_memory(), free_disk(folder), free_disk(cache_folder())
    if need.memory > memory:
        raise StorageError(
            f"{folder.name}: this needs about {need.memory / GIB:.3g} GiB of memory, and the machine has {memory / GIB:.3g} GiB; "
            "choose fewer frames, samples or grids, or smaller ones"
        )
    written = sum(path.stat().st_size for path in state.rglob("*") if path.is_file()) if state is not None else 0.0
    if need.disk - written > free:
        raise StorageError(
            f"{folder}: this run needs about {need.disk / GIB:.3g} GiB of disk, and {free / GIB:.3g} GiB are free; free some "
            "space, choose another --out, or choose fewer frames or samples"
        )
    short = f"; the cache may want {_size(need.cache)} and has {_size(cache)}" if need.cache > cache else ""
    return (
        f"needs about {_size(need.memory)} of memory ({_size(memory)} there) and {_size(need.disk)} of disk ({_size(free)} free)"
        + short
    )


def _size(n: float) -> str:
    """Bytes for a reader.

    >>> _size(3e6), _size(5e9)
    ('2.86 MiB', '4.66 GiB')
    """
    return f"{n / GIB:.3g} GiB" if n >= GIB else f"{n / 2**20:.3g} MiB"


def duration(seconds: float) -> str:
    """A time for a reader.

    >>> duration(40.0), duration(400.0), duration(4e4)
    ('40 s', '6.7 min', '11 h')
    """
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.2g} min" if seconds < 7200 else f"{seconds / 3600:.2g} h"
