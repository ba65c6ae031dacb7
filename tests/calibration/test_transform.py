"""`observe`: the function's own result, and what its sites read, through every transformation."""

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax import lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import qjax
from qjax.calibration import SecondMoment, channel_stats, watch_program
from qjax.program import trace
from tests.program.cases import CASES, normal

BY_NAME = {case.name: case for case in CASES}
NAMES = {
    "scan_remat": {"layers/kernel": ("layers/kernel[0]", "layers/kernel[1]", "layers/kernel[2]")},
    "tied_embedding": {"embed": ("embed",)},
    "experts": {name: tuple(f"{name}[{i}]" for i in range(3)) for name in ("up", "down")},
    "conv": {"conv": ("conv",), "depthwise": tuple(f"depthwise[group {i}]" for i in range(6)), "head": ("head",)},
    "static_index": {f"w[{i}]": (f"w[{i}]",) for i in range(3)},
    "fused_qkv": {f"qkv:dot_general.{i}": (f"qkv:dot_general.{i}",) for i in range(3)},
    "layers_apart": {
        "w[0]": ("w[0]",),
        "w": ("w[1]", "w[2]", "w[3]"),
        "late:dot_general.0": ("late[2]:dot_general.0", "late[3]:dot_general.0"),
        "late[2]:dot_general.1": ("late[2]:dot_general.1",),
        "late[3]:dot_general.2": ("late[3]:dot_general.2",),
    },
    "vmapped": {"w": ("w[0]", "w[1]", "w[2]")},
}


def mlp(p, x):
    return jax.nn.relu(x @ p["a"]) @ p["b"]


MLP = {"a": normal(6, 9), "b": normal(9, 4, seed=1)}
X = normal(10, 6, seed=2)


def ends(seen):
    return {name: (np.asarray(o.state.lo), np.asarray(o.state.hi)) for name, o in seen.items()}


@pytest.mark.parametrize("name", NAMES)
def test_sites_and_parts_have_names(name):
    case = BY_NAME[name]
    assert qjax.observe(case.fn).parts(case.params, *case.inputs) == NAMES[name]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_names_are_distinct_and_do_not_depend_on_the_pattern(case):
    try:
        parts = qjax.observe(case.fn).parts(case.params, *case.inputs)
    except ValueError as error:
        assert case.name == "shard_map" and "split over devices" in str(error)
        return
    named = [part for own in parts.values() for part in own]
    assert len(set(named)) == len(named) and all(parts.values())
    for path in {name.split(":")[0].split("[")[0] for name in parts}:
        alone = qjax.observe(case.fn, path).parts(case.params, *case.inputs)
        assert alone.items() <= parts.items()


@pytest.mark.parametrize("name", ["scan_remat", "experts", "conv", "grouped_attention_bf16"])
def test_the_result_is_the_functions_and_the_states_have_a_part_each(name):
    case = BY_NAME[name]
    watch = qjax.observe(case.fn)
    out, seen = jax.jit(watch)(case.params, *case.inputs)
    chex.assert_trees_all_equal(out, jax.jit(case.fn)(case.params, *case.inputs))
    for site, parts in watch.parts(case.params, *case.inputs).items():
        assert seen[site].state.lo.shape == (len(parts),)


def test_what_is_seen_is_what_each_layer_and_expert_reads():
    case = BY_NAME["scan_remat"]
    _, seen = jax.jit(qjax.observe(case.fn))(case.params, *case.inputs)
    x = case.inputs[0]
    for i in range(3):
        assert seen["layers/kernel"].state.hi[i] == pytest.approx(x.max().item(), rel=1e-6)
        x = jnp.tanh(x @ case.params["layers"]["kernel"][i] + case.params["layers"]["bias"][i])
    case = BY_NAME["experts"]
    _, seen = jax.jit(qjax.observe(case.fn, "up"))(case.params, *case.inputs)
    assert seen["up"].state.count.tolist() == [3, 0, 2]
    assert seen["up"].state.hi[2] == case.inputs[0][3:].max() and seen["up"].state.hi[1] == 0


def test_scan_over_batches_is_a_loop_and_is_merging():
    watch, xs = qjax.observe(mlp, observer=qjax.percentile(99)), normal(4, 10, 6, seed=3)
    out, scanned = jax.jit(lambda p, xs: lax.scan(lambda s, x: watch(p, x, seen=s)[::-1], watch.init(p, xs[0]), xs)[::-1])(MLP, xs)
    seen, merged = None, None
    for x in xs:
        _, seen = jax.jit(watch)(MLP, x, seen=seen)
        alone = jax.jit(watch)(MLP, x)[1]
        merged = alone if merged is None else watch.merge(merged, alone)
    chex.assert_trees_all_equal(scanned, seen)
    chex.assert_trees_all_equal(merged, seen)
    assert out.shape == (4, 10, 4)
    ranges = watch.ranges(seen, qjax.int8())
    assert ranges["a"][1].shape == (1,) and 0 < ranges["a"][1].item() < jnp.abs(xs).max()


def test_vmap_keeps_examples_apart():
    watch, xs = qjax.observe(mlp), normal(3, 10, 6, seed=4)
    out, seen = jax.vmap(watch, in_axes=(None, 0))(MLP, xs)
    assert out.shape == (3, 10, 4)
    np.testing.assert_array_equal(seen["a"].state.hi[:, 0], xs.max((1, 2)))


