"""`rewrite`: the function-preserving rewrites of `qjax.graph`, one after the other, on a function and its parameters."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from rich.table import Table

from qjax.core import QTensor, check_finite, check_key
from qjax.graph import NotPreserved, equalize, fold_batch_norm, rotate, verify
from qjax.graph import untie as take_apart
from qjax.program import Program, split_arguments
from qjax.program.trace import trace_arguments
from qjax.ptq.quantize import as_batches
from qjax.report import render


@dataclasses.dataclass(frozen=True, eq=False)
class StepOutcome:
    """What one step gives.

    Attributes:
      params: the parameters' new array leaves.
      changes: (path of a parameter, what became of it).
      refused: (path of a parameter, why it could not be done for it).
      error: relative change of the results, see `qjax.graph.verify`.
    """

    params: list[Any]
    changes: tuple[tuple[str, str], ...]
    refused: tuple[tuple[str, str], ...]
    error: float


@runtime_checkable
class Step(Protocol):
    """A rewrite that keeps the function. A frozen dataclass of its options, built by a function of its name."""

    @property
    def name(self) -> str:
        """What the report calls it."""
        ...

    def apply(self, program: Program, params: Sequence[Any], inputs: Sequence[Any]) -> StepOutcome:
        """Rewrites the parameters of a program, verified on one batch.

        Args:
          program: the traced program.
          params: the parameters' array leaves.
          inputs: the array leaves of the other arguments.

        Returns:
          A `StepOutcome`.

        Raises:
          NotPreserved: the function would have changed by more than rounding.
        """
        ...


@dataclasses.dataclass(frozen=True)
class BatchNormFolding:
    """See `batch_norm_folding`."""

    @property
    def name(self) -> str:
        return "batch_norm_folding"

    def apply(self, program: Program, params: Sequence[Any], inputs: Sequence[Any]) -> StepOutcome:
        result = fold_batch_norm(program, params, inputs)
        changes: list[tuple[str, str]] = []
        for fold in result.folded:
            changes += [(fold.weight, f"took the scale of {fold.scale}"), (fold.scale, "multiplies by one now")]
            changes += [(fold.shift, "holds the whole shift"), *((path, "is zero now") for path in fold.zeroed)]
        return _outcome(result, changes, result.refused, "found no batch norm behind a linear layer")


@dataclasses.dataclass(frozen=True)
class Equalization:
    """See `equalization`."""

    iterations: int

    @property
    def name(self) -> str:
        return "equalization"

    def apply(self, program: Program, params: Sequence[Any], inputs: Sequence[Any]) -> StepOutcome:
        result = equalize(program, params, inputs, self.iterations)
        changes: list[tuple[str, str]] = []
        for pair in result.pairs:
            before, after = pair.spread
            gain = f"spread of channels on both sides {before:.3g} -> {after:.3g}"
            changes += [(path, f"shares its range with {', '.join(pair.consumers)}: {gain}") for path in pair.producers]
            changes += [(path, f"shares its range with {', '.join(pair.producers)}") for path in pair.consumers]
        refused = [(path, f"the channels that it reads stay as they are: {reason}") for path, reason in result.refused]
        return _outcome(result, changes, refused, "found no two layers with a channel between them")


@dataclasses.dataclass(frozen=True, eq=False)
class StreamRotation:
    """See `rotation`."""

    key: jax.Array
    every: bool

    @property
    def name(self) -> str:
        return "rotation"

    def apply(self, program: Program, params: Sequence[Any], inputs: Sequence[Any]) -> StepOutcome:
        result = rotate(program, params, inputs, self.key, self.every)
        changes: list[tuple[str, str]] = []
        for done in result.rotations:
            ones = ", which keeps the ones" if done.keeps_ones else ", for each run of its channels" if done.runs else ""
            changes += [(path, "moved into what reads it and is one now") for path in done.scales]
            for path, axes in done.rotated:
                which = f"{'axes' if len(axes) > 1 else 'axis'} {', '.join(map(str, axes))}"
                share = dict(done.zeros).get(path, 0.0)
                lost = f"; {100 * share:.2g} % of it was exactly zero, which a rotation does not keep" if share else ""
                changes.append((path, f"{which} rotated by a matrix of size {done.size} ({done.kind}{ones}){lost}"))
        return _outcome(result, changes, result.refused, "found no value between two layers to rotate")


def _outcome(result: Any, changes: Iterable[tuple[str, str]], refused: Iterable[tuple[str, str]], nothing: str) -> StepOutcome:
    """What a step gives; one that changed nothing and refused nothing says `nothing`."""
    changes, refused = tuple(changes), tuple(refused)
    return StepOutcome(result.params, changes, refused if changes or refused else (("*", nothing),), result.error)


def batch_norm_folding() -> BatchNormFolding:
    """Moves batch norms on stored statistics into the layer before them; see `qjax.graph.fold_batch_norm`.

    Returns:
      A step for `qjax.rewrite`.

    Example:
      >>> batch_norm_folding().name
      'batch_norm_folding'

    Source: Jacob et al. 2017, arXiv 1712.05877, section 3.2.
    """
    return BatchNormFolding()


def equalization(iterations: int = 50) -> Equalization:
    """Gives the channels between two layers equal ranges on both sides; see `qjax.graph.equalize`.

    Args:
      iterations: most rounds over all pairs.

    Returns:
      A step for `qjax.rewrite`.

    Raises:
      ValueError: `iterations` is less than 1.

    Example:
      >>> equalization(iterations=10)
      Equalization(iterations=10)

    Source: Nagel et al. 2019, arXiv 1906.04721, section 4.1.
    """
    if iterations < 1:
        raise ValueError(f"`iterations` must be at least 1, got {iterations}")
    return Equalization(iterations)


def rotation(key: jax.Array, every: bool = False) -> StreamRotation:
    """Rotates the residual stream by a random orthogonal matrix, which spreads outlier channels; see `qjax.graph.rotate`.

    Args:
      key: a key of `jax.random`.
      every: also rotates values that no sum of two activations ties together: between two linear layers, and the heads of values on their
        way through attention to the output projection, grouped heads included.

    A pruned weight is not sparse in another basis: a stream that it reads or writes stays as it is, and the result says so. A few zeros
    are lost, and the result counts them.

    Returns:
      A step for `qjax.rewrite`.

    Raises:
      TypeError: `key` is no key.

    Example:
      >>> rotation(key=jax.random.key(0)).name
      'rotation'

    Source: QuaRot, arXiv 2404.00456; SpinQuant, arXiv 2405.16406.
    """
    check_key("key", key)
    return StreamRotation(key, every)


@dataclasses.dataclass(frozen=True)
class Rewrite:
    """One line of the report.

    Attributes:
      step: name of the step.
      path: the parameter.
      text: what became of it, or why nothing could be done.
      done: False where it was refused.
      after: names of the steps before that had changed it, too; this one came on top.
    """

    step: str
    path: str
    text: str
    done: bool
    after: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Rewritten:
    """A model that was rewritten. `print` shows a table.

    Attributes:
      params: the tree of parameters, of the same structure, shapes and dtypes; the same function takes it, unless `untie` changed it.
      changes: what was changed and what was refused, in the order of the steps.
      errors: (name of the step, relative change of the results on the first batch by it).
      error: relative change of the results by all steps together.
      fn: the function that takes `params`: the one that was given, unless `untie` changed it.
    """

    params: Any
    changes: tuple[Rewrite, ...]
    errors: tuple[tuple[str, float], ...]
    error: float
    fn: Callable[..., Any]

    @property
    def refused(self) -> tuple[Rewrite, ...]:
        """The lines of `changes` that say why something could not be done."""
        return tuple(change for change in self.changes if not change.done)

    def __rich__(self) -> Table:
        done = [change for change in self.changes if change.done]
        title = f"{len({change.path for change in done})} parameters rewritten; the results differ by {self.error:.2g} of their largest"
        caption = "\n".join(f"{name}: error {error:.2g}" for name, error in self.errors)
        table = Table(title=title, title_justify="left", caption=caption or None, caption_justify="left")
        for name in ("step", "parameter", "what"):
            table.add_column(name, overflow="fold")
        for change in self.changes:
            after = f" (after {', '.join(change.after)})" if change.after else ""
            text = change.text + after if change.done else f"refused: {change.text}"
            table.add_row(change.step, change.path, text, style=None if change.done else "dim")
        return table

    def __str__(self) -> str:
        return render(self)


def rewrite(
    fn: Callable[..., Any], params: Any, calibration: Iterable[Any], steps: Sequence[Step], *, untie: bool = False
) -> Rewritten:
    """Rewrites the parameters of a function so that it computes the same and quantizes better.

    Every step is found by data flow, for any program, and is verified: the function is run with the old and the new parameters on the
    first batch, and a step that changes its results by more than rounding is refused as a whole. Steps compose: each starts from what the
    steps before it made, and the report says where two changed one parameter. `params` is not changed.

    Args:
      fn: any JAX function whose first argument is `params`. Statistics that are to be folded (a batch norm's) must be among them: of a
        Linen module pass all variables. See also `qjax.linen.rewrite` and `qjax.nnx.rewrite`.
      params: the float parameters.
      calibration: batches, as for `qjax.quantize`; the first is used.
      steps: `qjax.batch_norm_folding()`, `qjax.equalization()`, `qjax.rotation(key=...)`, in this order if several are wanted.
      untie: first gives the products of a parameter that is looked up, too, a copy of their own (`qjax.graph.untie`). A norm's scale in
        front of a tied head has nowhere else to go: without it such a stream is not rotated. Then `result.fn` takes `result.params`.

    Returns:
      A `Rewritten`, whose `params` go to `qjax.quantize`.

    Raises:
      TypeError: `steps` holds something else, or a parameter is quantized already.
      ValueError: `steps` is empty; `calibration` is empty or holds shapes; its first batch or a parameter holds NaN or infinity; on
        that batch the results say nothing (all zero, or not finite); or all steps together change them by more than each of them may.

    Example:
      >>> import jax, jax.numpy as jnp, qjax
      >>> fn = lambda p, x: jax.nn.relu(x @ p["a"]) @ p["b"]
      >>> p = {"a": jnp.array([[1.0, 100.0]]), "b": jnp.array([[4.0], [1.0]])}
      >>> result = qjax.rewrite(fn, p, [jnp.ones((3, 1))], [qjax.equalization()])
      >>> result.params["a"].tolist()
      [[2.0, 10.0]]
      >>> [(change.path, change.done, change.text) for change in result.changes]  # doctest: +ELLIPSIS
      [('a', True, 'shares its range with b: ...'), ('b', True, ...), ('a', False, 'the channels that it reads ...')]
    """
    steps = _checked(steps)
    batches = as_batches(calibration)
    if any(isinstance(x, jax.ShapeDtypeStruct) for x in jax.tree.leaves(batches[0])):
        raise ValueError("`calibration` holds shapes, but a rewrite is verified on data: give a batch of numbers")
    fn, params, untied = _untied(fn, params, batches[0]) if untie else (fn, params, ())
    arguments = split_arguments(params, batches[0], {})
    _check_batch(arguments.inputs)
    program = trace_arguments(fn, arguments)
    for leaf, w in zip(program.leaves, arguments.params, strict=True):
        if isinstance(w, QTensor):
            raise TypeError(f"`params` leaf {leaf.path!r} is quantized already ({w.spec}): rewrite the float parameters")
        if jnp.issubdtype(leaf.dtype, jnp.floating):
            check_finite(jnp.asarray(w), leaf.path)
    leaves, changes, errors = list(arguments.params), list(untied), []
    touched: dict[str, tuple[str, ...]] = {}
    for step in steps:
        try:
            outcome = step.apply(program, leaves, arguments.inputs)
        except NotPreserved as failure:
            outcome = StepOutcome(leaves, (), (("*", f"nothing of it was kept: {failure}"),), 0.0)
        leaves = outcome.params
        changes += [Rewrite(step.name, path, text, True, touched.get(path, ())) for path, text in outcome.changes]
        if not outcome.changes and not outcome.refused:
            outcome = dataclasses.replace(outcome, refused=(("*", "found nothing to do"),))
        changes += [Rewrite(step.name, path, text, False) for path, text in outcome.refused]
        errors.append((step.name, outcome.error))
        for path in dict.fromkeys(path for path, _ in outcome.changes):
            touched[path] = (*touched.get(path, ()), step.name)
    error = verify(program, arguments.params, leaves, arguments.inputs)
    new = [old if w is old else jnp.asarray(w) for old, w in zip(arguments.params, leaves, strict=True)]
    tree, _, _ = arguments.rebuild(new, arguments.inputs)
    return Rewritten(tree, tuple(changes), tuple(errors), error, fn)


def _untied(fn: Callable[..., Any], params: Any, batch: tuple[Any, ...]) -> tuple[Callable[..., Any], Any, tuple[Rewrite, ...]]:
    new = take_apart(fn, params, *batch)
    lines = [Rewrite("untie", path, f"its products read a copy of it, untied/{path}", True) for path in new.paths]
    return new.fn, new.params, tuple(lines) or (Rewrite("untie", "*", "no parameter is both looked up and multiplied", False),)


def _check_batch(inputs: Sequence[Any]) -> None:
    for number, x in enumerate(inputs):
        if not isinstance(x, QTensor) and jnp.issubdtype(x.dtype, jnp.inexact) and not np.isfinite(np.asarray(x)).all():
            what = f"its array {number} of shape {tuple(x.shape)}"
            raise ValueError(
                f"`calibration` batch 0 holds NaN or infinity in {what}: a rewrite cannot be verified on it; look at that batch "
                "(-inf in a mask can be a large negative number)"
            )


def _checked(steps: Any) -> tuple[Step, ...]:
    if isinstance(steps, Step) and not isinstance(steps, type):
        raise TypeError(f"`steps` must be a list of steps, got one: write [{steps.name}(...)]")
    if not isinstance(steps, Iterable):
        raise TypeError(f"`steps` must be a list of steps, got {type(steps).__name__}")
    checked: list[Step] = []
    for step in steps:
        if not isinstance(step, Step) or isinstance(step, type):
            raise TypeError(f"`steps` must hold steps such as qjax.equalization(), got {step!r}")
        checked.append(step)
    if not checked:
        raise ValueError("`steps` is empty: give at least one, such as [qjax.equalization()]")
    return tuple(checked)
