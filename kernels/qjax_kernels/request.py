"""What a product asks of a kernel: facts alone, known when a program is traced."""

import dataclasses
import re
from typing import Literal, get_args

Platform = Literal["cpu", "cuda", "tpu"]
_GPU = re.compile(r"sm_[1-8]\d|sm_(9|1\d|2\d)\da|unknown")  # from sm_90 on with the features of its own


@dataclasses.dataclass(frozen=True)
class Device:
    """Where a program will run.

    Attributes:
      platform: as jax calls it.
      chip: the generation that kernels are written for: "v5e", "v5p", "v6e", "tpu7x"; "sm_80", "sm_90a", "sm_100a"; on CPUs the best
        instruction set that is there: "amx", "avx512_vnni", "avx2", "neon", "plain".
      cores: multiprocessors of a GPU, cores of a TPU chip, threads of a CPU; never asked of a device while compiling without one.

    Raises:
      ValueError: the platform is another spelling of one that kernels are written for, or no GPU is called so.
    """

    platform: Platform
    chip: str
    cores: int = 1

    def __post_init__(self) -> None:
        known, spelled = get_args(Platform), str(self.platform).lower()
        if self.platform not in known and spelled in (*known, "gpu"):
            raise ValueError(f"`platform` is {self.platform!r}; write {'cuda' if spelled == 'gpu' else spelled!r}, one of {known}")
        if self.platform == "cuda" and not _GPU.fullmatch(self.chip):
            raise ValueError(
                f"`chip` is {self.chip!r}; a GPU is called as code is compiled for it: 'sm_80' (A100), 'sm_90a' (H100, H200), 'sm_100a'"
            )


@dataclasses.dataclass(frozen=True)
class Weight:
    """How a weight is stored, its codes (N, K).

    Attributes:
      kind: "int" for signed codes, "uint" for unsigned ones with a zero point, "codebook" for indices of a table, "fp8" for e4m3 codes.
      bits: of a code.
      group_size: consecutive k that share a scale; None where a row does (per channel).
    """

    kind: Literal["int", "uint", "codebook", "fp8"]
    bits: int
    group_size: int | None = None


@dataclasses.dataclass(frozen=True)
class Request:
    """A product y (M, N) = x (M, K) w (N, K)^T.

    Attributes:
      device: where.
      m: rows of x, all axes that are not contracted taken together.
      n: rows of w.
      k: the contracted length.
      weight: how w is stored.
      dtype: of x and y: "float32" or "bfloat16".
      activation: "int8" or "fp8" where x is rounded per row at run time, None where it stays float; "int8 codes" where it is rounded in
        another way to at most eight bits (a static range, zero points, fewer bits, a scale for all rows), "int8 + outliers" where columns
        with large values stay out of that.
      parts: products of this kind side by side: experts, stacked weights; 1 for a plain product.
      ragged: whether the parts share a list of m rows, those of one part after those of another.
      rotation: values of a row of x that are rotated together (Hadamard) before it is rounded, all of one weight's; None where nothing
        is, or columns change places in between.
    """

    device: Device
    m: int
    n: int
    k: int
    weight: Weight
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    activation: Literal["int8", "fp8", "int8 codes", "int8 + outliers"] | None = None
    parts: int = 1
    ragged: bool = False
    rotation: int | None = None


@dataclasses.dataclass(frozen=True)
class Cached:
    """How keys or values of past tokens are stored.

    Attributes:
      kind: "int" for signed codes, "uint" for unsigned ones with a zero point, "other" for what is no integer.
      bits: of a code.
      group_size: channels of a token that share a scale; None for all of them.
      tokens: how many tokens share the scales of their channels; 1 where a token has its own.
    """

    kind: Literal["int", "uint", "other"]
    bits: int
    group_size: int | None = None
    tokens: int = 1


@dataclasses.dataclass(frozen=True)
class CacheRead:
    """Attention of new tokens to packed keys and values: softmax(q k^T / sqrt(channels)) v.

    Attributes:
      device: where.
      queries: new tokens of a sequence.
      channels: of a head.
      capacity: tokens that the cache has room for.
      keys: how they are stored.
      values: how they are stored.
      dtype: of q and the result.
    """

    device: Device
    queries: int
    channels: int
    capacity: int
    keys: Cached
    values: Cached
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
