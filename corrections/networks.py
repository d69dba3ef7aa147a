"""(c, *grid) -> (c', *grid): bare networks of convolutions in one to three dimensions. They know no equation and no place.

Every network takes `dims`, `channels_in`, `channels_out`, arguments of its own and a random `key`, and is called with u and, per
axis, whether u is periodic (None: along all axes). Along an axis that is not periodic u goes on with its outermost value. The last
layer starts at zero, so that an untrained closure is no closure. Networks of other kinds are in `fourier` and `graph`.
"""

import functools
import inspect
import math
from collections.abc import Callable
from typing import Literal

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray

from hybridsim.compilation import SMALL_CELLS
from hybridsim.convolution import PRECISION, convolution
from hybridsim.stored import stored

Activation = Literal["relu", "gelu", "tanh", "silu", "squareplus", "gated"]

Network = Callable[..., Array]
"""net(u, periodic): what a closure calls."""

NetworkFactory = Callable[..., Network]
"""make(dims=…, channels_in=…, channels_out=…, key=…): a class of networks, or `functools.partial` of one."""


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


def within_reach(u: Float[Array, "c *grid"]) -> Float[Array, "c *grid"]:
    """u, cut off at the sixth root of the largest number (3·10⁶ in single precision).

    Far from what a trained network holds; but with large weights many layers would overflow, and a gas takes the cube of a flux.
    """
    far = jnp.asarray(float(jnp.finfo(u.dtype).max) ** (1 / 6), u.dtype)
    return jnp.clip(u, -far, far)


def activated_channels(width: int, activation: str) -> int:
    """How many channels a layer must give for `width` of them to be left behind the activation."""
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation: possible are {', '.join(ACTIVATIONS)}; found {activation!r}")
    return 2 * width if activation == "gated" else width


def check_positive(**values: int) -> None:
    """Refuses what is no count: layers, channels, modes."""
    for name, value in values.items():
        if value < 1:
            raise ValueError(f"{name}: must be positive, found {value}")


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


def activated(
    layer: Convolution,
    u: Float[Array, "i *grid"],
    periodic: tuple[bool, ...] | None,
    activation: str,
    bounded: bool = False,
) -> Float[Array, "o *grid"]:
    """σ(w ∗ u + b), cut off `within_reach` where it is to be `bounded`; stored before a next convolution reads it shift by shift.

    On a line, and in kernels of one cell, a convolution begins with a matrix product, for which it is stored anyway. Where there
    are many cells, computing it again on all threads is quicker.
    """
    sigma = ACTIVATIONS[activation]
    function = (lambda y: within_reach(sigma(y))) if bounded else sigma
    y = layer(u, periodic)
    shifted = y.ndim > 2 and layer.weights.shape[-1] > 1 and math.prod(y.shape[1:]) <= SMALL_CELLS
    return stored(layer.bias[0], function, y) if shifted else function(y)


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
        check_positive(width=width, depth=depth, kernel=kernel)
        if kernel % 2 == 0:
            raise ValueError(f"kernel: must be odd, found {kernel}")
        sizes = [channels_in] + [width] * depth + [channels_out]
        keys = jax.random.split(key, len(sizes) - 1)
        last = len(sizes) - 2
        self.layers = tuple(
            Convolution(dims, a, b if i == last else activated_channels(b, activation), kernel, key=k, zero=i == last)
            for i, (a, b, k) in enumerate(zip(sizes[:-1], sizes[1:], keys, strict=True))
        )
        self.activation = activation

    def __call__(self, u: Float[Array, "i *grid"], periodic: tuple[bool, ...] | None = None) -> Float[Array, "o *grid"]:
        for layer in self.layers[:-1]:
            u = activated(layer, u, periodic, self.activation)
        return self.layers[-1](u, periodic)


