"""`quantize`: a function, float parameters, a policy and a little data become packed parameters and a report."""

from __future__ import annotations

import dataclasses
import math
import os
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from qjax.calibration import as_batches, why_no_rows
from qjax.core import QProduct, QTensor, Spec, check_all_finite
from qjax.graph import Fold
from qjax.policy import Choice, Policy, check_not_learned, check_policy
from qjax.program import Leaf, Packed, Program, ProgramCache, check_function, split_arguments
from qjax.program.packed import can_scan
from qjax.ptq.activations import with_activations
from qjax.ptq.data import Batches, check_numbers, check_same_sites
from qjax.ptq.groups import check_groups, padding_note
from qjax.ptq.input_scale import part_scale, quantize_scaled, scaled_shapes
from qjax.ptq.llm_int8 import with_capacities
from qjax.ptq.method import Method, Outcome, Problem, fills_zeros, refusal
from qjax.ptq.parts import Layout, join, layout_of, part_axes, problem_of, take
from qjax.ptq.products import product_row, quantize_products
from qjax.ptq.progress import Listener, Monitor
from qjax.ptq.rescale import rescale, rescaled_by
from qjax.ptq.resume import Kept, describe_job, open_kept
from qjax.ptq.rtn import rtn
from qjax.ptq.sequential import quantize_sequential
from qjax.ptq.sparsity import check_filled, check_zeros, has_zero, is_pruned
from qjax.ptq.spill import Spill
from qjax.ptq.streams import Task
from qjax.ptq.underflow import small_scales
from qjax.ptq.work import work_of
from qjax.report import Report, Row
from qjax.runtime.adapter import why_not as why_no_adapter
from qjax.runtime.installed import runtime_of
from qjax.runtime.kernels import Runtime
from qjax.runtime.select import kernel_of

Done = dict[int, tuple[QTensor, tuple[str, ...]]]


@dataclasses.dataclass(frozen=True)
class Result:
    """A quantized model.

    Attributes:
      params: the tree of parameters, `QTensor` where quantized: with `sites`, all that is needed to run it.
      report: what was quantized, how, and what it cost.
      policy: the policy it was made with; None of a tree that was saved without one.
      metadata: the caller's own, kept by `qjax.save`.
      sites: the products of two activations that a rule names, by name, for `qjax.quantized(fn, sites=result.sites)`; they have no
        parameter to ride on. Empty without such a rule.
      folds: how inputs were rescaled before anything was rounded: (`qjax.graph.Fold`, its scales s), in order. `apply_fold` of all to the
        float parameters gives those that `params` rounds. Not saved: empty for a model that was loaded.
    """

    params: Any
    report: Report
    policy: Policy | None
    metadata: dict[str, Any] = dataclasses.field(default_factory=dict)
    sites: dict[str, QProduct] = dataclasses.field(default_factory=dict)
    folds: tuple[tuple[Fold, jax.Array], ...] = ()

    def __repr__(self) -> str:
        return f"Result({self.report.summary})"


