"""u(x, 0): initial states, the same field whatever grid it is put on."""

from collections.abc import Sequence
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray

from hybridsim.grid import Grid, Place, resample


def _number(value: float | int) -> float:
    return float(value)


def _shape(value: Sequence[int] | None) -> tuple[int, ...] | None:
    return None if value is None else tuple(int(n) for n in value)


def _vector(value: Sequence[float] | None) -> tuple[float, ...] | None:
    return None if value is None else tuple(float(x) for x in value)


def _periodic(grid: Grid, name: str) -> None:
    if not all(grid.periodic):
        raise ValueError(f"{name}: needs periodic boundaries; between walls start from uniform")


class RandomVelocity(eqx.Module):
    """E(k) ∝ (1/k) exp(−(ln k/k_p − σ²)² / 2σ²),  max |u| = U: a random solenoidal velocity.

    In two dimensions from a random stream function, in three from a vector potential. Log-normal around the peak wavenumber with
    variance σ² = ¼ (the family of the learned-interpolation literature, Kochkov et al. 2021, doi:10.1073/pnas.2101784118,
    supplement). The random numbers belong to Fourier modes of a fixed lattice, so the same key gives the same flow on every grid
    that resolves it. Passive scalars start as random fields of the same spectrum with max |c| = 1.

    **Arguments:**

    - `peak_wavenumber`: k_p, in units of 2π/max L; positive, at most 24 (12 in three dimensions).
    - `max_speed`: U, length per time; positive.
    - `warm_up`: time that the reference solver runs before t = 0, so that the flow forgets this state.
    - `warm_up_shape`: a coarser grid for the first nine tenths of the warm-up, to save time; the last tenth always runs on the
      reference's own grid.
    """

    peak_wavenumber: float = eqx.field(static=True, converter=_number, default=4.0)
    max_speed: float = eqx.field(static=True, converter=_number, default=7.0)
    warm_up: float = eqx.field(static=True, converter=_number, default=0.0)
    warm_up_shape: tuple[int, ...] | None = eqx.field(static=True, default=None, converter=_shape)

    def __check_init__(self):
        for name in ("peak_wavenumber", "max_speed"):
            if not (np.isfinite(getattr(self, name)) and getattr(self, name) > 0):
                raise ValueError(f"{name}: must be positive and finite, found {getattr(self, name)}")
        if not self.peak_wavenumber <= 24:
            raise ValueError(f"peak_wavenumber: must be at most 24, found {self.peak_wavenumber}: the random modes reach 30")
        if not (np.isfinite(self.warm_up) and self.warm_up >= 0):
            raise ValueError(f"warm_up: must be finite and not negative, found {self.warm_up}")

    def __call__(self, key: PRNGKeyArray, grid: Grid, places: tuple[Place, ...], dtype: Any) -> Float[Array, "c *grid"]:
        if grid.ndim == 1:
            raise ValueError("random_velocity: a solenoidal flow needs two or three dimensions; use random_waves")
        _periodic(grid, "random_velocity")
        if grid.ndim == 3 and self.peak_wavenumber > 12:
            raise ValueError(f"peak_wavenumber: in 3D at most 12, found {self.peak_wavenumber}: the random modes reach 14")
        cells = 64 if grid.ndim == 2 else 32
        top = cells // 2 - 1
        lattice = Grid((cells,) * grid.ndim, grid.lengths)
        k = lattice.wavenumbers()
        unit = 2 * np.pi / max(grid.lengths)
        square = sum(q * q for q in k)
        radius = np.sqrt(np.where(square > 0, square, 1.0)) / unit
        variance = 0.25
        energy = np.exp(-((np.log(radius / self.peak_wavenumber) - variance) ** 2) / (2 * variance)) / radius
        # energy per mode is E(k) / k^(d − 1), and |u| = k |ψ|
        amplitude = np.where(square > 0, np.sqrt(energy / radius ** (grid.ndim + 1)), 0.0)
        inside = np.where(square > 0, 1.0, 0.0)
        for q in k:
            inside = inside * (np.abs(q) < top * unit)
        amplitude = jnp.asarray(amplitude * inside, dtype)
        i_k = [1j * jnp.asarray(q, dtype) for q in k]
        axes = tuple(range(-grid.ndim, 0))

        def noise(n: int, *lead: int) -> Array:
            source = key if n == 0 else jax.random.fold_in(key, n)
            return jnp.fft.rfftn(jax.random.normal(source, (*lead, *lattice.shape), dtype), axes=axes)

        if grid.ndim == 2:
            psi = noise(0) * amplitude
            hat = jnp.stack([i_k[1] * psi, -i_k[0] * psi])
        else:
            a = noise(0, 3) * amplitude[None]
            hat = jnp.stack([i_k[1] * a[2] - i_k[2] * a[1], i_k[2] * a[0] - i_k[0] * a[2], i_k[0] * a[1] - i_k[1] * a[0]])
        u = jnp.fft.irfftn(hat, s=lattice.shape, axes=axes)
        refined = (256 if grid.ndim == 2 else 64,) * grid.ndim

        def fine(q: Array) -> Array:
            return resample(q, refined, lattice.centre, lattice.centre)

        speed = jnp.sqrt(jnp.max(sum(fine(q) ** 2 for q in u)))
        channels = [self.max_speed / speed * q for q in u]
        for n in range(len(places) - grid.ndim):
            c = jnp.fft.irfftn(noise(n + 1) * amplitude * jnp.asarray(radius, dtype), s=lattice.shape, axes=axes)
            channels.append(c / jnp.max(jnp.abs(fine(c))))
        return jnp.stack([resample(q, grid.shape, lattice.centre, at) for q, at in zip(channels, places, strict=True)])


