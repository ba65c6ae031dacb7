"""Bias correction: after it every layer has the mean that it has in float, in data-flow order; where there is no bias it says so."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import qjax
from tests.graph.programs import batch_norm, conv
from tests.program.cases import normal

FLOAT = qjax.Rule("*bias*", weight=None)
INT4 = qjax.Rule("*", weight=qjax.int4())
STATIC = qjax.Rule("*", weight=qjax.int4(), activation=qjax.static(qjax.int8()))
DYNAMIC = qjax.Rule("*", weight=qjax.int4(), activation=qjax.dynamic(qjax.uint8(), per="tensor"))


def dense(p, x):
    """Both pre-activations are results, so that their means can be looked at."""
    a = x @ p["w1"] + p["b1"]
    return a, jax.nn.relu(a) @ p["w2"] + p["b2"]


def convolutions(p, x):
    """Grouped, without a bias of its own in front of a batch norm, and with one."""
    a = batch_norm(p["bn"], conv(x, p["c1"]))
    b = conv(jax.nn.relu(a), p["c2"], groups=2) + p["b2"]
    return a, b, jax.nn.relu(b).mean((1, 2)) @ p["head"] + p["head_bias"]


def heads(p, x):
    """Several kept axes, transposed in front of the bias; then a reshape."""
    a = jnp.einsum("btm,mhd->bhtd", x, p["q"]) + p["q_bias"][:, None]
    b = jnp.einsum("bhtd,hdm->btm", jax.nn.gelu(a), p["o"])
    return a, b.reshape(-1, 6) + p["o_bias"]


def stacked(p, x):
    """Layers in a scan, rematerialised, behind a residual."""

    def layer(x, w):
        a = x @ w["in"] + w["in_bias"]
        x = x + jax.nn.relu(a) @ w["out"] + w["out_bias"]
        return x, (a, x)

    return lax.scan(jax.checkpoint(layer), x, p)[1]


def experts(p, x):
    """A bias for each expert, looked up by row, and one for a batch of experts."""
    owner = jnp.repeat(jnp.arange(3), jnp.array([8, 0, 16]), total_repeat_length=24)
    a = lax.ragged_dot(x, p["up"], jnp.array([8, 0, 16], jnp.int32)) + p["up_bias"][owner]
    return a[:8], a[8:], jnp.einsum("td,edf->etf", jax.nn.relu(a), p["all"]) + p["all_bias"][:, None]


# A function, its parameters, a batch, and the axes over which the mean of each result is taken.
DENSE = (dense, {"w1": normal(8, 6), "b1": normal(6), "w2": normal(6, 4, seed=1), "b2": normal(4)}, normal(40, 8, seed=2) + 1, ((0,), (0,)))
CONVOLUTIONS = (
    convolutions,
    {
        "c1": normal(3, 3, 3, 4),
        "c2": normal(3, 3, 2, 6, seed=1),
        "b2": normal(6),
        "head": normal(6, 3),
        "head_bias": normal(3),
        "bn": {"mean": normal(4), "var": 1 + normal(4, seed=1) ** 2, "gamma": normal(4, seed=2), "beta": normal(4, seed=3)},
    },
    normal(6, 5, 5, 3, seed=10) + 0.5,
    ((0, 1, 2), (0, 1, 2), (0,)),
)
HEADS = (
    heads,
    {"q": normal(6, 2, 3), "q_bias": normal(2, 3), "o": normal(2, 3, 6, seed=1), "o_bias": normal(6)},
    normal(4, 5, 6) + 1,
    ((0, 2), (0,)),
)
STACKED = (
    stacked,
    {"in": normal(3, 8, 6), "in_bias": normal(3, 6), "out": 0.3 * normal(3, 6, 8), "out_bias": normal(3, 8)},
    normal(40, 8) + 1,
    ((1,), (1,)),
)
EXPERTS = (
    experts,
    {"up": normal(3, 8, 6), "up_bias": normal(3, 6), "all": normal(2, 6, 4), "all_bias": normal(2, 4)},
    normal(24, 8) + 1,
    ((0,), (0,), (1,)),
)
RUNS = [(DENSE, INT4), (DENSE, STATIC), (DENSE, DYNAMIC), (CONVOLUTIONS, STATIC), (HEADS, INT4), (STACKED, STATIC), (EXPERTS, DYNAMIC)]


def off(fn, axes, params, got, batches):
    """The largest difference of a mean from float's, over all the data, for each result."""

    def averages(run, params):
        values = [jax.jit(run)(params, x) for x in batches]
        return [np.mean([np.asarray(v[i], np.float64).mean(a) for v in values], axis=0) for i, a in enumerate(axes)]

    pairs = zip(averages(fn, params), averages(qjax.quantized(fn), got), strict=True)
    return [np.abs(a - b).max() for a, b in pairs]


