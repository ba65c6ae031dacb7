"""The frame that the Hopper kernels share: stages of a pipeline, sums of the tensor cores, tiles of y on their way out."""

import dataclasses
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from .epilogue import Activation, activated
from .mosaic import ACC, Layout, load, transposed
from .ring import ring
from .tiles import COPIER_REGISTERS, Tiles


def over_columns(rows: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """One value for every row, repeated over the columns."""
    return lax.broadcast_in_dim(rows, shape, (0,))


def over_rows(columns: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """One value for every column, repeated over the rows."""
    return lax.broadcast_in_dim(columns, shape, (1,))


def stream(
    advance: Callable, finish: Callable, *, tiles: Tiles, steps: int, in_specs: Sequence, operands: Sequence, shape, dtype, registers: bool,
    overlap: bool = False,
) -> None:  # fmt: skip
    """Runs `advance` over the stages, then `finish` on the sum.

    Args:
      advance: of the number of a stage, references to its blocks and the sum: the sum after it, if it is in `registers`; else it takes
        one thing more, which it calls behind each product that it begins.
      finish: of the sum (R, C), in registers.
      tiles: the cut.
      steps: stages in all.
      in_specs: blocks of a stage.
      operands: references in device memory, one for every block.
      shape: of the sum of a warpgroup.
      dtype: of the sum, float32 or int32.
      registers: the sum is an ordinary array that `advance` returns; otherwise the tensor cores add to it.
      overlap: a stage begins while the products of the one before are under way (`ring`), where several warpgroups compute.
        Not with `registers`.
    """

    def with_sum(run):
        if registers:
            finish(run(plgpu.layout_cast(jnp.zeros(shape, dtype), Layout.WGMMA)))
            return

        def scoped(acc):
            run(acc)
            finish(acc[...])

        pl.run_scoped(scoped, ACC(shape, dtype))

    def stage(index, *refs):
        if registers:
            return advance(index[0], *refs)
        *refs, carry = refs
        advance(index[0], *refs, carry, lambda: None)
        plgpu.wgmma_wait(0)
        return carry

    if tiles.warpgroups > 1 and overlap:
        ring(advance, with_sum, tiles=tiles, steps=steps, in_specs=in_specs, operands=operands)
        return
    if tiles.warpgroups > 1:
        plgpu.emit_pipeline_warp_specialized(
            stage,
            grid=(steps,),
            memory_registers=COPIER_REGISTERS,
            in_specs=in_specs,
            max_concurrent_steps=tiles.stages,
            wg_axis="wg",
            num_compute_wgs=tiles.warpgroups,
            compute_context=with_sum,
        )(*operands)
        return

    def alone(carry):
        if registers:
            return plgpu.emit_pipeline(stage, grid=(steps,), in_specs=in_specs, max_concurrent_steps=tiles.stages, init_carry=carry)(
                *operands
            )

        def adding(index, *refs):
            stage(index, *refs, carry)

        return plgpu.emit_pipeline(adding, grid=(steps,), in_specs=in_specs, max_concurrent_steps=tiles.stages)(*operands)

    with_sum(alone)


def vector_size(size: int, dtype) -> int:
    """Elements of shared memory for a vector: what the copy engine moves is a multiple of 128 bytes."""
    least = 128 // jnp.dtype(dtype).itemsize
    return -(-size // least) * least


def fetch_vector(source, target, barrier, start, size: int):
    """Copies a stretch of a vector from device memory into shared memory; past its end are zeros.

    Args:
      source: a vector in device memory.
      target: `vector_size` elements of shared memory.
      barrier: to await the copy on.
      start: of the stretch.
      size: of the stretch.

    Returns:
      The stretch, a reference of `size` elements.
    """
    plgpu.copy_gmem_to_smem(source.at[pl.ds(start, target.shape[0])], target, barrier)
    plgpu.barrier_wait(barrier)
    return target.at[pl.ds(0, size)]


def row_values(ref) -> jax.Array:
    """A vector in shared memory as one float32 for every row of a sum."""
    return load(ref, Layout.WGMMA.reduce(1), optimized=False).astype(jnp.float32)


def column_values(ref) -> jax.Array:
    """A vector in shared memory as one float32 for every column of a sum."""
    return load(ref, Layout.WGMMA.reduce(0), optimized=False).astype(jnp.float32)


@dataclasses.dataclass(frozen=True, eq=False)
class Epilogue:
    """The end of a kernel: the bias of the rows of w and an activation, on the float32 sums in registers.

    Attributes:
      operands: what the kernel takes behind its own: the bias, or nothing.
      activation: of the sums.
    """

    operands: tuple[jax.Array, ...]
    activation: Activation | None

    @staticmethod
    def of(bias: jax.Array | None, activation: Activation | None, split: bool) -> "Epilogue":
        """What a kernel does itself: nothing where the sums of others are missing."""
        if split:
            return Epilogue((), None)
        return Epilogue(() if bias is None else (bias,), activation)

    def taken(self, references: Sequence) -> tuple:
        """(the bias in device memory or None, the other references)."""
        count = len(self.operands)
        return (references[0] if count else None), references[count:]

    def scratch(self, warpgroups: int, size: int) -> list:
        """Shared memory for a stretch of `size` for each warpgroup, and barriers."""
        if not self.operands:
            return []
        kind = self.operands[0].dtype
        return [plgpu.SMEM((warpgroups, vector_size(size, kind)), kind), plgpu.Barrier(num_barriers=warpgroups)]

    def rows(self, total: jax.Array, bias, scratch: Sequence, warpgroup, start) -> jax.Array:
        """f(total + b), where rows of w are rows of the sum, from `start` on."""
        if bias is not None:
            own = fetch_vector(bias, scratch[0].at[warpgroup], scratch[1].at[warpgroup], start, total.shape[0])
            total = total + over_columns(row_values(own), total.shape)
        return activated(total, self.activation)

    def columns(self, total: jax.Array, bias, scratch: Sequence, warpgroup, start) -> jax.Array:
        """f(total + b), where rows of w are columns of the sum."""
        if bias is not None:
            own = fetch_vector(bias, scratch[0].at[warpgroup], scratch[1].at[warpgroup], start, total.shape[1])
            total = total + over_rows(column_values(own), total.shape)
        return activated(total, self.activation)


STORED_COLUMNS = 64  # of a sum that pass through shared memory at once


def staging(shape: tuple[int, int], *, transpose: bool) -> tuple[int, int]:
    """The shape of the shared memory that `store` needs for a sum of a shape."""
    rows, columns = shape[0], min(shape[1], STORED_COLUMNS)
    return (columns, rows) if transpose else (rows, columns)


def store(value: jax.Array, stage, target, *, transpose: bool) -> None:
    """Writes a sum to device memory through shared memory, a few columns at a time; what lies past the edge is left out.

    Args:
      value: the sum (R, C) in registers.
      stage: shared memory of `staging`.
      target: of the column at which a stretch starts, and of how many columns it has: its place in device memory, shaped as `stage`.
      transpose: the sum stands on its side.
    """
    width = min(value.shape[1], STORED_COLUMNS)
    value = plgpu.layout_cast(value, Layout.WGMMA)
    for start in range(0, value.shape[1], width):
        size = min(width, value.shape[1] - start)
        part = value if width == value.shape[1] else value[:, start : start + size]
        own = stage if size == width else stage.at[:size] if transpose else stage.at[:, :size]
        if start:
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        if transpose:
            transposed(own)[...] = plgpu.layout_cast(part, Layout.WGMMA_TRANSPOSED)
        else:
            own[...] = part
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(own, target(start, size))
    plgpu.wait_smem_to_gmem(0)
