"""What a product would cost on an H200, from counts alone: tensor core instructions, bytes, and the longer of the two. An estimate, never a
measurement.

    seconds = max(waves x instructions of a tile x cycles of one / clock, bytes / bandwidth)

Waves are whole where a thread block takes one tile, and parts of one where blocks stay and share what does not fill them. It knows nothing
of conversions, waiting and launches. What was measured (experiments/kernels): 1.0x to 1.3x of it for up to 16 rows of 8192 x 28672, 1.2x
for 512; 2.2x to 3.2x for 4096 x 4096, whose launches take as long as the product.
"""

import dataclasses
import math

import jax.numpy as jnp

from ..request import Request
from . import eight_bit, weight_only
from .chosen_tiles import eight_bit_tiles, weight_only_tiles
from .direct_shape import shape_of
from .schedule import Schedule
from .tiles import Direct, Tiles, blocks, padded_rows, stays

CLOCK = 1.755e9  # of the multiprocessors under load
BANDWIDTH = 4.18e12  # bytes a second that a copy reached, read and written
SCALE_BYTES = 4  # as `qjax.prepack` lays them out
MACS = 2048  # bfloat16 multiply-adds a cycle and multiprocessor; twice as many of eight bits


@dataclasses.dataclass(frozen=True)
class Estimate:
    """What one product would take.

    Attributes:
      kernel: "bf16" or the widths of both sides.
      blocks: thread blocks.
      products: tensor core instructions of a tile, or of all that a block of few rows computes.
      bytes: read and written, sums that are added by others too.
      compute: seconds that the instructions take.
      memory: seconds that the bytes take.
      shared: bytes of shared memory of a thread block; 0 for bfloat16, which is not ours.
    """

    kernel: str
    blocks: int
    products: int
    bytes: int
    compute: float
    memory: float
    shared: int

    @property
    def seconds(self) -> float:
        """The longer of the two: copies run beside the arithmetic."""
        return max(self.compute, self.memory)


def estimate(request: Request, kernel: str | None = None) -> Estimate:
    """Returns what a product would cost. Pure: asks no device and reads no file.

    Args:
      request: the product.
      kernel: "bf16" for the float product beside it, as if all multiprocessors were always busy with it; None for the kernel that takes the
        request.

    Returns:
      An `Estimate`.

    Raises:
      ValueError: no kernel of ours takes the request, which may have no rows; another `kernel`.

    Example:
      >>> from qjax_kernels.request import Device, Weight
      >>> decode = Request(Device("cuda", "sm_90a", 132), 16, 28672, 8192, Weight("int", 4, 128))
      >>> 3.5 < estimate(decode, "bf16").seconds / estimate(decode).seconds < 4
      True
    """
    if kernel not in (None, "bf16"):
        raise ValueError(f"`kernel` is {kernel!r}; it must be 'bf16', or None for the kernel that takes the request")
    if request.m < 1 or request.n < 1 or request.k < 1:
        raise ValueError(f"`request` is of M, N, K = {request.m}, {request.n}, {request.k}; all must be 1 or more")
    m, n, k, cores = request.m, request.n, request.k, max(request.device.cores, 1)
    if kernel == "bf16":
        moved, tiles = 2 * (n * k + m * k + m * n), Tiles(128, 256, 128, 3, warpgroups=2)
        products = tiles.block_n // 64 * math.ceil(k / 16)
        return Estimate("bf16", blocks(m, n, tiles), products, moved, m * n * k / (MACS * cores * CLOCK), moved / BANDWIDTH, 0)
    reason = why_not(request)
    if reason:
        raise ValueError(f"no Hopper kernel takes the `request`: {reason}")
    eight, wide = request.activation is not None, jnp.dtype(request.dtype).itemsize
    bits, group = request.weight.bits, request.weight.group_size
    tiles = eight_bit_tiles(m, n, k, cores, wide) if eight else weight_only_tiles(m, n, k, bits, cores, group)
    scales = SCALE_BYTES * n * (k // group if group else 1)
    rows = m if isinstance(tiles, Direct) or tiles.digits else padded_rows(m)
    moved = n * k * bits // 8 + scales + wide * (rows * k + m * n)
    name = f"W{bits}A{8 if eight else 16}"
    if isinstance(tiles, Direct):
        s = shape_of(m, n, k, group=group or k, columns=k // (group or k), dtype=jnp.bfloat16, tiles=tiles, cores=cores, bits=bits)
        moved += 2 * 4 * (s.parts - 1) * m * n  # sums that one block writes and another reads
        products = s.most * s.high * s.own * 4 * s.quads  # 16 x 32 by 32 x 8
        compute = math.ceil(s.blocks / cores) * products * 16 * 32 * 8 / (2 * MACS) / CLOCK
        return Estimate(name, s.blocks, products, moved, compute, moved / BANDWIDTH, s.launched_bytes(tiles.blocks, cores))
    if tiles.added_after:
        moved += 2 * 4 * tiles.split_k * m * n  # written by one program, read by the next
    if eight:
        moved += 2 * m * k  # rows in another form
    shared = tiles.shared_bytes(bits, SCALE_BYTES if group else 0, 1 if eight else 2, wide)
    depth = math.ceil(k / (tiles.block_k * tiles.split_k)) * tiles.block_k
    step = 32 if eight or tiles.digits else 16  # k of an instruction, which takes 64 rows of its left side
    products = (tiles.block_m if tiles.x_left else tiles.block_n) // 64 * (depth // step)
    work = tiles.block_m * tiles.block_n * depth * (2 if tiles.digits else 1)
    count = blocks(m, n, tiles)
    waves = math.ceil(count / cores)
    if stays(tiles, None if eight else group):
        across, down = math.ceil(m / tiles.block_m), math.ceil(n / tiles.block_n)
        across, down = (math.ceil(across / tiles.cluster), down) if eight else (across, math.ceil(down / tiles.cluster))
        stages = depth // tiles.block_k
        schedule = Schedule.of(across, down, stages, min(tiles.stages, stages), cores // tiles.cluster)
        waves, count = schedule.waves, schedule.groups * tiles.cluster
        if schedule.shared:
            moved += 2 * 4 * count * tiles.block_m * tiles.block_n
    rate = 2 * MACS if eight or tiles.digits else MACS
    return Estimate(name, count, products, moved, waves * work / rate / CLOCK, moved / BANDWIDTH, shared)


def why_not(request: Request) -> str:
    """Returns why there is no estimate of a product, or nothing: the estimate knows the Hopper kernels alone, no XLA formulation.

    Example:
      >>> from qjax_kernels.request import Device, Weight
      >>> why_not(Request(Device("cuda", "sm_90a", 132), 16, 4100, 4096, Weight("int", 4, 128)))
      'N must be a multiple of 64, not 4100'
    """
    return weight_only.why_not(request) if request.activation is None else eight_bit.why_not(request)