def _param(case, rule):
    quick = (case is DENSE and rule is STATIC) or case is STACKED
    return pytest.param(case, rule, marks=[] if quick else pytest.mark.slow, id=f"{case[0].__name__}-{rule.activation}")


@pytest.mark.parametrize(("case", "rule"), [_param(*run) for run in RUNS])
def test_every_mean_is_what_it_was(case, rule):
    fn, params, x, axes = case
    batches = [x, x[::-1] * 0.7]
    result = qjax.quantize(fn, params, qjax.Policy([FLOAT, rule] if "up_bias" in params else [rule]), batches)
    before = jax.tree.leaves(result.params)
    corrected = qjax.correct_bias(fn, params, result, batches)
    wrong, right = off(fn, axes, params, result.params, batches), off(fn, axes, params, corrected.params, batches)
    assert min(wrong) > 1e-3 and max(right) < 2e-5, (wrong, right)
    assert all(a is b for a, b in zip(before, jax.tree.leaves(result.params), strict=True))
    notes = {row.path: row.notes for row in corrected.report.rows}
    biases = {path for path in notes if any("root mean square" in note for note in notes[path])}
    weights = {path for path in notes if any("its mean is corrected in" in note for note in notes[path])}
    packed = {row.path for row in result.report.rows if row.spec}
    assert weights == packed and len(biases) == len(packed)
    for path, a, b in zip(notes, jax.tree.leaves(params), _leaves(corrected.params), strict=True):
        assert path in packed or (path in biases) != np.array_equal(a, b), path
        assert path in packed or a.dtype == b.dtype


def _leaves(tree):
    return jax.tree.leaves(tree, is_leaf=lambda x: isinstance(x, qjax.QTensor))


@pytest.mark.slow
def test_an_expert_without_data_keeps_its_bias():
    fn, params, x, _ = EXPERTS
    result = qjax.quantize(fn, params, qjax.Policy([FLOAT, INT4]), [x])
    corrected = qjax.correct_bias(fn, params, result, [x])
    changed = np.asarray(corrected.params["up_bias"] != params["up_bias"]).all(1)
    assert changed.tolist() == [True, False, True]
    (row,) = (row for row in corrected.report.rows if row.path == "up_bias")
    assert "no data reached a part of it: not corrected there" in row.notes


def test_what_has_no_bias_is_named():
    def fn(p, x):
        h = jax.nn.relu(x @ p["plain"])
        h = h @ p["a"] + p["shared"]
        h = jnp.tanh(h) @ p["b"] + p["shared"]
        return lax.fori_loop(0, 2, lambda i, h: jnp.tanh(h @ p["loop"] + p["loop_bias"]), h) @ p["out"]

    names = ("plain", "a", "b", "loop", "out")
    params = {name: normal(4, 4, seed=i) for i, name in enumerate(names)} | {"shared": jnp.ones(4), "loop_bias": jnp.ones(4)}
    x = normal(8, 4)
    result = qjax.quantize(fn, params, qjax.Policy([INT4]), [x])
    corrected = qjax.correct_bias(fn, params, result, [x])
    notes = {row.path: "".join(row.notes) for row in corrected.report.rows}
    assert "no bias correction: no bias is added to its result in front of `max`" in notes["plain"]
    assert "its bias shared is also read elsewhere" in notes["a"] and "its bias shared is also read elsewhere" in notes["b"]
    assert "it stands in a `scan` that runs as a whole" in notes["loop"] or "`while`" in notes["loop"]
    assert "no bias is added to its result" in notes["out"]
    assert (corrected.params["shared"] == params["shared"]).all() and (corrected.params["loop_bias"] == 1).all()


