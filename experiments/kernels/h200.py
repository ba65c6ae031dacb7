"""Kernels for Hopper on a Hopper GPU: are they right, how fast is the chip, how fast are they, which tiles are best.

    python experiments/kernels/h200.py --out results --budget 480
    python experiments/kernels/h200.py --out dry --dry        # on a CPU, tiny shapes, jax 0.11 or newer: does it run?

Parts (`--parts`): correct, stress, ceilings, decode, times, search; and again, which times a few tiles that were chosen beforehand beside
bfloat16.
Everything is written to `--out` as it is found, and a second call with the same folder goes on where the first ended: all parts take more
than one call.
"""

import argparse
import contextlib
import itertools
import json
import os
import pathlib
import subprocess
import sys
from collections.abc import Callable, Sequence

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
PARTS = ("correct", "stress", "ceilings", "decode", "times", "search", "again")
LEAST = 15  # seconds that a process needs
SEARCHED = ("W4A16", "W4A16 f32", "W8A16", "W8A8", "FP8")
BROKEN = 75  # the status of a process in which the device refuses further work
UNFINISHED = 3  # and where the budget ended before everything was done


def ceilings(record: Record, clock: Clock, dry: bool) -> None:
    """What the chip does at best: a copy, counting bytes read and written, and a bfloat16 product on random data."""
    if record.known("ceilings", {"what": "bf16 product"}):  # which comes last
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
        if bench.clock.spent(20, f"search {name} M={m} {k}x{n}"):
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
            if bench.clock.spent(15, f"again M={m} {k}x{n}"):
                continue
            bench.run([Job("bf16", m, k, n), *(Job("W4A16", m, k, n, tiles) for tiles in found)], "again")


def times(bench: Bench, names: list[str], shapes, row_counts) -> None:
    """Every program at every shape with the default tiles."""
    for (k, n), m in itertools.product(shapes, row_counts):
        if bench.clock.spent(20, f"times M={m} {k}x{n}"):
            continue
        bench.run([Job(name, m, k, n) for name in names], "times")


def markdown(record: Record) -> str:
    """The timed programs as two tables, by the device's clock and by the wall's: microseconds, and how often faster than bfloat16."""
    tables = [f"{title}:\n\n{_table(record, key)}" for title, key in (("device, us", "device us"), ("whole, us", "us"))]
    dry = any(row.get("dry") for row in record.found.get("device", []))
    return "\n\n".join((["A dry run: nothing here is the time of a kernel."] if dry else []) + tables)


