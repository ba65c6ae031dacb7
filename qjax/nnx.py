"""For people with an NNX module: `fake_quant` and what goes with it, `quantize` and `rewrite`."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import jax
from flax import nnx

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
from qjax.training.qat import training_of
from qjax.training.state import NEEDS, labels
from qjax.training.state import advance as next_state


def function(model: nnx.Module, mutable: bool = False) -> Callable[..., Any]:
    """Returns the pure function `fn(state, *inputs)` of a module, for `qjax.quantized`, `qjax.trace` and the rest.

    Args:
      model: the module; its structure is taken as it is now, its numbers are not.
      mutable: whether the function also returns the state that is no `nnx.Param` as it is after the call: caches, counts, batch
        statistics. `nnx.merge_state(state, changed)` is the state of the next call. It is dropped otherwise: put the module in evaluation
        mode. Two things are left out of it. An `nnx.Param` that the call changes: parameters may be packed, and stay what they are in
        the state. And a variable that the call creates, as one that it sows: the module's structure, taken before, has no place for it.

    Returns:
      A function of a state (as `nnx.state(model)` or `result.params`) and the arguments of `__call__`, that returns what `__call__` does;
      with `mutable` (that, changed).

    Example:
      >>> import jax.numpy as jnp, qjax
      >>> from flax import nnx
      >>> model = nnx.Linear(8, 4, rngs=nnx.Rngs(0))
      >>> qjax.nnx.function(model)(nnx.state(model), jnp.ones((2, 8))).shape
      (2, 4)
      >>> norm = nnx.BatchNorm(8, momentum=0.0, rngs=nnx.Rngs(0))
      >>> _, changed = qjax.nnx.function(norm, mutable=True)(nnx.state(norm), jnp.ones((2, 8)))
      >>> sorted(changed), nnx.merge_state(nnx.state(norm), changed)["mean"][0].item()
      (['mean', 'var'], 1.0)
    """
    _check(model, "function")
    graphdef = nnx.graphdef(model)
    there = frozenset(path for path, _ in nnx.to_flat_state(nnx.state(model)))

    def fn(state: Any, *inputs: Any, **kwargs: Any) -> Any:
        called = nnx.merge(graphdef, state, copy=True)  # else a call outside of jit changes the variables of `state` in place
        out = called(*inputs, **kwargs)
        return (out, nnx.split(called, nnx.Param, lambda path, _: path in there, ...)[2]) if mutable else out

    return fn


def quantize(
    model: nnx.Module,
    policy: Policy,
    calibration: Iterable[Any],
    *,
    progress: Listener | None = None,
    resume: str | os.PathLike[str] | None = None,
    spill: Spill | None = None,
) -> Result:
    """Quantizes an NNX module's parameters; see `qjax.quantize`.

    Run the result with `jax.jit(qjax.quantized(qjax.nnx.function(model)))(result.params, x)`.

    Args:
      model: the module, in evaluation mode; not changed.
      policy: which parameters become what.
      calibration: batches; a tuple is spread over the arguments of `__call__`.
      progress: called with a `qjax.Progress` after each step.
      resume: a folder that keeps what is finished, to go on after a kill.
      spill: keeps the live values of sequential methods below a limit.

    Returns:
      A `Result` whose `params` is the module's state with packed `Param`s; other variables are as they were.

    Raises:
      TypeError: `model` is no NNX module; see also `qjax.quantize`.

    Example:
      >>> import jax, jax.numpy as jnp, qjax
      >>> from flax import nnx
      >>> model, x = nnx.Linear(8, 4, rngs=nnx.Rngs(0)), jnp.ones((2, 8))
      >>> policy = qjax.Policy([qjax.Rule("kernel", weight=qjax.int8())])
      >>> result = qjax.nnx.quantize(model, policy, calibration=[x])
      >>> jax.jit(qjax.quantized(qjax.nnx.function(model)))(result.params, x).shape
      (2, 4)
    """
    _check(model, "quantize")
    graphdef, params, rest = nnx.split(model, nnx.Param, ...)

    def fn(params: Any, rest: Any, *inputs: Any) -> Any:
        return nnx.merge(graphdef, params, rest)(*inputs)

    batches = [(rest, *batch) for batch in as_batches(calibration)]
    result = quantize_function(fn, params, policy, batches, progress=progress, resume=resume, spill=spill)
    return dataclasses.replace(result, params=nnx.merge_state(result.params, rest))


def rewrite(model: nnx.Module, calibration: Iterable[Any], steps: Sequence[Step], *, untie: bool = False) -> Rewritten:
    """Rewrites an NNX module's state, batch statistics too, and keeps what it computes; see `qjax.rewrite`.

    Args:
      model: the module, in evaluation mode; not changed: `nnx.update(model, result.params)` does that.
      calibration: batches; a tuple is spread over the arguments of `__call__`.
      steps: see `qjax.rewrite`.
      untie: see `qjax.rewrite`: then `result.fn(result.params, *inputs)` is the function, and the module cannot take `result.params`.

    Returns:
      A `Rewritten` whose `params` is the module's state with other numbers.

    Raises:
      TypeError: `model` is no NNX module; see also `qjax.rewrite`.

    Example:
      >>> import jax.numpy as jnp, qjax
      >>> from flax import nnx
      >>> rngs, x = nnx.Rngs(0), jnp.ones((2, 8))
      >>> model = nnx.Sequential(nnx.Linear(8, 4, rngs=rngs), nnx.relu, nnx.Linear(4, 2, rngs=rngs))
      >>> result = qjax.nnx.rewrite(model, [x], [qjax.equalization()])
      >>> [change.path for change in result.changes if change.done]
      ['layers/0/kernel', 'layers/2/kernel']
    """
    _check(model, "rewrite")
    return rewrite_function(function(model), nnx.state(model), calibration, steps, untie=untie)


class Quantizer(nnx.Variable):
    """A number of the quantizers' state that does not train: a static range, the step, the seed."""


