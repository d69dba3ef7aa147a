"""Ensembles: the same numbers as single rollouts, on one device and on several, with derivatives, and in whole runs."""

import json
import os
import subprocess
import sys
from pathlib import Path

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flows import BOTH, default_stepper, kolmogorov, learned, random_flow, solver_of, square

from hybridsim.contract import PostStep
from hybridsim.experiments import ensemble_speed
from hybridsim.model import Model, State, ensemble, rollout
from hybridsim.samples import gathered, over_samples

TESTS = Path(__file__).parent


class Kick(PostStep):
    """d = random noise after each step."""

    stochastic = True

    def __call__(self, view, memory=None, key=None):
        return 1e-2 * jax.random.normal(key, view.u.shape, view.u.dtype)


def _model(kind, closures=(), n=12, dt=0.02, **options):
    return Model(solver_of(kind, square(n), 1e-2, kolmogorov()), default_stepper(kind), dt, closures, **options)


def _starts(kind, count, n=12, dtype=np.float32):
    solver = solver_of(kind, square(n))
    return jnp.asarray(np.stack([random_flow(solver, s, 1.0 + s, modes=3, dtype=dtype) for s in range(count)]))


def _close(a, b):
    np.testing.assert_allclose(a, b, rtol=0, atol=1e-5 * float(np.abs(np.asarray(b)).max()))


# --- on one device ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", BOTH)
def test_an_ensemble_is_its_rollouts(kind):
    model, u = _model(kind, (Kick(),)), _starts(kind, 3)
    out = ensemble(model, State(u, t=2.0), 3, every=2, seed=5)
    assert out.u.shape == (3, 3, 2, 12, 12)
    assert len(out) == 3
    for s in range(3):
        alone = rollout(model, State(u[s], t=2.0), 3, every=2, seed=jax.random.fold_in(jax.random.key(5), s))
        _close(out.u[s], alone.u)
        one = out[s]
        assert one.t == alone.t == out.t
        np.testing.assert_array_equal(one.u, out.u[s])
        np.testing.assert_array_equal(one.final.u, out.u[s, -1])
        assert int(one.final.step) == 6
        kept, wanted = (jax.random.key_data(f.carry["closures"][0]["key"]) for f in (one.final, alone.final))
        np.testing.assert_array_equal(kept, wanted)
    assert np.abs(out.u[0] - ensemble(model, u, 3, every=2, seed=6).u[0]).max() > 1e-4


def test_an_ensemble_goes_on_from_its_final_state():
    model, u = _model("spectral", (Kick(),)), _starts("spectral", 2)
    whole = ensemble(model, u, 4)
    half = ensemble(model, u, 2)
    rest = ensemble(model, half.final, 2)
    _close(rest.u, whole.u[:, 2:])
    assert rest.t == pytest.approx(whole.t[2:])
    alone = rollout(model, half[1].final, 2)
    _close(alone.u, whole.u[1, 2:])


def test_keys_may_be_given_per_sample():
    model, u = _model("finite_volume", (Kick(),)), _starts("finite_volume", 2)
    keys = jax.random.split(jax.random.key(3), 2)
    out = ensemble(model, u, 2, seed=keys)
    _close(out.u[1], rollout(model, State(u[1]), 2, seed=keys[1]).u)
    with pytest.raises(ValueError, match="seed: 2 keys for 1 samples"):
        ensemble(model, u[:1], 2, seed=keys)


def test_frames_have_coordinates():
    out = ensemble(_model("finite_volume"), _starts("finite_volume", 2), 3)
    ds = out.to_xarray()
    assert ds["u"].dims == ("sample", "time", "x_face", "y")
    np.testing.assert_array_equal(ds["v"].values, out.u[:, :, 1])
    np.testing.assert_array_equal(out[1].to_xarray()["u"].values[0], ds["u"].values[1])


def test_impossible_ensembles_are_refused():
    model, u = _model("spectral"), _starts("spectral", 2)
    for frames, every in ((0, 1), (1, 0)):
        with pytest.raises(ValueError, match="ensemble: frames and every must be positive"):
            ensemble(model, u, frames, every=every)
    with pytest.raises(ValueError, match=r"shape \(sample, channel, \*grid\), found \(2, 12, 12\)"):
        ensemble(model, u[0], 2)
    with pytest.raises(ValueError, match=r"found \(0, 2, 12, 12\)"):
        ensemble(model, u[:0], 2)


