"""θ ← Adam(θ, ∂_θ L(Φ_θⁿ(ū₀), ū(tₙ))): closures trained with the solver in the loop, through unrolled trajectories."""

import functools
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array, Float, Int, PyTree

from hybridsim import diagnostics, gas, losses
from hybridsim.contract import AbstractClosure
from hybridsim.journal import SAVE_EVERY, Cadence
from hybridsim.model import Budget, Model, advance, frames_of
from hybridsim.storage import Checkpoints, StorageError
from hybridsim.symmetry import symmetries, turned
from hybridsim.windows import InMemory, Prefetch, Windows, batch, digest_of

MOST_RECORDS = 20_000
"""Records of a history that are kept; of a longer one every second is dropped, as often as need be, but for validations."""

Schedule = Literal["cosine", "linear", "exponential", "constant"]
Choice = Literal["t95", "correlation", "error", "temperature_error"]
Keep = Literal["best", "last"]


@dataclass(frozen=True)
class Recipe:
    """How a closure is trained.

    **What an update sees**

    - `unroll`: frames unrolled in each phase, growing; `updates`: optimiser steps per phase.
    - `batch`: windows per update, shared out to the tasks.
    - `loss`: (name, weight) of each term; see `hybridsim.losses`. `power`: p of the weight |k|^{2p} of the term `state` (0
      velocity, 1 vorticity; between walls always 0).
    - `warm_up`: frames that the model runs by itself before the loss begins, without gradient.
    - `truncate`: gradients stop after so many frames, 0 never (truncated back-propagation); the unrolls beyond are multiples of it.
    - `noise`: standard deviation of what is added to the start of every window, in units of each channel's fluctuations.
    - `symmetries`: every window is turned or mirrored at random, as box and equation allow (see `hybridsim.symmetry`).

    **The optimiser**

    - `rate`: peak learning rate, reached after `rate_warm_up` updates (at most a tenth of all); `schedule`: how it falls to
      `final_rate` times that at the last update.
    - `weight_decay`: of AdamW, 0 is Adam. `clip`: largest global norm of the gradient.
    - `average`: γ of the moving average θ̄ ← γθ̄ + (1 − γ)θ that is validated and kept instead of θ; 0 none.

    **Validation**

    - `validate_every`: updates between validations. `choose`: the weights with the best validation `t95`, mean `correlation` or, of
      a gas, mean `error` or, where it radiates, `temperature_error` are kept, and so is the best of several seeds. `keep`: `last`
      keeps those of the last validation without a blow-up instead, whatever it says: the best of many noisy numbers is a lucky one,
      above all with a moving average. `stop_after`: validations in a row without a better one that end the training, 0 never.

    **The machine**

    - `memory`: MiB that the values which a gradient keeps of the unrolled steps may take; what does not fit is evaluated again.
      `checkpoint_levels`, if given, takes its place, as in `rollout`.
    - `devices`: how many devices share a batch; 0: the most that divide it. The sums are those of one device but for rounding.
    - `patience`: updates in a row that may be skipped because they were not finite; then training goes back to the last validated
      weights with half the learning rate, at most `rollbacks` times.
    """

    unroll: tuple[int, ...] = (1, 2, 4, 8, 16, 32)
    updates: tuple[int, ...] = (200, 200, 200, 200, 200, 200)
    batch: int = 8
    rate: float = 2e-3
    clip: float = 1.0
    power: float = 0.5
    validate_every: int = 200
    loss: tuple[tuple[str, float], ...] = (("state", 1.0),)
    warm_up: int = 0
    truncate: int = 0
    noise: float = 0.0
    symmetries: bool = False
    schedule: Schedule = "cosine"
    rate_warm_up: int = 50
    final_rate: float = 0.02
    weight_decay: float = 0.0
    average: float = 0.0
    choose: Choice = "t95"
    keep: Keep = "best"
    stop_after: int = 0
    memory: float = 512.0
    checkpoint_levels: int | None = None
    devices: int = 0
    patience: int = 20
    rollbacks: int = 3

    def __post_init__(self):
        if len(self.unroll) != len(self.updates):
            raise ValueError(f"updates: {len(self.updates)} phases for {len(self.unroll)} of unroll; give one entry each")
        if uneven := [n for n in self.unroll if self.truncate and n > self.truncate and n % self.truncate]:
            raise ValueError(f"truncate: unrolls beyond {self.truncate} frames must be multiples of it, found {uneven[0]}")
        if unknown := [name for name, _ in self.loss if name not in losses.TERMS]:
            raise ValueError(f"loss: there is no term {unknown[0]!r}; possible are {', '.join(losses.TERMS)}")
        if self.keep == "last" and self.stop_after:
            raise ValueError(
                "stop_after: ends a training that gets no better, but with `keep: last` the last weights are kept; remove one"
            )
        if not any(weight > 0 for _, weight in self.loss):
            raise ValueError("loss: every weight is zero, so there is nothing to learn")

    @property
    def total(self) -> int:
        return sum(self.updates)

    @property
    def longest(self) -> int:
        """Frames that the longest window spans."""
        return self.warm_up + max(self.unroll)

    def phase(self, update: int) -> int:
        """The unroll length of an update."""
        done = 0
        for length, count in zip(self.unroll, self.updates, strict=True):
            done += count
            if update < done:
                return length
        return self.unroll[-1]

    def rate_of(self, update: Any) -> Any:
        """The learning rate of an update, before any rollback."""
        return learning_rate(self)(update)


