"""Everything that `hybridsim train` does: data, one training per seed, weights, a card."""

import datetime
from collections.abc import Callable, Iterable
from dataclasses import asdict, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import equinox as eqx
import jax
import numpy as np
from jaxtyping import Float

from hybridsim import losses, resuming, storage
from hybridsim.estimates import check_need, need_of_training
from hybridsim.experiment import provenance
from hybridsim.journal import SAVE_EVERY
from hybridsim.model import Model
from hybridsim.progress import Reporter
from hybridsim.reference import COURANT, FineRunError, Frames, make_frames, sample_keys
from hybridsim.signals import STOP
from hybridsim.symmetry import symmetries
from hybridsim.train import (
    Outcome,
    Recipe,
    Task,
    TrainingDiverged,
    constants_among,
    correlation_scores,
    devices_for,
    parameters,
    shares,
    train,
    without_closures,
)
from hybridsim.training_log import open_log
from hybridsim.windows import InMemory, Windows, write_zarr, zarr_folder
from hybridsim.yaml_reader import ConfigError

if TYPE_CHECKING:
    from rich.console import Console

    from hybridsim.config import Experiment
    from hybridsim.sections import Train

Progress = Callable[[str, float], None]

MOST_WRITTEN = 40_000
"""`training.json` holds so many records in full; of longer histories it holds what the card does, and the logs hold all."""


# --- data ------------------------------------------------------------------------------------------------------------------------


def _window(experiment: "Experiment", kind: Literal["training", "validation"]) -> tuple[int, int, int]:
    """(first key, trajectories, frames): starts for validation are drawn after all that are for training."""
    assert experiment.spec.train is not None
    data = experiment.spec.train.data
    first, count, length = (
        (0, data.trajectories, data.time) if kind == "training" else (data.trajectories, data.validation, data.validation_time)
    )
    return first, count, max(1, round(length / data.interval))


def _frames(
    experiment: "Experiment",
    kind: Literal["training", "validation"],
    progress: Progress,
    some: slice = slice(None),
    keep: bool = True,
) -> Frames:
    """Filtered trajectories for the run that is trained: those of `some` keys, from the cache if they are kept."""
    spec = experiment.spec
    assert spec.train is not None
    data, label = spec.train.data, spec.train.run
    target = experiment.solver(label)
    grid = experiment.grid(data.shape or spec.reference.shape, ("train", "data", "shape"))
    first, count, frames = _window(experiment, kind)
    starts = _starts(experiment, kind)
    return make_frames(
        _recipe_of_data(experiment, kind),
        lambda g: experiment.solver_for(spec.reference.solver, g.shape),
        experiment.stepper("reference"),
        experiment.initial(),
        sample_keys(data.seed, first + count)[first:][some],
        grid,
        np.dtype(data.precision),
        data.interval,
        frames,
        {"target": target},
        store_as=np.dtype(experiment.dtype(label)),
        starts=starts if keep else None,
        keep=keep,
        progress=lambda what, x: progress(what.replace("reference", kind), x),
    )


def _starts(experiment: "Experiment", kind: Literal["training", "validation"]) -> dict[str, Any]:
    """What decides the states after the warm-up."""
    spec, resolved = experiment.spec, experiment.resolved
    assert spec.train is not None
    data = spec.train.data
    first, count, _ = _window(experiment, kind)
    return {
        **{name: resolved[name] for name in ("equation", "domain", "initial")},
        "reference": {name: resolved["reference"][name] for name in ("solver", "stepper")},
        "samples": [data.seed, first, count, list(data.shape or spec.reference.shape)],
        "files": {name: digest for name, digest in experiment.files.items() if name.endswith(".py")},
    }


def _recipe_of_data(experiment: "Experiment", kind: Literal["training", "validation"]) -> dict[str, Any]:
    """What decides the trajectories."""
    assert experiment.spec.train is not None
    data, label = experiment.spec.train.data, experiment.spec.train.run
    target, chosen = experiment.solver(label), experiment.resolved["runs"][label]["solver"]
    return {
        "starts": _starts(experiment, kind),
        "target": [type(target).__name__, list(target.grid.shape), target.filter_option],
        # a solver from outside the tables may filter by any of its arguments
        "foreign": chosen if ":" in chosen["use"] else None,
        "data": [kind, _window(experiment, kind)[2], data.interval, data.precision],
        "courant": COURANT,
    }


