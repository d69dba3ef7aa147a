"""Flow between walls against what is known exactly: channels, moving walls, open sides, the cavity, symmetries, dead values."""

import json
from pathlib import Path

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flows import evolve, learned, relative, sample, steps

from hybridsim.contract import Flux, PostStep, Source
from hybridsim.corrections.eddy import Leith, Smagorinsky
from hybridsim.grid import Grid
from hybridsim.model import Model
from hybridsim.solvers.finite_volume import StaggeredFiniteVolume
from hybridsim.solvers.incompressible import (
    AbstractBoundaryVelocity,
    Isotropic,
    Kolmogorov,
    LinearDrag,
    Moving,
    NavierStokes,
    Parabola,
    UniformForce,
)
from hybridsim.solvers.poisson import Poisson
from hybridsim.solvers.steppers import SSPRK2, SSPRK3, ForwardEuler

pytestmark = pytest.mark.usefixtures("x64")

DATA = Path(__file__).parent / "data"
CHANNEL = ("periodic", "no_slip")


def flow(grid, viscosity, forcing=None, velocity=None, scalars=None, **options):
    return StaggeredFiniteVolume(grid, NavierStokes(viscosity, forcing, scalars, velocity or {}), **options)


def run(solver, u, time, dt, stepper=SSPRK2()):  # noqa: B008
    count = max(1, int(np.ceil(time / dt - 1e-9)))
    return evolve(solver, stepper, u, time / count, count)


@eqx.filter_jit
def _projected(solver, u):
    return solver.project(u)


def projected(solver, u):
    return np.asarray(_projected(solver, jnp.asarray(u)))


def noise(solver, seed=7):
    return projected(solver, np.random.default_rng(seed).standard_normal((len(solver.variables), *solver.grid.shape)))


def rates(errors):
    return np.log2(np.array(errors[:-1]) / errors[1:])


@eqx.filter_jit
def _divergence(solver, u):
    return jnp.abs(solver.divergence(u)).max()


def divergence(solver, u):
    """max |∇·u| in U/Δx, in double precision, the lower sides included."""
    u = np.asarray(u, np.float64)
    return float(_divergence(solver, jnp.asarray(u))) / (np.abs(u).max() / min(solver.grid.spacing))


# --- the same case, turned and mirrored ------------------------------------------------------------------------------------------


class Turned(AbstractBoundaryVelocity):
    """(U_y, U_x)(y, x)."""

    inner: AbstractBoundaryVelocity

    def __call__(self, component, position, t):
        return self.inner(1 - component, position[::-1], t)


class Mirrored(AbstractBoundaryVelocity):
    """U(L − x), its component `axis` negated."""

    inner: AbstractBoundaryVelocity
    axis: int
    length: float

    def __call__(self, component, position, t):
        moved = tuple(self.length - x if a == self.axis else x for a, x in enumerate(position))
        return self.inner(component, moved, t) * (-1.0 if component == self.axis else 1.0)


def turned(solver):
    grid, equation = solver.grid, solver.equation
    names = {"x": "y", "y": "x"}
    velocity = {names[name[0]] + name[1:]: Turned(inner) for name, inner in equation.boundary_velocity.items()}
    forcing = equation.forcing
    if isinstance(forcing, UniformForce):
        forcing = UniformForce(forcing.acceleration_vector[::-1], forcing.drag)
    grid = Grid(grid.shape[::-1], grid.lengths[::-1], grid.boundaries[::-1])
    return flow(grid, equation.viscosity, forcing, velocity, equation.scalars, convection=solver.convection)


def turned_state(u):
    return np.stack([u[1].T, u[0].T, *(q.T for q in u[2:])])


def mirrored(solver, axis):
    grid, equation = solver.grid, solver.equation
    sides = {f"{'xyz'[axis]}_lower": f"{'xyz'[axis]}_upper", f"{'xyz'[axis]}_upper": f"{'xyz'[axis]}_lower"}
    velocity = {
        sides.get(name, name): Mirrored(inner, axis, grid.lengths[axis]) for name, inner in equation.boundary_velocity.items()
    }
    boundaries = [sides[::-1] if a == axis else sides for a, sides in enumerate(grid.boundaries)]
    forcing = equation.forcing
    if isinstance(forcing, UniformForce):
        forcing = UniformForce([-g if a == axis else g for a, g in enumerate(forcing.acceleration_vector)], forcing.drag)
    grid = Grid(grid.shape, grid.lengths, boundaries)
    return flow(grid, equation.viscosity, forcing, velocity, equation.scalars, convection=solver.convection)


def mirrored_state(solver, u, axis):
    """The state of `solver`, mirrored; faces go with the one on the lower side in front."""
    out = []
    for c, q in enumerate(u):
        if c == axis and solver.grid.periodic[axis]:
            out.append(-np.roll(np.flip(q, axis), -1, axis))
        elif c == axis:
            below = solver._side(jnp.asarray(q), axis, 0)
            out.append(-np.flip(np.concatenate([below, np.take(q, range(q.shape[axis] - 1), axis)], axis), axis))
        else:
            out.append(np.flip(q, axis))
    return np.stack(out)


def same_turned_and_mirrored(solver, u, after, time, dt, axes=(0, 1), stepper=SSPRK2()):  # noqa: B008
    """Largest difference between the run turned or mirrored, and the turned or mirrored run."""
    found = [relative(run(turned(solver), turned_state(u), time, dt, stepper), turned_state(after))]
    for axis in axes:
        again = run(mirrored(solver, axis), mirrored_state(solver, u, axis), time, dt, stepper)
        found.append(relative(again, mirrored_state(solver, after, axis)))
    return max(found)


