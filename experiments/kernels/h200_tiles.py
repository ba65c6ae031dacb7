"""Which tiles `h200.py` tries: those that cover every path of the kernels, those worth a search, those chosen beforehand."""

import dataclasses
import itertools
from collections.abc import Iterable, Iterator

from h200_programs import Job, bits_of, scale_bytes
from qjax_kernels.gpu.chosen_tiles import even_rows, pipelined_tiles, staged
from qjax_kernels.gpu.direct_shape import shape_of
from qjax_kernels.gpu.tiles import SHARED_BYTES, Direct, Tiles


def cases(dry: bool) -> list[tuple[str, int, int, int, int | None, Tiles | Direct | None]]:
    """(kind, m, n, k, group, tiles) that cover every path: tails, padding, splits, all pipelines, clusters."""
    small = [
        ("int4", 8, 64, 1024, 128, Tiles(8, 64, 256, 2)),
        ("int4", 16, 64, 1024, 128, Tiles(16, 64, 256, 2)),
        ("int8c", 3, 192, 512, None, Tiles(8, 64, 128, 2, split_k=2)),
        ("int4", 5, 128, 768, 128, Tiles(8, 64, 256, 2, 2, warpgroups=2, digits=True)),
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
        ("int4", 1, 1088, 1408, 128, None),
        ("int4", 1, 8192, 8192, 128, None),
        ("int4", 2, 8192, 8192, 128, None),
        ("int4", 2, 8192, 28672, 128, None),
        ("int4", 8, 4096, 14336, 128, Direct(16, 4, 1, 4, wide=True)),
        ("int4", 8, 28672, 8192, 128, Direct(16, 2, 1)),
        ("int4", 4, 8192, 8192, 128, None),
        ("int4", 8, 8192, 8192, 128, None),
        ("int4", 8, 8192, 8192, 128, Direct(16, 4, 1, 4, wide=True)),
        ("int4", 16, 8192, 8192, 128, None),
        ("int4", 32, 4096, 8192, 128, None),
        ("int4", 27, 17408, 1408, 128, None),
        ("int4", 7, 1088, 1408, 128, None),
        ("int4", 6, 1024, 2048, None, None),
        ("int4", 13, 1984, 2048, 256, Direct(8, 2, 2, split_k=3, wide=True)),
        ("int8", 12, 1024, 4096, 128, Direct(16, 1, 1, split_k=2, wide=True)),
        ("int8", 1, 1088, 4096, 128, None),
        ("int8", 8, 4096, 14336, 128, None),
        ("int8", 3, 1088, 1408, None, Direct(4, 2, 2)),
        ("int4", 13, 1088, 2048, 128, None),
        *small,
        ("int4", 1, 1088, 4096, 128, Tiles(8, 128, 512, 2, warpgroups=2, digits=True)),
        ("int4", 16, 1024, 4096, 128, Tiles(16, 128, 512, 3, warpgroups=2, digits=True)),
        ("int4", 50, 1088, 1408, 128, Tiles(32, 256, 128, 3, warpgroups=2, digits=True)),
        ("int4", 16, 28672, 4096, 128, None),
        ("int4", 7, 14336, 4096, 128, None),
        ("int4", 12, 57344, 1024, 256, None),
        ("int4", 8, 4096, 14336, 128, None),
        ("int4", 13, 8192, 28672, 128, None),
        ("int4", 40, 1984, 1408, 128, Tiles(16, 64, 256, 3, warpgroups=2, digits=True)),
        ("int4", 20, 1088, 3968, 128, Tiles(8, 64, 256, 2, 3, warpgroups=2, digits=True)),
        ("int4", 16, 960, 4096, 128, Tiles(16, 192, 512, 2, 4, warpgroups=3, digits=True)),
        ("int4 f32", 1, 4096, 4096, 128, None),
        ("int4 f32", 4, 8192, 8192, 128, None),
        ("int4 f32", 8, 8192, 8192, 128, None),
        ("int4 f32", 16, 8192, 8192, 128, None),
        ("int4 f32", 8, 4096, 14336, 128, None),
        ("int4 f32", 16, 4096, 4096, 128, None),
        ("int4 f32", 16, 28672, 4096, 128, None),
        ("int4 f32", 13, 1088, 3840, 384, Tiles(16, 64, 1024, 2, 2, warpgroups=2, digits=True)),
        ("int4", 12, 8192, 8192, 128, None),
        ("int4", 3, 8192, 28672, 128, None),
        ("int4", 10, 4096, 14336, 128, None),
        ("int4 f32", 2, 28672, 8192, 128, None),
        ("int4 f32", 4, 4096, 14336, 128, None),
        ("int4 f32", 1, 1088, 3072, 384, Direct()),
        ("int4 f32", 40, 4096, 4096, 128, None),
        ("int4 f32", 300, 4096, 4096, 128, None),
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
        ("int8", 64, 28672, 1024, 128, None),
        ("int8", 40, 17408, 1408, None, None),
        ("int8", 128, 28672, 1024, 128, None),
        ("int8", 500, 8192, 4096, 128, None),
        ("int8", 520, 8640, 2048, None, None),
        ("int8", 1000, 4096, 4096, 128, None),
        ("int8c", 1, 4096, 4096, None, None),
        ("int8c", 17, 1088, 2048, None, None),
        ("int8c", 300, 1088, 2048, None, None),
        ("int8c", 512, 4096, 4096, None, None),
        ("int8c", 512, 8192, 8192, None, None),
        ("int8c", 128, 4096, 4096, None, None),
        ("int8c", 100, 8192, 14336, None, None),
        ("fp8", 72, 1088, 4096, None, None),
        ("int8c", 512, 1024, 2048, None, Tiles(128, 256, 128, 3, warpgroups=2, x_left=True)),
        ("fp8", 5, 1024, 2048, None, None),
        ("fp8", 300, 1088, 2048, None, None),
    ]


