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
from .tiles import COPIER_REGISTERS, Tiles, worker_registers


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
    workers, slots, group = tiles.warpgroups, schedule.slots, lax.axis_index("group")
    count = schedule.count(group)

    def scoped(buffers: Sequence, produced, consumed) -> None:
        def copy() -> None:
            plgpu.set_max_registers(COPIER_REGISTERS, action="decrease")

            @pl.loop(0, count)
            def _(number):
                piece = schedule.piece(group, number)
                specs = blocks(piece.m, piece.n)

                @pl.loop(piece.first, piece.last)
                def _(stage):  # each into a slot that has been given back
                    plgpu.barrier_wait(consumed.at[lax.rem(stage, slots)])
                    copy_stage(specs, operands, buffers, produced, stage)

            for slot in range(slots):  # nobody leaves while a neighbour may still tell of a stage
                plgpu.barrier_wait(consumed.at[slot])

        def compute() -> None:
            plgpu.set_max_registers(worker_registers(workers), action="increase")
            for slot in range(slots):
                plgpu.barrier_arrive(consumed.at[slot])

            @pl.loop(0, count)
            def _(number):
                piece = schedule.piece(group, number)
                begin(piece)

                def summed(acc) -> None:
                    _through(advance, buffers, produced, consumed, schedule, piece, acc, overlap)
                    arrived()
                    parts.end(piece, group, schedule, acc[...], finish)

                pl.run_scoped(summed, ACC(shape, dtype))

        lax.cond(lax.axis_index("wg") != workers, compute, copy)

    if tiles.cluster > 1:  # a neighbour's copies end here, too
        consumed = plgpu.ClusterBarrier(collective_axes=("cluster",), num_arrivals=workers, num_barriers=slots)
    else:
        consumed = plgpu.Barrier(num_arrivals=workers, num_barriers=slots)
    pl.run_scoped(
        scoped,
        [
            plgpu.SMEM((slots, *spec.block_shape), operand.dtype, transforms=spec.transforms)
            for spec, operand in zip(blocks(0, 0), operands, strict=True)
        ],
        plgpu.Barrier(num_arrivals=len(operands), num_barriers=slots),
        consumed,
        collective_axes="wg",
    )


def copy_stage(specs: Sequence, operands: Sequence, buffers: Sequence, produced, stage: Any) -> None:
    """Asks for the blocks of a stage, into its slot."""
    slot = lax.rem(stage, buffers[0].shape[0])
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
