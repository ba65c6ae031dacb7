"""`calibrate`: a function and data become ranges, and a report of how far they can be trusted."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from qjax.calibration.batches import as_arguments, counted, holds_no_rows
from qjax.calibration.distance import outside, total_variation
from qjax.calibration.features import Features, feature_stats
from qjax.calibration.findings import Calibration, SiteRange
from qjax.calibration.histogram import Bins, Histogram, histogram
from qjax.calibration.observe import (
    Observation,
    Seen,
    Watched,
    check_where,
    init_states,
    observations,
    observe_program,
    unflattened,
    watched_sites,
)
from qjax.calibration.observers import RangeObserver, Together
from qjax.core import FloatSpec, IntSpec, static
from qjax.policy import Policy
from qjax.program import Arguments, Program, ProgramCache, split_arguments

# Where the observer itself keeps no histogram; 32 KiB a part.
_BINS = histogram(2048)
_NAMED = 8  # constant features that are listed by number


def calibrate(
    fn: Callable[..., Any],
    params: Any,
    calibration: Iterable[Any],
    where: str | Policy = "*",
    *,
    observer: RangeObserver[Any] | None = None,
    spec: IntSpec | FloatSpec | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Calibration:
    """Runs data through a function, and says for every site which range its input gets and how far that can be trusted.

    It is one pass; what is kept does not grow with the number of batches. The ranges of the extreme-value and the histogram
    observers do not depend on how the data is cut into batches; that of a moving average does: its state is carried from batch to
    batch in order, as `quantize` carries it. Nothing is rounded: activations are those of the function as it is given, so for a
    packed model those of its dequantized weights.

    Args:
      fn: any JAX function whose first argument is `params`; see `qjax.quantize`.
      params: its parameters, float or packed.
      calibration: batches, re-iterable, at least one. A tuple is spread over the function's arguments after `params`; a dict or an
        array is one argument. Shapes may differ as long as the function has the same sites. A generator is read into a list.
      where: which parameters' sites: a pattern over paths (`*` crosses `/`), or a policy: those of the parameters that it quantizes,
        with the observers and specs of its rules' activations.
      observer: what chooses the ranges, such as `qjax.percentile(99.99)`; None for that of a policy's rule, else `qjax.minmax()`.
      spec: what the activations are to become; None for that of a policy's rule, else `qjax.int8()`.
      progress: called with (batches done, batches in all).

    Returns:
      A `Calibration`: a row for every part of every site, printable, with `to_json`; `compare` sets two of them side by side.

    Raises:
      TypeError: an argument of the wrong kind.
      ValueError: no batch, or shapes in place of data; NaN or infinity, naming the batch and the site; a batch that the function does
        not take or in which it has other sites, naming the batch and the shapes; `where` names nothing that can be observed.

    Example:
      >>> import jax.numpy as jnp, qjax
      >>> fn = lambda p, x: jnp.tanh(x @ p["w"])
      >>> batches = [jnp.array([[1.0, -2.0, 0.5]]), jnp.array([[3.0, 1.0, 0.5]])]
      >>> found = calibrate(fn, {"w": jnp.ones((3, 4))}, batches, spec=qjax.uint8())
      >>> [(row.name, row.lo, row.hi, row.rows, row.constant_features) for row in found.rows]
      [('w', -2.0, 3.0, 2, (2,))]

    Source: the ranges: see the observers. The comparison of halves: any split-half test, e.g. Brown, Some experimental results in the
    correlation of mental abilities (1910).
    """
    check_where(where)
    _check_observer(observer)
    spec = None if spec is None else static(spec).spec
    batches, number = counted(calibration)
    programs, plans = ProgramCache(fn), {}
    halves: list[Seen | None] = [None, None]
    first: _Plan | None = None
    for i, batch in enumerate(batches):
        arguments = split_arguments(params, as_arguments(batch), {})
        shapes = _check_arrays(arguments, i)
        program = _traced(programs, arguments, i, shapes)
        if holds_no_rows(program, arguments.inputs):
            raise ValueError(f"`calibration` batch {i} ({shapes}) holds no rows: leave the batch out")
        if id(program) not in plans:
            plans[id(program)] = _plan(program, *watched_sites(program, where, observer, spec), shapes)
            first = first or plans[id(program)]
            _check_same(first, plans[id(program)], i)
        plan = plans[id(program)]
        half = 0 if 2 * i < number else 1
        before = halves[half]
        seen, finite = plan.run(plan.begin(halves[0]) if before is None else before, [*arguments.params, *arguments.inputs])
        _check_finite(np.asarray(finite), plan.sites, i)
        halves[half] = seen
        if progress is not None:
            progress(i + 1, number)
    if first is None or halves[0] is None:
        raise ValueError("`calibration` gave no batch when it was read the second time: give a list, or what can be read again")
    return _findings(first, halves[0], halves[1], number)


@dataclasses.dataclass(frozen=True)
class _Plan:
    """How one shape of batches is run.

    Attributes:
      program: the program, which is kept alive so that its identity stays its own.
      sites: what is watched.
      refused: what cannot be, and why.
      begin: (what the first half showed, or None) -> what is seen before any data of a half.
      run: (what was seen before, flat arguments) -> (what is seen with this batch, whether each site's input is finite).
      kept: name, parts and columns of every site.
      shapes: of the batch it was made for.
    """

    program: Program
    sites: list[Watched]
    refused: dict[str, str]
    begin: Callable[[Seen | None], Seen]
    run: Callable[[Seen, list[Any]], tuple[Seen, jax.Array]]
    kept: dict[str, tuple[Any, ...]]
    shapes: str


def _plan(program: Program, sites: list[Watched], refused: dict[str, str], shapes: str) -> _Plan:
    watched = [dataclasses.replace(w, observer=_together(w.observer)) for w in sites]
    observers = {w.site.key: w.observer for w in watched}
    observe = observe_program(program, observers)

    def begin(first: Seen | None) -> Seen:
        new = observations(init_states(program, observers), watched)
        return new if first is None else {name: _carried(first[name], new[name]) for name in new}

    def run(before: Seen, values: list[Any]) -> tuple[Seen, jax.Array]:
        start = init_states(program, observers)
        start = {w.site.key: unflattened(before[w.names.site].state, start[w.site.key]) for w in watched}
        seen = observations(observe(start, values), watched)
        features = [_features(seen[w.names.site]) for w in watched]
        return seen, jnp.stack([jnp.isfinite(f.lo).all() & jnp.isfinite(f.hi).all() for f in features])

    empty = jax.eval_shape(lambda: begin(None))
    kept = {w.names.site: (w.names.parts, _features(empty[w.names.site]).lo.shape) for w in watched}
    return _Plan(program, sites, refused, begin, jax.jit(run), kept, shapes)


def _together(observer: Any) -> Together:
    """What watches a site: the observer, the features, a histogram, and the observer again for what it makes of both halves.

    The last is carried from the first half into the second: of an observer whose result depends on the order, such as a moving average,
    merged halves are not the whole. Those that keep a histogram merge exactly and need neither of the two.
    """
    more = () if isinstance(observer, Histogram) else (_BINS, observer)
    return Together((observer, feature_stats(), *more))


def _carried(before: Observation, after: Observation) -> Observation:
    """`after`, but for what runs through both halves, which is that of `before`."""
    return Observation((*after.state[:3], *before.state[3:]), after.observer)


def _features(observation: Observation) -> Features:
    return observation.state[1]


def _bins(observation: Observation) -> Bins:
    return observation.state[0] if isinstance(observation.observer.observers[0], Histogram) else observation.state[2]


@jax.jit
def _merge(a: Seen, b: Seen) -> Seen:
    """Both halves; what runs through them is in the second one whole."""
    return {name: _carried(b[name], a[name].merge(b[name])) for name in a}


def _check_observer(observer: Any) -> None:
    if observer is not None and (isinstance(observer, type) or not hasattr(observer, "range")):
        raise TypeError(f"`observer` must find ranges, such as qjax.minmax() or qjax.entropy(), got {observer!r}")


def _check_arrays(arguments: Arguments, i: int) -> str:
    """Refuses shapes in place of data; returns the shapes, for messages."""
    if any(isinstance(x, jax.ShapeDtypeStruct) for x in (*arguments.params, *arguments.inputs)):
        raise ValueError(f"`calibration` batch {i} or `params` holds shapes: ranges need numbers")
    return ", ".join(f"{x.dtype}{list(x.shape)}" for x in arguments.inputs) or "no array"


def _traced(programs: ProgramCache, arguments: Arguments, i: int, shapes: str) -> Program:
    try:
        return programs(arguments)
    except (TypeError, ValueError) as error:
        raise ValueError(f"`calibration` batch {i} ({shapes}) does not fit the function: {error}") from error


def _check_same(first: _Plan, plan: _Plan, i: int) -> None:
    if plan.kept == first.kept:
        return
    other = [name for name in first.kept | plan.kept if first.kept.get(name) != plan.kept.get(name)]
    raise ValueError(
        f"`calibration` batch {i} ({plan.shapes}) makes a program with other sites than batch 0 ({first.shapes}): {', '.join(other[:3])}; "
        "give batches of one kind"
    )


def _check_finite(finite: np.ndarray, sites: Sequence[Watched], i: int) -> None:
    if not finite.all():
        site = sites[int(np.argmin(finite))].site
        raise ValueError(f"`calibration` batch {i} gives the input of {site.path!r} ({site.op}) NaN or infinity; look at that batch")


def _findings(plan: _Plan, first: Seen, second: Seen | None, number: int) -> Calibration:
    whole = first if second is None else _merge(first, second)
    rows = []
    for w in plan.sites:
        name = w.names.site
        rows += _rows(w, whole[name], first[name], None if second is None else second[name])
    notes = [f"not observed: {name}: {reason}" for name, reason in plan.refused.items()]
    if second is None:
        notes.append("one batch: its halves cannot be compared")
    return Calibration(tuple(rows), number, tuple(notes), {name: _bins(observation) for name, observation in whole.items()})


def _rows(w: Watched, whole: Observation, first: Observation, second: Observation | None) -> list[SiteRange]:
    """One row for each part of a site."""
    bins, features = _bins(whole), jax.device_get(_features(whole))
    seen, count = jax.device_get(bins.seen), features.count
    lo, hi = _range(w, whole.state[-1] if len(whole.state) == 4 else whole.state[0])
    beyond = outside(bins, lo, hi)
    moved, drift = _apart(w, hi - lo, first, second) if second is not None else ([None] * len(count),) * 2
    constant = (features.lo == features.hi) & (count > 1)[:, None]
    peaks = np.maximum(-features.lo, features.hi)
    middle = np.median(peaks, axis=1)
    rows = []
    for i, name in enumerate(w.names.parts):
        columns = np.flatnonzero(constant[i])
        rows.append(
            SiteRange(
                name=name,
                site=w.names.site,
                op=w.site.op,
                scope=w.site.scope,
                observer=str(w.observer),
                spec=str(w.spec),
                rows=int(count[i]),
                lo=float(lo[i]),
                hi=float(hi[i]),
                least=float(seen.lo[i]),
                most=float(seen.hi[i]),
                mean=float(features.mean[i]),
                std=math.sqrt(float(features.variance[i])),
                outside=float(beyond[i]),
                moved=moved[i],
                drift=drift[i],
                peak=float(peaks[i].max() / middle[i]) if middle[i] > 0 else None,
                constant=len(columns),
                constant_features=tuple(map(int, columns[:_NAMED])),
                notes=_notes(int(count[i]), second is not None and moved[i] is None),
            )
        )
    return rows


def _notes(rows: int, one_half: bool) -> tuple[str, ...]:
    if not rows:
        return ("no data reached it",)
    return ("data reached it in one half only: its halves cannot be compared",) if one_half else ()


def _range(w: Watched, state: Any) -> tuple[np.ndarray, np.ndarray]:
    observer: Any = w.observer
    lo, hi = observer.range(state, w.spec)
    return np.asarray(lo, np.float64), np.asarray(hi, np.float64)


def _apart(w: Watched, width: np.ndarray, first: Observation, second: Observation) -> tuple[list[float | None], list[float | None]]:
    """How far the halves are apart: (the range, in widths of the whole one; the values, as `total_variation`), None without both."""
    (lo_a, hi_a), (lo_b, hi_b) = _range(w, first.state[0]), _range(w, second.state[0])
    moved = np.maximum(np.abs(lo_b - lo_a), np.abs(hi_b - hi_a)) / np.where(width > 0, width, 1.0)
    both = (np.asarray(_features(first).count) > 0) & (np.asarray(_features(second).count) > 0)
    drift = total_variation(_bins(first), _bins(second))
    found = [[float(v) if seen else None for v, seen in zip(values, both, strict=True)] for values in (moved, drift)]
    return found[0], found[1]
