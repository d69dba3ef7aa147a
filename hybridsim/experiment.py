"""`hybridsim run`: the reference, the runs side by side, what they are worth, and the files that say so.

The outer loop is on the host, in chunks of a fixed number of frames that no clock sets. Progress, output, checkpoints, the check
for non-finite values and signals act between chunks; nothing of them is inside the compiled step.
"""

import math
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from hybridsim import blowups, diagnostics, gas, resuming, statistics, storage
from hybridsim.blowups import Blowup
from hybridsim.compilation import SolverJit, written_anew
from hybridsim.contract import AbstractSolver
from hybridsim.estimates import check_need, duration, need_of
from hybridsim.grid import Grid
from hybridsim.journal import SAVE_EVERY, Journal
from hybridsim.model import Model, Prepared, frames_of
from hybridsim.progress import Reporter
from hybridsim.reference import COURANT, FineRunError, Frames, cached_starts, initial_state, make_frames, sample_keys, warm_starts
from hybridsim.samples import gathered, over_samples
from hybridsim.signals import STOP
from hybridsim.train import parameters
from hybridsim.turns import Program, held_by, in_turn
from hybridsim.yaml_reader import ConfigError

if TYPE_CHECKING:
    import xarray as xr
    from rich.console import Console

    from hybridsim.config import Experiment

HALF = "half resolution"
PICTURES = 6
PDF_BINS = 100
MOST_VALUES = 2**22
FEWEST_ROUNDS, MOST_ROUNDS, TIMING_SECONDS = 3, 9, 30.0
"""How often runs are timed: most rounds, but only the fewest once they have taken so long."""
LONG = 60.0
"""Seconds from which on a run says how long it will take."""


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
    option = experiment.solver(label).filter_option
    return f"{own}{plain}_{option}{'_' if option else ''}{'x'.join(map(str, spec.shape))}"


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


def fine_starts(experiment: "Experiment", progress: Callable[[float], None] = lambda _: None) -> jax.Array:
    """The reference's states at t = 0, `(sample, c, *fine)`, from the cache if they were made before."""
    spec = experiment.spec.reference
    template, dtype = experiment.reference_solver(), np.dtype(spec.precision)

    def make(journals: Callable[[str], Journal]) -> jax.Array:
        return warm_starts(
            lambda grid: experiment.solver_for(spec.solver, grid.shape),
            experiment.stepper("reference"),
            experiment.initial(),
            sample_keys(experiment.spec.samples.seed, experiment.spec.samples.count),
            template.grid,
            dtype,
            progress,
            journals,
        )

    return cached_starts(start_recipe(experiment), make, dtype)


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


@SolverJit
def _chunk(model: Model, prepared: Prepared, state: Any, frames: int, every: int) -> tuple[Any, Any]:
    """`frames` frames of every sample."""

    def one(shared, z, carry):
        model, prepared, step = shared
        (z, carry, _), out = frames_of(model, prepared, z, carry, step, frames, every, 0, _observe)
        return z, carry, out

    # All samples are at the same step: one clock for those that are stepped together.
    z, carry, step = state
    z = written_anew(z, step[0])
    z, carry, out = over_samples(one, (model, prepared, step[0]), z, carry, together=model.together)
    return (z, carry, step + frames * every), out


def _chunk_length(frames: int) -> int:
    """Frames per chunk: the largest divisor of `frames` up to ten."""
    return max(n for n in range(1, min(10, frames) + 1) if frames % n == 0)


