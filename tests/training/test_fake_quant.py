"""Fake quantization: the packed model's weights, the published gradient, any program."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import qjax
from qjax import Policy, Rule
from qjax.core import IntSpec, QTensor
from qjax.training import straight_through
from tests.parameters import every_other
from tests.program.cases import CASES, doubled_backward, normal

SPECS = [
    qjax.int8(),
    qjax.int4(group_size=4, pad=True),
    qjax.uint3(),
    qjax.int2(scale_rule="full"),
    qjax.nf4(group_size=4, pad=True),
    qjax.bf16(),
]


def is_q(x):
    return isinstance(x, QTensor)


# Every spec is met in the ordinary test line, too.
@pytest.mark.parametrize(("case", "spec"), every_other((c, SPECS[i // 2 % 6]) for i, c in enumerate(CASES)), ids=str)
def test_fake_quant_computes_with_the_packed_weights_bit_for_bit(case, spec):
    policy = Policy([Rule("*", weight=spec)])
    packed = qjax.quantize(case.fn, case.params, policy, calibration=[case.inputs]).params
    dequantized = jax.tree.map(lambda x: x.dequantize() if is_q(x) else x, packed, is_leaf=is_q)
    fq = qjax.fake_quant(case.fn, policy)
    chex.assert_trees_all_equal(jax.jit(fq.leaves(case.params, *case.inputs))(case.params), dequantized)
    # The products of equal numbers may still be summed in another order.
    got, want = jax.jit(fq)(case.params, *case.inputs), jax.jit(case.fn)(dequantized, *case.inputs)
    chex.assert_trees_all_close(got, want, rtol=1e-2 if "bf16" in case.name else 1e-4, atol=1e-5)


@pytest.mark.parametrize("case", [c for c in CASES if c.name not in ("tied_embedding", "while_loops")], ids=str)
def test_gradients_reach_the_float_weights(case):
    fq = qjax.fake_quant(case.fn, Policy([Rule("*", weight=qjax.int4())]))
    rounded = fq.leaves(case.params, *case.inputs)(case.params)

    def loss(fn):
        return lambda p: sum(jnp.sum(jnp.square(y)) for y in jax.tree.leaves(fn(p, *case.inputs)))

    got, want = jax.jit(jax.grad(loss(fq)))(case.params), jax.jit(jax.grad(loss(case.fn)))(rounded)
    tolerance = 3e-2 if "bf16" in case.name else 1e-4
    chex.assert_trees_all_close(got, want, rtol=tolerance, atol=tolerance)


def test_a_custom_backward_rule_stays():
    """The rule doubles the weight's gradient on purpose; inlining the function would lose that."""
    w, x = normal(8, 5), normal(3, 8)
    fq = qjax.fake_quant(lambda p, x: doubled_backward(p["w"], x), Policy([Rule("*", weight=qjax.int8())]))
    got = jax.grad(lambda p: fq(p, x).sum())({"w": w})["w"]
    np.testing.assert_allclose(got, 2 * x.T @ jnp.ones((3, 5)), rtol=1e-5)


@pytest.mark.parametrize("rule", ["half", "full"])
def test_the_mask_is_the_published_one(rule):
    """An unsigned symmetric range does not cover the negative weights: half a step more under "half", none under "full"."""
    spec = IntSpec(4, signed=False, symmetric=True, scale_rule=rule)
    w = jnp.array([[-1.0], [-0.01], [0.0], [0.5], [2.0]])
    grad = jax.grad(lambda w: straight_through(w, spec, (-2,), (), "w").sum())(w)
    step = 2.0 / (15.5 if rule == "half" else 15)
    least = -0.5 * step if rule == "half" else 0.0
    np.testing.assert_array_equal(grad[:, 0], (np.asarray(w[:, 0]) >= least).astype(np.float32))


def test_an_asymmetric_range_clips_what_rounding_its_zero_point_cut_off():
    """Hand-made: range -1 .. 2.3, three bits: the zero point 2.12 rounds to 2, so the range ends at 5 steps, below 2.3."""
    w = jnp.array([[-1.0], [0.7], [2.3]])
    scale = 3.3 / 7
    grad = jax.grad(lambda w: straight_through(w, qjax.uint3(), (-2,), (), "w").sum())(w)
    np.testing.assert_array_equal(grad[:, 0], [float(0 <= x / scale + 2 <= 7) for x in (-1.0, 0.7, 2.3)])
    assert grad[0, 0] == 0


@pytest.mark.parametrize("spec", [s for s in SPECS if s != qjax.uint3()], ids=str)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=str)
def test_every_weight_trains_under_ranges_from_the_extremes(spec, dtype):
    w = normal(37, 5, dtype=dtype)
    grad = jax.jit(jax.grad(lambda w: straight_through(w, spec, (-2,), (), "w").astype(jnp.float32).sum()))(w)
    assert grad.dtype == dtype
    np.testing.assert_array_equal(np.asarray(grad, np.float32), 1)