# --- channels --------------------------------------------------------------------------------------------------------------------


def _poiseuille(n, sides="no_slip"):
    solver = flow(Grid((4, n), (1.0, 2.0), ("periodic", sides)), 0.5, UniformForce((0.8, 0.0)))
    # a free-slip wall is the middle of a channel twice as wide
    height = 4.0 if sides != "no_slip" else 2.0
    return solver, sample(solver, lambda x, y: 0.8 * y * (height - y) / (2 * 0.5), lambda x, y: 0 * y)


@pytest.mark.parametrize("sides", ["no_slip", ("no_slip", "free_slip")], ids=["channel", "half channel"])
def test_poiseuille_flow_driven_by_a_force(sides):
    """A parabola is exact: the flow keeps it, and reaches it from rest."""
    for n in (8, 15):
        solver, exact = _poiseuille(n, sides)
        dt = 0.4 * (2 / n) ** 2
        assert relative(run(solver, exact, 20.0, dt, ForwardEuler()), exact) <= 1e-13
        assert relative(run(solver, 0 * exact, 0.5, dt, ForwardEuler()), exact) > 0.1  # negative control
        assert relative(run(solver, 0 * exact, 150.0, dt, ForwardEuler()), exact) <= 1e-12


def test_poiseuille_flow_turned_and_mirrored_and_in_single_precision():
    solver, exact = _poiseuille(16)
    u = run(solver, exact, 1.0, 0.005)
    assert same_turned_and_mirrored(solver, exact, u, 1.0, 0.005) <= 1e-13
    single = run(solver, exact.astype(np.float32), 1.0, 0.005)
    assert single.dtype == np.float32
    assert relative(single, u) <= 1e-5


def _start_up(y, t, viscosity, height=1.0):
    """u/U of the fluid between a wall at rest and one that starts to move at t = 0."""
    n = np.arange(1, 200)[:, None, None]
    waves = 2 / (n * np.pi) * np.exp(-((n * np.pi / height) ** 2) * viscosity * t) * np.sin(n * np.pi * (1 - y / height))
    return y / height - waves.sum(axis=0)


def test_couette_flow_starts_up_and_ends_exactly():
    errors = []
    for n in (16, 32, 64):
        solver = flow(Grid((4, n), (1.0, 1.0), CHANNEL), 0.1, velocity={"y_upper": Moving((2.0, 0.0))})
        rest = np.zeros((2, 4, n))
        exact = sample(solver, lambda x, y: 2 * _start_up(y, 0.5, 0.1), lambda x, y: 0 * x)
        dt = 0.8 / n**2
        u = run(solver, rest, 0.5, dt)
        errors.append(np.abs(u - exact).max())
        if n == 16:
            fine = run(solver, rest, 0.5, dt / 2)
            assert np.abs(fine - u).max() < 0.01 * errors[-1]
            assert same_turned_and_mirrored(solver, rest, u, 0.5, dt, axes=(1,)) <= 1e-13
            final = run(solver, rest, 60.0, dt)
            # a linear profile is exact
            np.testing.assert_allclose(final[0], sample(solver, lambda x, y: 2 * y, lambda x, y: 0 * x)[0], rtol=1e-12)
    print(errors, rates(errors))
    assert rates(errors)[-1] >= 1.9


@pytest.mark.slow
def test_stokes_second_problem():
    """A wall that slides to and fro: u = Re U e^{iωt} sinh(k s) / sinh(k H), k² = iω/ν, s the distance from the wall at rest."""
    omega, viscosity = 3.0, 0.05
    k = np.sqrt(1j * omega / viscosity)

    def exact_at(solver, t):
        wave = lambda x, y: (np.exp(1j * omega * t) * np.sinh(k * (1 - y)) / np.sinh(k)).real  # noqa: E731
        return sample(solver, wave, lambda x, y: 0 * x)

    errors = []
    for n in (64, 128, 256):
        solver = flow(Grid((4, n), (1.0, 1.0), CHANNEL), viscosity, velocity={"y_lower": Moving((1.0, 0.0), omega)})
        dt = 0.4 / n**2 / viscosity
        u = run(solver, exact_at(solver, 0.0), 2.5, dt, SSPRK3())
        errors.append(np.sqrt(np.mean((u[0] - exact_at(solver, 2.5)[0]) ** 2)))
        if n == 64:
            change = run(solver, exact_at(solver, 0.0), 2.5, dt / 2, SSPRK3()) - u
            assert np.sqrt(np.mean(change**2)) < 0.01 * errors[-1]
            assert same_turned_and_mirrored(solver, exact_at(solver, 0.0), u, 2.5, dt, (1,), SSPRK3()) <= 1e-13
    print(errors, rates(errors))
    assert rates(errors)[-1] >= 1.9
    assert np.abs(exact_at(solver, 2.5) - exact_at(solver, 0.0)).max() > 0.5


