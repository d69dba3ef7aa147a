"""Our steppers and the installed peers in turn in one process: nanoseconds per cell and step, and cost at equal accuracy.

    hybridsim peers [spectral | ks | finite_volume] [--quick] [--rounds 5] [--precision float32] [--same-options] [--out peers.json]

**Same work.** A pair starts from the same flow and takes as many steps of the same Δt with the same scheme, each code inside one
compiled loop. The peers run as fast as their public parts allow: jax-cfd's vorticity and exponax's coefficients stay in Fourier
space, batches are `jax.vmap`. After a warm-up the two run in turn, `rounds` times. A ratio is the peer's time over ours: above 1 we
are faster. `error` is the largest difference of the two results after a few steps, relative to the largest value.

Ours is compiled with its `compiler_options`, as every command of ours is, the peers with none, as they come; `--same-options` gives
them ours.

**Equal accuracy.** Every stepper of either code solves one flow with smaller and smaller Δt on finer and finer grids. Errors are
those at the end, in the mean square, relative to a converged answer in double precision: of the trigonometric interpolant for
spectral solvers (what a coarse grid lacks counts), of the means over the faces for finite volumes. What a code pays for no more
than an error is read off its own best runs, between two of them on logarithmic axes; accuracy that none of its runs has is never
guessed.
"""

import datetime
import functools
import importlib
import itertools
import statistics
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from hybridsim.compilation import compiler_options, setting, written_anew
from hybridsim.contract import AbstractSolver, AbstractStepper
from hybridsim.grid import Grid
from hybridsim.model import Model, Prepared
from hybridsim.samples import over_samples
from hybridsim.solvers.finite_volume import Convection, StaggeredFiniteVolume
from hybridsim.solvers.hosted import jax_cfd
from hybridsim.solvers.incompressible import NavierStokes
from hybridsim.solvers.initial import RandomVelocity
from hybridsim.solvers.kuramoto_sivashinsky import KuramotoSivashinsky, SpectralKS
from hybridsim.solvers.spectral import Spectral2D
from hybridsim.solvers.steppers import ETDRK4, SSPRK2, SSPRK3, CrankNicolsonRK4, ForwardEuler
from hybridsim.storage import environment, write_json

if TYPE_CHECKING:
    from rich.console import Console

COMPARED_AFTER = 10
"""Steps after which the results of a pair are compared."""

SECONDS = 0.3
"""What a timed call takes, about."""


# --- one code ---------------------------------------------------------------------------------------------------------------------


class Code(NamedTuple):
    """One way to step one flow.

    - `name`: of the code; `scheme`: its time stepper.
    - `constants`: Δt -> arrays that no step changes.
    - `advance`: (constants, z, n) -> z after n steps.
    - `start`: z at the start; `values`: z -> u, on the host.
    - `options`: for the compiler; the peers set none.
    """

    name: str
    scheme: str
    constants: Callable[[Any], Any]
    advance: Callable[[Any, Any, Any], Any]
    start: Any
    values: Callable[[Any], np.ndarray]
    options: Mapping[str, str] = MappingProxyType({})


class Timed:
    """A code, compiled: (Δt, steps) -> seconds and the result; `compile_s`, `memory_mb`."""

    def __init__(self, code: Code, dtype: Any):
        self.code, self.dtype = code, dtype
        begin = time.perf_counter()
        constants = self._constants(1e-3)
        compiled = jax.jit(code.advance, compiler_options=dict(code.options) or None)
        self._run = compiled.lower(constants, code.start, jnp.zeros((), jnp.int32)).compile()
        self.compile_s = time.perf_counter() - begin
        memory = self._run.memory_analysis()
        parts = ("temp_size_in_bytes", "argument_size_in_bytes", "output_size_in_bytes")
        self.memory_mb = sum(getattr(memory, part) for part in parts) / 2**20 if memory is not None else None

    @functools.cached_property
    def _prepare(self) -> Callable[[Any], Any]:
        return jax.jit(self.code.constants)

    def _constants(self, dt: float) -> Any:
        return jax.block_until_ready(self._prepare(jnp.asarray(dt, self.dtype)))

    def __call__(self, dt: float, steps: int) -> tuple[float, Any]:
        constants, count = self._constants(dt), jnp.asarray(steps, jnp.int32)
        begin = time.perf_counter()
        z = jax.block_until_ready(self._run(constants, self.code.start, count))
        return time.perf_counter() - begin, z