def test_forward_mode_and_vmap_over_seeds():
    fq = qjax.fake_quant(lambda p, x: x @ p["w"], Policy([Rule("*", weight=qjax.int4())]))
    x = normal(3, 8)
    stacked = {"w": jnp.stack([normal(8, 5, seed=i) for i in range(3)])}
    many = jax.vmap(fq, (0, None))(stacked, x)
    for i in range(3):
        np.testing.assert_allclose(many[i], fq({"w": stacked["w"][i]}, x), rtol=1e-6)
    _, tangent = jax.jvp(lambda p: fq(p, x), ({"w": stacked["w"][0]},), ({"w": jnp.ones((8, 5))},))
    np.testing.assert_allclose(tangent, x @ jnp.ones((8, 5)), rtol=1e-5)


def test_a_qat_loop_ends_better_than_rounding_and_converts_exactly():
    """Trains a three-bit regression; `convert` packs the weights that it trained with to the bit, and their loss."""

    def model(p, x):
        return jnp.tanh(x @ p["a"] + p["bias"]) @ p["b"]

    teacher = {"a": normal(8, 32), "bias": normal(32), "b": normal(32, 4)}
    x = normal(256, 8, seed=9)
    y = model(teacher, x)
    policy = Policy([Rule("*", weight=qjax.int3())])
    fq = qjax.fake_quant(model, policy)
    loss = jax.jit(lambda fn_params: jnp.mean((fq(fn_params, x) - y) ** 2))
    optimizer = optax.adam(optax.cosine_decay_schedule(3e-3, 300))

    @jax.jit
    def step(params, state):
        grads = jax.grad(loss)(params)
        updates, state = optimizer.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    params, state = teacher, optimizer.init(teacher)
    before = loss(params)
    for _ in range(300):
        params, state = step(params, state)
    assert loss(params) < 0.8 * before
    result = qjax.convert(fq, params, jax.ShapeDtypeStruct(x.shape, x.dtype))
    packed = result.params
    assert is_q(packed["a"]) and is_q(packed["b"]) and packed["bias"] is params["bias"]
    dequantized = jax.tree.map(lambda v: v.dequantize() if is_q(v) else v, packed, is_leaf=is_q)
    chex.assert_trees_all_equal(dequantized, jax.jit(fq.leaves(params, x))(params))
    # What quantizing the trained parameters would give: there is no state to lose.
    chex.assert_trees_all_equal(packed, qjax.quantize(model, params, policy, calibration=[x]).params)
    assert result.report.nbytes < 0.3 * result.report.float_nbytes
    after = jnp.mean((jax.jit(qjax.quantized(model))(packed, x) - y) ** 2)
    np.testing.assert_allclose(after, loss(params), rtol=1e-6)
    assert after < 0.8 * before


def test_init_checks_the_policy_and_holds_nothing_for_rounding():
    fq = qjax.fake_quant(lambda p, x: x @ p["w"], Policy([Rule("*", weight=qjax.int4())]))
    params, x = {"w": normal(8, 5)}, normal(2, 8)
    quant = fq.init(jax.random.key(0), params, x)
    assert jax.tree.leaves(quant) == []
    np.testing.assert_array_equal(fq(params, x, quant=quant), fq(params, x))
    with pytest.raises(TypeError, match=r"`quant` must be a state as fq\.init gives it, .* got a tree of 'scale'"):
        fq(params, x, quant={"scale": 1})
    with pytest.raises(TypeError, match=r"`policy` must be a qjax\.Policy"):
        qjax.fake_quant(lambda p, x: x, "int8")
    with pytest.raises(ValueError, match="matches no parameter"):
        qjax.fake_quant(lambda p, x: x @ p["w"], Policy([Rule("v", weight=qjax.int4())]))(params, x)


INSIDE = ("custom_vjp", "custom_jvp", "shard_map")


@pytest.mark.parametrize("case", [c for c in CASES if c.name not in INSIDE], ids=str)
def test_rounded_activations_are_those_of_the_integer_model(case):
    policy = qjax.Policy([qjax.Rule("*", weight=qjax.int8(), activation=qjax.dynamic(qjax.int8()))])
    packed = qjax.quantize(case.fn, case.params, policy, calibration=[case.inputs]).params
    got = jax.jit(qjax.fake_quant(case.fn, policy))(case.params, *case.inputs)
    want = jax.jit(qjax.quantized(case.fn))(packed, *case.inputs)
    # A sum in another order may put an activation of the next layer on the other side of a rounding boundary: by 1/127 of its
    # row's range, which a loop over time feeds back.
    for g, w in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        g, w = np.asarray(g, np.float64), np.asarray(w, np.float64)
        assert np.linalg.norm(g - w) <= (2e-2 if "bf16" in case.name or case.name == "time_loop" else 5e-3) * np.linalg.norm(w)


