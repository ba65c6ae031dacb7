"""Makes `checkpoint_v1/`, a checkpoint of layout 1 that every later version must read, and what must come out of it.

The codes, scales and permutations are drawn at random and the expected values computed here with NumPy, so the
fixture depends neither on how qjax rounds nor on how it unpacks. It was made once, by qjax 0.1.0; it is not made again,
because a reader is only proved by files that older versions wrote.

    python tests/golden/make_checkpoint_v1.py tests/golden/checkpoint_v1
"""

import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

import qjax
from qjax.core import PerGroup, QTensor, assemble
from qjax.ptq import Result
from qjax.report import Report, Row

LEVELS = (-1.0, -0.25, 0.0, 1.0)
# name: (spec, kept shape, contracted sizes, axes, scale shape, dtype, permuted)
CASES = {
    "int2": (qjax.int2(), (6,), (13,), (-2,), (6, 1), "float32", False),
    "int3_group": (qjax.int3(group_size=8), (5,), (24,), (-1,), (5, 3), "float32", False),
    "int4_group": (qjax.int4(group_size=16), (8,), (32,), (-2,), (8, 2), "bfloat16", False),
    "int4_act_order": (qjax.int4(group_size=16), (8,), (32,), (-2,), (8, 2), "float32", True),
    "int4_padded": (qjax.int4(group_size=16, pad=True), (4,), (19,), (-2,), (4, 2), "float32", False),
    "int4_block": (qjax.int4(block=(2, 8), scale_rule="full"), (6,), (16,), (-2,), (3, 2), "float32", False),
    "int5": (qjax.int5(scale_dtype="float16"), (3,), (11,), (-2,), (3, 1), "float32", False),
    "int6": (qjax.int6(), (3,), (10,), (-2,), (3, 1), "float16", False),
    "int7": (qjax.int7(), (3,), (9,), (-2,), (3, 1), "float32", False),
    "int8_tensor": (qjax.int8(per="tensor", scale_dtype="bfloat16"), (4,), (7,), (-2,), (1, 1), "float32", False),
    "int8_stacked": (qjax.int8(per="tensor"), (2, 3), (8,), (-2,), (2, 1, 1), "float32", False),
    "uint3": (qjax.uint3(group_size=8), (3,), (16,), (-2,), (3, 2), "float32", False),
    "uint4_heads": (qjax.uint4(group_size=4), (5,), (2, 4), (-3, -2), (5, 2), "float32", False),
    "uint8": (qjax.uint8(), (3,), (5,), (-2,), (3, 1), "float32", False),
    "nf4": (qjax.nf4(16), (4,), (32,), (-2,), (4, 2), "float32", False),
    "fp4": (qjax.fp4(16), (4,), (32,), (-2,), (4, 2), "float32", False),
    "codebook": (qjax.codebook(LEVELS, name="four", per="token"), (3,), (8,), (-1,), (3, 1), "float32", False),
}


def bits_of(codes: np.ndarray, bits: int) -> np.ndarray:
    """A little-endian bit stream along the last axis, by NumPy alone."""
    stream = (codes.astype(np.int64)[..., None] >> np.arange(bits)) & 1
    return np.packbits(stream.reshape(*codes.shape[:-1], -1).astype(np.uint8), axis=-1, bitorder="little")


def logical(rows: np.ndarray, sizes: tuple[int, ...], axes: tuple[int, ...]) -> np.ndarray:
    """(kept..., K) to the logical shape: the contracted axes back to where they were."""
    shaped = rows.reshape(*rows.shape[:-1], *sizes)
    ends = range(-len(sizes), 0)
    return np.moveaxis(shaped, list(ends), [shaped.ndim + a for a in axes])


