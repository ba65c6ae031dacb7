"""Products with packed weights against XLA's float products on a CPU. See README.md.

Both sides take turns in one process. Cold: every call has another copy of its weight, as many copies as the caches cannot hold. Following:
a program in which each product has a copy of its own and waits for the product before, as in a step of decoding. Warm: one copy, read once
before. With `--json` each row of a table is kept as it comes, and a run that was cut off goes on from there.
"""

import argparse
import json
import os
import pathlib
import platform
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from qjax_kernels import cpu
from streaming import reading

SHAPES = ((4096, 4096), (4096, 11008), (14336, 4096), (4097, 11009))  # (N, K)
ROWS = (1, 2, 4, 8, 16, 32, 128, 512)
# At M: what the project set itself, as times XLA float32 on cold weights; on warm ones at M = 1 another for W4.
TARGETS = {
    "W4 g128": {1: 5.0, 2: 1.0, 4: 1.8, 8: 1.0, 16: 1.0, 32: 0.95, 128: 0.95, 512: 0.95},
    "W8A8": {1: 5.0, 4: 3.0, 16: 2.0, 128: 1.6},
    "W4A8 g128": {1: 5.0, 4: 3.0, 16: 2.0, 128: 1.6},
}
WARM_TARGET = 7.0
STREAMED = {"W8A8": 0.80, "W4 g128": 0.65}  # of the measured bandwidth at M = 1, cold
COPIES = 200
STATES = {
    "cold": "cold weights",
    "following": "products that follow one another in one program, each with a cold weight",
    "warm": "warm weights",
}


class Contender(NamedTuple):
    """One way to multiply: compiled function of (x, weight), copies of the weight, bytes that a call reads of one, what x is given as."""

    name: str
    call: Callable[[jax.Array, Any], jax.Array]
    weights: list[Any]
    nbytes: int
    take: Callable[[jax.Array], Any] = lambda x: x
    products: int = 1  # of a call