class TaylorGreen(eqx.Module):
    """u = U sin(k_x x) cos(k_y y) cos(k_z z),  v = −U (k_x/k_y) cos(k_x x) sin(k_y y) cos(k_z z),  w = 0;  k_a = 2π/L_a.

    The vortex of Taylor & Green 1937, doi:10.1098/rspa.1937.0036; without the factors of z in two dimensions, where it decays as
    exp(−ν (k_x² + k_y²) t) and keeps its shape. In three dimensions it breaks down into turbulence: at U = 1, L = 2π, ν = 1/1600
    the dissipation peaks near t = 9 (Brachet et al. 1983, doi:10.1017/S0022112083001159). Scalars start as cos(k_x x).

    **Arguments:** `speed`, U, length per time; positive.
    """

    speed: float = eqx.field(static=True, converter=_number, default=1.0)

    def __check_init__(self):
        if not (np.isfinite(self.speed) and self.speed > 0):
            raise ValueError(f"speed: must be positive and finite, found {self.speed}")

    def __call__(self, key: PRNGKeyArray, grid: Grid, places: tuple[Place, ...], dtype: Any) -> Float[Array, "c *grid"]:
        if grid.ndim == 1:
            raise ValueError("taylor_green: a solenoidal flow needs two or three dimensions")
        _periodic(grid, "taylor_green")
        k = [2 * np.pi / length for length in grid.lengths]
        out = []
        for c, at in enumerate(places):
            x, y, *rest = (q * n for q, n in zip(grid.mesh(at), k, strict=True))
            z = np.cos(rest[0]) if rest else 1.0
            if c == 0:
                out.append(self.speed * np.sin(x) * np.cos(y) * z)
            elif c == 1:
                out.append(-self.speed * k[0] / k[1] * np.cos(x) * np.sin(y) * z)
            else:
                out.append(np.zeros(grid.shape) if c < grid.ndim else np.cos(x))
        return jnp.asarray(np.stack(out), dtype)


class Uniform(eqx.Module):
    """u = U, the same everywhere; at rest by default. Scalars start at zero. What walls and forces make of it is up to them.

    **Arguments:** `velocity`, U, one entry per axis (default: at rest).
    """

    velocity: tuple[float, ...] | None = eqx.field(static=True, converter=_vector, default=None)

    def __check_init__(self):
        if self.velocity is not None and not all(np.isfinite(self.velocity)):
            raise ValueError(f"velocity: must be finite, found {self.velocity}")

    def __call__(self, key: PRNGKeyArray, grid: Grid, places: tuple[Place, ...], dtype: Any) -> Float[Array, "c *grid"]:
        velocity = (0.0,) * grid.ndim if self.velocity is None else self.velocity
        if len(velocity) != grid.ndim:
            raise ValueError(f"velocity: found {len(velocity)} entries for {grid.ndim} axes")
        values = [*velocity, *[0.0] * (len(places) - grid.ndim)]
        return jnp.stack([jnp.full(grid.shape, value, dtype) for value in values])


class RandomWaves(eqx.Module):
    """u = A √(1/M) Σ_m (a_m cos(2πm x/L) + b_m sin(2πm x/L)),  m = 1 … M,  2πM/L ≤ k_max: random long waves on a line.

    a_m and b_m are normal; ⟨u⟩ = 0, and ⟨u²⟩ = A² on average. Each wave has random numbers of its own, so that the same key gives
    the same function on every grid.

    **Arguments:**

    - `amplitude`: A, in the unit of u; positive.
    - `largest_wavenumber`: k_max, an inverse length; at least one wave is always taken. 1 is the edge of the unstable band of the
      Kuramoto–Sivashinsky equation.
    - `warm_up`: time that the reference solver runs before t = 0; 100 and more puts that equation on its attractor.
    """

    amplitude: float = eqx.field(static=True, converter=_number, default=1.0)
    largest_wavenumber: float = eqx.field(static=True, converter=_number, default=1.0)
    warm_up: float = eqx.field(static=True, converter=_number, default=0.0)

    def __check_init__(self):
        for name in ("amplitude", "largest_wavenumber"):
            if not (np.isfinite(getattr(self, name)) and getattr(self, name) > 0):
                raise ValueError(f"{name}: must be positive and finite, found {getattr(self, name)}")
        if not (np.isfinite(self.warm_up) and self.warm_up >= 0):
            raise ValueError(f"warm_up: must be finite and not negative, found {self.warm_up}")

    def __call__(self, key: PRNGKeyArray, grid: Grid, places: tuple[Place, ...], dtype: Any) -> Float[Array, "c *grid"]:
        if grid.ndim != 1:
            raise ValueError("random_waves: only one-dimensional states are offered")
        _periodic(grid, "random_waves")
        k = 2 * np.pi / grid.lengths[0]
        count = max(1, int(self.largest_wavenumber / k + 1e-9))
        if 2 * count >= grid.shape[0]:
            raise ValueError(f"largest_wavenumber: {count} waves need over {2 * count} cells, not {grid.shape[0]}")
        draws = jnp.stack([jax.random.normal(jax.random.fold_in(key, m), (2,), dtype) for m in range(count)])
        phase = k * np.outer(np.arange(1, count + 1), grid.coordinates(places[0])[0])
        waves = draws[:, :1] * jnp.asarray(np.cos(phase), dtype) + draws[:, 1:] * jnp.asarray(np.sin(phase), dtype)
        return (self.amplitude / count**0.5 * waves.sum(axis=0))[None]
