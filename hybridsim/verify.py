"""`hybridsim verify`: is every file still what was written? Recomputed from the bytes alone; nothing is simulated again.

A folder is compared with its `manifest.json`; beyond that every file is opened and held against what its kind promises: digests,
checksums, keys, coordinates and units. NetCDF files are read by a process of its own, because a damaged one can bring down the
library that reads it. No content of any file ends this command otherwise than with a line that says what is wrong.
"""

import contextlib
import json
import os
import stat
import string
import subprocess
import sys
import zlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from hybridsim import storage
from hybridsim.journal import Journal
from hybridsim.yaml_reader import ConfigError, parse_yaml

if TYPE_CHECKING:
    from rich.console import Console

SUMMARY = ("name", "device", "precision", "versions", "config_hash", "runs", "checks")
"""Keys that every `summary.json` has."""

OF_A_RUN = ("outcome", "accuracy", "t95", "drift", "seconds_per_unit_time", "parameters", "steps", "dt")
"""Keys that every run in it has."""

OF_A_FILE = ("config_hash", "seed", "version", "commit")
"""Attributes that every run's NetCDF file has."""

SECONDS = 30.0
"""How long one NetCDF file may take to read, and a second for every 10 MiB of it."""

MEMORY = 2**30
"""Bytes that reading one NetCDF file may take; it is read chunk by chunk."""

_MARKS = {True: "✓", False: "✗", None: "!"}
_OURS = (
    storage.MANIFEST,
    *("summary.json", "sweep.json", "bench.json"),
    *("state/begun.json", "training/begun.json", "sweep_begun.json", "bench_begun.json"),
)
"""Files by one of which a folder is known as hybridsim's."""


class Finding(NamedTuple):
    """A line: the file, whether it is good (None: nothing is damaged, but there is something to know), and why."""

    name: str
    good: bool | None
    sentence: str

    def __str__(self) -> str:
        return f"{_MARKS[self.good]} {self.name}: {self.sentence}"


def _one_line(error: BaseException) -> str:
    text = "".join(c if c.isprintable() else " " for c in str(error))
    return " ".join(text.split())[:300] or type(error).__name__


def _guarded(name: str, check: Callable[[], str]) -> Finding:
    """The finding of a check that returns what is good about the file, or raises."""
    try:
        return Finding(name, True, check())
    except (storage.StorageError, ConfigError) as error:
        text = _one_line(error)
        _, found, reason = text.partition(f"{Path(name).name}: ")
        return Finding(name, False, reason if found else text)
    except Exception as error:
        # whatever a file holds, it is the file that is wrong
        return Finding(name, False, f"cannot be read ({type(error).__name__}: {_one_line(error)})")


# --- one file --------------------------------------------------------------------------------------------------------------------


def _arrays(path: Path) -> str:
    meta = storage.verify_tensors(path)
    if "weights" in meta:
        return f"weights of {storage.read_header(path).get('closure', 'a closure')}, digest right"
    return "arrays, digest right"


def _json(path: Path) -> str:
    found = storage.read_json(path)
    if path.name == storage.MANIFEST:
        return f"manifest of {len(storage.read_manifest(path)['files'])} files"
    if path.name == "summary.json":
        missing = [key for key in SUMMARY if key not in found]
        missing += [f"runs.{label}.{key}" for label, run in found.get("runs", {}).items() for key in OF_A_RUN if key not in run]
        if missing:
            raise storage.CorruptError(f"{path.name}: has no {missing[0]}")
        return f"summary of {len(found['runs'])} runs, {len(found['checks'])} checks"
    return "strict JSON"


def _lines(path: Path) -> str:
    lines = path.read_text(encoding="utf-8").splitlines()
    for number, line in enumerate(lines, 1):
        try:
            json.loads(line)
        except (ValueError, RecursionError):
            raise storage.CorruptError(f"{path.name}: line {number} is not JSON") from None
    return f"{len(lines)} records"


def _yaml(path: Path) -> str:
    parse_yaml(path.read_text(encoding="utf-8"), path.name)
    return "YAML"


