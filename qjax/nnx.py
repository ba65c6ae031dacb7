"""For people with an NNX module: the two verbs, `fake_quant` and `quantize`."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from flax import nnx

from qjax.policy import Policy
from qjax.ptq import Result
from qjax.ptq import quantize as quantize_function
from qjax.ptq.sequential import Progress
from qjax.training import FakeQuant


def function(model: nnx.Module) -> Callable[..., Any]:
    """Returns the pure function `fn(state, *inputs)` of a module, for `qjax.quantized`, `qjax.trace` and the rest.

    Args:
      model: the module; its structure is taken as it is now, its numbers are not.

    Returns:
      A function of a state (as `nnx.state(model)` or `result.params`) and the arguments of `__call__`. State that the call
      changes is dropped: put the module in evaluation mode.

    Example:
      >>> import jax.numpy as jnp, qjax
      >>> from flax import nnx
      >>> model = nnx.Linear(8, 4, rngs=nnx.Rngs(0))
      >>> qjax.nnx.function(model)(nnx.state(model), jnp.ones((2, 8))).shape
      (2, 4)
    """
    _check(model, "function")
    graphdef = nnx.graphdef(model)

    def fn(state: Any, *inputs: Any, **kwargs: Any) -> Any:
        return nnx.merge(graphdef, state)(*inputs, **kwargs)

    return fn


def quantize(
    model: nnx.Module, policy: Policy, calibration: Iterable[Any], *, progress: Progress | None = None
) -> Result:
    """Quantizes an NNX module's parameters; see `qjax.quantize`.

    Run the result with `jax.jit(qjax.quantized(qjax.nnx.function(model)))(result.params, x)`.

    Args:
      model: the module, in evaluation mode; not changed.
      policy: which parameters become what.
      calibration: batches; a tuple is spread over the arguments of `__call__`.
      progress: called with (parameters done, all, path).

    Returns:
      A `Result` whose `params` is the module's state with packed leaves.
    """
    _check(model, "quantize")
    return quantize_function(function(model), nnx.state(model), policy, calibration, progress=progress)


def fake_quant(model: nnx.Module, policy: Policy) -> Any:
    """Returns a module that trains through fake quantization; see `qjax.fake_quant`.

    Args:
      model: any NNX module; not changed.
      policy: which parameters are fake-quantized.

    Returns:
      A copy of the module whose `__call__` computes with fake-quantized parameters. Its state has the same paths, its
      `Param`s stay float, and what a call changes (batch statistics, random counts) is changed in it.

    Example:
      >>> import jax.numpy as jnp, qjax
      >>> from flax import nnx
      >>> model = nnx.Linear(8, 4, rngs=nnx.Rngs(0))
      >>> fq = qjax.nnx.fake_quant(model, qjax.Policy([qjax.Rule("kernel", weight=qjax.int4())]))
      >>> isinstance(fq, nnx.Linear), fq(jnp.ones((2, 8))).shape
      (True, (2, 4))
    """
    _check(model, "fake_quant")
    base = type(model)

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        graphdef, params, rest = nnx.split(self, nnx.Param, ...)

        def forward(params: Any, rest: Any, *args: Any) -> Any:
            return base.__call__(nnx.merge(graphdef, params, rest), *args, **kwargs)  # pyright: ignore[reportCallIssue]

        weights = FakeQuant(forward, policy).leaves(params, rest, *args)
        quantized = nnx.merge(graphdef, weights(params), rest)
        out = base.__call__(quantized, *args, **kwargs)  # pyright: ignore[reportCallIssue]
        nnx.update(self, nnx.split(quantized, nnx.Param, ...)[2])
        return out

    copy = nnx.clone(model)
    # A subclass, so that the copy is what the original is, with the attributes and paths it has.
    copy.__class__ = type(f"FakeQuant{base.__name__}", (base,), {"__call__": call})
    return copy


def _check(model: Any, verb: str) -> None:
    if not isinstance(model, nnx.Module):
        raise TypeError(f"`model` must be a flax.nnx.Module, got {type(model).__name__}; for Linen use qjax.linen.{verb}")
