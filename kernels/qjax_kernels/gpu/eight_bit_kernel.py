"""The Hopper kernel of products whose two sides have eight bits: int8 or e4m3 on the tensor cores, scales of both at the end."""

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from .epilogue import Activation
from .mosaic import LANE, swizzled, transposed
from .parts import Parts, room
from .pipeline import Epilogue, Vector, launch, staging, store, stream
from .ring import ring
from .schedule import Piece, Schedule
from .tiles import Tiles


def eight_bit(
    x: jax.Array, x_scale: jax.Array, w: jax.Array, w_scale: jax.Array, *, tiles: Tiles, cores: int,
    out_dtype=jnp.bfloat16, bias: jax.Array | None = None, activation: Activation | None = None, interpret=None,
) -> jax.Array:  # fmt: skip
    """The kernel: few rows of x stand on the right of the tensor cores, in multiples of 8, many on the left, in multiples of 64.

    Args:
      x: (M, K) int8 or float8_e4m3fn, M below 8 or a multiple of 8.
      x_scale: (M,) float32, or longer: the copy engine reads 128 bytes at a time.
      w: (N, K) of the type of x.
      w_scale: (N,) bfloat16, float16 or float32.
      tiles: the cut; `x_left` says which side x stands on, and the warpgroups divide the left side.
      cores: multiprocessors of the GPU.
      out_dtype: of y where K is not split.
      bias: (N,) or None.
      activation: of the scaled sums; it and the bias wait for the sum of all parts where K is split.
      interpret: as `pallas` takes it.

    Returns:
      (M, N), or (split_k, M, N) float32 parts, scaled, that are to be added.
    """
    m, k = x.shape
    n = w.shape[0]
    bm, bn, bk, workers = tiles.block_m, tiles.block_n, tiles.block_k, tiles.warpgroups
    left_rows, right_rows = (bm // workers, bn) if tiles.x_left else (bn // workers, bm)
    shape = (left_rows, right_rows)
    staged = staging(shape, transpose=not tiles.x_left)
    steps = -(-k // (bk * tiles.split_k))
    split = tiles.split_k > 1
    result = jnp.dtype(jnp.float32 if split else out_dtype)
    sums_dtype = jnp.int32 if x.dtype == jnp.int8 else jnp.float32
    together = tiles.cluster
    down, across = -(-n // bn), -(-m // (bm * together))
    schedule = Schedule.of(across, down, steps, min(tiles.stages, steps), cores // together) if tiles.x_left and workers > 1 else None

    end = Epilogue.of(bias, activation, split)
    handed = room(schedule, together, workers, shape, sums_dtype)
    sizes = (left_rows, right_rows) if tiles.x_left else (right_rows, left_rows)  # of stretches of scales of x and w

    def hopper_eight_bit(x_gmem, xs_gmem, w_gmem, ws_gmem, *rest):
        given, rest = end.taken(rest)
        out_gmem, *memory = rest[: 1 + len(handed)]
        out_smem, *own = rest[1 + len(handed) :]
        worker = lax.axis_index("wg") if workers > 1 else 0
        member = lax.axis_index("cluster") if together > 1 else 0
        first = worker * left_rows
        x_scales, w_scales = (Vector(ref, own.pop(0).at[worker], own.pop(0).at[worker]) for ref in (xs_gmem, ws_gmem))
        biases = end.vectors(given, own, worker)

        def advance(_, x_ref, w_ref, acc, settle):
            left, right = (x_ref, w_ref) if tiles.x_left else (w_ref, x_ref)
            plgpu.wgmma(acc, left.at[pl.ds(first, left_rows)] if workers > 1 else left, transposed(right))
            settle()

        def starts(at: Piece):
            """The rows of x and of w at which the sum of this warpgroup begins."""
            m_start, n_start = (at.m * together + member) * bm, at.n * bn
            return (m_start + first, n_start) if tiles.x_left else (m_start, n_start + first)

        def begin(at: Piece):
            m_start, n_start = starts(at)
            x_scales.fetch(m_start)
            for vector in (w_scales, *biases):
                vector.fetch(n_start)

        def arrived():
            for vector in (x_scales, w_scales, *biases):
                vector.arrived()

        def finish(at: Piece, columns):
            m_start, n_start = starts(at)
            out = out_gmem.at[at.part] if split else out_gmem

            def target(start, size):
                m_at, n_at = (m_start, n_start + start) if tiles.x_left else (m_start + start, n_start)
                m_size, n_size = (staged[0], size) if tiles.x_left else (size, staged[1])
                return out.at[pl.ds(m_at, m_size), pl.ds(n_at, n_size)]

            def finished(start, size):
                part = columns(start, size).astype(jnp.float32)
                left, right = (x_scales, w_scales) if tiles.x_left else (w_scales, x_scales)
                part = part * left.rows(part.shape) * right.columns(part.shape, start)
                part = end.columns(part, biases, start) if tiles.x_left else end.rows(part, biases)
                return part.astype(result)

            store(finished, shape, out_smem.at[worker], target, transpose=not tiles.x_left)

        def blocks(m_block, n_block, first_step=0):
            m_block = m_block * together + member
            return [
                plgpu.BlockSpec((bm, bk), lambda i: (m_block, i + first_step), transforms=swizzled(bk, 8)),
                plgpu.BlockSpec(
                    (bn, bk),
                    lambda i: (n_block, i + first_step),
                    transforms=swizzled(bk, 8),
                    collective_axes=("cluster",) if together > 1 else (),
                ),
            ]

        frame = {"tiles": tiles, "operands": [x_gmem, w_gmem], "shape": shape, "dtype": sums_dtype}
        if schedule is not None:
            parts = Parts(memory, member, worker, interpret is not None)
            ring(advance, begin, arrived, finish, schedule=schedule, parts=parts, blocks=blocks, overlap=False, **frame)
            return
        stream(advance, begin, arrived, finish, steps=steps, blocks=blocks, registers=False, **frame)

    out = jax.ShapeDtypeStruct((tiles.split_k, m, n) if split else (m, n), result)
    kernel = plgpu.kernel(
        hopper_eight_bit,
        out_type=(out, *handed),
        scratch_types=[
            plgpu.SMEM((workers, *staged), result, transforms=swizzled(64, result.itemsize * 8)),
            *Vector.scratch(workers, sizes[0], x_scale.dtype),
            *Vector.scratch(workers, sizes[1], w_scale.dtype),
            *end.scratch(workers, sizes[1]),
        ],
        compiler_params=plgpu.CompilerParams(lowering_semantics=LANE),
        interpret=interpret,
        **launch(tiles, schedule, (tiles.split_k, down, across)),
    )
    return kernel(x, x_scale, w, w_scale, *end.operands)[0]