class Learned(Quantizer):
    """A learned number of the quantizers' state; not an `nnx.Param`, so that it can have a learning rate of its own."""


def fake_quant(
    model: nnx.Module,
    policy: Policy,
    methods: tuple[str, ...] = ("__call__",),
    folds: BatchNormFolds | None = None,
    forward: Forward | None = None,
) -> Any:
    """Returns a module that trains through fake quantization; see `qjax.fake_quant`.

    Args:
      model: any NNX module; not changed.
      policy: which parameters, activations and products are fake-quantized.
      methods: the methods that compute with fake-quantized parameters; all others compute in float. One, if the policy's quantizers have
        a state.
      folds: batch norms that are folded in every step: `qjax.batch_norm_folds(qjax.nnx.function(model), nnx.state(model), x)` of the
        module in evaluation mode.
      forward: "float" or "integer", on what forward products are computed; None: on what is faster. See `qjax.fake_quant`; `report` says
        what runs on what.

    Returns:
      A copy of the module whose `methods` compute with fake-quantized parameters. Its state has the same paths, its
      `Param`s stay float, and what a call changes (batch statistics, random counts) is changed in it. A policy whose quantizers have a
      state needs `begin`, which gives the copy an attribute `quant` of `Learned` and `Quantizer` variables; train with
      `wrt=nnx.Any(nnx.Param, qjax.nnx.Learned)`. Ranges that follow the data (`qjax.moving_range`) move in `tracked`. `convert` packs
      what was trained.

    Raises:
      TypeError: `model` is no module of this kind, `policy` no policy, or `methods` no tuple of names.
      ValueError: `methods` names one that there is not, or none; another `forward`.

    Example:
      >>> import jax, jax.numpy as jnp, qjax
      >>> from flax import nnx
      >>> model, x = nnx.Linear(8, 4, rngs=nnx.Rngs(0)), jnp.ones((2, 8))
      >>> rule = qjax.Rule("kernel", weight=qjax.int4(), activation=qjax.static(qjax.int8()), train=qjax.lsq())
      >>> fq = qjax.nnx.begin(qjax.nnx.fake_quant(model, qjax.Policy([rule])), jax.random.key(0), x)
      >>> isinstance(fq, nnx.Linear), fq(x).shape, len(jax.tree.leaves(nnx.state(fq, qjax.nnx.Learned)))
      (True, (2, 4), 2)
      >>> result = qjax.nnx.convert(fq, x)
      >>> jax.jit(qjax.quantized(qjax.nnx.function(model)))(result.params, x).shape
      (2, 4)
    """
    _check(model, "fake_quant")
    if hasattr(type(model), _HOW):
        raise TypeError(f"`model` {ONCE}")
    check_policy(policy)
    check_folds(folds)
    check_choice("forward", forward, ("float", "integer", None))
    base = type(model)
    if not isinstance(methods, tuple) or not all(isinstance(name, str) for name in methods):
        raise TypeError(f"`methods` must be a tuple of names such as ('__call__',), got {methods!r}")
    if not methods:
        raise ValueError("`methods` names no method: leave it out for '__call__'")
    for name in methods:
        if not callable(getattr(base, name, None)):
            raise ValueError(f"`methods` names {name!r}, which {base.__name__} does not have")
    copy = nnx.clone(model)
    # A subclass, so that the copy is what the original is, with the attributes and paths it has.
    how = _How(base, policy, methods, folds, forward)
    wrapped = {name: _fake_quantized(getattr(base, name), how) for name in methods}
    copy.__class__ = type(f"FakeQuant{base.__name__}", (base,), {**wrapped, _HOW: how})
    return copy


