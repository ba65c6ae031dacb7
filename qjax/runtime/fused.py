"""Products of one input with several weights as one product: y = x [W_1; W_2; ...]^T, taken apart again (q, k and v; gate and up).

The weights are laid out behind one another. Every one of them keeps its place in the tree and stands for itself there: its arrays are
those of all, and its `form` says which rows are its own. The first site of a group that the program reaches multiplies by all rows, the
others take their columns of what it found. A site whose input turns out to be another multiplies for itself.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.core import Tracer

from qjax.core import QTensor
from qjax.program import Leaf, Packed, Site, compat, trace
from qjax.runtime.kernels import Layout, Runtime
from qjax.runtime.layouts import LaidOut, laid_out, with_float_scales
from qjax.runtime.multiply import kernel_product

# What the first site of a group found: by where it stands, who belongs to it, and its input, which is kept so that its id stays its own.
Memo = dict[Any, tuple[Any, jax.Array]]
_NONE = ("perm", "input_scale", "rotation", "levels")


@dataclasses.dataclass(frozen=True)
class Together:
    """The form of a `QTensor` that is some rows of a weight in the layout of a kernel.

    Attributes:
      whole: the layout of all rows.
      members: the paths of all that are laid out together, in order.
      first: where its rows begin.
      count: how many they are.
      total: how many all are.
      rows: kept axes that hold its rows; those in front of them are stacked, an array for each.
    """

    whole: LaidOut
    members: tuple[str, ...]
    first: int
    count: int
    total: int
    rows: int

    def __str__(self) -> str:
        return f"{self.whole}, one product of {', '.join(self.members)}"

    @property
    def share(self) -> tuple[int, int]:
        """Which part of the arrays is its own."""
        return self.count, self.total

    def joined(self, q: QTensor) -> QTensor:
        """The weight of all rows, (stacked..., rows, contracted...), without an adapter."""
        stacked = len(q.codes.shape) - 1 - self.rows
        lead = (*q.codes.shape[:stacked], self.total)

        def empty(a: Any) -> Any:
            return None if a is None else jnp.zeros((*lead, 0), a.dtype)

        def of_all(a: Any) -> Any:
            return None if a is None else a.reshape(*a.shape[:stacked], 1, 1)

        return dataclasses.replace(
            q,
            codes=empty(q.codes),
            scale=empty(q.scale),
            zero_point=empty(q.zero_point),
            act_scale=of_all(q.act_scale),
            act_zero_point=of_all(q.act_zero_point),
            axes=tuple(range(-len(q.sizes), 0)),
            form=self.whole,
            adapter_left=None,
            adapter_right=None,
        )

    def plain(self, q: QTensor) -> QTensor:
        """Brings the codes of its rows back."""
        whole, kept = self.joined(q).plain(), q.codes.shape[:-1]

        def own(a: Any) -> Any:
            if a is None:
                return None
            rows = lax.slice_in_dim(a, self.first, self.first + self.count, axis=a.ndim - 2)
            return rows.reshape(*kept, a.shape[-1])

        return dataclasses.replace(
            q, codes=own(whole.codes), scale=own(whole.scale), zero_point=own(whole.zero_point), laid=None, form=None
        )


def why_not_together(one: Leaf, q: QTensor, first: Leaf, of_first: QTensor) -> str:
    """Why a weight is not multiplied together with the first one of its group; "" if it can be."""
    (site,), (other,) = one.sites, first.sites
    if site.key[:-1] != other.key[:-1]:
        return "it stands in another function"
    if any(s.op != "dot_general" or s.operand != 1 or s.batch or s.sharded or s.custom_rule for s in (site, other)):
        return "it is no product of rows on the left and one weight on the right"
    if [x for _, x in site.pairs] != [x for _, x in other.pairs] or q.sizes != of_first.sizes:
        return "it contracts other axes"
    if (q.spec, q.act, q.dtype) != (of_first.spec, of_first.act, of_first.dtype):
        return f"it is {q.spec} with activations {q.act}, and {first.path} {of_first.spec} with {of_first.act}"
    if any(getattr(a, name) is not None for a in (q, of_first) for name in _NONE):
        return "its input is divided, rotated or put in another order first, or its table is its own"
    if not _same(q.act_scale, of_first.act_scale) or not _same(q.act_zero_point, of_first.act_zero_point):
        return "the range of its activations is its own"
    return ""


def lay_out_together(leaves: Sequence[Leaf], weights: Sequence[QTensor], layout: Layout, stacked: int) -> list[QTensor]:
    """Lays weights out behind one another.

    Args:
      leaves: whose they are; nothing in `why_not_together` against any.
      weights: as they were quantized.
      layout: where to.
      stacked: how many kept axes in front of the rows hold layers of a scan.

    Returns:
      As many `QTensor`s, each of its own rows; they share their arrays.
    """
    plain = [dataclasses.replace(q.plain(), adapter_left=None, adapter_right=None) for q in weights]
    counts = [math.prod(q.codes.shape[stacked:-1]) for q in plain]
    whole = _jitted(plain, layout, stacked)
    if not isinstance(whole.form, LaidOut):
        raise TypeError("`layout` gave a weight without one")
    members, total, found, first = tuple(leaf.path for leaf in leaves), sum(counts), [], 0
    for q, count in zip(weights, counts, strict=True):
        kept = q.codes.shape[:-1]
        form = Together(whole.form, members, first, count, total, len(kept) - stacked)
        empty = [None if a is None else jnp.zeros((*kept, 0), a.dtype) for a in (whole.codes, whole.scale, whole.zero_point)]
        found.append(
            dataclasses.replace(
                q, codes=empty[0], scale=empty[1], zero_point=empty[2], nested_scale=None, nested_offset=None, spec=whole.spec,
                laid=whole.laid, form=form,
            )
        )  # fmt: skip
        first += count
    return found


def product_together(
    site: Site, eqn: Any, x: jax.Array, weight: Packed, runtime: Runtime, memo: Memo, plain: Callable[[Site, Any], Any]
) -> jax.Array | None:
    """Runs a site of a group.

    Args:
      site: where.
      eqn: its equation.
      x: the activation.
      weight: the other operand, of the form `Together`, without an adapter.
      runtime: the kernels to choose from.
      memo: what other sites of this call found.
      plain: of a site and its equation, the product as XLA has it.

    Returns:
      The result of the equation; None where the weight was taken apart or no kernel takes the product of all.
    """
    q, form = weight.q, weight.q.form
    if not isinstance(form, Together) or math.prod(q.codes.shape[:-1]) != form.count:
        return None
    if any(e.primitive.name != "convert_element_type" for e in weight.pending):
        return None
    key = site.key[:-1], form.members, id(x), eqn.outvars[0].aval.dtype
    if key not in memo:
        y = _product_of_all(site, eqn, x, q, form, runtime, plain)
        if y is None:
            return None
        memo[key] = x, y
    columns = lax.slice_in_dim(memo[key][1], form.first, form.first + form.count, axis=-1)
    return columns.reshape(eqn.outvars[0].aval.shape)


def _product_of_all(
    site: Site, eqn: Any, x: jax.Array, q: QTensor, form: Together, runtime: Runtime, plain: Callable[[Site, Any], Any]
) -> jax.Array | None:
    whole, name, pair = form.joined(q), " + ".join(form.members), dict(site.pairs)
    of_x = tuple(pair[a + q.ndim] for a in q.axes)
    numbers = (of_x, tuple(range(1, 1 + len(of_x)))), ((), ())
    settings = {key: eqn.params[key] for key in ("precision", "preferred_element_type")}

    def product(p: Any, x: jax.Array) -> jax.Array:
        return lax.dot_general(x, p[name], numbers, **settings)

    program = trace(product, {name: jax.ShapeDtypeStruct(whole.shape, eqn.invars[1].aval.dtype)}, jax.ShapeDtypeStruct(x.shape, x.dtype))
    (of_all,) = program.sites
    at = compat.parts(program.jaxpr)[0].eqns[of_all.key[0]]
    return kernel_product(of_all, at, x, Packed(dataclasses.replace(whole, dtype=eqn.invars[1].aval.dtype)), runtime, plain(of_all, at))


def fused_sites(params: Any) -> tuple[tuple[str, ...], ...]:
    """Which weights of a tree from `qjax.prepack(fn, fuse=True)` are multiplied together, by their paths, in the order of the tree.

    Example:
      >>> fused_sites({"w": jnp.ones(3)})
      ()
    """
    leaves = jax.tree.leaves(params, is_leaf=lambda leaf: isinstance(leaf, QTensor))
    return tuple(dict.fromkeys(q.form.members for q in leaves if isinstance(q, QTensor) and isinstance(q.form, Together)))


def _same(a: Any, b: Any) -> bool:
    if a is None or b is None:
        return a is b
    if isinstance(a, Tracer) or isinstance(b, Tracer) or not hasattr(a, "__array__") or not hasattr(b, "__array__"):
        return a is b
    return bool(np.array_equal(np.ravel(a), np.ravel(b)))


def _joined(weights: Sequence[QTensor], stacked: int) -> QTensor:
    """One weight (stacked..., all rows, contracted...)."""
    weights = [with_float_scales(q) for q in weights]

    def rows(q: QTensor, a: jax.Array) -> jax.Array:
        kept = q.codes.shape[:-1]
        return jnp.broadcast_to(a, (*kept, a.shape[-1])).reshape(*kept[:stacked], -1, a.shape[-1])

    def all_of(name: str) -> Any:
        if getattr(weights[0], name) is None:
            return None
        return jnp.concatenate([rows(q, getattr(q, name)) for q in weights], axis=-2)

    axes = tuple(range(-len(weights[0].sizes), 0))
    return dataclasses.replace(
        weights[0], codes=all_of("codes"), scale=all_of("scale"), zero_point=all_of("zero_point"), axes=axes
    )


def _laid(weights: Sequence[QTensor], layout: Layout, stacked: int) -> QTensor:
    return laid_out(_joined(weights, stacked), layout, 0, stacked)


_jitted = jax.jit(_laid, static_argnums=(1, 2))
