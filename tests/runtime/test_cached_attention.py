"""Decoding with `cached_attention` on packed caches: through the TPU kernel, interpreted, and what makes it stay with XLA."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from qjax_kernels.request import Device

import qjax
from qjax.models import Llama, LlamaConfig, generate, init_cache
from qjax.runtime import cache_kernel_of, on_tpu, runtime_of
from tests.program.cases import normal

B, H, SHARE, S, D = 2, 2, 3, 48, 64
NAME = "tpu decode attention"


@functools.cache
def on_this_machine():
    """The kernel as one for this machine, that takes what it takes on a v6e; interpreted, it needs no TPU."""
    (kernel,) = on_tpu.cache_kernels()

    def there(read):
        return dataclasses.replace(read, device=Device("tpu", "v6e"))

    def run(read, operands):
        return kernel.run(there(read), operands, True)

    here = dataclasses.replace(kernel, platform="cpu", why_not=lambda read: kernel.why_not(there(read)), run=run)
    return {"kernels": (here,), "device": Device("cpu", "plain")}


def step(params, q, new, cache, position):
    cache = {name: jax.lax.dynamic_update_slice_in_dim(cache[name], new[name], position, axis=2) for name in cache}
    return qjax.cached_attention(q * params, cache["key"], cache["value"], position), cache


def inputs(t, seed):
    new = {"key": normal(B, H, t, D, seed=seed), "value": normal(B, H, t, D, seed=seed + 1)}
    return normal(B, H, SHARE, t, D, seed=seed + 2), new


@functools.cache
def filled(spec, **options):
    """A cache of 21 tokens."""
    one = qjax.core.init_cache((B, H, S, D), jnp.float32, qjax.kv_cache(spec, **options), 2)
    append = jax.jit(lambda new: jax.tree.map(lambda x: qjax.core.append_cache(one, x, 0), new))
    return append(inputs(21, 0)[1])


@pytest.mark.parametrize(("spec", "options"), [(qjax.int8(), {"window": 0}), (qjax.uint4(), {"window": 5})])
def test_a_token_is_decoded_on_codes(spec, options):
    cache, (q, new) = filled(spec, **options), inputs(1, 9)
    given = jnp.float32(1.5), q, new, cache, jnp.int32(21)
    run = jax.jit(qjax.quantized(step, kernel=NAME, **on_this_machine()))
    text = str(run.trace(*given).jaxpr)
    assert "name=decode_attention" in text and f"[{B},{H},{S},{D}]" not in text.replace(f"i8[{B},{H},{S},{D}]", "")
    (y, after), (want, plain) = run(*given), jax.jit(qjax.quantized(step, kernel="xla"))(*given)
    np.testing.assert_allclose(y, want, atol=2e-6)
    assert all(np.array_equal(*pair) for pair in zip(*map(jax.tree.leaves, (after, plain)), strict=True))


@pytest.mark.slow
def test_sequences_at_positions_of_their_own_and_gradients():
    fn, plain = qjax.quantized(step, **on_this_machine()), qjax.quantized(step, kernel="xla")
    caches = jax.tree.map(lambda leaf: jnp.stack([leaf, leaf]), filled(qjax.int8(), window=0))
    q, new = jax.tree.map(lambda *leaves: jnp.stack(leaves), inputs(1, 9), inputs(1, 12))

    def loss(fn, params, q):
        return (jax.vmap(fn, (None, 0, 0, 0, 0))(params, q, new, caches, jnp.int32([21, 9]))[0] ** 2).sum()

    found, wanted = (jax.jit(jax.value_and_grad(functools.partial(loss, f), (0, 1)))(jnp.float32(1.5), q) for f in (fn, plain))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=5e-6), found, wanted)


@pytest.mark.parametrize(
    ("keys", "values", "reason"),
    [
        (qjax.kv_cache(qjax.int8(), window=4), None, ""),
        (qjax.kv_cache(qjax.uint4(), per="channel", window=4), None, "keys keep 35 tokens in float and values 4"),
        (qjax.kv_cache(qjax.uint4(), per="channel", window=4), ..., f"{NAME}: keys: 32 tokens share"),
        (qjax.kv_cache(qjax.int4(), group_size=32, window=4), ..., f"{NAME}: keys: groups of 32 channels"),
        (qjax.kv_cache(qjax.nf4(group_size=64), window=4), ..., f"{NAME}: keys: codes of kind other with 4 bits"),
        (qjax.kv_cache(qjax.int4(), window=4), None, f"{NAME}: keys are int4 and values int8"),
    ],
    ids=str,
)
def test_what_is_left_to_xla_is_named(keys, values, reason):
    eight = qjax.kv_cache(qjax.int8(), window=4)
    made = [qjax.core.init_cache((B, H, S, D), jnp.bfloat16, spec, 2) for spec in (keys, {None: eight, ...: keys}[values])]
    name, reasons = cache_kernel_of(*made, runtime_of(device=Device("tpu", "v6e")))
    assert (name == "xla") == bool(reason) and "; ".join(reasons).startswith(reason)
    name, why = cache_kernel_of(*made, runtime_of(device=Device("cpu", "plain")))
    assert name == "xla" and (reason or why == ("there is no kernel that reads packed caches on cpu",))


def test_what_is_forced_and_cannot_run_is_refused_and_other_calls_of_the_name_are_left_alone():
    (q, new), how = inputs(2, 9), {**on_this_machine(), "kernel": NAME}
    given = jnp.ones(()), q, new, filled(qjax.int8(), window=0), jnp.int32(21)
    with pytest.raises(ValueError, match=f"`kernel` '{NAME}' cannot read the cache: 2 queries a head"):
        jax.eval_shape(qjax.quantized(step, **how), *given)
    jax.eval_shape(qjax.quantized(step, **{**how, "kernel": "xla"}), *given)

    def cached_attention_call(q, k, v, position):
        return q * k.mean() + v.mean() * position

    def other(params, q, new, cache, position):
        cache = {name: jax.lax.dynamic_update_slice_in_dim(cache[name], new[name], position, axis=2) for name in cache}
        return jax.jit(cached_attention_call)(q, cache["key"], cache["value"], position), cache

    assert "decode_attention" not in str(jax.make_jaxpr(qjax.quantized(other, **on_this_machine()))(*given))
    with pytest.raises(ValueError, match="the program changes the call"):
        jax.eval_shape(qjax.quantized(other, **how), *given)
    floats = dict.fromkeys(("key", "value"), jnp.zeros((B, H, S, D)))
    with pytest.raises(ValueError, match=r"the program hands none to qjax\.cached_attention"):
        jax.eval_shape(qjax.quantized(step, **how), jnp.ones(()), q, new, floats, jnp.int32(21))
    with pytest.raises(ValueError, match=r"`q` \(B, H, N, T, D\), `k` and `v` .* do not fit"):
        qjax.cached_attention(q, new["key"], new["value"][:, :1], 0)


@pytest.mark.slow
def test_a_language_model_says_the_same():
    config = LlamaConfig(vocab_size=64, hidden_size=64, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
                         num_key_value_heads=2, head_dim=64, max_position_embeddings=64)  # fmt: skip
    prompts = [[5, 9, 2, 33, 8, 1, 60, 7, 7, 3, 21, 40], [7, 1, 4, 4, 19, 63, 2, 2]]
    model = Llama(config, scan_layers=True)
    variables = model.init(jax.random.key(0), jnp.ones((1, 3), jnp.int32))
    rules = qjax.Policy([qjax.Rule("*", cache=qjax.kv_cache(qjax.int4(), window=4, rotate=True))])

    def empty(batch, length):
        cache = init_cache(config, batch, length, scan_layers=True)
        return qjax.quantized_cache(model.apply, rules)(variables, jnp.zeros((batch, 1), jnp.int32), cache, jnp.int32(0))

    run = qjax.quantized(model.apply, **on_this_machine())
    assert "name=decode_attention" in str(jax.make_jaxpr(run)(variables, jnp.ones((2, 1), jnp.int32), empty(2, 64), jnp.int32(9)))
    ours, theirs = (
        generate(apply, variables, prompts, 24, init_cache=empty, context_length=64).tokens
        for apply in (run, qjax.quantized(model.apply, kernel="xla"))
    )
    np.testing.assert_array_equal(ours, theirs)
