"""Compiles the Hopper kernels for an H200 on a machine that has none, and counts what they take.

    python experiments/kernels/gpu_static.py --write

Needs what the extra `aot` installs; rows go to gpu_static/<version of jax>.json. `registers` and `spills` are what ptxas says;
`loop` is the instructions of its longest loop with products, which a stage of the pipeline executes, `total` all of them, `products`
the tensor core instructions in that loop; `shared` is the bytes of shared memory by `Tiles.shared_bytes` (jax refuses what is too
much); `temporaries` are device memory beside operands and result: sums of split K, rows of x that were put in another form. Nothing
here is a speed.
"""

import argparse
import functools
import json
import os
import pathlib
import re
import sys
import sysconfig
import tempfile
import time

TOOLS = pathlib.Path(sysconfig.get_path("purelib")) / "nvidia" / "cu13" / "bin"
os.environ.update(JAX_PLATFORMS="cpu", MOSAIC_GPU_DUMP_PTXAS="1", MOSAIC_GPU_DUMP_SASS="1", PATH=f"{TOOLS}:{os.environ['PATH']}")

import jax  # noqa: E402  (the variables above are read when jax starts)
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402
from decode import GROUP, TAIL, Shape  # noqa: E402
from jax.experimental import topologies  # noqa: E402
from jax.sharding import Mesh, NamedSharding, PartitionSpec  # noqa: E402
from qjax_kernels.gpu.attention import Past  # noqa: E402
from qjax_kernels.gpu.chain import TILES as CHAIN_TILES  # noqa: E402
from qjax_kernels.gpu.chain import chain  # noqa: E402
from qjax_kernels.gpu.chain_shape import shapes_of, shared_bytes  # noqa: E402
from qjax_kernels.gpu.chosen_tiles import eight_bit_tiles, weight_only_tiles  # noqa: E402
from qjax_kernels.gpu.direct_shape import shape_of  # noqa: E402
from qjax_kernels.gpu.eight_bit import scaled_product  # noqa: E402
from qjax_kernels.gpu.rounding_kernel import round_rows  # noqa: E402
from qjax_kernels.gpu.stock import grouped_matmul  # noqa: E402
from qjax_kernels.gpu.tiles import Direct, Tiles  # noqa: E402
from qjax_kernels.gpu.weight_only import weight_only_matmul  # noqa: E402
from qjax_kernels.shapes import HOPPER  # noqa: E402
from sass import instructions, written_under_way  # noqa: E402

DESCRIPTIONS = pathlib.Path(__file__).parents[2] / "tests" / "kernels" / "aot"
SMALL, LARGE = HOPPER[0][::-1], HOPPER[-1][::-1]  # N, K


