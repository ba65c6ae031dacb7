"""Over which axes of a `shard_map` values vary."""

from typing import Any

import jax
from jax import lax


def varying(tree: Any) -> frozenset[str]:
    """Names of the mesh axes over which any array of a tree varies; none outside of a `shard_map` that checks them.

    >>> import jax.numpy as jnp
    >>> varying(jnp.ones(2))
    frozenset()
    """
    kinds = [getattr(jax.typeof(a), "manual_axis_type", None) for a in jax.tree.leaves(tree)]
    return frozenset().union(*(getattr(kind, "varying", ()) for kind in kinds))


def varying_like(y: jax.Array, tree: Any) -> jax.Array:
    """Says of y, which a foreign function made of a tree, that it varies as that does: jax takes such a result for the same everywhere.

    >>> import jax.numpy as jnp
    >>> varying_like(jnp.ones(2), jnp.ones(2)).tolist()
    [1.0, 1.0]
    """
    missing = tuple(sorted(varying(tree) - varying(y)))
    return lax.pcast(y, missing, to="varying") if missing else y
