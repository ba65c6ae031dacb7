"""Rescales input channels before anything is rounded: `x / s` meets `s w`, and whatever makes `x` takes `1 / s`.

One implementation for every method that chooses such scales (AWQ, SmoothQuant) and every program: which parameters change is
found by data flow (`qjax.graph.find_fold`), and the function that results is compared with the old one before it is used. Where
nothing can take 1 / s, a method may have the product divide its input at run time (`qjax.ptq.input_scale`).
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from qjax.calibration import Channels, Sample, Together, channel_stats, init_states, sample_rows, why_no_rows
from qjax.core import ActSpec, Spec
from qjax.graph import Fold, NoFold, NotPreserved, Scaling, apply_fold, build, find_fold, verifier
from qjax.policy import Choice
from qjax.program import Key, Leaf, Program, Site, shared_inputs
from qjax.ptq.candidates import Member, Rescaling, best
from qjax.ptq.data import check_numbers, unseen_note
from qjax.ptq.input_scale import blank, site_scale, why_no_scale
from qjax.ptq.parts import Layout, matrices, part_axes, part_of, problem_of, take
from qjax.ptq.passes import observe_batches
from qjax.ptq.progress import Monitor, Phase
from qjax.ptq.resume import Kept
from qjax.ptq.work import Work, forward, matrix_sizes

SAMPLES_AT_ONCE = 2**30  # bytes of activations that are held at a time; more sites take more passes over the data


@dataclasses.dataclass(frozen=True, eq=False)
class Group:
    """Sites that share an input, of which some are to be rescaled, and how that can be done."""

    sites: tuple[Site, ...]
    fold: Fold
    method: Rescaling


@dataclasses.dataclass(frozen=True, eq=False)
class Alone:
    """A site whose input is to be divided at run time, and why nothing can take its scales."""

    sites: tuple[Site]
    method: Rescaling
    reason: str


Notes = dict[int, tuple[str, ...]]
Refusals = list[tuple[tuple[Site, ...], str]]
Unit = TypeVar("Unit", bound=Group | Alone)


class Rescaled(NamedTuple):
    """What `rescale` did.

    Attributes:
      params: the parameters, which compute the same function.
      scales: for parameters whose input is divided at run time by s: s, float32, one along kept axes.
      notes: remarks for those with such a method and for those that changed in exchange.
      folds: what was applied, in order: `apply_fold` of all to the parameters that came in gives `params`.
    """

    params: list[Any]
    scales: dict[int, np.ndarray]
    notes: Notes
    folds: tuple[tuple[Fold, jax.Array], ...] = ()


def rescale(
    flat: Sequence[Any], choices: Sequence[Choice], batches: Sequence[tuple[Program, Any]], monitor: Monitor, kept: Kept
) -> Rescaled:
    """Rescales what the policy's methods want rescaled.

    Args:
      flat: the float parameters.
      choices: the policy's, one a parameter.
      batches: (traced program, its inputs) for each calibration batch.
      monitor: is told of each batch and each input.
      kept: scales that were found before, and where those go that are found.

    Returns:
      The new parameters, the scales that are left to run time, and remarks.

    Raises:
      ValueError: shapes in place of data; activations that are not finite.
    """
    wanted = rescaled_by(choices)
    if not wanted:
        return Rescaled(list(flat), {}, {})
    program = batches[0][0]
    groups, refusals = _groups(program, wanted)
    notes: Notes = {}
    chosen: list[tuple[Group, jax.Array]] = []
    lists = _at_once(groups, program)
    phase = monitor.phase("rescale", [w for some in lists for w in _weights(some, program, len(batches))])
    for some in lists:
        chosen += _scales(some, len(chosen), wanted, flat, batches, phase, kept, notes)
    new, refused = _apply(program, flat, batches[0][1], chosen)
    for group, _ in chosen:
        method, reason = group.method.name, refused.get(id(group))
        if reason is not None:
            refusals.append((group.sites, reason))
            continue
        _note(notes, (site.leaf for site in group.sites), f"{method}: its input is rescaled")
        others = {s.leaf for s in group.fold.scalings} - {site.leaf for site in group.sites}
        _note(notes, others, f"{method}: changed in exchange for an input")
    alone = _alone(refusals, wanted, program, notes)
    scales = _at_run_time(alone, len(chosen), wanted, new, batches, monitor, kept, notes)
    return Rescaled(new, scales, notes, tuple((group.fold, s) for group, s in chosen if id(group) not in refused))


def rescaled_by(choices: Sequence[Choice]) -> dict[int, Choice]:
    """The choices whose method rescales inputs, by the parameter's index."""
    given = [(c, None if c.rule is None or c.spec is None else c.rule.method) for c in choices]
    return {c.leaf.index: c for c, method in given if method is not None and isinstance(method, Rescaling)}


