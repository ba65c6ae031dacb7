"""What is packed or of integers has no gradient and no learning rate: every verb of training says so in its own words."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
import pytest

import qjax
from qjax import Policy, Rule
from tests.program.cases import normal

KEY = jax.random.key(0)
RULE = Rule("*", weight=qjax.int4(), activation=qjax.static(qjax.int8()), train=qjax.moving_range(0.5))
PARAMS, X = {"a": normal(8, 8), "b": normal(8, 4)}, normal(5, 8)


def fn(p, x):
    return jnp.tanh(x @ p["a"]) @ p["b"]


FQ = qjax.fake_quant(fn, Policy([RULE]))
QUANT = FQ.init(KEY, PARAMS, X)
PACKED = qjax.quantize(fn, PARAMS, Policy([Rule("*", weight=qjax.int4())]), [X]).params
GIVEN = {
    "packed": (PACKED, r"'(weights/)?a' is packed|'a' is a QTensor"),
    "one packed": ({**PARAMS, "a": PACKED["a"]}, r"'(weights/)?a' is packed|'a' is a QTensor"),
    "one of integers": ({**PARAMS, "a": jnp.ones((8, 8), jnp.int8)}, "'(weights/)?a' is int8"),
}
LORA = qjax.qlora(fn, Policy([Rule("*", weight=qjax.int4(), train=qjax.lora(2))]))
VERBS = {
    "init": lambda p: FQ.init(KEY, p, X),
    "the function": lambda p: FQ(p, X, quant=QUANT),
    "its gradient by the others": lambda p: jax.grad(lambda b: FQ({**p, "b": b}, X, quant=QUANT).sum())(PARAMS["b"]),
    "tracked": lambda p: FQ.tracked(p, X, quant=QUANT),
    "calibrate": lambda p: FQ.calibrate(QUANT, p, [X]),
    "leaves": lambda p: FQ.leaves(p, X, quant=QUANT)(p),
    "report": lambda p: FQ.report(p, X),
    "from_packed": lambda p: FQ.from_packed(KEY, PACKED, X, params=p),
    "convert": lambda p: qjax.convert(FQ, p, X, quant=QUANT),
    "labels": lambda p: FQ.labels({**QUANT, "weights": p}),
    "labels of Linen": lambda p: qjax.linen.labels({"params": p}),
    "adam8bit": lambda p: qjax.adam8bit(1e-3).init(p),
    "lion8bit": lambda p: qjax.lion8bit(1e-3).init(p),
    "on the host": lambda p: qjax.host_offload(qjax.adam8bit(1e-3)).init(p),
    "check_trainable": qjax.check_trainable,
}


def test_labels_of_variables_leave_tables_of_integers_alone():
    table = {"params": {**PARAMS, "a": jnp.ones(8, jnp.int32)}, "other": {"n": jnp.ones(())}}
    assert qjax.linen.labels(table) == {"params": {**dict.fromkeys(PARAMS, "weights"), "a": "fixed"}, "other": {"n": "fixed"}}
    with pytest.raises(TypeError, match="leaf 'a' is int8"):
        qjax.linen.labels({"params": {"a": jnp.ones(8, jnp.int8)}})


@pytest.mark.parametrize(("verb", "name"), [(v, n) for v in VERBS for n in GIVEN if (v, n) != ("labels of Linen", "one of integers")])
def test_what_has_no_gradient_is_refused_by_its_path(verb, name):
    params, says = GIVEN[name]
    with pytest.raises(TypeError, match=f"leaf ({says})") as caught:
        VERBS[verb](params)
    assert "float" in str(caught.value)  # the remedy


def test_modules_and_adapters_too():
    model = qjax.linen.fake_quant(nn.Dense(4), Policy([Rule("kernel", weight=qjax.int4(), train=qjax.lsq())]))
    variables = model.init(KEY, X)
    packed = qjax.linen.quantize(nn.Dense(4), variables, Policy([Rule("kernel", weight=qjax.int4())]), [X]).params
    for call in (lambda: qjax.linen.begin(model, KEY, packed, X), lambda: qjax.linen.labels(packed)):
        with pytest.raises(TypeError, match=r"leaf '(params/)?kernel' is packed"):
            call()
    with pytest.raises(TypeError, match="the packed base is the second argument and never trained"):
        LORA(PACKED, PACKED, X)
    adapters = LORA.init(KEY, PACKED, X)
    qjax.check_trainable(adapters)
    whole = {**adapters, "a": {**adapters["a"], "b": adapters["a"]["b"].astype(jnp.int8)}}
    with pytest.raises(TypeError, match="`adapters` 'a' 'b' is int8, not floating"):
        LORA(whole, PACKED, X)


def test_what_is_left_out_of_the_optimizer_may_be_of_any_kind():
    mixed = {**PARAMS, "table": jnp.arange(8), "key": jax.random.key(1)}
    with pytest.raises(TypeError, match="`params` leaf 'key' is key<fry>"):
        qjax.check_trainable({"key": mixed["key"]})
    tx = optax.masked(qjax.adam8bit(1e-3), {"a": True, "b": True, "table": False, "key": False})
    tx.init(mixed)
    table = qjax.fake_quant(lambda p, x: x @ p["a"][p["table"]], Policy([Rule("*", weight=qjax.int4())]))
    assert table(mixed, X).shape == (5, 8)
    counts = {"w": jnp.ones((8, 4), jnp.int8), **PARAMS}
    front = qjax.fake_quant(lambda p, x: fn(p, x) + x @ p["w"].astype(x.dtype), Policy([Rule("[ab]", weight=qjax.int4())]))
    assert front(counts, X).shape == (5, 4)
