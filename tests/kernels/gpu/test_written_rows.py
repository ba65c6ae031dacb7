"""Rows of y that threads write themselves: any number of rows is one kernel, whose threads write each element once."""

import re

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from qjax_kernels.gpu.tiles import Tiles
from qjax_kernels.gpu.weight_only import weight_only_matmul

pytest.importorskip("absl")

from qjax_kernels.gpu.written_rows import element

from tests.kernels.gpu.simulator import launch


def shapes(m, n, k):
    make = jax.ShapeDtypeStruct
    return make((m, k), jnp.bfloat16), make((n, k), jnp.int4), make((n, k // 128), jnp.float32)


def program(m: int, n: int, k: int) -> str:
    """The program for a GPU around its kernel."""
    function = jax.jit(lambda x, w, s: weight_only_matmul(x, w, s, group_size=128))
    text = function.trace(*shapes(m, n, k)).lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("stablehlo.custom_call") == 1
    return re.sub(r"mhlo.backend_config = \{[^\n]*\}", "", text)


@pytest.mark.parametrize(("m", "n", "k"), [(3, 8192, 28672), (5, 8192, 8192), (9, 4096, 14336), (12, 28672, 8192), (15, 8192, 8192)])
def test_few_rows_are_neither_padded_nor_cut(m, n, k):
    text = program(m, n, k)
    assert not re.search(r"stablehlo\.(pad|slice|dynamic_slice|concatenate)", text)


def test_seventeen_rows_are():
    """The copy engine takes whole eights, here as before: the test above can fail."""
    text = program(17, 8192, 8192)
    assert "stablehlo.pad" in text and "stablehlo.slice" in text


@pytest.mark.parametrize(
    ("m", "n", "fields", "parts"),
    [
        (16, 256, {}, 1),
        (12, 256, {}, 1),
        (16, 192, {}, 1),  # the second block has 64 rows of w
        (24, 256, {}, 2),  # the second block of rows of x has eight: a part of its own
        (13, 256, {"block_n": 64}, 1),
    ],
)
def test_each_element_is_written_once_and_none_behind_the_last_row(m, n, fields, parts):
    from tests.kernels.gpu.lowering import lowered

    tiles = Tiles(**({"block_m": 16, "block_n": 128, "block_k": 256, "stages": 2, "warpgroups": 2, "digits": True} | fields))
    (kernel,) = lowered(4, m, n, 1024, tiles)
    each = 64 * tiles.block_m // 128  # of 64 rows of w, which a warpgroup has
    assert kernel.count("st.global.b16") == each * parts
    left = m % tiles.block_m
    guard = rf"value = {left} : i32}}[^\n]*\n[^\n]*arith.cmpi\"\([^\n]*predicate = 6 [^\n]*\n[^\n]*scf.if"  # 6: less, unsigned
    assert len(re.findall(guard, kernel)) == (each if left else 0)


@pytest.mark.parametrize(("columns", "count"), [(8, None), (16, 12), (24, 17), (8, 3)])
def test_threads_write_where_numbers_belong(columns, count):
    """Of 64 rows of w and so many of x, as the sums of the tensor cores lie: into the middle of a wider y."""
    n, (above, left) = 200, (2, 72)
    y = np.full((above + columns + 3, n), np.nan, ml_dtypes.bfloat16)
    part = np.random.default_rng(0).normal(size=(64, columns)).astype(np.float32)

    def block(w, _shared, base):
        at = base + w.integer(2 * (above * n + left))
        for i, half, j in np.ndindex(columns // 8, 2, 2):
            row = w.thread // 32 * 16 + w.thread % 32 // 4 + 8 * half
            column = w.thread % 4 * 2 + 8 * i + j
            element(w, at, n, row, column, part[row, column], count)

    launch(block, 1, 128, [y], 16)
    expected = np.full_like(y, np.nan)
    expected[above : above + (count or columns), left : left + 64] = part.T[:count]
    np.testing.assert_array_equal(y.astype(np.float32), expected.astype(np.float32))
