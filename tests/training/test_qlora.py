"""Adapters beside frozen, packed parameters: what they compute, what their gradients are, and that the base stays packed."""

import dataclasses
import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import qjax
from qjax import Policy, Rule
from qjax.core import QTensor
from tests.program.cases import CASES, normal

NF4 = qjax.nf4(group_size=8, double_quant=True)
BY_NAME = {case.name: case for case in CASES}


def shaken(tree, by=0.1):
    """Adapters that change something."""
    return jax.tree.map(lambda a: a + by * jnp.sin(1.0 + jnp.arange(a.size, dtype=jnp.float32).reshape(a.shape)), tree)


def begun(fn, params, inputs, rules, by=0.1):
    """(the function, its packed base, shaken adapters)."""
    policy = Policy(rules)
    base = qjax.quantize(fn, params, policy, calibration=[inputs]).params
    tuned = qjax.qlora(fn, policy)
    return tuned, base, shaken(tuned.init(jax.random.key(0), base, *inputs), by)


def squares(out):
    return sum(jnp.sum(jnp.square(y.astype(jnp.float32))) for y in jax.tree.leaves(out))


PROGRAMS = {  # case: (what it is packed to, DoRA, rules in front)
    "scan_remat": (qjax.int4(group_size=4), True, ()),
    "grouped_attention_bf16": (qjax.int8(), False, ()),
    "tied_embedding": (qjax.int8(), False, ()),
    "experts": (None, True, ()),
    "conv": (qjax.int8(), True, (Rule("depthwise", weight=qjax.int8()),)),
    "loop_index": (None, False, ()),
    "fused_qkv": (qjax.nf4(group_size=8), True, ()),
}


MORE = [pytest.param(name, marks=() if name in ("scan_remat", "experts") else pytest.mark.slow) for name in PROGRAMS]


@pytest.mark.parametrize("name", MORE)
def test_it_computes_and_differentiates_what_the_merged_parameters_do(name):
    """W + s B A in float, put into the float function, is the independent way; gradients go through that sum by jax alone."""
    case, (spec, dora, front) = BY_NAME[name], PROGRAMS[name]
    train = qjax.lora(2, alpha=3, dora=dora)
    tuned, base, adapters = begun(case.fn, case.params, case.inputs, [*front, Rule("*", weight=spec, train=train)])

    def both(adapters):
        got = jax.value_and_grad(lambda a: squares(tuned(a, base, *case.inputs)))(adapters)
        want = jax.value_and_grad(lambda a: squares(case.fn(tuned.merge(a, base, *case.inputs), *case.inputs)))(adapters)
        return got, want

    (y, grads), (wanted, slopes) = jax.jit(both)(adapters)
    tolerance = 1e-4 if "bf16" not in name else 8e-2  # there the merged weight is rounded once more, in front of a steep softmax
    np.testing.assert_allclose(y, wanted, rtol=tolerance)
    if dora:  # the norms are held fixed in its gradient, so only that of m is that of the merged weight
        grads, slopes = ({path: parts["m"] for path, parts in tree.items()} for tree in (grads, slopes))
    for got, want in zip(jax.tree.leaves(grads), jax.tree.leaves(slopes), strict=True):
        assert float(jnp.linalg.norm(got - want)) < tolerance * float(jnp.linalg.norm(want))


def linear(p, x):
    return jnp.tanh(x @ p["w"]) @ p["v"]


WEIGHTS, X = {"w": normal(16, 16), "v": normal(16, 6, seed=1)}, normal(5, 16, seed=2)


