"""On-line rotations: the codes stand for the rotated weight, the product rotates its input, and nothing else of the function changes."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import qjax
from qjax.calibration import Moments, Rows, hessian
from qjax.core import OnlineRotation, QTensor, hadamard_transform, random_signs
from qjax.ptq.method import Problem
from qjax.ptq.online_rotation import rotate_statistics

K, N = 24, 10
INT8, INT4 = qjax.dynamic(qjax.int8()), qjax.dynamic(qjax.int4())


@pytest.fixture(autouse=True)
def strict_promotion():
    with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
        yield


def normal(*shape, seed=0, dtype=jnp.float32):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), dtype)


def matrix(size, seed=0):
    """R = D H / sqrt(n) in float64."""
    return random_signs(size, seed).astype(np.float64)[:, None] * np.asarray(hadamard_transform(jnp.eye(size)), np.float64)


def policy(weight=None, activation=None, method=None):
    weight = qjax.int8() if weight is None else weight
    return qjax.Policy([qjax.Rule("*", weight=weight, activation=activation, method=qjax.online_rotation() if method is None else method)])


def run(fn, params, x, rules, *more):
    result = qjax.quantize(fn, params, rules, [x])
    return result, jax.jit(qjax.quantized(fn))(result.params, x, *more)


def close(a, b, error):
    """Relative to the largest."""
    difference = float(jnp.max(jnp.abs(a.astype(jnp.float32) - b.astype(jnp.float32))) / jnp.max(jnp.abs(b.astype(jnp.float32))))
    assert difference < error, difference


@pytest.mark.parametrize("size", [32, 24, 6, 7])
def test_the_codes_stand_for_the_rotated_weight_and_dequantize_gives_the_weight(size):
    w = normal(size, N)
    q = qjax.online_rotation().quantize(Problem(w, qjax.int8(), (-2,), (), 1, "w"), None).q
    rotated = dataclasses.replace(q, rotation=None).dequantize()
    wanted = matrix(size).T @ np.asarray(w, np.float64)
    step = np.abs(wanted).max(0) / 127.5
    assert (np.abs(rotated - wanted) <= 0.51 * step).all()
    np.testing.assert_allclose(q.dequantize(), matrix(size) @ np.asarray(rotated, np.float64), atol=2e-6)
    assert sum(a.nbytes for a in jax.tree.leaves(q)) == size * N + 4 * N  # no matrix is stored
    np.testing.assert_array_equal(jax.jit(QTensor.dequantize)(q), q.dequantize())


def test_second_moments_are_those_of_the_rotated_input():
    x, rotation = normal(50, K), OnlineRotation(2)
    observer = qjax.gptq().observer
    seen = observer.update(observer.init(1, K), Rows(rotation.apply(x)[None]))
    turned = rotate_statistics(observer.update(observer.init(1, K), Rows(x[None])), rotation)
    np.testing.assert_allclose(turned.total, seen.total, atol=1e-4)
    assert turned.count == seen.count
    r = matrix(K, 2)
    np.testing.assert_allclose(hessian(turned)[0], 2 / 50 * r.T @ np.asarray(x, np.float64).T @ np.asarray(x, np.float64) @ r, atol=1e-4)
    with pytest.raises(TypeError, match="`state`"):
        rotate_statistics((x,), rotation)
    assert isinstance(turned, Moments)


PROGRAMS = {
    "matrix": (lambda p, x: x @ p["w"], (K, N), (5, K)),
    "transposed": (lambda p, x: jnp.einsum("bk,nk->bn", x, p["w"]), (N, K), (5, K)),
    "heads": (lambda p, x: jnp.einsum("bthd,hdn->btn", x, p["w"]), (3, 8, N), (2, 5, 3, 8)),
    "heads in another order": (lambda p, x: jnp.einsum("btdh,hdn->btn", x, p["w"]), (3, 8, N), (2, 5, 8, 3)),
    "weight first": (lambda p, x: jnp.einsum("kn,kb->nb", p["w"], x), (K, N), (K, 5)),
    "experts": (lambda p, x: jnp.einsum("ebk,ekn->ebn", x, p["w"]), (3, K, N), (3, 5, K)),
    "scan": (lambda p, x: jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, p["w"])[0], (3, K, K), (5, K)),
    "ragged": (lambda p, x: jax.lax.ragged_dot(x, p["w"], jnp.array([4, 0, 3])), (3, K, N), (7, K)),
}


@pytest.mark.parametrize("name", PROGRAMS)
@pytest.mark.parametrize("activation", [None, INT8], ids=["float", "int8"])
def test_every_form_of_product_rotates_its_input(name, activation):
    fn, shape, x_shape = PROGRAMS[name]
    params, x = {"w": normal(*shape) / 5}, normal(*x_shape, seed=1)
    result, got = run(fn, params, x, policy(activation=activation))
    assert result.params["w"].rotation == OnlineRotation()
    close(got, fn(params, x), 0.03)
    if activation is None:  # the same numbers as with the weight rotated back
        close(got, fn({"w": result.params["w"].dequantize()}, x), 2e-5)
    else:
        assert result.report.rows[0].kernel == "xla int8"


@pytest.mark.parametrize("size", [32, 7])
def test_integers_multiply_the_rounded_rotated_input(size):
    """Against NumPy: round(x R) round(R^T w), both sides' scales in float64."""
    w, x = normal(size, N), normal(5, size, seed=1).at[:, 3].mul(30.0)
    _, got = run(lambda p, x: x @ p, w, x, policy(qjax.int8(scale_rule="full"), qjax.dynamic(qjax.int8(scale_rule="full"))))
    r = matrix(size)
    turned, weight = np.asarray(x, np.float64) @ r, r.T @ np.asarray(w, np.float64)
    s_x, s_w = np.abs(turned).max(1, keepdims=True) / 127, np.abs(weight).max(0, keepdims=True) / 127
    np.testing.assert_allclose(got, (np.round(turned / s_x) * s_x) @ (np.round(weight / s_w) * s_w), atol=2e-3 * float(jnp.abs(got).max()))


