"""u(t + n Δt) = Φⁿ(u(t)): one coarse step, and rollouts through thousands of them in bounded memory."""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import equinox as eqx
import equinox.internal as eqxi
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, PyTree

from hybridsim.compilation import SolverJit, written_anew
from hybridsim.contract import (
    KEPT,
    AbstractClosure,
    AbstractSolver,
    AbstractStepper,
    Flux,
    Interpolation,
    PostStep,
    Replacement,
    Source,
    View,
    full_step,
    place_of,
)
from hybridsim.samples import gathered, over_samples, padded

Evaluate = str | int
"""`"stage"`, `"step"` or a whole number n of solver steps for which a closure's output is held."""

TOGETHER_CELLS = 2**15
"""Samples of an ensemble are stepped in groups of about as many cells on a CPU core."""

MOST_STEPS = 100_000
"""An adaptive model that needs more model steps than this for one frame interval is taken to have blown up."""

NO_REVERSE = (
    "courant: a model with adaptive time steps cannot be differentiated in reverse (the number of its steps is known only as it "
    "runs); train with a fixed dt (courant=None), or differentiate forward (jax.jvp, jax.jacfwd)"
)


class State(eqx.Module):
    """(u, t, carry): the fields of one moment and all that a run needs to go on exactly as it would have.

    - `u`: the channels in physical space; `(sample, c, *grid)` in an ensemble.
    - `step`: model steps so far, of the model's own Δt: with adaptive time steps a measure of time, not a count.
    - `t`: time, t₀ + step · Δt, in double precision on the host.
    - `carry`: closures' memory and random keys, the forcing ledger; None before the first step.
    """

    u: Float[Array, "*sample_c_grid"]
    step: Int[Array, ""] | int = 0
    t: float = eqx.field(default=0.0)
    carry: PyTree = None


class Prepared(NamedTuple):
    """What a rollout computes once: the solver with its constant arrays, and the stepper's coefficients."""

    solver: AbstractSolver
    coefficients: PyTree
    dt: Array


def _compensated_add(total: tuple[Array, Array], value: Array) -> tuple[Array, Array]:
    """(sum, lost) + value without losing low bits (Neumaier 1974, doi:10.1002/zamm.19740540106)."""
    high, low = total
    new = high + value
    lost = jnp.where(jnp.abs(high) >= jnp.abs(value), (high - new) + value, (value - new) + high)
    return new, low + lost


def _listed(given: Evaluate | Sequence[Evaluate]) -> tuple[Evaluate, ...]:
    return (given,) if isinstance(given, str | int) else tuple(given)


