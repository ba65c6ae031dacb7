"""The small numbers that a block of a float format consists of: their bits, and rounding to them, exactly.

A minifloat has a sign, E bits of exponent and M bits of mantissa: code `s | e | m` stands for `(-1)^s 2^(e - bias) (1 + m / 2^M)`, or for
`(-1)^s 2^(1 - bias) m / 2^M` where e is 0. There are no infinities here: what is too large becomes the largest number. Everything is
integer arithmetic on the bits of float32, so it gives the same bits inside and outside `jit`.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp


@dataclasses.dataclass(frozen=True)
class Element:
    """A minifloat.

    Attributes:
      exponent_bits: E.
      mantissa_bits: M.
      bias: of the exponent.
      largest: the largest number.
    """

    exponent_bits: int
    mantissa_bits: int
    bias: int
    largest: float

    @property
    def bits(self) -> int:
        """Bits of a code, the sign included."""
        return 1 + self.exponent_bits + self.mantissa_bits

    @property
    def largest_exponent(self) -> int:
        """floor(log2(largest)), `emax` of the MX standard."""
        return math.frexp(self.largest)[1] - 1

    @property
    def smallest_normal(self) -> float:
        """2^(1 - bias); below it numbers are evenly spaced."""
        return 2.0 ** (1 - self.bias)

    @property
    def smallest(self) -> float:
        """The smallest number above zero."""
        return 2.0 ** (1 - self.bias - self.mantissa_bits)

    @property
    def largest_code(self) -> int:
        """The code of the largest number; above it, below the sign bit, are NaN and infinity."""
        mantissa, exponent = math.frexp(self.largest)
        return ((exponent - 1 + self.bias) << self.mantissa_bits) + round((2 * mantissa - 1) * 2**self.mantissa_bits)


# OCP's FP4, FP6 and FP8; e4m3 is the one without infinities ("fn").
E2M1, E2M3, E3M2 = Element(2, 1, 1, 6.0), Element(2, 3, 1, 7.5), Element(3, 2, 3, 28.0)
E4M3, E5M2 = Element(4, 3, 7, 448.0), Element(5, 2, 15, 57344.0)
MINIFLOATS = {"e2m1": E2M1, "e2m3": E2M3, "e3m2": E3M2, "e4m3": E4M3, "e5m2": E5M2}


def encode_minifloat(x: jax.Array, element: Element) -> jax.Array:
    """The code of the number nearest to `x`, a tie to the even code, what is too large to the largest.

    Args:
      x: float32, no NaN. What is below float32's smallest normal number counts as zero.
      element: the minifloat.

    Returns:
      int32 codes, the shape of `x`. The sign of a zero stays.

    >>> encode_minifloat(jnp.float32([0.25, 0.75, 5.0, 100.0, -1.0]), E2M1).tolist()
    [0, 2, 6, 7, 10]
    """
    m = element.mantissa_bits
    bits = jax.lax.bitcast_convert_type(x.astype(jnp.float32), jnp.int32)
    sign = jnp.where(bits < 0, 1 << (element.bits - 1), 0)
    size = jnp.minimum(jnp.abs(x.astype(jnp.float32)), element.largest)
    bits = jax.lax.bitcast_convert_type(size, jnp.int32)
    # Half a unit less one, and one more where the number below is odd: a carry runs into the exponent by itself.
    shift = 23 - m
    rounded = (bits + (2 ** (shift - 1) - 1) + ((bits >> shift) & 1)) >> shift
    normal = rounded - ((127 - element.bias) << m)
    subnormal = jnp.round(size * (1 / element.smallest)).astype(jnp.int32)
    return jnp.where(size < element.smallest_normal, subnormal, normal) + sign


def decode_minifloat(codes: jax.Array, element: Element) -> jax.Array:
    """The number that a code stands for.

    Args:
      codes: integers; bits above those of the element are not looked at.
      element: the minifloat.

    Returns:
      float32, the shape of `codes`; NaN for codes beyond that of the largest number.

    >>> decode_minifloat(jnp.uint8([0, 2, 6, 7, 10]), E2M1).tolist()
    [0.0, 1.0, 4.0, 6.0, -1.0]
    """
    m = element.mantissa_bits
    codes = codes.astype(jnp.int32)
    size = codes & (2 ** (element.bits - 1) - 1)
    normal = jax.lax.bitcast_convert_type((size + ((127 - element.bias) << m)) << (23 - m), jnp.float32)
    value = jnp.where(size < 2**m, size.astype(jnp.float32) * element.smallest, normal)
    if element.largest_code < 2 ** (element.bits - 1) - 1:
        value = jnp.where(size > element.largest_code, jnp.nan, value)
    return jnp.where(codes & 2 ** (element.bits - 1), -value, value)


def power_of_two(exponent: jax.Array) -> jax.Array:
    """2^exponent for integers from -126 to 127, exactly.

    >>> power_of_two(jnp.int32([-126, 0, 3])).tolist()
    [1.1754943508222875e-38, 1.0, 8.0]
    """
    return jax.lax.bitcast_convert_type((exponent.astype(jnp.int32) + 127) << 23, jnp.float32)


def floor_log2(x: jax.Array) -> jax.Array:
    """floor(log2(x)) of normal float32 numbers above zero, exactly; -127 for zero and what is smaller.

    >>> floor_log2(jnp.float32([0.0, 0.99999, 1.0, 8.0])).tolist()
    [-127, -1, 0, 3]
    """
    return (jax.lax.bitcast_convert_type(x.astype(jnp.float32), jnp.int32) >> 23) - 127
