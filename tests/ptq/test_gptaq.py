"""GPTAQ: against gptqmodel's answers, against its formula column by column, and what it is for."""

import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import qjax
from qjax.calibration import CrossMoment, Rows, deviation, hessian
from qjax.core import int3, quantize
from qjax.ptq.gptq_solver import GPTQOptions, solve
from qjax.ptq.method import Problem
from tests.golden.make_gptaq import CASES, layer

GOLDEN = dict(np.load(pathlib.Path(__file__).parents[1] / "golden" / "gptaq.npz"))


def statistics():
    w, x, floats = layer()
    observer = CrossMoment()
    state = observer.update(observer.init(1, x.shape[1]), Rows(jnp.asarray(x)[None], reference=jnp.asarray(floats)[None]))
    return jnp.asarray(w), hessian(state)[0], deviation(state)[0]


def output_error(w_hat):
    """Mean squared difference to the float model's output, that of w on its own inputs."""
    w, x, floats = (np.float64(a) for a in layer())
    return np.mean((floats @ w.T - x @ np.float64(w_hat).T) ** 2)


def decoded(codes, scale):
    return codes * np.repeat(scale, codes.shape[1] // scale.shape[1], axis=1)


def solved(group, alpha, act_order=False, static=False, **options):
    spec = int3() if group == -1 else int3(group_size=group)
    w, h, d = statistics()
    s = solve(w, h, spec, GPTQOptions(alpha=alpha, act_order=act_order, static_groups=static, **options), d)
    codes, back = np.asarray(s.codes), decoded(np.asarray(s.codes), np.asarray(s.scale))
    order = np.arange(codes.shape[1]) if s.perm is None else np.argsort(s.perm)
    return codes[:, order], back[:, order]


@pytest.mark.parametrize("case", CASES)
def test_it_is_as_good_as_the_reference_and_near_its_codes(case):
    group, alpha, act_order, static = CASES[case]
    theirs = np.int32(GOLDEN[f"{case}_codes"]) - 4
    error = output_error(theirs * GOLDEN[f"{case}_scale"][:, GOLDEN[f"{case}_g_idx"]])
    codes, back = solved(group, alpha, act_order, static)
    plain, uncorrected = solved(group, 0.0, act_order, static)
    # Theirs multiplies P with updated weights, ours with the original ones; groups take their range from the corrected weights.
    assert output_error(back) < 1.04 * error and output_error(back) < 0.98 * output_error(uncorrected)
    agree, without = np.mean(codes == theirs), np.mean(plain == theirs)
    assert agree > without + 0.02
    assert agree > (0.73 if case.startswith("groups") else 0.88)


@pytest.mark.parametrize("alpha", [0.25, 1.0])
def test_codes_are_those_of_the_formula_column_by_column(alpha):
    """The authors' loop in float64, blocks and all left out: P times the original weight, whose float output is aimed at."""
    w, h, d = (np.float64(a) for a in statistics())
    k = w.shape[1]
    upper = np.linalg.cholesky(np.linalg.inv(h + 0.01 * np.mean(np.diag(h)) * np.eye(k))).T
    p = alpha * np.triu(d @ upper.T, 1) @ upper
    scale, now, codes = np.abs(w).max(1) / 3.5, w.copy(), np.zeros(w.shape, int)
    for j in range(k):
        codes[:, j] = np.clip(np.round(now[:, j] / scale), -4, 3)
        error = (now[:, j] - codes[:, j] * scale) / upper[j, j]
        now[:, j + 1 :] += np.outer(w[:, j], p[j, j + 1 :]) - np.outer(error, upper[j, j + 1 :])
    assert np.mean(solved(-1, alpha)[0] == codes) >= 0.999
    assert np.mean(solved(-1, alpha, block_size=16)[0] == codes) >= 0.999


def test_it_lowers_the_error_in_the_order_of_groups_too():
    corrected, plain = (output_error(solved(32, alpha, group_aware=True)[1]) for alpha in (0.25, 0.0))
    assert corrected < 0.98 * plain < output_error(quantize(jnp.asarray(layer()[0]), int3(group_size=32), (-1,)).dequantize())


def test_without_a_difference_it_is_gptq():
    w, h, _ = statistics()
    plain, same = (solve(w, h, int3(group_size=32), GPTQOptions(alpha=a), jnp.zeros_like(h)) for a in (0.0, 0.25))
    np.testing.assert_array_equal(plain.codes, same.codes)


def test_a_singular_hessian_is_damped_and_reported_and_dead_columns_stay_out():
    w, x, floats = layer()
    x = np.where(np.arange(x.shape[1]) % 5 == 0, 0, x[:, :1])  # one direction, and a fifth of the columns without data
    observer = CrossMoment()
    state = observer.update(observer.init(1, x.shape[1]), Rows(jnp.asarray(x)[None], reference=jnp.asarray(floats)[None]))
    s = solve(jnp.asarray(w), hessian(state)[0], int3(), GPTQOptions(alpha=0.25, damping=0.0), deviation(state)[0])
    assert s.retries > 0 and s.damping_used > 0 and s.dead == 26
    assert np.isfinite(s.scale).all() and not np.asarray(s.codes)[:, ::5].any()
    method = qjax.gptaq(damping=0.0)
    problem = Problem(jnp.asarray(w), int3(), (-1,), (), 1, "w")
    notes = method.quantize(problem, state).notes
    assert any("damping raised to" in note for note in notes) and any("26 dead columns" in note for note in notes)


# Whole programs.


def network(p, x):
    def step(x, w):
        return x + jnp.tanh(x @ w["a"]) @ w["b"], None

    return jax.lax.scan(step, x, p["layers"])[0] @ p["out"]


def parameters():
    rng = np.random.default_rng(0)
    shapes = {"layers": {"a": (4, 16, 24), "b": (4, 24, 16)}, "out": (16, 8)}
    return jax.tree.map(lambda n: jnp.float32(rng.standard_normal(n)) / 4, shapes, is_leaf=lambda n: isinstance(n, tuple))


@pytest.mark.slow
def test_a_program_of_stacked_layers_comes_nearer_to_the_float_one():
    rng = np.random.default_rng(1)
    data = [jnp.float32(rng.standard_normal((64, 16))) for _ in range(4)]
    test, params = jnp.float32(rng.standard_normal((512, 16))), parameters()
    want, errors = network(params, test), []
    for method in (qjax.gptq(), qjax.gptaq(1.0)):
        result = qjax.quantize(network, params, qjax.Policy([qjax.Rule("*", weight=int3(), method=method)]), data)
        errors.append(float(jnp.mean(jnp.square(qjax.quantized(network)(result.params, test) - want))))
        assert not any("float program" in note for row in result.report.rows for note in row.notes)
    assert errors[1] < 0.95 * errors[0]


def test_where_no_float_rows_stand_beside_the_inputs_it_says_so():
    def looped(p, x):
        return jax.lax.while_loop(lambda s: s[0] < 2, lambda s: (s[0] + 1, jnp.tanh(s[1] @ p["w"])), (0, x))[1]

    params, data = {"w": parameters()["layers"]["a"][0, :, :16]}, [jnp.ones((4, 16)) * jnp.arange(16.0)]
    result = qjax.quantize(looped, params, qjax.Policy([qjax.Rule("*", weight=int3(), method=qjax.gptaq())]), data)
    assert "nothing of the float program was seen beside its inputs: rounded like gptq" in result.report.rows[0].notes


def test_names_and_refusals():
    assert qjax.gptaq().name == "gptaq" and qjax.gptaq(0.5, group_aware=True).name == "gptaq(group_aware, alpha=0.5)"
    assert qjax.gptq(group_aware=True).name == "gptq(group_aware)"
    with pytest.raises(ValueError, match="`alpha` must be greater than 0, got 0"):
        qjax.gptaq(0)
    with pytest.raises(ValueError, match="`alpha` must be a finite number"):
        qjax.gptaq(float("inf"))
    with pytest.raises(ValueError, match="`act_order` and `group_aware` are two orders"):
        qjax.gptq(act_order=True, group_aware=True)
