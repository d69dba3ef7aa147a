"""T = p/ρ, M² = |v|²/c², √ρ v = w_s + w_c, ‖q − q_ref‖ / ‖q_ref‖, m(T): what is measured on saved frames of a gas.

A state is a gas if its channels are `density`, `momentum_x` …, `energy`, in this order, all at the cell centres; further channels
are densities ρc of passive scalars. The gas constant is 1. What the channels do not say, γ and the emission Λ(T), comes from the
solver's equation (`gas_of`), or as an argument (`Gas`). Everything is pointwise in the conserved cell means: v = (ρv)/ρ is the
velocity of the mass in a cell, p = (γ − 1)(E − ½ |ρv|²/ρ).

Frames are `(…, c, *grid)` as in `hybridsim.diagnostics`, and the same holds: float64, on the host, a few frames at a time; a frame
that is not finite gives NaN, and a correlation of zero. Along periodic axes modes are those of Fourier; along all others cosines,
cos(π n x/L), the modes of a field that is mirrored at both sides.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from typing import Any, NamedTuple, Protocol, runtime_checkable

import equinox as eqx
import jax.numpy as jnp
import numpy as np
import xarray as xr
from jax.typing import ArrayLike

from hybridsim import diagnostics
from hybridsim.contract import AbstractSolver, Variable
from hybridsim.diagnostics import (
    AXES,
    _curl_of_centred,
    _difference,
    _finite_frames,
    _float64,
    _length_unit,
    _space,
    _unit,
    in_pieces,
    is_gas,
    shell_sum,
)
from hybridsim.grid import Grid

FIELDS = ("density", "weighted_velocity", "pressure")
"""What runs are compared in: ρ, √ρ v, p."""

JUDGED = ("density", "weighted_velocity")
"""The fields whose larger error is the error of a run."""

PARTS = ("solenoidal", "compressive")

BINS_PER_DECADE = 10
"""Temperature bins per decade."""

OFFSET = 0.75
"""Edges of the temperature bins are 10^((j + ¾)/10) for all runs: gas at 1, 1/10, 1/30 or 10^−1.75 then stays clear of them."""

TOLERANCE = 0.05
"""A fine run counts as converged while halving its resolution moves the filtered state by less than this share."""

EXTRA_ROWS = {
    "radiated": "energy radiated so far, box mean",
    "floor_events": "times that a floor stood in for a density or pressure, so far",
    "floor_mass": "mass that the floors stood for, box mean",
    "floor_energy": "energy that the floors stood for, box mean",
    "limited_faces": "times that the flux of a face was limited for positivity, so far",
    "bound_violations": "stages with a time step beyond the bound of the positivity limiter, so far",
}
"""What the rows of a gas solver's ledger are that stand beside its channels."""


@runtime_checkable
class GasEquation(Protocol):
    """(γ, Λ): what the equation of a gas offers to the engine; `cooling` has a method `rate(T) = Λ(T)`, or is None."""

    gamma: Any
    cooling: Any


class Gas(NamedTuple):
    """p = (γ − 1) ρ e, emission per volume ρ² Λ(T).

    **Arguments:** `gamma` γ > 1, the ratio of specific heats; `rate` Λ(T) ≥ 0 on arrays of any shape, None where nothing radiates.
    """

    gamma: float
    rate: Callable[[np.ndarray], np.ndarray] | None = None


def gas_of(solver: AbstractSolver) -> Gas | None:
    """γ and Λ of the solver's equation, or None where the state is no gas."""
    if not is_gas(solver.variables):
        return None
    equation = getattr(solver, "equation", None)
    if not isinstance(equation, GasEquation):
        raise TypeError(
            f"{type(solver).__name__} steps a gas (density, momentum, energy), so its `equation` must have `gamma` and `cooling`"
        )
    if equation.cooling is None:
        return Gas(float(equation.gamma))
    rate = eqx.filter_jit(lambda cooling, temperature: cooling.rate(temperature))
    return Gas(float(equation.gamma), lambda temperature: np.asarray(rate(equation.cooling, jnp.asarray(temperature)), np.float64))


# Pointwise