def test_layer_after_layer_is_not_one_pass():
    """The mean behind a function that is not linear depends on the corrected layer before it: the order matters, and is kept."""
    fn, params, x, _ = DENSE
    result = qjax.quantize(fn, params, qjax.Policy([INT4]), [x])
    corrected = qjax.correct_bias(fn, params, result, [x]).params
    one_pass = [np.asarray(a - b).mean(0) for a, b in zip(fn(params, x), qjax.quantized(fn)(result.params, x), strict=True)]
    np.testing.assert_allclose(corrected["b1"] - params["b1"], one_pass[0], rtol=1e-4, atol=1e-6)
    assert np.abs(corrected["b2"] - params["b2"] - one_pass[1]).max() > 1e-3


def test_it_helps():
    fn, params, x, _ = DENSE
    result = qjax.quantize(fn, params, qjax.Policy([qjax.Rule("*", weight=qjax.int3())]), [x])
    corrected = qjax.correct_bias(fn, params, result, [x])
    want = fn(params, x)[1]
    errors = [float(jnp.mean((qjax.quantized(fn)(r.params, x)[1] - want) ** 2)) for r in (result, corrected)]
    assert errors[1] < 0.8 * errors[0], errors


def test_wrong_arguments_are_named():
    fn, params, x, _ = DENSE
    result = qjax.quantize(fn, params, qjax.Policy([INT4]), [x])
    with pytest.raises(ValueError, match="holds shapes, but a bias correction needs data"):
        qjax.correct_bias(fn, params, result, [jax.ShapeDtypeStruct((4, 8), jnp.float32)])
    with pytest.raises(ValueError, match="batch 1 gives the result of w1 NaN or infinity"):
        qjax.correct_bias(fn, params, result, [x, x * jnp.nan])
    with pytest.raises(ValueError, match="`result` is not of `params`"):
        qjax.correct_bias(fn, {**params, "more": jnp.ones(3)}, result, [x])
    plain = qjax.quantize(fn, params, qjax.Policy([qjax.Rule("*", weight=None)]), [x])
    with pytest.raises(ValueError, match="no quantized parameter"):
        qjax.correct_bias(fn, params, plain, [x])


def rescaled(p, x):
    """Behind a relu: a method that rescales the second layer's input changes the first layer and its bias in exchange."""
    return jax.nn.relu(x @ p["a"] + p["b"]) @ p["c"] + p["d"]


OUTLIERS = {"a": normal(8, 16) * jnp.exp(1.5 * normal(16, seed=5)), "b": normal(16), "c": normal(16, 4, seed=1), "d": normal(4)}
SMOOTH = qjax.Rule("*", weight=qjax.int4(), activation=qjax.static(qjax.int8()), method=qjax.smoothquant())
AWQ = qjax.Rule("*", weight=qjax.int4(), method=qjax.awq())


@pytest.mark.slow
@pytest.mark.parametrize("rule", [SMOOTH, pytest.param(AWQ, marks=pytest.mark.slow)], ids=["smoothquant", "awq"])
def test_rescaled_inputs(rule):
    """The mean is that of the float model whose parameters are rescaled likewise: x / s, not x."""
    x = normal(40, 8, seed=2) + 1
    result = qjax.quantize(rescaled, OUTLIERS, qjax.Policy([rule]), [x])
    assert result.folds and not np.array_equal(result.params["b"], OUTLIERS["b"])
    corrected = qjax.correct_bias(rescaled, OUTLIERS, result, [x])
    errors = [
        float(jnp.mean((jax.jit(qjax.quantized(rescaled))(r.params, x) - rescaled(OUTLIERS, x)) ** 2)) for r in (result, corrected)
    ]
    assert errors[1] < errors[0]
    shift = np.asarray(jax.jit(qjax.quantized(rescaled))(corrected.params, x) - rescaled(OUTLIERS, x)).mean(0)
    assert np.abs(shift).max() < 2e-5
    loaded = dataclasses.replace(result, folds=())  # as `qjax.load` gives it
    with pytest.raises(ValueError, match=r"`params` leaf .* A result that was loaded does not know how inputs were rescaled"):
        qjax.correct_bias(rescaled, OUTLIERS, loaded, [x])


