import itertools

import jax.numpy as jnp
import numpy as np
import pytest

from qjax.core import blocks, canonicalize, check_blocks, int4, mxfp4, nf4, padded_size, uncanonicalize

W = jnp.asarray(np.arange(2 * 3 * 4 * 5).reshape(2, 3, 4, 5), jnp.float32)


@pytest.mark.parametrize("axes", [a for r in (1, 2, 3, 4) for a in itertools.permutations(range(4), r)])
def test_canonical_layout_is_einsum(axes):
    """Kept axes in logical order, contracted ones flattened in the given order; and back."""
    kept = [i for i in range(4) if i not in axes]
    letters = "abcd"
    wanted = np.einsum(f"abcd->{''.join(letters[i] for i in (*kept, *axes))}", W)
    sizes = tuple(W.shape[a] for a in axes)
    c = canonicalize(W, axes)
    np.testing.assert_array_equal(c, wanted.reshape(*[W.shape[i] for i in kept], -1))
    np.testing.assert_array_equal(uncanonicalize(c, [a - 4 for a in axes], sizes), W)


def test_bad_axes():
    with pytest.raises(ValueError, match="`axes` must be different axes of an array with 4 axes, got \\(0, -4\\)"):
        canonicalize(W, (0, -4))
    with pytest.raises(ValueError, match="`axes` must be different axes"):
        canonicalize(W, (4,))


@pytest.mark.parametrize(
    ("spec", "stacked", "shape"),
    [
        (int4(per="tensor"), (), (1, 1, 1, 120)),
        (int4(per="tensor"), (0,), (2, 1, 1, 60)),
        (int4(per="tensor"), (1,), (1, 6, 1, 20)),
        (int4(per="channel"), (), (2, 6, 1, 10)),
        (int4(per="token"), (), (2, 6, 1, 10)),
        (int4(group_size=5), (), (2, 6, 2, 5)),
        (int4(group_size=4, pad=True), (), (2, 6, 3, 4)),
        (int4(block=(3, 5)), (), (2, 2, 2, 15)),
        (int4(block=(3, 4), pad=True), (), (2, 2, 3, 12)),
    ],
    ids=str,
)
def test_blocks_and_back(spec, stacked, shape):
    w = jnp.asarray(np.random.default_rng(0).standard_normal((2, 6, 10)), jnp.float32)
    blocked, unblock = blocks(w, spec, stacked)
    assert blocked.shape == shape
    restored = np.asarray(unblock(blocked))
    assert restored.shape[-1] == padded_size(10, spec)
    np.testing.assert_array_equal(restored[..., :10], w)
    assert not restored[..., 10:].any()
    # What shares a block must be what shares a scale: spread the block maxima back and compare tile by tile.
    spread = np.asarray(unblock(jnp.broadcast_to(jnp.max(jnp.abs(blocked), -1, keepdims=True), blocked.shape)))
    tiles = [restored.shape[i] // shape[i] for i in range(3)]
    for at in itertools.product(*(range(n) for n in shape[:3])):
        tile = tuple(np.s_[i * t : (i + 1) * t] for i, t in zip(at, tiles, strict=True))
        assert (spread[tile] == np.abs(restored[tile]).max()).all()


@pytest.mark.parametrize(
    ("spec", "shape", "message"),
    [
        (
            int4(group_size=128),
            (8, 100),
            "`group_size`=128 does not divide the 100 contracted values of `a/b`: take 100, ",
        ),
        (int4(group_size=32), (8, 100), "take 25, the nearest size that does, or pad=True, which pads them to 128"),
        (nf4(), (8, 96), "`group_size`=64 does not divide the 96 contracted values of `a/b`: take 48,"),
        (mxfp4(), (8, 72), r"the blocks of mxfp4\(\), 32 values, do not divide the 72 contracted values of `a/b`: give pad=True, .* 96"),
        (int4(block=(4, 7)), (8, 100), r"`block\[1\]`=7 does not divide the 100 contracted values"),
        (
            int4(block=(3, 10)),
            (8, 100),
            r"`block\[0\]`=3 does not divide the last kept axis of `a/b`, which has 8: take 4",
        ),
        (int4(block=(3, 10)), (100,), "`block` needs a kept axis, but every axis of `a/b` is contracted"),
    ],
)
def test_what_does_not_divide_is_refused_by_name(spec, shape, message):
    with pytest.raises(ValueError, match=message):
        check_blocks(shape, spec, "a/b")
    with pytest.raises(ValueError, match=message):
        blocks(jnp.zeros(shape), spec, name="a/b")