class Task:
    """One reference that a closure learns from: a coarse model, and filtered fine trajectories of the same flow.

    **Arguments:**

    - `model`: the run that hosts the closures; fixed Δt.
    - `data`: `(trajectory, frame, c, *grid)` in memory, or `Windows` that read them; `validation`: other trajectories.
    - `interval`: time between frames; `every`: model steps per frame.
    - `modes`: |k_i| ≤ `modes` are compared when validating.
    - `name`: what the records call it.
    """

    def __init__(
        self,
        model: Model,
        data: Windows | Float[np.ndarray, "trajectory frame c *grid"],
        validation: Float[np.ndarray, "other span c *grid"],
        *,
        interval: float,
        every: int,
        modes: int,
        name: str = "",
    ):
        if model.courant is not None:
            raise ValueError("model: a model that is trained needs a fixed time step; leave courant out")
        if not math.isclose(every * model.step_time, interval, rel_tol=1e-9):
            raise ValueError(f"every: {every} model steps of {model.step_time:g} are not the {interval:g} between frames")
        self.model, self.validation = model, validation
        self.windows: Windows = InMemory(data) if isinstance(data, np.ndarray) else data
        self.interval, self.every, self.modes, self.name = interval, every, modes, name


class Progress(eqx.Module):
    """Everything that training needs to go on bit for bit.

    `good` is (weights, optimiser, average) at the last validation, to go back to; `scale` multiplies the learning rate; `stale`
    counts validations without a better one.
    """

    weights: PyTree
    optimiser: PyTree
    average: PyTree
    good: tuple[PyTree, PyTree, PyTree]
    best: PyTree
    best_score: Float[Array, ""]
    update: Int[Array, ""]
    skipped: Int[Array, ""]
    rollbacks: Int[Array, ""]
    stale: Int[Array, ""]
    scale: Float[Array, ""]


@dataclass
class Outcome:
    """What one training run gave: the model of the first task with its best weights, the history, and why it ended.

    `compile_seconds`: by unroll length, what its first update took beyond the others; `skipped`: updates that were not finite.
    """

    model: Model
    history: list[dict[str, Any]]
    best_score: float
    best_update: int
    seconds: float
    compile_seconds: dict[int, float]
    skipped: int
    rollbacks: int
    stopped_early: bool

    @property
    def best_validation(self) -> dict[str, Any]:
        """The validation scores of the weights that were kept."""
        return next(r["validation"] for r in self.history if r["update"] == self.best_update and "validation" in r)


class TrainingDiverged(Exception):
    """Too many updates in a row were not finite, and going back did not help."""


# --- the gradient ----------------------------------------------------------------------------------------------------------------


