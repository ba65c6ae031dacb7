"""The dynamic maps: their tables are bitsandbytes', and codes found by arithmetic are those that a search finds."""

import pathlib

import jax
import jax.numpy as jnp
import numpy as np

from qjax.core import DYNAMIC, UNSIGNED_DYNAMIC, codebook_encode, codebook_params, dynamic_encode

GOLDEN = np.load(pathlib.Path(__file__).parent.parent / "golden" / "bitsandbytes_optim.npz")
BOTH = ((DYNAMIC, True), (UNSIGNED_DYNAMIC, False))


def test_the_tables_are_those_of_bitsandbytes():
    np.testing.assert_array_equal(np.float32(DYNAMIC.levels), GOLDEN["signed"])
    np.testing.assert_array_equal(np.float32(UNSIGNED_DYNAMIC.levels), GOLDEN["unsigned"])


def test_arithmetic_finds_the_codes_of_a_search():
    for spec, signed in BOTH:
        levels, order = np.float32(spec.levels), np.arange(256)
        middles = (levels[1:] + levels[:-1]) / 2
        # Away from zero is up on one side of it and down on the other.
        inner, outer = (middles * np.float32(side) for side in (1 - 1e-5, 1 + 1e-5))
        low, high = np.minimum(inner, outer), np.maximum(inner, outer)
        x = np.random.default_rng(0).standard_normal((16, 256)).astype(np.float32) ** 5 * np.float32(3e5)
        x = (x if signed else np.abs(x)) * np.float32([0, 1e-38, 1e30, *[1] * 13])[:, None]

        @jax.jit
        def run(near, x, spec=spec, signed=signed):
            absmax = codebook_params(x, spec)
            pair = dynamic_encode(x, absmax, signed), codebook_encode(x, absmax, spec)
            return dynamic_encode(near, jnp.float32(1), signed), *pair

        near, found, wanted = map(np.asarray, run(np.concatenate([levels, low, high]), x))
        np.testing.assert_array_equal(near, np.concatenate([order, order[:-1], order[1:]]))
        assert found.dtype == np.uint8 and np.mean(found != wanted) < 1e-3 and np.max(np.abs(found.astype(int) - wanted)) <= 1
        assert np.all(found[0] == levels.tolist().index(0.0))
