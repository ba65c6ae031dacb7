import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qjax.core import (
    QTensor,
    assemble,
    bf16,
    canonicalize,
    check_finite,
    fp16,
    int3,
    int4,
    int8,
    nf4,
    padded_size,
    quantize,
    uint4,
)


def normal(*shape, dtype=jnp.float32, seed=0):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), dtype)


@pytest.mark.parametrize(
    ("shape", "axes", "spec", "codes", "scale"),
    [
        ((48, 10), (-2,), int4(group_size=16), (10, 24), (10, 3)),
        ((3, 48, 10), (-2,), int4(), (3, 10, 24), (3, 10, 1)),
        ((4, 6, 10), (-3, -2), int3(group_size=8), (10, 9), (10, 3)),
        ((3, 3, 5, 7), (-4, -3, -2), int8(), (7, 45), (7, 1)),
        ((7, 12), (-1,), nf4(4), (7, 6), (7, 3)),
        ((7, 13), (-1,), int4(group_size=4, pad=True), (7, 8), (7, 4)),
        ((7, 12), (-2,), int4(per="tensor"), (12, 4), (1, 1)),
        ((12, 6), (-2,), int4(block=(3, 4)), (6, 6), (2, 3)),
        ((5, 3), (-2,), bf16(), (3, 5), None),
        ((9,), (0,), int4(), (5,), (1,)),
    ],
    ids=str,
)
def test_shapes_and_bytes(shape, axes, spec, codes, scale):
    w = normal(*shape, dtype=jnp.bfloat16)
    q = quantize(w, spec, axes)
    assert q.shape == shape and q.ndim == len(shape) and q.size == w.size and q.dtype == jnp.bfloat16
    assert q.codes.shape == codes and (q.scale is None) == (scale is None)
    assert q.scale is None or q.scale.shape == scale
    held = [np.asarray(a) for a in (q.codes, q.scale, q.zero_point, q.perm) if a is not None]
    assert q.nbytes == sum(a.nbytes for a in held)
    assert q.bits_per_weight == 8 * q.nbytes / w.size
    back = q.dequantize()
    assert back.shape == shape and back.dtype == jnp.bfloat16
    np.testing.assert_allclose(back.astype(jnp.float32), w.astype(jnp.float32), atol=1.0)


def test_codes_are_the_canonical_array():
    w = normal(4, 6, 10)
    q = quantize(w, int8(), (0, 1))
    wanted = canonicalize(w, (0, 1)) / q.scale
    np.testing.assert_allclose(q.codes_unpacked().astype(jnp.float32), wanted, atol=0.5001)
    swapped = quantize(w, int8(), (1, 0))
    assert swapped.axes == (-2, -3) and swapped.sizes == (6, 4)
    np.testing.assert_array_equal(swapped.dequantize(), q.dequantize())
    order = np.arange(24).reshape(4, 6).T.reshape(-1)
    np.testing.assert_array_equal(swapped.codes_unpacked(), q.codes_unpacked()[:, order])


def test_bits_per_weight_counts_everything():
    assert quantize(normal(256, 64), int4(group_size=128), (0,)).bits_per_weight == 4 + 32 / 128
    assert quantize(normal(256, 64), int4(group_size=128, scale_dtype="float16"), (0,)).bits_per_weight == 4 + 16 / 128
    assert quantize(normal(256, 64), uint4(group_size=128), (0,)).bits_per_weight == 4 + 40 / 128
    assert quantize(normal(256, 64), nf4(), (0,)).bits_per_weight == 4 + 32 / 64
    assert quantize(normal(256, 64), bf16(), (0,)).bits_per_weight == 16


def test_per_tensor_keeps_a_scale_for_each_stacked_entry():
    w = normal(3, 8, 5) * jnp.float32([1.0, 10.0, 100.0])[:, None, None]
    assert quantize(w, int8(per="tensor"), (-2,)).scale.shape == (1, 1, 1)
    q = quantize(w, int8(per="tensor"), (-2,), stacked=(0,))
    assert q.scale.shape == (3, 1, 1)
    for i in range(3):
        alone = quantize(w[i], int8(per="tensor"), (-2,))
        np.testing.assert_array_equal(jax.tree.map(lambda a, i=i: a[i], q).dequantize(), alone.dequantize())
    experts = quantize(w, int8(per="tensor"), (-2,), stacked=(0, 2))
    assert experts.scale.shape == (3, 5, 1)