def repeated(step: Callable[[Any, Any], Any]) -> Callable[[Any, Any, Any], Any]:
    """(constants, z, n) -> z after n of these steps."""
    return lambda constants, z, n: jax.lax.fori_loop(0, n, lambda _, z: step(constants, z), z)


def ours(solver: AbstractSolver, stepper: AbstractStepper, u: jax.Array, batched: bool = False) -> Code:
    """Our own model steps; `batched`: of u `(sample, c, *grid)`, as ensembles and training take them."""
    dtype = u.dtype
    model = Model(solver, stepper, 1e-3)
    prepared = jax.jit(lambda: model.prepare(dtype).solver)()
    carry = model.init_carry(u[0] if batched else u)
    whole = jax.vmap if batched else (lambda function: function)
    encode, decode = (jax.jit(whole(lambda q, f=f: f(q))) for f in (prepared.encode, prepared.decode))

    def constants(dt):
        return Prepared(prepared, stepper.prepare(prepared, dt, dtype), dt)

    def one(given, z):
        ready, n = given

        def step(k, state):
            z, carry = state
            return model(z, carry, k, ready)[:2]

        return jax.lax.fori_loop(0, n, step, (z, carry))[0]

    def advance(ready, z, n):
        z = written_anew(z, n)
        return over_samples(one, (ready, n), z, together=model.together) if batched else one((ready, n), z)

    name = {"ForwardEuler": "euler", "CrankNicolsonRK4": "cn_rk4"}.get(type(stepper).__name__, type(stepper).__name__.lower())
    options = compiler_options(model)
    return Code("hybridsim", name, constants, advance, encode(u), lambda z: np.asarray(decode(z)), options)


def from_jax_cfd_spectral(solver: Spectral2D, u: jax.Array, method: str) -> Code:
    peer = jax_cfd("base.grids", "spectral.equations", "spectral.time_stepping")
    grid = peer.grids.Grid(solver.grid.shape, domain=tuple((0, length) for length in solver.grid.lengths))
    # The peer's `smooth` is a filter by the ⅔ rule.
    equation = peer.equations.NavierStokes2D(float(solver.equation.viscosity), grid, smooth=True)
    prepared = solver.prepare(u.dtype)

    def step(dt, z):
        return getattr(peer.time_stepping, method)(equation, dt)(z)

    def values(z):
        return np.asarray(prepared.decode({"vorticity": z, "mean": jnp.zeros(2, u.dtype)}))

    return Code(
        "jax-cfd", method, lambda dt: dt, repeated(step), prepared.encode(u)["vorticity"].astype(jnp.result_type(u, 1j)), values
    )


def from_jax_cfd_finite_volume(solver: StaggeredFiniteVolume, u: jax.Array, method: str, stock: bool = False) -> Code:
    """`stock`: its default `advect_van_leer`, which in 0.2.1 corrects one cell aside for velocities across their own axis.

    Otherwise `advect_van_leer_using_limiters`, which does what both say, and costs twice as much.
    """
    peer = jax_cfd("base.grids", "base.boundaries", "base.advection", "base.equations", "base.time_stepping")
    d = solver.grid.ndim
    grid = peer.grids.Grid(solver.grid.shape, domain=tuple((0, length) for length in solver.grid.lengths))
    periodic = peer.boundaries.periodic_boundary_conditions(d)
    places = [v.at for v in solver.variables]
    start = tuple(peer.grids.GridVariable(peer.grids.GridArray(q, at, grid), periodic) for q, at in zip(u, places, strict=True))
    viscosity = float(solver.equation.viscosity)

    def step(dt, v):
        if solver.convection == "central":
            convect = peer.advection.convect_linear
        else:
            advect = peer.advection.advect_van_leer if stock else peer.advection.advect_van_leer_using_limiters

            def convect(v):
                return tuple(advect(c, v, dt) for c in v)

        stepper = getattr(peer.time_stepping, method)
        return peer.equations.semi_implicit_navier_stokes(1.0, viscosity, dt, grid, convect=convect, time_stepper=stepper)(v)

    scheme = f"{method}, stock" if stock else method
    return Code("jax-cfd", scheme, lambda dt: dt, repeated(step), start, lambda v: np.stack([np.asarray(q.data) for q in v]))


