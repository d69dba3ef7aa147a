"""`hybridsim bench`: what a closure saves at equal accuracy, against its own discretisation and against the best classical run.

Each family is an experiment with closures, their rivals and a fine reference. The rivals are given more grids (ladders) and the
largest time steps that they bear; then all runs are made as by `hybridsim run`, and timed in turn, one round after another, so that
what slows the machine for a while slows all of them. What is claimed is in `claims.py`, how it is shown in `bench_page.py`.
"""

import copy
import fnmatch
import importlib.util
import math
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from hybridsim import resuming, storage
from hybridsim.bench_page import write_results
from hybridsim.claims import SCALES, Record, accuracy_of, analyse, card_of, closure_of, method_of
from hybridsim.compilation import setting
from hybridsim.config import Experiment, experiment_from, key_path_of, read_experiment, set_key, shipped_benches
from hybridsim.experiment import (
    Result,
    accuracy_metric,
    coarsest_grid,
    compiled_run,
    cost_of,
    diagnosed,
    files_of,
    fine_starts,
    group_name,
    make_reference,
    model_from,
    provenance,
    reference_groups,
    run_locked,
    stated_time,
)
from hybridsim.progress import Reporter
from hybridsim.reference import COURANT, FineRunError
from hybridsim.sections import Bench, Family, Run, explain
from hybridsim.signals import STOP
from hybridsim.tuning import fewest_lasting, fewest_steps, frames_of_trial, lasts
from hybridsim.turns import in_turn
from hybridsim.yaml_reader import ConfigError, parse_yaml, suggestion

if TYPE_CHECKING:
    from rich.console import Console

BEGUN = "bench_begun.json"
"""Stands in the folder of a benchmark until its manifest does."""
BATCH_ROUNDS = 5
"""How often all starts at once are timed; that takes as many times as long as one start."""


# --- reading ---------------------------------------------------------------------------------------------------------------------


def read_bench(name: str) -> tuple[Bench, str]:
    """The checked YAML of a benchmark, and its name; an experiment's name makes a benchmark of that one family."""
    shipped = shipped_benches()
    path = Path(name)
    stem = path.stem if path.suffix in (".yaml", ".yml") else path.name
    if path.is_file() or (path.name == name and stem in shipped):
        file = path if path.is_file() else shipped[stem]
        data = parse_yaml(file.read_text(encoding="utf-8"), file.name)
        if isinstance(data, dict) and "families" in data:
            from pydantic import ValidationError

            try:
                return Bench.model_validate(data), stem
            except ValidationError as error:
                raise ConfigError(explain(error, Bench, data)) from None
    read_experiment(name)  # says what is wrong with it
    return Bench(families={stem: Family(experiment=name)}), stem


def taking_part(bench: Bench, quick: bool, only: Sequence[str] = ()) -> dict[str, Family]:
    """The families of a benchmark, or `only` some; of a quick one those that say what is quick, or all where none does."""
    for name in only:
        if name not in bench.families:
            raise ConfigError(f"--family: no family is called {name!r}; {suggestion(name, bench.families, 'there are')}")
    asked = {name: family for name, family in bench.families.items() if not only or name in only}
    named = {name: family for name, family in asked.items() if family.quick is not None}
    return named if quick and named else asked


