"""Kernels for Hopper on a Hopper GPU: are they right, how fast is the chip, how fast are they, which tiles are best.

    python experiments/kernels/h200.py --out results --budget 480
    python experiments/kernels/h200.py --out results --dry        # on a CPU, tiny shapes, through the interpreter: does the script run?

Parts (`--parts`): correct, stress, ceilings, decode, times, search; and again, which times a few tiles that were chosen beforehand beside
bfloat16.
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

import jax
import jax.numpy as jnp

ROOT = pathlib.Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "kernels"), str(pathlib.Path(__file__).parent)]

from h200_correct import correct, several, stress  # noqa: E402
from h200_decode import decode, right  # noqa: E402
from h200_programs import PROGRAMS, Job, bf16, rows  # noqa: E402
from h200_tiles import candidates, chosen  # noqa: E402
from h200_timing import Bench, Broken, Clock, Record, measured  # noqa: E402
from qjax_kernels.shapes import HOPPER as SHAPES  # noqa: E402

ROWS = (1, 8, 16, 32, 64, 128, 512, 4096)
BROKEN = 75  # the status of a process in which the device refuses further work


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
    for (k, n), name, m in itertools.product(shapes, names, row_counts):
        if bench.clock.left() < 20:
            print(f"search: the budget was spent before {name} M={m} {k}x{n}", flush=True)
            continue
        found = candidates(name, m, n, k)
        print(f"search: {name} M={m} {k}x{n}, {min(limit, len(found))} of {len(found)} candidates", flush=True)
        bench.run([Job(name, m, k, n, tiles) for tiles in found[:limit]], "search")
        (bench.record.folder / "tiles.json").write_text(json.dumps(fastest(bench.record.found.get("search", [])), indent=1) + "\n")


def fastest(found: list[dict]) -> dict[str, dict]:
    """Of everything that was searched in a folder the best tiles by name and "M,K,N", and how long they took.

    By the device's clock: the launches of a small product take as long as the product, and vary more.
    """
    table: dict[str, dict] = {}
    for row in sorted((row for row in found if "device us" in row), key=lambda row: row["device us"]):
        kept = {key: row[key] for key in ("tiles", "us", "device us")}
        table.setdefault(row["name"], {}).setdefault(f"{row['m']},{row['k']},{row['n']}", kept)
    return table


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
    parser.add_argument("--parts", default="correct,stress,ceilings,decode,times,search")
    parser.add_argument("--rows", default=",".join(map(str, ROWS)))
    parser.add_argument("--shapes", default=",".join(f"{k}x{n}" for k, n in SHAPES), help="K x N")
    parser.add_argument("--names", default=",".join(PROGRAMS))
    parser.add_argument("--search-rows", default="1,16,64,512,4096")
    parser.add_argument("--search-names", default="W4A16,W8A8")
    parser.add_argument("--limit", type=int, default=12, help="tiles tried for one kernel at one shape")
    parser.add_argument("--cases", type=int, default=100, help="of correctness, the first ones")
    parser.add_argument("--launches", type=int, default=20000, help="of stress, a kernel")
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
            correct(record, clock, options.dry, interpret, options.cases, options.threads)
            if not options.dry:
                several(record, clock)
            right(record, clock, options.dry)
        if "stress" in parts:
            stress(record, clock, options.dry, interpret, options.launches, options.threads)
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
