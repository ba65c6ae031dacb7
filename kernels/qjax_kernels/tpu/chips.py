"""What a TPU generation has, as constants: nothing here asks a device."""

import dataclasses
from typing import Literal

Placement = Literal["before", "after"]


@dataclasses.dataclass(frozen=True)
class Chip:
    """One TensorCore of a generation.

    Attributes:
      name: "v5e", "v5p", "v6e" or "tpu7x".
      topology: the smallest slice, as `jax.experimental.topologies` names it.
      clock: bundles a second.
      bandwidth: bytes a second from HBM to this core.
      macs: bfloat16 multiply-adds a bundle, all matrix units together.
      vmem: bytes of vector memory.
      cores: TensorCores a chip, which share its `parallel` grid axes.
      int8: whether int8 products are faster than bfloat16 ones.
      fp8: whether the matrix unit multiplies e4m3 codes.
      bfloat16: whether the vector unit multiplies bfloat16; float32 elsewhere, at twice the registers.
      placement: where the scale of a group belongs: on the weight before the dot, or on the result of the group's dot.
    """

    name: str
    topology: str
    clock: float
    bandwidth: float
    macs: int
    vmem: int
    cores: int
    int8: bool
    fp8: bool
    bfloat16: bool
    placement: Placement


_MIB = 2**20
CHIPS = {
    chip.name: chip
    for chip in (
        Chip("v5e", "v5e:2x2", 1.5e9, 8.2e11, 4 * 128 * 128, 128 * _MIB, 1, True, False, False, "after"),
        Chip("v5p", "v5p:2x2x1", 1.75e9, 1.23e12, 4 * 128 * 128, 64 * _MIB, 2, True, False, False, "after"),
        Chip("v6e", "v6e:2x2", 1.755e9, 1.64e12, 4 * 256 * 256, 128 * _MIB, 1, True, False, True, "before"),
        Chip("tpu7x", "tpu7x:2x2x1", 2.2e9, 3.7e12, 4 * 256 * 256, 64 * _MIB, 2, False, True, True, "before"),
    )
}
"""Rates as `pltpu.get_tpu_info_for_chip` has them (jax 0.12), a core; the clock is the bfloat16 rate over twice `macs`."""


def chip_of(name: str) -> Chip:
    """Returns the constants of a generation.

    Raises:
      ValueError: unknown generation.

    Example:
      >>> chip_of("v6e").placement, chip_of("v5e").placement
      ('before', 'after')
    """
    if name not in CHIPS:
        raise ValueError(f"`chip` must be one of {', '.join(CHIPS)}, got {name!r}")
    return CHIPS[name]


def why_not_chip(platform: str, name: str) -> str:
    """Returns why no kernel of this package runs there, or nothing.

    Example:
      >>> why_not_chip("tpu", "v4")
      "no TPU kernel is tuned for the generation 'v4': v5e, v5p, v6e, tpu7x"
    """
    if platform != "tpu":
        return f"a TPU kernel, and the program is for {platform}"
    return "" if name in CHIPS else f"no TPU kernel is tuned for the generation {name!r}: {', '.join(CHIPS)}"
