"""How far any closure on a coarse grid could follow the fine run.

What a coarse grid does not hold is unknown to every closure on it. So pairs of fine runs are started from states that are the same
in all modes of the coarse grid and differ in the others: below the cut-off each has the scales of another start of the same flow.
The time at which such pairs part, on the modes that are compared, is a *predictability limit*: the fine equations themselves, asked
from a coarse start, know no better on average. (It is no bound for one start, nor for a closure with memory.)
"""

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from hybridsim.config import Experiment
    from hybridsim.contract import AbstractSolver


def with_other_small_scales(u: Any, solver: "AbstractSolver", shape: tuple[int, ...]) -> Any:
    """P u_i + (1 − P) u_{i+1}: each start with what the next one has in modes that a grid of `shape` does not hold.

    `u`: `(sample, c, *fine)` on the grid of `solver`, which projects the result; P is the spectral cut at the coarse grid's Nyquist
    wavenumber. The last start takes from the first.
    """
    import jax
    import jax.numpy as jnp

    from hybridsim.grid import resample

    at = [v.at for v in solver.variables]
    low = [resample(resample(u[:, c], shape, at[c], at[c]), u.shape[2:], at[c], at[c]) for c in range(u.shape[1])]
    large = jnp.stack(low, axis=1)
    return jax.vmap(solver.project)(large + jnp.roll(u - large, -1, axis=0))


def limits(
    experiment: "Experiment",
    targets: Mapping[str, "AbstractSolver"],
    shape: list[int],
    frames: int,
    progress: Callable[[float], None] = lambda _: None,
) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """(times, group → `(sample, frame)`): the correlation of the pairs under each target's filter, of a gas the error e.

    **Arguments:**

    - `targets`: name of a coarse grid → its solver, whose modes the pairs share.
    - `shape`: grid of the fine runs, single precision; `frames`: how many of the experiment's frame intervals they last.
    """
    import equinox as eqx
    import jax
    import jax.numpy as jnp

    from hybridsim import diagnostics, gas
    from hybridsim.experiment import fine_starts
    from hybridsim.reference import COURANT, fine_run

    spec = experiment.spec.reference
    reference, solver = experiment.reference_solver(), experiment.solver_for(spec.solver, shape)
    starts = fine_starts(experiment, lambda x: progress(0.2 * x))
    dtype = jnp.float32
    whole = jax.vmap(lambda q: solver.prepare(q.dtype).restrict(q, reference.grid, reference.variables))(starts).astype(dtype)
    interval = experiment.spec.time.end / experiment.spec.time.frames
    names = list(targets)
    filters = {n: eqx.filter_jit(jax.vmap(lambda q, s=targets[n]: s.restrict(q, solver.grid, solver.variables))) for n in names}

    def run(u: Any, seen: list[str], first: float) -> dict[str, np.ndarray]:
        series: dict[str, list[np.ndarray]] = {n: [] for n in seen}

        def watch(_: int, q: Any) -> None:
            for n in seen:
                series[n].append(np.asarray(filters[n](q)))

        part = 0.8 / (len(names) + 1)
        fine_run(
            solver,
            experiment.stepper("reference", solver),
            u,
            interval,
            frames,
            watch,
            courant=COURANT if spec.cfl is None else spec.cfl,
            progress=lambda x: progress(first + part * x),
        )
        return {n: np.stack(shown, axis=1) for n, shown in series.items()}

    truth = run(whole, names, 0.2)
    found = {}
    for i, name in enumerate(names):
        target = targets[name]
        other = with_other_small_scales(whole, solver.prepare(dtype), target.grid.shape)
        member = run(other, [name], 0.2 + 0.8 * (i + 1) / (len(names) + 1))[name]
        medium = gas.gas_of(target)
        if medium is None:
            found[name] = diagnostics.correlation(member, truth[name], target.grid, target.variables, experiment.modes, target)
        else:
            found[name] = gas.error_of(gas.compare(member, truth[name], target.grid, medium.gamma, experiment.modes)[0])
    return interval * np.arange(frames + 1), found
