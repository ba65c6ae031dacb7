"""The Hopper kernel of few rows, thread by thread in NumPy, against float64: every address, digit and sum."""

import math

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from qjax_kernels.gpu import weight_only
from qjax_kernels.gpu.chosen_tiles import direct_tiles, weight_only_tiles
from qjax_kernels.gpu.tiles import SHARED_BYTES, Direct

pytest.importorskip("absl")

from qjax_kernels.gpu.digits_kernel import digits, units
from qjax_kernels.gpu.direct_kernel import multiply
from qjax_kernels.gpu.direct_parts import Room, room
from qjax_kernels.gpu.direct_shape import shape_of
from qjax_kernels.gpu.order import by_threads
from qjax_kernels.gpu.parts import SIGN

from tests.kernels.gpu.simulator import launch

BF16, F16, F32 = ml_dtypes.bfloat16, np.float16, np.float32


def drawn(m, n, k, group, dtype, bits=4):
    """Rows of very different magnitudes, codes with zeros and the least one, scales with whole rows of 16 bytes."""
    draw, top = np.random.default_rng(0), 2 ** (bits - 1)
    x = (draw.normal(size=(m, k)) * np.exp(3 * draw.normal(size=(m, 1)))).astype(BF16)
    codes = draw.integers(-top, top, (n, k))
    codes[0], codes[1, :5] = 0, -top
    wide = np.dtype(dtype).itemsize
    scales = np.zeros((n, math.ceil(k // group * wide / 16) * 16 // wide), dtype)
    scales[:, : k // group] = draw.uniform(0.5, 1.5, (n, k // group)).astype(dtype)
    return x, codes, scales


def nibbles(codes):
    """Bytes of two codes of four bits each, by threads."""
    placed = by_threads(codes) & 15
    return (placed[:, 0::2] | (placed[:, 1::2] << 4)).astype(np.uint8)


def ran(x, codes, scales, group, tiles, bits=4, cores=2, bias=None, norm=None, whole=True):
    """y (M, N) of all blocks, and the machines that computed it; what nobody writes stays NaN, and every sign that was shown is seen."""
    (m, k), n = x.shape, codes.shape[0]
    s = shape_of(m, n, k, group=group, columns=scales.shape[1], dtype=scales.dtype, tiles=tiles, cores=cores,
                 bias=None if bias is None else bias.dtype, norm=norm, whole=whole,
                 bits=bits)  # fmt: skip
    packed = codes.astype(np.int8) if bits == 8 else nibbles(codes)
    y = np.full((m, n), np.nan, BF16 if s.whole else F32)
    met = [np.full(each.shape, -1 if each.dtype == jnp.int32 else np.nan, each.dtype) for each in room(s)]
    given = [x, packed, scales, *([] if bias is None else [bias]), y]

    def body(w, shared, *addresses):
        handed = addresses[len(given) :]
        multiply(w, s, shared, *addresses[: len(given)], room=Room(*handed) if handed else None)

    machines = launch(body, s.blocks, 32 * s.warps, [*given, *met], s.places.end)
    assert not met or not np.isin(met[0].view(np.uint64), SIGN).any()
    return y.astype(np.float64), machines


def exact(x, codes, scales, group):
    """The product in float64 of the rows as their digits hold them, so that only float32 sums of groups differ."""
    rows = jnp.asarray(x)
    unit = units(rows)
    high, low = np.float64(digits(rows, unit))
    fixed = (256 * high + low).reshape(*unit.shape, 128) * np.float64(unit)[..., None]
    wide = np.repeat(np.float64(scales[:, : x.shape[1] // group]), group, 1)
    return fixed.reshape(x.shape) @ (codes * wide).T, np.abs(fixed.reshape(x.shape)) @ np.abs(codes * wide).T


@pytest.mark.parametrize(
    ("m", "n", "k", "bits", "group", "dtype", "tiles"),
    [
        (1, 128, 1024, 4, 128, BF16, Direct()),
        (1, 192, 512, 4, 128, BF16, Direct(4, 2, 1)),
        (3, 128, 1280, 4, 128, BF16, Direct()),  # ten pieces for eight warps of four
        (4, 64, 2048, 4, 128, F32, Direct(4, 4, 1)),
        (1, 64, 1408, 4, 128, F32, Direct(8, 4, 1)),  # a lane has the scale of a piece: of the last turn, that of the last piece
        (2, 64, 3072, 4, 384, F16, Direct(4, 4, 1)),  # of groups that end within a turn
        (8, 128, 1024, 4, 128, F32, Direct(8, 4, 1, split_k=2, wide=True)),
        (1, 64, 1024, 4, 1024, F32, Direct(8, 4, 1)),
        (5, 64, 1024, 4, 128, F16, Direct(8, 2, 1)),
        (8, 64, 1408, 4, 128, BF16, Direct(16, 2, 1)),  # eleven pieces: a turn of two ends behind K
        (2, 64, 384, 4, 128, F32, Direct(4, 1, 2)),
        (1, 64, 2048, 4, 256, BF16, Direct(12, 4, 1)),
        (3, 64, 1408, 4, 128, BF16, Direct(4, 4, 1, split_k=2)),
        (16, 64, 1536, 4, 384, F16, Direct(8, 1, 1, split_k=2)),
        (1, 128, 1024, 8, 128, BF16, Direct(8, 2, 2)),
        (6, 64, 1408, 8, 1408, F32, Direct(4, 2, 1)),  # a scale a row
        (3, 64, 1536, 8, 256, F16, Direct(8, 1, 1, split_k=2)),
        (8, 192, 1024, 4, 128, BF16, Direct(8, 2, 3, split_k=3, wide=True)),  # three tiles, two groups; the last part is shorter
        (2, 320, 1152, 4, 128, BF16, Direct(4, 1, 4, split_k=4, wide=True)),  # five tiles, two groups: one has less tiles than blocks
        (16, 128, 512, 4, 128, F32, Direct(4, 1, 1, wide=True)),
        (13, 128, 1280, 4, 256, F16, Direct(16, 2, 1, wide=True)),  # ten pieces for four times two warps
        (5, 64, 1024, 8, 128, BF16, Direct(4, 2, 2, split_k=2, wide=True)),
        (16, 192, 1024, 4, 128, BF16, Direct(8, 2, 1, split_k=2, wide=True)),
        (6, 128, 1408, 4, 128, F32, Direct(4, 1, 2, split_k=2, wide=True)),  # eleven pieces
        (3, 128, 1408, 8, 128, BF16, Direct(8, 2, 1, wide=True)),
        (2, 128, 1024, 4, 128, BF16, Direct(4, 4, 1)),
        (1, 64, 512, 4, 128, BF16, Direct(4, 2, 4, split_k=8)),  # parts of K that are empty
    ],
)
def test_every_thread_computes_its_part_of_the_product(m, n, k, bits, group, dtype, tiles):
    x, codes, scales = drawn(m, n, k, group, dtype, bits)
    y, machines = ran(x, codes, scales, group, tiles, bits, whole=False)
    expected, magnitude = exact(x, codes, scales, group)
    # Sums of a group are exact: a rounding of each, of its scale and of the sum with it.
    assert np.all(np.abs(y - expected) <= 3 * (k // 128 + tiles.warps) * 2**-24 * magnitude)
    assert not y[:, 0].any()
    # Codes are loaded once, but for a turn that reads the last piece of a row again.
    read = sum(machine.loads for machine in machines)
    assert n * k * bits // 8 <= read <= n * math.ceil(k // 128 / tiles.turn) * tiles.turn * 16 * bits


@pytest.mark.parametrize(
    ("dtype", "tiles", "group", "handed"),
    [(F32, Direct(), 128, True), (BF16, Direct(), 256, True), (BF16, Direct(), 128, False), (F32, Direct(turn=2), 128, False)],
)
def test_a_lane_hands_its_scale_to_the_four_that_share_a_row(dtype, tiles, group, handed):
    """Where the scales of a turn fill more than two words; 0x1c1f: bits 8 to 12 of a lane's number stay its own, 31 is the last lane."""
    pytest.importorskip("absl")
    from tests.kernels.gpu.lowering import lowered

    (kernel,) = lowered(4, 1, 128, 4096, tiles, group, dtype)
    for number in range(4):  # of two rows, in the two ways of a turn
        assert kernel.count(f"shfl.sync.idx.b32 $0, $1, {number}, {0x1C1F}, 0xffffffff;") == (4 if handed else 0)


@pytest.mark.parametrize(("m", "bits", "dtype"), [(1, 4, BF16), (3, 4, F32), (8, 4, BF16), (2, 8, BF16)])
def test_a_row_of_one_piece_may_have_one_scale(m, bits, dtype):
    """Whose rows are not of 16 bytes."""
    x, codes, scales = drawn(m, 64, 128, 128, dtype, bits)
    scales = np.ascontiguousarray(scales[:, :1])
    y, _ = ran(x, codes, scales, 128, direct_tiles(m, 128, bits), bits, whole=False)
    expected, magnitude = exact(x, codes, scales, 128)
    assert np.all(np.abs(y - expected) <= 2**-20 * magnitude)


def test_a_bfloat16_result_is_the_float_one_rounded():
    x, codes, scales = drawn(2, 64, 1024, 128, BF16)
    y, _ = ran(x, codes, scales, 128, Direct())
    wide, _ = ran(x, codes, scales, 128, Direct(), whole=False)
    np.testing.assert_array_equal(y, wide.astype(BF16).astype(np.float64))


@pytest.mark.parametrize(
    ("m", "tiles", "bias"),
    [
        (1, Direct(16, 4, 1), F32),
        (5, Direct(8, 2, 1), BF16),
        (3, Direct(4, 1, 1), F16),
        (6, Direct(4, 1, 2, split_k=4, wide=True), F32),
        (2, Direct(4, 2, 1, split_k=2), BF16),
    ],
)
def test_norm_and_bias(m, tiles, bias):
    x, codes, scales = drawn(m, 64, 1792, 128, BF16)
    added = np.random.default_rng(1).normal(size=64).astype(bias)
    y, _ = ran(x, codes, scales, 128, tiles, bias=added, norm=0.1, whole=False)
    expected, magnitude = exact(x, codes, scales, 128)
    roots = np.sqrt((x.astype(np.float64) ** 2).mean(1, keepdims=True) + 0.1)
    assert np.all(np.abs(y - (expected / roots + added)) <= 2**-18 * magnitude / roots + 2**-22)


def test_what_is_not_finite_stays_in_its_row():
    x, codes, scales = drawn(3, 64, 512, 128, BF16)
    x[1, 7], x[2, 300] = np.inf, np.nan
    y, _ = ran(x, codes, scales, 128, Direct(4, 2, 1))
    assert np.isfinite(y[0]).all() and np.isnan(y[1:]).all()


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("dtype", [BF16, F32])
def test_default_tiles_fit_into_shared_memory(dtype, bits):
    for m in range(1, 17 if bits == 8 else 9):
        for k in (128, 1408, 4096, 8192, 14336, 22656, 28672, 45312, 49280):
            tiles = direct_tiles(m, k, bits)
            s = shape_of(m, 4096, k, group=128, columns=k // 128, dtype=dtype, tiles=tiles, cores=132, norm=1e-5, bits=bits)
            assert s.bytes * tiles.blocks <= SHARED_BYTES, (m, k, tiles)
            assert s.blocks % tiles.split_k == 0 and s.own * tiles.split_k >= k // 128


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("group", [128, None])
def test_few_rows_go_this_way_and_no_others(bits, group):
    direct = [m for m in range(1, 65) if isinstance(weight_only_tiles(m, 4096, 4096, bits, group=group), Direct)]
    assert direct == [*range(1, 5 if bits == 4 and group else 9)]  # the others meet digits
    large = [m for m in range(1, 65) if isinstance(weight_only_tiles(m, 8192, 8192, bits, group=group), Direct)]
    assert large == [*range(1, 17 if bits == 8 and group else 5 if group else 9)]
    wide = [m for m in range(1, 65) if isinstance(weight_only_tiles(m, 28672, 8192, bits, group=group), Direct)]
    assert wide == [*range(1, 17 if bits == 8 and group else 5 if group else 9)]
    deep = [m for m in range(1, 65) if isinstance(weight_only_tiles(m, 8192, 28672, bits, group=group), Direct)]
    assert deep == [*range(1, 17 if bits == 8 and group else 3 if group else 9)]


@pytest.mark.parametrize(("n", "tiles"), [(4096, Direct()), (4288, Direct(8, 4, 2, split_k=3, wide=True)), (4160, Direct(4, 2, 4))])
def test_blocks_of_a_multiprocessor_are_one_thread_block(n, tiles):
    s = shape_of(8, n, 4096, group=128, columns=32, dtype=BF16, tiles=tiles, cores=132)
    assert s.together(tiles.blocks, 132) == tiles.blocks and s.blocks <= 132 * tiles.blocks


@pytest.mark.parametrize("m", [1, 7, 16])
@pytest.mark.parametrize(("n", "k"), [(4096, 2176), (28672, 8192), (64, 45312)])
@pytest.mark.parametrize("bits", [4, 8])
def test_a_gpu_of_one_multiprocessor_waits_for_nobody(m, n, k, bits):
    tiles = weight_only_tiles(m, n, k, bits, cores=1)
    assert not isinstance(tiles, Direct) or tiles.split_k <= tiles.blocks


def test_a_few_blocks_have_a_multiprocessor_each():
    s = shape_of(1, 1024, 4096, group=128, columns=32, dtype=BF16, tiles=Direct(), cores=132)
    assert s.blocks == 64 and s.together(2, 132) == 1


@pytest.mark.parametrize("fields", [{"warps": 6}, {"turn": 3}, {"blocks": 0}, {"split_k": 0}, {"split_k": 33}])
def test_tiles_refuse_what_no_kernel_has(fields):
    (name,) = fields
    with pytest.raises(ValueError, match=f"`{name}` is {fields[name]}; "):
        Direct(**fields)


@pytest.mark.parametrize("fields", [{"warps": 8.0}, {"split_k": 2.0}, {"blocks": True}, {"wide": 1}])
def test_fields_of_another_type_are_refused(fields):
    with pytest.raises(TypeError, match="it must be"):
        Direct(**fields)


@pytest.mark.parametrize(
    ("m", "tiles", "interpret", "cores", "named"),
    [
        (16, Direct(), None, 132, "split K"),
        (1, Direct(), object(), 132, "on a GPU"),
        (1, Direct(split_k=4, blocks=1), None, 3, "`tiles.split_k` is 4.*take fewer"),
        (1, Direct(16, split_k=2), None, 132, "share 16 warps"),
        (17, Direct(16, 2, 1, split_k=4, wide=True), None, 132, "x has 17 rows"),
        (8, Direct(4, 2, 4, split_k=31), None, 20, "62 blocks wait for each other on 20"),
    ],
)
def test_a_forced_way_that_cannot_be_gone_is_refused(m, tiles, interpret, cores, named):
    x, w, s = jnp.zeros((m, 8192), jnp.bfloat16), jnp.zeros((64, 8192), jnp.int4), jnp.ones((64, 64), jnp.bfloat16)
    with pytest.raises(ValueError, match=named):
        weight_only.weight_only_matmul(x, w, s, group_size=128, tiles=tiles, cores=cores, interpret=interpret)