def test_large_weights_are_moved_first_and_come_out_the_same_to_the_bit():
    """Two programs outside of `jit`, one inside: codes, scales of each stacked entry, sizes in the order of the axes."""
    w = jnp.asarray(np.random.default_rng(0).standard_normal((3, 2, 64, 192)), jnp.bfloat16)
    spec = uint4(per="tensor")
    eager = quantize(w, spec, axes=(-3, -2), stacked=(-4,))
    inside = jax.jit(lambda w: quantize(w, spec, axes=(-3, -2), stacked=(-4,)))(w)
    assert jax.tree.structure(eager) == jax.tree.structure(inside) and eager.shape == w.shape and eager.scale.shape == (3, 1, 1)
    for a, b in zip(jax.tree.leaves(eager), jax.tree.leaves(inside), strict=True):
        np.testing.assert_array_equal(a, b)


def test_scan_over_layers_with_zero_points_and_permutation():
    w = normal(3, 8, 6)
    q = quantize(w, uint4(group_size=4), (-2,), stacked=(0,))
    perm = jnp.stack([jnp.asarray(np.random.default_rng(i).permutation(8), jnp.int32) for i in range(3)])[:, None]
    q = assemble(q.codes_unpacked(), q.scale, q.zero_point, q.spec, q.axes, q.sizes, q.dtype, perm=perm)
    whole = q.dequantize()
    x = normal(2, 8)
    total, layers = jax.lax.scan(
        lambda c, layer: (c + x @ layer.dequantize(), layer.dequantize()), jnp.zeros((2, 6)), q
    )
    np.testing.assert_array_equal(layers, whole)
    np.testing.assert_allclose(total, sum(x @ whole[i] for i in range(3)), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("pad", [False, True])
def test_permutation_restores_the_original_order(pad):
    """Stored position j holds flattened index perm[j]: quantizing permuted rows and undoing it is the identity."""
    w, perm = normal(18, 5), np.random.default_rng(1).permutation(18)
    spec = int8(group_size=4 if pad else 6, pad=pad)
    stored = quantize(w[perm], spec, (0,))
    assert stored.codes.shape[-1] == padded_size(18, spec) == (20 if pad else 18)
    q = assemble(stored.codes, stored.scale, None, spec, (-2,), (18,), jnp.float32, perm=perm[None])
    np.testing.assert_array_equal(q.dequantize()[perm], stored.dequantize())
    assert q.nbytes == stored.nbytes + 18 * 4


def test_assemble_is_the_inverse_of_taking_apart():
    for spec in (
        int4(group_size=4),
        uint4(),
        int8(per="tensor"),
        nf4(4),
        int3(group_size=8, pad=True),
        int4(block=(3, 4)),
    ):
        q = quantize(normal(12, 6), spec, (0,))
        parts = (q.codes_unpacked(), q.scale, q.zero_point, q.spec, q.axes, q.sizes, q.dtype)
        again = assemble(*parts)
        for a, b in zip(jax.tree.leaves(q), jax.tree.leaves(again), strict=True):
            assert a.dtype == b.dtype
            np.testing.assert_array_equal(a, b)
    assert assemble(normal(6, 12), None, None, fp16(), (-2,), (12,), jnp.float32).codes.dtype == jnp.float16


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (
            {"codes": jnp.zeros((6, 11), jnp.int8)},
            ValueError,
            r"`codes` of `l` must have the shape \(6, 12\), got \(6, 11\)",
        ),
        ({"codes": jnp.zeros((6, 12))}, TypeError, "`codes` of `l` must hold integers, got float32"),
        ({"codes": jnp.full((6, 12), 16)}, ValueError, "`codes` of `l` must lie in 0 .. 15, got 16 .. 16; clamp them"),
        ({"scale": jnp.ones((3, 6))}, ValueError, r"`scale` of `l` must have the shape \(1 or 6, 3\), got \(3, 6\)"),
        ({"zero_point": None}, ValueError, r"`zero_point` must be given for uint4\(group_size=4\), the spec of `l`"),
        ({"zero_point": jnp.zeros((6, 1), int)}, ValueError, r"`zero_point` of `l` must have the shape \(6, 3\)"),
        ({"zero_point": jnp.full((6, 3), -1)}, ValueError, "`zero_point` of `l` must lie in 0 .. 15, got -1 .. -1"),
        ({"spec": int4(group_size=4)}, ValueError, "`zero_point` must be None for int4"),
        ({"spec": uint4(group_size=5)}, ValueError, "`group_size`=5 does not divide the 12 contracted values of `l`"),
        ({"spec": bf16()}, ValueError, r"`scale` and `zero_point` must be None for bf16\(\)"),
        ({"perm": jnp.zeros((2, 12), int)}, ValueError, r"`perm` of `l` must have the shape \(1 or 6, 12\)"),
        ({"perm": jnp.zeros((6, 12), int)}, ValueError, "`perm` of `l` must hold each of 0 .. 11 once"),
        ({"axes": (0,)}, ValueError, "`axes` must be negative, one for each of `sizes`"),
        ({"sizes": (3, 4)}, ValueError, "`axes` must be negative, one for each of `sizes`"),
    ],
)
def test_assemble_refuses_by_name(change, error, message):
    parts = {
        "codes": jnp.zeros((6, 12), jnp.int8), "scale": jnp.ones((6, 3)), "zero_point": jnp.zeros((6, 3), jnp.int32),
        "spec": uint4(group_size=4), "axes": (-2,), "sizes": (12,), "dtype": jnp.float32,
    }  # fmt: skip
    with pytest.raises(error, match=message):
        assemble(**(parts | change), name="l")


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: quantize(jnp.ones((4, 4), int), int4(), (0,), name="emb"), TypeError, "`emb` must be floating"),
        (lambda: quantize(jnp.ones((0, 4)), int4(), (0,), name="emb"), ValueError, r"`emb` has the shape \(0, 4\)"),
        (lambda: quantize(jnp.ones((4, 4)), int4(), ()), ValueError, "`axes` must name at least one axis"),
        (lambda: quantize(jnp.ones((4, 4)), int4(), (0,), stacked=(-2,)), ValueError, "and none of `stacked`"),
        (lambda: quantize(jnp.ones((4, 4)), int4(), (2,)), ValueError, "`axes` must be different axes"),
        (lambda: quantize(jnp.ones((4, 4)), int4(), (0,), stacked=(5,)), ValueError, "`stacked` must be different"),
        (lambda: quantize(jnp.ones((4, 4)), int4(group_size=3), (0,), name="emb"), ValueError, "of `emb`: take 4"),
        (lambda: quantize(jnp.full((4, 4), 1e30), int4(scale_dtype="float16"), (0,), name="emb"), ValueError,
         "`scale_dtype`='float16' cannot hold the range of `emb`"),
        (lambda: quantize(jnp.full((4, 4), 1e30), fp16(), (0,)), ValueError, "`dtype`='float16' cannot hold the range"),
    ],
)  # fmt: skip
def test_quantize_refuses_by_name(make, error, message):
    with pytest.raises(error, match=message):
        make()


