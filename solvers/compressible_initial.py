"""u(x, 0) of a compressible gas: exact solutions, the classical tests, and turbulence; as means over the cells of any grid.

A pointwise state is given by its primitive variables W(x) and turned into cell means of the conserved variables, so that schemes
of high order can be measured against it. Random states are exact cell means of one band-limited flow, so that a coarse grid starts
from the block means of a fine one.
"""

import abc
import itertools
from collections.abc import Callable, Sequence
from typing import Any, Literal

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray

from hybridsim.grid import Grid, Place, resample
from hybridsim.solvers.compressible import CompressibleNavierStokes

Position = tuple[Float[np.ndarray, "..."], ...]
"""One float64 coordinate array per axis, broadcast against each other."""

Primitive = tuple[Float[np.ndarray, "..."] | float, ...]
"""ρ, v_x(, v_y, v_z), p and the scalars' mass fractions; each broadcasts against the positions."""

GAUSS = ((-np.sqrt(0.15), 5 / 18), (0.0, 4 / 9), (np.sqrt(0.15), 5 / 18))
"""Abscissae in units of the cell, from its centre, and weights of the three-point Gauss–Legendre rule, which is of order 6."""


def _number(value: float | int) -> float:
    return float(value)


def _optional(value: float | int | None) -> float | None:
    return None if value is None else float(value)


def _vector(value: Sequence[float] | None) -> tuple[float, ...] | None:
    return None if value is None else tuple(float(x) for x in value)


def _triple(value: Sequence[float]) -> tuple[float, ...]:
    return tuple(float(x) for x in value)


def _positive(state: eqx.Module, *names: str) -> None:
    for name in names:
        value = getattr(state, name)
        if not (np.isfinite(value) and value > 0):
            raise ValueError(f"{name}: must be positive and finite, found {value}")


def _finite(state: eqx.Module, *names: str) -> None:
    for name in names:
        value = getattr(state, name)
        if value is not None and not np.all(np.isfinite(value)):
            raise ValueError(f"{name}: must be finite, found {value}")


def _share(state: eqx.Module, *names: str) -> None:
    for name in names:
        value = getattr(state, name)
        if not 0 <= value <= 1:
            raise ValueError(f"{name}: must lie between 0 and 1, found {value}")


def _per_axis(name: str, value: tuple[float, ...] | None, grid: Grid, default: Sequence[float]) -> tuple[float, ...]:
    found = tuple(default) if value is None else value
    if len(found) != grid.ndim:
        raise ValueError(f"{name}: found {len(found)} entries for {grid.ndim} axes")
    return found


def _axis(name: str, axis: int, grid: Grid) -> None:
    if not 0 <= axis < grid.ndim:
        raise ValueError(f"{name}: the box has axes 0 to {grid.ndim - 1}, found {axis}")


def _middle(grid: Grid) -> tuple[float, ...]:
    return tuple(length / 2 for length in grid.lengths)


def _offset(x: np.ndarray, origin: float, axis: int, grid: Grid) -> np.ndarray:
    """x − origin, by way of the nearest image along a periodic axis."""
    dx = x - origin
    return dx - grid.lengths[axis] * np.rint(dx / grid.lengths[axis]) if grid.periodic[axis] else dx


def _gamma(equation: CompressibleNavierStokes) -> float:
    """γ as a number: initial states are made before anything is differentiated."""
    return float(equation.gamma)


def _state(density: Any, velocity: Sequence[Any], pressure: Any, fraction: Any, equation: CompressibleNavierStokes) -> Primitive:
    """W, with the same mass fraction for every scalar."""
    return (density, *velocity, pressure, *[fraction] * len(equation.scalars))


