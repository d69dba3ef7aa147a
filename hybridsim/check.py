"""Does a closure keep what it promises? Shape, conservation, finiteness, gradients, precision and symmetry, in every solver.

Each line of the table is one number and its limit. The weights are random and large (standard deviations 0.1 to 100): what holds
for them holds for any training.
"""

import math
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from hybridsim.config import (
    FROM_RUN,
    ConfigError,
    blank,
    catalogue,
    find_class,
    load_class,
    make_part,
    parse_yaml,
    solver_tables,
)
from hybridsim.contract import (
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
from hybridsim.yaml_reader import first_line

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


class Line(NamedTuple):
    """One line of the table; `passed` is None where a number is reported without a limit."""

    check: str
    solver: str
    value: str
    limit: str
    passed: bool | None


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


def _jit(function: Callable) -> Callable:
    # small grids, run once: what the compiler saves at run time it would lose many times over
    return jax.jit(function, compiler_options={"xla_backend_optimization_level": "0"})


class _Case:
    """A closure in one solver, in one precision."""

    def __init__(self, solver: AbstractSolver, closure: AbstractClosure, dtype: str):
        self.solver, self.closure, self.dtype = solver, _cast(closure, dtype), dtype
        self.static = eqx.partition(closure, eqx.is_inexact_array)[1]
        self.compiled = _jit(lambda arrays, u: self.output(arrays, u))
        self.u = random_state(solver, dtype)

    def arrays(self, spread: float, seed: int) -> Any:
        """Every floating-point array of the closure, drawn from N(0, spread²)."""
        rng = np.random.default_rng(seed)
        given = eqx.filter(self.closure, eqx.is_inexact_array)
        return jax.tree.map(lambda a: jnp.asarray(spread * rng.standard_normal(a.shape), a.dtype), given)

    def output(self, arrays: Any, u: Array) -> Array:
        closure = eqx.combine(arrays, self.static)
        view = View(u, jnp.zeros((), u.dtype), jnp.asarray(TIME_STEP, u.dtype), self.solver.prepare(u.dtype))
        memory = closure.init_memory(view)
        out = closure(view, memory, jax.random.key(3) if closure.stochastic else None)
        return out if memory is None else out[0]

    def step(self, closure: AbstractClosure, stepper: Any, u: Array) -> Array:
        model = Model(self.solver, stepper, TIME_STEP, (closure,))
        z, _, _ = model(model.solver.prepare(u.dtype).encode(u), model.init_carry(u), jnp.asarray(0))
        return model.solver.decode(z)


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
    return _jit(lambda u: solver.project(u))(jnp.asarray(u, dtype))


def _norm(tree: Any) -> float:
    return math.sqrt(sum(float(np.sum(np.abs(np.asarray(a, np.float64)) ** 2)) for a in jax.tree.leaves(tree)))


def _inner(a: Any, b: Any) -> float:
    pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    return math.fsum(float(np.vdot(np.asarray(x, np.float64), np.asarray(y, np.float64))) for x, y in pairs)


def _draw(tree: Any, seed: int) -> Any:
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda a: jnp.asarray(rng.standard_normal(a.shape), a.dtype), tree)


def wide_values(jaxpr: Any) -> set[str]:
    """The float64 and complex128 values anywhere in a jaxpr."""
    found: set[str] = set()

    def visit(inner: Any) -> None:
        for eqn in inner.eqns:
            for variable in (*eqn.invars, *eqn.outvars):
                if getattr(variable.aval, "dtype", None) in (np.float64, np.complex128):
                    found.add(f"{eqn.primitive} {variable.aval.str_short()}")
            for parameter in eqn.params.values():
                for part in parameter if isinstance(parameter, tuple | list) else (parameter,):
                    if hasattr(part, "eqns"):
                        visit(part)
                    elif hasattr(part, "jaxpr"):
                        visit(part.jaxpr)

    visit(jaxpr.jaxpr)
    return found


# --- the checks ------------------------------------------------------------------------------------------------------------------


def conservation(case: _Case, stepper: Any) -> float:
    """|Σu₁ − Σu₀| / (Σ|u| + Δt/Δx Σ|F|), the worst channel and spread of weights, after one forward Euler step.

    Where the output is no flux, but weights, Σ|u₁| takes the place of the fluxes.
    """
    solver = case.solver
    u = case.u
    place = place_of(case.closure)
    step = _jit(lambda out, u: (case.step(_GIVEN[place](out), stepper, u), solver.decode(solver.encode(u))))
    worst = 0.0
    for i, spread in enumerate(SPREADS):
        out = case.compiled(case.arrays(spread, i), u)
        after, before = (np.asarray(a, np.float64) for a in step(out, u))
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