def from_exponax(make: Callable[[Any, float], Any], z: jax.Array, values: Callable[[Any], np.ndarray], order: int) -> Code:
    """`make(exponax, Δt)`: one of its steppers, stepped in Fourier space from z `(c, *k)`, or `(sample, c, *k)`."""
    try:
        exponax = importlib.import_module("exponax")
    except ImportError as error:
        raise ValueError(f"exponax cannot be used ({error}); install it with: pip install exponax") from error
    static = eqx.partition(make(exponax, 1e-3), eqx.is_array)[1]
    batched = z.ndim == static.num_spatial_dims + 2

    def step(arrays, z):
        stepper = eqx.combine(arrays, static)
        return jax.vmap(stepper.step_fourier)(z) if batched else stepper.step_fourier(z)

    def constants(dt):
        return eqx.filter(make(exponax, dt), eqx.is_array)

    return Code("exponax", f"etdrk{order}", constants, repeated(step), z, values)


# --- pairs ------------------------------------------------------------------------------------------------------------------------


class Pair(NamedTuple):
    """Two codes that do the same work."""

    family: str
    case: str
    size: tuple[int, ...]
    cells: int
    dt: float
    codes: Callable[[], tuple[Code, Code]]


def _sizes(quick: bool, all_sizes: Sequence[int], few: Sequence[int]) -> Sequence[int]:
    return few if quick else all_sizes


def _velocity(grid: Grid, places, dtype: Any, peak: float = 4.0) -> jax.Array:
    return RandomVelocity(peak_wavenumber=peak, max_speed=7)(jax.random.key(0), grid, places, dtype)


def _exponax_vorticity(solver: Spectral2D, u: jax.Array, order: int) -> Code:
    prepared = solver.prepare(u.dtype)
    (n, _), (length, _) = solver.grid.shape, solver.grid.lengths

    def make(exponax, dt):
        return exponax.stepper.NavierStokesVorticity(2, length, n, dt, diffusivity=float(solver.equation.viscosity), order=order)

    # Its vorticity is ∂u/∂y − ∂v/∂x.
    def values(z):
        return np.asarray(prepared.decode({"vorticity": -z[0], "mean": jnp.zeros(2, u.dtype)}))

    return from_exponax(make, -prepared.encode(u)["vorticity"][None], values, order)


def _square(n: int, d: int = 2) -> Grid:
    return Grid((n,) * d, (2 * np.pi,) * d)


def spectral_pairs(quick: bool, dtype: Any) -> Iterator[Pair]:
    for n in _sizes(quick, (32, 64, 128, 256, 512, 1024), (64, 256)):
        solver = Spectral2D(_square(n), NavierStokes(1e-3), dealias="two_thirds")
        dt = 0.5 * solver.grid.spacing[0] / 7
        for case, stepper, other in (("CN-RK4", CrankNicolsonRK4(), "jax-cfd"), ("ETDRK4", ETDRK4(), "exponax")):

            def codes(solver=solver, stepper=stepper, other=other):
                u = _velocity(solver.grid, (solver.grid.centre,) * 2, dtype)
                peer = _exponax_vorticity(solver, u, 4) if other == "exponax" else None
                return ours(solver, stepper, u), peer or from_jax_cfd_spectral(solver, u, "crank_nicolson_rk4")

            yield Pair("spectral", f"2D spectral {case}", (n, n), n * n, dt, codes)


