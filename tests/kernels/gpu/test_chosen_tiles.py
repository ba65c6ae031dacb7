"""The tiles of Hopper kernels: which are taken, and that they fit and are lowered."""

import math

import jax
import jax.numpy as jnp
import pytest
from qjax_kernels.gpu import eight_bit, weight_only
from qjax_kernels.gpu.chosen_tiles import direct_tiles, eight_bit_tiles, pipelined_tiles, weight_only_tiles
from qjax_kernels.gpu.tiles import SHARED_BYTES, Direct, Tiles, at_once

from tests.parameters import every_other


@pytest.mark.parametrize(("n", "k", "block_n"), [(28672, 8192, 256), (22016, 4096, 256), (14336, 4096, 128), (13824, 5120, 128)])
def test_five_to_sixteen_rows_of_wide_weights_are_digits_of_their_blocks(n, k, block_n):
    tiles = [weight_only_tiles(m, n, k, 4) for m in range(1, 33)]
    assert [isinstance(each, Tiles) and each.digits for each in tiles] == [4 < m <= 16 for m in range(1, 33)]
    assert {each.block_n for each in tiles[4:16]} == {block_n}
    assert all(isinstance(weight_only_tiles(m, n, k, 4, normed=True), Direct) for m in range(1, 9)), "a norm goes with the digits there"
    assert not any(weight_only_tiles(m, n, k, 4, group=None).digits for m in range(9, 17))
    assert not any(weight_only_tiles(m, n, k - 128, 4).digits for m in range(9, 17))


@pytest.mark.parametrize(
    ("n", "k", "eight", "sixteen"),
    [
        (17408, 8192, None, 256),  # 68 of 132 multiprocessors have a block of 256 rows
        (17408, 4096, None, 256),
        (16896, 4096, 128, 128),  # 132 blocks of 128
        (36864, 3072, None, None),  # 144 of 256: a second wave of twelve
        (36864, 8192, None, 256),  # which all of them share
        (57344, 4096, 256, 256),
        (8192, 8192, 64, 128),
        (12288, 4096, None, None),  # 192 of 64, 96 of 128
        (2048, 4096, None, None),  # 64 of 64, where K is shared by two
        (2816, 4096, None, None),  # 88
        (4096, 2048, None, None),
    ],
)
def test_digits_are_for_weights_that_keep_multiprocessors_busy(n, k, eight, sixteen):
    found = [weight_only_tiles(m, n, k, 4) for m in (8, 16)]
    taken = [tiles.block_n if isinstance(tiles, Tiles) and tiles.digits else None for tiles in found]
    assert taken == [eight, sixteen]


@pytest.mark.parametrize(("n", "k", "scale_bytes"), [(8192, 8192, 2), (6144, 4096, 4), (4096, 4096, 2), (4096, 14336, 4), (8192, 28672, 2)])
def test_narrow_weights_have_one_block_for_a_multiprocessor_which_shares_k(n, k, scale_bytes):
    for m in (5, 8, 9, 15, 16):
        tiles = weight_only_tiles(m, n, k, 4)
        if m == 16 and k > 8192 and n == 4096:
            assert isinstance(tiles, Tiles) and not tiles.digits, "whole eights of a long K are as fast in a pipeline"
            continue
        assert isinstance(tiles, Tiles) and tiles.digits and tiles.sums > 1
        assert 92 <= math.ceil(n / tiles.block_n) * tiles.split_k <= 132
        assert tiles.shared_bytes(4, scale_bytes) <= SHARED_BYTES
        assert all(at_once(tiles, group, scale_bytes) for group in (128, 256, 384, 640, k))


def test_two_rows_and_one_of_a_short_k_have_one_block_for_a_multiprocessor():
    lengths = (1024, 4096, 4224, 28672)
    assert [direct_tiles(1, k).blocks for k in lengths] == [1, 1, 2, 2]
    assert [direct_tiles(2, k).blocks for k in lengths] == [1, 1, 1, 1]
    assert [direct_tiles(m, 4096).warps for m in (1, 2, 3, 4)] == [16] * 4 and direct_tiles(1, 8192).warps == 8


@pytest.mark.parametrize(("name", "value"), [("m", 0), ("m", 1.5), ("n", -64), ("k", "4096"), ("cores", 0), ("group", 0), ("bits", 3)])
def test_sizes_of_no_product_are_refused(name, value):
    sizes = {"m": 16, "n": 4096, "k": 4096, "cores": 132}
    with pytest.raises(ValueError, match=f"`{name}` is {value!r}"):
        weight_only_tiles(**({"bits": 4} | sizes | {name: value}))
    if name in sizes:
        with pytest.raises(ValueError, match=f"`{name}` is {value!r}"):
            eight_bit_tiles(**(sizes | {name: value}))


