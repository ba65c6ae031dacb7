"""Groups that do not divide the weights they are to cut, and padding that costs more than it saves."""

from __future__ import annotations

import math
from collections.abc import Sequence

from qjax.calibration import columns
from qjax.core import CastSpec, PerBlock, PerGroup, Spec
from qjax.core.layout import fixed_blocks, group_length, padded_size
from qjax.policy import Choice, Rule
from qjax.program import Leaf

SMALL = 4  # a group of fewer weights than this is no remedy


def check_groups(choices: Sequence[Choice]) -> None:
    """Refuses groups that do not divide, all of them at once, with a size that fits every parameter of the rule.

    Args:
      choices: those with a spec.

    Raises:
      ValueError: naming the group, the parameters and the remedy.
    """
    for rule in dict.fromkeys(choice.rule for choice in choices):
        mine = [choice for choice in choices if choice.rule == rule]
        if rule is not None and (problem := undivided(rule, mine)):
            raise ValueError(problem)


def undivided(rule: Rule, choices: Sequence[Choice], among: Sequence[Choice] = ()) -> str:
    """Says which parameters of a rule its group does not divide, and what would fit them all; "" if it divides.

    Args:
      rule: the rule.
      choices: the parameters that are looked at.
      among: all parameters of the rule, which the size that is named has to fit; empty: `choices`.

    Returns:
      One sentence, or "".

    Example:
      >>> import jax.numpy as jnp, qjax
      >>> rule = qjax.Rule("*", weight=qjax.int4(group_size=8))
      >>> program = qjax.trace(lambda p, x: (x @ p["a"]) @ p["b"], {"a": jnp.ones((12, 6)), "b": jnp.ones((6, 4))}, jnp.ones((2, 12)))
      >>> undivided(rule, qjax.Policy([rule]).resolve(program)).split(":")[1]
      ' take 6, the nearest size that divides those of all parameters of the rule, or pad=True, which pads them to whole groups'
    """
    spec = rule.weight
    if spec is None or isinstance(spec, CastSpec) or spec.pad or not isinstance(spec.granularity, (PerGroup, PerBlock)):
        return ""
    lengths = {choice.leaf.path: columns(choice.leaf.sites[0], choice.leaf) for choice in choices}
    bad = {path: k for path, k in lengths.items() if padded_size(k, spec) != k}
    if not bad:
        return ""
    size = group_length(0, spec)
    argument = "`block[1]`" if isinstance(spec.granularity, PerBlock) else "`group_size`"
    (path, k), *others = bad.items()
    also = f", nor those of {len(others)} more of {', '.join(map(str, sorted({n for _, n in others})))}" if others else ""
    if fixed_blocks(spec):
        return (f"the blocks of {spec}, {size} values, do not divide the {k} contracted values of `{path}`{also}: give pad=True, which "
                "pads them to whole blocks, or take another spec")  # fmt: skip
    every = {choice.leaf.path: columns(choice.leaf.sites[0], choice.leaf) for choice in among or choices}
    whole = math.gcd(*every.values())
    fits = min((d for d in range(1, whole + 1) if whole % d == 0), key=lambda d: (abs(d - size), -d))
    what = "the nearest size that divides those of all parameters of the rule" if len(every) > 1 else "the nearest size that does"
    take = f"take {fits}, {what},"
    if fits < min(size, SMALL):  # which would store more scales than codes
        found = f"none but {fits} divides all" if fits > 1 else "no size divides all"
        take = f'take per="channel", or give them rules of their own, for {found},'
    pads = f"to {padded_size(k, spec)}" if not others else "to whole groups"
    return f"{argument}={size} does not divide the {k} contracted values of `{path}`{also}: {take} or pad=True, which pads them {pads}"


def padding_note(leaf: Leaf, spec: Spec, nbytes: int) -> tuple[str, ...]:
    """A remark where a packed parameter is not smaller than the float one, with the share that padding has in it."""
    before = math.prod(leaf.shape) * leaf.dtype.itemsize
    if nbytes < before or isinstance(spec, CastSpec):
        return ()
    k = columns(leaf.sites[0], leaf)
    padded = padded_size(k, spec)
    why = f", for its {k} contracted values are padded to {padded}" if padded > k else ""
    return (f"packed it takes {nbytes} bytes, no fewer than the {before} before{why}",)
