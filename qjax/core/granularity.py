"""How many values share one scale. Plain frozen values: hashable, comparable, usable as static arguments of `jit`.

Every granularity is stated on the canonical layout `(kept..., contracted)`: the axes that the operation keeps first,
then the contracted axes flattened into one. The site knows which is which, so "channel" and "group" never depend on
how a weight happens to be stored.
"""

import dataclasses


def _check_size(argument: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"`{argument}` must be an int, got {value!r}")
    if value < 1:
        raise ValueError(f"`{argument}` must be at least 1, got {value}")


@dataclasses.dataclass(frozen=True)
class PerTensor:
    """One scale for the whole array (for each entry of a stacked axis: layers of a scan, experts)."""


@dataclasses.dataclass(frozen=True)
class PerChannel:
    """One scale for every index of the kept axes, shared along the contracted axes."""


@dataclasses.dataclass(frozen=True)
class PerToken:
    """One scale for every row of an activation. The same shape as `PerChannel`; the name says that rows are tokens."""


@dataclasses.dataclass(frozen=True)
class PerGroup:
    """One scale for every `size` consecutive values along the flattened contracted axes.

    >>> PerGroup(0)
    Traceback (most recent call last):
    ValueError: `group_size` must be at least 1, got 0
    """

    size: int

    def __post_init__(self):
        _check_size("group_size", self.size)


@dataclasses.dataclass(frozen=True)
class PerBlock:
    """One scale for every tile: `kept` indices of the last kept axis by `contracted` values of the contracted axes."""

    kept: int
    contracted: int

    def __post_init__(self):
        _check_size("block[0]", self.kept)
        _check_size("block[1]", self.contracted)


Granularity = PerTensor | PerChannel | PerToken | PerGroup | PerBlock
