"""Batch norms folded inside the step: against the formulas in float64, on both kinds of statistics, packed, traced once, refused."""

import functools

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import qjax
from qjax import Policy, Rule
from qjax.core import quantize
from tests.program.cases import normal

TENSOR4 = qjax.int4(per="tensor", scale_rule="full")


class Net(nn.Module):
    """A convolution with a bias, one per channel without, a dense layer, each with a batch norm; a head without. Odd sizes."""

    dtype: type = jnp.float32

    @nn.compact
    def __call__(self, x, train=False):
        norm = functools.partial(nn.BatchNorm, use_running_average=not train, momentum=0.5, epsilon=1e-3)
        x = nn.relu(norm(name="n1")(nn.Conv(5, (3, 3), dtype=self.dtype, name="conv")(x)))
        x = nn.relu(norm(name="n2")(nn.Conv(5, (3, 3), feature_group_count=5, use_bias=False, dtype=self.dtype, name="depth")(x)))
        x = norm(name="n3")(nn.Dense(7, dtype=self.dtype, name="dense")(x.mean((1, 2))))
        return nn.Dense(3, dtype=self.dtype, name="head")(nn.relu(x))


MODEL, X = Net(), normal(6, 3, 3, 3)
RULES = Policy([Rule("dense/kernel", weight=qjax.int8()), Rule("head/kernel", weight=None),
                Rule("*", weight=TENSOR4)])  # fmt: skip
LAYERS = {"conv": "n1", "depth": "n2", "dense": "n3"}


def evaluate(variables, x):
    return MODEL.apply(variables, x)


def train(variables, x):
    return MODEL.apply(variables, x, train=True, mutable=["batch_stats"])


def variables_of(model=MODEL):
    rng = np.random.default_rng(0)
    vectors = lambda w: 0.5 + 2 * rng.random(w.shape) if w.ndim == 1 else rng.normal(size=w.shape) / w.size**0.25  # noqa: E731
    return jax.tree.map(lambda w: jnp.asarray(vectors(w), jnp.float32), jax.eval_shape(model.init, jax.random.key(0), X))


def wide(tree):
    return jax.tree.map(lambda a: np.asarray(a, np.float64), tree)


def grid(w, qmax):
    """Rounding to the nearest of -qmax ... qmax steps with one scale."""
    step = np.abs(w).max() / qmax
    return np.clip(np.round(w / step), -qmax, qmax) * step


def by_hand(variables, name):
    """Q(w f) / f in float64."""
    p, stats = wide(variables["params"]), wide(variables["batch_stats"])
    f = p[LAYERS[name]]["scale"] / np.sqrt(stats[LAYERS[name]]["var"] + 1e-3)
    return grid(p[name]["kernel"] * f, 7) / f


@pytest.fixture(scope="module")
def net():
    """The variables, the folds, and one program: the results in evaluation, the step's statistics and gradients, weights, factors."""
    variables = variables_of()
    folds = qjax.batch_norm_folds(evaluate, variables, X)
    fq, training = (qjax.fake_quant(fn, RULES, folds=folds) for fn in (evaluate, train))

    @functools.partial(chex.assert_max_traces, n=1)
    def everything(variables, x):
        def loss(variables):
            logits, new = training(variables, x)
            return (logits * jnp.arange(3.0)).sum(), new

        grads, new = jax.grad(loss, has_aux=True)(variables)
        return fq(variables, x), new, grads["params"], training.leaves(variables, x)(variables)["params"], folds.factors(variables)

    return variables, folds, training, jax.jit(everything)


def test_weights_are_those_of_the_folded_network_divided_by_its_factors(net):
    variables, folds, _, run = net
    assert list(folds.by_path) == ["conv/kernel", "depth/kernel", "dense/kernel"] and not folds.refused
    weights = run(variables, X)[3]
    for name in ("conv", "depth"):
        np.testing.assert_allclose(weights[name]["kernel"], by_hand(variables, name), rtol=2e-6, atol=1e-7)
        plain = grid(np.asarray(variables["params"][name]["kernel"], np.float64), 7)
        assert np.abs(weights[name]["kernel"] - plain).max() > 0.01  # or folding changes nothing here
    np.testing.assert_array_equal(weights["head"]["kernel"], variables["params"]["head"]["kernel"])


