"""The pseudo-spectral gas solver: exact waves, spectral order, conservation, gradients, the compiled program itself."""

import json

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flows import steps
from rich.console import Console

from hybridsim.check import violations
from hybridsim.config import experiment_from
from hybridsim.corrections.learned import LearnedFlux
from hybridsim.experiment import run_experiment
from hybridsim.grid import Grid
from hybridsim.model import Model, State, rollout
from hybridsim.solvers.compressible import CompressibleNavierStokes
from hybridsim.solvers.compressible_initial import LinearWave
from hybridsim.solvers.cooling import PowerLawCooling
from hybridsim.solvers.godunov import CompressibleFiniteVolume
from hybridsim.solvers.spectral import dealiasing_mask
from hybridsim.solvers.spectral_gas import CompressibleSpectral
from hybridsim.solvers.steppers import SSPRK3
from hybridsim.solvers.stirring import OrnsteinUhlenbeck

VISCOUS = CompressibleNavierStokes(gamma=5 / 3, viscosity=2e-3, prandtl=0.7, viscosity_exponent=0.5, scalars={"dye": 1e-3})


pytestmark = pytest.mark.usefixtures("x64")


def noise(shape: tuple[int, ...], equation: CompressibleNavierStokes, dtype=jnp.float64, size: float = 0.1) -> jax.Array:
    d = len(shape)
    w = size * jax.random.normal(jax.random.key(1), (d + 2 + len(equation.scalars), *shape), dtype)
    return equation.conserved(w.at[0].add(1).at[d + 1].add(1))


def after(model: Model, u: jax.Array, steps: int) -> jax.Array:
    """The state after so many steps."""
    return rollout(model, State(u), 1, every=steps).u[-1]


def smooth(n: int, d: int, equation: CompressibleNavierStokes) -> jax.Array:
    """A flow with a few waves along every axis, on n cells each."""
    x = jnp.meshgrid(*[(jnp.arange(n) + 0.5) / n] * d, indexing="ij")
    waves = sum(jnp.sin(2 * jnp.pi * (q + 0.1 * a)) for a, q in enumerate(x))
    others = sum(jnp.cos(2 * jnp.pi * (q + 0.2)) for q in x)
    w = [1 + 0.1 * waves, *(0.2 * others + 0.1 * a * waves for a in range(d)), 1 + 0.05 * others]
    return equation.conserved(jnp.stack([*w, *([0.5 + 0.1 * waves] * len(equation.scalars))]))


@pytest.mark.parametrize("d", [1, 2, 3])
def test_sound_returns_after_a_period(d):
    equation = CompressibleNavierStokes(gamma=5 / 3)
    grid = Grid((12,) + (6,) * (d - 1), (1.0,) * d)
    solver = CompressibleSpectral(grid, equation)
    wave = LinearWave("sound_right", 1e-6)
    u = wave(jax.random.key(0), grid, tuple(v.at for v in solver.variables), jnp.float64, equation=equation)
    period, steps = wave.period(grid), 200
    out = after(Model(solver, SSPRK3(), period / steps), u, steps)
    assert float(jnp.abs(out - u).max()) < 1e-9


@pytest.mark.parametrize("d", [1, 2, 3])
def test_rates_converge_faster_than_any_power(d):
    """Against the same flow on a grid that resolves every product."""
    fine = 48
    exact = CompressibleSpectral(Grid((fine,) * d, (1.0,) * d), VISCOUS, "none").explicit(
        {"u": smooth(fine, d, VISCOUS), "injected": jnp.zeros(d + 4)}, jnp.zeros(()), lambda z, t: None
    )["u"]
    waves = sum(np.meshgrid(*[np.arange(3)] * d, indexing="ij"))
    at_corners = lambda m: np.exp(-1j * np.pi * waves / m)  # noqa: E731
    errors = []
    for n in (8, 16, 24):
        solver = CompressibleSpectral(Grid((n,) * d, (1.0,) * d), VISCOUS, "none")
        rate = solver.explicit({"u": smooth(n, d, VISCOUS), "injected": jnp.zeros(d + 4)}, jnp.zeros(()), lambda z, t: None)["u"]
        # cells' centres differ from grid to grid: the longest waves are compared, with their phases at the corner of the box
        low = [np.fft.fftn(np.asarray(q), axes=range(1, d + 1)) / q[0].size for q in (rate, exact)]
        pick = np.ix_(range(rate.shape[0]), *[[0, 1, 2]] * d)
        errors.append(np.abs(low[0][pick] * at_corners(n) - low[1][pick] * at_corners(fine)).max())
    assert errors[1] < 1e-2 * errors[0]
    assert errors[2] < 1e-2 * errors[1] or errors[2] < 1e-11


