"""Checkpoints: what is saved comes back to the bit, in the containers it had, on any devices, in another process."""

import asyncio
import collections
import dataclasses
import functools
import logging
import os
import subprocess
import sys
import textwrap
import threading
import time

import equinox as eqx
import flax
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx

import qjax
from qjax.core import quantize
from qjax.formats.checkpoint import fingerprint, read_document

SPECS = [
    *(qjax.integer(bits, group_size=16) for bits in range(2, 9)),
    *(qjax.integer(bits, signed=False, per="channel") for bits in range(2, 9)),
    qjax.int8(per="tensor", scale_dtype="bfloat16"),
    qjax.int4(block=(4, 16), scale_rule="full"),
    qjax.int3(group_size=48, pad=True, scale_dtype="float16"),
    qjax.integer(5, signed=False, symmetric=True),
    qjax.nf4(32),
    qjax.fp4(16, scale_dtype="bfloat16"),
    qjax.codebook([-1.0, -0.0, 0.0, 1.0], name="quaternary", per="token"),
    qjax.bf16(),
    qjax.fp16(),
    qjax.nf4(16, double_quant=True, table="quantile"),
    qjax.fp8_e4m3(block=(4, 16)),
    qjax.mxfp4(exponent_rule="round"),
    qjax.mxfp6("e3m2"),
    qjax.mxint8(),
    qjax.nvfp4(),
    qjax.ternary(scale_rule="twn"),
    qjax.binary(per="tensor", double_quant=True),
]
ARRAYS = [
    *(
        np.arange(24).reshape(2, 3, 4).astype(d)
        for d in ("bool", "int8", "int16", "int32", "uint8", "uint16", "uint32")
    ),
    *(np.linspace(-3, 3, 24).reshape(4, 6).astype(d) for d in ("float16", "float32", "complex64", ml_dtypes.bfloat16)),
    *(np.arange(6).astype(d) for d in (ml_dtypes.int4, ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e5m2)),
    np.float32([np.nan, -np.nan, np.inf, -np.inf, -0.0]),
    np.float32(7.5),
    np.zeros((0, 5), np.int8),
    np.zeros((3, 0), ml_dtypes.bfloat16),
]


