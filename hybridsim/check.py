"""Does a closure keep what it promises? Shape, conservation, finiteness, gradients, precision and symmetry, in every solver.

Each line of the table is one number and its limit, and each failure one sentence. The weights are random and large (standard
deviations 0.1 to 100): what holds for them holds for any training. `assert_contract` is the same as a test in one line.
"""

import contextlib
import functools
import inspect
import itertools
import math
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array

from hybridsim.config import (
    FROM_RUN,
    ConfigError,
    Part,
    blank,
    catalogue,
    check_kind,
    find_class,
    load_class,
    make_part,
    parse_yaml,
    solver_tables,
)
from hybridsim.contract import (
    PLACES,
    AbstractClosure,
    AbstractSolver,
    Flux,
    Interpolation,
    PostStep,
    Replacement,
    Source,
    View,
    place_of,
)
from hybridsim.diagnostics import is_gas
from hybridsim.grid import Grid
from hybridsim.model import Model
from hybridsim.yaml_reader import first_line, one_of, show_value, suggestion

if TYPE_CHECKING:
    from rich.console import Console

BOXES = {
    1: ((16,), (22.0,)),
    2: ((16, 12), (2 * math.pi, 1.2 * math.pi)),
    3: ((12, 10, 8), (2 * math.pi, 1.2 * math.pi, 0.9 * math.pi)),
}
"""Shape and lengths by the number of dimensions: axes that differ in everything, so that no mistake hides behind a symmetry."""

SPREADS = (0.1, 1.0, 10.0, 100.0)
TIME_STEP = 1e-3
LIMITS = {"float64": 1e-14, "float32": 1e-7}
DIFFERENCE = 1e-5
"""h of the central differences that gradients are compared with; a second one is a quarter of it."""
MOST_DIFFERENCE = 1e-4
"""How far a gradient may be from them where they agree with each other."""


class Line(NamedTuple):
    """One line of the table; `passed` is None where a number is reported without a limit, `sentence` says what failed."""

    check: str
    solver: str
    value: str
    limit: str
    passed: bool | None
    sentence: str = ""


class _GivenFlux(Flux):
    """F = what it is given: conservation is the solver's, whoever computed the flux."""

    value: Array

    def __call__(self, view: View, memory: Any = None, key: Any = None) -> Array:
        return self.value


class _GivenSource(Source):
    """s = what it is given."""

    value: Array

    def __call__(self, view: View, memory: Any = None, key: Any = None) -> Array:
        return self.value


class _GivenInterpolation(Interpolation):
    """a = what it is given: conservation is the solver's, whoever computed the weights."""

    value: Array

    def __call__(self, view: View, memory: Any = None, key: Any = None) -> Array:
        return self.value


class _GivenPostStep(PostStep):
    """d = what it is given."""

    value: Array

    def __call__(self, view: View, memory: Any = None, key: Any = None) -> Array:
        return self.value


class _GivenReplacement(Replacement):
    """d = what it is given."""

    value: Array

    def __call__(self, view: View, memory: Any = None, key: Any = None) -> Array:
        return self.value


_GIVEN = {
    Flux: _GivenFlux,
    Source: _GivenSource,
    Interpolation: _GivenInterpolation,
    PostStep: _GivenPostStep,
    Replacement: _GivenReplacement,
}

_CONSERVING = (Flux, Interpolation)
"""The places that keep the sums, whatever the closure gives."""


QUICKLY = {"xla_backend_optimization_level": "0"}
"""Compiler options for small grids and few calls: what the compiler saves at run time it would lose many times over."""


def _jit(function: Callable) -> Callable:
    return eqx.filter_jit(function, compiler_options=QUICKLY)  # pyright: ignore[reportCallIssue]


@_jit
def _projected(solver: AbstractSolver, u: Array) -> Array:
    return solver.project(u)


@_jit
def _prepared(solver: AbstractSolver, dtype: str) -> AbstractSolver:
    return solver.prepare(dtype)


@_jit
def _stepped(solver: AbstractSolver, stepper: Any, given: AbstractClosure, u: Array) -> tuple[Array, Array]:
    """The state after one step with an output that is given, and before it. It knows no closure, so that all share its program."""
    model = Model(solver, stepper, TIME_STEP, (given,))
    z = solver.prepare(u.dtype).encode(u)
    after, _, _ = model(z, model.init_carry(u), jnp.asarray(0))
    return solver.decode(after), solver.decode(solver.encode(u))


