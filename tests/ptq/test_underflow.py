"""Scales in float16 that are too small for it: represented where that is better than zeros, said in the report, refused of codes."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import qjax
from qjax.core import assemble, int4, quantize, round_trip

TINY = np.float32([[2.0**-24 * n for n in (1, -2, 3, 0)]] * 2).T  # (4, 2): int4 scales would be 2^-24 * 3 / 7.5, which rounds to 0
SPECS = {
    "int": int4(scale_dtype="float16"),
    "uint": qjax.uint4(scale_dtype="float16"),
    "table": qjax.nf4(4, scale_dtype="float16"),
    "fp8": qjax.fp8_e4m3(scale_dtype="float16"),
    "mean": qjax.ternary(scale_dtype="float16"),
}


@pytest.mark.parametrize("name", SPECS)
def test_a_scale_that_would_round_to_zero_is_the_smallest_and_better_than_zeros(name):
    w = jnp.asarray(TINY if name != "table" else TINY / 8)
    w = w if name != "mean" else w / 4
    back = np.asarray(quantize(w, SPECS[name], (0,)).dequantize())
    assert back.any() and (back[np.asarray(w) == 0] == 0).all()
    assert (np.abs(back - w) <= np.abs(w)).all()
    np.testing.assert_array_equal(jax.jit(lambda w: round_trip(w, SPECS[name], (0,)))(w), back)


def test_a_table_without_a_zero_keeps_the_nearest_scale():
    w = jnp.full((4, 1), 1e-9)
    assert not quantize(w, qjax.binary(scale_dtype="float16"), (0,)).dequantize().any()


def notes_of(w, spec, method=None):
    policy = qjax.Policy([qjax.Rule("*", weight=spec, method=method)])
    result = qjax.quantize(lambda p, x: x @ p, jnp.asarray(w), policy, [jnp.eye(w.shape[0])])
    return " ".join(result.report.rows[0].notes)


@pytest.mark.parametrize(
    ("spec", "method", "wanted"),
    [
        (int4(scale_dtype="float16"), None, '1 of 4 scales are below 1.5e-05, where float16 .*: take scale_dtype="bfloat16" or "float32"'),
        (int4(scale_dtype="float16"), qjax.gptq(act_order=True, mse=False), "1 of 4 scales"),
        (qjax.binary(scale_dtype="float16"), None, "1 of 4 scales"),
        (qjax.learned(2, level_dtype="float16"), qjax.kmeans(), '1 of 4 tables .*take level_dtype="bfloat16" or "float32"'),
    ],
)  # fmt: skip
def test_the_report_counts_small_scales_and_no_block_of_zeros(spec, method, wanted):
    argument, empty = ("level_dtype", 0) if method == qjax.kmeans() else ("scale_dtype", int(spec.bits == 1))
    w = np.float32(np.random.default_rng(0).standard_normal((32, 4)) * [1e-8, 1, 1, 1])
    w[:, 2] = empty  # a table without a zero cannot be zeros
    assert re.search(wanted, notes_of(w, spec, method))
    assert "below" not in notes_of(w[:, 1:], spec, method)
    assert "below" not in notes_of(w, dataclasses.replace(spec, **{argument: "float32"}), method)


def test_codes_come_with_scales_that_their_dtype_holds():
    codes, spec = np.int8([[1, 2], [3, -4]]), int4(scale_dtype="float16")
    for bad, what in ((1e-9, "the smallest, which would be 0,"), (1e6, "the largest")):
        with pytest.raises(ValueError, match=f"`scale_dtype`='float16' cannot hold {what} of the scales of `up`; take .*float32"):
            assemble(codes, np.float32([[1.0], [bad]]), None, spec, (-2,), (2,), jnp.float32, name="up")
    assert assemble(codes, np.float32([[1.0], [0.0]]), None, spec, (-2,), (2,), jnp.float32).scale[1] == 0
