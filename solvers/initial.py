"""u(x, 0): initial states, the same field whatever grid it is put on."""

from collections.abc import Sequence

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


class RandomVelocity(eqx.Module):
    """E(k) ∝ (1/k) exp(−(ln k/k_p − σ²)² / 2σ²),  max |u| = U: a random solenoidal velocity.

    Log-normal around the peak wavenumber with variance σ² = ¼ (the family of the learned-interpolation literature, Kochkov et al.
    2021, doi:10.1073/pnas.2101784118, supplement). The random numbers belong to Fourier modes of a fixed lattice, so the same key
    gives the same flow on every grid that resolves it.

    **Arguments:**

    - `peak_wavenumber`: k_p, in units of 2π/L; positive.
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
            raise ValueError(f"peak_wavenumber: must be at most 24, found {self.peak_wavenumber}: the random modes reach 31")
        if not (np.isfinite(self.warm_up) and self.warm_up >= 0):
            raise ValueError(f"warm_up: must be finite and not negative, found {self.warm_up}")

    def __call__(self, key: PRNGKeyArray, grid: Grid, places: tuple[Place, ...], dtype) -> Float[Array, "c *grid"]:
        if grid.ndim != 2:
            raise ValueError("random_velocity: only two-dimensional flows are offered")
        lattice = Grid((64, 64), grid.lengths)
        kx, ky = lattice.wavenumbers()
        square = kx**2 + ky**2
        unit = 2 * np.pi / max(grid.lengths)
        k = np.sqrt(np.where(square > 0, square, 1.0)) / unit
        variance = 0.25
        energy = np.exp(-((np.log(k / self.peak_wavenumber) - variance) ** 2) / (2 * variance)) / k
        # |ψ̂|² ∝ E(k) / k³ in two dimensions: energy density per mode E(k)/k, and |u| = k |ψ|.
        amplitude = np.where(square > 0, np.sqrt(energy / k**3), 0.0)
        amplitude = np.where((np.abs(kx) < 31 * unit) & (ky < 31 * unit), amplitude, 0.0)
        psi = jnp.fft.rfft2(jax.random.normal(key, lattice.shape, dtype)) * jnp.asarray(amplitude, dtype)
        hat = jnp.stack([1j * jnp.asarray(ky, dtype) * psi, -1j * jnp.asarray(kx, dtype) * psi])
        u = jnp.fft.irfft2(hat, s=lattice.shape)
        fine = [resample(q, (256, 256), lattice.centre, lattice.centre) for q in u]
        speed = jnp.sqrt(jnp.max(fine[0] ** 2 + fine[1] ** 2))
        scaled = self.max_speed / speed * u
        return jnp.stack([resample(q, grid.shape, lattice.centre, at) for q, at in zip(scaled, places, strict=True)])
