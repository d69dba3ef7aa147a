"""Ctrl-C, SIGTERM and SIGUSR1 as questions that a run asks between chunks: am I to stop, am I to save now?"""

import contextlib
import signal
import sys
from collections.abc import Iterator
from types import FrameType


class Interrupted(BaseException):
    """A run that was asked to stop, has saved its state and goes away; `signal` says which signal asked."""

    def __init__(self, number: int):
        super().__init__(signal.Signals(number).name)
        self.signal = number

    @property
    def exit_code(self) -> int:
        """128 + signal: 130 for Ctrl-C, 143 for SIGTERM, 129 for a closed terminal."""
        return 128 + self.signal


class Stop:
    """The request to stop: `requested` is the signal's number, or None; `wants_save`: save now and go on (SIGUSR1).

    Nothing is interrupted in the middle of a chunk; a second Ctrl-C does not wait for the end of it.
    """

    def __init__(self):
        self.requested: int | None = None
        self.wants_save = False

    def check(self) -> None:
        """Raise `Interrupted` if a stop was requested; call it where the state is saved."""
        if self.requested is not None:
            raise Interrupted(self.requested)

    def asked_to_save(self) -> bool:
        """Whether a save was asked for since the last answer; one that is asked for from now on waits for the next."""
        asked, self.wants_save = self.wants_save, False
        return asked

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if self.requested is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.requested = number

    def _receive_save(self, number: int, frame: FrameType | None) -> None:
        self.wants_save = True

    @contextlib.contextmanager
    def listening(self) -> Iterator["Stop"]:
        """Take the signals for as long as the block lasts: SIGINT, SIGTERM and SIGHUP (the terminal was closed) ask for a stop,
        SIGUSR1 for a save. Only the main thread may; elsewhere nothing is taken."""
        self.requested, self.wants_save = None, False
        receivers = {signal.SIGINT: self._receive, signal.SIGTERM: self._receive}
        if sys.platform != "win32":
            receivers[signal.SIGUSR1] = self._receive_save
            if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:  # nohup means it
                receivers[signal.SIGHUP] = self._receive
        before = {}
        try:
            for number, receiver in receivers.items():
                # other threads may not set handlers
                with contextlib.suppress(ValueError):
                    before[number] = signal.signal(number, receiver)
            yield self
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


STOP = Stop()
"""The one request of this process."""
