"""What is stored comes back bit for bit, or is refused; the old file survives every fault of the writer."""

import contextlib
import errno
import json
import os
import resource
import signal
import subprocess
import sys
import time
import tracemalloc
import warnings

import equinox as eqx
import hypothesis
import hypothesis.extra.numpy as hnp
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
import xarray as xr

from hybridsim import storage

DTYPES = [
    *("bool", "int8", "uint8", "int16", "uint16", "int32", "uint32", "int64", "uint64"),
    *("float16", "float32", "float64", "complex64", "complex128", "bfloat16"),
]


def dtype_of(name):
    return np.dtype(ml_dtypes.bfloat16) if name == "bfloat16" else np.dtype(name)


def bits(leaf):
    if hasattr(leaf, "dtype") and jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        return "key", str(jax.random.key_impl(leaf)), bits(jax.random.key_data(leaf))
    array = np.asarray(leaf)
    return type(leaf) if isinstance(leaf, bool | int | float | complex) else array.dtype, array.shape, array.tobytes()


def assert_same(one, two):
    assert jax.tree.structure(one) == jax.tree.structure(two)
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(two), strict=True):
        assert bits(a) == bits(b)


def one_line(error):
    text = str(error.value)
    assert "\n" not in text
    assert "Traceback" not in text
    return text


# --- atomic writing


def test_atomic_write_replaces_and_leaves_nothing_behind(tmp_path):
    path = tmp_path / "new" / "folder" / "file.txt"
    storage.atomic_write(path, "eins ü\n")
    storage.atomic_write(path, b"zwei")
    assert path.read_bytes() == b"zwei"
    assert [p.name for p in path.parent.iterdir()] == ["file.txt"]
    mask = os.umask(0)
    os.umask(mask)
    assert path.stat().st_mode & 0o777 == 0o666 & ~mask


WRITERS = {
    "text": lambda path, n: storage.atomic_write(path, f"{n}" * 1000),
    "json": lambda path, n: storage.write_json(path, {"n": n}),
    "tree": lambda path, n: storage.save_tree(path, {"a": np.full(1000, n)}),
    "weights": lambda path, n: storage.save_weights(path, {"a": np.full(1000, float(n))}, {}),
    "dataset": lambda path, n: storage.save_dataset(path, xr.Dataset({"a": ("x", np.arange(9000.0) * n)})),
}


@pytest.mark.reliability("R2")
@pytest.mark.parametrize("writer", WRITERS)
@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO, errno.EACCES, errno.EROFS, errno.EDQUOT])
@pytest.mark.parametrize("call", ["open", "fsync", "replace"])
def test_a_failing_call_keeps_the_old_file(tmp_path, monkeypatch, call, code, writer):
    path = tmp_path / "file"
    WRITERS[writer](path, 1)
    before = path.read_bytes()
    true = getattr(os, call)

    def fail(*args, **kwargs):
        if call == "open" and "part" not in str(args[0]):
            return true(*args, **kwargs)
        raise OSError(code, os.strerror(code))

    with monkeypatch.context() as patch:
        patch.setattr(storage.os, call, fail)
        with pytest.raises(storage.StorageError) as error:
            WRITERS[writer](path, 2)
    text = one_line(error)
    assert text.startswith(f"{path}: ")
    assert os.strerror(code) in text
    assert "; " in text.partition(os.strerror(code))[2]  # a remedy
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.reliability("R2")
@pytest.mark.parametrize("writer", WRITERS)
def test_a_write_beyond_the_file_size_limit_keeps_the_old_file(tmp_path, writer):
    """A real fault of the operating system in the middle of the data."""
    path = tmp_path / "file"
    WRITERS[writer](path, 1)
    before = path.read_bytes()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (5, hard))
    try:
        with pytest.raises(storage.StorageError) as error:
            WRITERS[writer](path, 2)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert one_line(error).startswith(f"{path}: cannot write")
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.reliability("R2")
def test_a_failing_sync_of_the_folder_is_reported(tmp_path, monkeypatch):
    true, calls = os.fsync, []

    def fail(handle):
        calls.append(handle)
        if len(calls) == 2:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        true(handle)

    monkeypatch.setattr(storage.os, "fsync", fail)
    with pytest.raises(storage.StorageError, match="check the disk"):
        storage.atomic_write(tmp_path / "file", b"new")
    assert (tmp_path / "file").read_bytes() == b"new"


