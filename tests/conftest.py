"""What holds in every test: annotations are executed, ranks are never promoted silently, precision is restored."""

import os
from collections.abc import Iterator
from pathlib import Path

# Most of the time of these tests is compilation; code that is optimised less takes two thirds of it, and rounds alike from run
# to run. XLA_FLAGS from outside come after, and win.
os.environ["XLA_FLAGS"] = f"--xla_backend_optimization_level=0 {os.environ.get('XLA_FLAGS', '')}".strip()

import jaxtyping

# every function and class of the package, the rooms included, is checked against its annotations while tests run
_hook = jaxtyping.install_import_hook("hybridsim", "beartype.beartype")

import jax  # noqa: E402
import numpy as np  # noqa: E402
import pytest  # noqa: E402

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
