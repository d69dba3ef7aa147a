"""ū(t) = restrict(u_fine(t)): fine runs, filtered to the coarse grids as they go, and kept under a hash of their recipe."""

import contextlib
import inspect
import math
import shutil
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from hybridsim import storage
from hybridsim.compilation import SolverJit, written_anew
from hybridsim.contract import AbstractSolver, AbstractStepper, full_step
from hybridsim.grid import Grid, resample
from hybridsim.journal import Journal
from hybridsim.samples import gathered, over_samples

COURANT = 0.5
"""Courant number of every fine run; halving it changes the default reference by less than its resolution does."""

MONTH = 30 * 86400.0

Progress = Callable[[str, float], None]
"""(what is being done, fraction done); may raise to stop."""


def _quiet(_: str, __: float) -> None:
    return None


class FineRunError(Exception):
    """A fine run stopped being finite; the message says when."""


@eqx.filter_jit
def _coefficients(solver: AbstractSolver, stepper: AbstractStepper, dt: Array, dtype: Any) -> Any:
    """What the steps of one Δt need, made by a program of its own (see `hybridsim.compilation`); `solver` is prepared."""
    return stepper.prepare(solver, dt, dtype)


@SolverJit
def _leap(
    solver: AbstractSolver, stepper: AbstractStepper, coefficients: Any, z: Any, t: Array, dt: Array, count: Array
) -> tuple[Any, Float[Array, "sample c *grid"]]:
    """`count` steps of every sample without closures, and the decoded states; dt and count are traced, so nothing recompiles.
    `solver` is prepared."""
    nothing = lambda _q, _t: None  # noqa: E731

    def one(shared: Any, z: Any) -> tuple[Any, Array]:
        solver, stepper, coefficients, t, dt, count = shared
        advance = lambda i, q: full_step(solver, stepper, coefficients, q, t + i.astype(t.dtype) * dt, dt, nothing)  # noqa: E731
        z = jax.lax.fori_loop(0, count, advance, z)
        return z, solver.decode(z)

    return over_samples(one, (solver, stepper, coefficients, t, dt, count), written_anew(z, count))


@eqx.filter_jit
def _stable(solver: AbstractSolver, u: Float[Array, "sample c *grid"]) -> Array:
    """The largest stable Δt of the fastest sample."""
    return jnp.min(jax.vmap(solver.stable_dt)(u))


def fine_run(
    solver: AbstractSolver,
    stepper: AbstractStepper,
    u: Float[Array, "sample c *grid"],
    interval: float,
    frames: int,
    watch: Callable[[int, Float[Array, "sample c *grid"]], Mapping[str, np.ndarray] | None],
    *,
    courant: float = COURANT,
    dt: float | None = None,
    progress: Callable[[float], None] = lambda _: None,
    journal: Journal | None = None,
) -> tuple[Float[Array, "sample c *grid"], float]:
    """Steps all samples together and shows them to `watch(frame, u)` at t = 0, interval, …, frames · interval.

    Δt is chosen anew in each interval: the largest that divides it with Courant number ≤ `courant` for the fastest sample, or `dt`
    if one is given. What `watch` returns becomes a piece of the `journal`; a run that the journal knows goes on where it was, and
    only what follows is shown.
    Returns the last states and the smallest Δt. Raises `FineRunError` when a state is no longer finite.
    """
    dtype = u.dtype
    solver = eqx.filter_jit(lambda s: s.prepare(dtype))(solver)
    z = eqx.filter_jit(lambda s, q: jax.vmap(s.encode)(q))(solver, u)
    journal = Journal(None) if journal is None else journal
    smallest, done = math.inf, 0
    if (found := journal.latest((z, u))) is not None:
        done, (z, u), meta = found
        smallest = meta["smallest"]
    else:
        journal.add(watch(0, u) or {})
    for frame in range(done + 1, frames + 1):
        limit = float(_stable(solver, u))
        if not (math.isfinite(limit) and limit > 1e-7 * interval):
            raise FineRunError(f"the fine run blew up before t = {(frame - 1) * interval:g}")
        count = max(1, math.ceil(interval / (courant * limit if dt is None else dt) - 1e-9))
        smallest = min(smallest, interval / count)
        t = jnp.asarray((frame - 1) * interval, dtype)
        step = jnp.asarray(interval / count)
        coefficients = _coefficients(solver, stepper, step, dtype)
        z, u = gathered(_leap(solver, stepper, coefficients, z, t, step.astype(dtype), jnp.asarray(count)))
        if not bool(jnp.isfinite(u).all()):
            raise FineRunError(f"the fine run stopped being finite between t = {(frame - 1) * interval:g} and {frame * interval:g}")
        journal.add(watch(frame, u) or {})
        if journal.due():
            journal.save(frame, (z, u), {"smallest": smallest})
        try:
            progress(frame / frames)
        except BaseException:
            journal.save(frame, (z, u), {"smallest": smallest})
            raise
    return u, smallest


