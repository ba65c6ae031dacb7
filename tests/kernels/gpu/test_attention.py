"""Attention in front of a chain, thread by thread in NumPy, against float64."""

import dataclasses

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from qjax_kernels.gpu.attention import Attention, Past, attended, fresh, kept, rotated, rotation
from qjax_kernels.gpu.chain import chain, counters, one_by_one
from qjax_kernels.gpu.chain_shape import Link, shapes_of, shared_bytes
from qjax_kernels.gpu.tiles import Direct

pytest.importorskip("absl")

from qjax_kernels.gpu.attention_kernel import Heads
from qjax_kernels.gpu.chain_kernel import follow

from tests.kernels.gpu.simulator import launch
from tests.kernels.gpu.test_chain import TAIL
from tests.kernels.gpu.test_direct import drawn

BF16 = ml_dtypes.bfloat16


def made(m, a, context, layers, places, turned, seed=0):
    """q, k and v of a token, and what came before: behind the last token the cache is NaN, which nobody may read."""
    draw = np.random.default_rng(seed)
    qkv = (2 * draw.normal(size=(m, a.columns))).astype(BF16)
    cache = draw.normal(size=(layers, 2, m, context, a.shared, a.width)).astype(BF16)
    for row, place in enumerate(places):
        cache[:, :, row, place:] = np.nan
    cache[:-1] = np.nan  # other layers
    table = np.array(rotation(jnp.asarray(places), a.width)) if turned else None
    return qkv, Past(cache, np.array([layers - 1], np.int32), np.array(places, np.int32), table)


