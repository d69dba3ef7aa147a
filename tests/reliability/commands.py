"""Small commands of each kind, what they leave when nothing goes wrong, and what must hold when something did."""

import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from forked import Done, Forked

from hybridsim import storage

RUN = """\
equation: {use: kuramoto_sivashinsky}
domain: {lengths: [22.0]}
initial: {use: random_waves, warm_up: 2.0}
samples: {count: 2, seed: 3}
time: {end: 3.5, frames: 35, statistics_from: 1.0}
reference: {solver: spectral, shape: [32]}
runs:
  bare: {solver: spectral, shape: [16], dt: 0.1, precision: float64}
  learned:
    {solver: finite_volume, shape: [16], dt: 0.1, precision: float64, corrections: [{use: learned_flux, width: 4, depth: 1}]}
checks: {}
"""
"""Two runs of five chunks of seven frames."""

TRAIN = """\
equation: {use: kuramoto_sivashinsky}
domain: {lengths: [22.0]}
initial: {use: random_waves, warm_up: 2.0}
samples: {count: 2, seed: 3}
time: {end: 1.0, frames: 10}
reference: {solver: spectral, shape: [32]}
runs:
  learned:
    {solver: finite_volume, shape: [16], dt: 0.1, precision: float64, corrections: [{use: learned_flux, width: 4, depth: 1}]}
checks: {}
train:
  run: learned
  data: {trajectories: 3, validation: 2, time: 1.0, validation_time: 0.5, interval: 0.1, shape: [32]}
  unroll: [2]
  updates: [8]
  batch: 2
  validate_every: 2
  seeds: [1, 4]
  average: 0.9
  noise: 0.01
  log: [jsonl]
"""
"""Two trainings with four validations each."""

WIDTHS = "over: {'runs.learned.corrections[0].width': [4, 6]}"

RUNS = RUN + "sweep: {run: learned, " + WIDTHS + "}\n"
"""A sweep of two runs, and the run beside them."""

TRAININGS = TRAIN.replace("[1, 4]", "[1]") + "sweep: {" + WIDTHS + "}\n"
"""A sweep of two trainings."""

BENCH = """\
title: A small benchmark
rounds: 3
resamples: 50
families:
  waves:
    experiment: ks_scores.yaml
    runs: [ps64_bare, ps64_learned_0]
    ladders: {ps64_bare: [72]}
    change:
      samples.count: 2
      time.end: 10
      time.frames: 10
      time.statistics_from: 5
      reference.shape: [128]
      reference.precision: float32
      initial.warm_up: 5
"""
"""Time steps of a ladder tried, three runs, and all of them timed in turn."""

TEXTS = {"run": RUN, "train": TRAIN, "runs": RUNS, "trainings": TRAININGS, "bench": BENCH}
WORDS = {"runs": "run", "trainings": "train"}
"""The command of a sweep."""

TIMINGS = ("seconds", "rate", "_per_second", "date", "cached", "commit", "cpu", "version")


@dataclass
class Command:
    """One command and its uninterrupted result."""

    name: str
    server: Forked
    folder: Path
    done: Done

    @cached_property
    def warm(self) -> Done:
        """The same with a cache that has everything: fewer calls, and fewer seconds."""
        place = self.folder.parent / f"{self.name}-warm"
        self.prepare(place)
        found = self.start(place)
        assert found.code == 0, found.err
        return found

    @property
    def words(self) -> list[str]:
        return [WORDS.get(self.name, self.name), "case.yaml", "--out", "out"]

    @property
    def cache(self) -> Path:
        return self.folder / "cache"

    def prepare(self, place: Path, warm: bool = True) -> None:
        """A folder of its own for a case, with a cache that has everything or nothing."""
        place.mkdir(parents=True)
        (place / "case.yaml").write_text(TEXTS[self.name])
        if warm:
            shutil.copytree(self.cache, place / "cache")

    def start(self, place: Path, *more: str, **options: Any) -> Done:
        return self.server.run([*self.words, *more], place, cache=place / "cache", **options)

    def resume(self, place: Path, **options: Any) -> Done:
        return self.start(place, "--resume", **options)

    def differences(self, place: Path) -> list[str]:
        """What a finished folder has otherwise than the uninterrupted one; empty if it is the same bit for bit."""
        return list(differences(self.folder / "out", place / "out"))

    def unwhole(self, place: Path) -> list[str]:
        """What must not be there after a fault: a visible file in part, or an acknowledged frame with other bits."""
        return [*half_written(place / "out"), *half_written(place / "cache"), *wrong_frames(self.folder / "out", place / "out")]


def _arrays(path: Path) -> dict[str, np.ndarray]:
    return {name: tensor.values for name, tensor in storage._read_tensors(path)[0].items()}


