"""Products of two activations through `quantize`, `sites`, `fake_quant` and the shipped model."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import qjax
from tests.program.cases import normal

INT8, UINT8 = qjax.int8(), qjax.uint8()
DYNAMIC, STATIC = qjax.dynamic(INT8), qjax.static(INT8)


def mix(p, x):
    h = x @ p["w"]
    with jax.named_scope("mix"):
        return jax.nn.softmax(h @ x.T) @ x


def policy(*rules):
    return qjax.Policy([qjax.Rule("*", weight=INT8), *rules])


PARAMS, X = {"w": normal(8, 8)}, normal(6, 8, seed=1)


def test_sites_lists_what_a_rule_names_and_nothing_else():
    rule = qjax.Rule("mix:dot_general.1", activation=(qjax.static(UINT8), STATIC))
    rows = {r.path: r for r in qjax.sites(mix, policy(rule))(PARAMS, X).rows}
    assert list(rows) == ["w", "mix:dot_general.1"]
    row = rows["mix:dot_general.1"]
    assert (row.what, row.ops, row.shape, row.kernel, row.spec) == ("product", ("dot_general",), (6, 8), "xla int8", "")
    assert row.activation == 'static(uint8(per="tensor")) x static(int8(per="tensor"))'
    assert (row.nbytes, row.float_nbytes, row.reason) == (12, 0, "")
    assert rows["w"].activation == "" and rows["w"].what == "parameter"
    report = qjax.sites(mix, policy(qjax.Rule("*:*", activation=DYNAMIC)))(PARAMS, X)
    assert "1 of 1 parameters would be quantized" in str(report) and "2 of 2 named products of two activations" in str(report)


def test_the_first_rule_counts_and_one_may_leave_a_product_float():
    rules = [qjax.Rule("*:dot_general.0"), qjax.Rule("mix:*", activation=DYNAMIC)]
    result = qjax.quantize(mix, PARAMS, policy(*rules), calibration=[X])
    assert list(result.sites) == ["mix:dot_general.1"]
    rows = {r.path: r for r in result.report.rows if r.what == "product"}
    assert rows["mix:dot_general.0"].reason == "rule '*:dot_general.0' leaves it float"
    assert rows["mix:dot_general.1"].activation == f"{DYNAMIC} x {DYNAMIC}" and result.report.nbytes == result.params["w"].nbytes


def test_rules_of_parameters_and_of_products_never_meet():
    plain = qjax.quantize(mix, PARAMS, policy(), calibration=[X])
    assert plain.sites == {} and [r.path for r in plain.report.rows] == ["w"]
    only = qjax.quantize(mix, PARAMS, qjax.Policy([qjax.Rule("*:*", activation=DYNAMIC)]), calibration=[X])
    assert len(only.sites) == 2 and only.params["w"] is PARAMS["w"]
    assert only.report.rows[0].reason == "no rule matches its path"


BAD = [
    ([qjax.Rule("*mx:dot_general.0", activation=DYNAMIC)], r"'\*mx:dot_general.0' names no product .* did you mean 'mix:dot_general.0' or"),
    ([qjax.Rule("*mix:dot_general.7", activation=DYNAMIC)], r"did you mean 'mix:dot_general.0' or 'mix:dot_general.1'\?"),
    ([qjax.Rule("*:*", activation=DYNAMIC), qjax.Rule("mix:*", activation=STATIC)], r"'mix:\*' is never reached: '\*:\*' stands before it"),
]


@pytest.mark.parametrize(("rules", "message"), BAD, ids=[r[-1].pattern for r, _ in BAD])
def test_rules_that_do_nothing_are_named(rules, message):
    for call in (
        lambda p: qjax.sites(mix, p)(PARAMS, X),
        lambda p: qjax.quantize(mix, PARAMS, p, calibration=[X]),
        lambda p: qjax.fake_quant(mix, p)(PARAMS, X),
        lambda p: qjax.fake_quant(mix, p).init(jax.random.key(0), PARAMS, X),
    ):
        with pytest.raises(ValueError, match=message):
            call(policy(*rules))


def test_a_rule_that_matches_only_what_cannot_be_is_refused():
    fn = lambda p, x: (x @ p["w"], lax.dot_general(x, x, (((), ()), ((), ()))))  # noqa: E731
    with pytest.raises(ValueError, match=r"'\*:\*' matches only products that cannot multiply integers, .* it contracts no axis"):
        qjax.sites(fn, policy(qjax.Rule("*:*", activation=DYNAMIC)))(PARAMS, X)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: qjax.Rule("*:*", weight=INT8), ValueError, r"`weight` must be None, got IntSpec.*names products of two activations"),
        (lambda: qjax.Rule("*:*", method=qjax.rtn(), activation=DYNAMIC), ValueError, "`method` must be None"),
        (lambda: qjax.Rule("*:*", activation=INT8), TypeError, "`activation` must be qjax.dynamic"),
        (lambda: qjax.Rule("*:*", activation=(DYNAMIC,) * 3), TypeError, "a pair of them or None"),
        (lambda: qjax.Rule("*:*", activation=(DYNAMIC, None)), TypeError, "a pair of them or None"),
        (lambda: qjax.Rule("*", weight=INT8, activation=(DYNAMIC, DYNAMIC)), TypeError, "`activation` must be qjax.dynamic"),
    ],
)
def test_bad_rules_are_refused_by_name(make, error, message):
    with pytest.raises(error, match=message):
        make()


def test_a_range_is_that_of_the_data_behind_quantized_weights():
    batches = [normal(6, 8, seed=i) for i in (2, 3)]
    rule = qjax.Rule("mix:dot_general.*", activation=(qjax.static(UINT8), STATIC))
    result = qjax.quantize(mix, PARAMS, policy(rule), calibration=batches)
    hidden = np.stack([x @ result.params["w"].dequantize() for x in batches])
    scores, values = result.sites["mix:dot_general.0"], result.sites["mix:dot_general.1"]
    span = max(hidden.max(), 0) - min(hidden.min(), 0)
    assert float(scores.lhs_scale) == pytest.approx(span / 255, rel=1e-5) and scores.lhs_scale.shape == ()
    assert float(values.rhs_scale) == pytest.approx(max(float(jnp.abs(x).max()) for x in batches) / 127.5, rel=1e-6)
    assert int(values.lhs_zero_point) == 0 and values.lhs.observer is None


# (observer, whether it clips the one value that stands alone); those of histograms take long to compile.
OBSERVERS = [
    (qjax.minmax(), False),
    (qjax.moving_average(), True),
    pytest.param(qjax.absmax(), False, marks=pytest.mark.slow),
    pytest.param(qjax.percentile(99.0), True, marks=pytest.mark.slow),
    pytest.param(qjax.entropy(), True, marks=pytest.mark.slow),
    pytest.param(qjax.mse(), True, marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("observer", "clips"), OBSERVERS, ids=lambda v: type(v).__name__)
def test_every_observer_finds_the_range_of_each_operand(observer, clips):
    fn = lambda p, x, y: x @ y.T  # noqa: E731
    x = normal(512, 8, seed=1).at[0, 0].set(100.0)
    rule = qjax.Rule(":dot_general.0", activation=(qjax.static(INT8, observer), STATIC))
    # The second batch has another shape: it is a program of its own with the same product.
    found = qjax.quantize(fn, {}, qjax.Policy([rule]), calibration=[(x[:256], x[:5]), (x[256:], x[5:9])]).sites[":dot_general.0"]
    assert float(found.rhs_scale) == pytest.approx(100 / 127.5)
    assert (float(found.lhs_scale) < 0.995 * 100 / 127.5) == clips  # the moving average is 1 % of the way to the second batch


def test_layers_that_saw_only_zeros_take_the_range_of_the_others_and_a_product_that_did_stays_float():
    def fn(p, x):
        def body(x, w):
            with jax.named_scope("layer"):
                return x @ w @ x.T @ x, None

        y = lax.scan(body, x, p["w"])[0]
        return y, lax.cond(x.sum() > 1e9, lambda x: x @ x.T, lambda x: jnp.zeros((6, 6)), x)

    params = {"w": jnp.stack([0.1 * normal(8, 8), jnp.zeros((8, 8)), normal(8, 8)])}
    result = qjax.quantize(fn, params, qjax.Policy([qjax.Rule("*:*", activation=STATIC)]), calibration=[X])
    rows = {r.path: r for r in result.report.rows if r.what == "product"}
    assert rows[":dot_general.0"].reason == "no calibration data but zeros reached it" and rows[":dot_general.0"].activation == ""
    assert ":dot_general.0" not in result.sites
    q = result.sites["layer:dot_general.0"]
    assert q.lhs_scale.shape == (3,) and q.lhs_scale[1] == q.lhs_scale.max()
    assert any("no calibration data but zeros reached its left operand in parts 1" in note for note in rows["layer:dot_general.0"].notes)
    assert np.isfinite(jax.jit(qjax.quantized(fn, sites=result.sites))(result.params, X)[0]).all()


def test_bad_data():
    rule = qjax.Rule("mix:dot_general.0", activation=STATIC)
    with pytest.raises(ValueError, match=r"`calibration` batch 1 gives the left operand of 'mix:dot_general.0' NaN or infinity"):
        qjax.quantize(mix, PARAMS, policy(rule), calibration=[X, X.at[0, 0].set(jnp.inf)])
    shapes = [jax.ShapeDtypeStruct((6, 8), jnp.float32)]
    with pytest.raises(ValueError, match=r"`calibration` holds shapes, but the static range of 'mix:dot_general.0' needs data"):
        qjax.quantize(mix, PARAMS, policy(rule), calibration=shapes)
    assert len(qjax.quantize(mix, PARAMS, policy(qjax.Rule("*:*", activation=DYNAMIC)), calibration=shapes).sites) == 2
    waiting = lambda p, x: lax.while_loop(lambda x: jnp.sum(x @ x.T) < 1e3, lambda x: 2 * x @ p["w"], x)  # noqa: E731
    with pytest.raises(ValueError, match=r"cannot be observed: it stands in the condition of a loop.*make them qjax.dynamic"):
        qjax.quantize(waiting, PARAMS, policy(qjax.Rule("*:*", activation=STATIC)), calibration=[X])
    result = qjax.quantize(waiting, PARAMS, policy(qjax.Rule("*:*", activation=DYNAMIC)), calibration=[X])
    assert "xi8>, tensor<8x6xi8>" in jax.jit(qjax.quantized(waiting, sites=result.sites)).lower(result.params, X).as_text()


def test_training_rounds_what_the_integers_will_round():
    rules = policy(qjax.Rule("*:*", activation=DYNAMIC))
    fq = qjax.fake_quant(mix, rules)
    result = qjax.quantize(mix, PARAMS, rules, calibration=[X])
    got = jax.jit(fq)(PARAMS, X)
    np.testing.assert_allclose(got, jax.jit(qjax.quantized(mix, sites=result.sites))(result.params, X), rtol=1e-4, atol=1e-5)
    assert np.abs(got - mix(PARAMS, X)).max() > 1e-4
    grads = [jax.jit(jax.grad(lambda p, f=f: jnp.sum(f(p, X) ** 2)))(PARAMS)["w"] for f in (fq, mix)]
    assert np.linalg.norm(grads[0] - grads[1]) < 0.1 * np.linalg.norm(grads[1])
    with pytest.raises(ValueError, match=r"`quant` is missing: this policy has static or learned ranges.*pass quant=fq.init"):
        qjax.fake_quant(mix, policy(qjax.Rule("*:*", activation=STATIC)))(PARAMS, X)


@pytest.mark.slow
def test_the_shipped_model_keeps_its_perplexity():
    """W8A8 with every product of two activations on integers, too: within 1 % of float on 16 windows."""
    from qjax.evaluation import batches, calibration_windows, encode, perplexity_of, token_losses, windows
    from qjax.models import Llama, books_llama, calibration_lines, heldout_text

    checkpoint = books_llama()
    apply, params = Llama(checkpoint.config).apply, {"params": checkpoint.params}
    text = windows(encode(checkpoint.tokenizer, heldout_text()))[:16]
    data = [jnp.asarray(b) for b in batches(calibration_windows(checkpoint.tokenizer, calibration_lines()), 8)][:4]
    before = perplexity_of(token_losses(apply, params, text))
    weights = qjax.Rule("*", weight=INT8, activation=DYNAMIC)
    for scores, values in ((DYNAMIC, DYNAMIC), (STATIC, (qjax.static(UINT8), STATIC))):
        rules = [weights, qjax.Rule("*:dot_general.0", activation=scores), qjax.Rule("*:dot_general.1", activation=values)]
        result = qjax.quantize(apply, params, qjax.Policy(rules), calibration=data)
        after = perplexity_of(token_losses(qjax.quantized(apply, sites=result.sites), result.params, text))
        assert abs(after / before - 1) < 0.01
        kernels = [row.kernel for row in result.report.rows if row.what == "product"]
        assert kernels == ["xla int8"] * (2 * checkpoint.config.num_hidden_layers)
