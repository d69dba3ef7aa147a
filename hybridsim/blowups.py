"""Where a run stopped being finite, how it looked just before, and what may help.

A run is looked at between chunks only. When a chunk holds something that is not finite, the sample at fault is stepped again from
the last good state, one model step at a time, until the step, the field and the cell are known; the state before that step is kept.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from hybridsim import storage
from hybridsim.model import MOST_STEPS, Model, Prepared, adaptive_steps

if TYPE_CHECKING:
    import xarray as xr

    from hybridsim.grid import Grid

LAST_GOOD = "last_good.safetensors"
FOLDER = "blowups"
"""The folder of a run's results with the last finite state of each run that diverged."""


@dataclass
class Blowup:
    """Where a run first stopped being finite."""

    sample: int
    step: int
    t: float
    field: str
    cell: tuple[int, ...]

    def __str__(self) -> str:
        where = ", ".join(map(str, self.cell))
        return f"diverged at t = {self.t:.4g} (step {self.step}, sample {self.sample}, field {self.field}, cell [{where}])"

    def as_json(self) -> dict[str, Any]:
        """Plain values; `from_json` takes them."""
        return vars(self) | {"cell": list(self.cell)}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> "Blowup":
        """A `Blowup` from what `as_json` gave."""
        return cls(**{**values, "cell": tuple(values["cell"])})


class Found(NamedTuple):
    """A blow-up, the last finite state `(c, *grid)` of its sample, and the time of that state."""

    blowup: Blowup
    before: Float[np.ndarray, "c *grid"]
    time: float


def locate(model: Model, state: Any, sample: int, frames: int, every: int) -> Found:
    """Steps one sample again from the last good chunk boundary, one model step at a time, to where it first is not finite."""
    current = jax.tree.map(lambda a: a[sample], state)
    prepared = eqx.filter_jit(lambda m, d: m.prepare(d))(model, current[1]["start"].dtype)
    compiled = eqx.filter_jit(lambda p, q: p.solver.decode(q))
    decode = lambda z: np.asarray(compiled(prepared, z))  # noqa: E731
    if model.courant is not None:
        return _locate_adaptive(model, prepared, current, sample, frames, every, decode)
    one = eqx.filter_jit(lambda m, p, s: m(*s, p))
    u = before = decode(current[0])
    for _ in range(frames * every):
        before = u
        current = one(model, prepared, current)
        u = decode(current[0])
        if not np.isfinite(u).all():
            break
    count = int(current[2])
    return _found(model, sample, count, count * model.step_time, ~np.isfinite(u), before, (count - 1) * model.step_time)


def _found(model: Model, sample: int, step: int, t: float, bad: np.ndarray, before: np.ndarray, last: float) -> Found:
    """A blow-up at a cell that is `bad`: of all of them the one where the last finite state is largest in that field.

    Where a whole field is lost at once, as in a spectral solver, that is where it was worst.
    """
    channel = int(bad.reshape(len(bad), -1).any(axis=1).argmax())
    size = np.where(bad[channel], np.abs(np.where(np.isfinite(before[channel]), before[channel], 0.0)), -1.0)
    cell = np.unravel_index(int(size.argmax()), size.shape)
    return Found(Blowup(sample, step, t, model.solver.variables[channel].name, tuple(int(i) for i in cell)), before, last)


def _locate_adaptive(
    model: Model, prepared: Prepared, current: Any, sample: int, frames: int, every: int, decode: Callable[[Any], np.ndarray]
) -> Found:
    """The same where the steps of an interval are not known beforehand: bisection of their number in the bad interval.

    A flow that was given up because its steps became too small is bad where it is fastest.
    """
    part = eqx.filter_jit(lambda m, p, s, most: adaptive_steps(m, p, s[0], s[1], s[2], every, most))

    def after(steps: int) -> tuple[Any, Any, Any]:
        return part(model, prepared, current, jnp.asarray(steps, jnp.int32))

    high = 2 * max(MOST_STEPS, 2 * every)
    for _ in range(frames):
        z, carry, _ = after(high)
        if not np.isfinite(decode(z)).all():
            break
        current = (z, carry, current[2] + every)
    low, high = 0, int(carry["steps_taken"]) - int(current[1]["steps_taken"]) + 1
    while high - low > 1:
        middle = (low + high) // 2
        if np.isfinite(decode(after(middle)[0])).all():
            low = middle
        else:
            high = middle
    z, carry, remaining = after(high)
    u = decode(z)
    bad = ~np.isfinite(u)
    last, before, left = after(low)
    if int(carry["steps_taken"]) == int(before["steps_taken"]):
        speed = np.abs(decode(last))
        bad, remaining = speed == speed.max(), left
    t = (int(current[2]) + every) * model.step_time - float(remaining)
    clock = (int(current[2]) + every) * model.step_time - float(left)
    return _found(model, sample, int(carry["steps_taken"]), t, bad, decode(last), clock)


