"""u(t) -> u(t + Δt) by other codes: jax-cfd (Kochkov et al. 2021, doi:10.1073/pnas.2101784118) and exponax, behind our interface.

Rivals and cross-checks: the equations, schemes and time steppers are those codes' own public functions, called as they document
them. What closures see, how states are filtered and what is measured is as in our solvers on the same arrangement of variables.
"""

import abc
import importlib
from types import SimpleNamespace
from typing import Any, ClassVar, Literal

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

from hybridsim.contract import AbstractSolver, AbstractStepper, Flux, PostStep, Real, Source, Tendency, Variable
from hybridsim.grid import Grid
from hybridsim.solvers.finite_volume import StaggeredFiniteVolume
from hybridsim.solvers.incompressible import AbstractStandingForce, NavierStokes
from hybridsim.solvers.kuramoto_sivashinsky import SpectralKS
from hybridsim.solvers.spectral import Spectral2D


def jax_cfd(*names: str) -> SimpleNamespace:
    """The named modules of jax-cfd; raises `ValueError` with the reason where it cannot be used."""
    try:
        return SimpleNamespace(**{name.rpartition(".")[2]: importlib.import_module(f"jax_cfd.{name}") for name in names})
    except (ImportError, AttributeError) as error:
        raise ValueError(
            f"solver: jax-cfd cannot be used with JAX {jax.__version__} ({error}); install a version that fits, or take one of "
            "hybridsim's own solvers"
        ) from error


class JaxCFDStepper(AbstractStepper):
    """One step of jax-cfd's own time stepper, which the hosted solver names as `method`."""

    needs_linear: ClassVar[bool] = False
    hosted: ClassVar[bool] = True
    order: ClassVar[int] = 1
    stages: ClassVar[int] = 5

    def prepare(self, solver, dt, dtype) -> PyTree:
        return {}

    def __call__(self, solver, coefficients, z, t, dt, tendency):
        assert isinstance(solver, AbstractHosted)
        return solver.advanced(z, t, dt, tendency)


class ExponaxStepper(AbstractStepper):
    """û(t + Δt) = exponax's own ETDRK4 step of û(t): ∂t u + ½∂x u² + ∂xx u + ν ∂xxxx u = 0 (Koehler et al. 2024, arXiv:2411.00180).

    A rival for `solver: {use: spectral, dealias: two_thirds}` of the Kuramoto–Sivashinsky equation, whose modes it steps; exponax
    has no place for closures. Order 4 in time; needs the package exponax.
    """

    needs_linear: ClassVar[bool] = True
    order: ClassVar[int] = 4
    stages: ClassVar[int] = 4

    def check(self, solver, closures) -> None:
        if not isinstance(solver, SpectralKS) or solver.dealias != "two_thirds":
            raise ValueError(
                "stepper: exponax is hosted for kuramoto_sivashinsky with solver: {use: spectral, dealias: two_thirds}, as it "
                "cuts by that rule"
            )
        if closures:
            raise ValueError("stepper: exponax takes whole steps and has no place for corrections; take etdrk4")
        self._package()

    @staticmethod
    def _package() -> Any:
        try:
            return importlib.import_module("exponax")
        except ImportError as error:
            raise ValueError(f"stepper: exponax cannot be used ({error}); install it, or take etdrk4") from error

    def _stepper(self, solver: SpectralKS, dt: Any) -> Any:
        exponax = self._package()
        (n,), (length,) = solver.grid.shape, solver.grid.lengths
        scale = solver.equation.viscosity
        with jax.numpy_rank_promotion("allow"):  # exponax counts on it
            return exponax.stepper.KuramotoSivashinskyConservative(1, length, n, dt, fourth_order_scale=scale, order=4)

    def prepare(self, solver, dt, dtype) -> PyTree:
        assert isinstance(solver, SpectralKS)
        real = jnp.dtype(dtype)
        into = {False: real, True: jnp.result_type(real, jnp.complex64)}
        arrays = eqx.filter(self._stepper(solver, dt), eqx.is_inexact_array)
        return jax.tree.map(lambda a: a.astype(into[jnp.iscomplexobj(a)]), arrays)

    def __call__(self, solver, coefficients, z, t, dt, tendency):
        assert isinstance(solver, SpectralKS)
        static = eqx.partition(self._stepper(solver, 0.01), eqx.is_inexact_array)[1]
        with jax.numpy_rank_promotion("allow"):
            return {**z, "u": eqx.combine(coefficients, static).step_fourier(z["u"][None])[0]}


