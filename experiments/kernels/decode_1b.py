"""Tokens a second and resident memory of a Llama of a billion weights, float and packed, through `qjax.generate`. See README.md.

Each kind of weights has a process of its own, one after another. Weights are random and made as the kernels read them: there is never
a float copy of a packed one.
"""

import argparse
import ctypes
import dataclasses
import gc
import json
import pathlib
import subprocess
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import qjax
from qjax.core import quantize
from qjax.evaluation import tree_bytes
from qjax.evaluation.memory import peak_resident_bytes, resident_bytes
from qjax.models import Llama, LlamaConfig, init_cache, prepacked

KINDS: dict[str, Any] = {
    "float32": None,
    "bfloat16": None,
    "int8": qjax.int8(),
    "int4 g128": qjax.int4(group_size=128),
    "int4 g128 + int8 activations": qjax.int4(group_size=128),
}
GOAL = 4.0  # int4 tokens a second, times float32
MEMORY = 0.10  # resident bytes beyond what is known to be there, as a share of it


def config(layers: int, width: int) -> LlamaConfig:
    """Llama 3.2 1B: 16 layers of 2048, hidden 8192, 32 heads that share 8, 128,256 tokens, a tied embedding."""
    part = width / 2048
    return LlamaConfig(
        vocab_size=int(128256 * part),
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=layers,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=width // 32,
        max_position_embeddings=2048,
        rope_theta=500000.0,
        tie_word_embeddings=True,
    )


def shapes(model: Llama, kind: str) -> Any:
    """The tree of parameters as the kernels read them, without a number in it."""
    spec, act = KINDS[kind], qjax.dynamic(qjax.int8()) if "activations" in kind else None

    def packed(path: Any, leaf: jax.Array) -> Any:
        if spec is None or leaf.ndim != 2:
            return leaf
        q = quantize(leaf, spec, axes=(1,) if "embed" in jax.tree_util.keystr(path) else (0,))
        return q if act is None else dataclasses.replace(q, act=act)

    params = jax.eval_shape(model.init, jax.random.key(0), jax.ShapeDtypeStruct((1, 1), jnp.int32))
    return jax.eval_shape(lambda p: prepacked(model, jax.tree_util.tree_map_with_path(packed, p)), params)


def filled(tree: Any, kind: str) -> Any:
    """Random numbers that keep activations in range: bytes for codes, scales for a deviation of .02, norms of one."""
    rng = np.random.default_rng(0)
    deviation = 2 ** (4 if "int4" in kind else 8) / 12**0.5  # of uniform codes
    normal = rng.standard_normal(2**22 + 1, np.float32) * 0.02

    def fill(path: Any, leaf: Any) -> jax.Array:
        name = jax.tree_util.keystr(path)
        if leaf.dtype == jnp.uint8:
            return jnp.asarray(rng.integers(0, 256, leaf.shape, np.uint8))
        if name.endswith("scales"):
            return jnp.asarray(np.full(leaf.shape, 0.02 / deviation, leaf.dtype))
        if len(leaf.shape) == 1 and leaf.size:
            return jnp.ones(leaf.shape, leaf.dtype)
        return jax.block_until_ready(jnp.asarray(np.resize(normal, leaf.shape), leaf.dtype))

    return jax.tree_util.tree_map_with_path(fill, tree)


def settled_bytes() -> int:
    """What the process holds when Python and glibc have given back what is free, of compilations above all."""
    gc.collect()
    if sys.platform == "linux":
        ctypes.CDLL(None).malloc_trim(0)
    return resident_bytes()


def measure(kind: str, layers: int, width: int, tokens: int, prompt: int) -> dict[str, Any]:
    """One kind, in this process."""
    dtype = jnp.bfloat16 if kind == "bfloat16" else jnp.float32
    model = Llama(config(layers, width), dtype=dtype, param_dtype=dtype)
    tree = shapes(model, kind)
    # What jax and its compiler take once is in the process before the model is: it has generated from a model of one narrow layer.
    small = Llama(config(1, 256), dtype=dtype, param_dtype=dtype)
    qjax.generate(small, filled(shapes(small, kind), kind), np.ones((1, prompt), np.int32), 3, eos_ids=())
    before = settled_bytes()
    params = filled(tree, kind)
    gc.collect()
    loaded = resident_bytes()
    made = qjax.generate(model, params, np.ones((1, prompt), np.int32), tokens + 2, eos_ids=())
    cache = jax.eval_shape(lambda: init_cache(model.config, 1, -(-(prompt + tokens + 2) // 64) * 64, dtype))
    known = before + tree_bytes(params) + tree_bytes(cache)
    untrimmed, now = resident_bytes(), settled_bytes()
    return {
        "kind": kind,
        "weights": sum(leaf.size for leaf in jax.tree.leaves(jax.eval_shape(model.init, jax.random.key(0), jnp.ones((1, 1), jnp.int32)))),
        "tokens_per_second": made.tokens_per_second,
        "first_token_seconds": made.first_token_seconds,
        "parameter_bytes": tree_bytes(params),
        "cache_bytes": tree_bytes(cache),
        "before_bytes": before,
        "loaded_bytes": loaded,
        "untrimmed_bytes": untrimmed,
        "resident_bytes": now,
        "peak_bytes": peak_resident_bytes(),
        "beyond": now / known - 1,
    }


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown."""
    base = next((row["tokens_per_second"] for row in rows if row["kind"] == "float32"), None)
    lines = ["| weights | tokens/s | times float32 | parameters | process before | resident | beyond what is known |", "|---" * 7 + "|"]
    for row in rows:
        rate = row["tokens_per_second"]
        times = "" if base is None else f"{rate / base:.2f}x"
        if times and row["kind"] == "int4 g128":
            times += " ✓" if rate / base >= GOAL else f" (< {GOAL:g})"
        sizes = (f"{row[name] / 2**20:.0f} MiB" for name in ("parameter_bytes", "before_bytes", "resident_bytes"))
        mark = "✓" if row["beyond"] <= MEMORY else f"(> {MEMORY:.0%})"
        lines.append(f"| {row['kind']} | {rate:.2f} | {times} | {' | '.join(sizes)} | {row['beyond']:+.1%} {mark} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kinds", nargs="*", default=list(KINDS), choices=list(KINDS), help="of weights")
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--width", type=int, default=2048, help="a multiple of 128 with an even width of heads")
    parser.add_argument("--tokens", type=int, default=16, help="that are timed, a step each")
    parser.add_argument("--prompt", type=int, default=8, help="tokens of it")
    parser.add_argument("--json", type=pathlib.Path, help="file for the results; kinds that are in it are not measured again")
    parser.add_argument("--alone", action="store_true", help="measure the one kind in this process and print JSON")
    args = parser.parse_args()
    if args.alone:
        print(json.dumps(measure(args.kinds[0], args.layers, args.width, args.tokens, args.prompt)))
        return
    rows = json.loads(args.json.read_text()) if args.json and args.json.exists() else []
    for kind in args.kinds:
        if any(row["kind"] == kind for row in rows):
            continue
        sizes = [f"--{name}={getattr(args, name)}" for name in ("layers", "width", "tokens", "prompt")]
        done = subprocess.run([sys.executable, __file__, "--alone", *sizes, "--kinds", kind], stdout=subprocess.PIPE, check=True)
        rows.append(json.loads(done.stdout.splitlines()[-1]))
        if args.json:
            args.json.write_text(json.dumps(rows, indent=1))
    print(table(rows))


if __name__ == "__main__":
    main()
