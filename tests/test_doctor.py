"""Each trouble that `hybridsim doctor` knows of is found where it is, and only there; each has a remedy."""

import errno
import os
import warnings

import jax
import pytest
from typer.testing import CliRunner

from hybridsim import doctor, storage
from hybridsim.cli import app

HEALTHY = "✓"


def only(findings):
    (finding,) = findings
    return finding


def test_a_healthy_machine(tmp_path, monkeypatch):
    before = jax.config.jax_enable_x64
    monkeypatch.delenv("XLA_FLAGS", raising=False)  # those of the tests
    result = CliRunner().invoke(app, ["doctor"])
    jax.config.update("jax_enable_x64", before)
    assert result.exit_code == 0, result.output
    lines = result.output.splitlines()
    assert lines[-1] == "nothing is in the way"
    assert all(line[:2] in ("✓ ", "! ") for line in lines[:-1])
    about = {line[2:].partition(":")[0] for line in lines[:-1]}
    assert {"hybridsim", "Python", "packages", "jaxlib", "flags", "cores", "memory", "files", "cache", "disk"} <= about
    assert {"devices", "precision", "self-test"} <= about
    assert list((tmp_path / "cache").iterdir()) == []  # it has cleaned up


def test_a_sick_machine_has_exit_code_1_and_all_its_lines(monkeypatch):
    before = jax.config.jax_enable_x64
    monkeypatch.setenv("XLA_FLAGS", "--xla_cpu_enable_fast_math=true")
    monkeypatch.setattr(doctor, "memory", lambda: 1 / 0)
    result = CliRunner().invoke(app, ["doctor"])
    jax.config.update("jax_enable_x64", before)
    assert result.exit_code == 1
    assert "✗ XLA_FLAGS: xla_cpu_enable_fast_math changes results" in result.output
    assert "✗ doctor: ZeroDivisionError" in result.output
    assert result.output.splitlines()[-1] == "something is in the way"


@pytest.mark.parametrize(
    ("environment", "mark"),
    [
        ({}, "✓"),
        ({"XLA_FLAGS": "--xla_cpu_enable_fast_math=true"}, "✗"),
        ({"XLA_FLAGS": "--xla_cpu_enable_fast_math"}, "✗"),
        ({"XLA_FLAGS": "--xla_cpu_enable_fast_math=false"}, "✓"),
        ({"XLA_FLAGS": "--xla_force_host_platform_device_count=2 --xla_gpu_enable_fast_math=1"}, "✗"),
        ({"XLA_FLAGS": "--xla_force_host_platform_device_count=2"}, "✓"),
        ({"XLA_FLAGS": "--xla_backend_optimization_level=0"}, "!"),
        ({"JAX_DISABLE_JIT": "1"}, "!"),
        ({"JAX_DISABLE_JIT": "0"}, "✓"),
        ({"JAX_DEFAULT_MATMUL_PRECISION": "bfloat16"}, "!"),
    ],
)
def test_flags(environment, mark):
    found = only(doctor.flags(environment))
    assert found.mark == mark
    assert mark == HEALTHY or "; " in found.sentence


def test_versions():
    assert doctor._version("numpy", "1.26.4", ">=2.0") == ("✗", "numpy", "1.26.4 is not >=2.0; pip install 'numpy>=2.0'")
    assert doctor._version("numpy", "2.1.0", ">=2.0").mark == "✓"
    assert "make an environment with Python >=3.11" in doctor._version("Python", "3.9.1", ">=3.11").sentence
    assert doctor.jaxlib("0.10.2", "0.9.0").mark == "✗"
    assert doctor.jaxlib("0.10.2", None).mark == "✗"
    assert doctor.jaxlib("0.10.2", "0.10.2").mark == "✓"


def test_a_package_that_is_missing_or_too_old(monkeypatch):
    real = doctor.importlib.metadata.version

    def version(name):
        if name == "optax":
            raise doctor.importlib.metadata.PackageNotFoundError(name)
        return "0.1" if name == "xarray" else real(name)

    monkeypatch.setattr(
        doctor.importlib.metadata, "requires", lambda _: ["optax>=0.2.6", "xarray>=2025.1", "ruff; extra == 'test'"]
    )
    monkeypatch.setattr(doctor.importlib.metadata, "version", version)
    found = {f.what: f for f in doctor.packages() if f.mark != "✓"}
    assert found["optax"].sentence == "is not installed; pip install 'optax>=0.2.6'"
    assert found["xarray"].sentence == "0.1 is not >=2025.1; pip install 'xarray>=2025.1'"
    assert "ruff" not in found


