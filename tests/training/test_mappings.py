"""Parameters, states and variables in other mappings than dictionaries, such as `flax.core.FrozenDict`, train, and keep their kind."""

import collections

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax.core import FrozenDict, freeze

import qjax
from qjax import Policy, Rule
from tests.program.cases import normal

KEY, STATIC = jax.random.key(0), qjax.static(qjax.int8())
PARAMS, X = {"b": normal(8, 8) / 3, "a": normal(8, 4, seed=1) / 3}, normal(5, 8, seed=2)
TRAIN = qjax.qat(qjax.lsq(), qjax.moving_range(0.5), schedule=qjax.schedule(freeze=2))
FQ = qjax.fake_quant(lambda p, x: jnp.tanh(x @ p["b"]) @ p["a"], Policy([Rule("*", weight=qjax.int4(), activation=STATIC, train=TRAIN)]))


def backwards(tree):
    """Nested `OrderedDict`s, whose leaves jax has in their own order."""
    if not isinstance(tree, dict):
        return tree
    return collections.OrderedDict((name, backwards(tree[name])) for name in sorted(tree, reverse=True))


@pytest.mark.parametrize("kind", [freeze, backwards])
def test_a_state_goes_through_every_verb_and_keeps_its_kind(kind):
    quant = FQ.init(KEY, PARAMS, X)
    other = kind(quant)
    np.testing.assert_array_equal(FQ(kind(PARAMS), X, quant=other), FQ(PARAMS, X, quant=quant))
    pairs = [(FQ.advance(quant), FQ.advance(other)), (FQ.calibrate(quant, PARAMS, [2 * X]), FQ.calibrate(other, PARAMS, [2 * X])),
             (FQ.tracked(PARAMS, 2 * X, quant=quant)[1], FQ.tracked(PARAMS, 2 * X, quant=other)[1]),
             (FQ.stepped(PARAMS, 2 * X, quant=quant)[1], FQ.stepped(PARAMS, 2 * X, quant=other)[1])]  # fmt: skip
    for plain, same in pairs:
        assert jax.tree.structure(same) == jax.tree.structure(other)
        chex.assert_trees_all_equal(kind(plain), same)
    assert jax.tree.structure(FQ.labels(other)) == jax.tree.structure(other)
    chex.assert_trees_all_equal(FQ.carried(other, other), quant)
    late = {**quant, "step": jnp.float32(5)}
    results = [qjax.convert(FQ, PARAMS, X, quant=each).params for each in (late, kind(late))]
    chex.assert_trees_all_equal(*results)


def test_frozen_variables_train_in_a_loop():
    """As dictionaries do, to the bit; `begin` gives dictionaries, and whoever freezes them keeps frozen ones."""
    model = qjax.linen.fake_quant(nn.Dense(4), Policy([Rule("kernel", weight=qjax.int4(), train=qjax.qat(
        qjax.lsq(), schedule=qjax.schedule(freeze=2)))]))  # fmt: skip
    plain = qjax.linen.begin(model, KEY, freeze(model.init(KEY, X)), X)

    def run(variables):
        kinds = {"weights": optax.adam(1e-2), "learned": optax.adam(1e-2), "fixed": optax.set_to_zero()}
        tx = optax.multi_transform(kinds, qjax.linen.labels(variables))

        def step(carry, _):
            variables, state = carry
            by = jax.grad(lambda v: jnp.sum(model.apply(v, X) ** 2))(variables)
            updates, state = tx.update(by, state, variables)
            return (qjax.linen.advance(optax.apply_updates(variables, updates)), state), None

        return jax.lax.scan(step, (variables, tx.init(variables)), None, length=4)[0][0]

    frozen = run(freeze(plain))
    assert isinstance(frozen, FrozenDict)
    chex.assert_trees_all_equal(frozen, freeze(run(plain)))
    packed = [qjax.linen.convert(model, each, X).params for each in (frozen, frozen.unfreeze())]
    np.testing.assert_array_equal(*(qjax.quantized(nn.Dense(4).apply)(each, X) for each in packed))
