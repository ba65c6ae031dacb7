"""Learned rounding: its formulas, that it beats rounding to nearest, and that what is packed is what was trained."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import qjax
from qjax import Policy, Rule
from qjax.training import rounding_penalty
from tests.program.cases import normal

STEPS, FREEZE = 120, 100
TRAIN = qjax.qat(qjax.adaround(), schedule=qjax.schedule(freeze=FREEZE))


def stacked(p, x):
    return jax.lax.scan(lambda h, w: (jnp.tanh(h @ w), None), x, p["w"])[0]


def test_gradients_are_those_of_the_formulas():
    spec = qjax.int3()
    fq = qjax.fake_quant(lambda p, x: x @ p["w"], Policy([Rule("*", weight=spec, train=TRAIN)]))
    w = np.array(normal(12, 3, seed=4))
    w[2, 1] = 0.0
    params, x = {"w": jnp.asarray(w)}, normal(5, 12, seed=5)
    quant = fq.init(jax.random.key(0), params, x)
    loss = lambda p, q: jnp.sum(jnp.sin(fq(p, x, quant=q)))  # noqa: E731
    value, (by_w, by_q) = jax.value_and_grad(loss, argnums=(0, 1))(params, quant)

    v, s = (np.float64(quant["weights"]["w"][name]) for name in ("rounding", "grid"))
    s = s.reshape(1, 3)
    sigmoid = 1 / (1 + np.exp(-v))
    h, low = np.clip(1.2 * sigmoid - 0.1, 0, 1) * (w != 0), np.floor(w / s)
    rounded = s * np.clip(low + h, -4, 3)
    np.testing.assert_allclose(value, np.sin(x @ rounded).sum(), rtol=1e-5)
    inside = (low >= -4) & (low + 1 <= 3) & (w != 0)
    out = np.asarray(x).T @ np.cos(x @ rounded)
    assert 0 < inside.mean() < 1
    np.testing.assert_allclose(by_w["w"], np.where(inside, out, 0), rtol=1e-4, atol=1e-5)
    slope = 1.2 * sigmoid * (1 - sigmoid) * ((h > 0) & (h < 1))
    np.testing.assert_allclose(by_q["weights"]["w"]["rounding"], np.where(inside, out * s * slope, 0), rtol=1e-4, atol=1e-5)
    assert not by_q["weights"]["w"]["grid"].any()

    quant = quant | {"step": jnp.float32(60)}
    beta = 2 + 9 * (1 + np.cos(np.pi * (0.6 - 0.2) / 0.8))
    h = np.clip(1.2 * sigmoid - 0.1, 0, 1)
    np.testing.assert_allclose(rounding_penalty(quant, FREEZE), np.sum(1 - np.abs(2 * h - 1) ** beta), rtol=1e-5)
    assert rounding_penalty(quant | {"step": jnp.float32(19)}, FREEZE) == 0


def test_it_beats_rounding_to_nearest_and_packs_what_it_trained():
    params = {"w": (normal(2, 16, 16) / 4).at[:, 3].set(0.0)}
    x = normal(64, 16, seed=1) @ (jnp.eye(16) + 0.5 * normal(16, 16, seed=2))
    spec = qjax.uint2(group_size=8)
    fq = qjax.fake_quant(stacked, Policy([Rule("*", weight=spec, train=TRAIN)]))
    wanted = stacked(params, x)
    quant = fq.init(jax.random.key(0), params, x)
    np.testing.assert_allclose(fq(params, x, quant=quant), wanted, atol=0.5)
    optimizer = optax.multi_transform({"learned": optax.adam(0.05), "fixed": optax.set_to_zero()}, fq.labels(quant))
    error = lambda out: jnp.sum((out - wanted) ** 2)  # noqa: E731

    @jax.jit
    def step(quant, state):
        slope = jax.grad(lambda q: error(fq(params, x, quant=q)) + 0.02 * rounding_penalty(q, FREEZE))(quant)
        updates, state = optimizer.update(slope, state)
        return fq.advance(optax.apply_updates(quant, updates)), state

    state = optimizer.init(quant)
    for i in range(STEPS):
        quant, state = step(quant, state)
        if i == FREEZE - 3:
            with pytest.raises(ValueError, match=r"`quant` is at step 98, and its schedule rounds everything.*from step 100"):
                qjax.convert(fq, params, x, quant=quant)
    assert step._cache_size() == 1
    result = qjax.convert(fq, params, x, quant=quant)
    w = result.params["w"].dequantize()
    np.testing.assert_array_equal(w, fq.leaves(params, x, quant=quant)(params)["w"])
    assert not w[:, 3].any() and result.report.rows[0].method == "adaround"
    nearest = qjax.quantize(stacked, params, Policy([Rule("*", weight=spec, method=qjax.rtn(mse=True))]), calibration=[x])
    assert error(stacked({"w": w}, x)) < 0.75 * error(stacked({"w": nearest.params["w"].dequantize()}, x))


def test_refusals():
    freeze = qjax.schedule(freeze=5)
    for rule, message in [
        (lambda: Rule("*", weight=qjax.int4(), train=qjax.adaround()), r"needs the step at which rounding is decided: write qjax.qat\("),
        (lambda: Rule("*", weight=qjax.int4(), train=qjax.qat(qjax.adaround())), "adaround decides at the `freeze` of its schedule"),
        (lambda: Rule("*", weight=qjax.nf4(), train=qjax.qat(qjax.adaround(), schedule=freeze)), "adaround learns which whole number"),
        (lambda: rounding_penalty({}, 5), "`quant` has no learned rounding"),
        (lambda: rounding_penalty({"weights": {"w": {"rounding": jnp.ones(2)}}, "step": 0}, 0), "`steps` must be a positive number"),
    ]:
        with pytest.raises(ValueError, match=message):
            rule()
    with pytest.raises(TypeError, match="`mse` must be True or False"):
        qjax.adaround("no")
