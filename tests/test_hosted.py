"""jax-cfd and exponax behind our interface: the same steps as its own, the same flows as ours, closures, gradients, refusals."""

import importlib

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flows import EveryFlux, Push, random_flow, randomised, relative, steps

from hybridsim.config import load_experiment
from hybridsim.contract import PostStep
from hybridsim.grid import Grid
from hybridsim.model import Model, State, rollout
from hybridsim.solvers.finite_volume import StaggeredFiniteVolume
from hybridsim.solvers.hosted import ExponaxStepper, JaxCFDFiniteVolume, JaxCFDSpectral, JaxCFDStepper
from hybridsim.solvers.incompressible import Isotropic, Kolmogorov, NavierStokes
from hybridsim.solvers.initial import RandomVelocity
from hybridsim.solvers.kuramoto_sivashinsky import KuramotoSivashinsky, SpectralKS
from hybridsim.solvers.spectral import Spectral2D
from hybridsim.solvers.steppers import ETDRK4, SSPRK3, CrankNicolsonRK4, ForwardEuler
from hybridsim.yaml_reader import ConfigError

BOX = 2 * np.pi
DECAY = NavierStokes(2e-3)
FORCED = NavierStokes(2e-3, Kolmogorov())


def square(n, dims=2):
    return Grid((n,) * dims, (BOX,) * dims)


def flow(solver, dtype=jnp.float64, seed=0):
    places = tuple(v.at for v in solver.variables)
    return solver.project(RandomVelocity(peak_wavenumber=3, max_speed=2)(jax.random.key(seed), solver.grid, places, dtype))


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("equation", [DECAY, FORCED], ids=["decaying", "forced"])
@pytest.mark.parametrize(("dims", "n"), [(2, 24), pytest.param(3, 12, marks=pytest.mark.slow)])
def test_finite_volumes_agree_with_ours(dims, n, equation):
    """Central convection and forward Euler are the same scheme on both sides."""
    hosted = JaxCFDFiniteVolume(square(n, dims), equation, convection="central")
    mine = StaggeredFiniteVolume(square(n, dims), equation, convection="central")
    u = flow(mine)
    a = steps(Model(hosted, JaxCFDStepper(), 0.01), u, 10)[0]
    b = steps(Model(mine, ForwardEuler(), 0.01), u, 10)[0]
    print(dims, relative(a, b))
    assert relative(a, b) < 1e-11
    assert np.abs(np.asarray(hosted.divergence(a[-1]))).max() < 1e-11
    assert relative(a[-1], u) > 1e-2


@pytest.mark.usefixtures("x64")
def test_van_leer_agrees_with_ours_as_the_time_step_vanishes():
    """jax-cfd's van Leer flux has a term in Δt that ours has not."""
    u = flow(StaggeredFiniteVolume(square(32), FORCED))
    gaps = []
    for dt in (0.02, 0.01, 0.005):
        hosted = Model(JaxCFDFiniteVolume(square(32), FORCED), JaxCFDStepper(), dt)
        mine = Model(StaggeredFiniteVolume(square(32), FORCED), ForwardEuler(), dt)
        count = round(0.1 / dt)
        gaps.append(relative(steps(hosted, u, count)[0][-1], steps(mine, u, count)[0][-1]))
    print(gaps)
    assert gaps[-1] < 0.01
    assert 1.7 < gaps[0] / gaps[1] < 2.3
    assert 1.7 < gaps[1] / gaps[2] < 2.3


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("equation", [DECAY, FORCED], ids=["decaying", "forced"])
def test_spectral_agrees_with_ours(equation):
    hosted = JaxCFDSpectral(square(48), equation)
    mine = Spectral2D(square(48), equation, dealias="two_thirds")
    u = jnp.asarray(random_flow(mine, modes=4))
    a = steps(Model(hosted, JaxCFDStepper(), 0.02), u, 10)[0]
    b = steps(Model(mine, CrankNicolsonRK4(), 0.02), u, 10)[0]
    print(relative(a, b))
    assert relative(a, b) < 1e-5  # jax-cfd's filter keeps one mode more where kx < 0
    assert relative(a[-1], u) > 1e-2


