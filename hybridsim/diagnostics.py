"""ρ(t) = ⟨ω ω_ref⟩ / (‖ω‖ ‖ω_ref‖), E(n), |Σq(t) - Σq(0)| / Σ|q|: what is measured on saved frames.

Everything here runs on the host, in float64, on whole arrays of frames: the last axes are space, before them stands the channel,
and any axes in front (sample, time) are carried along. A frame that is not finite gives NaN, and a correlation of zero.

The state's `Variable`s say which channels are velocities (`u`, `v`, `w`) and where in the cell each one lives.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import xarray as xr
from jax.typing import ArrayLike

from hybridsim.contract import Variable
from hybridsim.grid import Grid, Place

AXES = ("x", "y", "z")
VELOCITIES = ("u", "v", "w")


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


def _check(u: np.ndarray, grid: Grid, channels: int | None = None) -> None:
    lead = u.ndim - grid.ndim
    if lead < (0 if channels is None else 1) or u.shape[lead:] != grid.shape:
        raise ValueError(f"frames of shape {u.shape} do not end with the grid's shape {grid.shape}")
    if channels is not None and u.shape[lead - 1] != channels:
        raise ValueError(f"frames of shape {u.shape} have {u.shape[lead - 1]} channels; the variables name {channels}")


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
    return np.take(u, channels, axis=u.ndim - grid.ndim - 1)


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


@np.errstate(over="ignore", invalid="ignore", divide="ignore")
def shell_spectrum(u: ArrayLike, grid: Grid) -> tuple[np.ndarray, np.ndarray]:
    """E(n) = (1/k₀) Σ ½|û(k)|² over (n-½) k₀ ≤ |k| < (n+½) k₀, with k₀ = 2π / max L, so that Σ E(n) k₀ = ½⟨|u|²⟩.

    `u`: `(…, c, *grid)`, all channels are summed. Returns the shell numbers n `(shells,)` and E `(…, shells)`, in the unit of u²
    times length. Shell 0 (the mean) and the corners beyond the last complete shell are kept, so nothing is lost. The places of
    the values do not matter: a shift changes phases only.
    """
    u = _float64(u)
    _check(u, grid, u.shape[-grid.ndim - 1] if u.ndim > grid.ndim else 1)
    longest = max(grid.lengths)
    radius = sum((index * (longest / length)) ** 2 for index, length in zip(_mode_indices(grid), grid.lengths, strict=True))
    shell = np.floor(np.sqrt(radius) + 0.5).astype(np.int64)
    shells = int(shell.max()) + 1
    last = _mode_indices(grid)[-1]
    # rfftn holds one of each conjugate pair, except on the planes n = 0 and n = N/2, which hold both
    pairs = np.where((last == 0) | (2 * last == grid.shape[-1]), 1.0, 2.0)

    spectrum = np.fft.rfftn(u, axes=_space(grid))
    weight = 0.5 * pairs / (grid.cells**2) * longest / (2 * np.pi)
    energy = ((spectrum.real**2 + spectrum.imag**2).sum(axis=-grid.ndim - 1)) * weight
    batch = energy.shape[: energy.ndim - grid.ndim]
    energy = energy.reshape(-1, shell.size)
    slots = np.arange(len(energy))[:, None] * shells + shell.reshape(-1)
    total = np.bincount(slots.reshape(-1), weights=energy.reshape(-1), minlength=len(energy) * shells)
    return np.arange(shells), total.reshape(*batch, shells)


def time_mean_spectrum(
    u: ArrayLike, times: ArrayLike, grid: Grid, variables: Sequence[Variable], start: float | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Ē(n) = mean of E(n, t) over the frames with t ≥ start: `(…, time, c, *grid)` -> n `(shells,)`, Ē `(…, shells)`.

    NaN for a sample with a frame in the window that is not finite.
    """
    times = _float64(times)
    u = velocity(u, grid, variables)
    window = times >= (times[0] if start is None else start - 1e-9 * max(1.0, abs(start)))
    if not window.any():
        raise ValueError(f"no frame at or after t = {start}; the last one is at t = {times[-1]}")
    n, spectrum = shell_spectrum(np.compress(window, u, axis=u.ndim - grid.ndim - 2), grid)
    return n, spectrum.mean(axis=-2)


