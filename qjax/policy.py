"""Policy: ordered rules that say which parameters are quantized, and how."""

from __future__ import annotations

import dataclasses
import difflib
import fnmatch
from collections.abc import Collection
from typing import Any, Protocol, runtime_checkable

import jax.numpy as jnp

from qjax.core import ActSpec, CastSpec, CodebookSpec, IntSpec, Spec
from qjax.program import Leaf, Program
from qjax.program.trace import path_str as path_str


@runtime_checkable
class Method(Protocol):
    """What a rule's `method` must be: see `qjax.ptq` for the interface that the methods implement."""

    @property
    def name(self) -> str: ...

    @property
    def observer(self) -> Any: ...

    def quantize(self, problem: Any, state: Any) -> Any: ...


@runtime_checkable
class ChoosesActivation(Protocol):
    """A method that decides what becomes of the activations, too."""

    def activation(self, given: ActSpec | None, ops: Collection[str] = ()) -> tuple[ActSpec, str]:
        """Returns the spec, given the rule's and the primitives of the parameter's sites, and a remark or "".

        Raises:
          ValueError: it does not go with the one given.
        """
        ...


@dataclasses.dataclass(frozen=True)
class Rule:
    """How the parameters whose path matches a pattern are quantized.

    Args:
      pattern: a glob over parameter paths; `*` crosses `/`. A leading `params/` and a trailing `/value` are not part of a path.
      weight: what the weights become, or None to leave them float.
      method: how they get there; None rounds to nearest.
      activation: what becomes of the activations that meet the weights, `qjax.dynamic(...)` or `qjax.static(...)`: with it the
        product runs on integers. None leaves them float.

    Raises:
      TypeError: an argument of the wrong kind.

    Example:
      >>> import qjax
      >>> Rule("*mlp*", weight=qjax.int4(group_size=128))
      Rule('*mlp*', weight=int4(group_size=128))
    """

    pattern: str
    weight: Spec | None = None
    method: Method | None = None
    activation: ActSpec | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.pattern, str) or not self.pattern:
            raise TypeError(f"`pattern` must be a non-empty string such as '*mlp*', got {self.pattern!r}")
        if self.weight is not None and not isinstance(self.weight, (IntSpec, CodebookSpec, CastSpec)):
            raise TypeError(f"`weight` must be a spec such as qjax.int4(group_size=128) or None, got {self.weight!r}")
        if self.method is not None and (not isinstance(self.method, Method) or isinstance(self.method, type)):
            hint = "; a spec goes to `weight`" if isinstance(self.method, (IntSpec, CodebookSpec, CastSpec)) else ""
            raise TypeError(f"`method` must be a method such as qjax.gptq(), got {self.method!r}{hint}")
        if self.weight is None and self.method is not None:
            raise TypeError(f"`method` {self.method.name} has nothing to do in rule {self.pattern!r}: give it a `weight` spec")

        if self.activation is not None and not isinstance(self.activation, ActSpec):
            raise TypeError(f"`activation` must be qjax.dynamic(...), qjax.static(...) or None, got {self.activation!r}")
        activation = self.activation_of()[0]
        if activation is not None and not isinstance(self.weight, IntSpec):
            what = f"`activation` {activation} of rule {self.pattern!r}"
            raise TypeError(f"{what} needs a `weight` spec of integers such as qjax.int8(), got {self.weight}")

    def activation_of(self, ops: Collection[str] = ()) -> tuple[ActSpec | None, str]:
        """What becomes of activations that meet the weight in these primitives, and a remark: what the method makes of `activation`."""
        if isinstance(self.method, ChoosesActivation):
            return self.method.activation(self.activation, ops)
        return self.activation, ""

    def matches(self, path: str) -> bool:
        return fnmatch.fnmatchcase(path, self.pattern)

    def __repr__(self) -> str:
        method = f", method={self.method!r}" if self.method is not None else ""
        activation = f", activation={self.activation}" if self.activation is not None else ""
        return f"Rule({self.pattern!r}, weight={self.weight}{method}{activation})"


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


@dataclasses.dataclass(frozen=True, init=False)
class Policy:
    """An ordered list of rules; for each parameter the first one that matches counts.

    Only parameters that meet data in a matmul, a convolution or a lookup are ever touched: norms and biases stay float. So
    does a parameter that no rule matches.

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
        for rule in self.rules:
            _check_matches(rule, program)
        _check_reached(self.rules, program)
        return tuple(_choose(leaf, self.rules) for leaf in program.leaves)


def check_policy(policy: Any) -> None:
    """Refuses what is no `Policy`.

    Raises:
      TypeError: naming the argument and what to write.
    """
    if not isinstance(policy, Policy):
        raise TypeError(f"`policy` must be a qjax.Policy, got {type(policy).__name__}: write qjax.Policy([qjax.Rule(...)])")


def check_weights_only(policy: Policy) -> None:
    """Refuses what is no `Policy`, and a policy that rounds activations, where only weights can be.

    Raises:
      TypeError: as `check_policy`.
      ValueError: naming the rule and the remedy.
    """
    check_policy(policy)
    for rule in policy.rules:
        activation = rule.activation_of()[0]
        if activation is not None:
            raise ValueError(
                f"rule {rule.pattern!r} has `activation` {activation}, and a module trains with rounded weights only so far: "
                "apply qjax.fake_quant to its function"
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
        meant = f"did you mean {_like(rule.pattern, close[0])!r}?" if close else ""
        hint = meant or f"what can be quantized is {', '.join(paths[:3]) or 'nothing'}"
        raise ValueError(f"rule `pattern` {rule.pattern!r} matches no parameter of the program; {hint}")
    if not any(map(is_candidate, matched)):
        leaf = next((leaf for leaf in matched if leaf.sites), matched[0])
        raise ValueError(
            f"rule `pattern` {rule.pattern!r} matches only parameters that cannot be quantized, such as {leaf.path!r}: "
            f"{no_site_reason(leaf)}; remove the rule or widen its pattern (these stay float in any case)"
        )


def _check_reached(rules: tuple[Rule, ...], program: Program) -> None:
    paths = [leaf.path for leaf in program.leaves if is_candidate(leaf)]
    for i, rule in enumerate(rules):
        winners = [next(j for j, first in enumerate(rules) if first.matches(path)) for path in paths if rule.matches(path)]
        if i not in winners:
            raise ValueError(
                f"rule `pattern` {rule.pattern!r} is never reached: {rules[winners[0]].pattern!r} stands before it and matches "
                "all that it matches; put the narrower rule first, or remove it"
            )


def _like(pattern: str, word: str) -> str:
    return ("*" if pattern.startswith("*") else "") + word + ("*" if pattern.endswith("*") else "")
