"""Time and bytes."""

from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qjax.evaluation import compiled_memory, measure_speed, peak_resident_bytes, resident_bytes, tree_bytes


@partial(jax.tree_util.register_dataclass, data_fields=["codes", "scale"], meta_fields=["bits"])
@dataclass(frozen=True)
class Packed:
    codes: jax.Array
    scale: jax.Array | None
    bits: int


def test_more_work_takes_longer_and_compilation_is_apart():
    small, large = (jnp.ones((n, n)) for n in (32, 1024))
    fast, slow = (measure_speed(lambda x: x @ x, x, repeats=5) for x in (small, large))
    assert fast.median_seconds < slow.median_seconds
    assert len(fast.seconds) == 5
    assert fast.median_seconds < fast.compile_seconds
    assert slow.spread_seconds >= 0
    assert slow.tokens_per_second(7) == pytest.approx(7 / slow.median_seconds)


def test_time_is_until_the_result_is_ready():
    def loop(turns, x):
        return jax.lax.fori_loop(0, turns, lambda _, y: y @ x * 1e-3, x)

    x = jnp.ones((400, 400))
    short, long = (measure_speed(partial(loop, turns), x, repeats=5) for turns in (3, 60))
    assert min(long.seconds) > 4 * min(short.seconds)  # a dispatch alone would take the same time for both
    assert long.trace_seconds > 0
    with pytest.raises(ValueError, match="`repeats` must be at least 1"):
        measure_speed(partial(loop, 1), x, repeats=0)


def test_bytes_of_trees_are_those_of_their_arrays():
    packed = Packed(jnp.zeros((8, 16), jnp.uint8), jnp.zeros((8, 1), jnp.bfloat16), 4)
    assert tree_bytes(packed) == 8 * 16 + 8 * 2
    assert tree_bytes({"a": packed, "b": [np.zeros(3, np.float64), None]}) == 144 + 24
    assert tree_bytes(jax.ShapeDtypeStruct((4, 4), jnp.bfloat16)) == 32
    assert tree_bytes(Packed(jnp.zeros(4, jnp.int8), None, 8)) == 4
    shared = jnp.zeros(100, jnp.float32)
    assert tree_bytes([shared, shared]) == 400
    assert tree_bytes({}) == 0
    with pytest.raises(TypeError, match="`tree` holds a str"):
        tree_bytes({"a": "x"})


def test_plan_of_a_program_shows_copies_and_donations():
    x = jnp.zeros((256, 256), jnp.float32)
    plain = compiled_memory(lambda x: x + 1, x)
    assert (plain.argument_bytes, plain.output_bytes, plain.alias_bytes) == (x.nbytes, x.nbytes, 0)
    assert plain.total_bytes == 2 * x.nbytes + plain.temporary_bytes
    donated = compiled_memory(jax.jit(lambda x: x + 1, donate_argnums=0), x)
    assert donated.alias_bytes == x.nbytes
    assert donated.total_bytes < plain.total_bytes
    codes = jax.ShapeDtypeStruct((512, 512), jnp.int8)
    copy = compiled_memory(lambda w, y: y @ w.astype(jnp.float32), codes, jax.ShapeDtypeStruct((64, 512), jnp.float32))
    assert copy.temporary_bytes >= 512 * 512 * 4


def test_resident_memory_rises_with_what_is_held():
    before = resident_bytes()
    held = np.ones(64 << 20, np.uint8)
    assert resident_bytes() - before > 48 << 20
    high = resident_bytes()
    del held
    assert resident_bytes() < high - (48 << 20)
    assert peak_resident_bytes() > high - (4 << 20)