def _waves(grid: Grid, samples: int, dtype: Any) -> jax.Array:
    """Sums of a few long waves of unit amplitude, `(sample, 1, n)`."""
    (n,) = grid.shape
    rng = np.random.default_rng(0)
    x = 2 * np.pi * (np.arange(n) + 0.5) / n
    k = np.arange(1, 9)[:, None, None]
    phase, size = 2 * np.pi * rng.uniform(size=(2, 8, samples, 1))
    return jnp.asarray((size / (2 * np.pi) * np.cos(k * x + phase)).sum(axis=0)[:, None], dtype)


def _exponax_ks(solver: SpectralKS, u: jax.Array, order: int) -> Code:
    prepared = solver.prepare(u.dtype)
    (n,), (length,) = solver.grid.shape, solver.grid.lengths
    batched = u.ndim == 3

    def make(exponax, dt):
        return exponax.stepper.KuramotoSivashinskyConservative(1, length, n, dt, order=order)

    def encode(u):
        return prepared.encode(u)["u"][None]

    def values(z):
        return np.asarray(jnp.fft.irfft(z, n=n))

    return from_exponax(make, jax.vmap(encode)(u) if batched else encode(u), values, order)


def ks_pairs(quick: bool, dtype: Any) -> Iterator[Pair]:
    for samples in (1, 64):
        for n in _sizes(quick, (64, 128, 256, 512, 1024, 2048), (128, 512)):
            solver = SpectralKS(Grid((n,), (n / 8,)), KuramotoSivashinsky(), dealias="two_thirds")

            def codes(solver=solver, samples=samples):
                u = _waves(solver.grid, samples, dtype)
                u = u[0] if samples == 1 else u
                return ours(solver, ETDRK4(), u, batched=samples > 1), _exponax_ks(solver, u, 4)

            case = "KS ETDRK4" if samples == 1 else f"KS ETDRK4, batch of {samples}"
            yield Pair("ks", case, (n,), n * samples, 0.01, codes)


def finite_volume_pairs(quick: bool, dtype: Any) -> Iterator[Pair]:
    ladders: tuple[tuple[int, Convection, Sequence[int], Sequence[int]], ...] = (
        (2, "van_leer", (32, 64, 128, 256, 512, 1024), (64, 256)),
        (2, "central", (32, 64, 128, 256, 512, 1024), (64, 256)),
        (3, "van_leer", (16, 32, 64, 128), (32,)),
        (3, "central", (16, 32, 64, 128), (32,)),
    )
    for d, convection, sizes, few in ladders:
        for n in _sizes(quick, sizes, few):
            solver = StaggeredFiniteVolume(_square(n, d), NavierStokes(1e-3), convection)

            for stock in (True, False) if convection == "van_leer" else (False,):

                def codes(solver=solver, stock=stock):
                    u = solver.project(_velocity(solver.grid, tuple(v.at for v in solver.variables), dtype, 3.0))
                    return ours(solver, ForwardEuler(), u), from_jax_cfd_finite_volume(solver, u, "forward_euler", stock)

                case = f"{d}D {convection} Euler" + (", peer's stock" if stock else "")
                yield Pair("finite_volume", case, (n,) * d, n**d, 0.25 * solver.grid.spacing[0] / 7, codes)


PAIRS: dict[str, Callable[[bool, Any], Iterator[Pair]]] = {
    "spectral": spectral_pairs,
    "ks": ks_pairs,
    "finite_volume": finite_volume_pairs,
}


def in_turn(codes: Sequence[Timed], dt: float, rounds: int) -> list[list[float]]:
    """Seconds per step of each code, round by round."""
    steps = []
    for code in codes:
        code(dt, 1)
        one = min(code(dt, 2)[0] for _ in range(2)) / 2
        steps.append(max(2, min(20_000, round(SECONDS / max(one, 1e-9)))))
    # As many steps for all: long runs of one code must not meet other caches and clocks.
    count = min(steps)
    found: list[list[float]] = [[] for _ in codes]
    for _ in range(rounds):
        for seconds, code in zip(found, codes, strict=True):
            seconds.append(code(dt, count)[0] / count)
    return found


def _spread(ratios: Sequence[float]) -> list[float]:
    return [min(ratios), statistics.median(ratios), max(ratios)]


