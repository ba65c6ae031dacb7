"""Pruned weights: exact zeros stay, in every method, and what compensates errors uses the weights that remain."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

import qjax
from qjax.core import QTensor, int3, int8, uint4
from qjax.ptq.gptq_solver import GPTQOptions, solve
from qjax.ptq.method import Problem
from qjax.ptq.sparsity import check_filled, check_zeros
from tests.ptq.test_gptq_golden import decoded

N, K, ROWS = 24, 96, 400
OPTIONS = {
    "plain": GPTQOptions(refine=2),
    "small blocks": GPTQOptions(block_size=16, refine=2),
    "act-order": GPTQOptions(act_order=True, refine=2),
    "static": GPTQOptions(act_order=True, static_groups=True, refine=2),
    "group-aware": GPTQOptions(group_aware=True, mse=True, refine=2),
    "gptaq": GPTQOptions(alpha=1.0, refine=2),
}


def pruned(pattern, seed=0):
    """A weight (N, K), 2:4 or half of it at random set to zero, smallest first."""
    w = np.random.default_rng(seed).standard_normal((N, K)).astype(np.float32)
    groups = np.abs(w).reshape(N, -1, 4) if pattern == "2:4" else np.abs(w)[:, None]
    keep = np.argsort(np.argsort(groups, -1), -1) >= groups.shape[-1] // 2
    return w * keep.reshape(N, K)


def inputs(seed=1):
    rng = np.random.default_rng(seed)
    return rng.standard_normal((ROWS, K)) @ (rng.standard_normal((K, K)) * np.exp(rng.standard_normal(K))) / K**0.5


def problem_of(pattern):
    w, x = pruned(pattern), inputs()
    lack = 0.1 * inputs(2)
    return w, *(jnp.float32(2 / ROWS * a.T @ x) for a in (x, lack))


def error(w_hat, w, h):
    d = np.float64(w_hat) - w
    return np.einsum("nk,kl,nl->", d, np.float64(h), d, optimize=True)


@pytest.mark.parametrize("name", OPTIONS)
def test_zeros_stay_and_the_rest_makes_up_for_them(name):
    spec = int8(group_size=24) if name in ("small blocks", "static") else uint4(group_size=24)
    w, h, d = problem_of("2:4" if spec.symmetric else "half")
    back = decoded(solve(jnp.asarray(w), h, spec, OPTIONS[name], d, masked=True))
    assert not back[w == 0].any()
    if OPTIONS[name].alpha:
        return
    masked_later = np.where(w == 0, 0, decoded(solve(jnp.asarray(w), h, spec, dataclasses.replace(OPTIONS[name], refine=0))))
    rounded = qjax.core.quantize(jnp.asarray(w), spec, (-1,)).dequantize()
    assert error(back, w, h) < 0.95 * min(error(masked_later, w, h), error(rounded, w, h))


def test_codes_are_those_of_sparse_gptq_column_by_column():
    """SparseGPT's loop in float64 with the mask given, where a pruned entry's whole target is an error for the columns after it, and
    two rounds over all columns, each rounded from where the others stand."""
    w, h, _ = problem_of("half")
    h64 = np.float64(h)
    upper = np.linalg.cholesky(np.linalg.inv(h64 + 0.01 * np.mean(np.diag(h64)) * np.eye(K))).T
    scale, now, back = np.abs(w).max(1) / 3.5, np.float64(w), np.zeros((N, K))
    for j in range(K):
        back[:, j] = np.where(w[:, j] == 0, 0, np.clip(np.round(now[:, j] / scale), -4, 3) * scale)
        now[:, j + 1 :] -= np.outer((now[:, j] - back[:, j]) / upper[j, j], upper[j, j + 1 :])
    damped = h64 + 0.01 * np.mean(np.diag(h64)) * np.eye(K)
    for j in [*range(K), *range(K)]:
        target = w[:, j] + np.delete(w - back, j, 1) @ np.delete(damped[:, j], j) / damped[j, j]
        back[:, j] = np.where(w[:, j] == 0, 0, np.clip(np.round(target / scale), -4, 3) * scale)
    found = decoded(solve(jnp.asarray(w), h, int3(), GPTQOptions(refine=2), masked=True))
    assert np.mean(np.isclose(found, back, atol=1e-4)) >= 0.999


def test_a_dense_weight_runs_the_program_that_knows_no_mask():
    w = pruned("half")
    before = solve._cache_size()
    method = qjax.gptq(damping=0.0123)
    dense, masked = (Problem(jnp.asarray(a), int3(), (-1,), (), 1, "w") for a in (np.where(w == 0, 1e-3, w), w))
    state = method.observer.update(method.observer.init(1, K), qjax.calibration.Rows(jnp.float32(inputs())[None]))
    method.quantize(dense, state)
    assert solve._cache_size() == before + 1
    q: QTensor = method.quantize(masked, state).q
    assert solve._cache_size() == before + 2 and not np.asarray(q.dequantize())[w == 0].any()


def test_only_a_pruned_weight_is_refined_unasked_and_that_is_said_and_priced():
    w, (x,) = pruned("half"), (inputs(),)
    full = np.where(w == 0, 1e-3, w)
    one, method = full.copy(), qjax.gptq(mse=False)
    one[3, 5] = 0
    state = method.observer.update(method.observer.init(1, K), qjax.calibration.Rows(jnp.float32(x)[None]))
    problems = [Problem(jnp.asarray(a), int3(), (-1,), (), 1, "w") for a in (full, one, w)]
    dense, single, many = (method.quantize(problem, state) for problem in problems)
    assert dense.notes == single.notes == () and many.notes == ("50 % of it is pruned: 2 passes of refinement",)
    others = np.arange(N) != 3  # the outputs that have no zero are what they were
    before, after = (np.asarray(outcome.q.dequantize()) for outcome in (dense, single))
    np.testing.assert_array_equal(before[others], after[others])
    assert after[3, 5] == 0
    asked = qjax.gptq(mse=False, refine=2)
    assert asked.quantize(problems[2], state).notes == ()
    assert method.work(problems[0]) == method.work(problems[1]) < method.work(problems[2]) == asked.work(problems[2])


def test_what_fills_zeros_in_refuses_a_pruned_weight():
    w = jnp.asarray(pruned("half").T)
    for method in (qjax.low_rank(2), qjax.awq(then=qjax.online_rotation())):
        policy = qjax.Policy([qjax.Rule("*", weight=int3(), method=method)])
        with pytest.raises(ValueError, match=r"`method` .* keeps no exact zeros, and 50 % of 'w' is: .*qjax\.gptq\(\)"):
            qjax.quantize(lambda p, x: x @ p["w"], {"w": w}, policy, [jnp.full((2, K), jnp.nan)])  # before it looks at data
    # An output of nothing but zeros stays one; a part that is pruned counts by itself.
    kept = qjax.low_rank(2, kind="svd").quantize(Problem(w.at[:].set(1.3).at[:, :9].set(0.0), int3(), (-2,), (), 1, "w"))
    assert kept.notes == () and not np.asarray(kept.q.dequantize())[:, :9].any()
    with pytest.raises(ValueError, match="50 % of 'w'"):
        check_filled(Problem(jnp.stack([w, *[jnp.ones_like(w)] * 9]), int3(), (-2,), (-3,), 1, "w"), "low_rank")


def test_a_grid_without_a_zero_is_refused_for_a_pruned_weight_and_said_of_a_few_zeros():
    signs = qjax.codebook((-1.0, 1.0), group_size=24)
    policy = qjax.Policy([qjax.Rule("*", weight=signs)])
    w = pruned("2:4").T
    with pytest.raises(ValueError, match=r"`weight`=.*no level that is exactly zero, and 50 % of 'up' is: .*qjax.int4"):
        qjax.quantize(lambda p, x: x @ p["up"], {"up": w}, policy, [jnp.ones((2, K))])
    with pytest.raises(ValueError, match="50 % of 'w'"):  # a part that is pruned counts by itself
        check_zeros(Problem(jnp.stack([w, *[jnp.ones_like(w)] * 9]), signs, (-2,), (-3,), 1, "w"))
    few = np.where(np.arange(K * N).reshape(K, N) < 20, 0, np.where(w == 0, 1e-3, w))
    result = qjax.quantize(lambda p, x: x @ p["up"], {"up": few}, policy, [jnp.ones((2, K))])
    assert any("0.87 % of it is exactly zero" in note for note in result.report.rows[0].notes)


def test_blocks_of_nothing_but_zeros_are_zero_on_every_grid():
    """Two outputs of eight, a part of two, the whole weight: where scales are 0 nothing comes back, and nothing is refused or said."""
    w = np.random.default_rng(3).standard_normal((2, 16, 8)).astype(np.float32)
    w[1], few = 0, w.copy()
    few[0, :, :2] = 0
    floating, table = uint4(group_size=8, zero_dtype="float16"), qjax.nf4(8, table="quantile")
    for spec, method in ((floating, qjax.hqq()), (qjax.binary(), qjax.rtn()), (table, qjax.rtn())):
        problem = Problem(jnp.asarray(few), spec, (-2,), (-3,), 1, "w")
        back = np.asarray(method.quantize(problem, None).q.dequantize())
        assert check_zeros(problem) == () and not back[few == 0].any() and back.any(), spec
    assert check_zeros(problem._replace(w=jnp.zeros((2, 16, 8)))) == ()
    # Scales of 8 bits stand over those of all blocks of a part, and columns in another order have other groups.
    nested = qjax.nf4(8, table="quantile", double_quant=True)
    assert check_zeros(problem._replace(w=jnp.asarray(w), spec=nested)) == ()
    group = problem._replace(w=jnp.asarray(w).at[:, :8].set(0.0), spec=floating)
    assert check_zeros(group) == ()
    for problem, permuted in ((group, True), (group._replace(spec=nested), False)):
        with pytest.raises(ValueError, match="50 % of 'w'"):
            check_zeros(problem, permuted)
    policy = qjax.Policy([qjax.Rule("*", weight=floating, method=qjax.gptq(act_order=True))])
    with pytest.raises(ValueError, match="50 % of 'up'"):
        qjax.quantize(lambda p, x: x @ p["up"], {"up": group.w[0]}, policy, [jnp.ones((2, 16))])