def test_check_finite_inside_jit_sees_concrete_arrays_and_passes_tracers():
    bad = jnp.float32([1.0, jnp.inf])
    jax.jit(lambda x: check_finite(x, "x"))(bad)

    @jax.jit
    def closes_over(x):
        check_finite(bad, "constant")
        return x

    with pytest.raises(ValueError, match="`constant` holds 0 NaN and 1 infinite values of 2"):
        closes_over(1.0)


def test_errors_inside_jit_name_the_group():
    with pytest.raises(ValueError, match="`group_size`=5 does not divide the 12 contracted values of `mlp`"):
        jax.jit(lambda w: quantize(w, int4(group_size=5), (0,), name="mlp"))(jnp.ones((12, 2)))


def test_numpy_round_trip_and_array_protocol():
    q = quantize(np.asarray(normal(12, 5)), uint4(), (0,))
    on_host = jax.tree.map(np.asarray, q)
    assert isinstance(on_host.codes, np.ndarray) and on_host.shape == (12, 5)
    np.testing.assert_array_equal(on_host.dequantize(), q.dequantize())
    np.testing.assert_array_equal(np.asarray(q), q.dequantize())
    assert np.asarray(q, dtype=np.float64).dtype == np.float64


def test_float64_numpy_input_and_x64():
    assert quantize(np.ones((4, 4)), int4(), (0,)).dtype == np.float32
    with jax.enable_x64(True):
        q = quantize(np.random.default_rng(0).standard_normal((4, 4)), int4(), (0,))
        assert q.dtype == np.float64 and q.dequantize().dtype == np.float64