def _table(record: Record, key: str) -> str:
    at: dict[tuple, dict[str, float]] = {}
    for row in (row for part in ("times", "again") for row in record.found.get(part, []) if key in row):
        found = at.setdefault((row["k"], row["n"], row["m"]), {})
        found[row["name"]] = min(found.get(row["name"], float("inf")), row[key])
    names = [name for name in PROGRAMS if any(name in found for found in at.values())]
    lines = ["| K x N | M | " + " | ".join(names) + " |", "|" + "---|" * (len(names) + 2)]
    for (k, n, m), found in sorted(at.items()):
        base = found.get("bf16")
        ratios = {name: f" ({base / us:.2f}x)" if base and us and name != "bf16" else "" for name, us in found.items()}
        cells = [f"{found[name]:.1f}{ratios[name]}" if name in found else "-" for name in names]
        lines.append(f"| {k} x {n} | {m} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def wrong(found: dict) -> list[str]:
    """What a folder has of results that are not right, and of programs that failed: one line each."""
    bad = [(part, row) for part in ("correct", "stress") for row in found.get(part, []) if not row.get("right", row.get("different") == 0)]
    failed = [(part, row) for part, rows in found.items() if part not in ("correct", "stress") for row in rows if "failed" in row]
    return [f"{part}: {json.dumps(row)}" for part, row in bad + failed]


def several_of(allowed: Sequence[str]) -> Callable[[str], list[str]]:
    """A list by commas, of words that are known."""

    def read(text: str) -> list[str]:
        words = [word.strip() for word in text.split(",")]
        if unknown := [word for word in words if word not in allowed]:
            raise argparse.ArgumentTypeError(f"{', '.join(map(repr, unknown))} of {text!r}; known are {', '.join(allowed)}")
        return words

    return read


def _from_one_on(word: str) -> bool:
    return word.isdecimal() and int(word) >= 1


def positive(text: str) -> int:
    """A whole number from 1 on: none of anything would check nothing and find nothing wrong."""
    if not _from_one_on(text):
        raise argparse.ArgumentTypeError(f"{text!r}; give a whole number from 1 on")
    return int(text)


def counts(text: str) -> list[int]:
    """Numbers of rows by commas."""
    words = [word.strip() for word in text.split(",")]
    if unknown := [word for word in words if not _from_one_on(word)]:
        raise argparse.ArgumentTypeError(f"{', '.join(map(repr, unknown))} of {text!r}; rows are numbers from 1 on")
    return [int(word) for word in words]


def sizes(text: str) -> list[tuple[int, int]]:
    """K x N by commas, of which kernels have tiles."""
    found = []
    for word in text.split(","):
        k, _, n = word.strip().partition("x")
        if not (k.isdecimal() and n.isdecimal()) or int(k) % 128 or int(n) % 64 or not int(k) * int(n):
            raise argparse.ArgumentTypeError(f"{word!r} of {text!r}; shapes are K x N as in 4096x14336, multiples of 128 and of 64")
        found.append((int(k), int(n)))
    return found


def read_options() -> argparse.Namespace:
    """What is asked for; what is unknown ends the script with a message."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=pathlib.Path, required=True, help="a folder for findings, of one kind of device")
    parser.add_argument("--budget", type=float, default=480, help=f"seconds, more than {LEAST}")
    parser.add_argument("--parts", type=several_of(PARTS), help="what to do, by commas; all but again without: " + ", ".join(PARTS))
    parser.add_argument("--rows", type=counts, help=f"of x, in times and again; without {', '.join(map(str, ROWS))}")
    parser.add_argument("--shapes", type=sizes, help="K x N as in 4096x14336,8192x8192, in times and search; without those of the tables")
    parser.add_argument("--names", type=several_of(tuple(PROGRAMS)), help=f"programs of times; without all: {', '.join(PROGRAMS)}")
    parser.add_argument("--search-rows", type=counts, default=[1, 16, 64, 512, 4096], help="of x, in search")
    parser.add_argument(
        "--search-names", type=several_of(SEARCHED), default=list(SEARCHED[:-1]), help=f"kernels of search: {', '.join(SEARCHED)}"
    )
    parser.add_argument("--limit", type=positive, default=12, help="tiles tried for one kernel at one shape, 12 without")
    parser.add_argument("--cases", type=positive, help="of correctness, the first ones; all without")
    parser.add_argument("--launches", type=positive, help="of stress, a kernel: 20000, 3 of a dry run")
    parser.add_argument("--threads", type=positive, default=4, help="that compile")
    parser.add_argument("--profile", action="store_true", help="which kernels take how long in a step of decode")
    parser.add_argument("--dry", action="store_true", help="tiny shapes of its own, interpreted on a CPU; neither search nor again")
    parser.add_argument("--child", action="store_true", help="internal: work in this process")
    options = parser.parse_args()
    options.launches = options.launches or (3 if options.dry else 20000)
    if options.out.exists() and not options.out.is_dir():
        parser.error(f"argument --out: {options.out} is a file; give a folder")
    if options.dry and jax.__version_info__ < (0, 11):
        parser.error(f"argument --dry: the interpreter needs jax 0.11 or newer, this is {jax.__version__}")
    if options.dry and (asked := {"search", "again"} & set(options.parts or ())):
        parser.error(f"argument --parts: {', '.join(sorted(asked))} of a dry run; it has neither search nor again")
    if options.dry and (given := [name for name in ("rows", "shapes", "names") if getattr(options, name)]):
        parser.error(f"argument --{given[0]}: a dry run has its own; leave it out")
    options.parts, options.rows = options.parts or list(PARTS[:-1]), options.rows or list(ROWS)
    options.shapes, options.names = options.shapes or list(SHAPES), options.names or list(PROGRAMS)
    if not LEAST < options.budget < float("inf") and not options.child:
        parser.error(f"argument --budget: {options.budget}; give seconds, more than the {LEAST} that a process needs")
    return options


def main() -> None:
    """Runs the parts asked for; its status is 1 where a result is wrong or a program failed, else 3 where something is left to do."""
    options = read_options()
    if options.child:
        try:
            sys.exit(UNFINISHED if work(options) else 0)
        except Broken:
            sys.exit(BROKEN)
    # A failed kernel, or one that hangs (the watchdog's status is 1), takes its process with it: another one goes on from what is on the
    # disk. A process that ends otherwise without a finding would end so again.
    clock = Clock(options.budget)
    arguments = [word for word in sys.argv[1:] if word != "--child"]
    file, running, status = options.out / "h200.json", options.out / "running.json", 1  # unless a process ends well
    # Interpreted blocks wait for each other inside callbacks, each of which holds a thread.
    environment = os.environ | ({"NPROC": "16"} if options.dry else {})
    while clock.left() > LEAST:
        command = [sys.executable, __file__, *arguments, "--child", "--budget", str(clock.left())]
        status = subprocess.run(command, check=False, env=environment).returncode
        if status in (0, UNFINISHED):
            break
        print("process ended with", status, flush=True)
        if status != BROKEN and not running.exists():
            break
    lines = wrong(json.loads(file.read_text())) if file.exists() else []
    for line in lines:
        print("not right:", line, flush=True)
    if status in (UNFINISHED, BROKEN):
        print(f"unfinished: the same call with `--out {options.out}` goes on", flush=True)
    sys.exit(1 if lines else UNFINISHED if status == BROKEN else status)


def check_device(record: Record, dry: bool) -> None:
    """Ends the script where the device is none that kernels run on, or not that of the folder's findings."""
    device = jax.devices()[0]
    here = {"kind": device.device_kind, "jax": jax.__version__} | ({"dry": True} if dry else {})
    if not dry and getattr(device, "compute_capability", "") != "9.0":
        sys.exit(f"h200.py needs a Hopper GPU, the first device is {device}: pass --dry to see whether the script runs")
    for row in record.found.get("device", []):
        if {key: value for key, value in row.items() if key != "device"} != here:
            sys.exit(f"`--out` {record.folder} has findings of {row}, this is {here}: take another folder")
    if "device" not in record.found:
        record.add("device", {"device": str(device), **here})


def work(options: argparse.Namespace) -> list[str]:
    """Runs the parts in this process, and returns what the budget was not enough for."""
    clock, record = Clock(options.budget), Record(options.out)
    check_device(record, options.dry)
    parts, interpret, scope = options.parts, None, contextlib.nullcontext()
    if options.dry:
        from tests.kernels.gpu.interpreter import interpreter, register_operands

        interpret, scope = interpreter(), register_operands()
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
            names = ["bf16", "W4A16 XLA"] if options.dry else options.names
            times(bench, names, [(256, 128)] if options.dry else options.shapes, [1, 8] if options.dry else options.rows)
        if "again" in parts and not options.dry:
            again(bench, options.rows)
        if "search" in parts and not options.dry:
            search(bench, options.search_names, options.shapes, options.search_rows, options.limit)
    table = markdown(record)
    (record.folder / "h200.md").write_text(table + "\n")
    print(table, flush=True)
    return clock.left_out


if __name__ == "__main__":
    main()
