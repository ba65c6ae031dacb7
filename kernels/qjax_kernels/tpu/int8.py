"""W8A8 and W4A8: rows of x rounded to int8 inside the kernel, integer products, the scales behind.

    q_i = clip(round(x_i / r_i)),  r_i = max|x_i| / levels,      y_ij = r_i sum_g s_gj sum_{k in g} q_ik w_kj

Data flow: a block of whole rows of x is copied to vector memory once for all columns of w. At its first tile the rows' largest
magnitudes are found and their codes written to scratch memory, from where every tile of w meets them; x is read once and its codes
never leave the chip. Integer sums are exact; int4 codes are widened to int8 in registers.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from qjax_kernels.gradient import to_rows_alone
from qjax_kernels.request import Request
from qjax_kernels.tpu import tiles
from qjax_kernels.tpu.chips import Chip, chip_of, why_not_chip
from qjax_kernels.tpu.tiles import Interpret, Tile
from qjax_kernels.tpu.weight_only import check, float_gradient

_ROW_BYTES = 24 * 2**20  # for whole rows of x, twice, and their codes


def why_not(request: Request) -> str:
    """Returns why this kernel does not run a product, or nothing.

    Example:
      >>> from qjax_kernels.request import Device, Weight
      >>> why_not(Request(Device("tpu", "tpu7x"), 16, 4096, 4096, Weight("int", 8), activation="int8"))
      'tpu7x has no integer matrix unit: the same product in bfloat16 takes no longer'
    """
    weight, device = request.weight, request.device
    reason = why_not_chip(device.platform, device.chip)
    if reason:
        return reason
    if request.activation != "int8":
        return f"{request.activation or 'float'} activations: this kernel rounds them to int8"
    if not chip_of(device.chip).int8:
        return f"{device.chip} has no integer matrix unit: the same product in bfloat16 takes no longer"
    if weight.kind != "int" or weight.bits not in (4, 8):
        return f"a weight of kind {weight.kind} with {weight.bits} bits: this kernel takes signed codes of 4 and 8"
    if request.parts != 1:
        return f"{request.parts} products side by side: `experts` takes those"
    if weight.group_size is not None and weight.group_size < request.k and weight.group_size % 128:
        return f"groups of {weight.group_size}: integer sums of a group need a multiple of 128"
    if weight.group_size is not None and weight.group_size < request.k and request.m > 32 and chip_of(device.chip).bfloat16:
        return f"groups on {device.chip} cost half the depth of the matrix unit: above 32 rows XLA takes it"
    if _row_bytes(16, request.k, 2 if request.dtype == "bfloat16" else 4) > _ROW_BYTES:
        return f"16 rows of {request.k} values do not fit vector memory"
    return ""


def int8(
    x: jax.Array,
    w: jax.Array,
    scale: jax.Array,
    *,
    group: int,
    chip: str,
    levels: float = 127.5,
    limit: Tile | None = None,
    interpret: Interpret = False,
) -> jax.Array:
    """The product of int8 codes of x, found row by row, and integer codes of w.

    Rows of x, columns of w and the contracted length may be any numbers: padding as in `weight_only`. A row of zeros has codes and
    results 0. Integers equal those of `reference.int8` bit for bit; the float sums over groups are taken in another order of k tiles
    only, and y is rounded once.

    Args:
      x: (M, K) float32 or bfloat16.
      w: codes (K, N), `jnp.int4` or int8.
      scale: (groups, N) float32 or bfloat16; one row where a column shares its scale.
      group: consecutive k that share a scale; a multiple of 128, or at least K.
      chip: "v5e", "v5p", "v6e"; "tpu7x" runs it without a gain.
      levels: the codes of a row's largest magnitude: 127.5 reaches -128, 127 is the narrow range.
      limit: the largest tile; None takes the generation's.
      interpret: run on a CPU, for tests.

    Returns:
      (M, N), the dtype of x. The gradient reaches x as if it had not been rounded (straight-through); w and scale are constants.

    Raises:
      ValueError: a shape, group or chip that the kernel does not take.

    Example:
      >>> x, w = jnp.float32([[1.0, -1.0] * 64, [0.0] * 128]), jnp.full((128, 128), 2, jnp.int8).at[1::2].set(-2)
      >>> y = int8(x, w, jnp.ones((1, 128)), group=128, chip="v6e", levels=127, interpret=True)
      >>> y[:, 0].round(3).tolist()
      [256.0, 0.0]
    """
    check(x, w, scale, group)
    if group < w.shape[0] and group % 128:
        raise ValueError(f"`group` must be a multiple of 128 or at least {w.shape[0]}, got {group}")
    run = functools.partial(rounded_product, group=group, chip=chip_of(chip), levels=levels, limit=limit, interpret=interpret)
    return to_rows_alone(run, functools.partial(float_gradient, group=group))(x, w, scale)


def _row_bytes(rows: int, k: int, itemsize: int) -> int:
    return rows * k * (2 * itemsize + 1)


def rounded_product(
    x: jax.Array,
    w: jax.Array,
    scale: jax.Array,
    group: int,
    chip: Chip,
    levels: float,
    limit: Tile | None,
    interpret: Interpret,
    dtype: jnp.dtype = jnp.int8,
) -> jax.Array:
    """The kernel, for codes of any dtype that the matrix unit multiplies by itself; sums are int32 for integers, else float32."""
    (m, k), n = x.shape, w.shape[1]
    tile = tiles.tile_of(chip, m, n, k, group, limit, divides=dtype != jnp.int8)
    height = tile.m if tile.m <= 16 else tiles.up(tile.m, 32)
    while height > 16 and _row_bytes(height, k, x.dtype.itemsize) > _ROW_BYTES:
        height = 16 if height == 32 else tiles.up(height // 2, 32)
    tile = Tile(height, tile.n, tile.k)
    rows, columns, steps = tiles.cuts(m, n, k, tile)
    x = tiles.pad_contracted(x, tile.k)
    scales = tiles.scale_blocks(scale, group, tile.k)
    whole = group >= k
    block = tiles.scale_block_of(group, k, tile.k)
    return pl.pallas_call(
        functools.partial(_kernel, levels=levels, whole=whole),
        out_shape=jax.ShapeDtypeStruct((m, n), x.dtype),
        grid=(rows, columns, steps),
        in_specs=[
            pl.BlockSpec((tile.m, x.shape[1]), lambda i, j, t: (i, 0)),
            pl.BlockSpec((tile.k, tile.n), lambda i, j, t: (t, j)),
            pl.BlockSpec((None, scales.shape[1], tile.n), lambda i, j, t: (block(t), 0, j)),
        ],
        out_specs=pl.BlockSpec((tile.m, tile.n), lambda i, j, t: (i, j)),
        scratch_shapes=[
            pltpu.VMEM((steps, tile.m, tile.k), dtype),
            pltpu.VMEM((tile.m, 1), jnp.float32),
            pltpu.VMEM((tile.m, tile.n), jnp.int32 if whole and dtype == jnp.int8 else jnp.float32),
        ],
        # The codes of a block of rows serve all columns, so those run one after the other.
        compiler_params=tiles.params("parallel", "arbitrary", "arbitrary", vmem=48 * 2**20),
        interpret=interpret,
        name=f"rounded_product_{jnp.dtype(dtype).name}",
    )(x, w, scales)


def _kernel(x_ref, w_ref, scale_ref, out_ref, codes_ref, row_ref, sum_ref, *, levels: float, whole: bool):
    column, step = pl.program_id(1), pl.program_id(2)

    @pl.when((column == 0) & (step == 0))
    def _():
        quantize(x_ref, codes_ref, row_ref, levels)

    add_tile(codes_ref[step], w_ref, scale_ref, sum_ref, step, whole)

    @pl.when(step == pl.num_programs(2) - 1)
    def _():
        y = sum_ref[...].astype(jnp.float32)
        y = y * scale_ref[...].astype(jnp.float32) if whole else y
        out_ref[...] = (y * row_ref[...]).astype(out_ref.dtype)


def add_tile(codes: jax.Array, w_ref, scale_ref, sum_ref, step: jax.Array, whole: bool) -> None:
    """Adds the product of a tile: integer sums where a column shares its scale, which comes last, else scaled group by group."""
    tiles.accumulate(sum_ref, _dot(codes, w_ref[...]) if whole else _groups(codes, w_ref, scale_ref), step)


def quantize(x_ref, codes_ref, row_ref, levels: float) -> None:
    """Writes codes (steps, m, k) and scales (m, 1) of the rows of x (m, steps k).

    32 rows at a time (one tile of int8), a tile of k after the other, in loops: its code is short and runs once for all columns.
    """
    steps, m, size = codes_ref.shape
    few = min(m, 32)

    def rows(r, carry: None) -> None:
        at = pl.ds(pl.multiple_of(r * few, few), few)

        def part(t) -> jax.Array:
            return x_ref[at, pl.ds(pl.multiple_of(t * size, size), size)].astype(jnp.float32)

        def widen(t, largest: jax.Array) -> jax.Array:
            return jnp.maximum(largest, jnp.max(jnp.abs(part(t)), axis=1, keepdims=True))

        def encode(t, inverse: jax.Array) -> jax.Array:
            codes_ref[t, at, :] = encoded(part(t) * inverse, codes_ref.dtype)
            return inverse

        largest = jax.lax.fori_loop(0, steps, widen, jnp.zeros((few, 1), jnp.float32))
        scale = jnp.where(largest > 0, largest * (1 / levels), 1.0)
        row_ref[at, :] = scale
        jax.lax.fori_loop(0, steps, encode, 1 / scale)

    jax.lax.fori_loop(0, m // few, rows, None)


def encoded(steps: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """Codes of a float32 number of steps: int8 to the nearest integer, half to even; else the dtype's own rounding. Both clip."""
    if dtype == jnp.int8:
        return jnp.clip(jnp.round(steps), -128, 127).astype(jnp.int32).astype(jnp.int8)
    largest = float(jnp.finfo(dtype).max)
    return jnp.clip(steps, -largest, largest).astype(dtype)


def _dot(codes: jax.Array, w: jax.Array) -> jax.Array:
    return tiles.dot(codes, w.astype(codes.dtype), jnp.int32 if codes.dtype == jnp.int8 else jnp.float32)


def _groups(codes: jax.Array, w_ref, scale_ref) -> jax.Array:
    groups = scale_ref.shape[0]
    size = w_ref.shape[0] // groups
    y = jnp.zeros((codes.shape[0], w_ref.shape[1]), jnp.float32)
    for g in range(groups):
        part = slice(g * size, (g + 1) * size)
        total = _dot(codes[:, part], w_ref[part, :])
        y += total.astype(jnp.float32) * tiles.spread(scale_ref, g, y.shape[0])
    return y