def test_an_interrupt_inside_the_block_keeps_the_old_file(tmp_path):
    path = tmp_path / "file"
    storage.atomic_write(path, b"old")

    def half():
        with storage.atomic_path(path) as temporary:
            temporary.write_bytes(b"ha")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        half()
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_folder_in_the_way_and_a_file_as_folder_are_refused(tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_text("x")
    with pytest.raises(storage.StorageError, match="choose another name"):
        storage.atomic_write(tmp_path / "folder", b"x")
    with pytest.raises(storage.StorageError, match="choose another"):
        storage.atomic_write(tmp_path / "file" / "below", b"x")


KILLED = """
import itertools, sys
import numpy as np
from hybridsim import storage
checkpoints = storage.Checkpoints(sys.argv[1])
for step in itertools.count(1):
    checkpoints.save(step, {"u": np.full(40_000, step), "step": step})
    print(step, flush=True)
"""


@pytest.mark.reliability("R1")
@pytest.mark.filterwarnings("ignore:.*has no manifest")
def test_kill_9_loses_nothing_that_was_acknowledged(tmp_path):
    like = {"u": np.zeros(40_000, int), "step": 0}
    for trial in range(3):
        folder = tmp_path / str(trial)
        process = subprocess.Popen([sys.executable, "-c", KILLED, str(folder)], stdout=subprocess.PIPE, text=True)
        assert process.stdout is not None
        process.stdout.readline()
        time.sleep(0.05 + 0.037 * trial)
        process.kill()
        acknowledged = [int(line) for line in process.stdout.read().split() or [1]]
        assert process.wait() == -signal.SIGKILL
        process.stdout.close()
        found = storage.Checkpoints(folder).latest(like)
        assert found is not None
        step, tree, _ = found
        assert step >= acknowledged[-1]
        assert_same(tree, {"u": np.full(40_000, step), "step": step})
        with storage.FolderLock(folder):
            assert not [p for p in folder.iterdir() if p.suffix == ".part"]


# --- JSON


def test_json_round_trip_and_nulls(tmp_path):
    path = tmp_path / "a.json"
    value = {"z": 1, "a": [np.float32(0.5), np.int64(3), np.bool_(True)], "nan": float("nan"), "inf": np.inf, "jax": jnp.arange(2)}
    storage.write_json(path, value)
    read = storage.read_json(path)
    assert read == {"z": 1, "a": [0.5, 3, True], "nan": None, "inf": None, "jax": [0, 1]}
    assert list(read) == list(value)
    with pytest.raises(TypeError, match=r"a\[1\].b: object"):
        storage.write_json(path, {"a": [0, {"b": object()}]})
    assert storage.read_json(path) == read


@pytest.mark.parametrize("text", ['{"a": NaN}', '{"a": 1, "a": 2}', "{", "", "[" * 100_000, "\xff"])
def test_what_is_not_json_is_refused(tmp_path, text):
    (tmp_path / "a.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(storage.CorruptError) as error:
        storage.read_json(tmp_path / "a.json")
    assert len(one_line(error)) < 300


# --- trees


@pytest.mark.parametrize("shape", [(), (0,), (3,), (2, 0, 3), (4, 1, 5)])
@pytest.mark.parametrize("name", DTYPES)
def test_every_dtype_comes_back_bit_for_bit(tmp_path, name, shape, rng, x64):
    dtype = dtype_of(name)
    raw = rng.integers(0, 2 if name == "bool" else 256, int(np.prod(shape)) * dtype.itemsize, dtype=np.uint8)
    array = raw.view(dtype).reshape(shape)  # NaN payloads and denormal numbers included
    tree = {"numpy": array, "jax": jnp.asarray(array), "strided": np.asarray(np.stack([array, array], -1)[..., 0])}
    storage.save_tree(tmp_path / "t.safetensors", tree)
    loaded, _ = storage.load_tree(tmp_path / "t.safetensors", jax.tree.map(lambda a: a, tree))
    assert_same(tree, loaded)
    assert isinstance(loaded["numpy"], np.ndarray)
    assert isinstance(loaded["jax"], jax.Array)
    abstract = {k: jax.ShapeDtypeStruct(array.shape, array.dtype) for k in tree}
    assert_same(storage.load_tree(tmp_path / "t.safetensors", abstract)[0]["jax"], tree["jax"])


def test_numbers_keys_and_functions(tmp_path, x64):
    tree = {
        "key": jax.random.key(3),
        "keys": jax.random.split(jax.random.key(4, impl="rbg"), (2, 3)),
        "numbers": (True, -(2**62), 0.1, -0.0, 1 - 2j, float("inf")),
        "scalar": np.float64(0.3),
        "big-endian": np.arange(3, dtype=">f8"),
        "module": eqx.nn.MLP(2, 2, 4, 1, key=jax.random.key(1)),
        "none": None,
        "weak": jnp.asarray(0.5),
    }
    meta = {"time": 0.1 + 0.2, "nested": {"list": [1, 2.5, None, "ü"]}}
    digest = storage.save_tree(tmp_path / "t", tree, meta)
    loaded, notes = storage.load_tree(tmp_path / "t", tree)
    little = {**tree, "big-endian": tree["big-endian"].astype("<f8")}
    assert_same(little, loaded)
    assert notes == meta
    assert loaded["weak"].weak_type
    assert loaded["module"].activation is tree["module"].activation
    assert jnp.array_equal(jax.random.normal(loaded["keys"][1, 2]), jax.random.normal(tree["keys"][1, 2]))
    assert storage.save_tree(tmp_path / "again", tree, meta) == digest
    assert (tmp_path / "t").read_bytes() == (tmp_path / "again").read_bytes()


leaves = st.one_of(
    st.integers(-(2**63), 2**63 - 1),
    st.floats(),
    st.booleans(),
    st.complex_numbers(),
    hnp.arrays(
        st.sampled_from([dtype_of(n) for n in DTYPES if n != "bfloat16"]), hnp.array_shapes(min_dims=0, min_side=0, max_side=3)
    ),
)
trees = st.recursive(
    leaves, lambda t: st.lists(t, max_size=3) | st.dictionaries(st.text(max_size=4), t, max_size=3) | st.tuples(t, t), max_leaves=8
)


@hypothesis.settings(max_examples=60, deadline=None, suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture])
@hypothesis.given(trees)
def test_any_tree_comes_back(tmp_path, tree):
    path = tmp_path / "t.safetensors"
    storage.save_tree(path, tree)
    assert_same(storage.load_tree(path, tree)[0], tree)
    safetensors.numpy.load_file(path)  # any safetensors reader understands the file


@pytest.mark.parametrize(
    ("like", "sentence"),
    [
        ({"a": np.zeros((2, 3), np.float32)}, "it holds 'b'"),
        ({"a": np.zeros((2, 3), np.float32), "b": 1, "c": 2}, "'c'] is missing"),
        ({"a": np.zeros((3, 2), np.float32), "b": 1}, "is float32 (2, 3), expected float32 (3, 2)"),
        ({"a": np.zeros((2, 3), np.float64), "b": 1}, "is float32 (2, 3), expected float64 (2, 3)"),
        ({"a": np.zeros((2, 3), np.float32), "b": 1.0}, "is a python int number, expected a python float number"),
        ({"a": np.zeros((2, 3), np.complex64), "b": 1}, "is float32 (2, 3), expected complex64 (2, 3)"),
        ({"a": np.zeros((2, 3), np.float32), "b": np.int64(1)}, "expected int64 ()"),
    ],
)
def test_what_does_not_fit_is_refused(tmp_path, like, sentence):
    storage.save_tree(tmp_path / "t", {"a": np.zeros((2, 3), np.float32), "b": 1})
    with pytest.raises(storage.StorageError) as error:
        storage.load_tree(tmp_path / "t", like)
    assert sentence.replace("'c']", "\"['c']\"") in one_line(error).replace("\"['b']\"", "'b'")


def test_what_cannot_be_stored_is_refused(tmp_path):
    for tree, sentence in [
        ({"a": "text"}, "str cannot be stored"),
        ({"a": np.array([object()])}, "object cannot be stored"),
        ({"a": np.array(["x"])}, "cannot be stored"),
        ({"a": 2**70}, "64 bits"),
    ]:
        with pytest.raises(storage.StorageError, match=sentence):
            storage.save_tree(tmp_path / "t", tree)
    with pytest.raises(storage.StorageError, match="x: nan has no place in JSON"):
        storage.save_tree(tmp_path / "t", {}, {"x": float("nan")})
    assert not list(tmp_path.iterdir())


def test_what_could_not_be_read_is_not_written(tmp_path, monkeypatch):
    monkeypatch.setattr(storage, "MOST_JSON_VALUES", 1000)
    storage.save_tree(tmp_path / "t", {"a": 1}, {"history": [0] * (storage.MOST_JSON_VALUES - 10)})
    assert len(storage.load_tree(tmp_path / "t", {"a": 0})[1]["history"]) == storage.MOST_JSON_VALUES - 10
    with pytest.raises(storage.StorageError, match="at most 1000 are read"):
        storage.save_tree(tmp_path / "t", {"a": 2}, {"history": [0] * (storage.MOST_JSON_VALUES + 1)})
    assert storage.load_tree(tmp_path / "t", {"a": 0})[0] == {"a": 1}


def test_double_precision_is_never_cut_silently(tmp_path):
    storage.save_tree(tmp_path / "t", {"a": np.zeros(2)})
    with pytest.raises(storage.StorageError, match="jax_enable_x64"):
        storage.load_tree(tmp_path / "t", {"a": jax.ShapeDtypeStruct((2,), np.float64)})


def test_a_flipped_bit_in_any_byte_and_every_truncation_are_noticed(tmp_path):
    """The digest covers the whole file, so one bit of every byte, each of the eight places in turn, stands for all."""
    tree = {"u": np.linspace(0, 1, 4, dtype=np.float32), "z": np.ones(2, np.complex64), "n": 3}
    path = tmp_path / "t"
    storage.save_tree(path, tree, {"step": 3})
    good = path.read_bytes()
    for position in range(len(good)):
        data = bytearray(good)
        data[position] ^= 1 << position % 8
        path.write_bytes(data)
        with pytest.raises(storage.StorageError):
            storage.load_tree(path, tree)
    for size in range(0, len(good), 3):
        path.write_bytes(good[:size])
        with pytest.raises(storage.StorageError):
            storage.load_tree(path, tree)
    path.write_bytes(good + b"\0")
    with pytest.raises(storage.StorageError):
        storage.load_tree(path, tree)
    path.write_bytes(good)
    assert_same(storage.load_tree(path, tree)[0], tree)


def hostile_headers():
    def file(header, payload=b""):
        text = header if isinstance(header, bytes) else json.dumps(header, separators=(",", ":")).encode()
        return len(text).to_bytes(8, "little") + text + payload

    meta = {"sha256": "0" * 64, "format": storage.FORMAT, "kinds": "{}", "meta": "{}"}
    opening = b'{"__metadata__":{"sha256":"' + b"0" * 64 + b'"'
    yield "empty", b""
    yield "length 2^64", b"\xff" * 8 + b"{}"
    yield "length 1 TiB", (2**40).to_bytes(8, "little") + b"{}"
    yield "pickle", b"\x80\x04\x95\x1a\x00\x00\x00\x00\x00\x00\x00\x8c\x05posix\x8c\x06system\x93\x8c\x02id\x85R."
    yield "zip", b"PK\x03\x04" + b"\0" * 60
    yield "no digest", file({"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}, b"1234")
    yield "deep", file(opening + b"," + b'"a":' + b"[" * 1_000_000)
    yield "deep notes", file({"__metadata__": {**meta, "meta": "[" * 500_000}})
    yield "huge shape", file({"__metadata__": meta, "a": {"dtype": "F32", "shape": [2**62, 4], "data_offsets": [0, 16]}}, b"1" * 16)
    yield (
        "negative shape",
        file({"__metadata__": meta, "a": {"dtype": "F32", "shape": [-1, -4], "data_offsets": [0, 16]}}, b"1" * 16),
    )
    yield "float shape", file({"__metadata__": meta, "a": {"dtype": "F32", "shape": [4.0], "data_offsets": [0, 16]}}, b"1" * 16)
    yield "object dtype", file({"__metadata__": meta, "a": {"dtype": "O", "shape": [2], "data_offsets": [0, 16]}}, b"1" * 16)
    yield (
        "overlap",
        file({"__metadata__": meta, **{k: {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]} for k in "ab"}}, b"1" * 8),
    )
    yield "no entries", file({"__metadata__": meta, "a": 3})
    yield "a list", file(opening + b"}]")
    yield "strange types", file({"__metadata__": {**meta, "kinds": "3"}})
    yield "beyond the end", file({"__metadata__": meta, "a": {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}}, b"1" * 8)


@pytest.mark.reliability("R7")
@pytest.mark.parametrize(("name", "data"), list(hostile_headers()), ids=lambda v: v if isinstance(v, str) else "")
def test_hostile_files_are_refused_quickly(tmp_path, name, data):
    path = tmp_path / "hostile.safetensors"
    path.write_bytes(data)
    for read in (storage.read_header, lambda p: storage.load_tree(p, {"a": np.zeros(4, np.float32)})):
        tracemalloc.start()
        start = time.perf_counter()
        with pytest.raises(storage.CorruptError) as error:
            read(path)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert time.perf_counter() - start < 2
        assert peak < 100 * 2**20
        assert len(one_line(error)) < 500


# --- checkpoints


def state(step):
    return {"z": np.arange(6) * (1 + 1j) * step, "key": jax.random.key(step), "step": step}


def test_checkpoints_keep_the_last_two(tmp_path):
    checkpoints = storage.Checkpoints(tmp_path / "c")
    assert checkpoints.latest(state(0)) is None
    for step in (10, 20, 30):
        checkpoints.save(step, state(step), {"t": step / 10})
    assert checkpoints.steps() == [20, 30]
    found = checkpoints.latest(state(0))
    assert found is not None
    assert found[0] == 30
    assert found[2] == {"t": 3.0}
    assert_same(found[1], state(30))
    checkpoints.save(25, state(25))  # gone back: 30 belongs to a history that is given up
    assert checkpoints.steps() == [20, 25]
    checkpoints.clear()
    assert checkpoints.latest(state(0)) is None
    assert not list((tmp_path / "c").iterdir())


def damage(folder, how):
    new, old = folder / f"{30:012d}.safetensors", folder / f"{20:012d}.safetensors"
    manifest = new.with_suffix(".json")
    if how == "truncated":
        new.write_bytes(new.read_bytes()[:-5])
    elif how == "bit":
        data = bytearray(new.read_bytes())
        data[len(data) // 2] ^= 1
        new.write_bytes(data)
    elif how == "swapped":
        new.write_bytes(old.read_bytes())
    elif how == "swapped with its manifest":
        new.write_bytes(old.read_bytes())
        manifest.write_bytes(old.with_suffix(".json").read_bytes())
    elif how == "swapped with a new manifest":
        new.write_bytes(old.read_bytes())
        storage.write_json(manifest, {"step": 30, "bytes": new.stat().st_size, "sha256": storage.sha256(new)})
    elif how == "another run's":
        storage.save_tree(new, state(31), {"step": 30, "meta": {}})
    elif how == "missing":
        new.unlink()
    elif how == "shape":
        storage.Checkpoints(folder).save(30, {**state(30), "z": np.zeros(7, complex)})
    elif how == "dtype":
        storage.Checkpoints(folder).save(30, {**state(30), "z": np.zeros(6, np.complex64)})
    else:
        manifest.write_text(how)


@pytest.mark.reliability("R6")
@pytest.mark.parametrize(
    "how",
    [
        *("truncated", "bit", "swapped", "swapped with its manifest", "swapped with a new manifest", "another run's", "missing"),
        *("shape", "dtype", "", "{}", "[]", "null", '{"step": 30, "bytes": "x", "sha256": 3}'),
    ],
)
def test_a_bad_checkpoint_falls_back_to_the_previous_one(tmp_path, how):
    checkpoints = storage.Checkpoints(tmp_path)
    checkpoints.save(20, state(20))
    checkpoints.save(30, state(30))
    damage(tmp_path, how)
    with pytest.warns(storage.StorageWarning, match="going on from the checkpoint of step 20"):
        found = checkpoints.latest(state(0))
    assert found is not None
    assert_same(found[1], state(20))
    (tmp_path / f"{20:012d}.safetensors").write_bytes(b"")
    with pytest.raises(storage.StorageError, match="no checkpoint can be used"):
        checkpoints.latest(state(0))


@pytest.mark.reliability("R6")
def test_every_flipped_bit_of_a_manifest_is_noticed(tmp_path):
    checkpoints = storage.Checkpoints(tmp_path)
    checkpoints.save(30, {"a": 1})
    manifest = tmp_path / f"{30:012d}.json"
    good = manifest.read_bytes()
    for position in range(len(good)):
        for bit in range(8):
            data = bytearray(good)
            data[position] ^= 1 << bit
            manifest.write_bytes(data)
            with pytest.raises(storage.StorageError):
                checkpoints.latest({"a": 0})


@pytest.mark.reliability("R2")
@pytest.mark.parametrize("call", ["fsync", "replace"])
@pytest.mark.parametrize("nth", [1, 2, 3, 4])
def test_a_failing_checkpoint_leaves_the_previous_one(tmp_path, monkeypatch, call, nth):
    checkpoints = storage.Checkpoints(tmp_path)
    checkpoints.save(20, state(20))
    true, calls = getattr(os, call), []

    def fail(*args):
        calls.append(args)
        if len(calls) == nth:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return true(*args)

    with monkeypatch.context() as patch:
        patch.setattr(storage.os, call, fail)
        if call == "replace" and nth > 2:
            checkpoints.save(30, state(30))
        else:
            with pytest.raises(storage.StorageError, match="disk is full"):
                checkpoints.save(30, state(30))
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        found = checkpoints.latest(state(0))
    assert found is not None
    assert_same(found[1], state(found[0]))
    arrays, manifest = checkpoints.paths(30)
    assert ["has no manifest" in str(warning.message) for warning in said] == [True] * (arrays.exists() and not manifest.exists())


# --- weights


class Net(eqx.Module):
    conv: eqx.nn.Conv2d
    scale: jax.Array
    steps: jax.Array
    gain: jax.Array
    name: str = eqx.field(static=True, default="net")

    def __init__(self, seed, width=4):
        self.conv = eqx.nn.Conv2d(2, width, 3, key=jax.random.key(seed))
        self.scale = jnp.asarray(seed, float)
        self.steps = jnp.asarray(seed)
        self.gain = jnp.asarray(0.5)


def test_weights_round_trip(tmp_path):
    path = tmp_path / "w.safetensors"
    digest = storage.save_weights(path, Net(1), {"config": {"width": 4}})
    loaded = storage.load_weights(path, Net(2))
    assert_same(eqx.filter(loaded, eqx.is_inexact_array), eqx.filter(Net(1), eqx.is_inexact_array))
    assert int(loaded.steps) == 2  # not a floating-point array: belongs to the configuration
    assert storage.read_header(path) == {"config": {"width": 4}, "sha256": digest, "parameters": 4 * 2 * 9 + 4 + 2}
    with pytest.raises(storage.StorageError, match=r"'conv.weight' is float32 \(4, 2, 3, 3\), expected float32 \(8, 2, 3, 3\)"):
        storage.load_weights(path, Net(1, width=8))
    with pytest.raises(storage.StorageError, match="is missing"):
        storage.load_weights(path, eqx.nn.MLP(2, 2, 2, 1, key=jax.random.key(0)))
    storage.save_tree(path, eqx.filter(Net(1), eqx.is_inexact_array))
    with pytest.raises(storage.StorageError, match="not the weights of a closure"):
        storage.load_weights(path, Net(1))


def test_single_precision_weights_serve_a_double_precision_closure(tmp_path):
    path = tmp_path / "w.safetensors"
    narrow = Net(1)
    storage.save_weights(path, narrow, {})
    with jax.enable_x64(True):
        wide = storage.load_weights(path, Net(2))
        assert wide.conv.weight.dtype == np.float64
        assert wide.gain.weak_type  # a float64 number that must not widen a float32 state
        assert wide.gain == 0.5
        assert np.array_equal(wide.conv.weight, np.asarray(narrow.conv.weight, np.float64))
        storage.save_weights(path, wide, {})
    with pytest.raises(storage.StorageError, match="is float64"):
        storage.load_weights(path, Net(1))


# --- fields


def example_dataset():
    frames = np.random.default_rng(0).normal(size=(2, 5, 8, 8)).astype(np.float32)
    frames[1, 3:] = np.nan
    return xr.Dataset(
        {
            "u": (("sample", "time", "x_face", "y"), frames, {"units": "m s-1", "long_name": "velocity"}),
            "steps": ("time", np.arange(5)),
            "label": ((), "bare"),
        },
        coords={"time": ("time", np.arange(5) * 0.1, {"units": "s"}), "variable": ["u", "v"]},
        attrs={"title": "bare", "outcome": "diverged at t = 0.3"},
    )


def test_datasets_round_trip(tmp_path):
    ds = example_dataset()
    path = tmp_path / "bare.nc"
    storage.save_dataset(path, ds)
    read = storage.open_dataset(path)
    xr.testing.assert_identical(read, ds)
    assert read.u.dtype == np.float32
    storage.save_dataset(path, read.isel(time=slice(0, 2)))  # encodings of the first file are not taken over
    xr.testing.assert_identical(storage.open_dataset(path), ds.isel(time=slice(0, 2)))
    os.remove(path)  # nothing holds it open  # noqa: PTH107


def test_groups_round_trip(tmp_path):
    path = tmp_path / "reference.nc"
    groups = {"spectral_32x32": example_dataset(), "fine": example_dataset().isel(sample=[0])}
    storage.save_groups(path, groups, {"converged_until": 5.0})
    assert storage.dataset_groups(path) == list(groups)
    assert storage.open_dataset(path).attrs == {"converged_until": 5.0}
    for name, ds in groups.items():
        xr.testing.assert_identical(storage.open_dataset(path, name), ds)
    with pytest.raises(storage.StorageError, match="no group 'coarse'; possible: spectral_32x32, fine"):
        storage.open_dataset(path, "coarse")
    with pytest.raises(storage.StorageError, match="there is no such file"):
        storage.open_dataset(tmp_path / "absent.nc")
    path.write_bytes(path.read_bytes()[:3000])
    with pytest.raises(storage.CorruptError) as error:
        storage.open_dataset(path, "fine")
    one_line(error)


@pytest.mark.reliability("R6")
def test_flipped_bits_in_compressed_fields_are_noticed(tmp_path):
    path = tmp_path / "bare.nc"
    ds = xr.Dataset({"u": (("x", "y"), np.random.default_rng(0).normal(size=(64, 64)).astype(np.float32))})
    storage.save_dataset(path, ds)
    good = path.read_bytes()
    for position in range(len(good) // 2, len(good) // 2 + 1000, 50):  # inside the chunk of u
        data = bytearray(good)
        data[position] ^= 4
        path.write_bytes(data)
        with pytest.raises(storage.StorageError):
            storage.open_dataset(path)


@pytest.mark.reliability("R7")
def test_a_decompression_bomb_is_refused(tmp_path):
    import netCDF4

    path = tmp_path / "bomb.nc"
    with netCDF4.Dataset(path, "w") as file:
        file.createDimension("x", 2**36)
        file.createVariable("u", "f4", ("x",), zlib=True, chunksizes=(2**16,))
    with pytest.raises(storage.StorageError, match=r"would unpack to 256\.0 GiB"):
        storage.open_dataset(path)


# --- cache


def test_the_cache_folder_can_be_chosen(monkeypatch, tmp_path):
    assert storage.cache_folder() == tmp_path / "cache"
    monkeypatch.delenv("HYBRIDSIM_CACHE")
    monkeypatch.setattr(storage.sys, "platform", "linux")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert storage.cache_folder() == tmp_path / "xdg" / "hybridsim"


def test_the_key_of_a_recipe_depends_on_everything_that_decides_its_numbers(monkeypatch):
    recipe = {"shape": [64, 64], "viscosity": 1e-3}
    key = storage.recipe_hash(recipe, np.float64)
    assert key == storage.recipe_hash({"viscosity": np.float64(1e-3), "shape": (64, 64)}, "float64")
    others = [
        storage.recipe_hash({**recipe, "viscosity": 1.1e-3}, np.float64),
        storage.recipe_hash(recipe, np.float32),
        storage.recipe_hash(recipe, np.float64, sources=False),
    ]
    monkeypatch.setattr(storage, "_version", lambda package: "0")
    others.append(storage.recipe_hash(recipe, np.float64))
    monkeypatch.undo()
    monkeypatch.setattr(storage, "NUMERICAL_SOURCES", ("grid.py",))
    others.append(storage.recipe_hash(recipe, np.float64))
    assert len({key, *others}) == 1 + len(others)


def test_the_numerical_sources_exist():
    engine = storage.Path(storage.__file__).parent
    assert all((engine / name).exists() for name in storage.NUMERICAL_SOURCES)


@pytest.mark.reliability("R6")
def test_a_damaged_cache_entry_is_noticed(tmp_path):
    key = storage.recipe_hash({"a": 1}, np.float32, sources=False)
    tensors = {"spectral_32x32/u": np.arange(5.0), "z": jnp.ones(3, np.complex64)}
    assert storage.load_cached(key) is None
    path = storage.store_cached(key, tensors, {"seconds": 3.5})
    assert path is not None
    found = storage.load_cached(key)
    assert found is not None
    assert found[1] == {"seconds": 3.5}
    assert_same(found[0], {k: np.asarray(v) for k, v in tensors.items()})
    good = path.read_bytes()
    data = bytearray(good)
    data[-3] ^= 1
    path.write_bytes(data)
    with pytest.warns(storage.StorageWarning, match="anew"):
        assert storage.load_cached(key) is None
    other = "0" * 64
    path.with_name(f"{other}.safetensors").write_bytes(good)
    with pytest.warns(storage.StorageWarning, match="another key"):
        assert storage.load_cached(other) is None
    with pytest.raises(ValueError, match="not a SHA-256"):
        storage.load_cached("../../etc/passwd")


def test_a_full_cache_does_not_stop_a_run(monkeypatch):
    def fail(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(storage.os, "replace", fail)
    with pytest.warns(storage.StorageWarning, match="disk is full.*without the cache"):
        assert storage.store_cached("a" * 64, {"u": np.zeros(2)}, {}) is None


# --- one owner per folder


def test_what_a_living_process_writes_below_stays(tmp_path):
    other = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    try:
        theirs = tmp_path / "below" / f".a.json.{other.pid}-0a0b.part"
        theirs.parent.mkdir()
        theirs.write_bytes(b"half")
        with storage.FolderLock(tmp_path):
            assert theirs.exists()
    finally:
        other.communicate(b"\n")
    with storage.FolderLock(tmp_path):
        assert not theirs.exists()


@pytest.mark.reliability("R11")
def test_a_second_owner_is_refused(tmp_path):
    folder = tmp_path / "run"
    with storage.FolderLock(folder):
        with pytest.raises(storage.LockedError, match=f"in use by process {os.getpid()} on "), storage.FolderLock(folder):
            pass
        with pytest.raises(storage.LockedError), storage.FolderLock(folder):  # the refusal did not release it
            pass
    with storage.FolderLock(folder):
        pass
    assert not list(folder.iterdir())


@contextlib.contextmanager
def owned_by_another(folder):
    """Another process holds the lock of `folder`, and is killed at the end of the block."""
    code = (
        "import sys, time; from hybridsim import storage\nwith storage.FolderLock(sys.argv[1]): print(flush=True); time.sleep(60)"
    )
    with subprocess.Popen([sys.executable, "-c", code, str(folder)], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        yield process.pid
        process.kill()


@pytest.mark.reliability("R11")
def test_a_folder_below_one_in_use_is_refused(tmp_path):
    below = tmp_path / "cases" / "one"
    with owned_by_another(tmp_path) as pid:
        refused = pytest.raises(storage.LockedError, match=f"one: the folder .* is in use by process {pid}")
        with refused, storage.FolderLock(below):
            pass
        assert not below.exists()
        with storage.FolderLock(tmp_path / "cache" / "one", shared=True):
            pass
    with storage.FolderLock(tmp_path), storage.FolderLock(below), storage.FolderLock(below / "deeper"):
        assert (below / "deeper" / ".lock").exists()


@pytest.mark.reliability("R11")
def test_the_lock_of_a_killed_owner_is_free(tmp_path):
    with owned_by_another(tmp_path) as pid, pytest.raises(storage.LockedError, match=f"process {pid}"):
        storage.FolderLock(tmp_path).__enter__()
    (tmp_path / ".u.nc.99999999-0.part").write_bytes(b"half")
    with storage.FolderLock(tmp_path):
        assert [p.name for p in tmp_path.iterdir() if p.name != "cache"] == [".lock"]


# --- provenance


def test_the_environment_is_json(tmp_path):
    storage.write_json(tmp_path / "e.json", storage.environment())
    found = storage.read_json(tmp_path / "e.json")
    assert found["jax"] == jax.__version__
    assert {"hybridsim", "commit", "python", "jaxlib", "equinox", "optax", "numpy", "device", "platform"} <= found.keys()


def test_importing_storage_is_light():
    code = "import sys, hybridsim.storage; print([m for m in ('jax', 'xarray', 'equinox', 'netCDF4') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
