"""For people with a Linen module: `fake_quant` and what goes with it, `quantize` and `rewrite`."""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
from flax import linen as nn
from flax.core import FrozenDict
from flax.core.scope import subtract_filters
from flax.errors import ModifyScopeVariableError, ScopeCollectionNotFound

from qjax.core import check_key
from qjax.core.specs import check_choice
from qjax.graph import BatchNormFolds
from qjax.graph.batch_norm_folds import check_folds
from qjax.policy import Policy, check_module, check_policy
from qjax.ptq import Result, Rewritten, as_batches
from qjax.ptq import quantize as quantize_function
from qjax.ptq import rewrite as rewrite_function
from qjax.ptq.progress import Listener
from qjax.ptq.rewrite import Step
from qjax.ptq.spill import Spill
from qjax.report import Report
from qjax.training import FakeQuant
from qjax.training import convert as convert_function
from qjax.training.arguments import ONCE, called_with
from qjax.training.fake_quant import Forward
from qjax.training.state import NEEDS
from qjax.training.state import advance as next_state
from qjax.training.state import labels as state_labels
from qjax.training.trainable import trainable_labels

QUANT = "quant"  # the collection of the quantizers' state


def quantize(
    model: nn.Module,
    variables: Any,
    policy: Policy,
    calibration: Iterable[Any],
    *,
    progress: Listener | None = None,
    resume: str | os.PathLike[str] | None = None,
    spill: Spill | None = None,
    **apply_kwargs: Any,
) -> Result:
    """Quantizes a Linen module's variables; see `qjax.quantize`.

    Run the result with `jax.jit(qjax.quantized(model.apply))(result.params, x)`.

    Args:
      model: the module; not changed.
      variables: its variables, `{"params": ..., "batch_stats": ...}`; not changed.
      policy: which parameters become what.
      calibration: batches; a tuple is spread over the arguments of `__call__`.
      progress: called with a `qjax.Progress` after each step.
      resume: a folder that keeps what is finished, to go on after a kill.
      spill: keeps the live values of sequential methods below a limit.
      **apply_kwargs: keyword arguments of `model.apply`, such as `train=False`.

    Returns:
      A `Result` whose `params` is `variables` with packed leaves in its collection "params".

    Raises:
      TypeError: `model` is no Linen module; see also `qjax.quantize`.

    Example:
      >>> import jax, jax.numpy as jnp, qjax, flax.linen as nn
      >>> model, x = nn.Dense(4), jnp.ones((2, 8))
      >>> policy = qjax.Policy([qjax.Rule("kernel", weight=qjax.int8())])
      >>> result = qjax.linen.quantize(model, model.init(jax.random.key(0), x), policy, calibration=[x])
      >>> result.params["params"]["kernel"]
      QTensor(int8(per="channel"), float32[8,4], 48 bytes, 12 bits/weight)
    """
    _check_model(model, "quantize")
    if not isinstance(variables, Mapping) or "params" not in variables:
        held = f"one with {', '.join(map(repr, variables))}" if isinstance(variables, Mapping) else type(variables).__name__
        raise ValueError(f"`variables` must be {_WANTED}, got {held}: wrap them, {{'params': ...}}")
    params, rest = {"params": variables["params"]}, {k: v for k, v in variables.items() if k != "params"}

    def fn(params: Any, rest: Any, *inputs: Any) -> Any:
        return model.apply({**params, **rest}, *inputs, **apply_kwargs)

    batches = [(rest, *batch) for batch in as_batches(calibration)]
    with _explained("quantize"):
        result = quantize_function(fn, params, policy, batches, progress=progress, resume=resume, spill=spill)
    return dataclasses.replace(result, params={**result.params, **rest})


