"""Dynamic Smagorinsky, gradient model, spectral eddy viscosity: planted constants, exact stresses, single modes, laws."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flows import BOTH, TWO_PI, cube, random_flow, relative, sample, solver_of, square

from hybridsim.check import closure_lines
from hybridsim.config import FROM_RUN, blank, catalogue, load_class, make_part
from hybridsim.contract import View
from hybridsim.corrections.dynamic import DynamicSmagorinsky, GermanoPair, centred_deformation, germano_pair, least_squares
from hybridsim.corrections.eddy import filter_width
from hybridsim.corrections.gradient_model import GradientModel
from hybridsim.corrections.spectral_eddy import CUSP, ENSTROPHY, PLATEAU, STEEPNESS, SpectralEddyViscosity, shape
from hybridsim.grid import Grid
from hybridsim.model import Model, State, rollout
from hybridsim.solvers.kuramoto_sivashinsky import FiniteVolumeKS, KuramotoSivashinsky, SpectralKS
from hybridsim.solvers.steppers import SSPRK3

pytestmark = pytest.mark.usefixtures("x64")

UNLIKE = Grid((15, 12), (TWO_PI, 3.0))
UNLIKE_3D = Grid((8, 6, 7), (TWO_PI, 3.0, 5.0))
EDDIES = {
    "dynamic": DynamicSmagorinsky(),
    "dynamic, local": DynamicSmagorinsky(average="local"),
    "spectral": SpectralEddyViscosity(),
    "spectral, cutoff 1": SpectralEddyViscosity(cutoff=1.0),
}
GRADIENTS = {"gradient, 2": GradientModel(), "gradient, 4": GradientModel(order=4)}
CLASSICAL = EDDIES | GRADIENTS
QUICK = (("finite_volume", "dynamic, local"), ("spectral", "dynamic"), ("spectral", "spectral"))


def _view(solver, u, dt=0.01):
    u = jnp.asarray(u)
    return View(u, jnp.zeros((), u.dtype), jnp.asarray(dt, u.dtype), solver.prepare(u.dtype))


def _jit(function):
    """Compiled in a hurry: most of these tests' time would go to the compiler."""
    return eqx.filter_jit(function, compiler_options={"xla_backend_optimization_level": "0"})


_flux = _jit(lambda closure, view: closure(view))
_coefficient = _jit(lambda closure, view: closure.coefficient(view))


@_jit
def _rates(solver, closures, u):
    """What each Flux closure does to u, projected, in physical space: `(closure, c, *grid)`."""
    solver = solver.prepare(u.dtype)
    z = solver.encode(u)
    rates = [solver.constrain({**z, **solver.receive(closure(_view(solver, u)), None)}) for closure in closures]
    return jnp.stack([solver.decode(rate) for rate in rates])


def _rough(solver, seed):
    noise = np.random.default_rng(seed).standard_normal((len(solver.variables), *solver.grid.shape))
    return np.asarray(jax.jit(lambda q: solver.project(q))(jnp.asarray(noise)))


def _cascading(solver, seed, **options):
    """A random flow, or the same one running backwards, such that its large scales give energy to the small ones."""
    u = random_flow(solver, seed, **options)
    if float(_coefficient(DynamicSmagorinsky(), _view(solver, u))) == 0:
        u = u * np.where(np.arange(len(u)) < solver.grid.ndim, -1, 1).reshape(-1, *(1,) * solver.grid.ndim)
    assert float(_coefficient(DynamicSmagorinsky(), _view(solver, u))) > 0
    return u


def _trigonometric(grid, seed, modes=2):
    """A field of the modes |k_i| ≤ `modes` at the cell centres, and the function that filters what is given on the grid."""
    rng = np.random.default_rng(seed)
    x, out = grid.mesh(), 0.3
    for index in np.ndindex(*[modes + 1] * grid.ndim):
        signs = rng.choice([-1, 1], grid.ndim)
        phase = sum(TWO_PI * s * n * q / length for s, n, q, length in zip(signs, index, x, grid.lengths, strict=True))
        out = out + rng.standard_normal() * np.cos(phase + rng.uniform(0, TWO_PI))
    return out


