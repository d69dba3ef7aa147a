"""The options that programs are compiled with: who gets them, what they do, and that results do not depend on them."""

import os

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hybridsim import compilation
from hybridsim.compilation import SolverJit, compiler_options, written_anew
from hybridsim.corrections.eddy import Smagorinsky
from hybridsim.corrections.learned import LearnedFlux
from hybridsim.grid import Grid
from hybridsim.model import Model, State, _begun, _prepared, _rolled, ensemble, rollout
from hybridsim.solvers.finite_volume import StaggeredFiniteVolume
from hybridsim.solvers.incompressible import NavierStokes
from hybridsim.solvers.initial import RandomVelocity
from hybridsim.solvers.kuramoto_sivashinsky import KuramotoSivashinsky, SpectralKS
from hybridsim.solvers.spectral import Spectral2D
from hybridsim.solvers.steppers import ETDRK4, SSPRK3, CrankNicolsonRK4

needed = pytest.mark.skipif(
    jax.default_backend() != "cpu" or jax.__version_info__[:2] >= compilation.REPAIRED, reason="this JAX needs no options"
)


def _square(n):
    return Grid((n, n), (2 * np.pi,) * 2)


def _spectral(n, closures=(), stepper=None):
    return Model(Spectral2D(_square(n), NavierStokes(1e-2)), stepper or ETDRK4(), 0.01, closures)


def _flow(model, seed=0):
    solver = model.solver
    places = tuple(v.at for v in solver.variables)
    return solver.project(RandomVelocity(peak_wavenumber=3)(jax.random.key(seed), solver.grid, places, jnp.float32))


@needed
def test_who_gets_options():
    """Solvers whose work is transforms, and small grids; not where a network on a large grid does the work."""
    network = LearnedFlux(2, width=4, depth=2, key=jax.random.key(0))
    assert compiler_options(_spectral(16)) == compiler_options(_spectral(16).solver) != {}
    assert compiler_options(_spectral(16, (Smagorinsky(0.1),)))
    assert [bool(compiler_options(_spectral(n, (network,)))) for n in (64, 90, 91, 128)] == [True, True, False, False]
    finite_volume = [StaggeredFiniteVolume(_square(n), NavierStokes(1e-2)) for n in (128, 256)]
    assert [bool(compiler_options(s)) for s in finite_volume] == [True, False]
    assert not compiler_options(SpectralKS(Grid((64,), (22.0,)), KuramotoSivashinsky()))


@needed
def test_no_options_where_they_gain_nothing(monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert compiler_options(_spectral(16)) == {}
    monkeypatch.undo()
    monkeypatch.setattr(compilation, "REPAIRED", (0, 0))
    assert compiler_options(_spectral(16)) == {}


@needed
def test_an_option_that_this_jax_does_not_know_is_left_out(monkeypatch):
    known = compilation.SERIAL_KERNELS["xla_disable_hlo_passes"]
    monkeypatch.setattr(compilation, "SERIAL_KERNELS", {"xla_disable_hlo_passes": known, "xla_cpu_no_such_option": "1"})
    assert compilation._understood.__wrapped__() == {"xla_disable_hlo_passes": known}


@needed
@pytest.mark.parametrize("stepper", [ETDRK4(), CrankNicolsonRK4()], ids=lambda s: type(s).__name__)
def test_large_kernels_are_not_cut_in_pieces(stepper):
    """And few things at the start of the program could run at once, so that no other thread takes it over."""
    model = _spectral(512, stepper=stepper)
    u = _flow(model)
    prepared = _prepared(model, u.dtype)
    z, carry = _begun(model, prepared, u, None, jnp.zeros((), u.dtype), 0)
    given = model, prepared, z, carry, jnp.asarray(0), 2, 3, 0
    text, plain = (f.lower(*given).compile().compiled.as_text() for f in (_rolled, eqx.filter_jit(_rolled.__wrapped__)))
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    assert ("outer_dimension_partitions" in plain) == (cores > 1)
    assert "outer_dimension_partitions" not in text
    no_work = (" parameter(", " get-tuple-element(", " tuple(", " bitcast(", " constant(")
    entry = [line for line in text[text.index("\nENTRY") :].splitlines()[2:] if " = " in line]
    assert sum(not any(word in line for word in no_work) for line in entry) < 16


def _finite_volume(n):
    return Model(StaggeredFiniteVolume(_square(n), NavierStokes(1e-2)), SSPRK3(), 0.01)


@pytest.mark.slow
@pytest.mark.parametrize("make", [_spectral, _finite_volume])
def test_results_do_not_depend_on_the_options(make):
    """Alone and in a user's own jit (which has none), values, gradients and samples together."""
    model = make(32)
    u = _flow(model)
    last = lambda u: rollout(model, State(u), 1, every=5).u[-1]  # noqa: E731
    scale = float(jnp.abs(last(u)).max())
    np.testing.assert_allclose(last(u), jax.jit(last)(u), atol=2e-6 * scale)
    energy = lambda u: jnp.sum(last(u) ** 2)  # noqa: E731
    slope = jax.grad(energy)(u)
    np.testing.assert_allclose(slope, jax.jit(jax.grad(energy))(u), atol=1e-5 * float(jnp.abs(slope).max()))
    _, pushed = jax.jvp(last, (u,), (u,))
    np.testing.assert_allclose(pushed, jax.jit(lambda u: jax.jvp(last, (u,), (u,))[1])(u), atol=1e-5 * float(jnp.abs(pushed).max()))
    both = jnp.stack([u, _flow(model, 1)])
    found = ensemble(model, both, 1, every=5).u[:, -1]
    for q in (jax.vmap(last)(both), jax.jit(jax.vmap(last))(both)):
        np.testing.assert_allclose(found, q, atol=2e-6 * float(jnp.abs(found).max()))


def test_options_are_for_the_outermost_jit():
    """Inside another jit a `SolverJit` is an ordinary one: JAX refuses options there."""
    solver = _spectral(16).solver
    doubled = SolverJit(lambda solver, x: x * solver.grid.shape[0])
    np.testing.assert_array_equal(doubled(solver, jnp.arange(3.0)), 16 * np.arange(3.0))
    np.testing.assert_array_equal(jax.jit(lambda x: doubled(solver, x))(jnp.arange(3.0)), 16 * np.arange(3.0))
    assert doubled.lower(solver, jnp.arange(3.0)).compile() is not None


def test_written_anew_is_the_same():
    """Bit for bit, whatever is in it; numbers that are not floating point and keys are handed through."""
    tree = {
        "a": jnp.asarray([0.0, -0.0, jnp.nan, jnp.inf, 1e-40], jnp.float32),
        "z": jnp.asarray([1 + 2j, -0.0 - 1j], jnp.complex64),
        "n": jnp.arange(3),
        "key": jax.random.key(1),
    }
    found = jax.jit(written_anew)(tree, jnp.asarray(0))
    for name in "azn":
        assert np.asarray(found[name]).tobytes() == np.asarray(tree[name]).tobytes()
    assert jnp.array_equal(jax.random.key_data(found["key"]), jax.random.key_data(tree["key"]))
