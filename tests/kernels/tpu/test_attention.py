"""`decode_attention` in interpret mode against float64 attention to the dequantized cache."""

import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu
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


def test_two_parts_join_by_their_log_sum_exps():
    q, k, k_scale, v, v_scale = operands(b=1, t=256)
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
    assert not why_not("tpu", "v6e", 4, 128, None)
    assert "cuda" in why_not("cuda", "sm_90a", 8, 128, None)
    assert "2 bits" in why_not("tpu", "v6e", 2, 128, None)
    assert "zero point" in why_not("tpu", "v6e", 8, 128, None, zero_point=True)
    assert "groups of 32" in why_not("tpu", "v6e", 8, 128, 32)


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
