"""du/dt = N(u) − ∇·F(u) + s(u): what a solver promises, and the five places where a closure may enter.

This is the page that every author reads. A closure is a class derived from one of the five places; the base class chosen *is*
the place, and the solver does the rest: it takes the divergence of a `Flux`, projects what must stay divergence-free, and keeps
the conserved sums whatever the weights are.

Conventions: `axis` is a direction, `c` a channel. Arrays are ordered `(axis, c, *grid)`. The value of cell i is at its centre
(i + ½) Δx; face i + ½ is stored at i.
"""

import abc
import dataclasses
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray, PyTree

from hybridsim.grid import Grid, Place

if TYPE_CHECKING:
    from jax.typing import ArrayLike

Real = Float[Array, ""]
"""A real scalar of the state's dtype."""


class Variable(eqx.Module):
    """q_c(x): one named channel of the state.

    **Arguments:** `name` (short, used as `view["name"]` and in files), `unit`, and `at`, the place in the cell per axis: 0.5 is
    the centre, 1 the right face.
    """

    name: str = eqx.field(static=True)
    unit: str = eqx.field(static=True)
    at: Place = eqx.field(static=True)


class View(eqx.Module):
    """(u, t, Δt): all that a closure may see of a running solver, an explicit copy and never a workspace.

    Differences and averages are the solver's own, so that one closure file serves spectral and finite-volume solvers alike. What a
    closure gives acts for `held` solver steps of Δt.
    """

    u: Float[Array, "c *grid"]
    t: Real
    dt: Real
    solver: "AbstractSolver"
    held: int = eqx.field(static=True, default=1)

    @property
    def grid(self) -> Grid:
        return self.solver.grid

    @property
    def variables(self) -> tuple[Variable, ...]:
        return self.solver.variables

    def __getitem__(self, name: str) -> Float[Array, "*grid"]:
        """The channel called `name`, at its own place."""
        for c, variable in enumerate(self.variables):
            if variable.name == name:
                return self.u[c]
        raise KeyError(f"no channel {name!r}; this solver has {', '.join(v.name for v in self.variables)}")

    def flux_place(self, axis: int, channel: int) -> Place:
        """Where the flux of `channel` along `axis` lives."""
        return self.solver.flux_place(axis, channel)

    def gradient(self) -> Float[Array, "axis c *grid"]:
        """∂_a u_c at the flux point of channel c along axis a."""
        return self.solver.gradient(self.u)

    def adjoint_gradient(self) -> Float[Array, "axis c *grid"]:
        """H with Σ H F = Σ u · (∂t u due to F) for every flux F: what the energy ½Σu² gains per unit time, as F sees it."""
        return self.solver.adjoint_gradient(self.u)

    def derivative(self, array: Float[Array, "*grid"], at: Place, axis: int) -> tuple[Float[Array, "*grid"], Place]:
        """∂_axis of an array that lives at `at`, by the solver's own operator, and the place where the result lives."""
        return self.solver.derivative(array, at, axis)

    def centred(self) -> Float[Array, "c *grid"]:
        """All channels at the cell centres."""
        return self.solver.centred(self.u)

    def to(self, array: Float[Array, "*grid"], from_: Place, to: Place) -> Float[Array, "*grid"]:
        """The array averaged from one place of the cell to another."""
        return self.solver.move(array, from_, to)

    def to_flux_points(self, tensor: Float[Array, "axis c *grid"]) -> Float[Array, "axis c *grid"]:
        """A tensor given at cell centres, each component averaged to its flux point."""
        centre = self.grid.centre
        return jnp.stack(
            [jnp.stack([self.to(q, centre, self.flux_place(a, c)) for c, q in enumerate(row)]) for a, row in enumerate(tensor)]
        )

    def to_centre(self, tensor: Float[Array, "axis c *grid"]) -> Float[Array, "axis c *grid"]:
        """A tensor given at its flux points, each component averaged to the cell centre."""
        centre = self.grid.centre
        return jnp.stack(
            [jnp.stack([self.to(q, self.flux_place(a, c), centre) for c, q in enumerate(row)]) for a, row in enumerate(tensor)]
        )