def test_agrees_with_finite_volumes_as_they_are_refined():
    """The viscous terms and those of scalars, by another discretisation."""
    far = []
    for n in (32, 64):
        grid = Grid((n, n), (1.0, 1.0))
        u = smooth(n, 2, VISCOUS)
        rates = []
        for solver in (CompressibleSpectral(grid, VISCOUS), CompressibleFiniteVolume(grid, VISCOUS, "weno5z")):
            z = solver.encode(u)
            rates.append(solver.explicit(z, jnp.zeros(()), lambda z, t: None)["u"])
        far.append(np.abs(rates[0] - rates[1]).max((1, 2)))
    assert (far[1] < far[0] / 3.5).all()
    # the viscous part alone, channel by channel: much larger than what still separates the two
    inviscid = CompressibleSpectral(grid, CompressibleNavierStokes(gamma=5 / 3, scalars={"dye": 0.0}))
    viscous = rates[0] - inviscid.explicit(inviscid.encode(u), jnp.zeros(()), lambda z, t: None)["u"]
    assert (far[1][1:] < 0.2 * np.abs(viscous[1:]).max((1, 2))).all()


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])
def test_sums_are_kept_for_any_network(dtype):
    grid = Grid((12, 10, 8), (1.0, 1.2, 0.9))
    solver = CompressibleSpectral(grid, VISCOUS)
    u = solver.project(noise(grid.shape, VISCOUS, dtype, 0.03))
    closure = LearnedFlux(dims=3, width=4, depth=2, symmetric=False, variables=solver.variables, key=jax.random.key(3))
    closure = jax.tree.map(lambda q: 0.05 * jax.random.normal(jax.random.key(4), q.shape, dtype) if eqx.is_array(q) else q, closure)
    out = after(Model(solver, SSPRK3(), 0.005, (closure,)), u, 20)
    bare = after(Model(solver, SSPRK3(), 0.005), u, 20)
    assert float(jnp.abs(out - bare).max()) > 1e-4  # the closure does something
    sums = [q.mean((1, 2, 3)) for q in (u, out)]
    assert float(jnp.abs(sums[1] - sums[0]).max()) < 200 * float(jnp.finfo(dtype).eps)


def test_convection_makes_no_kinetic_energy_even_where_it_is_aliased():
    """d/dt Σ ½ρ|v|² = Σ p ∇·v without viscosity, whatever the grid resolves; an odd grid has no wave of Nyquist."""
    equation = CompressibleNavierStokes(gamma=5 / 3)
    grid = Grid((9, 7, 5), (1.0, 1.1, 0.9))
    solver = CompressibleSpectral(grid, equation, "none").prepare(jnp.float64)
    u = noise(grid.shape, equation)
    w = equation.primitive(u)
    v, rate = w[1:4], solver._rate(u)
    change = (v * rate[1:4]).sum() - 0.5 * ((v * v).sum(0) * rate[0]).sum()
    work = sum((w[4] * solver.derivative(v[a], grid.centre, a)[0]).sum() for a in range(3))
    assert float(change) == pytest.approx(float(work), rel=1e-10)


@pytest.mark.parametrize("n", [12, 24, 32])
def test_the_compiled_program_does_what_is_written(n):
    """Compilers err: the same rate, operation by operation and as one program."""
    solver = CompressibleSpectral(Grid((n,) * 3, (1.0,) * 3), VISCOUS).prepare(jnp.float32)
    u = noise((n,) * 3, VISCOUS, jnp.float32)
    written, compiled = solver._rate(u), eqx.filter_jit(lambda s, q: s._rate(q))(solver, u)
    assert float(jnp.abs(written - compiled).max()) < 2e-5 * float(jnp.abs(written).max())


def test_gradients_agree_with_differences():
    grid = Grid((8, 8), (1.0, 1.0))
    u = smooth(8, 2, VISCOUS)

    def energy(viscosity, scale):
        equation = eqx.tree_at(lambda e: e.viscosity, VISCOUS, viscosity)
        out = after(Model(CompressibleSpectral(grid, equation), SSPRK3(), 0.005), scale * u, 10)
        return (out[1:3] ** 2).sum()

    at = jnp.asarray(0.02), jnp.asarray(1.0)
    slopes = jax.grad(energy, (0, 1))(*at)
    for i, h in enumerate((1e-6, 1e-6)):
        ahead, behind = (energy(*(q + s * h if j == i else q for j, q in enumerate(at))) for s in (1, -1))
        assert float(slopes[i]) == pytest.approx(float(ahead - behind) / (2 * h), rel=1e-5)