def meeting(dry: bool) -> list[Job]:
    """Products whose blocks hand sums to each other, or share what they read: the default tiles of every way, tall and uneven ones."""
    if dry:
        return [Job("W4A16", 8, 256, 64, Tiles(8, 64, 128, 2))]
    tall = Tiles(256, 128, 128, 3, warpgroups=2, x_left=True, cluster=2)
    uneven = Tiles(128, 192, 128, 4, warpgroups=3, scale_first=True)
    shared = Direct(16, 2, 1, split_k=4, wide=True)
    digits = Tiles(16, 128, 512, 2, warpgroups=2, digits=True)
    shapes = (
        ("W8A8", 512, 8192, 28672), ("W8A8", 100, 14336, 8192), ("FP8", 128, 4096, 4096),
        ("W4A16", 256, 4096, 4096), ("W4A16", 128, 8192, 8192), ("W4A16", 512, 8192, 28672), ("W4A16", 64, 8192, 28672),
        ("W8A16", 520, 2048, 8192), ("W8A16", 64, 8192, 28672), ("W8A16", 128, 8192, 28672), ("W8A16", 16, 8192, 28672),
        ("W4A16", 8, 8192, 8192), ("W4A16 f32", 8, 8192, 8192), ("W4A16 f32", 16, 4096, 4096),
        ("W4A16", 12, 8192, 8192), ("W4A16 f32", 4, 28672, 8192),
    )  # fmt: skip
    chosen = [Job("W8A8", 512, 4096, 4096, tall), Job("W4A16", 512, 4096, 8640, uneven), Job("W4A16", 16, 8192, 8192, shared)]
    chosen += [Job("W4A16", 16, 8192, 8192, digits), Job("W4A16", 16, 8192, 28672), Job("W4A16", 16, 8192, 8192)]
    chosen += [Job("W4A16", 8, 14336, 4096), Job("W4A16", 8, 8192, 8192, Direct(16, 4, 1, 4, wide=True))]
    return [*chosen, *(Job(name, m, k, n) for name, m, k, n in shapes)]


