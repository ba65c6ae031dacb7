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

from .digits_ring import digits_ring
from .epilogue import Activation
from .gathered import Gathered, gathering
from .made_digits import make
from .mosaic import ACC, LANE, Layout, load, swizzled, swizzled_rows, transposed
from .order import in_order
from .parts import Parts, room
from .pipeline import Epilogue, column_values, launch, over_columns, over_rows, row_values
from .schedule import Piece, Schedule
from .tiles import FRACTION, PIECE, Tiles, at_once
from .warps import Warps, shared_address
from .written_rows import write


def as_met(x: jax.Array) -> jax.Array:
    """Columns of x in the order in which the tensor cores meet nibbles by threads: of every 32 the even nibbles, then the odd ones.

    Nibble 4 h + j of thread t is column 8 j + 2 t + h.
    """
    *lead, k = x.shape
    blocks = x.reshape(*lead, k // 32, 2, 2, 4, 2)  # half of j, parity of j, thread, h
    return blocks.transpose(*range(len(lead) + 1), *(i % blocks.ndim for i in (-3, -2, -1, -4))).reshape(*lead, k)


def units(x: jax.Array) -> jax.Array:
    """t = 2^(floor(log2 max |x|) - 13) over 128 columns; NaN where one of them is infinite or NaN.

    What `made_digits.make` makes in a kernel, in jax.

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
    activation: Activation | None = None, cores: int = 132, interpret=None,
) -> jax.Array:  # fmt: skip
    """The kernel: y_mn = sum_g s_ng t_mg (256 sum_g high c + sum_g low c).

    The tensor cores multiply integers and their sums are exact; a group's sum becomes a float32 when it is scaled.

    Args:
      x: (M, K) bfloat16.
      codes: (N, K) int4 by threads (`order.by_threads`).
      scales: (N, K / group).
      group: consecutive k that share a scale of the weight, a multiple of 128.
      tiles: the cut; a thread block takes `block_m` high digits and as many low ones.
      bias: (N,) or None.
      activation: of the sums.
      cores: multiprocessors of the GPU.
      interpret: as `pallas` takes it.

    Returns:
      (M, N) bfloat16.
    """
    m, k = x.shape
    n = codes.shape[0]
    bm, bn, bk, workers = tiles.block_m, tiles.block_n, tiles.block_k, tiles.warpgroups
    rows, pieces = bn // tiles.beside, bk // PIECE // tiles.sharing
    shape = (rows, bm)
    steps = -(-k // bk)
    per_copy = at_once(tiles, group, scales.dtype.itemsize)
    across, down, slots, alone = -(-m // bm), -(-n // bn), min(tiles.stages, steps), tiles.sums == 1
    schedule = Schedule.of(across, down, steps, slots, cores if alone else across * down)

    def piece(step, p, w_ref, s_ref, x_ref, t_ref, first_row, carry):
        cols = pl.ds(p * PIECE, PIECE)
        own = pl.ds(first_row, rows)
        weight = _codes(w_ref.at[own, cols], interpret is not None)

        def sums(acc):
            plgpu.wgmma(acc, weight, transposed(x_ref.at[:, cols]))
            return acc[...]

        both = pl.run_scoped(sums, ACC((rows, 2 * bm), jnp.int32))
        exact = both[:, :bm] * 256 + both[:, bm:]
        column = lax.rem((step * bk + p * PIECE) // group, per_copy)
        scale = row_values(s_ref.at[own, column])
        own_units = column_values(t_ref.at[p])
        return carry + exact.astype(jnp.float32) * over_rows(own_units, shape) * over_columns(scale, shape)

    def convert(x_ref, digits_ref, units_ref) -> None:
        if interpret is not None:  # an interpreter has no single warps
            rows_of_x = x_ref[...]
            unit = units(rows_of_x)
            digits_ref[...] = as_met(digits(rows_of_x, unit)).reshape(2 * bm, bk)
            units_ref[...] = unit.T
            return

        @plgpu.inline_mgpu(arg_types=(plgpu.RefType(swizzled_rows(16)), plgpu.RefType(swizzled(PIECE, 8)), plgpu.RefType()))
        def made(_, *own):
            make(Warps(), bm, bk, *map(shared_address, own))

        made(x_ref, digits_ref, units_ref)  # pyright: ignore[reportCallIssue]

    end = Epilogue.of(bias, activation, split=False)
    if alone:
        handed, place = room(schedule, 1, workers, shape, jnp.float32), []
    else:
        handed, place = gathering(tiles, shape, schedule.groups, interpret is not None)

    def hopper_digits(x_gmem, w_gmem, s_gmem, *rest):
        given, (out_gmem, *rest) = end.taken(rest)
        memory, rest = rest[: len(handed)], rest[len(handed) :]
        sums_smem, b_smem = rest[: len(place)], rest[len(place) :]
        warpgroup = lax.axis_index("wg")
        gathered = None if alone else Gathered(tiles, warpgroup, sums_smem[0], memory[0] if memory else None)
        first_row = lax.rem(warpgroup, tiles.beside) * rows
        first_piece = lax.div(warpgroup, tiles.beside) * pieces if tiles.sharing > 1 else 0
        added = end.vectors(given, b_smem, warpgroup)

        def advance(step, w_ref, s_ref, x_ref, t_ref, carry):
            for p in range(pieces):
                carry = piece(step, first_piece + p, w_ref, s_ref, x_ref, t_ref, first_row, carry)
            return carry

        def begin(at: Piece):
            for vector in added:  # all threads have read the one before: a copy begins behind a barrier of its warpgroup
                vector.fetch(at.n * bn + first_row)

        def arrived():
            for vector in added:
                vector.arrived()

        def finish(at: Piece, columns):
            total = end.rows(columns(0, bm) * 0.0625, added)  # codes are sixteen times themselves
            write(out_gmem, total, (at.m, at.n * bn + first_row), bn, interpret is not None)

        def blocks(n_block):
            return [
                plgpu.BlockSpec((bn, bk), lambda i: (n_block, i), transforms=swizzled(PIECE, 4)),
                plgpu.BlockSpec((bn, per_copy), lambda i: (n_block, i * bk // (group * per_copy))),
            ]

        digits_ring(
            advance, begin, arrived, finish, convert, tiles=tiles, schedule=schedule,
            parts=Parts(memory, 0, warpgroup, interpret is not None), gathered=gathered, blocks=blocks, operands=[w_gmem, s_gmem],
            x=x_gmem, shape=shape,
        )  # fmt: skip

    kernel = plgpu.kernel(
        hopper_digits,
        out_type=(jax.ShapeDtypeStruct((m, n), jnp.bfloat16), *handed),
        scratch_types=[*place, *end.scratch(workers, rows)],
        compiler_params=plgpu.CompilerParams(lowering_semantics=LANE),
        interpret=interpret,
        **launch(tiles, schedule),
    )
    return kernel(x, codes, scales, *end.operands)[0]
