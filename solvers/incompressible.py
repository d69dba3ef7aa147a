"""∂t u + ∇·(u u) = −∇p + ν ∇²u + f − μ u,  ∇·u = 0,  ∂t c + ∇·(u c) = κ ∇²c: incompressible flow, without a discretisation."""

import abc
from collections.abc import Mapping, Sequence
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Complex, Float

from hybridsim.contract import Real, Variable
from hybridsim.grid import Grid, Place

SIDES = ("lower", "upper")
AXES = ("x", "y", "z")

TAKEN = (
    *("u", "v", "w", "p", "x", "y", "z", "x_face", "y_face", "z_face", "sample", "time", "variable", "scalar", "wavenumber"),
    *("energy", "enstrophy", "energy_rate", "scalar_variance", "spectrum", "drift", "divergence_max", "correlation"),
    *("vorticity", "pdf", "wasserstein", "value"),
)
"""What no scalar can be called: the names of other channels, and of what is stored beside them."""


def _scalar(value: float | Array) -> float | Array:
    return value if eqx.is_array(value) else float(value)


def _numbers(value: Sequence[float]) -> tuple[float, ...]:
    return tuple(float(x) for x in value)


def _check_drag(drag) -> None:
    if isinstance(drag, float) and not drag >= 0:
        raise ValueError(f"drag: must not be negative, found {drag}")


# --- forces ----------------------------------------------------------------------------------------------------------------------


class AbstractForcing(eqx.Module):
    """f = … − μ u: a body force with a linear drag μ ≥ 0. What else it does is the class below that it derives from."""

    drag: eqx.AbstractVar[float | Float[Array, ""]]

    @abc.abstractmethod
    def check_grid(self, grid: Grid) -> None:
        """Raises `ValueError` where the force cannot be represented on the grid."""


class AbstractStandingForce(AbstractForcing):
    """f = a(x) − μ u: a force that depends on nothing but the place."""

    @abc.abstractmethod
    def acceleration(self, grid: Grid, places: tuple[Place, ...], dtype: Any) -> Float[Array, "d *grid"]:
        """a(x), each component at its own place."""


class AbstractGrowth(AbstractForcing):
    """f = A (u − ⟨u⟩) − μ u: velocity fluctuations are amplified at the rate A, an inverse time."""

    rate: eqx.AbstractVar[float | Float[Array, ""]]


class AbstractBandForce(AbstractForcing):
    """f̂ = b(û, t) − μ û: a force on the Fourier modes of a few large scales; periodic boxes only."""

    @abc.abstractmethod
    def band_force(self, hat: Complex[Array, "d *k"], t: Real, grid: Grid, places: tuple[Place, ...]) -> Complex[Array, "d *k"]:
        """b̂ for û, both as `rfftn` of the d velocity components at `places`."""


class Kolmogorov(AbstractStandingForce):
    """f = A sin(n y) e_x − μ u: a standing shear force and a linear drag.

    **Arguments:**

    - `wavenumber`: n, in units of 2π/L_y, a positive integer.
    - `amplitude`: A, an acceleration.
    - `drag`: μ ≥ 0, an inverse time. Keeps the energy of a 2D cascade finite.

    Good values: n = 4, A = 1, μ = 0.1 in a box 2π at ν = 10⁻³ (Kochkov et al. 2021, doi:10.1073/pnas.2101784118, "Kolmogorov
    flow"). `amplitude` and `drag` may be arrays and are then differentiable. The laminar state is u = A sin(ky) / (ν k² + μ) with
    k = 2πn/L_y.
    """

    wavenumber: int = eqx.field(static=True, default=4)
    amplitude: float | Float[Array, ""] = eqx.field(default=1.0, converter=_scalar)
    drag: float | Float[Array, ""] = eqx.field(default=0.1, converter=_scalar)

    def __check_init__(self):
        if self.wavenumber < 1:
            raise ValueError(f"wavenumber: a Kolmogorov force needs a positive whole number, found {self.wavenumber}")
        _check_drag(self.drag)

    def check_grid(self, grid: Grid) -> None:
        if grid.ndim > 1 and 2 * self.wavenumber >= grid.shape[1]:
            raise ValueError(
                f"equation.forcing.wavenumber: {self.wavenumber} waves need over {2 * self.wavenumber} cells along y, "
                f"not {grid.shape[1]}"
            )

    def acceleration(self, grid: Grid, places: tuple[Place, ...], dtype: Any) -> Float[Array, "d *grid"]:
        y = grid.mesh(places[0])[1]
        shape = jnp.asarray(np.sin(2 * np.pi * self.wavenumber / grid.lengths[1] * y), dtype)
        force = jnp.asarray(self.amplitude, dtype) * shape
        return jnp.stack([force] + [jnp.zeros_like(force)] * (grid.ndim - 1))