# --- what is kept of it ----------------------------------------------------------------------------------------------------------


def keep(folder: Path, found: Found) -> None:
    """Writes the last finite state of a blow-up; the first one of a run stays."""
    file = folder / LAST_GOOD
    if not file.exists():
        storage.save_tree(file, {"u": found.before}, {"blowup": found.blowup.as_json(), "time": found.time})


def kept(folder: Path) -> Found | None:
    """What `keep` wrote, if anything."""
    file = folder / LAST_GOOD
    if not file.exists():
        return None
    arrays, meta = storage.load_arrays(file)
    return Found(Blowup.from_json(meta["blowup"]), arrays["u"], meta["time"])


def clear(results: Path, labels: Iterable[str]) -> None:
    """Removes the last finite states that an earlier run left of runs of these names."""
    for label in labels:
        storage.remove_file(results / FOLDER / f"{label}.nc")


def advice(model: Model, found: Found, start: Float[np.ndarray, "c *grid"]) -> list[str]:
    """What may help, from what is known of the last finite state and of the start; the likeliest first."""
    said = []
    solver = model.solver.prepare(found.before.dtype)
    first, last = (float(solver.stable_dt(jnp.asarray(u, found.before.dtype))) for u in (start, found.before))
    if model.courant is None and not model.dt <= first:
        said.append(
            f"dt {model.dt:.3g} is {model.dt / first:.2g} times what is stable at the start ({first:.3g}): choose less, or cfl"
        )
    elif model.courant is None and not model.dt <= last:
        said.append(f"dt {model.dt:.3g} was stable at the start ({first:.3g} is), and no longer in the end: choose less, or cfl")
    bad = [type(c).__name__ for c in model.closures if not _finite_arrays(c)]
    if bad:
        said.append(f"the weights of {bad[0]} are not finite: train it anew, or take other weights")
    elif model.closures:
        names = ", ".join(type(c).__name__ for c in model.closures)
        said.append(f"see whether it lasts without {names}")
        if jax.tree.leaves(eqx.filter(model.closures, eqx.is_inexact_array)):
            said.append("longer unrolls in training make a closure more stable")
    share = _share_of_small_scales(found.before, model.solver.grid)
    if share > 0.1:
        said.append(
            f"{100 * share:.0f} % of the fluctuations stood in the smallest half of the scales: refine shape, or add viscosity, "
            "a filter or an eddy viscosity"
        )
    if not said:
        said.append("halve dt first; then refine shape")
    return said


def _finite_arrays(tree: Any) -> bool:
    return all(bool(jnp.isfinite(a).all()) for a in jax.tree.leaves(eqx.filter(tree, eqx.is_inexact_array)))


def _share_of_small_scales(u: np.ndarray, grid: "Grid") -> float:
    """Σ|û_k|² over modes with some |k_a| beyond half of the largest, over that of all fluctuations; the largest of all fields."""
    shares = [0.0]
    for q in np.asarray(u, np.float64):
        power = np.abs(np.fft.fftn(q)) ** 2
        power[(0,) * q.ndim] = 0.0
        high = np.zeros(q.shape, bool)
        for axis, n in enumerate(q.shape):
            high |= (np.abs(np.fft.fftfreq(n)) > 0.25).reshape([-1 if a == axis else 1 for a in range(q.ndim)])
        if power.sum() > 0 and np.isfinite(power).all():
            shares.append(float(power[high].sum() / power.sum()))
    return max(shares)


def dataset(found: Found, model: Model, said: Sequence[str], attrs: Mapping[str, Any]) -> "xr.Dataset":
    """The last finite state as a file of its own, with step, time, field, cell and advice."""
    from hybridsim.diagnostics import field_dataset

    about = {"outcome": str(found.blowup), "advice": "; ".join(said), **found.blowup.as_json()}
    solver = model.solver
    return field_dataset(
        found.before[None, None], np.array([found.time]), solver.grid, solver.variables, {**attrs, **about}
    ).assign_coords(sample=[found.blowup.sample])
