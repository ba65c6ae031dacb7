"""`rotate_and_quantize` in interpret mode against SciPy's Hadamard matrix."""

import jax.numpy as jnp
import numpy as np
import pytest
import scipy.linalg
from jax.experimental.pallas import tpu as pltpu
from qjax_kernels.tpu.rotate import rotate_and_quantize, why_not


def rotated(x, size):
    m, k = x.shape
    return (np.float64(x).reshape(m, -1, size) @ scipy.linalg.hadamard(size) / np.sqrt(size)).reshape(m, k)


@pytest.mark.parametrize(("m", "k", "size"), [(5, 512, 512), (33, 384, 128), (70, 512, 256)])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_codes_are_those_of_the_rotated_row(m, k, size, dtype):
    x = jnp.asarray(np.random.default_rng(0).normal(size=(m, k)), dtype).at[2].set(0)
    codes, scale = rotate_and_quantize(x, size=size, chip="v6e", interpret=True)
    z = rotated(x, size)
    expected = np.abs(z).max(axis=1, keepdims=True) / 127.5
    expected[2] = 1
    np.testing.assert_allclose(scale, expected, rtol=1e-5)
    assert np.abs(np.clip(z / expected, -128, 127) - np.float64(codes)).max() <= 0.5 + 1e-3
    assert not np.any(codes[2])


@pytest.mark.slow
def test_no_race(capfd):
    x = jnp.asarray(np.random.default_rng(0).normal(size=(40, 256)), jnp.float32)
    codes, _ = rotate_and_quantize(x, size=256, chip="v6e", interpret=pltpu.InterpretParams(detect_races=True))
    assert "RACE" not in capfd.readouterr().out
    np.testing.assert_array_equal(codes, rotate_and_quantize(x, size=256, chip="v6e", interpret=True)[0])


def test_reasons_are_named():
    assert not why_not("tpu", "v6e", 4096, 128)
    assert "power of two" in why_not("tpu", "v6e", 4096, 96)
    assert "do not fit vector memory" in why_not("tpu", "v6e", 2**18, 128)
    with pytest.raises(ValueError, match="`size`"):
        rotate_and_quantize(jnp.ones((1, 300)), size=256, chip="v6e")