def _gaussian(q, grid, width):
    """exp(−Σ_a k_a² Δ_a²/24) q̂, Δ_a = width · Δx_a."""
    exponent = sum((k * width * h) ** 2 / 24 for k, h in zip(grid.wavenumbers(), grid.spacing, strict=True))
    axes = tuple(range(-grid.ndim, 0))
    return np.fft.irfftn(np.exp(-exponent) * np.fft.rfftn(q, axes=axes), s=grid.shape, axes=axes)


# --- laws of all of them ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", BOTH)
@pytest.mark.parametrize("grid", [UNLIKE, pytest.param(UNLIKE_3D, marks=pytest.mark.slow)], ids=lambda g: str(g.shape))
def test_eddy_viscosities_only_remove_energy_and_scalar_variance(kind, grid):
    """The gradient model beside them is the negative control: it gives energy to some flows and takes it from others."""
    solver = solver_of(kind, grid, scalars={"c": 1e-3, "e": 1e-3})
    signs = []
    for seed in range(6):
        u = _rough(solver, seed)
        rates = np.asarray(_rates(solver, (*EDDIES.values(), *GRADIENTS.values()), jnp.asarray(u)))
        work = (u[None] * rates).reshape(*rates.shape[:2], -1).sum(axis=2)
        energy, variance = work[:, : grid.ndim].sum(axis=1), work[:, grid.ndim :]
        active = np.abs(rates[: len(EDDIES)]).max(axis=tuple(range(1, rates.ndim))) > 0
        signs.append((np.sign(energy[len(EDDIES) :]), active))
        assert ((energy[: len(EDDIES)] < 0) == active).all()
        assert ((variance[: len(EDDIES)] < 0) == active[:, None]).all()
        sums = np.abs(rates.reshape(*work.shape, -1).sum(axis=2))
        assert (sums <= 1e-12 * np.abs(rates).reshape(*work.shape, -1).sum(axis=2)).all()
    gradient, active = (np.stack(found) for found in zip(*signs, strict=True))
    assert (gradient > 0).any()
    assert (gradient < 0).any()
    assert active[:, 1:].all()  # that of `volume` may be cut off in all of a random field
    assert active[:, 0].any()


@pytest.mark.parametrize("kind", ["finite_volume", pytest.param("spectral", marks=pytest.mark.slow)])
def test_mean_flows_change_nothing(kind):
    solver = solver_of(kind, UNLIKE, scalars={"c": 1e-3})
    u = _cascading(solver, 3)
    moved = u + np.array([7.0, -3.0, 0.0])[:, None, None]
    closures = tuple(CLASSICAL.values())
    every = _jit(lambda u: [closure(_view(solver, u)) for closure in closures])
    for here, there, single in zip(*(every(q) for q in (u, moved, moved.astype(np.float32))), strict=True):
        assert np.abs(here).max() > 1e-6
        assert relative(there, here) < 1e-12
        assert single.dtype == np.float32
        assert relative(single, here) < 2e-4


@pytest.mark.parametrize(("kind", "name"), [
    pytest.param(kind, name, marks=[] if (kind, name) in QUICK else pytest.mark.slow) for kind in BOTH for name in CLASSICAL
])  # fmt: skip
def test_nothing_moves_at_rest_and_gradients_are_finite_there(kind, name):
    solver = solver_of(kind, Grid((8, 6), (TWO_PI, 3.0)), scalars={"c": 1e-3})
    closure = eqx.tree_at(lambda c: c.c, CLASSICAL[name], jnp.asarray(0.8))

    @_jit
    def both(closure, u):
        loss = lambda q: jnp.sum(jnp.sin(1 + jnp.arange(2 * u.size)) * q[0](_view(solver, q[1])).ravel())  # noqa: E731
        return closure(_view(solver, u)), jax.grad(loss)((closure, u))

    for mean in (0.0, 1.0):
        flux, gradient = both(closure, jnp.full((3, 8, 6), mean))
        assert np.abs(flux).max() <= 1e-15
        assert all(np.isfinite(a).all() for a in jax.tree.leaves(gradient))
    _, gradient = both(closure, jnp.asarray(_cascading(solver, 1, modes=2)))
    assert all(np.isfinite(a).all() for a in jax.tree.leaves(gradient))
    assert float(gradient[0].c) != 0


