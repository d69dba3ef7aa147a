"""U net(u / U): one network at each of the five places."""

from typing import Literal

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray

from hybridsim.contract import AbstractClosure, Flux, Interpolation, Place, PostStep, Replacement, Source, Variable, View
from hybridsim.corrections.eddy import filter_width
from hybridsim.corrections.gas import MOMENTA, carried, gas_of, is_gas
from hybridsim.corrections.networks import Activation, Network, NetworkFactory, make_network

COMPONENTS = "uvw"
"""Names of the velocity channels where the flow is no gas; every other channel is a scalar."""

Inputs = Literal["velocity", "gradient"]

SMALLEST = 1e-12
"""What a network sees of densities and temperatures that are smaller still, in their scales: cells that have lost their gas."""


class Scaling(eqx.Module):
    """u ↔ (u/U, c/C), or u ↔ (v/U, ln ρ/ρ₀, ln T/T₀, c/C) in a gas: a flow in numbers of order one, as a network wants it.

    **Arguments:**

    - `closure`: who asks; its name is in what is said of mistakes.
    - `dims`, `variables`: space dimensions, and the channels (None: the velocity alone).
    - `inputs`: `velocity` (these numbers themselves) or `gradient` (Δx times their derivatives, which does not know of mean flows).
    - `velocity`, `scalar`, `density`, `temperature`: U, C, ρ₀, T₀.
    """

    names: tuple[str, ...] = eqx.field(static=True)
    gas: bool = eqx.field(static=True)
    closure: str = eqx.field(static=True)
    inputs: str = eqx.field(static=True)
    velocity: float = eqx.field(static=True)
    scalar: float = eqx.field(static=True)
    density: float = eqx.field(static=True)
    temperature: float = eqx.field(static=True)
    vector: tuple[int, ...] = eqx.field(static=True)
    others: tuple[int, ...] = eqx.field(static=True)

    def __init__(
        self,
        closure: str,
        dims: int,
        variables: tuple[Variable, ...] | None,
        inputs: str,
        *,
        velocity: float,
        scalar: float,
        density: float,
        temperature: float,
    ):
        names = tuple(COMPONENTS[:dims]) if variables is None else tuple(v.name for v in variables)
        self.gas = is_gas(names, dims)
        vector = MOMENTA[:dims] if self.gas else tuple(COMPONENTS[:dims])
        if missing := [q for q in vector if q not in names]:
            raise ValueError(f"{closure}: needs velocity channels; this solver has {', '.join(names)}, no {missing[0]}")
        scales = {"velocity": velocity, "scalar": scalar, "density": density, "temperature": temperature}
        for name, value in scales.items():
            if not (np.isfinite(value) and value > 0):
                raise ValueError(f"{name}_scale: must be positive and finite, found {value}")
        if inputs not in ("velocity", "gradient"):
            raise ValueError(f"inputs: possible are velocity, gradient; found {inputs!r}")
        self.names, self.closure, self.inputs = names, closure, inputs
        self.vector = tuple(names.index(q) for q in vector)
        self.others = tuple(c for c in range(len(names)) if c not in self.vector)
        self.velocity, self.scalar = float(velocity), float(scalar)
        self.density, self.temperature = float(density), float(temperature)

    @property
    def inputs_count(self) -> int:
        return len(self.names) * (1 if self.inputs == "velocity" else len(self.vector))

    def features(self, view: View) -> Float[Array, "inputs *grid"]:
        """What the network sees: velocities first, then the others; slopes along the first axis first."""
        names = tuple(v.name for v in view.variables)
        if names != self.names:
            raise ValueError(f"{self.closure}: made for {', '.join(self.names)}; found {', '.join(names)}")
        dims, grid, centre = view.grid.ndim, view.grid.shape, view.grid.centre
        spacing = jnp.asarray(view.grid.spacing, view.u.dtype)
        if self.gas:
            gas = gas_of(view)
            logarithm = lambda q, scale: jnp.log(jnp.maximum(q / scale, SMALLEST))  # noqa: E731
            states = [logarithm(gas.density, self.density), logarithm(gas.temperature, self.temperature)]
            groups = [gas.velocity, states, gas.fractions]
            if self.inputs == "velocity":
                groups = [jnp.stack(group) if group else jnp.zeros((0, *grid), view.u.dtype) for group in groups]
            else:
                slope = lambda q, a: spacing[a] * view.to(*view.derivative(q, centre, a), centre)  # noqa: E731
                slopes = [[slope(q, a) for a in range(dims) for q in group] for group in groups]
                groups = [jnp.stack(group) if group else jnp.zeros((0, *grid), view.u.dtype) for group in slopes]
            return jnp.concatenate([groups[0] / self.velocity, groups[1], groups[2] / self.scalar])
        if self.inputs == "velocity":
            values = view.centred()
            groups = [_rows(values, some) for some in (self.vector, self.others)]
        else:
            values = jnp.swapaxes(spacing.reshape(dims, *(1,) * (dims + 1)) * view.to_centre(view.gradient()), 0, 1)
            groups = [jnp.swapaxes(_rows(values, some), 0, 1).reshape(-1, *grid) for some in (self.vector, self.others)]
        return jnp.concatenate([groups[0] / self.velocity, groups[1] / self.scalar])

    def change(self, view: View, parts: Float[Array, "c *grid"], at: Place | None = None) -> Float[Array, "c *grid"]:
        """A change of the state from numbers of order one: (U, C) parts, or in a gas ρ (1, U, U², C) parts in the frame of the gas.

        All of them are at the cell centres, or `at` another place, to which the gas moves by averages.
        """
        d = view.grid.ndim
        if not self.gas:
            return jnp.stack([(self.velocity if c in self.vector else self.scalar) * q for c, q in enumerate(parts)])
        gas = gas_of(view)
        if at is not None:
            place = at
            gas = jax.tree.map(lambda q: view.to(q, view.grid.centre, place) if q.ndim else q, gas)
        density = jnp.maximum(gas.density, 0)
        units = (1.0, *(self.velocity,) * d, self.velocity**2, *(self.scalar,) * (len(self.names) - d - 2))
        return carried(gas, [unit * density * q for unit, q in zip(units, parts, strict=True)])


