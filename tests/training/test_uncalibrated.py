"""A state whose ranges no data has set says so in its structure: nothing computes with it, compiled neither, until there are data."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from flax import nnx

import qjax
from qjax import Policy, Rule
from tests.program.cases import normal

KEY, STATIC = jax.random.key(0), qjax.static(qjax.int8())
PARAMS, X = {"a": normal(8, 8) / 3, "b": normal(8, 4, seed=1) / 3}, normal(5, 8, seed=2)
SHAPE = jax.ShapeDtypeStruct(X.shape, X.dtype)


def fn(p, x):
    with jax.named_scope("scores"):
        s = jnp.einsum("bd,cd->bc", x, x)
    return jnp.tanh(s @ x @ p["a"]) @ p["b"]


LSQ = Rule("*", weight=qjax.int4(), activation=STATIC, train=qjax.lsq())
FOLLOWS = Rule("a", weight=qjax.int8(), activation=STATIC, train=qjax.moving_range(0.5))
FQ = qjax.fake_quant(fn, Policy([LSQ]))
SAYS = r"`quant` has no range of the activations 'a' yet: .*arrays and not shapes, or call quant = fq\.calibrate\(quant, params, batches\)"


def test_training_that_is_compiled_is_refused_while_it_is_traced():
    quant = FQ.init(KEY, PARAMS, SHAPE)
    several = jax.tree.map(lambda a: jnp.stack([a, a]), quant)
    calls = [
        lambda: jax.jit(lambda p, q: FQ(p, X, quant=q))(PARAMS, quant), lambda: jax.eval_shape(lambda q: FQ(PARAMS, X, quant=q), quant),
        lambda: jax.jit(jax.grad(lambda p: FQ(p, X, quant=quant).sum()))(PARAMS), lambda: FQ.leaves(PARAMS, X, quant=quant),
        lambda: jax.jit(jax.vmap(lambda q: FQ(PARAMS, X, quant=q)))(several), lambda: qjax.convert(FQ, PARAMS, X, quant=quant),
        lambda: jax.jit(lambda q: FQ(PARAMS, X, quant=q))(FQ.advance(quant)),
    ]  # fmt: skip
    for call in calls:
        with pytest.raises(ValueError, match=SAYS):
            call()
    assert FQ.labels(quant)["uncalibrated"] == "fixed"


def test_data_and_another_states_ranges_take_the_mark_away():
    quant, begun = FQ.init(KEY, PARAMS, SHAPE), FQ.init(KEY, PARAMS, X)
    for done in (FQ.calibrate(quant, PARAMS, [X]), FQ.carried(begun, quant)):
        assert jax.tree.structure(done) == jax.tree.structure(begun)
        np.testing.assert_array_equal(jax.jit(lambda q: FQ(PARAMS, X, quant=q))(done), jax.jit(lambda q: FQ(PARAMS, X, quant=q))(begun))
    kept = FQ.carried(quant, begun)  # ranges that are unknown are not carried
    assert all(bool(jnp.isfinite(a).all()) for a in jax.tree.leaves(kept)) and kept.keys() == begun.keys()
    product = Rule("*scores:*", activation=STATIC, train=qjax.lsq())
    more = qjax.fake_quant(fn, Policy([product, LSQ]))
    with pytest.raises(ValueError, match="`quant` has no range of the activations"):  # the other has none for the product
        jax.jit(lambda q: more(PARAMS, X, quant=q))(more.carried(begun, more.init(KEY, PARAMS, SHAPE)))


def test_states_for_seeds_are_marked_and_states_without_ranges_are_not():
    many = jax.vmap(lambda key: FQ.init(key, PARAMS, SHAPE))(jax.random.split(KEY, 2))
    with pytest.raises(ValueError, match=SAYS):
        jax.vmap(lambda q: FQ(PARAMS, X, quant=q))(many)
    for rule in (Rule("*", weight=qjax.int4(), train=qjax.lsq()), FOLLOWS):
        fq = qjax.fake_quant(fn, Policy([rule]))
        assert "uncalibrated" not in fq.init(KEY, PARAMS, SHAPE)


def test_ranges_that_follow_begin_with_the_first_batch_and_wait_for_those_that_do_not():
    fq = qjax.fake_quant(fn, Policy([FOLLOWS]))
    quant = fq.init(KEY, PARAMS, SHAPE)
    _, moved = jax.jit(lambda q: fq.tracked(PARAMS, X, quant=q))(quant)
    assert jax.tree.structure(moved) == jax.tree.structure(quant)
    assert jax.jit(lambda q: jnp.isfinite(fq(PARAMS, X, quant=q)).all())(moved)
    mixed = qjax.fake_quant(fn, Policy([FOLLOWS, LSQ]))
    quant = mixed.init(KEY, PARAMS, SHAPE)
    for call in (mixed.tracked, mixed.stepped):
        with pytest.raises(ValueError, match="`quant` has no range of the activations 'b' yet"):
            jax.jit(lambda q, call=call: call(PARAMS, X, quant=q))(quant)
    _, moved = mixed.tracked(PARAMS, X, quant=mixed.calibrate(quant, PARAMS, [X]))
    assert "uncalibrated" not in moved


def test_the_shapes_of_a_state_are_those_of_one_that_has_its_ranges(tmp_path):
    """However they are made: what is restored by them was trained, and goes on."""
    quant = FQ.init(KEY, PARAMS, X)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "quant", quant)
    shapes = [jax.eval_shape(FQ.init, KEY, PARAMS, X), jax.eval_shape(lambda: FQ.init(KEY, PARAMS, SHAPE))]
    assert shapes[0] == shapes[1]
    with ocp.StandardCheckpointer() as checkpointer:
        again = checkpointer.restore(tmp_path / "quant", shapes[1])
    np.testing.assert_array_equal(FQ(PARAMS, X, quant=again), FQ(PARAMS, X, quant=quant))
    with pytest.raises(TypeError, match=r"`params` holds shapes, and a state begins with numbers: .* jax\.eval_shape\(fq\.init, key"):
        FQ.init(KEY, jax.eval_shape(lambda: PARAMS), X)


def test_modules_name_their_own_remedy():
    policy = Policy([Rule("kernel", weight=qjax.int4(), activation=STATIC, train=qjax.lsq())])
    model = qjax.linen.fake_quant(nn.Dense(4), policy)
    plain = model.init(KEY, X)
    variables = qjax.linen.begin(model, KEY, plain, SHAPE)
    with pytest.raises(ValueError, match=r"no range of the activations 'kernel' yet: give qjax\.linen\.begin arrays and not shapes"):
        jax.jit(model.apply)(variables, X)
    assert jax.jit(model.apply)(qjax.linen.begin(model, KEY, variables, X), X).shape == (5, 4)
    module = qjax.nnx.begin(qjax.nnx.fake_quant(nnx.Linear(8, 4, rngs=nnx.Rngs(0)), policy), KEY, SHAPE)
    with pytest.raises(ValueError, match=r"no range of the activations 'kernel' yet: give qjax\.nnx\.begin arrays and not shapes"):
        nnx.jit(lambda m: m(X))(module)
    assert nnx.jit(lambda m: m(X))(qjax.nnx.begin(module, KEY, X)).shape == (5, 4)
