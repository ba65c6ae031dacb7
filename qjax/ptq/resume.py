"""Keeps what a long quantization has finished, so that it goes on after a kill where it was.

A folder holds the description of one job and a file for each finished piece: packed parameters (or layers of one) and the scales
of rescaled inputs. Every file appears in one step. What has no file is computed again, from the same numbers, so the result is
the same to the bit.
"""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.metadata
import json
import os
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from qjax.core import ARRAYS
from qjax.disk import raw, read_arrays, write_arrays, write_whole
from qjax.policy import Policy
from qjax.program import Arguments, Program, compat
from qjax.ptq.method import Outcome
from qjax.ptq.parts import Part

JOB = "job.json"
_OURS = re.compile(rf"{re.escape(JOB)}|(leaf|scales)\.[0-9.-]+|.*\.tmp")


class Kept:
    """The finished pieces of one job. Without a folder it holds nothing and keeps nothing."""

    def __init__(self, folder: Path | None = None):
        self.folder = folder

    def outcome(self, index: int, part: Part, like: Any) -> Outcome | None:
        """The packed parameter of flat index `index`, or the `part` of it, if it was finished; `like()` gives its shapes."""
        found = self._read(_name("leaf", (index, *part)))
        if found is None:
            return None
        (file, arrays, (structure, *notes)), shapes = found, like()
        if structure != str(jax.tree.structure(shapes)):
            return None  # a method that decides more than its `shapes` say: computed again
        wanted = {field: getattr(shapes, field) for field in ARRAYS if getattr(shapes, field) is not None}
        if {k: (v.shape, np.dtype(v.dtype)) for k, v in wanted.items()} != {k: (v.shape, v.dtype) for k, v in arrays.items()}:
            raise ValueError(f"`{file}` does not hold what it should: remove it, and what it holds is computed again")
        return Outcome(dataclasses.replace(shapes, **{field: jnp.asarray(x) for field, x in arrays.items()}), tuple(notes))

    def keep_outcome(self, index: int, part: Part, outcome: Outcome) -> None:
        """Keeps a packed parameter, or a part of it."""
        if self.folder is None:
            return
        arrays = {field: getattr(outcome.q, field) for field in ARRAYS if getattr(outcome.q, field) is not None}
        self._write(_name("leaf", (index, *part)), arrays, (str(jax.tree.structure(outcome.q)), *outcome.notes))

    def scales(self, number: int) -> tuple[jax.Array, tuple[str, ...]] | None:
        """The scales of the `number`-th rescaled input and the remarks on its sites, if they were found."""
        found = self._read(_name("scales", (number,)))
        return None if found is None else (jnp.asarray(found[1]["s"]), found[2])

    def keep_scales(self, number: int, s: jax.Array, said: Iterable[str]) -> None:
        """Keeps the scales of a rescaled input."""
        self._write(_name("scales", (number,)), {"s": s}, said)

    def _read(self, name: str) -> Any:
        if self.folder is None or not (self.folder / name).is_file():
            return None
        return self.folder / name, *read_arrays(self.folder / name)

    def _write(self, name: str, arrays: dict[str, Any], notes: Iterable[str]) -> None:
        if self.folder is not None:
            write_arrays(self.folder / name, arrays, notes)


def _name(kind: str, numbers: Sequence[int]) -> str:
    return ".".join([kind, *(f"{n:05d}" for n in numbers)])


