"""Codes of 1 to 8 bits as a dense little-endian bit stream along the last axis.

Value i occupies the bits [i*b, i*b + b) of its row, least significant first, in two's complement when signed: 3-bit
codes cost 3 bits. `8 / gcd(8, b)` values fill `b / gcd(8, b)` bytes exactly; both directions work on such periods with
shifts.
"""

import functools
import math

import jax
import jax.numpy as jnp


def packed_length(k: int, bits: int) -> int:
    """Bytes that `k` codes take.

    >>> packed_length(10, 3)
    4
    """
    return -(-k * bits // 8)


def _check_bits(bits: int) -> None:
    if isinstance(bits, bool) or not isinstance(bits, int) or not 1 <= bits <= 8:
        raise ValueError(f"`bits` must be an int from 1 to 8, got {bits!r}")


def _pad_last(x: jax.Array, multiple: int) -> jax.Array:
    short = -x.shape[-1] % multiple
    return jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, short)]) if short else x


def pack(codes: jax.Array, bits: int) -> jax.Array:
    """Pack the last axis; the bits of a code above the lowest `bits` are dropped.

    Args:
      codes: integers (..., K).
      bits: 1 to 8.

    Returns:
      uint8 (..., ceil(K * bits / 8)); unused bits of the last byte are 0.

    Raises:
      ValueError: `bits` out of range. TypeError: `codes` not integer.

    >>> pack(jnp.int8([1, -1, 3]), 4).tolist()
    [241, 3]
    """
    _check_bits(bits)
    codes = jnp.asarray(codes)
    if not jnp.issubdtype(codes.dtype, jnp.integer):
        raise TypeError(f"`codes` must hold integers, got {codes.dtype}")
    return codes.astype(jnp.uint8) if bits == 8 else _packed(codes, bits)


# One program where it is called on its own; nothing of it is seen in the program of whoever traces it.
@functools.partial(jax.jit, static_argnums=1, inline=True)
def _packed(codes: jax.Array, bits: int) -> jax.Array:
    codes = codes.astype(jnp.uint8)
    *lead, k = codes.shape
    values, size = 8 // math.gcd(8, bits), bits // math.gcd(8, bits)
    codes = _pad_last(codes & (2**bits - 1), values)
    codes = codes.reshape(*lead, codes.shape[-1] // values, values)
    packed = []
    for byte in range(size):
        total = None
        for i in range(8 * byte // bits, (8 * byte + 7) // bits + 1):
            shift = i * bits - 8 * byte
            part = codes[..., i] << shift if shift >= 0 else codes[..., i] >> -shift
            total = part if total is None else total | part
        packed.append(total)
    return jnp.stack(packed, axis=-1).reshape(*lead, codes.shape[-2] * size)[..., : packed_length(k, bits)]


def unpack(packed: jax.Array, bits: int, k: int, signed: bool) -> jax.Array:
    """The inverse of `pack`.

    Args:
      packed: uint8 (..., ceil(k * bits / 8)).
      bits: 1 to 8.
      k: how many codes a row holds.
      signed: whether the codes are in two's complement.

    Returns:
      int8 if `signed` else uint8, (..., k).

    Raises:
      ValueError: `bits` out of range, or `packed` does not have the bytes for `k` codes. TypeError: not uint8.

    >>> unpack(jnp.uint8([241, 3]), 4, 3, signed=True).tolist()
    [1, -1, 3]
    """
    _check_bits(bits)
    packed = jnp.asarray(packed)
    if packed.dtype != jnp.uint8:
        raise TypeError(f"`packed` must be uint8, got {packed.dtype}")
    if packed.shape[-1] != packed_length(k, bits):
        raise ValueError(f"`packed` must have {packed_length(k, bits)} bytes for `k`={k} codes of {bits} bits, "
                         f"got the shape {packed.shape}")  # fmt: skip
    if bits == 8:
        return jax.lax.bitcast_convert_type(packed, jnp.int8) if signed else packed
    *lead, _ = packed.shape
    values, size = 8 // math.gcd(8, bits), bits // math.gcd(8, bits)
    packed = _pad_last(packed, size)
    packed = packed.reshape(*lead, packed.shape[-1] // size, size)
    codes = []
    for i in range(values):
        byte, shift = divmod(i * bits, 8)
        value = packed[..., byte] >> shift
        if shift + bits > 8:
            value = value | (packed[..., byte + 1] << (8 - shift))
        codes.append(value)
    codes = jnp.stack(codes, axis=-1).reshape(*lead, packed.shape[-2] * values)[..., :k]
    if not signed:
        return codes & (2**bits - 1)
    return jax.lax.bitcast_convert_type(codes << (8 - bits), jnp.int8) >> (8 - bits)