class FamilyPlan:
    """The plain values of a family's experiment, with the runs that are asked for; `experiment` checks and builds them."""

    def __init__(self, name: str, family: Family, quick: bool):
        self.name, self.family = name, family
        self.tune = family.tune and not quick
        self.long = None if quick else family.long
        self.limit = None if quick else family.limit
        data, self._path, self._shipped = read_experiment(family.experiment)
        self.data = copy.deepcopy(data)
        self.data.pop("sweep", None)
        self.missing: dict[str, list[str]] = {}
        """package → labels of the rivals that need it and are left out."""
        self._add_rivals()
        for key, value in {**family.change, **((family.quick or {}) if quick else {})}.items():
            set_key(self.data, key_path_of(key), value)
        chosen = family.quick_runs if quick else []
        self._choose(
            chosen or family.runs, set() if chosen else {*family.rivals, *(k for runs in family.peers.values() for k in runs)}
        )
        if not quick:
            self._add_rungs()

    @property
    def runs(self) -> dict[str, dict[str, Any]]:
        return self.data["runs"]

    def experiment(self) -> Experiment:
        return experiment_from(self.data, self._path, self._shipped)

    def check(self) -> None:
        """Everything that can be wrong is found before anything is computed; raises `ConfigError`."""
        where, experiment = f"families.{self.name}", self.experiment()
        learned = [closure_of(run) is not None for run in experiment.spec.runs.values()]
        if all(learned) or not any(learned):
            raise ConfigError(f"{where}: needs runs with trained weights and runs without, to compare them")
        for label, run in experiment.spec.runs.items():
            if self.long is not None and f"{label}_long" in self.runs:
                raise ConfigError(f"{where}: {label}_long is what {label} is called with the steps that last; give it another name")
            held = [c.evaluate for c in run.corrections if isinstance(c.evaluate, int) and c.evaluate != run.substeps]
            if self.tune and held:
                raise ConfigError(
                    f"{where}: {label} evaluates a correction every {held[0]} of {run.substeps} substeps, so its time step cannot "
                    f"be chosen; set substeps to {held[0]}, or tune: false"
                )
        if self.limit is not None:
            self._check_limit(experiment, list(self.limit.shape), f"{where}.limit")

    def _check_limit(self, experiment: Experiment, shape: list[int], where: str) -> None:
        grid = experiment.reference_solver().grid
        if not all(grid.periodic):
            raise ConfigError(f"{where}: what a grid does not hold is told by Fourier modes, so the box must be periodic")
        if len(shape) != grid.ndim or any(n > most for n, most in zip(shape, grid.shape, strict=False)):
            raise ConfigError(f"{where}.shape: needs {grid.ndim} numbers, at most those of the reference, {list(grid.shape)}")
        if experiment.spec.samples.count < 2:
            raise ConfigError(f"{where}: needs two starts or more; samples.count is 1")
        for label, run in experiment.spec.runs.items():
            if closure_of(run) and any(n >= m for n, m in zip(run.shape, shape, strict=True)):
                raise ConfigError(f"{where}.shape: {shape} is not finer than the grid of {label}, {list(run.shape)}")
        experiment.solver_for(experiment.spec.reference.solver, shape)

    def _add_rivals(self) -> None:
        rivals = dict(self.family.rivals)
        for package, runs in self.family.peers.items():
            if not package.isidentifier():
                raise ConfigError(f"families.{self.name}.peers: {package!r} is not the name of a package")
            if importlib.util.find_spec(package) is None:
                self.missing[package] = list(runs)
            else:
                rivals |= runs
        for label, run in rivals.items():
            if label in self.runs:
                raise ConfigError(f"families.{self.name}.rivals: the experiment has a run {label!r} already")
            self.runs[label] = dict(run)

    def _choose(self, patterns: Sequence[str], anyway: set[str]) -> None:
        for pattern in patterns:
            if not fnmatch.filter(self.runs, pattern):
                raise ConfigError(
                    f"families.{self.name}.runs: no run is called {pattern!r}; {suggestion(pattern, self.runs, 'there are')}"
                )
        if patterns:
            kept = {k: run for k, run in self.runs.items() if k in anyway or any(fnmatch.fnmatch(k, p) for p in patterns)}
            self.data["runs"] = kept
        checks = self.data.get("checks") or {}
        self.data["checks"] = {k: v for k, v in checks.items() if k == "all" or k in self.runs}

    def _add_rungs(self) -> None:
        for label, sizes in self.family.ladders.items():
            where = f"families.{self.name}.ladders"
            if any(label in labels for labels in self.missing.values()):
                continue
            if label not in self.runs:
                raise ConfigError(f"{where}: no run is called {label!r}; {suggestion(label, self.runs, 'there are')}")
            template = self.runs[label]
            shape = template["shape"]
            for n in sizes:
                scaled = [x * n / shape[0] for x in shape]
                if any(x != round(x) for x in scaled):
                    raise ConfigError(f"{where}.{label}: {n} points along the first axis leave no whole number along the others")
                if f"{label}_{n}" in self.runs:
                    raise ConfigError(f"{where}.{label}: there is a run {label}_{n} already")
                rung = {**copy.deepcopy(template), "shape": [round(x) for x in scaled]}
                if rung.get("dt") is not None:
                    rung["dt"] = template["dt"] * shape[0] / n
                rung.pop("title", None)
                self.runs[f"{label}_{n}"] = rung

    def step_with(self, label: str, steps: int, interval: float, blocks: int) -> None:
        """Gives a run so many solver steps per frame; in a run with substeps they come in `blocks`, over which outputs are held."""
        run = self.runs[label]
        if run.get("substeps", 1) > 1:
            part = steps // blocks
            for correction in run.get("corrections", []):
                if isinstance(correction.get("evaluate"), int):
                    correction["evaluate"] = part
            run["substeps"] = part
        for key in ("cfl", "adaptive"):
            run.pop(key, None)
        run["dt"] = interval / steps

    def with_steps(self, tuned: Mapping[str, Record], interval: float) -> None:
        """Gives every run the time steps that were found; a second run where the long-run rule asks for another."""
        for label, found in tuned.items():
            if found["steps"] is None:
                del self.runs[label]
                continue
            second = found["labels"].get("long")
            if second is not None and second != label:
                self.runs[second] = {**copy.deepcopy(self.runs[label]), "may_diverge": True}
                self.step_with(second, found["long_steps"], interval, found["blocks"])
            self.runs[label]["may_diverge"] = True
            self.step_with(label, found["steps"], interval, found["blocks"])

    def variant(self, label: str, steps: int, interval: float, blocks: int) -> Experiment:
        """The experiment with so many steps per frame in one run (see `step_with`)."""
        plan = copy.copy(self)
        plan.data = copy.deepcopy(self.data)
        plan.step_with(label, steps, interval, blocks)
        return plan.experiment()

    def add_titles(self) -> None:
        """A title for every classical run that has none: its method and grid."""
        for data in self.runs.values():
            run = Run.model_validate(data)
            if run.title is None and closure_of(run) is None:
                data["title"] = f"{method_of(run)} {' × '.join(map(str, run.shape))}"


