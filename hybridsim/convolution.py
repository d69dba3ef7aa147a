"""y_o(x) = Σ_i Σ_s w[o, i, s] u_i(x + s): periodic convolution whose gradient stays fast inside a scan.

On CPU, XLA compiles the backward pass of its own convolution inside `lax.scan` with a slow dimension order (6 to 30 times slower
than outside). Written as matrix products and shifts, forward, jvp, transpose and vmap all are matrix products and shifts again.
On accelerators the stock convolution is used.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

PRECISION = jax.lax.Precision.HIGHEST
"""Full float32 products everywhere: accelerators would otherwise round to fewer bits, and weights would not carry over."""


def _window(u: Array, size: int, dilation: int, axis: int) -> list[Array]:
    """The `size` periodic shifts u(x + s · dilation), s = −(size − 1)/2 … (size − 1)/2, along `axis`."""
    reach = (size - 1) // 2 * dilation
    n = u.shape[axis]
    if reach > n:
        return [jnp.roll(u, reach - j * dilation, axis) for j in range(size)]
    below = jax.lax.slice_in_dim(u, n - reach, n, axis=axis)
    above = jax.lax.slice_in_dim(u, 0, reach, axis=axis)
    padded = jnp.concatenate([below, u, above], axis=axis)
    return [jax.lax.slice_in_dim(padded, j * dilation, j * dilation + n, axis=axis) for j in range(size)]


def _by_products(u: Array, weights: Array, dilation: Sequence[int]) -> Array:
    """Columns along every axis but the first, one matrix product, then shifts along the first axis."""
    out_channels, _, *kernel = weights.shape
    grid = u.shape[1:]
    first = kernel[0]
    # Without the barrier XLA computes whatever made u (an activation, say) once per shift.
    columns = jax.lax.optimization_barrier(u)
    for axis in range(1, len(grid)):
        columns = jnp.concatenate(_window(columns, kernel[axis], dilation[axis], axis + 1))
    # Rows of `columns` run over (k_d, …, k_2, in); bring the weights into the same order.
    order = (2, 0, *range(weights.ndim - 1, 2, -1), 1)
    matrix = jnp.transpose(weights, order).reshape(first * out_channels, -1)
    products = jnp.matmul(matrix, columns.reshape(columns.shape[0], -1), precision=PRECISION).reshape(first, out_channels, *grid)
    half = (first - 1) // 2
    total = products[half]
    for i in range(first):
        if i != half:
            total = total + jnp.roll(products[i], (half - i) * dilation[0], 1)
    return total


def _stock(u: Array, weights: Array, dilation: Sequence[int]) -> Array:
    """The same by `lax.conv_general_dilated`."""
    pad = [((k - 1) // 2 * d, (k - 1) // 2 * d) for k, d in zip(weights.shape[2:], dilation, strict=True)]
    padded = jnp.pad(u, [(0, 0), *pad], mode="wrap")
    ones = (1,) * len(dilation)
    return jax.lax.conv_general_dilated(padded[None], weights, ones, "VALID", rhs_dilation=tuple(dilation), precision=PRECISION)[0]


def periodic_convolution(
    u: Float[Array, "i *grid"], weights: Float[Array, "o i *kernel"], dilation: int | Sequence[int] = 1, method: str = "auto"
) -> Float[Array, "o *grid"]:
    """y_o(x) = Σ_i Σ_s w[o, i, s] u_i(x + d s), centred, periodic, in one to three dimensions.

    **Arguments:**

    - `u`: channels on the grid.
    - `weights`: odd kernel sizes, as in `lax.conv` (a correlation, not flipped).
    - `dilation`: d, one for all axes or one each.
    - `method`: `"products"`, `"stock"`, or `"auto"` (products on CPU, stock elsewhere).

    Raises `ValueError` for even kernels.
    """
    kernel = weights.shape[2:]
    if any(k % 2 == 0 for k in kernel):
        raise ValueError(f"kernel sizes must be odd, found {kernel}")
    spread = (dilation,) * len(kernel) if isinstance(dilation, int) else tuple(dilation)
    if method == "auto":
        method = "products" if jax.default_backend() == "cpu" else "stock"
    return (_by_products if method == "products" else _stock)(u, weights, spread)
