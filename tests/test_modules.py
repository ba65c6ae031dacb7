"""Linen, NNX and Equinox modules in one call each; nothing given is changed, the parameter tree keeps its paths."""

import chex
import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import qjax
from qjax import Policy, Rule
from qjax.core import QTensor
from tests.program.cases import normal

INT8 = Policy([Rule("*", weight=qjax.int8())])
X = normal(4, 6, 6, 3)


def is_q(x):
    return isinstance(x, QTensor)


def dequantized(tree):
    return jax.tree.map(lambda x: x.dequantize() if is_q(x) else x, tree, is_leaf=is_q)


class Block(nn.Module):
    """Not named self, with batch norm, dropout and attention; odd sizes."""

    @nn.compact
    def __call__(this, x, train: bool = False):
        x = nn.Conv(10, (3, 3))(x)
        x = nn.relu(nn.BatchNorm(use_running_average=not train)(x))
        x = x.reshape(x.shape[0], -1, 10)
        x = x + nn.MultiHeadDotProductAttention(num_heads=2)(x)
        x = nn.Dropout(0.1, deterministic=not train)(x)
        return nn.DenseGeneral((2, 3))(x.mean(1))


class Stack(nn.Module):
    """Scanned and rematerialized layers in bf16 with a tied embedding."""

    @nn.compact
    def __call__(self, tokens):
        embed = nn.Embed(23, 12, dtype=jnp.bfloat16)
        layer = nn.scan(
            nn.remat(Layer), variable_axes={"params": 0}, split_rngs={"params": True}, length=3, metadata_params={}
        )
        x, _ = layer(name="layers")(embed(tokens), None)
        return embed.attend(x)


class Layer(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        h = nn.RMSNorm(dtype=jnp.bfloat16)(x)
        return x + nn.Dense(12, dtype=jnp.bfloat16)(nn.gelu(nn.Dense(20, dtype=jnp.bfloat16)(h))), None


def test_linen_quantize():
    model = Block()
    variables = model.init(jax.random.key(0), X)
    before = jax.tree.map(np.array, variables)
    result = qjax.linen.quantize(model, variables, INT8, [X], train=False)
    chex.assert_trees_all_equal(before, jax.tree.map(np.array, variables))
    assert {r.path for r in result.report.rows if r.spec} == {
        "Conv_0/kernel",
        "DenseGeneral_0/kernel",
        *(f"MultiHeadDotProductAttention_0/{n}/kernel" for n in ("query", "key", "value", "out")),
    }
    got = jax.jit(qjax.quantized(model.apply))(result.params, X)
    np.testing.assert_allclose(got, model.apply(dequantized(result.params), X), rtol=1e-4, atol=1e-5)


def test_linen_state_is_updated_through_packed_parameters():
    model = Block()
    variables = model.init(jax.random.key(0), X)
    params = qjax.linen.quantize(model, variables, INT8, [X]).params

    def forward(apply, variables):
        return apply(variables, X, train=True, mutable=["batch_stats"], rngs={"dropout": jax.random.key(1)})

    got, state = forward(qjax.quantized(model.apply), params)
    want, expected = forward(model.apply, dequantized(params))
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)
    chex.assert_trees_all_close(state, expected, rtol=1e-5)
    assert (state["batch_stats"]["BatchNorm_0"]["mean"] != 0).any()


@pytest.mark.slow
def test_linen_scan_remat_bf16_tied():
    model, tokens = Stack(), jnp.arange(10).reshape(2, 5)
    variables = model.init(jax.random.key(0), tokens)
    result = qjax.linen.quantize(model, variables, INT8, [tokens])
    assert {r.path: r.shape for r in result.report.rows if r.spec} == {
        "Embed_0/embedding": (23, 12),
        "layers/Dense_1/kernel": (3, 12, 20),  # the argument of gelu is built first
        "layers/Dense_0/kernel": (3, 20, 12),
    }
    got = jax.jit(qjax.quantized(model.apply))(result.params, tokens)
    want = jax.jit(model.apply)(dequantized(result.params), tokens)
    assert got.dtype == jnp.bfloat16
    np.testing.assert_allclose(np.float32(got), np.float32(want), rtol=2e-2, atol=2e-2)


def test_linen_fake_quant_is_a_module_with_the_same_tree():
    model = Block()
    fq = qjax.linen.fake_quant(model, INT8)
    variables = fq.init(jax.random.key(0), X)
    chex.assert_trees_all_equal(variables, model.init(jax.random.key(0), X))
    packed = qjax.linen.quantize(model, variables, INT8, [X]).params
    np.testing.assert_allclose(fq.apply(variables, X), model.apply(dequantized(packed), X), rtol=1e-5, atol=1e-6)