def cases() -> list[tuple[str, int, tuple[int, int], Tiles | Direct | None]]:
    """(kernel, rows, (N, K), tiles; None for the default ones): each path once, and the tiles whose figures are asked for.

    Scales are float32; those of "bf16" are bfloat16, as they are timed.
    """
    wide = Tiles(128, 128, 128, 4, warpgroups=2, scale_first=True)
    return [
        ("W4A16 g128", 16, SMALL, Tiles(16, 128, 256, 3)),
        ("W4A16 g128", 64, SMALL, Tiles(64, 128, 128, 3)),
        ("W4A16 g128", 128, SMALL, wide),
        ("W4A16 g128", 1, SMALL, None),
        ("W4A16 g128", 512, SMALL, None),
        ("W4A16 g128", 50, SMALL, None),
        ("W4A16 g128", 16, LARGE, None),
        ("W4A16 g128", 1, LARGE, None),
        ("W4A16 g128", 8, LARGE, None),
        ("W4A16 g128", 8, (8192, 8192), None),
        ("W4A16 g128 bias", 16, (8192, 8192), Tiles(16, 128, 512, 2, warpgroups=2, digits=True)),
        ("W4A16 g128", 16, (8192, 8192), Tiles(16, 64, 512, 3, 2, warpgroups=2, digits=True)),
        ("W4A16 g128 bf16", 8, (8192, 8192), None),
        ("W4A16 g128 bf16", 1, LARGE, None),
        ("W4A16 g128 bf16", 4, LARGE, None),
        ("W4A16 g128 bf16", 8, LARGE, None),
        ("W4A16 g128", 16, (8192, 8192), None),
        ("W4A16 g128 bf16", 8, (8192, 8192), Direct(16, 4, 1, split_k=4, wide=True)),
        ("W4A16 g128", 1, SMALL, Direct(16, 2, 1, early=True)),
        ("W4A16 g128 bias", 8, (*SMALL[:1], 14336), None),
        ("W4A16 g128", 16, SMALL, None),
        ("W4A16 g128", 32, (8192, 8192), None),
        ("W4A16 g128", 16, (8192, 8192), Direct(16, 2, 1, split_k=4, wide=True)),
        ("W4A16 g128", 21, LARGE, None),
        ("W4A16 g128", 32, LARGE, None),
        ("W4A16 g128", 64, LARGE, None),
        ("W4A16 g128", 512, LARGE, None),
        ("W4A16 g128", 512, (8192, 8192), None),
        ("W4A16 g128", 256, SMALL, None),
        ("W4A16 column", 128, SMALL, None),
        ("W4A16 g128", 3, (1088, 2048), None),
        ("W8A16 g128", 1, LARGE, None),
        ("W4A16 column", 8, (8192, 8192), None),
        ("W8A16 column", 8, SMALL, None),
        ("W8A16 g128", 16, LARGE, None),
        ("W8A16 g128", 16, SMALL, None),
        ("W8A16 g128", 64, LARGE, None),
        ("W8A16 g128", 128, LARGE, None),
        ("W8A16 g128", 512, LARGE, None),
        ("W4A16 column", 16, LARGE, None),
        ("W4A16 g128 bias silu", 16, SMALL, Tiles(16, 128, 256, 3)),
        ("W8A8", 16, SMALL, None),
        ("W8A8", 512, LARGE, None),
        ("W8A8", 64, LARGE, None),
        ("FP8", 512, LARGE, None),
        ("W8A8", 128, SMALL, None),
        ("W8A8", 4096, SMALL, None),
    ]


def operands(kernel: str, m: int, n: int, k: int) -> list[tuple[tuple[int, ...], jnp.dtype]]:
    """(shape, dtype) of x, codes and scales."""
    kind = jnp.float8_e4m3fn if kernel == "FP8" else jnp.int4 if kernel.startswith("W4") else jnp.int8
    groups = k // GROUP if "g128" in kernel else 1
    bias = [((n,), jnp.float32)] if "bias" in kernel else []
    if kernel in ("W8A8", "FP8"):  # of rows that are rounded, which is a kernel of its own (`roundings`)
        return [((m, k), kind), ((n, k), kind), ((n, 1), jnp.float32), ((m,), jnp.float32)]
    scale = jnp.bfloat16 if "bf16" in kernel else jnp.float32
    return [((m, k), jnp.bfloat16), ((n, k), kind), ((n, groups), scale), *bias]


def function(kernel: str, tiles: Tiles | Direct | None):
    """The product, of x, codes, scales and, if there is one, the bias."""
    if kernel in ("W8A8", "FP8"):
        return lambda rows, codes, scales, row_scales: scaled_product(rows, row_scales, codes, scales, out_dtype=jnp.bfloat16, tiles=tiles)
    how: dict = {"group_size": GROUP if "g128" in kernel else None, "tiles": tiles, "activation": "silu" if "silu" in kernel else None}
    return lambda x, codes, scales, bias=None: weight_only_matmul(x, codes, scales, bias=bias, **how)


def chosen(kernel: str, m: int, n: int, k: int) -> tuple[Tiles | Direct, tuple[int, int, int]]:
    """The default tiles, and bits of a code, bytes of a scale and of an element of x in a stage."""
    if kernel in ("W8A8", "FP8"):
        return eight_bit_tiles(m, n, k), (8, 0, 1)
    bits, grouped = int(kernel[1]), "g128" in kernel
    tiles = weight_only_tiles(m, n, k, bits, group=GROUP if grouped else None)
    return tiles, (bits, (2 if "bf16" in kernel else 4) if grouped else 0, 2)


