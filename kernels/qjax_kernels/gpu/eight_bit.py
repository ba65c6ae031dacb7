"""Products of int8 with int8, and of e4m3 with e4m3, for Hopper GPUs: rows are rounded at run time, one scale a row."""

import functools
import importlib.util
from typing import Any

import jax
import jax.numpy as jnp

from ..gradient import like
from ..request import Request
from .chosen_tiles import eight_bit_tiles
from .epilogue import Activation, activated, added_up
from .operands import check_arrays, check_codes, check_cut, check_interpreter, check_vectors
from .tiles import Tiles, check_launch, padded_rows

E4M3_MAX = 448.0


def why_not(request: Request) -> str:
    """Why the kernel cannot serve a request; "" where it can.

    Args:
      request: what is asked.

    Returns:
      One sentence that names the obstacle, or "".
    """
    weight = request.weight
    kinds = {("int", 8): "int8", ("fp8", 8): "fp8"}
    wanted = kinds.get((weight.kind, weight.bits))
    reasons = (
        (request.device.platform != "cuda" or request.device.chip != "sm_90a", f"written for sm_90a, not {request.device.chip}"),
        (wanted is None, f"takes int8 or e4m3 codes, not {weight.kind}{weight.bits}"),
        (request.activation != wanted, f"rounds x to {wanted}, not to {request.activation}"),
        (weight.group_size is not None, f"takes one scale a row of w, not groups of {weight.group_size}"),
        (request.parts != 1, "takes one product, not several side by side"),
        (request.k % 128 != 0, f"K must be a multiple of 128, not {request.k}"),
        (request.n % 64 != 0, f"N must be a multiple of 64, not {request.n}"),
        (importlib.util.find_spec("absl") is None, "Mosaic GPU needs the package absl-py"),
    )
    return next((reason for unmet, reason in reasons if unmet), "")


def rounded_rows(x: jax.Array, dtype) -> tuple[jax.Array, jax.Array]:
    """Rows of x as eight bits and a float32 scale each.

    s_m = max_k |x_mk| / q_max, 1 where that is no normal number; c_mk = round(x_mk / s_m); NaN for a row that has one

    Args:
      x: (M, K) floating.
      dtype: int8, with q_max = 127, or float8_e4m3fn, with q_max = 448.

    Returns:
      Codes (M, K) and scales (M,).
    """
    x = x.astype(jnp.float32)
    top = 127.0 if dtype == jnp.int8 else E4M3_MAX
    scale = jnp.max(jnp.abs(x), axis=1) / top
    scale = jnp.where(scale < jnp.finfo(jnp.float32).tiny, 1.0, scale)
    scaled = x / scale[:, None]
    codes = jnp.clip(jnp.round(scaled), -127, 127) if dtype == jnp.int8 else jnp.clip(scaled, -top, top)
    return codes.astype(dtype), scale


