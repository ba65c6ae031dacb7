"""`decode_attention` in interpret mode against float64 attention to the dequantized cache."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu
from qjax_kernels.request import Cached, CacheRead, Device
from qjax_kernels.tpu.attention import decode_attention, why_not


def operands(b=3, h=4, g=2, t=300, d=64, dtype=jnp.float32, codes=jnp.int8, seed=0):
    rng = np.random.default_rng(seed)
    low = -8 if codes == jnp.int4 else -128
    k, v = (jnp.asarray(rng.integers(low, -low, (b, g, t, d)), codes) for _ in range(2))
    k_scale, v_scale = (jnp.asarray(rng.uniform(0.5, 1.5, (b, g, t)) / -low, jnp.float32) for _ in range(2))
    return jnp.asarray(rng.normal(size=(b, h, d)), dtype), k, k_scale, v, v_scale


def exact(q, k, k_scale, v, v_scale, length):
    """Of one sequence: (H, D) and log-sum-exp (H,)."""
    share = q.shape[0] // k.shape[0]
    keys, values = (np.float64(c)[:, :length] * np.float64(s)[:, :length, None] for c, s in ((k, k_scale), (v, v_scale)))
    keys, values = (np.repeat(a, share, axis=0) for a in (keys, values))
    scores = np.einsum("hd,htd->ht", np.float64(q), keys) / np.sqrt(q.shape[1])
    p = np.exp(scores - scores.max(1, keepdims=True))
    return np.einsum("ht,htd->hd", p / p.sum(1, keepdims=True), values), np.log(p.sum(1)) + scores.max(1)


@pytest.mark.parametrize(("codes", "dtype", "near"), [(jnp.int8, jnp.float32, 1e-5), (jnp.int4, jnp.bfloat16, 2**-7)])
def test_sequences_of_different_lengths(codes, dtype, near):
    given = operands(dtype=dtype, codes=codes)
    lengths = [1, 129, 300]
    o, total = decode_attention(*given, jnp.int32(lengths), chip="v6e", block=128, interpret=True)
    for i, length in enumerate(lengths):
        expected, logarithm = exact(*(a[i] for a in given), length)
        # p b is rounded to bfloat16, and o is: values lie within 1.5.
        np.testing.assert_allclose(np.float64(o[i]), expected, atol=near)
        np.testing.assert_allclose(total[i], logarithm, rtol=1e-5, atol=1e-5)


def test_what_lies_behind_the_length_is_not_looked_at():
    q, k, k_scale, v, v_scale = operands()
    lengths = jnp.int32([0, 100, 200])
    o, total = decode_attention(q, k, k_scale, v, v_scale, lengths, chip="v6e", block=128, interpret=True)
    broken = [s.at[1, :, 100:].set(jnp.nan) for s in (k_scale, v_scale)]
    again, _ = decode_attention(q, k, broken[0], v, broken[1], lengths, chip="v6e", block=128, interpret=True)
    np.testing.assert_array_equal(o, again)
    assert not np.any(o[0]) and np.all(total[0] == -1e30)


@pytest.mark.parametrize(("bits", "dtype", "near"), [(8, jnp.float32, 2e-5), (4, jnp.bfloat16, 2**-7)])
def test_codes_with_zero_points_and_bytes_of_two_with_tokens_in_the_last_axis(bits, dtype, near):
    q, k, k_scale, v, v_scale = operands(b=2, d=64, dtype=dtype, codes=jnp.int8 if bits == 8 else jnp.int4)
    half = 2 ** (bits - 1)
    k_zero, v_zero = (jnp.asarray(np.random.default_rng(i).integers(0, 2 * half, k_scale.shape), jnp.float32) for i in (1, 2))
    unsigned = [(a.astype(jnp.int32) + half).astype(jnp.uint8) for a in (k, v)]
    # The same as signed codes that are moved: their zero points are half a range lower.
    moved = [np.float64(a) - np.float64(z)[..., None] for a, z in zip(unsigned, (k_zero, v_zero), strict=True)]
    laid = unsigned if bits == 8 else [(a[..., ::2] | a[..., 1::2] << 4).swapaxes(2, 3) for a in unsigned]
    lengths = jnp.int32([129, 300])
    how = {"chip": "v6e", "block": 128, "interpret": True}
    o, total = decode_attention(q, laid[0], k_scale, laid[1], v_scale, lengths, k_zero, v_zero, tokens_last=bits == 4, **how)
    for i, length in enumerate((129, 300)):
        expected, logarithm = exact(q[i], moved[0][i], k_scale[i], moved[1][i], v_scale[i], length)
        np.testing.assert_allclose(np.float64(o[i]), expected, atol=near * 2)
        np.testing.assert_allclose(total[i], logarithm, rtol=1e-5, atol=1e-5)


def test_two_parts_join_by_their_log_sum_exps():
    q, k, k_scale, v, v_scale = operands(b=1, t=256)
    with pytest.raises(ValueError, match="`k_zero` and `v_zero` come together"):
        decode_attention(q, k, k_scale, v, v_scale, jnp.int32([128]), None, v_scale, chip="v6e", interpret=True)
    parts = [
        decode_attention(q, k[:, :, at], k_scale[:, :, at], v[:, :, at], v_scale[:, :, at], jnp.int32([n]), chip="v6e", interpret=True)
        for at, n in ((slice(0, 128), 128), (slice(128, 256), 100))
    ]
    weights = np.exp(np.stack([t for _, t in parts]) - np.logaddexp(*(np.float64(t) for _, t in parts)))
    joined = sum(w[..., None] * np.float64(o) for w, (o, _) in zip(weights, parts, strict=True))
    whole, _ = decode_attention(q, k, k_scale, v, v_scale, jnp.int32([228]), chip="v6e", block=128, interpret=True)
    np.testing.assert_allclose(joined, whole, atol=1e-5)


@pytest.mark.slow
def test_no_race(capfd):
    given = operands(b=2, h=2, g=1, t=200)
    lengths = jnp.int32([150, 20])
    o, _ = decode_attention(*given, lengths, chip="v6e", block=128, interpret=pltpu.InterpretParams(detect_races=True))
    assert "RACE" not in capfd.readouterr().out
    np.testing.assert_allclose(o[0], exact(*(a[0] for a in given), 150)[0], atol=1e-5)


def test_reasons_are_named():
    four = Cached("int", 4)
    read = CacheRead(Device("tpu", "v6e"), 1, 128, 512, four, four)

    def asked(keys=four, values=None, **more):
        return why_not(dataclasses.replace(read, keys=keys, values=values or keys, **more))

    assert not asked() and not asked(Cached("uint", 8, group_size=128))
    assert "cuda" in asked(device=Device("cuda", "sm_90a"))
    assert "2 bits" in asked(Cached("int", 2))
    assert "kind other" in asked(Cached("other", 4))
    assert "values: groups of 32" in asked(values=Cached("int", 4, group_size=32))
    assert "keys: 32 tokens share" in asked(Cached("uint", 4, tokens=32))
    assert "keys are int4 and values int8" in asked(values=Cached("int", 8))
    assert "19 queries a head" in asked(queries=19)
    assert "24 channels of 4 bits" in asked(channels=24)


@pytest.mark.parametrize(
    ("at", "value", "words"),
    [
        (0, jnp.ones((3, 3, 64)), "`q` .* do not fit"),
        (3, jnp.ones((3, 2, 300, 64)), "`k` and `v` must be int4"),
        (2, jnp.ones((3, 2, 299)), "`k_scale`"),
        (5, jnp.int32([1]), "`lengths`"),
    ],
)
def test_wrong_arguments_are_refused(at, value, words):
    given = [*operands(), jnp.int32([1, 2, 3])]
    given[at] = value
    with pytest.raises(ValueError, match=words):
        decode_attention(*given, chip="v6e")