def test_by_hand_lora_rslora_and_dora_are_the_papers_formulas():
    """A float64 transcription, with the gradient of DoRA's equation 11 for B by hand."""
    for train in (qjax.lora(3, alpha=6), qjax.lora(3, alpha=6, rank_stabilized=True), qjax.lora(3, alpha=6, dora=True)):
        fn = lambda p, x: x @ p["w"]  # noqa: E731
        tuned, base, adapters = begun(fn, {"w": WEIGHTS["w"]}, (X,), [Rule("*", weight=NF4, train=train)])
        parts = {name: np.asarray(a, np.float64) for name, a in adapters["w"].items()}
        w, a, b, x = np.asarray(base["w"].dequantize(), np.float64).T, parts["a"][0], parts["b"], np.asarray(X, np.float64)
        s = 6 / (3**0.5 if train.rank_stabilized else 3)
        v = w + s * b @ a
        g = parts["m"] / np.linalg.norm(v, axis=1) if train.dora else np.ones(16)
        y, pull = jax.vjp(jax.jit(lambda a, tuned=tuned, base=base: tuned(a, base, X)), adapters)
        np.testing.assert_allclose(y, x @ (g[:, None] * v).T, rtol=1e-4, atol=1e-4)
        t = np.ones((5, 16))
        grads = pull(jnp.ones_like(y))[0]["w"]
        np.testing.assert_allclose(grads["b"], s * (t * g).T @ (x @ a.T), rtol=1e-4, atol=1e-4)
        np.testing.assert_allclose(grads["a"][0], s * ((t * g) @ b).T @ x, rtol=1e-4, atol=1e-4)
        if train.dora:
            np.testing.assert_allclose(grads["m"], (t * (x @ v.T)).sum(0) / np.linalg.norm(v, axis=1), rtol=1e-4, atol=1e-4)


def test_at_the_start_nothing_is_changed_and_dropout_is_a_function_of_its_key():
    rules = [Rule("*", weight=NF4, train=qjax.lora(2, dropout=0.5, dora=True))]
    policy = Policy(rules)
    base = qjax.quantize(linear, WEIGHTS, policy, calibration=[X]).params
    tuned = qjax.qlora(linear, policy)
    adapters = tuned.init(jax.random.key(0), base, X)
    call = jax.jit(tuned)
    np.testing.assert_allclose(call(adapters, base, X), qjax.quantized(linear)(base, X), rtol=1e-4, atol=1e-5)
    adapters, key = shaken(adapters), jax.random.key(3)
    one, two, none = call(adapters, base, X, dropout_key=key), call(adapters, base, X, dropout_key=key), call(adapters, base, X)
    other = call(adapters, base, X, dropout_key=jax.random.key(4))
    chex.assert_trees_all_equal(one, two)
    assert float(jnp.abs(one - other).max()) > 1e-3 and float(jnp.abs(one - none).max()) > 1e-3
    # Its mean is what there is without dropout, where that is linear.
    just = qjax.qlora(lambda p, x: x @ p["w"], Policy(rules))
    some, w = {"w": adapters["w"]}, {"w": base["w"]}
    wanted = X @ just.merge(some, w, X)["w"]
    mean = jax.jit(lambda keys: jax.vmap(lambda k: just(some, w, X, dropout_key=k))(keys).mean(0))(jax.random.split(key, 4000))
    assert float(jnp.abs(mean - wanted).max()) < 0.05 * float(jnp.abs(wanted).max())


def test_dropout_in_a_scan_differs_from_layer_to_layer():
    case = BY_NAME["scan_remat"]
    params = {"layers": {"kernel": jnp.zeros((3, 8, 8)), "bias": jnp.zeros((3, 8))}}
    tuned, base, adapters = begun(case.fn, params, case.inputs, [Rule("*", weight=qjax.bf16(), train=qjax.lora(8, dropout=0.5))], 0.0)
    # y = drop(x): A = B = 1, and x is kept small, so that tanh is linear.
    adapters = {"layers/kernel": {"a": jnp.broadcast_to(jnp.eye(8), (3, 1, 8, 8)), "b": jnp.broadcast_to(jnp.eye(8), (3, 8, 8))}}
    out, _ = jax.jit(tuned)(adapters, base, jnp.full((64, 8), 1e-3), dropout_key=jax.random.key(1))
    assert 0.05 < float((out != 0).mean()) < 0.22  # 1/8 were kept by three masks; the same mask thrice would keep half


