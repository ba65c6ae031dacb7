"""Packed checkpoints: `save` and `load`.

A checkpoint is a folder with one document, `qjax.json`, and the folder of arrays that the document names, `arrays.<n>`.
A save writes the arrays to a folder with a new number (Orbax writes beside it and renames), then replaces the document
(one rename, the moment at which the new checkpoint exists), then removes the arrays of the previous one. So a save that
dies leaves what was there before, and at most a folder that the next save removes.
"""

import contextlib
import os
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Sharding

from qjax.core import QTensor
from qjax.core.specs import check_flag
from qjax.disk import flush_to_disk
from qjax.formats import document as doc
from qjax.formats.arrays import check_arrays, check_entries, nbytes, read_arrays, write_arrays
from qjax.formats.document import Document, Source
from qjax.formats.leaves import (
    abstract_leaves,
    array_entries,
    array_shardings,
    describe,
    fingerprint_of,
    place,
    rebuild,
)
from qjax.formats.sites import check_sites, describe_sites, rebuild_sites
from qjax.formats.tree import decode_like, decode_tree, encode_tree
from qjax.ptq.quantize import Result
from qjax.report import Report

DOCUMENT = "qjax.json"
# Our own names beside the document: what a save may leave behind and the next one may remove.
_FOLDER = re.compile(r"arrays\.(\d{1,9})")
_UNFINISHED = ".orbax-checkpoint-tmp"
_OURS = re.compile(rf"arrays\.(\d{{1,9}})({re.escape(_UNFINISHED)}.*)?|{re.escape(DOCUMENT)}(\.tmp)?")


def save(
    path: str | os.PathLike[str],
    result: Any,
    *,
    metadata: dict[str, Any] | None = None,
    overwrite: bool = False,
    source_sha256: str | None = None,
) -> None:
    """Writes a packed checkpoint.

    It is on the disk when this returns.

    Args:
      path: a folder; made if it is missing. Nothing in it is touched but what a save made.
      result: what `qjax.quantize` returned, or a tree of parameters: containers of any kind, arrays, `QTensor`s, Python
        numbers and strings.
      metadata: what else to keep, as JSON: dictionaries, lists, strings, finite numbers. By default that of `result`.
      overwrite: replace a checkpoint at `path`. A save that dies leaves the previous one as it was.
      source_sha256: `fingerprint` of the float parameters, to tell later what they were; by default the document has
        the one of the packed arrays.

    Raises:
      FileExistsError: `path` holds something else, or a checkpoint and `overwrite` is False.
      TypeError: a leaf that cannot be stored (a random key, a function, a shape), or `metadata` that is not JSON.
      ValueError: an array that spans several processes or was deleted; a `QTensor` whose arrays do not fit its spec.

    Example:
      >>> import tempfile, jax.numpy as jnp, qjax
      >>> path = tempfile.mkdtemp()
      >>> qjax.save(path, {"w": jnp.arange(3.0), "names": ("a", None)}, metadata={"step": 7})
      >>> result = qjax.load(path)
      >>> result.params["w"].tolist(), result.params["names"], result.metadata
      ([0.0, 1.0, 2.0], ('a', None), {'step': 7})
    """
    folder = _local(path)
    check_flag("overwrite", overwrite)
    previous = _previous(folder, overwrite)
    given = result if isinstance(result, Result) else None
    if metadata is None:
        metadata = {} if given is None else given.metadata
    if not isinstance(metadata, dict):
        raise TypeError(f"`metadata` must be a dict, got {type(metadata).__name__}: write metadata={{'name': ...}}")
    kept = doc.plain_json(metadata, "metadata")
    tree, flat = encode_tree(result if given is None else given.params)
    leaves, arrays = describe(flat)
    sites, ranges = describe_sites({} if given is None else given.sites)
    arrays |= ranges
    entries = array_entries(arrays)
    full = {name: array for name, array in arrays.items() if array.size}
    name = _new_folder(folder) if full else None
    packed = Source(fingerprint_of(leaves, entries), "packed arrays")
    source = packed if source_sha256 is None else Source(source_sha256, "float parameters")
    folder.mkdir(parents=True, exist_ok=True)
    if previous is not None or not (folder / DOCUMENT).exists():  # else a newer layout, whose folders we do not know
        _sweep(folder, previous)
    with _removed_on_error(folder, name):
        files = {} if name is None else write_arrays(folder / name, full)
        document = Document(
            written_by=doc.versions(),
            source=source,
            folder=name,
            tree=tree,
            leaves=leaves,
            arrays=entries,
            files=files,
            policy=None if given is None else given.policy,
            report=None if given is None else given.report,
            metadata=kept,
            sites=sites,
        )
        _stage(folder, doc.write_document(document))
    _commit(folder)
    _sweep(folder, name)


