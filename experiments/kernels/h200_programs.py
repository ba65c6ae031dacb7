"""What `h200.py` runs: weights and rows, products by our kernels, by XLA and in bfloat16, and programs that read every weight once."""

import dataclasses
import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from qjax_kernels.gpu.chosen_tiles import eight_bit_tiles, weight_only_tiles
from qjax_kernels.gpu.eight_bit import eight_bit_matmul, rounded_rows
from qjax_kernels.gpu.tiles import Direct, Tiles
from qjax_kernels.gpu.weight_only import weight_only_matmul

GROUP = 128
FOUR = ("int4", "int4 f32")  # kinds of four bits
CACHE_BYTES = 60 * 2**20


def weights(kind: str, n: int, k: int, seed: int, group: int | None = GROUP) -> tuple[jax.Array, ...]:
    """A weight (N, K) and its scales on the device, freshly drawn.

    Args:
      kind: "bf16", "int4", "int4 f32" (scales float32, as `qjax.prepack` has them; else they are bfloat16), "int8", "int8c" and "fp8"
        (one scale a row).
      n: rows.
      k: columns.
      seed: of the draw.
      group: consecutive k that share a scale.

    Returns:
      The weight, and scales of magnitude such that products are of order one.
    """
    keys = jax.random.split(jax.random.key(seed), 2)

    def draw(keys):
        if kind == "bf16":
            return (jax.random.normal(keys[0], (n, k), jnp.bfloat16) * k**-0.5,)
        if kind == "fp8":
            codes = (jax.random.normal(keys[0], (n, k), jnp.bfloat16) * 64).astype(jnp.float8_e4m3fn)
        else:
            top = 8 if bits_of(kind) == 4 else 128
            codes = jax.random.randint(keys[0], (n, k), -top, top, jnp.int8).astype(jnp.int4 if bits_of(kind) == 4 else jnp.int8)
        columns = k // group if kind in (*FOUR, "int8") and group else 1
        unit = 4.6 if bits_of(kind) == 4 else 64.0 if kind == "fp8" else 74.0
        scales = jax.random.uniform(keys[1], (n, columns), jnp.float32, 0.5, 1.5) * k**-0.5 / unit
        return codes, scales.astype(jnp.float32 if scale_bytes(kind) == 4 else jnp.bfloat16)

    return jax.jit(draw)(keys)


def bits_of(kind: str) -> int:
    """Of a code: 4 or 8."""
    return 4 if kind in FOUR else 8


def scale_bytes(kind: str) -> int:
    """Of a scale."""
    return 4 if kind == "int4 f32" else 2


def rows(m: int, k: int, seed: int) -> jax.Array:
    """x (M, K) bfloat16."""
    return jax.jit(lambda key: jax.random.normal(key, (m, k), jnp.bfloat16))(jax.random.key(seed))


def bf16(x, w):
    """The product that all is compared with."""
    return jnp.einsum("mk,nk->mn", x, w)


def xla_groups(x, codes, scales):
    """What XLA makes of codes and scales by group."""
    n, k = codes.shape
    w = (codes.astype(jnp.bfloat16).reshape(n, -1, GROUP) * scales[..., None]).reshape(n, k)
    return jnp.einsum("mk,nk->mn", x, w)


def xla_eight(x, codes, scales):
    """What XLA makes of eight bits on both sides."""
    q, s = rounded_rows(x, codes.dtype)
    wide = jnp.int32 if codes.dtype == jnp.int8 else jnp.float32
    sums = jax.lax.dot_general(q, codes, (((1,), (1,)), ((), ())), preferred_element_type=wide)
    return (sums.astype(jnp.float32) * s[:, None] * scales.astype(jnp.float32).T).astype(x.dtype)


def ours(kind: str, tiles: Tiles | Direct | None, interpret=None) -> Callable:
    """Our kernel for a kind of weight."""
    if kind in ("int8c", "fp8"):
        return jax.jit(lambda x, w, s: eight_bit_matmul(x, w, s, tiles=tiles, interpret=interpret))
    return jax.jit(lambda x, w, s: weight_only_matmul(x, w, s, group_size=GROUP, tiles=tiles, interpret=interpret))