def _run_one(
    experiment: "Experiment",
    label: str,
    model: Model,
    start: np.ndarray,
    work: Path,
    resume: bool,
    progress: Callable[[int, int], None],
    write: Callable[[Result], Any],
    tell: Callable[[str], None] = lambda _: None,
    save_every: float = SAVE_EVERY,
) -> Result:
    """All frames of one run, from its last checkpoint if there is one; `write` puts what is finished into the run's file."""
    frames, every = experiment.spec.time.frames, experiment.steps_per_frame(label, model.dt).steps
    per_chunk = _chunk_length(frames)
    samples = len(start)
    u0 = jnp.asarray(start, experiment.dtype(label))
    keys = jax.random.split(jax.random.key(experiment.spec.samples.seed), samples)
    state = _begin(model, u0, keys)
    journal = Journal(work, save_every, about=provenance(experiment, label))
    done, diverged, seconds, compile_seconds = 0, [], 0.0, 0.0
    u = np.full((samples, frames + 1, *start.shape[1:]), np.nan, u0.dtype)
    ledger = np.zeros((samples, frames + 1, len(model.solver.ledger_rows)))
    u[:, 0] = np.asarray(u0)
    if resume:
        found = journal.latest(state)
        if found is not None:
            done, state, meta = found
            diverged = [Blowup.from_json(b) for b in meta["blowups"]]
            seconds, compile_seconds = meta["seconds"], meta["compile_seconds"]
            u[:, 1 : done + 1] = np.concatenate([piece["u"] for piece in journal.pieces], axis=1)
            ledger[:, 1 : done + 1] = np.concatenate([piece["ledger"] for piece in journal.pieces], axis=1)
    else:
        journal.clear()
    result = Result(label, model, u, ledger, diverged, seconds, compile_seconds, done=done)
    gone = {b.sample for b in diverged}

    def save() -> None:
        notes = {"seconds": result.seconds, "compile_seconds": result.compile_seconds}
        journal.save(result.done, state, {**notes, "blowups": [b.as_json() for b in result.blowups]})

    if len(gone) < samples and done < frames:
        begin = time.perf_counter()
        prepared = _prepare(model, u0.dtype)
        compiled = _chunk.lower(model, prepared, state, per_chunk, every).compile()
        result.compile_seconds += time.perf_counter() - begin
        for first in range(done, frames, per_chunk):
            begin = time.perf_counter()
            new, (chunk, (high, low)) = jax.block_until_ready(compiled(model, prepared, state, per_chunk, every))
            took = time.perf_counter() - begin
            result.seconds += took
            if first == done and (left := took * (frames - done - per_chunk) / per_chunk) > LONG:
                tell(f"{label}: about {duration(left)} to go")
            chunk = np.asarray(chunk)
            span = slice(first + 1, first + 1 + per_chunk)
            good = np.isfinite(chunk).reshape(samples, per_chunk, -1).all(axis=2)
            good = np.logical_and.accumulate(good, axis=1)
            lost = [
                blowups.locate(model, state, i, per_chunk, every) for i in range(samples) if i not in gone and not good[i].all()
            ]
            if lost:
                blowups.keep(work, min(lost, key=lambda found: found.blowup.t))
                result.blowups += [found.blowup for found in lost]
            for sample in range(samples):
                if sample in gone:
                    continue
                u[sample, span][good[sample]] = chunk[sample][good[sample]]
                total = np.asarray(high[sample], np.float64) + np.asarray(low[sample], np.float64)
                ledger[sample, span] = np.where(np.isfinite(total), total, 0.0)
            state = gathered(new)
            journal.add({"u": u[:, span], "ledger": ledger[:, span]})
            result.done = first + per_chunk
            gone |= {found.blowup.sample for found in lost}
            progress(result.done, frames)
            # asked once: a signal that comes later finds the state saved by the next chunk
            asked, stopping = STOP.asked_to_save(), STOP.requested is not None
            if result.done == frames or len(gone) == samples or stopping or asked or journal.has_waited():
                save()
            if asked or stopping:
                write(result)
            if stopping:
                STOP.check()
            if len(gone) == samples:
                break
    result.steps_taken, result.smallest_dt = _steps_taken(model, state[1], frames * every)
    return result


def stretch(model: Model, u: jax.Array, keys: jax.Array, every: int, frames: int) -> Iterator[np.ndarray]:
    """The states of all samples after `every`, 2 `every`, … model steps: a run without files, for trials."""
    state, prepared = _begin(model, u, keys), _prepare(model, u.dtype)
    per_chunk = _chunk_length(frames)
    for _ in range(0, frames, per_chunk):
        new, (chunk, _) = _chunk(model, prepared, state, per_chunk, every)
        state = gathered(new)
        yield from np.moveaxis(np.asarray(chunk), 1, 0)


def _steps_taken(model: Model, carry: Any, steps: int) -> tuple[float, float]:
    """(solver steps, smallest Δt) of a run; `steps` is how many model steps of fixed Δt there are."""
    if model.courant is None:
        return float(steps * model.substeps), model.dt
    return float(np.mean(np.asarray(carry["steps_taken"]))) * model.substeps, float(np.min(np.asarray(carry["smallest_dt"])))


def _program(model: Model, state: Any, frames: int, every: int) -> Program:
    prepared = jax.block_until_ready(_prepare(model, state[1]["start"].dtype))
    arguments = (model, prepared, state, frames, every)
    compiled = _chunk.lower(*arguments).compile()
    return Program(compiled, arguments, frames * every * model.step_time, held_by(compiled))


def compiled_run(experiment: "Experiment", label: str, starts: np.ndarray, *, alone: bool = True) -> Program:
    """The program of a run from the first of its `starts`, or from all, over as many frames as `hybridsim run` computes at once.

    A Courant number is taken of all of them, as there.
    """
    model = model_from(experiment, label, starts)
    frames = experiment.spec.time.frames
    every = experiment.steps_per_frame(label, model.dt).steps
    keys = jax.random.split(jax.random.key(experiment.spec.samples.seed), len(starts))
    taken = 1 if alone else len(starts)
    state = _begin(model, jnp.asarray(starts[:taken], experiment.dtype(label)), keys[:taken])
    return _program(model, state, _chunk_length(frames), every)