class How(eqx.Module):
    """What decides a compiled gradient, beside the shapes: all of it static. As in `Recipe`, and `every` as in `Task`."""

    loss: tuple[tuple[str, float], ...] = eqx.field(static=True, default=(("state", 1.0),))
    power: float = eqx.field(static=True, default=0.5)
    every: int = eqx.field(static=True, default=1)
    warm_up: int = eqx.field(static=True, default=0)
    truncate: int = eqx.field(static=True, default=0)
    noise: float = eqx.field(static=True, default=0.0)
    levels: int | Budget = eqx.field(static=True, default=0)
    devices: int = eqx.field(static=True, default=1)


def _stopped(tree: PyTree) -> PyTree:
    """The same values, through which no gradient flows."""
    return jax.tree.map(lambda a: jax.lax.stop_gradient(a) if eqx.is_inexact_array(a) else a, tree)


def without_closures(model: Model) -> Model:
    """The same model without closures."""
    return Model(model.solver, model.stepper, model.dt, (), (), model.substeps, model.courant)


def _bare_frames(model: Model, every: int) -> Callable[[Array], Array]:
    """(u₁, u₂, …) -> (Φ₀(u₁), Φ₀(u₂), …): one frame of the solver alone from each."""

    def frame(u: Array) -> Array:
        bare = without_closures(model)
        prepared = bare.prepare(u.dtype)
        z, carry = prepared.solver.encode(u), bare.init_carry(u)
        return frames_of(bare, prepared, z, carry, jnp.zeros((), jnp.int32), 1, every, 0)[1][0]

    return lambda u: jax.lax.map(jax.checkpoint(frame, prevent_cse=False), u)


def window_loss(
    model: Model, window: Float[Array, "frames c *grid"], key: Array, how: How
) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
    """(Σ λ_i L_i, {i: L_i}) over a window of frames, rolled out from its first one."""
    start, dtype = window[0], window.dtype
    prepared = model.prepare(dtype)
    if how.noise:
        space = tuple(range(1, start.ndim))
        spread = jnp.std(start, axis=space, keepdims=True)
        start = start + how.noise * spread * jax.random.normal(jax.random.fold_in(key, 1), start.shape, dtype)
    carry = model.init_carry(start, key)
    z, step = prepared.solver.encode(start), jnp.zeros((), jnp.int32)
    if how.warm_up:
        frozen, at_rest, z, carry = _stopped((model, prepared, z, carry))
        z, carry, step = advance(frozen, at_rest, z, carry, step, how.warm_up * how.every)
        start = prepared.solver.decode(z)
    frames = window.shape[0] - 1 - how.warm_up
    length = min(how.truncate or frames, frames)

    def piece(state: tuple, _: None) -> tuple[tuple, Array]:
        z, carry, step = _stopped(state)
        return frames_of(model, prepared, z, carry, step, length, how.every, how.levels)

    if length == frames:
        _, u = frames_of(model, prepared, z, carry, step, frames, how.every, how.levels)
    else:
        _, u = jax.lax.scan(piece, (z, carry, step), None, frames // length)
        u = u.reshape(frames, *u.shape[2:])
    truth = window[1 + how.warm_up :]
    context = losses.context_of(prepared.solver, how.power, dtype, _bare_frames(model, how.every))
    terms = {name: losses.TERMS[name](context, u, truth, start) for name, weight in how.loss if weight}
    weighted = [jnp.asarray(weight, dtype) * terms[name] for name, weight in how.loss if weight]
    return functools.reduce(jnp.add, weighted), terms


@eqx.filter_jit
def gradient_of(
    model: Model, weights: PyTree, windows: Float[Array, "window frames c *grid"], key: Array, how: How
) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]], PyTree]:
    """(L, {i: L_i}, ∂L/∂θ), means over the windows; `model` is without the arrays θ = `weights` of its closures.

    On CPU a device takes its windows one after another, which is faster there and keeps no more than one of them; elsewhere all at
    once. Compiled once per unroll length and structure, whatever the seed is.
    """

    def one(weights: PyTree, model: Model, window: Array, key: Array) -> tuple[Array, dict[str, Array]]:
        whole = eqx.tree_at(lambda m: m.closures, model, eqx.combine(weights, model.closures), is_leaf=lambda x: x is None)
        return window_loss(whole, window, key, how)

    model = eqx.tree_at(lambda m: m.solver, model, model.solver.for_training())
    arrays, fixed = eqx.partition(model, eqx.is_array)

    def share(weights: PyTree, arrays: PyTree, windows: Array, numbers: Array, key: Array) -> PyTree:
        whole = eqx.combine(arrays, fixed)

        def with_gradient(window: Array, number: Array) -> PyTree:
            return jax.value_and_grad(one, has_aux=True)(weights, whole, window, jax.random.fold_in(key, number))

        if jax.default_backend() == "cpu":
            zero = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), jax.eval_shape(with_gradient, windows[0], numbers[0]))

            def body(total: PyTree, given: tuple[Array, Array]) -> tuple[PyTree, None]:
                return jax.tree.map(jnp.add, total, with_gradient(*given)), None

            total, _ = jax.lax.scan(body, zero, (windows, numbers))
        else:
            total = jax.tree.map(lambda a: a.sum(axis=0), jax.vmap(with_gradient)(windows, numbers))
        return jax.lax.psum(total, "batch") if how.devices > 1 else total

    count = windows.shape[0]
    numbers = jnp.arange(count)
    if how.devices > 1:
        mesh = Mesh(np.array(jax.local_devices()[: how.devices]), ("batch",))
        alike, each = PartitionSpec(), PartitionSpec("batch")
        given, out = (alike, alike, each, each, alike), alike
        # What comes out is the same everywhere, by the sum at the end.
        share = jax.shard_map(share, mesh=mesh, in_specs=given, out_specs=out, check_vma=False)
    total = share(weights, arrays, windows, numbers, key)
    (loss, terms), gradient = jax.tree.map(lambda a: a / count, total)
    return loss, terms, gradient


