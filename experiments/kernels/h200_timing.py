"""How `h200.py` measures: within a budget, with every finding on the disk before the next program runs."""

import concurrent.futures
import faulthandler
import json
import pathlib
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
from h200_programs import Job, copies, fewest_bytes, products, rows, unrolled, weights


class Clock:
    """What is left of the budget, and what it was not enough for."""

    def __init__(self, seconds: float) -> None:
        """Starts it."""
        self.end, self.left_out = time.monotonic() + seconds, []

    def left(self) -> float:
        """Seconds left."""
        return self.end - time.monotonic()

    def spent(self, least: float, what: str) -> bool:
        """Whether fewer seconds are left than `what` needs, which then is noted as left out."""
        if self.left() >= least:
            return False
        print(f"{what}: left out, the budget was spent", flush=True)
        self.left_out.append(what)
        return True


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

    def seed(self) -> int:
        """Of the draws: another one for every folder, kept with its findings."""
        if "seed" not in self.found:
            self.add("seed", {"seed": int(time.time())})
        return self.found["seed"][0]["seed"]

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


def on_device(compiled, args, calls: int) -> float:
    """Microseconds of a product by the device's own clock: its kernels added up, without what lies between; the median of three runs."""
    totals = []
    for _ in range(3):
        with tempfile.TemporaryDirectory() as folder:
            with jax.profiler.trace(folder):
                jax.block_until_ready(compiled(*args))
            totals.append(sum(nanoseconds for _, nanoseconds in kernel_times(folder)))
    return round(statistics.median(totals) / calls / 1e3, 2)


def kernel_times(folder: str):
    """(name, nanoseconds) of everything that ran on the device while a trace was written."""
    for file in pathlib.Path(folder).rglob("*.xplane.pb"):
        for plane in jax.profiler.ProfileData.from_file(str(file)).planes:
            if plane.name.startswith("/device:GPU"):
                for line in plane.lines:
                    if line.name.startswith("Stream"):
                        yield from ((event.name, event.duration_ns) for event in line.events)


def side_by_side(programs: Sequence[tuple[Callable, Sequence]], threads: int) -> list[concurrent.futures.Future]:
    """Functions compiled for their arguments in threads: of each the program and the seconds that it took, all of them done."""

    def compile_one(function, arguments):
        start = time.perf_counter()
        return jax.jit(function).lower(*arguments).compile(), time.perf_counter() - start

    with concurrent.futures.ThreadPoolExecutor(threads) as pool:
        waiting = [pool.submit(compile_one, *each) for each in programs]
        concurrent.futures.wait(waiting)
    return waiting


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

        waiting = side_by_side([(unrolled(job), (xs, ws)) for job, xs, ws in prepared], self.threads)
        for (job, row), (_, xs, ws), future in zip(named, prepared, waiting, strict=True):
            broken = False
            if self.clock.spent(0, f"{part} {row}"):
                continue
            self.record.begin(part, row)
            if (error := future.exception()) is not None:
                row = row | {"failed": f"{type(error).__name__}: {error}"[:300]}
            else:
                program, seconds = future.result()
                calls = len(ws)
                try:
                    row = row | measured(program, (xs, ws), calls, self.clock)
                    row["device us"] = on_device(program, (xs, ws), calls)
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
