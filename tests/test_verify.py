"""What a command leaves is named, says what made it, and any later damage is told from an unfinished run."""

import errno
import json
import os
import random
import re
import shutil

import jax
import netCDF4
import numpy as np
import pytest
import yaml
from typer.testing import CliRunner

from hybridsim import storage, verify
from hybridsim.cli import app
from hybridsim.journal import Journal
from hybridsim.yaml_reader import ConfigError

CASE = {
    "name": "small",
    "equation": {"use": "kuramoto_sivashinsky"},
    "domain": {"lengths": [22.0]},
    "initial": {"use": "random_waves"},
    "samples": {"count": 2, "seed": 7},
    "time": {"end": 4.0, "frames": 4},
    "reference": {"solver": "spectral", "shape": [64]},
    "runs": {
        "learned": {
            "solver": "spectral",
            "shape": [32],
            "dt": 0.5,
            "corrections": [{"use": "learned_flux", "width": 2, "depth": 1}],
        },
    },
    "train": {
        "run": "learned",
        "data": {"trajectories": 2, "validation": 1, "time": 4.0, "validation_time": 4.0, "interval": 1.0},
        "unroll": [1],
        "updates": [2],
        "validate_every": 1,
    },
}


def hybridsim(*arguments):
    before = jax.config.jax_enable_x64
    try:
        return CliRunner().invoke(app, list(map(str, arguments)))
    finally:
        jax.config.update("jax_enable_x64", before)  # the commands switch it on


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A folder that was trained in and then run in, and the case."""
    folder = tmp_path_factory.mktemp("verify")
    (folder / "small.yaml").write_text(yaml.safe_dump(CASE))
    for command in ("train", "run"):
        result = hybridsim(command, folder / "small.yaml", "--out", folder / "out")
        assert result.exit_code == 0, result.output
    return folder / "out"


@pytest.fixture
def folder(made, tmp_path):
    return shutil.copytree(made, tmp_path / "copy")


def lines(target, *arguments):
    result = hybridsim("verify", target, *arguments)
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result.exit_code, result.output.splitlines()


def damaged(target):
    code, found = lines(target)
    bad = {line[2:].partition(": ")[0]: line for line in found if line.startswith("✗")}
    assert code == (1 if bad else 0)
    return bad


# --- the manifest ----------------------------------------------------------------------------------------------------------------


def test_every_finished_file_is_named_and_nothing_that_grows(made):
    manifest = storage.read_manifest(made / "manifest.json")
    there = {path.relative_to(made).as_posix() for path in made.rglob("*") if path.is_file()}
    assert set(manifest["files"]) == there - {"manifest.json", "log.txt"}
    assert {"learned.nc", "reference.nc", "summary.json", "report.html", "learned.safetensors"} <= set(manifest["files"])
    for name, entry in manifest["files"].items():
        assert entry["bytes"] == (made / name).stat().st_size
        assert entry["sha256"] == storage.sha256(made / name)
    assert manifest["command"] == "run"


def test_a_whole_folder_is_good(made):
    code, found = lines(made)
    assert code == 0
    assert all(line.startswith("✓") for line in found[:-1])
    assert f"✓ config.yaml: hash {storage.read_json(made / 'summary.json')['config_hash'][:12]}, as the results say" in found
    assert re.fullmatch(r"\d+ good, 0 damaged", found[-1])


def test_a_manifest_is_gone_before_anything_is_written_over(tmp_path, made, monkeypatch):
    """At every write of a second run into the same folder, no manifest claims what is not there.

    Nor does the next one bless what was damaged before.
    """
    folder = shutil.copytree(made, tmp_path / "out")
    shutil.copy(made.parent / "small.yaml", tmp_path)
    flip(folder / "learned-seed0.safetensors", -1)
    real, seen = storage._write_parts, []

    def watched(path, parts):
        seen.append((str(path), (folder / "manifest.json").exists()))
        real(path, parts)

    monkeypatch.setattr(storage, "_write_parts", watched)
    assert hybridsim("run", tmp_path / "small.yaml", "time.frames=2", "--out", folder).exit_code == 0
    inside = [(path, claimed) for path, claimed in seen if path.startswith(str(folder))]
    assert len(inside) > 5
    assert inside[-1][0].endswith("manifest.json")
    # the marker comes first, since it keeps what the manifest named
    assert not any(claimed for path, claimed in inside if not path.endswith("state/begun.json"))
    assert list(damaged(folder)) == ["learned-seed0.safetensors"]
    # the training's files are still named, with the configuration that made them
    entry = storage.read_manifest(folder / "manifest.json")["files"]["learned.safetensors"]
    assert entry["config_hash"] == storage.read_manifest(made / "manifest.json")["config_hash"]


def test_a_page_that_is_drawn_again_is_named_again(folder):
    from hybridsim.report import write_report

    before = storage.read_manifest(folder / "manifest.json")
    flip(folder / "summary.json", -3, 10 ^ 9)  # a new line becomes a tab: other bytes, the same values
    write_report(folder)
    assert list(damaged(folder)) == ["summary.json"]
    after = storage.read_manifest(folder / "manifest.json")
    assert {**after, "files": 0, "sha256": 0} == {**before, "files": 0, "sha256": 0}
    assert after["files"].keys() == before["files"].keys()


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_failing_write_leaves_no_half_a_manifest(tmp_path, monkeypatch, call):
    storage.write_json(tmp_path / "a.json", 1)
    about = {"config_hash": "0" * 64}
    storage.write_manifest(tmp_path, ["a.json"], about)
    before = (tmp_path / "manifest.json").read_bytes()
    monkeypatch.setattr(storage.os, call, lambda *_: (_ for _ in ()).throw(OSError(errno.ENOSPC, "full")))
    with pytest.raises(storage.StorageError, match="disk is full"):
        storage.write_manifest(tmp_path, ["*.json"], about)
    assert (tmp_path / "manifest.json").read_bytes() == before


@pytest.mark.parametrize("name", ["../a", "/a", "a/../../b", "", ".", "a//b", "a\\b", "a\0b"])
def test_a_manifest_names_nothing_outside_its_folder(tmp_path, name):
    manifest = {"format": storage.MANIFEST_FORMAT, "config_hash": "", "files": {name: {"bytes": 1, "sha256": ""}}}
    storage.write_json(tmp_path / "manifest.json", {**manifest, "sha256": storage.manifest_digest(manifest)})
    with pytest.raises(storage.CorruptError, match="outside its folder"):
        storage.read_manifest(tmp_path / "manifest.json")


def test_links_and_other_peoples_files_are_not_named(tmp_path):
    (tmp_path / "figures").mkdir()
    (tmp_path / "secret").write_text("mine")
    (tmp_path / "figures/a.png").write_text("a")
    (tmp_path / "figures/link.png").symlink_to(tmp_path / "secret")
    storage.write_manifest(tmp_path, ["figures", "nothing*"], {"config_hash": ""})
    assert list(storage.read_manifest(tmp_path / "manifest.json")["files"]) == ["figures/a.png"]


# --- damage ----------------------------------------------------------------------------------------------------------------------


def flip(path, place, bit=1):
    data = bytearray(path.read_bytes())
    data[place] ^= bit
    path.write_bytes(data)


def test_any_flipped_bit_and_any_truncation_is_found(folder):
    rng = random.Random(0)
    for name in storage.read_manifest(folder / "manifest.json")["files"]:
        path = folder / name
        good = path.read_bytes()
        flip(path, rng.randrange(len(good)), 1 << rng.randrange(8))
        assert verify._difference(path, storage.read_manifest(folder / "manifest.json")["files"][name]), name
        path.write_bytes(good)
    for name, how in {"learned.nc": "changed", "learned.safetensors": "truncated", "summary.json": "missing"}.items():
        path = folder / name
        if how == "changed":
            flip(path, len(path.read_bytes()) // 2)
        elif how == "truncated":
            path.write_bytes(path.read_bytes()[:-3])
        else:
            path.unlink()
        bad = damaged(folder)
        assert how in bad[name]
    assert set(bad) == {"learned.nc", "learned.safetensors", "summary.json", "config.yaml"}  # whose hash nothing says any more


def test_a_flipped_bit_anywhere_in_the_manifest_is_found(folder):
    path = folder / "manifest.json"
    good = path.read_bytes()
    for place in range(0, len(good), 13):
        data = bytearray(good)
        data[place] ^= 1 << place % 8
        path.write_bytes(data)
        try:
            found = storage.read_manifest(path)
        except storage.StorageError:
            continue
        # blanks between the words carry nothing
        assert found == json.loads(good), place


def test_what_is_not_named_is_said_and_looked_at_by_itself(folder):
    (folder / "notes.txt").write_text("mine")
    shutil.copy(folder / "learned.safetensors", folder / "other.safetensors")
    flip(folder / "other.safetensors", -1)
    (folder / ".learned.nc.12-0a.part").write_bytes(b"half")
    (folder / "away").symlink_to("/")
    code, found = lines(folder)
    assert code == 1
    assert "! notes.txt: not named, text" in found
    assert any(line.startswith("✗ other.safetensors: damaged") for line in found)
    assert any(line.startswith("! .learned.nc.12-0a.part: left by a process") for line in found)
    assert "! away: a symbolic link or no file, left aside" in found


def test_another_configuration_beside_the_results_is_found(folder):
    """All digests of the files are right; the configuration is another one than the results say."""
    manifest = storage.read_manifest(folder / "manifest.json")
    text = (folder / "config.yaml").read_text().replace("seed: 7", "seed: 8")
    storage.atomic_write(folder / "config.yaml", text)
    storage.write_manifest(folder, list(manifest["files"]), {k: v for k, v in manifest.items() if k not in ("files", "sha256")})
    bad = damaged(folder)
    assert list(bad) == ["config.yaml"]
    assert "the manifest says" in bad["config.yaml"]


@pytest.mark.parametrize(
    ("key", "sentence"), [("checks", "has no checks"), ("runs", "has no runs"), ("config_hash", "has no config_hash")]
)
def test_a_summary_keeps_its_promises(folder, key, sentence):
    summary = storage.read_json(folder / "summary.json")
    del summary[key]
    storage.write_json(folder / "summary.json", summary)
    result = hybridsim("verify", folder / "summary.json")
    assert result.exit_code == 1
    assert f"✗ summary.json: {sentence}" in result.output


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda file: file.delncattr("config_hash"), "has no attribute config_hash"),
        (lambda file: file.renameVariable("x", "y"), "the dimension 'x' has no coordinate"),
        (lambda file: [file["u"].delncattr(name) for name in ("units", "long_name")], "'u' has neither units nor a long name"),
    ],
)
def test_fields_keep_their_promises(folder, change, sentence):
    with netCDF4.Dataset(folder / "learned.nc", "a") as file:
        change(file)
    result = hybridsim("verify", folder / "learned.nc")
    assert result.exit_code == 1
    assert sentence in result.output


def test_nothing_in_a_file_ends_the_command(folder):
    """Files of every kind, filled with noise, zeros and each other's content."""
    rng = random.Random(1)
    names = sorted(storage.read_manifest(folder / "manifest.json")["files"])
    names = [name for name in names if not name.startswith("figures/") or name.endswith("correlation.png")]
    content = {name: (folder / name).read_bytes() for name in names}
    (folder / "manifest.json").unlink()
    for trial in range(4):
        for name in names:
            data = [rng.randbytes(300), bytes(5000), content[rng.choice(names)], content[name][:-7] + b"\xff" * 7][trial]
            (folder / name).write_bytes(data)
        result = hybridsim("verify", folder)
        assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
        assert result.exit_code == 1
        assert "Traceback" not in result.output
        assert len(result.output.splitlines()) < 2 * len(names) + 10
    os.mkfifo(folder / "pipe.json")
    assert hybridsim("verify", folder).exit_code == 1