def test_each_has_a_constant_that_is_a_factor():
    solver = solver_of("spectral", UNLIKE)
    view = _view(solver, _cascading(solver, 5))
    for closure in CLASSICAL.values():
        assert closure.constants == ("c",)
        one, three = (np.asarray(_flux(eqx.tree_at(lambda c: c.c, closure, jnp.asarray(c)), view)) for c in (1.0, 3.0))
        assert one.any()
        np.testing.assert_allclose(three, 3 * one, rtol=1e-13, atol=0)


@pytest.mark.parametrize(
    ("use", "given", "checked"),
    [
        ("dynamic_smagorinsky", {"average": "local", "ratio": 2.45, "c": 0.9}, {"average": "local", "ratio": 2.45}),
        ("gradient_model", {"order": 4, "width": 2.0}, {"order": 4, "width": 2.0}),
        ("spectral_eddy_viscosity", {"cutoff": 1.0, "schmidt": 0.6}, {"cutoff": 1.0, "schmidt": 0.6}),
    ],
)
def test_each_is_built_from_its_short_name(use, given, checked):
    part = make_part(use, load_class(catalogue("closures")[use]), given, ("corrections",), FROM_RUN)
    closure = blank(lambda: part.build(dims=2, grid=UNLIKE, variables=(), free_weights=0, key=jax.random.key(0)))
    assert {name: getattr(closure, name) for name in checked} == checked


@pytest.mark.slow
@pytest.mark.parametrize(
    ("use", "arguments"),
    [
        ("dynamic_smagorinsky", {}),
        ("dynamic_smagorinsky", {"average": "local"}),
        ("gradient_model", {}),
        ("gradient_model", {"order": 4}),
        ("spectral_eddy_viscosity", {}),
    ],
)
def test_each_passes_every_check(use, arguments, tmp_path):
    lines = closure_lines(use, arguments, tmp_path)
    assert not [line for line in lines if line.passed is False]
    assert sum(line.passed is True for line in lines) > 30


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda: DynamicSmagorinsky(-1.0), "c: must be finite and not negative, found -1"),
        (lambda: DynamicSmagorinsky(ratio=1.0), "ratio: the test filter must be wider than the grid's, found 1"),
        (lambda: DynamicSmagorinsky(schmidt=0.0), "schmidt: must be positive and finite, found 0"),
        (lambda: DynamicSmagorinsky(largest=0.0), "largest: must be positive and finite, found 0"),
        (lambda: GradientModel(float("nan")), "c: must be finite and not negative, found nan"),
        (lambda: GradientModel(width=0.0), "width: must be positive and finite, found 0"),
        (lambda: SpectralEddyViscosity(-0.1), "c: must be finite and not negative"),
        (lambda: SpectralEddyViscosity(cutoff=1.5), r"cutoff: a share of the largest wavenumber in \(0, 1\], found 1.5"),
        (lambda: SpectralEddyViscosity(schmidt=-1.0), "schmidt: must be positive and finite"),
    ],
)
def test_arguments_are_checked(make, sentence):
    with pytest.raises(ValueError, match=sentence):
        make()


def test_a_spectral_eddy_viscosity_keeps_to_periodic_boxes_of_two_and_three_dimensions():
    walls = solver_of("finite_volume", Grid((8, 8), (1.0, 1.0), ("periodic", "no_slip")))
    with pytest.raises(ValueError, match="SpectralEddyViscosity: needs periodic boundaries"):
        SpectralEddyViscosity()(_view(walls, np.ones((2, 8, 8))))
    line = SpectralKS(Grid((16,), (22.0,)), KuramotoSivashinsky())
    with pytest.raises(ValueError, match="SpectralEddyViscosity: made for two and three dimensions"):
        SpectralEddyViscosity()(_view(line, np.ones((1, 16))))


