"""Nothing that is read can run code, fill the memory or reach outside its folder; the package names no way to do so."""

import ast
import base64
import json
import os
import subprocess
import sys
import textwrap
import zlib
from pathlib import Path

import netCDF4
import numpy as np
import pytest
from test_layout import PACKAGE_FILES, imported, name_of, tree_of

from hybridsim import storage
from hybridsim.config import experiment_from, find_file, load_experiment
from hybridsim.starting import write_closure
from hybridsim.windows import Zarr, write_zarr
from hybridsim.yaml_reader import ConfigError, parse_yaml

# --- the source ------------------------------------------------------------------------------------------------------------------

BANNED_MODULES = {
    *("pickle", "cPickle", "_pickle", "pickletools", "dill", "cloudpickle", "joblib", "shelve", "marshal", "jsonpickle"),
    *("code", "codeop", "pty", "xmlrpc", "telnetlib"),
}
BANNED_CALLS = {
    *("eval", "exec", "compile", "__import__", "execfile"),
    *("builtins.eval", "builtins.exec", "builtins.compile", "builtins.__import__"),
    *("os.system", "os.popen", "os.execv", "os.execvp", "os.execl", "os.spawnl", "os.spawnv"),
    *("tempfile.mktemp", "torch.load", "runpy.run_path", "runpy.run_module"),
    *("numpy.fromregex", "subprocess.getoutput", "subprocess.getstatusoutput"),
}
BANNED_YAML = {
    *("load", "load_all", "unsafe_load", "unsafe_load_all", "full_load", "full_load_all", "UnsafeLoader", "FullLoader", "Loader"),
    *("CLoader", "CFullLoader", "CUnsafeLoader", "YAMLObject"),
}
LOADERS = ("SafeLoader", "CSafeLoader")


def real_names(tree):
    """What short names stand for: `np` -> `numpy`, `from os import system as s` -> `s` -> `os.system`."""
    names = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names.update(
                {
                    alias.asname or alias.name.partition(".")[0]: alias.name if alias.asname else alias.name.partition(".")[0]
                    for alias in node.names
                }
            )
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.update({alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names})
    return names


def full_name(node, names):
    """`np.load` as `numpy.load`; empty for what is no plain name."""
    if isinstance(node, ast.Name):
        return names.get(node.id, node.id)
    if isinstance(node, ast.Attribute):
        before = full_name(node.value, names)
        return before and f"{before}.{node.attr}"
    return ""


def dangers(tree):
    """Every place of a file where something that is read could run, as (line, what)."""
    names = real_names(tree)
    for line, name in imported(tree):
        if name.partition(".")[0] in BANNED_MODULES:
            yield line, name
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module == "yaml":
            yield from ((node.lineno, f"yaml.{alias.name}") for alias in node.names if alias.name in BANNED_YAML)
        if isinstance(node, ast.Name | ast.Attribute):
            name = full_name(node, names)
            if name.startswith("yaml.") and name.rpartition(".")[2] in BANNED_YAML:
                yield node.lineno, name
            if name in BANNED_CALLS:
                # named without a call, it is handed to somebody who calls it
                yield node.lineno, name
        if isinstance(node, ast.Call):
            yield from ((node.lineno, what) for what in _bad_call(node, full_name(node.func, names)))


def _bad_call(call, name):
    given = {keyword.arg: keyword.value for keyword in call.keywords}
    for key in ("allow_pickle", "shell"):
        if key in given and not (isinstance(given[key], ast.Constant) and given[key].value is False):
            yield f"{key}={ast.unparse(given[key])}"
    if name.startswith("yaml.") and "Loader" in given and ast.unparse(given["Loader"]).rpartition(".")[2] not in LOADERS:
        yield f"{name} with {ast.unparse(given['Loader'])}"
    if name == "numpy.load" and "allow_pickle" not in given:
        yield "numpy.load without allow_pickle=False"
    first = call.args[0] if call.args else None
    named = str(first.value) if isinstance(first, ast.Constant) else ""
    if name == "importlib.import_module" and named.partition(".")[0] in BANNED_MODULES:
        yield f"import_module({named!r})"


