"""A packed cache of tokens: what is stored, that it is rounded once, and that it takes the bytes it should."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import qjax
from qjax.core import IntSpec, append_cache, init_cache, quantize, read_cache

LENGTH = 29
append = jax.jit(append_cache)


def tokens(shape, dtype=jnp.float32, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), dtype)


def cut(x, start, stop, axis):
    return jax.lax.slice_in_dim(x, start, stop, axis=axis)


def filled(x, spec, axis, steps):
    cache, at = init_cache(x.shape, x.dtype, spec, axis), 0
    for n in steps:
        cache = append(cache, cut(x, at, at + n, axis), at)
        at += n
    return cache


def uint4_by_hand(x, axis):
    """Asymmetric 4 bit as in the paper: zero point and scale from the least and the greatest value that share them, in float64."""
    low, high = np.minimum(x.min(axis, keepdims=True), 0), np.maximum(x.max(axis, keepdims=True), 0)
    scale = (high - low) / 15
    zero = np.round(-low / scale)
    return (np.clip(np.round(x / scale) + zero, 0, 15) - zero) * scale


CASES = {
    "token": (qjax.kv_cache(qjax.uint4(), window=0), 29),
    "token, groups of channels": (qjax.kv_cache(qjax.uint4(), group_size=4, window=5), 24),
    "channel": (qjax.kv_cache(qjax.uint4(), "channel", group_size=4, window=0), 28),
    "channel, window": (qjax.kv_cache(qjax.uint4(), "channel", group_size=4, window=6), 20),
}


@pytest.mark.parametrize(("name", "axis"), [*((name, -2) for name in CASES), ("channel, window", -3), ("channel, window", -1)])
def test_old_tokens_are_rounded_as_in_the_paper_and_the_latest_are_float(name, axis):
    spec, packed = CASES[name]
    shape = [3, 8]
    shape.insert(len(shape) + 1 + axis, LENGTH)
    x = tokens(shape)
    rows = np.moveaxis(np.asarray(x, np.float64), axis, -2)
    group, along = (4, -2) if spec.per == "channel" else (spec.group_size or 8, -1)
    old = rows[:, :packed]
    split = (3, packed // group, group, 8) if along == -2 else (3, packed, 8 // group, group)
    wanted = np.concatenate([uint4_by_hand(old.reshape(split), along).reshape(old.shape), rows[:, packed:]], 1)
    read = np.moveaxis(np.asarray(filled(x, spec, axis, [20, 1, 8]).read()), axis, -2)
    np.testing.assert_allclose(read, wanted, rtol=0, atol=1e-6)
    np.testing.assert_array_equal(read[:, packed:], rows[:, packed:].astype(np.float32))


@pytest.mark.parametrize("name", CASES)
def test_a_token_is_rounded_once_however_it_came(name):
    spec, packed = CASES[name]
    x = tokens((2, LENGTH, 8))
    whole = filled(x, spec, 1, [LENGTH])
    for steps in ([1] * LENGTH, [5, 1, 1, 5, 1, 1, 5, 5, 5]):
        np.testing.assert_array_equal(filled(x, spec, 1, steps).read(), whole.read())
    assert whole.quantized_tokens(LENGTH) == packed


def test_codes_never_change_once_written():
    spec = qjax.kv_cache(qjax.uint2(), "channel", group_size=4, window=3)
    x = tokens((2, LENGTH, 8))
    cache, seen, groups = init_cache(x.shape, x.dtype, spec, 1), [], 0
    for t in range(LENGTH):
        cache = append(cache, x[:, t : t + 1], t)
        for old, now in zip(seen, jax.tree.leaves(cache.past), strict=False):
            np.testing.assert_array_equal(now[:, :groups], old)
        groups = cache.quantized_tokens(t + 1) // 4
        seen = [np.asarray(leaf[:, :groups]) for leaf in jax.tree.leaves(cache.past)]
    assert groups == 6


@pytest.mark.parametrize(("make", "bits"), [(qjax.int8, 8), (qjax.int4, 4), (qjax.int3, 3), (qjax.int2, 2)])
def test_codes_take_their_true_width(make, bits):
    values, window = 2 * 64 * 16, 2 * 8 * 16 * 4
    cache = init_cache((2, 64, 16), jnp.float32, qjax.kv_cache(make(scale_dtype="float16"), window=8), 1)
    assert cache.nbytes == values * bits // 8 + 2 * 64 * 2 + window + 2 * 4
    keys = init_cache((2, 64, 16), jnp.bfloat16, qjax.kv_cache(make(scale_dtype="float16"), "channel", group_size=8, window=0), 1)
    assert keys.nbytes == values * bits // 8 + 2 * 8 * 16 * 2 + 2 * 7 * 16 * 2 + 2 * 4
    assert keys.window.shape == (2, 7, 16)  # a group that is not full yet


SPECS = [qjax.uint2(), qjax.nf4(8), qjax.int8(), qjax.int4(group_size=4), qjax.fp8_e4m3(), qjax.fp8_e5m2()]
QUICK = [(SPECS[0], "token"), (SPECS[1], "channel"), (SPECS[4], "token")]
REST = [(spec, per) for spec in SPECS for per in ("token", "channel") if (spec, per) not in QUICK]


@pytest.mark.parametrize(("spec", "per"), [*QUICK, *(pytest.param(*pair, marks=pytest.mark.slow) for pair in REST)], ids=str)
def test_every_spec_in_bfloat16_the_same_under_jit(spec, per):
    own = getattr(spec.granularity, "size", None)
    spec = qjax.kv_cache(spec, per, group_size=own or (8 if per == "channel" else None), window=4)
    x = tokens((2, LENGTH, 16), jnp.bfloat16)
    cache = filled(x, spec, 1, [LENGTH])
    eager = append_cache(init_cache(x.shape, x.dtype, spec, 1), x, 0)
    assert cache.read().dtype == jnp.bfloat16
    np.testing.assert_array_equal(jax.jit(read_cache)(cache), eager.read())
    error = np.abs(np.asarray(cache.read(), np.float32) - np.asarray(x, np.float32)).max()
    assert 0 < error < {8: 0.05 if isinstance(spec.spec, IntSpec) else 0.3, 4: 0.6, 2: 2.5}[spec.spec.bits]


@pytest.mark.parametrize("dtype", [pytest.param(jnp.float32, marks=pytest.mark.slow), jnp.bfloat16])
def test_rotation_spreads_what_is_large_in_few_channels(dtype):
    x = tokens((2, LENGTH, 32), dtype).at[..., 5].multiply(40)
    errors = []
    for rotate in (False, True):
        cache = filled(x, qjax.kv_cache(qjax.uint4(), window=5, rotate=rotate), 1, [LENGTH])
        assert cache.dtype == cache.read().dtype == dtype
        np.testing.assert_array_equal(cache.read()[:, 24:], x[:, 24:])
        errors.append(float(jnp.mean((cache.read() - x).astype(jnp.float32) ** 2)))
    assert errors[1] < 0.6 * errors[0]


def test_zeros_stay_zeros_and_there_is_nothing_beyond_the_last_token():
    spec = qjax.kv_cache(qjax.uint4(), "channel", group_size=4, window=2)
    x = tokens((2, LENGTH, 8)).at[:, ::3].set(0)
    read = np.asarray(filled(x, spec, 1, [11, 1, 1]).read())
    assert not read[:, :13:3].any()
    assert not read[:, 13:].any()
    assert read[:, 12 - 1].any()


@pytest.mark.parametrize("per", ["token", "channel"])
def test_a_position_that_goes_back_takes_tokens_back(per):
    spec = qjax.kv_cache(qjax.uint4(), per, group_size=4, window=4)
    x, other = tokens((2, LENGTH, 8)), tokens((2, 2, 8), seed=1)
    long = filled(x, spec, 1, [24])
    cache = append(long, other, 18)
    read, old = np.asarray(cache.read()), np.asarray(long.read())
    kept = cache.quantized_tokens(20)
    assert kept == 16 < long.quantized_tokens(24) == 20
    np.testing.assert_array_equal(read[:, :17], old[:, :17])  # also 16, whose float numbers are gone
    np.testing.assert_array_equal(read[:, 17], old[:, 17] if per == "token" else x[:, 17])  # the ring of groups still has it
    np.testing.assert_array_equal(read[:, 18:20], other)
    assert not read[:, 20:].any()
    np.testing.assert_array_equal(np.asarray(append(cache, other, 20).read())[:, :16], old[:, :16])  # not rounded again
    again = append(cache, x[:, :4], 0)  # another text from the beginning
    np.testing.assert_array_equal(again.read(), filled(x, spec, 1, [4]).read())


class Tokens:
    """What a packed cache of tokens (capacity, channels) must hold, written with lists of tokens: no ring, no slots, no clipping.

    Attributes:
      known: of each token the best numbers that are left: as it was given, or as it was rounded once only that is kept.
      packed: of each token what its group was rounded to.
      length: how many there are.
    """

    def __init__(self, shape, spec):
        self.spec, self.length, self.known, self.packed = spec, 0, np.zeros(shape, np.float32), np.zeros(shape, np.float32)

    def past(self, length):
        return max(length - self.spec.window, 0) // self.spec.tokens * self.spec.tokens

    def append(self, new, start):
        spec, before = self.spec, min(self.past(self.length), start)
        forgotten = max(self.length - spec.held, 0)  # float numbers of the tokens before are gone
        self.known[:forgotten] = self.packed[:forgotten]
        self.known[start : start + len(new)] = new
        self.length = start + len(new)
        for at in range(before // spec.tokens * spec.tokens, self.past(self.length), spec.tokens):
            group = slice(at, at + spec.tokens)
            axis = -1 if spec.per == "token" else 0
            self.packed[group] = quantize(self.known[group], spec.stored, axes=(axis,)).dequantize()

    def read(self):
        past, out = self.past(self.length), np.zeros_like(self.known)
        out[:past], out[past : self.length] = self.packed[:past], self.known[past : self.length]
        return out


@pytest.mark.parametrize("per", ["token", "channel"])
def test_any_appends_and_rewinds_are_those_of_a_list_of_tokens(per):
    spec, rng = qjax.kv_cache(qjax.uint4(), per, group_size=4, window=4), np.random.default_rng(0)
    cache, model = init_cache((40, 8), jnp.float32, spec, 0), Tokens((40, 8), spec)
    for _ in range(150):
        count = int(rng.choice([1, 3, 20], p=[0.6, 0.2, 0.2]))
        last = min(model.length, 40 - count)
        start = max(last - int(rng.choice([0, 2, 4, 6, 15])), 0)
        new = rng.normal(size=(count, 8)).astype(np.float32)
        cache = append(cache, new, start)
        model.append(new, start)
        assert np.asarray(cache.length) == model.length
        np.testing.assert_array_equal(cache.read(), model.read())


def test_two_rewinds_give_back_the_tokens_between_them():
    spec = qjax.kv_cache(qjax.int8(), "channel", group_size=4, window=4)
    cache = init_cache((40, 1), jnp.float32, spec, 0)
    for count, start in ((40, 0), (1, 20), (1, 18)):
        cache = append(cache, jnp.arange(start, start + count, dtype=jnp.float32)[:, None] + 1, start)
    np.testing.assert_allclose(cache.read()[:19, 0], np.arange(19) + 1, atol=0.1)


@pytest.mark.parametrize("spec", [qjax.uint8(), qjax.fp8_e4m3()], ids=str)
def test_nan_is_read_back_as_nan_inside_and_outside_of_jit(spec):
    x = tokens((6, 8)).at[1, 2].set(jnp.nan)
    empty = init_cache((6, 8), jnp.float32, qjax.kv_cache(spec, window=1), 0)
    eager = np.asarray(append_cache(empty, x, 0).read())
    np.testing.assert_array_equal(eager, append(empty, x, 0).read())
    assert np.isnan(eager[1, 2]) and np.isfinite(eager[[0, 2, 3, 4, 5]]).all()


def test_a_cache_is_taken_back_by_writing_nothing():
    spec, x = qjax.kv_cache(qjax.uint8(), "channel", group_size=4, window=2), tokens((16, 8))
    long = append_cache(init_cache((16, 8), jnp.float32, spec, 0), x[:12], 0)
    short = append_cache(long, x[:0], 6)
    assert int(short.length) == 6
    np.testing.assert_array_equal(short.read()[:6], long.read()[:6])


@pytest.mark.slow
def test_rows_with_positions_of_their_own_and_layers():
    spec = qjax.kv_cache(qjax.uint4(), "channel", group_size=4, window=3)
    x = tokens((2, LENGTH, 8))
    make = functools.partial(init_cache, (LENGTH, 8), jnp.float32, spec, 0)
    caches = jax.tree.map(lambda *leaves: jnp.stack(leaves), *(append(make(), x[i, :n], 0) for i, n in enumerate((12, 17))))
    step = jax.jit(jax.vmap(append_cache))(caches, x[:, 20:21], jnp.int32([12, 17]))
    for i, n in enumerate((12, 17)):
        alone = append(append(make(), x[i, :n], 0), x[i, 20:21], n)
        np.testing.assert_array_equal(jax.vmap(read_cache)(step)[i], alone.read())
    _, scanned = jax.lax.scan(lambda _, layer: (None, read_cache(layer)), None, step)
    np.testing.assert_array_equal(scanned, jax.vmap(read_cache)(step))


def test_a_position_beyond_the_end_is_clamped_as_an_update_of_a_slice_is():
    spec, x = qjax.kv_cache(qjax.int8(), window=2), tokens((8, 4))
    cache = append_cache(init_cache((8, 4), jnp.float32, spec, 0), x, 0)
    np.testing.assert_array_equal(append(cache, x[:3], 7).read()[6:], x[1:3])


@pytest.mark.parametrize(
    ("make", "error", "words"),
    [
        (lambda: qjax.kv_cache(qjax.bf16()), TypeError, ["`spec`", "bf16()", "dtype"]),
        (lambda: qjax.kv_cache("int4"), TypeError, ["`spec`", "'int4'"]),
        (lambda: qjax.kv_cache(qjax.int4(per="tensor")), ValueError, ["`spec`", "tensor", "`per`"]),
        (lambda: qjax.kv_cache(qjax.learned(2)), ValueError, ["`spec`", 'learned(2, per="channel")', "qjax.uint2()", "nf4"]),
        (lambda: qjax.kv_cache(qjax.int4(), "head"), ValueError, ["`per`", "'head'", "channel"]),
        (lambda: qjax.kv_cache(qjax.int4(), window=-1), ValueError, ["`window`", "-1"]),
        (lambda: qjax.kv_cache(qjax.int4(), group_size=0), ValueError, ["`group_size`", "0"]),
        (lambda: qjax.kv_cache(qjax.int4(group_size=8), group_size=4), ValueError, ["`group_size` 4", "8"]),
        (lambda: init_cache((64, 32), jnp.float32, qjax.kv_cache(qjax.nvfp4()), 0), ValueError, ["nvfp4", "shares", "tokens"]),
        (lambda: init_cache((64, 8), jnp.float32, qjax.kv_cache(qjax.nf4(8, double_quant=True)), 0), ValueError, ["nf4", "shares"]),
        (lambda: init_cache((64, 8), jnp.int32, qjax.kv_cache(qjax.int4()), 0), TypeError, ["`dtype`", "int32"]),
        (lambda: init_cache((64, 8), jnp.float32, qjax.kv_cache(None), 0), TypeError, ["`spec`", "float"]),
        (lambda: init_cache((64, 8), jnp.float32, qjax.kv_cache(qjax.int4()), 2), ValueError, ["`axis`", "2"]),
        (lambda: init_cache((32, 8), jnp.float32, qjax.kv_cache(qjax.int4()), 0), ValueError, ["32 tokens", "`window`"]),
        (lambda: init_cache((64, 8), jnp.float32, qjax.kv_cache(qjax.int4(), group_size=3), 0), ValueError, ["`cache`", "3"]),
    ],
)
def test_bad_input(make, error, words):
    with pytest.raises(error) as caught:
        make()
    for word in words:
        assert word in str(caught.value)


def test_it_has_no_arithmetic_and_says_what_to_do():
    cache = init_cache((64, 8), jnp.float32, qjax.kv_cache(qjax.int4()), 0)
    with pytest.raises(TypeError, match=r"qjax\.quantized"):
        cache + 1
    assert np.asarray(cache).shape == cache.shape == (64, 8)


def test_a_cache_that_saves_nothing_says_so():
    small, large = (init_cache((32, 4), jnp.float32, qjax.kv_cache(qjax.int8(), window=window), axis=0) for window in (4, 28))
    assert "no fewer" not in repr(small) and small.nbytes < 32 * 4 * 4 <= large.nbytes
    assert repr(large).endswith("bits/value: no fewer than the 512 of a float cache, for 28 tokens stay float)")