def weight(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


def same(a, b):
    """Equal to the bit: NaNs, signs of zeros, dtypes."""
    a, b = np.asarray(a), np.asarray(b)
    return a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()


def assert_same(a, b):
    if isinstance(a, qjax.QTensor):
        assert isinstance(b, qjax.QTensor)
        assert (a.spec, a.axes, a.sizes, a.dtype) == (b.spec, b.axes, b.sizes, b.dtype)
        for field in ("codes", "scale", "zero_point", "perm"):
            assert_same(getattr(a, field), getattr(b, field))
    elif isinstance(a, (dict, list, tuple)):
        assert type(a) is type(b) and len(a) == len(b)
        if isinstance(a, dict):
            assert list(a) == list(b) and [type(k) for k in a] == [type(k) for k in b]
            a, b = a.values(), b.values()
        for x, y in zip(a, b, strict=True):
            assert_same(x, y)
    elif hasattr(a, "dtype"):
        assert same(a, b)
    else:
        assert type(a) is type(b) and (a == b or a != a)


@functools.cache
def model():
    """A result with a packed weight, an embedding that stays float, a bias, and a report."""

    def fn(params, x):
        return jnp.tanh(params["embed"][x] @ params["dense"]["w"] + params["dense"]["b"])

    params = {"embed": weight(12, 16), "dense": {"w": weight(16, 8), "b": jnp.zeros(8)}}
    embed = qjax.Rule("embed", weight=None)
    x = jnp.arange(12)
    rounded = qjax.Policy([embed, qjax.Rule("*", weight=qjax.int4(group_size=8), method=qjax.rtn(mse=True))])
    chosen = qjax.Policy([embed, qjax.Rule("*", weight=qjax.int4(group_size=8), method=qjax.gptq(damping=0.05))])
    result = qjax.quantize(fn, params, rounded, calibration=[x])
    return fn, dataclasses.replace(result, policy=qjax.Policy([*rounded.rules, *chosen.rules])), x


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_every_spec_comes_back_to_the_bit(tmp_path, spec):
    q = quantize(weight(2, 64, 8).astype(jnp.bfloat16), spec, axes=(-2,), stacked=(0,))
    qjax.save(tmp_path, {"w": q})
    loaded = qjax.load(tmp_path).params["w"]
    assert_same(q, loaded)
    assert same(q.dequantize(), loaded.dequantize())


def test_arrays_of_every_dtype_come_back_to_the_bit(tmp_path):
    qjax.save(tmp_path, [*map(jnp.asarray, ARRAYS), *ARRAYS])
    loaded = qjax.load(tmp_path).params
    assert_same([*ARRAYS, *ARRAYS], loaded)
    assert all(isinstance(a, jax.Array) for a in loaded)


@pytest.mark.parametrize("impl", ["threefry2x32", "rbg", "unsafe_rbg"])
def test_random_keys_come_back_as_keys(tmp_path, impl):
    keys = jax.random.split(jax.random.key(3, impl=impl), 4)
    qjax.save(tmp_path, {"keys": keys, "one": keys[1]})
    for like in (None, {"keys": keys, "one": jax.ShapeDtypeStruct((), keys.dtype)}):
        loaded = qjax.load(tmp_path, like=like).params
        assert loaded["keys"].dtype == keys.dtype and loaded["one"].shape == ()
        assert same(jax.random.normal(loaded["keys"][2]), jax.random.normal(keys[2]))


def test_numbers_that_jax_has_no_type_for_come_back_as_numpy(tmp_path):
    given = {
        "f": np.arange(3.0),
        "i": np.arange(3),
        "big_endian": np.arange(3, dtype=">i4"),
        "order": np.asfortranarray(ARRAYS[8]),
    }
    qjax.save(tmp_path, given)
    loaded = qjax.load(tmp_path).params
    assert isinstance(loaded["f"], np.ndarray) and same(loaded["f"], given["f"]) and same(loaded["i"], given["i"])
    assert loaded["big_endian"].tolist() == [0, 1, 2] and same(loaded["order"], given["order"])


@pytest.mark.parametrize(
    "tree",
    [
        {"params": {"b": [1, (jnp.ones(2), None, ())], "a": {}}, "order": {"z": 1, "y": 2}},
        ({3: jnp.ones(2), 1: {True: 1.5, False: float("-inf")}}, [], [None]),
        {"scalars": [True, 0, -3, 2**70, 0.1, float("nan"), float("inf"), "text", ""]},
        {"": {"a/b": jnp.ones(1), "../../etc": jnp.ones(2), "é\n": jnp.ones(3), "x" * 300: jnp.ones(4)}},
        jnp.ones(3),
        None,
        {},
        5,
    ],
    ids=["nested", "keys", "scalars", "names", "array", "none", "empty", "number"],
)
def test_trees_come_back_as_they_were(tmp_path, tree):
    qjax.save(tmp_path / "new" / "folder", tree)
    result = qjax.load(tmp_path / "new" / "folder")
    assert_same(tree, result.params)
    assert result.report == qjax.Report(()) and result.policy is None and result.metadata == {}


def test_a_result_comes_back_with_report_policy_and_metadata(tmp_path):
    fn, result, x = model()
    metadata = {"config": {"layers": 2, "name": "tiny", "eps": 1e-6, "tied": False, "stop": None}, "ids": (1, 2)}
    qjax.save(tmp_path, result, metadata=metadata)
    loaded = qjax.load(tmp_path)
    assert loaded.report == result.report and loaded.policy == result.policy
    assert loaded.metadata == metadata | {"ids": [1, 2]}
    assert_same(result.params, loaded.params)
    apply = jax.jit(qjax.quantized(fn))
    assert same(apply(result.params, x), apply(loaded.params, x))
    qjax.save(tmp_path, loaded, overwrite=True)  # what was loaded can be saved: nothing is lost
    assert qjax.load(tmp_path).metadata == loaded.metadata
    assert qjax.load(tmp_path).policy == result.policy


def test_the_document_says_what_is_in_the_checkpoint(tmp_path):
    _, result, _ = model()
    qjax.save(tmp_path, result, source_sha256="ab" * 32)
    document = read_document(tmp_path)
    assert set(document.written_by) == {"qjax", "jax", "orbax-checkpoint", "numpy"}
    assert (document.source.sha256, document.source.of) == ("ab" * 32, "float parameters")
    packed = {leaf.path: leaf.packed.spec for leaf in document.leaves if leaf.packed}
    assert packed == {"dense/w": qjax.int4(group_size=8)}
    assert sorted(leaf.path for leaf in document.leaves) == ["dense/b", "dense/w", "embed"]


def test_fingerprints_differ_where_the_numbers_do(tmp_path):
    a, b = {"w": weight(4), "b": [jnp.ones(2)]}, {"w": weight(4, seed=1), "b": [jnp.ones(2)]}
    assert fingerprint(a) == fingerprint(flax.core.freeze(a)) != fingerprint(b)
    assert fingerprint({"w": jnp.zeros(2)}) != fingerprint({"w": jnp.zeros((2, 1))}) != fingerprint({"v": jnp.zeros(2)})
    qjax.save(tmp_path, a)
    assert read_document(tmp_path).source.sha256 == fingerprint(qjax.load(tmp_path).params)


@dataclasses.dataclass(frozen=True)
class OwnMethod:
    observer: None = None
    name: str = "own"

    def quantize(self, problem, state):
        raise NotImplementedError


def test_a_method_of_a_third_party_is_kept_by_name(tmp_path):
    _, result, _ = model()
    policy = qjax.Policy([qjax.Rule("*", weight=qjax.int8(), method=OwnMethod())])
    qjax.save(tmp_path, dataclasses.replace(result, policy=policy))
    method = qjax.load(tmp_path).policy.rules[0].method
    assert method.name == "own" and "OwnMethod" in method.text
    with pytest.raises(ValueError, match="keeps only its name"):
        method.quantize(None, None)
    qjax.save(tmp_path, qjax.load(tmp_path), overwrite=True)
    assert qjax.load(tmp_path).policy.rules[0].method == method


# Containers that are not JSON's.

Pair = collections.namedtuple("Pair", "first second")


def containers():
    q = quantize(weight(8, 4), qjax.int4(), axes=(0,))
    linear = eqx.tree_at(lambda m: m.weight, eqx.nn.Linear(8, 4, key=jax.random.key(0)), q)
    state = nnx.state(nnx.Linear(8, 4, rngs=nnx.Rngs(0)))
    state["kernel"].set_value(q)
    return {
        "FrozenDict": (
            flax.core.freeze({"params": {"w": q, "b": jnp.ones(4)}}),
            {"params": {"w": q, "b": jnp.ones(4)}},
        ),
        "nnx": (state, {"bias": jnp.zeros(4), "kernel": q}),
        "equinox": (linear, {"weight": q, "bias": linear.bias}),
        "namedtuple": (Pair(q, [None]), {"first": q, "second": [None]}),
        "OrderedDict": (collections.OrderedDict(b=q, a=jnp.ones(1)), {"b": q, "a": jnp.ones(1)}),
    }


@pytest.mark.parametrize("name", containers())
def test_other_containers_come_back_as_dictionaries_or_like(tmp_path, name):
    tree, plain = containers()[name]
    qjax.save(tmp_path, tree)
    assert_same(plain, qjax.load(tmp_path).params)
    for like in (tree, jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), tree, is_leaf=is_qtensor)):
        loaded = qjax.load(tmp_path, like=like).params
        assert type(loaded) is type(tree)
        assert jax.tree.structure(loaded) == jax.tree.structure(tree)
        for a, b in zip(jax.tree.leaves(tree), jax.tree.leaves(loaded), strict=True):
            assert_same(a, b)