def training_data(
    experiment: "Experiment", kind: Literal["training", "validation"], progress: Progress
) -> Float[np.ndarray, "trajectory frame c *grid"]:
    """Filtered trajectories for the run that is trained, from the cache or made anew; their starts are disjoint from each other's
    and from the experiment's own."""
    return _frames(experiment, kind, progress).groups["target"]


def training_windows(experiment: "Experiment", progress: Progress) -> Windows:
    """The trajectories to learn from: in memory, or on disk where `train.data.store` says so."""
    assert experiment.spec.train is not None
    data = experiment.spec.train.data
    if data.store == "memory":
        return InMemory(training_data(experiment, "training", progress))
    _, count, frames = _window(experiment, "training")
    together = min(data.together or count, count)
    target, dtype = experiment.solver(experiment.spec.train.run), experiment.dtype(experiment.spec.train.run)

    def pieces() -> Iterable[tuple[int, Callable[[], np.ndarray]]]:
        for first in range(0, count, together):

            def make(first: int = first) -> np.ndarray:
                share = lambda what, x: progress(what, (first + x * together) / count)  # noqa: E731
                return _frames(experiment, "training", share, slice(first, first + together), keep=False).groups["target"]

            yield first, make

    recipe = {**_recipe_of_data(experiment, "training"), "together": together}
    shape = (count, frames + 1, len(target.variables), *target.grid.shape)
    return write_zarr(zarr_folder(recipe, dtype), shape, dtype, pieces())


# --- models ----------------------------------------------------------------------------------------------------------------------


def recipe_of(spec: "Train") -> Recipe:
    """The recipe that the YAML's section `train` describes."""
    terms = tuple((name, weight) for name in losses.TERMS if (weight := getattr(spec.loss, name)))
    other = ("unroll", "updates", "loss", "devices")
    same = {field.name: getattr(spec, field.name) for field in fields(Recipe) if field.name not in other}
    try:
        return Recipe(
            unroll=tuple(spec.unroll),
            updates=tuple(spec.updates),
            loss=terms,
            devices=spec.mesh.batch if spec.mesh else 0,
            **same,
        )
    except ValueError as error:
        raise ConfigError(f"train.{error}") from None


def model_to_train(experiment: "Experiment", seed: int) -> tuple[Model, int]:
    """The run's model with fresh closures, and its model steps per frame of the data."""
    spec = experiment.spec
    assert spec.train is not None
    label, interval = spec.train.run, spec.train.data.interval
    closures = experiment.closures_for(label, weights=False, seed=seed)
    if spec.train.constants or (spec.train.constants is None and parameters(closures) == 0):
        closures = experiment.closures_for(label, weights=False, seed=seed, constants=True)
    if parameters(closures) == 0:
        raise ConfigError(f"train.run: the closures of {label!r} have neither arrays nor constants, so there is nothing to train")
    if experiment.adaptive(label):
        raise ConfigError(f"runs.{label}.adaptive: a run that is trained needs a fixed time step; remove adaptive and give dt")
    model = experiment.model_for(label, closures=closures)
    every = max(1, round(interval / model.step_time))
    if abs(every * model.step_time - interval) > 1e-9 * interval:
        note = experiment.shortened(label, model.dt)
        raise ConfigError(
            f"train.data.interval: {interval:g} is not a whole number of model steps of {label!r} ({model.step_time:g} each); "
            f"choose a multiple, for example {every * model.step_time:g}" + (f" ({note})" if note else "")
        )
    length = spec.train.data.time
    longest = spec.train.warm_up + max(spec.train.unroll)
    if longest * interval > length * (1 + 1e-9):
        raise ConfigError(f"train.unroll: {longest} frames of {interval:g} are longer than train.data.time = {length:g}")
    return model, every


