"""Part `decode` of h200.py: tokens a second of a model of seven billion weights, and which kernels take how long in a step."""

import collections
import concurrent.futures
import tempfile
import time
from typing import Any

import jax
import jax.numpy as jnp
from decode import Shape, chained, chained_step, empty_caches, parameters, product, step
from h200_timing import Clock, Record, kernel_times

TOKENS = 64


def default(n: int, k: int) -> None:
    """The default tiles."""


CHAINED = "a layer in one launch"
STYLES = (("int4", "default tiles", default), ("bf16", "", default), ("int4", CHAINED, None), ("int8", "default tiles", default),
          ("int8", CHAINED, None))  # fmt: skip


def made(shape: Shape, kind: str, how: str) -> dict[str, Any]:
    """The parameters of a style."""
    return chained(parameters(shape, kind)) if how == CHAINED else parameters(shape, kind)


def looped(one):
    """A program of `TOKENS` steps, each fed with the token of the one before."""

    def run(weights, caches, token, place):
        return jax.lax.fori_loop(0, TOKENS, lambda i, at: one(weights, at[1], at[0], place + i), (token, caches))

    return run


def decode(record: Record, clock: Clock, dry: bool, profile: bool) -> None:
    """Tokens a second of one row, a program a token and all in one program, and the memory that it takes.

    All programs are compiled side by side, then timed one by one.
    """
    shape = Shape(2, 256, 512, 4, 2, 512, 128) if dry else Shape()
    styles = STYLES[1:2] if dry else STYLES
    parts = ("decode", "profile") if profile else ("decode",)
    wanted = [style for style in styles if any(record.known(part, {"kind": style[0], "how": style[1]}) is None for part in parts)]
    with concurrent.futures.ThreadPoolExecutor(2 * len(STYLES)) as pool:
        steps = [chained_step(shape) if tiles is None else step(shape, product(tiles)) for _, _, tiles in wanted]
        waiting = [[pool.submit(compiled, shape, kind, how, make(one)) for make in (lambda f: f, looped)]
                   for (kind, how, _), one in zip(wanted, steps, strict=True)]  # fmt: skip
        concurrent.futures.wait([future for both in waiting for future in both])
    for (kind, how, _), both in zip(wanted, waiting, strict=True):
        row: dict[str, Any] = {"kind": kind, "how": how}
        if clock.left() < 15:
            print("decode: the budget was spent before", row, flush=True)
            return
        if failure := next((error for future in both if (error := future.exception()) is not None), None):
            record.add("decode", row | {"failed": f"{type(failure).__name__}: {failure}"[:300]})
            continue
        if record.known("decode", row) is None:
            record.begin("decode", row)
            record.add("decode", row | timed(shape, kind, how, *(future.result() for future in both)))
        if profile:
            for name, us in profiled(shape, kind, how, both[0].result()):
                record.add("profile", {"kind": kind, "how": how, "kernel": name, "us": us})


def compiled(shape: Shape, kind: str, how: str, function):
    """The program for the shapes of a model, keys and values donated."""
    weights, caches = jax.eval_shape(lambda: (made(shape, kind, how), empty_caches(shape, how == CHAINED)))
    number = jax.ShapeDtypeStruct((), jnp.int32)
    return jax.jit(function, donate_argnums=1).lower(weights, caches, number, number).compile()


def timed(shape: Shape, kind: str, how: str, single, many) -> dict[str, Any]:
    """Microseconds a token of both programs, the faster one's tokens a second, and megabytes."""
    weights, caches, token = made(shape, kind, how), empty_caches(shape, how == CHAINED), jnp.int32(1)
    places = [jnp.int32(i) for i in range(TOKENS)]
    took = {}
    for name in ("us", "us, all tokens in one program"):
        for _ in range(2):  # the first warms up
            jax.block_until_ready((token, caches, places))
            start = time.perf_counter()
            if name == "us":
                for place in places:
                    token, caches = single(weights, caches, token, place)
            else:
                token, caches = many(weights, caches, token, places[0])
            jax.block_until_ready(token)
            took[name] = round((time.perf_counter() - start) / TOKENS * 1e6, 1)
    memory = single.memory_analysis()
    took["MB"] = round((memory.argument_size_in_bytes + memory.temp_size_in_bytes) / 2**20) if memory else None
    return took | {"tokens/s": round(1e6 / min(took["us"], took["us, all tokens in one program"]), 1)}


def profiled(shape: Shape, kind: str, how: str, program) -> list[tuple[str, float]]:
    """Microseconds a step by kernel, the longest first, as the device's own clock has them; their sum in front."""
    weights, caches, token = made(shape, kind, how), empty_caches(shape, how == CHAINED), jnp.int32(1)
    token, caches = program(weights, caches, token, jnp.int32(0))
    jax.block_until_ready(token)
    steps, found = 4, collections.Counter()
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            for i in range(steps):
                token, caches = program(weights, caches, token, jnp.int32(i + 1))
            jax.block_until_ready(token)
        for name, nanoseconds in kernel_times(folder):
            found[name] += nanoseconds
    rows = [(name, round(ns / steps / 1e3, 1)) for name, ns in found.most_common(24)]
    return [("all kernels", round(found.total() / steps / 1e3, 1)), *rows]