def test_a_few_steps_train_the_adapters_and_leave_the_base_alone():
    tuned, base, adapters = begun(linear, WEIGHTS, (X,), [Rule("*", weight=NF4, train=qjax.lora(4))], 0.0)
    optimizer, before = optax.adam(3e-2), jax.tree.map(jnp.copy, base)
    qjax.check_trainable(adapters)

    @jax.jit
    def run(adapters, base):
        def step(carry, _):
            loss, grads = jax.value_and_grad(lambda a: jnp.square(tuned(a, base, X) - 1).mean())(carry[0])
            updates, state = optimizer.update(grads, carry[1])
            return (optax.apply_updates(carry[0], updates), state), loss

        return jax.lax.scan(step, (adapters, optimizer.init(adapters)), length=60)

    (adapters, _), losses = run(adapters, base)
    assert float(losses[-1]) < 0.1 * float(losses[0])
    chex.assert_trees_all_equal(base, before)
    packed = tuned.attach(adapters, base, X)
    got = jax.jit(tuned)(adapters, base, X)
    np.testing.assert_allclose(jax.jit(qjax.quantized(linear))(packed, X), got, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(linear(tuned.merge(adapters, base, X), X), got, rtol=1e-3, atol=1e-4)
    result = tuned.requantize(adapters, base, [X])
    row = next(row for row in result.report.rows if row.path == "w")
    assert row.error is not None and 0 < row.error < 0.02 and any("as far as its adapter did" in note for note in row.notes)


def test_loftq_begins_nearer_and_its_parts_are_what_trains():
    train = qjax.lora(4, alpha=8)
    policy = Policy([Rule("*", weight=qjax.nf4(group_size=8), method=qjax.loftq(4), train=train)])
    base = qjax.quantize(linear, WEIGHTS, policy, calibration=[X]).params
    tuned = qjax.qlora(linear, policy)
    adapters = tuned.init(jax.random.key(0), base, X)
    np.testing.assert_allclose(jax.jit(tuned)(adapters, base, X), qjax.quantized(linear)(base, X), rtol=1e-4, atol=1e-5)

    def error(method):
        rules = Policy([Rule("*", weight=qjax.nf4(group_size=8), method=method)])
        return {row.path: float(row.error or 0) for row in qjax.quantize(linear, WEIGHTS, rules, calibration=[X]).report.rows}

    once, often, plain = error(qjax.loftq(4, iterations=1)), error(qjax.loftq(4)), error(None)
    assert all(often[path] <= once[path] < plain[path] for path in plain) and sum(often.values()) < sum(once.values())
    with pytest.raises(ValueError, match="`rank`=2 of the adapters of 'v' is not that of the low-rank part"):
        other = Policy([dataclasses.replace(policy.rules[0], train=qjax.lora(2))])
        qjax.qlora(linear, other).init(jax.random.key(0), base, X)


LORA = Rule("*", weight=NF4, train=qjax.lora(2))


@pytest.mark.parametrize(
    ("rules", "error"),
    [
        ([Rule("*", weight=NF4)], "no rule whose adapters reach a site of the program: write a rule such as Rule\\('v'"),
        ([Rule("*nowhere*", train=qjax.lora(2)), Rule("*", weight=NF4)], "`pattern` '\\*nowhere\\*' matches no parameter"),
        ([Rule("b", train=qjax.lora(2)), Rule("*", weight=NF4)], "matches only parameters that cannot be quantized, such as 'b'"),
        ([Rule("*", train=qjax.lora(7))], "`rank`=7 is more than a matrix of 6 outputs and 16 inputs has, those of 'v'"),
    ],
)
def test_adapters_that_match_no_site_are_named(rules, error):
    params = {**WEIGHTS, "b": jnp.zeros(6)}
    with pytest.raises(ValueError, match=error):
        qjax.qlora(lambda p, x: linear(p, x) + p["b"], Policy(rules)).init(jax.random.key(0), params, X)


def test_what_cannot_be_trained_is_refused():
    tuned, base, adapters = begun(linear, WEIGHTS, (X,), [LORA])
    with pytest.raises(TypeError, match="packed base is the second argument and never trained"):
        tuned(base, adapters, X)
    with pytest.raises(TypeError, match=r"`params` leaf 'w' is packed, which has no gradient .*: train .* the adapters"):
        qjax.check_trainable({"w": base["w"]})
    with pytest.raises(TypeError, match="uint8"):  # jax's own: codes have no gradient
        jax.grad(lambda base: tuned(adapters, base, X).sum())(base)
    with pytest.raises(TypeError, match="'a' is int32, not floating"):
        tuned({**adapters, "w": {**adapters["w"], "a": adapters["w"]["a"].astype(jnp.int32)}}, base, X)
    with pytest.raises(ValueError, match="`adapters` lacks 'v'"):
        tuned({"w": adapters["w"]}, base, X)
    with pytest.raises(ValueError, match="the policy wants"):
        qjax.qlora(linear, Policy([dataclasses.replace(LORA, train=qjax.lora(3))]))(adapters, base, X)
    with pytest.raises(ValueError, match="`base` leaf 'v' is float, and its rule says nf4"):
        tuned(adapters, WEIGHTS, X)
    with pytest.raises(ValueError, match=r"use qjax\.qlora"):
        qjax.fake_quant(linear, Policy([LORA]))(WEIGHTS, X)
    dora = Policy([dataclasses.replace(LORA, train=qjax.lora(2, dora=True))])
    with pytest.raises(ValueError, match="has magnitudes"):
        qjax.qlora(linear, dora).attach(qjax.qlora(linear, dora).init(jax.random.key(0), base, X), base, X)
    with pytest.raises(ValueError, match=r"`base` leaf 'v' is packed to nf4.*, and its rule says int8"):
        qjax.qlora(linear, Policy([dataclasses.replace(LORA, weight=qjax.int8())]))(adapters, base, X)
    with pytest.raises(TypeError, match=r"`key` must be a key of jax.random, .* got int"):
        tuned.init(0, base, X)
    with pytest.raises(TypeError, match=r"`dropout_key` must be a key of jax.random, .* got int"):
        tuned(adapters, base, X, dropout_key=0)
    with pytest.raises(TypeError, match="`calibration` must be a list of batches"):
        tuned.requantize(adapters, base, X)
    wrong: dict
    for wrong in ({"rank": 0}, {"alpha": -1.0}, {"dropout": 1.0}, {"init": "zeros"}):
        with pytest.raises(ValueError, match=f"`{next(iter(wrong))}`"):
            qjax.lora(**wrong)
    for wrong in ({"dora": 1}, {"rank_stabilized": "yes"}, {"alpha": "2"}, {"dropout": "0"}):
        with pytest.raises(TypeError, match=f"`{next(iter(wrong))}` must be "):
            qjax.lora(**wrong)
    case = BY_NAME["conv"]
    with pytest.raises(ValueError, match="'depthwise' cannot have an adapter: the groups of its convolution"):
        qjax.qlora(case.fn, Policy([Rule("*", train=qjax.lora(2))])).init(jax.random.key(0), case.params, *case.inputs)


def test_attach_keeps_packed_weights_and_merges_into_float_ones():
    tuned, base, adapters = begun(linear, WEIGHTS, (X,), [Rule("v", train=qjax.lora(2)), LORA])
    served = tuned.attach(adapters, base, X)
    assert isinstance(served["w"], QTensor) and not isinstance(served["v"], QTensor)
    np.testing.assert_allclose(qjax.quantized(linear)(served, X), tuned(adapters, base, X), rtol=1e-5, atol=1e-5)


def test_a_base_laid_out_for_kernels_is_still_that_of_its_policy():
    """Laying out changes how scales are stored, which is no other packing."""
    from qjax.runtime.layouts import with_float_scales

    tuned, base, adapters = begun(linear, WEIGHTS, (X,), [LORA])
    other = jax.tree.map(with_float_scales, base, is_leaf=lambda w: isinstance(w, QTensor))
    assert other["w"].spec != base["w"].spec
    np.testing.assert_allclose(tuned(adapters, other, X), tuned(adapters, base, X), rtol=1e-6)


A8 = qjax.dynamic(qjax.int8())
BASES = {  # the rules of the base, those of the function, what is said
    "float, and packed": ([Rule("w", weight=NF4)], [Rule("w", weight=NF4, train=qjax.lora(2)), Rule("*", weight=NF4)],
                          "leaf 'v' is float, and its rule says nf4"),
    "packed, and float": ([LORA], [Rule("w", weight=NF4, train=qjax.lora(2))], "leaf 'v' is packed to nf4.*, and the policy leaves it"),
    "packed below adapters": ([LORA], [Rule("*", train=qjax.lora(2))], "leaf 'v' is packed to nf4.*, and the policy leaves it float"),
    "bits without adapters": ([LORA], [Rule("w", weight=NF4, train=qjax.lora(2)), Rule("*", weight=qjax.int8())],
                              "leaf 'v' is packed to nf4.*, and its rule says int8"),
    "activations": ([Rule("*", weight=qjax.int8())], [Rule("*", weight=qjax.int8(), activation=A8, train=qjax.lora(2))],
                    "leaf 'v' is packed for activations None, and its rule says dynamic"),
    "static ones": ([Rule("*", weight=qjax.int8(), activation=A8)],
                    [Rule("*", weight=qjax.int8(), activation=qjax.static(qjax.int8()), train=qjax.lora(2))],
                    "leaf 'v' is packed for activations dynamic.*, and its rule says static"),
}  # fmt: skip


@pytest.mark.parametrize("name", BASES)
def test_a_base_of_another_policy_is_refused_while_it_is_traced(name):
    theirs, ours, says = BASES[name]
    base = qjax.quantize(linear, WEIGHTS, Policy(theirs), calibration=[X]).params
    tuned, own, adapters = begun(linear, WEIGHTS, (X,), ours)
    for call in (lambda: jax.jit(tuned)(adapters, base, X), lambda: tuned.init(jax.random.key(0), base, X),
                 lambda: tuned.merge(adapters, base, X), lambda: tuned.attach(adapters, base, X)):  # fmt: skip
        with pytest.raises(ValueError, match=f"`base` {says}"):
            call()
    assert jax.jit(tuned)(adapters, own, X).shape == (5, 6)


@pytest.mark.parametrize("rule", [
    Rule("*", weight=qjax.int8(), activation=A8, method=qjax.llm_int8(), train=qjax.lora(2)),
    Rule("*", weight=qjax.int4(group_size=8), activation=qjax.static(qjax.uint8(), observer=qjax.percentile(99.0)), train=qjax.lora(2)),
    Rule("*", weight=qjax.int8(), activation=qjax.static(qjax.int8()), train=qjax.lora(2)),
], ids=["outliers", "an observer", "static"])  # fmt: skip
def test_a_base_of_the_policy_passes_packed_and_as_shapes(rule):
    case = BY_NAME["scan_remat"]
    for fn, params, x in ((linear, WEIGHTS, X), (case.fn, case.params, *case.inputs)):
        tuned, base, adapters = begun(fn, params, (x,), [rule])
        got, want = jax.eval_shape(lambda: params), jax.eval_shape(lambda base=base: base)  # noqa: B023  # called at once
        got = tuned.base_shapes(got, x)
        if rule.method is None:
            assert jax.tree.structure(got) == jax.tree.structure(want) and jax.tree.leaves(got) == jax.tree.leaves(want)
        assert jax.eval_shape(tuned, adapters, got, x) == jax.eval_shape(tuned, adapters, base, x)


def layers(p, x):
    """Four layers in a scan, bf16."""
    return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w["up"]) @ w["down"], None), x, p)[0]


