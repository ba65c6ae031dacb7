"""What is chosen when a program is lowered: a kernel for one device, what XLA cuts by itself for several."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from qjax.runtime.alone import alone_or

BY_ROWS = PartitionSpec("d")


def test_programs_of_one_device_of_several_and_of_each():
    if jax.device_count() < 2:
        pytest.skip("one device")
    mesh = Mesh(np.array(jax.devices()[:2]), ("d",))
    run = alone_or(lambda x: {"y": x["a"] + x["b"]}, lambda x: {"y": x["a"] - x["b"]})
    x = {"a": jnp.full((4, 2), 3.0), "b": jnp.ones((4, 2))}
    cut = jax.device_put(x, NamedSharding(mesh, BY_ROWS))
    of_each = jax.shard_map(run, mesh=mesh, in_specs=BY_ROWS, out_specs=BY_ROWS)
    for fn, given, want in ((run, x, 4), (run, cut, 2), (of_each, cut, 4)):
        np.testing.assert_array_equal(jax.jit(fn)(given)["y"], jnp.full((4, 2), want))
    np.testing.assert_array_equal(run(x)["y"], jnp.full((4, 2), 4))
