"""Random stirring: a stationary process with the strength, memory and solenoidal share that it is told, the same for every run."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flows import TWO_PI

from hybridsim.grid import Grid
from hybridsim.solvers.stirring import LATTICE, OrnsteinUhlenbeck, helmholtz_weights

BOXES = {1: Grid((16,), (3.0,)), 2: Grid((18, 12), (3.0, 1.5)), 3: Grid((16, 9, 10), (3.0, 1.5, 2.0))}


def _stirring(dims, **options):
    return OrnsteinUhlenbeck(**{"solenoidal_share": 0.0 if dims == 1 else 0.5, **options})


_advance = eqx.filter_jit(lambda stirring, memory, t, dt: stirring.advance(memory, t, dt))
_force = eqx.filter_jit(lambda stirring, memory, grid, dtype: stirring.acceleration(memory, grid, dtype))
_forces = eqx.filter_jit(lambda stirring, c, grid: jax.vmap(lambda q: stirring.acceleration({"coefficients": q}, grid, q.dtype))(c))


def _walk(stirring, grid, times, dtype=jnp.float32):
    """The memory at the last of the times, one step from one to the next."""
    memory, t = stirring.init_memory(grid), 0.0
    for later in times:
        memory, t = _advance(stirring, memory, jnp.asarray(t, dtype), jnp.asarray(later - t, dtype)), later
    return memory


@eqx.filter_jit
def _history(stirring, grid, times):
    """The memory at each of many times."""

    def step(memory, t):
        memory = stirring.advance(memory, t, jnp.zeros_like(t))
        return memory, memory

    return jax.lax.scan(step, stirring.init_memory(grid), times)[1]


# --- the process -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("part", [1.0, 0.37])
def test_the_process_is_stationary_and_forgets_at_its_rate(part):
    """⟨c²⟩ = 1 from the first moment on, and ⟨c(t) c(t + τ)⟩ = exp(−|τ|/T), between lattice times a little more."""
    stirring, grid = OrnsteinUhlenbeck(correlation_time=0.8, seed=5), Grid((8,) * 3, (1.0,) * 3)
    tau = 0.8 / LATTICE
    memory = _history(stirring, grid, jnp.asarray(tau * (np.arange(8000) + part + 1e-3), jnp.float32))
    c = np.asarray(memory["coefficients"], np.float64).reshape(8000, -1)
    assert c.shape[1] == 2 * 3 * 61
    # 500 correlation times and 366 independent processes: the scatter of a mean square is √(2/(500 · 366))
    assert (c**2).mean() == pytest.approx(1.0, abs=0.015)
    assert (np.asarray(stirring.init_memory(grid)["coefficients"]) ** 2).mean() == pytest.approx(1.0, abs=0.25)
    assert (c[:80] ** 2).mean() == pytest.approx(1.0, abs=0.15)
    assert abs(c.mean()) <= 0.01
    found = [(c[n:] * c[: len(c) - n]).mean() for n in (4, 16, 32, 64)]
    print(part, (c**2).mean(), found)
    # α c_n + β c_{n+1} on the arc
    angle = np.arccos(np.exp(-1 / LATTICE))
    product = np.sin((1 - part % 1) * angle) * np.sin(part % 1 * angle) / np.sin(angle) ** 2
    more = 1 + 2 * product * (np.cosh(1 / LATTICE) - np.exp(-1 / LATTICE))
    assert 1 <= more <= 1.032
    assert np.abs(found - more * np.exp([-0.25, -1, -2, -4])).max() <= 0.01
    # neither kurtosis nor cross-talk
    assert (c**4).mean() == pytest.approx(3.0, abs=0.15)
    assert abs((c[:, 1:] * c[:, :-1]).mean()) <= 0.01
    assert (np.diff(np.asarray(memory["index"])) == 1).all()


def _draws(stirring, grid, count):
    """Coefficients at times so far apart that they are independent."""
    shape = jax.eval_shape(lambda: stirring.init_memory(grid))["coefficients"].shape
    return jnp.asarray(np.random.default_rng(1).standard_normal((count, *shape)))


def _modes(a, grid):
    """The mean square of each Fourier mode, and |k|/k₀."""
    axes = tuple(range(1, grid.ndim + 1))
    hat = np.fft.rfftn(np.asarray(a, np.float64), axes=axes) / grid.cells
    weight = np.where(np.arange(grid.shape[-1] // 2 + 1) == 0, 1.0, 2.0)
    k = np.stack(np.broadcast_arrays(*grid.wavenumbers()))
    radius = np.sqrt((k**2).sum(axis=0)) * max(grid.lengths) / TWO_PI
    return hat, weight, k, radius


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("dims", [1, 2, 3])
@pytest.mark.parametrize("options", [
    {"amplitude": 2.5},
    {"lowest_mode": 2.0, "highest_mode": 4.0, "solenoidal_share": 1.0},
    {"solenoidal_share": 0.0},
    {"profile": "parabola", "solenoidal_share": 0.3},
], ids=lambda v: next(iter(v)))  # fmt: skip
def test_the_acceleration_is_as_strong_and_as_solenoidal_as_told(dims, options):
    grid = BOXES[dims]
    if dims == 1:
        options = {**options, "solenoidal_share": 0.0}
    stirring = _stirring(dims, **options)
    stirring.check_grid(grid)
    count = {1: 1500, 2: 600, 3: 200}[dims]
    fields = _forces(stirring, _draws(stirring, grid, count), grid)
    assert fields.shape == (count, dims, *grid.shape)
    strength, share = stirring.amplitude, stirring.solenoidal_share
    assert float((fields**2).sum(axis=1).mean()) == pytest.approx(strength**2, rel=0.06)
    solenoidal = total = 0.0
    spectrum = np.zeros(6)
    for a in np.asarray(fields[:60]):
        hat, weight, k, radius = _modes(a, grid)
        square = np.where(radius > 0, (k**2).sum(axis=0), 1.0)
        power = weight * (np.abs(hat) ** 2).sum(axis=0)
        along = weight * np.abs((k * hat).sum(axis=0)) ** 2 / square
        total, solenoidal = total + power.sum(), solenoidal + (power - along).sum()
        assert np.abs(hat[:, (radius < stirring.lowest_mode - 1e-9) | (radius > stirring.highest_mode + 1e-9)]).max() <= 1e-14
        spectrum += np.bincount(np.rint(radius).astype(int).ravel(), power.ravel())[:6] if dims > 1 else 0
    exact = share**2 * (dims - 1) / (share**2 * (dims - 1) + (1 - share) ** 2)
    print(dims, options, solenoidal / total, exact)
    assert solenoidal / total == pytest.approx(exact, abs=1e-12 if share in (0.0, 1.0) else 0.04)
    # one point is like another
    assert float((fields**2).sum(axis=1).mean(axis=0).std()) <= 0.25 * strength**2


@pytest.mark.usefixtures("x64")
def test_a_parabola_peaks_in_the_middle_of_its_band():
    stirring, grid = OrnsteinUhlenbeck(profile="parabola", lowest_mode=1.0, highest_mode=4.0), Grid((10, 10), (1.0, 1.0))
    found = 0.0
    for a in np.asarray(_forces(stirring, _draws(stirring, grid, 400), grid)):
        hat, _, _, radius = _modes(a, grid)
        found = found + (np.abs(hat) ** 2).sum(axis=0) / 400
    exact = np.where((radius > 1) & (radius < 4), 1 - (2 * radius - 5) ** 2 / 9, 0.0)
    inside = exact > 1e-3
    ratio = found[inside] / exact[inside]
    assert np.abs(ratio / ratio.mean() - 1).max() <= 0.3
    assert found[~inside].max() <= 1e-20


@pytest.mark.usefixtures("x64")
def test_helmholtz_weights_project(rng):
    k, v = rng.standard_normal((2, 3, 7))
    parts = {share: np.einsum("abm,bm->am", helmholtz_weights(k, share), v) for share in (0.0, 0.25, 0.5, 1.0)}
    assert np.abs((k * parts[1.0]).sum(axis=0)).max() <= 1e-14
    assert np.abs(np.cross(k, parts[0.0], axis=0)).max() <= 1e-14
    assert parts[0.0] + parts[1.0] == pytest.approx(v, abs=1e-14)
    assert parts[0.5] == pytest.approx(v / 2, abs=1e-14)
    assert parts[0.25] == pytest.approx(0.75 * parts[0.0] + 0.25 * parts[1.0], abs=1e-14)


# --- every run sees the same -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dims", [1, 3])
def test_steps_of_any_size_see_the_same_force(dims):
    grid, stirring = BOXES[dims], _stirring(dims, correlation_time=0.5, seed=3)
    end = 2.37
    finest = _walk(stirring, grid, np.linspace(0, end, 1000)[1:])
    field = np.asarray(_force(stirring, finest, grid, jnp.float32))
    uneven = np.cumsum(np.random.default_rng(0).uniform(0.01, 0.3, 40))
    # steps shorter than the lattice of times, longer, over all of it at once, and any
    for times in (np.linspace(0, end, 80)[1:], np.linspace(0, end, 6)[1:], [end], [*uneven[uneven < end], end]):
        memory = _walk(stirring, grid, times)
        assert int(memory["index"]) == int(end / 0.5 * LATTICE)
        other = np.asarray(_force(stirring, memory, grid, jnp.float32))
        assert np.abs(other - field).max() <= 2e-4 * np.abs(field).max()
    # the process has moved on meanwhile, and another seed is another process
    start = np.asarray(_force(stirring, stirring.init_memory(grid), grid, jnp.float32))
    assert np.abs(field - start).max() > 0.3 * np.abs(field).max()
    seeded = _stirring(dims, correlation_time=0.5, seed=4)
    assert np.abs(np.asarray(_force(seeded, seeded.init_memory(grid), grid, jnp.float32)) - start).max() > 0.3


def test_the_force_is_continuous():
    grid, stirring = BOXES[2], OrnsteinUhlenbeck(correlation_time=0.5)
    times = np.linspace(0, 1, 801)[1:]
    memory = _history(stirring, grid, jnp.asarray(times, jnp.float32))
    c = np.asarray(memory["coefficients"])
    # no step is longer than the arc between two draws allows: |dc| ≤ θ/sin θ · (|before| + |after|) · dt/τ
    tau = 0.5 / LATTICE
    most = np.abs(np.diff(c, axis=0)).max() / (times[1] - times[0]) * tau
    lattice = np.abs(np.asarray(memory["after"]) - np.asarray(memory["before"])).max()
    assert most <= 1.1 * lattice


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("dims", [2, 3])
def test_every_grid_and_precision_sees_the_same_force(dims):
    grid, stirring = BOXES[dims], _stirring(dims, amplitude=1.7)
    memory = _walk(stirring, grid, [0.3, 0.9], jnp.float64)
    assert {a.dtype for a in jax.tree.leaves(memory)} == {np.dtype("float32"), np.dtype("int32")}
    for a, b in zip(jax.tree.leaves(memory), jax.tree.leaves(_walk(stirring, grid, [0.3, 0.9])), strict=True):
        assert np.abs(np.asarray(a) - np.asarray(b)).max() <= 2e-5
    # the centres of a third of the cells per axis are those of the coarse grid
    fine = grid.with_shape([3 * n for n in grid.shape])
    assert (stirring.init_memory(fine)["after"] == stirring.init_memory(grid)["after"]).all()
    a, b = (np.asarray(_force(stirring, memory, g, jnp.float64)) for g in (grid, fine))
    assert a.dtype == np.float64
    assert np.abs(a - b[(slice(None), *[slice(1, None, 3)] * dims)]).max() <= 1e-13
    for q in (a, b):
        assert np.abs(q.mean(axis=tuple(range(1, dims + 1)))).max() <= 1e-15
    single = np.asarray(_force(stirring, memory, grid, jnp.float32))
    assert single.dtype == np.float32
    assert np.abs(single - a).max() <= 1e-5

    def trace(memory, t):
        memory = stirring.advance(memory, t, t)
        return memory, stirring.acceleration(memory, grid, "float32")

    assert "f64" not in str(jax.make_jaxpr(trace)(stirring.init_memory(grid), jnp.float32(0.1)))


def test_a_resumed_run_goes_on_bit_by_bit():
    grid, stirring = BOXES[3], OrnsteinUhlenbeck(correlation_time=0.2, seed=7)
    step = eqx.filter_jit(lambda memory, t: stirring.advance(memory, t, jnp.float32(0.03)))
    force = eqx.filter_jit(lambda memory: stirring.acceleration(memory, grid, jnp.float32))
    memory = stirring.init_memory(grid)
    history = [memory]
    for n in range(12):
        memory = step(memory, jnp.float32(n * 0.03))
        history.append(memory)
    stored = jax.tree.map(lambda a: jnp.asarray(np.asarray(a)), history[5])
    for n in range(5, 12):
        stored = step(stored, jnp.float32(n * 0.03))
        for a, b in zip(jax.tree.leaves(stored), jax.tree.leaves(history[n + 1]), strict=True):
            assert (np.asarray(a) == np.asarray(b)).all()
    assert (np.asarray(force(stored)) == np.asarray(force(history[-1]))).all()


# --- transformations -------------------------------------------------------------------------------------------------------------


def _impulse(stirring, velocity, memory, grid, steps=6, dt=0.11):
    """v after a few steps of v ← v + Δt a(t) exp(−v²), with its gradient recomputed step by step."""

    @jax.checkpoint
    def step(state, n):
        velocity, memory = state
        memory = stirring.advance(memory, n * dt, jnp.asarray(dt, velocity.dtype))
        force = stirring.acceleration(memory, grid, velocity.dtype)
        return (velocity + dt * force * jnp.exp(-velocity * velocity), memory), None

    (velocity, memory), _ = jax.lax.scan(step, (velocity, memory), jnp.arange(steps, dtype=velocity.dtype))
    return velocity, memory


@pytest.mark.usefixtures("x64")
def test_gradients_flow_to_the_amplitude_and_past_the_random_numbers(rng):
    dims, grid = 2, BOXES[2]
    stirring = _stirring(dims, amplitude=jnp.float64(0.8), correlation_time=0.3)
    velocity = jnp.asarray(rng.standard_normal((dims, *grid.shape)))
    memory = stirring.init_memory(grid)

    @jax.jit
    def run(amplitude, velocity):
        chosen = eqx.tree_at(lambda s: s.amplitude, stirring, amplitude)
        return _impulse(chosen, velocity, memory, grid)[0]

    point = (jnp.float64(0.8), velocity)
    tangent = (jnp.float64(0.6), jnp.asarray(rng.standard_normal(velocity.shape)))
    _, forward = jax.jvp(run, point, tangent)
    cotangent = jnp.asarray(rng.standard_normal(velocity.shape))
    back = jax.vjp(run, *point)[1](cotangent)
    left = float(jnp.vdot(forward, cotangent))
    assert left == pytest.approx(float(sum(jnp.vdot(a, b) for a, b in zip(tangent, back, strict=True))), rel=1e-12)
    h = 1e-5
    central = (run(0.8 + h, velocity) - run(0.8 - h, velocity)) / (2 * h)
    only = jax.jvp(run, point, (jnp.float64(1.0), jnp.zeros_like(velocity)))[1]
    assert np.abs(only - central).max() <= 1e-8
    assert np.abs(only).max() > 1e-2

    # a state that holds the memory is differentiated as a whole: nothing comes back from the random numbers of a later step
    def whole(memory):
        floats, rest = eqx.partition(memory, eqx.is_inexact_array)
        return jax.grad(lambda f: jnp.sum(_impulse(stirring, velocity, eqx.combine(f, rest), grid)[0] ** 2))(floats)

    assert not any(np.any(np.asarray(a)) for a in jax.tree.leaves(whole(memory)))


def test_samples_walk_together():
    grid, stirring = BOXES[2], OrnsteinUhlenbeck(correlation_time=0.3)
    times = jnp.asarray([0.01, 0.2, 0.9])

    def to(t):
        memory = stirring.advance(stirring.init_memory(grid), jnp.float32(0.0), t)
        return stirring.acceleration(memory, grid, jnp.float32)

    together = jax.jit(jax.vmap(to))(times)
    alone = jax.jit(to)
    for t, a in zip(times, together, strict=True):
        assert np.abs(alone(t) - a).max() <= 1e-5
    assert np.abs(together[0] - together[2]).max() > 0.1


@pytest.mark.parametrize(("make", "grid", "message"), [
    (lambda: OrnsteinUhlenbeck(-1.0), BOXES[2], "amplitude: must be finite and not negative"),
    (lambda: OrnsteinUhlenbeck(correlation_time=0.0), BOXES[2], "correlation_time: must be positive and finite"),
    (lambda: OrnsteinUhlenbeck(lowest_mode=0.0), BOXES[2], "lowest_mode: must be positive, found 0.0"),
    (lambda: OrnsteinUhlenbeck(lowest_mode=4.0), BOXES[2], "highest_mode: must lie between lowest_mode = 4.0 and 16, found 3.0"),
    (lambda: OrnsteinUhlenbeck(highest_mode=17.0), BOXES[2], "highest_mode: must lie between"),
    (lambda: OrnsteinUhlenbeck(solenoidal_share=-0.1), BOXES[2], "solenoidal_share: must lie between 0 and 1"),
    (lambda: OrnsteinUhlenbeck(seed=-1), BOXES[2], "seed: needs a whole number"),
    (lambda: OrnsteinUhlenbeck(), BOXES[1], "solenoidal_share: in one dimension all motion is compressive"),
    (lambda: OrnsteinUhlenbeck(), Grid((8, 8), (1.0, 1.0), ("periodic", "outflow")), "needs periodic boundaries"),
    (lambda: OrnsteinUhlenbeck(), Grid((8, 6), (1.0, 1.0)), "the band up to 3.0 does not fit on a grid of shape"),
    (lambda: OrnsteinUhlenbeck(lowest_mode=1.1, highest_mode=1.2), Grid((8, 8), (1.0, 1.0)), "no mode of the box lies between"),
    (lambda: OrnsteinUhlenbeck(profile="parabola", lowest_mode=1.0, highest_mode=1.0), Grid((8, 8), (1.0, 1.0)), "no mode of the"),
])  # fmt: skip
def test_impossible_forces_are_refused(make, grid, message):
    with pytest.raises(ValueError, match=message):
        make().check_grid(grid)
