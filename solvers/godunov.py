"""dŪ/dt = −Σ_a [F̂_a]/Δx_a + S: finite volumes for compressible flow, after Godunov.

All channels are means over cells. The flux of every channel along axis a lives at the right face of axis a.
"""

import dataclasses
import math
from typing import ClassVar, Literal

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PyTree

from hybridsim.contract import AbstractSolver, Flux, Interpolation, PostStep, Real, Replacement, Source, Variable
from hybridsim.grid import Grid, cell_mean
from hybridsim.solvers import staggering
from hybridsim.solvers.compressible import AXES, SIDES, CompressibleNavierStokes, cooled, kicked, wave_rate
from hybridsim.solvers.reconstruction import RECONSTRUCTIONS, null_space
from hybridsim.solvers.riemann import RIEMANN_SOLVERS
from hybridsim.solvers.staggering import part
from hybridsim.solvers.sweep import Sweep

EVENTS = ("floor_events", "floor_mass", "floor_energy", "limited_faces", "bound_violations")
"""What the solver keeps count of, besides what was injected and radiated."""


class CompressibleFiniteVolume(AbstractSolver):
    """Ū_i ← Ū_i − Δt Σ_a (F̂_{a,i+½} − F̂_{a,i−½})/Δx_a,  F̂ = (1 − θ) F_LLF + θ (F_Riemann(W_L, W_R) − F_v + F_closure).

    Compressible Euler and Navier–Stokes equations with passive scalars, in one to three dimensions, unsplit: reconstruction of
    primitive variables, an approximate Riemann solver, central differences for viscosity and conduction.

    **Arguments:**

    - `grid`: a `Grid` of at least 4 cells per axis; each axis is periodic, or has two sides of these kinds:
        - `outflow`: no gradient normal to the side;
        - `reflecting`: a wall without friction that lets no heat through;
        - `fixed`: the gas beyond the side is what `equation.boundary_state` says, an inflow for example.
    - `equation`: `CompressibleNavierStokes`.
    - `reconstruction`: `plm_van_leer` (default), `plm_mc`, `ppm`, `weno5z`, or `constant`.
    - `riemann`: `hllc` (default), `hllc_low_mach`, `hlle`, or `llf`.
    - `reconstruct`: `primitive` (default) or `characteristic` variables, those of the conserved state: they ring less behind strong
      shocks, keep a high order in waves that are not weak, and cost more.
    - `positivity`: whether the total flux is limited so that density and pressure stay positive (default), as below.
    - `density_floor`, `pressure_floor`: bounds of ρ and p inside the primitive conversion.
    - `compact`: whether a periodic cube is turned so that one program sweeps the three axes: it compiles in half of the time and
      takes up to a tenth longer at 16³, up to a half at 32³ (on CPU). The results differ by rounding. Trainings on CPU do so.

    Order 2 in space with `plm_*`. In one dimension `ppm` and `weno5z` have order 3 and 5 with characteristic variables; with
    primitive ones, whose means are taken from the means of the conserved ones, that holds while the gas is only advected or waves
    are weak. In two and three dimensions they are of order 2 with smaller errors, since each face has one flux point. Viscous terms
    are of order 2. Mass, momentum, energy and scalars are conserved to rounding for any Flux closure; what enters through sides
    that are not periodic is in the ledger.

    **Positivity.** After each Euler step of a strong-stability-preserving method the cell means are looked at. Where density or
    pressure has all but vanished, the step is done again with θ < 1 at the faces that are to blame: the largest θ for which each
    cell stays positive by itself (Hu, Adams & Shu 2013, doi:10.1016/j.jcp.2013.01.024, section 2.3, with the pressure's concavity
    instead of a search). F_LLF is positive while Δt Σ_a α_a/Δx_a ≤ ½, α_a the largest |v_a| + sound speed of a face's cells; steps
    beyond that bound are counted (`bound_violations`), and so are the faces with θ < 1 (`limited_faces`). Conserved means are never
    changed: where ρ or p lies below its floor all the same (too large a step, a Source or PostStep closure, single precision), the
    primitive variables use the floor, and each such cell is counted with the mass and energy that this stands for.
    """

    grid: Grid
    equation: CompressibleNavierStokes
    reconstruction: Literal["plm_van_leer", "plm_mc", "ppm", "weno5z", "constant"] = eqx.field(static=True, default="plm_van_leer")
    riemann: Literal["hllc", "hllc_low_mach", "hlle", "llf"] = eqx.field(static=True, default="hllc")
    reconstruct: Literal["primitive", "characteristic"] = eqx.field(static=True, default="primitive")
    positivity: bool = eqx.field(static=True, default=True)
    density_floor: float = eqx.field(static=True, default=1e-12, converter=float)
    pressure_floor: float = eqx.field(static=True, default=1e-12, converter=float)
    compact: bool = eqx.field(static=True, default=False)

    places: ClassVar = (Flux, Source, Interpolation, PostStep, Replacement)

    def __check_init__(self):
        if min(self.grid.shape) < 4:
            raise ValueError(f"grid: a finite-volume solver needs at least 4 cells per axis, found {self.grid.shape}")
        if self.reconstruction not in RECONSTRUCTIONS:
            raise ValueError(f"reconstruction: possible are {', '.join(RECONSTRUCTIONS)}; found {self.reconstruction!r}")
        if self.riemann not in RIEMANN_SOLVERS:
            raise ValueError(f"riemann: possible are {', '.join(RIEMANN_SOLVERS)}; found {self.riemann!r}")
        if self.reconstruct not in ("primitive", "characteristic"):
            raise ValueError(f"reconstruct: possible are primitive, characteristic; found {self.reconstruct!r}")
        for name in ("density_floor", "pressure_floor"):
            if not (math.isfinite(getattr(self, name)) and getattr(self, name) > 0):
                raise ValueError(f"{name}: must be positive and finite, found {getattr(self, name)}")
        for axis, sides in enumerate(self.grid.boundaries):
            for side, kind in enumerate(sides):
                if kind not in ("periodic", "outflow", "reflecting", "fixed"):
                    raise ValueError(
                        f"domain.boundaries: a compressible solver takes periodic, outflow, reflecting or fixed sides, not {kind} "
                        f"at {AXES[axis]}_{SIDES[side]}"
                    )
        self.equation.check_grid(self.grid)

    # -- what the state is ------------------------------------------------------------------------------------------------------

    @property
    def variables(self) -> tuple[Variable, ...]:
        return self.equation.variables(self.grid.centre)

    @property
    def ledger_rows(self) -> tuple[str, ...]:
        return (*(v.name for v in self.variables), "radiated", *EVENTS)

    @property
    def conserved(self) -> tuple[str, ...]:
        """All channels: what forces, cooling and open sides do to their sums is in the ledger."""
        return tuple(v.name for v in self.variables)

    def prepare(self, dtype) -> "CompressibleFiniteVolume":
        return self

    def encode(self, u: Float[Array, "c *grid"]) -> PyTree:
        events = jnp.zeros((len(EVENTS),), u.dtype).at[:3].set(self._sweep.floors(u))
        z = {"u": u, "injected": jnp.zeros((u.shape[0] + 1,), u.dtype), "events": events}
        if self.equation.forcing is not None:
            z["memory"] = self.equation.forcing.init_memory(self.grid)
        return z

    def decode(self, z: PyTree) -> Float[Array, "c *grid"]:
        return z["u"]

    def constrain(self, z: PyTree) -> PyTree:
        return z

    def project(self, u: Float[Array, "c *grid"]) -> Float[Array, "c *grid"]:
        return u

    def divergence(self, u: Float[Array, "c *grid"]) -> None:
        return None

    def centred(self, u: Float[Array, "c *grid"]) -> Float[Array, "c *grid"]:
        return u

    def collect(self, z: PyTree) -> tuple[PyTree, Float[Array, " row"]]:
        emptied = {**z, "injected": jnp.zeros_like(z["injected"]), "events": jnp.zeros_like(z["events"])}
        return emptied, jnp.concatenate([z["injected"], z["events"]])

    def restrict(self, u: Float[Array, "c *fine"], grid: Grid, variables: tuple[Variable, ...]) -> Float[Array, "c *grid"]:
        """Exact means over the coarse cells of the fine cells' contents: sums are kept, and so is positivity."""
        if not np.allclose(grid.lengths, self.grid.lengths, rtol=1e-12):
            raise ValueError(f"the fine and the coarse grid must span the same box, found {grid.lengths} and {self.grid.lengths}")
        if grid.boundaries != self.grid.boundaries:
            raise ValueError(
                f"the fine and the coarse grid must have the same boundaries, found {grid.boundaries} and {self.grid.boundaries}"
            )
        if all(n % m == 0 for n, m in zip(grid.shape, self.grid.shape, strict=True)):
            factors = tuple(n // m for n, m in zip(grid.shape, self.grid.shape, strict=True))
            return jnp.stack([cell_mean(q, factors) for q in u])
        for axis, (n, m) in enumerate(zip(grid.shape, self.grid.shape, strict=True)):
            fine, coarse = np.arange(n + 1) / n, np.arange(m + 1) / m
            shared = np.minimum(fine[None, 1:], coarse[1:, None]) - np.maximum(fine[None, :-1], coarse[:-1, None])
            weights = jnp.asarray(m * np.maximum(shared, 0), u.dtype)
            u = jnp.moveaxis(jnp.tensordot(u, weights, (axis + 1, 1), precision="highest"), -1, axis + 1)
        return u

    # -- what closures see ------------------------------------------------------------------------------------------------------

    def flux_place(self, axis: int, channel: int):
        return self.grid.flux_place(self.grid.centre, axis)

    def gradient(self, u: Float[Array, "c *grid"]) -> Float[Array, "d c *grid"]:
        """Differences of neighbours at the right faces; a face on a side takes the difference of its inner neighbour."""
        axes = range(self.grid.ndim)
        return jnp.stack([jnp.stack([self.derivative(q, self.grid.centre, a)[0] for q in u]) for a in axes])

    def adjoint_gradient(self, u: Float[Array, "c *grid"]) -> Float[Array, "d c *grid"]:
        """Differences of neighbours at the right faces, of any channels; zero on sides, through which no closure's flux passes."""
        rows = []
        for a, h in enumerate(self.grid.spacing):
            n = self.grid.shape[a]
            first = part(u, 0, 1, a + 1) if self.grid.periodic[a] else part(u, n - 1, n, a + 1)
            rows.append((jnp.concatenate([part(u, 1, n, a + 1), first], a + 1) - u) / h)
        return jnp.stack(rows)

    @property
    def flux_response(self) -> float:
        """Σ_a 4/Δx_a²."""
        return sum(4 / h**2 for h in self.grid.spacing)

    def derivative(self, array, at, axis):
        return staggering.derivative(self.grid, array, at, axis)

    def move(self, array, from_, to):
        return staggering.move(self.grid, array, from_, to)

    def free_weights(self) -> int:
        """How many free coefficients an Interpolation closure has per face, side and channel."""
        return len(null_space(self.reconstruction))

    def receive(self, flux, source) -> PyTree:
        return {name: part for name, part in (("flux", flux), ("source", source)) if part is not None}

    def receive_weights(self, weights: Float[Array, "d side c free *grid"]) -> PyTree:
        """What `euler` will use for the output of an Interpolation closure."""
        return {"weights": weights}

    @property
    def large_program(self) -> bool:
        return self.grid.ndim == 3

    def for_training(self) -> "CompressibleFiniteVolume":
        return dataclasses.replace(self, compact=self.compact or jax.default_backend() == "cpu")

    # -- steps ------------------------------------------------------------------------------------------------------------------

    def linear(self) -> PyTree | None:
        return None

    @property
    def _sweep(self) -> Sweep:
        return Sweep(
            self.grid,
            self.equation,
            self.reconstruction,
            self.riemann,
            self.reconstruct,
            self.density_floor,
            self.pressure_floor,
            compact=self.compact,
        )

    def limiter_dt(self, u: Float[Array, "c *grid"], t: Real | float = 0.0) -> Real:
        """½ / max Σ_a α_a/Δx_a: the largest Δt for which the limiter keeps ρ and p positive."""
        return 0.5 / jnp.max(self._sweep.cell_speeds(u, jnp.asarray(t, u.dtype)))

    def explicit(self, z, t, tendency):
        """dz/dt without the positivity limiter; `euler` is what steppers use."""
        u = z["u"]
        one = jnp.ones((), u.dtype)
        stage = self._sweep(jnp.zeros_like(u), u, tendency(z, t) or {}, jnp.asarray(t, u.dtype), one)
        injected = jnp.concatenate([stage.passed, jnp.zeros((1,), u.dtype)])
        return {"u": stage.new, "injected": injected, "events": jnp.zeros_like(z["events"])}

    def euler(self, z, t, dt, tendency, at=None, rough=False):
        base, sweep = z["u"], self._sweep
        time = jnp.asarray(t, base.dtype)
        from_ = z if at is None else at
        u = None if at is None else at["u"]
        extra = tendency(from_, t) or {}
        stage = sweep(base, u, extra, time, dt, rough)
        nothing = jnp.zeros((len(EVENTS),), base.dtype)

        def again(base: Array, u: Array | None, extra: PyTree) -> tuple[Array, Array, Array]:
            safe = sweep(base, u, extra, time, dt, rough, limit=True)
            slack = 1 + 16 * float(jnp.finfo(base.dtype).eps)
            beyond = dt > jnp.asarray(slack, base.dtype) * safe.limiter_dt
            did = jnp.stack([safe.limited, beyond.astype(base.dtype)])
            return safe.new, safe.passed, jnp.concatenate([sweep.floors(safe.new), did])

        def counted(new: Array, passed: Array) -> tuple[Array, Array, Array]:
            return new, passed, nothing.at[:3].set(sweep.floors(new))

        plain = lambda: (stage.new, stage.passed, nothing)  # noqa: E731
        if self.positivity:
            done = jax.lax.cond(stage.margin > 0, plain, lambda: jax.checkpoint(again)(base, u, extra))
        else:
            done = jax.lax.cond(stage.margin > 0, plain, lambda: counted(stage.new, stage.passed))
        injected = z["injected"] + jnp.concatenate([done[1], jnp.zeros((1,), base.dtype)])
        return {**from_, "u": done[0], "injected": injected, "events": from_["events"] + done[2]}

    def enter(self, z, t, dt):
        forcing = self.equation.forcing
        if forcing is not None:
            # Half of the work with the force before the step, half with that after it.
            z = kicked(self.equation, self.grid, z, 0.5 * dt)
            z = {**z, "memory": forcing.advance(z["memory"], t, dt)}
        return z if self.equation.cooling is None else cooled(self.equation, self._sweep.primitive(z["u"]), z, 0.5 * dt)

    def leave(self, z, t, dt):
        z = z if self.equation.cooling is None else cooled(self.equation, self._sweep.primitive(z["u"]), z, 0.5 * dt)
        return z if self.equation.forcing is None else kicked(self.equation, self.grid, z, 0.5 * dt)

    def stable_dt(self, u):
        """1 / max Σ_a ((|v_a| + a)/Δx_a + 2 D/Δx_a²): waves and explicit diffusion at Courant number 1.

        a is the sound speed, D the largest of 4μ/(3ρ), γμ/(ρ Pr) and the scalars' κ. The positivity limiter's bound is Courant
        number ½ of the waves alone.
        """
        rate = wave_rate(self.equation, self.grid, self._sweep.primitive(u), 2.0)
        return 1 / jnp.maximum(jnp.max(rate), jnp.finfo(u.dtype).tiny)