def initial_state(initial: Any, key: Array, solver: AbstractSolver, dtype: Any) -> Float[Array, "c *grid"]:
    """u(x, 0) on the grid of `solver`; initial states with an argument `equation` get the solver's."""
    places = tuple(v.at for v in solver.variables)
    wanted = "equation" in inspect.signature(type(initial).__call__).parameters
    return initial(key, solver.grid, places, dtype, **({"equation": solver.equation} if wanted else {}))  # pyright: ignore


def warm_starts(
    solver_on: Callable[[Grid], AbstractSolver],
    stepper: AbstractStepper,
    initial: Any,
    keys: Sequence[Array],
    grid: Grid,
    dtype: Any,
    progress: Callable[[float], None] = lambda _: None,
    journals: Callable[[str], Journal | None] = lambda _: None,
) -> Float[Array, "sample c *grid"]:
    """The states at t = 0 on `grid`: initial states, one per key, after `initial.warm_up` (see `RandomVelocity`).

    `journals(name)` keeps what a stage of the warm-up has finished.
    """
    coarse = grid.with_shape(initial.warm_up_shape) if getattr(initial, "warm_up_shape", None) else grid
    solver = solver_on(coarse)
    places = tuple(v.at for v in solver.variables)
    u = jnp.stack([initial_state(initial, key, solver, dtype) for key in keys])
    total = getattr(initial, "warm_up", 0.0)
    nothing = lambda _f, _u: None  # noqa: E731
    if total > 0:
        first = 0.9 * total if coarse.shape != grid.shape else total
        pieces = max(1, math.ceil(first))
        part = lambda x: progress(0.6 * x)  # noqa: E731
        u, _ = fine_run(solver, stepper, u, first / pieces, pieces, nothing, progress=part, journal=journals("coarse"))
        if coarse.shape != grid.shape:
            u = _refine(u, solver_on(grid), places)
            rest = total - first
            pieces = max(1, math.ceil(4 * rest))
            part = lambda x: progress(0.6 + 0.4 * x)  # noqa: E731
            u, _ = fine_run(solver_on(grid), stepper, u, rest / pieces, pieces, nothing, progress=part, journal=journals("fine"))
    elif coarse.shape != grid.shape:
        u = _refine(u, solver_on(grid), places)
    return u


def _refine(u: Array, solver: AbstractSolver, places: Sequence) -> Array:
    """The same trigonometric fields on the grid of `solver`."""
    at = [v.at for v in solver.variables]
    channels = [resample(u[:, c], solver.grid.shape, places[c], at[c]) for c in range(u.shape[1])]
    return jax.vmap(solver.prepare(u.dtype).project)(jnp.stack(channels, axis=1))


@dataclass
class Frames:
    """Filtered frames of one fine run.

    - `times`: `(frame,)`, float64, the first is 0.
    - `groups`: group name -> `(sample, frame, c, *grid)`, under the filter of that group's solver.
    - `pictures`: the fine states of sample 0 at `picture_times`, `(picture, c, *fine)`, float32.
    - `dt`: smallest step of the fine run; `seconds`: what it took when it was made (of an interrupted one what its last process
      did); `cached`: whether it was read from the cache.
    """

    times: np.ndarray
    groups: dict[str, np.ndarray]
    pictures: np.ndarray
    picture_times: np.ndarray
    dt: float
    seconds: float
    cached: bool = False


