"""W8A8 and W4A8 behind an on-line rotation: rows of x are rotated and rounded in one pass, then int8 codes meet the weight.

    z = x H / sqrt(size),  q_i = clip(round(z_i / r_i)),  r_i = max|z_i| / levels,    y_ij = r_i sum_g s_gj sum_{k in g} q_ik w_kj

Data flow: x -> `rotate_and_quantize` -> codes and a scale a row in memory, half or a quarter of x -> tiles of codes and of w -> matrix
unit -> int32 sums -> both scales. The rotated floats never leave the chip, and no row is rotated again for other columns of w.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from qjax_kernels.gradient import to_rows_alone
from qjax_kernels.reference import rotate
from qjax_kernels.request import Request
from qjax_kernels.tpu import tiles
from qjax_kernels.tpu.chips import chip_of
from qjax_kernels.tpu.int8 import add_tile
from qjax_kernels.tpu.int8 import why_not as why_not_int8
from qjax_kernels.tpu.rotate import rotate_and_quantize
from qjax_kernels.tpu.rotate import why_not as why_not_rotate
from qjax_kernels.tpu.tiles import Interpret, Tile
from qjax_kernels.tpu.weight_only import check, float_gradient


def why_not(request: Request) -> str:
    """Returns why this kernel does not run a product, or nothing.

    Example:
      >>> from qjax_kernels.request import Device, Weight
      >>> why_not(Request(Device("tpu", "v6e"), 16, 4096, 11008, Weight("int", 8), activation="int8", rotation=11008))
      'blocks of 11008: the size must be a power of two from 128 that divides K 11008'
    """
    if request.rotation is None:
        return "no rotation in front of the product"
    if request.rotation != request.k:
        return f"a rotation of {request.rotation} values in front of {request.k}: codes of what is padded are not rotated"
    return why_not_int8(request) or why_not_rotate(request.device.platform, request.device.chip, request.k, request.rotation)


def rotated_int8(
    x: jax.Array,
    w: jax.Array,
    scale: jax.Array,
    *,
    group: int,
    size: int,
    chip: str,
    levels: float = 127.5,
    limit: Tile | None = None,
    interpret: Interpret = False,
) -> jax.Array:
    """The product of int8 codes of the rotated rows of x and integer codes of w, which was rotated before it was rounded.

    Rows of x and columns of w may be any numbers. A row of zeros has codes and results 0. Rounding: as `rotate_and_quantize`, whose
    codes are those of a float32 rotation but for ties within its rounding; integer sums are exact.

    Args:
      x: (M, K) float32 or bfloat16.
      w: codes (K, N), `jnp.int4` or int8.
      scale: (groups, N) float32 or bfloat16; one row where a column shares its scale.
      group: consecutive k that share a scale; a multiple of 128, or at least K.
      size: of a block of the rotation, a power of two from 128 that divides K.
      chip: "v5e", "v5p", "v6e"; "tpu7x" runs it without a gain.
      levels: as `int8` takes it.
      limit: the largest tile; None takes the generation's.
      interpret: run on a CPU, for tests.

    Returns:
      (M, N), the dtype of x. The gradient reaches x as if its rotated rows had not been rounded; w and scale are constants.

    Raises:
      ValueError: a shape, group, size or chip that the kernel does not take.

    Example:
      >>> x, w = jnp.ones((1, 128)), jnp.zeros((128, 128), jnp.int8).at[0].set(2)  # all of x is in the first rotated value
      >>> y = rotated_int8(x, w, jnp.ones((1, 128)), group=128, size=128, chip="v6e", levels=127, interpret=True)
      >>> round(y[0, 0].item(), 4), round(2 * 128**0.5, 4)
      (22.6274, 22.6274)
    """
    check(x, w, scale, group)
    if group < w.shape[0] and group % 128:
        raise ValueError(f"`group` must be a multiple of 128 or at least {w.shape[0]}, got {group}")

    def run(x: jax.Array, w: jax.Array, scale: jax.Array) -> jax.Array:
        codes, rows = rotate_and_quantize(x, size=size, chip=chip, levels=levels, interpret=interpret)
        return _codes_product(codes, rows, w, scale, group, chip, limit, interpret, x.dtype)

    def gradient(t: jax.Array, w: jax.Array, scale: jax.Array) -> jax.Array:
        return rotate(float_gradient(t, w, scale, group), size).astype(t.dtype)

    return to_rows_alone(run, gradient)(x, w, scale)


def _codes_product(
    codes: jax.Array, row: jax.Array, w: jax.Array, scale: jax.Array, group: int, chip: str, limit: Tile | None, interpret: Interpret,
    dtype: jnp.dtype,
) -> jax.Array:  # fmt: skip
    (m, k), n = codes.shape, w.shape[1]
    tile = tiles.tile_of(chip_of(chip), m, n, k, group, limit)
    tile = Tile(tiles.up(tile.m, 32), tile.n, tile.k)  # a tile of int8 has 32 rows
    codes = tiles.pad_contracted(codes, tile.k)
    scales, whole = tiles.scale_blocks(scale, group, tile.k), group >= k
    block = tiles.scale_block_of(group, k, tile.k)
    return pl.pallas_call(
        functools.partial(_kernel, whole=whole),
        out_shape=jax.ShapeDtypeStruct((m, n), dtype),
        grid=tiles.cuts(m, n, k, tile),
        in_specs=[
            pl.BlockSpec((tile.m, tile.k), lambda i, j, t: (i, t)),
            pl.BlockSpec((tile.m, 1), lambda i, j, t: (i, 0)),
            pl.BlockSpec((tile.k, tile.n), lambda i, j, t: (t, j)),
            pl.BlockSpec((None, scales.shape[1], tile.n), lambda i, j, t: (block(t), 0, j)),
        ],
        out_specs=pl.BlockSpec((tile.m, tile.n), lambda i, j, t: (i, j)),
        scratch_shapes=[pltpu.VMEM((tile.m, tile.n), jnp.int32 if whole else jnp.float32)],
        compiler_params=tiles.params("parallel", "parallel", "arbitrary", vmem=48 * 2**20),
        interpret=interpret,
        name="codes_product",
    )(codes, row, w, scales)


def _kernel(codes_ref, row_ref, w_ref, scale_ref, out_ref, sum_ref, *, whole: bool):
    add_tile(codes_ref[...], w_ref, scale_ref, sum_ref, pl.program_id(2), whole)

    @pl.when(pl.program_id(2) == pl.num_programs(2) - 1)
    def _():
        y = sum_ref[...].astype(jnp.float32)
        y = y * scale_ref[...].astype(jnp.float32) if whole else y
        out_ref[...] = (y * row_ref[...]).astype(out_ref.dtype)