def _rows(array: Float[Array, "c *rest"], which: tuple[int, ...]) -> Float[Array, "k *rest"]:
    """The rows `which`; a slice, not a gather, where they follow one another."""
    first = which[0] if which else 0
    if which == tuple(range(first, first + len(which))):
        return array[first : first + len(which)]
    return jnp.stack([array[c] for c in which])


# --- Flux ------------------------------------------------------------------------------------------------------------------------


class LearnedFlux(Flux):
    """F[a, c] = U² net(u / U)[a, c]: a learned stress, whose divergence the solver takes, and U C net[a, c] for scalars.

    The network sees the velocity at the cell centres and gives a tensor there, which moves to the flux points by averages; the
    same file therefore serves staggered and spectral solvers, in one to three dimensions. Passive scalars c are seen as c / C and
    get fluxes of their own. An average of neighbours hides the shortest waves (a factor of cos(kΔx/2)), which the network has to
    make up for; with `staggered` its numbers are those at the flux points themselves, and no average is taken.

    **In a gas** it sees v/U, ln(ρ/ρ₀), ln(T/T₀) and c/C, and gives the flux ρU of mass, ρU² of momentum, ρU³ of heat and ρUC of
    scalars, each times a number of order one, to an observer who moves with the gas: F = (J, σ + Jv, q + σ·v + ½Jv², j + Jc). With
    inputs `gradient` the closure is invariant under Galilei's transformation. Turning the flow by 90° is another flow to a network;
    none of them knows of rotations or reflections.

    **Arguments:**

    - `dims`, `variables`: space dimensions, and the channels (given by the experiment; without `variables`, the velocity alone).
    - `width`, `depth`, `kernel`, `activation`: of the `CNN` that is the network where none is named.
    - `network`: another one in its place: `use:` a name (see `hybridsim list networks`) or a class of one's own, with its
      arguments; in Python a class, or `functools.partial(UNet, width=8)`.
    - `velocity_scale`: U, a typical speed; makes the network's input and output of order one.
    - `inputs`: `velocity`, or `gradient` (Δx ∂_a u_c and Δx ∂_a c: Galilean-invariant).
    - `symmetric`: F[a, c] = F[c, a] for the velocity (σ of a gas), so that a local torque cannot arise.
    - `scalar_scale`: C, a typical variation of the scalars.
    - `density_scale`, `temperature_scale`: ρ₀, T₀, typical values in a gas; T is p/ρ.
    - `mass_flux`: whether J of a gas is learned, or zero as in filtered equations with Favre's mean velocities.
    - `staggered`: whether the network's numbers are those at the flux points; what it learns is then for one kind of grid. In a gas
      σ is not symmetric then, as F[a, c] and F[c, a] are at different faces.

    Sums of every channel are conserved to rounding for any weights, the total energy of a gas among them. What bounds the kinetic
    energy that it may add is a `structure` around it.
    """

    network: Network
    scaling: Scaling
    symmetric: bool = eqx.field(static=True)
    mass_flux: bool = eqx.field(static=True)
    staggered: bool = eqx.field(static=True)

    def __init__(
        self,
        dims: int = 2,
        width: int = 16,
        depth: int = 3,
        kernel: int = 3,
        activation: Activation = "gelu",
        velocity_scale: float = 1.0,
        inputs: Inputs = "velocity",
        symmetric: bool = True,
        scalar_scale: float = 1.0,
        density_scale: float = 1.0,
        temperature_scale: float = 1.0,
        mass_flux: bool = True,
        network: NetworkFactory | None = None,
        staggered: bool = False,
        *,
        variables: tuple[Variable, ...] | None = None,
        key: PRNGKeyArray,
    ):
        self.scaling = Scaling(
            "LearnedFlux",
            dims,
            variables,
            inputs,
            velocity=velocity_scale,
            scalar=scalar_scale,
            density=density_scale,
            temperature=temperature_scale,
        )
        if self.scaling.gas and symmetric and staggered:
            raise ValueError(
                "symmetric: not possible with staggered fluxes of a gas, which are at different faces; choose one of the two"
            )
        self.symmetric, self.mass_flux, self.staggered = symmetric, mass_flux, staggered
        stresses = dims * (dims + 1) // 2 if symmetric else dims * dims
        channels = stresses + dims * len(self._others)
        own = {"width": width, "depth": depth, "kernel": kernel, "activation": activation}
        self.network = make_network(network, dims, self.scaling.inputs_count, channels, **own, key=key)

    @property
    def scalars(self) -> tuple[str, ...]:
        """The channels that are no velocity or momentum, and get a flux."""
        return tuple(self.scaling.names[c] for c in self._others)

    @property
    def _others(self) -> tuple[int, ...]:
        without = 1 if self.scaling.gas and not self.mass_flux else 0
        return self.scaling.others[without:]

    def __call__(self, view: View, memory=None, key=None) -> Float[Array, "axis c *grid"]:
        dims, grid = view.grid.ndim, view.grid.shape
        scaling = self.scaling
        out = self.network(scaling.features(view), view.grid.periodic)
        count = out.shape[0] - dims * len(self._others)
        if self.symmetric:
            index = {1: [[0]], 2: [[0, 1], [1, 2]], 3: [[0, 1, 2], [1, 3, 4], [2, 4, 5]]}[dims]
            stress = [[out[i] for i in row] for row in index]
        else:
            stress = list(out[:count].reshape(dims, dims, *grid))
        fluxes = out[count:].reshape(dims, len(self._others), *grid)
        rows = []
        for a in range(dims):
            parts = dict(zip((*scaling.vector, *self._others), (*stress[a], *fluxes[a]), strict=True))
            zero = jnp.zeros(grid, view.u.dtype)
            at = view.flux_place(a, 0) if self.staggered else None
            row = scaling.change(view, jnp.stack([parts.get(c, zero) for c in range(len(scaling.names))]), at)
            rows.append(scaling.velocity * row)
        flux = jnp.stack(rows)
        return flux if self.staggered else view.to_flux_points(flux)