def timed_pair(pair: Pair, dtype: Any, rounds: int, same_options: bool = False) -> dict[str, Any]:
    """One row of `rows`; with `same_options` the peer is compiled with our options too."""
    first, second = pair.codes()
    mine, peer = Timed(first, dtype), Timed(second._replace(options=first.options) if same_options else second, dtype)
    a, b = (code.code.values(code(pair.dt, COMPARED_AFTER)[1]) for code in (mine, peer))
    seconds = in_turn((mine, peer), pair.dt, rounds)
    to_ns = 1e9 / pair.cells
    return {
        "family": pair.family,
        "case": pair.case,
        "size": list(pair.size),
        "dtype": jnp.dtype(dtype).name,
        "scheme": mine.code.scheme,
        "ours_ns": statistics.median(seconds[0]) * to_ns,
        "peer": peer.code.name,
        "peer_ns": statistics.median(seconds[1]) * to_ns,
        "ratio": _spread([b / a for a, b in zip(*seconds, strict=True)]),
        "memory_mb": mine.memory_mb,
        "peer_memory_mb": peer.memory_mb,
        "compile_s": mine.compile_s,
        "peer_compile_s": peer.compile_s,
        "error": float(np.abs(a - b).max() / np.abs(b).max()),
    }


# --- equal accuracy ---------------------------------------------------------------------------------------------------------------


class Entry(NamedTuple):
    """A code on a grid of `size` cells per axis, the Δt to begin with, and u -> its error at the end."""

    size: int
    dt: float
    code: Code
    error: Callable[[np.ndarray], float]


class Contest(NamedTuple):
    """One flow from t = 0 to `end`, for many codes: those of one peer, and ours."""

    family: str
    case: str
    end: float
    entries: Callable[[], list[Entry]]


class Run(NamedTuple):
    """One solution: its error, its steps, and what it costs in each round, in seconds."""

    error: float
    cost: list[float]
    size: int
    scheme: str
    steps: int


LADDER = 2**0.25
"""From one Δt to the next."""


def solved(solver: AbstractSolver, u: np.ndarray, end: float, steps: int) -> np.ndarray:
    """u(T) in double precision, by `ETDRK4`."""
    with setting("jax_enable_x64", True):
        code = ours(solver, ETDRK4(), jnp.asarray(u, jnp.float64))
        return code.values(Timed(code, jnp.float64)(end / steps, steps)[1])


def spectral_contests(quick: bool, dtype: Any) -> Iterator[Contest]:
    sizes, end = ((48, 64, 80, 96) if quick else (80, 96, 128, 160, 192, 256)), 0.5
    equation = NavierStokes(0.02 if quick else 0.005)
    fine = Spectral2D(_square(2 * sizes[-1]), equation)
    start = np.asarray(fine.project(_velocity(fine.grid, (fine.grid.centre,) * 2, dtype, 3.0)))
    answer = solved(fine, start, end, 4 * sizes[-1])
    error = _interpolated(answer)

    def entries(peer: str) -> list[Entry]:
        found = []
        for n in sizes:
            best, rival = (Spectral2D(_square(n), equation, dealias=kind) for kind in ("hou_li", "two_thirds"))
            u = jnp.asarray(best.restrict(jnp.asarray(start, dtype), fine.grid, fine.variables), dtype)
            codes = [ours(best, stepper, u) for stepper in (ETDRK4(), CrankNicolsonRK4())]
            if peer == "jax-cfd":
                codes += [from_jax_cfd_spectral(rival, u, f"crank_nicolson_rk{k}") for k in (4, 3)]
            else:
                codes += [_exponax_vorticity(rival, u, order) for order in (4, 2)]
            found += [Entry(n, 1.4 * best.grid.spacing[0] / 7, code, error) for code in codes]
        return found

    for peer in ("jax-cfd", "exponax"):
        yield Contest("spectral", f"2D spectral, {peer}", end, functools.partial(entries, peer))