class Primitive(NamedTuple):
    """(ρ, v, p): `(…, *grid)`, `(…, d, *grid)`, `(…, *grid)`, float64."""

    density: np.ndarray
    velocity: np.ndarray
    pressure: np.ndarray


def _square(hat: np.ndarray) -> np.ndarray:
    return np.real(hat) ** 2 + np.imag(hat) ** 2


def _channel(u: np.ndarray, c: int | slice, grid: Grid) -> np.ndarray:
    return u[(..., c, *(slice(None),) * grid.ndim)]


@np.errstate(all="ignore")
def primitive(u: ArrayLike, grid: Grid, gamma: float) -> Primitive:
    """ρ, v = (ρv)/ρ, p = (γ − 1)(E − ½ ρ|v|²) of conserved `(…, c, *grid)`.

    >>> w = primitive(np.array([[2.0, 2.0], [2.0, 4.0], [4.0, 7.0]]), Grid((2,), (1.0,)), 1.5)
    >>> w.velocity, w.pressure
    (array([[1., 2.]]), array([1.5, 1.5]))
    """
    u = _finite_frames(_float64(u), grid)
    d = grid.ndim
    rho = _channel(u, 0, grid)
    v = _channel(u, slice(1, d + 1), grid) / _channel(u, slice(0, 1), grid)
    return Primitive(rho, v, (gamma - 1) * (_channel(u, d + 1, grid) - 0.5 * rho * (v**2).sum(axis=-d - 1)))


@np.errstate(all="ignore")
def temperature(u: ArrayLike, grid: Grid, gamma: float) -> np.ndarray:
    """T = p/ρ of conserved `(…, c, *grid)`: `(…, *grid)`, in the unit of a velocity squared."""
    w = primitive(u, grid, gamma)
    return w.pressure / w.density


@np.errstate(all="ignore")
def velocity(u: ArrayLike, grid: Grid) -> np.ndarray:
    """v = (ρv)/ρ: `(…, c, *grid)` -> `(…, d, *grid)`."""
    u = _finite_frames(_float64(u), grid)
    return _channel(u, slice(1, grid.ndim + 1), grid) / _channel(u, slice(0, 1), grid)


@np.errstate(all="ignore")
def weighted_velocity(u: ArrayLike, grid: Grid) -> np.ndarray:
    """√ρ v = (ρv)/√ρ, whose half square is the kinetic energy: `(…, c, *grid)` -> `(…, d, *grid)`."""
    u = _finite_frames(_float64(u), grid)
    return _channel(u, slice(1, grid.ndim + 1), grid) / np.sqrt(_channel(u, slice(0, 1), grid))


@np.errstate(all="ignore")
def log_density(u: ArrayLike, grid: Grid) -> np.ndarray:
    """s = ln(ρ/⟨ρ⟩), ⟨ρ⟩ the box mean of each frame: `(…, c, *grid)` -> `(…, *grid)`."""
    rho = _channel(_finite_frames(_float64(u), grid), 0, grid)
    return np.log(rho / rho.mean(axis=_space(grid), keepdims=True))


# Means


@np.errstate(all="ignore")
def series(u: ArrayLike, grid: Grid, gas: Gas) -> dict[str, np.ndarray]:
    """Box means of every frame: `(…, c, *grid)` -> name: `(…,)`.

    - `mach`: √⟨|v|²/c²⟩, c² = γp/ρ, by volume.
    - `density_rms`: √⟨(ρ − ⟨ρ⟩)²⟩/⟨ρ⟩.
    - `kinetic_energy` ½⟨ρ|v|²⟩, `internal_energy` ⟨p⟩/(γ − 1), `total_energy` ⟨E⟩.
    - `dilatation`: √⟨(∇·v)²⟩; 2D and 3D `enstrophy`: ½⟨|∇ × v|²⟩. By central differences, which are at ease with shocks; one-sided
      in the cells at a side.
    - `emission`: ⟨ρ² Λ(T)⟩, where something radiates.
    """
    u = np.asarray(u)
    values = in_pieces(lambda piece: _series(piece, grid, gas), grid, u)
    return {name: values[..., i] for i, name in enumerate(_series_names(grid, gas))}


