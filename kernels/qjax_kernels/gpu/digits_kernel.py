"""The Hopper kernel of four-bit products with few rows: rows of x stand as two eight-bit digits, and all sums of a group are integers."""

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.mosaic.gpu import utils as mgpu_utils
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith

from .epilogue import Activation
from .mosaic import ACC, LANE, Layout, load, swizzled, transposed
from .order import in_order
from .pipeline import Epilogue, column_values, over_columns, over_rows, row_values, staging, store, stream
from .schedule import Piece
from .tiles import FRACTION, PIECE, Tiles


def as_met(x: jax.Array) -> jax.Array:
    """Columns of x in the order in which the tensor cores meet nibbles by threads: of every 32 the even nibbles, then the odd ones.

    Nibble 4 h + j of thread t is column 8 j + 2 t + h.
    """
    *lead, k = x.shape
    blocks = x.reshape(*lead, k // 32, 2, 2, 4, 2)  # half of j, parity of j, thread, h
    return blocks.transpose(*range(len(lead) + 1), *(i % blocks.ndim for i in (-3, -2, -1, -4))).reshape(*lead, k)


def units(x: jax.Array) -> jax.Array:
    """t = 2^(floor(log2 max |x|) - 13) over 128 columns; NaN where one of them is infinite or NaN.

    The largest is taken of what is wanted in the end, element by element, so that a program of one reduction does it.

    Args:
      x: (..., K) bfloat16, K a multiple of 128.

    Returns:
      (..., K / 128) float32.
    """
    exponent = (lax.bitcast_convert_type(x, jnp.uint16).astype(jnp.uint32) >> 7) & 255
    power = lax.bitcast_convert_type((jnp.maximum(exponent, FRACTION + 1) - FRACTION) << 23, jnp.float32)
    return jnp.max(jnp.where(exponent == 255, jnp.nan, power).reshape(*x.shape[:-1], -1, PIECE), axis=-1)


def digits(x: jax.Array, unit: jax.Array) -> jax.Array:
    """x in fixed point, as two signed digits to the base 256: v = round(x / t) = 256 high + low, |v| < 2^14.

    Elements down to 2^-6 of the largest of the 128 are kept exactly; the error of the rest is at most 2^-14 of the largest.

    Args:
      x: (M, K) bfloat16, K a multiple of 128.
      unit: (M, K / 128), of `units`.

    Returns:
      (2, M, K) int8, high digits first.
    """
    value = x.astype(jnp.float32).reshape(*unit.shape, PIECE) / unit[..., None]
    whole = jnp.nan_to_num(jnp.round(value)).astype(jnp.int32).reshape(x.shape)
    high = (whole + 128) >> 8
    return jnp.stack([high, whole - high * 256]).astype(jnp.int8)


def _bytes(codes: jax.Array) -> jax.Array:
    """Codes (R, PIECE) int4 by threads as int8, times sixteen: the columns are those of `as_met`.

    A thread's 32 bits hold eight codes (`order`). The upper nibbles of the four bytes are the odd ones, each sixteen times itself once
    the lower nibbles are cleared; shifted left by four, the even ones stand there.
    """
    converted = plgpu.ShapeDtypeStruct(codes.shape, jnp.int8, layout=Layout.WGMMA_8BIT)

    @plgpu.inline_mgpu(arg_types=(Layout.WGMMA_UPCAST_4X,), return_type=converted)
    def convert(_, packed):
        word = ir.IntegerType.get_signless(32)
        four = ir.VectorType.get((4,), ir.IntegerType.get_signless(8))
        registers = np.empty(mgpu.WGMMA_LAYOUT_8BIT.registers_shape(packed.shape), dtype=object)
        upper = arith.constant(word, ir.IntegerAttr.get(word, 0xF0F0F0F0 - 2**32))
        for index, register in np.ndenumerate(packed.registers):
            odd = mgpu_utils.bitcast(register, word)
            even = arith.shli(odd, arith.constant(word, 4))
            for half, bits in enumerate((even, odd)):
                registers[(index[0], index[1] * 2 + half, *index[2:])] = mgpu_utils.bitcast(arith.andi(bits, upper), four)
        return mgpu.FragmentedArray(_registers=registers, _layout=mgpu.WGMMA_LAYOUT_8BIT, _is_signed=True)

    return convert(codes)  # pyright: ignore[reportCallIssue]


def _codes(codes_ref, interpreted: bool) -> jax.Array:
    """Sixteen times the codes (R, PIECE) out of shared memory as int8 in the registers of operand A."""
    codes = load(codes_ref, Layout.WGMMA_UPCAST_4X)
    # An interpreter has no registers to reinterpret: the same columns by plain indexing.
    return as_met(in_order(codes.astype(jnp.int8) * 16)) if interpreted else _bytes(codes)


def digit_products(
    x: jax.Array, codes: jax.Array, scales: jax.Array, *, group: int, tiles: Tiles, bias: jax.Array | None = None,
    activation: Activation | None = None, interpret=None,
) -> jax.Array:  # fmt: skip
    """The kernel, with what goes before it: y_mn = sum_g s_ng t_mg (256 sum_g high c + sum_g low c).

    The tensor cores multiply integers and their sums are exact; a group's sum becomes a float32 when it is scaled.

    Args:
      x: (M, K) bfloat16.
      codes: (N, K) int4 by threads (`order.by_threads`).
      scales: (N, K / group).
      group: consecutive k that share a scale of the weight, a multiple of 128.
      tiles: the cut; a thread block takes `block_m` high digits and as many low ones.
      bias: (N,) or None.
      activation: of the sums; it and the bias wait for the sum of all parts where K is split.
      interpret: as `pallas` takes it.

    Returns:
      (M, N) bfloat16, or (split_k, M, N) float32 parts that are to be added.
    """
    m, k = x.shape
    n = codes.shape[0]
    bm, bn, bk, workers = tiles.block_m, tiles.block_n, tiles.block_k, tiles.warpgroups
    rows, pieces = bn // workers, bk // PIECE
    shape = (rows, bm)
    staged = staging(shape, transpose=True)
    steps = -(-k // (bk * tiles.split_k))
    split = tiles.split_k > 1
    out_dtype = jnp.float32 if split else jnp.bfloat16
    per_copy = 16 // scales.dtype.itemsize

    # Tails of K are zeros, and so are rows up to a full block. The copy engine moves 128 bytes at least: 32 of t.
    m_blocks, width, reach = -(-m // bm), max(bm, 32), steps * tiles.split_k * bk
    blocks_of_x = jnp.pad(x, ((0, m_blocks * bm - m), (0, reach - k))).reshape(m_blocks, bm, reach)
    unit = units(jnp.pad(blocks_of_x, ((0, 0), (0, width - bm), (0, 0))))
    # A block of rows: its high digits, then its low ones.
    high_low = digits(blocks_of_x.reshape(-1, reach), unit[:, :bm].reshape(m_blocks * bm, -1))
    sides = as_met(high_low).reshape(2, m_blocks, bm, reach).swapaxes(0, 1).reshape(m_blocks * 2 * bm, reach)
    unit = unit.swapaxes(1, 2).reshape(m_blocks * reach // PIECE, width)

    def piece(step, p, x_ref, w_ref, s_ref, t_ref, first_row, carry):
        cols = slice(p * PIECE, (p + 1) * PIECE)
        own = pl.ds(first_row, rows)
        weight = _codes(w_ref.at[own, cols], interpret is not None)

        def sums(acc):
            plgpu.wgmma(acc, weight, transposed(x_ref.at[:, cols]))
            return acc[...]

        both = pl.run_scoped(sums, ACC((rows, 2 * bm), jnp.int32))
        exact = both[:, :bm] * 256 + both[:, bm:]
        column = lax.rem((step * bk + p * PIECE) // group, per_copy)
        scale = row_values(s_ref.at[own, column])
        own_units = column_values(t_ref.at[p, pl.ds(0, bm)])
        return carry + exact.astype(jnp.float32) * over_rows(own_units, shape) * over_columns(scale, shape)

    end = Epilogue.of(bias, activation, split)

    def hopper_digits(x_gmem, w_gmem, s_gmem, t_gmem, *rest):
        given, (out_gmem, out_smem, *b_smem) = end.taken(rest)
        warpgroup = lax.axis_index("wg") if workers > 1 else 0
        first_row = warpgroup * rows
        added = end.vectors(given, b_smem, warpgroup)

        def advance(step, x_ref, w_ref, s_ref, t_ref, carry):
            for p in range(pieces):
                carry = piece(step, p, x_ref, w_ref, s_ref, t_ref, first_row, carry)
            return carry

        def begin(at: Piece):
            for vector in added:
                vector.fetch(at.n * bn + first_row)

        def arrived():
            for vector in added:
                vector.arrived()

        def finish(at: Piece, columns):
            out = out_gmem.at[at.part] if split else out_gmem

            def target(start, size):
                return out.at[pl.ds(at.m * bm + start, size), pl.ds(at.n * bn + first_row, staged[1])]

            def finished(start, size):  # codes are sixteen times themselves
                return end.rows(columns(start, size) * 0.0625, added).astype(out_dtype)

            store(finished, shape, out_smem.at[warpgroup], target, transpose=True)

        def blocks(m_block, n_block, first_step):
            return [
                plgpu.BlockSpec((2 * bm, bk), lambda i: (m_block, i + first_step), transforms=swizzled(PIECE, 8)),
                plgpu.BlockSpec((bn, bk), lambda i: (n_block, i + first_step), transforms=swizzled(PIECE, 4)),
                plgpu.BlockSpec((bn, per_copy), lambda i: (n_block, (i + first_step) * bk // (group * per_copy))),
                plgpu.BlockSpec((pieces, width), lambda i: (m_block * steps * tiles.split_k + i + first_step, 0)),
            ]

        operands = [x_gmem, w_gmem, s_gmem, t_gmem]
        stream(
            advance, begin, arrived, finish, tiles=tiles, steps=steps, blocks=blocks, operands=operands, shape=shape, dtype=jnp.float32,
            registers=True,
        )  # fmt: skip

    out_shape = (tiles.split_k, m, n) if split else (m, n)
    kernel = plgpu.kernel(
        hopper_digits,
        out_type=jax.ShapeDtypeStruct(out_shape, out_dtype),
        scratch_types=[
            plgpu.SMEM((workers, *staged), out_dtype, transforms=swizzled(64, out_dtype.dtype.itemsize * 8)),
            *end.scratch(workers, rows),
        ],
        grid=(tiles.split_k, -(-n // bn), m_blocks),
        grid_names=("k", "n", "m"),
        compiler_params=plgpu.CompilerParams(lowering_semantics=LANE),
        interpret=interpret,
        **({} if workers == 1 else {"num_threads": workers + 1, "thread_name": "wg"}),
    )
    return kernel(sides, codes, scales, unit, *end.operands)
