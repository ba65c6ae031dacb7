"""Compiles every TPU kernel for four generations on a machine that has none, and counts what a grid step takes.

    python experiments/kernels/tpu_static.py --write

Needs libtpu (the extra `aot`); rows go to tpu_static/<its version>.json. `body` is the longest run of VLIW bundles without a branch: what
each grid step executes for its tile. `total` is the whole kernel: a step's addresses and waiting, and what runs once a tile of the result,
too. `dma` is the bundles that pass while the packed weight of a tile is copied at the bandwidth of the chip. Nothing here says how fast
a chip is; a kernel whose bundles grow is slower, that is all.
"""

import argparse
import atexit
import functools
import importlib.metadata
import itertools
import json
import math
import os
import pathlib
import re
import shutil
import tempfile
import time

DUMP = tempfile.mkdtemp()
atexit.register(shutil.rmtree, DUMP, ignore_errors=True)
os.environ.update(JAX_PLATFORMS="cpu", TPU_SKIP_MDS_QUERY="1", TPU_WORKER_HOSTNAMES="localhost", ALLOW_MULTIPLE_LIBTPU_LOAD="1")
os.environ["LIBTPU_INIT_ARGS"] = f"--xla_jf_dump_to={DUMP} --xla_jf_dump_llo_text=true"

import jax  # noqa: E402  (the flags above are read when jax starts)
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402
from jax.experimental import pallas as pl  # noqa: E402
from jax.experimental import topologies  # noqa: E402
from jax.experimental.pallas import tpu as pltpu  # noqa: E402
from jax.sharding import Mesh, NamedSharding, PartitionSpec  # noqa: E402
from qjax_kernels.shapes import STATIC  # noqa: E402
from qjax_kernels.tpu import tiles  # noqa: E402
from qjax_kernels.tpu.attention import decode_attention  # noqa: E402
from qjax_kernels.tpu.chips import CHIPS, Chip  # noqa: E402
from qjax_kernels.tpu.experts import experts  # noqa: E402
from qjax_kernels.tpu.fp8 import fp8  # noqa: E402
from qjax_kernels.tpu.int8 import int8  # noqa: E402
from qjax_kernels.tpu.rotate import rotate_and_quantize  # noqa: E402
from qjax_kernels.tpu.rotated_int8 import rotated_int8  # noqa: E402
from qjax_kernels.tpu.weight_only import weight_only  # noqa: E402

N, K, GROUP = 2048, 4096, 128
KERNELS = (  # what `pallas_call` names them
    "float_product",
    "weight_only",
    "weight_only_fp8",
    "rounded_product_int8",
    "rounded_product_float8_e4m3fn",
    "experts",
    "decode_attention",
    "rotate_and_quantize",
    "codes_product",
)


def float_product(x: jax.Array, w: jax.Array, limit: tiles.Tile) -> jax.Array:
    """The bfloat16 kernel that the others are measured against: the same tiles, accumulator and write-out."""
    (m, k), n = x.shape, w.shape[1]

    def kernel(x_ref, w_ref, out_ref, sum_ref):
        tiles.accumulate(sum_ref, tiles.dot(x_ref[...], w_ref[...]), pl.program_id(2))

        @pl.when(pl.program_id(2) == pl.num_programs(2) - 1)
        def _():
            out_ref[...] = sum_ref[...].astype(out_ref.dtype)

    return pl.pallas_call(
        kernel,
        out_shape=jax.ShapeDtypeStruct((m, n), x.dtype),
        grid=tiles.cuts(m, n, k, limit),
        in_specs=[
            pl.BlockSpec((limit.m, limit.k), lambda i, j, t: (i, t)),
            pl.BlockSpec((limit.k, limit.n), lambda i, j, t: (t, j)),
        ],
        out_specs=pl.BlockSpec((limit.m, limit.n), lambda i, j, t: (i, j)),
        scratch_shapes=[pltpu.VMEM((limit.m, limit.n), jnp.float32)],
        compiler_params=tiles.params("parallel", "parallel", "arbitrary"),
        name="float_product",
    )(x, w)


