"""Flows with known answers, and short names for the solvers, shared by the tests."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from hybridsim.contract import Source
from hybridsim.corrections.learned import LearnedFlux
from hybridsim.grid import Grid
from hybridsim.model import Model, Prepared
from hybridsim.solvers.finite_volume import StaggeredFiniteVolume
from hybridsim.solvers.incompressible import Kolmogorov, NavierStokes
from hybridsim.solvers.spectral import Spectral2D
from hybridsim.solvers.steppers import ETDRK4, SSPRK2, SSPRK3, CrankNicolsonRK4, ForwardEuler

TWO_PI = 2 * np.pi
STEPPERS = (ForwardEuler, SSPRK2, SSPRK3, CrankNicolsonRK4, ETDRK4)
EXPLICIT = (ForwardEuler, SSPRK2, SSPRK3)
BOTH = ("spectral", "finite_volume")


def square(n, length=TWO_PI):
    return Grid((n, n), (length, length))


def solver_of(kind, grid, viscosity=1e-3, forcing=None, **options):
    make = Spectral2D if kind == "spectral" else StaggeredFiniteVolume
    return make(grid, NavierStokes(viscosity, forcing), **options)


def default_stepper(kind):
    return ETDRK4() if kind == "spectral" else SSPRK3()


def kolmogorov(amplitude=1.0, drag=0.1, wavenumber=2):
    return Kolmogorov(wavenumber, amplitude, drag)


def sample(solver, *functions):
    """One function of (x, y) per channel, at that channel's own place."""
    return np.stack(
        [np.broadcast_to(f(*solver.grid.mesh(v.at)), solver.grid.shape) for f, v in zip(functions, solver.variables, strict=True)]
    )


def taylor_green(solver, kx=1, ky=1, t=0.0, mean=(0.0, 0.0)):
    """u = U + ∂_y ψ, v = V − ∂_x ψ, ψ = cos(k_x (x − Ut)) cos(k_y (y − Vt)) exp(−ν k² t): exact for every pair of wavenumbers."""
    a, b = (TWO_PI * n / length for n, length in zip((kx, ky), solver.grid.lengths, strict=True))
    decay = np.exp(-solver.equation.viscosity * (a * a + b * b) * t)
    return sample(
        solver,
        lambda x, y: mean[0] - b * decay * np.cos(a * (x - mean[0] * t) + 0.3) * np.sin(b * (y - mean[1] * t) + 0.7),
        lambda x, y: mean[1] + a * decay * np.sin(a * (x - mean[0] * t) + 0.3) * np.cos(b * (y - mean[1] * t) + 0.7),
    )


def random_flow(solver, seed=0, speed=1.0, modes=4, mean=(0.0, 0.0), dtype=np.float64):
    """A solenoidal field of the modes |k_i| ≤ `modes` with maximum `speed`, plus a mean flow; the same on every grid."""
    rng = np.random.default_rng(seed)
    lengths = solver.grid.lengths
    n = 4 * (modes + 1)
    lattice = Grid((n, n), lengths)
    kx, ky = lattice.wavenumbers()
    index = [np.abs(k) * length / TWO_PI for k, length in zip((kx, ky), lengths, strict=True)]
    inside = (index[0] <= modes) & (index[1] <= modes)
    psi = np.fft.rfft2(rng.standard_normal((n, n))) * inside / np.maximum(1, index[0] ** 2 + index[1] ** 2)
    u = np.stack([np.fft.irfft2(1j * ky * psi, s=(n, n)), np.fft.irfft2(-1j * kx * psi, s=(n, n))])
    u = speed * u / np.abs(u).max()
    out = []
    for q, variable, add in zip(u, solver.variables, mean, strict=True):
        moved = q
        for axis, (m, at) in enumerate(zip(solver.grid.shape, variable.at, strict=True)):
            k = np.fft.fftfreq(n, 1 / n)
            points = (np.arange(m) + at) / m - 0.5 / n
            matrix = np.exp(2j * np.pi * np.outer(points, k)) / n
            moved = np.moveaxis(np.tensordot(matrix, np.fft.fft(moved, axis=axis), axes=(1, axis)), 0, axis)
        out.append(moved.real + add)
    return np.stack(out).astype(dtype)


def randomised(closure, seed=0, std=0.1):
    """The closure with every weight drawn anew from a normal distribution."""
    weights, fixed = eqx.partition(closure, eqx.is_inexact_array)
    leaves, tree = jax.tree.flatten(weights)
    keys = jax.random.split(jax.random.key(seed), len(leaves))
    drawn = [(std * jax.random.normal(k, a.shape, a.dtype)).astype(a.dtype) for k, a in zip(keys, leaves, strict=True)]
    return eqx.combine(jax.tree.unflatten(tree, drawn), fixed)


def learned(seed=0, std=None, width=4, depth=1, dtype=None, **options):
    """A small `LearnedFlux`; its weights random with `std`, or as they start."""
    closure = LearnedFlux(width=width, depth=depth, key=jax.random.key(seed), **options)
    if std is not None:
        closure = randomised(closure, seed, std)
    if dtype is not None:
        closure = jax.tree.map(lambda a: a.astype(dtype) if eqx.is_inexact_array(a) else a, closure)
    return closure


class Push(Source):
    """s = (a, 0): a uniform acceleration; adds momentum."""

    acceleration: float = eqx.field(static=True, default=1.0)

    def __call__(self, view, memory=None, key=None):
        return jnp.stack([jnp.full_like(view.u[0], self.acceleration), jnp.zeros_like(view.u[1])])


@eqx.filter_jit
def _steps(model, u, count):
    prepared = model.prepare(u.dtype)
    z = prepared.solver.encode(u)

    def body(state, _):
        state = model(*state, prepared)
        return state, (prepared.solver.decode(state[0]), state[1]["ledger"])

    _, (frames, ledger) = jax.lax.scan(body, (z, model.init_carry(u), jnp.zeros((), jnp.int32)), None, count)
    return jnp.concatenate([prepared.solver.decode(z)[None], frames]), ledger


def steps(model, u, count):
    """[u₀', u₁, …, u_count] and the ledger after each of them; u₀' = decode(encode(u₀))."""
    return _steps(model, jnp.asarray(u), count)


@eqx.filter_jit
def _evolve(solver, stepper, closures, u, dt, count, evaluate):
    model = Model(solver, stepper, 1.0, closures, evaluate)
    ready = solver.prepare(u.dtype)
    prepared = Prepared(ready, stepper.prepare(ready, dt, u.dtype), dt.astype(u.dtype))
    state = (ready.encode(u), model.init_carry(u), jnp.zeros((), jnp.int32))
    state = jax.lax.fori_loop(0, count, lambda _, s: model(*s, prepared), state)
    return ready.decode(state[0])


def evolve(solver, stepper, u, dt, count, closures=(), evaluate=()):
    """The state after `count` steps of `dt`; another dt or count compiles nothing."""
    return np.asarray(_evolve(solver, stepper, tuple(closures), jnp.asarray(u), jnp.asarray(dt), jnp.asarray(count), evaluate))


def relative(a, b):
    """max |a − b| / max |b|."""
    return float(np.abs(np.asarray(a) - np.asarray(b)).max() / np.abs(np.asarray(b)).max())
