"""∂t U + ∇·(F(U) − F_v(U)) = S(U): compressible flow of an ideal gas, without a discretisation."""

import abc
from collections.abc import Mapping, Sequence

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PyTree

from hybridsim.contract import Real, Variable
from hybridsim.grid import Grid, Place
from hybridsim.solvers.cooling import AbstractCooling
from hybridsim.solvers.stirring import AbstractStirring

AXES = ("x", "y", "z")
SIDES = ("lower", "upper")

TAKEN = (
    *("density", "momentum_x", "momentum_y", "momentum_z", "energy", "velocity_x", "velocity_y", "velocity_z", "pressure"),
    *("temperature", "mach", "x", "y", "z", "x_face", "y_face", "z_face", "sample", "time", "variable", "scalar", "wavenumber"),
    *("spectrum", "drift", "divergence_max", "correlation", "vorticity", "pdf", "wasserstein", "value", "u", "v", "w", "p"),
)
"""What no scalar can be called: the names of other channels, and of what is stored beside them."""

Channels = list[Array]
"""The channels of a state as separate arrays, in the order of `CompressibleNavierStokes.variables`."""


def _scalar(value: float | Array) -> float | Array:
    return value if eqx.is_array(value) else float(value)


def _numbers(value: Sequence[float]) -> tuple[float, ...]:
    return tuple(float(x) for x in value)


def _diffusivities(value: Mapping[str, float | Array] | None) -> dict[str, float | Array]:
    return {name: _scalar(value[name]) for name in sorted(value)} if value else {}


def channels_of(q: Float[Array, "c *grid"]) -> Channels:
    """The channels of an array, by one operation whose transpose is a concatenation and not a sum of padded arrays."""
    return [part.reshape(q.shape[1:]) for part in jax.lax.split(q, (1,) * q.shape[0])]


def is_zero(value: float | Array) -> bool:
    """Whether a coefficient is known to vanish before anything is traced."""
    return isinstance(value, float) and value == 0


# --- what enters through a side --------------------------------------------------------------------------------------------------


class AbstractBoundaryState(eqx.Module):
    """W(x, t): the gas beyond a side of the box that is `fixed`."""

    @abc.abstractmethod
    def __call__(self, position: Sequence[Array], t: Real) -> Channels:
        """ρ, velocity components, p and mass fractions at `position` (one coordinate array per axis, broadcast together)."""


class UniformInflow(AbstractBoundaryState):
    """W = (ρ, v, p, c): the same gas everywhere beyond the side.

    **Arguments:** `density` ρ > 0; `velocity`, one entry per axis; `pressure` p > 0; `scalars`, mass fractions in the alphabetical
    order of the equation's scalars.
    """

    density: float = eqx.field(static=True, default=1.0, converter=float)
    velocity: tuple[float, ...] = eqx.field(static=True, default=(1.0,), converter=_numbers)
    pressure: float = eqx.field(static=True, default=1.0, converter=float)
    scalars: tuple[float, ...] = eqx.field(static=True, default=(), converter=_numbers)

    def __check_init__(self):
        for name in ("density", "pressure"):
            if not (np.isfinite(getattr(self, name)) and getattr(self, name) > 0):
                raise ValueError(f"{name}: must be positive and finite, found {getattr(self, name)}")
        if not all(np.isfinite((*self.velocity, *self.scalars))):
            raise ValueError(f"velocity: velocities and scalars must be finite, found {(*self.velocity, *self.scalars)}")

    def __call__(self, position, t):
        shape = jnp.zeros(jnp.broadcast_shapes(*(q.shape for q in position)), position[0].dtype)
        values = (self.density, *self.velocity, self.pressure, *self.scalars)
        return [shape + jnp.asarray(value, shape.dtype) for value in values]