def candidates(name: str, m: int, n: int, k: int) -> list[Tiles | Direct]:
    """Tiles worth a try: those that are the default, then of every kind one after the other, so that the first ones are of all kinds."""
    job, eight = Job(name, m, k, n), name in ("W8A8", "FP8")
    sizes, bits, default = _sizes(job.kind), bits_of(job.kind), job.chosen()
    kinds: list[Iterable[Tiles | Direct]] = []
    if m <= 16 and not eight:
        kinds += [_few(m), [pipelined_tiles(m, n, k, bits)]]
    kinds += [(_staged(tiles, k, sizes) for tiles in kind) for kind in _narrow(m, n, bits, eight) if m <= 64]
    kinds += [(_staged(tiles, k, sizes) for tiles in _many(m, n, eight))] if m > 32 else []
    turns = (tiles for turn in itertools.zip_longest(*kinds) for tiles in turn if tiles is not None)
    return [tiles for tiles in dict.fromkeys([default, *turns]) if _used(tiles, m, n, k, sizes) <= SHARED_BYTES]


def _staged(tiles: Tiles, k: int, sizes: tuple[int, int, int]) -> Tiles:
    """With as many of its stages as fit; narrow blocks leave room for others on their multiprocessor."""
    room = SHARED_BYTES // (3 if tiles.warpgroups == 1 else 1)
    return staged(tiles, min(tiles.stages, k // tiles.block_k), room, *sizes)


def _sizes(kind: str) -> tuple[int, int, int]:
    """Of a code, and bytes of a scale and of an element of x in a stage."""
    return (8, 0, 1) if kind in ("int8c", "fp8") else (bits_of(kind), scale_bytes(kind), 2)


def _used(tiles: Tiles | Direct, m: int, n: int, k: int, sizes: tuple[int, int, int]) -> int:
    """Bytes of shared memory."""
    if isinstance(tiles, Tiles):
        return tiles.shared_bytes(*sizes)
    s = shape_of(m, n, k, group=128, columns=k // 128, dtype="bfloat16", tiles=tiles, cores=132, bits=sizes[0])
    return s.launched_bytes(tiles.blocks, 132)


def _few(m: int) -> Iterator[Direct]:
    """Codes go straight into registers; blocks may share K, and from three rows on four warps multiply together."""
    cuts, ways = ((16, 2, 1), (8, 2, 2), (8, 4, 2), (16, 1, 1), (16, 4, 1), (12, 2, 1)), ((1, False), (4, m > 2), (2, m > 2))
    for (warps, turn, blocks), (split, wide) in itertools.product(cuts, ways):
        yield Direct(warps, turn, blocks, split, wide=wide)


def _narrow(m: int, n: int, bits: int, eight: bool) -> list[Iterator[Tiles]]:
    """Digits of x; blocks of few rows of w, of which several live on a multiprocessor; pairs of warpgroups."""
    block_m = max(8, -(-m // 8) * 8)

    def digits() -> Iterator[Tiles]:
        if bits == 4 and m <= 32:
            shared = ((128, 512, 2, 2), (64, 1024, 3, 1), (64, 1024, 2, 2), (64, 512, 3, 2), (128, 512, 3, 2))
            for block_n, block_k, stages, split in shared:
                if 66 <= -(-n // block_n) * split <= 132:
                    yield Tiles(block_m, block_n, block_k, stages, split, warpgroups=2, digits=True)
            for block_n, stages in itertools.product((256, 128), (2, 3)):
                yield Tiles(block_m, block_n, 512, stages, warpgroups=2, digits=True)

    def several() -> Iterator[Tiles]:
        for block_k, block_n, split in itertools.product((256, 128), (64, 128), (1, 2, 4, 8)):
            if 132 <= -(-n // block_n) * split <= 132 * 5:
                yield Tiles(block_m, block_n, block_k, 6, split)

    def pairs() -> Iterator[Tiles]:
        for block_n, cluster, split in itertools.product((128, 256), (1, 2), (1, 2, 4)):
            if -(-n // block_n) % cluster == 0 and 66 <= -(-n // block_n) * split <= 132 * 2 and (cluster == 1 or block_m % 16 == 0):
                yield Tiles(block_m, block_n, 128, 4, split, warpgroups=2, cluster=cluster)

    return [digits(), several(), *([] if eight else [pairs()])]


def _many(m: int, n: int, eight: bool) -> Iterator[Tiles]:
    """Two or three warpgroups multiply, blocks stay on their multiprocessor: wide ones, narrow ones, those that share what they read."""
    if eight:
        for (block_m, block_n), cluster in itertools.product(((128, 256), (128, 128), (256, 128), (128, 64), (128, 192)), (2, 1)):
            if block_m <= max(128, m) and (cluster == 1 or m > block_m):
                yield Tiles(block_m, block_n, 128, 4, warpgroups=2, x_left=True, cluster=cluster)
        if m <= 256:
            for block_n, split in itertools.product((64, 128), (1, 2, 4)):
                if 66 <= -(-n // block_n) * split <= 132 * 3:
                    yield Tiles(128, block_n, 128, 6, split)
        return
    for (block_n, warpgroups), cluster in itertools.product(((256, 2), (192, 3), (128, 2)), (2, 1)):
        if -(-n // block_n) % cluster == 0:
            yield Tiles(even_rows(m, 128), block_n, 128, 4, warpgroups=warpgroups, scale_first=True, cluster=cluster)
    if m > 128:
        yield from (Tiles(even_rows(m, most), 128, 128, 4, warpgroups=2, scale_first=True) for most in (192, 256))
        yield from (Tiles(64, 256, 128, 4, warpgroups=2, scale_first=first) for first in (True, False))


def chosen() -> dict[tuple[int, int], dict[int, list[Tiles | Direct]]]:
    """Tiles that reasoning ahead of time puts first, by (K, N) and rows."""
    both = [Direct(8, 4, 2), Direct(16, 2, 1)]
    few = [Direct(8, 4, 2), Direct(8, 4, 1), Direct(16, 4, 1), Direct(16, 2, 1), Direct(8, 4, 2, early=True)]
    more = [Direct(16, 2, 1), Direct(16, 2, 1, 4, wide=True), Direct(16, 4, 1, 4, wide=True), Direct(16, 2, 1, 2, wide=True)]
    fast = Tiles(128, 128, 128, 4, warpgroups=2, scale_first=True)
    pair = Tiles(64, 256, 128, 4, warpgroups=2, cluster=2)
    wide = dataclasses.replace(fast, block_n=256, stages=3)
    digits = Tiles(16, 256, 512, 2, warpgroups=2, digits=True)
    return {
        (4096, 4096): {
            1: few,
            2: both,
            8: more,
            16: [*more, Tiles(16, 64, 256, 4, split_k=8)],
            64: [Tiles(64, 128, 128, 4, split_k=4, warpgroups=2), Tiles(64, 64, 128, 2, split_k=8)],
            512: [fast, dataclasses.replace(fast, block_n=256, stages=3, cluster=2)],
        },
        (8192, 28672): {
            1: few,
            2: both,
            8: more,
            16: [*more[1:], digits],
            64: [pair, dataclasses.replace(pair, scale_first=True)],
            512: [Tiles(128, 192, 128, 4, warpgroups=3, scale_first=True, cluster=2), dataclasses.replace(wide, cluster=2)],
        },
        (4096, 6144): {1: few, 2: both, 8: more},
        (14336, 4096): {1: few, 2: both, 8: more[1:]},
        (4096, 28672): {1: few, 2: both, 8: more, 16: [*more, digits]},
        (8192, 8192): {1: both, 2: both},
        (4096, 14336): {1: both, 2: both},
        (8192, 10240): {1: both, 2: both},
        (28672, 8192): {1: both, 2: [Direct(8, 4, 2, split_k=2), Direct(16, 2, 1)]},
    }