class LinearDrag(AbstractForcing):
    """f = −μ u: friction alone.

    **Arguments:** `drag`, μ ≥ 0, an inverse time.
    """

    drag: float | Float[Array, ""] = eqx.field(default=0.1, converter=_scalar)

    def __check_init__(self):
        _check_drag(self.drag)

    def check_grid(self, grid: Grid) -> None:
        return None


class UniformForce(AbstractStandingForce):
    """f = g − μ u: a uniform acceleration, such as the pressure gradient that drives a channel.

    **Arguments:**

    - `acceleration_vector`: g, one entry per axis, length per time².
    - `drag`: μ ≥ 0, an inverse time.

    Between no-slip walls at distance H the laminar state is Poiseuille's, u = g y (H − y) / (2ν).
    """

    acceleration_vector: tuple[float, ...] = eqx.field(static=True, default=(1.0, 0.0), converter=_numbers)
    drag: float | Float[Array, ""] = eqx.field(default=0.0, converter=_scalar)

    def __check_init__(self):
        _check_drag(self.drag)

    def check_grid(self, grid: Grid) -> None:
        if len(self.acceleration_vector) != grid.ndim:
            raise ValueError(
                f"equation.forcing.acceleration_vector: found {len(self.acceleration_vector)} entries for {grid.ndim} axes"
            )

    def acceleration(self, grid: Grid, places: tuple[Place, ...], dtype: Any) -> Float[Array, "d *grid"]:
        return jnp.stack([jnp.full(grid.shape, g, dtype) for g in self.acceleration_vector])


class Linear(AbstractGrowth):
    """f = A (u − ⟨u⟩) − μ u: amplifies all velocity fluctuations alike and so keeps up isotropic turbulence in physical space.

    **Arguments:**

    - `rate`: A, an inverse time; the turbulence settles where the dissipation is 2 A E.
    - `drag`: μ ≥ 0, an inverse time.

    Lundgren 2003, "Linearly forced isotropic turbulence", Annual Research Briefs, Center for Turbulence Research, p. 461; Rosales &
    Meneveau 2005, doi:10.1063/1.2047568, eq. 1. The mean flow is left alone, so that momentum is conserved.
    """

    rate: float | Float[Array, ""] = eqx.field(default=0.1, converter=_scalar)
    drag: float | Float[Array, ""] = eqx.field(default=0.0, converter=_scalar)

    def __check_init__(self):
        if isinstance(self.rate, float) and not np.isfinite(self.rate):
            raise ValueError(f"rate: must be finite, found {self.rate}")
        _check_drag(self.drag)

    def check_grid(self, grid: Grid) -> None:
        return None


