"""A folder of arrays, written and read by Orbax: one Zarr array each, uncompressed, in a folder of its name.

Packed codes do not compress, so every array's bytes lie in the file as they are in memory. That lets the reader compare
the sizes of the files with what the document says before it allocates anything.
"""

import contextlib
import hashlib
import json
import logging
import math
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import ml_dtypes  # importing it teaches NumPy the names of the small floats  # noqa: F401
import numpy as np

from qjax.disk import flush_to_disk
from qjax.formats.document import ArrayEntry, FileEntry

# What both NumPy and the Zarr driver of TensorStore have.
DTYPES = frozenset({
    "bool", "int2", "int4", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64",
    "float16", "float32", "float64", "bfloat16", "complex64", "complex128", "float4_e2m1fn", "float8_e3m4",
    "float8_e4m3b11fnuz", "float8_e4m3fn", "float8_e4m3fnuz", "float8_e5m2", "float8_e5m2fnuz", "float8_e8m0fnu",
})  # fmt: skip
# Arrays are read, checked and placed this many bytes at a time, so that host and device never hold everything twice.
READ_BYTES = 256 << 20


def sha256s(arrays: Iterable[np.ndarray]) -> list[str]:
    """Returns the SHA-256 of every array's bytes, in C order.

    >>> sha256s([np.zeros(3, np.uint8)])[0][:8]
    '709e80c8'
    """

    def one(a: np.ndarray) -> str:
        return hashlib.sha256(np.ascontiguousarray(a).reshape(-1).view(np.uint8).data).hexdigest()

    with ThreadPoolExecutor() as pool:  # hashing lets go of the interpreter lock
        return list(pool.map(one, arrays))


def check_entries(arrays: Mapping[str, ArrayEntry], where: str) -> None:
    """Checks that what a document says of its arrays can be true.

    Args:
      arrays: by name.
      where: what errors call the file.

    Raises:
      ValueError: a name that is no file name, an unknown dtype, a shape that no array has.
    """
    for name, entry in arrays.items():
        if not re.fullmatch(r"[0-9A-Za-z_-][0-9A-Za-z_.-]*", name):
            raise ValueError(f"{where} has an array named {name!r}, which is not a name that this layout gives")
        if entry.dtype not in DTYPES:
            raise ValueError(f"{where} has the array {name!r} of {entry.dtype!r}: a newer qjax may know this dtype")
        # TensorStore and NumPy count elements in 64 bits; zeros do not hide what is too large.
        if (
            any(n < 0 for n in entry.shape)
            or math.prod(max(n, 1) for n in entry.shape) >= 2**60
            or len(entry.shape) > 32
        ):
            raise ValueError(f"{where} has the array {name!r} of shape {entry.shape}, which no array has")


def nbytes(entry: ArrayEntry) -> int:
    """Returns the bytes of an array."""
    return math.prod(entry.shape) * np.dtype(entry.dtype).itemsize


def write_arrays(folder: Path, arrays: Mapping[str, np.ndarray]) -> dict[str, FileEntry]:
    """Writes arrays to a new folder and waits until they are on the disk.

    The folder appears under its name in one step, when it is complete.

    Args:
      folder: does not exist.
      arrays: by name; none is empty; dtypes of `DTYPES`.

    Returns:
      The files of the folder, by relative path.
    """

    def save(checkpointer: Any, args: Any) -> None:
        checkpointer.save(folder, args=args.PyTreeSave(dict(arrays)))

    _with_orbax(save)
    # Orbax notes the absolute path in it, which is nobody's business once a checkpoint is passed on.
    mark = folder / "commit_success.txt"
    if mark.is_file():
        mark.write_text("Checkpoint commit was successful")
    files = {}
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        name = path.relative_to(folder).as_posix()
        files[name] = FileEntry(path.stat().st_size, None if _is_data(name, arrays) else _file_sha256(path))
    _sync(folder)
    return files


def check_arrays(folder: Path, arrays: Mapping[str, ArrayEntry], files: Mapping[str, FileEntry]) -> None:
    """Compares a folder with the document: files, sizes, and what the metadata files say. Allocates no array.

    Args:
      folder: from `write_arrays`.
      arrays: the document's arrays, none of them empty.
      files: the document's files.

    Raises:
      FileNotFoundError: a file is missing.
      ValueError: a file or an array is not what the document says; names the file.
    """
    data: dict[str, list[int]] = {name: [] for name in arrays}
    for name, entry in files.items():
        path = folder / name
        if any(part in ("", "..") for part in name.split("/")) or not path.is_relative_to(folder):
            raise ValueError(f"`{folder}` cannot have a file {name!r}: the document is damaged")
        if not path.is_file():
            raise FileNotFoundError(f"`{path}` is missing: restore it from a copy")
        if path.stat().st_size != entry.size:
            raise ValueError(
                f"`{path}` is damaged: it has {path.stat().st_size} bytes, not {entry.size}; restore it from a copy"
            )
        if _is_data(name, arrays):
            data[name.split("/")[0]].append(entry.size)
        elif _file_sha256(path) != entry.sha256:
            raise ValueError(
                f"`{path}` is damaged: it does not have the checksum of the document; restore it from a copy"
            )
    for name, entry in arrays.items():
        if f"{name}/.zarray" not in files:
            raise ValueError(f"`{folder / name}` holds no array: the document is damaged")
        _check_zarr(folder / name / ".zarray", entry, data[name])


