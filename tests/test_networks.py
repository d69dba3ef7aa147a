"""Bare networks: shapes, symmetries, resolutions, precision and derivatives, whatever their weights are."""

from functools import partial

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hybridsim.config import blank
from hybridsim.convolution import convolution, pointwise
from hybridsim.corrections.fourier import FNO, SpectralConvolution
from hybridsim.corrections.graph import GraphNetwork
from hybridsim.corrections.networks import (
    CNN,
    Convolution,
    DilatedResNet,
    UNet,
    activated,
    activated_channels,
    box_means,
    make_network,
)

pytestmark = pytest.mark.usefixtures("x64")

NETWORKS = {
    "cnn": partial(CNN, width=4, depth=1),
    "dilated_resnet": partial(DilatedResNet, blocks=1, width=4, dilations=(1, 3)),
    "unet": partial(UNet, width=3, levels=2),
    "fno": partial(FNO, modes=3, width=4, layers=2),
    "graph_network": partial(GraphNetwork, width=4, rounds=2),
}
GRIDS = {"1d": (16,), "2d": (8, 12), "3d": (8, 4, 4)}
ODD = {"1d": (7,), "2d": (5, 6), "3d": (3, 5, 2)}


def drawn(build, std=0.4, dtype=np.float64, seed=2):
    """What `build` makes, with weights from N(0, std²)."""
    rng = np.random.default_rng(seed)
    draw = lambda a: jnp.asarray(std * rng.standard_normal(a.shape), dtype) if eqx.is_inexact_array(a) else a  # noqa: E731
    return jax.tree.map(draw, blank(build))


def made(name, dims, std=0.4, dtype=np.float64):
    """A small network with random weights."""
    return drawn(lambda: NETWORKS[name](dims=dims, channels_in=2, channels_out=3, key=jax.random.key(1)), std, dtype)


def noise(grid, seed=0, channels=2, dtype=np.float64):
    return jnp.asarray(np.random.default_rng(seed).standard_normal((channels, *grid)), dtype)


# small grids, run once: what the compiler saves at run time it would lose many times over
jit = partial(jax.jit, compiler_options={"xla_backend_optimization_level": "0"})


def applied(network, u, periodic=None, method=None):
    """What the network, or another method of it, makes of u."""
    arrays, fixed = eqx.partition(network, eqx.is_array)

    @jit
    def run(arrays, u):
        module = eqx.combine(arrays, fixed)
        return (module if method is None else getattr(module, method))(u, periodic)

    return run(arrays, u)


@pytest.mark.parametrize("dims", GRIDS)
@pytest.mark.parametrize("name", NETWORKS)
def test_a_network_fits_any_grid(name, dims):
    axes = len(GRIDS[dims])
    network = made(name, axes)
    for shape in (GRIDS[dims], ODD[dims]):
        for periodic in (None, (False,) + (True,) * (axes - 1), (False,) * axes):
            out = eqx.filter_eval_shape(network, jax.ShapeDtypeStruct((2, *shape), np.float64), periodic)
            assert (out.shape, out.dtype) == ((3, *shape), np.float64)


@pytest.mark.parametrize("name", NETWORKS)
def test_an_untrained_network_gives_zero(name):
    fixed = eqx.partition(made(name, 1), eqx.is_array)[1]
    build = lambda key: NETWORKS[name](dims=1, channels_in=2, channels_out=3, key=key)  # noqa: E731
    arrays = jit(lambda key: eqx.filter(build(key), eqx.is_array))(jax.random.key(1))
    assert not np.asarray(applied(eqx.combine(arrays, fixed), noise((8,)))).any()
    assert sum(not np.asarray(a).any() for a in jax.tree.leaves(arrays)) < len(jax.tree.leaves(arrays))
    assert np.asarray(applied(made(name, 1), noise((8,)))).any()