def _interpolated(answer: np.ndarray) -> Callable[[np.ndarray], float]:
    """The error of the trigonometric interpolant: what a coarse grid lacks counts."""
    axes = tuple(range(1, answer.ndim))
    wanted = np.fft.fftn(answer, axes=axes, norm="forward")

    def error(u: np.ndarray) -> float:
        n, m = u.shape[-1], answer.shape[-1]
        k = np.fft.fftfreq(n, 1 / n).astype(int)
        shift = 1.0
        for axis in axes:
            # Samples lie at (i + ½) Δx on either grid.
            angle = np.pi * k * (1 / n - 1 / m)
            shift = shift * np.exp(-1j * angle).reshape([-1 if a == axis else 1 for a in range(answer.ndim)])
        found = np.zeros_like(wanted)
        inside = np.abs(k) < n / 2
        found[np.ix_(range(len(u)), *(k[inside] % m,) * len(axes))] = (np.fft.fftn(u, axes=axes, norm="forward") * shift)[
            np.ix_(range(len(u)), *(inside,) * len(axes))
        ]
        return float(np.sqrt((np.abs(found - wanted) ** 2).sum() / (np.abs(wanted) ** 2).sum()))

    return error


def _on_its_grid(answer: np.ndarray) -> Callable[[np.ndarray], float]:
    return lambda u: float(np.sqrt(((u - answer) ** 2).mean() / (answer**2).mean()))


def ks_contests(quick: bool, dtype: Any) -> Iterator[Contest]:
    sizes, end, length = ((64, 96) if quick else (64, 80, 96, 128, 160)), 10.0, 64.0
    fine = SpectralKS(Grid((2 * sizes[-1],), (length,)), KuramotoSivashinsky())
    start = np.asarray(fine.project(_waves(fine.grid, 1, dtype)[0]))
    answer = solved(fine, start, end, 5_000)

    def entries() -> list[Entry]:
        found = []
        for n in sizes:
            grid = Grid((n,), (length,))
            best, rival = (SpectralKS(grid, KuramotoSivashinsky(), dealias=kind) for kind in ("hou_li", "two_thirds"))
            u = jnp.asarray(best.restrict(jnp.asarray(start, dtype), fine.grid, fine.variables), dtype)
            codes = [ours(best, ETDRK4(), u), *(_exponax_ks(rival, u, order) for order in (4, 2))]
            found += [Entry(n, 1.0, code, _interpolated(answer)) for code in codes]
        return found

    yield Contest("ks", "KS, exponax", end, entries)


def finite_volume_contests(quick: bool, dtype: Any) -> Iterator[Contest]:
    sizes, end = ((32, 64) if quick else (64, 128, 256)), 0.5
    fine = Spectral2D(_square(2 * sizes[-1]), NavierStokes(0.02 if quick else 0.005))
    start = np.asarray(fine.project(_velocity(fine.grid, (fine.grid.centre,) * 2, dtype, 2.0)))
    answer = solved(fine, start, end, 4 * sizes[-1])

    def entries(convection: Convection) -> list[Entry]:
        found = []
        for n in sizes:
            solver = StaggeredFiniteVolume(_square(n), fine.equation, convection)
            with setting("jax_enable_x64", True):
                u, converged = (
                    np.asarray(solver.restrict(jnp.asarray(q, jnp.float64), fine.grid, fine.variables)) for q in (start, answer)
                )
            u = jnp.asarray(u, dtype)
            methods = ("forward_euler", "midpoint_rk2", "heun_rk2", "classic_rk4")
            codes = [ours(solver, SSPRK3(), u), ours(solver, SSPRK2(), u)]
            codes += [from_jax_cfd_finite_volume(solver, u, method) for method in methods]
            codes += [from_jax_cfd_finite_volume(solver, u, methods[0], stock=True)] if convection == "van_leer" else []
            found += [Entry(n, 2 * solver.grid.spacing[0] / 7, code, _on_its_grid(converged)) for code in codes]
        return found

    schemes: tuple[Convection, ...] = ("van_leer",) if quick else ("van_leer", "central")
    for convection in schemes:
        yield Contest("finite_volume", f"2D {convection}, jax-cfd", end, functools.partial(entries, convection))


CONTESTS: dict[str, Callable[[bool, Any], Iterator[Contest]]] = {
    "spectral": spectral_contests,
    "ks": ks_contests,
    "finite_volume": finite_volume_contests,
}


