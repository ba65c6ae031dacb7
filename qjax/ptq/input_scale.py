"""Explicit run-time scales: where nothing can take 1 / s in exchange, the product divides its own input, and its weight keeps s."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from qjax.calibration import Channels, Sample, divide_columns, why_no_rows
from qjax.core import ActSpec, QTensor, Spec, canonicalize
from qjax.program import Leaf, Site
from qjax.ptq.method import Method, Outcome, Problem
from qjax.ptq.parts import Layout, for_each_matrix, matrices, part_axes, part_of, problem_of, take
from qjax.runtime.integer import why_not, why_not_float8

# (weights (stack, N, K), statistics, sample) of one choice of scales -> s (K,)
Search = Callable[[jax.Array, Channels, Sample], jax.Array]


def why_no_scale(site: Site, leaf: Leaf, spec: Spec, act: ActSpec | None) -> str:
    """Says why a site's input cannot be divided at run time; "" if it can."""
    reason = why_no_rows(site, leaf)
    if reason:
        return reason
    if any(other.key != site.key and dict(other.view.fixed) == dict(site.view.fixed) for other in leaf.sites):
        return "it is used more than once"
    if set(part_axes(site)) - set(site.stacked):
        return "one of its kept values is picked alone"
    if act is None:
        return ""
    if site.custom_rule:
        return "its activations stay float inside a custom derivative rule"
    if site.op == "conv_general_dilated":
        return "the windows of a convolution overlap"
    if site.op == "ragged_dot_general" and len(site.x_shape) != 2:
        return "its experts have a batch of lists of rows"
    return why_not_float8(site, spec, act) if act.is_float else why_not(site, spec)


def site_scale(leaf: Leaf, site: Site, w: Any, stats: Channels, sample: Sample, scale: np.ndarray, search: Search) -> None:
    """Finds the scales of a site's columns and writes them to where the site stands in its parameter.

    Args:
      leaf: the parameter.
      site: one of its sites; each layer and each expert has scales of its own, layers that a loop picks share them, as do the groups
        of a convolution.
      w: the float parameter.
      stats: what the site read, a leading axis for each scan that slices the parameter.
      sample: rows of it, likewise.
      scale: float32, `blank(leaf)`, written to.
      search: chooses the scales.
    """
    axes, shape = part_axes(site), leaf.shape
    layout, float_w = Layout(axes, tuple(shape[a] for a in axes)), jnp.asarray(w)
    own = [a for a in site.stacked if a not in axes]
    rest = [a for a in range(len(shape)) if a not in axes]
    for turn in np.ndindex(*stats.absmax.shape[: len(site.scans)]):
        part = part_of(site, dict(zip(site.scans, turn, strict=True)))
        problem = problem_of(leaf, site, None, take(float_w, layout, part), axes)  # pyright: ignore[reportArgumentType]
        whole: Any = matrices(problem), *_each_matrix(problem, jax.tree.map(lambda a, turn=turn: a[turn], (stats, sample)))
        together = site.groups > 1 or bool(problem.shared)
        units = [whole] if together else [jax.tree.map(lambda a, i=i: a[i : i + 1], whole) for i in range(whole[0].shape[0])]
        found = np.stack([np.asarray(search(*unit), np.float32) for unit in units])
        # (own..., contracted...) in the order of the parameter, size one along what is kept and along what shares them.
        sizes = [1 if together else shape[a] for a in own] + [shape[a] for a in site.contracted]
        placed = found.reshape(sizes).transpose(np.argsort([*own, *site.contracted]))
        where = dict(zip(sorted([*own, *site.contracted]), placed.shape, strict=True))
        target: Any = tuple(part[axes.index(a)] if a in axes else slice(None) for a in range(len(shape)))
        scale[target] = placed.reshape([where.get(a, 1) for a in rest])


def blank(leaf: Leaf) -> np.ndarray:
    """Scales of one for all columns of a parameter: float32 of its rank, full along stacked and contracted axes, else one."""
    stacked = {axis for site in leaf.sites for axis in site.stacked}
    full = stacked | set(leaf.sites[0].contracted)
    return np.ones([n if a in full else 1 for a, n in enumerate(leaf.shape)], np.float32)


def quantize_scaled(method: Method, problem: Problem, state: Any, s: Any) -> Outcome:
    """Quantizes s w, with the statistics of x / s, and gives the packed weight its `input_scale`.

    Args:
      method: what chooses the codes.
      problem: the weight w.
      state: the observer's, of x; or None.
      s: float32, the shape of w with one along kept axes; None changes nothing.

    Returns:
      The outcome; its weight still stands for w.
    """
    if s is None:
        return method.quantize(problem, state)
    columns = jnp.repeat(matrices(problem._replace(w=jnp.asarray(s), groups=1))[:, 0], problem.groups, axis=0)
    if state is not None:
        state = divide_columns(_each_matrix(problem, state), columns)
    scaled = problem._replace(w=problem.w.astype(jnp.float32) * s, shared=())
    outcome = method.quantize(scaled, state)
    input_scale = canonicalize(jnp.asarray(s), problem.axes)
    return outcome._replace(q=dataclasses.replace(outcome.q, input_scale=input_scale, dtype=np.dtype(problem.w.dtype)))


def scaled_shapes(q: QTensor, s: Any) -> QTensor:
    """What `quantize_scaled` will store, given what the method says of it from shapes alone."""
    if s is None:
        return q
    shape = jax.eval_shape(lambda: canonicalize(jnp.asarray(s), q.axes)).shape
    return dataclasses.replace(q, input_scale=jax.ShapeDtypeStruct(shape, jnp.float32))


def part_scale(scale: Any, layout: Layout, part: Sequence[int]) -> Any:
    """One part of a parameter's scales, or None."""
    return None if scale is None else take(jnp.asarray(scale), layout, tuple(part))


def _each_matrix(problem: Problem, statistics: Any) -> Any:
    return jax.tree.map(lambda a: for_each_matrix(problem, a), statistics)