# --- unfinished runs, checkpoints, files, the cache ------------------------------------------------------------------------------


def unfinished(made, folder):
    """The folder of a run that was killed."""
    folder.mkdir()
    shutil.copy(made / "config.yaml", folder)
    place = folder / "state/bare/checkpoints"
    journal = Journal(folder / "state/bare", every=0.0)
    for step in (2, 4):
        journal.add({"u": np.ones(3)})
        journal.save(step, {"u": np.arange(9.0) * step})
    storage.write_json(folder / "state/begun.json", "0" * 64)
    return folder, place / f"{4:012d}.safetensors"


def test_an_unfinished_run_is_not_damaged(made, tmp_path):
    folder, newest = unfinished(made, tmp_path / "killed")
    code, found = lines(folder)
    assert code == 0
    assert found[0] == "! .: unfinished: go on with --resume"
    assert "✓ state/bare/checkpoints/000000000004.safetensors: checkpoint of step 4, whole" in found
    assert any(line.startswith("✓ state/bare/frames-000000000002.safetensors") for line in found)
    flip(newest, 200)
    code, found = lines(folder)
    assert code == 1
    assert any(line.startswith("✗ state/bare/checkpoints/000000000004.safetensors") for line in found)
    assert "! state/bare/checkpoints: --resume goes on from the checkpoint of step 2" in found