def test_shared_and_sampled_trees_reach_the_function():
    out = over_samples(lambda shared, x, y: {"z": shared["a"] * x + y[0], "n": y[1]}, {"a": 2.0, "b": "fixed"},
                       jnp.arange(3.0), (jnp.ones(3), jnp.arange(3)))  # fmt: skip
    np.testing.assert_array_equal(out["z"], [1.0, 3.0, 5.0])
    np.testing.assert_array_equal(out["n"], [0, 1, 2])
    assert gathered(out)["z"] is out["z"]


def test_the_speed_script_runs(tmp_path, capsys):
    jax.devices()  # with what this process has: nothing is set for other tests
    arguments = ["--size", "16", "--samples", "3", "--steps", "4", "--rounds", "1", "--out", str(tmp_path / "rows.json")]
    ensemble_speed.main(arguments)
    rows = json.loads((tmp_path / "rows.json").read_text())["rows"]
    assert [row["case"] for row in rows] == ["spectral ETDRK4 16²", "finite volume SSPRK3 16²"]
    assert all(row["difference"] < 1e-5 and row["ratio"][0] > 0 for row in rows)
    assert "ratio" in capsys.readouterr().out


# --- on several devices ----------------------------------------------------------------------------------------------------------


def _script(devices: int, name: str, *arguments: str, **environment: str) -> dict:
    """What the function `name` of this file returns in a process with that many CPU devices."""
    code = f"import json, sys, test_ensembles as t; print('RESULT' + json.dumps(t.{name}(*sys.argv[1:])))"
    variables = {"JAX_NUM_CPU_DEVICES": str(devices), "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(TESTS), **environment}
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, env=os.environ | variables)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.split("RESULT")[1])


def _same(a, b) -> bool:
    return bool(np.array_equal(np.asarray(a), np.asarray(b)))


def numbers_on_devices() -> dict:
    """Everything that is asked of several devices, in one process."""
    found: dict = {"devices": jax.device_count()}
    for kind in BOTH:
        model, u = _model(kind, n=16), _starts(kind, 3, 16)
        alone = np.stack([np.asarray(rollout(model, State(q), 2, every=5).u) for q in u])
        outs = {count: ensemble(model, u[:count], 2, every=5) for count in (1, 2, 3)}
        found[kind] = {
            "of each other": all(_same(out.u, outs[3].u[:count]) for count, out in outs.items()),
            "difference from rollouts": float(
                max(np.abs(out.u - alone[:c]).max() for c, out in outs.items()) / np.abs(alone).max()
            ),
            "on one device": all(len(a.devices()) == 1 for a in jax.tree.leaves(outs[3]) if eqx.is_array(a)),
        }

    # stochastic, adaptive, learned: whatever is in the carry and in the model
    model, u = _model("finite_volume", (learned(0, 0.1), Kick()), n=16, courant=0.05), _starts("finite_volume", 3, 16)
    many = ensemble(model, u, 2, every=2)
    keys = [jax.random.fold_in(jax.random.key(0), s) for s in range(3)]
    each = [rollout(model, State(q), 2, every=2, seed=key) for q, key in zip(u, keys, strict=True)]
    found["carry"] = {
        "difference": float(max(np.abs(many.u[s] - each[s].u).max() for s in range(3))),
        "steps": [many.final.carry["steps_taken"].tolist(), [int(e.final.carry["steps_taken"]) for e in each]],
        "going on": float(np.abs(ensemble(model, many.final, 1).u[2] - rollout(model, each[2].final, 1).u).max()),
    }

    # derivatives, and what surrounds an ensemble
    model, u = _model("spectral", (learned(0, 0.1),)), _starts("spectral", 3)

    def energy(model, u, how):
        if how == "ensemble":
            return jnp.mean(ensemble(model, u, 2, every=3, checkpoint_levels=1).u ** 2)
        return jnp.mean(jax.vmap(lambda q: rollout(model, State(q), 2, every=3).u)(u) ** 2)

    gradient = eqx.filter_jit(eqx.filter_grad(energy))
    one, other = (jax.tree.leaves(gradient(model, u, how)) for how in ("ensemble", "rollouts"))
    scale = max(np.abs(b).max() for b in other)
    found["reverse"] = float(max(np.abs(a - b).max() for a, b in zip(one, other, strict=True)) / scale)
    tangents = [jax.jvp(lambda q, how=how: energy(model, q, how), (u,), (u,))[1] for how in ("ensemble", "rollouts")]
    found["forward"] = float(abs(tangents[0] - tangents[1]) / abs(tangents[1]))
    model = _model("spectral")
    inside = eqx.filter_jit(lambda q: ensemble(model, q, 2).u)(u)
    found["under jit"] = float(np.abs(np.asarray(inside) - ensemble(model, u, 2).u).max())
    batched = eqx.filter_jit(jax.vmap(lambda q: ensemble(model, q, 1).u))(jnp.stack([u, 2 * u]))
    found["under vmap"] = float(np.abs(np.asarray(batched[1]) - ensemble(model, 2 * u, 1).u).max())
    with jax.set_mesh(jax.sharding.Mesh(np.array(jax.devices()), ("other",))):
        found["in a mesh"] = float(np.abs(np.asarray(ensemble(model, u, 2).u) - np.asarray(inside)).max())
    return found