@np.errstate(over="ignore", invalid="ignore", divide="ignore")
def spectrum_error(
    spectrum: ArrayLike,
    reference: ArrayLike,
    n: ArrayLike,
    coarse_shape: Sequence[int],
    lengths: Sequence[float] | None = None,
) -> float | np.ndarray:
    """mean of |ln E(n)/E_ref(n)| over 1 ≤ n ≤ ⅔ of the coarse Nyquist shell (min N / 2).

    `spectrum`, `reference`: `(…, shells)` under the same filter, shells `n`. A float for one spectrum, an array `(…,)` for several;
    average over samples before calling to score the ensemble. Infinite where a spectrum is not finite or has lost all energy in
    a shell. `lengths` is needed for a box that is not a cube only: the Nyquist shell is then min N_a max(L) / (2 L_a).
    """
    spectrum, reference, n = np.broadcast_arrays(_float64(spectrum), _float64(reference), _float64(n))
    lengths = (1.0,) * len(coarse_shape) if lengths is None else lengths
    nyquist = min(cells * max(lengths) / (2 * length) for cells, length in zip(coarse_shape, lengths, strict=True))
    shells = n.reshape(-1, n.shape[-1])[0]
    window = (shells >= 1) & (shells <= 2 / 3 * nyquist * (1 + 1e-12))
    if not window.any():
        raise ValueError(f"a grid of shape {tuple(coarse_shape)} has no shell between 1 and two thirds of its Nyquist wavenumber")
    spectrum, reference = spectrum[..., window], reference[..., window]
    distance = np.abs(np.log(spectrum / reference))
    distance = np.where((spectrum == 0) & (reference == 0), 0.0, distance)
    error = distance.mean(axis=-1)
    error = np.where(np.isnan(error), np.inf, error)
    return float(error) if error.ndim == 0 else error


# Vorticity and correlation


