"""τ_ac = filter(u_a q_c) − ū_a q̄_c and s = R N(u) − N̄(R u): what a closure should give, from a fine run, before it is run itself.

Three questions of a fine state u and a coarse solver:

- `subgrid_flux` and `subgrid_force`, `subgrid_tendency`: what does the coarse solver lack? Under a filter of
  `hybridsim.statistics`, at the coarse solver's own flux points; or under its own restriction R, discretisation error included.
- `score`: how well does a closure know it, on the filtered state under a `View` of its own? Correlations, errors and the energy
  that goes to and fro, with standard errors over samples.
- `perfect_run`: if it knew it exactly, would the coarse run be the filtered fine run? It is, to rounding, and a solver for which
  it is not takes its sources or places its filter wrongly.

High correlation a priori does not make a stable run (Vreman, Geurts & Kuerten 1997, doi:10.1017/S0022112097005429).
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, Literal, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import xarray as xr
from jax.typing import ArrayLike
from jaxtyping import Array, Float, PyTree

from hybridsim.contract import AbstractClosure, AbstractSolver, AbstractStepper, Flux, Real, Source, Tendency, View
from hybridsim.diagnostics import AXES, _centred_spectrum, _float64, is_gas, velocity_channels
from hybridsim.grid import Grid, Place
from hybridsim.model import Model, frames_of
from hybridsim.statistics import (
    PLAIN,
    Labels,
    Width,
    _at,
    _embedded,
    _filter_plan,
    _leading,
    _per_frame,
    _sampled,
    _units,
    standard_error,
    transfer_function,
)

Kind = Literal["sharp", "box", "gaussian", "restrict"]
"""A filter of `hybridsim.statistics.transfer_function`, or `restrict`: the coarse solver's own."""

Restriction = Callable[[Array], Array]
"""A fine state -> a state of the coarse solver; linear, and of divergence zero where the fine one is."""


def _nothing(_z: PyTree, _t: Real) -> None:
    return None


def _alike(fine: AbstractSolver, coarse: AbstractSolver) -> None:
    names = [tuple(v.name for v in solver.variables) for solver in (fine, coarse)]
    if names[0] != names[1]:
        raise ValueError(f"coarse: the channels {', '.join(names[1])} are not those of the fine solver, {', '.join(names[0])}")
    if fine.grid.ndim != coarse.grid.ndim or not np.allclose(fine.grid.lengths, coarse.grid.lengths, rtol=1e-12):
        raise ValueError(f"coarse: the box {coarse.grid.lengths} is not that of the fine solver, {fine.grid.lengths}")


# --- what a coarse solver lacks --------------------------------------------------------------------------------------------------


class _Filtered:
    """A fine frame as Fourier series: filtered means and filtered products, anywhere in the cells of a coarse grid."""

    def __init__(self, u: np.ndarray, fine: AbstractSolver, target: Grid, kind: Kind, width: Width | None, oversampling: int):
        if kind == "restrict":
            raise ValueError("kind: a stress needs a filter, one of sharp, box, gaussian; under 'restrict' see subgrid_tendency")
        self.grid, self.target = fine.grid, target
        self.widths, _ = _filter_plan(fine.grid, kind, width, target)
        self.kind: Any = kind
        self.wide = fine.grid.with_shape([oversampling * n for n in fine.grid.shape])
        self.hat = _centred_spectrum(u, fine.grid, [v.at for v in fine.variables]) / fine.grid.cells
        self.origin = _at(fine.grid, fine.grid.centre)

    def mean(self, channel: int, place: Place) -> np.ndarray:
        hat = transfer_function(self.kind, self.widths, self.grid) * self.hat[channel]
        return _sampled(hat, self.grid, self.origin, self.target, place)

    def products(self, velocity: Sequence[int], places: Mapping[tuple[int, int], Place]) -> dict[tuple[int, int], np.ndarray]:
        """filter(u_a q_c) for each (a, c), at its place."""
        axes = tuple(range(-self.grid.ndim, 0))
        values = np.fft.irfftn(_embedded(self.hat, self.grid.shape, self.wide.shape), s=self.wide.shape, axes=axes, norm="forward")
        transfer = transfer_function(self.kind, self.widths, self.wide)
        out = {}
        for (a, c), place in places.items():
            hat = transfer * np.fft.rfftn(values[velocity[a]] * values[c], axes=axes, norm="forward")
            out[a, c] = _sampled(hat, self.wide, self.origin, self.target, place)
        return out


