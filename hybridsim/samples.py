"""(f(x₁), …, f(x_S)): one function over the samples of an ensemble, on all cores.

On CPU a batch axis inside the arrays gains little on grids that fill a cache and doubles the time of convolutions, and one small
grid keeps one core busy. So the samples are shared out to JAX devices, one per core, and each device takes its own one after
another, or small ones in groups. Elsewhere all samples run at once (`vmap`). JAX makes one CPU device unless told otherwise before
its first computation: see `use_all_cores`.
"""

import os
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import PyTree

AXIS = "sample"


def use_all_cores() -> None:
    """One CPU device per core that this process may use, unless the number was set before (`JAX_NUM_CPU_DEVICES`, `XLA_FLAGS`).

    Has no effect once JAX has computed something. A single sample is as fast with many devices as with one: they share their
    threads.
    """
    chosen = jax.config.values["jax_num_cpu_devices"] != -1 or "host_platform_device_count" in os.environ.get("XLA_FLAGS", "")
    if chosen:
        return
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        jax.config.update("jax_num_cpu_devices", cores)
    except RuntimeError:
        # Something has computed already; the samples will run one after another.
        return


def _workers(samples: int) -> int:
    """How many devices share `samples` samples: the fewest that take no more rounds than all of them would."""
    if not jax.sharding.get_abstract_mesh().empty:
        # Inside somebody's own mesh the devices are spoken for.
        return 1
    rounds = -(-samples // jax.local_device_count())
    return -(-samples // rounds)


def padded(samples: PyTree) -> PyTree:
    """The samples, and the first ones once more at the end where that gives every device of `over_samples` as many."""
    count = jax.tree.leaves(samples)[0].shape[0]
    missing = 0 if jax.default_backend() != "cpu" else -count % _workers(count)
    return jax.tree.map(lambda a: jnp.concatenate([a, a[:missing]]), samples) if missing else samples


def over_samples(function: Callable[..., PyTree], shared: PyTree, *samples: PyTree, together: int = 1) -> PyTree:
    """(f(θ, x₁), …, f(θ, x_S)), stacked.

    **Arguments:**

    - `function`: f, a function of θ and of one sample (one argument per tree of `samples`).
    - `shared`: θ, what all samples have in common.
    - `samples`: trees of arrays whose first axis is the sample.
    - `together`: so many samples are a batch (`vmap`) on one CPU device, where single ones are so small that most of their time is
      calls.

    Works under jit, vmap and both modes of differentiation. What comes out of a compiled call may lie on several devices: see
    `gathered`.
    """
    if jax.default_backend() != "cpu":
        return jax.vmap(lambda *sample: function(shared, *sample))(*samples)
    count = jax.tree.leaves(samples)[0].shape[0]
    arrays, fixed = eqx.partition(shared, eqx.is_array)

    def in_turn(arrays: PyTree, samples: PyTree) -> PyTree:
        whole = eqx.combine(arrays, fixed)
        return jax.lax.map(lambda sample: function(whole, *sample), samples, batch_size=together if together > 1 else None)

    workers = _workers(count)
    if workers == 1:
        return in_turn(arrays, samples)
    mesh = Mesh(np.array(jax.local_devices()[:workers]), (AXIS,))
    each, all_alike = PartitionSpec(AXIS), PartitionSpec()
    # The samples never meet, so there is nothing for the check of varying axes to find.
    spread = jax.shard_map(in_turn, mesh=mesh, in_specs=(all_alike, each), out_specs=each, check_vma=False)
    return jax.tree.map(lambda a: a[:count], spread(arrays, padded(samples)))


def gathered(tree: PyTree) -> PyTree:
    """The same arrays on the default device, where `over_samples` has left them on several; traced ones as they are."""

    def one(a: Any) -> Any:
        if not isinstance(a, jax.Array) or isinstance(a, Tracer) or len(a.devices()) == 1:
            return a
        if jnp.issubdtype(a.dtype, jax.dtypes.prng_key):
            return jax.random.wrap_key_data(one(jax.random.key_data(a)), impl=jax.random.key_impl(a))
        # By way of the host, so that what comes back is tied to no device.
        return jnp.asarray(np.asarray(a))

    return jax.tree.map(one, tree)
