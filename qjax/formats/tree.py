"""The containers of a tree, as JSON and back.

Dictionaries, lists, tuples and None come back as they were. Any other container (a FrozenDict, an `nnx.State`, an
Equinox module, a dataclass, a named tuple) is written as the dictionary of its children by key, and comes back as that,
or as it was where the caller shows one like it. A container whose only child is its attribute `value` is a box (an
`nnx.Param`, a `nn.Partitioned`) and is transparent: it is not part of a path either.

A node is `{"dict": [[key, node], ...]}`, `{"list": [node, ...]}`, `{"tuple": [node, ...]}`, `{"leaf": number}`, null
for None, or `{"container": [[key, node], ...], "type": its class}`.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import jax
from jax.tree_util import DictKey, FlattenedIndexKey, GetAttrKey, SequenceKey

from qjax.core import QTensor
from qjax.program.trace import path_str

Key = str | int | bool


class View(NamedTuple):
    """One level of a tree. `kind` is "leaf", "none", "dict", "list", "tuple", "box" or "container"."""

    kind: str
    steps: tuple[Any, ...] = ()
    children: tuple[Any, ...] = ()
    rebuild: Callable[[Iterable[Any]], Any] = tuple

    @property
    def keys(self) -> tuple[Any, ...]:
        """The plain keys of the children."""
        return tuple(map(_plain, self.steps))


def view(x: Any) -> View:
    """Looks one level into a tree.

    Args:
      x: a tree of any registered containers.

    Returns:
      Its `View`; a `QTensor` is a leaf.
    """
    if x is None:
        return View("none")
    if isinstance(x, QTensor):
        return View("leaf")
    if type(x) is dict:
        keys = tuple(x)
        return View("dict", tuple(map(DictKey, keys)), tuple(x.values()), lambda c: dict(zip(keys, c, strict=True)))
    if type(x) in (list, tuple):
        return View(type(x).__name__, tuple(map(SequenceKey, range(len(x)))), tuple(x), type(x))
    # One level: everything below `x` counts as a leaf.
    flat, treedef = jax.tree_util.tree_flatten_with_path(x, is_leaf=lambda y: y is not x)
    if len(flat) == 1 and flat[0][1] is x:
        return View("leaf")
    steps, children = tuple(path[-1] for path, _ in flat), tuple(child for _, child in flat)
    kind = "box" if steps == (GetAttrKey("value"),) else "container"
    return View(kind, steps, children, treedef.unflatten)


def _plain(step: Any) -> Any:
    match step:
        case DictKey(key) | FlattenedIndexKey(key):
            return key
        case SequenceKey(idx):
            return idx
        case GetAttrKey(name):
            return name
        case _:  # a custom key of a third party
            return str(step)


def encode_tree(tree: Any) -> tuple[Any, list[tuple[str, Any]]]:
    """Takes a tree apart.

    Args:
      tree: of any registered containers.

    Returns:
      (node, leaves): JSON for the containers, and the leaves with their paths, in order.

    Raises:
      TypeError: a key that is no string, integer or boolean.
      ValueError: two children of a container with the same key.
    """
    leaves: list[tuple[str, Any]] = []

    def walk(x: Any, path: tuple[Any, ...]) -> Any:
        v = view(x)
        if v.kind == "none":
            return None
        if v.kind == "leaf":
            leaves.append((path_str(path), x))
            return {"leaf": len(leaves) - 1}
        _check_keys(v.keys, path)
        nodes = [walk(child, (*path, step)) for step, child in zip(v.steps, v.children, strict=True)]
        if v.kind == "box":
            return nodes[0]
        if v.kind in ("list", "tuple"):
            return {v.kind: nodes}
        items = [[key, node] for key, node in zip(v.keys, nodes, strict=True)]
        named = {"type": f"{type(x).__module__}.{type(x).__qualname__}"} if v.kind == "container" else {}
        return {v.kind: items, **named}

    return walk(tree, ()), leaves


def _check_keys(keys: Sequence[Any], path: tuple[Any, ...]) -> None:
    for key in keys:
        if type(key) not in (str, int, bool):
            raise TypeError(
                f"`{path_str(path)}` of the tree has the key {key!r}: a checkpoint keeps strings and integers"
            )
    if len({(type(key), key) for key in keys}) < len(keys):
        raise ValueError(f"`{path_str(path)}` of the tree has two children of the same key among {list(keys)}")


def decode_tree(node: Any, leaves: Sequence[Any], where: str) -> Any:
    """Puts a tree together.

    Args:
      node: from `encode_tree`, as the file has it.
      leaves: its leaves.
      where: what errors call the file.

    Returns:
      The tree of dictionaries, lists, tuples and None.

    Raises:
      ValueError: a node that `encode_tree` does not write.
    """
    kind, children = _children(node, len(leaves), where)
    if kind == "none":
        return None
    if kind == "leaf":
        return leaves[node["leaf"]]
    nodes = [decode_tree(child, leaves, where) for _, child in children]
    if kind in ("list", "tuple"):
        return nodes if kind == "list" else tuple(nodes)
    return dict(zip((key for key, _ in children), nodes, strict=True))


def _children(node: Any, count: int, where: str) -> tuple[str, list[tuple[Key, Any]]]:
    """The kind of a node of the file and its children by key."""
    if node is None:
        return "none", []
    if isinstance(node, dict):
        for kind in ("dict", "container"):
            items = node.get(kind)
            if isinstance(items, list) and all(map(_is_item, items)):
                return kind, [(key, child) for key, child in items]
        for kind in ("list", "tuple"):
            if isinstance(node.get(kind), list):
                return kind, list(enumerate(node[kind]))
        if type(node.get("leaf")) is int and 0 <= node["leaf"] < count:
            return "leaf", []
    raise ValueError(f"{where} has a `tree` with a node that means nothing, {str(node)[:60]}: the file is damaged")


def _is_item(item: Any) -> bool:
    return isinstance(item, list) and len(item) == 2 and type(item[0]) in (str, int, bool)


def decode_like(node: Any, leaves: Sequence[Any], like: Any, where: str, fits: Callable[[Any, Any, str], None]) -> Any:
    """Puts a tree together in the containers of another one.

    Args:
      node: from `encode_tree`, as the file has it.
      leaves: its leaves.
      like: a tree with the same keys. A `QTensor` takes the place of anything.
      where: what errors call the file.
      fits: called with a leaf, what `like` has in its place, and the path; raises if they do not go together.

    Returns:
      The tree.

    Raises:
      ValueError: `like` has other keys, or a container where the file has an array.
    """

    def walk(node: Any, like: Any, path: tuple[Any, ...]) -> Any:
        v = view(like)
        if v.kind == "box":
            return v.rebuild([walk(node, v.children[0], (*path, *v.steps))])
        kind, children = _children(node, len(leaves), where)
        if kind == "leaf":
            leaf = leaves[node["leaf"]]
            if v.kind != "leaf" and not isinstance(leaf, QTensor):
                raise ValueError(f"`like` has a {type(like).__name__} at {_at(path)}, where {where} has a leaf")
            fits(leaf, like, path_str(path))
            return leaf
        found = dict(children)
        if v.kind == "leaf" or (v.kind == "none") != (kind == "none") or set(found) != set(v.keys):
            raise ValueError(f"`like` {_describe(v, like)} at {_at(path)}, where {where} has {_keys(found, kind)}")
        if v.kind == "none":
            return None
        steps = zip(v.keys, v.steps, v.children, strict=True)
        return v.rebuild([walk(found[key], child, (*path, step)) for key, step, child in steps])

    return walk(node, like, ())


def _at(path: tuple[Any, ...]) -> str:
    return f"`{path_str(path)}`" if path else "its top"


def _describe(v: View, like: Any) -> str:
    if v.kind == "none":
        return "has None"
    return f"has a {type(like).__name__}" if v.kind == "leaf" else f"has the keys {list(v.keys)[:20]}"


def _keys(found: dict[Key, Any], kind: str) -> str:
    return "None" if kind == "none" else f"the keys {list(found)[:20]}"
