"""Live values between segments that go to disk above a limit."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import os
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from qjax.disk import raw


@dataclasses.dataclass(frozen=True)
class Spill:
    """How much of the live values of sequential methods stays in memory, and where the rest goes.

    Between two sites a method like GPTQ keeps, for every calibration batch, what the rest of the program still reads. Batches
    beyond the limit are written to a temporary folder and read back when their turn comes, so memory holds at most the limit and
    one batch. The result is the same to the bit.

    Args:
      limit: bytes that stay in memory; the batches themselves and the parameters, which are the caller's, do not count.
      folder: where the temporary folder is made; None takes the system's place for such, which may itself be memory.

    Raises:
      ValueError: `limit` is no whole number of bytes, or negative.

    Example:
      >>> import jax.numpy as jnp, qjax
      >>> fn = lambda p, x: jnp.tanh(x @ p["a"]) @ p["b"]
      >>> params = {"a": jnp.eye(8), "b": jnp.eye(8)}
      >>> policy = qjax.Policy([qjax.Rule("*", weight=qjax.int4(), method=qjax.gptq())])
      >>> result = qjax.quantize(fn, params, policy, [jnp.ones((4, 8))] * 3, spill=qjax.Spill(limit=0))
      >>> result.report.memory["spilled"] > 0
      True
    """

    limit: int
    folder: str | os.PathLike[str] | None = None

    def __post_init__(self) -> None:
        if isinstance(self.limit, bool) or not isinstance(self.limit, int) or self.limit < 0:
            raise ValueError(f"`limit` must be a number of bytes, 0 or more, got {self.limit!r}")


@dataclasses.dataclass(frozen=True)
class OnDisk:
    """A value that was written away; what is needed to have it back as it was."""

    file: Path
    shape: tuple[int, ...]
    dtype: np.dtype
    sharding: Any

    def read(self) -> jax.Array:
        """The value."""
        array = np.fromfile(self.file, np.uint8).view(self.dtype).reshape(self.shape)
        return jnp.asarray(array) if self.sharding is None else jax.device_put(array, self.sharding)


class Live:
    """Counts the live values of all batches, and writes away those that the limit has no room for.

    Attributes:
      held: bytes in memory now.
      peak: the most there were.
      spilled: bytes written, in all.
    """

    def __init__(self, limit: int | None, folder: Path | None):
        self.limit, self.folder = limit, folder
        self.held = self.peak = self.spilled = self.files = 0
        self.passing = 0

    def pass_by(self, values: Iterable[OnDisk]) -> None:
        """Counts what was read back for one batch's turn, until the next one's."""
        self.passing = sum(math.prod(value.shape) * value.dtype.itemsize for value in values)

    def take_up(self, value: Any) -> None:
        """Counts a value that is in memory."""
        self.held += _nbytes(value)
        self.peak = max(self.peak, self.held + self.passing)

    def drop(self, value: Any) -> None:
        """A value is no longer needed."""
        if isinstance(value, OnDisk):
            value.file.unlink()
        else:
            self.held -= _nbytes(value)

    @property
    def full(self) -> bool:
        """Whether more is held than the limit allows."""
        return self.limit is not None and self.held > self.limit

    def write(self, value: Any) -> Any:
        """Writes a value away; one that cannot be read back as it was stays."""
        if self.folder is None or not _movable(value):
            return value
        file = self.folder / f"{self.files}"
        self.files += 1
        raw(value).tofile(file)
        self.held -= _nbytes(value)
        self.spilled += _nbytes(value)
        return OnDisk(file, value.shape, np.dtype(value.dtype), value.sharding if value.committed else None)


@contextlib.contextmanager
def opened(spill: Spill | None) -> Iterator[Live]:
    """Gives a `Live`; its files are gone when the work ends, by an error too."""
    if spill is None:
        yield Live(None, None)
        return
    with tempfile.TemporaryDirectory(prefix="qjax-live-", dir=spill.folder) as folder:
        yield Live(spill.limit, Path(folder))


def _movable(value: Any) -> bool:
    ordinary = isinstance(value, jax.Array) and not jnp.issubdtype(value.dtype, jax.dtypes.extended)
    return ordinary and value.is_fully_addressable and value.size > 0


def _nbytes(value: Any) -> int:
    return int(getattr(value, "nbytes", 0))