def test_linen_fake_quant_trains_with_state_and_dropout():
    model = qjax.linen.fake_quant(Block(), INT8)
    variables = model.init(jax.random.key(0), X)

    @jax.jit
    def step(variables, key):
        def loss(params):
            out, state = model.apply(
                {**variables, "params": params}, X, train=True, mutable=["batch_stats"], rngs={"dropout": key}
            )
            return jnp.sum((out - 1) ** 2), state

        (value, state), grads = jax.value_and_grad(loss, has_aux=True)(variables["params"])
        params = jax.tree.map(lambda p, g: p - 1e-3 * g, variables["params"], grads)
        return value, {"params": params, **state}

    values = []
    for i in range(5):
        value, variables = step(variables, jax.random.key(i))
        values.append(float(value))
    assert values[-1] < values[0]
    assert (variables["batch_stats"]["BatchNorm_0"]["mean"] != 0).any()


LEARNED = Policy([Rule("*ernel", weight=qjax.int4(), activation=qjax.static(qjax.int8()),
                       train=qjax.qat(qjax.lsq(), qjax.lsq(), schedule=qjax.schedule(weights=1)))])  # fmt: skip
KINDS = {"weights": optax.sgd(1e-3), "learned": optax.sgd(1e-2), "fixed": optax.set_to_zero()}


def learned_of(variables):
    state = variables["quant"]["state"]
    return jax.tree.leaves({name: state[name] for name in ("weights", "activations")})


class Small(nn.Module):
    @nn.compact
    def __call__(self, x, train: bool = False):
        x = nn.BatchNorm(use_running_average=not train)(nn.Dense(5)(x))
        return nn.Dense(2)(nn.Dropout(0.1, deterministic=not train)(nn.relu(x)))


def test_a_linen_module_holds_what_quantizers_learn():
    x = normal(4, 3)
    model, plain = qjax.linen.fake_quant(Small(), LEARNED), Small()
    variables = qjax.linen.begin(model, jax.random.key(0), model.init(jax.random.key(1), x), x)
    first, optimizer = variables["quant"], optax.multi_transform(KINDS, qjax.linen.labels(variables))

    @jax.jit
    def step(variables, state, key):
        def loss(variables):
            out, changed = model.apply(variables, x, train=True, mutable=["batch_stats"], rngs={"dropout": key})
            return jnp.sum((out - 1) ** 2), (out, changed)

        (value, (out, changed)), grads = jax.value_and_grad(loss, has_aux=True)(variables)
        updates, state = optimizer.update(grads, state, variables)
        return qjax.linen.advance({**optax.apply_updates(variables, updates), **changed}), state, value, out

    state, values, outs = optimizer.init(variables), [], []
    for i in range(4):
        variables, state, value, out = step(variables, state, jax.random.key(i))
        values.append(float(value))
        outs.append(out)
    assert values[-1] < values[1] and float(variables["quant"]["state"]["step"]) == 4
    assert all(bool(jnp.any(a != b)) for a, b in zip(*map(learned_of, (variables, {"quant": first})), strict=True))
    assert bool(jnp.any(variables["batch_stats"]["BatchNorm_0"]["mean"] != 0))
    result = qjax.linen.convert(model, variables, jax.ShapeDtypeStruct(x.shape, x.dtype))
    assert "quant" not in result.params and [row.method for row in result.report.rows if row.spec] == ["lsq", "lsq"]
    got = jax.jit(qjax.quantized(plain.apply))(result.params, x)
    np.testing.assert_allclose(got, jax.jit(model.apply)(variables, x), rtol=1e-4, atol=1e-5)


class NNXNet(nnx.Module):
    def __init__(this, rngs):
        this.conv = nnx.Conv(3, 10, (3, 3), rngs=rngs)
        this.norm = nnx.BatchNorm(10, rngs=rngs)
        this.drop = nnx.Dropout(0.1, rngs=rngs)
        this.layers = nnx.List([nnx.Linear(10, 10, rngs=rngs) for _ in range(2)])

    def __call__(this, x):
        x = nnx.relu(this.norm(this.conv(x)))
        for layer in this.layers:
            x = layer(this.drop(x))
        return x