def filtered_state(
    frames: ArrayLike, fine: AbstractSolver, coarse: AbstractSolver, kind: Kind = "gaussian", width: Width | None = None
) -> np.ndarray:
    """ū: fine frames `(…, c, *fine)` under a filter, where the coarse solver's channels live and on its constraints.

    **Arguments:** `kind`, `width`: of `hybridsim.statistics.transfer_function`, by default as wide as a coarse cell; or `restrict`,
    the coarse solver's own filter.
    """
    _alike(fine, coarse)
    frames = _float64(frames)
    dtype = jnp.result_type(float)
    put = eqx.filter_jit(lambda q: coarse.prepare(dtype).project(q))
    own = eqx.filter_jit(lambda q: coarse.prepare(dtype).restrict(q, fine.grid, fine.variables))

    def one(u: np.ndarray) -> np.ndarray:
        if kind == "restrict":
            return np.asarray(own(jnp.asarray(u, dtype)), np.float64)
        smooth = _Filtered(u, fine, coarse.grid, kind, width, 1)
        means = np.stack([smooth.mean(c, v.at) for c, v in enumerate(coarse.variables)])
        return np.asarray(put(jnp.asarray(means, dtype)), np.float64)

    return _per_frame(one, frames, fine.grid.ndim + 1)


def subgrid_flux(
    frames: ArrayLike,
    fine: AbstractSolver,
    coarse: AbstractSolver,
    kind: Kind = "gaussian",
    width: Width | None = None,
    *,
    oversampling: int = 2,
) -> np.ndarray:
    """F[a, c] = filter(u_a q_c) − ū_a q̄_c at the flux points of `coarse`: `(…, c, *fine)` -> `(…, axis, c, *grid)`, float64.

    The stress for velocities, the flux for passive scalars, half the stress on a line, where the flux is ½u²: what a `Flux` closure
    models, ∂t q̄_c = … − Σ_a ∂_a F[a, c]. Incompressible flow and Kuramoto–Sivashinsky in periodic boxes.

    **Arguments:**

    - `fine`, `coarse`: the solvers whose grids, channels and places these are.
    - `kind`, `width`: `sharp`, `box` or `gaussian` of `hybridsim.statistics.transfer_function`; a coarse cell wide by default.
    - `oversampling`: points per cell and axis at which products are formed; 2 is exact for a band-limited field.

    Exact, without interpolation: the whole filtered series is evaluated at each flux point; what a finite-volume solver has in its
    cells is taken for values at points. For the stress at the cell centres, with means over cells among the filters, see
    `hybridsim.statistics.subgrid_stress`.
    """
    _alike(fine, coarse)
    if is_gas(fine.variables):
        raise ValueError("fine: a gas has fluxes of mass and energy too, which are not filtered here; see subgrid_tendency")
    velocity = velocity_channels(fine.grid, fine.variables)
    d = fine.grid.ndim
    places = {(a, c): coarse.flux_place(a, c) for a in range(d) for c in range(len(coarse.variables))}

    def one(u: np.ndarray) -> np.ndarray:
        smooth = _Filtered(u, fine, coarse.grid, kind, width, oversampling)
        found = smooth.products(velocity, places)
        for (a, c), place in places.items():
            found[a, c] = found[a, c] - smooth.mean(velocity[a], place) * smooth.mean(c, place)
        flux = np.stack([np.stack([found[a, c] for c in range(len(coarse.variables))]) for a in range(d)])
        return 0.5 * flux if d == 1 else flux

    return _per_frame(one, _float64(frames), d + 1)


