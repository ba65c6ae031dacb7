"""Adam and Lion with states of 32 bits and of 8: loss, bytes, time. See README.md."""

import argparse
import json
import pathlib
import platform
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax

import qjax
from qjax.evaluation import encode, windows
from qjax.models import Llama, books_llama

TEXTS = pathlib.Path(__file__).parent.parent / "text"
HELD_OUT = 0.12
# On a CPU that others use, too, the seconds that this process computed say more than those that passed.
CLOCK = time.process_time if jax.default_backend() == "cpu" else time.perf_counter


def optimizers(steps):
    """Rates of each pair are the same."""
    ramp = lambda rate: optax.warmup_cosine_decay_schedule(0.0, rate, steps // 10, steps)  # noqa: E731
    adam, lion = ramp(1e-3), ramp(2e-4)
    return {
        "Adam, 32 bit": optax.adam(adam), "Adam, 8 bit": qjax.adam8bit(adam),
        "Lion, 32 bit": optax.lion(lion, weight_decay=0.0), "Lion, 8 bit": qjax.lion8bit(lion),
        "Adam, 8 bit, the embedding's in 32": optax.multi_transform({True: optax.adam(adam), False: qjax.adam8bit(adam)}, embeddings),
        "Adam, 8 bit, on the host": qjax.host_offload(qjax.adam8bit(adam)),
    }  # fmt: skip


def embeddings(params):
    """Which parameters are an embedding."""
    return jax.tree_util.tree_map_with_path(lambda path, _: "embed" in jax.tree_util.keystr(path), params)


def texts(tokenizer, length):
    """Windows to train on and windows to measure on."""
    seen, held = [], []
    for file in sorted(TEXTS.glob("*.txt")):
        text = file.read_text(encoding="utf-8")
        cut = text.index("\n", int(len(text) * (1 - HELD_OUT)))
        seen.append(windows(encode(tokenizer, text[:cut]))[:, :length])
        held.append(windows(encode(tokenizer, text[cut:]))[:, :length])
    return np.concatenate(seen), np.concatenate(held)


def fresh(params, key):
    """Matrices drawn anew and norms of one: the model learns from nothing."""
    leaves, tree = jax.tree.flatten(params)
    keys = jax.random.split(key, len(leaves))
    drawn = [0.02 * jax.random.normal(k, a.shape) if a.ndim > 1 else jnp.ones(a.shape) for k, a in zip(keys, leaves, strict=True)]
    return tree.unflatten(drawn)


def loss_of(apply):
    def loss(params, tokens):
        logits = apply(params, tokens)[:, :-1].astype(jnp.float32)
        return optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:]).mean()

    return loss


def train(loss, params, tx, batches):
    """The parameters after all batches, the losses, seconds of a step and of its update alone (the median), and bytes."""

    def step(params, state, tokens):
        value, grads = jax.value_and_grad(loss)(params, tokens)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state, value

    params, state = jax.tree.map(jnp.copy, params), tx.init(params)
    compiled = jax.jit(step, donate_argnums=(0, 1)).lower(params, state, batches[0]).compile()
    memory, took, losses = compiled.memory_analysis(), [], []
    for tokens in batches:
        since = CLOCK()
        params, state, value = jax.block_until_ready(compiled(params, state, tokens))
        took.append(CLOCK() - since)
        losses.append(float(value))
    update = jax.jit(lambda g, s, p: tx.update(g, s, p), donate_argnums=(0, 1))
    alone = []
    for _ in range(min(len(batches), 10) + 1):
        grads = jax.block_until_ready(jax.tree.map(jnp.copy, params))
        since = CLOCK()
        _, state = jax.block_until_ready(update(grads, state, params))
        alone.append(CLOCK() - since)
    size = sum(a.nbytes for a in jax.tree.leaves(state))
    return params, losses, np.median(took), np.median(alone[1:]), size, memory.temp_size_in_bytes


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--windows", type=int, default=64, help="held-out windows of the measurement")
    parser.add_argument("--seed", type=int, default=0, help="of the start and of the order of the batches")
    parser.add_argument("--rows", nargs="*", default=None)
    parser.add_argument("--json", type=pathlib.Path)
    options = parser.parse_args()
    checkpoint = books_llama()
    apply = Llama(checkpoint.config).apply
    params = {"params": fresh(checkpoint.params, jax.random.key(options.seed))}
    count = sum(a.size for a in jax.tree.leaves(params))
    seen, held = texts(checkpoint.tokenizer, options.length)
    held = jnp.asarray(held[np.random.default_rng(1).permutation(len(held))[: options.windows]])
    order = np.random.default_rng(options.seed).integers(len(seen), size=(options.steps, options.batch))
    batches, loss = [jnp.asarray(seen[rows]) for rows in order], loss_of(apply)
    measure, results = jax.jit(loss), {}
    print(f"{count:,} parameters; jax {jax.__version__}, {platform.processor() or platform.machine()}, {jax.devices()[0].device_kind}\n")
    columns = "loss of the last tenth | held-out loss | state, bytes a parameter | step, ms | update alone, ms | temporaries of a step, MB"
    print(f"| | {columns} |")
    print("|---|---|---|---|---|---|---|")
    for name, tx in optimizers(options.steps).items():
        if options.rows and name not in options.rows:
            continue
        trained, losses, took, alone, size, temporary = train(loss, params, tx, batches)
        last, after = np.mean(losses[-max(options.steps // 10, 1) :]), float(measure(trained, held))
        results[name] = {"losses": losses, "held out": after, "step": took, "update": alone, "bytes": size, "temporary": temporary}
        figures = f"{size / count:.3f} | {1e3 * took:.0f} | {1e3 * alone:.1f} | {temporary / 2**20:.1f}"
        print(f"| {name} | {last:.4f} | {after:.4f} | {figures} |", flush=True)
    if options.json:
        options.json.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