def _note(notes: Notes, leaves: Iterable[int], text: str) -> None:
    notes |= {leaf: tuple(dict.fromkeys((*notes.get(leaf, ()), text))) for leaf in leaves}


def _scales(
    groups: Sequence[Group], first: int, wanted: Mapping[int, Choice], flat: Sequence[Any], batches: Sequence[tuple[Program, Any]],
    phase: Phase, kept: Kept, notes: Notes,
) -> list[tuple[Group, jax.Array]]:  # fmt: skip
    """The scales of groups that are observed together, of which the first is number `first`; remarks go to `notes`."""
    program = batches[0][0]
    found = [kept.scales(first + i) for i in range(len(groups))]
    states = _observe_missing(groups, found, wanted, flat, batches, phase)
    chosen = []
    for i, (group, earlier) in enumerate(zip(groups, found, strict=True)):
        if earlier is None:
            members = _members(group, wanted, program.leaves, flat, states)
            s = jnp.stack([best(group.method, *unit) for unit in members]).reshape(group.fold.shape)
            said = [unseen_note(np.asarray(states[site.key][0].absmax).any(-1), "it has no say in the scales") for site in group.sites]
            kept.keep_scales(first + i, s, said)
        else:
            s, said = earlier
        for site, text in zip(group.sites, said, strict=True):
            if text:
                _note(notes, (site.leaf,), f"{group.method.name}: {text}")
        phase.step(group.sites[0].path, found=earlier is not None)
        chosen.append((group, s))
    return chosen


def _observe_missing(
    groups: Sequence[Unit], found: Sequence[Any], wanted: Mapping[int, Choice], flat: Sequence[Any],
    batches: Sequence[tuple[Program, Any]], phase: Phase,
) -> Any:  # fmt: skip
    """What the groups read. All are observed even if one alone was not found: another program could round differently."""
    if any(s is None for s in found):
        return _observe(groups, wanted, list(flat), batches, phase)
    for number in range(len(batches)):
        phase.step(f"batch {number}", found=True)
    return {}


def _alone(refusals: Refusals, wanted: Mapping[int, Choice], program: Program, notes: Notes) -> list[Alone]:
    """The sites whose method divides what cannot be folded; of the others `notes` says why they stay as they are."""
    alone = []
    for sites, reason in refusals:
        for site in sites:
            choice = wanted[site.leaf]
            method: Any = choice.rule.method  # pyright: ignore[reportOptionalMemberAccess]
            no = ""
            if method.unfoldable == "scale":
                no = why_no_scale(site, program.leaves[site.leaf], choice.spec, choice.activation)  # pyright: ignore[reportArgumentType]
                if not no:
                    alone.append(Alone((site,), method, reason))
                    continue
            _note(notes, (site.leaf,), f"{method.name} without rescaling: {reason}" + (f"; nor at run time: {no}" if no else ""))
    return alone


def _at_run_time(
    alone: Sequence[Alone], first: int, wanted: Mapping[int, Choice], flat: list[Any], batches: Sequence[tuple[Program, Any]],
    monitor: Monitor, kept: Kept, notes: Notes,
) -> dict[int, np.ndarray]:  # fmt: skip
    """The scales by which products divide their inputs; each parameter by itself, as it keeps its own. `first` as in `_scales`."""
    program, scales = batches[0][0], {}
    lists = _at_once(alone, program)
    phase = monitor.phase("rescale", [w for some in lists for w in _weights(some, program, len(batches))])
    for some in lists:
        found = [kept.scales(first + i) for i in range(len(some))]
        states = _observe_missing(some, found, wanted, flat, batches, phase)
        for i, (one, earlier) in enumerate(zip(some, found, strict=True)):
            (site,), leaf = one.sites, program.leaves[one.sites[0].leaf]
            scale = scales.setdefault(leaf.index, blank(leaf))
            if earlier is None:
                stats, sample = states[site.key]
                site_scale(leaf, site, flat[leaf.index], stats, sample, scale, functools.partial(_best_alone, one, wanted[leaf.index]))
                kept.keep_scales(first + i, jnp.asarray(scale), ())
            else:
                scale[...] = earlier[0]
            _note(notes, (leaf.index,), f"{one.method.name}: its input is divided at run time, because {one.reason}")
            phase.step(site.path, found=earlier is not None)
        first += len(some)
    return scales


