"""The search for ranges, against every candidate tried in NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qjax.core import CodebookSpec, affine_params, fp4, int2, int3, int4, int8, integer, nf4, uint2, uint4
from qjax.ptq.range_search import search_range

SPECS = [int2(), int3(), int4(scale_rule="full"), int8(), uint2(), uint4(), int4(scale_dtype="float16"), nf4(), fp4(),
         integer(4, signed=False, symmetric=True)]  # fmt: skip


def blocks():
    rng = np.random.default_rng(0)
    x = rng.standard_t(3, (40, 64)).astype(np.float32)
    x[0] = 0
    x[1] = np.abs(x[1])
    x[2] = 1e-3
    x[3, 0] = 100
    return x


def error(x, scale, zero_point, spec):
    """sum |x_hat - x|^2.4 of a block, in float64."""
    if isinstance(spec, CodebookSpec):
        levels = np.float64(np.float32(spec.levels)) * scale
        return np.sum(np.min(np.abs(x[:, None] - levels), axis=1) ** 2.4)
    codes = np.clip(np.rint(x / scale) + zero_point, spec.qmin, spec.qmax)
    return np.sum(np.abs((codes - zero_point) * scale - x) ** 2.4)


def best_error(x, spec):
    """The least error among the 80 ranges; for two bits with a zero point among both zero points."""
    least = np.inf
    for i in range(80):
        p = 1 - i / 100
        if isinstance(spec, CodebookSpec):
            least = min(least, error(x, p * np.abs(x).max() or 1.0, 0, spec))
            continue
        lo, hi = min(p * x.min(), 0), max(p * x.max(), 0)
        if spec.symmetric:
            reach = max(-lo, hi) if spec.signed else hi
            scale = np.asarray(reach / (spec.qmax + (spec.scale_rule == "half") / 2)).astype(spec.scale_dtype)
            scale = np.float64(scale) or 1.0
            least = min(least, error(x, scale, 0, spec))
            continue
        scale = (hi - lo) / (spec.qmax - spec.qmin) or 1.0
        ideal = spec.qmin - lo / scale
        for zero_point in {np.rint(ideal)} | ({np.floor(ideal), np.ceil(ideal)} if spec.bits == 2 else set()):
            least = min(least, error(x, scale, zero_point, spec))
    return least


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_no_candidate_is_better(spec):
    x = blocks()
    with jax.numpy_rank_promotion("raise"), jax.numpy_dtype_promotion("strict"):
        scale, zero_point = jax.jit(lambda x: search_range(x, spec))(x)
    assert scale.shape == (40, 1) and scale.dtype == jnp.float32
    zero_point = np.zeros((40, 1)) if zero_point is None else np.float64(zero_point)
    rows = zip(np.float64(x), np.float64(scale)[:, 0], zero_point[:, 0], strict=True)
    found = [error(row, s, z, spec) for row, s, z in rows]
    np.testing.assert_allclose(found, [best_error(row, spec) for row in np.float64(x)], rtol=1e-4, atol=1e-12)


def test_a_block_that_is_exact_keeps_its_range():
    x = jnp.float32([[-8.0, 7.0, 3.0, 0.0, 7.5]])
    scale, _ = search_range(x[:, :4], int4())
    full, _ = affine_params(x, int4())
    assert scale.item() <= 8 / 7.5 and full.item() == pytest.approx(8 / 7.5)
    # Of equal errors the largest range wins: a block of zeros keeps scale 1.
    assert search_range(jnp.zeros((1, 8)), int4())[0].item() == 1.0


def test_stacked_blocks_and_eager():
    x = blocks().reshape(4, 10, 64)
    eager = search_range(x, uint4())
    compiled = jax.jit(lambda x: search_range(x, uint4()))(x)
    for a, b in zip(eager, compiled, strict=True):
        assert a.shape == (4, 10, 1)
        np.testing.assert_array_equal(a, b)
