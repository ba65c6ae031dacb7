"""FP8: e4m3 weights with a scale a column, x kept bfloat16 or rounded to e4m3 row by row inside the kernel.

    W8A8:   y_ij = r_i s_j sum_k f8(x_ik / r_i) w_kj,  r_i = max|x_i| / 448
    W8A16:  y_ij = s_j sum_k x_ik w_kj

Data flow: as `int8` and `weight_only`, the codes going to the matrix unit as they are. Only tpu7x multiplies e4m3; its predecessors
would widen every code, which stock XLA does as well.
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
from qjax_kernels.tpu.int8 import rounded_product
from qjax_kernels.tpu.tiles import Interpret, Tile

E4M3 = jnp.float8_e4m3fn
LARGEST = 448.0


def why_not(request: Request) -> str:
    """Returns why this kernel does not run a product, or nothing.

    Example:
      >>> from qjax_kernels.request import Device, Weight
      >>> why_not(Request(Device("tpu", "v6e"), 16, 4096, 4096, Weight("fp8", 8), activation="fp8"))
      'v6e does not multiply e4m3: it would widen every code, as stock XLA does'
    """
    weight, device = request.weight, request.device
    reason = why_not_chip(device.platform, device.chip)
    if reason:
        return reason
    if weight.kind != "fp8":
        return f"a weight of kind {weight.kind}: this kernel takes fp8"
    if not chip_of(device.chip).fp8:
        return f"{device.chip} does not multiply e4m3: it would widen every code, as stock XLA does"
    if request.activation == "int8":
        return "int8 activations with an fp8 weight: no unit multiplies them"
    if request.activation is None and request.dtype != "bfloat16":
        return "a float32 x: the matrix unit takes e4m3 beside bfloat16 or e4m3"
    if weight.group_size is not None and weight.group_size < request.k:
        return f"groups of {weight.group_size}: a column shares its scale here"
    if request.parts != 1:
        return f"{request.parts} products side by side: this kernel runs one"
    return "" if request.k % 128 == 0 else f"K {request.k} is no multiple of 128: what lies behind the last code may be NaN"


def fp8(
    x: jax.Array,
    w: jax.Array,
    scale: jax.Array,
    *,
    chip: str,
    rounded: bool = True,
    limit: Tile | None = None,
    interpret: Interpret = False,
) -> jax.Array:
    """The product of x and an e4m3 weight, the sum in float32.

    Rows of x and columns of w may be any numbers; K is a multiple of 128, because a code that is not there could be NaN. A row of zeros
    has scale 1 and results 0.

    Args:
      x: (M, K) float32 or bfloat16; bfloat16 unless `rounded`.
      w: (K, N) e4m3.
      scale: (1, N) float32.
      chip: "tpu7x"; others widen the codes and gain nothing.
      rounded: whether rows of x are rounded to e4m3 with a scale each.
      limit: the largest tile; None takes the generation's.
      interpret: run on a CPU, for tests.

    Returns:
      (M, N), the dtype of x. The gradient reaches x (straight-through where it is rounded); w and scale are constants.

    Raises:
      ValueError: a shape, dtype or chip that the kernel does not take.

    Example:
      >>> x, w = jnp.ones((2, 128), jnp.bfloat16), jnp.full((128, 128), 1.5, E4M3)
      >>> fp8(x, w, jnp.ones((1, 128)), chip="tpu7x", interpret=True)[0, 0].item()
      192.0
    """
    _check(x, w, scale, rounded)
    where = chip_of(chip)
    if rounded:
        run = functools.partial(
            rounded_product, group=w.shape[0], chip=where, levels=LARGEST, limit=limit, interpret=interpret, dtype=E4M3
        )
    else:
        run = functools.partial(_weight_only, chip=where, limit=limit, interpret=interpret)
    return to_rows_alone(run, _gradient)(x, w, scale)


def _gradient(t: jax.Array, w: jax.Array, scale: jax.Array) -> jax.Array:
    weight = (w.astype(jnp.float32) * scale).astype(t.dtype)
    return jnp.dot(t, weight.T, preferred_element_type=jnp.float32).astype(t.dtype)


def _check(x: jax.Array, w: jax.Array, scale: jax.Array, rounded: bool) -> None:
    if x.ndim != 2 or w.ndim != 2 or x.shape[1] != w.shape[0]:
        raise ValueError(f"`x` (M, K) and `w` (K, N) do not fit: {x.shape} and {w.shape}")
    if x.dtype != jnp.bfloat16 and not (rounded and x.dtype == jnp.float32):
        raise ValueError(f"`x` must be bfloat16{' or float32' if rounded else ''}, got {x.dtype}")
    if w.dtype != E4M3:
        raise ValueError(f"`w` must be {jnp.dtype(E4M3).name}, got {w.dtype}")
    if w.shape[0] % 128:
        raise ValueError(f"K must be a multiple of 128, got `w` {w.shape}: pad both operands with zeros")
    if scale.shape != (1, w.shape[1]):
        raise ValueError(f"`scale` must be (1, {w.shape[1]}), got {scale.shape}")


def _weight_only(x: jax.Array, w: jax.Array, scale: jax.Array, chip: Chip, limit: Tile | None, interpret: Interpret) -> jax.Array:
    (m, k), n = x.shape, w.shape[1]
    tile = tiles.tile_of(chip, m, n, k, k, limit, divides=True)
    return pl.pallas_call(
        _kernel,
        out_shape=jax.ShapeDtypeStruct((m, n), x.dtype),
        grid=tiles.cuts(m, n, k, tile),
        in_specs=[
            pl.BlockSpec((tile.m, tile.k), lambda i, j, t: (i, t)),
            pl.BlockSpec((tile.k, tile.n), lambda i, j, t: (t, j)),
            pl.BlockSpec((1, tile.n), lambda i, j, t: (0, j)),
        ],
        out_specs=pl.BlockSpec((tile.m, tile.n), lambda i, j, t: (i, j)),
        scratch_shapes=[pltpu.VMEM((tile.m, tile.n), jnp.float32)],
        compiler_params=tiles.params("parallel", "parallel", "arbitrary"),
        interpret=interpret,
        name="weight_only_fp8",
    )(x, w, scale)


def _kernel(x_ref, w_ref, scale_ref, out_ref, sum_ref):
    step = pl.program_id(2)
    tiles.accumulate(sum_ref, tiles.dot(x_ref[...], w_ref[...]), step)

    @pl.when(step == pl.num_programs(2) - 1)
    def _():
        out_ref[...] = (sum_ref[...] * scale_ref[...]).astype(out_ref.dtype)
