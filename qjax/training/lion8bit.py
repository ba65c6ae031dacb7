"""Lion with its momentum in 8 bits."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from qjax.training.adam8bit import Number, Rate
from qjax.training.moments import Blocks, Moment8, chained, check_blocks, check_decay, check_decays, check_rates, check_state, for_each
from qjax.training.trainable import check_trainable


class Lion8State(NamedTuple):
    """The state of `scale_by_lion8bit`.

    Attributes:
      mu: momentum, a `Moment8` for each parameter, or float32 for a small one.
    """

    mu: Any


def scale_by_lion8bit(
    b1: Number = 0.9, b2: Number = 0.99, blocks: Blocks = Blocks()  # noqa: B008  # frozen
) -> optax.GradientTransformation:
    """`optax.scale_by_lion` with its momentum in 8 bits; see `lion8bit`.

    Args:
      b1: the momentum's part in the direction.
      b2: decay of the momentum.
      blocks: how it is stored.

    Returns:
      A transformation whose updates are -1, 0 and 1 in the dtypes of the gradients.

    Raises:
      TypeError: an argument of another type; by init: a parameter is not floating; by update: the state of another optimizer.
      ValueError: `b1` or `b2` is not in 0 .. 1, 1 excluded.

    Example:
      >>> tx = scale_by_lion8bit()
      >>> g = {"w": jnp.linspace(-1, 1, 4097)}
      >>> updates, state = tx.update(g, tx.init(g))
      >>> updates["w"][::2048].tolist(), state.mu["w"].codes[::2048].tolist()
      ([-1.0, 0.0, 1.0], [0, 127, 255])
    """
    check_blocks(blocks)
    check_decays(b1=b1, b2=b2)

    def init(params: Any) -> Lion8State:
        check_trainable(params)
        return Lion8State(jax.tree.map(lambda p: blocks.zeros(p, True), params))

    def update(updates: Any, state: Lion8State, params: Any = None) -> tuple[Any, Lion8State]:
        del params
        check_state(state, Lion8State)

        def one(g: jax.Array, m: Moment8 | jax.Array) -> tuple[Any, Any]:
            slope, mu = g.astype(jnp.float32), blocks.read(m, True)
            move = jnp.sign(b1 * mu + (1 - b1) * slope)
            return move.astype(g.dtype), blocks.write(b2 * mu + (1 - b2) * slope, m, True)

        updates, mu = for_each(one, blocks, updates, state.mu)
        return updates, Lion8State(mu)

    return optax.GradientTransformation(init, update)  # pyright: ignore[reportArgumentType]  # optax says what it needs of a state


def lion8bit(
    learning_rate: Rate,
    b1: Number = 0.9,
    b2: Number = 0.99,
    weight_decay: Rate | None = None,
    mask: Any = None,
    blocks: Blocks = Blocks(),  # noqa: B008  # frozen
) -> optax.GradientTransformation:
    """Lion whose momentum is stored in 8 bits: 1 + 4 / 256 bytes a parameter in place of 4.

    w <- w - lr (sign(b1 m + (1 - b1) g) + weight_decay w)
    m <- b2 m + (1 - b2) g,  in float32, of what was stored, and then stored as `adam8bit` stores its first moment.

    Args:
      learning_rate: a number or a schedule; a third to a tenth of Adam's.
      b1: the momentum's part in the direction.
      b2: decay of the momentum.
      weight_decay: decoupled, times the learning rate; None: no decay.
      mask: which parameters decay, as for `optax.lion`.
      blocks: how the momentum is stored.

    Returns:
      An optax transformation.

    Raises:
      TypeError: an argument of another type; by init: a parameter is not floating; by update: the state of another optimizer.
      ValueError: `b1` or `b2` is not in 0 .. 1, 1 excluded; a `mask` without `weight_decay`.

    Example:
      >>> params = {"w": jnp.ones((64, 64))}
      >>> tx = lion8bit(1e-4)
      >>> sum(a.nbytes for a in jax.tree.leaves(tx.init(params)))
      4160
      >>> updates, state = tx.update(params, tx.init(params), params)
      >>> round(updates["w"][0, 0].item(), 6)
      -0.0001

    Source: Chen et al. 2023, arXiv 2302.06675, algorithm 2; Dettmers et al. 2022, arXiv 2110.02861; bitsandbytes 0.50.
    """
    check_rates(learning_rate=learning_rate, **({} if weight_decay is None else {"weight_decay": weight_decay}))
    check_decay(weight_decay, mask)
    parts = [scale_by_lion8bit(b1, b2, blocks)]
    if weight_decay is not None:
        parts.append(optax.add_decayed_weights(weight_decay, mask))
    return chained(*parts, optax.scale_by_learning_rate(learning_rate))
