"""The state of fake quantization: through scans, remat, vmap and jit; schedules; packing what was trained; refusals."""

import dataclasses
import functools
from typing import ClassVar

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import qjax
from qjax import Policy, Rule
from qjax.core import QTensor
from qjax.training import LearnedStep
from tests.parameters import every_other
from tests.program.cases import normal

INT8, STATIC = qjax.int8(), qjax.static(qjax.int8())


def dense(p, x):
    return jax.nn.relu(x @ p["a"]) @ p["b"]


DENSE = {"a": normal(8, 6) / 3, "b": normal(6, 4, seed=1) / 3}
X = normal(5, 8, seed=2)


def layer(h, w):
    h = jax.nn.relu(h @ w)
    with jax.named_scope("scores"):
        s = jnp.einsum("bd,cd->bc", h, h)
    return h + 0.01 * s @ h


def scanned(p, x):
    return jax.lax.scan(jax.checkpoint(lambda h, w: (layer(h, w), None)), x, p["w"])[0]


def unrolled(p, x):
    return functools.reduce(lambda h, i: layer(h, p[f"w{i}"]), range(3), x)


STACK = normal(3, 8, 8) / 4
POLICY = [Rule("*scores*:*", activation=STATIC, train=qjax.lsq()),
          Rule("*", weight=qjax.int4(), activation=STATIC, train=qjax.lsq())]  # fmt: skip


def is_q(x):
    return isinstance(x, QTensor)


def dequantized(params):
    return jax.tree.map(lambda v: v.dequantize() if is_q(v) else v, params, is_leaf=is_q)


@pytest.fixture(scope="module")
def both():
    """The same three layers, scanned with remat and unrolled, with learned steps of weights, activations and products."""
    found = []
    for fn, params in ((scanned, {"w": STACK}), (unrolled, {f"w{i}": STACK[i] for i in range(3)})):
        fq = qjax.fake_quant(fn, Policy(POLICY))
        quant = fq.init(jax.random.key(0), params, X)
        loss = lambda p, q, fq=fq: jnp.sum(jnp.square(fq(p, X, quant=q)))  # noqa: E731
        found.append((fq, params, quant, jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))(params, quant)))
    return found


def stacked(tree):
    """The unrolled layers' entries of a state as the scanned one has them."""
    products = [tree["products"][name] for name in sorted(tree["products"])]
    return {
        "activations": {"w": jax.tree.map(lambda *a: jnp.stack(a), *(tree["activations"][f"w{i}"] for i in range(3)))},
        "products": {"scores:dot_general.0": jax.tree.map(lambda *a: jnp.stack(a), *products)},
        "weights": {"w": jax.tree.map(lambda *a: jnp.stack(a), *(tree["weights"][f"w{i}"] for i in range(3)))},
    }


def test_a_scan_over_layers_has_a_state_for_each_and_the_gradients_of_the_unrolled_program(both):
    (_, _, quant, (loss, (by_p, by_q))), (_, _, other, (loss2, (by_p2, by_q2))) = both
    assert quant["activations"]["w"]["scale"].shape == (3, 1, 1) and quant["weights"]["w"]["scale"].shape == (3, 8, 1)
    chex.assert_trees_all_close({name: value for name, value in quant.items() if name != "policy"}, stacked(other), rtol=1e-5)
    np.testing.assert_allclose(loss, loss2, rtol=1e-4)
    np.testing.assert_allclose(by_p["w"], jnp.stack([by_p2[f"w{i}"] for i in range(3)]), rtol=1e-3, atol=1e-3)
    by_q = {name: grads for name, grads in by_q.items() if name != "policy"}
    chex.assert_trees_all_close(by_q, stacked(by_q2), rtol=1e-2, atol=1e-2)
    assert all(bool(jnp.any(g != 0)) for g in jax.tree.leaves(by_q))