METHODS = {"forward_euler": 1, "midpoint_rk2": 2, "heun_rk2": 2, "classic_rk4": 4}


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("method", [pytest.param(m, marks=[pytest.mark.slow] * m.endswith("rk2")) for m in METHODS])
def test_order_in_time(method):
    u = flow(StaggeredFiniteVolume(square(16), DECAY))

    def end(dt, method=method):
        solver = JaxCFDFiniteVolume(square(16), DECAY, convection="central", method=method)
        return steps(Model(solver, JaxCFDStepper(), dt), u, round(0.4 / dt))[0][-1]

    exact = end(0.4 / 256, "classic_rk4")
    errors = [relative(end(dt), exact) for dt in (0.05, 0.025)]
    rate = np.log2(errors[0] / errors[1])
    print(method, errors, rate)
    assert abs(rate - METHODS[method]) < 0.35


class Nudge(PostStep):
    """d = a u: the state grows by a share after each step."""

    share: float = eqx.field(static=True, default=0.1)

    def __call__(self, view, memory=None, key=None):
        return self.share * view.u


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("kind", [JaxCFDFiniteVolume, JaxCFDSpectral])
def test_closures_enter(kind):
    solver = kind(square(16), DECAY)
    u = flow(solver)
    bare = steps(Model(solver, JaxCFDStepper(), 0.01), u, 5)[0][-1]
    # A flux: what ours does with it, and no sum changes.
    flux = randomised(EveryFlux(solver, jax.random.key(1)))
    with_flux = steps(Model(solver, JaxCFDStepper(), 0.01, (flux,)), u, 5)[0][-1]
    assert relative(with_flux, bare) > 1e-4
    np.testing.assert_allclose(with_flux.mean(axis=(1, 2)), u.mean(axis=(1, 2)), atol=1e-14)
    own = kind is JaxCFDSpectral
    mine = Spectral2D(square(16), DECAY, dealias="two_thirds") if own else StaggeredFiniteVolume(square(16), DECAY)
    stepper = CrankNicolsonRK4() if own else ForwardEuler()
    pushed = steps(Model(mine, stepper, 0.01, (flux,)), u, 5)[0][-1] - steps(Model(mine, stepper, 0.01), u, 5)[0][-1]
    assert relative(with_flux - bare, pushed) < 0.05
    # A source: a uniform push moves the mean of the finite volumes exactly; jax-cfd's vorticity knows none.
    with_push = steps(Model(solver, JaxCFDStepper(), 0.01, (Push(0.5),)), u, 5)[0][-1]
    expected = u.mean(axis=(1, 2)) + jnp.asarray([0.0 if own else 0.5 * 0.05, 0.0])
    np.testing.assert_allclose(with_push.mean(axis=(1, 2)), expected, atol=1e-13)
    nudged = steps(Model(solver, JaxCFDStepper(), 0.01, (Nudge(),)), u, 1)[0][-1]
    np.testing.assert_allclose(nudged, 1.1 * steps(Model(solver, JaxCFDStepper(), 0.01), u, 1)[0][-1], atol=1e-12)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("kind", [JaxCFDFiniteVolume, JaxCFDSpectral])
def test_gradients_flow_through(kind):
    u = flow(kind(square(16), DECAY))
    flux = randomised(EveryFlux(kind(square(16), DECAY), jax.random.key(1)))
    flux = jax.tree.map(lambda a: a.astype(jnp.float64) if eqx.is_inexact_array(a) else a, flux)
    options = {"convection": "central"} if kind is JaxCFDFiniteVolume else {}  # no kinks

    def energy(viscosity, scale):
        solver = kind(square(16), NavierStokes(viscosity), **options)
        model = Model(solver, JaxCFDStepper(), 0.02, (jax.tree.map(lambda w: scale * w, flux, is_leaf=eqx.is_array),))
        return jnp.sum(rollout(model, State(u), 1, every=8).u ** 2)

    at = jnp.asarray(5e-3), jnp.asarray(0.3)
    slopes = jax.jit(jax.grad(energy, (0, 1)))(*at)
    value = jax.jit(energy)
    for k, step in enumerate((1e-6, 1e-5)):
        low, high = ([x + (s * step if i == k else 0) for i, x in enumerate(at)] for s in (-1, 1))
        difference = (value(*high) - value(*low)) / (2 * step)
        np.testing.assert_allclose(slopes[k], difference, rtol=1e-5)


