"""Hopper kernels through the interpreter against float64."""

import functools
import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from qjax_kernels import shapes
from qjax_kernels.gpu import eight_bit, weight_only
from qjax_kernels.gpu.chosen_tiles import eight_bit_tiles, weight_only_tiles
from qjax_kernels.gpu.epilogue import activated
from qjax_kernels.gpu.order import by_threads, in_order
from qjax_kernels.gpu.schedule import Schedule
from qjax_kernels.gpu.tiles import Tiles
from qjax_kernels.request import Device, Request, Weight

from qjax.program import compat

interpreted = pytest.mark.skipif(
    jax.version.__version_info__ < (0, 11), reason="the Mosaic GPU interpreter of jax 0.10 does not know transposed operands"
)
HOPPER = Device("cuda", "sm_90a", 132)


def relative(y, expected) -> float:
    return float(np.linalg.norm(np.asarray(y, np.float64) - expected) / np.linalg.norm(expected))


def near(y, x, w, scale_first: bool = False) -> None:
    """Every element within the stated rounding: y to bfloat16, the float32 sum, and the weight where it is scaled first."""
    expected, magnitude = np.float64(x) @ w.T, np.abs(np.float64(x)) @ np.abs(w.T)
    inside = 2**-8 if scale_first else x.shape[1] * 2**-24
    excess = np.abs(np.float64(y) - expected) - 2**-8 * np.abs(expected) - inside * magnitude
    assert np.max(excess) <= 0, np.max(excess)