def check_fit(experiment: "Experiment", recipe: Recipe) -> None:
    """Refuses terms, choices and variants that do not go together, before any data are made."""
    spec = experiment.spec.train
    assert spec is not None
    first = model_to_train(experiment, 0)[0]
    for i, variant in enumerate([experiment, *experiment.variants]):
        model = model_to_train(variant, 0)[0]
        try:
            losses.check_terms(dict(recipe.loss), model.solver)
        except ValueError as error:
            raise ConfigError(f"train.loss.{error}") from None
        if recipe.symmetries:
            try:
                symmetries(model.solver)
            except ValueError as error:
                raise ConfigError(f"train.symmetries: {error}; leave it out") from None
        shapes = [jax.tree.map(lambda a: (a.shape, a.dtype), eqx.filter(m.closures, eqx.is_inexact_array)) for m in (first, model)]
        if shapes[0] != shapes[1]:
            raise ConfigError(
                f"train.variants[{i - 1}]: its closures have other weights than those of the file; all must share them"
            )
    try:
        for size in shares(recipe.batch, 1 + len(experiment.variants)):
            devices_for(recipe, size)
    except ValueError as error:
        raise ConfigError(f"train.mesh.batch: {str(error).removeprefix('devices: ')}") from None
    from hybridsim.gas import gas_of

    of_gas = gas_of(first.solver)
    if recipe.choose == "error" and of_gas is None:
        raise ConfigError("train.choose: only a gas has an error; choose t95 or correlation")
    if recipe.choose == "temperature_error" and (of_gas is None or of_gas.rate is None):
        raise ConfigError("train.choose: only a gas that radiates has a temperature_error; choose another")


# --- the command -----------------------------------------------------------------------------------------------------------------


def train_experiment(
    experiment: "Experiment", folder: Path, resume: bool, console: "Console", *, force: bool = False, save_every: float = SAVE_EVERY
) -> int:
    """Everything that `hybridsim train` does: data, one training per seed, weights, a card; options as for `run_experiment`."""
    spec = experiment.spec.train
    assert spec is not None
    recipe = recipe_of(spec)
    check_fit(experiment, recipe)
    with storage.FolderLock(folder), Reporter(console, folder / "log.txt") as say:
        try:
            return train_locked(experiment, recipe, folder, resume, say, force=force, save_every=save_every)
        except (TrainingDiverged, FineRunError) as error:
            say.line(str(error))
            return 3