@pytest.mark.slow
@pytest.mark.parametrize("devices", [2, 3])
def test_several_devices_tell_the_same_story(devices):
    found = _script(devices, "numbers_on_devices")
    assert found["devices"] == devices
    for kind in BOTH:
        assert found[kind]["of each other"], "a sample must not depend on how many others there are"
        assert found[kind]["difference from rollouts"] < 1e-6
        assert found[kind]["on one device"]
    assert found["carry"]["steps"][0] == found["carry"]["steps"][1]
    assert len(set(found["carry"]["steps"][0])) > 1
    for name in ("difference", "going on"):
        assert found["carry"][name] < 1e-5, name
    for name in ("reverse", "forward", "under jit", "under vmap", "in a mesh"):
        assert found[name] < 1e-5, name


def cores_in_use(when: str) -> dict:
    from hybridsim.samples import use_all_cores

    if when == "late":
        jnp.zeros(1).block_until_ready()
    use_all_cores()
    return {"devices": jax.device_count()}


def test_all_cores_are_used_unless_told_otherwise():
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    assert _script(-1, "cores_in_use", "early")["devices"] == cores
    assert _script(-1, "cores_in_use", "late")["devices"] == 1
    assert _script(3, "cores_in_use", "early")["devices"] == 3
    assert _script(-1, "cores_in_use", "early", XLA_FLAGS="--xla_force_host_platform_device_count=5")["devices"] == 5


def run_with_a_stop(folder: str) -> dict:
    """Frames of a run of three samples, and of the same run stopped and resumed."""
    from hybridsim import experiment as running
    from hybridsim.config import experiment_from
    from hybridsim.signals import STOP, Interrupted

    data = {
        "equation": {"use": "navier_stokes", "viscosity": 1e-2},
        "domain": {"lengths": [6.283185307179586] * 2},
        "initial": "random_velocity",
        "samples": {"count": 3},
        "time": {"end": 1.2, "frames": 12},
        "reference": {"solver": "spectral", "shape": [12, 12]},
        "runs": {"bare": {"solver": "spectral", "shape": [12, 12], "dt": 0.05}},
    }
    made = experiment_from(data, Path(folder) / "small.yaml")
    model, starts = made.model_for("bare"), np.asarray(_starts("spectral", 3))

    def run(name, resume=False, stop_at=None):
        def progress(done, _):
            STOP.requested = 15 if done == stop_at else None

        work = Path(folder) / name
        work.mkdir(exist_ok=True, parents=True)
        return running._run_one(made, "bare", model, starts, work, resume, progress, lambda _: None)

    whole = run("whole")
    try:
        run("stopped", stop_at=6)
        stopped = False
    except Interrupted:
        stopped = True
    finally:
        STOP.requested = None
    resumed = run("stopped", resume=True)
    np.save(Path(folder) / "u.npy", whole.u)
    return {"stopped": stopped, "same": _same(whole.u, resumed.u), "finite": bool(np.isfinite(whole.u).all())}


def test_runs_resume_bit_for_bit_on_several_devices(tmp_path):
    frames = []
    for devices in (1, 2):
        folder = tmp_path / str(devices)
        folder.mkdir()
        assert _script(devices, "run_with_a_stop", str(folder)) == {"stopped": True, "same": True, "finite": True}
        frames.append(np.load(folder / "u.npy"))
    _close(*frames)


@pytest.mark.gpu
@pytest.mark.parametrize("kind", BOTH)
def test_a_gpu_runs_an_ensemble_at_once(kind):
    model, u = _model(kind, (Kick(),)), _starts(kind, 3)
    out = ensemble(model, u, 2)
    _close(out.u[2], rollout(model, State(u[2]), 2, seed=jax.random.fold_in(jax.random.key(0), 2)).u)