@interpreted
@pytest.mark.parametrize(
    ("m", "n", "bits", "group", "tiles"),
    [
        (20, 192, 4, 128, Tiles(16, 128, 256, 2, split_k=2)),
        (16, 64, 4, 128, Tiles(16, 64, 256, 2)),
        (3, 128, 8, None, Tiles(8, 64, 256, 2)),
        (24, 128, 4, 256, Tiles(16, 128, 128, 2, warpgroups=2, scale_first=True)),
        (16, 200, 4, 128, Tiles(16, 192, 128, 2, warpgroups=3, scale_first=True)),
        (100, 128, 4, 128, Tiles(80, 128, 128, 3, warpgroups=2, scale_first=True)),  # a turn of the ring that is not whole, 64 + 16 rows
        (20, 320, 4, 128, Tiles(16, 256, 128, 3, warpgroups=2, scale_first=True)),
        (20, 512, 8, 128, Tiles(16, 256, 128, 3, warpgroups=2, scale_first=True, cluster=2)),
        (264, 192, 8, 128, Tiles(256, 128, 128, 2, warpgroups=2, scale_first=True)),
    ],
)
def test_weight_only_is_the_product_in_float64(m, n, bits, group, tiles):
    pytest.importorskip("absl")
    from tests.kernels.gpu.interpreter import interpreter, register_operands

    draw = np.random.default_rng(0)
    k, top = 1024, 2 ** (bits - 1)
    codes = draw.integers(-top, top, (n, k))
    codes[0], codes[1, :5] = 0, -top
    scales = jnp.asarray(draw.uniform(0.01, 0.1, (n, k // group if group else 1)), jnp.bfloat16)
    x = jnp.asarray(draw.normal(size=(m, k)), jnp.bfloat16)
    stored = jnp.asarray(by_threads(codes), jnp.int4) if bits == 4 else jnp.asarray(codes, jnp.int8)
    with register_operands():
        y = weight_only.weight_only_matmul(x, stored, scales, group_size=group, tiles=tiles, interpret=interpreter())
    near(y, x, codes * np.repeat(np.float64(scales), group or k, 1), tiles.scale_first)
    assert not np.asarray(y, np.float32)[:, 0].any()


def taken(case: shapes.Case) -> bool:
    return not weight_only.why_not(Request(HOPPER, case.m, case.n, case.k, Weight("int", 4, case.group if case.group != case.k else None)))


@interpreted
@pytest.mark.parametrize("case", [case for case in shapes.TESTS if taken(case)], ids=str)
def test_shared_shapes_with_default_tiles(case):
    pytest.importorskip("absl")
    from tests.kernels.gpu.interpreter import interpreter, register_operands

    draw = np.random.default_rng(0)
    codes, groups = draw.integers(-8, 8, (case.n, case.k)), case.k // case.group if case.group else 1
    scales = jnp.asarray(draw.uniform(0.01, 0.1, (case.n, groups)), jnp.float32)
    x = jnp.asarray(draw.normal(size=(case.m, case.k)), jnp.bfloat16)
    with register_operands():
        placed = jnp.asarray(by_threads(codes), jnp.int4)
        y = weight_only.weight_only_matmul(x, placed, scales, group_size=case.group, interpret=interpreter())
    near(y, x, codes * np.repeat(np.float64(scales), case.k // groups, 1))


@interpreted
@pytest.mark.parametrize(
    ("m", "n", "bits", "group", "tiles", "cores"),
    [
        (40, 384, 4, 128, Tiles(16, 128, 128, 2, warpgroups=2, scale_first=True), 7),  # nine tiles among seven blocks
        (20, 384, 4, 128, Tiles(16, 192, 128, 3, warpgroups=3, scale_first=True, cluster=2), 8),  # two pairs among four
        (40, 256, 4, None, Tiles(16, 128, 128, 3, warpgroups=2, scale_first=True), 5),
        (16, 128, 4, 128, Tiles(16, 128, 128, 4, warpgroups=2, scale_first=True), 4),  # one tile in four parts
        (140, 384, 8, 128, Tiles(80, 128, 128, 2, warpgroups=2, scale_first=True), 5),  # a stretch of 64 columns and one of 16
    ],
)
def test_tiles_that_blocks_share(m, n, bits, group, tiles, cores):
    pytest.importorskip("absl")
    from tests.kernels.gpu.interpreter import interpreter, register_operands

    draw, k = np.random.default_rng(0), 2048
    blocks_of_w = -(-n // (tiles.block_n * tiles.cluster))
    assert Schedule.of(-(-m // tiles.block_m), blocks_of_w, k // 128, tiles.stages, cores // tiles.cluster).shared
    codes = draw.integers(-(2 ** (bits - 1)), 2 ** (bits - 1), (n, k))
    scales = jnp.asarray(draw.uniform(0.01, 0.1, (n, k // group if group else 1)), jnp.bfloat16)
    x, bias = jnp.asarray(draw.normal(size=(m, k)), jnp.bfloat16), jnp.asarray(draw.normal(size=n), jnp.float32)
    with register_operands():
        stored = jnp.asarray(by_threads(codes), jnp.int4) if bits == 4 else jnp.asarray(codes, jnp.int8)
        how = {"group_size": group, "tiles": tiles, "cores": cores}
        y = weight_only.weight_only_matmul(x, stored, scales, bias=bias, activation="relu", interpret=interpreter(), **how)
    w = codes * np.repeat(np.float64(scales), group or k, 1)
    expected, magnitude = np.float64(x) @ w.T + np.float64(bias), np.abs(np.float64(x)) @ np.abs(w.T)
    assert np.all(np.abs(np.float64(y) - np.maximum(expected, 0)) <= 2**-8 * (np.abs(expected) + magnitude))


@interpreted
@pytest.mark.parametrize(
    ("m", "n", "k", "group", "block_k", "stages", "cores", "scale", "cut"),
    [
        (20, 192, 1024, 128, 256, 2, 132, jnp.bfloat16, {}),  # two blocks of rows, a tail of N
        (13, 128, 1408, 128, 256, 4, 132, jnp.float32, {}),  # a tail of K, turns that are not whole
        (3, 512, 1024, 256, 512, 2, 2, jnp.float16, {}),  # two whole tiles a block, one after the other
        (9, 384, 2048, 128, 128, 2, 7, jnp.float32, {}),  # three tiles among seven blocks
        (20, 384, 2048, 128, 128, 3, 4, jnp.bfloat16, {}),  # six among four: pieces and whole tiles
        (15, 128, 384, 384, 384, 2, 132, jnp.float16, {}),  # one stage
        (13, 128, 1408, 128, 256, 2, 132, jnp.float32, {"block_n": 64}),  # warpgroups share stages, the last half full
        (20, 256, 1536, 384, 384, 3, 4, jnp.bfloat16, {"block_n": 64, "warpgroups": 3}),  # more tiles than multiprocessors
        (3, 192, 1152, 384, 128, 2, 132, jnp.float32, {"split_k": 2}),  # clusters: nine stages in two parts
        (9, 128, 256, 128, 128, 2, 132, jnp.bfloat16, {"split_k": 3}),  # the first part has no stage
        (20, 192, 1024, 128, 256, 2, 132, jnp.bfloat16, {"block_n": 64, "split_k": 2}),  # both, of two blocks of rows
        (9, 128, 2560, 128, 1024, 2, 132, jnp.float32, {"block_n": 64}),  # scales of a stage are 32 bytes, half a stage at the end
        (3, 64, 3840, 384, 1024, 2, 132, jnp.float32, {"block_n": 64}),  # eight scales, of three stages
        (13, 320, 512, 128, 256, 2, 132, jnp.float16, {"block_n": 256}),  # warpgroups of 128 rows of w, the last of 64
        (8, 128, 640, 128, 128, 2, 132, jnp.bfloat16, {"block_n": 256, "split_k": 2}),
        (9, 192, 1024, 128, 128, 2, 132, jnp.bfloat16, {"block_n": 192, "warpgroups": 3, "split_k": 2}),  # one block ends two thirds
    ],
)
def test_digits_that_blocks_make(m, n, k, group, block_k, stages, cores, scale, cut):
    pytest.importorskip("absl")
    from qjax_kernels.gpu.digits_kernel import digits, units

    from tests.kernels.gpu.interpreter import interpreter, register_operands

    cut = {"block_n": 128, "warpgroups": 2} | cut
    draw, tiles = np.random.default_rng(0), Tiles(16 if m > 8 else 8, block_k=block_k, stages=stages, digits=True, **cut)
    codes = draw.integers(-8, 8, (n, k))
    scales = jnp.asarray(draw.uniform(0.01, 0.1, (n, k // group)), scale)
    x, bias = jnp.asarray(draw.normal(size=(m, k)), jnp.bfloat16), jnp.asarray(draw.normal(size=n), jnp.float32)
    with register_operands():
        how = {"group_size": group, "tiles": tiles, "cores": cores, "bias": bias, "activation": "relu", "interpret": interpreter()}
        y = weight_only.weight_only_matmul(x, jnp.asarray(by_threads(codes), jnp.int4), scales, **how)
    unit = units(jnp.pad(x, ((0, 0), (0, -k % 128))))
    high, low = np.float64(digits(x, unit))
    held = (256 * high + low) * np.repeat(np.float64(unit), 128, 1)
    assert np.abs(held - np.float64(x)).max() <= np.abs(np.float64(x)).max() * 2**-13
    w = codes * np.repeat(np.float64(scales), group, 1)
    expected, magnitude = held @ w.T + np.float64(bias), np.abs(held) @ np.abs(w.T)
    assert np.all(np.abs(np.float64(y) - np.maximum(expected, 0)) <= 2**-8 * np.abs(expected) + k * 2**-24 * magnitude)


@interpreted
def test_scales_that_were_padded_once_change_nothing():
    pytest.importorskip("absl")
    from tests.kernels.gpu.interpreter import interpreter, register_operands

    draw, (m, n, k) = np.random.default_rng(0), (3, 64, 384)
    codes, x = jnp.asarray(draw.integers(-8, 8, (n, k)), jnp.int4), jnp.asarray(draw.normal(size=(m, k)), jnp.bfloat16)
    scales = jnp.asarray(draw.uniform(0.01, 0.1, (n, 3)), jnp.bfloat16)
    run = functools.partial(weight_only.weight_only_matmul, x, codes, group_size=128, interpret=interpreter())
    with register_operands():
        np.testing.assert_array_equal(run(scales), run(weight_only.whole_rows(scales), padded_scales=True))


@interpreted
def test_eight_bits_that_blocks_share():
    pytest.importorskip("absl")
    from tests.kernels.gpu.interpreter import interpreter

    draw, (m, n, k), cores = np.random.default_rng(0), (300, 192, 2048), 8
    tiles = Tiles(128, 64, 128, 3, warpgroups=2, x_left=True, cluster=2)
    assert Schedule.of(2, 3, 16, 3, cores // 2).shared
    codes, scales = jnp.asarray(draw.integers(-127, 128, (n, k)), jnp.int8), jnp.asarray(draw.uniform(0.01, 0.1, n), jnp.float32)
    x = jnp.asarray(draw.normal(size=(m, k)), jnp.bfloat16)
    rows, row_scales = eight_bit.rounded_rows(x, jnp.int8)
    y = eight_bit.eight_bit_matmul(x, codes, scales, tiles=tiles, cores=cores, interpret=interpreter())
    exact = np.float64(rows) @ np.float64(codes).T * np.float64(row_scales)[:, None] * np.float64(scales)
    np.testing.assert_allclose(np.float64(y), exact, rtol=2**-8, atol=1e-6 * np.abs(exact).max())


def kernels_of(function, *arguments) -> list[tuple[list, list]]:
    """Shapes of operands and results of the Hopper kernels in a program for a GPU."""
    text = jax.jit(function).trace(*arguments).lower(lowering_platforms=("cuda",)).as_text()
    lines = [line for line in text.splitlines() if "mosaic_gpu" in line and "stablehlo.custom_call" in line]
    found = []
    for line in lines:
        taken, given = line.rsplit(" : ", 1)[1].split(" -> ")
        found.append(tuple(re.findall(r"tensor<([^>]*)>", side) for side in (taken, given)))
    return found


@pytest.mark.parametrize("eight", [False, True])
def test_products_of_one_program_share_no_memory_in_which_blocks_meet(eight):
    pytest.importorskip("absl")
    m, (k, n) = 256, (4096, 4096)
    assert Schedule.of(2, 32, 32, 4, 132).shared
    codes, scales = jnp.zeros((n, k), jnp.int8 if eight else jnp.int4), jnp.ones((n, 1 if eight else k // 128), jnp.float32)
    tiles = Tiles(128, 128, 128, 3, warpgroups=2, x_left=True) if eight else None

    def product(x):
        if eight:
            return eight_bit.scaled_product(x, jnp.ones(m), codes, scales, out_dtype=jnp.bfloat16, tiles=tiles)
        return weight_only.weight_only_matmul(x, codes, scales, group_size=128)

    x = jnp.ones((m, k), codes.dtype if eight else jnp.bfloat16)
    (alone,) = kernels_of(product, x)
    assert len(alone[0]) == 3 + eight  # operands are those of the product: what a kernel writes is its own
    assert len(alone[1]) == 3 and alone[1][1].endswith("x2xi32")
    # Of products side by side each has memory of its own.
    (several,) = kernels_of(jax.vmap(product), jnp.stack([x] * 3))
    assert several[1] == [f"3x{shape}" for shape in alone[1]]


def test_no_rows_are_no_rows():
    x, w, s = jnp.zeros((0, 256), jnp.bfloat16), jnp.ones((64, 256), jnp.int8), jnp.ones((64, 1))
    assert weight_only.weight_only_matmul(x, w, s).shape == (0, 64)
    assert eight_bit.eight_bit_matmul(x, w, s).shape == (0, 64)


def test_one_multiprocessor_is_one_group():
    assert weight_only_tiles(512, 4096, 4096, 4, cores=1) and eight_bit_tiles(512, 4096, 4096, cores=1)
    x, w, s = jnp.zeros((300, 256), jnp.bfloat16), jnp.ones((64, 256), jnp.int8), jnp.ones((64, 1))
    assert len(kernels_of(functools.partial(eight_bit.eight_bit_matmul, cores=1), x, w, s)) == 2  # rows are rounded, then multiplied


@interpreted
@pytest.mark.parametrize(
    ("m", "n", "dtype", "tiles"),
    [
        (3, 192, jnp.int8, Tiles(8, 64, 256, 2, split_k=2)),
        (24, 128, jnp.float8_e4m3fn, Tiles(16, 64, 128, 2)),
        (200, 64, jnp.int8, Tiles(128, 64, 128, 2, warpgroups=2, x_left=True, cluster=2)),
    ],
)
def test_eight_bits_are_the_product_of_the_rounded_rows(m, n, dtype, tiles):
    pytest.importorskip("absl")
    from tests.kernels.gpu.interpreter import interpreter, register_operands

    draw = np.random.default_rng(0)
    k, top = 512, 127 if dtype == jnp.int8 else 448
    codes = jnp.asarray(draw.integers(-128, 128, (n, k)) if dtype == jnp.int8 else draw.normal(size=(n, k)) * 30, dtype)
    # Rows whose scale is 1, and powers of two: nothing is rounded but the result, and it equals the integers' to the bit.
    scales = jnp.asarray(2.0 ** draw.integers(-6, 2, (n, 1)), jnp.float32)
    x = jnp.asarray(draw.integers(-16, 17, (m, k)), jnp.bfloat16).at[:, 0].set(top).at[1].set(0)
    q, s = eight_bit.rounded_rows(x, dtype)
    assert np.all(np.asarray(s) == 1) and np.array_equal(np.float32(q), np.float32(x))
    expected = np.float64(q) @ (np.float64(codes) * np.float64(scales)).T
    with register_operands():
        y = eight_bit.eight_bit_matmul(x, codes, scales, tiles=tiles, interpret=interpreter())
    if dtype == jnp.int8:
        np.testing.assert_array_equal(np.float32(y), np.float32(jnp.asarray(expected, jnp.float32).astype(jnp.bfloat16)))
    else:
        near(y, q, np.float64(codes) * np.float64(scales))
    assert not np.asarray(y, np.float32)[1].any()


@interpreted
@pytest.mark.parametrize(
    ("kernel", "activation", "tiles"),
    [
        ("weight-only", "gelu", Tiles(8, 128, 128, 2, warpgroups=2)),
        ("weight-only", "silu", Tiles(8, 128, 128, 2, warpgroups=2, digits=True)),
        ("weight-only", "relu", Tiles(8, 64, 128, 2, split_k=2)),
        ("eight bit", "silu", Tiles(64, 64, 128, 2, x_left=True)),
    ],
)
def test_bias_activation_and_short_rows_of_scales(kernel, activation, tiles):
    pytest.importorskip("absl")
    from tests.kernels.gpu.interpreter import interpreter, register_operands

    draw = np.random.default_rng(0)
    m, n, k = 5, 128, 384  # three groups: no row of scales is a multiple of 16 bytes
    x, bias = jnp.asarray(draw.normal(size=(m, k)), jnp.bfloat16), jnp.asarray(draw.normal(size=n), jnp.float32)
    how = {"bias": bias, "activation": activation, "tiles": tiles}
    with register_operands():
        if kernel == "weight-only":
            codes, scales = jnp.asarray(draw.integers(-8, 8, (n, k)), jnp.int4), jnp.asarray(draw.uniform(0.01, 0.1, (n, 3)), jnp.float32)
            y = weight_only.weight_only_matmul(x, codes, scales, group_size=128, **how, interpret=interpreter())
            rows, wide, codes = np.float64(x), np.repeat(np.float64(scales), 128, 1), in_order(codes)
        else:
            codes, scales = jnp.asarray(draw.integers(-128, 128, (n, k)), jnp.int8), jnp.asarray(draw.uniform(0.001, 0.01, (n, 1)))
            y = eight_bit.eight_bit_matmul(x, codes, scales, **how, interpret=interpreter())
            q, s = eight_bit.rounded_rows(x, jnp.int8)
            rows, wide = np.float64(q) * np.float64(s)[:, None], np.float64(scales)
    expected = activated(jnp.float32(rows @ (np.float64(codes) * wide).T + np.float64(bias)), activation)
    assert relative(y, np.asarray(expected)) < 4e-3  # y is bfloat16


@interpreted
def test_a_norm_divides_the_sums_before_the_bias_comes():
    pytest.importorskip("absl")
    from tests.kernels.gpu.interpreter import interpreter, register_operands

    draw = np.random.default_rng(0)
    x, bias = jnp.asarray(7 * draw.normal(size=(3, 256)), jnp.bfloat16), jnp.asarray(draw.normal(size=64), jnp.float32)
    codes, scales = jnp.asarray(draw.integers(-8, 8, (64, 256)), jnp.int4), jnp.asarray(draw.uniform(0.01, 0.1, (64, 2)), jnp.float32)
    how = {"group_size": 128, "bias": bias, "norm": 0.5, "activation": "relu"}
    with register_operands():
        y = weight_only.weight_only_matmul(x, codes, scales, **how, interpret=interpreter())
    wide, rows = np.float64(in_order(codes)) * np.repeat(np.float64(scales), 128, 1), np.float64(x)
    expected = np.maximum(rows @ wide.T / np.sqrt((rows**2).mean(1, keepdims=True) + 0.5) + np.float64(bias), 0)
    assert relative(y, expected) < 4e-3
    plain = weight_only.plain(x, bias, codes, scales, 128, "relu", 0.5)
    assert relative(plain, expected) < 4e-3


@pytest.mark.parametrize("activation", [None, "silu"])
def test_gradients_reach_rows_and_bias(activation, monkeypatch):
    draw = np.random.default_rng(0)
    x, bias = jnp.asarray(draw.normal(size=(4, 256)), jnp.bfloat16), jnp.asarray(draw.normal(size=64), jnp.float32)
    scales, t = jnp.asarray(draw.uniform(0.01, 0.1, (64, 2)), jnp.float32), jnp.asarray(draw.normal(size=(4, 64)), jnp.bfloat16)
    codes = draw.integers(-8, 8, (64, 256))
    placed = jnp.asarray(by_threads(codes), jnp.int4)
    # What runs forward is no matter: derivatives do not pass through it.
    monkeypatch.setattr(weight_only, "_run", lambda x, bias, codes, scales, **how: jnp.zeros((4, 64), x.dtype))
    monkeypatch.setattr(eight_bit, "_rounded", lambda x, **how: (x, x[:, 0]))
    monkeypatch.setattr(eight_bit, "scaled_product", lambda *args, **how: jnp.zeros((8, 64), jnp.bfloat16))

    def float_product(x, bias, scales):
        w = np.asarray(codes, np.float32) * np.repeat(scales, 256 // scales.shape[1], 1)
        return jnp.vdot(t, activated(x @ w.T + bias, activation))

    def grouped(x, bias):
        return jnp.vdot(t, weight_only.weight_only_matmul(x, placed, scales, group_size=128, bias=bias, activation=activation))

    def by_row(x, bias):
        y = eight_bit.eight_bit_matmul(x, jnp.asarray(codes, jnp.int8), scales[:, :1], bias=bias, activation=activation)
        return jnp.vdot(t, y)

    for ours, own in ((grouped, np.asarray(scales)), (by_row, np.asarray(scales[:, :1]))):
        got, want = jax.grad(ours, (0, 1))(x, bias), jax.grad(float_product, (0, 1))(x.astype(jnp.float32), bias, own)
        assert [a.dtype for a in got] == [x.dtype, bias.dtype]
        np.testing.assert_allclose(np.float32(got[0]), want[0], rtol=2**-8, atol=1e-5)
        np.testing.assert_allclose(got[1], want[1], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["weight-only", "eight bits"])
def test_layers_of_the_same_shapes_are_one_program(name):
    """What is traced once is lowered once: Mosaic takes seconds for each kernel."""
    x, s = jnp.ones((1, 256), jnp.bfloat16), jnp.ones((64, 2 if name == "weight-only" else 1), jnp.bfloat16)
    w = jnp.ones((64, 256), jnp.int4 if name == "weight-only" else jnp.int8)
    one = functools.partial(weight_only.weight_only_matmul, group_size=128) if name == "weight-only" else eight_bit.eight_bit_matmul

    def programs(jaxpr):
        for eqn in jaxpr.eqns:
            if eqn.params.get("name") in ("_run", "scaled_product"):
                yield eqn.params["jaxpr"]
            else:
                for _, inner in compat.subprograms(eqn):
                    yield from programs(compat.parts(inner)[0])

    found = list(programs(jax.make_jaxpr(lambda x, w, s: one(x, w, s) + one(x, w, s))(x, w, s).jaxpr))
    assert len(found) == 2 and found[0] is found[1]


def test_the_example_of_the_readme_is_lowered():
    pytest.importorskip("absl")
    page = (pathlib.Path(__file__).parents[3] / "kernels" / "README.md").read_text()
    (code,) = [block for block in re.findall(r"```python\n(.*?)```", page, re.DOTALL) if "def laid_out" in block]
    scope: dict = {}
    exec(compile(code, "kernels/README.md", "exec"), scope)
    x, scales = jax.ShapeDtypeStruct((4, 4096), jnp.bfloat16), jax.ShapeDtypeStruct((4096, 32), jnp.bfloat16)
    four, eight = (jax.ShapeDtypeStruct((4096, 4096), dtype) for dtype in (jnp.int4, jnp.int8))
    rows = jax.ShapeDtypeStruct((20, 4096), jnp.bfloat16)
    for function, *given in (
        (lambda x, w, s: scope["four"](x, scope["laid_out"](w), s), x, four, scales),
        (scope["four"], x, eight, scales),
        (scope["eight"], x, eight, jax.ShapeDtypeStruct((4096, 1), jnp.bfloat16)),
        (scope["chosen"], x, four, scales),
        (scope["chosen"], rows, four, scales),
    ):
        assert "mosaic_gpu" in jax.jit(function).trace(*given).lower(lowering_platforms=("cuda",)).as_text()
