"""Whether the operands of a weight fit together: what a kernel would read beyond its end, leave out, or read as other bits is refused."""

from typing import Any

import jax
import jax.numpy as jnp

from .tiles import PIECE, ROWS, Direct, Tiles

_REAL = (jnp.bfloat16, jnp.float16, jnp.float32)


def check_interpreter(interpret: Any) -> None:
    """Raises TypeError where it is neither None nor an interpreter's parameters: a switch that interprets by defaults is none of ours."""
    if isinstance(interpret, bool | str | int):
        raise TypeError(f"`interpret` is {interpret!r}; it must be None, or the parameters of jax's interpreter of Mosaic GPU kernels")


def check_arrays(bias: Any = None, **operands: Any) -> None:
    """Raises TypeError where one of the operands has neither shape nor type, by the name that it is given by; there may be no bias."""
    for name, value in (operands | ({} if bias is None else {"bias": bias})).items():
        if not (hasattr(value, "shape") and hasattr(value, "dtype")):
            raise TypeError(f"`{name}` is {type(value).__name__} {str(value)[:40]}; it must be an array")


def check_codes(codes: jax.Array, interpreted: bool) -> None:
    """Whether tiles cover a weight.

    Args:
      codes: (N, K).
      interpreted: the kernel does not run on a GPU, which writes 64 columns of y at a time.

    Raises:
      ValueError: N or K is no multiple of what a tile takes.
    """
    rows = 8 if interpreted else ROWS
    if codes.shape[1] % PIECE or codes.shape[0] % rows or not codes.size:
        raise ValueError(f"`codes` are {codes.shape}; N must be a multiple of {rows} and K of {PIECE}, neither 0: pad the weight")


def check_cut(tiles: Tiles | Direct | None, kinds: tuple[type, ...], cores: int, foreign: tuple[str, ...] = ()) -> None:
    """Whether tiles are of a kind that a kernel has, and `cores` counts something.

    Args:
      tiles: the cut, or None.
      kinds: that the kernel has.
      cores: multiprocessors of the GPU.
      foreign: switches of `Tiles` that are of other kernels.

    Raises:
      TypeError: tiles of another type.
      ValueError: `cores` is no positive int, or a switch of another kernel is on.
    """
    if tiles is not None and not isinstance(tiles, kinds):
        raise TypeError(f"`tiles` are {tiles!r}; take {' or '.join(f'{kind.__name__}(...)' for kind in kinds)}, or None")
    if type(cores) is not int or cores < 1:
        raise ValueError(f"`cores` is {cores!r}; it must be an int, the number of multiprocessors of the GPU, 132 of an H100 or H200")
    if on := [name for name in foreign if getattr(tiles, name, False)]:
        raise ValueError(f"`tiles.{on[0]}` is True, which is for another kernel; leave it False")


def check_vectors(n: int, groups: int, scales: jax.Array, bias: jax.Array | None, wanted: str = "") -> None:
    """Whether a kernel can read scales and bias of a weight.

    Args:
      n: rows of w.
      groups: scales of a row.
      scales: (N, G).
      bias: (N,) or None.
      wanted: what a message says of the number of scales.

    Raises:
      ValueError: another shape, or no type of 16 or 32 bits.
    """
    if scales.shape != (n, groups) or scales.dtype not in _REAL:
        raise ValueError(f"`scales` are {scales.dtype} {scales.shape}; they must be bfloat16, float16 or float32 ({n}, {groups}){wanted}")
    if bias is not None and (bias.shape != (n,) or bias.dtype not in _REAL):
        raise ValueError(f"`bias` is {bias.dtype} {bias.shape}; it must be bfloat16, float16 or float32 ({n},)")
