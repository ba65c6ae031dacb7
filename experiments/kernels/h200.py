"""Kernels for Hopper on a Hopper GPU: are they right, how fast is the chip, how fast are they, which tiles are best.

    python experiments/kernels/h200.py --out results --budget 480
    python experiments/kernels/h200.py --out results --dry        # on a CPU, tiny shapes, through the interpreter: does the script run?

Parts (`--parts`): correct, ceilings, decode, times, search; and again, which times a few tiles that were chosen beforehand beside bfloat16.
Everything is written to `--out` as it is found, and a second call with the same folder goes on where the first ended: all parts take more
than one call.
"""

import argparse
import contextlib
import itertools
import json
import pathlib
import subprocess
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

ROOT = pathlib.Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "kernels"), str(pathlib.Path(__file__).parent)]

from h200_decode import decode, right  # noqa: E402
from h200_programs import GROUP, PROGRAMS, Job, bf16, ours, rows, short, unrolled, weights  # noqa: E402
from h200_tiles import candidates, cases, chosen, spread_out  # noqa: E402
from h200_timing import Bench, Broken, Clock, Record, measured  # noqa: E402
from qjax_kernels.gpu.eight_bit import rounded_rows  # noqa: E402
from qjax_kernels.gpu.order import in_order  # noqa: E402
from qjax_kernels.gpu.weight_only import weight_only_matmul  # noqa: E402
from qjax_kernels.shapes import HOPPER as SHAPES  # noqa: E402

ROWS = (1, 8, 16, 32, 64, 128, 512, 4096)
BROKEN = 75  # the status of a process in which the device refuses further work


def reference(x, codes, scales, group: int | None) -> np.ndarray:
    """The product in float64 on the host."""
    k = x.shape[1]
    factors = np.repeat(np.asarray(scales.astype(jnp.float32), np.float64), group or k, axis=1)
    return x @ (np.asarray(codes.astype(jnp.float32), np.float64) * factors).T


def multiplied(kind: str, x, codes) -> np.ndarray:
    """Rows as the kernel multiplies them, in float64: rounded to eight bits where the codes meet such rows."""
    if kind not in ("int8c", "fp8"):
        return np.asarray(x.astype(jnp.float32), np.float64)
    q, s = rounded_rows(x, codes.dtype)
    return np.asarray(q.astype(jnp.float32), np.float64) * np.asarray(s, np.float64)[:, None]


def correct(record: Record, clock: Clock, dry: bool, interpret, limit: int) -> None:
    """Every kernel on fresh inputs against float64; device memory is filled with NaN first, so that what is not written shows."""
    seed = record.seed()
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
        left = multiplied(kind, x, codes)
        if kind in ("int8c", "fp8"):
            function = ours(kind, tiles, interpret)
        else:

            def function(x, w, s, group=group, tiles=tiles):
                return weight_only_matmul(x, w, s, group_size=group, tiles=tiles, interpret=interpret)

        expected = reference(left, in_order(codes) if kind == "int4" else codes, scales, group)
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


def several(record: Record, clock: Clock) -> None:
    """Products that follow one another in a program, of shapes whose tiles blocks share: each against float64."""
    for i, (name, m, (k, n)) in enumerate((("W4A16", 256, (4096, 4096)), ("W4A16", 128, (8192, 8192)), ("W8A8", 512, (4096, 4096)))):
        job, row = Job(name, m, k, n), {"kind": f"{name}, three in a program", "m": m, "n": n, "k": k}
        if clock.left() < 0 or record.known("correct", row):
            continue
        record.begin("correct", row)
        xs = [rows(m, k, record.seed() + 10 * i + j) for j in range(3)]
        ws = [weights(job.kind, n, k, record.seed() + 10 * i + j) for j in range(3)]
        program, errors = unrolled(job).lower(xs, ws).compile(), []
        for y, x, (codes, scales) in zip(program(xs, ws), xs, ws, strict=True):
            w, group = (in_order(codes), GROUP) if job.kind == "int4" else (codes, None)
            expected = reference(multiplied(job.kind, x, codes), w, scales, group)
            errors.append(float(np.linalg.norm(np.asarray(y.astype(jnp.float32), np.float64) - expected) / np.linalg.norm(expected)))
        record.add("correct", row | {"error": max(errors), "right": bool(max(errors) < 4e-3)})


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


def again(bench: Bench, row_counts: list[int]) -> None:
    """bfloat16 and the chosen tiles, side by side."""
    for (k, n), by_rows in chosen().items():
        for m, found in by_rows.items():
            if m not in row_counts:
                continue
            if bench.clock.left() < 15:
                print(f"again: the budget was spent before M={m} {k}x{n}", flush=True)
                continue
            bench.run([Job("bf16", m, k, n), *(Job("W4A16", m, k, n, tiles) for tiles in found)], "again")


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
    parser.add_argument("--parts", default="correct,ceilings,decode,times,search")
    parser.add_argument("--rows", default=",".join(map(str, ROWS)))
    parser.add_argument("--shapes", default=",".join(f"{k}x{n}" for k, n in SHAPES), help="K x N")
    parser.add_argument("--names", default=",".join(PROGRAMS))
    parser.add_argument("--search-rows", default="1,16,64,512,4096")
    parser.add_argument("--search-names", default="W4A16,W8A8")
    parser.add_argument("--limit", type=int, default=12, help="tiles tried for one kernel at one shape")
    parser.add_argument("--cases", type=int, default=100, help="of correctness, the first ones")
    parser.add_argument("--threads", type=int, default=4, help="that compile")
    parser.add_argument("--profile", action="store_true", help="which kernels take how long in a step of decode")
    parser.add_argument("--dry", action="store_true", help="tiny shapes through the interpreter on a CPU")
    parser.add_argument("--child", action="store_true", help="internal: work in this process")
    options = parser.parse_args()
    if options.child:
        try:
            work(options)
        except Broken:
            sys.exit(BROKEN)
        return
    # A failed kernel, or one that hangs (the watchdog's status is 1), takes its process with it: another one goes on from what is on the
    # disk. A process that ends otherwise without a finding would end so again.
    clock = Clock(options.budget)
    arguments = [word for word in sys.argv[1:] if word != "--child"]
    running, status = options.out / "running.json", 1  # unless a process ends well
    while clock.left() > 15:
        status = subprocess.run([sys.executable, __file__, *arguments, "--child", "--budget", str(clock.left())], check=False).returncode
        if status == 0:
            return
        print("process ended with", status, flush=True)
        if status != BROKEN and not running.exists():
            break
    sys.exit(status)


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
            if not options.dry:
                several(record, clock)
            right(record, clock, options.dry)
        if "ceilings" in parts:
            ceilings(record, clock, options.dry)
        if "decode" in parts:
            decode(record, clock, options.dry, options.profile)
        if "times" in parts:
            names = ["bf16", "W4A16 XLA"] if options.dry else options.names.split(",")
            times(bench, names, [(256, 128)] if options.dry else shapes, [1, 8] if options.dry else row_counts)
        if "again" in parts and not options.dry:
            again(bench, row_counts)
        if "search" in parts and not options.dry:
            search(bench, options.search_names.split(","), shapes, [int(m) for m in options.search_rows.split(",")], options.limit)
    table = markdown(record)
    (record.folder / "h200.md").write_text(table + "\n")
    print(table, flush=True)


if __name__ == "__main__":
    main()
