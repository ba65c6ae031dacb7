"""A ring of stages in shared memory that one warpgroup fills and others use, for sums that stay with the tensor cores.

Blocks stay on their multiprocessor and compute one piece after another (`schedule`); the ring goes on from one piece to the next, so that
the first stages of a tile come in while the one before is written.
A turn of the ring is written out, and with `overlap` each stage is given back when the next has begun: what lies between two (a barrier,
codes that become floats) goes on beside a product. No product is under way from one turn of the loop to the next: compilers gave the
registers of its operand to others there. (`emit_pipeline_warp_specialized` ends every stage, and every tile, with a wait.)
"""

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from .mosaic import ACC
from .parts import Parts
from .schedule import Piece, Schedule
from .tiles import Tiles


def ring(
    advance: Callable[..., None], begin: Callable[[Piece], None], arrived: Callable[[], None], finish: Callable, *, tiles: Tiles,
    schedule: Schedule, parts: Parts, blocks: Callable[[Any, Any], Sequence], operands: Sequence, shape: tuple[int, int], dtype,
    overlap: bool,
) -> None:  # fmt: skip
    """Computes the pieces of a thread block.

    Args:
      advance: of the number of a stage, references to its blocks, the sum and `settle`: begins the products of a stage, and calls `settle`
        behind each of them.
      begin: of a piece: asks for what `finish` needs, before the first stage.
      arrived: waits for it.
      finish: of a piece that ends a tile, and a function of a first column and how many: these columns of the sum, with what others
        computed of it.
      tiles: the cut, of two warpgroups or more.
      schedule: of the pieces.
      parts: where sums lie that others end.
      blocks: of the block's place in y: the blocks of a stage, whose index maps take its number.
      operands: references in device memory, one for every block.
      shape: of the sum of a warpgroup.
      dtype: of the sum.
      overlap: a stage begins while the last product of the one before is under way.
    """
    slots = schedule.slots
    group, each = own_pieces(schedule)

    def scoped(buffers: Sequence, produced, consumed) -> None:
        def copy(piece: Piece) -> None:
            specs = blocks(piece.m, piece.n)

            @pl.loop(piece.first, piece.last)
            def _(stage):
                fill(specs, operands, buffers, produced, consumed, stage)

        def copy_all() -> None:
            each(copy)
            for slot in range(slots):  # nobody leaves while a neighbour may still tell of a stage
                plgpu.barrier_wait(consumed.at[slot])

        def compute(piece: Piece) -> None:
            begin(piece)

            def summed(acc) -> None:
                _through(advance, buffers, produced, consumed, schedule, piece, acc, overlap)
                arrived()
                parts.end(piece, group, schedule, acc[...], finish)

            pl.run_scoped(summed, ACC(shape, dtype))

        divided(copy_all, lambda: each(compute), tiles, consumed)

    if tiles.cluster > 1:  # a neighbour's copies end here, too
        consumed = plgpu.ClusterBarrier(collective_axes=("cluster",), num_arrivals=tiles.warpgroups, num_barriers=slots)
    else:
        consumed = plgpu.Barrier(num_arrivals=tiles.warpgroups, num_barriers=slots)
    pl.run_scoped(
        scoped,
        stages_of(blocks(0, 0), operands, slots),
        plgpu.Barrier(num_arrivals=len(operands), num_barriers=slots),
        consumed,
        collective_axes="wg",
    )


def own_pieces(schedule: Schedule) -> tuple[Any, Callable[[Callable[[Piece], None]], None]]:
    """The number of a block's group, and what does something with each piece of it, one after another."""
    group = lax.axis_index("group")
    count = schedule.count(group)

    def each(work: Callable[[Piece], None]) -> None:
        @pl.loop(0, count)
        def _(number):
            work(schedule.piece(group, number))

    return group, each


def divided(copy: Callable[[], None], compute: Callable[[], None], tiles: Tiles, consumed) -> None:
    """Gives the work of a thread block to its warpgroups: the last one copies, the others compute, and have given all slots back before."""

    def copier() -> None:
        plgpu.set_max_registers(tiles.copier_registers, action="decrease")
        copy()

    def worker() -> None:
        plgpu.set_max_registers(tiles.worker_registers, action="increase")
        for slot in range(consumed.shape[0]):
            plgpu.barrier_arrive(consumed.at[slot])
        compute()

    lax.cond(lax.axis_index("wg") != tiles.warpgroups, worker, copier)


def stages_of(specs: Sequence, operands: Sequence, slots: int) -> list:
    """Shared memory for so many stages of the blocks."""
    return [
        plgpu.SMEM((slots, *spec.block_shape), operand.dtype, transforms=spec.transforms)
        for spec, operand in zip(specs, operands, strict=True)
    ]  # fmt: skip


def fill(specs: Sequence, operands: Sequence, buffers: Sequence, produced, consumed, stage: Any) -> None:
    """Asks for the blocks of a stage, into its slot, which has to be given back before."""
    slot = lax.rem(stage, buffers[0].shape[0])
    plgpu.barrier_wait(consumed.at[slot])
    for spec, source, target in zip(specs, operands, buffers, strict=True):
        at = tuple(pl.ds(index * size, size) for index, size in zip(spec.index_map(stage), spec.block_shape, strict=True))
        plgpu.copy_gmem_to_smem(source.at[at], target.at[slot], produced.at[slot], collective_axes=spec.collective_axes or None)


def _through(
    advance: Callable[..., None], buffers: Sequence, produced, consumed, schedule: Schedule, piece: Piece, acc, overlap: bool
) -> None:  # fmt: skip
    """What a warpgroup does that computes: turns of the ring, in which slots are known."""
    slots, stages = schedule.slots, schedule.stages

    def turn(first, count: int) -> None:
        for slot in range(count):
            plgpu.barrier_wait(produced.at[slot])
            begun = itertools.count()

            def settle(slot=slot, begun=begun) -> None:
                """All products but the one just begun are done, so that no more than two hold registers."""
                number = next(begun)
                if not overlap:
                    plgpu.wgmma_wait(0)
                    return
                if slot or number:
                    plgpu.wgmma_wait(1)
                if slot and not number:
                    plgpu.barrier_arrive(consumed.at[slot - 1])

            advance(first + slot, *(buffer.at[slot] for buffer in buffers), acc, settle)
            if not overlap:
                plgpu.barrier_arrive(consumed.at[slot])
        if overlap:
            plgpu.wgmma_wait(0)
            plgpu.barrier_arrive(consumed.at[count - 1])

    @pl.loop(piece.first // slots, piece.last // slots)
    def _(i):
        turn(i * slots, slots)

    if stages % slots:

        @pl.loop(0, jnp.int32(piece.last == stages))
        def _(_i):
            turn(jnp.int32(stages - stages % slots), stages % slots)