def test_poiseuille_flow_from_inflow_to_outflow():
    errors = []
    for n in (8, 16, 32):
        grid = Grid((n, n), (1.0, 1.0), (("fixed", "outflow"), "no_slip"))
        solver = flow(grid, 0.1, velocity={"x_lower": Parabola(1.0)})
        exact = sample(solver, lambda x, y: 4 * y * (1 - y), lambda x, y: 0 * x)
        dt = min(2 / n**2, 0.3 / n)
        u = run(solver, exact, 4.0, dt)
        errors.append(np.abs(u - exact).max())
        assert divergence(solver, u) <= 1e-12
        if n == 16:
            # from rest the same flow is reached; the outflow carries away what comes in
            other = run(solver, 0 * exact, 8.0, dt)
            assert relative(other, u) <= 1e-3
            np.testing.assert_allclose(other[0].mean(axis=1), 2 / 3, rtol=1e-12)
            assert same_turned_and_mirrored(solver, exact, u, 4.0, dt, axes=(1,)) <= 1e-12
    print(errors, rates(errors))
    assert rates(errors)[-1] >= 1.95


class Kovasznay(AbstractBoundaryVelocity):
    """u = 1 − e^{λx} cos 2πy,  v = λ/2π e^{λx} sin 2πy at x − ½: the steady flow behind a grid (Kovasznay 1948)."""

    rate: float = json.loads((DATA / "closed_forms.json").read_text())["kovasznay_lambda_Re40"]

    def __call__(self, component, position, t):
        x, y = position[0] - 0.5, position[1]
        growth = np.exp(self.rate * x)
        if component == 0:
            return 1 - growth * np.cos(2 * np.pi * y)
        return self.rate / (2 * np.pi) * growth * np.sin(2 * np.pi * y)