def not_finite(case: _Case) -> dict[str, int]:
    """Values that are not finite, in the output and in its gradients: at rest, in a uniform flow, in a random one."""
    u = case.u
    resting, uniform = (uniform_state(case.solver, value, u.dtype) for value in (0.0, 1.0))
    flows = {"at rest": resting, "uniform flow": uniform, "random flow": u}
    arrays = case.arrays(1.0, 0)

    @_jit
    def all_of(arrays, u):
        out, pull = jax.vjp(case.output, arrays, u)
        return out, pull(jnp.ones_like(out))

    def count(flow: Array) -> int:
        return sum(int(np.sum(~np.isfinite(np.asarray(a)))) for a in jax.tree.leaves(all_of(arrays, flow)))

    return {name: count(flow) for name, flow in flows.items()}


def adjoint(case: _Case) -> tuple[float, float]:
    """|⟨Jv, w⟩ − ⟨v, Jᵀw⟩| / (|Jv| |w|) of the closure in state and parameters, and |Jv − finite difference| / |Jv|."""
    at = (case.arrays(0.3, 1), case.u)
    tangent = _draw(at, 2)

    @_jit
    def both(at, tangent, cotangent):
        _, pull = jax.vjp(case.output, *at)
        return jax.jvp(case.output, at, tangent)[1], pull(cotangent)

    cotangent = _draw(jax.eval_shape(case.output, *at), 4)
    forward, back = both(at, tangent, cotangent)
    size = max(_norm(forward), 1e-300)
    gap = abs(_inner(forward, cotangent) - _inner(tangent, back)) / (size * _norm(cotangent))
    h = 1e-5
    plus, minus = (case.compiled(*jax.tree.map(lambda a, v, s=s: a + s * h * v, at, tangent)) for s in (1, -1))
    return gap, _norm(forward - (plus - minus) / (2 * h)) / size


def precision(case: _Case, stepper: Any) -> set[str]:
    """What of a float32 step is computed in float64."""
    u = case.u
    model = Model(case.solver, stepper, TIME_STEP, (case.closure,))
    prepared = eqx.filter_eval_shape(model.prepare, u.dtype)
    z, carry = jax.eval_shape(case.solver.encode, u), jax.eval_shape(model.init_carry, u)
    step = lambda model, prepared, z, carry: model(z, carry, jnp.asarray(0, jnp.int32), prepared)[0]  # noqa: E731
    return wide_values(eqx.filter_make_jaxpr(step)(model, prepared, z, carry)[0])


def translation(case: _Case) -> float:
    """|m(shifted u) − shifted m(u)| / |m(u)| for a shift by whole cells."""
    u = case.u
    axes, cells = tuple(range(-case.solver.grid.ndim, 0)), tuple(range(2, 2 + case.solver.grid.ndim))
    arrays = case.arrays(0.3, 1)
    here = np.roll(np.asarray(case.compiled(arrays, u)), cells, axes)
    there = np.asarray(case.compiled(arrays, jnp.roll(u, cells, axes)))
    return _norm(here - there) / max(_norm(here), 1e-300)


# --- all of them -----------------------------------------------------------------------------------------------------------------


def _failure(error: Exception, file: Path | None) -> str:
    """The error in one line, with the line of the user's own file that raised it."""
    own = [f for f in traceback.extract_tb(error.__traceback__) if file is not None and Path(f.filename) == file]
    where = f" ({Path(own[-1].filename).name}:{own[-1].lineno})" if own else ""
    return f"{type(error).__name__}: {first_line(error)}{where}"


def _refused(lines: list[Line]) -> bool:
    """Whether a closure gave nothing that fits in a solver: it may be made for another number of dimensions."""
    return lines[-1].check == "shape" and lines[-1].passed is False


def _not_taken(lines: list[Line]) -> bool:
    """Whether a solver does not take the closure's place."""
    return lines[-1].check == "place" and lines[-1].passed is None