def is_qtensor(x):
    return isinstance(x, qjax.QTensor)


def test_like_may_have_anything_where_a_qtensor_is(tmp_path):
    q = quantize(weight(8, 4), qjax.int4(), axes=(0,))
    qjax.save(tmp_path, {"w": q, "b": jnp.ones(4)})
    for place in (jnp.zeros((8, 4)), None, "kernel", {"any": ["thing"]}, q):
        assert_same(q, qjax.load(tmp_path, like={"b": np.zeros(4, np.float32), "w": place}).params["w"])


@pytest.mark.parametrize(
    ("like", "message"),
    [
        ({"w": 0, "b": jnp.ones(5), "c": [1, 2]}, r"shape \(5,\) at `b`.* has \(4,\)"),
        ({"w": 0, "b": jnp.ones(4, jnp.bfloat16), "c": [1, 2]}, "bfloat16 at `b`.* has float32"),
        ({"w": jnp.ones((4, 8)), "b": jnp.ones(4), "c": [1, 2]}, r"shape \(4, 8\) at `w`.* has \(8, 4\)"),
        ({"w": 0, "b": jnp.ones(4), "c": [1]}, r"keys \[0\] at `c`.*keys \[0, 1\]"),
        ({"w": 0, "b": jnp.ones(4)}, r"keys \['w', 'b'\] at its top"),
        ({"w": 0, "b": {"x": 1}, "c": [1, 2]}, "a dict at `b`"),
        ({"w": 0, "b": jnp.ones(4), "c": 1}, "a int at `c`"),
        ({"w": 0, "b": jnp.ones(4), "c": None}, "has None at `c`"),
    ],
)
def test_like_of_another_structure_is_refused(tmp_path, like, message):
    qjax.save(tmp_path, {"w": quantize(weight(8, 4), qjax.int4(), axes=(0,)), "b": jnp.ones(4), "c": [1, 2]})
    with pytest.raises(ValueError, match=message):
        qjax.load(tmp_path, like=like)


