"""dT/dt = −(γ−1) ρ Λ(T) at constant density: radiative cooling of optically thin gas, integrated exactly.

Λ is made of power laws, Λ = Λ_i (T/T_i)^α_i between T_i and T_{i+1}; below a floor and above a cut-off there is none. The time
that gas takes from one temperature to another is then known in closed form, and so is its inverse (Townsend 2009,
doi:10.1088/0067-0049/181/2/391, eqs. A4–A7, the temporal evolution function): any Δt is exact, through any number of segments.

Here only *differences* of that function are ever formed, each within one segment and in units of the local cooling time T/Λ:

    t(T → T_b) Λ(T)/T = (1 − (T_b/T)^β)/β,    ln(T/T') = −ln(1 − β e)/β,    β = 1 − α,  e = Δt Λ(T)/T

as well-conditioned functions of β ln(T/T_b) and β e. So no digit is lost as α → 1, in steps far shorter than the cooling time,
nor where the rates of a table differ by many powers of ten. Temperatures are p/ρ; the emission per volume is ρ² Λ(T).
"""

import abc
import functools
import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from hybridsim.contract import Real


def _scalar(value: float | Array) -> float | Array:
    return value if eqx.is_array(value) else float(value)


def _optional(value: float | Array | None) -> float | Array | None:
    return None if value is None else _scalar(value)


def _optional_float(value: float | None) -> float | None:
    return None if value is None else float(value)


def _numbers(value: Sequence[float]) -> tuple[float, ...]:
    return tuple(float(x) for x in value)


def _pair(value: Sequence[float]) -> tuple[float, float]:
    if len(value) != 2:
        raise ValueError(f"time_exponents: needs two numbers, below and above the peak, found {len(value)}")
    return float(value[0]), float(value[1])


def _optional_numbers(value: Sequence[float] | None) -> tuple[float, ...] | None:
    return None if value is None else _numbers(value)


def _rates(value: Sequence[float] | Array) -> tuple[float, ...] | Array:
    return value if isinstance(value, jax.Array) else _numbers(value)


def _check_positive(**values: Any) -> None:
    for name, value in values.items():
        if isinstance(value, float) and not (math.isfinite(value) and value > 0):
            raise ValueError(f"{name}: must be positive and finite, found {value}")


def _check_not_negative(**values: Any) -> None:
    for name, value in values.items():
        if isinstance(value, float) and not (math.isfinite(value) and value >= 0):
            raise ValueError(f"{name}: must be finite and not negative, found {value}")


def _shown(values: Sequence[float]) -> str:
    return str(tuple(values)) if len(values) <= 8 else f"({', '.join(map(str, values[:3]))}, … {values[-1]})"


def _check_finite(**values: Any) -> None:
    for name, value in values.items():
        if isinstance(value, float) and not math.isfinite(value):
            raise ValueError(f"{name}: must be finite, found {value}")


def _check_window(floor: float, cutoff: float) -> None:
    _check_positive(floor=floor)
    if not cutoff > floor:
        raise ValueError(f"cutoff: must lie above the floor {floor}, found {cutoff}")


# --- one power law ---------------------------------------------------------------------------------------------------------------


def _within_range(exponent: Array) -> Array:
    """What exp can take with room to multiply."""
    dtype = exponent.dtype
    most = jnp.asarray(0.9 * math.log(float(jnp.finfo(dtype).max)), dtype)
    return jnp.maximum(jnp.minimum(exponent, most), -most)


def _series(z: Array, coefficients: Sequence[float]) -> Array:
    total = jnp.full_like(z, coefficients[-1])
    for c in coefficients[-2::-1]:
        total = total * z + c
    return total


def _given(tangent: Any) -> bool:
    return not isinstance(tangent, jax.custom_derivatives.SymbolicZero)


def _by_exponent(z: Array) -> Array:
    """(z eᶻ − (eᶻ − 1)) / z², ½ at 0."""
    near = jnp.abs(z) < 1
    x = jnp.where(near, 1, z)
    far = (x * jnp.exp(x) - jnp.expm1(x)) / (x * x)
    return jnp.where(near, _series(jnp.where(near, z, 0), [(m + 1) / math.factorial(m + 2) for m in range(19)]), far)


def _by_logarithm(z: Array) -> Array:
    """(ln(1 + z) − z/(1 + z)) / z², ½ at 0."""
    near = jnp.abs(z) < 0.25
    x = jnp.where(near, 1, z)
    far = (jnp.log1p(x) - x / (1 + x)) / (x * x)
    return jnp.where(near, _series(jnp.where(near, z, 0), [(-1) ** m * (m + 1) / (m + 2) for m in range(28)]), far)


@jax.custom_jvp
def lapse(height: Float[Array, "..."], beta: Float[Array, "..."]) -> Float[Array, "..."]:
    """(e^{βℓ} − 1)/β: the time from T = T_b e^ℓ down to T_b, in units of T_b/Λ(T_b); ℓ where β = 0.

    **Arguments:** `height`, ℓ = ln(T/T_b); `beta`, β = 1 − α. Relative accuracy is full for all β, and so is that of both
    derivatives (autodiff of the quotient would lose digits as β → 0).

    >>> float(lapse(jnp.asarray(2.0), jnp.asarray(0.0)))
    2.0
    """
    z = _within_range(beta * height)
    tiny = jnp.abs(z) < jnp.finfo(z.dtype).eps
    # a product below the smallest normal number may be flushed to zero: it must not be divided by
    return height * jnp.where(tiny, 1 + 0.5 * z, jnp.expm1(z) / jnp.where(tiny, 1, z))