def _kovasznay(n, right="fixed", convection="central"):
    velocity = {"x_lower": Kovasznay(), "x_upper": Kovasznay()}
    if right == "outflow":
        del velocity["x_upper"]
    solver = flow(Grid((3 * n // 2, n), (1.5, 1.0), (("fixed", right), "periodic")), 1 / 40, None, velocity, convection=convection)
    exact = sample(solver, *(lambda x, y, c=c: Kovasznay()(c, (x, y), 0.0) for c in range(2)))
    return solver, exact, min(8 / n**2, 0.3 / n)


@pytest.mark.parametrize("convection", ["central", pytest.param("van_leer", marks=pytest.mark.slow)])
def test_kovasznay_flow(convection):
    errors = []
    for n in (16, 32, 64):
        solver, exact, dt = _kovasznay(n, convection=convection)
        u = run(solver, exact, 5.0, dt, SSPRK3())
        errors.append(np.sqrt(np.mean((u - exact) ** 2)))
        assert divergence(solver, u) <= 1e-12
        if n == 16 and convection == "central":
            assert relative(run(solver, u, 1.0, dt, SSPRK3()), u) <= 1e-6
            assert same_turned_and_mirrored(solver, exact, u, 5.0, dt, (0,), SSPRK3()) <= 1e-11
            single = run(solver, exact.astype(np.float32), 5.0, dt, SSPRK3())
            assert relative(single, u) <= 2e-5
    print(convection, errors, rates(errors))
    assert rates(errors)[-1] >= 1.9


@pytest.mark.parametrize("convection", ["central", "van_leer"])
def test_kovasznay_flow_leaves_through_an_outflow(convection):
    solver, exact, dt = _kovasznay(32, "outflow", convection)
    u = run(solver, exact, 5.0, dt, SSPRK3())
    print(convection, relative(u, exact))
    assert divergence(solver, u) <= 1e-12
    assert relative(u, exact) <= 0.02  # the flow is not quite free of gradients there


@pytest.mark.parametrize("convection", ["central", "van_leer"])
def test_a_vortex_leaves_through_an_outflow(convection):
    """Its backflow is as strong as the stream; nothing is left of it afterwards."""
    n = 32
    grid = Grid((n, n), (1.0, 1.0), (("fixed", "outflow"), "free_slip"))
    solver = flow(grid, 1e-3, velocity={"x_lower": Moving((1.0, 0.0))}, convection=convection)
    bell = lambda x, y: 2 / 0.12 * np.exp(0.5 - ((x - 0.5) ** 2 + (y - 0.5) ** 2) / (2 * 0.12**2))  # noqa: E731
    u = sample(solver, lambda x, y: 1 - (y - 0.5) * bell(x, y), lambda x, y: (x - 0.5) * bell(x, y))
    half = run(solver, u, 0.5, 0.1 / n)
    assert half[0, -1].min() < -0.3  # it flows back
    assert np.abs(half).max() < 1.2 * np.abs(u).max()
    end = run(solver, half, 2.5, 0.1 / n)
    assert np.abs(end - np.array([1.0, 0.0])[:, None, None]).max() < 0.02


# --- the cavity ------------------------------------------------------------------------------------------------------------------


def _extremum(values):
    """The value farthest from zero, by the parabola through three points."""
    i = int(np.argmax(np.abs(values)))
    a, b, c = values[i - 1 : i + 2]
    return b - (a - c) ** 2 / (8 * (a - 2 * b + c))


def _cavity_extrema(n, reynolds, time):
    solver = flow(Grid((n, n), (1.0, 1.0), ("no_slip", "no_slip")), 1 / reynolds, velocity={"y_upper": Moving((1.0, 0.0))})
    dt = min(0.18 * reynolds / n**2, 0.8 / n)
    u = run(solver, np.zeros((2, n, n)), time, dt, SSPRK3())
    drift = relative(run(solver, u, 1.0, dt, SSPRK3()), u)
    assert divergence(solver, u) <= 1e-11
    # both lines are faces of the grid
    across, along = u[0, n // 2 - 1], u[1, :, n // 2 - 1]
    found = {"u_min": _extremum(np.minimum(across, 0)), "v_max": _extremum(np.maximum(along, 0)),
             "v_min": _extremum(np.minimum(along, 0))}  # fmt: skip
    return found, drift


def _published(reynolds):
    data = json.loads((DATA / "cavity_extrema.json").read_text())[f"Re{reynolds}"]
    if reynolds == 100:
        return {name: data[f"{name}_Marchi2009"] for name in ("u_min", "v_max", "v_min")}
    return {name: data["BotellaPeyret1998"][name] for name in ("u_min", "v_max", "v_min")}


CAVITIES = [
    (32, 100, 20.0, 0.015),
    pytest.param(128, 100, 25.0, 0.01, marks=pytest.mark.slow),
    pytest.param(128, 1000, 100.0, 0.01, marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("n", "reynolds", "time", "tolerance"), CAVITIES)
def test_lid_driven_cavity(n, reynolds, time, tolerance):
    found, drift = _cavity_extrema(n, reynolds, time)
    worst = {name: abs(found[name] / value - 1) for name, value in _published(reynolds).items()}
    print(n, reynolds, found, worst, "drift in one unit of time", drift)
    assert drift <= 1e-4
    assert max(worst.values()) <= tolerance


# --- three dimensions ------------------------------------------------------------------------------------------------------------


def _duct(y, z, terms=60):
    """u of a square duct of side 1 at g/ν = 1 (the series of White, Viscous Fluid Flow, eq. 3-48)."""
    total = 0.0
    for i in range(1, terms, 2):
        wave = 1 - np.cosh(i * np.pi * (z - 0.5)) / np.cosh(i * np.pi / 2)
        total = total + (-1) ** ((i - 1) // 2) * wave * np.cos(i * np.pi * (y - 0.5)) / i**3
    return 4 / np.pi**3 * total


@pytest.mark.slow
def test_flow_through_a_square_duct():
    errors = []
    for n in (16, 32, 64):
        solver = flow(Grid((4, n, n), (1.0, 1.0, 1.0), ("periodic", "no_slip", "no_slip")), 1.0, UniformForce((1.0, 0.0, 0.0)))
        exact = sample(solver, lambda x, y, z: _duct(y, z), *(lambda x, y, z: 0 * x,) * 2)
        u = run(solver, exact, 0.1, 0.18 / n**2, ForwardEuler())
        errors.append(np.abs(u[0] - exact[0]).max())
        assert np.abs(u[1:]).max() <= 1e-14
        assert divergence(solver, u) <= 1e-11
    print(errors, rates(errors))
    assert rates(errors)[-1] >= 1.9


@pytest.mark.parametrize("along", [1, 2])
def test_poiseuille_flow_in_three_dimensions_along_every_axis(along):
    across = (along + 1) % 3
    shape, lengths, sides, g = [4, 4, 4], [1.0, 1.0, 1.0], ["periodic"] * 3, [0.0] * 3
    shape[across], sides[across], g[along] = 12, "no_slip", 1.0
    solver = flow(Grid(shape, lengths, sides), 0.5, UniformForce(g))
    s = solver.grid.mesh(solver.variables[along].at)[across]
    u = run(solver, np.zeros((3, *shape)), 6.0, 0.25 / 12**2, ForwardEuler())
    np.testing.assert_allclose(u[along], s * (1 - s), rtol=1e-10)
    assert not np.delete(u, along, axis=0).any()


def test_a_lid_drives_a_cube():
    """Turned about the diagonal of the cube, and its own mirror image across the lid's motion; with an eddy viscosity."""
    n = 8
    run_along = lambda lid, velocity: evolve(  # noqa: E731
        flow(Grid((n,) * 3, (1.0,) * 3, ("no_slip",) * 3), 1e-2, None, {lid: Moving(velocity)}), SSPRK2(), np.zeros((3, n, n, n)),
        0.05, 20, (Smagorinsky(0.2),),
    )  # fmt: skip
    u = run_along("y_upper", (1.0, 0.0, 0.0))
    assert divergence(flow(Grid((n,) * 3, (1.0,) * 3, ("no_slip",) * 3), 1e-2), u) <= 1e-12
    assert 0.3 < u[0].max() < 1
    assert u[0].min() < -0.02
    assert u[1].max() > 0.02
    assert relative(np.flip(u[:2], 3), u[:2]) <= 1e-13
    w = np.concatenate([np.zeros((n, n, 1)), u[2]], axis=2)
    np.testing.assert_allclose(np.flip(w, 2), -w, rtol=0, atol=1e-14)
    there = run_along("z_upper", (0.0, 1.0, 0.0))
    assert relative(there, np.transpose(u[[2, 0, 1]], (0, 3, 1, 2))) <= 1e-13


class Mixing(Flux):
    """F[a, c] = −ν (1 + |Δ∇u|²) ∂_a u_c for every channel, and a second derivative on the way: all that a view offers.

    `dirt` is added wherever an array lives on a side of the box.
    """

    dirt: float | jax.Array = 0.0

    def _soiled(self, array, at, grid):
        for axis, place in enumerate(at):
            if place == 1 and not grid.periodic[axis]:
                last = jax.lax.broadcasted_iota(jnp.int32, array.shape, axis) == array.shape[axis] - 1
                array = jnp.where(last, array + self.dirt, array)
        return array

    def __call__(self, view, memory=None, key=None):
        grid = view.grid
        channels = range(len(view.variables))
        gradient = view.gradient()
        tensor = [[self._soiled(gradient[a, c], view.flux_place(a, c), grid) for c in channels] for a in range(grid.ndim)]
        square = sum(view.to(q**2, view.flux_place(a, c), grid.centre) for a, row in enumerate(tensor) for c, q in enumerate(row))
        place = view.flux_place(0, 1)
        spin = self._soiled(gradient[0, 1] - gradient[1, 0], place, grid)
        for axis in range(grid.ndim):
            slope, at = view.derivative(spin, place, axis)
            square = square + 1e-3 * view.to(self._soiled(slope, at, grid), at, grid.centre) ** 2
        assert view.centred().shape == view.u.shape
        viscosity = 1e-3 * (1 + square / (1 + square))
        out = [
            [-self._soiled(view.to(viscosity, grid.centre, view.flux_place(a, c)) * q, view.flux_place(a, c), grid)
             for c, q in enumerate(row)] for a, row in enumerate(tensor)
        ]  # fmt: skip
        return jnp.stack([jnp.stack(row) for row in out])


class Soiled(Source):
    """s = −0.1 u, and `dirt` on the upper sides."""

    dirt: float | jax.Array = 0.0

    def __call__(self, view, memory=None, key=None):
        channels = [Mixing(self.dirt)._soiled(-0.1 * q, v.at, view.grid) for q, v in zip(view.u, view.variables, strict=True)]
        return jnp.stack(channels)


class SoiledStep(PostStep):
    """d = −10⁻³ u, and `dirt` on the upper sides."""

    dirt: float | jax.Array = 0.0

    def __call__(self, view, memory=None, key=None):
        channels = [Mixing(self.dirt)._soiled(-1e-3 * q, v.at, view.grid) for q, v in zip(view.u, view.variables, strict=True)]
        return jnp.stack(channels)


BOXES = {
    "cavity": (("no_slip", "no_slip"), {"y_upper": Moving((1.0, 0.0)), "x_lower": Moving((0.0, 0.5), 2.0)}, (0, 1)),
    "through": ((("fixed", "fixed"), ("free_slip", "no_slip")), {"x_lower": Parabola(0.8), "x_upper": Parabola(0.8)}, (0, 1)),
    "outflow": ((("fixed", "outflow"), ("no_slip", "free_slip")), {"x_lower": Parabola(0.8)}, (1,)),
    "corner": ((("fixed", "outflow"), ("no_slip", "outflow")), {"x_lower": Moving((0.7, 0.2))}, ()),
    "slot": ((("fixed", "outflow"), "periodic"), {"x_lower": Moving((0.7, 0.2))}, (1,)),
}


def _box(name, scalars=None, **options):
    boundaries, velocity, axes = BOXES[name]
    solver = flow(Grid((12, 10), (1.2, 1.0), boundaries), 2e-3, None, velocity, scalars, **options)
    return solver, noise(solver), axes


@pytest.mark.parametrize(("name", "closure", "convection"), [
    ("cavity", Mixing(), "van_leer"),
    ("through", Leith(0.5), "central"),
    ("outflow", Mixing(), "van_leer"),
    ("corner", Smagorinsky(0.3), "van_leer"),
], ids=lambda x: x if isinstance(x, str) else type(x).__name__)  # fmt: skip
def test_a_step_with_a_closure_commutes_with_turning_and_mirroring(name, closure, convection):
    scalars = {"dye": 1e-3} if isinstance(closure, Mixing) else None
    solver, u, axes = _box(name, scalars, convection=convection)
    step = lambda s, q, closures=(closure,): evolve(s, ForwardEuler(), q, 0.02, 2, closures)  # noqa: E731
    after = step(solver, u)
    assert relative(step(solver, u, ()), after) > 1e-6  # the closure is at work
    assert relative(after, u) > 1e-2
    assert relative(step(turned(solver), turned_state(u)), turned_state(after)) <= 1e-12
    for axis in axes:
        there = mirrored_state(solver, u, axis)
        assert relative(mirrored_state(mirrored(solver, axis), there, axis), u) <= 1e-13
        assert relative(step(mirrored(solver, axis), there), mirrored_state(solver, after, axis)) <= 1e-12


@pytest.mark.parametrize("name", ["cavity", "through", "outflow", "corner"])
def test_dead_values_change_nothing(name):
    solver, u, _ = _box(name, {"dye": 1e-3})
    outflow = any("outflow" in sides for sides in solver.grid.boundaries)

    def step(dirt):
        dirt = jnp.asarray(dirt)
        # after the step a face at outflow is alive
        closures = (Mixing(dirt), Soiled(dirt), *(() if outflow else (SoiledStep(dirt),)))
        return evolve(solver, ForwardEuler(), u, 0.02, 2, closures)

    np.testing.assert_array_equal(step(0.0), step(1e3))
    dirty = np.array(u)
    for axis, sides in enumerate(solver.grid.boundaries):
        if sides[1] not in ("periodic", "outflow"):
            dirty[axis][(slice(None),) * axis + (-1,)] += 1e3
    for what in (solver.project, solver.centred, lambda q: jnp.stack([solver.gradient(q)[a, a] for a in range(2)])):
        np.testing.assert_array_equal(what(jnp.asarray(dirty)), what(jnp.asarray(u)))


def test_the_dead_value_test_can_fail():
    """In a periodic box no face is dead."""
    solver = flow(Grid((12, 10), (1.2, 1.0)), 2e-3)
    u = noise(solver)

    class Everywhere(Mixing):
        def _soiled(self, array, at, grid):
            return array.at[-1].add(self.dirt)

    a, b = (evolve(solver, ForwardEuler(), u, 0.02, 1, (Everywhere(jnp.asarray(dirt)),)) for dirt in (0.0, 1e3))
    assert relative(a, b) > 1e-3


def test_what_closures_see_next_to_walls():
    solver = flow(Grid((6, 5), (3.0, 1.0), (("fixed", "fixed"), "no_slip")), 1e-3, None, {
        "x_lower": Moving((0.5, 0.0)), "x_upper": Moving((0.5, 0.0))}).prepare(np.float64)  # fmt: skip
    q = jnp.asarray(np.random.default_rng(0).standard_normal((6, 5)))
    centre, face = (0.5, 0.5), (1.0, 0.5)
    found = np.asarray(solver.move(q, face, centre))
    np.testing.assert_allclose(found[0], q[0], rtol=1e-15)
    np.testing.assert_allclose(found[-1], q[-2], rtol=1e-15)
    np.testing.assert_allclose(found[2], (q[1] + q[2]) / 2, rtol=1e-15)
    np.testing.assert_allclose(solver.move(q, centre, face)[-1], q[-1], rtol=1e-15)
    # differences of a linear profile are exact up to the walls
    x = jnp.asarray(solver.grid.mesh(face)[0])
    for at, line in ((face, x), (centre, x - 0.25)):
        slope, place = solver.derivative(line, at, 0)
        assert place == (centre if at == face else face)
        np.testing.assert_allclose(slope, np.ones((6, 5)), rtol=1e-13)
    u = jnp.asarray(np.random.default_rng(1).standard_normal((2, 6, 5)))
    np.testing.assert_allclose(solver.centred(u)[0, 0], (0.5 + u[0, 0]) / 2, rtol=1e-15)
    np.testing.assert_allclose(solver.centred(u)[0, -1], (u[0, -2] + 0.5) / 2, rtol=1e-15)
    np.testing.assert_allclose(solver.gradient(u)[0, 0, 0], (u[0, 0] - 0.5) / 0.5, rtol=1e-13)
    np.testing.assert_allclose(solver.gradient(u)[1, 1, :, -1], (0 - u[1, :, -2]) / 0.2, rtol=1e-13)


# --- divergence and sums ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [np.float64, np.float32], ids=["float64", "float32"])
@pytest.mark.parametrize("name", ["cavity", "corner"])
def test_the_divergence_vanishes_after_every_step(name, dtype):
    solver, u, _ = _box(name, {"dye": 1e-3})
    frames, _ = steps(Model(solver, SSPRK2(), 0.02, (Mixing(),), "stage"), u.astype(dtype), 30)
    frames = np.asarray(frames)
    assert frames.dtype == dtype
    worst = max(divergence(solver, q) for q in frames)
    print(name, dtype.__name__, worst)
    assert worst <= (1e-11 if dtype == np.float64 else 1e-4)


@pytest.mark.parametrize(("boundaries", "names", "dtype"), [
    (("periodic", "periodic"), ("u", "v", "dye"), np.float64),
    (("periodic", "free_slip"), ("u", "dye"), np.float64),
    (("periodic", "free_slip"), ("u", "dye"), np.float32),
    (("periodic", ("free_slip", "no_slip")), ("dye",), np.float64),
    (("free_slip", "no_slip"), ("dye",), np.float32),
    (("periodic", ("no_slip", "outflow")), (), np.float64),
])  # fmt: skip
def test_what_is_conserved_is_conserved(boundaries, names, dtype):
    solver = flow(Grid((12, 10), (1.2, 1.0), boundaries), 2e-3, LinearDrag(0.2), None, {"dye": 1e-3})
    assert solver.conserved == names
    u = projected(solver, (noise(solver) + np.array([0.5, 0.2, 1.0])[:, None, None]).astype(dtype))
    frames, (high, low) = steps(Model(solver, ForwardEuler(), 0.01, (Mixing(),)), u, 20)
    sums = np.asarray(frames, np.float64).sum(axis=(2, 3)) - 120 * np.concatenate(
        [np.zeros((1, 3)), np.asarray(high, np.float64) + np.asarray(low, np.float64)]
    )
    drift = np.abs(sums - sums[0]).max(axis=0) / np.abs(u).sum(axis=(1, 2))
    print(boundaries, drift)
    kept = np.array([name in names for name in ("u", "v", "dye")])
    limit = (1e-13 if dtype == np.float64 else 5e-8) * np.sqrt(20)
    assert (drift[kept] <= limit).all()
    # negative control: what is not listed is not kept; normal to walls there is no momentum to begin with
    assert drift[2] > 1e-4 or "dye" in names
    if not all(solver.grid.periodic) and "u" not in names and solver.grid.periodic[0]:
        assert drift[0] > 1e-4


@pytest.mark.parametrize("std", [0.1, 100.0])
def test_a_learned_flux_between_walls_keeps_the_divergence_zero(std):
    solver = flow(Grid((12, 10), (1.2, 1.0), ("no_slip", "no_slip")), 2e-3, None, {"y_upper": Moving((1.0, 0.0))})
    u = noise(solver)
    frames, _ = steps(Model(solver, ForwardEuler(), 0.01, (learned(1, std, dtype=np.float64),)), u, 10)
    finite = [np.asarray(q) for q in frames if np.isfinite(np.asarray(q)).all()]
    assert len(finite) > 1
    assert max(divergence(solver, q) for q in finite) <= 1e-11
    if std < 1:
        assert relative(finite[-1], evolve(solver, ForwardEuler(), u, 0.01, 10)) > 1e-5


def test_a_uniform_scalar_stays_uniform():
    for name in ("through", "corner"):
        solver, u, _ = _box(name, {"dye": 1e-3})
        u = np.stack([u[0], u[1], np.full_like(u[0], 0.7)])
        after = evolve(solver, ForwardEuler(), u, 0.02, 10)
        np.testing.assert_allclose(after[2], 0.7, rtol=1e-12)
        assert relative(after[:2], u[:2]) > 1e-2


def test_central_convection_between_resting_walls_conserves_energy_in_space():
    for boundaries in (("no_slip", "no_slip"), ("free_slip", "periodic"), (("no_slip", "free_slip"), "no_slip")):
        found = {}
        for convection in ("central", "van_leer"):
            solver = flow(Grid((9, 12), (1.0, 1.5), boundaries), 0.0, convection=convection).prepare(np.float64)
            z = solver.encode(jnp.asarray(np.random.default_rng(3).standard_normal((2, 9, 12))))
            rate = solver.constrain(solver.explicit(z, jnp.zeros(()), lambda q, t: None))
            a, b = np.asarray(z["u"]), np.asarray(rate["u"])
            found[convection] = np.vdot(a, b) / (np.linalg.norm(a) * np.linalg.norm(b))
        assert abs(found["central"]) <= 1e-14
        assert found["van_leer"] < -1e-2  # negative control


# --- the projection --------------------------------------------------------------------------------------------------------------


def _laplacian(phi, grid):
    """Σ_a δ_a² φ, cell by cell, with the values beyond the sides written out."""
    total = np.zeros_like(phi)
    for axis, (h, sides) in enumerate(zip(grid.spacing, grid.boundaries, strict=True)):
        q = np.moveaxis(phi, axis, 0)
        if sides[0] == "periodic":
            ends = q[-1:], q[:1]
        else:
            ends = q[:1], -q[-1:] if sides[1] == "outflow" else q[-1:]
        wide = np.concatenate([ends[0], q, ends[1]])
        total += np.moveaxis((wide[2:] - 2 * q + wide[:-2]) / h**2, 0, axis)
    return total


AXES = {"p": "periodic", "w": "no_slip", "o": ("free_slip", "outflow")}


@pytest.mark.parametrize(("shape", "kinds"), [
    ((8, 7), "pp"), ((8, 7), "pw"), ((8, 6), "wp"), ((7, 6), "ww"), ((8, 6), "wo"), ((7, 5), "op"), ((6, 5), "oo"),
    ((6, 5, 4), "wpo"), ((4, 6, 5), "pwp"), ((4, 5, 6), "www"), ((5, 4, 6), "pop"),
])  # fmt: skip
def test_the_poisson_equation_is_solved_exactly(shape, kinds):
    grid = Grid(shape, (1.0, 1.7, 0.8)[: len(shape)], [AXES[kind] for kind in kinds])
    phi = np.random.default_rng(1).standard_normal(shape)
    if "o" not in kinds:
        phi -= phi.mean()
    solve = eqx.filter_jit(lambda poisson, r: poisson(r))
    for dtype, limit in ((np.float64, 1e-12), (np.float32, 1e-5)):
        found = solve(Poisson(grid, dtype), jnp.asarray(_laplacian(phi, grid), dtype))
        assert found.dtype == dtype
        assert relative(found, phi) <= limit
    if "o" not in kinds:
        with_constant = solve(Poisson(grid, np.float64), jnp.asarray(_laplacian(phi, grid) + 3.0))
        assert relative(with_constant, phi) <= 1e-11


@pytest.mark.parametrize("name", BOXES)
def test_projection_between_walls_is_orthogonal_and_idempotent(name):
    boundaries, _, _ = BOXES[name]
    still = [tuple("no_slip" if s == "fixed" else s for s in ((b, b) if isinstance(b, str) else b)) for b in boundaries]
    solver = flow(Grid((12, 9), (1.2, 1.0), still), 1e-3).prepare(np.float64)
    u = np.random.default_rng(0).standard_normal((2, 12, 9))
    once = projected(solver, u)
    assert divergence(solver, once) <= 1e-13
    assert relative(projected(solver, once), once) <= 1e-13
    weight = np.ones_like(u)
    for axis, sides in enumerate(solver.grid.boundaries):
        last = (axis, *(slice(None),) * axis, -1)
        weight[last] = 0.5 if sides[1] == "outflow" else 1.0 if sides[1] == "periodic" else 0.0
    cosine = np.sum(weight * once * (u - once)) / np.sqrt(np.sum(weight * once**2) * np.sum(weight * (u - once) ** 2))
    assert abs(cosine) <= 1e-13


# --- restriction, time step, refusals --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["cavity", "through", "corner"])
def test_restriction_between_walls_keeps_the_divergence_zero(name):
    boundaries, velocity, _ = BOXES[name]
    coarse = flow(Grid((6, 4), (1.2, 1.0), boundaries), 1e-3, None, velocity, {"dye": 1e-3}).prepare(np.float64)
    fine = flow(Grid((12, 12), (1.2, 1.0), boundaries), 1e-3, None, velocity, {"dye": 1e-3})
    u = noise(fine)
    out = np.asarray(coarse.restrict(jnp.asarray(u), fine.grid, fine.variables))
    assert divergence(coarse, out) <= 1e-13
    assert relative(projected(coarse, out), out) <= 1e-13  # the sides' own velocities, too
    np.testing.assert_allclose(out[2].sum() * 6, u[2].sum(), rtol=1e-12)
    np.testing.assert_allclose(out[0, 1, 0], u[0, 3, :3].mean(), rtol=1e-13)
    with pytest.raises(ValueError, match=r"restricted to a staggered grid whose shape divides it, found \(6, 4\)"):
        coarse.restrict(jnp.asarray(u[..., :11]), Grid((12, 11), (1.2, 1.0), boundaries), fine.variables)
    with pytest.raises(ValueError, match="must have the same boundaries"):
        coarse.restrict(jnp.asarray(u), Grid((12, 12), (1.2, 1.0), ("free_slip", "free_slip")), fine.variables)


def test_stable_dt_counts_walls_and_scalars():
    grid = Grid((8, 8), (1.0, 1.0), ("no_slip", "no_slip"))
    rest = jnp.zeros((3, 8, 8))
    lid = flow(grid, 0.0, None, {"y_upper": Moving((2.0, 0.0))}, {"dye": 0.0})
    assert float(lid.stable_dt(rest)) == pytest.approx(1 / 16)
    thin = flow(Grid((8, 8), (1.0, 1.0), ("periodic", "no_slip")), 0.0, None, None, {"dye": 0.5})
    assert float(thin.stable_dt(rest)) == pytest.approx(1 / (2 * 0.5 * (1 + 2 / np.sqrt(3)) * 64))
    # the limit of diffusion next to walls, where |λ| Δt = 2 at Courant number 1
    for factor, still in ((0.99, True), (1.06, False)):
        viscous = flow(Grid((4, 16), (1e3, 1.0), ("periodic", "no_slip")), 1.0)
        u = np.zeros((2, 4, 16))
        u[0] = np.random.default_rng(0).standard_normal(16)
        after = evolve(viscous, ForwardEuler(), u, factor / (2 * 2 / np.sqrt(3) * 16**2), 400)
        assert (np.abs(after).max() < np.abs(u).max()) == still
    assert np.isfinite(float(flow(grid, 0.0).stable_dt(rest[:2])))
    # at half of it the lid's flow is calm
    u = evolve(lid, SSPRK2(), np.zeros((3, 8, 8)), 0.5 / 16, 200)
    assert np.abs(u).max() < 2


class Gust(AbstractBoundaryVelocity):
    def __call__(self, component, position, t):
        return 1.0 + t


INFLOW = {"x_lower": Moving((1.0, 0.0))}
REFUSED = {
    "outflow below": ((("outflow", "fixed"), "periodic"), {"x_upper": Moving((-1.0, 0.0))}, None,
                      "outflow through x_lower is not offered .* leaves through x_upper"),
    "no way out": ((("fixed", "no_slip"), "periodic"), INFLOW, None, "the fixed sides take in 1 more than they let out"),
    "unbalanced": ((("fixed", "fixed"), "periodic"), {**INFLOW, "x_upper": Moving((0.5, 0.0))}, None, "take in 0.5 more"),
    "through a wall": (("periodic", "no_slip"), {"y_upper": Moving((1.0, 0.1))}, None, "y_upper: a no_slip side moves along"),
    "gust": ((("fixed", "outflow"), "periodic"), {"x_lower": Gust()}, None, "x_lower: the velocity normal .* not depend on time"),
    "not given": ((("fixed", "outflow"), "periodic"), {}, None, "x_lower: the side is fixed, so its velocity must be given"),
    "not taken": (("periodic", "free_slip"), {"y_upper": Moving()}, None, "y_upper: a side that is free_slip takes no velocity"),
    "short": (("periodic", "no_slip"), {"y_upper": Moving((1.0,))}, None, "y_upper: has no component 1"),
    "modes": (("periodic", "no_slip"), {}, Isotropic(), "needs periodic boundaries"),
}  # fmt: skip


@pytest.mark.parametrize(("boundaries", "velocity", "forcing", "words"), REFUSED.values(), ids=REFUSED)
def test_what_cannot_be_is_refused_by_name(boundaries, velocity, forcing, words):
    with pytest.raises(ValueError, match=words):
        flow(Grid((8, 8), (1.0, 1.0), boundaries), 1e-3, forcing, velocity)


def test_a_small_imbalance_is_spread():
    velocity = {"x_lower": Moving((1.0, 0.0)), "x_upper": Moving((1.01, 0.0))}
    solver = flow(Grid((8, 8), (1.0, 1.0), (("fixed", "fixed"), "no_slip")), 1e-3, None, velocity)
    u = projected(solver, np.zeros((2, 8, 8)))
    np.testing.assert_allclose(u[0, -1], 1.005, rtol=1e-12)
    assert divergence(solver, u) <= 1e-13
    flow(Grid((8, 8), (1.0, 1.0), ("periodic", "no_slip")), 1e-3, Kolmogorov(2, 1.0, 0.1))  # a force of the box fits between walls


def test_the_order_in_time_with_a_wall_in_motion():
    """Stages see the wall at their own time."""
    solver = flow(Grid((4, 12), (1.0, 1.0), CHANNEL), 0.05, velocity={"y_upper": Moving((1.0, 0.0), 5.0)})
    u = np.zeros((2, 4, 12))
    reference = evolve(solver, SSPRK3(), u, 0.5 / 640, 640)
    errors = {
        type(s).__name__: [relative(evolve(solver, s, u, 0.5 / n, n), reference) for n in (40, 80)] for s in (SSPRK2(), SSPRK3())
    }
    print(errors)
    assert errors["SSPRK2"][0] / errors["SSPRK2"][1] > 3.4
    assert errors["SSPRK3"][1] < errors["SSPRK2"][1] / 5