def rewrite(
    model: nn.Module, variables: Any, calibration: Iterable[Any], steps: Sequence[Step], *, untie: bool = False, **apply_kwargs: Any
) -> Rewritten:
    """Rewrites a Linen module's variables, batch statistics too, and keeps what it computes; see `qjax.rewrite`.

    Args:
      model: the module; not changed.
      variables: its variables, `{"params": ..., "batch_stats": ...}`; not changed.
      calibration: batches; a tuple is spread over the arguments of `__call__`.
      steps: see `qjax.rewrite`.
      untie: see `qjax.rewrite`: then `result.fn(result.params, *inputs)` is the function, with the keyword arguments given here.
      **apply_kwargs: keyword arguments of `model.apply`, such as `train=False`.

    Returns:
      A `Rewritten` whose `params` is `variables` with other numbers (and with an entry "untied", if anything was).

    Raises:
      TypeError: `model` is no Linen module; see also `qjax.rewrite`.

    Example:
      >>> import jax, jax.numpy as jnp, qjax, flax.linen as nn
      >>> model, x = nn.Sequential([nn.Dense(4), nn.relu, nn.Dense(2)]), jnp.ones((2, 8))
      >>> result = qjax.linen.rewrite(model, model.init(jax.random.key(0), x), [x], [qjax.equalization()])
      >>> [change.path for change in result.changes if change.done]
      ['layers_0/kernel', 'layers_2/kernel']
    """
    _check_model(model, "rewrite")

    def apply(variables: Any, *inputs: Any) -> Any:
        return model.apply(variables, *inputs, **apply_kwargs)

    return rewrite_function(apply, variables, calibration, steps, untie=untie)


class FakeQuantModule(nn.Module):
    """A module that computes with fake-quantized parameters. Built by `fake_quant`.

    Attributes:
      module: the module it stands for; parameters keep their paths.
      policy: which parameters are fake-quantized.
      folds: the batch norms that are folded in every step, see `qjax.batch_norm_folds`.
      forward: on what forward products are computed, see `qjax.fake_quant`.
    """

    module: nn.Module
    policy: Policy
    folds: BatchNormFolds | None = None
    forward: Forward | None = None

    def setup(self) -> None:
        nn.share_scope(self, self.module)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self.is_initializing():
            return self.module(*args, **kwargs)
        scope: Any = self.scope
        held = {name: tree for name, tree in self.variables.items() if name != QUANT}
        rngs = {name: rng.as_jax_rng() for name, rng in scope.rngs.items()}
        changes = subtract_filters(scope.mutable, ["params", QUANT])
        fq = FakeQuant(_forward(self.module, changes), self.policy, self.forward, self.folds, _MISSING, _UNKNOWN)
        state = self.variables.get(QUANT, {}).get("state")
        if state is not None and self.is_mutable_collection(QUANT):
            (out, changed), state = fq.stepped(held, rngs, *args, quant=state, **kwargs)
            self.put_variable(QUANT, "state", state)
        else:
            out, changed = fq(held, rngs, *args, quant=state, **kwargs)
        for collection, entries in changed.items():
            for name, value in entries.items():
                self.put_variable(collection, name, value)
        return out


def _forward(module: nn.Module, mutable: Any = False) -> Any:
    """The function fn(variables, rngs, *args, **kwargs) of a module, which also returns what it changed."""
    plain = module.clone(parent=None, name=None)

    def forward(variables: Any, rngs: Any, *args: Any, **kwargs: Any) -> Any:
        return plain.apply(variables, *args, rngs=rngs, mutable=mutable, **kwargs)

    def fixed(variables: Any, rngs: Any, *args: Any, **kwargs: Any) -> Any:
        return plain.apply(variables, *args, rngs=rngs, **kwargs), {}

    return fixed if mutable is False else forward


def fake_quant(
    model: nn.Module, policy: Policy, folds: BatchNormFolds | None = None, forward: Forward | None = None
) -> FakeQuantModule:
    """Returns a module that trains through fake quantization; see `qjax.fake_quant`.

    Args:
      model: any Linen module; not changed.
      policy: which parameters, activations and products are fake-quantized.
      folds: batch norms that are folded in every step: `qjax.batch_norm_folds(model.apply, variables, x, train=False)`.
      forward: "float" or "integer", on what forward products are computed; None: on what is faster. See `qjax.fake_quant`; `report` says
        what runs on what.

    Returns:
      A module with the same parameter tree: `init` gives the variables that `model.init` gives, and each may use the other's. A policy
      whose quantizers have a state keeps it in the collection "quant" of the variables: `begin` makes it, `labels` says what of all
      variables trains, `advance` goes to the next step, `convert` packs what was trained. Ranges that follow the data
      (`qjax.moving_range`) move where that collection is mutable, `model.apply(variables, x, mutable=["quant"])`, as batch statistics do.

    Raises:
      TypeError: `model` is no module of this kind, or `policy` no policy.
      ValueError: another `forward`.

    Example:
      >>> import jax, jax.numpy as jnp, qjax, flax.linen as nn
      >>> rule = qjax.Rule("kernel", weight=qjax.int4(), activation=qjax.static(qjax.int8()), train=qjax.lsq())
      >>> model, x = qjax.linen.fake_quant(nn.Dense(4), qjax.Policy([rule])), jnp.ones((1, 8))
      >>> variables = qjax.linen.begin(model, jax.random.key(0), model.init(jax.random.key(1), x), x)
      >>> jax.tree.map(jnp.shape, variables["quant"]["state"])
      {'activations': {'kernel': {'scale': (1, 1)}}, 'policy': {'x...': ()}, 'weights': {'kernel': {'scale': (4, 1)}}}
      >>> model.apply(variables, x).shape, str(qjax.linen.convert(model, variables, x).params["params"]["kernel"].spec)
      ((1, 4), 'int4(per="channel")')
    """
    _check_model(model, "fake_quant")
    if isinstance(model, FakeQuantModule):
        raise TypeError(f"`model` {ONCE}")
    check_policy(policy)
    check_folds(folds)
    check_choice("forward", forward, ("float", "integer", None))
    return FakeQuantModule(model.clone(parent=None), policy, folds, forward)


