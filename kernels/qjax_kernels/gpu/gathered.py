"""Sums of the same tile of which warpgroups of a block, and blocks of a cluster, have a part of K each, gathered in shared memory."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from .mosaic import Layout
from .parts import THREADS, array_of, thread, words_of
from .schedule import Piece
from .tiles import Tiles
from .warps import Int, Warps, shared_address


def gathering(tiles: Tiles, shape: tuple[int, int], groups: int, interpreted: bool) -> tuple[tuple[jax.ShapeDtypeStruct, ...], list]:
    """What `Gathered` takes: (what a launch gives besides its result, what its blocks have besides in shared memory).

    Args:
      tiles: the cut, of more than one sum.
      shape: of the sum of a warpgroup (R, C), float32.
      groups: of blocks: clusters, or single ones.
      interpreted: an interpreter has no shared memory of neighbours; sums lie in device memory, and a barrier says that they are there.
    """
    sums = (tiles.beside, tiles.sums, *reversed(shape))
    if not interpreted:
        return (), [plgpu.SMEM(sums, jnp.float32)]
    if tiles.split_k == 1:
        met = plgpu.Barrier(num_arrivals=tiles.warpgroups)
    else:
        met = plgpu.ClusterBarrier(collective_axes=("cluster",), num_arrivals=tiles.warpgroups)
    return (jax.ShapeDtypeStruct((groups, *sums), jnp.float32),), [met]


@dataclasses.dataclass(frozen=True, eq=False)
class Gathered:
    """Who has which part of a sum, and who ends it: the first warpgroup with its rows of one block, another block for other rows.

    Attributes:
      tiles: the cut, of more than one sum.
      warpgroup: that computes.
      place: shared memory (beside, sums, C, R) float32; interpreted, the barrier of `gathering`.
      memory: interpreted, device memory (groups, beside, sums, C, R).
    """

    tiles: Tiles
    warpgroup: Any
    place: Any
    memory: Any

    @property
    def rows(self) -> Any:
        """The number of the rows of w that the sum is of, among those of the block."""
        return lax.rem(self.warpgroup, self.tiles.beside)

    @property
    def block(self) -> Any:
        """The number of the block in its cluster."""
        return 0 if self.tiles.split_k == 1 else lax.axis_index("cluster")

    @property
    def number(self) -> Any:
        """Of this sum among those of the same tile and rows."""
        return self.block * self.tiles.sharing + lax.div(self.warpgroup, self.tiles.beside)

    @property
    def last(self) -> Any:
        """The number of the sum to which the others are added."""
        return lax.rem(self.rows, self.tiles.split_k) * self.tiles.sharing

    def piece(self, whole: Piece) -> Piece:
        """The stages of a tile that this block computes."""
        parts, stages = self.tiles.split_k, whole.last
        return dataclasses.replace(whole, first=self.block * stages // parts, last=(self.block + 1) * stages // parts)

    def end(self, piece: Piece, group: Any, total: jax.Array, finish: Callable) -> None:
        """Hands a sum over or, where it is this warpgroup's to end, takes those of others.

        Args:
          piece: whose sum it is.
          group: of this block.
          total: the sum (R, C) float32.
          finish: as `digits_ring` takes it.
        """

        @pl.when(self.number != self.last)
        def _():
            self._send(group, total)

        self.meet()

        @pl.when(self.number == self.last)
        def _():
            added, (rows, columns) = total, total.shape
            for i in range(1, self.tiles.sums):
                added = added + self._taken(lax.rem(self.last + i, self.tiles.sums), group, (rows, columns))
            finish(piece, lambda start, size: added[:, start : start + size])

    def meet(self) -> None:
        """Waits for all threads of the cluster, and for what they sent; those that copy come here once, too (but not interpreted)."""
        if self.memory is not None:
            plgpu.barrier_arrive(self.place)
            plgpu.barrier_wait(self.place)
            return

        @plgpu.inline_mgpu()
        def met(_):
            Warps().meet_cluster()

        met()  # pyright: ignore[reportCallIssue]

    def _send(self, group: Any, total: jax.Array) -> None:
        """Each thread writes its numbers where the same thread of the warpgroup that ends them reads them."""
        if self.memory is not None:
            self.memory.at[group, self.rows, self.number][...] = total.T
            return
        tiles = self.tiles

        @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), Layout.WGMMA))
        def send(_, place, sums):
            w = Warps()
            words, at = words_of(w, sums), sent_to(w, tiles, shared_address(place))
            for i in range(0, len(words), 4):
                w.store_neighbour(at + i * 4 * THREADS, *words[i : i + 4])

        own = self.place.at[self.rows, self.number]
        send(own, plgpu.layout_cast(total, Layout.WGMMA))  # pyright: ignore[reportCallIssue]

    def _taken(self, number: Any, group: Any, shape: tuple[int, int]) -> jax.Array:
        """The sum of another warpgroup."""
        if self.memory is not None:
            return self.memory[group, self.rows, number].T

        @plgpu.inline_mgpu(arg_types=(plgpu.RefType(),), return_type=plgpu.ShapeDtypeStruct(shape, jnp.float32, layout=Layout.WGMMA))
        def take(_, place):
            w = Warps()
            at = shared_address(place) + thread() * 16
            return array_of(w, lambda i: w.load_shared(at + i * 4 * THREADS, 4), shape, jnp.float32)

        return take(self.place.at[self.rows, number])  # pyright: ignore[reportCallIssue]


def sent_to(w: Warps, tiles: Tiles, place: Int) -> Int:
    """Where the numbers of a thread go: to the place of its sum in the block that ends those rows (`Gathered.last`).

    Args:
      w: the instructions.
      tiles: the cut.
      place: where the sum of its warpgroup would begin in the shared memory of its own block.
    """
    rows = w.thread // THREADS % tiles.beside
    return w.of_neighbour(place + w.thread % THREADS * 16, rows % tiles.split_k)
