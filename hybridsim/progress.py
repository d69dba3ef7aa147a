"""What a long command says while it works: a bar on a terminal, plain lines elsewhere, and both in log.txt."""

import contextlib
import time
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console


class Reporter:
    """Lines and one progress bar. Progress costs nothing inside compiled code: it is told between chunks."""

    def __init__(self, console: "Console", log: Path | None = None):
        self.console = console
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
            self._file.close()

    def line(self, text: str) -> None:
        """One line that stays."""
        self._finish()
        self._print(text)
        self._write(text)

    def progress(self, what: str, fraction: float, note: str = "") -> None:
        """`what` is `fraction` done: on a terminal the bar moves, elsewhere and in the log every quarter is a line."""
        if what != self._what or fraction - self._last >= 0.25 or (fraction >= 1.0 and self._last < 1.0):
            text = f"{what}: {100 * fraction:.0f} %" + (f"  {note}" if note else "")
            self._write(text)
            if self._bar is None:
                self._print(text)
            self._last = fraction
        if self._bar is not None:
            if what != self._what or self._task is None:
                self._finish()
                self._task = self._bar.add_task(what, total=1.0, note=note)
            self._bar.update(self._task, completed=fraction, note=note)
        self._what = what

    def _print(self, text: str) -> None:
        """To the console, for as long as someone is there: a closed terminal ends no computation, and the log goes on."""
        try:
            self.console.print(text, markup=False)
        except OSError:
            self.console = _silent()

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
            self._print(f"{self.log}: cannot write ({error.strerror}); going on without a log")


def _silent() -> "Console":
    """A console that nobody reads."""
    import io

    from rich.console import Console

    return Console(file=io.StringIO())
