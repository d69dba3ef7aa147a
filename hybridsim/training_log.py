"""Where the records of a training go: lines of JSON, or TensorBoard."""

import contextlib
import importlib
import json
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from hybridsim import storage
from hybridsim.yaml_reader import ConfigError


@runtime_checkable
class Log(Protocol):
    """Takes a record after every update; see `hybridsim.train.train`."""

    def write(self, record: Mapping[str, Any]) -> None: ...

    def close(self) -> None: ...


class JsonLines:
    """One JSON object per update in the file at `path`; a training that goes on from update n drops what came after n."""

    def __init__(self, path: Path):
        self._path = path
        self._file: Any = None

    def write(self, record: Mapping[str, Any]) -> None:
        if self._file is None:
            self._keep_before(record["update"])
            self._file = storage.open_log(self._path)
        try:
            self._file.write(json.dumps(record, separators=(",", ":")) + "\n")
            self._file.flush()
        except OSError as error:
            raise storage.StorageError(
                f"{self._path}: cannot write ({error.strerror}): free some space and go on with --resume, or leave train.log out"
            ) from error

    def _keep_before(self, update: int) -> None:
        kept = []
        if self._path.exists():
            for line in self._path.read_text(encoding="utf-8").splitlines():
                try:
                    if json.loads(line)["update"] < update:
                        kept.append(line + "\n")
                except (ValueError, KeyError, TypeError):
                    break  # the last line of a training that was killed
        storage.atomic_write(self._path, "".join(kept))

    def close(self) -> None:
        if self._file is not None:
            with contextlib.suppress(OSError):
                self._file.close()
            self._file = None


class TensorBoard:
    """Scalars for TensorBoard in the folder at `path`: what the record holds, under the same names.

    Needs the package `tensorboard` (`pip install hybridsim[tensorboard]`).
    """

    def __init__(self, path: Path):
        try:
            # by name, since a type checker finds nothing in what protobuf makes as it is imported
            events = importlib.import_module("tensorboard.compat.proto.event_pb2")
            summaries = importlib.import_module("tensorboard.compat.proto.summary_pb2")
            writers = importlib.import_module("tensorboard.summary.writer.event_file_writer")
        except ImportError:
            raise ConfigError("train.log: tensorboard is not installed; pip install 'hybridsim[tensorboard]'") from None
        self._events: Any = events
        self._summaries: Any = summaries
        self._writer: Any = writers.EventFileWriter(str(path))
        self._begun = False

    def write(self, record: Mapping[str, Any]) -> None:
        event, summary = self._events.Event, self._summaries.Summary
        step = int(record["update"])
        if not self._begun:
            # TensorBoard forgets what an interrupted training wrote from here on
            start = self._events.SessionLog(status=self._events.SessionLog.START)
            self._writer.add_event(event(wall_time=time.time(), step=step, session_log=start))
            self._begun = True
        values = [summary.Value(tag=tag, simple_value=value) for tag, value in _scalars(record)]
        self._writer.add_event(event(wall_time=time.time(), step=step, summary=summary(value=values)))

    def close(self) -> None:
        self._writer.close()


def _scalars(record: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, float]]:
    for name, value in record.items():
        if isinstance(value, Mapping):
            yield from _scalars(value, f"{prefix}{name}/")
        elif isinstance(value, int | float) and name != "update":
            yield prefix + name, float(value)


def open_log(kind: str, folder: Path, name: str) -> Log:
    """The log `kind` of one training, `name`, in `folder`."""
    return JsonLines(folder / f"{name}.jsonl") if kind == "jsonl" else TensorBoard(folder / "tensorboard" / name)