def test_the_packed_model_is_the_trained_one(both, tmp_path):
    fq, params, quant, _ = both[0]
    result = qjax.convert(fq, params, jax.ShapeDtypeStruct(X.shape, X.dtype), quant=quant)
    q = result.params["w"]
    assert q.codes.dtype == jnp.uint8 and q.codes.shape == (3, 8, 4) and q.act_scale.shape == (3, 1, 1)
    np.testing.assert_array_equal(q.act_scale, quant["activations"]["w"]["scale"])
    got = jax.jit(qjax.quantized(scanned, sites=result.sites))(result.params, X)
    want = jax.jit(lambda p, q: fq(p, X, quant=q))(params, quant)
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)
    text = jax.jit(qjax.quantized(scanned, sites=result.sites)).lower(result.params, X).as_text()
    assert text.count("xi8>") >= 4
    qjax.save(tmp_path / "saved", result)
    loaded = qjax.load(tmp_path / "saved")
    assert loaded.policy == fq.policy
    np.testing.assert_array_equal(jax.jit(qjax.quantized(scanned, sites=loaded.sites))(loaded.params, X), got)


TRAINS = [
    (qjax.int3(group_size=2), None, qjax.lsq()),
    (qjax.uint4(), STATIC, qjax.lsq("mse")),
    (qjax.int4(scale_dtype="bfloat16"), qjax.static(qjax.uint8()), qjax.qat(qjax.lsq("extremes"), qjax.pact())),
    (qjax.uint2(zero_dtype="float32"), None, qjax.dorefa()),
    (qjax.int4(), STATIC, qjax.ste("passed")),
    (qjax.nf4(group_size=2), None, qjax.ste("passed")),
    (qjax.ternary(), qjax.dynamic(INT8), qjax.ste()),
    (qjax.binary(per="channel"), None, qjax.ste()),
]


@pytest.mark.parametrize(("weight", "activation", "train"), every_other(TRAINS), ids=str)
def test_packed_weights_are_the_trained_ones_bit_for_bit(weight, activation, train):
    fq = qjax.fake_quant(dense, Policy([Rule("*", weight=weight, activation=activation, train=train)]))
    quant = fq.init(jax.random.key(0), DENSE, X)
    result = qjax.convert(fq, DENSE, X, quant=quant)
    fake = jax.jit(lambda p, q: fq.leaves(DENSE, X, quant=q)(p))(DENSE, quant)
    chex.assert_trees_all_equal(dequantized(result.params), fake)
    got, want = jax.jit(qjax.quantized(dense))(result.params, X), jax.jit(lambda p, q: fq(p, X, quant=q))(DENSE, quant)
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)
    assert [row.method for row in result.report.rows] == [getattr(train, "weight", train).name] * 2


def test_static_ranges_without_training_are_those_of_quantize():
    policy = Policy([Rule("*", weight=qjax.int4(), activation=qjax.static(qjax.uint8()))])
    fq = qjax.fake_quant(dense, policy)
    quant = fq.calibrate(fq.init(jax.random.key(0), DENSE, jax.ShapeDtypeStruct(X.shape, X.dtype)), DENSE, [X, 2 * X])
    ours = qjax.convert(fq, DENSE, X, quant=quant).params
    theirs = qjax.quantize(dense, DENSE, policy, [X, 2 * X]).params
    chex.assert_trees_all_close(jax.tree.leaves(ours), jax.tree.leaves(theirs), rtol=1e-6)


