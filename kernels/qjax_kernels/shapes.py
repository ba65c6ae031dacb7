"""The shapes of arguments that tests, tuning and benchmarks share."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Case:
    """A product (M, K) x (K, N) with groups of `group` (None: a scale a column)."""

    m: int
    n: int
    k: int
    group: int | None


TESTS = (
    Case(1, 128, 256, 128),  # one row
    Case(5, 200, 256, 128),  # odd M, tail in N
    Case(16, 128, 300, 128),  # tail in K, the last group short
    Case(33, 256, 256, 64),  # odd M of several tiles, groups below a lane
    Case(8, 128, 128, 128),  # one group
    Case(8, 128, 384, None),  # a scale a column
    Case(16, 384, 512, 256),  # a group longer than a tile of k, if the limit is 128
)
"""Small: what goes wrong at edges."""

MODEL = (
    Case(16, 4096, 4096, 128),  # decode: attention of a 7B model
    Case(16, 14336, 4096, 128),  # its wide layer, up
    Case(16, 4096, 14336, 128),  # and down
    Case(1024, 4096, 4096, 128),  # prefill
    Case(1024, 14336, 4096, 128),
    Case(1024, 4096, 14336, 128),
)
"""A layer of a 7B-shaped model: tuning and benchmarks."""

HOPPER = ((4096, 4096), (8192, 8192), (8192, 28672))
"""Weights (K, N) that were measured on an H200, see experiments/kernels; the first and last are compiled ahead of time."""

STATIC = ((128, 512, 512), (256, 1024, 1024), (16, 1024, 1024))
"""Tiles (m, n, k) whose instructions a grid step are counted, see experiments/kernels."""