def test_a_module_runs_on_what_was_loaded(tmp_path):
    """NNX with dropout, whose state has random keys; Linen; with and without a template."""
    x = jnp.ones((2, 8))
    rngs = nnx.Rngs(0)
    model = nnx.Sequential(nnx.Linear(8, 6, rngs=rngs), nnx.Dropout(0.5, deterministic=True, rngs=rngs))
    result = qjax.nnx.quantize(model, qjax.Policy([qjax.Rule("*", weight=qjax.int8())]), [x])
    run_nnx = qjax.quantized(qjax.nnx.function(model))
    qjax.save(tmp_path, result)
    for like in (None, nnx.state(model)):
        assert same(run_nnx(qjax.load(tmp_path, like=like).params, x), run_nnx(result.params, x))
    module = nn.Dense(4)
    variables = module.init(jax.random.key(0), x)
    result = qjax.linen.quantize(module, variables, qjax.Policy([qjax.Rule("*", weight=qjax.int4())]), [x])
    run_linen = qjax.quantized(module.apply)
    qjax.save(tmp_path, result, overwrite=True)
    for like in (None, variables):
        assert same(run_linen(qjax.load(tmp_path, like=like).params, x), run_linen(result.params, x))


# Size, speed, side effects.


def test_the_disk_holds_the_packed_bytes(tmp_path):
    q = quantize(weight(2048, 4096), qjax.int4(group_size=128), axes=(0,))
    qjax.save(tmp_path, {"w": q})
    size = sum(p.stat().st_size for p in tmp_path.rglob("*") if p.is_file())
    assert q.nbytes <= size < q.nbytes + 8192 < 4.5e6
    raw = np.fromfile(next(tmp_path.rglob("*.codes/0.0")), np.uint8)
    assert np.array_equal(
        raw.reshape(q.codes.shape), q.codes
    )  # the bytes lie there as DESIGN says: readable without us