def test_frames_that_are_damaged_take_their_checkpoint_with_them(made, tmp_path):
    folder, _ = unfinished(made, tmp_path / "killed")
    flip(folder / "state/bare/frames-000000000002.safetensors", 200)
    code, found = lines(folder)
    assert code == 1
    assert any(line.startswith("✗ state/bare/checkpoints/000000000004.safetensors") for line in found)
    assert "! state/bare/checkpoints: --resume goes on from the checkpoint of step 2" in found


def test_a_checkpoint_without_its_frames_is_damaged(made, tmp_path):
    folder, newest = unfinished(made, tmp_path / "killed")
    for path in (folder / "state/bare").glob("frames-*"):
        path.unlink()
    found = damaged(folder)
    assert {name for name in found if "checkpoints" in name} == {f"state/bare/checkpoints/{n:012d}.safetensors" for n in (2, 4)}
    assert damaged(newest)


def test_what_interrupted_fine_runs_left_in_the_cache_is_whole(tmp_path, monkeypatch):
    monkeypatch.setenv("HYBRIDSIM_CACHE", str(tmp_path / "cache"))
    journal = Journal(tmp_path / "cache/unfinished" / (64 * "a") / "fine", every=0.0)
    for step in (2, 4):
        journal.add({"group/a": np.ones(3)})
        journal.save(step, {"u": np.arange(9.0)})
    code, found = lines("--cache")
    assert code == 0
    assert sum(line.startswith("✓ unfinished") for line in found) == 4
    newest = max(path for path in (tmp_path / "cache").rglob("*.safetensors") if path.parent.name == "checkpoints")
    flip(newest, 100)
    assert list(damaged("--cache")) == [newest.relative_to(tmp_path / "cache").as_posix()]