def test_sharded_inputs_give_what_whole_ones_give():
    mesh = Mesh(np.array(jax.devices()[:2]), ("d",))
    watch = qjax.observe(mlp, observer=qjax.percentile())
    x = jax.device_put(X, NamedSharding(mesh, PartitionSpec("d")))
    params = jax.device_put(MLP, NamedSharding(mesh, PartitionSpec()))
    out, seen = jax.jit(watch)(params, x)
    assert len(x.sharding.device_set) == 2
    want, expected = jax.jit(watch)(MLP, X)
    np.testing.assert_allclose(out, want, rtol=1e-5, atol=1e-6)
    chex.assert_trees_all_equal(seen["a"], expected["a"])
    np.testing.assert_allclose(seen["b"].state.seen.hi, expected["b"].state.seen.hi, rtol=1e-5)


def test_packed_parameters_are_dequantized():
    packed = qjax.quantize(mlp, MLP, qjax.Policy([qjax.Rule("*", weight=qjax.int4())]), calibration=[X]).params
    watch = qjax.observe(mlp)
    out, seen = jax.jit(watch)(packed, X)
    floats = jax.tree.map(lambda q: q.dequantize(), packed, is_leaf=lambda x: isinstance(x, qjax.QTensor))
    want, expected = jax.jit(watch)(floats, X)
    np.testing.assert_allclose(out, want, rtol=1e-5, atol=1e-5)
    chex.assert_trees_all_close(ends(seen), ends(expected), rtol=1e-5)


def test_a_policy_says_what_and_with_what():
    static = qjax.static(qjax.uint8(), observer=qjax.percentile(90))
    policy = qjax.Policy([qjax.Rule("a"), qjax.Rule("*", weight=qjax.int8(), activation=static)])
    _, seen = jax.jit(qjax.observe(mlp, policy))(MLP, X)
    assert list(seen) == ["b"] and seen["b"].observer == qjax.percentile(90)
    _, seen = jax.jit(qjax.observe(mlp, policy, observer=channel_stats()))(MLP, X)
    np.testing.assert_allclose(seen["b"].state.absmax[0], jax.nn.relu(X @ MLP["a"]).max(0), rtol=1e-5)


class Net(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.BatchNorm(use_running_average=True)(nn.Conv(5, (3, 3))(x))
        return nn.Dense(4, dtype=jnp.bfloat16)(nn.relu(x).mean((1, 2)))


class NNXNet(nnx.Module):
    def __init__(self, rngs):
        self.layers = nnx.List([nnx.Linear(6, 6, rngs=rngs) for _ in range(2)])

    def __call__(self, x):
        for layer in self.layers:
            x = nnx.relu(layer(x))
        return x


@pytest.mark.slow
def test_linen_and_nnx():
    model, x = Net(), normal(2, 6, 6, 3)
    variables = model.init(jax.random.key(0), x)
    out, seen = jax.jit(qjax.observe(model.apply))(variables, x)
    assert list(seen) == ["Conv_0/kernel", "Dense_0/kernel"] and out.dtype == jnp.bfloat16
    assert seen["Conv_0/kernel"].state.hi.item() == x.max()
    model = NNXNet(nnx.Rngs(0))
    out, seen = jax.jit(qjax.observe(qjax.nnx.function(model)))(nnx.state(model), X)
    np.testing.assert_allclose(out, model(X), rtol=1e-5)
    assert list(seen) == ["layers/0/kernel", "layers/1/kernel"] and seen["layers/1/kernel"].state.lo.item() == 0


def test_an_observed_program_is_the_program_and_hands_out_no_activation():
    """Its results are those of the function, then the states, whose size does not know the batch."""
    watch = qjax.observe(mlp, observer=qjax.minmax())
    sizes = [[v.size for v in jax.make_jaxpr(watch)(MLP, normal(n, 6)).out_avals] for n in (10, 50)]
    assert sizes[0][1:] == sizes[1][1:] == [1] * 6
    text = jax.jit(watch).lower(MLP, X).as_text()
    assert text.count("stablehlo.dot_general") == 2


def test_the_collector_still_gives_both():
    program = trace(mlp, MLP, X)
    outs, states = watch_program(program, {})({}, [MLP["a"], MLP["b"], X])
    assert states == {} and jnp.allclose(outs[0], mlp(MLP, X))


def test_what_cannot_be_is_said():
    with pytest.raises(TypeError, match=r"`fn` must be a function .* got dict"):
        qjax.observe({})
    with pytest.raises(TypeError, match=r"`where` must be a pattern .* got None"):
        qjax.observe(mlp, None)
    with pytest.raises(TypeError, match=r"`observer` must be an observer such as .* got 'entropy'"):
        qjax.observe(mlp, observer="entropy")
    with pytest.raises(ValueError, match="'c' matches no parameter"):
        qjax.observe(mlp, "c")(MLP, X)
    with pytest.raises(ValueError, match=r"`where` 'embed' names no site that can be observed: embed \(gather\): it is looked up"):
        qjax.observe(lambda p, i: p["embed"][i], "embed")({"embed": normal(5, 3)}, jnp.arange(2))
    watch = qjax.observe(mlp)
    seen = watch(MLP, X)[1]
    with pytest.raises(ValueError, match="`b` has other sites than `a`: b in one of them only"):
        watch.merge(seen, {"a": seen["a"]})
    with pytest.raises(ValueError, match="`seen` is of other sites than this call's: b in one"):
        watch(MLP, X, seen={"a": seen["a"]})
    with pytest.raises(ValueError, match="`seen` of 'a' was made by MinMax"):
        qjax.observe(mlp, observer=qjax.absmax())(MLP, X, seen=seen)
    with pytest.raises(TypeError, match=r"`observer` SecondMoment.* finds no range"):
        moments = qjax.observe(mlp, observer=SecondMoment())
        moments.ranges(moments(MLP, X)[1], qjax.int8())
