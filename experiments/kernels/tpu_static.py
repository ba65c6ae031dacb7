"""Compiles every TPU kernel for four generations on a machine that has none, and counts what a grid step takes.

    JAX_PLATFORMS=cpu python experiments/kernels/tpu_static.py --write experiments/kernels/tpu_static.json

Needs libtpu (the extra `aot`). `body` is the longest run of VLIW bundles without a branch: what each grid step executes for its tile. `total`
is the whole kernel, prologue and write-out too. `dma` is the bundles that copying the packed weight of a tile takes at the bandwidth of
the chip. Nothing here says how fast a chip is; a kernel whose bundles grow is slower, that is all.
"""

import argparse
import functools
import json
import os
import pathlib
import re
import tempfile
import time

DUMP = tempfile.mkdtemp()
os.environ.update(JAX_PLATFORMS="cpu", TPU_SKIP_MDS_QUERY="1", TPU_WORKER_HOSTNAMES="localhost")
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
from qjax_kernels.tpu.chips import CHIPS, Chip  # noqa: E402
from qjax_kernels.tpu.int8 import int8  # noqa: E402
from qjax_kernels.tpu.weight_only import weight_only  # noqa: E402

N, K, GROUP = 2048, 4096, 128


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
    if CHIPS[chip].int8:
        integer = functools.partial(int8, group=K, **both)
        found["W8A8"] = (integer, [x, ((K, N), jnp.int8), column])
        found["W4A8"] = (integer, [x, ((K, N), jnp.int4), column])
        found["W4A8 g128"] = (functools.partial(int8, group=GROUP, **both), [x, ((K, N), jnp.int4), grouped])
    return found


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
    """(body, total) bundles of the largest Pallas kernel among what was dumped."""
    best = (0, 0)
    for name, text in texts.items():
        if "schedule-analysis" in name or "-TLP-" in name or "initialization" in name:
            continue
        lines = [m for m in (re.match(r"\s*(?:0x[0-9a-f]+|0)\s+([A-Z]*)\s*:\s*>*\s*\{(.*)\}", line) for line in text.splitlines()) if m]
        marks = [0, *(i for i, line in enumerate(lines) if line[1] or "sbr" in line[2]), len(lines)]
        body = max((b - a for a, b in zip(marks, marks[1:], strict=False)), default=0)
        best = max(best, (body, len(lines)))
    return best


def dma_bundles(chip: Chip, size: int) -> int:
    """Bundles that pass while `size` bytes are copied from HBM."""
    return round(size / chip.bandwidth * chip.clock)


def rows(chips: list[str], sizes, kernels: tuple[str, ...] = ("",)) -> list[dict]:
    """One row a kernel, tile and generation."""
    found = []
    for chip in map(CHIPS.get, chips):
        for size in sizes:
            tile = tiles.Tile(*size)
            chosen = {name: v for name, v in products(chip.name, tile).items() if name.startswith(kernels)}
            for name, (function, arguments) in chosen.items():
                start = time.monotonic()
                program, texts = compiled(function, arguments, chip)
                body, total = counts(texts)
                bits = 16 if name == "bf16" else int(name[1])
                row = {"chip": chip.name, "tile": list(size), "kernel": name, "body": body, "total": total}
                row |= {"dma": dma_bundles(chip, tile.n * tile.k * bits // 8)}
                row |= {"temporaries": program.memory_analysis().temp_size_in_bytes, "float_weight": 2 * N * K}
                found.append(row)
                print(json.dumps(row), f"{time.monotonic() - start:.1f}s", flush=True)
    return found


def table(found: list[dict]) -> str:
    """Markdown: a line a kernel and tile, a column a generation; body / total, their ratio to bfloat16, and the weight's DMA."""
    chips = list(dict.fromkeys(row["chip"] for row in found))
    keys = list(dict.fromkeys((tuple(row["tile"]), row["kernel"]) for row in found))
    by = {(row["chip"], tuple(row["tile"]), row["kernel"]): row for row in found}
    lines = ["| tile | kernel | " + " | ".join(chips) + " |", "|" + "---|" * (len(chips) + 2)]
    for size, kernel in keys:
        cells = []
        for chip in chips:
            row, base = by.get((chip, size, kernel)), by.get((chip, size, "bf16"))
            text = "-" if row is None else f"{row['body']} / {row['total']}"
            if row is not None and base is not None and kernel != "bf16":
                text += f" ({row['body'] / base['body']:.2f}x / {row['total'] / base['total']:.2f}x)"
            cells.append(text if row is None else f"{text}; {row['dma']}")
        lines.append(f"| {'x'.join(map(str, size))} | {kernel} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--chip", action="append", choices=list(CHIPS), help="only these generations")
    parser.add_argument("--write", type=pathlib.Path, help="where the rows go, JSON; a table beside it")
    parser.add_argument("--kernel", action="append", help="only kernels whose names begin so")
    parser.add_argument("--small", action="store_true", help="only the tile that decode uses")
    given = parser.parse_args()
    found = rows(given.chip or list(CHIPS), STATIC[-1:] if given.small else STATIC, tuple(given.kernel or [""]))
    print(table(found))
    if given.write:
        given.write.write_text("[\n" + ",\n".join(json.dumps(row) for row in found) + "\n]\n")
        given.write.with_suffix(".md").write_text(table(found) + "\n")


if __name__ == "__main__":
    main()
