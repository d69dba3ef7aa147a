"""(s, n) → u⁽ˢ⁾(tₙ … tₙ₊ₗ): pieces of fine trajectories, in memory or read lazily from Zarr, and fetched ahead."""

import hashlib
import json
import shutil
import threading
import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Float, Int

from hybridsim import storage

CHUNK_BYTES = 2**22
"""Frames of one trajectory are stored in chunks of about this size: what a window reads beyond its own frames stays small."""

AHEAD = 2
"""Updates whose windows are fetched before they are asked for."""


@runtime_checkable
class Windows(Protocol):
    """Trajectories `(trajectory, frame, c, *grid)` of which a training reads pieces."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    @property
    def dtype(self) -> np.dtype: ...

    def read(self, trajectory: int, start: int, stop: int) -> Float[np.ndarray, "frame c *grid"]:
        """Frames `start` to `stop` (not included) of one trajectory."""
        ...


class InMemory:
    """Windows of an array `(trajectory, frame, c, *grid)`."""

    def __init__(self, data: Float[np.ndarray, "trajectory frame c *grid"]):
        self.data = data

    @property
    def shape(self) -> tuple[int, ...]:
        return self.data.shape

    @property
    def dtype(self) -> np.dtype:
        return self.data.dtype

    def read(self, trajectory: int, start: int, stop: int) -> Float[np.ndarray, "frame c *grid"]:
        return self.data[trajectory, start:stop]


_CODECS = {"bytes", "blosc", "crc32c"}
"""Codecs of the arrays that `write_zarr` makes; there are others that run what they read."""


def _check_zarr(folder: Path) -> None:
    """Refuses an array that `write_zarr` did not make, from its metadata alone."""
    try:
        about = storage.read_json(folder / "zarr.json")
        codecs = [codec["name"] for codec in about["codecs"]]
        known = about["zarr_format"] == 3 and about["node_type"] == "array" and about["data_type"] in ("float32", "float64")
        known = known and about["chunk_grid"]["configuration"]["chunk_shape"][0] == 1 and not about.get("storage_transformers")
        odd = sorted(set(codecs) - _CODECS)
    except (storage.StorageError, KeyError, TypeError, IndexError) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise storage.CorruptError(f"{folder}: no Zarr array can be read there: {reason}") from error
    if odd or not known:
        what = f"its codec {odd[0]!r} is not ours" if odd else "hybridsim did not make it"
        raise storage.CorruptError(f"{folder}: this array is not read, {what}; remove the folder, and it is made anew")


class Zarr:
    """Windows of a Zarr array on disk: only the chunks that hold a window are read, and each is verified by its checksum.

    **Arguments:** `folder`, as `write_zarr` made it; `keep`: how many chunks stay in memory.
    """

    def __init__(self, folder: Path, keep: int = 64):
        import zarr

        self.folder = folder
        _check_zarr(folder)
        try:
            self.array: Any = zarr.open_array(str(folder), mode="r")
        except Exception as error:
            raise storage.CorruptError(f"{folder}: no Zarr array can be read there: {error}") from error
        self._chunks: OrderedDict[tuple[int, int], np.ndarray] = OrderedDict()
        self._keep = keep

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.array.shape)

    @property
    def dtype(self) -> np.dtype:
        return np.dtype(self.array.dtype)

    def _chunk(self, trajectory: int, number: int) -> np.ndarray:
        at = (trajectory, number)
        if at not in self._chunks:
            length = self.array.chunks[1]
            try:
                found = np.asarray(self.array[trajectory, number * length : (number + 1) * length])
            except Exception as error:
                raise storage.CorruptError(
                    f"{self.folder}: trajectory {trajectory} is damaged ({error}); remove the folder, and it is made anew"
                ) from error
            self._chunks[at] = found
            while len(self._chunks) > self._keep:
                self._chunks.popitem(last=False)
        self._chunks.move_to_end(at)
        return self._chunks[at]

    def read(self, trajectory: int, start: int, stop: int) -> Float[np.ndarray, "frame c *grid"]:
        length = self.array.chunks[1]
        numbers = range(start // length, (stop - 1) // length + 1)
        frames = np.concatenate([self._chunk(trajectory, n) for n in numbers])
        return frames[start - numbers[0] * length : stop - numbers[0] * length]


def zarr_folder(recipe: dict[str, Any], dtype: Any) -> Path:
    """Where the cache keeps the Zarr array of a recipe."""
    return storage.cache_folder() / "training" / f"{storage.recipe_hash(recipe, dtype)}.zarr"


def write_zarr(
    folder: Path,
    shape: Sequence[int],
    dtype: Any,
    pieces: Iterable[tuple[int, Callable[[], Float[np.ndarray, "some frame c *grid"]]]],
) -> Zarr:
    """The Zarr array in `folder`, written piece by piece where it is not there yet.

    **Arguments:**

    - `shape`, `dtype`: `(trajectory, frame, c, *grid)` of the whole.
    - `pieces`: the first trajectory of each piece, and a function that makes it; pieces that an earlier, interrupted call has
      finished are not made again.

    Chunks carry a CRC-32C checksum. The folder gets its name once everything is in it; one process makes it at a time.
    """
    if not folder.exists():
        making = folder.with_suffix(".making")
        with storage.FolderLock(making, shared=True):
            if not folder.exists():
                _write_pieces(folder, shape, dtype, pieces)
        shutil.rmtree(making, ignore_errors=True)
    return Zarr(folder)


def _write_pieces(folder: Path, shape: Sequence[int], dtype: Any, pieces: Iterable[tuple[int, Callable[[], np.ndarray]]]) -> None:
    import zarr
    from zarr.codecs import BloscCodec, Crc32cCodec

    partial = folder.with_suffix(".partial")
    notes = partial / "finished.json"
    frame = int(np.prod(shape[2:])) * np.dtype(dtype).itemsize
    chunks = (1, max(1, min(shape[1], CHUNK_BYTES // frame)), *shape[2:])
    try:
        if not notes.exists():
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
            storage.write_json(notes, [])
        finished = set(storage.read_json(notes))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of codecs whose specification is not final
            if finished:
                array: Any = zarr.open_array(str(partial / "array"), mode="r+")
            else:
                array = zarr.create_array(
                    store=str(partial / "array"),
                    shape=tuple(shape),
                    dtype=np.dtype(dtype).name,
                    chunks=chunks,
                    compressors=[BloscCodec(cname="zstd", clevel=1, shuffle="bitshuffle"), Crc32cCodec()],
                    overwrite=True,
                )
        for first, make in pieces:
            if first in finished:
                continue
            values = make()
            array[first : first + len(values)] = values
            finished.add(first)
            storage.write_json(notes, sorted(finished))
        (partial / "array").rename(folder)
        shutil.rmtree(partial, ignore_errors=True)
    except OSError as error:
        raise storage.StorageError(
            f"{folder}: cannot be written: {error.strerror or error}; choose another HYBRIDSIM_CACHE"
        ) from error


def drawn(
    shape: Sequence[int], length: int, size: int, seed: int, update: int, task: int = 0
) -> tuple[Int[np.ndarray, " window"], Int[np.ndarray, " window"]]:
    """(trajectory, first frame) of the windows of one update: of (seed, update) alone, so that a resumed run sees the same ones."""
    rng = np.random.default_rng([seed, update] if task == 0 else [seed, update, task])
    return rng.integers(shape[0], size=size), rng.integers(shape[1] - length, size=size)


def batch(
    windows: Windows, length: int, size: int, seed: int, update: int, task: int = 0
) -> Float[np.ndarray, "window frame c *grid"]:
    """`size` windows of `length` + 1 frames for one update."""
    found = zip(*drawn(windows.shape, length, size, seed, update, task), strict=True)
    return np.stack([windows.read(int(i), int(s), int(s) + length + 1) for i, s in found])


class Prefetch:
    """make(n), made ahead of time by one thread: what update n + 1 needs is fetched while update n computes.

    **Arguments:** `make`, a function of the number of the update, called for each in turn; `stop`, the number after the last one.
    """

    def __init__(self, make: Callable[[int], Any], stop: int):
        self._make, self._stop = make, stop
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="windows")
        self._coming: dict[int, Future] = {}
        self._lock = threading.Lock()

    def __call__(self, update: int) -> Any:
        with self._lock:
            for n in range(update, min(update + 1 + AHEAD, self._stop)):
                if n not in self._coming:
                    self._coming[n] = self._pool.submit(self._make, n)
            found = self._coming.pop(update)
        return found.result()

    def __enter__(self) -> "Prefetch":
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown(cancel_futures=True)


def digest_of(windows: Windows, count: int = 4) -> str:
    """A digest of shape, dtype and a few frames: what a resumed training compares to know that its data are the same."""
    shape = windows.shape
    digest = hashlib.sha256(json.dumps([list(shape), windows.dtype.name]).encode())
    for i in np.unique(np.linspace(0, shape[0] - 1, count).round().astype(int)):
        digest.update(np.ascontiguousarray(windows.read(int(i), shape[1] - 1, shape[1])).tobytes())
    return digest.hexdigest()
