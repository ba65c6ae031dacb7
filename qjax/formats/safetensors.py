"""Reading and writing safetensors files, one file or shards with an index.

The `safetensors` package parses and checks the bytes (header length, offsets against shapes, file length) and maps the
file, so nothing is allocated on the word of a header. This file adds what a checkpoint folder needs: the index of
shards, errors of one line that name the file and the remedy, and writes that are whole or absent.
"""

import json
import math
import os
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes  # importing it teaches NumPy the name "bfloat16", which the safetensors package asks NumPy for
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from qjax.disk import flush_to_disk

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"

FLOAT_DTYPES: dict[str, np.dtype] = {
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}
_ITEM_SIZES = {"F64": 8, "I64": 8, "U64": 8, "F32": 4, "I32": 4, "U32": 4, "F16": 2, "BF16": 2, "I16": 2, "U16": 2}


@dataclass(frozen=True)
class TensorInfo:
    """Where a tensor lies and what its header says: nothing of its data is read.

    Attributes:
      file: the safetensors file that holds the tensor.
      dtype: the format's own name of the element type ("BF16", "F32", "I8", ...).
      shape: sizes of the axes.
    """

    file: Path
    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor in the file (types this project does not read count as one byte an element)."""
        return math.prod(self.shape) * _ITEM_SIZES.get(self.dtype, 1)


def read_json(path: Path) -> dict[str, Any]:
    """Reads a JSON file that holds an object.

    Args:
      path: the file.

    Returns:
      The object.

    Raises:
      FileNotFoundError: no such file.
      ValueError: the file is not UTF-8 JSON, or holds something other than an object.
    """
    if not path.is_file():
        raise FileNotFoundError(f"`{path}` is missing: give the folder of a complete checkpoint")
    try:
        value = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:  # ValueError covers bad UTF-8 and bad JSON
        raise ValueError(f"`{path}` is not readable JSON ({_one_line(error)}): copy or download it again") from error
    if not isinstance(value, dict):
        raise ValueError(f"`{path}` must hold a JSON object, not a {type(value).__name__}: copy or download it again")
    return value


def tensor_index(folder: str | os.PathLike[str]) -> dict[str, TensorInfo]:
    """Lists the tensors of a checkpoint folder from the headers alone.

    Reads `model.safetensors` if there is one, else the shards that `model.safetensors.index.json` names.

    Args:
      folder: a folder with a Hugging Face style checkpoint.

    Returns:
      A TensorInfo for every tensor, by name, shard after shard.

    Raises:
      FileNotFoundError: the folder, both files, or a shard is missing.
      ValueError: a file is truncated or damaged, or the index and the shards disagree.

    Source: the safetensors format description; the index is the one that transformers writes.
    """
    root = Path(folder)
    if not root.is_dir():
        raise FileNotFoundError(f"`folder` {str(root)!r} is not a folder: give the folder of a checkpoint")
    if (root / SINGLE_FILE).is_file():
        return read_header(root / SINGLE_FILE)
    if not (root / INDEX_FILE).is_file():
        raise FileNotFoundError(
            f"`{root}` holds neither {SINGLE_FILE} nor {INDEX_FILE}: convert it to safetensors first"
        )
    return _sharded_index(root)


def read_header(path: str | os.PathLike[str]) -> dict[str, TensorInfo]:
    """Lists the tensors of one safetensors file.

    Args:
      path: the file.

    Returns:
      A TensorInfo for every tensor, by name.

    Raises:
      FileNotFoundError: no such file.
      ValueError: the file is truncated or damaged.

    Example:
      >>> import tempfile, pathlib
      >>> path = pathlib.Path(tempfile.mkdtemp()) / "model.safetensors"
      >>> write_tensors(path, {"w": np.zeros((2, 3), np.float32)})
      >>> read_header(path)["w"].dtype, read_header(path)["w"].shape
      ('F32', (2, 3))
    """
    file = Path(path)
    with _open(file) as handle:
        slices = {name: handle.get_slice(name) for name in handle.keys()}  # noqa: SIM118 (not a mapping)
        return {name: TensorInfo(file, s.get_dtype(), tuple(s.get_shape())) for name, s in slices.items()}


def read_metadata(path: str | os.PathLike[str]) -> dict[str, str]:
    """The strings that the header of one safetensors file keeps beside its tensors.

    Args:
      path: the file.

    Returns:
      Them by name, as `write_tensors` was given them; "format" is among them.

    Raises:
      FileNotFoundError: no such file.
      ValueError: the file is truncated or damaged.
    """
    with _open(Path(path)) as handle:
        return dict(handle.metadata() or {})


def iterate_tensors(index: Mapping[str, TensorInfo]) -> Iterator[tuple[str, np.ndarray]]:
    """Reads tensors one after the other, each shard opened once; only one tensor is in memory at a time.

    Args:
      index: the tensors wanted, from `tensor_index` or `read_header`.

    Yields:
      Name and array, in the stored dtype (bfloat16 as ml_dtypes.bfloat16).

    Raises:
      ValueError: a file is damaged, or a tensor's dtype is not one NumPy has.
    """
    files: dict[Path, list[str]] = {}
    for name, info in index.items():
        files.setdefault(info.file, []).append(name)
    for file, names in files.items():
        with _open(file) as handle:
            for name in names:
                yield name, _read(handle, name, index[name])


def read_tensors(path: str | os.PathLike[str]) -> dict[str, np.ndarray]:
    """Reads a whole safetensors file.

    Args:
      path: the file.

    Returns:
      Every tensor by name, in its stored dtype.

    Raises:
      FileNotFoundError: no such file.
      ValueError: the file is truncated or damaged, or holds a dtype NumPy has not.
    """
    return dict(iterate_tensors(read_header(path)))


def write_tensors(
    path: str | os.PathLike[str], tensors: Mapping[str, np.ndarray], metadata: Mapping[str, str] | None = None
) -> None:
    """Writes a safetensors file under a temporary name, flushes it to disk and renames it.

    A reader sees the old file or the new one, never half of one; a failed write leaves nothing behind.

    Args:
      path: the file to write; an existing one is replaced.
      tensors: arrays by name; their strides do not matter.
      metadata: strings to keep in the header; "format" is always written, as transformers refuses files without it.

    Raises:
      OSError: the file cannot be written.
      TypeError: a tensor is not a NumPy array.
    """
    file = Path(path)
    for name, tensor in tensors.items():
        if not isinstance(tensor, np.ndarray):
            raise TypeError(f"`tensors[{name!r}]` is a {type(tensor).__name__}: give a NumPy array, np.asarray(...)")
    # safetensors 0.8 writes a strided array's memory as it lies, which is silently another matrix.
    contiguous = {name: np.ascontiguousarray(tensor).reshape(tensor.shape) for name, tensor in tensors.items()}
    descriptor, temporary = tempfile.mkstemp(prefix=f".{file.name}.", suffix=".tmp", dir=file.parent)
    os.close(descriptor)
    try:
        _save(contiguous, temporary, {"format": "pt", **(metadata or {})})
        os.chmod(temporary, 0o644)
        flush_to_disk(Path(temporary))
        os.replace(temporary, file)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def _sharded_index(root: Path) -> dict[str, TensorInfo]:
    weight_map = read_json(root / INDEX_FILE).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(shard, str) for shard in weight_map.values()):
        raise ValueError(f"`{root / INDEX_FILE}` has no `weight_map` from names to files: copy or download it again")
    found: dict[str, TensorInfo] = {}
    for shard in dict.fromkeys(weight_map.values()):
        if Path(shard).name != shard or "\0" in shard:  # a name like ../../x would leave the folder
            raise ValueError(
                f"`{root / INDEX_FILE}` names the shard {shard!r}: a shard must be a file of the same folder"
            )
        header = read_header(root / shard)
        for name in header:
            if weight_map.get(name) != shard:
                raise ValueError(
                    f"`{root / shard}` holds {name!r}, which {INDEX_FILE} does not place there: download again"
                )
        found |= header
    for name, shard in weight_map.items():
        if name not in found:
            raise ValueError(
                f"`{root / shard}` lacks {name!r}, which {INDEX_FILE} places there: download the shard again"
            )
    return found


def _open(file: Path) -> Any:
    if not file.is_file():
        raise FileNotFoundError(f"`{file}` is missing: copy or download the checkpoint again")
    try:
        return safe_open(file, framework="np")
    except (SafetensorError, OSError) as error:
        raise ValueError(f"`{file}` is truncated or damaged ({_one_line(error)}): copy or download it again") from error


def _read(handle: Any, name: str, info: TensorInfo) -> np.ndarray:
    try:
        tensor = handle.get_tensor(name)
    except (SafetensorError, TypeError, AttributeError) as error:  # the last two: a dtype NumPy does not know
        message = f"tensor {name!r} of `{info.file}` with dtype {info.dtype} cannot be read ({_one_line(error)})"
        raise ValueError(f"{message}: store it as F32, F16 or BF16") from error
    if tensor.shape != info.shape:
        raise ValueError(f"`{info.file}` changed while it was read (tensor {name!r}): load it again")
    return tensor


def _save(tensors: dict[str, np.ndarray], path: str, metadata: dict[str, str]) -> None:
    try:
        save_file(tensors, path, metadata=metadata)
    except SafetensorError as error:  # a full disk comes as this, without the name
        raise OSError(f"`{path}` cannot be written ({_one_line(error)}): free space, or give another folder") from error


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__
