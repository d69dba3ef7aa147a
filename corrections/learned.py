"""F = U² net(u / U): a network at a place."""

from typing import Literal

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from hybridsim.contract import Flux, View
from hybridsim.corrections.networks import CNN, Activation


class LearnedFlux(Flux):
    """F[a, c] = U² CNN(u / U)[a, c]: a learned stress, whose divergence the solver takes.

    The network sees the velocity at the cell centres and gives a tensor there, which moves to the flux points by averages; the
    same file therefore serves staggered and spectral solvers.

    **Arguments:**

    - `dims`: space dimensions (given by the experiment).
    - `width`, `depth`, `kernel`, `activation`: of the `CNN`.
    - `velocity_scale`: U, a typical speed; makes the network's input and output of order one.
    - `inputs`: `velocity`, or `gradient` (Δx ∂_a u_c: Galilean-invariant).
    - `symmetric`: F[a, c] = F[c, a], so that a local torque cannot arise.

    Sums of every channel are conserved to rounding for any weights. Nothing bounds the energy that it may add.
    """

    network: CNN
    velocity_scale: float = eqx.field(static=True)
    inputs: str = eqx.field(static=True)
    symmetric: bool = eqx.field(static=True)

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
        *,
        key: PRNGKeyArray,
    ):
        channels_in = dims if inputs == "velocity" else dims * dims
        channels_out = dims * (dims + 1) // 2 if symmetric else dims * dims
        self.network = CNN(dims, channels_in, channels_out, width, depth, kernel, activation, key=key)
        self.velocity_scale = float(velocity_scale)
        self.inputs = inputs
        self.symmetric = symmetric

    def __call__(self, view: View, memory=None, key=None) -> Float[Array, "axis c *grid"]:
        dims = view.grid.ndim
        if self.inputs == "velocity":
            features = view.centred()
        else:
            spacing = jnp.asarray(view.grid.spacing, view.u.dtype).reshape(dims, *(1,) * (dims + 1))
            gradient = spacing * view.to_centre(view.gradient())
            features = gradient.reshape(dims * dims, *view.grid.shape)
        out = self.velocity_scale**2 * self.network(features / self.velocity_scale)
        if self.symmetric:
            index = [[0, 1], [1, 2]] if dims == 2 else [[0, 1, 2], [1, 3, 4], [2, 4, 5]]
            tensor = jnp.stack([jnp.stack([out[i] for i in row]) for row in index])
        else:
            tensor = out.reshape(dims, dims, *view.grid.shape)
        return view.to_flux_points(tensor)
