"""E(n), T(n), Π(n), ε, S_p(r), f(q), ρ(τ), τ_ac = filter(u_a u_c) − ū_a ū_c: turbulence statistics of saved frames.

For Kuramoto–Sivashinsky (1D) and incompressible flow (2D, 3D) in periodic boxes. Everything runs on the host in float64. Frames
are `(…, c, *grid)` with up to two axes in front: none, `(time,)` or `(sample, time)`; they keep these names in the results, which
are labelled, with units. A frame with a value that is not finite gives NaN, and only where that frame enters.

The state's `Variable`s say which channels are velocities and where each lives in the cell. Derivatives and products are taken at
the cell centres after a phase shift, so that staggered and centred samples of one flow have the same statistics; Nyquist modes,
whose phase is not known, are dropped there. Energies, correlations and structure functions use every component as it stands.

Averages over time and members, with their errors and the number of independent blocks: `mean_with_error`, of any of the results.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from itertools import combinations_with_replacement
from typing import Any, Literal, NamedTuple

import numpy as np
import xarray as xr
from jax.typing import ArrayLike

from hybridsim import diagnostics
from hybridsim.contract import Variable
from hybridsim.diagnostics import (
    AXES,
    VELOCITIES,
    _below_nyquist,
    _centred_spectrum,
    _check,
    _float64,
    _space,
    _unit,
    shell_sum,
)
from hybridsim.grid import Grid, Place

Filter = Literal["sharp", "box", "gaussian", "cells"]
"""Names of the filters; see `transfer_function`."""

Window = Literal["first_zero", "full"]
"""How far a correlation is integrated: to its first zero, or as far as it is given."""

Numbers = ArrayLike | Sequence[float]
"""Numbers in any form."""

Width = float | int | Sequence[float] | Sequence[int] | np.ndarray
"""A filter width, one for all axes or one each."""

FEWEST_BLOCKS = 8
"""An average over fewer members or blocks has no trustworthy error."""

BLOCK_LENGTH = 10.0
"""Length of a block in integral times. The variance of block means is then too small by a tenth at most (exponential decay)."""


class Labels(NamedTuple):
    """t, [x], [t]: the times of the frames and the units of length and time, as far as they are known.

    **Arguments:** `times` `(time,)`, the frame numbers if None; `length_unit`, `time_unit`: `1` for pure numbers.
    """

    times: Numbers | None = None
    length_unit: str = "1"
    time_unit: str = "1"


PLAIN = Labels()


# Labels and units


def _numbers(values: Numbers) -> np.ndarray:
    return np.asarray(values, dtype=np.float64)


def _units(speed: str, p: int, length: str, q: int) -> str:
    """The unit speedᵖ lengthᑫ."""

    def factors(p: int, q: int) -> list[str]:
        return [_unit(text, n) for text, n in ((speed, p), (length, q)) if n > 0 and text not in ("", "1")]

    above, below = " ".join(factors(p, q)), factors(-p, -q)
    single = len(below) == 1 and ("/" not in below[0] or below[0].startswith("("))
    return _unit(above or "1", over=below[0] if single else f"({' '.join(below)})" if below else "")


def _leading(shape: tuple[int, ...], labels: Labels) -> tuple[tuple[str, ...], dict[str, Any]]:
    """Names and coordinates of the axes in front of the channel."""
    if len(shape) > 2:
        raise ValueError(f"frames have {len(shape)} axes in front of the channel; at most (sample, time) can be named")
    dims = ("sample", "time")[2 - len(shape) :]
    coords: dict[str, Any] = {}
    if len(shape) == 2:
        coords["sample"] = ("sample", np.arange(shape[0]), {"long_name": "start"})
    if shape:
        if labels.times is None:
            coords["time"] = ("time", np.arange(shape[-1], dtype=float), {"long_name": "frame", "units": "1"})
        else:
            times = np.atleast_1d(_numbers(labels.times))
            if times.shape != shape[-1:]:
                raise ValueError(f"{times.size} times for {shape[-1]} frames")
            coords["time"] = ("time", times, {"long_name": "time", "units": labels.time_unit or "1"})
    return dims, coords


def _whole_frames(u: np.ndarray, axes: int) -> np.ndarray:
    """NaN everywhere in a frame (the last `axes` axes) that has a value which is not finite."""
    finite = np.isfinite(u).all(axis=tuple(range(-axes, 0)), keepdims=True)
    return u if finite.all() else np.where(finite, u, np.nan)


def _per_frame(function: Callable[[np.ndarray], np.ndarray], u: np.ndarray, axes: int) -> np.ndarray:
    """The function of each frame (the last `axes` axes), one after the other, so that padded products fit in memory."""
    lead = u.shape[: u.ndim - axes]
    found = [function(frame) for frame in u.reshape(-1, *u.shape[u.ndim - axes :])]
    return np.stack(found).reshape((*lead, *found[0].shape))


def _shells(shells: int, grid: Grid, labels: Labels) -> dict[str, Any]:
    """Coordinates of a shell spectrum."""
    n = np.arange(shells)
    k0 = 2 * np.pi / max(grid.lengths)
    return {
        "wavenumber": ("wavenumber", k0 * n, {"long_name": "shell wavenumber n k₀", "units": _unit("", over=labels.length_unit)}),
        "shell": ("wavenumber", n, {"long_name": "shell number n", "units": "1"}),
    }


def _periodic_box(grid: Grid) -> None:
    if not all(grid.periodic):
        raise ValueError(f"this statistic needs a periodic box; the boundaries are {grid.boundaries}")


class _Flow:
    """The velocity of some frames, `(…, d, *grid)`, and how to label what is computed from it."""

    def __init__(
        self, frames: ArrayLike, grid: Grid, variables: Sequence[Variable], labels: Labels, needs: Sequence[int] = (1, 2, 3)
    ):
        if grid.ndim not in needs:
            raise ValueError(f"this statistic is for {' or '.join(map(str, needs))} dimensions, the grid has {grid.ndim}")
        _periodic_box(grid)
        channels = diagnostics.velocity_channels(grid, variables)
        self.grid = grid
        self.u = _whole_frames(diagnostics.velocity(frames, grid, variables), grid.ndim + 1)
        self.places = [variables[c].at for c in channels]
        self.unit = variables[channels[0]].unit or "1"
        self.labels = labels
        self.dims, self.coords = _leading(self.u.shape[: -grid.ndim - 1], labels)

    def each(self, function: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
        """The function of every frame `(d, *grid)`."""
        return _per_frame(function, self.u, self.grid.ndim + 1)

    def spectrum(self, u: np.ndarray) -> np.ndarray:
        """û_c at the cell centres: `(d, *grid)` -> `(d, *rfft)`, normalised so that Σ|û|² = ⟨|u|²⟩ over all modes."""
        return _centred_spectrum(u, self.grid, self.places) / self.grid.cells

    def units(self, speed: int, length: int) -> str:
        return _units(self.unit, speed, self.labels.length_unit or "1", length)

    def label(
        self,
        values: ArrayLike,
        long_name: str,
        speed: int,
        length: int,
        dims: Sequence[str] = (),
        coords: Mapping[str, Any] | None = None,
        **attrs: Any,
    ) -> xr.DataArray:
        """A labelled array in the unit speedᵖ lengthᑫ."""
        attrs = {"long_name": long_name, "units": self.units(speed, length)} | attrs
        return xr.DataArray(np.asarray(values), {**self.coords, **(coords or {})}, (*self.dims, *dims), attrs=attrs)

    def space(self, grid: Grid | None = None) -> dict[str, Any]:
        """Coordinates of the cell centres."""
        grid = self.grid if grid is None else grid
        unit = self.labels.length_unit or "1"
        return {
            name: (name, x, {"long_name": f"{name} at the cell centre", "units": unit})
            for name, x in zip(AXES, grid.coordinates(), strict=False)
        }

    def shells(self, shells: int) -> dict[str, Any]:
        return _shells(shells, self.grid, self.labels)

    def components(self) -> dict[str, Any]:
        return {"component": ("component", list(VELOCITIES[: self.grid.ndim]), {"long_name": "velocity component"})}

    def axes(self) -> dict[str, Any]:
        return {"axis": ("axis", list(AXES[: self.grid.ndim]), {"long_name": "direction"})}


# Spectra and transfer


def _square(hat: np.ndarray) -> np.ndarray:
    return np.real(hat) ** 2 + np.imag(hat) ** 2


def _mean_of_modes(density: np.ndarray, grid: Grid) -> np.ndarray:
    """The sum over all modes of a density in the layout of `rfftn`."""
    return np.asarray(shell_sum(density, grid).sum(axis=-1))


@np.errstate(all="ignore")
def energy_spectrum(
    frames: ArrayLike, grid: Grid, variables: Sequence[Variable], labels: Labels = PLAIN, *, components: bool = False
) -> xr.DataArray:
    """E(n) = (1/k₀) Σ ½|û(k)|² over (n−½) k₀ ≤ |k| < (n+½) k₀, so that Σ E(n) k₀ = ½⟨|u|²⟩: dims `(…, [component], wavenumber)`.

    The shell spectrum of `diagnostics.shell_spectrum`; Parseval holds to 1e-14 for even and odd N, in boxes of any shape.
    `components`: one spectrum per velocity component, which sum to the whole. Unit u² length. (Pope 2000, Turbulent Flows,
    doi:10.1017/CBO9780511840531, §6.5, for homogeneous turbulence; there with integrals over spherical shells.)

    >>> grid = Grid((16,), (2 * np.pi,))
    >>> u = np.cos(3 * grid.mesh()[0])
    >>> energy_spectrum(u[None], grid, (Variable("u", "m/s", grid.centre),)).values[:5].round(12)
    array([0.  , 0.  , 0.  , 0.25, 0.  ])
    """
    flow = _Flow(frames, grid, variables, labels)
    if components:
        parts = [diagnostics.shell_spectrum(np.take(flow.u, [c], axis=-grid.ndim - 1), grid)[1] for c in range(grid.ndim)]
        spectrum, dims, coords = np.stack(parts, axis=-2), ("component", "wavenumber"), flow.components()
    else:
        spectrum, dims, coords = diagnostics.shell_spectrum(flow.u, grid)[1], ("wavenumber",), {}
    return flow.label(spectrum, "shell spectrum E(n)", 2, 1, dims, {**coords, **flow.shells(spectrum.shape[-1])})


@np.errstate(all="ignore")
def scalar_spectrum(
    frames: ArrayLike, grid: Grid, variables: Sequence[Variable], name: str, labels: Labels = PLAIN
) -> xr.DataArray:
    """E_q(n) = (1/k₀) Σ |q̂(k)|² over the shell n, so that Σ E_q(n) k₀ = ⟨q²⟩: dims `(…, wavenumber)`.

    The spectrum of any one channel, `name`. Shell 0 holds ⟨q⟩², the others the variance. No factor ½ (unlike energy).
    """
    names = [v.name for v in variables]
    if name not in names:
        raise ValueError(f"no channel {name!r}; there are {', '.join(names)}")
    _periodic_box(grid)
    u = _float64(frames)
    _check(u, grid, len(names))
    c = names.index(name)
    q = _whole_frames(np.take(u, [c], axis=-grid.ndim - 1), grid.ndim + 1)
    spectrum = 2 * diagnostics.shell_spectrum(q, grid)[1]
    dims, coords = _leading(q.shape[: -grid.ndim - 1], labels)
    units = _units(variables[c].unit or "1", 2, labels.length_unit or "1", 1)
    attrs = {"long_name": f"variance spectrum of {name}", "units": units}
    return xr.DataArray(spectrum, {**coords, **_shells(spectrum.shape[-1], grid, labels)}, (*dims, "wavenumber"), attrs=attrs)


def _embedded(hat: np.ndarray, shape: Sequence[int], wide: Sequence[int]) -> np.ndarray:
    """Coefficients of a grid of `shape` in the layout of a grid of `wide`, zeros added or modes cut away (layouts of `rfftn`).

    Where an axis changes, its Nyquist modes must be zero or must not matter.
    """
    axes = len(shape)
    old, new = [], []
    for a, (n, m) in enumerate(zip(shape, wide, strict=True)):
        small = min(n, m)
        index = np.arange(small // 2 + 1) if a == axes - 1 else np.fft.fftfreq(small, 1 / small).astype(int)
        old.append(index % n)
        new.append(index % m)
    out = np.zeros((*hat.shape[: hat.ndim - axes], *wide[:-1], wide[-1] // 2 + 1), dtype=complex)
    lead = tuple(slice(None) for _ in range(hat.ndim - axes))
    out[(*lead, *np.ix_(*new))] = hat[(*lead, *np.ix_(*old))]
    return out


def _transfer_density(u: np.ndarray, flow: _Flow) -> np.ndarray:
    """Re(û* · N̂) per mode, N = −P∇·(uu) (1D: −½ ∂x u²), products on 3/2 as many cells: `(d, *grid)` -> `(*rfft,)`."""
    grid, d = flow.grid, flow.grid.ndim
    k = grid.wavenumbers()
    hat = flow.spectrum(u)
    if d > 1:
        # The dot product with a solenoidal û sees the solenoidal part of ∇·(uu) only.
        square = sum(q * q for q in k)
        along = sum(q * part for q, part in zip(k, hat, strict=True)) / np.where(square > 0, square, 1.0)
        hat = hat - np.stack([q * along for q in k])
    wide = [2 * math.ceil(3 * n / 4) for n in grid.shape]
    axes = _space(grid)
    fine = np.fft.irfftn(_embedded(hat, grid.shape, wide), s=wide, axes=axes, norm="forward")
    density = np.zeros(hat.shape[1:])
    for a, c in combinations_with_replacement(range(d), 2):
        product = _embedded(np.fft.rfftn(fine[a] * fine[c], axes=axes, norm="forward"), wide, grid.shape)
        density += (np.conj(hat[c]) * (-1j * k[a] * product)).real
        if c > a:
            density += (np.conj(hat[a]) * (-1j * k[c] * product)).real
    return density * (0.5 if d == 1 else 1.0)


@np.errstate(all="ignore")
def energy_transfer(frames: ArrayLike, grid: Grid, variables: Sequence[Variable], labels: Labels = PLAIN) -> xr.DataArray:
    """T(n) = (1/k₀) Σ Re(û* · N̂) over the shell n, N = −P∇·(uu), in 1D N = −½ ∂x u²: ∂t E(n) = T(n) + …, dims `(…, wavenumber)`.

    What the advection brings into a shell. A density like E(n): Σ T(n) k₀ = 0 to rounding, since the products are formed on 3/2 as
    many cells per axis, free of aliasing (Orszag 1971, doi:10.1175/1520-0469(1971)028<1074:OTEOAI>2.0.CO;2), and since the
    solenoidal part of the velocity is taken first (staggered states are free of divergence only by their own differences). A mean
    flow changes nothing. Unit u³. (Pope 2000, §6.6; Frisch 1995, Turbulence, ch. 2.)

    >>> grid = Grid((12,), (2 * np.pi,))
    >>> (x,) = grid.mesh()
    >>> u = np.sin(x) + np.sin(2 * x)
    >>> energy_transfer(u[None], grid, (Variable("u", "1", grid.centre),)).values[:4].round(12) + 0.0
    array([ 0.  ,  0.25, -0.25,  0.  ])
    """
    flow = _Flow(frames, grid, variables, labels)
    density = flow.each(lambda u: shell_sum(_transfer_density(u, flow), grid))
    transfer = density * max(grid.lengths) / (2 * np.pi)
    return flow.label(transfer, "energy transfer T(n)", 3, 0, ("wavenumber",), flow.shells(transfer.shape[-1]))


@np.errstate(all="ignore")
def energy_flux(frames: ArrayLike, grid: Grid, variables: Sequence[Variable], labels: Labels = PLAIN) -> xr.DataArray:
    """Π(n) = −Σ_{m ≤ n} T(m) k₀: the energy that leaves the shells 0 … n by advection, dims `(…, wavenumber)`.

    Positive towards small scales; zero to rounding in the last shell. In unit u³ / length. (Frisch 1995, §2.4.)
    """
    transfer = energy_transfer(frames, grid, variables, labels)
    flow = _Flow(frames, grid, variables, labels)
    flux = -np.cumsum(transfer.values, axis=-1) * 2 * np.pi / max(grid.lengths)
    return flow.label(flux, "energy flux Π(n)", 3, -1, ("wavenumber",), flow.shells(flux.shape[-1]))


# Gradients and dissipation


def _rates(u: np.ndarray, flow: _Flow) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """|k|², |û|² and |k · û|² per mode."""
    k = flow.grid.wavenumbers()
    hat = flow.spectrum(u)
    along = np.sum([q * part for q, part in zip(k, hat, strict=True)], axis=0)
    return np.asarray(sum(q * q for q in k)), _square(hat).sum(axis=0), _square(along)


@np.errstate(all="ignore")
def dissipation_spectrum(
    frames: ArrayLike, grid: Grid, variables: Sequence[Variable], viscosity: float | int, labels: Labels = PLAIN
) -> xr.DataArray:
    """D(n) = (1/k₀) Σ 2ν|Ŝ(k)|² over the shell n, so that Σ D(n) k₀ = ε: dims `(…, wavenumber)`.

    2|Ŝ|² = |k|²|û|² + |k·û|²; for a solenoidal velocity D = 2ν|k|² times the energy of each mode, and ∂t E = T − D. `viscosity`: ν
    in the units of speed and length of the frames. Unit u³.
    """
    flow = _Flow(frames, grid, variables, labels, (2, 3))

    def density(u: np.ndarray) -> np.ndarray:
        square, energy, along = _rates(u, flow)
        return shell_sum(viscosity * (square * energy + along), grid)

    spectrum = flow.each(density) * max(grid.lengths) / (2 * np.pi)
    return flow.label(spectrum, "dissipation spectrum D(n)", 3, 0, ("wavenumber",), flow.shells(spectrum.shape[-1]))


@np.errstate(all="ignore")
def dissipation(
    frames: ArrayLike, grid: Grid, variables: Sequence[Variable], viscosity: float | int, labels: Labels = PLAIN
) -> xr.DataArray:
    """ε = 2ν⟨S:S⟩, S = ½(∇u + ∇uᵀ): dims `(…)`.

    By spectral derivatives; equal to ν⟨|ω|²⟩ for a solenoidal velocity in a periodic box. `viscosity`: ν in the units of speed and
    length of the frames. Unit u³ / length. (Pope 2000, §5.3.)

    >>> grid = Grid((8, 8), (2 * np.pi, 2 * np.pi))
    >>> u = np.stack([np.sin(2 * grid.mesh()[1]), 0 * grid.mesh()[0]])
    >>> variables = tuple(Variable(name, "m/s", grid.centre) for name in "uv")
    >>> float(dissipation(u, grid, variables, 0.1).round(12))  # 2 ν k² E = 2 · 0.1 · 4 · ¼
    0.2
    """
    flow = _Flow(frames, grid, variables, labels, (2, 3))
    spectrum = dissipation_spectrum(frames, grid, variables, viscosity, labels)
    return flow.label(spectrum.values.sum(axis=-1) * 2 * np.pi / max(grid.lengths), "dissipation ε = 2ν⟨S:S⟩", 3, -1)


@np.errstate(all="ignore")
def vorticity_moments(frames: ArrayLike, grid: Grid, variables: Sequence[Variable], labels: Labels = PLAIN) -> xr.Dataset:
    """½⟨|ω|²⟩ and ½⟨|∇ω|²⟩: `enstrophy` and `palinstrophy`, dims `(…)`.

    By spectral derivatives. In 2D, 2ν times the palinstrophy is the dissipation of enstrophy.
    """
    flow = _Flow(frames, grid, variables, labels, (2, 3))

    def palinstrophy(u: np.ndarray) -> np.ndarray:
        square, energy, along = _rates(u, flow)
        return _mean_of_modes(0.5 * square * (square * energy - along), grid)

    faces = tuple(Variable(name, flow.unit, at) for name, at in zip(VELOCITIES, flow.places, strict=False))
    return xr.Dataset(
        {
            "enstrophy": flow.label(diagnostics.enstrophy(flow.u, grid, faces), "enstrophy ½⟨|ω|²⟩", 2, -2),
            "palinstrophy": flow.label(flow.each(palinstrophy), "palinstrophy ½⟨|∇ω|²⟩", 2, -4),
        }
    )


@np.errstate(all="ignore")
def kuramoto_sivashinsky_budget(frames: ArrayLike, grid: Grid, variables: Sequence[Variable], labels: Labels = PLAIN) -> xr.Dataset:
    """d/dt ½⟨u²⟩ = ⟨u_x²⟩ − ⟨u_xx²⟩: `production` and `dissipation` of ∂t u + u u_x = −u_xx − u_xxxx, dims `(…)`.

    By spectral derivatives. The advection adds nothing; the two balance in the mean of a long run. In the units of the
    equation, whose coefficients are 1; with `length_unit` given, the two have the units u²/length² and u²/length⁴.
    """
    flow = _Flow(frames, grid, variables, labels, (1,))

    def moments(u: np.ndarray) -> np.ndarray:
        square, energy, _ = _rates(u, flow)
        return np.stack([_mean_of_modes(square * energy, grid), _mean_of_modes(square**2 * energy, grid)])

    found = flow.each(moments)
    return xr.Dataset(
        {
            "production": flow.label(found[..., 0], "production ⟨u_x²⟩", 2, -2),
            "dissipation": flow.label(found[..., 1], "dissipation ⟨u_xx²⟩", 2, -4),
        }
    )


@np.errstate(all="ignore")
def velocity_gradient(frames: ArrayLike, grid: Grid, variables: Sequence[Variable], labels: Labels = PLAIN) -> xr.DataArray:
    """∂_a u_c at the cell centres: dims `(…, axis, component, *space)`.

    By spectral derivatives after the phase shift to common points. Unit u / length.
    """
    flow = _Flow(frames, grid, variables, labels)

    def gradient(u: np.ndarray) -> np.ndarray:
        hat = flow.spectrum(u)
        return np.stack([np.fft.irfftn(1j * k * hat, s=grid.shape, axes=_space(grid), norm="forward") for k in grid.wavenumbers()])

    coords = {**flow.axes(), **flow.components(), **flow.space()}
    return flow.label(flow.each(gradient), "velocity gradient ∂_a u_c", 1, -1, ("axis", "component", *AXES[: grid.ndim]), coords)


@np.errstate(all="ignore")
def field(frames: ArrayLike, grid: Grid, variables: Sequence[Variable], name: str, labels: Labels = PLAIN) -> xr.DataArray:
    """One channel by its name, or `velocity`, `speed`, `vorticity`, `gradient`, `longitudinal_gradient`: for `pdf`, say.

    `velocity` and `speed` at the cell centres; `vorticity` is a scalar in 2D and has the dimension `component` in 3D; `gradient` is
    all of ∂_a u_c, `longitudinal_gradient` its diagonal ∂_a u_a, the longitudinal derivatives.
    """
    flow = _Flow(frames, grid, variables, labels)
    space = AXES[: grid.ndim]
    names = [v.name for v in variables]
    if name in names:
        c = names.index(name)
        dims = diagnostics.dimensions(variables[c].at)
        unit = labels.length_unit or "1"
        at = {
            dim: (dim, x, {"long_name": f"{dim[0]} at the {'right face' if '_' in dim else 'cell centre'}", "units": unit})
            for dim, x in zip(dims, grid.coordinates(variables[c].at), strict=True)
        }
        q = _whole_frames(np.take(_float64(frames), c, axis=-grid.ndim - 1), grid.ndim)
        attrs = {"long_name": name, "units": variables[c].unit or "1"}
        return xr.DataArray(q, {**flow.coords, **at}, (*flow.dims, *dims), attrs=attrs)
    if name in ("velocity", "speed"):
        u = flow.each(lambda u: np.fft.irfftn(flow.spectrum(u), s=grid.shape, axes=_space(grid), norm="forward"))
        if name == "speed":
            return flow.label(np.sqrt((u**2).sum(axis=-grid.ndim - 1)), "speed |u|", 1, 0, space, flow.space())
        return flow.label(u, "velocity", 1, 0, ("component", *space), {**flow.components(), **flow.space()})
    if name == "vorticity":
        velocities = tuple(Variable(v, flow.unit, at) for v, at in zip(VELOCITIES, flow.places, strict=False))
        w = diagnostics.vorticity(flow.u, grid, velocities)
        if grid.ndim == 2:
            return flow.label(w, "vorticity ω", 1, -1, space, flow.space())
        return flow.label(w, "vorticity ω", 1, -1, ("component", *space), {**flow.components(), **flow.space()})
    if name in ("gradient", "longitudinal_gradient"):
        gradient = velocity_gradient(frames, grid, variables, labels)
        if name == "gradient":
            return gradient
        diagonal = np.einsum("...aaz->...az", gradient.values.reshape(*gradient.shape[: -grid.ndim], -1))
        diagonal = diagonal.reshape(*gradient.shape[: -grid.ndim - 1], *grid.shape)
        return flow.label(diagonal, "longitudinal derivative ∂_a u_a", 1, -1, ("axis", *space), {**flow.axes(), **flow.space()})
    raise ValueError(
        f"no field {name!r}; there are {', '.join([*names, 'velocity, speed, vorticity, gradient, longitudinal_gradient'])}"
    )


@np.errstate(all="ignore")
def derivative_moments(frames: ArrayLike, grid: Grid, variables: Sequence[Variable], labels: Labels = PLAIN) -> xr.Dataset:
    """⟨s³⟩/⟨s²⟩^(3/2) and ⟨s⁴⟩/⟨s²⟩², s = ∂_a u_a (no sum): `skewness` and `flatness` of the longitudinal derivatives, dims `(…)`.

    The moments are means over the cells and over the axes, before the quotient is taken. Powers at the cells are those of the
    band-limited field as long as the field is resolved (for the cube: no modes at and above N/3). A field without gradients has
    no moments (NaN). (Pope 2000, §6.7; −0.5 or so and falling with Re_λ in 3D turbulence.)
    """
    flow = _Flow(frames, grid, variables, labels)

    def moments(u: np.ndarray) -> np.ndarray:
        hat = flow.spectrum(u)
        rates = [1j * k * part for k, part in zip(grid.wavenumbers(), hat, strict=True)]
        s = np.fft.irfftn(np.stack(rates), s=grid.shape, axes=_space(grid), norm="forward")
        second, third, fourth = ((s**p).mean() for p in (2, 3, 4))
        return np.stack([third / second**1.5, fourth / second**2])

    found = flow.each(moments)
    return xr.Dataset(
        {
            "skewness": flow.label(found[..., 0], "skewness of the longitudinal derivative", 0, 0),
            "flatness": flow.label(found[..., 1], "flatness of the longitudinal derivative", 0, 0),
        }
    )


def _rms_and_length(flow: _Flow) -> tuple[np.ndarray, np.ndarray]:
    """u′ and L = c/u′² Σ ½|û(k)|²/|k| of each frame; the mean over the box does not count, Nyquist modes do."""
    grid, d = flow.grid, flow.grid.ndim
    size = np.sqrt(sum(q * q for q in grid.wavenumbers()))

    def sums(u: np.ndarray) -> np.ndarray:
        energy = 0.5 * _square(np.fft.rfftn(u, axes=_space(grid), norm="forward")).sum(axis=0)
        energy = np.where(size > 0, energy, 0.0 * energy)
        return np.stack([_mean_of_modes(energy, grid), _mean_of_modes(energy / np.where(size > 0, size, 1.0), grid)])

    found = flow.each(sums)
    rms = np.sqrt(2 * found[..., 0] / d)
    return np.asarray(rms), np.asarray((np.pi / 2 if d == 3 else 2.0) * found[..., 1] / rms**2)


@np.errstate(all="ignore")
def turbulence_scales(
    frames: ArrayLike, grid: Grid, variables: Sequence[Variable], viscosity: float | int, labels: Labels = PLAIN
) -> xr.Dataset:
    """u′, ε, λ, η, τ_η, Re_λ, L, L/u′ and k_max η of each frame: dims `(…)`.

    Fluctuations u′ are about the mean over the box, frame by frame (a mean profile counts as fluctuation). In d dimensions:

    - `velocity_rms`: u′ = √(⟨|u − ⟨u⟩|²⟩ / d); `dissipation`: ε = 2ν⟨S:S⟩.
    - `taylor_microscale`: λ² = d (d + 2) ν u′² / ε, which is u′²/⟨(∂₁u₁)²⟩ if isotropic: the λ_g of Pope (2000, §6.3) in 3D (15),
      8 in 2D. `reynolds_lambda`: Re_λ = u′ λ / ν.
    - `kolmogorov_length`, `kolmogorov_time`: η = (ν³/ε)^(1/4), τ_η = (ν/ε)^(1/2) (Pope 2000, eq. 6.1 and 6.3).
    - `integral_length`: L = c/u′² Σ ½|û(k)|²/|k|, c = π/2 in 3D (Pope 2000, §6.5), 2 in 2D: ∫ f(r) dr of the longitudinal
      correlation if isotropic. `turnover_time`: L/u′.
    - `resolution`: k_max η, k_max = π / max Δx.
    - in 2D `enstrophy_scale`: (ν³/β)^(1/6), β = 2ν ½⟨|∇ω|²⟩ the dissipation of enstrophy (Kraichnan 1967,
      doi:10.1063/1.1762301).

    `viscosity`: ν > 0 in the units of speed and length of the frames. Where nothing moves, scales are NaN or infinite.
    """
    flow = _Flow(frames, grid, variables, labels, (2, 3))
    d, nu = grid.ndim, float(viscosity)
    if not nu > 0:
        raise ValueError(f"the scales of turbulence need a positive viscosity, found {viscosity}")

    rms, length = _rms_and_length(flow)
    epsilon = dissipation(frames, grid, variables, nu, labels).values
    taylor = np.sqrt(d * (d + 2) * nu / epsilon) * rms
    eta = (nu**3 / epsilon) ** 0.25
    found = {
        "velocity_rms": flow.label(rms, "rms velocity of one component u′", 1, 0),
        "dissipation": flow.label(epsilon, "dissipation ε = 2ν⟨S:S⟩", 3, -1),
        "taylor_microscale": flow.label(taylor, "Taylor microscale λ", 0, 1),
        "reynolds_lambda": flow.label(rms * taylor / nu, "Taylor Reynolds number Re_λ", 0, 0),
        "kolmogorov_length": flow.label(eta, "Kolmogorov length η", 0, 1),
        "kolmogorov_time": flow.label(np.sqrt(nu / epsilon), "Kolmogorov time τ_η", -1, 1),
        "integral_length": flow.label(length, "integral length L of the spectrum", 0, 1),
        "turnover_time": flow.label(length / rms, "turnover time L/u′", -1, 1),
        "resolution": flow.label(np.pi / max(grid.spacing) * eta, "resolution k_max η", 0, 0),
    }
    if d == 2:
        beta = 2 * nu * vorticity_moments(frames, grid, variables, labels)["palinstrophy"].values
        found["enstrophy_scale"] = flow.label((nu**3 / beta) ** (1 / 6), "scale of enstrophy dissipation", 0, 1)
    return xr.Dataset(found)


# Two points in space


def _separations(flow: _Flow, cells: np.ndarray) -> dict[str, Any]:
    """Coordinates `cells` and `separation(axis, cells)`."""
    r = np.array(flow.grid.spacing)[:, None] * cells
    return {
        **flow.axes(),
        "cells": ("cells", cells, {"long_name": "separation in cells", "units": "1"}),
        "separation": (("axis", "cells"), r, {"long_name": "separation r", "units": flow.labels.length_unit or "1"}),
    }


def _alike(grid: Grid) -> bool:
    """Whether one cell is equally long along every axis, so that means over the axes are means at one separation."""
    return bool(np.allclose(grid.spacing, grid.spacing[0], rtol=1e-9))


@np.errstate(all="ignore")
def structure_functions(
    frames: ArrayLike,
    grid: Grid,
    variables: Sequence[Variable],
    orders: Sequence[int] = (1, 2, 3, 4),
    labels: Labels = PLAIN,
    *,
    cells: Sequence[int] | np.ndarray | None = None,
    absolute: bool = False,
) -> xr.Dataset:
    """S_p(r) = ⟨[u_c(x + r e_a) − u_c(x)]ᵖ⟩: `longitudinal` (c = a), `transverse` (mean over c ≠ a): `(…, axis, order, cells)`.

    Exact for periodic fields: separations are whole cells, every component is compared with itself at its own place, and the mean
    is over all cells. Where Δx is the same along every axis, `longitudinal_mean` and `transverse_mean` `(…, order, cells)` are the
    means over the axes (for isotropic flow). NaN beyond half the box along an axis.

    **Arguments:**

    - `orders`: p ≥ 1.
    - `cells`: separations in cells, 0 … N/2 by default; fewer are cheaper.
    - `absolute`: moments of |δu|, which do not cancel for odd p.

    Unit uᵖ. S₂ = 2u′²(1 − f). (Kolmogorov's 4/5 law, S₃ = −⅘ ε r, is for the signed longitudinal one: Frisch 1995, §6.2.)

    >>> grid = Grid((8,), (2 * np.pi,))
    >>> u = np.cos(grid.mesh()[0])
    >>> found = structure_functions(u[None], grid, (Variable("u", "m/s", grid.centre),), (2,))
    >>> found["longitudinal_mean"].sel(order=2).values.round(6)  # 1 − cos r
    array([0.      , 0.292893, 1.      , 1.707107, 2.      ])
    """
    flow = _Flow(frames, grid, variables, labels)
    orders = [int(p) for p in orders]
    if not orders or min(orders) < 1:
        raise ValueError(f"orders of structure functions are at least 1, found {orders}")
    r = np.arange(max(grid.shape) // 2 + 1) if cells is None else np.asarray(cells, dtype=int)

    def moments(difference: np.ndarray) -> list[np.ndarray]:
        base = np.abs(difference) if absolute else difference
        power, found = base, []
        for p in range(1, max(orders) + 1):
            if p > 1:
                power = power * base
            if p in orders:
                found.append(np.asarray(power.mean(axis=_space(grid))))
        return [found[sorted(set(orders)).index(p)] for p in orders]

    shape = (*flow.u.shape[: -grid.ndim - 1], grid.ndim, len(orders), r.size)
    along, across = np.full(shape, np.nan), np.full(shape, np.nan)
    for a, n in enumerate(grid.shape):
        for i, shift in enumerate(r):
            if 2 * abs(shift) > n:
                continue
            sums = np.zeros((*shape[:-3], len(orders)))
            for c in range(grid.ndim):
                q = flow.u[(..., c, *(slice(None),) * grid.ndim)]
                found = np.stack(moments(np.roll(q, -shift, axis=a - grid.ndim) - q), axis=-1)
                if c == a:
                    along[..., a, :, i] = found
                else:
                    sums += found
            across[..., a, :, i] = sums / max(grid.ndim - 1, 1)
    coords = {**_separations(flow, r), "order": ("order", orders, {"long_name": "order p", "units": "1"})}
    units = {"units": "1" if flow.unit == "1" else f"({flow.unit})^p"}
    size = "|δu|" if absolute else "δu"
    data = {"longitudinal": along} if grid.ndim == 1 else {"longitudinal": along, "transverse": across}
    dims = ("axis", "order", "cells")
    out = {name: flow.label(v, f"{name} structure function ⟨{size}ᵖ⟩", 0, 0, dims, coords, **units) for name, v in data.items()}
    if _alike(grid):
        rest = {key: value for key, value in coords.items() if key not in ("axis", "separation")}
        for name, v in data.items():
            text = f"{name} structure function ⟨{size}ᵖ⟩, mean over the axes"
            out[f"{name}_mean"] = flow.label(v.mean(axis=-3), text, 0, 0, dims[1:], rest, **units)
    return xr.Dataset(out)


@np.errstate(all="ignore")
def space_correlation(
    frames: ArrayLike, grid: Grid, variables: Sequence[Variable], labels: Labels = PLAIN, *, normalised: bool = True
) -> xr.Dataset:
    """f(r) = ⟨u_c(x) u_c(x + r e_a)⟩ / ⟨u_c²⟩: `longitudinal` (c = a) and `transverse` (all c ≠ a together), `(…, axis, cells)`.

    Of the fluctuation about the mean over the box, frame by frame; exact for periodic fields, for separations of 0 … N/2 cells (NaN
    beyond half the box along an axis). Where Δx is the same along every axis, `longitudinal_mean` and `transverse_mean` are
    quotients of sums over the axes. `normalised`: False gives the covariances. A component that is uniform has no correlation
    (NaN). (Pope 2000, §6.3.)
    """
    flow = _Flow(frames, grid, variables, labels)
    most = max(grid.shape) // 2 + 1
    shape = (*flow.u.shape[: -grid.ndim - 1], grid.ndim, most)
    covariance = {"longitudinal": np.full(shape, np.nan), "transverse": np.full(shape, np.nan)}
    fluctuation = flow.u - flow.u.mean(axis=_space(grid), keepdims=True)
    for a, n in enumerate(grid.shape):
        hat = np.fft.rfft(np.moveaxis(fluctuation, a - grid.ndim, -1), axis=-1)
        full = np.fft.irfft(_square(hat), n=n, axis=-1) / n
        parts = full.mean(axis=tuple(range(-grid.ndim, -1)))[..., : n // 2 + 1]
        covariance["longitudinal"][..., a, : n // 2 + 1] = parts[..., a, :]
        if grid.ndim > 1:
            covariance["transverse"][..., a, : n // 2 + 1] = np.delete(parts, a, axis=-2).mean(axis=-2)
    if grid.ndim == 1:
        del covariance["transverse"]
    p = 0 if normalised else 2
    coords = _separations(flow, np.arange(most))
    text = "correlation" if normalised else "covariance"

    def scaled(v: np.ndarray) -> np.ndarray:
        if not normalised:
            return v
        # A transform leaves rounding of a uniform component, which is no fluctuation.
        noise = 1e-26 * (flow.u**2).mean(axis=tuple(range(-grid.ndim - 1, 0)))
        variance = v[..., :1]
        return np.where(variance > noise.reshape(*noise.shape, *(1,) * (v.ndim - noise.ndim)), v / variance, np.nan)

    out = {name: flow.label(scaled(v), f"{name} {text}", p, 0, ("axis", "cells"), coords) for name, v in covariance.items()}
    if _alike(grid):
        rest = {"cells": coords["cells"]}
        for name, v in covariance.items():
            mean = scaled(v.mean(axis=-2))
            out[f"{name}_mean"] = flow.label(mean, f"{name} {text}, mean over the axes", p, 0, ("cells",), rest)
    return xr.Dataset(out)


def _integral(rho: np.ndarray, step: float, window: Window) -> float:
    """∫ρ dx by the trapezoidal rule, to the first zero (linear between the points) or to the end; ρ `(lags,)`, NaN at its end."""
    if not np.isfinite(rho[0]):
        return float("nan")
    known = np.isfinite(rho)
    rho = rho[: rho.size if known.all() else int(np.argmin(known))]
    below = np.flatnonzero(rho <= 0)
    if window == "full" or below.size == 0:
        return float(step * (rho.sum() - 0.5 * (rho[0] + rho[-1]))) if rho.size > 1 else 0.0
    i = int(below[0])
    if i == 0:
        return 0.0
    last = 0.5 * rho[i - 1] ** 2 / (rho[i - 1] - rho[i])
    return float(step * (rho[:i].sum() - 0.5 * (rho[0] + rho[i - 1]) + last))


@np.errstate(all="ignore")
def integral_length(
    frames: ArrayLike, grid: Grid, variables: Sequence[Variable], labels: Labels = PLAIN, *, window: Window = "first_zero"
) -> xr.Dataset:
    """L = ∫ f(r) dr: `longitudinal`, `transverse` `(…, axis)` from the correlation, `spectral` `(…)` from the spectrum.

    The correlations of `space_correlation` are integrated by the trapezoidal rule to their first zero, linear between the points
    (default; over half the box if there is none), or over half the box (`full`). `spectral` is that of `turbulence_scales`, ∫ f dr
    to infinity for isotropic flow; in 1D there is none. Two definitions of one scale, equal only for isotropic flow in a large box.
    (Pope 2000, §6.3 and §6.5.)
    """
    flow = _Flow(frames, grid, variables, labels)
    rho = space_correlation(frames, grid, variables, labels)
    out = {}
    for name in ("longitudinal", "transverse")[: min(grid.ndim, 2)]:
        parts = []
        for a, step in enumerate(grid.spacing):
            rows = rho[name].values[..., a, :]
            parts.append(
                np.array([_integral(row, step, window) for row in rows.reshape(-1, rows.shape[-1])]).reshape(rows.shape[:-1])
            )
        text = f"{name} integral length, {'to the first zero' if window == 'first_zero' else 'over half the box'}"
        out[name] = flow.label(np.stack(parts, axis=-1), text, 0, 1, ("axis",), flow.axes())
    if grid.ndim > 1:
        out["spectral"] = flow.label(_rms_and_length(flow)[1], "integral length L of the spectrum", 0, 1)
    return xr.Dataset(out)


# Two points in time


def _lag_step(times: np.ndarray) -> float:
    """Δt of equally spaced times."""
    if times.size < 2:
        raise ValueError("a correlation in time needs at least two frames")
    steps = np.diff(times)
    step = float(times[-1] - times[0]) / (times.size - 1)
    if not step > 0 or np.abs(steps - step).max() > 1e-6 * step:
        raise ValueError("a correlation in time needs increasing, equally spaced times")
    return step


def _autocovariance(x: np.ndarray, lags: int) -> np.ndarray:
    """C(m) = (N − m)⁻¹ Σ_t x(t) x(t + m), m = 0 … lags: `(…, time)` -> `(…, lags + 1)`."""
    n = x.shape[-1]
    hat = np.fft.rfft(x, n=2 * n, axis=-1)
    return np.fft.irfft(_square(hat), n=2 * n, axis=-1)[..., : lags + 1] / (n - np.arange(lags + 1))


def _lag_count(frames: int, step: float, longest: float | int | None) -> int:
    if longest is None:
        return frames // 2
    count = int(np.floor(longest / step * (1 + 1e-9)))
    if not 0 <= count < frames:
        raise ValueError(f"a lag of {longest} does not fit into {frames} frames {step:g} apart")
    return count


def _lags(count: int, step: float, unit: str) -> dict[str, Any]:
    return {"lag": ("lag", step * np.arange(count + 1), {"long_name": "time lag τ", "units": unit})}


@np.errstate(all="ignore")
def autocorrelation(
    values: Numbers | xr.DataArray,
    labels: Labels = PLAIN,
    *,
    mean: ArrayLike | None = None,
    longest: float | int | None = None,
) -> xr.DataArray:
    """ρ(τ) = C(τ)/C(0), C(m) = (N − m)⁻¹ Σ_t x′(t) x′(t + m): of time series, dims `(…, lag)`.

    x′ = x − `mean`, the mean over the window by default; a window of few integral times then makes ρ too small. `values`: labelled
    with the dimension `time` (which gives the times), or an array `(…, time)`. `longest`: longest lag, half the window by default.
    """
    if isinstance(values, xr.DataArray):
        x, times = values.transpose(..., "time"), _float64(values["time"].values)
        dims, unit = tuple(str(d) for d in x.dims[:-1]), values["time"].attrs.get("units", "1")
        coords: dict[str, Any] = {str(k): v for k, v in x.coords.items() if "time" not in v.dims}
        series, name = _float64(x.values), values.attrs.get("long_name", values.name or "values")
    else:
        series = _numbers(values)
        dims, every = _leading(series.shape, labels)
        dims, times, unit, name = dims[:-1], every["time"][1], labels.time_unit or "1", "values"
        coords = {k: v for k, v in every.items() if k != "time"}
    step = _lag_step(times)
    count = _lag_count(times.size, step, longest)
    series = _whole_frames(series, 1)
    about = series.mean(axis=-1, keepdims=True) if mean is None else _float64(mean)
    covariance = _autocovariance(series - about, count)
    rho = covariance / covariance[..., :1]
    attrs = {"long_name": f"autocorrelation of {name}", "units": "1"}
    return xr.DataArray(rho, {**coords, **_lags(count, step, unit)}, (*dims, "lag"), attrs=attrs)


@np.errstate(all="ignore")
def time_correlation(
    frames: ArrayLike,
    grid: Grid,
    variables: Sequence[Variable],
    labels: Labels = PLAIN,
    *,
    mean: ArrayLike | None = None,
    longest: float | int | None = None,
) -> xr.DataArray:
    """ρ(τ) = ⟨u′(x, t) · u′(x, t + τ)⟩ / ⟨|u′|²⟩ at fixed points, over the whole box: dims `([sample], lag)`.

    u′ = u − `mean`, with the mean of each component over window and box by default; give the mean profile `(d, *grid)` or
    `(d, 1, …)` where the flow has one. `longest`: longest lag, half the window by default. The times of `labels` must be equally
    spaced. A sample with a frame that is not finite gives NaN.
    """
    flow = _Flow(frames, grid, variables, labels)
    if not flow.dims:
        raise ValueError("a correlation in time needs frames (time, c, *grid) or (sample, time, c, *grid)")
    times = flow.coords["time"][1]
    step = _lag_step(times)
    count = _lag_count(times.size, step, longest)

    def covariance(u: np.ndarray) -> np.ndarray:
        total = np.zeros(count + 1)
        for c in range(grid.ndim):
            q = u[:, c].reshape(times.size, -1)
            about = q.mean() if mean is None else np.broadcast_to(_float64(mean)[c], grid.shape).reshape(1, -1)
            # transforms are twice as long and complex: a slice of the points at a time
            parts = np.array_split(q - about, max(1, q.size // 2**22), axis=1)
            total += np.sum([_autocovariance(part.T, count).sum(axis=0) for part in parts], axis=0) / grid.cells
        return total

    found = _per_frame(covariance, _whole_frames(flow.u, grid.ndim + 2), grid.ndim + 2)
    coords = {k: v for k, v in flow.coords.items() if k != "time"}
    coords |= _lags(count, step, flow.coords["time"][2]["units"])
    attrs = {"long_name": "correlation of the velocity in time", "units": "1"}
    return xr.DataArray(found / found[..., :1], coords, (*flow.dims[:-1], "lag"), attrs=attrs)


def integral_time(correlation: xr.DataArray, *, window: Window = "first_zero") -> xr.DataArray:
    """T = ∫ ρ(τ) dτ: of an `autocorrelation` or a `time_correlation`, without its dimension `lag`.

    By the trapezoidal rule, to the first zero, linear between the points (default; all lags if there is none), or over all lags
    (`full`). Then 2T/Δt is the number of frames that count as one in the error of a mean.

    >>> rho = xr.DataArray(0.5 ** np.arange(60), {"lag": 0.1 * np.arange(60)}, ("lag",))
    >>> float(integral_time(rho).round(12))  # Δt (½ + Σ ρ) = 0.1 · 1.5
    0.15
    """
    rho = correlation.transpose(..., "lag")
    lags = _float64(rho["lag"].values)
    rows = _float64(rho.values).reshape(-1, lags.size)
    found = np.array([_integral(row, _lag_step(lags), window) for row in rows]).reshape(rho.shape[:-1])
    text = f"integral time, {'to the first zero' if window == 'first_zero' else 'over all lags'}"
    coords = {k: v for k, v in rho.coords.items() if "lag" not in v.dims}
    attrs = {"long_name": text, "units": rho["lag"].attrs.get("units", "1")}
    return xr.DataArray(found, coords, rho.dims[:-1], attrs=attrs)


# Distributions


def _rows(values: Numbers | xr.DataArray, keep: int) -> tuple[np.ndarray, tuple[str, ...], dict[str, Any], str, str]:
    """`(kept, pooled)`, names and coordinates of the kept axes, unit and name."""
    data = _numbers(values.values if isinstance(values, xr.DataArray) else values)
    if not 0 <= keep <= data.ndim:
        raise ValueError(f"cannot keep {keep} of {data.ndim} axes")
    if isinstance(values, xr.DataArray):
        dims = tuple(str(name) for name in values.dims[:keep])
        coords = {str(k): v for k, v in values.coords.items() if set(v.dims) <= set(dims) and v.dims}
        unit, name = values.attrs.get("units", "1"), str(values.attrs.get("long_name", values.name or "value"))
    else:
        dims, coords = _leading(data.shape[:keep], PLAIN)
        unit, name = "1", "value"
    return data.reshape(math.prod(data.shape[:keep]), -1), dims, coords, unit, name


@np.errstate(all="ignore")
def pdf(
    values: Numbers | xr.DataArray,
    bins: int | Sequence[float] | np.ndarray = 100,
    limits: tuple[float, float] | None = None,
    *,
    keep: int = 0,
) -> xr.DataArray:
    """f(q): share of the values per bin over the width of the bin, Σ f Δq = 1: dims `(…, value)`.

    Of any array or labelled field (see `field`). All values are pooled, except along the first `keep` axes. Values outside the
    bins count in the total: the integral is then 1 − `outside`, a coordinate. A set with a value that is not finite gives NaN.

    **Arguments:**

    - `bins`: number of bins of equal width, or their edges.
    - `limits`: first and last edge; those of all finite values if None.

    >>> float(pdf([0.1, 0.4, 0.6, 0.7], 2, (0.0, 1.0)).sum()) * 0.5
    1.0
    """
    rows, dims, coords, unit, name = _rows(values, keep)
    finite = np.asarray(np.isfinite(rows).all(axis=-1))
    known = rows[finite].reshape(-1)
    number = bins if isinstance(bins, int) else np.asarray(bins, dtype=float)
    edges = np.histogram_bin_edges(known if known.size else np.array([0.0, 1.0]), number, limits)
    widths = np.diff(edges)
    counts = np.stack([np.histogram(np.where(ok, row, edges[0]), edges)[0] for row, ok in zip(rows, finite, strict=True)])
    share = np.where(finite[:, None], counts / rows.shape[-1], np.nan)
    shape = tuple(np.shape(values)[:keep])
    attrs = {"units": unit, "long_name": name}
    axis = {
        "value": ("value", 0.5 * (edges[:-1] + edges[1:]), attrs),
        "lower": ("value", edges[:-1], {"units": unit, "long_name": "lower edge of the bin"}),
        "upper": ("value", edges[1:], {"units": unit, "long_name": "upper edge of the bin"}),
        "outside": (dims, (1 - share.sum(axis=-1)).reshape(shape), {"units": "1", "long_name": "share of values outside all bins"}),
    }
    density = (share / widths).reshape(*shape, widths.size)
    attrs = {"units": _units(unit, -1, "1", 0), "long_name": f"probability density of {name}", "samples": int(rows.shape[-1])}
    return xr.DataArray(density, {**coords, **axis}, (*dims, "value"), attrs=attrs)


@np.errstate(all="ignore")
def wasserstein(
    values: Numbers | xr.DataArray, reference: Numbers | xr.DataArray, *, keep: int = 0, normalised: bool = False
) -> xr.DataArray:
    """W₁ = ∫ |F(q) − F_ref(q)| dq = ∫₀¹ |F⁻¹(s) − F_ref⁻¹(s)| ds: the mean distance that values must move to match, dims `(…)`.

    Exact for the two empirical distributions, of any two sizes (for equal sizes: mean |difference| of the sorted values). All
    values are pooled, except along the first `keep` axes of `values`; the reference is pooled whole. `normalised`: in standard
    deviations of the reference. NaN where a value is not finite. (Villani 2003, Topics in Optimal Transportation, §2.2.)

    >>> float(wasserstein([0.0, 1.0, 3.0], [5.0, 6.0, 8.0]))
    5.0
    """
    rows, dims, coords, unit, name = _rows(values, keep)
    target = np.sort(_rows(reference, 0)[0].reshape(-1))

    def distance(row: np.ndarray) -> float:
        if not np.isfinite(row).all() or not np.isfinite(target).all():
            return float("nan")
        row = np.sort(row)
        q = np.sort(np.concatenate([row, target]))
        gap = np.searchsorted(row, q[:-1], "right") / row.size - np.searchsorted(target, q[:-1], "right") / target.size
        return float((np.abs(gap) * np.diff(q)).sum())

    found = np.array([distance(row) for row in rows]).reshape(np.shape(values)[:keep])
    scale = target.std() if normalised else 1.0
    attrs = {"units": "1" if normalised else unit, "long_name": f"Wasserstein distance of {name}"}
    return xr.DataArray(found / scale, coords, dims, attrs=attrs)


@np.errstate(all="ignore")
def wasserstein_of_pdfs(density: xr.DataArray, reference: xr.DataArray, *, normalised: bool = False) -> xr.DataArray:
    """W₁ = ∫ |F(q) − F_ref(q)| dq of two results of `pdf`, values spread evenly over each bin: dims `(…)` of the first.

    Exact for the piecewise linear F, on any two sets of bins; each density is first scaled to the integral 1. `normalised`: in
    standard deviations of the (binned) reference. At most one bin from the distance of the samples.
    """

    def cumulative(one: xr.DataArray) -> tuple[np.ndarray, np.ndarray]:
        one = one.transpose(..., "value")
        edges = np.append(one["lower"].values, one["upper"].values[-1])
        mass = np.cumsum(_float64(one.values) * np.diff(edges), axis=-1)
        return edges, np.concatenate([0 * mass[..., :1], mass], axis=-1) / mass[..., -1:]

    first = density.transpose(..., "value")
    edges, rows = cumulative(first)
    edges_ref, row_ref = cumulative(reference)
    if row_ref.ndim != 1:
        raise ValueError(f"the reference must be one density, found the dimensions {reference.dims}")
    q = np.union1d(edges, edges_ref)
    target = np.interp(q, edges_ref, row_ref)

    def distance(row: np.ndarray) -> float:
        gap = np.interp(q, edges, row) - target
        left, right = gap[:-1], gap[1:]
        same = left * right >= 0
        # |linear| between a sign change is two triangles
        crossing = 0.5 * (left**2 + right**2) / np.where(same, 1.0, np.abs(left - right))
        return float((np.where(same, 0.5 * np.abs(left + right), crossing) * np.diff(q)).sum())

    found = np.array([distance(row) for row in rows.reshape(-1, rows.shape[-1])]).reshape(rows.shape[:-1])
    scale = 1.0
    if normalised:
        share, centre, width = np.diff(row_ref), 0.5 * (edges_ref[:-1] + edges_ref[1:]), np.diff(edges_ref)
        mean = (share * centre).sum()
        scale = np.sqrt((share * ((centre - mean) ** 2 + width**2 / 12)).sum())
    coords = {k: v for k, v in first.coords.items() if "value" not in v.dims and k != "outside"}
    unit = first["value"].attrs.get("units", "1")
    attrs = {
        "units": "1" if normalised else unit,
        "long_name": f"Wasserstein distance of {first['value'].attrs.get('long_name', 'value')}",
    }
    return xr.DataArray(found / scale, coords, first.dims[:-1], attrs=attrs)


# Filters and subgrid stress


def _widths(width: Width, grid: Grid) -> tuple[float, ...]:
    given = np.asarray(width, dtype=float)
    if given.ndim > 1 or (given.ndim == 1 and given.size != grid.ndim):
        raise ValueError(f"a filter width is one number or one per axis, found {width}")
    if not (np.isfinite(given).all() and (given > 0).all()):
        raise ValueError(f"a filter width must be positive and finite, found {width}")
    return tuple(float(w) for w in np.broadcast_to(given, (grid.ndim,)))


def _factors(width: Sequence[float], grid: Grid) -> tuple[int, ...]:
    """Widths in whole cells."""
    found = [w / h for w, h in zip(width, grid.spacing, strict=True)]
    if any(abs(f - round(f)) > 1e-9 * f or round(f) < 1 for f in found):
        raise ValueError(f"the filter 'cells' averages over whole cells; its width is {', '.join(f'{f:g}' for f in found)} of them")
    return tuple(round(f) for f in found)


def transfer_function(kind: Filter, width: Width, grid: Grid) -> np.ndarray:
    """G(k) = Π_a G_a(k_a Δ_a): what a filter of width Δ multiplies each mode with, real, in the layout of `rfftn`.

    - `sharp`: 1 for |k_a| < π/Δ_a on every axis, else 0 (modes at the cut are dropped, as where a grid of spacing Δ cannot carry
      them).
    - `box`: sin(½kΔ) / (½kΔ), the mean over a box of side Δ.
    - `gaussian`: exp(−k²Δ²/24), with the second moment of the box.
    - `cells`: sin(½fkΔx) / (f sin(½kΔx)), the mean over f = Δ/Δx whole cells, for values that are cell means already.

    (Pope 2000, Turbulent Flows, doi:10.1017/CBO9780511840531, table 13.2, except `cells`.)

    >>> transfer_function("box", np.pi, Grid((4,), (2 * np.pi,))).round(6)
    array([1.     , 0.63662, 0.     ])
    """
    out = np.ones((1,) * grid.ndim)
    widths = _widths(width, grid)
    factors = _factors(widths, grid) if kind == "cells" else (1,) * grid.ndim
    for k, delta, f, h in zip(grid.wavenumbers(), widths, factors, grid.spacing, strict=True):
        if kind == "sharp":
            part = np.where(np.abs(k) * delta < np.pi * (1 - 1e-9), 1.0, 0.0)
        elif kind == "box":
            part = np.sinc(k * delta / (2 * np.pi))
        elif kind == "gaussian":
            part = np.exp(-((k * delta) ** 2) / 24)
        elif kind == "cells":
            below = f * np.sin(k * h / 2)
            part = np.where(below == 0, 1.0, np.sin(f * k * h / 2) / np.where(below == 0, 1.0, below))
        else:
            raise ValueError(f"no filter {kind!r}; possible: sharp, box, gaussian, cells")
        out = out * part
    return out


def _at(grid: Grid, place: Place) -> tuple[float, ...]:
    """Where the first value of a grid at this place lies."""
    return tuple(a * h for a, h in zip(place, grid.spacing, strict=True))


def _sampled(hat: np.ndarray, source: Grid, origin: Sequence[float], target: Grid, place: Place) -> np.ndarray:
    """Σ_k û_k exp(i k · (x − origin)) at a place of the target's cells: `(…, *rfft of source)` -> `(…, *target)`.

    The full series is summed, so nothing is lost on a target that is too coarse for it: modes then coincide, as they do in samples.
    """
    wide = [m * -(-n // m) for n, m in zip(source.shape, target.shape, strict=True)]
    shift = [b - a for a, b in zip(origin, _at(target, place), strict=True)]
    if tuple(wide) != source.shape or any(abs(s) > 1e-12 * h for s, h in zip(shift, source.spacing, strict=True)):
        phase = sum(k * s for k, s in zip(source.wavenumbers(), shift, strict=True))
        hat = hat * np.exp(1j * phase) * _below_nyquist(source)
    values = np.fft.irfftn(_embedded(hat, source.shape, wide), s=wide, axes=_space(source), norm="forward")
    return values[(..., *(slice(None, None, w // m) for w, m in zip(wide, target.shape, strict=True)))]


def _block_means(q: np.ndarray, factors: Sequence[int], place: Place) -> np.ndarray:
    """Means over blocks of cells; along an axis where the place is the right face, the last face of each block."""
    for a, (f, at) in enumerate(zip(factors, place, strict=True)):
        axis = q.ndim - len(factors) + a
        blocks = q.reshape(*q.shape[:axis], q.shape[axis] // f, f, *q.shape[axis + 1 :])
        q = np.take(blocks, -1, axis=axis + 1) if at == 1.0 else blocks.mean(axis=axis + 1)
    return q


def _filter_plan(grid: Grid, kind: Filter, width: Width | None, onto: Grid | None) -> tuple[tuple[float, ...], Grid]:
    """Widths per axis and the grid of the result, checked."""
    if width is None and onto is None:
        raise ValueError("a filter needs a width, or a coarse grid whose spacing is the width")
    _periodic_box(grid)
    target = grid if onto is None else onto
    if target.ndim != grid.ndim or not np.allclose(target.lengths, grid.lengths, rtol=1e-12):
        raise ValueError(f"the coarse grid's box {target.lengths} is not that of the frames, {grid.lengths}")
    widths = target.spacing if width is None else _widths(width, grid)
    if kind == "cells":
        factors = _factors(widths, grid)
        if onto is None and any(f % 2 == 0 for f in factors):
            raise ValueError(
                f"means over {factors} cells are not centred in a cell: use odd numbers, or give the coarse grid `onto`"
            )
        if onto is not None and not np.allclose(widths, onto.spacing, rtol=1e-9):
            raise ValueError(f"the filter 'cells' gives the means over the coarse cells; its width must be {onto.spacing}")
    return widths, target


@np.errstate(all="ignore")
def filtered(
    frames: ArrayLike,
    grid: Grid,
    variables: Sequence[Variable],
    kind: Filter,
    width: Width | None = None,
    *,
    onto: Grid | None = None,
) -> np.ndarray:
    """ū(k) = G(k) û(k): frames `(…, c, *grid)` of all channels under a filter, as frames again.

    On the same grid, or sampled at the same places of the cells of a coarser grid `onto` of the same box, whose spacing is the
    default `width`. Exact: the whole filtered series is sampled. With `cells` on a coarse grid, centred values become the means
    over their coarse cell and values on faces the means over their coarse face, which keeps the discrete ∇·u = 0 (for other filters
    it is the spectral divergence that stays zero).
    """
    u = _float64(frames)
    _check(u, grid, len(variables))
    widths, target = _filter_plan(grid, kind, width, onto)
    u = _whole_frames(u, grid.ndim + 1)
    if kind == "cells" and onto is not None:
        factors = _factors(widths, grid)
        parts = [_block_means(u[(..., c, *(slice(None),) * grid.ndim)], factors, v.at) for c, v in enumerate(variables)]
        return np.stack(parts, axis=-grid.ndim - 1)
    transfer = transfer_function(kind, widths, grid)

    def one(frame: np.ndarray) -> np.ndarray:
        hat = np.fft.rfftn(frame, axes=_space(grid), norm="forward") * transfer
        return np.stack([_sampled(q, grid, _at(grid, v.at), target, v.at) for q, v in zip(hat, variables, strict=True)])

    return _per_frame(one, u, grid.ndim + 1)


def _subgrid(
    u: np.ndarray, flow: _Flow, kind: Filter, widths: tuple[float, ...], target: Grid, oversampling: int
) -> tuple[np.ndarray, np.ndarray]:
    """τ_ac and the filtered strain rate S̄_ac of one frame at the cell centres of the target, `(d, d, *target)` each."""
    grid, d = flow.grid, flow.grid.ndim
    axes = _space(grid)
    k = grid.wavenumbers()
    origin = _at(grid, grid.centre)
    means = kind == "cells"
    wide = grid if means else grid.with_shape([oversampling * n for n in grid.shape])
    transfer = {cells.shape: transfer_function(kind, widths, cells) for cells in (grid, wide)}

    def smooth(hat: np.ndarray, cells: Grid) -> np.ndarray:
        if means and target.shape != grid.shape:
            values = np.fft.irfftn(hat, s=grid.shape, axes=axes, norm="forward")
            return _block_means(values, _factors(widths, grid), grid.centre)
        return _sampled(transfer[cells.shape] * hat, cells, origin, target, target.centre)

    hat = flow.spectrum(u)
    strain = np.empty((d, d, *target.shape))
    for a, c in combinations_with_replacement(range(d), 2):
        strain[a, c] = strain[c, a] = smooth(0.5j * (k[a] * hat[c] + k[c] * hat[a]), grid)
    if wide.shape == grid.shape and all(at == grid.centre for at in flow.places):
        # nothing is shifted: the Nyquist modes can stay
        hat = np.fft.rfftn(u, axes=axes, norm="forward")
    mean = smooth(hat, grid)
    fine = np.fft.irfftn(_embedded(hat, grid.shape, wide.shape), s=wide.shape, axes=axes, norm="forward")
    tau = np.empty_like(strain)
    for a, c in combinations_with_replacement(range(d), 2):
        product = smooth(np.fft.rfftn(fine[a] * fine[c], axes=axes, norm="forward"), wide)
        tau[a, c] = tau[c, a] = product - mean[a] * mean[c]
    return tau, strain


def _without_trace(tau: np.ndarray) -> np.ndarray:
    """τ − (1/d) tr(τ) I: `(d, d, *grid)`."""
    d = len(tau)
    trace = sum(tau[a, a] for a in range(d)) / d
    return tau - np.eye(d).reshape(d, d, *(1,) * (tau.ndim - 2)) * trace


@np.errstate(all="ignore")
def subgrid_stress(
    frames: ArrayLike,
    grid: Grid,
    variables: Sequence[Variable],
    kind: Filter,
    width: Width | None = None,
    labels: Labels = PLAIN,
    *,
    onto: Grid | None = None,
    deviatoric: bool = False,
    oversampling: int = 2,
) -> xr.DataArray:
    """τ_ac = filter(u_a u_c) − ū_a ū_c at the cell centres: what a coarse solver lacks, dims `(…, axis, component, *space)`.

    ∂t ū_c = … − Σ_a ∂_a τ_ac. (Germano 1992, doi:10.1017/S0022112092001733; Pope 2000, §13.3.) In 1D, where the flux is ½u², a
    filtered Kuramoto–Sivashinsky equation lacks ½τ. Unchanged by a mean flow.

    **Arguments:**

    - `kind`, `width`: see `transfer_function`.
    - `onto`: sample on the cell centres of a coarser grid of the same box (its spacing is the default width).
    - `deviatoric`: without the trace, τ − (1/d) tr(τ) I, since the pressure takes the rest.
    - `oversampling`: cells per cell and axis on which the products are formed. 2 is exact for the band-limited field; 1 is cheaper
      and lets products fold back from beyond the Nyquist wavenumber. Not used by `cells`, whose values are means of whole cells.

    Unit u².

    >>> grid = Grid((32,), (2 * np.pi,))
    >>> u = np.cos(5 * grid.mesh()[0])
    >>> tau = subgrid_stress(u[None], grid, (Variable("u", "1", grid.centre),), "sharp", np.pi / 4)
    >>> bool(np.allclose(tau, 0.5))  # all of u is removed, and of u² all but the mean
    True
    """
    flow = _Flow(frames, grid, variables, labels)
    widths, target = _filter_plan(grid, kind, width, onto)

    def stress(u: np.ndarray) -> np.ndarray:
        tau, _ = _subgrid(u, flow, kind, widths, target, oversampling)
        return _without_trace(tau) if deviatoric else tau

    coords = {**flow.axes(), **flow.components(), **flow.space(target)}
    attrs = {"filter": kind, "width": list(widths)}
    name = "deviatoric subgrid stress" if deviatoric else "subgrid stress τ_ac"
    return flow.label(flow.each(stress), name, 2, 0, ("axis", "component", *AXES[: grid.ndim]), coords, **attrs)


@np.errstate(all="ignore")
def subgrid_dissipation(
    frames: ArrayLike,
    grid: Grid,
    variables: Sequence[Variable],
    kind: Filter,
    width: Width | None = None,
    labels: Labels = PLAIN,
    *,
    onto: Grid | None = None,
    deviatoric: bool = False,
    oversampling: int = 2,
) -> xr.Dataset:
    """ε_τ = −τ_ac S̄_ac at the cell centres: the energy that the filtered motion gives to what the filter removed.

    `dissipation` `(…, *space)`, and of each frame `mean`, `backscatter_points` (share of the points where it is negative) and
    `backscatter_share`, ⟨max(−ε_τ, 0)⟩/⟨|ε_τ|⟩: what comes back as a share of all that is exchanged, 0 to 1. Arguments as in
    `subgrid_stress`; for solenoidal flow `deviatoric` changes nothing. Unit u³ / length. (Piomelli et al. 1991,
    doi:10.1063/1.857956; Pope 2000, §13.3.)
    """
    flow = _Flow(frames, grid, variables, labels)
    widths, target = _filter_plan(grid, kind, width, onto)

    def rate(u: np.ndarray) -> np.ndarray:
        tau, strain = _subgrid(u, flow, kind, widths, target, oversampling)
        return -((_without_trace(tau) if deviatoric else tau) * strain).sum(axis=(0, 1))

    found = flow.each(rate)
    space = _space(grid)
    finite = np.isfinite(found).all(axis=space)
    back, total = np.maximum(-found, 0).mean(axis=space), np.abs(found).mean(axis=space)
    points = np.where(finite, (found < 0).mean(axis=space), np.nan)
    share = np.where(total == 0, 0.0, back / total)
    attrs = {"filter": kind, "width": list(widths)}
    return xr.Dataset(
        {
            "dissipation": flow.label(found, "subgrid dissipation −τ:S̄", 3, -1, AXES[: grid.ndim], flow.space(target), **attrs),
            "mean": flow.label(found.mean(axis=space), "mean subgrid dissipation", 3, -1, **attrs),
            "backscatter_points": flow.label(points, "share of points with backscatter", 0, 0, **attrs),
            "backscatter_share": flow.label(share, "backscatter over all exchange", 0, 0, **attrs),
        }
    )


# Errors of averages


def _series(values: Numbers | xr.DataArray) -> tuple[np.ndarray, tuple[str, ...], dict[str, Any], str, str]:
    """`(sample, time, rest…)`, names and coordinates of the rest, unit and name."""
    if isinstance(values, xr.DataArray):
        if not {"sample", "time"} & set(values.dims):
            raise ValueError(f"an error needs the dimension sample or time, found {values.dims}")
        full = values.expand_dims([name for name in ("sample", "time") if name not in values.dims])
        full = full.transpose("sample", "time", ...)
        rest = tuple(str(name) for name in full.dims[2:])
        coords = {str(k): v for k, v in values.coords.items() if v.dims and set(v.dims) <= set(rest)}
        return (
            _float64(full.values),
            rest,
            coords,
            values.attrs.get("units", "1"),
            str(values.attrs.get("long_name", values.name or "")),
        )
    data = _numbers(values)
    if data.ndim < 2:
        raise ValueError(f"values of shape {data.shape} are not (sample, time, …)")
    return data, tuple(f"dim_{n}" for n in range(data.ndim - 2)), {}, "1", ""


def _block_count(data: np.ndarray) -> int:
    """Blocks per member, each at least BLOCK_LENGTH integral times long; of several quantities the slowest counts."""
    samples, frames = data.shape[:2]
    if frames == 1:
        return 1
    rows = np.moveaxis(data.reshape(samples, frames, -1), 1, -1)
    fluctuation = rows - rows.mean(axis=(0, -1), keepdims=True)
    covariance = _autocovariance(fluctuation, frames // 2).mean(axis=0)
    known = covariance[np.isfinite(covariance).all(axis=-1) & (covariance[:, 0] > 0)]
    slowest = max((_integral(row / row[0], 1.0, "first_zero") for row in known), default=0.5)
    return max(1, int(frames // math.ceil(BLOCK_LENGTH * slowest)))


@np.errstate(all="ignore")
def standard_error(
    values: Numbers | xr.DataArray, *, over: Literal["blocks", "members"] = "blocks", blocks: int | None = None
) -> xr.Dataset:
    """s(b)/√n, b = the n means over members or blocks: `standard_error`, `blocks` = n, `effective_samples` = s(x)²/error².

    **Arguments:**

    - `values`: labelled with `sample`, `time` or both, or an array `(sample, time, …)`. Other dimensions are kept.
    - `over`: `members`, one mean each, at least 2 of them; or `blocks`: every member's series is cut into blocks of equal length
      (the first frames that do not fill one are left out), at least 8 in all.
    - `blocks`: number per member. By default as many as are each 10 integral times long (of the slowest quantity, to the first
      zero of its autocorrelation); a member that is shorter is one block.

    Members must be independent. The error of blocks is too small by about T/b, T the integral time and b the length of a block. NaN
    where a value is not finite. (Batch means: Flyvbjerg & Petersen 1989, doi:10.1063/1.457480.)

    >>> float(standard_error(np.array([[1.0], [3.0]]), over="members")["standard_error"])
    1.0
    """
    data, rest, coords, unit, name = _series(values)
    samples, frames = data.shape[:2]
    if over == "members":
        if samples < 2:
            raise ValueError(f"an error over members needs at least 2 members, found {samples}")
        count = 1
    else:
        count = _block_count(data) if blocks is None else blocks
        if not 1 <= count <= frames:
            raise ValueError(f"cannot cut {frames} frames into {count} blocks")
        if samples * count < FEWEST_BLOCKS:
            raise ValueError(
                f"an error needs at least {FEWEST_BLOCKS} blocks; {samples} × {frames} frames give {samples * count}: "
                "run longer or start more members"
            )
    length = frames // count
    used = data[:, frames - count * length :]
    means = used.reshape(samples * count, length, *data.shape[2:]).mean(axis=1)
    error = means.std(axis=0, ddof=1) / np.sqrt(len(means))
    effective = used.reshape(-1, *data.shape[2:]).var(axis=0) / error**2
    kind = "members" if over == "members" else "blocks"
    attrs = {"block_frames": length}
    return xr.Dataset(
        {
            "standard_error": (rest, error, {"units": unit, "long_name": f"standard error of {name or 'the mean'}", **attrs}),
            "blocks": ((), len(means), {"units": "1", "long_name": f"number of {kind}", **attrs}),
            "effective_samples": (rest, effective, {"units": "1", "long_name": "number of independent values"}),
        },
        coords,
    )


@np.errstate(all="ignore")
def mean_with_error(values: Numbers | xr.DataArray, *, blocks: int | None = None) -> xr.Dataset:
    """x̄ ± s(b)/√n: `mean` over sample and time, with the `standard_error`, `blocks` and `effective_samples` of `standard_error`.

    Over at least 8 members or blocks, refused otherwise. The mean is over the frames that the blocks hold.

    >>> values = xr.DataArray(np.arange(16.0).reshape(16, 1), dims=("sample", "time"))
    >>> found = mean_with_error(values)
    >>> float(found["mean"]), int(found["blocks"])
    (7.5, 16)
    """
    error = standard_error(values, blocks=blocks)
    data, rest, _, unit, name = _series(values)
    length, count = error["blocks"].attrs["block_frames"], int(error["blocks"]) // len(data)
    mean = data[:, data.shape[1] - count * length :].mean(axis=(0, 1))
    return error.assign(mean=(rest, mean, {"units": unit, "long_name": f"mean of {name}" if name else "mean"}))