def quantize(
    fn: Callable[..., Any],
    params: Any,
    policy: Policy,
    calibration: Iterable[Any],
    *,
    progress: Listener | None = None,
    resume: str | os.PathLike[str] | None = None,
    spill: Spill | None = None,
) -> Result:
    """Quantizes the parameters of a function after training.

    The function is traced with the first batch; every parameter that meets data in a matmul, convolution or lookup and that a
    rule names becomes a `QTensor`, and every product of two activations that a rule names an entry of `result.sites`. A method that
    rescales inputs changes what makes them in exchange, a norm's scale for one, and the report names it. Methods that need data
    run in data-flow order, each site on the activations of the
    quantized sites before it. `params` is not changed.

    Args:
      fn: any JAX function whose first argument is `params`: a Linen `model.apply`, or a plain function. For modules see
        `qjax.linen.quantize` and `qjax.nnx.quantize`.
      params: the float parameters.
      policy: which parameters become what, and how.
      calibration: batches, at least one, re-iterable. A tuple is spread over the function's arguments after `params`; a
        dict or an array is one argument. Shapes (`jax.ShapeDtypeStruct`) are enough where no method needs data.
      progress: called with a `qjax.Progress` at the begin of a phase and after each of its steps, with the time that remains.
      resume: a folder that keeps each finished parameter (or layer of one) and each input's scales. The same call with the
        same folder goes on after a kill where the last one was, and gives the same result to the bit. The folder stays, for until
        the result is saved it is the only copy: remove it then.
      spill: keeps the live values of sequential methods below a limit, the rest on disk; None keeps all in memory.

    Returns:
      A `Result` with `params` and `report`.

    Raises:
      TypeError: `policy` is no policy.
      ValueError: `calibration` is empty, holds only shapes for a method that needs data, a batch whose program has other sites,
        or one that gives a site NaN or infinity; a rule matches nothing; a group does not divide a weight; a weight holds NaN or
        infinity; `resume` holds another job.
      FileExistsError: `resume` holds something else.

    Example:
      >>> import jax.numpy as jnp, qjax
      >>> fn = lambda p, x: jnp.tanh(x @ p["w"] + p["b"])
      >>> params = {"w": jnp.linspace(-1, 1, 64).reshape(16, 4), "b": jnp.zeros(4)}
      >>> result = quantize(fn, params, qjax.Policy([qjax.Rule("*", weight=qjax.int8())]), calibration=[jnp.ones((2, 16))])
      >>> result.params["w"]
      QTensor(int8(per="channel"), float32[16,4], 80 bytes, 10 bits/weight)
    """
    check_function(fn)
    check_policy(policy)
    check_not_learned(policy)
    if spill is not None and not isinstance(spill, Spill):
        raise TypeError(f"`spill` must be a qjax.Spill or None, got {type(spill).__name__}")
    if progress is not None and not callable(progress):
        raise TypeError(f"`progress` must be a function of a qjax.Progress or None, got {type(progress).__name__}")
    started = time.perf_counter()
    batches = as_batches(calibration)
    programs = ProgramCache(fn)
    arguments = [split_arguments(params, batch, {}) for batch in batches]
    flat = arguments[0].params
    program = programs(arguments[0])
    choices, named = policy.resolve(program), policy.resolve_products(program)
    pruned = _check_leaves(flat, choices)
    flat = [jnp.asarray(w) if c.spec is not None else w for c, w in zip(choices, flat, strict=True)]
    traced = time.perf_counter()

    streams = [(programs(a), a.inputs) for a in arguments]
    _check_work(choices, streams)
    kept = open_kept(resume, None if resume is None else describe_job(policy, arguments, [p for p, _ in streams]))
    monitor = Monitor(progress)

    flat, scales, rescaled, folds = rescale(flat, choices, streams, monitor, kept)
    done, tasks = _without_data(choices, flat, scales, monitor, kept)
    memory: dict[str, int] = {}
    if tasks:
        current = [done[i][0] if i in done else w for i, w in enumerate(flat)]
        found, memory = quantize_sequential(current, tasks, streams, monitor, kept, spill, flat)
        done |= found
    done = with_activations(done, choices, flat, streams, monitor)
    done = with_capacities(done, choices, flat, streams, monitor)
    packed = [done[i][0] if i in done else w for i, w in enumerate(flat)]
    products, product_rows = quantize_products(named, packed, streams, monitor)
    jax.block_until_ready([jax.tree.leaves(x) for x in (*packed, products)])
    finished = time.perf_counter()
    seconds = {"trace": round(traced - started, 3), "quantize": round(finished - traced, 3)}
    remarks = {i: (*rescaled.get(i, ()), *pruned.get(i, ())) for i in rescaled.keys() | pruned.keys()}
    report = describe(program, choices, flat, done, seconds, remarks)
    notes = (*report.notes, *cache_notes(policy))
    report = dataclasses.replace(report, rows=(*report.rows, *product_rows), notes=notes, memory=memory)
    new_params, _, _ = arguments[0].rebuild(packed, arguments[0].inputs)
    return Result(new_params, report, policy, sites=products, folds=folds)


