"""Where programs that one can see through are cut into blocks."""

import jax
import jax.numpy as jnp
import pytest

from qjax.program import trace
from qjax.program.flatten import flatten
from qjax.program.segments import Cutter
from qjax.ptq.blocks import Flow, find_blocks, why_not_tuned
from tests.ptq.layers import SHAPES, D, L, layers_params, scanned, stacked_params, unrolled


def blocks_of(fn, params, *inputs, span=1, without=()):
    program = trace(fn, params, *inputs)
    cutter = Cutter(flatten(program, unroll=True), len(program.leaves))
    flow = Flow(cutter, {site.key for site in program.sites})
    names = {site.key: program.leaves[site.leaf].path for site in program.sites}
    at = [p for p, eqn in enumerate(cutter.graph.eqns) if eqn.key in names and not set(names[eqn.key].split("/")) & set(without)]
    found = find_blocks(flow, at, span)
    return [[names[cutter.graph.eqns[p].key].split("/")[-1] for p in block.members] for block in found], found, flow


@pytest.mark.parametrize("form", ["scanned", "unrolled"])
def test_blocks_are_cut_where_one_value_crosses(form):
    fn, params = (scanned, stacked_params()) if form == "scanned" else (unrolled, layers_params())
    members, found, flow = blocks_of(fn, params, jnp.ones((2, 4, D)))
    assert members == [["q", "k", "v", "o"], ["gate", "up", "down"]] * L
    assert all(len(block.outputs) == 1 and not why_not_tuned(flow, block) for block in found)
    rest = [[flow.graph.eqns[p] for p in range(b.start, b.stop) if p not in b.first] for b in found]
    keys = [flow.cutter.segment(b.start, b.stop, b.outputs, eqns).key for b, eqns in zip(found, rest, strict=True)]
    assert keys[0] == keys[2] and keys[1] == keys[3] and keys[0] != keys[1]
    assert blocks_of(fn, params, jnp.ones((2, 4, D)), span=2)[0] == [list(SHAPES)] * L
    assert blocks_of(fn, params, jnp.ones((2, 4, D)), without=("k", "up"))[0] == [["q", "v", "o"], ["gate", "down"]] * L


def test_blocks_of_other_programs():
    chain = lambda p, x: jax.nn.relu(x @ p["a"]) @ p["b"]  # noqa: E731
    members, found, flow = blocks_of(chain, {"a": jnp.ones((4, 4)), "b": jnp.ones((4, 4))}, jnp.ones((2, 4)))
    assert members == [["a"], ["b"]]
    # The cut lies behind what is not linear, not in front of it.
    assert flow.graph.eqns[found[1].start].name == "dot_general"

    def memory(p, x, y):
        x, y = x * p["s"], y * p["s"]
        x = x + jax.nn.relu(x @ p["e1"]) @ p["e2"]
        for _ in range(9):
            y = y + jax.nn.relu(y @ p["d1"]) @ x.T @ p["d2"]
        return y

    p = {"e1": jnp.ones((4, 4)), "e2": jnp.ones((4, 4)), "d1": jnp.ones((4, 4)), "d2": jnp.ones((2, 4)), "s": jnp.ones(4)}
    members, _, _ = blocks_of(memory, p, jnp.ones((2, 4)), jnp.ones((2, 4)))
    # Behind the encoder two values cross everywhere; so many weights are cut again.
    assert members[:9] == [["e1", "e2"], *[["d1", "d2"]] * 8]
    one = lambda p, x: (x * p["s"] @ p["a"]) * (x * p["s"] @ p["b"])  # noqa: E731
    assert blocks_of(one, {"a": jnp.ones((4, 4)), "b": jnp.ones((4, 4)), "s": jnp.ones(4)}, jnp.ones((2, 4)))[0] == [["a", "b"]]

    def looped(p, x):
        return jax.lax.while_loop(lambda c: jnp.sum(c) < 10, lambda c: c + 1, x @ p["a"])

    _, found, flow = blocks_of(looped, {"a": jnp.ones((4, 4))}, jnp.ones((2, 4)))
    assert "`while`" in why_not_tuned(flow, found[0])