@pytest.mark.reliability("R7")
@pytest.mark.parametrize("file", PACKAGE_FILES, ids=name_of)
def test_nothing_runs_what_it_reads(file):
    assert list(dangers(tree_of(file))) == []


@pytest.mark.parametrize(
    "code",
    [
        "import pickle",
        "from pickle import loads",
        "import cloudpickle as c",
        "import dill",
        "import marshal",
        "import shelve",
        "import joblib.numpy_pickle",
        "importlib.import_module('pickle')",
        "eval('1')",
        "exec(text)",
        "compile(text, '', 'exec')",
        "__import__(name)",
        "list(map(eval, texts))",
        "import builtins\nbuiltins.exec(text)",
        "import yaml\nyaml.load(text, Loader=L)",
        "import yaml\nyaml.load(text, Loader=yaml.SafeLoader)",  # safe, but safe_load says so itself
        "import yaml\nyaml.unsafe_load(text)",
        "import yaml as y\ny.full_load(text)",
        "from yaml import load",
        "import yaml\nyaml.parse(text, Loader=yaml.Loader)",
        "import yaml\nyaml.parse(text, Loader=chosen)",
        "import yaml\nclass L(yaml.Loader): pass",
        "import numpy as np\nnp.load(path)",
        "import numpy as np\nnp.load(path, allow_pickle=True)",
        "import numpy as np\nnp.load(path, allow_pickle=flag)",
        "from numpy import load as read\nread(path)",
        "import torch\ntorch.load(path)",
        "import subprocess\nsubprocess.run(text, shell=True)",
        "import os\nos.system(text)",
        "from os import system as go\ngo(text)",
        "import os\nos.popen(text)",
        "import tempfile\ntempfile.mktemp()",
        "import runpy\nrunpy.run_path(path)",
    ],
)
def test_a_danger_is_noticed(code):
    assert list(dangers(ast.parse(code)))


@pytest.mark.parametrize(
    "code",
    [
        "import numpy as np\nnp.load(path, allow_pickle=False)",
        "import yaml\nyaml.safe_load(text); yaml.parse(text, Loader=yaml.SafeLoader)",
        "import re\nre.compile(pattern)",
        "lowered.compile()",
        "import subprocess\nsubprocess.run(words)",
    ],
)
def test_what_is_harmless_is_let_through(code):
    assert list(dangers(ast.parse(code))) == []


# --- hostile files ---------------------------------------------------------------------------------------------------------------

SECONDS, MEBIBYTES = 2.0, 200.0

PICKLE = b"cos\nsystem\n(S'touch executed'\ntR."


DATA = Path(__file__).parent / "data" / "hostile_netcdf.json"
HDF5 = {name: text for name, text in json.loads(DATA.read_text(encoding="utf-8")).items() if name != "about"}


def unpacked(text):
    return zlib.decompress(base64.b85decode(text))


MEASURED = """
import json, sys, time
from pathlib import Path
from hybridsim import storage, verify
from hybridsim.yaml_reader import ConfigError, parse_yaml
from hybridsim.config import load_experiment
import netCDF4, xarray, yaml
WAYS = {
    "arrays": storage.read_header,
    "json": storage.read_json,
    "yaml": load_experiment,
    "fields": storage.open_dataset,
    "groups": storage.dataset_groups,
    "manifest": storage.read_manifest,
}
def peak():
    # MiB at most since the last `forget`; not by getrusage, which counts the process that started this one too
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 1024
def forget():
    Path("/proc/self/clear_refs").write_text("5")
forget()
baseline, found = peak(), {}
for name, (how, path) in json.loads(sys.stdin.read()).items():
    forget()
    begin = time.process_time()
    try:
        WAYS[how](Path(path))
        outcome = "accepted"
    except (storage.StorageError, ConfigError) as error:
        outcome = "refused" if len(str(error)) < 1000 and "\\n" not in str(error) else "refused at length"
    found[name] = outcome, time.process_time() - begin, peak() - baseline
print(json.dumps(found))
"""