def test_eval_shape_donation_and_device_put():
    w = normal(12, 5)
    shapes = jax.eval_shape(lambda w: quantize(w, int3(group_size=4), (0,)), w)
    assert isinstance(shapes, QTensor) and shapes.shape == (12, 5)
    q = quantize(w, int3(group_size=4), (0,))
    assert shapes.nbytes == q.nbytes and shapes.bits_per_weight == q.bits_per_weight
    assert jax.eval_shape(QTensor.dequantize, shapes).shape == (12, 5)

    codes, wanted = q.codes, q.dequantize()
    moved = jax.jit(lambda q: q, donate_argnums=0)(q)
    assert codes.is_deleted()
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:1]), ("n",))
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("n"))
    placed = jax.device_put(moved, sharding)
    assert placed.scale.sharding == sharding
    np.testing.assert_array_equal(placed.dequantize(), wanted)


SHARDED = """
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
from qjax.core import int4, quantize
w = jnp.asarray(np.random.default_rng(0).standard_normal((64, 8)), jnp.float32)
q = quantize(w, int4(group_size=16), (0,))
mesh = Mesh(np.array(jax.devices()), ("d",))
for spec in (P("d"), P(None, "d")):
    placed = jax.device_put(q, NamedSharding(mesh, spec))
    shards = placed.codes.addressable_shards
    assert len(shards) == 4 and shards[0].data.nbytes * 4 == q.codes.nbytes
    value = jax.jit(lambda q: q.dequantize())(placed)
    assert not value.sharding.is_fully_replicated
    np.testing.assert_array_equal(value, q.dequantize())
    spread = jax.device_put(w, NamedSharding(mesh, P(*spec[::-1])))
    again = jax.jit(lambda w: quantize(w, int4(group_size=16), (0,)))(spread)
    np.testing.assert_array_equal(again.codes, q.codes)
"""


@pytest.mark.slow
def test_sharded_over_four_devices(pytestconfig):
    """Along the kept axis and, group by group, along the contracted one; codes stay spread when dequantized."""
    code = f"import jax; jax.config.update('jax_num_cpu_devices', 4)\n{SHARDED}"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=pytestconfig.rootpath)


def test_repr():
    q = quantize(normal(256, 16, dtype=jnp.bfloat16), int4(group_size=128), (0,))
    assert repr(q) == "QTensor(int4(group_size=128), bfloat16[256,16], 2,176 bytes, 4.25 bits/weight)"
    assert repr(jax.eval_shape(lambda: q)) == repr(q)
    seen = []
    jax.jit(lambda q: seen.append(repr(q)))(q)
    jax.vmap(lambda q: seen.append(repr(q)))(jax.tree.map(lambda a: a[None], q))
    assert seen == [repr(q)] * 2
    assert repr(jax.tree.map(lambda a: 0, q)) == "QTensor(int4(group_size=128), holding int, int)"


def test_paths_of_the_arrays_inside_a_tree():
    paths = [
        jax.tree_util.keystr(p)
        for p, _ in jax.tree_util.tree_leaves_with_path({"w": quantize(normal(4, 2), uint4(), (0,))})
    ]
    assert paths == ["['w'].codes", "['w'].scale", "['w'].zero_point"]


def test_a_packed_weight_leaves_no_float_copy_among_the_arguments():
    q = quantize(normal(256, 64), int4(group_size=64), (0,))
    compiled = jax.jit(lambda q, x: x @ q.dequantize()).lower(q, jnp.ones((2, 256))).compile()
    assert compiled.memory_analysis().argument_size_in_bytes == q.nbytes + 2 * 256 * 4
