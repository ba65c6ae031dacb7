"""Discovery: every site of every case is found, with the axes the program contracts."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import qjax
from qjax.program import producer, shared_inputs, trace
from tests.program.cases import CASES, normal


@pytest.mark.parametrize("case", CASES, ids=str)
def test_finds_the_sites_and_their_axes(case):
    program = trace(case.fn, case.params, *case.inputs)
    assert [(s.path, s.op, s.contracted, s.stacked) for s in program.sites] == case.sites
    for site in program.sites:
        axes = {*site.contracted, *site.kept, *site.stacked}
        assert axes == set(range(len(program.leaves[site.leaf].shape)))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_shapes_are_enough(case):
    shapes = jax.eval_shape(lambda: (case.params, case.inputs))
    program = trace(case.fn, shapes[0], *shapes[1])
    assert [s.key for s in program.sites] == [s.key for s in trace(case.fn, case.params, *case.inputs).sites]


def llama_block(p, x):
    """q, k, v share an input behind a norm; gate and up another; o and down follow a value and a gated product."""

    def norm(x, scale):
        return x * (jax.lax.rsqrt(jnp.mean(x * x, -1, keepdims=True) + 1e-5) * scale)

    h = norm(x, p["norm1"])
    q, k, v = ((h.astype(jnp.bfloat16) @ p[n].astype(jnp.bfloat16)).astype(jnp.float32) for n in "qkv")
    x = x + (jax.nn.softmax(q @ k.T) @ v + p["bias"]) @ p["o"]
    h = norm(x, p["norm2"])
    return x + (jax.nn.silu(h @ p["gate"]) * (h @ p["up"])) @ p["down"]


BLOCK = {n: normal(8, 8, seed=i) for i, n in enumerate("qkvo")} | {
    "gate": normal(8, 12),
    "up": normal(8, 12),
    "down": normal(12, 8),
    "norm1": jnp.ones(8),
    "norm2": jnp.ones(8),
    "bias": jnp.ones(8),
}


def test_sites_that_share_an_input_are_grouped_through_their_casts():
    program = trace(llama_block, BLOCK, normal(5, 8))
    assert [[s.path for s in group] for group in shared_inputs(program)] == [
        ["q", "k", "v"],
        ["o"],
        ["gate", "up"],
        ["down"],
    ]


def test_producers():
    program = trace(llama_block, BLOCK, normal(5, 8))
    found = {s.path: producer(program, s) for s in program.sites}
    assert (found["q"].kind, found["q"].name) == ("scale", "norm1")
    assert (found["up"].kind, found["up"].name) == ("scale", "norm2")
    assert (found["o"].kind, found["o"].biases) == ("operation", ("bias",))
    assert (found["down"].kind, found["down"].name) == ("operation", "mul")
    params = {"a": normal(8, 4), "b": normal(4), "c": normal(4, 3)}
    chain = trace(lambda p, x: (x @ p["a"] + p["b"]).reshape(-1, 4) @ p["c"], params, normal(5, 8))
    last = producer(chain, chain.sites[-1])
    assert (last.kind, last.name, last.biases) == ("site", "a", ("b",))


def test_queries_see_into_scans():
    def layers(p, x):
        def layer(x, w):
            h = x * w["scale"]
            return jnp.tanh(h @ w["a"]) + h @ w["b"], None

        return jax.lax.scan(layer, x, p)[0]

    params = {"a": normal(3, 8, 8), "b": normal(3, 8, 8), "scale": jnp.ones((3, 8))}
    program = trace(layers, params, normal(5, 8))
    assert [[s.path for s in g] for g in shared_inputs(program)] == [["a", "b"]]
    assert producer(program, program.sites[0]).name == "scale"


def test_a_leaf_without_a_site_says_what_reads_it():
    params = {"w": normal(8, 4), "s": normal(4), "unused": normal(4)}
    program = trace(lambda p, x: (x @ p["w"]) * p["s"] + p["unused"] * 0, params, normal(2, 8))
    assert {leaf.path: leaf.consumers for leaf in program.leaves} == {"w": (), "s": ("mul",), "unused": ("mul",)}


def test_a_product_of_two_parameters_is_no_site():
    program = trace(lambda p, x: x @ (p["a"] @ p["b"]), {"a": normal(8, 2), "b": normal(2, 8)}, normal(3, 8))
    assert program.sites == ()
    assert [leaf.consumers for leaf in program.leaves] == [("dot_general of two parameters",)] * 2


def test_a_large_closed_over_array_is_named():
    hidden = normal(80, 80)
    inner = jax.jit(lambda x: x @ hidden)
    program = trace(lambda p, x: inner(x) @ p["w"], {"w": normal(80, 4)}, normal(2, 80))
    assert program.closed_over == (((80, 80), "float32"),)
    report = qjax.sites(lambda p, x: inner(x) @ p["w"], qjax.Policy([qjax.Rule("*", weight=qjax.int8())]))
    assert "closed-over float32 array of shape (80, 80)" in report({"w": normal(80, 4)}, normal(2, 80)).notes[0]


def test_static_and_keyword_arguments():
    def fn(p, x, activation, *, scale, train):
        assert isinstance(train, bool)
        return activation(x @ p["w"]) * scale

    program = trace(fn, {"w": normal(8, 4), "name": "layer"}, normal(2, 8), jax.nn.relu, scale=np.float32(2), train=False)
    assert [s.path for s in program.sites] == ["w"]


def test_printing_a_program_names_every_site():
    text = str(trace(llama_block, BLOCK, normal(5, 8)))
    assert "7 sites, 10 parameters" in text and "no site: mul" in text
