"""QLoRA against full fine-tuning: perplexity on another author, and the memory of a compiled training step. See README.md."""

import argparse
import json
import pathlib
import platform
import sys
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import qjax
from qjax.evaluation import paired_bootstrap, token_losses
from qjax.formats.llama_config import LlamaConfig
from qjax.models import Llama, books_llama

sys.path.append(str(pathlib.Path(__file__).parent.parent / "text"))

from batches import batches_of, cross_entropy, split

TEXT = pathlib.Path(__file__).parent.parent / "text" / "wells.txt"
KEEP = (qjax.Rule("*embed*"),)
NF4 = qjax.nf4(double_quant=True)
LARGE = LlamaConfig(vocab_size=32000, hidden_size=1024, intermediate_size=2816, num_hidden_layers=21, num_attention_heads=16,
                    num_key_value_heads=16, head_dim=64, max_position_embeddings=2048, tie_word_embeddings=True)  # fmt: skip


def rows(rank, embedding=True, dropout=0.0):
    """The rules of each kind of adapters: all linear layers, and the tied embedding, which stays float, if it is to have one."""
    plain, magnitudes = (qjax.lora(rank, alpha=2 * rank, dropout=dropout, dora=dora) for dora in (False, True))
    first = (qjax.Rule("*embed*", train=plain),) if embedding else KEEP
    return {
        "LoRA, float base": qjax.Policy([*first, qjax.Rule("*", train=plain)]),
        "QLoRA": qjax.Policy([*first, qjax.Rule("*", weight=NF4, train=plain)]),
        "QLoRA, LoftQ": qjax.Policy([*first, qjax.Rule("*", weight=NF4, method=qjax.loftq(rank), train=plain)]),
        "QLoRA, DoRA": qjax.Policy([*first, qjax.Rule("*", weight=NF4, train=magnitudes)]),
    }


def trained(apply, params, frozen, data, rate):
    """`params` after one pass over the batches: AdamW without decay, a warm-up and one cosine. `apply` gets a key for each step."""
    steps = len(data)
    warm = max(steps // 20, 1)
    ramp = optax.warmup_cosine_decay_schedule(0.0, rate, warm, max(steps, warm + 1))
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(ramp, weight_decay=0.0))

    @jax.jit
    def run(params, frozen, data):
        def step(carry, now):
            tokens, key = now
            grads = jax.grad(lambda p: cross_entropy(apply(p, frozen, tokens, key), tokens))(carry[0])
            updates, state = optimizer.update(grads, carry[1], carry[0])
            return (optax.apply_updates(carry[0], updates), state), None

        return jax.lax.scan(step, (params, optimizer.init(params)), (data, jax.random.split(jax.random.key(1), steps)))[0][0]

    return run(params, frozen, data)


def adapt(options):
    """The mean loss of each held-out window, by row; what a row holds and trains."""
    checkpoint = books_llama()
    apply = Llama(checkpoint.config).apply
    start = {"params": jax.tree.map(lambda a: a.astype(jnp.float32), checkpoint.params)}
    seen, held = split(checkpoint.tokenizer, [TEXT])
    held = held[: options.windows] if options.windows else held
    data = batches_of(seen, options.steps, options.batch)
    losses, notes = {}, {}

    def mark(name, fn, params, since, note=""):
        losses[name] = np.asarray(token_losses(fn, params, held), np.float64).mean(1)
        notes[name] = note
        print(f"{name}: {np.exp(losses[name].mean()):.3f}, {time.perf_counter() - since:.1f} s", flush=True)

    mark("before", apply, start, time.perf_counter())
    since = time.perf_counter()
    full = trained(lambda p, _, x, key: apply(p, x), start, None, data, options.rate)
    mark("full fine-tuning", apply, full, since, f"{count(start):,}")
    for name, policy in rows(options.rank, dropout=options.dropout).items():
        if options.rows and name not in options.rows:
            continue
        since = time.perf_counter()
        base = qjax.quantize(apply, start, policy, [data[0]]).params
        tuned = qjax.qlora(apply, policy)
        adapters = tuned.init(jax.random.key(0), base, data[0])
        qjax.check_trainable(adapters)
        dropped = lambda a, b, x, key, f=tuned: f(a, b, x, dropout_key=key if options.dropout else None)  # noqa: E731
        adapters = trained(dropped, adapters, base, data, options.adapter_rate)
        mark(name, lambda both, x, tuned=tuned: tuned(*both, x), (adapters, base), since, f"{count(adapters):,}")
        if name.startswith("QLoRA"):
            again = tuned.requantize(adapters, base, [data[0]], qjax.Policy([*KEEP, qjax.Rule("*", weight=NF4)]))
            mark(f"{name}, merged and packed again", qjax.quantized(apply), again.params, since)
    return losses, notes