def _without_data(
    choices: Sequence[Choice], flat: Sequence[Any], scales: Mapping[int, Any], monitor: Monitor, kept: Kept
) -> tuple[Done, dict[int, Task]]:
    """Quantizes what needs no data; gives it, and the tasks that do."""
    tasks: dict[int, Task] = {}
    now: list[tuple[Choice, Any, Method, tuple[str, ...]]] = []
    for choice in choices:
        if choice.spec is None or choice.rule is None:
            continue
        method, note = method_of(choice)
        if method.observer is None:
            now.append((choice, choice.spec, method, note))
        else:
            tasks[choice.leaf.index] = task_of(choice, choice.spec, method, flat[choice.leaf.index], scales.get(choice.leaf.index))
    phase = monitor.phase("round", [work_of(method, whole_problem(choice)).weight for choice, _, method, _ in now])
    done: Done = {}
    for choice, spec, method, note in now:
        leaf, scale = choice.leaf, scales.get(choice.leaf.index)
        outcome = kept.outcome(leaf.index, (), lambda choice=choice, scale=scale: scaled_shapes(shapes_of(choice), scale))
        found = outcome is not None
        if outcome is None:
            outcome = _by_parts(leaf, spec, method, flat[leaf.index], scale)
            kept.keep_outcome(leaf.index, (), outcome)
        done[leaf.index] = outcome.q, (*outcome.notes, *note)
        phase.step(leaf.path, found)
    return done, tasks


def task_of(choice: Choice, spec: Spec, method: Method, w: Any, scale: Any = None) -> Task:
    """A parameter that a method quantizes on data; of numbers it is looked whether they were pruned, which has its price."""
    numbers = isinstance(w, (jax.Array, np.ndarray)) and not isinstance(w, Tracer)
    return Task(choice.leaf, spec, method, scale, numbers and is_pruned(whole_problem(choice)._replace(w=jnp.asarray(w))))


def method_of(choice: Choice) -> tuple[Method, tuple[str, ...]]:
    """The rule's method, or rounding with the reason where the method cannot do anything for this parameter."""
    method: Any = choice.rule.method if choice.rule is not None and choice.rule.method is not None else rtn()
    ways = dict.fromkeys((site.contracted, site.stacked) for site in choice.leaf.sites)
    if len(ways) > 1:
        note = "its sites contract different axes " + ", ".join(str(axes) for axes, _ in ways) + "; scales follow the first"
        return (method, (note,)) if method.observer is None else (rtn(), (_instead(method, note),))
    if method.observer is None:
        return method, ()
    reasons = {site.op: why_no_rows(site, choice.leaf) for site in choice.leaf.sites}
    refused = [reason for reason in reasons.values() if reason]
    if "gather" in reasons and len(reasons) > 1:
        untie = "qjax.graph.untie(fn, params, *inputs) gives its products a copy of their own, or"
        return rtn(), (_instead(method, "it is also looked up as an embedding", untie),)
    if refused:
        return rtn(), (_instead(method, refused[0]),)
    return method, ()


def _instead(method: Method, reason: str, remedy: str = "") -> str:
    """What is said of a parameter that is rounded in place of its rule's method: which, why, and what would be better."""
    remedy = " ".join(filter(None, (remedy, "take a method that needs no data, such as qjax.rtn(mse=True)")))
    return f"rounded, not {method.name}: {reason}; {remedy}"


def _by_parts(leaf: Leaf, spec: Spec, method: Method, w: jax.Array, scale: Any = None) -> Outcome:
    """Quantizes a weight without data, a layer of a stack at a time: all of them at once would hold several float copies."""
    site = leaf.sites[0]
    layout = layout_of(leaf) if _same_parts(leaf) else Layout((), ())
    if not layout.axes:
        return quantize_scaled(method, problem_of(leaf, site, spec, w), None, scale)
    outcomes = {}
    for part in layout.all:
        problem = problem_of(leaf, site, spec, take(w, layout, part), layout.axes)
        outcomes[part] = quantize_scaled(method, problem, None, part_scale(scale, layout, part))
    notes = dict.fromkeys(note for outcome in outcomes.values() for note in outcome.notes)
    return Outcome(join(leaf, layout, {part: outcome.q for part, outcome in outcomes.items()}), tuple(notes))