def products(chip: str, tile: tiles.Tile) -> dict:
    """Functions and arguments (shape, dtype), by name."""
    m = 16 if tile.m == 16 else 1024
    x = ((m, K), jnp.bfloat16)
    grouped, column = ((K // GROUP, N), jnp.float32), ((1, N), jnp.float32)
    both = {"chip": chip, "limit": tile}
    by_group, whole = functools.partial(weight_only, group=GROUP, **both), functools.partial(weight_only, group=K, **both)
    found = {
        "bf16": (functools.partial(float_product, limit=tile), [x, ((K, N), jnp.bfloat16)]),
        "W4A16 g128": (by_group, [x, ((K, N), jnp.int4), grouped]),
        "W8A16 g128": (by_group, [x, ((K, N), jnp.int8), grouped]),
        "W4A16 column": (whole, [x, ((K, N), jnp.int4), column]),
    }
    if CHIPS[chip].fp8:
        codes = [x, ((K, N), jnp.float8_e4m3fn), column]
        found["W8A8 fp8"] = (functools.partial(fp8, **both), codes)
        found["W8A16 fp8"] = (functools.partial(fp8, rounded=False, **both), codes)
    if CHIPS[chip].int8:
        integer = functools.partial(int8, group=K, **both)
        found["W8A8"] = (integer, [x, ((K, N), jnp.int8), column])
        found["W4A8"] = (integer, [x, ((K, N), jnp.int4), column])
        found["W4A8 g128"] = (functools.partial(int8, group=GROUP, **both), [x, ((K, N), jnp.int4), grouped])
    return found


def others(chip: str) -> dict:
    """The kernels that are not tiles of one product: functions and arguments, by name."""
    each = {
        "experts W4A16 g128": (
            functools.partial(experts, group=GROUP, chip=chip),
            [((512, K), jnp.bfloat16), ((8, K, N), jnp.int4), ((8, K // GROUP, N), jnp.float32), ((8,), jnp.int32)],
        ),
        "rotate and quantize": (functools.partial(rotate_and_quantize, size=K, chip=chip), [((256, K), jnp.bfloat16)]),
    }
    for name, dtype in (("attention KV8", jnp.int8), ("attention KV4", jnp.int4)):
        codes, scale = ((4, 8, 2048, 128), dtype), ((4, 8, 2048), jnp.float32)
        arguments = [((4, 32, 128), jnp.bfloat16), codes, scale, codes, scale, ((4,), jnp.int32)]
        each[name] = (functools.partial(decode_attention, chip=chip), arguments)
    # As `qjax.quantized` hands a cache over: bytes of two codes with the tokens along lanes, and zero points.
    codes, row = ((4, 8, 64, 2048), jnp.uint8), ((4, 8, 2048), jnp.float32)
    packed = [((4, 32, 128), jnp.bfloat16), codes, row, codes, row, ((4,), jnp.int32), row, row]
    each["attention KU4 bytes"] = (functools.partial(decode_attention, chip=chip, tokens_last=True), packed)
    if CHIPS[chip].int8:
        rotated = functools.partial(rotated_int8, group=K, size=K, chip=chip)
        each["rotated W8A8"] = (rotated, [((256, K), jnp.bfloat16), ((K, N), jnp.int8), ((1, N), jnp.float32)])
    return each


def edges(chip: str) -> dict:
    """Shapes that fit no tile, which must compile."""
    x, scale = ((3, 4000), jnp.bfloat16), ((32, 200), jnp.float32)
    return {
        "W4A16 edge": (functools.partial(weight_only, group=GROUP, chip=chip), [x, ((4000, 200), jnp.int4), scale]),
        "W8A8 edge": (functools.partial(int8, group=4000, chip=chip), [x, ((4000, 200), jnp.int8), ((1, 200), jnp.float32)]),
        "W4A16 f32 g64 edge": (
            functools.partial(weight_only, group=64, chip=chip),
            [((70, 1000), jnp.float32), ((1000, 300), jnp.int4), ((16, 300), jnp.float32)],
        ),
    }


def compiled(function, arguments, chip: Chip):
    """The program for a generation and the text of what was dumped on the way: {file name: text}."""
    for file in pathlib.Path(DUMP).rglob("*.txt"):
        file.unlink()
    devices = _topology(chip.topology).devices
    sharding = NamedSharding(Mesh(np.array(devices[:1]), ("x",)), PartitionSpec())
    given = [jax.ShapeDtypeStruct(shape, dtype, sharding=sharding) for shape, dtype in arguments]
    program = jax.jit(function).trace(*given).lower(lowering_platforms=("tpu",)).compile()
    return program, {file.name: file.read_text() for file in pathlib.Path(DUMP).rglob("*final_bundles.txt")}


@functools.cache
def _topology(name: str):
    return topologies.get_topology_desc(name, platform="tpu")


def counts(texts: dict[str, str]) -> tuple[int, int]:
    """(body, total) bundles of the Pallas kernel among what was dumped, which holds XLA's own copies and fusions too."""
    best = (0, 0)
    for name, text in texts.items():
        if "schedule-analysis" in name or not any(f"-{kernel}." in name for kernel in KERNELS):
            continue
        lines = [m for m in (re.match(r"\s*(?:0x[0-9a-f]+|0)\s+([A-Z]*)\s*:\s*>*\s*\{(.*)\}", line) for line in text.splitlines()) if m]
        marks = [0, *(i for i, line in enumerate(lines) if line[1] or "sbr" in line[2]), len(lines)]
        body = max((b - a for a, b in itertools.pairwise(marks)), default=0)
        best = max(best, (body, len(lines)))
    return best


def dma_bundles(chip: Chip, size: int) -> int:
    """Bundles that pass while `size` bytes are copied from HBM."""
    return round(size / chip.bandwidth * chip.clock)


def rows(chips: list[str], sizes, kernels: tuple[str, ...] = ("",)) -> list[dict]:
    """One row a kernel, tile and generation."""
    found = []
    for chip in map(CHIPS.get, chips):
        cases = [(size, name, case) for size in sizes for name, case in products(chip.name, tiles.Tile(*size)).items()]
        cases += [(None, name, case) for name, case in (others(chip.name) | edges(chip.name)).items()]
        for size, name, (function, arguments) in cases:
            if not name.startswith(kernels):
                continue
            start = time.monotonic()
            program, texts = compiled(function, arguments, chip)
            body, total = counts(texts)
            row = {"chip": chip.name, "tile": size, "kernel": name, "body": body, "total": total}
            if size is not None:
                row["dma"] = dma_bundles(chip, size[1] * size[2] * (16 if name == "bf16" else int(name[1])) // 8)
            weight = arguments[min(1, len(arguments) - 1)][0]
            row |= {"temporaries": program.memory_analysis().temp_size_in_bytes, "float_weight": 2 * math.prod(weight)}
            found.append(row)
            print(json.dumps(row), f"{time.monotonic() - start:.1f}s", flush=True)
    return found


def table(found: list[dict]) -> str:
    """Markdown: a line a kernel and tile, a column a generation; body / total, their ratio to bfloat16, and the weight's DMA."""
    chips = list(dict.fromkeys(row["chip"] for row in found))
    keys = list(dict.fromkeys((tuple(row["tile"] or ()), row["kernel"]) for row in found))
    by = {(row["chip"], tuple(row["tile"] or ()), row["kernel"]): row for row in found}
    lines = ["| tile | kernel | " + " | ".join(chips) + " |", "|" + "---|" * (len(chips) + 2)]
    for size, kernel in keys:
        cells = []
        for chip in chips:
            row, base = by.get((chip, size, kernel)), by.get((chip, size, "bf16"))
            text = "-" if row is None else f"{row['body']} / {row['total']}"
            if row is not None and base is not None and kernel != "bf16":
                text += f" ({row['body'] / base['body']:.2f}x / {row['total'] / base['total']:.2f}x)"
            cells.append(f"{text}; {row['dma']}" if row is not None and "dma" in row else text)
        lines.append(f"| {'x'.join(map(str, size)) or '-'} | {kernel} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def results() -> pathlib.Path:
    """Where the rows of the installed libtpu are kept: its compiler is what is counted."""
    return pathlib.Path(__file__).parent / "tpu_static" / f"{importlib.metadata.version('libtpu')}.json"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--chip", action="append", choices=list(CHIPS), help="only these generations")
    parser.add_argument("--kernel", action="append", help="only kernels whose names begin so")
    parser.add_argument("--write", type=pathlib.Path, nargs="?", const=results(), help="the JSON of the rows, a table beside it")
    given = parser.parse_args()
    found = rows(given.chip or list(CHIPS), STATIC, tuple(given.kernel or [""]))
    print(table(found))
    if given.write:
        given.write.parent.mkdir(exist_ok=True)
        given.write.write_text("[\n" + ",\n".join(json.dumps(row) for row in found) + "\n]\n")
        given.write.with_suffix(".md").write_text(table(found) + "\n")


if __name__ == "__main__":
    main()