def subgrid_force(
    frames: ArrayLike,
    fine: AbstractSolver,
    coarse: AbstractSolver,
    kind: Kind = "gaussian",
    width: Width | None = None,
    *,
    oversampling: int = 2,
) -> np.ndarray:
    """−P ∇·F of `subgrid_flux`: `(…, c, *fine)` -> `(…, c, *grid)`, by the coarse solver's own divergence and projection.

    What a Flux closure that is exact adds to ∂t ū; arguments as in `subgrid_flux`. A mask that the solver puts on what it receives
    (`dealias`) acts here too.
    """
    fluxes = subgrid_flux(frames, fine, coarse, kind, width, oversampling=oversampling)
    states = filtered_state(frames, fine, coarse, kind, width)
    dtype = jnp.result_type(float)

    @eqx.filter_jit
    def force(u: Array, flux: Array) -> Array:
        ready = coarse.prepare(dtype)
        return _given(ready, ready.encode(u), jnp.zeros((), dtype), flux, None)

    d = fine.grid.ndim
    each = states.reshape(-1, *states.shape[-d - 1 :]), fluxes.reshape(-1, *fluxes.shape[-d - 2 :])
    found = [np.asarray(force(jnp.asarray(u, dtype), jnp.asarray(flux, dtype)), np.float64) for u, flux in zip(*each, strict=True)]
    return np.stack(found).reshape(states.shape)


def _rate(solver: AbstractSolver, z: PyTree, t: Real) -> Float[Array, "c *grid"]:
    """L u + N(u), projected, in physical space."""
    rate = solver.explicit(z, t, _nothing)
    linear = solver.linear()
    if linear is not None:
        rate = jax.tree.map(lambda f, a, q: f + jnp.asarray(a, q.real.dtype) * q, rate, linear, z)
    return _change(solver, z, rate)


def _given(solver: AbstractSolver, z: PyTree, t: Real, flux: Array | None, source: Array | None) -> Float[Array, "c *grid"]:
    """What N changes by with a flux and a source, projected, in physical space."""
    received = solver.receive(flux, source)
    more, plain = solver.explicit(z, t, lambda _z, _t: received), solver.explicit(z, t, _nothing)
    return _change(solver, z, {name: jax.tree.map(jnp.subtract, more[name], plain[name]) for name in more})


def _change(solver: AbstractSolver, z: PyTree, rate: Mapping[str, PyTree]) -> Float[Array, "c *grid"]:
    """A rate of some slots of z, projected, in physical space. A difference, as constraints with given velocities are affine."""
    moved = solver.constrain({**z, **{name: jax.tree.map(jnp.add, z[name], part) for name, part in rate.items()}})
    return solver.decode(moved) - solver.decode(z)


def subgrid_tendency(
    u: Float[Array, "c *fine"],
    fine: AbstractSolver,
    coarse: AbstractSolver,
    t: Real | float = 0.0,
    restriction: Restriction | None = None,
) -> Float[Array, "c *grid"]:
    """s = R(L u + N(u)) − (L̄ ū + N̄(ū)),  ū = R u: the source with which the coarse solver moves as the filtered fine one does.

    Both rates are projected. All that the coarse solver lacks is in it: unresolved motion, discretisation error, aliasing. Any
    solver whose steps are made of rates, a gas included.

    **Arguments:** `u`, a fine state; `t`, the time; `restriction`, R, by default the coarse solver's own `restrict`.
    """
    _alike(fine, coarse)
    fine, coarse = fine.prepare(u.dtype), coarse.prepare(u.dtype)
    return _tendency(fine, coarse, fine.encode(u), jnp.asarray(t, u.dtype), _restriction(fine, coarse, restriction))


