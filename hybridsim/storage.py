"""The one way to write and read: temporary name → fsync → atomic replace; SHA-256 checked before anything is used.

Every file of hybridsim goes through this module. A reader sees the old file or the new one, never a part of either, whatever
kills the writer and whenever. Arrays travel as safetensors (key paths as names, complex numbers as real pairs, a digest of the
whole file in its header), fields as NetCDF-4, everything else as JSON; nothing read here can run code. What cannot be written or
trusted is refused with one sentence (`StorageError`). JAX and xarray are imported when they are first needed.
"""

import contextlib
import datetime
import errno
import functools
import hashlib
import importlib.metadata
import importlib.util
import io
import itertools
import json
import math
import os
import platform
import re
import secrets
import shutil
import socket
import stat
import string
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, NamedTuple, TypeVar, overload

import numpy as np

if TYPE_CHECKING:
    import xarray as xr

T = TypeVar("T")

FORMAT = "hybridsim tensors 1"
GIB = 2**30
LONGEST_HEADER = 16 * 2**20
"""A safetensors header names arrays; no honest one of ours comes near 16 MiB."""
LONGEST_JSON = 32 * 2**20
MOST_JSON_VALUES = 690_000
"""Every value of a JSON text takes a hundred bytes or more once it is read."""


class StorageError(Exception):
    """What could not be written, read or trusted: one sentence with the path and the way out."""


class CorruptError(StorageError):
    """A file whose content is not what was written."""


class LockedError(StorageError):
    """A folder that another process is using."""


class StorageWarning(UserWarning):
    """Something stored was passed over, and hybridsim went on without it."""


# --- atomic writing ------------------------------------------------------------------------------------------------------------

_REMEDIES = {
    errno.ENOSPC: "the disk is full; free some space or choose another folder",
    errno.EDQUOT: "your disk quota is used up; free some space or choose another folder",
    errno.EFBIG: "the file would exceed the allowed file size; raise the limit (ulimit -f) or store fewer frames",
    errno.EACCES: "permission denied; choose a folder that you may write to, or change its permissions",
    errno.EPERM: "permission denied; choose a folder that you may write to, or change its permissions",
    errno.EROFS: "the file system is read-only; choose another folder",
    errno.EIO: "the device reported an error; check the disk, then run again",
    errno.ENOENT: "there is no such file; check the path",
    errno.ENOTDIR: "a part of the path is a file; choose another folder",
    errno.EISDIR: "there is a folder of this name; choose another name",
    errno.ENAMETOOLONG: "the name is too long; choose a shorter one",
    errno.ELOOP: "a symbolic link stands there; remove it or choose another folder",
    errno.EMFILE: "too many files are open; raise the limit (ulimit -n)",
}


def _refusal(path: Path, action: str, error: OSError) -> StorageError:
    remedy = _REMEDIES.get(error.errno or 0, "run again, or choose another folder")
    reason = error.strerror or " ".join(str(error).split()) or type(error).__name__
    return StorageError(f"{path}: cannot {action} ({reason}): {remedy}")


def _sync(path: Path, flags: int) -> None:
    handle = os.open(path, flags)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


_OWNED: list[Path] = []
"""Folders whose lock this process holds: what is written below them stays below them, whatever symbolic links say."""


def _stay_inside(path: Path) -> None:
    """Refuses to write through a symbolic link that leads out of a locked folder."""
    absolute = Path(os.path.abspath(path))  # noqa: PTH100 -- links are to be seen, not followed
    for root in _OWNED:
        if absolute.is_relative_to(root) and not absolute.parent.resolve().is_relative_to(root.resolve()):
            raise StorageError(f"{path}: a symbolic link leads out of {root}; remove the link or choose another folder")


@contextlib.contextmanager
def atomic_path(path: str | os.PathLike) -> Iterator[Path]:
    """A temporary path beside `path` that takes its place, whole and synced to disk, when the block ends without an error.

    On any error, an interrupt included, the temporary file is removed and the old file stays as it was. Missing folders are made.
    A symbolic link at `path` itself is replaced, never followed; below a locked folder (see `FolderLock`) no link leads out of it.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}-{secrets.token_hex(4)}.part")
    try:
        _stay_inside(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        # 0o666 less the umask, as an ordinary open would do
        os.close(os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
        yield temporary
        _sync(temporary, os.O_RDWR)
        os.replace(temporary, path)  # noqa: PTH105
        if os.name == "posix":
            _sync(path.parent, os.O_RDONLY)
    except OSError as error:
        raise _refusal(path, "write", error) from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()


def _write_parts(path: str | os.PathLike, parts: Iterable[Any]) -> None:
    with atomic_path(path) as temporary:
        size = 0
        with temporary.open("wb") as handle:
            for part in parts:
                handle.write(part)
                size += len(part)
        if temporary.stat().st_size != size:
            raise OSError(errno.EIO, "the file came out short")


def atomic_write(path: str | os.PathLike, data: bytes | str) -> None:
    """Write a whole file: readers see the old content or the new, never a part. Text is stored as UTF-8."""
    _write_parts(path, [data.encode() if isinstance(data, str) else data])


def _regular(path: Path) -> io.BufferedReader:
    """The file, opened for reading; a pipe or a device, which may have no end or never answer, is refused."""
    if path.exists() and not path.is_dir() and not path.is_file():
        raise StorageError(f"{path}: a pipe or a device, not a file")
    return path.open("rb")


def _read(path: Path, limit: int | None = None) -> bytearray:
    try:
        with _regular(path) as handle:
            size = os.fstat(handle.fileno()).st_size
            if limit is not None and size > limit:
                raise StorageError(f"{path}: {size / 2**20:.0f} MiB; at most {limit / 2**20:.0f} MiB are read")
            data = bytearray(size)
            if handle.readinto(data) != size:
                raise CorruptError(f"{path}: the file changed while it was read; read it again")
            return data
    except OSError as error:
        raise _refusal(path, "read", error) from error


def open_log(path: str | os.PathLike) -> IO[str]:
    """A text file to append lines to: the one kind of file that grows in place. No symbolic link is followed."""
    path = Path(path)
    _stay_inside(path)
    try:
        handle = os.open(path, os.O_CREAT | os.O_APPEND | os.O_WRONLY | getattr(os, "O_NOFOLLOW", 0), 0o666)
    except OSError as error:
        raise _refusal(path, "write", error) from error
    return open(handle, "a", encoding="utf-8")  # noqa: PTH123


_LEFTOVER = re.compile(r"\..+\.([0-9]+)-[0-9a-f]+\.part")


def is_leftover(name: str) -> bool:
    """Whether a file or folder of this name is what a killed writer leaves behind."""
    return _LEFTOVER.fullmatch(name) is not None


def _is_at_work(name: str) -> bool:
    """Whether the process that a temporary name carries is another one that lives on this machine."""
    found = _LEFTOVER.fullmatch(name)
    if found is None or int(found[1]) == os.getpid() or os.name != "posix":
        return False
    try:
        os.kill(int(found[1]), 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        return True
    return True


def remove_leftovers(folder: str | os.PathLike, older_than: float = 0.0) -> None:
    """Remove temporary files that a killed writer left below `folder`, if they are `older_than` seconds old.

    Only the owner of the folder (see `FolderLock`) may call this with `older_than=0`; a folder below may have an owner of its own,
    so what a living process is writing stays.
    """
    for path in [path for path in Path(folder).rglob(".*.part") if is_leftover(path.name) and not _is_at_work(path.name)]:
        with contextlib.suppress(OSError):
            found = path.lstat()
            if time.time() - found.st_mtime >= older_than:
                shutil.rmtree(path) if stat.S_ISDIR(found.st_mode) else path.unlink()


def check_removable(folder: str | os.PathLike, marker: str | os.PathLike) -> None:
    """Raises `StorageError` where `remove_folder` would refuse: the folder holds something, and not hybridsim made it."""
    folder = Path(folder)
    _stay_inside(folder)
    try:
        foreign = folder.exists() and not folder.is_symlink() and not Path(marker).is_file() and any(folder.iterdir())
    except OSError as error:
        raise _refusal(folder, "read", error) from error
    if foreign:
        raise StorageError(f"{folder}: hybridsim did not make this folder and would have to empty it; choose another --out")


def remove_folder(folder: str | os.PathLike, marker: str | os.PathLike) -> None:
    """Remove a folder that hybridsim made, at once for every reader: it is renamed first, so that no half of it is ever seen.

    **Arguments:** `folder`, which need not exist; `marker`, the file by which hybridsim knows what it has made. A folder without
    the marker that holds something is somebody else's, and refused.
    """
    folder = Path(folder)
    check_removable(folder, marker)
    try:
        if folder.is_symlink():
            folder.unlink()
        elif folder.exists():
            aside = folder.with_name(f".{folder.name}.{os.getpid()}-{secrets.token_hex(4)}.part")
            folder.rename(aside)
            shutil.rmtree(aside)
    except OSError as error:
        raise _refusal(folder, "remove", error) from error


def remove_file(path: str | os.PathLike) -> None:
    """Remove a file that hybridsim wrote, if it is there; one behind a symbolic link is somebody else's and stays."""
    path = Path(path)
    if path.parent.is_symlink():
        return
    try:
        path.unlink(missing_ok=True)
    except NotADirectoryError:
        return
    except OSError as error:
        raise _refusal(path, "remove", error) from error


