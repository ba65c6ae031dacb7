"""The Hopper kernel that rounds rows of x to eight bits: each is read once, kept in registers, and written as codes and a scale."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.pallas import mosaic_gpu as plgpu

from .mosaic import LANE
from .warps import Int, Long, Real, Warps, device_address, shared_address

VECTOR = 8  # elements of 16 bits that a thread loads at once
HELD = 16  # vectors that it keeps at most


@dataclasses.dataclass(frozen=True)
class Row:
    """What a thread block knows of its row.

    Attributes:
      k: elements, a multiple of 8.
      top: the largest magnitude over the scale: 448, 127, or 127.5, of which -128 and 127 are the codes.
      floats: codes are e4m3; else int8.
    """

    k: int
    top: float
    floats: bool

    @property
    def warps(self) -> int:
        """Of a thread block: so many that no thread keeps more than `HELD` vectors."""
        return next(warps for warps in (8, 16, 32) if self.each(warps) <= HELD)

    def each(self, warps: int) -> int:
        """Vectors of a thread."""
        return math.ceil(self.k / (VECTOR * 32 * warps))


def can_round(x: jax.Array) -> bool:
    """Whether rows (M, K) are for this kernel: bfloat16, of a multiple of 8 elements up to 131072."""
    return x.dtype == jnp.bfloat16 and x.shape[1] % VECTOR == 0 and x.shape[1] <= VECTOR * 32 * 32 * HELD


def round_row(w: Warps, row: Row, shared: Int, x: Long, codes: Long, scales: Long) -> None:
    """The work of one block: s = max |x| / top, 1 where that is no normal number, and x / s to the nearest code, ties to even.

    Args:
      w: the instructions.
      row: its shape.
      shared: where `warps` words of shared memory begin.
      x: where (M, K) bfloat16 begin.
      codes: where (M, K) codes begin.
      scales: where (M,) float32 begin.
    """
    places = [w.thread + 32 * row.warps * i for i in range(row.each(row.warps))]
    last = row.k // VECTOR - 1
    held = [w.load_shared_by_all(x.times(w.block, 2 * row.k) + w.minimum(place, last) * 16, 4) for place in places]
    largest = _largest(w, row, shared, [word for words in held for word in words])
    scale = w.divided(w.as_real(largest << 16), w.real(row.top))
    scale = w.where(w.as_integer(scale) < 1 << 23, w.real(1.0), scale)
    w.when(w.thread == 0, lambda: w.store_real(scales.times(w.block, 4), scale))
    for place, words in zip(places, held, strict=True):
        packed = [_codes(w, row, scale, *words[i : i + 2]) for i in (0, 2)]
        w.when(place < last + 1, lambda place=place, packed=packed: w.store_words(codes.times(w.block, row.k) + place * 8, *packed))


def _largest(w: Warps, row: Row, shared: Int, words: list[Int]) -> Int:
    """The 16 bits of the largest magnitude of the block, which order like numbers, NaN above all."""
    top = words[0] & 0x7FFF7FFF
    for word in words[1:]:
        top = w.larger_halves(top, word & 0x7FFF7FFF)
    top = w.warp_maximum(w.maximum(top >> 16, top & 0xFFFF))
    w.when((w.thread & 31) == 0, lambda: w.store_shared(shared + (w.thread >> 5) * 4, top))
    w.barrier()
    for first in range(0, row.warps, 4):
        for other in w.load_shared(shared + first * 4, 4):
            top = w.maximum(top, other)
    return top


def _codes(w: Warps, row: Row, scale: Real, a: Int, b: Int) -> Int:
    """Four elements, two in a word, as four codes in a word."""
    values = [w.divided(w.as_real(bits), scale) for bits in (a << 16, a & 0xFFFF0000, b << 16, b & 0xFFFF0000)]
    if row.floats:
        near, far = (w.packed_e4m3(*values[i : i + 2]) for i in (0, 2))
    else:
        # Added to 1.5 x 2^23 a number is rounded to a whole one, to even in the middle, which stands in the lower bits.
        whole = [w.as_integer(value + 1.5 * 2**23) for value in values]
        if row.top > 127:
            whole = [w.minimum(code, 0x4B400000 + 127) for code in whole]
        near, far = (w.permute(whole[i], whole[i + 1], 0x0040) for i in (0, 2))
    return w.permute(near, far, 0x5410)


def round_rows(x: jax.Array, dtype: Any, top: float, room: int) -> tuple[jax.Array, jax.Array]:
    """Rows as eight bits and a scale each.

    Args:
      x: (M, K) as `can_round` wants it.
      dtype: int8 or float8_e4m3fn.
      top: the largest magnitude over the scale, see `Row`.
      room: entries of the scales, M or more; those behind M are whatever was there.

    Returns:
      Codes (M, K) and scales (room,) float32.
    """
    row = Row(x.shape[1], top, dtype != jnp.int8)

    def hopper_round_rows(*references):
        @plgpu.inline_mgpu(arg_types=(plgpu.RefType(),) * len(references))
        def work(_, *own):
            addresses = [device_address(ref) for ref in own[:-1]]
            start = shared_address(own[-1])
            round_row(Warps(), row, start, *addresses)

        work(*references)  # pyright: ignore[reportCallIssue]

    kernel = plgpu.kernel(
        hopper_round_rows,
        out_type=(jax.ShapeDtypeStruct(x.shape, dtype), jax.ShapeDtypeStruct((room,), jnp.float32)),
        scratch_types=[plgpu.SMEM((128,), jnp.int8)],
        grid=(x.shape[0],),
        grid_names=("m",),
        compiler_params=plgpu.CompilerParams(lowering_semantics=LANE),
        num_threads=row.warps // 4,
        thread_name="wg",
    )
    return kernel(x)