class AbstractHosted(AbstractSolver):
    """z(t + Δt) = jax-cfd's step of z(t): a solver that another code steps as a whole."""

    equation: eqx.AbstractVar[NavierStokes]

    hosted: ClassVar[bool] = True
    default_stepper: ClassVar[str | None] = "jax_cfd"

    @property
    @abc.abstractmethod
    def own(self) -> AbstractSolver:
        """Our solver with the same variables at the same places: what closures, filters and diagnostics use."""

    @abc.abstractmethod
    def advanced(self, z: PyTree, t: Real, dt: Real, tendency: Tendency) -> PyTree:
        """One step of the hosted code; the closures' part is evaluated wherever that code asks for its force."""

    def _check(self) -> None:
        if not all(self.grid.periodic):
            raise ValueError("grid: jax-cfd is hosted in periodic boxes only")
        if self.equation.scalars:
            raise ValueError("equation.scalars: jax-cfd is hosted without passive scalars")
        forcing = self.equation.forcing
        if forcing is not None and not isinstance(forcing, AbstractStandingForce) and type(forcing).__name__ != "LinearDrag":
            raise ValueError(
                f"equation.forcing: jax-cfd is hosted with kolmogorov, uniform and linear_drag, not {type(forcing).__name__}"
            )

    def _force(self, places, dtype) -> Array | None:
        forcing = self.equation.forcing
        return forcing.acceleration(self.grid, places, dtype) if isinstance(forcing, AbstractStandingForce) else None

    @property
    def variables(self) -> tuple[Variable, ...]:
        return self.own.variables

    def constrain(self, z: PyTree) -> PyTree:
        return z

    def project(self, u: Float[Array, "c *grid"]) -> Float[Array, "c *grid"]:
        return self.own.project(u)

    def restrict(self, u: Float[Array, "c *fine"], grid: Grid, variables: tuple[Variable, ...]) -> Float[Array, "c *grid"]:
        return self.own.restrict(u, grid, variables)

    def divergence(self, u: Float[Array, "c *grid"]) -> Float[Array, "*grid"] | None:
        return self.own.divergence(u)

    def centred(self, u: Float[Array, "c *grid"]) -> Float[Array, "c *grid"]:
        return self.own.centred(u)

    def flux_place(self, axis: int, channel: int):
        return self.own.flux_place(axis, channel)

    def gradient(self, u: Float[Array, "c *grid"]) -> Float[Array, "axis c *grid"]:
        return self.own.gradient(u)

    def adjoint_gradient(self, u: Float[Array, "c *grid"]) -> Float[Array, "axis c *grid"]:
        return self.own.adjoint_gradient(u)

    @property
    def flux_response(self) -> float:
        return self.own.flux_response

    def derivative(self, array, at, axis):
        return self.own.derivative(array, at, axis)

    def move(self, array, from_, to):
        return self.own.move(array, from_, to)

    def linear(self) -> PyTree | None:
        return None

    def explicit(self, z: PyTree, t: Real, tendency: Tendency) -> PyTree:
        raise TypeError(f"{type(self).__name__} has no right-hand side of its own: jax-cfd takes whole steps")

    def receive(self, flux, source) -> PyTree:
        return self.own.receive(flux, source)

    def stable_dt(self, u: Float[Array, "c *grid"]) -> Real:
        return self.own.stable_dt(u)


