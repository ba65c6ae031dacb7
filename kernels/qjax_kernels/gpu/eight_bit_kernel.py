"""The Hopper kernel of products whose two sides have eight bits: int8 or e4m3 on the tensor cores, scales of both at the end."""

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from .epilogue import Activation
from .mosaic import LANE, swizzled, transposed
from .pipeline import Epilogue, column_values, fetch_vector, over_columns, over_rows, row_values, staging, store, stream, vector_size
from .tiles import Tiles


def eight_bit(
    x: jax.Array, x_scale: jax.Array, w: jax.Array, w_scale: jax.Array, *, tiles: Tiles, out_dtype=jnp.bfloat16,
    bias: jax.Array | None = None, activation: Activation | None = None, interpret=None,
) -> jax.Array:  # fmt: skip
    """The kernel: few rows of x stand on the right of the tensor cores, in multiples of 8, many on the left, in multiples of 64.

    Args:
      x: (M, K) int8 or float8_e4m3fn, M below 8 or a multiple of 8.
      x_scale: (M,) float32, or longer: the copy engine reads 128 bytes at a time.
      w: (N, K) of the type of x.
      w_scale: (N,) bfloat16, float16 or float32.
      tiles: the cut; `x_left` says which side x stands on, and the warpgroups divide the left side.
      out_dtype: of y where K is not split.
      bias: (N,) or None.
      activation: of the scaled sums; it and the bias wait for the sum of all parts where K is split.
      interpret: as `pallas` takes it.

    Returns:
      (M, N), or (split_k, M, N) float32 parts, scaled, that are to be added.
    """
    m, k = x.shape
    n = w.shape[0]
    bm, bn, bk, workers = tiles.block_m, tiles.block_n, tiles.block_k, tiles.warpgroups
    left_rows, right_rows = (bm // workers, bn) if tiles.x_left else (bn // workers, bm)
    shape = (left_rows, right_rows)
    staged = staging(shape, transpose=not tiles.x_left)
    steps = -(-k // (bk * tiles.split_k))
    split = tiles.split_k > 1
    result = jnp.dtype(jnp.float32 if split else out_dtype)
    sums = jnp.int32 if x.dtype == jnp.int8 else jnp.float32
    together = tiles.cluster

    end = Epilogue.of(bias, activation, split)

    def hopper_eight_bit(x_gmem, xs_gmem, w_gmem, ws_gmem, *rest):
        b_gmem, (out_gmem, out_smem, left_smem, right_smem, barriers, *b_smem) = end.taken(rest)
        k_part, n_block = lax.axis_index("k"), lax.axis_index("n")
        m_block = lax.axis_index("m") * together + (lax.axis_index("cluster") if together > 1 else 0)
        worker = lax.axis_index("wg") if workers > 1 else 0
        first = worker * left_rows

        def advance(_, x_ref, w_ref, acc, settle):
            left, right = (x_ref, w_ref) if tiles.x_left else (w_ref, x_ref)
            plgpu.wgmma(acc, left.at[pl.ds(first, left_rows)] if workers > 1 else left, transposed(right))
            settle()

        def finish(total):
            m_start, n_start = m_block * bm, n_block * bn
            if tiles.x_left:
                m_start += first
            else:
                n_start += first
            (left, left_at), (right, right_at) = ((xs_gmem, m_start), (ws_gmem, n_start))[:: 1 if tiles.x_left else -1]
            rows = fetch_vector(left, left_smem.at[worker], barriers.at[worker], left_at, left_rows)
            columns = fetch_vector(right, right_smem.at[worker], barriers.at[worker], right_at, right_rows)
            scaled = total.astype(jnp.float32) * over_columns(row_values(rows), shape) * over_rows(column_values(columns), shape)
            scaled = (end.columns if tiles.x_left else end.rows)(scaled, b_gmem, b_smem, worker, n_start)
            out = out_gmem.at[k_part] if split else out_gmem

            def target(start, size):
                m_at, n_at = (m_start, n_start + start) if tiles.x_left else (m_start + start, n_start)
                m_size, n_size = (staged[0], size) if tiles.x_left else (size, staged[1])
                return out.at[pl.ds(m_at, m_size), pl.ds(n_at, n_size)]

            store(scaled.astype(result), out_smem.at[worker], target, transpose=not tiles.x_left)

        in_specs = [
            plgpu.BlockSpec((bm, bk), lambda i: (m_block, i + k_part * steps), transforms=swizzled(bk, 8)),
            plgpu.BlockSpec(
                (bn, bk),
                lambda i: (n_block, i + k_part * steps),
                transforms=swizzled(bk, 8),
                collective_axes=("cluster",) if together > 1 else (),
            ),
        ]
        stream(
            advance,
            finish,
            tiles=tiles,
            steps=steps,
            in_specs=in_specs,
            operands=[x_gmem, w_gmem],
            shape=shape,
            dtype=sums,
            registers=False,
        )

    scale_types = (x_scale.dtype, w_scale.dtype) if tiles.x_left else (w_scale.dtype, x_scale.dtype)
    kernel = plgpu.kernel(
        hopper_eight_bit,
        out_type=jax.ShapeDtypeStruct((tiles.split_k, m, n) if split else (m, n), result),
        scratch_types=[
            plgpu.SMEM((workers, *staged), result, transforms=swizzled(64, result.itemsize * 8)),
            plgpu.SMEM((workers, vector_size(left_rows, scale_types[0])), scale_types[0]),
            plgpu.SMEM((workers, vector_size(right_rows, scale_types[1])), scale_types[1]),
            plgpu.Barrier(num_barriers=workers),
            *end.scratch(workers, right_rows if tiles.x_left else left_rows),
        ],
        grid=(tiles.split_k, -(-n // bn), -(-m // (bm * together))),
        grid_names=("k", "n", "m"),
        compiler_params=plgpu.CompilerParams(lowering_semantics=LANE),
        interpret=interpret,
        **({} if workers == 1 else {"num_threads": workers + 1, "thread_name": "wg"}),
        **({} if together == 1 else {"cluster": (together,), "cluster_names": ("cluster",)}),
    )
    return kernel(x, x_scale, w, w_scale, *end.operands)
