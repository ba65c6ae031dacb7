"""`Packed`: a QTensor on its way through a program, with the elementwise steps that wait for its dequantized value."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax

from qjax.core import QCache, QTensor, views, with_plain_scales
from qjax.program import compat
from qjax.program.primitives import ELEMENTWISE_VIEWS, PLACEMENTS, split_starts


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Packed:
    """A quantized parameter inside the interpreter.

    It is a pytree, so `scan`, `cond` and `checkpoint` take it apart and put it together as they do any value.

    Attributes:
      q: the packed numbers, already rearranged by the views met so far.
      pending: elementwise equations (casts) to apply to its dequantized value, oldest first.
      trained: the same numbers as an array that gradients flow through, already as the views met so far have it; None where there is
        nothing to train.
    """

    q: QTensor
    pending: tuple[Any, ...] = dataclasses.field(default=(), metadata={"static": True})
    trained: Any = None

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.q.shape)

    def value(self) -> jax.Array:
        """Dequantizes and applies what is pending."""
        if self.trained is not None:
            return self.trained
        x = self.q.dequantize()
        for eqn in self.pending:
            (x,) = compat.bind(eqn, [x])
        return x


def after_view(packed: Packed, eqn: Any, rest: list[Any]) -> list[Packed] | None:
    """Applies a view primitive to the packed arrays; None if only the dequantized value can take it."""
    name, q = eqn.primitive.name, packed.q
    trained = [None] * len(eqn.outvars) if packed.trained is None else compat.bind(eqn, [packed.trained, *rest])
    if name in ELEMENTWISE_VIEWS or name in PLACEMENTS:
        return [Packed(q, (*packed.pending, eqn), trained[0])]
    pieces = _split(q, eqn) if name == "split" else [_view(q, eqn, rest)]
    pending = _anywhere(packed.pending)
    whole = [Packed(piece, pending, part) for piece, part in zip(pieces, trained, strict=True) if piece is not None]
    return whole if len(whole) == len(pieces) else None


def _split(q: QTensor, eqn: Any) -> list[QTensor | None]:
    shapes = [out.aval.shape for out in eqn.outvars]
    return [
        views.slice(q, start, [a + n for a, n in zip(start, shape, strict=True)])
        for start, shape in zip(split_starts(eqn), shapes, strict=True)
    ]


def _view(q: QTensor, eqn: Any, rest: list[Any]) -> QTensor | None:
    name, params = eqn.primitive.name, eqn.params
    if name == "transpose":
        return views.transpose(q, tuple(params["permutation"]))
    if name == "reshape" and params.get("dimensions") is None:
        return views.reshape(q, tuple(params["new_sizes"]))
    if name == "squeeze":
        return views.squeeze(q, tuple(params["dimensions"]))
    if name == "broadcast_in_dim":
        return views.broadcast_in_dim(q, tuple(params["shape"]), tuple(params["broadcast_dimensions"]))
    if name == "slice":
        return views.slice(q, tuple(params["start_indices"]), tuple(params["limit_indices"]), params["strides"])
    if name == "dynamic_slice":
        return views.dynamic_slice(q, tuple(rest), tuple(params["slice_sizes"]))
    return None


def can_scan(packed: Packed) -> bool:
    """Whether slicing every packed array along its first axis is slicing the parameter along its first axis."""
    q = packed.q
    if not q.shape or -len(q.shape) in q.axes:
        return False
    return all(leaf.shape[0] == q.shape[0] for leaf in jax.tree.leaves(q))


def scannable(packed: Packed) -> Any:
    """Returns what a `scan` may slice: the packed arrays where that is right, else the dequantized value."""
    if packed.q.nested_scale is not None and not can_scan(packed):
        packed = Packed(with_plain_scales(packed.q), packed.pending, packed.trained)  # it is no stack of independent tensors
    return Packed(packed.q, _anywhere(packed.pending), packed.trained) if can_scan(packed) else packed.value()


def scannable_cache(cache: QCache) -> Any:
    """Returns what a `scan` may slice: the packed form along layers, the numbers along time or channels."""
    return cache if cache.ndim > 2 and cache.axis != -cache.ndim else cache.read()


def _anywhere(pending: tuple[Any, ...]) -> tuple[Any, ...]:
    # A sharding constraint is written for the shape it stood at.
    return tuple(eqn for eqn in pending if eqn.primitive.name not in PLACEMENTS)


def materialize(value: Any) -> Any:
    """Returns the array that a value stands for."""
    if isinstance(value, Packed):
        return value.value()
    if isinstance(value, QCache):
        return value.read()
    return value.dequantize() if isinstance(value, QTensor) else value
