"""The shape of the sweep: its levels, and that its program does not grow with the weight."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import jaxprs_in_params

from qjax.core import int4
from qjax.ptq.gptq_solver import solve
from qjax.ptq.gptq_sweep import plan

SIZES = list(itertools.product([1, 5, 16, 100, 128, 300, 512, 1000, 4096, 4100, 11008], [1, 64, 128, 1000]))


@pytest.mark.parametrize("group", [None, 1, 3, 16, 48, 100, 128, 131, 1024])
def test_plan(group):
    for k, block_size in SIZES:
        check_plan(k, group, block_size)


def check_plan(k, group, block_size):
    p = plan(k, group, block_size)
    needed = k if group is None else -(-k // group) * p.padded_group
    assert all(a % b == 0 and a > b for a, b in zip(p.sizes, p.sizes[1:], strict=False))
    assert needed <= p.sizes[0]
    assert p.sizes[-1] <= 32 and (p.sizes[-1] >= 8 or group in (1, 3))
    if group is not None:
        assert group <= p.padded_group <= group + 15
        assert p.block in p.sizes and p.block % p.padded_group == 0
    if k >= 1000 and block_size < 1000:
        assert p.sizes[0] <= 1.15 * needed
    rows = np.asarray(p.spread(jnp.arange(1, k + 1), 0))
    assert rows.shape == (p.sizes[0],) and np.count_nonzero(rows) == k
    np.testing.assert_array_equal(p.collect(rows), np.arange(1, k + 1))


def equations(jaxpr):
    """The number of equations, those of inner programs included."""
    return sum(1 + sum(equations(inner) for inner in jaxprs_in_params(e.params)) for e in jaxpr.eqns)


@pytest.mark.parametrize("spec", [int4(group_size=128), int4()], ids=str)
def test_program_size_does_not_grow_with_the_weight(spec):
    def count(n, k):
        shapes = [jax.ShapeDtypeStruct(s, jnp.float32) for s in ((n, k), (k, k))]
        return equations(jax.make_jaxpr(lambda w, h: solve(w, h, spec))(*shapes).jaxpr)

    assert count(64, 2048) == count(4096, 16384) < 1000


def test_memory_is_a_few_copies_of_the_weight():
    n = k = 1024
    shapes = [jax.ShapeDtypeStruct(s, jnp.float32) for s in ((n, k), (k, k))]
    analysis = solve.lower(*shapes, int4(group_size=128)).compile().memory_analysis()
    if analysis is not None:
        assert analysis.temp_size_in_bytes < 12 * 4 * k * k
