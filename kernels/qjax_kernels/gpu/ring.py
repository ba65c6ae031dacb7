"""A ring of stages in shared memory that one warpgroup fills and others use, for sums that stay with the tensor cores.

`emit_pipeline_warp_specialized` ends every stage with a wait for the tensor cores. Here a turn of the ring is written out, and each stage
is given back when the next has begun: what lies between two (a barrier, codes that become floats) goes on beside a product.
No product is under way from one turn of the loop to the next: compilers gave the registers of its operand to others there.
"""

import itertools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from .tiles import COPIER_REGISTERS, Tiles, worker_registers


def ring(
    advance: Callable[..., None], work: Callable[[Callable[[jax.Array], None]], None], *, tiles: Tiles, steps: int, in_specs: Sequence,
    operands: Sequence,
) -> None:  # fmt: skip
    """Runs `work` in the warpgroups that compute, while the last one copies.

    Args:
      advance: of the number of a stage, references to its blocks, the sum and `settle`: begins the products of a stage, and calls `settle`
        behind each of them.
      work: of a function of the sum that goes through all stages.
      tiles: the cut, of two warpgroups or more.
      steps: stages in all.
      in_specs: blocks of a stage.
      operands: references in device memory, one for every block.
    """
    slots, workers = min(tiles.stages, steps), tiles.warpgroups

    def scoped(buffers: Sequence, produced, consumed) -> None:
        def copy() -> None:
            plgpu.set_max_registers(COPIER_REGISTERS, action="decrease")
            _copy(in_specs, operands, buffers, produced, consumed, slots, steps)

        def compute() -> None:
            plgpu.set_max_registers(worker_registers(workers), action="increase")
            work(lambda acc: _through(advance, buffers, produced, consumed, slots, steps, acc))

        lax.cond(lax.axis_index("wg") != workers, compute, copy)

    if tiles.cluster > 1:  # a neighbour's copies end here, too
        consumed = plgpu.ClusterBarrier(collective_axes=("cluster",), num_arrivals=workers, num_barriers=slots)
    else:
        consumed = plgpu.Barrier(num_arrivals=workers, num_barriers=slots)
    pl.run_scoped(
        scoped,
        [
            plgpu.SMEM((slots, *spec.block_shape), operand.dtype, transforms=spec.transforms)
            for spec, operand in zip(in_specs, operands, strict=True)
        ],
        plgpu.Barrier(num_arrivals=len(operands), num_barriers=slots),
        consumed,
        collective_axes="wg",
    )


def _copy(in_specs: Sequence, operands: Sequence, buffers: Sequence, produced, consumed, slots: int, steps: int) -> None:
    """What the warpgroup does that copies."""

    def fetch(step, slot) -> None:
        for spec, source, target in zip(in_specs, operands, buffers, strict=True):
            at = tuple(pl.ds(index * size, size) for index, size in zip(spec.index_map(step), spec.block_shape, strict=True))
            plgpu.copy_gmem_to_smem(source.at[at], target.at[slot], produced.at[slot], collective_axes=spec.collective_axes or None)

    for slot in range(slots):
        fetch(slot, slot)

    @pl.loop(slots, steps)
    def _(step):
        slot = lax.rem(step, slots)
        plgpu.barrier_wait(consumed.at[slot])
        fetch(step, slot)

    for step in range(steps - slots, steps):  # nobody leaves while a neighbour may still tell of a stage
        plgpu.barrier_wait(consumed.at[step % slots])


def _through(advance: Callable[..., None], buffers: Sequence, produced, consumed, slots: int, steps: int, acc) -> None:
    """What a warpgroup does that computes: turns of the ring, in which slots are known."""

    def turn(first, count: int) -> None:
        for slot in range(count):
            plgpu.barrier_wait(produced.at[slot])
            begun = itertools.count()

            def settle(slot=slot, begun=begun) -> None:
                """All products but the one just begun are done, so that no more than two hold registers."""
                number = next(begun)
                if slot or number:
                    plgpu.wgmma_wait(1)
                if slot and not number:
                    plgpu.barrier_arrive(consumed.at[slot - 1])

            advance(first + slot, *(buffer.at[slot] for buffer in buffers), acc, settle)
        plgpu.wgmma_wait(0)
        plgpu.barrier_arrive(consumed.at[count - 1])

    @pl.loop(0, steps // slots)
    def _(i):
        turn(i * slots, slots)

    if steps % slots:
        turn(jnp.int32(steps - steps % slots), steps % slots)