@pytest.mark.parametrize("dims", GRIDS)
@pytest.mark.parametrize("name", NETWORKS)
def test_a_shift_of_the_input_shifts_the_output(name, dims):
    grid = GRIDS[dims]
    network, u = made(name, len(grid)), noise(grid)
    axes = tuple(range(1, len(grid) + 1))
    shift = (4,) * len(grid) if name == "unet" else tuple(range(1, len(grid) + 1))
    here, there = applied(network, u), applied(network, jnp.roll(u, shift, axes))
    size = np.abs(here).max()
    assert np.abs(np.roll(here, shift, axes) - there).max() <= 1e-13 * size
    assert np.abs(here - there).max() > 1e-3 * size  # negative control


def test_the_coarse_grids_of_a_unet_break_shifts_by_single_cells():
    network, u = made("unet", 1), noise((16,))
    here, there = (np.asarray(applied(network, q)) for q in (u, jnp.roll(u, 1, 1)))
    assert np.abs(np.roll(here, 1, 1) - there).max() > 1e-3 * np.abs(here).max()


@pytest.mark.parametrize("name", NETWORKS)
def test_walls_are_no_periodic_sides(name):
    """What lies at one wall is not seen at the other one, unless the network sees the whole box."""
    network, u = made(name, 1), noise((32,))
    changed = u.at[:, 0].add(1.0)
    moved = lambda periodic: np.abs(np.asarray(applied(network, changed, periodic) - applied(network, u, periodic))).max(axis=0)  # noqa: E731
    wrapped, walled = moved(None), moved((False,))
    assert wrapped[-1] > 1e-6
    assert walled[0] > 1e-6
    assert (walled[-1] > 1e-6) == (name == "fno")


@pytest.mark.parametrize("dims", ["1d", *(pytest.param(d, marks=pytest.mark.slow) for d in ("2d", "3d"))])
@pytest.mark.parametrize("name", NETWORKS)
def test_forward_and_backward_derivatives_agree(name, dims):
    """⟨Jv, w⟩ = ⟨v, Jᵀw⟩ in weights and input, periodic and between walls."""
    grid = ODD[dims]
    weights, fixed = eqx.partition(made(name, len(grid)), eqx.is_inexact_array)
    at = (weights, noise(grid))
    rng = np.random.default_rng(3)
    v = jax.tree.map(lambda a: jnp.asarray(rng.standard_normal(a.shape)), at)
    w = noise(grid, 4, 3)

    @jit
    def both(at, v, w):
        runs = [lambda weights, u, p=p: eqx.combine(weights, fixed)(u, p) for p in (None, (False,) * len(grid))]
        return [(jax.jvp(run, at, v)[1], jax.vjp(run, *at)[1](w)) for run in runs]

    for forward, back in both(at, v, w):
        left = float(jnp.vdot(forward, w))
        right = sum(float(jnp.vdot(a, b)) for a, b in zip(jax.tree.leaves(v), jax.tree.leaves(back), strict=True))
        assert abs(left - right) <= 1e-12 * float(jnp.linalg.norm(forward) * jnp.linalg.norm(w))
        assert all(np.asarray(g).any() for g in jax.tree.leaves(back))


@pytest.mark.parametrize("name", NETWORKS)
def test_single_precision_stays_single(name):
    network = made(name, 2, dtype=np.float32)
    u = noise((6, 5), dtype=np.float32)
    text = str(eqx.filter_make_jaxpr(network)(u)[0])
    assert "f64" not in text
    assert "c128" not in text
    found, exact = applied(network, u), applied(jax.tree.map(lambda a: a.astype(np.float64), network), u.astype(np.float64))
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, exact, rtol=0, atol=2e-6 * np.abs(exact).max() + 1e-30)


@pytest.mark.parametrize("name", [n for n in NETWORKS if n != "cnn"])
def test_a_gated_activation_fits_everywhere(name):
    network = blank(lambda: NETWORKS[name](dims=1, channels_in=2, channels_out=3, activation="gated", key=jax.random.key(0)))
    assert eqx.filter_eval_shape(network, noise((8,))).shape == (3, 8)


