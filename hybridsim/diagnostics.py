"""ρ(t) = ⟨ω ω_ref⟩ / (‖ω‖ ‖ω_ref‖), E(n), |Σq(t) - Σq(0)| / Σ|q|: what is measured on saved frames.

Everything here runs on the host, in float64, on whole arrays of frames: the last axes are space, before them stands the channel,
and any axes in front (sample, time) are carried along. A frame that is not finite gives NaN, and a correlation of zero.

The state's `Variable`s say which channels are velocities (`u`, `v`, `w`) and where in the cell each one lives; all others are
scalars. In periodic boxes derivatives are spectral. Between walls, where there are no Fourier modes, they are differences of the
velocities that `AbstractSolver.centred` gives, and there are no spectra.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import xarray as xr
from jax.typing import ArrayLike

from hybridsim.contract import AbstractSolver, Variable
from hybridsim.grid import Grid, Place

AXES = ("x", "y", "z")
VELOCITIES = ("u", "v", "w")
MOMENTA = ("momentum_x", "momentum_y", "momentum_z")
PIECE = 2**22
"""Values that are transformed at a time: three-dimensional frames do not fit in memory together with their transforms."""


def _float64(u: ArrayLike) -> np.ndarray:
    return np.asarray(u, dtype=np.float64)


def _space(grid: Grid) -> tuple[int, ...]:
    return tuple(range(-grid.ndim, 0))


def _mode_indices(grid: Grid) -> tuple[np.ndarray, ...]:
    """|n_a| of every mode in the layout of `rfftn`, one array per axis, shaped to broadcast."""
    return tuple(np.rint(np.abs(k) * length / (2 * np.pi)) for k, length in zip(grid.wavenumbers(), grid.lengths, strict=True))


def _below_nyquist(grid: Grid) -> np.ndarray:
    """True where every |n_a| < N_a / 2: the modes that can be shifted and differentiated."""
    keep = np.ones((1,) * grid.ndim, dtype=bool)
    for index, n in zip(_mode_indices(grid), grid.shape, strict=True):
        keep = keep & (2 * index < n)
    return keep


def _finite_frames(u: np.ndarray, grid: Grid) -> np.ndarray:
    """The frames `(…, c, *grid)`, those that are not finite filled with NaN: sums over them are then NaN, and not sometimes ∞."""
    if np.isfinite(u).all():
        return u
    good = np.isfinite(u).all(axis=tuple(range(-min(grid.ndim + 1, u.ndim), 0)), keepdims=True)
    return np.where(good, u, np.nan)


def _check(u: np.ndarray, grid: Grid, channels: int | None = None) -> None:
    lead = u.ndim - grid.ndim
    if lead < (0 if channels is None else 1) or u.shape[lead:] != grid.shape:
        raise ValueError(f"frames of shape {u.shape} do not end with the grid's shape {grid.shape}")
    if channels is not None and u.shape[lead - 1] != channels:
        raise ValueError(f"frames of shape {u.shape} have {u.shape[lead - 1]} channels; the variables name {channels}")


def in_pieces(function: Callable[..., np.ndarray], grid: Grid, *frames: np.ndarray) -> np.ndarray:
    """A function of frames `(n, c, *grid)`, one result each: `(…, c, *grid)` -> `(…, *result)`, a few frames at a time."""
    lead = frames[0].shape[: -grid.ndim - 1]
    flat = [a.reshape(-1, *a.shape[-grid.ndim - 1 :]) for a in frames]
    size = max(1, PIECE // max(1, flat[0][0].size))
    parts = [function(*(a[i : i + size] for a in flat)) for i in range(0, len(flat[0]), size)]
    found = np.concatenate([np.asarray(part) for part in parts])
    return found.reshape((*lead, *found.shape[1:]))


def _by_solver(function: Callable[[jax.Array], jax.Array], u: np.ndarray, grid: Grid) -> np.ndarray:
    """A solver's own function of one state `(c, *grid)`, for every frame of `(…, c, *grid)`."""
    compiled = eqx.filter_jit(lambda frames: jax.lax.map(function, frames))
    return in_pieces(lambda piece: np.asarray(compiled(jnp.asarray(piece)), np.float64), grid, u)


def is_gas(variables: Sequence[Variable]) -> bool:
    """Whether the channels begin with those of a gas: `density`, `momentum_x` …, `energy` (see `hybridsim.gas`)."""
    d = len(variables[0].at)
    return tuple(v.name for v in variables[: d + 2]) == ("density", *MOMENTA[:d], "energy")


def velocity_channels(grid: Grid, variables: Sequence[Variable]) -> tuple[int, ...]:
    """Where the d velocity components `u`, `v`, `w` stand among the channels."""
    names = [v.name for v in variables]
    wanted = VELOCITIES[: grid.ndim]
    missing = [name for name in wanted if name not in names]
    if missing:
        raise ValueError(f"no velocity {', '.join(missing)} among the channels {', '.join(names)}")
    return tuple(names.index(name) for name in wanted)


def velocity(u: ArrayLike, grid: Grid, variables: Sequence[Variable]) -> np.ndarray:
    """(u, v, w) of the state: `(…, c, *grid)` -> `(…, d, *grid)`, float64, each component at its own place."""
    u = _float64(u)
    _check(u, grid, len(variables))
    channels = velocity_channels(grid, variables)
    return np.take(_finite_frames(u, grid), channels, axis=u.ndim - grid.ndim - 1)


