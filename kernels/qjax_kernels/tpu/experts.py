"""Experts: a ragged product with packed weights, the rows of x sorted by expert.

    y_i = x_i (w_e * s_e)   for the rows i of expert e

Data flow: rows are cut into tiles; a tile that several experts share is visited once for each of them, and each writes its own rows.
Which tile and which expert a visit has is computed before the kernel and prefetched as scalars, so a visit's packed weight is on its way
while the one before is multiplied. Experts without rows are not visited and their weights not read.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from qjax_kernels.gradient import to_rows_alone
from qjax_kernels.reference import dequantize
from qjax_kernels.request import Request
from qjax_kernels.tpu import tiles
from qjax_kernels.tpu.chips import Chip, Placement, chip_of, why_not_chip
from qjax_kernels.tpu.tiles import Interpret, Tile
from qjax_kernels.tpu.weight_only import check, multiply, placement

_ROWS = 128  # of a tile at most: experts have few rows each, and a tile that two share is computed twice


def why_not(request: Request) -> str:
    """Returns why this kernel does not run a ragged product, or nothing.

    Example:
      >>> from qjax_kernels.request import Device, Weight
      >>> why_not(Request(Device("tpu", "v6e"), 256, 4096, 4096, Weight("int", 4, 128), parts=8))
      ''
      >>> why_not(Request(Device("tpu", "v6e"), 256, 4096, 4096, Weight("int", 4, 128)))
      'one product: this kernel runs several side by side'
    """
    weight = request.weight
    reason = why_not_chip(request.device.platform, request.device.chip)
    if reason:
        return reason
    if request.parts == 1:
        return "one product: this kernel runs several side by side"
    if weight.kind != "int" or weight.bits not in (4, 8):
        return f"a weight of kind {weight.kind} with {weight.bits} bits: this kernel takes signed codes of 4 and 8"
    if request.activation is not None:
        return f"{request.activation} activations: this kernel keeps them float"
    return tiles.why_not_group(weight.group_size, request.k)


def experts(
    x: jax.Array,
    w: jax.Array,
    scale: jax.Array,
    sizes: jax.Array,
    *,
    group: int,
    chip: str,
    limit: Tile | None = None,
    interpret: Interpret = False,
) -> jax.Array:
    """`jax.lax.ragged_dot(x, w * s, sizes)` with packed weights; shapes, padding and rounding as `weight_only`.

    Args:
      x: (M, K) float32 or bfloat16, the rows of expert 0 first.
      w: codes (E, K, N), `jnp.int4` or int8.
      scale: (E, groups, N) float32 or bfloat16.
      sizes: int32 (E,), rows of each expert, zero too; rows beyond their sum give zeros.
      group: consecutive k that share a scale; 32, 64, a multiple of 128, or at least K.
      chip: "v5e", "v5p", "v6e" or "tpu7x".
      limit: the largest tile; None takes the generation's, with at most 128 rows.
      interpret: run on a CPU, for tests.

    Returns:
      (M, N), the dtype of x. The gradient reaches x; w and scale are constants.

    Raises:
      ValueError: a shape, group or chip that the kernel does not take.

    Example:
      >>> x, w = jnp.ones((3, 128)), jnp.stack([jnp.full((128, 128), c, jnp.int4) for c in (1, 2)])
      >>> y = experts(x, w, jnp.ones((2, 1, 128)), jnp.int32([1, 2]), group=128, chip="v6e", interpret=True)
      >>> y[:, 0].tolist()
      [128.0, 256.0, 256.0]
    """
    if w.ndim != 3 or scale.ndim != 3 or scale.shape[0] != w.shape[0] or sizes.shape != w.shape[:1]:
        raise ValueError(f"`w` (E, K, N), `scale` (E, groups, N) and `sizes` (E,) do not fit: {w.shape}, {scale.shape}, {sizes.shape}")
    check(x, jax.ShapeDtypeStruct(w.shape[1:], w.dtype), jax.ShapeDtypeStruct(scale.shape[1:], scale.dtype), group)
    run = functools.partial(_run, group=group, chip=chip_of(chip), limit=limit, interpret=interpret)

    def gradient(t: jax.Array, w: jax.Array, scale: jax.Array, sizes: jax.Array) -> jax.Array:
        return lax.ragged_dot(t, dequantize(w, scale, group, t.dtype).swapaxes(1, 2), sizes)

    return to_rows_alone(run, gradient)(x, w, scale, sizes)


def visits(sizes: jax.Array, rows: int, height: int) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """Returns which tile and which expert each visit has, and from which row to which it writes: four int32 (tiles + E,).

    Rows that no expert has belong to one more that writes zeros (its expert is E). Visits that are left over repeat the last tile and
    write nothing.

    Example:
      >>> [a.tolist() for a in visits(jnp.int32([3, 0, 2]), 6, 4)]
      [[0, 0, 1, 1, 1], [0, 2, 2, 3, 3], [0, 3, 3, 5, 6], [3, 5, 5, 6, 6]]
    """
    count = pl.cdiv(rows, height) + sizes.shape[0]
    ends = jnp.append(jnp.cumsum(sizes.astype(jnp.int32)), rows)
    starts = jnp.append(0, ends[:-1])
    first = starts // height
    tiles_of = jnp.where(ends > starts, -(-ends // height) - first, 0)
    owner = jnp.repeat(jnp.arange(ends.size, dtype=jnp.int32), tiles_of, total_repeat_length=count)
    before = jnp.cumsum(tiles_of) - tiles_of
    number = jnp.arange(count, dtype=jnp.int32)
    spare = number >= jnp.sum(tiles_of)
    tile = jnp.where(spare, pl.cdiv(rows, height) - 1, first[owner] + number - before[owner])
    return tile, owner, jnp.where(spare, rows, starts[owner]), ends[owner]


def _run(
    x: jax.Array, w: jax.Array, scale: jax.Array, sizes: jax.Array, group: int, chip: Chip, limit: Tile | None, interpret: Interpret
) -> jax.Array:
    (m, k), (count, _, n) = x.shape, w.shape
    limit = limit or tiles.LARGEST[chip.name]
    tile = tiles.tile_of(chip, m, n, k, group, Tile(min(limit.m, _ROWS), limit.n, limit.k))
    _, columns, steps = tiles.cuts(m, n, k, tile)
    scales = jax.vmap(lambda s: tiles.scale_blocks(s, group, tile.k))(scale)
    block = tiles.scale_block_of(group, k, tile.k)
    tile_of, owner, start, end = visits(sizes, m, tile.m)

    def part(j, v, t, tile_of, owner, start, end):
        # A visit that multiplies nothing asks for the block that is there.
        idle = (owner[v] == count) | (start[v] >= end[v])
        return jnp.minimum(owner[v], count - 1), jnp.where(idle, steps - 1, t)

    def weight_block(j, v, t, *scalars):
        expert, step = part(j, v, t, *scalars)
        return expert, step, j

    def block_of_scales(j, v, t, *scalars):
        expert, step = part(j, v, t, *scalars)
        return expert, block(step), 0, j

    return pl.pallas_call(
        functools.partial(_kernel, chip=chip, place=placement(chip, tile.m, group, k), whole=group >= k, experts=count),
        out_shape=jax.ShapeDtypeStruct((m, n), x.dtype),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=4,
            grid=(columns, tile_of.size, steps),
            in_specs=[
                pl.BlockSpec((tile.m, tile.k), lambda j, v, t, tile_of, *_: (tile_of[v], t)),
                pl.BlockSpec((None, tile.k, tile.n), weight_block),
                pl.BlockSpec((None, None, scales.shape[2], tile.n), block_of_scales),
            ],
            out_specs=pl.BlockSpec((tile.m, tile.n), lambda j, v, t, tile_of, *_: (tile_of[v], j)),
            scratch_shapes=[pltpu.VMEM((tile.m, tile.n), jnp.float32)],
        ),
        compiler_params=tiles.params("parallel", "arbitrary", "arbitrary"),
        interpret=interpret,
        name="experts",
    )(tile_of, owner, start, end, tiles.pad_contracted(x, tile.k), w, scales)


def _kernel(
    tile_of, owner, start, end, x_ref, w_ref, scale_ref, out_ref, sum_ref, *, chip: Chip, place: Placement, whole: bool, experts: int
):
    visit, step = pl.program_id(1), pl.program_id(2)
    last = step == pl.num_programs(2) - 1
    fresh = (visit == 0) | (tile_of[visit] != tile_of[jnp.maximum(visit - 1, 0)])

    @pl.when(fresh & (step == 0))
    def _():
        out_ref[...] = jnp.zeros_like(out_ref)

    @pl.when((owner[visit] < experts) & (start[visit] < end[visit]))
    def _():
        tiles.accumulate(sum_ref, multiply(x_ref, w_ref, scale_ref, chip, place, whole), step)

        @pl.when(last)
        def _():
            y = sum_ref[...]
            y = y * scale_ref[...].astype(jnp.float32) if whole else y
            row = tile_of[visit] * out_ref.shape[0] + lax.broadcasted_iota(jnp.int32, out_ref.shape, 0)
            mine = (row >= start[visit]) & (row < end[visit])
            out_ref[...] = jnp.where(mine, y, out_ref[...].astype(jnp.float32)).astype(out_ref.dtype)