def test_restriction_keeps_waves_and_sums():
    equation = CompressibleNavierStokes(gamma=5 / 3)
    fine, coarse = (CompressibleSpectral(Grid((n, n), (1.0, 1.0)), equation) for n in (24, 12))
    u = noise((24, 24), equation)
    out = coarse.restrict(u, fine.grid, fine.variables)
    np.testing.assert_allclose(out.mean((1, 2)), u.mean((1, 2)), rtol=1e-13)
    np.testing.assert_allclose(coarse.restrict(out, coarse.grid, coarse.variables), out, atol=1e-13)
    # ρ, ρv and E of this flow have at most three waves along an axis, which both grids hold: its values at other centres
    known = smooth(12, 2, equation)
    np.testing.assert_allclose(coarse.restrict(smooth(24, 2, equation), fine.grid, fine.variables), known, atol=1e-12)


@pytest.mark.parametrize("dealias", ["none", "hou_li", "two_thirds"])
def test_closures_see_the_adjoint_of_what_their_flux_does(dealias):
    solver = CompressibleSpectral(Grid((8, 5), (1.0, 0.9)), CompressibleNavierStokes(gamma=5 / 3), dealias).prepare(jnp.float64)
    divergence = jax.vmap(lambda f: solver.receive(f.reshape(2, 1, 8, 5), None)["u"].ravel())(jnp.eye(80))
    q = np.random.default_rng(0).standard_normal((1, 8, 5))
    np.testing.assert_allclose(solver.adjoint_gradient(jnp.asarray(q)).ravel(), divergence @ q.ravel(), atol=1e-12)
    assert np.linalg.norm(divergence, 2) ** 2 == pytest.approx(solver.flux_response, rel=1e-12)


@pytest.mark.parametrize("dealias", ["hou_li", "two_thirds"])
def test_forces_and_cooling_are_in_the_ledger_and_put_nothing_where_no_wave_lives(dealias):
    equation = CompressibleNavierStokes(
        gamma=5 / 3,
        viscosity=5e-3,
        forcing=OrnsteinUhlenbeck(amplitude=3.0, highest_mode=2),
        cooling=PowerLawCooling(amplitude=0.5, exponent=0.5, reference_temperature=1.0, floor=0.1),
    )
    solver = CompressibleSpectral(Grid((16, 12), (1.0, 1.0)), equation, dealias)
    u = solver.project(noise((16, 12), equation, size=0.1))
    frames, ledger = steps(Model(solver, SSPRK3(), 0.005), u, 20)
    sums = np.asarray(frames).mean((2, 3))
    rows = dict(zip(solver.ledger_rows, np.asarray(ledger[0] + ledger[1]).T, strict=True))
    for i, name in enumerate(solver.conserved):
        np.testing.assert_allclose(sums[1:, i] - sums[0, i], rows[name], atol=1e-13)
    assert np.abs(sums[-1, 1:3] - sums[0, 1:3]).min() > 1e-5  # ⟨ρ a⟩ of a density that varies
    assert rows["radiated"][-1] > 0.01
    hat = np.abs(np.fft.rfft2(np.asarray(frames[-1])))
    empty = dealiasing_mask(solver.grid, dealias) < 0.1
    assert hat[:, empty].max() < 1e-12 < 1e-6 < hat[:, ~empty].max()


def test_closures_keep_their_contract():
    assert not violations("smagorinsky", solver="compressible spectral", cs=0.2)


def test_what_it_refuses():
    equation = CompressibleNavierStokes()
    with pytest.raises(ValueError, match="periodic"):
        CompressibleSpectral(Grid((8, 8), (1.0, 1.0), ("periodic", "outflow")), equation)
    with pytest.raises(ValueError, match="at least 4"):
        CompressibleSpectral(Grid((8, 2), (1.0, 1.0)), equation)


def test_a_run_is_judged_as_one_without_floors(tmp_path):
    written = {
        "equation": {"use": "compressible", "viscosity": 2e-3},
        "domain": {"lengths": [1.0, 1.0]},
        "initial": {"use": "compressible_turbulence", "mach": 0.3, "pressure": 0.6, "highest_mode": 2},
        "samples": {"count": 1},
        "time": {"end": 0.1, "frames": 2},
        "reference": {"solver": "spectral", "shape": [16, 16], "cfl": 0.5},
        "runs": {"bare": {"solver": "spectral", "shape": [8, 8], "dt": 0.025}},
        "compare": {"modes": 3},
        "checks": {"all": {"drift": 1e-5, "floors": {"events": 0, "mass": 0.0}}, "bare": {"bound_violations": 0}},
    }
    console = Console(file=(tmp_path / "out.txt").open("w"))
    assert run_experiment(experiment_from(written, tmp_path / "box.yaml"), tmp_path / "box", False, console) == 1
    console.file.close()
    summary = json.loads((tmp_path / "box/summary.json").read_text(encoding="utf-8"))
    assert summary["runs"]["bare"]["floors"] == {"events": 0, "mass": 0.0, "energy": 0.0}
    # no floor stood in for anything; a bound that no limiter keeps is another matter
    assert [c["name"] for c in summary["checks"] if not c["passed"]] == ["bound_violations"]