def _centred_spectrum(u: np.ndarray, grid: Grid, places: Sequence[Place]) -> np.ndarray:
    """û_c exp(i k · (½ - at_c) Δx): channels moved to the cell centres, Nyquist modes dropped; stays in Fourier space."""
    spectrum = np.fft.rfftn(u, axes=_space(grid)) * _below_nyquist(grid)
    for c, at in enumerate(places):
        phase = np.ones((1,) * grid.ndim, dtype=complex)
        for k, a, h in zip(grid.wavenumbers(), at, grid.spacing, strict=True):
            phase = phase * np.exp(1j * k * (0.5 - a) * h)
        part = (..., c, *(slice(None),) * grid.ndim)
        spectrum[part] = spectrum[part] * phase
    return spectrum


# Spectra


@lru_cache(maxsize=16)
def _shell_layout(shape: tuple[int, ...], lengths: tuple[float, ...]) -> tuple[np.ndarray, ...]:
    """Order of the modes by shell, where each shell starts, which shells there are, and how often each mode counts."""
    grid = Grid(shape, lengths)
    index = _mode_indices(grid)
    radius = sum((n * (max(lengths) / length)) ** 2 for n, length in zip(index, lengths, strict=True))
    # a mode on the edge of a shell belongs to the upper one, whatever the ratio of the lengths is rounded to
    shell = np.floor(np.sqrt(radius) * (1 + 1e-12) + 0.5).astype(np.int64).reshape(-1)
    # rfftn holds one of each conjugate pair, except on the planes n = 0 and n = N/2, which hold both
    pairs = np.where((index[-1] == 0) | (2 * index[-1] == shape[-1]), 1.0, 2.0)
    order = np.argsort(shell, kind="stable")
    present, starts = np.unique(shell[order], return_index=True)
    return order, starts, present, pairs


def shell_sum(density: ArrayLike, grid: Grid) -> np.ndarray:
    """Σ d(k) over all modes with (n−½) k₀ ≤ |k| < (n+½) k₀, k₀ = 2π / max L: `(…, *rfft)` -> `(…, shells)`.

    What shell spectra of any quadratic quantity are made of. `density`: real, in the layout of `rfftn` (last axis halved), equal
    for k and −k; the conjugate modes that the layout leaves out are counted. Shell 0 (the mean) and the corners are kept. The sum
    over the shells is the sum over all modes to rounding (pairwise summation).

    >>> grid = Grid((8, 8), (2 * np.pi, 2 * np.pi))
    >>> u = np.cos(2 * grid.mesh()[0])
    >>> shell_sum(np.abs(np.fft.rfft2(u) / grid.cells) ** 2, grid).round(12)
    array([0. , 0. , 0.5, 0. , 0. , 0. , 0. ])
    """
    order, starts, present, pairs = _shell_layout(grid.shape, grid.lengths)
    weighted = _float64(density) * pairs
    lead = weighted.shape[: weighted.ndim - grid.ndim]
    weighted = weighted.reshape(*lead, -1)[..., order]
    total = np.zeros((*lead, int(present[-1]) + 1))
    total[..., present] = np.add.reduceat(weighted, starts, axis=-1)
    return total


@np.errstate(over="ignore", invalid="ignore", divide="ignore")
def shell_spectrum(u: ArrayLike, grid: Grid) -> tuple[np.ndarray, np.ndarray]:
    """E(n) = (1/k₀) Σ ½|û(k)|² over (n-½) k₀ ≤ |k| < (n+½) k₀, with k₀ = 2π / max L, so that Σ E(n) k₀ = ½⟨|u|²⟩.

    `u`: `(…, c, *grid)`, all channels are summed. Returns the shell numbers n `(shells,)` and E `(…, shells)`, in the unit of u²
    times length. Shell 0 (the mean) and the corners beyond the last complete shell are kept, so nothing is lost. The places of
    the values do not matter: a shift changes phases only.
    """
    u = _finite_frames(_float64(u), grid)
    _check(u, grid, u.shape[-grid.ndim - 1] if u.ndim > grid.ndim else 1)
    spectrum = np.fft.rfftn(u, axes=_space(grid))
    density = (spectrum.real**2 + spectrum.imag**2).sum(axis=-grid.ndim - 1)
    total = shell_sum(density, grid) * (0.5 / grid.cells**2 * max(grid.lengths) / (2 * np.pi))
    return np.arange(total.shape[-1]), total


