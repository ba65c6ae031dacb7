"""`plan`: what quantizing would make, need and take, without doing it."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from qjax.calibration import (
    AllFinite,
    OperandObservers,
    Together,
    columns,
    init_states,
    minmax,
    outlier_columns,
    stack_size,
    why_no_rows,
    why_not_observed,
)
from qjax.core import IntSpec
from qjax.policy import Choice, Policy, ProductChoice, check_not_learned, check_policy
from qjax.program import Program, ProgramCache, Site, split_arguments
from qjax.ptq.block_tuning import held_bytes
from qjax.ptq.blockwise import Joint, find_joints
from qjax.ptq.data import check_same_sites
from qjax.ptq.groups import undivided
from qjax.ptq.parts import layout_of
from qjax.ptq.products import product_row
from qjax.ptq.quantize import (
    as_batches,
    cache_notes,
    layout_notes,
    method_of,
    planned_row,
    program_notes,
    refusal_of,
    task_of,
    whole_problem,
)
from qjax.ptq.range_search import SHRINK, search_range
from qjax.ptq.rescale import plan_rescaling
from qjax.ptq.sequential import visit_work
from qjax.ptq.spill import Live
from qjax.ptq.streams import Batch, Task, flat_leaves, grouped, streams_of, visits_of
from qjax.ptq.work import Work, forward, rows_seen, work_of
from qjax.report import Report, format_bytes
from qjax.runtime.installed import runtime_of
from qjax.runtime.overflow import counted

COMPILE = 0.4  # seconds that a program takes to be compiled, about what the segments of a language model take on a CPU


class Rates(NamedTuple):
    """What a device does in a second.

    Attributes:
      products: floating-point operations of float32 matrix products.
      steps: candidates for one value in a search of ranges.
    """

    products: float
    steps: float


class SequentialPlan(NamedTuple):
    """What `quantize_sequential` would do, from shapes alone.

    Attributes:
      work: statistics and methods, of all batches.
      programs: how many programs would be compiled for stretches between sites.
      reruns: runs of the whole program, over all batches, for parameters that loops or several sites share.
      statistics: bytes of the observers' states of one group, the largest.
      live: bytes of the live values of all batches between two sites, and of what is held while a block is tuned, at their peak.
      largest: bytes of the largest matrix of statistics and of the float weight that it goes with.
    """

    work: Work
    programs: int
    reruns: int
    statistics: int
    live: int
    largest: int


def plan_sequential(tasks: dict[int, Task], batches: Sequence[tuple[Program, Sequence[Any]]]) -> SequentialPlan:
    """Prices `quantize_sequential`."""
    streams = streams_of(batches, Live(None, None))
    visits = {id(stream.cutter): visits_of(stream, tasks) for stream in streams}
    first = visits[id(streams[0].cutter)]
    flat = flat_leaves(first, tasks)
    joints = find_joints(streams, [visits[id(stream.cutter)] for stream in streams], tasks, flat).joints
    groups = grouped(first, flat, joints)
    pooled = {first[n].site.leaf: n for group in reversed(groups) for n in group if first[n].site.leaf not in flat}
    once = [n for group in groups for n in group if first[n].site.leaf in flat or pooled[first[n].site.leaf] == n]
    work = functools.reduce(Work.plus, (visit_work(first[n], streams, tasks, flat) for n in once), Work())
    states = [_state_bytes([first[n].site for n in group], tasks) for group in groups]
    cuts = [group[0] for group in groups if first[group[0]].site.leaf in flat]
    stops = {key: [mine[n].position for n in cuts] for key, mine in visits.items()}
    bytes_at = {id(s.cutter): s.cutter.live_bytes(stops[id(s.cutter)]) for s in streams}
    keys = {s.cutter.segment(a, b).key for s in {id(s.cutter): s for s in streams}.values()
            for a, b in itertools.pairwise([0, *stops[id(s.cutter)]])}  # fmt: skip
    live = [sum(bytes_at[id(s.cutter)][i] for s in streams) for i in range(len(cuts))]
    compared = max([i for i, n in enumerate(cuts) if tasks[first[n].site.leaf].needs_float], default=-1)
    live = [n * 2 if i <= compared else n for i, n in enumerate(live)]  # the float program's stand beside them
    live = [nbytes + _held(streams, joints.get(n)) for nbytes, n in zip(live, cuts, strict=True)]
    sizes = [math.prod(task.leaf.shape) * 4 // max(math.prod(layout_of(task.leaf).count), 1) for i, task in tasks.items() if i in flat]
    largest = max([*states, 0]) + max([*sizes, *(math.prod(tasks[i].leaf.shape) * 4 for i in pooled), 0])
    return SequentialPlan(work, len(keys), len(pooled), max([*states, 0]), max([*live, 0]), largest)


def _held(streams: Sequence[Batch], joint: Joint | None) -> int:
    """Bytes that are held while a block is tuned."""
    return 0 if joint is None else sum(held_bytes(s.cutter, block) for s, block in zip(streams, joint.blocks, strict=True))


def _state_bytes(sites: Sequence[Site], tasks: dict[int, Task]) -> int:
    """Bytes of the states of sites that read the same; equal observers of equal sizes share one."""
    kinds = {(tasks[s.leaf].observer, stack_size(s, tasks[s.leaf].leaf), columns(s, tasks[s.leaf].leaf)) for s in sites}
    states = [jax.eval_shape(functools.partial(observer.init, stack, k)) for observer, stack, k in kinds]
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(states))


@dataclasses.dataclass(frozen=True)
class Plan:
    """What `qjax.quantize` would make, need and take. Nothing of it was computed on the data, and of the weights zeros were counted alone.

    Attributes:
      report: a row for each parameter, with what it would become and its bytes before and after, then one for each product of two
        activations that a rule names.
      problems: what `qjax.quantize` would refuse, all of it; such parameters count as float in `report`.
      batches: calibration batches.
      rows: rows of activations in all batches, at the site that reads most (of a language model: tokens).
      passes: runs of the whole program over all batches: to rescale, for sequential methods (in pieces), for static ranges, for the
        outlier columns of `llm_int8`, and for static products.
      statistics: bytes that observers remember at a time, at most. Independent of the number of batches.
      live: bytes of the values between two sites that sequential methods keep, of all batches; `spill=` moves them to disk. What
        is held while a block is tuned is among them, and stays in memory.
      working: bytes of the largest weight and its statistics in the forms in which a method holds them, about.
      work: operations in matrix products, and candidates of searches.
      programs: programs to be compiled for sequential methods.
      seconds: what that takes at `rates`, and `COMPILE` for each program. Overheads of small arrays are not in it.
      rates: of this device, as measured or given.

    Example:
      >>> import jax.numpy as jnp, qjax
      >>> policy = qjax.Policy([qjax.Rule("*", weight=qjax.int8())])
      >>> print(qjax.plan(lambda p, x: x @ p, jnp.ones((16, 4)), policy, [jnp.ones((2, 16))], rates=Rates(1e10, 1e8)).lines()[1])
      data: none is used, and little is computed: it takes as long as reading and writing the weights
    """

    report: Report
    problems: tuple[str, ...]
    batches: int
    rows: int
    passes: int
    statistics: int
    live: int
    working: int
    work: Work
    programs: int
    seconds: float
    rates: Rates

    @property
    def peak(self) -> int:
        """Bytes at the peak, beside the float parameters and the data: packed parameters, statistics, live values, working memory."""
        return self.report.nbytes + self.statistics + self.live + self.working

    def lines(self) -> list[str]:
        """The estimates in words, one line each."""
        memory = f"{format_bytes(self.report.nbytes)} packed, {format_bytes(self.statistics)} statistics"
        memory += f", {format_bytes(self.live)} live values, {format_bytes(self.working)} at work"
        made = [(row.bits_per_weight, math.prod(row.shape)) for row in self.report.rows if row.spec]
        bits = sum(each * size for each, size in made) / max(sum(size for _, size in made), 1)
        sizes = f"bytes: {format_bytes(self.report.float_nbytes)} -> {format_bytes(self.report.nbytes)}"
        return [
            *(f"would be refused: {problem}" for problem in self.problems),
            sizes + (f", {bits:.2f} bits a weight where quantized" if made else ""),
            *self._course(),
            f"peak memory beside the float parameters: about {format_bytes(self.peak)} ({memory})",
        ]

    def _course(self) -> list[str]:
        """What is done with data, and how long it takes."""
        used = f"data: {self.batches} batches, {self.rows} rows at a site, {self.passes} passes" if self.passes else "data: none is used"
        if not self.passes and self.seconds < 0.1:
            return [used + ", and little is computed: it takes as long as reading and writing the weights"]
        flops = f"{self.work.products:.2g} operations at {self.rates.products:.2g}/s"
        steps = f"{self.work.steps:.2g} roundings at {self.rates.steps:.2g}/s"
        how = f"{flops}, {steps}, {self.programs} programs to compile; right within a factor of three or so"
        return [used, f"time: about {_duration(self.seconds)} ({how})"]

    def __str__(self) -> str:
        refused = len(self.problems)
        lines = self.lines()
        return "\n".join([*lines[:refused], str(self.report), *lines[refused:]])


def plan(
    fn: Callable[..., Any], params: Any, policy: Policy, calibration: Iterable[Any], *, rates: Rates | None = None
) -> Plan:
    """Says what `qjax.quantize` of the same arguments would make, need and take, from shapes.

    Time: (operations in matrix products) / (their rate) + (candidates of searches) / (their rate) + `COMPILE` for each program.
    Operations are those of the forward passes (products and convolutions), of X^T X at every site, and of the methods (GPTQ:
    K^3 / 3 + 2 N K^2 and 80 N K candidates with `mse`). The two rates are measured on this device, in a second or so.

    Args:
      fn: any JAX function whose first argument is `params`.
      params: the float parameters, or shapes (`jax.ShapeDtypeStruct`). Of numbers it is counted which are zero, for what was pruned
        takes longer; no other is read.
      policy: which parameters become what, and how.
      calibration: batches, or shapes.
      rates: of the device, where they are known; None measures them.

    Returns:
      A `Plan`; `print` it.

    Raises:
      TypeError, ValueError: as `qjax.quantize`, but for groups that do not divide, which are listed in `problems`.

    Example:
      >>> import jax.numpy as jnp, qjax
      >>> fn = lambda p, x: jnp.tanh(x @ p["w"])
      >>> policy = qjax.Policy([qjax.Rule("*", weight=qjax.int4(), method=qjax.gptq())])
      >>> priced = plan(fn, {"w": jnp.ones((16, 4))}, policy, [jnp.ones((2, 16))] * 3, rates=Rates(1e10, 1e8))
      >>> priced.batches, priced.rows, priced.statistics, priced.report.nbytes  # one Hessian of 16 x 16 float32, its counts
      (3, 6, 1032, 48)
    """
    check_policy(policy)
    check_not_learned(policy)
    programs = ProgramCache(fn)
    arguments = [split_arguments(params, batch, {}) for batch in as_batches(calibration)]
    batches = [(programs(a), a.inputs) for a in arguments]
    program = batches[0][0]
    check_same_sites(batches)
    choices, problems = _without_problems(policy.resolve(program))
    named, runtime = policy.resolve_products(program), runtime_of()
    rows = (*(planned_row(choice, runtime) for choice in choices), *map(product_row, named))
    report = Report(rows, (*program_notes(program), *cache_notes(policy), *layout_notes(rows, runtime)))
    chosen = [choice for choice in choices if choice.spec is not None]
    tasks, now = {}, Work()
    for choice in chosen:
        method, _ = method_of(choice)
        if method.observer is None:
            now = now.plus(work_of(method, whole_problem(choice)))
        elif choice.spec is not None:
            tasks[choice.leaf.index] = task_of(choice, choice.spec, method, arguments[0].params[choice.leaf.index])
    rescaling = plan_rescaling(choices, program)
    sequential = plan_sequential(tasks, batches) if tasks else SequentialPlan(Work(), 0, 0, 0, 0, 0)
    shapes = any(isinstance(x, jax.ShapeDtypeStruct) for _, inputs in batches for x in inputs)
    observing = [_ranges(chosen, program), *([] if shapes and not _uncounted(chosen) else [_outliers(chosen, program)]), _operands(named)]
    observing = [nbytes for nbytes in observing if nbytes is not None]
    compared = any(task.needs_float for task in tasks.values())
    passes = len(rescaling) + (1 + compared + sequential.reruns if tasks else 0) + len(observing)
    data = Work(sum(forward(p) for p, _ in batches)).times(passes)
    work = functools.reduce(Work.plus, [now, data, sequential.work, *(w for w, _ in rescaling)])
    rates = measured_rates() if rates is None else rates
    seconds = work.products / rates.products + work.steps / rates.steps + COMPILE * (sequential.programs + passes)
    return Plan(
        report=report,
        problems=problems,
        batches=len(batches),
        rows=_rows(chosen, [p for p, _ in batches]),
        passes=passes,
        statistics=max([sequential.statistics, *(n for _, n in rescaling), *observing]),
        live=sequential.live,
        working=4 * sequential.largest,
        work=work,
        programs=sequential.programs,
        seconds=seconds,
        rates=rates,
    )


def _ranges(chosen: Sequence[Choice], program: Program) -> int | None:
    """Bytes of the observers of static ranges, all of which watch in one pass; None without one."""
    static = {c.leaf.index: c.activation for c in chosen if c.activation is not None and c.activation.static}
    sites = [site for site in program.sites if site.leaf in static and not why_no_rows(site, program.leaves[site.leaf])]
    return _watching(program, {site.key: static[site.leaf].observer or minmax() for site in sites}) if static else None


def _limits(chosen: Sequence[Choice]) -> dict[int, Any]:
    return {c.leaf.index: c.activation.outliers for c in chosen if c.activation is not None and c.activation.outliers is not None}


def _uncounted(chosen: Sequence[Choice]) -> bool:
    """Whether the data must say how many outlier columns there are; without that, shapes are enough."""
    return any(limit.capacity is None for limit in _limits(chosen).values())


def _outliers(chosen: Sequence[Choice], program: Program) -> int | None:
    """Bytes of the counts of outlier columns, None without any."""
    limits = _limits(chosen)
    sites = [site for site in program.sites if site.leaf in limits and counted(site, program.leaves[site.leaf])]
    observers = {s.key: outlier_columns(limits[s.leaf].threshold, limits[s.leaf].capacity) for s in sites}
    return _watching(program, observers) if limits else None


def _operands(named: Sequence[ProductChoice]) -> int | None:
    """Bytes of the observers of static products, None without one."""
    pairs = [(c.product, c.operands) for c in named if c.operands is not None and any(act.static for act in c.operands)]
    total = 0
    for product, acts in pairs:
        observers: list[Any] = [(act.observer or minmax()) if act.static else None for act in acts]
        found = [None if observer is None else Together((observer, AllFinite())) for observer in observers]
        if not why_not_observed(product):
            total += _nbytes(functools.partial(OperandObservers(found[0], found[1]).init, product))
    return total if pairs else None


def _watching(program: Program, observers: Mapping[Any, Any]) -> int:
    watched: Any = {key: Together((observer, AllFinite())) for key, observer in observers.items()}
    return _nbytes(functools.partial(init_states, program, watched))


def _nbytes(make: Callable[[], Any]) -> int:
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(jax.eval_shape(make)))


def _without_problems(choices: Sequence[Choice]) -> tuple[list[Choice], tuple[str, ...]]:
    """The choices, those whose group does not divide or whose method refuses left float; and what `quantize` would say of each rule."""
    out, problems = [], {}
    for choice in choices:
        rule = choice.rule
        mine = [] if rule is None or choice.spec is None else [c for c in choices if c.rule == rule and c.spec is not None]
        alone = undivided(rule, [choice], mine) if rule is not None and mine else ""
        if alone and rule is not None:
            problems[rule] = undivided(rule, mine)
            choice = Choice(choice.leaf, None, alone)
        elif rule is not None and (reason := refusal_of(choice)):
            problems[rule] = reason
            choice = Choice(choice.leaf, None, reason)
        out.append(choice)
    return out, tuple(problems.values())


def _rows(choices: Sequence[Choice], programs: Sequence[Any]) -> int:
    def of(program: Any) -> int:
        sites = [site for c in choices for site in program.leaves[c.leaf.index].sites if site.op != "gather"]
        return max((rows_seen(site, program.leaves[site.leaf]) for site in sites), default=0)

    return sum(map(of, programs))


def measured_rates() -> Rates:
    """Measures the rates of this device, each the best of three."""
    a = jnp.ones((1024, 1024), jnp.float32)
    product = jax.jit(lambda a: jnp.dot(a, a, precision=lax.Precision.HIGHEST))
    blocks = jnp.sin(jnp.arange(2**16, dtype=jnp.float32)).reshape(-1, 128)
    search = jax.jit(lambda x: search_range(x, IntSpec(4))[0])
    return Rates(2 * 1024**3 / _best_time(product, a), blocks.size * len(SHRINK) / _best_time(search, blocks))


def _best_time(f: Callable[..., Any], x: jax.Array) -> float:
    jax.block_until_ready(f(x))
    times = []
    for _ in range(3):
        started = time.perf_counter()
        jax.block_until_ready(f(x))
        times.append(time.perf_counter() - started)
    return max(min(times), 1e-9)


def _duration(seconds: float) -> str:
    if seconds < 100:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"
