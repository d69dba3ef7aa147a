"""The periodic convolution against the stock one and against its definition, and its derivatives."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from hybridsim.convolution import periodic_convolution

pytestmark = pytest.mark.usefixtures("x64")

GRIDS = {"1d": (11,), "2d": (6, 9), "3d": (4, 5, 7)}


def _case(grid, kernel, seed=0, inputs=2, outputs=3, dtype=np.float64):
    rng = np.random.default_rng(seed)
    u = rng.standard_normal((inputs, *grid))
    weights = rng.standard_normal((outputs, inputs, *(kernel,) * len(grid)))
    return jnp.asarray(u, dtype), jnp.asarray(weights, dtype)


def _by_definition(u, weights, dilation):
    """y_o(x) = Σ_i Σ_s w[o, i, s] u_i(x + d s), loop by loop."""
    u, weights = np.asarray(u), np.asarray(weights)
    out = np.zeros((weights.shape[0], *u.shape[1:]))
    for index in itertools.product(*(range(k) for k in weights.shape[2:])):
        shift = [-(i - (k - 1) // 2) * d for i, k, d in zip(index, weights.shape[2:], dilation, strict=True)]
        moved = np.roll(u, shift, axis=tuple(range(1, u.ndim)))
        out += np.tensordot(weights[(slice(None), slice(None), *index)], moved, axes=1)
    return out


@pytest.mark.parametrize("dilation", [1, 2])
@pytest.mark.parametrize("kernel", [1, 3, 5])
@pytest.mark.parametrize("grid", GRIDS.values(), ids=GRIDS)
def test_products_equal_the_definition_and_the_stock_convolution(grid, kernel, dilation):
    u, weights = _case(grid, kernel)
    expected = _by_definition(u, weights, (dilation,) * len(grid))
    for method in ("products", "stock", "auto"):
        if method == "stock" and (kernel - 1) // 2 * dilation > min(grid):
            continue
        y = periodic_convolution(u, weights, dilation, method)
        assert y.shape == (3, *grid)
        np.testing.assert_allclose(y, expected, rtol=0, atol=1e-13 * np.abs(expected).max() * u.size)
    flipped = periodic_convolution(u, jnp.flip(weights, axis=range(2, weights.ndim)), dilation, "products")
    assert kernel == 1 or np.abs(flipped - expected).max() > 0.1  # a correlation: the kernel is not flipped


def test_dilation_differs_per_axis():
    u, weights = _case((8, 9), 3)
    expected = _by_definition(u, weights, (2, 1))
    for method in ("products", "stock"):
        np.testing.assert_allclose(periodic_convolution(u, weights, (2, 1), method), expected, rtol=0, atol=1e-12)
    assert np.abs(periodic_convolution(u, weights, (1, 2), "products") - expected).max() > 0.1


def test_kernel_wider_than_the_grid_wraps():
    u, weights = _case((3, 4), 5)
    expected = _by_definition(u, weights, (2, 2))
    np.testing.assert_allclose(periodic_convolution(u, weights, 2, "products"), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize(("grid", "kernel", "dilation"), [((11,), 5, 2), ((6, 9), 3, 2), ((6, 8), 5, 1), ((4, 5, 6), 3, 1)])
def test_derivatives_equal_those_of_the_stock_convolution(grid, kernel, dilation):
    u, weights = _case(grid, kernel)
    du, dweights = _case(grid, kernel, seed=1)

    def everything(method):
        def f(u, w):
            return periodic_convolution(u, w, dilation, method)

        @jax.jit
        def run(u, w, du, dw):
            y, dy = jax.jvp(f, (u, w), (du, dw))
            pulled = jax.vjp(f, u, w)[1](jnp.sin(3 * y))
            batch = jnp.stack([u, 2 * u, u + du])
            spread = jax.vmap(f, in_axes=(0, None))(batch, w)
            both = jax.vmap(f)(batch, jnp.stack([w, dw, w - dw]))
            # the Hessian of |f|² times a vector: forward over reverse
            hessian = jax.jvp(jax.grad(lambda w: jnp.sum(f(u, w) ** 2)), (w,), (dw,))[1]
            return y, dy, pulled, spread, both, hessian

        return run(u, weights, du, dweights)

    for a, b in zip(jax.tree.leaves(everything("products")), jax.tree.leaves(everything("stock")), strict=True):
        assert a.shape == b.shape
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-13 * float(jnp.abs(b).max()) * kernel ** len(grid))


@pytest.mark.parametrize(("grid", "dilation"), [((7,), 2), ((5, 6), 1), ((3, 4, 5), 1)])
def test_gradients_by_differences(grid, dilation):
    u, weights = _case(grid, 3)
    f = lambda u, w: periodic_convolution(jnp.asarray(u), jnp.asarray(w), dilation, "products")  # noqa: E731
    check_grads(f, (u, weights), order=2, modes=("fwd", "rev"))


def test_inside_a_scan_it_equals_the_loop():
    u, weights = _case((6, 7), 3, inputs=2, outputs=2)

    def loss(w, method):
        body = lambda q, _: (jnp.tanh(periodic_convolution(q, w, 1, method)), None)  # noqa: E731
        return jnp.sum(jax.lax.scan(body, u, None, 5)[0] ** 2)

    gradient = jax.jit(jax.grad(loss), static_argnums=1)
    np.testing.assert_allclose(gradient(weights, "products"), gradient(weights, "stock"), rtol=1e-10, atol=1e-12)


def test_float32_stays_float32():
    u, weights = _case((6, 9), 3, dtype=np.float32)
    for method in ("products", "stock"):
        assert periodic_convolution(u, weights, 1, method).dtype == np.float32


def test_a_constant_is_an_eigenvector():
    u, weights = _case((6, 9), 3)
    y = periodic_convolution(jnp.ones_like(u), weights, 2, "products")
    np.testing.assert_allclose(y, np.broadcast_to(weights.sum(axis=(1, 2, 3))[:, None, None], y.shape), rtol=0, atol=1e-12)


def test_even_kernels_are_refused():
    u, _ = _case((6, 9), 3)
    with pytest.raises(ValueError, match="kernel sizes must be odd, found \\(3, 2\\)"):
        periodic_convolution(u, jnp.ones((1, 2, 3, 2)))