def test_other_parameters_are_refused():
    fn, params, x, _ = DENSE
    result = qjax.quantize(fn, params, qjax.Policy([INT4]), [x])
    with pytest.raises(ValueError, match="`params` leaf 'b1' differs from that of `result`, where it is float"):
        qjax.correct_bias(fn, {k: w + 1 for k, w in params.items()}, result, [x])
    with pytest.raises(ValueError, match="`params` leaf 'w2' is not what `result` rounds: the error of its weights is"):
        qjax.correct_bias(fn, {**params, "w2": params["w2"] + 0.1}, result, [x])
    with pytest.raises(ValueError, match=r"`params` leaf 'b2' is float32\(5,\), that of `result` float32\(4,\)"):
        qjax.correct_bias(lambda p, x: fn({**p, "b2": p["b2"][:4]}, x), {**params, "b2": normal(5)}, result, [x])
    with pytest.raises(TypeError, match=r"`result` must be what `qjax\.quantize` returned, a Result and not its params, got dict"):
        qjax.correct_bias(fn, params, result.params, [x])
    with pytest.raises(TypeError, match="`params` leaf 'w1' is quantized"):
        qjax.correct_bias(fn, result.params, result, [x])


def test_twice_is_once():
    fn, params, x, _ = DENSE
    result = qjax.quantize(fn, params, qjax.Policy([INT4]), [x])
    once = qjax.correct_bias(fn, params, result, [x])
    twice = qjax.correct_bias(fn, params, once, [x])
    assert [row.notes for row in twice.report.rows] == [row.notes for row in once.report.rows]
    for name in ("b1", "b2"):
        np.testing.assert_allclose(twice.params[name], once.params[name], rtol=1e-5, atol=1e-5)


def test_spilled_is_the_same():
    fn, params, x, _ = DENSE
    result = qjax.quantize(fn, params, qjax.Policy([INT4]), [x, 2 * x])
    held, spilled = (qjax.correct_bias(fn, params, result, [x, 2 * x], spill=spill) for spill in (None, qjax.Spill(limit=0)))
    assert all(np.array_equal(held.params[name], spilled.params[name]) for name in ("b1", "b2"))


def mixing(p, x):
    """Layers in a scan that mix the rows of what they read; the bias comes behind the mix."""

    def layer(x, w):
        h = x @ w["in"]
        with jax.named_scope("mix"):
            h = jax.nn.softmax(h @ h.T) @ h
        a = h + w["in_bias"]
        x = x + jax.nn.relu(a) @ w["out"] + w["out_bias"]
        return x, x

    return (lax.scan(layer, x, p)[1],)


@pytest.mark.slow
def test_products_of_activations_are_those_that_run():
    """The mean behind a product on integers, with scales for each layer, is that which runs."""
    params, x = {**STACKED[1], "in": 0.5 * STACKED[1]["in"]}, normal(12, 8) + 1
    coarse = qjax.static(qjax.int8())
    policy = qjax.Policy([qjax.Rule("*", weight=qjax.int8()), qjax.Rule("*:*", activation=(qjax.static(qjax.uint8()), coarse))])
    result = qjax.quantize(mixing, params, policy, [x])
    assert len(result.sites) == 2 and all(jax.tree.leaves(q)[0].shape == (3,) for q in result.sites.values())
    corrected = qjax.correct_bias(mixing, params, result, [x])
    want = jax.jit(mixing)(params, x)[0]
    wrong, right = (
        np.abs(np.asarray(jax.jit(qjax.quantized(mixing, sites=r.sites))(r.params, x)[0] - want).mean(1)).max() for r in (result, corrected)
    )
    assert wrong > 1e-3 and right < 2e-5, (wrong, right)


@pytest.mark.slow
def test_a_rescaled_module_with_other_variables(tmp_path):
    """The folds are found again by path in the tree of all variables, which has more leaves than were quantized."""

    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.BatchNorm(use_running_average=True, use_scale=False)(x)
            return nn.Dense(4)(nn.relu(nn.Dense(8)(x)))

    model, x = Net(), normal(20, 8) + 1
    variables = model.init(jax.random.key(0), x)
    policy = qjax.Policy([qjax.Rule("*kernel", weight=qjax.int4(), method=qjax.awq())])
    result = qjax.linen.quantize(model, variables, policy, [x])
    corrected = qjax.correct_bias(model.apply, variables, result, [x])
    shift = np.asarray(jax.jit(qjax.quantized(model.apply))(corrected.params, x) - model.apply(variables, x)).mean(0)
    assert result.folds and np.abs(shift).max() < 2e-5
    qjax.save(tmp_path / "model", corrected)
    loaded = qjax.load(tmp_path / "model")
    with pytest.raises(ValueError, match="A result that was loaded does not know how inputs were rescaled"):
        qjax.correct_bias(model.apply, variables, loaded, [x])
