"""Rotations on every family: the float function stays, heads and streams are found, and what is quantized afterwards is close."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import qjax
from tests.families.families import NAMES, family

# Families with flat heads, and the last parts of the paths of what makes their values.
HEADS = {"decoder, linen": "self_attn/v_proj/kernel", "decoder, nnx": "v/kernel"}
CASES = [pytest.param(n, marks=() if n == "decoder, nnx" else pytest.mark.slow) for n in NAMES]


def distance(got, want):
    got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
    return np.linalg.norm(got - want) / np.linalg.norm(want)


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_the_float_function_stays(name):
    model = family(name)
    result = qjax.rewrite(model.fn, model.params, model.data, [qjax.rotation(key=jax.random.key(0), every=True)], untie=True)
    want = jax.tree.leaves(model.fn(model.params, *model.data[1]))
    got = jax.tree.leaves(result.fn(result.params, *model.data[1]))
    for a, b in zip(got, want, strict=True):
        assert distance(a, b) < (0.1 if "bf16" in name else 2e-5)
    rotated = {change.path for change in result.changes if "rotated by" in change.text}
    in_runs = {change.path for change in result.changes if "each run of its channels" in change.text}
    if "experts" in name or "decoder" in name or "scanned" in name:
        assert any("embed" in path for path in rotated)
    if name in HEADS:
        assert any(path.endswith(HEADS[name]) for path in in_runs)


@pytest.mark.parametrize("name", [pytest.param(n, marks=() if n == "scanned, nnx" else pytest.mark.slow) for n in NAMES])
def test_on_line_rotations_of_all_that_can_have_one(name):
    model = family(name)
    policy = qjax.Policy([qjax.Rule("*", weight=qjax.int8())])
    rows = [row for row in qjax.sites(model.fn, policy)(model.params, *model.data[0]).rows if row.spec]
    weights = [row.path for row in rows if "conv_general_dilated" not in row.ops and set(row.ops) != {"gather"}]
    method = qjax.online_rotation()
    rules = [qjax.Rule(path, weight=qjax.int8(), activation=qjax.dynamic(qjax.int8()), method=method) for path in weights]
    result = qjax.quantize(model.fn, model.params, qjax.Policy(rules), model.data)
    got = jax.jit(qjax.quantized(model.fn))(result.params, *model.data[1])
    want = model.fn(model.params, *model.data[1])
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert not jnp.issubdtype(b.dtype, jnp.floating) or distance(a, b) < 0.1
    assert {row.method for row in result.report.rows if row.spec} == {"online_rotation"}
