"""The convolution against the stock one and against its definition, periodic and between walls, and its derivatives."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from hybridsim.convolution import convolution
from hybridsim.corrections.networks import CNN

pytestmark = pytest.mark.usefixtures("x64")

GRIDS = {"1d": (11,), "2d": (6, 9), "3d": (4, 5, 7)}


def _case(grid, kernel, seed=0, inputs=2, outputs=3, dtype=np.float64):
    rng = np.random.default_rng(seed)
    u = rng.standard_normal((inputs, *grid))
    weights = rng.standard_normal((outputs, inputs, *(kernel,) * len(grid)))
    return jnp.asarray(u, dtype), jnp.asarray(weights, dtype)


def _by_definition(u, weights, dilation, periodic=None):
    """y_o(x) = Σ_i Σ_s w[o, i, s] u_i(x + d s), loop by loop; x + d s wraps, or stops at the last cell."""
    u, weights = np.asarray(u), np.asarray(weights)
    out = np.zeros((weights.shape[0], *u.shape[1:]))
    for index in itertools.product(*(range(k) for k in weights.shape[2:])):
        moved = u
        for a, (i, k, d) in enumerate(zip(index, weights.shape[2:], dilation, strict=True)):
            n = u.shape[a + 1]
            cells = np.arange(n) + (i - (k - 1) // 2) * d
            cells = cells % n if periodic is None or periodic[a] else np.clip(cells, 0, n - 1)
            moved = np.take(moved, cells, axis=a + 1)
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
        y = convolution(u, weights, dilation, method=method)
        assert y.shape == (3, *grid)
        np.testing.assert_allclose(y, expected, rtol=0, atol=1e-13 * np.abs(expected).max() * u.size)
    flipped = convolution(u, jnp.flip(weights, axis=range(2, weights.ndim)), dilation, method="products")
    assert kernel == 1 or np.abs(flipped - expected).max() > 0.1  # a correlation: the kernel is not flipped


def test_dilation_differs_per_axis():
    u, weights = _case((8, 9), 3)
    expected = _by_definition(u, weights, (2, 1))
    for method in ("products", "stock"):
        np.testing.assert_allclose(convolution(u, weights, (2, 1), method=method), expected, rtol=0, atol=1e-12)
    assert np.abs(convolution(u, weights, (1, 2), method="products") - expected).max() > 0.1


def test_kernel_wider_than_the_grid_wraps():
    u, weights = _case((3, 4), 5)
    expected = _by_definition(u, weights, (2, 2))
    np.testing.assert_allclose(convolution(u, weights, 2, method="products"), expected, rtol=0, atol=1e-12)


WALLS = [
    ((9,), 5, (1,), (False,)),
    ((6, 9), 3, (2, 1), (True, False)),
    ((6, 9), 5, (1, 2), (False, True)),
    ((3, 4), 5, (2, 3), (False, False)),
    ((4, 5, 6), 3, (1, 1, 2), (False, True, False)),
]


@pytest.mark.parametrize(("grid", "kernel", "dilation", "periodic"), WALLS)
def test_the_outermost_value_goes_on_where_it_is_not_periodic(grid, kernel, dilation, periodic):
    u, weights = _case(grid, kernel)
    expected = _by_definition(u, weights, dilation, periodic)
    for method in ("products", "stock"):
        y = convolution(u, weights, dilation, periodic, method)
        np.testing.assert_allclose(y, expected, rtol=0, atol=1e-13 * np.abs(expected).max() * u.size)
        # a mirrored kernel on a mirrored field gives the mirrored result
        axes = tuple(range(1, u.ndim))
        there = convolution(jnp.flip(u, axes), jnp.flip(weights, tuple(a + 1 for a in axes)), dilation, periodic, method)
        np.testing.assert_allclose(jnp.flip(there, axes), expected, rtol=0, atol=1e-13 * np.abs(expected).max() * u.size)
    assert np.abs(_by_definition(u, weights, dilation) - expected).max() > 0.1  # negative control


def test_a_network_knows_where_its_input_is_periodic():
    network = CNN(2, 2, 3, width=4, depth=2, kernel=3, key=jax.random.key(0))
    network = jax.tree.map(lambda a: a + 0.1, network)
    u, _ = _case((8, 7), 3)
    around = network(u)
    np.testing.assert_array_equal(network(u, (True, True)), around)
    between = network(u, (True, False))
    reach = 3
    np.testing.assert_allclose(between[:, :, reach:-reach], around[:, :, reach:-reach], rtol=1e-12)
    assert np.abs(between - around).max() > 1e-3
    # along the periodic axis it still commutes with shifts
    np.testing.assert_allclose(network(jnp.roll(u, 3, 1), (True, False)), jnp.roll(between, 3, 1), rtol=1e-12)
    with pytest.raises(ValueError, match="need one entry per axis"):
        network(u, (True,))


DERIVATIVES = [
    ((11,), 5, 2, None),
    ((6, 9), 3, 2, None),
    ((6, 8), 5, 1, None),
    ((4, 5, 6), 3, 1, None),
    ((9,), 3, 2, (False,)),
    ((6, 8), 5, 1, (False, True)),
    ((4, 5, 6), 3, 1, (False, True, False)),
]


@pytest.mark.parametrize(("grid", "kernel", "dilation", "periodic"), DERIVATIVES)
def test_derivatives_equal_those_of_the_stock_convolution(grid, kernel, dilation, periodic):
    u, weights = _case(grid, kernel)
    du, dweights = _case(grid, kernel, seed=1)

    def everything(method):
        def f(u, w):
            return convolution(u, w, dilation, periodic, method)

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


@pytest.mark.parametrize(
    ("grid", "dilation", "periodic"), [((7,), 2, None), ((5, 6), 1, None), ((3, 4, 5), 1, None), ((5, 6), 1, (False, True))]
)
def test_gradients_by_differences(grid, dilation, periodic):
    u, weights = _case(grid, 3)
    f = lambda u, w: convolution(jnp.asarray(u), jnp.asarray(w), dilation, periodic, "products")  # noqa: E731
    check_grads(f, (u, weights), order=2, modes=("fwd", "rev"))


def test_inside_a_scan_it_equals_the_loop():
    u, weights = _case((6, 7), 3, inputs=2, outputs=2)

    def loss(w, method):
        body = lambda q, _: (jnp.tanh(convolution(q, w, 1, (False, True), method)), None)  # noqa: E731
        return jnp.sum(jax.lax.scan(body, u, None, 5)[0] ** 2)

    gradient = jax.jit(jax.grad(loss), static_argnums=1)
    np.testing.assert_allclose(gradient(weights, "products"), gradient(weights, "stock"), rtol=1e-10, atol=1e-12)


def test_float32_stays_float32():
    u, weights = _case((6, 9), 3, dtype=np.float32)
    for method in ("products", "stock"):
        assert convolution(u, weights, 1, method=method).dtype == np.float32


def test_a_constant_is_an_eigenvector():
    u, weights = _case((6, 9), 3)
    y = convolution(jnp.ones_like(u), weights, 2, method="products")
    np.testing.assert_allclose(y, np.broadcast_to(weights.sum(axis=(1, 2, 3))[:, None, None], y.shape), rtol=0, atol=1e-12)


def test_even_kernels_are_refused():
    u, _ = _case((6, 9), 3)
    with pytest.raises(ValueError, match="kernel sizes must be odd, found \\(3, 2\\)"):
        convolution(u, jnp.ones((1, 2, 3, 2)))
