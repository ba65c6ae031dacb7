"""The ring of stages of products of digits: the warpgroup that copies makes digits of x besides, a stage ahead of those that multiply.

As in `ring`, blocks stay on their multiprocessor and compute one piece after another, but for those that gather sums (`gathered`), which
have one. Here a sum is an ordinary array, since the tensor
cores add integers of one group alone, and a stage has two kinds of shared memory: codes and scales, and rows of x, which become digits
beside them.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from .gathered import Gathered
from .mosaic import Layout, swizzled, swizzled_rows
from .parts import Parts
from .ring import divided, fill, own_pieces, stages_of
from .schedule import Piece, Schedule
from .tiles import PIECE, Tiles


def digits_ring(
    advance: Callable[..., jax.Array], begin: Callable[[Piece], None], arrived: Callable[[], None], finish: Callable,
    convert: Callable[..., None], *, tiles: Tiles, schedule: Schedule, parts: Parts, gathered: Gathered | None,
    blocks: Callable[[Any], Sequence], operands: Sequence, x: Any, shape: tuple[int, int],
) -> None:  # fmt: skip
    """Computes the pieces of a thread block.

    Args:
      advance: of the number of a stage, references to its blocks, to digits (2 block_m, block_k) and units (block_k / 128, block_m), and
        the sum: the sum after it.
      begin: of a piece: asks for what `finish` needs, before the first stage.
      arrived: waits for it.
      finish: of a piece that ends a tile, and a function of a first column and how many: these columns of the sum, with what others
        computed of it.
      convert: of references to a tile of x, digits and units: writes the two, so that the tensor cores see them.
      tiles: the cut, of two warpgroups or more.
      schedule: of the pieces.
      parts: where sums lie that other groups end.
      gathered: what others of the group have of a sum; None where nobody has.
      blocks: of the block's rows of w: the blocks of a stage, whose index maps take its number.
      operands: references in device memory, one for every block.
      x: (M, K) in device memory.
      shape: of the sum of a warpgroup, float32.
    """
    bm, bk, slots = tiles.block_m, tiles.block_k, schedule.slots
    group, each = own_pieces(schedule)

    def scoped(buffers: Sequence, rows, digits, units, produced, here, ready, consumed) -> None:
        def copy(piece: Piece) -> None:
            maker = _Maker(convert, x, piece, (bm, bk), rows, digits, units, here, ready)
            weights = blocks(piece.n)
            ahead = jnp.minimum(piece.first + slots, piece.last)

            def bring(stage) -> None:
                fill(weights, operands, buffers, produced, consumed, stage)

            # Rows before the codes, behind which they would have to wait.
            for work in (maker.ask, bring, maker.make):
                pl.loop(piece.first, ahead)(work)

            @pl.loop(ahead, piece.last)
            def _(stage):
                bring(stage)
                maker.make(stage)

            if gathered and gathered.memory is None:
                gathered.meet()

        def compute(piece: Piece) -> None:
            begin(piece)

            # Turns of the ring written out take more registers than there are.
            def add(stage, total):
                slot = lax.rem(stage, slots)
                plgpu.barrier_wait(produced.at[slot])
                plgpu.barrier_wait(ready.at[slot])
                total = advance(stage, *(buffer.at[slot] for buffer in (*buffers, digits, units)), total)
                plgpu.barrier_arrive(consumed.at[slot])
                return total

            zeros = plgpu.layout_cast(jnp.zeros(shape, jnp.float32), Layout.WGMMA)
            total = lax.fori_loop(piece.first, piece.last, add, zeros)
            arrived()
            if gathered:
                gathered.end(piece, group, total, finish)
            else:
                parts.end(piece, group, schedule, total, finish)

        def own(work: Callable[[Piece], None]) -> None:
            each(lambda piece: work(gathered.piece(piece) if gathered else piece))

        divided(lambda: own(copy), lambda: own(compute), tiles, consumed)

    pl.run_scoped(
        scoped,
        stages_of(blocks(0), operands, slots),
        plgpu.SMEM((slots, bm, bk), x.dtype, transforms=swizzled_rows(16)),
        plgpu.SMEM((slots, 2 * bm, bk), jnp.int8, transforms=swizzled(PIECE, 8)),
        plgpu.SMEM((slots, bk // PIECE, bm), jnp.float32),
        plgpu.Barrier(num_arrivals=len(operands), num_barriers=slots),
        plgpu.Barrier(num_barriers=slots),
        plgpu.Barrier(num_barriers=slots),
        plgpu.Barrier(num_arrivals=tiles.warpgroups, num_barriers=slots),
        collective_axes="wg",
    )


@dataclasses.dataclass(frozen=True, eq=False)
class _Maker:
    """Rows of x on their way to becoming digits, each stage in its slot.

    Attributes:
      convert: as `digits_ring` takes it.
      x: (M, K) in device memory.
      piece: whose stages they are.
      tile: rows and columns of x in a stage.
      rows: of x, in shared memory.
      digits: theirs.
      units: theirs.
      here: says that rows have come.
      ready: says that digits are there.
    """

    convert: Callable[..., None]
    x: Any
    piece: Piece
    tile: tuple[int, int]
    rows: Any
    digits: Any
    units: Any
    here: Any
    ready: Any

    def ask(self, stage: Any) -> None:
        """Asks for the rows of a stage, into its slot, of whose rows digits have been made."""
        (bm, bk), slot = self.tile, lax.rem(stage, self.rows.shape[0])
        at = (pl.ds(self.piece.m * bm, bm), pl.ds(stage * bk, bk))
        plgpu.copy_gmem_to_smem(self.x.at[at], self.rows.at[slot], self.here.at[slot])

    def make(self, stage: Any) -> None:
        """Makes the digits of a stage, in a slot that has been given back, and asks for rows that go where its own were."""
        slots = self.rows.shape[0]
        slot = lax.rem(stage, slots)
        plgpu.barrier_wait(self.here.at[slot])
        self.convert(self.rows.at[slot], self.digits.at[slot], self.units.at[slot])
        plgpu.barrier_arrive(self.ready.at[slot])

        @pl.when(stage + slots < self.piece.last)
        def _():
            self.ask(stage + slots)
