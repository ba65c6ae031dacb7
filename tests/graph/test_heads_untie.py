"""Rotations of heads in flat axes, and tied parameters that are taken apart."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import qjax
from qjax.graph import build, rotate, untie
from qjax.graph.heads import heads
from qjax.program import trace

D, KV, GROUP, HEAD, T = 12, 2, 3, 4, 5


def normal(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32) / shape[0] ** 0.5


def attend(p, x):
    """Grouped heads in flat axes, a bias on the values, softmax between."""
    b, t, _ = x.shape
    q = (x @ p["q"]).reshape(b, t, KV, GROUP, HEAD)
    k = (x @ p["k"]).reshape(b, t, KV, HEAD)
    v = (x @ p["v"] + p["bias"][None, None]).reshape(b, t, KV, HEAD)
    weights = jax.nn.softmax(jnp.einsum("btkgh,bskh->bkgts", jnp.sin(q), jnp.sin(k)), axis=-1)
    return jnp.einsum("bkgts,bskh->btkgh", weights, v).reshape(b, t, -1) @ p["o"]


def attention_params(seed=0):
    sizes = {"q": KV * GROUP * HEAD, "k": KV * HEAD, "v": KV * HEAD}
    p = {name: normal(D, n, seed=seed + i) for i, (name, n) in enumerate(sizes.items())}
    return p | {"o": normal(KV * GROUP * HEAD, D, seed=seed + 5), "bias": normal(KV * HEAD, seed=seed + 6)}


def rotated(fn, p, x, every=True):
    program = trace(fn, p, x)
    return rotate(program, jax.tree.leaves(p), [x], jax.random.key(0), every=every)


def test_grouped_heads_of_values_are_rotated_by_one_matrix():
    p, x = attention_params(), normal(2, T, D, seed=9)
    result = rotated(attend, p, x)
    (done,) = result.rotations
    assert (done.size, done.runs) == (HEAD, True)
    assert dict(done.rotated) == {"bias": (0,), "o": (0,), "v": (1,)}
    new = jax.tree.unflatten(jax.tree.structure(p), result.params)
    np.testing.assert_allclose(attend(new, x), attend(p, x), atol=2e-6)
    assert float(jnp.abs(new["v"] - p["v"]).max()) > 0.1
    # The same matrix for every head: what one was, the others were.
    r = jnp.linalg.lstsq(p["v"][:, :HEAD], new["v"][:, :HEAD])[0]
    np.testing.assert_allclose(r @ r.T, jnp.eye(HEAD), atol=1e-5)
    np.testing.assert_allclose(p["v"][:, HEAD:] @ r, new["v"][:, HEAD:], atol=1e-5)
    np.testing.assert_allclose(r.T @ p["o"].reshape(-1, HEAD, D), new["o"].reshape(-1, HEAD, D), atol=1e-5)


def test_heads_that_read_a_pruned_weight_stay():
    p, x = attention_params(), normal(2, T, D, seed=9)
    p = p | {"v": p["v"].at[::2, ::2].set(0), "bias": p["bias"].at[::2].set(0)}
    result = rotated(attend, p, x)
    assert not result.rotations and "25 % of v is exactly zero" in dict(result.refused)["o"]
    p["v"] = p["v"].at[::2].set(0)  # zeros of a bias are no pruning, and an input that nothing reads stays one
    assert dict(rotated(attend, p, x).rotations[0].zeros) == {}


def test_layers_of_a_scan_share_their_matrix():
    layers = jax.tree.map(lambda *leaves: jnp.stack(leaves), *(attention_params(10 * i) for i in range(3)))
    fn = lambda p, x: jax.lax.scan(lambda x, w: (x + jnp.tanh(attend(w, x)), None), x, p)[0]  # noqa: E731
    x = normal(2, T, D, seed=9)
    result = rotated(fn, layers, x)
    assert [(r.size, dict(r.rotated)) for r in result.rotations] == [(HEAD, {"bias": (1,), "o": (1,), "v": (2,)})]
    new = jax.tree.unflatten(jax.tree.structure(layers), result.params)
    np.testing.assert_allclose(fn(new, x), fn(layers, x), atol=5e-6)


@pytest.mark.parametrize("between", [jax.nn.relu, jnp.abs, lambda h: h * h, lambda h: jnp.where(h > 0, h, 2 * h), jnp.sort])
def test_a_value_that_is_bent_on_the_way_is_left_alone(between):
    p, x = {"a": normal(D, 8), "b": normal(8, 3, seed=1)}, normal(4, D, seed=2)
    fn = lambda p, x: between(x @ p["a"]) @ p["b"]  # noqa: E731
    program = trace(fn, p, x)
    assert not list(heads(build(program)))
    assert not rotated(fn, p, x).rotations


def test_a_factor_that_differs_inside_a_head_leaves_only_what_it_does_not_touch():
    """gate[.., kv, 2] times v[.., kv, 2 x 2]: channels in pairs have one factor, so pairs are what may be rotated."""
    p, x = {"v": normal(D, 8), "o": normal(8, 3, seed=1), "g": normal(D, 4, seed=3)}, normal(5, D, seed=2)

    def fn(p, x):
        v = (x @ p["v"]).reshape(5, 4, 2)
        return (v * jnp.tanh(x @ p["g"])[:, :, None]).reshape(5, 8) @ p["o"]

    (done,) = rotated(fn, p, x).rotations
    assert (done.size, done.runs, dict(done.rotated)) == (2, True, {"o": (0,), "v": (1,)})


def tied(p, tokens):
    x = p["embed"][tokens]
    x = x + jnp.tanh(x * jax.lax.rsqrt(jnp.mean(x * x, -1, keepdims=True) + 1e-6) * p["norm"][None] @ p["in"]) @ p["out"]
    x = x * jax.lax.rsqrt(jnp.mean(x * x, -1, keepdims=True) + 1e-6) * p["final"][None]
    return x @ p["embed"].T


def tied_params():
    sizes = {"embed": (11, D), "in": (D, 20), "out": (20, D)}
    p = {name: normal(*shape, seed=i) for i, (name, shape) in enumerate(sizes.items())}
    return p | {name: jnp.exp(normal(D, seed=i)) for i, name in enumerate(("norm", "final"), 7)}


def test_a_tied_head_behind_a_scale_is_refused_with_the_remedy():
    kept = qjax.rewrite(tied, tied_params(), [jnp.arange(6)], [qjax.rotation(key=jax.random.key(0))])
    assert not any(change.done for change in kept.changes) and kept.fn is tied
    (text,) = (change.text for change in kept.refused if change.path == "embed")
    assert "final scales it and" in text and "untie=True of qjax.rewrite gives the products of embed, which is looked up" in text


@pytest.mark.slow
def test_a_tied_head_behind_a_scale_needs_a_copy_and_gets_it():
    p, tokens = tied_params(), jnp.arange(6)
    step = qjax.rotation(key=jax.random.key(0))
    result = qjax.rewrite(tied, p, [tokens], [step], untie=True)
    assert [c.text for c in result.changes if c.step == "untie"] == ["its products read a copy of it, untied/embed"]
    assert {c.path for c in result.changes if "rotated by" in c.text} == {"embed", "in", "out", "untied/embed"}
    np.testing.assert_allclose(result.fn(result.params, tokens), tied(p, tokens), atol=3e-6)
    assert (result.params["final"] == 1).all()
    # It is a function as any other: the two are quantized apart.
    policy = qjax.Policy([qjax.Rule("embed", weight=None), qjax.Rule("*", weight=qjax.int8(), method=qjax.gptq())])
    packed = qjax.quantize(result.fn, result.params, policy, [tokens])
    rows = {row.path: row for row in packed.report.rows}
    assert rows["untied/embed"].method == "gptq" and rows["embed"].spec == ""
    got = jax.jit(qjax.quantized(result.fn))(packed.params, tokens)
    assert float(jnp.abs(got - tied(p, tokens)).max()) < 0.05 * float(jnp.abs(got).max())


def test_untying_changes_no_number():
    p, tokens = tied_params(), jnp.arange(6)
    new = untie(tied, p, tokens)
    np.testing.assert_array_equal(new.fn(new.params, tokens), tied(p, tokens))
    np.testing.assert_array_equal(jax.jit(new.fn)(new.params, tokens), jax.jit(tied)(p, tokens))
    other = dict(new.params, untied={"embed": 2 * p["embed"]})
    np.testing.assert_allclose(new.fn(other, tokens), 2 * tied(p, tokens), rtol=1e-5)
    shapes = jax.eval_shape(new.fn, new.params, jnp.arange(3))  # another shape is another trace
    assert shapes.shape == (3, 11)
    wrapped = untie(lambda p, t: tied(p[0], t), (p,), tokens)
    assert sorted(wrapped.params) == ["params", "untied"]
    np.testing.assert_array_equal(wrapped.fn(wrapped.params, tokens), tied(p, tokens))


def test_what_cannot_be_untied_is_named_and_what_need_not_be_stays():
    p = {"embed": normal(11, D), "w": normal(D, 3)}
    plain = untie(lambda p, t: p["embed"][t] @ p["w"], p, jnp.arange(3))
    assert plain.params is p and plain.paths == ()
    with pytest.raises(ValueError, match=r"'embed' cannot be untied.*a part"):
        untie(lambda p, t: p["embed"][t] @ p["embed"][:5].T, p, jnp.arange(3))
    with pytest.raises(ValueError, match="has an entry 'untied'"):
        untie(lambda p, t: p["embed"][t] @ p["embed"].T, p | {"untied": p["w"]}, jnp.arange(3))