class ShearInflow(AbstractBoundaryState):
    """W(s) = ½ (W₁ + W₂) + ½ (W₂ − W₁) tanh((s − s₀)/a): two streams, one beside the other; density, velocity and scalars.

    An inflow for spatial mixing layers: s is the coordinate along `across`.

    **Arguments:** `densities`, `speeds` (along `component`) and `scalars` of the streams below and above; `pressure`; `centre` s₀
    and `width` a > 0, lengths; `across`, `component`, axes.
    """

    densities: tuple[float, ...] = eqx.field(static=True, default=(1.0, 1.0), converter=_numbers)
    speeds: tuple[float, ...] = eqx.field(static=True, default=(-0.5, 0.5), converter=_numbers)
    pressure: float = eqx.field(static=True, default=1.0, converter=float)
    centre: float = eqx.field(static=True, default=0.5, converter=float)
    width: float = eqx.field(static=True, default=0.05, converter=float)
    across: int = eqx.field(static=True, default=1)
    component: int = eqx.field(static=True, default=0)
    scalars: tuple[float, ...] = eqx.field(static=True, default=(0.0, 1.0), converter=_numbers)

    def __check_init__(self):
        for name in ("densities", "speeds", "scalars"):
            if len(getattr(self, name)) != 2:
                raise ValueError(f"{name}: needs two entries, below and above, found {getattr(self, name)}")
        if not all(q > 0 for q in (*self.densities, self.pressure, self.width)):
            raise ValueError("densities: densities, pressure and width must be positive")

    def __call__(self, position, t):
        step = 0.5 * (1 + jnp.tanh((position[self.across] - self.centre) / self.width))
        step = jnp.broadcast_to(step, jnp.broadcast_shapes(*(q.shape for q in position)))
        mixed = lambda pair: pair[0] + (pair[1] - pair[0]) * step  # noqa: E731
        velocity = [mixed(self.speeds) if c == self.component else jnp.zeros_like(step) for c in range(len(position))]
        return [mixed(self.densities), *velocity, jnp.full_like(step, self.pressure), mixed(self.scalars)]


# --- the equation ----------------------------------------------------------------------------------------------------------------