class Model(eqx.Module):
    """z ← Φ(z): one model step, `substeps` solver steps of size Δt with the closures in their places.

    **Arguments:**

    - `solver`, `stepper`: how the equation is discretised in space and in time.
    - `dt`: Δt of one solver step, a time; a model step advances `substeps · dt`.
    - `closures`: Flux and Source closures are added up, and so are the weights of Interpolation closures; PostStep closures act one
      after another. A Replacement closure takes every step itself, and stands alone: of the solver it needs the grid, the
      variables, the filter and the constraints, of the stepper nothing.
    - `evaluate`: per closure (or one for all) `"stage"`, `"step"` or n, the solver steps for which its output is held; n divides
      `substeps`, so that nothing held crosses a model step.
    - `substeps`: solver steps per model step.
    - `courant`: None, and Δt is fixed; or the Courant number C > 0 of adaptive time steps, about 0.5. `dt` is then the largest
      step.

    A held contribution is constant in every stage: first order in time. Wrong places are refused here, before any tracing.

    Adaptive steps land on every frame: an interval T, or what remains of it, is cut into n = ⌈T / min(`dt`, C · stable Δt)⌉ equal
    solver steps (n a multiple of `substeps`). Steppers whose coefficients know Δt choose it at the start of each interval, all
    others before each model step. The carry then has `steps_taken` (model steps) and `smallest_dt`. Reverse differentiation, and so
    training, needs a fixed Δt. A flow that starts from rest has no Courant number: give it a `dt` that it can start with.
    """

    solver: AbstractSolver
    stepper: AbstractStepper
    dt: float = eqx.field(static=True, converter=float)
    closures: tuple[AbstractClosure, ...] = eqx.field(default=(), converter=tuple)
    evaluate: tuple[Evaluate, ...] = eqx.field(static=True, default=(), converter=_listed)
    substeps: int = eqx.field(static=True, default=1)
    courant: float | None = eqx.field(static=True, default=None, converter=lambda c: None if c is None else float(c))

    def __post_init__(self):
        given = _listed(self.evaluate) or ("step",)
        if len(given) == 1:
            given = given * len(self.closures)
        self.evaluate = tuple(1 if e == "step" else e for e in given)

    def __check_init__(self):
        if not (np.isfinite(self.dt) and self.dt > 0):
            raise ValueError(f"dt: the time step must be positive and finite, found {self.dt}")
        if not isinstance(self.substeps, int) or self.substeps < 1:
            raise ValueError(f"substeps: needs a positive whole number, found {self.substeps!r}")
        if self.courant is not None and not (np.isfinite(self.courant) and self.courant > 0):
            raise ValueError(
                f"courant: the Courant number must be positive and finite, or None for a fixed dt, found {self.courant}"
            )
        if len(self.evaluate) != len(self.closures):
            raise ValueError(f"evaluate: {len(self.evaluate)} entries for {len(self.closures)} closures")
        if self.solver.hosted and not self.stepper.hosted:
            raise ValueError(f"stepper: {type(self.solver).__name__} is stepped as a whole by the code that it hosts; leave it out")
        if self.stepper.hosted and not self.solver.hosted:
            raise ValueError(f"stepper: {type(self.stepper).__name__} is for hosted solvers, not for {type(self.solver).__name__}")
        if self.stepper.needs_linear and self.solver.linear() is None:
            raise ValueError(
                f"stepper: {type(self.stepper).__name__} needs a linear part, which {type(self.solver).__name__} does not offer; "
                "use an explicit one: forward_euler, ssprk2 or ssprk3"
            )
        self.stepper.check(self.solver, self.closures)
        for i, (closure, when) in enumerate(zip(self.closures, self.evaluate, strict=True)):
            place = place_of(closure)
            if place not in self.solver.places:
                offered = ", ".join(p.__name__ for p in self.solver.places)
                raise ValueError(
                    f"corrections[{i}]: {type(closure).__name__} is a {place.__name__} closure, which {type(self.solver).__name__} "
                    f"does not take; it takes {offered}"
                )
            if place is Replacement:
                if len(self.closures) > 1:
                    j = 0 if i else 1
                    raise ValueError(
                        f"corrections[{i}]: {type(closure).__name__} is a Replacement closure, which takes the whole step and "
                        f"stands alone; remove corrections[{j}], {type(self.closures[j]).__name__}"
                    )
                if when not in (1, "step"):
                    raise ValueError(
                        f"corrections[{i}].evaluate: a Replacement closure is the step itself; found {when!r}, use 'step'"
                    )
            if when == "stage":
                if place is PostStep:
                    raise ValueError(f"corrections[{i}].evaluate: a PostStep closure acts after steps, not stages")
            elif not isinstance(when, int) or when < 1 or self.substeps % when:
                raise ValueError(
                    f"corrections[{i}].evaluate: needs 'stage', 'step' or a number of solver steps that divides substeps = "
                    f"{self.substeps}, found {when!r}"
                )

    @property
    def step_time(self) -> float:
        """The time that one model step advances; with adaptive time steps the unit in which `step` counts time."""
        return self.dt * self.substeps

    def prepare(self, dtype: Any) -> Prepared:
        """Constants and coefficients in `dtype`; call it outside the scan."""
        solver = self.solver.prepare(dtype)
        return Prepared(solver, self.stepper.prepare(solver, self.dt, dtype), jnp.asarray(self.dt, dtype))

    @property
    def together(self) -> int:
        """How many samples of an ensemble one CPU core steps at once.

        On a line most of a step's time would go to calls: samples in groups cost a third to a tenth there. Elsewhere each is
        stepped alone, so that its bits do not depend on how many others there are. Adaptive steps are each sample's own.
        """
        if self.courant is not None or self.solver.grid.ndim > 1:
            return 1
        return max(1, min(32, TOGETHER_CELLS // math.prod(self.solver.grid.shape)))

    def try_closures(self, u: Float[Array, "c *grid"]) -> None:
        """Evaluates every closure once on u; raises what is wrong with its output."""
        view = View(u, jnp.zeros((), u.dtype), jnp.asarray(self.dt, u.dtype), self.solver.prepare(u.dtype))
        slots = self.init_carry(u)["closures"]
        for i, closure in enumerate(self.closures):
            out, _ = self._call(i, view, slots[i])
            self._shape_check(i, out, place_of(closure), view)

    def init_carry(self, u: Float[Array, "c *grid"], seed: int | Array = 0, start: float | Array = 0.0) -> PyTree:
        """Every slot that a run carries, at its start. `seed` (an int or a key) feeds the stochastic closures; `start` is the time
        of step 0."""
        key = jax.random.key(seed) if isinstance(seed, int) else seed
        view = View(u, jnp.zeros((), u.dtype), jnp.asarray(self.dt, u.dtype), self.solver.prepare(u.dtype))
        closures = []
        for i, closure in enumerate(self.closures):
            slot: dict[str, Any] = {}
            memory = closure.init_memory(view)
            if memory is not None:
                if self.evaluate[i] == "stage":
                    raise ValueError(f"corrections[{i}].evaluate: a closure with memory cannot be evaluated at every stage")
                slot["memory"] = memory
            if closure.stochastic:
                slot["key"] = jax.random.fold_in(key, i)
            closures.append(slot)
        zero = jnp.zeros((len(self.solver.ledger_rows),), u.dtype)
        carry = {"closures": closures, "ledger": (zero, zero), "start": jnp.asarray(start, u.dtype)}
        if self.courant is not None:
            carry |= {"steps_taken": jnp.zeros((), jnp.int32), "smallest_dt": jnp.asarray(jnp.inf, u.dtype)}
        return carry

    # -- one step ---------------------------------------------------------------------------------------------------------------

    def _call(self, i: int, view: View, slot: dict[str, Any]) -> tuple[Array, dict[str, Any]]:
        """One evaluation of closure i, and its slot afterwards."""
        closure = self.closures[i]
        new = dict(slot)
        key = None
        if "key" in slot:
            new["key"], key = jax.random.split(slot["key"])
        with jax.named_scope(type(closure).__name__):
            out = closure(view, slot.get("memory"), key)
        if "memory" in slot:
            out, new["memory"] = out
        return out, new

    def _shape_check(self, i: int, out: Array, place: type, view: View) -> None:
        c, axes = len(view.variables), view.grid.ndim
        want = (c, *view.grid.shape)
        if place is Flux:
            want = (axes, *want)
        elif place is Interpolation:
            want = (axes, 2, c, view.solver.free_weights(), *view.grid.shape)
        if out.shape != want:
            raise ValueError(f"corrections[{i}]: {type(self.closures[i]).__name__} must return shape {want}, found {out.shape}")

    def _contribution(self, which: Sequence[int], view: View, slots: list[dict[str, Any]]) -> tuple[PyTree, list[dict[str, Any]]]:
        """Σ of the outputs of the closures `which`, in the solver's own form; None if there are none."""
        total: dict[type, Array] = {}
        slots = list(slots)
        for i in which:
            place = place_of(self.closures[i])
            out, slots[i] = self._call(i, view, slots[i])
            self._shape_check(i, out, place, view)
            out = out.astype(view.u.dtype)
            total[place] = total[place] + out if place in total else out
        flux, source = total.get(Flux), total.get(Source)
        part = {} if flux is None and source is None else view.solver.receive(flux, source)
        if Interpolation in total:
            part = {**part, **view.solver.receive_weights(total[Interpolation])}
        return part or None, slots

    def _solver_steps(self, prepared: Prepared, z: PyTree, slots: list, t: Array, count: int) -> tuple[PyTree, list]:
        """`count` solver steps in a row."""
        solver, coefficients, dt = prepared
        if self.closures and isinstance(self.closures[0], Replacement):
            for k in range(count):
                z, slots = self._changed(0, solver, z, slots, t + k * dt, dt)
            return z, slots
        tendencies = [i for i, c in enumerate(self.closures) if isinstance(c, Flux | Source | Interpolation)]
        staged = [i for i in tendencies if self.evaluate[i] == "stage"]
        afterwards = [i for i, c in enumerate(self.closures) if isinstance(c, PostStep)]
        held: dict[int, PyTree] = {}

        def step(z: PyTree, slots: list, now: Array) -> tuple[PyTree, list]:
            """One step with what is held, and with what is evaluated at every stage."""
            constant = _sum([part for part in held.values() if part is not None])

            def tendency(q, time):
                if not staged:
                    return constant
                part, _ = self._contribution(staged, View(solver.decode(q), time, dt, solver), slots)
                return _sum([p for p in (constant, part) if p is not None])

            with jax.named_scope(type(self.stepper).__name__):
                z = full_step(solver, self.stepper, coefficients, z, now, dt, tendency)
            for i in staged:
                if "key" in slots[i]:
                    slots = [*slots[:i], {**slots[i], "key": jax.random.split(slots[i]["key"])[0]}, *slots[i + 1 :]]
            return z, slots

        periods = [n for n in self.evaluate if isinstance(n, int)]
        stops = [k for k in range(count) if k == 0 or any(k % n == 0 for n in periods)]
        for k, following in zip(stops, [*stops[1:], count], strict=True):
            now, row = t + k * dt, following - k
            groups: dict[int, list[int]] = {}
            for i in tendencies:
                n = self.evaluate[i]
                if isinstance(n, int) and k % n == 0:
                    groups.setdefault(n, []).append(i)
            if groups:
                view = View(solver.decode(z), now, dt, solver)
                for n, which in groups.items():
                    held[n], slots = self._contribution(which, View(view.u, now, dt, solver, n), slots)
            if row == 1:
                z, slots = step(z, slots, now)
            else:
                # A loop, not `row` copies of the step: compiled sooner, and on CPU quicker too.
                body = lambda state, j, now=now: (step(state[0], state[1], now + j * dt), None)  # noqa: E731
                (z, slots), _ = jax.lax.scan(body, (z, slots), jnp.arange(row).astype(t.dtype))
            for i in afterwards:
                if following % self.evaluate[i] == 0:  # pyright: ignore[reportOperatorIssue]
                    z, slots = self._changed(i, solver, z, slots, t + following * dt, dt)
        return z, slots

    def _changed(self, i: int, solver: AbstractSolver, z: PyTree, slots: list, t: Array, dt: Array) -> tuple[PyTree, list]:
        """P(u + d), d the output of closure i at time t; what z holds beside the flow is kept, and new events are added."""
        view = View(solver.decode(z), t, dt, solver)
        out, slot = self._call(i, view, slots[i])
        self._shape_check(i, out, PostStep, view)
        new = solver.encode(view.u + out.astype(view.u.dtype))
        kept = {name: z[name] for name in KEPT if name in z}
        if "events" in new:
            kept["events"] = z["events"] + new["events"]
        return {**new, **kept}, [*slots[:i], slot, *slots[i + 1 :]]

    def _model_step(self, prepared: Prepared, z: PyTree, carry: PyTree, t: Array) -> tuple[PyTree, PyTree]:
        """`substeps` solver steps of `prepared.dt` from time t."""
        block = int(np.lcm.reduce([e for e in self.evaluate if isinstance(e, int)] or [1]))
        slots = carry["closures"]
        if self.substeps == block:
            z, slots = self._solver_steps(prepared, z, slots, t, block)
        else:

            def body(state, k):
                z, slots = state
                return self._solver_steps(prepared, z, slots, t + k * block * prepared.dt, block), None

            blocks = jnp.arange(self.substeps // block).astype(t.dtype)
            (z, slots), _ = jax.lax.scan(body, (z, slots), blocks)
        z, injected = prepared.solver.collect(z)
        ledger = _compensated_add(carry["ledger"], injected)
        return z, {**carry, "closures": slots, "ledger": ledger}

    def _time(self, carry: PyTree, step: Array, dt: Array) -> Array:
        """t₀ + step · Δt: the time of a model step of Δt = `dt` · substeps."""
        return carry["start"] + step.astype(carry["start"].dtype) * (dt * self.substeps)

    def __call__(
        self, z: PyTree, carry: PyTree, step: Int[Array, ""], prepared: Prepared | None = None
    ) -> tuple[PyTree, PyTree, Int[Array, ""]]:
        """One model step of the solver's own representation: (z, carry, step) -> (z, carry, step + 1).

        With adaptive time steps it takes as many steps as `step_time` needs.
        """
        dtype = carry["start"].dtype
        prepared = self.prepare(dtype) if prepared is None else prepared
        if self.courant is not None:
            z, carry, _ = adaptive_steps(self, prepared, z, carry, step, 1)
            return z, carry, step + 1
        z, carry = self._model_step(prepared, z, carry, self._time(carry, step, prepared.dt))
        return z, carry, step + 1


def adaptive_steps(
    model: Model,
    prepared: Prepared,
    z: PyTree,
    carry: PyTree,
    step: Int[Array, ""],
    every: int,
    most: Int[Array, ""] | None = None,
) -> tuple[PyTree, PyTree, Array]:
    """Steps of Δt = R/n with n = substeps · ⌈R / (substeps · min(dt, C · stable Δt))⌉ until R = 0: (z, carry, R).

    R is what remains of the interval T = `every` · step_time that begins at `step`; `most` ends it after that many model steps. A
    flow that needs more than `MOST_STEPS` model steps has blown up: z is not finite then, and R is zero.
    """
    assert model.courant is not None
    courant, dtype = model.courant, carry["start"].dtype
    start = model._time(carry, step, prepared.dt)
    whole = jnp.asarray(every * model.step_time, dtype)
    budget = max(MOST_STEPS, 2 * every)
    # A ratio that is a whole number but for rounding must not be rounded up.
    slack = 1 - 64 * float(jnp.finfo(dtype).eps)

    def needed(z: PyTree, remaining: Array, left: Array) -> tuple[Array, Array]:
        """(n / substeps, whether that many model steps are left)."""
        # Δt is a choice, not a part of the flow: nothing is differentiated through it.
        u = jax.lax.stop_gradient(prepared.solver.decode(z))
        limit = jnp.minimum(courant * prepared.solver.stable_dt(u), prepared.dt).astype(dtype)
        count = jnp.ceil(remaining / (model.substeps * limit) * slack)
        possible = (count >= 1) & (count <= left.astype(dtype))
        return jnp.where(possible, count, 1), possible

    def counted(carry: PyTree, dt: Array, possible: Array) -> PyTree:
        smallest = jnp.where(possible, jnp.minimum(carry["smallest_dt"], dt), carry["smallest_dt"])
        return {**carry, "steps_taken": carry["steps_taken"] + possible.astype(jnp.int32), "smallest_dt": smallest}

    zero = jnp.zeros((), jnp.int32)
    last = jnp.asarray(2 * budget, jnp.int32) if most is None else most
    if model.stepper.needs_linear:
        count, alive = needed(z, whole, jnp.asarray(budget, jnp.int32))
        dt = whole / (count * model.substeps)
        paced = Prepared(prepared.solver, model.stepper.prepare(prepared.solver, dt, dtype), dt)
        until = jnp.minimum(jnp.where(alive, count, 0).astype(jnp.int32), last)

        def even(state):
            z, carry, k = state
            z, carry = model._model_step(paced, z, carry, start + k.astype(dtype) * (dt * model.substeps))
            return z, counted(carry, dt, alive), k + 1

        z, carry, k = jax.lax.while_loop(lambda state: state[2] < until, even, (z, carry, zero))
        remaining = jnp.where(alive, whole * (1 - k.astype(dtype) / count), 0)
    else:

        def adapted(state):
            z, carry, remaining, k, _ = state
            count, possible = needed(z, remaining, budget - k)
            dt = remaining / (count * model.substeps)
            z, carry = model._model_step(prepared._replace(dt=dt), z, carry, start + (whole - remaining))
            # A product, not a difference: exact to rounding however many steps there are, and zero at the end.
            remaining = jnp.where(possible, remaining * ((count - 1) / count), 0)
            return z, counted(carry, dt, possible), remaining, k + 1, possible

        state = (z, carry, whole, zero, jnp.ones((), bool))
        z, carry, remaining, _, alive = jax.lax.while_loop(lambda state: (state[2] > 0) & (state[3] < last), adapted, state)
    lost = lambda part: jax.tree.map(lambda a: jnp.where(alive, a, jnp.asarray(jnp.nan, a.dtype)), part)  # noqa: E731
    z = {name: part if name in KEPT else lost(part) for name, part in z.items()}
    z, carry = eqxi.nondifferentiable_backward((z, carry), msg=NO_REVERSE)
    return z, carry, remaining


def _sum(parts: list[dict[str, PyTree]]) -> dict[str, PyTree] | None:
    """What several groups of closures contribute, added up by name."""
    total: dict[str, PyTree] = {}
    for part in parts:
        added = {name: jax.tree.map(jnp.add, total[name], new) if name in total else new for name, new in part.items()}
        total = {**total, **added}
    return total or None


class Trajectory(eqx.Module):
    """u(t₁), …, u(t_F): frames of one rollout, the state at its end, and where and when they are.

    - `u`: frames `(frame, c, *grid)`.
    - `t`: their times, double precision on the host.
    - `final`: the `State` to go on from.
    """

    u: Float[Array, "frame c *grid"]
    t: tuple[float, ...] = eqx.field(static=True, converter=lambda t: tuple(float(x) for x in t))
    final: State
    solver: AbstractSolver

    def to_xarray(self):
        """The frames as an `xarray.Dataset` with coordinates and units (one sample)."""
        from hybridsim.diagnostics import field_dataset

        return field_dataset(np.asarray(self.u)[None], np.asarray(self.t), self.solver.grid, self.solver.variables, {})


class Ensemble(eqx.Module):
    """u⁽ˢ⁾(t₁), …, u⁽ˢ⁾(t_F): a `Trajectory` of every sample, at the same times; `ensemble[s]` is one of them.

    `final` is the `State` of all samples, to go on from; its `u` and its carry have the sample axis first.
    """

    u: Float[Array, "sample frame c *grid"]
    t: tuple[float, ...] = eqx.field(static=True, converter=lambda t: tuple(float(x) for x in t))
    final: State
    solver: AbstractSolver

    def __len__(self) -> int:
        return self.u.shape[0]

    def __getitem__(self, sample: int) -> Trajectory:
        final = State(self.final.u[sample], self.final.step, self.final.t, jax.tree.map(lambda a: a[sample], self.final.carry))
        return Trajectory(self.u[sample], self.t, final, self.solver)

    def to_xarray(self):
        """The frames as an `xarray.Dataset` with coordinates and units."""
        from hybridsim.diagnostics import field_dataset

        return field_dataset(np.asarray(self.u), np.asarray(self.t), self.solver.grid, self.solver.variables, {})


class Budget(NamedTuple):
    """Bytes that the values which a gradient keeps of a rollout may take."""

    bytes: float


def blocks_of(length: int, levels: int) -> tuple[int, ...]:
    """The lengths of the nested blocks that `levels` stands for, from the outermost to the innermost."""
    if levels <= 0:
        return ()
    if levels == 1 or length < 4:
        return (1,)
    inner = max(2, round(length ** ((levels - 1) / levels)))
    return (inner, *blocks_of(inner, levels - 1))


def blocks_within(length: int, state: int, residuals: int, budget: Budget) -> tuple[int, ...]:
    """The nested blocks that cost the fewest evaluations within a budget, else those that need the least.

    Of `length` steps everything is kept (`residuals` bytes a step), or a state (`state` bytes) for each block of b steps and
    everything of one block, ⌈length/b⌉ state + b residuals; or for blocks of blocks. Each depth evaluates every step once more.
    """

    @functools.cache
    def least(length: int, depth: int) -> tuple[int, tuple[int, ...]]:
        if depth == 0:
            return length * residuals, ()
        found = []
        for b in sorted({max(1, round(length ** (k / 64))) for k in range(65)}):
            inside, blocks = least(b, depth - 1)
            found.append((-(-length // b) * state + inside, (b, *blocks)))
        return min(found)

    plans = [least(length, depth) for depth in range(5)]
    return next((blocks for peak, blocks in plans if peak <= budget.bytes), min(plans)[1])


def _kept_bytes(step: Callable, state: PyTree) -> tuple[int, int]:
    """(bytes of a state, bytes that the gradient of a step with respect to it keeps)."""
    given, rest = eqx.partition(state, eqx.is_inexact_array)

    def run(given: PyTree) -> PyTree:
        return eqx.filter(step(eqx.combine(given, rest), None)[0], eqx.is_inexact_array)

    size = lambda tree: sum(math.prod(a.shape) * a.dtype.itemsize for a in jax.tree.leaves(tree))  # noqa: E731
    return size(given), size(jax.eval_shape(lambda q: jax.vjp(run, q)[1], given))


def nested_scan(body: Callable, init: PyTree, length: int, levels: int | tuple[int, ...]) -> tuple[PyTree, PyTree]:
    """`lax.scan(body, init, None, length)` whose gradient keeps about levels · length^(1/levels) states instead of `length`.

    `levels` 0 stores everything, 1 checkpoints each step, 2 nests a checkpointed scan in a checkpointed scan, and so on
    (Griewank 1992, doi:10.1080/10556789208805505, with equal splits). A tuple gives the lengths of nested blocks instead; of the
    innermost everything is stored. Results are the same whatever `levels` is.
    """
    blocks = blocks_of(length, levels) if isinstance(levels, int) else levels
    if not blocks:
        return jax.lax.scan(body, init, None, length)
    inner, *deeper = blocks
    if inner == 1 and not deeper:
        return jax.lax.scan(jax.checkpoint(body, prevent_cse=False), init, None, length)
    outer, rest = divmod(length, inner)

    def block(state, _):
        return nested_scan(body, state, inner, tuple(deeper))

    state, ys = jax.lax.scan(jax.checkpoint(block, prevent_cse=False), init, None, outer)
    ys = jax.tree.map(lambda y: y.reshape(outer * inner, *y.shape[2:]), ys)
    if rest:
        state, tail = nested_scan(body, state, rest, tuple(b for b in deeper if b < rest) or (1,))
        ys = jax.tree.map(lambda a, b: jnp.concatenate([a, b]), ys, tail)
    return state, ys


def advance(model: Model, prepared: Prepared, z: PyTree, carry: PyTree, step: Array, count: int) -> tuple[PyTree, PyTree, Array]:
    """`count` model steps of (z, carry, step), nothing stored on the way; with adaptive time steps, as long a time."""
    if model.courant is not None:
        z, carry, _ = adaptive_steps(model, prepared, z, carry, step, count)
        return z, carry, step + count

    def body(state: tuple[PyTree, PyTree, Array], _):
        z, carry, step = state
        return model(z, carry, step, prepared), None

    state, _ = jax.lax.scan(body, (z, carry, step), None, count)
    return state


def _decoded(prepared: Prepared, z: PyTree, carry: PyTree) -> Array:
    return prepared.solver.decode(z)


def frames_of(
    model: Model,
    prepared: Prepared,
    z: PyTree,
    carry: PyTree,
    step: Array,
    frames: int,
    every: int,
    levels: int | Budget,
    observe: Callable[[Prepared, PyTree, PyTree], Any] = _decoded,
) -> tuple[tuple[PyTree, PyTree, Array], Any]:
    """`frames` observations (by default decoded states), `every` model steps apart, checkpointed on `levels` levels, or as far as a
    budget needs it.

    With adaptive time steps they are as far apart in time, and `levels` means nothing.
    """
    if model.courant is not None:

        def interval(state: tuple[PyTree, PyTree, Array], _):
            z, carry, step = state
            z, carry, _ = adaptive_steps(model, prepared, z, carry, step, every)
            return (z, carry, step + every), observe(prepared, z, carry)

        return jax.lax.scan(interval, (z, carry, step), None, frames)

    def step_body(state: tuple[PyTree, PyTree, Array], _):
        z, carry, step = state
        return model(z, carry, step, prepared), None

    inner_levels: int | tuple[int, ...]
    outer_levels: int | tuple[int, ...]
    if isinstance(levels, Budget):
        state, residuals = _kept_bytes(step_body, (z, carry, step))
        if every == 1 or frames == 1:
            blocks = blocks_within(frames * every, state, residuals, levels)
            inner_levels, outer_levels = ((), blocks) if every == 1 else (blocks, ())
        elif frames * every * residuals <= levels.bytes:
            inner_levels, outer_levels = (), ()
        else:
            # A state for each frame, and what is left for the steps between two of them.
            left = Budget(levels.bytes - frames * state)
            inner_levels, outer_levels = blocks_within(every, state, residuals, left), (1,)
    elif every == 1:
        inner_levels, outer_levels = 0, levels
    elif frames == 1 or levels <= 1:
        inner_levels, outer_levels = levels, 0
    else:
        # Frames are one level; the steps between them have the others, and two where there are many.
        inner_levels, outer_levels = max(levels - 1, 2 if every > 4 * frames else 1), 1

    def frame_body(state, _):
        if every == 1:
            state, _ = step_body(state, None)
        else:
            state, _ = nested_scan(step_body, state, every, inner_levels)
        return state, observe(prepared, state[0], state[1])

    return nested_scan(frame_body, (z, carry, step), frames, outer_levels)


def _remembering(z: PyTree, carry: PyTree) -> PyTree:
    """z as it begins, with the solver's own memory from the carry of an earlier rollout."""
    return {**z, "memory": carry["solver"]} if "solver" in carry else z


def _remembered(carry: PyTree, z: PyTree) -> PyTree:
    """The carry with the solver's own memory, for a later rollout."""
    return {**carry, "solver": z["memory"]} if "memory" in z else carry


@eqx.filter_jit
def _prepared(model: Model, dtype: Any) -> Prepared:
    """What all steps need. This and the encoding are programs of their own: within the steps' the many small arrays would be made
    by several threads, of which one would go on alone (see `hybridsim.compilation`)."""
    return model.prepare(dtype)


@eqx.filter_jit
def _begun(model: Model, prepared: Prepared, u: Array, carry: PyTree, begin: Array, seed: int | Array) -> tuple[PyTree, PyTree]:
    """(z, carry) at the start of `rollout`."""
    if carry is None:
        carry = model.init_carry(u, seed, begin)
    return _remembering(prepared.solver.encode(u), carry), carry


@SolverJit
def _rolled(
    model: Model, prepared: Prepared, z: PyTree, carry: PyTree, step: Array, frames: int, every: int, levels: int | Budget
) -> tuple[PyTree, Array, Array]:
    """(carry, step, frames) of `rollout`; compiled once per structure, however often it is called."""
    z = written_anew(z, step)
    (z, carry, step), out = frames_of(model, prepared, z, carry, step, frames, every, levels)
    return _remembered(carry, z), step, out


def _check_frames(name: str, frames: int, every: int) -> None:
    if frames < 1 or every < 1:
        raise ValueError(f"{name}: frames and every must be positive, found {frames} and {every}")


def rollout(
    model: Model,
    start: State,
    frames: int,
    *,
    every: int = 1,
    checkpoint_levels: int = 0,
    gradient_memory: float | int | None = None,
    seed: int | Array = 0,
) -> Trajectory:
    """[Φ^every(u), Φ^(2 every)(u), …]: `frames` states after `start`, `every` model steps apart.

    Differentiable in `start.u` and in every array of `model`. `checkpoint_levels`: 0 stores every stage of every step; 1 recomputes
    each step in the backward pass; 2 keeps about frames + every states (2 √n of n steps where there is one frame, or one step per
    frame), and so on. `gradient_memory`, in MiB, takes its place: as much of what a gradient needs is kept as fits, in blocks of
    steps, and the rest is evaluated again (the backward pass of one step comes on top). The solver's own representation is kept
    from step to step, but a `State` holds the decoded one: going on from `final` is exact up to `encode(decode(z))`. `frames_of`
    carries z itself.

    With adaptive time steps (`model.courant`) frames are as far apart, `every` · `model.step_time`, and each lies at the end of a
    step; only forward differentiation is possible.
    """
    _check_frames("rollout", frames, every)
    begin = jnp.asarray(start.t - start.step * model.step_time, start.u.dtype)
    step = jnp.asarray(start.step)
    levels = checkpoint_levels if gradient_memory is None else Budget(gradient_memory * 2**20)
    prepared = _prepared(model, start.u.dtype)
    z, carry = _begun(model, prepared, start.u, start.carry, begin, seed)
    carry, step, u = _rolled(model, prepared, z, carry, step, frames, every, levels)
    times = start.t + model.step_time * every * np.arange(1, frames + 1)
    final = State(u[-1], step, float(times[-1]), carry)
    return Trajectory(u, times, final, model.solver)


@eqx.filter_jit
def _begun_together(model: Model, prepared: Prepared, u: Array, carry: PyTree, begin: Array, keys: Array) -> tuple[PyTree, PyTree]:
    """(z, carry) at the start of `ensemble`."""
    if carry is None:
        carry = jax.vmap(lambda q, key: model.init_carry(q, key, begin))(u, keys)
    return jax.vmap(lambda u, carry: _remembering(prepared.solver.encode(u), carry))(u, carry), carry


@SolverJit
def _rolled_together(
    model: Model, prepared: Prepared, z: PyTree, carry: PyTree, step: Array, frames: int, every: int, levels: int | Budget
) -> tuple[PyTree, Array, Array]:
    """(carry, step, frames) of `ensemble`."""
    z = jax.lax.optimization_barrier(written_anew(z, step))

    def one(shared: tuple[Model, Prepared, Array], z: PyTree, carry: PyTree) -> tuple[PyTree, Array]:
        model, prepared, step = shared
        (z, carry, _), out = frames_of(model, prepared, z, carry, step, frames, every, levels)
        return _remembered(carry, z), out

    carry, out = over_samples(one, (model, prepared, step), z, carry, together=model.together)
    return carry, step + frames * every, out


def ensemble(
    model: Model,
    start: State | Float[Array, "sample c *grid"],
    frames: int,
    *,
    every: int = 1,
    checkpoint_levels: int = 0,
    gradient_memory: float | int | None = None,
    seed: int | Array = 0,
) -> Ensemble:
    """[Φ^every(u⁽ˢ⁾), Φ^(2 every)(u⁽ˢ⁾), …] for every sample s: rollouts of many initial conditions at once.

    **Arguments:** those of `rollout` (`gradient_memory` is for each sample), but `start` is `(sample, c, *grid)`, or a `State` of
    such (the `final` of another ensemble). Sample s draws its random numbers from `jax.random.fold_in(key, s)`, where `key` is
    `seed` or `jax.random.key(seed)`; an array of keys gives each sample its own.

    On CPU samples run side by side, one per JAX device (see `hybridsim.samples.use_all_cores`, which must come before JAX's first
    computation); elsewhere they run as one batch. A sample's result is that of its `rollout` to rounding, and does not depend on
    the other samples (on a line: but for rounding, where they are stepped in groups).
    """
    _check_frames("ensemble", frames, every)
    start = start if isinstance(start, State) else State(start)
    u, count = start.u, start.u.shape[0]
    if u.ndim != model.solver.grid.ndim + 2 or not count:
        raise ValueError(f"ensemble: the start needs shape (sample, channel, *grid), found {u.shape}")
    key = jax.random.key(seed) if isinstance(seed, int) else seed
    keys = key if key.ndim else jax.vmap(lambda s: jax.random.fold_in(key, s))(jnp.arange(count))
    if keys.shape != (count,):
        raise ValueError(f"ensemble: seed: {keys.shape[0]} keys for {count} samples")
    begin = jnp.asarray(start.t - start.step * model.step_time, u.dtype)
    step = jnp.asarray(start.step)
    # Padded before anything is compiled: XLA would fuse the padding with the encoding, and round otherwise than without it.
    u, carry, keys = padded((u, start.carry, keys))
    levels = checkpoint_levels if gradient_memory is None else Budget(gradient_memory * 2**20)
    prepared = _prepared(model, u.dtype)
    z, carry = _begun_together(model, prepared, u, carry, begin, keys)
    carry, step, u = gathered(_rolled_together(model, prepared, z, carry, step, frames, every, levels))
    carry, u = jax.tree.map(lambda a: a[:count], (carry, u))
    times = start.t + model.step_time * every * np.arange(1, frames + 1)
    return Ensemble(u, times, State(u[:, -1], step, float(times[-1]), carry), model.solver)