def _png(path: Path) -> str:
    """Every chunk of a PNG has a checksum."""
    data = path.read_bytes()
    if data[:8] != b"\x89PNG\r\n\x1a\n":
        raise storage.CorruptError(f"{path.name}: no PNG")
    at, kind = 8, b""
    while at + 12 <= len(data) and kind != b"IEND":
        length = int.from_bytes(data[at : at + 4], "big")
        kind, body = data[at + 4 : at + 8], data[at + 4 : at + 8 + length]
        if int.from_bytes(data[at + 8 + length : at + 12 + length], "big") != zlib.crc32(body):
            raise storage.CorruptError(f"{path.name}: damaged (the checksum of a part differs)")
        at += 12 + length
    if kind != b"IEND" or at != len(data):
        raise storage.CorruptError(f"{path.name}: truncated")
    return "picture, checksums right"


def _text(path: Path) -> str:
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".html" and not text.rstrip().endswith("</html>"):
        raise storage.CorruptError(f"{path.name}: truncated")
    return "text"


_KINDS: dict[str, Callable[[Path], str]] = {
    ".safetensors": _arrays,
    ".json": _json,
    ".jsonl": _lines,
    ".yaml": _yaml,
    ".yml": _yaml,
    ".png": _png,
    ".html": _text,
    ".md": _text,
    ".txt": _text,
}
"""Suffix -> what a whole file of that kind must bear; NetCDF files go to a process of their own."""


def fields(path: Path) -> str:
    """What is good about a NetCDF file: every value passed its checksum, and every field says what it is."""
    import netCDF4

    lengths, named, groups = 0, 0, 0
    for name, found in storage.read_fields(path):
        if not isinstance(found, netCDF4.Variable):
            groups += 1
            bare = [d for d in found.dimensions if d not in found.variables and not _counts(found, d)]
            if bare:
                raise storage.CorruptError(f"{path.name}: the dimension {bare[0]!r} has no coordinate")
            missing = [key for key in OF_A_FILE if key not in found.ncattrs()] if found.parent is None else []
            if missing and found.variables:
                raise storage.CorruptError(f"{path.name}: has no attribute {missing[0]}")
            continue
        lengths += found.size
        if found.dtype is str or found.dtype.kind not in "iuf":
            continue
        named += 1
        if not {"units", "long_name"} & set(found.ncattrs()) and found.name not in found.dimensions:
            raise storage.CorruptError(f"{path.name}: {name!r} has neither units nor a long name")
    return f"{lengths} values in {named} fields{f' and {groups - 1} groups' if groups > 1 else ''}, checksums right"


def _counts(group: Any, dimension: str) -> bool:
    """Whether a dimension only numbers things: rounds of a timing, the ends of an interval, samples."""
    return dimension.endswith("_round") or dimension in ("sample", "start", "bound")


class _Fields:
    """NetCDF files, read one after another by a process that may die or hang with any of them."""

    def __init__(self):
        self._process: subprocess.Popen[str] | None = None

    def __call__(self, path: Path) -> str:
        import threading

        if self._process is None or self._process.poll() is not None:
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-m", "hybridsim.verify"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                text=True,
                encoding="utf-8",
                env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
            )
        process = self._process
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write(json.dumps(str(path)) + "\n")
        process.stdin.flush()
        limit = SECONDS + path.stat().st_size / 10e6
        too_late = threading.Event()

        def end() -> None:
            too_late.set()
            process.kill()

        late = threading.Timer(limit, end)
        late.start()
        answer = process.stdout.readline()
        late.cancel()
        if not answer:
            number = process.wait()
            self.close()
            how = f"did not end in {limit:.0f} s" if too_late.is_set() else f"ended the reader ({number})"
            raise storage.CorruptError(f"{path.name}: reading it {how}")
        good, sentence = json.loads(answer)
        if not good:
            raise storage.CorruptError(sentence)
        return sentence

    def close(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            for pipe in (self._process.stdin, self._process.stdout):
                if pipe is not None:
                    pipe.close()
        self._process = None


def _serve() -> None:
    """The process that reads NetCDF files: a path per line in, `[good, sentence]` per line out; with a bound on its memory."""
    import netCDF4  # noqa: F401 -- what it takes is not of the file

    with contextlib.suppress(ImportError, OSError, ValueError):
        import resource

        pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0])
        resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + MEMORY, resource.RLIM_INFINITY))
    for line in sys.stdin:
        path = Path(json.loads(line))
        finding = _guarded(path.name, lambda path=path: fields(path))
        sys.stdout.write(json.dumps([bool(finding.good), finding.sentence]) + "\n")
        sys.stdout.flush()


