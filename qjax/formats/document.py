"""The JSON document of a checkpoint: all that is known about it, sealed with its own checksum.

    {"format": "qjax-checkpoint", "layout": 1, "sha256": ..., and the entries of `Document`}

The checksum is over the rest of the document in canonical form (sorted keys, no spaces), so any change of content is
noticed and a change of white space is not.
"""

import hashlib
import importlib.metadata
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np

from qjax.core import ARRAYS, PRODUCT_ARRAYS, ActSpec, OnlineRotation, Spec
from qjax.formats.typed_json import decode, encode
from qjax.policy import Policy
from qjax.report import Report

FORMAT = "qjax-checkpoint"
LAYOUT = 1


@dataclass(frozen=True)
class ArrayEntry:
    """An array: its shape, the name of its dtype, and the SHA-256 of its bytes in C order, little-endian."""

    shape: tuple[int, ...]
    dtype: str
    sha256: str


@dataclass(frozen=True)
class FileEntry:
    """A file of the array folder. `sha256` is None where the file is an array's bytes, which `ArrayEntry` covers."""

    size: int
    sha256: str | None


@dataclass(frozen=True)
class Packed:
    """A `QTensor`: its static fields, and the names of the arrays that are its children."""

    spec: Spec
    axes: tuple[int, ...]
    sizes: tuple[int, ...]
    dtype: str
    codes: str
    scale: str | None
    zero_point: str | None
    perm: str | None
    act_scale: str | None = None
    act_zero_point: str | None = None
    act: ActSpec | None = None
    input_scale: str | None = None
    nested_scale: str | None = None
    nested_offset: str | None = None
    rotation: OnlineRotation | None = None
    levels: str | None = None
    adapter_left: str | None = None
    adapter_right: str | None = None

    @property
    def children(self) -> dict[str, str]:
        """Which array stands for which field."""
        return {name: getattr(self, name) for name in ARRAYS if getattr(self, name) is not None}


@dataclass(frozen=True)
class Leaf:
    """A leaf of the tree: a `QTensor`, or the name of an array, or a Python number or string.

    With `key`, the name of a generator, the array holds the data of random keys (`jax.random.key_data`).
    """

    path: str
    packed: Packed | None = None
    array: str | None = None
    key: str | None = None
    value: bool | int | float | str | None = None


@dataclass(frozen=True)
class StoredProduct:
    """A product of two activations: its name, what its operands become, and the names of the arrays of static ranges."""

    name: str
    lhs: ActSpec
    rhs: ActSpec
    lhs_scale: str | None = None
    lhs_zero_point: str | None = None
    rhs_scale: str | None = None
    rhs_zero_point: str | None = None
    rotation: OnlineRotation | None = None

    @property
    def children(self) -> dict[str, str]:
        """Which array stands for which field."""
        return {name: getattr(self, name) for name in PRODUCT_ARRAYS if getattr(self, name) is not None}


@dataclass(frozen=True)
class Source:
    """Where the numbers came from: a SHA-256, and of what: "float parameters" or "packed arrays"."""

    sha256: str
    of: str


@dataclass(frozen=True)
class Document:
    """What a checkpoint holds.

    Attributes:
      written_by: versions of qjax, jax, orbax-checkpoint and numpy.
      source: the fingerprint of the parameters.
      folder: the folder of the arrays, beside the document; None when there is no array.
      tree: the containers, see `qjax.formats.tree`.
      leaves: the leaves of the tree, in its order.
      arrays: the arrays by name.
      files: the files of the array folder by relative path.
      policy, report: of the `Result`; None for a bare tree.
      metadata: the caller's own.
      sites: the products of two activations of the `Result`.
    """

    written_by: dict[str, str]
    source: Source
    folder: str | None
    tree: Any
    leaves: tuple[Leaf, ...]
    arrays: dict[str, ArrayEntry]
    files: dict[str, FileEntry]
    policy: Policy | None
    report: Report | None
    metadata: dict[str, Any]
    sites: tuple[StoredProduct, ...] = ()


def versions() -> dict[str, str]:
    """Returns the versions that a checkpoint is written with."""

    orbax = importlib.metadata.version("orbax-checkpoint")
    return {"qjax": importlib.metadata.version("qjax"), "jax": jax.__version__, "orbax-checkpoint": orbax, "numpy": np.__version__}


def write_document(document: Document) -> bytes:
    """Serializes and seals a document.

    Args:
      document: it.

    Returns:
      The bytes of the file.
    """
    entries = encode(document)
    entries = {key: _plain(value) if key in ("leaves", "policy", "report", "sites") else value for key, value in entries.items()}
    body = {"format": FORMAT, "layout": LAYOUT, **{key: v for key, v in entries.items() if key != "sites" or v}}
    lines = [f"{json.dumps(name)}: {_lines(value)}" for name, value in {**body, "sha256": digest(body)}.items()]
    return ("{\n" + ",\n".join(lines) + "\n}\n").encode("ascii")


