"""Kernels for Hopper on a Hopper GPU: are they right, how fast is the chip, how fast are they, which tiles are best.

    python experiments/kernels/h200.py --out results --budget 480
    python experiments/kernels/h200.py --out results --dry        # on a CPU, tiny shapes, through the interpreter: does the script run?

Parts (`--parts`): correct, ceilings, times, search, and again, which times a few tiles that were chosen beforehand beside bfloat16 and XLA;
and decode.
Everything is written to `--out` as it is found, and a second call with the same folder goes on where the first ended.
"""

import argparse
import concurrent.futures
import contextlib
import dataclasses
import faulthandler
import itertools
import json
import pathlib
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

ROOT = pathlib.Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "kernels"), str(pathlib.Path(__file__).parent)]

from decode import Shape, empty_caches, parameters, product, step  # noqa: E402
from qjax_kernels.gpu.eight_bit import eight_bit_matmul, rounded_rows  # noqa: E402
from qjax_kernels.gpu.tiles import SHARED_BYTES, Tiles, eight_bit_tiles, weight_only_tiles  # noqa: E402
from qjax_kernels.gpu.weight_only import weight_only_matmul  # noqa: E402

GROUP = 128
SHAPES = ((4096, 4096), (8192, 8192), (8192, 28672))  # K, N
ROWS = (1, 8, 16, 32, 64, 128, 512, 4096)
CACHE_BYTES = 60 * 2**20


class Clock:
    """What is left of the budget."""

    def __init__(self, seconds: float) -> None:
        """Starts it."""
        self.end = time.monotonic() + seconds

    def left(self) -> float:
        """Seconds left."""
        return self.end - time.monotonic()


class Record:
    """Findings, written to a folder after each, and read back by the process that follows one that died."""

    def __init__(self, folder: pathlib.Path) -> None:
        """Makes the folder, or reads what is in it."""
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.file, self.running = folder, folder / "h200.json", folder / "running.json"
        self.found = json.loads(self.file.read_text()) if self.file.exists() else {}
        if self.running.exists():
            part, row = json.loads(self.running.read_text())
            self.add(part, row | {"failed": "the process hung or died here"})

    def begin(self, part: str, row: dict) -> None:
        """Notes what is about to run, and ends the process if it takes longer than 40 seconds."""
        self.running.write_text(json.dumps([part, row]))
        faulthandler.dump_traceback_later(40, exit=True)

    def known(self, part: str, row: dict) -> dict | None:
        """The row that an earlier process found for the same thing."""
        return next((old for old in self.found.get(part, []) if row.items() <= old.items()), None)

    def add(self, part: str, row: dict) -> None:
        """Adds a row to a part and writes all."""
        faulthandler.cancel_dump_traceback_later()
        self.found.setdefault(part, []).append(row)
        self.file.write_text(json.dumps(self.found, indent=1))
        self.running.unlink(missing_ok=True)
        print(part, json.dumps(row), flush=True)


class Broken(Exception):
    """The device refuses further work after a failed kernel: a new process has to go on."""


# ------------------------------------------------------------------------------------------------------------------------------- operands


def weights(kind: str, n: int, k: int, seed: int, group: int | None = GROUP) -> tuple[jax.Array, ...]:
    """A weight (N, K) and its scales on the device, freshly drawn.

    Args:
      kind: "bf16", "int4", "int8", "int8c" and "fp8" (one scale a row).
      n: rows.
      k: columns.
      seed: of the draw.
      group: consecutive k that share a scale.

    Returns:
      The weight, and scales of magnitude such that products are of order one.
    """
    keys = jax.random.split(jax.random.key(seed), 2)

    def draw(keys):
        if kind == "bf16":
            return (jax.random.normal(keys[0], (n, k), jnp.bfloat16) * k**-0.5,)
        if kind == "fp8":
            codes = (jax.random.normal(keys[0], (n, k), jnp.bfloat16) * 64).astype(jnp.float8_e4m3fn)
        else:
            top = 8 if kind == "int4" else 128
            codes = jax.random.randint(keys[0], (n, k), -top, top, jnp.int8).astype(jnp.int4 if kind == "int4" else jnp.int8)
        columns = k // group if kind in ("int4", "int8") and group else 1
        unit = {"int4": 4.6, "fp8": 64.0}.get(kind, 74.0)
        scales = (jax.random.uniform(keys[1], (n, columns), jnp.float32, 0.5, 1.5) * k**-0.5 / unit).astype(jnp.bfloat16)
        return codes, scales

    return jax.jit(draw)(keys)