def test_a_run_at_work_is_seen(made, tmp_path):
    folder, _ = unfinished(made, tmp_path / "running")
    with storage.FolderLock(folder):
        code, found = lines(folder)
    assert code == 0
    assert f"! .lock: process {os.getpid()} on " in "\n".join(found)


@pytest.mark.parametrize("which", ["000000000004.safetensors", "000000000004.json"])
def test_a_checkpoint_by_itself(made, tmp_path, which):
    _, newest = unfinished(made, tmp_path / "killed")
    assert lines(newest.parent / which) == (0, [f"✓ {which}: checkpoint of step 4, whole", "1 good, 0 damaged"])
    shutil.copy(newest.parent / f"{2:012d}.safetensors", newest)
    assert lines(newest.parent / which)[0] == 1


def test_weights_and_fields_by_themselves(folder):
    assert lines(folder / "learned.safetensors")[1][0] == "✓ learned.safetensors: weights of learned_flux, digest right"
    assert "checksums right" in lines(folder / "reference.nc")[1][0]
    os.truncate(folder / "reference.nc", 9000)
    assert lines(folder / "reference.nc")[0] == 1


def test_the_cache(made, tmp_path):
    assert lines("--cache") == (0, [f"✓ {tmp_path / 'cache'}: the cache is empty", "1 good, 0 damaged"])
    key, other = "a" * 64, "b" * 64
    path = storage.store_cached(key, {"u": np.zeros(5)}, {})
    assert path is not None
    assert lines("--cache")[0] == 0
    shutil.copy(path, path.with_name(f"{other}.safetensors"))
    code, found = lines("--cache")
    assert code == 1
    assert f"✓ reference/{key}.safetensors: as written" in found
    assert f"✗ reference/{other}.safetensors: holds the entry of another key; remove it, and it is made anew" in found
    from hybridsim.windows import write_zarr

    data = np.random.default_rng(0).normal(size=(1, 9, 1, 64)).astype(np.float32)
    array = storage.cache_folder() / "training" / f"{key}.zarr"
    write_zarr(array, data.shape, data.dtype, [(0, lambda: data)])
    assert f"✓ training/{key}.zarr: 1 trajectories, checksums right" in lines("--cache")[1]
    chunk = next(p for p in array.rglob("c/**/*") if p.is_file())
    flip(chunk, 40)
    assert any(line.startswith(f"✗ training/{key}.zarr") for line in lines("--cache")[1])


