"""Rollouts: nested checkpointing, substeps, held closures, the carry and exact continuation, refusals, precision."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flows import BOTH, EXPLICIT, STEPPERS, Push, default_stepper, kolmogorov, learned, random_flow, solver_of, square

from hybridsim import storage
from hybridsim.contract import Flux, Interpolation, PostStep, Source
from hybridsim.corrections.eddy import Leith, Smagorinsky
from hybridsim.model import Budget, Model, State, advance, blocks_within, nested_scan, rollout
from hybridsim.solvers.steppers import ETDRK4, SSPRK3


class Remembering(Flux):
    """F = −ν_m ∇u + noise, where m is a running mean of |∇u|²: uses memory and random numbers."""

    stochastic = True
    rate: float = eqx.field(static=True, default=0.3)

    def init_memory(self, view):
        return {"mean": jnp.zeros(view.grid.shape, view.u.dtype), "calls": jnp.zeros((), jnp.int32)}

    def __call__(self, view, memory=None, key=None):
        gradient = view.gradient()
        square = jnp.sum(view.to_centre(gradient) ** 2, axis=(0, 1))
        mean = (1 - self.rate) * memory["mean"] + self.rate * square
        noise = 1e-3 * jax.random.normal(key, gradient.shape, view.u.dtype)
        return -1e-3 * mean[None, None] * gradient + noise, {"mean": mean, "calls": memory["calls"] + 1}


class Counting(Source):
    """s = 0, but it remembers when it was called."""

    def init_memory(self, view):
        return (jnp.zeros((), jnp.int32), jnp.zeros((), view.u.dtype))

    def __call__(self, view, memory=None, key=None):
        return jnp.zeros_like(view.u), (memory[0] + 1, view.t)


class Kick(PostStep):
    """d = random noise after each step."""

    stochastic = True

    def __call__(self, view, memory=None, key=None):
        return 1e-3 * jax.random.normal(key, view.u.shape, view.u.dtype)


def _model(kind, closures=(), evaluate=(), substeps=1, dt=0.01, n=12):
    return Model(solver_of(kind, square(n), 1e-3, kolmogorov()), default_stepper(kind), dt, closures, evaluate, substeps)


def _start(kind, n=12, dtype=np.float32, seed=1):
    return jnp.asarray(random_flow(solver_of(kind, square(n)), seed, modes=3, mean=(0.2, 0.1), dtype=dtype))


# --- rollouts --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("length", "levels"),
    [(1, 2), (3, 1), (5, 2), (16, 2), (23, 2), (23, 3), (23, 4), (4, 0), (23, (5,)), (23, (8, 3)), (4, (1, 1)), (7, ())],
)
def test_nested_scan_is_a_scan(levels, length):
    def body(state, _):
        state = 1.1 * jnp.sin(state) + 0.01
        return state, state[0]

    start = jnp.linspace(0.1, 1.0, 4)
    expected = jax.lax.scan(body, start, None, length)
    found = nested_scan(body, start, length, levels)
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6)
    gradient, plain = (jax.grad(lambda s, f=f: jnp.sum(f(s)[1]))(start) for f in (
        lambda s: nested_scan(body, s, length, levels), lambda s: jax.lax.scan(body, s, None, length)))  # fmt: skip
    np.testing.assert_allclose(gradient, plain, rtol=1e-5)


def test_blocks_within_a_budget():
    """Everything where it fits, else blocks near √n, else blocks of blocks; the least where nothing fits."""
    assert blocks_within(64, 1, 10, Budget(640)) == ()
    (b,) = blocks_within(64, 4, 16, Budget(200))
    assert -(-64 // b) * 4 + b * 16 <= 200
    assert 2 <= b <= 8
    deep = blocks_within(1024, 4, 16, Budget(230))
    assert len(deep) == 2
    assert -(-1024 // deep[0]) * 4 + -(-deep[0] // deep[1]) * 4 + deep[1] * 16 <= 230
    assert blocks_within(64, 4, 16, Budget(0)) != ()


@pytest.mark.parametrize("kind", BOTH)
def test_frames_every_and_checkpoint_levels_tell_the_same_story(kind):
    model, u = _model(kind, (Smagorinsky(0.1),)), _start(kind)
    run = eqx.filter_jit(rollout)
    one = run(model, State(u), 12, every=1)
    assert one.u.shape == (12, 2, 12, 12)
    np.testing.assert_allclose(one.t, 0.01 * np.arange(1, 13), rtol=1e-12)
    scale = np.abs(one.u).max()
    assert np.abs(one.u[-1] - u).max() > 1e-3
    for frames, every, levels in ((4, 3, 2), (1, 12, 3)):
        other = run(model, State(u), frames, every=every, checkpoint_levels=levels)
        np.testing.assert_allclose(other.u, one.u[every - 1 :: every], rtol=0, atol=2e-6 * scale)
        assert int(other.final.step) == 12
        assert other.final.t == pytest.approx(0.12)
        np.testing.assert_array_equal(other.final.u, other.u[-1])


@pytest.mark.parametrize("kind", BOTH)
def test_a_rollout_goes_on_from_its_final_state(kind):
    model, u = _model(kind), _start(kind)
    run = eqx.filter_jit(rollout)
    whole = run(model, State(u, t=3.0), 10)
    half = run(model, State(u, t=3.0), 5)
    rest = run(model, half.final, 5)
    np.testing.assert_allclose(rest.u, whole.u[5:], rtol=0, atol=1e-5 * np.abs(u).max())
    assert rest.t[-1] == pytest.approx(whole.t[-1])
    assert int(rest.final.step) == 10
    for a, b in zip(rest.final.carry["ledger"], whole.final.carry["ledger"], strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-6)


def test_impossible_rollouts_are_refused():
    for frames, every in ((0, 1), (1, 0)):
        with pytest.raises(ValueError, match="frames and every must be positive"):
            rollout(_model("spectral"), State(_start("spectral")), frames, every=every)


def test_substeps_are_steps():
    kind = "spectral"
    u = _start(kind)
    run = eqx.filter_jit(rollout)
    single = run(_model(kind, (Smagorinsky(0.1),)), State(u), 8)
    four = run(_model(kind, (Smagorinsky(0.1),), substeps=4), State(u), 2)
    np.testing.assert_allclose(four.u, single.u[3::4], rtol=0, atol=1e-6 * np.abs(u).max())
    np.testing.assert_allclose(four.t, single.t[3::4])
    held = run(_model(kind, (Smagorinsky(0.3),), 4, substeps=4), State(u), 2)
    fresh = run(_model(kind, (Smagorinsky(0.3),), 1, substeps=4), State(u), 2)
    gap = np.abs(held.u - fresh.u).max()
    assert 1e-6 < gap < 1e-2  # held is another, nearby run


@pytest.mark.parametrize(("evaluate", "calls", "last"), [("step", 8, 7), (2, 4, 6)])
def test_held_closures_are_called_once_in_n_steps_at_the_right_time(evaluate, calls, last):
    model = _model("spectral", (Counting(),), evaluate, substeps=4)
    final = eqx.filter_jit(rollout)(model, State(_start("spectral")), 2).final
    count, time = final.carry["closures"][0]["memory"]
    assert int(count) == calls
    assert float(time) == pytest.approx(last * 0.01, rel=1e-5)


def test_different_rhythms_mix():
    closures = (Smagorinsky(0.1), Counting(), Kick(), Push(0.1))
    model = _model("spectral", closures, ("stage", 1, 2, "step"), substeps=2)
    final = eqx.filter_jit(rollout)(model, State(_start("spectral")), 3).final
    assert int(final.carry["closures"][1]["memory"][0]) == 6
    assert np.isfinite(final.u).all()


class Swing(Source):
    """s = a sin(ω t) u, with random numbers in a: what it gives depends on time, state and key."""

    stochastic = True
    size: jax.Array

    def __call__(self, view, memory=None, key=None):
        noise = 1 + 0.1 * jax.random.normal(key, view.u.shape, view.u.dtype)
        return self.size.astype(view.u.dtype) * jnp.sin(40 * view.t) * noise * view.u


@pytest.mark.parametrize("when", ["step", "stage"])
def test_between_two_evaluations_time_and_keys_go_on(when, x64):
    """A held closure that gives nothing makes a loop of the steps between its evaluations; they are the steps without it."""
    u = _start("spectral", dtype=np.float64)

    def last(size, closures, evaluate, substeps, every):
        model = _model("spectral", (Swing(size), *closures), (when, *evaluate), substeps)
        return rollout(model, State(u), 2, every=every, seed=5).u[-1]

    run = eqx.filter_jit(jax.value_and_grad(lambda size, *how: jnp.sum(last(size, *how) ** 2)))
    size = jnp.asarray(3.0)
    looped, slope = run(size, (Counting(),), (4,), 4, 1)
    single, slope_of_single = run(size, (), (), 1, 4)
    plain, _ = run(jnp.asarray(0.0), (), (), 1, 4)
    assert abs(looped - plain) > 1e-3 * plain  # it does something
    np.testing.assert_allclose([looped, slope], [single, slope_of_single], rtol=1e-12)


# --- the carry -------------------------------------------------------------------------------------------------------------------


def _bits(tree):
    leaves = jax.tree.leaves(tree)
    raw = [jax.random.key_data(a) if jnp.issubdtype(a.dtype, jax.dtypes.prng_key) else a for a in leaves]
    return [np.asarray(a) for a in raw]


@pytest.mark.parametrize(("kind", "precision"), [
    ("spectral", np.float32),
    ("finite_volume", np.float64),
    pytest.param("spectral", np.float64, marks=pytest.mark.slow),
    pytest.param("finite_volume", np.float32, marks=pytest.mark.slow),
])  # fmt: skip
def test_stopping_saving_and_going_on_is_bitwise_the_uninterrupted_run(kind, precision, tmp_path, request):
    if precision == np.float64:
        request.getfixturevalue("x64")
    closures = (Remembering(), Smagorinsky(0.1), Kick())
    model = _model(kind, closures, (2, "stage", 4), substeps=4, n=8)
    u = _start(kind, n=8, dtype=precision)
    go = eqx.filter_jit(lambda z, carry, step: advance(model, model.prepare(u.dtype), z, carry, step, 3))
    start = (model.solver.prepare(u.dtype).encode(u), model.init_carry(u, 7), jnp.zeros((), jnp.int32))
    whole = go(*go(*go(*start)))
    half = go(*start)
    storage.save_tree(tmp_path / "half.safetensors", half)
    loaded, _ = storage.load_tree(tmp_path / "half.safetensors", start)
    rest = go(*go(*loaded))
    assert int(whole[2]) == 9
    assert int(whole[1]["closures"][0]["memory"]["calls"]) == 9 * 2
    assert np.abs(np.asarray(whole[1]["ledger"][0])).max() > 0
    assert all(np.isfinite(a).all() for a in _bits(whole))
    for a, b in zip(_bits(rest), _bits(whole), strict=True):
        np.testing.assert_array_equal(a, b)

    # negative controls: every slot of the carry decides what comes next
    def changed(slot, value):
        carry = {**half[1], "closures": [dict(s) for s in half[1]["closures"]]}
        carry["closures"][0][slot] = value(carry["closures"][0][slot])
        return go(*go(half[0], carry, half[2]))

    for other in (
        changed("key", lambda key: jax.random.fold_in(key, 1)),
        changed("memory", lambda m: jax.tree.map(jnp.zeros_like, m)),
    ):
        assert any((a != b).any() for a, b in zip(_bits(other[0]), _bits(whole[0]), strict=True))


def test_seeds_decide_the_random_numbers():
    model, u = _model("spectral", (Kick(),)), _start("spectral")
    run = eqx.filter_jit(lambda seed: rollout(model, State(u), 2, seed=jax.random.key(seed)).u)
    np.testing.assert_array_equal(run(1), run(1))
    assert (run(1) != run(2)).any()


def test_memory_at_every_stage_is_refused():
    model = _model("spectral", (Counting(),), "stage")
    with pytest.raises(ValueError, match=r"corrections\[0\].evaluate: a closure with memory cannot be evaluated at every stage"):
        model.init_carry(_start("spectral"))


def test_the_ledger_loses_nothing():
    """Ten thousand small injections in single precision: compensated, the sum is as good as in double precision."""
    from hybridsim.model import _compensated_add

    values = np.random.default_rng(0).uniform(0, 1e-3, (10000, 2)).astype(np.float32)
    zero = jnp.zeros((2,), jnp.float32)
    (high, low), naive = jax.lax.scan(
        lambda s, v: ((_compensated_add(s[0], v), s[1] + v), None), ((zero, zero), zero), jnp.asarray(values)
    )[0]
    exact = values.astype(np.float64).sum(axis=0)
    assert np.abs(np.asarray(high, np.float64) + np.asarray(low, np.float64) - exact).max() <= 1e-7 * exact.max()
    assert np.abs(np.asarray(naive, np.float64) - exact).max() > 1e-6 * exact.max()


# --- refusals before tracing -----------------------------------------------------------------------------------------------------


class Untraceable(Interpolation):
    def __call__(self, view, memory=None, key=None):
        raise AssertionError("called")


REFUSED = [
    (
        lambda: _model("spectral", (Untraceable(),)),
        "Untraceable is a Interpolation closure.*does not take; it takes Flux, Source, PostStep",
    ),
    (lambda: _model("finite_volume", (Smagorinsky(),), 2, substeps=3), "divides substeps = 3, found 2"),
    (lambda: _model("finite_volume", (Smagorinsky(),), 0), "found 0"),
    (lambda: _model("finite_volume", (Smagorinsky(),), "sometimes"), "found 'sometimes'"),
    (lambda: _model("finite_volume", (Smagorinsky(),), ("step", "step")), "2 entries for 1 closures"),
    (lambda: _model("finite_volume", (Kick(),), "stage"), "a PostStep closure acts after steps"),
    (lambda: _model("finite_volume", dt=0.0), "must be positive and finite, found 0.0"),
    (lambda: _model("finite_volume", dt=float("nan")), "must be positive and finite, found nan"),
    (lambda: _model("finite_volume", substeps=0), "positive whole number, found 0"),
    (lambda: Model(solver_of("finite_volume", square(8)), ETDRK4(), 0.1), "ETDRK4 needs a linear part"),
]


@pytest.mark.parametrize(("make", "words"), REFUSED, ids=[w[:24] for _, w in REFUSED])
def test_impossible_models_are_refused_before_tracing(make, words):
    with pytest.raises(ValueError, match=words):
        make()


# --- precision -------------------------------------------------------------------------------------------------------------------


def _double_values(jaxpr):
    """Every double-precision value of a jaxpr and of those inside it."""
    found = []
    variables = [*jaxpr.constvars, *jaxpr.invars, *jaxpr.outvars]
    for equation in jaxpr.eqns:
        variables += [*equation.invars, *equation.outvars]
        for parameter in equation.params.values():
            for item in parameter if isinstance(parameter, tuple | list) else (parameter,):
                inner = getattr(item, "jaxpr", item)
                if hasattr(inner, "eqns"):
                    found += _double_values(inner)
    for v in variables:
        dtype = getattr(v.aval, "dtype", None)
        if dtype is not None and dtype in (np.float64, np.complex128):
            found.append(str(v.aval))
    return found


class DoubleInside(Flux):
    """F = 0 by way of double precision."""

    def __call__(self, view, memory=None, key=None):
        return 0 * view.gradient() * jnp.asarray(np.float64(2.0))


CLOSURES = {
    "none": ((), ()),
    "eddy": ((Smagorinsky(0.1), Leith(0.1)), ("step", "stage")),
    "learned": ((learned(0, 0.1), learned(1, 0.1, inputs="gradient", symmetric=False)), ("step", "stage")),
    "carrying": ((Remembering(), Kick(), Push()), ("step", "step", "stage")),
}


def _step_jaxpr(kind, stepper, closures, evaluate):
    model = Model(solver_of(kind, square(8), 1e-3, kolmogorov()), stepper, 0.01, closures, evaluate, 1)
    u = jnp.zeros((2, 8, 8), jnp.float32)
    prepared = model.prepare(u.dtype)
    z, carry = prepared.solver.encode(u), model.init_carry(u)
    arrays, rest = eqx.partition(prepared, eqx.is_array)
    assert all(a.dtype != np.float64 for a in jax.tree.leaves(arrays))
    step = lambda z, carry, n, arrays: model(z, carry, n, eqx.combine(arrays, rest))  # noqa: E731
    decoded = lambda *args: prepared.solver.decode(step(*args)[0])  # noqa: E731
    args = (z, carry, jnp.zeros((), jnp.int32), arrays)
    return jax.make_jaxpr(step)(*args).jaxpr, jax.make_jaxpr(decoded)(*args).jaxpr


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("case", CLOSURES)
@pytest.mark.parametrize(("kind", "stepper"), [(k, s) for k in BOTH for s in (STEPPERS if k == "spectral" else EXPLICIT)])
def test_no_double_precision_in_a_single_precision_step(kind, stepper, case):
    for jaxpr in _step_jaxpr(kind, stepper(), *CLOSURES[case]):
        assert _double_values(jaxpr) == []


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("when", ["step", "stage"])
def test_the_precision_test_can_fail(when):
    for kind, stepper in (("spectral", ETDRK4()), ("finite_volume", SSPRK3())):
        assert _double_values(_step_jaxpr(kind, stepper, (DoubleInside(),), when)[0])


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("kind", BOTH)
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_every_float_has_the_dtype_of_the_state(kind, dtype):
    model = _model(kind, (learned(0, 0.1), Remembering()))
    out = eqx.filter_eval_shape(rollout, model, State(jnp.zeros((2, 12, 12), dtype)), 2)
    assert out.u.dtype == dtype
    leaves = [a for a in jax.tree.leaves(out.final.carry) if jnp.issubdtype(a.dtype, jnp.floating)]
    assert leaves
    assert all(a.dtype == dtype for a in leaves)


class Clock(Source):
    """s = t."""

    def __call__(self, view, memory=None, key=None):
        return jnp.ones_like(view.u) * view.t


def test_closures_see_the_time_of_the_state():
    solver = solver_of("spectral", square(8), 1e-2)
    model = Model(solver, ETDRK4(), 0.125, (Clock(),))
    start = State(jnp.zeros((2, 8, 8), jnp.float32), step=4, t=3.0)
    out = rollout(model, start, 2)
    np.testing.assert_allclose(out.u[:, 0].mean(axis=(1, 2)), [3 * 0.125, 3 * 0.125 + 3.125 * 0.125], rtol=1e-6)
    np.testing.assert_allclose(out.t, [3.125, 3.25])
    # Going on from the final state, the clock goes on too.
    more = rollout(model, out.final, 1)
    np.testing.assert_allclose(more.u[0, 0].mean() - out.u[1, 0].mean(), 3.25 * 0.125, rtol=1e-5)