def begin(model: Any, key: jax.Array, *args: Any, **kwargs: Any) -> Any:
    """Returns a copy of the module with the state of its quantizers as its parameters and these data have it.

    Args:
      model: from `fake_quant`, in evaluation mode; not changed.
      key: a random key.
      *args: arguments of the method that computes with fake-quantized parameters.
      **kwargs: keyword arguments of it.

    Returns:
      A module.

    Raises:
      TypeError: `model` is not from `fake_quant`; arguments of the method are missing.
      ValueError: it has several methods, or an attribute `quant` of its own; as `qjax.FakeQuant.init`.
    """
    how = _how(model, "begin", "(model, key, *args)")
    copy = nnx.clone(model)
    if len(how.methods) > 1:
        raise ValueError(f"`model` has {len(how.methods)} fake-quantized methods, {', '.join(how.methods)}, and one state: name one")
    held = copy.__dict__.get(_QUANT)
    if held is not None and not isinstance(held, nnx.Dict):
        raise ValueError(f"`model` has an attribute {_QUANT!r} of its own, where the state of the quantizers would be: rename it")
    if held is not None:
        delattr(copy, _QUANT)
    fq, params, rest = _function(copy)
    check_key("key", key)
    with called_with(how.method, [model], args, kwargs):
        state = fq.init(key, params, rest, *args, **kwargs)
    if state:
        setattr(copy, _QUANT, _variables(state, labels(state)))
    return copy


def advance(model: Any) -> None:
    """Goes to the next step, in place as an optimizer does: schedules go on, random rounding draws anew. Call it after each update.

    Args:
      model: from `begin`.

    Raises:
      TypeError: `model` is not from `fake_quant`.
      ValueError: it has no state, and its policy has what goes on with steps.
    """
    rules, quant = _how(model, "advance", "(model)").policy.rules, _state(model)
    if quant is None and any(training_of(rule).steps for rule in rules if not rule.is_cache):
        raise ValueError(_MISSING)
    if quant is not None and "step" in quant:
        _put(model.quant, next_state(quant))