class _Case:
    """A closure in one solver, in one precision: one compiled program gives the output, J v and Jᵀ w, of state and weights."""

    def __init__(self, solver: AbstractSolver, closure: AbstractClosure, dtype: str):
        self.solver, self.closure, self.dtype = solver, _cast(closure, dtype), dtype
        self.static = eqx.partition(closure, eqx.is_inexact_array)[1]
        self.u = random_state(solver, dtype)
        self.prepared, self.rest = eqx.partition(_prepared(solver, dtype), eqx.is_array)
        self.forward = dtype == "float64"

    def arrays(self, spread: float, seed: int) -> Any:
        """Every floating-point array of the closure, drawn from N(0, spread²)."""
        rng = np.random.default_rng(seed)
        given = eqx.filter(self.closure, eqx.is_inexact_array)
        return jax.tree.map(lambda a: jnp.asarray(spread * rng.standard_normal(a.shape), a.dtype), given)

    def call(self, arrays: Any, u: Array, key: Array | None = None, prepared: Any = None) -> tuple[Any, Any]:
        """(what the call returned, the memory that it was given)."""
        closure = eqx.combine(arrays, self.static)
        solver = eqx.combine(self.prepared if prepared is None else prepared, self.rest)
        view = View(u, jnp.zeros((), u.dtype), jnp.asarray(TIME_STEP, u.dtype), solver)
        memory = closure.init_memory(view)
        return closure(view, memory, key if closure.stochastic else None), memory

    def output(self, arrays: Any, u: Array, key: Array | None = None, prepared: Any = None) -> Any:
        key = jax.random.key(3) if key is None else key
        out, memory = self.call(arrays, u, key, prepared)
        return out if memory is None else out[0]

    def _everything(self, at: Any, tangent: Any, cotangent: Array, key: Array, prepared: Any) -> tuple[Array, Any, Any]:
        # as the model does it, whatever precision the closure computes in
        function = lambda arrays, u: self.output(arrays, u, key, prepared).astype(self.dtype)  # noqa: E731
        out, pull = jax.vjp(function, *at)
        return out, jax.jvp(function, at, tangent)[1] if self.forward else None, pull(cotangent)

    @functools.cached_property
    def traced(self) -> Any:
        at = (self.arrays(1.0, 0), self.u)
        cotangent = jnp.ones(jax.eval_shape(self.output, *at).shape, self.dtype)
        # a function of its own: what `jit` remembers of another one may have had a forward mode
        program = jax.jit(lambda *arguments: self._everything(*arguments), compiler_options=QUICKLY)
        return program.trace(at, at, cotangent, jax.random.key(3), self.prepared)

    @functools.cached_property
    def program(self) -> Any:
        return self.traced.lower().compile()

    def derivatives(self, arrays: Any, u: Any, tangent: Any = None, cotangent: Any = None, seed: int = 3) -> Any:
        """(m, J v, Jᵀ w) at these weights and this state; J v is None where there is no forward mode."""
        at = (arrays, u)
        weight = np.ones(self.shape, self.dtype) if cotangent is None else cotangent
        return self.program(at, at if tangent is None else tangent, weight, jax.random.key(seed), self.prepared)

    def values(self, arrays: Any, u: Any, seed: int = 3) -> np.ndarray:
        """m, in double precision on the host."""
        return np.asarray(self.derivatives(arrays, u, seed=seed)[0], np.float64)

    @property
    def shape(self) -> tuple[int, ...]:
        """What the place needs."""
        return tuple(size for _, size in wanted_axes(self.solver, place_of(self.closure)))


def wanted_axes(solver: AbstractSolver, place: type[AbstractClosure]) -> list[tuple[str, int]]:
    """(name, length) of every axis of the array that a closure at `place` returns."""
    axes = [("c", len(solver.variables)), *zip("xyz", solver.grid.shape, strict=False)]
    if place is Flux:
        return [("axis", solver.grid.ndim), *axes]
    if place is Interpolation:
        return [("axis", solver.grid.ndim), ("side", 2), axes[0], ("free", solver.free_weights()), *axes[1:]]
    return axes


def _cast(tree: Any, dtype: Any) -> Any:
    return jax.tree.map(lambda a: a.astype(dtype) if eqx.is_inexact_array(a) else a, tree)


def _conserved(solver: AbstractSolver, channels: Sequence[np.ndarray]) -> np.ndarray:
    """(ρ, ρv, E, ρc) of (ln ρ, v, ln p, c)."""
    d = solver.grid.ndim
    gamma = float(solver.equation.gamma)  # pyright: ignore[reportAttributeAccessIssue]
    density, pressure = np.exp(channels[0]), np.exp(channels[d + 1])
    v = np.stack(channels[1 : d + 1])
    energy = pressure / (gamma - 1) + 0.5 * density * (v**2).sum(axis=0)
    return np.stack([density, *(density * v), energy, *(density * c for c in channels[d + 2 :])])


def uniform_state(solver: AbstractSolver, value: float, dtype: Any) -> Array:
    """`value` in every channel; in a gas with ρ = p = 1 the velocities and scalars have it."""
    channels = [np.full(solver.grid.shape, value) for _ in solver.variables]
    if is_gas(solver.variables):
        zero = np.zeros(solver.grid.shape)
        channels[0] = channels[solver.grid.ndim + 1] = zero
        return jnp.asarray(_conserved(solver, channels), dtype)
    return jnp.asarray(np.stack(channels), dtype)


def random_state(solver: AbstractSolver, dtype: Any, seed: int = 0) -> Array:
    """A smooth random state of order one with a mean flow, on the solver's constraints; of a gas ln ρ, v and ln p are random."""
    rng = np.random.default_rng(seed)
    channels = []
    for c, variable in enumerate(solver.variables):
        mesh = solver.grid.mesh(variable.at)
        field = np.full(solver.grid.shape, 0.3 + 0.2 * c)
        for _ in range(12):
            k = rng.integers(-3, 4, len(mesh))
            phase = sum(2 * np.pi * n * x / length for n, x, length in zip(k, mesh, solver.grid.lengths, strict=True))
            field = field + rng.standard_normal() / 3 * np.cos(phase + rng.uniform(0, 2 * np.pi))
        channels.append(field)
    u = _conserved(solver, [0.5 * q for q in channels]) if is_gas(solver.variables) else np.stack(channels)
    return _projected(solver, jnp.asarray(u, "float64")).astype(dtype)


def _norm(tree: Any) -> float:
    return math.sqrt(sum(float(np.sum(np.abs(np.asarray(a, np.float64)) ** 2)) for a in jax.tree.leaves(tree)))


