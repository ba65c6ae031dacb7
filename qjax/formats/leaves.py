"""The leaves of a tree and the arrays of a checkpoint: which array is what, and where it goes."""

import functools
import re
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.sharding import Sharding

from qjax.core import ARRAYS, QTensor
from qjax.formats.arrays import DTYPES, sha256s
from qjax.formats.document import ArrayEntry, Document, Leaf, Packed, digest
from qjax.formats.placement import check_packed, place_array, place_packed

_KEYS = ("threefry2x32", "rbg", "unsafe_rbg")


class Shape(NamedTuple):
    """What an array of the file is. A `jax.ShapeDtypeStruct` would narrow 64 bits where jax has only 32."""

    shape: tuple[int, ...]
    dtype: np.dtype


def describe(flat: list[tuple[str, Any]]) -> tuple[tuple[Leaf, ...], dict[str, np.ndarray]]:
    """The document's entry for every leaf, and the arrays by name, in host memory."""
    leaves, arrays = [], {}
    for i, (path, x) in enumerate(flat):
        name = f"{i:05d}.{re.sub(r'[^0-9A-Za-z_-]+', '.', path)[-80:].strip('.')}".strip(".")
        if isinstance(x, QTensor):
            x = x.plain()  # a checkpoint knows no layout of kernels
            children = {field: getattr(x, field) for field in ARRAYS}
            names: Any = {field: None if child is None else f"{name}.{field}" for field, child in children.items()}
            for field, child in children.items():
                if child is not None:
                    arrays[names[field]] = host(child, f"{path}.{field}")
            check_packed(x, path)
            packed = Packed(x.spec, x.axes, x.sizes, np.dtype(x.dtype).name, **names, act=x.act, rotation=x.rotation)
            leaves.append(Leaf(path, packed=packed))
        elif type(x) in (bool, int, float, str):
            leaves.append(Leaf(path, value=x))
        else:
            key, x = _key(x)
            arrays[name] = host(x, path)
            leaves.append(Leaf(path, array=name, key=key))
    return tuple(leaves), arrays


def _key(x: Any) -> tuple[str | None, Any]:
    """The name of the generator and the data of random keys; anything else as it is."""
    if not isinstance(x, jax.Array) or not jnp.issubdtype(x.dtype, jax.dtypes.prng_key) or isinstance(x, Tracer):
        return None, x
    name = str(jax.random.key_impl(x))
    return (name, jax.random.key_data(x)) if name in _KEYS else (None, x)


def host(x: Any, path: str) -> np.ndarray:
    """An array in host memory (for one that is there already, itself), or an error that names the leaf."""
    if isinstance(x, Tracer):
        raise TypeError(f"`{path}` is a tracer: save outside of jit")
    if isinstance(x, jax.Array):
        if jnp.issubdtype(x.dtype, jax.dtypes.extended):
            raise TypeError(f"`{path}` is an array of {x.dtype}, of a generator that a checkpoint does not know")
        if x.is_deleted():
            raise ValueError(f"`{path}` was deleted (donated to a jitted function): save before, or keep a copy")
        if not x.is_fully_addressable:
            raise ValueError(f"`{path}` is spread over several processes: gather it before saving")
    elif not isinstance(x, (np.ndarray, np.generic)):
        raise TypeError(f"`{path}` is a {type(x).__name__}: a checkpoint holds arrays, QTensors, numbers and strings")
    array = np.asarray(x)
    if array.dtype.name not in DTYPES:
        raise TypeError(f"`{path}` is an array of {array.dtype}, which a checkpoint does not hold: convert it first")
    return array.astype(array.dtype.newbyteorder("<"), copy=False) if array.dtype.byteorder == ">" else array


def array_entries(arrays: dict[str, np.ndarray]) -> dict[str, ArrayEntry]:
    """The document's entry for every array."""
    digests = sha256s(arrays.values())
    return {
        name: ArrayEntry(tuple(map(int, array.shape)), array.dtype.name, digest)
        for (name, array), digest in zip(arrays.items(), digests, strict=True)
    }


def fingerprint_of(leaves: tuple[Leaf, ...], entries: dict[str, ArrayEntry]) -> str:
    """One SHA-256 for all leaves: of their paths, shapes, dtypes and bytes, in the order of the paths."""
    found = []
    for leaf in leaves:
        parts = {"": leaf.array} if leaf.array else {} if leaf.packed is None else leaf.packed.children
        arrays = [
            (part, list(entries[name].shape), entries[name].dtype, entries[name].sha256) for part, name in parts.items()
        ]
        found.append([leaf.path, arrays, leaf.key, None if leaf.value is None else repr(leaf.value)])
    return digest(sorted(found, key=lambda row: row[0]))


