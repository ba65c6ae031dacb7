"""Parts `correct` and `stress` of h200.py: is every kernel right, and does it stay so over many launches."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from h200_programs import GROUP, Job, bits_of, ours, rows, short, unrolled, weights
from h200_tiles import cases, meeting
from h200_timing import Broken, Clock, Record, side_by_side
from qjax_kernels.gpu.eight_bit import rounded_rows
from qjax_kernels.gpu.order import in_order
from qjax_kernels.gpu.weight_only import weight_only_matmul


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


def correct(record: Record, clock: Clock, dry: bool, interpret, limit: int | None, threads: int) -> None:
    """Every kernel on fresh inputs against float64; device memory is filled with NaN first, so that what is not written shows.

    As many as there are threads are compiled side by side, then run one by one.
    """
    seed, wanted = record.seed(), []
    for i, case in enumerate(cases(dry)[:limit]):
        kind, m, n, k, group, tiles = case
        row = {"kind": kind, "m": m, "n": n, "k": k, "group": group, "tiles": short(tiles) if tiles else "default"}
        if record.known("correct", row) is None:
            wanted.append((seed + i, case, row))
    for first in range(0, len(wanted), threads):
        batch = wanted[first : first + threads]
        if clock.spent(20, f"correct, {len(wanted) - first} cases, the first {batch[0][2]}"):
            return
        prepared = [_operands(case, seed) for seed, case, _ in batch]
        functions = [_function(case, interpret) for _, case, _ in batch]
        waiting = side_by_side(list(zip(functions, prepared, strict=True)), threads)
        for (_, case, row), given, future in zip(batch, prepared, waiting, strict=True):
            record.begin("correct", row)
            if (error := future.exception()) is not None:
                record.add("correct", row | {"failed": f"{type(error).__name__}: {error}"[:300]})
                continue
            try:
                record.add("correct", row | _compared(future.result()[0], case, given, 1 if dry else 3))
            except jax.errors.JaxRuntimeError as failure:
                record.add("correct", row | {"failed": f"run: {failure}"[:300]})
                raise Broken from failure


def _operands(case: tuple, seed: int) -> tuple[jax.Array, ...]:
    kind, m, n, k, group, _ = case
    return rows(m, k, seed), *weights(kind, n, k, seed, group)


def _function(case: tuple, interpret) -> Callable:
    kind, _, _, _, group, tiles = case
    if kind in ("int8c", "fp8"):
        return ours(kind, tiles, interpret)
    return lambda x, w, s: weight_only_matmul(x, w, s, group_size=group, tiles=tiles, interpret=interpret)


def _compared(program, case: tuple, given: tuple, times: int) -> dict[str, Any]:
    """The largest error of a program that is run a few times, and whether its results are the same to the bit."""
    kind, m, n, _, group, _ = case
    x, codes, scales = given
    w, found, errors, worst = in_order(codes) if bits_of(kind) == 4 else codes, [], [], 0.0
    expected = reference(multiplied(kind, x, codes), w, scales, group)
    for _ in range(times):
        poison = [jnp.full((max(m, 8) * n * size,), jnp.nan, jnp.bfloat16) for size in (1, 1, 2, 8, 16)]
        jax.block_until_ready(poison)
        del poison
        y = np.asarray(program(x, codes, scales).astype(jnp.float32), np.float64)
        found.append(y)
        errors.append(float(np.linalg.norm(y - expected) / np.linalg.norm(expected)))
        worst = max(worst, float(np.abs(y - expected).max() / expected.std()))
    same = all(np.array_equal(y, found[0]) for y in found)
    right = bool(max(errors) < 4e-3 and worst < 0.05 and same)
    return {"error": max(errors), "repeatable": same, "worst": worst, "right": right}


def several(record: Record, clock: Clock) -> None:
    """Products that follow one another in a program, of shapes whose tiles blocks share: each against float64."""
    for i, (name, m, (k, n)) in enumerate((("W4A16", 256, (4096, 4096)), ("W4A16", 128, (8192, 8192)), ("W8A8", 512, (4096, 4096)))):
        job, row = Job(name, m, k, n), {"kind": f"{name}, three in a program", "m": m, "n": n, "k": k}
        if record.known("correct", row) or clock.spent(0, f"correct {row}"):
            continue
        record.begin("correct", row)
        xs = [rows(m, k, record.seed() + 10 * i + j) for j in range(3)]
        ws = [weights(job.kind, n, k, record.seed() + 10 * i + j) for j in range(3)]
        program, errors = unrolled(job).lower(xs, ws).compile(), []
        for y, x, (codes, scales) in zip(program(xs, ws), xs, ws, strict=True):
            w, group = (in_order(codes), GROUP) if bits_of(job.kind) == 4 else (codes, None)
            expected = reference(multiplied(job.kind, x, codes), w, scales, group)
            errors.append(float(np.linalg.norm(np.asarray(y.astype(jnp.float32), np.float64) - expected) / np.linalg.norm(expected)))
        record.add("correct", row | {"error": max(errors), "right": bool(max(errors) < 4e-3)})


def repeated(function: Callable, launches: int) -> Callable:
    """A program that multiplies two x in turn and counts the products that are not, to the bit, those of the first time.

    Args:
      function: of x, codes and scales.
      launches: of it, besides the two that say what is expected.

    Returns:
      A function of both x, codes and scales: how many products differ.
    """

    def run(xs, codes, scales):
        expected = jnp.stack([function(x, codes, scales) for x in xs])

        def one(i, found):
            y = function(xs[i % 2], codes, scales)
            return found + jnp.any(y != expected[i % 2]).astype(jnp.int32)

        return jax.lax.fori_loop(0, launches, one, jnp.int32(0))

    return run


def stress(record: Record, clock: Clock, dry: bool, interpret, launches: int, threads: int) -> None:
    """Kernels whose blocks wait for each other, launched many times: does each end, with the same bits (`correct` says if right)."""
    wanted = [(job, row) for job in meeting(dry) if record.known("stress", row := job.row() | {"launches": launches}) is None]
    if not wanted:
        return
    if clock.spent(60, "stress"):
        return
    given = [(jnp.stack([rows(job.m, job.k, i) for i in (1, 2)]), *weights(job.kind, job.n, job.k, 3)) for job, _ in wanted]
    functions = [repeated(ours(job.kind, job.tiles, interpret), launches) for job, _ in wanted]
    waiting = side_by_side(list(zip(functions, given, strict=True)), threads)
    for (_, row), each, future in zip(wanted, given, waiting, strict=True):
        if clock.spent(20, f"stress from {row} on"):
            return
        record.begin("stress", row)
        if (error := future.exception()) is not None:
            record.add("stress", row | {"failed": f"{type(error).__name__}: {error}"[:300]})
            continue
        try:
            program, _ = future.result()
            record.add("stress", row | {"different": int(program(*each))})
        except jax.errors.JaxRuntimeError as failure:
            record.add("stress", row | {"failed": f"run: {failure}"[:300]})
            raise Broken from failure
