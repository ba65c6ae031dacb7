"""Ranges of static activations that follow the batches of training, within the compiled step."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import qjax
from qjax import Policy, Rule
from tests.program.cases import normal
from tests.training.test_state import layer

STATIC = qjax.static(qjax.int8())
TRAIN = qjax.qat(activation=qjax.moving_range(0.75), schedule=qjax.schedule(freeze=3))
PARAMS = {"w": normal(3, 8, 8) / 4, "out": normal(8, 2, seed=1)}


def scanned(p, x):
    h = jax.lax.scan(jax.checkpoint(lambda h, w: (layer(h, w), None)), x, p["w"])[0]
    return h @ p["out"]


def inputs(p, x):
    """What meets the weights of each layer, and the last, of a model of float activations."""
    found = []
    for w in p["w"]:
        found.append(x)
        x = layer(x, w)
    return [*found, x]


def test_ranges_follow_the_batches_until_they_are_frozen():
    rules = [Rule("*scores*:*", activation=(STATIC, STATIC), train=TRAIN), Rule("*", weight=qjax.int8(), activation=STATIC, train=TRAIN)]
    fq = qjax.fake_quant(scanned, Policy(rules))
    batches = [normal(5, 8, seed=2) * (1 - i / 8) for i in range(5)]  # smaller ones: nothing is clipped
    shapes = jax.ShapeDtypeStruct((5, 8), jnp.float32)
    quant = fq.init(jax.random.key(0), PARAMS, shapes)

    @jax.jit
    def step(params, quant, x):
        def loss(params, quant):
            out, quant = fq.tracked(params, x, quant=quant)
            return jnp.sum(out**2), quant

        grads, quant = jax.grad(loss, has_aux=True)(params, quant)
        return grads, fq.advance(quant)

    with pytest.raises(ValueError, match="`quant` has no range"):
        fq(PARAMS, batches[0], quant=quant)
    seen = []
    for x in batches:
        grads, quant = step(PARAMS, quant, x)
        seen.append(jax.tree.map(np.asarray, quant))
    assert step._cache_size() == 1 and all(np.isfinite(g).all() and g.any() for g in jax.tree.leaves(grads))

    # What each layer meets is that of the float model, but for the rounding of 8 bits.
    wanted = None
    for i, x in enumerate(batches):
        ends = np.array([[h.min(), h.max()] for h in inputs(PARAMS, x)])
        if i < 3:
            wanted = ends if wanted is None else 0.75 * wanted + 0.25 * ends
        got = [np.concatenate([seen[i]["activations"][name][end].ravel() for name in ("w", "out")]) for end in ("lo", "hi")]
        np.testing.assert_allclose(np.stack(got, 1), wanted, rtol=0.05, atol=0.05)
    (sides,) = seen[-1]["products"].values()
    assert {key: value["hi"].shape for key, value in sides.items()} == {"left": (3,), "right": (3,)}
    for a, b in zip(jax.tree.leaves(seen[2] | {"step": 0}), jax.tree.leaves(seen[4] | {"step": 0}), strict=True):
        np.testing.assert_array_equal(a, b)

    # The function itself computes with the ranges as they stand, and so does the packed model.
    out, same = fq.tracked(PARAMS, batches[0], quant=quant)
    np.testing.assert_allclose(fq(PARAMS, batches[0], quant=quant), out, rtol=1e-4, atol=1e-4)
    jax.tree.map(np.testing.assert_array_equal, same, quant)
    result = qjax.convert(fq, PARAMS, shapes, quant=quant)
    assert result.params["w"].act_scale.shape == (3, 1, 1)
    np.testing.assert_allclose(jax.jit(qjax.quantized(scanned, sites=result.sites))(result.params, batches[0]), out, rtol=1e-3, atol=1e-3)


def test_a_batch_that_is_not_finite_leaves_no_trace_and_refusals():
    estimator = qjax.moving_range(0.5)
    old = {"lo": jnp.float32(-1), "hi": jnp.float32(1)}
    for x in (jnp.array([jnp.nan, 9.0]), jnp.array([-9.0, jnp.inf])):
        assert estimator.track(x, old, qjax.training.estimator.Moment()) == old
    with pytest.raises(ValueError, match="`decay` must be a number of at least 0 and below 1, got 1"):
        qjax.moving_range(1)
    with pytest.raises(ValueError, match=r"is for static activations: give `activation`"):
        Rule("*", weight=qjax.int8(), train=estimator)
    fq = qjax.fake_quant(lambda p, x: x @ p["w"], Policy([Rule("*", weight=qjax.int8())]))
    with pytest.raises(ValueError, match=r"no ranges that follow the data: give a rule train=qjax.moving_range\(\)"):
        fq.tracked({"w": jnp.ones((2, 2))}, jnp.ones((1, 2)), quant={})