def measured(folder, files):
    """name -> (what came of it, seconds of the processor, MiB above what the imports take), all in one process."""
    done = subprocess.run(
        [sys.executable, "-c", MEASURED],
        input=json.dumps(files),
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
    )
    assert done.returncode == 0, done.stderr[-1000:]
    return json.loads(done.stdout)


def safetensors(header, payload=b""):
    text = header if isinstance(header, bytes) else json.dumps(header, separators=(",", ":")).encode()
    return len(text).to_bytes(8, "little") + text + payload


def bomb_of_fill_values(path):
    with netCDF4.Dataset(path, "w") as file:
        file.createDimension("x", 2**36)
        file.createVariable("x", "f8", ("x",), zlib=True, chunksizes=(2**16,))  # a coordinate, which xarray reads at once


def bomb_of_chunks(path):
    with netCDF4.Dataset(path, "w") as file:
        file.createDimension("x", None)
        file.createVariable("u", "f4", ("x",), zlib=True, chunksizes=(2**29,))


def bomb_of_words(path):
    with netCDF4.Dataset(path, "w") as file:
        file.createDimension("x", 2**28)
        file.createVariable("u", str, ("x",))


def own_types(path):
    with netCDF4.Dataset(path, "w") as file:
        file.createDimension("x", 3)
        kind = file.createVLType(np.int32, "ragged")
        file.createVariable("u", kind, ("x",))


OPENING = b'{"__metadata__":{"sha256":"' + b"0" * 64 + b'"'
HOSTILE = {
    "pickle as weights": ("arrays", PICKLE),
    "header of 8 EiB": ("arrays", b"\xff" * 7 + b"\x7f{}"),
    "header of 15 MiB, nested": ("arrays", safetensors(OPENING + b',"a":' + b"[" * (15 * 2**20))),
    "header of 15 MiB of names": ("arrays", safetensors(OPENING + b"}," + b",".join(b'"%06x":0' % i for i in range(10**6)) + b"}")),
    "object array as weights": (
        "arrays",
        b"\x93NUMPY\x01\x00v\x00{'descr': '|O', 'fortran_order': False, 'shape': (1,), }" + PICKLE,
    ),
    "pickle as fields": ("fields", PICKLE),
    "fill values": ("fields", bomb_of_fill_values),
    "chunks": ("fields", bomb_of_chunks),
    "words": ("fields", bomb_of_words),
    "types of its own": ("fields", own_types),
    **{name: ("fields", unpacked(text)) for name, text in HDF5.items() if name != "a group inside itself"},
    "groups of another file": ("groups", unpacked(HDF5["a group of another file"])),
    "pickle as YAML": ("yaml", PICKLE),
    "a tag of Python": ("yaml", b"!!python/object/apply:os.system ['touch executed']"),
    "a tag deep inside": ("yaml", b"equation: {use: navier_stokes, viscosity: !!python/object/new:os.system ['touch executed']}"),
    "aliases": (
        "yaml",
        b"\n".join([b"a0: &a0 [x, x]", *(b"a%d: &a%d [%s]" % (i, i, b", ".join([b"*a%d" % (i - 1)] * 9)) for i in range(1, 40))]),
    ),
    "an alias of itself": ("yaml", b"a: &a [*a]"),
    "depth": ("yaml", b"[" * 500_000),
    "deep keys": ("yaml", b"{a: " * 100_000),
    "a long YAML": ("yaml", b"a: " + b"x" * (50 * 2**20)),
    "many values": ("yaml", b"a: [" + b"1," * 400_000 + b"]"),
    "a JSON of lists": ("json", b"[" + b"[]," * (10 * 2**20) + b"[]]"),
    "a JSON of keys": ("json", b"{" + b",".join(b'"%d":0' % i for i in range(2 * 10**6)) + b"}"),
    "nested JSON": ("json", b"[" * (32 * 2**20)),
    "a long number": ("json", b"1" * (32 * 2**20)),
    "a long JSON": ("json", b"[" + b"1," * (40 * 2**20) + b"1]"),
    "nested manifest": ("manifest", b'{"files":' * 10**6),
}


