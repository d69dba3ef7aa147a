"""What a long command says while it works: a bar on a terminal, plain lines elsewhere, and both in log.txt."""

import contextlib
import errno
import os
import time
from pathlib import Path
from types import TracebackType
from typing import IO, TYPE_CHECKING, Any, cast

if TYPE_CHECKING:
    from rich.console import Console


GONE = (errno.EPIPE, errno.EIO, errno.EBADF)
"""Errors of a stream that nobody will read again."""


class _Patient:
    """A stream whose reader may go away, as a closed terminal does: what is written from then on goes nowhere, and nothing ends."""

    def __init__(self, stream: Any):
        self.stream = stream

    def write(self, text: str) -> int:
        try:
            return self.stream.write(text)
        except OSError as error:
            self._give_up(error)
            return len(text)

    def flush(self) -> None:
        try:
            self.stream.flush()
        except OSError as error:
            self._give_up(error)

    def _give_up(self, error: OSError) -> None:
        if error.errno not in GONE:  # a full pipe or disk may have room again
            return
        # what the stream still holds has to go somewhere when the process ends
        with contextlib.suppress(OSError, ValueError):
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self.stream.fileno())
            os.close(nowhere)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)


class Reporter:
    """Lines and one progress bar. Progress costs nothing inside compiled code: it is told between chunks.

    A terminal that is closed, or a pipe that nobody reads any more, ends no computation, and the log goes on.
    """

    def __init__(self, console: "Console", log: Path | None = None):
        self.console = console
        self._stream = _Patient(console.file)
        self.log = log
        self._bar: Any = None
        self._task: Any = None
        self._what = ""
        self._last = -1.0
        self._file: Any = None

    def __enter__(self) -> "Reporter":
        if self.log is not None:
            from hybridsim.storage import open_log

            self._file = open_log(self.log)
        self.console.file = cast(IO[str], self._stream)
        if self.console.is_terminal:
            from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

            self._bar = Progress(
                TextColumn("{task.description:<28}"),
                BarColumn(),
                TextColumn("{task.percentage:>3.0f} %"),
                TimeElapsedColumn(),
                TextColumn("left"),
                TimeRemainingColumn(),
                TextColumn("{task.fields[note]}"),
                console=self.console,
                transient=True,
            )
            self._bar.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None) -> None:
        if self._bar is not None:
            self._bar.stop()
        if self._file is not None:
            with contextlib.suppress(OSError):
                self._file.close()
        self.console.file = self._stream.stream

    def line(self, text: str) -> None:
        """One line that stays."""
        self._finish()
        self.console.print(text, markup=False)
        self._write(text)

    def progress(self, what: str, fraction: float, note: str = "") -> None:
        """`what` is `fraction` done: on a terminal the bar moves, elsewhere and in the log every quarter is a line."""
        if what != self._what or fraction - self._last >= 0.25 or (fraction >= 1.0 and self._last < 1.0):
            text = f"{what}: {100 * fraction:.0f} %" + (f"  {note}" if note else "")
            self._write(text)
            if self._bar is None:
                self.console.print(text, markup=False)
            self._last = fraction
        if self._bar is not None:
            if what != self._what or self._task is None:
                self._finish()
                self._task = self._bar.add_task(what, total=1.0, note=note)
            self._bar.update(self._task, completed=fraction, note=note)
        self._what = what

    def _finish(self) -> None:
        if self._bar is not None and self._task is not None:
            self._bar.remove_task(self._task)
        self._task, self._what, self._last = None, "", -1.0

    def _write(self, text: str) -> None:
        """To the log; one that cannot be written ends no computation."""
        if self._file is None:
            return
        try:
            self._file.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {text}\n")
            self._file.flush()
        except OSError as error:
            file, self._file = self._file, None
            with contextlib.suppress(OSError):
                file.close()
            self.console.print(f"{self.log}: cannot write ({error.strerror}); going on without a log", markup=False)