def test_arguments_of_networks_are_checked():
    make = lambda kind, **given: kind(1, 2, 3, **given, key=jax.random.key(0))  # noqa: E731
    for kind, name in ((DilatedResNet, "blocks"), (UNet, "levels"), (FNO, "layers"), (GraphNetwork, "rounds"), (CNN, "width")):
        with pytest.raises(ValueError, match=f"{name}: must be positive, found 0"):
            make(kind, **{name: 0})
    with pytest.raises(ValueError, match=r"activation: possible are relu, .*; found 'sine'"):
        activated_channels(4, "sine")
    for kind in (DilatedResNet, UNet, CNN):
        with pytest.raises(ValueError, match="kernel: must be odd, found 4"):
            make(kind, kernel=4)
    with pytest.raises(ValueError, match=r"dilations: needs positive whole numbers, one per layer of a block; found \[1, 0\]"):
        make(DilatedResNet, dilations=(1, 0))
    with pytest.raises(ValueError, match=r"modes: needs one number, or one per axis \(1\); found \[3, 4\]"):
        make(FNO, modes=(3, 4))
    with pytest.raises(ValueError, match="modes: must be positive, found 0"):
        make(FNO, modes=0)


# --- each of them ----------------------------------------------------------------------------------------------------------------


def test_the_published_resnet_has_the_published_layers():
    """4 blocks of 7 convolutions with 48 channels and dilations 1, 2, 4, 8, 4, 2, 1 between two single ones."""
    network = blank(lambda: DilatedResNet(2, 2, 3, key=jax.random.key(0)))
    assert [[layer.dilation for layer in block] for block in network.blocks] == [[1, 2, 4, 8, 4, 2, 1]] * 4
    count = sum(a.size for a in jax.tree.leaves(network))
    assert count == (2 * 9 + 1) * 48 + 28 * (48 * 9 + 1) * 48 + (48 * 9 + 1) * 3


@pytest.mark.parametrize("periodic", [True, False])
def test_dilations_wider_than_the_grid_reach_around_it(periodic):
    """On 5 cells a dilation of 8 is one of 3, where the grid is periodic."""
    u, weights = noise((5,)), noise((2, 3), 1, 3)
    found, stock = (convolution(u, weights, 8, (periodic,), method) for method in ("products", "stock"))
    np.testing.assert_allclose(found, stock, rtol=0, atol=1e-13)
    if periodic:
        np.testing.assert_allclose(found, convolution(u, weights, 3), rtol=0, atol=1e-13)


@pytest.mark.parametrize("bounded", [False, True])
def test_stored_activations_are_the_same(bounded, monkeypatch):
    """σ(w ∗ u + b) and its derivatives, in a program that stores it and in one that does not."""
    layer = drawn(lambda: Convolution(2, 2, 3, 3, key=jax.random.key(0)))
    u, w = noise((6, 7)), noise((6, 7), 1, 3)

    def run(layer, u):
        return jnp.vdot(w, activated(layer, u, None, "gelu", bounded))

    def compiled():
        program = jax.jit(lambda layer, u: jax.value_and_grad(run, (0, 1))(layer, u)).lower(layer, u).compile()
        return program.as_text(), jax.tree.leaves(program(layer, u))

    text, stored = compiled()
    monkeypatch.setattr("hybridsim.corrections.networks.SMALL_CELLS", 41)
    plain_text, plain = compiled()
    if jax.default_backend() == "cpu":
        assert " conditional(" in text
    assert " conditional(" not in plain_text
    for a, b in zip(stored, plain, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-13, atol=1e-13)


def test_kernels_of_one_cell_are_matrix_products():
    u, matrix = noise((4, 5)), noise((2,), 1, 3)
    expected = np.einsum("oi,ixy->oxy", matrix, u)
    np.testing.assert_allclose(pointwise(u, matrix), expected, rtol=0, atol=1e-14)
    np.testing.assert_allclose(convolution(u, matrix[..., None, None]), expected, rtol=0, atol=1e-14)


@pytest.mark.parametrize(("n", "m"), [(8, 4), (4, 8), (7, 4), (4, 7), (5, 3), (1, 3)])
def test_box_means_keep_means_and_cut_cells(n, m):
    u = np.asarray(noise((n, 3)))
    found = np.asarray(box_means(jnp.asarray(u), (m, 3)))
    np.testing.assert_allclose(found.mean(axis=1), u.mean(axis=1), rtol=0, atol=1e-14)
    fine = np.repeat(u, m, axis=1).reshape(2, m, n, 3).mean(axis=2)
    np.testing.assert_allclose(found, fine, rtol=0, atol=1e-14)


