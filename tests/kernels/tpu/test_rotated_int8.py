"""`rotated_int8` in interpret mode: integers are those of the codes that it rounds, the gradient that of the rotated product."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.linalg
from qjax_kernels.reference import dequantize, rotate
from qjax_kernels.request import Device, Request, Weight
from qjax_kernels.tpu.rotate import rotate_and_quantize
from qjax_kernels.tpu.rotated_int8 import rotated_int8, why_not
from qjax_kernels.tpu.tiles import Tile


@pytest.mark.parametrize(("m", "group", "codes", "dtype"), [(33, 512, jnp.int8, jnp.float32), (5, 128, jnp.int4, jnp.bfloat16)])
def test_the_product_is_that_of_its_codes(m, group, codes, dtype):
    rng, k, n = np.random.default_rng(0), 512, 200
    x = jnp.asarray(rng.normal(size=(m, k)), dtype).at[2].set(0)
    low = -8 if codes == jnp.int4 else -128
    w = jnp.asarray(rng.integers(low, -low, (k, n)), codes)
    scale = jnp.asarray(rng.uniform(0.5, 1.5, (k // group, n)), jnp.float32)
    how = {"group": group, "size": k, "chip": "v6e", "limit": Tile(32, 128, 256), "interpret": True}
    y, back = jax.vjp(lambda x: rotated_int8(x, w, scale, **how), x)
    q, row = (np.float64(a) for a in rotate_and_quantize(x, size=k, chip="v6e", interpret=True))
    dense = np.float64(dequantize(w, scale, group))
    exact = (q @ dense) * row
    assert not np.any(y[2])
    np.testing.assert_allclose(np.float64(y), exact, rtol=1e-5 if dtype == jnp.float32 else 2**-8, atol=1e-3)
    t = jnp.asarray(rng.normal(size=y.shape), dtype)
    rotation = scipy.linalg.hadamard(k) / np.sqrt(k)
    np.testing.assert_allclose(rotate(x, k), np.float64(x) @ rotation, atol=1e-5)
    wanted, (dx,) = np.float64(t) @ dense.T @ rotation, back(t)
    assert np.linalg.norm(np.float64(dx) - wanted) <= (1e-5 if dtype == jnp.float32 else 1e-2) * np.linalg.norm(wanted)


def test_reasons_are_named():
    request = Request(Device("tpu", "v6e"), 16, 4096, 4096, Weight("int", 8), activation="int8", rotation=4096)
    assert not why_not(request)
    for change, words in (
        ({"rotation": None}, "no rotation"),
        ({"rotation": 4000}, "a rotation of 4000 values in front of 4096"),
        ({"rotation": 5120, "k": 5120}, "power of two"),
        ({"device": Device("tpu", "tpu7x")}, "no integer matrix unit"),
        ({"activation": "int8 codes"}, "rounds them to int8"),
    ):
        assert words in why_not(dataclasses.replace(request, **change))
    with pytest.raises(ValueError, match="`group` must be a multiple of 128"):
        rotated_int8(jnp.ones((1, 128)), jnp.ones((128, 128), jnp.int8), jnp.ones((2, 128)), group=64, size=128, chip="v6e")
