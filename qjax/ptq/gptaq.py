"""GPTAQ: GPTQ that also makes up for what the quantized model's activations lack of the float model's."""

from __future__ import annotations

from qjax.core.specs import is_number
from qjax.ptq.gptq import ALPHA, GPTQ
from qjax.ptq.gptq_solver import GPTQOptions


def gptaq(
    alpha: float = ALPHA,
    damping: float = 0.01,
    act_order: bool = False,
    static_groups: bool = False,
    block_size: int = 128,
    mse: bool = True,
    group_aware: bool = False,
    refine: int = 0,
) -> GPTQ:
    """GPTAQ: GPTQ against the output on the float model's activations, with those of the quantized model as inputs.

    GPTQ minimises |X w - X w_hat|^2 on the activations X behind the quantized sites; GPTAQ |X_float w - X w_hat|^2. With
    D = 2/n (X_float - X)^T X and H = 2/n X^T X the sweep starts from  w + alpha w triu(D U^T, 1) U,  H^-1 = U^T U,  so that the columns
    still to come make up for what each column's input lacks, too (see `gptq_solver.solve`).

    Every calibration batch goes through the float program beside the quantized one: twice the time of the forward passes and twice
    the live values, and one more K x K matrix of statistics a site. A site in a loop that stays whole has no float rows beside
    its own: it is solved like `gptq`, and the report says so.

    Args:
      alpha: share of the correction, greater than 0; 1 is the paper's. More follows the calibration data closer.
      damping: see `qjax.gptq`, as the other arguments.
      act_order: likewise.
      static_groups: likewise.
      block_size: likewise: it moves the scales of groups that are smaller than a block.
      mse: likewise.
      group_aware: likewise.
      refine: likewise.

    Returns:
      A method for `qjax.Rule`. Needs calibration data.

    Raises:
      ValueError, TypeError: an option out of range or of another type; both orders at once.

    Example:
      >>> import qjax
      >>> qjax.Rule("*", weight=qjax.int3(group_size=128), method=qjax.gptaq(act_order=True)).method.name
      'gptaq(act_order)'

    Source: Li et al., GPTAQ (arXiv 2504.02692), and the authors' code (GPTQv2), whose default alpha this is. See
    `gptq_solver.corrected` for where we differ.
    """
    if not (is_number(alpha) and alpha > 0):
        raise ValueError(f"`alpha` must be greater than 0, got {alpha!r}: without the correction it is qjax.gptq()")
    return GPTQ(GPTQOptions(damping, act_order, static_groups, block_size, mse, group_aware=group_aware, refine=refine, alpha=alpha))