def train_locked(
    experiment: "Experiment",
    recipe: Recipe,
    folder: Path,
    resume: bool,
    say: Reporter,
    *,
    force: bool = False,
    save_every: float = SAVE_EVERY,
) -> int:
    """`train_experiment` in a folder whose lock is held."""
    import yaml

    spec = experiment.spec.train
    assert spec is not None
    label = spec.run
    work = folder / "training"
    needed = check_need(need_of_training(experiment), folder)
    resume = resuming.may_go_on(work, experiment, "training", resume, force)
    if not resume:
        storage.check_removable(work, work / resuming.BEGUN)
    earlier = resuming.named_before(folder, work / resuming.BEGUN)
    storage.forget_manifest(folder)
    if not resume:
        # What another recipe left must never be taken for the training of this one.
        storage.remove_folder(work, work / resuming.BEGUN)
    resuming.begin(work, experiment, earlier)
    text = yaml.safe_dump(experiment.resolved, sort_keys=False, allow_unicode=True)
    storage.atomic_write(folder / "config.yaml", text)
    environment = storage.environment()
    origins = provenance(experiment, label, environment) | {"seed": list(spec.seeds)}
    first_model, _ = model_to_train(experiment, spec.seeds[0])
    count = parameters(first_model.closures)
    say.line(
        f"training {label} of {experiment.name}: {count} parameter{'s' if count > 1 else ''}, "
        f"seeds {', '.join(map(str, spec.seeds))} → {folder}"
    )
    say.line(needed)
    if note := experiment.shortened(label, first_model.dt):
        say.line(f"{label}: {note}")

    def making(what: str, fraction: float) -> None:
        say.progress(what, fraction)
        STOP.check()

    references = [experiment, *experiment.variants]
    names = ["", *(", ".join(f"{key} = {value}" for key, value in changes.items()) for changes in spec.variants)]
    given = []
    for reference, name in zip(references, names, strict=True):
        named = (lambda what, x, name=name: making(f"{what} ({name})", x)) if name else making
        windows = training_windows(reference, named)
        validation = training_data(reference, "validation", named)
        given.append((reference, name, windows, validation))
        data = reference.spec.train.data  # pyright: ignore[reportOptionalMemberAccess]
        say.line(
            f"data{f' ({name})' if name else ''}: {windows.shape[0]} trajectories of {data.time:g}, {validation.shape[0]} for "
            f"validation{', read from disk' if data.store == 'zarr' else ''}"
        )

    def tasks_for(seed: int) -> list[Task]:
        tasks = []
        for reference, name, windows, validation in given:
            model, every = model_to_train(reference, seed)
            interval = reference.spec.train.data.interval  # pyright: ignore[reportOptionalMemberAccess]
            tasks.append(Task(model, windows, validation, interval=interval, every=every, modes=reference.modes, name=name))
        return tasks

    base: dict[str, Any] = {}
    for task in tasks_for(spec.seeds[0]):
        scores = correlation_scores(without_closures(task.model), task.validation, task.interval, task.every, task.modes)
        base = base or scores
        say.line(f"without closure{f' ({task.name})' if task.name else ''}: validation {_said(scores)}")

    outcomes: dict[int, Outcome] = {}
    histories: dict[str, list[dict[str, Any]]] = {}
    for seed in spec.seeds:
        pace: list[tuple[int, float]] = []
        logs = [open_log(kind, work, f"seed-{seed}") for kind in spec.log]

        def report(record: dict[str, Any], seed=seed, pace=pace, logs=logs) -> None:
            for log in logs:
                log.write(record)
            if pace and pace[-1][0] != record["unroll"]:
                pace.clear()  # the first update of a length is compiled
            pace.append((record["unroll"], record["seconds"]))
            del pace[:-50]
            rate = (len(pace) - 1) / (pace[-1][1] - pace[0][1]) if pace[-1][1] > pace[0][1] else 0.0
            loss = "not finite" if record["loss"] is None else f"{record['loss']:.3e}"
            note = f"loss {loss}  unroll {record['unroll']}" + (f"  {rate:.1f}/s" if rate else "")
            say.progress(f"seed {seed}", record["update"] / recipe.total, note)
            if record.get("rolled_back"):
                say.line(f"seed {seed}, update {record['update']}: not finite; back to the last validated weights, half the rate")
            if "validation" in record:
                scores = record["validation"]
                say.line(f"seed {seed}, update {record['update']}: {note}, {_said(scores)}")
            STOP.check()

        try:
            outcome = train(
                tasks_for(seed),
                recipe,
                seed=seed,
                checkpoints=storage.Checkpoints(work / f"seed-{seed}", about=origins | {"seed": seed}),
                resume=resume,
                save_every=save_every,
                report=report,
            )
        finally:
            for log in logs:
                log.close()
        outcomes[seed] = outcome
        histories[f"seed {seed}"] = outcome.history
        kept = histories if sum(map(len, histories.values())) <= MOST_WRITTEN else {k: _thin(h) for k, h in histories.items()}
        storage.write_json(folder / "training.json", kept)
        summary = _seed_summary(outcome)
        _save_closures(experiment, outcome.model, folder, f"{label}-seed{seed}", {"training": {"seed": seed, **summary}})
        best = f"best validation {_said(outcome.best_validation)} at update {outcome.best_update}"
        early = ", stopped early" if outcome.stopped_early else ""
        say.line(f"seed {seed}: {best}, {outcome.seconds:.0f} s{early}{_tuned(outcome.model)}")
        if outcome.best_validation.get("score") is None:
            say.line(f"seed {seed}: no validation without a rollout that blew up; longer unrolls or a lower train.rate may help")

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
        "variants": spec.variants,
        "device": environment.get("device"),
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "version": environment["hybridsim"],
        "commit": environment["commit"],
        "versions": environment,
        "config_hash": experiment.config_hash,
        "precision": experiment.dtype(label),
        "chosen_seed": best,
        "chosen_by": f"validation {recipe.choose}",
        "validation_bare": base,
        "seeds": {str(s): _seed_summary(o) for s, o in outcomes.items()},
        "history": {name: _thin(h) for name, h in histories.items()},
    }
    _save_closures(experiment, outcomes[best].model, folder, label, {"training": {"seed": best, **_seed_summary(outcomes[best])}})
    storage.write_json(folder / f"{label}.json", card)
    from hybridsim.figures import training_figure

    (folder / "figures").mkdir(exist_ok=True)
    training_figure(histories["seed " + str(best)], folder / "figures" / "training.png")
    written = ["config.yaml", "training.json", "training", "figures/training.png", f"{label}.json", f"{label}*.safetensors"]
    storage.write_manifest(folder, written, {"command": "train", **origins}, earlier)
    say.line(f"weights: {folder / (label + '.safetensors')} (seed {best})")
    return 0


