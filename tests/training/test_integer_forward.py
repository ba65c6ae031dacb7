"""Training whose forward products run on integers: the numbers of the packed model, the gradients of the float product."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import qjax
from qjax import Policy, Rule
from tests.parameters import every_other
from tests.program.cases import CASES, doubled_backward, normal
from tests.training.test_state import STACK, X, scanned

DYNAMIC = qjax.dynamic(qjax.int8())


def numbers(fn, rule, params, inputs, forward):
    fq = qjax.fake_quant(fn, Policy([rule]), forward)
    quant = fq.init(jax.random.key(0), params, *inputs)

    def loss(params, quant):
        outs = fq(params, *inputs, quant=quant)
        return sum(jnp.sum(jnp.square(y.astype(jnp.float32))) for y in jax.tree.leaves(outs)), outs

    run = jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))
    return run.lower(params, quant).as_text(), run(params, quant)


@pytest.mark.parametrize(
    ("weight", "activation", "train"),
    [
        (qjax.int4(), DYNAMIC, None),
        (qjax.int8(), qjax.static(qjax.uint8()), qjax.lsq("mse")),
        (qjax.uint4(), qjax.static(qjax.int8()), qjax.lsq("mse")),
    ],
    ids=["W4A8 dynamic", "W8A8 learned", "uint4 learned"],
)
def test_a_scan_with_remat_has_the_same_numbers_on_integers(weight, activation, train):
    rule = Rule("*", weight=weight, activation=activation, train=train)
    text, ((_, out), grads) = numbers(scanned, rule, {"w": STACK}, (X,), "integer")
    plain, ((_, want), exact) = numbers(scanned, rule, {"w": STACK}, (X,), "float")
    assert "xi8>" in text and "xi8>, tensor" not in plain
    np.testing.assert_allclose(out, want, rtol=1e-4, atol=1e-4)
    for g, e in zip(jax.tree.leaves(grads), jax.tree.leaves(exact), strict=True):
        assert float(jnp.linalg.norm(g - e)) <= 2e-2 * float(jnp.linalg.norm(e)) + 1e-5


INSIDE = ("custom_vjp", "custom_jvp", "shard_map", "time_loop")


@pytest.mark.slow
@pytest.mark.parametrize("case", [c for c in CASES if c.name not in INSIDE], ids=str)
def test_every_program_has_the_forward_numbers_of_the_packed_model(case):
    policy = Policy([Rule("*", weight=qjax.int8(), activation=DYNAMIC)])
    packed = qjax.quantize(case.fn, case.params, policy, calibration=[case.inputs]).params
    got = jax.jit(qjax.fake_quant(case.fn, policy, "integer"))(case.params, *case.inputs)
    want = jax.jit(qjax.quantized(case.fn))(packed, *case.inputs)
    for g, w in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        g, w = np.asarray(g, np.float64), np.asarray(w, np.float64)
        assert np.linalg.norm(g - w) <= (1e-2 if "bf16" in case.name else 1e-4) * np.linalg.norm(w)


def test_forward_mode_works():
    w, x = normal(8, 5), normal(3, 8)
    fq = qjax.fake_quant(lambda p, x: x @ p["w"], Policy([Rule("*", weight=qjax.int4(), activation=DYNAMIC)]), "integer")
    _, tangent = jax.jvp(lambda p: fq(p, x), ({"w": w},), ({"w": jnp.ones((8, 5))},))
    np.testing.assert_allclose(tangent, qjax.core.round_activation(x, DYNAMIC, (1,)) @ jnp.ones((8, 5)), rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match="`forward` must be one of 'float', 'integer', None"):
        qjax.fake_quant(lambda p, x: x, fq.policy, "int8")


STATIC, FREEZE = qjax.static(qjax.int8()), qjax.schedule(freeze=3)
REASONS = {
    "float activations": ({"activation": None}, "its activations stay float; give its rule an `activation`"),
    "fp8": ({"weight": qjax.fp8_e4m3(), "activation": qjax.dynamic(qjax.fp8_e4m3())}, "are no integers"),
    "groups": ({"weight": qjax.int4(group_size=4)}, r"weights of int4\(group_size=4\) share scales in parts of a row"),
    "outliers": ({"method": qjax.llm_int8(6.0), "activation": None, "weight": qjax.int8()}, "columns of outliers"),
    "a rotation": ({"method": qjax.online_rotation()}, "its input is rotated on line"),
    "a schedule": ({"train": qjax.qat(schedule=qjax.schedule(weights=2))}, "its schedule sets in later or has other bits first"),
    "bits": ({"train": qjax.qat(schedule=qjax.schedule(bits=((0, 8), (2, 4))))}, "its schedule sets in later or has other bits first"),
    "random weights": ({"train": qjax.ste(rounding="stochastic")}, "its weights are rounded at random"),
    "random activations": ({"activation": STATIC, "train": qjax.qat(qjax.lsq(), qjax.ste(rounding="stochastic"))},
                           "its activations are rounded at random"),
    "undecided rounding": ({"train": qjax.qat(qjax.adaround(), schedule=FREEZE)}, "adaround has no integers before it is packed"),
    "a tangent": ({"weight": qjax.uint2(zero_dtype="float32"), "train": qjax.dorefa()}, "dorefa has no integers before it is packed"),
}  # fmt: skip


@pytest.mark.parametrize("name", every_other(REASONS))
def test_floats_do_not_pass_for_integers(name):
    """Asked for integers and having none is an error that says why; unasked, floats are what they always were."""
    settings, reason = REASONS[name]
    rule = Rule("w", **{"weight": qjax.int4(), "activation": DYNAMIC, **settings})
    params, x = {"w": normal(8, 4), "plain": normal(4, 4)}, normal(3, 8)
    fn = lambda p, x: x @ p["w"] @ p["plain"]  # noqa: E731
    fq = qjax.fake_quant(fn, Policy([rule]), "integer")
    quant = fq.init(jax.random.key(0), params, x)
    for call in (lambda: fq(params, x, quant=quant), lambda: jax.jit(lambda p: fq(p, x, quant=quant))(params)):
        with pytest.raises(ValueError, match=f"`forward`='integer' and no product of this policy runs on integers; 'w': .*{reason}.*"
                                             "Leave `forward` out"):  # fmt: skip
            call()
    assert qjax.fake_quant(fn, Policy([rule]))(params, x, quant=quant).shape == (3, 4)
    (row,) = [row for row in fq.report(params, x).rows if row.path == "w"]
    assert row.kernel == "xla" and len(row.kernel_reasons) == 1 and row.kernel_reasons[0] in row.notes[-1]

    mixed = qjax.fake_quant(fn, Policy([rule, Rule("plain", weight=qjax.int8(), activation=DYNAMIC)]), "integer")
    lowered = jax.jit(lambda p, q: mixed(p, x, quant=q)).lower(params, mixed.init(jax.random.key(0), params, x)).as_text()
    assert lowered.count("xi8>, tensor<") == 1
    kernels = {row.path: row.kernel for row in mixed.report(jax.eval_shape(lambda: params), jax.ShapeDtypeStruct(x.shape, x.dtype)).rows}
    assert kernels == {"plain": "xla int8", "w": "xla"}


def test_what_a_site_cannot_run_is_found_where_it_stands():
    """A convolution spread by its stride with a zero point, a custom derivative rule, a lookup: reasons that no policy tells."""

    def spread(p, x):
        return jax.lax.conv_general_dilated(x, p["w"], (1, 1), [(1, 1)] * 2, (2, 2), dimension_numbers=("NHWC", "HWIO", "NHWC"))

    cases = [
        (spread, qjax.uint8(), normal(3, 3, 2, 4), normal(2, 5, 5, 2), "a convolution of spread or cut inputs with a zero point"),
        (lambda p, x: doubled_backward(p["w"], x), qjax.int8(), normal(8, 5), normal(3, 8), "its equation is left as it is, inside a"),
        (lambda p, x: p["w"][x], qjax.int8(), normal(8, 5), jnp.arange(3), "it is only looked up"),
    ]
    for fn, spec, w, x, reason in cases:
        rule = Rule("w", weight=qjax.int8(), activation=qjax.dynamic(spec))
        fq = qjax.fake_quant(fn, Policy([rule]), "integer")
        with pytest.raises(ValueError, match=f"no product of this policy runs on integers; 'w': {reason}"):
            fq({"w": w}, x)
        assert reason in fq.report({"w": w}, x).rows[0].notes[-1]
        qjax.fake_quant(fn, Policy([rule]))({"w": w}, x)


def test_a_weight_of_which_some_products_are_of_floats_says_both_and_why():
    def fn(p, x):
        return x @ p["w"] + doubled_backward(p["w"], x), x @ p["v"] + x @ p["v"]

    params, x = {"v": normal(8, 5), "w": normal(8, 5)}, normal(3, 8)
    fq = qjax.fake_quant(fn, Policy([Rule("*", weight=qjax.int8(), activation=DYNAMIC)]), "integer")
    same, mixed = fq.report(params, x).rows
    assert (same.path, same.kernel, same.kernel_reasons, same.notes) == ("v", "xla int8", (), ())
    assert mixed.kernel == "xla int8, xla" and len(mixed.kernel_reasons) == 1
    assert mixed.notes == (f"its forward product is of floats: {mixed.kernel_reasons[0]}",)
    assert mixed.kernel_reasons[0].startswith("its equation is left as it is, inside a custom derivative rule")
    assert fq(params, x)[0].shape == (3, 5)  # some run on integers, which is what was asked for


def test_the_report_says_what_runs_on_what():
    policy = Policy([Rule("*scores*:*", activation=DYNAMIC), Rule("*", weight=qjax.int8(), activation=DYNAMIC)])
    report = qjax.fake_quant(scanned, policy, "integer").report({"w": STACK}, X)
    (weight,), products = report.rows[:1], report.rows[1:]
    assert weight.kernel == "xla int8" and not weight.notes and weight.method == "ste" and weight.spec == 'int8(per="channel")'
    assert {row.kernel for row in products} == {"xla"} and "of floats in training" in products[0].notes[0]
    assert "xla int8" in report.to_json() and "scores" in str(report)
    plain = qjax.fake_quant(scanned, policy, "float").report({"w": STACK}, X)
    assert plain.rows[0].kernel == "xla" and plain.notes[-1] == "all forward products are of floats: `forward` is 'float'"
    tied = qjax.fake_quant(lambda p, x: p["e"][x] @ p["e"].T, Policy([Rule("e", weight=qjax.int8(), activation=DYNAMIC)]), "integer")
    assert tied.report({"e": normal(8, 5)}, jnp.arange(3)).rows[0].kernel == "xla int8"


def test_ranges_that_follow_the_data_have_no_codes_before_a_site_is_run():
    policy = Policy([Rule("w", weight=qjax.int8(), activation=STATIC, train=qjax.moving_range(0.5))])
    fq = qjax.fake_quant(scanned, policy, "integer")
    quant = fq.init(jax.random.key(0), {"w": STACK}, X)
    for call in (fq.tracked, fq.stepped):
        with pytest.raises(ValueError, match=r"`forward`='integer' and ranges that follow the data do not go together: .*leave `forward`"):
            call({"w": STACK}, X, quant=quant)
    out, _ = qjax.fake_quant(scanned, policy).tracked({"w": STACK}, X, quant=quant)
    np.testing.assert_allclose(fq({"w": STACK}, X, quant=quant), out, rtol=1e-3, atol=1e-3)