class DilatedResNet(eqx.Module):
    """y = D h_B,  h_{b+1} = h_b + (σW_7 ⋯ σW_1)(h_b),  h_0 = E u: blocks of dilated convolutions (Dil-ResNet).

    Stachenfeld et al. 2022 (arXiv:2112.15275): a linear encoder and decoder of one convolution each, and between them blocks whose
    layers look 1, 2, 4, 8, 4, 2, 1 cells far, so that few layers see far without a coarser grid.

    **Arguments:**

    - `dims`, `channels_in`, `channels_out`.
    - `blocks`: B, 4 there; `width`: channels, 48 there; `dilations`: one layer of a block each.
    - `kernel`: odd; `activation`: σ, as in `CNN`.

    Reach: (kernel − 1)/2 (2 + B Σ dilations) cells. On periodic grids that are smaller than this it goes around.
    """

    encoder: Convolution
    blocks: tuple[tuple[Convolution, ...], ...]
    decoder: Convolution
    activation: str = eqx.field(static=True)

    def __init__(
        self,
        dims: int,
        channels_in: int,
        channels_out: int,
        blocks: int = 4,
        width: int = 48,
        dilations: tuple[int, ...] = (1, 2, 4, 8, 4, 2, 1),
        kernel: int = 3,
        activation: Activation = "relu",
        *,
        key: PRNGKeyArray,
    ):
        check_positive(blocks=blocks, width=width, kernel=kernel)
        if not dilations or any(d < 1 for d in dilations):
            raise ValueError(f"dilations: needs positive whole numbers, one per layer of a block; found {list(dilations)}")
        if kernel % 2 == 0:
            raise ValueError(f"kernel: must be odd, found {kernel}")
        first, *keys, last = jax.random.split(key, blocks * len(dilations) + 2)
        channels = activated_channels(width, activation)
        self.encoder = Convolution(dims, channels_in, width, kernel, key=first)
        layers = [Convolution(dims, width, channels, kernel, d, key=k) for k, d in zip(keys, dilations * blocks, strict=True)]
        count = len(dilations)
        self.blocks = tuple(tuple(layers[b * count : (b + 1) * count]) for b in range(blocks))
        self.decoder = Convolution(dims, width, channels_out, kernel, key=last, zero=True)
        self.activation = activation

    def __call__(self, u: Float[Array, "i *grid"], periodic: tuple[bool, ...] | None = None) -> Float[Array, "o *grid"]:
        h = self.encoder(u, periodic)
        for block in self.blocks:
            change = h
            for layer in block:
                change = activated(layer, change, periodic, self.activation, bounded=True)
            h = within_reach(h + change)
        return self.decoder(h, periodic)


# --- U-Net -----------------------------------------------------------------------------------------------------------------------


@functools.cache
def _overlaps(n: int, m: int) -> np.ndarray:
    """(m, n): the part of each of m cells that each of n cells of the same line covers."""
    # In units of 1/(n m) of the line all edges are whole numbers.
    old, new = np.arange(n) * m, np.arange(m)[:, None] * n
    return np.maximum(np.minimum(old + m, new + n) - np.maximum(old, new), 0) / n


