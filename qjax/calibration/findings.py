"""Calibration: what was found of every site, as data and as a table."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Sequence

from rich.table import Table

from qjax.calibration.histogram import Bins
from qjax.report import render


@dataclasses.dataclass(frozen=True)
class SiteRange:
    """What one part of a site reads: a site of one matrix is one part, a stack of layers or experts has one for each.

    Attributes:
      name: its own, `layers/up/kernel[3]`.
      site: the site's, `layers/up/kernel`.
      op: the primitive.
      scope: the name stack.
      observer: what chose the range.
      spec: what it was chosen for.
      rows: how many rows of its matrix product were seen; 0: no data reached it.
      lo: low end of the chosen range.
      hi: high end.
      least: the smallest value.
      most: the largest.
      mean: of all values.
      std: their standard deviation.
      outside: share of the values beyond the chosen range (saturation), to one bin of the histogram.
      moved: how far an end of the range moved from the first half of the data to the second, in widths of the whole range; None where
        there are no two halves.
      drift: share of the values that lie elsewhere in the second half, as `total_variation`; None as above.
      peak: largest magnitude of any feature over the median feature's; None if most are zero.
      constant: how many features had one value throughout.
      constant_features: the first eight of them.
      notes: what else there is to say.
    """

    name: str
    site: str
    op: str
    scope: str
    observer: str
    spec: str
    rows: int
    lo: float
    hi: float
    least: float
    most: float
    mean: float
    std: float
    outside: float
    moved: float | None
    drift: float | None
    peak: float | None
    constant: int
    constant_features: tuple[int, ...]
    notes: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True, eq=False)
class Calibration:
    """Rows and remarks. `print` shows a table; `rows` is the data; `to_json` for programs; `compare` takes two.

    Attributes:
      rows: one for each part of every site, in data-flow order.
      batches: how many were seen.
      notes: remarks on the whole, such as sites that cannot be observed.
      bins: the histogram of every site, by name.

    Example:
      >>> import jax.numpy as jnp, qjax
      >>> found = qjax.calibrate(lambda p, x: x @ p["w"], {"w": jnp.ones((2, 3))}, [jnp.array([[1.0, -4.0]])])
      >>> found.rows[0].least, found.rows[0].hi, found.unseen
      (-4.0, 4.0, ())
    """

    rows: tuple[SiteRange, ...]
    batches: int
    notes: tuple[str, ...]
    bins: dict[str, Bins]

    @property
    def unseen(self) -> tuple[str, ...]:
        """Names of the parts that no data reached: experts that no token chose, branches not taken."""
        return tuple(row.name for row in self.rows if not row.rows)

    def to_json(self) -> str:
        """Returns the rows and remarks, without histograms, as a JSON document."""
        document = {"rows": [dataclasses.asdict(row) for row in self.rows], "batches": self.batches}
        return json.dumps(document | {"notes": self.notes, "unseen": self.unseen}, indent=1, allow_nan=False)

    def __rich__(self) -> Table:
        sites = dict.fromkeys(row.site for row in self.rows)
        title = f"{len(sites)} sites, {self.batches} {'batch' if self.batches == 1 else 'batches'}"
        table = Table(title=title, title_justify="left", caption_justify="left", caption="\n".join(self.notes) or None)
        table.add_column("site", no_wrap=True)
        for name in ("rows", "range", "values", "outside", "moved", "drift"):
            table.add_column(name, justify="right", no_wrap=True)
        table.add_column("notes", overflow="fold", min_width=8)
        for site in sites:
            rows = [row for row in self.rows if row.site == site]
            table.add_row(*_cells(site, rows), style=None if any(row.rows for row in rows) else "dim")
        return table

    def __str__(self) -> str:
        return render(self)


def _cells(site: str, rows: Sequence[SiteRange]) -> Sequence[str]:
    """One line for a site: the widest of its parts' ranges, the worst of the rest."""
    return (
        site if len(rows) == 1 else f"{site} ({len(rows)} parts)",
        str(sum(row.rows for row in rows)),
        f"{min(row.lo for row in rows):.4g} .. {max(row.hi for row in rows):.4g}",
        f"{min(row.least for row in rows):.4g} .. {max(row.most for row in rows):.4g}",
        share(max(row.outside for row in rows)),
        share(largest(row.moved for row in rows)),
        share(largest(row.drift for row in rows)),
        "; ".join(_remarks(rows)),
    )


def _remarks(rows: Sequence[SiteRange]) -> list[str]:
    constant = sum(row.constant for row in rows)
    first = next((row.constant_features for row in rows if row.constant), ())
    named = ", ".join(map(str, first)) + (", ..." if constant > len(first) else "")
    remarks = [f"{constant} constant features ({named})" if constant > 1 else f"constant feature {named}"] if constant else []
    grouped: dict[str, list[str]] = {}
    for row in rows:
        for note in row.notes:
            grouped.setdefault(note, []).append(row.name)
    for note, names in grouped.items():
        parts = "" if len(rows) == 1 else f": {', '.join(names[:4])}{', ...' if len(names) > 4 else ''}"
        remarks.append(note + parts)
    return remarks


def largest(values: Iterable[float | None]) -> float | None:
    """Returns the largest number, None if there is none."""
    return max((value for value in values if value is not None), default=None)


def share(value: float | None) -> str:
    """Writes a share for people, `0.012 %`."""
    if value is None:
        return ""
    return "0" if value == 0 else f"{100 * value:.2g} %" if value < 0.1 else f"{100 * value:.0f} %"
