"""W4A16 and W8A16: a float x times an int4 or int8 weight with a scale a group, dequantized tile by tile in vector memory.

    y = x (w * s)

Data flow of a tile (m, n, k): packed codes and their scales are copied to vector memory while the tile before is multiplied; codes
become floats in registers; the matrix unit multiplies; float32 sums stay in vector memory until the last k, then go out once. The
float weight never exists outside registers and vector memory.
"""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from qjax_kernels.gradient import to_rows_alone
from qjax_kernels.reference import dequantize
from qjax_kernels.request import Request
from qjax_kernels.tpu import digits, tiles
from qjax_kernels.tpu.chips import Chip, Placement, chip_of, why_not_chip
from qjax_kernels.tpu.tiles import Interpret, Tile

Shaped = jax.Array | jax.ShapeDtypeStruct

_UNIT = 256  # columns of a matrix unit of the generations that multiply e4m3
_AHEAD = 4  # products whose results may be on their way: two in each of two units
_SINGLE = 8  # up to so many rows a tile is no higher than x: rows that are not there would be multiplied and scaled as well
_WIDE = 512  # from so many columns of a tile on, cutting rows into digits takes less than making codes float
_FEW_ROWS = 32  # up to here the results of a dot are fewer than its weights, and the scale goes behind it on every chip


def why_not(request: Request) -> str:
    """Returns why this kernel does not run a product, or nothing.

    Example:
      >>> from qjax_kernels.request import Device, Weight
      >>> why_not(Request(Device("tpu", "v6e"), 16, 4096, 4096, Weight("int", 4, 128)))
      ''
      >>> why_not(Request(Device("tpu", "v6e"), 16, 4096, 4096, Weight("int", 3, 128)))
      'codes of 3 bits: the chip has no such integers; 4 and 8 are there'
    """
    weight = request.weight
    reason = why_not_chip(request.device.platform, request.device.chip)
    if reason:
        return reason
    if weight.kind != "int":
        return f"a weight of kind {weight.kind}: this kernel takes signed codes without a zero point"
    if weight.bits not in (4, 8):
        return f"codes of {weight.bits} bits: the chip has no such integers; 4 and 8 are there"
    if request.activation is not None:
        return f"{request.activation} activations: this kernel keeps them float"
    if request.parts != 1:
        return f"{request.parts} products side by side: `experts` takes those"
    return tiles.why_not_group(weight.group_size, request.k)


def placement(chip: Chip, rows: int, group: int, k: int) -> Placement:
    """Returns where the scale of a group goes.

    Before the dot it costs a multiplication a weight, behind it one a result and group. Groups shorter than the 128 lanes of x would be
    cut out of the middle of a register, so theirs always goes before.
    """
    if group >= k:
        return "after"
    if group % 128:
        return "before"
    return "after" if rows <= _FEW_ROWS else chip.placement


def weight_only(
    x: jax.Array, w: jax.Array, scale: jax.Array, *, group: int, chip: str, limit: Tile | None = None, interpret: Interpret = False
) -> jax.Array:
    """`y = x (w * s)`, the sum in float32.

    Rows of x, columns of w and the contracted length may be any numbers. Rows and columns of the last tiles that stick out are computed
    and not written. Along K, x and the scales are padded with zeros to whole tiles (a copy of x, only where K is not a multiple of the
    tile's); codes are not, because whatever integer is there is multiplied by a zero. (XLA may copy a packed weight whose K or N is no
    multiple of 128 into whole native tiles first.)

    Rounding: with the scale before the dot, `s` and `w * s` are rounded to bfloat16 (a relative error of 2^-8 each at most), on v5e and v5p
    only `w * s` is; with the scale behind, nothing is rounded but y. A float32 x keeps float32 everywhere, in six passes of the unit. Up to
    16 bfloat16 rows meet int4 on v5e and v5p, in tiles of 512 columns or more, as three bytes (`digits.cut`), exactly where no value is
    2^14 times smaller than the largest of its row and group; of those that are, what is below 2^-22 of that largest is lost, and a row
    that holds an infinity gives NaN.

    Args:
      x: (M, K) float32 or bfloat16.
      w: codes (K, N), `jnp.int4` or int8.
      scale: (groups, N) float32 or bfloat16, `ceil(K / group)` of them; one row where a column shares its scale.
      group: consecutive k that share a scale; 32, 64, a multiple of 128, or at least K.
      chip: "v5e", "v5p", "v6e" or "tpu7x"; the program may be compiled elsewhere.
      limit: the largest tile; None takes the generation's.
      interpret: run on a CPU, for tests.

    Returns:
      (M, N), the dtype of x. The gradient reaches x, through the weight that was multiplied; w and scale are constants.

    Raises:
      ValueError: a shape, group or chip that the kernel does not take.

    Example:
      >>> x, w = jnp.ones((2, 128)), jnp.full((128, 128), 3, jnp.int4)
      >>> weight_only(x, w, jnp.full((1, 128), 0.5), group=128, chip="v6e", interpret=True)[1, :2].tolist()
      [192.0, 192.0]
    """
    check(x, w, scale, group)
    run = functools.partial(_run, group=group, chip=chip_of(chip), limit=limit, interpret=interpret)
    return to_rows_alone(run, functools.partial(float_gradient, group=group))(x, w, scale)