def eight_bit_matmul(
    x: jax.Array, codes: jax.Array, scales: jax.Array, *, bias: jax.Array | None = None, activation: Activation | None = None,
    tiles: Tiles | None = None, cores: int = 132, interpret=None,
) -> jax.Array:  # fmt: skip
    """x (M, K), rounded by row to the type of the codes, times the transpose of codes (N, K) scaled by row.

    y_mn = f(s_m t_n sum_k q_mk c_nk + b_n)

    Args:
      x: (M, K) floating.
      codes: (N, K) int8 or float8_e4m3fn.
      scales: (N, 1) or (N,): bfloat16, float16 or float32.
      bias: (N,) floating, or None.
      activation: f, "relu", "silu" or "gelu" (by tanh), or None.
      tiles: the cut; None for the one that suits the shape.
      cores: multiprocessors of the GPU; where blocks wait for each other the launch fails with fewer than this.
      interpret: an interpreter's parameters, for tests without a GPU.

    Returns:
      (M, N) of the type of x. int8 products are summed exactly; sums of e4m3 keep about 14 bits on Hopper's tensor cores.
      Gradients reach x, as if it had not been rounded, and the bias; codes and scales are constants. Forward mode has none.

    Raises:
      ValueError: operands that do not fit together; tiles that need more shared memory than there is; an unknown activation.
      TypeError: an operand that is no array; `tiles` of another type.
    """

    def run(x, bias, codes, scales):
        (m, k), n = x.shape, codes.shape[0]
        if m == 0:
            return jnp.zeros((0, n), x.dtype)
        given = eight_bit_tiles(m, n, k, cores, x.dtype.itemsize) if tiles is None else tiles
        rows, row_scales = _rounded(jnp.pad(x, ((0, padded_rows(m) - m), (0, 0))), dtype=codes.dtype, tiles=given, interpret=interpret)
        how: dict[str, Any] = {"bias": bias, "activation": activation, "tiles": given, "cores": cores, "interpret": interpret}
        return scaled_product(rows, row_scales, codes, scales, out_dtype=x.dtype, **how)[:m]

    check_arrays(x=x, codes=codes, scales=scales, bias=bias)
    if x.dtype not in (jnp.bfloat16, jnp.float16, jnp.float32):
        raise ValueError(f"`x` is {x.dtype} {x.shape}; it must be bfloat16, float16 or float32 (M, K): rows that are rounded already go to "
                         "scaled_product")  # fmt: skip
    _check(x.shape, codes, scales, bias, tiles, cores, interpret)
    return like(run, functools.partial(plain, activation=activation))(x, bias, codes, scales)


def _check(rows: tuple[int, ...], codes: jax.Array, scales: jax.Array, bias: jax.Array | None, tiles, cores: int, interpret) -> None:
    """Raises ValueError where operands do not fit together, TypeError where tiles are of another kernel."""
    check_interpreter(interpret)
    check_cut(tiles, (Tiles,), cores, foreign=("digits", "scale_first"))
    if codes.dtype not in (jnp.int8, jnp.float8_e4m3fn):
        raise ValueError(f"`codes` are {codes.dtype}; they must be int8 or float8_e4m3fn")
    if len(rows) != 2 or codes.ndim != 2 or codes.shape[1] != rows[1]:
        raise ValueError(f"rows are {rows} and `codes` {codes.shape}; they must be (M, K) and (N, K)")
    check_codes(codes, interpret is not None)
    if scales.shape not in ((codes.shape[0], 1), (codes.shape[0],)):
        raise ValueError(f"`scales` are {scales.shape}; they must be one a row, ({codes.shape[0]}, 1) or ({codes.shape[0]},)")
    check_vectors(codes.shape[0], 1, scales[:, None] if scales.ndim == 1 else scales, bias)