# --- the optimiser ---------------------------------------------------------------------------------------------------------------


def learning_rate(recipe: Recipe) -> optax.Schedule:
    """Linear warm-up to the peak, then as `schedule` says to `final_rate` times it."""
    warm = min(recipe.rate_warm_up, max(1, recipe.total // 10))
    rest, peak, last = max(recipe.total - warm, 1), recipe.rate, recipe.final_rate * recipe.rate
    falling = {
        "cosine": lambda: optax.cosine_decay_schedule(peak, rest, recipe.final_rate),
        "linear": lambda: optax.linear_schedule(peak, last, rest),
        "exponential": lambda: optax.exponential_decay(peak, rest, max(recipe.final_rate, 1e-6)),
        "constant": lambda: optax.constant_schedule(peak),
    }
    return optax.join_schedules([optax.linear_schedule(0.0, peak, warm), falling[recipe.schedule]()], [warm])


@functools.cache
def make_optimiser(recipe: Recipe) -> optax.GradientTransformation:
    """Adam (β₂ = 0.98), or AdamW where weights decay, behind a clip of the global norm."""
    rate = learning_rate(recipe)
    adam = optax.adamw(rate, b2=0.98, weight_decay=recipe.weight_decay) if recipe.weight_decay else optax.adam(rate, b2=0.98)
    return optax.chain(optax.clip_by_global_norm(recipe.clip), adam)


@eqx.filter_jit
def _applied(state: Progress, loss: Array, gradient: PyTree, positive: PyTree, recipe: Recipe) -> tuple[Progress, Float[Array, ""]]:
    """(the state after one update, the norm of the gradient); an update that is not finite changes nothing but the counters."""
    norm = optax.tree.norm(gradient)
    good = jnp.isfinite(loss) & jnp.isfinite(norm)
    gradient = jax.tree.map(lambda g: jnp.where(good, g, 0), gradient)
    steps, optimiser = make_optimiser(recipe).update(gradient, state.optimiser, state.weights)
    steps = jax.tree.map(lambda s: s * state.scale.astype(s.dtype), steps)
    moved = eqx.apply_updates(state.weights, steps)
    moved = jax.tree.map(lambda w, p: jnp.maximum(w, 0) if p else w, moved, positive)
    # The average forgets its beginning, when the weights were still far away, faster than what comes later.
    seen = state.update.astype(jnp.float32)
    decay = jnp.minimum(recipe.average, (1 + seen) / (10 + seen))
    mixed = jax.tree.map(lambda a, w: (decay * a + (1 - decay) * w).astype(w.dtype), state.average, moved)
    new = (moved, optimiser, mixed if recipe.average else moved)
    old = (state.weights, state.optimiser, state.average)
    weights, optimiser, average = jax.tree.map(lambda a, b: jnp.where(good, a, b), new, old)
    skipped = jnp.where(good, 0, state.skipped + 1)
    counted = (weights, optimiser, average, state.update + 1, skipped)
    return eqx.tree_at(lambda s: (s.weights, s.optimiser, s.average, s.update, s.skipped), state, counted), norm


# --- validation ------------------------------------------------------------------------------------------------------------------


@eqx.filter_jit
def _rollouts(model: Model, starts: Array, frames: int, every: int) -> Array:
    """`frames` frames from each start, compiled once per model structure."""
    prepared = model.prepare(starts.dtype)

    def one(u: Array) -> Array:
        carry = model.init_carry(u, jax.random.key(0))
        z = prepared.solver.encode(u)
        return frames_of(model, prepared, z, carry, jnp.zeros((), jnp.int32), frames, every, 0)[1]

    return jax.lax.map(one, starts) if jax.default_backend() == "cpu" else jax.vmap(one)(starts)


def correlation_scores(model: Model, data: np.ndarray, interval: float, every: int, modes: int) -> dict[str, Any]:
    """t95, t80 and mean correlation of rollouts from the first frame of each validation trajectory; of a gas the mean error, and
    where it radiates the error of the mean mass per bin of temperature over the last two thirds of the window."""
    frames = data.shape[1] - 1
    u = np.asarray(_rollouts(model, jnp.asarray(data[:, 0]), frames, every))
    solver = model.solver
    of_gas = gas.gas_of(solver)
    scores: dict[str, Any] = {}
    if of_gas is None:
        rho = diagnostics.correlation(u, data[:, 1:], solver.grid, solver.variables, modes, solver)
    else:
        errors, rho = gas.compare(u, data[:, 1:], solver.grid, of_gas.gamma, modes)
        error = float(gas.error_of(errors).mean())
        scores["mean_error"] = error if math.isfinite(error) else None
        if of_gas.rate is not None:
            late = slice(frames // 3, None)
            temperatures = gas.temperature(data[:, 1:][:, late], solver.grid, of_gas.gamma)
            bins = gas.temperature_bins(temperatures.min(), temperatures.max())
            mass, known = (gas.phases(q[:, late], solver.grid, of_gas, bins)[:, :, 0].mean(axis=(0, 1)) for q in (u, data[:, 1:]))
            distance = gas.phase_distance(mass, known)
            scores["temperature_error"] = distance if math.isfinite(distance) else None
    mean = np.concatenate([[1.0], rho.mean(axis=0)])
    times = interval * np.arange(frames + 1)
    t95, t95_at_least = diagnostics.crossing_time(times, mean, 0.95)
    t80, t80_at_least = diagnostics.crossing_time(times, mean, 0.80)
    return {
        "t95": t95,
        "t95_at_least": t95_at_least,
        "t80": t80,
        "t80_at_least": t80_at_least,
        "mean_correlation": float(mean.mean()),
        **scores,
    }


RUINED = -1e3
"""The score of a rollout without an error, because it blew up; among such the one that was like the truth for longer is better."""


def score_of(scores: Mapping[str, Any], choose: Choice) -> float:
    """One number of validation scores, the larger the better."""
    if choose in ("error", "temperature_error"):
        key = "mean_error" if choose == "error" else choose
        if key not in scores:
            who = "a gas has an error" if choose == "error" else "a gas that radiates has a temperature_error"
            raise ValueError(f"choose: only {who}; choose t95 or correlation")
        return max(RUINED, -scores[key]) if scores[key] is not None else RUINED + scores["mean_correlation"]
    if choose == "correlation":
        return scores["mean_correlation"]
    # Ties (no crossing within the window, say) are decided by the mean correlation.
    reached = scores["t95_at_least"] if scores["t95"] is None else scores["t95"]
    return reached + 1e-3 * scores["mean_correlation"]


def _is_ruined(score: float) -> bool:
    """Whether a score says that at least one of these rollouts blew up."""
    return score <= RUINED / 100


# --- the loop --------------------------------------------------------------------------------------------------------------------


def _split(closures: Sequence[AbstractClosure]) -> tuple[PyTree, PyTree]:
    return eqx.partition(tuple(closures), eqx.is_inexact_array)


def constants_among(closures: Sequence[AbstractClosure]) -> PyTree:
    """Which trained numbers are constants of a formula, and so never negative."""
    weights, _ = _split(closures)
    paths = jax.tree_util.tree_flatten_with_path(weights)[0]

    def is_constant(path: tuple) -> bool:
        owner: Any = tuple(closures)
        for key in path[:-1]:
            owner = owner[key.idx] if hasattr(key, "idx") else getattr(owner, key.name) if hasattr(key, "name") else owner[key.key]
        return isinstance(owner, AbstractClosure) and getattr(path[-1], "name", None) in owner.constants

    return jax.tree.unflatten(jax.tree.structure(weights), [is_constant(path) for path, _ in paths])


def shares(total: int, tasks: int) -> list[int]:
    """How many windows of a batch each task gets: as even as possible, none nothing."""
    return [max(1, total // tasks + (i < total % tasks)) for i in range(tasks)]


def devices_for(recipe: Recipe, size: int) -> int:
    """How many devices share `size` windows."""
    most = jax.local_device_count()
    if not recipe.devices:
        return max(n for n in range(1, min(most, size) + 1) if size % n == 0)
    if recipe.devices > most or size % recipe.devices:
        raise ValueError(
            f"devices: {recipe.devices} cannot share {size} windows; the number must divide the batch, and there "
            f"{'are' if most > 1 else 'is'} {most}"
        )
    return recipe.devices


def _how(recipe: Recipe, task: Task, size: int) -> How:
    devices = devices_for(recipe, size)
    at_once = 1 if jax.default_backend() == "cpu" else size // devices
    levels = recipe.checkpoint_levels
    budget: int | Budget = Budget(recipe.memory * 2**20 / at_once) if levels is None else levels
    return How(recipe.loss, recipe.power, task.every, recipe.warm_up, recipe.truncate, recipe.noise, budget, devices)


def _alike(tasks: Sequence[Task], dtype: Any) -> list[Model]:
    """The models without their closures' weights; numbers of the physics as arrays where tasks share all but these, so that one
    compiled program serves them all."""

    def numbers_as_arrays(tree: PyTree) -> PyTree:
        return jax.tree.map(lambda a: jnp.asarray(a, dtype) if isinstance(a, float) else a, tree)

    models = []
    for task in tasks:
        _, fixed = _split(task.model.closures)
        model = task.model if len(tasks) == 1 else eqx.tree_at(lambda m: m.solver, task.model, numbers_as_arrays(task.model.solver))
        models.append(eqx.tree_at(lambda m: m.closures, model, fixed))
    return models


def train(
    tasks: Task | Sequence[Task],
    recipe: Recipe,
    *,
    seed: int = 0,
    checkpoints: Checkpoints | None = None,
    resume: bool = False,
    save_every: float = SAVE_EVERY,
    report: Callable[[dict[str, Any]], None] = lambda _: None,
) -> Outcome:
    """Trains the closures of a model on windows of one or several references, all of which share the closures' weights.

    **Arguments:**

    - `tasks`: what is learnt from; the first one's closures are where training starts.
    - `recipe`: how.
    - `seed`: of windows, noise and stochastic closures.
    - `checkpoints`, `resume`: where the state is saved, at every validation and every `save_every` seconds, and whether to go on
      from there, bit for bit.
    - `report`: called after every update with its record; may raise to stop: the state is saved first.

    Updates whose loss or gradient is not finite are skipped and counted; too many in a row lead back to the last validated
    weights.

    Raises `TrainingDiverged` when going back does not help, `ValueError` where a term, a choice or a number of devices does not
    fit, `StorageError` where a checkpoint belongs to other data.
    """
    tasks = (tasks,) if isinstance(tasks, Task) else tuple(tasks)
    first = tasks[0]
    weights, fixed = _split(first.model.closures)
    if not jax.tree.leaves(weights):
        raise ValueError("model: its closures have no arrays, so there is nothing to train")
    dtype = first.windows.dtype
    for task in tasks:
        losses.check_terms({name: weight for name, weight in recipe.loss if weight}, task.model.solver)
        if task.windows.shape[1] <= recipe.longest:
            raise ValueError(f"unroll: windows of {recipe.longest} frames do not fit in trajectories of {task.windows.shape[1]}")
    sizes = shares(recipe.batch, len(tasks))
    hows = [_how(recipe, task, size) for task, size in zip(tasks, sizes, strict=True)]
    models, positive = _alike(tasks, dtype), constants_among(first.model.closures)
    root = jax.random.key(seed)

    def with_closures(task: Task, weights: PyTree) -> Model:
        return eqx.tree_at(lambda m: m.closures, task.model, eqx.combine(weights, fixed))

    groups = [symmetries(task.model.solver) if recipe.symmetries else [] for task in tasks]

    def windows_of(update: int) -> list[np.ndarray]:
        length = recipe.warm_up + recipe.phase(update)
        found = []
        for i, (task, size, group) in enumerate(zip(tasks, sizes, groups, strict=True)):
            windows = batch(task.windows, length, size, seed, update, i)
            rng = np.random.default_rng([seed, update, i, len(group)])
            found.append(turned(task.model.solver, group, windows, rng) if group else windows)
        return found

    def validated(weights: PyTree) -> tuple[dict[str, Any], float]:
        found = [correlation_scores(with_closures(t, weights), t.validation, t.interval, t.every, t.modes) for t in tasks]
        # in the precision in which the best one is kept, so that equal scores are equal
        score = float(np.float32(np.mean([score_of(scores, recipe.choose) for scores in found])))
        others = {"others": {t.name: s for t, s in zip(tasks[1:], found[1:], strict=True)}} if len(tasks) > 1 else {}
        return {**found[0], **others, "score": None if _is_ruined(score) else score}, score

    zero = jnp.zeros((), jnp.int32)
    optimiser = make_optimiser(recipe).init(weights)
    good = (weights, optimiser, weights)
    one, lowest = jnp.ones((), jnp.float32), jnp.asarray(-jnp.inf, jnp.float32)
    state = Progress(*good, good, weights, lowest, zero, zero, zero, zero, one)
    history: list[dict[str, Any]] = []
    best_update, spent, skipped_total, firsts = 0, 0.0, 0, {}
    data = [digest_of(task.windows) for task in tasks]
    if checkpoints is not None and resume and (found := checkpoints.latest(state)) is not None:
        step, state, meta = found
        if meta["data"] != data:
            raise StorageError(f"{checkpoints.folder}: holds the training on other data; train anew, without resuming")
        checkpoints.prune(step)
        history, best_update, spent, skipped_total = meta["history"], meta["best_update"], meta["seconds"], meta["skipped"]
        firsts = {int(length): seconds for length, seconds in meta["firsts"].items()}
    state = jax.tree.map(jnp.array, state)

    cadence = Cadence(save_every)

    def save() -> None:
        if checkpoints is not None:
            meta = {
                "history": history,
                "best_update": best_update,
                "seconds": spent,
                "firsts": {str(length): took for length, took in firsts.items()},
                "skipped": skipped_total,
                "recipe": asdict(recipe),
                "seed": seed,
                "data": data,
            }
            clock = time.monotonic()
            checkpoints.save(int(state.update), state, meta)
            cadence.saved(time.monotonic() - clock)

    def exhausted() -> bool:
        return bool(recipe.stop_after) and int(state.stale) >= recipe.stop_after

    begin = int(state.update)
    with Prefetch(windows_of, recipe.total) as fetched:
        for update in range(begin, recipe.total):
            if exhausted():
                break
            clock = time.perf_counter()
            length = recipe.phase(update)
            key = jax.random.fold_in(root, update)
            parts = [
                gradient_of(model, state.weights, jnp.asarray(windows), jax.random.fold_in(key, i), how)
                for i, (model, windows, how) in enumerate(zip(models, fetched(update), hows, strict=True))
            ]
            loss, terms, gradient = _mean(parts, sizes)
            state, norm = _applied(state, loss, gradient, positive, recipe)
            loss, norm = float(loss), float(norm)
            took = time.perf_counter() - clock
            firsts.setdefault(length, took)
            spent += took
            finite = math.isfinite(loss) and math.isfinite(norm)
            skipped_total += not finite
            record: dict[str, Any] = {
                "update": update + 1,
                "loss": loss if finite else None,
                "unroll": length,
                "gradient_norm": norm if finite else None,
                "clipped": finite and norm > recipe.clip,
                "rate": float(recipe.rate_of(update)) * float(state.scale),
                "seconds": round(spent, 3),
            }
            if len(terms) > 1:
                record["terms"] = {name: float(value) if finite else None for name, value in terms.items()}
            if int(state.skipped) > recipe.patience:
                record["rolled_back"] = True
                state = _rolled_back(state, recipe, update, length)
            elif (update + 1) % recipe.validate_every == 0 or update + 1 == recipe.total:
                clock = time.perf_counter()
                record["validation"], score = validated(state.average)
                better = score > float(state.best_score) or not best_update
                better = better or (recipe.keep == "last" and not _is_ruined(score))
                best_update = update + 1 if better else best_update
                state = eqx.tree_at(
                    lambda s: (s.best, s.best_score, s.stale, s.good),
                    state,
                    (
                        state.average if better else state.best,
                        jnp.asarray(score if better else state.best_score, jnp.float32),
                        zero if better else state.stale + 1,
                        state.good if _is_ruined(score) else (state.weights, state.optimiser, state.average),
                    ),
                )
                spent += time.perf_counter() - clock
            history.append(record)
            if len(history) > MOST_RECORDS:
                # by the records alone, so that a training that was resumed keeps the same ones
                history = [r for i, r in enumerate(history) if i % 2 or "validation" in r]
            try:
                report(record)  # before the state, so that a log has whatever a state stands for
            except BaseException:
                save()
                raise
            if "validation" in record or cadence.due():
                save()
    return Outcome(
        with_closures(first, state.best),
        history,
        float(state.best_score),
        best_update,
        spent,
        _compile_seconds(history, firsts),
        skipped_total,
        int(state.rollbacks),
        exhausted() and int(state.update) < recipe.total,
    )


def _mean(parts: Sequence[tuple[Array, dict[str, Array], PyTree]], sizes: Sequence[int]) -> tuple[Array, dict[str, Array], PyTree]:
    """The mean over windows of means over each task's windows."""
    if len(parts) == 1:
        return parts[0]
    total = sum(sizes)
    # By way of the host: gradients of different meshes may lie on different devices.
    parts = [jax.tree.map(lambda a: jnp.asarray(np.asarray(a)), part) for part in parts]
    return jax.tree.map(lambda *each: sum(n / total * a for n, a in zip(sizes, each, strict=True)), *parts)


def _rolled_back(state: Progress, recipe: Recipe, update: int, length: int) -> Progress:
    """The last validated weights, with half the learning rate."""
    if int(state.rollbacks) >= recipe.rollbacks:
        raise TrainingDiverged(
            f"{int(state.skipped)} updates in a row were not finite (update {update + 1}, unroll {length}), after going back "
            f"{int(state.rollbacks)} times; lower train.rate or train.clip, or start from shorter unrolls"
        )
    weights, optimiser, average = state.good
    changed = (weights, optimiser, average, jnp.zeros((), jnp.int32), state.rollbacks + 1, 0.5 * state.scale)
    return eqx.tree_at(lambda s: (s.weights, s.optimiser, s.average, s.skipped, s.rollbacks, s.scale), state, changed)


def _compile_seconds(history: Sequence[dict[str, Any]], firsts: Mapping[int, float]) -> dict[int, float]:
    """What the first update of each unroll length took beyond the median of the others."""
    out = {}
    for length, first in firsts.items():
        times = [r["seconds"] for r in history if r["unroll"] == length and "validation" not in r]
        usual = float(np.median(np.diff(times))) if len(times) > 2 else 0.0
        out[length] = round(max(0.0, first - usual), 3)
    return out


def parameters(closures: Any) -> int:
    """How many numbers a closure, or several, train."""
    return sum(leaf.size for leaf in jax.tree.leaves(eqx.filter(closures, eqx.is_inexact_array)))