def _add_costs(
    experiment: "Experiment", summaries: dict[str, dict[str, Any]], starts: Mapping[str, np.ndarray], say: Reporter
) -> None:
    """What each run costs, one start alone: the least of some rounds in which all runs took turns."""

    def tell(part: float) -> None:
        say.progress("timing, all runs in turn", part)
        STOP.check()

    programs = {label: compiled_run(experiment, label, starts[label]) for label in summaries}
    found = in_turn(programs, MOST_ROUNDS, tell, fewest=FEWEST_ROUNDS, seconds=TIMING_SECONDS)
    for label, summary in summaries.items():
        cost = float(found[label].min())
        steps = summary["steps"] / experiment.spec.time.end
        summary["seconds_per_unit_time"] = cost
        summary["cell_steps_per_second"] = experiment.solver(label).grid.cells * steps / cost
    say.line("ms per unit time: " + ", ".join(f"{label} {1e3 * s['seconds_per_unit_time']:.3g}" for label, s in summaries.items()))


def _reference_cost(experiment: "Experiment", dt: float) -> float:
    """Seconds per unit time of the reference solver for one sample, timed over a few steps of the smallest Δt that it took."""
    solver = experiment.reference_solver()
    dtype = np.dtype(experiment.spec.reference.precision)
    u = initial_state(experiment.initial(), jax.random.key(0), solver, dtype)
    return cost_of(Model(solver, experiment.stepper("reference", solver), dt), u)


def cost_of(model: Model, u: jax.Array) -> float:
    """Seconds per unit time of a model from one start u, after compilation: the least of a few rounds of ten steps."""
    program = _program(model, _begin(model, u[None], jax.random.split(jax.random.key(0), 1)), 1, 10)
    return float(in_turn({"": program}, FEWEST_ROUNDS)[""].min())


# --- what it is worth ------------------------------------------------------------------------------------------------------------


def diagnosed(
    experiment: "Experiment", result: Result, reference: Frames, truth: "xr.Dataset", attrs: dict[str, Any]
) -> "xr.Dataset":
    """A run's frames, and what is measured on them."""
    solver = result.model.solver
    grid, variables = solver.grid, solver.variables
    frames = reference.groups[group_name(experiment, result.label)]
    ds = diagnostics.field_dataset(result.u, reference.times, grid, variables, attrs)
    volume = grid.cells * grid.cell_volume
    how = {
        "modes": experiment.modes,
        "statistics_from": experiment.statistics_from,
        "expected_sums": diagnostics.conserved_sums(result.u[:, :1], grid) + volume * result.ledger[..., : len(variables)],
    }
    medium = gas.gas_of(solver)
    if medium is None:
        ds = diagnostics.with_diagnostics(ds, grid, variables, solver=solver, reference=truth, **how)
    else:
        rows = dict(zip(solver.ledger_rows, np.moveaxis(result.ledger, -1, 0), strict=True))
        ledger = {"energy_added": rows["energy"]} | {name: rows[name] for name in solver.ledger_rows[len(variables) :]}
        bins = truth["temperature"].values if "temperature" in truth else None
        ds = gas.with_diagnostics(
            ds, result.u, grid, variables, medium, conserved=solver.conserved, reference=frames, ledger=ledger, bins=bins, **how
        )
        ds["error"].attrs["at"] = stated_time(experiment)
    return ds


def _dataset(
    experiment: "Experiment", result: Result, reference: Frames, truth: "xr.Dataset", attrs: dict[str, Any]
) -> "xr.Dataset":
    """A run's file: its frames, what is measured on them, and how their values are distributed."""
    ds = diagnosed(experiment, result, reference, truth, attrs)
    solver, frames = result.model.solver, reference.groups[group_name(experiment, result.label)]
    values = _compared_values(experiment, solver, result.u, reference.times)
    known = _compared_values(experiment, solver, frames, reference.times)
    distance = float(statistics.wasserstein(values, known, normalised=True))
    about = {"long_name": "Wasserstein distance to the reference, in its standard deviations", "units": "1"}
    return ds.assign({"pdf": _pdf(values, solver, truth["pdf"]), "wasserstein": ((), distance, about)})


def accuracy_metric(solver: AbstractSolver, truth: "xr.Dataset") -> str:
    """The key of the summary by which a family's runs are compared: t95, of a gas `error`, where it cools `temperature_error`."""
    if gas.gas_of(solver) is None:
        return "t95"
    return "temperature_error" if "mass_per_temperature" in truth else "error"


def stated_time(experiment: "Experiment") -> float:
    """When errors are quoted: compare.at, or the end."""
    given = experiment.spec.compare.at
    return experiment.spec.time.end if given is None else given


def _compared_values(experiment: "Experiment", solver: AbstractSolver, u: np.ndarray, times: np.ndarray) -> np.ndarray:
    """u (1D), the vorticity, or ln ρ/⟨ρ⟩ of a gas over the window of the statistics, `(sample, time, value)`.

    Of large fields in every m-th cell.
    """
    grid, variables = solver.grid, solver.variables
    frames = u[:, times >= experiment.statistics_from * (1 - 1e-9)]
    of_gas = diagnostics.is_gas(variables)
    count = frames.shape[0] * frames.shape[1] * grid.cells * (3 if grid.ndim == 3 and not of_gas else 1)
    every = -(-count // MOST_VALUES)

    def thinned(piece: np.ndarray) -> np.ndarray:
        w = gas.log_density(piece, grid) if of_gas else diagnostics.compared_field(piece, grid, variables, solver)
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
    name = "ln ρ/⟨ρ⟩" if diagnostics.is_gas(solver.variables) else name
    found["value"].attrs["long_name"] = name
    outside = float(found["outside"])
    return found.drop_vars(["lower", "upper", "outside"]).assign_attrs(long_name=f"probability density of {name}", outside=outside)


def _finite_max(values: np.ndarray) -> float | None:
    good = values[np.isfinite(values)]
    return float(good.max()) if good.size else None


def _finite(value: Any) -> float | None:
    """A number that JSON can hold."""
    return float(value) if math.isfinite(value) else None


STATISTICS = (
    "mean_square",
    "mean_square_slope",
    "mean_square_curvature",
    "energy",
    "mach",
    "density_rms",
    "kinetic_energy",
    "internal_energy",
    "dilatation",
    "enstrophy",
    "energy_rate",
    "emission",
    "scalar_variance",
)


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
        # `energy` is a channel of a gas
        if name not in ds or not set(ds[name].dims) <= {"sample", "time", "scalar"}:
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
        "spectrum_error_common": ("spectrum", "there are no spectra between walls"),
        "spectrum_worst": ("spectrum", "there are no spectra between walls"),
        "drift": ("drift", "the boundaries exchange what could be conserved"),
        "divergence_max": ("divergence_max", "the flow need not be free of divergence"),
    }
    if "error" in ds:
        reasons["temperature_error"] = ("mass_per_temperature", "nothing radiates")
        for key in ("spectrum_error", "spectrum_error_common", "spectrum_worst"):
            reasons[key] = ("spectrum", "there are no spectra without a periodic axis")
    return {key: reason for key, (name, reason) in reasons.items() if name not in ds}


FEWEST_FRAMES = 100
"""In the window of the statistics, for a tenth of them to tell whether a flow is still chaotic."""


def _frozen(experiment: "Experiment", ds: "xr.Dataset", truth: "xr.Dataset") -> int | None:
    """Samples that are steady or travelling waves in the end; None of a gas and of short runs."""
    window = ds["time"].values >= experiment.statistics_from * (1 - 1e-9)
    name = next((q for q in ("mean_square", "energy") if q in ds and set(ds[q].dims) == {"sample", "time"}), None)
    if name is None or "error" in ds or window.sum() < FEWEST_FRAMES:
        return None
    ours, theirs = (d[name].transpose("sample", "time").values[:, window] for d in (ds, truth))
    return diagnostics.frozen(ours, theirs)


def _spectral_grid(solver: AbstractSolver) -> Grid:
    """The grid that a run's spectra are taken on; those of a gas between sides run along its periodic axes."""
    return gas.spectral_grid(solver.grid) or solver.grid


def coarsest_grid(experiment: "Experiment") -> Grid:
    """Of the grids of all runs, the one whose shells end first."""
    grids = (_spectral_grid(experiment.solver(label)) for label in experiment.labels)
    return min(grids, key=lambda grid: min(n / length for n, length in zip(grid.shape, grid.lengths, strict=True)))


def _spectrum_error(grid: Grid, ds: "xr.Dataset", truth: "xr.Dataset", worst: bool = False) -> float | None:
    """On the shells of `grid`, which the run's own grid must hold."""
    if "spectrum" not in ds:
        return None
    numbers = np.rint(ds["wavenumber"].values * max(grid.lengths) / (2 * np.pi)).astype(int)
    # Spectra are averaged over samples as over time before they are compared; a diverged sample makes the mean NaN.
    mean_spectrum, mean_truth = (d["spectrum"].values.mean(axis=0) for d in (ds, truth))
    return _finite(diagnostics.spectrum_error(mean_spectrum, mean_truth, numbers, grid.shape, grid.lengths, worst))  # pyright: ignore[reportArgumentType]


def _at_time(values: "xr.DataArray", t: float) -> np.ndarray:
    """Values over `time` at t, linear between frames: the other dimensions remain."""
    times = values["time"].values
    values = values.transpose(..., "time")
    i = int(np.clip(np.searchsorted(times, t * (1 - 1e-9)), 1, times.size - 1))
    part = np.clip((t - times[i - 1]) / (times[i] - times[i - 1]), 0.0, 1.0)
    if part > 1 - 1e-6:
        return np.asarray(values[..., i])
    return np.asarray((1 - part) * values[..., i - 1] + part * values[..., i])


def _errors_at(values: "xr.DataArray", t: float) -> dict[str, np.ndarray]:
    """Field: relative error of every sample at t."""
    at = _at_time(values.transpose("field", "sample", "time"), t)
    return {str(name): row for name, row in zip(values["field"].values, at, strict=True)}


def _mean_and_interval(
    values: np.ndarray, *, confidence: float = 0.9, resamples: int = 1000
) -> tuple[float | None, list[float | None]]:
    """The mean over samples and its bootstrap interval; one sample has no spread, its interval is the value itself."""
    draws = np.random.default_rng(0).integers(values.size, size=(resamples, values.size))
    low, high = np.quantile(values[draws].mean(axis=1), [(1 - confidence) / 2, (1 + confidence) / 2])
    return _finite(values.mean()), [_finite(low), _finite(high)]


def _gas_summary(experiment: "Experiment", ds: "xr.Dataset", truth: "xr.Dataset") -> dict[str, Any]:
    """What the summary says of a gas beside what it says of every flow.

    `error` is the mean over samples of the larger of the errors of ρ and √ρ v at the stated time. What floors stood for is relative
    to what the box held at the start, and the largest over samples; events are counted over all of them.
    """
    t = stated_time(experiment)
    errors = _errors_at(ds["error"], t)
    error, interval = _mean_and_interval(gas.error_of(errors))
    found: dict[str, Any] = {"accuracy": {"value": error, "at": t}, "error": error}
    found |= {"error_interval": interval, "error_at": t}
    found |= {f"{name}_error": _finite(values.mean()) for name, values in errors.items()}
    found["temperature_error"] = None
    if "mass_per_temperature" in ds:
        mass, known = (d["mass_per_temperature"].mean("sample", skipna=False).values for d in (ds, truth))
        found["temperature_error"] = _finite(gas.phase_distance(mass, known))
        window = [float(x) for x in ds["mass_per_temperature"].attrs["window"]]
        found["accuracy"] = {"value": found["temperature_error"], "window": window}

    def count(name: str) -> int | None:
        return int(ds[name].max("time").sum()) if name in ds else None

    def share(name: str, whole: "xr.DataArray") -> float | None:
        return _finite_max((ds[name].max("time") / whole).values) if name in ds else None

    density, energy = (ds[name].isel(time=0) for name in ("density", "total_energy"))
    mass = density.astype(np.float64).mean([d for d in density.dims if d != "sample"])
    found["floors"] = {"events": 0, "mass": 0.0, "energy": 0.0}  # what a solver without floors has
    if "floor_events" in ds:
        stood = {"mass": share("floor_mass", mass), "energy": share("floor_energy", energy)}
        found["floors"] = {"events": count("floor_events"), **stood}
    found |= {name: count(name) for name in ("limited_faces", "bound_violations")}
    total, added = ds["total_energy"], ds["energy_added"]
    radiated = ds["radiated"] if "radiated" in ds else 0 * added
    residual = _finite_max(np.abs((total - total.isel(time=0) - added).values))
    ends = {
        "start": total.isel(time=0),
        "end": total.isel(time=-1),
        "radiated": radiated.isel(time=-1),
        "added": (added + radiated).isel(time=-1),
    }
    lost = not np.isfinite(total.values).all()
    budget = {name: None if lost and name != "start" else _finite(float(values.mean())) for name, values in ends.items()}
    found["energy_budget"] = budget | {"residual": residual}
    return found


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
    of_gas = _gas_summary(experiment, ds, truth) if "error" in ds else {}
    accuracy = of_gas.pop("accuracy", {"value": t95.time if t95.time is not None else t95.at_least})
    still = _frozen(experiment, ds, truth)
    quoted: dict[str, Any] = {}
    if "velocity_error" in ds and experiment.spec.compare.at is not None:
        at = stated_time(experiment)
        error, interval = _mean_and_interval(_at_time(ds["velocity_error"], at))
        quoted = {"velocity_error": error, "velocity_error_interval": interval, "error_at": at}
    return {
        "outcome": result.outcome,
        "accuracy": {"metric": accuracy_metric(solver, truth), **accuracy},
        "t95": t95.time,
        "t95_at_least": t95.at_least,
        "t95_interval": [t95.low, t95.high],
        "t80": t80.time,
        "t80_at_least": t80.at_least,
        **quoted,
        "spectrum_error": _spectrum_error(_spectral_grid(solver), ds, truth),
        "spectrum_error_common": _spectrum_error(coarsest_grid(experiment), ds, truth),
        "spectrum_worst": _spectrum_error(_spectral_grid(solver), ds, truth, worst=True),
        "statistics": means,
        "statistics_error": _statistics_error(means),
        "wasserstein": _finite(float(ds["wasserstein"])),
        **({} if still is None else {"frozen": still}),
        "drift": {name: _finite_max(values) for name, values in drifts.items()},
        "divergence_max": _finite_max(ds["divergence_max"].values) if "divergence_max" in ds else None,
        "not_defined": _not_defined(ds),
        "seconds_per_unit_time": None,
        "seconds_per_unit_time_throughput": result.seconds / simulated if simulated else None,
        "cell_steps_per_second": None,
        "compile_seconds": result.compile_seconds,
        "parameters": parameters(model.closures),
        "steps": round(result.steps_taken),
        "dt": result.smallest_dt,
        "group": group_name(experiment, result.label),
        **of_gas,
    }


LARGER_IS_BETTER = ("t95", "t80")


def _flat_limits(limits: dict[str, Any]) -> dict[str, float]:
    """`{floors: {events: 0}}` -> `{floors.events: 0}`."""
    flat: dict[str, float] = {}
    for name, limit in limits.items():
        flat |= {f"{name}.{part}": value for part, value in limit.items()} if isinstance(limit, dict) else {name: limit}
    return flat


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
            for name, limit in _flat_limits(limits.model_dump(exclude_none=True)).items():
                whole, _, part = name.partition(".")
                value = summary.get(whole)
                if name in LARGER_IS_BETTER and value is None:
                    value = summary[f"{name}_at_least"]
                if isinstance(value, dict):
                    parts = [v for key, v in value.items() if v is not None and part in ("", key)]
                    value = max(parts) if parts else None
                reached = value is not None and (value >= limit if name in LARGER_IS_BETTER else value <= limit)
                relation = "at least" if name in LARGER_IS_BETTER else "at most"
                reason = summary.get("not_defined", {}).get(whole, None if whole in summary else "this flow has none")
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


def model_from(experiment: "Experiment", label: str, start: np.ndarray) -> Model:
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


def provenance(experiment: "Experiment", label: str | None = None, environment: dict[str, Any] | None = None) -> dict[str, Any]:
    """What every file of an experiment says of its making; `label`: of this run alone."""
    precision = {each: experiment.dtype(each) for each in ("reference", *experiment.labels)}
    about = storage.provenance(
        experiment.config_hash,
        experiment.resolved,
        experiment.spec.samples.seed,
        precision if label is None else precision[label],
        environment,
    )
    return {"name": experiment.name, **about, "inputs": experiment.files}


def _attributes(experiment: "Experiment", label: str, environment: dict[str, Any]) -> dict[str, Any]:
    spec = experiment.spec_of(label)
    return {
        **storage.as_attributes(provenance(experiment, label, environment)),
        "label": label,
        "title": getattr(spec, "title", None) or label,
        "solver": spec.solver.use,
        "grid": " × ".join(map(str, spec.shape)),
    }


def reference_groups(
    experiment: "Experiment", reference: Frames, results_grid: dict[str, AbstractSolver]
) -> dict[str, "xr.Dataset"]:
    """The groups of reference.nc: one per filter and grid, `fine` pictures, and the evidence of convergence."""
    import xarray as xr

    groups: dict[str, xr.Dataset] = {}
    for name, solver in results_grid.items():
        grid, variables, frames = solver.grid, solver.variables, reference.groups[name]
        ds = diagnostics.field_dataset(frames, reference.times, grid, variables, {"filter": name})
        medium, start = gas.gas_of(solver), experiment.statistics_from
        if medium is None:
            ds = diagnostics.with_diagnostics(ds, grid, variables, solver=solver, statistics_from=start)
        else:
            # sides, forces and radiation change its sums, and nothing has kept count of what they did
            ds = gas.with_diagnostics(ds, frames, grid, variables, medium, conserved=(), statistics_from=start)
        groups[name] = ds.assign({"pdf": _pdf(_compared_values(experiment, solver, frames, reference.times), solver)})
    fine = experiment.reference_solver()
    if len(reference.pictures):
        ds = diagnostics.field_dataset(
            reference.pictures[None], reference.picture_times, fine.grid, fine.variables, {"filter": "none"}
        )
        medium = gas.gas_of(fine)
        groups["fine"] = (
            diagnostics.with_vorticity(ds, fine.grid, fine.variables, fine)
            if medium is None
            else ds.assign_attrs(gamma=medium.gamma)
        )
    if HALF in reference.groups:
        groups["convergence"] = _convergence(experiment, reference, *next(iter(results_grid.items())), fine.grid.shape)
    return groups


def _convergence(
    experiment: "Experiment", reference: Frames, group: str, solver: AbstractSolver, shape: tuple[int, ...]
) -> "xr.Dataset":
    """How far the half-resolution run stays with the reference, under the filter of one group.

    It has converged until the mean correlation falls below 0.99; a gas until its error reaches `gas.TOLERANCE`.
    """
    import xarray as xr

    half, whole, series = reference.groups[HALF], reference.groups[group], ("sample", "time")
    medium, grid = gas.gas_of(solver), solver.grid
    added: dict[str, Any] = {}
    if medium is None:
        rho = diagnostics.correlation(half, whole, grid, solver.variables, experiment.modes, solver)
        until, at_least = diagnostics.crossing_time(reference.times, rho.mean(axis=0), 0.99)
    else:
        errors, rho = gas.compare(half, whole, grid, medium.gamma, experiment.modes)
        about = {"long_name": "relative L2 error of the half-resolution run", "units": "1", "at": stated_time(experiment)}
        added["error"] = (("field", *series), np.stack([errors[name] for name in gas.FIELDS]), about)
        agreement = 1 - gas.error_of(errors).mean(axis=0)
        until, at_least = diagnostics.crossing_time(reference.times, agreement, 1 - gas.TOLERANCE)
    added["correlation"] = (series, rho, {"units": "1", "long_name": "correlation of the half-resolution run"})
    return xr.Dataset(
        added,
        coords={"time": ("time", reference.times)} | ({} if medium is None else {"field": ("field", list(gas.FIELDS))}),
        attrs={
            "converged_until": float(until if until is not None else at_least),  # pyright: ignore[reportArgumentType]
            "shape": list(shape),
            "half_shape": [n // 2 for n in shape],
            "dt": reference.dt,
        },
    )


def run_experiment(
    experiment: "Experiment", folder: Path, resume: bool, console: "Console", *, force: bool = False, save_every: float = SAVE_EVERY
) -> int:
    """Everything that `hybridsim run` does; returns the exit code.

    `resume` goes on from the state in `folder`, with `force` in spite of differences that do no harm (see `hybridsim.resuming`);
    `save_every`: seconds between two states that are saved.
    """
    with storage.FolderLock(folder), Reporter(console, folder / "log.txt") as say:
        try:
            return run_locked(experiment, folder, resume, say, force=force, save_every=save_every)
        except FineRunError as error:
            say.line(f"{error}; lower reference.cfl or refine reference.shape")
            return 3


def files_of(experiment: "Experiment") -> list[str]:
    """The files that `hybridsim run` leaves in its folder, as patterns for its manifest."""
    fixed = [
        "config.yaml",
        "reference.nc",
        "summary.json",
        "training.json",
        "report.html",
        "figures/*.png",
        f"{blowups.FOLDER}/*.nc",
    ]
    return [*fixed, *(f"{label}.nc" for label in experiment.labels)]


def _prepare_folder(experiment: "Experiment", folder: Path, resume: bool, force: bool) -> dict[str, dict[str, Any]]:
    """Refuses to mix two configurations; clears what an earlier run left unless it is resumed; what its manifest named."""
    import yaml

    state = folder / "state"
    going_on = resuming.may_go_on(state, experiment, "run", resume, force)
    earlier = resuming.named_before(folder, state / resuming.BEGUN)
    if not going_on:
        storage.remove_folder(state, state / resuming.BEGUN)
    resuming.begin(state, experiment, earlier)
    storage.forget_manifest(folder)
    if not going_on:
        named = [Path(name) for name in earlier]
        blowups.clear(folder, {*experiment.labels, *(path.stem for path in named if path.parent.name == blowups.FOLDER)})
    text = yaml.safe_dump(experiment.resolved, sort_keys=False, allow_unicode=True)
    storage.atomic_write(folder / "config.yaml", text)
    return earlier


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


def run_locked(
    experiment: "Experiment",
    folder: Path,
    resume: bool,
    say: Reporter,
    *,
    timed: bool = True,
    force: bool = False,
    save_every: float = SAVE_EVERY,
) -> int:
    """`run_experiment` in a folder whose lock is held; without costs where they are measured otherwise."""
    import datetime

    needed = check_need(need_of(experiment), folder, folder / "state")
    earlier = _prepare_folder(experiment, folder, resume, force)
    environment = storage.environment()
    say.line(f"{experiment.title} ({experiment.name}), {len(experiment.labels)} runs → {folder}")
    say.line(needed)

    def reference_progress(what: str, fraction: float) -> None:
        say.progress(what, fraction)
        STOP.check()

    reference = make_reference(experiment, reference_progress)
    solvers = {group_name(experiment, label): experiment.solver(label) for label in experiment.labels}
    groups = reference_groups(experiment, reference, solvers)
    origins = storage.as_attributes(provenance(experiment, "reference", environment))
    storage.save_groups(folder / "reference.nc", groups, origins)
    converged = groups["convergence"].attrs["converged_until"] if "convergence" in groups else None
    shape = " × ".join(map(str, experiment.spec.reference.shape))
    origin = "from the cache" if reference.cached else f"made in {reference.seconds:.0f} s"
    change = None
    if converged is not None and "error" in groups["convergence"]:
        found = _errors_at(groups["convergence"]["error"], stated_time(experiment))
        change = {name: _finite(values.mean()) for name, values in found.items()}
    measure = "ρ ≥ .99" if change is None else f"error ≤ {100 * gas.TOLERANCE:g} %"
    say.line(
        f"reference {shape} {experiment.spec.reference.precision}, {origin}"
        + (
            f"; half the resolution agrees ({measure}) {_until(converged, experiment.spec.time.end)}"
            if converged is not None
            else ""
        )
    )

    summaries: dict[str, dict[str, Any]] = {}
    for label in experiment.labels:
        group = group_name(experiment, label)
        start = reference.groups[group][:, 0]
        model = model_from(experiment, label, start)
        if note := experiment.shortened(label, model.dt):
            say.line(f"{label}: {note}")
        attrs = {**_attributes(experiment, label, environment), "dt": model.dt, "reference_group": group}

        def write(result: Result, attrs=attrs, label=label, truth=groups[group]) -> "xr.Dataset":
            ds = _dataset(experiment, result, reference, truth, {**attrs, "outcome": result.outcome})
            storage.save_dataset(folder / f"{label}.nc", ds)
            return ds

        work = folder / "state" / label
        work.mkdir(parents=True, exist_ok=True)
        progress = lambda i, n, label=label: say.progress(label, i / n)  # noqa: E731
        result = _run_one(experiment, label, model, start, work, resume, progress, write, say.line, save_every)
        ds = write(result)
        summaries[label] = _summarise(experiment, result, ds, groups[group])
        say.line(_sentence(label, summaries[label]))
        if (found := blowups.kept(work)) is not None:
            said = blowups.advice(model, found, start[found.blowup.sample])
            storage.save_dataset(folder / blowups.FOLDER / f"{label}.nc", blowups.dataset(found, model, said, attrs))
            summaries[label]["advice"] = said
            say.line(f"{label}: the last finite state is in {blowups.FOLDER}/{label}.nc; {said[0]}")
    if timed:
        _add_costs(experiment, summaries, {label: reference.groups[s["group"]][:, 0] for label, s in summaries.items()}, say)

    rows = evaluate_checks(experiment, summaries)
    device = jax.devices()[0]
    summary = {
        "name": experiment.name,
        "title": experiment.title,
        "device": environment.get("device", device.device_kind),
        "precision": {label: experiment.dtype(label) for label in experiment.labels},
        "seed": experiment.spec.samples.seed,
        "version": environment["hybridsim"],
        "commit": environment["commit"],
        "versions": environment,
        "config_hash": experiment.config_hash,
        "inputs": experiment.files,
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
            **({} if change is None else {"change": change, "change_at": stated_time(experiment)}),
        },
        "runs": summaries,
        "checks": rows,
    }
    storage.write_json(folder / "summary.json", summary)
    if not (folder / "training").exists() and (history := _training_history(experiment)):
        storage.write_json(folder / "training.json", history)
    from hybridsim.report import write_report

    page = write_report(folder)
    about = {"command": "run", **provenance(experiment, environment=environment)}
    storage.write_manifest(folder, files_of(experiment), about, earlier)
    storage.remove_folder(folder / "state", folder / "state" / resuming.BEGUN)
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
    for key in ("error", "velocity_error", "temperature_error", "spectrum_error", "statistics_error"):
        if key in summary and key not in summary["not_defined"]:
            parts.append(f"{key.replace('_', ' ')} " + ("–" if summary[key] is None else f"{summary[key]:.3f}"))
    return f"{label}: {', '.join(parts)}, {summary['outcome']}"
