"""Names of sites, and of the parts of a stacked one: what observations are kept under and reports are read by."""

from __future__ import annotations

import collections
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from qjax.calibration.rows import why_no_rows
from qjax.program import Key, Leaf, Program, Site


class Names(NamedTuple):
    """Of one site.

    Attributes:
      site: its own, `layers/up/kernel`.
      parts: one for each part that a call or the scans around it keep apart, in the order of the states: `layers/up/kernel[3]`.
    """

    site: str
    parts: tuple[str, ...]


def name_sites(program: Program, lengths: Mapping[Key, int]) -> dict[Key, Names]:
    """Names every site that can be observed, whether it is watched or not, so that a name does not depend on the others.

    A site is called by its parameter's path, with the position where the program takes a fixed one, `w[2]`. Where that is not enough
    to tell the sites of a parameter apart, the operation and the number among its like follow: `w:dot_general.1`. A part's name
    has its position along the stacked axes: `w[2, 5]`, and `w[2, 5, group 1]` of a convolution.

    Args:
      program: from `qjax.trace`.
      lengths: how many turns each scan takes.

    Returns:
      `Names` by the site's key.
    """
    named: dict[Key, Names] = {}
    for leaf in program.leaves:
        sites = sorted((s for s in leaf.sites if not why_no_rows(s, leaf)), key=lambda s: s.key)
        plain = [_names(site, leaf, lengths, "") for site in sites]
        if _differ(plain):
            named |= {site.key: names for site, names in zip(sites, plain, strict=True)}
            continue
        numbers: dict[str, int] = collections.Counter()
        for site in sites:
            named[site.key] = _names(site, leaf, lengths, f":{site.op}.{numbers[site.op]}")
            numbers[site.op] += 1
    return named


def _differ(names: Sequence[Names]) -> bool:
    parts = [part for own in names for part in own.parts]
    return len(set(parts)) == len(parts) and len({own.site for own in names}) == len(names)


def _names(site: Site, leaf: Leaf, lengths: Mapping[Key, int], suffix: str) -> Names:
    own = [a for a in site.stacked if a not in site.view.stacked]
    turns = [lengths[key] for key in site.scans]
    fixed = {axis: str(position) for axis, position in site.view.fixed if axis in site.stacked}
    sliced = [axis for axis, _ in site.view.scans]
    varying = dict.fromkeys((*sliced, *own), "*")

    def label(positions: Mapping[int, str], group: str = "") -> str:
        known = [positions[axis] for axis in sorted(positions)] + ([group] if group else [])
        return f"{leaf.path}{'[' + ', '.join(known) + ']' if known else ''}{suffix}"

    def part(index: Sequence[int]) -> str:
        at = dict(fixed)
        for (axis, (first, stride)), turn in zip(zip(sliced, site.view.steps, strict=True), index, strict=False):
            at[axis] = str(first + stride * turn)
        at |= {axis: str(i) for axis, i in zip(own, index[len(turns) :], strict=False)}
        return label(at, f"group {index[-1]}" if site.groups > 1 else "")

    shape = (*turns, *(leaf.shape[a] for a in own), *([site.groups] if site.groups > 1 else []))
    return Names(label(fixed | varying if fixed else {}), tuple(part(index) for index in np.ndindex(*shape)))