# --- time steps ------------------------------------------------------------------------------------------------------------------


def tune_family(plan: FamilyPlan, folder: Path, resume: bool, say: Reporter) -> dict[str, Record]:
    """label → what was tried for every run, and the labels that stand for it by each rule; kept in `tuning.json`.

    Training seeds of one closure share a time step, that of the seed which bears the least.
    """
    if not plan.tune:
        return {}
    experiment = plan.experiment()
    file = folder / "tuning.json"
    known: Record = storage.read_json(file)["rungs"] if resume and file.exists() else {}
    keys = {label: _rung_key(experiment, label, plan.long) for label in experiment.labels}
    kept = {label: known[label] for label in experiment.labels if known.get(label, {}).get("key") == keys[label]}
    if len(kept) < len(keys):
        _tune(plan, experiment, keys, kept, file, say)
        kept = storage.read_json(file)["rungs"]
    return _shared(kept, experiment, plan.long is not None)


def _tune(plan: FamilyPlan, experiment: Experiment, keys: Record, kept: Record, file: Path, say: Reporter) -> None:
    """Tries the time steps of every run that is not `kept` yet."""

    def progress(what: str, part: float) -> None:
        say.progress(f"{plan.name}: {what}", part)
        STOP.check()

    reference = make_reference(experiment, progress)
    solvers = {group_name(experiment, label): experiment.solver(label) for label in experiment.labels}
    truths = reference_groups(experiment, reference, solvers)
    coarsest, at = coarsest_grid(experiment), stated_time(experiment)
    interval = experiment.spec.time.end / experiment.spec.time.frames
    draw = np.arange(experiment.spec.samples.count)
    for i, label in enumerate(experiment.labels):
        if label in kept:
            continue
        group = group_name(experiment, label)
        starts = reference.groups[group][:, 0]
        measure = accuracy_metric(experiment.solver(label), truths[group])
        # held outputs are held for as long as before, so that only the steps in between can be fewer
        held = experiment.spec.runs[label].substeps
        given = round(interval / model_from(experiment, label, starts).dt)
        blocks = given // held if held > 1 else 1

        def accuracy(n: int, label=label, group=group, starts=starts, measure=measure, blocks=blocks) -> float:
            STOP.check()
            variant = plan.variant(label, n * blocks, interval, blocks)
            frames = frames_of_trial(variant, label, n * blocks, starts)
            if frames is None:
                return math.nan
            model = variant.model_for(label)
            ledger = np.zeros((*frames.shape[:2], len(model.solver.ledger_rows)))
            ds = diagnosed(variant, Result(label, model, frames, ledger), reference, truths[group], {})
            found = accuracy_of(measure, ds, truths[group], coarsest, at)
            assert found is not None
            return found(draw)

        def lasted(n: int, label=label, starts=starts, blocks=blocks) -> float:
            STOP.check()
            return lasts(plan.variant(label, n * blocks, interval, blocks), label, n * blocks, starts, plan.long or 0.0)

        tuned = fewest_steps(given // blocks, accuracy, SCALES[measure])
        if plan.long is not None:
            tuned = fewest_lasting(tuned, lasted, plan.long)
        kept[label] = {
            "key": keys[label],
            "measure": measure,
            "given": given,
            "blocks": blocks,
            "steps": None if tuned.steps is None else tuned.steps * blocks,
            "long_steps": None if tuned.long_steps is None else tuned.long_steps * blocks,
            "trials": [
                {"dt": interval / (n * blocks), "value": value, "lost": math.isnan(value)}
                for n, value in sorted(tuned.accuracy.items())
            ],
            "lasted": {str(n * blocks): t for n, t in tuned.lasted.items()},
        }
        storage.write_json(file, {"rungs": kept})
        say.progress(f"{plan.name}: time steps", (i + 1) / len(experiment.labels))
        say.line(f"{plan.name}, {label}: {_tuned_sentence(kept[label], interval, plan.long)}")


def _rung_key(experiment: Experiment, label: str, long: float | None) -> str:
    """A digest of everything that decides which time steps a run bears: other runs may come and go."""
    resolved = experiment.resolved
    shared = {k: v for k, v in resolved.items() if k not in ("name", "title", "runs", "checks", "train", "sweep")}
    run = {k: v for k, v in resolved["runs"][label].items() if k not in ("title", "may_diverge")}
    coarsest = coarsest_grid(experiment)
    recipe = {"shared": shared, "run": run, "long": long, "shells": [list(coarsest.shape), list(coarsest.lengths)]}
    learned = closure_of(experiment.spec.runs[label]) is not None
    files = {name: digest for name, digest in experiment.files.items() if learned or name.endswith(".py")}
    return storage.recipe_hash(recipe | {"files": files}, experiment.dtype(label))


def _shared(rungs: Record, experiment: Experiment, long: bool) -> Record:
    """The rungs with their labels by each rule, and one time step for all training seeds of a closure."""
    found = {label: dict(rung) for label, rung in rungs.items()}
    seeds: dict[str, list[str]] = {}
    for label in experiment.labels:
        if closure := closure_of(experiment.spec.runs[label]):
            seeds.setdefault(closure, []).append(label)
    for labels in seeds.values():
        steps = [found[label]["steps"] for label in labels]
        lasting = [found[label]["long_steps"] for label in labels]
        for label in labels:
            if found[label]["steps"] is not None:
                found[label]["steps"] = max(n for n in steps if n is not None)
                found[label]["long_steps"] = None if None in lasting else max(*lasting, found[label]["steps"])
    for label, rung in found.items():
        rung["labels"] = _labels(label, rung, long)
        # with smaller steps than those that were tried it lasts as long
        for n in (rung["steps"], rung["long_steps"]):
            shorter = [t for steps, t in rung["lasted"].items() if n is not None and int(steps) <= n]
            if shorter:
                rung["lasted"] = {str(n): max(shorter)} | rung["lasted"]
    return found


def _labels(label: str, rung: Record, long: bool) -> dict[str, str]:
    """Rule of time steps → the run that stands for the rung by it."""
    if rung["steps"] is None:
        return {}
    labels = {"accuracy": label}
    if long and rung["long_steps"] is not None:
        labels["long"] = label if rung["long_steps"] == rung["steps"] else f"{label}_long"
    return labels


def _tuned_sentence(rung: Record, interval: float, long: float | None) -> str:
    steps, lasting, given = rung["steps"], rung["long_steps"], rung["given"]
    if steps is None:
        return "unstable with all time steps tried"
    words = f"Δt {interval / steps:.4g}" + (f" (given {interval / given:.4g})" if given != steps else "")
    if long is None:
        return words
    if lasting is None:
        return f"{words}; no time step tried lasts until t = {long:g}"
    return words if lasting == steps else f"{words}; lasts until t = {long:g} with {interval / lasting:.4g}"


# --- costs -----------------------------------------------------------------------------------------------------------------------


def measure_costs(experiment: Experiment, labels: Sequence[str], folder: Path, rounds: int, say: Reporter, name: str) -> Record:
    """label → seconds per unit time of one start alone and of each of all starts at once, by round, memory and compile time.

    From their own starts as they stand in the family's folder. Programs are compiled anew: one from the compile cache does not
    say what memory it takes, nor how long it took.
    """
    programs, batches, found = {}, {}, {}
    for i, label in enumerate(labels):
        ds = storage.open_dataset(folder / f"{label}.nc").isel(time=0)
        starts = np.stack([ds[variable.name].values for variable in experiment.solver(label).variables], axis=1)
        begin = time.perf_counter()
        with setting("jax_enable_compilation_cache", False):
            programs[label] = compiled_run(experiment, label, starts)
        found[label] = {"memory": programs[label].memory, "compile_seconds": time.perf_counter() - begin}
        batches[label] = compiled_run(experiment, label, starts, alone=False)
        say.progress(f"{name}: compiling", (i + 1) / len(labels))
        STOP.check()

    def telling(what: str) -> Callable[[float], None]:
        def tell(part: float) -> None:
            say.progress(f"{name}: {what}, in turn", part)
            STOP.check()

        return tell

    samples = experiment.spec.samples.count
    alone = in_turn(programs, rounds, telling("timing"))
    batch = in_turn(batches, min(rounds, BATCH_ROUNDS), telling("timing all starts at once"))
    for label in labels:
        found[label] |= {"seconds": alone[label].tolist(), "batch": (batch[label] / samples).tolist()}
    return found


def data_seconds(experiment: Experiment) -> dict[str, float | None]:
    """closure → what making its training data takes here: the unit times of its fine runs at the speed of their solver."""
    found: dict[str, float | None] = {}
    for label, run in experiment.spec.runs.items():
        closure = closure_of(run)
        if closure is None or closure in found:
            continue
        card = card_of(experiment, label, closure)
        if card is None:
            found[closure] = None
            continue
        data = card["data"]
        warm_up = float(getattr(experiment.initial(), "warm_up", 0.0))
        units = data["trajectories"] * (data["time"] + warm_up) + data["validation"] * (data["validation_time"] + warm_up)
        found[closure] = units * _fine_cost(experiment, data["shape"] or experiment.spec.reference.shape, data["precision"])
    return found


def _fine_cost(experiment: Experiment, shape: Sequence[int], precision: str) -> float:
    """Seconds per unit time of the reference's solver on a grid, from a start of the reference."""
    import jax.numpy as jnp

    from hybridsim.model import Model

    spec, fine = experiment.spec.reference, experiment.reference_solver()
    solver = experiment.solver_for(spec.solver, shape)
    u = fine_starts(experiment)[0]
    u = solver.prepare(u.dtype).restrict(u, fine.grid, fine.variables).astype(jnp.dtype(precision))
    dt = (COURANT if spec.cfl is None else spec.cfl) * float(solver.stable_dt(u))
    return cost_of(Model(solver, experiment.stepper("reference", solver), dt), u)


# --- one family ------------------------------------------------------------------------------------------------------------------


def measure_limit(experiment: Experiment, plan: FamilyPlan, folder: Path, resume: bool, say: Reporter) -> Record | None:
    """The predictability limit on the grid of every closure, with its interval; kept in `limit.json`."""
    if plan.limit is None:
        return None
    from hybridsim import diagnostics, gas
    from hybridsim.predictability import limits

    labels = [label for label, run in experiment.spec.runs.items() if closure_of(run)]
    targets = {group_name(experiment, label): experiment.solver(label) for label in labels}
    frames = experiment.spec.time.frames
    end = plan.limit.end or experiment.spec.time.end
    count = max(1, round(end / (experiment.spec.time.end / frames)))
    recipe = {"config_hash": experiment.config_hash, "shape": list(plan.limit.shape), "frames": count}
    file = folder / "limit.json"
    if resume and file.exists() and (old := storage.read_json(file))["recipe"] == recipe:
        return old

    def tell(part: float) -> None:
        say.progress(f"{plan.name}: predictability limit", part)
        STOP.check()

    times, series = limits(experiment, targets, list(plan.limit.shape), count, tell)
    at = stated_time(experiment)
    found: Record = {
        "recipe": recipe,
        "shape": list(plan.limit.shape),
        "end": float(times[-1]),
        "times": times.tolist(),
        "groups": {},
    }
    for group, values in series.items():
        entry: Record = {"shape": list(targets[group].grid.shape), "series": values.tolist()}
        if gas.gas_of(targets[group]) is not None:
            errors = np.array([np.interp(at, times, row) for row in values])
            draws = np.random.default_rng(0).integers(len(errors), size=(1000, len(errors)))
            interval = np.quantile(errors[draws].mean(axis=1), [0.05, 0.95]).tolist()
            entry |= {"measure": "error", "value": float(errors.mean()), "interval": interval}
        else:
            t95 = diagnostics.t_correlated(times, values, 0.95)
            entry |= {"measure": "t95", "value": t95.time, "interval": [t95.low, t95.high]}
        found["groups"][group] = entry
    storage.write_json(file, found)
    return storage.read_json(file)


def run_family(plan: FamilyPlan, folder: Path, rounds: int, resume: bool, say: Reporter) -> tuple[Experiment, Record, Record]:
    """(the experiment with all rungs and steps, the summary of its runs, what else was measured).

    On `resume` what is there of the same configuration is kept.
    """
    earlier = storage.named_files(folder)
    storage.forget_manifest(folder)
    base = plan.experiment()
    tuning = tune_family(plan, folder, resume, say)
    plan.with_steps(tuning, base.spec.time.end / base.spec.time.frames)
    plan.add_titles()
    experiment = plan.experiment()
    done = folder / "summary.json"
    whole = resume and done.exists() and not (folder / "state" / resuming.BEGUN).exists()
    if not (whole and storage.read_json(done)["config_hash"] == experiment.config_hash):
        done.unlink(missing_ok=True)
        run_locked(experiment, folder, resume and (folder / "state").exists(), say, timed=False)
    summary = storage.read_json(done)
    limit = measure_limit(experiment, plan, folder, resume, say)
    turns = folder / "turns.json"
    kept = storage.read_json(turns) if resume and turns.exists() else {}
    if kept.get("config_hash") != experiment.config_hash or kept["rounds"] != rounds:
        finished = [label for label in experiment.labels if summary["runs"][label]["outcome"] == "finished"]
        timings = measure_costs(experiment, finished, folder, rounds, say, plan.name)
        kept = {
            "config_hash": experiment.config_hash,
            "rounds": rounds,
            "data_seconds": data_seconds(experiment),
            "timings": timings,
        }
        storage.write_json(turns, kept)
    earlier |= storage.named_files(folder)
    storage.forget_manifest(folder)
    written = ["tuning.json", "limit.json", "turns.json", *(name for name in files_of(experiment) if name not in earlier)]
    storage.write_manifest(folder, written, {"command": "run", **provenance(experiment)}, earlier)
    evidence = {
        "timings": kept["timings"],
        "data_seconds": kept["data_seconds"],
        "tuning": tuning,
        "limit": limit,
        "long": plan.long,
    }
    return experiment, summary, evidence


# --- the command -----------------------------------------------------------------------------------------------------------------


def bench_command(
    name: str, out: Path | None, quick: bool, resume: bool, only: Sequence[str], against: Path | None, console: "Console"
) -> int:
    """Everything that `hybridsim bench` does; the exit code."""
    bench, stem = read_bench(name)
    plans = {family: FamilyPlan(family, spec, quick) for family, spec in taking_part(bench, quick, only).items()}
    for plan in plans.values():
        plan.check()
    before = None if against is None else read_results(against)
    folder = Path("runs") / (f"bench_{stem}_quick" if quick else f"bench_{stem}") if out is None else out
    with storage.FolderLock(folder), Reporter(console, folder / "log.txt") as say:
        environment, marker = resuming.environment(), folder / BEGUN
        if resume and marker.exists():
            begun = storage.read_json(marker)
            known = begun.get("environment") if isinstance(begun, dict) else None
            resuming.check_bits(folder, known, environment, "start again without --resume")
        earlier = resuming.named_before(folder, marker)
        storage.write_json(marker, {"config": bench.model_dump(mode="json"), "environment": environment, "earlier": earlier})
        storage.forget_manifest(folder)
        results: dict[str, Record] = {}
        begin = time.perf_counter()
        for family, plan in plans.items():
            place = folder / family
            for package, labels in plan.missing.items():
                say.line(f"{family}: {package} is not installed, so {', '.join(labels)} are left out")
            try:
                with storage.FolderLock(place):
                    experiment, summary, evidence = run_family(plan, place, bench.rounds, resume, say)
            except FineRunError as error:
                say.line(f"{family}: {error}; lower reference.cfl or refine reference.shape")
                return 3
            results[family] = analyse(family, experiment, place, summary, evidence, bench.resamples)
            for closure, entry in results[family]["closures"].items():
                say.line(f"{family}, {closure}: {entry['verdict']}")
            about = _provenance(bench, results)
            page = write_results(folder, bench, results, quick, before, about)
        names = ["bench.json", "bench.md", "bench.nc", "bench.html", "figures/*.png", *results]
        storage.write_manifest(folder, names, {"command": "bench", **about}, earlier)
        marker.unlink()
        say.line(f"{len(results)} {'family' if len(results) == 1 else 'families'} in {time.perf_counter() - begin:.0f} s: {page}")
    return 0


def _provenance(bench: Bench, results: Mapping[str, Record]) -> Record:
    """What every file of a benchmark says of its making; seeds, precision and hashes of the experiments by family."""
    config = bench.model_dump(mode="json")
    about = storage.provenance(
        storage.config_digest(config, {name: found["config_hash"] for name, found in results.items()}),
        config,
        {name: found["seed"] for name, found in results.items()},
        sorted({p for found in results.values() for p in found["precision"].values()}),
    )
    return {**about, "inputs": {name: found["config_hash"] for name, found in results.items()}}


def read_results(path: Path) -> Record:
    """An earlier `bench.json`, or that of an earlier folder."""
    file = path / "bench.json" if path.is_dir() else path
    if not file.is_file():
        raise ConfigError(f"--against: {path}: there is no bench.json")
    found = storage.read_json(file)
    if not isinstance(found, dict) or not isinstance(found.get("families"), dict):
        raise ConfigError(f"--against: {file}: these are not the results of a benchmark")
    return found
