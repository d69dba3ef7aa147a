"""ŷ(k) = W(k) û(k): networks that act on the modes of the box, and so on every grid of it."""

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from hybridsim.convolution import PRECISION
from hybridsim.corrections.networks import ACTIVATIONS, Activation, Convolution, activated_channels, check_positive


def _cut(array: Array, start: int, stop: int, axis: int) -> Array:
    return jax.lax.slice_in_dim(array, start, stop, axis=axis)


class SpectralConvolution(eqx.Module):
    """ŷ_o(k) = Σ_i W[o, i, k] û_i(k) for |n_a| < modes_a, 0 beyond: a convolution with a smooth kernel as large as the box.

    n = k L / 2π counts periods in the box; û are amplitudes, whatever the number of cells. A grid that carries fewer modes uses the
    weights of those that it carries, below its Nyquist wavenumber. Along an axis that is not periodic the box is followed by its
    mirror image, so that its modes are those of a box twice as long.

    **Arguments:** `dims`, `channels_in`, `channels_out`, `modes` per axis, a random `key`. W is stored as (real part, imaginary
    part), ordered by n from −(modes − 1) to modes − 1, from 0 along the last axis; E|W|² = 1/channels_in at the start.

    Li et al. 2021 (arXiv:2010.08895), equations 4 and 5, where n runs through a corner of the spectrum that differs by one mode.
    """

    weights: Float[Array, "o i *modes 2"]
    modes: tuple[int, ...] = eqx.field(static=True)

    def __init__(self, dims: int, channels_in: int, channels_out: int, modes: tuple[int, ...], *, key: PRNGKeyArray):
        if len(modes) != dims:
            raise ValueError(f"modes: needs one number, or one per axis ({dims}); found {list(modes)}")
        shape = (channels_out, channels_in, *(2 * m - 1 for m in modes[:-1]), modes[-1], 2)
        self.weights = (0.5 / channels_in) ** 0.5 * jax.random.normal(key, shape, jnp.float32)
        self.modes = tuple(modes)

    def __call__(self, u: Float[Array, "i *grid"], periodic: tuple[bool, ...] | None = None) -> Float[Array, "o *grid"]:
        grid, axes = u.shape[1:], tuple(range(1, u.ndim))
        for a, wraps in zip(axes, periodic or (True,) * len(axes), strict=True):
            u = u if wraps else jnp.concatenate([u, jnp.flip(u, a)], axis=a)
        box = u.shape[1:]
        hat, weights = jnp.fft.rfftn(u, axes=axes, norm="forward"), self.weights.astype(u.dtype)
        # Nyquist modes have no phase, and would make a function of the grid of what is a function of the box.
        most = [min(m, (n + 1) // 2) - 1 for m, n in zip(self.modes, box, strict=True)]
        for a, n, m, k in zip(axes, box, self.modes, most, strict=True):
            if a == axes[-1]:
                hat, weights = _cut(hat, 0, k + 1, a), _cut(weights, 0, k + 1, a + 1)
            else:
                hat = jnp.concatenate([_cut(hat, n - k, n, a), _cut(hat, 0, k + 1, a)], axis=a)
                weights = _cut(weights, m - 1 - k, m + k, a + 1)
        weights = jax.lax.complex(weights[..., 0], weights[..., 1])
        product = jnp.einsum("oi...,i...->o...", weights, hat, precision=PRECISION)
        # y is real: what the inverse transform makes of a plane that is not Hermitian would differ between machines.
        plane, rest = _cut(product, 0, 1, axes[-1]), _cut(product, 1, most[-1] + 1, axes[-1])
        plane = 0.5 * (plane + jnp.conj(jnp.flip(plane, axes[:-1])))
        product = jnp.concatenate([plane, rest], axis=axes[-1])
        for a, n, k in zip(axes[:-1], box, most, strict=False):
            shape = [n - 2 * k - 1 if b == a else m for b, m in enumerate(product.shape)]
            parts = [_cut(product, k, 2 * k + 1, a), jnp.zeros(shape, product.dtype), _cut(product, 0, k, a)]
            product = jnp.concatenate(parts, axis=a)
        beyond = [(0, box[-1] // 2 - most[-1] if a == axes[-1] else 0) for a in range(u.ndim)]
        y = jnp.fft.irfftn(jnp.pad(product, beyond), s=box, axes=axes, norm="forward")
        for a, n in zip(axes, grid, strict=True):
            y = _cut(y, 0, n, a)
        return y


class FNO(eqx.Module):
    """y = Q h_L,  h_{l+1} = σ(K_l ∗ h_l + W_l h_l),  h_0 = P u: the Fourier neural operator, on any grid of the box.

    Li et al. 2021 (arXiv:2010.08895). P, W and Q act in each cell, K is a `SpectralConvolution`. Weights belong to modes of the
    box, not to cells: trained at one resolution it runs at another. Everything but σ then makes the same function of the same
    function; σ makes waves shorter than the cells, and what these alias to differs between grids, the less the finer they are.

    **Arguments:**

    - `dims`, `channels_in`, `channels_out`.
    - `modes`: K acts on modes of fewer than so many periods, one number or one per axis. 12; no more than half the cells have an
      effect.
    - `width`: channels; `layers`: L.
    - `activation`: σ, as in `CNN`.

    Reach: the whole box. Stands for a box of one size: in a larger one the same weights mean longer waves.
    """

    lift: Convolution
    spectral: tuple[SpectralConvolution, ...]
    local: tuple[Convolution, ...]
    hidden: Convolution
    last: Convolution
    activation: str = eqx.field(static=True)

    def __init__(
        self,
        dims: int,
        channels_in: int,
        channels_out: int,
        modes: int | tuple[int, ...] = 12,
        width: int = 16,
        layers: int = 4,
        activation: Activation = "gelu",
        *,
        key: PRNGKeyArray,
    ):
        check_positive(width=width, layers=layers)
        each = (modes,) * dims if isinstance(modes, int) else tuple(modes)
        if any(m < 1 for m in each):
            raise ValueError(f"modes: must be positive, found {modes if isinstance(modes, int) else list(modes)}")
        channels = activated_channels(width, activation)
        first, hidden, last, *keys = jax.random.split(key, 2 * layers + 3)
        self.lift = Convolution(dims, channels_in, width, 1, key=first)
        self.spectral = tuple(SpectralConvolution(dims, width, channels, each, key=k) for k in keys[:layers])
        self.local = tuple(Convolution(dims, width, channels, 1, key=k) for k in keys[layers:])
        self.hidden = Convolution(dims, width, activated_channels(2 * width, activation), 1, key=hidden)
        self.last = Convolution(dims, 2 * width, channels_out, 1, key=last, zero=True)
        self.activation = activation

    def __call__(self, u: Float[Array, "i *grid"], periodic: tuple[bool, ...] | None = None) -> Float[Array, "o *grid"]:
        sigma = ACTIVATIONS[self.activation]
        h = self.lift(u, periodic)
        for spectral, local in zip(self.spectral, self.local, strict=True):
            h = sigma(spectral(h, periodic) + local(h, periodic))
        return self.last(sigma(self.hidden(h, periodic)), periodic)
