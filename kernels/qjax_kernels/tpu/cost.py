"""What a product would cost on a TPU, from counts alone: bundles, bytes, and the longer of the two. An estimate, never a measurement.

    bundles of a step = steps + weights n k / 1024 + products m n k / macs        (`RATES`, fitted to experiments/kernels/tpu_static)
    seconds = cuts x max(bundles / clock, m n k / (macs clock), bytes of a step / bandwidth)

Bundles are no cycles: where the matrix unit waits for itself they are up to a quarter less, so a step never takes less than its products.
The float product beside it is XLA's, taken at its best: each operand is read once and the matrix unit never waits.
"""

import dataclasses
from typing import Literal

from qjax_kernels.request import Request
from qjax_kernels.tpu import tiles
from qjax_kernels.tpu.chips import chip_of

Kernel = Literal["bf16", "W4A16", "W8A16", "W8A8", "W4A8", "W8A8 fp8", "W8A16 fp8"]
_STEP = 100  # bundles of a step's addresses and waiting, which every kernel has


@dataclasses.dataclass(frozen=True)
class Rate:
    """Bundles for each 1024 weights of a tile, and for each `macs` multiply-adds."""

    weights: float
    products: float


_V5: dict[Kernel, Rate] = {
    "bf16": Rate(0.656, 0.763),
    "W4A16": Rate(0.416, 0.898),
    "W8A16": Rate(0.523, 0.87),
    "W8A8": Rate(0.241, 0.457),
    "W4A8": Rate(0.253, 0.413),
}
RATES: dict[str, dict[Kernel, Rate]] = {
    "v5e": _V5,
    "v5p": _V5,
    "v6e": {
        "bf16": Rate(0.508, 0.757),
        "W4A16": Rate(0.409, 0.827),
        "W8A16": Rate(0.417, 0.823),
        "W8A8": Rate(0.239, 0.418),
        "W4A8": Rate(0.255, 0.424),
    },
    "tpu7x": {
        "bf16": Rate(0.367, 0.471),
        "W4A16": Rate(0.264, 0.564),
        "W8A16": Rate(0.384, 0.44),
        "W8A8 fp8": Rate(0.156, 0.241),
        "W8A16 fp8": Rate(0.141, 0.527),
    },
}
"""Through the bodies of the tiles 16x1024x1024 and 256x1024x1024 (libtpu 0.0.42.1), of x in bfloat16. The tile 128x512x512, which they have
not seen, takes up to 32 % less by them than it does on tpu7x, 27 % on v6e, 20 % on v5e and v5p."""
_ROWS_KEPT = ("W8A8", "W4A8", "W8A8 fp8")  # kernels that round whole rows of x, copied once for all columns: eight bits meet eight


@dataclasses.dataclass(frozen=True)
class Estimate:
    """What one product would take on one core.

    Attributes:
      kernel: whose rates were taken.
      steps: grid steps.
      bundles: of a step.
      bytes: copied to and from HBM, all steps together.
      compute: seconds that the bundles take.
      memory: seconds that the bytes take.
      vmem: bytes of vector memory: both copies of each block, and the sums; 0 for "bf16", whose blocks are XLA's.
    """

    kernel: Kernel
    steps: int
    bundles: int
    bytes: int
    compute: float
    memory: float
    vmem: int

    @property
    def seconds(self) -> float:
        """The longer of the two: copies run beside the arithmetic."""
        return max(self.compute, self.memory)


def estimate(request: Request, kernel: Kernel | None = None) -> Estimate:
    """Returns what a product would cost. Pure: asks no device and reads no file.

    Args:
      request: the product; its chip is one of the four generations.
      kernel: whose rates to take; None takes that of the request, "bf16" the float product beside it.

    Returns:
      An `Estimate` for one core, which experts or stacked products (`parts`) multiply. Two cores that share the work halve it at best.

    Raises:
      ValueError: an unknown chip, a kernel that it has no rates for, or what `why_not` says.

    Example:
      >>> from qjax_kernels.request import Device, Weight
      >>> decode = Request(Device("tpu", "v6e"), 16, 4096, 4096, Weight("int", 4, 128))
      >>> packed, plain = estimate(decode), estimate(decode, "bf16")
      >>> packed.memory > packed.compute, 3.3 < plain.seconds / packed.seconds < 3.9
      (True, True)
    """
    chip = chip_of(request.device.chip)
    kernel = kernel or kernel_of(request)
    reason = why_not(request)
    if reason:
        raise ValueError(f"no estimate of the `request`: {reason}")
    if kernel not in RATES[chip.name]:
        raise ValueError(f"`kernel` {kernel!r} has no rates on {chip.name}: {', '.join(RATES[chip.name])}")
    m, n, k, weight = request.m, request.n, request.k, request.weight
    if kernel == "bf16":
        return _ideal(request)
    group = min(weight.group_size or k, k)
    tile = tiles.tile_of(chip, m, n, k, group)
    rows, columns, depth = tiles.cuts(m, n, k, tile)
    rate = RATES[chip.name][kernel]
    products = tile.m * tile.n * tile.k / chip.macs
    bundles = max(_STEP + rate.weights * tile.n * tile.k / 1024 + rate.products * products, products / (2 if kernel in _ROWS_KEPT else 1))
    size = 4 if request.dtype == "float32" else 2
    codes = tile.n * tile.k * int(kernel[1]) // 8
    scales = 4 * tile.n * max(1, tile.k // group)
    x, sums = tile.m * tile.k * size, tile.m * tile.n * 4
    read = m * k * size * (1 if kernel in _ROWS_KEPT else columns)
    steps = rows * columns * depth * request.parts
    moved = request.parts * (read + rows * columns * depth * (codes + scales) + m * n * size)
    return Estimate(
        kernel, steps, round(bundles), moved, steps * bundles / chip.clock, moved / chip.bandwidth, 2 * (x + codes + scales) + 2 * sums
    )


def _ideal(request: Request) -> Estimate:
    """The float product of XLA at its best, as one step."""
    chip, m, n, k = chip_of(request.device.chip), request.m, request.n, request.k
    bundles, moved = m * n * k / chip.macs, request.parts * 2 * (m * k + n * k + m * n)
    return Estimate("bf16", request.parts, round(bundles), moved, request.parts * bundles / chip.clock, moved / chip.bandwidth, 0)


def why_not(request: Request) -> str:
    """Returns why there is no estimate of a product, or nothing.

    Example:
      >>> from qjax_kernels.request import Device, Weight
      >>> why_not(Request(Device("tpu", "v6e"), 16, 4096, 4096, Weight("int", 4, 128), "float32"))
      'the rates are those of bfloat16 rows, and float32 ones take six passes of the matrix unit'
    """
    if request.dtype == "float32" and request.activation is None:
        return "the rates are those of bfloat16 rows, and float32 ones take six passes of the matrix unit"
    return ""


def kernel_of(request: Request) -> Kernel:
    """Returns the name that the rates of a request's kernel have.

    Raises:
      ValueError: a weight that no TPU kernel takes.
    """
    weight = request.weight
    if weight.kind not in ("int", "fp8") or weight.bits not in (4, 8):
        raise ValueError(f"no TPU kernel takes a weight of kind {weight.kind!r} with {weight.bits} bits")
    if weight.kind == "fp8":
        return "W8A16 fp8" if request.activation is None else "W8A8 fp8"
    if request.activation == "int8":
        return "W4A8" if weight.bits == 4 else "W8A8"
    return "W4A16" if weight.bits == 4 else "W8A16"
