import math
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qjax.core import pack, packed_length, unpack

GOLDEN = pathlib.Path(__file__).parent.parent / "golden" / "packing.npz"


def numpy_pack(codes: np.ndarray, bits: int) -> np.ndarray:
    """The bit stream spelled out bit by bit, with NumPy's own bit packing."""
    stream = (codes.astype(np.int64)[..., None] >> np.arange(bits)) & 1
    return np.packbits(stream.reshape(*codes.shape[:-1], -1).astype(np.uint8), axis=-1, bitorder="little")


def random_codes(rng, shape, bits: int, signed: bool) -> np.ndarray:
    lo, hi = (-(2 ** (bits - 1)), 2 ** (bits - 1)) if signed else (0, 2**bits)
    return rng.integers(lo, hi, shape).astype(np.int8 if signed else np.uint8)


@given(
    bits=st.integers(1, 8),
    signed=st.booleans(),
    shape=st.tuples(st.sampled_from([(), (1,), (3,), (2, 2)]), st.integers(1, 41)).map(lambda t: (*t[0], t[1])),
    seed=st.integers(0, 2**32 - 1),
)
@settings(max_examples=40, deadline=None)
def test_round_trip_and_bits_against_numpy(bits, signed, shape, seed):
    codes = random_codes(np.random.default_rng(seed), shape, bits, signed)
    packed = jax.jit(pack, static_argnums=1)(codes, bits)
    np.testing.assert_array_equal(packed, numpy_pack(codes, bits))
    restored = jax.jit(unpack, static_argnums=(1, 2, 3))(packed, bits, shape[-1], signed)
    assert restored.dtype == codes.dtype
    np.testing.assert_array_equal(restored, codes)


@pytest.mark.parametrize("bits", range(1, 9))
def test_every_length_of_a_period(bits):
    """All residues of K, all code values, under jit, from int32 codes and from int8 codes."""
    for k in (1, 2, 3, 7, 8, 9, 13):
        codes = random_codes(np.random.default_rng(k), (3, k), bits, signed=True)
        packed = jax.jit(pack, static_argnums=1)(codes.astype(np.int32), bits)
        np.testing.assert_array_equal(packed, numpy_pack(codes, bits))
        np.testing.assert_array_equal(jax.jit(unpack, static_argnums=(1, 2, 3))(packed, bits, k, True), codes)


def test_three_bits_cost_three_bits():
    assert pack(jnp.zeros((5, 4096), jnp.int8), 3).nbytes == 5 * 4096 * 3 // 8
    assert [packed_length(9, bits) for bits in range(1, 9)] == [math.ceil(9 * bits / 8) for bits in range(1, 9)]


def test_int4_layout_by_hand():
    q = np.arange(-8, 8, dtype=np.int8)
    wanted = [(int(q[2 * r]) & 0xF) | ((int(q[2 * r + 1]) & 0xF) << 4) for r in range(8)]
    assert pack(jnp.asarray(q), 4).tolist() == wanted
    words = np.asarray(pack(jnp.asarray(q + 8), 4)).view("<u4")
    assert [hex(w) for w in words] == ["0x76543210", "0xfedcba98"]


@pytest.mark.parametrize("bits", [3, 4, 8])
def test_compressed_tensors_words(bits):
    """compressed-tensors stores code + 2^(b-1) in int32 words: the same stream, 3 bits dense across words too."""
    golden = np.load(GOLDEN)
    codes = golden[f"codes{bits}"].astype(np.int32) + 2 ** (bits - 1)
    packed = np.asarray(pack(jnp.asarray(codes), bits))
    np.testing.assert_array_equal(packed.view("<i4"), golden[f"packed{bits}"])


def test_vmap_and_no_gather():
    codes = random_codes(np.random.default_rng(0), (4, 3, 21), 3, signed=True)
    packed = jax.vmap(lambda c: pack(c, 3))(codes)
    np.testing.assert_array_equal(packed, numpy_pack(codes, 3))
    np.testing.assert_array_equal(jax.vmap(lambda p: unpack(p, 3, 21, True))(packed), codes)
    for bits in range(1, 9):
        text = jax.jit(lambda c, bits=bits: unpack(pack(c, bits), bits, 21, True)).lower(codes).as_text()
        assert "gather" not in text and "scatter" not in text


def test_errors():
    with pytest.raises(ValueError, match="`bits` must be an int from 1 to 8, got 9"):
        pack(jnp.zeros(3, jnp.int8), 9)
    with pytest.raises(TypeError, match="`codes` must hold integers, got float32"):
        pack(jnp.zeros(3), 4)
    with pytest.raises(ValueError, match="`packed` must have 2 bytes for `k`=3 codes of 4 bits"):
        unpack(jnp.zeros(3, jnp.uint8), 4, 3, True)
    with pytest.raises(TypeError, match="`packed` must be uint8, got int8"):
        unpack(jnp.zeros(2, jnp.int8), 4, 3, True)
