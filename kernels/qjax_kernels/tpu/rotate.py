"""Hadamard rotation and int8 rounding of rows in one pass: what an on-line rotation in front of an integer product costs.

    z = x H / sqrt(size)  along each block of `size` values,   q_i = clip(round(z_i / r_i)),  r_i = max|z_i| / levels

with H the Sylvester matrix of +-1: H_size = H_(size / 128) (x) H_128.

Data flow: whole rows of x are copied in; the matrix unit multiplies each 128 lanes by H_128, whose entries are exact; the factor over
blocks of lanes is log2(size / 128) rounds of additions and subtractions; then the largest magnitude of a row, its scale, its codes. x is
read once and int8 codes are written; the rotated floats never leave the chip.
"""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from qjax_kernels.tpu import tiles
from qjax_kernels.tpu.chips import chip_of, why_not_chip
from qjax_kernels.tpu.int8 import encoded
from qjax_kernels.tpu.tiles import Interpret

_LANES = 128
_BYTES = 12 * 2**20  # of the rows of a tile in float32, which lie in vector memory with their copies


def why_not(platform: str, chip: str, k: int, size: int) -> str:
    """Returns why this kernel does not rotate rows of k values in blocks of `size`, or nothing.

    Example:
      >>> why_not("tpu", "v6e", 4096, 4096)
      ''
      >>> why_not("tpu", "v6e", 11008, 11008)
      'blocks of 11008: the size must be a power of two from 128 that divides K 11008'
    """
    reason = why_not_chip(platform, chip)
    if reason:
        return reason
    if size < _LANES or size & (size - 1) or k % size:
        return f"blocks of {size}: the size must be a power of two from 128 that divides K {k}"
    return "" if 32 * k * 4 <= _BYTES else f"32 rows of {k} values do not fit vector memory"


def rotate_and_quantize(
    x: jax.Array, *, size: int, chip: str, levels: float = 127.5, interpret: Interpret = False
) -> tuple[jax.Array, jax.Array]:
    """Rotates blocks of each row and rounds the row to int8. No gradient: the product behind it has one.

    The number of rows may be any; those of the last tile that stick out are not written. A row of zeros has scale 1 and codes 0.
    Rounding: sums are float32 throughout; `1 / sqrt(size)` is part of the row's scale and its square root is rounded once, where it is no
    power of two.

    Args:
      x: (M, K) float32 or bfloat16.
      size: of a block, a power of two from 128 that divides K.
      chip: "v5e", "v5p", "v6e" or "tpu7x".
      levels: as `int8` takes it.
      interpret: run on a CPU, for tests.

    Returns:
      (codes int8 (M, K), scales float32 (M, 1)).

    Raises:
      ValueError: a size that is not taken, an unknown chip.

    Example:
      >>> codes, scale = rotate_and_quantize(jnp.ones((1, 128)), size=128, chip="v6e", levels=127, interpret=True)
      >>> codes[0, :3].tolist(), round(scale.item() * 127, 4)
      ([127, 0, 0], 11.3137)
    """
    chip_of(chip)
    reason = why_not("tpu", chip, x.shape[1], size)
    if reason:
        raise ValueError(f"`size`: {reason}")
    m, k = x.shape
    rows = 32 if m <= 32 or 64 * k * 4 > _BYTES else 64
    matrix = jnp.asarray(_sylvester(_LANES), x.dtype)
    return pl.pallas_call(
        functools.partial(_kernel, size=size, levels=levels),
        out_shape=(jax.ShapeDtypeStruct((m, k), jnp.int8), jax.ShapeDtypeStruct((m, 1), jnp.float32)),
        grid=(pl.cdiv(m, rows),),
        in_specs=[pl.BlockSpec((rows, k), lambda i: (i, 0)), pl.BlockSpec((_LANES, _LANES), lambda i: (0, 0))],
        out_specs=[pl.BlockSpec((rows, k), lambda i: (i, 0)), pl.BlockSpec((rows, 1), lambda i: (i, 0))],
        scratch_shapes=[pltpu.VMEM((rows, k), jnp.float32)],
        compiler_params=tiles.params("parallel", vmem=40 * 2**20),
        interpret=interpret,
        name="rotate_and_quantize",
    )(x, matrix)


def _sylvester(size: int) -> np.ndarray:
    one = np.ones((1, 1))
    while len(one) < size:
        one = np.block([[one, one], [one, -one]])
    return one


def _kernel(x_ref, matrix_ref, codes_ref, scale_ref, z_ref, *, size: int, levels: float):
    k = x_ref.shape[1]
    largest = jnp.zeros(scale_ref.shape, jnp.float32)
    for start in range(0, k, size):
        for lane in range(start, start + size, _LANES):
            z_ref[:, lane : lane + _LANES] = tiles.dot(x_ref[:, lane : lane + _LANES], matrix_ref[...])
        half = _LANES
        while half < size:
            for low in range(start, start + size, 2 * half):
                a, b = z_ref[:, low : low + half], z_ref[:, low + half : low + 2 * half]
                z_ref[:, low : low + half], z_ref[:, low + half : low + 2 * half] = a + b, a - b
            half *= 2
        block = z_ref[:, start : start + size]
        largest = jnp.maximum(largest, jnp.max(jnp.abs(block), axis=1, keepdims=True))
    scale = jnp.where(largest > 0, largest * (1 / levels), math.sqrt(size))
    scale_ref[...] = scale * (1 / math.sqrt(size))
    codes_ref[...] = encoded(z_ref[...] * (1 / scale), jnp.int8)