def _scale_entries(m: int, tiles: Tiles) -> int:
    """Scales of rows as the copy engine reads them: whole blocks, 128 bytes at least."""
    block = tiles.block_m * tiles.cluster
    return max(32, -(-m // block) * block)


def _rounded(x: jax.Array, *, dtype, tiles: Tiles, interpret) -> tuple[jax.Array, jax.Array]:
    top = 127.0 if dtype == jnp.int8 else E4M3_MAX
    found = None if interpret is not None else rounded_by_kernel(x, dtype=dtype, top=top, room=_scale_entries(x.shape[0], tiles))
    return rounded_rows(x, dtype) if found is None else found  # an interpreter knows no single warps


# A program of its own, so that layers with the same shapes are traced and lowered once.
@functools.partial(jax.jit, static_argnames=("dtype", "top", "room"))
def rounded_by_kernel(x: jax.Array, *, dtype, top: float, room: int = 0) -> tuple[jax.Array, jax.Array] | None:
    """Rows as eight bits and a scale each, s_m = max_k |x_mk| / top correctly rounded, 1 where that is no normal number, on a Hopper GPU.

    Of a row that is not finite neither is the scale; its codes are any.

    Args:
      x: (M, K) floating.
      dtype: int8 or float8_e4m3fn.
      top: 127; 127.5, of which -128 and 127 are the codes; or 448.
      room: entries of the scales, if there are to be more than M; those behind M are whatever was there.

    Returns:
      Codes (M, K) and scales; None where the kernel does not take such rows.
    """
    from .rounding_kernel import can_round, round_rows

    return round_rows(x, dtype, top, max(room, x.shape[0])) if can_round(x) else None


def plain(x: jax.Array, bias: jax.Array | None, codes: jax.Array, scales: jax.Array, activation: Activation | None) -> jax.Array:
    """The same in jax, x not rounded."""
    y = jnp.dot(x.astype(jnp.float32), (codes.astype(jnp.float32) * scales.reshape(-1, 1).astype(jnp.float32)).T)
    return activated(y if bias is None else y + bias.astype(jnp.float32), activation).astype(x.dtype)


# A program of its own, so that layers with the same shapes are traced and lowered once.
@functools.partial(jax.jit, static_argnames=("out_dtype", "activation", "tiles", "cores", "interpret"))
def scaled_product(
    rows: jax.Array, row_scales: jax.Array, codes: jax.Array, scales: jax.Array, *, out_dtype, bias: jax.Array | None = None,
    activation: Activation | None = None, tiles: Tiles | None = None, cores: int = 132, interpret=None,
) -> jax.Array:  # fmt: skip
    """The same of rows that are rounded already.

    Args:
      rows: (M, K) int8 or float8_e4m3fn, M below 8 or a multiple of 8 (see `tiles.padded_rows`).
      row_scales: (M,) float32, or longer.
      codes: (N, K) of the same type.
      scales: (N, 1) or (N,): bfloat16, float16 or float32.
      out_dtype: of the result.
      bias: (N,) floating, or None.
      activation: as `eight_bit_matmul` takes it.
      tiles: the cut; None for the one that suits the shape.
      cores: multiprocessors of the GPU.
      interpret: an interpreter's parameters, for tests without a GPU.

    Returns:
      (M, N) of `out_dtype`.

    Raises:
      ValueError: operands that do not fit together; tiles that split K or need more shared memory than there is.
      TypeError: an operand that is no array; `tiles` of another type.
    """
    from .eight_bit_kernel import eight_bit

    check_arrays(rows=rows, row_scales=row_scales, codes=codes, scales=scales, bias=bias)
    _check(rows.shape, codes, scales, bias, tiles, cores, interpret)
    (m, k), n, wide = rows.shape, codes.shape[0], jnp.dtype(out_dtype).itemsize
    if rows.dtype != codes.dtype:
        raise ValueError(f"`rows` are {rows.dtype} and `codes` {codes.dtype}; they must be of one type")
    if m != padded_rows(m):
        raise ValueError(f"`rows` are {rows.shape}; above 8 they must be a multiple of 8 (`tiles.padded_rows`): pad them")
    if row_scales.ndim != 1 or row_scales.shape[0] < m or row_scales.dtype != jnp.float32:
        raise ValueError(f"`row_scales` are {row_scales.dtype} {row_scales.shape}; they must be float32 ({m},), or longer")
    if m == 0:
        return jnp.zeros((0, n), out_dtype)
    tiles = eight_bit_tiles(m, n, k, cores, wide) if tiles is None else tiles
    check_launch(tiles, tiles.x_left and tiles.warpgroups > 1, tiles.shared_bytes(8, 0, 1, wide))
    row_scales = jnp.pad(row_scales, (0, max(0, _scale_entries(m, tiles) - row_scales.shape[0])))
    end: dict[str, Any] = {"bias": bias, "activation": activation, "out_dtype": out_dtype, "interpret": interpret}
    y = eight_bit(rows, row_scales, codes, scales.reshape(n), tiles=tiles, cores=cores, **end)
    return added_up(y, bias, activation, out_dtype) if tiles.split_k > 1 else y
