"""F = −K H with K + Kᵀ ≥ 0: fluxes that never add energy, whatever made them."""

from collections.abc import Sequence
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray, PyTree

from hybridsim.contract import AbstractClosure, Flux, View, place_of
from hybridsim.corrections.gas import gas_of, is_gas

VELOCITY = ("u", "v", "w")
"""Channels whose energies are one."""


def _unit(q: Float[Array, "axis c *grid"], axes: tuple[int, ...]) -> tuple[Array, Array]:
    """(q/|q|, |q|) with |q|² = Σ q² over `axes`, without overflow; (0, 0) and no slope at q = 0."""
    largest = jax.lax.stop_gradient(jnp.max(jnp.abs(q), axis=axes, keepdims=True))
    moves = largest > 0
    scaled = q / jnp.where(moves, largest, 1)
    length = jnp.sqrt(jnp.where(moves, jnp.sum(scaled * scaled, axis=axes, keepdims=True), 1))
    return scaled / length, jnp.where(moves, largest * length, 0)


def nearest_dissipative(
    flux: Float[Array, "axis c *grid"],
    slope: Float[Array, "axis c *grid"],
    viscosity: Float[Array, ""],
    axes: tuple[int, ...],
    root: Float[Array, "axis_or_1 c_or_1 *grid_or_1"] | float = 1.0,
) -> Float[Array, "axis c *grid"]:
    """The F nearest to `flux` with Σ (H F + |w F|²/ν) ≤ 0: a ball about −½ν H/w² of radius ½ν |H/w|, seen in w F.

    **Arguments:** `slope` H; `viscosity` ν > 0; `axes`, over which the sum goes: each block has its own ball; `root` w. What lies
    in the ball stays as it is to the last bit, F = 0 too, though it lies on the sphere.
    """
    flux_w, slope_w = root * flux, slope / root
    work = jnp.sum(slope_w * flux_w + flux_w * flux_w / viscosity, axis=axes, keepdims=True)
    # False where the square has overflowed
    inside = work <= 0
    direction, _ = _unit(flux_w + 0.5 * viscosity * slope_w, axes)
    _, steepness = _unit(slope_w, axes)
    on_sphere = 0.5 * viscosity * (steepness * direction - slope_w)
    return jnp.where(inside, flux, on_sphere / root)


def _tamed(view: View, flux: Float[Array, "axis c *grid"]) -> Float[Array, "axis c *grid"]:
    """The flux with numbers that can be squared up after scaling, and nothing on walls and open sides, where no solver looks."""
    most = jnp.asarray(np.finfo(flux.dtype).max / 8, flux.dtype)
    flux = jnp.clip(jnp.where(jnp.isnan(flux), 0, flux), -most, most)
    grid = view.grid
    if all(grid.periodic):
        return flux
    columns = []
    for a in range(grid.ndim):
        for c in range(flux.shape[1]):
            q = flux[a, c]
            for axis, (n, at) in enumerate(zip(grid.shape, view.flux_place(a, c), strict=True)):
                if at == 1 and not grid.periodic[axis]:
                    q = jnp.where(jax.lax.broadcasted_iota(jnp.int32, grid.shape, axis) == n - 1, 0, q)
            columns.append(q)
    return jnp.stack(columns).reshape(flux.shape)