def load(
    path: str | os.PathLike[str],
    *,
    like: Any = None,
    sharding: Sharding | Callable[[str, tuple[int, ...]], Sharding | None] | None = None,
    verify: bool = True,
) -> Result:
    """Reads a packed checkpoint. Needs no template, and runs nothing that the file says.

    Args:
      path: the folder.
      like: a tree in whose containers the parameters come back: the same keys, with arrays or shapes for leaves;
        anything may stand where the checkpoint has a `QTensor`. Without it dictionaries, lists, tuples and None come
        back as they were, other containers as dictionaries.
      sharding: where to put the arrays: one for all, or a callable of (path, logical shape) that returns one, or None
        for the default. For a `QTensor` it cuts the logical array; the packed arrays follow. By default the arrays go
        to the default device, uncommitted, as `jnp.asarray` puts them.
      verify: compare every array with its checksum.

    Returns:
      A `Result`, with `metadata` and `sites`. Saved from a bare tree it has an empty report and no policy. Numbers that the JAX
      configuration has no type for (float64 without `jax_enable_x64`) come back as NumPy arrays.

    Raises:
      FileNotFoundError: no checkpoint there, or a file of it is missing.
      ValueError: a damaged file; a newer layout; `like` of another structure; `sharding` that would cut a padded axis,
        a byte or a group. Everything is checked before an array is allocated, but for the checksums.

    Example:
      >>> import tempfile, jax.numpy as jnp, qjax
      >>> from qjax.core import int4, quantize
      >>> path = tempfile.mkdtemp()
      >>> qjax.save(path, {"w": quantize(jnp.eye(8), int4(), axes=(0,))})
      >>> qjax.load(path).params["w"]
      QTensor(int4(per="channel"), float32[8,8], 64 bytes, 8 bits/weight)
    """
    folder = _local(path)
    check_flag("verify", verify)
    document = read_document(folder)
    where = f"`{folder / DOCUMENT}`"
    full = {name: entry for name, entry in document.arrays.items() if nbytes(entry)}
    if full:
        check_arrays(_array_folder(folder, document), full, document.files)
    abstract = abstract_leaves(document, where)
    check_sites(document, where)
    _joined(document.tree, abstract, like, where)  # what does not fit fails before anything is read
    places = array_shardings(document.leaves, abstract, sharding)

    def put(name: str, array: np.ndarray) -> Any:
        return place(array, places.get(name), name)

    placed = read_arrays(_array_folder(folder, document), full, put, verify) if full else {}
    for name, entry in document.arrays.items():
        if name not in placed:
            placed[name] = put(name, np.zeros(entry.shape, np.dtype(entry.dtype)))
    jax.block_until_ready(list(placed.values()))
    params = _joined(document.tree, [rebuild(leaf, placed) for leaf in document.leaves], like, where)
    report = Report(()) if document.report is None else document.report
    sites = rebuild_sites(document.sites, placed)
    return Result(params, report, document.policy, metadata=document.metadata, sites=sites)


def read_document(path: str | os.PathLike[str]) -> Document:
    """Reads what a checkpoint says about itself, and none of its arrays.

    Args:
      path: the folder.

    Returns:
      The `Document`: versions, leaves with their specs and shapes, policy, report, metadata.

    Raises:
      FileNotFoundError: no checkpoint there.
      ValueError: a damaged document, or one of a newer layout.
    """
    file = _local(path) / DOCUMENT
    try:
        document = doc.read_document(file)
    except RecursionError as error:
        raise ValueError(f"`{file}` is nested too deeply: the file is damaged") from error
    check_entries(document.arrays, f"`{file}`")
    if document.folder is not None and not _FOLDER.fullmatch(document.folder):
        raise ValueError(
            f"`{file}` has the array folder {document.folder!r}, which no save writes: the file is damaged"
        )
    return document


def fingerprint(params: Any) -> str:
    """A SHA-256 of a tree of parameters: of the path, shape, dtype and bytes of every leaf.

    Args:
      params: a tree of arrays.

    Returns:
      64 hexadecimal digits; the same for equal trees in containers of different kinds.

    Raises:
      TypeError, ValueError: as `save`.

    Example:
      >>> import jax.numpy as jnp
      >>> fingerprint({"w": np.zeros(2)}) == fingerprint({"w": jnp.zeros(2)})
      False
      >>> fingerprint({"w": np.zeros(2, "float32")}) == fingerprint({"w": jnp.zeros(2)})
      True
    """
    leaves, arrays = describe(encode_tree(params)[1])
    return fingerprint_of(leaves, array_entries(arrays))


