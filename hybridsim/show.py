"""What a run computes, from its line of YAML to the formula of its right-hand side, as a tree with file and line; and the lists."""

import contextlib
import functools
import inspect
import math
import time
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from hybridsim.config import (
    FROM_CLOSURE,
    FROM_RUN,
    ConfigError,
    Experiment,
    KeyPath,
    catalogue,
    constructor_of,
    key_path,
    load_class,
    parse_yaml,
    shipped_experiments,
    shipped_weights,
    solver_tables,
    suggestion,
)
from hybridsim.contract import AbstractClosure, Place, place_of
from hybridsim.model import Model
from hybridsim.train import parameters

if TYPE_CHECKING:
    from rich.console import Console
    from rich.tree import Tree

SOURCES = Path(__file__).resolve().parent.parent
KINDS = (
    *("equations", "solvers", "steppers", "forcings", "cooling", "boundary_states", "boundary_velocities", "initial", "closures"),
    *("networks", "weights", "experiments"),
)


def formula(cls: Any) -> str:
    """The first paragraph of a docstring: the equation, on one line."""
    doc = inspect.cleandoc(cls.__doc__ or "").split("\n\n")[0]
    return " ".join(doc.split())


def place_in_source(thing: Any) -> str:
    """`solvers/spectral.py:96` for a class or a function."""
    thing = inspect.unwrap(thing)
    try:
        file = Path(inspect.getsourcefile(thing) or "").resolve()
        line = inspect.getsourcelines(thing)[1]
    except (OSError, TypeError):
        return "?"
    with contextlib.suppress(ValueError):
        file = file.relative_to(SOURCES)
    return f"{file}:{max(line, 1)}"


def _number(value: float) -> str:
    return f"{value:.4g}"


def _bytes(count: float) -> str:
    for unit, size in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if count >= size:
            return f"{count / size:.3g} {unit}"
    return f"{count:.0f} B"


def _seconds(value: float) -> str:
    for unit, size in (("h", 3600), ("min", 60), ("s", 1)):
        if value >= size:
            return f"{value / size:.3g} {unit}"
    return f"{value * 1e3:.3g} ms"


def _at(place: Place) -> str:
    return "(" + ", ".join(str(Fraction(x)) for x in place) + ")"


@functools.cache
def _arguments(cls: type, supplied: tuple[str, ...] = FROM_RUN) -> tuple[str, ...]:
    return tuple(constructor_of(cls, frozenset(supplied)).names)


def _fields(thing: Any) -> str:
    """`viscosity = 0.001, …` of the arguments that YAML may write."""
    out = []
    for name in _arguments(type(thing)):
        value = getattr(thing, name, None)
        if isinstance(value, eqx.Module) or value is None or not hasattr(thing, name):
            continue
        if isinstance(value, float):
            out.append(f"{name} = {_number(value)}")
        elif isinstance(value, bool | int | str | tuple):
            out.append(f"{name} = {value}")
        elif isinstance(value, dict):
            numbers = [f"{key} {_number(q)}" for key, q in value.items() if isinstance(q, float)]
            out += [f"{name} = {{{', '.join(numbers)}}}"] if numbers else []
    return ", ".join(out)


# --- one run as a tree -----------------------------------------------------------------------------------------------------------


def _add(tree: "Tree", title: str, thing: Any, method: Any = None) -> "Tree":
    """A branch `title  Class  file:line` whose first leaves are the formula and the arguments."""
    from rich.markup import escape

    cls = type(thing)
    name = f"[bold]{escape(title)}[/]" + (f"  {cls.__name__}" if title != cls.__name__ else "")
    node = tree.add(f"{name}  [dim]{place_in_source(method or cls)}[/]")
    node.add(f"[cyan]{escape(formula(cls))}[/]")
    if fields := _fields(thing):
        node.add(escape(fields))
    return node


def _largest_stable_dt(experiment: Experiment, model: Model) -> tuple[float, float] | None:
    """(Δt at Courant number 1, speed): of the strongest flow that the initial state may have, where it says so."""
    speed = getattr(experiment.initial(), "max_speed", None)
    if not isinstance(speed, float):
        return None
    channels = len(model.solver.variables)
    u = jnp.full((channels, *model.solver.grid.shape), speed / math.sqrt(channels), jnp.float32)
    return float(model.solver.stable_dt(u)), speed


def seconds_per_step(model: Model, dtype: Any) -> float:
    """Wall-clock time of one model step of one sample, the best of a few, compilation excluded."""
    # An adaptive model would take as many steps as the time of one needs.
    model = Model(model.solver, model.stepper, model.dt, model.closures, model.evaluate, model.substeps)
    solver = model.solver
    waves = [np.sin(2 * np.pi * x / length) for x, length in zip(solver.grid.mesh(), solver.grid.lengths, strict=True)]
    u = jnp.asarray(np.stack([waves[-1 - c % len(waves)] for c in range(len(solver.variables))]), dtype)

    prepared = jax.block_until_ready(eqx.filter_jit(model.prepare)(u.dtype))
    step = eqx.filter_jit(lambda state, prepared: model(state[0], state[1], state[2], prepared))
    state = jax.block_until_ready(step((prepared.solver.encode(u), model.init_carry(u), jnp.asarray(0)), prepared))
    best = math.inf
    for _ in range(5):
        begin = time.perf_counter()
        state = jax.block_until_ready(step(state, prepared))
        best = min(best, time.perf_counter() - begin)
    return best


def _run_tree(tree: "Tree", experiment: Experiment, label: str, lines: dict[KeyPath, int], timing: bool) -> None:
    spec = experiment.spec_of(label)
    path: KeyPath = ("reference",) if label == "reference" else ("runs", label)
    asked = spec.dt
    interval = experiment.spec.time.end / experiment.spec.time.frames
    closures = experiment.closures_for(label, random=False)
    model = experiment.model_for(label, dt=interval if asked is None else None, closures=closures)
    solver, stepper = model.solver, model.stepper
    grid = solver.grid

    yaml_place = f"{experiment.path.name}:{lines[path]}" if path in lines else experiment.path.name
    node = tree.add(f"[bold green]{key_path(path)}[/]  {spec.precision}  [dim]{yaml_place}[/]")
    node.add("channels  " + ", ".join(f"{v.name} [dim]\\[{v.unit}] at[/] {_at(v.at)}" for v in solver.variables))
    spacing = " × ".join(_number(h) for h in grid.spacing)
    node.add(f"grid  {' × '.join(str(n) for n in grid.shape)} cells of {spacing}")

    step = node.add(f"one step  [dim]{place_in_source(Model.__call__)}[/]")
    part = _add(step, type(stepper).__name__, stepper, type(stepper).__call__)
    part.add(
        f"order {stepper.order}, {stepper.stages} evaluation{'s' if stepper.stages > 1 else ''} of the right-hand side per step"
    )
    _add(part, type(solver).__name__, solver, type(solver).explicit)
    if not model.closures:
        step.add("no closures")
    for i, closure in enumerate(model.closures):
        child = _add(step, type(closure).__name__, closure, type(closure).__call__)
        inner = getattr(closure, "closure", None)
        if isinstance(inner, AbstractClosure):
            _add(child, type(inner).__name__, inner, type(inner).__call__)
        when = model.evaluate[i]
        held = {"stage": "at every stage", 1: "at every step"}.get(when, f"every {when} steps")
        child.add(f"place {place_of(closure).__name__}, evaluated {held}")
        network = getattr(closure, "network", None)
        if isinstance(network, eqx.Module):
            _add(child, "network", network)
        if count := parameters(closure):
            weights = experiment.spec.runs[label].corrections[i].weights
            child.add(f"{count} parameters, " + (f"weights {weights}" if weights else "untrained"))

    stable = _largest_stable_dt(experiment, model)
    if asked is None:
        sentence = f"Δt = {experiment.cfl(label):g} of the stable one at the starts"
        steps = None
        if stable is not None:
            steps = experiment.steps_per_frame(label, float(experiment.cfl(label) or 0) * stable[0])
            sentence += f", about {_number(steps.dt)} or more"
    else:
        steps = experiment.steps_per_frame(label)
        sentence = f"Δt = {_number(steps.dt)}"
        if experiment.shortened(label, steps.dt):
            sentence += f" ({_number(asked)} shortened to land on the frames)"
    if stable is not None:
        sentence += f"; stable: {_number(stable[0])} at Courant number 1 if |u| reaches {_number(stable[1])}"
    node.add(sentence)
    cost = f"memory about {_bytes(experiment.memory(label))}"
    if steps is not None:
        total, samples = steps.steps * experiment.spec.time.frames, experiment.spec.samples.count
        cost += f"; {total} model steps × {samples} samples"
        if timing:
            seconds = seconds_per_step(model, spec.precision)
            cost += f"; {_seconds(seconds)} per step and sample here, {_seconds(seconds * total * samples)} in all"
    node.add(cost)