def make_frames(
    recipe: Mapping[str, Any],
    solver_on: Callable[[Grid], AbstractSolver],
    stepper: AbstractStepper,
    initial: Any,
    keys: Sequence[Array],
    grid: Grid,
    dtype: Any,
    interval: float,
    frames: int,
    targets: Mapping[str, AbstractSolver],
    *,
    courant: float = COURANT,
    dt: float | None = None,
    half: str | None = None,
    pictures: int = 0,
    store_as: Any = None,
    starts: Mapping[str, Any] | None = None,
    keep: bool = True,
    progress: Progress = _quiet,
) -> Frames:
    """A fine run from warm starts, filtered to every solver in `targets`, from the cache if its recipe is known.

    **Arguments:**

    - `recipe`: everything that decides the numbers, in JSON's types; becomes the cache key with the digest of the sources.
    - `solver_on`: the fine discretisation on a given grid; `stepper` its time stepper.
    - `initial`, `keys`: how the starts are made, one sample per key.
    - `grid`, `dtype`: of the fine run; `interval`, `frames`: what is kept; `courant` or `dt`: its time step after the warm-up.
    - `targets`: group name -> coarse solver, whose `restrict` is the filter.
    - `half`: name of a group for the run at half the resolution from the same starts under the first target's filter: the evidence
      that the fine run has converged.
    - `starts`: what decides the states after the warm-up; kept under a key of their own, so that another window or other coarse
      grids need no new warm-up.
    - `pictures`: how many fine states of sample 0 are kept. `store_as`: dtype of the kept frames (default: that of the run).
    - `keep`: whether the cache is asked and keeps what is made.
    """
    kept = np.dtype(dtype if store_as is None else store_as)
    key = storage.recipe_hash({**recipe, "kept": kept.name}, dtype)
    found = storage.load_cached(key) if keep else None
    times = interval * np.arange(frames + 1)
    picture_frames = np.unique(np.linspace(0, frames, pictures).round().astype(int)) if pictures else np.zeros(0, int)
    if found is not None:
        tensors, meta = found
        groups = {name.removeprefix("group/"): a for name, a in tensors.items() if name.startswith("group/")}
        progress("reference from the cache", 1.0)
        return Frames(times, groups, tensors["pictures"], times[picture_frames], meta["dt"], meta["seconds"], True)

    begin = time.perf_counter()
    share = 0.5 if getattr(initial, "warm_up", 0.0) > frames * interval else 0.2
    warming = lambda x: progress("warm-up", share * x)  # noqa: E731
    u = cached_starts(starts, lambda j: warm_starts(solver_on, stepper, initial, keys, grid, dtype, warming, j), dtype)
    solver = solver_on(grid)
    filters = {
        name: eqx.filter_jit(jax.vmap(lambda q, s=target: s.restrict(q, grid, solver.variables)))
        for name, target in targets.items()
    }

    def watch(frame: int, q: Array) -> dict[str, np.ndarray]:
        piece = {f"group/{name}": np.asarray(restrict(q), kept) for name, restrict in filters.items()}
        return piece | ({"picture": np.asarray(q[0], np.float32)} if frame in picture_frames else {})

    rest = 0.9 if half else 1.0
    how = {"courant": courant, "dt": dt}
    with Unfinished(key if keep else None) as unfinished:
        journal = unfinished.journal("fine")
        part = lambda x: progress("reference", share + (rest - share) * x)  # noqa: E731
        _, dt = fine_run(solver, stepper, u, interval, frames, watch, **how, progress=part, journal=journal)
        seconds = time.perf_counter() - begin
        out = {name: np.stack([piece[f"group/{name}"] for piece in journal.pieces], axis=1) for name in targets}
        shots = [piece["picture"] for piece in journal.pieces if "picture" in piece]
        if half is not None and targets:
            first = next(iter(targets.values()))
            part = lambda x: progress("reference: half resolution", rest + (1 - rest) * x)  # noqa: E731
            other = unfinished.journal("half")
            out[half] = _half_resolution(solver_on, stepper, u, solver, interval, frames, first, kept, how, part, other)
        picture_array = np.stack(shots) if shots else np.zeros((0,), np.float32)
        tensors = {f"group/{name}": a for name, a in out.items()} | {"pictures": picture_array}
        if keep:
            storage.store_cached(key, tensors, {"dt": dt, "seconds": seconds})
        unfinished.clear()
    return Frames(times, out, picture_array, times[picture_frames], dt, seconds)