# --- a folder --------------------------------------------------------------------------------------------------------------------


class _Folder:
    """What is found in one folder and below it."""

    def __init__(self, root: Path, read_fields: _Fields):
        self.root, self.read_fields = root, read_fields
        self.findings: list[Finding] = []
        self.seen: set[Path] = set()

    def name(self, path: Path) -> str:
        return path.relative_to(self.root).as_posix()

    def content(self, path: Path, promised: str = "") -> Finding:
        """One file against what its kind promises; `promised` says what its manifest has confirmed already."""
        check = self.read_fields if path.suffix == ".nc" else _KINDS.get(path.suffix)
        if check is None:
            return Finding(self.name(path), True if promised else None, promised or "of no kind that hybridsim writes")
        found = _guarded(path.name, lambda: check(path))
        sentence = f"{promised}, {found.sentence}" if promised and found.good else found.sentence
        return Finding(self.name(path), found.good, sentence)

    def add(self, path: Path, finding: Finding) -> None:
        self.seen.add(path)
        self.findings.append(finding)

    def manifest(self, path: Path) -> None:
        """Every file that a manifest names: there, as long, and with the same SHA-256."""
        top = path.parent
        finding = _guarded(self.name(path), lambda: _json(path))
        self.add(path, finding)
        if not finding.good:
            return
        found = storage.read_manifest(path)
        for name, entry in found["files"].items():
            file = top / name
            if file in self.seen:
                continue
            wrong = _difference(file, entry)
            self.add(file, self.content(file, "as written") if wrong is None else Finding(self.name(file), False, wrong))
        if found.get("command") in ("run", "train"):
            self.configuration(top, found)

    def configuration(self, top: Path, manifest: Mapping[str, Any]) -> None:
        """Whether the configuration that stands there is the one that everything else names."""

        def check() -> str:
            resolved = parse_yaml((top / "config.yaml").read_text(encoding="utf-8"), "config.yaml")
            found = storage.config_digest(resolved, manifest.get("inputs", {}))
            if found != manifest["config_hash"]:
                raise storage.CorruptError(f"its hash is {found[:12]}, the manifest says {manifest['config_hash'][:12]}")
            summary = top / "summary.json"
            if manifest.get("command") == "run" and (said := storage.read_json(summary)["config_hash"]) != found:
                raise storage.CorruptError(f"its hash is {found[:12]}, summary.json says {said[:12]}")
            return f"hash {found[:12]}, as the results say"

        self.findings.append(_guarded(self.name(top / "config.yaml"), check))

    def checkpoints(self, folder: Path) -> None:
        """Every checkpoint of a folder against its own manifest."""
        checkpoints = storage.Checkpoints(folder)
        journal = _journal_of(folder)
        whole: list[int] = []
        for step in checkpoints.steps():
            arrays, manifest = checkpoints.paths(step)

            def check(step: int = step) -> str:
                checkpoints.verify(step)
                if journal is not None:
                    journal.read_pieces(step)
                return f"checkpoint of step {step}, whole"

            finding = _guarded(self.name(arrays), check)
            whole += [step] if finding.good else []
            self.add(arrays, finding)
            self.seen.add(manifest)
        damaged = [step for step in checkpoints.steps() if step not in whole]
        if damaged and whole:
            sentence = f"--resume goes on from the checkpoint of step {max(whole)}"
            self.findings.append(Finding(self.name(folder), None, sentence))


def _journal_of(folder: Path) -> Journal | None:
    """The frames that go with the checkpoints of a run, which are worth nothing without; a training has none."""
    return Journal(folder.parent) if folder.name == "checkpoints" else None