def cell_means(
    primitive: Callable[[Position], Primitive], grid: Grid, dtype: Any, equation: CompressibleNavierStokes
) -> Float[Array, "c *grid"]:
    """ū_i = Σ_q w_q u(W(x_i + ξ_q Δx)): means of the conserved variables over the cells, by three Gauss points per axis.

    Of order 6 where W is smooth, and exact where W is the same all over a cell. Computed in double precision on the host, and only
    along axes on which W depends.
    """
    gamma, d = _gamma(equation), grid.ndim

    def conserved(points: Sequence[np.ndarray]) -> np.ndarray:
        rho, *rest = primitive(tuple(np.ix_(*points)))
        v, p, fractions = rest[:d], rest[d], rest[d + 1 :]
        energy = p / (gamma - 1) + 0.5 * rho * sum(q * q for q in v)
        channels = [rho, *(rho * q for q in v), energy, *(rho * c for c in fractions)]
        return np.stack(np.broadcast_arrays(*channels, np.zeros((1,) * d))[:-1])

    x = grid.coordinates()
    used = [n > 1 for n in conserved([q[:2] for q in x]).shape[1:]]
    x = [q if needed else q[:1] for q, needed in zip(x, used, strict=True)]
    rules = [GAUSS if needed else ((0.0, 1.0),) for needed in used]
    # slab by slab, so that 128³ cells need no more room than their means
    rows = max(1, 2**18 // int(np.prod([q.size for q in x[1:]])))
    slabs = []
    for start in range(0, x[0].size, rows):
        part = [x[0][start : start + rows], *x[1:]]
        centre = conserved(part)
        # sums of differences leave alone what is constant in a cell, to the last bit
        correction = np.zeros_like(centre)
        for points in itertools.product(*rules):
            shifts = [shift for shift, _ in points]
            if any(shifts):
                shifted = [q + shift * h for q, shift, h in zip(part, shifts, grid.spacing, strict=True)]
                correction += np.prod([w for _, w in points]) * (conserved(shifted) - centre)
        slabs.append(centre + correction)
    u = np.concatenate(slabs, axis=1)
    return jnp.broadcast_to(jnp.asarray(u, dtype), (u.shape[0], *grid.shape))


class AbstractFlow(eqx.Module):
    """W(x): a state given point by point in the primitive variables."""

    @abc.abstractmethod
    def primitive_at(self, position: Position, grid: Grid, equation: CompressibleNavierStokes) -> Primitive:
        """W at `position` in the box of `grid`."""

    def __call__(
        self, key: PRNGKeyArray, grid: Grid, places: tuple[Place, ...], dtype: Any, equation: CompressibleNavierStokes
    ) -> Float[Array, "c *grid"]:
        return cell_means(lambda x: self.primitive_at(x, grid, equation), grid, dtype, equation)


class AbstractSolution(AbstractFlow):
    """W(x, t): a state that is known at all times."""

    @abc.abstractmethod
    def primitive_at(self, position: Position, grid: Grid, equation: CompressibleNavierStokes, t: float = 0.0) -> Primitive:
        """W at `position` in the box of `grid` and at time t."""

    def solution(self, t: float, grid: Grid, dtype: Any, equation: CompressibleNavierStokes) -> Float[Array, "c *grid"]:
        """The cell means of the exact solution at time t."""
        return cell_means(lambda x: self.primitive_at(x, grid, equation, t), grid, dtype, equation)


# --- exact solutions -------------------------------------------------------------------------------------------------------------


class UniformGas(AbstractSolution):
    """ρ = ρ₀,  v = V,  p = p₀: the same everywhere and at all times. Scalars start at zero.

    **Arguments:** `density`, ρ₀, and `pressure`, p₀, both positive; `velocity`, V, one entry per axis (default: at rest).
    """

    density: float = eqx.field(static=True, converter=_number, default=1.0)
    pressure: float = eqx.field(static=True, converter=_number, default=1.0)
    velocity: tuple[float, ...] | None = eqx.field(static=True, converter=_vector, default=None)

    def __check_init__(self):
        _positive(self, "density", "pressure")
        _finite(self, "velocity")

    def primitive_at(self, position, grid, equation, t=0.0):
        velocity = _per_axis("velocity", self.velocity, grid, (0.0,) * grid.ndim)
        return _state(self.density, velocity, self.pressure, 0.0, equation)


class LinearWave(AbstractSolution):
    """δρ = ε sin φ,  φ = k·x − ω t: a small plane wave on a uniform stream, one wavelength along the axis or the diagonal.

    Sound, `sound_right` and `sound_left`: δv = ± c δρ/ρ₀ n, δp = c² δρ, ω = |k| (V ± c). `entropy`: δv = δp = 0, ω = |k| V.
    `shear`: δρ = δp = 0, δv = (ε/ρ₀) sin φ across n, ω = |k| V. Here n = k/|k|, ρ₀ = 1, p₀ = 1/γ and so c = 1. Scalars are uniform,
    ½, and stay so. Exact to O(ε²).

    **Arguments:**

    - `kind`: `sound_right`, `sound_left`, `entropy` or `shear` (not in one dimension).
    - `amplitude`: ε, about 10⁻⁶; the error of the linear solution is ε², and that of double precision 10⁻¹⁶/ε of the wave.
    - `axis`: the direction of k, 2π/L_axis long; None for the diagonal, k_a = 2π/L_a on every axis.
    - `velocity`: V, the stream along n, length per time.

    The set-up of Athena++'s regression tests (Stone et al. 2020, doi:10.3847/1538-4365/ab929b): γ = 5/3, in three dimensions a box
    3 × 1.5 × 1.5 with the diagonal (1, 2, 2)/3, where the wave is of length 1 and sound needs the time 1 for one period.

    >>> round(LinearWave().period(Grid((64, 32, 32), (3.0, 1.5, 1.5))), 12)
    1.0
    """

    kind: Literal["sound_right", "sound_left", "entropy", "shear"] = eqx.field(static=True, default="sound_right")
    amplitude: float = eqx.field(static=True, converter=_number, default=1e-6)
    axis: int | None = eqx.field(static=True, default=None)
    velocity: float = eqx.field(static=True, converter=_number, default=0.0)

    def __check_init__(self):
        if self.kind not in ("sound_right", "sound_left", "entropy", "shear"):
            raise ValueError(f"kind: {self.kind!r} is not offered; possible: sound_right, sound_left, entropy, shear")
        if not 0 < self.amplitude < 1:
            raise ValueError(f"amplitude: must be positive and far below 1, found {self.amplitude}")
        _finite(self, "velocity")

    def wavevector(self, grid: Grid) -> np.ndarray:
        """k, one entry per axis."""
        if self.axis is not None:
            _axis("axis", self.axis, grid)
        return np.array([2 * np.pi / length if self.axis in (None, a) else 0.0 for a, length in enumerate(grid.lengths)])

    def period(self, grid: Grid) -> float:
        """2π/|ω|, after which the wave is where it was; infinite if it stands still."""
        speed = abs(self.velocity + {"sound_right": 1.0, "sound_left": -1.0}.get(self.kind, 0.0))
        return float(2 * np.pi / np.linalg.norm(self.wavevector(grid)) / speed) if speed else float("inf")

    def primitive_at(self, position, grid, equation, t=0.0):
        k = self.wavevector(grid)
        if self.kind == "shear" and grid.ndim == 1:
            raise ValueError("kind: a shear wave needs two or three dimensions")
        n = k / np.linalg.norm(k)
        sign = {"sound_right": 1.0, "sound_left": -1.0}.get(self.kind, 0.0)
        phase = -np.linalg.norm(k) * (self.velocity + sign) * t
        for q, x in zip(k, position, strict=True):
            if q:
                phase = phase + q * x
        wave = self.amplitude * np.sin(phase)
        if self.kind == "shear":
            across = np.array([-n[1], n[0], *[0.0] * (grid.ndim - 2)])
            across = across / np.linalg.norm(across) if across.any() else np.eye(grid.ndim)[0]
            velocity = [self.velocity * a + wave * b for a, b in zip(n, across, strict=True)]
            return _state(1.0, velocity, 1 / _gamma(equation), 0.5, equation)
        velocity = [(self.velocity + sign * wave) * a for a in n]
        return _state(1.0 + wave, velocity, 1 / _gamma(equation) + abs(sign) * wave, 0.5, equation)


class IsentropicVortex(AbstractSolution):
    """δv = (β/2π) exp((1 − s²)/2) e_z × s,  T = 1 − (γ − 1) β² exp(1 − s²)/(8γπ²),  ρ = T^{1/(γ−1)},  p = ρ T;  s = (x − x_c)/R.

    A smooth vortex that a uniform stream of ρ = p = 1 carries along unchanged. In three dimensions the same at every z. Scalars
    start as exp(−s²) and go along.

    **Arguments:**

    - `strength`: β, positive; T must stay positive, about β < 10 at γ = 1.4.
    - `radius`: R, a length; positive.
    - `velocity`: the stream, one entry per axis (default: 1 along the first two).
    - `centre`: x_c at t = 0, one entry per axis (default: the middle of the box).
    - `axis`: the vortex's axis in three dimensions.

    Exact for the Euler equations in an infinite plane. Take periodic boxes of 20 R and more: in a box of 10 R the tail of the
    vortex jumps by about 10⁻⁵ at the sides, which no scheme converges below. Yee, Sandham & Djomehri 1999,
    doi:10.1006/jcph.1998.6177; β = 5 is usual.
    """

    strength: float = eqx.field(static=True, converter=_number, default=5.0)
    radius: float = eqx.field(static=True, converter=_number, default=1.0)
    velocity: tuple[float, ...] | None = eqx.field(static=True, converter=_vector, default=None)
    centre: tuple[float, ...] | None = eqx.field(static=True, converter=_vector, default=None)
    axis: int = eqx.field(static=True, default=2)

    def __check_init__(self):
        _positive(self, "strength", "radius")
        _finite(self, "velocity", "centre")

    def primitive_at(self, position, grid, equation, t=0.0):
        gamma = _gamma(equation)
        stream = _per_axis("velocity", self.velocity, grid, (1.0, 1.0, 0.0)[: grid.ndim])
        centre = _per_axis("centre", self.centre, grid, _middle(grid))
        (a, x), (b, y) = _turning("isentropic_vortex", position, grid, self.axis, centre, stream, t)
        x, y = x / self.radius, y / self.radius
        bell = np.exp(1 - x * x - y * y)
        temperature = 1 - (gamma - 1) * self.strength**2 / (8 * gamma * np.pi**2) * bell
        if not (gamma - 1) * self.strength**2 * np.e < 8 * gamma * np.pi**2:
            raise ValueError(f"strength: {self.strength} leaves no temperature at the centre of the vortex")
        swirl = self.strength / (2 * np.pi) * np.sqrt(bell)
        velocity: list[Any] = list(stream)
        velocity[a] = stream[a] - swirl * y
        velocity[b] = stream[b] + swirl * x
        density = temperature ** (1 / (gamma - 1))
        return _state(density, velocity, density * temperature, bell / np.e, equation)


class Gresho(AbstractSolution):
    """v_φ = U (s, 2 − s, 0),  p = p₀ + ρ U² (s²/2, s²/2 + 4 − 4s + 4 ln s, 4 ln 2 − 2)  for s = r/R < 1, 1 … 2, > 2.

    A vortex that stands still: p balances the centrifugal force, p₀ = ρ U² (1/(γ M²) − ½), so that M is the Mach number at s = 1
    where the gas is fastest. How much of it a scheme keeps at low M tells its dissipation. In three dimensions the same at every z.
    Scalars start as cos²(π s/4) inside, zero outside.

    **Arguments:**

    - `mach`: M, positive; 0.1 and below is where schemes differ.
    - `speed`: U, length per time; positive.
    - `radius`: R, a length; positive (default: a fifth of the shorter side). The vortex ends at 2R.
    - `density`: ρ, uniform; positive.
    - `velocity`: a stream that carries the vortex, one entry per axis (default: none).
    - `axis`: the vortex's axis in three dimensions.

    Exact for the Euler equations; kinks at s = 1 and s = 2 limit the order of any scheme. Gresho & Chan 1990,
    doi:10.1002/fld.1650110510, with the pressure of Miczek et al. 2015, doi:10.1051/0004-6361/201425059.
    """

    mach: float = eqx.field(static=True, converter=_number, default=0.1)
    speed: float = eqx.field(static=True, converter=_number, default=1.0)
    radius: float | None = eqx.field(static=True, converter=_optional, default=None)
    density: float = eqx.field(static=True, converter=_number, default=1.0)
    velocity: tuple[float, ...] | None = eqx.field(static=True, converter=_vector, default=None)
    axis: int = eqx.field(static=True, default=2)

    def __check_init__(self):
        _positive(self, "mach", "speed", "density")
        if self.radius is not None:
            _positive(self, "radius")
        _finite(self, "velocity")

    def primitive_at(self, position, grid, equation, t=0.0):
        gamma = _gamma(equation)
        stream = _per_axis("velocity", self.velocity, grid, (0.0,) * grid.ndim)
        (a, x), (b, y) = _turning("gresho", position, grid, self.axis, _middle(grid), stream, t)
        radius = 0.2 * min(grid.lengths[a], grid.lengths[b]) if self.radius is None else self.radius
        r = np.sqrt(x * x + y * y)
        s = r / radius
        ends = np.clip(s, 1, 2)
        squared = self.density * self.speed**2
        slope = np.where(s < 1, 1.0, np.where(s < 2, 2 / np.maximum(s, 1) - 1, 0.0))
        inner = np.minimum(s, 1) ** 2 / 2
        outer = (ends**2 - 1) / 2 + 4 * (1 - ends + np.log(ends))
        pressure = squared * (1 / (gamma * self.mach**2) - 0.5 + inner + outer)
        if not 1 / (gamma * self.mach**2) > 0.5:
            raise ValueError(f"mach: {self.mach} leaves no pressure at the centre of the vortex")
        velocity: list[Any] = list(stream)
        velocity[a] = stream[a] - self.speed / radius * slope * y
        velocity[b] = stream[b] + self.speed / radius * slope * x
        return _state(self.density, velocity, pressure, np.cos(np.pi / 4 * np.minimum(s, 2)) ** 2, equation)


def _turning(
    name: str, position: Position, grid: Grid, axis: int, centre: Sequence[float], stream: Sequence[float], t: float
) -> tuple[tuple[int, np.ndarray], tuple[int, np.ndarray]]:
    """The two axes across a vortex's axis, and the coordinates along them from its moving centre."""
    if grid.ndim == 1:
        raise ValueError(f"{name}: a vortex needs two or three dimensions")
    if grid.ndim == 3:
        _axis("axis", axis, grid)
    a, b = (0, 1) if grid.ndim == 2 else ((axis + 1) % 3, (axis + 2) % 3)
    return tuple((c, _offset(position[c], centre[c] + stream[c] * t, c, grid)) for c in (a, b))  # pyright: ignore


# --- discontinuities -------------------------------------------------------------------------------------------------------------


def _left_share(position: float, axis: int, grid: Grid) -> np.ndarray:
    """The share of each cell along `axis` that lies to the left of `position` (a share of the box)."""
    share = np.clip(position * grid.shape[axis] - np.arange(grid.shape[axis]), 0, 1)
    # a face is where it is meant to be, whatever the rounding of the product
    whole = np.rint(share)
    return np.where(np.abs(share - whole) < 1e-9, whole, share)


def _layers(rows: Sequence[np.ndarray | float], axis: int, grid: Grid, dtype: Any) -> Float[Array, "c *grid"]:
    """Channels that depend on one coordinate, on the whole grid."""
    view = [1] * grid.ndim
    view[axis] = grid.shape[axis]
    table = np.stack([np.broadcast_to(row, (grid.shape[axis],)).reshape(view) for row in rows])
    return jnp.broadcast_to(jnp.asarray(table, dtype), (len(rows), *grid.shape))


class ShockTube(eqx.Module):
    """W = W_l for x_a < x₀,  W_r beyond: a membrane that breaks at t = 0. Scalars are 1 on the left and 0 on the right.

    **Arguments:**

    - `left`, `right`: (density, velocity along the axis, pressure) on both sides.
    - `position`: x₀ as a share of the box.
    - `axis`: a.

    Exact cell means; the cell that holds x₀ is mixed. Usual states, γ = 1.4, box 1, up to time t:

    - Sod 1978, doi:10.1016/0021-9991(78)90023-2: (1, 0, 1), (0.125, 0, 0.1), t = 0.25; the default.
    - Lax 1954, doi:10.1002/cpa.3160070112: (0.445, 0.698, 3.528), (0.5, 0, 0.571), t = 0.14.
    - Toro 2009, doi:10.1007/b79761, chapter 10: (1, 0.75, 1), (0.125, 0, 0.1), position 0.3, t = 0.2 (a sonic rarefaction);
      (1, −2, 0.4), (1, 2, 0.4), t = 0.15 (near vacuum); (1, 0, 1000), (1, 0, 0.01), t = 0.012;
      (5.99924, 19.5975, 460.894), (5.99242, −6.19633, 46.095), position 0.4, t = 0.035;
      (1, −19.59745, 1000), (1, −19.59745, 0.01), position 0.8, t = 0.012.
    """

    left: tuple[float, ...] = eqx.field(static=True, converter=_triple, default=(1.0, 0.0, 1.0))
    right: tuple[float, ...] = eqx.field(static=True, converter=_triple, default=(0.125, 0.0, 0.1))
    position: float = eqx.field(static=True, converter=_number, default=0.5)
    axis: int = eqx.field(static=True, default=0)

    def __check_init__(self):
        for name in ("left", "right"):
            state = getattr(self, name)
            if len(state) != 3 or not np.all(np.isfinite(state)):
                raise ValueError(f"{name}: needs a density, a velocity and a pressure, found {state}")
            if not (state[0] > 0 and state[2] > 0):
                raise ValueError(f"{name}: density and pressure must be positive, found {state}")
        _share(self, "position")

    def __call__(
        self, key: PRNGKeyArray, grid: Grid, places: tuple[Place, ...], dtype: Any, equation: CompressibleNavierStokes
    ) -> Float[Array, "c *grid"]:
        _axis("axis", self.axis, grid)
        gamma = _gamma(equation)
        share = _left_share(self.position, self.axis, grid)
        sides = []
        for (density, speed, pressure), fraction in ((self.left, 1.0), (self.right, 0.0)):
            momentum = [density * speed if a == self.axis else 0.0 for a in range(grid.ndim)]
            energy = pressure / (gamma - 1) + 0.5 * density * speed**2
            sides.append([density, *momentum, energy, *[density * fraction] * len(equation.scalars)])
        return _layers([share * a + (1 - share) * b for a, b in zip(*sides, strict=True)], self.axis, grid, dtype)


class ShuOsher(eqx.Module):
    """(ρ, v, p) = (3.857143, 2.629369, 10.33333) for x < x₀,  (1 + ε sin k(x − L/2), 0, 1) beyond.

    A shock of Mach 3 runs into density waves: what a scheme leaves of the short waves behind it tells its resolution. Scalars are 1
    on the left and 0 on the right.

    **Arguments:**

    - `amplitude`: ε, between 0 and 1.
    - `wavenumber`: k, an inverse length.
    - `position`: x₀ as a share of the box.
    - `axis`: the axis along which x runs.

    Exact cell means, for γ = 1.4. The defaults are Athena++'s, in a box of length 2 up to t = 0.47, outflow on both sides. Those of
    Shu & Osher 1989, doi:10.1016/0021-9991(89)90222-2, example 8, are k = 5 in a box of length 10 up to t = 1.8.
    """

    amplitude: float = eqx.field(static=True, converter=_number, default=0.2)
    wavenumber: float = eqx.field(static=True, converter=_number, default=5 * np.pi)
    position: float = eqx.field(static=True, converter=_number, default=0.1)
    axis: int = eqx.field(static=True, default=0)

    def __check_init__(self):
        if not 0 <= self.amplitude < 1:
            raise ValueError(f"amplitude: must be at least 0 and below 1, found {self.amplitude}")
        _positive(self, "wavenumber")
        _share(self, "position")

    def __call__(
        self, key: PRNGKeyArray, grid: Grid, places: tuple[Place, ...], dtype: Any, equation: CompressibleNavierStokes
    ) -> Float[Array, "c *grid"]:
        _axis("axis", self.axis, grid)
        gamma = _gamma(equation)
        density, speed, pressure = 3.857143, 2.629369, 10.33333
        share = _left_share(self.position, self.axis, grid)
        h, middle = grid.spacing[self.axis], grid.lengths[self.axis] / 2
        upper = (np.arange(grid.shape[self.axis]) + 1) * h
        lower = upper - (1 - share) * h
        k = self.wavenumber
        # ∫ sin over the part of the cell beyond x₀, as a product: a difference of cosines would cancel
        half = k * (upper - lower) / 2
        waves = 2 / (k * h) * np.sin(half) * np.sin(k * ((upper + lower) / 2 - middle))
        energy = share * (pressure / (gamma - 1) + 0.5 * density * speed**2) + (1 - share) / (gamma - 1)
        momentum = [share * density * speed if a == self.axis else 0.0 for a in range(grid.ndim)]
        rows = [share * density + (1 - share) + self.amplitude * waves, *momentum, energy]
        return _layers([*rows, *[share * density] * len(equation.scalars)], self.axis, grid, dtype)


class Blast(AbstractFlow):
    """p = p_out + (p_in − p_out) ½(1 − tanh((r − R)/w)),  v = 0,  ρ = ρ₀: a hot ball (disc, slab) that bursts.

    Scalars mark the ball: 1 inside, 0 outside.

    **Arguments:**

    - `inner_pressure`, `outer_pressure`: p_in and p_out, positive.
    - `density`: ρ₀, uniform; positive.
    - `radius`: R, a length; positive.
    - `edge`: w ≥ 0, half the width of the edge, a length; 0 for a sharp edge, which is sampled at three points per axis and cell.
    - `centre`: one entry per axis (default: the middle of the box).

    The defaults are those of Athena++'s problem `blast` (Stone et al. 2020, doi:10.3847/1538-4365/ab929b): γ = 5/3, a periodic box
    1 × 1.5, up to t = 1.
    """

    inner_pressure: float = eqx.field(static=True, converter=_number, default=10.0)
    outer_pressure: float = eqx.field(static=True, converter=_number, default=0.1)
    density: float = eqx.field(static=True, converter=_number, default=1.0)
    radius: float = eqx.field(static=True, converter=_number, default=0.1)
    edge: float = eqx.field(static=True, converter=_number, default=0.0)
    centre: tuple[float, ...] | None = eqx.field(static=True, converter=_vector, default=None)

    def __check_init__(self):
        _positive(self, "inner_pressure", "outer_pressure", "density", "radius")
        if not (np.isfinite(self.edge) and self.edge >= 0):
            raise ValueError(f"edge: must be finite and not negative, found {self.edge}")
        _finite(self, "centre")

    def primitive_at(self, position, grid, equation):
        centre = _per_axis("centre", self.centre, grid, _middle(grid))
        r = np.sqrt(sum(_offset(x, c, a, grid) ** 2 for a, (x, c) in enumerate(zip(position, centre, strict=True))))
        inside = 0.5 * (1 - np.tanh((r - self.radius) / self.edge)) if self.edge else np.where(r < self.radius, 1.0, 0.0)
        pressure = self.outer_pressure + (self.inner_pressure - self.outer_pressure) * inside
        return _state(self.density, [0.0] * grid.ndim, pressure, inside, equation)


# --- instabilities ---------------------------------------------------------------------------------------------------------------


class KelvinHelmholtz(AbstractFlow):
    """ρ = 1 + ½Δ (τ₁ − τ₂),  u = U (τ₁ − τ₂ − 1),  v = A sin(2πx/L_x) (e₁ + e₂),  p = p₀;  τ_i = tanh((y − y_i)/a),
    e_i = exp(−(y − y_i)²/σ²),  y₁ = ¼L_y,  y₂ = ¾L_y.

    Two smooth shear layers that roll up: with explicit viscosity and diffusion a Kelvin–Helmholtz instability that converges. u is
    along the first axis, y is the last one; in three dimensions the same at every place along the axis between. Scalars are the
    dye of the reference, c = 1 + ½(τ₂ − τ₁).

    **Arguments:**

    - `density_contrast`: Δ ≥ 0, the density between the layers less 1; 0 (unstratified) and 1 in the reference.
    - `speed`: U, length per time; positive.
    - `amplitude`: A, length per time.
    - `width`: a; `envelope`: σ; lengths, positive.
    - `pressure`: p₀, positive; at 10 and γ = 5/3 the Mach number U/c is ¼.

    Periodic to about exp(−L_y/(2a)). The flow has the symmetry x → x + ½L_x, y → L_y − y, v → −v, and so is solved twice. Lecoanet
    et al. 2016, doi:10.1093/mnras/stv2564, eq. 8 (our y is their z), in a box 1 × 2 with γ = 5/3.
    """

    density_contrast: float = eqx.field(static=True, converter=_number, default=0.0)
    speed: float = eqx.field(static=True, converter=_number, default=1.0)
    amplitude: float = eqx.field(static=True, converter=_number, default=0.01)
    width: float = eqx.field(static=True, converter=_number, default=0.05)
    envelope: float = eqx.field(static=True, converter=_number, default=0.2)
    pressure: float = eqx.field(static=True, converter=_number, default=10.0)

    def __check_init__(self):
        _positive(self, "speed", "width", "envelope", "pressure")
        _finite(self, "amplitude")
        if not (np.isfinite(self.density_contrast) and self.density_contrast >= 0):
            raise ValueError(f"density_contrast: must be finite and not negative, found {self.density_contrast}")

    def primitive_at(self, position, grid, equation):
        if grid.ndim == 1:
            raise ValueError("kelvin_helmholtz: a shear layer needs two or three dimensions")
        length = grid.lengths[-1]
        low, high = (position[-1] - share * length for share in (0.25, 0.75))
        step = np.tanh(low / self.width) - np.tanh(high / self.width)
        bells = np.exp(-((low / self.envelope) ** 2)) + np.exp(-((high / self.envelope) ** 2))
        across = self.amplitude * np.sin(2 * np.pi / grid.lengths[0] * position[0]) * bells
        velocity = [self.speed * (step - 1), *[0.0] * (grid.ndim - 2), across]
        return _state(1 + 0.5 * self.density_contrast * step, velocity, self.pressure, 1 - 0.5 * step, equation)


class TaylorGreenGas(AbstractFlow):
    """u = U sin X cos Y cos Z,  v = −U (k_x/k_y) cos X sin Y cos Z,  w = 0,  T = T₀,  p = p₀ + Poisson's δp;  X = 2πx/L_x, …

    The Taylor–Green vortex in a gas of uniform temperature, without the factors of Z in two dimensions. p₀ = ρ₀ U²/(γ M²), and δp
    is what an incompressible flow needs, ρ₀U²/16 (cos 2X + cos 2Y)(cos 2Z + 2) in a cube: at low M the flow is that of
    `taylor_green`. Scalars start as ½(1 + cos X).

    **Arguments:** `mach`, M = U/c, positive; `speed`, U, length per time; `density`, ρ₀; both positive.

    At M = 0.1, U = 1, ρ₀ = 1, L = 2π, γ = 1.4, Pr = 0.71 and μ = 1/1600 the dissipation peaks near t = 9 (DeBonis 2013,
    doi:10.2514/6.2013-382; Brachet et al. 1983, doi:10.1017/S0022112083001159).
    """

    mach: float = eqx.field(static=True, converter=_number, default=0.1)
    speed: float = eqx.field(static=True, converter=_number, default=1.0)
    density: float = eqx.field(static=True, converter=_number, default=1.0)

    def __check_init__(self):
        _positive(self, "mach", "speed", "density")

    def primitive_at(self, position, grid, equation):
        if grid.ndim == 1:
            raise ValueError("taylor_green_gas: a solenoidal flow needs two or three dimensions")
        if not all(grid.periodic):
            raise ValueError("taylor_green_gas: needs periodic boundaries")
        k = [2 * np.pi / length for length in grid.lengths]
        x, y, *rest = (q * n for q, n in zip(position, k, strict=True))
        z = np.cos(rest[0]) if rest else 1.0
        u = self.speed * np.sin(x) * np.cos(y) * z
        v = -self.speed * k[0] / k[1] * np.cos(x) * np.sin(y) * z
        squared = self.density * self.speed**2
        if rest:
            # −∇²p = ρ ∂_i u_j ∂_j u_i, mode by mode
            depth = np.cos(2 * rest[0])
            terms = [np.cos(2 * q) * (k[0] ** 2 / n**2 + k[0] ** 2 / (n**2 + k[2] ** 2) * depth) for q, n in ((x, k[0]), (y, k[1]))]
            wave = squared / 8 * (terms[0] + terms[1])
        else:
            wave = squared / 4 * (np.cos(2 * x) + (k[0] / k[1]) ** 2 * np.cos(2 * y))
        still = squared / (_gamma(equation) * self.mach**2)
        pressure = still + wave
        if np.min(pressure) <= 0:
            raise ValueError(f"mach: {self.mach} leaves no pressure in the vortices")
        return _state(self.density * pressure / still, [u, v, *[0.0] * len(rest)], pressure, 0.5 * (1 + np.cos(x)), equation)


# --- turbulence ------------------------------------------------------------------------------------------------------------------


def _lattice_cells(modes: float | int) -> int:
    """An even number of points that carries `modes`, without large prime factors."""
    n = 2 * (int(modes + 1e-9) + 1)
    while True:
        rest = n
        for prime in (2, 3, 5):
            while rest % prime == 0:
                rest //= prime
        if rest == 1 and n % 2 == 0:
            return n
        n += 1


def _carrier(lengths: tuple[float, ...], unit: float, highest: float) -> Grid:
    """The lattice of the modes |k| ≤ highest · unit: a matter of the box and the band alone."""
    return Grid([_lattice_cells(highest * unit * length / (2 * np.pi)) for length in lengths], lengths)


def _noise(key: PRNGKeyArray, lattice: Grid) -> Float[Array, "d *lattice"]:
    # the same numbers in single and in double precision
    return jax.random.normal(key, (lattice.ndim, *lattice.shape), jnp.float32)


def _random_velocity(
    noise: Array,
    lattice: Grid,
    unit: float,
    band: tuple[float, float],
    energy: Callable[[np.ndarray], np.ndarray],
    solenoidal_share: float,
    dtype: Any,
) -> Array:
    """v̂(k) = W_k ξ_k √(E(n)/n^{d−1}) in the band lowest ≤ n = |k|/unit ≤ highest, from the noise ξ on the lattice."""
    k = np.stack(np.broadcast_arrays(*lattice.wavenumbers()))
    n = np.sqrt((k**2).sum(axis=0)) / unit
    inside = (n >= band[0] - 1e-9) & (n <= band[1] + 1e-9)
    if not inside.any():
        raise ValueError(f"highest_mode: no mode of the box lies between {band[0]} and {band[1]}")
    safe = np.where(inside, n, 1.0)
    amplitude = np.where(inside, np.sqrt(energy(safe) / safe ** (lattice.ndim - 1)), 0.0)
    direction = np.where(inside[None], k, 1.0)
    direction = direction / np.sqrt((direction**2).sum(axis=0))
    hat = jnp.fft.rfftn(noise.astype(dtype), axes=tuple(range(1, lattice.ndim + 1)))
    # largest amplitude 1: single precision has no room for k to high powers
    hat = hat * jnp.asarray(amplitude / amplitude.max(), dtype)[None]
    e = jnp.asarray(direction, dtype)
    along = e * jnp.sum(e * hat, axis=0)[None]
    return solenoidal_share * (hat - along) + (1 - solenoidal_share) * along


def _to_space(hat: Array, lattice: Grid) -> Array:
    return jnp.fft.irfftn(hat, s=lattice.shape, axes=tuple(range(hat.ndim - lattice.ndim, hat.ndim)))


def _doubled(q: Array, lattice: Grid) -> Array:
    """The same field at twice as many points per axis, on which products of two such fields are resolved."""
    return resample(q, [2 * n for n in lattice.shape], lattice.centre, lattice.centre)


def _check_band(state: "CompressibleTurbulence | MixingLayer") -> None:
    if not state.lowest_mode > 0:
        raise ValueError(f"lowest_mode: must be positive, found {state.lowest_mode}")
    if not state.lowest_mode <= state.highest_mode <= 64:
        raise ValueError(f"highest_mode: must lie between lowest_mode = {state.lowest_mode} and 64, found {state.highest_mode}")
    _finite(state, "exponent")


class CompressibleTurbulence(eqx.Module):
    """v̂(k) ∝ (ζ P_⊥ + (1 − ζ) P_∥) ξ_k,  E(k) ∝ k^−s or k⁴ exp(−2k²/k_p²),  ρ = ρ₀,  p = p₀: random motion of a uniform gas.

    The start of decaying turbulence. ξ_k is white noise; P_⊥ and P_∥ project across and along k.

    **Arguments:**

    - `mach`: √⟨|v|²⟩/c, positive, with c² = γp₀/ρ₀ (the density is uniform: weighted with it or not is the same).
    - `kinetic_energy`: ⟨½ρ|v|²⟩; takes the place of `mach` where given.
    - `density`, `pressure`: ρ₀ and p₀, positive.
    - `spectrum`: `power_law` or `exponential`.
    - `exponent`: s of the power law; 2 is that of shocks.
    - `peak_wavenumber`: k_p, where the exponential spectrum has its peak, in units of 2π/max L; at most a third of `highest_mode`.
    - `lowest_mode`, `highest_mode`: the band, in units of 2π/max L; at most 64.
    - `solenoidal_share`: ζ from 0 (compressive) to 1 (solenoidal), as in Athena++'s `f_shear` and in Federrath et al. 2010,
      doi:10.1051/0004-6361/200912437, §2. The solenoidal share of the energy is ζ²(d − 1) / (ζ²(d − 1) + (1 − ζ)²) on average: ⅔
      in three and ½ in two dimensions at ζ = ½. In one dimension all motion is compressive, and ζ must be 0.

    Exact cell means of one band-limited flow: the same key gives the same flow on every grid, in every precision, and a coarse grid
    starts from the block means of a fine one. (The motion within its cells then counts as heat, as it does for any cell mean of a
    total energy: √⟨|v|²⟩ is that of the flow, not of the grid.) The mean momentum is zero. Scalars start as ½(1 + cos(2πx/L_x)).

    Two families. Athena++'s problem `turb`: γ = 5/3, box 1, decaying, exponent 2, modes 0 < |n| < 16 (here |n| = 16 as well),
    ζ = ½, total energy `dedt` = 1, thermal energy density 1: `pressure` 0.6666666666666667, `kinetic_energy` 1 (Mach 1.34), and all
    else by default.
    Decaying solenoidal turbulence of Spyropoulos & Blaisdell 1996, doi:10.2514/3.13178: `spectrum` exponential,
    `peak_wavenumber` 4, `solenoidal_share` 1, turbulent Mach number M_t = `mach` 0.2, 0.4 or 0.6 at γ = 1.4, box 2π, `pressure`
    1/(γ M_t²), so that √⟨|v|²⟩ = 1; μ = 0.0028 (T/T₀)^0.76 with T₀ = `pressure`, Pr = 0.72.
    """

    mach: float = eqx.field(static=True, converter=_number, default=1.0)
    kinetic_energy: float | None = eqx.field(static=True, converter=_optional, default=None)
    density: float = eqx.field(static=True, converter=_number, default=1.0)
    pressure: float = eqx.field(static=True, converter=_number, default=1.0)
    spectrum: Literal["power_law", "exponential"] = eqx.field(static=True, default="power_law")
    exponent: float = eqx.field(static=True, converter=_number, default=2.0)
    peak_wavenumber: float = eqx.field(static=True, converter=_number, default=4.0)
    lowest_mode: float = eqx.field(static=True, converter=_number, default=1.0)
    highest_mode: float = eqx.field(static=True, converter=_number, default=16.0)
    solenoidal_share: float = eqx.field(static=True, converter=_number, default=0.5)

    def __check_init__(self):
        _positive(self, "mach", "density", "pressure", "peak_wavenumber")
        if self.kinetic_energy is not None:
            _positive(self, "kinetic_energy")
        if self.spectrum not in ("power_law", "exponential"):
            raise ValueError(f"spectrum: {self.spectrum!r} is not offered; possible: power_law, exponential")
        _check_band(self)
        if self.spectrum == "exponential" and 3 * self.peak_wavenumber > self.highest_mode:
            raise ValueError(
                f"peak_wavenumber: must be at most a third of highest_mode = {self.highest_mode}, found {self.peak_wavenumber}"
            )
        _share(self, "solenoidal_share")

    def _energy(self, n: np.ndarray) -> np.ndarray:
        if self.spectrum == "power_law":
            return n**-self.exponent
        return n**4 * np.exp(-2 * (n / self.peak_wavenumber) ** 2)

    def __call__(
        self, key: PRNGKeyArray, grid: Grid, places: tuple[Place, ...], dtype: Any, equation: CompressibleNavierStokes
    ) -> Float[Array, "c *grid"]:
        if not all(grid.periodic):
            raise ValueError("compressible_turbulence: needs periodic boundaries")
        if grid.ndim == 1 and self.solenoidal_share != 0:
            raise ValueError(
                f"solenoidal_share: in one dimension all motion is compressive and the share is 0, not {self.solenoidal_share}"
            )
        unit = 2 * np.pi / max(grid.lengths)
        lattice = _carrier(grid.lengths, unit, self.highest_mode)
        return self._flow(_noise(key, lattice), lattice, unit, grid, jnp.dtype(dtype), _gamma(equation), len(equation.scalars))

    @eqx.filter_jit
    def _flow(
        self, noise: Array, lattice: Grid, unit: float, grid: Grid, dtype: np.dtype, gamma: float, scalars: int
    ) -> Float[Array, "c *grid"]:
        band = (self.lowest_mode, self.highest_mode)
        v = _to_space(_random_velocity(noise, lattice, unit, band, self._energy, self.solenoidal_share, dtype), lattice)
        energy = self.kinetic_energy
        if energy is None:
            energy = 0.5 * gamma * self.pressure * self.mach**2
        rms = float(np.sqrt(2 * energy / self.density))
        # the lattice carries the band twice over: this mean of a product is exact
        v = v * (rms / jnp.sqrt(jnp.mean(jnp.sum(v * v, axis=0))))

        fine = _doubled(v, lattice)
        kinetic = 0.5 * self.density * jnp.sum(fine * fine, axis=0)
        flow = jnp.concatenate([self.density * fine, kinetic[None]])
        flow = resample(flow, grid.shape, lattice.centre, grid.centre, (True,) * grid.ndim, alias=True)
        x = 2 * np.pi / grid.lengths[0] * grid.coordinates()[0]
        wave = np.sinc(1 / grid.shape[0]) * np.cos(x).reshape(-1, *[1] * (grid.ndim - 1))
        fraction = jnp.broadcast_to(jnp.asarray(self.density * 0.5 * (1 + wave), dtype), grid.shape)
        energy = self.pressure / (gamma - 1) + flow[-1]
        channels = [jnp.full(grid.shape, self.density, dtype), *flow[:-1], energy, *[fraction] * scalars]
        return jnp.stack(channels)


class MixingLayer(eqx.Module):
    """ρ = ρ_h (1 + (χ − 1) ½(1 − τ)),  u = u_c + V ½(1 + τ),  p = p₀,  τ = tanh((z − z₀)/a): hot gas slides over cold gas.

    The radiative mixing layer: cold, dense gas below, hot gas above, seeds of turbulence at the interface. z is the last axis, u is
    along the first one; two or three dimensions. Scalars start as the mass fraction of cold gas, ½(1 − τ).

    **Arguments:**

    - `contrast`: χ = ρ_cold/ρ_hot = T_hot/T_cold, above 1.
    - `velocity`: V, hot less cold; with the defaults its Mach number in hot gas is ½ at γ = 5/3.
    - `cold_velocity`: u_c (default: −V/2, in which frame the layer is symmetric).
    - `hot_density`, `pressure`: ρ_h and p₀, positive.
    - `width`: a, a length; positive.
    - `interface`: z₀ as a share of the box.
    - `seeds`: `random`, v' = ∇ × (g A) with random A; or `sine`, w' = S g Π sin(2π m x/L_x) over the axes along the interface.
      g = exp(−(z − z₀)²/(2σ²)).
    - `seed_speed`: for random seeds the root mean square of |v'| at the interface; for a sine S; length per time.
    - `envelope`: σ, a length; positive.
    - `lowest_mode`, `highest_mode`, `exponent`: the band of ∇ × A, in units of 2π over the longest side along the interface, and s
      of its spectrum E(k) ∝ k^−s.
    - `waves`: m, waves of a sine along each axis of the interface.

    Random seeds are solenoidal, envelope and all. Cell means of one flow: the same key gives the same flow on every grid, and a
    coarse grid starts from the block means of a fine one. T_hot = p₀/ρ_h and T_cold = T_hot/χ; cooling is strongest near
    √(T_cold T_hot).

    The defaults stand for AthenaK's problem `TRML` in a box 1 × 1 × [−½, 1] of 64 × 64 × 96 cells, γ = 5/3, periodic but along z
    (there g multiplies v' itself, which then is not quite solenoidal); with `seeds: sine` and `cold_velocity: 0` one has the
    interface of the older Athena++ decks. Fielding et al. 2020, doi:10.3847/2041-8213/ab8d2c; Tan, Oh & Gronke 2021,
    doi:10.1093/mnras/stab053.
    """

    contrast: float = eqx.field(static=True, converter=_number, default=10**1.75)
    velocity: float = eqx.field(static=True, converter=_number, default=0.6454972243679028)
    cold_velocity: float | None = eqx.field(static=True, converter=_optional, default=None)
    hot_density: float = eqx.field(static=True, converter=_number, default=1.0)
    pressure: float = eqx.field(static=True, converter=_number, default=1.0)
    width: float = eqx.field(static=True, converter=_number, default=0.01)
    interface: float = eqx.field(static=True, converter=_number, default=1 / 3)
    seeds: Literal["random", "sine"] = eqx.field(static=True, default="random")
    seed_speed: float = eqx.field(static=True, converter=_number, default=0.05)
    envelope: float = eqx.field(static=True, converter=_number, default=0.1)
    lowest_mode: float = eqx.field(static=True, converter=_number, default=2.0)
    highest_mode: float = eqx.field(static=True, converter=_number, default=16.0)
    exponent: float = eqx.field(static=True, converter=_number, default=5 / 3)
    waves: int = eqx.field(static=True, default=1)

    def __check_init__(self):
        if not (np.isfinite(self.contrast) and self.contrast > 1):
            raise ValueError(f"contrast: must be above 1 and finite, found {self.contrast}")
        _positive(self, "hot_density", "pressure", "width", "envelope")
        _finite(self, "velocity", "cold_velocity")
        _share(self, "interface")
        if self.seeds not in ("random", "sine"):
            raise ValueError(f"seeds: {self.seeds!r} is not offered; possible: random, sine")
        if not (np.isfinite(self.seed_speed) and self.seed_speed >= 0):
            raise ValueError(f"seed_speed: must be finite and not negative, found {self.seed_speed}")
        _check_band(self)
        if self.waves < 1:
            raise ValueError(f"waves: needs a positive whole number, found {self.waves}")

    def profile(self, z: Float[np.ndarray, "..."], length: float) -> dict[str, Float[np.ndarray, "..."]]:
        """ρ, u and the mass fraction of cold gas without seeds, at heights z in a box `length` high."""
        step = np.tanh((z - self.interface * length) / self.width)
        cold = -0.5 * self.velocity if self.cold_velocity is None else self.cold_velocity
        return {
            "density": self.hot_density * (1 + (self.contrast - 1) * 0.5 * (1 - step)),
            "velocity": cold + self.velocity * 0.5 * (1 + step),
            "cold": 0.5 * (1 - step),
        }

    def _seeds(self, noise: Array | None, lattice: Grid, dtype: Any) -> tuple[Array, Array]:
        """f and h of v' = g f + g' h, on the lattice."""
        along = lattice.lengths[:-1]
        if noise is None:
            wave = np.full(lattice.shape, self.seed_speed)
            for x, length in zip(lattice.mesh()[:-1], along, strict=True):
                wave = wave * np.sin(2 * np.pi * self.waves / length * x)
            f = jnp.asarray(np.stack([np.zeros(lattice.shape)] * len(along) + [wave]), dtype)
            return f, jnp.zeros_like(f)
        band, unit = (self.lowest_mode, self.highest_mode), 2 * np.pi / max(along)
        hat = _random_velocity(noise, lattice, unit, band, lambda n: n**-self.exponent, 1.0, dtype)
        k = lattice.wavenumbers()
        square = sum(q * q for q in k)
        square = np.where(square > 0, square, 1.0)
        # A = ∇ × f/k², of which ∇g × A needs the components along the interface
        curl = [jnp.asarray(q / square, dtype) for q in k]
        if lattice.ndim == 2:
            h = jnp.stack([1j * (curl[0] * hat[1] - curl[1] * hat[0]), jnp.zeros_like(hat[0])])
        else:
            a = 1j * (curl[1] * hat[2] - curl[2] * hat[1])
            b = 1j * (curl[2] * hat[0] - curl[0] * hat[2])
            h = jnp.stack([-b, a, jnp.zeros_like(a)])
        f = _to_space(hat, lattice)
        scale = self.seed_speed / jnp.sqrt(jnp.mean(jnp.sum(f * f, axis=0)))
        return scale * f, scale * _to_space(h, lattice)

    def __call__(
        self, key: PRNGKeyArray, grid: Grid, places: tuple[Place, ...], dtype: Any, equation: CompressibleNavierStokes
    ) -> Float[Array, "c *grid"]:
        if grid.ndim == 1:
            raise ValueError("mixing_layer: a shear layer needs two or three dimensions")
        if not all(grid.periodic[:-1]):
            raise ValueError("mixing_layer: needs periodic boundaries along the interface; z is the last axis")
        if self.seeds == "sine":
            lattice = Grid([*[_lattice_cells(self.waves)] * (grid.ndim - 1), 2], grid.lengths)
            noise = None
        else:
            lattice = _carrier(grid.lengths, 2 * np.pi / max(grid.lengths[:-1]), self.highest_mode)
            noise = _noise(key, lattice)
        return self._flow(noise, lattice, grid, jnp.dtype(dtype), _gamma(equation), len(equation.scalars))

    @eqx.filter_jit
    def _flow(
        self, noise: Array | None, lattice: Grid, grid: Grid, dtype: np.dtype, gamma: float, scalars: int
    ) -> Float[Array, "c *grid"]:
        length, cells, h = grid.lengths[-1], grid.shape[-1], grid.spacing[-1]
        # the layer may be thinner than a cell
        parts = max(1, int(np.ceil(4 * h / self.width)))
        abscissae, weights = np.polynomial.legendre.leggauss(5)
        shifts = (np.arange(parts)[:, None] + 0.5 + 0.5 * abscissae[None]).ravel() / parts
        weights = np.tile(0.5 * weights, parts) / parts
        z = (np.arange(cells)[:, None] + shifts[None]) * h
        layer = self.profile(z, length)
        rho, u, cold = layer["density"], layer["velocity"], layer["cold"]
        distance = z - self.interface * length
        g = np.exp(-0.5 * (distance / self.envelope) ** 2)
        slope = -distance / self.envelope**2 * g

        def over_cells(q: np.ndarray) -> np.ndarray:
            return (q * weights).sum(axis=1)

        def row(q: np.ndarray) -> Array:
            return jnp.broadcast_to(jnp.asarray(over_cells(q).reshape(*[1] * (grid.ndim - 1), -1), dtype), grid.shape)

        f, s = self._seeds(noise, lattice, dtype)
        flat = (True,) * (grid.ndim - 1) + (False,)
        # what the Fourier series through the points of the lattice is at the places of the quadrature
        kernels = {}
        for points in (lattice.shape[-1], 2 * lattice.shape[-1]):
            place = 2 * np.pi * (z[..., None] / length - (np.arange(points) + 0.5) / points)
            waves = [2 * np.cos(n * place) for n in range(1, (points + 1) // 2)]
            kernels[points] = sum(waves, np.ones_like(place)) / points

        def flattened(fields: Array) -> Array:
            """Exact means along the interface of fields on the lattice, still as they are along z."""
            shape = (*grid.shape[:-1], fields.shape[-1])
            return resample(fields, shape, lattice.centre, lattice.centre, flat, alias=True)

        def product(profile: np.ndarray, q: Array) -> Array:
            """Cell means of profile(z) times a flattened field, which is the sum of its Fourier series along z."""
            matrix = np.einsum("iq,iqj->ij", profile * weights[None], kernels[q.shape[-1]])
            return jnp.tensordot(q, jnp.asarray(matrix, dtype), axes=(q.ndim - 1, 1), precision=jax.lax.Precision.HIGHEST)

        fine, bent = _doubled(f, lattice), _doubled(s, lattice)
        pairs = jnp.stack([jnp.sum(a * b, axis=0) for a, b in ((fine, fine), (fine, bent), (bent, bent))])
        f, s, pairs = flattened(f), flattened(s), flattened(pairs)
        momentum = product(rho * g, f) + product(rho * slope, s)
        momentum = momentum.at[0].add(row(rho * u))
        kinetic = row(0.5 * rho * u * u) + product(rho * u * g, f[0]) + product(rho * u * slope, s[0])
        for profile, q in zip((0.5 * rho * g * g, rho * g * slope, 0.5 * rho * slope * slope), pairs, strict=True):
            kinetic = kinetic + product(profile, q)
        internal = self.pressure / (gamma - 1)
        return jnp.stack([row(rho), *momentum, internal + kinetic, *[row(rho * cold)] * scalars])
