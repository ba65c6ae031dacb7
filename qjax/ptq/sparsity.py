"""Pruned weights: an exact zero stays one wherever the grid has a zero, and a grid without one is refused."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from qjax.core import CodebookSpec, IntSpec, Spec

MOST_ZEROS = 0.1  # the share of exact zeros above which a weight counts as pruned


def has_zero(spec: Spec) -> bool:
    """Whether a spec's grids have a level that is exactly zero, whatever their scale.

    Example:
      >>> import qjax
      >>> [has_zero(spec) for spec in (qjax.int4(), qjax.uint4(), qjax.nf4(), qjax.codebook((-1.0, 1.0)))]
      [True, True, True, False]
    """
    if isinstance(spec, CodebookSpec):
        return 0.0 in spec.levels
    return not (isinstance(spec, IntSpec) and spec.float_zero)


def check_zeros(w: jax.Array, spec: Spec, path: str) -> tuple[str, ...]:
    """Looks whether a grid without a zero would fill in what was pruned.

    Args:
      w: the float weight.
      spec: what it is to become.
      path: its name.

    Returns:
      A remark for the report, where a few zeros become something else.

    Raises:
      ValueError: more than `MOST_ZEROS` of the weight is exactly zero, and the spec has no zero.

    Example:
      >>> import qjax
      >>> check_zeros(jnp.eye(4), qjax.codebook((-1.0, 1.0)), "up")
      Traceback (most recent call last):
      ValueError: `weight`=codebook(group_size=64) has no level that is exactly zero, and 75 % of 'up' is: ...
    """
    if has_zero(spec):
        return ()
    share = float(jnp.mean(w == 0))
    if share > MOST_ZEROS:
        raise ValueError(
            f"`weight`={spec} has no level that is exactly zero, and {100 * share:.3g} % of {path!r} is: what was pruned would come back; "
            'take a grid with a zero, such as qjax.int4(...), qjax.uint4(...) with zero_dtype="int", or qjax.nf4(...)'
        )
    return (f"{100 * share:.2g} % of it is exactly zero, which {spec} has no level for",) if share else ()