def _difference(file: Path, entry: Mapping[str, Any]) -> str | None:
    """How a file differs from its entry in a manifest, in words."""
    try:
        found = file.stat()
        if not stat.S_ISREG(found.st_mode):
            return "is no file"
        if found.st_size != entry["bytes"]:
            how = "truncated" if found.st_size < entry["bytes"] else "changed"
            return f"{how}: {found.st_size} bytes instead of {entry['bytes']}"
        return None if storage.sha256(file) == entry["sha256"] else "changed: its SHA-256 is not that of the manifest"
    except FileNotFoundError:
        return "missing"
    except (OSError, ValueError, storage.StorageError) as error:
        return f"cannot be read ({_one_line(error)})"


def _walk(root: Path) -> Iterator[Path]:
    """Everything below a folder that is no folder, in order; symbolic links are not followed."""
    for place, folders, files in os.walk(root):
        links = [name for name in folders if (Path(place) / name).is_symlink()]
        folders[:] = sorted(name for name in folders if name not in links)
        yield from (Path(place) / name for name in sorted([*files, *links]))


def _checkpoint_folders(paths: list[Path]) -> list[Path]:
    found = {p.parent for p in paths if p.suffix == ".json" and p.stem and set(p.stem) <= set(string.digits)}
    return sorted(found)


def verify_folder(folder: Path) -> list[Finding]:
    """A line for every file of a folder of results; `ConfigError` where it is none."""
    paths = list(_walk(folder))
    checkpoints = _checkpoint_folders(paths)
    if not any((folder / name).is_file() for name in _OURS) and not checkpoints:
        raise ConfigError(f"{folder}: there is nothing of hybridsim in this folder; name a folder of results")
    reader = _Fields()
    try:
        return _verified(folder, paths, checkpoints, reader)
    finally:
        reader.close()


def _verified(folder: Path, paths: list[Path], checkpoints: list[Path], reader: _Fields) -> list[Finding]:
    found = _Folder(folder, reader)
    if (folder / ".lock").is_file():
        found.findings.append(Finding(".lock", None, _owner(folder / ".lock")))
    if (folder / storage.MANIFEST).is_file():
        found.manifest(folder / storage.MANIFEST)
    else:
        found.findings.append(_without_manifest(folder))
    for path in paths:
        if path.name == storage.MANIFEST and path.is_file() and path.parent != folder:
            found.manifest(path)
    for place in checkpoints:
        if any(path not in found.seen for path in place.glob("*.json")):
            found.checkpoints(place)
    named = (folder / storage.MANIFEST).is_file()
    for path in paths:
        if path in found.seen or path.name in (".lock", "log.txt"):
            continue
        if path.is_symlink() or not path.is_file():
            found.add(path, Finding(found.name(path), None, "a symbolic link or no file, left aside"))
        elif storage.is_leftover(path.name):
            found.add(path, Finding(found.name(path), None, "left by a process that was killed; the next run removes it"))
        elif any(storage.is_state(parent) for parent in path.parents if parent != folder and parent.is_relative_to(folder)):
            found.add(path, found.content(path))
        else:
            finding = found.content(path)
            known = named and finding.good
            found.add(path, Finding(finding.name, None, f"not named, {finding.sentence}") if known else finding)
    return found.findings


def _owner(lock: Path) -> str:
    try:
        owner = json.loads(lock.read_bytes()[:4096])
        return f"process {int(owner['pid'])} on {str(owner['host'])[:80]} is or was at work here; what it writes changes meanwhile"
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return "a process is or was at work here"


def _without_manifest(folder: Path) -> Finding:
    state, training = folder / "state" / "begun.json", folder / "training" / "begun.json"
    if state.is_file() or (folder / "bench_begun.json").is_file():
        return Finding(".", None, "unfinished: go on with --resume")
    if training.is_file() or (folder / "sweep_begun.json").is_file():
        return Finding(".", None, "unfinished: go on with --resume (or finished by a version that wrote no manifests)")
    return Finding(".", None, f"no {storage.MANIFEST}: unfinished, or of a version before it; each file is checked by itself")


