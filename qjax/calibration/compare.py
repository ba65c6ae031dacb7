"""`compare`: per site, how far two data sets disagree, against what the first one disagrees with itself."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping, Sequence

import numpy as np
from rich.table import Table

from qjax.calibration.distance import outside, total_variation
from qjax.calibration.findings import Calibration, SiteRange, share
from qjax.report import render

# A distance within this many floors is no finding: the floor is one draw of a noise, and sites have several to be unlucky with.
_MARGIN = 2.0
# A range this many times as wide or as narrow costs a bit of the codes.
_STRETCH = 2.0
# Values beyond a range count from this share on, and from so many standard deviations of what chance puts there.
_BEYOND, _DEVIATIONS = 0.01, 3.0


@dataclasses.dataclass(frozen=True)
class SiteShift:
    """How far two data sets disagree on what one part of a site reads.

    Attributes:
      name: the part's, as in `SiteRange`.
      site: the site's.
      distance: share of the values that lie elsewhere, 0 .. 1, as `total_variation`; None where one of the two has no data.
      floor: what the distance would be by chance: that between the halves of the first data set, for the sizes of the two; None where
        it has no two halves.
      stretch: the second range's width over the first's.
      outside: share of the second data set's values beyond the first one's range.
      shifted: whether they disagree; None where that cannot be told.
      verdict: why, in words.
    """

    name: str
    site: str
    distance: float | None
    floor: float | None
    stretch: float | None
    outside: float | None
    shifted: bool | None
    verdict: str


@dataclasses.dataclass(frozen=True)
class Comparison:
    """Rows, worst first, and remarks. `print` shows a table; `rows` is the data; `to_json` for programs.

    Attributes:
      rows: one for each part of every site: those that are shifted, then the others, then those that cannot be judged; by distance.
      notes: remarks on the whole.

    Example:
      >>> row = SiteShift("w", "w", 0.5, 0.1, 3.0, 0.2, True, "50 % of the values lie elsewhere, 5 times the floor")
      >>> Comparison((row,)).shifted
      ('w',)
    """

    rows: tuple[SiteShift, ...]
    notes: tuple[str, ...] = ()

    @property
    def shifted(self) -> tuple[str, ...]:
        """Names of the parts on which the two disagree, worst first."""
        return tuple(row.name for row in self.rows if row.shifted)

    def to_json(self) -> str:
        """Returns the comparison as a JSON document."""
        document = {"rows": [dataclasses.asdict(row) for row in self.rows], "notes": self.notes, "shifted": self.shifted}
        return json.dumps(document, indent=1, allow_nan=False)

    def __rich__(self) -> Table:
        title = f"{len(self.shifted)} of {len(self.rows)} inputs have shifted"
        table = Table(title=title, title_justify="left", caption_justify="left", caption="\n".join(self.notes) or None)
        table.add_column("site", no_wrap=True)
        for name in ("distance", "floor", "width", "outside"):
            table.add_column(name, justify="right", no_wrap=True)
        table.add_column("verdict", overflow="fold")
        for row in self.rows:
            stretch = "" if row.stretch is None else f"x {row.stretch:.3g}"
            cells = (row.name, share(row.distance), share(row.floor), stretch, share(row.outside), row.verdict)
            table.add_row(*cells, style=None if row.shifted else "dim")
        return table

    def __str__(self) -> str:
        return render(self)


def compare(a: Calibration, b: Calibration) -> Comparison:
    """Says per site how far two data sets disagree: production against calibration, one language against another.

    The distance is the total variation between the histograms. Its floor is what `a` shows between its own halves,
    `floor = drift sqrt((1 + n_a / n_b) / 4)` for `n` rows, since that of two samples goes as `sqrt(1 / n_a + 1 / n_b)`; the
    median floor of all sites where that is larger, for one pair of halves can agree by luck. A site is shifted if the distance
    exceeds twice the floor, or if one of them has more values beyond the other's range than chance puts there: for the range of
    `n` rows with the share `s` of its own values outside, beyond which `m` rows of the other lie,
    `p + 3 sqrt(p (1 - p) (1 / n + 1 / m))` with `p = (s n + 1) / (n + 1)`. Of `b`'s values that must be 1 % more than `s`, or a range
    more than `2 (1 + moved)` times as wide; of `a`'s a range of `b` that many times as narrow. So the small maximum of few rows is
    no finding.

    Args:
      a: of the data the ranges are for, at least two batches.
      b: of other data through the same function, with the same observers and specs.

    Returns:
      A `Comparison`, worst first.

    Raises:
      TypeError: an argument is no `Calibration`.
      ValueError: they are of different sites, observers or specs.

    Example:
      >>> import jax, jax.numpy as jnp, qjax
      >>> x = jax.random.normal(jax.random.key(0), (3, 64, 8))
      >>> a, b, c = (
      ...     qjax.calibrate(lambda p, x: x @ p["w"], {"w": jnp.ones((8, 4))}, data) for data in ([x[0], x[1]], [x[2]], [3 * x[2]])
      ... )
      >>> compare(a, b).shifted, compare(a, c).shifted
      ((), ('w',))

    Source: the floor is a split-half estimate of sampling noise; the rest is ours.
    """
    for name, value in (("a", a), ("b", b)):
        if not isinstance(value, Calibration):
            raise TypeError(f"`{name}` must be what qjax.calibrate returns, got {type(value).__name__}")
    _check_same(a, b)
    others = {row.name: row for row in b.rows}
    rows = [(own, others[own.name]) for own in a.rows]
    distance = {n: dict(zip(_parts(a, n), total_variation(a.bins[n], b.bins[n]), strict=True)) for n in a.bins}
    beyond = {n: dict(zip(_parts(a, n), outside(b.bins[n], *_ends(a, n)), strict=True)) for n in a.bins}
    inverse = {n: dict(zip(_parts(a, n), outside(a.bins[n], *_ends(b, n, _parts(a, n))), strict=True)) for n in a.bins}
    floors = {own.name: _floor(own, other) for own, other in rows}
    known = [floor for floor in floors.values() if floor is not None]
    least = float(np.median(known)) if known else 0.0
    shifts = []
    for own, other in rows:
        floor = floors[own.name]
        floor = None if floor is None else max(floor, least)
        shares = tuple(float(found[own.site][own.name]) for found in (distance, beyond, inverse))
        shifts.append(_shift(own, other, floor, *shares))
    notes = () if a.batches > 1 else ("`a` is one batch, whose halves cannot be compared: there is no floor, and nothing is judged",)
    return Comparison(tuple(sorted(shifts, key=_badness)), notes)


def _parts(a: Calibration, site: str) -> list[str]:
    return [row.name for row in a.rows if row.site == site]


def _ends(a: Calibration, site: str, parts: Sequence[str] = ()) -> tuple[np.ndarray, np.ndarray]:
    known = {row.name: row for row in a.rows if row.site == site}
    rows = [known[name] for name in parts or known]
    return np.array([row.lo for row in rows]), np.array([row.hi for row in rows])


def _floor(own: SiteRange, other: SiteRange) -> float | None:
    if own.drift is None or not other.rows:
        return None
    return own.drift * math.sqrt((1 + own.rows / other.rows) / 4)


def _beyond_chance(share_beyond: float, of: SiteRange, seen: SiteRange) -> bool:
    """Whether more of the values of `seen` lie beyond the range of `of` than chance puts there.

    Rows are what is drawn: the values of one row may all be large together.
    """
    p = (of.outside * of.rows + 1) / (of.rows + 1)
    return share_beyond > p + _DEVIATIONS * math.sqrt(p * (1 - p) * (1 / of.rows + 1 / seen.rows))


def _shift(own: SiteRange, other: SiteRange, floor: float | None, distance: float, beyond: float, inverse: float) -> SiteShift:
    if not own.rows or not other.rows:
        which = "either" if not own.rows and not other.rows else "the first" if not own.rows else "the second"
        return SiteShift(own.name, own.site, None, floor, None, None, None, f"no data of {which} reached it")
    width, new = own.hi - own.lo, other.hi - other.lo
    stretch = new / width if width > 0 else None
    if floor is None or own.moved is None:
        verdict = "no floor to judge by: the first has no two halves here"
        return SiteShift(own.name, own.site, distance, None, stretch, beyond, None, verdict)
    reasons = []
    if distance > _MARGIN * floor:
        reasons.append(f"{share(distance)} of the values lie elsewhere" + (f", {distance / floor:.0f} times the floor" if floor else ""))
    allowed = _STRETCH * (1 + own.moved)
    more, fewer = _beyond_chance(beyond, own, other), _beyond_chance(inverse, other, own)
    if more and beyond > own.outside + _BEYOND:
        reasons.append(f"{share(beyond)} lie beyond the range")
    if stretch is not None and ((more and stretch > allowed) or (fewer and stretch < 1 / allowed)):
        reasons.append(f"the range is {stretch:.3g} times as wide")
    return SiteShift(own.name, own.site, distance, floor, stretch, beyond, bool(reasons), "; ".join(reasons) or "within the floor")


def _badness(row: SiteShift) -> tuple[int, float]:
    return (0 if row.shifted else 2 if row.shifted is None else 1, -(row.distance or 0.0))


def _check_same(a: Calibration, b: Calibration) -> None:
    def described(c: Calibration) -> Mapping[str, tuple[str, str]]:
        return {row.name: (row.observer, row.spec) for row in c.rows}

    of_a, of_b = described(a), described(b)
    lonely: Sequence[str] = sorted(of_a.keys() ^ of_b.keys())
    if lonely:
        raise ValueError(f"`b` is of other sites than `a`: {', '.join(lonely[:3])} in one of them only; give the same function and `where`")
    for name in of_a:
        if of_a[name] != of_b[name]:
            raise ValueError(f"`b` has {of_b[name]} at {name!r}, `a` has {of_a[name]}: calibrate both with the same observer and spec")
