"""Adaptive time steps: order, frames, the Courant limit, the carry and exact continuation, blow-ups, derivatives, whole runs."""

import json
import math

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flows import BOTH, default_stepper, kolmogorov, random_flow, relative, solver_of, square
from test_model import _double_values

from hybridsim import blowups, storage
from hybridsim import experiment as running
from hybridsim.config import experiment_from
from hybridsim.contract import Flux, PostStep, Source
from hybridsim.model import MOST_STEPS, Model, State, advance, rollout
from hybridsim.signals import STOP, Interrupted
from hybridsim.solvers.steppers import ETDRK4, SSPRK3, CrankNicolsonRK4

CASES = [("spectral", ETDRK4), ("spectral", SSPRK3), ("finite_volume", SSPRK3)]
IDS = [f"{kind} {stepper.__name__}" for kind, stepper in CASES]


class Watching(Source):
    """s = 0, but it remembers max (Δt / stable Δt), Σ Δt, the number of calls and the last time."""

    def init_memory(self, view):
        zero = jnp.zeros((), view.u.dtype)
        return {"courant": zero, "total": zero, "calls": jnp.zeros((), jnp.int32), "time": zero}

    def __call__(self, view, memory=None, key=None):
        courant = view.dt / view.solver.stable_dt(view.u)
        new = {
            "courant": jnp.maximum(memory["courant"], courant),
            "total": memory["total"] + view.dt,
            "calls": memory["calls"] + 1,
            "time": view.t,
        }
        return jnp.zeros_like(view.u), new


class Remembering(Flux):
    """F = −ν_m ∇u + noise with a running mean m of |∇u|²."""

    stochastic = True

    def init_memory(self, view):
        return jnp.zeros(view.grid.shape, view.u.dtype)

    def __call__(self, view, memory=None, key=None):
        gradient = view.gradient()
        mean = 0.7 * memory + 0.3 * jnp.sum(view.to_centre(gradient) ** 2, axis=(0, 1))
        return -1e-3 * mean[None, None] * gradient + 1e-3 * jax.random.normal(key, gradient.shape, view.u.dtype), mean


class Kick(PostStep):
    """d = random noise after each step."""

    stochastic = True

    def __call__(self, view, memory=None, key=None):
        return 1e-3 * jax.random.normal(key, view.u.shape, view.u.dtype)


class Runaway(Source):
    """s = r |u|_max u: infinite speed in finite time, about 1 / (r |u|)."""

    rate: float = eqx.field(static=True, default=1.0)

    def __call__(self, view, memory=None, key=None):
        return self.rate * jnp.max(jnp.abs(view.u)) * view.u


class Breaking(Source):
    """s = NaN in one cell from `when` on."""

    when: float = eqx.field(static=True, default=0.5)

    def __call__(self, view, memory=None, key=None):
        return jnp.zeros_like(view.u).at[1, 2, 3].set(jnp.where(view.t >= self.when, jnp.nan, 0))


def _model(kind, stepper=None, closures=(), *, dt=0.2, courant: float | None = 0.5, n=12, viscosity=1e-2, forcing=None, **options):
    stepper = default_stepper(kind) if stepper is None else stepper()
    return Model(solver_of(kind, square(n), viscosity, forcing), stepper, dt, closures, courant=courant, **options)


def _start(kind, n=12, dtype=np.float32, seed=1, speed=3.0):
    return jnp.asarray(random_flow(solver_of(kind, square(n)), seed, speed, modes=3, dtype=dtype))


def _taken(out):
    return int(out.final.carry["steps_taken"])