class AbstractClosure(eqx.Module):
    """m(u, t, Δt): what a coarse solver lacks, modelled or learned.

    Derive from one of the places below, never from this class. A closure is called with a `View` and returns one array. If
    `init_memory` returns something, the call gets it as `memory` and returns `(array, new_memory)`. If `stochastic` is true, the
    call gets a random `key`, fresh in each evaluation (all stages of a step share one). Arrays among the fields are trained;
    everything that shall stay fixed is declared `eqx.field(static=True)`.
    """

    stochastic: ClassVar[bool] = False
    constants: ClassVar[tuple[str, ...]] = ()
    """Names of the fields that hold one number each and that training turns into parameters, like the constant of Smagorinsky."""

    def init_memory(self, view: View) -> PyTree | None:
        """What the closure remembers between evaluations, at the start of a run (None: nothing)."""
        return None

    @abc.abstractmethod
    def __call__(self, view: View, memory: PyTree | None = None, key: PRNGKeyArray | None = None) -> Any: ...


class Flux(AbstractClosure):
    """∂t u_c += −Σ_a ∂_a F[a, c]: a flux `(axis, c, *grid)` at the flux points.

    The solver takes the divergence, so the sum of every channel is conserved to rounding, whatever the weights.
    """


class Source(AbstractClosure):
    """∂t u_c += s[c]: a source `(c, *grid)`, before projection. Does not keep sums."""


class Interpolation(AbstractClosure):
    """w = w_scheme + Z a: free coefficients `(axis, side, c, free, *grid)` of the face interpolation.

    Z spans the null space of the polynomial conditions of the base scheme, so that its order cannot be unlearned (Kochkov et al.
    2021, doi:10.1073/pnas.2101784118; `free` = stencil − conditions).
    """


class PostStep(AbstractClosure):
    """u ← P(u + d): a correction `(c, *grid)` of the state after the step, projected (Um et al. 2020, arXiv:2007.00016)."""


class Replacement(AbstractClosure):
    """u ← P(u + d): the whole step, `(c, *grid)`, without a solver (Stachenfeld et al. 2022, arXiv:2112.15275)."""


PLACES: tuple[type[AbstractClosure], ...] = (Flux, Source, Interpolation, PostStep, Replacement)


def place_of(closure: AbstractClosure) -> type[AbstractClosure]:
    """The one place that a closure derives from."""
    found = [p for p in PLACES if isinstance(closure, p)]
    if len(found) != 1:
        names = ", ".join(p.__name__ for p in PLACES)
        raise TypeError(f"{type(closure).__name__} must derive from exactly one place ({names}), found {len(found)}")
    return found[0]


def with_constants(closure: AbstractClosure, dtype: Any) -> AbstractClosure:
    """The same closure with its `constants`, and those of closures inside it, as arrays, so that they are trained."""

    def closures_in(node: Any) -> list[tuple[Callable[[Any], Any], AbstractClosure]]:
        found = [(lambda tree: tree, node)]
        for field in dataclasses.fields(node):
            inner = getattr(node, field.name)
            if isinstance(inner, AbstractClosure):
                found += [(lambda tree, g=g, n=field.name: g(getattr(tree, n)), c) for g, c in closures_in(inner)]
        return found

    for where, inner in closures_in(closure):
        for name in inner.constants:
            value = jnp.asarray(getattr(inner, name), dtype)
            closure = eqx.tree_at(lambda c, w=where, n=name: getattr(w(c), n), closure, value)
    return closure


Tendency = Callable[[PyTree, Real], PyTree | None]
"""(z, t) -> the closures' contribution in the form that `AbstractSolver.receive` made of it, or None."""