def rows(m: int, k: int, seed: int) -> jax.Array:
    """x (M, K) bfloat16."""
    return jax.jit(lambda key: jax.random.normal(key, (m, k), jnp.bfloat16))(jax.random.key(seed))


# -------------------------------------------------------------------------------------------------------------------------------- programs


def bf16(x, w):
    """The product that all is compared with."""
    return jnp.einsum("mk,nk->mn", x, w)


def xla_groups(x, codes, scales):
    """What XLA makes of codes and scales by group."""
    n, k = codes.shape
    w = (codes.astype(jnp.bfloat16).reshape(n, -1, GROUP) * scales[..., None]).reshape(n, k)
    return jnp.einsum("mk,nk->mn", x, w)


def xla_eight(x, codes, scales):
    """What XLA makes of eight bits on both sides."""
    q, s = rounded_rows(x, codes.dtype)
    wide = jnp.int32 if codes.dtype == jnp.int8 else jnp.float32
    sums = jax.lax.dot_general(q, codes, (((1,), (1,)), ((), ())), preferred_element_type=wide)
    return (sums.astype(jnp.float32) * s[:, None] * scales.astype(jnp.float32).T).astype(x.dtype)


def ours(kind: str, tiles: Tiles | None, interpret=None) -> Callable:
    """Our kernel for a kind of weight."""
    if kind in ("int8c", "fp8"):
        return jax.jit(lambda x, w, s: eight_bit_matmul(x, w, s, tiles=tiles, interpret=interpret))
    return jax.jit(lambda x, w, s: weight_only_matmul(x, w, s, group_size=GROUP, tiles=tiles, interpret=interpret))


PROGRAMS = {
    "bf16": ("bf16", bf16),
    "W4A16 XLA": ("int4", xla_groups),
    "W8A16 XLA": ("int8", xla_groups),
    "W8A8 XLA": ("int8c", xla_eight),
    "FP8 XLA": ("fp8", xla_eight),
    "W4A16": ("int4", None),
    "W8A16": ("int8", None),
    "W8A8": ("int8c", None),
    "FP8": ("fp8", None),
}


@dataclasses.dataclass(frozen=True)
class Job:
    """One program at one shape."""

    name: str
    m: int
    k: int
    n: int
    tiles: Tiles | None = None

    @property
    def kind(self) -> str:
        """Of its weight."""
        return PROGRAMS[self.name][0]

    def row(self) -> dict[str, Any]:
        """What names it in the findings."""
        tiles = self.chosen()
        return {"name": self.name, "m": self.m, "k": self.k, "n": self.n, **({"tiles": short(tiles)} if tiles else {})}

    def function(self) -> Callable:
        """The program."""
        return PROGRAMS[self.name][1] or ours(self.kind, self.tiles)

    def chosen(self) -> Tiles | None:
        """The tiles that it runs with."""
        if PROGRAMS[self.name][1] is not None or self.tiles is not None:
            return self.tiles
        default = eight_bit_tiles if self.kind in ("int8c", "fp8") else None
        return default(self.m, self.n, self.k) if default else weight_only_tiles(self.m, self.n, self.k, 4 if self.kind == "int4" else 8)


WEIGHT_BYTES = {"bf16": 2.0, "int4": 0.5, "int8": 1.0, "int8c": 1.0, "fp8": 1.0}


