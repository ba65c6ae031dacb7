"""Cutting text into windows of token ids, the same way everywhere, so that numbers can be compared."""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np


def encode(tokenizer: Any, text: str) -> np.ndarray:
    """Token ids of a text, without special tokens.

    Args:
      tokenizer: of the `tokenizers` package, or anything with its `encode(text, add_special_tokens=False).ids`.
      text: the text.

    Returns:
      (n,) int32.
    """
    return np.asarray(tokenizer.encode(text, add_special_tokens=False).ids, np.int32)


def windows(ids: Any, length: int = 256, start_id: int | None = 1) -> np.ndarray:
    """Cuts token ids into windows without overlap; the last incomplete one is dropped.

    Only the first window begins with `start_id`: the ids are preceded by it once, then cut.

    Args:
      ids: (n,) integers.
      length: tokens a window, at least 2.
      start_id: put before the ids; None for nothing.

    Returns:
      (N, length) int32.

    Raises:
      ValueError: a window too short to predict in, ids of another rank, or too few for one window.

    Example:
      >>> windows([5, 6, 7, 8, 9], length=3)
      array([[1, 5, 6],
             [7, 8, 9]], dtype=int32)
    """
    tokens = _flat_ids(ids)
    _check_length(length)
    tokens = tokens if start_id is None else np.concatenate([np.asarray([start_id], np.int32), tokens])
    count = len(tokens) // length
    if not count:
        raise ValueError(f"`ids` with {len(tokens)} tokens do not fill one window of {length}: give more text")
    return tokens[: count * length].reshape(count, length)


def calibration_windows(
    tokenizer: Any, lines: Sequence[str], count: int = 128, length: int = 256, start_id: int | None = 1
) -> np.ndarray:
    """One window a line: `start_id`, then the line's tokens, cut to `length`.

    Args:
      tokenizer: see `encode`.
      lines: the texts, in order.
      count: how many of the lines, from the first.
      length: tokens a window, at least 2.
      start_id: put before each line; None for nothing.

    Returns:
      (count, length) int32.

    Raises:
      ValueError: too few lines, or a line that does not reach `length` (it is named; nothing is padded).
    """
    _check_length(length)
    if not 1 <= count <= len(lines):
        raise ValueError(f"`count` must be 1 to {len(lines)}, the number of lines, not {count}: give more lines")
    first = [] if start_id is None else [start_id]
    rows = []
    for number, line in enumerate(lines[:count], start=1):
        row = np.concatenate([np.asarray(first, np.int32), encode(tokenizer, line)])[:length]
        if len(row) < length:
            raise ValueError(
                f"`lines`: line {number} gives {len(row)} tokens, not {length}: drop it or shorten `length`"
            )
        rows.append(row)
    return np.stack(rows)


def batches(tokens: np.ndarray, batch_size: int) -> Iterator[np.ndarray]:
    """Cuts windows into batches in their order; the last may be smaller.

    Args:
      tokens: (N, T) windows.
      batch_size: rows a batch.

    Yields:
      (B, T) arrays.

    Raises:
      ValueError: `batch_size` below 1.
    """
    if batch_size < 1:
        raise ValueError(f"`batch_size` must be at least 1, not {batch_size}")
    for start in range(0, len(tokens), batch_size):
        yield tokens[start : start + batch_size]


def padded_batches(tokens: np.ndarray, batch_size: int) -> Iterator[tuple[np.ndarray, int]]:
    """Like `batches`, but the last is filled up with its first row, so that one compiled program serves all.

    Args:
      tokens: (N, T) windows.
      batch_size: rows a batch; never more than N are made.

    Yields:
      A (B, T) batch and the number of its rows that count.

    Raises:
      ValueError: `batch_size` below 1.
    """
    size = min(batch_size, len(tokens))
    for batch in batches(tokens, size):
        yield np.concatenate([batch, np.repeat(batch[:1], size - len(batch), axis=0)]), len(batch)


def checked_windows(tokens: Any) -> np.ndarray:
    """Refuses what is not (N, T) token ids with at least one row and two columns.

    Args:
      tokens: windows.

    Returns:
      The same as int32.

    Raises:
      ValueError: another rank, dtype or size, or a negative id.
    """
    array = np.asarray(tokens)
    good = array.ndim == 2 and np.issubdtype(array.dtype, np.integer) and array.shape[0] >= 1 and array.shape[1] >= 2
    if not good or array.min() < 0:
        raise ValueError(
            f"`tokens` must be ids of shape (windows, length >= 2), not {array.dtype}{array.shape}: see windows"
        )
    return array.astype(np.int32)


def _flat_ids(ids: Any) -> np.ndarray:
    tokens = np.asarray(ids)
    if tokens.ndim != 1 or (tokens.size and not np.issubdtype(tokens.dtype, np.integer)):
        raise ValueError(f"`ids` must be integers of shape (n,), not {tokens.dtype}{tokens.shape}: flatten them")
    return tokens.astype(np.int32)


def _check_length(length: int) -> None:
    if length < 2:
        raise ValueError(f"`length` must be at least 2, as the first token of a window is not predicted, not {length}")
