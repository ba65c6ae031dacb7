"""Statistics of an input that is divided by scales, from those of the input as it was."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from qjax.calibration.observers import CrossMoments, Moments
from qjax.calibration.power import Power
from qjax.calibration.sample import Sample


def divide_columns(state: Any, s: jax.Array) -> Any:
    """Returns what an observer would have seen of x / s.

    Args:
      state: of `SecondMoment`, `CrossMoment`, `ColumnPower` or `sample_rows`, or a tuple of such.
      s: positive, (stack, K).

    Returns:
      A state of the same kind.

    Raises:
      TypeError: a state of another kind.

    Example:
      >>> import jax.numpy as jnp
      >>> divide_columns(Moments(jnp.array([[[4.0]]]), jnp.array([1])), jnp.array([[2.0]])).total.tolist()
      [[[1.0]]]
    """
    if type(state) is tuple:  # of `Together`
        return tuple(divide_columns(part, s) for part in state)
    if isinstance(state, Moments):
        return Moments(state.total / (s[:, :, None] * s[:, None, :]), state.count)
    if isinstance(state, CrossMoments):
        both = s[:, :, None] * s[:, None, :]
        return state._replace(total=state.total / both, cross=state.cross / both)
    if isinstance(state, Power):
        return state._replace(mean_square=state.mean_square / jnp.square(s))
    if isinstance(state, Sample):
        return state._replace(x=state.x / s[:, None])
    raise TypeError(f"`state` must be of second moments, mean squares or sampled rows to be divided, got {type(state).__name__}")