def test_a_checkpoint_does_not_say_where_it_was_made(tmp_path):
    qjax.save(tmp_path, model()[1])
    for file in tmp_path.rglob("*"):
        assert file.is_dir() or tmp_path.name.encode() not in file.read_bytes(), file


def test_saving_and_loading_leave_no_trace_in_the_process(tmp_path, capfd):
    threads, absl = set(threading.enumerate()), logging.getLogger("absl")
    before = (absl.level, list(absl.filters), list(absl.handlers), logging.root.level, list(logging.root.handlers))
    qjax.save(tmp_path, {"w": jnp.ones(3)})
    qjax.load(tmp_path)
    assert before == (
        absl.level,
        list(absl.filters),
        list(absl.handlers),
        logging.root.level,
        list(logging.root.handlers),
    )
    deadline = time.monotonic() + 10  # a thread that was told to end may need a moment on a busy machine
    while set(threading.enumerate()) != threads and time.monotonic() < deadline:
        time.sleep(0.05)
    assert set(threading.enumerate()) == threads
    assert capfd.readouterr() == ("", "")


def test_it_works_inside_a_running_event_loop_and_leaves_it_alone(tmp_path):
    run_until_complete = asyncio.BaseEventLoop.run_until_complete

    async def main():
        qjax.save(tmp_path, {"w": jnp.ones(3)})
        return qjax.load(tmp_path).params["w"]

    assert asyncio.run(main()).tolist() == [1, 1, 1]
    assert asyncio.run.__module__ == "asyncio.runners"  # nobody patched it to nest
    assert asyncio.BaseEventLoop.run_until_complete is run_until_complete


def test_loaded_arrays_are_uncommitted_as_fresh_ones_are(tmp_path):
    qjax.save(tmp_path, {"w": quantize(weight(8, 4), qjax.int4(), axes=(0,)), "b": jnp.ones(4)})
    assert not any(a.committed for a in jax.tree.leaves(qjax.load(tmp_path).params))


def test_orbax_alone_can_read_the_arrays(tmp_path):
    import orbax.checkpoint as ocp

    qjax.save(tmp_path, {"layer": {"w": jnp.arange(6.0)}})
    with ocp.PyTreeCheckpointer() as checkpointer:
        assert checkpointer.restore(tmp_path / "arrays.1")["00000.layer.w"].tolist() == [0, 1, 2, 3, 4, 5]


@pytest.mark.slow
def test_another_process_with_more_devices_reads_the_same_bits_and_writes_them_back(tmp_path):
    """This process has two devices, the other one eight; there the arrays are cut, here they come back whole."""
    _, result, _ = model()
    q = quantize(weight(64, 16), qjax.uint4(group_size=8), axes=(0,))
    qjax.save(tmp_path / "here", dataclasses.replace(result, params={"q": q, "rest": result.params}))
    script = """
        import sys, jax, qjax
        from jax.sharding import NamedSharding, PartitionSpec as P
        from qjax.formats.checkpoint import fingerprint
        mesh = jax.make_mesh((2, 4), ("x", "y"))
        cut = NamedSharding(mesh, P("x", "y"))
        result = qjax.load(sys.argv[1], sharding=lambda path, shape: cut if path == "q" else None)
        q = result.params["q"]
        assert len(q.codes.sharding.device_set) == 8 and not q.codes.sharding.is_fully_replicated
        qjax.save(sys.argv[2], result)
        print(fingerprint(result.params), fingerprint(q.dequantize()))
    """
    flags = {"XLA_FLAGS": "--xla_force_host_platform_device_count=8"}
    out = run(script, str(tmp_path / "here"), str(tmp_path / "there"), **flags)
    for path in ("here", "there"):
        loaded = qjax.load(tmp_path / path)
        assert out.split() == [fingerprint(loaded.params), fingerprint(loaded.params["q"].dequantize())]
        assert loaded.report == result.report


def run(script, *args, **env):
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "JAX_PLATFORMS": "cpu"} | env
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", textwrap.dedent(script), *args],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout
