"""Evaluates a traced program with packed parameters, or with a rule at its sites, preserving its structure.

Equations without anything to do in them are bound unchanged. Calls and control flow that hold a packed parameter or a watched site
are rebuilt with the public combinators, so the result composes with every transformation. The cost is at trace time only.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
from jax import lax

from qjax.core import QCache, QTensor
from qjax.program import compat
from qjax.program.caches import UPDATE, through, written_along
from qjax.program.packed import Packed, after_view, materialize, scannable, scannable_cache
from qjax.program.passing import invariant_carries, passed_on
from qjax.program.primitives import BARRIER, VIEWS
from qjax.program.products import Product
from qjax.program.sharded import shard_map_packed
from qjax.program.sites import Key, Site

# What happens at a site: (site, equation, operands, side state) -> (results, new side state).
# An operand that is a quantized parameter comes as `Packed`. State is None where nothing was threaded for the site.
Rule = Callable[[Site, Any, list[Any], Any], tuple[list[Any], Any]]
# The same at a product of two activations; its operands are arrays.
ProductRule = Callable[[Product, Any, list[Any], Any], tuple[list[Any], Any]]
# What runs a call of a known name that is given a packed cache: (equation, operands) -> results, or None for what it is anyway.
CallRule = Callable[[Any, list[Any]], list[Any] | None]
State = dict[Key, Any]
# What a packed cache goes through as it is; anything else reads its numbers.
_STRUCTURE = compat.INLINE | compat.REMAT | {"scan", "while", "cond", BARRIER}


def plain_product_rule(product: Product, eqn: Any, operands: list[Any], state: Any) -> tuple[list[Any], Any]:
    """Applies the equation as it stands."""
    del product
    return compat.bind(eqn, operands), state


def plain_rule(site: Site, eqn: Any, operands: list[Any], state: Any) -> tuple[list[Any], Any]:
    """Dequantizes the parameter and applies the equation as it stands."""
    del site
    return compat.bind(eqn, [materialize(v) for v in operands]), state


@dataclasses.dataclass(frozen=True)
class Interpreter:
    """Evaluates one program.

    Attributes:
      sites: the program's sites by key.
      rule: what to do at a site.
      watched: keys of sites to visit even if their operands are ordinary arrays.
      inline_custom: whether custom_jvp and custom_vjp functions with something to do in them are opened. Opening one drops its
        derivative rule, so this is for inference and observation only; otherwise its packed operands are dequantized.
      products: the products of two activations to visit, by key.
      product_rule: what to do at one.
      calls: what to do at calls (`jax.jit`) that are given a packed cache, by the name of what is called.
    """

    sites: Mapping[Key, Site]
    rule: Rule = plain_rule
    watched: frozenset[Key] = frozenset()
    inline_custom: bool = False
    products: Mapping[Key, Product] = dataclasses.field(default_factory=dict)
    product_rule: ProductRule = plain_product_rule
    calls: Mapping[str, CallRule] = dataclasses.field(default_factory=dict)

    @functools.cached_property
    def above_watched(self) -> frozenset[Key]:
        """Keys of the calls and loops that hold a watched site or product."""
        return frozenset(key[:i] for key in (*self.watched, *self.products) for i in range(len(key)))

    def __call__(self, jaxpr: Any, args: Sequence[Any], state: State | None = None) -> tuple[list[Any], State]:
        """Evaluates `jaxpr` on flat `args`, threading `state` (one entry a watched site or product) through it."""
        state = dict(state or {})
        values = [Packed(a) if isinstance(a, QTensor) else a for a in args]
        outs = self.program(jaxpr, values, (), state)
        # A parameter that is handed back as it came (NNX state, mutable collections) stays packed.
        given = {id(v) for v in values if isinstance(v, Packed) and v.trained is None}
        return [v.q if id(v) in given else _kept(v) for v in outs], state

    def program(self, jaxpr: Any, args: Sequence[Any], prefix: Key, state: State) -> list[Any]:
        body, consts = compat.parts(jaxpr)
        env: dict[Any, Any] = dict(zip(body.constvars, consts, strict=True))
        env.update(zip(body.invars, args, strict=True))

        def read(atom: Any) -> Any:
            return atom.val if isinstance(atom, compat.Literal) else env[atom]

        last_use = _last_uses(body)
        for index, eqn in enumerate(body.eqns):
            operands = [read(atom) for atom in eqn.invars]
            scope = str(eqn.source_info.name_stack)
            with jax.named_scope(scope) if scope else contextlib.nullcontext():
                outs = self.equation(eqn, operands, (*prefix, index), state)
            env.update(zip(eqn.outvars, outs, strict=True))
            for var in last_use.get(index, ()):
                env.pop(var, None)
        return [read(atom) for atom in body.outvars]

    def equation(self, eqn: Any, operands: list[Any], key: Key, state: State) -> list[Any]:
        name = eqn.primitive.name
        if name == UPDATE and isinstance(operands[0], QCache) and written_along(eqn) == operands[0].axis:
            cache, new, *starts = operands
            return [cache.append(materialize(new), starts[cache.axis])]
        cached = any(isinstance(v, QCache) for v in operands)
        if cached and name not in _STRUCTURE:  # here it is read
            operands, cached = [materialize(v) if isinstance(v, QCache) else v for v in operands], False
        call = self.calls.get(eqn.params.get("name", "")) if cached and name in compat.INLINE else None
        known = None if call is None else call(eqn, operands)
        if known is not None:
            return known
        site = self.sites.get(key)
        packed = any(isinstance(v, Packed) for v in operands)
        if site is not None and (packed or key in self.watched):
            outs, new = self.rule(site, eqn, operands, state.get(key))
            if key in state:
                state[key] = new
            return outs
        product = self.products.get(key)
        if product is not None:
            outs, new = self.product_rule(product, eqn, [materialize(v) for v in operands], state.get(key))
            if key in state:
                state[key] = new
            return outs
        inside = key in self.above_watched
        if not packed and not inside and not cached:
            return compat.bind(eqn, operands)
        if name in VIEWS and isinstance(operands[0], Packed):
            seen = after_view(operands[0], eqn, operands[1:])
            if seen is not None:
                return [*seen]
        if name == BARRIER:
            return list(lax.optimization_barrier(operands))
        if name in compat.INLINE or (name in compat.CUSTOM_RULES and self.inline_custom):
            return self.program(eqn.params[compat.CALLS[name]], operands, (*key, 0), state)
        if name in compat.REMAT:
            return self.remat(eqn, operands, key, state)
        if name == "scan":
            return self.scan(eqn, operands, key, state)
        if name == "while":
            return self.while_loop(eqn, operands, key, state)
        if name == "cond":
            return self.cond(eqn, operands, key, state)
        if name == "shard_map" and not inside:
            outs = shard_map_packed(eqn, operands, lambda jaxpr, args: self.program(jaxpr, args, (*key, 0), {}))
            if outs is not None:
                return outs
        return compat.bind(eqn, [materialize(v) for v in operands])

    def remat(self, eqn: Any, operands: list[Any], key: Key, state: State) -> list[Any]:
        own, passed = _below(state, key), passed_on(eqn)

        def body(operands: list[Any], own: State) -> tuple[list[Any], State]:
            outs = self.program(eqn.params["jaxpr"], operands, (*key, 0), own)
            return [_kept(v) for i, v in enumerate(outs) if i not in passed], own

        call = jax.checkpoint(body, policy=eqn.params["policy"], prevent_cse=eqn.params["prevent_cse"])
        outs, own = call(operands, own)
        state.update(own)
        return _with_passed(outs, operands, passed)

    def scan(self, eqn: Any, operands: list[Any], key: Key, state: State) -> list[Any]:
        n_consts, n_carry = compat.scan_counts(eqn)
        fixed = invariant_carries(eqn.params["jaxpr"], n_consts, n_carry)
        passed = passed_on(eqn)
        consts, init, xs = operands[:n_consts], operands[n_consts : n_consts + n_carry], operands[n_consts + n_carry :]
        stays = _stays_packed(eqn, operands)
        moving = [stays(v, i) for i, v in enumerate(init) if i not in fixed]
        xs = [scannable(v) if isinstance(v, Packed) else scannable_cache(v) if isinstance(v, QCache) else v for v in xs]
        own = _below(state, key)
        stacked = {k: v for k, v in own.items() if key in (self.products.get(k) or self.sites[k]).scans}
        shared = {k: v for k, v in own.items() if k not in stacked}

        def body(carry: tuple[list[Any], State], x: tuple[list[Any], State]) -> Any:
            values = iter(carry[0])
            full = [init[i] if i in fixed else next(values) for i in range(n_carry)]
            inner = {**carry[1], **x[1]}
            outs = self.program(eqn.params["jaxpr"], consts + full + x[0], (*key, 0), inner)
            new = [stays(v, i) for i, v in enumerate(outs[:n_carry]) if i not in fixed]
            ys = [_kept(v) for i, v in enumerate(outs[n_carry:], n_carry) if i not in passed]
            return (new, {k: inner[k] for k in carry[1]}), (ys, {k: inner[k] for k in x[1]})

        settings = {name: eqn.params[name] for name in ("length", "reverse", "unroll")}
        (moved, shared), (ys, stacked) = lax.scan(body, (moving, shared), (xs, stacked), **settings)
        state.update(shared)
        state.update(stacked)
        return _with_passed([*moved, *ys], operands, passed)

    def while_loop(self, eqn: Any, operands: list[Any], key: Key, state: State) -> list[Any]:
        n_cond, n_body = eqn.params["cond_nconsts"], eqn.params["body_nconsts"]
        cond_consts, body_consts = operands[:n_cond], operands[n_cond : n_cond + n_body]
        init = operands[n_cond + n_body :]
        fixed = invariant_carries(eqn.params["body_jaxpr"], n_body, len(init))
        stays = _stays_packed(eqn, operands)
        moving = [stays(v, i) for i, v in enumerate(init) if i not in fixed]
        own = _below(state, key)

        def full(carry: list[Any]) -> list[Any]:
            values = iter(carry)
            return [init[i] if i in fixed else next(values) for i in range(len(init))]

        def cond(carry: tuple[list[Any], State]) -> Any:
            # What happens in the condition is not observed: it has no way to hand anything out.
            (out,) = self.program(eqn.params["cond_jaxpr"], cond_consts + full(carry[0]), (*key, 0), dict(carry[1]))
            return materialize(out)

        def body(carry: tuple[list[Any], State]) -> tuple[list[Any], State]:
            inner = dict(carry[1])
            outs = self.program(eqn.params["body_jaxpr"], body_consts + full(carry[0]), (*key, 1), inner)
            return [stays(v, i) for i, v in enumerate(outs) if i not in fixed], inner

        moved, own = lax.while_loop(cond, body, (moving, own))
        state.update(own)
        return full(moved)

    def cond(self, eqn: Any, operands: list[Any], key: Key, state: State) -> list[Any]:
        own, stays = _below(state, key), _stays_packed(eqn, operands)

        def branch(index: int, jaxpr: Any) -> Callable[..., Any]:
            def run(values: list[Any], own: State) -> tuple[list[Any], State]:
                inner = dict(own)
                outs = self.program(jaxpr, values, (*key, index), inner)
                return [stays(v, i) for i, v in enumerate(outs)], inner

            return run

        branches = [branch(i, jaxpr) for i, jaxpr in enumerate(eqn.params["branches"])]
        outs, own = lax.switch(operands[0], branches, operands[1:], own)
        state.update(own)
        return outs


def _kept(value: Any) -> Any:
    """A value as it leaves a program: a cache packed, anything else as the array that it stands for."""
    return value if isinstance(value, QCache) else materialize(value)


def _stays_packed(eqn: Any, operands: Sequence[Any]) -> Callable[[Any, int], Any]:
    """How results of a loop or branch leave its body: what is a packed operand with tokens written into it stays so, in every turn."""
    packed = any(isinstance(v, QCache) for v in operands)
    kept = {i for i, flow in through(eqn).items() if isinstance(operands[flow.source], QCache)} if packed else set()
    return lambda value, i: value if i in kept else materialize(value)


def _with_passed(outs: Sequence[Any], operands: Sequence[Any], passed: Mapping[int, int]) -> list[Any]:
    """The results of an equation from those that it made and the operands that it passes on."""
    fresh = iter(outs)
    return [operands[passed[i]] if i in passed else next(fresh) for i in range(len(outs) + len(passed))]


def _below(state: State, key: Key) -> State:
    return {k: v for k, v in state.items() if k[: len(key)] == key}


def _last_uses(body: Any) -> dict[int, list[Any]]:
    """For each equation the variables nobody reads after it, so that eager evaluation frees them."""
    seen = {atom for atom in body.outvars if not isinstance(atom, compat.Literal)}
    out: dict[int, list[Any]] = {}
    for index in range(len(body.eqns) - 1, -1, -1):
        for atom in body.eqns[index].invars:
            if not isinstance(atom, compat.Literal) and atom not in seen:
                seen.add(atom)
                out.setdefault(index, []).append(atom)
    return out
