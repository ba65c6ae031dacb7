"""Training through rounding in the loops that people have: many seeds at once, data parallel, gradients in parts."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import qjax
from tests.program.cases import normal

RULE = qjax.Rule("*", weight=qjax.int3(), activation=qjax.static(qjax.int8()), train=qjax.lsq())
PARAMS = {"a": normal(8, 6) / 3, "b": normal(6, 4, seed=1) / 3}
X, Y = normal(8, 8, seed=2), normal(8, 4, seed=3)
FQ = qjax.fake_quant(lambda p, x: jax.nn.relu(x @ p["a"]) @ p["b"], qjax.Policy([RULE]))


def loss(both, x, y):
    return jnp.mean((FQ(both[0], x, quant=both[1]) - y) ** 2)


@pytest.fixture(scope="module")
def start():
    both = PARAMS, FQ.init(jax.random.key(0), PARAMS, X)
    return both, jax.jit(jax.value_and_grad(loss))(both, X, Y)


def same(got, want):
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5), got, want)


def test_data_parallel_by_sharding_and_by_shard_map(start):
    both, want = start
    mesh = jax.make_mesh((2,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    rows = NamedSharding(mesh, P("data"))
    same(jax.jit(jax.value_and_grad(loss))(jax.device_put(both, NamedSharding(mesh, P())), *jax.device_put((X, Y), rows)), want)

    def part(both, x, y):
        return jax.lax.pmean(loss(both, x, y), "data")

    whole = jax.shard_map(part, mesh=mesh, in_specs=(P(), P("data"), P("data")), out_specs=P())
    same(jax.jit(jax.value_and_grad(whole))(both, X, Y), want)


def test_gradients_in_parts_are_those_of_the_whole_batch(start):
    both, (_, want) = start
    optimizer = optax.MultiSteps(optax.sgd(1.0), 4)

    def step(carry, batch):
        updates, state = optimizer.update(jax.grad(loss)(carry[0], *batch), carry[1])
        return (optax.apply_updates(carry[0], updates), state), None

    parts = X.reshape(4, 2, 8), Y.reshape(4, 2, 4)
    (after, _), _ = jax.jit(lambda c, parts: jax.lax.scan(jax.checkpoint(step), c, parts))((both, optimizer.init(both)), parts)
    same(jax.tree.map(jnp.subtract, both, after), want)


@pytest.mark.slow
def test_seven_seeds_at_seven_widths_train_at_once():
    """The step of a state says how many bits there are: states that stand at different steps train at different widths."""

    def build(bits, train):
        policy = qjax.Policy([qjax.Rule("*", weight=qjax.integer(bits), train=train)])
        return qjax.fake_quant(lambda p, x: jax.nn.relu(x @ p["a"]) @ p["b"], policy)

    fq = build(2, qjax.qat(qjax.ste(), schedule=qjax.schedule(bits=tuple(zip(range(7), range(8, 1, -1), strict=True)))))
    keys = jax.random.split(jax.random.key(1), 7)
    many = jax.vmap(lambda key: jax.tree.map(lambda w: w + 0.1 * jax.random.normal(key, w.shape), PARAMS))(keys)
    states = {**jax.tree.map(lambda a: jnp.stack([a] * 7), fq.init(keys[0], PARAMS, X)), "step": jnp.arange(7.0)}

    def score(fq, p, q):
        return jnp.mean((fq(p, X, quant=q) - Y) ** 2)

    values, grads = jax.jit(jax.vmap(jax.value_and_grad(functools.partial(score, fq))))(many, states)
    assert len(set(values.tolist())) == 7
    for lane, bits in ((0, 8), (5, 3)):
        want = jax.value_and_grad(functools.partial(score, build(bits, None)))(jax.tree.map(lambda a, i=lane: a[i], many), None)
        same(jax.tree.map(lambda a, i=lane: a[i], (values, grads)), want)
