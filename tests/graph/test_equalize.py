"""Cross-layer equalization against its formula, until nothing moves, and where there is no pair."""

import jax
import jax.numpy as jnp
import numpy as np

from qjax.graph import equalize
from qjax.program import trace
from tests.graph.programs import BLOCK, TOKENS, pre_norm_block, stack
from tests.program.cases import normal


def test_two_layers_by_the_formula():
    p = {"a": normal(8, 6) * jnp.array([1.0, 50.0, 0.1, 3.0, 1.0, 0.0]), "b": normal(6), "c": normal(6, 4)}
    x = normal(5, 8)
    program = trace(lambda p, x: jax.nn.relu(x @ p["a"] + p["b"]) @ p["c"], p, x)
    result = equalize(program, jax.tree.leaves(p), [x])
    first, second = np.abs(p["a"]).max(0), np.abs(p["c"]).max(1)
    s = np.where(first > 0, np.sqrt(first / second), 1)  # a channel that is always zero stays as it is
    for new, want in zip(result.params, (p["a"] / s, p["b"] / s, p["c"] * s[:, None]), strict=True):
        np.testing.assert_allclose(new, want, rtol=1e-5)
    live = first > 0
    np.testing.assert_allclose(np.abs(result.params[0]).max(0)[live], np.abs(result.params[2]).max(1)[live], rtol=1e-5)

    # The root mean square over both sides of how far a channel's range is from the mean of its side; no other scales give less.
    def spread(a, c):
        logs = np.log(np.stack([np.abs(a).max(0)[live], np.abs(c).max(1)[live]]))
        return np.exp(np.sqrt(np.var(logs, axis=1).mean()))

    before, after = result.pairs[0].spread
    np.testing.assert_allclose((before, after), (spread(p["a"], p["c"]), spread(result.params[0], result.params[2])), rtol=1e-5)
    others = [np.exp(np.asarray(normal(6, seed=20 + i))) for i in range(20)]
    assert after < 0.9 * before and all(spread(p["a"] / t, p["c"] * t[:, None]) > after for t in others)
    assert result.rounds == 2 and result.error < 4e-6 and result.refused == (("a", "the scale would reach an input of the program"),)


def test_three_layers_come_to_rest():
    p = {name: normal(6, 6, seed=i) * jnp.exp(2 * normal(6, seed=10 + i)) for i, name in enumerate("abc")}
    x = normal(5, 6)
    program = trace(lambda p, x: jax.nn.relu(jax.nn.relu(x @ p["a"]) @ p["b"]) @ p["c"], p, x)
    result = equalize(program, jax.tree.leaves(p), [x])
    again = equalize(program, result.params, [x])
    assert 2 < result.rounds < 50 and again.rounds == 1
    assert [(pair.producers, pair.consumers) for pair in result.pairs] == [(("a",), ("b",)), (("b",), ("c",))]
    a, b, c = (np.abs(w) for w in result.params)
    np.testing.assert_allclose(a.max(0), b.max(1), rtol=3e-3)
    np.testing.assert_allclose(b.max(0), c.max(1), rtol=3e-3)


def test_stacked_layers_of_a_transformer():
    """Each layer has its own scales; heads that share a value projection share theirs; norms are kept."""
    params = stack(BLOCK, 2)
    leaves = jax.tree.leaves(params)

    def fn(p, x):
        return jax.lax.scan(lambda x, w: (pre_norm_block(w, x), None), x, p)[0]

    program = trace(fn, params, TOKENS)
    result = equalize(program, leaves, [TOKENS])
    assert {(pair.producers, pair.consumers) for pair in result.pairs} == {(("v",), ("o",)), (("up",), ("down",))}
    new = jax.tree.unflatten(jax.tree.structure(params), result.params)
    assert (new["norm1"] == params["norm1"]).all() and (new["q"] == params["q"]).all()
    up, down = np.abs(new["up"]).max(1), np.abs(new["down"]).max(2)
    np.testing.assert_allclose(up, down, rtol=1e-3)
    assert {path for path, _ in result.refused} == {"q", "k", "v", "gate", "up"}


def test_nothing_to_do():
    p, x = {"a": normal(4, 4), "b": normal(4, 4)}, normal(3, 4)
    result = equalize(trace(lambda p, x: jnp.tanh(x @ p["a"]) @ p["b"], p, x), jax.tree.leaves(p), [x])
    assert result.rounds == 0 and not result.pairs and result.error == 0 and len(result.refused) == 2
