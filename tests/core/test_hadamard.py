"""The fast transforms against dense matrices in float64, on every form of size."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qjax.core import OnlineRotation, hadamard, hadamard_transform, random_signs, transform_factors

SIZES = (1, 2, 8, 64, 12, 24, 20, 28, 56, 36, 6, 42, 7, 43, 172)


def dense(size):
    """H / sqrt(n) written out: (Sylvester) (x) (Paley) (x) (Hartley)."""
    factors = transform_factors(size)
    h = np.ones((1, 1))
    for _ in range(factors.doublings):
        h = np.block([[h, h], [h, -h]])
    i = np.arange(factors.rest)
    angle = 2 * np.pi * np.outer(i, i) / factors.rest
    core = np.ones((1, 1))
    if factors.core > 1:  # through the public constructor, whose first column is ones: undo that sign by comparing with the transform
        core = np.asarray(hadamard_transform(jnp.eye(factors.core))) * np.sqrt(factors.core)
        np.testing.assert_allclose(np.abs(core), 1, atol=1e-5)
    return np.kron(np.kron(h, np.round(core)), np.cos(angle) + np.sin(angle)) / np.sqrt(size)


@pytest.mark.parametrize("size", SIZES)
def test_the_transform_is_an_orthogonal_matrix_and_its_inverse_undoes_it(size):
    matrix = np.asarray(hadamard_transform(jnp.eye(size)))
    np.testing.assert_allclose(matrix, dense(size), atol=2e-6)
    np.testing.assert_allclose(matrix.astype(np.float64) @ matrix.T, np.eye(size), atol=5e-6)
    np.testing.assert_allclose(hadamard_transform(jnp.eye(size), inverse=True), matrix.T, atol=1e-6)
    # One value alone becomes many small ones.
    assert np.abs(matrix).max() <= (1 if transform_factors(size).rest == 1 else np.sqrt(2)) / np.sqrt(size) + 1e-6


@pytest.mark.parametrize(("size", "doublings", "core", "rest"), [
    (4096, 12, 1, 1), (8192, 13, 1, 1), (14336, 9, 28, 1), (11008, 8, 1, 43), (5120, 8, 20, 1), (13824, 7, 108, 1),
    (18944, 7, 148, 1), (97, 0, 1, 97),
])  # fmt: skip
def test_sizes_of_models_are_split_into_small_dense_factors(size, doublings, core, rest):
    factors = transform_factors(size)
    assert (factors.doublings, factors.core, factors.rest) == (doublings, core, rest)
    assert 2**doublings * core * rest == size


@pytest.mark.parametrize("size", [2**k for k in range(8)])
def test_powers_of_two_are_sylvester_matrices(size):
    wanted = hadamard(size) if size not in (4, 8, 32) else None  # of these `hadamard` gives Paley's
    ours = np.asarray(hadamard_transform(jnp.eye(size)), np.float64) * np.sqrt(size)
    np.testing.assert_allclose(ours, dense(size) * np.sqrt(size), atol=1e-5)
    if wanted is not None and size < 4:
        np.testing.assert_array_equal(np.round(ours), wanted)


def test_any_axis_and_dtype():
    x = jax.random.normal(jax.random.key(0), (3, 12, 5))
    np.testing.assert_array_equal(hadamard_transform(x, axis=1), jnp.moveaxis(hadamard_transform(jnp.moveaxis(x, 1, -1)), -1, 1))
    assert hadamard_transform(x.astype(jnp.bfloat16), axis=1).dtype == jnp.bfloat16
    np.testing.assert_array_equal(jax.vmap(hadamard_transform)(x), hadamard_transform(x))


def test_it_costs_no_dense_product():
    """4096 x 4096 would be 33 million operations a row; the sums and differences are 49 thousand."""
    x = jax.ShapeDtypeStruct((8, 4096), jnp.float32)
    jaxpr = str(jax.make_jaxpr(hadamard_transform)(x))
    assert "dot_general" not in jaxpr
    assert jax.jit(hadamard_transform).lower(x).compile().cost_analysis()["flops"] < 8 * 4096 * 20
    x = jax.ShapeDtypeStruct((8, 14336), jnp.float32)
    assert jax.jit(hadamard_transform).lower(x).compile().cost_analysis()["flops"] < 8 * 14336 * 80


def test_signs_are_those_of_splitmix64():
    """The first outputs of the reference implementation for the seed 1234567 (Vigna's splitmix64.c)."""
    known = [6457827717110365317, 3203168211198807973, 9817491932198370423, 4593380528125082431, 16408922859458223821]
    np.testing.assert_array_equal(random_signs(5, 1234567), [-1.0 if z >> 63 else 1.0 for z in known])


@pytest.mark.parametrize("size", [16, 12, 6, 7])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_undoing_a_rotation_gives_the_same_bits_in_and_out_of_jit(size, dtype):
    rotation = OnlineRotation(seed=3)
    codes = jax.random.randint(jax.random.key(0), (9, size), -8, 8)
    scale = jax.random.uniform(jax.random.key(1), (9, 1))

    def back(codes, scale):
        return rotation.undo((codes.astype(jnp.float32) * scale).astype(dtype))

    np.testing.assert_array_equal(np.asarray(back(codes, scale), np.float32), np.asarray(jax.jit(back)(codes, scale), np.float32))


def test_a_seed_is_a_whole_number():
    for seed in (-1, 0.5, True):
        with pytest.raises(ValueError, match="`seed`"):
            OnlineRotation(seed)
    assert OnlineRotation(1) == OnlineRotation(1) and hash(OnlineRotation(1)) is not None
