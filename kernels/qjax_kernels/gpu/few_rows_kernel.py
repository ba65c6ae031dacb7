"""The Hopper kernel of four-bit products with up to sixteen rows, in one launch: it orders rows of x itself, and clusters add parts of K."""

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
TOGETHER = 2  # runs of tensor-core instructions that are awaited at once: the second run's codes are converted beside the first run


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
    in_row = k // 8
    count = rows * in_row

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), plgpu.RefType(transforms)))
    def move(_, source, target):
        word = ir.IntegerType.get_signless(32)
        thread = arith.remui(mgpu_utils.thread_idx(), arith.constant(word, THREADS))
        near, far = (llvm.ptrtoint(word, mgpu_utils.memref_ptr(ref)) for ref in (source, target))
        for first in range(0, count, THREADS):
            guard = "" if first + THREADS <= count else f"setp.lt.u32 p, $2, {count - first};"
            at = "" if not guard else "@p "
            # The chunk's row, block of 32 and place in it give 128-byte rows of the swizzle; bits 4 to 6 of its address are crossed with the row.
            text = f"""{{ .reg .pred p; .reg .b32 i, r, c, b, s, d, x, q, w, a<4>; {guard}
                add.u32 i, $2, {first}; div.u32 r, i, {in_row}; rem.u32 c, i, {in_row}; shr.u32 b, c, 2;
                shl.b32 s, i, 4; add.u32 s, s, $0; {at}ld.shared.v4.b32 {{a0, a1, a2, a3}}, [s];
                shr.u32 d, r, 3; mul.lo.u32 d, d, {k // 64}; shr.u32 q, b, 1; add.u32 d, d, q; shl.b32 d, d, 3;
                and.b32 x, r, 7; add.u32 d, d, x; shl.b32 d, d, 7; add.u32 d, d, $1;
                and.b32 q, c, 3; shl.b32 q, q, 2; add.u32 d, d, q; shl.b32 x, x, 4; and.b32 b, b, 1; shl.b32 b, b, 6;
                """
            for shift, (low, selector) in enumerate(((0, "0x5410"), (0, "0x7632"), (1, "0x5410"), (1, "0x7632"))):
                text += f"""prmt.b32 w, a{low}, a{low + 2}, {selector}; add.u32 q, b, {16 * shift}; xor.b32 q, q, x; add.u32 q, q, d;
                    {at}st.shared.b32 [q], w;
                    """
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
    interpreted = interpret is not None
    apart = interpreted and parts > 1
    joined = not interpreted and parts > 1
    out_dtype = jnp.float32 if apart else jnp.bfloat16
    per_copy = 16 // scales.dtype.itemsize
    x_transforms = swizzled(bk, 16)
    end = Epilogue.of(bias, activation, apart)

    def pieces(step, first, w_ref, s_ref, x_ref, carry):
        """The sum with the sums of groups, scaled, in it."""
        at = [first + i for i in range(min(TOGETHER, bk // PIECE - first))]
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
        (sums_smem, arrived), b_smem = (rest[:2], rest[2:]) if joined else ((None, None), rest)
        part, n_block = lax.axis_index("k"), lax.axis_index("n")
        first_step = part * steps

        def advance(index, x_ref, w_ref, s_ref, carry):
            own = x_smem.at[lax.rem(index[0], 2)]
            if interpreted:
                own[pl.ds(0, m), :] = reordered(x_ref[...].reshape(m, bk))
            else:
                _ordered(x_ref, own, x_transforms)
            # All warps have passed here once more before the buffer is written again: two of them suffice.
            plgpu.commit_smem()
            for first in range(0, bk // PIECE, TOGETHER):
                carry = pieces(index[0] + first_step, first, w_ref, s_ref, own, carry)
            return carry

        def write(total):
            start = n_block * bn
            out = out_gmem.at[part] if apart else out_gmem
            total = end.rows(total, b_gmem, b_smem, 0, start)
            store(total.astype(out_dtype), out_smem, lambda first: out.at[pl.ds(first, staged[0]), pl.ds(start, bn)], transpose=True)

        def finish(total):
            if not joined:
                write(total)
                return
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
        grid=(blocks_n,) if joined else (parts, blocks_n),
        grid_names=("n",) if joined else ("k", "n"),
        compiler_params=plgpu.CompilerParams(lowering_semantics=LANE),
        interpret=interpret,
        **({"cluster": (parts,), "cluster_names": ("k",)} if joined else {}),
    )
    return kernel(x.reshape(m, k // PIECE, PIECE), codes, scales, *end.operands)
