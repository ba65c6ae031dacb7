"""Which tiles `h200.py` tries: those that cover every path of the kernels, those worth a search, those chosen beforehand."""

import dataclasses
import itertools

from qjax_kernels.gpu.tiles import SHARED_BYTES, Direct, Tiles, eight_bit_tiles, weight_only_tiles


def cases(dry: bool) -> list[tuple[str, int, int, int, int | None, Tiles | Direct | None]]:
    """(kind, m, n, k, group, tiles) that cover every path: tails, padding, splits, all pipelines, clusters."""
    small = [
        ("int4", 8, 64, 1024, 128, Tiles(8, 64, 256, 2)),
        ("int4", 16, 64, 1024, 128, Tiles(16, 64, 256, 2)),
        ("int8c", 3, 192, 512, None, Tiles(8, 64, 128, 2, split_k=2)),
    ]
    if dry:
        return small
    return [
        ("int4", 1, 4096, 4096, 128, None),
        ("int4", 1, 4096, 4096, 128, Direct(early=True)),
        ("int4", 16, 4096, 8192, 128, Direct(16, 2, 1, split_k=2)),
        ("int4", 5, 1088, 1408, 128, Direct(8, 4, 1)),
        ("int4", 3, 1088, 2048, 256, Direct(4, 1, 4)),
        ("int4", 1, 4096, 4096, 128, Direct(16, 8, 1)),
        ("int4", 1, 28672, 4096, 128, None),
        ("int4", 8, 4096, 14336, 128, None),
        ("int4", 8, 28672, 8192, 128, Direct(16, 2, 1)),
        ("int4", 4, 8192, 8192, 128, None),
        ("int4", 8, 8192, 8192, 128, None),
        ("int4", 16, 8192, 8192, 128, None),
        ("int4", 7, 1088, 1408, 128, None),
        ("int4", 6, 1024, 2048, None, None),
        ("int4", 13, 1984, 2048, 256, Direct(8, 2, 2, split_k=3, wide=True)),
        ("int8", 12, 1024, 4096, 128, Direct(16, 1, 1, split_k=2, wide=True)),
        ("int8", 1, 1088, 4096, 128, None),
        ("int8", 8, 4096, 14336, 128, None),
        ("int8", 3, 1088, 1408, None, Direct(4, 2, 2)),
        ("int4", 13, 1088, 2048, 128, None),
        *small,
        ("int4", 1, 1088, 4096, 128, Tiles(8, 128, 512, 2, digits=True)),
        ("int4", 16, 1024, 4096, 128, Tiles(16, 128, 512, 2, split_k=2, digits=True)),
        ("int4", 50, 1088, 1408, 128, Tiles(64, 256, 128, 3, warpgroups=2, digits=True)),
        ("int4", 64, 1024, 4096, 128, Tiles(64, 256, 128, 4, warpgroups=2, cluster=2)),
        ("int4", 300, 1024, 4096, 128, Tiles(128, 256, 128, 3, warpgroups=2, scale_first=True, cluster=2)),
        ("int4", 300, 1088, 4096, 128, Tiles(128, 128, 256, 2, warpgroups=2, scale_first=True)),
        ("int4", 1, 1088, 4096, 128, Tiles(8, 64, 256, 4, split_k=3)),
        ("int4", 16, 1024, 4096, 128, Tiles(16, 128, 256, 3)),
        ("int4", 40, 28672, 1024, 128, None),
        ("int4", 64, 1024, 4096, 256, Tiles(64, 128, 128, 3)),
        ("int4", 64, 1024, 4096, 128, Tiles(64, 128, 128, 3, scale_first=True)),
        ("int4", 200, 1088, 4096, 128, None),
        ("int4", 300, 1984, 2048, 128, Tiles(128, 192, 128, 4, warpgroups=3, scale_first=True, cluster=2)),
        ("int4", 512, 4096, 4096, 128, None),
        ("int4", 256, 4096, 4096, 128, None),
        ("int4", 130, 4096, 14336, 256, None),
        ("int4", 512, 8640, 4096, 128, Tiles(128, 192, 128, 4, warpgroups=3, scale_first=True)),
        ("int4", 500, 8192, 8192, 128, None),
        ("int4", 70, 1088, 1408, 128, None),
        ("int4", 50, 1088, 4096, 128, None),
        ("int4", 512, 8640, 1024, 128, None),
        ("int4", 512, 1024, 4096, 128, Tiles(128, 256, 128, 3, warpgroups=2, scale_first=True)),
        ("int4", 64, 1024, 4096, 128, Tiles(64, 256, 128, 3, warpgroups=2)),
        ("int4", 16, 1024, 2048, None, None),
        ("int8", 3, 1088, 4096, 128, Tiles(8, 64, 256, 3)),
        ("int8", 100, 1024, 2048, None, None),
        ("int8", 256, 4096, 8192, 128, None),
        ("int8c", 1, 4096, 4096, None, None),
        ("int8c", 17, 1088, 2048, None, None),
        ("int8c", 300, 1088, 2048, None, None),
        ("int8c", 512, 4096, 4096, None, None),
        ("int8c", 512, 1024, 2048, None, Tiles(128, 256, 128, 3, warpgroups=2, x_left=True)),
        ("fp8", 5, 1024, 2048, None, None),
        ("fp8", 300, 1088, 2048, None, None),
    ]


