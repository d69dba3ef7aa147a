"""Grids: x_i = (i + ½) Δx at cell centres, x_i = (i + 1) Δx at right faces.

A `Grid` is a box cut into equal cells. It knows where things are and nothing of what is stored there. The functions below it move
periodic fields between grids: means over blocks of cells (`cell_mean`, `face_mean`) and Fourier resampling (`resample`), which
also gives the exact cell and face means of a band-limited field.
"""

from collections.abc import Sequence

import equinox as eqx
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

Place = tuple[float, ...]
"""Where a value lives inside its cell, per axis: 0.5 is the centre, 1 the right face."""

BOUNDARIES = ("periodic", "no_slip", "free_slip", "reflecting", "fixed", "outflow")
"""Kinds of boundary that a grid may carry; each solver says which of them it takes."""


def _sides(boundaries: Sequence) -> tuple[tuple[str, str], ...]:
    """One word per axis stands for both of its sides."""
    pairs = []
    for given in boundaries:
        sides = (given, given) if isinstance(given, str) else tuple(given)
        if len(sides) != 2:
            raise ValueError(f"boundaries {sides}: an axis has two sides, a lower and an upper one")
        pairs.append(sides)
    return tuple(pairs)


class Grid(eqx.Module):
    """Ω = [0, L₁) × … × [0, L_d), cut into n₁ × … × n_d equal cells.

    **Arguments:**

    - `shape`: cells per axis, each at least 2.
    - `lengths`: box lengths L per axis (the same length unit as everything else), positive.
    - `boundaries`: per axis a word of `BOUNDARIES`, or a pair of words for its lower and upper side; periodic by default. Periodic
      sides come in pairs. What a kind means is the solver's matter.

    >>> grid = Grid((64, 32), (6.0, 3.0))
    >>> grid.spacing
    (0.09375, 0.09375)
    >>> Grid((64, 32), (6.0, 3.0), ("periodic", ("no_slip", "free_slip"))).periodic
    (True, False)
    """

    shape: tuple[int, ...] = eqx.field(static=True, converter=lambda s: tuple(int(n) for n in s))
    lengths: tuple[float, ...] = eqx.field(static=True, converter=lambda s: tuple(float(x) for x in s))
    boundaries: tuple[tuple[str, str], ...] = eqx.field(static=True, default=(), converter=_sides)

    def __post_init__(self):
        if not self.boundaries:
            self.boundaries = (("periodic", "periodic"),) * len(self.shape)

    def __check_init__(self):
        if not 1 <= len(self.shape) <= 3:
            raise ValueError(f"a grid has one to three axes, not {len(self.shape)}")
        if len(self.lengths) != len(self.shape) or len(self.boundaries) != len(self.shape):
            raise ValueError(
                f"shape {self.shape}, lengths {self.lengths} and boundaries {self.boundaries} must have one entry per axis"
            )
        if any(n < 2 for n in self.shape):
            raise ValueError(f"every axis needs at least 2 cells, found shape {self.shape}")
        if any(not (np.isfinite(x) and x > 0) for x in self.lengths):
            raise ValueError(f"lengths must be positive and finite, found {self.lengths}")
        for sides in self.boundaries:
            for name in sides:
                if name not in BOUNDARIES:
                    raise ValueError(f"boundary {name!r} is not offered; possible: {', '.join(BOUNDARIES)}")
            if "periodic" in sides and sides != ("periodic", "periodic"):
                raise ValueError(f"boundaries {sides}: an axis is periodic on both or on neither of its sides")

    @property
    def ndim(self) -> int:
        return len(self.shape)

    @property
    def periodic(self) -> tuple[bool, ...]:
        """Per axis, whether it is periodic."""
        return tuple(sides[0] == "periodic" for sides in self.boundaries)

    def with_shape(self, shape: Sequence[int]) -> "Grid":
        """The same box, cut into other cells."""
        return Grid(shape, self.lengths, self.boundaries)

    @property
    def spacing(self) -> tuple[float, ...]:
        return tuple(length / n for length, n in zip(self.lengths, self.shape, strict=True))

    @property
    def cells(self) -> int:
        return int(np.prod(self.shape))

    @property
    def cell_volume(self) -> float:
        return float(np.prod(self.spacing))

    @property
    def centre(self) -> Place:
        """The place of cell-centred values."""
        return (0.5,) * self.ndim

    def coordinates(self, at: Place | None = None) -> tuple[np.ndarray, ...]:
        """One float64 vector per axis: (i + at_a) Δx_a."""
        at = self.centre if at is None else at
        return tuple((np.arange(n) + a) * h for n, a, h in zip(self.shape, at, self.spacing, strict=True))

    def mesh(self, at: Place | None = None) -> tuple[np.ndarray, ...]:
        """Coordinates broadcast to the full shape, one float64 array per axis."""
        return tuple(np.meshgrid(*self.coordinates(at), indexing="ij"))

    def wavenumbers(self) -> tuple[np.ndarray, ...]:
        """k_a = 2π n / L_a in the layout of `rfftn` (last axis halved), shaped to broadcast, float64, rad per length.

        The Nyquist entry of an even axis is returned as +N/2; what differentiates must drop it.
        """
        out = []
        for axis, (n, length) in enumerate(zip(self.shape, self.lengths, strict=True)):
            last = axis == self.ndim - 1
            index = np.arange(n // 2 + 1) if last else np.fft.fftfreq(n, 1 / n)
            index = np.where(2 * np.abs(index) == n, np.abs(index), index)
            view = [1] * self.ndim
            view[axis] = index.size
            out.append((2 * np.pi / length * index).reshape(view))
        return tuple(out)

    def flux_place(self, at: Place, axis: int) -> Place:
        """The place at + ½ e_axis folded into (0, 1]: where the flux of a channel at `at` along `axis` lives."""
        shifted = at[axis] + 0.5
        return (*at[:axis], shifted - 1 if shifted > 1 else shifted, *at[axis + 1 :])


def cell_mean(u: Float[Array, "..."], factors: Sequence[int]) -> Float[Array, "..."]:
    """ū_I = Π f⁻¹ Σ u_i over blocks of `factors` cells; `factors` names the last axes of u."""
    lead = u.ndim - len(factors)
    shape = list(u.shape[:lead])
    for n, f in zip(u.shape[lead:], factors, strict=True):
        if n % f:
            raise ValueError(f"cannot average {n} cells in blocks of {f}: choose a shape that divides the fine one")
        shape += [n // f, f]
    return u.reshape(shape).mean(axis=tuple(lead + 1 + 2 * a for a in range(len(factors))))


def face_mean(u: Float[Array, "..."], factors: Sequence[int], axis: int) -> Float[Array, "..."]:
    """Mean of fine right-face values over the coarse right face: every f-th face along `axis`, block means across it.

    The discrete divergence of the result is the block mean of the fine one, so a divergence-free field stays so.
    """
    lead = u.ndim - len(factors)
    f = factors[axis]
    picked = u[(slice(None),) * (lead + axis) + (slice(f - 1, None, f),)]
    return cell_mean(picked, tuple(1 if a == axis else g for a, g in enumerate(factors)))


def resample(
    u: Float[Array, "..."],
    shape: Sequence[int],
    source_at: Place,
    target_at: Place,
    average: Sequence[bool] | None = None,
    alias: bool = False,
) -> Float[Array, "..."]:
    """u_new(x_j) = Σ_k û_k m_k exp(i k x_j): a periodic field on another grid of the same box, or at another place.

    **Arguments:**

    - `u`: the field; its last `len(shape)` axes are space.
    - `shape`: cells of the new grid.
    - `source_at`, `target_at`: place of the old and of the new values inside their cells.
    - `average`: per axis, replace point values by means over the new cell (m_k = sinc(k Δx / 2)).
    - `alias`: `False` keeps only the modes that the new grid carries (a spectral cut); `True` samples the full series, which is
      what exact face and cell means need.

    Modes at or above the old Nyquist wavenumber are dropped: their phase is not known.
    """
    dims = len(shape)
    average = (False,) * dims if average is None else average
    lead = u.ndim - dims
    for a in range(dims):
        old, new = u.shape[lead + a], shape[a]
        if old == new and source_at[a] == target_at[a] and not average[a]:
            continue
        k = np.fft.fftfreq(old, 1 / old)
        multiplier = np.exp(2j * np.pi * k * (target_at[a] / new - source_at[a] / old))
        if average[a]:
            multiplier = multiplier * np.sinc(k / new)
        limit = old if alias else min(old, new)
        multiplier = np.where(2 * np.abs(k) < limit, multiplier, 0) * (new / old)
        blocks = -(-old // new)
        padded = np.zeros((blocks * new,), dtype=int)
        present = np.zeros((blocks * new,), dtype=bool)
        padded[k.astype(int) % (blocks * new)] = np.arange(old)
        present[k.astype(int) % (blocks * new)] = True
        spectrum = jnp.moveaxis(jnp.fft.fft(u, axis=lead + a), lead + a, -1)
        ones = (1,) * (spectrum.ndim - 1)
        spectrum = spectrum * jnp.asarray(multiplier, spectrum.dtype).reshape(*ones, -1)
        spectrum = jnp.where(jnp.asarray(present).reshape(*ones, -1), spectrum[..., padded], 0)
        spectrum = spectrum.reshape(*spectrum.shape[:-1], blocks, new).sum(axis=-2)
        u = jnp.moveaxis(jnp.fft.ifft(spectrum).real.astype(u.dtype), -1, lead + a)
    return u
