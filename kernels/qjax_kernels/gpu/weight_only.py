"""Products with weights of 4 or 8 bits and bfloat16 rows, for Hopper GPUs."""

import functools
import importlib.util
import numbers
from typing import Any

import jax
import jax.numpy as jnp

from ..gradient import like
from ..request import Request
from .chosen_tiles import pipelined_tiles, weight_only_tiles
from .epilogue import Activation, activated, added_up
from .operands import check_arrays, check_codes, check_cut, check_interpreter, check_vectors
from .order import in_order
from .tiles import PIECE, Direct, Tiles, at_once, check_launch, padded_rows, stays


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
    norm: float | None = None,
    padded_scales: bool = False,
    tiles: Tiles | Direct | None = None,
    cores: int = 132,
    interpret=None,
) -> jax.Array:
    """x (M, K) times the transpose of codes (N, K) scaled by row, or by row and group.

    y_mn = f(r_m sum_k x_mk s_ng(k) c_nk + b_n),  r_m = 1, or 1 / sqrt(mean_k x_mk^2 + norm)

    Args:
      x: (M, K) bfloat16.
      codes: (N, K) int8, or int4 in the order `order.by_threads` gives them.
      scales: (N, K / group_size), or (N, 1) per channel: bfloat16, float16 or float32.
      group_size: consecutive k that share a scale; None per channel.
      bias: (N,) floating, added to the float32 sums; or None.
      activation: f, "relu", "silu" or "gelu" (by tanh), of the float32 sums; or None.
      norm: the row is divided by the root of its mean square and this; None: it is not. A norm's gain belongs to the weight's columns, or
        to x. Of more than eight rows the product is rounded to bfloat16 before.
      padded_scales: scales of groups have been through `whole_rows`, since the copy engine takes rows of a multiple of 16 bytes: once,
        where each call would pad them. Those of other groups that are as long then are not told apart.
      tiles: the cut; None for the one that suits the shape.
      cores: multiprocessors of the GPU; where blocks wait for each other the launch fails with fewer than this.
      interpret: an interpreter's parameters, for tests without a GPU.

    Returns:
      (M, N) bfloat16. Sums are float32; the scale multiplies the float32 sum of a group unless `tiles.scale_first`.
      Gradients reach x and the bias, as those of the same product in float32 by XLA; codes and scales are constants. Forward mode has none.

    Raises:
      ValueError: operands that do not fit together; tiles that cannot be used for these codes; an unknown activation; a negative `norm`.
      TypeError: an operand that is no array; `tiles` or `norm` of another type.
    """
    check_arrays(x=x, codes=codes, scales=scales, bias=bias)
    check_interpreter(interpret)
    _check(x, codes, group_size, interpret)
    check_cut(tiles, (Tiles, Direct), cores, foreign=("x_left",))
    _check_norm(norm)
    _check_scales(codes, scales, group_size, padded_scales, bias)
    run = functools.partial(_run, group_size=group_size, activation=activation, norm=norm, tiles=tiles, cores=cores, interpret=interpret)
    same = functools.partial(plain, group_size=group_size, activation=activation, norm=norm)
    return like(run, same)(x, bias, codes, scales)


def _check(x: jax.Array, codes: jax.Array, group: int | None, interpret) -> None:
    """Raises ValueError where rows, codes and groups do not fit together."""
    if x.ndim != 2 or x.dtype != jnp.bfloat16:
        raise ValueError(f"`x` is {x.dtype} {x.shape}; it must be bfloat16 (M, K), as `x.astype(jnp.bfloat16)` makes it")
    k = x.shape[1]
    if codes.ndim != 2 or codes.shape[1] != k or codes.dtype not in (jnp.int4, jnp.int8):
        raise ValueError(f"`codes` are {codes.dtype} {codes.shape}; they must be int4 or int8 (N, {k}), as wide as `x`")
    check_codes(codes, interpret is not None)
    if group is not None and (not isinstance(group, numbers.Integral) or group < PIECE or group % PIECE or k % group):
        raise ValueError(f"`group_size` is {group!r}; it must be an int, a multiple of {PIECE} that divides K = {k}, or None")