def verify_file(path: Path) -> list[Finding]:
    """One file: weights, a checkpoint (by either of its two files), a NetCDF file, or any other kind that hybridsim writes."""
    reader = _Fields()
    try:
        found = _Folder(path.parent, reader)
        beside = path.with_suffix(".json")
        if path.stem and set(path.stem) <= set(string.digits) and beside.is_file():
            step = int(path.stem)

            def check() -> str:
                storage.Checkpoints(path.parent).verify(step)
                if (journal := _journal_of(path.absolute().parent)) is not None:
                    journal.read_pieces(step)
                return f"checkpoint of step {step}, whole"

            return [_guarded(path.name, check)]
        if path.suffix != ".nc" and path.suffix not in _KINDS:
            raise ConfigError(f"{path}: hybridsim writes no such files; possible are .nc, {', '.join(_KINDS)}")
        if not path.is_file():
            raise ConfigError(f"{path}: this is no file")
        return [found.content(path)]
    finally:
        reader.close()


def verify_cache(folder: Path) -> list[Finding]:
    """Every entry of the cache against its digest and its key; compiled programs are JAX's own, and not looked at."""
    findings = []
    for path in _walk(folder):
        name = path.relative_to(folder)
        if name.parts[0] == "compiled":
            continue
        if storage.is_leftover(path.name):
            findings.append(Finding(name.as_posix(), None, "left by a process that was killed; old ones are removed in time"))
        elif name.parts[0] == "unfinished":
            continue  # below, with what belongs to it
        elif path.suffix == ".safetensors" and not path.is_symlink():
            findings.append(_guarded(name.as_posix(), lambda path=path: _entry(path)))
    findings += [
        _guarded(place.relative_to(folder).as_posix(), lambda place=place: _chunks(place))
        for place in sorted(folder.glob("*/*.zarr"))
        if place.is_dir() and not place.is_symlink()
    ]
    return findings + _unfinished(folder) or [Finding(str(folder), True, "the cache is empty")]


def _unfinished(cache: Path) -> list[Finding]:
    """What interrupted fine runs have left, from which the next one of the same recipe goes on."""
    reader = _Fields()
    try:
        found = _Folder(cache, reader)
        for place in _checkpoint_folders(list(_walk(cache / "unfinished"))):
            found.checkpoints(place)
        for path in _walk(cache / "unfinished"):
            if path.suffix == ".safetensors" and path not in found.seen and not path.is_symlink():
                found.add(path, found.content(path))
        return found.findings
    finally:
        reader.close()


def _entry(path: Path) -> str:
    meta = storage.verify_tensors(path)
    if meta.get("key") != path.stem:
        raise storage.CorruptError(f"{path.name}: holds the entry of another key; remove it, and it is made anew")
    return "as written"


def _chunks(folder: Path) -> str:
    """A Zarr array: each of its chunks bears a checksum, which is seen as it is read."""
    from hybridsim.windows import Zarr

    windows = Zarr(folder, keep=1)
    count, frames = windows.shape[:2]
    for trajectory in range(count):
        for first in range(0, frames, windows.array.chunks[1]):
            windows.read(trajectory, first, min(first + windows.array.chunks[1], frames))
    return f"{count} trajectories, checksums right"


# --- the command -----------------------------------------------------------------------------------------------------------------


def verify_command(target: Path | None, cache: bool, console: "Console") -> int:
    """Everything that `hybridsim verify` does: a line per file; 0 where nothing is damaged, 1 where something is."""
    if cache == (target is not None):
        raise ConfigError("verify: name a folder, a file, or --cache")
    if target is None:
        folder = storage.cache_folder()
        findings = verify_cache(folder)
    elif target.is_dir():
        findings = verify_folder(target)
    elif target.exists():
        findings = verify_file(target)
    else:
        raise ConfigError(f"{target}: there is no such folder or file")
    for finding in findings:
        console.print(str(finding), markup=False, soft_wrap=True)
    damaged = sum(finding.good is False for finding in findings)
    good = sum(finding.good is True for finding in findings)
    noted = sum(finding.good is None for finding in findings)
    console.print(f"{good} good, {damaged} damaged" + (f", {noted} to know of" if noted else ""), markup=False)
    return 1 if damaged else 0


if __name__ == "__main__":
    _serve()
