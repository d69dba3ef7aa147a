"""Gases with known answers, and short names for the compressible solver, shared by its tests."""

from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import riemann_exact

from hybridsim.grid import Grid
from hybridsim.model import Model, Prepared
from hybridsim.solvers.compressible import CompressibleNavierStokes
from hybridsim.solvers.godunov import CompressibleFiniteVolume

RECONSTRUCTIONS = ("plm_van_leer", "plm_mc", "ppm", "weno5z")
RIEMANN = ("hllc", "hllc_low_mach", "hlle", "llf")


def gas(grid, gamma=1.4, *, reconstruction="plm_van_leer", riemann="hllc", reconstruct="primitive", positivity=True, **physics):
    """The solver of a gas on a grid; `physics` goes to the equation."""
    equation = CompressibleNavierStokes(gamma, **physics)
    return CompressibleFiniteVolume(
        grid, equation, reconstruction=reconstruction, riemann=riemann, reconstruct=reconstruct, positivity=positivity
    )


def tube(n, length=1.0, boundary="outflow", axis=0, width=4, dims=1):
    """A box of n cells along `axis`, `width` cells of the same size along the others, which are periodic."""
    shape = tuple(n if a == axis else width for a in range(dims))
    boundaries = tuple(boundary if a == axis else "periodic" for a in range(dims))
    return Grid(shape, tuple(m * length / n for m in shape), boundaries)


def conserved(w, gamma, dims):
    """(ρ, ρv, E, ρc) of (ρ, v, p, c), pointwise on the host."""
    w = np.asarray(w, np.float64)
    rho, v, p, c = w[0], w[1 : dims + 1], w[dims + 1], w[dims + 2 :]
    energy = p / (gamma - 1) + 0.5 * rho * (v * v).sum(axis=0)
    return np.concatenate([rho[None], rho[None] * v, energy[None], rho[None] * c])


def primitive(u, gamma, dims):
    """(ρ, v, p, c) of (ρ, ρv, E, ρc), pointwise on the host."""
    u = np.asarray(u, np.float64)
    rho, v = u[0], [q / u[0] for q in u[1 : dims + 1]]
    p = (gamma - 1) * (u[dims + 1] - 0.5 * rho * sum(q * q for q in v))
    return np.stack([rho, *v, p, *(q / rho for q in u[dims + 2 :])])


def means(grid, gamma, function, points=4):
    """Cell means of the conserved variables of W = function(*coordinates), by Gauss's formula along each axis."""
    nodes, weights = np.polynomial.legendre.leggauss(points)
    total: Any = 0.0
    for which in np.ndindex(*(points,) * grid.ndim):
        at = tuple(0.5 + 0.5 * nodes[i] for i in which)
        weight = np.prod([0.5 * weights[i] for i in which])
        w = np.stack([np.broadcast_to(q, grid.shape) for q in function(*grid.mesh(at))])
        total = total + weight * conserved(w, gamma, grid.ndim)
    return total


def along(grid, axis, u):
    """One-dimensional states (ρ, ρv, E, …) laid along `axis` of a grid; nothing moves along the others."""
    rho, momentum, *rest = u
    zero = np.zeros_like(rho)
    channels = [rho, *(momentum if a == axis else zero for a in range(grid.ndim)), *rest]
    line = [1] * grid.ndim
    line[axis] = -1
    return np.stack([np.broadcast_to(q.reshape(line), grid.shape) for q in channels])


def back(grid, axis, u):
    """(channels of a tube, values) of the states along `axis`, and the spread across it."""
    u = np.asarray(u)
    across = tuple(a + 1 for a in range(grid.ndim) if a != axis)
    spread = float(np.ptp(u, axis=across).max()) if across else 0.0
    first = u[(slice(None), *(slice(None) if a == axis else 0 for a in range(grid.ndim)))]
    return np.stack([first[0], first[1 + axis], *first[grid.ndim + 1 :]]), spread


def two_states(grid, left, right, gamma, at=0.5, axis=0):
    """A jump at the fraction `at` of an axis, from (ρ, u, p) to (ρ, u, p); the jump is on a face."""
    n = grid.shape[axis]
    x = (np.arange(n) + 0.5) / n
    w = np.where((x < at)[None], np.array(left)[:, None], np.array(right)[:, None])
    return along(grid, axis, riemann_exact.conserved(w, gamma))


class Run(NamedTuple):
    """The state at the end, the ledger by the names of its rows, and the lowest density and pressure after any step."""

    u: Any
    ledger: dict[str, float]
    density: float
    pressure: float


@eqx.filter_jit
def _run(model, u, dt, count, start):
    solver = model.solver.prepare(u.dtype)
    prepared = Prepared(solver, model.stepper.prepare(solver, dt, u.dtype), dt)
    equation = model.solver.equation

    def lowest(u):
        w = equation.primitive(u)
        return jnp.stack([w[0].min(), w[u.ndim].min()])

    def body(_, state):
        inner, low = state
        inner = model(*inner, prepared)
        return inner, jnp.minimum(low, lowest(solver.decode(inner[0])))

    state = (solver.encode(u), model.init_carry(u, 0, start), jnp.zeros((), jnp.int32))
    (z, carry, _), low = jax.lax.fori_loop(0, count, body, (state, lowest(u)))[0:2]
    return solver.decode(z), carry["ledger"], low


def run(solver, stepper, u, dt, count, closures=(), evaluate=(), start=0.0):
    """`count` steps of dt; another dt, count or state compiles nothing."""
    model = Model(solver, stepper, 1.0, tuple(closures), evaluate)
    u = jnp.asarray(u)
    as_real = lambda x: jnp.asarray(x, u.dtype)  # noqa: E731
    u, ledger, low = _run(model, u, as_real(dt), jnp.asarray(count), as_real(start))
    total = np.asarray(ledger[0], np.float64) + np.asarray(ledger[1], np.float64)
    rows = dict(zip(solver.ledger_rows, total.tolist(), strict=True))
    return Run(np.asarray(u), rows, float(low[0]), float(low[1]))


def steps_for(time, largest):
    """(Δt, count) that reach `time` in equal steps of at most `largest`."""
    count = int(np.ceil(time / largest * (1 - 1e-12)))
    return time / count, count


def fastest(left, right, gamma):
    """The fastest wave of a Riemann problem: what limits the time step."""
    states = [left, right]
    if not riemann_exact.makes_vacuum(left, right, gamma):
        p, u, *densities = riemann_exact.star(left, right, gamma)
        states += [(rho, u, p) for rho in densities]
    sound = [abs(s[1]) + np.sqrt(gamma * s[2] / s[0]) for s in states]
    return max(*sound, *(abs(s) for s in riemann_exact.waves(left, right, gamma)))


def rates(errors):
    """log₂ of the ratio of each error to the next."""
    errors = np.asarray(errors)
    return np.log2(errors[:-1] / errors[1:])