def _inner(a: Any, b: Any) -> float:
    pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    return math.fsum(float(np.vdot(np.asarray(x, np.float64), np.asarray(y, np.float64))) for x, y in pairs)


def _draw(tree: Any, seed: int) -> Any:
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda a: np.asarray(rng.standard_normal(a.shape), a.dtype), tree)


def _wide(jaxpr: Any) -> Iterator[tuple[Any, str]]:
    """(equation, what is wide in it) for every float64 and complex128 value anywhere in a jaxpr.

    A number of Python is no such value: it takes the dtype of what it meets.
    """
    for eqn in jaxpr.eqns:
        for variable in (*eqn.invars, *eqn.outvars):
            number = getattr(variable.aval, "weak_type", False) and not variable.aval.shape
            if not number and getattr(variable.aval, "dtype", None) in (np.float64, np.complex128):
                yield eqn, f"{eqn.primitive} {variable.aval.str_short()}"
        for parameter in eqn.params.values():
            for part in parameter if isinstance(parameter, tuple | list) else (parameter,):
                if hasattr(part, "eqns"):
                    yield from _wide(part)
                elif hasattr(part, "jaxpr"):
                    yield from _wide(part.jaxpr)


def wide_values(jaxpr: Any) -> set[str]:
    """The float64 and complex128 values anywhere in a jaxpr."""
    return {what for _, what in _wide(jaxpr.jaxpr)}


# --- the numbers -----------------------------------------------------------------------------------------------------------------


def conservation(case: _Case, stepper: Any) -> float:
    """|Σu₁ − Σu₀| / (Σ|u| + Δt/Δx Σ|F|), the worst channel and spread of weights, after one forward Euler step.

    Where the output is no flux, but weights, Σ|u₁| takes the place of the fluxes.
    """
    solver = case.solver
    u = case.u
    place = place_of(case.closure)
    worst = 0.0
    for i, spread in enumerate(SPREADS):
        out = case.derivatives(case.arrays(spread, i), u)[0]
        after, before = (np.asarray(a, np.float64) for a in _stepped(solver, stepper, _GIVEN[place](out), u))
        for c in range(len(solver.variables)):
            if place is Interpolation:
                added = np.sum(np.abs(after[c]))
            else:
                given = np.asarray(out, np.float64)[..., c, *(slice(None),) * solver.grid.ndim]
                added = TIME_STEP / min(solver.grid.spacing) * np.sum(np.abs(given))
            scale = np.sum(np.abs(before[c])) + added
            change = abs(math.fsum([*after[c].ravel(), *-before[c].ravel()])) / scale
            worst = change if not change <= worst else worst
    return float(worst)


ADJOINT = "adjoint ⟨Jv,w⟩ = ⟨v,Jᵀw⟩"
FLOWS = ("at rest", "uniform flow", "random flow")


def not_finite(case: _Case) -> dict[str, tuple[int, int]]:
    """Values that are not finite, in the output and in its gradients: at rest, in a uniform flow, in a random one."""
    u = case.u
    resting, uniform = (uniform_state(case.solver, value, u.dtype) for value in (0.0, 1.0))
    arrays = case.arrays(1.0, 0)
    count = lambda tree: sum(int(np.sum(~np.isfinite(np.asarray(a)))) for a in jax.tree.leaves(tree))  # noqa: E731
    found = {}
    for name, flow in zip(FLOWS, (resting, uniform, u), strict=True):
        out, _, back = case.derivatives(arrays, flow)
        found[name] = count(out), count(back)
    return found


def adjoint(case: _Case) -> tuple[float, Any]:
    """|⟨Jv, w⟩ − ⟨v, Jᵀw⟩| / (|Jv| |w|) of the closure in state and weights, and Jᵀw itself."""
    at = (case.arrays(0.3, 1), case.u)
    tangent, cotangent = _draw(at, 2), _draw(jax.ShapeDtypeStruct(case.shape, case.dtype), 4)
    _, forward, back = case.derivatives(*at, tangent, cotangent)
    if forward is None:
        return math.nan, back
    size = max(_norm(forward), 1e-300)
    return abs(_inner(forward, cotangent) - _inner(tangent, back)) / (size * _norm(cotangent)), back


class Comparison(NamedTuple):
    """How a gradient compares with central differences: the larger, its distance to them, and that of two of them."""

    size: float
    error: float
    rough: float

    @property
    def wrong(self) -> bool:
        """A function that is not smooth where it is looked at, like |x| at 0, has differences that do not agree either."""
        return not self.error <= max(MOST_DIFFERENCE, 10 * self.rough)


def differences(case: _Case) -> dict[str, Comparison]:
    """(m(x + hv) − m(x − hv)) / 2h against J v, for a random direction v of the state and one of the weights.

    Without a forward mode ⟨v, Jᵀ d⟩ is compared with ⟨d, d⟩, d being the difference.
    """
    at = (case.arrays(0.3, 1), case.u)
    # on the host: eager operations on arrays of many shapes would all be compiled
    at = jax.tree.map(np.asarray, at)
    drawn, nothing = _draw(at, 2), jax.tree.map(np.zeros_like, at)
    found = {}
    for name, tangent in (("state", (nothing[0], drawn[1])), ("weights", (drawn[0], nothing[1]))):
        if not jax.tree.leaves(tangent[0 if name == "weights" else 1]):
            continue

        def central(h: float, tangent: Any = tangent) -> np.ndarray:
            moved = [jax.tree.map(lambda a, v, s=s: a + s * h * v, at, tangent) for s in (1, -1)]
            plus, minus = (case.values(arrays, u) for arrays, u in moved)
            return (plus - minus) / (2 * h)

        wide, narrow = central(DIFFERENCE), central(DIFFERENCE / 4)
        forward, back = case.derivatives(at[0], at[1], tangent, narrow)[1:]
        size = _norm(narrow) if forward is None else max(_norm(forward), _norm(narrow))
        if size == 0:
            found[name] = Comparison(0.0, 0.0, 0.0)
        else:
            error = abs(_inner(tangent, back) / size**2 - 1) if forward is None else _norm(np.asarray(forward) - narrow) / size
            found[name] = Comparison(size, error, _norm(wide - narrow) / size)
    return found