def test_nnx_quantize():
    model = NNXNet(nnx.Rngs(0))
    model.eval()
    before = jax.tree.map(np.array, nnx.to_pure_dict(nnx.state(model, nnx.Param)))
    result = qjax.nnx.quantize(model, INT8, [X])
    chex.assert_trees_all_equal(before, jax.tree.map(np.array, nnx.to_pure_dict(nnx.state(model, nnx.Param))))
    assert {r.path for r in result.report.rows if r.spec} == {"conv/kernel", "layers/0/kernel", "layers/1/kernel"}
    got = jax.jit(qjax.quantized(qjax.nnx.function(model)))(result.params, X)
    assert 0 < np.abs(got - model(X)).max() < 0.1


def test_nnx_fake_quant_trains_and_updates_its_own_state():
    model = NNXNet(nnx.Rngs(0))
    fq = qjax.nnx.fake_quant(model, INT8)
    assert isinstance(fq, NNXNet) and jax.tree.structure(nnx.state(fq)) == jax.tree.structure(nnx.state(model))
    optimizer = nnx.Optimizer(fq, optax.sgd(1e-3), wrt=nnx.Param)

    @nnx.jit
    def step(model, optimizer):
        loss, grads = nnx.value_and_grad(lambda m: jnp.mean((m(X) - 1) ** 2))(model)
        optimizer.update(model, grads)
        return loss

    losses = [float(step(fq, optimizer)) for _ in range(5)]
    assert losses[-1] < losses[0]
    assert (fq.norm.mean[...] != 0).any() and (model.norm.mean[...] == 0).all()
    fq.eval()
    assert fq(X).shape == (4, 6, 6, 10)


def test_an_nnx_module_holds_what_quantizers_learn():
    model, x = nnx.Sequential(nnx.Linear(3, 5, rngs=nnx.Rngs(0)), nnx.relu, nnx.Linear(5, 2, rngs=nnx.Rngs(1))), normal(4, 3)
    fq = qjax.nnx.begin(qjax.nnx.fake_quant(model, LEARNED), jax.random.key(0), x)
    trained = nnx.Any(nnx.Param, qjax.nnx.Learned)
    first, optimizer = jax.tree.map(jnp.copy, nnx.state(fq, trained)), nnx.Optimizer(fq, optax.sgd(1e-3), wrt=trained)

    @nnx.jit
    def step(model, optimizer):
        diff = nnx.DiffState(0, trained)
        loss, grads = nnx.value_and_grad(lambda m: jnp.mean((m(x) - 1) ** 2), argnums=diff)(model)
        optimizer.update(model, grads)
        qjax.nnx.advance(model)
        return loss

    losses = [float(step(fq, optimizer)) for _ in range(4)]
    assert losses[-1] < losses[1] and float(fq.quant.step[...]) == 4
    moved = jax.tree.map(lambda a, b: bool(jnp.any(a != b)), nnx.state(fq, trained), first)
    assert len(jax.tree.leaves(moved)) == 8 and all(jax.tree.leaves(moved))
    result = qjax.nnx.convert(fq, x)
    assert jax.tree.structure(result.params, is_leaf=is_q) == jax.tree.structure(nnx.state(model))
    got = jax.jit(qjax.quantized(qjax.nnx.function(model)))(result.params, x)
    np.testing.assert_allclose(got, fq(x), rtol=1e-4, atol=1e-5)
    assert not hasattr(model, "quant")


def test_equinox_module_as_a_plain_function():
    """Its leaves hold callables; they are static."""
    mlp = eqx.nn.MLP(6, 4, 9, 2, key=jax.random.key(0))

    def fn(model, x):
        return jax.vmap(model)(x)

    result = qjax.quantize(fn, mlp, INT8, [normal(5, 6)])
    assert sum(bool(r.spec) for r in result.report.rows) == 3
    got = jax.jit(lambda arrays, x: qjax.quantized(fn)(eqx.combine(arrays, static), x))
    arrays, static = eqx.partition(result.params, eqx.is_array)
    np.testing.assert_allclose(got(arrays, normal(5, 6)), fn(dequantized(result.params), normal(5, 6)), rtol=1e-5)
    fq = qjax.fake_quant(fn, INT8)
    np.testing.assert_allclose(fq(mlp, normal(5, 6)), fn(dequantized(result.params), normal(5, 6)), rtol=1e-5)


@pytest.mark.parametrize("verb", [qjax.linen.fake_quant, qjax.nnx.fake_quant])
def test_the_wrong_kind_of_module_is_named(verb):
    with pytest.raises(TypeError, match=r"`model` must be a flax\.(linen|nnx)\.Module, got dict"):
        verb({}, INT8)