def open_kept(folder: str | os.PathLike[str] | None, job: dict[str, str] | None) -> Kept:
    """Opens the folder of a job, or makes it.

    Args:
      folder: where; None keeps nothing.
      job: from `describe_job`.

    Returns:
      A `Kept`.

    Raises:
      TypeError: `resume` is no path.
      FileExistsError: the folder holds something else.
      ValueError: it holds another job; naming what differs. Nothing in it is changed.
    """
    if folder is None or job is None:
        return Kept()
    if not isinstance(folder, (str, os.PathLike)):
        raise TypeError(f"`resume` must be the path of a folder, got {type(folder).__name__}")
    path = Path(folder)
    if path.exists() and not path.is_dir():
        raise FileExistsError(f"`resume` {str(path)!r} is a file: give a folder")
    file = path / JOB
    if file.is_file():
        _check_same(path, json.loads(file.read_bytes()), job)
    else:
        foreign = [p.name for p in path.iterdir() if not _OURS.fullmatch(p.name)] if path.is_dir() else []
        if foreign:
            raise FileExistsError(f"`resume` {str(path)!r} holds {min(foreign)!r}, which no quantization kept: give a new folder")
        path.mkdir(parents=True, exist_ok=True)
        write_whole(file, [json.dumps(job, indent=1).encode("ascii")])
    return Kept(path)


def _check_same(path: Path, found: Any, job: dict[str, str]) -> None:
    found = found if isinstance(found, dict) else {}
    changed = [f"{name} ({found.get(name)} there, {value} here)" if name == "versions" else name
               for name, value in job.items() if found.get(name) != value]  # fmt: skip
    if changed:
        raise ValueError(
            f"`resume` {str(path)!r} holds the work of another job: it differs in its {', '.join(changed)}; give another folder, "
            "or remove this one to begin anew"
        )


def describe_job(policy: Policy, arguments: Sequence[Arguments], programs: Sequence[Program]) -> dict[str, str]:
    """What makes a quantization the same one: digests of policy, program, parameters and data; versions and platform.

    Args:
      policy: the policy.
      arguments: of each batch.
      programs: traced for each batch.

    Returns:
      A value for each of the five, by name.
    """
    versions = {name: importlib.metadata.version(name) for name in ("qjax", "jax", "jaxlib")}
    text = "\n".join(_program_text(p) for p in {id(p): p for p in programs}.values())
    params = list(zip(arguments[0].paths, arguments[0].params, strict=True))
    batches = [(f"{number}", x) for number, a in enumerate(arguments) for x in a.inputs]
    return {
        "policy": hashlib.sha256(_text(policy).encode()).hexdigest(),
        "program": hashlib.sha256(text.encode()).hexdigest(),
        "parameters": digest(params),
        "calibration": digest(batches),
        "versions": ", ".join(f"{name} {version}" for name, version in versions.items()) + f" on {jax.default_backend()}",
    }


def digest(arrays: Iterable[tuple[str, Any]]) -> str:
    """One SHA-256 of named arrays: their names, shapes, dtypes and bytes.

    >>> digest([("w", np.float32([1.0]))]) == digest([("w", np.float32([1.5]))])
    False
    """
    total = hashlib.sha256()
    for name, leaf in arrays:
        for x in jax.tree.leaves(leaf):
            total.update(f"{name} {x.shape} {x.dtype}\n".encode())
            if not isinstance(x, jax.ShapeDtypeStruct):
                total.update(raw(jax.random.key_data(x) if _is_key(x) else x).data)
    return total.hexdigest()


def _is_key(x: Any) -> bool:
    return isinstance(x, jax.Array) and jnp.issubdtype(x.dtype, jax.dtypes.prng_key)


def _program_text(program: Program) -> str:
    # Functions inside a program (custom derivatives) print with the place where they lie in memory.
    text = re.sub(r"\bat 0x[0-9a-f]+", "", str(program.jaxpr))
    return text + digest(("", c) for c in compat.constants(program.jaxpr) if hasattr(c, "shape"))


def _text(value: Any) -> str:
    """All fields of nested dataclasses: what prints short (a spec) leaves some out."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = ", ".join(f"{f.name}={_text(getattr(value, f.name))}" for f in dataclasses.fields(value))
        return f"{type(value).__module__}.{type(value).__qualname__}({fields})"
    if isinstance(value, (tuple, list)):
        return f"({', '.join(map(_text, value))})"
    return digest([("", value)]) if isinstance(value, (jax.Array, np.ndarray)) else repr(value)