def _best_alone(one: Alone, choice: Choice, w: jax.Array, stats: Channels, sample: Sample) -> jax.Array:
    """The best scales (K,) of one weight (stack, N, K) that is rescaled by itself, a free one for each column."""
    channel = jnp.broadcast_to(jnp.arange(w.shape[-1], dtype=jnp.int32), (w.shape[0], w.shape[-1]))
    how: Any = ((choice.spec, choice.activation),)
    return best(one.method, (Member(w, sample.x, stats, channel),), w.shape[-1], how)


def _groups(program: Program, wanted: Mapping[int, Choice]) -> tuple[list[Group], Refusals]:
    """The groups that can be rescaled; the others, and why not."""
    system, groups, refusals = build(program), [], []
    taken: dict[int, list[tuple[np.ndarray, str]]] = {}
    for sites in shared_inputs(program):
        mine = tuple(site for site in sites if site.leaf in wanted)
        if not mine:
            continue
        method: Any = wanted[mine[0].leaf].rule.method  # pyright: ignore[reportOptionalMemberAccess]
        fold = find_fold(system, sites)
        reason = _refusal(mine, fold, program.leaves, taken, [wanted[site.leaf].rule.method for site in mine])  # pyright: ignore
        if reason or isinstance(fold, NoFold):
            refusals.append((mine, reason))
            continue
        for scaling in fold.scalings:
            taken.setdefault(scaling.leaf, []).append((scaling.power > 0, mine[0].path))
        groups.append(Group(mine, fold, method))
    return groups, refusals


def _refusal(
    sites: Sequence[Site], fold: Fold | NoFold, leaves: Sequence[Leaf], taken: Mapping[int, Any], methods: Sequence[Any]
) -> str:
    if isinstance(fold, NoFold):
        return fold.reason
    if fold.residual:
        return f"its scale would go through {fold.residual} additions of the residual stream"
    if len(set(methods)) > 1:
        return "sites that share its input have other methods of this kind: " + ", ".join(sorted({m.name for m in methods}))
    for site in sites:
        reason = why_no_rows(site, leaves[site.leaf])
        if reason:
            return reason
        others = [other for other in leaves[site.leaf].sites if other.key != site.key]
        if any(dict(other.view.fixed) == dict(site.view.fixed) for other in others):
            return "it is used more than once"
        scaling = next((s for s in fold.scalings if s.leaf == site.leaf), None)
        if scaling is not None:
            earlier = [path for where, path in taken.get(site.leaf, ()) if (where & (scaling.power > 0)).any()]
            if earlier:
                return f"its input is already rescaled with that of {earlier[0]}"
        kept = [a for a in site.kept if scaling is not None and scaling.power.shape[a] > 1]
        if scaling is None or (kept and site.groups == 1) or {*scaling.exponents} - {1.0}:
            return "its own results would be rescaled too"
    return ""


def _at_once(groups: Sequence[Unit], program: Program) -> list[list[Unit]]:
    """Cuts groups into lists whose samples fit into the memory set aside for them."""
    out: list[list[Unit]] = []
    room = 0
    for group in groups:
        need = 0
        for site in group.sites:
            shape = program.leaves[site.leaf].shape
            need += 4 * group.method.rows * int(np.prod([shape[a] for a in (*site.stacked, *site.contracted)], dtype=np.int64))
        if not out or need > room:
            out.append([])
            room = SAMPLES_AT_ONCE
        out[-1].append(group)
        room -= need
    return out


def _weights(groups: Sequence[Group | Alone], program: Program, batches: int) -> list[float]:
    """How long each step of a list of groups takes, in one unit: the batches, then the searches."""
    work = search_work(groups, program)
    return [forward(program)] * batches + [each.weight for each in work]


def search_work(groups: Sequence[Group | Alone], program: Program) -> list[Work]:
    """What trying the candidates computes, for each group."""
    out = []
    for group in groups:
        total = Work()
        for site in group.sites:
            leaf = program.leaves[site.leaf]
            w = jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)
            stack, n, k = matrix_sizes(problem_of(leaf, site, None, w))  # pyright: ignore[reportArgumentType]
            total = total.plus(Work(4.0 * group.method.rows * n * k, n * k).times(stack * group.method.tries))
        out.append(total)
    return out


