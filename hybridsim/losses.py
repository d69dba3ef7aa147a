"""L = Σ_i λ_i L_i: how far an unrolled trajectory is from the truth. Every term is zero where the two agree and of order one where
they have nothing in common, so that weights of order one make sense.

Differentiable in the trajectory; the numbers that a report shows come from `hybridsim.diagnostics`.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from hybridsim import gas
from hybridsim.contract import AbstractSolver
from hybridsim.diagnostics import VELOCITIES, is_gas
from hybridsim.grid import Grid, Place

Trajectory = Float[Array, "frame c *grid"]

SMALLEST = 1e-7
"""What two positive numbers are compared beyond, as a fraction of the larger scale: single precision has no more to say."""


def mode_counts(grid: Grid) -> Float[np.ndarray, "*k"]:
    """How often each mode of `rfftn` counts in a sum over all modes: 2, and 1 on the planes that hold both of a pair."""
    n = grid.shape[-1]
    last = np.arange(n // 2 + 1)
    return np.where((last == 0) | (2 * last == n), 1.0, 2.0)


def spectral_weight(grid: Grid, power: float) -> Float[np.ndarray, "*k"]:
    """w(k) = |k|^{2p}, zero at k = 0 and doubled where `rfftn` keeps one of a conjugate pair; k in units of 2π/max L."""
    k2 = np.zeros(())
    for k in grid.wavenumbers():
        k2 = k2 + (k * max(grid.lengths) / (2 * np.pi)) ** 2
    return np.where(k2 > 0, np.maximum(k2, 1e-300) ** power, 0.0) * mode_counts(grid)


def relative_error(
    u: Float[Array, "frame c *grid"], truth: Float[Array, "frame c *grid"], weight: Float[Array, "*k"] | None
) -> Float[Array, " frame"]:
    """e = Σ_k w(k) |û − û_ref|² / Σ_k w(k) |û_ref|², one number per frame; 2 (1 − ρ) for fields of equal norm.

    Without a weight (between walls, where there are no Fourier modes) the sums run over cells.
    """
    return _square(u - truth, weight) / _square(truth, weight)


def _square(q: Trajectory, weight: Float[Array, "*k"] | None) -> Float[Array, " frame"]:
    """Σ_k w(k) |q̂|², or Σ q² over cells."""
    rest = tuple(range(1, q.ndim))
    if weight is None:
        return jnp.sum(q * q, axis=rest)
    hat = jnp.fft.rfftn(q, axes=tuple(range(2, q.ndim)))
    return jnp.sum(weight[None, None] * (hat.real**2 + hat.imag**2), axis=rest)


class Fields(NamedTuple):
    """What is compared of a state: `(frame, k, *grid)` each.

    - `velocity`: the velocity at the places of its components; of a gas √ρ v; in one dimension u.
    - `others`: passive scalars one by one; of a gas ρ, p, then its scalars.
    """

    velocity: Trajectory
    others: tuple[tuple[str, Trajectory], ...]


def velocity_rows(solver: AbstractSolver) -> tuple[int, ...]:
    """Which channels are the velocity, or the momentum of a gas; all of them where none is called so."""
    names = [v.name for v in solver.variables]
    if is_gas(solver.variables):
        return tuple(range(1, solver.grid.ndim + 1))
    found = tuple(names.index(q) for q in VELOCITIES[: solver.grid.ndim] if q in names)
    return found or tuple(range(len(names)))


def fields_of(solver: AbstractSolver, u: Trajectory) -> Fields:
    """The fields of `u`, in numbers that add up: (v), or (√ρ v, ρ, p) of a gas."""
    rows = velocity_rows(solver)
    if not is_gas(solver.variables):
        others = tuple((v.name, u[:, c : c + 1]) for c, v in enumerate(solver.variables) if c not in rows)
        return Fields(u[:, jnp.asarray(rows)], others)
    d = solver.grid.ndim
    gamma = jnp.asarray(solver.equation.gamma, u.dtype)  # pyright: ignore[reportAttributeAccessIssue]
    rho = jnp.where(u[:, :1] > 0, u[:, :1], 1)
    weighted = u[:, 1 : d + 1] / jnp.sqrt(rho)
    pressure = (gamma - 1) * (u[:, d + 1 : d + 2] - 0.5 * jnp.sum(weighted**2, axis=1, keepdims=True))
    scalars = tuple((v.name, u[:, c : c + 1]) for c, v in enumerate(solver.variables) if c > d + 1)
    return Fields(weighted, (("density", u[:, :1]), ("pressure", pressure), *scalars))


def _fluctuation(q: Trajectory) -> Trajectory:
    return q - q.mean(axis=tuple(range(2, q.ndim)), keepdims=True)


class Context(eqx.Module):
    """What the terms of a loss share: the solver, w(k), the shells, and Φ₀, the model without closures over one frame."""

    solver: AbstractSolver
    weight: Float[Array, "*k"] | None
    shells: Int[Array, "*k"] | None
    counts: Float[Array, "*k"] | None
    last: int = eqx.field(static=True)
    bare: Callable[[Trajectory], Trajectory]

    def shell_means(self, density: Float[Array, "frame *k"]) -> Float[Array, " shell"]:
        """The mean over frames of Σ d(k) over the shells 1 … ⅔ of the Nyquist wavenumber."""
        assert self.shells is not None
        assert self.counts is not None
        weighted = (density * self.counts[None]).mean(axis=0).reshape(-1)
        return jax.ops.segment_sum(weighted, self.shells.reshape(-1), self.last + 2)[1 : self.last + 1]


def context_of(solver: AbstractSolver, power: float, dtype: Any, bare: Callable[[Trajectory], Trajectory]) -> Context:
    """The context on the grid of `solver`, whose modes are counted where it is periodic along all axes."""
    grid = solver.grid
    if not all(grid.periodic):
        return Context(solver, None, None, None, 0, bare)
    radius = np.zeros(())
    for k in grid.wavenumbers():
        radius = radius + (k * max(grid.lengths) / (2 * np.pi)) ** 2
    shell = np.floor(np.sqrt(radius) * (1 + 1e-12) + 0.5).astype(np.int32)
    nyquist = min(n * max(grid.lengths) / length for n, length in zip(grid.shape, grid.lengths, strict=True)) / 2
    last = max(1, int(2 * nyquist / 3 + 1e-9))
    counts = np.broadcast_to(mode_counts(grid), shell.shape)
    return Context(
        solver,
        jnp.asarray(spectral_weight(grid, power), dtype),
        jnp.asarray(np.minimum(shell, last + 1)),
        jnp.asarray(counts, dtype),
        last,
        bare,
    )


# --- the terms -------------------------------------------------------------------------------------------------------------------


def state(context: Context, u: Trajectory, truth: Trajectory, start: Array) -> Float[Array, ""]:
    """Mean over frames and fields of Σ w |q̂ − q̂_ref|² / Σ w |q̂_ref|², w = |k|^{2p} (between walls: over cells, p = 0).

    Fields: the velocity (all components together) and each passive scalar; of a gas √ρ v, p, whose error counts in units of its own
    fluctuations and of ρ|v|², and ρ, in units of its own and of ρ|v|²/a², a the sound speed of the means: what motion would make of
    a gas that is still uniform.
    """
    solver, weight = context.solver, context.weight
    ours, theirs = fields_of(solver, u), fields_of(solver, truth)
    errors = [relative_error(ours.velocity, theirs.velocity, weight)]
    of_gas = is_gas(solver.variables)
    motion = {}
    if of_gas:
        known = dict(theirs.others)
        dynamic = jnp.sum(theirs.velocity**2, axis=1, keepdims=True)
        means = {name: known[name].mean(axis=tuple(range(1, u.ndim)), keepdims=True) for name in ("density", "pressure")}
        gamma = jnp.asarray(solver.equation.gamma, u.dtype)  # pyright: ignore[reportAttributeAccessIssue]
        motion = {"pressure": dynamic, "density": dynamic * means["density"] / (gamma * means["pressure"])}
    for (name, q), (_, reference) in zip(ours.others, theirs.others, strict=True):
        scale = _square(_fluctuation(reference) if of_gas else reference, weight)
        if name in motion:
            scale = scale + _square(motion[name], weight)
        errors.append(_square(q - reference, weight) / (scale + jnp.finfo(q.dtype).tiny))
    return jnp.stack(errors).mean()


def _log_ratio(a: Array, b: Array, scale: Array) -> Array:
    """(ln a/b)² of positive numbers that may be zero beside `scale`."""
    small = SMALLEST * scale + jnp.finfo(b.dtype).tiny
    return jnp.log((a + small) / (b + small)) ** 2


def spectrum(context: Context, u: Trajectory, truth: Trajectory, start: Array) -> Float[Array, ""]:
    """Mean over the shells n up to ⅔ of the Nyquist wavenumber of (ln E(n)/E_ref(n))², E the mean over the unrolled frames."""

    def energies(q: Trajectory) -> Float[Array, " shell"]:
        v = fields_of(context.solver, q).velocity
        hat = jnp.fft.rfftn(v, axes=tuple(range(2, v.ndim)))
        return context.shell_means(jnp.sum(hat.real**2 + hat.imag**2, axis=1))

    ours, theirs = energies(u), energies(truth)
    return _log_ratio(ours, theirs, theirs.sum()).mean()


def velocity_at(solver: AbstractSolver, u: Trajectory) -> list[tuple[Float[Array, "frame *grid"], Place]]:
    """The components of the velocity and where they live; of a gas v = (ρv)/ρ at the centres."""
    rows = velocity_rows(solver)
    per_mass = 1 / jnp.where(u[:, 0] > 0, u[:, 0], 1) if is_gas(solver.variables) else None
    return [(u[:, c] if per_mass is None else per_mass * u[:, c], solver.variables[c].at) for c in rows]


def dissipation(context: Context, u: Trajectory, truth: Trajectory, start: Array) -> Float[Array, ""]:
    """(ln D/D_ref)², D = ⟨|∇v|²⟩ by the solver's own differences, the mean over the unrolled frames."""
    solver = context.solver

    def slopes(q: Trajectory) -> Float[Array, ""]:
        total = jnp.zeros((), q.dtype)
        for v, at in velocity_at(solver, q):
            for a in range(solver.grid.ndim):
                total = total + jnp.mean(jax.vmap(lambda p, at=at, a=a: solver.derivative(p, at, a)[0])(v) ** 2)
        return total

    ours, theirs = slopes(u), slopes(truth)
    return _log_ratio(ours, theirs, theirs)