def float_gradient(t: jax.Array, w: jax.Array, scale: jax.Array, group: int) -> jax.Array:
    """`t (w * s)^T` in the dtype of t, by XLA: training is not what these kernels are for."""
    return jnp.dot(t, dequantize(w, scale, group, t.dtype).T, preferred_element_type=jnp.float32).astype(t.dtype)


def check(x: Shaped, w: Shaped, scale: Shaped, group: int) -> None:
    """Raises what is wrong with the arguments of a product."""
    if x.ndim != 2 or w.ndim != 2 or x.shape[1] != w.shape[0]:
        raise ValueError(f"`x` (M, K) and `w` (K, N) do not fit: {x.shape} and {w.shape}")
    if x.dtype not in (jnp.float32, jnp.bfloat16):
        raise ValueError(f"`x` must be float32 or bfloat16, got {x.dtype}")
    if w.dtype not in (jnp.int4, jnp.int8):
        raise ValueError(f"`w` must be int4 or int8, got {w.dtype}")
    if scale.shape != (pl.cdiv(w.shape[0], group), w.shape[1]):
        raise ValueError(f"`scale` must be ({pl.cdiv(w.shape[0], group)}, {w.shape[1]}) for groups of {group}, got {scale.shape}")
    reason = tiles.why_not_group(group, w.shape[0])
    if reason:
        raise ValueError(f"`group`: {reason}")


def _run(x: jax.Array, w: jax.Array, scale: jax.Array, group: int, chip: Chip, limit: Tile | None, interpret: Interpret) -> jax.Array:
    (m, k), n = x.shape, w.shape[1]
    tile = tiles.tile_of(chip, m, n, k, group, limit)
    if m <= _SINGLE and x.dtype == jnp.bfloat16 and not chip.fp8:  # e4m3 takes more so: 352 bundles for 329
        tile = dataclasses.replace(tile, m=m)
    rows, columns, steps = tiles.cuts(m, n, k, tile)
    scales = tiles.scale_blocks(scale, group, tile.k)
    block = tiles.scale_block_of(group, k, tile.k)
    return pl.pallas_call(
        functools.partial(_kernel, chip=chip, place=placement(chip, tile.m, group, k), whole=group >= k),
        out_shape=jax.ShapeDtypeStruct((m, n), x.dtype),
        grid=(rows, columns, steps),
        in_specs=[
            pl.BlockSpec((tile.m, tile.k), lambda i, j, t: (i, t)),
            pl.BlockSpec((tile.k, tile.n), lambda i, j, t: (t, j)),
            pl.BlockSpec((None, scales.shape[1], tile.n), lambda i, j, t: (block(t), 0, j)),
        ],
        out_specs=pl.BlockSpec((tile.m, tile.n), lambda i, j, t: (i, j)),
        scratch_shapes=[pltpu.VMEM((tile.m, tile.n), jnp.float32)],
        compiler_params=tiles.params("parallel", "parallel", "arbitrary"),
        interpret=interpret,
        name="weight_only",
    )(tiles.pad_contracted(x, tile.k), w, scales)


def _kernel(x_ref, w_ref, scale_ref, out_ref, sum_ref, *, chip: Chip, place: Placement, whole: bool):
    step = pl.program_id(2)
    tiles.accumulate(sum_ref, multiply(x_ref, w_ref, scale_ref, chip, place, whole), step)

    @pl.when(step == pl.num_programs(2) - 1)
    def _():
        y = sum_ref[...]
        out_ref[...] = (y * scale_ref[...].astype(jnp.float32) if whole else y).astype(out_ref.dtype)


