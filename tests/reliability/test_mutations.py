"""R6: what is damaged, swapped, older or foreign is noticed before it is used, and the one before takes its place."""

import shutil
import signal
import warnings

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from commands import leftovers

from hybridsim import storage


def tree(step, width=6):
    return {"z": np.arange(width) * (1 + 1j) * step, "key": jax.random.key(step), "step": step, "t": 0.1 * step}


def bits(tree):
    return [np.asarray(jax.random.key_data(a) if isinstance(a, jax.Array) else a).tobytes() for a in jax.tree.leaves(tree)]


def mutations(data, rng, count):
    """(what, bytes): flipped bits, cuts, additions, exchanged and repeated pieces, zeros; each differs from `data`."""
    n = 0
    while n < count:
        kind, new = ("bit", "cut", "added", "exchanged", "zeros", "byte")[int(rng.integers(6))], bytearray(data)
        i, j = sorted(int(q) for q in rng.integers(0, len(data), 2))
        if kind == "bit":
            new[i] ^= 1 << int(rng.integers(8))
        elif kind == "cut":
            new = new[:i]
        elif kind == "added":
            new[i:i] = bytes(rng.integers(0, 256, int(rng.integers(1, 9)), np.uint8))
        elif kind == "exchanged":
            size = min(8, j - i, len(data) - j)
            new[i : i + size], new[j : j + size] = new[j : j + size], new[i : i + size]
        elif kind == "zeros":
            new[i:j] = bytes(j - i)
        else:
            new[i] = int(rng.integers(256))
        if new != data:
            n += 1
            yield kind, bytes(new)


@pytest.mark.reliability("R6")
@pytest.mark.parametrize("count", [300, pytest.param(20_000, marks=pytest.mark.slow)])
@pytest.mark.parametrize("suffix", [".safetensors", ".json"])
def test_any_mutation_of_a_checkpoint_falls_back(tmp_path, reliability, count, suffix, x64):
    checkpoints = storage.Checkpoints(tmp_path / "c")
    for step in (20, 30):
        checkpoints.save(step, tree(step))
    path, rng, missed = tmp_path / "c" / f"{30:012d}{suffix}", np.random.default_rng(count), []
    good, old = path.read_bytes(), bits(tree(20))
    for kind, data in mutations(good, rng, count):
        path.write_bytes(data)
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            found = checkpoints.latest(tree(0))
        fell_back = found is not None and found[0] == 20 and bits(found[1]) == old and len(said) == 1
        # blanks in a manifest change nothing that it says
        if not fell_back and not (found is not None and suffix == ".json" and storage.read_json(path) == _parsed(good)):
            missed.append((kind, data))
    reliability("R6", not missed, f"checkpoint {suffix}: {[k for k, _ in missed][:5]}", cases=count, failed=len(missed))
    assert not missed


def _parsed(data):
    return storage._parse_json(data, storage.Path("manifest"))


class Net(eqx.Module):
    conv: eqx.nn.Conv1d
    scale: jax.Array

    def __init__(self, seed, width=4):
        self.conv = eqx.nn.Conv1d(2, width, 3, key=jax.random.key(seed))
        self.scale = jnp.asarray(float(seed))


@pytest.mark.reliability("R6")
@pytest.mark.parametrize("count", [300, pytest.param(20_000, marks=pytest.mark.slow)])
def test_any_mutation_of_weights_is_refused(tmp_path, reliability, count):
    path, rng = tmp_path / "w.safetensors", np.random.default_rng(count)
    storage.save_weights(path, Net(1), {"closure": "net", "arguments": {"width": 4}})
    good, fresh, missed = path.read_bytes(), Net(2), []
    for kind, data in mutations(good, rng, count):
        path.write_bytes(data)
        for read in (lambda: storage.load_weights(path, fresh), lambda: storage.read_header(path)):
            try:
                read()
            except storage.StorageError as error:
                if "\n" in str(error) or not str(error).startswith(str(path)):
                    missed.append((kind, str(error)))
            else:
                missed.append((kind, data))
    reliability("R6", not missed, f"weights: {[k for k, _ in missed][:5]}", cases=count, failed=len(missed))
    assert not missed