def plan_rescaling(choices: Sequence[Choice], program: Program) -> list[tuple[Work, int]]:
    """For each pass over the data: the work of its searches, and the bytes of its observers' states; shapes alone are read."""
    wanted = rescaled_by(choices)
    if not wanted:
        return []
    groups, refusals = _groups(program, wanted)
    lists: list[Any] = [*_at_once(groups, program), *_at_once(_alone(refusals, wanted, program, {}), program)]
    plans = []
    for groups in lists:
        states = jax.eval_shape(lambda groups=groups: init_states(program, _observers(groups)))
        work = functools.reduce(Work.plus, search_work(groups, program))
        plans.append((work, sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(states))))
    return plans


def _observers(groups: Sequence[Group | Alone]) -> dict[Key, Any]:
    return {s.key: Together((channel_stats(), sample_rows(group.method.rows))) for group in groups for s in group.sites}


def _observe(
    groups: Sequence[Group | Alone], wanted: Mapping[int, Choice], flat: list[Any], batches: Sequence[tuple[Program, Any]], phase: Phase
) -> Any:
    choice = wanted[groups[0].sites[0].leaf]
    check_numbers(batches, f"{groups[0].method.name} of {choice.leaf.path!r}")
    observers = _observers(groups)
    return observe_batches(lambda _: observers, flat, batches, phase)


def _members(
    group: Group, wanted: Mapping[int, Choice], leaves: Sequence[Leaf], flat: Sequence[Any], states: Mapping[Key, Any]
) -> list[tuple[tuple[Member, ...], int, tuple[tuple[Spec, ActSpec | None], ...]]]:
    """For each layer that may have scales of its own: its members, the number of its scales, and the members' specs."""
    size, how = group.fold.size, tuple((wanted[s.leaf].spec, wanted[s.leaf].activation) for s in group.sites)
    per_site = []
    for site in group.sites:
        leaf, (stats, sample) = leaves[site.leaf], states[site.key]
        scaling = next(s for s in group.fold.scalings if s.leaf == site.leaf)
        turns = stats.absmax.shape[: len(site.scans)]
        parts = [_member(leaf, site, scaling, flat[site.leaf], stats, sample, size, turn) for turn in np.ndindex(*turns)]
        per_site.append(parts)
    if group.fold.stack:
        units = list(zip(*per_site, strict=True))
    else:
        units = [tuple(jax.tree.map(lambda *x: jnp.concatenate(x), *parts) for parts in per_site)]
    return [(unit, size, how) for unit in units]  # pyright: ignore[reportReturnType]


def _member(
    leaf: Leaf, site: Site, scaling: Scaling, w: Any, stats: Channels, sample: Sample, size: int, turn: tuple[int, ...]
) -> Member:
    axes = part_axes(site)
    layout, part = Layout(axes, tuple(leaf.shape[a] for a in axes)), part_of(site, dict(zip(site.scans, turn, strict=True)))

    def laid_out(a: jax.Array) -> jax.Array:
        # Along an axis of size one every part has the same.
        where = tuple(0 if a.shape[axis] == 1 else i for axis, i in zip(axes, part, strict=True))
        return matrices(problem_of(leaf, site, None, take(a, layout, where), axes))  # pyright: ignore[reportArgumentType]

    full = [n if i not in site.kept or site.groups > 1 or i in site.stacked else 1 for i, n in enumerate(leaf.shape)]
    channel = np.broadcast_to(np.where(scaling.power == 0, size, scaling.channel), full).astype(np.float32)
    own: Any = jax.tree.map(lambda a: a[turn], (stats, sample.x))
    return Member(laid_out(jnp.asarray(w)), own[1], own[0], laid_out(jnp.asarray(channel))[:, 0].astype(jnp.int32))


def _apply(
    program: Program, flat: Sequence[Any], inputs: Sequence[Any], chosen: Sequence[tuple[Group, jax.Array]]
) -> tuple[list[Any], dict[int, str]]:
    """Applies what keeps the function, all at once or, where that does not, one by one; says which was refused and why."""
    new = functools.reduce(lambda leaves, step: apply_fold(step[0].fold, leaves, step[1]), chosen, list(flat))
    compare = verifier(program, flat, inputs)
    if _difference(compare, new) is None:
        return new, {}
    new, refused = list(flat), {}
    for group, s in chosen:
        tried = apply_fold(group.fold, new, s)
        reason = _difference(compare, tried)
        if reason is None:
            new = tried
        else:
            refused[id(group)] = reason
    return new, refused


def _difference(compare: Any, leaves: Sequence[Any]) -> str | None:
    try:
        compare(leaves)
    except NotPreserved as error:
        return str(error)
    return None
