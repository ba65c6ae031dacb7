"""Products of two activations: found wherever they stand, under names that are stable and unique."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from jax import lax

import qjax
from qjax.program.products import _without_vmap
from tests.program.cases import CASES, normal

X = normal(2, 5, 8)


def mix(q, k, v):
    with jax.named_scope("mix"):
        return jnp.einsum("bts,bsd->btd", jax.nn.softmax(jnp.einsum("btd,bsd->bts", q, k)), v)


def layers(p, x):
    for i, w in enumerate(p["w"]):
        with jax.named_scope(f"layer/{i}"):
            x = x + mix(x @ w, x, x)
    return x


PARAMS = {"w": [normal(8, 8), normal(8, 8, seed=1)]}
NAMES = [f"layer/{i}/mix:dot_general.{j}" for i in (0, 1) for j in (0, 1)]


def names(fn, *args):
    return [product.name for product in qjax.trace(fn, *args).products]


def test_names_do_not_change_when_a_function_is_wrapped():
    assert names(layers, PARAMS, X) == NAMES
    jitted, remat = jax.jit(layers), jax.checkpoint(layers)
    assert names(jitted, PARAMS, X) == names(remat, PARAMS, X) == NAMES
    assert names(jax.vmap(layers, in_axes=(None, 0)), PARAMS, X[None]) == NAMES
    assert names(layers, PARAMS, normal(3, 9, 8)) == NAMES
    shapes = jax.eval_shape(lambda: (PARAMS, X))
    assert names(layers, *shapes) == NAMES


def test_what_is_known_of_a_product():
    scores, values = qjax.trace(layers, PARAMS, X).products[:2]
    assert (scores.op, scores.shapes, scores.out_shape) == ("dot_general", ((2, 5, 8), (2, 5, 8)), (2, 5, 5))
    assert (scores.contracted, scores.batch) == (((2,), (2,)), ((0,), (0,)))
    assert scores.scope == "layer/0/mix/btd,bsd->bts"
    # The einsum may swap its operands; what made them says which is which.
    assert set(values.made_by) == {"div", "input"} and scores.made_by[0] == "dot_general"
    assert not (scores.refusal or scores.opaque or scores.sharded or scores.condition or scores.custom_rule or scores.scans)


def test_scans_over_layers_count_as_turns_and_scans_over_time_do_not():
    def stacked(p, x):
        body = jax.checkpoint(lambda x, w: (mix(x @ w, x, x), None))
        return lax.scan(body, x, p["w"])[0]

    def over_time(p, x):
        return lax.fori_loop(0, 3, lambda i, x: mix(x @ p["w"][0], x, x), x)

    params = {"w": normal(3, 8, 8)}
    program = qjax.trace(stacked, params, X)
    assert [(p.name, p.turns) for p in program.products] == [("mix:dot_general.0", (3,)), ("mix:dot_general.1", (3,))]
    assert program.products[0].scans == program.sites[0].scans
    timed = qjax.trace(over_time, params, X).products
    assert [(p.turns, p.opaque) for p in timed] == [((), True)] * 2


def test_branches_loops_and_custom_rules():
    @jax.custom_vjp
    def squared(x):
        return x @ x.T

    squared.defvjp(lambda x: (squared(x), x), lambda x, t: (t @ x + t.T @ x,))

    def fn(p, x):
        x = lax.cond(x.sum() > 0, lambda x: x @ x.T @ x, lambda x: x, x)
        x = lax.while_loop(lambda x: jnp.sum(x @ x.T) < 1e3, lambda x: x + x @ x.T @ x, x)
        return squared(x) @ (x @ p["w"])

    found = qjax.trace(fn, {"w": normal(8, 3)}, normal(4, 8)).products
    assert [p.name for p in found] == [f":dot_general.{i}" for i in range(len(found))] and len(found) == 7
    assert [p.condition for p in found] == [False, False, True, False, False, False, False]
    assert [p.refusal for p in found if p.custom_rule] == ["it stands inside a custom derivative rule, which stays as it is"]
    assert [p.opaque for p in found] == [True] * 5 + [False] * 2


def test_a_parameter_seen_through_views_is_no_product_and_a_computed_one_is():
    def fn(p, x):
        y = (x @ p["w"].T.reshape(8, 8)) @ p["w"]
        return y @ (p["w"] * p["mask"]) @ jnp.arange(16).reshape(8, 2).astype(jnp.float32)

    program = qjax.trace(fn, {"w": normal(8, 8), "mask": jnp.ones((8, 8))}, normal(3, 8))
    assert len(program.sites) == 2
    assert [p.made_by[1] for p in program.products] == ["mul", "iota"]


def test_products_that_cannot_multiply_integers_say_why():
    def fn(p, x):
        counts = jnp.ones((3, 3), jnp.int32)
        return x @ p["w"], counts @ counts, lax.dot_general(x, x, (((), ()), ((), ())))

    found = qjax.trace(fn, {"w": normal(8, 8)}, normal(3, 8)).products
    assert [p.refusal for p in found] == ["it multiplies int32 by int32, not floating numbers", "it contracts no axis"]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_program_has_unique_names_and_the_sites_it_had(case):
    program = qjax.trace(case.fn, case.params, *case.inputs)
    assert len({p.name for p in program.products}) == len(program.products)
    assert len(program.products) == (2 if case.name == "grouped_attention_bf16" else 0)
    assert len(program.sites) == len(case.sites)


def test_linen_and_nnx_modules():
    linen = nn.MultiHeadDotProductAttention(num_heads=2, name="attn")
    assert names(linen.apply, linen.init(jax.random.key(0), X), X) == ["attn:dot_general.0", "attn:dot_general.1"]
    module = nnx.MultiHeadAttention(num_heads=2, in_features=8, rngs=nnx.Rngs(0), decode=False)
    program = qjax.trace(qjax.nnx.function(module), nnx.state(module), X)
    # NNX puts no module in the name stack: the numbers run through the whole program.
    assert [p.name for p in program.products] == [":dot_general.0", ":dot_general.1"]
    assert all(p.name in str(program) for p in program.products)
    assert "2 products of two activations, which stay float unless a rule names them" in str(program)


@pytest.mark.parametrize(
    ("stack", "bare"),
    [("a/vmap(b/0)/c", "a/b/0/c"), ("vmap(vmap(x))/jvp(vmap())", "x/jvp()"), ("transpose(jvp(vmap(a)))", "transpose(jvp(a))"), ("", "")],
)
def test_vmap_is_no_scope(stack, bare):
    assert _without_vmap(stack) == bare
