"""Optimizer states that wait in the host's memory."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.core import Tracer

from qjax.core.specs import as_count

KIND = "pinned_host"


def host_offload(tx: optax.GradientTransformation, at_least: int = 4096) -> optax.GradientTransformationExtraArgs:
    """Keeps the state of an optax transformation in the host's memory, pinned, and on the device only while it is updated.

    `update` copies the state to the device, calls `tx.update` and copies the new state back, within the compiled step: numbers are those of
    `tx`, to the bit. Forward and backward pass run without it. Each array goes where it was: sharded ones piece by piece to the host of
    their device. What a step costs more is the way there and back, 2 bytes a parameter each way with `qjax.adam8bit`, 8 with `optax.adam`.

    Give `jit` the old state to donate, or two of them lie on the host. In a `scan` over steps the state is carried where `init` put it.

    Args:
      tx: any transformation.
      at_least: arrays of fewer values stay on the device, such as counts and hyperparameters: a copy of its own would take longer than
        the memory is worth. Random keys stay, too.

    Returns:
      A transformation with the same state.

    Raises:
      TypeError: `tx` is no transformation.
      ValueError: `at_least` is no whole number; by init: the backend has no memory of that kind, naming those it has.

    Example:
      >>> params = {"w": jnp.ones((64, 64))}
      >>> tx = host_offload(optax.adam(1e-3))
      >>> state = tx.init(params)
      >>> updates, state = jax.jit(tx.update)(params, state, params)
      >>> state[0].mu["w"].sharding.memory_kind, updates["w"].sharding.memory_kind
      ('pinned_host', 'device')

    Source: ZeRO-Offload (Ren et al. 2021, arXiv 2101.06840), whose optimizer step runs on the host; paged optimizers, QLoRA (Dettmers
    et al. 2023, arXiv 2305.14314), section 3, which move pages on demand. Here all moves in every step, on the device's schedule.
    """
    if not isinstance(tx, optax.GradientTransformation):
        raise TypeError(f"`tx` must be an optax transformation such as qjax.adam8bit(1e-3), got {tx!r}")
    at_least = as_count("at_least", at_least, 0)
    inner = optax.with_extra_args_support(tx)

    def moved(state: Any, space: Any) -> Any:
        return jax.tree.map(lambda a: jax.device_put(a, space) if _is_large(a, at_least) else a, state)

    def init(params: Any) -> Any:
        check_memory(_device_of(params))
        return moved(inner.init(params), jax.memory.Space.Host)

    def update(updates: Any, state: Any, params: Any = None, **extra: Any) -> tuple[Any, Any]:
        updates, state = inner.update(updates, moved(state, jax.memory.Space.Device), params, **extra)
        return updates, moved(state, jax.memory.Space.Host)

    return optax.GradientTransformationExtraArgs(init, update)


def _is_large(a: Any, at_least: int) -> bool:
    return a.size >= at_least and a.ndim > 0 and not jnp.issubdtype(a.dtype, jax.dtypes.prng_key)


def check_memory(device: Any) -> None:
    """Refuses a device that cannot reach a host's pinned memory.

    Raises:
      ValueError: naming the device and its memories.
    """
    kinds = sorted(memory.kind for memory in device.addressable_memories())
    if KIND not in kinds:
        raise ValueError(
            f"`params` lie on {device.device_kind} ({device.platform}), whose memories are {', '.join(kinds)}, and none is {KIND}: take "
            "the transformation without qjax.host_offload"
        )


def _device_of(params: Any) -> Any:
    arrays = [p for p in jax.tree.leaves(params) if isinstance(p, jax.Array) and not isinstance(p, Tracer)]
    return next(iter(arrays[0].devices())) if arrays else jax.devices()[0]