class JaxCFDFiniteVolume(AbstractHosted):
    """∂t u = −∇·(u u) + ν ∇²u + f − ∇p, ∇·u = 0: jax-cfd's finite volumes on the staggered grid, 2D and 3D.

    **Arguments:**

    - `grid`: a periodic `Grid` in two or three dimensions.
    - `equation`: `NavierStokes(viscosity, forcing)`, forced by `kolmogorov`, `uniform` or `linear_drag`, or not at all.
    - `convection`: `van_leer` (default of both codes; `advect_van_leer_using_limiters`, since in 0.2.1 the correction of
      `advect_van_leer` is one cell aside for velocities across their own axis) or `central` (`convect_linear`).
    - `method`: jax-cfd's time stepper, `forward_euler` (its default), `midpoint_rk2`, `heun_rk2` or `classic_rk4`.

    Order 2 in space; that of `method` in time. Flux, Source and PostStep closures; sums are conserved to rounding without a force,
    though forces are not kept in the ledger.
    """

    grid: Grid
    equation: NavierStokes
    convection: Literal["van_leer", "central"] = eqx.field(static=True, default="van_leer")
    method: Literal["forward_euler", "midpoint_rk2", "heun_rk2", "classic_rk4"] = eqx.field(static=True, default="forward_euler")
    arrays: StaggeredFiniteVolume | None = None

    places: ClassVar = (Flux, Source, PostStep)

    def __check_init__(self):
        self._check()
        if self.convection not in ("van_leer", "central"):
            raise ValueError(f"convection: possible are van_leer, central; found {self.convection!r}")
        if self.method not in ("forward_euler", "midpoint_rk2", "heun_rk2", "classic_rk4"):
            raise ValueError(f"method: possible are forward_euler, midpoint_rk2, heun_rk2, classic_rk4; found {self.method!r}")
        StaggeredFiniteVolume(self.grid, self.equation)
        jax_cfd("base.equations")

    @property
    def own(self) -> StaggeredFiniteVolume:
        return StaggeredFiniteVolume(self.grid, self.equation) if self.arrays is None else self.arrays

    @property
    def conserved(self) -> tuple[str, ...]:
        return () if self.equation.forcing is not None else self.own.conserved

    def prepare(self, dtype) -> "JaxCFDFiniteVolume":
        prepared = StaggeredFiniteVolume(self.grid, self.equation).prepare(dtype)
        return eqx.tree_at(lambda s: s.arrays, self, prepared, is_leaf=lambda a: a is None)

    def encode(self, u: Float[Array, "c *grid"]) -> PyTree:
        return self.own.encode(u)

    def decode(self, z: PyTree) -> Float[Array, "c *grid"]:
        return z["u"]

    def collect(self, z: PyTree) -> tuple[PyTree, Float[Array, " row"]]:
        return self.own.collect(z)

    def advanced(self, z, t, dt, tendency):
        peer = jax_cfd("base.grids", "base.boundaries", "base.advection", "base.equations", "base.time_stepping")
        grid = peer.grids.Grid(self.grid.shape, domain=tuple((0, length) for length in self.grid.lengths))
        periodic = peer.boundaries.periodic_boundary_conditions(self.grid.ndim)
        places = tuple(v.at for v in self.variables)
        dtype = z["u"].dtype
        standing, drag = self._force(places, dtype), jnp.asarray(self.equation.drag, dtype)

        def force(v):
            u = jnp.stack([q.data for q in v])
            total = jnp.zeros_like(u) if standing is None else standing
            if self.equation.forcing is not None:
                total = total - drag * u
            extra = tendency({**z, "u": u}, t)
            if extra is not None:
                total = total + extra["u"]
            return tuple(peer.grids.GridArray(f, q.offset, q.grid) for f, q in zip(total, v, strict=True))

        step = peer.equations.semi_implicit_navier_stokes(
            density=1.0,
            viscosity=jnp.asarray(self.equation.viscosity, dtype),
            dt=dt,
            grid=grid,
            convect=peer.advection.convect_linear if self.convection == "central" else None,
            forcing=force,
            time_stepper=getattr(peer.time_stepping, self.method),
        )
        start = tuple(
            peer.grids.GridVariable(peer.grids.GridArray(q, at, grid), periodic) for q, at in zip(z["u"], places, strict=True)
        )
        return {**z, "u": jnp.stack([q.data for q in step(start)])}


