"""R13: a million steps take no more memory at their end than after the first chunks, and compile nothing anew."""

import numpy as np
import pytest
import yaml

RUN = {
    "equation": {"use": "kuramoto_sivashinsky"},
    "domain": {"lengths": [22.0]},
    "initial": {"use": "random_waves", "warm_up": 0.0},
    "samples": {"count": 1, "seed": 3},
    "reference": {"solver": "spectral", "shape": [33], "dt": 0.1},
    "runs": {"long": {"solver": "spectral", "shape": [32], "dt": 0.1, "precision": "float64"}},
    "checks": {},
}


@pytest.mark.reliability("R13")
@pytest.mark.parametrize(("frames", "per_frame"), [(200, 100), pytest.param(1_000, 1_000, marks=pytest.mark.slow)])
def test_many_steps(server, tmp_path, frames, per_frame, reliability):
    """`frames` · `per_frame` steps in chunks of ten frames, a checkpoint after each."""
    end = 0.1 * frames * per_frame
    (tmp_path / "case.yaml").write_text(yaml.safe_dump({**RUN, "time": {"end": end, "frames": frames}}))
    done = server.run(["run", "case.yaml", "--out", "out"], tmp_path, cache=tmp_path / "cache")
    assert done.code == 0, done.err
    saved = [s for s in done.saved if "/state/" in s["folder"]]
    assert len(saved) == frames // 10
    memory, warm = np.array([s["resident"] for s in saved], float), len(saved) // 10
    # all frames are in memory before the first chunk but become resident as they are written
    growth = memory[-1] / memory[warm] - 1
    compiled = saved[-1]["compiled"] - saved[0]["compiled"]
    ok = growth < 0.05 and compiled == 0
    reliability("R13", ok, f"{frames * per_frame} steps: memory grew by {100 * growth:.1f} %, {compiled} programs compiled")
    print(f"{frames * per_frame} steps: memory grew by {100 * growth:.2f} %, {compiled} programs compiled after the first chunk")
    assert growth < 0.05
    assert compiled == 0
