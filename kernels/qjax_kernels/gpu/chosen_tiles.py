"""Which tiles a product is cut into on a Hopper GPU: those that were the fastest on an H200, by rules that take them to other shapes."""

import dataclasses
import math
import numbers

from .schedule import Schedule
from .tiles import PIECE, SHARED_BYTES, Direct, Tiles, blocks, stays


def weight_only_tiles(m: int, n: int, k: int, bits: int, cores: int = 132, group: int | None = 128, normed: bool = False) -> Tiles | Direct:
    """The tiles that were the fastest on an H200 (experiments/kernels/h200), by rules that take them to other shapes.

    With 1 to 8 rows codes go straight into registers (`direct_tiles`), of eight bits up to 16 where a weight in groups is large, of four
    bits up to 4 (2 of a long K) where blocks that make digits keep most multiprocessors busy; else through a pipeline (`pipelined_tiles`).

    Args:
      m: rows of x.
      n: rows of w.
      k: the contracted length.
      bits: of a code, 4 or 8.
      cores: multiprocessors of the GPU.
      group: consecutive k that share a scale; None per channel.
      normed: rows are divided by the root of their mean square, which up to 8 of them are on their way to registers.

    Returns:
      Tiles that fit into shared memory.

    Raises:
      ValueError: a size is no whole number from 1 on, or codes have other bits.

    Example:
      >>> weight_only_tiles(1, 28672, 8192, 4), weight_only_tiles(16, 4096, 4096, 4).split_k
      (Direct(warps=8, turn=4, blocks=2, split_k=1, early=False, wide=False), 2)
    """
    _check(m=m, n=n, k=k, cores=cores, group=PIECE if group is None else group)
    if bits not in (4, 8):
        raise ValueError(f"`bits` is {bits!r}; codes have 4 or 8")
    large = bits == 8 and group is not None and n * k >= _LARGE
    several = m > (2 if k > _DEEP else 4)
    digits = bits == 4 and group is not None and several and not normed and _digits(m, n, k, cores) is not None
    if (m <= DIRECT_ROWS and not digits) or (m <= 2 * DIRECT_ROWS and large):
        tiles = direct_tiles(m, k, bits)
        if tiles.split_k <= cores * tiles.blocks:  # so many wait for each other
            return tiles
    return pipelined_tiles(m, n, k, bits, cores, group)


def _check(**sizes: int) -> None:
    for name, size in sizes.items():
        if not isinstance(size, numbers.Integral) or size < 1:
            raise ValueError(f"`{name}` is {size!r}; it must be a whole number from 1 on")


# Rows of x; 16, of four bits, were slower than a pipeline: 4096 x 4096 7.7 for 7.0 us, 8192 x 8192 16.7 for 15.0, 8192 x 28672 42 for 39.5.
DIRECT_ROWS = 8
# Of K, whose digits are so many that blocks that make them are faster at 3 and 4 rows: 28672 x 8192 34.5 and 34.1 us for 35.7 and 37.4,
# 14336 x 4096 12.0 and 11.9 for 12.3 and 12.5.
_DEEP = 8192
# Of K, one row of which one block of sixteen warps takes faster than two of eight (K x N): 4096 x 6144 6.1 for 7.1 us, 4096 x 4096 5.0 for
# 5.1; 8192 x 8192 10.9 for 10.7, 8192 x 28672 30.8 for 29.5, 28672 x 8192 32.4 for 30.2, but 8192 x 10240 12.8 for 13.2. No K between was
# timed, nor a shorter one. Two rows of any K: 4096 x 4096 5.1 for 5.7, 8192 x 8192 11.1 for 12.0, 8192 x 28672 31.0 for 30.7.
_SHORT = 4096
_LARGE = 1 << 26  # codes of eight bits, at 16 rows: 8192 x 8192 took 22.5 for 23.5 us, 4096 x 4096 9.2 for 8.8