def _check_scales(codes: jax.Array, scales: jax.Array, group: int | None, padded: bool, bias: jax.Array | None) -> None:
    """Raises ValueError where scales are not those of the groups, or `check_vectors` does."""
    n, k = codes.shape
    if type(padded) is not bool:
        raise TypeError(f"`padded_scales` is {padded!r}; it must be True or False")
    if group is None:
        if scales.ndim == 2 and scales.shape[1] > 1:
            raise ValueError(f"`scales` have {scales.shape[1]} columns and `group_size` is None; give it, or one scale a row")
        check_vectors(n, 1, scales, bias)
        return
    groups, several = k // group, 16 // scales.dtype.itemsize  # in 16 bytes
    whole, wanted = -(-groups // several) * several, f", K / `group_size` = {k} / {group} to a row"
    columns = scales.shape[1] if scales.ndim == 2 else groups
    if not padded and columns != groups and columns and k % (PIECE * columns) == 0:
        wanted += f"; {columns} to a row are those of `group_size` {k // columns}"
    if padded:
        wanted += f", and zeros up to a multiple of {several}"
    elif groups < whole and scales.shape == (n, whole):
        wanted += ", or with `padded_scales`, if these are zeros behind"
    check_vectors(n, whole if padded else groups, scales, bias, wanted)


def _check_norm(norm: float | None) -> None:
    """Raises where it cannot be added to a mean square."""
    if norm is None:
        return
    if isinstance(norm, bool) or not isinstance(norm, numbers.Real):
        raise TypeError(f"`norm` is {norm!r}; it must be a Python number that is added to the mean square, or None")
    if not 0 <= norm < float("inf"):
        raise ValueError(f"`norm` is {norm!r}; what is added to the mean square must be finite and not negative")


def plain(
    x: jax.Array, bias: jax.Array | None, codes: jax.Array, scales: jax.Array, group_size: int | None, activation: Activation | None,
    norm: float | None = None,
) -> jax.Array:  # fmt: skip
    """The same in jax."""
    k = x.shape[1]
    codes = in_order(codes) if codes.dtype == jnp.int4 else codes
    each = jnp.repeat(scales[:, : 1 if group_size is None else k // group_size].astype(jnp.float32), group_size or k, axis=1)
    y = jnp.dot(x.astype(jnp.float32), (codes.astype(jnp.float32) * each).T)
    y = y if norm is None else y * inverse_norms(x, norm)
    return activated(y if bias is None else y + bias.astype(jnp.float32), activation).astype(x.dtype)


def inverse_norms(x: jax.Array, norm: float) -> jax.Array:
    """r (M, 1) float32 of rows (M, K): 1 / sqrt(mean_k x_mk^2 + norm)."""
    wide = x.astype(jnp.float32)
    return jax.lax.rsqrt(jnp.mean(wide * wide, axis=1, keepdims=True) + norm)


# A program of its own: layers with the same shapes are traced and lowered once, which else takes Mosaic seconds for each of them.
@functools.partial(jax.jit, static_argnames=("group_size", "activation", "norm", "tiles", "cores", "interpret"))
def _run(
    x: jax.Array, bias: jax.Array | None, codes: jax.Array, scales: jax.Array, *, group_size, activation, norm, tiles, cores, interpret
) -> jax.Array:
    m, k = x.shape
    bits, n = 4 if codes.dtype == jnp.int4 else 8, codes.shape[0]
    if m == 0:
        return jnp.zeros((0, n), x.dtype)
    if tiles is None and interpret is None:
        tiles = weight_only_tiles(m, n, k, bits, cores, group_size, norm is not None)
    elif tiles is None:  # an interpreter knows no single warps
        tiles = pipelined_tiles(m, n, k, bits, cores, group_size)
    if isinstance(tiles, Direct):
        if interpret is not None:
            raise ValueError(f"`tiles` {tiles} run on a GPU only, `interpret` is {interpret!r}: take Tiles(...), or leave `tiles` out")
        return _direct(x, bias, codes, scales, group=group_size, activation=activation, norm=norm, tiles=tiles, cores=cores)
    end = {"bias": None, "activation": None} if norm is not None else {"bias": bias, "activation": activation}
    y = _pipelined(x, codes, scales, bits=bits, group_size=group_size, tiles=tiles, cores=cores, interpret=interpret, **end)
    return y if norm is None else added_up((y * inverse_norms(x, norm))[None], bias, activation, x.dtype)


def _direct(x, bias, codes, scales, *, group, activation, norm, tiles, cores) -> jax.Array:
    from .direct_kernel import direct

    how: dict[str, Any] = {"group": group or x.shape[1], "tiles": tiles, "cores": cores}
    scales = scales if group is None else whole_rows(scales)
    if activation is None:
        return direct(x, codes, scales, bias=bias, norm=norm, **how)
    return added_up(direct(x, codes, scales, norm=norm, whole=False, **how)[None], bias, activation, x.dtype)


def _pipelined(x, codes, scales, *, bits, group_size, tiles, cores, interpret, bias, activation) -> jax.Array:
    from .digits_kernel import digit_products
    from .weight_only_kernel import weight_only

    m = x.shape[0]
    if tiles.digits:
        if bits != 4 or group_size is None:
            given = f"codes of {bits} bits and `group_size` {group_size}"
            raise ValueError(f"`tiles.digits` is True with {given}; it is for 4 bits in groups: leave it False")
        check_codes(codes, interpreted=False)  # whole sixty-fours are written, with an interpreter as well
    size = scales.dtype.itemsize
    scales = scales if group_size is None else whole_rows(scales)
    if group_size is not None and not at_once(tiles, group_size, size):
        most = group_size * tiles.scale_rows[-1] // size
        raise ValueError(
            f"`tiles.block_k` is {tiles.block_k}; it must divide {most}, the k whose scales ({scales.dtype}) are copied at once"
        )
    check_launch(tiles, stays(tiles, group_size), tiles.shared_bytes(bits, size))
    how: dict[str, Any] = {"group": group_size, "bias": bias, "activation": activation, "tiles": tiles, "cores": cores}
    if tiles.digits:
        return digit_products(x, codes, scales, **how, interpret=interpret)
    x = jnp.pad(x, ((0, padded_rows(m) - m), (0, 0)))  # the copy engine writes few rows of y, or whole eights
    y = weight_only(x, codes, scales, bits=bits, **how, interpret=interpret)
    y = added_up(y, bias, activation, x.dtype) if tiles.added_after else y
    return y[:m]
