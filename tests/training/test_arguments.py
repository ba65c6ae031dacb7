"""Every public argument of training: what is no number, flag, step or key is refused by the argument's name and its value."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import qjax
from qjax import Policy, Rule
from qjax.training import Blocks, rounding_penalty, scale_by_adam8bit
from tests.program.cases import normal

KEY, NAN, INF = jax.random.key(0), float("nan"), float("inf")
PARAMS, X = {"a": normal(8, 8), "b": normal(8, 4)}, normal(5, 8)


def fn(p, x):
    return jnp.tanh(x @ p["a"]) @ p["b"]


POLICY = Policy([Rule("*", weight=qjax.int4(), train=qjax.lsq())])
FQ = qjax.fake_quant(fn, POLICY)
QUANT = FQ.init(KEY, PARAMS, X)
ROUNDING = {"weights": {"w": {"rounding": jnp.ones(2)}}, "step": jnp.float32(1)}
BASE = qjax.quantize(fn, PARAMS, Policy([Rule("*", weight=qjax.int4())]), [X])
TUNED = qjax.qlora(fn, Policy([Rule("*", weight=qjax.int4(), train=qjax.lora(2))]))
ADAPTERS = TUNED.init(KEY, BASE.params, X)


def rotate(**kwargs):
    return qjax.learn_rotation(fn, PARAMS, POLICY, [X], **{"key": KEY, "steps": 1, **kwargs})


ROOMS = {
    "estimators": [
        (lambda: qjax.ste(slope="a"), "`slope` must be a number of at least 0 and below 1, got 'a'"),
        (lambda: qjax.ste(slope=NAN), "`slope` must be a number of at least 0 and below 1, got nan"),
        (lambda: qjax.ste(slope=True), "`slope` must be .* got True"),
        (lambda: qjax.ste(slope=1), "`slope` must be .* got 1"),
        (lambda: qjax.ste(gradient=1), "`gradient` must be one of 'clipped', 'passed', got 1"),
        (lambda: qjax.ste(rounding=None), "`rounding` must be one of 'nearest', 'stochastic', got None"),
        (lambda: qjax.pact(alpha="2"), "`alpha` must be a positive number, got '2'"),
        (lambda: qjax.pact(alpha=INF), "`alpha` must be a positive number, got inf"),
        (lambda: qjax.pact(alpha=True), "`alpha` must be a positive number, got True"),
        (lambda: qjax.pact(alpha=0), "`alpha` must be a positive number, got 0"),
        (lambda: qjax.pact(learns="no"), "`learns` must be True or False, got 'no'"),
        (lambda: qjax.lsq(["mean"]), "`start` must be one of 'mean', 'extremes', 'mse', got"),
        (lambda: qjax.moving_range("x"), "`decay` must be a number of at least 0 and below 1, got 'x'"),
        (lambda: qjax.moving_range(NAN), "`decay` must be .* got nan"),
        (lambda: qjax.moving_range(True), "`decay` must be .* got True"),
        (lambda: qjax.adaround(1), "`mse` must be True or False, got 1"),
        (lambda: qjax.training.AdaRound("no"), "`mse` must be True or False, got 'no'"),
        (lambda: qjax.qat(qjax.training.LearnedStep), "`weight` must be an estimator of weights"),
        (lambda: qjax.qat(activation="x"), "`activation` must be an estimator of activations"),
        (lambda: qjax.qat(schedule=5), r"`schedule` must be qjax\.schedule"),
        (lambda: rounding_penalty(None, 5), "`quant` must be the state that fq.init gives, got NoneType"),
        (lambda: rounding_penalty({"weights": ROUNDING["weights"]}, 5), "`quant` has no step: give the whole state"),
        (lambda: rounding_penalty(ROUNDING, "5"), "`steps` must be a positive number, got '5'"),
        (lambda: rounding_penalty(ROUNDING, True), "`steps` must be a positive number, got True"),
        (lambda: rounding_penalty(ROUNDING, 5, "x"), "`warmup` must be a number of at least 0 and below 1, got 'x'"),
        (lambda: rounding_penalty(ROUNDING, 5, beta=3.0), "`beta` must be two numbers, at the begin and the end, .* got 3.0"),
        (lambda: rounding_penalty(ROUNDING, 5, beta=("a", 2)), "`beta` must be a positive number, got 'a'"),
    ],
    "schedules": [
        (lambda: qjax.schedule(bits=((0, "8"), (5, 4))), r"`bits` must hold whole numbers, .* got \(\(0, '8'\), \(5, 4\)\)"),
        (lambda: qjax.schedule(bits=((0, 8), (True, 4))), "`bits` must hold whole numbers, .*True"),
        (lambda: qjax.schedule(activation_bits=((0, 8.0), (5, 4))), r"`activation_bits` must hold whole numbers, .*8\.0"),
        (lambda: qjax.schedule(bits=4), r"`bits` must be a tuple of pairs \(step, bits\) .* got 4"),
        (lambda: qjax.schedule(bits=((0, 9),)), "`bits` must name 2 to 8 bits"),
        (lambda: qjax.schedule(weights="1"), "`weights` must be an int of at least 0, got '1'"),
        (lambda: qjax.schedule(activations=1.5), "`activations` must be an int of at least 0, got 1.5"),
        (lambda: qjax.schedule(freeze=True), "`freeze` must be an int of at least 0, got True"),
        (lambda: qjax.schedule(weights=None), "`weights` must be an int of at least 0, got None"),
    ],
    "optimizers": [
        *((lambda make=make: make("x"), "`learning_rate` must be a finite number or a schedule, .* got 'x'") for make in
          (qjax.adam8bit, qjax.lion8bit)),
        *((lambda make=make: make(NAN), "`learning_rate` must be a finite number or a schedule, .* got nan") for make in
          (qjax.adam8bit, qjax.lion8bit)),
        *((lambda make=make: make(1e-3, b1="x"), "`b1` must be a number of at least 0 and below 1, got 'x'") for make in
          (qjax.adam8bit, qjax.lion8bit)),
        *((lambda make=make: make(1e-3, b2=np.float32(1.5)), "`b2` must be .* got np.float32") for make in (qjax.adam8bit, qjax.lion8bit)),
        *((lambda make=make: make(1e-3, weight_decay=0.1, mask="x"), "`mask` must be a tree of True and False .* got 'x'") for make in
          (qjax.adam8bit, qjax.lion8bit)),
        (lambda: qjax.adam8bit(1e-3, eps="x"), "`eps` must be a number of at least 0, got 'x'"),
        (lambda: qjax.adam8bit(1e-3, eps=True), "`eps` must be a number of at least 0, got True"),
        (lambda: scale_by_adam8bit(eps=INF), "`eps` must be a number of at least 0, got inf"),
        (lambda: Blocks("x"), "`size` must be an int of at least 2, got 'x'"),
        (lambda: Blocks(at_once=1.5), "`at_once` must be an int of at least 1, got 1.5"),
        (lambda: qjax.host_offload(3), "`tx` must be an optax transformation"),
        (lambda: qjax.host_offload(optax.adam(1e-3), "x"), "`at_least` must be an int of at least 0, got 'x'"),
    ],
    "adapters": [
        (lambda: qjax.lora("4"), "`rank` must be an int of at least 1, got '4'"),
        (lambda: qjax.lora(4, "x"), "`alpha` must be a positive number, got 'x'"),
        (lambda: qjax.lora(4, INF), "`alpha` must be a positive number, got inf"),
        (lambda: qjax.lora(4, dropout="x"), "`dropout` must be a number of at least 0 and below 1, got 'x'"),
        (lambda: qjax.lora(4, dora=1), "`dora` must be True or False, got 1"),
        (lambda: qjax.lora(4, init=3), "`init` must be one of 'kaiming', 'gaussian', got 3"),
        (lambda: qjax.loftq("4"), "`rank` must be an int of at least 1, got '4'"),
        (lambda: qjax.loftq(4, "5"), "`iterations` must be an int of at least 1, got '5'"),
        (lambda: qjax.loftq(4, dtype=3), "`dtype` must be one of"),
        (lambda: qjax.qlora(3, POLICY), "`fn` must be a function"),
        (lambda: qjax.qlora(fn, "x"), r"`policy` must be a qjax\.Policy"),
        (lambda: qjax.qlora(fn, POLICY, 3), "`sites` must be the `sites` of a result, got int"),
        (lambda: TUNED.init(0, BASE.params, X), "`key` must be a key of jax.random, .* got int"),
        (lambda: TUNED(ADAPTERS, BASE.params, X, dropout_key=3), "`dropout_key` must be a key of jax.random, .* got int"),
        (lambda: TUNED(None, BASE.params, X), "`adapters` must be what .* got NoneType"),
        (lambda: TUNED.attach(ADAPTERS, BASE.params, X, dtype="x"), "`dtype` must be one of 'float16', 'bfloat16', 'float32', got 'x'"),
        (lambda: TUNED.attach(ADAPTERS, BASE.params, X, dtype=jnp.int8), "`dtype` must be one of .* got 'int8'"),
        (lambda: TUNED.requantize(ADAPTERS, BASE.params, 3), "`calibration` must be a list of batches, got int"),
    ],
    "rotations": [
        (lambda: rotate(learning_rate="x"), "`learning_rate` must be a positive number, got 'x'"),
        (lambda: rotate(learning_rate=NAN), "`learning_rate` must be a positive number, got nan"),
        (lambda: rotate(key=0), "`key` must be a key of jax.random"),
        (lambda: rotate(steps="3"), "`steps` must be an int of at least 0, got '3'"),
        (lambda: rotate(optimizer="adam"), "`optimizer` must be an optax transformation such as .* got 'adam'"),
        (lambda: rotate(loss=3), r"`loss` must be a function of \(outputs, \*batch\), or None, got 3"),
        (lambda: rotate(every="no"), "`every` must be True or False, got 'no'"),
        (lambda: rotate(untie=1), "`untie` must be True or False, got 1"),
    ],
    "states": [
        (lambda: FQ.init(0, PARAMS, X), "`key` must be a key of jax.random"),
        (lambda: FQ.from_packed(0, BASE.params, X, params=PARAMS), "`key` must be a key of jax.random"),
        (lambda: FQ.from_packed(KEY, BASE, X, params=PARAMS), "`packed` is another tree than `params`: give result.params"),
        (lambda: FQ.from_packed(KEY, BASE.params, X, params=None), "`packed` is another tree than `params`"),
        *((lambda call=call, value=value: call(value), "`quant` must be a state as fq.init gives it")
          for call in (FQ.advance, FQ.labels, lambda q: FQ(PARAMS, X, quant=q), lambda q: qjax.convert(FQ, PARAMS, X, quant=q))
          for value in (3, "x", [QUANT], (PARAMS, QUANT))),
        (lambda: FQ.advance(None), "`quant` must be a state as fq.init gives it, .* got NoneType"),
        (lambda: qjax.convert(FQ, BASE, X, quant=QUANT), "`params` is a Result, .* result.params"),
        (lambda: qjax.convert(fn, PARAMS, X, quant=QUANT), "`fq` must be what qjax.fake_quant gave, got function"),
        (lambda: qjax.fake_quant(3, POLICY), "`fn` must be a function"),
        (lambda: qjax.fake_quant(fn, POLICY, folds=3), "`folds` must be"),
        (lambda: qjax.fake_quant(fn, POLICY, ["integer"]), "`forward` must be one of 'float', 'integer', None"),
        (lambda: qjax.linen.advance(3), "`variables` must be those of the module, .* got int"),
        (lambda: qjax.linen.labels(None), "`variables` must be those of the module, .* got NoneType"),
        (lambda: qjax.nnx.advance(3), "`model` of qjax.nnx.advance must be from qjax.nnx.fake_quant, got int"),
        *((lambda methods=methods: qjax.nnx.fake_quant(nnx.Linear(8, 4, rngs=nnx.Rngs(0)), POLICY, methods), "`methods` ")
          for methods in ("__call__", (3,), ())),
    ],
}  # fmt: skip


CASES = [pytest.param(*case, id=f"{room} {i}") for room, cases in ROOMS.items() for i, case in enumerate(cases)]


@pytest.mark.parametrize(("call", "says"), CASES)
def test_nonsense_is_refused_by_the_arguments_name(call, says):
    with pytest.raises((TypeError, ValueError), match=says):
        call()


def test_numbers_of_numpy_are_numbers():
    moved = qjax.schedule(np.int64(3), np.int32(2), np.int8(4), bits=((np.int32(0), np.int8(8)), (5, np.uint8(4))))
    assert moved == qjax.schedule(3, 2, 4, bits=((0, 8), (5, 4))) and repr(moved) == repr(qjax.schedule(3, 2, 4, bits=((0, 8), (5, 4))))
    same = [(qjax.pact(np.float32(2)), qjax.pact(2.0)), (qjax.ste(slope=np.float64(0.5)), qjax.ste(slope=0.5)),
            (qjax.moving_range(np.float32(0.5)), qjax.moving_range(0.5)), (qjax.lora(np.int64(4)), qjax.lora(4)),
            (Blocks(np.int64(64), np.int64(0)), Blocks(64, 0))]  # fmt: skip
    assert all(repr(a) == repr(b) and hash(a) == hash(b) for a, b in same)
    qjax.host_offload(optax.adam(np.float32(1e-3)), np.int64(5))
    qjax.adam8bit(np.float32(1e-3), np.float32(0.9), eps=np.float64(1e-8), weight_decay=0.1, mask={"w": np.bool_(True)})
    assert rounding_penalty(ROUNDING, np.int64(5), np.float32(0.1)).shape == ()
    for dtype in ("bfloat16", jnp.bfloat16, jnp.dtype("bfloat16")):
        assert TUNED.attach(ADAPTERS, BASE.params, X, dtype=dtype)["a"].adapter.left.dtype == jnp.bfloat16