def make(rng: np.random.Generator, spec, kept, sizes, axes, scale_shape, dtype, permuted):
    """One `QTensor` of random codes, and what its codes, scale and value must be."""
    k = int(np.prod(sizes))
    lo, hi = (spec.qmin, spec.qmax) if isinstance(spec, qjax.core.IntSpec) else (0, 2**spec.bits - 1)
    codes = rng.integers(lo, hi + 1, (*kept, k))
    scale = rng.uniform(0.01, 2.0, scale_shape).astype(spec.scale_dtype)
    asymmetric = isinstance(spec, qjax.core.IntSpec) and not spec.symmetric
    zero_point = rng.integers(lo, hi + 1, scale_shape) if asymmetric else None
    perm = rng.permutation(k).astype(np.int32)[None] if permuted else None
    q = assemble(codes, scale, zero_point, spec, axes, sizes, dtype, perm)

    group = spec.granularity.size if isinstance(spec.granularity, PerGroup) else k
    group = spec.granularity.contracted if isinstance(spec.granularity, qjax.core.PerBlock) else group
    padded = -(-k // group) * group
    stored = np.concatenate([codes, np.zeros((*kept, padded - k), int)], -1)
    spread = np.repeat(scale.astype(np.float32), padded // scale.shape[-1], -1)[..., :k]
    rows = [np.broadcast_to if n == 1 else np.repeat for n in scale_shape[:-1]]
    offset = 0 if zero_point is None else np.repeat(zero_point, padded // scale.shape[-1], -1)[..., :k]
    for axis, (n, how) in enumerate(zip(kept, rows, strict=True)):
        if how is np.repeat:
            spread = np.repeat(spread, n // spread.shape[axis], axis)
            offset = offset if zero_point is None else np.repeat(offset, n // offset.shape[axis], axis)
    if isinstance(spec, qjax.core.CodebookSpec):
        value = np.asarray(spec.levels, np.float32)[codes] * spread
    else:
        value = (codes - offset).astype(np.float32) * spread
    if perm is not None:
        value = value[..., np.argsort(perm[0])]
    bytes_ = stored.astype(np.uint8 if lo == 0 else np.int8) if spec.bits == 8 else bits_of(stored, spec.bits)
    found = {"codes": bytes_, "scale": scale.view(np.uint8), "value": logical(value, sizes, axes).astype(np.float32)}
    return q, found if perm is None else found | {"perm": perm}


def arrays() -> dict[str, np.ndarray]:
    return {
        "bfloat16": np.linspace(-2, 2, 9).astype(ml_dtypes.bfloat16),
        "float16": np.linspace(-2, 2, 9).astype(np.float16),
        "float32": np.float32([np.nan, np.inf, -0.0, 1e-45, 3.5]),
        "float8_e4m3fn": np.arange(5).astype(ml_dtypes.float8_e4m3fn),
        "int4": np.arange(-8, 8).astype(ml_dtypes.int4),
        "int8": np.arange(-3, 3, dtype=np.int8).reshape(2, 3),
        "uint8": np.arange(4, dtype=np.uint8),
        "int32": np.int32(-7),
        "int64": np.int64([2**40, -1]),
        "bool": np.array([[True], [False]]),
        "empty": np.zeros((0, 3), np.float32),
    }


def tree_of(packed: dict[str, QTensor]) -> dict:
    """Every kind of container and leaf."""
    values = {"true": True, "int": 3, "large": 2**60, "float": 0.1, "inf": float("-inf"), "text": "é", "none": None}
    params, leaves = {"packed": packed, 3: "unused"}, (jnp.ones(2), [None, ()])
    return {"params": params, "arrays": arrays(), "tuple": leaves, "values": values, "keys": jax.random.key(7)}


def report() -> Report:
    row = Row(
        path="packed/int4_group",
        shape=(32, 8),
        dtype="bfloat16",
        ops=("dot_general",),
        scopes=("mlp",),
        spec="int4(group_size=16)",
        method="gptq",
        bits_per_weight=6.0,
        nbytes=192,
        float_nbytes=512,
        error=0.0123,
        kernel="reference",
        notes=("2 dead columns",),
    )
    left = Row("tuple/0", (2,), "float32", (), (), "", "", 32, 8, 8, reason="meets no data")
    return Report((row, left), ("a closed-over float32 array",), {"trace": 0.25, "quantize": 1.5})


def policy() -> qjax.Policy:
    method = qjax.gptq(damping=0.05, act_order=True, static_groups=False, block_size=64, mse=True)
    return qjax.Policy([
        qjax.Rule("*norm*", weight=None),
        qjax.Rule("*mlp*", weight=qjax.int4(group_size=16), method=method),
        qjax.Rule("*attn*", weight=qjax.nf4(16), method=qjax.rtn(mse=True)),
        qjax.Rule("*", weight=qjax.int8(block=(2, 8), scale_dtype="float16", scale_rule="full", pad=True)),
    ])  # fmt: skip


METADATA = {"config": {"layers": 2, "eps": 1e-05, "names": ["a", "ü"], "tied": False, "stop": None}}


def main(folder: Path) -> None:
    rng = np.random.default_rng(20250101)
    packed, expected = {}, {}
    for name, case in CASES.items():
        packed[name], found = make(rng, *case)
        expected |= {f"{name}.{field}": array for field, array in found.items()}
    for name in ("bf16", "fp16"):
        spec, rows = getattr(qjax, name)(), rng.standard_normal((3, 8)).astype(np.float32)
        packed[name] = assemble(rows, None, None, spec, (-2,), (8,), "float32")
        cast = rows.astype(spec.dtype)
        expected |= {
            f"{name}.codes": cast.view(np.uint8),
            f"{name}.value": logical(cast.astype(np.float32), (8,), (-2,)),
        }
    qjax.save(folder / "checkpoint", Result(tree_of(packed), report(), policy(), METADATA), source_sha256="12" * 32)
    np.savez_compressed(folder / "expected.npz", **expected)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
