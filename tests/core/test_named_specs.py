import statistics

import jax.numpy as jnp
import numpy as np
import pytest

import qjax
from qjax.core import quantize


def test_quantile_levels_are_the_formula():
    levels = [statistics.NormalDist().inv_cdf((2 * i + 1) / 32) for i in range(16)]
    np.testing.assert_allclose(qjax.nf4(table="quantile").levels, np.float64(levels) / levels[-1], rtol=1e-12)
    assert 0.0 not in qjax.nf4(table="quantile").levels and qjax.nf4(table="quantile").name == "nf4_quantile"


def test_ternary_is_bitnets_round_clip():
    """arXiv 2402.17764, equations 1 to 3, in float64."""
    w = np.random.default_rng(0).standard_normal((40, 6)).astype(np.float32)
    q = quantize(jnp.asarray(w), qjax.ternary(per="tensor"), (-2,))
    gamma = np.abs(np.float64(w)).mean()
    np.testing.assert_allclose(q.scales(), [[gamma]], rtol=1e-6)
    np.testing.assert_array_equal(q.codes_unpacked().T, np.clip(np.round(w / gamma), -1, 1))
    assert q.codes.nbytes == w.size * 2 // 8


def test_twn_scale_is_the_mean_of_what_exceeds_the_threshold():
    w = np.random.default_rng(1).standard_normal((3, 64)).astype(np.float32)
    q = quantize(jnp.asarray(w), qjax.ternary(scale_rule="twn"), (-1,))
    size = np.abs(np.float64(w))
    wanted = [row[row > 0.7 * row.mean()].mean() for row in size]
    np.testing.assert_allclose(q.scales()[:, 0], wanted, rtol=1e-6)
    levels = np.float64(q.scales()) * np.float64([[-1.0, 0.0, 1.0]])
    nearest = np.abs(w[..., None] - levels[:, None]).min(-1)
    np.testing.assert_allclose(np.abs(np.float64(q.dequantize()) - w), nearest, atol=1e-6)


def test_binary_is_the_sign_and_the_mean():
    w = np.random.default_rng(2).standard_normal((5, 40)).astype(np.float32)
    q = quantize(jnp.asarray(w), qjax.binary(group_size=8), (-1,))
    mean = np.abs(np.float64(w.reshape(5, 5, 8))).mean(-1)
    np.testing.assert_allclose(q.scales(), mean, rtol=1e-6)
    np.testing.assert_allclose(q.dequantize().reshape(5, 5, 8), np.sign(w.reshape(5, 5, 8)) * mean[..., None], rtol=1e-6)
    assert q.codes.shape == (5, 5)


def test_means_of_huge_weights_do_not_overflow():
    w = jnp.full((256, 1), 3e38)
    for spec in (qjax.ternary(), qjax.ternary(scale_rule="twn"), qjax.binary()):
        np.testing.assert_allclose(quantize(w, spec, (0,)).dequantize(), w, rtol=1e-6)


BAD = [
    (lambda: qjax.nf4(table="nf4"), "`table` must be 'bitsandbytes' or 'quantile', got 'nf4'"),
    (lambda: qjax.nf4(double_quant=1), "`double_quant` must be True or False, got 1"),
    (lambda: qjax.nf4(double_quant=True, scale_dtype="float16"), "`scale_dtype` must stay 'float32' with double_quant=True"),
    (lambda: qjax.ternary(scale_rule="full"), "`scale_rule` must be 'absmean' or 'twn', got 'full'"),
    (lambda: qjax.int4(scale_rule="twn"), "`scale_rule`='twn' is for ternary weights, 2 bits"),
    (lambda: qjax.mxfp6("e2m1"), "`element` of mxfp6 must be 'e2m3' or 'e3m2', got 'e2m1'"),
    (lambda: qjax.mxfp8("int8"), "`element` of mxfp8 must be 'e4m3' or 'e5m2', got 'int8'"),
    (lambda: qjax.mxfp4(exponent_rule="ceil"), "`exponent_rule` must be one of 'floor', 'round', got 'ceil'"),
    (lambda: qjax.floating("e2m1", exponent_rule="round"), "`exponent_rule`='round' is for scale_dtype='e8m0', got 'float32'"),
    (lambda: qjax.floating("e2m2"), "`element` must be one of 'e2m1'"),
    (lambda: qjax.fp8_e4m3(scale_dtype="e5m2"), "`scale_dtype` must be one of 'float32', 'float16', .*, 'e4m3', got 'e5m2'"),
    (lambda: qjax.fp8_e5m2(group_size=8, per="token"), "give one of `per`, `group_size` and `block`"),
    (lambda: qjax.nvfp4(pad=0), "`pad` must be True or False, got 0"),
    (lambda: qjax.codebook([1.0]), "`levels` must hold 2\\^bits numbers with bits from 1 to 8, got 1"),
]


@pytest.mark.parametrize(("make", "message"), BAD, ids=[m for _, m in BAD])
def test_bad_arguments_are_named(make, message):
    with pytest.raises((ValueError, TypeError), match=message):
        make()


def test_names_rebuild_the_spec():
    specs = [
        qjax.nf4(double_quant=True), qjax.fp4(32, pad=True), qjax.fp8_e4m3(block=(128, 128)), qjax.fp8_e5m2(per="tensor"),
        qjax.mxfp4(exponent_rule="round", pad=True), qjax.mxfp6("e3m2"), qjax.mxfp8(), qjax.mxint8(pad=True), qjax.nvfp4(),
        qjax.floating("e2m1", group_size=8, scale_dtype="e8m0", exponent_rule="round"), qjax.floating("int8", per="token"),
        qjax.ternary(scale_rule="twn", group_size=8), qjax.ternary(per="tensor"), qjax.binary(group_size=8),
    ]  # fmt: skip
    names = {n: getattr(qjax, n) for n in dir(qjax) if not n.startswith("_")}
    for spec in specs:
        assert eval(str(spec), {"__builtins__": {}, "True": True, **names}) == spec
