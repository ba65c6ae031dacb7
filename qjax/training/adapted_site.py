"""What runs at the sites of a program with adapters: the frozen product, and beside it the two thin ones that train."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from qjax.core import Adapter, IntSpec, QTensor, adapter_matrix, uncanonicalize
from qjax.program import Packed, Site, compat, materialize
from qjax.runtime.adapter import adapter_product
from qjax.runtime.kernels import Runtime
from qjax.runtime.lookup import gather_rows
from qjax.runtime.select import packed_rule
from qjax.training.adapted import Adapted, ratio


def with_parts(base: Any, one: Adapted, parts: Mapping[str, Any]) -> Packed:
    """A parameter on its way through the program, its adapter with it; DoRA's magnitudes ride as one more column of the left part.

    A float one goes as it is, beside codes that are all zero and take no memory in the compiled program: they carry the adapter.
    """
    left, right = one.adapter(parts, base)
    if one.lora.dora:
        left = jnp.concatenate([left, parts["m"][..., None]], axis=-1)
        right = jnp.concatenate([right, jnp.zeros_like(right[..., :1, :])], axis=-2)
    if isinstance(base, QTensor):
        return Packed(base.with_adapter(Adapter(left, right)))
    sizes = tuple(base.shape[a] for a in one.axes)
    codes = jnp.zeros((*one.kept, one.inputs), jnp.int8)
    nothing = QTensor(codes, jnp.ones((*one.kept, 1)), None, None, IntSpec(8), one.axes, sizes, base.dtype)
    return Packed(nothing.with_adapter(Adapter(left, right)), trained=jnp.asarray(base))


def adapted_rule(
    site: Site, eqn: Any, operands: list[Any], state: Any, plan: Mapping[int, Adapted], runtime: Runtime
) -> tuple[list[Any], Any]:
    """Runs a site: frozen, or with the adapter of its parameter; `state` is the key of its dropout, or None."""
    weight, one = operands[site.operand], plan.get(site.leaf)
    if one is None:
        return [_frozen(site, eqn, operands, runtime)], state
    if not isinstance(weight, Packed) or weight.q.adapter is None:
        raise ValueError(f"the adapter of {site.path!r} cannot follow it to {site.scope or site.op}: on the way it is rearranged as "
                         "packed arrays cannot be; put a rule without `train` for it in front")  # fmt: skip
    if site.op == "gather":
        return [_looked_up(site, eqn, operands, runtime)], state
    adapter, m = weight.q.adapter, None
    if one.lora.dora:
        m, adapter = adapter.left[..., -1], Adapter(adapter.left[..., :-1], adapter.right[..., :-1, :])
    bare = Packed(weight.q.with_adapter(None), weight.pending, weight.trained)
    x = materialize(operands[1 - site.operand])
    values = [bare if i == site.operand else x if i == 1 - site.operand else v for i, v in enumerate(operands)]
    out = _frozen(site, eqn, values, runtime)
    y = out.astype(jnp.float32) + _thin(site, eqn, values, adapter, state, one.lora.dropout)
    if m is not None:
        y = y * _spread(site, eqn, ratio(m, _norms(bare, adapter)), weight.q, operands)
    return [y.astype(out.dtype)], state


def dropped(x: jax.Array, key: jax.Array, rate: float) -> jax.Array:
    """x with entries zeroed at random, the rest scaled by 1 / (1 - rate)."""
    keep = jax.random.bernoulli(key, 1 - rate, x.shape)
    return jnp.where(keep, x / (1 - rate), 0).astype(x.dtype)


def _frozen(site: Site, eqn: Any, operands: list[Any], runtime: Runtime) -> jax.Array:
    """The product with the packed weight. Backward it is unpacked again: its float values would else stay until then."""
    return jax.checkpoint(lambda values: packed_rule(site, eqn, values, None, runtime)[0][0])(operands)


def _thin(site: Site, eqn: Any, operands: list[Any], adapter: Adapter, key: jax.Array | None, rate: float) -> jax.Array:
    """s drop(x) A^T B^T, float32; multiplied out in front of the product where there is no such form of it (a convolution)."""

    def product(values: list[Any], adapter: Adapter, key: jax.Array | None) -> jax.Array:
        weight, x = values[site.operand], values[1 - site.operand]
        values = [dropped(x, key, rate) if key is not None and v is x else v for v in values]
        q = weight.q.with_adapter(adapter)
        given = [Packed(q, weight.pending) if i == site.operand else v for i, v in enumerate(values)]
        out = adapter_product(site, eqn, given)
        if out is not None:
            return out
        matrix = adapter_matrix(adapter)
        if q.input_scale is not None:
            matrix = matrix / q.input_scale
        matrix = uncanonicalize(matrix, q.axes, q.sizes).astype(q.dtype)
        for step in weight.pending:
            (matrix,) = compat.bind(step, [matrix])
        given[site.operand] = matrix
        return compat.bind(eqn, [materialize(v) for v in given])[0].astype(jnp.float32)

    return jax.checkpoint(product)(operands, adapter, key)


def _looked_up(site: Site, eqn: Any, operands: list[Any], runtime: Runtime) -> jax.Array:
    """Rows of the table and, added to them, rows of its adapter."""
    table = operands[0]
    if table.trained is None:
        return _frozen(site, eqn, operands, runtime)
    change = gather_rows(Packed(table.q, table.pending), eqn, jnp.asarray(operands[1]))
    if change is None:
        raise ValueError(f"the adapter of {site.path!r} has no lookup of this form ({site.scope or site.op}): put a rule without `train` "
                         "for it in front, or pack the table")  # fmt: skip
    (rows,) = compat.bind(eqn, [table.trained, *operands[1:]])
    return (rows.astype(jnp.float32) + change.astype(jnp.float32)).astype(rows.dtype)


def _norms(bare: Packed, adapter: Adapter) -> jax.Array:
    """|W + s B A| of every output as the site sees it, (kept...); nothing flows back through it (DoRA, equation 11)."""
    bare, adapter = jax.lax.stop_gradient((bare, adapter))
    q = bare.q
    base = q.dequantize() if bare.trained is None else bare.trained
    change = adapter_matrix(adapter)
    if q.input_scale is not None:
        change = change / q.input_scale
    w = base.astype(jnp.float32) + uncanonicalize(change, q.axes, q.sizes)
    return jnp.sqrt(jnp.sum(jnp.square(w), axis=tuple(a + q.ndim for a in q.axes)))


def _spread(site: Site, eqn: Any, each: jax.Array, q: QTensor, operands: list[Any]) -> jax.Array:
    """A factor of every output (kept...) in the place that the outputs have in the result of the equation."""
    out = eqn.outvars[0].aval
    if site.op == "conv_general_dilated":
        where = eqn.params["dimension_numbers"].out_spec[1]
        return each.reshape([-1 if i == where else 1 for i in range(out.ndim)])
    if site.op == "ragged_dot_general":
        rows = jnp.repeat(jnp.arange(each.shape[0]), jnp.asarray(operands[2]), total_repeat_length=out.shape[0])
        return each[rows]
    _, batch = eqn.params["dimension_numbers"]
    flat = {a + q.ndim for a in q.axes}
    kept = [i for i in range(q.ndim) if i not in flat]
    together = [kept.index(b) for b in batch[site.operand]]
    rest = [i for i in range(len(kept)) if i not in together]
    each = each.transpose(*together, *rest)
    rows = [1] * (out.ndim - each.ndim)
    lead, own = each.shape[: len(together)], each.shape[len(together) :]
    return each.reshape(*lead, *rows, *own) if site.operand == 1 else each.reshape(*lead, *own, *rows)