def candidates(name: str, m: int, n: int, k: int) -> list[Tiles | Direct]:
    """Tiles worth a try, the likeliest first: those that are the default."""
    bits = 4 if name == "W4A16" else 8
    eight = name in ("W8A8", "FP8")
    default = eight_bit_tiles(m, n, k) if eight else weight_only_tiles(m, n, k, bits)
    block_m = max(8, -(-m // 8) * 8)
    found: list[Tiles] = []
    direct: list[Direct] = []
    if m <= 16 and name in ("W4A16", "W8A16"):
        turns = (4, 2, 1) if m <= 8 and bits == 4 else (2, 1)
        for wide, split, (warps, blocks), turn in itertools.product((False, True), (1, 2, 4), ((8, 2), (16, 1), (12, 1)), turns):
            if m * k // split * 2 <= 180 * 1024 // blocks:
                direct.append(Direct(warps, turn, blocks, split, wide=wide))
    if bits == 4 and 8 < m <= 32:
        found += [Tiles(block_m, block_n, 512, 2, digits=True) for block_n in (128, 64)]
    if m <= 64:
        for split, block_n, block_k, stages in itertools.product((1, 2, 4, 8), (64, 128), (256, 128, 512), (4, 3, 2, 6)):
            blocks = -(-n // block_n) * split
            if 132 <= blocks <= 132 * 7 and k // (block_k * split) >= 2 and stages <= k // (block_k * split):
                found.append(Tiles(block_m, block_n, block_k, stages, split))
        for split, (block_n, warpgroups) in itertools.product((1, 2, 4), ((128, 2), (256, 2))):
            if not eight and 100 <= -(-n // block_n) * split <= 132 * 4:
                found.append(Tiles(block_m, block_n, 256 if m <= 32 else 128, 4, split, warpgroups=warpgroups))
    elif eight:
        for block_m_, block_n, stages, cluster in itertools.product((128, 256), (128, 256), (3, 4), (1, 2)):
            if block_m_ * block_n <= 128 * 256 and (cluster == 1 or m > block_m_):
                found.append(Tiles(block_m_, block_n, 128, stages, warpgroups=2, x_left=True, cluster=cluster))
    else:
        for cluster, stages in itertools.product((2, 1), (4, 3)):
            if -(-n // 192) % cluster == 0:
                found.append(Tiles(min(block_m, 128), 192, 128, stages, warpgroups=3, scale_first=True, cluster=cluster))
        for block_m_, block_n, stages, first, cluster in itertools.product((64, 128, 256), (128, 256), (3, 4, 2), (True, False), (1, 2)):
            # Sums of their own for a group and 128 columns of them do not fit into registers.
            if block_m_ * block_n <= (128 if first else 64) * 256 and block_m_ <= block_m:
                found.append(Tiles(block_m_, block_n, 128, stages, warpgroups=2, scale_first=first, cluster=cluster))
    scale_bytes, x_bytes = (0, 1) if eight else (2, 2)
    fitting = [tiles for tiles in found if tiles.shared_bytes(bits, scale_bytes, x_bytes) <= SHARED_BYTES]
    return list(dict.fromkeys([default, *direct, *fitting]))


def spread_out(found: list, limit: int) -> list:
    """At most `limit` of a list, evenly spaced, so that all kinds of candidates are tried."""
    return found if len(found) <= limit else [found[i * len(found) // limit] for i in range(limit)]


def chosen() -> dict[tuple[int, int], dict[int, list[Tiles | Direct]]]:
    """Tiles that reasoning ahead of time puts first, by (K, N) and rows."""
    few = [Direct(8, 4, 2), Direct(8, 4, 1), Direct(16, 4, 1), Direct(16, 2, 1), Direct(8, 4, 2, early=True)]
    more = [Direct(16, 2, 1), Direct(16, 2, 1, 4, wide=True), Direct(16, 4, 1, 4, wide=True), Direct(16, 2, 1, 2, wide=True)]
    fast = Tiles(128, 128, 128, 4, warpgroups=2, scale_first=True)
    pair = Tiles(64, 256, 128, 4, warpgroups=2, cluster=2)
    wide = dataclasses.replace(fast, block_n=256, stages=3)
    digits = Tiles(16, 128, 512, 2, digits=True)
    return {
        (4096, 4096): {
            1: few,
            8: more,
            16: [*more, Tiles(16, 64, 256, 4, split_k=8)],
            64: [Tiles(64, 128, 128, 4, split_k=4, warpgroups=2), Tiles(64, 64, 128, 2, split_k=8)],
            512: [fast, dataclasses.replace(fast, block_n=256, stages=3, cluster=2)],
        },
        (8192, 28672): {
            1: few,
            8: more,
            16: [*more[1:], digits],
            64: [pair, dataclasses.replace(pair, scale_first=True)],
            512: [Tiles(128, 192, 128, 4, warpgroups=3, scale_first=True, cluster=2), dataclasses.replace(wide, cluster=2)],
        },
        (4096, 6144): {1: few, 8: more},
        (14336, 4096): {1: few, 8: more[1:]},
        (4096, 28672): {1: few, 8: more, 16: [*more, digits]},
    }