SHAPES = {"up": jax.ShapeDtypeStruct((4, 256, 768), jnp.bfloat16), "down": jax.ShapeDtypeStruct((4, 768, 256), jnp.bfloat16)}


@functools.cache
def peak(spec, adapters):
    """(bytes of the arguments, of temporaries) of a compiled training step; the rows are few, so that weights are what there is."""
    x = jax.ShapeDtypeStruct((8, 256), jnp.bfloat16)
    optimizer = optax.adam(1e-3)

    def step(trained, state, frozen, x):
        grads = jax.grad(lambda t: squares(layers(t, x) if tuned is None else tuned(t, frozen, x)))(trained)
        updates, state = optimizer.update(grads, state)
        return optax.apply_updates(trained, updates), state

    tuned, trained, frozen = None, SHAPES, None
    if adapters:
        tuned = qjax.qlora(layers, Policy([Rule("*", weight=spec, train=qjax.lora(4))]))
        frozen = tuned.base_shapes(SHAPES, x)
        trained = jax.eval_shape(lambda b, x: tuned.init(jax.random.key(0), b, x), frozen, x)
    lowered = jax.jit(step, donate_argnums=(0, 1)).lower(trained, jax.eval_shape(optimizer.init, trained), frozen, x)
    text, found = str(lowered.as_text()), lowered.compile().memory_analysis()
    assert found is not None
    return text, found.argument_size_in_bytes, found.temp_size_in_bytes


