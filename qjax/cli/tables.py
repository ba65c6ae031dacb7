"""A report for a terminal: parameters that differ only in the number of their layer are one row."""

import collections
import dataclasses
import re
from collections.abc import Mapping, Sequence
from typing import Any

from rich import box
from rich.table import Table

from qjax.calibration.findings import largest, share
from qjax.report import format_bytes

_NUMBER = re.compile(r"(?<![a-zA-Z0-9.])\d+(?![a-zA-Z0-9.])|(?<=_)\d+(?=/)")


def describe_rows(report: Any) -> dict[str, Any]:
    """The rows and totals of a report, for JSON."""
    rows = [dataclasses.asdict(row) for row in report.rows]
    return {"rows": rows, "notes": list(report.notes), **totals(report)}


def totals(report: Any) -> dict[str, Any]:
    """Sums over the rows of a report."""
    quantized = [row for row in report.rows if row.spec]
    return {
        "parameters": sum(row.what == "parameter" for row in report.rows),
        "quantized": len(quantized),
        "nbytes": report.nbytes,
        "float_nbytes": report.float_nbytes,
    }


def report_table(report: Any, every: bool = False) -> list[Any]:
    """What to print of a report.

    Args:
      report: rows of parameters.
      every: a row a parameter, not a row a kind of parameter.

    Returns:
      Tables and lines, for a rich console.
    """
    sums = totals(report)
    listed = [row for row in report.rows if row.spec]
    how = sorted({(row.spec, row.method, _activation(row)) for row in listed})
    sizes = f"{format_bytes(sums['float_nbytes'])} -> {format_bytes(sums['nbytes'])}"
    verb = "would be quantized" if listed and all(row.error is None for row in listed) and listed[0].method else "quantized"
    head = f"{sums['quantized']} of {sums['parameters']} parameters {verb}, {sizes}"
    if len(how) == 1:
        head += f": {how[0][0]} by {how[0][1]}"
    acts = sorted({act for *_, act in how})
    extra = [] if not any(acts) else [f"activations: {acts[0]}"] if len(acts) == 1 else ["activations: see the table"]
    if not listed:  # a float model: what could be quantized
        listed = [row for row in report.rows if row.ops]
        head = f"{len(listed)} of {sums['parameters']} parameters can be quantized, {format_bytes(sums['nbytes'])} in all"
    lines: list[Any] = [head, *extra, "", _table(listed, show_how=len(how) > 1, every=every), ""]
    for reason, rows in _grouped(row for row in report.rows if row not in listed).items():
        lines.append(f"float: {_names(rows, every)}, {format_bytes(sum(row.nbytes for row in rows))}: {reason}")
    kinds = collections.Counter(_kind(row.path, every) for row in report.rows)
    lines += [f"note: {_names(rows, every, kinds)}: {note}" for note, rows in _grouped_notes(report.rows).items()]
    return [*lines, *(f"note: {note}" for note in report.notes)]


def _table(rows: list[Any], show_how: bool, every: bool) -> Table:
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 1, 0, 0))
    table.add_column("parameter", overflow="fold")
    table.add_column("n", justify="right", no_wrap=True)
    table.add_column("shape", no_wrap=True)
    several = len(set(map(_activation, rows))) > 1
    for name in ("spec", "method", *(("activations",) if several else ())) if show_how else ():
        table.add_column(name, overflow="fold")
    measured = any(row.error is not None for row in rows)
    for name in ("bits", "size", *(("error",) if measured else ())):
        table.add_column(name, justify="right", no_wrap=True)
    kinds: dict[Any, list[Any]] = {}
    for row in rows:
        kinds.setdefault((_kind(row.path, every), row.shape, row.spec, row.method, _activation(row)), []).append(row)
    for (path, shape, spec, method, activation), members in kinds.items():
        errors = [row.error for row in members if row.error is not None]
        how = (spec, method, *((activation,) if several else ())) if show_how else ()
        cells = [path, str(len(members)), "x".join(map(str, shape)), *how]
        bits = sum(row.bits_per_weight for row in members) / len(members)
        cells += [f"{bits:.2f}", format_bytes(sum(row.nbytes for row in members))]
        table.add_row(*cells, *([f"{sum(errors) / len(errors):.2e}"] if errors else []))
    return table


