"""`hybridsim run`: the reference, the runs side by side, what they are worth, and the files that say so.

The outer loop is on the host, in chunks of a fixed number of frames that no clock sets. Progress, output, checkpoints, the check
for non-finite values and signals act between chunks; nothing of them is inside the compiled step.
"""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from hybridsim import diagnostics, statistics, storage
from hybridsim.contract import AbstractSolver
from hybridsim.model import MOST_STEPS, Model, Prepared, adaptive_steps, frames_of
from hybridsim.progress import Reporter
from hybridsim.reference import COURANT, FineRunError, Frames, make_frames, sample_keys
from hybridsim.samples import gathered, over_samples
from hybridsim.signals import STOP
from hybridsim.train import parameters
from hybridsim.yaml_reader import ConfigError

if TYPE_CHECKING:
    import xarray as xr
    from rich.console import Console

    from hybridsim.config import Experiment

HALF = "half resolution"
PICTURES = 6
PDF_BINS = 100
MOST_VALUES = 2**22
TIMING_ROUNDS = 3


@dataclass
class Blowup:
    """Where a run first stopped being finite."""

    sample: int
    step: int
    t: float
    field: str
    cell: tuple[int, ...]

    def __str__(self) -> str:
        where = ", ".join(map(str, self.cell))
        return f"diverged at t = {self.t:.4g} (step {self.step}, sample {self.sample}, field {self.field}, cell [{where}])"


@dataclass
class Result:
    """One run: its frames, its ledger, and what it cost."""

    label: str
    model: Model
    u: np.ndarray
    ledger: np.ndarray
    blowups: list[Blowup] = field(default_factory=list)
    seconds: float = 0.0
    compile_seconds: float = 0.0
    latency: float = math.nan
    done: int = 0
    steps_taken: float = math.nan
    """Solver steps from the start to the end, the mean over samples where they differ."""
    smallest_dt: float = math.nan

    @property
    def outcome(self) -> str:
        if not self.blowups:
            frames = self.u.shape[1] - 1
            return "finished" if self.done >= frames else f"interrupted after frame {self.done} of {frames}"
        first = min(self.blowups, key=lambda b: b.t)
        count = len(self.blowups)
        return str(first) + (f"; {count} of {len(self.u)} samples diverged" if len(self.u) > 1 else "")


# --- the reference ---------------------------------------------------------------------------------------------------------------


def group_name(experiment: "Experiment", label: str) -> str:
    """The name of a run's filter and grid: runs of one solver on one grid share their reference frames.

    A solver from outside the tables may filter by its arguments, so every run of such a one has frames of its own.
    """
    spec = experiment.spec_of(label)
    plain = "".join(c if c.isalnum() else "_" for c in spec.solver.use)
    own = f"{label}_" if ":" in spec.solver.use else ""
    return f"{own}{plain}_{'x'.join(map(str, spec.shape))}"


def reference_recipe(experiment: "Experiment", targets: dict[str, AbstractSolver]) -> dict[str, Any]:
    """Everything that decides the numbers of the reference."""
    resolved = experiment.resolved
    keep = {name: resolved[name] for name in ("equation", "domain", "initial", "samples", "reference")}
    groups = {name: [type(s).__name__, list(s.grid.shape)] for name, s in targets.items()}
    foreign = {k: run["solver"] for k, run in resolved["runs"].items() if ":" in run["solver"]["use"]}
    files = {name: digest for name, digest in experiment.files.items() if name.endswith(".py")}
    time_keys = {name: resolved["time"][name] for name in ("end", "frames")}
    return {
        **keep,
        "time": time_keys,
        "groups": groups,
        "foreign": foreign,
        "courant": COURANT,
        "pictures": PICTURES,
        "files": files,
    }


def start_recipe(experiment: "Experiment") -> dict[str, Any]:
    """Everything that decides the states after the warm-up."""
    resolved = experiment.resolved
    spec = experiment.spec.reference
    return {
        **{name: resolved[name] for name in ("equation", "domain", "initial")},
        "solver": resolved["reference"]["solver"],
        "stepper": resolved["reference"]["stepper"],
        "samples": resolved["samples"],
        "shape": list(spec.shape),
        "files": {name: digest for name, digest in experiment.files.items() if name.endswith(".py")},
    }