class CompressibleNavierStokes(eqx.Module):
    """∂t ρ + ∇·(ρv) = 0,  ∂t(ρv) + ∇·(ρvv + p − τ) = ρa,  ∂t E + ∇·((E + p)v − τ·v − λ∇T) = ρv·a − ρ²Λ(T),  E = p/(γ−1) + ½ρv².

    An ideal gas with T = p/ρ (gas constant 1), τ = μ (∇v + ∇vᵀ − ⅔ ∇·v), μ = μ₀ (T/T₀)ⁿ, λ = μ γ/(γ−1)/Pr, and passive scalars
    ∂t(ρc) + ∇·(ρcv − ρκ∇c) = 0. Euler's equations where μ₀ = 0.

    **Arguments:**

    - `gamma`: γ > 1, ratio of specific heats; 5/3 for a monatomic gas, 1.4 for air. An array is differentiable.
    - `viscosity`: μ₀ ≥ 0, dynamic viscosity (mass per length and time); may be an array and is then differentiable.
    - `viscosity_exponent`: n; 0 for a constant viscosity, 0.76 for air.
    - `reference_temperature`: T₀ > 0.
    - `prandtl`: Pr > 0; 0.72 for air.
    - `scalars`: name -> diffusivity κ ≥ 0 (length² per time) of each passive scalar; the state holds ρc, in alphabetical order.
    - `forcing`: None or a stirring acceleration a(x, t), `OrnsteinUhlenbeck`.
    - `cooling`: None or the radiative loss Λ(T).
    - `boundary_state`: side (`x_lower`, `x_upper`, …) -> the gas beyond it, for sides that are `fixed`.
    """

    gamma: float | Float[Array, ""] = eqx.field(default=1.4, converter=_scalar)
    viscosity: float | Float[Array, ""] = eqx.field(default=0.0, converter=_scalar)
    viscosity_exponent: float = eqx.field(static=True, default=0.0, converter=float)
    reference_temperature: float = eqx.field(static=True, default=1.0, converter=float)
    prandtl: float | Float[Array, ""] = eqx.field(default=0.72, converter=_scalar)
    scalars: dict[str, float | Float[Array, ""]] = eqx.field(default_factory=dict, converter=_diffusivities)
    forcing: AbstractStirring | None = None
    cooling: AbstractCooling | None = None
    boundary_state: dict[str, AbstractBoundaryState] = eqx.field(default_factory=dict, converter=dict)

    def __check_init__(self):
        if isinstance(self.gamma, float) and not (np.isfinite(self.gamma) and self.gamma > 1):
            raise ValueError(f"gamma: must be finite and greater than 1, found {self.gamma}")
        if not isinstance(self.forcing, AbstractStirring | None):
            raise ValueError(f"forcing: {type(self.forcing).__name__} does not fit this equation; it takes ornstein_uhlenbeck")
        if isinstance(self.viscosity, float) and not (np.isfinite(self.viscosity) and self.viscosity >= 0):
            raise ValueError(f"viscosity: must be finite and not negative, found {self.viscosity}")
        if not np.isfinite(self.viscosity_exponent):
            raise ValueError(f"viscosity_exponent: must be finite, found {self.viscosity_exponent}")
        for name in ("reference_temperature", "prandtl"):
            value = getattr(self, name)
            if isinstance(value, float) and not (np.isfinite(value) and value > 0):
                raise ValueError(f"{name}: must be positive and finite, found {value}")
        if self.cooling is not None:
            self.cooling.check_gamma(self.gamma)
        for name, value in self.scalars.items():
            if not name.isidentifier() or name in TAKEN:
                raise ValueError(
                    f"scalars: {name!r} cannot name a scalar: it is no plain word, or has a meaning in the files; choose another"
                )
            if isinstance(value, float) and not (np.isfinite(value) and value >= 0):
                raise ValueError(f"scalars.{name}: the diffusivity must be finite and not negative, found {value}")

    def check_grid(self, grid: Grid) -> None:
        """Raises `ValueError` where a force or a boundary state does not fit the grid."""
        if self.forcing is not None:
            self.forcing.check_grid(grid)
        possible = [f"{axis}_{side}" for axis in AXES[: grid.ndim] for side in SIDES]
        kinds = dict(zip(possible, [kind for sides in grid.boundaries for kind in sides], strict=True))
        for name in self.boundary_state:
            if name not in possible:
                raise ValueError(f"equation.boundary_state.{name}: there is no such side; possible: {', '.join(possible)}")
            if kinds[name] != "fixed":
                raise ValueError(f"equation.boundary_state.{name}: a side that is {kinds[name]} takes no state")
        for name, kind in kinds.items():
            if kind == "fixed" and name not in self.boundary_state:
                raise ValueError(f"equation.boundary_state.{name}: the side is fixed, so the gas beyond it must be given")

    @property
    def ideal(self) -> bool:
        """Whether there is neither viscosity nor conduction nor diffusion (Euler's equations), known before tracing."""
        return is_zero(self.viscosity) and all(is_zero(kappa) for kappa in self.scalars.values())

    def variables(self, centre: Place) -> tuple[Variable, ...]:
        """density, momentum_x(, momentum_y, momentum_z), energy, then ρc of every scalar."""
        d = len(centre)
        momentum = [Variable(f"momentum_{axis}", "density*length/time", centre) for axis in AXES[:d]]
        energy = Variable("energy", "density*length^2/time^2", centre)
        return (Variable("density", "density", centre), *momentum, energy, *(Variable(n, "density", centre) for n in self.scalars))

    # -- pointwise --------------------------------------------------------------------------------------------------------------

    def primitive(self, u: Float[Array, "c *grid"]) -> Float[Array, "c *grid"]:
        """W = (ρ, v, p, c) of U = (ρ, ρv, E, ρc)."""
        return jnp.stack(self.primitive_channels(channels_of(u), u.ndim - 1))

    def conserved(self, w: Float[Array, "c *grid"]) -> Float[Array, "c *grid"]:
        """U = (ρ, ρv, E, ρc) of W = (ρ, v, p, c)."""
        return jnp.stack(self.conserved_channels(channels_of(w), w.ndim - 1))

    def primitive_channels(self, u: Sequence[Array], d: int) -> Channels:
        """`primitive` of channels in d dimensions."""
        rho, energy = u[0], u[d + 1]
        per_mass = 1 / rho
        v = [m * per_mass for m in u[1 : d + 1]]
        kinetic = _sum([m * q for m, q in zip(u[1 : d + 1], v, strict=True)])
        p = (self._gamma(rho) - 1) * (energy - 0.5 * kinetic)
        return [rho, *v, p, *(s * per_mass for s in u[d + 2 :])]

    def conserved_channels(self, w: Sequence[Array], d: int) -> Channels:
        """`conserved` of channels in d dimensions."""
        rho, v, p = w[0], w[1 : d + 1], w[d + 1]
        energy = p / (self._gamma(rho) - 1) + 0.5 * rho * _sum([q * q for q in v])
        return [rho, *(rho * q for q in v), energy, *(rho * c for c in w[d + 2 :])]

    def flux(self, w: Sequence[Array], axis: int, d: int) -> Channels:
        """F_axis(W) of the ideal gas."""
        rho, v, p = w[0], w[1 : d + 1], w[d + 1]
        mass = rho * v[axis]
        enthalpy = self._gamma(rho) / (self._gamma(rho) - 1) * p + 0.5 * rho * _sum([q * q for q in v])
        momentum = [mass * q + p if a == axis else mass * q for a, q in enumerate(v)]
        return [mass, *momentum, v[axis] * enthalpy, *(mass * c for c in w[d + 2 :])]

    def temperature(self, u: Float[Array, "c *grid"]) -> Float[Array, "*grid"]:
        """T = p/ρ."""
        w = self.primitive(u)
        return w[u.ndim] / w[0]

    def sound_speed(self, u: Float[Array, "c *grid"]) -> Float[Array, "*grid"]:
        """√(γ p/ρ)."""
        return jnp.sqrt(self._gamma(u) * self.temperature(u))

    def dynamic_viscosity(self, temperature: Float[Array, "*grid"]) -> Float[Array, "*grid"]:
        """μ₀ (T/T₀)ⁿ."""
        mu = jnp.asarray(self.viscosity, temperature.dtype)
        if self.viscosity_exponent == 0:
            return jnp.broadcast_to(mu, temperature.shape)
        return mu * jnp.exp(self.viscosity_exponent * jnp.log(temperature / self.reference_temperature))

    def _gamma(self, like: Array) -> Array:
        return jnp.asarray(self.gamma, like.dtype)


