"""Files that are whole or not there, and arrays in them. Bytes as they lie in memory: no pickle, nothing is executed."""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes  # importing it teaches NumPy the names of the small floats  # noqa: F401
import numpy as np


def flush_to_disk(path: Path) -> None:
    """Waits until a file's (or folder's entries') bytes are on the disk, so that a rename never outruns them."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_whole(path: Path, chunks: Iterable[Any]) -> None:
    """Writes a file in one step: whoever looks, also after a kill or a power cut, sees all of it or what was there before.

    Args:
      path: the file; its folder exists.
      chunks: bytes, one after the other.
    """
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            for chunk in chunks:
                file.write(chunk)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:  # tidies up and raises on
        temporary.unlink(missing_ok=True)
        raise
    flush_to_disk(path.parent)


def raw(x: Any) -> np.ndarray:
    """The bytes of an array in C order, uint8, without a copy where it lies in host memory already.

    >>> raw(np.float32([1.0])).tolist()
    [0, 0, 128, 63]
    """
    return np.ascontiguousarray(np.asarray(x)).reshape(-1).view(np.uint8)


def write_arrays(path: Path, arrays: Mapping[str, Any], remarks: Iterable[str] = ()) -> None:
    """Writes arrays and remarks to one file, in one step.

    A line of JSON says what there is, with a checksum; then the arrays' bytes follow one another.

    Args:
      path: the file.
      arrays: by name; of any dtype that NumPy or ml_dtypes has.
      remarks: strings to keep with them.
    """
    chunks = {name: np.asarray(x) for name, x in arrays.items()}
    digest = hashlib.sha256()
    for x in chunks.values():
        digest.update(raw(x).data)
    entries = {name: [x.dtype.name, list(x.shape)] for name, x in chunks.items()}
    head = json.dumps({"arrays": entries, "remarks": list(remarks), "sha256": digest.hexdigest()})
    write_whole(path, [head.encode("ascii") + b"\n", *(raw(x).data for x in chunks.values())])


def read_arrays(path: Path) -> tuple[dict[str, np.ndarray], tuple[str, ...]]:
    """Reads what `write_arrays` wrote.

    Args:
      path: the file.

    Returns:
      (arrays by name, remarks).

    Raises:
      ValueError: the file is damaged; naming it.

    >>> import tempfile
    >>> file = Path(tempfile.mkdtemp(), "a")
    >>> write_arrays(file, {"x": np.int8([1, 2])}, ["said"])
    >>> read_arrays(file)
    ({'x': array([1, 2], dtype=int8)}, ('said',))
    """
    line, _, body = path.read_bytes().partition(b"\n")
    try:
        head = json.loads(line)
        arrays, at = {}, 0
        for name, (dtype, shape) in head["arrays"].items():
            end = at + np.dtype(dtype).itemsize * math.prod(shape)
            arrays[name] = np.frombuffer(body[at:end], np.dtype(dtype)).reshape(shape)
            at = end
        sound = at == len(body) and hashlib.sha256(body).hexdigest() == head["sha256"]
        remarks = tuple(map(str, head["remarks"]))
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"`{path}` is damaged ({error}): remove it, and what it holds is computed again") from error
    if not sound:
        raise ValueError(f"`{path}` is damaged, it does not have its own checksum: remove it, and what it holds is computed again")
    return arrays, remarks
