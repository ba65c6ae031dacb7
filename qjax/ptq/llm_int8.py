"""LLM.int8(): columns of activations with outliers are multiplied in 16 bit, all others as integers."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Sequence
from typing import Any

import jax
import numpy as np

from qjax.calibration import OutlierColumns, OutlierCounts, outlier_columns, stack_size, why_no_rows
from qjax.core import ActSpec, Outliers, QTensor, dynamic, int8
from qjax.policy import Choice
from qjax.program import Key, Leaf, Program, Site
from qjax.ptq.method import Outcome, Problem
from qjax.ptq.passes import observe_batches
from qjax.ptq.progress import Monitor
from qjax.ptq.rtn import rtn
from qjax.ptq.work import forward, rows_seen
from qjax.runtime.overflow import counted

MARGIN, LEAST, MULTIPLE = 1.25, 8, 8  # of a calibrated capacity
Done = dict[int, tuple[QTensor, tuple[str, ...]]]


@dataclasses.dataclass(frozen=True)
class LLMInt8:
    """See `llm_int8`."""

    threshold: float = 6.0
    capacity: int | None = None
    observer: None = dataclasses.field(default=None, init=False, repr=False)

    @property
    def name(self) -> str:
        how = [] if self.threshold == 6.0 else [f"threshold={self.threshold:g}"]
        how += [] if self.capacity is None else [f"capacity={self.capacity}"]
        return f"llm_int8({', '.join(how)})" if how else "llm_int8"

    def activation(self, given: ActSpec | None, ops: Collection[str] = ()) -> tuple[ActSpec, str]:
        act = dynamic(int8()) if given is None else given
        if not act.per_token:
            raise ValueError(f"`activation` {act} does not go with llm_int8, which has a scale for every row: leave it out, or give "
                             "qjax.dynamic(qjax.int8())")  # fmt: skip
        if "conv_general_dilated" in ops:
            return act, "llm_int8 without outlier columns: the windows of a convolution have no columns to gather"
        return dataclasses.replace(act, outliers=Outliers(self.threshold, self.capacity)), ""

    def shapes(self, problem: Problem) -> QTensor:
        return rtn().shapes(problem)

    def quantize(self, problem: Problem, state: Any = None) -> Outcome:
        return rtn().quantize(problem, state)


def llm_int8(threshold: float = 6.0, capacity: int | None = None) -> LLMInt8:
    """Multiplies the columns of activations that hold outliers in 16 bit, and the rest as integers, a scale for every row.

    O = {k: any |x[:, k]| >= threshold},  y = s_x s_w sum_{k not in O} x_k w_k  +  s_w sum_{k in O} x_k w_k
    with codes x_k of int8 in the first sum, whose row scales s_x do not see the outliers, and x_k of 16 bit in the second. Both
    take the weight's int8 codes, which are all that is stored; both are added in float32.

    Shapes in a compiled program are fixed, so the second product always has `capacity` columns: of the columns in O those with the
    largest values, zeros in places that are left. Outliers beyond the capacity stay int8: the report says in how many calls of
    the calibration that happened, and `qjax.overflow` counts it on any batch. Columns are those of one call: of one
    execution of a product, over all the rows of its batch. Calls of more rows than the calibration's, which the report names,
    have more outlier columns.

    Args:
      threshold: from which on a value is an outlier, in the units of the activations.
      capacity: columns that the 16-bit product takes; None takes it from calibration data: a quarter more than the most outlier columns
        that a call of any of the parameter's products had, rounded up to a multiple of 8, at least 8.

    Returns:
      A method for `qjax.Rule` with a `weight` of integers, such as `qjax.int8()`. The rule's `activation` may be left out, which
      is `qjax.dynamic(qjax.int8())`; a static one, or one per tensor, is refused. Needs data unless `capacity` is given.

    Raises:
      TypeError: `threshold` is no number, `capacity` no whole one.
      ValueError: `threshold` is not positive, `capacity` less than 1.

    Example:
      >>> import jax, jax.numpy as jnp, qjax
      >>> fn = lambda p, x: x @ p["w"]
      >>> params, x = {"w": jnp.eye(16)}, jnp.ones((2, 16)).at[0, 3].set(20.3)
      >>> policy = qjax.Policy([qjax.Rule("*", weight=qjax.int8(scale_rule="full"), method=llm_int8())])
      >>> result = qjax.quantize(fn, params, policy, calibration=[x])
      >>> result.report.rows[0].kernel, result.report.rows[0].notes
      ('xla int8 + 16 bit outliers', ('at most 1 outlier column in 1 call of 2 rows: room for 8',))
      >>> jax.jit(qjax.quantized(fn))(result.params, x)[0, 2:5].round(2).tolist()
      [1.0, 20.25, 1.0]

    Source: Dettmers et al. 2022, arXiv 2208.07339, section 3.2, and the authors' bitsandbytes. Differences: the fixed capacity; 16 bit is
    bfloat16, which holds any outlier of float32, and float16 only for float16 activations (on CPU the 16-bit values are multiplied as
    float32: XLA has bfloat16 kernels there for some shapes only, and the times measured, 8 to 2,048 rows, were .6 to 1.4 times
    those of float32); there the weight's rows are decoded to float16 before they are
    multiplied, here its codes, exact in both, are multiplied and scaled afterwards (weights with groups are decoded); the scale
    rule is that of the specs, `scale_rule="full"` is theirs. Experts that share a list of rows choose their columns for each
    block of rows; convolutions get plain integers, and the report says so.
    """
    if isinstance(threshold, bool) or not isinstance(threshold, (int, float, np.number)):
        raise TypeError(f"`threshold` must be a number such as 6.0, got {threshold!r}")
    if capacity is not None and (isinstance(capacity, bool) or not isinstance(capacity, (int, np.integer))):
        raise TypeError(f"`capacity` must be a whole number of columns or None, got {capacity!r}")
    method = LLMInt8(threshold, capacity)
    method.activation(None)
    return method


def with_capacities(
    done: Done, choices: Sequence[Choice], flat: Sequence[Any], batches: Sequence[tuple[Program, Any]], monitor: Monitor
) -> Done:
    """Gives packed weights with outlier columns their capacities, and counts on the data what exceeds them.

    One pass over the data, in which every weight is already quantized and activations are float.

    Args:
      done: packed weights and their notes, by the parameter's index.
      choices: the policy's, one a parameter.
      flat: the parameters as they were.
      batches: (traced program, its inputs) for each calibration batch.
      monitor: is told of each batch.

    Returns:
      `done` with capacities.

    Raises:
      ValueError: shapes in place of data where a capacity is to be found; data that is not finite, naming the batch and the site.
    """
    wanted = {c.leaf.index: c.activation.outliers for c in choices if c.activation is not None and c.activation.outliers is not None}
    wanted = {index: limit for index, limit in wanted.items() if index in done}
    if not wanted:
        return done
    leaves, new = batches[0][0].leaves, dict(done)
    shapes = any(isinstance(x, jax.ShapeDtypeStruct) for _, inputs in batches for x in inputs)
    unknown = [leaves[index].path for index, limit in wanted.items() if limit.capacity is None]
    if shapes and unknown:
        raise ValueError(f"`calibration` holds shapes, but llm_int8 of {unknown[0]!r} needs data to find its capacity: give batches of "
                         "numbers, or qjax.llm_int8(capacity=...)")  # fmt: skip
    phase = monitor.phase("outliers", [] if shapes else [forward(program) for program, _ in batches])

    def observers(program: Program) -> dict[Key, OutlierColumns]:
        mine = [(site, wanted[site.leaf]) for site in program.sites if site.leaf in wanted and counted(site, program.leaves[site.leaf])]
        return {site.key: outlier_columns(limit.threshold, limit.capacity) for site, limit in mine}

    params = [done[i][0] if i in done else w for i, w in enumerate(flat)]
    found = {} if shapes else observe_batches(observers, params, batches, phase)
    for index, limit in wanted.items():
        q, notes = done[index]
        rows = {_rows(site, leaves[index]) for program, _ in batches for site in program.leaves[index].sites if site.key in found}
        capacity, note = _capacity(leaves[index], limit, int(np.prod(q.sizes)), found, rows)
        act = dataclasses.replace(q.act or dynamic(int8()), outliers=Outliers(limit.threshold, capacity))
        new[index] = dataclasses.replace(q, act=act), (*notes, *note)
    return new


def _capacity(
    leaf: Leaf, limit: Outliers, k: int, found: dict[Key, OutlierCounts], rows: Collection[int]
) -> tuple[int, tuple[str, ...]]:
    """The number of columns to set aside for a parameter, and what the report says of it; `rows`: those of its calls."""
    mine = [found[site.key] for site in leaf.sites if site.key in found]
    most = max((int(np.max(counts.most)) for counts in mine), default=0)
    calls, over = (sum(int(np.sum(getattr(counts, name))) for counts in mine) for name in ("calls", "over"))
    if limit.capacity is not None:
        capacity = min(limit.capacity, k)
        notes = [] if limit.capacity <= k else [f"its capacity of {limit.capacity} is more than its columns: {_room(k, k)}"]
        if over:
            much = f"more than {_columns(capacity)}, up to {most}"
            notes.append(f"{over} of {_calls(calls, rows)} had {much}: the others stay int8")
        return capacity, tuple(notes)
    if all(site.custom_rule for site in leaf.sites):
        return min(k, LEAST), ()  # nothing is rounded there
    capacity = min(k, max(LEAST, -(-int(np.ceil(MARGIN * most)) // MULTIPLE) * MULTIPLE))
    room = _room(capacity, k)
    if not calls:
        why = next((text for site in leaf.sites if site.op != "gather" and (text := why_no_rows(site, leaf))), "no data reached it")
        return capacity, (f"its outlier columns were not counted, {why}: {room}",)
    return capacity, (f"{f'at most {_columns(most)}' if most else 'no outlier columns'} in {_calls(calls, rows)}: {room}",)


def _rows(site: Site, leaf: Leaf) -> int:
    """The rows of one call: each of the batched experts has its own, a list of rows is counted whole."""
    return rows_seen(site, leaf) // (stack_size(site, leaf) if site.op == "dot_general" else 1)


def _room(capacity: int, k: int) -> str:
    return f"room for {capacity}" if capacity < k else f"room for all {k} columns, the product in 16 bit is as large as the float one"


def _columns(count: int) -> str:
    return f"{count} outlier column{'s' * (count != 1)}"


def _calls(calls: int, rows: Collection[int]) -> str:
    span = str(max(rows)) if len(rows) == 1 else f"{min(rows)} to {max(rows)}"
    return f"{calls} call{'s' * (calls != 1)} of {span} row{'s' * (span != '1')}"
