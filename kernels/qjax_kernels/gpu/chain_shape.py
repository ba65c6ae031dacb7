"""What the products of a chain multiply, and how they are cut."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import jax.numpy as jnp

from .direct_shape import TILE, Shape
from .tiles import PIECE, SHARED_BYTES, Direct, check_waiting


@dataclasses.dataclass(frozen=True)
class Link:
    """A product of a chain: y = f(r x w^T) + a. Values are numbered: those that come in first, then the results in their order.

    Attributes:
      x: which value is multiplied.
      added: which value a is added; None: nothing is.
      norm: r = 1 / sqrt(mean_k x_k^2 + norm) of every row; None: 1. Its gain belongs into the columns of w, before that is quantized.
      gated: w holds a gate and what it multiplies, eight rows of each in turn (`interleaved`): y = silu(gate) other, half as wide.
    """

    x: int
    added: int | None = None
    norm: float | None = None
    gated: bool = False

    def __post_init__(self) -> None:
        """Raises ValueError for what is no number of a value, or no norm."""
        for name, value in (("x", self.x), ("added", 0 if self.added is None else self.added)):
            if type(value) is not int or value < 0:
                raise ValueError(f"`{name}` is {value!r}; it must be the number of a value, a Python int from 0 on")
        if self.norm is not None and not (isinstance(self.norm, int | float) and self.norm >= 0):
            raise ValueError(f"`norm` is {self.norm!r}; it must be a number from 0 on, or None")
        if type(self.gated) is not bool:
            raise ValueError(f"`gated` is {self.gated!r}; it must be True or False")


def shared_bytes(shapes: Sequence[Shape]) -> int:
    """Bytes of shared memory that a block, or a part of one, takes: the products use the same ones in turn."""
    return max(s.bytes for s in shapes)


def shapes_of(
    inputs: Sequence[tuple[int, int]], weights: Sequence[tuple[int, int]], links: Sequence[Link], columns: Sequence[int], dtypes: Sequence,
    bits: Sequence[int], *, group: int, tiles: Direct, cores: int,
) -> list[Shape]:  # fmt: skip
    """The products of a chain, which fit together (`check`), and their tiles, checked.

    Args:
      inputs: M and K of the values that come in.
      weights: N and K.
      links: the products.
      columns: scales of a row of w, as stored.
      dtypes: of scales.
      bits: of a code.
      group: consecutive k that share a scale.
      tiles: the cut of all of them.
      cores: multiprocessors.

    Returns:
      A shape for every product, of as many blocks each.

    Raises:
      ValueError: tiles of a split, wide or early launch, too much shared memory.
    """
    if tiles.split_k > 1 or tiles.early or tiles.wide:
        raise ValueError(f"`tiles` are {tiles}: the products of a chain neither split K nor begin early, and none is wide")
    check_waiting(tiles)
    m = inputs[0][0]
    blocks = min(max(n for n, _ in weights) // TILE // tiles.blocks, cores) * tiles.blocks
    shapes = []
    for i, (link, (n, k)) in enumerate(zip(links, weights, strict=True)):
        s = Shape(m, n, k, group, columns[i], dtypes[i], tiles.warps, tiles.turn, blocks, bits=bits[i], norm=link.norm, gated=link.gated,
                  bias=None if link.added is None else jnp.dtype(jnp.bfloat16), by_row=True)  # fmt: skip
        shapes.append(s)
    if (used := tiles.blocks * shared_bytes(shapes)) > SHARED_BYTES:
        remedy = "take fewer rows" + (", or `tiles` of fewer blocks" if tiles.blocks > 1 else "")
        raise ValueError(f"the products need {used} bytes of shared memory for {m} rows and {tiles}, the GPU has {SHARED_BYTES}: {remedy}")
    return shapes


def check(i: int, link: Link, widths: list[int], n: int, k: int, group: int) -> None:
    """Raises ValueError where product i does not fit the values before it, whose widths are given."""
    if n % (4 * TILE) or k % PIECE or group % PIECE or k % group:
        raise ValueError(f"product {i} is of N = {n}, K = {k} and groups of {group}: N must be a multiple of 64, K of the group, it of 128")
    wanted = {"x": (link.x, k), "added": (link.added, n // 2 if link.gated else n)}
    for name, (value, width) in wanted.items():
        if value is None:
            continue
        if not 0 <= value < len(widths):
            raise ValueError(f"`{name}` of product {i} is value {value}; {len(widths)} come before it, inputs first, numbered from 0")
        if widths[value] != width:
            raise ValueError(f"`{name}` of product {i} is value {value}, {widths[value]} wide; the product takes {width}")
