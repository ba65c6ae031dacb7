"""Rounding to nearest, with ranges from the extreme values or by search."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax

from qjax.core import CastSpec, LearnedSpec, QTensor, Spec, block_params, check_overflow, check_shape, quantize_moved, quantized_shapes
from qjax.core.rounding import Ranges
from qjax.core.specs import check_flag
from qjax.ptq.method import Outcome, Problem
from qjax.ptq.range_search import SHRINK, search_range
from qjax.ptq.work import Work


@dataclasses.dataclass(frozen=True)
class RoundToNearest:
    """See `rtn`."""

    mse: bool = False
    observer: None = dataclasses.field(default=None, init=False, repr=False)

    @property
    def name(self) -> str:
        return "rtn(mse)" if self.mse else "rtn"

    def shapes(self, problem: Problem) -> QTensor:
        w, spec, axes, stacked = jax.ShapeDtypeStruct(problem.w.shape, problem.w.dtype), problem.spec, problem.axes, problem.stacked
        return quantized_shapes(w, spec, axes, stacked, name=problem.name, ranges=self.ranges)

    @property
    def ranges(self) -> Ranges:
        return search_range if self.mse else block_params

    def quantize(self, problem: Problem, state: Any = None) -> Outcome:
        del state
        axes, stacked = check_shape(problem.w, problem.spec, problem.axes, problem.stacked, problem.name)
        q = quantize_moved(problem.w, problem.spec, axes, stacked, self.ranges)  # its numbers were looked at with all others
        check_overflow(q, problem.name)
        return Outcome(q, _not_searched(problem.spec) if self.mse else ())

    def work(self, problem: Problem) -> Work:
        return Work(steps=math.prod(problem.w.shape) * (len(SHRINK) if self.mse else 1))


def rtn(mse: bool = False) -> RoundToNearest:
    """Rounds every weight to the nearest code: `clip(round(w / scale) + zero_point, q_min, q_max)`, half to even.

    Args:
      mse: shrink the range of each block to the one with the least error |w - w_hat|^2.4 (see `search_range`) in place of
        taking it from the extreme values. A cast and a learned table have none to search, and the report says so.

    Returns:
      A method for `qjax.Rule`. Needs no data.

    Raises:
      TypeError: `mse` is neither True nor False.

    Example:
      >>> import qjax
      >>> qjax.Rule("*", weight=qjax.int4(group_size=64), method=qjax.rtn(mse=True))
      Rule('*', weight=int4(group_size=64), method=RoundToNearest(mse=True))
    """
    check_flag("mse", mse)
    return RoundToNearest(mse)


def _not_searched(spec: Spec) -> tuple[str, ...]:
    """Says why a search of ranges does nothing for a spec."""
    if not isinstance(spec, (CastSpec, LearnedSpec)):
        return ()
    return (f"its ranges are not searched: {'its table is learned' if isinstance(spec, LearnedSpec) else 'a cast has none'}",)
