"""GPTQ's numbers against a plain NumPy GPTQ, and at the edges. Golden data is in test_gptq_golden.py."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qjax.core import (
    IntSpec,
    PerBlock,
    PerGroup,
    PerTensor,
    assemble,
    bf16,
    binary,
    fp4,
    int2,
    int3,
    int4,
    int8,
    integer,
    nf4,
    quantize,
    uint4,
)  # fmt: skip
from qjax.ptq.gptq_solver import GPTQOptions, check_solved, solve
from tests.parameters import every_other


def output_mse(w, w_hat, hessian):
    """Mean over samples and outputs of the squared output error: trace(D H D^T) / 2 / N."""
    d = np.asarray(w_hat, np.float64) - np.asarray(w, np.float64)
    return float(np.einsum("nk,kl,nl->", d, np.asarray(hessian, np.float64), d, optimize=True)) / 2 / len(d)


def dequantized(solution, spec, k):
    perm = None if solution.perm is None else solution.perm[None]
    scale, zero_point = solution.scale, solution.zero_point
    return np.asarray(assemble(solution.codes, scale, zero_point, spec, (-1,), (k,), jnp.float32, perm).dequantize())


# ---------------------------------------------------------------- a plain GPTQ, in float64, written from the paper
def reference_grid(block, spec):
    """(scale, zero point) of a block (rows, group). Scales are float32."""
    block = np.float32(block)
    lo, hi = np.minimum(block.min(), 0), np.maximum(block.max(), 0)
    if not isinstance(spec, IntSpec):
        return np.abs(block).max().astype(spec.scale_dtype).astype(np.float64), 0
    steps = 2**spec.bits - 1
    if spec.symmetric:
        reach = max(-lo, hi)
        half = spec.scale_rule == "half"
        scale = reach / np.float32(steps / 2 if half else 2 ** (spec.bits - 1) - 1)
        return np.float64(scale.astype(spec.scale_dtype)), 0
    scale = np.float64(((hi - lo) / np.float32(steps)).astype(spec.scale_dtype))
    return scale, np.clip(np.rint(spec.qmin - lo / scale), spec.qmin, spec.qmax)


def reference_round(x, scale, zero_point, spec):
    """(codes, values, whether there was no doubt) of a column.

    In doubt: half-way between two codes but for rounding errors, as the negative value that sets a scale always is.
    """
    if isinstance(spec, IntSpec):
        codes = np.clip(np.rint(np.float32(x) / np.float32(scale)) + zero_point, spec.qmin, spec.qmax)
        return codes, (codes - zero_point) * scale, np.abs(x / scale % 1 - 0.5) > 1e-5
    levels = np.float64(np.float32(spec.levels))
    distances = np.abs(x[:, None] / scale[:, None] - levels)
    codes = np.argmin(distances, axis=1)
    best, second = np.sort(distances, axis=1)[:, :2].T
    return codes, levels[codes] * scale, (second - best > 1e-5) | (second == best)


def reference_gptq(w, hessian, spec, options):
    """Codes in the original order, and which rows never were in doubt.

    One column at a time, every update made at once, U from the inverse of the Hessian. `seen` is what a group that starts
    inside a block sees: the weights as they were when the block started.
    """
    w, h = np.float64(w).copy(), np.float64(hessian).copy()
    n, k = w.shape
    match spec.granularity:
        case PerGroup(size):
            tile, group = 1, size
        case PerBlock(rows, columns):
            tile, group = rows, columns
        case PerTensor():
            tile, group = n, k
        case _:
            tile, group = 1, k

    def grids(rows):
        pairs = [reference_grid(rows[i : i + tile], spec) for i in range(0, n, tile)]
        return np.repeat(np.array(pairs), tile, axis=0).T

    fixed = options.static_groups or group == k
    known = [grids(w[:, i : i + group]) for i in range(0, k, group)] if fixed else []
    order = np.argsort(-np.diag(h), kind="stable") if options.act_order else np.arange(k)
    w, h = w[:, order], h[order][:, order]
    h += options.damping * np.mean(np.diag(h)) * np.eye(k)
    u = np.linalg.cholesky(np.linalg.inv(h)).T
    codes, sure, seen = np.zeros((n, k), int), np.ones(n, bool), w
    for j in range(k):
        if fixed:
            scale, zero_point = known[order[j] // group]
        elif j % group == 0:
            seen = w.copy() if j % (max(1, options.block_size // group) * group) == 0 else seen
            scale, zero_point = grids(seen[:, j : j + group])
        codes[:, j], values, clear = reference_round(w[:, j], scale, zero_point, spec)
        sure &= clear
        w[:, j:] -= np.outer((w[:, j] - values) / u[j, j], u[j, j:])
    return codes[:, np.argsort(order)], sure


@functools.cache
def problem(n, k, seed=0):
    """A weight (n, k) and the Hessian of correlated inputs whose channels differ in size."""
    rng = np.random.default_rng(seed)
    mix = np.eye(k) + rng.standard_normal((k, k)) / np.sqrt(k)
    x = rng.standard_normal((3 * k, k)) @ mix * np.exp(rng.standard_normal(k) / 2)
    return rng.standard_normal((n, k)).astype(np.float32), (2 / len(x) * x.T @ x).astype(np.float32)


FULL_ORDER = GPTQOptions(act_order=True, static_groups=True)


def describe(value):
    """A short test id; of options only what is switched on."""
    return "+".join(k for k, v in vars(value).items() if v is True) if isinstance(value, GPTQOptions) else str(value)


REFERENCE_CASES = [
    (64, 256, int4(), GPTQOptions()),
    (64, 256, int8(per="tensor"), GPTQOptions(act_order=True)),
    (64, 131, integer(5), GPTQOptions()),
    (64, 256, int2(group_size=64), GPTQOptions()),
    (64, 256, int3(group_size=16, scale_rule="full"), GPTQOptions(act_order=True)),
    (64, 240, integer(6, group_size=48), GPTQOptions(damping=0.05)),
    (64, 262, uint4(group_size=131), GPTQOptions()),
    (64, 384, integer(7, symmetric=False, group_size=192), GPTQOptions()),
    (64, 250, int4(group_size=5, scale_rule="full"), GPTQOptions()),
    (64, 256, int4(group_size=32), GPTQOptions(block_size=64)),
    (64, 256, int4(group_size=32, scale_dtype="float16"), FULL_ORDER),
    (64, 256, uint4(group_size=256), GPTQOptions(act_order=True)),
    (64, 256, int4(block=(8, 32)), GPTQOptions()),
    (64, 256, nf4(64), GPTQOptions()),
    (64, 256, fp4(32), FULL_ORDER),
    (32, 1280, int4(group_size=640), GPTQOptions()),
]


@pytest.mark.parametrize(
    ("n", "k", "spec", "options"),
    every_other(REFERENCE_CASES),
    ids=describe,
)
def test_agrees_with_a_plain_numpy_gptq(n, k, spec, options):
    w, hessian = problem(n, k)
    with jax.numpy_rank_promotion("raise"), jax.numpy_dtype_promotion("strict"):
        s = solve(jnp.asarray(w), jnp.asarray(hessian), spec, options)
    codes = np.asarray(s.codes)
    if s.perm is not None:
        codes = codes[:, np.argsort(s.perm)]
    # fp4 has two codes for zero.
    levels = codes if isinstance(spec, IntSpec) else np.float32(spec.levels)[codes]
    expected, sure = reference_gptq(w, hessian, spec, options)
    expected = expected if isinstance(spec, IntSpec) else np.float32(spec.levels)[expected]
    assert np.mean(sure) > 0.75
    assert np.mean(levels[sure] == expected[sure]) >= 0.999
    # The loss is that of the solution with the Hessian as given, and below that of rounding.
    w_hat = dequantized(s, spec, k)
    assert float(s.loss) == pytest.approx(output_mse(w, w_hat, hessian) * 2 * n, rel=2e-3)
    assert output_mse(w, w_hat, hessian) < output_mse(w, quantize(w, spec, (-1,)).dequantize(), hessian)


def test_block_size_changes_only_the_time_unless_groups_are_smaller():
    w, hessian = problem(64, 256)
    a, b = (solve(w, hessian, int4(group_size=64), GPTQOptions(block_size=size)) for size in (32, 64))
    assert np.mean(a.codes == b.codes) > 0.999
    assert float(a.loss) == pytest.approx(float(b.loss), rel=1e-2)


# ---------------------------------------------------------------- order
def test_permutation_is_by_falling_diagonal_and_only_where_groups_need_it():
    w, hessian = problem(16, 64)
    ordered = GPTQOptions(act_order=True)
    s = solve(w, hessian, int4(group_size=16), ordered)
    np.testing.assert_array_equal(s.perm, np.argsort(-np.diag(hessian), kind="stable"))
    for spec, options in ((int4(), ordered), (int4(group_size=64), ordered), (int4(group_size=16), FULL_ORDER)):
        assert solve(w, hessian, spec, options).perm is None


def test_order_of_the_inputs_does_not_matter_with_act_order():
    w, hessian = problem(16, 64)
    shuffled = np.random.default_rng(3).permutation(64)
    spec, options = int4(group_size=16), GPTQOptions(act_order=True)
    a = solve(w, hessian, spec, options)
    b = solve(w[:, shuffled], hessian[shuffled][:, shuffled], spec, options)
    np.testing.assert_array_equal(shuffled[np.asarray(b.perm)], a.perm)
    assert np.mean(a.codes == b.codes) > 0.999


def test_static_groups_keep_the_scales_of_rounding():
    w, hessian = problem(16, 64)
    rounded = quantize(w, int4(group_size=16), (-1,))
    for act_order in (False, True):
        s = solve(w, hessian, int4(group_size=16), GPTQOptions(act_order=act_order, static_groups=True))
        np.testing.assert_array_equal(s.scale, rounded.scale)


# ---------------------------------------------------------------- Hessians that are not nice
@pytest.mark.parametrize(
    ("spec", "act_order"),
    [
        (int4(group_size=16), False),
        (int4(group_size=16), True),
        (uint4(), True),
        (int8(per="tensor"), False),
        (nf4(16), True),
    ],
    ids=str,
)
def test_a_hessian_without_data_gives_plain_rounding(spec, act_order):
    w, _ = problem(16, 64)
    s = solve(w, jnp.zeros((64, 64)), spec, GPTQOptions(act_order=act_order))
    rounded = quantize(w, spec, (-1,))
    np.testing.assert_array_equal(dequantized(s, spec, 64), rounded.dequantize())
    np.testing.assert_array_equal(s.scale, rounded.scale)
    assert (s.dead, s.retries, s.loss) == (64, 0, 0.0)


@pytest.mark.parametrize("act_order", [False, True])
def test_dead_columns_become_zero_and_do_not_disturb_the_others(act_order):
    w, hessian = problem(16, 64)
    w, hessian = w.copy(), hessian.copy()
    dead = np.array([0, 7, 40])
    w[:, dead] *= 100
    hessian[dead], hessian[:, dead] = 0, 0
    options = GPTQOptions(act_order=act_order)
    # Groups take their range without dead columns ...
    s = solve(w, hessian, int4(group_size=16), options)
    w_hat = dequantized(s, int4(group_size=16), 64)
    assert s.dead == 3 and np.all(w_hat[:, dead] == 0) and np.max(s.scale) < 1
    assert float(s.loss) == pytest.approx(output_mse(w, w_hat, hessian) * 2 * 16, rel=1e-3)
    # ... channels with them; and the rest is what it would be without them.
    s = solve(w, hessian, uint4(), options)
    lone = w.copy()
    lone[:, dead] = 0
    np.testing.assert_array_equal(s.scale, quantize(w, uint4(), (-1,)).scale)
    assert np.all(dequantized(s, uint4(), 64)[:, dead] == 0)
    if act_order:  # dead columns come last
        perm = solve(w, hessian, int4(group_size=16), options).perm
        np.testing.assert_array_equal(np.sort(perm[-3:]), dead)


def test_only_ratios_of_the_hessian_matter():
    w, hessian = problem(16, 64)
    hessian = hessian.copy()
    hessian[5], hessian[:, 5] = 0, 0
    options = GPTQOptions(act_order=True)
    a, b = (solve(w, hessian * np.float32(f), int4(group_size=16), options) for f in (1, 2.0**-40))
    np.testing.assert_array_equal(a.codes, b.codes)
    np.testing.assert_array_equal(a.perm, b.perm)
    assert float(b.loss) == pytest.approx(float(a.loss) * 2.0**-40, rel=1e-5)


def test_fewer_samples_than_inputs_is_solved_or_damped_and_said():
    rng = np.random.default_rng(1)
    w, x = rng.standard_normal((32, 128)).astype(np.float32), rng.standard_normal((40, 128)).astype(np.float32)
    hessian = 2 / 40 * x.T @ x
    rounded = output_mse(w, quantize(w, int4(), (-1,)).dequantize(), hessian)
    with_damping = solve(w, hessian, int4())
    assert with_damping.retries == 0
    without = solve(w, hessian, int4(), GPTQOptions(damping=0.0))
    assert without.retries == 1 and float(without.damping_used) == pytest.approx(0.01)
    for s in (with_damping, without):
        assert np.isfinite(s.loss)
        assert output_mse(w, dequantized(s, int4(), 128), hessian) < 0.5 * rounded
    check_solved(without, "w")


def test_damping_rises_step_by_step_until_the_hessian_is_positive():
    w, hessian = problem(8, 32)
    vals, vecs = np.linalg.eigh(np.float64(hessian))
    mean = np.mean(np.diag(hessian))
    # One eigenvalue of -.1 of the mean diagonal: .01, .02, .04 and .08 are too little.
    vals[0] = -0.1 * mean
    bad = (vecs * vals @ vecs.T).astype(np.float32)
    s = solve(w, bad, int4())
    steps = np.array([0.01 * 2**t for t in range(11)])
    expected = int(np.argmax(steps * np.mean(np.diag(bad)) * 0.5 > 0.1 * mean))
    assert s.retries in (expected, expected - 1)  # half of the damping has to be left
    assert float(s.damping_used) == pytest.approx(steps[int(s.retries)]) and np.all(np.isfinite(s.scale))
    refused = solve(w, bad, int4(), GPTQOptions(max_damping_retries=1))
    assert refused.retries == 1 and np.isnan(refused.damping_used) and np.isnan(refused.loss)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_hessian_that_is_not_finite_is_reported(value):
    w, hessian = problem(8, 32)
    hessian = hessian.copy()
    hessian[3, 3] = value
    s = solve(w, hessian, int4())
    assert np.isnan(s.damping_used) and np.isnan(s.loss)
    with pytest.raises(ValueError, match=r"the Hessian of `layers/0/kernel` \(1 of 1 matrices\) could not be factorized"):
        check_solved(s, "layers/0/kernel")


# ---------------------------------------------------------------- shapes, transformations, programs
@pytest.mark.parametrize("shape", [(1, 1), (5, 1), (3, 17), (1, 513)])
def test_odd_shapes(shape):
    w, hessian = problem(*shape)
    s = solve(w, hessian, int4())
    assert s.codes.shape == shape and s.scale.shape == (shape[0], 1)
    expected, sure = reference_gptq(w, hessian, int4(), GPTQOptions())
    np.testing.assert_array_equal(np.asarray(s.codes)[sure], expected[sure])


@pytest.mark.parametrize("options", [GPTQOptions(act_order=True), FULL_ORDER], ids=describe)
def test_padding(options):
    w, hessian = problem(8, 100)
    spec = int4(group_size=48, pad=True)
    s = solve(w, hessian, spec, options)
    assert s.codes.shape == (8, 100) and s.scale.shape == (8, 3)
    w_hat = dequantized(s, spec, 100)
    rounded = quantize(w, spec, (-1,)).dequantize()
    assert output_mse(w, w_hat, hessian) < output_mse(w, rounded, hessian)


@pytest.mark.parametrize(("mse", "kept"), [(False, 1), (True, 2)])
def test_padding_does_not_count_in_the_mean_of_a_group(mse, kept):
    spec = dataclasses.replace(binary(group_size=16, pad=True), granularity=PerBlock(kept, 16) if kept > 1 else PerGroup(16))
    w = jnp.repeat(jnp.float32([[2.0, 1.0, 3.0]]), 16, axis=1)[:, :33].repeat(2, axis=0)
    for options in (GPTQOptions(mse=mse), GPTQOptions(mse=mse, static_groups=True)):
        np.testing.assert_allclose(dequantized(solve(w, jnp.eye(33), spec, options), spec, 33), w, rtol=1e-6)


@pytest.mark.parametrize(
    ("spec", "scale_shape"),
    [(int4(per="tensor"), (1, 1)), (int4(), (8, 1)), (uint4(group_size=8), (8, 4)), (int4(block=(4, 8)), (2, 4))],
    ids=str,
)
def test_shapes_and_dtypes_of_a_solution(spec, scale_shape):
    w, hessian = problem(8, 32)
    s = solve(jnp.asarray(w, jnp.bfloat16), hessian, spec)
    assert s.codes.shape == (8, 32) and s.codes.dtype == jnp.int32
    assert s.scale.shape == scale_shape and s.scale.dtype == jnp.float32
    assert (s.zero_point is None) == spec.symmetric
    if s.zero_point is not None:
        assert s.zero_point.shape == scale_shape and s.zero_point.dtype == jnp.int32
    assert np.min(s.codes) >= spec.qmin and np.max(s.codes) <= spec.qmax


@pytest.mark.parametrize(
    ("spec", "options"),
    [(uint4(group_size=32), GPTQOptions(act_order=True)), (int8(per="tensor"), GPTQOptions()), (nf4(32), FULL_ORDER)],
    ids=describe,
)
def test_vmap_equals_a_loop_and_an_expert_without_data_is_rounded(spec, options):
    ws, hs = (np.stack(a) for a in zip(*(problem(16, 96, seed) for seed in range(4)), strict=True))
    hs[2] = 0
    together = jax.vmap(lambda w, h: solve(w, h, spec, options))(ws, hs)
    for i in range(4):
        alone = solve(ws[i], hs[i], spec, options)
        assert np.mean(together.codes[i] == alone.codes) > 0.999
        np.testing.assert_allclose(together.scale[i], alone.scale, rtol=1e-4)
        assert float(together.loss[i]) == pytest.approx(float(alone.loss), rel=1e-3)
        assert (together.dead[i], together.retries[i]) == (alone.dead, alone.retries)
    rounded = quantize(ws[2], spec, (-1,)).dequantize()
    alone = jax.tree.map(lambda leaf: leaf[2], together)
    np.testing.assert_array_equal(dequantized(alone, spec, 96), rounded)


def test_vmap_keeps_the_damping_of_each():
    ws, hs = (np.stack(a) for a in zip(*(problem(8, 32, seed) for seed in range(3)), strict=True))
    hs[1] = 1.0  # rank one
    s = jax.vmap(lambda w, h: solve(w, h, int4(), GPTQOptions(damping=0.0)))(ws, hs)
    np.testing.assert_array_equal(s.retries, [0, 1, 0])
    np.testing.assert_allclose(s.damping_used, [0, 0.01, 0], atol=1e-9)
    hs[1] = np.nan
    with pytest.raises(ValueError, match="1 of 3 matrices"):
        check_solved(jax.vmap(lambda w, h: solve(w, h, int4()))(ws, hs), "experts")


def test_inside_another_jit_the_codes_are_the_same():
    w, hessian = problem(16, 96)
    spec, options = uint4(group_size=32), GPTQOptions(act_order=True)
    inner = solve(w, hessian, spec, options)
    outer = jax.jit(lambda w, h: solve(w * 1.0, h, spec, options))(w, hessian)
    np.testing.assert_array_equal(inner.codes, outer.codes)
    np.testing.assert_array_equal(inner.scale, outer.scale)


def test_one_trace_for_a_shape():
    w, hessian = problem(8, 32)
    before = solve._cache_size()
    for factor in (1, 2, 3):
        solve(w * np.float32(factor), hessian, int4(), GPTQOptions(damping=0.03))
    assert solve._cache_size() == before + 1


# ---------------------------------------------------------------- refusals
def test_refusals_name_the_argument():
    w, h = jnp.zeros((4, 8)), jnp.zeros((8, 8))
    with pytest.raises(TypeError, match="`spec` must have codes and scales"):
        solve(w, h, bf16())
    with pytest.raises(ValueError, match=r"`hessian` must have the shape \(8, 8\), .* got \(4, 4\)"):
        solve(w, jnp.zeros((4, 4)), int4())
    with pytest.raises(ValueError, match=r"`w` must have the shape \(outputs, inputs\).* got \(2, 4, 8\)"):
        solve(jnp.zeros((2, 4, 8)), h, int4())
    with pytest.raises(TypeError, match="`w` must be floating, got int32"):
        solve(jnp.zeros((4, 8), jnp.int32), h, int4())
    with pytest.raises(ValueError, match="`group_size`=3 does not divide the 8 contracted values"):
        solve(w, h, int4(group_size=3))
    for bad in ({"damping": np.nan}, {"damping_increment": 0.0}, {"block_size": 0}, {"max_damping_retries": True}):
        with pytest.raises(ValueError, match=f"`{next(iter(bad))}` must be"):
            GPTQOptions(**bad)
    with pytest.raises(ValueError, match="`refine` must be an int of at least 0"):
        GPTQOptions(refine=-1)


def test_a_weight_per_token_is_per_channel():
    w, hessian = problem(8, 32)
    token = solve(w, hessian, integer(4, per="token"))
    np.testing.assert_array_equal(token.codes, solve(w, hessian, int4()).codes)


@pytest.mark.parametrize("how", [{"block_size": 16}, {"act_order": True}, {"group_aware": True, "damping": 0.01}], ids=str)
def test_refining_never_raises_the_damped_loss_and_keeps_the_grids(how):
    w, hessian = problem(12, 72)
    spec, options = int4(group_size=24), GPTQOptions(**{"damping": 0.0, **how})
    once, *refined = (solve(jnp.asarray(w), jnp.asarray(hessian), spec, dataclasses.replace(options, refine=n)) for n in (0, 1, 4))
    for s in refined:
        np.testing.assert_array_equal(s.scale, once.scale)
        found = output_mse(w, dequantized(s, spec, 72), hessian) if s.perm is None else float(s.loss) / 24
        assert float(s.loss) == pytest.approx(found * 24, rel=2e-3)
    added = options.damping * np.mean(np.diag(np.float64(hessian)))
    losses = [float(s.loss) + (added * np.sum(np.square(dequantized(s, spec, 72) - w)) if added else 0) for s in (once, *refined)]
    assert losses[2] <= losses[1] < 0.98 * losses[0]
    assert (once.perm is None) == ("act_order" not in how)


def test_group_aware_order_of_a_single_or_a_ragged_group():
    w, hessian = problem(8, 40)
    whole = [solve(w, hessian, int4(), GPTQOptions(**how)) for how in ({"group_aware": True}, {"act_order": True})]
    np.testing.assert_array_equal(whole[0].codes, whole[1].codes)
    padded = int4(group_size=16, pad=True)
    s = solve(w, hessian, padded, GPTQOptions(group_aware=True))
    assert s.perm is None and s.scale.shape == (8, 3)
    assert output_mse(w, dequantized(s, padded, 40), hessian) < output_mse(w, quantize(w, padded, (-1,)).dequantize(), hessian)