def _restriction(fine: AbstractSolver, coarse: AbstractSolver, given: Restriction | None) -> Restriction:
    return (lambda u: coarse.restrict(u, fine.grid, fine.variables)) if given is None else given


def _tendency(
    fine: AbstractSolver, coarse: AbstractSolver, z: PyTree, t: Real, restriction: Restriction
) -> Float[Array, "c *grid"]:
    return restriction(_rate(fine, z, t)) - _rate(coarse, coarse.encode(restriction(fine.decode(z))), t)


# --- how well a closure knows it -------------------------------------------------------------------------------------------------


@np.errstate(all="ignore")
def correlation(found: ArrayLike, exact: ArrayLike, axes: int) -> np.ndarray:
    """ρ = ⟨a′ b′⟩ / √(⟨a′²⟩⟨b′²⟩), a′ = a − ⟨a⟩: Pearson's, over the last `axes` axes; NaN where one of them is constant.

    >>> x = np.linspace(0, 1, 5)
    >>> float(correlation(1 - 2 * x, x, 1).round(12))
    -1.0
    """
    space = tuple(range(-axes, 0))
    a, b = (q - q.mean(axis=space, keepdims=True) for q in (_float64(found), _float64(exact)))
    size = np.sqrt((a**2).sum(axis=space) * (b**2).sum(axis=space))
    return np.where(size > 0, (a * b).sum(axis=space) / size, np.nan)


@np.errstate(all="ignore")
def relative_error(found: ArrayLike, exact: ArrayLike, axes: int) -> np.ndarray:
    """|a − b| / |b|, root mean squares over the last `axes` axes; NaN where b vanishes.

    >>> float(relative_error(np.array([1.1, 2.2]), np.array([1.0, 2.0]), 1).round(12))
    0.1
    """
    space = tuple(range(-axes, 0))
    a, b = _float64(found), _float64(exact)
    size = (b**2).sum(axis=space)
    return np.where(size > 0, np.sqrt(((a - b) ** 2).sum(axis=space) / size), np.nan)


class _Answer(NamedTuple):
    """What was given or is exact: F at the flux points, −∇·F or s as the coarse solver takes it, −F_ac ∂_a u_c at the centres."""

    flux: Array
    tendency: Array
    transfer: Array


@eqx.filter_jit
def _answer(coarse: AbstractSolver, u: Array, t: Array, flux: Array | None, source: Array | None) -> _Answer:
    """`coarse` is prepared; without a flux its entries are NaN."""
    grid = coarse.grid
    tendency = _given(coarse, coarse.encode(u), t, flux, source)
    if flux is None:
        return _Answer(jnp.full((grid.ndim, *u.shape), jnp.nan), tendency, jnp.full(grid.shape, jnp.nan))
    if is_gas(coarse.variables):
        return _Answer(flux, tendency, jnp.full(grid.shape, jnp.nan))
    channels, gradient = velocity_channels(grid, coarse.variables), coarse.gradient(u)
    transfer = jnp.zeros((), u.dtype)
    if grid.ndim > 1:
        # the pressure takes the trace, whose entries share a place
        trace = sum(flux[a, c] for a, c in enumerate(channels)) / grid.ndim
        for a, c in enumerate(channels):
            flux = flux.at[a, c].add(-trace)
    for a in range(grid.ndim):
        for c in channels:
            transfer = transfer - coarse.move(flux[a, c] * gradient[a, c], coarse.flux_place(a, c), grid.centre)
    return _Answer(flux, tendency, transfer)


@eqx.filter_jit
def _asked(coarse: AbstractSolver, closures: tuple[AbstractClosure, ...], u: Array, t: Array, dt: Array) -> _Answer:
    """The closures' answers on u, added up."""
    view = View(u, t, dt, coarse)
    total: dict[type, Array] = {}
    for closure in closures:
        memory = closure.init_memory(view)
        out = closure(view, memory, jax.random.key(0) if closure.stochastic else None)
        out = (out if memory is None else out[0]).astype(u.dtype)
        place = Flux if isinstance(closure, Flux) else Source
        total[place] = total[place] + out if place in total else out
    return _answer(coarse, u, t, total.get(Flux), total.get(Source))