def transfer(context: Context, u: Trajectory, truth: Trajectory, start: Array) -> Float[Array, ""]:
    """Σ_n (Π(n) − Π_ref(n))² / Σ_n Π_ref(n)², Π(n) = Σ_{|k| ≤ n} Re v̂*·(v·∇v)^, means over the unrolled frames.

    Π is the flux of kinetic energy from the modes up to n to those beyond, by the resolved velocity at the cell centres (KS: u).
    """
    solver = context.solver
    grid, rows = solver.grid, jnp.asarray(velocity_rows(solver))
    axes = tuple(range(2, 2 + grid.ndim))

    def fluxes(q: Trajectory) -> Float[Array, " shell"]:
        v = jax.vmap(solver.centred)(q)[:, rows]
        hat = jnp.fft.rfftn(v, axes=axes)
        carried = jnp.zeros_like(v)
        for a, (k, n) in enumerate(zip(grid.wavenumbers(), grid.shape, strict=True)):
            # the mode of the shortest wave has no derivative on the grid
            k = np.where(np.abs(k) * grid.lengths[a] / (2 * np.pi) * 2 >= n - 1e-9, 0.0, k)
            slope = jnp.fft.irfftn(1j * jnp.asarray(k[None, None], v.dtype) * hat, grid.shape, axes=axes)
            carried = carried + v[:, a : a + 1] * slope
        carried_hat = jnp.fft.rfftn(carried, axes=axes)
        rate = jnp.sum(hat.real * carried_hat.real + hat.imag * carried_hat.imag, axis=1)
        return jnp.cumsum(context.shell_means(rate))

    ours, theirs = fluxes(u), fluxes(truth)
    return jnp.sum((ours - theirs) ** 2) / (jnp.sum(theirs**2) + jnp.finfo(theirs.dtype).tiny)