PROGRAMS = {
    "bf16": ("bf16", bf16),
    "W4A16 XLA": ("int4", xla_groups),
    "W8A16 XLA": ("int8", xla_groups),
    "W8A8 XLA": ("int8c", xla_eight),
    "FP8 XLA": ("fp8", xla_eight),
    "W4A16": ("int4", None),
    "W4A16 f32": ("int4 f32", None),
    "W8A16": ("int8", None),
    "W8A8": ("int8c", None),
    "FP8": ("fp8", None),
}


@dataclasses.dataclass(frozen=True)
class Job:
    """One program at one shape."""

    name: str
    m: int
    k: int
    n: int
    tiles: Tiles | Direct | None = None

    @property
    def kind(self) -> str:
        """Of its weight."""
        return PROGRAMS[self.name][0]

    def row(self) -> dict[str, Any]:
        """What names it in the findings."""
        tiles = self.chosen()
        return {"name": self.name, "m": self.m, "k": self.k, "n": self.n, **({"tiles": short(tiles)} if tiles else {})}

    def function(self) -> Callable:
        """The program."""
        return PROGRAMS[self.name][1] or ours(self.kind, self.tiles)

    def chosen(self) -> Tiles | Direct | None:
        """The tiles that it runs with."""
        if PROGRAMS[self.name][1] is not None or self.tiles is not None:
            return self.tiles
        if self.kind in ("int8c", "fp8"):
            return eight_bit_tiles(self.m, self.n, self.k)
        return weight_only_tiles(self.m, self.n, self.k, bits_of(self.kind))


WEIGHT_BYTES = {"bf16": 2.0, "int4": 0.5, "int4 f32": 0.5, "int8": 1.0, "int8c": 1.0, "fp8": 1.0}


def fewest_bytes(job: Job) -> float:
    """Bytes that have to pass through device memory: the weight, its scales, x and y."""
    columns = 0 if job.kind == "bf16" else job.k // GROUP if job.kind in (*FOUR, "int8") else 1
    scales = columns * job.n * scale_bytes(job.kind)
    return WEIGHT_BYTES[job.kind] * job.n * job.k + scales + 2 * job.m * (job.k + job.n)


def copies(job: Job, m: int) -> int:
    """Sets of weights, one a product, so many that none is still in the cache when it is used again."""
    return 4 if m > 1024 else max(4, min(24, int(4 * CACHE_BYTES / (WEIGHT_BYTES[job.kind] * job.n * job.k)) + 1))


def unrolled(job: Job) -> Callable:
    """A program of one product for every weight, each of which waits for the one before.

    Products that share an operand would be merged into one that reads it once, and independent ones may run beside each other: either gives
    a time that no model sees. So every weight occurs once, and a barrier ties the next x to the last y.
    """
    function = job.function()

    def many(x_list, w_list):
        found: list[jax.Array] = []
        for i, w in enumerate(w_list):
            x = x_list[i % len(x_list)]
            if found:
                x, found[-1] = jax.lax.optimization_barrier((x, found[-1]))
            found.append(function(x, *w))
        return found

    return jax.jit(many)


def products(program) -> int:
    """Products in a compiled program: calls of the matrix library, of kernels and of fusions around a product; -1 where none are told."""
    text = program.as_text()
    called = re.findall(r"custom_call_target=\"([^\"]*)\"", text)
    kernels = sum(any(word in target for word in ("cublas", "gemm", "mosaic", "cudnn")) for target in called)
    # A fusion that Triton compiles holds its dot in a computation of its own: as many dots as products.
    return kernels + len(re.findall(r"= \S+ dot\(", text))


def short(tiles: Tiles | Direct) -> dict:
    """What differs from the defaults of `Tiles`; all of `Direct`."""
    standard = {field.name: field.default for field in dataclasses.fields(tiles)} if isinstance(tiles, Tiles) else {}
    return {name: value for name, value in dataclasses.asdict(tiles).items() if value != standard.get(name, dataclasses.MISSING)}