class JaxCFDSpectral(AbstractHosted):
    """∂t ω = −u·∇ω + ν ∇²ω − μ ω + curl f: jax-cfd's pseudo-spectral vorticity equation, 2D.

    **Arguments:**

    - `grid`: a doubly periodic `Grid` with as many cells on both axes.
    - `equation`: `NavierStokes(viscosity, forcing)`, forced by `kolmogorov`, `uniform` or `linear_drag`, or not at all.
    - `method`: jax-cfd's time stepper, `crank_nicolson_rk4` (its own choice for turbulence; default), `crank_nicolson_rk3`,
      `crank_nicolson_rk2`, `imex_rk_sil3` or `backward_forward_euler`.

    Spectral accuracy, dealiased by the ⅔ rule. jax-cfd knows no mean flow: that of the initial state is removed, and forces and
    closures that push it are not felt. Flux, Source and PostStep closures.
    """

    grid: Grid
    equation: NavierStokes
    method: Literal["crank_nicolson_rk4", "crank_nicolson_rk3", "crank_nicolson_rk2", "imex_rk_sil3", "backward_forward_euler"] = (
        eqx.field(static=True, default="crank_nicolson_rk4")
    )
    arrays: Spectral2D | None = None

    places: ClassVar = (Flux, Source, PostStep)

    def __check_init__(self):
        self._check()
        methods = ("crank_nicolson_rk4", "crank_nicolson_rk3", "crank_nicolson_rk2", "imex_rk_sil3", "backward_forward_euler")
        if self.method not in methods:
            raise ValueError(f"method: possible are {', '.join(methods)}; found {self.method!r}")
        if self.grid.ndim != 2 or self.grid.shape[0] != self.grid.shape[1] or self.grid.shape[0] % 2:
            raise ValueError(
                f"grid: jax-cfd's spectral solver needs two axes with one even number of cells, found {self.grid.shape}"
            )
        jax_cfd("spectral.equations")

    @property
    def own(self) -> Spectral2D:
        return Spectral2D(self.grid, self.equation, dealias="two_thirds") if self.arrays is None else self.arrays

    @property
    def conserved(self) -> tuple[str, ...]:
        """Both momenta: they are zero."""
        return self.own.conserved

    def prepare(self, dtype) -> "JaxCFDSpectral":
        prepared = Spectral2D(self.grid, self.equation, dealias="two_thirds").prepare(dtype)
        return eqx.tree_at(lambda s: s.arrays, self, prepared, is_leaf=lambda a: a is None)

    def encode(self, u: Float[Array, "c *grid"]) -> PyTree:
        z = self.own.encode(u)
        return {"vorticity": z["vorticity"], "injected": z["injected"]}

    def decode(self, z: PyTree) -> Float[Array, "c *grid"]:
        return self.own.decode({**z, "mean": jnp.zeros_like(z["injected"])})

    def collect(self, z: PyTree) -> tuple[PyTree, Float[Array, " row"]]:
        return z, z["injected"]

    def advanced(self, z, t, dt, tendency):
        peer = jax_cfd("base.grids", "spectral.equations", "spectral.time_stepping")
        grid = peer.grids.Grid(self.grid.shape, domain=tuple((0, length) for length in self.grid.lengths))
        dtype = z["injected"].dtype
        standing = self._force(tuple(v.at for v in self.variables), dtype)
        terms = peer.equations.NavierStokes2D(
            jnp.asarray(self.equation.viscosity, dtype), grid, jnp.asarray(self.equation.drag, dtype), smooth=True
        )
        given = None if standing is None else self.own.receive(None, standing)["vorticity"]

        class Equation(peer.time_stepping.ImplicitExplicitODE):
            """jax-cfd's terms, and what our side adds to the explicit ones."""

            def explicit_terms(self, state):
                # Where JAX has double precision, jax-cfd's wavenumbers have it too.
                rate = terms.explicit_terms(state).astype(state.dtype)
                if given is not None:
                    rate = rate + given
                extra = tendency({**z, "vorticity": state, "mean": jnp.zeros_like(z["injected"])}, t)
                return rate if extra is None else rate + extra["vorticity"]

            def implicit_terms(self, state):
                return terms.implicit_terms(state).astype(state.dtype)

            def implicit_solve(self, state, time_step):
                return terms.implicit_solve(state, time_step).astype(state.dtype)

        step = getattr(peer.time_stepping, self.method)(Equation(), dt)
        return {**z, "vorticity": step(z["vorticity"])}
