"""`sharding=` is of the logical array: packed arrays follow; what would cut a byte or a group is refused by name."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractMesh, AxisType, NamedSharding, SingleDeviceSharding
from jax.sharding import PartitionSpec as P

import qjax
from qjax.core import quantize
from qjax.formats.placement import place_packed

MESH = AbstractMesh((2, 4), ("x", "y"), axis_types=(AxisType.Auto, AxisType.Auto))


def weight(*shape):
    return jnp.asarray(np.random.default_rng(0).standard_normal(shape), jnp.float32)


def specs(q, *logical):
    return {field: tuple(s.spec) for field, s in place_packed(q, NamedSharding(MESH, P(*logical)), "w").items()}


@pytest.mark.parametrize(
    ("shape", "axes", "spec", "logical", "codes", "scale"),
    [
        # A kernel (in, out) is stored as (out, in).
        ((64, 16), (0,), qjax.int4(group_size=8), (None, "x"), ("x", None), ("x", None)),
        ((64, 16), (0,), qjax.int4(group_size=8), ("x", "y"), ("y", "x"), ("y", "x")),
        ((64, 16), (0,), qjax.int4(group_size=8), (("x", "y"),), (None, ("x", "y")), (None, ("x", "y"))),
        # One scale a channel, or for the tensor: nothing to cut along its axes of size 1.
        ((64, 16), (0,), qjax.int4(), ("x", "y"), ("y", "x"), ("y", None)),
        ((64, 16), (0,), qjax.int8(per="tensor"), ("x", "y"), ("y", "x"), (None, None)),
        # Layers, heads: kept axes keep their order.
        ((2, 64, 8), (1,), qjax.uint4(), ("x", None, "y"), ("x", "y", None), ("x", "y", None)),
        ((4, 16, 8), (0, 1), qjax.int8(group_size=16), ("y",), (None, "y"), (None, "y")),
        ((1, 16, 8), (0, 1), qjax.int8(), (None, "y"), (None, "y"), (None, None)),
        ((16, 64), (0,), qjax.int8(block=(8, 8)), ("x", "y"), ("y", "x"), ("y", "x")),
        # 16 values of 3 bits are 6 bytes.
        ((64, 8), (0,), qjax.int3(), ("y",), (None, "y"), (None, None)),
    ],
)
def test_a_logical_sharding_becomes_that_of_the_packed_arrays(shape, axes, spec, logical, codes, scale):
    def plain(entries):
        entries = [*entries, None, None, None][:3]
        return tuple(e if isinstance(e, tuple) or e is None else (e,) for e in entries)

    found = specs(quantize(weight(*shape), spec, axes), *logical)
    assert plain(found["codes"]) == plain(codes) and plain(found["scale"]) == plain(scale)
    assert found.get("zero_point", found["scale"]) == found["scale"]


def test_what_scales_are_over_follows_the_stacked_axes_only():
    q = quantize(weight(2, 64, 8), qjax.nf4(16, double_quant=True), (1,), stacked=(0,))
    found = specs(q, "x", "y")
    assert found["scale"] == ("x", None, "y") and found["nested_scale"] == found["nested_offset"] == ("x",)
    assert specs(quantize(weight(64, 8), qjax.nvfp4(), (0,)), None, "x")["nested_scale"] == ()


def test_a_cast_has_only_codes_and_a_permutation_follows_its_rows():
    assert specs(quantize(weight(8, 4), qjax.bf16(), (0,)), "x", "y") == {"codes": ("y", "x")}
    q = quantize(weight(2, 64, 8), qjax.int4(), (1,))
    q = dataclasses.replace(q, perm=jnp.zeros((2, 1, 64), jnp.int32))
    assert specs(q, "x", None, "y")["perm"] == ("x",)


@pytest.mark.parametrize(
    ("shape", "spec", "logical", "message"),
    [
        (
            (60, 16),
            qjax.int4(group_size=32, pad=True),
            ("x",),
            "`w` would cut the contracted axis, which is padded from 60 to 64",
        ),
        ((60, 16), qjax.int4(), ("y",), "`w` would cut a byte: 15 values of 4 bits"),
        ((12, 16), qjax.int3(), ("y",), "`w` would cut a byte: 3 values of 3 bits"),
        ((48, 16), qjax.int8(group_size=16), ("x",), "`w` would cut a group: 3 groups do not divide by 2"),
        ((16, 24), qjax.int8(block=(12, 8)), (None, "y"), "`w` would cut a block: 24 values have 2 scales in `scale`"),
        ((62, 16), qjax.int8(), ("y",), r"`w` cuts an axis of 62 into 4 \(shape=\(62, 16\)\)"),
        ((64, 16), qjax.int8(), ("x", None, "y"), "`w` has more axes than its shape"),
        ((64, 16), qjax.int8(), (P.UNCONSTRAINED,), "`w` must name mesh axes or None"),
    ],
)
def test_a_cut_through_what_belongs_together_is_refused(shape, spec, logical, message):
    with pytest.raises(ValueError, match=message):
        specs(quantize(weight(*shape), spec, (0,)), *logical)


def test_contracted_axes_are_cut_only_along_the_first():
    q = quantize(weight(4, 16, 8), qjax.int8(), (0, 1))
    with pytest.raises(ValueError, match=r"`w` cuts one of the contracted axes \(-3, -2\) that is not the first"):
        specs(q, None, "x")
    with pytest.raises(ValueError, match="whose order is permuted"):
        specs(dataclasses.replace(q, perm=jnp.zeros((1, 64), jnp.int32)), "x")


def tree():
    return {
        "w": quantize(weight(64, 16), qjax.uint4(group_size=8), (0,)),
        "odd": quantize(weight(60, 3), qjax.int3(), (0,)),
        "b": jnp.arange(8.0),
        "s": jnp.float32(2),
        "none": jnp.zeros((0, 4)),
        "n": 3,
    }


@pytest.fixture(name="mesh")
def two_devices():
    return jax.make_mesh((2,), ("x",))


def test_arrays_are_placed_and_decode_to_the_same_bits(tmp_path, mesh):
    qjax.save(tmp_path, tree())
    seen = {}

    def sharding(path, shape):
        seen[path] = shape
        return {
            "w": NamedSharding(mesh, P("x")),
            "b": NamedSharding(mesh, P("x")),
            "none": NamedSharding(mesh, P()),
        }.get(path)

    loaded = qjax.load(tmp_path, sharding=sharding).params
    assert seen == {"w": (64, 16), "odd": (60, 3), "b": (8,), "s": (), "none": (0, 4)}
    assert loaded["w"].codes.sharding.shard_shape((16, 32)) == (16, 16)
    assert loaded["w"].scale.sharding.shard_shape((16, 8)) == (16, 4)
    assert loaded["b"].sharding == NamedSharding(mesh, P("x"))
    assert not loaded["odd"].codes.committed and loaded["n"] == 3
    for name in ("w", "odd"):
        assert np.array_equal(loaded[name].dequantize(), tree()[name].dequantize())
    # Saved from two devices, loaded on one: the file does not know.
    qjax.save(tmp_path / "cut", loaded)
    whole = qjax.load(tmp_path / "cut").params
    assert np.array_equal(whole["w"].codes, tree()["w"].codes) and np.array_equal(whole["b"], tree()["b"])


def test_one_sharding_for_all(tmp_path, mesh):
    qjax.save(tmp_path, tree())
    second = SingleDeviceSharding(jax.devices()[1])
    for sharding in (second, NamedSharding(mesh, P())):
        loaded = qjax.load(tmp_path, sharding=sharding).params
        assert all(a.sharding == sharding for a in jax.tree.leaves(loaded) if not isinstance(a, int))
    with pytest.raises(ValueError, match="of `odd` would cut a byte: 30 values of 3 bits"):
        qjax.load(tmp_path, sharding=NamedSharding(mesh, P("x")))
    qjax.save(tmp_path, {"s": jnp.float32(2)}, overwrite=True)
    with pytest.raises(ValueError, match=r"of `s` has more axes than its shape \(\)"):
        qjax.load(tmp_path, sharding=NamedSharding(mesh, P("x")))
    qjax.save(tmp_path, tree(), overwrite=True)
    with pytest.raises(ValueError, match="of `odd` cuts an axis of 3 into 2"):
        qjax.load(tmp_path, sharding=lambda path, shape: NamedSharding(mesh, P(None, "x")) if path == "odd" else None)


def test_what_is_no_sharding_is_refused(tmp_path):
    qjax.save(tmp_path, {"w": jnp.ones(3), "f": np.ones(3)})
    with pytest.raises(TypeError, match="`sharding` must be a Sharding or a callable"):
        qjax.load(tmp_path, sharding="x")
    with pytest.raises(TypeError, match="`sharding` returned a str for `w`"):
        qjax.load(tmp_path, sharding=lambda path, shape: "x")
    with pytest.raises(ValueError, match=r"cannot place `00001\.f` of float64"):
        qjax.load(tmp_path, sharding=SingleDeviceSharding(jax.devices()[0]))


EXPLICIT = [qjax.nf4(16), qjax.nf4(16, double_quant=True), qjax.binary(group_size=8, double_quant=True), qjax.int8(block=(8, 16)),
            qjax.fp8_e4m3(block=(8, 16))]  # fmt: skip


@pytest.mark.parametrize("spec", EXPLICIT, ids=str)
def test_a_mesh_with_explicit_axes_runs_every_form_of_scales(spec):
    mesh = jax.make_mesh((2,), ("d",), axis_types=(AxisType.Explicit,), devices=jax.devices()[:2])
    q, x, run = quantize(weight(64, 32), spec, (0,)), weight(8, 64), jax.jit(qjax.quantized(lambda p, x: x @ p["w"]))
    for cut in (P(None, "d"), P("d")):
        shardings = place_packed(q, NamedSharding(mesh, cut), "w")
        placed = dataclasses.replace(q, **{k: jax.device_put(getattr(q, k), s) for k, s in shardings.items()})
        got = placed.dequantize()
        np.testing.assert_array_equal(got, q.dequantize())
        assert got.sharding.is_equivalent_to(NamedSharding(mesh, cut), 2)
        np.testing.assert_allclose(run({"w": placed}, x), run({"w": q}, x), atol=1e-4)