def _domain(grid: Any) -> str:
    """The box and what bounds it."""
    sides = [low if low == high else f"{low} and {high}" for low, high in grid.boundaries]
    ends = [f"{axis} {kind}" for axis, kind in zip("xyz", sides, strict=False)] if len(set(sides)) > 1 else sides[:1]
    return "domain  " + " × ".join(_number(x) for x in grid.lengths) + ", " + ", ".join(ends)


def experiment_tree(experiment: Experiment, timing: bool = True) -> "Tree":
    """The whole experiment as a `rich` tree."""
    from rich.markup import escape
    from rich.tree import Tree

    lines: dict[KeyPath, int] = {}
    parse_yaml(experiment.path.read_text("utf-8-sig"), experiment.path.name, (), lines)
    equation, initial = experiment.equation(), experiment.initial()
    spec = experiment.spec
    tree = Tree(f"[bold]{experiment.name}[/]  {escape(experiment.title)}  [dim]{escape(str(experiment.path))}[/]")
    node = _add(tree, "equation", equation)
    for name in _arguments(type(equation)):
        value = getattr(equation, name, None)
        for title, part in value.items() if isinstance(value, dict) else ((name, value),):
            if isinstance(part, eqx.Module):
                _add(node, title if title == name else f"{name}.{title}", part)
    tree.add(_domain(experiment.grid(spec.reference.shape)))
    _add(tree, "initial", initial)
    tree.add(
        f"{spec.samples.count} samples to t = {_number(spec.time.end)}, {spec.time.frames} frames, statistics from t = "
        f"{_number(experiment.statistics_from)}, compared on modes ≤ {experiment.modes}"
    )
    for label in ("reference", *experiment.labels):
        _run_tree(tree, experiment, label, lines, timing)
    built, called = place_in_source(Experiment.model_for), place_in_source(Model.__call__)
    tree.add(f"path of a number  {experiment.path.name} → {built} → {called} → the stepper's formula → the solver's `explicit`")
    return tree


def show_experiment(experiment: Experiment, console: "Console", timing: bool = True) -> None:
    """Print the tree."""
    console.print(experiment_tree(experiment, timing))


# --- lists -----------------------------------------------------------------------------------------------------------------------


def _rows(kind: str) -> Iterator[tuple[str, str, str]]:
    """(name, what it is, arguments) of one kind."""
    if kind == "experiments":
        for name, file in shipped_experiments().items():
            data = parse_yaml(file.read_text("utf-8"), file.name)
            yield name, str(data.get("title", "")), "runs: " + ", ".join(data.get("runs", {}))
    elif kind == "weights":
        from hybridsim.storage import read_header

        for name, file in shipped_weights().items():
            header = read_header(file)
            yield name, f"for {header.get('closure', '?')}", f"{header['parameters']} parameters"
    elif kind == "solvers":
        for equation, table in sorted(solver_tables().items()):
            for name, by_dims in sorted(table.items()):
                for target in dict.fromkeys(by_dims.values()):
                    cls = load_class(target)
                    dims = ", ".join(f"{d}D" for d, other in sorted(by_dims.items()) if other == target)
                    arguments = [a for a in _arguments(cls) if a != "equation"]
                    yield name, f"{equation}, {dims}: {formula(cls)}", ", ".join(arguments)
    else:
        for name, target in sorted(catalogue(kind).items()):
            cls = load_class(target)
            supplied = FROM_CLOSURE if kind == "networks" else FROM_RUN
            yield name, formula(cls), ", ".join(_arguments(cls, supplied))


def list_catalogue(kind: str | None, console: "Console") -> None:
    """Print the tables of names, one kind or all."""
    from rich.markup import escape
    from rich.table import Table

    if kind is not None and kind not in KINDS:
        raise ConfigError(f"list: there is no kind {kind!r}; {suggestion(kind, KINDS, 'there are')}")
    for each in KINDS if kind is None else (kind,):
        table = Table(title=each, title_justify="left", title_style="bold", expand=False)
        table.add_column("name", style="green", no_wrap=True)
        table.add_column("what it is", overflow="fold")
        table.add_column("arguments", overflow="fold")
        for row in _rows(each):
            table.add_row(*(escape(cell) for cell in row))
        console.print(table)
