"""Sums that warpgroups of a block and blocks of a cluster gather: where each goes, who waits, and the shared memory for them."""

import numpy as np
import pytest
from qjax_kernels.gpu.gathered import Gathered, sent_to
from qjax_kernels.gpu.tiles import Tiles

CUTS = [
    {"block_n": 64},
    {"block_n": 64, "warpgroups": 3, "block_k": 384, "stages": 1},
    {"split_k": 2},
    {"split_k": 5},
    {"block_n": 256, "split_k": 2},
    {"block_n": 192, "warpgroups": 3, "split_k": 2},
    {"block_n": 192, "warpgroups": 3, "split_k": 8, "block_k": 128},
    {"block_n": 64, "split_k": 3},
]


def cut(**fields) -> Tiles:
    return Tiles(**({"block_m": 16, "block_n": 128, "block_k": 256, "stages": 2, "warpgroups": 2, "digits": True} | fields))


class Block:
    """The threads of a block of a cluster; an address in it is (the block whose memory it is, the offset)."""

    def __init__(self, threads: int):
        self.thread = np.arange(threads)

    def of_neighbour(self, offset, block):
        return np.stack([np.broadcast_to(block, offset.shape), offset])


@pytest.mark.parametrize("fields", CUTS)
def test_every_thread_writes_sixteen_bytes_of_its_own_in_the_block_that_ends_its_rows(fields):
    tiles = cut(**fields)
    blocks, offsets = sent_to(Block(128 * tiles.warpgroups), tiles, 4096)
    for warpgroup in range(tiles.warpgroups):
        own = slice(128 * warpgroup, 128 * (warpgroup + 1))
        rows = Gathered(tiles, warpgroup, None, None).rows
        assert set(blocks[own]) == {int(rows) % tiles.split_k}
        np.testing.assert_array_equal(offsets[own], 4096 + 16 * np.arange(128))


@pytest.mark.parametrize("fields", CUTS)
def test_each_sum_has_a_number_and_one_of_them_is_the_last(fields, monkeypatch):
    tiles, numbers, last = cut(**fields), {}, {}
    for block in range(tiles.split_k):
        monkeypatch.setattr(Gathered, "block", block)
        for warpgroup in range(tiles.warpgroups):
            found = Gathered(tiles, warpgroup, None, None)
            numbers.setdefault(int(found.rows), []).append(int(found.number))
            last.setdefault(int(found.rows), set()).add(int(found.last))
            if found.number == found.last:
                assert block == found.rows % tiles.split_k, "others send their sums there"
    assert all(sorted(each) == list(range(tiles.sums)) for each in numbers.values()) and len(numbers) == tiles.beside
    assert all(len(each) == 1 and each <= set(range(tiles.sums)) for each in last.values())


def of_all_rows(cuts: list[dict]) -> list:
    """Each cut with each of three numbers of rows, one of them in the ordinary test line."""
    sizes = (8, 16, 24)
    return [
        pytest.param(fields, rows, marks=[] if rows == sizes[i % 3] else pytest.mark.slow)
        for i, fields in enumerate(cuts)
        for rows in sizes
    ]


@pytest.mark.parametrize(("fields", "block_m"), of_all_rows([{}, *CUTS]))
def test_warpgroups_of_a_cluster_meet_once_and_their_memory_is_counted(fields, block_m):
    """Those that multiply and the one that copies: who were missing, or came twice, would hold the others for ever."""
    pytest.importorskip("absl")
    from tests.kernels.gpu.lowering import cluster, lowered, shared_memory

    tiles = cut(**fields, block_m=block_m)
    (kernel,) = lowered(4, block_m, 384, 3072, tiles, group=384 if tiles.block_k == 384 else 128)
    alone = tiles.sums == 1
    assert kernel.count("barrier.cluster.arrive.release;") == kernel.count("barrier.cluster.wait.acquire;") == (0 if alone else 2)
    assert kernel.count("mapa.shared::cluster") == (0 if alone else 1)
    assert cluster(kernel) == tiles.split_k
    # With the bias, which these have not, and what lies between arrays.
    assert tiles.shared_bytes(4) - 3584 <= shared_memory(kernel) <= tiles.shared_bytes(4)
