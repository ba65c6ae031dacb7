"""`plan`: what quantizing would make, need and take, without doing it."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from qjax.calibration import columns, stack_size
from qjax.core import IntSpec
from qjax.policy import Choice, Policy, check_policy
from qjax.program import Program, ProgramCache, Site, split_arguments
from qjax.ptq.data import check_same_sites
from qjax.ptq.groups import undivided
from qjax.ptq.parts import layout_of
from qjax.ptq.quantize import as_batches, method_of, planned_row, program_notes, whole_problem
from qjax.ptq.range_search import SHRINK, search_range
from qjax.ptq.rescale import plan_rescaling
from qjax.ptq.sequential import Task, flat_leaves, grouped, streams_of, visit_work, visits_of
from qjax.ptq.spill import Live
from qjax.ptq.work import Work, forward, rows_seen, work_of
from qjax.report import Report, format_bytes

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
      live: bytes of the live values of all batches between two sites, at their peak.
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
    groups = grouped(first, flat)
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
    sizes = [math.prod(task.leaf.shape) * 4 // max(math.prod(layout_of(task.leaf).count), 1) for i, task in tasks.items() if i in flat]
    largest = max([*states, 0]) + max([*sizes, *(math.prod(tasks[i].leaf.shape) * 4 for i in pooled), 0])
    return SequentialPlan(work, len(keys), len(pooled), max([*states, 0]), max([*live, 0]), largest)


def _state_bytes(sites: Sequence[Site], tasks: dict[int, Task]) -> int:
    """Bytes of the states of sites that read the same; equal observers of equal sizes share one."""
    kinds = {(tasks[s.leaf].observer, stack_size(s, tasks[s.leaf].leaf), columns(s, tasks[s.leaf].leaf)) for s in sites}
    states = [jax.eval_shape(functools.partial(observer.init, stack, k)) for observer, stack, k in kinds]
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(states))


@dataclasses.dataclass(frozen=True)
class Plan:
    """What `qjax.quantize` would make, need and take. Nothing of it was computed on the weights or the data.

    Attributes:
      report: a row for each parameter, with what it would become and its bytes before and after.
      problems: what `qjax.quantize` would refuse, all of it; such parameters count as float in `report`.
      batches: calibration batches.
      rows: rows of activations in all batches, at the site that reads most (of a language model: tokens).
      passes: runs of the whole program over all batches, one of which sequential methods make in pieces.
      statistics: bytes that observers remember at a time, at most. Independent of the number of batches.
      live: bytes of the values between two sites that sequential methods keep, of all batches; `spill=` moves them to disk.
      working: bytes of the largest weight and its statistics in the forms in which a method holds them, about.
      work: operations in matrix products, and candidates of searches.
      programs: programs to be compiled for sequential methods.
      seconds: what that takes at `rates`, and `COMPILE` for each program. Overheads of small arrays are not in it.
      rates: of this device, as measured or given.
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
        made = sum(row.nbytes for row in self.report.rows if row.spec)
        bits = sum(row.bits_per_weight * row.nbytes for row in self.report.rows if row.spec) / max(made, 1)
        flops = f"{self.work.products:.2g} operations at {self.rates.products:.2g}/s"
        steps = f"{self.work.steps:.2g} roundings at {self.rates.steps:.2g}/s"
        return [
            f"bytes: {format_bytes(self.report.float_nbytes)} -> {format_bytes(self.report.nbytes)}, "
            f"{bits:.2f} bits a weight where quantized",
            f"data: {self.batches} batches, {self.rows} rows at a site, {self.passes} passes",
            f"peak memory beside the float parameters: about {format_bytes(self.peak)} ({memory})",
            f"time: about {_duration(self.seconds)} ({flops}, {steps}, {self.programs} programs to compile; right within a factor of "
            "three or so)",
            *(f"would be refused: {problem}" for problem in self.problems),
        ]

    def __str__(self) -> str:
        return "\n".join([str(self.report), *self.lines()])


def plan(
    fn: Callable[..., Any], params: Any, policy: Policy, calibration: Iterable[Any], *, rates: Rates | None = None
) -> Plan:
    """Says what `qjax.quantize` of the same arguments would make, need and take, from shapes alone.

    Time: (operations in matrix products) / (their rate) + (candidates of searches) / (their rate) + `COMPILE` for each program.
    Operations are those of the forward passes (products and convolutions), of X^T X at every site, and of the methods (GPTQ:
    K^3 / 3 + 2 N K^2 and 80 N K candidates with `mse`). The two rates are measured on this device, in a second or so.

    Args:
      fn: any JAX function whose first argument is `params`.
      params: the float parameters, or shapes (`jax.ShapeDtypeStruct`); no number of them is read.
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
    programs = ProgramCache(fn)
    arguments = [split_arguments(params, batch, {}) for batch in as_batches(calibration)]
    batches = [(programs(a), a.inputs) for a in arguments]
    program = batches[0][0]
    check_same_sites(batches)
    choices, problems = _without_problems(policy.resolve(program))
    report = Report(tuple(map(planned_row, choices)), program_notes(program))
    chosen = [choice for choice in choices if choice.spec is not None]
    tasks, now = {}, Work()
    for choice in chosen:
        method, _ = method_of(choice)
        if method.observer is None:
            now = now.plus(work_of(method, whole_problem(choice)))
        elif choice.spec is not None:
            tasks[choice.leaf.index] = Task(choice.leaf, choice.spec, method)
    rescaling = plan_rescaling(choices, program)
    sequential = plan_sequential(tasks, batches) if tasks else SequentialPlan(Work(), 0, 0, 0, 0, 0)
    static = any(choice.activation is not None and choice.activation.static for choice in chosen)
    passes = len(rescaling) + (1 + sequential.reruns if tasks else 0) + static
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
        statistics=max([sequential.statistics, *(n for _, n in rescaling)]),
        live=sequential.live,
        working=4 * sequential.largest,
        work=work,
        programs=sequential.programs,
        seconds=seconds,
        rates=rates,
    )


def _without_problems(choices: Sequence[Choice]) -> tuple[list[Choice], tuple[str, ...]]:
    """The choices, those whose group does not divide left float; and what `quantize` would say of each rule."""
    out, problems = [], {}
    for choice in choices:
        rule = choice.rule
        alone = undivided(rule, [choice]) if rule is not None and choice.spec is not None else ""
        if alone and rule is not None:
            problems[rule] = undivided(rule, [c for c in choices if c.rule == rule and c.spec is not None])
            choice = Choice(choice.leaf, None, alone)
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
