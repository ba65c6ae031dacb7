"""Batch-norm folds on the parameters of the function that is trained."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax

from qjax.graph import BatchNormFolds
from qjax.program import Program


@dataclasses.dataclass(frozen=True)
class Folding:
    """Which weights of a program are rounded folded.

    Attributes:
      folds: from `qjax.batch_norm_folds`.
      weights: their paths, by the parameter's index.
      where: by each parameter's index in `folds`, its index here.
    """

    folds: BatchNormFolds
    weights: Mapping[int, str]
    where: Mapping[int, int]

    def factors(self, leaves: Any) -> dict[int, jax.Array]:
        """By what each weight is multiplied before it is rounded, from flat parameters."""
        mine = self.folds.arranged(leaves, self.where)
        return {i: self.folds.factor(self.folds.by_path[path], mine) for i, path in self.weights.items()}

    def moved(self, leaves: Any) -> dict[int, Any]:
        """The parameters of batch norms, and biases, that a folded network has others of."""
        mine = self.folds.arranged(leaves, self.where)
        new = self.folds.moved(list(self.weights.values()), mine)
        return {self.where[i]: w for i, w in enumerate(new) if w is not mine[i]}

    def reads(self, index: int) -> list[str]:
        """Paths of what the batch norm of a weight reads."""
        fold, leaves = self.folds.by_path[self.weights[index]], self.folds.system.program.leaves
        return [leaves[i].path for i in sorted(fold.reads - {fold.weight})]

    def note(self, index: int) -> str:
        """What a report says of a weight."""
        at = self.folds.by_path[self.weights[index]].places
        paths = [leaf.path for leaf in self.folds.system.program.leaves]
        return f"folded: {paths[at.scale]} multiplies by one, the shift is in {paths[at.shifts[0]]}"


def folding(folds: BatchNormFolds, program: Program, weights: Mapping[int, Any]) -> Folding:
    """Finds the folds of the weights that are rounded.

    Args:
      folds: from `qjax.batch_norm_folds`.
      program: the program that is trained.
      weights: by the parameter's index what is rounded.

    Returns:
      A `Folding`.

    Raises:
      ValueError: of no weight that is rounded; a parameter that they read is missing, or of another shape.
    """
    paths = [leaf.path for leaf in program.leaves]
    mine = {i: paths[i] for i in weights if paths[i] in folds.by_path}
    if not mine:
        raise ValueError(f"`folds` are of {', '.join(folds.by_path)}, and the policy rounds none of them: give one of them a rule, or "
                         "leave `folds` out")  # fmt: skip
    return Folding(folds, mine, folds.aligned(paths, [leaf.shape for leaf in program.leaves], list(mine.values())))