def test_bfloat16_and_groups():
    w, x = normal(64, N, dtype=jnp.bfloat16), normal(5, 64, seed=1, dtype=jnp.bfloat16)
    for activation in (None, INT8):
        result, got = run(lambda p, x: x @ p, w, x, policy(qjax.int8(group_size=16), activation))
        assert got.dtype == result.params.dtype == jnp.bfloat16
        close(got, x @ w, 0.04)


@pytest.mark.parametrize("act_order", [False, True])
def test_gptq_in_the_rotated_basis_is_better_than_rounding_there(act_order):
    mix = normal(32, 32, seed=3)
    x = jnp.tanh(normal(200, 32, seed=1) @ mix).at[:, 5].mul(20.0)
    w = normal(32, N)

    def error(method):
        _, got = run(lambda p, x: x @ p, w, x, policy(qjax.int3(group_size=8), None, method))
        return float(jnp.linalg.norm(got - x @ w))

    ours = error(qjax.online_rotation(qjax.gptq(act_order=act_order)))
    assert ours < 0.8 * error(qjax.online_rotation())


def test_outliers_cost_less():
    """A few channels that are large in every row, as behind a gated product: four bits on both sides."""
    w, x = normal(64, N), normal(100, 64, seed=1).at[:, jnp.array([3, 40])].mul(30.0)
    errors = []
    for method in (qjax.rtn(), qjax.online_rotation()):
        _, got = run(lambda p, x: x @ p, w, x, policy(qjax.int4(), INT4, method))
        errors.append(float(jnp.linalg.norm(got - x @ w) / jnp.linalg.norm(x @ w)))
    assert errors[1] < 0.7 * errors[0]


def test_static_ranges_are_those_of_the_rotated_input():
    w, x = normal(64, N), normal(100, 64, seed=1).at[:, 3].mul(30.0)
    result, got = run(lambda p, x: x @ p, w, x, policy(qjax.int8(), qjax.static(qjax.int8())))
    turned = np.abs(np.asarray(x, np.float64) @ matrix(64)).max()
    np.testing.assert_allclose(float(result.params.act_scale[0, 0]), turned / 127.5, rtol=1e-4)
    close(got, x @ w, 0.02)