def tracked(model: Any, *args: Any, **kwargs: Any) -> Any:
    """Computes as the module does, and moves its ranges to these data in place (`qjax.moving_range`); the module itself leaves them.

    Args:
      model: from `begin`; of its variables change what a call changes, and the ranges.
      *args: arguments of the method that computes with fake-quantized parameters.
      **kwargs: keyword arguments of it.

    Returns:
      What the method returns. Call it inside of the loss, in place of the module.

    Raises:
      TypeError: `model` is not from `fake_quant`.
      ValueError: it has no state, or no range of it follows the data.

    Example:
      >>> import jax, jax.numpy as jnp, qjax
      >>> from flax import nnx
      >>> rule = qjax.Rule("kernel", weight=qjax.int8(), activation=qjax.static(qjax.int8()), train=qjax.moving_range(0.5))
      >>> fq, x = qjax.nnx.fake_quant(nnx.Linear(2, 1, rngs=nnx.Rngs(0)), qjax.Policy([rule])), jnp.array([[-1.0, 3.0]])
      >>> fq = qjax.nnx.begin(fq, jax.random.key(0), x)
      >>> y = tracked(fq, 3 * x)
      >>> fq.quant.activations.kernel.hi[...].item()
      6.0
    """
    how = _how(model, "tracked", "(model, *args)")
    state = _state(model)
    if state is None:
        raise ValueError("`model` has no state of quantizers whose ranges could move: take the module that qjax.nnx.begin returns")
    graphdef, params, held, rest = nnx.split(model, _first(how.folds), Quantizer, ...)
    fq = how.function(_forward(graphdef, how.method))
    (out, changed), state = fq.tracked(params, rest, held, *args, quant=state, **kwargs)
    nnx.update(model, changed)
    _put(model.quant, state)
    return out


def convert(model: Any, *args: Any, **kwargs: Any) -> Result:
    """Packs what was trained; see `qjax.convert`.

    Args:
      model: from `fake_quant`, or `begin`; in evaluation mode.
      *args: arguments of the method that computes with fake-quantized parameters; shapes are enough.
      **kwargs: keyword arguments of it.

    Returns:
      A `Result` whose `params` is the state of the module that `fake_quant` was given, with packed `Param`s, for
      `jax.jit(qjax.quantized(qjax.nnx.function(module)))(result.params, x)`.

    Raises:
      TypeError: `model` is not from `fake_quant`.
      ValueError: as `qjax.convert`.
    """
    how, quant = _how(model, "convert", "(model, *args)"), _state(model)
    fq, params, rest = _function(model)
    with called_with(how.method, [model], args, kwargs):
        result = convert_function(fq, params, rest, *args, quant=quant, **kwargs)
    return dataclasses.replace(result, params=nnx.merge_state(result.params, rest))


def report(model: Any, *args: Any, **kwargs: Any) -> Report:
    """Says on what the forward product of each weight runs in training, and why; see `qjax.FakeQuant.report`.

    Args:
      model: from `fake_quant`, or `begin`; in evaluation mode, of numbers or shapes (`nnx.eval_shape`).
      *args: of the method, as for `convert`.
      **kwargs: its keyword arguments.

    Returns:
      A `Report`; nothing is computed.

    Raises:
      TypeError: `model` is not from `fake_quant`; arguments of the method are missing.
      ValueError: the policy does not fit the module.

    Example:
      >>> import jax.numpy as jnp, qjax
      >>> from flax import nnx
      >>> rule = qjax.Rule("kernel", weight=qjax.int8(), activation=qjax.dynamic(qjax.int8()))
      >>> fq = qjax.nnx.fake_quant(nnx.Linear(8, 4, rngs=nnx.Rngs(0)), qjax.Policy([rule]), forward="integer")
      >>> [(row.path, row.kernel) for row in report(fq, jnp.ones((2, 8))).rows if row.spec]
      [('kernel', 'xla int8')]
    """
    how, (fq, params, rest) = _how(model, "report", "(model, *args)"), _function(model)
    with called_with(how.method, [model], args, kwargs):
        return fq.report(params, rest, *args, **kwargs)