def exact(qkv, past, a):
    """In float64."""
    m = len(qkv)
    heads = qkv.astype(np.float64).reshape(m, -1, a.width)
    q, k, v = np.split(heads, [a.heads, a.heads + a.shared], axis=1)
    if past.rotation is not None:
        cos, sin = (part[:, None].astype(np.float64) for part in np.split(past.rotation, 2, axis=1))
        q, k = (np.concatenate([p * cos - r * sin, r * cos + p * sin], -1) for p, r in (np.split(x, 2, axis=-1) for x in (q, k)))
        k = k.astype(BF16).astype(np.float64)
    found = np.zeros((m, a.heads, a.width))
    for row in range(m):
        before = past.cache[-1, :, row, : past.places[row]].astype(np.float64)
        keys, values = np.concatenate([before, np.stack([k[row], v[row]])[:, None]], axis=1)
        for head in range(a.heads):
            scores = keys[:, head * a.shared // a.heads] @ q[row, head] * a.width**-0.5
            weights = np.exp(scores - scores.max())
            found[row, head] = weights / weights.sum() @ values[:, head * a.shared // a.heads]
    return found.reshape(m, -1)


def ran(qkv, past, a, weights, links, tiles, cores, residual, bits=8):
    """The results of a chain with attention in front, and its counters."""
    m, context = len(qkv), past.cache.shape[3]
    shapes = shapes_of([(m, a.heads * a.width), residual.shape], [c.shape for c, _ in weights], links, [s.shape[1] for _, s in weights],
                       [s.dtype for _, s in weights], [bits] * len(links), group=128, tiles=tiles, cores=cores)  # fmt: skip
    heads = Heads(a, m, context, len(past.cache), shapes[0].blocks, tiles.warps, past.rotation is not None)
    met, parts = np.zeros(len(links) + 1, np.int32), np.full(heads.bytes // 4, np.nan, np.float32)
    results = [np.full((s.m, s.out), np.nan, BF16) for s in shapes]
    packed = [part for codes, scales in weights for part in (codes.astype(np.int8), scales)]
    arrays = [qkv, residual, *packed, *(array for array in past if array is not None), met, *results, parts]
    launch(lambda w, start, *given: follow(w, shapes, links, start, given[:2], given[2:], heads), shapes[0].blocks, 32 * tiles.warps,
           arrays, max(shared_bytes(shapes), heads.shared_bytes))  # fmt: skip
    return results, met


CASES = [
    (1, Attention(4, 2, 64, splits=4), [70], Direct(4, 2, 1), 6, True),
    (1, Attention(2, 1, 128, splits=2), [0], Direct(4, 2, 1), 3, True),  # nothing came before
    (2, Attention(4, 4, 64, splits=1), [3, 96], Direct(8, 1, 1), 3, False),  # rows of their own lengths, more units than blocks
    (3, Attention(2, 2, 256, splits=3), [40, 1, 33], Direct(4, 2, 1), 60, True),  # more blocks than units, heads wider than a block
    (1, Attention(8, 1, 64, splits=8), [96], Direct(4, 2, 2), 4, True),  # a full cache
]


@pytest.mark.parametrize(("m", "a", "places", "tiles", "cores", "turned"), CASES)
def test_what_is_multiplied_is_the_attention_of_the_row(m, a, places, tiles, cores, turned):
    picked(m, a, places, tiles, cores, turned)


def test_a_part_takes_its_keys_in_batches():
    picked(1, Attention(2, 1, 64, splits=2), [201], Direct(4, 2, 1), 4, True, context=203, layers=1)


def test_what_is_beyond_the_cache_is_read_as_its_end():
    """As jax does: a place behind the last token, and a layer that is none."""
    a = Attention(2, 1, 64)
    qkv, past = made(2, a, 24, 2, [24, 9], False)
    far = past._replace(places=np.array([40, 9], np.int32), layer=np.array([7], np.int32))
    weights = identity(128)
    (near,), _ = ran(qkv, past, a, weights, [Link(0)], Direct(4, 2, 1), 4, np.zeros((2, 128), BF16))
    (beyond,), _ = ran(qkv, far, a, weights, [Link(0)], Direct(4, 2, 1), 4, np.zeros((2, 128), BF16))
    np.testing.assert_array_equal(near, beyond)
    none = past._replace(places=np.array([-3, 9], np.int32), layer=np.array([-1], np.int32), cache=past.cache[::-1].copy())
    (first,), _ = ran(qkv, none, a, weights, [Link(0)], Direct(4, 2, 1), 4, np.zeros((2, 128), BF16))
    own = np.tile(qkv[0, -64:].astype(np.float32), 2)  # nothing came before
    np.testing.assert_allclose(first[0].astype(np.float32), own, rtol=2**-7, atol=2**-8 * np.abs(own).max())


def test_very_large_scores_are_told_from_none():
    a = Attention(2, 1, 64)
    qkv, past = made(1, a, 24, 1, [9], False)
    qkv[:, :128], qkv[:, 128:192], past.cache[:, 0] = 1e15, -1e15, np.where(np.isnan(past.cache[:, 0]), np.nan, -1e15)
    (y,), _ = ran(qkv, past, a, identity(128), [Link(0)], Direct(4, 2, 1), 4, np.zeros((1, 128), BF16))
    assert np.isfinite(y.astype(np.float32)).all()


@pytest.mark.parametrize(("heads", "width"), [(12, 64), (6, 128)])
def test_a_row_that_is_not_finite_stays_alone(heads, width):
    """Six pieces for sixteen warps: what those read that have none lies where attention had its sums."""
    a = Attention(heads, 2 if width == 128 else 4, width, splits=1)
    qkv, past = made(2, a, 96, 1, [96, 96], False)
    qkv[1] = np.nan
    (y,), _ = ran(qkv, past, a, identity(768), [Link(0)], Direct(16, 2, 1), 3, np.zeros((2, 768), BF16))
    assert np.isfinite(y[0].astype(np.float32)).all() and np.isnan(y[1].astype(np.float32)).all()


def identity(width):
    """A weight whose product with a row is the row."""
    codes = np.zeros((width, width), np.int64)
    codes[np.arange(width), np.arange(width)] = 1
    return [(codes, np.ones((width, 8 * -(-width // 1024)), BF16))]


def picked(m, a, places, tiles, cores, turned, context=96, layers=3):
    """Multiplied by a weight of powers of two that picks single elements, so that each can be read."""
    qkv, past = made(m, a, context, layers, places, turned)
    width = a.heads * a.width
    (y,), met = ran(qkv, past, a, identity(width), [Link(0)], tiles, cores, np.zeros((m, width), BF16))
    expected = exact(qkv, past, a)
    assert np.isfinite(expected).all() and not met.any()
    # Roundings to bfloat16: of each part, of their sum, of the product; the rows' digits.
    np.testing.assert_allclose(y.astype(np.float64), expected, atol=2**-8 * np.abs(expected).max(), rtol=2**-7)


def test_a_layer_with_attention_reads_as_one_by_one():
    a = Attention(4, 2, 64)
    qkv, past = made(2, a, 64, 2, [20, 64], True)
    shapes = [(256, 256), (1024, 256), (256, 512), (a.columns, 256)]
    drawn_weights = [drawn(2, n, k, 128, BF16, 8) for n, k in shapes]
    weights = [(codes, (scales.astype(np.float32) / codes.shape[1] ** 0.5 / 64).astype(BF16)) for _, codes, scales in drawn_weights]
    residual = np.random.default_rng(5).normal(size=(2, 256)).astype(BF16)
    results, met = ran(qkv, past, a, weights, TAIL, Direct(4, 2, 1), 3, residual)
    given = [(jnp.asarray(codes, jnp.int8), jnp.asarray(scales)) for codes, scales in weights]
    there = past._replace(cache=jnp.asarray(past.cache), layer=1, places=jnp.asarray(past.places), rotation=jnp.asarray(past.rotation))
    plain = one_by_one([jnp.asarray(qkv), jnp.asarray(residual)], given, links=TAIL, group_size=128, attention=a, past=there)
    assert not met.any()
    for ours, theirs in zip(results, plain, strict=True):
        assert np.linalg.norm(ours.astype(np.float32) - np.float32(theirs)) <= 0.01 * np.linalg.norm(np.float32(theirs))


def test_in_jax_it_is_the_attention_of_a_whole_sequence():
    """Token after token, each kept behind its step, it reads what attention over all of them at once gives."""
    a, tokens = Attention(4, 2, 64), 5
    qkv = jnp.asarray(np.random.default_rng(0).normal(size=(2, tokens, a.columns)), jnp.bfloat16)
    cache = jnp.full((1, 2, 2, 8, a.shared, a.width), jnp.nan, jnp.bfloat16)
    for i in range(tokens):
        places = jnp.full((2,), i, jnp.int32)
        turned = rotation(places, a.width)
        got = attended(qkv[:, i], Past(cache, jnp.int32(0), places, turned), a)
        cache = kept(cache, fresh(qkv[:, i], a, turned)[None], places)
    last = qkv.astype(jnp.float32).reshape(2, tokens, -1, a.width)
    angles = jnp.stack([rotation(jnp.full((2,), i), a.width) for i in range(tokens)], 1)
    heads = jnp.stack([rotated(last[:, i, : a.heads + a.shared], angles[:, i]) for i in range(tokens)], 1)
    k, v = heads[:, :, a.heads :], last[:, :, a.heads + a.shared :]
    expected = jax.nn.dot_product_attention(heads[:, -1:, : a.heads], k, v)
    np.testing.assert_allclose(np.float32(got).reshape(2, 1, a.heads, a.width), expected, atol=0.02)


def given():
    a = Attention(4, 2, 64)
    x = jnp.zeros((1, a.columns), jnp.bfloat16)
    past = Past(jnp.zeros((1, 2, 1, 16, 2, 64), jnp.bfloat16), jnp.int32(0), jnp.int32([3]), rotation(jnp.int32([3]), 64))
    return x, a, past, [(jnp.zeros((256, 256), jnp.int4), jnp.ones((256, 2), jnp.bfloat16))]


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"cache": jnp.zeros((1, 2, 1, 16, 2, 128), jnp.bfloat16)}, r"`past.cache` is .*take \(layers, 2, 1, context, 2, 64\) bfloat16"),
        ({"cache": jnp.zeros((1, 2, 1, 16, 2, 64), jnp.int8)}, "`past.cache` is .*int8"),
        ({"cache": jnp.zeros((2, 1, 16, 2, 64), jnp.bfloat16)}, "`past.cache` is "),
        ({"cache": jnp.zeros((0, 2, 1, 16, 2, 64), jnp.bfloat16)}, "`past.cache` is "),
        ({"layer": jnp.int32([0])}, r"`past.layer` is .*a single int32: jnp.int32\(i\)"),
        ({"layer": jnp.float32(0)}, "`past.layer` is .*float32"),
        ({"places": jnp.int32(3)}, r"`past.places` is .*take \(1,\) int32"),
        ({"rotation": jnp.zeros((1, 32), jnp.float32)}, r"`past.rotation` is .*take \(1, 64\) float32"),
    ],
)
@pytest.mark.parametrize("way", ["chain", "one_by_one"])
def test_what_came_before_must_fit_the_heads(change, named, way):
    x, a, past, weights = given()
    how = {"links": [Link(0)], "group_size": 128, "attention": a, "past": past._replace(**change)}
    with pytest.raises(ValueError, match=named):
        chain([x], weights, counters(2), **how) if way == "chain" else one_by_one([x], weights, **how)


def test_what_does_not_belong_together_is_refused():
    x, a, past, weights = given()
    with pytest.raises(ValueError, match="`attention` and `past` belong together"):
        chain([x], weights, counters(2), links=[Link(0)], group_size=128, attention=a)
    with pytest.raises(ValueError, match="is value 0, which is what attention gives"):
        chain([x], weights, counters(2), links=[Link(0, added=0)], group_size=128, attention=a, past=past)
    with pytest.raises(ValueError, match=r"q, k and v are \(1, 256\) bfloat16; .* takes \(M, 512\)"):
        chain([x[:, :256]], weights, counters(2), links=[Link(0)], group_size=128, attention=a, past=past)
    with pytest.raises(ValueError, match=r"make them by counters\(2\)"):
        chain([x], weights, counters(1), links=[Link(0)], group_size=128, attention=a, past=past)


def test_things_of_another_kind_are_named():
    x, a, past, weights = given()
    how = {"links": [Link(0)], "group_size": 128}
    for wrong, named in (
        ({"attention": (4, 2, 64), "past": past}, "`attention` is a tuple"),
        ({"attention": a, "past": tuple(past)}, "`past` a tuple"),
        ({"attention": a, "past": past._replace(places=[3])}, "`past.places` is a list"),
    ):
        with pytest.raises(TypeError, match=named):
            one_by_one([x], weights, **how, **wrong)


def test_a_full_cache_keeps_what_it_has():
    cache, written = jnp.zeros((2, 2, 2, 4, 1, 64), jnp.bfloat16), jnp.ones((2, 2, 2, 1, 64), jnp.bfloat16)
    for places, found in (([4, 1], [0, 1]), ([-1, 0], [0, 1]), ([3, 9], [1, 0])):
        after = kept(cache, written, jnp.int32(places))
        assert [bool(after[:, :, row].any()) for row in (0, 1)] == [bool(each) for each in found]
        assert int(after.astype(jnp.float32).sum()) == sum(found) * 2 * 2 * 64


def test_what_is_kept_must_fit():
    a, cache = Attention(4, 2, 64), jnp.zeros((3, 2, 1, 4, 2, 64), jnp.bfloat16)
    qkv = jnp.zeros((1, a.columns), jnp.bfloat16)
    with pytest.raises(ValueError, match=r"`written` is \(1, 2, 1, 2, 64\) bfloat16; a cache .* takes \(3, 2, 1, 2, 64\)"):
        kept(cache, fresh(qkv, a)[None], jnp.int32([0]))
    with pytest.raises(ValueError, match=r"`places` are \(\) int32; .* takes \(1,\)"):
        kept(cache, jnp.stack([fresh(qkv, a)] * 3), jnp.int32(0))
    with pytest.raises(ValueError, match=r"q, k and v are \(1, 640\)"):
        fresh(jnp.zeros((1, 640), jnp.bfloat16), a)
    with pytest.raises(ValueError, match=r"`turned` is \(2, 64\) float32"):
        fresh(qkv, a, rotation(jnp.int32([0, 1]), 64))
    with pytest.raises(ValueError, match=r"`width` is 63; they must be \(M,\) and even"):
        rotation(jnp.int32([0]), 63)


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"width": 96}, "`width` is 96"),
        ({"heads": 6, "shared": 4}, "must be a multiple"),
        ({"splits": 9}, "`splits` is 9"),
        ({"splits": 0}, "`splits` is 0"),
        ({"splits": 2.5}, "`splits` is 2.5; it must be a Python int"),
    ],
)
def test_heads_that_the_kernel_does_not_have_are_refused(fields, named):
    with pytest.raises(ValueError, match=named):
        dataclasses.replace(Attention(4, 2, 64), **fields)