def _series_names(grid: Grid, gas: Gas) -> tuple[str, ...]:
    names = ("mach", "density_rms", "kinetic_energy", "internal_energy", "total_energy", "dilatation")
    return names + ("enstrophy",) * (grid.ndim > 1) + ("emission",) * (gas.rate is not None)


@np.errstate(all="ignore")
def _series(u: np.ndarray, grid: Grid, gas: Gas) -> np.ndarray:
    w, space = primitive(u, grid, gas.gamma), _space(grid)
    square = (w.velocity**2).sum(axis=-grid.ndim - 1)
    mean = w.density.mean(axis=space)
    found = [
        np.sqrt((w.density * square / (gas.gamma * w.pressure)).mean(axis=space)),
        w.density.std(axis=space) / mean,
        0.5 * (w.density * square).mean(axis=space),
        w.pressure.mean(axis=space) / (gas.gamma - 1),
        _channel(_finite_frames(_float64(u), grid), grid.ndim + 1, grid).mean(axis=space),
    ]
    dilatation = np.sum([_difference(_channel(w.velocity, a, grid), a, grid) for a in range(grid.ndim)], axis=0)
    found.append(np.sqrt((dilatation**2).mean(axis=space)))
    if grid.ndim > 1:
        curl = _curl_of_centred(w.velocity, grid)
        found.append(0.5 * (curl**2).sum(axis=tuple(range(1, curl.ndim))) / grid.cells)
    if gas.rate is not None:
        found.append((w.density**2 * gas.rate(w.pressure / w.density)).mean(axis=space))
    return np.stack(found, axis=-1)


@np.errstate(all="ignore")
def scalar_variance(u: ArrayLike, grid: Grid) -> np.ndarray:
    """⟨ρ(c − c̃)²⟩/⟨ρ⟩, c̃ = ⟨ρc⟩/⟨ρ⟩, the variance by mass of every passive scalar: `(…, c, *grid)` -> `(…, scalars)`."""
    u = _finite_frames(_float64(u), grid)
    rho = _channel(u, slice(0, 1), grid)
    c = _channel(u, slice(grid.ndim + 2, None), grid) / rho
    mass = rho.mean(axis=_space(grid), keepdims=True)
    mean = (rho * c).mean(axis=_space(grid), keepdims=True) / mass
    return ((rho * (c - mean) ** 2).mean(axis=_space(grid), keepdims=True) / mass)[(..., *(0,) * grid.ndim)]


# Spectra


def spectral_grid(grid: Grid) -> Grid | None:
    """The periodic axes of a grid, along which there are spectra; None if there are none."""
    axes = [a for a in range(grid.ndim) if grid.periodic[a]]
    return Grid([grid.shape[a] for a in axes], [grid.lengths[a] for a in axes]) if axes else None


@lru_cache(maxsize=4)
def _directions(shape: tuple[int, ...], lengths: tuple[float, ...]) -> np.ndarray:
    """k/|k| of every mode, `(d, *rfft)`; k_a = 0 on the Nyquist plane of axis a, as where one differentiates, and 0 at k = 0."""
    grid = Grid(shape, lengths)
    planes = []
    for a, (k, n) in enumerate(zip(grid.wavenumbers(), shape, strict=True)):
        nyquist = np.pi * n / lengths[a]
        planes.append(np.where(np.isclose(np.abs(k), nyquist, rtol=1e-9), 0.0, k) if n % 2 == 0 else k)
    k = np.stack(np.broadcast_arrays(*planes))
    size = np.sqrt((k**2).sum(axis=0))
    return k / np.where(size > 0, size, 1.0)


def helmholtz(v: ArrayLike, grid: Grid) -> tuple[np.ndarray, np.ndarray]:
    """v = v_s + v_c, v̂_c = k (k·v̂)/|k|², v_s = v − v_c: two `(…, d, *grid)`, the solenoidal and the compressive part.

    In a periodic box, of vectors at one place. The mean (k = 0) is solenoidal. Modes at Nyquist have no derivative along that axis,
    so k has no such component there; where it has no other they are solenoidal.
    """
    v = _float64(v)
    if not all(grid.periodic):
        raise ValueError(f"the Helmholtz split needs a periodic box; the boundaries are {grid.boundaries}")
    hat, direction = np.fft.rfftn(v, axes=_space(grid)), _directions(grid.shape, grid.lengths)
    along = (direction * hat).sum(axis=-grid.ndim - 1, keepdims=True)
    compressive = np.fft.irfftn(direction * along, s=grid.shape, axes=_space(grid))
    return v - compressive, compressive


