"""The kernel that rounds rows to eight bits, thread by thread in NumPy, to the bit."""

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from qjax_kernels.gpu.eight_bit import E4M3_MAX, rounded_rows

import qjax
from qjax.core import encode_activation
from qjax.runtime.on_cuda import _top

pytest.importorskip("absl")

from qjax_kernels.gpu.rounding_kernel import HELD, Row, can_round, round_row

from tests.kernels.gpu.simulator import launch

BF16, FP8 = ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn


def ran(x, dtype, top=None):
    """Codes and scales of all blocks; what nobody writes stays 99 and NaN."""
    (m, k), top = x.shape, top or (127.0 if dtype == np.int8 else E4M3_MAX)
    row = Row(k, top, dtype != np.int8)
    codes, scales = np.full((m, k), 99, np.int8).view(dtype), np.full(m, np.nan, np.float32)
    launch(lambda w, *given: round_row(w, row, *given), m, 32 * row.warps, [x, codes, scales], 4 * row.warps)
    return codes, scales


@pytest.mark.parametrize("dtype", [np.int8, FP8])
@pytest.mark.parametrize("k", [8, 1000, 4096, 28672, 40960])
def test_codes_and_scales_are_those_of_the_formula(dtype, k):
    draw = np.random.default_rng(k)
    x = (draw.normal(size=(4, k)) * np.exp(3 * draw.normal(size=(4, 1)))).astype(BF16)
    x[1] = 0
    x[2] = np.arange(k) % 255 - 127.0  # whole and half codes: ties
    x[2, 1:] /= 2
    x[3, 0], x[3, -1] = 1e-30, -300
    codes, scales = ran(x, dtype)
    largest = np.abs(x.astype(np.float32)).max(1)
    np.testing.assert_array_equal(scales, np.where(largest == 0, 1, largest / np.float32(127 if dtype == np.int8 else E4M3_MAX)))
    quotient = x.astype(np.float32) / scales[:, None]
    np.testing.assert_array_equal(codes.view(np.int8), (np.rint(quotient) if dtype == np.int8 else quotient).astype(dtype).view(np.int8))
    # XLA multiplies by 1 / q_max: its scales differ in the last bits, and with them a code in the middle of two.
    wanted, wanted_scales = rounded_rows(jnp.asarray(x), jnp.dtype(dtype))
    np.testing.assert_allclose(scales, wanted_scales, rtol=3e-7)
    assert (codes.view(np.int8) != np.asarray(wanted).view(np.int8)).mean() < 0.01


@pytest.mark.parametrize("spec", [qjax.int8(), qjax.int8(scale_rule="full"), qjax.fp8_e4m3()], ids=str)
def test_rows_are_rounded_as_specs_say(spec):
    draw, k = np.random.default_rng(0), 1000
    x = (draw.normal(size=(64, k)) * np.exp(3 * draw.normal(size=(64, 1)))).astype(BF16)
    x[0], x[1, 1:], x[2] = 0, 0, np.float32(1e-39)  # scales that are no normal numbers
    x[3] = (np.arange(k) % 256 - 127.5) / 2
    act = qjax.dynamic(spec)
    wanted, scale, _ = encode_activation(jnp.asarray(x), act, (1,))
    codes, scales = ran(x, np.dtype(wanted.dtype), _top(act))
    np.testing.assert_array_equal(scales, scale[:, 0])
    np.testing.assert_array_equal(codes.view(np.int8), np.asarray(wanted).view(np.int8))
    if wanted.dtype == jnp.int8:
        assert (codes.min(), codes.max()) == (-127 if spec.scale_rule == "full" else -128, 127)


@pytest.mark.parametrize("dtype", [np.int8, FP8])
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_row_that_is_not_finite_has_such_a_scale(dtype, bad):
    x = np.ones((2, 64), BF16)
    x[1, 5] = bad
    _, scales = ran(x, dtype)
    assert np.isfinite(scales[0]) and not np.isfinite(scales[1])
    _, wanted = rounded_rows(jnp.asarray(x), jnp.dtype(dtype))
    np.testing.assert_array_equal(scales, wanted)


def test_rows_that_it_does_not_take():
    assert can_round(jnp.ones((1, 131072), jnp.bfloat16))
    assert not can_round(jnp.ones((1, 131080), jnp.bfloat16))
    assert not can_round(jnp.ones((1, 100), jnp.bfloat16)) and not can_round(jnp.ones((1, 128), jnp.float32))
    assert max(Row(k, 127.0, False).each(Row(k, 127.0, False).warps) for k in (8, 32768, 32776, 131072)) == HELD