def _tuned(model: Model) -> str:
    """The constants that training has found, where there are some."""
    found = [
        f"{type(closure).__name__} {name} = {float(getattr(closure, name)):.4g}"
        for closure in model.closures
        for name in closure.constants
        if parameters(getattr(closure, name))
    ]
    return "; " + ", ".join(found) if found else ""


def _said(scores: dict[str, Any]) -> str:
    """t95 and t80 in words, of a gas its error; what was not crossed is said to be at least the window."""
    words = []
    for name in ("t95", "t80"):
        value = scores[name]
        words.append(f"{name} {value:.3f}" if value is not None else f"{name} ≥ {scores[name + '_at_least']:.3f}")
    if scores.get("mean_error") is not None:
        words.append(f"mean error {scores['mean_error']:.4f}")
    if scores.get("temperature_error") is not None:
        words.append(f"error of mass per temperature {scores['temperature_error']:.4f}")
    return ", ".join(words)


def _seed_summary(outcome: Outcome) -> dict[str, Any]:
    return {
        "validation": outcome.best_validation,
        "best_update": outcome.best_update,
        "seconds": round(outcome.seconds, 1),
        "compile_seconds": {str(length): round(seconds, 1) for length, seconds in outcome.compile_seconds.items()},
        "skipped_updates": outcome.skipped,
        "rollbacks": outcome.rollbacks,
        "stopped_early": outcome.stopped_early,
    }


def _thin(history: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """About 200 records of a history, every validation among them; losses are means over what was left out."""
    stride = max(1, len(history) // 200)
    out, values = [], []
    for i, record in enumerate(history):
        if record["loss"] is not None:
            values.append(record["loss"])
        if (i + 1) % stride == 0 or "validation" in record:
            out.append({**record, "loss": float(np.mean(values)) if values else None})
            values = []
    return out


def _save_closures(experiment: "Experiment", model: Model, folder: Path, name: str, extra: dict[str, Any]) -> None:
    """One weights file per trained closure: `name.safetensors`, or `name-i.safetensors` where there are several."""
    assert experiment.spec.train is not None
    label = experiment.spec.train.run
    trained = [i for i, c in enumerate(model.closures) if parameters((c,))]
    for i in trained:
        found = storage.environment()
        made = {"version": found["hybridsim"], "commit": found["commit"], "device": found["device"], "versions": found}
        header = {**experiment.weights_header(label, i), **made, "precision": experiment.dtype(label), **extra}
        header["constants"] = any(jax.tree.leaves(constants_among((model.closures[i],))))
        header["config_hash"] = experiment.config_hash
        file = f"{name}.safetensors" if len(trained) == 1 else f"{name}-{i}.safetensors"
        storage.save_weights(folder / file, model.closures[i], header)