def _closures(given: Mapping[str, AbstractClosure | Sequence[AbstractClosure]]) -> dict[str, tuple[AbstractClosure, ...]]:
    out = {name: (one,) if isinstance(one, AbstractClosure) else tuple(one) for name, one in given.items()}
    for name, closures in out.items():
        for closure in closures:
            if not isinstance(closure, Flux | Source):
                raise ValueError(
                    f"closures[{name!r}]: {type(closure).__name__} has no tendency; possible are Flux and Source closures"
                )
    return out


@np.errstate(all="ignore")
def _backscatter(transfer: np.ndarray, axes: int) -> np.ndarray:
    """⟨max(−Π, 0)⟩/⟨|Π|⟩."""
    space = tuple(range(-axes, 0))
    total = np.abs(transfer).mean(axis=space)
    return np.where(total == 0, 0.0, np.maximum(-transfer, 0).mean(axis=space) / total)


def score(
    closures: Mapping[str, AbstractClosure | Sequence[AbstractClosure]],
    coarse: AbstractSolver,
    fine: AbstractSolver,
    frames: ArrayLike,
    kind: Kind = "gaussian",
    width: Width | None = None,
    *,
    dt: float = 1e-3,
    labels: Labels = PLAIN,
) -> xr.Dataset:
    """ρ(F, τ), ρ(∇·F, ∇·τ), ρ(Π), ⟨Π⟩, Π = −F_ac ∂_a ū_c: closures on filtered fine states against what they should give.

    **Arguments:**

    - `closures`: name -> a Flux or Source closure, or several that act together (a mixed model). With memory they answer as at the
      start of a run, with noise for one fixed key.
    - `coarse`: the solver that they are for; its operators are those of their `View`, and it takes the divergence.
    - `fine`, `frames`: the fine solver and its states, `(sample, time, c, *fine)`, `(time, c, *fine)` or one `(c, *fine)`.
    - `kind`, `width`: the filter, see `subgrid_flux`; exact is then the filtered stress and its divergence by the coarse solver.
      With `restrict` it is `subgrid_tendency` under that solver's own filter, and there is no exact stress.
    - `dt`: the time step that closures see. `labels`: times of the frames and units.

    Of every closure, sample and time:

    - `stress_correlation`, `stress_error` per axis and component, without the trace, which the pressure takes (on a line the flux);
    - `tendency_correlation`, `tendency_error` per component: of −∇·F or s as the coarse solver takes it, projected;
    - `transfer_correlation`, `transfer_mean`, `backscatter`: of the energy Π that the closure takes from the filtered flow, and the
      share of the exchange that comes back; `exact_transfer_mean` and `exact_backscatter` are what they should be.

    Correlations are Pearson's over the box, errors relative root mean squares. NaN where there is nothing to compare: a Source has
    no stress. With at least two samples each has its `…_standard_error` over the samples' time means.

    >>> from hybridsim.corrections.gradient_model import GradientModel
    >>> from hybridsim.solvers.kuramoto_sivashinsky import KuramotoSivashinsky, SpectralKS
    >>> fine, coarse = (SpectralKS(Grid((n,), (22.0,)), KuramotoSivashinsky()) for n in (64, 16))
    >>> u = np.cos(2 * np.pi * fine.grid.mesh()[0] / 22)[None]
    >>> found = score({"gradient": GradientModel()}, coarse, fine, u)
    >>> float(found["stress_correlation"].item()) > 0.999
    True
    """
    _alike(fine, coarse)
    asked = _closures(closures)
    frames = _float64(frames)
    d, dtype = coarse.grid.ndim, jnp.result_type(float)
    lead = frames.shape[: -d - 1]
    dims, coords = _leading(lead, labels)
    times = np.broadcast_to(_float64(coords["time"][1]) if lead else 0.0, lead).ravel()
    states = filtered_state(frames, fine, coarse, kind, width).reshape(-1, len(coarse.variables), *coarse.grid.shape)
    ready, count = coarse.prepare(dtype), len(times)
    fluxes = None if kind == "restrict" else subgrid_flux(frames, fine, coarse, kind, width)
    lacking = eqx.filter_jit(lambda u, t: subgrid_tendency(u, fine, coarse, t))

    rows: dict[str, list[np.ndarray]] = {}

    def add(name: str, value: ArrayLike) -> None:
        rows.setdefault(name, []).append(_float64(value))

    for i in range(count):
        u, t = jnp.asarray(states[i], dtype), jnp.asarray(times[i], dtype)
        if fluxes is None:
            source = lacking(jnp.asarray(frames.reshape(count, *frames.shape[-d - 1 :])[i], dtype), t)
            exact = _answer(ready, u, t, None, source)
        else:
            exact = _answer(ready, u, t, jnp.asarray(fluxes.reshape(count, *fluxes.shape[-d - 2 :])[i], dtype), None)
        add("exact_transfer_mean", np.mean(exact.transfer))
        add("exact_backscatter", _backscatter(_float64(exact.transfer), d))
        for each in asked.values():
            found = _asked(ready, each, u, t, jnp.asarray(dt, dtype))
            for name, a, b in zip(("stress", "tendency", "transfer"), found, exact, strict=True):
                add(f"{name}_correlation", correlation(a, b, d))
                if name != "transfer":
                    add(f"{name}_error", relative_error(a, b, d))
            add("transfer_mean", np.mean(found.transfer))
            add("backscatter", _backscatter(_float64(found.transfer), d))

    named = {
        "stress_correlation": ("correlation of the subgrid stress", ("axis", "component")),
        "stress_error": ("relative error of the subgrid stress", ("axis", "component")),
        "tendency_correlation": ("correlation of the subgrid tendency", ("component",)),
        "tendency_error": ("relative error of the subgrid tendency", ("component",)),
        "transfer_correlation": ("correlation of the subgrid energy transfer", ()),
        "transfer_mean": ("mean subgrid energy transfer", ()),
        "backscatter": ("backscatter over all exchange", ()),
        "exact_transfer_mean": ("mean exact subgrid energy transfer", ()),
        "exact_backscatter": ("exact backscatter over all exchange", ()),
    }
    coords |= {
        "closure": ("closure", list(asked), {"long_name": "closure"}),
        "axis": ("axis", list(AXES[:d]), {"long_name": "direction"}),
        "component": ("component", [v.name for v in coarse.variables], {"long_name": "channel"}),
    }
    unit = _units(coarse.variables[0].unit or "1", 3, labels.length_unit or "1", -1)
    out: dict[str, xr.DataArray] = {}
    for name, (long_name, rest) in named.items():
        data = np.stack(rows[name])
        attrs = {"long_name": long_name, "units": unit if name.endswith("transfer_mean") else "1"}
        if not name.startswith("exact"):
            data = np.moveaxis(data.reshape((count, len(asked), *data.shape[1:])), 0, 1).reshape(
                (len(asked), *lead, *data.shape[1:])
            )
            rest = ("closure", *dims, *rest)
        else:
            data, rest = data.reshape((*lead, *data.shape[1:])), (*dims, *rest)
        out[name] = xr.DataArray(data, {k: v for k, v in coords.items() if k in rest}, rest, attrs=attrs)
    if "sample" in dims and lead[0] > 1:
        out |= {f"{name}_standard_error": standard_error(q, over="members")["standard_error"] for name, q in list(out.items())}
    found = xr.Dataset(out)
    return found.assign_attrs(filter=kind, coarse=str(coarse.grid.shape), fine=str(fine.grid.shape))