@np.errstate(all="ignore")
def spectrum(v: ArrayLike, grid: Grid) -> tuple[np.ndarray, np.ndarray]:
    """(n, E): E(n) = (1/k₀) Σ ½|v̂(k)|² over the shells of `diagnostics.shell_spectrum`, so that Σ E(n) k₀ = ½⟨|v|²⟩.

    `v`: `(…, d, *grid)`, any vector at one place: v, or √ρ v, whose spectrum is that of the kinetic energy (Kida & Orszag 1990,
    doi:10.1007/BF01065580). Returns the shell numbers n and, in a periodic box, E `(…, 3, shells)`: the whole, its solenoidal and
    its compressive part (see `helmholtz`), which add up to the whole, mode by mode. Where only some axes are periodic, E is
    `(…, 1, shells)`: the whole alone, along these axes, the mean over all others.
    """
    v = _finite_frames(_float64(v), grid)
    along = spectral_grid(grid)
    if along is None:
        raise ValueError(f"there are no spectra without a periodic axis; the boundaries are {grid.boundaries}")
    if along.ndim < grid.ndim:
        across = [a - grid.ndim for a in range(grid.ndim) if not grid.periodic[a]]
        v = np.moveaxis(v, across, range(-grid.ndim - 1, -grid.ndim - 1 + len(across)))
        n, found = diagnostics.shell_spectrum(v, along)
        return n, found.mean(axis=tuple(range(-1 - len(across), -1)))[..., None, :]
    hat, direction = np.fft.rfftn(v, axes=_space(grid)), _directions(grid.shape, grid.lengths)
    along_k = (direction * hat).sum(axis=-grid.ndim - 1)
    whole = _square(hat).sum(axis=-grid.ndim - 1)
    hat -= direction * np.expand_dims(along_k, -grid.ndim - 1)
    solenoidal = _square(hat).sum(axis=-grid.ndim - 1)
    found = np.stack([shell_sum(density, grid) for density in (whole, solenoidal, _square(along_k))], axis=-2)
    found *= 0.5 / grid.cells**2 * max(grid.lengths) / (2 * np.pi)
    return np.arange(found.shape[-1]), found


# Against a reference


