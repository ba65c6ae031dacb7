"""Products of the C++ kernels against float64, for every instruction set of this machine."""

import concurrent.futures
import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from qjax_kernels import cpu, shapes
from qjax_kernels.cpu import layout, library, reference

HERE = library.load()
SETS = HERE.instruction_sets
needs_kernels = pytest.mark.skipif(bool(HERE.reason), reason=HERE.reason or "there")
EPS = 2.0**-24
ROUND = jax.jit(reference.round_rows, static_argnums=(1, 2, 3))


@functools.cache
def make(seed, bits, n, k, group, zero, parts=()):
    """(packed, the weight in float64): zero None, "int" or "float"."""
    rng = np.random.default_rng(seed)
    half = 2 ** (bits - 1)
    codes = rng.integers(-half, half, (*parts, n, k))
    codes[..., 0, :] = -half
    codes[..., 1, :] = 0
    groups = -(-k // group) if group else 1
    scales = rng.random((*parts, n, groups), np.float32) + np.float32(0.1)
    zeros = None
    if zero:
        codes = codes + half
        zeros = rng.integers(0, 2 * half, scales.shape)
    if zero == "float":
        zeros = (zeros + rng.random(scales.shape)).astype(np.float32)
    packed = cpu.prepack(codes, scales, zeros, bits=bits, signed=not zero, group_size=group)

    def spread(a):
        return np.repeat(a, group or k, -1)[..., :k].astype(np.float64)

    return packed, (codes - (0 if zeros is None else spread(zeros))) * spread(scales)


def worst(y, x, w):
    """The largest error in units of float32's rounding of sum |x| |w|."""
    exact, size = x @ np.swapaxes(w, -1, -2), np.abs(x) @ np.swapaxes(np.abs(w), -1, -2)
    return np.max(np.abs(np.asarray(y, np.float64) - exact) / (size + 1e-30)) / EPS


def rows(seed, m, k, dtype=jnp.float32):
    return jnp.asarray(np.random.default_rng(seed).standard_normal((m, k)), dtype)


# bits, N, K, group, zero points, M: tails of N, K and groups; rows that stack in a tile, fill one, and need two or three.
CASES = [
    (8, 48, 256, None, None, 1),
    (8, 37, 333, 48, "int", 17),
    (8, 37, 333, None, "float", 6),
    (4, 48, 256, 128, None, 5),
    (4, 48, 256, 32, "int", 35),
    (4, 37, 333, None, "float", 16),
    (4, 37, 333, 48, None, 3),
    (4, 70, 1100, None, "int", 18),
    (3, 37, 333, 128, "int", 2),
    (3, 48, 256, None, None, 17),
    (2, 37, 333, 32, None, 1),
    (2, 48, 256, 128, "float", 16),
    (4, 70, 1100, 128, "int", 1),  # single rows take four blocks at a time, and the fifth alone
    (4, 70, 1100, None, "float", 1),
    (8, 70, 333, 48, "int", 3),
    (4, 70, 1100, 128, "float", 4),
]
SHARED = [(4, case.n, case.k, case.group, None, case.m) for case in shapes.TESTS]


@needs_kernels
@pytest.mark.parametrize("name", SETS or ["none"])
def test_float_rows_round_only_sums(name):
    for seed, (bits, n, k, group, zero, m) in enumerate(CASES + SHARED):
        packed, w = make(seed, bits, n, k, group, zero)
        x = rows(seed, m, k, jnp.bfloat16 if seed % 2 else jnp.float32)
        y = cpu.matmul(x, packed, instruction_set=name, dtype=jnp.float32)
        assert worst(y, np.asarray(x, np.float64), w) < 12, (bits, n, k, group, zero, m)


@needs_kernels
@pytest.mark.parametrize("name", SETS or ["none"])
def test_integer_rows_equal_the_reference_before_scaling(name):
    for seed, (bits, n, k, group, zero, m) in enumerate(CASES):
        packed, w = make(seed, bits, n, k, group, zero)
        x = rows(seed, m, k, jnp.float32 if seed % 2 else jnp.bfloat16)
        rounding = cpu.Rounding() if seed % 3 else cpu.Rounding(127.0, -127, 127)
        y = cpu.matmul(x, packed, rounding=rounding, instruction_set=name, dtype=jnp.float32)
        codes, scale = ROUND(x, rounding.divisor, rounding.low, rounding.high)
        given = cpu.matmul_codes(codes, scale, packed, instruction_set=name)
        np.testing.assert_array_equal(y, given)  # the kernel's rounding is the reference's
        assert worst(y, np.asarray(codes, np.float64) * np.asarray(scale, np.float64), w) < 12, (bits, n, k, group, zero, m)


@needs_kernels
@pytest.mark.parametrize("name", SETS or ["none"])
@pytest.mark.parametrize("bits", [8, 4, 3, 2])
def test_integer_sums_are_exact(name, bits):
    """With scales of 1, codes at their ends and one group, every digit of the int32 sum must be there."""
    rng = np.random.default_rng(bits)
    n, k, half = 33, 1000, 2 ** (bits - 1)
    codes = rng.choice([-half, half - 1], (n, k))
    codes[0], codes[1] = -half, half - 1
    x = rng.choice([-128, 127], (21, k)).astype(np.int8)
    x[0], x[1] = -128, 127
    packed = cpu.prepack(codes, np.ones(n), bits=bits)
    for m in (1, 3, 4, 16, 21):
        y = cpu.matmul_codes(x[:m], jnp.ones((m, 1)), packed, instruction_set=name)
        np.testing.assert_array_equal(y, (x[:m].astype(np.int64) @ codes.T).astype(np.float32))


@needs_kernels
@pytest.mark.parametrize("name", SETS or ["none"])
def test_tables_of_sixteen_values(name):
    rng = np.random.default_rng(0)
    for bits, m in ((4, 1), (4, 19), (3, 2), (2, 5)):
        table = rng.standard_normal(2**bits).astype(np.float32)
        codes, scales = rng.integers(0, 2**bits, (37, 200)), rng.random((37, 4), np.float32)
        packed = cpu.prepack(codes, scales, bits=bits, signed=False, group_size=64, table=table)
        w = table[codes].astype(np.float64) * np.repeat(scales, 64, 1)[:, :200]
        x = rows(m, m, 200)
        assert worst(cpu.matmul(x, packed, instruction_set=name), np.asarray(x, np.float64), w) < 12


@needs_kernels
@pytest.mark.parametrize("name", SETS or ["none"])
def test_rows_of_zeros_infinities_and_nans(name):
    packed, w = make(0, 4, 48, 256, 64, None)
    x = np.array(rows(0, 20, 256))
    x[0], x[1, 3], x[2, 5], x[3] = 0, np.inf, np.nan, x[3] * 1e-42
    for m in (4, 20):
        for rounding in (None, cpu.Rounding()):
            y = np.asarray(cpu.matmul(jnp.asarray(x[:m]), packed, rounding=rounding, instruction_set=name))
            assert (y[0] == 0).all() and (np.abs(y[3]) < 1e-36).all()
            assert not np.isfinite(y[1]).any() if rounding else not np.isfinite(y[1][w[:, 3] != 0]).any()
            assert np.isnan(y[2]).all()
            assert np.isfinite(y[4:]).all()


@needs_kernels
def test_large_and_small_magnitudes_in_one_row_keep_float32():
    """Each number keeps its own 24 bits: no grid for the row."""
    packed, w = make(1, 4, 32, 128, 32, None)
    for m in (1, 8, 40):
        x = np.array(rows(2, m, 128)) * 10.0 ** np.random.default_rng(3).integers(-12, 12, (m, 128)).astype(np.float32)
        assert worst(cpu.matmul(jnp.asarray(x), packed), x.astype(np.float64), w) < 12


@needs_kernels
@pytest.mark.parametrize("name", SETS or ["none"])
@pytest.mark.parametrize("bits", [8, 4, 3])
def test_few_rows_are_exact_whatever_their_magnitudes(name, bits):
    """Rows that kernels may cut into digits: groups that fit a grid, one that does not, zeros, the ends of float32."""
    packed, w = make(7, bits, 80, 640, 128, None)
    product = jax.jit(functools.partial(cpu.matmul, instruction_set=name))
    x = np.array(rows(3, 1, 640))
    x[0, 130], x[0, 131], x[0, 256:384] = 3e20, 1e-20, 0  # one group of wide range, one of zeros
    x[0, 384:512] *= np.float32(1e-41)  # denormal
    x[0, 512:] *= np.float32(1e30)
    for columns in (slice(0, 128), slice(128, 256), slice(384, 512), slice(512, 640), slice(0, 640)):
        part = np.zeros_like(x)
        part[:, columns] = x[:, columns]
        if columns.start == 384:  # XLA's threads take denormal numbers for zeros
            assert np.max(np.abs(np.asarray(product(part, packed)))) < 1e-36
        else:
            assert worst(product(part, packed), part.astype(np.float64), w) < 8
    whole = np.random.default_rng(4).integers(-(2**9), 2**9, (1, 640)).astype(np.float32)  # sums of whole numbers are exact in float32
    ones = cpu.prepack(np.sign(w[:, ::-1]).astype(np.int8), np.ones((80, 5)), bits=bits, group_size=128)
    np.testing.assert_array_equal(product(whole, ones), whole @ np.sign(w[:, ::-1]).T)
    small = rows(5, 1, 640).at[0, 200:210:5].multiply(1e-6)  # two numbers with bits below the grid of their span
    several = np.concatenate([x, whole, small])
    assert worst(product(several, packed), several.astype(np.float64), w) < 8
    alone = np.concatenate([product(row[None], packed) for row in several])
    for m in {"avx512_vnni": (2, 3), "amx": (2,)}.get(name, ()):  # as digits: a row that does not fit is no matter to its neighbours
        for rows_of in (slice(m), slice(3 - m, 3)):
            np.testing.assert_array_equal(product(several[rows_of], packed), alone[rows_of])
    blind = np.where(np.arange(640) % 128 == 5, 0, np.sign(w[:, ::-1])).astype(np.int8)
    loud = np.where(np.arange(640) % 128 == 5, 2.0**12, 0) + np.where(np.arange(640) % 128 < 5, whole * 2.0**-30, 0)
    loud = loud.astype(np.float32)  # what meets nothing is 2^32 times as large as what is asked for
    np.testing.assert_array_equal(product(loud, cpu.prepack(blind, np.ones((80, 5)), bits=bits, group_size=128)), loud @ blind.T)
    for odd in (np.inf, np.nan):
        several[1, 3] = odd
        y = np.asarray(product(several[:2], packed))
        assert not np.isfinite(y[1][w[:, 3] != 0]).any() and np.isfinite(y[0]).all()


@needs_kernels
def test_experts():
    packed, w = make(4, 4, 37, 100, 32, "int", parts=(3,))
    x = jnp.asarray(np.random.default_rng(0).standard_normal((3, 6, 100)), jnp.float32)
    y = cpu.matmul(x, packed)
    for i in range(3):
        assert worst(y[i], np.asarray(x[i], np.float64), w[i]) < 12
    flat = x.reshape(18, 100)
    for sizes in ([6, 6, 6], [0, 17, 1], [5, 0, 7]):
        y, first = cpu.ragged_matmul(flat, packed, jnp.array(sizes)), 0
        for i, count in enumerate(sizes):
            if count:
                part = np.asarray(flat[first : first + count], np.float64)
                assert worst(y[first : first + count], part, w[i]) < 12
            first += count
        assert not np.asarray(y[first:]).any()
    with pytest.raises(Exception, match="sum greater than the rows"):
        jax.block_until_ready(cpu.ragged_matmul(flat, packed, jnp.array([9, 9, 1])))


@needs_kernels
@pytest.mark.parametrize("name", SETS or ["none"])
def test_many_columns_are_cut_into_pieces_of_several_lengths(name):
    """Pieces get shorter towards the end, and each column is in one of them: the bits are those of columns by themselves."""
    n, k = 16 * 197 + 5, 64
    rng = np.random.default_rng(0)
    codes, scales = rng.integers(-8, 8, (2, n, k)), rng.random((2, n, 2), np.float32)
    packed = cpu.prepack(codes, scales, bits=4, group_size=32)
    small = [cpu.prepack(codes[:, i : i + 512], scales[:, i : i + 512], bits=4, group_size=32) for i in range(0, n, 512)]
    for m in (1, 6, 40):
        x = rows(m, 2 * m, k).reshape(2, m, k)
        for rounding in (None, cpu.Rounding()):
            y = cpu.matmul(x, packed, rounding=rounding, instruction_set=name)
            apart = [cpu.matmul(x, w, rounding=rounding, instruction_set=name) for w in small]
            np.testing.assert_array_equal(y, jnp.concatenate(apart, -1))


@needs_kernels
def test_jit_vmap_scan():
    packed, _ = make(5, 4, 37, 100, 32, None)
    x = rows(5, 12, 100).reshape(3, 4, 100)
    whole = cpu.matmul(x, packed)
    np.testing.assert_array_equal(jax.jit(cpu.matmul)(x, packed), whole)
    np.testing.assert_allclose(jax.vmap(lambda x: cpu.matmul(x, packed))(x), whole, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(jax.lax.scan(lambda c, x: (c, cpu.matmul(x, packed)), 0, x)[1], whole, rtol=1e-5, atol=1e-5)
    assert "while" not in jax.jit(jax.vmap(lambda x: cpu.matmul(x, packed))).lower(x).as_text()
    stacked = [make(i, 4, 37, 100, 32, None)[0] for i in range(3)]
    both = jax.tree.map(lambda *a: jnp.stack(a), *stacked)
    apart = jnp.stack([cpu.matmul(x[i], stacked[i]) for i in range(3)])
    np.testing.assert_array_equal(jax.vmap(cpu.matmul)(x, both), apart)
    np.testing.assert_array_equal(jax.lax.scan(lambda c, a: (c, cpu.matmul(*a)), 0, (x, both))[1], apart)


@needs_kernels
def test_gradients():
    packed, w = make(6, 4, 37, 100, 32, "int")
    x, g = rows(6, 4, 100), rows(7, 4, 37)
    for rounding in (None, cpu.Rounding()):
        dx = jax.jit(jax.grad(lambda x, r=rounding: jnp.sum(cpu.matmul(x, packed, rounding=r) * g)))(x)
        np.testing.assert_allclose(dx, np.asarray(g, np.float64) @ w, rtol=1e-5, atol=1e-4)

    def of_scales(product):
        return jax.jit(jax.grad(lambda s: jnp.sum(product(dataclasses.replace(packed, scales=s)) * g)))(packed.scales)

    want = of_scales(lambda p: reference.matmul(x[None], p)[0])
    np.testing.assert_allclose(of_scales(lambda p: cpu.matmul(x, p)), want, rtol=1e-5)
    experts, w = make(4, 4, 37, 100, 32, "int", parts=(3,))
    dx = jax.jit(jax.grad(lambda x: jnp.sum(cpu.ragged_matmul(x, experts, jnp.array([1, 0, 3])) * g)))(x)
    np.testing.assert_allclose(dx, np.concatenate([g[:1] @ w[0], g[1:] @ w[2]]), rtol=1e-4, atol=1e-4)


@needs_kernels
def test_two_threads_at_once():
    packed, _ = make(8, 4, 256, 512, 128, None)
    x = rows(8, 33, 512)
    run = jax.jit(lambda x: cpu.matmul(x, packed, rounding=cpu.Rounding()))
    want = np.asarray(run(x))
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        for y in pool.map(lambda _: np.asarray(run(x)), range(60)):
            np.testing.assert_array_equal(y, want)


@needs_kernels
def test_compiled_program_holds_no_float_copy_of_the_weight():
    packed, _ = make(9, 4, 256, 512, 128, None)
    text = jax.jit(cpu.matmul).lower(rows(9, 2, 512), packed).compile().as_text()
    assert library.TARGET in text
    assert "f32[1,256,512]" not in text and "f32[256,512]" not in text and "dot(" not in text


def test_packed_bytes_and_round_trip():
    for seed, case in enumerate(CASES):
        packed, w = make(seed, *case[:-1])
        np.testing.assert_allclose(jax.jit(layout.dequantize)(packed)[0], w, rtol=1e-6, atol=1e-5)
    for bits in (2, 3, 4, 8):
        packed = cpu.prepack(np.zeros((64, 256), np.int8), np.ones((64, 2)), bits=bits, group_size=128)
        assert packed.codes.nbytes == 64 * 256 * bits // 8 and packed.scales.nbytes == 64 * 2 * 4


@pytest.mark.parametrize(("bits", "zero"), [(8, "int"), (4, None), (3, "float"), (2, None)])
def test_gathered_rows(bits, zero):
    packed, w = make(2, bits, 37, 333, 48, zero)
    index = np.array([[0, 36], [5, 5]])
    np.testing.assert_allclose(jax.jit(cpu.gather_rows)(packed, index), w[index], rtol=1e-6, atol=1e-5)
    text = jax.jit(cpu.gather_rows).lower(packed, index).compile().as_text()
    assert "f32[37,333]" not in text and "s32[37,333]" not in text
