"""Ctrl-C, SIGTERM and SIGUSR1 as questions that a run asks between chunks: am I to stop, am I to save now?"""

import contextlib
import os
import signal
import sys
import threading
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

    Nothing is interrupted in the middle of a chunk. Python learns of a signal only when compiled code has returned; so that a
    second Ctrl-C does not wait for that, a thread listens too, and ends the process where it stands. What is saved is safe: files
    are replaced whole, and locks go with their process.
    """

    def __init__(self):
        self.requested: int | None = None
        self.wants_save = False
        self._watched = False

    def check(self) -> None:
        """Raise `Interrupted` if a stop was requested; call it where the state is saved."""
        if self.requested is not None:
            raise Interrupted(self.requested)

    def asked_to_save(self) -> bool:
        """Whether a save was asked for since the last answer; one that is asked for from now on waits for the next."""
        asked, self.wants_save = self.wants_save, False
        return asked

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if self.requested is not None and number == signal.SIGINT and not self._watched:
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
            with self._watching():
                yield self
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    @contextlib.contextmanager
    def _watching(self) -> Iterator[None]:
        """Another thread hears of every signal at once, by way of a pipe."""
        ours = threading.current_thread() is threading.main_thread() and os.name == "posix"
        if not ours:
            yield
            return
        ear, mouth = os.pipe()
        os.set_blocking(mouth, False)
        before = signal.set_wakeup_fd(mouth, warn_on_full_buffer=False)
        thread = threading.Thread(target=self._listen, args=(ear,), name="signals", daemon=True)
        thread.start()
        self._watched = True
        try:
            yield
        finally:
            self._watched = False
            signal.set_wakeup_fd(before)
            os.close(mouth)
            thread.join()
            os.close(ear)

    def _listen(self, ear: int) -> None:
        asked = False
        while numbers := os.read(ear, 64):
            for number in numbers:
                if asked and number == signal.SIGINT:
                    _end_at_once()
                if number in (signal.SIGINT, signal.SIGTERM) and not asked:
                    asked = True
                    _say("stopping as soon as the state is saved; Ctrl-C again stops at once")


def _say(text: str) -> None:
    """To a terminal, past everything that the main thread may hold."""
    with contextlib.suppress(OSError):
        if os.isatty(2):
            os.write(2, f"\r\x1b[Khybridsim: {text}\n".encode())


def _end_at_once() -> None:
    with contextlib.suppress(OSError):
        if os.isatty(1):
            os.write(1, b"\x1b[?25h")  # a progress bar hides the cursor
    _say("stopped at once; --resume goes on from the state that was saved last")
    os._exit(128 + signal.SIGINT)


STOP = Stop()
"""The one request of this process."""
