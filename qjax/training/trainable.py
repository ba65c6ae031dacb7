"""What an optimizer may be given: floating arrays, and nothing that is packed."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from qjax.core import QTensor


def check_trainable(tree: Any, argument: str = "params") -> None:
    """Refuses trees that an optimizer must not be given: packed or integer leaves have no gradient and no learning rate.

    `qjax.adam8bit` and `qjax.lion8bit` look at their parameters with it, and `labels` of a state or of variables at what they label. Call
    it in front of any other optimizer.

    Args:
      tree: what is to be trained.
      argument: what an error calls it.

    Raises:
      TypeError: naming the first leaf that cannot.

    Example:
      >>> import jax.numpy as jnp
      >>> check_trainable({"codes": jnp.zeros(4, jnp.uint8)})
      Traceback (most recent call last):
      TypeError: `params` leaf 'codes' is uint8, which has no gradient and no learning rate: train ...
    """
    for path, leaf in jax.tree_util.tree_flatten_with_path(tree, is_leaf=_is_q)[0]:
        if _is_q(leaf) or not _is_floating(leaf):
            what = "packed" if _is_q(leaf) else str(_dtype(leaf))
            name = jax.tree_util.keystr(path, simple=True, separator="/")
            raise TypeError(f"`{argument}` leaf {name!r} is {what}, which has no gradient and no learning rate: train float parameters, or "
                            "the adapters of qjax.qlora(fn, policy) and not their base; what must stay in the tree is left out by "
                            "optax.masked, or by optax.set_to_zero() in optax.multi_transform")  # fmt: skip


def trainable_labels(tree: Any, argument: str = "params") -> Any:
    """"weights" for every floating array, "fixed" for tables of integers, which stand beside them.

    Args:
      tree: of parameters.
      argument: what an error calls it.

    Returns:
      A tree of the same structure.

    Raises:
      TypeError: a leaf is packed, or there are leaves and none of them is floating: nothing would train.

    Example:
      >>> trainable_labels({"w": jnp.zeros(4), "table": jnp.zeros(4, jnp.int32)})
      {'table': 'fixed', 'w': 'weights'}
    """
    labels = jax.tree.map(lambda leaf: "weights" if _is_floating(leaf) else "fixed", tree)
    if "weights" not in jax.tree.leaves(labels) or any(map(_is_q, jax.tree.leaves(tree, is_leaf=_is_q))):
        check_trainable(tree, argument)
    return labels


def _dtype(leaf: Any) -> Any:
    return getattr(leaf, "dtype", None) or jnp.result_type(leaf)


def _is_floating(leaf: Any) -> bool:
    return jnp.issubdtype(_dtype(leaf), jnp.floating)


def _is_q(x: Any) -> bool:
    return isinstance(x, QTensor)