def translation(case: _Case) -> float:
    """|m(shifted u) − shifted m(u)| / |m(u)| for a shift by whole cells."""
    u = case.u
    axes, cells = tuple(range(-case.solver.grid.ndim, 0)), tuple(range(2, 2 + case.solver.grid.ndim))
    arrays = case.arrays(0.3, 1)
    here = np.roll(case.values(arrays, u), cells, axes)
    return _norm(here - case.values(arrays, jnp.asarray(np.roll(np.asarray(u), cells, axes)))) / max(_norm(here), 1e-300)


def repetition(case: _Case) -> float:
    """|m₁ − m₂| / |m₁| for the same arguments, traced twice."""
    at = (case.arrays(0.3, 1), case.u)
    first = case.values(*at)
    again = jax.jit(lambda arrays, u: case.output(arrays, u), compiler_options=QUICKLY)(*at)
    return _norm(first - np.asarray(again, np.float64)) / max(_norm(first), 1e-300)


# --- what is wrong, in one sentence ----------------------------------------------------------------------------------------------


def _frame(frames: Any, file: Path | None, name: Callable[[Any], str], line: Callable[[Any], int]) -> str:
    """The innermost place in the user's own file, in brackets; empty if there is none."""
    own = [f for f in frames if file is not None and Path(name(f)) == file]
    return f" ({Path(name(own[-1])).name}:{line(own[-1])})" if own else ""


def _failure(error: Exception, file: Path | None) -> str:
    """The error in one line, with the line of the user's own file that raised it."""
    where = _frame(traceback.extract_tb(error.__traceback__), file, lambda f: f.filename, lambda f: f.lineno)
    return f"{type(error).__name__}: {first_line(error)}{where}"


def _a(place: type) -> str:
    return f"an {place.__name__}" if place is Interpolation else f"a {place.__name__}"


def _shape_sentence(name: str, place: type, solver: AbstractSolver, found: Any) -> str:
    """What was returned, what the place needs, and the axis that makes the difference."""
    axes = wanted_axes(solver, place)
    names, sizes = [n for n, _ in axes], [n for _, n in axes]
    needs = f"{name} is {_a(place)} and must return ({', '.join(names)}) = {tuple(sizes)}"
    if not hasattr(found, "shape"):
        return f"{needs}, found {'nothing' if found is None else 'a ' + type(found).__name__}"
    shape = list(found.shape)
    hint = ""
    if len(shape) == len(sizes):
        wrong = [f"{n!r} has length {a}" for n, a, b in zip(names, shape, sizes, strict=True) if a != b]
        hint = "the order of the axes is another one" if sorted(shape) == sorted(sizes) else " and ".join(wrong)
    elif len(shape) < len(sizes):
        # of axes of equal length the last ones are there: it is the leading one that is forgotten
        kept = [k for k in itertools.combinations(range(len(sizes)), len(shape)) if [sizes[i] for i in k] == shape]
        if kept:
            missing = [repr(n) for i, n in enumerate(names) if i not in kept[-1]]
            hint = f"{' and '.join(missing)} {'is' if len(missing) == 1 else 'are'} missing"
    else:
        count = len(shape) - len(sizes)
        at = next((i for i in range(len(sizes) + 1) if shape[:i] + shape[i + count :] == sizes), None)
        hint = f"{'an axis is' if count == 1 else f'{count} axes are'} too many" + ("" if at is None else f", at position {at}")
    return f"{needs}, found {tuple(shape)}" + (f": {hint}" if hint else "")


def _call_sentence(cls: type) -> str:
    """Why a closure cannot be called as `m(view, memory, key)`; empty if it can."""
    parameters = list(inspect.signature(cls.__call__).parameters.values())[1:]
    names = [p.name for p in parameters]
    wanted = "write def __call__(self, view, memory=None, key=None)"
    taken = f"{cls.__name__}.__call__ takes ({', '.join(names)})"
    try:
        inspect.Signature(parameters).bind(None, None, None)
    except TypeError:
        return f"{taken}, but is called with (view, memory, key); {wanted}"
    if any(name in names and names.index(name) != i for i, name in enumerate(("view", "memory", "key"))):
        return f"{taken}, but is called with (view, memory, key) in this order; {wanted}"
    return ""


def _fixed_arrays(tree: Any, path: str = "") -> Iterator[str]:
    """Names of the static fields that hold arrays: they are neither trained nor saved."""
    if isinstance(tree, eqx.Module):
        for field in tree.__dataclass_fields__.values():  # pyright: ignore[reportAttributeAccessIssue]
            value, name = getattr(tree, field.name, None), f"{path}.{field.name}" if path else field.name
            if not field.metadata.get("static", False):
                yield from _fixed_arrays(value, name)
            elif any(isinstance(leaf, jax.Array | np.ndarray | Tracer) for leaf in jax.tree.leaves(value)):
                yield name
    elif isinstance(tree, Mapping):
        for key, value in tree.items():
            yield from _fixed_arrays(value, f"{path}[{key!r}]")
    elif isinstance(tree, list | tuple):
        for i, value in enumerate(tree):
            yield from _fixed_arrays(value, f"{path}[{i}]")