def test_the_pickle_would_run(tmp_path):
    """The hostile files are hostile: unpickled, this one leaves a file."""
    code = "import pickle, sys; pickle.loads(sys.stdin.buffer.read())"
    subprocess.run([sys.executable, "-c", code], input=PICKLE, cwd=tmp_path, check=True)
    assert (tmp_path / "executed").exists()


@pytest.fixture(scope="module")
def refused(tmp_path_factory):
    """The folder of all hostile files, and what came of each."""
    folder = tmp_path_factory.mktemp("hostile")
    (folder / "secret.bin").write_bytes(b"TOPSECRET" * 100)
    with netCDF4.Dataset(folder / "secret.h5", "w") as file:
        file.createDimension("x", 5)
        file.createVariable("hidden", "f8", ("x",))[:] = np.arange(5.0)
    storage.write_json(folder / "honest.json", {"a": 1})
    (folder / "large.json").write_bytes(b"{" + b",".join(b'"%d":0' % i for i in range(storage.MOST_JSON_VALUES - 1)) + b"}")
    files = {name: ("json", str(folder / f"{name}.json")) for name in ("honest", "large")}
    for i, (name, (how, content)) in enumerate(HOSTILE.items()):
        path = folder / f"{i}{'.nc' if how in ('fields', 'groups') else '.yaml' if how == 'yaml' else ''}"
        content(path) if callable(content) else path.write_bytes(content)
        files[name] = how, str(path)
    return folder, measured(folder, files)


@pytest.mark.reliability("R7")
@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_file_is_refused_in_little_time_and_memory(refused, name):
    folder, found = refused
    outcome, seconds, memory = found[name]
    assert outcome == "refused"
    assert seconds < SECONDS
    assert memory < MEBIBYTES
    assert not (folder / "executed").exists()


def test_an_honest_file_is_accepted_and_a_large_one_seen_by_the_same_measure(refused):
    found = refused[1]
    assert found["honest"][0] == "accepted"
    assert found["honest"][2] < 10
    assert found["large"][0] == "accepted"
    assert 100 < found["large"][2] < MEBIBYTES  # nearly as many keys as are read


def test_verify_survives_a_file_that_ends_its_reader(tmp_path):
    from hybridsim.verify import verify_file

    path = tmp_path / "loop.nc"
    path.write_bytes(unpacked(HDF5["a group inside itself"]))
    (finding,) = verify_file(path)
    assert finding.good is False


@pytest.mark.reliability("R7")
@pytest.mark.parametrize("codecs", [[{"name": "numcodecs.pickle"}], "bytes", [], None])
def test_a_zarr_array_of_another_hand_is_refused(tmp_path, codecs):
    folder = tmp_path / "a.zarr"
    data = np.zeros((1, 2, 1, 4), np.float32)
    write_zarr(folder, data.shape, data.dtype, [(0, lambda: data)])
    about = storage.read_json(folder / "zarr.json")
    if codecs == []:
        about["data_type"] = "object"
    elif codecs is None:
        (folder / "zarr.json").unlink()
        storage.write_json(folder / ".zarray", {"zarr_format": 2, "filters": [{"id": "pickle"}], "dtype": "|O"})
    else:
        about["codecs"] = codecs
    if codecs is not None:
        storage.write_json(folder / "zarr.json", about)
    with pytest.raises(storage.CorruptError):
        Zarr(folder)


# --- paths -----------------------------------------------------------------------------------------------------------------------

CASE = {
    "equation": {"use": "kuramoto_sivashinsky"},
    "domain": {"lengths": [22.0]},
    "initial": {"use": "random_waves"},
    "time": {"end": 1.0, "frames": 2},
    "reference": {"solver": "spectral", "shape": [64]},
    "runs": {"bare": {"solver": "spectral", "shape": [32], "dt": 0.5}},
}
OUTSIDE = ("../out", "/out", "a/../../out", "..", ".", "a\0b", "a\nb", "bare\n", "-x", ".hidden", "a" * 300, "C:\\out", "ü/..")


@pytest.mark.reliability("R7")
@pytest.mark.parametrize("name", OUTSIDE)
def test_no_label_leads_out_of_its_folder(tmp_path, name, x64):
    with pytest.raises(ConfigError):
        experiment_from({**CASE, "runs": {name: CASE["runs"]["bare"]}}, tmp_path / "case.yaml")
    with pytest.raises(ConfigError):
        experiment_from({**CASE, "name": name}, tmp_path / "case.yaml")