# --- a closure that knows it exactly ---------------------------------------------------------------------------------------------


class PerfectlyClosed(AbstractSolver):
    """∂t u = L u + N(u),  ∂t v = L̄ v + N̄(v) + s(u): a fine run, and beside it the coarse one with `subgrid_tendency` as its source.

    Every stepper takes both alike, and s, evaluated at each stage, enters the coarse solver where a Source closure with `evaluate:
    stage` does. If v = R u at first, it stays so to rounding, after every stage and step: by construction R takes the fine rate to
    N̄ + s, and the formulas of steppers are linear in states and rates.

    **Arguments:**

    - `fine`, `coarse`: two solvers of one equation in one box; solvers that keep their state within bounds in steps of their own,
      such as those of gases, are refused.
    - `restriction`: R, linear, by default the coarse solver's `restrict`.

    z is {"fine", "coarse"}; `encode` takes a fine state and `decode` gives the coarse one, as `rollout` wants it. Exact for
    explicit steppers; for those that treat L by itself where R L = L̄ R, as between spectral solvers. Nothing is left out only if
    the coarse solver takes sources as they are: in spectral solvers of Navier–Stokes that is `dealias: none`, as the other masks
    damp what they receive.
    """

    fine: AbstractSolver
    coarse: AbstractSolver
    restriction: Restriction | None = eqx.field(static=True)

    places: ClassVar = ()

    def __init__(self, fine: AbstractSolver, coarse: AbstractSolver, restriction: Restriction | None = None):
        self.fine, self.coarse, self.restriction = fine, coarse, restriction

    def __check_init__(self):
        _alike(self.fine, self.coarse)
        for name, solver in (("fine", self.fine), ("coarse", self.coarse)):
            if solver.hosted or type(solver).euler is not AbstractSolver.euler:
                raise ValueError(
                    f"{name}: {type(solver).__name__} steps by itself, not by rates, so that no source is perfect for it"
                )

    @property
    def grid(self) -> Grid:
        return self.coarse.grid

    @property
    def variables(self):
        return self.coarse.variables

    @property
    def conserved(self) -> tuple[str, ...]:
        return self.coarse.conserved

    def prepare(self, dtype: Any) -> "PerfectlyClosed":
        return PerfectlyClosed(self.fine.prepare(dtype), self.coarse.prepare(dtype), self.restriction)

    # -- representation ---------------------------------------------------------------------------------------------------------

    def filtered(self, z: PyTree) -> Float[Array, "c *grid"]:
        """R u: what v should be."""
        return _restriction(self.fine, self.coarse, self.restriction)(self.fine.decode(z["fine"]))

    def encode(self, u: Float[Array, "c *fine"]) -> PyTree:
        z = {"fine": self.fine.encode(u)}
        return {**z, "coarse": self.coarse.encode(self.filtered(z))}

    def decode(self, z: PyTree) -> Float[Array, "c *grid"]:
        return self.coarse.decode(z["coarse"])

    def constrain(self, z: PyTree) -> PyTree:
        return {"fine": self.fine.constrain(z["fine"]), "coarse": self.coarse.constrain(z["coarse"])}

    def collect(self, z: PyTree) -> tuple[PyTree, Float[Array, " row"]]:
        coarse, injected = self.coarse.collect(z["coarse"])
        return {"fine": self.fine.collect(z["fine"])[0], "coarse": coarse}, injected

    # -- right-hand side --------------------------------------------------------------------------------------------------------

    def linear(self) -> PyTree | None:
        symbols = {"fine": self.fine.linear(), "coarse": self.coarse.linear()}
        if all(symbol is None for symbol in symbols.values()):
            return None
        return {name: _zero_symbol(getattr(self, name)) if symbol is None else symbol for name, symbol in symbols.items()}

    def explicit(self, z: PyTree, t: Real, tendency: Tendency) -> PyTree:
        restriction = _restriction(self.fine, self.coarse, self.restriction)
        source = _tendency(self.fine, self.coarse, z["fine"], t, restriction)
        received = self.coarse.receive(None, source)
        return {
            "fine": self.fine.explicit(z["fine"], t, _nothing),
            "coarse": self.coarse.explicit(z["coarse"], t, lambda _z, _t: received),
        }

    def receive(self, flux: Array | None, source: Array | None) -> PyTree:
        raise TypeError("PerfectlyClosed takes no closures: it is perfect already")

    # -- the coarse solver's own ------------------------------------------------------------------------------------------------

    def project(self, u: Float[Array, "c *grid"]) -> Float[Array, "c *grid"]:
        return self.coarse.project(u)

    def restrict(self, u, grid, variables):
        return self.coarse.restrict(u, grid, variables)

    def divergence(self, u: Float[Array, "c *grid"]) -> Float[Array, "*grid"] | None:
        return self.coarse.divergence(u)

    def centred(self, u: Float[Array, "c *grid"]) -> Float[Array, "c *grid"]:
        return self.coarse.centred(u)

    def flux_place(self, axis: int, channel: int) -> Place:
        return self.coarse.flux_place(axis, channel)

    def gradient(self, u: Float[Array, "c *grid"]) -> Float[Array, "axis c *grid"]:
        return self.coarse.gradient(u)

    def derivative(self, array, at, axis):
        return self.coarse.derivative(array, at, axis)

    def move(self, array, from_, to):
        return self.coarse.move(array, from_, to)

    def stable_dt(self, u: Float[Array, "c *grid"]) -> Real:
        """That of the coarse solver; the fine one may need less."""
        return self.coarse.stable_dt(u)