def abstract_leaves(document: Document, where: str) -> list[Any]:
    """The leaves with shapes for arrays, checked against their specs."""
    shapes = {name: Shape(e.shape, np.dtype(e.dtype)) for name, e in document.arrays.items()}
    leaves = []
    for leaf in document.leaves:
        wanted = [leaf.array] if leaf.array else [] if leaf.packed is None else list(leaf.packed.children.values())
        missing = [name for name in wanted if name not in shapes]
        given = [leaf.array is not None, leaf.packed is not None, leaf.value is not None]
        if missing or sum(given) != 1:
            raise ValueError(f"{where} has the leaf {leaf.path!r} without its array: the file is damaged")
        if leaf.packed is not None and leaf.packed.dtype not in DTYPES:
            raise ValueError(
                f"{where} has the leaf {leaf.path!r} of {leaf.packed.dtype!r}: a newer qjax may know this dtype"
            )
        if leaf.key is not None and (leaf.key not in _KEYS or leaf.array is None):
            raise ValueError(f"{where} has random keys of {leaf.key!r} at {leaf.path!r}: a newer qjax may know them")
        try:
            leaves.append(_key_shape(leaf.key, shapes[wanted[0]]) if leaf.key else rebuild(leaf, shapes))
            if leaf.packed is not None:
                check_packed(leaves[-1], leaf.path)
        except (ValueError, TypeError) as error:
            raise ValueError(f"{where} is damaged at {leaf.path!r}: {error}") from error
    return leaves


def _key_shape(key: str, data: Shape) -> jax.ShapeDtypeStruct:
    if data.dtype != np.uint32:
        raise ValueError(f"key data must be uint32, not {data.dtype}")
    wrap = functools.partial(jax.random.wrap_key_data, impl=key)
    return jax.eval_shape(wrap, jax.ShapeDtypeStruct(data.shape, data.dtype))


def rebuild(leaf: Leaf, arrays: dict[str, Any]) -> Any:
    """The leaf that the document describes, with what `arrays` has for its arrays."""
    if leaf.array is not None:
        array = arrays[leaf.array]
        return array if leaf.key is None else jax.random.wrap_key_data(array, impl=leaf.key)
    if leaf.packed is None:
        return leaf.value
    p, children = leaf.packed, dict.fromkeys(ARRAYS) | {f: arrays[name] for f, name in leaf.packed.children.items()}
    return QTensor(**children, spec=p.spec, axes=p.axes, sizes=p.sizes, dtype=np.dtype(p.dtype), act=p.act, rotation=p.rotation)


def array_shardings(leaves: tuple[Leaf, ...], abstract: list[Any], sharding: Any) -> dict[str, Sharding]:
    """The sharding of every array that has one, by name."""
    if sharding is None:
        return {}
    if not isinstance(sharding, Sharding) and not callable(sharding):
        raise TypeError(
            f"`sharding` must be a Sharding or a callable (path, shape) -> Sharding, got {type(sharding).__name__}"
        )
    places = {}
    for leaf, x in zip(leaves, abstract, strict=True):
        if leaf.packed is None and leaf.array is None:
            continue
        wanted = sharding if isinstance(sharding, Sharding) else sharding(leaf.path, tuple(x.shape))
        if wanted is None:
            continue
        if not isinstance(wanted, Sharding):
            raise TypeError(
                f"`sharding` returned a {type(wanted).__name__} for `{leaf.path}`: return a Sharding or None"
            )
        if leaf.packed is not None:
            cut = place_packed(x, wanted, leaf.path)
            places |= {name: cut[field] for field, name in leaf.packed.children.items()}
        else:
            places[leaf.array] = place_array(x.shape, wanted, leaf.path)
    return places


def place(array: np.ndarray, sharding: Sharding | None, name: str) -> Any:
    """Puts an array where it belongs; one that jax has no type for stays as it is."""
    if jax.dtypes.canonicalize_dtype(array.dtype) != array.dtype:
        if sharding is not None:
            raise ValueError(
                f"`sharding` cannot place `{name}` of {array.dtype}: set jax_enable_x64, or return None for it"
            )
        return array
    return jnp.asarray(array) if sharding is None else jax.device_put(array, sharding)
