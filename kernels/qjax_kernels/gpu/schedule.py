"""Who computes what, where thread blocks stay on their multiprocessors: whole tiles of y one after another, and shares of the rest.

As many tiles as fill all multiprocessors are taken whole. The stages of the others are lined up, tile behind tile, and cut into stretches
of the same length, one for each group of blocks: a group may end one tile, compute some whole, and begin another. Whoever ends a tile adds
what those before him have of it.

Source: Stream-K (Osama et al., 2023, arXiv:2301.03598), "two tiles and data-parallel". There whoever begins a tile ends it; here groups go
through their stretch from behind, so that nobody waits for one that may start later, and what is waited for was done first.
"""

import dataclasses
import math
from typing import Any

import jax.numpy as jnp

HANDED_OVER = 6  # stages that pass while all groups write a sum and read another


@dataclasses.dataclass(frozen=True)
class Piece:
    """Stages of one tile that one thread block computes; numbers of a traced kernel, or whole numbers.

    Attributes:
      m: number of the block of rows of x.
      n: number of the block of rows of w.
      first: stage.
      last: the stage behind the last.
      begun: groups from this one on have computed earlier stages.
      part: of K, where a second program adds parts up; else 0.
    """

    m: Any
    n: Any
    first: Any
    last: Any
    begun: Any = 0
    part: Any = 0


@dataclasses.dataclass(frozen=True)
class Schedule:
    """The pieces of every group of blocks.

    Attributes:
      across: blocks of rows of x.
      down: groups of blocks of rows of w.
      stages: that a tile takes.
      slots: stages that a share is a multiple of, but for the end of a tile.
      groups: of blocks that live together, at most one for each `slots` stages; or one for each tile, however many live together.
    """

    across: int
    down: int
    stages: int
    slots: int
    groups: int

    @staticmethod
    def of(across: int, down: int, stages: int, slots: int, groups: int) -> "Schedule":
        """With no more groups than have work; few tiles are cut into equal parts, if that leaves next to none of the groups idle."""
        tiles, groups = across * down, max(1, groups)  # one, if a single one does not fit
        every = Schedule(across, down, stages, slots, min(groups, tiles * -(-stages // slots)))
        if not every.shared:
            return dataclasses.replace(every, groups=min(groups, tiles))
        equal = every.groups // tiles * tiles
        return dataclasses.replace(every, groups=equal) if equal >= 0.9 * every.groups and equal > tiles else every

    @property
    def longest(self) -> float:
        """Stages that pass until the last group is done, about."""
        return self.waves * self.stages + (HANDED_OVER if self.shared else 0)

    @property
    def waves(self) -> float:
        """Tiles that the busiest group computes."""
        each = self.across * self.down / self.groups
        return each if self.shared else math.ceil(each)

    @property
    def turns(self) -> int:
        """`slots` stages each, the last of a tile perhaps fewer."""
        return -(-self.stages // self.slots)

    @property
    def shared(self) -> int:
        """Tiles that are cut, where that saves more than it takes: one or two a group, so that none is cut into many."""
        tiles, rest = self.across * self.down, self.across * self.down % self.groups
        saved = self.stages - self.stages * rest / self.groups
        if not rest or saved <= HANDED_OVER:
            return 0
        return tiles if tiles < 2 * self.groups else rest + self.groups

    def begins(self, group: Any) -> Any:
        """The turn at which a group's share begins, of those of all shared tiles."""
        return group * (self.shared * self.turns) // self.groups

    def count(self, group: Any) -> Any:
        """Pieces of a group."""
        if not self.shared:
            return (self.across * self.down + self.groups - 1 - group) // self.groups
        whole = (self.across * self.down - self.shared) // self.groups
        return whole + self._last(group) - self.begins(group) // self.turns + 1

    def piece(self, group: Any, number: Any) -> Piece:
        """A piece of a group: first those of the rest, from the last one back, then whole tiles."""
        if not self.shared:
            return self._whole(number * self.groups + group)
        last = self._last(group)
        cut = last - self.begins(group) // self.turns + 1
        tile = last - number
        first = jnp.maximum(self.begins(group) - tile * self.turns, 0)
        behind = jnp.minimum(self.begins(group + 1) - tile * self.turns, self.turns)
        whole = number >= cut
        tile = jnp.where(whole, self.shared + (number - cut) * self.groups + group, tile)
        first, behind = jnp.where(whole, 0, first), jnp.where(whole, self.turns, behind)
        # The group in whose share the tile begins: the last that does not begin behind it.
        begun = ((tile * self.turns + 1) * self.groups - 1) // (self.shared * self.turns)
        return dataclasses.replace(
            self._whole(tile),
            first=first * self.slots,
            last=jnp.minimum(behind * self.slots, self.stages),
            begun=jnp.where(first == 0, group, begun),
        )

    def _last(self, group: Any) -> Any:
        """The tile in which a share ends."""
        return (self.begins(group + 1) - 1) // self.turns

    def _whole(self, tile: Any) -> Piece:
        # Neighbours compute the same rows of w, whose codes come from memory once.
        return Piece(tile % self.across, tile // self.across, 0, self.stages)