def begin(model: FakeQuantModule, key: jax.Array, variables: Any, *args: Any, **kwargs: Any) -> dict[str, Any]:
    """Returns the variables with the state of the quantizers as these parameters and data have it, in the collection "quant".

    Args:
      model: from `fake_quant`.
      key: a random key.
      variables: those of the module, trained or from `init`; a state in them is left out.
      *args: arguments of `__call__`, in evaluation mode.
      **kwargs: keyword arguments of `__call__`.

    Returns:
      Variables; without a collection "quant" where the policy has no state.

    Raises:
      TypeError: `model` is not from `fake_quant`; `variables` are none; arguments of the module are missing.
      ValueError: `variables` lack a collection; the module changes variables, in training mode; as `qjax.FakeQuant.init`.
    """
    fq = _function(model, "begin", "key, variables, *args")
    check_key("key", key)
    held = _without_state(variables)
    with _explained("begin"), called_with(type(model.module).__call__, [model.module], args, kwargs):
        state = fq.init(key, held, {}, *args, **kwargs)
    return {**held, QUANT: {"state": state}} if state else held


def report(model: FakeQuantModule, variables: Any, *args: Any, **kwargs: Any) -> Report:
    """Says on what the forward product of each weight runs in training, and why; see `qjax.FakeQuant.report`.

    Args:
      model: from `fake_quant`.
      variables: those of the module, or their shapes; the state of quantizers counts for nothing.
      *args: arguments of `__call__`, in evaluation mode; shapes are enough.
      **kwargs: keyword arguments of `__call__`.

    Returns:
      A `Report`; nothing is computed.

    Raises:
      TypeError: `model` is not from `fake_quant`; `variables` are none; arguments of the module are missing.
      ValueError: `variables` lack a collection; the module changes variables, in training mode; the policy does not fit the module.

    Example:
      >>> import jax, jax.numpy as jnp, qjax, flax.linen as nn
      >>> rule = qjax.Rule("kernel", weight=qjax.int8(), activation=qjax.dynamic(qjax.int8()))
      >>> model, x = qjax.linen.fake_quant(nn.Dense(4), qjax.Policy([rule]), forward="integer"), jnp.ones((1, 8))
      >>> [(row.path, row.kernel) for row in report(model, model.init(jax.random.key(0), x), x).rows if row.spec]
      [('kernel', 'xla int8')]
    """
    fq, held = _function(model, "report", "variables, *args"), _without_state(variables)
    with _explained("report"), called_with(type(model.module).__call__, [model.module], args, kwargs):
        return fq.report(held, {}, *args, **kwargs)


def advance(variables: Any) -> Any:
    """Returns the variables of the next step: schedules go on, random rounding draws anew. Call it once after each update.

    Args:
      variables: all of them, or the collection "quant" alone, {"quant": ...}.

    Returns:
      Variables, in the same kind of mapping.

    Raises:
      TypeError: `variables` are none.
      ValueError: they have no collection "quant", and so no step: it would stand still without a word.
    """
    _check_variables(variables)
    if QUANT not in variables:
        raise ValueError(f"`variables` have no collection {QUANT!r} whose step goes on, got {', '.join(map(repr, variables))}: give all "
                         "that qjax.linen.begin gave; a policy without a state needs no advance")  # fmt: skip
    return _in_kind(variables, {**variables, QUANT: {"state": next_state(variables[QUANT]["state"])}})