# --- accuracy and the choice of steps --------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(("kind", "stepper"), CASES, ids=IDS)
def test_the_order_is_that_of_the_stepper(kind, stepper):
    """A decaying flow, steps growing with it; the error falls with the number of steps as it does for fixed Δt."""
    # Central convection: the limiter is not smooth, and would hide the order in time.
    options = {} if kind == "spectral" else {"convection": "central"}
    solver = solver_of(kind, square(12), 5e-2, **options)
    u = _start(kind, dtype=np.float64)
    run = lambda courant, dt, every=1: rollout(Model(solver, stepper(), dt, courant=courant), State(u), 4, every=every)  # noqa: E731
    exact = run(None, 0.5 / 256, 256)
    points = []
    for courant in (0.4, 0.2, 0.1):
        out = run(courant, 0.5)
        assert out.t == pytest.approx((0.5, 1.0, 1.5, 2.0), rel=1e-15)
        points.append((_taken(out), relative(out.u[-1], exact.u[-1])))
    (n1, e1), (n2, e2) = points[1:]
    assert e2 < 0.01
    rate = math.log(e1 / e2) / math.log(n2 / n1)
    assert abs(rate - stepper.order) < 0.35, (points, rate)
    # as good as fixed steps, of which there are as many
    fixed = run(None, 2.0 / (4 * -(-n2 // 4)), -(-n2 // 4))
    assert e2 < 2 * relative(fixed.u[-1], exact.u[-1])


@pytest.mark.parametrize(("kind", "stepper"), CASES, ids=IDS)
@pytest.mark.parametrize("precision", [np.float32, np.float64])
def test_steps_are_the_fewest_that_respect_the_limit(kind, stepper, precision, request):
    if precision == np.float64:
        request.getfixturevalue("x64")
    u = _start(kind, dtype=precision)
    model = _model(kind, stepper, (Watching(),), courant=0.3, viscosity=5e-2)
    out = rollout(model, State(u), 5)
    seen = out.final.carry["closures"][0]["memory"]
    assert seen["total"].dtype == precision
    assert float(seen["total"]) == pytest.approx(5 * 0.2, rel=1e-5)
    assert int(seen["calls"]) == _taken(out)
    if model.stepper.needs_linear:
        # Δt is chosen at the start of each interval
        states = [u, *out.u]
        expected = [math.ceil(0.2 / min(0.2, 0.3 * float(model.solver.stable_dt(q)))) for q in states[:-1]]
        assert _taken(out) == sum(expected)
        assert float(out.final.carry["smallest_dt"]) == pytest.approx(0.2 / max(expected), rel=1e-6)
    else:
        assert 0.6 * 0.3 < float(seen["courant"]) <= 0.3 * (1 + 1e-4)
    assert _taken(out) < 5 * math.ceil(0.2 / float(out.final.carry["smallest_dt"]))  # the flow decays, and the steps grow


def test_the_largest_step_is_dt_and_equal_to_fixed_steps():
    """Where the Courant number never decides, the steps are those of a fixed Δt, also where Δt is no binary fraction."""
    u = _start("finite_volume", speed=1e-3)
    for every in (7, 10, 1000):
        adaptive = rollout(_model("finite_volume", dt=0.01), State(u), 2, every=every)
        assert _taken(adaptive) == 2 * every
        assert float(adaptive.final.carry["smallest_dt"]) == pytest.approx(0.01, rel=2e-4)
        if every < 100:
            fixed = rollout(_model("finite_volume", dt=0.01, courant=None), State(u), 2, every=every)
            np.testing.assert_allclose(adaptive.u, fixed.u, rtol=0, atol=2e-6 * float(np.abs(u).max()))
            assert adaptive.t == fixed.t
            assert int(adaptive.final.step) == int(fixed.final.step) == 2 * every
            assert "steps_taken" not in fixed.final.carry


@pytest.mark.parametrize("kind", BOTH)
def test_substeps_and_held_closures_keep_their_rhythm(kind):
    model = _model(kind, None, (Watching(),), evaluate=2, substeps=4, dt=0.05)
    out = rollout(model, State(_start(kind, speed=10.0)), 3)
    seen = out.final.carry["closures"][0]["memory"]
    assert int(seen["calls"]) == 2 * _taken(out)
    assert float(seen["total"]) == pytest.approx(3 * 0.2 / 2, rel=1e-5)
    assert float(out.final.carry["smallest_dt"]) < 0.05


def test_time_does_not_drift():
    """Late in a long run in single precision, the time of the last step is right to the spacing of numbers there."""
    model = _model("finite_volume", None, (Watching(),), dt=0.1)
    out = rollout(model, State(_start("finite_volume"), step=70_000, t=7000.0), 3)
    assert out.t == pytest.approx((7000.1, 7000.2, 7000.3), rel=1e-14)
    seen = out.final.carry["closures"][0]["memory"]
    assert float(seen["time"]) == pytest.approx(7000.3 - 0.1 * 3 / _taken(out), abs=0.02)
    assert float(seen["total"]) == pytest.approx(0.3, rel=1e-5)


# --- the carry -------------------------------------------------------------------------------------------------------------------


def _bits(tree):
    leaves = jax.tree.leaves(tree)
    return [np.asarray(jax.random.key_data(a) if jnp.issubdtype(a.dtype, jax.dtypes.prng_key) else a) for a in leaves]


@pytest.mark.parametrize("kind", BOTH)
def test_stopping_saving_and_going_on_is_bitwise_the_uninterrupted_run(kind, tmp_path):
    model = _model(kind, None, (Remembering(), Kick()), n=8, forcing=kolmogorov())
    u = _start(kind, n=8)
    go = eqx.filter_jit(lambda z, carry, step: advance(model, model.prepare(u.dtype), z, carry, step, 2))
    start = (model.solver.prepare(u.dtype).encode(u), model.init_carry(u, 7), jnp.zeros((), jnp.int32))
    whole = go(*go(*go(*start)))
    half = go(*start)
    storage.save_tree(tmp_path / "half.safetensors", half)
    loaded, _ = storage.load_tree(tmp_path / "half.safetensors", start)
    rest = go(*go(*loaded))
    assert int(whole[2]) == 6
    assert int(whole[1]["steps_taken"]) > 6
    assert all(np.isfinite(a).all() for a in _bits(whole))
    for a, b in zip(_bits(rest), _bits(whole), strict=True):
        np.testing.assert_array_equal(a, b)
    # negative control: the carry decides what comes next
    other = go(*go(half[0], {**half[1], "closures": start[1]["closures"]}, half[2]))
    assert any((a != b).any() for a, b in zip(_bits(other[0]), _bits(whole[0]), strict=True))


def test_a_rollout_goes_on_from_its_final_state():
    model = _model("spectral")
    whole = rollout(model, State(_start("spectral"), t=3.0), 4)
    half = rollout(model, State(_start("spectral"), t=3.0), 2)
    rest = rollout(model, half.final, 2)
    np.testing.assert_allclose(rest.u, whole.u[2:], rtol=0, atol=1e-5 * np.abs(whole.u).max())
    assert rest.t == pytest.approx(whole.t[2:], rel=1e-15)
    assert _taken(rest) == _taken(whole)


@pytest.mark.parametrize("kind", BOTH)
def test_samples_have_steps_of_their_own(kind):
    model = _model(kind)
    u = jnp.stack([_start(kind, seed=s, speed=speed) for s, speed in enumerate((0.5, 3.0, 8.0))])
    together = eqx.filter_jit(jax.vmap(lambda q: rollout(model, State(q), 3)))(u)
    taken = together.final.carry["steps_taken"]
    assert len(set(taken.tolist())) == 3
    for s in range(3):
        alone = rollout(model, State(u[s]), 3)
        assert _taken(alone) == int(taken[s])
        np.testing.assert_allclose(together.u[s], alone.u, rtol=0, atol=2e-5 * np.abs(alone.u).max())


def test_another_step_size_compiles_nothing():
    traced = []

    class Counting(Source):
        def __call__(self, view, memory=None, key=None):
            traced.append(1)
            return jnp.zeros_like(view.u)

    model = _model("finite_volume", None, (Counting(),))
    first = rollout(model, State(_start("finite_volume", speed=1.0)), 2)
    before = len(traced)
    second = rollout(model, State(_start("finite_volume", speed=9.0)), 2)
    assert _taken(second) > _taken(first)
    assert len(traced) == before > 0


# --- blow-ups --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", BOTH)
def test_a_runaway_ends(kind):
    model = _model(kind, None, (Runaway(),), dt=0.1)
    out = rollout(model, State(_start(kind, speed=1.0)), 40)
    finite = np.isfinite(out.u).all(axis=(1, 2, 3))
    assert finite[0]
    assert not finite[-1]
    assert (np.diff(finite.astype(int)) <= 0).all()
    assert np.isnan(out.u[~finite]).all()
    assert _taken(out) < 2 * MOST_STEPS
    assert 0 < float(out.final.carry["smallest_dt"]) < 0.01


@pytest.mark.parametrize("kind", BOTH)
def test_nothing_is_stepped_from_nan(kind):
    out = rollout(_model(kind), State(jnp.full((2, 12, 12), jnp.nan)), 3)
    assert np.isnan(out.u).all()
    assert _taken(out) == 0


@pytest.mark.reliability("R9")
@pytest.mark.parametrize(("kind", "closure"), [(k, c) for k in BOTH for c in (Runaway(1.5), Breaking(0.5))])
def test_a_blow_up_is_located(kind, closure):
    model = _model(kind, None, (closure,), dt=0.125)
    u = jnp.stack([_start(kind, speed=s) for s in (0.0, 1.0)])
    state = running._begin(model, u, jax.random.split(jax.random.key(0), 2))
    frames = 10
    _, (chunk, _) = running._chunk(model, running._prepare(model, u.dtype), state, frames, 1)
    good = np.isfinite(chunk[1]).all(axis=(1, 2, 3))
    assert 0 < good.sum() < frames
    found, before, at = blowups.locate(model, state, 1, frames, 1)
    assert np.isfinite(before).all()
    last = 0.125 * good.sum()
    assert last - 1e-6 <= at <= found.t
    assert last - 1e-6 <= found.t <= last + 0.125 + 1e-6
    assert found.sample == 1
    assert found.step > good.sum()
    assert len(found.cell) == 2
    if isinstance(closure, Breaking):
        # at the end of the step that was under way at t = 0.5
        assert 0.5 < found.t <= 0.5 + 0.125
    if isinstance(closure, Breaking) and kind == "finite_volume":
        assert found.field == "u"


# --- derivatives -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "stepper"), [
    ("spectral", ETDRK4),
    ("finite_volume", SSPRK3),
    pytest.param("spectral", SSPRK3, marks=pytest.mark.slow),
    pytest.param("spectral", CrankNicolsonRK4, marks=pytest.mark.slow),
])  # fmt: skip
def test_forward_differentiation_works_and_reverse_says_why_not(kind, stepper):
    model = _model(kind, stepper, dt=0.1)
    model = eqx.tree_at(lambda m: m.solver.equation.viscosity, model, jnp.asarray(1e-2))
    u = _start(kind)

    @jax.jit
    def last(u, viscosity):
        changed = eqx.tree_at(lambda m: m.solver.equation.viscosity, model, viscosity)
        return rollout(changed, State(u), 2).u[-1]

    viscosity, direction = jnp.asarray(1e-2), jnp.asarray(1e-1)
    tangent = jax.jvp(last, (u, viscosity), (0.05 * u, direction))[1]
    h = 1e-2
    difference = (last(u * (1 + 0.05 * h), viscosity + h * direction) - last(u * (1 - 0.05 * h), viscosity - h * direction)) / (
        2 * h
    )
    assert np.abs(tangent - difference).max() < 5e-3 * np.abs(tangent).max()
    for argument in (0, 1):
        with pytest.raises(RuntimeError, match=r"courant: .* cannot be differentiated in reverse.*fixed dt"):
            jax.grad(lambda u, nu: jnp.sum(last(u, nu) ** 2), argument)(u, viscosity)


@pytest.mark.usefixtures("x64")
def test_no_double_precision_in_single_precision_steps():
    model = _model("finite_volume", None, (Remembering(), Kick()))
    u = _start("finite_volume")
    prepared = model.prepare(u.dtype)
    state = (prepared.solver.encode(u), model.init_carry(u), jnp.zeros((), jnp.int32))
    assert _double_values(jax.make_jaxpr(lambda z, carry, step: advance(model, prepared, z, carry, step, 2))(*state).jaxpr) == []


# --- refusals --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("courant", [0, -0.5, float("nan"), float("inf")])
def test_impossible_courant_numbers_are_refused(courant):
    with pytest.raises(ValueError, match="courant: the Courant number must be positive and finite"):
        _model("spectral", courant=courant)


# --- whole runs ------------------------------------------------------------------------------------------------------------------

SMALL = {
    "equation": {"use": "navier_stokes", "viscosity": 1e-2, "forcing": "kolmogorov"},
    "domain": {"lengths": [2 * math.pi, 2 * math.pi]},
    "initial": {"use": "random_velocity", "peak_wavenumber": 3.0, "max_speed": 4.0},
    "samples": {"count": 2, "seed": 7},
    "time": {"end": 1.2, "frames": 12, "statistics_from": 0.5},
    "reference": {"solver": "spectral", "shape": [16, 16]},
    "runs": {
        "explicit": {"solver": "finite_volume", "shape": [12, 12], "cfl": 0.4, "adaptive": True},
        "exponential": {"solver": "spectral", "shape": [12, 12], "dt": 0.05, "adaptive": True, "precision": "float64"},
    },
}


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("label", SMALL["runs"])
def test_adaptive_runs_resume_bit_for_bit(label, tmp_path):
    made = experiment_from(json.loads(json.dumps(SMALL)), tmp_path / "small.yaml")
    starts = np.stack([_start("finite_volume" if label == "explicit" else "spectral", seed=s, speed=8.0) for s in range(2)])
    model = running.model_from(made, label, starts)
    assert model.courant == (0.4 if label == "explicit" else 0.5)
    assert model.dt == pytest.approx(0.1 if label == "explicit" else 0.05)
    ignore = lambda *_: None  # noqa: E731

    def run(name, resume=False, stop_at=None):
        def progress(done, _):
            if done == stop_at:
                STOP.requested = 15

        (tmp_path / name).mkdir(exist_ok=True)
        return running._run_one(made, label, model, starts, tmp_path / name, resume, progress, ignore)

    whole = run("whole")
    assert whole.outcome == "finished"
    assert whole.steps_taken > 12 * round(0.1 / model.dt)
    assert 0 < whole.smallest_dt < model.dt
    try:
        with pytest.raises(Interrupted):
            run("stopped", stop_at=6)
    finally:
        STOP.requested = None
    resumed = run("stopped", resume=True)
    np.testing.assert_array_equal(resumed.u, whole.u)
    np.testing.assert_array_equal(resumed.ledger, whole.ledger)
    assert (resumed.steps_taken, resumed.smallest_dt) == (whole.steps_taken, whole.smallest_dt)


RUNAWAY = """
import jax.numpy as jnp
from hybridsim.contract import Source

class Runaway(Source):
    \"""s = r |u|_max u.\"""

    def __call__(self, view, memory=None, key=None):
        return jnp.max(jnp.abs(view.u)) * view.u
"""


@pytest.mark.reliability("R9")
def test_an_adaptive_run_that_blows_up_says_when(tmp_path):
    (tmp_path / "runaway.py").write_text(RUNAWAY)
    wild = SMALL["runs"]["explicit"] | {"corrections": [{"use": "runaway.py:Runaway"}]}
    made = experiment_from(json.loads(json.dumps(SMALL)) | {"runs": {"wild": wild}}, tmp_path / "small.yaml")
    starts = np.stack([_start("finite_volume", seed=s, speed=speed) for s, speed in enumerate((3.0, 1e-6))])
    (tmp_path / "wild").mkdir()
    ignore = lambda *_: None  # noqa: E731
    result = running._run_one(
        made, "wild", running.model_from(made, "wild", starts), starts, tmp_path / "wild", False, ignore, ignore
    )
    assert result.outcome.startswith("diverged at t = 0.")
    assert "1 of 2 samples" in result.outcome
    (found,) = result.blowups
    good = np.isfinite(result.u[0]).all(axis=(1, 2, 3))
    assert 0.1 * (good.sum() - 1) <= found.t <= 0.1 * good.sum() + 1e-6
    assert np.isfinite(result.u[1]).all()
