"""Frames in pieces and the state that goes with them: what a long computation has finished, safe on disk.

A checkpoint alone lets a computation go on; what it has shown until then must be kept too. A `Journal` writes the frames since the
last time as one file and then the state, so that every state on disk stands for frames that are on disk. Saving is bounded by the
clock: every few seconds, and never for more than a small share of the time. The clock decides what is saved, not what is computed.
"""

import shutil
import time
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from hybridsim import storage
from hybridsim.signals import STOP

SAVE_EVERY = 10.0
"""Seconds between two states that are saved, unless a save costs too much for that."""

SHARE = 0.02
"""The part of a computation's time that saving may take."""


class Cadence:
    """Says when the next state is due: `every` seconds after the last one, and so rarely that saving takes `SHARE` of the time.

    With `every=0` every state is due; a SIGUSR1 makes the next one due.
    """

    def __init__(self, every: float = SAVE_EVERY):
        if not every >= 0:
            raise ValueError(f"every: {every} seconds; 0 or more are possible")
        self.every = every
        self._last = time.monotonic()
        self._cost = 0.0

    def due(self) -> bool:
        """Whether to save now; a request by signal is answered by that."""
        return STOP.asked_to_save() or self.has_waited()

    def has_waited(self) -> bool:
        """Whether the clock says so."""
        wait = max(self.every, self._cost / SHARE) if self.every else 0.0
        return time.monotonic() - self._last >= wait

    def saved(self, seconds: float) -> None:
        """Notes that a state was saved just now, and what that took."""
        self._last, self._cost = time.monotonic(), seconds


class Journal:
    """Pieces of frames and checkpoints of one computation.

    **Arguments:**

    - `folder`: where they live; None keeps the pieces in memory only, and nothing is ever due. One writer at a time.
    - `every`: seconds between two saves (see `Cadence`).
    - `about`: what made it, for the manifests of the checkpoints.
    - `forgiving`: what cannot be read is made anew and what cannot be written costs a warning: right for a cache.

    `pieces` are all that were added or read, in order: names and arrays, as the caller chose them.
    """

    def __init__(
        self, folder: Path | None, every: float = SAVE_EVERY, about: Mapping[str, Any] | None = None, *, forgiving: bool = False
    ):
        self.folder, self.forgiving = folder, forgiving
        self.pieces: list[dict[str, np.ndarray]] = []
        self._cadence = Cadence(every)
        self._checkpoints = None if folder is None else storage.Checkpoints(folder / "checkpoints", about=about)
        self._written, self._step = 0, 0  # pieces on disk, and the step up to which they go

    def latest(self, like: Any) -> tuple[int, Any, dict[str, Any]] | None:
        """(step, state, notes) of the newest checkpoint whose pieces are whole too, and the pieces; None where there is none.

        What is damaged is passed over for the one before, with a `StorageWarning`.
        """
        if self._checkpoints is None:
            return None
        try:
            found = self._checkpoints.latest(like, also=self.read_pieces)
        except storage.StorageError as error:
            if not self.forgiving:
                raise
            warnings.warn(f"{error}; making it anew", storage.StorageWarning, stacklevel=2)
            self.clear()
            return None
        if found is None:
            return None
        step, state, meta, pieces = found
        self.pieces, self._written, self._step = pieces, len(pieces), step
        return step, state, meta

    def read_pieces(self, step: int) -> list[dict[str, np.ndarray]]:
        """All pieces up to a step, verified: each file says from where to where it goes, and the next begins there."""
        found: list[dict[str, np.ndarray]] = []
        at = 0
        while at < step:
            path = self._file(at)
            arrays, meta = storage.load_arrays(path)
            if meta.get("from") != at or not at < meta.get("to", 0) <= step:
                raise storage.CorruptError(f"{path}: holds other frames than its name says")
            pieces: list[dict[str, np.ndarray]] = [{} for _ in range(meta["pieces"])]
            for name, array in arrays.items():
                index, _, name = name.partition("/")
                pieces[int(index)][name] = array
            found += pieces
            at = meta["to"]
        return found

    def _file(self, step: int) -> Path:
        assert self.folder is not None
        return self.folder / f"frames-{step:012d}.safetensors"

    def add(self, piece: Mapping[str, np.ndarray]) -> None:
        """Takes what was made since the last piece; it is safe once `save` has returned."""
        self.pieces.append(dict(piece))

    def due(self) -> bool:
        """Whether a state should be saved now; a request by signal is answered by that."""
        return self._checkpoints is not None and self._cadence.due()

    def has_waited(self) -> bool:
        """Whether the clock says that a state should be saved now."""
        return self._checkpoints is not None and self._cadence.has_waited()

    def save(self, step: int, state: Any, meta: Mapping[str, Any] | None = None) -> None:
        """Writes the pieces since the last save, then the state to which they lead; without a folder does nothing."""
        if self._checkpoints is None or step == self._step:
            return
        try:
            self._save(step, state, meta)
        except storage.StorageError as error:
            if not self.forgiving:
                raise
            warnings.warn(f"{error}; going on without saving", storage.StorageWarning, stacklevel=2)
            self._checkpoints = None

    def _save(self, step: int, state: Any, meta: Mapping[str, Any] | None) -> None:
        assert self._checkpoints is not None
        begin = time.monotonic()
        new = self.pieces[self._written :]
        arrays = {f"{i}/{name}": array for i, piece in enumerate(new) for name, array in piece.items()}
        storage.save_tree(self._file(self._step), arrays, {"from": self._step, "to": step, "pieces": len(new)})
        self._checkpoints.save(step, state, meta)
        self._written, self._step = len(self.pieces), step
        self._cadence.saved(time.monotonic() - begin)

    def clear(self) -> None:
        """Removes everything from disk and memory."""
        self.pieces, self._written, self._step = [], 0, 0
        if self.folder is not None:
            shutil.rmtree(self.folder, ignore_errors=True)