def _same(one: np.ndarray, two: np.ndarray) -> bool:
    return one.dtype == two.dtype and one.shape == two.shape and one.tobytes() == two.tobytes()


def _without_times(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _without_times(v) for k, v in value.items() if not any(t in k for t in TIMINGS)}
    return [_without_times(v) for v in value] if isinstance(value, list) else value


def differences(one: Path, two: Path) -> Iterator[str]:
    names = [{p.relative_to(f).as_posix() for p in f.rglob("*") if p.is_file()} for f in (one, two)]
    if names[0] != names[1]:
        yield f"files: {sorted(names[0] ^ names[1])}"
    for name in sorted(names[0] & names[1]):
        a, b = one / name, two / name
        if name.endswith(".nc"):
            for group in ["", *storage.dataset_groups(a)]:
                first, second = (storage.open_dataset(p, group or None) for p in (a, b))
                if set(first.variables) != set(second.variables):
                    yield f"{name} {group}: other variables"
                for v in set(first.variables) & set(second.variables):
                    timed = name == "bench.nc" and any(t in v for t in (*TIMINGS, "cost"))
                    if not timed and not _same(*(np.asarray(ds[v].values) for ds in (first, second))):
                        yield f"{name} {group}: {v} differs"
        elif name.endswith(".safetensors") and "training/" not in name:
            first, second = _arrays(a), _arrays(b)
            if set(first) != set(second) or not all(_same(first[k], second[k]) for k in first):
                yield f"{name}: other weights"
        elif name.endswith(".jsonl"):
            first, second = ([_without_times(json.loads(line)) for line in p.read_text().splitlines()] for p in (a, b))
            if first != second:
                yield f"{name}: other lines"
        elif name in ("summary.json", "training.json", "config.yaml"):
            first, second = (_without_times(yaml.safe_load(p.read_text())) for p in (a, b))
            if first != second:
                yield f"{name}: other values"


def half_written(folder: Path) -> Iterator[str]:
    """Visible files that are not whole. Hidden ones are nobody's business, and a log ends where it ends."""
    for path in sorted(folder.rglob("*")):
        if not path.is_file() or path.name.startswith(".") or "compiled" in path.parts:
            continue
        try:
            if path.suffix == ".safetensors":
                storage._read_tensors(path)
            elif path.suffix == ".json":
                storage.read_json(path)
            elif path.suffix == ".yaml":
                assert isinstance(yaml.safe_load(path.read_text()), dict)
            elif path.suffix == ".nc":
                for group in ["", *storage.dataset_groups(path)]:
                    storage.open_dataset(path, group or None)
            elif path.suffix == ".html":
                assert path.read_text().rstrip().endswith("</html>")
        except Exception as error:
            yield f"{path.relative_to(folder)}: not whole: {error}"


def wrong_frames(one: Path, two: Path) -> Iterator[str]:
    """Stored frames of an unfinished run that are not those of the finished one."""
    for path in sorted(two.rglob("state/*/frames-*.safetensors")):
        results = one / path.parents[2].relative_to(two)
        label, first = path.parent.name, int(path.stem.partition("-")[2])
        pieces = {k: a for k, a in _arrays(path).items() if k.strip("'[]").endswith("u")}
        stored = np.concatenate([pieces[k] for k in sorted(pieces, key=lambda k: (len(k), k))], axis=1)
        truth = storage.open_dataset(results / f"{label}.nc")["u"].values[:, first + 1 :][:, : stored.shape[1]]
        if not _same(np.ascontiguousarray(stored[:, :, 0]), np.ascontiguousarray(truth)):
            yield f"{path.relative_to(two)}: other frames than those of the uninterrupted run"


def leftovers(folder: Path) -> list[str]:
    return [str(p.relative_to(folder)) for p in folder.rglob("*.part")]


def make_command(name: str, server: Forked, folder: Path) -> Command:
    """The command, run once without a fault."""
    folder.mkdir()
    (folder / "case.yaml").write_text(TEXTS[name])
    command = Command(name, server, folder, Done(0, "", ""))
    command.done = command.start(folder)
    assert command.done.code == 0, command.done.err
    return command


def complaint(done: Done) -> str:
    """What is wrong with how a command refused: it must be one line on stderr with a path and what to do, and no traceback."""
    if done.code == 0:
        return "exit code 0"
    if "Traceback" in done.err:
        return f"a traceback: {done.err.strip().splitlines()[-1]}"
    lines = [line for line in done.err.splitlines() if line.startswith("hybridsim: ")]
    if len(lines) != 1:
        return f"{len(lines)} lines: {done.err!r}"
    if not ("/" in lines[0] or "out" in lines[0]) or "; " not in lines[0].replace(": ", "; "):
        return f"no path or remedy: {lines[0]}"
    return ""
