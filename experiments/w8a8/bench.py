"""W8A8 and AWQ on the shipped model, with and without planted outlier channels. See README.md."""

import argparse
import json
import platform
import time

import jax
import jax.numpy as jnp
import numpy as np
import sites

import qjax
from qjax.evaluation import (
    batches,
    calibration_windows,
    divergence,
    encode,
    measure_speed,
    paired_bootstrap,
    perplexity_of,
    token_losses,
    tree_bytes,
    windows,
)
from qjax.models import Llama, books_llama, calibration_lines, heldout_text

INT8 = qjax.int8()
DYNAMIC_PRODUCTS = (qjax.Rule("*:dot_general.*", activation=qjax.dynamic(INT8)),)
# Of product 1 the left operand is the probabilities, which are never negative.
STATIC_PRODUCTS = (
    qjax.Rule("*self_attn:dot_general.0", activation=qjax.static(INT8)),
    qjax.Rule("*self_attn:dot_general.1", activation=(qjax.static(qjax.uint8()), qjax.static(INT8))),
)


def tables():
    """Rows of each table: name -> (weight, activation, method, rules for products of two activations)."""
    w8a8 = {
        "float": None,
        "weights only": (INT8, None, None),
        "static min-max": (INT8, qjax.static(INT8), None),
        "static percentile 99.9": (INT8, qjax.static(INT8, qjax.percentile(99.9)), None),
        "static entropy": (INT8, qjax.static(INT8, qjax.entropy()), None),
        "static mse": (INT8, qjax.static(INT8, qjax.mse()), None),
        "dynamic per tensor": (INT8, qjax.dynamic(INT8, per="tensor"), None),
        "dynamic per token": (INT8, qjax.dynamic(INT8), None),
        "static, smoothquant .5": (INT8, qjax.static(INT8), qjax.smoothquant()),
        "static, smoothquant searched": (INT8, qjax.static(INT8), qjax.smoothquant("search")),
        "dynamic, smoothquant searched": (INT8, qjax.dynamic(INT8), qjax.smoothquant("search")),
        "W8A8 + attention products, dynamic": (INT8, qjax.dynamic(INT8), None, DYNAMIC_PRODUCTS),
        "W8A8 + attention products, static": (INT8, qjax.dynamic(INT8), None, STATIC_PRODUCTS),
        "llm.int8()": (INT8, None, qjax.llm_int8()),
    }
    weights = {}
    for bits, spec in {"4": qjax.int4, "3": qjax.int3}.items():
        for group in (128, 64):
            for method in (qjax.rtn(), qjax.gptq(), qjax.rtn(mse=True), qjax.awq(clip=False), qjax.awq(), qjax.awq(then=qjax.gptq())):
                weights[f"{bits} bit g{group} {method.name}"] = (spec(group_size=group), None, method)
    return {"w8a8": w8a8, "weights": weights}


def planted(params, factor, seed=0, share=0.02):
    """The same function with outlier channels: what makes them times `factor`, the rows of what reads them divided by it.

    In what every norm and every gated product gives: the inputs of all linear layers but the output projections.
    """
    rng = np.random.default_rng(seed)
    params = jax.tree.map(lambda w: w, params)
    for layer in (v for k, v in params["params"].items() if k.startswith("layers")):
        for maker, readers in (
            (("input_layernorm", "scale"), [("self_attn", n) for n in ("q_proj", "k_proj", "v_proj")]),
            (("post_attention_layernorm", "scale"), [("mlp", n) for n in ("gate_proj", "up_proj")]),
            (("mlp", "up_proj", "kernel"), [("mlp", "down_proj")]),
        ):
            size = _leaf(layer, maker).shape[-1]
            by = np.where(rng.permutation(size) < share * size, factor, 1.0).astype(np.float32)
            _set(layer, maker, _leaf(layer, maker) * by)
            for reader in readers:
                _set(layer, (*reader, "kernel"), _leaf(layer, (*reader, "kernel")) / by[:, None])
    return params


def _leaf(tree, path):
    return tree if not path else _leaf(tree[path[0]], path[1:])


def _set(tree, path, value):
    _leaf(tree, path[:-1])[path[-1]] = value