def existing_parent(path: str | os.PathLike) -> Path:
    """The path itself, or the nearest folder above it that exists."""
    place = Path(path).absolute()
    while not os.path.exists(place):  # noqa: PTH110 -- what may not be looked at is not there
        place = place.parent
    return place


def sha256(path: str | os.PathLike) -> str:
    """SHA-256 of a file's bytes, in hexadecimal."""
    path = Path(path)
    try:
        with _regular(path) as handle:
            return hashlib.file_digest(handle, "sha256").hexdigest()
    except OSError as error:
        raise _refusal(path, "read", error) from error


# --- JSON ----------------------------------------------------------------------------------------------------------------------


def to_plain(value: Any, *, null_for_nonfinite: bool = False, where: str = "") -> Any:
    """`value` in JSON's own types: numpy and JAX numbers and arrays become numbers and lists, tuples lists, paths strings.

    NaN and infinity, which JSON does not have, are refused, or become null with `null_for_nonfinite`.

    >>> to_plain({"shape": (64, 64), "t95": float("nan")}, null_for_nonfinite=True)
    {'shape': [64, 64], 't95': None}
    """
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float):
        if math.isfinite(value):
            return float(value)
        if null_for_nonfinite:
            return None
        raise ValueError(f"{where or 'value'}: {value} has no place in JSON")
    if isinstance(value, Mapping):
        for key in value:
            if not isinstance(key, str):
                raise TypeError(f"{where or 'value'}: the key {key!r} is not a string")
        return {
            key: to_plain(item, null_for_nonfinite=null_for_nonfinite, where=f"{where}.{key}".lstrip("."))
            for key, item in value.items()
        }
    if isinstance(value, list | tuple):
        return [
            to_plain(item, null_for_nonfinite=null_for_nonfinite, where=f"{where}[{index}]") for index, item in enumerate(value)
        ]
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if hasattr(value, "tolist") and getattr(getattr(value, "dtype", None), "kind", "") in "biuf":
        return to_plain(value.tolist(), null_for_nonfinite=null_for_nonfinite, where=where)
    raise TypeError(f"{where or 'value'}: {type(value).__name__} cannot be written as JSON")


def write_json(path: str | os.PathLike, value: Any) -> None:
    """Write JSON atomically, keys in their own order; NaN and infinity become null."""
    text = json.dumps(to_plain(value, null_for_nonfinite=True), indent=2, allow_nan=False, ensure_ascii=False)
    atomic_write(path, text + "\n")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a key stands twice")
    return found


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")


def _count_values(data: bytes | bytearray | str, path: str | os.PathLike, what: str, marks: str = ",[{") -> None:
    """Refuses a text with more values than are read. Marks inside of words count, too: honest files have few."""
    count = sum(data.count(mark) if isinstance(data, str) else data.count(mark.encode()) for mark in marks)
    if count > MOST_JSON_VALUES:
        raise CorruptError(f"{path}: not possible as {what} ({count} values or more; at most {MOST_JSON_VALUES} are read)")


