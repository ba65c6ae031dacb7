"""Finds the sites: the equations where a parameter, seen through any chain of views, meets data in a matmul."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from qjax.program import compat, labels
from qjax.program.labels import View
from qjax.program.passing import invariant_carries, passed_on
from qjax.program.primitives import BARRIER, SITES, VIEWS, contraction, views_after
from qjax.program.products import Product, describe

Key = tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Site:
    """One place where a parameter meets data.

    Attributes:
      key: where the equation stands: positions in the nested programs, outermost first.
      leaf: the flat index of the parameter.
      path: the parameter's path, `layers_0/mlp/up/kernel`.
      op: the primitive, `dot_general`, `conv_general_dilated`, `ragged_dot_general` or `gather`.
      operand: which operand of the equation holds the parameter.
      contracted: axes of the parameter that are summed over, in the parameter's order (for a gather: the row's features).
      kept: axes that remain in the result.
      stacked: axes of which each matmul sees one element: a scan's layers, a batch of experts.
      view: what the operand is in terms of the parameter.
      pairs: (dim of the weight operand, dim of the activation) that are contracted with each other; empty for a gather or convolution.
      batch: (dim of the weight operand, dim of the activation) that run along together.
      scope: the name stack, `model/layers_0/mlp`.
      x_shape: shape of the activation, per call.
      out_shape: shape of the result, per call.
      opaque: whether it stands in a loop or branch that cannot be laid flat.
      sharded: whether it stands inside a `shard_map`, where activations and weights are parts of the whole.
      condition: whether it stands in the condition of a `while`.
      custom_rule: whether it stands inside a custom_jvp or custom_vjp function.
      groups: `feature_group_count` of a convolution, else 1.
    """

    key: Key
    leaf: int
    path: str
    op: str
    operand: int
    contracted: tuple[int, ...]
    kept: tuple[int, ...]
    stacked: tuple[int, ...]
    view: View
    pairs: tuple[tuple[int, int], ...]
    batch: tuple[tuple[int, int], ...]
    scope: str
    x_shape: tuple[int, ...]
    out_shape: tuple[int, ...]
    opaque: bool = False
    sharded: bool = False
    condition: bool = False
    custom_rule: bool = False
    groups: int = 1

    @property
    def scans(self) -> tuple[Key, ...]:
        """Keys of the scans that slice the parameter, outermost first."""
        return tuple(key for _, key in self.view.scans)


@dataclasses.dataclass(frozen=True)
class Leaf:
    """How one parameter is used.

    Attributes:
      index: flat index among the parameters.
      path: its path in the tree.
      shape: its shape.
      dtype: its dtype.
      sites: the sites it feeds, in data-flow order.
      consumers: the other primitives that read it ("mul", "add", "output"), in order, without repeats.
    """

    index: int
    path: str
    shape: tuple[int, ...]
    dtype: Any
    sites: tuple[Site, ...]
    consumers: tuple[str, ...]


class _Walk:
    """State of one discovery: what was found so far. Lives for one call of `discover`."""

    def __init__(self, paths: Sequence[str], shapes: Sequence[tuple[int, ...]]):
        self.paths, self.shapes = paths, shapes
        self.sites: list[Site] = []
        self.consumers: list[dict[str, None]] = [{} for _ in paths]
        self.products: list[tuple[Key, dict[str, bool]]] = []
        self.stepped: set[Key] = set()  # scans that slice a parameter

    def program(self, jaxpr: Any, views: Sequence[View | None], prefix: Key, flags: dict[str, bool]) -> list[View | None]:
        body, _ = compat.parts(jaxpr)
        env: dict[Any, View | None] = dict(zip(body.invars, views, strict=True))

        def read(atom: Any) -> View | None:
            return None if isinstance(atom, compat.Literal) else env.get(atom)

        for index, eqn in enumerate(body.eqns):
            operands = [read(atom) for atom in eqn.invars]
            if any(operands) or eqn.primitive.name == "dot_general" or compat.subprograms(eqn):
                outs = self.equation(eqn, operands, (*prefix, index), flags)
                env.update(zip(eqn.outvars, outs, strict=True))
        return [read(atom) for atom in body.outvars]

    def equation(self, eqn: Any, operands: list[View | None], key: Key, flags: dict[str, bool]) -> list[View | None]:
        name = eqn.primitive.name
        none: list[View | None] = [None] * len(eqn.outvars)
        if name in compat.CALLS:
            inner = {**flags, "custom_rule": flags["custom_rule"] or name in compat.CUSTOM_RULES}
            if name == "shard_map":
                inner |= {"opaque": True, "sharded": True}
            outs = self.program(eqn.params[compat.CALLS[name]], operands, (*key, 0), inner)
            if name in compat.INLINE:
                return outs
            passed = passed_on(eqn)
            for i, view in enumerate(outs):
                self.drop(None if i in passed else view, f"output of {name}")
            return [operands[passed[i]] if i in passed else None for i in range(len(outs))]
        if name == "scan":
            return self.scan(eqn, operands, key, flags)
        if name == "while":
            return self.while_loop(eqn, operands, key, flags)
        if name == "cond":
            for suffix, branch in compat.subprograms(eqn):
                for view in self.program(branch, operands[1:], key + suffix, {**flags, "opaque": True}):
                    self.drop(view, "output of cond")
            return none
        if name == BARRIER:
            return operands
        if name in VIEWS and operands[0] is not None and not any(operands[1:]):
            outs = views_after(eqn, operands[0])
            if outs is not None:
                return [*outs]
        if name == "dot_general" and not any(operands):
            self.products.append((key, flags))
            return none
        if name in SITES and self.site(eqn, operands, key, flags):
            return none
        if name in SITES:
            name += " of two parameters" if sum(v is not None for v in operands) > 1 else " in a form that has no packed product"
        for view in operands:
            self.drop(view, name)
        return none

    def scan(self, eqn: Any, operands: list[View | None], key: Key, flags: dict[str, bool]) -> list[View | None]:
        consts, carry = compat.scan_counts(eqn)
        invariant = invariant_carries(eqn.params["jaxpr"], consts, carry)
        inner = operands[:consts]
        for i, view in enumerate(operands[consts : consts + carry]):
            inner.append(view if i in invariant else self.drop(view, "carry of scan"))
        for view in operands[consts + carry :]:
            sliced = view and labels.scan_slice(view, key)
            inner.append(sliced or self.drop(view, "scan"))
        stepped = any(view and any(k == key for _, k in view.scans) for view in inner)
        if stepped:
            self.stepped.add(key)
        outs = self.program(eqn.params["jaxpr"], inner, (*key, 0), {**flags, "opaque": flags["opaque"] or not stepped})
        passed = passed_on(eqn)
        for i, view in enumerate(outs):
            self.drop(None if i in passed else view, "output of scan")
        return [operands[passed[i]] if i in passed else None for i in range(len(eqn.outvars))]

    def while_loop(self, eqn: Any, operands: list[View | None], key: Key, flags: dict[str, bool]) -> list[View | None]:
        n_cond, n_body = eqn.params["cond_nconsts"], eqn.params["body_nconsts"]
        carry = operands[n_cond + n_body :]
        invariant = invariant_carries(eqn.params["body_jaxpr"], n_body, len(carry))
        carry = [view if i in invariant else self.drop(view, "carry of while") for i, view in enumerate(carry)]
        opaque = {**flags, "opaque": True}
        self.program(eqn.params["cond_jaxpr"], operands[:n_cond] + carry, (*key, 0), {**opaque, "condition": True})
        self.program(eqn.params["body_jaxpr"], operands[n_cond : n_cond + n_body] + carry, (*key, 1), opaque)
        return carry

    def drop(self, view: View | None, consumer: str) -> None:
        if view is not None:
            self.consumers[view.leaf][consumer] = None

    def site(self, eqn: Any, operands: list[View | None], key: Key, flags: dict[str, bool]) -> bool:
        holders = [i for i, view in enumerate(operands) if view is not None]
        if len(holders) != 1:
            return False
        operand = holders[0]
        view = operands[operand]
        found = contraction(eqn, operand)
        if found is None or view is None:
            return False
        dims = found.contracted
        split = _leaf_axes(view, dims, found.stacked, len(self.shapes[view.leaf]))
        if split is None:
            return False
        contracted, kept, stacked = split
        self.sites.append(
            Site(
                key=key,
                leaf=view.leaf,
                path=self.paths[view.leaf],
                op=eqn.primitive.name,
                operand=operand,
                contracted=contracted,
                kept=kept,
                stacked=stacked,
                view=view,
                pairs=found.pairs,
                batch=found.batch,
                scope=str(eqn.source_info.name_stack),
                x_shape=tuple(eqn.invars[1 - operand].aval.shape),
                out_shape=tuple(eqn.outvars[0].aval.shape),
                groups=eqn.params.get("feature_group_count", 1),
                **flags,
            )
        )
        return True


def _leaf_axes(
    view: View, dims: Sequence[int], batch: Sequence[int], ndim: int
) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]] | None:
    """Sorts the parameter's axes into contracted, kept and stacked; None if one axis would be in two places."""
    contracted = labels.axes_of([view.dims[d] for d in dims])
    others = labels.axes_of([dim for i, dim in enumerate(view.dims) if i not in dims and i not in batch])
    # An axis of which a reshape made a batch and a kept one (heads stored flat) is kept.
    stacked = (labels.axes_of([view.dims[d] for d in batch]) - others) | view.stacked
    if not set(range(ndim)) - contracted - stacked:
        # A column of a matrix, `w[:, 0]`, is one of its kept values.
        stacked -= {axis for axis, _ in view.fixed}
    if not contracted or contracted & (stacked | others):
        return None
    kept = (a for a in range(ndim) if a not in contracted | stacked)
    return tuple(sorted(contracted)), tuple(kept), tuple(sorted(stacked))


def discover(
    jaxpr: Any, paths: Sequence[str], shapes: Sequence[tuple[int, ...]], dtypes: Sequence[Any]
) -> tuple[tuple[Leaf, ...], tuple[Product, ...]]:
    """Finds every site and every product of two activations of a program whose first `len(paths)` inputs are the parameters.

    Args:
      jaxpr: the traced program.
      paths: a path for each parameter.
      shapes: their shapes.
      dtypes: their dtypes.

    Returns:
      One `Leaf` for each parameter, with its sites in the order in which the program reaches them; and the products.
    """
    body, _ = compat.parts(jaxpr)
    walk = _Walk(paths, shapes)
    views: list[View | None] = [None] * len(body.invars)
    for index, shape in enumerate(shapes):
        views[index] = labels.whole(index, shape)
    for view in walk.program(jaxpr, views, (), {"opaque": False, "sharded": False, "condition": False, "custom_rule": False}):
        walk.drop(view, "output")
    leaves = tuple(
        Leaf(i, path, tuple(shapes[i]), dtypes[i], tuple(s for s in walk.sites if s.leaf == i), tuple(walk.consumers[i]))
        for i, path in enumerate(paths)
    )
    return leaves, describe(jaxpr, walk.products, walk.stepped)