def _sum(terms: Sequence[Array]) -> Array:
    total = terms[0]
    for term in terms[1:]:
        total = total + term
    return total


# --- what solvers integrate beside their steps -----------------------------------------------------------------------------------


def kicked(equation: CompressibleNavierStokes, grid: Grid, z: PyTree, dt: Real) -> PyTree:
    """ρv ← ρv + Δt ρa and E ← E + the work done, which leaves the internal energy as it is."""
    d, u, forcing = grid.ndim, z["u"], equation.forcing
    assert forcing is not None
    a = forcing.acceleration(z["memory"], grid, u.dtype)
    push = dt * u[0][None] * a
    work = jnp.sum(dt * a * (u[1 : d + 1] + 0.5 * push), axis=0)
    gained = jnp.concatenate([jnp.zeros_like(u[:1]), push, work[None], jnp.zeros_like(u[d + 2 :])])
    means = gained.mean(axis=tuple(range(1, u.ndim)))
    return {**z, "u": u + gained, "injected": z["injected"].at[:-1].add(means)}


def cooled(equation: CompressibleNavierStokes, w: Float[Array, "c *grid"], z: PyTree, dt: Real) -> PyTree:
    """E ← E − ρ (T − T')/(γ − 1), T' after Δt of cooling at constant density; `w`: the primitive variables of z."""
    u, cooling = z["u"], equation.cooling
    d = u.ndim - 1
    assert cooling is not None
    gamma = jnp.asarray(equation.gamma, u.dtype)
    energy = u[d + 1] - w[0] * cooling.drop(w[d + 1] / w[0], w[0], dt, gamma) / (gamma - 1)
    # What has left the state, rounding included.
    lost = jnp.mean(u[d + 1] - energy)
    kept = jnp.concatenate([u[: d + 1], energy[None], u[d + 2 :]])
    return {**z, "u": kept, "injected": z["injected"].at[d + 1].add(-lost).at[-1].add(lost)}


def wave_rate(
    equation: CompressibleNavierStokes, grid: Grid, w: Float[Array, "c *grid"], diffusive: float
) -> Float[Array, "*grid"]:
    """Σ_a ((|v_a| + a)/Δx_a + `diffusive` D/Δx_a²), D the largest of 4μ/(3ρ), γμ/(ρ Pr) and the scalars' κ."""
    d = grid.ndim
    gamma = jnp.asarray(equation.gamma, w.dtype)
    sound = jnp.sqrt(gamma * w[d + 1] / w[0])
    rate = jnp.zeros_like(sound)
    for axis, h in enumerate(grid.spacing):
        rate = rate + (jnp.abs(w[1 + axis]) + sound) / h
    if not equation.ideal:
        kinematic = equation.dynamic_viscosity(w[d + 1] / w[0]) / w[0]
        diffusivity = kinematic * jnp.maximum(4 / 3, gamma / jnp.asarray(equation.prandtl, w.dtype))
        for kappa in equation.scalars.values():
            if not is_zero(kappa):
                diffusivity = jnp.maximum(diffusivity, jnp.asarray(kappa, w.dtype))
        rate = rate + diffusive * diffusivity * sum(1 / h**2 for h in grid.spacing)
    return rate
