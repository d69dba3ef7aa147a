"""θ ← Adam(θ, ∂_θ ⟨‖Φ_θⁿ(ū₀) − ū(tₙ)‖²_W⟩): closures trained with the solver in the loop, through unrolled trajectories."""

import math
import shutil
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int, PyTree

from hybridsim import diagnostics, gas, storage
from hybridsim.grid import Grid
from hybridsim.model import Model, frames_of
from hybridsim.progress import Reporter
from hybridsim.reference import COURANT, FineRunError, make_frames, sample_keys
from hybridsim.signals import STOP
from hybridsim.storage import Checkpoints
from hybridsim.yaml_reader import ConfigError

if TYPE_CHECKING:
    from rich.console import Console

    from hybridsim.config import Experiment
    from hybridsim.sections import Train


@dataclass(frozen=True)
class Recipe:
    """How a closure is trained.

    - `unroll`: frames unrolled in each phase, growing; `updates`: optimiser steps per phase.
    - `batch`: windows per update; `rate`: peak learning rate, warmed up over 50 updates, then cosine to 2 % of it.
    - `clip`: global norm of the gradient; `power`: p of the loss weight |k|^{2p} on the velocity error (0 velocity, 1 vorticity;
      between walls always 0).
    - `validate_every`: updates between validations; the weights with the best validation t95 are kept.
    - `checkpoint_levels`: nested checkpointing of the unrolled scan, as in `rollout`.
    - `patience`: how many updates in a row may be skipped because they were not finite before training stops.
    """

    unroll: tuple[int, ...] = (1, 2, 4, 8, 16, 32)
    updates: tuple[int, ...] = (200, 200, 200, 200, 200, 200)
    batch: int = 8
    rate: float = 2e-3
    clip: float = 1.0
    power: float = 0.5
    validate_every: int = 200
    checkpoint_levels: int = 0
    patience: int = 20

    @property
    def total(self) -> int:
        return sum(self.updates)

    def phase(self, update: int) -> int:
        """The unroll length of an update."""
        done = 0
        for length, count in zip(self.unroll, self.updates, strict=True):
            done += count
            if update < done:
                return length
        return self.unroll[-1]


class Progress(eqx.Module):
    """Everything that training needs to go on bit for bit."""

    weights: PyTree
    optimiser: PyTree
    best: PyTree
    best_score: Float[Array, ""]
    update: Int[Array, ""]
    skipped: Int[Array, ""]


@dataclass
class Outcome:
    """What one training run gave: the model with its best weights, the history, and why it ended."""

    model: Model
    history: list[dict[str, Any]]
    best_score: float
    best_update: int
    seconds: float
    compile_seconds: float
    skipped: int

    @property
    def best_validation(self) -> dict[str, Any]:
        """The validation scores of the weights that were kept."""
        return next(r["validation"] for r in self.history if r["update"] == self.best_update)


class TrainingDiverged(Exception):
    """Too many updates in a row were not finite."""


