"""Turned and mirrored flows: they are solutions as well, and what draws them is a group."""

import numpy as np
import pytest
from compressible_flows import gas
from compressible_flows import run as run_gas
from flows import default_stepper, evolve, kolmogorov, random_flow, relative, solver_of
from test_compressible import rough_flow

from hybridsim.grid import Grid
from hybridsim.solvers.kuramoto_sivashinsky import KuramotoSivashinsky, SpectralKS
from hybridsim.solvers.steppers import ETDRK4, SSPRK3
from hybridsim.symmetry import applied, symmetries, turned

pytestmark = pytest.mark.usefixtures("x64")

BOX = (2.0, 2.0, 2.0)


def problem(case):
    """A solver, a flow, and the function that takes it a few steps further."""
    kind, dims = case
    if kind == "kuramoto_sivashinsky":
        solver = SpectralKS(Grid((24,), (30.0,)), KuramotoSivashinsky())
        u = np.random.default_rng(3).standard_normal((1, 24))
        return solver, u, lambda v: evolve(solver, ETDRK4(), v, 0.05, 5)
    grid = Grid((12,) * dims, BOX[:dims])
    if kind == "gas":
        solver = gas(grid, reconstruction="weno5z", scalars={"dye": 1e-3}, viscosity=1e-3)
        return solver, rough_flow(grid, 3, scalars=1), lambda v: run_gas(solver, SSPRK3(), v, 0.004, 3)[0]
    solver = solver_of(kind, grid, scalars={"dye": 1e-3})
    return solver, random_flow(solver, 3, modes=3), lambda v: evolve(solver, default_stepper(kind), v, 0.02, 3)


@pytest.mark.parametrize(
    "case", [("kuramoto_sivashinsky", 1), ("spectral", 2), ("finite_volume", 2), ("finite_volume", 3), ("gas", 3)]
)
def test_a_turned_flow_moves_as_the_turned_solution_does(case):
    solver, u, step = problem(case)
    later = np.asarray(step(u))
    group = symmetries(solver)
    assert len(group) == {1: 2, 2: 8, 3: 48}[case[1]]
    assert (applied(solver, group[0], u) == u).all()
    images = {applied(solver, symmetry, u).tobytes() for symmetry in group}
    assert len(images) == len(group)
    chosen = group if len(group) < 10 else [group[n] for n in np.random.default_rng(0).choice(len(group), 8, replace=False)]
    for symmetry in chosen:
        assert relative(np.asarray(step(applied(solver, symmetry, u))), applied(solver, symmetry, later)) < 1e-11, symmetry
        twice = applied(solver, symmetry, applied(solver, symmetry, u))
        assert twice.tobytes() in images  # the group is closed


def test_the_box_decides_what_may_be_turned():
    def count(shape, lengths, boundaries=()):
        return len(symmetries(gas(Grid(shape, lengths, boundaries))))

    assert count((8, 8, 8), (1, 1, 2)) == 16
    assert count((8, 8, 6), (1, 1, 1)) == 16
    assert count((8, 6), (1, 1)) == 4
    assert count((8, 12), (1, 1.5), ("periodic", "outflow")) == 2
    forced = solver_of("spectral", Grid((12, 12), (2.0, 2.0)), forcing=kolmogorov())
    with pytest.raises(ValueError, match="forced flow"):
        symmetries(forced)


def test_windows_are_turned_one_by_one_and_whole():
    solver = gas(Grid((6, 6), (1.0, 1.0)))
    windows = np.random.default_rng(0).standard_normal((40, 3, 4, 6, 6)).astype(np.float32)
    group = symmetries(solver)
    found = turned(solver, group, windows, np.random.default_rng(1))
    assert found.dtype == windows.dtype
    which = []
    for before, after in zip(windows, found, strict=True):
        matches = [n for n, symmetry in enumerate(group) if (applied(solver, symmetry, before) == after).all()]
        assert len(matches) == 1  # all frames of a window alike
        which += matches
    assert set(which) == set(range(len(group)))
    again = turned(solver, group, windows, np.random.default_rng(1))
    assert (again == found).all()
