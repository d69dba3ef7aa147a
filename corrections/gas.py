"""(ρ, v, T, c) from (ρ, ρv, E, ρc): a gas as closures see it.

A state is a gas if its channels are `density`, `momentum_x` …, `energy`, in this order, all at the cell centres; further channels
are densities ρc of passive scalars. Temperature is T = p/ρ, and γ is that of the solver's equation.
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float

from hybridsim.contract import View

MOMENTA = ("momentum_x", "momentum_y", "momentum_z")


def gas_channels(dims: int) -> tuple[str, ...]:
    """The channels of a gas without scalars."""
    return ("density", *MOMENTA[:dims], "energy")


def is_gas(names: Sequence[str], dims: int) -> bool:
    """Whether channels of these names are those of a gas."""
    return tuple(names[: dims + 2]) == gas_channels(dims)


class Gas(NamedTuple):
    """A gas at the cell centres: ρ, the components of v, T, the mass fractions c of the scalars, and γ."""

    density: Float[Array, "*grid"]
    velocity: list[Array]
    temperature: Float[Array, "*grid"]
    fractions: list[Array]
    gamma: Array


def gas_of(view: View) -> Gas:
    """v = (ρv)/ρ, T = (γ − 1)(E/ρ − ½v²), c = (ρc)/ρ; where there is no gas, ρ ≤ 0, as if ρ were 1."""
    d = view.grid.ndim
    gamma = jnp.asarray(view.solver.equation.gamma, view.u.dtype)  # pyright: ignore[reportAttributeAccessIssue]
    per_mass = 1 / jnp.where(view.u[0] > 0, view.u[0], 1)
    velocity = [per_mass * m for m in view.u[1 : d + 1]]
    energy = per_mass * view.u[d + 1]
    for q in velocity:
        energy = energy - 0.5 * q * q
    return Gas(view.u[0], velocity, (gamma - 1) * energy, [per_mass * s for s in view.u[d + 2 :]], gamma)


def carried(gas: Gas, change: Sequence[Array]) -> Float[Array, "c *grid"]:
    """(J, σ + Jv, q + σ·v + ½Jv², j + Jc): a change of the conserved channels from one in the frame of the gas.

    **Arguments:** `change`: mass J, momentum σ, energy q and scalars j at the cell centres, as an observer who moves with the gas
    sees them. Other observers see what Galilei's transformation makes of it.
    """
    d = len(gas.velocity)
    mass, force, energy = change[0], change[1 : d + 1], change[d + 1]
    momentum = [f + mass * v for f, v in zip(force, gas.velocity, strict=True)]
    for f, v in zip(force, gas.velocity, strict=True):
        energy = energy + (f + 0.5 * mass * v) * v
    scalars = [s + mass * c for s, c in zip(change[d + 2 :], gas.fractions, strict=True)]
    return jnp.stack([mass, *momentum, energy, *scalars])