def test_ranges_that_end_at_zero_are_those_of_quantize():
    """Inputs that are never positive have a largest value of 0: a range, not a lack of data; layers of a scan each their own."""
    policy = Policy([Rule("*", weight=qjax.int8(), activation=qjax.static(qjax.uint8()))])

    def scanned(p, x):
        return jax.lax.scan(lambda x, w: (-jax.nn.relu(x @ w) * 0.1, None), x, p["w"])[0]

    stacked = {"w": jnp.stack([normal(8, 8, seed=i) for i in range(3)])}
    for fn, params, x in ((lambda p, x: x @ p["w"], {"w": DENSE["a"]}, -jnp.abs(X) * 0.02), (scanned, stacked, X)):
        fq = qjax.fake_quant(fn, policy)
        quant = fq.init(jax.random.key(0), params, x)
        theirs = qjax.quantize(fn, params, policy, [x]).params
        ours = qjax.convert(fq, params, x, quant=quant).params
        chex.assert_trees_all_close(jax.tree.leaves(ours), jax.tree.leaves(theirs), rtol=1e-6)
        np.testing.assert_allclose(fq(params, x, quant=quant), jax.jit(qjax.quantized(fn))(theirs, x), rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize(("value", "says"), [(jnp.nan, r"holds nan \(.* of .*\); a scale is a finite number"), (jnp.inf, "holds inf")])
def test_learned_scales_that_ran_away_are_not_packed(value, says):
    fq = qjax.fake_quant(dense, Policy([Rule("*", weight=qjax.int4(), train=qjax.lsq("extremes"))]))
    quant = fq.init(jax.random.key(0), DENSE, X)
    gone = jax.tree_util.tree_map_with_path(lambda path, a: a.at[..., 0].set(value) if path[-1].key == "scale" else a, quant)
    with pytest.raises(ValueError, match=says):
        qjax.convert(fq, DENSE, X, quant=gone)


def test_ranges_are_not_calibrated_into_another_state():
    fq = qjax.fake_quant(dense, Policy([Rule("*", weight=qjax.int4(), activation=qjax.static(qjax.uint8()))]))
    for quant in ({}, None):
        with pytest.raises((TypeError, ValueError), match="`quant`"):
            fq.calibrate(quant, DENSE, [X])


def test_schedules_move_without_compiling_again():
    plan = qjax.schedule(weights=1, activations=2, freeze=4, bits=((0, 8), (3, 2)))
    rule = Rule("*", weight=qjax.int2(), activation=qjax.static(INT8), train=qjax.qat(qjax.lsq("extremes"), qjax.lsq(), schedule=plan))
    fq = qjax.fake_quant(dense, Policy([rule]))
    quant = fq.init(jax.random.key(0), DENSE, X)
    loss = chex.assert_max_traces(lambda q, p: jnp.sum(fq(p, X, quant=q) ** 2), n=1)
    step = jax.jit(lambda q, p: jax.value_and_grad(loss)(q, p))
    values, frozen = [], []
    for _ in range(6):
        value, by = step(quant, DENSE)
        values.append(float(value))
        frozen.append(not any(bool(jnp.any(g)) for g in jax.tree.leaves(by)))
        quant = fq.advance(quant)
    exact = float(jnp.sum(dense(DENSE, X) ** 2))
    np.testing.assert_allclose(values[0], exact, rtol=1e-6)
    assert values[0] != values[1] != values[2] and abs(values[1] / exact - 1) < 0.02 < abs(values[3] / exact - 1)
    assert values[3] == values[4] == values[5] and frozen == [True, False, False, False, True, True]
    early = {**quant, "step": jnp.float32(2)}
    with pytest.raises(ValueError, match=r"at step 2, and its schedule rounds everything .* from step 3"):
        qjax.convert(fq, DENSE, X, quant=early)
    got = jax.jit(qjax.quantized(dense))(qjax.convert(fq, DENSE, X, quant=quant).params, X)
    np.testing.assert_allclose(jnp.sum(got**2), values[-1], rtol=1e-4)


def test_activations_follow_a_schedule_of_bits():
    """Weights float, dynamic activations of a weight and of a product, static ones: at each step those of the policy with these bits."""

    def fn(p, x):
        with jax.named_scope("scores"):
            s = jnp.einsum("bd,cd->bc", x, x[::-1])
        return x @ p["a"], s, x[:, :6] @ p["b"]  # side by side: nothing is rounded twice

    def build(bits, train=None):
        dynamic = qjax.dynamic(qjax.integer(bits))
        return qjax.fake_quant(fn, Policy([
            Rule("a", weight=INT8, activation=dynamic, train=train), Rule("*scores:*.0", activation=dynamic, train=train),
            Rule("b", weight=INT8, activation=qjax.static(qjax.integer(bits)), train=train)]), "float")  # fmt: skip

    fq = build(3, qjax.qat(schedule=qjax.schedule(activation_bits=((0, 8), (1, 5), (2, 3)))))
    quant = fq.init(jax.random.key(0), DENSE, X)
    total = lambda outs: sum(jnp.sum(jnp.square(y)) for y in outs)  # noqa: E731
    loss = chex.assert_max_traces(lambda p, x, q: total(fq(p, x, quant=q)), n=1)
    run = jax.jit(lambda p, x, q: jax.value_and_grad(loss)(p, x, q))
    for bits in (8, 5, 3):
        other = build(bits)
        plain = other.init(jax.random.key(0), DENSE, X)
        want = jax.jit(jax.value_and_grad(lambda p, x, q, other=other: total(other(p, x, quant=q))))(DENSE, X, plain)
        chex.assert_trees_all_close(run(DENSE, X, quant), want, rtol=1e-3, atol=1e-4)
        quant = fq.advance(quant)


@pytest.mark.slow
def test_a_loop_trains_learned_scales_beside_the_weights_for_all_seeds_at_once():
    rule = Rule("*", weight=qjax.int2(), activation=qjax.static(qjax.int4()), train=qjax.lsq())
    fq, teacher = qjax.fake_quant(dense, Policy([rule])), dense(DENSE, X)

    def start(key):
        params = jax.tree.map(lambda w: w + 0.01 * jax.random.normal(key, w.shape), DENSE)
        return params, fq.init(key, params, X)

    params, quant = jax.vmap(start)(jax.random.split(jax.random.key(0), 3))
    assert quant["weights"]["a"]["scale"].shape == (3, 6, 1)
    labels = (dict.fromkeys(DENSE, "weights"), fq.labels(quant))
    optimizer = optax.multi_transform(
        {"weights": optax.adam(1e-2), "learned": optax.adam(1e-2), "fixed": optax.set_to_zero()}, labels
    )
    loss = lambda both: jnp.mean(jnp.square(fq(both[0], X, quant=both[1]) - teacher))  # noqa: E731

    @jax.jit
    @jax.vmap
    def train(both):
        def step(carry, _):
            value, grads = jax.value_and_grad(loss)(carry[0])
            updates, state = optimizer.update(grads, carry[1], carry[0])
            return (optax.apply_updates(carry[0], updates), state), value

        (both, _), values = jax.lax.scan(step, (both, optimizer.init(both)), None, length=60)
        return both, values

    (params, quant), values = train((params, quant))
    assert values.shape == (3, 60) and bool(jnp.all(values[:, -1] < 0.5 * values[:, 0]))
    one = jax.tree.map(lambda a: a[1], (params, quant))
    result = qjax.convert(fq, one[0], X, quant=one[1])
    np.testing.assert_allclose(
        jax.jit(qjax.quantized(dense))(result.params, X), jax.jit(lambda p, q: fq(p, X, quant=q))(*one), rtol=1e-4, atol=1e-5
    )


@pytest.mark.slow
def test_experts_and_convolutions_have_static_ranges():
    def fn(p, x):
        h = jax.lax.conv_general_dilated(x, p["conv"], (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"), feature_group_count=2)
        h = jax.nn.relu(h).mean((1, 2))
        return jax.lax.ragged_dot(h, p["experts"], jnp.array([3, 0, 2], jnp.int32))

    params = {"conv": normal(3, 3, 2, 4), "experts": normal(3, 4, 5)}
    x = normal(5, 4, 4, 4)
    rule = Rule("*", weight=INT8, activation=STATIC, train=qjax.qat(qjax.ste(), qjax.lsq(), gradient=qjax.dynamic(INT8)))
    fq = qjax.fake_quant(fn, Policy([rule]))
    quant = fq.init(jax.random.key(0), params, x)
    result = qjax.convert(fq, params, x, quant=quant)
    got = jax.jit(qjax.quantized(fn))(result.params, x)
    out, grads = jax.jit(lambda p, q: (fq(p, x, quant=q), jax.grad(lambda p: fq(p, x, quant=q).sum())(p)))(params, quant)
    np.testing.assert_allclose(got, out, rtol=1e-4, atol=1e-4)
    exact = jax.grad(lambda p: fn(p, x).sum())(params)
    for g, e in zip(jax.tree.leaves(grads), jax.tree.leaves(exact), strict=True):
        assert float(jnp.linalg.norm(g - e)) < 0.15 * float(jnp.linalg.norm(e))


def test_random_rounding_draws_anew_in_each_step_and_layer():
    rule = Rule("*", weight=qjax.int2(), activation=STATIC, train=qjax.ste(rounding="stochastic"))
    fq = qjax.fake_quant(lambda p, x: x @ p["a"], Policy([rule]))
    quant = fq.init(jax.random.key(0), DENSE, X)
    run = jax.jit(lambda q: fq(DENSE, X, quant=q))
    first, again, second = run(quant), run(quant), run(fq.advance(quant))
    np.testing.assert_array_equal(first, again)
    assert not np.array_equal(first, second)


@dataclasses.dataclass(frozen=True)
class Counted(LearnedStep):
    """Notes where it begins."""

    seen: ClassVar[list[str]] = []

    def init(self, problem):
        self.seen.append(str(problem.spec))
        return super().init(problem)


def test_a_trace_looks_once_at_weights_that_are_alike():
    """A state is checked in every trace, and a model has hundreds of layers of a few kinds."""
    counted, act = Counted("mse"), qjax.static(qjax.uint8())
    params = {f"w{i}": normal(8, 8, seed=i) for i in range(6)}
    rules = [Rule("w0", weight=qjax.int3(group_size=2), train=counted), Rule("*", weight=qjax.int4(), activation=act, train=counted)]
    fq = qjax.fake_quant(lambda p, x: functools.reduce(lambda x, name: x @ p[name], sorted(p), x), Policy(rules))
    quant = fq.init(jax.random.key(0), params, X)
    counted.seen.clear()
    jax.eval_shape(lambda q: fq(params, X, quant=q), quant)
    assert counted.seen == ["int3(group_size=2)", 'int4(per="channel")']


@pytest.mark.parametrize("schedule", [qjax.schedule(), qjax.schedule(weights=1, freeze=4)], ids=["always", "a schedule"])
def test_the_shapes_of_a_state_are_those_of_a_begun_one(schedule):
    how = qjax.qat(qjax.lsq(), qjax.lsq(), schedule=schedule)
    rules = [dataclasses.replace(rule, train=how) for rule in POLICY]
    fq = qjax.fake_quant(scanned, Policy(rules))
    want = fq.init(jax.random.key(0), {"w": STACK}, X)
    assert qjax.training.state.shapes(fq.plan({"w": STACK}, X)) == jax.eval_shape(lambda: want)


def test_refusals():
    fq = qjax.fake_quant(dense, Policy([Rule("*", weight=qjax.int4(), activation=STATIC, train=qjax.lsq())]))
    quant = fq.init(jax.random.key(0), DENSE, jax.ShapeDtypeStruct(X.shape, X.dtype))
    for call in (lambda: fq(DENSE, X, quant=quant), lambda: qjax.convert(fq, DENSE, X, quant=quant)):
        with pytest.raises(ValueError, match=r"no range of the activations 'a' yet: .* fq\.calibrate"):
            call()
    quant = fq.init(jax.random.key(0), DENSE, X)
    np.testing.assert_allclose(jax.jit(lambda x: fq(DENSE, x, quant=quant))(X), fq(DENSE, X, quant=quant), rtol=1e-4, atol=1e-4)
    other = qjax.fake_quant(dense, Policy([Rule("*", weight=qjax.int4(group_size=2), train=qjax.lsq())]))
    with pytest.raises(ValueError, match=r"`quant` is of another policy: it differs in .*\. A policy cannot change between steps"):
        other(DENSE, X, quant=quant)
    whole = jax.tree.map(lambda a: a.astype(jnp.int32), quant)
    with pytest.raises(TypeError, match="must be float32, got int32"):
        fq(DENSE, X, quant=whole)
    with pytest.raises(ValueError, match=r"its scales are learned: train with qjax\.fake_quant and pack with qjax\.convert"):
        qjax.quantize(dense, DENSE, fq.policy, [X])
    with pytest.raises(ValueError, match=r"`variables` have no state of quantizers: .* variables = qjax\.linen\.begin\(model, key"):
        model = qjax.linen.fake_quant(nn.Dense(3), Policy([Rule("*", weight=qjax.int4(), train=qjax.lsq())]))
        model.apply(model.init(jax.random.key(0), X), X)
    packed = qjax.convert(fq, DENSE, X, quant=quant).params
    for call in (lambda: fq(packed, X, quant=quant), lambda: fq.init(jax.random.key(0), packed, X)):
        with pytest.raises(TypeError, match=r"`params` leaf 'a' is packed, QTensor.* integers have no gradient"):
            call()
    with pytest.raises(TypeError, match=r"`fq` must be what qjax\.fake_quant gave"):
        qjax.convert(dense, DENSE, X)
    with pytest.raises(ValueError, match="the data gives the input of 'a' NaN"):
        fq.calibrate(quant, DENSE, [X * jnp.nan])
    with pytest.raises(ValueError, match="holds 1 NaN"):
        qjax.convert(fq, {**DENSE, "a": DENSE["a"].at[0, 0].set(jnp.nan)}, X, quant=quant)


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"weight": qjax.nf4(), "train": qjax.lsq()}, r"lsq learns the scales of integers, .* qjax\.ste\(\)"),
        ({"weight": qjax.int4(), "train": qjax.dorefa()}, r'dorefa has an even number .* qjax\.uint2\(zero_dtype="float32"\)'),
        ({"weight": qjax.int4(), "train": qjax.pact()}, "is for static activations"),
        ({"weight": qjax.int4(), "activation": STATIC, "train": qjax.pact()}, "pact clips at 0"),
        ({"weight": qjax.nf4(), "train": qjax.ste(rounding="stochastic")}, "are for integers"),
        ({"weight": qjax.int4(), "train": qjax.qat(schedule=qjax.schedule(bits=((0, 8), (9, 3))))}, "end at its bits, 4"),
        ({"weight": qjax.int4(), "activation": STATIC, "train": qjax.qat(schedule=qjax.schedule(activation_bits=((0, 4),)))},
         "end at its bits, 8"),
        ({"weight": qjax.int4(), "train": "lsq"}, "`train` must be an estimator"),
        ({"weight": None, "train": qjax.lsq()}, "has nothing to do"),
    ],
)
def test_rules_refuse_what_does_not_train(settings, match):
    with pytest.raises((TypeError, ValueError), match=match):
        Rule("*", **settings)
    for build in (lambda: qjax.schedule(weights=-1), lambda: qjax.schedule(bits=((1, 8),)), lambda: qjax.ste(slope=2),
                  lambda: qjax.qat(gradient=STATIC), lambda: qjax.qat("lsq"), lambda: qjax.pact(-1.0)):  # fmt: skip
        with pytest.raises((TypeError, ValueError), match="must"):
            build()