# --- Source, PostStep, Replacement -----------------------------------------------------------------------------------------------


class _PerChannel(AbstractClosure):
    """Shared by the places that take one array per channel: s = (U/Δ) (U, C) net, and in a gas (U/Δ) ρ (1, U, U², C) net."""

    network: Network
    scaling: Scaling

    def __init__(
        self,
        dims: int = 2,
        width: int = 16,
        depth: int = 3,
        kernel: int = 3,
        activation: Activation = "gelu",
        velocity_scale: float = 1.0,
        inputs: Inputs = "velocity",
        scalar_scale: float = 1.0,
        density_scale: float = 1.0,
        temperature_scale: float = 1.0,
        network: NetworkFactory | None = None,
        *,
        variables: tuple[Variable, ...] | None = None,
        key: PRNGKeyArray,
    ):
        self.scaling = Scaling(
            type(self).__name__,
            dims,
            variables,
            inputs,
            velocity=velocity_scale,
            scalar=scalar_scale,
            density=density_scale,
            temperature=temperature_scale,
        )
        channels = len(self.scaling.names)
        own = {"width": width, "depth": depth, "kernel": kernel, "activation": activation}
        self.network = make_network(network, dims, self.scaling.inputs_count, channels, **own, key=key)

    def _rate(self, view: View) -> Float[Array, "c *grid"]:
        """The network's output as a rate of change of every channel, at its own place."""
        scaling, centre = self.scaling, view.grid.centre
        out = self.network(scaling.features(view), view.grid.periodic)
        rate = scaling.velocity / filter_width(view) * scaling.change(view, out)
        return jnp.stack([view.to(q, centre, v.at) for q, v in zip(rate, view.variables, strict=True)])


