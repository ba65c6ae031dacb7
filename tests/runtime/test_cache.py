"""Packed caches in programs: found by data flow, written and kept in their packed form, read where they are read."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx

import qjax
from qjax.models import Llama, LlamaConfig, generate, init_cache, stack_layers

CAPACITY, WIDTH = 32, 16
CONFIG = LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
                     num_key_value_heads=2, head_dim=8, max_position_embeddings=64)  # fmt: skip
KEYS = qjax.kv_cache(qjax.uint8(), "channel", group_size=8, window=8)
POLICY = qjax.Policy([qjax.Rule("*/key", cache=KEYS), qjax.Rule("*/value", cache=qjax.kv_cache(qjax.uint8(), window=8))])


def rule(pattern="2", spec=None, **options):
    return qjax.Policy([qjax.Rule(pattern, cache=qjax.kv_cache(spec or qjax.uint8(), window=4, **options))])


def write(cache, x, position):
    return jax.lax.dynamic_update_slice_in_dim(cache, x, position, axis=0)


def attend(params, x, cache, position):
    cache = write(cache, x @ params, position)
    return jax.nn.softmax(x @ cache.T) @ cache, cache


def in_a_call(params, x, cache, position):
    return jax.jit(attend)(params, x, cache, position)


def rematerialized(params, x, cache, position):
    return jax.checkpoint(attend)(params, x, cache, position)


def in_a_branch(params, x, cache, position):
    return jax.lax.cond(position >= 0, lambda: attend(params, x, cache, position), lambda: (x, cache))


def in_a_loop_over_time(params, x, cache, position):
    def step(carry, row):
        cache, at = carry
        y, cache = attend(params, row[None], cache, at)
        return (cache, at + 1), y[0]

    (cache, _), y = jax.lax.scan(step, (cache, position), x)
    return y, cache


def in_a_while_loop(params, x, cache, position):
    def step(carry):
        i, cache, y = carry
        row, cache = attend(params, jax.lax.dynamic_slice_in_dim(x, i, 1), cache, position + i)
        return i + 1, cache, jax.lax.dynamic_update_slice_in_dim(y, row, i, 0)

    _, cache, y = jax.lax.while_loop(lambda c: c[0] < x.shape[0], step, (0, cache, jnp.zeros_like(x)))
    return y, cache


def read_twice(params, x, cache, position):
    before = cache.sum()
    y, cache = attend(params, x, cache, position)
    return y + before + cache[0], cache


PROGRAMS = [attend, in_a_call, rematerialized, in_a_branch, in_a_loop_over_time, in_a_while_loop, read_twice]


def rows(n, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=(n, WIDTH)), jnp.float32)


@pytest.mark.parametrize("fn", PROGRAMS, ids=lambda fn: fn.__name__)
def test_a_cache_is_written_packed_wherever_it_is_written(fn):
    params, x = jnp.eye(WIDTH) / 4, rows(12)
    empty = jnp.zeros((CAPACITY, WIDTH))
    packed = qjax.quantized_cache(fn, rule())(params, x[:5], empty, jnp.int32(0))
    run, plain, at, cache = jax.jit(qjax.quantized(fn)), jax.jit(fn), 0, empty
    for n in (5, 5, 2):
        y, packed = run(params, x[at : at + n], packed, jnp.int32(at))
        wanted, cache = plain(params, x[at : at + n], cache, jnp.int32(at))
        np.testing.assert_allclose(y, wanted, atol=0.05)
        at += n
    assert isinstance(packed, qjax.QCache)
    assert np.asarray(packed.length) == 12
    read = np.asarray(packed.read())
    np.testing.assert_array_equal(read[8:], cache[8:])
    assert 0 < np.abs(read[:8] - np.asarray(cache)[:8]).max() < 0.01


@functools.cache
def llama(scan, dtype=jnp.float32):
    model = Llama(CONFIG, scan_layers=scan, dtype=dtype)
    variables = Llama(CONFIG).init(jax.random.key(0), jnp.ones((1, 3), jnp.int32))
    return model, {"params": stack_layers(variables["params"])} if scan else variables


def packed_cache(model, variables, batch, length, policy=POLICY, dtype=jnp.float32):
    empty = init_cache(CONFIG, batch, length, dtype, scan_layers=model.scan_layers)
    return qjax.quantized_cache(model.apply, policy)(variables, jnp.zeros((batch, 1), jnp.int32), empty, jnp.int32(0))


@pytest.mark.slow
def test_generation_of_a_language_model():
    model, variables = llama(scan=True)
    prompt = jax.random.randint(jax.random.key(1), (2, 19), 0, 64)
    make = functools.partial(packed_cache, model, variables)
    made = generate(qjax.quantized(model.apply), variables, prompt, 12, init_cache=make, context_length=64).tokens
    plain = functools.partial(init_cache, CONFIG, scan_layers=True)
    wanted = generate(model.apply, variables, prompt, 12, init_cache=plain, context_length=64).tokens
    np.testing.assert_array_equal(made, wanted)  # 8 bit


@pytest.mark.slow
def test_layers_in_a_scan_hold_what_layers_in_a_row_do():
    tokens = jax.random.randint(jax.random.key(1), (2, 30), 0, 64)
    found = []
    for scan in (False, True):
        model, variables = llama(scan)
        cache = packed_cache(model, variables, 2, 64)
        logits, cache = jax.jit(qjax.quantized(model.apply))(variables, tokens, cache, jnp.int32(0))
        found.append((logits, cache))
    np.testing.assert_allclose(found[0][0], found[1][0], atol=1e-5)
    stacked = np.asarray(found[1][1]["layers"]["key"].read())
    for i in range(2):
        np.testing.assert_allclose(np.asarray(found[0][1][f"layers_{i}"]["key"].read()), stacked[i], atol=2e-2)


@pytest.mark.parametrize("scan", [pytest.param(False, marks=pytest.mark.slow), True])
def test_nothing_but_the_packed_form_is_kept_and_it_is_updated_in_place(scan):
    model, variables = llama(scan)
    cache = packed_cache(model, variables, 2, 64)
    step = jax.jit(qjax.quantized(model.apply), donate_argnums=2)
    compiled = step.lower(variables, jnp.zeros((2, 1), jnp.int32), cache, jnp.int32(9)).compile()
    leaves = jax.tree.leaves(cache)
    size, memory = sum(leaf.nbytes for leaf in leaves), compiled.memory_analysis()
    logits = 2 * 64 * 4
    assert size == sum(c.nbytes for c in jax.tree.leaves(cache, is_leaf=lambda c: isinstance(c, qjax.QCache)))
    assert memory.alias_size_in_bytes == size
    assert size + logits <= memory.output_size_in_bytes <= size + logits + 16 * (len(leaves) + 1)  # and pointers
    results = re.search(r"->\s*\((.*?)\)\}", compiled.as_text().splitlines()[0])
    shapes = re.findall(r"f32\[([\d,]+)\]", results.group(1))
    full = 2 * 64 * CONFIG.num_key_value_heads * CONFIG.head_dim
    assert shapes and all(np.prod(list(map(int, shape.split(",")))) < full for shape in shapes)  # no float cache


@pytest.mark.slow
def test_packed_parameters_and_a_packed_cache_in_bfloat16():
    model, variables = llama(False, jnp.bfloat16)
    policy = qjax.Policy([*POLICY.rules, qjax.Rule("*proj*", weight=qjax.int8())])
    tokens = jax.random.randint(jax.random.key(1), (2, 20), 0, 64)
    result = qjax.quantize(model.apply, variables, policy, calibration=[tokens])
    cache = packed_cache(model, result.params, 2, 64, result.policy, jnp.bfloat16)
    run = jax.jit(qjax.quantized(model.apply))
    logits, cache = run(result.params, tokens, cache, jnp.int32(0))
    assert cache["layers_1"]["key"].dtype == jnp.bfloat16
    plain, _ = jax.jit(model.apply)(variables, tokens, init_cache(CONFIG, 2, 64, jnp.bfloat16), jnp.int32(0))
    np.testing.assert_allclose(logits, plain, atol=0.05)


def test_a_cache_in_the_state_of_a_module():
    x = jax.random.normal(jax.random.key(0), (2, 6, 16))
    linen = nn.MultiHeadDotProductAttention(num_heads=2, qkv_features=16, decode=True)
    variables = linen.init(jax.random.key(1), jnp.zeros((2, 16, 16)))
    module = nnx.MultiHeadAttention(num_heads=2, in_features=16, qkv_features=16, decode=True, rngs=nnx.Rngs(0))
    module.init_cache((2, 16, 16))
    graph, state = nnx.split(module)

    def linen_step(variables, x):
        y, new = linen.apply(variables, x, mutable=["cache"])
        return y, variables | new

    def nnx_step(state, x):
        merged = nnx.merge(graph, state)
        return merged(x), nnx.state(merged)

    for fn, given in ((linen_step, variables), (nnx_step, state)):
        assert [cache.axis for cache in qjax.trace(fn, given, x[:, :1]).caches] == [-3, -3]
        packed = qjax.quantized_cache(fn, rule("*cached_*"), argnum=0)(given, x[:, :1])
        run, plain = jax.jit(qjax.quantized(fn)), jax.jit(fn)
        for i in range(6):
            y, packed = run(packed, x[:, i : i + 1])
            wanted, given = plain(given, x[:, i : i + 1])
            np.testing.assert_allclose(y, wanted, atol=0.03)
        found = [c for c in jax.tree.leaves(packed, is_leaf=lambda c: isinstance(c, qjax.QCache)) if isinstance(c, qjax.QCache)]
        assert [c.length.min() for c in found] == [6, 6]


def test_rows_at_positions_of_their_own():
    params, x = jnp.eye(WIDTH) / 4, rows(8)
    make = functools.partial(qjax.quantized_cache(attend, rule(), length=6), params, x[:1])
    caches = [make(jnp.pad(rows(6, seed), ((0, CAPACITY - 6), (0, 0))), jnp.int32(0)) for seed in (1, 2)]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *caches)
    run = qjax.quantized(attend)
    y, new = jax.jit(jax.vmap(run, in_axes=(None, 0, 0, 0)))(params, jnp.stack([x[:1], x[1:2]]), stacked, jnp.int32([6, 3]))
    for i, position in enumerate((6, 3)):
        alone, cache = jax.jit(run)(params, x[i : i + 1], caches[i], jnp.int32(position))
        np.testing.assert_allclose(y[i], alone, atol=1e-6)
        assert new.length[i] == cache.length == position + 1


def test_a_cache_that_holds_tokens_is_packed_with_them():
    params, x = jnp.eye(WIDTH), rows(9)
    held = jnp.pad(x, ((0, CAPACITY - 9), (0, 0)))
    cache = qjax.quantized_cache(attend, rule(), length=9)(params, x[:1], held, jnp.int32(0))
    np.testing.assert_allclose(cache.read(), held, atol=0.02)
    np.testing.assert_array_equal(cache.read()[5:], held[5:])


def scattered(params, x, cache, position):
    return x, cache.at[position + jnp.arange(x.shape[0])].set(x)


def not_returned(params, x, cache, position):
    return write(cache, x, position) @ x.T


def changed(params, x, cache, position):
    return x, write(cache, x, position) * 2


def not_used(params, x, cache, position):
    return x @ params


@pytest.mark.parametrize(
    ("fn", "policy", "words"),
    [
        (attend, rule("*/key"), ["'*/key'", "matches no input", "'2'"]),
        (attend, rule("0"), ["'0'", "matches no input"]),
        (attend, rule("1"), ["'1'", "dot_general", "its caches are '2'".removeprefix("its ")]),
        (scattered, rule(), ["'2'", "scatter", "dynamic_update_slice"]),
        (not_returned, rule(), ["'2'", "does not come back"]),
        (changed, rule(), ["'2'", "does not come back"]),
        (not_used, rule(), ["'2'", "never uses"]),
        (attend, qjax.Policy([qjax.Rule("*", weight=qjax.int8())]), ["no rule with a `cache`"]),
        (attend, rule(spec=qjax.int4(group_size=5)), ["`2`", "5"]),
        (attend, rule(per="channel", group_size=64), ["`2`", "32 tokens", "`group_size`"]),
        (attend, qjax.Policy([*rule("*").rules, *rule("2").rules]), ["'2'", "never reached"]),
    ],
)
def test_what_is_no_cache_is_named(fn, policy, words):
    with pytest.raises(ValueError) as caught:
        qjax.quantized_cache(fn, policy)(jnp.eye(WIDTH), rows(1), jnp.zeros((CAPACITY, WIDTH)), jnp.int32(0))
    for word in words:
        assert word in str(caught.value)


def test_other_bad_input():
    params, x, empty, start = jnp.eye(WIDTH), rows(1), jnp.zeros((CAPACITY, WIDTH)), jnp.int32(0)
    cache = qjax.quantized_cache(attend, rule())(params, x, empty, start)
    with pytest.raises(ValueError, match="`2` holds tokens, which would be lost: pass `length=`"):
        qjax.quantized_cache(attend, rule())(params, x, empty + 1, start)
    with pytest.raises(ValueError, match="`length` 99"):
        qjax.quantized_cache(attend, rule(), length=99)(params, x, empty, start)
    with pytest.raises(ValueError, match="`argnum` 1 is not the argument of the cache '2'"):
        qjax.quantized_cache(attend, rule(), argnum=1)(params, x, empty, start)
    with pytest.raises(ValueError, match="`argnum` 'cache' is no keyword"):
        qjax.quantized_cache(attend, rule(), argnum="cache")(params, x, empty, start)
    with pytest.raises(ValueError, match="`2` is packed already"):
        qjax.quantized_cache(attend, rule())(params, x, cache, start)
    with pytest.raises(ValueError, match=r"`2` is a packed cache, but in this function it is none: .*scatter"):
        qjax.quantized(scattered)(params, x, cache, start)
    with pytest.raises(ValueError, match="along axis -2, and the function writes along -1"):
        square = qjax.quantized_cache(attend, rule())(params, x, jnp.zeros((WIDTH, WIDTH)), start)
        qjax.quantized(lambda p, x, c, at: (x, jax.lax.dynamic_update_slice_in_dim(c, x.T, at, axis=1)))(params, x, square, start)
    with pytest.raises(TypeError, match="`policy`"):
        qjax.quantized_cache(attend, POLICY.rules)  # type: ignore[arg-type]


def test_keywords_name_caches_and_none_leaves_one_float():
    def fn(params, x, *, first, second, position):
        y, first = attend(params, x, first, position)
        return y, {"first": first, "second": write(second, x, position)}

    policy = qjax.Policy([qjax.Rule("second", cache=qjax.kv_cache(None)), *rule("*").rules])
    shape = jax.ShapeDtypeStruct((CAPACITY, WIDTH), jnp.float32)
    given = {"first": shape, "second": shape, "position": jnp.int32(0)}
    first = qjax.quantized_cache(fn, policy, argnum="first")(jnp.eye(WIDTH), rows(1), **given)
    assert isinstance(first, qjax.QCache)
    _, new = qjax.quantized(fn)(jnp.eye(WIDTH), rows(1), first=first, second=jnp.zeros(shape.shape), position=jnp.int32(0))
    assert isinstance(new["first"], qjax.QCache) and isinstance(new["second"], jax.Array)