@pytest.mark.parametrize("m", [1, 50, 100, 300, 512, 4096])
@pytest.mark.parametrize(("n", "k"), [(4096, 4096), (8192, 8192), (28672, 8192)])
def test_float_results_of_eight_bits_fit_into_shared_memory(m, n, k):
    tiles = eight_bit_tiles(m, n, k, out_bytes=4)
    assert tiles.shared_bytes(8, 0, 1, 4) <= SHARED_BYTES


@pytest.mark.parametrize("bias", [None, jnp.float32])
@pytest.mark.parametrize(("m", "n"), [(100, 4096), (300, 28672), (512, 8192), (4096, 4096)])
def test_float_rows_of_eight_bits_are_lowered(m, n, bias):
    """jax counts the shared memory of a kernel itself, and refuses what is too much."""
    pytest.importorskip("absl")
    shapes = [((m, 1024), jnp.float32), ((n, 1024), jnp.int8), ((n, 1), jnp.float32), *([((n,), bias)] if bias else [])]
    run = jax.jit(lambda x, codes, scales, bias=None: eight_bit.eight_bit_matmul(x, codes, scales, bias=bias))
    given = [jax.ShapeDtypeStruct(*each) for each in shapes]
    assert "mosaic_gpu" in run.trace(*given).lower(lowering_platforms=("cuda",)).as_text()


@pytest.mark.parametrize("m", [1, 8, 9, 16, 24, 32, 33, 64, 65, 128, 512, 4096])
def test_default_tiles_fit_into_shared_memory(m):
    for k, n in ((4096, 4096), (8192, 8192), (8192, 28672), (1024, 64), (1152, 6912), (5120, 17408)):
        assert pipelined_tiles(m, n, k, 4).shared_bytes(4) <= SHARED_BYTES
        assert pipelined_tiles(m, n, k, 8).shared_bytes(8) <= SHARED_BYTES
        assert eight_bit_tiles(m, n, k).shared_bytes(8, 0, 1) <= SHARED_BYTES


def test_few_rows_have_blocks_enough_and_share_k_only_where_they_must():
    """Measured at 4096 x 4096, 8192 x 8192 and 8192 x 28672; a short K has no parts to share."""
    for n, k in ((4096, 4096), (8192, 8192), (28672, 8192), (6912, 1152), (8192, 1024), (8960, 1536), (16384, 896), (17408, 5120)):
        for m in (16, 32):
            tiles = pipelined_tiles(m, n, k, 4)
            if not tiles.digits:
                count = n // tiles.block_n
                assert count * tiles.split_k >= 1.5 * 132 and (tiles.split_k == 1 or count < 1.5 * 132), (m, n, k, tiles)
    found = [pipelined_tiles(32, n, k, 4) for n, k in ((4096, 4096), (8192, 8192), (28672, 8192), (17408, 5120), (8192, 1024))]
    assert [(tiles.block_n, tiles.split_k) for tiles in found] == [(64, 4), (128, 4), (128, 1), (64, 1), (64, 2)]


@pytest.mark.parametrize(("m", "n"), every_other([(40, 17408), (56, 17408), (33, 28672), (64, 17408), (300, 4096), (500, 17408)]))
@pytest.mark.parametrize(("codes", "group"), [(jnp.int4, 128), pytest.param(jnp.int8, 128, marks=pytest.mark.slow), (jnp.int8, None)])
def test_default_tiles_of_rows_that_are_no_power_of_two_are_lowered(m, n, codes, group):
    pytest.importorskip("absl")
    x, codes = jax.ShapeDtypeStruct((m, 1024), jnp.bfloat16), jax.ShapeDtypeStruct((n, 1024), codes)
    scales = jax.ShapeDtypeStruct((n, 1024 // group if group else 1), jnp.bfloat16)
    run = jax.jit(lambda x, codes, scales: weight_only.weight_only_matmul(x, codes, scales, group_size=group))
    assert "mosaic_gpu" in run.trace(x, codes, scales).lower(lowering_platforms=("cuda",)).as_text()


@pytest.mark.parametrize("digits", [False, True])
@pytest.mark.parametrize("warpgroups", [2, 3])
def test_warpgroups_ask_for_no_more_registers_than_a_launch_has(warpgroups, digits):
    """Who did would wait for ever: the compiler gives all threads of a launch as many, a multiple of eight."""
    tiles = Tiles(8, 64 * warpgroups, 128, 2, warpgroups=warpgroups, digits=digits)
    launched = 65536 // (128 * (warpgroups + 1)) // 8 * 8
    assert tiles.copier_registers + warpgroups * tiles.worker_registers <= launched * (warpgroups + 1)
    assert tiles.copier_registers <= launched <= tiles.worker_registers <= 255