def contenders(n: int, k: int, cold: int, seed: int, bf16: bool) -> list[Contender]:
    """XLA's products in both layouts, and the kernels; each with copies of its weight that have `cold` bytes together."""
    rng = np.random.default_rng(seed)
    w = jnp.asarray(rng.standard_normal((n, k), np.float32))
    group = 128
    codes4 = jnp.asarray(rng.integers(-8, 8, (n, k), np.int8))
    codes8 = jnp.asarray(rng.integers(-127, 128, (n, k), np.int8))
    groups = jnp.asarray(rng.random((n, -(-k // group)), np.float32) + 0.1)
    channel = jnp.asarray(rng.random((n, 1), np.float32) + 0.1)
    pack = jax.jit(cpu.prepack, static_argnames=("bits", "group_size"))
    w4, w8 = pack(codes4, groups, bits=4, group_size=group), pack(codes8, channel, bits=8)

    def make(name: str, call: Callable[..., jax.Array], weight: Any) -> Contender:
        nbytes = sum(a.nbytes for a in jax.tree.leaves(weight))
        copies = [weight, *(jax.tree.map(jnp.copy, weight) for _ in range(min(-(-cold // nbytes), COPIES) - 1))]
        return Contender(name, jax.jit(call), jax.block_until_ready(copies), nbytes)

    rounding = cpu.Rounding()
    out = [
        make("XLA f32 (N,K)", lambda x, w: x @ w.T, w),
        make("XLA f32 (K,N)", lambda x, w: x @ w, jnp.copy(w.T)),
        make("W4 g128", lambda x, w: cpu.matmul(x, w), w4),
        make("W8", lambda x, w: cpu.matmul(x, w), w8),
        make("W8A8", lambda x, w: cpu.matmul(x, w, rounding=rounding), w8),
        make("W4A8 g128", lambda x, w: cpu.matmul(x, w, rounding=rounding), w4),
    ]
    if bf16:
        half = w.astype(jnp.bfloat16)
        out += [
            make("XLA bf16 (N,K)", lambda x, w: x.astype(jnp.bfloat16) @ w.T, half),
            make("XLA bf16 (K,N)", lambda x, w: x.astype(jnp.bfloat16) @ w, jnp.copy(half.T)),
            make("W4 g128 bf16", lambda x, w: cpu.matmul(x.astype(jnp.bfloat16), w), w4),
        ]
    return out


def torch_contenders(n: int, k: int, cold: int, seed: int) -> list[Contender]:
    """torch's own int8 and int4 products on CPUs, if torch is there; rows are given as it wants them, which is not timed."""
    try:
        import torch
    except ImportError:
        return []
    torch.set_num_threads(os.cpu_count() or 1)
    rng = np.random.default_rng(seed)

    def half(x: jax.Array) -> Any:
        return torch.from_numpy(np.array(x)).bfloat16()

    def copies(packed: Any, nbytes: int) -> list[Any]:
        return [packed, *(packed.clone() for _ in range(min(-(-cold // nbytes), COPIES) - 1))]

    out = []
    if k % 128 == 0 and n % 16 == 0:
        nibbles = torch.from_numpy(rng.integers(0, 16, (n, k)).astype(np.int32))
        packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(nibbles, 1)
        scales = torch.rand(k // 128, n, 2, dtype=torch.bfloat16)

        def int4(x: Any, w: Any) -> Any:
            return torch.ops.aten._weight_int4pack_mm_for_cpu(x, w, 128, scales)

        out.append(Contender("torch int4 g128 (bf16)", int4, copies(packed, packed.nbytes), packed.nbytes, half))
    eight = torch.from_numpy(rng.integers(-127, 128, (n, k)).astype(np.int8))
    scale = torch.rand(n, dtype=torch.bfloat16)

    def int8(x: Any, w: Any) -> Any:
        return torch.ops.aten._weight_int8pack_mm(x, w, scale)

    out.append(Contender("torch int8 (bf16)", int8, copies(eight, eight.nbytes), eight.nbytes, half))
    weight = torch._make_per_channel_quantized_tensor(eight, scale.double(), torch.zeros(n, dtype=torch.long), 0)
    count = 1 if cold == 0 else min(-(-cold // eight.nbytes), COPIES)
    dynamic = [torch.ops.quantized.linear_prepack(weight, None) for _ in range(count)]
    run = torch.ops.quantized.linear_dynamic
    return [*out, Contender("torch int8 dynamic", run, dynamic, eight.nbytes, lambda x: torch.from_numpy(np.array(x)))]


def following(one: Contender) -> Contender:
    """All copies of the weight in one program: rows wait for the product before, and all of every y counts in what comes out."""

    def program(x: jax.Array, weights: list[Any]) -> jax.Array:
        total = jnp.zeros(())
        for weight in weights:
            y = one.call(x, weight)
            x, total = x + 1e-9 * y[:, :1], total + y
        return total

    return Contender(one.name, jax.jit(program), [one.weights], one.nbytes, one.take, len(one.weights))


def race(all_of: list[Contender], x: jax.Array, seconds: float, warm: bool) -> dict[str, dict[str, float]]:
    """Median and least seconds of a product of each, in turns."""
    times: dict[str, list[float]] = {c.name: [] for c in all_of}
    given = [c.take(x) for c in all_of]
    for c, rows in zip(all_of, given, strict=True):
        jax.block_until_ready(c.call(rows, c.weights[0]))
    began, turn = time.perf_counter(), 0
    while turn < 5 or (time.perf_counter() - began < seconds and turn < 200):
        for c, rows in zip(all_of, given, strict=True):
            weight = c.weights[0] if warm else c.weights[turn % len(c.weights)]
            if warm:
                jax.block_until_ready(c.call(rows, weight))  # whatever ran before has left the caches
            start = time.perf_counter()
            jax.block_until_ready(c.call(rows, weight))
            times[c.name].append((time.perf_counter() - start) / c.products)
        turn += 1
    return {name: {"median": float(np.median(t)), "least": min(t)} for name, t in times.items()}


def table(n: int, k: int, results: dict[str, dict[str, float]], sizes: dict[str, int], speeds: dict[str, float], state: str) -> str:
    """Times of XLA float32, the better layout, and how many times faster the others are; what is streamed at M = 1."""
    names = [name for name in sizes if not name.startswith("XLA f32")]
    lines = [f"#### N = {n}, K = {k}, {STATES[state]}\n", f"| M | XLA f32, ms | {' | '.join(names)} |"]
    lines.append("|---" * (len(names) + 2) + "|")
    for m, times in sorted(results.items(), key=lambda row: int(row[0])):
        base = min(t for name, t in times.items() if name.startswith("XLA f32"))
        cells = []
        for name in names:
            if name not in times:
                cells.append("")
                continue
            target = WARM_TARGET if state == "warm" and m == "1" and name == "W4 g128" else TARGETS.get(name, {}).get(int(m))
            mark = "" if target is None else " ✓" if base / times[name] >= target else f" (< {target:g})"
            cells.append(f"{times[name] * 1e3:.2f} ms {base / times[name]:.2f}x{mark}")
        lines.append(f"| {m} | {base * 1e3:.2f} | {' | '.join(cells)} |")
    if "1" in results and state != "warm":
        rates = {name: size / results["1"][name] for name, size in sizes.items() if name in results["1"]}
        goal = {name: f" (of {least:.0%})" for name, least in STREAMED.items()}
        shares = ", ".join(f"{name} {rate / speeds['all']:.0%}{goal.get(name, '')}" for name, rate in rates.items())
        lines.append(f"\nof the bandwidth at M = 1: {shares}")
        lines.append("\nof that in jax's memory: " + ", ".join(f"{name} {rate / speeds['jax']:.0%}" for name, rate in rates.items()))
    return "\n".join(lines)


def measured(shape: str, state: str, args: argparse.Namespace, kept: dict[str, Any], keep: Callable[[], None]) -> None:
    """Adds to `kept` what it does not hold of a shape: rows by M, bytes by contender."""
    n, k = (int(size) for size in shape.split("x"))
    left = [m for m in args.rows if str(m) not in kept["seconds"]]
    if not left:
        return
    cold = {"cold": int(args.cold_bytes), "following": int(args.following or 0), "warm": 0}[state]
    sides = contenders(n, k, cold, 0, args.bf16)
    if state == "following":
        sides = [following(side) for side in sides]
    elif args.torch:
        sides += torch_contenders(n, k, cold, 0)
    kept["bytes"] = {c.name: c.nbytes for c in sides}
    for m in left:
        x = jnp.asarray(np.random.default_rng(m).standard_normal((m, k), np.float32))
        kept["seconds"][str(m)] = race(sides, x, args.seconds, state == "warm")
        keep()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shapes", nargs="*", default=[f"{n}x{k}" for n, k in SHAPES], help="N x K")
    parser.add_argument("--rows", nargs="*", type=int, default=list(ROWS))
    parser.add_argument("--seconds", type=float, default=3.0, help="of each table row")
    parser.add_argument("--following", nargs="?", type=float, const=1e9, metavar="BYTES", help="products in programs of so many bytes, too")
    parser.add_argument("--warm", action="store_true", help="one copy of each weight, too, in tables of its own")
    parser.add_argument("--least", action="store_true", help="show the least times, not the medians: for machines that are not idle")
    parser.add_argument("--cold-bytes", type=float, default=300e6, help="of all copies of a weight")
    parser.add_argument("--bf16", action="store_true", help="XLA's bfloat16 products too")
    parser.add_argument("--torch", action="store_true", help="torch's int8 and int4 products too")
    parser.add_argument("--json", type=pathlib.Path, help="file for the times; what is in it is not measured again")
    args = parser.parse_args()
    if cpu.why_not_loaded():
        raise SystemExit(cpu.why_not_loaded())
    threads = os.cpu_count() or 1
    whole: dict[str, Any] = json.loads(args.json.read_text()) if args.json and args.json.exists() else {"bandwidth": [], "tables": {}}
    whole["bandwidth"].append(reading(threads))

    def keep() -> None:
        if args.json:
            args.json.write_text(json.dumps(whole, indent=1))

    for state in ("cold", *["following"] * (args.following is not None), *["warm"] * args.warm):
        for shape in args.shapes:
            kept = whole["tables"].setdefault(f"{shape} {state}", {"seconds": {}, "bytes": {}})
            measured(shape, state, args, kept, keep)
    whole["bandwidth"].append(reading(threads))
    keep()
    loops = {name: max(turn[name] for turn in whole["bandwidth"]) for name in whole["bandwidth"][-1]}  # other work only takes from it
    speeds = {"all": max(loops.values()), "jax": max(rate for name, rate in loops.items() if "jax" in name)}
    print(f"jax {jax.__version__}, {platform.machine()}, {threads} threads, {cpu.best_instruction_set()}")
    print("reads, GB/s: " + ", ".join(f"{name} {rate / 1e9:.1f}" for name, rate in loops.items()))
    of = "least" if args.least else "median"
    for name, kept in whole["tables"].items():
        shape, state = name.split()
        n, k = (int(size) for size in shape.split("x"))
        rows = {m: {name: t[of] for name, t in times.items()} for m, times in kept["seconds"].items()}
        print("\n" + table(n, k, rows, kept["bytes"], speeds, state), flush=True)


if __name__ == "__main__":
    main()