def test_an_input_scale_comes_before_the_rotation():
    w, x = normal(K, N), normal(50, K, seed=1).at[:, 3].mul(30.0)
    method = qjax.smoothquant(then=qjax.online_rotation(qjax.gptq()), unfoldable="scale")
    result, got = run(lambda p, x: jnp.tanh(x) @ p, w, x, policy(qjax.int8(), INT8, method))
    q = result.params
    assert q.input_scale is not None and q.rotation == OnlineRotation()
    close(got, jnp.tanh(x) @ w, 0.02)
    close(q.dequantize(), w, 0.03)


def test_the_program_has_integers_and_no_dense_rotation():
    """The weight is never decoded to float, and the transform is sums and differences."""
    w, x = normal(512, 16), normal(8, 512, seed=1)
    result = qjax.quantize(lambda p, x: x @ p, w, policy(qjax.int4(), INT8), [x])
    text = jax.jit(qjax.quantized(lambda p, x: x @ p)).lower(result.params, x).as_text()
    dots = re.findall(r"stablehlo.dot_general .*", text)
    assert len(dots) == 1 and "xi8>" in dots[0] and "xi32>" in dots[0], dots
    assert "tensor<16x512xf32>" not in text and "tensor<512x16xf32>" not in text
    # Without activations it is the input that is rotated: a float copy of the rotated weight, and none of the weight itself.
    result = qjax.quantize(lambda p, x: x @ p, w, policy(qjax.int4()), [x])
    text = jax.jit(qjax.quantized(lambda p, x: x @ p)).lower(result.params, x).as_text()
    assert len(re.findall(r"stablehlo.dot_general", text)) == 1 and "tensor<16x256x2x1xf32>" not in text


def test_a_lookup_of_a_tied_parameter_gets_its_rows_back():
    table, tokens = normal(30, K), jnp.arange(6)

    def fn(p, tokens):
        return jnp.tanh(p["table"][tokens]) @ p["table"].T

    _, got = run(fn, {"table": table}, tokens, policy())
    close(got, fn({"table": table}, tokens), 0.03)


def test_save_and_load_keep_it(tmp_path):
    w, x = normal(K, N), normal(5, K, seed=1)
    method = qjax.online_rotation(qjax.gptq(act_order=True), seed=7)
    result, got = run(lambda p, x: x @ p, w, x, policy(qjax.int4(group_size=8), INT8, method))
    qjax.save(tmp_path / "m", result)
    back = qjax.load(tmp_path / "m")
    assert back.policy == result.policy and back.params.rotation == OnlineRotation(7)
    np.testing.assert_array_equal(jax.jit(qjax.quantized(lambda p, x: x @ p))(back.params, x), got)


def test_vmap_and_grad():
    w, x = normal(K, N), normal(3, 5, K, seed=1)
    for activation in (None, INT8):
        result = qjax.quantize(lambda p, x: x @ p, w, policy(qjax.int8(), activation), [x[0]])
        f = qjax.quantized(lambda p, x: x @ p)
        np.testing.assert_allclose(jax.vmap(f, (None, 0))(result.params, x), jnp.stack([f(result.params, y) for y in x]), atol=1e-5)
        gradient = jax.grad(lambda x, f=f, p=result.params: f(p, x).sum())(x[0])
        close(gradient, jnp.broadcast_to(w.sum(1)[None], (5, K)), 0.03)


def test_what_it_cannot_do_is_refused_by_name():
    x, kernel = normal(1, 8, 8, 4), normal(3, 3, 4, 8)
    dims = ("NHWC", "HWIO", "NHWC")
    conv = lambda p, x: jax.lax.conv_general_dilated(x, p["kernel"], (1, 1), "SAME", dimension_numbers=dims)  # noqa: E731
    with pytest.raises(ValueError, match="online_rotation cannot quantize 'kernel': the windows of a convolution"):
        qjax.quantize(conv, {"kernel": kernel}, policy(), [x])
    with pytest.raises(ValueError, match="online_rotation cannot quantize 'table': it is looked up"):
        qjax.quantize(lambda p, i: p["table"][i], {"table": normal(9, K)}, policy(), [jnp.arange(3)])
    assert "cannot quantize 'kernel'" in qjax.plan(conv, {"kernel": kernel}, policy(), [x], rates=qjax.Rates(1e9, 1e9)).problems[0]
    with pytest.raises(ValueError, match="cast"):
        qjax.quantize(lambda p, x: x @ p, normal(K, N), policy(qjax.bf16()), [normal(2, K)])
    with pytest.raises(ValueError, match=r"qjax\.awq\(then=qjax\.online_rotation"):
        qjax.online_rotation(qjax.awq())
    with pytest.raises(TypeError, match="`then`"):
        qjax.online_rotation("gptq")  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="`seed`"):
        qjax.online_rotation(seed=-1)


