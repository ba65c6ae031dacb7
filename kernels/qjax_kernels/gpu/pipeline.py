"""The frame that the Hopper kernels share: stages of a pipeline, sums of the tensor cores, tiles of y on their way out."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from .epilogue import Activation, activated
from .mosaic import ACC, Layout, load, transposed
from .schedule import Piece, Schedule
from .tiles import COPIER_REGISTERS, Tiles


def over_columns(rows: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """One value for every row, repeated over the columns."""
    return lax.broadcast_in_dim(rows, shape, (0,))


def over_rows(columns: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """One value for every column, repeated over the rows."""
    return lax.broadcast_in_dim(columns, shape, (1,))


def stream(
    advance: Callable, begin: Callable[[Piece], None], arrived: Callable[[], None], finish: Callable, *, tiles: Tiles, steps: int,
    blocks: Callable[[Any, Any, Any], Sequence], operands: Sequence, shape, dtype, registers: bool,
) -> None:  # fmt: skip
    """Computes one tile, or a part of its K, in a thread block of a grid of "k", "n" and "m" (`launch`).

    Args:
      advance: of the number of a stage, references to its blocks and the sum: the sum after it, if it is in `registers`; else it takes
        one thing more, which it calls behind each product that it begins.
      begin: of a piece: asks for what `finish` needs, before the first stage.
      arrived: waits for it.
      finish: of the piece, and a function of a first column and how many: these columns of the sum.
      tiles: the cut.
      steps: stages of a part.
      blocks: of the block's place in y and its first stage: the blocks of a stage, whose index maps count from there.
      operands: references in device memory, one for every block.
      shape: of the sum of a warpgroup.
      dtype: of the sum, float32 or int32.
      registers: the sum is an ordinary array that `advance` returns; otherwise the tensor cores add to it.
    """

    part = lax.axis_index("k")
    here = Piece(lax.axis_index("m"), lax.axis_index("n"), part * steps, (part + 1) * steps, part=part)
    in_specs = blocks(here.m, here.n, here.first)

    def end(total) -> None:
        arrived()
        finish(here, lambda start, size: total if size == total.shape[1] else total[:, start : start + size])

    def with_sum(run):
        begin(here)
        if registers:
            end(run(plgpu.layout_cast(jnp.zeros(shape, dtype), Layout.WGMMA)))
            return

        def scoped(acc):
            run(acc)
            end(acc[...])

        pl.run_scoped(scoped, ACC(shape, dtype))

    def stage(index, *refs):
        if registers:
            return advance(index[0] + here.first, *refs)
        *refs, carry = refs
        advance(index[0] + here.first, *refs, carry, lambda: None)
        plgpu.wgmma_wait(0)
        return carry

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


def launch(tiles: Tiles, schedule: Schedule | None, grid: tuple[int, int, int] = (1, 1, 1)) -> dict[str, Any]:
    """What `plgpu.kernel` takes of the thread blocks.

    Args:
      tiles: the cut.
      schedule: of blocks that go by pieces (`ring`, `digits_ring`), or None.
      grid: of the other ones: parts of K, groups of blocks of rows of w, blocks of rows of x.
    """
    stay = {"grid": (schedule.groups,), "grid_names": ("group",)} if schedule else {"grid": grid, "grid_names": ("k", "n", "m")}
    threads = {} if tiles.warpgroups == 1 else {"num_threads": tiles.warpgroups + 1, "thread_name": "wg"}
    return stay | threads | ({} if tiles.together == 1 else {"cluster": (tiles.together,), "cluster_names": ("cluster",)})


@dataclasses.dataclass(frozen=True, eq=False)
class Vector:
    """A vector in device memory, a stretch of which waits in the shared memory of a warpgroup; past its end are zeros.

    Attributes:
      source: in device memory.
      stage: shared memory.
      barrier: to await the copy on.
    """

    source: Any
    stage: Any
    barrier: Any

    @staticmethod
    def scratch(warpgroups: int, size: int, dtype) -> tuple[Any, Any]:
        """Shared memory for a stretch of `size` for each warpgroup, in the 128 bytes that the copy engine moves at least, and barriers."""
        least = 128 // jnp.dtype(dtype).itemsize
        return plgpu.SMEM((warpgroups, -(-size // least) * least), dtype), plgpu.Barrier(num_barriers=warpgroups)

    def fetch(self, start: Any) -> None:
        """Asks for the stretch that begins there."""
        plgpu.copy_gmem_to_smem(self.source.at[pl.ds(start, self.stage.shape[0])], self.stage, self.barrier)

    def arrived(self) -> None:
        """Waits for what was asked for."""
        plgpu.barrier_wait(self.barrier)

    def rows(self, shape: tuple[int, ...]) -> jax.Array:
        """One float32 for every row of a sum, over all columns."""
        return over_columns(row_values(self.stage.at[pl.ds(0, shape[0])]), shape)

    def columns(self, shape: tuple[int, ...], start: int = 0) -> jax.Array:
        """One float32 for every column of a stretch of a sum, over all rows."""
        return over_rows(column_values(self.stage.at[pl.ds(start, shape[1])]), shape)


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
        """(the bias in device memory, or nothing; the other references)."""
        count = len(self.operands)
        return references[:count], references[count:]

    def scratch(self, warpgroups: int, size: int) -> list:
        """Shared memory for a stretch of `size` for each warpgroup, and barriers."""
        return [part for bias in self.operands for part in Vector.scratch(warpgroups, size, bias.dtype)]

    def vectors(self, sources: Sequence, scratch: Sequence, warpgroup: Any) -> list[Vector]:
        """The bias of a warpgroup, or nothing."""
        return [Vector(source, scratch[0].at[warpgroup], scratch[1].at[warpgroup]) for source in sources]

    def rows(self, part: jax.Array, bias: Sequence[Vector]) -> jax.Array:
        """f(sum + b), where rows of w are rows of the sum."""
        return activated(part + bias[0].rows(part.shape) if bias else part, self.activation)

    def columns(self, part: jax.Array, bias: Sequence[Vector], start: int) -> jax.Array:
        """f(sum + b), where rows of w are columns of the sum, of which these begin at `start`."""
        return activated(part + bias[0].columns(part.shape, start) if bias else part, self.activation)


STORED_COLUMNS = 64  # of a sum that pass through shared memory at once


def staging(shape: tuple[int, int], *, transpose: bool) -> tuple[int, int]:
    """The shape of the shared memory that `store` needs for a sum of a shape."""
    rows, columns = shape[0], min(shape[1], STORED_COLUMNS)
    return (columns, rows) if transpose else (rows, columns)


def store(columns: Callable[[int, int], jax.Array], shape: tuple[int, int], stage, target, *, transpose: bool) -> None:
    """Writes a sum to device memory through shared memory, a few columns at a time; what lies past the edge is left out.

    Args:
      columns: of a first column and how many: those of the sum, in registers.
      shape: of the sum (R, C).
      stage: shared memory of `staging`.
      target: of the column at which a stretch starts, and of how many columns it has: its place in device memory, shaped as `stage`.
      transpose: the sum stands on its side.
    """
    width = min(shape[1], STORED_COLUMNS)
    for start in range(0, shape[1], width):
        size = min(width, shape[1] - start)
        part = plgpu.layout_cast(columns(start, size), Layout.WGMMA)
        own = stage if size == width else stage.at[:size] if transpose else stage.at[:, :size]
        if start:
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        if transpose:
            transposed(own)[...] = plgpu.layout_cast(part, Layout.WGMMA_TRANSPOSED)
        else:
            own[...] = part
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(own, target(start, size))
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)
