"""AWQ: scales up the input channels that matter before rounding the weights, and clips what clipping helps."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Collection
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from qjax.calibration import Observer, Sample, sample_rows
from qjax.core import (
    ActSpec,
    BlockSpec,
    CastSpec,
    LearnedSpec,
    PerBlock,
    PerTensor,
    QTensor,
    Spec,
    block_decode,
    block_encode,
    group_length,
    has_global_scale,
    logical_blocks,
)
from qjax.core.specs import check_count, check_flag
from qjax.ptq.candidates import Member, Unfoldable, activation_of, checked_rows, checked_then, checked_unfoldable, means
from qjax.ptq.data import unseen_note
from qjax.ptq.method import Method, Outcome, Problem
from qjax.ptq.parts import check_not_cast, for_each_matrix, matrices, packed
from qjax.ptq.range_search import candidates
from qjax.ptq.rtn import rtn
from qjax.ptq.work import Work, matrix_sizes, work_of

CLIPS = tuple(round(1 - 0.05 * i, 2) for i in range(10))  # 1.00 down to .55


@dataclasses.dataclass(frozen=True)
class AWQ:
    """See `awq`."""

    grid: int
    clip: bool
    then: Method | None
    rows: int
    unfoldable: Unfoldable = "leave"

    @property
    def name(self) -> str:
        inside = ([] if self.clip or self.then is not None else ["clip=False"]) + ([self.then.name] if self.then is not None else [])
        inside += [] if self.unfoldable == "leave" else [f"unfoldable={self.unfoldable}"]
        return f"awq({', '.join(inside)})" if inside else "awq"

    @property
    def observer(self) -> Observer[Any] | None:
        if self.then is not None:
            return self.then.observer
        return sample_rows(self.rows) if self.clip else None

    def activation(self, given: ActSpec | None, ops: Collection[str] = ()) -> tuple[ActSpec | None, str]:
        return activation_of(self.then, given, ops)

    def shapes(self, problem: Problem) -> QTensor:
        check_not_cast(problem, self.name)
        return (self.then or rtn()).shapes(problem)

    def quantize(self, problem: Problem, state: Any) -> Outcome:
        check_not_cast(problem, self.name)
        if self.then is not None:
            return self.then.quantize(problem, state)
        if not self.clip:
            return rtn().quantize(problem, None)
        if state is None or not bool(jnp.any(state.held)):
            return Outcome(rtn().quantize(problem, None).q, ("no calibration data reached it: rounded",))
        return _clipped(problem, state)

    @property
    def tries(self) -> int:
        return self.grid + 1

    def work(self, problem: Problem) -> Work:
        if self.then is not None:
            return work_of(self.then, problem)
        stack, n, k = matrix_sizes(problem)
        if not self.clip or isinstance(problem.spec, CastSpec):
            return Work(steps=stack * n * k)
        group = group_length(k, problem.spec)
        return Work(2.0 * k * group * (self.rows + len(CLIPS) * n), len(CLIPS) * n * k).times(stack)

    def candidates(self, members: tuple[Member, ...], size: int, specs: tuple[Spec, ...]) -> jax.Array:
        x = means([member.stats.mean_abs for member in members], members, size)
        w = means([_magnitude(member.w, spec) for member, spec in zip(members, specs, strict=True)], members, size)
        dead = x == 0
        ratios = jnp.arange(self.grid, dtype=jnp.float32)[:, None] / self.grid
        log_s = ratios * jnp.log(jnp.where(dead, 1.0, x))[None] - jnp.log(w[None] ** (1 - ratios) + 1e-4)
        low = jnp.min(jnp.where(dead[None], jnp.inf, log_s), axis=1, keepdims=True)
        high = jnp.max(jnp.where(dead[None], -jnp.inf, log_s), axis=1, keepdims=True)
        s = jnp.exp(jnp.where(dead[None], 0.0, log_s - (low + high) / 2))
        return jnp.concatenate([jnp.ones((1, size), jnp.float32), s])


def awq(grid: int = 20, clip: bool = True, then: Method | None = None, rows: int = 512, unfoldable: Unfoldable = "leave") -> AWQ:
    """Activation-aware weight quantization: tries scales for each input channel on the error of the outputs, then clips.

    s_j = mean|x_j|^r / (mean|w_j / groupmax|^(1 - r) + 1e-4),  divided by sqrt(min s max s),  r = 0, 1/grid, ...
    for every group of weights that share an input: the r with the least |x / s round(s w) - x w|^2 over all of them, no scaling
    at all among the candidates. What makes x takes 1 / s (`qjax.graph.find_fold`). Then every group of weights gets the range,
    of 1.00, .95 ... .55 times its largest value, that has the least error of the outputs.

    Args:
      grid: how many ratios are tried.
      clip: search the ranges; else they are those of the extreme values.
      then: how the rescaled weights are rounded, such as `qjax.gptq()`, and with `qjax.llm_int8()` their activations, too (the
        threshold is one of what was rescaled); None: to nearest, within the clipped ranges.
      rows: rows of activations that candidates are tried on. Static activations are rounded there within the extreme values of
        those rows, whatever the rule's observer finds over all the data afterwards.
      unfoldable: what becomes of an input when nothing that makes it can take 1 / s in exchange. "leave": the weight is rounded as it
        is. "scale": each such weight keeps scales of its own (float32, one a column), and its product divides the input at run
        time. The report says which, and why.

    Returns:
      A method for `qjax.Rule`. Needs calibration data.

    Raises:
      ValueError: `grid` or `rows` less than 1; another `unfoldable`; a `then` that rescales, too.
      TypeError: `then` is no method; `clip` neither True nor False.

    Example:
      >>> import qjax
      >>> qjax.Rule("*", weight=qjax.int4(group_size=128), method=awq()).method.name
      'awq'

    Source: Lin et al. 2023, arXiv 2306.00978, and the authors' code. There the output compared is that of a block of layers listed for
    each architecture, and query and key projections are not clipped; here it is the outputs of the weights that share the
    input, whatever they are, and a group is clipped only where that lowers the error of its own part of the output.
    """
    if isinstance(grid, Method):
        raise TypeError(f"`grid` is the number of ratios that are tried, got the method {grid.name}: write awq(then=...)")
    check_count("grid", grid, 1)
    check_flag("clip", clip)
    return AWQ(grid, clip, None if then is None else checked_then(then), checked_rows(rows), checked_unfoldable(unfoldable))


def _magnitude(w: jax.Array, spec: Spec) -> jax.Array:
    """mean over rows of |w| / max|w| of its group: w (stack, N, K), result (stack, K)."""
    if isinstance(spec, CastSpec):
        return jnp.mean(jnp.abs(w) / _positive(jnp.max(jnp.abs(w), axis=-1, keepdims=True)), axis=1)
    blocked, _, to_logical = logical_blocks(jnp.abs(w), spec, (-1,), (-3,))
    return jnp.mean(to_logical(blocked / _positive(jnp.max(blocked, axis=-1, keepdims=True))), axis=1)


def _positive(x: jax.Array) -> jax.Array:
    return jnp.where(x == 0, 1.0, x)


def _clipped(problem: Problem, state: Sample) -> Outcome:
    """Rounds within the range of each group that has the least error of the outputs."""
    spec = problem.spec
    if not isinstance(spec, BlockSpec) or isinstance(spec.granularity, (PerTensor, PerBlock)):
        why = "its table is learned" if isinstance(spec, LearnedSpec) else "rows of it share a scale"
        return Outcome(rtn().quantize(problem, None).q, (f"its ranges are not searched: {why}",))
    if has_global_scale(spec) and problem.groups > 1:
        return Outcome(rtn().quantize(problem, None).q, ("its ranges are not searched: its groups share the scale of the tensor",))
    if not bool(jnp.isfinite(state.x).all()):
        raise ValueError(f"the sample of `{problem.name}`'s activations holds NaN or infinity: look at the calibration data")
    # A part without data has no error to lower: the first candidate wins, which is rounding.
    note = unseen_note(np.asarray(state.x != 0).any((1, 2)), "rounded")
    return Outcome(packed(problem, *_clip_all(matrices(problem), for_each_matrix(problem, state.x), spec)), (note,) if note else ())


@functools.partial(jax.jit, static_argnames="spec")
def _clip_all(w: jax.Array, x: jax.Array, spec: BlockSpec) -> tuple[jax.Array, jax.Array, jax.Array | None]:
    """`_clip` of every matrix of a stack, one at a time."""
    return lax.map(lambda part: _clip(part[0], part[1], spec), (w, x))


def _clip(w: jax.Array, x: jax.Array, spec: BlockSpec) -> tuple[jax.Array, jax.Array, jax.Array | None]:
    """Codes (N, Kpad), scale and zero point (N, G) of a matrix (N, K) for rows (rows, K)."""
    blocked, to_canonical, _ = logical_blocks(w, spec, (-1,), ())
    groups, length = blocked.shape[-2:]
    x = jnp.pad(x, ((0, 0), (0, groups * length - x.shape[1]))).reshape(-1, groups, length)
    moment = jnp.einsum("mgk,mgj->gkj", x, x, precision=lax.Precision.HIGHEST)
    count, grid = candidates(blocked, spec, np.asarray(CLIPS, np.float32))

    def error(i: jax.Array) -> jax.Array:
        off = block_decode(block_encode(blocked, *grid(i), spec), *grid(i), spec) - blocked
        weighed = jnp.einsum("ngk,gkj->ngj", off, moment, precision=lax.Precision.HIGHEST)
        return jnp.sum(weighed * off, axis=-1, keepdims=True)

    scale, zero_point = grid(jnp.argmin(lax.map(error, jnp.arange(count)), axis=0))
    codes = to_canonical(block_encode(blocked, scale, zero_point, spec))
    return codes, scale[..., 0], None if zero_point is None else zero_point[..., 0]
