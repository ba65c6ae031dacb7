"""Ranges chosen from a histogram: against onnxruntime, against their definitions, and on what breaks others.

`golden/calibration.npz` holds two tensors, `golden/calibration_thresholds.json` the ranges that onnxruntime's `HistogramCollector`
finds for them with 2048 bins and 128 quantized bins when all data come in one call.
"""

import functools
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qjax.calibration import Rows, entropy, histogram, mse, percentile
from qjax.calibration.entropy import _least_divergence
from qjax.calibration.histogram import widths
from qjax.core import affine_decode, affine_encode, int4, int8, integer, params_from_range, uint4, uint8

pytestmark = pytest.mark.slow

GOLDEN = pathlib.Path(__file__).parents[1] / "golden"
THRESHOLDS = json.loads((GOLDEN / "calibration_thresholds.json").read_text())
LEAST_DIVERGENCE = jax.jit(_least_divergence, static_argnums=1)
CHOOSERS = {"percentile": percentile(99), "entropy": entropy(256, 32), "mse": mse(16)}
every_chooser = pytest.mark.parametrize("observer", CHOOSERS.values(), ids=CHOOSERS)
both_kinds = pytest.mark.parametrize("spec", [int8(), uint8()], ids=["symmetric", "asymmetric"])


def feed(observer, *calls):
    state = observer.init(1, 1)
    for x in calls:
        state = observer.update(state, Rows(jnp.asarray(x, jnp.float32).reshape(1, -1, 1)))
    return state


def chosen(observer, spec, *calls):
    return tuple(v.item() for v in observer.range(feed(observer, *calls), spec))


def heavy_tailed(samples=4000, seed=0):
    return np.random.default_rng(seed).standard_t(3, samples).astype(np.float32)


@pytest.mark.parametrize("case", THRESHOLDS)
def test_golden(case):
    """Within one bin of onnxruntime's, 2 absmax / 2048; it gives the unclipped side's own end, a symmetric range here has equal sides."""
    data, method, kind = case.split("/")
    observer = entropy() if method == "entropy" else percentile(float(method.removeprefix("percentile")))
    with np.load(GOLDEN / "calibration.npz") as arrays:
        x = arrays[data]
    lo, hi = chosen(observer, int8() if kind == "sym" else uint8(), *np.split(x, 8))
    one_bin = 2 * np.abs(x).max() / 2048
    assert abs(hi - THRESHOLDS[case][1]) <= one_bin
    assert lo == -hi if kind == "sym" else abs(lo - THRESHOLDS[case][0]) <= one_bin


