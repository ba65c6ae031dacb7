"""Training that begins with a method's codes: the same numbers to the bit, in the right cells, with a gradient; refusals."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import qjax
from qjax import Policy, Rule
from tests.parameters import every_other
from tests.program.cases import normal


def scanned(p, x):
    return jax.lax.scan(lambda h, w: (jax.nn.relu(h @ w), None), x, p["layers"])[0] @ p["head"] + p["bias"]


PARAMS = {"layers": normal(3, 24, 24) / 4, "head": normal(24, 10, seed=1) / 3, "bias": normal(10, seed=3)}
X = normal(40, 24, seed=2)
GROUPS = qjax.uint2(group_size=12)
METHODS = {
    "stacks in groups with zero points": (GROUPS, qjax.gptq(static_groups=True, act_order=True)),
    "reordered channels": (qjax.int3(), qjax.gptq(act_order=True)),
    "floating zero points": (qjax.uint4(group_size=8, zero_dtype="float32"), qjax.hqq()),
}


def begun(spec, method, params=PARAMS, train=None, activation=None):
    rules = lambda **more: Policy([Rule("*", weight=spec, activation=activation, **more)])  # noqa: E731
    result = qjax.quantize(scanned, params, rules(method=method), [X])
    fq = qjax.fake_quant(scanned, rules(train=train or qjax.lsq()), forward="float")
    return fq, result, *fq.from_packed(jax.random.key(0), result.params, X, params=params)


@pytest.mark.parametrize("name", every_other(METHODS))
def test_a_methods_codes_and_scales_are_where_training_begins(name):
    fq, result, params, quant = begun(*METHODS[name])
    again = qjax.convert(fq, params, X, quant=quant).params
    rounded = qjax.convert(fq, PARAMS, X, quant=fq.init(jax.random.key(0), PARAMS, X)).params
    for leaf in ("layers", "head"):
        q = result.params[leaf]
        tolerance = 1e-6 if name == "floating zero points" else 0
        np.testing.assert_allclose(fq.leaves(params, X, quant=quant)(params)[leaf], q.dequantize(), rtol=tolerance, atol=tolerance)
        np.testing.assert_allclose(again[leaf].dequantize(), q.dequantize(), rtol=tolerance, atol=tolerance)
        assert float(jnp.abs(rounded[leaf].dequantize() - q.dequantize()).max()) > 1e-3  # else any beginning would pass
    assert params["bias"] is result.params["bias"] or bool((params["bias"] == PARAMS["bias"]).all())


def test_only_what_has_to_moves_and_everything_has_a_gradient():
    fq, result, params, quant = begun(*METHODS["stacks in groups with zero points"])
    grads = jax.grad(lambda p: fq.leaves(params, X, quant=quant)(p)["layers"].sum())(params)["layers"]
    assert bool((grads == 1).all())
    w, new, q = PARAMS["layers"], params["layers"], result.params["layers"]
    step = np.repeat(np.asarray(q.scales()), 12, axis=-1).swapaxes(1, 2)  # (layers, out, groups) -> (layers, in, out)
    near = np.abs(np.asarray(w - q.dequantize())) < 0.48 * step
    codes = np.asarray(q.codes_unpacked()).swapaxes(1, 2)
    inner = (codes > 0) & (codes < 3)
    assert (near & inner).sum() > 100
    np.testing.assert_allclose(np.asarray(new)[near & inner], np.asarray(w)[near & inner], rtol=1e-5, atol=1e-6)
    assert (np.abs(np.asarray(new - q.dequantize())) <= 0.5 * step).all()


def test_static_ranges_begin_with_what_the_packed_weights_give():
    fq, _, params, quant = begun(qjax.int4(), qjax.gptq(), activation=qjax.static(qjax.int8()))
    by_hand = fq.calibrate(fq.init(jax.random.key(0), params, X) | {"weights": quant["weights"]}, params, [X])
    assert jax.tree.all(jax.tree.map(lambda a, b: bool((a == b).all()), quant, by_hand))
    assert set(quant["activations"]) == {"layers", "head"}


def test_bf16_weights_begin_where_their_numbers_can_and_are_refused_where_not():
    narrow = jax.tree.map(lambda a: a.astype(jnp.bfloat16), PARAMS)
    fq, result, params, quant = begun(qjax.int3(), qjax.gptq(), narrow)
    assert params["head"].dtype == jnp.bfloat16
    assert bool((fq.leaves(params, X, quant=quant)(params)["head"] == result.params["head"].dequantize()).all())
    fq, result, params, quant = begun(qjax.int8(), None, narrow)  # 127 codes are all that eight bits of a bfloat16 tell apart
    assert bool((fq.leaves(params, X, quant=quant)(params)["head"] == result.params["head"].dequantize()).all())
    with pytest.raises(ValueError, match="too coarse to round to its codes; give `params` in float32"):
        begun(qjax.uint8(), qjax.gptq(), jax.tree.map(lambda a: a / 8 + 1, narrow))


@pytest.mark.parametrize(
    ("spec", "method", "train", "message"),
    [
        (GROUPS, qjax.gptq(act_order=True), None, "reordered columns; use static_groups=True"),
        (qjax.int4(), qjax.gptq(), qjax.ste(), "takes its range from the weights; train with qjax.lsq"),
        (qjax.int4(), qjax.online_rotation(), None, "rotated on line"),
        (qjax.int4(), None, qjax.qat(qjax.lsq(), schedule=qjax.schedule(weights=10)), "its schedule begins with float weights"),
    ],
)
def test_what_training_cannot_take_over_is_refused_by_name(spec, method, train, message):
    with pytest.raises(ValueError, match=message):
        begun(spec, method, train=train)


def test_other_trees_and_specs_are_refused():
    fq, result, *_ = begun(qjax.int4(), None)
    key = jax.random.key(0)
    with pytest.raises(ValueError, match="another tree than `params`"):
        fq.from_packed(key, {"head": result.params["head"]}, X, params=PARAMS)
    head = lambda spec: qjax.fake_quant(scanned, Policy([Rule("head", weight=spec, train=qjax.lsq())]))  # noqa: E731
    with pytest.raises(ValueError, match="the policy leaves it float"):
        head(qjax.int4()).from_packed(key, result.params, X, params=PARAMS)
    with pytest.raises(ValueError, match="give both the same spec"):
        head(qjax.int3()).from_packed(key, {**PARAMS, "head": result.params["head"]}, X, params=PARAMS)
    with pytest.raises(TypeError, match="is packed"):
        fq.from_packed(key, result.params, X, params=result.params)
    with pytest.raises(ValueError, match="holds nothing that is packed"):
        fq.from_packed(key, PARAMS, X, params=PARAMS)
    with pytest.raises(ValueError, match=r"`params` leaf 'head' is \(24, 8\) and that of `packed` \(24, 10\)"):
        fq.from_packed(key, result.params, X, params={**PARAMS, "head": PARAMS["head"][:, :8], "bias": PARAMS["bias"][:8]})