class Structured(Flux):
    """F = −K H, K + Kᵀ ≥ 0, |F|² ≤ ν (−H·F),  ν = 2c/(τΛ): any flux, made dissipative and small enough for its time step.

    Let R F be the rate of change that the solver makes of a flux F (divergence, masks, sides, projection), and H = Rᵀu, which is ∇u
    at the flux points but for masks and sides. In the time τ for which F acts, ½|u|² gains τ H·F + ½τ² |R F|², at most
    τ (H·F + ½τΛ |F|²) if Λ ≥ max |R F|²/|F|². So it falls if F lies in the ball about −½ν H of radius ½ν |H|. Every point of this
    ball is −αH + SH with α ≥ 0 and a skew-symmetric S, and every such form within the limit is in it: what is negative-definite and
    what is skew-symmetric need not be told apart. −νH itself is the largest eddy viscosity that the time step bears; with
    differences on cubic cells ν = c Δx²/(2dτ).

    **Arguments:**

    - `closure`: any Flux closure; it is called first, with its own memory and random key. A flux in the ball stays as it is, any
      other becomes the nearest point of the ball.
    - `form`: `pointwise`, where the fluxes stored at one index have a ball of their own (on staggered grids they lie up to half a
      cell apart): none adds energy anywhere. `average`: one ball for the whole box: energy may flow back to the resolved flow here
      and there, but not in total, and no flux is bounded by itself.
    - `c`: the share of the diffusive limit, 0 < c ≤ 1.

    The velocity has one ball (per point or box) and every passive scalar another, where its variance takes the energy's place.

    **Guaranteed** to rounding, for any weights: the closure alone raises neither energy nor variance in a forward Euler step; nor
    in `ssprk2` and `ssprk3`, which are means of such steps, with `evaluate: stage`; nor with its output held for whole steps of any
    Runge–Kutta method. Beside what else the solver adds, N, a forward Euler step with c ≤ ½ ends with no more than
    ½|u|² + Δt u·N + Δt² |N|². There is no such proof for stages of `vl2` and of exponential or implicit-explicit methods. Several
    such closures in a model share the limit: let their c add up to no more than one. With `fixed` sides the energy is that of the
    whole velocity, and a face at outflow counts half.

    **In a gas** ½Σ|ρv|²/ρ takes the energy's place, ½Σ(ρc)²/ρ the variance's; H is the slope of v and c, and |F|² weighs each face
    with the mean of 1/ρ. No mass flows, the heat flux stays as it is, and the energy flux is that of the new stress: kinetic energy
    becomes heat, and the total is conserved. Nothing bounds the heat flux.

    Sums are conserved as with any Flux. An untrained network stays no closure to the last bit, and its slope is that of the network
    alone; outside the ball there is no slope along its normal. Slopes are finite everywhere. NaN counts as zero, and infinity as a
    large number. Closures that are negative-definite plus skew-symmetric by their architecture: van Gastelen, Edeling & Sanderse
    2025, arXiv:2504.05868.
    """

    closure: AbstractClosure
    form: str = eqx.field(static=True, default="pointwise")
    c: float = eqx.field(static=True, default=0.5, converter=float)

    def __check_init__(self):
        if (place := place_of(self.closure)) is not Flux:
            raise ValueError(
                f"structure: {type(self.closure).__name__} is a {place.__name__} closure, and only Flux closures can have one"
            )
        if self.form not in ("pointwise", "average"):
            raise ValueError(f"structure.form: possible are pointwise, average; found {self.form!r}")
        if not 0 < self.c <= 1:
            raise ValueError(f"structure.c: needs a number > 0 and ≤ 1, found {self.c}")

    @property
    def stochastic(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.closure.stochastic

    def init_memory(self, view: View) -> PyTree | None:
        return self.closure.init_memory(view)

    def __call__(self, view: View, memory: PyTree | None = None, key: PRNGKeyArray | None = None) -> Any:
        out = self.closure(view, memory, key)
        raw, new = (out, None) if memory is None else out
        # A wrong shape is the model's to report.
        wanted = (view.grid.ndim, *view.u.shape)
        flux = self._bounded(view, _tamed(view, raw.astype(view.u.dtype))) if raw.shape == wanted else raw
        return flux if memory is None else (flux, new)

    def _bounded(self, view: View, flux: Float[Array, "axis c *grid"]) -> Float[Array, "axis c *grid"]:
        names = [v.name for v in view.variables]
        if is_gas(names, view.grid.ndim):
            return self._bounded_gas(view, flux)
        velocity = [c for c, name in enumerate(names) if name in VELOCITY]
        others = [[c] for c in range(len(names)) if c not in velocity]
        return self._by_blocks(view, flux, view.adjoint_gradient(), [velocity, *others] if velocity else others)

    def _by_blocks(
        self,
        view: View,
        flux: Float[Array, "axis c *grid"],
        slope: Float[Array, "axis c *grid"],
        blocks: Sequence[Sequence[int]],
        root: Float[Array, "axis 1 *grid"] | float = 1.0,
    ) -> Float[Array, "axis c *grid"]:
        """Each block of channels in its own ball, or balls."""
        viscosity = 2 * self.c / (view.held * view.dt * view.solver.flux_response)
        axes = (0, 1) if self.form == "pointwise" else tuple(range(flux.ndim))
        columns: dict[int, Array] = {}
        for block in blocks:
            rows, slopes = (jnp.stack([q[:, c] for c in block], axis=1) for q in (flux, slope))
            found = nearest_dissipative(rows, slopes, viscosity, axes, root)
            for i, c in enumerate(block):
                columns[c] = found[:, i]
        return jnp.stack([columns[c] for c in range(flux.shape[1])], axis=1)

    def _bounded_gas(self, view: View, flux: Float[Array, "axis c *grid"]) -> Float[Array, "axis c *grid"]:
        """F = (0, σ, F_E + (σ − F_m)·v + ½J v², j) of F = (J, F_m, F_E, F_c), with σ and j from F_m − J v and F_c − J c."""
        gas, d = gas_of(view), view.grid.ndim
        specific = [*gas.velocity, *gas.fractions]
        lightness = 1 / jnp.where(gas.density > 0, gas.density, 1)
        carried, roots = [], []
        for a in range(d):
            place = view.flux_place(a, 0)
            carried.append(jnp.stack([view.to(q, view.grid.centre, place) for q in specific]))
            roots.append(jnp.sqrt(view.to(lightness, view.grid.centre, place))[None])
        at_faces, mass = jnp.stack(carried), flux[:, :1]
        given = jnp.concatenate([flux[:, 1 : d + 1], flux[:, d + 2 :]], axis=1)
        blocks = [range(d), *([c] for c in range(d, len(specific)))]
        slopes = view.solver.adjoint_gradient(jnp.stack(specific))
        new = self._by_blocks(view, given - mass * at_faces, slopes, blocks, jnp.stack(roots))
        velocity = at_faces[:, :d]
        work = (new[:, :d] - given[:, :d] + 0.5 * mass * velocity) * velocity
        energy = flux[:, d + 1 : d + 2] + jnp.sum(work, axis=1, keepdims=True)
        return jnp.concatenate([jnp.zeros_like(mass), new[:, :d], energy, new[:, d:]], axis=1)