def box_means(u: Float[Array, "c *grid"], shape: tuple[int, ...]) -> Float[Array, "c *new"]:
    """ū_J = Σ_i |i ∩ J| u_i / |J|: means over the cells of another grid of the same box, coarser or finer.

    Where the numbers of cells divide, these are means of blocks one way and copies the other way; where not, cells are cut.
    """
    for a, (n, m) in enumerate(zip(u.shape[1:], shape, strict=True), start=1):
        if n == m:
            continue
        if n % m == 0:
            u = u.reshape(*u.shape[:a], m, n // m, *u.shape[a + 1 :]).mean(axis=a + 1)
        elif m % n == 0:
            u = jnp.repeat(u, m // n, axis=a)
        else:
            u = jnp.moveaxis(jnp.tensordot(jnp.asarray(_overlaps(n, m), u.dtype), u, (1, a), precision=PRECISION), 0, a)
    return u


class UNet(eqx.Module):
    """y = D v_0,  h_{l+1} = B(↓h_l),  v_l = B([h_l, W ↑v_{l+1}]): convolutions on ever coarser grids, and back.

    Ronneberger, Fischer & Brox 2015 (arXiv:1505.04597). ↓ halves the cells along each axis (⌈n/2⌉ of them are left) by means over
    cells, ↑ copies them back, B is two convolutions, and every level gets what the same level saw on the way down.

    **Arguments:**

    - `dims`, `channels_in`, `channels_out`.
    - `width`: channels on the given grid, twice as many on each next one; `levels`: how many coarser grids.
    - `kernel`: odd; `activation`: as in `CNN`.

    Works on every grid: where a number of cells is odd, cells are cut in the means. A shift of the input by multiples of 2^levels
    cells shifts the output, if the cells along that axis are a multiple of 2^levels; a shift by fewer cells need not.
    """

    down: tuple[tuple[Convolution, Convolution], ...]
    rise: tuple[Convolution, ...]
    up: tuple[tuple[Convolution, Convolution], ...]
    last: Convolution
    activation: str = eqx.field(static=True)

    def __init__(
        self,
        dims: int,
        channels_in: int,
        channels_out: int,
        width: int = 16,
        levels: int = 2,
        kernel: int = 3,
        activation: Activation = "gelu",
        *,
        key: PRNGKeyArray,
    ):
        check_positive(width=width, levels=levels, kernel=kernel)
        if kernel % 2 == 0:
            raise ValueError(f"kernel: must be odd, found {kernel}")
        keys = iter(jax.random.split(key, 5 * levels + 3))

        def layer(channels: int, out: int) -> Convolution:
            return Convolution(dims, channels, activated_channels(out, activation), kernel, key=next(keys))

        widths = [width * 2**level for level in range(levels + 1)]
        self.down = tuple((layer(a, b), layer(b, b)) for a, b in zip([channels_in, *widths], widths, strict=False))
        self.rise = tuple(layer(2 * b, b) for b in widths[:-1])
        self.up = tuple((layer(2 * b, b), layer(b, b)) for b in widths[:-1])
        self.last = Convolution(dims, width, channels_out, 1, key=next(keys), zero=True)
        self.activation = activation

    def __call__(self, u: Float[Array, "i *grid"], periodic: tuple[bool, ...] | None = None) -> Float[Array, "o *grid"]:
        def through(*layers: Convolution, u: Array) -> Array:
            for layer in layers:
                u = activated(layer, u, periodic, self.activation, bounded=True)
            return u

        seen = [through(*self.down[0], u=u)]
        for block in self.down[1:]:
            coarse = tuple((n + 1) // 2 for n in seen[-1].shape[1:])
            seen.append(through(*block, u=box_means(seen[-1], coarse)))
        v = seen.pop()
        for h, rise, block in zip(reversed(seen), reversed(self.rise), reversed(self.up), strict=True):
            v = through(*block, u=jnp.concatenate([h, through(rise, u=box_means(v, h.shape[1:]))]))
        return self.last(v, periodic)


# --- for closures ----------------------------------------------------------------------------------------------------------------


def make_network(
    network: NetworkFactory | None,
    dims: int,
    channels_in: int,
    channels_out: int,
    *,
    width: int,
    depth: int,
    kernel: int,
    activation: Activation,
    key: PRNGKeyArray,
) -> Network:
    """What `network` makes for so many channels; None stands for a `CNN` of `width`, `depth`, `kernel` and `activation`."""
    if network is None:
        return CNN(dims, channels_in, channels_out, width, depth, kernel, activation, key=key)
    defaults = inspect.signature(CNN).parameters
    for name, value in {"width": width, "depth": depth, "kernel": kernel, "activation": activation}.items():
        if value != defaults[name].default:
            raise ValueError(f"{name}: found {value!r} beside a network of its own; give it inside `network`, or leave it out")
    return network(dims=dims, channels_in=channels_in, channels_out=channels_out, key=key)
