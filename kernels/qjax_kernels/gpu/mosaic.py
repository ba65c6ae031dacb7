"""What the kernels need from Mosaic GPU, under one name in every release of jax from 0.10.2 on."""

import jax
from jax.experimental import pallas as pl  # noqa: F401
from jax.experimental.pallas import mosaic_gpu as plgpu

LANE = plgpu.LoweringSemantics.Lane
Layout = plgpu.Layout
ACC = plgpu.ACC  # pyright: ignore[reportPrivateImportUsage]


def load(ref, layout, optimized: bool = True):
    """Reads all of a reference into registers of a layout; 0.10 wants the index apart."""
    if jax.__version_info__ < (0, 11):
        return plgpu.load(ref, (), layout=layout, optimized=optimized)
    return plgpu.load(ref, layout=layout, optimized=optimized)  # pyright: ignore[reportCallIssue]


def transposed(ref):
    """The transposed view of a matrix in shared memory."""
    if jax.__version_info__ < (0, 11):
        return plgpu.transpose_ref(ref, (1, 0))
    return ref.T


def swizzled(columns: int, bits: int):
    """Transforms of a matrix in shared memory, tiled for the copy engine and the tensor cores.

    Args:
      columns: of the matrix in shared memory.
      bits: of an element.

    Returns:
      The transforms: tiles of eight rows as wide as the swizzle, which is the widest (up to 128 bytes) that divides a row.
    """
    swizzle = next(s for s in (128, 64, 32) if columns * bits % (s * 8) == 0)
    return (plgpu.TilingTransform((8, swizzle * 8 // bits)), plgpu.SwizzleTransform(swizzle))


def swizzled_rows(bits: int):
    """Transforms of a matrix in shared memory whose rows lie one behind the other, of any number of rows in device memory.

    The tensor cores cannot read it. A row is a multiple of 128 bytes.

    Args:
      bits: of an element.

    Returns:
      The transforms: stretches of 128 bytes, whose sixteens swap places by the number of the stretch.
    """
    return (plgpu.TilingTransform((1024 // bits,)), plgpu.SwizzleTransform(128))