class Isotropic(AbstractBandForce):
    """f = (P/D) u_b + r (P/√D) (g − (⟨g·u_b⟩/D) u_b) − μ u,  D = ⟨|u_b|²⟩: large scales stirred at random with fixed power P.

    u_b is the velocity in the band 0 < |k| ≤ (K + ½) k₀, k₀ = 2π/max L. The first term does the work, exactly P per mass and unit
    time at every moment; the second one does none and decorrelates the phases. g(x, t) is solenoidal, of root mean square 1, and
    moves smoothly between fresh Gaussian draws τ apart.

    **Arguments:**

    - `power`: P ≥ 0, energy per mass and time; the dissipation of the stationary state (less the drag's share).
    - `wavenumber`: K ≥ 1, in units of k₀.
    - `randomness`: r ≥ 0, the size of the random part in units of the other.
    - `interval`: τ > 0, the time between draws; about the turnover time of the large scales.
    - `seed`: of the random stream.
    - `drag`: μ ≥ 0, an inverse time.

    The draw number n = ⌊t/τ⌋ is all the state that the stream has, and the draws belong to Fourier modes: every grid, time step and
    precision sees the same stirring, and a resumed run needs nothing stored. All samples of an ensemble are stirred alike. D is
    never less than (P/K k₀)^⅔ / 16, about an eightieth of what it is in turbulence at this power: a fluid at rest is set going by g
    (and stays at rest if r = 0), at less power than P until then. Conserves momentum. The work term is the deterministic forcing at
    fixed power of Machiels 1997, doi:10.1103/PhysRevLett.79.3411; a random force that does no work on average follows Alvelius
    1999, doi:10.1063/1.870050, §II.
    """

    power: float | Float[Array, ""] = eqx.field(default=1.0, converter=_scalar)
    wavenumber: int = eqx.field(static=True, default=2)
    randomness: float | Float[Array, ""] = eqx.field(default=1.0, converter=_scalar)
    interval: float = eqx.field(static=True, default=1.0, converter=float)
    seed: int = eqx.field(static=True, default=0)
    drag: float | Float[Array, ""] = eqx.field(default=0.0, converter=_scalar)

    def __check_init__(self):
        for name in ("power", "randomness"):
            value = getattr(self, name)
            if isinstance(value, float) and not (np.isfinite(value) and value >= 0):
                raise ValueError(f"{name}: must be finite and not negative, found {value}")
        if self.wavenumber < 1:
            raise ValueError(f"wavenumber: needs a positive whole number, found {self.wavenumber}")
        if not (np.isfinite(self.interval) and self.interval > 0):
            raise ValueError(f"interval: must be positive and finite, found {self.interval}")
        if not 0 <= self.seed < 2**31:
            raise ValueError(f"seed: needs a whole number from 0 to 2³¹ − 1, found {self.seed}")
        _check_drag(self.drag)

    def _reach(self, grid: Grid) -> tuple[int, ...]:
        """The largest mode number of the band along each axis."""
        return tuple(int((self.wavenumber + 0.5) * length / max(grid.lengths)) for length in grid.lengths)

    def check_grid(self, grid: Grid) -> None:
        if not all(grid.periodic):
            raise ValueError("equation.forcing: isotropic forcing acts on Fourier modes and needs periodic boundaries")
        if any(2 * m >= n for m, n in zip(self._reach(grid), grid.shape, strict=True)):
            raise ValueError(
                f"equation.forcing.wavenumber: the band up to {self.wavenumber} does not fit on a grid of shape {grid.shape}"
            )

    def band_force(self, hat, t, grid, places):
        reach = self._reach(grid)
        last = grid.ndim - 1
        modes = [np.arange(m + 1) if a == last else np.arange(-m, m + 1) for a, m in enumerate(reach)]
        where = (slice(None), *np.ix_(*[m % n for m, n in zip(modes, grid.shape, strict=True)]))
        number = np.meshgrid(*modes, indexing="ij")
        k = [2 * np.pi / length * m for length, m in zip(grid.lengths, number, strict=True)]
        square = sum(q * q for q in k)
        unit = 2 * np.pi / max(grid.lengths)
        inside = (square > 0) & (np.sqrt(square) <= (self.wavenumber + 0.5) * unit)
        real = hat.real.dtype
        # rfftn keeps one of each conjugate pair off the plane m = 0
        weight = jnp.asarray(np.where(number[last] == 0, 1.0, 2.0) * inside / grid.cells**2, real)
        # the first sample of a component lies at x = a Δx, so this is what makes the stirring the same on every grid
        shifts = [sum(q * a * h for q, a, h in zip(k, at, grid.spacing, strict=True)) for at in places[: grid.ndim]]
        phase = jnp.asarray(np.exp(1j * np.stack(shifts)), hat.dtype)
        directions = jnp.asarray(np.stack(k), real)
        inverse = jnp.asarray(np.where(inside, 1 / np.where(square > 0, square, 1.0), 0.0), real)
        inside = jnp.asarray(inside, real)

        def product(a: Array, b: Array) -> Array:
            return jnp.sum(weight[None] * (a.real * b.real + a.imag * b.imag))

        def solenoidal(a: Array) -> Array:
            return inside[None] * (a - directions * (inverse * jnp.sum(directions * a, axis=0))[None])

        band = hat[where] * jnp.conj(phase)
        # What a real solenoidal field has: the force would amplify rounding errors of all else, which no product drains.
        plane = band[..., 0]
        mirrored = jnp.conj(jnp.flip(plane, tuple(range(1, grid.ndim))))
        band = solenoidal(band.at[..., 0].set(0.5 * (plane + mirrored)))

        draw = jnp.floor(t / self.interval)
        s = t / self.interval - draw
        blend = (s * s * (3 - 2 * s)).astype(real)
        stream = jax.random.key(self.seed)
        lattice = tuple(2 * (m + 1) for m in reach)
        chosen = (slice(None), *np.ix_(*[m % n for m, n in zip(modes, lattice, strict=True)]))

        def noise(n: Array) -> Array:
            # the same numbers in single and in double precision
            return jax.random.normal(jax.random.fold_in(stream, n.astype(jnp.int32)), (grid.ndim, *lattice), jnp.float32)

        before, after = jax.vmap(noise)(jnp.stack([draw, draw + 1])).astype(real)
        noisy = jnp.fft.rfftn((1 - blend) * before + blend * after, axes=tuple(range(1, grid.ndim + 1)))
        g = solenoidal(noisy[chosen])
        g = g / jnp.sqrt(product(g, g))
        power, randomness = jnp.asarray(self.power, real), jnp.asarray(self.randomness, real)
        natural = jnp.where(power > 0, power, 1) / (self.wavenumber * unit)
        least = jnp.cbrt(natural) ** 2 / 16
        energy = jnp.maximum(product(band, band), least)
        across = g - (product(g, band) / energy) * band
        force = (power / energy) * band + (randomness * power / jnp.sqrt(energy)) * across
        return jnp.zeros_like(hat).at[where].set(force * phase)