@pytest.mark.slow
def test_the_base_stays_packed_through_a_training_step():
    whole = sum(2 * s.size for s in jax.tree.leaves(SHAPES))  # the base in bf16
    _, full_held, full_temporary = peak(None, False)
    _, lora_held, lora_temporary = peak(None, True)
    text, held, temporary = peak(qjax.nf4(double_quant=True), True)
    adapters = 3 * 4 * sum(s.shape[0] * 4 * (s.shape[1] + s.shape[2]) for s in SHAPES.values())
    assert held < 0.28 * whole + 1.1 * adapters  # 4.13 bits a weight of 16, and the adapters with both moments
    assert lora_held > whole and full_held > 3 * whole
    # At no time is there a float copy of the stack: what is unpacked is one layer, in float32, with what it is unpacked from.
    assert temporary < 0.25 * whole * 4
    assert held + temporary < 0.75 * (lora_held + lora_temporary) < 0.75 * (full_held + full_temporary)
    assert "4x256x768xbf16" not in text and "4x256x768xf32" not in text and "4x768x256xf32" not in text


def test_no_residual_of_the_forward_pass_is_an_unpacked_weight():
    """What jax keeps between forward and backward: codes and activations, nothing of the weight's size in float."""
    params, x = {"w": normal(64, 48), "v": normal(48, 40)}, normal(4, 64)
    tuned, base, adapters = begun(linear, params, (x,), [Rule("*", weight=NF4, train=qjax.lora(2, dora=True, dropout=0.1))], 0.0)
    pull = jax.eval_shape(lambda a, base: jax.vjp(lambda a: tuned(a, base, x, dropout_key=jax.random.key(0)), a)[1], adapters, base)
    kept = [leaf for leaf in jax.tree.leaves(pull) if jnp.issubdtype(leaf.dtype, jnp.floating)]
    assert kept and max(leaf.size for leaf in kept) < 48 * 40