@pytest.mark.parametrize("name", ["manifest", "summary", "training", "reference", "all", "begun.json"])
def test_no_label_takes_the_name_of_a_file_of_every_folder(tmp_path, name, x64):
    with pytest.raises(ConfigError, match="a meaning of its own"):
        experiment_from({**CASE, "runs": {name: CASE["runs"]["bare"]}}, tmp_path / "case.yaml")


@pytest.mark.reliability("R7")
@pytest.mark.parametrize(
    "name", ["../w.safetensors", "/w.safetensors", "a/../../w.safetensors", "a\0.safetensors", "..\\w.safetensors"]
)
def test_weights_and_files_stay_in_the_experiments_folder(tmp_path, name):
    (tmp_path / "w.safetensors").write_bytes(b"")
    folder = tmp_path / "folder"
    folder.mkdir()
    with pytest.raises(ConfigError, match="outside the experiment's folder"):
        find_file(name, [folder], "weights", "file")


@pytest.mark.parametrize("key", ["../../etc/passwd", "a" * 63, "A" * 64, "a" * 63 + "/", "", "a" * 64 + "\n"])
def test_a_key_of_the_cache_is_a_digest(key):
    for ask in (storage.load_cached, lambda k: storage.store_cached(k, {"u": np.zeros(2)}, {})):
        with pytest.raises(ValueError, match="not a SHA-256 digest"):
            ask(key)


def test_cases_of_a_sweep_stay_in_their_folder(tmp_path, x64):
    over = {"choice": {name: {"runs.bare.dt": 0.1 * (i + 1)} for i, name in enumerate(["../out", "///", "..", "a/b"])}}
    case = experiment_from({**CASE, "sweep": {"run": "bare", "over": over}}, tmp_path / "case.yaml")
    for one in case.cases:
        assert Path(one.name).name == one.name not in ("", ".", "..")


def test_new_closures_write_over_nothing(tmp_path):
    outside = tmp_path / "outside.py"
    place = tmp_path / "place"
    place.mkdir()
    (place / "mine.py").symlink_to(outside)
    with pytest.raises(ConfigError, match="nothing is written over it"):
        write_closure("mine", "flux", place)
    for name in ("../mine", "a/b", "mine.py", ""):
        with pytest.raises(ConfigError):
            write_closure(name, "flux", place)
    assert not outside.exists()


@pytest.mark.reliability("R7")
@pytest.mark.parametrize("name", ["figures", "figures/deep", "state"])
def test_no_symbolic_link_leads_a_writer_out_of_its_folder(tmp_path, name):
    outside, folder = tmp_path / "outside", tmp_path / "folder"
    outside.mkdir()
    (outside / "a.txt").write_text("mine")
    link = folder / name
    link.parent.mkdir(parents=True)
    link.symlink_to(outside)
    with storage.FolderLock(folder):
        with pytest.raises(storage.StorageError, match="a symbolic link leads out"):
            storage.atomic_write(folder / name / "a.txt", "theirs")
        with pytest.raises(storage.StorageError, match="a symbolic link leads out"):
            storage.open_log(folder / name / "a.txt")
        storage.remove_folder(link, link / "marker")  # the link itself may go, what it leads to stays
    assert (outside / "a.txt").read_text() == "mine"
    assert not link.exists()


@pytest.mark.parametrize("name", [".lock", "log.txt", "summary.json"])
def test_a_symbolic_link_in_the_place_of_a_file_is_never_written_through(tmp_path, name):
    outside, folder = tmp_path / "outside", tmp_path / "folder"
    outside.write_text("mine")
    folder.mkdir()
    (folder / name).symlink_to(outside)
    if name == ".lock":
        with pytest.raises(storage.StorageError, match="a symbolic link stands there"), storage.FolderLock(folder):
            pass
    elif name == "log.txt":
        with pytest.raises(storage.StorageError, match="a symbolic link stands there"):
            storage.open_log(folder / name)
    else:
        storage.atomic_write(folder / name, "theirs")
        assert (folder / name).read_text() == "theirs"
        assert not (folder / name).is_symlink()
    assert outside.read_text() == "mine"