def time_mean_spectrum(
    u: ArrayLike, times: ArrayLike, grid: Grid, variables: Sequence[Variable], start: float | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Ē(n) = mean of E(n, t) over the frames with t ≥ start: `(…, time, c, *grid)` -> n `(shells,)`, Ē `(…, shells)`.

    NaN for a sample with a frame in the window that is not finite.
    """
    times, u = _float64(times), np.asarray(u)
    _check(u, grid, len(variables))
    window = times >= (times[0] if start is None else start - 1e-9 * max(1.0, abs(start)))
    if not window.any():
        raise ValueError(f"no frame at or after t = {start}; the last one is at t = {times[-1]}")
    frames = np.compress(window, u, axis=u.ndim - grid.ndim - 2)
    spectrum = in_pieces(lambda piece: shell_spectrum(velocity(piece, grid, variables), grid)[1], grid, frames)
    return np.arange(spectrum.shape[-1]), spectrum.mean(axis=-2)


@np.errstate(over="ignore", invalid="ignore", divide="ignore")
def spectrum_error(
    spectrum: ArrayLike,
    reference: ArrayLike,
    n: ArrayLike,
    coarse_shape: Sequence[int],
    lengths: Sequence[float] | None = None,
    worst: bool = False,
) -> float | np.ndarray:
    """mean of |ln E(n)/E_ref(n)| over 1 ≤ n ≤ ⅔ of the coarse Nyquist shell (min N / 2), or the `worst` of them.

    `spectrum`, `reference`: `(…, shells)` under the same filter, shells `n`. A float for one spectrum, an array `(…,)` for several;
    average over samples before calling to score the ensemble. Infinite where a spectrum is not finite or has lost all energy in
    a shell; a shell where both hold less than 1e-13 of the whole energy, what rounding leaves of a mode that was cut, counts as
    equal. `lengths` is needed for a box that is not a cube only: the Nyquist shell is then min N_a max(L) / (2 L_a).
    """
    spectrum, reference, n = np.broadcast_arrays(_float64(spectrum), _float64(reference), _float64(n))
    lengths = (1.0,) * len(coarse_shape) if lengths is None else lengths
    nyquist = min(cells * max(lengths) / (2 * length) for cells, length in zip(coarse_shape, lengths, strict=True))
    shells = n.reshape(-1, n.shape[-1])[0]
    window = (shells >= 1) & (shells <= 2 / 3 * nyquist * (1 + 1e-12))
    if not window.any():
        raise ValueError(f"a grid of shape {tuple(coarse_shape)} has no shell between 1 and two thirds of its Nyquist wavenumber")
    nothing = (spectrum <= 1e-13 * spectrum.sum(axis=-1, keepdims=True)) & (
        reference <= 1e-13 * reference.sum(axis=-1, keepdims=True)
    )
    distance = np.where(nothing, 0.0, np.abs(np.log(spectrum / reference)))[..., window]
    error = distance.max(axis=-1) if worst else distance.mean(axis=-1)
    error = np.where(np.isnan(error), np.inf, error)
    return float(error) if error.ndim == 0 else error


LIVELY = 0.1
"""Share of the reference's fluctuation in time below which a flow counts as frozen."""


def frozen(values: ArrayLike, reference: ArrayLike) -> int:
    """How many samples have left chaos: std_t q over the last tenth of the frames is below a tenth of the reference's.

    `values`, `reference`: `(sample, time)`. q is a mean over the box, ⟨u²⟩ say, which neither a steady state nor a travelling wave
    changes; the reference's std is the mean over its samples. A sample that is not finite is not counted.
    """
    last = max(2, np.shape(values)[1] // 10)
    ours, theirs = (np.std(_float64(q)[:, -last:], axis=1) for q in (values, reference))
    return int(np.sum(ours < LIVELY * np.mean(theirs)))


# Vorticity and correlation


def centred_velocity(u: ArrayLike, grid: Grid, variables: Sequence[Variable], solver: AbstractSolver | None) -> np.ndarray:
    """(u, v, w) at the cell centres by the solver's averages, which know the sides: `(…, c, *grid)` -> `(…, d, *grid)`."""
    if solver is None:
        raise ValueError(f"between walls the solver must be given, it knows the values there; the boundaries are {grid.boundaries}")
    u = _float64(u)
    _check(u, grid, len(variables))
    return velocity(_by_solver(solver.centred, u, grid), grid, variables)


def _difference(q: np.ndarray, axis: int, grid: Grid) -> np.ndarray:
    """(q_{i+1} - q_{i-1}) / 2Δx; at a wall the one-sided difference of three cells. `axis` counts the axes of the grid."""
    h, at = grid.spacing[axis], axis - grid.ndim
    if grid.periodic[axis]:
        return (np.roll(q, -1, at) - np.roll(q, 1, at)) / (2 * h)
    return np.asarray(np.gradient(q, h, axis=at, edge_order=2 if grid.shape[axis] > 2 else 1))


@np.errstate(over="ignore", invalid="ignore", divide="ignore")
def vorticity(u: ArrayLike, grid: Grid, variables: Sequence[Variable], solver: AbstractSolver | None = None) -> np.ndarray:
    """ω = ∂x v - ∂y u (2D), ω = ∇ × u (3D), at the cell centres: ω̂ = i k × û exp(i k · (½ - at) Δx).

    `(…, c, *grid)` -> `(…, *grid)` in 2D, `(…, 3, *grid)` in 3D, in the unit of u over length. Spectral derivative after the
    phase shift to common points; Nyquist modes are dropped.

    On a grid with walls: second-order differences of the velocities at the cell centres (`solver.centred`), central inside and
    along periodic axes, one-sided in the cells at a wall. They see the wall's own velocity only as far as `centred` does.
    """
    if grid.ndim == 1:
        raise ValueError("vorticity needs two or three dimensions")
    channels = velocity_channels(grid, variables)
    if not all(grid.periodic):
        return _curl_of_centred(centred_velocity(u, grid, variables, solver), grid)
    hat = _centred_spectrum(velocity(u, grid, variables), grid, [variables[c].at for c in channels])
    k = grid.wavenumbers()
    curl = _curl(lambda a, c: 1j * k[a] * hat[(..., c, *(slice(None),) * grid.ndim)], grid)
    return np.fft.irfftn(curl, s=grid.shape, axes=_space(grid))


def _curl(derivative: Callable[[int, int], np.ndarray], grid: Grid) -> np.ndarray:
    """∇ × u from ∂_a u_c = derivative(a, c)."""
    if grid.ndim == 2:
        return derivative(0, 1) - derivative(1, 0)
    return np.stack([derivative(a, b) - derivative(b, a) for a, b in ((1, 2), (2, 0), (0, 1))], axis=-grid.ndim - 1)


def _curl_of_centred(u: np.ndarray, grid: Grid) -> np.ndarray:
    return _curl(lambda a, c: _difference(u[(..., c, *(slice(None),) * grid.ndim)], a, grid), grid)


@np.errstate(over="ignore", invalid="ignore", divide="ignore")
def band_limit(w: ArrayLike, grid: Grid, modes: int) -> np.ndarray:
    """ŵ(n) kept where |n_a| ≤ K on every axis, zero elsewhere; n_a = k_a L_a / 2π, K = `modes`: `(…, *grid)` -> the same."""
    w = _float64(w)
    _check(w, grid)
    keep = np.ones((1,) * grid.ndim, dtype=bool)
    for index in _mode_indices(grid):
        keep = keep & (index <= modes)
    return np.fft.irfftn(np.fft.rfftn(w, axes=_space(grid)) * keep, s=grid.shape, axes=_space(grid))


@np.errstate(over="ignore", invalid="ignore", divide="ignore")
def compared_field(u: ArrayLike, grid: Grid, variables: Sequence[Variable], solver: AbstractSolver | None = None) -> np.ndarray:
    """What runs are compared by: u itself in 1D, else the `vorticity`: `(…, c, *grid)` -> `(…, 1 or 3, *grid)`."""
    if grid.ndim == 1:
        return velocity(u, grid, variables)
    w = vorticity(u, grid, variables, solver)
    return w if grid.ndim == 3 else w[..., None, :, :]


@np.errstate(over="ignore", invalid="ignore", divide="ignore")
def correlation(
    u: ArrayLike,
    u_ref: ArrayLike,
    grid: Grid,
    variables: Sequence[Variable],
    modes: int,
    solver: AbstractSolver | None = None,
) -> np.ndarray:
    """ρ = ⟨ω ω_ref⟩ / (‖ω‖ ‖ω_ref‖) of the vorticity on |n_a| ≤ `modes` (in 1D: of u itself): two `(…, c, *grid)` -> `(…,)`.

    Both on the same grid and at the same places. A run's frame that is not finite counts as 0, and so does a frame without
    any vorticity in the band, unless the reference has none either (then 1). Between walls there are no modes: there all of the
    vorticity counts, `modes` does nothing, and `solver` must be given (see `vorticity`).
    """
    u, u_ref = np.asarray(u), np.asarray(u_ref)
    _check(u, grid, len(variables))
    _check(u_ref, grid, len(variables))
    return in_pieces(lambda a, b: _correlation(a, b, grid, variables, modes, solver), grid, u, u_ref)


def _correlation(
    u: np.ndarray, u_ref: np.ndarray, grid: Grid, variables: Sequence[Variable], modes: int, solver: AbstractSolver | None
) -> np.ndarray:
    u, u_ref = _float64(u), _float64(u_ref)
    inner = tuple(range(-grid.ndim - 1, 0))
    if not np.isfinite(u_ref).all():
        raise ValueError("the reference has frames that are not finite; nothing can be compared with them")
    finite = np.isfinite(u).all(axis=inner)
    walls = not all(grid.periodic)
    # what a transform or a difference leaves of an empty field is rounding, not a field
    noise = 1e-13 * np.sqrt(grid.cells) * max(np.pi * n / length for n, length in zip(grid.shape, grid.lengths, strict=True))

    def banded(frames: np.ndarray) -> np.ndarray:
        # values on the sides are added to the state, so they must be there before it is scaled
        frames = centred_velocity(frames, grid, variables, solver) if walls else frames
        # the coefficient does not depend on the size of a frame; scaling keeps 1e200 from overflowing
        largest = np.abs(frames).max(axis=inner, keepdims=True)
        frames = frames / np.where(largest > 0, largest, 1.0)
        if walls:
            w = _curl_of_centred(frames, grid)
            w = w if grid.ndim == 3 else w[..., None, :, :]
        else:
            w = band_limit(compared_field(frames, grid, variables), grid, modes)
        norm = np.sqrt((w**2).sum(axis=inner, keepdims=True))
        return np.where(norm > noise, w / np.where(norm > 0, norm, 1.0), 0.0)

    w = banded(np.where(np.expand_dims(finite, inner), u, 0.0))
    w_ref = banded(u_ref)
    product = np.clip((w * w_ref).sum(axis=inner), -1.0, 1.0)
    empty, empty_ref = ~w.any(axis=inner), ~w_ref.any(axis=inner)
    return np.where(finite, np.where(empty & empty_ref, 1.0, product), 0.0)


@np.errstate(over="ignore", invalid="ignore", divide="ignore")
def velocity_error(u: ArrayLike, u_ref: ArrayLike, grid: Grid, variables: Sequence[Variable], modes: int) -> np.ndarray:
    """e = ‖u − u_ref‖ / ‖u_ref‖ of the velocity (of u itself in 1D) on |n_a| ≤ `modes`: two `(…, c, *grid)` -> `(…,)`.

    Both on the same grid and at the same places; √2 for two flows of one energy that have nothing in common. NaN for a frame that
    is not finite, infinite where the reference is at rest and the run is not. Between walls, where there are no modes, over all
    cells.
    """

    def one(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        ours, theirs = (velocity(x, grid, variables) for x in (a, b))
        gap = ours - theirs
        if all(grid.periodic):
            gap, theirs = band_limit(gap, grid, modes), band_limit(theirs, grid, modes)
        inner = tuple(range(-grid.ndim - 1, 0))
        # frames are scaled before they are squared, so that nothing overflows
        size = np.abs(theirs).max(axis=inner, keepdims=True)
        size = np.where(size > 0, size, 1.0)
        above, below = (((q / size) ** 2).sum(axis=inner) for q in (gap, theirs))
        return np.where(above == 0, 0.0, np.sqrt(above / below))

    return in_pieces(one, grid, np.asarray(u), np.asarray(u_ref))


def crossing_time(times: ArrayLike, mean_correlation: ArrayLike, level: float) -> tuple[float | None, float | None]:
    """(t*, None), t* = first time with ρ(t*) < level, linear between frames; (None, t_end) when ρ stays at or above it.

    `times`, `mean_correlation`: `(time,)`. NaN counts as 0.
    """
    times, rho = _float64(times), np.nan_to_num(_float64(mean_correlation), nan=0.0)
    below = np.flatnonzero(rho < level)
    if below.size == 0:
        return None, float(times[-1])
    i = int(below[0])
    if i == 0:
        return float(times[0]), None
    fraction = (rho[i - 1] - level) / (rho[i - 1] - rho[i])
    return float(times[i - 1] + fraction * (times[i] - times[i - 1])), None


class CorrelationTime(NamedTuple):
    """When the mean correlation falls below a level: `time`, or `at_least` if it never does; (`low`, `high`) is the interval.

    A bound of None lies beyond the last frame.
    """

    time: float | None
    at_least: float | None
    low: float | None
    high: float | None


def t_correlated(
    times: ArrayLike, corr: ArrayLike, level: float, *, confidence: float = 0.9, resamples: int = 1000, seed: int = 0
) -> CorrelationTime:
    """t* with ρ̄(t*) = level, ρ̄ = mean over samples of ρ(sample, time), and its bootstrap interval over samples.

    `times` `(time,)`, `corr` `(sample, time)`. One sample has no spread: its interval is the value itself.
    """
    times, corr = _float64(times), np.nan_to_num(_float64(corr), nan=0.0)
    time, at_least = crossing_time(times, corr.mean(axis=0), level)
    samples = len(corr)
    draws = np.random.default_rng(seed).integers(samples, size=(resamples, samples)) if samples > 1 else np.zeros((1, 1), dtype=int)
    # what matters is how often each sample is drawn; few distinct draws exist for few samples
    counts, repeats = np.unique(np.sort(draws, axis=1), axis=0, return_counts=True)
    found = [crossing_time(times, corr[row].mean(axis=0), level)[0] for row in counts]
    values = np.repeat([np.inf if t is None else t for t in found], repeats)
    low, high = np.quantile(values, [(1 - confidence) / 2, (1 + confidence) / 2], method="nearest")
    return CorrelationTime(time, at_least, *(float(b) if np.isfinite(b) else None for b in (low, high)))


# Energy, conserved sums, divergence


@np.errstate(over="ignore", invalid="ignore", divide="ignore")
def kinetic_energy(u: ArrayLike, grid: Grid, variables: Sequence[Variable]) -> np.ndarray:
    """½⟨|u|²⟩, the mean over the box with each component at its own place: `(…, c, *grid)` -> `(…,)`, unit of u²."""
    u = velocity(u, grid, variables)
    return np.asarray(0.5 * (u**2).sum(axis=-grid.ndim - 1).mean(axis=_space(grid)))


@np.errstate(over="ignore", invalid="ignore", divide="ignore")
def enstrophy(u: ArrayLike, grid: Grid, variables: Sequence[Variable], solver: AbstractSolver | None = None) -> np.ndarray:
    """½⟨|ω|²⟩ with the `vorticity` of this module: `(…, c, *grid)` -> `(…,)`, in the unit of u² over length²."""
    w = vorticity(u, grid, variables, solver)
    w = w if grid.ndim == 3 else w[..., None, :, :]
    return np.asarray(0.5 * (w**2).sum(axis=-grid.ndim - 1).mean(axis=_space(grid)))


@np.errstate(over="ignore", invalid="ignore", divide="ignore")
def mean_squares(u: ArrayLike, grid: Grid, variables: Sequence[Variable]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """⟨u²⟩, ⟨u_x²⟩, ⟨u_xx²⟩ on a periodic line, derivatives spectral below Nyquist: `(…, c, n)` -> three `(…,)`.

    In the Kuramoto–Sivashinsky equation the second feeds ½⟨u²⟩ and the third drains it; on average they are equal.
    """
    if grid.ndim != 1 or not all(grid.periodic):
        raise ValueError("mean squares of derivatives need a periodic line")
    u = velocity(u, grid, variables)
    hat = np.fft.rfft(u[..., 0, :]) * _below_nyquist(grid)
    (k,) = grid.wavenumbers()
    # every mode that is kept stands for a conjugate pair, but for the mean, which has no derivative
    square = 2 * (hat.real**2 + hat.imag**2) / grid.cells**2
    square_of_u, slope, curvature = (u[..., 0, :] ** 2).mean(axis=-1), (k**2 * square).sum(axis=-1), (k**4 * square).sum(axis=-1)
    return np.asarray(square_of_u), np.asarray(slope), np.asarray(curvature)


@np.errstate(over="ignore", invalid="ignore", divide="ignore")
def energy_rate(energy: ArrayLike, times: ArrayLike) -> np.ndarray:
    """dE/dt by second-order differences between frames, one-sided in the first and the last: `(…, time)` -> the same.

    At least two frames, at any times. A decaying flow is judged on -dE/dt, its dissipation.
    """
    energy, times = _float64(energy), _float64(times)
    return np.asarray(np.gradient(energy, times, axis=-1, edge_order=2 if times.size > 2 else 1))


@np.errstate(over="ignore", invalid="ignore", divide="ignore")
def scalar_variance(u: ArrayLike, grid: Grid, variables: Sequence[Variable]) -> np.ndarray:
    """⟨(c - ⟨c⟩)²⟩ of every channel that is no velocity: `(…, c, *grid)` -> `(…, scalars)`."""
    u = _float64(u)
    _check(u, grid, len(variables))
    channels = [c for c, v in enumerate(variables) if v.name not in VELOCITIES]
    q = np.take(u, channels, axis=u.ndim - grid.ndim - 1)
    return q.var(axis=_space(grid))


@np.errstate(over="ignore", invalid="ignore", divide="ignore")
def conserved_sums(u: ArrayLike, grid: Grid) -> np.ndarray:
    """Σ_i q_i ΔV per channel, summed in float64: `(…, c, *grid)` -> `(…, c)`."""
    u = _float64(u)
    _check(u, grid)
    return u.sum(axis=_space(grid)) * grid.cell_volume


@np.errstate(over="ignore", invalid="ignore", divide="ignore")
def drift_scale(u: ArrayLike, grid: Grid, variables: Sequence[Variable]) -> np.ndarray:
    """Σ_i |q_i| ΔV, the size against which drift is measured: `(…, c, *grid)` at t = 0 -> `(…, c)`.

    Velocity components share Σ|u| of the vector, and those of momentum Σ|ρu|, so that one that starts at zero has a scale.
    """
    u = _finite_frames(_float64(u), grid)
    _check(u, grid, len(variables))
    scale = np.abs(u).sum(axis=_space(grid)) * grid.cell_volume
    names = [v.name for v in variables]
    for vectors in (VELOCITIES, MOMENTA):
        components = [names.index(name) for name in vectors if name in names]
        if not components:
            continue
        vector = np.take(u, components, axis=u.ndim - grid.ndim - 1)
        size = np.sqrt((vector**2).sum(axis=-grid.ndim - 1)).sum(axis=_space(grid)) * grid.cell_volume
        scale[..., components] = size[..., None]
    return scale


@np.errstate(over="ignore", invalid="ignore", divide="ignore")
def drift(sums: ArrayLike, scale: ArrayLike, expected: ArrayLike | None = None) -> np.ndarray:
    """|Σq(t) - expected(t)| / Σ|q|: `sums` `(…, time, c)`, `scale` `(…, c)` at t = 0 -> `(…, time, c)`, relative.

    `expected`: what the sum must be, `(…, time, c)`: the first sum plus what forcing, drag and boundaries are known to have
    added. Without it the sum must stay what it was.
    """
    sums, scale = _float64(sums), _float64(scale)[..., None, :]
    target = sums[..., :1, :] if expected is None else _float64(expected)
    change = np.abs(sums - target)
    return np.where(change == 0, 0.0, change / scale)


@np.errstate(over="ignore", invalid="ignore", divide="ignore")
def divergence_staggered(u: ArrayLike, grid: Grid) -> np.ndarray:
    """(∇·u)_i = Σ_a (u_a,i - u_a,i-1) / Δx_a at cell centres, u_a on the right face of axis a: `(…, d, *grid)` -> `(…, *grid)`."""
    u = _float64(u)
    _check(u, grid, grid.ndim)
    total = np.zeros(u.shape[: u.ndim - grid.ndim - 1] + grid.shape)
    for a, h in enumerate(grid.spacing):
        component = u[(..., a, *(slice(None),) * grid.ndim)]
        total += (component - np.roll(component, 1, axis=a - grid.ndim)) / h
    return total


@np.errstate(over="ignore", invalid="ignore", divide="ignore")
def divergence_spectral(u: ArrayLike, grid: Grid, places: Sequence[Place] | None = None) -> np.ndarray:
    """∇·u = F⁻¹(Σ_a i k_a û_a) at cell centres, Nyquist modes dropped: `(…, d, *grid)` -> `(…, *grid)`.

    `places`: where each component lives; all at the centre by default.
    """
    u = _float64(u)
    _check(u, grid, grid.ndim)
    hat = _centred_spectrum(u, grid, [grid.centre] * grid.ndim if places is None else places)
    total = sum(1j * k * hat[(..., a, *(slice(None),) * grid.ndim)] for a, k in enumerate(grid.wavenumbers()))
    return np.fft.irfftn(total, s=grid.shape, axes=_space(grid))


@np.errstate(over="ignore", invalid="ignore", divide="ignore")
def divergence_max(
    u: ArrayLike, grid: Grid, variables: Sequence[Variable], solver: AbstractSolver | None = None
) -> np.ndarray | None:
    """max|∇·u| min(Δx) / max|u_a| of each frame: `(…, c, *grid)` -> `(…,)`, dimensionless. 0 for a fluid at rest.

    The operator is the `solver`'s, walls included; None where its flow may be compressed. Without a solver, in a periodic box: face
    differences where every component lives on its own face, spectral elsewhere.
    """
    u = _float64(u)
    _check(u, grid, len(variables))
    if solver is not None:
        one = jax.ShapeDtypeStruct(u.shape[-grid.ndim - 1 :], jnp.result_type(float))
        if jax.eval_shape(solver.divergence, one) is None:
            return None
        divergence = _by_solver(solver.divergence, u, grid)  # pyright: ignore[reportArgumentType]
    elif not all(grid.periodic):
        raise ValueError(f"between walls the solver must be given, it knows the values there; the boundaries are {grid.boundaries}")
    else:
        places = [variables[c].at for c in velocity_channels(grid, variables)]
        faces = [tuple(1.0 if b == a else 0.5 for b in range(grid.ndim)) for a in range(grid.ndim)]
        moving = velocity(u, grid, variables)
        divergence = divergence_staggered(moving, grid) if places == faces else divergence_spectral(moving, grid, places)
    largest = np.abs(divergence).max(axis=_space(grid))
    speed = np.abs(velocity(u, grid, variables)).max(axis=tuple(range(-grid.ndim - 1, 0)))
    return np.where(speed == 0, 0.0, largest * min(grid.spacing) / speed)


# Labelled data


def dimensions(at: Place) -> tuple[str, ...]:
    """Names of the space dimensions of values at a place: `x` at the centre, `x_face` on the right face.

    >>> dimensions((1.0, 0.5))
    ('x_face', 'y')
    """
    suffix = {0.5: "", 1.0: "_face"}
    if any(a not in suffix for a in at):
        raise ValueError(f"values at {at} are neither at centres (0.5) nor on right faces (1)")
    return tuple(name + suffix[a] for name, a in zip(AXES, at, strict=False))


def _unit(text: str, power: int = 1, *, times: str = "", over: str = "") -> str:
    """The unit of textᵖ · times / over, where `1` and the empty text mean a pure number."""
    plain = [part if part not in ("", "1") else "" for part in (text, times, over)]
    base, factor, divisor = plain
    raised = f"({base})^{power}" if base and power != 1 else base
    result = " ".join(part for part in (raised, factor) if part) or "1"
    return f"{result} / {divisor}" if divisor else result


def _attribute(value: Any) -> Any:
    """What a NetCDF attribute can hold."""
    if isinstance(value, bool | np.bool_):
        return str(bool(value)).lower()
    if isinstance(value, str | int | float | np.number):
        return value
    if isinstance(value, Sequence) and value and all(isinstance(v, int | float) and not isinstance(v, bool) for v in value):
        return list(value)
    return "" if value is None else str(value)


def field_dataset(
    u: ArrayLike,
    times: ArrayLike,
    grid: Grid,
    variables: Sequence[Variable],
    attrs: Mapping[str, Any] | None = None,
    *,
    length_unit: str = "1",
    time_unit: str = "1",
) -> xr.Dataset:
    """q(sample, time, x, y, z): frames `(sample, time, c, *grid)` as one labelled variable per channel, in their own precision.

    Each channel has the dimensions of its place: `x` for centres, `x_face` for right faces. The attribute `boundaries` of a
    coordinate holds the kinds of its two sides.
    """
    u, times = np.asarray(u), _float64(times)
    _check(u, grid, len(variables))
    if u.ndim != grid.ndim + 3 or u.shape[1] != times.size:
        raise ValueError(f"frames of shape {u.shape} are not (sample, time = {times.size}, channel, *{grid.shape})")
    coords: dict[str, Any] = {
        "sample": ("sample", np.arange(u.shape[0]), {"long_name": "start"}),
        "time": ("time", times, {"long_name": "time", "units": time_unit}),
    }
    data: dict[str, Any] = {}
    for c, variable in enumerate(variables):
        names = dimensions(variable.at)
        coords |= _space_coordinates(grid, variable.at, length_unit)
        about = {"long_name": _long_name(variable, variables), "units": variable.unit or "1"}
        data[variable.name] = (("sample", "time", *names), u[:, :, c], about)
    return xr.Dataset(data, coords, {key: _attribute(value) for key, value in (attrs or {}).items()})


def _long_name(variable: Variable, variables: Sequence[Variable]) -> str:
    """What a channel is called in files."""
    name = variable.name
    if is_gas(variables):
        known = {"density": "density ρ", "energy": "energy density E"}
        known |= {q: f"momentum density ρv along {axis}" for q, axis in zip(MOMENTA, AXES, strict=True)}
        return known.get(name, f"density of the scalar {name}")
    if name not in VELOCITIES:
        return f"scalar {name}"
    return f"velocity along {AXES[VELOCITIES.index(name)]}" if len(variable.at) > 1 else name


def _space_coordinates(grid: Grid, at: Place, unit: str) -> dict[str, Any]:
    """Coordinates of values at a place, with the kinds of the sides of the box."""
    return {
        name: (
            name,
            values,
            {
                "long_name": f"{name[0]} at the {'right face' if name.endswith('_face') else 'cell centre'}",
                "units": unit,
                "boundaries": " ".join(sides),
            },
        )
        for name, values, sides in zip(dimensions(at), grid.coordinates(at), grid.boundaries, strict=True)
    }


def frames(ds: xr.Dataset, variables: Sequence[Variable]) -> np.ndarray:
    """`(sample, time, c, *grid)`: the channels of a labelled dataset stacked again, in the order of `variables`."""
    return np.stack([ds[v.name].transpose("sample", "time", *dimensions(v.at)).values for v in variables], axis=2)


def _length_unit(ds: xr.Dataset) -> str:
    return str(ds["x" if "x" in ds.coords else "x_face"].attrs.get("units", "1"))


def with_vorticity(ds: xr.Dataset, grid: Grid, variables: Sequence[Variable], solver: AbstractSolver) -> xr.Dataset:
    """`ds` of `field_dataset` and, between walls, `vorticity(sample, time, x, y, z)`: ω in 2D, ω_z in 3D, in the frames' precision.

    In a periodic box the velocities alone say what the vorticity is (see `vorticity`), and nothing is added.
    """
    if grid.ndim == 1 or all(grid.periodic):
        return ds
    u = frames(ds, variables)

    def picture(piece: np.ndarray) -> np.ndarray:
        w = vorticity(piece, grid, variables, solver)
        return w if grid.ndim == 2 else w[:, 2]

    length_unit = _length_unit(ds)
    unit = _unit(variables[velocity_channels(grid, variables)[0]].unit or "1", over=length_unit if length_unit != "1" else "")
    attrs = {"long_name": "vorticity ω" if grid.ndim == 2 else "vorticity along z", "units": unit}
    w = in_pieces(picture, grid, u).astype(u.dtype)
    coords = _space_coordinates(grid, grid.centre, length_unit)
    return ds.assign_coords(coords).assign({"vorticity": (("sample", "time", *dimensions(grid.centre)), w, attrs)})


def _series(
    u: np.ndarray, times: np.ndarray, grid: Grid, variables: Sequence[Variable], solver: AbstractSolver | None, length_unit: str
) -> dict[str, Any]:
    """What is followed over time, `(sample, time)`, with names and units: the means that statistics are made of."""
    unit = variables[velocity_channels(grid, variables)[0]].unit or "1"
    dims = ("sample", "time")

    def over_length(p: int) -> str:
        return _unit(unit, 2, over=_unit(length_unit, p) if length_unit != "1" else "")

    if grid.ndim == 1:
        if not all(grid.periodic):
            return {"mean_square": (dims, (u[:, :, 0] ** 2).mean(axis=-1), {"long_name": "⟨u²⟩", "units": _unit(unit, 2)})}
        labels = (("mean_square", "⟨u²⟩", 0), ("mean_square_slope", "⟨u_x²⟩", 2), ("mean_square_curvature", "⟨u_xx²⟩", 4))
        return {
            name: (dims, values, {"long_name": text, "units": over_length(p) if p else _unit(unit, 2)})
            for values, (name, text, p) in zip(mean_squares(u, grid, variables), labels, strict=True)
        }
    energy = in_pieces(lambda a: kinetic_energy(a, grid, variables), grid, u)
    found = {
        "energy": (dims, energy, {"long_name": "kinetic energy ½⟨|u|²⟩", "units": _unit(unit, 2)}),
        "enstrophy": (
            dims,
            in_pieces(lambda a: enstrophy(a, grid, variables, solver), grid, u),
            {"long_name": "enstrophy ½⟨|ω|²⟩", "units": over_length(2)},
        ),
    }
    if times.size > 1:
        units = _unit(unit, 2, over="time" if unit != "1" else "")
        found["energy_rate"] = (
            dims,
            energy_rate(energy, times),
            {"long_name": "dE/dt by differences between frames", "units": units},
        )
    return found


def with_diagnostics(
    ds: xr.Dataset,
    grid: Grid,
    variables: Sequence[Variable],
    *,
    solver: AbstractSolver | None = None,
    reference: xr.Dataset | None = None,
    modes: int | None = None,
    statistics_from: float | None = None,
    expected_sums: ArrayLike | None = None,
) -> xr.Dataset:
    """`ds` of `field_dataset` and beside the fields what is measured on them: series, sums, spectrum and, given a reference, ρ.

    In 1D `mean_square`, `mean_square_slope`, `mean_square_curvature`; else `energy`, `enstrophy`, `energy_rate` and, where the flow
    has none, `divergence_max`. `scalar_variance` where there are scalars; `drift` of what is conserved; `spectrum` in periodic
    boxes; `vorticity` between walls.

    - `solver`: whose states these are; it gives the divergence, the velocities between walls, and what it conserves. Without one
      the box must be periodic, and every channel is taken for conserved.
    - `reference`: the same variables at the same times and places, under the run's own filter; `modes` is the band |n_a| ≤ K of
      the correlation (all modes below Nyquist if None; between walls everything).
    - `statistics_from`: start of the window of the mean spectrum.
    - `expected_sums`: `(sample, time, c)`, see `drift`.
    """
    u = frames(ds, variables)
    names = [v.name for v in variables]
    unit = variables[velocity_channels(grid, variables)[0]].unit or "1"
    length_unit, times = _length_unit(ds), ds["time"].values
    series = ("sample", "time")
    added: dict[str, Any] = _series(u, times, grid, variables, solver, length_unit)
    coords: dict[str, Any] = {}
    scalars = [v for v in variables if v.name not in VELOCITIES]
    if scalars:
        variance = in_pieces(lambda a: scalar_variance(a, grid, variables), grid, u)
        units = {_unit(v.unit or "1", 2) for v in scalars}
        attrs = {"long_name": "variance of the scalar", "units": units.pop() if len(units) == 1 else "unit of the scalar squared"}
        added["scalar_variance"] = (("scalar", *series), np.moveaxis(variance, -1, 0), attrs)
        coords["scalar"] = ("scalar", [v.name for v in scalars])
    if all(grid.periodic):
        n, spectrum = time_mean_spectrum(u, times, grid, variables, statistics_from)
        k0 = 2 * np.pi / max(grid.lengths)
        coords["wavenumber"] = ("wavenumber", k0 * n, {"long_name": "shell wavenumber n k₀", "units": _unit("", over=length_unit)})
        attrs = {"long_name": "shell spectrum E(n), time mean", "units": _unit(unit, 2, times=length_unit)}
        window = [float(times[0] if statistics_from is None else statistics_from), float(times[-1])]
        added["spectrum"] = (("sample", "wavenumber"), spectrum, attrs | {"window": window})
    kept = [c for c, name in enumerate(names) if solver is None or name in solver.conserved]
    if kept:
        sums = in_pieces(lambda a: conserved_sums(a, grid), grid, u)
        change = drift(sums, drift_scale(u[:, 0], grid, variables), expected_sums)
        attrs = {"long_name": "change of the conserved sum over Σ|q| at the start", "units": "1"}
        added["drift"] = (("variable", *series), np.moveaxis(change[..., kept], -1, 0), attrs)
        coords["variable"] = ("variable", [names[c] for c in kept])
    if grid.ndim > 1:
        one = np.asarray(u[:1, :1])
        if solver is None or divergence_max(one, grid, variables, solver) is not None:
            largest = in_pieces(lambda a: np.asarray(divergence_max(a, grid, variables, solver)), grid, u)
            added["divergence_max"] = (series, largest, {"long_name": "max |∇·u| Δx / max |u|", "units": "1"})
    if reference is not None:
        band = max(grid.shape) if modes is None else modes
        what = "u" if grid.ndim == 1 else "the vorticity"
        added["correlation"] = (
            series,
            correlation(u, frames(reference, variables), grid, variables, band, solver),
            {"long_name": f"correlation of {what} with the reference", "units": "1"}
            | ({"modes": band} if all(grid.periodic) else {}),
        )
        error = velocity_error(u, frames(reference, variables), grid, variables, band)
        about = {"long_name": f"relative L2 error of {'u' if grid.ndim == 1 else 'the velocity'}", "units": "1"}
        added["velocity_error"] = (series, error, about)
    ds = ds.assign_coords(coords).assign(added)
    return ds if solver is None else with_vorticity(ds, grid, variables, solver)