def _same_parts(leaf: Leaf) -> bool:
    return len({part_axes(site) for site in leaf.sites}) == 1 and set(part_axes(leaf.sites[0])) <= set(leaf.sites[0].stacked)


def _check_leaves(flat: Sequence[Any], choices: Sequence[Choice]) -> dict[int, tuple[str, ...]]:
    """Refuses parameters that cannot be quantized; gives remarks on others."""
    chosen = [choice for choice in choices if choice.spec is not None]
    for choice in chosen:
        w = flat[choice.leaf.index]
        if isinstance(w, Tracer):
            raise TypeError(f"`params` leaf {choice.leaf.path!r} is a tracer: call quantize outside jit, it needs numbers")
        if isinstance(w, QTensor):
            raise ValueError(f"`params` leaf {choice.leaf.path!r} is quantized already ({w.spec}); quantize the float parameters")
        if not isinstance(w, (jax.Array, np.ndarray)):
            raise TypeError(f"`params` leaf {choice.leaf.path!r} is a {type(w).__name__}: quantize needs numbers")
    check_all_finite({choice.leaf.path: flat[choice.leaf.index] for choice in chosen})
    remarks = {}
    for choice in chosen:
        w = flat[choice.leaf.index]
        problem = whole_problem(choice)._replace(w=w if isinstance(w, jax.Array) else jnp.asarray(w))
        permuted = not has_zero(problem.spec) and shapes_of(choice).perm is not None
        remarks[choice.leaf.index] = check_zeros(problem, permuted)
        if choice.rule is not None and choice.rule.method is not None and fills_zeros(choice.rule.method):
            check_filled(problem, choice.rule.method.name)
    return remarks


def whole_problem(choice: Choice) -> Problem:
    """A parameter as a problem of its shape alone."""
    leaf = choice.leaf
    w = jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)
    return problem_of(leaf, leaf.sites[0], choice.spec, w)  # pyright: ignore[reportArgumentType]


def refusal_of(choice: Choice) -> str:
    """What is said of a parameter that its rule's method cannot quantize, whatever the spec; "" if it can."""
    method: Any = None if choice.rule is None or choice.spec is None else choice.rule.method
    if method is None:
        return ""
    reason = refusal(method, choice.leaf)
    return f"`method` {method.name} cannot quantize {choice.leaf.path!r}: {reason}" if reason else ""


def shapes_of(choice: Choice) -> QTensor:
    """What a parameter will be stored as, from shapes alone; ValueError if its method cannot do it."""
    if reason := refusal_of(choice):
        raise ValueError(reason)
    return method_of(choice)[0].shapes(whole_problem(choice))


def _check_work(choices: Sequence[Choice], batches: Batches) -> None:
    """Says now, not after minutes of calibration, what cannot be done."""
    chosen = [choice for choice in choices if choice.spec is not None]
    check_groups(chosen)
    for choice in chosen:
        shapes_of(choice)
    rescaled = rescaled_by(chosen)
    needs = [(c, method_of(c)[0]) for c in chosen if method_of(c)[0].observer is not None or c.leaf.index in rescaled]
    if needs:
        choice, method = needs[0]
        check_numbers(batches, f"{method.name} of {choice.leaf.path!r}")
    if needs or any(c.activation is not None and c.activation.static for c in chosen):
        check_same_sites(batches)