def labels(variables: Any) -> Any:
    """Returns "weights", "learned" or "fixed" for every variable, for `optax.multi_transform`: parameters, learned ranges, the rest.

    Args:
      variables: those of a module.

    Returns:
      A tree like `variables`.

    Raises:
      TypeError: a parameter is packed, or all are of integers, which have no gradient (a table of them is "fixed"); `variables` are none.
    """
    _check_variables(variables)
    params = variables.get("params", {})
    marks = {name: jax.tree.map(lambda _: "fixed", tree) for name, tree in variables.items()}
    if "params" in variables:
        marks["params"] = trainable_labels(params, "variables")
    state = {QUANT: {"state": state_labels(variables[QUANT]["state"])}} if QUANT in variables else {}
    return _in_kind(variables, {**marks, **state})


def convert(model: FakeQuantModule, variables: Any, *args: Any, **kwargs: Any) -> Result:
    """Packs what was trained; see `qjax.convert`.

    Args:
      model: from `fake_quant`.
      variables: the trained ones, with the collection "quant" if the policy has a state.
      *args: arguments of `__call__`; shapes are enough.
      **kwargs: keyword arguments of `__call__`.

    Returns:
      A `Result` whose `params` are the variables of the module that `fake_quant` was given, with packed leaves, for
      `jax.jit(qjax.quantized(module.apply))(result.params, x)`.

    Raises:
      TypeError: `model` is not from `fake_quant`; `variables` are none; arguments of the module are missing.
      ValueError: `variables` lack a collection; the module changes variables, in training mode; as `qjax.convert`.
    """
    fq, held = _function(model, "convert", "variables, *args"), _without_state(variables)
    with _explained("convert"), called_with(type(model.module).__call__, [model.module], args, kwargs):
        return convert_function(fq, held, {}, *args, quant=variables.get(QUANT, {}).get("state"), **kwargs)


_WANTED = "a dictionary with 'params', as `model.init` gives"
_MISSING = f"`variables` have no state of quantizers: {NEEDS}; write variables = qjax.linen.begin(model, key, variables, *args)"

_UNKNOWN = "give qjax.linen.begin arrays and not shapes"


def _in_kind(variables: Any, new: dict[str, Any]) -> Any:
    """New variables in the kind of mapping that the old ones are in, so that a loop keeps its structure."""
    return FrozenDict(new) if isinstance(variables, FrozenDict) else new


def _function(model: Any, verb: str, order: str) -> FakeQuant:
    if not isinstance(model, FakeQuantModule):
        raise TypeError(f"`model` of qjax.linen.{verb} must be from qjax.linen.fake_quant, got {type(model).__name__}: the order is "
                        f"(model, {order})")  # fmt: skip
    forward = _forward(model.module)

    def fn(variables: Any, rngs: Any, *args: Any, **kwargs: Any) -> Any:
        return forward(variables, rngs, *args, **kwargs)[0]

    return FakeQuant(fn, model.policy, model.forward, model.folds, _MISSING, _UNKNOWN)


def _check_model(model: Any, verb: str) -> None:
    check_module(model, nn.Module, "flax.linen.Module", f"NNX use qjax.nnx.{verb}")


@contextlib.contextmanager
def _explained(verb: str) -> Iterator[None]:
    """Says in our words what flax says of variables that are missing, or that a call would change."""
    try:
        yield
    except ScopeCollectionNotFound as error:
        raise ValueError(f"`variables` of qjax.linen.{verb} lack something that the module reads: {_said(error)} Give all collections that "
                         "model.init gave, batch statistics too") from error  # fmt: skip
    except ModifyScopeVariableError as error:
        raise ValueError(f"qjax.linen.{verb} runs the module in evaluation, and it changes its variables: {_said(error)} Call it as for "
                         "inference, such as with train=False") from error  # fmt: skip


def _said(error: Exception) -> str:
    return str(error).split(" (https://")[0]


def _check_variables(variables: Any, needs: tuple[str, ...] = ("params", QUANT)) -> None:
    """Refuses what are no variables: a module's parameters alone, and the state alone, are trees as well."""
    whose = "`variables` must be those of the module, as model.init(key, *args) gives them"
    if not isinstance(variables, Mapping):
        raise TypeError(f"{whose}, got {type(variables).__name__}")
    if not any(name in variables for name in needs):
        found = f"one with {', '.join(map(repr, list(variables)[:3]))}" if variables else "an empty one"
        raise TypeError(f"{whose}, got {found}: pass all of them, and bare parameters as {{'params': ...}}")


def _without_state(variables: Any) -> dict[str, Any]:
    _check_variables(variables, ("params",))
    return {name: tree for name, tree in variables.items() if name != QUANT}
