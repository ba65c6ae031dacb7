"""What is handed to training in the place of something else is refused by its name, with what to give; what has no effect, too."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from flax.core import freeze

import qjax
from qjax import Policy, Rule
from qjax.ptq.low_rank import low_rank
from tests.program.cases import normal

KEY, STATIC, DYNAMIC = jax.random.key(0), qjax.static(qjax.int8()), qjax.dynamic(qjax.int8())
PARAMS, X = {"a": normal(8, 8), "b": normal(8, 4)}, normal(5, 8)
NAN = {**PARAMS, "a": PARAMS["a"].at[0, 0].set(jnp.nan)}


def fn(p, x):
    return jnp.tanh(x.reshape(len(x), -1) @ p["a"]) @ p["b"]


class Normed(nn.Module):
    @nn.compact
    def __call__(self, x, train=False):
        return nn.BatchNorm(use_running_average=not train, name="norm")(nn.Dense(8, name="dense")(x))


POLICY = Policy([Rule("*", weight=qjax.int4(), activation=STATIC, train=qjax.lsq())])
FQ = qjax.fake_quant(fn, POLICY)
QUANT = FQ.init(KEY, PARAMS, X)
BOTH = {"params": PARAMS, "quant": QUANT}
THIRDS = qjax.int4(group_size=3)
INT4 = Policy([Rule("*", weight=qjax.int4())])
RESULT = qjax.quantize(fn, PARAMS, INT4, [X])
TUNED = qjax.qlora(fn, Policy([Rule("*", weight=qjax.int4(), train=qjax.lora(2))]))
ADAPTERS = TUNED.init(KEY, RESULT.params, X)
LOST = jax.tree.map(lambda a: a * jnp.nan, ADAPTERS)

NORMED = Normed()
PLAIN = NORMED.init(KEY, X)
LINEN = qjax.linen.fake_quant(NORMED, POLICY)
VARIABLES = qjax.linen.begin(LINEN, KEY, PLAIN, X)
BARE, STATELESS = VARIABLES["params"], {name: tree for name, tree in VARIABLES.items() if name != "batch_stats"}

STEPS = Policy([Rule("*", weight=qjax.int4(), train=qjax.qat(qjax.lsq(), schedule=qjax.schedule(weights=3)))])
LINEAR = nnx.Linear(8, 4, rngs=nnx.Rngs(0))
NNX = qjax.nnx.fake_quant(LINEAR, STEPS)


def with_schedule(weight=None, activation=None, act=None, **when):
    return Rule("*", weight=qjax.int4(), activation=act,
                train=qjax.qat(weight or qjax.ste(), activation or qjax.ste(), schedule=qjax.schedule(**when)))  # fmt: skip


def each(verbs, says):
    return [(verb, says) for verb in verbs]


PLACED = qjax.fake_quant(lambda p, x, mask=None: fn(p, x), POLICY)
FOLLOWS = qjax.fake_quant(fn, Policy([Rule("*", weight=qjax.int4(), activation=STATIC, train=qjax.moving_range())]))

ROOMS = {
    "places": [
        *each((lambda: FQ(PARAMS, QUANT, X), lambda: FQ(PARAMS, QUANT, X, quant=QUANT), lambda: FQ.report(PARAMS, QUANT, X),
               lambda: FQ.leaves(PARAMS, QUANT, X), lambda: FQ.tracked(PARAMS, QUANT, X), lambda: qjax.convert(FQ, PARAMS, QUANT, X),
               lambda: FQ(PARAMS, freeze(QUANT), X)),
              r"`quant` stands as argument 1 behind `params`, where the arguments of `fn` are: .* \(params, \*args, quant=quant\)"),
        *each((lambda: FQ(PARAMS, X, QUANT), lambda: PLACED(PARAMS, X, QUANT), lambda: FQ.init(KEY, PARAMS, X, QUANT)),
              "`quant` stands as argument 2 behind `params`"),
        *each((lambda: FQ(QUANT, PARAMS, X), lambda: FQ.calibrate(QUANT, QUANT, [X])), "`quant` stands in the place of `params`"),
        *each((lambda: FQ.report(PARAMS, X, quant=QUANT), lambda: FQ.init(KEY, PARAMS, X, quant=QUANT)),
              "`quant` is not read here: .* the policy says, .*; leave `quant` out"),
        *each((lambda: FQ(X, PARAMS, quant=QUANT), lambda: FQ.init(KEY, X, PARAMS), lambda: FQ.report(X, PARAMS),
               lambda: qjax.convert(FQ, X, PARAMS, quant=QUANT)),
              r"`params` is an array of shape \(5, 8\), .* a tree of 'a', 'b': the parameters come first, .* \(params, \*args\)"),
        (lambda: FQ(PARAMS, quant=QUANT), "`args` are not those of the function: missing a required argument: 'x'"),
        (lambda: FOLLOWS.tracked(PARAMS, X), r"`quant` is missing: .* pass quant=fq.init\(key, params"),
        (lambda: qjax.convert(LINEN, VARIABLES, X), r"got FakeQuantModule: a Linen module is packed by qjax.linen.convert\("),
        (lambda: qjax.convert(NNX, X), r"got FakeQuantLinear: an NNX module is packed by qjax.nnx.convert\(model, \*args\)"),
        (lambda: qjax.convert(TUNED, RESULT.params, X), "got QLoRA: adapters are ended by its .attach, .merge or .requantize"),
    ],
    "states": [
        *each((lambda: FQ.advance(BOTH), lambda: FQ.labels(BOTH), lambda: FQ(PARAMS, X, quant=BOTH),
               lambda: qjax.convert(FQ, PARAMS, X, quant=BOTH)), "got a tree of 'params', 'quant': give what is under 'quant'"),
        *each((lambda: FQ.advance(PARAMS), lambda: FQ.labels(PARAMS), lambda: FQ.calibrate(PARAMS, QUANT, [X])),
              "`quant` must be a state as fq.init gives it, .* got a tree of 'a', 'b'"),
        *each((lambda: FQ.advance(None), lambda: FQ.labels(None), lambda: FQ.calibrate(None, PARAMS, [X])), "`quant` must .* NoneType"),
        *each((lambda: FQ.advance(FQ.labels(QUANT)), lambda: FQ(PARAMS, X, quant=FQ.labels(QUANT))), "got labels .* give the state itself"),
        (lambda: FQ.advance({"weights": QUANT["weights"]}), "`quant` .* lacks its entry 'policy': call init again"),
        *each((lambda: qjax.linen.advance(VARIABLES["quant"]["state"]), lambda: qjax.linen.labels(VARIABLES["quant"]["state"])),
              "`variables` must be those of the module, .* got one with 'weights'"),
        *each((lambda: qjax.linen.labels(BARE), lambda: qjax.linen.advance(BARE)), "`variables` .* bare parameters as {'params': ...}"),
        *each((lambda: qjax.linen.labels({}), lambda: qjax.linen.advance({})), "`variables` .* got an empty one"),
        *each((lambda: qjax.linen.labels(NORMED), lambda: qjax.linen.advance(NORMED)), "`variables` must be .* got Normed"),
        *each((lambda: qjax.linen.advance(PLAIN), lambda: qjax.linen.advance(freeze(PLAIN))),
              "`variables` have no collection 'quant' whose step goes on, got .*: give all that qjax.linen.begin gave; a policy without"),
        (lambda: qjax.nnx.advance(LINEAR), r"`model` of qjax.nnx.advance must be from qjax.nnx.fake_quant, got Linear"),
        (lambda: qjax.nnx.advance(NNX), r"`model` has no state of quantizers: .* write model = qjax.nnx.begin\(model, key"),
    ],
    "schedules": [
        (lambda: with_schedule(qjax.lsq(), weights=20, freeze=10), "`freeze`=10 .* comes before `weights`=20.*freeze at a later"),
        (lambda: with_schedule(qjax.ste(), qjax.lsq(), STATIC, activations=20, freeze=10), "`freeze`=10 .* before `activations`=20"),
        (lambda: with_schedule(qjax.lsq(), activations=10), "`activations`=10 .* changes nothing, .* no `activation`: give it"),
        (lambda: with_schedule(activation_bits=((0, 8), (5, 4))), r"`activation_bits`=\(\(0, 8\), \(5, 4\)\) .* changes nothing"),
        *each((lambda: Rule("*", weight=qjax.int4(), train=qjax.qat(qjax.lsq(), qjax.lsq())),
               lambda: Rule("*", weight=qjax.int4(), train=qjax.qat(activation=qjax.ste(rounding="stochastic")))),
              "`activation` .* is for static activations, and the `activation` of the rule is None: give the rule one, .*, or leave"),
        *each((lambda: with_schedule(qjax.lsq(), qjax.lsq(), DYNAMIC), lambda: with_schedule(activation=qjax.moving_range(), act=DYNAMIC)),
              r"`activation` .* the `activation` of the rule is dynamic\(int8"),
        (lambda: qjax.qat(qjax.pact()), "`weight` must be .* got Clipped.* one of activations: give it as `activation`"),
        (lambda: qjax.qat(activation=qjax.adaround()), "`activation` must be .* got AdaRound.* one of weights: give it as `weight`"),
    ],
    "batches": [
        (lambda: FQ.calibrate(QUANT, PARAMS, [X, X[:0]]), "`batches` entry 1 holds no rows, .* leave it out"),
        (lambda: FQ.calibrate(QUANT, PARAMS, [jax.ShapeDtypeStruct((5, 8), jnp.float32)]), "`batches` entry 0 holds shapes"),
        (lambda: FQ.calibrate(QUANT, PARAMS, []), "`batches` is empty: give at least one batch$"),
        (lambda: FQ.calibrate(QUANT, PARAMS, X), r"`batches` must be a list of batches, got .*: write batches=\[batch\]"),
    ],
    "inputs": [
        *each((lambda: FQ.init(KEY, PARAMS), lambda: FQ.from_packed(KEY, RESULT.params, params=PARAMS),
               lambda: qjax.convert(FQ, PARAMS, quant=QUANT), lambda: TUNED.init(KEY, RESULT.params),
               lambda: TUNED.attach(ADAPTERS, RESULT.params), lambda: TUNED.merge(ADAPTERS, RESULT.params),
               lambda: qjax.linen.begin(LINEN, KEY, PLAIN), lambda: qjax.linen.convert(LINEN, VARIABLES)),
              "`args` are not those of the function: missing a required argument: 'x'; give them"),
        *each((lambda: qjax.nnx.begin(NNX, KEY), lambda: qjax.nnx.convert(NNX)), "`args` .* missing a required argument: 'inputs'"),
        (lambda: FQ.init(KEY, PARAMS, X, X), "`args` are not those of the function: too many positional arguments"),
        (lambda: FQ.init(KEY, PARAMS, X, mask=X), "`args` are not those of the function: got an unexpected keyword argument 'mask'"),
        *each((lambda: qjax.fake_quant(fn, Policy([Rule("*", weight=THIRDS, train=qjax.lsq())])).init(KEY, PARAMS, X),
               lambda: qjax.fake_quant(fn, Policy([Rule("*", weight=THIRDS)]))(PARAMS, X)),
              "`group_size`=3 does not divide the 8 contracted values of `a`, nor those of 1 more of 8: take 4"),
    ],
    "modules": [
        *each((lambda: qjax.linen.begin(LINEN, KEY, BARE, X), lambda: qjax.linen.convert(LINEN, BARE, X)),
              "`variables` must be those of the module, .* got one with 'dense', 'norm': .* {'params': ...}"),
        *each((lambda: qjax.linen.begin(LINEN, KEY, PLAIN, X, train=True), lambda: qjax.linen.convert(LINEN, VARIABLES, X, train=True),
               lambda: qjax.linen.quantize(NORMED, PLAIN, INT4, [X], train=True)), "in evaluation, .* \"mean\" in .* with train=False"),
        *each((lambda: qjax.linen.begin(LINEN, KEY, STATELESS, X), lambda: qjax.linen.convert(LINEN, STATELESS, X),
               lambda: qjax.linen.quantize(NORMED, {"params": BARE}, INT4, [X])), "`variables` .* lack .* \"batch_stats\" .* Give all"),
        *each((lambda: LINEN.apply(PLAIN, X), lambda: qjax.linen.convert(LINEN, PLAIN, X)),
              r"`variables` have no state of quantizers: .* variables = qjax.linen.begin\(model, key, variables"),
        *each((lambda: NNX(X), lambda: qjax.nnx.convert(NNX, X)), r"`model` has no state of quantizers: .* model = qjax.nnx.begin\("),
        (lambda: FQ(PARAMS, X), r"`quant` is missing: .* pass quant=fq.init\(key, params"),
        (lambda: qjax.linen.fake_quant(NORMED.apply, POLICY), "`model` must be a flax.linen.Module, got method; give the module itself"),
        (lambda: qjax.nnx.fake_quant(LINEAR.__call__, POLICY), "`model` must be a flax.nnx.Module, got method; give the module itself"),
        *each((lambda: qjax.linen.fake_quant(POLICY, NORMED), lambda: qjax.nnx.fake_quant(POLICY, LINEAR)), "in front of the policy"),
        (lambda: qjax.linen.begin(LINEN, PLAIN, KEY, X), "`key` must be a key of jax.random, .* got dict"),
        (lambda: qjax.linen.begin(KEY, LINEN, PLAIN, X), r"`model` of qjax.linen.begin .* the order is \(model, key, variables, \*args\)"),
        (lambda: qjax.linen.convert(VARIABLES, LINEN, X), r"`model` of qjax.linen.convert .* the order is \(model, variables, \*args\)"),
        (lambda: qjax.nnx.begin(KEY, NNX, X), r"`model` of qjax.nnx.begin .* call it as begin\(model, key, \*args\)"),
        (lambda: qjax.nnx.begin(NNX, X), "`key` must be a key of jax.random"),
        *each((lambda: qjax.fake_quant(FQ, POLICY), lambda: qjax.linen.fake_quant(LINEN, POLICY), lambda: qjax.nnx.fake_quant(NNX, POLICY)),
              "is fake-quantized already: give the float one"),
        (lambda: qjax.nnx.fake_quant(LINEAR, POLICY, "__call__"), r"`methods` must be a tuple of names .* got '__call__'"),
    ],
    "results": [
        (lambda: qjax.convert(FQ, RESULT.params, X, quant=QUANT), r"`params` leaf 'a' is packed or a shape, QTensor\(int4"),
        (lambda: qjax.convert(FQ, NAN, X, quant=QUANT), "`params` leaf 'a' holds 1 NaN and 0 infinite values of 64: training ran away"),
        *each((lambda: TUNED.attach(LOST, RESULT.params, X), lambda: TUNED.merge(LOST, RESULT.params, X),
               lambda: TUNED.requantize(LOST, RESULT.params, [X])), "`adapters` 'a' 'a' holds 16 NaN .* training ran away: .* lower rate"),
        *each((lambda: TUNED.init(KEY, RESULT, X), lambda: TUNED(ADAPTERS, RESULT, X), lambda: TUNED.plan(RESULT, X),
               lambda: TUNED.attach(ADAPTERS, RESULT, X)), "`base` is a Result, .* result.params"),
        (lambda: qjax.qlora(fn, POLICY).init(KEY, RESULT.params, X), r"'\*' trains through rounding by LearnedStep.*fake_quant.*lora"),
        (lambda: qjax.qlora(fn, Policy([Rule("a", train=qjax.lora(2)), Rule("b", weight=qjax.int4(), train=qjax.lsq())])).plan(PARAMS, X),
         "`policy` trains 'b' through rounding by LearnedStep.* the base is frozen: leave `train` out of the rule for 'b'"),
    ],
}  # fmt: skip

CASES = [pytest.param(*case, id=f"{room} {i}") for room, cases in ROOMS.items() for i, case in enumerate(cases)]


@pytest.mark.parametrize(("call", "says"), CASES)
def test_it_is_refused_with_what_to_give(call, says):
    with pytest.raises((TypeError, ValueError), match=says):
        call()


def test_what_is_near_it_passes():
    """A state without numbers, variables without parameters, and schedules of which each part has something to do."""
    assert FQ.advance({}) == {} and FQ.labels({}) == {}
    rest = qjax.linen.advance({"quant": VARIABLES["quant"]})
    assert jax.tree.structure(rest) == jax.tree.structure({"quant": VARIABLES["quant"]})
    qjax.nnx.advance(qjax.nnx.fake_quant(LINEAR, INT4))
    with_schedule(qjax.lsq(), weights=20, freeze=20)
    with_schedule(qjax.lsq(), weights=0, freeze=0)
    with_schedule(qjax.ste(), qjax.moving_range(), STATIC, weights=20, activations=20, freeze=10)
    with_schedule(qjax.lsq(), act=DYNAMIC, activations=10)
    Rule("*", weight=qjax.int4(), train=qjax.lsq())  # for what it can train
    assert qjax.fake_quant(lambda w, x: x["x"] @ w, INT4)(PARAMS["a"], {"x": X}).shape == X.shape  # parameters may be an array
    assert TUNED.attach(jax.jit(lambda a: a)(ADAPTERS), RESULT.params, X)["a"].adapter is not None
    jax.jit(lambda a: TUNED.merge(a, RESULT.params, X))(LOST)  # what is traced is not looked into


def test_parameters_and_batches_may_have_parts_that_are_called_as_those_of_a_state():
    """The network of an actor is a "policy", with "weights"; only a fingerprint below it makes it a state."""
    actor = {"policy": PARAMS, "weights": {"scale": jnp.float32(2)}}
    fq = qjax.fake_quant(lambda p, x: fn(p["policy"], x) * p["weights"]["scale"], Policy([Rule("policy/*", weight=qjax.int4())]))
    np.testing.assert_array_equal(fq(actor, X), 2 * qjax.fake_quant(fn, INT4)(PARAMS, X))
    batch = {"policy": {"x": X}, "step": jnp.float32(0)}
    np.testing.assert_array_equal(
        qjax.fake_quant(lambda p, b: fn(p, b["policy"]["x"]), INT4)(PARAMS, batch), qjax.fake_quant(fn, INT4)(PARAMS, X)
    )


def test_a_function_may_take_less_than_what_it_wraps():
    @functools.wraps(fn)
    def wrapped(p):
        return fn(p, X)

    fq = qjax.fake_quant(wrapped, POLICY)
    quant = fq.init(KEY, PARAMS)
    assert qjax.convert(fq, PARAMS, quant=quant).params["a"].shape == (8, 8)


def test_whole_numbers_of_numpy_make_the_same_loftq():
    assert repr(qjax.loftq(np.int64(4), np.int32(3))) == repr(qjax.loftq(4, 3))
    assert qjax.loftq(4, 1) == low_rank(4, None, "svd", "float32")


def test_an_activation_of_what_is_only_looked_up_is_reported():
    params = {"table": normal(7, 8), "w": normal(8, 4)}
    fq = qjax.fake_quant(lambda p, x: p["table"][x] @ p["w"], POLICY)
    says = 'the activation static(int8(per="tensor")) of its rule has nothing to round: it is only looked up'
    x = jnp.arange(5)
    quant = fq.init(KEY, params, x)
    assert list(quant["activations"]) == ["w"]
    for report in (fq.report(params, x), qjax.convert(fq, params, x, quant=quant).report):
        assert {row.path: says in row.notes for row in report.rows} == {"table": True, "w": False}