def temperature(context: Context, u: Trajectory, truth: Trajectory, start: Array) -> Float[Array, ""]:
    """Mean over frames of Σ (T − T_ref)² / Σ (T_ref'² + (T̄ ρ|v|²/(γ p̄))²), T = p/ρ of a gas, sums over cells.

    T' is the fluctuation, the second term what motion would make of a gas that is still uniform. In `state` a hot, thin gas next to
    a cold, dense one weighs as little as it has mass: its temperature may go wrong at no price. Here it counts by its volume.
    """
    rows = tuple(range(1, u.ndim))

    def parts(q: Trajectory) -> tuple[Float[Array, "frame 1 *grid"], ...]:
        fields = fields_of(context.solver, q)
        others = dict(fields.others)
        rho = jnp.where(others["density"] > 0, others["density"], 1)
        return others["pressure"] / rho, others["pressure"], jnp.sum(fields.velocity**2, axis=1, keepdims=True)

    ours, (theirs, pressure, dynamic) = parts(u)[0], parts(truth)
    gamma = jnp.asarray(context.solver.equation.gamma, u.dtype)  # pyright: ignore[reportAttributeAccessIssue]
    motion = theirs.mean(axis=rows, keepdims=True) * dynamic / (gamma * pressure.mean(axis=rows, keepdims=True))
    scale = _square(_fluctuation(theirs), None) + _square(motion, None)
    return jnp.mean(_square(ours - theirs, None) / (scale + jnp.finfo(u.dtype).tiny))


PHASES = 64
"""How many ranges of temperature `phases` tells apart; six decades."""