@every_chooser
@both_kinds
def test_the_cut_of_the_data_changes_no_bit(observer, spec):
    x = heavy_tailed(120) * np.linspace(0.01, 5, 120, dtype=np.float32)
    whole = chosen(observer, spec, x)
    rng = np.random.default_rng(3)
    for size in (1, 40):
        calls = np.array_split(x[rng.permutation(120)], 120 // size)
        assert chosen(observer, spec, *calls) == whole
    halves = observer.merge(feed(observer, x[:40]), feed(observer, x[40:]))
    assert tuple(v.item() for v in observer.range(halves, spec)) == whole


@pytest.mark.parametrize("p", [50, 90, 99, 99.9])
def test_a_percentile_is_its_definition(p):
    x, observer = heavy_tailed(5000), percentile(p)
    width = widths(feed(observer, x)).item()
    lo, hi = chosen(observer, int8(), x)
    allowed = round((1 - p / 100) * x.size, 6)
    assert np.sum(np.abs(x) >= hi) <= allowed < np.sum(np.abs(x) >= hi - width)
    lo, hi = chosen(observer, uint8(), x)
    assert np.sum(x >= hi) <= allowed / 2 < np.sum(x >= hi - width)
    assert np.sum(x <= lo) <= allowed / 2 < np.sum(x <= lo + width)


def test_percentiles_of_one_side():
    x = np.maximum(heavy_tailed(), 0)
    assert chosen(percentile(100), uint8(), x) == (0.0, x.max())
    assert chosen(percentile(100), uint8(), -x) == (-x.max(), 0.0)
    assert chosen(percentile(100), int8(), -x) == (-x.max(), x.max())
    lo, hi = chosen(percentile(99), integer(8, signed=False, symmetric=True), heavy_tailed())
    assert lo == 0 and abs(np.sum(heavy_tailed() >= hi) - 40) < 10


def test_a_percentile_of_more_than_32_bits_of_values():
    """Six of 2^33 values are 1: a share of five must not cut into them, one of six and a half cuts them off and no more."""
    observer = percentile(100 * (1 - 5 / 2**33))
    state = feed(observer, [0.0, 0.5, 0.75, 1.0])
    heavy = state._replace(low=state.low.at[0, 1, 4096].set(6), high=state.high.at[0, 1, 0].set(2))
    assert observer.range(heavy, int8())[1].item() == 1.0
    observer = percentile(100 * (1 - 6.5 / 2**33))
    assert observer.range(heavy, int8())[1].item() == 0.75 + 1 / 4096


def reference_kl(hist, quantized_bins):
    """onnxruntime's loop over thresholds, in float64."""
    bins, half = len(hist), quantized_bins // 2
    found = []
    for i in range(half, bins // 2 + 1):
        start, end = bins // 2 - i, min(bins // 2 + i + 1, bins)
        inner = hist[start:end]
        p = inner.copy()
        p[0] += hist[:start].sum()
        p[-1] += hist[end:].sum()
        size = len(inner) // quantized_bins
        sums = inner[: size * quantized_bins].reshape(quantized_bins, size).sum(1)
        sums[-1] += inner[size * quantized_bins :].sum()
        q = np.zeros(len(p), np.int64)
        for k in range(quantized_bins):
            run = slice(k * size, (k + 1) * size)
            if (p[run] != 0).any():
                q[run] = sums[k] / (p[run] != 0).sum()
        found.append(divergence(p, q) if q.any() else np.inf)
    return half + np.argmin(found), np.sort(found)


def divergence(p, q):
    smooth = []
    for v in (p, q):
        empty = v == 0
        v = np.where(empty, 1e-4, v - 1e-4 * empty.sum() / (~empty).sum())
        smooth.append(v / v.sum())
    return np.sum(smooth[0] * np.log(smooth[0] / smooth[1]))


@pytest.mark.parametrize("seed", range(6))
def test_the_divergence_is_onnxruntimes(seed):
    rng = np.random.default_rng(seed)
    x = [rng.standard_normal, lambda n: rng.standard_t(2, n), lambda n: np.abs(rng.standard_normal(n))][seed % 3](4000)
    hist = np.histogram(x, 256, range=(-np.abs(x).max(), np.abs(x).max()))[0]
    wanted, divergences = reference_kl(hist, 32)
    assert divergences[1] > divergences[0] * (1 + 1e-4), "a tie within float32's precision: choose another seed"
    assert LEAST_DIVERGENCE(jnp.asarray(hist, jnp.float32), 32).item() == wanted


def test_entropy_clips_few_large_values_and_nothing_of_a_uniform_distribution():
    x = np.random.default_rng(0).uniform(-1, 1, 20000).astype(np.float32)
    assert chosen(entropy(256, 32), int8(), x)[1] > 0.9
    assert chosen(entropy(256, 32), int8(), x, np.float32([20.0]))[1] < 4


@functools.partial(jax.jit, static_argnums=3)
def _rounding_error(x, lo, hi, spec):
    scale, zero_point = params_from_range(lo, hi, spec)
    rounded = affine_decode(affine_encode(jnp.asarray(x), scale, zero_point, spec), scale, zero_point)
    return jnp.mean(jnp.square(rounded - x))


def rounding_error(x, lo, hi, spec):
    return _rounding_error(x, jnp.float32(lo), jnp.float32(hi), spec).item()


@pytest.mark.parametrize("spec", [int4(), int4(scale_rule="full"), int8(), integer(2)], ids=str)
def test_mse_finds_the_least_error_of_the_data_themselves(spec):
    x = heavy_tailed()
    lo, hi = chosen(mse(), spec, x)
    assert lo == -hi
    best = min(rounding_error(x, -t, t, spec) for t in np.linspace(0.01, 1, 300) * np.abs(x).max())
    assert rounding_error(x, lo, hi, spec) <= 1.002 * best


def test_mse_treats_the_sides_of_an_asymmetric_grid_separately():
    x = np.concatenate([np.abs(heavy_tailed(3000)), np.random.default_rng(1).uniform(-1, 0, 1000).astype(np.float32)])
    lo, hi = chosen(mse(), uint4(), x)
    shares = np.linspace(0.05, 1, 40)
    best = min(rounding_error(x, a * x.min(), b * x.max(), uint4()) for a in shares for b in shares)
    assert rounding_error(x, lo, hi, uint4()) <= 1.01 * best
    relu = np.maximum(heavy_tailed(), 0)
    lo, hi = chosen(mse(), uint4(), relu)
    assert lo == 0 and rounding_error(relu, lo, hi, uint4()) < 0.7 * rounding_error(relu, 0, relu.max(), uint4())


@every_chooser
@both_kinds
@pytest.mark.parametrize("value", [1.0, -0.3, np.finfo(np.float32).max, 2.0**-120])
def test_a_constant_is_covered(observer, spec, value):
    value = np.float32(value)
    lo, hi = chosen(observer, spec, np.full(9, value))
    if value > 0 or spec.symmetric:
        assert hi == pytest.approx(abs(value), rel=0.01) and hi <= abs(value)
    if value < 0 or spec.symmetric:
        assert lo == pytest.approx(-abs(value), rel=0.01) and lo >= -abs(value)
    if not spec.symmetric:
        assert min(abs(lo), abs(hi)) == 0


@every_chooser
@both_kinds
def test_after_relu_the_low_end_is_zero(observer, spec):
    lo, hi = chosen(observer, spec, np.maximum(heavy_tailed(), 0))
    assert 0 < hi <= heavy_tailed().max() and lo == (-hi if spec.symmetric else 0)


@every_chooser
@both_kinds
def test_magnitudes_at_the_ends_of_float32(observer, spec):
    x = heavy_tailed()
    largest = np.abs(x).max()
    whole = chosen(observer, spec, x)
    for scale in (2.0**120 / 2 ** np.ceil(np.log2(largest)), 2.0**-90):
        assert chosen(observer, spec, x * np.float32(scale)) == pytest.approx([v * scale for v in whole], rel=1e-6)
    lo, hi = chosen(observer, spec, np.float32([1e-40, 1e-42, -1e-41]))
    assert abs(lo) < 1e-39 and abs(hi) < 1e-39


@pytest.mark.parametrize(
    ("make", "error", "match"),
    [
        (lambda: percentile(0.999), ValueError, "`p` must be a percentage from 50 to 100, e.g. 99.9 for all but a thousandth, got 0.999"),
        (lambda: percentile(100.1), ValueError, "`p` .*100.1"),
        (lambda: percentile(float("nan")), ValueError, "`p` .*nan"),
        (lambda: percentile("99"), TypeError, "`p` must be a number.*'99'"),
        (lambda: entropy(2047), ValueError, "`bins` must be even and at least 2, got 2047"),
        (lambda: entropy(64), ValueError, r"`bins` must lie between `quantized_bins` \(128\) and 16384, got 64"),
        (lambda: entropy(2**15), ValueError, "`bins` .*32768"),
        (lambda: entropy(2048.0), TypeError, "`bins` must be an int, got 2048.0"),
        (lambda: entropy(quantized_bins=True), TypeError, "`quantized_bins` must be an int, got True"),
        (lambda: type(entropy())(64, 256, 32), ValueError, "`per_side` must be at least 4 . bins = 1024, got 64"),
        (lambda: mse(1), ValueError, "`steps` must lie between 2 and 1024, e.g. 64, got 1"),
        (lambda: mse(2.5), TypeError, "`steps` must be an int, e.g. 64, got 2.5"),
    ],
)
def test_arguments_are_checked(make, error, match):
    with pytest.raises(error, match=match):
        make()


def test_the_state_is_the_histograms():
    """So that one pass over the data serves several choices of a range."""
    state = feed(histogram(), heavy_tailed())
    assert [v.item() for v in percentile(99).range(state, int8())] == list(chosen(percentile(99), int8(), heavy_tailed()))
    assert percentile().per_side == mse().per_side == histogram().per_side == 8192 and entropy().per_side == 16384