# --- dynamic Smagorinsky ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("grid", [Grid((16,), (3.0,)), UNLIKE, UNLIKE_3D], ids=lambda g: str(g.shape))
@pytest.mark.parametrize("average", ["volume", "local"])
def test_the_identity_returns_a_planted_constant(grid, average):
    """L = C M exactly: C in every cell. With whatever is orthogonal to M on top, such as a pressure: still C on average."""
    rng, d = np.random.default_rng(0), grid.ndim
    u, slope = rng.standard_normal((d, *grid.shape)), rng.standard_normal((d, d, *grid.shape))
    double = jnp.asarray(slope + np.swapaxes(slope, 0, 1))
    pair = germano_pair(jnp.asarray(u), double, grid, 0.7, 2.0)
    planted = GermanoPair(0.0289 * pair.basis, pair.basis)
    np.testing.assert_allclose(least_squares(planted, grid, average), 0.0289, rtol=1e-12)
    other = rng.standard_normal(pair.basis.shape)
    other -= np.vdot(other, pair.basis) / np.vdot(pair.basis, pair.basis) * np.asarray(pair.basis)
    found = least_squares(GermanoPair(0.0289 * pair.basis + jnp.asarray(other), pair.basis), grid, average)
    if average == "volume":
        np.testing.assert_allclose(found, 0.0289, rtol=1e-12)
    else:
        assert np.ptp(found) > 1e-3


@pytest.mark.parametrize("grid", [UNLIKE, UNLIKE_3D], ids=lambda g: str(g.shape))
def test_the_dynamic_constant_is_that_of_the_formula(grid):
    """Against transforms: the test filter is Π cos²(½ k_a Δx_a), strain is exact, and C = ⟨L:M⟩/⟨M:M⟩ with α = 2."""
    solver = solver_of("spectral", grid)
    u = _cascading(solver, 6, modes=2)
    d, axes = grid.ndim, tuple(range(-grid.ndim, 0))
    transfer = np.ones(())
    for k, h in zip(grid.wavenumbers(), grid.spacing, strict=True):
        transfer = transfer * np.cos(0.5 * k * h) ** 2

    def applied(factor, q):
        return np.fft.irfftn(factor * np.fft.rfftn(q, axes=axes), s=grid.shape, axes=axes)

    size = lambda s: np.sqrt(2 * (s**2).sum(axis=(0, 1)))  # noqa: E731
    slope = np.stack([applied(1j * k, u) for k in grid.wavenumbers()])
    strain = 0.5 * (slope + np.swapaxes(slope, 0, 1))
    smooth, strain_hat = applied(transfer, u), applied(transfer, strain)
    leonard = applied(transfer, u[:, None] * u[None]) - smooth[:, None] * smooth[None]
    width = np.prod(grid.spacing) ** (1 / d)
    basis = -2 * width**2 * (4 * size(strain_hat) * strain_hat - applied(transfer, size(strain) * strain))
    exact = (leonard * basis).sum() / (basis**2).sum()
    view = _view(solver, u)
    found = float(_coefficient(DynamicSmagorinsky(largest=10.0), view))
    print(grid.shape, np.sqrt(exact))
    assert 0.01 < np.sqrt(exact) < 1
    np.testing.assert_allclose(found, exact, rtol=1e-11)
    flux = np.asarray(_flux(DynamicSmagorinsky(largest=10.0), view))
    np.testing.assert_allclose(flux, -2 * exact * width**2 * size(strain) * strain, rtol=0, atol=1e-11 * np.abs(flux).max())
    # backwards the energy goes the other way: cut off
    assert float(_coefficient(DynamicSmagorinsky(), _view(solver, -u))) == 0


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "options"), [("spectral", {"dealias": "two_thirds"}), ("finite_volume", {"convection": "central"})]
)
def test_in_turbulence_the_dynamic_constant_is_that_of_lilly(kind, options):
    """c_s = 0.17 where −5/3 spectra reach the cut-off of a spectral solver (Lilly 1967), at three turnover times from random waves;
    the spectral eddy viscosity, which knows of no c_s, takes as much energy in the same flow."""
    solver = solver_of(kind, cube(24), 1e-4, **options)
    u = random_flow(solver, 1, modes=3, dtype=np.float32)
    energies = {}
    for closure in (DynamicSmagorinsky(), SpectralEddyViscosity()):
        final = rollout(Model(solver, SSPRK3(), 0.05, (closure,)), State(jnp.asarray(u)), 1, every=150).u[-1]
        energies[type(closure)] = float(0.5 * (final**2).sum(axis=0).mean())
        found = float(jnp.sqrt(_coefficient(DynamicSmagorinsky(), _view(solver, final))))
        print(kind, type(closure).__name__, found, energies[type(closure)])
        assert (0.15 < found < 0.19) if kind == "spectral" else (0.16 < found < 0.22)
    assert abs(energies[SpectralEddyViscosity] / energies[DynamicSmagorinsky] - 1) < 0.15
    assert energies[DynamicSmagorinsky] < 0.7 * float(0.5 * (u**2).sum(axis=0).mean())


def test_a_dynamic_constant_vanishes_in_laminar_shear():
    """In laminar shear there is nothing to model."""
    for kind in BOTH:
        solver = solver_of(kind, square(16))
        shear = sample(solver, lambda x, y: np.sin(y) + 0.3 * np.cos(3 * y), lambda x, y: 0 * x)
        for average in ("volume", "local"):
            assert np.abs(_coefficient(DynamicSmagorinsky(average=average), _view(solver, shear))).max() < 1e-13


def test_a_turning_box_has_no_dynamic_viscosity():
    """u = −Ω y, v = Ω x between walls that do not turn: far from them S is rounding, and C is zero instead of noise over noise."""
    grid = Grid((16, 16), (1.0, 1.0), ("free_slip", "free_slip"))
    solver = solver_of("finite_volume", grid)
    for dtype in (np.float32, np.float64):
        u = sample(solver, lambda x, y: 0.5 - y, lambda x, y: x - 0.5).astype(dtype)
        found = np.asarray(_coefficient(DynamicSmagorinsky(average="local"), _view(solver, u)))
        assert (found[4:-4, 4:-4] == 0).all()
        assert found.max() > 0


def test_classical_closures_between_walls():
    """Finite and blind to what is stored where a wall is; a dynamic one dissipative, and as in a periodic box far from the wall."""
    walls = Grid((12, 16), (TWO_PI, TWO_PI), ("periodic", "no_slip"))
    solver, open_ = solver_of("finite_volume", walls), solver_of("finite_volume", Grid((12, 16), (TWO_PI, TWO_PI)))
    u = random_flow(open_, 4)
    dead = u.copy()
    dead[1, :, -1] = 1e6
    closure = DynamicSmagorinsky(average="local")
    here, there = (np.asarray(_rates(solver, (closure, GRADIENTS["gradient, 4"]), jnp.asarray(q))) for q in (u, dead))
    np.testing.assert_array_equal(here, there)
    assert np.isfinite(here).all()
    assert (here[0] * np.asarray(jax.jit(lambda q: solver.project(q))(jnp.asarray(u)))).sum() < 0
    free = np.asarray(_coefficient(closure, _view(open_, u)))
    bound = np.asarray(_coefficient(closure, _view(solver, u)))
    np.testing.assert_allclose(bound[:, 5:-5], free[:, 5:-5], rtol=1e-10)


@pytest.mark.parametrize("kind", ["spectral", pytest.param("finite_volume", marks=pytest.mark.slow)])
def test_scalars_are_mixed_by_the_eddy_viscosity_over_the_schmidt_number(kind):
    solver, bare = solver_of(kind, UNLIKE, scalars={"c": 0.0}), solver_of(kind, UNLIKE)
    u = _cascading(solver, 3)
    for make in (lambda sc: DynamicSmagorinsky(average="local", schmidt=sc), lambda sc: SpectralEddyViscosity(schmidt=sc)):
        one, two = (np.asarray(_flux(make(sc), _view(solver, u))) for sc in (0.5, 2.0))
        np.testing.assert_array_equal(one[:, :2], two[:, :2])
        np.testing.assert_allclose(one[:, 2], 4 * two[:, 2], rtol=1e-13)
        assert np.abs(one[:, 2]).max() > 1e-6
        assert relative(one[:, :2], _flux(make(0.5), _view(bare, u[:2]))) < 1e-13


@pytest.mark.parametrize("make", [SpectralKS, FiniteVolumeKS])
def test_a_dynamic_viscosity_on_a_line(make):
    """Steepening waves have C > 0, and spreading ones, which are the same the other way round, have none."""
    solver = make(Grid((32,), (TWO_PI,)), KuramotoSivashinsky())
    x = solver.grid.mesh()[0]
    front = -np.sin(x) - 0.5 * np.sin(2 * x)
    closure = DynamicSmagorinsky()
    view = _view(solver, front[None])
    found = float(_coefficient(closure, view))
    assert 0.05 < np.sqrt(found) <= 0.5
    assert float(_coefficient(closure, _view(solver, -front[None]))) == 0
    slope = np.asarray(centred_deformation(view))[0, 0]
    exact = -found * filter_width(view) ** 2 * np.abs(slope) * slope
    flux = np.asarray(_flux(closure, view))[0, 0]
    assert relative(flux, exact) < (1e-12 if make is SpectralKS else 0.3)


# --- gradient model --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "grid", [Grid((24, 16), (TWO_PI, 3.0)), Grid((10, 12, 11), (TWO_PI, 5.0, 4.0))], ids=lambda g: str(g.shape)
)
def test_the_gradient_model_is_the_exact_stress_to_its_order(grid):
    """Of a Gaussian filter on unlike axes, scalars included: the error is Δ⁴ for order 2 and Δ⁶ for order 4."""
    solver, d = solver_of("spectral", grid, scalars={"c": 0.0, "e": 0.0}), grid.ndim
    u = np.stack([_trigonometric(grid, c, 2 if d == 2 else 1) for c in range(d + 2)])
    errors = {order: [] for order in (2, 4)}
    for width in (1.0, 0.5, 0.25):
        smooth = _gaussian(u, grid, width)
        exact = _gaussian(u[:d, None] * u[None], grid, width) - smooth[:d, None] * smooth[None]
        for order, found in errors.items():
            flux = np.asarray(_flux(GradientModel(order=order, width=width), _view(solver, smooth)))
            found.append(np.abs(flux - exact).max(axis=tuple(range(2, 2 + d))))
    for order, expected in ((2, 4), (4, 6)):
        rates = np.log2(np.array(errors[order][:-1]) / np.array(errors[order][1:]))
        print(grid.shape, order, rates[-1].min(), rates[-1].max())
        assert np.abs(rates[-1] - expected).max() < 0.15
    assert (errors[4][0] < 0.2 * errors[2][0]).all()


def test_the_gradient_model_of_burgers_flux():
    """filter(½u²) − ½ū² = (Δ²/24)(∂x u)² + (Δ⁴/576)(∂xx u)² + …."""
    grid = Grid((32,), (22.0,))
    solver, u = SpectralKS(grid, KuramotoSivashinsky()), _trigonometric(grid, 1, 4)
    errors = []
    for width in (1.0, 0.5):
        smooth = _gaussian(u, grid, width)
        exact = 0.5 * (_gaussian(u**2, grid, width) - smooth**2)
        fluxes = [np.asarray(_flux(GradientModel(order=n, width=width), _view(solver, smooth[None])))[0, 0] for n in (2, 4)]
        errors.append([np.abs(f - exact).max() for f in fluxes])
    rates = np.log2(np.array(errors[0]) / np.array(errors[1]))
    assert np.abs(rates - [4, 6]).max() < 0.25


def test_finite_volumes_have_the_same_gradient_model():
    """Staggered differences approach exact derivatives to second order, in both terms (one filter, four and eight cells wide)."""
    apart = []
    for n in (24, 48):
        closure, rates = GradientModel(order=4, width=n / 6), []
        for kind in BOTH:
            solver = solver_of(kind, square(n))
            rate = np.asarray(_rates(solver, (closure,), jnp.asarray(random_flow(solver, 2, modes=2))))[0]
            rates.append(np.asarray(_view(solver, rate).centred()))
        apart.append(relative(rates[1], rates[0]))
    print(apart)
    assert 3.2 < apart[0] / apart[1] < 4.8
    assert apart[1] < 0.1


# --- spectral eddy viscosity -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", BOTH)
@pytest.mark.parametrize("dims", [2, 3])
def test_each_mode_is_damped_by_its_own_viscosity(kind, dims):
    """u has energy ¼b² in the last shell, one mode thick, below k_c = 0.66 · 8; a scalar wave decays at the rate ν_t(k) k²/Sc."""
    grid, b = (square if dims == 2 else cube)(16), 0.3
    solver = solver_of(kind, grid, scalars={"c": 0.0}, **({"dealias": "none"} if kind == "spectral" else {}))
    end = 0.66 * 8
    for k in (1.0, 3.0, 5.0, 7.0):
        flow = [lambda x, y, *_: 1 + b * np.cos(5 * y) + np.sin(2 * y) + 0 * x, *[lambda x, *_: 0 * x] * (dims - 1)]
        u = sample(solver, *flow, lambda x, *_, k=k: 0.7 + np.cos(k * x + 0.3))
        own = k if kind == "spectral" else 16 / np.pi * np.sin(np.pi * k / 16)
        ratio = np.exp(-3.03 * end / min(k, end)) * 34.47
        theory = (0.441 * 1.4**-1.5 * (1 + ratio) if dims == 3 else 1.683 * 1.3**-1.5 * ratio) * np.sqrt(0.25 * b**2 / end)
        rates = np.asarray(_rates(solver, (SpectralEddyViscosity(1.3, schmidt=0.6),), jnp.asarray(u)))[0]
        np.testing.assert_allclose(
            rates[-1], -1.3 / 0.6 * theory * own**2 * (u[-1] - 0.7), rtol=0, atol=1e-11 * theory * own**2 + 1e-14
        )
    quiet = sample(solver, lambda x, y, *_: np.cos(4 * y) + 0 * x, *flow[1:], lambda x, *_: np.cos(x))
    assert np.abs(_flux(SpectralEddyViscosity(), _view(solver, quiet))).max() < 1e-15


def test_the_cascade_is_taken_out_as_it_comes():
    """E = C η^⅔ k⁻³: 2 ∫ ν_t k⁴ E dk = η; E = C_K ε^⅔ k^(−5/3): 2 ∫ ν_t k² E dk = ε within the 5 % of the fit."""
    x = (np.arange(100_000) + 0.5) / 100_000
    enstrophy = 2 * np.mean(shape(x, 2) * np.sqrt(1.3) * x**4 * 1.3 * x**-3)
    energy = 2 * np.mean(shape(x, 3) * np.sqrt(1.4) * x**2 * 1.4 * x ** (-5 / 3))
    assert abs(enstrophy - 1) < 1e-3
    assert abs(energy - 1) < 0.05
    assert shape(np.array([1e-3]), 3) == pytest.approx(0.2662, abs=1e-4)
    assert shape(np.array([1.0]), 3) / PLATEAU == pytest.approx(1 + CUSP * np.exp(-STEEPNESS))
    assert shape(np.array([1.0]), 2) / ENSTROPHY == pytest.approx(CUSP * np.exp(-STEEPNESS))