def _constants_sentence(closure: AbstractClosure) -> str:
    """Why training cannot turn what `constants` names into parameters; empty if it can."""
    name = type(closure).__name__
    fields = closure.__dataclass_fields__  # pyright: ignore[reportAttributeAccessIssue]
    for constant in closure.constants:
        if constant not in fields:
            return f"{constant!r} is no field of {name}; {suggestion(constant, fields, 'it has')}"
        value = getattr(closure, constant)
        if fields[constant].metadata.get("static", False):
            return (
                f"{constant!r} is declared static in {name}, so that training cannot turn it into a parameter; remove static=True"
            )
        if isinstance(value, bool) or not (isinstance(value, float | int) or np.shape(value) == ()):
            return f"{constant!r} of {name} must be one number, found {show_value(value)}"
    return ""


def _with_trained_constants(closure: AbstractClosure) -> AbstractClosure:
    """The closure as training has it: its constants are parameters."""
    for constant in closure.constants:
        value = jnp.asarray(getattr(closure, constant), float)
        closure = eqx.tree_at(lambda c, name=constant: getattr(c, name), closure, value)
    return closure


def _memory_sentence(name: str, case: _Case) -> str:
    """Why what is remembered does not fit; empty if it does."""
    out, memory = eqx.filter_eval_shape(case.call, case.arrays(1.0, 0), case.u, jax.random.key(3))
    pair = isinstance(out, tuple) and len(out) == 2
    if memory is None:
        return f"{name} returns a pair, but has no memory; return one array, or define init_memory" if pair else ""
    if not pair:
        found = "one array" if hasattr(out, "shape") else f"a {type(out).__name__}"
        return f"{name} has init_memory, so that it must return (array, new_memory); found {found}"
    kind = lambda a: (a.shape, str(a.dtype)) if hasattr(a, "shape") else type(a).__name__  # noqa: E731
    (before, old), (after, new) = (jax.tree.flatten(tree) for tree in (memory, out[1]))
    if old != new:
        return f"the new memory of {name} is {new}, but init_memory returns {old}; both must be alike"
    for a, b in zip(before, after, strict=True):
        if kind(a) != kind(b):
            return f"the new memory of {name} has {kind(b)} where init_memory returns {kind(a)}; both must be alike"
    return ""


# --- all of them -----------------------------------------------------------------------------------------------------------------


def _refused(lines: list[Line]) -> bool:
    """Whether a closure gave nothing that fits in a solver: it may be made for another number of dimensions."""
    return lines[-1].check == "shape" and lines[-1].passed is False


def _not_taken(lines: list[Line]) -> bool:
    """Whether a solver does not take the closure's place."""
    return lines[-1].check == "place" and lines[-1].passed is None


