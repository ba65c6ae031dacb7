"""Products with weights of 4 or 8 bits and bfloat16 rows, for Hopper GPUs."""

import functools
import importlib.util
from typing import Any

import jax
import jax.numpy as jnp

from ..gradient import like
from ..request import Request
from .epilogue import Activation, activated, added_up
from .tiles import SHARED_BYTES, Tiles, padded_rows, weight_only_tiles


def why_not(request: Request) -> str:
    """Why the kernel cannot serve a request; "" where it can.

    Args:
      request: what is asked.

    Returns:
      One sentence that names the obstacle, or "".
    """
    weight = request.weight
    group = weight.group_size
    reasons = (
        (request.device.platform != "cuda" or request.device.chip != "sm_90a", f"written for sm_90a, not {request.device.chip}"),
        (weight.kind != "int" or weight.bits not in (4, 8), f"takes signed codes of 4 or 8 bits, not {weight.kind}{weight.bits}"),
        (request.activation is not None, "keeps x in bfloat16"),
        (request.dtype != "bfloat16", f"takes bfloat16 rows, not {request.dtype}"),
        (request.parts != 1, "takes one product, not several side by side"),
        (request.k % 128 != 0, f"K must be a multiple of 128, not {request.k}"),
        (request.n % 64 != 0, f"N must be a multiple of 64, not {request.n}"),
        (group is not None and group % 128 != 0, f"groups must be a multiple of 128, not {group}"),
        (group is not None and request.k % group != 0, f"K = {request.k} is not a multiple of the group {group}"),
        (importlib.util.find_spec("absl") is None, "Mosaic GPU needs the package absl-py"),
    )
    return next((reason for unmet, reason in reasons if unmet), "")


def whole_rows(scales: jax.Array) -> jax.Array:
    """Scales (..., N, G) with zeros behind each row, so that it is a multiple of 16 bytes.

    Example:
      >>> whole_rows(jnp.ones((2, 86))).shape
      (2, 88)
    """
    extra = -scales.shape[-1] % (16 // scales.dtype.itemsize)
    return jnp.pad(scales, [(0, 0)] * (scales.ndim - 1) + [(0, extra)]) if extra else scales


def weight_only_matmul(
    x: jax.Array,
    codes: jax.Array,
    scales: jax.Array,
    *,
    group_size: int | None = None,
    bias: jax.Array | None = None,
    activation: Activation | None = None,
    tiles: Tiles | None = None,
    cores: int = 132,
    interpret=None,
) -> jax.Array:
    """x (M, K) times the transpose of codes (N, K) scaled by row, or by row and group.

    y_mn = f(sum_k x_mk s_ng(k) c_nk + b_n)

    Args:
      x: (M, K) bfloat16.
      codes: (N, K) int4 or int8.
      scales: (N, K / group_size), or (N, 1) per channel: bfloat16, float16 or float32. Further columns are not used: the copy engine takes
        rows of a multiple of 16 bytes (`whole_rows`), and others are padded in the call.
      group_size: consecutive k that share a scale; None per channel.
      bias: (N,) floating, added to the float32 sums; or None.
      activation: f, "relu", "silu" or "gelu" (by tanh), of the float32 sums; or None.
      tiles: the cut; None for the one that suits the shape.
      cores: multiprocessors of the GPU.
      interpret: an interpreter's parameters, for tests without a GPU.

    Returns:
      (M, N) bfloat16. Sums are float32; the scale multiplies the float32 sum of a group unless `tiles.scale_first`.
      Gradients reach x and the bias, as those of the same product in float32 by XLA; codes and scales are constants. Forward mode has none.

    Raises:
      ValueError: the tiles cannot be used for these codes; an unknown activation.
    """
    run = functools.partial(_run, group_size=group_size, activation=activation, tiles=tiles, cores=cores, interpret=interpret)
    return like(run, functools.partial(plain, group_size=group_size, activation=activation))(x, bias, codes, scales)


def plain(x: jax.Array, bias: jax.Array | None, codes: jax.Array, scales: jax.Array, group_size: int | None, activation) -> jax.Array:
    """The same in jax."""
    k = x.shape[1]
    each = jnp.repeat(scales[:, : 1 if group_size is None else k // group_size].astype(jnp.float32), group_size or k, axis=1)
    y = jnp.dot(x.astype(jnp.float32), (codes.astype(jnp.float32) * each).T)
    return activated(y if bias is None else y + bias.astype(jnp.float32), activation).astype(x.dtype)


# A program of its own: layers with the same shapes are traced and lowered once, which else takes Mosaic seconds for each of them.
@functools.partial(jax.jit, static_argnames=("group_size", "activation", "tiles", "cores", "interpret"))
def _run(
    x: jax.Array, bias: jax.Array | None, codes: jax.Array, scales: jax.Array, *, group_size, activation, tiles, cores, interpret
) -> jax.Array:
    from .digits_kernel import digit_products
    from .few_rows_kernel import few_rows
    from .weight_only_kernel import reordered, weight_only

    m, k = x.shape
    bits = 4 if codes.dtype == jnp.int4 else 8
    tiles = weight_only_tiles(m, codes.shape[0], k, bits, cores, group_size) if tiles is None else tiles
    if tiles.reorder and bits != 4:
        raise ValueError(f"`tiles.reorder` is for codes of 4 bits, these have {bits}; leave it False")
    if (tiles.digits or tiles.few_rows) and (bits != 4 or group_size is None):
        raise ValueError(f"`tiles.{'digits' if tiles.digits else 'few_rows'}` is for codes of 4 bits in groups; leave it False")
    if tiles.few_rows and (m > tiles.block_m or 8 < m < 16):  # the copy engine takes fewer rows than a tile of 8, or whole tiles
        raise ValueError(f"`tiles.few_rows` takes 1 to 8 rows or 16, up to `block_m` = {tiles.block_m}; `x` has {m}; leave it False")
    per_copy = 16 // scales.dtype.itemsize
    scales = scales if group_size is None else whole_rows(scales)
    if group_size is not None and (group_size * per_copy) % tiles.block_k:
        raise ValueError(
            f"`tiles.block_k` is {tiles.block_k}; it must divide {group_size * per_copy}, the k whose scales are copied at once"
        )
    if (used := tiles.shared_bytes(bits, rows=m)) > SHARED_BYTES:
        raise ValueError(f"`tiles` need {used} bytes of shared memory, the GPU has {SHARED_BYTES}; take fewer stages or smaller blocks")
    end: dict[str, Any] = {"bias": bias, "activation": activation, "tiles": tiles, "interpret": interpret}
    if tiles.digits:
        y = digit_products(x, codes, scales, group=group_size or k, **end)
        return added_up(y, bias, activation, x.dtype) if tiles.split_k > 1 else y
    if tiles.few_rows:
        y = few_rows(x, codes, scales, group=group_size or k, **end)
        return added_up(y, bias, activation, x.dtype) if y.ndim == 3 else y
    x = jnp.pad(x, ((0, padded_rows(m) - m), (0, 0)))
    if tiles.reorder:
        x = reordered(x)
    y = weight_only(x, codes, scales, bits=bits, group=group_size, **end)
    y = added_up(y, bias, activation, x.dtype) if tiles.split_k > 1 else y
    return y[:m]