class AbstractSolver(eqx.Module):
    """dz/dt = L z + N(z, t): one discretisation of one equation.

    `z` is whatever the solver steps (spectral coefficients, say); `u` is the state that everyone else sees, `(c, *grid)` in
    physical space. Between steps only z exists. z is a dict of arrays with a slot `"injected"`: the mean of each channel that
    forcing has added since `collect` last emptied it, so that conservation can be checked in forced flows. It may have two slots
    more, which no stepper mixes: `"events"`, a tally that only grows between two calls of `collect`, and `"memory"`, what the
    solver itself remembers, such as the random state of a force.
    """

    grid: eqx.AbstractVar[Grid]
    places: ClassVar[tuple[type[AbstractClosure], ...]]
    hosted: ClassVar[bool] = False
    """Whether another code takes its steps as a whole: a rival, for which only a stepper that is `hosted` too fits."""
    default_stepper: ClassVar[str | None] = None
    """The short name of the stepper to take where none is named; None: etdrk4 where there is a linear part, else ssprk3."""

    @property
    @abc.abstractmethod
    def variables(self) -> tuple[Variable, ...]:
        """The channels of the state."""

    @property
    @abc.abstractmethod
    def conserved(self) -> tuple[str, ...]:
        """Names of the channels whose sums nothing but `injected` may change."""

    @property
    def serial_kernels(self) -> bool:
        """Whether on a CPU nothing but transforms and matrix products should be shared out among threads; see
        `hybridsim.compilation`."""
        return False

    @property
    def large_program(self) -> bool:
        """Whether `euler` is so large a program that steppers should compile it once, in a loop over their stages."""
        return False

    def for_training(self) -> "AbstractSolver":
        """The same solver, by another program where one suits gradients of unrolled steps better: those take long to compile."""
        return self

    def free_weights(self) -> int:
        """How many free coefficients an `Interpolation` closure has per face, side and channel; 0 where none are offered."""
        return 0

    def receive_weights(self, weights: Float[Array, "axis side c free *grid"]) -> PyTree:
        """What `euler` will use for the output of an `Interpolation` closure; beside what `receive` made of the others."""
        raise TypeError(f"{type(self).__name__} takes no Interpolation closure")

    @property
    def ledger_rows(self) -> tuple[str, ...]:
        """Names of what `collect` hands out: one row per channel first, then what else a solver keeps books of."""
        return tuple(v.name for v in self.variables)

    @abc.abstractmethod
    def prepare(self, dtype: Any) -> "AbstractSolver":
        """The same solver with the arrays that no step changes; once per rollout, outside the scan, inside the gradient."""

    @abc.abstractmethod
    def encode(self, u: Float[Array, "c *grid"]) -> PyTree:
        """u -> z; also puts u onto the constraints."""

    @abc.abstractmethod
    def decode(self, z: PyTree) -> Float[Array, "c *grid"]:
        """z -> u."""

    @abc.abstractmethod
    def constrain(self, z: PyTree) -> PyTree:
        """A stage of an explicit stepper, put back onto the constraints (∇·u = 0)."""

    @abc.abstractmethod
    def project(self, u: Float[Array, "c *grid"]) -> Float[Array, "c *grid"]:
        """The nearest state that meets the constraints."""

    @abc.abstractmethod
    def restrict(self, u: Float[Array, "c *fine"], grid: Grid, variables: tuple[Variable, ...]) -> Float[Array, "c *grid"]:
        """A fine state given on `grid` at the places of `variables`, under this solver's own filter, on this solver's grid."""

    @property
    def filter_option(self) -> str:
        """What decides `restrict` beside class and grid, in a word, or nothing. Runs that share all three share a reference."""
        return ""

    @abc.abstractmethod
    def divergence(self, u: Float[Array, "c *grid"]) -> Float[Array, "*grid"] | None:
        """∇·u by the scheme's own operator, at the cell centres; None where it need not vanish."""

    @abc.abstractmethod
    def centred(self, u: Float[Array, "c *grid"]) -> Float[Array, "c *grid"]:
        """All channels at the cell centres, boundary values included in the averages."""

    @abc.abstractmethod
    def flux_place(self, axis: int, channel: int) -> Place:
        """Where the flux of `channel` along `axis` lives."""

    @abc.abstractmethod
    def gradient(self, u: Float[Array, "c *grid"]) -> Float[Array, "axis c *grid"]:
        """∂_a u_c at the flux points, by the operators that the scheme itself uses."""

    def adjoint_gradient(self, u: Float[Array, "c *grid"]) -> Float[Array, "axis c *grid"]:
        """Rᵀu, where R F is the ∂t u that a flux F makes, with masks, sides and constraints: Σ (Rᵀu) F = Σ u · R F.

        Solvers give it in closed form: ∇u at the flux points but for masks and sides, for u on the constraints. Here, for all
        others, it is the reverse mode of the steps `receive`, `constrain` and `decode`.
        """
        rest = self.encode(jnp.zeros_like(u))

        def rate(flux: Array) -> Array:
            return self.decode(self.constrain({**rest, **self.receive(flux, None)}))

        _, pull = jax.vjp(rate, jnp.zeros((self.grid.ndim, *u.shape), u.dtype))
        return pull(u)[0]

    @property
    def flux_response(self) -> float:
        """Λ ≥ max ‖R F‖²/‖F‖², with R of `adjoint_gradient`: Σ_a (π/Δx_a)², what spectra reach, where a solver knows no less.

        Solvers whose differences are steeper than the derivative itself must say so.
        """
        return sum((np.pi / h) ** 2 for h in self.grid.spacing)

    @abc.abstractmethod
    def derivative(self, array: Float[Array, "*grid"], at: Place, axis: int) -> tuple[Float[Array, "*grid"], Place]:
        """∂_axis of an array that lives at `at`, and the place where the result lives."""

    @abc.abstractmethod
    def move(self, array: Float[Array, "*grid"], from_: Place, to: Place) -> Float[Array, "*grid"]:
        """Averages between places of the cell."""

    @abc.abstractmethod
    def linear(self) -> PyTree | None:
        """The diagonal symbol L with the structure of z, or None where everything is explicit."""

    @abc.abstractmethod
    def explicit(self, z: PyTree, t: Real, tendency: Tendency) -> PyTree:
        """N(z, t), the closures' contribution included."""

    def euler(self, z: PyTree, t: Real, dt: Real, tendency: Tendency, at: PyTree | None = None, rough: bool = False) -> PyTree:
        """E(z) = P(z + Δt N(z, t)), or P(z + Δt N(`at`, t)): what explicit steppers are made of.

        Solvers that keep the state within bounds (positive density, say) do it here. `rough` asks for no more than first order in
        space, for predictors.
        """
        rate = self.explicit(z if at is None else at, t, tendency)
        return self.constrain(jax.tree.map(lambda q, f: q + dt * f, z, rate))

    def enter(self, z: PyTree, t: Real, dt: Real) -> PyTree:
        """The first half of what a solver integrates beside the stepper, over [t, t + Δt/2]; the step follows.

        Halves on both sides make the whole second order (Strang 1968, doi:10.1137/0705041). Here nothing.
        """
        return z

    def leave(self, z: PyTree, t: Real, dt: Real) -> PyTree:
        """The second half, over [t + Δt/2, t + Δt]. Here nothing."""
        return z

    @abc.abstractmethod
    def receive(self, flux: Float[Array, "axis c *grid"] | None, source: Float[Array, "c *grid"] | None) -> PyTree:
        """What `explicit` will add for these closure outputs; computed once where a closure is held."""

    @abc.abstractmethod
    def collect(self, z: PyTree) -> tuple[PyTree, Float[Array, " row"]]:
        """Empties the slots `injected` and `events`: (z with zeros there, what they held, as `ledger_rows` names it)."""

    @abc.abstractmethod
    def stable_dt(self, u: Float[Array, "c *grid"]) -> Real:
        """The time step at Courant number 1 (advection and, where explicit, diffusion)."""


