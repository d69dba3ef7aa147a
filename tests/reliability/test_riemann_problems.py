"""R10: some hundred random Riemann problems with random closures; ten thousand of each scheme are in test_positivity.py."""

import numpy as np
import pytest
from compressible_flows import gas, tube
from test_positivity import COURANT, GAMMA, SCHEMES, random_closures, random_problems, run_all


@pytest.mark.reliability("R10")
@pytest.mark.usefixtures("x64")
def test_random_closures_lose_no_density_or_pressure(reliability):
    (reconstruction, riemann, stepper), count = SCHEMES[0], 400
    solver = gas(tube(16), GAMMA, reconstruction=reconstruction, riemann=riemann)
    closures = random_closures(solver, count, 3)
    end, rows, low, _ = run_all(solver, stepper, random_problems(count, 3), COURANT, closures)
    within = rows["bound_violations"] == 0
    lost = int((~(low > 0).all(axis=1) & within).sum())
    note = f"{lost} below zero, {count - int(within.sum())} beyond the limiter's bound"
    reliability("R10", not lost, note, cases=int(within.sum()), failed=lost)
    assert np.isfinite(end).all()
    assert within.mean() > 0.99
    assert not lost
    assert rows["limited_faces"].sum() > 0