# Entries that came after the layout was first published, and what one that is missing means. They are left out where they say
# no more than that: a reader that does not know them, and refuses what it does not know, reads the file as long as it can.
_LATER = {
    "input_scale": None,
    "outliers": None,
    "unfoldable": "leave",
    "what": "parameter",
    "kernel_reasons": [],
    "memory": {},
    "zero_dtype": "int",
    "cache": None,
    "nested_scale": None,
    "nested_offset": None,
    "double_quant": False,
    "scale_rule": "absmax",  # of tables; "half" is that of integers
    "rotation": None,
    "levels": None,
    "adapter_left": None,
    "adapter_right": None,
    "train": None,
    "turns": 1,  # of low-rank parts
    "activation_bits": [],
}


def _plain(value: Any) -> Any:
    """A part of a document without the later entries that are as if missing."""
    if isinstance(value, dict):
        return {key: _plain(v) for key, v in value.items() if key not in _LATER or v != _LATER[key]}
    return [_plain(v) for v in value] if isinstance(value, list) else value


def _lines(value: Any) -> str:
    """JSON with every entry of a list or dictionary on a line of its own, for people who look."""
    if isinstance(value, dict) and value:
        return "{\n " + ",\n ".join(f"{json.dumps(key)}: {json.dumps(v)}" for key, v in value.items()) + "\n}"
    if isinstance(value, list) and value:
        return "[\n " + ",\n ".join(map(json.dumps, value)) + "\n]"
    return json.dumps(value)


def read_document(file: Path) -> Document:
    """Reads a document, checks its seal and every entry's type.

    Args:
      file: the JSON file.

    Returns:
      The document.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: it is not a checkpoint's document, is damaged, or has a newer layout; names the file.
    """
    body = read_json(file)
    layout = body.get("layout")
    if type(layout) is not int or layout < 1:
        raise ValueError(f"`{file}` has the layout {layout!r}, which never was: the file is damaged")
    if layout > LAYOUT:
        writer = body.get("written_by")
        version = writer.get("qjax") if isinstance(writer, dict) else None
        remedy = f"install qjax {version} or later" if isinstance(version, str) else "install the newest qjax"
        ours = versions()["qjax"]
        raise ValueError(f"`{file}` has the layout {layout}, qjax {ours} reads layouts up to {LAYOUT}: {remedy}")
    sealed = body.pop("sha256", None)
    if sealed != digest(body):
        raise ValueError(f"`{file}` is damaged: it does not have its own checksum; restore it from a copy")
    entries = {name: value for name, value in body.items() if name not in ("format", "layout")}
    return decode(Document, entries, f"`{file}`")


def read_json(file: Path) -> dict[str, Any]:
    """Reads the file of a checkpoint's document, of any layout, and checks only that it is one.

    Args:
      file: the JSON file.

    Returns:
      Its content.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: it is not JSON, or another kind of JSON.
    """
    if not file.is_file():
        raise FileNotFoundError(f"`{file}` does not exist: `{file.parent}` holds no checkpoint of qjax")
    try:
        body = json.loads(file.read_bytes())
    except (ValueError, RecursionError) as error:  # ValueError covers bad UTF-8 and bad JSON
        text = str(error).splitlines()[0]
        raise ValueError(f"`{file}` is damaged, it is not JSON ({text}): restore it from a copy") from error
    if not isinstance(body, dict) or body.get("format") != FORMAT:
        raise ValueError(f"`{file}` is not the document of a qjax checkpoint: it lacks the format {FORMAT!r}")
    return body


def digest(value: Any) -> str:
    """Returns the SHA-256 of a JSON value in canonical form.

    >>> digest({"b": 1, "a": 2}) == digest({"a": 2, "b": 1})
    True
    """
    return hashlib.sha256(json.dumps(value, sort_keys=True, separators=(",", ":")).encode("ascii")).hexdigest()


def plain_json(value: Any, where: str) -> Any:
    """Checks that a caller's value is JSON as it stands; tuples become lists.

    Args:
      value: dicts with string keys, lists, tuples, finite numbers, strings, booleans, None.
      where: what errors call it.

    Returns:
      A copy.

    Raises:
      TypeError, ValueError: naming the place that is something else.

    >>> plain_json({"layers": (1, 2)}, "metadata")
    {'layers': [1, 2]}
    """
    if isinstance(value, dict):
        for key in value:
            if type(key) is not str:
                raise TypeError(f"`{where}` has the key {key!r}: JSON has only strings for keys")
        return {key: plain_json(v, f"{where}[{key!r}]") for key, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain_json(v, f"{where}[{i}]") for i, v in enumerate(value)]
    if type(value) is float and not math.isfinite(value):
        raise ValueError(f"`{where}` is {value}, which JSON cannot hold: store it as a string")
    if value is None or type(value) in (bool, int, float, str):
        return value
    raise TypeError(f"`{where}` is a {type(value).__name__}, which JSON cannot hold: store numbers and strings")