# --- walls -----------------------------------------------------------------------------------------------------------------------


class AbstractBoundaryVelocity(eqx.Module):
    """U_c(x, t): the velocity of the fluid on one side of the box, where that side is `no_slip` or `fixed`."""

    @abc.abstractmethod
    def __call__(
        self, component: int, position: tuple[Float[np.ndarray, "..."], ...], t: Real
    ) -> Float[Array, "..."] | Float[np.ndarray, "..."] | float:
        """Component `component` at `position`, one coordinate array per axis, broadcast against each other. The component normal
        to the side must not depend on t."""


class Moving(AbstractBoundaryVelocity):
    """U(t) = U₀ cos(ω t): a wall that slides along itself, steadily or to and fro; or a uniform inflow.

    **Arguments:** `velocity`, U₀, one entry per axis; `angular_frequency`, ω ≥ 0, an inverse time (tangential components only).
    """

    velocity: tuple[float, ...] = eqx.field(static=True, default=(1.0, 0.0), converter=_numbers)
    angular_frequency: float = eqx.field(static=True, default=0.0, converter=float)

    def __check_init__(self):
        if not all(np.isfinite(self.velocity)):
            raise ValueError(f"velocity: must be finite, found {self.velocity}")
        if not (np.isfinite(self.angular_frequency) and self.angular_frequency >= 0):
            raise ValueError(f"angular_frequency: must be finite and not negative, found {self.angular_frequency}")

    def __call__(self, component, position, t):
        return self.velocity[component] * jnp.cos(self.angular_frequency * t)


class Parabola(AbstractBoundaryVelocity):
    """U_c = 4 U s (1 − s),  s = x_a / L_a: a parabolic inflow along axis c, zero at both ends of axis a.

    **Arguments:** `speed`, U, at the middle; `component`, c; `across`, a; `length`, L_a, all of the side's axis a.
    """

    speed: float = eqx.field(static=True, default=1.0, converter=float)
    component: int = eqx.field(static=True, default=0)
    across: int = eqx.field(static=True, default=1)
    length: float = eqx.field(static=True, default=1.0, converter=float)

    def __check_init__(self):
        if not (np.isfinite(self.length) and self.length > 0):
            raise ValueError(f"length: must be positive and finite, found {self.length}")

    def __call__(self, component, position, t):
        s = position[self.across] / self.length
        return 4 * self.speed * s * (1 - s) if component == self.component else 0.0 * s


