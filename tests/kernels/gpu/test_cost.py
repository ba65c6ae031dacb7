"""The estimate of a product's cost on an H200: what follows from counts."""

import dataclasses

import pytest
from qjax_kernels.gpu.chosen_tiles import weight_only_tiles
from qjax_kernels.gpu.cost import BANDWIDTH, estimate
from qjax_kernels.gpu.tiles import Tiles
from qjax_kernels.request import Device, Request, Weight

DECODE = Request(Device("cuda", "sm_90a", 132), 16, 4096, 4096, Weight("int", 4, 128))


def test_bytes_and_instructions_are_those_of_the_tiles():
    least = 4096 * 4096 // 2 + 4096 * 32 * 4
    cost = estimate(DECODE)  # pairs of blocks of 64 rows of w, whose sums stay in shared memory, products of 64 x 32 by 32 x 32
    assert cost.bytes == least + 2 * 2 * 16 * 4096
    assert (cost.blocks, cost.products) == (64 * 2, 2048 // 32)
    assert cost.memory == cost.bytes / BANDWIDTH == cost.seconds
    more = estimate(dataclasses.replace(DECODE, m=32))  # blocks of 64 rows of w, K in four parts, whose float32 sums are written and read
    assert more.bytes == least + 2 * 2 * 32 * 4096 + 2 * 4 * 4 * 32 * 4096
    assert (more.blocks, more.products) == (64 * 4, 1024 // 16)
    one = estimate(dataclasses.replace(DECODE, m=1))  # 132 blocks that share 256 tiles of 16 rows, products of 16 x 32 by 32 x 8
    assert one.bytes == least + 2 * 2 * 1 * 4096
    assert (one.blocks, one.products) == (132, 2 * 4096 // 32)


def test_many_rows_are_bound_by_arithmetic_and_eight_bits_take_half():
    wide = dataclasses.replace(DECODE, m=4096)
    eight = dataclasses.replace(wide, weight=Weight("int", 8), activation="int8")
    assert estimate(wide).seconds == estimate(wide).compute
    assert estimate(eight).compute == pytest.approx(estimate(wide).compute / 2)
    assert estimate(wide, "bf16").compute <= estimate(wide).compute


def test_blocks_that_stay_share_the_last_wave():
    cost = estimate(dataclasses.replace(DECODE, m=512, n=28672, k=8192))
    least = 28672 * 8192 // 2 + 28672 * 64 * 4 + 2 * 512 * (8192 + 28672)
    assert cost.blocks == 132 and cost.bytes == least + 2 * 4 * 132 * 128 * 256  # a sum of each block is written, and read by another
    assert cost.compute == pytest.approx(512 * 28672 * 8192 / (2048 * 132 * 1.755e9))
    alone = dataclasses.replace(DECODE, m=512, device=dataclasses.replace(DECODE.device, cores=1))
    assert estimate(alone).blocks == 2  # a cluster at least


@pytest.mark.parametrize(("n", "rows"), [(8192, 12), (2048, 16)])
def test_rows_are_padded_where_the_copy_engine_takes_whole_eights(n, rows):
    """Not of weights whose digits are made in blocks, as those of 8192 rows are."""
    tiles = weight_only_tiles(12, n, 4096, 4)
    assert isinstance(tiles, Tiles) and tiles.digits == (rows == 12)
    parts = 2 * 4 * tiles.split_k * 12 * n if tiles.added_after else 0
    found = estimate(dataclasses.replace(DECODE, m=12, n=n, k=4096)).bytes
    assert found == n * 4096 // 2 + n * 32 * 4 + 2 * (rows * 4096 + 12 * n) + parts


def test_what_no_kernel_takes_is_refused():
    with pytest.raises(ValueError, match="int3"):
        estimate(dataclasses.replace(DECODE, weight=Weight("int", 3, 128)))


def test_the_parts_of_a_split_take_less_than_the_float_weight_would():
    for m in (1, 13, 16, 64, 65, 128, 512, 1024, 4096):
        for n in (256, 1024, 4096, 14336):
            for k in (1024, 4096, 11008):
                for bits in (4, 8):
                    split = weight_only_tiles(m, n, k, bits).split_k
                    assert split == 1 or 4 * split * m * n < 2 * n * k, (m, n, k, bits, split)


@pytest.mark.parametrize(
    ("m", "kernel", "named"), [(16, "hopper_digits", "`kernel` is 'hopper_digits'"), (0, None, "M, N, K = 0, 4096, 4096")]
)
def test_bad_requests_are_named(m, kernel, named):
    with pytest.raises(ValueError, match=named):
        estimate(dataclasses.replace(DECODE, m=m), kernel)