class _Checks:
    """Every check of one closure in one solver, in `lines`."""

    def __init__(self, label: str, solver: AbstractSolver, closure: AbstractClosure, file: Path | None, first: bool):
        self.label, self.solver, self.file = label, solver, file
        self.place, self.name = place_of(closure), type(closure).__name__
        self.lines: list[Line] = []
        self.add("place", self.place.__name__, "", True)
        if fixed := list(_fixed_arrays(closure)):
            which = f"{one_of(repr(name) for name in fixed)} {'is' if len(fixed) == 1 else 'are'}"
            self.add(
                "weights",
                f"static arrays: {one_of(fixed)}",
                "none",
                False,
                f"{which} declared static in {self.name} but {'holds an array' if len(fixed) == 1 else 'hold arrays'}, which would "
                "be neither trained nor saved; remove static=True, or make tuples of numbers of what shall stay fixed",
            )
            return
        if sentence := _constants_sentence(closure):
            self.add("constants", one_of(closure.constants), "fields of one number", False, sentence)
            return
        closure = _with_trained_constants(closure)
        self.wide, self.narrow = (_Case(solver, closure, dtype) for dtype in ("float64", "float32"))
        if not self.attempt("shape", self.shape) or self.lines[-1].passed is False:
            return
        if not self.attempt(ADJOINT, self.modes):
            return
        self.attempt("finite", self.finite)
        if self.lines[-1].passed is False or (first and self.attempt("repetition", self.repetition) and self.failed("repetition")):
            # nothing that is not finite, or not the same twice, has further properties
            return
        for check, action in (
            ("conservation", self.sums),
            (ADJOINT, self.adjoint),
            ("gradient against differences", self.differences),
            ("float32 stays float32", self.dtypes),
            ("batches", self.batches),
            ("translation", self.translation),
        ):
            self.attempt(check, action)

    def failed(self, check: str) -> bool:
        return any(line.check == check and line.passed is False for line in self.lines)

    def add(self, check: str, value: Any, limit: str, passed: bool | None, sentence: str = "") -> None:
        value = f"{value:.1e}" if isinstance(value, float) else str(value)
        self.lines.append(Line(check, self.label, value, limit, passed, sentence if passed is False else ""))

    def attempt(self, check: str, action: Callable[[], None]) -> bool:
        try:
            action()
        except Exception as error:  # whatever a user's closure may raise
            self.add(check, _failure(error, self.file), "", False, f"{self.name} raised {_failure(error, self.file)}")
            return False
        return True

    def shape(self) -> None:
        case = self.wide
        try:
            if sentence := _memory_sentence(self.name, case) or _memory_sentence(self.name, self.narrow):
                self.add("memory", "does not fit", "(array, new_memory)", False, sentence)
                return
        except Exception:
            # the one mistake that the error itself does not name
            with contextlib.suppress(Exception):
                eqx.filter_eval_shape(functools.partial(_with_key, case), case.arrays(1.0, 0), case.u)
                self.add(
                    "key",
                    "needed",
                    "stochastic = True",
                    False,
                    f"{self.name} draws random numbers, but is given no key; write stochastic: ClassVar[bool] = True in the class",
                )
                return
            raise
        out = eqx.filter_eval_shape(case.output, case.arrays(1.0, 0), case.u)
        found = getattr(out, "shape", type(out).__name__)
        sentence = _shape_sentence(self.name, self.place, self.solver, out)
        self.add("shape", found, str(case.shape), found == case.shape, sentence)
        dtype = getattr(out, "dtype", np.dtype(object))
        if found == case.shape and not jnp.issubdtype(dtype, np.floating):
            self.add("dtype", dtype, "floating", False, f"{self.name} must return real floating-point numbers, found {dtype}")

    def modes(self) -> None:
        """Reverse mode alone is compared with differences where there is no forward mode."""
        case = self.wide
        try:
            _ = case.program
        except TypeError as error:
            if "custom_vjp" not in str(error):
                raise
            case.forward = False
            del case.traced
            self.add(
                ADJOINT,
                "no forward mode",
                "≤ 1e-12",
                False,
                f"{self.name} uses jax.custom_vjp, which forward mode (jax.jvp) cannot differentiate; use jax.custom_jvp",
            )

    def finite(self) -> None:
        double, single = not_finite(self.wide), not_finite(self.narrow)
        for flow in FLOWS:
            (out, back), where = double[flow], "at rest" if flow == "at rest" else f"in a {flow}"
            precision = ""
            if not out + back:
                (out, back), precision = single[flow], " in float32"
            sentence = (
                f"the output of {self.name} has {out} values that are not finite {where}{precision}"
                if out
                else f"the gradient of {self.name} is not finite {where}{precision}, as that of √x is not at 0; replace x by 1 "
                "there with jnp.where before the root, and choose the result with jnp.where after it"
            )
            self.add(f"finite, {flow}", out + back, "0 values and gradients", out + back == 0, sentence)

    def sums(self) -> None:
        stepper = load_class(catalogue("steppers")["forward_euler"])()
        for case in (self.wide, self.narrow):
            drift, limit = conservation(case, stepper), LIMITS[case.dtype]
            sentence = (
                f"the sums are not kept with outputs of {self.name}: they change by {drift:.1e} in a step, at most {limit:.0e} "
                f"is possible in {case.dtype}"
                if math.isfinite(drift)
                else f"with random weights of standard deviation {SPREADS[0]:g} to {SPREADS[-1]:g} the outputs of {self.name}, or "
                f"the step that takes them, are not finite in {case.dtype}; bound what may grow"
            )
            if self.place in _CONSERVING:
                self.add(f"conservation, {case.dtype}", drift, f"≤ {limit:.0e}", drift <= limit, sentence)
            else:
                self.add(f"conservation, {case.dtype}", drift, f"a {self.place.__name__} need not", None)

    def adjoint(self) -> None:
        gap, back = adjoint(self.wide)
        if self.wide.forward:
            self.add(
                ADJOINT,
                gap,
                "≤ 1e-12",
                gap <= 1e-12,
                f"forward and reverse derivatives of {self.name} differ by {gap:.1e} in float64, at most 1e-12 is possible: a "
                "derivative rule is wrong, or some of it is computed in float32",
            )
        named = jax.tree_util.tree_leaves_with_path(back[0])
        dead = [jax.tree_util.keystr(path).lstrip(".") for path, a in named if not np.any(np.asarray(a))]
        if named and len(dead) < len(named):
            alive = f"{len(named) - len(dead)} of {len(named)} arrays" if dead else f"{sum(a.size for _, a in named):,} numbers"
            self.add("weights", f"{alive} move the output" + (f", not {one_of(dead)}" if dead else ""), "", None)
        elif named:
            moved = differences(self.wide)["weights"].size > 0
            self.add(
                "weights",
                "gradient 0 everywhere",
                "not 0",
                False,
                f"the gradient of {self.name} with respect to the weights is zero everywhere, so that nothing can be trained: "
                + ("jax.lax.stop_gradient, or a rounding, cuts it off" if moved else "the output does not depend on them"),
            )

    def differences(self) -> None:
        found = differences(self.wide)
        if self.failed("weights"):
            # it has been said that they have no gradient
            found.pop("weights")
        wrong = [name for name, comparison in found.items() if comparison.wrong]
        which = wrong[0] if wrong else max(found, key=lambda name: found[name].error)
        value = found[which].error
        smooth = value <= MOST_DIFFERENCE
        limit = f"≤ {MOST_DIFFERENCE:.0e}" if smooth or wrong else "reported: not smooth here"
        sentence = (
            f"the gradient of {self.name} with respect to the {which} differs by {value:.1%} from central differences: a custom "
            "derivative rule is wrong, or jax.lax.stop_gradient cuts off a part of it"
        )
        self.add("gradient against differences", value, limit, False if wrong else True if smooth else None, sentence)

    def dtypes(self) -> None:
        wide = list(_wide(self.narrow.traced.jaxpr.jaxpr))
        found = {what for _, what in wide}
        where = ""
        for eqn, _ in wide:
            frames = getattr(getattr(eqn.source_info, "traceback", None), "frames", ())
            # the innermost frame comes first here
            where = _frame(list(frames)[::-1], self.file, lambda f: f.file_name, lambda f: f.line_num)
            if where:
                break
        self.add(
            "float32 stays float32",
            ", ".join(sorted(found)[:3]) or "no float64",
            "no float64",
            not found,
            f"{self.name} computes in float64 in a float32 step, as {', '.join(sorted(found)[:1])}{where}; make arrays with the "
            "dtype of view.u",
        )

    def batches(self) -> None:
        case = self.wide
        jax.eval_shape(jax.vmap(case.output, (None, 0)), case.arrays(1.0, 0), case.u[None])
        self.add("batches", "jax.vmap works", "", True)

    def repetition(self) -> None:
        case, at = self.wide, (self.wide.arrays(0.3, 1), self.wide.u)
        apart = repetition(case)
        self.add(
            "repetition",
            apart,
            "≤ 1e-9",
            apart <= 1e-9,
            f"two calls of {self.name} with the same arguments differ by {apart:.1e}: draw random numbers from `key` alone "
            "(stochastic: ClassVar[bool] = True), and keep what is remembered in the memory",
        )
        if case.closure.stochastic:
            same = bool(np.array_equal(case.values(*at), case.values(*at, seed=4)))
            self.add(
                "key",
                "without effect" if same else "used",
                "used",
                not same,
                f"{self.name} is declared stochastic, but another key gives the same output; draw random numbers from `key`, or "
                "remove the declaration",
            )

    def translation(self) -> None:
        self.add("translation", translation(self.wide), "reported", None)