# --- the equation ----------------------------------------------------------------------------------------------------------------


def _diffusivities(value: Mapping[str, float | Array] | None) -> dict[str, float | Array]:
    return {name: _scalar(value[name]) for name in sorted(value)} if value else {}


class NavierStokes(eqx.Module):
    """∂t u + ∇·(u u) = −∇p + ν ∇²u + f − μ u,  ∇·u = 0,  ∂t c + ∇·(u c) = κ ∇²c.

    **Arguments:**

    - `viscosity`: ν ≥ 0, length² per time; may be an array and is then differentiable.
    - `forcing`: None (decaying flow), `Kolmogorov`, `Linear`, `Isotropic`, `UniformForce` or `LinearDrag`.
    - `scalars`: name -> diffusivity κ ≥ 0 of each passive scalar c, length² per time; they follow the velocity among the channels,
      in alphabetical order.
    - `boundary_velocity`: side (`x_lower`, `x_upper`, `y_lower`, …) -> velocity there, for sides that are `no_slip` (at rest if not
      named) or `fixed`.
    """

    viscosity: float | Float[Array, ""] = eqx.field(default=1e-3, converter=_scalar)
    forcing: AbstractForcing | None = None
    scalars: dict[str, float | Float[Array, ""]] = eqx.field(default_factory=dict, converter=_diffusivities)
    boundary_velocity: dict[str, AbstractBoundaryVelocity] = eqx.field(default_factory=dict, converter=dict)

    def __check_init__(self):
        if not isinstance(self.forcing, AbstractForcing | None):
            raise ValueError(
                f"forcing: {type(self.forcing).__name__} does not fit this equation; it takes kolmogorov, isotropic, linear, "
                "linear_drag or uniform"
            )
        if isinstance(self.viscosity, float) and not (np.isfinite(self.viscosity) and self.viscosity >= 0):
            raise ValueError(f"viscosity: must be finite and not negative, found {self.viscosity}")
        for name, value in self.scalars.items():
            if not name.isidentifier() or name in TAKEN:
                raise ValueError(
                    f"scalars: {name!r} cannot name a scalar: it is no plain word, or has a meaning in the files; choose another"
                )
            if isinstance(value, float) and not (np.isfinite(value) and value >= 0):
                raise ValueError(f"scalars.{name}: the diffusivity must be finite and not negative, found {value}")

    @property
    def drag(self) -> float | Real:
        return 0.0 if self.forcing is None else self.forcing.drag

    @property
    def growth(self) -> float | Real:
        return self.forcing.rate if isinstance(self.forcing, AbstractGrowth) else 0.0

    def check_grid(self, grid: Grid) -> None:
        """Raises `ValueError` where a force or a boundary velocity does not fit the grid."""
        if self.forcing is not None:
            self.forcing.check_grid(grid)
        possible = [f"{axis}_{side}" for axis in AXES[: grid.ndim] for side in SIDES]
        kinds = dict(zip(possible, [kind for sides in grid.boundaries for kind in sides], strict=True))
        for name in self.boundary_velocity:
            if name not in possible:
                raise ValueError(f"equation.boundary_velocity.{name}: there is no such side; possible: {', '.join(possible)}")
            if kinds[name] not in ("no_slip", "fixed"):
                raise ValueError(f"equation.boundary_velocity.{name}: a side that is {kinds[name]} takes no velocity")
        for name, kind in kinds.items():
            if kind == "fixed" and name not in self.boundary_velocity:
                raise ValueError(f"equation.boundary_velocity.{name}: the side is fixed, so its velocity must be given")

    def variables(self, places: tuple[Place, ...], centre: Place) -> tuple[Variable, ...]:
        """The channels u, v(, w) at the given places, then the scalars at the cell centre."""
        velocity = [Variable(name, "length/time", at) for name, at in zip("uvw", places, strict=False)]
        return (*velocity, *(Variable(name, "1", centre) for name in self.scalars))
