"""What every spec promises, whatever it is: one suite, all specs pass it."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import qjax.core as core
from qjax.core import (
    CastSpec,
    CodebookSpec,
    FloatSpec,
    IntSpec,
    LearnedSpec,
    PerTensor,
    bf16,
    binary,
    block_decode,
    block_encode,
    blocks,
    canonicalize,
    codebook,
    floating,
    fp4,
    fp8_e4m3,
    fp8_e5m2,
    fp16,
    int3,
    int4,
    int5,
    int8,
    integer,
    learned,
    mxfp4,
    mxfp6,
    mxfp8,
    mxint8,
    nf4,
    nvfp4,
    quantize,
    ternary,
    uint4,
    uint6,
)
from qjax.core.dynamic_map import DYNAMIC
from qjax.core.elements import MINIFLOATS
from qjax.core.learned import learned_encode

K, N = 45, 21  # odd on purpose: no width but 8 fills whole bytes
SPECS = [
    *(getattr(core, f"{sign}int{bits}")() for sign in ("", "u") for bits in range(2, 9)),
    int4(per="tensor"),
    int4(per="token"),
    int4(group_size=15),
    int4(group_size=16, pad=True),
    int4(group_size=1),
    int4(block=(7, 15)),
    int4(group_size=15, scale_rule="full"),
    int4(group_size=15, scale_dtype="float16"),
    int4(group_size=15, scale_dtype="bfloat16"),
    int3(group_size=9, scale_rule="full", scale_dtype="bfloat16"),
    int5(block=(3, 16), pad=True),
    int8(scale_rule="full"),
    int8(group_size=32, pad=True, scale_dtype="float16"),
    uint4(group_size=15),
    uint4(group_size=15, scale_dtype="float16"),
    uint6(block=(7, 9)),
    integer(4, symmetric=False, group_size=15),
    integer(4, signed=False, symmetric=True),
    uint4(group_size=15, zero_dtype="float32"),
    uint4(group_size=16, pad=True, zero_dtype="bfloat16", scale_dtype="float16"),
    integer(3, symmetric=False, zero_dtype="float16"),
    nf4(15),
    nf4(15, scale_dtype="bfloat16"),
    fp4(16, pad=True),
    codebook(np.linspace(-1, 1, 256), name="line", group_size=15),
    codebook([-1, -1 / 3, 1 / 3, 1], name="no_zero", per="channel"),
    bf16(),
    fp16(),
    nf4(15, double_quant=True),
    fp4(1, double_quant=True),
    nf4(15, table="quantile", double_quant=True),
    fp8_e4m3(),
    fp8_e4m3(per="tensor", scale_dtype="bfloat16"),
    fp8_e5m2(group_size=15),
    fp8_e4m3(block=(7, 15)),
    mxfp4(pad=True),
    mxfp4(pad=True, exponent_rule="round"),
    mxfp6(pad=True),
    mxfp6("e3m2", pad=True),
    mxfp8(pad=True),
    mxfp8("e5m2", pad=True),
    mxint8(pad=True),
    nvfp4(pad=True),
    floating("e2m3", group_size=15, scale_dtype="e4m3"),
    floating("e5m2", per="tensor", scale_dtype="e4m3"),
    ternary(),
    ternary(group_size=15, scale_rule="twn"),
    binary(group_size=15),
    binary(per="tensor", double_quant=True),
    learned(3),
    learned(2, per="tensor", level_dtype="float32"),
    learned(4, group_size=15),
    learned(2, group_size=16, pad=True, scale_dtype="bfloat16"),
]
# Every third runs in the ordinary test line, of the later ones every fourth, all of them in the gate.
_OFTEN = [i % 3 == 2 if i < SPECS.index(fp16()) else i % 4 == 0 for i in range(len(SPECS))]
every_spec = pytest.mark.parametrize(
    "spec", [s if often else pytest.param(s, marks=pytest.mark.slow) for s, often in zip(SPECS, _OFTEN, strict=True)], ids=str
)
DTYPES = [jnp.float32, jnp.bfloat16]


@pytest.fixture(autouse=True)
def strict_promotion():
    with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
        yield


def positive_only(spec) -> bool:
    return isinstance(spec, IntSpec) and spec.symmetric and not spec.signed


def weight(spec, *shape, dtype=jnp.float32, seed=0):
    """Normal values over many magnitudes from column to column; not negative for the specs that cannot be.

    Nested scales are one number plus 256 others: over many magnitudes they lose the small ones, and their signs with them.
    """
    rng = np.random.default_rng(seed)
    span = 1 if core.is_nested(spec) else 12
    w = rng.standard_normal(shape) * np.exp2(rng.integers(-span, span, shape[-1]))
    return jnp.asarray(np.abs(w) if positive_only(spec) else w, dtype)


def assert_same_bits(a, b):
    leaves_a, tree_a = jax.tree.flatten(a)
    leaves_b, tree_b = jax.tree.flatten(b)
    assert tree_a == tree_b
    for x, y in zip(leaves_a, leaves_b, strict=True):
        x, y = np.asarray(x), np.asarray(y)
        assert x.dtype == y.dtype and x.shape == y.shape
        np.testing.assert_array_equal(np.atleast_1d(x).view(np.uint8), np.atleast_1d(y).view(np.uint8))


def quantize_and_back(w, spec):
    q = quantize(w, spec, (-2,))
    return q, q.dequantize()


@functools.partial(jax.jit, static_argnums=1)
def jitted(w, spec):
    return quantize_and_back(w, spec)


@pytest.mark.parametrize("dtype", DTYPES)
@every_spec
def test_jit_equals_eager_to_the_bit(spec, dtype):
    """Quantize, then dequantize, against one program that does both and sees one in the light of the other."""
    for seed in range(3):
        w = weight(spec, K, N, dtype=dtype, seed=seed)
        q, back = quantize_and_back(w, spec)
        assert back.dtype == dtype and back.shape == (K, N)
        assert_same_bits(jitted(w, spec), (q, back))


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES)
@every_spec
def test_jit_equals_single_primitives_to_the_bit(spec, dtype):
    """Every primitive compiled alone: no fusion, no rewriting across operations can have changed a bit."""
    w = weight(spec, K, N, dtype=dtype)
    if isinstance(spec, LearnedSpec):
        pytest.skip("loops of sums, whose order is the compiler's")
    with jax.disable_jit():
        alone = quantize_and_back(w, spec)
    assert_same_bits(jitted(w, spec), alone)


@functools.partial(jax.jit, static_argnums=1)
def stacked_ways(w, spec):
    whole = quantize(w, spec, (-2,), stacked=(0,))
    _, scanned = jax.lax.scan(lambda _, q: (None, (q, q.dequantize())), None, whole)
    return jax.vmap(lambda w: quantize_and_back(w, spec))(w), scanned, (whole, whole.dequantize())


@every_spec
def test_vmap_and_scan_equal_a_loop(spec):
    w = np.stack([weight(spec, K, N, seed=i) for i in range(3)])
    loop = [quantize_and_back(w[i], spec) for i in range(3)]
    wanted = jax.tree.map(lambda *a: np.stack(a), *loop)
    for got in stacked_ways(w, spec):
        assert got[0].shape == (3, K, N)
        if isinstance(spec, LearnedSpec):  # levels are sums, whose order is the compiler's
            chex.assert_trees_all_close(jax.tree.leaves(got), jax.tree.leaves(wanted), rtol=1e-6)
            continue
        assert_same_bits(got, wanted)


@pytest.mark.parametrize("dtype", DTYPES)
@every_spec
def test_error_bound(spec, dtype):
    w = weight(spec, K, N, dtype=dtype, seed=7)
    q = quantize(w, spec, (-2,))
    exact, back = np.float64(w), np.float64(q.dequantize())
    assert np.all(np.abs(back - exact) <= bound(spec, q, exact) + cast_error(exact, dtype))


def cast_error(exact, dtype):
    """Half a unit in the last place of `dtype`, with room for a value that was rounded up to the next power of two."""
    return np.abs(exact) * float(jnp.finfo(dtype).eps) + float(jnp.finfo(dtype).tiny)


def bound(spec, q, w):
    """The largest |w - w'| in float64, from the stored scales alone, in the logical (K, N) layout."""
    if isinstance(spec, CastSpec):
        return cast_error(np.float64(q.dequantize()), jnp.dtype(spec.dtype))
    if isinstance(spec, LearnedSpec):  # k-means promises the least sum, not a bound for each: the values lie near their levels
        levels = np.float64(q.levels)
        reach = 2 * np.ptp(levels, axis=-1) + np.abs(levels).max(-1) * float(jnp.finfo(spec.level_dtype).eps) + 6e-8
        if not spec.grouped:
            return np.broadcast_to(reach, (K, N))
        return 2 * reach * np.float64(q.scale).max(-1)[None, :]
    scale = np.float64(q.scales())
    for axis, n in enumerate((N, q.codes_unpacked().shape[-1])):
        count = scale.shape[axis]
        size = -(-n // count) if axis == 0 or not spec.pad else core.group_length(n, spec)
        scale = np.repeat(scale, size, axis=axis).take(range(n), axis=axis)
    scale = scale.T
    kind = jnp.finfo(spec.scale_dtype if spec.scale_dtype in ("float16", "bfloat16") else "float32")
    rounding = np.maximum(np.abs(scale) * float(kind.eps), float(kind.smallest_subnormal))
    if isinstance(spec, FloatSpec):
        return float_bound(spec, scale, np.abs(np.float64(q.dequantize()))) + spec.largest * rounding
    if core.is_nested(spec):  # codes belong to scales before they were nested, which differ by half a step of the 8-bit map
        rounding = rounding + np.float64(q.nested_scale).max() * np.max(np.diff(DYNAMIC.levels)) / 2
    if spec.by_mean:
        inside = np.abs(w) <= scale * (1.5 if isinstance(spec, IntSpec) else 0.0)
        return np.where(inside, scale / 2, np.abs(np.abs(w) - scale)) + 2 * rounding + cast_error(scale, q.dtype)
    if isinstance(spec, CodebookSpec):
        widest = np.max(np.diff(np.sort(spec.levels)))
        return np.abs(scale) * widest / 2 + (1 + widest / 2) * rounding
    # A scale that was rounded down clips the extreme value by what the rounding took from all steps; so does a floating zero point.
    if spec.float_zero:
        return scale * (0.5 + (spec.qmax - spec.qmin) * float(jnp.finfo(spec.zero_dtype).eps)) + (spec.qmax - spec.qmin + 1) * rounding
    return scale * 0.5 + (spec.qmax - spec.qmin + 1) * rounding


def float_bound(spec, scale, rounded):
    """Half a step where `rounded` lies, or what saturating can cost a block that shares a power of two."""
    if spec.element == "int8":
        mantissa, smallest, emax = 6, 1 / 64, 0
    else:
        element = MINIFLOATS[spec.element]
        mantissa, smallest, emax = element.mantissa_bits, element.smallest, element.largest_exponent
    step = np.maximum(rounded * 2.0**-mantissa, smallest * scale) / 2
    saturated = (rounded >= spec.largest * scale) & (spec.scale_dtype == "e8m0")
    # An E4M3 scale may have been rounded down by one part in 16, or up from nothing to the smallest.
    low = spec.largest * scale / 16 * (spec.scale_dtype == "e4m3")
    return np.where(saturated, (2.0 ** (emax + 1) - spec.largest) * scale, step) + low


@every_spec
def test_codes_of_its_own_values_are_the_same_codes(spec):
    w = weight(spec, K, N, seed=3)
    q = quantize(w, spec, (-2,))
    if isinstance(spec, CastSpec):
        assert_same_bits(quantize(q.dequantize(), spec, (-2,)).codes, q.codes)
        return
    if isinstance(spec, LearnedSpec):
        if not spec.grouped:
            codes = learned_encode(q.dequantize().T, q.levels.astype(jnp.float32))
            np.testing.assert_array_equal(codes, q.codes_unpacked())
        return
    codes, value = again(q)
    told = np.ones(codes.shape, bool)
    if core.is_nested(spec):  # a scale that 8 bits round to nothing, or below, has no code of its own
        positive = np.asarray(q.scales()) > 0
        told = np.broadcast_to(np.repeat(positive, codes.shape[1] // positive.shape[1], axis=1), codes.shape)
        assert told.mean() > 0.9
    np.testing.assert_array_equal(np.asarray(codes)[told], np.asarray(q.codes_unpacked())[told])
    np.testing.assert_array_equal(np.asarray(value)[told.T], np.asarray(q.dequantize())[told.T])


@jax.jit
def again(q):
    """Encodes what `q` stands for with the scales of `q`, and decodes that."""
    blocked, unblock = blocks(canonicalize(q.dequantize(), (-2,)), q.spec)
    scale = q.scales()[..., None]
    zero_point = None if q.zero_point is None else q.zero_point[..., None]
    codes = block_encode(blocked, scale, zero_point, q.spec)
    return unblock(codes)[:, :K], unblock(block_decode(codes, scale, zero_point, q.spec))[:, :K].T


@every_spec
def test_zeros_stay_exactly_zero(spec):
    for dtype in DTYPES:
        assert not np.any(quantize(jnp.zeros((K, N), dtype), spec, (-2,)).dequantize())


@every_spec
def test_a_zero_block_next_to_others(spec):
    w = weight(spec, K, N).at[:, 2].set(0.0)
    back = quantize(w, spec, (-2,)).dequantize()
    assert np.all(np.isfinite(back))
    if not (isinstance(spec, CodebookSpec) and 0.0 not in spec.levels):
        assert not np.any(back[:, 2])


@every_spec
@pytest.mark.parametrize("value", [1.0, -3.7, 1e-4, 1.2e4])
def test_constants(spec, value):
    w = jnp.full((K, N), abs(value) if positive_only(spec) else value, jnp.float32)
    q = quantize(w, spec, (-2,))
    back = np.float64(q.dequantize())
    assert len(np.unique(back)) == 1
    assert np.all(np.abs(back - np.float64(w)) <= bound(spec, q, np.float64(w)) + cast_error(np.float64(w), jnp.float32))


@every_spec
def test_subnormal_and_tiny_values(spec):
    """Nothing becomes NaN or infinite, nothing grows, and jit still agrees."""
    tiny = jnp.float32([1e-45, 1e-40, 1.1e-38, 2e-38, 1e-37, 1e-30, 1e-9])
    w = (
        jnp.resize(tiny, (K, N))
        if isinstance(getattr(spec, "granularity", None), PerTensor)
        else jnp.tile(tiny, (K, 3))
    )
    q, back = quantize_and_back(w, spec)
    assert np.all(np.isfinite(back))
    assert np.all(np.abs(np.float64(back) - np.float64(w)) <= np.maximum(1.5 * np.float64(w), 3e-8))
    assert_same_bits(jitted(w, spec), (q, back))


@every_spec
@pytest.mark.parametrize("bad", [jnp.nan, jnp.inf, -jnp.inf])
def test_nan_and_infinity_are_refused_by_name(spec, bad):
    for dtype in DTYPES:
        with pytest.raises(ValueError, match=r"`layers/3/kernel` holds . NaN and . infinite values of 945"):
            quantize(jnp.ones((K, N), dtype).at[3, 4].set(bad), spec, (-2,), name="layers/3/kernel")


@every_spec
def test_one_trace_for_a_shape(spec):
    chex.clear_trace_counter()

    @jax.jit
    @chex.assert_max_traces(n=1)
    def f(w):
        return quantize_and_back(w, spec)[1]

    for seed in range(3):
        f(weight(spec, K, N, seed=seed))


@every_spec
def test_a_pytree_through_flatten_numpy_and_shapes(spec):
    w = weight(spec, K, N, dtype=jnp.bfloat16)
    q, back = quantize_and_back(w, spec)
    leaves, tree = jax.tree.flatten(q)
    again = jax.tree.unflatten(tree, leaves)
    assert (again.spec, again.axes, again.sizes, again.dtype) == (spec, (-2,), (K,), jnp.bfloat16)
    assert_same_bits(again.dequantize(), back)
    on_host = jax.tree.map(np.asarray, q)
    assert_same_bits(on_host.dequantize(), back)
    assert on_host.nbytes == q.nbytes == sum(a.nbytes for a in jax.tree.leaves(on_host))
    shapes = jax.eval_shape(lambda w: quantize(w, spec, (-2,)), w)
    assert shapes.shape == q.shape and shapes.nbytes == q.nbytes and jax.tree.structure(shapes) == tree


@every_spec
def test_several_contracted_axes_are_one_flattened_axis(spec):
    w = weight(spec, K, N).reshape(5, 9, N)
    q, flat = quantize(w, spec, (-3, -2)), quantize(w.reshape(K, N), spec, (-2,))
    assert_same_bits(jax.tree.leaves(q), jax.tree.leaves(flat))
    assert_same_bits(q.dequantize(), flat.dequantize().reshape(5, 9, N))
    turned = quantize(w.transpose(2, 0, 1), spec, (-2, -1))
    assert_same_bits(turned.dequantize(), q.dequantize().transpose(2, 0, 1))