def test_what_cannot_be_hosted_is_refused(monkeypatch):
    walls = Grid((16, 16), (1.0, 1.0), (("no_slip", "no_slip"), "periodic"))
    for bad in (
        lambda: JaxCFDFiniteVolume(walls, DECAY),
        lambda: JaxCFDFiniteVolume(square(16), NavierStokes(1e-3, scalars={"dye": 1e-3})),
        lambda: JaxCFDSpectral(square(16, 3), DECAY),
        lambda: JaxCFDSpectral(Grid((16, 18), (1.0, 1.0)), DECAY),
        lambda: JaxCFDFiniteVolume(square(16, 3), NavierStokes(1e-3, Isotropic())),
        lambda: Model(StaggeredFiniteVolume(square(16), DECAY), JaxCFDStepper(), 0.1),
        lambda: Model(JaxCFDFiniteVolume(square(16), DECAY), SSPRK3(), 0.1),
    ):
        with pytest.raises(ValueError):
            bad()

    def broken(name):
        raise AttributeError("module 'jax' has no attribute 'tree_map'")

    monkeypatch.setattr(importlib, "import_module", broken)
    with pytest.raises(ValueError, match=r"jax-cfd cannot be used with JAX .* has no attribute 'tree_map'"):
        JaxCFDFiniteVolume(square(16), DECAY)


# --- exponax ---------------------------------------------------------------------------------------------------------------------


def line(n=48, viscosity=1.0, dealias="two_thirds"):
    return SpectralKS(Grid((n,), (32.0,)), KuramotoSivashinsky(viscosity), dealias=dealias)


def wave(solver, dtype):
    (x,) = solver.grid.mesh()
    k = 2 * np.pi / 32
    return solver.prepare(dtype).project(jnp.asarray(np.sin(3 * k * x) + 0.7 * np.cos(5 * k * x + 1), dtype)[None])


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("viscosity", [1.0, 0.8])
def test_exponax_agrees_with_ours(viscosity):
    """The same method of the same equation: coefficients by contour integrals there, by series here."""
    solver = line(viscosity=viscosity)
    u = wave(solver, jnp.float64)
    a, b = (steps(Model(solver, stepper, 0.1), u, 20)[0] for stepper in (ExponaxStepper(), ETDRK4()))
    assert relative(a, b) < 1e-9
    assert relative(a[-1], u) > 0.1


def test_exponax_steps_single_precision_and_its_gradient_flows():
    def energy(viscosity):
        solver = line(viscosity=viscosity)
        out = rollout(Model(solver, ExponaxStepper(), 0.1), State(wave(line(), jnp.float32)), 1, every=10)
        return jnp.sum(out.u**2)

    assert rollout(Model(line(), ExponaxStepper(), 0.1), State(wave(line(), jnp.float32)), 1).u.dtype == jnp.float32
    slope = jax.grad(energy)(jnp.asarray(1.0))
    difference = (energy(jnp.asarray(1.01)) - energy(jnp.asarray(0.99))) / 0.02
    np.testing.assert_allclose(slope, difference, rtol=0.02)


def test_where_exponax_does_not_fit_is_refused(monkeypatch):
    for solver, closures in ((line(dealias="hou_li"), ()), (line(), (Nudge(),)), (Spectral2D(square(16), DECAY), ())):
        with pytest.raises(ValueError, match="stepper: exponax "):
            Model(solver, ExponaxStepper(), 0.1, closures)

    def missing(name):
        raise ImportError("No module named 'exponax'")

    monkeypatch.setattr(importlib, "import_module", missing)
    with pytest.raises(ValueError, match=r"exponax cannot be used \(No module named 'exponax'\); install it, or take etdrk4"):
        Model(line(), ExponaxStepper(), 0.1)


# --- in YAML ---------------------------------------------------------------------------------------------------------------------


EXPERIMENT = """
equation: {use: navier_stokes, viscosity: 1.0e-3, forcing: kolmogorov}
domain: {lengths: [2pi, 2pi]}
initial: {use: random_velocity, peak_wavenumber: 4, max_speed: 2}
time: {end: 0.2, frames: 2}
reference: {solver: spectral, shape: [32, 32]}
runs:
  theirs: {solver: {use: jax_cfd_finite_volume, method: classic_rk4}, shape: [16, 16], dt: 0.02}
  vorticity: {solver: jax_cfd_spectral, shape: [16, 16], dt: 0.02}
"""


def test_it_is_named_in_yaml(tmp_path):
    path = tmp_path / "hosted.yaml"
    path.write_text(EXPERIMENT)
    loaded = load_experiment(str(path))
    assert isinstance(loaded.stepper("theirs"), JaxCFDStepper)
    assert isinstance(loaded.model_for("vorticity").solver, JaxCFDSpectral)
    path.write_text(EXPERIMENT.replace("dt: 0.02}\n  vort", "dt: 0.02, stepper: ssprk3}\n  vort"))
    with pytest.raises(ConfigError, match="stepped as a whole by the code that it hosts"):
        load_experiment(str(path)).model("theirs")
