"""The shipped closures: their cards, and (slow) that they stay stable for 200 time units."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hybridsim import diagnostics, storage
from hybridsim.config import load_experiment, shipped_weights
from hybridsim.train import _rollouts

KOLMOGOROV = {"coarse_turbulence": ("learned", "kolmogorov_fv64"), "spectral_turbulence": ("learned", "kolmogorov_ps32")}
WAVES = {"ks": ("learned", "ks_ps64"), "ks_finite_volume": ("learned", "ks_fv64")}
SHIPPED = KOLMOGOROV | WAVES
SCORED = {"kolmogorov_fv64": "fv64", "kolmogorov_ps32": "ps32", "ks_ps64": "ps64", "ks_fv64": "fv64"}


@pytest.mark.parametrize("experiment", SHIPPED)
def test_weights_have_a_card_that_fits(experiment):
    label, name = SHIPPED[experiment]
    file = shipped_weights()[name]
    header = storage.read_header(file)
    card = storage.read_json(file.with_suffix(".json"))
    assert card["closure"] == header["closure"] == "learned_flux"
    assert card["parameters"] == header["parameters"]
    assert set(card["seeds"]) == {"0", "1", "2"}
    assert all(row["seconds"] > 0 for row in card["seeds"].values())
    assert card["history"]
    scores = card["scores"]
    assert scores["samples"] == 8
    for seed in range(3):
        assert scores["runs"][f"{SCORED[name]}_learned_{seed}"]["outcome"] == "finished"
    # The YAML beside the card trains the very closure that is shipped.
    loaded = load_experiment(experiment)
    assert loaded.spec.train is not None
    assert loaded.spec.train.run == label
    assert card["recipe"]["unroll"] == list(loaded.spec.train.unroll)
    assert card["recipe"]["updates"] == list(loaded.spec.train.updates)


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("experiment", KOLMOGOROV)
def test_stable_to_200(experiment, seed):
    label, name = SHIPPED[experiment]
    loaded = load_experiment(experiment, [f"runs.{label}.corrections[0].weights={name}_seed{seed}"])
    model = loaded.model_for(label)
    solver = model.solver
    places = tuple(v.at for v in solver.variables)
    keys = jax.random.split(jax.random.key(5), 2)
    u = jnp.stack([loaded.initial()(key, solver.grid, places, jnp.float32) for key in keys])
    frames = np.asarray(_rollouts(model, u, 200, round(1 / model.step_time)))
    assert np.isfinite(frames).all()
    energy = diagnostics.kinetic_energy(frames[:, 40:], solver.grid, solver.variables)
    # The filtered reference has 1.03 on average and stays between these.
    assert energy.min() > 0.4
    assert energy.max() < 2.5
    assert 0.8 < energy.mean() < 1.25


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("experiment", WAVES)
def test_waves_keep_their_statistics_for_10000_time_units(experiment, seed):
    label, name = WAVES[experiment]
    loaded = load_experiment(experiment, [f"runs.{label}.corrections[0].weights={name}_seed{seed}"])
    model = loaded.model_for(label)
    solver = model.solver
    keys = jax.random.split(jax.random.key(5), 4)
    u = jnp.stack([loaded.initial()(key, solver.grid, (solver.grid.centre,), jnp.float32) for key in keys])
    frames = np.asarray(_rollouts(model, u, 2000, round(5 / model.step_time)))
    assert np.isfinite(frames).all()
    # the attractor has ⟨u²⟩ = 1.73; cell means of this width lose an eighth of it
    square = (frames[:, 40:] ** 2).mean()
    truth = {"ks_ps64": 1.73, "ks_fv64": 1.51}[name]
    assert abs(square / truth - 1) < 0.05
