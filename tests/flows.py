"""Flows with known answers, and short names for the solvers, shared by the tests."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from hybridsim.contract import Flux, Source, View
from hybridsim.corrections.learned import LearnedFlux
from hybridsim.corrections.networks import CNN
from hybridsim.grid import Grid
from hybridsim.model import Model, Prepared
from hybridsim.solvers.finite_volume import StaggeredFiniteVolume
from hybridsim.solvers.incompressible import Kolmogorov, NavierStokes
from hybridsim.solvers.spectral import Spectral2D, Spectral3D
from hybridsim.solvers.steppers import ETDRK4, SSPRK2, SSPRK3, CrankNicolsonRK4, ForwardEuler

TWO_PI = 2 * np.pi
STEPPERS = (ForwardEuler, SSPRK2, SSPRK3, CrankNicolsonRK4, ETDRK4)
EXPLICIT = (ForwardEuler, SSPRK2, SSPRK3)
BOTH = ("spectral", "finite_volume")


def square(n, length=TWO_PI):
    return Grid((n, n), (length, length))


def cube(n, length=TWO_PI):
    return Grid((n,) * 3, (length,) * 3)


def solver_of(kind, grid, viscosity=1e-3, forcing=None, scalars=None, **options):
    spectral = Spectral2D if grid.ndim == 2 else Spectral3D
    make = spectral if kind == "spectral" else StaggeredFiniteVolume
    return make(grid, NavierStokes(viscosity, forcing, scalars or {}), **options)


def default_stepper(kind):
    return ETDRK4() if kind == "spectral" else SSPRK3()


def kolmogorov(amplitude=1.0, drag=0.1, wavenumber=2):
    return Kolmogorov(wavenumber, amplitude, drag)


def sample(solver, *functions):
    """One function of (x, y) or (x, y, z) per channel, at that channel's own place."""
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


def beltrami(solver, t=0.0, mean=(0.0, 0.0, 0.0), amplitudes=(1.0, 0.7, 0.4), length=TWO_PI):
    """u = U + ABC flow of wavelength `length`, ∇ × u = k u: carried by U and decaying as exp(−ν k² t), exactly."""
    k = TWO_PI / length
    a, b, c = np.exp(-solver.equation.viscosity * k * k * t) * np.array(amplitudes)

    def turn(x, axis):
        return k * (x - mean[axis] * t) + 0.3 * axis

    return sample(
        solver,
        lambda x, y, z: mean[0] + a * np.sin(turn(z, 2)) + c * np.cos(turn(y, 1)),
        lambda x, y, z: mean[1] + b * np.sin(turn(x, 0)) + a * np.cos(turn(z, 2)),
        lambda x, y, z: mean[2] + c * np.sin(turn(y, 1)) + b * np.cos(turn(x, 0)),
    )


def random_flow(solver, seed=0, speed=1.0, modes=4, mean=(), dtype=np.float64):
    """A solenoidal field of the modes |k_i| ≤ `modes` with maximum `speed`, plus means; scalars of the same modes follow.

    The same on every grid."""
    rng = np.random.default_rng(seed)
    grid = solver.grid
    n = 4 * (modes + 1)
    shape = (n,) * grid.ndim
    lattice = Grid(shape, grid.lengths)
    k = lattice.wavenumbers()
    index = [np.abs(q) * length / TWO_PI for q, length in zip(k, grid.lengths, strict=True)]
    decay = np.maximum(1, sum(i**2 for i in index))
    for i in index:
        decay = np.where(i <= modes, decay, np.inf)
    axes = tuple(range(-grid.ndim, 0))
    potential = np.fft.rfftn(rng.standard_normal((1 if grid.ndim == 2 else 3, *shape)), axes=axes) / decay
    if grid.ndim == 2:
        hat = [1j * k[1] * potential[0], -1j * k[0] * potential[0]]
    else:
        hat = [1j * (k[a - 2] * potential[a - 1] - k[a - 1] * potential[a - 2]) for a in range(3)]
    u = np.fft.irfftn(np.stack(hat), s=shape, axes=axes)
    scalars = rng.standard_normal((len(solver.variables) - grid.ndim, *shape))
    scalars = np.fft.irfftn(np.fft.rfftn(scalars, axes=axes) * np.isfinite(decay), s=shape, axes=axes)
    u = np.concatenate([speed * u / np.abs(u).max(), scalars])
    mean = (*mean, *[0.0] * (len(u) - len(mean)))
    out = []
    for q, variable, add in zip(u, solver.variables, mean, strict=True):
        moved = q
        for axis, (m, at) in enumerate(zip(grid.shape, variable.at, strict=True)):
            wave = np.fft.fftfreq(n, 1 / n)
            points = (np.arange(m) + at) / m - 0.5 / n
            matrix = np.exp(2j * np.pi * np.outer(points, wave)) / n
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