def waves(n, most):
    """exp(2πi k x) at the n cell centres of a line, k = −most … most."""
    return np.exp(2j * np.pi * np.outer((np.arange(n) + 0.5) / n, np.arange(-most, most + 1)))


def band_limited(grid, most, seed=0):
    """A real function of at most `most` periods per axis, at the cell centres of `grid`; the same one for every grid."""
    rng = np.random.default_rng(seed)
    u = rng.standard_normal((2, *(2 * most + 1,) * len(grid))) + 1j * rng.standard_normal((2, *(2 * most + 1,) * len(grid)))
    for a, n in enumerate(grid, start=1):
        u = np.moveaxis(np.tensordot(waves(n, most), u, axes=(1, a)), 0, a)
    return jnp.asarray(u.real)


def amplitudes(u, most):
    """The Fourier coefficients of at most `most` periods per axis."""
    u = np.asarray(u)
    for a, n in enumerate(u.shape[1:], start=1):
        u = np.moveaxis(np.tensordot(waves(n, most).conj().T / n, u, axes=(1, a)), 0, a)
    return u


@pytest.mark.parametrize(("dims", "n", "modes"), [(1, (9, 20), 4), (2, (8, 15), 9), (2, (8, 12), 2), (3, (7, 8), 3)])
def test_a_spectral_convolution_is_one_of_functions_not_of_grids(dims, n, modes):
    """The same weights make the same function of the same function, on odd and even grids."""
    layer = drawn(lambda: SpectralConvolution(dims, 2, 3, (modes,) * dims, key=jax.random.key(0)))
    coarse, fine = (amplitudes(applied(layer, band_limited((m,) * dims, 3)), 3) for m in n)
    size = np.abs(coarse).max()
    assert np.abs(fine - coarse).max() <= 1e-14 * size
    # the last mode that has a weight is there, and none beyond
    last = min(modes - 1, 3)
    assert np.abs(fine[..., 3 + last]).max() > 1e-3 * size
    assert np.abs(fine[..., 3 + last + 1 :]).max(initial=0) <= 1e-14 * size
    spectrum = np.abs(np.fft.rfftn(applied(layer, band_limited((n[1],) * dims, 3)), axes=range(1, dims + 1), norm="forward"))
    assert spectrum[..., last + 1 :].max() <= 1e-14 * size


def test_a_grid_with_fewer_modes_uses_what_it_has():
    layer = drawn(lambda: SpectralConvolution(2, 2, 3, (9, 9), key=jax.random.key(0)))
    fewer = drawn(lambda: SpectralConvolution(2, 2, 3, (3, 3), key=jax.random.key(0)))
    fewer = eqx.tree_at(lambda q: q.weights, fewer, layer.weights[:, :, 6:11, :3])
    for shape in ((6, 5), (5, 6)):
        np.testing.assert_allclose(applied(layer, noise(shape)), applied(fewer, noise(shape)), rtol=0, atol=1e-14)
    highest = jnp.asarray((-1.0) ** np.arange(6))[None, :, None] * jnp.ones((2, 1, 5))
    assert np.abs(applied(layer, highest)).max() <= 1e-14  # Nyquist modes are no functions of the box


def test_a_spectral_convolution_between_walls_is_one_of_the_mirrored_box():
    layer = drawn(lambda: SpectralConvolution(1, 2, 3, (3,), key=jax.random.key(0)))
    u = noise((9,))
    mirrored = jnp.concatenate([u, jnp.flip(u, 1)], axis=1)
    np.testing.assert_array_equal(applied(layer, u, (False,)), applied(layer, mirrored)[:, :9])


def test_an_fno_runs_at_other_resolutions_than_it_was_trained_at():
    """What is left is what its activation aliases: less and less, as cells become smaller."""
    network = made("fno", 2, 0.5)
    *coarse, fine = (amplitudes(applied(network, band_limited((n, n), 2)), 4) for n in (12, 24, 48))
    errors = [np.abs(q - fine).max() / np.abs(fine).max() for q in coarse]
    print(errors)
    assert 1e-4 < errors[0] < 0.2
    assert errors[1] < 0.2 * errors[0]


