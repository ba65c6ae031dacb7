import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qjax.core import codebook, codebook_decode, codebook_encode, codebook_params, fp4, nf4, quantize

GOLDEN = np.load(pathlib.Path(__file__).parent.parent / "golden" / "bitsandbytes.npz")

# The table as bitsandbytes prints it, every digit.
NF4 = """-1.0 -0.6961928009986877 -0.5250730514526367 -0.39491748809814453 -0.28444138169288635 -0.18477343022823334
-0.09105003625154495 0.0 0.07958029955625534 0.16093020141124725 0.24611230194568634 0.33791524171829224
0.44070982933044434 0.5626170039176941 0.7229568362236023 1.0"""


def test_nf4_levels_digit_by_digit():
    assert [repr(v) for v in nf4().levels] == NF4.split()
    assert all(float(np.float32(v)) == v for v in nf4().levels)


def test_fp4_levels():
    magnitudes = [0, 0.0625, 8, 12, 4, 6, 2, 3]
    assert [v * 12 for v in fp4().levels[:8]] == magnitudes
    assert [v * 12 for v in fp4().levels[8:]] == [-m for m in magnitudes]


@pytest.mark.parametrize("spec", [nf4(), fp4()], ids=str)
def test_bitsandbytes_codes_absmax_and_values(spec):
    x = GOLDEN["x"]
    q = quantize(jnp.asarray(x), spec, axes=(-1,))
    high, low = GOLDEN[f"{spec.name}_codes"].reshape(-1) >> 4, GOLDEN[f"{spec.name}_codes"].reshape(-1) & 15
    codes = np.stack([high, low], axis=-1).reshape(x.shape)
    np.testing.assert_array_equal(q.codes_unpacked(), codes)
    np.testing.assert_array_equal(q.scale.reshape(-1), GOLDEN[f"{spec.name}_absmax"][: x.size // 64])
    np.testing.assert_array_equal(q.dequantize(), GOLDEN[f"{spec.name}_dequantized"])


@pytest.mark.parametrize(("spec", "wanted"), [(nf4(), 0.072798), (fp4(), 0.096543)], ids=str)
def test_mean_absolute_error_on_a_normal_distribution(spec, wanted):
    x = jnp.asarray(np.random.default_rng(0).standard_normal((1024, 2048)), jnp.float32)
    error = jnp.mean(jnp.abs(quantize(x, spec, axes=(-1,)).dequantize() - x))
    assert abs(float(error) - wanted) < 7.4e-5


@pytest.mark.parametrize(
    "spec", [nf4(), fp4(), codebook(np.linspace(-1, 1, 256)), codebook([0.5, -1, 1, -0.25])], ids=str
)
def test_every_level_codes_to_itself(spec):
    levels = np.float32(spec.levels)
    codes = codebook_encode(jnp.asarray(levels), jnp.ones(1), spec)
    np.testing.assert_array_equal(codes, [list(levels).index(v) for v in levels])


@pytest.mark.parametrize("spec", [nf4(), fp4(), codebook(np.linspace(-1, 1, 256))], ids=str)
def test_nearest_level_by_brute_force(spec):
    x = np.random.default_rng(1).uniform(-1, 1, 4096).astype(np.float32)
    value = codebook_decode(codebook_encode(jnp.asarray(x), jnp.ones(1), spec), jnp.ones(1), spec)
    levels = np.float64(np.float32(spec.levels))
    nearest = levels[np.argmin(np.abs(levels - x[:, None]), axis=-1)]
    np.testing.assert_array_equal(value, nearest)


def test_a_tie_goes_down():
    """At a float32 midpoint bitsandbytes' `x > midpoint` stays below."""
    levels = np.sort(np.float32(nf4().levels))
    midpoints = (levels[1:] + levels[:-1]) * np.float32(0.5)
    encode = jax.jit(lambda x: codebook_encode(x, jnp.ones(1), nf4()))
    np.testing.assert_array_equal(encode(midpoints), np.arange(15))
    np.testing.assert_array_equal(encode(np.nextafter(midpoints, np.float32(2))), np.arange(1, 16))


def test_the_two_zeros_of_fp4():
    codes = codebook_encode(jnp.float32([0.0, -0.0, 1e-30, -1e-30]), jnp.ones(1), fp4())
    assert codes.tolist() == [0, 0, 8, 0]


@pytest.mark.parametrize("magnitude", [1e-37, 1e-20, 1.0, 8.5e37, 8.6e37, 3.4e38])
def test_the_largest_value_of_a_block_is_exact(magnitude):
    x = jnp.float32([[magnitude, -magnitude, magnitude / 2, 0.0]])
    absmax = codebook_params(x, nf4())
    value = codebook_decode(codebook_encode(x, absmax, nf4()), absmax, nf4())
    np.testing.assert_array_equal(value[0, :2], x[0, :2])
    np.testing.assert_allclose(value[0, 2], x[0, 2], rtol=0.15)


def test_zero_blocks_even_without_a_zero_level():
    spec = codebook([-1.0, -0.5, 0.5, 1.0], group_size=4)
    q = quantize(jnp.zeros((2, 8)), spec, axes=(-1,))
    assert not np.any(q.dequantize()) and not np.any(q.scale)
