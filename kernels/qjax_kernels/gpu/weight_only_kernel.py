"""The Hopper kernel of weight-only products: codes are tensor-core operands out of registers."""

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.mosaic.gpu import utils as mgpu_utils
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm

from .epilogue import Activation
from .mosaic import ACC, LANE, Layout, load, swizzled, transposed
from .order import in_order
from .parts import Parts, room
from .pipeline import Epilogue, Vector, launch, over_columns, staging, store, stream
from .ring import ring
from .schedule import Piece, Schedule
from .tiles import Tiles, stays

PIECE = 128  # k that one run of tensor-core instructions takes: a multiple of it is the only group size


def _nibbles(codes: jax.Array) -> jax.Array:
    """Codes (R, PIECE) int4 by threads to bfloat16, in order, without moving them between threads.

    A thread's 32 bits hold eight codes (`order`). Shifted by 4 j, bits 0-3 and 16-19 are two neighbours in K, those that the tensor cores
    want of the thread; as the low mantissa bits of 128.0, and with the sign bit flipped, they read 136 plus the code.
    """

    converted = plgpu.ShapeDtypeStruct(codes.shape, jnp.bfloat16, layout=Layout.WGMMA)

    @plgpu.inline_mgpu(arg_types=(Layout.WGMMA_UPCAST_4X,), return_type=converted)
    def convert(_, packed):
        word = ir.IntegerType.get_signless(32)
        pair = ir.VectorType.get((2,), ir.BF16Type.get())
        registers = np.empty(mgpu.WGMMA_LAYOUT.registers_shape(packed.shape), dtype=object)
        for index, register in np.ndenumerate(packed.registers):
            bits = mgpu_utils.bitcast(register, word)
            for j in range(4):
                shifted = arith.shrui(bits, arith.constant(word, 4 * j)) if j else bits
                both = llvm.inline_asm(
                    word,
                    [shifted],
                    "{ .reg .b32 a, b; lop3.b32 a, $1, 0x000F000F, 0x43084308, (0xf0 & 0xcc) ^ 0xaa;"
                    " mov.b32 b, 0x43084308; sub.bf16x2 $0, a, b; }",
                    "=r,r",
                )
                registers[(index[0], index[1] * 4 + j, *index[2:])] = mgpu_utils.bitcast(both, pair)  # pyright: ignore[reportArgumentType]
        return mgpu.FragmentedArray(_registers=registers, _layout=mgpu.WGMMA_LAYOUT, _is_signed=None)

    return convert(codes)  # pyright: ignore[reportCallIssue]


def taken_codes(codes_ref, bits: int) -> jax.Array:
    """Codes (R, PIECE) out of shared memory, as they lie."""
    return load(codes_ref, Layout.WGMMA_UPCAST_4X if bits == 4 else Layout.WGMMA_UPCAST_2X)


def float_codes(codes: jax.Array, bits: int, interpreted: bool) -> jax.Array:
    """Codes (R, C) as bfloat16 in the registers of operand A, in order."""
    if bits == 8:
        return plgpu.layout_cast(codes, Layout.WGMMA).astype(jnp.bfloat16)
    # An interpreter has no registers to reinterpret: the same columns by plain indexing.
    return in_order(codes.astype(jnp.bfloat16)) if interpreted else _nibbles(codes)


def _row_scales(scales_ref, column, dtype) -> jax.Array:
    """One column of scales, a scale for every row of the accumulator."""
    return load(scales_ref.at[:, column], Layout.WGMMA.reduce(1), optimized=False).astype(dtype)