class LearnedSource(_PerChannel, Source):
    """s[c] = (U²/Δ) net(u / U)[c]: a learned force, and (U C/Δ) net for scalars; added to the right-hand side, before projection.

    For what no flux can say: forces, reactions, heating. The network sees what it does in `LearnedFlux`; in a gas it gives sources
    of mass, momentum, energy and scalars, ρU/Δ (1, U, U², C) times numbers of order one, to an observer who moves with the gas;
    Δ = (Π Δx_a)^(1/d).

    **Arguments:** those of `LearnedFlux`, but for `symmetric` and `mass_flux`.

    No sum is conserved.
    """

    def __call__(self, view: View, memory=None, key=None) -> Float[Array, "c *grid"]:
        return self._rate(view)


class LearnedCorrection(_PerChannel, PostStep):
    """u ← P(u + Δt (U²/Δ) net(u / U)): a learned correction after each step of the solver (Um et al. 2020, arXiv:2007.00016).

    The network sees and gives what it does in `LearnedSource`, once per step instead of once per stage.

    **Arguments:** those of `LearnedFlux`, but for `symmetric` and `mass_flux`.

    No sum is conserved.
    """

    def __call__(self, view: View, memory=None, key=None) -> Float[Array, "c *grid"]:
        return view.dt * self._rate(view)


class LearnedStep(_PerChannel, Replacement):
    """u ← P(u + Δt (U²/Δ) net(u / U)): a network instead of a solver (Stachenfeld et al. 2022, arXiv:2112.15275).

    The step may be much longer than a solver's; forces, viscosity and boundaries have to be learnt. The network sees and gives what
    it does in `LearnedSource`. It needs `velocity` as inputs: gradients do not say how fast the flow is carried past the grid.

    **Arguments:** those of `LearnedFlux`, but for `symmetric` and `mass_flux`.

    No sum is conserved, and untrained nothing moves. Stands alone, without other closures.
    """

    def __call__(self, view: View, memory=None, key=None) -> Float[Array, "c *grid"]:
        return view.dt * self._rate(view)


# --- Interpolation ---------------------------------------------------------------------------------------------------------------