def test_the_weights_of_an_fno_are_real_numbers():
    leaves = jax.tree.leaves(eqx.filter(made("fno", 3), eqx.is_array))
    assert {a.dtype for a in leaves} == {np.dtype(np.float64)}
    assert any(a.shape == (4, 4, 5, 5, 3, 2) for a in leaves)


# --- graphs -----------------------------------------------------------------------------------------------------------------------


def turned_around(network, axis):
    """The network with the unit vector along `axis` pointing the other way."""
    flipped = lambda q: q.at[:, axis].multiply(-1)  # noqa: E731
    where = lambda n: [m.direction for m, _ in n.rounds] + [n.last.direction]  # noqa: E731
    return eqx.tree_at(where, network, [flipped(q) for q in where(network)])


@pytest.mark.parametrize("periodic", [(True, True), (False, True)])
@pytest.mark.parametrize("axis", [0, 1])
def test_messages_change_sign_with_the_direction_of_the_face(axis, periodic):
    """m_ij = −m_ji: seen from the other end of an axis every message goes the other way."""
    network, u = made("graph_network", 2), noise((6, 5))
    here = np.asarray(applied(network, u, periodic, "messages"))
    there = np.asarray(applied(turned_around(network, axis), jnp.flip(u, axis + 1), periodic, "messages"))
    assert here.shape == (2, 3, 6, 5)
    for a in range(2):
        # face i + ½ lies at n − (i + 1) from the other end, and is stored one below
        expected = np.flip(here[a], axis + 1)
        if a == axis:
            expected = -np.roll(expected, -1, axis + 1)
        np.testing.assert_allclose(there[a], expected, rtol=0, atol=1e-13 * np.abs(here).max())
        assert np.abs(here[a]).max() > 1e-3
    if not periodic[0]:
        assert not here[0][:, -1].any()  # a wall is no edge


def test_a_message_is_the_difference_of_both_directions():
    """By definition, cell by cell: m_ij = φ(h_i, h_j, e) − φ(h_j, h_i, −e), and minus that from j to i."""
    network = made("graph_network", 1)
    layer, h = network.last, noise((7,), 5, 4)
    (m,) = layer(h, (True,))

    def phi(x, y, sign):
        inner = layer.own.weights[..., 0] @ x + layer.own.bias + layer.other @ y + sign * layer.direction[:, 0]
        return layer.out @ jax.nn.gelu(inner)

    for i in range(7):
        j = (i + 1) % 7
        expected = phi(h[:, i], h[:, j], 1) - phi(h[:, j], h[:, i], -1)
        np.testing.assert_allclose(m[:, i], expected, rtol=0, atol=1e-13)


def test_messages_see_so_many_cells_as_there_are_rounds():
    network, u = made("graph_network", 1), noise((12,))
    changed = u.at[:, 5].add(1.0)
    before, after = (applied(network, q, None, "messages") for q in (u, changed))
    moved = np.abs(np.asarray(after - before)).max(axis=(0, 1))
    np.testing.assert_array_equal(np.flatnonzero(moved > 1e-12), [3, 4, 5, 6])
    out = np.abs(np.asarray(applied(network, changed) - applied(network, u))).max(axis=0)
    np.testing.assert_array_equal(np.flatnonzero(out > 1e-12), [3, 4, 5, 6, 7])


# --- what closures ask for -------------------------------------------------------------------------------------------------------


def test_a_network_of_its_own_has_arguments_of_its_own():
    common = {"width": 16, "depth": 3, "kernel": 3, "activation": "gelu", "key": jax.random.key(0)}
    assert isinstance(blank(lambda: make_network(None, 1, 2, 3, **common)), CNN)
    assert isinstance(blank(lambda: make_network(partial(UNet, width=2), 1, 2, 3, **common)), UNet)
    for name, value in (("width", 8), ("depth", 1), ("kernel", 5), ("activation", "relu")):
        with pytest.raises(ValueError, match=f"{name}: found {value!r} beside a network of its own; give it inside `network`"):
            make_network(UNet, 1, 2, 3, **{**common, name: value})