def _with_key(case: _Case, arrays: Any, u: Array) -> Any:
    """What a closure that is not declared stochastic returns if it is given a key all the same."""
    closure = eqx.combine(arrays, case.static)
    view = View(u, jnp.zeros((), u.dtype), jnp.asarray(TIME_STEP, u.dtype), case.solver.prepare(u.dtype))
    return closure(view, closure.init_memory(view), jax.random.key(3))


# --- in every solver -------------------------------------------------------------------------------------------------------------


def _words(label: str) -> list[str]:
    return label.lower().split()


def solvers_to_check(words: str | None = None) -> list[tuple[str, int, str, type[AbstractSolver]]]:
    """(equation, dimensions, name, class) of every solver of the catalogue whose label has all the words, as `spectral 2D` has.

    >>> [f"{equation} {dims}D {name}" for equation, dims, name, _ in solvers_to_check("spectral 2D")]
    ['compressible 2D spectral', 'navier_stokes 2D spectral']
    """
    every = []
    for equation, table in solver_tables().items():
        for dims in sorted({d for by_dims in table.values() for d in by_dims}):
            for name, by_dims in sorted(table.items()):
                if dims in by_dims and not load_class(by_dims[dims]).hosted:
                    every.append((equation, dims, name, load_class(by_dims[dims])))
    if words is None:
        return every
    known = sorted({word for equation, dims, name, _ in every for word in _words(f"{equation} {dims}D {name}")})
    for word in _words(words):
        if word not in known:
            raise ConfigError(f"solver: no solver is called {show_value(word)}; {suggestion(word, known, 'the words are')}")
    found = [each for each in every if set(_words(words)) <= set(_words(f"{each[0]} {each[1]}D {each[2]}"))]
    if not found:
        labels = one_of(f"{equation} {dims}D {name}" for equation, dims, name, _ in every)
        raise ConfigError(f"solver: no solver is {show_value(words)}; there are {labels}")
    return found


@contextlib.contextmanager
def _double() -> Iterator[None]:
    """Double precision while closures are checked, whatever the caller has chosen."""
    before = jax.config.jax_enable_x64  # pyright: ignore[reportAttributeAccessIssue]
    jax.config.update("jax_enable_x64", True)
    try:
        yield
    finally:
        jax.config.update("jax_enable_x64", before)


def _part_of(use: str | type, given: Mapping[str, Any], folder: Path) -> tuple[Part, Path | None]:
    """The class with its arguments, checked, and the user's own file that it stands in."""
    path, folders = None, [folder]
    if isinstance(use, type):
        cls, use = check_kind(use, "closure", "check"), use.__name__
    else:
        # a path on the command line may lead anywhere, unlike one in a YAML
        file, _, name = use.rpartition(":")
        if file.endswith(".py"):
            path = (folder / file).resolve()
            use, folders = f"{path.name}:{name}", [path.parent]
        cls = find_class(use, catalogue("closures"), "closure", "check", folders).cls
    if path is None:
        with contextlib.suppress(TypeError, OSError):
            path = Path(inspect.getfile(cls)).resolve()
    return make_part(use, cls, given, (cls.__name__,), FROM_RUN, folders), path


def _built(part: Part, solver: AbstractSolver) -> AbstractClosure:
    supplied = {"dims": solver.grid.ndim, "grid": solver.grid, "variables": solver.variables, "key": jax.random.key(0)}
    supplied["free_weights"] = solver.free_weights()
    with warnings.catch_warnings():
        # said in our own words, with the name of the field
        warnings.filterwarnings("ignore", message="A JAX array is being set as static")
        return blank(lambda: part.build(**supplied))


def closure_lines(
    use: str | type,
    given: Mapping[str, Any] | None = None,
    folder: Path = Path(),
    *,
    solver: str | None = None,
    quick: bool = False,
) -> list[Line]:
    """Every check of the closure that `use` names, or is, with the arguments `given`, in every solver of the catalogue.

    `solver` are words that its label must have, for example `navier_stokes 2D` or `spectral`; `quick` takes each solver in the
    fewest dimensions that the closure is made for.
    """
    with _double():
        return _closure_lines(use, given or {}, folder, solver, quick)


