"""Training that was saved with orbax and restored goes on to the same losses, to the bit: plain functions, Linen, NNX."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from flax import nnx

import qjax
from qjax import Policy, Rule
from tests.program.cases import normal

WIDTH, LAYERS, SAVED, STEPS = 8, 3, 3, 7
# Learned scales of stacked layers, rounding and bits that set in, a freeze behind the save, activations rounded at random.
TRAIN = qjax.qat(qjax.lsq(), qjax.ste(rounding="stochastic"), gradient=qjax.dynamic(qjax.int8()),
                 schedule=qjax.schedule(weights=1, freeze=5, bits=((0, 8), (4, 4))))  # fmt: skip
POLICY = Policy([Rule("*layers*", weight=qjax.int4(), activation=qjax.static(qjax.int8()), train=TRAIN)])
X, Y = normal(16, WIDTH), normal(16, WIDTH, seed=1)
KINDS = {"weights": optax.adam(1e-2), "learned": optax.adam(1e-3), "fixed": optax.set_to_zero()}


def saved(folder, tree):
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(folder, tree)


def restored(folder, *like):
    with ocp.StandardCheckpointer() as checkpointer:
        return checkpointer.restore(folder, *like)


def ran(step, state, steps):
    losses = []
    for _ in range(steps):
        state, loss = step(state)
        losses.append(np.asarray(loss).item())
    return state, losses


def goes_on(step, start, folder):
    """Losses with and without a save in between."""
    middle, first = ran(step, start, SAVED)
    _, whole = ran(step, middle, STEPS - SAVED)
    saved(folder / "step", middle)
    again = restored(folder / "step", jax.eval_shape(lambda: start))  # by the shapes of a fresh start, as people do
    jax.tree.map(np.testing.assert_array_equal, again, middle)
    _, rest = ran(step, again, STEPS - SAVED)
    assert rest == whole and len({*first, *whole}) == STEPS  # each step has a loss of its own: nothing stands still by chance


def scanned(p, x):
    layer = lambda h, w: (h + jnp.tanh(h @ w["kernel"] + w["bias"]), None)  # noqa: E731
    return jax.lax.scan(jax.checkpoint(layer), x, p["model"]["layers"])[0]


def test_a_plain_function(tmp_path):
    layers = {"kernel": normal(LAYERS, WIDTH, WIDTH, seed=2) / 4, "bias": jnp.zeros((LAYERS, WIDTH))}
    fq, params = qjax.fake_quant(scanned, POLICY), {"model": {"layers": layers}}
    quant = fq.init(jax.random.key(0), params, X)
    assert set(quant) == {"weights", "activations", "step", "seed", "held", "policy"}
    both = {"params": params, "quant": quant}
    tx = optax.multi_transform(KINDS, {"params": jax.tree.map(lambda _: "weights", params), "quant": fq.labels(quant)})

    @jax.jit
    def step(state):
        both, opt, number = state["both"], state["opt"], state["number"]
        value, by = jax.value_and_grad(lambda both: jnp.mean((fq(both["params"], X, quant=both["quant"]) - Y) ** 2))(both)
        updates, opt = tx.update(by, opt, both)
        both = optax.apply_updates(both, updates)
        return {"both": {**both, "quant": fq.advance(both["quant"])}, "opt": opt, "number": number + 1}, value

    goes_on(step, {"both": both, "opt": tx.init(both), "number": jnp.int32(0)}, tmp_path)


def test_without_a_tree_of_shapes_and_with_another_policy(tmp_path):
    layers = {"kernel": normal(LAYERS, WIDTH, WIDTH), "bias": jnp.zeros((LAYERS, WIDTH))}
    fq, params = qjax.fake_quant(scanned, POLICY), {"model": {"layers": layers}}
    quant = fq.advance(fq.init(jax.random.key(0), params, X))
    saved(tmp_path / "quant", quant)
    again = restored(tmp_path / "quant")
    np.testing.assert_array_equal(fq(params, X, quant=again), fq(params, X, quant=quant))
    rule = Rule("*layers*", weight=qjax.int4(scale_rule="full"), activation=qjax.static(qjax.int8()), train=TRAIN)
    with pytest.raises(ValueError, match="`quant` is of another policy"):
        qjax.fake_quant(scanned, Policy([rule]))(params, X, quant=again)


class Layer(nn.Module):
    @nn.compact
    def __call__(self, h, _):
        return h + nn.tanh(nn.Dense(WIDTH)(h)), None


class Stack(nn.Module):
    @nn.compact
    def __call__(self, x):
        layers = nn.scan(nn.remat(Layer), variable_axes={"params": 0}, split_rngs={"params": True}, length=LAYERS, metadata_params={})
        return layers(name="layers")(x, None)[0]


def test_linen(tmp_path):
    model = qjax.linen.fake_quant(Stack(), POLICY)
    variables = qjax.linen.begin(model, jax.random.key(0), model.init(jax.random.key(1), X), X)
    tx = optax.multi_transform(KINDS, qjax.linen.labels(variables))

    @jax.jit
    def step(state):
        variables, opt = state["variables"], state["opt"]
        value, by = jax.value_and_grad(lambda v: jnp.mean((model.apply(v, X) - Y) ** 2))(variables)
        updates, opt = tx.update(by, opt, variables)
        return {"variables": qjax.linen.advance(optax.apply_updates(variables, updates)), "opt": opt, "number": state["number"] + 1}, value

    goes_on(step, {"variables": variables, "opt": tx.init(variables), "number": jnp.int32(0)}, tmp_path)


class Layers(nnx.Module):
    def __init__(self, rngs):
        self.layers = nnx.vmap(lambda rngs: nnx.Linear(WIDTH, WIDTH, rngs=rngs))(rngs.split(LAYERS))

    def __call__(self, x):
        step = nnx.scan(nnx.remat(lambda h, layer: h + nnx.tanh(layer(h))), in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
        return step(x, self.layers)


def test_nnx(tmp_path):
    trains = nnx.Any(nnx.Param, qjax.nnx.Learned)

    def start():
        model = qjax.nnx.begin(qjax.nnx.fake_quant(Layers(nnx.Rngs(0)), POLICY), jax.random.key(0), X)
        return model, nnx.Optimizer(model, optax.adam(1e-2), wrt=trains)

    @nnx.jit
    def step(model, optimizer):
        loss = lambda model: jnp.mean((model(X) - Y) ** 2)  # noqa: E731
        value, by = nnx.value_and_grad(loss, argnums=nnx.DiffState(0, trains))(model)
        optimizer.update(model, by)
        qjax.nnx.advance(model)
        return value

    def run(pair, steps):
        return [np.asarray(step(*pair)).item() for _ in range(steps)]

    pair = start()
    first = run(pair, SAVED)
    saved(tmp_path / "step", nnx.state(pair))
    whole = run(pair, STEPS - SAVED)

    graphdef, abstract = nnx.split(nnx.eval_shape(start))
    again = nnx.merge(graphdef, restored(tmp_path / "step", abstract))
    assert run(again, STEPS - SAVED) == whole and len({*first, *whole}) == STEPS

    other = start()  # and as plain dictionaries, whose keys of digits people make numbers again
    saved(tmp_path / "pure", nnx.to_pure_dict(nnx.state(again)))
    state = nnx.state(other)
    nnx.replace_by_pure_dict(state, nnx.restore_int_paths(restored(tmp_path / "pure")))
    nnx.update(other, state)
    assert run(other, 2) == run(again, 2)