def weight_only(
    x: jax.Array, codes: jax.Array, scales: jax.Array, *, bits: int, group: int | None, tiles: Tiles, cores: int,
    bias: jax.Array | None = None, activation: Activation | None = None, interpret=None,
) -> jax.Array:  # fmt: skip
    """The kernel: float32 or bfloat16 partial products, transposed back on the way out.

    Args:
      x: (M, K) bfloat16, M below 8 or a multiple of 8.
      codes: (N, K) int8, or int4 by threads (`order.by_threads`).
      scales: (N, K / group), or (N, 1) per channel.
      bits: of a code.
      group: consecutive k that share a scale, a multiple of 128; None per channel.
      tiles: the cut.
      cores: multiprocessors of the GPU.
      bias: (N,) or None.
      activation: of the sums; it and the bias wait for the sum of all parts where K is split.
      interpret: as `pallas` takes it.

    Returns:
      (M, N) bfloat16, or (split_k, M, N) float32 parts that are to be added.
    """
    m, k = x.shape
    n = codes.shape[0]
    bm, bn, bk, workers = tiles.block_m, tiles.block_n, tiles.block_k, tiles.warpgroups
    rows = bn // workers
    shape = (rows, bm)
    staged = staging(shape, transpose=True)
    steps = -(-k // (bk * tiles.split_k))
    split, together = tiles.split_k > 1, tiles.cluster
    out_dtype = jnp.float32 if split else jnp.bfloat16
    per_copy = 16 // scales.dtype.itemsize
    after = group is not None and not tiles.scale_first
    stay = stays(tiles, group)
    down, across = -(-n // (bn * together)), -(-m // bm)
    schedule = Schedule.of(across, down, steps, min(tiles.stages, steps), cores // together) if stay else None
    # Two parts are in registers at once, beside the sums.
    width = PIECE if bits == 8 or (rows == 64 and workers < 3) else PIECE // 2

    def added(step, p, x_ref, w_ref, s_ref, first_row, acc, settle):
        """Adds a piece to sums that the tensor cores keep; a part of it is converted while the part before is multiplied."""
        for start in range(0, rows, 64):
            own = pl.ds(first_row + start, 64)
            codes = taken_codes(w_ref.at[own, p * PIECE : (p + 1) * PIECE], bits)
            part = acc if rows == 64 else acc.at[start : start + 64]
            if group is not None:
                column = lax.rem((step * bk + p * PIECE) // group, per_copy)
                scale = over_columns(_row_scales(s_ref.at[own], column, jnp.bfloat16), (64, width))
            for at in range(0, PIECE, width):
                weight = float_codes(codes[:, at : at + width] if width < PIECE else codes, bits, interpret is not None)
                weight = weight if group is None else weight * scale
                plgpu.wgmma(part, weight, transposed(x_ref.at[:, p * PIECE + at : p * PIECE + at + width]))
                settle()

    def piece(step, p, x_ref, w_ref, s_ref, first_row, carry):
        """The sum with a group's own sum, scaled, in it."""
        cols, own = slice(p * PIECE, (p + 1) * PIECE), pl.ds(first_row, rows)
        weight = float_codes(taken_codes(w_ref.at[own, cols], bits), bits, interpret is not None)

        def group_sum(acc):
            plgpu.wgmma(acc, weight, transposed(x_ref.at[:, cols]))
            return acc[...]

        part = pl.run_scoped(group_sum, ACC(shape, jnp.float32))
        column = lax.rem((step * bk + p * PIECE) // group, per_copy)
        return carry + part * over_columns(_row_scales(s_ref.at[own], column, jnp.float32), shape)

    end = Epilogue.of(bias, activation, split)
    handed = room(schedule, together, workers, shape, jnp.float32)

    def hopper_weight_only(x_gmem, w_gmem, s_gmem, *rest):
        given, rest = end.taken(rest)
        out_gmem, *memory = rest[: 1 + len(handed)]
        out_smem, *own = rest[1 + len(handed) :]
        warpgroup = lax.axis_index("wg") if workers > 1 else 0
        member = lax.axis_index("cluster") if together > 1 else 0
        first_row = warpgroup * rows
        channel = [] if group is not None else [Vector(s_gmem, own.pop(0).at[warpgroup], own.pop(0).at[warpgroup])]
        biases = end.vectors(given, own, warpgroup)
        operands = [x_gmem, w_gmem] if group is None else [x_gmem, w_gmem, s_gmem]

        def advance(step, x_ref, w_ref, *rest):
            s_ref, (carry, *settle) = (None, rest) if group is None else (rest[0], rest[1:])
            for p in range(bk // PIECE):
                here = (step, p, x_ref, w_ref, s_ref, first_row, carry)
                if after:
                    carry = piece(*here)
                else:
                    added(*here, *settle)
            return carry

        def start(at: Piece):
            return (at.n * together + member) * bn + first_row

        def begin(at: Piece):
            for vector in (*channel, *biases):
                vector.fetch(start(at))

        def arrived():
            for vector in (*channel, *biases):
                vector.arrived()

        def finish(at: Piece, columns):
            out = out_gmem.at[at.part] if split else out_gmem

            def target(first, size):
                return out.at[pl.ds(at.m * bm + first, size), pl.ds(start(at), staged[1])]

            def finished(first, size):
                part = columns(first, size)
                part = part * channel[0].rows(part.shape) if channel else part
                return end.rows(part, biases).astype(out_dtype)

            store(finished, shape, out_smem.at[warpgroup], target, transpose=True)

        def blocks(m_block, n_block, first_step=0):
            n_block = n_block * together + member
            specs = [
                plgpu.BlockSpec(
                    (bm, bk),
                    lambda i: (m_block, i + first_step),
                    transforms=swizzled(bk, 16),
                    collective_axes=("cluster",) if together > 1 else (),
                ),
                plgpu.BlockSpec((bn, bk), lambda i: (n_block, i + first_step), transforms=swizzled(PIECE, bits)),
            ]
            if group is not None:
                reach = group * per_copy
                specs.append(plgpu.BlockSpec((bn, per_copy), lambda i: (n_block, (i + first_step) * bk // reach)))
            return specs

        frame = {"tiles": tiles, "operands": operands, "shape": shape, "dtype": jnp.float32}
        if schedule is not None:
            parts = Parts(memory, member, warpgroup, interpret is not None)
            # Eight bits take twice the shared memory for a stage, and miss the one that is given back later.
            ring(advance, begin, arrived, finish, schedule=schedule, parts=parts, blocks=blocks, overlap=bits == 4, **frame)
            return
        stream(advance, begin, arrived, finish, steps=steps, blocks=blocks, registers=after, **frame)

    out = jax.ShapeDtypeStruct((tiles.split_k, m, n) if split else (m, n), out_dtype)
    kernel = plgpu.kernel(
        hopper_weight_only,
        out_type=(out, *handed),
        scratch_types=[
            plgpu.SMEM((workers, *staged), out_dtype, transforms=swizzled(64, out_dtype.dtype.itemsize * 8)),
            *(Vector.scratch(workers, rows, scales.dtype) if group is None else ()),
            *end.scratch(workers, rows),
        ],
        compiler_params=plgpu.CompilerParams(lowering_semantics=LANE),
        interpret=interpret,
        **launch(tiles, schedule, (tiles.split_k, down, across)),
    )
    return kernel(x, codes, scales.reshape(n) if group is None else scales, *end.operands)[0]