def calibration_table(calibration: Any, every: bool = False) -> list[Any]:
    """What to print of a calibration: as `report_table`, the widest of the like inputs' ranges and the worst of the rest."""
    kinds: dict[str, list[Any]] = {}
    for row in calibration.rows:
        kinds.setdefault(_kind(row.name if every else row.site, every), []).append(row)
    table = _narrow("input", ("n", "range", "beyond", "moved", "drift"))
    for kind, rows in kinds.items():
        ends = f"{min(row.lo for row in rows):.3g} .. {max(row.hi for row in rows):.3g}"
        worst = (max(row.outside for row in rows), largest(row.moved for row in rows), largest(row.drift for row in rows))
        table.add_row(kind, str(len(rows)), ends, *map(share, worst))
    remarks: dict[str, list[Any]] = {}
    for row in calibration.rows:
        constant = f"{row.constant} constant feature{'s' if row.constant > 1 else ''}" if row.constant else ""
        for note in filter(None, (*row.notes, constant)):
            remarks.setdefault(note, []).append(row.name)
    lines = [f"note: {', '.join(names[:3])}{', ...' if len(names) > 3 else ''}: {note}" for note, names in remarks.items()]
    head = f"{len(calibration.rows)} inputs, {calibration.batches} batches"
    return [head, "", table, "", *lines, *(f"note: {note}" for note in calibration.notes)]


def comparison_table(comparison: Any, every: bool = False) -> list[Any]:
    """What to print of a comparison: the inputs that have shifted, or all of them."""
    table = _narrow("input", ("distance", "floor", "width", "beyond"))
    shown = [row for row in comparison.rows if every or row.shifted or row.shifted is None]
    for row in shown:
        width = "" if row.stretch is None else f"x {row.stretch:.3g}"
        table.add_row(row.name, share(row.distance), share(row.floor), width, share(row.outside), style=None if row.shifted else "dim")
    untold = sum(row.shifted is None for row in comparison.rows)
    head = f"{len(comparison.shifted)} of {len(comparison.rows)} inputs have shifted" + (f", {untold} cannot be judged" if untold else "")
    return [head, "", *([table, ""] if shown else []), *(f"note: {note}" for note in comparison.notes)]


def _narrow(first: str, others: Sequence[str]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 1, 0, 0))
    table.add_column(first, overflow="fold")
    for name in others:
        table.add_column(name, justify="right", no_wrap=True)
    return table


def _kind(path: str, every: bool) -> str:
    return path if every else _NUMBER.sub("*", path)


def _activation(row: Any) -> str:
    """What becomes of the activations, without what differs from one parameter to the next; the notes have that."""
    return re.sub(r",? ?capacity=\d+", "", row.activation)


def _names(rows: list[Any], every: bool, kinds: Mapping[str, int] | None = None) -> str:
    """Names of parameters; with `kinds`, how many there are of each, a layer is named where only some are meant."""
    mine = collections.Counter(_kind(row.path, every) for row in rows)
    whole = {kind for kind, count in mine.items() if kinds is None or kinds[kind] == count}
    names = dict.fromkeys(kind if (kind := _kind(row.path, every)) in whole else row.path for row in rows)
    shown = ", ".join(list(names)[:3]) + (", ..." if len(names) > 3 else "")
    return shown if len(rows) == 1 else f"{len(rows)} parameters ({shown})"


def _grouped(rows: Any) -> dict[str, list[Any]]:
    groups: dict[str, list[Any]] = {}
    for row in rows:
        groups.setdefault(row.reason, []).append(row)
    return groups


def _grouped_notes(rows: Any) -> dict[str, list[Any]]:
    groups: dict[str, list[Any]] = {}
    for row in rows:
        for note in row.notes:
            groups.setdefault(note, []).append(row)
    return groups