def test_what_a_module_cannot_do_is_refused_at_once():
    for verb in (qjax.linen.begin, qjax.linen.convert):
        with pytest.raises(TypeError, match=r"`model` of qjax.linen.\w+ must be from qjax.linen.fake_quant, got Dense"):
            verb(nn.Dense(3), {"params": {}}, X)
    linear = nnx.Linear(3, 2, rngs=nnx.Rngs(0))
    with pytest.raises(TypeError, match=r"`model` of qjax.nnx.convert must be from qjax.nnx.fake_quant, got Linear"):
        qjax.nnx.convert(linear, X)
    linear.quant = nnx.Param(jnp.ones(1))
    with pytest.raises(ValueError, match=r"`model` has an attribute 'quant' of its own"):
        qjax.nnx.begin(qjax.nnx.fake_quant(linear, INT8), jax.random.key(0), X)
    with pytest.raises(ValueError, match=r"`methods` names 'decode', which Linear does not have"):
        qjax.nnx.fake_quant(linear, INT8, ("decode",))
    with pytest.raises(TypeError, match=r"`policy` must be a qjax.Policy, got IntSpec"):
        qjax.linen.fake_quant(nn.Dense(3), qjax.int8())
    with pytest.raises(ValueError, match=r"`variables` must be a dictionary with 'params'.* got one with 'kernel'"):
        qjax.linen.quantize(nn.Dense(3), {"kernel": jnp.ones((8, 3))}, INT8, calibration=[jnp.ones((2, 8))])


class Counting(nnx.Module):
    def __init__(self, rngs):
        self.linear, self.norm = nnx.Linear(8, 4, rngs=rngs), nnx.BatchNorm(4, rngs=rngs)
        self.calls = nnx.Intermediate(jnp.zeros((), jnp.int32))

    def __call__(self, x):
        self.calls[...] = self.calls[...] + 1
        return self.norm(self.linear(x))


class Keeping(nnx.Module):
    """Makes a variable in its call, as `sow` does."""

    def __init__(self, rngs):
        self.linear, self.norm = nnx.Linear(8, 4, rngs=rngs), nnx.BatchNorm(4, rngs=rngs)

    def __call__(self, x):
        self.hidden = nnx.Intermediate(self.linear(x))
        self.linear.bias[...] = self.linear.bias[...] + 1
        return self.norm(self.hidden[...])


def test_what_a_call_creates_is_no_state_of_the_next():
    model, x = Keeping(nnx.Rngs(0)), normal(6, 8)
    fn, state = qjax.nnx.function(model, mutable=True), nnx.state(model)
    for _ in range(2):
        _, changed = fn(state, x)
        assert nnx.to_pure_dict(changed).keys() == {"norm"}  # nor is the bias, a Param
        state = nnx.merge_state(state, changed)
    assert not nnx.state(model)["norm"]["mean"][...].any() and not state["linear"]["bias"][...].any()  # nothing is changed in place
    np.testing.assert_allclose(nnx.to_pure_dict(state)["norm"]["mean"], (1 - 0.99**2) * (x @ model.linear.kernel[...]).mean(0), atol=1e-6)


def test_the_function_of_an_nnx_module_gives_back_the_state_that_a_call_changes():
    """Packed parameters stay in the state and are no result of the call."""
    model, x = Counting(nnx.Rngs(0)), normal(6, 8)
    result = qjax.nnx.quantize(model, Policy([Rule("*kernel", weight=qjax.int8())]), [x])
    fn, state = jax.jit(qjax.quantized(qjax.nnx.function(model, mutable=True))), result.params
    for _ in range(3):
        out, changed = fn(state, x)
        state = nnx.merge_state(state, changed)
    assert int(nnx.to_pure_dict(state)["calls"]) == 3 and int(model.calls[...]) == 0
    assert sorted(nnx.to_pure_dict(changed)) == ["calls", "norm"] and sorted(nnx.to_pure_dict(changed)["norm"]) == ["mean", "var"]
    packed = [leaf for leaf in jax.tree.leaves(state, is_leaf=lambda x: isinstance(x, QTensor)) if isinstance(leaf, QTensor)]
    assert len(packed) == 1
    for _ in range(3):
        wanted = model(x)
    np.testing.assert_allclose(out, wanted, atol=0.05)
    np.testing.assert_allclose(nnx.to_pure_dict(state)["norm"]["mean"], model.norm.mean[...], atol=0.01)
    np.testing.assert_array_equal(jax.jit(qjax.quantized(qjax.nnx.function(model)))(result.params, x), fn(result.params, x)[0])


