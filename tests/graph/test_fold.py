"""Folds: what is found and what is refused in every program, and that the function stays while the parameters change."""

import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import qjax.graph
from qjax.graph import Fold, NoFold, NotPreserved, apply_fold, channels, exact_scales, find_fold, find_folds, verifier, verify, verify_fold
from qjax.program import shared_inputs, trace
from tests.graph.programs import EXAMPLES
from tests.parameters import every_other
from tests.program.cases import CASES, normal

FOLDED_CASES = {
    "grouped_attention_bf16": {"o": {"v": (-1.0,), "o": (1.0,)}},
    "tied_embedding": {"embed": {"scale": (-2.0,), "embed": (1.0,)}},
    "frozen": {"b": {"a": (-1.0,), "b": (1.0,)}},
    "conv": {"depthwise": {"conv": (-1.0,), "depthwise": (1.0,)}, "head": {"depthwise": (-1.0,), "head": (1.0,)}},
}


def exponents(fold):
    return {scaling.path: scaling.exponents for scaling in fold.scalings}


def check(fold, params, compare):
    """The function stays for random scales; every parameter that the fold names changes; x's channels get their scale."""
    size, index = channels(fold)
    assert set(index.ravel()) == set(range(size))
    s = np.exp(np.random.default_rng(1).uniform(-np.log(4), np.log(4), fold.shape))
    for scales in (exact_scales(fold), s):
        new = apply_fold(fold, params, scales)
        assert compare(new) >= 0
    changed = {i for i, (a, b) in enumerate(zip(params, new, strict=True)) if not np.array_equal(a, b)}
    assert changed == {scaling.leaf for scaling in fold.scalings} and len(changed) >= 1
    assert all(a.dtype == b.dtype and a.shape == b.shape for a, b in zip(params, new, strict=True))


@pytest.mark.parametrize("example", every_other(EXAMPLES), ids=str)
def test_examples(example):
    program = trace(example.fn, example.params, *example.inputs)
    answers, params = find_folds(program), jax.tree.leaves(example.params)
    compare = verifier(program, params, jax.tree.leaves(example.inputs))
    assert [" ".join(site.path for site in group) for group, _ in answers] == [name.strip() for name in example.expected]
    for (_, answer), (name, expected) in zip(answers, example.expected.items(), strict=True):
        if isinstance(expected, str):
            assert isinstance(answer, NoFold) and expected in answer.reason, (name, answer)
        else:
            assert isinstance(answer, Fold), (name, answer)
            assert (exponents(answer), answer.shape) == expected, name
            check(answer, params, compare)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_shared_cases(case):
    program = trace(case.fn, case.params, *case.inputs)
    found, params = {}, jax.tree.leaves(case.params)
    for group, answer in find_folds(program):
        if isinstance(answer, Fold):
            found[group[0].path] = exponents(answer)
            check(answer, params, verifier(program, params, jax.tree.leaves(case.inputs)))
        else:
            assert answer.reason
    assert found == FOLDED_CASES.get(case.name, {})


def two_layers(p, x):
    return jax.nn.relu(x @ p["a"] * p["g"]) @ p["b"]


def first_fold(keep=()):
    p, x = {"a": normal(4, 6), "b": normal(6, 3), "g": normal(6)}, normal(5, 4)
    program = trace(two_layers, p, x)
    return program, find_fold(program, shared_inputs(program)[1], keep), jax.tree.leaves(p), [x]


def test_kept_parameters_are_kept():
    assert "g" in exponents(first_fold()[1]) or "a" in exponents(first_fold()[1])
    assert exponents(first_fold(keep=[2])[1]) == {"a": (-1.0,), "b": (1.0,)}
    assert exponents(first_fold(keep=[0])[1]) == {"b": (1.0,), "g": (-1.0,)}
    answer = first_fold(keep=[0, 2])[1]
    assert isinstance(answer, NoFold) and "to be kept" in answer.reason


def test_a_wrong_rewrite_is_not_accepted():
    program, fold, params, inputs = first_fold()
    new = apply_fold(fold, params, np.full(fold.shape, 2.0))
    wrong = [params[0], *new[1:]] if fold.scalings[0].path == "a" else [*new[:2], params[2]]
    with pytest.raises(NotPreserved, match="more than rounding explains"):
        verify(program, params, wrong, inputs)
    assert verify(program, params, wrong, inputs, tolerance=10.0) > 0.1
    assert verify_fold(program, fold, params, inputs) == 0


def test_nan_and_integers_are_compared():
    x = normal(3, 4)
    program = trace(lambda p, x: (jnp.argmax(x @ p), jnp.log(x @ p)), jnp.ones((4, 2)), x)
    assert verify(program, [jnp.ones((4, 2))], [jnp.ones((4, 2))], [x]) == 0
    with pytest.raises(NotPreserved, match="inf"):
        verify(program, [jnp.ones((4, 2))], [-jnp.ones((4, 2))], [x])


def test_results_that_say_nothing_prove_nothing():
    """NaN is alike NaN and zero alike zero whatever the parameters; a mask among finite values is no such case."""
    x, p = normal(3, 4), normal(4, 2)
    masked = trace(lambda p, x: jnp.where(jnp.arange(2) > 0, x @ p, -jnp.inf), p, x)
    assert verify(masked, [p], [p], [x]) == 0
    with pytest.raises(NotPreserved, match="more than rounding"):
        verify(masked, [p], [2 * p], [x])
    wide = trace(lambda p, x: (x @ p, 1 + 0 * x), p, x)
    with pytest.raises(NotPreserved, match="no finite value on this batch, which says nothing about a rewrite: give another batch"):
        verify(wide, [p], [2 * p], [x * jnp.nan])
    count = trace(lambda p, x: (jax.nn.relu(x @ p), len(x) + jnp.argmax(x @ p)), p, x)
    with pytest.raises(NotPreserved, match="all zero on this batch"):
        verify(count, [p], [2 * p], [0 * x])


def test_wrong_arguments_are_named():
    program, fold, params, _ = first_fold()
    with pytest.raises(ValueError, match=r"`s` has shape \(3,\)"):
        apply_fold(fold, params, np.ones(3))
    with pytest.raises(ValueError, match="`group` has no sites"):
        find_fold(program, ())
    other = trace(lambda p, x: jax.nn.relu(x) @ p, normal(4, 6), normal(5, 4))
    with pytest.raises(ValueError, match="not of this program"):
        find_fold(other, shared_inputs(program)[1])


def test_scales_may_be_traced_and_shared_by_all_layers():
    example = next(e for e in EXAMPLES if e.name == "scanned_shared_norm")
    program = trace(example.fn, example.params, *example.inputs)
    fold = find_folds(program)[1][1]
    params, s = jax.tree.leaves(example.params), 2.0 ** np.arange(-3, 4)
    eager = apply_fold(fold, params, s)
    jitted = jax.jit(lambda params, s: apply_fold(fold, params, s))(params, np.broadcast_to(s, fold.shape))
    for a, b in zip(eager, jitted, strict=True):
        np.testing.assert_array_equal(a, b)


def test_graph_names_no_architecture():
    names = r"llama|bert|gpt|mistral|mixtral|gemma|qwen|resnet|mobilenet|vit\b|phi\b|q_proj|self_attn|layernorm|input_layernorm"
    for file in pathlib.Path(qjax.graph.__file__).parent.glob("*.py"):
        assert not re.search(names, file.read_text().lower()), file