# What is at the path.


def _local(path: str | os.PathLike[str]) -> Path:
    if not isinstance(path, (str, os.PathLike)):
        raise TypeError(f"`path` must be a path, got {type(path).__name__}: for save it comes first, what is saved second")
    if "://" in os.fspath(path):
        raise ValueError(f"`path` {os.fspath(path)!r} is not a path of this machine: save locally and copy the folder")
    return Path(os.path.abspath(path))


def _listed(folder: Path) -> list[str]:
    return sorted(os.listdir(folder)) if folder.is_dir() else []


def _new_folder(folder: Path) -> str:
    found = [match[1] for match in map(_OURS.fullmatch, _listed(folder)) if match]
    return f"arrays.{max((int(n) for n in found if n), default=0) + 1}"


def _previous(folder: Path, overwrite: bool) -> str | None:
    """The array folder of the checkpoint that is to be replaced; refuses anything that a save did not make."""
    if folder.exists() and not folder.is_dir():
        raise FileExistsError(f"`path` {str(folder)!r} is a file: a checkpoint is a folder")
    names = _listed(folder)
    if DOCUMENT not in names:
        others = [name for name in names if not _OURS.fullmatch(name)]
        if others:
            raise FileExistsError(
                f"`path` {str(folder)!r} holds what is not a checkpoint of qjax, {others[0]!r}: take a new folder"
            )
        return None
    try:
        found = doc.read_json(folder / DOCUMENT).get("folder")
    except ValueError as error:
        raise FileExistsError(
            f"`path` {str(folder)!r} holds what may be no checkpoint of qjax ({error}): remove it, or take a new folder"
        ) from error
    if not overwrite:
        raise FileExistsError(
            f"`path` {str(folder)!r} holds a checkpoint already: pass overwrite=True or take a new folder"
        )
    return found if isinstance(found, str) else None


def _sweep(folder: Path, keep: str | None) -> None:
    """Removes what saves left behind, and the arrays of the previous checkpoint."""
    for name in _listed(folder):
        if _OURS.fullmatch(name) and name not in (keep, DOCUMENT):
            path = folder / name
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()


@contextlib.contextmanager
def _removed_on_error(folder: Path, name: str | None) -> Iterator[None]:
    """Removes the new arrays if the save does not succeed, so that a full disk does not stay full."""
    with contextlib.ExitStack() as stack:
        if name is not None:
            stack.callback(shutil.rmtree, folder / name, ignore_errors=True)
            stack.callback(shutil.rmtree, folder / f"{name}{_UNFINISHED}", ignore_errors=True)
        yield
        stack.pop_all()


def _stage(folder: Path, content: bytes) -> None:
    temporary = folder / f"{DOCUMENT}.tmp"
    temporary.write_bytes(content)
    flush_to_disk(temporary)
    flush_to_disk(folder)


def _commit(folder: Path) -> None:
    """Replaces the document: from here on the new checkpoint is the one that is loaded."""
    os.replace(folder / f"{DOCUMENT}.tmp", folder / DOCUMENT)
    flush_to_disk(folder)


def _array_folder(folder: Path, document: Document) -> Path:
    if document.folder is None:
        raise ValueError(f"`{folder / DOCUMENT}` has arrays and no folder for them: the file is damaged")
    return folder / document.folder


def _joined(tree: Any, leaves: list[Any], like: Any, where: str) -> Any:
    try:
        return decode_tree(tree, leaves, where) if like is None else decode_like(tree, leaves, like, where, _fits)
    except RecursionError as error:
        raise ValueError(f"{where} is nested too deeply: the file is damaged") from error


def _fits(leaf: Any, like: Any, path: str) -> None:
    """Refuses a `like` whose leaf has another shape, or for an ordinary array another dtype."""
    shape = getattr(like, "shape", None)
    if not hasattr(leaf, "shape") or shape is None:
        return
    if tuple(shape) != tuple(leaf.shape):
        raise ValueError(f"`like` has the shape {tuple(shape)} at `{path}`, the checkpoint has {tuple(leaf.shape)}")
    dtype = getattr(like, "dtype", leaf.dtype)
    if not isinstance(leaf, QTensor) and dtype != leaf.dtype:
        raise ValueError(f"`like` has {dtype} at `{path}`, the checkpoint has {leaf.dtype}")