def _zero_symbol(solver: AbstractSolver) -> PyTree:
    """L = 0, where nothing is linear."""
    state = jax.ShapeDtypeStruct((len(solver.variables), *solver.grid.shape), jnp.float32)
    return jax.tree.map(lambda _: np.zeros(()), jax.eval_shape(solver.encode, state))


class PerfectRun(NamedTuple):
    """v and R u after each step, `(step, c, *grid)`, and max |v − R u| / max |R u|."""

    coarse: Float[Array, "step c *grid"]
    filtered: Float[Array, "step c *grid"]
    gap: Float[Array, " step"]


def perfect_run(
    fine: AbstractSolver,
    coarse: AbstractSolver,
    stepper: AbstractStepper,
    dt: float,
    u: Float[Array, "c *fine"],
    steps: int,
    restriction: Restriction | None = None,
) -> PerfectRun:
    """v(nΔt) against R u(nΔt), n = 1 … `steps`: a coarse run whose closure is exact, beside the fine run that it is to follow.

    One stepper and one Δt for both; the other arguments are those of `PerfectlyClosed`. In double precision the gap stays at
    rounding, about 10⁻¹⁴ after ten steps; it grows in the end, as chaos parts any two runs.
    """
    model = Model(PerfectlyClosed(fine, coarse, restriction), stepper, dt)
    shown = _perfect(model, jnp.asarray(u), steps)
    space = tuple(range(1, shown[0].ndim))
    gap = jnp.abs(shown[0] - shown[1]).max(axis=space) / jnp.abs(shown[1]).max(axis=space)
    return PerfectRun(*shown, gap)


@eqx.filter_jit
def _perfect(model: Model, u: Array, steps: int) -> tuple[Array, Array]:
    prepared = model.prepare(u.dtype)
    pair = prepared.solver
    assert isinstance(pair, PerfectlyClosed)
    z, carry = pair.encode(u), model.init_carry(u)

    def observe(prepared, z, carry):
        return pair.decode(z), pair.filtered(z)

    return frames_of(model, prepared, z, carry, jnp.zeros((), jnp.int32), steps, 1, 0, observe)[1]