class Bench:
    """The model, its text and its calibration windows."""

    def __init__(self, count):
        checkpoint = books_llama()
        self.apply, self.params = Llama(checkpoint.config).apply, {"params": checkpoint.params}
        self.text = windows(encode(checkpoint.tokenizer, heldout_text()))[:count]
        self.data = [jnp.asarray(b) for b in batches(calibration_windows(checkpoint.tokenizer, calibration_lines()), 8)]
        self.keep = qjax.Rule("*embed*", weight=None)

    def row(self, params, how):
        started = time.perf_counter()
        if how is None:
            fn, packed, nbytes = self.apply, params, tree_bytes(params)
        else:
            weight, activation, method, *products = how
            named = products[0] if products else ()
            policy = qjax.Policy([self.keep, qjax.Rule("*", weight=weight, activation=activation, method=method), *named])
            result = qjax.quantize(self.apply, params, policy, calibration=self.data)
            fn, packed, nbytes = qjax.quantized(self.apply, sites=result.sites), result.params, result.report.nbytes
        seconds = time.perf_counter() - started
        losses = token_losses(fn, packed, self.text)
        moved = divergence(self.apply, params, fn, packed, self.text)
        speed = measure_speed(jax.jit(fn), packed, jnp.asarray(self.text[:8]), repeats=5)
        return {
            "perplexity": perplexity_of(losses),
            "kl": moved.mean_kl,
            "bytes": int(nbytes),
            "tokens_per_second": self.text[:8].size / float(np.median(speed.seconds)),
            "seconds": seconds,
            "losses": losses,
        }


def heading(name, bases):
    """Prints the head of a table in Markdown."""
    ratios = " | ".join(f"ratio to {base}" for base in bases)
    print(f"\n### {name}\n")
    print(f"| | perplexity | {ratios} | KL | MB | tokens/s | s to quantize |\n|---|---|---|---|---|---|{'---|' * len(bases)}", flush=True)


def show(key, row, bases):
    """Prints a row; intervals are those of the perplexity's ratio to the rows `bases`, 95 % of a paired bootstrap."""
    intervals = [None if base is None else paired_bootstrap(base["losses"], row["losses"]) for base in bases]
    ratios = " | ".join("" if i is None else f"{np.exp(i.low):.4f} .. {np.exp(i.high):.4f}" for i in intervals)
    print(f"| {key} | {row['perplexity']:.3f} | {ratios} | {row['kl']:.5f} | {row['bytes'] / 1e6:.2f} "
          f"| {row['tokens_per_second']:,.0f} | {row['seconds']:.1f} |", flush=True)  # fmt: skip


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--windows", type=int, help="Windows of held-out text; all of them by default.")
    parser.add_argument("--tables", nargs="*", default=["w8a8", "planted x30", "planted x100", "weights", "sites"])
    parser.add_argument("--rows", nargs="*", help="Only rows whose name holds one of these.")
    parser.add_argument("--json", help="Write the numbers here, too.")
    options = parser.parse_args()
    bench, all_rows = Bench(options.windows), {}
    print(f"jax {jax.__version__}, {platform.machine()}, {platform.system()}, {len(bench.text)} windows of {bench.text.shape[1]} tokens")
    for table in options.tables:
        name, _, factor = table.partition(" x")
        recipes = tables()[{"planted": "w8a8", "sites": "weights"}.get(name, name)]
        wanted = {k: how for k, how in recipes.items() if not options.rows or any(part in k for part in options.rows)}
        if name == "sites":
            wanted = {k: how for k, how in wanted.items() if how[2].name in ("rtn", "gptq", "awq")}
            text = jnp.asarray(bench.text[-64:])
            all_rows[table] = sites.compare(bench.apply, bench.params, bench.keep, wanted, bench.data, text)
            continue
        params, rows = bench.params if not factor else planted(bench.params, float(factor)), {}
        methods = ("rtn", "gptq") if name == "weights" else ()
        heading(table, [f"{m} with the same spec" for m in methods] or ["float"])
        for key, how in wanted.items():
            rows[key] = bench.row(params, how)
            # The first three words of a row of weights are its spec.
            names = [" ".join([*key.split()[:3], m]) for m in methods] or ["float"]
            show(key, rows[key], [rows[n] if n in rows and n != key else None for n in names])
        all_rows[table] = {key: {k: v for k, v in row.items() if k != "losses"} for key, row in rows.items()}
    if options.json:
        with open(options.json, "w") as file:
            json.dump(all_rows, file, indent=1)


if __name__ == "__main__":
    main()