@np.errstate(over="ignore", invalid="ignore", divide="ignore")
def vorticity(u: ArrayLike, grid: Grid, variables: Sequence[Variable]) -> np.ndarray:
    """ω = ∂x v - ∂y u (2D), ω = ∇ × u (3D), at the cell centres: ω̂ = i k × û exp(i k · (½ - at) Δx).

    `(…, c, *grid)` -> `(…, *grid)` in 2D, `(…, 3, *grid)` in 3D, in the unit of u over length. Spectral derivative after the
    phase shift to common points; Nyquist modes are dropped.
    """
    if grid.ndim == 1:
        raise ValueError("vorticity needs two or three dimensions")
    channels = velocity_channels(grid, variables)
    hat = _centred_spectrum(velocity(u, grid, variables), grid, [variables[c].at for c in channels])
    k = grid.wavenumbers()
    part = [hat[(..., c, *(slice(None),) * grid.ndim)] for c in range(grid.ndim)]
    if grid.ndim == 2:
        curl = 1j * (k[0] * part[1] - k[1] * part[0])
    else:
        pairs = ((1, 2), (2, 0), (0, 1))
        curl = np.stack([1j * (k[a] * part[b] - k[b] * part[a]) for a, b in pairs], axis=-grid.ndim - 1)
    return np.fft.irfftn(curl, s=grid.shape, axes=_space(grid))


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
def correlation(u: ArrayLike, u_ref: ArrayLike, grid: Grid, variables: Sequence[Variable], modes: int) -> np.ndarray:
    """ρ = ⟨ω ω_ref⟩ / (‖ω‖ ‖ω_ref‖) of the vorticity on |n_a| ≤ `modes` (in 1D: of u itself): two `(…, c, *grid)` -> `(…,)`.

    Both on the same grid and at the same places. A run's frame that is not finite counts as 0, and so does a frame without
    any vorticity in the band, unless the reference has none either (then 1).
    """
    u, u_ref = _float64(u), _float64(u_ref)
    _check(u, grid, len(variables))
    _check(u_ref, grid, len(variables))
    inner = tuple(range(-grid.ndim - 1, 0))
    if not np.isfinite(u_ref).all():
        raise ValueError("the reference has frames that are not finite; nothing can be compared with them")
    finite = np.isfinite(u).all(axis=inner)

    def banded(frames: np.ndarray) -> np.ndarray:
        # the coefficient does not depend on the size of a frame; scaling keeps 1e200 from overflowing
        largest = np.abs(frames).max(axis=inner, keepdims=True)
        frames = frames / np.where(largest > 0, largest, 1.0)
        if grid.ndim == 1:
            w = velocity(frames, grid, variables)
        else:
            w = vorticity(frames, grid, variables)
            w = w if grid.ndim == 3 else w[..., None, :, :]
        w = band_limit(w, grid, modes)
        # what a transform leaves of an empty band is rounding, not a field
        norm = np.sqrt((w**2).sum(axis=inner, keepdims=True))
        noise = 1e-13 * np.sqrt(grid.cells) * max(np.pi * n / length for n, length in zip(grid.shape, grid.lengths, strict=True))
        return np.where(norm > noise, w / np.where(norm > 0, norm, 1.0), 0.0)

    w = banded(np.where(np.expand_dims(finite, inner), u, 0.0))
    w_ref = banded(u_ref)
    product = np.clip((w * w_ref).sum(axis=inner), -1.0, 1.0)
    empty, empty_ref = ~w.any(axis=inner), ~w_ref.any(axis=inner)
    return np.where(finite, np.where(empty & empty_ref, 1.0, product), 0.0)


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
def enstrophy(u: ArrayLike, grid: Grid, variables: Sequence[Variable]) -> np.ndarray:
    """½⟨|ω|²⟩ with the spectral vorticity: `(…, c, *grid)` -> `(…,)`, in the unit of u² over length²."""
    w = vorticity(u, grid, variables)
    w = w if grid.ndim == 3 else w[..., None, :, :]
    return np.asarray(0.5 * (w**2).sum(axis=-grid.ndim - 1).mean(axis=_space(grid)))


@np.errstate(over="ignore", invalid="ignore", divide="ignore")
def conserved_sums(u: ArrayLike, grid: Grid) -> np.ndarray:
    """Σ_i q_i ΔV per channel, summed in float64: `(…, c, *grid)` -> `(…, c)`."""
    u = _float64(u)
    _check(u, grid)
    return u.sum(axis=_space(grid)) * grid.cell_volume


@np.errstate(over="ignore", invalid="ignore", divide="ignore")
def drift_scale(u: ArrayLike, grid: Grid, variables: Sequence[Variable]) -> np.ndarray:
    """Σ_i |q_i| ΔV, the size against which drift is measured: `(…, c, *grid)` at t = 0 -> `(…, c)`.

    Velocity components share Σ|u| of the vector, so that a component that starts at zero has a scale.
    """
    u = _float64(u)
    _check(u, grid, len(variables))
    scale = np.abs(u).sum(axis=_space(grid)) * grid.cell_volume
    names = [v.name for v in variables]
    components = [names.index(name) for name in VELOCITIES if name in names]
    if components:
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
def divergence_max(u: ArrayLike, grid: Grid, variables: Sequence[Variable]) -> np.ndarray:
    """max|∇·u| min(Δx) / max|u_a| of each frame: `(…, c, *grid)` -> `(…,)`, dimensionless. 0 for a fluid at rest.

    The operator is the solver's: face differences where every component lives on its own face, spectral elsewhere.
    """
    places = [variables[c].at for c in velocity_channels(grid, variables)]
    faces = [tuple(1.0 if b == a else 0.5 for b in range(grid.ndim)) for a in range(grid.ndim)]
    u = velocity(u, grid, variables)
    divergence = divergence_staggered(u, grid) if places == faces else divergence_spectral(u, grid, places)
    largest = np.abs(divergence).max(axis=_space(grid))
    speed = np.abs(u).max(axis=tuple(range(-grid.ndim - 1, 0)))
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

    Each channel has the dimensions of its place: `x` for centres, `x_face` for right faces.
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
        for name, values in zip(names, grid.coordinates(variable.at), strict=True):
            place = "right face" if name.endswith("_face") else "cell centre"
            coords[name] = (name, values, {"long_name": f"{name[0]} at the {place}", "units": length_unit})
        long_name = f"velocity along {AXES[VELOCITIES.index(variable.name)]}" if variable.name in VELOCITIES else variable.name
        data[variable.name] = (("sample", "time", *names), u[:, :, c], {"long_name": long_name, "units": variable.unit or "1"})
    return xr.Dataset(data, coords, {key: _attribute(value) for key, value in (attrs or {}).items()})


