"""y_o(x) = Σ_i Σ_s w[o, i, s] u_i(x + s): a convolution whose gradient stays fast inside a scan.

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


def _padded(u: Array, reach: int, axis: int, periodic: bool) -> Array:
    """u with `reach` more values on both sides of `axis`: from the other side, or copies of the outermost one."""
    n = u.shape[axis]
    if periodic:
        below = jax.lax.slice_in_dim(u, n - reach, n, axis=axis)
        above = jax.lax.slice_in_dim(u, 0, reach, axis=axis)
    else:
        shape = [reach if a == axis else m for a, m in enumerate(u.shape)]
        below = jnp.broadcast_to(jax.lax.slice_in_dim(u, 0, 1, axis=axis), shape)
        above = jnp.broadcast_to(jax.lax.slice_in_dim(u, n - 1, n, axis=axis), shape)
    return jnp.concatenate([below, u, above], axis=axis)


def _window(u: Array, size: int, dilation: int, axis: int, periodic: bool) -> list[Array]:
    """The `size` shifts u(x + s · dilation), s = −(size − 1)/2 … (size − 1)/2, along `axis`."""
    reach = (size - 1) // 2 * dilation
    n = u.shape[axis]
    if periodic and reach > n:
        return [jnp.roll(u, reach - j * dilation, axis) for j in range(size)]
    padded = _padded(u, reach, axis, periodic)
    return [jax.lax.slice_in_dim(padded, j * dilation, j * dilation + n, axis=axis) for j in range(size)]


def _shifted(u: Array, offset: int, axis: int, periodic: bool) -> Array:
    """u(x + offset) along `axis`."""
    if periodic:
        return jnp.roll(u, -offset, axis)
    start = offset + abs(offset)
    return jax.lax.slice_in_dim(_padded(u, abs(offset), axis, periodic), start, start + u.shape[axis], axis=axis)


def _by_products(u: Array, weights: Array, dilation: Sequence[int], periodic: Sequence[bool]) -> Array:
    """Columns along every axis but the first, one matrix product, then shifts along the first axis."""
    out_channels, _, *kernel = weights.shape
    grid = u.shape[1:]
    first = kernel[0]
    columns = u  # XLA computes what made it (an activation, say) once per shift, if it is not `stored`
    for axis in range(1, len(grid)):
        columns = jnp.concatenate(_window(columns, kernel[axis], dilation[axis], axis + 1, periodic[axis]))
    # Rows of `columns` run over (k_d, …, k_2, in); bring the weights into the same order.
    order = (2, 0, *range(weights.ndim - 1, 2, -1), 1)
    matrix = jnp.transpose(weights, order).reshape(first * out_channels, -1)
    products = jnp.matmul(matrix, columns.reshape(columns.shape[0], -1), precision=PRECISION).reshape(first, out_channels, *grid)
    half = (first - 1) // 2
    total = products[half]
    for i in range(first):
        if i != half:
            total = total + _shifted(products[i], (i - half) * dilation[0], 1, periodic[0])
    return total


def _stock(u: Array, weights: Array, dilation: Sequence[int], periodic: Sequence[bool]) -> Array:
    """The same by `lax.conv_general_dilated`."""
    for axis, (k, d, wrap) in enumerate(zip(weights.shape[2:], dilation, periodic, strict=True)):
        reach = (k - 1) // 2 * d
        width = [(reach, reach) if a == axis + 1 else (0, 0) for a in range(u.ndim)]
        u = jnp.pad(u, width, mode="wrap" if wrap else "edge")
    ones = (1,) * len(dilation)
    return jax.lax.conv_general_dilated(u[None], weights, ones, "VALID", rhs_dilation=tuple(dilation), precision=PRECISION)[0]


def pointwise(u: Float[Array, "i *grid"], matrix: Float[Array, "o i"]) -> Float[Array, "o *grid"]:
    """y_o(x) = Σ_i w[o, i] u_i(x): one matrix product, the same in every cell, on every machine."""
    product = jnp.matmul(matrix, u.reshape(u.shape[0], -1), precision=PRECISION)
    return product.reshape(matrix.shape[0], *u.shape[1:])


def convolution(
    u: Float[Array, "i *grid"],
    weights: Float[Array, "o i *kernel"],
    dilation: int | Sequence[int] = 1,
    periodic: Sequence[bool] | None = None,
    method: str = "auto",
) -> Float[Array, "o *grid"]:
    """y_o(x) = Σ_i Σ_s w[o, i, s] u_i(x + d s), centred, in one to three dimensions.

    **Arguments:**

    - `u`: channels on the grid.
    - `weights`: odd kernel sizes, as in `lax.conv` (a correlation, not flipped).
    - `dilation`: d, one for all axes or one each.
    - `periodic`: per axis, whether u goes on periodically (None: along all of them); elsewhere its outermost values go on.
    - `method`: `"products"`, `"stock"`, or `"auto"` (products on CPU and for kernels of one cell, stock elsewhere).

    Raises `ValueError` for even kernels.

    >>> import jax.numpy as jnp
    >>> u, mean = jnp.array([[3.0, 0.0, 0.0, 6.0]]), jnp.ones((1, 1, 3)) / 3
    >>> [float(y) for y in convolution(u, mean)[0]]
    [3.0, 1.0, 2.0, 3.0]
    >>> [float(y) for y in convolution(u, mean, periodic=(False,))[0]]
    [2.0, 1.0, 2.0, 4.0]
    """
    kernel = weights.shape[2:]
    if any(k % 2 == 0 for k in kernel):
        raise ValueError(f"kernel sizes must be odd, found {kernel}")
    spread = (dilation,) * len(kernel) if isinstance(dilation, int) else tuple(dilation)
    wrap = (True,) * len(kernel) if periodic is None else tuple(periodic)
    if len(spread) != len(kernel) or len(wrap) != len(kernel):
        raise ValueError(f"dilation {spread} and periodic {wrap} need one entry per axis of the kernel {kernel}")
    if method == "auto" and set(kernel) == {1}:
        return pointwise(u, weights.reshape(weights.shape[:2]))
    if method == "auto":
        method = "products" if jax.default_backend() == "cpu" else "stock"
    return (_by_products if method == "products" else _stock)(u, weights, spread, wrap)