def _checks_in(name: str, solver: AbstractSolver, closure: AbstractClosure, file: Path | None) -> list[Line]:
    lines: list[Line] = []
    names = {"forward_euler": "forward_euler", "default": "ssprk3" if solver.linear() is None else "etdrk4"}
    steppers = {key: load_class(catalogue("steppers")[value])() for key, value in names.items()}

    def add(check: str, value: Any, limit: str, passed: bool | None) -> None:
        lines.append(Line(check, name, f"{value:.1e}" if isinstance(value, float) else str(value), limit, passed))

    def attempt(check: str, action: Callable[[], None]) -> bool:
        try:
            action()
        except Exception as error:  # whatever a user's closure may raise
            add(check, _failure(error, file), "", False)
            return False
        return True

    place = place_of(closure)
    if place not in solver.places:
        add("place", f"{place.__name__} is not taken", ", ".join(p.__name__ for p in solver.places), None)
        return lines
    add("place", place.__name__, "", True)
    wide, narrow = _Case(solver, closure, "float64"), _Case(solver, closure, "float32")
    wanted = (len(solver.variables), *solver.grid.shape)
    if place is Flux:
        wanted = (solver.grid.ndim, *wanted)
    elif place is Interpolation:
        wanted = (solver.grid.ndim, 2, wanted[0], solver.free_weights(), *wanted[1:])

    def shape() -> None:
        out = eqx.filter_eval_shape(wide.output, wide.arrays(1.0, 0), wide.u)
        found = getattr(out, "shape", type(out).__name__)
        add("shape", found, str(wanted), found == wanted)

    if not attempt("shape", shape) or not lines[-1].passed:
        return lines

    def sums() -> None:
        for case in (wide, narrow):
            drift, limit = conservation(case, steppers["forward_euler"]), LIMITS[case.dtype]
            if place in _CONSERVING:
                add(f"conservation, {case.dtype}", drift, f"≤ {limit:.0e}", drift <= limit)
            else:
                add(f"conservation, {case.dtype}", drift, f"a {place.__name__} need not", None)

    def finite() -> None:
        for flow, count in not_finite(wide).items():
            add(f"finite, {flow}", count, "0 values and gradients", count == 0)

    def gradients() -> None:
        gap, difference = adjoint(wide)
        add("adjoint ⟨Jv,w⟩ = ⟨v,Jᵀw⟩", gap, "≤ 1e-12", gap <= 1e-12)
        add("gradient against differences", difference, "reported", None)

    def dtypes() -> None:
        found = precision(narrow, steppers["default"])
        add("float32 stays float32", ", ".join(sorted(found)[:3]) or "no float64", "no float64", not found)

    def shifts() -> None:
        add("translation", translation(wide), "reported", None)

    for check, action in (
        ("conservation", sums),
        ("finite", finite),
        ("adjoint", gradients),
        ("float32", dtypes),
        ("translation", shifts),
    ):
        attempt(check, action)
    return lines


def closure_lines(use: str, arguments: Sequence[str], folder: Path) -> list[Line]:
    """Every check of the closure that `use` names, with `key=value` arguments, in every solver of the catalogue."""
    given: dict[str, Any] = {}
    for argument in arguments:
        name, sign, text = argument.partition("=")
        if not sign or not name.isidentifier():
            raise ConfigError(f"{argument[:80]}: an argument of the closure is key=value, for example width=8")
        given[name] = parse_yaml(text, name, (name,))
    # a path on the command line may lead anywhere, unlike one in a YAML
    file, _, cls = use.rpartition(":")
    if file.endswith(".py"):
        path = (folder / file).resolve()
        use, folders = f"{path.name}:{cls}", [path.parent]
    else:
        path, folders = None, [folder]
    origin = find_class(use, catalogue("closures"), "closure", "check", folders)
    part = make_part(use, origin.cls, given, (origin.cls.__name__,), FROM_RUN)
    families: dict[str, list[list[Line]]] = {}
    refusals: list[ConfigError] = []
    for equation, table in solver_tables().items():
        physics = load_class(catalogue("equations")[equation])()
        for dims in sorted({d for by_dims in table.values() for d in by_dims}):
            found = families[f"{equation} {dims}D"] = []
            for name, by_dims in sorted(table.items()):
                if dims not in by_dims:
                    continue
                made = load_class(by_dims[dims])
                if made.hosted:
                    continue
                solver = made(Grid(*BOXES[dims]), physics)
                supplied = {"dims": dims, "grid": solver.grid, "variables": solver.variables, "key": jax.random.key(0)}
                supplied["free_weights"] = solver.free_weights()
                label = f"{equation} {dims}D {name}"
                try:
                    closure = blank(lambda supplied=supplied: part.build(**supplied))
                except ConfigError as error:
                    refusals.append(error)
                    found.append([Line("shape", label, str(error), "", False)])
                else:
                    found.append(_checks_in(label, solver, closure, path))
    if len(refusals) == sum(len(found) for found in families.values()):
        raise refusals[0]
    fits = [family for family, found in families.items() if not all(_refused(each) or _not_taken(each) for each in found)]
    lines: list[Line] = []
    for family, found in families.items():
        if fits and family not in fits and not any(_not_taken(each) for each in found):
            lines.append(Line("place", family, f"not made for this family: {found[0][-1].value}", "", None))
        else:
            lines += [line for each in found for line in each]
    if not any(line.check == "place" and line.passed for line in lines) and not any(line.passed is False for line in lines):
        lines.append(Line("place", "every solver", "no solver takes this place", "one", False))
    return lines


def check_closure(use: str, arguments: Sequence[str], console: "Console") -> int:
    """Print the table; 0 if every line with a limit passed, else 1."""
    from rich.markup import escape
    from rich.table import Table

    lines = closure_lines(use, arguments, Path())
    table = Table(title=escape(use), title_justify="left", title_style="bold")
    for column in ("check", "solver", "found", "limit"):
        table.add_column(column, overflow="fold")
    table.add_column("", no_wrap=True)
    words = {True: "[green]pass[/]", False: "[bold red]FAIL[/]", None: "[dim]note[/]"}
    for line in lines:
        table.add_row(*(escape(cell) for cell in line[:4]), words[line.passed])
    console.print(table)
    failed = sum(line.passed is False for line in lines)
    console.print(f"{failed} of {len(lines)} checks failed" if failed else "all checks passed")
    return 1 if failed else 0