def frames(ds: xr.Dataset, variables: Sequence[Variable]) -> np.ndarray:
    """`(sample, time, c, *grid)`: the channels of a labelled dataset stacked again, in the order of `variables`."""
    return np.stack([ds[v.name].transpose("sample", "time", *dimensions(v.at)).values for v in variables], axis=2)


def with_diagnostics(
    ds: xr.Dataset,
    grid: Grid,
    variables: Sequence[Variable],
    *,
    reference: xr.Dataset | None = None,
    modes: int | None = None,
    statistics_from: float | None = None,
    expected_sums: ArrayLike | None = None,
) -> xr.Dataset:
    """`ds` of `field_dataset` and beside the fields: energy, enstrophy, divergence_max, drift, spectrum and, given a reference, ρ.

    - `reference`: the same variables at the same times and places, under the run's own filter; `modes` is the band |n_a| ≤ K of
      the correlation (all modes below Nyquist if None).
    - `statistics_from`: start of the window of the mean spectrum.
    - `expected_sums`: `(sample, time, c)`, see `drift`.
    """
    u = frames(ds, variables)
    unit = variables[velocity_channels(grid, variables)[0]].unit or "1"
    length_unit = ds[dimensions(grid.centre)[0] if "x" in ds.coords else "x_face"].attrs.get("units", "1")
    times = ds["time"].values
    n, spectrum = time_mean_spectrum(u, times, grid, variables, statistics_from)
    k0 = 2 * np.pi / max(grid.lengths)
    change = drift(conserved_sums(u, grid), drift_scale(u[:, 0], grid, variables), expected_sums)
    series = ("sample", "time")
    shell = ("wavenumber", k0 * n, {"long_name": "shell wavenumber n k₀", "units": _unit("", over=length_unit)})
    window = float(times[0] if statistics_from is None else statistics_from)
    added: dict[str, Any] = {
        "energy": (series, kinetic_energy(u, grid, variables), {"long_name": "kinetic energy ½⟨|u|²⟩", "units": _unit(unit, 2)}),
        "spectrum": (
            ("sample", "wavenumber"),
            spectrum,
            {
                "long_name": "shell spectrum E(n), time mean",
                "units": _unit(unit, 2, times=length_unit),
                "window": [window, float(times[-1])],
            },
        ),
        "drift": (
            ("variable", *series),
            np.moveaxis(change, -1, 0),
            {"long_name": "change of the conserved sum over Σ|q| at the start", "units": "1"},
        ),
    }
    if grid.ndim > 1:
        added["enstrophy"] = (
            series,
            enstrophy(u, grid, variables),
            {"long_name": "enstrophy ½⟨|ω|²⟩", "units": _unit(unit, 2, over=_unit(length_unit, 2) if length_unit != "1" else "")},
        )
        added["divergence_max"] = (
            series,
            divergence_max(u, grid, variables),
            {"long_name": "max |∇·u| Δx / max |u|", "units": "1"},
        )
    if reference is not None:
        band = max(grid.shape) if modes is None else modes
        added["correlation"] = (
            series,
            correlation(u, frames(reference, variables), grid, variables, band),
            {"long_name": "correlation of the vorticity with the reference" if grid.ndim > 1 else "correlation with the reference"}
            | {"units": "1", "modes": band},
        )
    coords = {"wavenumber": shell, "variable": ("variable", [v.name for v in variables])}
    return ds.assign_coords(coords).assign(added)
