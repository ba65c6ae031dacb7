"""Adam with moments in 8 bits."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from qjax.training.moments import (
    Blocks,
    Moment8,
    chained,
    check_blocks,
    check_decay,
    check_decays,
    check_eps,
    check_rates,
    check_state,
    for_each,
)
from qjax.training.trainable import check_trainable

Number = float | jax.Array
Rate = Number | Callable[[Any], Any]


class Adam8State(NamedTuple):
    """The state of `scale_by_adam8bit`.

    Attributes:
      count: steps made, int32.
      mu: first moments, a `Moment8` for each parameter, or float32 for a small one.
      nu: second moments, likewise.
    """

    count: jax.Array
    mu: Any
    nu: Any


def scale_by_adam8bit(
    b1: Number = 0.9, b2: Number = 0.999, eps: Number = 1e-8, blocks: Blocks = Blocks()  # noqa: B008  # frozen
) -> optax.GradientTransformation:
    """`optax.scale_by_adam` with moments in 8 bits; see `adam8bit`.

    Args:
      b1: decay of the first moment.
      b2: decay of the second.
      eps: added to the root of the second.
      blocks: how moments are stored.

    Returns:
      A transformation whose updates have the dtypes of the gradients; what is between is float32.

    Raises:
      TypeError: an argument of another type; by init: a parameter is not floating; by update: the state of another optimizer.
      ValueError: `b1` or `b2` is not in 0 .. 1, 1 excluded; `eps` is negative; by update: gradients of another tree than the state.

    Example:
      >>> state = scale_by_adam8bit().init({"w": jnp.ones((64, 64)), "b": jnp.ones(64)})
      >>> jax.tree.map(lambda a: (a.dtype.name, a.shape), state.mu)
      {'b': ('float32', (64,)), 'w': Moment8(codes=('uint8', (64, 64)), absmax=('float32', (16,)))}
    """
    check_blocks(blocks)
    check_decays(b1=b1, b2=b2)
    check_eps(eps)

    def init(params: Any) -> Adam8State:
        check_trainable(params)
        mu, nu = (jax.tree.map(lambda p, signed=signed: blocks.zeros(p, signed), params) for signed in (True, False))
        return Adam8State(jnp.zeros((), jnp.int32), mu, nu)

    def update(updates: Any, state: Adam8State, params: Any = None) -> tuple[Any, Adam8State]:
        del params
        check_state(state, Adam8State)
        count = jnp.asarray(optax.safe_increment(state.count))
        first, second = 1 - jnp.asarray(b1, jnp.float32) ** count, 1 - jnp.asarray(b2, jnp.float32) ** count

        def one(g: jax.Array, m: Moment8 | jax.Array, v: Moment8 | jax.Array) -> tuple[Any, Any, Any]:
            slope = g.astype(jnp.float32)
            mu = b1 * blocks.read(m, True) + (1 - b1) * slope
            nu = b2 * blocks.read(v, False) + (1 - b2) * slope * slope
            move = (mu / first) / (jnp.sqrt(nu / second) + eps)
            return move.astype(g.dtype), blocks.write(mu, m, True), blocks.write(nu, v, False)

        updates, mu, nu = for_each(one, blocks, updates, state.mu, state.nu)
        return updates, Adam8State(count, mu, nu)

    return optax.GradientTransformation(init, update)  # pyright: ignore[reportArgumentType]  # optax says what it needs of a state


def adam8bit(
    learning_rate: Rate,
    b1: Number = 0.9,
    b2: Number = 0.999,
    eps: Number = 1e-8,
    weight_decay: Rate | None = None,
    mask: Any = None,
    blocks: Blocks = Blocks(),  # noqa: B008  # frozen
) -> optax.GradientTransformation:
    """Adam whose moments are stored in 8 bits: 2 + 8 / 256 bytes a parameter in place of 8.

    m <- b1 m + (1 - b1) g,  v <- b2 v + (1 - b2) g^2,  in float32, of what was stored
    w <- w - lr ((m / (1 - b1^t)) / (sqrt(v / (1 - b2^t)) + eps) + weight_decay w)
    and then m and v are stored: in blocks of 256, divided by the largest magnitude of the block, to the nearest of the 256 numbers of
    the dynamic map (with a sign for m, without for v). The update is made of the moments before they are rounded.

    A second moment that is not zero is not stored as zero but as at least 3.25e-7 of the largest in its block: a weight without a
    gradient in this step would otherwise move by lr m / eps, a thousand times too far and more.

    The state lies where the parameters lie: codes have their shape and so their sharding, the largest magnitudes keep the axes that no
    block crosses (`qjax.training.Blocks`). `init` follows arrays with a sharding when it is called outside `jit`; inside, give `jit`
    `out_shardings`. It is a tree of arrays for `jit` with donation, `vmap`, `scan`, orbax, `optax.masked`, `multi_transform`, `MultiSteps`
    and `inject_hyperparams` (`blocks` is no number, and stays as it is), and for `nnx.Optimizer`, which from its first update on holds a
    `Moment8` as an `nnx.State` of the two arrays: make one step before you make an `nnx.scan` of them.

    Args:
      learning_rate: a number or a schedule.
      b1: decay of the first moment.
      b2: decay of the second.
      eps: added to the root of the second.
      weight_decay: decoupled, times the learning rate, as `optax.adamw` has it; None: no decay.
      mask: which parameters decay, as for `optax.adamw`.
      blocks: how moments are stored.

    Returns:
      An optax transformation.

    Raises:
      TypeError: an argument of another type; by init: a parameter is not floating; by update: the state of another optimizer.
      ValueError: `b1` or `b2` is not in 0 .. 1, 1 excluded; `eps` is negative; a `mask` without `weight_decay`.

    Example:
      >>> params = {"w": jnp.ones((64, 64))}
      >>> tx = adam8bit(1e-3)
      >>> state = tx.init(params)
      >>> sum(a.nbytes for a in jax.tree.leaves(state)), sum(a.nbytes for a in jax.tree.leaves(optax.adam(1e-3).init(params)))
      (8324, 32772)
      >>> updates, state = jax.jit(tx.update)({"w": jnp.ones((64, 64))}, state, params)
      >>> round(updates["w"][0, 0].item(), 6)
      -0.001

    Source: Dettmers et al. 2022, arXiv 2110.02861; bitsandbytes 0.50, where a second moment can be stored as zero.
    """
    check_rates(learning_rate=learning_rate, **({} if weight_decay is None else {"weight_decay": weight_decay}))
    check_decay(weight_decay, mask)
    parts = [scale_by_adam8bit(b1, b2, eps, blocks)]
    if weight_decay is not None:
        parts.append(optax.add_decayed_weights(weight_decay, mask))
    return chained(*parts, optax.scale_by_learning_rate(learning_rate))