def test_a_folder_of_somebody_else_is_not_removed(tmp_path):
    theirs = tmp_path / "state"
    theirs.mkdir()
    (theirs / "thesis.tex").write_text("years")
    with pytest.raises(storage.StorageError, match="hybridsim did not make this folder"):
        storage.remove_folder(theirs, theirs / "begun.json")
    assert (theirs / "thesis.tex").read_text() == "years"
    (theirs / "begun.json").write_text("{}")
    storage.remove_folder(theirs, theirs / "begun.json")
    assert list(tmp_path.iterdir()) == []


def test_only_what_a_killed_writer_left_is_cleared_away(tmp_path):
    (tmp_path / ".film.part").write_text("a download")
    (tmp_path / ".u.nc.12-0a1b.part").write_text("half")
    half = tmp_path / ".state.12-0a1b.part"
    half.mkdir()
    (half / "frames").write_text("half")
    storage.remove_leftovers(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [".film.part"]


def test_a_pipe_is_no_file(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for read in (storage.read_json, storage.sha256, storage.read_header, storage.verify_tensors, storage.open_dataset):
        with pytest.raises(storage.StorageError, match="a pipe or a device"):
            read(tmp_path / "pipe")


# --- weights that are no numbers -------------------------------------------------------------------------------------------------


@pytest.mark.reliability("R9")
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_weights_that_are_not_finite_are_refused_by_name(tmp_path, value, x64):
    closure = {"use": "learned_flux", "network": {"use": "cnn", "width": 2, "depth": 1}}
    runs = {"bare": {**CASE["runs"]["bare"], "corrections": [closure]}}
    experiment = experiment_from({**CASE, "runs": runs}, tmp_path / "case.yaml")
    (made,) = experiment.closures_for("bare")
    import equinox as eqx
    import jax

    leaves, structure = jax.tree.flatten(eqx.filter(made, eqx.is_inexact_array))
    leaves[-1] = leaves[-1].at[(0,) * leaves[-1].ndim].set(value)
    broken = eqx.combine(jax.tree.unflatten(structure, leaves), made)
    storage.save_weights(tmp_path / "w.safetensors", broken, experiment.weights_header("bare"))
    runs["bare"]["corrections"][0]["weights"] = "w.safetensors"
    with pytest.raises(
        ConfigError, match=r"runs\.bare\.corrections\[0\]\.weights: .*w\.safetensors: 1 of \d+ numbers of .* not finite"
    ):
        experiment_from({**CASE, "runs": runs}, tmp_path / "case.yaml")
    with pytest.raises(storage.StorageError, match="not finite"):
        storage.load_weights(tmp_path / "w.safetensors", made)


# --- what is said about it -------------------------------------------------------------------------------------------------------


def test_a_yaml_that_names_a_file_runs_it_and_readers_are_told(tmp_path, x64):
    (tmp_path / "mine.py").write_text(
        textwrap.dedent('''
        from pathlib import Path
        from hybridsim.contract import Source
        (Path(__file__).parent / "executed").touch()
        class Mine(Source):
            """s = 0."""
            def __call__(self, view, memory=None, key=None):
                return 0 * view.u
    ''')
    )
    runs = {"bare": {**CASE["runs"]["bare"], "corrections": ["mine.py:Mine"]}}
    experiment_from({**CASE, "runs": runs}, tmp_path / "case.yaml")
    assert (tmp_path / "executed").exists()
    root = Path(__file__).parent.parent
    for page in ("README.md", "SECURITY.md"):
        assert "A YAML that names a `.py` file runs that file" in (root / page).read_text(encoding="utf-8")


def test_depth_is_refused_without_a_stack(tmp_path):
    with pytest.raises(ConfigError):
        parse_yaml("[" * 100)
    (tmp_path / "a.yaml").write_text("{a: " * 30)
    with pytest.raises(ConfigError):
        load_experiment(tmp_path / "a.yaml")
