"""Part `decode` of h200.py: tokens a second of a model of seven billion weights, and which kernels take how long in a step."""

import collections
import concurrent.futures
import tempfile
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from decode import GROUP, TAIL, Shape, chained, chained_step, empty_caches, parameters, product, step
from h200_programs import short
from h200_timing import Clock, Record, kernel_times
from qjax_kernels.gpu.attention import Past, rotation
from qjax_kernels.gpu.chain import chain, counters, one_by_one
from qjax_kernels.gpu.tiles import Direct

TOKENS = 64  # the last that the cache holds: both ways of attention then read nearly all of it


def default(n: int, k: int) -> None:
    """The default tiles."""


CHAINED = "a layer in one launch"
STYLES = (("int4", "default tiles", default), ("bf16", "", default), ("int4", CHAINED, None), ("int8", "default tiles", default),
          ("int8", CHAINED, None))  # fmt: skip


def made(shape: Shape, kind: str, how: str) -> dict[str, Any]:
    """The parameters of a style."""
    return chained(parameters(shape, kind)) if how == CHAINED else parameters(shape, kind)


def right(record: Record, clock: Clock, dry: bool) -> None:
    """A layer in one launch beside the same in jax, a product after the other: all results, and whether launches give the same bits."""
    if dry:
        return
    two = Direct(8, 4, 2)  # parts of a thread block
    for kind, m, place, context, tiles in (("int4", 1, 0, 512, None), ("int4", 1, 300, 512, two), ("int8", 3, 511, 512, None),
                                           ("int4", 4, 77, 512, None), ("int4", 2, 3999, 4096, None)):  # fmt: skip
        shape = Shape(layers=1, context=context)
        row: dict[str, Any] = {
            "kind": kind,
            "m": m,
            "layer": f"after {place} tokens of {context}",
            "tiles": short(tiles) if tiles else "default",
        }
        if record.known("correct", row) or clock.spent(0, f"correct {row}"):
            continue
        record.begin("correct", row)
        (layer,) = made(shape, kind, CHAINED)["layers"]
        keys = jax.random.split(jax.random.key(place), 3)
        qkv = jax.random.normal(keys[0], (m, shape.attention.columns), jnp.bfloat16)
        x = jax.random.normal(keys[1], (m, shape.width), jnp.bfloat16)
        cache = jax.random.normal(keys[2], (1, 2, m, shape.context, shape.shared, shape.head), jnp.bfloat16)
        places = jnp.full((m,), place, jnp.int32)
        past = Past(cache, jnp.int32(0), places, rotation(places, shape.head))
        weights = [layer[name] for name in ("out", "up", "down", "qkv")]
        how = {"links": TAIL, "group_size": GROUP, "attention": shape.attention, "past": past}
        with jax.default_matmul_precision("highest"):
            expected = jax.jit(lambda qkv, x, weights, how=how: one_by_one((qkv, x), weights, **how))(qkv, x, weights)
        run = jax.jit(lambda qkv, x, weights, met, how=how, tiles=tiles: chain((qkv, x), weights, met, tiles=tiles, **how))
        met = counters(len(TAIL) + 1)
        found = [jax.device_get(run(qkv, x, weights, met)) for _ in range(3)]
        wide = [(np.float64(y), np.float64(jax.device_get(z))) for y, z in zip(found[0], expected, strict=True)]
        errors = [float(np.linalg.norm(y - z) / np.linalg.norm(z)) for y, z in wide]
        same = all(np.array_equal(y, z, equal_nan=True) for other in found[1:] for y, z in zip(found[0], other, strict=True))
        record.add(
            "correct", row | {"error": max(errors), "errors": errors, "repeatable": same, "right": bool(max(errors) < 1e-2) and same}
        )


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
        if clock.spent(15, f"decode from {row} on"):
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
    places = [jnp.int32(shape.context - TOKENS + i) for i in range(TOKENS)]
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
    took["tokens before"] = shape.context - TOKENS
    return took | {"tokens/s": round(1e6 / min(took["us"], took["us, all tokens in one program"]), 1)}


def profiled(shape: Shape, kind: str, how: str, program) -> list[tuple[str, float]]:
    """Microseconds a step by kernel, the longest first, as the device's own clock has them; their sum in front."""
    weights, caches, token = made(shape, kind, how), empty_caches(shape, how == CHAINED), jnp.int32(1)
    token, caches = program(weights, caches, token, jnp.int32(shape.context - TOKENS))
    jax.block_until_ready(token)
    steps, found = 4, collections.Counter()
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            for i in range(steps):
                token, caches = program(weights, caches, token, jnp.int32(shape.context - TOKENS + i + 1))
            jax.block_until_ready(token)
        for name, nanoseconds in kernel_times(folder):
            found[name] += nanoseconds
    rows = [(name, round(ns / steps / 1e3, 1)) for name, ns in found.most_common(24)]
    return [("all kernels", round(found.total() / steps / 1e3, 1)), *rows]