@pytest.mark.reliability("R6")
@pytest.mark.parametrize("other", ["shape", "dtype", "kind", "missing", "more", "another", "older"])
def test_whole_files_of_something_else(tmp_path, other, x64):
    """Whole and correctly signed, but not what belongs there."""
    checkpoints, place = storage.Checkpoints(tmp_path / "c"), tmp_path / "other"
    for step in (20, 30):
        checkpoints.save(step, tree(step))
    foreign = tree(30)
    if other == "shape":
        foreign = tree(30, 7)
    elif other == "dtype":
        foreign["z"] = foreign["z"].astype(np.complex64)
    elif other == "kind":
        foreign["step"] = 30.0
    elif other == "missing":
        del foreign["t"]
    elif other == "more":
        foreign["more"] = 1
    elif other == "another":
        foreign = {"u": np.zeros(3)}
    storage.Checkpoints(place).save(10 if other == "older" else 30, foreign)
    for suffix in (".safetensors", ".json"):
        shutil.copy(place / f"{10 if other == 'older' else 30:012d}{suffix}", tmp_path / "c" / f"{30:012d}{suffix}")
    with pytest.warns(storage.StorageWarning, match="going on from the checkpoint of step 20"):
        found = checkpoints.latest(tree(0))
    assert found is not None
    assert bits(found[1]) == bits(tree(20))


def interrupted(command, place, saves):
    """A folder whose run was killed after so many checkpoints."""
    command.prepare(place)
    notes = [n for n in command.warm.notes if n["what"] == "call" or (n["what"] == "saved" and n["folder"].startswith("out"))]
    at = [i for i, n in enumerate(notes) if n["what"] == "saved"][saves - 1]
    found = command.start(place, fault={"do": "kill", "at": next(n["call"] for n in notes[at:] if n["what"] == "call")})
    assert found.code == -signal.SIGKILL


def damage(path, how, rng):
    if how == "missing":
        path.unlink()
    elif how == "empty":
        path.write_bytes(b"")
    else:
        path.write_bytes(next(iter(mutations(path.read_bytes(), rng, 1)))[1])


def resumed(command, place, pattern, how, rng):
    """One case: the newest file of a kind is damaged, then the run goes on; what was wrong, or nothing."""
    interrupted(command, place, int(rng.integers(3, 5 if command.name == "run" else 4)))
    files = sorted(p for p in (place / "out").rglob(pattern) if "compiled" not in p.parts and p.stat().st_size)
    files = sorted(files, key=lambda p: p.stat().st_mtime_ns)
    damage(files[-1], how, rng)
    done = command.resume(place)
    if done.code != 0:
        return f"{files[-1].relative_to(place)} {how}: {done.err.strip().splitlines()[-1:]}"
    wrong = command.differences(place) + leftovers(place)
    if "StorageWarning" not in done.err:
        wrong.append("no warning")
    return "; ".join(wrong)


PATTERNS = {
    "run": ("checkpoints/*.safetensors", "checkpoints/*.json", "frames-*.safetensors"),
    "train": ("seed-*/*.safetensors", "seed-*/*.json"),
}


@pytest.mark.reliability("R6")
@pytest.mark.parametrize(
    ("name", "count"),
    [("run", 3), pytest.param("run", 36, marks=pytest.mark.slow), pytest.param("train", 12, marks=pytest.mark.slow)],
)
def test_damaged_files_of_an_interrupted_command(command, tmp_path, name, count, reliability, how_many):
    rng, failures = np.random.default_rng(count), []
    patterns = PATTERNS[name]
    for i in range(how_many(count) if count > 10 else count):
        how = ("changed", "empty", "missing", "changed")[i // len(patterns) % 4]
        wrong = resumed(command(name), tmp_path / f"{i}", patterns[i % len(patterns)], how, rng)
        reliability("R6", not wrong, wrong and f"{name} {wrong}")
        failures += [wrong] * bool(wrong)
    assert not failures, "\n".join(failures)
