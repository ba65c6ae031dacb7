"""Rounding to nearest, with ranges from the extreme values or by search."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax.numpy as jnp

from qjax.core import CastSpec, CodebookSpec, IntSpec, QTensor, assemble, block_encode, blocks, canonicalize, quantize
from qjax.ptq.method import Outcome, Problem
from qjax.ptq.range_search import search_range


@dataclasses.dataclass(frozen=True)
class RoundToNearest:
    """See `rtn`."""

    mse: bool = False
    observer: None = dataclasses.field(default=None, init=False, repr=False)

    @property
    def name(self) -> str:
        return "rtn(mse)" if self.mse else "rtn"

    def quantize(self, problem: Problem, state: Any = None) -> Outcome:
        del state
        spec = problem.spec
        if not self.mse or isinstance(spec, CastSpec):
            return Outcome(quantize(problem.w, spec, problem.axes, problem.stacked, name=problem.name))
        return Outcome(_round_searched(problem, spec))


def rtn(mse: bool = False) -> RoundToNearest:
    """Rounds every weight to the nearest code: `clip(round(w / scale) + zero_point, q_min, q_max)`, half to even.

    Args:
      mse: shrink the range of each block to the one with the least error |w - w_hat|^2.4 (see `search_range`) in place of
        taking it from the extreme values.

    Returns:
      A method for `qjax.Rule`. Needs no data.

    Example:
      >>> import qjax
      >>> qjax.Rule("*", weight=qjax.int4(group_size=64), method=qjax.rtn(mse=True))
      Rule('*', weight=int4(group_size=64), method=RoundToNearest(mse=True))
    """
    return RoundToNearest(mse)


def _round_searched(problem: Problem, spec: IntSpec | CodebookSpec) -> QTensor:
    w, ndim = problem.w, problem.w.ndim
    stacked = [a + ndim for a in problem.stacked]
    order = [i for i in range(ndim) if i - ndim not in problem.axes]
    blocked, unblock = blocks(canonicalize(w, problem.axes), spec, tuple(order.index(a) for a in stacked), problem.name)
    scale, zero_point = search_range(blocked, spec)
    codes = block_encode(blocked, scale, zero_point, spec)
    sizes = [w.shape[a] for a in problem.axes]
    zero_point = None if zero_point is None else jnp.squeeze(zero_point, -1)
    return assemble(
        unblock(codes), jnp.squeeze(scale, -1), zero_point, spec, problem.axes, sizes, w.dtype, name=problem.name
    )
