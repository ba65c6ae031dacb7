"""`lora`: what adapter a rule's parameters train, in place of themselves."""

from __future__ import annotations

import dataclasses
import math
from typing import Literal

from qjax.core import ActSpec, Spec
from qjax.core.specs import as_count, check_choice, check_flag, check_number

Init = Literal["kaiming", "gaussian"]


@dataclasses.dataclass(frozen=True)
class Lora:
    """See `lora`."""

    rank: int = 16
    alpha: float | None = None
    dropout: float = 0.0
    rank_stabilized: bool = False
    dora: bool = False
    init: Init = "kaiming"

    def __post_init__(self) -> None:
        object.__setattr__(self, "rank", as_count("rank", self.rank, 1))
        if self.alpha is not None:
            check_number("alpha", self.alpha, positive=True)
        check_number("dropout", self.dropout, below=1)
        for name in ("rank_stabilized", "dora"):
            check_flag(name, getattr(self, name))
        check_choice("init", self.init, ("kaiming", "gaussian"))

    @property
    def scaling(self) -> float:
        """What multiplies B A: alpha / r, or alpha / sqrt(r)."""
        alpha = self.rank if self.alpha is None else self.alpha
        return alpha / (math.sqrt(self.rank) if self.rank_stabilized else self.rank)

    @property
    def only_trains(self) -> str:
        return ""  # the base is rounded as without it

    @property
    def beside(self) -> bool:
        """That it may train beside a parameter that stays float."""
        return True

    def check(self, weight: Spec | None, activations: tuple[ActSpec, ...]) -> None:
        del weight, activations  # it goes with all of them


def lora(
    rank: int = 16,
    alpha: float | None = None,
    *,
    dropout: float = 0.0,
    rank_stabilized: bool = False,
    dora: bool = False,
    init: Init = "kaiming",
) -> Lora:
    """Low-rank adapters for `Rule(train=...)`: the parameter is frozen, packed or float, and two thin matrices train beside it.

        LoRA:  W' = W + s B A                       with A (r, K), B (N, r), s = alpha / r; rank-stabilized: s = alpha / sqrt(r)
        DoRA:  W' = m (W + s B A) / |W + s B A|     with m (N,), norms over the K inputs of each output, without a gradient of theirs

    y = x W^T + s drop(x) A^T B^T, so neither B A nor W in float is ever kept. B begins with zeros and m with |W|: training begins at W.

    Args:
      rank: r.
      alpha: None: r, so that s = 1 (or sqrt(r)).
      dropout: probability with which an entry of the input of A is zeroed, the rest scaled by 1 / (1 - p); only in calls with a
        `dropout_key`. A lookup has none.
      rank_stabilized: rsLoRA's s.
      dora: whether magnitudes train, too.
      init: A from U(-1/sqrt(K), 1/sqrt(K)), "kaiming", or from N(0, 1/r^2), "gaussian". A base whose packed weights have a low-rank part
        already (`qjax.loftq`, `qjax.low_rank`) gives A and B in place of that.

    Returns:
      What `Rule(train=...)` takes, for `qjax.qlora`.

    Raises:
      ValueError: naming the argument.
      TypeError: `alpha` or `dropout` is no number, `rank_stabilized` or `dora` no bool.

    Example:
      >>> import qjax
      >>> qjax.Rule("*attn*", weight=qjax.nf4(double_quant=True), train=lora(8, alpha=16)).train.scaling
      2.0

    Source: LoRA, Hu et al., arXiv 2106.09685, section 4; rsLoRA, Kalajdzievski, arXiv 2312.03732, theorem 3.2; DoRA, Liu et al., arXiv
    2402.09353, equations 5 and 11. Initial values are those of Hugging Face PEFT. Under dropout PEFT's DoRA drops the input of W, too; here
    only that of A, as in LoRA.
    """
    return Lora(rank, alpha, dropout, rank_stabilized, dora, init)