@pytest.mark.parametrize("arguments", [["nothing"], [], ["empty"], ["a.xyz"], ["a.json", "--cache"]])
def test_bad_input_is_one_line_and_exit_code_2(tmp_path, monkeypatch, arguments):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "a.xyz").write_text("a")
    (tmp_path / "a.json").write_text("1")
    result = hybridsim("verify", *arguments)
    assert (result.exit_code, result.stderr.count("\n")) == (2, 1)


def test_a_folder_of_somebody_else_is_refused(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ConfigError, match="nothing of hybridsim"):
        verify.verify_folder(tmp_path)


# --- where everything comes from -------------------------------------------------------------------------------------------------

NEEDED = ("version", "commit", "config_hash", "seed", "precision", "device", "versions")
PACKAGES = ("hybridsim", "python", *storage.PACKAGES)


def origins_of(path):
    """What a file of results says of its making, as plain values."""
    if path.suffix == ".nc":
        attrs = dict(storage.open_dataset(path).attrs)
        return {**attrs, "versions": json.loads(attrs["versions"]), "config": json.loads(attrs["config"])}
    if path.suffix == ".safetensors":
        if path.stem.isdigit():
            return storage.Checkpoints(path.parent).verify(int(path.stem))
        header = storage.read_header(path)
        return {**header, "seed": header["training"]["seed"]}
    found = storage.read_json(path)
    return {**found, "seed": found["chosen_seed"]} if "chosen_seed" in found else found


OUTPUTS = [
    *("learned.nc", "reference.nc", "summary.json", "manifest.json"),
    *("learned.safetensors", "learned-seed0.safetensors", "learned.json", "training/seed-0/000000000002.safetensors"),
]


@pytest.mark.reliability("R14")
@pytest.mark.parametrize("name", OUTPUTS)
def test_every_output_says_what_made_it(made, name):
    found = origins_of(made / name)
    for key in NEEDED:
        assert key in found, key
        assert found[key] is not None or key == "commit"
    assert set(PACKAGES) <= set(found["versions"])
    assert re.fullmatch(r"[0-9a-f]{64}", found["config_hash"])
    assert found["versions"]["hybridsim"] == found["version"]
    assert found["versions"]["device"] == found["device"]
    # one configuration made all of it
    assert found["config_hash"] == storage.read_json(made / "summary.json")["config_hash"]
    if name.endswith(".nc") or name == "manifest.json":
        assert storage.config_digest(found["config"], storage.read_json(made / "summary.json")["inputs"]) == found["config_hash"]


@pytest.mark.reliability("R14")
def test_no_output_of_a_kind_is_forgotten(made):
    """Whatever else is there carries no numbers of its own, and stands in the manifest, which says all of this."""
    numbers = {p.relative_to(made).as_posix() for p in made.rglob("*") if p.suffix in (".nc", ".safetensors")}
    assert {name for name in numbers if "training/" not in name} == {
        n for n in OUTPUTS if n.endswith((".nc", "s.safetensors", ".safetensors"))
    } - {"training/seed-0/000000000002.safetensors"}
    page = (made / "report.html").read_text()
    summary = storage.read_json(made / "summary.json")
    for value in (summary["config_hash"], summary["device"], summary["version"], "jax " + jax.__version__, "float32"):
        assert value in page, value
    assert re.search(r"<dt>seed</dt><dd>7</dd>", page)


def test_provenance_is_of_plain_values(x64):
    about = storage.provenance("0" * 64, {"a": [1.5]}, 3, "float32")
    assert storage.as_attributes(about)["config"] == '{"a": [1.5]}'
    assert all(isinstance(value, str | int | float) for value in storage.as_attributes(about).values())