def test_the_report_says_what_is_lost_and_what_is_not_hadamard():
    pruned = jnp.where(jnp.arange(K)[:, None] > 0, normal(K, N), 0.0)
    result, _ = run(lambda p, x: x @ p, pruned, normal(5, K), policy())
    assert any("exactly zero, which online_rotation does not keep" in note for note in result.report.rows[0].notes)
    result, _ = run(lambda p, x: x @ p, normal(7, N), normal(5, 7), policy())
    assert any("Hartley" in note for note in result.report.rows[0].notes)


@pytest.mark.parametrize("activation", [None, INT8], ids=["float", "int8"])
def test_a_low_rank_part_stays_in_front_of_the_rotation(activation):
    w, x = normal(K, N), normal(50, K, seed=1).at[:, 3].mul(30.0)
    result, got = run(lambda p, x: x @ p, w, x, policy(qjax.int4(), activation, qjax.low_rank(4, then=qjax.online_rotation())))
    assert result.params.rotation == OnlineRotation()
    close(got, x @ result.params.dequantize(), 1e-4 if activation is None else 0.03)
    with pytest.raises(ValueError, match=r"low_rank\(then=qjax.online_rotation"):
        run(lambda p, x: x @ p, w, x, policy(qjax.int4(), None, qjax.online_rotation(qjax.low_rank(4, kind="svd"))))


# Products of two activations.


def scores(p, x):
    q, k = jnp.split(x @ p["qk"], 2, axis=-1)
    with jax.named_scope("scores"):
        return jnp.einsum("btd,bsd->bts", q, k)


def product_policy(act, rotate, **more):
    method = qjax.online_rotation(**more) if rotate else None
    return qjax.Policy([qjax.Rule("qk", weight=None), qjax.Rule("scores:*", activation=act, method=method)])


@pytest.mark.parametrize("act", [INT4, qjax.static(qjax.int4())], ids=["dynamic", "static"])
def test_both_operands_of_a_product_are_rotated(act):
    p, x = {"qk": normal(K, 2 * 16)}, normal(2, 9, K, seed=1)
    p["qk"] = p["qk"].at[:, jnp.array([5, 25])].mul(20.0)  # one channel of each
    want, errors = scores(p, x), []
    for rotate in (False, True):
        result = qjax.quantize(scores, p, product_policy(act, rotate), [x])
        got = jax.jit(qjax.quantized(scores, sites=result.sites))(result.params, x)
        errors.append(float(jnp.linalg.norm(got - want)))
    assert errors[1] < 0.6 * errors[0]
    row = result.report.rows[-1]
    assert row.method == "online_rotation" and result.sites["scores:dot_general.0"].rotation == OnlineRotation()


def test_a_rotated_product_is_kept_by_a_checkpoint(tmp_path):
    p, x = {"qk": normal(K, 2 * 16)}, normal(2, 9, K, seed=1)
    result = qjax.quantize(scores, p, product_policy(qjax.static(qjax.int8()), True, seed=3), [x])
    qjax.save(tmp_path / "m", result)
    back = qjax.load(tmp_path / "m")
    assert back.sites["scores:dot_general.0"].rotation == OnlineRotation(3) and back.policy == result.policy
    got = qjax.quantized(scores, sites=back.sites)(back.params, x)
    np.testing.assert_array_equal(got, qjax.quantized(scores, sites=result.sites)(result.params, x))
    close(got, scores(p, x), 0.03)


def test_other_methods_have_nothing_to_do_with_products():
    with pytest.raises(ValueError, match=r"`method` must be None or qjax.online_rotation\(\)"):
        qjax.Rule("scores:*", activation=INT4, method=qjax.gptq())
    with pytest.raises(ValueError, match="rounded to nearest"):
        qjax.Rule("scores:*", activation=INT4, method=qjax.online_rotation(qjax.gptq()))