def describe(
    program: Program,
    choices: Sequence[Choice],
    flat: Sequence[Any],
    done: dict[int, tuple[QTensor, tuple[str, ...]]],
    seconds: dict[str, float],
    rescaled: Mapping[int, tuple[str, ...]],
) -> Report:
    """Writes the report of a run: measures the error each parameter took."""
    weights = {i: jnp.asarray(flat[i]) for i in done}
    # Measured while the rows are written: no number is waited for before all are asked for.
    measured = {i: relative_error(weights[i], q) for i, (q, _) in done.items()}
    runtime = runtime_of()
    rows = [planned_row(choice, runtime, done[choice.leaf.index][0] if choice.leaf.index in done else None) for choice in choices]
    errors = jax.device_get(measured)
    for at, choice in enumerate(choices):
        index = choice.leaf.index
        if index not in done:
            rows[at] = dataclasses.replace(rows[at], notes=rescaled.get(index, ()))
            continue
        q, notes = done[index]
        small = small_scales(weights[index], q, choice.leaf.sites[0].stacked)
        notes = dict.fromkeys((*rescaled.get(index, ()), *notes, *small, *rows[at].notes))
        rows[at] = dataclasses.replace(rows[at], error=float(errors[index]), notes=tuple(notes))
    return Report(tuple(rows), (*program_notes(program), *layout_notes(rows, runtime)), seconds)


@jax.jit
def relative_error(w: jax.Array, q: QTensor) -> jax.Array:
    """What `Row.error` says of a weight: |w - w_hat|^2 / |w|^2, a float32 scalar."""

    def sums(part: tuple[jax.Array, QTensor], unit: jax.Array) -> tuple[jax.Array, jax.Array]:
        w = part[0].astype(jnp.float32)
        return jnp.sum(jnp.square((w - part[1].dequantize().astype(jnp.float32)) * unit)), jnp.sum(jnp.square(w * unit))

    def whole(unit: jax.Array) -> tuple[jax.Array, jax.Array]:
        # A stack one layer at a time, without a float copy of it.
        stack = w.ndim > 2 and can_scan(Packed(q))
        error, norm = jax.lax.map(lambda part: sums(part, unit), (w, q)) if stack else sums((w, q), unit)
        return jnp.sum(error), jnp.sum(norm)

    def in_units() -> tuple[jax.Array, jax.Array]:
        reach = jnp.max(jnp.abs(w)).astype(jnp.float32)
        return whole(1 / jnp.where(reach > 0, reach, 1.0))

    # Squares of very small and very large weights leave float32: those are measured again, in units of the largest.
    error, norm = plain = whole(jnp.ones((), jnp.float32))
    fits = jnp.isfinite(error + norm) & (norm > 1e-20 * w.size)
    error, norm = jax.lax.cond(fits, lambda: plain, in_units)
    return error / jnp.maximum(norm, 1e-30)


def planned_row(choice: Choice, runtime: Runtime, q: QTensor | None = None) -> Row:
    """What would become of a parameter, without touching a number; `q` where it is known what did; `runtime` names its kernels."""
    leaf, spec = choice.leaf, choice.spec
    nbytes = math.prod(leaf.shape) * leaf.dtype.itemsize
    row = Row(
        path=leaf.path,
        shape=leaf.shape,
        dtype=str(leaf.dtype),
        ops=tuple(site.op for site in leaf.sites),
        scopes=tuple(site.scope for site in leaf.sites),
        spec="" if spec is None else str(spec),
        method="",
        bits_per_weight=leaf.dtype.itemsize * 8,
        nbytes=nbytes,
        float_nbytes=nbytes,
        reason=choice.reason,
    )
    if spec is None:
        return row
    method, notes = method_of(choice)
    q = shapes_of(choice) if q is None else q
    act, note = choice.activation, (choice.activation_note,) if choice.activation_note else ()
    if act is not None and act.outliers is not None and q.act is not None:
        act = q.act  # which knows the capacity
    kernels = dict.fromkeys(kernel_of(site, spec, act, q, runtime) for site in leaf.sites)
    reasons = tuple(reason for _, reason, _ in kernels if reason)
    if q.adapter_left is not None:
        whole = (f"its low-rank part is multiplied out in front of the product: {why}" for s in leaf.sites if (why := why_no_adapter(s)))
        reasons = (*reasons, *dict.fromkeys(whole))
    return dataclasses.replace(
        row,
        method=method.name,
        nbytes=q.nbytes,
        bits_per_weight=q.bits_per_weight,
        activation="" if act is None else str(act),
        kernel=", ".join(dict.fromkeys(kernel for kernel, _, _ in kernels)),
        kernel_reasons=tuple(dict.fromkeys(reason for _, _, reasons in kernels for reason in reasons)),
        notes=(*notes, *note, *reasons, *padding_note(choice.leaf, spec, q.nbytes)),
    )


