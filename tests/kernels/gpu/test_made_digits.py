"""Digits that are made in shared memory, thread by thread in NumPy, to the bit."""

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

pytest.importorskip("absl")

from qjax_kernels.gpu.digits_kernel import as_met, digits, units
from qjax_kernels.gpu.made_digits import make

from tests.kernels.gpu.simulator import launch


def rows_laid(tile: np.ndarray) -> np.ndarray:
    """Bytes of a matrix as the copy engine lays whole rows: stretches of 128 bytes, whose sixteens swap places by the stretch's number."""
    sixteens = np.ascontiguousarray(tile).view(np.uint8).reshape(-1, 8, 16)
    stretch, place = np.ogrid[: len(sixteens), :8]
    return sixteens[stretch, place ^ (stretch & 7)].reshape(-1)


def laid(tile: np.ndarray) -> np.ndarray:
    """Bytes of a matrix as the tensor cores read it: tiles of eight rows of 128 bytes, whose sixteens swap places."""
    rows, size = tile.shape[0], tile.itemsize
    cut = tile.reshape(rows // 8, 8, -1, 128 // size).swapaxes(1, 2)  # eight rows, columns, row, column
    sixteens = np.ascontiguousarray(cut).view(np.uint8).reshape(*cut.shape[:3], 8, 16)
    row, place = np.ogrid[:8, :8]
    return sixteens[:, :, row, place ^ row].reshape(-1)


@pytest.mark.parametrize(("block_m", "block_k"), [(16, 512), (8, 128), (24, 256), (8, 1024), (32, 128), (16, 384), (24, 640)])
def test_digits_and_units_are_those_of_the_formula(block_m, block_k):
    draw = np.random.default_rng(block_m)
    x = (draw.normal(size=(block_m, block_k)) * np.exp(3 * draw.normal(size=(block_m, 1)))).astype(ml_dtypes.bfloat16)
    x[0, :128], x[1, 5], x[2, 100] = 0, np.inf, np.nan
    x[3, :64] = np.arange(64) * 2.0**-40  # much smaller than the largest: digits are zero
    x[4, :128] = 1.5 + np.arange(128) % 2 * 2.0**-7
    pieces = block_k // 128
    begin = [0, x.nbytes, 2 * x.nbytes]

    def block(w, _shared):
        w.shared[: x.nbytes], w.written[: x.nbytes] = rows_laid(x), True  # the copy engine has
        make(w, block_m, block_k, *(w.integer(each) for each in begin))

    (machine,) = launch(block, 1, 128, [], begin[2] + 4 * pieces * block_m)
    assert machine.written.all()
    assert machine.group_barriers == 1, "the tensor cores read behind a barrier"
    unit = machine.shared[begin[2] :].view(np.float32).reshape(pieces, block_m).T

    finite = np.isfinite(x.astype(np.float32)).reshape(block_m, pieces, 128).all(2)
    assert finite.sum() == block_m * pieces - 2
    wanted = units(jnp.asarray(x))
    np.testing.assert_array_equal(unit, np.where(finite, wanted, np.nan))  # XLA's maximum drops NaN on CPUs
    made = machine.shared[begin[1] : begin[2]]
    sides = np.asarray(as_met(digits(jnp.asarray(x), wanted)))
    known = np.repeat(finite, 128, axis=1)  # where a unit is NaN digits do not matter
    place = laid(np.concatenate([known, known]).astype(np.int8)).astype(bool)
    np.testing.assert_array_equal(made.view(np.int8)[place], laid(np.concatenate(list(sides)))[place].view(np.int8))