_HOW, _QUANT = "_fake_quantized_as", "quant"
_MISSING = f"`model` has no state of quantizers: {NEEDS}; write model = qjax.nnx.begin(model, key, *args)"
_UNKNOWN = "give qjax.nnx.begin arrays and not shapes"


class _How(NamedTuple):
    """How a module computes: what `fake_quant` was given, and the class of the module."""

    base: type
    policy: Policy
    methods: tuple[str, ...]
    folds: BatchNormFolds | None
    forward: Forward | None

    @property
    def method(self) -> Callable[..., Any]:
        """The float method; that of the state, where there is one."""
        return getattr(self.base, self.methods[0])

    def function(self, fn: Callable[..., Any]) -> FakeQuant:
        """A function of the module's arrays that computes with fake-quantized ones."""
        return FakeQuant(fn, self.policy, self.forward, self.folds, _MISSING, _UNKNOWN)


def _first(folds: BatchNormFolds | None) -> Any:
    """Which variables the first argument of a module's function holds: parameters, and the statistics that folds read."""
    if folds is None:
        return nnx.Param
    return nnx.Any(nnx.Param, lambda path, _: "/".join(map(str, path)) in folds.read)


def _how(model: Any, verb: str, order: str) -> _How:
    found = getattr(type(model), _HOW, None)
    if found is None:
        raise TypeError(f"`model` of qjax.nnx.{verb} must be from qjax.nnx.fake_quant, got {type(model).__name__}: call it as "
                        f"{verb}{order}")  # fmt: skip
    return found


def _function(model: Any) -> tuple[FakeQuant, Any, Any]:
    """The function fn(params, rest, *args) of a module without its state, and its arguments."""
    how, copy = _how(model, "fake_quant", "(model, policy)"), nnx.clone(model)
    if _state(model) is not None:
        delattr(copy, _QUANT)
    graphdef, params, rest = nnx.split(copy, _first(how.folds), ...)

    def forward(params: Any, rest: Any, *args: Any, **kwargs: Any) -> Any:
        return how.method(nnx.merge(graphdef, params, rest, copy=True), *args, **kwargs)

    return how.function(forward), params, rest


def _variables(state: Any, marks: Any) -> Any:
    """A state as nested variables."""
    if isinstance(state, dict):
        return nnx.Dict({name: _variables(value, marks[name]) for name, value in state.items()})
    return (Learned if marks == "learned" else Quantizer)(state)


def _put(variables: Any, state: Any) -> None:
    """Sets the variables of `_variables` to the arrays of a state; what else they hold, such as a sharding, stays."""
    for name, value in state.items():
        if isinstance(value, dict):
            _put(variables[name], value)
        else:
            variables[name][...] = value


def _state(model: Any) -> Any:
    """The state that a module holds, as plain dictionaries; None if it has none."""
    held = model.__dict__.get(_QUANT)
    return nnx.to_pure_dict(nnx.state(held)) if isinstance(held, nnx.Dict) else None


def _fake_quantized(method: Callable[..., Any], how: _How) -> Callable[..., Any]:
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        graphdef, params, held, rest = nnx.split(self, _first(how.folds), Quantizer, ...)
        fq = how.function(_forward(graphdef, method))
        out, changed = fq(params, rest, held, *args, quant=_state(self), **kwargs)
        nnx.update(self, changed)
        return out

    return call


def _forward(graphdef: Any, method: Callable[..., Any]) -> Callable[..., Any]:
    """The function of a method of a module with a state, which also returns what it changed."""

    def forward(params: Any, rest: Any, held: Any, *args: Any, **kwargs: Any) -> Any:
        module = nnx.merge(graphdef, params, held, rest, copy=True)
        out = method(module, *args, **kwargs)
        return out, nnx.split(module, nnx.Param, Quantizer, ...)[3]

    return forward


def _check(model: Any, verb: str) -> None:
    check_module(model, nnx.Module, "flax.nnx.Module", f"Linen use qjax.linen.{verb}")