def runs_of(timed: Timed, entry: Entry, end: float, seconds: list[float]) -> list[Run]:
    """The ladder of Δt, down to where a smaller one no longer pays."""
    found, steps = [], max(1, round(end / entry.dt))
    best, idle, most = np.inf, 0, 100 * steps
    while idle < 4 and steps < most:
        error = entry.error(timed.code.values(timed(end / steps, steps)[1]))
        if np.isfinite(error) and error < 1:
            found.append(Run(error, [steps * s for s in seconds], entry.size, timed.code.scheme, steps))
            idle = 0 if error < 0.9 * best else idle + 1
            best = min(best, error)
        steps = max(steps + 1, round(steps * LADDER))
    return found


def cost_at(error: float, runs: Sequence[Run], which: int) -> tuple[float, Run] | None:
    """Seconds that the best of these runs take for no more than an error, in round `which`, and the run that has it; None where
    none is as accurate.

    Between two runs on logarithmic axes; where even the cheapest stable run is more accurate, what that one takes.
    """
    front: list[Run] = []
    for run in sorted(runs, key=lambda r: r.cost[which]):
        if not front or run.error < front[-1].error:
            front.append(run)
    if front and front[0].error <= error:
        return front[0].cost[which], front[0]
    for worse, better in itertools.pairwise(front):
        if better.error <= error:
            share = np.log(error / worse.error) / np.log(better.error / worse.error)
            return float(worse.cost[which] ** (1 - share) * better.cost[which] ** share), better
    return None


def settled(contest: Contest, dtype: Any, rounds: int, same_options: bool = False) -> list[dict[str, Any]]:
    """Rows of `equal_accuracy`: one for each error between the first guess and the best of the less accurate code."""
    entries = contest.entries()
    if same_options:
        own = {entry.size: entry.code.options for entry in entries if entry.code.name == "hybridsim"}
        entries = [entry._replace(code=entry.code._replace(options=own.get(entry.size, entry.code.options))) for entry in entries]
    timed = [(entry, Timed(entry.code, dtype)) for entry in entries]
    runs: dict[bool, list[Run]] = {True: [], False: []}
    for size in dict.fromkeys(entry.size for entry, _ in timed):
        of_size = [both for both in timed if both[0].size == size]
        seconds = in_turn([one for _, one in of_size], of_size[0][0].dt / 4, rounds)
        for (entry, one), each in zip(of_size, seconds, strict=True):
            runs[one.code.name == "hybridsim"] += runs_of(one, entry, contest.end, each)
    peer = next(one.code.name for _, one in timed if one.code.name != "hybridsim")
    rows, largest = [], max(run.error for each in runs.values() for run in each)
    for error in (f * 10.0**k for k in range(-1, -7, -1) for f in (5, 2, 1)):
        found = [[cost_at(error, runs[mine], k) for k in range(rounds)] for mine in (True, False)]
        if error > largest or any(cost is None for costs in found for cost in costs):
            continue
        (mine, theirs) = ([cost for cost in costs if cost is not None] for costs in found)
        rows.append(
            {
                "family": contest.family,
                "case": contest.case,
                "peer": peer,
                "error": error,
                "ours_s": statistics.median(c for c, _ in mine),
                "peer_s": statistics.median(c for c, _ in theirs),
                "ratio": _spread([b[0] / a[0] for a, b in zip(mine, theirs, strict=True)]),
                "ours": _described(mine[0][1]),
                "peers": _described(theirs[0][1]),
                "dtype": jnp.dtype(dtype).name,
            }
        )
    return rows


def _described(run: Run) -> dict[str, Any]:
    return {"scheme": run.scheme, "size": run.size, "steps": run.steps, "error": run.error}


# --- the command ------------------------------------------------------------------------------------------------------------------


def _ratio(values: Sequence[float]) -> str:
    low, median, high = values
    return f"{median:.2f} [{low:.2f}, {high:.2f}]"


def _pair_of(ours: float | None, peer: float | None, digits: int = 1) -> str:
    return " / ".join("–" if x is None else f"{x:.{digits}f}" for x in (ours, peer))


