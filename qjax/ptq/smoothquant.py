"""SmoothQuant: moves the range of activation channels into the weights that read them, where rounding costs less."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection
from typing import Any

import jax
import jax.numpy as jnp

from qjax.calibration import Observer
from qjax.core import ActSpec, QTensor, Spec
from qjax.core.specs import is_number
from qjax.ptq.candidates import Member, Unfoldable, activation_of, checked_rows, checked_then, checked_unfoldable, peaks
from qjax.ptq.method import Method, Outcome, Problem
from qjax.ptq.rtn import rtn
from qjax.ptq.work import Work, work_of

SEARCHED = tuple(round(0.3 + 0.05 * i, 2) for i in range(13))  # .30 to .90


@dataclasses.dataclass(frozen=True)
class SmoothQuant:
    """See `smoothquant`."""

    alphas: tuple[float, ...]
    then: Method
    rows: int
    unfoldable: Unfoldable = "leave"

    @property
    def name(self) -> str:
        how = "" if self.alphas == (0.5,) else f"alpha={self.alphas[0]:g}" if len(self.alphas) == 1 else "searched"
        after = [] if self.then == rtn() else [self.then.name]
        after += [] if self.unfoldable == "leave" else [f"unfoldable={self.unfoldable}"]
        inside = ", ".join([*filter(None, [how]), *after])
        return f"smoothquant({inside})" if inside else "smoothquant"

    @property
    def observer(self) -> Observer[Any] | None:
        return self.then.observer

    def activation(self, given: ActSpec | None, ops: Collection[str] = ()) -> tuple[ActSpec | None, str]:
        return activation_of(self.then, given, ops)

    def shapes(self, problem: Problem) -> QTensor:
        return self.then.shapes(problem)

    def quantize(self, problem: Problem, state: Any) -> Outcome:
        return self.then.quantize(problem, state)

    @property
    def tries(self) -> int:
        return len(self.alphas)

    def work(self, problem: Problem) -> Work:
        return work_of(self.then, problem)

    def candidates(self, members: tuple[Member, ...], size: int, specs: tuple[Spec, ...]) -> jax.Array:
        del specs
        x = peaks([member.stats.absmax for member in members], members, size)
        w = peaks([jnp.max(jnp.abs(member.w), axis=1) for member in members], members, size)
        dead = (x == 0) | (w == 0)
        log_x, log_w = (jnp.log(jnp.where(dead, 1.0, jnp.maximum(v, 1e-5))) for v in (x, w))
        alphas = jnp.asarray(self.alphas, jnp.float32)[:, None]
        return jnp.exp(alphas * log_x[None] - (1 - alphas) * log_w[None])


def smoothquant(
    alpha: float | str | tuple[float, ...] = 0.5, then: Method | None = None, rows: int = 512, unfoldable: Unfoldable = "leave"
) -> SmoothQuant:
    """Rescales each input channel so that activations and weights share the difficulty, then rounds.

    s_j = max|x_j|^alpha / max|w_j|^(1 - alpha),  x_j -> x_j / s_j,  w_j -> w_j s_j
    over the channels j of an input that one or several weights read; what makes the input takes 1 / s (`qjax.graph.find_fold`),
    and the function stays the same. Give the rule an `activation`: without one there is nothing to gain.

    Args:
      alpha: 0 leaves the whole range with the activations, 1 moves it into the weights. "search", or a tuple of values, takes for
        each group of weights that share an input the one with the least error of their outputs (.30, .35 ... .90).
      then: how the rescaled weights are rounded, and with `qjax.llm_int8()` their activations, too (the threshold is one of what was
        rescaled); None: to nearest.
      rows: rows of activations that a search tries its candidates on. Static activations are rounded there within the extreme
        values of those rows, whatever the rule's observer finds over all the data afterwards.
      unfoldable: what becomes of an input when nothing that makes it can take 1 / s in exchange. "leave": the weight is rounded as it
        is. "scale": each such weight keeps scales of its own (float32, one a column), and its product divides the input at run
        time. The report says which, and why.

    Returns:
      A method for `qjax.Rule`. Needs calibration data.

    Raises:
      ValueError: an alpha outside of 0 to 1; `rows` less than 1; another `unfoldable`; a `then` that rescales, too.
      TypeError: `then` is no method.

    Example:
      >>> import qjax
      >>> qjax.Rule("*", weight=qjax.int8(), activation=qjax.static(qjax.int8()), method=smoothquant(alpha=0.6)).method.name
      'smoothquant(alpha=0.6)'

    Source: Xiao et al. 2022, arXiv 2211.10438, equation 4 and section 4 (the search is per model there). A channel that no data or
    no weight uses keeps its scale. Where the authors' pairs of layers end, at an input that no norm makes, `unfoldable` goes on.
    """
    given = SEARCHED if isinstance(alpha, str) and alpha == "search" else alpha if isinstance(alpha, (tuple, list)) else (alpha,)
    if not given or not all(is_number(a) and 0 <= a <= 1 for a in given):
        raise ValueError(f"`alpha` must be a number from 0 to 1, a tuple of them or 'search', got {alpha!r}")
    alphas = tuple(float(a) for a in given)
    return SmoothQuant(alphas, checked_then(then), checked_rows(rows), checked_unfoldable(unfoldable))
