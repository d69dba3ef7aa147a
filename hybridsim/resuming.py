"""May a computation go on from what is in its folder? Only as the same one: what differs is named.

Beside the state lies what it belongs to: the resolved configuration, the files that it uses, and the versions and the device that
computed it. Another value of something that decides numbers is refused; what does not (a title, a limit to check) is harmless, and
`--force` goes on with it. So it does with other versions or another device, where what follows is as good but not the same to the
last bit.
"""

import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from hybridsim import storage

if TYPE_CHECKING:
    from hybridsim.config import Experiment

BEGUN = "begun.json"

HARMLESS: dict[str, tuple[str, ...]] = {
    "run": ("title", "checks", "compare", "train", "time.statistics_from", "runs.*.title", "runs.*.may_diverge"),
    "training": ("title", "checks", "runs.*.title", "runs.*.may_diverge", "time.statistics_from", "train.log"),
}
"""Keys that decide no number of the state; `*` stands for any one name."""

BITS = ("hybridsim", "sources", "jax", "jaxlib", "equinox", "optax", "numpy", "device", "backend", "devices", "threads")
"""Entries of the environment on which the last bits depend."""


def differences(old: Any, new: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any, Any]]:
    """(key path, old value, new value) of everything that differs between two plain values; None stands for what is not there.

    >>> list(differences({"a": {"b": 1, "c": 2}}, {"a": {"b": 1, "c": 3}, "d": 4}))
    [(('a', 'c'), 2, 3), (('d',), None, 4)]
    """
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        for key in {**old, **new}:
            yield from differences(old.get(key), new.get(key), (*path, str(key)))
    elif old != new:
        yield path, old, new


def is_harmless(path: tuple[str, ...], what: str) -> bool:
    """Whether a key decides no number of a state.

    >>> is_harmless(("runs", "bare", "title"), "run"), is_harmless(("runs", "bare", "dt"), "run")
    (True, False)
    """
    patterns = (pattern.split(".") for pattern in HARMLESS[what])
    return any(len(path) >= len(p) and all(a in ("*", b) for a, b in zip(p, path, strict=False)) for p in patterns)


def may_go_on(folder: Path, experiment: "Experiment", what: Literal["run", "training"], resume: bool, force: bool = False) -> bool:
    """Whether there is a state in `folder` to go on from; changes nothing.

    Raises `StorageError` where `resume` asks to go on with what belongs to another computation.
    """
    marker = folder / BEGUN
    if not (resume and marker.exists()):
        return False
    check_same(folder, storage.read_json(marker), experiment, environment(), what, force)
    return True


def named_before(results: Path, marker: Path) -> dict[str, dict[str, Any]]:
    """What the manifest of `results` names, or what the computation that was interrupted there found named and left as it was.

    `marker`: the file in which a computation says that it has begun; it keeps there, as `earlier`, what is returned here, before
    the manifest goes.
    """
    kept: Any = None
    with contextlib.suppress(storage.StorageError):
        kept = storage.read_json(marker)
    kept = kept.get("earlier") if isinstance(kept, dict) else None
    return {**storage.still_as_named(results, kept if isinstance(kept, dict) else {}), **storage.named_files(results)}


def begin(folder: Path, experiment: "Experiment", earlier: Mapping[str, Any]) -> None:
    """Says in `folder` to what its state belongs, and which files of the results stood before (see `named_before`)."""
    folder.mkdir(exist_ok=True)
    belongs = {"config_hash": experiment.config_hash, "config": experiment.resolved, "files": experiment.files}
    storage.write_json(folder / BEGUN, {**belongs, "environment": environment(), "earlier": earlier})


def environment() -> dict[str, Any]:
    """The versions, the sources and the machine on which the bits depend."""
    return {**storage.environment(), "sources": storage.package_digest()}


def check_same(
    folder: Path, old: Any, experiment: "Experiment", environment: Mapping[str, Any], what: Literal["run", "training"], force: bool
) -> None:
    """Raises `StorageError` with the first thing that differs, unless `force` may overlook all that does."""
    from hybridsim.yaml_reader import key_path, show_value

    if not isinstance(old, dict) or not {"config", "files", "environment"} <= old.keys():
        raise storage.StorageError(f"{folder / BEGUN}: damaged; start again without --resume")
    folder = folder.parent
    way_out = "resume with the same YAML, or start another --out without --resume"
    changed = list(differences(old["config"], storage.to_plain(experiment.resolved, null_for_nonfinite=True)))
    serious = [c for c in changed if not is_harmless(c[0], what)]
    for path, before, now in serious or ([] if force else changed):
        more = f" (and {len(serious or changed) - 1} more)" if len(serious or changed) > 1 else ""
        remedy = way_out if serious else f"it changes no state: --force goes on with it, or {way_out}"
        raise storage.StorageError(
            f"{folder}: holds the state of another configuration: {key_path(path)} was {show_value(before)}, is "
            f"{show_value(now)}{more}; {remedy}"
        )
    for path, before, now in differences(old["files"], experiment.files):
        name = key_path(path)
        happened = "was not used" if before is None else "is no longer used" if now is None else "has changed since"
        raise storage.StorageError(f"{folder}: holds the state of another configuration: the file {name} {happened}; {way_out}")
    if not force:
        check_bits(folder, old["environment"], environment, "--force goes on")


def check_bits(folder: Path, old: Any, now: Mapping[str, Any], way_out: str) -> None:
    """Raises `StorageError` with the first of `BITS` that differs between the environment that was read and that of now."""
    old = old if isinstance(old, Mapping) else {}
    for name in BITS:
        if old.get(name) != now.get(name):
            before, here = (str(found.get(name))[: 12 if name == "sources" else None] for found in (old, now))
            raise storage.StorageError(
                f"{folder}: was computed with {name} {before}, here it is {here}, so the last bits may differ; {way_out}"
            )