def _check_zarr(file: Path, entry: ArrayEntry, sizes: list[int]) -> None:
    """Compares the metadata of one array, and the sizes of its files, with the document."""
    found = _zarray(file)
    shape, chunks = list(entry.shape), found.get("chunks")
    if not isinstance(chunks, list) or len(chunks) != len(shape) or not all(type(c) is int and c > 0 for c in chunks):
        raise ValueError(f"`{file}` does not say into what chunks the array is cut: restore it from a copy")
    if found.get("shape") != shape or found.get("compressor") or found.get("filters"):
        raise ValueError(f"`{file}` is not of an uncompressed array of shape {tuple(shape)}, as the document says")
    itemsize = np.dtype(entry.dtype).itemsize
    if found.get("dtype") not in (entry.dtype, np.dtype(entry.dtype).str):
        raise ValueError(f"`{file}` is of an array of {found.get('dtype')!r}, the document says {entry.dtype}")
    pieces = math.prod(-(-n // c) for n, c in zip(shape, chunks, strict=True))
    if len(sizes) != pieces or any(size != math.prod(chunks) * itemsize for size in sizes):
        raise ValueError(f"`{file.parent}` holds {sum(sizes)} bytes in {len(sizes)} files, not {nbytes(entry)} as the "
                         "document says: restore it from a copy")  # fmt: skip


def _zarray(file: Path) -> dict[str, Any]:
    try:
        found = json.loads(file.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"`{file}` is damaged, it is not JSON: restore it from a copy") from error
    if not isinstance(found, dict):
        raise ValueError(f"`{file}` is damaged, it is no JSON object: restore it from a copy")
    return found


def read_arrays(
    folder: Path, arrays: Mapping[str, ArrayEntry], place: Callable[[str, np.ndarray], Any], verify: bool
) -> dict[str, Any]:
    """Reads arrays, a few at a time.

    Args:
      folder: checked by `check_arrays`.
      arrays: what to read; none is empty.
      place: takes a name and the array in host memory and puts it where it belongs.
      verify: compare the bytes with the checksums.

    Returns:
      What `place` returned, by name.

    Raises:
      ValueError: an array cannot be read, or its bytes are not those that were written; names its folder.
    """
    placed = {}
    for names in _groups(arrays):
        read = _read(folder, names)
        for name in names:
            if read[name].shape != arrays[name].shape or read[name].dtype != np.dtype(arrays[name].dtype):
                raise ValueError(f"`{folder / name}` is damaged: it holds {read[name].dtype}{list(read[name].shape)}")
        if verify:
            for name, found in zip(names, sha256s(read[name] for name in names), strict=True):
                if found != arrays[name].sha256:
                    raise ValueError(
                        f"`{folder / name}` is damaged: its bytes do not have the checksum of the document; "
                        "restore it from a copy"
                    )
        for name in names:
            placed[name] = place(name, read.pop(name))
    return placed


def _groups(arrays: Mapping[str, ArrayEntry]) -> Iterator[list[str]]:
    group, size = [], 0
    for name, entry in arrays.items():
        if group and size + nbytes(entry) > READ_BYTES:
            yield group
            group, size = [], 0
        group.append(name)
        size += nbytes(entry)
    if group:
        yield group


def _read(folder: Path, names: list[str]) -> dict[str, np.ndarray]:
    def restore(checkpointer: Any, args: Any) -> Any:
        from orbax.checkpoint import RestoreArgs

        item, how = dict.fromkeys(names, 0), {name: RestoreArgs(restore_type=np.ndarray) for name in names}
        return checkpointer.restore(folder, args=args.PyTreeRestore(item=item, restore_args=how, partial_restore=True))

    try:
        return _with_orbax(restore)
    # Orbax promises no exception type for a folder that is not what it wrote.
    except (ValueError, TypeError, KeyError, AttributeError, OSError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ValueError(f"`{folder}` cannot be read ({reason}): restore it from a copy") from error


def _with_orbax(use: Callable[[Any, Any], Any]) -> Any:
    """Calls `use(checkpointer, orbax.checkpoint.args)` in a thread of its own.

    Orbax sets the event loop of the thread it runs in, and patches asyncio where a loop is running already.
    """
    # It takes a second to import, which nobody should pay who only imports qjax.
    import orbax.checkpoint as ocp
    from orbax.checkpoint.type_handlers import NumpyHandler, create_type_handler_registry

    def run() -> Any:
        # A registry of our own: what a user registers globally does not change the layout. Nobody changes the arrays
        # while they are written, so no copies.
        registry = create_type_handler_registry((np.ndarray, NumpyHandler(deepcopy_host_arrays=False)))
        handler = ocp.PyTreeCheckpointHandler(
            use_ocdbt=False, use_zarr3=False, use_compression=False, type_handler_registry=registry
        )
        with ocp.Checkpointer(handler) as checkpointer:
            return use(checkpointer, ocp.args)

    with _quiet(), ThreadPoolExecutor(1, thread_name_prefix="qjax-checkpoint") as pool:
        return pool.submit(run).result()


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Drops what Orbax logs meanwhile: remarks on what we chose on purpose, and errors that it raises as well."""

    def keep(record: logging.LogRecord) -> bool:
        return f"{os.sep}orbax{os.sep}" not in record.pathname

    logger = logging.getLogger("absl")
    logger.addFilter(keep)
    try:
        yield
    finally:
        logger.removeFilter(keep)


def _is_data(name: str, arrays: Mapping[str, Any]) -> bool:
    folder, _, file = name.partition("/")
    return folder in arrays and "/" not in file and not file.startswith(".")


def _file_sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _sync(folder: Path) -> None:
    """Waits until every file and folder is on the disk."""
    for path in (folder, *folder.rglob("*")):
        flush_to_disk(path)
