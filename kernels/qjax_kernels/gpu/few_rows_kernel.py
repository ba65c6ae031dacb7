"""The Hopper kernel of four-bit products of 1 to 8 or 16 rows, in one launch: it orders rows of x, and clusters add parts of K."""

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.mosaic.gpu import utils as mgpu_utils
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm

from .epilogue import Activation
from .mosaic import ACC, LANE, Layout, load, swizzled, transposed
from .pipeline import Epilogue, over_columns, row_values, staging, store, stream
from .tiles import Tiles
from .weight_only_kernel import PIECE, float_codes, reordered

THREADS = 128  # of a warpgroup
TOGETHER = 128  # rows of w that are awaited at once: the second 64 are converted beside the tensor-core instructions of the first


def _ordered(x_ref, target_ref, transforms) -> None:
    """Rows of x out of one piece of shared memory into another, columns as `reordered` puts them, as the tensor cores read operand B.

    A thread takes eight consecutive elements and writes four pairs of them. Rows of the target behind those of x keep what they held: they
    are columns of the sum that are not stored.

    Args:
      x_ref: (M, K / 128, 128) in shared memory.
      target_ref: (block_m, K) in shared memory.
      transforms: of the target: tiles of 8 x 64, swizzled by 128 bytes.
    """
    rows, k = x_ref.shape[0], target_ref.shape[1]
    in_row = k // 8  # eights of a row, a divisor of the threads: a thread stays in its columns
    apart = THREADS // in_row  # rows from one turn of a thread to the next
    tail = rows * in_row % THREADS

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), plgpu.RefType(transforms)))
    def move(_, source, target):
        word = ir.IntegerType.get_signless(32)
        thread = arith.remui(mgpu_utils.thread_idx(), arith.constant(word, THREADS))
        near, far = (llvm.ptrtoint(word, mgpu_utils.memref_ptr(ref)) for ref in (source, target))
        # d: the thread's pair 0 in its first row r, in tiles of 8 rows of 128 bytes, bits 4 to 6 of the address crossed with the row. Other
        # pairs and rows differ from it in these bits (y0 to y7) and by constants.
        text = f"""{{ .reg .pred p; .reg .b32 s, d, r, c, q, w, y<8>, a<4>;
            shl.b32 s, $2, 4; add.u32 s, s, $0; shr.u32 r, $2, {in_row.bit_length() - 1}; and.b32 c, $2, {in_row - 1};
            shr.u32 d, c, 3; shl.b32 d, d, 10; shl.b32 q, r, 7; add.u32 d, d, q; and.b32 q, c, 3; shl.b32 q, q, 2; add.u32 d, d, q;
            and.b32 q, c, 4; shl.b32 q, q, 4; add.u32 d, d, q; shl.b32 q, r, 4; xor.b32 d, d, q; add.u32 d, d, $1;
            setp.lt.u32 p, $2, {tail};
            """
        text += "".join(f"xor.b32 y{i}, d, {16 * i}; " for i in range(8))
        for turn in range(-(-rows * in_row // THREADS)):
            row = turn * apart
            at = "@p " if tail and (turn + 1) * THREADS > rows * in_row else ""
            text += f"{at}ld.shared.v4.b32 {{a0, a1, a2, a3}}, [s + {turn * THREADS * 16}]; "
            for pair, (low, selector) in enumerate(((0, "0x5410"), (0, "0x7632"), (1, "0x5410"), (1, "0x7632"))):
                place = row // 8 * (k // 64) * 1024 + row % 8 * 128
                text += f"prmt.b32 w, a{low}, a{low + 2}, {selector}; {at}st.shared.b32 [y{pair ^ row % 8} + {place}], w; "
        llvm.inline_asm(ir.Type.parse("!llvm.void"), [near, far, thread], text + "}", "r,r,r", has_side_effects=True)

    move(x_ref, target_ref)  # pyright: ignore[reportCallIssue]


def few_rows(
    x: jax.Array, codes: jax.Array, scales: jax.Array, *, group: int, tiles: Tiles, bias: jax.Array | None = None,
    activation: Activation | None = None, interpret=None,
) -> jax.Array:  # fmt: skip
    """The kernel: y_mn = f(sum_g s_ng sum_k x_mk c_nk + b_n), nothing before and nothing behind it.

    Thread blocks of a cluster share the K of one tile of y; each sends its float32 sums to the first one's shared memory, which adds them
    in the order of K.

    Args:
      x: (M, K) bfloat16, M at most `tiles.block_m`.
      codes: (N, K) int4.
      scales: (N, K / group).
      group: consecutive k that share a scale, a multiple of 128.
      tiles: the cut; `split_k` thread blocks are a cluster.
      bias: (N,) or None.
      activation: of the sums.
      interpret: as `pallas` takes it. An interpreter has no clusters: it gets the parts of K in device memory, added behind it.

    Returns:
      (M, N) bfloat16, or (split_k, M, N) float32 parts that are to be added, where it is interpreted and K is split.
    """
    m, k = x.shape
    n = codes.shape[0]
    bm, bn, bk, parts = tiles.block_m, tiles.block_n, tiles.block_k, tiles.split_k
    shape = (bn, bm)
    staged = staging(shape, transpose=True)
    steps = -(-k // (bk * parts))
    runs = max(TOGETHER // bn, 1)
    interpreted = interpret is not None
    apart = interpreted and parts > 1
    joined = not interpreted and parts > 1
    out_dtype = jnp.float32 if apart else jnp.bfloat16
    per_copy = 16 // scales.dtype.itemsize
    x_transforms = swizzled(bk, 16)
    end = Epilogue.of(bias, activation, apart)

    def pieces(step, first, w_ref, s_ref, x_ref, carry):
        """The sum with the sums of groups, scaled, in it."""
        at = [first + i for i in range(min(runs, bk // PIECE - first))]
        cols = [slice(p * PIECE, (p + 1) * PIECE) for p in at]

        def sums(*accs):
            for acc, own in zip(accs, cols, strict=True):
                plgpu.wgmma(acc, float_codes(w_ref.at[:, own], 4, True, interpreted), transposed(x_ref.at[:, own]))
            return [acc[...] for acc in accs]

        for p, part in zip(at, pl.run_scoped(sums, *[ACC(shape, jnp.float32) for _ in at]), strict=True):
            column = lax.rem((step * bk + p * PIECE) // group, per_copy)
            carry = carry + part * over_columns(row_values(s_ref.at[:, column]), shape)
        return carry

    def hopper_few_rows(x_gmem, w_gmem, s_gmem, *rest):
        b_gmem, (out_gmem, out_smem, x_smem, *rest) = end.taken(rest)
        shared, b_smem = (rest[:2], rest[2:]) if joined else ([], rest)
        part, n_block, m_block = lax.axis_index("k"), lax.axis_index("n"), lax.axis_index("m")
        first_step = part * steps
        if tiles.early and not interpreted:
            for step in range(min(tiles.stages, steps)):
                plgpu.async_prefetch(w_gmem.at[pl.ds(n_block * bn, bn), pl.ds((first_step + step) * bk, bk)])
            plgpu.griddepcontrol_wait()
            plgpu.griddepcontrol_launch_dependents()

        def advance(index, x_ref, w_ref, s_ref, carry):
            own = x_smem.at[lax.rem(index[0], 2)]
            if interpreted:
                own[pl.ds(0, m), :] = reordered(x_ref[...].reshape(m, bk))
            else:
                _ordered(x_ref, own, x_transforms)
            # All warps have passed here once more before the buffer is written again: two of them suffice.
            plgpu.commit_smem()
            for first in range(0, bk // PIECE, runs):
                carry = pieces(index[0] + first_step, first, w_ref, s_ref, own, carry)
            return carry

        def write(total):
            start = n_block * bn
            out = out_gmem.at[part] if apart else out_gmem
            total = end.rows(total, b_gmem, b_smem, 0, start)

            def target(first):
                return out.at[pl.ds(m_block * bm + first, staged[0]), pl.ds(start, bn)]

            store(total.astype(out_dtype), out_smem, target, transpose=True)

        def finish(total):
            if not joined:
                write(total)
                return
            sums_smem, arrived = shared
            plgpu.async_store_smem(total, sums_smem.at[part], arrived, cluster_idx=jnp.int32(0), cluster_dim="k")

            @pl.when(part == 0)
            def _():
                plgpu.barrier_wait(arrived)
                together = load(sums_smem.at[0], Layout.WGMMA)
                for other in range(1, parts):
                    together = together + load(sums_smem.at[other], Layout.WGMMA)
                write(together)

        reach = group * per_copy
        in_specs = [
            plgpu.BlockSpec((m, bk // PIECE, PIECE), lambda i: (0, i + first_step, 0)),
            plgpu.BlockSpec((bn, bk), lambda i: (n_block, i + first_step), transforms=swizzled(PIECE, 4)),
            plgpu.BlockSpec((bn, per_copy), lambda i: (n_block, (i + first_step) * bk // reach)),
        ]
        operands = [x_gmem, w_gmem, s_gmem]
        stream(
            advance, finish, tiles=tiles, steps=steps, in_specs=in_specs, operands=operands, shape=shape, dtype=jnp.float32, registers=True
        )

    sums = plgpu.SMEM((parts, *shape), jnp.float32, transforms=swizzled(bm, 32))
    blocks_n = -(-n // bn)
    kernel = plgpu.kernel(
        hopper_few_rows,
        out_type=jax.ShapeDtypeStruct((parts, m, n) if apart else (m, n), out_dtype),
        scratch_types=[
            plgpu.SMEM(staged, out_dtype, transforms=swizzled(64, out_dtype.dtype.itemsize * 8)),
            plgpu.SMEM((2, bm, bk), jnp.bfloat16, transforms=x_transforms),
            *([sums, plgpu.Barrier(num_arrivals=parts)] if joined else []),
            *end.scratch(1, bn),
        ],
        grid=(blocks_n, 1) if joined else (parts, blocks_n, 1),
        grid_names=("n", "m") if joined else ("k", "n", "m"),
        compiler_params=plgpu.CompilerParams(lowering_semantics=LANE),
        interpret=interpret,
        **({"cluster": (parts,), "cluster_names": ("k",)} if joined else {}),
    )
    return kernel(x.reshape(m, k // PIECE, PIECE), codes, scales, *end.operands)
