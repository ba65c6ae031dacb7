"""Remarks on the layers of a stack, told once."""

from __future__ import annotations

import collections
import itertools
import re
from collections.abc import Mapping, Sequence

# What was measured, with its sign, not what is counted or names something; the dash in 0.25-0.5 is no sign.
_MEASURED = re.compile(r"(?:(?<![\w.)])-)?(?:\d+\.\d+(?:e[+-]?\d+)?|\d+e[+-]?\d+)")


def merged(notes: Mapping[tuple[int, ...], Sequence[str]]) -> tuple[str, ...]:
    """Notes with the layers that they are of; those that differ in what was measured alone are one, from the least to the most of it.

    Args:
      notes: of each part of a stack, by its place along the stacked axes.

    Returns:
      One note for each that says something else, in the order in which they came.

    Example:
      >>> merged({(0,): ["0.25 of it is error"], (1,): ["0.5 of it is error", "1 dead columns"], (2,): [], (3,): ["0.125 of it is error"]})
      ('0.125 .. 0.5 of it is error (layers 0-1, 3)', '1 dead columns (layer 1)')
    """
    alike: dict[tuple[str, int], dict[tuple[int, ...], list[str]]] = {}
    for part, texts in notes.items():
        seen = collections.Counter[str]()
        for text in texts:
            words = _MEASURED.sub("\0", text)
            alike.setdefault((words, seen[words]), {})[part] = _MEASURED.findall(text)
            seen[words] += 1
    return tuple(_filled(words, list(values.values())) + f" ({_layers(list(values))})" for (words, _), values in alike.items())


def _filled(text: str, values: Sequence[Sequence[str]]) -> str:
    """A note with what was measured, or with the range of it."""
    ranges = [(min(column, key=float), max(column, key=float)) for column in zip(*values, strict=True)]
    return "".join(itertools.chain.from_iterable(
        itertools.zip_longest(text.split("\0"), [lo if lo == hi else f"{lo} .. {hi}" for lo, hi in ranges], fillvalue="")
    ))  # fmt: skip


def _layers(parts: Sequence[tuple[int, ...]]) -> str:
    if any(len(part) != 1 for part in parts):  # layers of layers, each with its place along every axis
        each = [", ".join(map(str, part)) for part in parts]
        return f"layer {each[0]}" if len(each) == 1 else f"layers {'; '.join(each)}"
    runs: list[list[int]] = []
    for (layer,) in sorted(parts):
        if runs and layer == runs[-1][-1] + 1:
            runs[-1].append(layer)
        else:
            runs.append([layer])
    which = ", ".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs)
    return f"layer{'s' * (len(parts) > 1)} {which}"