def test_gradients_pass_rounded_activations_straight_through():
    fn = lambda p, x: x @ p["w"]  # noqa: E731
    policy = qjax.Policy([qjax.Rule("*", weight=qjax.int4(), activation=qjax.dynamic(qjax.int4()))])
    params, x = {"w": jnp.linspace(-1, 1, 24).reshape(8, 3)}, jnp.linspace(-2, 2, 40).reshape(5, 8)
    fq = qjax.fake_quant(fn, policy)
    by_x = jax.grad(lambda x: fq(params, x).sum())(x)
    weights = qjax.quantize(fn, params, policy, calibration=[x]).params["w"].dequantize()
    np.testing.assert_allclose(by_x, jnp.broadcast_to(weights.sum(1), x.shape), rtol=1e-6)
    by_w = jax.grad(lambda p: fq(p, x).sum())(params)["w"]
    rounded = qjax.core.round_activation(x, qjax.dynamic(qjax.int4()), (1,))
    np.testing.assert_allclose(by_w, jnp.broadcast_to(rounded.sum(0)[:, None], (8, 3)), rtol=1e-6, atol=1e-6)


def test_a_policy_with_state_asks_for_it():
    fn, x = lambda p, x: x @ p["w"], jnp.ones((2, 8))
    policy = qjax.Policy([qjax.Rule("*", weight=qjax.int4(), activation=qjax.static(qjax.int8()))])
    with pytest.raises(ValueError, match=r"`quant` is missing: .* quant=fq\.init\(key"):
        qjax.fake_quant(fn, policy)({"w": jnp.ones((8, 3))}, x)


@pytest.mark.parametrize("activation", [None, qjax.dynamic(qjax.int8())], ids=["float", "int8"])
def test_a_weight_with_an_on_line_rotation_is_rounded_where_it_is_rotated(activation):
    w, x = normal(3, 8, 10), normal(4, 3, 8, seed=1)
    fn = lambda p, x: jnp.einsum("bhd,hdn->bn", x, p["w"])  # noqa: E731
    policy = Policy([Rule("*", weight=qjax.int4(), activation=activation, method=qjax.online_rotation())])
    packed = qjax.quantize(fn, {"w": w}, policy, calibration=[x]).params
    fq = qjax.fake_quant(fn, policy)
    chex.assert_trees_all_equal(jax.jit(fq.leaves({"w": w}, x))({"w": w})["w"], packed["w"].dequantize())
    chex.assert_trees_all_close(jax.jit(fq)({"w": w}, x), jax.jit(qjax.quantized(fn))(packed, x), rtol=1e-4, atol=1e-4)
    gradient = jax.grad(lambda p: fq(p, x).sum())({"w": w})["w"]
    # Orthogonal: what comes through the rotation comes back; a few weights at the ends of their range are cut off.
    want = jnp.broadcast_to(x.sum(0)[:, :, None], w.shape)
    assert float(jnp.linalg.norm(gradient - want)) < 0.5 * float(jnp.linalg.norm(want))


def test_a_rotation_counts_wherever_it_stands_among_the_methods():
    w, x = normal(48, 10), jnp.sign(normal(16, 48, seed=1))  # inputs of one size: there is nothing to rescale
    for method in (qjax.awq(then=qjax.online_rotation()), qjax.low_rank(2, kind="svd", then=qjax.online_rotation(seed=3))):
        policy = Policy([Rule("*", weight=qjax.int4(), method=method)])
        packed = qjax.quantize(lambda p, x: x @ p["w"], {"w": w}, policy, calibration=[x]).params["w"]
        assert packed.rotation is not None
        want = packed.with_adapter(None).dequantize() if packed.adapter is not None else packed.dequantize()
        fake = qjax.fake_quant(lambda p, x: x @ p["w"], policy).leaves({"w": w}, x)({"w": w})["w"]
        np.testing.assert_array_equal(fake, want)


def test_a_product_with_a_rotation_trains_as_it_runs():
    x = normal(2, 5, 16)

    def scores(p, x):
        with jax.named_scope("scores"):
            return jnp.einsum("btd,bsd->bts", x @ p["q"], x @ p["k"])

    p = {"q": normal(16, 8), "k": normal(16, 8, seed=1)}
    int4 = qjax.dynamic(qjax.int4())
    policy = Policy([Rule("q", weight=None), Rule("scores:*", activation=int4, method=qjax.online_rotation())])
    result = qjax.quantize(scores, p, policy, calibration=[x])
    got = jax.jit(qjax.fake_quant(scores, policy))(p, x)
    chex.assert_trees_all_close(got, jax.jit(qjax.quantized(scores, sites=result.sites))(p, x), rtol=1e-4, atol=1e-4)
