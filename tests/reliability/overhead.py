"""`python -m tests.reliability.overhead [2D|3D ...]`: the share of a run that saving its state takes, at the default interval.

Runs of 256² and 64³ cells through the command's own loop, each for half a minute or more. What stands between hybridsim and the
disk is timed: frames, states, their digests, fsync and the removal of old ones. To be below 3 %.
"""

import sys
import tempfile
import time
from pathlib import Path
from typing import Any

CASES: dict[str, dict[str, Any]] = {
    "2D": {
        "domain": {"lengths": [6.283185307179586] * 2},
        "shape": [256, 256],
        "run": {"solver": "spectral", "dt": 0.002},
        "time": {"end": 16.0, "frames": 80},
    },
    "3D": {
        "domain": {"lengths": [6.283185307179586] * 3},
        "shape": [64, 64, 64],
        "run": {"solver": "spectral", "dt": 0.004},
        "time": {"end": 2.4, "frames": 30},
    },
}
"""Steps of the usual kind, and frames about a second apart, as a movie needs them."""


def experiment_of(case: dict[str, Any], folder: Path) -> Any:
    from hybridsim.config import experiment_from

    run = {**case["run"], "shape": case["shape"], "precision": "float32"}
    data = {
        "equation": {"use": "navier_stokes", "viscosity": 2e-3},
        "domain": case["domain"],
        "initial": {"use": "random_velocity", "peak_wavenumber": 4.0, "max_speed": 2.0, "warm_up": 0.0},
        "samples": {"count": 1, "seed": 1},
        "time": case["time"],
        "reference": {"solver": "spectral", "shape": case["shape"]},
        "runs": {"one": run},
    }
    return experiment_from(data, folder / "case.yaml")


def measure(name: str) -> tuple[float, float, int, float]:
    """(seconds of the loop, seconds of them that saving took, saves, largest save) of one case."""
    import jax
    import numpy as np

    from hybridsim import experiment, storage
    from hybridsim.journal import SAVE_EVERY
    from hybridsim.reference import initial_state

    spent: list[float] = []
    depth = [0]

    def timed(function: Any) -> Any:
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            depth[0] += 1
            begin = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                depth[0] -= 1
                if not depth[0]:
                    spent.append(time.perf_counter() - begin)

        return wrapped

    storage.save_tree, storage.Checkpoints.save = timed(storage.save_tree), timed(storage.Checkpoints.save)
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        made = experiment_of(CASES[name], folder)
        solver = made.solver("one")
        start = np.asarray(initial_state(made.initial(), jax.random.key(1), solver, np.dtype(np.float64)))[None]
        model = experiment.model_from(made, "one", start)
        nothing = lambda *_: None  # noqa: E731
        arguments: list[Any] = [made, "one", model, start, folder, False, nothing, nothing, nothing]
        begin = time.perf_counter()
        result = experiment._run_one(*arguments, SAVE_EVERY)
        whole = time.perf_counter() - begin - result.compile_seconds
        assert result.outcome == "finished", result.outcome
    return whole, sum(spent), len(spent), max(spent)


def main(names: list[str]) -> int:
    """Prints a line per case; 1 if saving took 3 % or more of any."""
    import jax

    jax.config.update("jax_enable_x64", True)
    worst = 0.0
    for name in names or list(CASES):
        whole, saving, count, longest = measure(name)
        cells = " × ".join(map(str, CASES[name]["shape"]))
        share = saving / whole
        worst = max(worst, share)
        print(
            f"{cells}: {whole:.1f} s, of which saving {saving:.3f} s in {count} writes ({100 * share:.2f} %), the longest "
            f"{1e3 * longest:.0f} ms",
            flush=True,
        )
    return int(worst >= 0.03)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