@pytest.mark.slow
def test_modules_by_their_functions_seeds_under_vmap_and_bf16():
    from flax import nnx

    model = nnx.Sequential(nnx.Linear(8, 12, rngs=nnx.Rngs(0), dtype=jnp.bfloat16), nnx.Linear(12, 4, rngs=nnx.Rngs(1)))
    fn, params = qjax.nnx.function(model), nnx.state(model)
    x = normal(3, 8)
    policy = Policy([Rule("*kernel", weight=qjax.nf4(group_size=4), train=qjax.lora(2))])
    base = qjax.quantize(fn, params, policy, calibration=[x]).params
    tuned = qjax.qlora(fn, policy)
    several = jax.vmap(lambda key: tuned.init(key, base, x))(jax.random.split(jax.random.key(0), 2))
    several = jax.tree.map(lambda a: a + 0.1, several)
    together = jax.jit(jax.vmap(lambda a: squares(tuned(a, base, x))))(several)
    call = jax.jit(lambda a: squares(tuned(a, base, x)))
    alone = [call(jax.tree.map(lambda a, i=i: a[i], several)) for i in range(2)]
    np.testing.assert_allclose(together, jnp.stack(alone), rtol=2e-2)
    assert any(isinstance(leaf, QTensor) for leaf in jax.tree.leaves(base, is_leaf=lambda leaf: isinstance(leaf, QTensor)))


def test_a_policy_with_adapters_and_loftq_is_saved_with_the_model(tmp_path):
    rule = Rule("*", weight=qjax.nf4(group_size=8), method=qjax.loftq(2, iterations=2), train=qjax.lora(2, alpha=4, dora=True))
    result = qjax.quantize(linear, WEIGHTS, Policy([rule]), calibration=[X])
    qjax.save(tmp_path / "packed", result)
    back = qjax.load(tmp_path / "packed")
    assert back.policy == result.policy
    chex.assert_trees_all_equal(back.params, result.params)
