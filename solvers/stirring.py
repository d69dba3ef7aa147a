"""a(x, t) = Σ_k Re(c_k(t) exp(i k·x)): random accelerations that keep turbulence going in a compressible gas."""

import abc
from typing import Any, Literal

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, PyTree

from hybridsim.contract import Real
from hybridsim.grid import Grid

LATTICE = 16
"""Random numbers are drawn this many times per correlation time, whatever the time step."""


def _scalar(value: float | Array) -> float | Array:
    return value if eqx.is_array(value) else float(value)


def _number(value: float | int) -> float:
    return float(value)


def helmholtz_weights(k: np.ndarray, solenoidal_share: float) -> np.ndarray:
    """W_ab = ζ (δ_ab − k_a k_b/k²) + (1 − ζ) k_a k_b/k²  for wavevectors `(d, *modes)`, none of them zero: `(d, d, *modes)`.

    ζ = 1 leaves the solenoidal part, ζ = 0 the compressive one, ζ = ½ halves the vector (Federrath et al. 2010,
    doi:10.1051/0004-6361/200912437, §2).
    """
    along = k[:, None] * k[None] / (k**2).sum(axis=0)
    unit = np.eye(len(k)).reshape(len(k), len(k), *[1] * (k.ndim - 1))
    return solenoidal_share * (unit - along) + (1 - solenoidal_share) * along


class AbstractStirring(eqx.Module):
    """a(x, t): an acceleration with a random state of its own, which the run carries: ∂t(ρv) = … + ρ a,  ∂t E = … + ρ v·a."""

    @abc.abstractmethod
    def check_grid(self, grid: Grid) -> None:
        """Raises `ValueError` where the force cannot be represented on the grid."""

    @abc.abstractmethod
    def init_memory(self, grid: Grid) -> PyTree:
        """The random state at t = 0."""

    @abc.abstractmethod
    def advance(self, memory: PyTree, t: Real, dt: Real) -> PyTree:
        """The random state at t + Δt; once per solver step."""

    @abc.abstractmethod
    def acceleration(self, memory: PyTree, grid: Grid, dtype: Any) -> Float[Array, "d *grid"]:
        """a(x) at the cell centres, at the time of `memory`."""


