"""Gives packed weights their activation specs, and the ranges of static ones from calibration data."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from qjax.calibration import minmax, why_no_rows
from qjax.core import ActSpec, QTensor, range_params
from qjax.policy import Choice
from qjax.program import Key, Leaf, Program, Site
from qjax.ptq.data import check_numbers, with_unseen
from qjax.ptq.passes import observe_batches
from qjax.ptq.progress import Monitor
from qjax.ptq.work import forward

Done = dict[int, tuple[QTensor, tuple[str, ...]]]


def with_activations(
    done: Done, choices: Sequence[Choice], flat: Sequence[Any], batches: Sequence[tuple[Program, Any]], monitor: Monitor
) -> Done:
    """Attaches activation specs.

    Static ranges come from one pass over the data in which every weight is already quantized and activations are float.

    Args:
      done: packed weights and their notes, by the parameter's index.
      choices: the policy's, one a parameter.
      flat: the parameters as they were.
      batches: (traced program, its inputs) for each calibration batch.
      monitor: is told of each batch.

    Returns:
      `done` with the specs and ranges.

    Raises:
      ValueError: data that is not finite, naming the batch and the site; shapes in place of data; a site whose activations cannot
        be observed.
    """
    wanted = {c.leaf.index: c.activation for c in choices if c.activation is not None and c.leaf.index in done}
    new = dict(done)
    for index, act in wanted.items():
        q, notes = done[index]
        new[index] = dataclasses.replace(q, act=dataclasses.replace(act, observer=None)), notes
    static = {index: act for index, act in wanted.items() if act.static}
    if not static:
        return new
    check_numbers(batches, f"the static range of {batches[0][0].leaves[next(iter(static))].path!r}")
    phase = monitor.phase("ranges", [forward(program) for program, _ in batches])

    def observers(program: Program) -> dict[Key, Any]:
        return {site.key: _observer(act) for index, act in static.items() for site in _observed(program.leaves[index])}

    states = observe_batches(observers, [new[i][0] if i in new else w for i, w in enumerate(flat)], batches, phase)
    program = batches[0][0]
    found = _ranges(static, program, states)
    for index, act in static.items():
        leaf, (q, notes) = program.leaves[index], new[index]
        lo, hi, more = _leaf_range(leaf, found)
        scale, zero_point = range_params(lo, hi, act.spec)
        new[index] = dataclasses.replace(q, act_scale=scale, act_zero_point=zero_point), (*notes, *more)
    return new


def _ranges(static: Mapping[int, ActSpec], program: Program, states: Mapping[Key, Any]) -> dict[Key, tuple[np.ndarray, np.ndarray]]:
    """The range of each site: (scans..., stack) each end, (0, 0) where no data came."""
    found = {}
    for index, act in static.items():
        for site in _observed(program.leaves[index]):
            ends: Callable[..., Any] = functools.partial(_observer(act).range, spec=act.spec)
            for _ in site.scans:
                ends = jax.vmap(ends)
            lo, hi = jax.jit(ends)(states[site.key])
            found[site.key] = np.asarray(lo), np.asarray(hi)
    return found


def _observer(act: ActSpec) -> Any:
    return act.observer or minmax()


def _observed(leaf: Leaf) -> list[Site]:
    sites = [site for site in leaf.sites if site.op != "gather"]
    for site in sites:
        reason = why_no_rows(site, leaf)
        if reason:
            raise ValueError(f"the static activations of {leaf.path!r} cannot be observed: {reason}; make them qjax.dynamic(...)")
    return sites


def _leaf_range(leaf: Leaf, found: Mapping[Key, tuple[np.ndarray, np.ndarray]]) -> tuple[jax.Array, jax.Array, tuple[str, ...]]:
    """One range for each part of a parameter that a product sees alone, as wide as its widest site's: (kept-like..., 1)."""
    stacked = sorted({axis for site in leaf.sites for axis in site.stacked})
    lo, hi = (np.zeros([leaf.shape[a] if a in stacked else 1 for a in range(len(leaf.shape))], np.float32) for _ in range(2))
    for site in _observed(leaf):
        ends = found[site.key]
        own = [a for a in site.stacked if a not in site.view.stacked]
        axes = [axis for axis, _ in site.view.scans] + own
        turns = ends[0].shape[: len(site.scans)]
        # Which positions of each axis the site sees: a scan's turns, a fixed index, or all of them.
        where = [range(n) for n in lo.shape]
        for (axis, _), (first, stride), n in zip(site.view.scans, site.view.steps, turns, strict=True):
            where[axis] = range(first, first + stride * n, stride)
        for axis, position in site.view.fixed:
            where[axis] = range(position, position + 1) if axis in stacked else where[axis]
        for whole, end, widest in ((lo, ends[0], np.minimum), (hi, ends[1], np.maximum)):
            # Groups of a convolution share one range.
            end = widest.reduce(end.reshape(*turns, *(leaf.shape[a] for a in own), -1), axis=-1)
            end = end.transpose(np.argsort(axes)).reshape([len(where[a]) if a in axes else 1 for a in range(lo.ndim)])
            whole[np.ix_(*where)] = widest(whole[np.ix_(*where)], end)
    lo, hi, notes = with_unseen(lo, hi, "its activations")
    kept = [lo.shape[a] for a in range(lo.ndim) if a not in leaf.sites[0].contracted]
    return jnp.asarray(lo.reshape(*kept, 1)), jnp.asarray(hi.reshape(*kept, 1)), notes