def count(tree):
    """How many numbers are trained."""
    return sum(a.size for a in jax.tree.leaves(tree))


def show(losses, notes):
    """Prints the table."""
    full = losses["full fine-tuning"]
    print("\n| | trained numbers | perplexity | ratio to full fine-tuning, 95 % |\n|---|---|---|---|")
    for name, each in losses.items():
        interval = paired_bootstrap(full, each)
        ratio = "" if each is full else f"{np.exp((each - full).mean()):.4f} ({np.exp(interval.low):.4f} .. {np.exp(interval.high):.4f})"
        print(f"| {name} | {notes[name]} | {np.exp(each.mean()):.3f} | {ratio} |")


def step_memory(model, params, policy, tokens):
    """What XLA says of one compiled training step of shapes; with a policy adapters train, without all parameters do."""
    optimizer = optax.adam(1e-4, mu_dtype=jnp.float32)
    tuned: Any = None if policy is None else qjax.qlora(model.apply, policy)
    trained, frozen = params, None
    if tuned is not None:
        frozen = tuned.base_shapes(params, tokens)
        trained = jax.eval_shape(lambda base, x: tuned.init(jax.random.key(0), base, x), frozen, tokens)

    def step(trained, state, frozen, tokens):
        apply = model.apply if tuned is None else lambda a, x: tuned(a, frozen, x)
        grads = jax.grad(lambda t: cross_entropy(apply(t, tokens), tokens))(trained)
        updates, state = optimizer.update(jax.tree.map(lambda g: g.astype(jnp.float32), grads), state)
        return optax.apply_updates(trained, updates), state

    float32 = jax.tree.map(lambda p: jax.ShapeDtypeStruct(p.shape, jnp.float32), trained)
    state = jax.eval_shape(optimizer.init, float32)
    found: Any = jax.jit(step, donate_argnums=(0, 1)).lower(trained, state, frozen, tokens).compile().memory_analysis()
    held = found.argument_size_in_bytes
    return held, held + found.temp_size_in_bytes + found.output_size_in_bytes - found.alias_size_in_bytes


def memory(options):
    """Prints the table of the 300M-parameter shape: bf16 parameters, float32 moments; nothing is allocated."""
    model = Llama(LARGE, dtype=jnp.bfloat16, param_dtype=jnp.bfloat16, scan_layers=True, remat=True)
    tokens = jax.ShapeDtypeStruct((1, 256), jnp.int32)
    params = jax.eval_shape(lambda: model.init(jax.random.key(0), jnp.zeros((1, 8), jnp.int32)))
    print(f"\n{count(params):,} parameters, one step at batch 1 x 256, layers in a scan, each recomputed backward\n")
    print("| | held between steps | peak | of full fine-tuning |\n|---|---|---|---|")
    policies = {"full fine-tuning": None} | {name: rows(16, embedding=False)[name] for name in ("LoRA, float base", "QLoRA", "QLoRA, DoRA")}
    found = {}
    for name, policy in policies.items():
        if options.rows and policy is not None and name not in options.rows:
            continue
        held, found[name] = step_memory(model, params, policy, tokens)
        share = f"{100 * found[name] / found['full fine-tuning']:.1f} %"
        print(f"| {name} | {held / 1e6:,.0f} MB | {found[name] / 1e6:,.0f} MB | {share} |", flush=True)
    return found


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--batch", type=int, default=8, help="Windows of 256 tokens.")
    parser.add_argument("--rate", type=float, default=3e-4, help="Of full fine-tuning.")
    parser.add_argument("--adapter-rate", type=float, default=4e-4)
    parser.add_argument("--rank", type=int, default=128)
    parser.add_argument("--dropout", type=float, default=0.1, help="Of what goes into the adapters, while they train.")
    parser.add_argument("--windows", type=int, help="The first held-out windows only; all by default.")
    parser.add_argument("--rows", nargs="*", choices=list(rows(1)))
    parser.add_argument("--tables", nargs="*", choices=["adapt", "memory"], default=["adapt", "memory"])
    parser.add_argument("--json", help="Write the numbers here, too.")
    options = parser.parse_args()
    print(f"jax {jax.__version__}, {jax.devices()[0].device_kind}, {platform.machine()}, {options.steps} steps of {options.batch} windows")
    found = {}
    if "memory" in options.tables:
        found["memory"] = memory(options)
    if "adapt" in options.tables:
        losses, notes = adapt(options)
        show(losses, notes)
        found["losses"] = {name: each.tolist() for name, each in losses.items()}
    if options.json:
        pathlib.Path(options.json).write_text(json.dumps(found))


if __name__ == "__main__":
    main()