def phases(context: Context, u: Trajectory, truth: Trajectory, start: Array) -> Float[Array, ""]:
    """Σ_b (m_b − m_b,ref)² / (m_b + m_b,ref) / Σ m_b,ref, m_b the mass per range of temperature, the mean over the unrolled frames.

    The triangular discrimination of Topsøe (2000, doi:10.1109/18.850703): for equal masses, with V = Σ |m_b − m_b,ref| / Σ m_b,ref,
    which `hybridsim.gas.phase_distance` reports, ½ V² ≤ L ≤ V. The ranges are those of the report, but neighbours share the mass
    between their centres linearly in ln T, so that gas has a price on moving to the next range; gas that no range of the truth is
    near to has none, which is what `state` and `temperature` are there for. Where the gas is does not count. Cells without a
    positive density and pressure have no temperature: their mass is in the lowest range.
    """
    width = math.log(10) / gas.BINS_PER_DECADE

    def parts(q: Trajectory) -> tuple[Float[Array, "frame cell"], Float[Array, "frame cell"], Bool[Array, "frame cell"]]:
        others = dict(fields_of(context.solver, q).others)
        rho, pressure = (others[name].reshape(q.shape[0], -1) for name in ("density", "pressure"))
        sound = (rho > 0) & ~(pressure <= 0)
        temperature = jnp.where(sound, pressure, 1) / jnp.where(sound, rho, 1)
        return rho, jnp.log(temperature) / width - (gas.OFFSET + 0.5), sound

    ours, theirs = parts(u), parts(truth)
    lowest = jnp.min(theirs[1], where=theirs[2], initial=jnp.inf)
    highest = jnp.max(theirs[1], where=theirs[2], initial=-jnp.inf)
    first = jax.lax.stop_gradient(jnp.round(0.5 * (lowest + highest))) - PHASES // 2

    def masses(
        rho: Float[Array, "frame cell"], place: Float[Array, "frame cell"], sound: Bool[Array, "frame cell"]
    ) -> Float[Array, " range"]:
        at = jnp.where(sound, jnp.clip(place - first, 0, PHASES - 1), 0)
        below = jnp.minimum(jnp.floor(at), PHASES - 2)
        share = at - below
        index = below.astype(jnp.int32).reshape(-1)
        lower = jax.ops.segment_sum((rho * (1 - share)).reshape(-1), index, PHASES)
        upper = jax.ops.segment_sum((rho * share).reshape(-1), index + 1, PHASES)
        return lower + upper

    m, known = masses(*ours), masses(*theirs)
    whole = known.sum()
    return jnp.sum((m - known) ** 2 / (jnp.abs(m) + known + SMALLEST * whole)) / whole


def residual(context: Context, u: Trajectory, truth: Trajectory, start: Array) -> Float[Array, ""]:
    """Mean over frames of ‖uₙ₊₁ − Φ₀(uₙ)‖² / ‖Φ₀(uₙ) − uₙ‖², Φ₀ the run's own solver without closures over one frame.

    By how much the trajectory violates the discretised equation: for a network that replaces the solver a physics-informed loss,
    for any other closure a price on what it changes.
    """
    before = jnp.concatenate([start[None], u[:-1]])
    after = context.bare(before)
    rows = tuple(range(1, u.ndim))
    moved = jnp.sum((after - before) ** 2, axis=rows)
    return jnp.mean(jnp.sum((u - after) ** 2, axis=rows) / (moved + jnp.finfo(u.dtype).tiny))


Term = Callable[[Context, Trajectory, Trajectory, Array], Array]
TERMS: dict[str, Term] = {
    "state": state,
    "spectrum": spectrum,
    "dissipation": dissipation,
    "transfer": transfer,
    "temperature": temperature,
    "phases": phases,
    "residual": residual,
}
"""The terms by the name that `train.loss` gives them."""

PERIODIC = ("spectrum", "transfer")
"""Terms that count Fourier modes."""


def check_terms(weights: Mapping[str, float], solver: AbstractSolver) -> None:
    """Raises `ValueError` (`name: sentence`) where a term does not make sense for a solver."""
    for name in weights:
        if name in PERIODIC and not all(solver.grid.periodic):
            raise ValueError(
                f"{name}: counts Fourier modes, so it needs boundaries that are periodic along every axis; leave it out"
            )
        if name in ("temperature", "phases") and not is_gas(solver.variables):
            raise ValueError(f"{name}: only a gas has temperatures, the equation of this run does not; leave it out")
        if name == "transfer" and is_gas(solver.variables):
            raise ValueError(
                "transfer: the flux of kinetic energy through scales is defined for incompressible flow and KS, not for a gas"
            )
