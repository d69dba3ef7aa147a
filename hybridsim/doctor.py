"""`hybridsim doctor`: what of this machine and this installation could spoil a result, and what to do about it.

Every finding is a line: ✓ as it should be, ! worth knowing, ✗ results or files are in danger. Each ! and ✗ ends with a remedy. The
environment is read before JAX starts; then come JAX itself, the cache folder, and two small tests of what everything rests on: one
step of a solver against the exact solution, and one file written, replaced and locked.
"""

import importlib.metadata
import math
import os
import platform
import shutil
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from hybridsim import storage
from hybridsim.storage import GIB

if TYPE_CHECKING:
    from rich.console import Console

LARGE_CACHE = 50 * GIB
LITTLE_DISK, NO_DISK = 5 * GIB, 0.5 * GIB
LITTLE_MEMORY = 2 * GIB
TOLERANCE = 1e-12
"""Of one step of the Taylor–Green vortex, which the spectral solver takes exactly but for rounding."""

FAST_MATH = ("xla_cpu_enable_fast_math", "xla_gpu_enable_fast_math", "xla_cpu_enable_fast_min_max")
"""Flags that let XLA reorder sums and take NaN for impossible: results change, and a blow-up may pass unseen."""

OTHER_FLAGS = {
    "xla_backend_optimization_level": "programs are compiled with less care and run slower",
    "xla_gpu_exhaustive_tiling_search": "kernels are chosen by timing, so results differ from run to run",
    "xla_disable_hlo_passes": "passes of the compiler are left out, so results and times differ from ours",
}

VARIABLES = {
    "JAX_DISABLE_JIT": "nothing is compiled, and everything is slower by orders of magnitude",
    "JAX_DEBUG_NANS": "a run that blows up stops with an error of JAX, and its last good state is not kept",
    "JAX_DEFAULT_MATMUL_PRECISION": "products of matrices, and with them networks, round otherwise than where they were trained",
    "NVIDIA_TF32_OVERRIDE": "single-precision products on the GPU may round to ten bits",
    "JAX_ENABLE_X64": "scripts of your own start in another precision than they say (the commands choose for themselves)",
}
"""Variables of the environment that change what JAX computes; unset, each is as it should be."""

NETWORKED = ("nfs", "nfs4", "cifs", "smb3", "fuse.sshfs", "9p", "lustre", "gpfs")


class Finding(NamedTuple):
    """✓, ! or ✗, what it is about, and a sentence with the remedy."""

    mark: str
    what: str
    sentence: str

    def __str__(self) -> str:
        return f"{self.mark} {self.what}: {self.sentence}"


# --- the environment -------------------------------------------------------------------------------------------------------------


def packages() -> Iterator[Finding]:
    """Python and every package that hybridsim needs, against the versions that it is written for."""
    from packaging.requirements import Requirement

    try:
        needs = importlib.metadata.requires("hybridsim") or []
        python = importlib.metadata.metadata("hybridsim")["Requires-Python"] or ""
    except importlib.metadata.PackageNotFoundError:
        yield Finding("!", "hybridsim", "is not installed, only found; pip install -e . in its checkout")
        needs, python = [], ""
    yield _version("Python", platform.python_version(), python)
    found: dict[str, str] = {}
    for requirement in map(Requirement, needs):
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            continue
        try:
            found[requirement.name] = importlib.metadata.version(requirement.name)
        except importlib.metadata.PackageNotFoundError:
            yield Finding("✗", requirement.name, f"is not installed; pip install '{requirement}'")
            continue
        if not requirement.specifier.contains(found[requirement.name], prereleases=True):
            yield _version(requirement.name, found[requirement.name], str(requirement.specifier))
    if found:
        shown = ("jax", "equinox", "optax", "numpy", "xarray", "netCDF4")
        yield Finding("✓", "packages", ", ".join(f"{name} {found[name]}" for name in shown if name in found))
    yield jaxlib(_installed("jax"), _installed("jaxlib"))