def make_reference(experiment: "Experiment", progress: Callable[[str, float], None]) -> Frames:
    """The reference of an experiment under every filter that its runs need, and its half-resolution twin."""
    spec = experiment.spec.reference
    targets = {group_name(experiment, label): experiment.solver(label) for label in experiment.labels}
    template = experiment.reference_solver()
    frames = experiment.spec.time.frames
    halved = _half_is_possible(experiment)
    return make_frames(
        reference_recipe(experiment, targets),
        lambda grid: experiment.solver_for(spec.solver, grid.shape),
        experiment.stepper("reference"),
        experiment.initial(),
        sample_keys(experiment.spec.samples.seed, experiment.spec.samples.count),
        template.grid,
        np.dtype(spec.precision),
        experiment.spec.time.end / frames,
        frames,
        targets,
        courant=COURANT if spec.cfl is None else spec.cfl,
        dt=spec.dt,
        half=HALF if halved else None,
        pictures=PICTURES,
        starts=start_recipe(experiment),
        progress=progress,
    )


def _half_is_possible(experiment: "Experiment") -> bool:
    """Whether the reference can be run at half its resolution, for the evidence of convergence."""
    spec = experiment.spec.reference
    if any(n % 2 or n < 16 for n in spec.shape):
        return False
    try:
        experiment.solver_for(spec.solver, [n // 2 for n in spec.shape])
    except ConfigError:
        return False
    return True


# --- one run ---------------------------------------------------------------------------------------------------------------------


def _observe(prepared: Prepared, z: Any, carry: Any) -> tuple[Any, Any]:
    high, low = carry["ledger"]
    return prepared.solver.decode(z), (high, low)


@eqx.filter_jit
def _begin(model: Model, u: Any, key: Any) -> Any:
    """(z, carry, step) of every sample at its start."""
    prepared = model.prepare(u.dtype)

    def one(u, key):
        return prepared.solver.encode(u), model.init_carry(u, key), jnp.zeros((), jnp.int32)

    return jax.vmap(one)(u, key)


@eqx.filter_jit
def _prepare(model: Model, dtype: Any) -> Prepared:
    return model.prepare(dtype)


@eqx.filter_jit
def _chunk(model: Model, prepared: Prepared, state: Any, frames: int, every: int) -> tuple[Any, Any]:
    """`frames` frames of every sample."""

    def one(shared, state):
        model, prepared = shared
        z, carry, step = state
        return frames_of(model, prepared, z, carry, step, frames, every, 0, _observe)

    return over_samples(one, (model, prepared), state)


def _chunk_length(frames: int) -> int:
    """Frames per chunk: the largest divisor of `frames` up to ten."""
    return max(n for n in range(1, min(10, frames) + 1) if frames % n == 0)


def _locate(model: Model, state: Any, sample: int, frames: int, every: int) -> Blowup:
    """Steps one sample again from the last good chunk boundary, one model step at a time, to where it first is not finite."""
    current = jax.tree.map(lambda a: a[sample], state)
    prepared = _prepare(model, current[1]["start"].dtype)
    compiled = eqx.filter_jit(lambda p, q: p.solver.decode(q))
    decode = lambda z: np.asarray(compiled(prepared, z))  # noqa: E731
    if model.courant is not None:
        return _locate_adaptive(model, prepared, current, sample, frames, every, decode)
    one = eqx.filter_jit(lambda m, p, s: m(*s, p))
    for _ in range(frames * every):
        current = one(model, prepared, current)
        u = decode(current[0])
        if not np.isfinite(u).all():
            break
    count = int(current[2])
    return _blowup(model, sample, count, count * model.step_time, ~np.isfinite(u))


def _blowup(model: Model, sample: int, step: int, t: float, bad: np.ndarray) -> Blowup:
    """A `Blowup` at the first cell that is `bad`."""
    first = np.unravel_index(int(bad.argmax()), bad.shape)
    return Blowup(sample, step, t, model.solver.variables[int(first[0])].name, tuple(int(i) for i in first[1:]))


def _locate_adaptive(
    model: Model, prepared: Prepared, current: Any, sample: int, frames: int, every: int, decode: Callable[[Any], np.ndarray]
) -> Blowup:
    """The same where the steps of an interval are not known beforehand: bisection of their number in the bad interval.

    A flow that was given up because its steps became too small is bad where it is fastest.
    """
    part = eqx.filter_jit(lambda m, p, s, most: adaptive_steps(m, p, s[0], s[1], s[2], every, most))

    def after(steps: int) -> tuple[Any, Any, Any]:
        return part(model, prepared, current, jnp.asarray(steps, jnp.int32))

    high = 2 * max(MOST_STEPS, 2 * every)
    for _ in range(frames):
        z, carry, _ = after(high)
        if not np.isfinite(decode(z)).all():
            break
        current = (z, carry, current[2] + every)
    low, high = 0, int(carry["steps_taken"]) - int(current[1]["steps_taken"]) + 1
    while high - low > 1:
        middle = (low + high) // 2
        if np.isfinite(decode(after(middle)[0])).all():
            low = middle
        else:
            high = middle
    z, carry, remaining = after(high)
    u = decode(z)
    bad = ~np.isfinite(u)
    last, before, left = after(low)
    if int(carry["steps_taken"]) == int(before["steps_taken"]):
        speed = np.abs(decode(last))
        bad, remaining = speed == speed.max(), left
    t = (int(current[2]) + every) * model.step_time - float(remaining)
    return _blowup(model, sample, int(carry["steps_taken"]), t, bad)


def _run_one(
    experiment: "Experiment",
    label: str,
    model: Model,
    start: np.ndarray,
    work: Path,
    resume: bool,
    progress: Callable[[int, int], None],
    interrupted: Callable[[Result], Any],
) -> Result:
    """All frames of one run, from its last checkpoint if there is one."""
    frames, every = experiment.spec.time.frames, experiment.steps_per_frame(label, model.dt).steps
    per_chunk = _chunk_length(frames)
    samples = len(start)
    u0 = jnp.asarray(start, experiment.dtype(label))
    keys = jax.random.split(jax.random.key(experiment.spec.samples.seed), samples)
    state = _begin(model, u0, keys)
    checkpoints = storage.Checkpoints(work / "checkpoints")
    done, blowups, seconds, compile_seconds = 0, [], 0.0, 0.0
    channels = start.shape[1]
    u = np.full((samples, frames + 1, *start.shape[1:]), np.nan, u0.dtype)
    ledger = np.zeros((samples, frames + 1, channels))
    u[:, 0] = np.asarray(u0)
    if resume:
        found = checkpoints.latest(state)
        if found is not None:
            done, state, meta = found
            blowups = [Blowup(**{**b, "cell": tuple(b["cell"])}) for b in meta["blowups"]]
            seconds, compile_seconds = meta["seconds"], meta["compile_seconds"]
            for first in range(0, done, per_chunk):
                piece = {"u": u[:, first + 1 : first + 1 + per_chunk], "ledger": ledger[:, first + 1 : first + 1 + per_chunk]}
                stored, _ = storage.load_tree(work / f"frames-{first:06d}.safetensors", piece)
                u[:, first + 1 : first + 1 + per_chunk] = stored["u"]
                ledger[:, first + 1 : first + 1 + per_chunk] = stored["ledger"]
    else:
        checkpoints.clear()
    result = Result(label, model, u, ledger, blowups, seconds, compile_seconds, done=done)
    gone = {b.sample for b in blowups}
    begin = time.perf_counter()
    prepared = _prepare(model, u0.dtype)
    compiled = _chunk.lower(model, prepared, state, per_chunk, every).compile()
    result.compile_seconds += time.perf_counter() - begin
    for first in range(done, frames, per_chunk):
        begin = time.perf_counter()
        new, (chunk, (high, low)) = jax.block_until_ready(compiled(model, prepared, state, per_chunk, every))
        result.seconds += time.perf_counter() - begin
        chunk = np.asarray(chunk)
        span = slice(first + 1, first + 1 + per_chunk)
        good = np.isfinite(chunk).reshape(samples, per_chunk, -1).all(axis=2)
        good = np.logical_and.accumulate(good, axis=1)
        for sample in range(samples):
            if sample in gone:
                continue
            if not good[sample].all():
                gone.add(sample)
                result.blowups.append(_locate(model, state, sample, per_chunk, every))
            u[sample, span][good[sample]] = chunk[sample][good[sample]]
            total = np.asarray(high[sample], np.float64) + np.asarray(low[sample], np.float64)
            ledger[sample, span] = np.where(np.isfinite(total), total, 0.0)
        state = gathered(new)
        storage.save_tree(work / f"frames-{first:06d}.safetensors", {"u": u[:, span], "ledger": ledger[:, span]})
        checkpoints.save(
            first + per_chunk,
            state,
            {
                "blowups": [vars(b) | {"cell": list(b.cell)} for b in result.blowups],
                "seconds": result.seconds,
                "compile_seconds": result.compile_seconds,
            },
        )
        result.done = first + per_chunk
        progress(result.done, frames)
        if STOP.requested is not None:
            interrupted(result)
            STOP.check()
        if len(gone) == samples:
            break
    result.steps_taken, result.smallest_dt = _steps_taken(model, state[1], frames * every)
    result.latency = _latency(model, _begin(model, u0[:1], keys[:1]), per_chunk, every)
    return result


def _steps_taken(model: Model, carry: Any, steps: int) -> tuple[float, float]:
    """(solver steps, smallest Δt) of a run; `steps` is how many model steps of fixed Δt there are."""
    if model.courant is None:
        return float(steps * model.substeps), model.dt
    return float(np.mean(np.asarray(carry["steps_taken"]))) * model.substeps, float(np.min(np.asarray(carry["smallest_dt"])))


def _latency(model: Model, state: Any, frames: int, every: int) -> float:
    """Seconds per unit time of one sample alone, after compilation, the least of a few rounds."""
    prepared = jax.block_until_ready(_prepare(model, state[1]["start"].dtype))
    compiled = _chunk.lower(model, prepared, state, frames, every).compile()
    best = math.inf
    for _ in range(TIMING_ROUNDS):
        begin = time.perf_counter()
        jax.block_until_ready(compiled(model, prepared, state, frames, every))
        best = min(best, time.perf_counter() - begin)
    return best / (frames * every * model.step_time)


def _reference_cost(experiment: "Experiment", dt: float) -> float:
    """Seconds per unit time of the reference solver for one sample, timed over a few steps of the smallest Δt that it took."""
    solver = experiment.reference_solver()
    dtype = np.dtype(experiment.spec.reference.precision)
    places = tuple(v.at for v in solver.variables)
    u = experiment.initial()(jax.random.key(0), solver.grid, places, dtype)
    model = Model(solver, experiment.stepper("reference", solver), dt)
    return _latency(model, _begin(model, u[None], jax.random.split(jax.random.key(0), 1)), 1, 10)


# --- what it is worth ------------------------------------------------------------------------------------------------------------


def _dataset(
    experiment: "Experiment", result: Result, reference: Frames, truth: "xr.Dataset", attrs: dict[str, Any]
) -> "xr.Dataset":
    """A run's file: its frames, what is measured on them, and how their values are distributed."""
    solver = result.model.solver
    grid, variables = solver.grid, solver.variables
    ds = diagnostics.field_dataset(result.u, reference.times, grid, variables, attrs)
    volume = grid.cells * grid.cell_volume
    sums = diagnostics.conserved_sums(result.u[:, :1], grid) + volume * result.ledger
    ds = diagnostics.with_diagnostics(
        ds,
        grid,
        variables,
        solver=solver,
        reference=truth,
        modes=experiment.modes,
        statistics_from=experiment.statistics_from,
        expected_sums=sums,
    )
    values = _compared_values(experiment, solver, result.u, reference.times)
    known = _compared_values(experiment, solver, reference.groups[group_name(experiment, result.label)], reference.times)
    distance = float(statistics.wasserstein(values, known, normalised=True))
    about = {"long_name": "Wasserstein distance to the reference, in its standard deviations", "units": "1"}
    return ds.assign({"pdf": _pdf(values, solver, truth["pdf"]), "wasserstein": ((), distance, about)})


def _compared_values(experiment: "Experiment", solver: AbstractSolver, u: np.ndarray, times: np.ndarray) -> np.ndarray:
    """u (1D) or the vorticity over the window of the statistics, `(sample, time, value)`; of large fields in every m-th cell."""
    grid, variables = solver.grid, solver.variables
    frames = u[:, times >= experiment.statistics_from * (1 - 1e-9)]
    count = frames.shape[0] * frames.shape[1] * grid.cells * (3 if grid.ndim == 3 else 1)
    every = -(-count // MOST_VALUES)

    def thinned(piece: np.ndarray) -> np.ndarray:
        w = diagnostics.compared_field(piece, grid, variables, solver)
        return w.reshape(len(w), -1)[:, ::every]

    return diagnostics.in_pieces(thinned, grid, frames)


def _pdf(values: np.ndarray, solver: AbstractSolver, like: "xr.DataArray | None" = None) -> "xr.DataArray":
    """The density of all values: in the bins of another one, or in bins of its own a quarter wider than what was found."""
    if like is not None:
        width = float(like["value"][1] - like["value"][0])
        low, high = float(like["value"][0]) - width / 2, float(like["value"][-1]) + width / 2
    else:
        low, high = float(values.min()), float(values.max())
        wider = 0.125 * (high - low) or 0.5
        low, high = low - wider, high + wider
    found = statistics.pdf(values, PDF_BINS, (low, high))
    name = "u" if solver.grid.ndim == 1 else "vorticity"
    found["value"].attrs["long_name"] = name
    outside = float(found["outside"])
    return found.drop_vars(["lower", "upper", "outside"]).assign_attrs(long_name=f"probability density of {name}", outside=outside)


def _finite_max(values: np.ndarray) -> float | None:
    good = values[np.isfinite(values)]
    return float(good.max()) if good.size else None


def _finite(value: Any) -> float | None:
    """A number that JSON can hold."""
    return float(value) if math.isfinite(value) else None


STATISTICS = ("mean_square", "mean_square_slope", "mean_square_curvature", "energy", "enstrophy", "energy_rate", "scalar_variance")


def _statistics(experiment: "Experiment", ds: "xr.Dataset", truth: "xr.Dataset") -> dict[str, dict[str, float | None]]:
    """Means over samples and the window of statistics, with their standard errors, beside those of the filtered reference.

    Errors are over samples where there are two or more, else over blocks; null where neither gives one. `difference` is relative to
    the reference.
    """
    window = ds["time"].values >= experiment.statistics_from * (1 - 1e-9)

    def mean_and_error(values: "xr.DataArray") -> tuple[float, float]:
        values = values.isel(time=window)
        try:
            error = statistics.standard_error(values, over="members" if values.sizes["sample"] > 1 else "blocks")
            return float(values.mean(skipna=False)), float(error["standard_error"])
        except ValueError:
            # one sample, and too short for blocks
            return float(values.mean(skipna=False)), math.nan

    found = {}
    for name in STATISTICS:
        if name not in ds:
            continue
        for part in ds["scalar"].values.tolist() if "scalar" in ds[name].dims else [None]:
            one, two = (d[name] if part is None else d[name].sel(scalar=part) for d in (ds, truth))
            (mean, error), (known, known_error) = mean_and_error(one), mean_and_error(two)
            difference = 0.0 if mean == known else (mean - known) / abs(known) if known else math.inf
            found[name if part is None else f"{name}:{part}"] = {
                "mean": _finite(mean),
                "standard_error": _finite(error),
                "reference": _finite(known),
                "reference_standard_error": _finite(known_error),
                "difference": _finite(difference),
            }
    return found


def _statistics_error(found: dict[str, dict[str, float | None]]) -> float | None:
    """The largest relative difference; that of dE/dt does not count, whose mean is the difference of two frames or nothing."""
    parts = [row["difference"] for name, row in found.items() if name != "energy_rate"]
    return max((abs(d) for d in parts if d is not None), default=None) if None not in parts else None


def _not_defined(ds: "xr.Dataset") -> dict[str, str]:
    """Why a key of the summary is null although the run is sound."""
    reasons = {
        "spectrum_error": ("spectrum", "there are no spectra between walls"),
        "drift": ("drift", "the boundaries exchange what could be conserved"),
        "divergence_max": ("divergence_max", "the flow need not be free of divergence"),
    }
    return {key: reason for key, (name, reason) in reasons.items() if name not in ds}


def _spectrum_error(solver: AbstractSolver, ds: "xr.Dataset", truth: "xr.Dataset") -> float | None:
    if "spectrum" not in ds:
        return None
    numbers = np.rint(ds["wavenumber"].values * max(solver.grid.lengths) / (2 * np.pi)).astype(int)
    # Spectra are averaged over samples as over time before they are compared; a diverged sample makes the mean NaN.
    mean_spectrum, mean_truth = (d["spectrum"].values.mean(axis=0) for d in (ds, truth))
    return _finite(diagnostics.spectrum_error(mean_spectrum, mean_truth, numbers, solver.grid.shape, solver.grid.lengths))


def _summarise(experiment: "Experiment", result: Result, ds: "xr.Dataset", truth: "xr.Dataset") -> dict[str, Any]:
    """A run's entry in summary.json; what does not apply to it is null, and `not_defined` says why."""
    model, solver = result.model, result.model.solver
    times = ds["time"].values
    t95 = diagnostics.t_correlated(times, ds["correlation"].values, 0.95)
    t80 = diagnostics.t_correlated(times, ds["correlation"].values, 0.80)
    end = experiment.spec.time.end
    simulated = len(result.u) * end
    means = _statistics(experiment, ds, truth)
    drifts = {str(name): ds["drift"].sel(variable=name).values for name in ds["variable"].values} if "drift" in ds else {}
    return {
        "outcome": result.outcome,
        "accuracy": {"metric": "t95", "value": t95.time if t95.time is not None else t95.at_least},
        "t95": t95.time,
        "t95_at_least": t95.at_least,
        "t95_interval": [t95.low, t95.high],
        "t80": t80.time,
        "t80_at_least": t80.at_least,
        "spectrum_error": _spectrum_error(solver, ds, truth),
        "statistics": means,
        "statistics_error": _statistics_error(means),
        "wasserstein": _finite(float(ds["wasserstein"])),
        "drift": {name: _finite_max(values) for name, values in drifts.items()},
        "divergence_max": _finite_max(ds["divergence_max"].values) if "divergence_max" in ds else None,
        "not_defined": _not_defined(ds),
        "seconds_per_unit_time": result.latency,
        "seconds_per_unit_time_throughput": result.seconds / simulated if simulated else None,
        "cell_steps_per_second": solver.grid.cells * result.steps_taken / (result.latency * end),
        "compile_seconds": result.compile_seconds,
        "parameters": parameters(model.closures),
        "steps": round(result.steps_taken),
        "dt": result.smallest_dt,
        "group": group_name(experiment, result.label),
    }


LARGER_IS_BETTER = ("t95", "t80")


def evaluate_checks(experiment: "Experiment", runs: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """Every limit of `checks`, against the summary's own keys; a run is judged on those that name it or `all`.

    A run that diverged and may do so is not judged on `all`. A limit on something that a run does not have is not met.
    """
    rows = []
    for owner, limits in experiment.spec.checks.items():
        for label in runs if owner == "all" else [owner]:
            summary = runs[label]
            if owner == "all" and summary["outcome"] != "finished" and experiment.spec.runs[label].may_diverge:
                continue
            for name, limit in limits.model_dump(exclude_none=True).items():
                value = summary[name]
                if name in LARGER_IS_BETTER and value is None:
                    value = summary[f"{name}_at_least"]
                if isinstance(value, dict):
                    parts = [v for v in value.values() if v is not None]
                    value = max(parts) if parts else None
                reached = value is not None and (value >= limit if name in LARGER_IS_BETTER else value <= limit)
                relation = "at least" if name in LARGER_IS_BETTER else "at most"
                reason = summary.get("not_defined", {}).get(name)
                shown = "not finite" if value is None else f"{value:.3g}"
                sentence = f"{label}: {name} = {shown} {'is' if reached else 'is not'} {relation} {limit:g}"
                if reason:
                    sentence = f"{label}: {name} has no value ({reason}), so it cannot be {relation} {limit:g}"
                rows.append(
                    {
                        "name": name,
                        "run": label,
                        "value": value,
                        "limit": limit,
                        "passed": bool(reached),
                        "sentence": sentence,
                    }
                )
    return rows


# --- the whole experiment --------------------------------------------------------------------------------------------------------


def _model(experiment: "Experiment", label: str, start: np.ndarray) -> Model:
    """The run's model, with Δt from the starts where a Courant number was asked for."""
    cfl = experiment.cfl(label)
    if cfl is None:
        return experiment.model_for(label)
    interval = experiment.spec.time.end / experiment.spec.time.frames
    if experiment.adaptive(label):
        spec = experiment.spec_of(label)
        largest = min(interval / getattr(spec, "substeps", 1), math.inf if spec.dt is None else spec.dt)
        return experiment.model_for(label, dt=experiment.steps_per_frame(label, largest).dt)
    solver = experiment.solver(label)
    limit = float(jnp.min(jax.vmap(solver.stable_dt)(jnp.asarray(start))))
    return experiment.model_for(label, dt=experiment.steps_per_frame(label, min(cfl * limit, interval)).dt)


def _attributes(experiment: "Experiment", label: str, environment: dict[str, Any]) -> dict[str, Any]:
    spec = experiment.spec_of(label)
    return {
        "label": label,
        "title": getattr(spec, "title", None) or label,
        "solver": spec.solver.use,
        "grid": " × ".join(map(str, spec.shape)),
        "precision": spec.precision,
        "config_hash": experiment.config_hash,
        "seed": experiment.spec.samples.seed,
        "version": environment["hybridsim"],
        "commit": environment.get("commit") or "",
    }


def _reference_groups(
    experiment: "Experiment", reference: Frames, results_grid: dict[str, AbstractSolver]
) -> dict[str, "xr.Dataset"]:
    """The groups of reference.nc: one per filter and grid, `fine` pictures, and the evidence of convergence."""
    import xarray as xr

    groups: dict[str, xr.Dataset] = {}
    for name, solver in results_grid.items():
        grid, variables = solver.grid, solver.variables
        ds = diagnostics.field_dataset(reference.groups[name], reference.times, grid, variables, {"filter": name})
        ds = diagnostics.with_diagnostics(ds, grid, variables, solver=solver, statistics_from=experiment.statistics_from)
        groups[name] = ds.assign(
            {"pdf": _pdf(_compared_values(experiment, solver, reference.groups[name], reference.times), solver)}
        )
    fine = experiment.reference_solver()
    if len(reference.pictures):
        ds = diagnostics.field_dataset(
            reference.pictures[None], reference.picture_times, fine.grid, fine.variables, {"filter": "none"}
        )
        groups["fine"] = diagnostics.with_vorticity(ds, fine.grid, fine.variables, fine)
    if HALF in reference.groups:
        first, solver = next(iter(results_grid.items()))
        rho = diagnostics.correlation(
            reference.groups[HALF], reference.groups[first], solver.grid, solver.variables, experiment.modes, solver
        )
        until, at_least = diagnostics.crossing_time(reference.times, rho.mean(axis=0), 0.99)
        half_shape = [n // 2 for n in fine.grid.shape]
        groups["convergence"] = xr.Dataset(
            {"correlation": (("sample", "time"), rho, {"units": "1", "long_name": "correlation of the half-resolution run"})},
            coords={"time": ("time", reference.times)},
            attrs={
                "converged_until": float(until if until is not None else at_least),  # pyright: ignore[reportArgumentType]
                "shape": list(fine.grid.shape),
                "half_shape": half_shape,
                "dt": reference.dt,
            },
        )
    return groups


def run_experiment(experiment: "Experiment", folder: Path, resume: bool, console: "Console") -> int:
    """Everything that `hybridsim run` does; returns the exit code."""
    with storage.FolderLock(folder), Reporter(console, folder / "log.txt") as say:
        try:
            return _run_locked(experiment, folder, resume, say)
        except FineRunError as error:
            say.line(f"{error}; lower reference.cfl or refine reference.shape")
            return 3


def _prepare_folder(experiment: "Experiment", folder: Path, resume: bool) -> None:
    """Refuses to mix two configurations; clears what an earlier run left unless it is resumed."""
    import shutil

    import yaml

    marker = folder / "state" / "config_hash.json"
    if resume and marker.exists():
        found = storage.read_json(marker)
        if found != experiment.config_hash:
            raise storage.StorageError(
                f"{folder}: holds the state of another configuration ({str(found)[:12]}, this one is "
                f"{experiment.config_hash[:12]}); resume with the same YAML, or run without --resume into another --out"
            )
    elif (folder / "state").exists():
        shutil.rmtree(folder / "state")
    (folder / "state").mkdir(exist_ok=True)
    storage.write_json(marker, experiment.config_hash)
    text = yaml.safe_dump(experiment.resolved, sort_keys=False, allow_unicode=True)
    storage.atomic_write(folder / "config.yaml", text)


def _training_history(experiment: "Experiment") -> dict[str, list[dict[str, Any]]]:
    """The loss curves that stand beside the weights that the runs use: label and seed -> records."""
    found: dict[str, list[dict[str, Any]]] = {}
    for label in experiment.labels:
        for i, correction in enumerate(experiment.spec.runs[label].corrections):
            if correction.weights is None:
                continue
            card_file = experiment.weights_file(correction, ("runs", label, "corrections", i)).with_suffix(".json")
            if card_file.exists():
                card = storage.read_json(card_file)
                seed = f"seed {card.get('chosen_seed')}"
                history = card.get("history", {}).get(seed)
                if history:
                    found[f"{label}, {seed}"] = history
    return found


def _run_locked(experiment: "Experiment", folder: Path, resume: bool, say: Reporter) -> int:
    import datetime
    import shutil

    _prepare_folder(experiment, folder, resume)
    environment = storage.environment()
    say.line(f"{experiment.title} ({experiment.name}), {len(experiment.labels)} runs → {folder}")

    def reference_progress(what: str, fraction: float) -> None:
        say.progress(what, fraction)
        STOP.check()

    reference = make_reference(experiment, reference_progress)
    solvers = {group_name(experiment, label): experiment.solver(label) for label in experiment.labels}
    groups = _reference_groups(experiment, reference, solvers)
    storage.save_groups(folder / "reference.nc", groups)
    converged = groups["convergence"].attrs["converged_until"] if "convergence" in groups else None
    shape = " × ".join(map(str, experiment.spec.reference.shape))
    origin = "from the cache" if reference.cached else f"made in {reference.seconds:.0f} s"
    say.line(
        f"reference {shape} {experiment.spec.reference.precision}, {origin}"
        + (f"; half the resolution agrees (ρ ≥ .99) {_until(converged, experiment.spec.time.end)}" if converged is not None else "")
    )

    summaries: dict[str, dict[str, Any]] = {}
    for label in experiment.labels:
        group = group_name(experiment, label)
        start = reference.groups[group][:, 0]
        model = _model(experiment, label, start)
        attrs = {**_attributes(experiment, label, environment), "dt": model.dt, "reference_group": group}

        def write(result: Result, attrs=attrs, label=label, truth=groups[group]) -> "xr.Dataset":
            ds = _dataset(experiment, result, reference, truth, {**attrs, "outcome": result.outcome})
            storage.save_dataset(folder / f"{label}.nc", ds)
            return ds

        work = folder / "state" / label
        work.mkdir(parents=True, exist_ok=True)
        result = _run_one(
            experiment, label, model, start, work, resume, lambda i, n, label=label: say.progress(label, i / n), write
        )
        ds = write(result)
        summaries[label] = _summarise(experiment, result, ds, groups[group])
        say.line(_sentence(label, summaries[label]))

    rows = evaluate_checks(experiment, summaries)
    device = jax.devices()[0]
    summary = {
        "name": experiment.name,
        "title": experiment.title,
        "device": environment.get("device", device.device_kind),
        "precision": {label: experiment.dtype(label) for label in experiment.labels},
        "versions": environment,
        "config_hash": experiment.config_hash,
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "modes": experiment.modes,
        "samples": experiment.spec.samples.count,
        "reference": {
            "shape": list(experiment.spec.reference.shape),
            "precision": experiment.spec.reference.precision,
            "converged_until": converged,
            "dt": reference.dt,
            "seconds": reference.seconds,
            "seconds_per_unit_time": _reference_cost(experiment, reference.dt),
            "cached": reference.cached,
        },
        "runs": summaries,
        "checks": rows,
    }
    storage.write_json(folder / "summary.json", summary)
    if not (folder / "training").exists() and (history := _training_history(experiment)):
        storage.write_json(folder / "training.json", history)
    from hybridsim.report import write_report

    page = write_report(folder)
    shutil.rmtree(folder / "state")
    for row in rows:
        say.line(("✓ " if row["passed"] else "✗ ") + row["sentence"])
    say.line(f"report: {page}")
    blown = [
        label
        for label in experiment.labels
        if summaries[label]["outcome"] != "finished" and not experiment.spec.runs[label].may_diverge
    ]
    if blown:
        say.line(f"diverged without may_diverge: {', '.join(blown)}")
        return 3
    return 0 if all(row["passed"] for row in rows) else 1


def _until(t: float, end: float) -> str:
    return f"to the end (t ≥ {t:.3g})" if t >= end else f"until t = {t:.3g}"


def _sentence(label: str, summary: dict[str, Any]) -> str:
    parts = [f"t95 {summary['t95']:.2f}" if summary["t95"] is not None else f"t95 > {summary['t95_at_least']:.2f}"]
    for key in ("spectrum_error", "statistics_error"):
        if key not in summary["not_defined"]:
            parts.append(f"{key.replace('_', ' ')} " + ("–" if summary[key] is None else f"{summary[key]:.3f}"))
    parts.append(f"{1000 * summary['seconds_per_unit_time']:.3g} ms per unit time")
    return f"{label}: {', '.join(parts)}, {summary['outcome']}"
