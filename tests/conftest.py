"""What holds in every test: annotations are executed, ranks are never promoted silently, precision is restored."""

import os
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

# Most of the time of these tests is compilation. Code that is optimised less, in one piece and by the older emitters takes a third
# of it, and rounds alike from run to run. A flag that XLA does not know ends the process, so the two that may go one day are given
# only to the version where they were seen to work. XLA_FLAGS from outside come after, and win.
_flags = ["--xla_backend_optimization_level=0"]
if version("jaxlib").startswith("0.10."):
    _flags += ["--xla_cpu_use_fusion_emitters=false", "--xla_cpu_parallel_codegen_split_count=1"]
os.environ["XLA_FLAGS"] = " ".join([*_flags, os.environ.get("XLA_FLAGS", "")]).strip()

import jaxtyping  # noqa: E402

# every function and class of the package, the rooms included, is checked against its annotations while tests run
_hook = jaxtyping.install_import_hook("hybridsim", "beartype.beartype")

import jax  # noqa: E402
import numpy as np  # noqa: E402
import pytest  # noqa: E402
from reliability_table import pytest_addoption, pytest_configure, reliability  # noqa: E402, F401

jax.config.update("jax_numpy_rank_promotion", "raise")


def _memory_maps() -> int:
    """How many pieces of address space this process holds: compiled code takes several each, and Linux allows 65,530."""
    maps = Path("/proc/self/maps")
    return maps.read_bytes().count(b"\n") if maps.exists() else 0


@pytest.fixture
def x64() -> Iterator[None]:
    """Double precision for one test."""
    before = jax.config.jax_enable_x64
    jax.config.update("jax_enable_x64", True)
    yield
    jax.config.update("jax_enable_x64", before)


@pytest.fixture
def key() -> jax.Array:
    """A fixed random key."""
    return jax.random.key(20240229)


@pytest.fixture
def rng() -> np.random.Generator:
    """A fixed generator of host random numbers."""
    return np.random.default_rng(20240229)


@pytest.fixture(autouse=True)
def _no_state_between_tests(tmp_path, monkeypatch) -> Iterator[None]:
    """Each test has its own cache folder, and leaves the precision as it found it."""
    monkeypatch.setenv("HYBRIDSIM_CACHE", str(tmp_path / "cache"))
    before = jax.config.jax_enable_x64
    yield
    if _memory_maps() > 10_000:
        jax.clear_caches()
    assert jax.config.jax_enable_x64 == before, "a test changed jax_enable_x64 and did not restore it: use the fixture x64"
