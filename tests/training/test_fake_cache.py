"""Training with caches: read as the packed ones, kept in float, with the gradient of what was written."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import qjax
from qjax import Policy, Rule
from tests.runtime.test_cache import CAPACITY, WIDTH, attend, in_a_loop_over_time, read_twice, rows

EMPTY, W = jnp.zeros((CAPACITY, WIDTH)), rows(WIDTH, 1) / 4
KEYS = qjax.kv_cache(qjax.uint3(), "channel", group_size=4, window=6)
TOKENS = qjax.kv_cache(qjax.int4(scale_rule="full"), window=5, rotate=True)


def policy(spec, weight=None):
    return Policy([Rule("2", cache=spec), Rule("*", weight=weight)])


BOTH = [(attend, KEYS), pytest.param(in_a_loop_over_time, TOKENS, marks=pytest.mark.slow)]


@pytest.mark.parametrize(("fn", "spec"), BOTH, ids=["keys", "loop"])
def test_a_cache_is_read_as_the_packed_one_and_stays_float(fn, spec):
    rules = policy(spec, qjax.int8())
    fq = qjax.fake_quant(fn, rules)
    params = qjax.quantize(fn, W, rules, [(rows(12), EMPTY, jnp.int32(0))]).params
    run, packed = jax.jit(fq), jax.jit(qjax.quantized(fn))
    cache, q, at = EMPTY, qjax.quantized_cache(fn, rules)(W, rows(12), EMPTY, jnp.int32(0)), 0
    for seed in (0, 1):  # the second pass goes on from the first one's cache
        x = rows(12, seed)
        (y, cache), (want, q) = run(W, x, cache, jnp.int32(at)), packed(params, x, q, jnp.int32(at))
        np.testing.assert_allclose(y, want, rtol=1e-4, atol=1e-4)
        at += 12
    assert isinstance(cache, jax.Array) and q.quantized_tokens(24) >= 16
    both = jnp.concatenate([rows(12), x])
    np.testing.assert_allclose(cache[:24], both @ params.dequantize(), rtol=1e-5, atol=1e-5)
    # What the same program computes from a float cache is something else.
    assert not np.allclose(fn(params.dequantize(), x, cache, jnp.int32(12))[0], want, atol=1e-3)


def test_gradients_reach_what_was_written_where_rounding_clips_nothing():
    """Per token and symmetric nothing is clipped: the gradient is that of the identity; what was never written has none."""

    def fn(w, x, cache, at):
        cache = jax.lax.dynamic_update_slice(cache, x @ w, (at, 0))
        return cache * 1.0, cache

    fq, x, weights = qjax.fake_quant(fn, policy(TOKENS)), rows(12), rows(CAPACITY, 5)
    loss = lambda w, cache: jnp.sum(fq(w, x, cache, jnp.int32(4))[0] * weights)  # noqa: E731
    by_w, by_cache = jax.jit(jax.grad(loss, argnums=(0, 1)))(W, EMPTY)
    np.testing.assert_allclose(by_w, x.T @ weights[4:16], rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(by_cache[:4], weights[:4], rtol=1e-4, atol=1e-4)
    assert not np.any(by_cache[4:])
    read = fq(W, x, EMPTY, jnp.int32(4))[0]
    packed = qjax.quantized_cache(fn, policy(TOKENS))(W, x, EMPTY, jnp.int32(4))
    np.testing.assert_array_equal(read, qjax.quantized(fn)(W, x, packed, jnp.int32(4))[0])


def test_what_was_not_written_yet_is_read_as_it_came_and_misfits_are_refused():
    rules = policy(KEYS)
    y, _ = qjax.fake_quant(read_twice, rules)(W, rows(3), EMPTY + 1.0, jnp.int32(9))
    want, _ = qjax.fake_quant(attend, rules)(W, rows(3), EMPTY + 1.0, jnp.int32(9))
    first = qjax.core.append_cache(qjax.quantized_cache(attend, rules)(W, rows(3), EMPTY, jnp.int32(0)), EMPTY[:9] + 1.0, 0).read()[0]
    np.testing.assert_allclose(y, want + CAPACITY * WIDTH + first, rtol=1e-5)
    with pytest.raises(ValueError, match=r"has room for 32 tokens, of which .* leaves up to 40 float"):
        qjax.fake_quant(attend, policy(qjax.kv_cache(qjax.int8(), window=40)))(W, rows(3), EMPTY, jnp.int32(0))
    without = qjax.fake_quant(lambda p, x: x @ p, Policy([Rule("2", cache=KEYS), Rule("*", weight=qjax.int8())]))
    assert without(W, rows(3)).shape == (3, WIDTH)  # a program without caches trains without them