def multiply(x_ref, w_ref, scale_ref, chip: Chip, place: Placement, whole: bool) -> jax.Array:
    """The product of a tile, float32 (m, n); where a column shares its scale (`whole`), not scaled yet."""
    rows = x_ref.shape[0]
    few = rows <= _FEW_ROWS and x_ref.dtype == jnp.bfloat16 and w_ref.dtype == jnp.int4
    if not whole and place == "before":
        return tiles.dot(x_ref[...], scaled_weight(w_ref, scale_ref, x_ref.dtype, chip))
    if few and chip.int8 and not chip.bfloat16 and rows <= 16 and w_ref.shape[1] >= _WIDE:
        return digits.product(x_ref[...], w_ref[...]) if whole else _scaled_results(x_ref, w_ref, scale_ref, digits.product)
    if few and chip.fp8 and rows % 16 == 0:  # e4m3 holds all of int4, at half the bytes that the matrix unit is fed
        return _product_of_e4m3(x_ref[...], w_ref[...]) if whole else _scaled_in_turn(x_ref, w_ref, scale_ref)
    return _product(x_ref[...], w_ref[...]) if whole else _scaled_results(x_ref, w_ref, scale_ref, _product)


def scaled_weight(w_ref, scale_ref, dtype: jnp.dtype, chip: Chip) -> jax.Array:
    """`w * s` (k, n) in the dtype of x, multiplied in bfloat16 where the vector unit has that."""
    groups = scale_ref.shape[0]
    size = w_ref.shape[0] // groups
    factor = jnp.bfloat16 if chip.bfloat16 and dtype == jnp.bfloat16 else jnp.float32
    scaled = [w_ref[g * size : (g + 1) * size, :].astype(factor) * tiles.spread(scale_ref, g, size).astype(factor) for g in range(groups)]
    return jnp.concatenate(scaled).astype(dtype)


def _product(x: jax.Array, w: jax.Array) -> jax.Array:
    return tiles.dot(x, w.astype(x.dtype))


def _product_of_e4m3(x: jax.Array, w: jax.Array) -> jax.Array:
    return tiles.dot(x, w.astype(jnp.float8_e4m3fn))


def _scaled_results(x_ref, w_ref, scale_ref, product: Callable[[jax.Array, jax.Array], jax.Array]) -> jax.Array:
    groups = scale_ref.shape[0]
    size = w_ref.shape[0] // groups
    y = jnp.zeros((x_ref.shape[0], w_ref.shape[1]), jnp.float32)
    for g in range(groups):
        part = slice(g * size, (g + 1) * size)
        y += product(x_ref[:, part], w_ref[part, :]) * tiles.spread(scale_ref, g, y.shape[0])
    return y


def _scaled_in_turn(x_ref, w_ref, scale_ref) -> jax.Array:
    """`_scaled_results` of e4m3 codes, the columns that a matrix unit holds one after the other.

    The compiler would put off all results until the last weight is in, and then scale them in a row. So each product waits for one of a
    few before, whose result is taken out by then and scaled beside the next weights.
    """
    groups = scale_ref.shape[0]
    size = w_ref.shape[0] // groups
    columns, results = [], []
    for c in range(0, w_ref.shape[1], _UNIT):
        here = slice(c, min(c + _UNIT, w_ref.shape[1]))
        y = jnp.zeros((x_ref.shape[0], here.stop - c), jnp.float32)
        for g in range(groups):
            part = slice(g * size, (g + 1) * size)
            x = x_ref[:, part]
            if len(results) >= _AHEAD:
                x = _after(results[-_AHEAD], x)
            results.append(_product_of_e4m3(x, w_ref[part, here]))
            y += results[-1] * tiles.spread(scale_ref, g, y.shape[0], here)
        columns.append(y)
    return jnp.concatenate(columns, axis=1)


def _after(result: jax.Array, x: jax.Array) -> jax.Array:
    """x (m, k) as it is, but not before the float32 result (m, n) is there: the matrix unit applies a mask, and this one holds nowhere."""
    words = pltpu.bitcast(x[:, :128], jnp.int32)
    masked = pltpu.bitcast(jnp.where(result[: words.shape[0], -128:] > jnp.inf, 0, words), x.dtype)
    return masked if x.shape[1] == 128 else jnp.concatenate([masked, x[:, 128:]], axis=1)