def direct_tiles(m: int, k: int, bits: int = 4) -> Direct:
    """The tiles of few rows.

    Digits of x take 256 bytes of shared memory for a row and a piece, and time that nothing else fills: of two rows and more one block of
    sixteen warps makes them for a whole multiprocessor (of one row only where K is short); of five rows and more blocks share K besides,
    and warps multiply 64 rows of w together.

    Args:
      m: rows of x, up to 8, of eight bits up to 16.
      k: the contracted length.
      bits: of a code, 4 or 8.

    Returns:
      Tiles that fit into shared memory.
    """
    if bits == 8 and m > DIRECT_ROWS:
        tiles = Direct(warps=16, turn=2, blocks=1, split_k=2, wide=True)
    elif bits == 8:
        tiles = Direct(turn=2) if m <= 4 and k <= 8192 else Direct(warps=16, turn=1, blocks=1)
    elif m == 1 and k > _SHORT:
        tiles = Direct()
    elif m <= 4:
        tiles = Direct(warps=16, turn=2, blocks=1)
    else:
        tiles = Direct(warps=16, turn=4 if k >= 8192 else 2, blocks=1, split_k=min(4, max(1, k // 1024)), wide=True)
    # Digits of a piece take 256 bytes a row, its unit and sum of squares 8; sums of warps lie in two places. A part is whole turns, and
    # another one may lie behind it.
    quads = math.ceil(m / 4)
    each = (4 * quads if tiles.wide else m) * 264 * tiles.turn
    while (math.ceil(k / (128 * tiles.turn * tiles.split_k)) + 1) * each + 2 * tiles.warps * quads * 256 > 220 * 1024 // tiles.blocks:
        tiles = dataclasses.replace(tiles, split_k=2 * tiles.split_k)
    return tiles


def pipelined_tiles(m: int, n: int, k: int, bits: int, cores: int = 132, group: int | None = 128) -> Tiles:
    """The tiles of products whose codes pass through shared memory.

    Few rows are bound by memory: thread blocks are small, so that a few of them live on every multiprocessor, and K is split until they all
    have work. Up to 16 rows meet digits where a four-bit weight in groups has blocks that make them for most multiprocessors. Many rows are
    bound by the tensor cores: two or three warpgroups share them, and another copies (of eight bits from 33 rows of a wide weight on);
    thread blocks stay on their multiprocessors (`schedule`), and are, of four bits, those that take the least time by their stages and
    ends (`_time`).

    Args:
      m: rows of x.
      n: rows of w.
      k: the contracted length.
      bits: of a code, 4 or 8.
      cores: multiprocessors of the GPU.
      group: consecutive k that share a scale; None per channel.

    Returns:
      Tiles that fit into shared memory.
    """
    block_m = _whole_eights(m)
    packed = bits == 4
    if m > 64:
        return _many_rows(m, n, k, bits, cores)
    if packed and n >= 64 * 2 * cores and m > _NARROW_ROWS:
        return Tiles(block_m, 256, 128, 4, warpgroups=2, cluster=_pairs(n, block_m))
    if packed and group is not None and (tiles := _digits(m, n, k, cores)):
        return tiles
    if packed and m > _NARROW_ROWS:
        pair = Tiles(block_m, 128, 128, 4, warpgroups=2)
        return pair if stays(pair, group) else dataclasses.replace(pair, split_k=_parts(m, n, k, pair, cores))
    if m > _NARROW_ROWS and n >= 64 * 2 * cores:
        return Tiles(block_m, 256, 128, 3, warpgroups=2, scale_first=True, cluster=_pairs(n, block_m))
    # A third of the shared memory for a thread block: three of them live on a multiprocessor (two of those of 32 rows that are wide).
    return staged(_small(m, n, k, block_m, packed, _ENOUGH * cores), 6, SHARED_BYTES // 3, bits)


def _whole_eights(m: int) -> int:
    """Rows of a block that takes all of them, eight at least."""
    return max(8, math.ceil(m / 8) * 8)


def _digits(m: int, n: int, k: int, cores: int) -> Tiles | None:
    """Blocks that make digits, each for itself: 256 rows of w share them if that leaves two of three multiprocessors work, else 128.

    Timed were 64 to 112 blocks of a GPU of 132 multiprocessors. With up to 8 rows nothing is gained where fewer of them have work
    (17408 x 8192: 24.8 us for 24.5), with more of them 68 blocks that share their tiles are the fastest, too (26.5 for 33.5): so they are
    taken wherever there is no second wave of a few.
    """
    if m > _DIGIT_ROWS or k % 512:
        return None
    tall, low = (Tiles(_whole_eights(m), block_n, 512, 2, warpgroups=2, digits=True) for block_n in (256, 128))
    if _busy(n, tall, cores) >= 0.65:
        return tall
    if _busy(n, low, cores) >= 0.8:
        return low
    even = n <= 256 * cores or _schedule(m, n, k, tall, cores).shared > 0
    if m > DIRECT_ROWS and n >= 128 * cores and even:
        return tall
    return _gathered(m, n, k, cores)


def _gathered(m: int, n: int, k: int, cores: int) -> Tiles | None:
    """Blocks that make digits, one for a multiprocessor, whose warpgroups or pairs share K: of weights too narrow for those of `_digits`.

    Pairs of blocks of 64 rows read x the most often: of 16 rows and a K beyond 8192 a pipeline is as fast (14336 x 4096: 14.5 us, some
    of its tiles 13.7), but it has 9 to 15 rows padded, which takes 2 us. A shorter K was not timed.
    """
    if k < 4096:
        return None
    halves = Tiles(_whole_eights(m), 128, 512, 2, split_k=2, warpgroups=2, digits=True)
    narrow = dataclasses.replace(halves, block_n=64, block_k=1024)
    ways = [halves] if m > DIRECT_ROWS else [dataclasses.replace(narrow, split_k=1, stages=3)]
    ways += [narrow] if m % 8 or m <= DIRECT_ROWS or k <= _DEEP else []
    return next((tiles for tiles in ways if 0.7 * cores <= blocks(m, n, tiles) <= cores), None)


def _busy(n: int, tiles: Tiles, cores: int) -> float:
    """The share of multiprocessors that compute, of few rows, whose tiles are not cut."""
    count = math.ceil(n / tiles.block_n)
    return count / (cores * math.ceil(count / cores))


def _small(m: int, n: int, k: int, block_m: int, packed: bool, enough: float) -> Tiles:
    """Blocks of 128 rows of w if there are enough of them, or of 64; else they share K, wide ones of four bits in up to four parts.

    Eight parts of a long K are faster up to 16 rows: 13.7 us for 14.6 (14336 x 4096). More rows were not timed with the stages that fit.
    """
    wide, narrow = (Tiles(block_m, block_n, block_k=256 if block_m <= 32 else 128, stages=1) for block_n in (128, 64))
    for tiles in (wide, narrow):
        if blocks(m, n, tiles) >= enough:
            return tiles
    parts = _narrow_parts(m, n, k, wide, enough)
    most = 8 if k > _DEEP and block_m <= 16 else 4
    if packed and parts <= most and blocks(m, n, wide) * parts >= enough:
        return dataclasses.replace(wide, split_k=parts)
    return dataclasses.replace(narrow, split_k=_narrow_parts(m, n, k, narrow, enough))


def _pairs(n: int, block_m: int) -> int:
    """Blocks of 256 rows of w that receive rows of x together, eight rows at a time."""
    return 2 if n % 512 == 0 and block_m % 16 == 0 else 1


def staged(tiles: Tiles, most: int, room: int, *sizes: int) -> Tiles:
    """The tiles with as many stages, up to so many, as fit into so much shared memory, and no fewer than two."""
    deep = (dataclasses.replace(tiles, stages=stages) for stages in range(most, 2, -1))
    return next((each for each in deep if each.shared_bytes(*sizes) <= room), dataclasses.replace(tiles, stages=2))


# Thread blocks for a multiprocessor: 8192 x 8192 took 21.4 us in 256 and 23 in 512 of half the K (eight bits, one row), 16.7 and 20.2 (four
# bits, 32 rows).
_ENOUGH = 1.5


def _narrow_parts(m: int, n: int, k: int, tiles: Tiles, enough: float) -> int:
    """Of K, until there are thread blocks enough."""
    split = 1
    while blocks(m, n, tiles) * split < enough and k // tiles.block_k >= 4 * split:
        split *= 2
    steps = math.ceil(k / tiles.block_k)
    return math.ceil(steps / math.ceil(steps / split))  # no part is empty


# Rows of x up to which digits win at 8192 x 28672: 34 us for 42 at 16; 59 for 47 at 32, whose sums take twice the registers.
_DIGIT_ROWS = 16
_NARROW_ROWS = 32  # of x that small thread blocks take


_BLOCKS = ((128, 2), (256, 2), (192, 3))  # rows of w and warpgroups of blocks of up to 128 rows of x
_CYCLES = 1600  # of the tensor cores in a microsecond, at the clock that the power allows
_IDLE = 250  # cycles of 128 columns in which they stand still


def even_rows(m: int, most: int) -> int:
    """Rows of blocks of at most so many, in sixteens: a cluster halves its copies, eight rows at a time."""
    return math.ceil(m / math.ceil(m / most) / 16) * 16


def _many_rows(m: int, n: int, k: int, bits: int, cores: int) -> Tiles:
    block_m = even_rows(m, 128)
    if bits == 8:
        # Codes of a byte take longest to become floats: they meet more rows of x where all multiprocessors have blocks then (measured at
        # 512 and 4096 rows).
        tall = Tiles(even_rows(m, 256), 128, 128, 2, warpgroups=2, scale_first=True)
        if m > 128 and blocks(m, n, tall) >= 0.9 * cores:
            return tall
        three = m <= 128 and n >= 192 * cores
        tiles = Tiles(block_m, 192 if three else 128, 128, 2, warpgroups=3 if three else 2, scale_first=True)
        return staged(tiles, 4, SHARED_BYTES, bits)
    found: list[Tiles] = []
    for block_n, warpgroups in _BLOCKS:
        tiles = staged(Tiles(block_m, block_n, 128, 2, warpgroups=warpgroups, scale_first=True), 4, SHARED_BYTES, bits)
        pairs = math.ceil(n / block_n) % 2 == 0 and block_n > 128 and not _one_wave(m, n, k, tiles, cores)
        found.append(dataclasses.replace(tiles, cluster=2) if pairs else tiles)
    return min(found, key=lambda each: _time(m, n, k, each, cores))


def _one_wave(m: int, n: int, k: int, tiles: Tiles, cores: int) -> bool:
    """Whether every block has one tile, whole: in pairs they would wait for each other to no end (8192 x 8192 at 512 rows 90 for 87 us)."""
    schedule = _schedule(m, n, k, tiles, cores)
    return not schedule.shared and schedule.across * schedule.down <= schedule.groups


def _schedule(m: int, n: int, k: int, tiles: Tiles, cores: int) -> Schedule:
    across, down = math.ceil(m / tiles.block_m), math.ceil(n / (tiles.block_n * tiles.cluster))
    return Schedule.of(across, down, math.ceil(k / tiles.block_k), tiles.stages, cores // tiles.cluster)


def _time(m: int, n: int, k: int, tiles: Tiles, cores: int) -> float:
    """About how many microseconds a product takes whose thread blocks stay on their multiprocessors."""
    schedule = _schedule(m, n, k, tiles, cores)
    turns = math.ceil(schedule.across * schedule.down / schedule.groups)
    return (turns * 2000 + schedule.longest * (tiles.block_m * tiles.block_n / 16 + _IDLE)) / _CYCLES


def _parts(m: int, n: int, k: int, tiles: Tiles, cores: int) -> int:
    """Of K, as many as there are multiprocessors for; their float32 sums stay below what the weight would take in bfloat16."""
    split = 1
    while blocks(m, n, tiles) * split * 2 <= cores and k // 128 >= 8 * split and 4 * m * split < k:
        split *= 2
    return split


def eight_bit_tiles(m: int, n: int, k: int, cores: int = 132, out_bytes: int = 2) -> Tiles:
    """The tiles of eight bits on both sides that were the fastest on an H200, by rules that take them to other shapes.

    Args:
      m: rows of x.
      n: rows of w.
      k: the contracted length.
      cores: multiprocessors of the GPU.
      out_bytes: of an element of y.

    Returns:
      Tiles that fit into shared memory.

    Raises:
      ValueError: a size is no whole number from 1 on.
    """
    _check(m=m, n=n, k=k, cores=cores)
    if m > 64:
        wide = Tiles(block_m=128, block_n=256, block_k=128, stages=4, warpgroups=2, x_left=True)
        if m >= 4096 and n >= 128 * cores:
            return dataclasses.replace(wide, stages=3)
        if m <= 128 or 2 * blocks(m, n, wide) <= cores:
            narrow = dataclasses.replace(wide, block_n=128)
            return narrow if 3 * blocks(m, n, narrow) >= cores else dataclasses.replace(wide, block_n=64)
        wide = wide if wide.shared_bytes(8, 0, 1, out_bytes) <= SHARED_BYTES else dataclasses.replace(wide, stages=3)
        return dataclasses.replace(wide, cluster=2)
    block_m = _whole_eights(m)
    if n >= 128 * cores:
        return Tiles(block_m, 128, 256, 2 if 8 < m <= 32 else 3)
    return staged(_small(m, n, k, block_m, False, _ENOUGH * cores), 6, SHARED_BYTES // 3, 8, 0, 1, out_bytes)