def spectral_weight(grid: Grid, power: float) -> Float[np.ndarray, "*k"]:
    """w(k) = |k|^{2p}, zero at k = 0 and doubled where `rfftn` keeps one of a conjugate pair; k in units of 2π/max L."""
    k2 = np.zeros(())
    for k in grid.wavenumbers():
        k2 = k2 + (k * max(grid.lengths) / (2 * np.pi)) ** 2
    weight = np.where(k2 > 0, np.maximum(k2, 1e-300) ** power, 0.0)
    n = grid.shape[-1]
    last = np.arange(n // 2 + 1)
    return weight * np.where((last == 0) | (2 * last == n), 1.0, 2.0)


def relative_error(
    u: Float[Array, "frame c *grid"], truth: Float[Array, "frame c *grid"], weight: Float[Array, "*k"] | None
) -> Float[Array, " frame"]:
    """e = Σ_k w(k) |û − û_ref|² / Σ_k w(k) |û_ref|², one number per frame; 2 (1 − ρ) for fields of equal norm.

    Without a weight (between walls, where there are no Fourier modes) the sums run over cells.
    """
    axes = tuple(range(2, u.ndim))

    def norm(q: Array) -> Array:
        if weight is None:
            return jnp.sum(q * q, axis=tuple(range(1, u.ndim)))
        hat = jnp.fft.rfftn(q, axes=axes)
        return jnp.sum(weight[None, None] * (hat.real**2 + hat.imag**2), axis=tuple(range(1, u.ndim)))

    return norm(u - truth) / norm(truth)


def window_loss(
    model: Model,
    window: Float[Array, "frames c *grid"],
    weight: Float[Array, "*k"] | None,
    every: int,
    levels: int,
    key: Array,
) -> Float[Array, ""]:
    """Mean relative error over a window of frames, rolled out from its first one."""
    start = window[0]
    prepared = model.prepare(start.dtype)
    carry = model.init_carry(start, key)
    z = prepared.solver.encode(start)
    frames = window.shape[0] - 1
    _, u = frames_of(model, prepared, z, carry, jnp.zeros((), jnp.int32), frames, every, levels)
    return relative_error(u, window[1:], weight).mean()


def make_optimiser(recipe: Recipe) -> optax.GradientTransformation:
    """Adam (β₂ = 0.98) behind a clip of the global norm, warm-up and cosine decay."""
    warm = min(50, max(1, recipe.total // 10))
    schedule = optax.warmup_cosine_decay_schedule(0.0, recipe.rate, warm, max(recipe.total, warm + 1), 0.02 * recipe.rate)
    return optax.chain(optax.clip_by_global_norm(recipe.clip), optax.adam(schedule, b2=0.98))


def batches(data: np.ndarray, length: int, size: int, seed: int, update: int) -> np.ndarray:
    """The windows of one update, drawn from (seed, update) alone so that a resumed run sees the same ones."""
    rng = np.random.default_rng([seed, update])
    trajectories = rng.integers(data.shape[0], size=size)
    starts = rng.integers(data.shape[1] - length, size=size)
    return np.stack([data[i, s : s + length + 1] for i, s in zip(trajectories, starts, strict=True)])


def _over_samples(function: Callable, *args: Array) -> Array:
    """Mean over the batch: one sample after another on CPU, where that is faster; all at once elsewhere."""
    if jax.default_backend() == "cpu":
        return jax.lax.map(lambda a: function(*a), args).mean()
    return jax.vmap(function)(*args).mean()


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
    """t95, t80 and mean correlation of rollouts from the first frame of every validation trajectory."""
    frames = data.shape[1] - 1
    u = np.asarray(_rollouts(model, jnp.asarray(data[:, 0]), frames, every))
    solver = model.solver
    of_gas = gas.gas_of(solver)
    if of_gas is None:
        rho = diagnostics.correlation(u, data[:, 1:], solver.grid, solver.variables, modes, solver)
    else:
        rho = gas.compare(u, data[:, 1:], solver.grid, of_gas.gamma, modes)[1]
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
    }


def train(
    model: Model,
    data: Float[np.ndarray, "trajectory frame c *grid"],
    validation: Float[np.ndarray, "other span c *grid"],
    interval: float,
    every: int,
    recipe: Recipe,
    *,
    seed: int,
    modes: int,
    checkpoints: Checkpoints | None = None,
    resume: bool = False,
    report: Callable[[dict[str, Any]], None] = lambda _: None,
) -> Outcome:
    """Trains `model.closures` on windows of `data` (frames `interval` apart, `every` model steps each).

    `report` is called after every update with its record and may raise to stop: the state is saved first, and resumes exactly.
    Updates with a non-finite loss or gradient are skipped and counted.
    """
    optimiser = make_optimiser(recipe)
    closures, fixed = eqx.partition(model.closures, eqx.is_inexact_array)
    dtype = data.dtype
    grid = model.solver.grid
    weight = jnp.asarray(spectral_weight(grid, recipe.power), dtype) if all(grid.periodic) else None

    def with_closures(weights: PyTree) -> Model:
        return eqx.tree_at(lambda m: m.closures, model, eqx.combine(weights, fixed))

    @eqx.filter_jit(donate="all-except-first")
    def update_step(windows: Array, state: Progress) -> tuple[Progress, Array, Array]:
        def loss_of(weights: PyTree) -> Array:
            trained = with_closures(weights)
            keys = jax.random.split(jax.random.fold_in(jax.random.key(seed), state.update), windows.shape[0])
            one = lambda w, k: window_loss(trained, w, weight, every, recipe.checkpoint_levels, k)  # noqa: E731
            return _over_samples(one, windows, keys)

        loss, gradient = eqx.filter_value_and_grad(loss_of)(state.weights)
        norm = optax.tree.norm(gradient)
        good = jnp.isfinite(loss) & jnp.isfinite(norm)
        gradient = jax.tree.map(lambda g: jnp.where(good, g, 0), gradient)
        steps, new = optimiser.update(gradient, state.optimiser, state.weights)
        moved = eqx.apply_updates(state.weights, steps)
        keep = lambda a, b: jnp.where(good, a, b)  # noqa: E731
        weights = jax.tree.map(keep, moved, state.weights)
        optimiser_state = jax.tree.map(keep, new, state.optimiser)
        skipped = jnp.where(good, 0, state.skipped + 1)
        return (
            Progress(weights, optimiser_state, state.best, state.best_score, state.update + 1, skipped),
            loss,
            norm,
        )

    zero = jnp.zeros((), jnp.int32)
    state = Progress(closures, optimiser.init(closures), closures, jnp.asarray(-jnp.inf, jnp.float32), zero, zero)
    history: list[dict[str, Any]] = []
    best_update, spent, compile_seconds, skipped_total = 0, 0.0, 0.0, 0
    if checkpoints is not None and resume:
        found = checkpoints.latest(state)
        if found is not None:
            _, state, meta = found
            history, best_update, spent = meta["history"], meta["best_update"], meta["seconds"]
            compile_seconds, skipped_total = meta["compile_seconds"], meta["skipped"]
    state = jax.tree.map(jnp.array, state)

    def save() -> None:
        if checkpoints is not None:
            meta = {
                "history": history,
                "best_update": best_update,
                "seconds": spent,
                "compile_seconds": compile_seconds,
                "skipped": skipped_total,
                "recipe": asdict(recipe),
                "seed": seed,
            }
            checkpoints.save(int(state.update), state, meta)

    compiled: set[int] = set()
    for update in range(int(state.update), recipe.total):
        begin = time.perf_counter()
        length = recipe.phase(update)
        windows = jnp.asarray(batches(data, length, recipe.batch, seed, update))
        state, loss, norm = update_step(windows, state)
        loss = float(loss)
        took = time.perf_counter() - begin
        if length not in compiled:
            compiled.add(length)
            compile_seconds += took
        spent += took
        skipped_total += int(not math.isfinite(loss) or not math.isfinite(float(norm)))
        record: dict[str, Any] = {
            "update": update + 1,
            "loss": loss if math.isfinite(loss) else None,
            "unroll": length,
            "seconds": round(spent, 3),
        }
        if int(state.skipped) > recipe.patience:
            raise TrainingDiverged(
                f"{int(state.skipped)} updates in a row were not finite (update {update + 1}, unroll {length}); lower train.rate "
                f"or train.clip, or start from shorter unrolls"
            )
        if (update + 1) % recipe.validate_every == 0 or update + 1 == recipe.total:
            begin = time.perf_counter()
            scores = correlation_scores(with_closures(state.weights), validation, interval, every, modes)
            record["validation"] = scores
            # Ties (no crossing within the window, say) are decided by the mean correlation.
            reached = scores["t95_at_least"] if scores["t95"] is None else scores["t95"]
            score = reached + 1e-3 * scores["mean_correlation"]
            if score > float(state.best_score):
                best_update = update + 1
                better = jnp.asarray(score, jnp.float32)
                # A copy, because the weights are donated to the next update.
                state = eqx.tree_at(lambda s: (s.best, s.best_score), state, (jax.tree.map(jnp.array, state.weights), better))
            spent += time.perf_counter() - begin
        history.append(record)
        if "validation" in record:
            save()
        try:
            report(record)
        except BaseException:
            save()
            raise
    return Outcome(
        with_closures(state.best),
        history,
        float(state.best_score),
        best_update,
        spent,
        compile_seconds,
        skipped_total,
    )


def parameters(closures: Any) -> int:
    """How many numbers a closure, or several, train."""
    return sum(leaf.size for leaf in jax.tree.leaves(eqx.filter(closures, eqx.is_inexact_array)))


# --- the command -----------------------------------------------------------------------------------------------------------------


def training_data(
    experiment: "Experiment", kind: Literal["training", "validation"], progress: Callable[[str, float], None]
) -> Float[np.ndarray, "trajectory frame c *grid"]:
    """Filtered trajectories for the run that is trained, from the cache or made anew; their starts are disjoint from each other's
    and from the experiment's own."""
    spec = experiment.spec
    assert spec.train is not None
    data, label = spec.train.data, spec.train.run
    target = experiment.solver(label)
    grid = experiment.grid(data.shape or spec.reference.shape, ("train", "data", "shape"))
    count = data.trajectories if kind == "training" else data.validation
    length = data.time if kind == "training" else data.validation_time
    frames = max(1, round(length / data.interval))
    # Seeds of the two kinds and of the test starts never meet: validation starts are drawn after all training ones.
    first = 0 if kind == "training" else data.trajectories
    keys = sample_keys(data.seed, first + count)[first:]
    resolved = experiment.resolved
    starts = {
        **{name: resolved[name] for name in ("equation", "domain", "initial")},
        "reference": {name: resolved["reference"][name] for name in ("solver", "stepper")},
        "samples": [data.seed, first, count, list(grid.shape)],
        "files": {name: digest for name, digest in experiment.files.items() if name.endswith(".py")},
    }
    recipe = {
        "starts": starts,
        "target": [type(target).__name__, list(target.grid.shape)],
        "data": [kind, frames, data.interval, data.precision],
        "courant": COURANT,
    }
    made = make_frames(
        recipe,
        lambda g: experiment.solver_for(spec.reference.solver, g.shape),
        experiment.stepper("reference"),
        experiment.initial(),
        keys,
        grid,
        np.dtype(data.precision),
        data.interval,
        frames,
        {"target": target},
        store_as=np.dtype(experiment.dtype(label)),
        starts=starts,
        progress=lambda what, x: progress(what.replace("reference", kind), x),
    )
    return made.groups["target"]


def _recipe(spec: "Train") -> Recipe:
    return Recipe(
        unroll=tuple(spec.unroll),
        updates=tuple(spec.updates),
        batch=spec.batch,
        rate=spec.rate,
        clip=spec.clip,
        power=spec.power,
        validate_every=spec.validate_every,
        checkpoint_levels=spec.checkpoint_levels,
        patience=spec.patience,
    )


def _model_to_train(experiment: "Experiment", seed: int) -> tuple[Model, int]:
    """The run's model with fresh closures, and its model steps per frame of the data."""
    spec = experiment.spec
    assert spec.train is not None
    label, interval = spec.train.run, spec.train.data.interval
    closures = experiment.closures_for(label, weights=False, seed=seed)
    if parameters(closures) == 0:
        raise ConfigError(f"train.run: the closures of {label!r} have no arrays, so there is nothing to train")
    if experiment.adaptive(label):
        raise ConfigError(f"runs.{label}.adaptive: a run that is trained needs a fixed time step; remove adaptive and give dt")
    model = experiment.model_for(label, closures=closures)
    every = round(interval / model.step_time)
    if every < 1 or not math.isclose(every * model.step_time, interval, rel_tol=1e-9):
        raise ConfigError(
            f"train.data.interval: {interval:g} is not a whole number of model steps of {label!r} ({model.step_time:g} each); "
            f"choose a multiple, for example {max(1, every) * model.step_time:g}"
        )
    length = spec.train.data.time
    if max(spec.train.unroll) * interval > length * (1 + 1e-9):
        raise ConfigError(
            f"train.unroll: {max(spec.train.unroll)} frames of {interval:g} are longer than train.data.time = {length:g}"
        )
    return model, every


def train_experiment(experiment: "Experiment", folder: Path, resume: bool, console: "Console") -> int:
    """Everything that `hybridsim train` does: data, one training per seed, weights, scores on the test starts."""
    with storage.FolderLock(folder), Reporter(console, folder / "log.txt") as say:
        try:
            return _train_locked(experiment, folder, resume, say)
        except (TrainingDiverged, FineRunError) as error:
            say.line(str(error))
            return 3


def _train_locked(experiment: "Experiment", folder: Path, resume: bool, say: Reporter) -> int:
    import datetime

    import yaml

    spec = experiment.spec.train
    assert spec is not None
    label, recipe = spec.run, _recipe(spec)
    work = folder / "training"
    marker = work / "config_hash.json"
    if resume and marker.exists() and storage.read_json(marker) != experiment.config_hash:
        raise storage.StorageError(
            f"{work}: holds the training of another configuration; resume with the same YAML, or train into another --out"
        )
    if not (resume and marker.exists()) and work.exists():
        # What another recipe left must never be taken for the training of this one.
        shutil.rmtree(work)
    work.mkdir(exist_ok=True)
    storage.write_json(marker, experiment.config_hash)
    text = yaml.safe_dump(experiment.resolved, sort_keys=False, allow_unicode=True)
    storage.atomic_write(folder / "config.yaml", text)
    environment = storage.environment()
    first_model, every = _model_to_train(experiment, spec.seeds[0])
    count = parameters(first_model.closures)
    say.line(f"training {label} of {experiment.name}: {count} parameters, seeds {', '.join(map(str, spec.seeds))} → {folder}")

    def making(what: str, fraction: float) -> None:
        say.progress(what, fraction)
        STOP.check()

    data = training_data(experiment, "training", making)
    validation = training_data(experiment, "validation", making)
    say.line(f"data: {data.shape[0]} trajectories of {spec.data.time:g}, {validation.shape[0]} for validation")
    bare = without_closures(first_model)
    base = correlation_scores(bare, validation, spec.data.interval, every, experiment.modes)
    say.line(f"without closure: validation {_said(base)}")

    outcomes: dict[int, Outcome] = {}
    histories: dict[str, list[dict[str, Any]]] = {}
    for seed in spec.seeds:
        model, every = _model_to_train(experiment, seed)
        window: list[tuple[float, float]] = []

        def report(record: dict[str, Any], seed=seed, window=window) -> None:
            window.append((record["seconds"], record["update"]))
            del window[:-50]
            (t0, u0), (t1, u1) = window[0], window[-1]
            rate = (u1 - u0) / (t1 - t0) if t1 > t0 else 0.0
            loss = "not finite" if record["loss"] is None else f"{record['loss']:.3e}"
            note = f"loss {loss}  unroll {record['unroll']}  {rate:.1f}/s"
            say.progress(f"seed {seed}", record["update"] / recipe.total, note)
            if "validation" in record:
                scores = record["validation"]
                say.line(f"seed {seed}, update {record['update']}: {note}, {_said(scores)}")
            STOP.check()

        outcome = train(
            model,
            data,
            validation,
            spec.data.interval,
            every,
            recipe,
            seed=seed,
            modes=experiment.modes,
            checkpoints=storage.Checkpoints(work / f"seed-{seed}"),
            resume=resume,
            report=report,
        )
        outcomes[seed] = outcome
        histories[f"seed {seed}"] = outcome.history
        storage.write_json(folder / "training.json", histories)
        summary = _seed_summary(outcome)
        _save_closures(experiment, outcome.model, folder, f"{label}-seed{seed}", {"training": {"seed": seed, **summary}})
        best = f"best validation {_said(outcome.best_validation)} at update {outcome.best_update}"
        say.line(f"seed {seed}: {best}, {outcome.seconds:.0f} s")

    best = max(outcomes, key=lambda s: outcomes[s].best_score)
    card = {
        "closure": experiment.weights_header(label)["closure"],
        "experiment": experiment.name,
        "run": label,
        "family": experiment.resolved["equation"]["use"],
        "solver": experiment.resolved["runs"][label]["solver"],
        "shape": list(experiment.spec.runs[label].shape),
        "dt": first_model.dt,
        "parameters": count,
        "recipe": asdict(recipe),
        "data": experiment.resolved["train"]["data"],
        "device": environment.get("device"),
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "versions": environment,
        "chosen_seed": best,
        "chosen_by": "validation t95",
        "validation_bare": base,
        "seeds": {str(s): _seed_summary(o) for s, o in outcomes.items()},
        "history": {name: _thin(h) for name, h in histories.items()},
    }
    _save_closures(experiment, outcomes[best].model, folder, label, {"training": {"seed": best, **_seed_summary(outcomes[best])}})
    storage.write_json(folder / f"{label}.json", card)
    from hybridsim.report import training_figure

    (folder / "figures").mkdir(exist_ok=True)
    training_figure(histories["seed " + str(best)], folder / "figures" / "training.png")
    say.line(f"weights: {folder / (label + '.safetensors')} (seed {best})")
    return 0


def without_closures(model: Model) -> Model:
    """The same model without closures."""
    return Model(model.solver, model.stepper, model.dt, (), (), model.substeps, model.courant)


def _said(scores: dict[str, Any]) -> str:
    """t95 and t80 in words; what was not crossed is said to be at least the window."""
    words = []
    for name in ("t95", "t80"):
        value = scores[name]
        words.append(f"{name} {value:.3f}" if value is not None else f"{name} ≥ {scores[name + '_at_least']:.3f}")
    return ", ".join(words)


def _seed_summary(outcome: Outcome) -> dict[str, Any]:
    return {
        "validation": outcome.best_validation,
        "best_update": outcome.best_update,
        "seconds": round(outcome.seconds, 1),
        "compile_seconds": round(outcome.compile_seconds, 1),
        "skipped_updates": outcome.skipped,
    }


def _thin(history: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """About 200 records of a history, every validation among them; losses are means over what was left out."""
    stride = max(1, len(history) // 200)
    out, losses = [], []
    for i, record in enumerate(history):
        if record["loss"] is not None:
            losses.append(record["loss"])
        if (i + 1) % stride == 0 or "validation" in record:
            out.append({**record, "loss": float(np.mean(losses)) if losses else None})
            losses = []
    return out


def _save_closures(experiment: "Experiment", model: Model, folder: Path, name: str, extra: dict[str, Any]) -> None:
    """One weights file per trained closure: `name.safetensors`, or `name-i.safetensors` where there are several."""
    assert experiment.spec.train is not None
    label = experiment.spec.train.run
    trained = [i for i, c in enumerate(model.closures) if parameters((c,))]
    for i in trained:
        header = {**experiment.weights_header(label, i), "versions": storage.environment(), **extra}
        header["config_hash"] = experiment.config_hash
        file = f"{name}.safetensors" if len(trained) == 1 else f"{name}-{i}.safetensors"
        storage.save_weights(folder / file, model.closures[i], header)
