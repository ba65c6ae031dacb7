"""Training whose forward products run on integers: the numbers of the packed model, the gradients of the float product."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import qjax
from qjax import Policy, Rule
from tests.program.cases import CASES, normal
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


def test_what_has_no_integers_stays_float_and_forward_mode_works():
    w, x = normal(8, 5), normal(3, 8)
    rule = Rule("*", weight=qjax.int4(group_size=4), activation=DYNAMIC)
    assert "xi8>, tensor" not in numbers(lambda p, x: x @ p["w"], rule, {"w": w}, (x,), "integer")[0]
    fq = qjax.fake_quant(lambda p, x: x @ p["w"], Policy([Rule("*", weight=qjax.int4(), activation=DYNAMIC)]), "integer")
    _, tangent = jax.jvp(lambda p: fq(p, x), ({"w": w},), ({"w": jnp.ones((8, 5))},))
    np.testing.assert_allclose(tangent, qjax.core.round_activation(x, DYNAMIC, (1,)) @ jnp.ones((8, 5)), rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match="`forward` must be one of 'float', 'integer', None"):
        qjax.fake_quant(lambda p, x: x, Policy([rule]), "int8")