def _installed(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _version(name: str, found: str, wanted: str) -> Finding:
    from packaging.specifiers import SpecifierSet

    if SpecifierSet(wanted).contains(found, prereleases=True):
        return Finding("✓", name, f"{found}")
    remedy = f"make an environment with Python {wanted}" if name == "Python" else f"pip install '{name}{wanted}'"
    return Finding("✗", name, f"{found} is not {wanted}; {remedy}")


def jaxlib(jax: str | None, lib: str | None) -> Finding:
    """JAX and jaxlib are made for each other."""
    if jax is None or lib is None:
        return Finding("✗", "jaxlib", "JAX or jaxlib is missing; pip install jax")
    if lib != jax:
        return Finding("✗", "jaxlib", f"{lib} is not made for JAX {jax}; pip install 'jax=={jax}' 'jaxlib=={jax}'")
    return Finding("✓", "jaxlib", f"{lib}, made for this JAX")


def flags(environment: Mapping[str, str]) -> Iterator[Finding]:
    """Flags and variables that change results or times."""
    good = True
    for part in environment.get("XLA_FLAGS", "").split():
        name, _, value = part.lstrip("-").partition("=")
        on = value.lower() not in ("false", "0")
        if name in FAST_MATH and on:
            good = False
            yield Finding("✗", "XLA_FLAGS", f"{name} changes results and may hide a blow-up; remove it")
        elif name in OTHER_FLAGS:
            good = False
            yield Finding("!", "XLA_FLAGS", f"{name}: {OTHER_FLAGS[name]}; remove it unless you mean it")
    for name, what in VARIABLES.items():
        if environment.get(name, "").lower() not in ("", "0", "false"):
            good = False
            yield Finding("!", name, f"{what}; unset it unless you mean it")
    if good:
        yield Finding("✓", "flags", "nothing in the environment changes what is computed")


def cores(environment: Mapping[str, str]) -> Finding:
    """How many cores there are, and how many this process may use."""
    all_of_them = os.cpu_count() or 1
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else all_of_them
    quota = cpu_quota(_text("/sys/fs/cgroup/cpu.max"))
    sentence = f"{usable} of {all_of_them} may be used"
    if quota is not None and quota < usable:
        return Finding("!", "cores", f"{sentence}, but the container grants {quota:g}; give it more, or start with taskset")
    for name in ("OMP_NUM_THREADS", "JAX_NUM_CPU_DEVICES"):
        if (value := environment.get(name, "")).isdigit() and int(value) < usable:
            return Finding("!", "cores", f"{sentence}, and {name}={value} leaves some idle; unset it")
    if usable < all_of_them:
        return Finding("!", "cores", f"{sentence}; start without taskset or a smaller share of the machine to use all")
    return Finding("✓", "cores", sentence)


def cpu_quota(text: str) -> float | None:
    """Cores that a control group grants, of its `cpu.max`; None where there is no limit."""
    parts = text.split()
    return float(parts[0]) / float(parts[1]) if len(parts) == 2 and parts[0].isdigit() and parts[1].isdigit() else None


def _text(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def memory(meminfo: str | None = None) -> Finding:
    """Memory that is free now."""
    from hybridsim.config import machine_memory

    total = machine_memory()
    lines = dict(
        line.split(":", 1) for line in (_text("/proc/meminfo") if meminfo is None else meminfo).splitlines() if ":" in line
    )
    available = float(lines["MemAvailable"].split()[0]) * 1024 if "MemAvailable" in lines else total
    free = min(total, available)
    if not math.isfinite(free):
        return Finding("!", "memory", "this system does not say how much there is; start with small grids")
    sentence = f"{free / GIB:.1f} of {total / GIB:.1f} GiB are free"
    if free < LITTLE_MEMORY:
        return Finding("!", "memory", f"{sentence}; end other programs, or take smaller grids and fewer samples")
    return Finding("✓", "memory", sentence)


# --- JAX -------------------------------------------------------------------------------------------------------------------------


def gpu_visible() -> bool:
    """Whether this system shows an NVIDIA GPU, whatever JAX says."""
    return Path("/proc/driver/nvidia/version").exists() or Path("/dev/nvidia0").exists()


def devices(backend: str, kinds: list[str], visible: bool, matmul: str | None, chosen: str) -> Iterator[Finding]:
    """What JAX computes on.

    **Arguments:** JAX's `backend` and the names of its devices; whether an NVIDIA GPU is `visible`; JAX's default precision of
    matrix products; the platforms that `JAX_PLATFORMS` has `chosen`.
    """
    names = f"{len(kinds)} × {kinds[0]}" if kinds else "none"
    if visible and backend == "cpu" and "cpu" not in chosen:
        yield Finding("!", "devices", f"{names}, while an NVIDIA GPU stands idle; pip install 'hybridsim[cuda]'")
    else:
        yield Finding("✓", "devices", f"{names} ({backend})")
    if backend == "gpu" and matmul in (None, "default", "fastest", "tensorfloat32"):
        yield Finding(
            "!",
            "TF32",
            "products in single precision may round to ten bits on this GPU; set JAX_DEFAULT_MATMUL_PRECISION=highest to compare "
            "with runs on CPU",
        )


def known_trouble(version: tuple[int, ...], backend: str) -> Iterator[Finding]:
    """Versions that are known to compute or to time something badly."""
    if backend != "cpu":
        return
    if version[:2] == (0, 10):
        yield Finding(
            "!",
            "JAX 0.10",
            "on CPU some compiled sums of closures of your own, Σ_k a_k b_kj in single precision over more than 32,768 elements, "
            "may be wrong (__ynn_fusion); write them as products of arrays of equal rank, and compare with float64",
        )
    if version[:2] < (0, 11):
        yield Finding(
            "✓", "transforms", "JAX below 0.11 runs some FFTs on one thread (openxla/xla 46345); our solvers are compiled around it"
        )


def started() -> Iterator[Finding]:
    """JAX as it runs here: devices, precision, known trouble."""
    import jax
    import jax.numpy as jnp

    try:
        found = jax.devices()
    except RuntimeError as error:
        yield Finding("✗", "devices", f"JAX finds none ({' '.join(str(error).split())[:200]}); unset JAX_PLATFORMS")
        return
    matmul = jax.config.values.get("jax_default_matmul_precision")
    chosen = str(jax.config.values.get("jax_platforms") or "")
    yield from devices(jax.default_backend(), [d.device_kind for d in found], gpu_visible(), matmul, chosen)
    if jnp.result_type(float) != jnp.float64:
        yield Finding("✗", "precision", "double precision cannot be switched on; unset JAX_ENABLE_X64")
    else:
        yield Finding("✓", "precision", "single and double")
    yield from known_trouble(jax.__version_info__, jax.default_backend())
    yield taylor_green()


def taylor_green() -> Finding:
    """One step of a Taylor–Green vortex, u = (sin x cos y, −cos x sin y), which decays as exp(−2νt), in double precision."""
    import jax.numpy as jnp
    import numpy as np

    from hybridsim.config import experiment_from

    dt, viscosity, n = 0.125, 0.1, 16
    run = {"solver": "spectral", "shape": [n, n], "dt": dt, "precision": "float64"}
    case = experiment_from(
        {
            "equation": {"use": "navier_stokes", "viscosity": viscosity},
            "domain": {"lengths": [2 * math.pi, 2 * math.pi]},
            "initial": {"use": "taylor_green"},
            "time": {"end": dt, "frames": 1},
            "reference": run,
            "runs": {"vortex": run},
        },
        Path("doctor.yaml"),
    )
    from hybridsim.model import State, rollout

    model = case.model_for("vortex")
    x, y = case.grid([n, n]).mesh()
    start = np.stack([np.sin(x) * np.cos(y), -np.cos(x) * np.sin(y)])
    found = np.asarray(rollout(model, State(jnp.asarray(start)), 1).u[-1])
    error = float(np.max(np.abs(found - start * math.exp(-2 * viscosity * dt))))
    if not error < TOLERANCE:
        return Finding("✗", "self-test", f"a step of the spectral solver is wrong by {error:.1e}; make a fresh environment")
    return Finding("✓", "self-test", f"a step of the spectral solver is exact to {error:.0e}")


# --- files -----------------------------------------------------------------------------------------------------------------------


def file_system(folder: Path) -> str:
    """The type of the file system under a folder, where the system tells."""
    best, kind = "", ""
    for line in _text("/proc/self/mounts").splitlines():
        parts = line.split()
        if len(parts) > 2 and folder.is_relative_to(parts[1]) and len(parts[1]) >= len(best):
            best, kind = parts[1], parts[2]
    return kind


def cache(folder: Path) -> Iterator[Finding]:
    """The cache folder: can it be written, replaced and locked, how large is it, what was left there?"""
    yield writing(folder)
    if not folder.is_dir():
        return
    size, left = 0, 0
    for place, folders, files in os.walk(folder):
        left += sum(storage.is_leftover(name) for name in [*folders, *files])
        for name in files:
            path = Path(place) / name
            try:
                found = path.lstat()
            except OSError:
                continue
            size += found.st_size
    if left:
        yield Finding("!", "leftovers", f"{left} unfinished files of killed processes lie in {folder}; remove the '.*.part' in it")
    sentence = f"{folder} holds {size / GIB:.2f} GiB"
    if size > LARGE_CACHE:
        yield Finding("!", "cache", f"{sentence}; what is not needed can be removed, and is made anew when it is")
    else:
        yield Finding("✓", "cache", sentence)


def writing(folder: Path) -> Finding:
    """One file written, synced, replaced, read and locked, as every result is."""
    begin = time.perf_counter()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix="doctor-", dir=folder) as name, warnings.catch_warnings():
            warnings.simplefilter("error", storage.StorageWarning)
            place = Path(name)
            with storage.FolderLock(place):
                for content in ("one", "two"):
                    storage.write_json(place / "test.json", content)
                if storage.read_json(place / "test.json") != "two":
                    return Finding("✗", "files", f"{folder} does not give back what is written; choose another HYBRIDSIM_CACHE")
                try:
                    with storage.FolderLock(place):
                        return Finding("✗", "locks", f"{folder} grants a lock twice; choose another HYBRIDSIM_CACHE")
                except storage.LockedError:
                    pass
    except storage.StorageWarning as warning:
        return Finding("!", "locks", f"{folder}: {warning}")
    except (OSError, storage.StorageError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        return Finding("✗", "files", f"{folder} cannot be written ({reason}); set HYBRIDSIM_CACHE to a folder of yours")
    kind, took = file_system(folder.resolve()), time.perf_counter() - begin
    if kind in NETWORKED:
        return Finding(
            "!", "locks", f"{folder} lies on {kind}, where locks may not hold between machines; start one hybridsim per folder"
        )
    return Finding("✓", "files", f"written, synced, replaced and locked in {1e3 * took:.0f} ms")


def disk(folder: Path, free: float | None = None) -> Finding:
    """Space where a folder is, or will be."""
    folder = storage.existing_parent(folder)
    free = float(shutil.disk_usage(folder).free) if free is None else free
    sentence = f"{free / GIB:.1f} GiB are free at {folder}"
    if free < NO_DISK:
        return Finding("✗", "disk", f"{sentence}; free some, or work elsewhere")
    if free < LITTLE_DISK:
        return Finding("!", "disk", f"{sentence}; references and frames may need more")
    return Finding("✓", "disk", sentence)


# --- the command -----------------------------------------------------------------------------------------------------------------


def examine(environment: Mapping[str, str], start_jax: Callable[[], None]) -> Iterator[Finding]:
    """All findings, in order; each is made as it is asked for."""
    import hybridsim

    commit = storage.source_commit()
    yield Finding(
        "✓",
        "hybridsim",
        f"{hybridsim.__version__}{f' ({commit[:10]}{commit[40:]})' if commit else ''} in {Path(hybridsim.__file__).parent}",
    )
    yield from packages()
    yield from flags(environment)
    yield cores(environment)
    yield memory()
    folder = storage.cache_folder()
    yield from cache(folder)
    for place in dict.fromkeys([folder.absolute(), Path.cwd()]):
        yield disk(place)
    start_jax()
    yield from started()


def doctor_command(console: "Console", start_jax: Callable[[], None]) -> int:
    """Everything that `hybridsim doctor` does: a line per finding; 1 where one of them is ✗."""
    sick = 0
    findings = examine(dict(os.environ), start_jax)
    while True:
        try:
            finding = next(findings)
        except StopIteration:
            break
        except Exception as error:
            # what cannot even be examined is a finding, too
            reason = " ".join(str(error).split())[:300]
            finding = Finding(
                "✗", "doctor", f"{type(error).__name__}: {reason}; make a fresh environment (Python {sys.version.split()[0]})"
            )
        sick += finding.mark == "✗"
        console.print(str(finding), markup=False, soft_wrap=True)
    console.print("something is in the way" if sick else "nothing is in the way", markup=False)
    return 1 if sick else 0