KEPT = ("injected", "events", "memory")
"""The slots of z that are not the flow itself."""


class AbstractStepper(eqx.Module):
    """z(t) -> z(t + Δt).

    `prepare` computes coefficients once per rollout (outside the scan, inside the gradient, so that d/d(viscosity) flows);
    `__call__` is the formula of the textbook.
    """

    needs_linear: ClassVar[bool]
    hosted: ClassVar[bool] = False
    """Whether it takes the whole steps of a hosted solver instead of the right-hand side."""
    order: ClassVar[int]
    stages: ClassVar[int]

    def check(self, solver: AbstractSolver, closures: Sequence["AbstractClosure"]) -> None:
        """Raises `ValueError` where this stepper does not go with a solver or with closures; most go with all."""

    @abc.abstractmethod
    def prepare(self, solver: AbstractSolver, dt: "ArrayLike", dtype: Any) -> PyTree: ...

    @abc.abstractmethod
    def __call__(
        self, solver: AbstractSolver, coefficients: PyTree, z: PyTree, t: Real, dt: Real, tendency: Tendency
    ) -> PyTree: ...


def full_step(
    solver: AbstractSolver, stepper: AbstractStepper, coefficients: PyTree, z: PyTree, t: Real, dt: Real, tendency: Tendency
) -> PyTree:
    """z(t) -> z(t + Δt): the stepper, between the two halves of what the solver integrates beside it."""
    z = stepper(solver, coefficients, solver.enter(z, t, dt), t, dt, tendency)
    return solver.leave(z, t, dt)