class LearnedInterpolation(Interpolation):
    """w = w_scheme + Σ_f a_f Z_f · cells,  a = b tanh(net(u / U)): learned weights of the values at the faces.

    Z_f are combinations of the cells around a face that vanish for polynomials below the scheme's order, so the order stays with
    any weights (Bar-Sinai et al. 2019, doi:10.1073/pnas.1814058116; Kochkov et al. 2021, doi:10.1073/pnas.2101784118). The network
    sees what it does in `LearnedFlux`, and its output moves from the cell centres to the faces by averages.

    **Arguments:**

    - `dims`, `variables`, `free_weights`: given by the experiment; the last is the number of coefficients per face, side and
      channel.
    - `width`, `depth`, `kernel`, `activation`, `network`, `velocity_scale`, `inputs`, `scalar_scale`, `density_scale`,
      `temperature_scale`: as in `LearnedFlux`.
    - `bound`: b > 0, the largest |a|. In a gas linear advection stays stable up to 0.25 with `plm_*` (without limiter, up to 0.5)
      and `weno5z` (with its ideal weights) for any constant a; with `ppm` no bound is safe. 0.19 leads from `plm_*` to third order.
      On the staggered grid of incompressible flow an a may take from what `van_leer` dissipates or `central` keeps: there nothing
      but viscosity and training makes a run stable.
    - `shared`: whether all channels have the same coefficients, which makes the network smaller.

    Conserves what the solver conserves. Limiters that the scheme has act on its own part only, so shocks may ring.
    """

    network: Network
    scaling: Scaling
    free: int = eqx.field(static=True)
    bound: float = eqx.field(static=True)
    shared: bool = eqx.field(static=True)

    def __init__(
        self,
        dims: int = 2,
        width: int = 16,
        depth: int = 3,
        kernel: int = 3,
        activation: Activation = "gelu",
        velocity_scale: float = 1.0,
        inputs: Inputs = "velocity",
        scalar_scale: float = 1.0,
        density_scale: float = 1.0,
        temperature_scale: float = 1.0,
        bound: float = 0.25,
        shared: bool = True,
        network: NetworkFactory | None = None,
        *,
        free_weights: int,
        variables: tuple[Variable, ...] | None = None,
        key: PRNGKeyArray,
    ):
        if not (np.isfinite(bound) and bound > 0):
            raise ValueError(f"bound: must be positive and finite, found {bound}")
        if free_weights < 1:
            raise ValueError("LearnedInterpolation: the solver has no face interpolation with free coefficients")
        self.scaling = Scaling(
            "LearnedInterpolation",
            dims,
            variables,
            inputs,
            velocity=velocity_scale,
            scalar=scalar_scale,
            density=density_scale,
            temperature=temperature_scale,
        )
        self.free, self.bound, self.shared = free_weights, float(bound), shared
        channels = dims * 2 * free_weights * (1 if shared else len(self.scaling.names))
        own = {"width": width, "depth": depth, "kernel": kernel, "activation": activation}
        self.network = make_network(network, dims, self.scaling.inputs_count, channels, **own, key=key)

    def __call__(self, view: View, memory=None, key=None) -> Float[Array, "axis side c free *grid"]:
        grid, centre, count = view.grid, view.grid.centre, len(self.scaling.names)
        out = self.bound * jnp.tanh(self.network(self.scaling.features(view), grid.periodic))
        axes = []
        for a, weights in enumerate(out.reshape(grid.ndim, 2, -1, self.free, *grid.shape)):
            places = [view.flux_place(a, c) for c in range(count)]
            alike = len(set(places)) == 1
            rows = []
            for c in range(1 if self.shared and alike else count):
                coefficients = weights[:, 0 if self.shared else c].reshape(-1, *grid.shape)
                moved = jax.vmap(lambda q, to=places[c]: view.to(q, centre, to))(coefficients)
                rows.append(moved.reshape(2, self.free, *grid.shape))
            axes.append(jnp.stack(rows, axis=1))
        found = jnp.stack(axes)
        return jnp.broadcast_to(found, (grid.ndim, 2, count, self.free, *grid.shape))