def shared(tiles: Tiles | Direct, sizes: tuple[int, int, int], m: int, n: int, k: int) -> int:
    """Bytes of shared memory of a thread block."""
    if isinstance(tiles, Tiles):
        return tiles.shared_bytes(*sizes)
    group = GROUP if sizes[1] else k
    s = shape_of(m, n, k, group=group, columns=k // group, dtype=jnp.float32, tiles=tiles, cores=132, bits=sizes[0])
    return s.launched_bytes(tiles.blocks, 132)


def compiled(function, arguments, chip: str):
    """The program for a GPU, and what was printed on the way."""
    sharding = NamedSharding(Mesh(np.array(_devices(chip)), ("x",)), PartitionSpec())
    given = [jax.ShapeDtypeStruct(shape, dtype, sharding=sharding) for shape, dtype in arguments]
    lowered = jax.jit(function).trace(*given).lower(lowering_platforms=("cuda",))
    sys.stdout.flush()
    kept = os.dup(1)
    with tempfile.TemporaryFile("w+") as file:
        os.dup2(file.fileno(), 1)  # the assembler prints by itself
        try:
            program = lowered.compile()
        finally:
            os.dup2(kept, 1)
            os.close(kept)
        file.seek(0)
        return program, file.read()


@functools.cache
def _devices(chip: str):
    config = (DESCRIPTIONS / f"{chip}.txtpb").read_text()
    return topologies.get_topology_desc(platform="cuda", topology="1x1x1", target_config=config).devices[:1]


def counts(text: str) -> dict[str, int]:
    """Registers, spilled bytes and instructions of the one kernel whose assembly was printed."""
    spilled = [int(n) for n in re.findall(r"(\d+) bytes spill", text)]
    registers = [int(n) for n in re.findall(r"Used (\d+) registers", text)]
    if len(registers) != 1:
        raise ValueError(f"the assembler told of {len(registers)} kernels, not of one")
    code, loops = instructions(text)
    loops = [(0, 0), *loops]
    multiplies = [any("MMA" in text for text in code[start:end]) for start, end in loops]
    start, end = max(zip(multiplies, loops, strict=True), key=lambda each: (each[0], each[1][1] - each[1][0]))[1]
    products = sum("MMA" in text for text in code[start:end])
    total = next((i + 1 for i in range(len(code) - 1, -1, -1) if "NOP" not in code[i]), 0)
    read, offending = written_under_way(text)
    found = {"registers": registers[0], "spills": sum(spilled), "loop": end - start, "total": total, "products": products}
    return found | {"operands": read, "overwritten": len(offending)}


def rows() -> list[dict]:
    """One row a case."""
    found = []
    for kernel, m, (n, k), tiles in cases():
        start = time.monotonic()
        arguments = operands(kernel, m, n, k)
        program, text = compiled(function(kernel, tiles), arguments, "h200")
        default, sizes = chosen(kernel, m, n, k)
        used = tiles or default
        row = {"kernel": kernel, "m": m, "n": n, "k": k, "tiles": _short(used), **counts(text), "shared": shared(used, sizes, m, n, k)}
        row |= {"temporaries": program.memory_analysis().temp_size_in_bytes, "float_weight": 2 * n * k}
        found.append(row)
        print(json.dumps(row), f"{time.monotonic() - start:.1f}s", flush=True)
    return found


def chains() -> list[dict]:
    """A layer of a model of seven billion weights in one launch, and what lies between two attentions; N and K of its widest product."""
    found, shape = [], Shape()
    weights = [shape.products()[name] for name in ("out", "up", "down", "qkv")]
    n, k = weights[1]
    taken = ((4, 1, shape.attention, None), (4, 1, None, None), (4, 4, shape.attention, None), (8, 1, shape.attention, None),
             (4, 1, shape.attention, Direct(8, 4, 2)))  # fmt: skip
    for bits, m, attention, tiles in taken:
        kind, first = jnp.int4 if bits == 4 else jnp.int8, k if attention is None else attention.columns
        parts = [part for n, k in weights for part in (((n, k), kind), ((n, k // GROUP), jnp.bfloat16))]
        past = [((shape.layers, 2, m, shape.context, shape.shared, shape.head), jnp.bfloat16), ((), jnp.int32), ((m,), jnp.int32),
                ((m, shape.head), jnp.float32)]  # fmt: skip
        arguments = [((m, first), jnp.bfloat16), ((m, k), jnp.bfloat16), ((len(TAIL) + 1,), jnp.int32), *past, *parts]

        def function(x, residual, met, cache, layer, places, turned, *parts, attention=attention, tiles=tiles):
            read = None if attention is None else Past(cache, layer, places, turned)
            both = list(zip(parts[::2], parts[1::2], strict=True))
            return chain((x, residual), both, met, links=TAIL, group_size=GROUP, tiles=tiles, attention=attention, past=read)

        program, text = compiled(function, arguments, "h200")
        shapes = shapes_of([(m, k)] * 2, weights, TAIL, [k // GROUP for _, k in weights], [jnp.dtype(jnp.bfloat16)] * 4, [bits] * 4,
                           group=GROUP, tiles=tiles or CHAIN_TILES, cores=132)  # fmt: skip
        name = f"W{bits}A16 g128 {'chain' if attention is None else 'layer'}"
        row = {"kernel": name, "m": m, "n": n, "k": k, "tiles": _short(tiles or CHAIN_TILES), **counts(text)}
        row["shared"] = (tiles or CHAIN_TILES).blocks * shared_bytes(shapes)
        row |= {"temporaries": program.memory_analysis().temp_size_in_bytes, "float_weight": 2 * n * k}
        found.append(row)
        print(json.dumps(row), flush=True)
    return found


def roundings() -> list[dict]:
    """Rows of x to eight bits."""
    found = []
    for name, dtype, m, k in (("rows to int8", jnp.int8, 4096, 4096), ("rows to e4m3", jnp.float8_e4m3fn, 16, 28672)):
        program, text = compiled(functools.partial(round_rows, dtype=dtype, top=127.0, room=m), [((m, k), jnp.bfloat16)], "h200")
        row = {"kernel": name, "m": m, "n": 0, "k": k, "tiles": "", **counts(text), "shared": 128}
        found.append(row | {"temporaries": program.memory_analysis().temp_size_in_bytes, "float_weight": 0})
        print(json.dumps(found[-1]), flush=True)
    return found


def fallbacks() -> list[dict]:
    """What an A100 runs, for which we have no kernel: temporaries of the XLA formulation. Its instructions are XLA's own."""
    found = []
    for m in (1, 16, 512):
        n, k = SMALL
        program, _ = compiled(functools.partial(grouped_matmul, group_size=GROUP), operands("W4A16 g128", m, n, k), "a100")
        row = {"kernel": "W4A16 g128, A100", "m": m, "n": n, "k": k, "tiles": ""}
        row |= dict.fromkeys(("registers", "spills", "loop", "total", "products", "shared"), 0)
        found.append(row | {"temporaries": program.memory_analysis().temp_size_in_bytes, "float_weight": 2 * n * k})
        print(json.dumps(found[-1]), flush=True)
    return found


def _short(tiles: Tiles | Direct) -> str:
    """Blocks, stages, and what is switched on."""
    if isinstance(tiles, Direct):
        text = f"direct: {tiles.warps} warps, {tiles.turn} pieces, {tiles.blocks} blocks"
        text += f" split_k {tiles.split_k}" if tiles.split_k > 1 else ""
        return text + (" early" if tiles.early else "") + (" wide" if tiles.wide else "")
    text = f"{tiles.block_m}x{tiles.block_n}x{tiles.block_k} stages {tiles.stages}"
    for name, least in (("split_k", 1), ("warpgroups", 1), ("cluster", 1)):
        text += f" {name} {getattr(tiles, name)}" if getattr(tiles, name) > least else ""
    switches = ("scale_first", "x_left", "digits")
    return text + "".join(f" {name}" for name in switches if getattr(tiles, name))


def table(found: list[dict]) -> str:
    """Markdown: a line a case."""
    names = ("kernel", "M x N x K", "tiles", "registers", "spills", "loop", "total", "products a loop", "shared", "temporaries")
    lines = ["| " + " | ".join(names) + " |", "|" + "---|" * len(names)]
    for row in found:
        shape = f"{row['m']} x {row['n']} x {row['k']}"
        cells = [row["kernel"], shape, row["tiles"], row["registers"], row["spills"], row["loop"], row["total"], row["products"]]
        lines.append("| " + " | ".join(map(str, [*cells, row["shared"], row["temporaries"]])) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    default = pathlib.Path(__file__).parent / "gpu_static" / f"{jax.__version__}.json"
    parser.add_argument("--write", type=pathlib.Path, nargs="?", const=default, help="the JSON of the rows, a table beside it")
    given = parser.parse_args()
    found = rows() + chains() + roundings() + fallbacks()
    print(table(found))
    if given.write:
        given.write.parent.mkdir(exist_ok=True)
        given.write.write_text("[\n" + ",\n".join(json.dumps(row) for row in found) + "\n]\n")
        given.write.with_suffix(".md").write_text(table(found) + "\n")


if __name__ == "__main__":
    main()
