"""What the kernel that loads weights directly is compiled for, and where things lie in a block's shared memory."""

from __future__ import annotations

import dataclasses
import math
from typing import Any, NamedTuple

from .tiles import CORE_WARPS, PIECE, Direct

TILE = 16  # rows of w that the tensor cores take at once


class Places(NamedTuple):
    """Bytes of shared memory: digits begin at 0, then units, sums of squares, norms of rows (of a part of K: their squares), sums of warps;
    and where it ends."""

    units: int
    squares: int
    norms: int
    sums: int
    end: int


@dataclasses.dataclass(frozen=True)
class Shape:
    """A launch.

    Attributes:
      m, n, k: of the product.
      group: consecutive k that share a scale of w, a multiple of 128.
      columns: scales of a row of w, as stored.
      dtype: of the scales.
      warps: of a block.
      turn: pieces that a warp takes at once.
      blocks: of the launch.
      parts: of K: as many blocks are a group, which work on the same tiles.
      early: the launch begins while the one before it ends.
      bias: the dtype of what is added; None where nothing is.
      by_row: what is added differs from row to row of x.
      norm: what is added to the mean of the squares of a row, by whose root its products are divided; None: they are not.
      whole: y is bfloat16; else float32.
      bits: of a code, 4 or 8.
      gated: tiles hold eight rows of a gate and the eight of what it multiplies: y = silu(gate) other, half as wide.
      wide: four warps multiply 64 rows of w together; else each 16.
    """

    m: int
    n: int
    k: int
    group: int
    columns: int
    dtype: Any
    warps: int
    turn: int
    blocks: int
    parts: int = 1
    early: bool = False
    bias: Any = None
    norm: float | None = None
    whole: bool = True
    bits: int = 4
    by_row: bool = False
    gated: bool = False
    wide: bool = False

    @property
    def out(self) -> int:
        """Columns of y."""
        return self.n // 2 if self.gated else self.n

    @property
    def high(self) -> int:
        """Warps that multiply rows of w of their own: a tile has sixteen for each."""
        return 4 if self.wide else 1

    @property
    def sharers(self) -> int:
        """Of the K of a tile in a block: warps, or four of them together."""
        return self.warps // self.high

    @property
    def tiles(self) -> int:
        """Of w."""
        return self.n // (TILE * self.high)

    @property
    def groups(self) -> int:
        """Of blocks."""
        return self.blocks // self.parts

    @property
    def most(self) -> int:
        """Tiles that a group works on, at most."""
        return math.ceil(self.tiles / self.groups)

    def together(self, blocks: int, cores: int) -> int:
        """Blocks that are launched as parts of one, so that they live together whatever registers they would take.

        Args:
          blocks: that are to live on a multiprocessor, which has registers for `CORE_WARPS`.
          cores: multiprocessors; blocks that are no more than these have one each.
        """
        return blocks if self.blocks > cores and blocks * self.warps <= CORE_WARPS and self.blocks % blocks == 0 else 1

    def launched_bytes(self, blocks: int, cores: int) -> int:
        """Shared memory of a thread block of the launch, whose parts have their own (`together`)."""
        return self.together(blocks, cores) * self.bytes

    @property
    def words(self) -> int:
        """Words of codes that a thread loads of a piece, half of them of row g and half of row g + 8."""
        return 2 * self.bits

    @property
    def pieces(self) -> int:
        """Of K."""
        return self.k // PIECE

    @property
    def own(self) -> int:
        """Pieces of a part, a multiple of `turn`."""
        return math.ceil(self.pieces / (self.parts * self.turn)) * self.turn

    @property
    def rounds(self) -> int:
        """Turns of a warp in a tile."""
        return math.ceil(self.own / (self.turn * self.sharers))

    @property
    def held(self) -> int:
        """Pieces in shared memory: a part, and as many behind it as a warp takes, for those that have nothing left to do."""
        return self.own + (0 if self.own == self.rounds * self.turn * self.sharers else self.turn)

    @property
    def quads(self) -> int:
        """Four rows of x fill the eight columns of the tensor cores' operand B with their two digits."""
        return math.ceil(self.m / 4)

    @property
    def units(self) -> int:
        """Of a tile: four rows of x and sixteen of w."""
        return self.quads * self.high

    @property
    def piece_bytes(self) -> int:
        """Of the digits of a piece of all rows; `wgmma` reads whole eights of columns."""
        return 2 * PIECE * (4 * self.quads if self.wide else self.m)

    @property
    def places(self) -> Places:
        """Where things lie in shared memory."""
        units = self.held * self.piece_bytes
        squares = units + self.held * self.m * 4
        norms = squares + (0 if self.norm is None else self.held * self.m * 4)
        sums = norms + (0 if self.norm is None else self.m * 4)
        sums = -(-sums // 16) * 16
        return Places(units, squares, norms, sums, sums + 2 * self.sharers * self.units * 32 * 8)

    @property
    def bytes(self) -> int:
        """Shared memory that a block takes, or a part of one, each of which begins at a multiple of 128."""
        return -(-self.places.end // 128) * 128


def shape_of(
    m: int, n: int, k: int, *, group: int, columns: int, dtype: Any, tiles: Direct, cores: int, bias: Any = None, norm: float | None = None,
    whole: bool = True, bits: int = 4,
) -> Shape:  # fmt: skip
    """The launch of a product: no more groups of blocks than tiles, and so many that blocks may be launched together (`Shape.together`)."""
    groups = max(1, min(n // (TILE * (4 if tiles.wide else 1)), cores * tiles.blocks // tiles.split_k))
    step = tiles.blocks // math.gcd(tiles.blocks, tiles.split_k)
    blocks = (groups if groups < step else groups // step * step) * tiles.split_k
    return Shape(m, n, k, group, columns, dtype, tiles.warps, tiles.turn, blocks, tiles.split_k, tiles.early, bias, norm, whole, bits,
                 wide=tiles.wide)  # fmt: skip