class OrnsteinUhlenbeck(AbstractStirring):
    """dc_k = −c_k dt/T + W_k √(2/T) σ_k dB_k,  a(x, t) = Σ_k Re(c_k(t) exp(i k·x)),  ⟨|a|²⟩ = A².

    Stirring of the large scales by Ornstein–Uhlenbeck processes, one for each Fourier mode lowest ≤ |k|/k₀ ≤ highest,
    k₀ = 2π/max L. W_k = ζ P_⊥ + (1 − ζ) P_∥ weighs the parts across and along k. Periodic boxes of one to three dimensions.

    **Arguments:**

    - `amplitude`: A ≥ 0, the root mean square of |a| over space and time, length per time²; may be an array and is then
      differentiable.
    - `correlation_time`: T > 0, a time; about L/(2V) for turbulence of rms speed V.
    - `lowest_mode`, `highest_mode`: the band, in units of k₀; 1 to 3 is usual.
    - `solenoidal_share`: ζ from 0 (compressive) to 1 (solenoidal). The solenoidal share of ⟨|a|²⟩ is
      ζ²(d − 1) / (ζ²(d − 1) + (1 − ζ)²): ⅔ in three and ½ in two dimensions at ζ = ½. In one dimension all motion is compressive,
      and ζ must be 0.
    - `profile`: `flat` (σ_k the same for all modes) or `parabola` (σ_k² ∝ 1 − (2|k|/k₀ − lowest − highest)²/(highest − lowest)²,
      zero at both ends of the band).
    - `seed`: of the random stream.

    Random numbers are drawn on a lattice of times T/16 apart, with the exact update c ← f c + √(1 − f²) ξ, f = exp(−1/16); between
    two lattice times c runs along the arc through both draws, which keeps its variance at every moment and c continuous. The draws
    belong to lattice times and Fourier modes: every grid, time step and precision sees the same stirring, stationary from t = 0 on,
    and a run resumed from its memory goes on as it would have. The autocorrelation is exp(−|τ|/T) between lattice times, and up to
    3 % above it elsewhere. All samples of an ensemble are stirred alike. Gradients flow to `amplitude`, none through the random
    numbers.

    ⟨a⟩ = 0 at every moment; ⟨ρ a⟩ is not, so that momentum is conserved only as long as the density is uniform. The power ⟨ρ v·a⟩
    is what the flow makes of it, about ρ A² T in weak flows.

    Eswaran & Pope 1988, doi:10.1016/0045-7930(88)90013-8; Federrath et al. 2010, doi:10.1051/0004-6361/200912437, §2.

    >>> from hybridsim.grid import Grid
    >>> stirring, grid = OrnsteinUhlenbeck(amplitude=2.0), Grid((8, 8), (1.0, 1.0))
    >>> memory = stirring.advance(stirring.init_memory(grid), jnp.float32(0.0), jnp.float32(0.1))
    >>> stirring.acceleration(memory, grid, jnp.float32).shape
    (2, 8, 8)
    """

    amplitude: float | Float[Array, ""] = eqx.field(default=1.0, converter=_scalar)
    correlation_time: float = eqx.field(static=True, default=1.0, converter=_number)
    lowest_mode: float = eqx.field(static=True, default=1.0, converter=_number)
    highest_mode: float = eqx.field(static=True, default=3.0, converter=_number)
    solenoidal_share: float = eqx.field(static=True, default=0.5, converter=_number)
    profile: Literal["flat", "parabola"] = eqx.field(static=True, default="flat")
    seed: int = eqx.field(static=True, default=0)

    def __check_init__(self):
        if isinstance(self.amplitude, float) and not (np.isfinite(self.amplitude) and self.amplitude >= 0):
            raise ValueError(f"amplitude: must be finite and not negative, found {self.amplitude}")
        if not (np.isfinite(self.correlation_time) and self.correlation_time > 0):
            raise ValueError(f"correlation_time: must be positive and finite, found {self.correlation_time}")
        if not self.lowest_mode > 0:
            raise ValueError(f"lowest_mode: must be positive, found {self.lowest_mode}: the mean is never forced")
        if not self.lowest_mode <= self.highest_mode <= 16:
            raise ValueError(f"highest_mode: must lie between lowest_mode = {self.lowest_mode} and 16, found {self.highest_mode}")
        if not 0 <= self.solenoidal_share <= 1:
            raise ValueError(f"solenoidal_share: must lie between 0 and 1, found {self.solenoidal_share}")
        if self.profile not in ("flat", "parabola"):
            raise ValueError(f"profile: {self.profile!r} is not offered; possible: flat, parabola")
        if not 0 <= self.seed < 2**31:
            raise ValueError(f"seed: needs a whole number from 0 to 2³¹ − 1, found {self.seed}")

    def _reach(self, grid: Grid) -> tuple[int, ...]:
        """The largest mode number of the band along each axis."""
        return tuple(int(self.highest_mode * length / max(grid.lengths) + 1e-9) for length in grid.lengths)

    def _modes(self, grid: Grid) -> tuple[Int[np.ndarray, "d modes"], Float[np.ndarray, " modes"]]:
        """One of each pair ±n of mode numbers in the band, and σ² there."""
        reach = self._reach(grid)
        every = np.stack([n.ravel() for n in np.meshgrid(*[np.arange(-m, m + 1) for m in reach], indexing="ij")])
        side = max(grid.lengths)
        radius = np.sqrt(sum((n * side / length) ** 2 for n, length in zip(every, grid.lengths, strict=True)))
        inside = (radius >= self.lowest_mode - 1e-9) & (radius <= self.highest_mode + 1e-9)
        # row-major order is its own mirror image, and the zero mode lies in the middle
        inside[: inside.size // 2 + 1] = False
        variance = np.ones_like(radius)
        if self.profile == "parabola":
            width = self.highest_mode - self.lowest_mode
            variance = width**2 - (2 * radius - self.lowest_mode - self.highest_mode) ** 2
            inside &= variance > 1e-9 * width**2
        return every[:, inside], variance[inside]

    def check_grid(self, grid: Grid) -> None:
        if not all(grid.periodic):
            raise ValueError("equation.forcing: random stirring acts on Fourier modes and needs periodic boundaries")
        if grid.ndim == 1 and self.solenoidal_share != 0:
            raise ValueError(
                f"equation.forcing.solenoidal_share: in one dimension all motion is compressive and the share is 0, "
                f"not {self.solenoidal_share}"
            )
        if not self._modes(grid)[1].size:
            raise ValueError(
                f"equation.forcing.highest_mode: no mode of the box lies between {self.lowest_mode} and {self.highest_mode}"
            )
        if any(2 * m >= n for m, n in zip(self._reach(grid), grid.shape, strict=True)):
            raise ValueError(
                f"equation.forcing.highest_mode: the band up to {self.highest_mode} does not fit on a grid of shape {grid.shape}"
            )

    def _draw(self, n: Array, shape: tuple[int, ...]) -> Array:
        # the same numbers in single and in double precision
        return jax.random.normal(jax.random.fold_in(jax.random.key(self.seed), n), shape, jnp.float32)

    def _follow(self, before: Array, draw: Array) -> Array:
        """The process one lattice time after `before`."""
        keep = np.exp(-1 / LATTICE)
        return np.float32(keep) * before + np.float32(np.sqrt(1 - keep**2)) * draw

    def init_memory(self, grid: Grid) -> dict[str, Array]:
        shape = (2, grid.ndim, self._modes(grid)[1].size)
        start, draw = jax.vmap(lambda n: self._draw(n, shape))(jnp.arange(2))
        return {"index": jnp.int32(0), "before": start, "after": self._follow(start, draw), "coefficients": start}

    def advance(self, memory: dict[str, Array], t: Real, dt: Real) -> dict[str, Array]:
        # no tangent may reach the loop: its number of turns is not known, and reverse differentiation would refuse it
        held = jax.lax.stop_gradient((memory["index"], memory["before"], memory["after"]))
        now = jax.lax.stop_gradient(t + dt) / (self.correlation_time / LATTICE)
        last = jnp.floor(now).astype(jnp.int32)

        def behind(held: tuple[Array, Array, Array]) -> Array:
            return held[0] < last

        def catch_up(held: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
            n, _, after = held
            return n + 1, after, self._follow(after, self._draw(n + 2, after.shape))

        n, before, after = jax.lax.while_loop(behind, catch_up, held)
        s = jnp.clip(now - n.astype(now.dtype), 0, 1).astype(jnp.float32)
        angle = np.float32(np.arccos(np.exp(-1 / LATTICE)))
        inverse = np.float32(1 / np.sin(angle))
        here = inverse * (jnp.sin((1 - s) * angle) * before + jnp.sin(s * angle) * after)
        return {"index": n, "before": before, "after": after, "coefficients": here}

    def acceleration(self, memory: dict[str, Array], grid: Grid, dtype: Any) -> Float[Array, "d *grid"]:
        d, reach = grid.ndim, self._reach(grid)
        modes, variance = self._modes(grid)
        k = np.stack([2 * np.pi / length * n for n, length in zip(modes, grid.lengths, strict=True)])
        share = self.solenoidal_share
        # Σ ½ ⟨|c|²⟩ over cosines and sines is the mean square of a
        square = (variance * ((d - 1) * share**2 + (1 - share) ** 2)).sum()
        weights = jnp.asarray(helmholtz_weights(k, share) * np.sqrt(variance / square), dtype)
        c = memory["coefficients"].astype(dtype)
        c = jnp.sum(weights[None] * c[:, None], axis=2)
        kind = jnp.promote_types(dtype, jnp.complex64)
        waves = []
        for a, m in enumerate(reach):
            # one of each pair of modes is enough, and along the first axis it is the one to the right
            n = np.arange(0 if a == 0 else -m, m + 1)
            waves.append(np.exp(2j * np.pi / grid.lengths[a] * np.outer(grid.coordinates()[a], n)))
        where = tuple(n if a == 0 else n + m for a, (n, m) in enumerate(zip(modes, reach, strict=True)))
        field = jnp.zeros((d, *[wave.shape[1] for wave in waves]), kind)
        field = field.at[(slice(None), *where)].set(jax.lax.complex(c[0], -c[1]))
        exact = jax.lax.Precision.HIGHEST
        for a in range(d - 1, 0, -1):
            field = jnp.tensordot(field, jnp.asarray(waves[a], kind), axes=(a + 1, 1), precision=exact)
            field = jnp.moveaxis(field, -1, a + 1)
        # the last sum is the long one: only its real part is made
        parts = jnp.concatenate([field.real, field.imag], axis=1).reshape(d, 2 * waves[0].shape[1], -1)
        first = jnp.asarray(np.concatenate([waves[0].real, -waves[0].imag], axis=1), dtype)
        out = jnp.matmul(jnp.broadcast_to(first, (d, *first.shape)), parts, precision=exact)
        return jnp.asarray(self.amplitude, dtype) * out.reshape(d, *grid.shape)