def test_one_program_serves_every_step_and_follows_parameters_and_statistics(net):
    """Momentum changes the statistics, an optimizer gamma: the next step rounds with the new factors, and is not traced again."""
    variables, _, _, run = net
    for _ in range(2):
        _, new, grads, _, before = run(variables, X)
        variables = {"params": jax.tree.map(lambda w, g: np.asarray(w) - 0.1 * np.asarray(g), variables["params"], grads), **new}
    *_, weights, factors = run(variables, X)
    assert (np.asarray(factors["conv/kernel"]) != np.asarray(before["conv/kernel"])).all()
    np.testing.assert_allclose(weights["conv"]["kernel"], by_hand(variables, "conv"), rtol=2e-6, atol=1e-7)


def test_training_is_folding_with_stored_statistics_corrected_to_those_of_the_batch():
    """Krishnamoorthi 2018, 3.2.2: y = Q(w gamma / s_ema) x (s_ema / s_b) + beta - gamma mu_b / s_b; statistics of what is rounded."""

    def layer(p, x, batch):
        h = x @ p["w"]
        mean, var = (h.mean(0), h.var(0)) if batch else (p["mean"], p["var"])
        return (h - mean) / jnp.sqrt(var + 1e-3) * p["gamma"] + p["beta"], h

    names = {name: 0.5 + jnp.abs(normal(7, seed=i)) for i, name in enumerate(("gamma", "beta", "mean", "var"))}
    p, x = {"w": normal(9, 7), **names, "gamma": names["gamma"].at[2].multiply(-1)}, normal(40, 9, seed=5)
    folds = qjax.batch_norm_folds(lambda p, x: layer(p, x, False)[0], p, x)
    fq = qjax.fake_quant(lambda p, x: layer(p, x, True), Policy([Rule("*", weight=TENSOR4)]), folds=folds)
    (y, h), grad = jax.jit(lambda p: (fq(p, x), jax.grad(lambda p: (fq(p, x)[1] * jnp.arange(7.0)).sum())(p)))(p)
    v, x64 = wide(p), np.asarray(x, np.float64)
    s_ema = np.sqrt(v["var"] + 1e-3)
    folded = x64 @ grid(v["w"] * v["gamma"] / s_ema, 7)
    unfolded = folded * s_ema / v["gamma"]
    s_b, mu_b = np.sqrt(unfolded.var(0) + 1e-3), unfolded.mean(0)
    np.testing.assert_allclose(h, unfolded, rtol=1e-4, atol=1e-5)  # what the statistics are taken of
    np.testing.assert_allclose(y, folded * (s_ema / s_b) + v["beta"] - v["gamma"] * mu_b / s_b, rtol=1e-4, atol=1e-5)
    # Straight through: dW of the float product, and nothing by way of the factor.
    np.testing.assert_allclose(grad["w"], np.outer(x64.sum(0), np.arange(7.0)), rtol=1e-5, atol=1e-5)
    assert all(bool((grad[name] == 0).all()) for name in ("gamma", "var"))


