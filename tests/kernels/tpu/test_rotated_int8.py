"""`rotated_int8` in interpret mode: integers are those of the codes that it rounds, the gradient that of the rotated product."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.linalg
from jax.experimental.pallas import tpu as pltpu
from qjax_kernels.reference import rotate
from qjax_kernels.request import Device, Request, Weight
from qjax_kernels.tpu.rotate import rotate_and_quantize
from qjax_kernels.tpu.rotated_int8 import rotated_int8, why_not
from qjax_kernels.tpu.tiles import Tile


def test_the_product_is_that_of_its_codes_and_the_gradient_that_of_the_rotated_product():
    rng, m, k, n = np.random.default_rng(0), 33, 256, 200
    x, t = (jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in ((m, k), (m, n)))
    x, w = x.at[2].set(0), jnp.asarray(rng.integers(-128, 128, (k, n)), jnp.int8)
    scale = jnp.asarray(rng.uniform(0.5, 1.5, (1, n)), jnp.float32)
    run = functools.partial(rotated_int8, group=k, size=k, chip="v6e", limit=Tile(32, 128, 128), interpret=True)

    @jax.jit
    def all_of(x):
        y, back = jax.vjp(lambda x: run(x, w, scale), x)
        return y, back(t)[0], rotate(x, k), *rotate_and_quantize(x, size=k, chip="v6e", interpret=True)

    y, dx, z, codes, row = (np.float64(a) for a in all_of(x))
    dense, rotation = np.float64(w) * np.float64(scale), scipy.linalg.hadamard(k) / np.sqrt(k)
    assert not np.any(y[2])
    np.testing.assert_allclose(y, (codes @ dense) * row, rtol=1e-6, atol=1e-3)
    np.testing.assert_allclose(z, np.float64(x) @ rotation, atol=1e-5)
    wanted = np.float64(t) @ dense.T @ rotation
    assert np.linalg.norm(dx - wanted) <= 1e-5 * np.linalg.norm(wanted)


@pytest.mark.slow
def test_no_race(capfd):
    x, w = jnp.asarray(np.random.default_rng(0).normal(size=(5, 256)), jnp.float32), jnp.ones((256, 130), jnp.int8)
    run = functools.partial(rotated_int8, x, w, jnp.ones((1, 130)), group=256, size=256, chip="v6e", limit=Tile(32, 128, 128))
    y = run(interpret=pltpu.InterpretParams(detect_races=True))
    assert "RACE" not in capfd.readouterr().out
    np.testing.assert_allclose(y, run(interpret=True), rtol=1e-6)


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
