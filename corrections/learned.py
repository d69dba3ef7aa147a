"""F = U² net(u / U): a network at a place."""

from typing import Literal

import equinox as eqx
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray

from hybridsim.contract import Flux, Variable, View
from hybridsim.corrections.networks import CNN, Activation

COMPONENTS = "uvw"
"""Names of the velocity channels; every other channel is a scalar."""


class LearnedFlux(Flux):
    """F[a, c] = U² CNN(u / U)[a, c]: a learned stress, whose divergence the solver takes, and U C CNN[a, c] for scalars.

    The network sees the velocity at the cell centres and gives a tensor there, which moves to the flux points by averages; the
    same file therefore serves staggered and spectral solvers, in one to three dimensions. Passive scalars c are seen as c / C and
    get fluxes of their own.

    **Arguments:**

    - `dims`, `variables`: space dimensions, and the channels (given by the experiment; without `variables`, the velocity alone).
    - `width`, `depth`, `kernel`, `activation`: of the `CNN`.
    - `velocity_scale`: U, a typical speed; makes the network's input and output of order one.
    - `inputs`: `velocity`, or `gradient` (Δx ∂_a u_c and Δx ∂_a c: Galilean-invariant).
    - `symmetric`: F[a, c] = F[c, a] for the velocity, so that a local torque cannot arise.
    - `scalar_scale`: C, a typical variation of the scalars.

    Sums of every channel are conserved to rounding for any weights. Nothing bounds the energy that it may add.
    """

    network: CNN
    velocity_scale: float = eqx.field(static=True)
    inputs: str = eqx.field(static=True)
    symmetric: bool = eqx.field(static=True)
    scalar_scale: float = eqx.field(static=True)
    scalars: tuple[str, ...] = eqx.field(static=True)

    def __init__(
        self,
        dims: int = 2,
        width: int = 16,
        depth: int = 3,
        kernel: int = 3,
        activation: Activation = "gelu",
        velocity_scale: float = 1.0,
        inputs: Literal["velocity", "gradient"] = "velocity",
        symmetric: bool = True,
        scalar_scale: float = 1.0,
        *,
        variables: tuple[Variable, ...] | None = None,
        key: PRNGKeyArray,
    ):
        names = list(COMPONENTS[:dims]) if variables is None else [v.name for v in variables]
        if missing := [q for q in COMPONENTS[:dims] if q not in names]:
            raise ValueError(f"LearnedFlux: needs velocity channels; this solver has {', '.join(names)}, no {missing[0]}")
        for name, value in (("velocity_scale", velocity_scale), ("scalar_scale", scalar_scale)):
            if not (np.isfinite(value) and value > 0):
                raise ValueError(f"{name}: must be positive and finite, found {value}")
        self.scalars = tuple(name for name in names if name not in COMPONENTS[:dims])
        per_scalar_in = 1 if inputs == "velocity" else dims
        channels_in = (dims + len(self.scalars)) * per_scalar_in
        channels_out = (dims * (dims + 1) // 2 if symmetric else dims * dims) + dims * len(self.scalars)
        self.network = CNN(dims, channels_in, channels_out, width, depth, kernel, activation, key=key)
        self.velocity_scale = float(velocity_scale)
        self.inputs = inputs
        self.symmetric = symmetric
        self.scalar_scale = float(scalar_scale)

    def __call__(self, view: View, memory=None, key=None) -> Float[Array, "axis c *grid"]:
        dims, grid = view.grid.ndim, view.grid.shape
        names = [v.name for v in view.variables]
        if sorted(names) != sorted((*COMPONENTS[:dims], *self.scalars)):
            raise ValueError(f"LearnedFlux: made for {', '.join((*COMPONENTS[:dims], *self.scalars))}; found {', '.join(names)}")
        velocity, scalars = ([names.index(q) for q in some] for some in (COMPONENTS[:dims], self.scalars))
        if self.inputs == "velocity":
            values = view.centred()
            features = [_rows(values, velocity), _rows(values, scalars)]
        else:
            spacing = jnp.asarray(view.grid.spacing, view.u.dtype).reshape(dims, *(1,) * (dims + 1))
            values = jnp.swapaxes(spacing * view.to_centre(view.gradient()), 0, 1)
            features = [jnp.swapaxes(_rows(values, some), 0, 1).reshape(-1, *grid) for some in (velocity, scalars)]
        features = jnp.concatenate([features[0] / self.velocity_scale, features[1] / self.scalar_scale])
        out = self.network(features, view.grid.periodic)
        count = out.shape[0] - dims * len(scalars)
        stress = self.velocity_scale**2 * out[:count]
        if self.symmetric:
            index = {1: [[0]], 2: [[0, 1], [1, 2]], 3: [[0, 1, 2], [1, 3, 4], [2, 4, 5]]}[dims]
            stress = jnp.stack([jnp.stack([stress[i] for i in row]) for row in index])
        else:
            stress = stress.reshape(dims, dims, *grid)
        fluxes = self.velocity_scale * self.scalar_scale * out[count:].reshape(dims, -1, *grid)
        by_channel = jnp.swapaxes(jnp.concatenate([stress, fluxes], axis=1), 0, 1)
        order = [[*velocity, *scalars].index(c) for c in range(len(names))]
        return view.to_flux_points(jnp.swapaxes(_rows(by_channel, order), 0, 1))


def _rows(array: Float[Array, "c *rest"], which: list[int]) -> Float[Array, "k *rest"]:
    """The rows `which`; a slice, not a gather, where they follow one another."""
    first = which[0] if which else 0
    if which == list(range(first, first + len(which))):
        return array[first : first + len(which)]
    return jnp.stack([array[c] for c in which])