@functools.partial(lapse.defjvp, symbolic_zeros=True)
def _lapse_jvp(primals, tangents):
    (height, beta), (by_height, by_beta) = primals, tangents
    z = _within_range(beta * height)
    change = jnp.zeros_like(z)
    if _given(by_height):
        change = change + jnp.exp(z) * by_height
    if _given(by_beta):
        change = change + height * height * _by_exponent(z) * by_beta
    return lapse(height, beta), change


@jax.custom_jvp
def descent(effort: Float[Array, "..."], beta: Float[Array, "..."]) -> Float[Array, "..."]:
    """−ln(1 − β e)/β: ln(T/T') after e cooling times, the inverse of `lapse` with −β; e where β = 0.

    **Arguments:** `effort`, e = Δt Λ(T)/T ≥ 0, below 1/β where β > 0 (there T' would be 0); `beta`, β = 1 − α. Relative accuracy
    is full for all β, and so is that of both derivatives.

    >>> float(descent(jnp.asarray(0.75), jnp.asarray(0.0)))
    0.75
    """
    z = _above_minus_one(-beta * effort)
    tiny = jnp.abs(z) < jnp.finfo(z.dtype).eps
    return effort * jnp.where(tiny, 1 - 0.5 * z, jnp.log1p(z) / jnp.where(tiny, 1, z))


@functools.partial(descent.defjvp, symbolic_zeros=True)
def _descent_jvp(primals, tangents):
    (effort, beta), (by_effort, by_beta) = primals, tangents
    z = _above_minus_one(-beta * effort)
    change = jnp.zeros_like(z)
    if _given(by_effort):
        change = change + by_effort / (1 + z)
    if _given(by_beta):
        change = change + effort * effort * _by_logarithm(z) * by_beta
    return descent(effort, beta), change


def _above_minus_one(z: Array) -> Array:
    return jnp.maximum(z, -1 + float(jnp.finfo(z.dtype).eps))


# --- many of them ----------------------------------------------------------------------------------------------------------------


class Segments(NamedTuple):
    """Λ(T)/T = s e^{aᵢ} (T/Tᵢ)^{−βᵢ} for Tᵢ < T ≤ Tᵢ₊₁: power laws from the floor T₀ to the cut-off.

    `scale` is s, `log_rate` a; times are in units of 1/s. `until` and `rest` together are the time from each Tᵢ down to one of
    them: a rounded number, and what rounding lost. `entry` is Λ/T at the top of each segment, `pace` T/Λ at its bottom. `spacing`
    is the distance of all nodes above the first in ln T, where it is the same.
    """

    scale: Any
    bottom: Any
    log_rate: Any
    beta: Any
    pace: Any
    entry: Any
    until: Any
    rest: Any
    cutoff: Any
    spacing: float | None = None

    def cast(self, dtype: Any) -> "Segments":
        """The table as arrays of the given type."""
        most = 0.5 * float(jnp.finfo(dtype).max)

        def array(x: Any) -> Array:
            return x.astype(dtype) if isinstance(x, jax.Array) else jnp.asarray(np.clip(x, -most, most), dtype)

        until, rest = self.until, self.rest
        if isinstance(until, np.ndarray):
            # a time too long for the type stays infinite: it never passes
            rounded = np.where(np.abs(until) < most, until, np.copysign(np.inf, until)).astype(dtype)
            rest = np.where(np.isfinite(rounded), until - np.where(np.isfinite(rounded), rounded, 0) + rest, 0)
            until = jnp.asarray(rounded)
        return Segments(
            scale=jnp.asarray(self.scale, dtype),
            bottom=array(self.bottom),
            log_rate=array(self.log_rate),
            beta=array(self.beta),
            pace=array(self.pace),
            entry=array(self.entry),
            until=until.astype(dtype),
            rest=array(rest),
            cutoff=jnp.asarray(self.cutoff, dtype),
            spacing=self.spacing,
        )


def _two_sum(a: Any, b: Any) -> tuple[Any, Any]:
    """a + b, rounded, and what rounding lost (Knuth)."""
    total = a + b
    back = total - a
    return total, (a - (total - back)) + (b - back)