def fewest_bytes(job: Job) -> float:
    """Bytes that have to pass through device memory: the weight, its scales, x and y."""
    scales = {"bf16": 0, "int4": job.k // GROUP, "int8": job.k // GROUP}.get(job.kind, 1) * job.n * 2
    return WEIGHT_BYTES[job.kind] * job.n * job.k + scales + 2 * job.m * (job.k + job.n)


def copies(job: Job, m: int) -> int:
    """Sets of weights, one a product, so many that none is still in the cache when it is used again."""
    return 4 if m > 1024 else max(4, min(24, int(4 * CACHE_BYTES / (WEIGHT_BYTES[job.kind] * job.n * job.k)) + 1))


def unrolled(job: Job) -> Callable:
    """A program of one product for every weight, each of which waits for the one before.

    Products that share an operand would be merged into one that reads it once, and independent ones may run beside each other: either gives
    a time that no model sees. So every weight occurs once, and a barrier ties the next x to the last y.
    """
    function = job.function()

    def many(x_list, w_list):
        found: list[jax.Array] = []
        for i, w in enumerate(w_list):
            x = x_list[i % len(x_list)]
            if found:
                x, found[-1] = jax.lax.optimization_barrier((x, found[-1]))
            found.append(function(x, *w))
        return found

    return jax.jit(many)


def products(program) -> int:
    """Products in a compiled program: calls of the matrix library, of kernels and of fusions around a product; -1 where none are told."""
    text = program.as_text()
    called = re.findall(r"custom_call_target=\"([^\"]*)\"", text)
    kernels = sum(any(word in target for word in ("cublas", "gemm", "mosaic", "cudnn")) for target in called)
    # A fusion that Triton compiles holds its dot in a computation of its own: as many dots as products.
    return kernels + len(re.findall(r"= \S+ dot\(", text))


# ---------------------------------------------------------------------------------------------------------------------------------- timing


def measured(compiled, args, calls: int, clock: Clock) -> dict:
    """Median microseconds of a product: the whole program is queued several times, then awaited.

    Args:
      compiled: the program.
      args: its arguments.
      calls: products in it.
      clock: the budget.

    Returns:
      `us`, and `spread`: the distance of the quartiles.
    """
    jax.block_until_ready(compiled(*args))
    start = time.perf_counter()
    jax.block_until_ready(compiled(*args))
    once = time.perf_counter() - start
    repeats = max(2, min(20, int(0.03 / max(once, 1e-5))))
    times = []
    for _ in range(7):
        start = time.perf_counter()
        last = None
        for _ in range(repeats):
            last = compiled(*args)
        jax.block_until_ready(last)
        times.append((time.perf_counter() - start) / repeats / calls * 1e6)
        if clock.left() < 0:
            break
    quartiles = statistics.quantiles(times, n=4) if len(times) > 1 else [times[0]] * 3
    return {"us": round(statistics.median(times), 3), "spread": round(quartiles[2] - quartiles[0], 3)}


class Bench:
    """Compiles programs in threads, then times them one by one over shared buffers."""

    def __init__(self, clock: Clock, record: Record, threads: int) -> None:
        """Keeps the buffers of one shape at a time."""
        self.clock, self.record, self.threads = clock, record, threads
        self.held: dict[Any, Any] = {}

    def operands(self, job: Job) -> tuple[list, list]:
        """x and weights of a job; those of another shape are dropped."""
        sets = copies(job, job.m)
        if self.held and next(iter(self.held))[:2] != (job.k, job.n):
            self.held.clear()
        key = (job.k, job.n, job.kind)
        if len(self.held.get(key, ())) < sets:
            self.held[key] = [weights(job.kind, job.n, job.k, i) for i in range(sets)]
        xs = 1 if job.m > 1024 else 3
        row_key = (job.k, job.n, "x", job.m)
        if row_key not in self.held:
            self.held[row_key] = [rows(job.m, job.k, 100 + i) for i in range(xs)]
        return self.held[row_key], self.held[key][:sets]

    def run(self, jobs: list[Job], part: str) -> list[dict]:
        """Compiles all jobs, which share K and N, and times them; a failure is a row with its message."""
        named = [(job, job.row()) for job in jobs]
        old = [self.record.known(part, row) for _, row in named]
        named = [pair for pair, known in zip(named, old, strict=True) if known is None]
        prepared = [(job, *self.operands(job)) for job, _ in named]
        rows_found = [row for row in old if row is not None]

        def compile_one(item):
            job, xs, ws = item
            start = time.perf_counter()
            program = unrolled(job).lower(xs, ws).compile()
            return program, time.perf_counter() - start

        with concurrent.futures.ThreadPoolExecutor(self.threads) as pool:
            waiting = [pool.submit(compile_one, item) for item in prepared]
            concurrent.futures.wait(waiting)
        for (job, row), (_, xs, ws), future in zip(named, prepared, waiting, strict=True):
            broken = False
            if self.clock.left() < 0:
                print(part, "the budget was spent before", row, flush=True)
                continue
            self.record.begin(part, row)
            if (error := future.exception()) is not None:
                row = row | {"failed": f"{type(error).__name__}: {error}"[:300]}
            else:
                program, seconds = future.result()
                calls = len(ws)
                try:
                    row = row | measured(program, (xs, ws), calls, self.clock)
                    row["TB/s"] = round(fewest_bytes(job) / row["us"] / 1e6, 3)
                    row["TFLOP/s"] = round(2 * job.m * job.n * job.k / row["us"] / 1e6, 1)
                    row["compile_s"] = round(seconds, 1)
                    row |= {"calls": calls, "products": products(program)}
                    row["temp_MB"] = round(getattr(program.memory_analysis(), "temp_size_in_bytes", 0) / 2**20, 3)
                except jax.errors.JaxRuntimeError as failure:
                    broken, row = True, row | {"failed": f"run: {failure}"[:300]}
            self.record.add(part, row)
            rows_found.append(row)
            if broken:
                raise Broken
        return rows_found


def short(tiles: Tiles) -> dict:
    """What differs from the defaults of a `Tiles`."""
    standard = {field.name: field.default for field in dataclasses.fields(Tiles)}
    return {name: value for name, value in dataclasses.asdict(tiles).items() if value != standard[name]}


# ------------------------------------------------------------------------------------------------------------------------------ correctness


def cases(dry: bool) -> list[tuple[str, int, int, int, int | None, Tiles | None]]:
    """(kind, m, n, k, group, tiles) that cover every path: tails, padding, splits, both pipelines, clusters, orders of nibbles."""
    small = [
        ("int4", 8, 64, 1024, 128, Tiles(8, 64, 256, 2)),
        ("int4", 16, 64, 1024, 128, Tiles(16, 64, 256, 2, reorder=True)),
        ("int8c", 3, 192, 512, None, Tiles(8, 64, 128, 2, split_k=2)),
    ]
    if dry:
        return small
    return [
        *small,
        ("int4", 1, 1088, 4096, 128, Tiles(8, 128, 512, 2, digits=True)),
        ("int4", 16, 1024, 4096, 128, Tiles(16, 128, 512, 2, split_k=2, digits=True)),
        ("int4", 50, 1088, 1408, 128, Tiles(64, 256, 128, 3, warpgroups=2, digits=True)),
        ("int4", 64, 1024, 4096, 128, Tiles(64, 256, 128, 4, warpgroups=2, reorder=True, cluster=2)),
        ("int4", 300, 1024, 4096, 128, Tiles(128, 256, 128, 3, warpgroups=2, scale_first=True, reorder=True, cluster=2)),
        ("int4", 300, 1088, 4096, 128, Tiles(128, 128, 256, 2, warpgroups=2, scale_first=True, reorder=True)),
        ("int4", 1, 4096, 4096, 128, None),
        ("int4", 1, 1088, 4096, 128, Tiles(8, 64, 256, 4, split_k=3)),
        ("int4", 13, 1088, 2048, 128, None),
        ("int4", 16, 1024, 4096, 128, Tiles(16, 128, 256, 3)),
        ("int4", 16, 1024, 4096, 128, Tiles(16, 128, 256, 3, reorder=True)),
        ("int4", 64, 1024, 4096, 256, Tiles(64, 128, 128, 3)),
        ("int4", 64, 1024, 4096, 128, Tiles(64, 128, 128, 3, scale_first=True, reorder=True)),
        ("int4", 200, 1088, 4096, 128, None),
        ("int4", 512, 1024, 4096, 128, Tiles(128, 256, 128, 3, warpgroups=2, scale_first=True, reorder=True)),
        ("int4", 64, 1024, 4096, 128, Tiles(64, 256, 128, 3, warpgroups=2)),
        ("int4", 16, 1024, 2048, None, None),
        ("int8", 1, 1088, 4096, 128, None),
        ("int8", 100, 1024, 2048, None, None),
        ("int8c", 1, 4096, 4096, None, None),
        ("int8c", 17, 1088, 2048, None, None),
        ("int8c", 300, 1088, 2048, None, None),
        ("int8c", 512, 1024, 2048, None, Tiles(128, 256, 128, 3, warpgroups=2, x_left=True)),
        ("fp8", 5, 1024, 2048, None, None),
        ("fp8", 300, 1088, 2048, None, None),
    ]


def reference(x, codes, scales, group: int | None) -> np.ndarray:
    """The product in float64 on the host."""
    k = x.shape[1]
    factors = np.repeat(np.asarray(scales.astype(jnp.float32), np.float64), group or k, axis=1)
    return x @ (np.asarray(codes.astype(jnp.float32), np.float64) * factors).T


def correct(record: Record, clock: Clock, dry: bool, interpret, limit: int) -> None:
    """Every kernel on fresh inputs against float64; device memory is filled with NaN first, so that what is not written shows."""
    seed = int(time.time())
    for i, (kind, m, n, k, group, tiles) in enumerate(cases(dry)[:limit]):
        if clock.left() < 0:
            print(f"correct: the budget was spent before {kind} {m}x{n}x{k}", flush=True)
            return
        row: dict[str, Any] = {"kind": kind, "m": m, "n": n, "k": k, "group": group, "tiles": short(tiles) if tiles else "default"}
        if record.known("correct", row):
            continue
        record.begin("correct", row)
        broken = False
        codes, scales = weights(kind, n, k, seed + i, group)
        x = rows(m, k, seed + i)
        if kind in ("int8c", "fp8"):
            q, s = rounded_rows(x, codes.dtype)
            left = np.asarray(q.astype(jnp.float32), np.float64) * np.asarray(s, np.float64)[:, None]
            function = ours(kind, tiles, interpret)
        else:
            left = np.asarray(x.astype(jnp.float32), np.float64)

            def function(x, w, s, group=group, tiles=tiles):
                return weight_only_matmul(x, w, s, group_size=group, tiles=tiles, interpret=interpret)

        expected = reference(left, codes, scales, group)
        try:
            program = jax.jit(function).lower(x, codes, scales).compile()
            errors = []
            for _ in range(1 if dry else 3):
                poison = [jnp.full((max(m, 8) * n * size,), jnp.nan, jnp.bfloat16) for size in (1, 1, 2, 8, 16)]
                jax.block_until_ready(poison)
                del poison
                y = np.asarray(program(x, codes, scales).astype(jnp.float32), np.float64)
                errors.append(float(np.linalg.norm(y - expected) / np.linalg.norm(expected)))
            row |= {"error": max(errors), "repeatable": len(set(errors)) == 1, "worst": float(np.abs(y - expected).max() / expected.std())}
            row["right"] = bool(row["error"] < 4e-3 and row["worst"] < 0.05)
        except (ValueError, NotImplementedError) as failure:
            row["failed"] = f"{type(failure).__name__}: {failure}"[:300]
        except jax.errors.JaxRuntimeError as failure:
            broken, row["failed"] = True, f"run: {failure}"[:300]
        record.add("correct", row)
        if broken:
            raise Broken


# --------------------------------------------------------------------------------------------------------------------------------- ceilings


def ceilings(record: Record, clock: Clock, dry: bool) -> None:
    """What the chip does at best: a copy, counting bytes read and written, and a bfloat16 product on random data."""
    if "ceilings" in record.found:
        return
    size = 2**16 if dry else 2**31
    source = jax.random.bits(jax.random.key(0), (size // 4,), jnp.uint32)
    flip = jax.jit(lambda x: x ^ jnp.uint32(1))
    found = measured(flip.lower(source).compile(), (source,), 1, clock)
    record.add("ceilings", {"what": "copy", **found, "TB/s": round(2 * size / found["us"] / 1e6, 3)})
    edge = 128 if dry else 8192
    a, b = rows(edge, edge, 0), rows(edge, edge, 1)
    found = measured(jax.jit(bf16).lower(a, b).compile(), (a, b), 1, clock)
    record.add("ceilings", {"what": "bf16 product", **found, "TFLOP/s": round(2 * edge**3 / found["us"] / 1e6, 1)})


# ----------------------------------------------------------------------------------------------------------------------------------- search


def candidates(name: str, m: int, n: int, k: int) -> list[Tiles]:
    """Tiles worth a try, the likeliest first."""
    bits = 4 if name == "W4A16" else 8
    eight = name in ("W8A8", "FP8")
    block_m = max(8, -(-m // 8) * 8)
    found: list[Tiles] = []
    if m <= 64:
        reorders = (False, True) if name == "W4A16" else (False,)
        for split, block_n, block_k, stages, reorder in itertools.product((1, 2, 4, 8), (64, 128), (256, 128, 512), (4, 3, 2, 6), reorders):
            blocks = -(-n // block_n) * split
            if 132 <= blocks <= 132 * 7 and k // (block_k * split) >= 2 and stages <= k // (block_k * split):
                found.append(Tiles(block_m, block_n, block_k, stages, split, reorder=reorder))
        for split, (block_n, warpgroups), reorder in itertools.product((1, 2, 4), ((128, 2), (256, 2)), reorders):
            if not eight and 100 <= -(-n // block_n) * split <= 132 * 4:
                found.append(Tiles(block_m, block_n, 256 if m <= 32 else 128, 4, split, warpgroups=warpgroups, reorder=reorder))
    elif eight:
        for block_m_, block_n, stages, cluster in itertools.product((128, 256), (128, 256), (3, 4), (1, 2)):
            if block_m_ * block_n <= 128 * 256 and (cluster == 1 or m > block_m_):
                found.append(Tiles(block_m_, block_n, 128, stages, warpgroups=2, x_left=True, cluster=cluster))
    else:
        either = (True, False)
        for block_m_, block_n, stages, first, reorder in itertools.product((64, 128, 256), (128, 256), (3, 4, 2), either, either):
            # Sums of their own for a group and 128 columns of them do not fit into registers.
            if block_m_ * block_n <= (128 if first else 64) * 256 and (bits == 4 or not reorder) and block_m_ <= block_m:
                found.append(Tiles(block_m_, block_n, 128, stages, warpgroups=2, scale_first=first, reorder=reorder))
    scale_bytes, x_bytes = (0, 1) if eight else (2, 2)
    return [tiles for tiles in found if tiles.shared_bytes(bits, scale_bytes, x_bytes) <= SHARED_BYTES]


def spread_out(found: list, limit: int) -> list:
    """At most `limit` of a list, evenly spaced, so that all kinds of candidates are tried."""
    return found if len(found) <= limit else [found[i * len(found) // limit] for i in range(limit)]


def search(bench: Bench, names: list[str], shapes, row_counts, limit: int) -> None:
    """The fastest tiles of every kernel at every shape, kept in a table."""
    table: dict[str, dict] = {}
    for (k, n), name, m in itertools.product(shapes, names, row_counts):
        if bench.clock.left() < 20:
            print(f"search: the budget was spent before {name} M={m} {k}x{n}", flush=True)
            continue
        jobs = [Job(name, m, k, n, tiles) for tiles in spread_out(candidates(name, m, n, k), limit)]
        timed = [row for row in bench.run(jobs, "search") if "us" in row]
        if timed:
            best = min(timed, key=lambda row: row["us"])
            table.setdefault(name, {})[f"{m},{k},{n}"] = {"tiles": best["tiles"], "us": best["us"]}
            (bench.record.folder / "tiles.json").write_text(json.dumps(table, indent=1))
            print("best", name, m, k, n, json.dumps(table[name][f"{m},{k},{n}"]), flush=True)


def chosen() -> dict[tuple[int, int], dict[int, list[Tiles]]]:
    """Tiles that reasoning ahead of time puts first, by (K, N) and rows; the last of each is the best of the run before."""
    fast = Tiles(128, 128, 128, 4, warpgroups=2, scale_first=True, reorder=True)
    wide = dataclasses.replace(fast, block_n=256, stages=3)
    deep = dataclasses.replace(fast, block_k=256, stages=2)
    pair = Tiles(64, 256, 128, 4, warpgroups=2, reorder=True)
    return {
        (8192, 28672): {
            1: [
                Tiles(8, 128, 512, 2, digits=True),
                Tiles(8, 64, 512, 2, digits=True),
                Tiles(8, 64, 512, 3, digits=True),
                Tiles(8, 64, 512, 2, split_k=2, digits=True),
                Tiles(8, 64, 512, 2, reorder=True),
            ],
            16: [
                Tiles(16, 128, 512, 2, digits=True),
                Tiles(16, 64, 512, 2, digits=True),
                Tiles(16, 128, 256, 3, digits=True),
                Tiles(16, 64, 512, 2, reorder=True),
            ],
            64: [
                Tiles(64, 256, 128, 3, warpgroups=2, digits=True),
                Tiles(64, 128, 256, 2, digits=True),
                dataclasses.replace(pair, cluster=2),
                dataclasses.replace(pair, scale_first=True, cluster=2),
                pair,
                Tiles(64, 64, 128, 4, reorder=True),
            ],
            512: [
                dataclasses.replace(wide, cluster=2),
                dataclasses.replace(fast, cluster=2),
                deep,
                wide,
                dataclasses.replace(fast, stages=3),
            ],
        },
        (4096, 4096): {
            1: [
                Tiles(8, 64, 512, 2, split_k=4, digits=True),
                Tiles(8, 64, 512, 2, split_k=2, digits=True),
                Tiles(8, 64, 512, 2, split_k=4),
                Tiles(8, 64, 1024, 1, split_k=4),
                Tiles(8, 128, 128, 3, split_k=8),
            ],
            16: [
                Tiles(16, 64, 512, 2, split_k=4, digits=True),
                Tiles(16, 64, 512, 2, split_k=4),
                Tiles(16, 64, 256, 4, split_k=8),
            ],
            64: [
                Tiles(64, 128, 128, 3, split_k=8, digits=True),
                Tiles(64, 64, 128, 4, split_k=4, reorder=True),
                Tiles(64, 64, 128, 2, split_k=8),
            ],
            512: [
                dataclasses.replace(fast, reorder=False),
                dataclasses.replace(fast, cluster=2),
                deep,
                Tiles(128, 256, 128, 3, split_k=2, warpgroups=2, scale_first=True),
            ],
        },
    }


def again(bench: Bench) -> None:
    """bfloat16, what XLA makes of int4, and the chosen tiles, side by side."""
    for (k, n), by_rows in chosen().items():
        for m, found in by_rows.items():
            if bench.clock.left() < 15:
                print(f"again: the budget was spent before M={m} {k}x{n}", flush=True)
                continue
            bench.run([Job("bf16", m, k, n), Job("W4A16 XLA", m, k, n), *(Job("W4A16", m, k, n, tiles) for tiles in found)], "again")


def few(n: int, k: int) -> Tiles:
    """Tiles for one row: enough thread blocks for every multiprocessor, without a second program where N alone gives them."""
    return Tiles(8, 64, 512, 2, split_k=1 if n >= 16384 else 4, digits=True)


def decode(record: Record, clock: Clock, dry: bool) -> None:
    """Tokens a second of one row, and the memory that it takes: weights, keys and values, temporaries."""
    shape = Shape(2, 256, 512, 4, 2, 512, 128) if dry else Shape()
    styles = [
        ("int4", "digits", few),
        ("bf16", "", lambda n, k: None),
        ("int8", "default tiles", lambda n, k: None),
        ("int4", "default tiles", lambda n, k: None),
    ]
    for kind, how, tiles in [("bf16", "", lambda n, k: None)] if dry else styles:
        if clock.left() < 15:
            print("decode: the budget was spent before", kind, flush=True)
            return
        row: dict[str, Any] = {"kind": kind, "how": how}
        if record.known("decode", row):
            continue
        weights_, caches = parameters(shape, kind), empty_caches(shape)
        token, place = jnp.int32(1), jnp.int32(0)
        program = jax.jit(step(shape, product(tiles)), donate_argnums=1).lower(weights_, caches, token, place).compile()
        record.begin("decode", row)
        memory = program.memory_analysis()
        row["MB"] = round((memory.argument_size_in_bytes + memory.temp_size_in_bytes) / 2**20) if memory else None
        places = [jnp.int32(i) for i in range(96)]
        for i in range(32):
            token, caches = program(weights_, caches, token, places[i])
        jax.block_until_ready(token)
        start = time.perf_counter()
        for i in range(32, 96):
            token, caches = program(weights_, caches, token, places[i])
        jax.block_until_ready(token)
        row["us"] = round((time.perf_counter() - start) / 64 * 1e6, 1)
        row["tokens/s"] = round(1e6 / row["us"], 1)
        record.add("decode", row)
        del weights_, caches, program


def times(bench: Bench, names: list[str], shapes, row_counts) -> None:
    """Every program at every shape with the default tiles."""
    for (k, n), m in itertools.product(shapes, row_counts):
        if bench.clock.left() < 20:
            print(f"times: the budget was spent before M={m} {k}x{n}", flush=True)
            continue
        bench.run([Job(name, m, k, n) for name in names], "times")


def markdown(record: Record) -> str:
    """The timed programs as a table: microseconds, and how often faster than bfloat16."""
    timed = [row for part in ("times", "search", "again") for row in record.found.get(part, []) if "us" in row]
    best: dict[tuple, dict[str, float]] = {}
    for row in timed:
        at = best.setdefault((row["k"], row["n"], row["m"]), {})
        at[row["name"]] = min(at.get(row["name"], float("inf")), row["us"])
    names = [name for name in PROGRAMS if any(name in at for at in best.values())]
    lines = ["| K x N | M | " + " | ".join(names) + " |", "|" + "---|" * (len(names) + 2)]
    for (k, n, m), at in sorted(best.items()):
        base = at.get("bf16")
        ratios = {name: f" ({base / us:.2f}x)" if base and name != "bf16" else "" for name, us in at.items()}
        cells = [f"{at[name]:.1f}{ratios[name]}" if name in at else "" for name in names]
        lines.append(f"| {k} x {n} | {m} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    """Runs the parts asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=pathlib.Path, required=True)
    parser.add_argument("--budget", type=float, default=480, help="seconds")
    parser.add_argument("--parts", default="correct,ceilings,times,search")
    parser.add_argument("--rows", default=",".join(map(str, ROWS)))
    parser.add_argument("--shapes", default=",".join(f"{k}x{n}" for k, n in SHAPES), help="K x N")
    parser.add_argument("--names", default=",".join(PROGRAMS))
    parser.add_argument("--search-rows", default="1,16,64,512,4096")
    parser.add_argument("--search-names", default="W4A16,W8A8")
    parser.add_argument("--limit", type=int, default=12, help="tiles tried for one kernel at one shape")
    parser.add_argument("--cases", type=int, default=100, help="of correctness, the first ones")
    parser.add_argument("--threads", type=int, default=4, help="that compile")
    parser.add_argument("--dry", action="store_true", help="tiny shapes through the interpreter on a CPU")
    parser.add_argument("--child", action="store_true", help="internal: work in this process")
    options = parser.parse_args()
    if options.child:
        try:
            work(options)
        except Broken:
            sys.exit(75)
        return
    # A failed kernel takes its process with it: another one goes on from what is on the disk.
    clock = Clock(options.budget)
    arguments = [word for word in sys.argv[1:] if word != "--child"]
    while clock.left() > 15:
        done = subprocess.run([sys.executable, __file__, *arguments, "--child", "--budget", str(clock.left())], check=False)
        if done.returncode == 0:
            return
        print("process ended with", done.returncode, flush=True)


def work(options: argparse.Namespace) -> None:
    """Runs the parts in this process."""
    clock, record = Clock(options.budget), Record(options.out)
    device = jax.devices()[0]
    if "device" not in record.found:
        record.add("device", {"device": str(device), "kind": device.device_kind, "jax": jax.__version__})
    shapes = [tuple(map(int, shape.split("x"))) for shape in options.shapes.split(",")]
    parts, interpret, scope = options.parts.split(","), None, contextlib.nullcontext()
    if options.dry:
        from tests.kernels.gpu.interpreter import interpreter, register_operands

        interpret, scope = interpreter(), register_operands()
    row_counts = [int(m) for m in options.rows.split(",")]
    bench = Bench(clock, record, options.threads)
    with scope:
        if "correct" in parts:
            correct(record, clock, options.dry, interpret, options.cases)
        if "ceilings" in parts:
            ceilings(record, clock, options.dry)
        if "times" in parts:
            names = ["bf16", "W4A16 XLA"] if options.dry else options.names.split(",")
            times(bench, names, [(256, 128)] if options.dry else shapes, [1, 8] if options.dry else row_counts)
        if "again" in parts and not options.dry:
            again(bench)
        if "decode" in parts:
            decode(record, clock, options.dry)
        if "search" in parts and not options.dry:
            search(bench, options.search_names.split(","), shapes, [int(m) for m in options.search_rows.split(",")], options.limit)
    table = markdown(record)
    (record.folder / "h200.md").write_text(table + "\n")
    print(table, flush=True)


if __name__ == "__main__":
    main()
