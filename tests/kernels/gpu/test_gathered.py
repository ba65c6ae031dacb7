"""Sums that warpgroups of a block and blocks of a cluster gather: where each goes, who waits, and the shared memory for them."""

import numpy as np
import pytest
from qjax_kernels.gpu.gathered import sent_to
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
    """The threads of one block of a cluster; an address in it is (the block whose memory it is, the offset)."""

    def __init__(self, number: int, threads: int):
        self.number, self.thread = number, np.arange(threads)

    def in_cluster(self):
        return self.number

    def of_neighbour(self, offset, block):
        return np.stack([np.broadcast_to(block, offset.shape), offset])


@pytest.mark.parametrize("fields", CUTS)
def test_every_thread_has_a_place_of_its_own_in_the_block_that_ends_its_rows(fields):
    tiles, start = cut(**fields), 4096
    size = tiles.block_n // tiles.beside * tiles.block_m * 4
    wanted, found = [], []
    for block in range(tiles.split_k):
        found += [sent_to(Block(block, 128 * tiles.warpgroups), tiles, start, size).T]
        for warpgroup in range(tiles.warpgroups):
            member, rows = divmod(warpgroup, tiles.beside)
            number = block * tiles.sharing + member  # as `Gathered` reads it, from (beside, sums)
            at = start + (rows * tiles.sums + number) * size + np.arange(128) * 16
            wanted += [np.stack([np.full(128, rows % tiles.split_k), at], 1)]
    np.testing.assert_array_equal(np.concatenate(found), np.concatenate(wanted))
    assert len(np.unique(np.concatenate(found), axis=0)) == 128 * tiles.warpgroups * tiles.split_k
    assert np.concatenate(found)[:, 1].max() < start + tiles.beside * tiles.sums * size


@pytest.mark.parametrize("fields", [{}, *CUTS])
def test_all_warpgroups_of_a_cluster_meet_once(fields):
    """Those that multiply and the one that copies: who were missing, or came twice, would hold the others for ever."""
    pytest.importorskip("absl")
    from tests.kernels.gpu.lowering import cluster, lowered

    tiles = cut(**fields)
    (kernel,) = lowered(4, 16, 384, 3072, tiles, group=384 if tiles.block_k == 384 else 128)
    alone = tiles.sums == 1
    assert kernel.count("barrier.cluster.arrive.release;") == kernel.count("barrier.cluster.wait.acquire;") == (0 if alone else 2)
    assert kernel.count("mapa.shared::cluster") == (0 if alone else 1)
    assert cluster(kernel) == tiles.split_k


@pytest.mark.parametrize("fields", [{}, *CUTS])
@pytest.mark.parametrize("block_m", [8, 16, 24])
def test_shared_memory_is_counted(fields, block_m):
    """With the bias, which these have not, and what lies between arrays."""
    pytest.importorskip("absl")
    from tests.kernels.gpu.lowering import lowered, shared_memory

    tiles = cut(**fields, block_m=block_m)
    (kernel,) = lowered(4, block_m, 384, 3072, tiles, group=384 if tiles.block_k == 384 else 128)
    assert tiles.shared_bytes(4) - 3584 <= shared_memory(kernel) <= tiles.shared_bytes(4)