def _closure_lines(use: str | type, given: Mapping[str, Any], folder: Path, words: str | None, quick: bool) -> list[Line]:
    part, path = _part_of(use, given, folder)
    if sentence := _call_sentence(part.cls):
        return [Line("call", "every solver", "wrong arguments", "(view, memory, key)", False, sentence)]
    (place,) = (p for p in PLACES if issubclass(part.cls, p))
    families: dict[str, list[list[Line]]] = {}
    refusals: list[ConfigError] = []
    built, settled, first = 0, set(), True
    for equation, dims, name, made in solvers_to_check(words):
        if quick and (equation, name) in settled:
            continue
        found = families.setdefault(f"{equation} {dims}D", [])
        label = f"{equation} {dims}D {name}"
        if place not in made.places:
            found.append([Line("place", label, f"{place.__name__} is not taken", ", ".join(p.__name__ for p in made.places), None)])
            continue
        solver = made(Grid(*BOXES[dims]), load_class(catalogue("equations")[equation])())  # pyright: ignore[reportCallIssue]
        built += 1
        try:
            closure = _built(part, solver)
        except ConfigError as error:
            refusals.append(error)
            found.append([Line("shape", label, str(error), "", False, str(error))])
            continue
        lines = _Checks(label, solver, closure, path, first).lines
        found.append(lines)
        if not _refused(lines):
            settled.add((equation, name))
            first = False
    if refusals and len(refusals) == built:
        raise refusals[0]
    fits = [family for family, found in families.items() if not all(_refused(each) or _not_taken(each) for each in found)]
    lines = []
    for family, found in families.items():
        if fits and family not in fits and not any(_not_taken(each) for each in found):
            lines.append(Line("place", family, f"not made for this family: {found[0][-1].value}", "", None))
        else:
            lines += [line for each in found for line in each]
    if not any(line.check == "place" and line.passed for line in lines) and not any(line.passed is False for line in lines):
        sentence = f"no solver of {words or 'the catalogue'} takes {_a(place)} closure"
        lines.append(Line("place", "every solver", "no solver takes this place", "one", False, sentence))
    return lines


def sentences(lines: Sequence[Line]) -> list[str]:
    """`check: what was found, what is possible`, once per violation, with the solvers that it was found in."""
    failed: dict[str, list[Line]] = {}
    for line in lines:
        if line.passed is False:
            failed.setdefault(line.check.partition(",")[0].partition(" ⟨")[0], []).append(line)
    out = []
    for check, those in failed.items():
        # an array of a wrong shape says more than a channel that a solver does not have
        chosen = min(those, key=lambda line: " raised " in line.sentence)
        labels = list(dict.fromkeys(line.solver for line in (chosen, *those)))
        more = f" and {len(labels) - 1} more" if len(labels) > 1 else ""
        out.append(f"{check}: {chosen.sentence} ({labels[0]}{more})")
    return out


def violations(closure: str | type, /, *, solver: str | None = None, quick: bool = False, **arguments: Any) -> list[str]:
    """What a closure breaks of the contract, one sentence each; empty if nothing.

    **Arguments:** `closure`: the class itself, `path/to/file.py:Class`, `package.module:Class`, or a short name of the catalogue;
    `arguments` of its constructor, as YAML would write them. `solver` and `quick` choose where it is checked, as in
    `closure_lines`.

    >>> violations("smagorinsky", solver="kuramoto_sivashinsky finite_volume", cs=0.2)
    []
    """
    try:
        return sentences(closure_lines(closure, arguments, solver=solver, quick=quick))
    except ConfigError as error:
        return [str(error)]


def assert_contract(closure: str | type, /, *, solver: str | None = None, quick: bool = False, **arguments: Any) -> None:
    """A test of a closure in one line: an `AssertionError` with one sentence per violation, or nothing.

    **Arguments:** those of `violations`.
    """
    __tracebackhide__ = True
    if found := violations(closure, solver=solver, quick=quick, **arguments):
        name = closure.__name__ if isinstance(closure, type) else closure
        raise AssertionError("\n".join([f"{name} breaks the contract of closures", *(f"- {sentence}" for sentence in found)]))


def check_closure(use: str, arguments: Sequence[str], console: "Console", solver: str | None = None, quick: bool = False) -> int:
    """Print the table and what failed; 0 if every line with a limit passed, else 1. `arguments` are `key=value`."""
    from rich.markup import escape
    from rich.table import Table

    given: dict[str, Any] = {}
    for argument in arguments:
        name, sign, text = argument.partition("=")
        if not sign or not name.isidentifier():
            raise ConfigError(f"{argument[:80]}: an argument of the closure is key=value, for example width=8")
        given[name] = parse_yaml(text, name, (name,))
    lines = closure_lines(use, given, solver=solver, quick=quick)
    table = Table(title=escape(use), title_justify="left", title_style="bold")
    for column in ("check", "solver", "found", "limit"):
        table.add_column(column, overflow="fold")
    table.add_column("", no_wrap=True)
    words = {True: "[green]pass[/]", False: "[bold red]FAIL[/]", None: "[dim]note[/]"}
    for line in lines:
        table.add_row(*(escape(cell) for cell in line[:4]), words[line.passed])
    console.print(table)
    for sentence in sentences(lines):
        console.print(f"- {sentence}", markup=False, soft_wrap=True)
    failed = sum(line.passed is False for line in lines)
    console.print(f"{failed} of {len(lines)} checks failed" if failed else "all checks passed")
    return 1 if failed else 0