def test_devices():
    assert only(doctor.devices("cpu", ["cpu", "cpu"], False, None, "")) == ("✓", "devices", "2 × cpu (cpu)")
    idle = only(doctor.devices("cpu", ["cpu"], True, None, ""))
    assert idle.mark == "!"
    assert "pip install 'hybridsim[cuda]'" in idle.sentence
    assert only(doctor.devices("cpu", ["cpu"], True, None, "cpu")).mark == "✓"  # chosen, not missed
    assert [f.what for f in doctor.devices("gpu", ["NVIDIA H200"], True, None, "")] == ["devices", "TF32"]
    assert [f.what for f in doctor.devices("gpu", ["NVIDIA H200"], True, "highest", "")] == ["devices"]


def test_known_trouble():
    assert [f.what for f in doctor.known_trouble((0, 10, 2), "cpu")] == ["JAX 0.10", "transforms"]
    assert [f.what for f in doctor.known_trouble((0, 9, 0), "cpu")] == ["transforms"]
    assert list(doctor.known_trouble((0, 11, 0), "cpu")) == []
    assert list(doctor.known_trouble((0, 10, 2), "gpu")) == []


def test_cores_and_memory(monkeypatch):
    assert doctor.cpu_quota("150000 100000\n") == 1.5
    assert doctor.cpu_quota("max 100000\n") is None
    assert doctor.cpu_quota("") is None
    monkeypatch.setattr(doctor.os, "cpu_count", lambda: 4)
    monkeypatch.setattr(doctor.os, "sched_getaffinity", lambda _: range(4), raising=False)
    monkeypatch.setattr(doctor, "_text", lambda _: "max 100000")
    assert doctor.cores({}).mark == "✓"
    assert "OMP_NUM_THREADS=1" in doctor.cores({"OMP_NUM_THREADS": "1"}).sentence
    monkeypatch.setattr(doctor, "_text", lambda _: "200000 100000")
    assert "the container grants 2" in doctor.cores({}).sentence
    monkeypatch.setattr(doctor, "_text", lambda _: "")
    monkeypatch.setattr(doctor.os, "sched_getaffinity", lambda _: range(1), raising=False)
    assert doctor.cores({}).mark == "!"
    assert doctor.memory("MemTotal: 8 kB\nMemAvailable: 1000000 kB\n").mark == "!"
    assert doctor.memory("MemAvailable: 8000000000 kB\n").mark == "✓"


def test_disk_space(tmp_path):
    folder = tmp_path / "not" / "there" / "yet"
    marks = [doctor.disk(folder, free).mark for free in (1e12, 2e9, 1e6)]
    assert marks == ["✓", "!", "✗"]
    assert str(tmp_path) in doctor.disk(folder).sentence


def test_the_cache_folder(tmp_path, monkeypatch):
    folder = tmp_path / "cache"
    assert [f.mark for f in doctor.cache(folder)] == ["✓", "✓"]
    (folder / ".u.12-0a.part").write_bytes(b"half")
    monkeypatch.setattr(doctor, "LARGE_CACHE", 2)
    found = {f.what: f for f in doctor.cache(folder)}
    assert found["leftovers"].mark == found["cache"].mark == "!"
    monkeypatch.setattr(doctor, "file_system", lambda _: "nfs4")
    assert "locks may not hold between machines" in doctor.writing(folder).sentence


def test_a_cache_folder_that_cannot_be_written(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("in the way")
    assert doctor.writing(tmp_path / "file").mark == "✗"
    with monkeypatch.context() as patch:
        patch.setattr(storage.os, "replace", lambda *_: (_ for _ in ()).throw(OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))))
        found = doctor.writing(tmp_path / "cache")
    assert found.mark == "✗"
    assert "HYBRIDSIM_CACHE" in found.sentence
    assert list((tmp_path / "cache").iterdir()) == []


@pytest.mark.parametrize(("grants", "mark"), [("none", "!"), ("twice", "✗"), ("once", "✓")])
def test_locks(tmp_path, monkeypatch, grants, mark):
    def lock(_):
        if grants == "none":
            warnings.warn(
                "this file system has no locks: start one hybridsim per folder only", storage.StorageWarning, stacklevel=1
            )
        return True

    if grants != "once":
        monkeypatch.setattr(storage, "_try_lock", lock)
    assert doctor.writing(tmp_path / "cache").mark == mark


def test_a_wrong_solver_is_noticed(monkeypatch, x64):
    assert doctor.taylor_green().mark == "✓"
    monkeypatch.setattr(doctor.math, "exp", lambda _: 1.0)
    assert doctor.taylor_green().mark == "✗"


def test_single_precision_alone_is_noticed(monkeypatch):
    monkeypatch.setattr(doctor, "taylor_green", lambda: doctor.Finding("✓", "self-test", ""))
    found = {f.what: f.mark for f in doctor.started()}
    assert found["precision"] == "✗"  # nobody has switched it on