def program_notes(program: Program) -> tuple[str, ...]:
    """Remarks on the whole program."""
    notes = [
        f"a closed-over {dtype} array of shape {shape} is no argument of the function: it stays float"
        for shape, dtype in program.closed_over
    ]
    for leaf in program.leaves:
        if any(site.custom_rule for site in leaf.sites):
            notes.append(f"{leaf.path} is used inside a custom derivative rule: it is dequantized in front of it")
        if leaf.sites and leaf.consumers:
            notes.append(f"{leaf.path} is also read by {', '.join(leaf.consumers)}, which gets the dequantized value")
    return tuple(notes)


def layout_notes(rows: Sequence[Row], runtime: Runtime) -> tuple[str, ...]:
    """Says what has to be done before the kernels of a report run."""
    named = {name for row in rows for name in row.kernel.split(", ")}
    laid = [kernel.name for kernel in runtime.kernels if kernel.layout is not None and kernel.name in named]
    text = "weights have a layout of their own: params = qjax.prepack(fn)(result.params, *inputs), once; others run on XLA"
    return (f"{' and '.join(laid)}: {text}",) if laid else ()


def cache_notes(policy: Policy) -> tuple[str, ...]:
    """Says which rules of a policy are not for parameters, and what makes of caches what they say."""
    rules = [f"{rule.pattern!r} ({rule.cache})" for rule in policy.rules if rule.cache is not None]
    which = f"rule {rules[0]} names" if len(rules) == 1 else f"rules {', '.join(rules)} name"
    return (f"{which} caches, which are no parameters: pack them with qjax.quantized_cache(fn, policy)",) if rules else ()


def sites(fn: Callable[..., Any], policy: Policy) -> Callable[..., Report]:
    """Transforms `fn(params, *args)` into a function that says what a policy would quantize, and touches no number.

    Args:
      fn: any JAX function whose first argument is the tree of parameters.
      policy: the policy to try.

    Returns:
      A function of the same arguments (shapes are enough) that returns a `Report`.

    Raises:
      TypeError: `policy` is no policy.
      ValueError: the returned function does, for groups that do not divide, as `quantize` would (`plan` lists them in place of that).

    Example:
      >>> import jax.numpy as jnp, qjax
      >>> fn = lambda p, x: x @ p["w"] + p["b"]
      >>> params = {"w": jnp.ones((16, 4)), "b": jnp.zeros(4)}
      >>> report = sites(fn, qjax.Policy([qjax.Rule("*", weight=qjax.int8())]))(params, jnp.ones((2, 16)))
      >>> [(row.path, row.spec, row.reason) for row in report.rows]
      [('b', '', 'it meets no data in a matmul, convolution or lookup, only add'), ('w', 'int8(per="channel")', '')]
    """
    check_policy(policy)
    programs = ProgramCache(fn)

    def call(params: Any, *args: Any, **kwargs: Any) -> Report:
        program = programs(split_arguments(params, args, kwargs))
        choices, runtime = policy.resolve(program), runtime_of()
        check_groups([choice for choice in choices if choice.spec is not None])
        rows = (*(planned_row(choice, runtime) for choice in choices), *map(product_row, policy.resolve_products(program)))
        return Report(rows, (*program_notes(program), *cache_notes(policy), *layout_notes(rows, runtime)))

    return call