def _table(title: str, columns: Sequence[str]):
    """A table whose columns ending in ">" are flush right."""
    from rich.table import Table

    table = Table(title=title, title_justify="left")
    for name in columns:
        table.add_column(name.removesuffix(" >"), justify="right" if name.endswith(" >") else "left", no_wrap=True)
    return table


def print_rows(rows: Sequence[Mapping[str, Any]], console: "Console") -> None:
    table = _table(
        "Same scheme, same Δt: peer over ours, above 1 we are faster",
        ("case", "size", "peer", "ns per cell and step >", r"ratio \[low, high] >", "MB >", "compile s >", "difference >"),
    )
    for row in rows:
        table.add_row(
            row["case"],
            "×".join(map(str, row["size"])),
            row["peer"],
            _pair_of(row["ours_ns"], row["peer_ns"]),
            _ratio(row["ratio"]),
            _pair_of(row["memory_mb"], row["peer_memory_mb"]),
            _pair_of(row["compile_s"], row["peer_compile_s"]),
            f"{row['error']:.0e}",
        )
    console.print(table)


def print_contests(rows: Sequence[Mapping[str, Any]], console: "Console") -> None:
    table = _table(
        "Equal accuracy: what no more than an error costs, peer over ours",
        ("case", "error >", "seconds >", r"ratio \[low, high] >", "ours", "the peer's best"),
    )
    for row in rows:
        mine, theirs = (f"{run['scheme']}, {run['size']} cells, {run['steps']} steps" for run in (row["ours"], row["peers"]))
        seconds = f"{row['ours_s']:.3g} / {row['peer_s']:.3g}"
        table.add_row(row["case"], f"{row['error']:.0e}", seconds, _ratio(row["ratio"]), mine, theirs)
    console.print(table)


def run_peers(
    families: Sequence[str], quick: bool, rounds: int, precision: str, out: str, console: "Console", same_options: bool = False
) -> None:
    """Time the pairs and settle the contests of these families, print both tables, write `out`.

    A peer that is not installed or does not work with this JAX is named with the reason, and the others go on; what was found is
    saved whatever ends the command.
    """
    from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    dtype = jnp.dtype(precision)
    rows: list[dict[str, Any]] = []
    equal: list[dict[str, Any]] = []
    missing: dict[str, str] = {}
    progress = Progress(SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn(), console=console, transient=True)

    def attempt(label: str, action: Callable[[], Any]) -> Any:
        progress.update(task, description=label)
        try:
            return action()
        except (AttributeError, ImportError, TypeError, ValueError) as error:
            missing.setdefault(" ".join(str(error).split())[:300], label)
            return None

    today = datetime.date.today().isoformat()
    found = environment() | {name: _version(name) for name in ("jax-cfd", "exponax")}
    task = progress.add_task("")
    try:
        with warnings.catch_warnings(), progress:
            warnings.simplefilter("ignore")
            for family in families:
                for pair in PAIRS[family](quick, dtype):
                    label = f"{pair.case}, {'×'.join(map(str, pair.size))}"
                    row = attempt(label, functools.partial(timed_pair, pair, dtype, rounds, same_options))
                    rows += [row] if row else []
                contests = CONTESTS[family](quick, dtype)
                while (contest := attempt(f"{family}: equal accuracy", functools.partial(next, contests, None))) is not None:
                    label = f"equal accuracy: {contest.case}"
                    equal += attempt(label, functools.partial(settled, contest, dtype, rounds, same_options)) or []
    finally:
        options = "same" if same_options else "own"
        write_json(out, {"date": today, "versions": found, "compiler_options": options, "rows": rows, "equal_accuracy": equal})
    codes = ", ".join(f"{name} {found[name]}" for name in ("jax", "jax-cfd", "exponax"))
    console.print(f"{found['device']}, {found['threads']} threads, {codes}, {precision}, {today}; ours / peer")
    if rows:
        print_rows(rows, console)
    if equal:
        print_contests(equal, console)
    for reason, label in missing.items():
        console.print(f"not timed: {label}: {reason}", style="yellow", markup=False)
    console.print(f"written: {out}")


def _version(package: str) -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"
