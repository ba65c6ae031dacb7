"""How a product is cut into tiles on a Hopper GPU: what a cut is and takes, and which no kernel has. `chosen_tiles` has the best ones."""

import dataclasses
import math

ROWS = 64  # of w: those of a weight are a multiple of it
PIECE = 128  # k that share a scale of x as digits, and that one run of tensor-core instructions takes
FRACTION = 13  # bits of digits below the leading one of the largest element of a piece
COPIER_REGISTERS = 40  # of a thread of the warpgroup that copies
REGISTERS = 65536  # of a multiprocessor
MAKER_REGISTERS = 112  # where it makes digits besides: with 104 some were put aside (64 rows of w, three stages, jax 0.10.2)


def _check_ints(tiles: "Tiles | Direct") -> None:
    for field in dataclasses.fields(tiles):
        value, wanted = getattr(tiles, field.name), bool if isinstance(field.default, bool) else int
        if type(value) is not wanted:
            raise TypeError(f"`{field.name}` is {value!r}; it must be {'an int' if wanted is int else 'True or False'}")


@dataclasses.dataclass(frozen=True)
class Tiles:
    """The cut of a product y (M, N) = x (M, K) w (N, K)^T.

    Attributes:
      block_m: rows of x that a thread block takes, a multiple of 8 up to 256; more rows are more thread blocks.
      block_n: rows of w that a thread block takes, a multiple of 64 for every compute warpgroup; with `digits` also 64, which all share.
      block_k: of K a pipeline stage holds, a multiple of 128.
      stages: of the pipeline, all in shared memory.
      split_k: thread blocks that share the K of one tile of y; their float32 sums are added by a second program, or with `digits` inside a
        cluster, of 8 at most.
      warpgroups: that compute. A single one copies too, and several thread blocks fit on a multiprocessor (few rows, bound by memory);
        beside two or more, another warpgroup copies, and does nothing else but make digits (many rows, bound by the tensor cores).
      scale_first: the weight is scaled before the tensor cores see it (code times scale is rounded to bfloat16); otherwise the float32 sum
        of a group is.
      x_left: rows of x stand on the left of the tensor cores, 64 for every warpgroup; otherwise rows of w do. Only for eight bits on both
        sides.
      digits: rows of x become two eight-bit digits and the sums of a group integers, for which nibbles need next to no work; the warpgroup
        that copies makes them. Four-bit codes in groups, and two warpgroups or more, which share each stage where `block_n` is 64.
      cluster: thread blocks that receive each block of one operand together: of w those with neighbouring rows of x (eight bits on both
        sides), of x those with neighbouring rows of w (weight-only). Needs two warpgroups.
    """

    block_m: int
    block_n: int
    block_k: int
    stages: int
    split_k: int = 1
    warpgroups: int = 1
    scale_first: bool = False
    x_left: bool = False
    cluster: int = 1
    digits: bool = False

    def __post_init__(self) -> None:
        """Raises ValueError where no kernel has such tiles, TypeError where a number is no int."""
        _check_ints(self)
        if self.block_m % 8 or not 8 <= self.block_m <= 256:
            raise ValueError(f"`block_m` is {self.block_m}; it must be a multiple of 8 from 8 to 256")
        left, name = (self.block_m, "block_m") if self.x_left else (self.block_n, "block_n")
        for field in ("warpgroups", "cluster", "stages", "split_k"):
            if getattr(self, field) < 1:
                raise ValueError(f"`{field}` is {getattr(self, field)}; it starts at 1")
        if self.digits and (self.x_left or self.scale_first):
            on = "x_left" if self.x_left else "scale_first"
            raise ValueError(f"`digits` puts rows of w on the left and scales sums of integers; leave `{on}` False")
        if left % (64 * self.beside) or left < 64:
            least, narrow = 64 * self.beside, ", or 64, which they share" if self.digits else ""
            wanted = f"a multiple of {least}, 64 rows for each{narrow}"
            raise ValueError(f"`{name}` is {left} with {self.warpgroups} warpgroups; it must be {wanted}")
        if self.warpgroups > 3:
            raise ValueError(f"`warpgroups` is {self.warpgroups}: they would wait for registers that nobody gives back; take 2 or 3")
        if self.digits and self.warpgroups < 2:
            raise ValueError(f"`warpgroups` is {self.warpgroups}; `digits` needs two or more, beside which another one makes them")
        if self.digits and self.cluster > 1:
            raise ValueError(f"`cluster` is {self.cluster}; with `digits` a cluster is blocks that share K: leave it 1, give `split_k`")
        if self.digits and self.block_m > 32:
            raise ValueError(f"`block_m` is {self.block_m}; with `digits` it must be 32 at most")
        if self.digits and self.split_k > 8:
            raise ValueError(f"`split_k` is {self.split_k}; with `digits` 8 thread blocks share K at most")
        if self.block_k // PIECE % self.sharing:
            shared = PIECE * self.sharing
            raise ValueError(f"`block_k` is {self.block_k}; {self.sharing} warpgroups share it, so it must be a multiple of {shared}")
        if self.x_left and (self.block_n % 8 or not 8 <= self.block_n <= 256):
            raise ValueError(f"`block_n` is {self.block_n}; with `x_left` it must be a multiple of 8 from 8 to 256")
        if self.block_n > 256:
            raise ValueError(f"`block_n` is {self.block_n}; the copy engine takes 256 rows at most")
        if self.cluster > 1 and self.warpgroups < 2:
            raise ValueError(f"`cluster` is {self.cluster} with {self.warpgroups} warpgroups; clusters need two or more")
        shared, name = (self.block_n, "block_n") if self.x_left else (self.block_m, "block_m")
        if self.cluster > 1 and (self.cluster > 8 or shared % (8 * self.cluster)):
            raise ValueError(
                f"`cluster` is {self.cluster} and `{name}` {shared}; it must be 8 at most, and each block read whole eights of rows"
            )
        if self.block_k % 128 or self.block_k < 128:
            raise ValueError(f"`block_k` is {self.block_k}; it must be a multiple of 128")

    @property
    def beside(self) -> int:
        """Warpgroups with different rows of w (of x with `x_left`)."""
        return 1 if self.digits and self.block_n == 64 else self.warpgroups

    @property
    def sharing(self) -> int:
        """Warpgroups of a block that share rows, and each stage."""
        return self.warpgroups // self.beside

    @property
    def sums(self) -> int:
        """Warpgroups that have a sum of the same tile, which one of them gathers (`gathered`)."""
        return self.sharing * (self.split_k if self.digits else 1)

    @property
    def added_after(self) -> bool:
        """Whether a second program adds the sums of parts of K."""
        return self.split_k > 1 and not self.digits

    @property
    def together(self) -> int:
        """Thread blocks of a cluster."""
        return self.split_k if self.digits else self.cluster

    @property
    def scale_rows(self) -> tuple[int, ...]:
        """Bytes of scales of a row of w that a stage may copy, the fewest first."""
        return (16, 32) if self.digits else (16,)

    @property
    def copier_registers(self) -> int:
        """Registers that a thread of the copying warpgroup keeps once the kernel runs."""
        return MAKER_REGISTERS if self.digits else COPIER_REGISTERS

    @property
    def worker_registers(self) -> int:
        """Registers that a thread of a computing warpgroup asks for then: what is left of those of the launch, in eights.

        A launch gives each of its threads as many, in eights; who asked for more than others give back would wait for ever.
        """
        warpgroups = self.warpgroups + 1
        launched = REGISTERS // (128 * warpgroups) // 8 * 8 * warpgroups
        return (launched - self.copier_registers) // self.warpgroups // 8 * 8

    def stage_bytes(self, bits: int, scale_bytes: int = 2, x_bytes: int = 2) -> int:
        """Bytes of shared memory that a stage takes: codes, rows of x and sixteen bytes of scales a row of w, or as many as `at_once`."""
        scales = self.block_n * (32 if self.digits and self.block_k // PIECE * scale_bytes > 16 else 16) if scale_bytes else 0
        # Two digits an element of x, and one float32 for a row and 128 columns.
        digits = self.block_m * self.block_k * 2 + self.block_k // 128 * self.block_m * 4 if self.digits else 0
        return self.block_n * self.block_k * bits // 8 + self.block_m * self.block_k * x_bytes + scales + digits

    def shared_bytes(self, bits: int, scale_bytes: int = 2, x_bytes: int = 2, out_bytes: int = 2) -> int:
        """Bytes of shared memory that a thread block takes: stages, the tile of y on its way out, vectors and barriers.

        With digits no tile of y lies there: threads write it. Each warpgroup has its own stretches of scales of channels and bias, and of
        scales of x where that has eight bits; with or without a bias the bytes are the same.
        """
        left, right = (self.block_m, self.block_n) if self.x_left else (self.block_n, self.block_m)
        out = 0 if self.digits else left * min(right, 64) * (4 if self.added_after else out_bytes)
        gathered = left * right * 4 * self.sums if self.sums > 1 else 0
        between = 2048 if self.digits else 1024  # with barriers; arrays begin at multiples of up to 1024 bytes
        of_w, of_x = (self.warpgroups * right, left) if self.x_left else (left, self.warpgroups * right)
        vectors = 4 * (2 * of_w + (of_x if x_bytes == 1 else 0))
        return self.stages * self.stage_bytes(bits, scale_bytes, x_bytes) + out + gathered + vectors + between


@dataclasses.dataclass(frozen=True)
class Direct:
    """The cut of a product of few rows whose codes go straight from device memory into registers.

    The warps of a thread block share the K of a tile, a few rows of w, and a block takes one tile after the other.

    Attributes:
      warps: of a thread block: 4, 8, 12 or 16.
      turn: pieces of 128 codes a row that a warp loads at once: 1, 2, 4 or 8.
      blocks: that live on a multiprocessor; each makes the digits of x for itself.
      split_k: thread blocks that share the K of their tiles: each reads that part of x alone, and finishes its share of the tiles, for
        which the others hand their sums over (`direct_parts`).
      early: the launch begins while the one before it ends (programmatic dependent launch) and loads its first codes meanwhile: for codes
        that the program right before does not write.
      wide: four warps multiply 64 rows of w together (`wgmma`), whose digits of x the tensor cores read by themselves; else each warp 16.
    """

    warps: int = 8
    turn: int = 4
    blocks: int = 2
    split_k: int = 1
    early: bool = False
    wide: bool = False

    def __post_init__(self) -> None:
        """Raises ValueError where no kernel has such tiles, TypeError where a number is no int."""
        _check_ints(self)
        for name, allowed in (("warps", (4, 8, 12, 16)), ("turn", (1, 2, 4, 8))):
            if getattr(self, name) not in allowed:
                raise ValueError(f"`{name}` is {getattr(self, name)}; it must be one of {allowed}")
        for name, together in (("blocks", "live on a multiprocessor"), ("split_k", "share K")):
            if not 1 <= getattr(self, name) <= 32:
                raise ValueError(f"`{name}` is {getattr(self, name)}; 1 to 32 blocks {together}")


CORE_WARPS = 16  # of 128 registers a thread, which a multiprocessor has


def check_waiting(tiles: Direct) -> None:
    """Raises ValueError where blocks that wait for each other may not live together: as parts of one thread block they do."""
    if tiles.blocks * tiles.warps > CORE_WARPS:
        raise ValueError(f"`tiles` are {tiles}: their blocks wait for each other, those of a multiprocessor share {CORE_WARPS} warps")


def blocks(m: int, n: int, tiles: Tiles) -> int:
    """Thread blocks of a launch."""
    return math.ceil(m / tiles.block_m) * math.ceil(n / tiles.block_n) * tiles.split_k


def stays(tiles: Tiles, group: int | None) -> bool:
    """Whether thread blocks stay on their multiprocessors and take one tile after another: where sums stay with the tensor cores, and with
    digits unless sums are gathered.

    Args:
      tiles: the cut.
      group: consecutive k that share a scale, None per channel.
    """
    return tiles.warpgroups > 1 and tiles.sums == 1 and (tiles.scale_first or tiles.x_left or tiles.digits or group is None)


def at_once(tiles: Tiles, group: int, scale_bytes: int) -> int:
    """Scales of a row of w that are copied for a stage, which has none of others: 16 bytes of them, with digits also 32; 0 where both end
    within a stage.

    Args:
      tiles: the cut.
      group: consecutive k that share a scale.
      scale_bytes: of a scale.
    """
    counts = [size // scale_bytes for size in tiles.scale_rows]
    return next((count for count in counts if group * count % tiles.block_k == 0), 0)


def padded_rows(m: int) -> int:
    """Rows of x that the copy engine takes for m of them: below 8 any number, else a multiple of 8."""
    return m if m < 8 else -(-m // 8) * 8


SHARED_BYTES = 227 * 1024
"""Shared memory that a thread block of a Hopper GPU may take."""


def check_launch(tiles: Tiles, staying: bool, used: int) -> None:
    """Raises ValueError where tiles cannot be launched: K is split for blocks that stay (`stays`), or shared memory is too small."""
    if tiles.split_k > 1 and staying:
        raise ValueError(f"`tiles.split_k` is {tiles.split_k}: blocks of {tiles.warpgroups} warpgroups share K by themselves; leave it 1")
    if used > SHARED_BYTES:
        raise ValueError(f"`tiles` need {used} bytes of shared memory, the GPU has {SHARED_BYTES}; take fewer stages or smaller blocks")
