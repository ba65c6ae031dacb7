"""What a policy means for the training of one program: which weights, sites and products are rounded, and by which estimators."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from qjax.calibration import why_no_rows, why_not_observed
from qjax.core import ActSpec, OnlineRotation, Spec
from qjax.graph import BatchNormFolds
from qjax.policy import CacheChoice, Choice, Policy, ProductChoice, RotatesInputs, Rule
from qjax.program import Key, Leaf, Program, Site
from qjax.ptq.groups import check_groups
from qjax.ptq.method import Problem, methods_of
from qjax.training.folding import Folding, folding
from qjax.training.qat import QAT, training_of
from qjax.training.side_state import watched


@dataclasses.dataclass(frozen=True)
class Trained:
    """A parameter whose weights are rounded.

    Attributes:
      leaf: it.
      spec: what its weights become.
      act: what the activations that it meets become; None: they stay float.
      train: how both train.
      rotation: by what the packed weight's products will rotate their input.
      notes: remarks for a report.
    """

    leaf: Leaf
    spec: Spec
    act: ActSpec | None
    train: QAT
    rotation: OnlineRotation | None
    notes: tuple[str, ...] = ()

    @property
    def sites(self) -> list[Site]:
        """The sites at which something is done beside the weight."""
        return watched(self.leaf) if self.act is not None or self.train.gradient is not None else []

    @property
    def axes(self) -> tuple[int, ...]:
        """The contracted axes, negative."""
        return tuple(a - len(self.leaf.shape) for a in self.leaf.sites[0].contracted)

    def problem(self, w: Any) -> Problem:
        """The weight as estimators take it."""
        site, ndim = self.leaf.sites[0], len(self.leaf.shape)
        return Problem(w, self.spec, self.axes, tuple(a - ndim for a in site.stacked), site.groups, self.leaf.path)


@dataclasses.dataclass(frozen=True)
class Planned:
    """What is rounded in a program.

    Attributes:
      program: it.
      weights: by the parameter's index.
      products: the products of two activations that are rounded.
      choices: all that the policy decided for parameters.
      policy: it.
      caches: the caches that are rounded where they are read.
      folding: the weights that are rounded with the batch norm behind them folded.
    """

    program: Program
    weights: Mapping[int, Trained]
    products: tuple[ProductChoice, ...]
    choices: tuple[Choice, ...]
    policy: Policy
    caches: tuple[CacheChoice, ...] = ()
    folding: Folding | None = None

    @property
    def steps(self) -> bool:
        """Whether anything depends on the step or on chance."""
        return any(t.train.steps for t in self.weights.values()) or any(training_of(p.rule).steps for p in self.products)

    @property
    def site_of(self) -> dict[Key, Trained]:
        """What is done at which site."""
        return {site.key: trained for trained in self.weights.values() for site in trained.sites}

    def factors(self, leaves: Any) -> dict[int, jax.Array]:
        """By the parameter's index what folded weights are multiplied by, from flat parameters."""
        return {} if self.folding is None else self.folding.factors(leaves)


def planned(program: Program, policy: Policy, folds: BatchNormFolds | None = None) -> Planned:
    """Resolves a policy for training.

    Raises:
      TypeError: a rule's weights are integers.
      ValueError: as `Policy.resolve` and `folding`; a site whose activations cannot be rounded, or not with a range of their own.
    """
    choices = policy.resolve(program)
    for leaf in program.leaves:
        _check_floating(leaf, policy)
    weights = {}
    check_groups([choice for choice in choices if choice.spec is not None])
    for choice in choices:
        if choice.spec is not None:
            train = training_of(choice.rule)
            weights[choice.leaf.index] = Trained(
                choice.leaf, choice.spec, choice.activation, train, rotation_of(choice), _notes(choice)
            )
    for trained in weights.values():
        for site in trained.sites:
            _check_site(site, trained)
    products = tuple(p for p in policy.resolve_products(program) if p.operands is not None)
    for choice in products:
        reason = why_not_observed(choice.product)
        if any(act.static for act in choice.operands or ()) and reason:
            raise ValueError(f"the static ranges of {choice.product.name!r} cannot be found: {reason}; make them qjax.dynamic(...)")
    # A program that takes no cache trains without: rules for caches count where one is.
    named = policy.resolve_caches(program) if program.caches and any(rule.is_cache for rule in policy.rules) else ()
    folded = None if folds is None else folding(folds, program, weights)
    return Planned(program, weights, products, choices, policy, tuple(named), folded)


def _check_floating(leaf: Leaf, policy: Policy) -> None:
    """Refuses whole numbers that are multiplied where a rule would train them; a table of them that is looked up may stay."""
    if jnp.issubdtype(leaf.dtype, jnp.floating) or not any(site.op != "gather" for site in leaf.sites):
        return
    rules = (rule for rule in policy.rules if not rule.is_product and not rule.is_cache)
    rule = next((rule for rule in rules if rule.matches(leaf.path)), None)
    if rule is not None and rule.weight is not None:
        raise TypeError(f"`params` leaf {leaf.path!r} is {leaf.dtype}, and rule {rule.pattern!r} names it to be trained: integers have no "
                        "gradient; give the float parameters, or narrow the rule's pattern to others")  # fmt: skip


def _check_site(site: Site, trained: Trained) -> None:
    if site.sharded:
        what = "`activation`" if trained.act is not None else "`gradient`"
        raise ValueError(f"{what} of {site.path!r} stands inside a shard_map: apply fake_quant inside of it")
    if trained.act is not None and trained.act.static:
        reason = why_no_rows(site, trained.leaf) or ("its input is rotated on line" if trained.rotation is not None else "")
        if reason:
            raise ValueError(f"the static activations of {site.path!r} cannot be observed: {reason}; make them qjax.dynamic(...)")


def rotation_of(choice: Choice) -> OnlineRotation | None:
    """By what the packed weight's products will rotate their input."""
    return None if choice.rule is None or choice.spec is None else rotation_by(choice.rule)


def rotation_by(rule: Rule) -> OnlineRotation | None:
    """The on-line rotation of a rule's method."""
    return next((each.rotation for each in methods_of(rule.method) if isinstance(each, RotatesInputs)), None)


def _notes(choice: Choice) -> tuple[str, ...]:
    """What the rule would have done, and training does not."""
    others = [each.name for each in methods_of(choice.rule.method if choice.rule is not None else None)]
    others = [name for name in others if name != "rtn" and not name.startswith("online_rotation")]
    notes = (f"trained by rounding, not {', '.join(others)}",) if others else ()
    if choice.rule is not None and choice.rule.activation is not None and not watched(choice.leaf):
        notes += (f"the activation {choice.rule.activation} of its rule has nothing to round: it is only looked up",)
    return notes