def _parse_json(data: bytes | bytearray | str, path: Path, what: str = "JSON", marks: str = ",[{") -> Any:
    _count_values(data, path, what, marks)
    try:
        text = data if isinstance(data, str) else data.decode()
        return json.loads(text, object_pairs_hook=_unique, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        reason = "nested too deeply" if isinstance(error, RecursionError) else " ".join(str(error).split())
        raise CorruptError(f"{path}: not readable as {what} ({reason})") from error


def read_json(path: str | os.PathLike) -> Any:
    """Read strict JSON: no NaN, no key twice, 32 MiB and `MOST_JSON_VALUES` at most."""
    path = Path(path)
    return _parse_json(_read(path, LONGEST_JSON), path)


# --- arrays: safetensors with a digest -------------------------------------------------------------------------------------------
#
# 8 bytes: length n of the header, little-endian · n bytes: JSON header, padded with spaces · the arrays, one after the other.
# The header begins {"__metadata__":{"sha256":"<64 digits>", so the digest has a fixed place; it is the SHA-256 of the whole file
# with zeros in that place, so that a changed bit anywhere is noticed, in names and shapes too.

_CODES = {
    "bool": "BOOL",
    "uint8": "U8",
    "int8": "I8",
    "uint16": "U16",
    "int16": "I16",
    "uint32": "U32",
    "int32": "I32",
    "uint64": "U64",
    "int64": "I64",
    "float8_e4m3fn": "F8_E4M3",
    "float8_e5m2": "F8_E5M2",
    "bfloat16": "BF16",
    "float16": "F16",
    "float32": "F32",
    "float64": "F64",
}
_NAMES = {code: name for name, code in _CODES.items()}
_PAIRS = {"complex64": "float32", "complex128": "float64"}
_NUMBERS: dict[str, tuple[type, str]] = {
    "python bool": (bool, "bool"),
    "python int": (int, "int64"),
    "python float": (float, "float64"),
    "python complex": (complex, "complex128"),
}
_OPENING = b'{"__metadata__":{"sha256":"'
_BLANK = b"0" * 64


_Stored = tuple[str, str, tuple[int, ...]]
"""Kind, dtype and shape under which a leaf is stored."""


class Tensor(NamedTuple):
    """One stored array: `kind` is empty, or says what it stands for (`complex64`, `key:threefry2x32`, `python int`, ...)."""

    values: np.ndarray
    kind: str = ""


def _sentence(kind: str, dtype: str, shape: tuple[int, ...]) -> str:
    if kind.startswith("python"):
        return f"a {kind} number"
    if kind in _PAIRS:
        return f"{kind} {tuple(shape[:-1])}"
    if kind.startswith("key:"):
        return f"random keys of {kind[4:]} {tuple(shape[:-1])}"
    return f"{dtype} {tuple(shape)}"


def _dtype(name: str) -> np.dtype:
    try:
        return np.dtype(name)
    except TypeError:
        import ml_dtypes

        return np.dtype(getattr(ml_dtypes, name))


def _bytes(array: np.ndarray) -> memoryview:
    return array.reshape(-1).view(np.uint8).data


def _write_tensors(path: str | os.PathLike, tensors: Mapping[str, Tensor], meta: Mapping[str, Any]) -> str:
    """Write named arrays and `meta`; returns the digest."""
    # largest items first: every array is then aligned
    order = sorted(tensors, key=lambda name: -tensors[name].values.dtype.itemsize)
    kinds = {name: tensors[name].kind for name in order if tensors[name].kind}
    try:
        note = json.dumps(to_plain(meta), allow_nan=False)
    except (TypeError, ValueError) as error:
        raise StorageError(f"{path}: the notes cannot be stored: {error}") from error
    fields = {"sha256": _BLANK.decode(), "format": FORMAT, "kinds": json.dumps(kinds), "meta": note}
    header: dict[str, Any] = {"__metadata__": fields}
    arrays: list[np.ndarray] = []
    offset = 0
    for name in order:
        array = tensors[name].values
        if name == "__metadata__":
            raise StorageError(f"{path}: the name {name!r} is taken; choose another")
        header[name] = {
            "dtype": _CODES[array.dtype.name],
            "shape": list(array.shape),
            "data_offsets": [offset, offset + array.nbytes],
        }
        offset += array.nbytes
        arrays.append(array)
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    if len(text) > LONGEST_HEADER:
        raise StorageError(f"{path}: the names and notes need {len(text)} bytes; {LONGEST_HEADER} are possible")
    _count_values(text, path, "a header", ":")  # what is written can be read
    _count_values(note, path, "a header")
    length = len(text).to_bytes(8, "little")
    digest = hashlib.sha256(length + text)
    for array in arrays:
        digest.update(_bytes(array))
    sealed = _OPENING + digest.hexdigest().encode() + text[len(_OPENING) + 64 :]
    _write_parts(path, [length, sealed, *(_bytes(array) for array in arrays)])
    return digest.hexdigest()


class _Header(NamedTuple):
    length: int
    sha256: str
    entries: dict[str, tuple[str, tuple[int, ...], int, int]]  # dtype, shape, start, end
    kinds: dict[str, str]
    meta: dict[str, Any]


def _parse_header(path: Path, data: bytes | bytearray, size: int) -> _Header:
    """Read the header from the first bytes of a file of `size` bytes; every length is checked before it is believed."""

    def bad(reason: str) -> CorruptError:
        return CorruptError(f"{path}: not a whole file of hybridsim arrays ({reason}); restore it from a copy or make it anew")

    if size < 8:
        raise bad("it is truncated")
    length = int.from_bytes(data[:8], "little")
    if length > min(LONGEST_HEADER, size - 8):
        raise bad(f"a header of {length} bytes does not fit in {size}")
    text = data[8 : 8 + length]
    end = len(_OPENING) + 64
    if not text.startswith(_OPENING):
        raise bad("it carries no digest")
    # the notes are one word of it, with commas of their own
    header = _parse_json(text, path, "a header", ":")
    try:
        fields = header.pop("__metadata__")
        if fields["format"] != FORMAT:
            raise bad(f"format {fields['format']!r} is not {FORMAT!r}")
        kinds, meta = _parse_json(fields["kinds"], path, "a header"), _parse_json(fields["meta"], path, "a header")
        if not isinstance(kinds, dict) or not isinstance(meta, dict):
            raise bad("the header is damaged")
        entries = {}
        offset = 0
        for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
            dtype, shape, (start, stop) = _NAMES[entry["dtype"]], tuple(entry["shape"]), entry["data_offsets"]
            if not all(type(n) is int and n >= 0 for n in (*shape, start, stop)):
                raise bad(f"{name!r} has an impossible shape")
            if start != offset or stop - start != math.prod(shape) * _dtype(dtype).itemsize:
                raise bad(f"{name!r} has an impossible size")
            entries[name] = (dtype, shape, start, stop)
            offset = stop
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise bad("the header is damaged") from error
    if 8 + length + offset != size:
        raise bad(f"it has {size} bytes, its header promises {8 + length + offset}")
    return _Header(length, text[len(_OPENING) : end].decode("ascii", "replace"), entries, kinds, meta)


def _peek(path: Path) -> tuple[_Header, int]:
    """The header alone, not yet verified, and the size of the file."""
    try:
        with _regular(path) as handle:
            size = os.fstat(handle.fileno()).st_size
            data = handle.read(8)
            data += handle.read(min(int.from_bytes(data, "little"), LONGEST_HEADER))
    except OSError as error:
        raise _refusal(path, "read", error) from error
    return _parse_header(path, data, size), size


def _read_tensors(path: Path, *, file_sha256: str | None = None) -> tuple[dict[str, Tensor], dict[str, Any], str]:
    """Named arrays, notes and digest of a file, verified."""
    data = _read(path)
    if file_sha256 is not None and hashlib.sha256(data).hexdigest() != file_sha256:
        raise CorruptError(f"{path}: the file is not the one that was written (its SHA-256 differs)")
    header = _parse_header(path, data, len(data))
    view = memoryview(data)
    body = 8 + header.length
    digest = hashlib.sha256(view[: 8 + len(_OPENING)])
    digest.update(_BLANK)
    digest.update(view[8 + len(_OPENING) + 64 :])
    if digest.hexdigest() != header.sha256:
        raise CorruptError(f"{path}: damaged (its SHA-256 differs); restore it from a copy or make it anew")
    tensors = {}
    for name, (dtype, shape, start, stop) in header.entries.items():
        flat = np.frombuffer(view[body + start : body + stop], np.uint8).view(_dtype(dtype))
        tensors[name] = Tensor(flat.reshape(shape), header.kinds.get(name, ""))
    return tensors, header.meta, header.sha256


def verify_tensors(path: str | os.PathLike) -> dict[str, Any]:
    """The notes of a file that `save_tree` or `save_weights` wrote, once its digest is found right; read in pieces."""
    path = Path(path)
    header, size = _peek(path)
    place = 8 + len(_OPENING)
    digest = hashlib.sha256()
    try:
        with _regular(path) as handle:
            digest.update(handle.read(place) + _BLANK)
            handle.seek(place + 64)
            while piece := handle.read(2**22):
                digest.update(piece)
            grown = handle.tell() != size
    except OSError as error:
        raise _refusal(path, "read", error) from error
    if grown or digest.hexdigest() != header.sha256:
        raise CorruptError(f"{path}: damaged (its SHA-256 differs); restore it from a copy or make it anew")
    return header.meta


def _named_leaves(tree: Any) -> tuple[list[tuple[str, Any]], Any]:
    import jax

    paths, structure = jax.tree_util.tree_flatten_with_path(tree)
    named = [(jax.tree_util.keystr(path).removeprefix(".") or ".", leaf) for path, leaf in paths]
    seen: set[str] = set()
    for name, _ in named:
        if name in seen:
            raise StorageError(f"two leaves have the same key path {name!r}; rename one")
        seen.add(name)
    return named, structure


def _stored_as(name: str, leaf: Any) -> _Stored | None:
    """Kind, dtype and shape under which a leaf is stored; None for functions, which belong to the structure."""
    import jax

    for kind, (cls, dtype) in _NUMBERS.items():
        if type(leaf) is cls:
            return (kind, "float64", (2,)) if dtype in _PAIRS else (kind, dtype, ())
    if hasattr(leaf, "dtype") and hasattr(leaf, "shape"):
        shape = tuple(leaf.shape)
        if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            data = jax.eval_shape(jax.random.key_data, leaf)
            return f"key:{jax.random.key_impl(leaf)}", data.dtype.name, tuple(data.shape)
        dtype = np.dtype(leaf.dtype).name
        if dtype in _PAIRS:
            return dtype, _PAIRS[dtype], (*shape, 2)
        if dtype in _CODES:
            return "", dtype, shape
        raise StorageError(f"{name}: {leaf.dtype} cannot be stored")
    if callable(leaf):
        return None
    raise StorageError(f"{name}: {type(leaf).__name__} cannot be stored; arrays, random keys and numbers can")


def _to_tensor(name: str, leaf: Any) -> Tensor | None:
    import jax

    stored = _stored_as(name, leaf)
    if stored is None:
        return None
    kind, dtype, shape = stored
    if kind.startswith("key:"):
        leaf = jax.random.key_data(leaf)
    try:
        array = np.asarray(leaf, dtype=_NUMBERS[kind][1] if kind in _NUMBERS else None, order="C")
    except OverflowError as error:
        raise StorageError(f"{name}: {leaf} does not fit in 64 bits") from error
    if array.dtype.byteorder == ">":
        array = array.astype(array.dtype.newbyteorder("<"))
    return Tensor(array.reshape(-1).view(_dtype(dtype)).reshape(shape) if array.dtype.name in _PAIRS else array, kind)


def _from_tensor(path: Path, name: str, tensor: Tensor, like: Any) -> Any:
    import jax
    import jax.numpy as jnp

    kind, array = tensor.kind, tensor.values.copy()
    if kind.startswith("key:"):
        return jax.random.wrap_key_data(jnp.asarray(array), impl=kind[4:])
    if kind in _NUMBERS:
        cls, dtype = _NUMBERS[kind]
        return cls(array.view(dtype)[0] if dtype in _PAIRS else array.item())
    if kind in _PAIRS:
        array = array.reshape(-1).view(kind).reshape(array.shape[:-1])
    if isinstance(like, np.generic):
        return array[()]
    if isinstance(like, np.ndarray):
        return array
    if getattr(like, "weak_type", False) and array.ndim == 0:
        # a number from Python adapts to the dtype of its partner; after a resume it must still do so
        weak = jnp.asarray(array.item())
        if weak.dtype == array.dtype:
            return weak
    restored = jnp.array(array)
    if restored.dtype != array.dtype:
        raise StorageError(f"{path}: {name!r} is {array.dtype}; switch double precision on (jax_enable_x64) to read it")
    return restored


def _difference(found: Mapping[str, _Stored], wanted: Mapping[str, _Stored]) -> str:
    """The first difference between what a file holds and what is asked for, in words; empty where there is none."""
    missing = [name for name in wanted if name not in found]
    extra = [name for name in found if name not in wanted]
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        return f"{missing[0]!r}{more} is missing" + (f" (it holds {extra[0]!r})" if extra else "")
    if extra:
        more = f" and {len(extra) - 1} more" if len(extra) > 1 else ""
        return f"it holds {extra[0]!r}{more}, which nothing here asks for"
    for name, want in wanted.items():
        if found[name] != want:
            return f"{name!r} is {_sentence(*found[name])}, expected {_sentence(*want)}"
    return ""


def _load_matching(
    path: Path, wanted: Mapping[str, _Stored], *, widen: bool = False, file_sha256: str | None = None
) -> tuple[dict[str, Tensor], dict[str, Any], str]:
    """Verified arrays that are exactly those `wanted`; with `widen`, floating-point numbers of fewer bits are accepted too.

    A file of another size than wanted is refused before its arrays are read.
    """
    header, size = _peek(path)
    found = {name: (header.kinds.get(name, ""), dtype, shape) for name, (dtype, shape, _, _) in header.entries.items()}
    asked = dict(wanted)
    if widen:
        for name, (kind, dtype, shape) in found.items():
            want = wanted.get(name)
            if want is None or want[2] != shape or (kind in _PAIRS) != (want[0] in _PAIRS):
                continue
            real = dtype.startswith(("float", "bfloat")) and want[1].startswith("float")
            if real and _dtype(dtype).itemsize < _dtype(want[1]).itemsize:
                asked[name] = (kind, dtype, shape)
    difference = _difference(found, asked)
    if difference:
        if size <= 2**28:
            _read_tensors(path, file_sha256=file_sha256)  # a damaged file is called damaged, not different
        raise StorageError(f"{path}: does not fit: {difference}")
    return _read_tensors(path, file_sha256=file_sha256)


def save_tree(path: str | os.PathLike, tree: Any, meta: Mapping[str, Any] | None = None) -> str:
    """Write every array, random key and number of a pytree into one safetensors file; returns its SHA-256 digest.

    **Arguments:**

    - `path`: the file, replaced atomically.
    - `tree`: any pytree. Functions in it (activations, say) belong to the structure and are not stored; text is refused.
    - `meta`: notes in JSON's types, without NaN and infinity.

    The bits of every value are kept. Arrays are named by their key paths.
    """
    named, _ = _named_leaves(tree)
    tensors = {name: tensor for name, leaf in named if (tensor := _to_tensor(name, leaf)) is not None}
    return _write_tensors(path, tensors, meta or {})


def load_tree(path: str | os.PathLike, like: Any) -> tuple[Any, dict[str, Any]]:
    """(tree, meta) as `save_tree` wrote them.

    **Arguments:**

    - `path`: the file.
    - `like`: a tree of the same structure, shapes and dtypes; its leaves, random keys excepted, may be `jax.ShapeDtypeStruct`.
      Arrays come back as its leaves are: numpy as numpy, everything else as JAX arrays.

    A missing, additional or different array, and a damaged file, are refused before anything is returned.
    """
    return _load_tree(Path(path), like, None)


def load_arrays(path: str | os.PathLike) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """(arrays by name, meta) of a file that `save_tree` wrote from a flat mapping of names to numpy arrays, verified."""
    path = Path(path)
    tensors, meta, _ = _read_tensors(path)
    plain = {name.removeprefix("['").removesuffix("']"): tensor for name, tensor in tensors.items()}
    return {name: _from_tensor(path, name, tensor, np.empty(0)) for name, tensor in plain.items()}, meta


def _load_tree(path: Path, like: Any, file_sha256: str | None) -> tuple[Any, dict[str, Any]]:
    import jax

    named, structure = _named_leaves(like)
    wanted = {name: stored for name, leaf in named if (stored := _stored_as(name, leaf)) is not None}
    tensors, meta, _ = _load_matching(path, wanted, file_sha256=file_sha256)
    leaves = [_from_tensor(path, name, tensors[name], leaf) if name in wanted else leaf for name, leaf in named]
    return jax.tree_util.tree_unflatten(structure, leaves), meta


# --- checkpoints -----------------------------------------------------------------------------------------------------------------


class Checkpoints:
    """The last `keep` states of a computation: `<step>.safetensors` and its manifest `<step>.json`.

    A checkpoint exists once its manifest does, which is written last; the manifest holds step, size and SHA-256.

    **Arguments:**

    - `folder`: where they live; made when the first one is saved. One writer at a time (see `FolderLock`).
    - `keep`: how many to keep, at least 1; two allow to fall back when the newest is damaged.
    - `about`: what made the states (see `provenance`), stored in each.
    """

    def __init__(self, folder: str | os.PathLike, keep: int = 2, about: Mapping[str, Any] | None = None):
        if keep < 1:
            raise ValueError(f"keep: {keep} checkpoints; at least 1 is possible")
        self.folder = Path(folder)
        self.keep = keep
        self.about = dict(about or {})

    def steps(self) -> list[int]:
        """The steps that have a manifest, in order; none of them is verified yet."""
        return sorted(int(path.stem) for path in self.folder.glob("*.json") if set(path.stem) <= set(string.digits) and path.stem)

    def paths(self, step: int) -> tuple[Path, Path]:
        """The arrays of a step, and its manifest."""
        return self.folder / f"{step:012d}.safetensors", self.folder / f"{step:012d}.json"

    def save(self, step: int, tree: Any, meta: Mapping[str, Any] | None = None) -> None:
        """Store a state; then `prune`: a computation that went back has no use for what came later."""
        step = int(step)
        if step < 0:
            raise ValueError(f"step: {step} is negative")
        arrays, manifest = self.paths(step)
        save_tree(arrays, tree, {"step": step, "meta": dict(meta or {}), "about": self.about})
        write_json(manifest, {"step": step, "bytes": arrays.stat().st_size, "sha256": sha256(arrays)})
        self.prune(step)

    def prune(self, step: int) -> None:
        """Drop the checkpoints of later steps and, but for the last few, of earlier ones."""
        kept = [other for other in self.steps() if other <= step][-self.keep :]
        for other in self.steps():
            if other not in kept:
                self._remove(other)

    @overload
    def latest(self, like: Any) -> tuple[int, Any, dict[str, Any]] | None: ...
    @overload
    def latest(self, like: Any, also: Callable[[int], T]) -> tuple[int, Any, dict[str, Any], T] | None: ...
    def latest(self, like: Any, also: Callable[[int], Any] | None = None) -> tuple[Any, ...] | None:
        """(step, tree, meta) of the newest checkpoint that is whole and fits `like`; None where there is none at all.

        One that is damaged or does not fit is passed over with a `StorageWarning`. If none can be used, that is an error.
        `also` reads what belongs to a step and comes last in the answer; where it finds something damaged the step is passed over.
        """
        reasons = []
        for step in reversed(self.steps()):
            try:
                tree, meta = self._load(step, like)
                more = () if also is None else (also(step),)
            except StorageError as error:
                reasons.append(str(error))
                continue
            reasons += [f"{path}: has no manifest, so it was not finished" for path in self._without_manifest(step)]
            for reason in reasons:
                warnings.warn(f"{reason}; going on from the checkpoint of step {step}", StorageWarning, stacklevel=2)
            return step, tree, meta, *more
        if reasons:
            raise StorageError(f"{self.folder}: no checkpoint can be used; start again without resuming. {reasons[0]}")
        return None

    def _without_manifest(self, after: int) -> list[Path]:
        """Arrays of later steps whose manifest is not there: their process was killed in between, or somebody removed it."""
        found = [path for path in self.folder.glob("*.safetensors") if path.stem and set(path.stem) <= set(string.digits)]
        return sorted(path for path in found if int(path.stem) > after and not path.with_suffix(".json").exists())

    def _promised(self, step: int) -> str:
        """The SHA-256 of a checkpoint as its manifest has it; its size is checked here."""
        arrays, manifest = self.paths(step)
        note = read_json(manifest)
        if not isinstance(note, dict) or note.keys() != {"step", "bytes", "sha256"} or note["step"] != step:
            raise CorruptError(f"{manifest}: damaged")
        try:
            size = arrays.stat().st_size
        except OSError as error:
            raise _refusal(arrays, "read", error) from error
        if size != note["bytes"]:
            raise CorruptError(f"{arrays}: {size} bytes instead of {note['bytes']}")
        return str(note["sha256"])

    def verify(self, step: int) -> dict[str, Any]:
        """What made the checkpoint of a step, once every bit of it is as its manifest says; `StorageError` where not."""
        arrays, _ = self.paths(step)
        if sha256(arrays) != self._promised(step):
            raise CorruptError(f"{arrays}: the file is not the one that was written (its SHA-256 differs)")
        meta = verify_tensors(arrays)
        if meta.get("step") != step:
            raise CorruptError(f"{arrays}: holds step {meta.get('step')} under the name of step {step}")
        return meta.get("about", {})

    def _load(self, step: int, like: Any) -> tuple[Any, dict[str, Any]]:
        arrays, _ = self.paths(step)
        tree, meta = _load_tree(arrays, like, self._promised(step))
        if meta.get("step") != step:
            raise CorruptError(f"{arrays}: holds step {meta.get('step')} under the name of step {step}")
        return tree, meta["meta"]

    def _remove(self, step: int) -> None:
        arrays, manifest = self.paths(step)
        try:
            manifest.unlink(missing_ok=True)
            arrays.unlink(missing_ok=True)
        except OSError as error:
            raise _refusal(arrays, "remove", error) from error

    def clear(self) -> None:
        """Remove all checkpoints."""
        for step in self.steps():
            self._remove(step)


# --- weights of closures ----------------------------------------------------------------------------------------------------------


def _trainable(closure: Any) -> tuple[list[tuple[str, Any]], Any]:
    import equinox as eqx

    return _named_leaves(eqx.filter(closure, eqx.is_inexact_array))


def _all_finite(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Refuses weights that are not numbers: whatever run takes them is lost from its first step."""
    for name, tensor in tensors.items():
        wrong = np.count_nonzero(~np.isfinite(tensor.values.astype(np.float64)))
        if wrong:
            raise StorageError(f"{path}: {wrong} of {tensor.values.size} numbers of {name!r} are not finite; train anew")


def save_weights(path: str | os.PathLike, closure: Any, header: Mapping[str, Any]) -> str:
    """Write the floating-point arrays of a closure, named by their key paths, with a JSON header; returns the SHA-256 digest.

    **Arguments:**

    - `path`: the `.safetensors` file.
    - `closure`: any Equinox module.
    - `header`: what a reader needs to know: the closure's configuration, versions, a summary of the training.
    """
    tensors = {name: tensor for name, leaf in _trainable(closure)[0] if (tensor := _to_tensor(name, leaf)) is not None}
    return _write_tensors(path, tensors, {"weights": dict(header)})


def load_weights(path: str | os.PathLike, closure: Any) -> Any:
    """`closure` with its floating-point arrays replaced by those of a file that `save_weights` wrote.

    Names and shapes must be the same. Numbers of fewer bits are widened, which changes none; more bits than the closure has are
    refused.
    """
    import equinox as eqx
    import jax

    path = Path(path)
    named, structure = _trainable(closure)
    wanted = {name: stored for name, leaf in named if (stored := _stored_as(name, leaf)) is not None}
    tensors, meta, _ = _load_matching(path, wanted, widen=True)
    if "weights" not in meta:
        raise StorageError(f"{path}: holds arrays, but not the weights of a closure")
    _all_finite(path, tensors)
    leaves = []
    for name, leaf in named:
        kind, dtype, _ = wanted[name]
        widened = Tensor(tensors[name].values.astype(_dtype(dtype)), kind)
        leaves.append(_from_tensor(path, name, widened, leaf))
    return eqx.combine(jax.tree_util.tree_unflatten(structure, leaves), closure)


def read_header(path: str | os.PathLike) -> dict[str, Any]:
    """The header given to `save_weights`, with the verified `sha256` of the file and its number of `parameters`."""
    path = Path(path)
    tensors, meta, digest = _read_tensors(path)
    if not isinstance(meta.get("weights"), dict):
        raise StorageError(f"{path}: holds arrays, but not the weights of a closure")
    _all_finite(path, tensors)
    count = sum(t.values.size // (2 if t.kind in _PAIRS else 1) for t in tensors.values())
    return {**meta["weights"], "sha256": digest, "parameters": count}


# --- fields: NetCDF-4 -------------------------------------------------------------------------------------------------------------


def _encoding(ds: "xr.Dataset", level: int) -> dict[str, dict[str, Any]]:
    # checksums of HDF5 need chunks, which only arrays have
    return {
        str(name): {"zlib": True, "complevel": level, "shuffle": True, "fletcher32": True}
        if variable.ndim and variable.size and variable.dtype.kind in "iufb"
        else {}
        for name, variable in ds.variables.items()
    }


def save_groups(
    path: str | os.PathLike, groups: Mapping[str, "xr.Dataset"], attrs: Mapping[str, Any] | None = None, *, level: int = 2
) -> None:
    """Write datasets as the groups of one NetCDF-4 file, atomically; the group `""` is the root.

    **Arguments:**

    - `path`: the `.nc` file.
    - `groups`: group name → `xarray.Dataset`. dtypes are kept; arrays are compressed and carry HDF5's checksums.
    - `attrs`: attributes of the file itself.
    - `level`: of the zlib compression, 1 to 4.
    """
    import xarray as xr

    if not 1 <= level <= 4:
        raise ValueError(f"level: {level}; 1 to 4 are possible")
    path = Path(path)
    root = groups.get("", xr.Dataset()).assign_attrs(attrs or {})
    with atomic_path(path) as temporary:
        try:
            for mode, name, ds in [("w", None, root), *(("a", name, ds) for name, ds in groups.items() if name)]:
                ds = ds.drop_encoding()
                ds.to_netcdf(temporary, mode=mode, group=name, format="NETCDF4", engine="netcdf4", encoding=_encoding(ds, level))
        except RuntimeError as error:  # what netCDF4 makes of a failing write
            raise StorageError(f"{path}: cannot write ({error}): check the free space and the disk, then run again") from error


def save_dataset(path: str | os.PathLike, ds: "xr.Dataset", *, level: int = 2) -> None:
    """Write a dataset as NetCDF-4, atomically, dtypes kept, compressed with zlib at `level` (1 to 4), with HDF5's checksums."""
    save_groups(path, {"": ds}, level=level)


_HDF5 = b"\x89HDF\r\n\x1a\n"
_DEFLATE = 1032
"""No byte that zlib has packed unpacks to more; what a file promises beyond that was never written."""
_ALWAYS_READ = 2**27
_LONGEST_CHUNK = 2**26
"""A chunk is unpacked as a whole; netCDF-C makes them of 16 MiB at most."""
MOST_WORDS = 4096
"""A file names samples, variables and fields in words; no honest one of ours has so many."""


def _open_files() -> set[str]:
    """Files that this process has open, where the system tells (Linux)."""
    found = set()
    with contextlib.suppress(OSError):
        for entry in os.scandir("/proc/self/fd"):
            with contextlib.suppress(OSError):
                found.add(os.readlink(entry.path))  # noqa: PTH115
    return {name for name in found if name.startswith("/") and Path(name).is_file()}


@contextlib.contextmanager
def _fields(path: Path) -> Iterator[Any]:
    """An open `netCDF4.Dataset` that was looked through, before any of its values are read; every error is a `StorageError`.

    HDF5 can take values from other files: by links to objects there, by virtual arrays, and by arrays whose bytes lie anywhere.
    netCDF-C follows all three, and shows the last two as arrays without chunks, which none of ours are. Nor do ours have types
    of their own, chunks that are larger than netCDF-C makes them, or more values than its bytes could hold.
    """
    import netCDF4

    def bad(reason: str) -> CorruptError:
        return CorruptError(f"{path}: not readable as NetCDF-4 ({reason})")

    try:
        with _regular(path) as handle:
            size = os.fstat(handle.fileno()).st_size
            if handle.read(8) != _HDF5:
                raise bad("it does not begin as one")
        before = _open_files()
        with netCDF4.Dataset(path) as file:
            file.set_auto_maskandscale(False)
            others = _open_files() - before - {str(path.resolve())}
            if others:
                raise bad(f"it leads to another file, {min(others)}")
            unpacked, most = 0, min(_DEFLATE * size, max(2**31, 100 * size))
            for group in _groups_of(file):
                if group.cmptypes or group.vltypes or group.enumtypes:
                    raise bad("it has data types of its own")
                for name, variable in group.variables.items():
                    if variable.dtype is str:
                        if variable.size > MOST_WORDS:
                            raise bad(f"{name!r} holds {variable.size} words")
                        continue
                    width = variable.dtype.itemsize
                    unpacked += variable.size * width
                    chunks = variable.chunking()
                    if chunks == "contiguous" and variable.ndim and variable.size:
                        raise bad(f"{name!r} has no chunks, as ours have, so its values may lie in another file")
                    if chunks != "contiguous" and math.prod(chunks) * width > _LONGEST_CHUNK:
                        raise bad(f"{name!r} is cut in chunks of {math.prod(chunks) * width / 2**20:.0f} MiB")
            if unpacked > max(_ALWAYS_READ, most):
                raise StorageError(f"{path}: {size / 2**20:.1f} MiB would unpack to {unpacked / 2**30:.1f} GiB; not read")
            yield file
    except OSError as error:
        if (error.errno or 0) > 0:
            raise _refusal(path, "read", error) from error
        raise bad(" ".join(str(error).split())) from error
    except (RuntimeError, ValueError, KeyError, AttributeError, TypeError, IndexError, OverflowError, MemoryError) as error:
        raise bad(" ".join(str(error).split()) or type(error).__name__) from error


def _groups_of(file: Any) -> Iterator[Any]:
    yield file
    for group in file.groups.values():
        yield from _groups_of(group)


def open_dataset(path: str | os.PathLike, group: str | None = None) -> "xr.Dataset":
    """A dataset, or one group of a file, read completely and verified by HDF5's checksums; the file is closed again.

    Times are numbers in the units of the attributes, never dates. What would unpack to over 128 MiB and to more than its bytes can
    hold, or to over 2 GiB and over 100 times the size of its file, is refused, and so is what takes values from another file.
    """
    import xarray as xr
    from xarray.backends import NetCDF4DataStore

    path = Path(path)
    with _fields(path) as file:
        if group is not None and group not in file.groups:
            raise StorageError(f"{path}: there is no group {group!r}; possible: {', '.join(file.groups) or 'none'}")
        file.set_auto_maskandscale(True)
        store = NetCDF4DataStore(file, group=group)
        ds = xr.open_dataset(store, decode_times=False, decode_timedelta=False).load()
        ds.set_close(None)  # what it would close is closed here
        return ds


def dataset_groups(path: str | os.PathLike) -> list[str]:
    """Names of the groups of a NetCDF-4 file, in the order in which they were written."""
    with _fields(Path(path)) as file:
        return list(file.groups)


def read_fields(path: str | os.PathLike) -> Iterator[tuple[str, Any]]:
    """(name, `netCDF4.Variable`) of every variable of a NetCDF-4 file and its groups, each read chunk by chunk, so that every
    checksum is seen.

    At the end (name, group) of every group, the file itself as `""`.
    """
    with _fields(Path(path)) as file:
        for group in _groups_of(file):
            where = group.path.strip("/")
            for name, variable in group.variables.items():
                chunks = variable.chunking()
                sizes = [max(1, size) for size in (variable.shape if chunks == "contiguous" else chunks)]
                for corner in itertools.product(*(range(0, n, size) for n, size in zip(variable.shape, sizes, strict=True))):
                    variable[tuple(slice(i, i + size) for i, size in zip(corner, sizes, strict=True)) or ...]
                yield f"{where}/{name}".strip("/"), variable
        for group in _groups_of(file):
            yield group.path.strip("/"), group


# --- cache ------------------------------------------------------------------------------------------------------------------------

NUMERICAL_SOURCES = ("grid.py", "contract.py", "model.py", "reference.py", "stored.py")
"""Engine files that decide the numbers of a reference, with every file of the solvers' room."""


def cache_folder() -> Path:
    """`HYBRIDSIM_CACHE`, or `hybridsim` in the user's cache folder of this platform."""
    if chosen := os.environ.get("HYBRIDSIM_CACHE"):
        return Path(chosen).expanduser()
    if sys.platform == "win32":
        return Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local") / "hybridsim"
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "hybridsim"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "hybridsim"


def compiled_folder() -> Path:
    """Where compiled programs are kept: a folder per kind of processor, since a program of one may not run on another."""
    kind = [platform.machine(), _processor()]
    with contextlib.suppress(OSError):
        kind += [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith(("flags", "Features"))][:1]
    return cache_folder() / "compiled" / hashlib.sha256("\n".join(kind).encode()).hexdigest()[:16]


def _room(name: str) -> Path:
    """Where a part of the package lies, without importing it."""
    spec = importlib.util.find_spec(f"hybridsim.{name}")
    return Path(next(iter(spec.submodule_search_locations or []))) if spec else Path(__file__).parent / name


def source_digest() -> str:
    """SHA-256 over names and texts of the sources that decide the numbers: `NUMERICAL_SOURCES` and the solvers' room."""
    engine = Path(__file__).parent
    return _digest_of([*(engine / name for name in NUMERICAL_SOURCES), *sorted(_room("solvers").glob("*.py"))])


def package_digest() -> str:
    """SHA-256 over names and texts of all sources: of the engine, the solvers and the corrections."""
    rooms = (Path(__file__).parent, _room("solvers"), _room("corrections"))
    return _digest_of([file for room in rooms for file in sorted(room.glob("*.py"))])


def _digest_of(files: Iterable[Path]) -> str:
    digest = hashlib.sha256()
    for file in files:
        if file.exists():
            text = file.read_bytes().replace(b"\r\n", b"\n")
            digest.update(f"{file.parent.name}/{file.name} {len(text)}\n".encode() + text)
    return digest.hexdigest()


def recipe_hash(recipe: Mapping[str, Any], dtype: Any, *, sources: bool = True) -> str:
    """SHA-256 of everything that decides the numbers made by a recipe; the key of the cache.

    **Arguments:**

    - `recipe`: resolved, in JSON's types; the order of keys does not matter.
    - `dtype`: of the computation.
    - `sources`: include the text of the numerical sources, so that a changed solver makes new data.

    The versions of JAX and jaxlib, the backend and the machine type are always included.
    """
    import jax

    parts = {
        "recipe": to_plain(recipe),
        "dtype": np.dtype(dtype).name,
        "sources": source_digest() if sources else None,
        "jax": _version("jax"),
        "jaxlib": _version("jaxlib"),
        "platform": f"{jax.default_backend()} {platform.machine()}",
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()).hexdigest()


def _cache_path(key: str, kind: str) -> Path:
    if len(key) != 64 or not set(key) <= set("0123456789abcdef"):
        raise ValueError(f"key: {key!r} is not a SHA-256 digest")
    return cache_folder() / kind / f"{key}.safetensors"


def store_cached(key: str, tensors: Mapping[str, Any], meta: Mapping[str, Any], *, kind: str = "reference") -> Path | None:
    """Keep named arrays and notes under `key`; returns the file. A cache that cannot be written costs a warning, not the run."""
    path = _cache_path(key, kind)
    named = {name: tensor for name, leaf in tensors.items() if (tensor := _to_tensor(name, leaf)) is not None}
    try:
        _write_tensors(path, named, {"key": key, "meta": dict(meta)})
        remove_leftovers(path.parent, older_than=86400.0)
    except StorageError as error:
        warnings.warn(f"{error}; going on without the cache", StorageWarning, stacklevel=2)
        return None
    return path


def load_cached(key: str, *, kind: str = "reference") -> tuple[dict[str, np.ndarray], dict[str, Any]] | None:
    """(numpy arrays, meta) kept under `key`, verified; None where there is none.

    A damaged entry is passed over with a `StorageWarning`: make the data anew and store it.
    """
    path = _cache_path(key, kind)
    if not os.path.exists(path):  # noqa: PTH110 -- what may not be looked at is not there
        return None
    try:
        tensors, meta, _ = _read_tensors(path)
        if meta.get("key") != key:
            raise CorruptError(f"{path}: holds the entry of another key")
    except StorageError as error:
        warnings.warn(f"{error}; making the data anew", StorageWarning, stacklevel=2)
        return None
    return {name: _from_tensor(path, name, tensor, np.empty(0)) for name, tensor in tensors.items()}, meta["meta"]


# --- what a folder holds ----------------------------------------------------------------------------------------------------------

MANIFEST = "manifest.json"
MANIFEST_FORMAT = "hybridsim manifest 1"
UNNAMED = ("log.txt", ".lock", MANIFEST)
"""Files that no manifest names at its own top: the log goes on growing, the lock belongs to a process."""


def config_digest(resolved: Mapping[str, Any], files: Mapping[str, str]) -> str:
    """SHA-256 of a resolved configuration and of the digests of the files that it names, as canonical JSON."""
    text = json.dumps({"config": resolved, "files": files}, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def manifest_digest(manifest: Mapping[str, Any]) -> str:
    """SHA-256 of a manifest without its own digest, as canonical JSON."""
    rest = {key: value for key, value in manifest.items() if key != "sha256"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def named_files(folder: str | os.PathLike) -> dict[str, dict[str, Any]]:
    """What the manifest of a folder names, for the manifest that comes next.

    Every entry carries the `config_hash` of the command that made its file.
    """
    try:
        found = read_manifest(Path(folder) / MANIFEST)
    except StorageError:
        return {}  # what is damaged or not there names nothing
    return {name: {"config_hash": found["config_hash"], **entry} for name, entry in found["files"].items()}


def still_as_named(folder: str | os.PathLike, entries: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Those of the `entries` of a manifest whose files are as they were."""
    folder, kept = Path(folder), {}
    for name, entry in entries.items():
        path = folder / name
        with contextlib.suppress(StorageError, OSError, KeyError, TypeError):
            if path.stat().st_size == entry["bytes"] and sha256(path) == entry["sha256"]:
                kept[name] = entry
    return kept


def forget_manifest(folder: str | os.PathLike) -> None:
    """Remove the manifest of a folder before anything in it is overwritten."""
    path = Path(folder) / MANIFEST
    try:
        if path.is_symlink() or path.exists():
            path.unlink()
            if os.name == "posix":
                _sync(path.parent, os.O_RDONLY)
    except OSError as error:
        raise _refusal(path, "remove", error) from error


def write_manifest(
    folder: str | os.PathLike,
    names: Iterable[str],
    about: Mapping[str, Any],
    earlier: Mapping[str, Mapping[str, Any]] | None = None,
) -> None:
    """Name every finished file of a folder with its size and SHA-256 in `manifest.json`: written last, once everything stands.

    **Arguments:**

    - `folder`: of a command that is done.
    - `names`: patterns of its files, relative to the folder (`figures/*.png`); a folder stands for everything in it, states
      (`state/`) and temporary files excepted. Symbolic links are not named.
    - `about`: what made them (see `provenance`), with `config_hash`.
    - `earlier`: what `named_files` gave. Entries of files that are still there and that no pattern meets stay as they were.
    """
    folder = Path(folder)
    found = {path for pattern in names for path in folder.glob(pattern)}
    files = {inside for path in found for inside in (_inside(path) if path.is_dir() else [path]) if inside.is_file()}
    entries: dict[str, Any] = {}
    for path in sorted(path for path in files if not path.is_symlink()):
        name = path.relative_to(folder).as_posix()
        if name not in UNNAMED:
            entries[name] = {"bytes": path.stat().st_size, "sha256": sha256(path)}
    for name, entry in (earlier or {}).items():
        if name not in entries and (folder / name).is_file():
            kept = {key: value for key, value in entry.items() if (key, value) != ("config_hash", about["config_hash"])}
            entries[name] = kept
    manifest = {"format": MANIFEST_FORMAT, **to_plain(about, null_for_nonfinite=True), "files": dict(sorted(entries.items()))}
    write_json(folder / MANIFEST, {**manifest, "sha256": manifest_digest(manifest)})


@contextlib.contextmanager
def renewed(folder: str | os.PathLike, names: Iterable[str]) -> Iterator[None]:
    """A block that writes files `names` anew in a folder that is finished: its manifest is gone meanwhile, and names them after.

    In a folder without a manifest nothing happens.
    """
    try:
        found = read_manifest(Path(folder) / MANIFEST)
    except StorageError:
        yield
        return
    earlier = named_files(folder)
    forget_manifest(folder)
    try:
        yield
    finally:
        write_manifest(folder, names, {k: v for k, v in found.items() if k not in ("format", "files", "sha256")}, earlier)


def _inside(folder: Path) -> Iterator[Path]:
    """Every file below a folder but for states and what killed writers left; symbolic links are not followed."""
    for place, folders, files in os.walk(folder):
        folders[:] = [name for name in folders if not is_leftover(name) and not is_state(Path(place) / name)]
        yield from (Path(place) / name for name in files if not is_leftover(name))


def is_state(folder: Path) -> bool:
    """Whether a folder holds the state of a run that is not finished."""
    return folder.name == "state" and (folder / "begun.json").is_file()


def read_manifest(path: str | os.PathLike) -> dict[str, Any]:
    """The checked content of a `manifest.json`: whole, of a known format, and naming only what lies below it."""
    path = Path(path)
    found = read_json(path)

    def bad(reason: str) -> CorruptError:
        return CorruptError(f"{path}: not a whole manifest ({reason})")

    if not isinstance(found, dict) or found.get("format") != MANIFEST_FORMAT:
        raise bad(f"its format is not {MANIFEST_FORMAT!r}")
    if found.get("sha256") != manifest_digest(found):
        raise bad("its SHA-256 differs")
    files = found.get("files")
    if not isinstance(files, dict) or not isinstance(found.get("config_hash"), str):
        raise bad("it names no files")
    for name, entry in files.items():
        parts = name.split("/")
        if not name or "\\" in name or "\0" in name or Path(name).is_absolute() or not set(parts).isdisjoint({"", ".", ".."}):
            raise bad(f"{name[:60]!r} lies outside its folder")
        if not isinstance(entry, dict) or not isinstance(entry.get("sha256"), str) or type(entry.get("bytes")) is not int:
            raise bad(f"the entry of {name[:60]!r} is damaged")
    return found


# --- one owner per folder ---------------------------------------------------------------------------------------------------------


def _try_lock(handle: int) -> bool:
    """Take the operating system's lock, which ends with the process, however that ends."""
    try:
        if sys.platform == "win32":
            import msvcrt

            os.lseek(handle, 1 << 20, os.SEEK_SET)
            msvcrt.locking(handle, msvcrt.LK_NBLCK, 1)
        else:
            import fcntl

            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EAGAIN, errno.EACCES, errno.EDEADLK):
            return False
        if error.errno in (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS):
            warnings.warn("this file system has no locks: start one hybridsim per folder only", StorageWarning, stacklevel=3)
            return True
        raise
    return True


def _in_use(lock: Path) -> str:
    try:
        owner = json.loads(lock.read_bytes()[:4096])
        return f"in use by process {int(owner['pid'])} on {owner['host']}"
    except (OSError, ValueError, KeyError, TypeError):
        return "in use by another process"


class FolderLock:
    """`with FolderLock(folder):` one owner per folder; a second one is refused with the owner's process and host.

    The lock is the operating system's: it ends with its process, so a killed one leaves nothing in the way. Temporary files that
    a killed owner left are removed on entry. What lies below a folder belongs to its owner, too, but for the cache (`shared`),
    wherever that is.
    """

    def __init__(self, folder: str | os.PathLike, *, shared: bool = False):
        self.folder, self.shared = Path(folder), shared
        self.path = self.folder / ".lock"
        self._handle: int | None = None

    def __enter__(self) -> "FolderLock":
        try:
            if not self.shared:
                self._refuse_below_another()
            self.folder.mkdir(parents=True, exist_ok=True)
            while self._handle is None:
                self._handle = self._open()
            _OWNED.append(Path(os.path.abspath(self.folder)))  # noqa: PTH100 -- as in `_stay_inside`
            remove_leftovers(self.folder)
            os.ftruncate(self._handle, 0)
            os.lseek(self._handle, 0, os.SEEK_SET)
            os.write(self._handle, json.dumps({"pid": os.getpid(), "host": socket.gethostname()}).encode())
        except OSError as error:
            self._release()
            raise _refusal(self.path, "lock the folder", error) from error
        return self

    def _refuse_below_another(self) -> None:
        for parent in Path(os.path.abspath(self.folder)).parents:  # noqa: PTH100 -- as in `_stay_inside`
            path = parent / ".lock"
            if parent in _OWNED or not os.path.exists(path):  # noqa: PTH110 -- what may not be looked at is not there
                continue
            with contextlib.suppress(OSError):
                handle = os.open(path, os.O_RDWR | getattr(os, "O_NOFOLLOW", 0))
                try:
                    if not _try_lock(handle):
                        where = f"{self.folder}: the folder {parent} is {_in_use(path)}"
                        raise LockedError(f"{where}; wait for it or choose another folder")
                finally:
                    os.close(handle)

    def _open(self) -> int | None:
        """A locked handle of the file that is at `path` now; None if its last owner removed it in between."""
        handle = os.open(self.path, os.O_CREAT | os.O_RDWR | getattr(os, "O_NOFOLLOW", 0), 0o666)
        kept = False
        try:
            if not _try_lock(handle):
                raise LockedError(f"{self.folder}: {_in_use(self.path)}; wait for it or choose another folder")
            with contextlib.suppress(FileNotFoundError):
                kept = os.path.samestat(os.fstat(handle), self.path.stat())
            return handle if kept else None
        finally:
            if not kept:
                os.close(handle)

    def _release(self) -> None:
        if self._handle is not None:
            with contextlib.suppress(ValueError):
                _OWNED.remove(Path(os.path.abspath(self.folder)))  # noqa: PTH100 -- as in `_stay_inside`
            with contextlib.suppress(OSError):
                self.path.unlink()
            os.close(self._handle)
            self._handle = None

    def __exit__(self, *_: object) -> None:
        self._release()


# --- provenance -------------------------------------------------------------------------------------------------------------------


PACKAGES = ("jax", "jaxlib", "equinox", "optax", "numpy", "xarray", "netCDF4")
"""Whose versions stand in every result."""


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


@functools.cache
def source_commit() -> str | None:
    """The commit of the checkout that this package is run from, with `-dirty` if files differ from it; None elsewhere."""
    root = Path(__file__).resolve().parent.parent
    if not (root / ".git").exists():
        return None
    command = ["git", "-C", str(root), "describe", "--always", "--abbrev=40", "--dirty", "--exclude=*"]
    try:
        done = subprocess.run(  # noqa: S603 -- fixed words, no shell
            command, capture_output=True, text=True, timeout=5, stdin=subprocess.DEVNULL, check=False
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() or None if done.returncode == 0 else None


def _processor() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def environment() -> dict[str, Any]:
    """What made a result: versions, commit, device, threads and platform, in JSON's types."""
    import jax

    import hybridsim

    device = jax.devices()[0]
    return {
        "hybridsim": hybridsim.__version__,
        "commit": source_commit(),
        "python": platform.python_version(),
        **{name: _version(name) for name in PACKAGES},
        "device": _processor() if device.platform == "cpu" else device.device_kind,
        "backend": device.platform,
        "devices": jax.device_count(),
        "threads": os.cpu_count(),
        "platform": platform.platform(),
    }


def provenance(
    config_hash: str, config: Mapping[str, Any], seed: Any, precision: Any, made_in: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """What every result says of its making: version, commit, configuration and its hash, seed, precision, device, packages.

    **Arguments:** the hash of the configuration and the resolved configuration itself; the `seed` (or several) and the `precision`
    that it was computed with; `made_in`, the `environment()` where the caller has it already.
    """
    found = dict(environment() if made_in is None else made_in)
    return {
        "version": found["hybridsim"],
        "commit": found["commit"],
        "config_hash": config_hash,
        "config": dict(config),
        "seed": seed,
        "precision": precision,
        "device": found["device"],
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "versions": found,
    }


def as_attributes(about: Mapping[str, Any]) -> dict[str, Any]:
    """`provenance` as attributes of a NetCDF file: numbers and words, what is nested as JSON."""
    plain = to_plain(about)
    return {
        name: "" if value is None else json.dumps(value, ensure_ascii=False) if isinstance(value, dict | list) else value
        for name, value in plain.items()
    }
