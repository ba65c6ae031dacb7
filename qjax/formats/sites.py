"""The products of two activations of a checkpoint: what `result.sites` holds, as entries of the document and arrays."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from qjax.core import PRODUCT_ARRAYS, QProduct
from qjax.formats.document import Document, StoredProduct
from qjax.formats.leaves import Shape, host


def describe_sites(sites: Mapping[str, Any]) -> tuple[tuple[StoredProduct, ...], dict[str, np.ndarray]]:
    """The document's entry for every product, and the arrays by name, in host memory.

    Args:
      sites: of a `Result`.

    Returns:
      Entries and arrays.

    Raises:
      TypeError: what is no `QProduct`.
      ValueError: arrays that do not fit their spec.
    """
    entries, arrays = [], {}
    for i, (name, q) in enumerate(sites.items()):
        if not isinstance(q, QProduct):
            raise TypeError(f"`sites` has a {type(q).__name__} at {name!r}: a checkpoint holds what `qjax.quantize` made there")
        _check(q, name)
        names: Any = {field: f"site{i:05d}.{field}" for field in PRODUCT_ARRAYS if getattr(q, field) is not None}
        arrays |= {stored: host(getattr(q, field), f"{name}.{field}") for field, stored in names.items()}
        entries.append(StoredProduct(name, q.lhs, q.rhs, **names, rotation=q.rotation))
    return tuple(entries), arrays


def check_sites(document: Document, where: str) -> None:
    """Checks the products of a document before an array is read.

    Args:
      document: it.
      where: what errors call its file.

    Raises:
      ValueError: a product without its array, with one that does not fit its spec, or of a name that was there already.
    """
    shapes = {name: Shape(entry.shape, np.dtype(entry.dtype)) for name, entry in document.arrays.items()}
    if len({entry.name for entry in document.sites}) != len(document.sites):
        raise ValueError(f"{where} has two products of one name: the file is damaged")
    for entry in document.sites:
        missing = [name for name in entry.children.values() if name not in shapes]
        if missing:
            raise ValueError(f"{where} has the product {entry.name!r} without its array: the file is damaged")
        try:
            _check(_rebuilt(entry, shapes), entry.name)
        except ValueError as error:
            raise ValueError(f"{where} is damaged at {entry.name!r}: {error}") from error


def rebuild_sites(entries: Iterable[StoredProduct], arrays: Mapping[str, Any]) -> dict[str, QProduct]:
    """The products that a document describes, by name, with what `arrays` has for their arrays."""
    return {entry.name: _rebuilt(entry, arrays) for entry in entries}


def _rebuilt(entry: StoredProduct, arrays: Mapping[str, Any]) -> QProduct:
    children = dict.fromkeys(PRODUCT_ARRAYS) | {field: arrays[name] for field, name in entry.children.items()}
    return QProduct(**children, lhs=entry.lhs, rhs=entry.rhs, rotation=entry.rotation)


def _check(q: QProduct, name: str) -> None:
    """Refuses a product whose arrays do not fit its specs."""
    shapes = set()
    for side, (act, scale, zero_point) in zip(("lhs", "rhs"), q.operands, strict=True):
        asymmetric = act.static and not act.spec.symmetric
        if (scale is not None) != act.static or (zero_point is not None) != asymmetric:
            wanted = f"{'a' if act.static else 'no'} {side}_scale and {'a' if asymmetric else 'no'} {side}_zero_point"
            raise ValueError(f"`{name}` must have {wanted} for {act}")
        for field, array, dtype in ((f"{side}_scale", scale, np.float32), (f"{side}_zero_point", zero_point, np.int32)):
            if array is not None and array.dtype != dtype:
                raise ValueError(f"`{name}` has a {field} of {array.dtype}, not {np.dtype(dtype)}")
            if array is not None:
                shapes.add(tuple(array.shape))
    if len(shapes) > 1:
        raise ValueError(f"`{name}` has scales and zero points of the shapes {', '.join(map(str, sorted(shapes)))}, which must be one")