def test_the_packed_model_is_the_one_that_was_trained(net):
    """Codes to the bit, results to rounding, in evaluation; with batch norms that multiply by one and shifts in one place."""
    variables, _, training, run = net
    want, *_, weights, factors = run(variables, X)
    result = qjax.convert(training, variables, X)
    assert str(result.report).count("folded: ") == 3
    before, after = variables["params"], result.params["params"]
    for name, norm in LAYERS.items():
        q, f = after[name]["kernel"], np.asarray(factors[f"{name}/kernel"])
        # Division of float32 is correctly rounded: no other codes give these bits.
        np.testing.assert_array_equal(np.asarray(q.dequantize()) / f, weights[name]["kernel"])
        np.testing.assert_allclose(after[norm]["scale"], np.sqrt(wide(variables)["batch_stats"][norm]["var"] + 1e-3), rtol=1e-5)
        assert bool((result.params["batch_stats"][norm]["mean"] == 0).all())
    shift = (wide(before)["conv"]["bias"] - wide(variables)["batch_stats"]["n1"]["mean"]) * np.ravel(factors["conv/kernel"])
    np.testing.assert_allclose(after["conv"]["bias"], shift + wide(before)["n1"]["bias"], rtol=1e-4, atol=1e-5)
    again = quantize(before["conv"]["kernel"] * factors["conv/kernel"], TENSOR4, (0, 1, 2))
    np.testing.assert_array_equal(after["conv"]["kernel"].codes, again.codes)
    assert after["head"]["kernel"] is before["head"]["kernel"]
    got = jax.jit(qjax.quantized(evaluate))(result.params, X)
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=2e-5)


@pytest.mark.slow
def test_learned_scales_begin_with_the_folded_weights_and_train_in_bfloat16():
    """A module in bfloat16, whose batch norms cast: learned scales, calibrated activations, one layer float that could be folded."""
    model = Net(dtype=jnp.bfloat16)
    variables = variables_of(model)
    variables["params"]["n1"]["scale"] = variables["params"]["n1"]["scale"].at[1].set(0.0)
    folds = qjax.batch_norm_folds(model.apply, variables, X, train=False)
    policy = Policy([Rule("dense/kernel", weight=None),
                     Rule("*", weight=TENSOR4, activation=qjax.static(qjax.int8()), train=qjax.lsq("extremes"))])  # fmt: skip
    module = qjax.linen.fake_quant(model, policy, folds)
    variables = qjax.linen.begin(module, jax.random.key(0), variables, X)
    f = np.asarray(folds.factors(variables)["conv/kernel"], np.float64)
    assert (f == 0).sum() == 1
    learned = variables["quant"]["state"]["weights"]
    assert set(learned) == {"conv/kernel", "depth/kernel", "head/kernel"}
    folded = np.abs(np.asarray(variables["params"]["conv"]["kernel"], np.float64) * f).max()
    np.testing.assert_allclose(learned["conv/kernel"]["scale"].ravel(), folded / 7, rtol=1e-5)

    @jax.jit
    def step(variables):
        def loss(v):
            out, new = module.apply(v, X, train=True, mutable=["batch_stats"])
            return (out.astype(jnp.float32) * jnp.arange(3.0)).sum(), new
        return jax.grad(loss, has_aux=True)(variables), module.apply(variables, X)

    (grads, new), want = step(variables)
    assert jax.tree.all(jax.tree.map(lambda g: bool(jnp.isfinite(g).all()), grads))
    assert bool((grads["params"]["conv"]["kernel"][..., [0, 2]] != 0).any()) and bool((grads["params"]["n1"]["scale"] != 0).any())
    assert bool((new["batch_stats"]["n1"]["mean"] != variables["batch_stats"]["n1"]["mean"]).any())
    result = qjax.linen.convert(module, variables, X)
    q = result.params["params"]["conv"]["kernel"]
    assert q.dtype == jnp.float32 and bool((q.dequantize()[..., f.ravel() == 0] == 0).all())
    assert result.params["params"]["n3"]["scale"] is variables["params"]["n3"]["scale"]
    got = jax.jit(qjax.quantized(model.apply))(result.params, X)
    np.testing.assert_allclose(np.float32(got), np.float32(want), rtol=5e-2, atol=5e-2)


