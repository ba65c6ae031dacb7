"""`overflow`: how often a mixed product had more outlier columns than it takes."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from qjax.calibration import OutlierCounts, init_states, outlier_columns, site_rows, why_no_rows
from qjax.core import QProduct, QTensor
from qjax.program import Interpreter, Leaf, ProgramCache, Site, check_function, split_arguments
from qjax.runtime.products import product_rule
from qjax.runtime.quantized import checked_products, named_products
from qjax.runtime.select import packed_rule


class Overflow(NamedTuple):
    """Outlier columns of one parameter's products; int32 scalars.

    Attributes:
      calls: how many products there were: each turn of a loop and each layer or expert of a stack counts.
      over: those with more outlier columns than `capacity`, whose smaller outliers stayed integers.
      most: the largest number of outlier columns of one product.
      capacity: how many one product takes.
    """

    calls: jax.Array
    over: jax.Array
    most: jax.Array
    capacity: jax.Array


def overflow(fn: Callable[..., Any], sites: Mapping[str, QProduct] | None = None) -> Callable[..., dict[str, Overflow]]:
    """Transforms `fn(params, *args)` into a function that counts outlier columns beyond the capacity of `llm_int8`.

    The packed model runs as under `quantized`, and every product counts the columns of its activations with any |x| >= threshold.
    Run it on batches of production: where `over` is not 0, a larger `capacity` (or calibration on such data) is in order.

    Args:
      fn: the function that was quantized.
      sites: `result.sites`, the products of two activations that multiply integers; without it they are float, and so not what runs.

    Returns:
      A function of the same arguments that gives, for the path of each parameter with outlier columns, an `Overflow`. It is pure:
      `jit` it, and add up the counts of several batches with `jax.tree.map`. Experts that share a list of rows are counted over all
      the rows of an expert, of which the product sees a block at a time: `over` is an upper bound there. Products that cannot be
      observed (inside a `shard_map`, in the condition of a loop) are not counted.

    Raises:
      TypeError: `fn` is no function, or `sites` holds something else than products.
      ValueError: when called with parameters of which none has outlier columns, or when `sites` names a product that is not there.

    Example:
      >>> import jax, jax.numpy as jnp, qjax
      >>> fn = lambda p, x: x @ p["w"]
      >>> params, x = {"w": jnp.eye(16)}, jnp.ones((2, 16)).at[0, 3].set(20.0)
      >>> policy = qjax.Policy([qjax.Rule("*", weight=qjax.int8(), method=qjax.llm_int8(capacity=2))])
      >>> result = qjax.quantize(fn, params, policy, calibration=[x])
      >>> counts = jax.jit(overflow(fn))(result.params, 10 * x)["w"]
      >>> {name: int(value) for name, value in counts._asdict().items()}
      {'calls': 1, 'over': 1, 'most': 16, 'capacity': 2}
    """
    check_function(fn)
    sites = checked_products(sites)
    programs = ProgramCache(fn)

    @functools.wraps(fn)
    def call(params: Any, *args: Any, **kwargs: Any) -> dict[str, Overflow]:
        arguments = split_arguments(params, args, kwargs)
        program = programs(arguments)
        capacities, observers = {}, {}
        for leaf in program.leaves:
            q = arguments.params[leaf.index]
            if isinstance(q, QTensor) and q.act is not None and q.act.outliers is not None:
                limit = q.act.outliers
                capacities[leaf.path] = limit.capacity
                observers |= {s.key: outlier_columns(limit.threshold, limit.capacity) for s in leaf.sites if counted(s, leaf)}
        if not capacities:
            raise ValueError("`params` has no weight with outlier columns: quantize it with method=qjax.llm_int8()")

        def rule(site: Site, eqn: Any, operands: list[Any], state: Any) -> tuple[list[Any], Any]:
            if state is not None:
                state = observers[site.key].update(state, site_rows(site, eqn, operands))
            return packed_rule(site, eqn, operands, None)[0], state

        named = named_products(program, sites)
        watched = frozenset(observers)
        interpreter = Interpreter({s.key: s for s in program.sites}, rule, watched, products=named, product_rule=product_rule)
        start = init_states(program, observers) | {key: sites[product.name] for key, product in named.items()}
        _, states = interpreter(program.jaxpr, [*arguments.params, *arguments.inputs], start)
        found: dict[str, list[OutlierCounts]] = {path: [] for path in capacities}
        for site in program.sites:
            if site.key in states:
                found[site.path].append(states[site.key])
        return {path: _total(counts, capacities[path]) for path, counts in found.items()}

    return call


def counted(site: Site, leaf: Leaf) -> bool:
    """Whether a site has an outlier product that can be observed."""
    return site.op in ("dot_general", "ragged_dot_general") and not site.custom_rule and not why_no_rows(site, leaf)


def _total(counts: list[OutlierCounts], capacity: int | None) -> Overflow:
    zero = jnp.int32(0)
    calls, over = (sum((jnp.sum(getattr(c, name)) for c in counts), zero) for name in ("calls", "over"))
    most = functools.reduce(jnp.maximum, [jnp.max(c.most) for c in counts], zero)
    return Overflow(calls, over, most, jnp.int32(-1 if capacity is None else capacity))
