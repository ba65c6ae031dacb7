"""Few bfloat16 rows times int4 codes on an int8 matrix unit: the rows are cut into three bytes, which hold 2^14 of range exactly.

    x_ik = u_i (2^16 a_ik + 2^8 b_ik + c_ik),      x w = u_i (2^8 (2^8 a w + b w) + c w)

u_i is the power of two 2^21 times below that of the row's largest magnitude among the k of one product. Codes stay integers: they are
half the bytes of bfloat16 for the matrix unit to take in, and where the vector unit has no bfloat16 they would go through int32 and
float32 to become that.
"""

import jax
import jax.numpy as jnp

from qjax_kernels.tpu import tiles

_BITS = 21  # of the largest magnitude: one less than three signed bytes hold
_ROUND = 1.5 * 2**23  # added to a smaller float32, it leaves the nearest integer in the mantissa
_BYTES = 0x808080  # added, and taken away from each byte again, it makes bytes of two's complement signed digits
_SMALLEST = _BITS + 1  # exponent field of the least normal magnitude whose unit is a normal number, too


def cut(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns signed bytes of rows and the unit of each row.

    Exact for bfloat16 down to 2^-14 of a row's largest magnitude; below, half a unit (2^-22 of the largest magnitude at most) is lost.
    That is less than a float32 sum loses, unless the largest meet codes of zero: then small values are all that is left, and the
    smaller they are the more of them is lost (all below 2^-22). A row that holds an infinity or NaN has the unit NaN.

    Args:
      x: (m, k) float32 that bfloat16 holds.

    Returns:
      (bytes int8 (3 m, k), all highest ones first; units float32 (m, 1)).

    Example:
      >>> digits, unit = cut(jnp.float32([[1.0, -0.75, 2.0**-20]]))
      >>> (digits[0] * 65536.0 + digits[1] * 256.0 + digits[2]).tolist(), unit.item() == 2.0**-21
      ([2097152.0, -1572864.0, 2.0], True)
    """
    magnitude = jnp.abs(x)
    largest = jnp.max(jnp.where(magnitude < jnp.inf, magnitude, jnp.inf), axis=1, keepdims=True)
    exponent = jnp.maximum(jax.lax.bitcast_convert_type(largest, jnp.int32) >> 23, _SMALLEST)
    unit = jax.lax.bitcast_convert_type((exponent - _BITS) << 23, jnp.float32)
    inverse = jax.lax.bitcast_convert_type((254 + _BITS - exponent) << 23, jnp.float32)
    bits = jax.lax.bitcast_convert_type(x * inverse + _ROUND, jnp.int32)
    whole = (bits + (_BYTES - 0x4B400000)) ^ _BYTES
    return (
        jnp.concatenate([whole >> 16, whole >> 8, whole]).astype(jnp.int8),
        jnp.where(largest < jnp.inf, unit, jnp.nan),
    )


def product(x: jax.Array, w: jax.Array) -> jax.Array:
    """`x w` in float32: integer sums are exact, and rounded where they are put together.

    Args:
      x: (m, k) bfloat16.
      w: int4 codes (k, n), k at most 2^10.

    Returns:
      (m, n) float32.

    Example:
      >>> product(jnp.ones((8, 128), jnp.bfloat16), jnp.full((128, 128), -8, jnp.int4))[0, 0].item()
      -1024.0
    """
    digits, unit = cut(x.astype(jnp.float32))
    sums = tiles.dot(digits, w.astype(jnp.int8), jnp.int32)
    high, middle, low = (sums[i * x.shape[0] : (i + 1) * x.shape[0]] for i in range(3))
    upper = ((high << 8) + middle).astype(jnp.float32)
    return (upper * 256 + low.astype(jnp.float32)) * unit