@pytest.mark.slow
def test_an_nnx_module():
    class Dense(nnx.Module):
        def __init__(self, rngs):
            self.linear, self.norm = nnx.Linear(3, 5, use_bias=False, rngs=rngs), nnx.BatchNorm(5, momentum=0.5, rngs=rngs)

        def __call__(self, x):
            return self.norm(self.linear(x))

    model, x = Dense(nnx.Rngs(0)), normal(8, 3)
    model.norm.var[...] = jnp.arange(1.0, 6.0) ** 2
    model.eval()
    folds = qjax.batch_norm_folds(qjax.nnx.function(model), nnx.state(model), x)
    fq = qjax.nnx.fake_quant(model, Policy([Rule("*", weight=TENSOR4)]), folds=folds)
    w, f = np.asarray(model.linear.kernel[...], np.float64), 1 / np.sqrt(np.arange(1.0, 6.0) ** 2 + 1e-5)
    want = np.asarray(x, np.float64) @ grid(w * f, 7)
    np.testing.assert_allclose(fq(x), want, rtol=1e-4, atol=1e-5)
    packed = qjax.nnx.convert(fq, x).params
    np.testing.assert_allclose(qjax.quantized(qjax.nnx.function(model))(packed, x), want, rtol=1e-4, atol=1e-5)
    fq.train()
    fq(x)
    assert bool((fq.norm.mean[...] != 0).any())  # batch statistics of the call are in the module


def test_refused():
    p = {name: jnp.ones(2) for name in ("beta", "mean", "var")} | {"gamma": jnp.array([0.0, 1.0]), "w": normal(3, 2), "head": normal(2, 2)}
    x = normal(4, 3)
    fn = lambda p, x: ((x @ p["w"] - p["mean"]) * (jax.lax.rsqrt(p["var"]) * p["gamma"]) + p["beta"]) @ p["head"]  # noqa: E731
    every = Policy([Rule("*", weight=TENSOR4)])
    folds = qjax.batch_norm_folds(fn, p, x)
    assert repr(folds) == "BatchNormFolds(w)"
    with pytest.raises(ValueError, match="has no weight that a batch norm on stored statistics follows: give the function in evaluation"):
        qjax.batch_norm_folds(lambda p, x: x @ p["w"] + p["beta"], p, x)
    with pytest.raises(ValueError, match=r"and folds into .'w': no parameter of one number a channel is a factor of its scale"):
        qjax.batch_norm_folds(lambda p, x: (x @ p["w"] - p["mean"]) * jax.lax.rsqrt(p["var"] + 1), p, x)
    with pytest.raises(ValueError, match="`folds` are of w, and the policy rounds none of them"):
        qjax.fake_quant(fn, Policy([Rule("head", weight=TENSOR4)]), folds=folds)(p, x)
    split = lambda q, var, x: fn({**q, "var": var}, x)  # noqa: E731
    less = {name: w for name, w in p.items() if name != "var"}
    with pytest.raises(ValueError, match="`folds` need 'var', which the batch norm of 'w' reads and the parameters lack"):
        qjax.fake_quant(split, every, folds=folds)(less, p["var"], x)
    with pytest.raises(ValueError, match=r"`folds` were made for 'w' of shape \(3, 2\), here it is \(4, 2\)"):
        qjax.fake_quant(fn, every, folds=folds)({**p, "w": normal(4, 2)}, normal(4, 4))
    with pytest.raises(TypeError, match=r"`folds` must be a value of qjax\.batch_norm_folds"):
        qjax.fake_quant(fn, every, folds=["w"])  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match=r"and folds into .'w': its batch norm reads arrays that `fn` closes over, such as statistics"):
        qjax.batch_norm_folds(lambda q, x: fn({**q, "var": p["var"]}, x), less, x)
    fq = qjax.fake_quant(fn, every, folds=folds)
    with pytest.raises(ValueError, match=r"the batch norm of 'w' multiplies it by NaN or infinity: look at .*'gamma', 'mean', 'var'"):
        qjax.convert(fq, {**p, "var": -p["var"]}, x)
    with pytest.raises(ValueError, match="`folds` and from_packed do not go together"):
        fq.from_packed(jax.random.key(0), p, x, params=p)
    binary = qjax.fake_quant(fn, Policy([Rule("w", weight=qjax.binary(per="tensor"))]), folds=folds)
    with pytest.raises(ValueError, match=r"'w' has channels that its batch norm multiplies by nothing, and .* has no zero"):
        qjax.convert(binary, p, x)
