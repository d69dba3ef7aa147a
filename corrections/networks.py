"""(c, *grid) -> (c', *grid): bare networks in one to three dimensions. They know no equation and no place.

Along an axis that is not periodic their input goes on with its outermost value.
"""

from collections.abc import Callable
from typing import Literal

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from hybridsim.convolution import convolution

Activation = Literal["relu", "gelu", "tanh", "silu", "squareplus", "gated"]


def gated(u: Float[Array, "two_w *grid"]) -> Float[Array, "w *grid"]:
    """a tanh(b) for channels (a, b): quadratic for small arguments, as subgrid stresses are, and linear for large ones."""
    a, b = jnp.split(u, 2)
    return a * jnp.tanh(b)


ACTIVATIONS: dict[str, Callable] = {
    "relu": jax.nn.relu,
    "gelu": jax.nn.gelu,
    "tanh": jnp.tanh,
    "silu": jax.nn.silu,
    "squareplus": jax.nn.squareplus,
    "gated": gated,
}


class Convolution(eqx.Module):
    """y = w ∗ u + b: one convolution.

    **Arguments:** `dims`, `channels_in`, `channels_out`, odd `kernel`, `dilation`, a random `key`; `zero` starts at w = b = 0.
    Weights start as He-normal: variance 2 / (channels_in · kernel^dims) (He et al. 2015, doi:10.1109/ICCV.2015.123, eq. 10).
    """

    weights: Float[Array, "o i *kernel"]
    bias: Float[Array, " o"]
    dilation: int = eqx.field(static=True)

    def __init__(
        self,
        dims: int,
        channels_in: int,
        channels_out: int,
        kernel: int = 3,
        dilation: int = 1,
        *,
        key: PRNGKeyArray,
        zero: bool = False,
    ):
        shape = (channels_out, channels_in) + (kernel,) * dims
        scale = 0.0 if zero else (2 / (channels_in * kernel**dims)) ** 0.5
        self.weights = scale * jax.random.normal(key, shape, jnp.float32)
        self.bias = jnp.zeros((channels_out,), jnp.float32)
        self.dilation = dilation

    def __call__(self, u: Float[Array, "i *grid"], periodic: tuple[bool, ...] | None = None) -> Float[Array, "o *grid"]:
        y = convolution(u, self.weights.astype(u.dtype), self.dilation, periodic)
        return y + self.bias.astype(u.dtype).reshape(-1, *(1,) * (u.ndim - 1))


class CNN(eqx.Module):
    """y = W_d σ(W_{d−1} … σ(W_1 u)): a plain convolutional network.

    **Arguments:**

    - `dims`: space dimensions.
    - `channels_in`, `channels_out`.
    - `width`: channels of the hidden layers; `depth`: number of hidden layers; `kernel`: odd.
    - `activation`: σ, one of relu, gelu, tanh, silu, squareplus ((u + √(u² + 4))/2, smooth and twice as fast as gelu on CPU; Barron
      2021, arXiv:2112.11687), gated (see `gated`; doubles the channels before it).

    Call it with u and, per axis, whether u is periodic (None: along all axes). The last layer starts at zero, so that an untrained
    closure is no closure. Reach: (depth + 1)(kernel − 1)/2 cells.
    """

    layers: tuple[Convolution, ...]
    activation: str = eqx.field(static=True)

    def __init__(
        self,
        dims: int,
        channels_in: int,
        channels_out: int,
        width: int = 16,
        depth: int = 3,
        kernel: int = 3,
        activation: Activation = "gelu",
        *,
        key: PRNGKeyArray,
    ):
        for name, value in (("width", width), ("depth", depth), ("kernel", kernel)):
            if value < 1:
                raise ValueError(f"{name}: must be positive, found {value}")
        if kernel % 2 == 0:
            raise ValueError(f"kernel: must be odd, found {kernel}")
        sizes = [channels_in] + [width] * depth + [channels_out]
        keys = jax.random.split(key, len(sizes) - 1)
        last = len(sizes) - 2
        double = 2 if activation == "gated" else 1
        self.layers = tuple(
            Convolution(dims, a, b if i == last else double * b, kernel, key=k, zero=i == last)
            for i, (a, b, k) in enumerate(zip(sizes[:-1], sizes[1:], keys, strict=True))
        )
        self.activation = activation

    def __call__(self, u: Float[Array, "i *grid"], periodic: tuple[bool, ...] | None = None) -> Float[Array, "o *grid"]:
        for layer in self.layers[:-1]:
            u = ACTIVATIONS[self.activation](layer(u, periodic))
        return self.layers[-1](u, periodic)