MOVING = Policy([Rule("*kernel", weight=qjax.int8(), activation=qjax.static(qjax.int8()), train=qjax.moving_range(0.5))])


def test_ranges_of_a_linen_module_move_where_their_collection_is_mutable():
    """By hand: half of the first range, half of the new one; batch statistics move beside them, and elsewhere nothing does."""
    x = jnp.array([[-1.0, 3.0], [0.5, 2.0]])
    model = qjax.linen.fake_quant(nn.Dense(2), MOVING)
    variables = qjax.linen.begin(model, jax.random.key(0), model.init(jax.random.key(1), x), x)

    @jax.jit
    def loss(params, quant):
        y, changed = model.apply({"params": params, "quant": quant}, 3 * x, mutable=["quant"])
        return jnp.square(y).sum(), changed["quant"]

    grads, quant = jax.grad(loss, has_aux=True)(variables["params"], variables["quant"])
    assert jax.tree.map(jnp.ravel, quant["state"]["activations"]["kernel"]) == {"hi": 6.0, "lo": -3.0}
    assert jnp.abs(grads["kernel"]).max() > 0
    moved = {**variables, "quant": quant}
    _, again = model.apply(moved, x, mutable=["intermediates"])
    assert "quant" not in again
    plain = qjax.linen.fake_quant(nn.Dense(2), INT8)  # no state: a mutable collection changes nothing
    y, changed = plain.apply({"params": variables["params"]}, x, mutable=["quant"])
    np.testing.assert_array_equal(y, plain.apply({"params": variables["params"]}, x))
    assert not changed


def test_ranges_of_an_nnx_module_move_in_tracked():
    x = jnp.array([[-1.0, 3.0], [0.5, 2.0]])
    model = nnx.Sequential(nnx.Linear(2, 2, rngs=nnx.Rngs(0)), nnx.BatchNorm(2, rngs=nnx.Rngs(0)))
    model.eval()
    fq = qjax.nnx.begin(qjax.nnx.fake_quant(model, MOVING), jax.random.key(0), x)
    fq(3 * x)
    assert fq.quant.activations["layers/0/kernel"].hi[...].item() == 3.0
    fq.train()
    nnx.jit(lambda fq: nnx.grad(lambda fq: jnp.square(qjax.nnx.tracked(fq, 3 * x)).sum())(fq))(fq)
    assert fq.quant.activations["layers/0/kernel"].hi[...].item() == 6.0
    assert jnp.abs(fq.layers[1].mean[...]).max() > 0
    with pytest.raises(ValueError, match=r"take the module that qjax\.nnx\.begin returns"):
        qjax.nnx.tracked(qjax.nnx.fake_quant(model, MOVING), x)


def test_variables_and_keys_of_begin_are_named_where_they_are_none():
    model = qjax.linen.fake_quant(nn.Dense(2), MOVING)
    with pytest.raises(TypeError, match="`variables` must be those of the module"):
        qjax.linen.begin(model, jax.random.key(0), jax.random.key(1), jnp.ones((1, 2)))  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"`key` must be a key of jax\.random"):
        qjax.linen.begin(model, 0, {"params": {"kernel": jnp.ones((2, 2)), "bias": jnp.ones(2)}}, jnp.ones((1, 2)))  # type: ignore[arg-type]


@pytest.mark.parametrize("module", [nn.Dense(3), nnx.Linear(4, 3, rngs=nnx.Rngs(0)), nn.Dense], ids=["linen", "nnx", "class"])
def test_a_module_in_place_of_a_function_is_told_where_to_go(module):
    policy = qjax.Policy([qjax.Rule("*", weight=qjax.int8())])
    x = jnp.ones((2, 4))
    verbs = (
        lambda: qjax.quantize(module, {"w": x}, policy, [x]), lambda: qjax.fake_quant(module, policy), lambda: qjax.quantized(module),
        lambda: qjax.prepack(module)({"w": x}, x), lambda: qjax.qlora(module, qjax.Policy([qjax.Rule("*", train=qjax.lora(2))])),
        lambda: qjax.trace(module, {"w": x}, x),
    )  # fmt: skip
    for verb in verbs:
        with pytest.raises(TypeError, match=r"`fn` must be a function .* got the module (Dense|Linear): .* qjax\.linen or qjax\.nnx"):
            verb()
