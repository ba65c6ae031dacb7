"""A few numbers by which weights are known again: adapters mean nothing beside other weights than those that they were trained beside.

Of each matrix: its values added up under eight fixed patterns of signs, and its norm. Where two matrices differ by D, so do those sums, by
|D| on average, and the root mean square of the differences says how far they are apart. A digest of the bytes would say less, and refuse
too much: `qjax.prepack` lays the same weight out anew, and another machine may round the scales of scales in another way.
"""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from qjax.core import QTensor
from qjax.core.layout import canonicalize
from qjax.program import split_arguments
from qjax.training import Adapted

PATTERNS = 8
# Above what sums in float32 differ by between machines (2e-5), far below what rounding to 8 bits moves a weight by (5e-3).
_APART = 1e-4

# PATTERNS sums and the norm, by the name of a matrix.
Sketches = Mapping[str, Sequence[float]]


def sketches(plan: Mapping[int, Adapted], modules: Mapping[str, Sequence[str]], base: Any) -> dict[str, list[float]]:
    """Sketches what adapters stand beside, without the low-rank part that they stand in place of.

    Args:
      plan: which parameters have adapters.
      modules: of the path of each its name, or one for each layer that it stacks.
      base: the tree of parameters.

    Returns:
      By each name PATTERNS sums and the norm, with the digits of float32.

    Raises:
      TypeError: a leaf is no array.
      ValueError: `base` is not the tree of the plan.
    """
    arguments, found = split_arguments(base, (), {}), {}
    leaves = dict(zip(arguments.paths, arguments.params, strict=True))
    for one in plan.values():
        w = leaves.get(one.leaf.path)
        if w is None or getattr(w, "shape", None) != one.leaf.shape:
            what = f"has no leaf {one.leaf.path!r}" if w is None else f"leaf {one.leaf.path!r} has shape {getattr(w, 'shape', None)}"
            raise ValueError(f"`base` {what}, and the `plan` has an adapter for one of shape {one.leaf.shape}: give the parameters that "
                             "it was made with, tuned.plan(base, ...)")  # fmt: skip
        if any(isinstance(a, jax.ShapeDtypeStruct) for a in jax.tree.leaves(w)):
            raise TypeError(f"`base` leaf {one.leaf.path!r} is a shape and holds no numbers: give the parameters themselves")
        stacked = tuple(i for i, n in enumerate(one.own) if n != 1)
        for module, numbers in zip(modules[one.leaf.path], _of_layers(w, one.axes, stacked), strict=True):
            found[module] = [float(f"{number:.9g}") for number in numbers]
    return found


def distance(here: Sequence[float], there: Sequence[float]) -> float:
    """How far two matrices are apart, as a multiple of the larger norm, by their sketches; 0 if they are the same but for rounding.

    >>> distance([1.0] * 8 + [2.0], [1.0] * 8 + [2.0]), distance([1.0] * 8 + [2.0], [3.0] * 8 + [4.0])
    (0.0, 0.5)
    """
    norm = max(here[-1], there[-1])
    difference = np.asarray(here) - np.asarray(there)
    apart = float(np.sqrt(np.mean(difference[:-1] ** 2))) / norm if norm else 0.0
    return apart if apart > _APART else 0.0


def to_text(found: Sketches) -> str:
    """What a file keeps of sketches.

    >>> to_text({"up": [1.0, 0.5]})
    '{"up": [1.0, 0.5]}'
    """
    return json.dumps(dict(found))


def from_text(text: str, where: str) -> dict[str, list[float]]:
    """Reads what `to_text` wrote.

    Args:
      text: it.
      where: the file that holds it, for the error.

    Raises:
      ValueError: it is something else.
    """
    try:
        found = json.loads(text)
        sound = isinstance(found, dict) and all(len(v) == PATTERNS + 1 and np.isfinite(np.asarray(v, float)).all() for v in found.values())
    except (ValueError, TypeError, RecursionError):
        sound = False
    if not sound:
        raise ValueError(f"`{where}` has a damaged note on its base: copy it again, or leave `base` out")
    return found


def _of_layers(w: Any, axes: tuple[int, ...], stacked: tuple[int, ...]) -> np.ndarray:
    """(layers, PATTERNS + 1) float64. Rows are added up on the device, in float32, and then here: one long sum would lose digits."""
    rows = np.asarray(_of_rows(w, axes, stacked), np.float64).sum(axis=1)
    return np.concatenate([rows[:, :-1], np.sqrt(rows[:, -1:])], axis=1)


@functools.partial(jax.jit, static_argnums=(1, 2))
def _of_rows(w: Any, axes: tuple[int, ...], stacked: tuple[int, ...]) -> jax.Array:
    """(layers, rows, PATTERNS + 1): the sums of every row under the patterns, and that of its squares."""
    if isinstance(w, QTensor):
        w = dataclasses.replace(w.with_adapter(None), dtype=np.dtype(np.float32)).dequantize()
    w = canonicalize(jnp.asarray(w).astype(jnp.float32), axes)
    layers = [w.shape[i] for i in stacked]
    w = jnp.moveaxis(w, stacked, range(len(stacked))).reshape(int(np.prod(layers, dtype=int)), -1, w.shape[-1])
    place = jax.lax.broadcasted_iota(jnp.uint32, w.shape, 1) * jnp.uint32(w.shape[-1]) + jax.lax.broadcasted_iota(jnp.uint32, w.shape, 2)
    bits = _mixed(place)
    sums = [jnp.sum(jnp.where((bits >> i) & 1 == 1, w, -w), axis=-1) for i in range(PATTERNS)]
    return jnp.stack([*sums, jnp.sum(w * w, axis=-1)], axis=-1)


def _mixed(x: jax.Array) -> jax.Array:
    """Bits that look random, equal on every machine and version, as those of `jax.random` need not be.

    Source: the mixing function "lowbias32", Chris Wellons, Prospecting for Hash Functions, 2018.
    """
    x = (x ^ (x >> 16)) * jnp.uint32(0x7FEB352D)
    x = (x ^ (x >> 15)) * jnp.uint32(0x846CA68B)
    return x ^ (x >> 16)
