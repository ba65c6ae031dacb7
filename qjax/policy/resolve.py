"""Policy: ordered rules, and what they decide for the parameters, products and caches of a program."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp

from qjax.core import ActSpec, CacheSpec, OnlineRotation, Spec
from qjax.policy.rule import RotatesInputs, Rule
from qjax.program import InputLeaf, Leaf, Product, Program


@dataclasses.dataclass(frozen=True)
class Choice:
    """What a policy decided for one parameter: the first rule that matches it, or none; and why."""

    leaf: Leaf
    rule: Rule | None
    reason: str

    @property
    def spec(self) -> Spec | None:
        return self.rule.weight if self.rule is not None else None

    @property
    def activation(self) -> ActSpec | None:
        """What becomes of its activations; a parameter that is only looked up meets none."""
        return self._activation[0]

    @property
    def activation_note(self) -> str:
        """What the method has to say of that, or ""."""
        return self._activation[1]

    @property
    def _activation(self) -> tuple[ActSpec | None, str]:
        ops = {site.op for site in self.leaf.sites} - {"gather"}
        return self.rule.activation_of(ops) if self.rule is not None and ops else (None, "")


@dataclasses.dataclass(frozen=True)
class ProductChoice:
    """What a policy decided for one product of two activations: the first rule that names it; and why it stays float, if it does."""

    product: Product
    rule: Rule
    reason: str

    @property
    def operands(self) -> tuple[ActSpec, ActSpec] | None:
        """What its operands become; None if it stays float."""
        return None if self.reason else self.rule.operands

    @property
    def rotation(self) -> OnlineRotation | None:
        """By what both are rotated before they are rounded."""
        return self.rule.method.rotation if isinstance(self.rule.method, RotatesInputs) else None


@dataclasses.dataclass(frozen=True)
class CacheChoice:
    """What a policy decided for one cache that a rule names."""

    leaf: InputLeaf
    rule: Rule

    @property
    def spec(self) -> CacheSpec | None:
        """What it becomes; None leaves it float."""
        return None if self.rule.cache is None or self.rule.cache.spec is None else self.rule.cache


@dataclasses.dataclass(frozen=True, init=False)
class Policy:
    """An ordered list of rules; for each parameter the first one that matches counts.

    Only parameters that meet data in a matmul, a convolution or a lookup are ever touched: norms and biases stay float. So
    does a parameter that no rule matches. A product of two activations is touched only by a rule that names it, with a colon in its
    pattern.

    Args:
      rules: a sequence of `Rule`.

    Raises:
      TypeError: `rules` holds something else than rules.
      ValueError: `rules` is empty.

    Example:
      >>> import qjax
      >>> Policy([Rule("*embed*", weight=None), Rule("*", weight=qjax.int8())])
      Policy([Rule('*embed*', weight=None), Rule('*', weight=int8(per="channel"))])
    """

    rules: tuple[Rule, ...]

    def __init__(self, rules: Any):
        if isinstance(rules, Rule):
            raise TypeError(f"`rules` must be a sequence, got one rule: write Policy([{rules!r}])")
        rules = tuple(rules)
        for rule in rules:
            if not isinstance(rule, Rule):
                raise TypeError(f"`rules` must hold qjax.Rule values, got {rule!r}")
        if not rules:
            raise ValueError("`rules` is empty: a policy needs at least one rule, such as Rule('*', weight=qjax.int8())")
        object.__setattr__(self, "rules", rules)

    def __repr__(self) -> str:
        return f"Policy({list(self.rules)!r})"

    def resolve(self, program: Program) -> tuple[Choice, ...]:
        """Decides for every parameter of a program.

        Args:
          program: from `qjax.trace`.

        Returns:
          One `Choice` a parameter, in tree order.

        Raises:
          ValueError: a rule's pattern matches no parameter, or only parameters without a site.
        """
        rules = tuple(rule for rule in self.rules if not rule.is_product and not rule.is_cache)
        for rule in rules:
            _check_matches(rule, program)
        _check_reached(rules, [leaf.path for leaf in program.leaves if is_candidate(leaf)])
        return tuple(_choose(leaf, rules) for leaf in program.leaves)

    def resolve_products(self, program: Program) -> tuple[ProductChoice, ...]:
        """Decides for every product of two activations that a rule names.

        Args:
          program: from `qjax.trace`.

        Returns:
          One `ProductChoice` a named product, in data-flow order.

        Raises:
          ValueError: a rule's pattern matches no product, or only those that cannot be computed from codes.
        """
        rules = tuple(rule for rule in self.rules if rule.is_product)
        for rule in rules:
            _check_products(rule, program)
        _check_reached(rules, [product.name for product in program.products if not product.refusal])
        named = [(p, next((r for r in rules if r.matches(p.name)), None)) for p in program.products]
        return tuple(_choose_product(product, rule) for product, rule in named if rule is not None)

    def resolve_caches(self, program: Program) -> tuple[CacheChoice, ...]:
        """Decides for every cache that a rule names.

        Args:
          program: from `qjax.trace`, of a function that takes a cache and gives it back.

        Returns:
          One `CacheChoice` a named cache, in the order of the program's inputs.

        Raises:
          ValueError: there is no rule with a `cache`; a rule's pattern matches no input, or only inputs that are no caches.
        """
        rules = tuple(rule for rule in self.rules if rule.is_cache)
        if not rules:
            raise ValueError("`policy` has no rule with a `cache`: add one such as qjax.Rule('*', cache=qjax.kv_cache(qjax.int8()))")
        for rule in rules:
            _check_named_caches(rule, program)
        _check_reached(rules, [leaf.path for leaf in program.caches])
        named = [(leaf, next((r for r in rules if r.matches(leaf.path)), None)) for leaf in program.caches]
        return tuple(CacheChoice(leaf, rule) for leaf, rule in named if rule is not None)


def check_policy(policy: Any) -> None:
    """Refuses what is no `Policy`.

    Raises:
      TypeError: naming the argument and what to write.
    """
    if not isinstance(policy, Policy):
        raise TypeError(f"`policy` must be a qjax.Policy, got {type(policy).__name__}: write qjax.Policy([qjax.Rule(...)])")


def check_module(model: Any, kind: type, named: str, other: str) -> None:
    """Refuses what stands in a module's place, in front of a policy: a module of the other kind, a method, the policy.

    Args:
      model: what was given.
      kind: the class of modules that is meant.
      named: what an error calls it.
      other: what an error says of the other kind of modules.

    Raises:
      TypeError: naming the argument and what to write.
    """
    if isinstance(model, kind):
        return
    hint = f"for {other}"
    if isinstance(getattr(model, "__self__", None), kind):
        hint = "give the module itself, not a method of it"
    elif isinstance(model, Policy):
        hint = "the module stands in front of the policy"
    raise TypeError(f"`model` must be a {named}, got {type(model).__name__}; {hint}")


def check_not_learned(policy: Policy) -> None:
    """Refuses a policy with ranges that only training finds, where weights are rounded after training.

    Raises:
      ValueError: naming the rule and the remedy.
    """
    for rule in policy.rules:
        reason = "" if rule.train is None else rule.train.only_trains
        if reason:
            raise ValueError(
                f"rule {rule.pattern!r} has `train` {rule.train!r}, and {reason}: train with qjax.fake_quant and pack with qjax.convert, "
                "or leave `train` out to round"
            )


def _choose(leaf: Leaf, rules: tuple[Rule, ...]) -> Choice:
    if not is_candidate(leaf):
        return Choice(leaf, None, no_site_reason(leaf))
    rule = next((r for r in rules if r.matches(leaf.path)), None)
    if rule is None:
        return Choice(leaf, None, "no rule matches its path")
    if rule.weight is None:
        return Choice(leaf, rule, f"rule {rule.pattern!r} leaves it float")
    return Choice(leaf, rule, "")


def _choose_product(product: Product, rule: Rule) -> ProductChoice:
    left = f"rule {rule.pattern!r} leaves it float" if rule.activation is None else ""
    return ProductChoice(product, rule, left or product.refusal)


def is_candidate(leaf: Leaf) -> bool:
    """Whether a parameter can be quantized: it is floating and meets data at a site."""
    return bool(leaf.sites) and jnp.issubdtype(leaf.dtype, jnp.floating)


def no_site_reason(leaf: Leaf) -> str:
    """Says why a parameter is no candidate."""
    if leaf.sites:
        return f"it is {leaf.dtype}, not floating"
    if not leaf.consumers:
        return "the function never uses it"
    return f"it meets no data in a matmul, convolution or lookup, only {', '.join(leaf.consumers)}"


def _check_matches(rule: Rule, program: Program) -> None:
    matched = [leaf for leaf in program.leaves if rule.matches(leaf.path)]
    if not matched:
        paths = [leaf.path for leaf in program.leaves if is_candidate(leaf)]
        words = rule.pattern.strip("*")
        parts = sorted({part for path in paths for part in (path, *path.split("/"))})
        close = difflib.get_close_matches(words, parts, n=1, cutoff=0.5)
        likely = _like(rule.pattern, close[0]) if close else ""
        likely = f"*{likely}" if likely == rule.pattern else likely  # the last part of a path, for all of it
        meant = f"did you mean {likely!r}?" if close else ""
        hint = meant or f"what can be quantized is {', '.join(paths[:3]) or 'nothing'}"
        raise ValueError(f"rule `pattern` {rule.pattern!r} matches no parameter of the program; {hint}")
    if not any(map(is_candidate, matched)):
        leaf = next((leaf for leaf in matched if leaf.sites), matched[0])
        raise ValueError(
            f"rule `pattern` {rule.pattern!r} matches only parameters that cannot be quantized, such as {leaf.path!r}: "
            f"{no_site_reason(leaf)}; remove the rule or widen its pattern (these stay float in any case)"
        )


def _check_products(rule: Rule, program: Program) -> None:
    matched = [product for product in program.products if rule.matches(product.name)]
    if not matched:
        raise ValueError(f"rule `pattern` {rule.pattern!r} names {no_product(rule.pattern, program)}")
    if all(product.refusal for product in matched):
        product = matched[0]
        raise ValueError(
            f"rule `pattern` {rule.pattern!r} matches only products that cannot multiply integers, such as {product.name!r}: "
            f"{product.refusal}; remove the rule or widen its pattern (these stay float in any case)"
        )


def _check_named_caches(rule: Rule, program: Program) -> None:
    matched = [leaf for leaf in program.inputs if rule.matches(leaf.path)]
    if any(not leaf.refusal for leaf in matched):
        return
    names = ", ".join(repr(leaf.path) for leaf in program.caches[:4]) or "none"
    if not matched:
        raise ValueError(f"rule `pattern` {rule.pattern!r} with a `cache` matches no input of the program; its caches are {names}")
    leaf = max(matched, key=lambda leaf: len(leaf.shape))  # a position or a token is matched by "*", too
    what = f"rule `pattern` {rule.pattern!r} with a `cache` matches no cache"
    raise ValueError(f"{what} but {leaf.path!r}: {leaf.refusal}; the program's caches are {names}")


def no_product(pattern: str, program: Program) -> str:
    """Says that a program has no product of a name or pattern, and what it may have meant."""
    names = [product.name for product in program.products]
    near = difflib.get_close_matches(pattern.replace("*", ""), names, n=3, cutoff=0.4)
    scopes = sorted({part for name in names for part in name.split(":")[0].split("/") if part})
    words = [word for word in pattern.split(":")[0].replace("*", "/").split("/") if word]
    near += [p for word in words for scope in difflib.get_close_matches(word, scopes, n=1) for p in names if scope in p.split(":")[0]]
    shown = [name for name in names if name in near or not near][:3]
    hint = f"did you mean {' or '.join(map(repr, shown))}?" if near else f"it has {', '.join(map(repr, shown)) or 'none'}"
    return f"no product of two activations of the program; {hint} (qjax.trace(fn, params, ...).products lists them)"


def _check_reached(rules: tuple[Rule, ...], paths: Sequence[str]) -> None:
    for i, rule in enumerate(rules):
        winners = [next(j for j, first in enumerate(rules) if first.matches(path)) for path in paths if rule.matches(path)]
        if i not in winners:
            raise ValueError(
                f"rule `pattern` {rule.pattern!r} is never reached: {rules[winners[0]].pattern!r} stands before it and matches "
                "all that it matches; put the narrower rule first, or remove it"
            )


def _like(pattern: str, word: str) -> str:
    return ("*" if pattern.startswith("*") else "") + word + ("*" if pattern.endswith("*") else "")