class EveryFlux(Flux):
    """F = net(u), cell by cell: one flux per channel and axis, scalars included."""

    network: CNN

    def __init__(self, solver, key, width=4, depth=1):
        channels = len(solver.variables)
        self.network = CNN(solver.grid.ndim, channels, solver.grid.ndim * channels, width, depth, 1, key=key)

    def __call__(self, view, memory=None, key=None):
        shape = (view.grid.ndim, len(view.variables), *view.grid.shape)
        return self.network(view.centred()).reshape(shape)


class Push(Source):
    """s = (a, 0, …): a uniform acceleration; adds momentum."""

    acceleration: float = eqx.field(static=True, default=1.0)

    def __call__(self, view, memory=None, key=None):
        return jnp.zeros_like(view.u).at[0].set(self.acceleration)


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


# drift in one step; drift after n steps over √n; divergence. In single precision the mean flow alone is rounded by up to 6e-8.
PRECISION = {np.float64: (1e-13, 1e-13, 1e-11), np.float32: (1e-7, 5e-8, 1e-4)}


def divergence(solver, u):
    """max |∇·u| by the scheme's own operator, in U/Δx, in double precision."""
    u = np.asarray(u[: solver.grid.ndim], np.float64)
    return float(_largest_divergence(solver, u)) / (np.abs(u).max() / min(solver.grid.spacing))


@eqx.filter_jit
def _largest_divergence(solver, u):
    terms = [solver.derivative(q, v.at, a)[0] for a, (q, v) in enumerate(zip(u, solver.variables, strict=False))]
    return jnp.abs(sum(terms)).max()


def ledger_sum(ledger):
    return np.asarray(ledger[0], np.float64) + np.asarray(ledger[1], np.float64)


def worst_step(model, frames, ledger, wild=False):
    """Largest drift of a sum in one step, over Σ|u| + Δt/Δx Σ|F|, and largest divergence, up to the first non-finite step."""
    solver, dt = model.solver, model.dt
    drift = most = 0.0
    double = frames.astype(np.float64)
    space = tuple(range(1, solver.grid.ndim + 1))
    injected = np.concatenate([np.zeros((1, frames.shape[1])), ledger_sum(ledger)])
    taken = 0
    for i in range(len(frames) - 1):
        if not np.isfinite(double[i + 1]).all():
            break
        taken += 1
        known = (injected[i + 1] - injected[i]) * solver.grid.cells
        change = np.abs((double[i + 1] - double[i]).sum(axis=space) - known)
        flux = np.asarray(_flux_sum(model, jnp.asarray(frames[i])), np.float64)
        scale = np.abs(double[i]).sum(axis=space) + dt / min(solver.grid.spacing) * flux
        if wild:  # the fluxes of later stages are those of what the first one left
            scale = np.maximum(scale, np.abs(double[i + 1]).sum(axis=space))
        drift = max(drift, (change / scale).max())
        most = max(most, divergence(solver, frames[i + 1]))
    return drift, most, taken


@eqx.filter_jit
def _flux_sum(model, u):
    """Σ|F| per channel, of convection and closures, at u."""
    solver = model.solver
    total = jnp.stack([sum(jnp.abs(a * c).sum() for a in u[: solver.grid.ndim]) for c in u])
    view = View(u, jnp.zeros((), u.dtype), jnp.asarray(model.dt, u.dtype), solver.prepare(u.dtype))
    for closure in model.closures:
        if isinstance(closure, Flux):
            flux = jnp.abs(closure(view).astype(u.dtype))
            total = total + flux.sum(axis=(0, *range(2, flux.ndim)))
    return total


def alignment(a, b):
    """⟨a, b⟩ / (|a| |b|)."""
    return float(np.vdot(a, b) / (np.linalg.norm(a) * np.linalg.norm(b)))


def bare_rate(solver, u):
    """(u, N(u)) in physical space, N projected."""
    z = solver.encode(jnp.asarray(u))
    rate = solver.constrain(solver.explicit(z, jnp.zeros((), u.dtype), lambda q, t: None))
    return np.asarray(solver.decode(z)), np.asarray(solver.decode(rate))