class Unfinished:
    """What fine runs that the cache does not know yet have finished: a folder per key in the cache, owned by one process at a time.

    Another process that makes the same data, or a cache that cannot be written, goes without. The folder goes when the data are in
    the cache; what an interrupted process left is found by the next one that wants the same.
    """

    def __init__(self, key: str | None):
        self.folder = None if key is None else storage.cache_folder() / "unfinished" / key
        self._lock: storage.FolderLock | None = None

    def __enter__(self) -> "Unfinished":
        if self.folder is not None:
            lock = storage.FolderLock(self.folder, shared=True)
            try:
                lock.__enter__()
                self._lock = lock
                self._forget_old()
            except storage.StorageError as error:
                warnings.warn(
                    f"{error}; going on without, so what this fine run has finished is not kept if it is interrupted",
                    storage.StorageWarning,
                    stacklevel=2,
                )
                self.folder = None
        return self

    def __exit__(self, *error: object) -> None:
        if self._lock is not None:
            self._lock.__exit__(*error)
        if self.folder is not None:
            with contextlib.suppress(OSError):
                self.folder.rmdir()  # if nothing is in it

    def _forget_old(self) -> None:
        """Removes what nobody has asked for in a month: its sources or versions are gone."""
        assert self.folder is not None
        with contextlib.suppress(OSError):
            for other in self.folder.parent.iterdir():
                newest = max((path.stat().st_mtime for path in other.rglob("*") if path.is_file()), default=other.stat().st_mtime)
                if other != self.folder and time.time() - newest > MONTH:
                    shutil.rmtree(other, ignore_errors=True)

    def journal(self, name: str) -> Journal:
        """The journal of one of the runs; in memory only where there is no folder."""
        return Journal(None if self.folder is None else self.folder / name, forgiving=True)

    def clear(self) -> None:
        """Removes everything: the data are made."""
        if self.folder is not None:
            with contextlib.suppress(OSError):  # whoever removed it before us did what we want
                for place in self.folder.iterdir():
                    if place.is_dir():
                        shutil.rmtree(place, ignore_errors=True)


def cached_starts(recipe: Mapping[str, Any] | None, make: Callable[[Callable[[str], Journal]], Array], dtype: Any) -> Array:
    """The states after the warm-up, from the cache if their recipe is known; `make` is given journals for its stages."""
    if recipe is None:
        return make(lambda _: Journal(None))
    key = storage.recipe_hash({"starts": dict(recipe)}, dtype)
    found = storage.load_cached(key)
    if found is not None:
        return jnp.asarray(found[0]["u"])
    with Unfinished(key) as unfinished:
        u = make(unfinished.journal)
        storage.store_cached(key, {"u": np.asarray(u)}, {})
        unfinished.clear()
    return u


def _half_resolution(solver_on, stepper, u, solver, interval, frames, target, kept, how, progress, journal) -> np.ndarray:
    """The same starts, cut to half the resolution and run there, under the filter of `target`."""
    coarse = solver.grid.with_shape([n // 2 for n in solver.grid.shape])
    half = solver_on(coarse)
    start = jax.vmap(lambda q: half.restrict(q, solver.grid, solver.variables))(u)
    restrict = eqx.filter_jit(jax.vmap(lambda q: target.restrict(q, coarse, half.variables)))
    watch = lambda _, q: {"half": np.asarray(restrict(q), kept)}  # noqa: E731
    fine_run(half, stepper, start, interval, frames, watch, **how, progress=progress, journal=journal)
    return np.stack([piece["half"] for piece in journal.pieces], axis=1)


def sample_keys(seed: int, count: int) -> list[Array]:
    """One random key per sample; different seeds give disjoint samples."""
    root = jax.random.key(seed)
    return [jax.random.fold_in(root, i) for i in range(count)]