def _times(spans: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Times of all nodes from the lower end of the fastest segment, as pairs of numbers.

    Near that segment the times are small, so that their differences are exact; far from it they grow as the spans do.
    """
    until, rest = np.zeros(len(spans) + 1), np.zeros(len(spans) + 1)
    start = int(np.argmin(spans)) if len(spans) else 0
    for i in range(start, len(spans)):
        until[i + 1], lost = _two_sum(until[i], spans[i])
        rest[i + 1] = rest[i] + lost
    for i in range(start, 0, -1):
        until[i - 1], lost = _two_sum(until[i], -spans[i - 1])
        rest[i - 1] = rest[i] + lost
    return until, rest


def _traced_times(spans: Array) -> tuple[Array, Array]:
    """The same from the lowest node, where the spans are traced."""

    def add(time: Array, span: Array) -> tuple[Array, tuple[Array, Array]]:
        pair = _two_sum(time, span)
        return pair[0], pair

    zero = jnp.zeros(1, spans.dtype)
    _, (until, lost) = jax.lax.scan(add, zero[0], spans)
    return jnp.append(zero, until), jnp.append(zero, jnp.cumsum(lost))


def make_segments(
    amplitude: float | Array,
    reference: float | Array,
    temperatures: np.ndarray,
    log_rates: Any,
    exponents: Any,
    floor: float,
    cutoff: float,
) -> Segments:
    """The table of Λ = A λᵢ (T/Tᵢ)^αᵢ, Tᵢ < T ≤ Tᵢ₊₁, in units of the rate s = A/T* at the `reference` T*.

    `temperatures` are Tᵢ, ascending, `log_rates` ln λᵢ. The first law reaches down to the floor, the last one up to the cut-off.
    Computed on the host in double precision, unless `log_rates` or `exponents` are JAX arrays.

    >>> nodes, log_rates, exponents = np.array([1.0, 2.0]), np.array([0.0, 0.0]), np.array([0.0, 1.0])
    >>> table = make_segments(1.0, 1.0, nodes, log_rates, exponents, floor=0.5, cutoff=8.0)
    >>> table.bottom.tolist(), table.until.tolist()
    ([0.5, 2.0], [0.0, 1.5])
    """
    traced = next((x.dtype for x in (log_rates, exponents) if isinstance(x, jax.Array)), None)
    if traced is None:
        xp, constant = np, np.asarray
    else:
        xp, constant = jnp, lambda x: jnp.asarray(x, traced)
    kept = np.flatnonzero((np.append(temperatures[1:], np.inf) > floor) & (temperatures < cutoff))
    bottom = np.array(temperatures[kept])
    raised = np.zeros(len(kept))
    raised[0] = math.log(floor / bottom[0])
    bottom[0] = floor
    height = constant(np.log1p(np.diff(bottom) / bottom[:-1]))
    exponents = constant(exponents)[kept]
    beta = 1 - exponents
    log_rate = constant(log_rates)[kept] + exponents * constant(raised) - (xp.log(constant(bottom)) - xp.log(constant(reference)))
    z = beta[:-1] * height
    with np.errstate(over="ignore", invalid="ignore"):
        if traced is None:
            tiny = np.abs(z) < np.finfo(float).eps
            spans = height * np.where(tiny, 1 + 0.5 * z, np.expm1(z) / np.where(tiny, 1, z)) * np.exp(-log_rate[:-1])
            until, rest = _times(spans)
        else:
            until, rest = _traced_times(lapse(height, beta[:-1]) * jnp.exp(-log_rate[:-1]))
        entry = xp.append(xp.exp(log_rate[:-1] - z), xp.exp(log_rate[-1:]))
        pace = xp.exp(-log_rate)
    steps = np.diff(np.log(bottom[1:]))
    even = len(steps) > 8 and bool(np.abs(steps / steps.mean() - 1).max() < 1e-6)
    spacing = float(steps.mean()) if even else None
    return Segments(amplitude / reference, bottom, log_rate, beta, pace, entry, until, rest, cutoff, spacing)


def _look(table: Float[Array, " n"], index: Int[Array, "*shape"]) -> Array:
    return table[0] if len(table) == 1 else jnp.take(table, index, mode="clip")


def _halvings(count: int) -> list[int]:
    return [2**i for i in reversed(range((count - 1).bit_length()))]


def _segment_of(table: Segments, temperature: Array) -> Array:
    """The index i with Tᵢ < T ≤ Tᵢ₊₁; 0 below the floor."""
    count = len(table.bottom)
    if table.spacing is not None:
        # rounding may have put it into a neighbour
        place = jnp.ceil(jnp.log(temperature / table.bottom[1]) / jnp.asarray(table.spacing, temperature.dtype))
        i = jnp.maximum(jnp.minimum(jax.lax.stop_gradient(place), count - 1), 0).astype(jnp.int32)
        i = jnp.where((i > 0) & (temperature <= _look(table.bottom, i)), i - 1, i)
        return jnp.where((i + 1 < count) & (temperature > _look(table.bottom, i + 1)), i + 1, i)
    i = jnp.zeros(temperature.shape, jnp.int32)
    for step in _halvings(count):
        up = i + step
        i = jnp.where((up < count) & (temperature > _look(table.bottom, up)), up, i)
    return i


def _reached(table: Segments, i: Array, time: Array) -> tuple[Array, Array]:
    """The lowest node that gas reaches from node i within the time, and how long that takes."""
    until, rest = _look(table.until, i), _look(table.rest, i)

    def span(to: Array) -> Array:
        return (until - _look(table.until, to)) + (rest - _look(table.rest, to))

    node = i
    for step in _halvings(len(table.bottom)):
        down = node - step
        node = jnp.where((down >= 0) & (span(down) <= time), down, node)
    return node, jnp.where(node == i, 0, span(node))


class _Descent(NamedTuple):
    """T' = T_s e^{−ξ}: where a cell stands after the step. Cells that do not cool have `active` false."""

    active: Array
    temperature: Array
    start: Array
    fall: Array
    bottom: Array


def _descend(table: Segments, temperature: Array, dose: Array) -> _Descent:
    """Townsend's update (eq. A7) as a walk: out of the cell's own segment, past whole ones, into the last one.

    `dose` is Δt in units of 1/s. All that is stored of segments are times, so the last power law is inverted alone.
    """
    floor = table.bottom[0]
    active = (temperature > floor) & (temperature <= table.cutoff)
    temperature = jnp.where(active, temperature, floor)
    own = _segment_of(table, temperature)
    bottom, beta = _look(table.bottom, own), _look(table.beta, own)
    # near a node the logarithm of the ratio would lose the digits of the difference
    height = jnp.log1p((temperature - bottom) / bottom)
    time = lapse(height, beta) * _look(table.pace, own)
    crosses = dose >= time
    left = jnp.where(crosses, dose - time, 0)
    node, spent = _reached(table, own, left)
    left = jnp.maximum(left - spent, 0)
    last = jnp.where(crosses, jnp.maximum(node - 1, 0), own)
    stops = crosses & (node == 0)
    effort = jnp.where(crosses, left * _look(table.entry, last), dose * _local_rate(table, own, height))
    fall = descent(jnp.where(stops, 0, effort), _look(table.beta, last))
    start = jnp.where(crosses, _look(table.bottom, node), temperature)
    return _Descent(active, temperature, start, fall, _look(table.bottom, last))


def _local_rate(table: Segments, own: Array, height: Array) -> Array:
    """Λ/T in units of s."""
    return jnp.exp(_within_range(_look(table.log_rate, own) - _look(table.beta, own) * height))


# --- cooling ---------------------------------------------------------------------------------------------------------------------


class AbstractCooling(eqx.Module):
    """dT/dt = −(γ−1) ρ Λ(T): energy that optically thin gas radiates, ρ² Λ(T) per volume and time, at constant density.

    All methods are pointwise in arrays of any shape. The energy density that a step takes away is ρ `drop`/(γ−1).
    """

    @abc.abstractmethod
    def drop(
        self,
        temperature: Float[Array, "*shape"],
        density: Float[Array, "*shape"],
        dt: float | Real,
        gamma: float | Real,
    ) -> Float[Array, "*shape"]:
        """T − T' ≥ 0 with full relative accuracy, however small the step: in single precision T − `cool(T)` would be noise."""

    @abc.abstractmethod
    def cool(
        self,
        temperature: Float[Array, "*shape"],
        density: Float[Array, "*shape"],
        dt: float | Real,
        gamma: float | Real,
    ) -> Float[Array, "*shape"]:
        """T' after Δt ≥ 0, with full relative accuracy, however far the gas cools."""

    @abc.abstractmethod
    def rate(self, temperature: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
        """Λ(T) ≥ 0."""

    def cooling_time(
        self, temperature: Float[Array, "*shape"], density: Float[Array, "*shape"], gamma: float | Real
    ) -> Float[Array, "*shape"]:
        """T/((γ−1) ρ Λ), infinite where nothing is radiated."""
        power = jnp.asarray(gamma - 1, temperature.dtype) * density * self.rate(temperature)
        radiates = power > 0
        return jnp.where(radiates, temperature / jnp.where(radiates, power, 1), jnp.asarray(math.inf, power.dtype))

    def check_gamma(self, gamma: float | Real) -> None:
        """Raises `ValueError` where the cooling was set up for gas of another γ."""


class AbstractPowerLaws(AbstractCooling):
    """Λ = Λᵢ (T/Tᵢ)^αᵢ between nodes: exact at any Δt, through nodes, down to the floor and no further.

    Gas that reaches the floor within the step stays there, exactly; gas at or below it, or above the cut-off, does not cool. As
    gas only ever cools, it never meets the cut-off within the step: what starts above stays, what starts below does not see it.
    """

    @abc.abstractmethod
    def segments(self) -> Segments:
        """The table of power laws."""

    def _descend(self, temperature, density, dt, gamma) -> _Descent:
        dtype = temperature.dtype
        table = self.segments().cast(dtype)
        dose = jnp.asarray(gamma - 1, dtype) * jnp.asarray(dt, dtype) * table.scale * density
        return _descend(table, temperature, dose)

    def drop(self, temperature, density, dt, gamma):
        s = self._descend(temperature, density, dt, gamma)
        drop = (s.temperature - s.start) - s.start * jnp.expm1(-s.fall)
        most = s.temperature - s.bottom
        return jnp.where(s.active, jnp.where(drop > most, most, drop), 0)

    def cool(self, temperature, density, dt, gamma):
        s = self._descend(temperature, density, dt, gamma)
        cooled = s.start * jnp.exp(-s.fall)
        return jnp.where(s.active, jnp.where(cooled < s.bottom, s.bottom, cooled), temperature)

    def rate(self, temperature):
        table = self.segments().cast(temperature.dtype)
        active = (temperature > table.bottom[0]) & (temperature <= table.cutoff)
        inside = jnp.where(active, temperature, table.bottom[0])
        own = _segment_of(table, inside)
        bottom = _look(table.bottom, own)
        height = jnp.log1p((inside - bottom) / bottom)
        return jnp.where(active, table.scale * inside * _local_rate(table, own, height), 0)


class PowerLawCooling(AbstractPowerLaws):
    """Λ = Λ₀ (T/T₀)^α for T_floor < T ≤ T_cut, 0 elsewhere.

    **Arguments:**

    - `amplitude`: Λ₀ ≥ 0, energy · volume / (mass² · time).
    - `exponent`: α, any number; ½ is bremsstrahlung, about −0.6 the lines of hot plasma.
    - `reference_temperature`: T₀ > 0.
    - `floor`: T_floor > 0; gas cools to it and no further.
    - `cutoff`: T_cut > T_floor; hotter gas does not cool (infinite: all does).

    Exact at any Δt: with e = Δt/t_cool, T' = T (1 − (1−α) e)^{1/(1−α)}, or T exp(−e) at α = 1, until the floor is reached (Townsend
    2009, doi:10.1088/0067-0049/181/2/391, eqs. A5 and A7). The first three may be arrays and are then differentiable.

    >>> cooling = PowerLawCooling(amplitude=1.0, exponent=0.0, reference_temperature=1.0, floor=0.25)
    >>> [float(cooling.cool(jnp.asarray(1.0), jnp.asarray(1.0), dt, gamma=2.0)) for dt in (0.0, 0.5, 5.0)]
    [1.0, 0.5, 0.25]
    """

    amplitude: float | Float[Array, ""] = eqx.field(converter=_scalar)
    exponent: float | Float[Array, ""] = eqx.field(converter=_scalar)
    reference_temperature: float | Float[Array, ""] = eqx.field(converter=_scalar)
    floor: float = eqx.field(static=True, converter=float)
    cutoff: float = eqx.field(static=True, default=math.inf, converter=float)

    def __check_init__(self):
        _check_not_negative(amplitude=self.amplitude)
        _check_finite(exponent=self.exponent)
        _check_positive(reference_temperature=self.reference_temperature)
        _check_window(self.floor, self.cutoff)

    def segments(self) -> Segments:
        reference, exponent = self.reference_temperature, self.exponent
        if isinstance(reference, float) and isinstance(exponent, float):
            log_rate, exponents = np.asarray([exponent * math.log(self.floor / reference)]), np.asarray([exponent])
        else:
            log_rate = jnp.reshape(exponent * (math.log(self.floor) - jnp.log(reference)), 1)
            exponents = jnp.asarray(exponent, log_rate.dtype).reshape(1)
        return make_segments(self.amplitude, reference, np.asarray([self.floor]), log_rate, exponents, self.floor, self.cutoff)


class PiecewisePowerLaw(AbstractPowerLaws):
    """Λ = Λᵢ (T/Tᵢ)^αᵢ for Tᵢ < T ≤ Tᵢ₊₁: a cooling curve given at nodes.

    **Arguments:**

    - `temperatures`: Tᵢ > 0, ascending.
    - `rates`: Λᵢ > 0 there, energy · volume / (mass² · time); an array is differentiable.
    - `floor`: T_floor > 0; gas cools to it and no further.
    - `cutoff`: T_cut > T_floor; hotter gas does not cool (infinite: all does).
    - `exponents`: αᵢ above each node. None: Λ is continuous, αᵢ = ln(Λᵢ₊₁/Λᵢ)/ln(Tᵢ₊₁/Tᵢ), which needs two nodes. If given, Λ may
      jump at nodes, where it then takes the value from below; the last exponent holds up to the cut-off.
    - `exponent_below`: below the first node (None: that of the first segment).
    - `exponent_above`: above the last node of a continuous curve (None: that of the last segment).

    Exact at any Δt (Townsend 2009, doi:10.1088/0067-0049/181/2/391, eqs. A4–A7). A smooth curve takes as many segments as its
    accuracy needs, at little cost: `from_function`.

    >>> cooling = PiecewisePowerLaw(temperatures=(1.0, 2.0), rates=(1.0, 2.0), floor=0.5, exponent_above=-1.0)
    >>> cooling.rate(jnp.asarray([0.25, 1.0, 1.5, 4.0])).tolist()
    [0.0, 1.0, 1.5, 1.0]
    """

    temperatures: tuple[float, ...] = eqx.field(static=True, converter=_numbers)
    rates: tuple[float, ...] | Float[Array, " n"] = eqx.field(converter=_rates)
    floor: float = eqx.field(static=True, converter=float)
    cutoff: float = eqx.field(static=True, default=math.inf, converter=float)
    exponents: tuple[float, ...] | None = eqx.field(static=True, default=None, converter=_optional_numbers)
    exponent_below: float | None = eqx.field(static=True, default=None, converter=_optional_float)
    exponent_above: float | None = eqx.field(static=True, default=None, converter=_optional_float)

    def __check_init__(self):
        nodes = self.temperatures
        if len(nodes) < (2 if self.exponents is None else 1):
            raise ValueError(f"temperatures: a continuous curve needs at least two nodes, any other one; found {len(nodes)}")
        if not all(math.isfinite(t) and t > 0 for t in nodes) or any(b <= a for a, b in itertools.pairwise(nodes)):
            raise ValueError(f"temperatures: must be positive, finite and ascending, found {_shown(nodes)}")
        if len(self.rates) != len(nodes):
            raise ValueError(f"rates: found {len(self.rates)} for {len(nodes)} temperatures")
        if isinstance(self.rates, tuple) and not all(math.isfinite(r) and r > 0 for r in self.rates):
            raise ValueError(f"rates: must be positive and finite, found {_shown(self.rates)}")
        if self.exponents is not None:
            if len(self.exponents) != len(nodes):
                raise ValueError(f"exponents: found {len(self.exponents)} for {len(nodes)} temperatures")
            if not all(math.isfinite(a) for a in self.exponents):
                raise ValueError(f"exponents: must be finite, found {_shown(self.exponents)}")
            if self.exponent_above is not None:
                raise ValueError("exponent_above: where exponents are given, the last of them holds above the last node")
        _check_finite(exponent_below=self.exponent_below, exponent_above=self.exponent_above)
        _check_window(self.floor, self.cutoff)

    @classmethod
    def from_function(
        cls,
        rate: Callable[[np.ndarray], np.ndarray],
        lowest: float,
        highest: float,
        segments: int,
        floor: float,
        cutoff: float = math.inf,
    ) -> "PiecewisePowerLaw":
        """A smooth Λ(T) > 0 between two temperatures, by `segments` power laws equally long in ln T = h.

        Each takes exactly the time that Λ takes from its upper to its lower end, so that errors do not add up: that of ln T is at
        most h³ |d² ln Λ/d(ln T)²|/125 within the first and the last segment, and none comes from those between. `rate` is a
        function of NumPy arrays. Outside of the two temperatures the outermost power laws go on.

        >>> cooling = PiecewisePowerLaw.from_function(lambda t: t**2 / (1 + t**3), 0.1, 10.0, segments=512, floor=0.2)
        >>> round(float(cooling.rate(jnp.asarray(1.0))), 4)
        0.5
        """
        if segments < 1:
            raise ValueError(f"segments: needs at least one, found {segments}")
        if not 0 < lowest < highest < math.inf:
            raise ValueError(f"highest: needs 0 < lowest < highest, both finite, found {lowest} and {highest}")
        nodes = np.linspace(math.log(lowest), math.log(highest), segments + 1)
        with np.errstate(divide="ignore", invalid="ignore"):
            log_rates, exponents = _fitted(lambda x: np.log(np.asarray(rate(np.exp(x)), np.float64)), nodes)
        if not np.isfinite(log_rates).all():
            raise ValueError(f"rate: must be positive and finite from {lowest} to {highest}")
        temperatures, rates = (tuple(np.exp(x).tolist()) for x in (nodes[:-1], log_rates))
        return cls(temperatures, rates, floor, cutoff, exponents=tuple(exponents.tolist()))

    def segments(self) -> Segments:
        nodes = np.asarray(self.temperatures)
        if isinstance(self.rates, tuple):
            rates = np.asarray(self.rates)
            fastest = int(np.argmax(rates / nodes))
            amplitude, reference, log_rates, xp = float(rates[fastest]), float(nodes[fastest]), np.log(rates / rates[fastest]), np
        else:
            amplitude, reference, log_rates, xp = 1.0, float(nodes[0]), jnp.log(self.rates), jnp
        if self.exponents is None:
            slopes = xp.diff(log_rates) / xp.asarray(np.log1p(np.diff(nodes) / nodes[:-1]), log_rates.dtype)
            above = slopes[-1:] if self.exponent_above is None else xp.asarray([self.exponent_above], log_rates.dtype)
            exponents = xp.append(slopes, above)
        else:
            exponents = np.asarray(self.exponents)
        if self.exponent_below is not None:
            below = xp.asarray([self.exponent_below], log_rates.dtype)
            start = min(self.floor, 0.5 * float(nodes[0]))
            first = log_rates[:1] + below * math.log(start / nodes[0])
            nodes, log_rates = np.append(start, nodes), xp.append(first, log_rates)
            exponents = xp.append(below, xp.asarray(exponents, log_rates.dtype))
        return make_segments(amplitude, reference, nodes, log_rates, exponents, self.floor, self.cutoff)


def _fitted(log_rate: Callable[[np.ndarray], np.ndarray], nodes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """ln Λ above each node and α, from ln Λ as a function of ln T: secants, shifted so that ∫ dT/Λ is exact in each segment."""
    at_nodes = log_rate(nodes)
    width = np.diff(nodes)
    exponents = np.diff(at_nodes) / width
    points, weights = np.polynomial.legendre.leggauss(8)
    x = 0.5 * width[:, None] * (1 + points)[None]
    secant = at_nodes[:-1, None] + exponents[:, None] * x
    slow = weights[None] * np.exp(x * (1 - exponents)[:, None])
    excess = (slow * np.exp(secant - log_rate(nodes[:-1, None] + x))).sum(axis=1) / slow.sum(axis=1)
    return at_nodes[:-1] - np.log(excess), exponents


def _peak_amplitude(cooling: "MixingLayerCooling | LogNormalCooling", peak: float) -> float | Array:
    """Λ at the peak, given as such or by the cooling time there at the given pressure: Λ = T²/((γ−1) p t)."""
    if cooling.amplitude is not None:
        return cooling.amplitude
    assert cooling.cooling_time_at_peak is not None
    return peak * peak / ((cooling.gamma - 1) * cooling.pressure * cooling.cooling_time_at_peak)


def _check_peak(cooling: "MixingLayerCooling | LogNormalCooling") -> None:
    if (cooling.amplitude is None) == (cooling.cooling_time_at_peak is None):
        found = "neither" if cooling.amplitude is None else "both"
        raise ValueError(f"cooling_time_at_peak: give either this or the amplitude, found {found}")
    _check_positive(cooling_time_at_peak=cooling.cooling_time_at_peak, pressure=cooling.pressure)
    _check_not_negative(amplitude=cooling.amplitude)
    if isinstance(cooling.gamma, float) and not (math.isfinite(cooling.gamma) and cooling.gamma > 1):
        raise ValueError(f"gamma: must be above 1 and finite, found {cooling.gamma}")


def _check_same_gamma(cooling: "MixingLayerCooling | LogNormalCooling", gamma: float | Array) -> None:
    known = isinstance(cooling.gamma, float) and isinstance(gamma, float)
    if cooling.amplitude is None and known and cooling.gamma != gamma:
        raise ValueError(
            f"cooling.gamma: the cooling time was turned into Λ for gas of γ = {cooling.gamma}, but the equation has {gamma}; "
            "give the same"
        )


class MixingLayerCooling(AbstractPowerLaws):
    """t_cool = t_peak (T/T_peak)^b at constant pressure: Λ = Λ_peak (T/T_peak)^{2−b}, b = b_lo below the peak, b_hi above.

    The cooling of turbulent radiative mixing layers: fastest at T_peak, slow in the cold and in the hot phase.

    **Arguments:**

    - `cold_temperature`, `hot_temperature`: T_cold < T_hot of the two phases (1/χ and 1 for a density contrast χ).
    - `cooling_time_at_peak`: t_peak, T/((γ−1) ρ Λ) at T_peak and the given pressure, so ρ = p/T_peak.
    - `amplitude`: Λ_peak itself, in place of t_peak; Λ_peak = T_peak²/((γ−1) p t_peak).
    - `pressure`, `gamma`: p and γ of the gas, used to turn t_peak into Λ_peak.
    - `time_exponents`: (b_lo, b_hi). At constant pressure the emission per volume goes with T^{−b}.
    - `peak_over_cold`, `floor_over_cold`, `cutoff_over_hot`: T_peak/T_cold, T_floor/T_cold, T_cut/T_hot.

    The defaults belong to a public set of parameters: χ = 56.2, p = ρ_hot = 1, v = 0.645 (Mach 0.5), L = 1 and t_peak = t_shear/20
    with t_shear = L/v. Law and normalisation are those of the AthenaK problem `TRML`, Ė = p₀/((γ−1) t_peak) (p/p₀)² (T/T_peak)^{−b}
    below T_cut, and of Chen, Fielding & Bryan 2023, arXiv:2211.01395, who use (−2, 1). Beware of versions of that problem which
    read the same two numbers as minus the exponents of Λ: here that is b + 2. Exact at any Δt. `amplitude`,
    `cooling_time_at_peak`, `pressure` and `gamma` may be arrays and are then differentiable.

    >>> cooling = MixingLayerCooling(cold_temperature=1 / 56.2, hot_temperature=1.0, cooling_time_at_peak=0.0775)
    >>> peak = jnp.asarray(4.64 / 56.2)
    >>> round(float(cooling.cooling_time(peak, 1 / peak, 5 / 3)), 6)
    0.0775
    """

    cold_temperature: float = eqx.field(static=True, converter=float)
    hot_temperature: float = eqx.field(static=True, converter=float)
    cooling_time_at_peak: float | Float[Array, ""] | None = eqx.field(default=None, converter=_optional)
    amplitude: float | Float[Array, ""] | None = eqx.field(default=None, converter=_optional)
    pressure: float | Float[Array, ""] = eqx.field(default=1.0, converter=_scalar)
    gamma: float | Float[Array, ""] = eqx.field(default=5 / 3, converter=_scalar)
    time_exponents: tuple[float, float] = eqx.field(static=True, default=(-2.0, 3.0), converter=_pair)
    peak_over_cold: float = eqx.field(static=True, default=4.64, converter=float)
    floor_over_cold: float = eqx.field(static=True, default=1.0, converter=float)
    cutoff_over_hot: float = eqx.field(static=True, default=0.85, converter=float)

    def __check_init__(self):
        _check_positive(cold_temperature=self.cold_temperature, hot_temperature=self.hot_temperature)
        _check_positive(peak_over_cold=self.peak_over_cold, floor_over_cold=self.floor_over_cold)
        if not self.hot_temperature > self.cold_temperature:
            raise ValueError(f"hot_temperature: must be above the cold one, {self.cold_temperature}, found {self.hot_temperature}")
        if not all(math.isfinite(b) for b in self.time_exponents):
            raise ValueError(f"time_exponents: must be finite, found {self.time_exponents}")
        if not self.cutoff > self.floor:
            raise ValueError(f"cutoff_over_hot: the cut-off {self.cutoff} must lie above the floor {self.floor}")
        _check_peak(self)

    @property
    def peak_temperature(self) -> float:
        return self.peak_over_cold * self.cold_temperature

    @property
    def floor(self) -> float:
        return self.floor_over_cold * self.cold_temperature

    @property
    def cutoff(self) -> float:
        return self.cutoff_over_hot * self.hot_temperature

    def check_gamma(self, gamma: float | Real) -> None:
        _check_same_gamma(self, gamma)

    def segments(self) -> Segments:
        peak = self.peak_temperature
        lower, upper = (2 - b for b in self.time_exponents)
        start = min(self.floor, 0.5 * peak)
        log_rates = np.asarray([lower * math.log(start / peak), 0.0])
        exponents = np.asarray([lower, upper])
        return make_segments(
            _peak_amplitude(self, peak), peak, np.asarray([start, peak]), log_rates, exponents, self.floor, self.cutoff
        )


REACH = 16
"""Widths from its peak to which a log-normal curve is followed."""


class LogNormalCooling(AbstractPowerLaws):
    """Λ = Λ_peak exp(−½ (ln(T/T_peak)/σ)²): a log-normal peak of emission.

    **Arguments:**

    - `peak_temperature`: T_peak > 0; in mixing layers the geometric mean of the hot and the cold temperature.
    - `width`: σ > 0, in ln T.
    - `floor`: T_floor > 0; gas cools to it and no further.
    - `cooling_time_at_peak`: t_peak, T/((γ−1) ρ Λ) at T_peak and the given pressure, so ρ = p/T_peak.
    - `amplitude`: Λ_peak itself, in place of t_peak; Λ_peak = T_peak²/((γ−1) p t_peak).
    - `pressure`, `gamma`: p and γ of the gas, used to turn t_peak into Λ_peak.
    - `cutoff`: T_cut > T_floor; hotter gas does not cool (infinite: all does).
    - `segments_per_width`: power laws per σ in ln T. None: as many as keep ln T' within 10⁻⁹ max(1, t_cool(T)/t_cool(T')) and the
      emission of the shortest steps within a few 10⁻⁶ (about 1700 for χ = 56 and σ = ½).

    Cooling of the mixing layers of Fielding et al. 2020, doi:10.3847/2041-8213/ab8d2c, whose Athena++ problem writes the same as a
    log-normal density in T and also takes off Λ(T_cold), a heating that is not offered here. `rate` is the formula itself; `cool`
    and `drop` integrate power laws that take exactly as long from node to node (`PiecewisePowerLaw.from_function`), out to 16 σ,
    where Λ is 10⁻⁵⁶ of its peak, and on with the last one. `amplitude`, `cooling_time_at_peak`, `pressure` and `gamma` may be
    arrays and are then differentiable.

    >>> cooling = LogNormalCooling(peak_temperature=0.1, width=0.5, floor=0.01, amplitude=2.0)
    >>> round(float(cooling.rate(jnp.asarray(0.1))), 6)
    2.0
    """

    peak_temperature: float = eqx.field(static=True, converter=float)
    width: float = eqx.field(static=True, converter=float)
    floor: float = eqx.field(static=True, converter=float)
    cooling_time_at_peak: float | Float[Array, ""] | None = eqx.field(default=None, converter=_optional)
    amplitude: float | Float[Array, ""] | None = eqx.field(default=None, converter=_optional)
    pressure: float | Float[Array, ""] = eqx.field(default=1.0, converter=_scalar)
    gamma: float | Float[Array, ""] = eqx.field(default=5 / 3, converter=_scalar)
    cutoff: float = eqx.field(static=True, default=math.inf, converter=float)
    segments_per_width: int | None = eqx.field(static=True, default=None)

    def __check_init__(self):
        _check_positive(peak_temperature=self.peak_temperature, width=self.width)
        _check_window(self.floor, self.cutoff)
        if self.segments_per_width is not None and self.segments_per_width < 1:
            raise ValueError(f"segments_per_width: needs at least one, found {self.segments_per_width}")
        reach = math.exp(min(REACH * self.width, 600.0))
        if self.floor >= self.peak_temperature * reach:
            raise ValueError(f"floor: {self.floor} is more than {REACH} widths above the peak, so that nothing cools")
        if self.cutoff <= self.peak_temperature / reach:
            raise ValueError(f"cutoff: {self.cutoff} is more than {REACH} widths below the peak, so that nothing cools")
        _check_peak(self)

    def check_gamma(self, gamma: float | Real) -> None:
        _check_same_gamma(self, gamma)

    def segments(self) -> Segments:
        nodes, log_rates, exponents = _log_normal(
            self.peak_temperature, self.width, self.floor, self.cutoff, self.segments_per_width
        )
        amplitude = _peak_amplitude(self, self.peak_temperature)
        return make_segments(amplitude, self.peak_temperature, nodes, log_rates, exponents, self.floor, self.cutoff)

    def rate(self, temperature):
        dtype = temperature.dtype
        floor, cutoff = jnp.asarray(self.floor, dtype), jnp.asarray(self.cutoff, dtype)
        active = (temperature > floor) & (temperature <= cutoff)
        inside = jnp.where(active, temperature, floor)
        distance = (jnp.log(inside) - jnp.asarray(math.log(self.peak_temperature), dtype)) / jnp.asarray(self.width, dtype)
        amplitude = jnp.asarray(_peak_amplitude(self, self.peak_temperature), dtype)
        return jnp.where(active, amplitude * jnp.exp(-0.5 * distance * distance), 0)


@functools.lru_cache(maxsize=32)
def _log_normal(
    peak: float, width: float, floor: float, cutoff: float, per_width: int | None
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Lower ends, ln Λ/Λ_peak above them and exponents of the power laws of a log-normal curve."""
    lowest = max(math.log(floor / peak), -REACH * width)
    highest = min(math.log(cutoff / peak), REACH * width)
    step = width / per_width if per_width is not None else (50e-9 * width**2) ** (1 / 3)
    nodes = np.linspace(lowest, highest, math.ceil((highest - lowest) / step) + 1)
    log_rates, exponents = _fitted(lambda x: -0.5 * (x / width) ** 2, nodes)
    return peak * np.exp(nodes[:-1]), log_rates, exponents
