"""Ctrl-C and SIGTERM as a question that a run asks between chunks: has anyone asked me to stop?"""

import contextlib
import signal
from collections.abc import Iterator
from types import FrameType


class Interrupted(BaseException):
    """A run that was asked to stop, has saved its state and goes away; `signal` says which signal asked."""

    def __init__(self, number: int):
        super().__init__(signal.Signals(number).name)
        self.signal = number

    @property
    def exit_code(self) -> int:
        """128 + signal: 130 for Ctrl-C, 143 for SIGTERM."""
        return 128 + self.signal


class Stop:
    """The request to stop: `requested` is the signal's number, or None.

    Nothing is interrupted in the middle of a chunk; a second Ctrl-C does not wait for the end of it.
    """

    def __init__(self):
        self.requested: int | None = None

    def check(self) -> None:
        """Raise `Interrupted` if a stop was requested; call it where the state is saved."""
        if self.requested is not None:
            raise Interrupted(self.requested)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if self.requested is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.requested = number

    @contextlib.contextmanager
    def listening(self) -> Iterator["Stop"]:
        """Take SIGINT and SIGTERM for as long as the block lasts (main thread only; elsewhere nothing is taken)."""
        self.requested = None
        before = {}
        try:
            for number in (signal.SIGINT, signal.SIGTERM):
                # other threads may not set handlers
                with contextlib.suppress(ValueError):
                    before[number] = signal.signal(number, self._receive)
            yield self
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


STOP = Stop()
"""The one request of this process."""
