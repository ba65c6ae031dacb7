"""For people with a Linen module: `fake_quant`, `quantize` and `rewrite`."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
from flax import linen as nn

from qjax.policy import Policy, check_weights_only
from qjax.ptq import Result, Rewritten, as_batches
from qjax.ptq import quantize as quantize_function
from qjax.ptq import rewrite as rewrite_function
from qjax.ptq.progress import Listener
from qjax.ptq.rewrite import Step
from qjax.ptq.spill import Spill
from qjax.training import FakeQuant


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
    if not isinstance(model, nn.Module):
        raise TypeError(f"`model` must be a flax.linen.Module, got {type(model).__name__}; for NNX use qjax.nnx.quantize")
    if not isinstance(variables, Mapping) or "params" not in variables:
        held = f"one with {', '.join(map(repr, variables))}" if isinstance(variables, Mapping) else type(variables).__name__
        wanted = "a dictionary with 'params', as `model.init` gives"
        raise ValueError(f"`variables` must be {wanted}, got {held}: wrap them, {{'params': ...}}")
    params, rest = {"params": variables["params"]}, {k: v for k, v in variables.items() if k != "params"}

    def fn(params: Any, rest: Any, *inputs: Any) -> Any:
        return model.apply({**params, **rest}, *inputs, **apply_kwargs)

    batches = [(rest, *batch) for batch in as_batches(calibration)]
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
    if not isinstance(model, nn.Module):
        raise TypeError(f"`model` must be a flax.linen.Module, got {type(model).__name__}; for NNX use qjax.nnx.rewrite")
    def apply(variables: Any, *inputs: Any) -> Any:
        return model.apply(variables, *inputs, **apply_kwargs)

    return rewrite_function(apply, variables, calibration, steps, untie=untie)


class FakeQuantModule(nn.Module):
    """A module that computes with fake-quantized parameters. Built by `fake_quant`.

    Attributes:
      module: the module it stands for; parameters keep their paths.
      policy: which parameters are fake-quantized.
    """

    module: nn.Module
    policy: Policy

    def setup(self) -> None:
        nn.share_scope(self, self.module)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self.is_initializing():
            return self.module(*args, **kwargs)
        plain = self.module.clone(parent=None, name=None)
        rngs = dict.fromkeys(self.scope.rngs, jax.random.key(0)) if self.scope is not None else {}
        collections = dict(self.variables)
        mutable = [name for name in collections if self.is_mutable_collection(name)]

        # Only traced, to find the sites: which key a dropout gets does not matter for that.
        def forward(variables: Any, *args: Any) -> Any:
            return plain.apply(variables, *args, rngs=rngs, mutable=mutable, **kwargs)

        weights = FakeQuant(forward, self.policy).leaves(collections, *args)

        def fake(params: Any) -> Any:
            return {**params, "params": weights({**collections, **params})["params"]}

        run = nn.map_variables(
            lambda module, *args: module(*args, **kwargs), "params", trans_in_fn=fake, mutable=False, init=False
        )
        return run(self.module, *args)


def fake_quant(model: nn.Module, policy: Policy) -> nn.Module:
    """Returns a module that trains through fake quantization; see `qjax.fake_quant`.

    Args:
      model: any Linen module; not changed.
      policy: which parameters are fake-quantized.

    Returns:
      A module with the same parameter tree: `init` gives the variables that `model.init` gives, and each may use the
      other's.

    Raises:
      TypeError: `model` is no module of this kind, or `policy` no policy.
      ValueError: a rule with an `activation`, which a module cannot round yet.

    Example:
      >>> import jax, jax.numpy as jnp, qjax, flax.linen as nn
      >>> model = qjax.linen.fake_quant(nn.Dense(4), qjax.Policy([qjax.Rule("kernel", weight=qjax.int4())]))
      >>> variables = model.init(jax.random.key(0), jnp.ones((1, 8)))
      >>> jax.tree.map(jnp.shape, variables)
      {'params': {'bias': (4,), 'kernel': (8, 4)}}
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"`model` must be a flax.linen.Module, got {type(model).__name__}; for NNX use qjax.nnx.fake_quant")
    check_weights_only(policy)
    return FakeQuantModule(model.clone(parent=None), policy)