def _modes(q: np.ndarray, grid: Grid, modes: int) -> tuple[np.ndarray, np.ndarray]:
    """(q̂, w) on |k_a| ≤ 2πK/L_a with Σ w |q̂|² = ⟨q²⟩ of that band: `(…, *grid)` -> `(…, *kept)`, `(*kept,)`; the mean stands first.

    One axis after the other, cut as it is transformed: that takes a small part of the time of a whole transform.
    """
    weights = np.ones((1,) * grid.ndim)

    def spread(values: np.ndarray, axis: int) -> np.ndarray:
        return values.reshape([-1 if a == axis else 1 for a in range(grid.ndim)])

    across = [a for a in range(grid.ndim) if not grid.periodic[a]]
    for axis in across:
        n, position = grid.shape[axis], axis - grid.ndim
        waves = np.arange(min(2 * modes + 1, n))
        table = np.cos(np.pi / n * np.outer(np.arange(n) + 0.5, waves)) * np.where(waves > 0, math.sqrt(2), 1.0) / n
        q = np.moveaxis(np.tensordot(q, table, axes=(position, 0)), -1, position)
    for axis in reversed([a for a in range(grid.ndim) if grid.periodic[a]]):
        n, position = grid.shape[axis], axis - grid.ndim
        if np.isrealobj(q):
            q = np.fft.rfft(q, axis=position, norm="forward")
            index = np.arange(min(modes, n // 2) + 1)
            weights = weights * spread(np.where((index == 0) | (2 * index == n), 1.0, 2.0), axis)
        else:
            q = np.fft.fft(q, axis=position, norm="forward")
            index = np.arange(n) if 2 * modes >= n else np.r_[0 : modes + 1, n - modes : n]
        q = np.take(q, index, axis=position)
    return q, np.broadcast_to(weights, q.shape[q.ndim - grid.ndim :])


@np.errstate(all="ignore")
def _compared(u: np.ndarray, u_ref: np.ndarray, grid: Grid, gamma: float, modes: int, noise: float) -> np.ndarray:
    """Per frame the errors of `FIELDS` and the correlation of the density's fluctuation: `(n, c, *grid)` -> `(n, 4)`."""
    inner = tuple(range(-grid.ndim, 0))
    finite = np.isfinite(u).all(axis=tuple(range(1, u.ndim)))

    def fields(frames: np.ndarray) -> np.ndarray:
        w = primitive(frames, grid, gamma)
        q = np.stack([w.density, *np.moveaxis(weighted_velocity(frames, grid), -grid.ndim - 1, 0), w.pressure])
        # a density below zero has no root, and its frame no error
        return np.where(np.isfinite(q).all(axis=inner, keepdims=True), q, np.nan)

    (q, weights), (known, _) = _modes(fields(u), grid, modes), _modes(fields(u_ref), grid, modes)

    def norm(part: np.ndarray) -> np.ndarray:
        return (weights * _square(part)).sum(axis=inner)

    change, size = norm(q - known), norm(known)
    parts = [slice(0, 1), slice(1, grid.ndim + 1), slice(grid.ndim + 1, grid.ndim + 2)]
    pairs = [(change[part].sum(axis=0), size[part].sum(axis=0)) for part in parts]
    errors = [np.where(top == 0, 0.0, np.sqrt(top / below)) for top, below in pairs]

    def fluctuation(rho: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """ρ̂ without its mean, and its norm, zero where there is rounding only."""
        mean = np.abs(rho[(..., *(0,) * grid.ndim)])
        rho = rho.copy()
        rho[(..., *(0,) * grid.ndim)] = 0
        size = np.sqrt(norm(rho))
        return rho, np.where(size > noise * mean, size, 0.0)

    (a, size_a), (b, size_b) = fluctuation(q[0]), fluctuation(known[0])
    product = (weights * np.real(a * np.conj(b))).sum(axis=inner)
    both = size_a * size_b
    rho = np.clip(np.where(both > 0, product / np.where(both > 0, both, 1.0), (size_a == 0) & (size_b == 0)), -1.0, 1.0)
    return np.stack([*errors, np.where(finite, rho, 0.0)], axis=-1)


def compare(u: ArrayLike, u_ref: ArrayLike, grid: Grid, gamma: float, modes: int) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """(e, r): e_q = ‖q − q_ref‖₂ / ‖q_ref‖₂ for q of `FIELDS`, and the correlation r of ρ − ⟨ρ⟩: two `(…, c, *grid)` -> `(…,)`.

    Of states on one grid under one filter, on the modes |k_a| ≤ 2πK/L_a, K = `modes`; along axes that are not periodic on cosines
    no shorter. Norms count everything, the mean too; √ρ v is one vector. A frame of the run that is not finite has the errors NaN
    and the correlation 0; a density that does not vary, but for rounding, has the correlation 0 with one that does and 1 with
    another that does not.
    """
    u, u_ref = np.asarray(u), np.asarray(u_ref)
    if not np.isfinite(u_ref).all():
        raise ValueError("the reference has frames that are not finite; nothing can be compared with them")
    noise = 8 * max(float(np.finfo(np.result_type(a, np.float32)).eps) for a in (u, u_ref))
    found = in_pieces(lambda a, b: _compared(a, b, grid, gamma, modes, noise), grid, u, u_ref)
    return {name: found[..., i] for i, name in enumerate(FIELDS)}, found[..., -1]


def error_of(errors: Mapping[str, ArrayLike]) -> np.ndarray:
    """e = max(e_ρ, e_√ρv): one error of a state."""
    return np.maximum.reduce([np.asarray(errors[name]) for name in JUDGED])


# Phases


def _bin_of(temperature: Any) -> Any:
    """The whole number j of the bin of a temperature."""
    return np.floor(BINS_PER_DECADE * np.log10(temperature) - OFFSET)


def temperature_bins(low: float, high: float) -> np.ndarray:
    """Centres of the bins from one below that of T = `low` to one above that of `high`; see `OFFSET`."""
    return 10 ** ((np.arange(_bin_of(low) - 1, _bin_of(high) + 2) + OFFSET + 0.5) / BINS_PER_DECADE)


@np.errstate(all="ignore")
def phases(u: ArrayLike, grid: Grid, gas: Gas, bins: np.ndarray) -> np.ndarray:
    """(m_b, ε_b): box means of ρ and ρ² Λ(T) over the cells whose T is in bin b: `(…, c, *grid)` -> `(…, 2, bins)`.

    `bins`: centres, as `temperature_bins` gives them; the first and the last also hold what lies beyond. Σ m_b = ⟨ρ⟩ and
    Σ ε_b = ⟨ρ²Λ⟩.
    """
    first = _bin_of(bins[0])

    def histogram(piece: np.ndarray) -> np.ndarray:
        w = primitive(piece, grid, gas.gamma)
        t = w.pressure / w.density
        place = np.nan_to_num(_bin_of(t) - first, nan=0.0, posinf=np.inf, neginf=-np.inf)
        place = np.clip(place, 0, bins.size - 1).astype(np.int64)
        emitted = np.zeros_like(t) if gas.rate is None else w.density**2 * gas.rate(t)
        found = np.stack(
            [
                [np.bincount(at.reshape(-1), weight.reshape(-1), bins.size) for weight in (rho, light)]
                for at, rho, light in zip(place, w.density, emitted, strict=True)
            ]
        )
        finite = np.asarray(np.isfinite(t).reshape(len(t), -1).all(axis=1))
        return np.where(finite[:, None, None], found / grid.cells, np.nan)

    return in_pieces(histogram, grid, np.asarray(u))


@np.errstate(all="ignore")
def phase_distance(mass: ArrayLike, reference: ArrayLike) -> float:
    """Σ_b |m_b − m_b,ref| / Σ_b m_b,ref: 0 for the same masses, 2 if no bin holds mass of both."""
    mass, reference = _float64(mass), _float64(reference)
    return float(np.abs(mass - reference).sum() / reference.sum())


# Labelled data


def _series_labels(grid: Grid, variables: Sequence[Variable], length_unit: str) -> dict[str, tuple[str, str]]:
    """Long name and unit of every series."""
    density, energy = variables[0].unit or "1", variables[grid.ndim + 1].unit or "1"
    pure = density == "1"
    return {
        "mach": ("rms Mach number √⟨|v|²/c²⟩", "1"),
        "density_rms": ("√⟨(ρ − ⟨ρ⟩)²⟩/⟨ρ⟩", "1"),
        "kinetic_energy": ("kinetic energy ½⟨ρ|v|²⟩", energy),
        "internal_energy": ("internal energy ⟨p⟩/(γ − 1)", energy),
        "total_energy": ("total energy ⟨E⟩", energy),
        "dilatation": ("rms dilatation √⟨(∇·v)²⟩", "1" if pure else "1 / time"),
        "enstrophy": ("enstrophy ½⟨|∇ × v|²⟩", "1" if pure else "1 / time^2"),
        "emission": ("emission ⟨ρ²Λ(T)⟩", _unit(energy, over="" if pure else "time")),
    }


def _row_units(variables: Sequence[Variable], d: int) -> dict[str, str]:
    energy = variables[d + 1].unit or "1"
    return {"radiated": energy, "floor_mass": variables[0].unit or "1", "floor_energy": energy}


def with_diagnostics(
    ds: xr.Dataset,
    u: np.ndarray,
    grid: Grid,
    variables: Sequence[Variable],
    gas: Gas,
    *,
    conserved: Sequence[str] | None = None,
    reference: np.ndarray | None = None,
    modes: int | None = None,
    statistics_from: float | None = None,
    expected_sums: ArrayLike | None = None,
    ledger: Mapping[str, ArrayLike] | None = None,
    bins: np.ndarray | None = None,
) -> xr.Dataset:
    """`ds` of `diagnostics.field_dataset` and beside the fields what is measured on them.

    The `series`; `scalar_variance` where there are scalars; `drift` of what is conserved; `spectrum` of √ρ v and
    `velocity_spectrum`, time means, where an axis is periodic, and their `…_parts` where all are; the rows of the ledger; where
    something radiates `mass_per_temperature` and `emission_per_temperature`, time means; given a reference `error` and
    `correlation` (see `compare`).

    - `u`: the frames of `ds`, `(sample, time, c, *grid)`.
    - `conserved`: names of the channels whose sums are kept; all if None.
    - `reference`: frames like `u` of the reference, under the run's own filter; `modes` is the band of the comparison.
    - `statistics_from`: start of the window of the time means.
    - `expected_sums`: `(sample, time, c)`, see `diagnostics.drift`.
    - `ledger`: name: `(sample, time)`, rows that have been added up from the start: `energy_added` (by forces, sides, floors, and
      radiation with its sign), and those of `EXTRA_ROWS`.
    - `bins`: centres of the temperature bins; chosen for these frames if None.
    """
    dims, times, length_unit, names = ("sample", "time"), ds["time"].values, _length_unit(ds), [v.name for v in variables]
    labels = _series_labels(grid, variables, length_unit)
    added: dict[str, Any] = {
        name: (dims, values, {"long_name": labels[name][0], "units": labels[name][1]})
        for name, values in series(u, grid, gas).items()
    }
    coords: dict[str, Any] = {}
    scalars = names[grid.ndim + 2 :]
    if scalars:
        variance = np.moveaxis(in_pieces(lambda a: scalar_variance(a, grid), grid, u), -1, 0)
        added["scalar_variance"] = (("scalar", *dims), variance, {"long_name": "variance of the scalar by mass", "units": "1"})
        coords["scalar"] = ("scalar", scalars)
    kept = [c for c, name in enumerate(names) if conserved is None or name in conserved]
    if kept:
        sums = in_pieces(lambda a: diagnostics.conserved_sums(a, grid), grid, u)
        change = diagnostics.drift(sums, _drift_scale(u[:, 0], grid, variables, gas.gamma), expected_sums)
        attrs = {"long_name": "change of the conserved sum over Σ|q| at the start", "units": "1"}
        added["drift"] = (("variable", *dims), np.moveaxis(change[..., kept], -1, 0), attrs)
        coords["variable"] = ("variable", [names[c] for c in kept])
    units = _row_units(variables, grid.ndim)
    for name, values in (ledger or {}).items():
        about = {"energy_added": "energy that forces, sides, floors and radiation have added, box mean"} | EXTRA_ROWS
        unit = units.get("radiated" if name == "energy_added" else name, "1")
        added[name] = (dims, np.asarray(values, np.float64), {"long_name": about.get(name, name), "units": unit})
    start = float(times[0]) if statistics_from is None else statistics_from
    window = times >= start - 1e-9 * max(1.0, abs(start))
    if not window.any():
        raise ValueError(f"no frame at or after t = {start}; the last one is at t = {times[-1]}")
    late, span = u[:, np.argmax(window) :], {"window": [start, float(times[-1])]}
    along = spectral_grid(grid)
    if along is not None:
        more, shells = _spectra(late, grid, along, variables, length_unit, span)
        added |= more
        coords |= shells
    if gas.rate is not None:
        if bins is None:
            t = in_pieces(lambda a: _range_of(temperature(a, grid, gas.gamma), grid), grid, u)
            bins = temperature_bins(float(np.nanmin(t)), float(np.nanmax(t)))
        found = np.stack([phases(sample, grid, gas, bins).mean(axis=0) for sample in late])
        unit = {"mass": variables[0].unit or "1", "emission": labels["emission"][1]}
        for i, (name, text) in enumerate((("mass", "mass"), ("emission", "emission ρ²Λ"))):
            attrs = {"long_name": f"{text} per temperature bin, box and time mean", "units": unit[name]} | span
            added[f"{name}_per_temperature"] = (("sample", "temperature"), found[:, i], attrs)
        attrs = {
            "long_name": f"temperature p/ρ, centre of the bin of 1/{BINS_PER_DECADE} decade",
            "units": _temperature_unit(variables),
        }
        coords["temperature"] = ("temperature", bins, attrs)
    if reference is not None:
        band = max(grid.shape) if modes is None else modes
        errors, rho = compare(u, reference, grid, gas.gamma, band)
        attrs = {"long_name": "relative L2 error against the reference", "units": "1", "modes": band}
        added["error"] = (("field", *dims), np.stack([errors[name] for name in FIELDS]), attrs)
        coords["field"] = ("field", list(FIELDS), {"long_name": "ρ, √ρ v, p"})
        attrs = {"long_name": "correlation of the density's fluctuation with the reference", "units": "1", "modes": band}
        added["correlation"] = (dims, rho, attrs)
    return ds.assign_coords(coords).assign(added).assign_attrs(gamma=gas.gamma)


def _temperature_unit(variables: Sequence[Variable]) -> str:
    return "1" if (variables[0].unit or "1") == "1" else "length^2/time^2"


def _range_of(q: np.ndarray, grid: Grid) -> np.ndarray:
    """Smallest positive and largest value of each frame."""
    q = np.where(q > 0, q, np.nan)
    low = np.fmin.reduce(q.reshape(len(q), -1), axis=1)
    return np.stack([low, np.fmax.reduce(q.reshape(len(q), -1), axis=1)], axis=-1)


def _drift_scale(u: np.ndarray, grid: Grid, variables: Sequence[Variable], gamma: float) -> np.ndarray:
    """Σ|q| ΔV per channel; of the momentum that of the whole vector, and Σ ρc ΔV where the gas is at rest."""
    scale = diagnostics.drift_scale(u, grid, variables)
    w = primitive(u, grid, gamma)
    sound = np.sqrt(gamma * w.density * w.pressure).sum(axis=_space(grid)) * grid.cell_volume
    momentum = scale[:, 1 : grid.ndim + 1]
    scale[:, 1 : grid.ndim + 1] = np.where(momentum > 0, momentum, sound[:, None])
    return scale


def _spectra(
    u: np.ndarray, grid: Grid, along: Grid, variables: Sequence[Variable], length_unit: str, span: dict[str, Any]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Time means of the spectra of √ρ v and v, as variables and coordinates."""

    def both(piece: np.ndarray) -> np.ndarray:
        return np.stack([spectrum(v, grid)[1] for v in (weighted_velocity(piece, grid), velocity(piece, grid))], axis=1)

    found = np.stack([in_pieces(both, grid, sample).mean(axis=0) for sample in u])
    n = np.arange(found.shape[-1])
    energy = variables[grid.ndim + 1].unit or "1"
    speed = "1" if energy == "1" else "length/time"
    axes = " ".join(AXES[a] for a in range(grid.ndim) if grid.periodic[a])
    how = span | ({} if along.ndim == grid.ndim else {"along": axes})
    mean = "" if along.ndim == grid.ndim else f" along {axes}, mean over the other axes"
    coords: dict[str, Any] = {
        "wavenumber": (
            "wavenumber",
            2 * np.pi / max(along.lengths) * n,
            {"long_name": "shell wavenumber n k₀", "units": _unit("", over=length_unit)},
        )
    }
    added: dict[str, Any] = {}
    kinds = (("spectrum", "√ρ v", _unit(energy, times=length_unit)), ("velocity_spectrum", "v", _unit(speed, 2, times=length_unit)))
    for i, (name, text, unit) in enumerate(kinds):
        attrs = {"long_name": f"shell spectrum of {text}{mean}, time mean", "units": unit} | how
        added[name] = (("sample", "wavenumber"), found[:, i, 0], attrs)
        if along.ndim == grid.ndim:
            attrs = attrs | {"long_name": f"parts of the shell spectrum of {text}, time mean"}
            added[f"{name}_parts"] = (("part", "sample", "wavenumber"), np.moveaxis(found[:, i, 1:], 1, 0), attrs)
            coords["part"] = ("part", list(PARTS), {"long_name": "part of the Helmholtz split"})
    return added, coords
