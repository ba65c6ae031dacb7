"""The KV cache of the shipped model at 8, 4 and 2 bit: perplexity through the cache, and 200 generated tokens. See README.md.

The weights are float, so that nothing but the cache differs. Every number is on the second half of the held-out windows.
"""

import argparse
import functools
import json
import time

import jax
import jax.numpy as jnp
import numpy as np

import qjax
from qjax.evaluation import encode, paired_bootstrap, perplexity_of, token_divergence, tree_bytes, windows
from qjax.models import Llama, books_llama, generate, heldout_text, init_cache

CONTEXT, PROMPT, NEW, GROUP = 256, 48, 200, 32
SPECS = {8: qjax.uint8, 4: qjax.uint4, 2: qjax.uint2}


def policies():
    """Rows of the table: name -> (spec of keys, spec of values); the float cache is not among them."""
    rows = {}
    for bits, make in SPECS.items():
        spec = make(scale_dtype="float16")
        token = functools.partial(qjax.kv_cache, spec, group_size=GROUP)
        channel = functools.partial(qjax.kv_cache, spec, "channel", group_size=GROUP)
        rows[f"{bits} bit, keys per token, window 16"] = (token(window=16), token(window=16))
        rows[f"{bits} bit, keys per channel, window 16"] = (channel(window=16), token(window=16))
        if bits < 8:
            rows[f"{bits} bit, keys per token and rotated, window 16"] = (token(window=16, rotate=True), token(window=16))
            rows[f"{bits} bit, keys per token, no window"] = (token(window=0), token(window=0))
            rows[f"{bits} bit, keys per channel, no window"] = (channel(window=0), token(window=0))
    for name, spec in (("fp8 e4m3", qjax.fp8_e4m3(scale_dtype="float16")), ("mxfp4", qjax.mxfp4())):
        spec = qjax.kv_cache(spec, window=16)
        rows[f"{name}, per token, window 16"] = (spec, spec)
    return rows


class Bench:
    """The model, its float cache and what is fed to both."""

    def __init__(self, arguments):
        checkpoint = books_llama()
        self.model, self.params, self.config = Llama(checkpoint.config), {"params": checkpoint.params}, checkpoint.config
        text = windows(encode(checkpoint.tokenizer, heldout_text()))
        text = text[len(text) // 2 :]
        self.windows = text[: arguments.windows]
        self.prompts = text[:: max(1, len(text) // arguments.prompts)][: arguments.prompts, :PROMPT]
        self.chunk, self.batch = arguments.chunk, arguments.batch
    def packed(self, keys, values, batch, length):
        """An empty packed cache."""
        policy = qjax.Policy([qjax.Rule("*/key", cache=keys), qjax.Rule("*/value", cache=values)])
        pack = qjax.quantized_cache(self.model.apply, policy)
        return pack(self.params, jnp.zeros((batch, 1), jnp.int32), init_cache(self.config, batch, length), jnp.int32(0))

    @functools.cached_property
    def through(self):
        """Logits of windows (B, T) from a cache that is written and read `chunk` tokens at a time: one program for float and packed."""
        run = qjax.quantized(self.model.apply)

        def whole(params, tokens, cache):
            chunks = jnp.moveaxis(tokens.reshape(len(tokens), -1, self.chunk), 1, 0)

            def step(carry, chunk):
                cache, position = carry
                logits, cache = run(params, chunk, cache, position)
                return (cache, position + self.chunk), logits

            _, logits = jax.lax.scan(step, (cache, jnp.int32(0)), chunks)
            return jnp.moveaxis(logits, 0, 1).reshape(*tokens.shape, -1)

        return jax.jit(whole)

    def score(self, make_cache):
        """Losses (N, T - 1), KL to the float cache and agreement of the likeliest token."""
        parts = []
        for i in range(0, len(self.windows), self.batch):
            tokens = jnp.asarray(self.windows[i : i + self.batch], jnp.int32)
            logits = self.through(self.params, tokens, make_cache(len(tokens)))
            plain = self.through(self.params, tokens, init_cache(self.config, len(tokens), CONTEXT))
            parts.append(jax.device_get(_compare(plain, logits, tokens)))
        return [np.concatenate(part) for part in zip(*parts, strict=True)]

    def follow(self, make_cache, tokens):
        """How often the likeliest next token is the one that the float cache chose, at each of the NEW steps of its own text."""
        given = np.concatenate([self.prompts, tokens], axis=1)
        given = jnp.asarray(np.pad(given, ((0, 0), (0, CONTEXT - given.shape[1]))), jnp.int32)
        likeliest = jnp.argmax(self.through(self.params, given, make_cache(len(given))), axis=-1)
        return float(np.mean(np.asarray(likeliest)[:, PROMPT - 1 : PROMPT + NEW - 1] == tokens))

    def generate(self, make_cache):
        """Tokens (prompts, NEW) that follow greedily."""
        apply = _quantized(self.model)
        made = generate(apply, self.params, self.prompts, NEW, init_cache=make_cache, context_length=CONTEXT)
        return made.tokens[:, PROMPT:]


@functools.cache
def _quantized(model):
    return qjax.quantized(model.apply)


@jax.jit
def _compare(plain, logits, tokens):
    log_p = jax.nn.log_softmax(logits[:, :-1], axis=-1)
    losses = -jnp.take_along_axis(log_p, tokens[:, 1:, None], axis=-1)[..., 0]
    return losses, *token_divergence(plain[:, :-1], logits[:, :-1])


def shares(keys, values, length):
    """Of `length` tokens in the cache how much is packed: at the end, and of all that was read on the way."""
    counts = [[_past(spec, n) for n in range(1, length + 1)] for spec in (keys, values)]
    end = sum(c[-1] for c in counts) / (2 * length)
    return end, sum(map(sum, counts)) / (length * (length + 1))


def _past(spec, n):
    return max(n - spec.window, 0) // spec.tokens * spec.tokens


def common_prefix(a, b):
    """Tokens of each row before the first that differs."""
    differs = a != b
    return np.where(differs.any(1), differs.argmax(1), a.shape[1])


def measure(bench, keys, values, plain_losses, plain_tokens):
    """One row of the table."""
    start = time.perf_counter()
    losses, kl, agrees = bench.score(lambda batch: bench.packed(keys, values, batch, CONTEXT))
    tokens = bench.generate(lambda batch, length: bench.packed(keys, values, batch, length))
    interval = paired_bootstrap(plain_losses, losses)
    cache = bench.packed(keys, values, 1, CONTEXT)
    leaves = jax.tree.leaves(cache, is_leaf=lambda c: isinstance(c, qjax.QCache))
    end, read = shares(keys, values, PROMPT + NEW)
    return {
        "perplexity": perplexity_of(losses),
        "ratio": [float(np.exp(v)) for v in (interval.difference, interval.low, interval.high)],
        "kl": float(np.mean(kl, dtype=np.float64)),
        "top1_agreement": float(agrees.mean()),
        "generated_agreement": float((tokens == plain_tokens).mean()),
        "step_agreement": bench.follow(lambda batch: bench.packed(keys, values, batch, CONTEXT), plain_tokens),
        "tokens_before_first_difference": float(common_prefix(tokens, plain_tokens).mean()),
        "share_packed_after_generation": end,
        "share_packed_of_all_reads": read,
        "bits_a_packed_value": sum(c.past.nbytes for c in leaves) * 8 / sum(c.past.size for c in leaves),
        "bytes_a_row": tree_bytes(cache),
        "seconds": round(time.perf_counter() - start, 1),
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--windows", type=int, default=10_000, help="held-out windows at most")
    parser.add_argument("--prompts", type=int, default=16, help="prompts of 48 tokens, continued by 200")
    parser.add_argument("--chunk", type=int, default=1, help="tokens that are written and read at a time; divides 256")
    parser.add_argument("--batch", type=int, default=16, help="windows at a time")
    parser.add_argument("--rows", nargs="*", help="names of rows, or parts of them; all by default")
    parser.add_argument("--json", help="a file for the numbers")
    arguments = parser.parse_args()
    bench = Bench(arguments)
    start = time.perf_counter()
    losses, _, _ = bench.score(lambda batch: init_cache(bench.config, batch, CONTEXT))
    tokens = bench.generate(lambda batch, length: init_cache(bench.config, batch, length))
    rows = {
        "float32": {
            "perplexity": perplexity_of(losses),
            "bytes_a_row": tree_bytes(init_cache(bench.config, 1, CONTEXT)),
            "seconds": round(time.perf_counter() - start, 1),
        }
    }
    given = f"{len(bench.windows)} windows of {CONTEXT}, {arguments.chunk} at a time; {len(bench.prompts)} prompts of {PROMPT}"
    print(f"{given}, {NEW} new tokens")
    print("| cache | perplexity | ratio to float (95 %) | KL | top-1 | 200 steps of the float text | 200 tokens alone "
          "| before first difference | packed at the end / of reads | bits a packed value | bytes |")  # fmt: skip
    print("|" + "---|" * 11)
    print(f"| float32 | {rows['float32']['perplexity']:.3f} | | | | | | | | 32 | {rows['float32']['bytes_a_row']:,} |", flush=True)
    for name, (keys, values) in policies().items():
        if arguments.rows and not any(part in name for part in arguments.rows):
            continue
        row = rows[name] = measure(bench, keys, values, losses, tokens)
        print(line(name, row), flush=True)
    if arguments.json:
        with open(arguments.json, "w") as file:
            json.dump({"given": given, "rows": rows}, file, indent=1)


def line(name, row):
    """A row of the table in Markdown."""
    ratio, low, high = row["ratio"]
    return (
        f"| {name} | {row['perplexity']:.3f} | {ratio:.4f} ({low:.4f} .. {high:.4f}) | {row['kl']:.5f} | {row['top1_agreement']:.2%} "
        f"| {row['step_agreement']:.1%} | {row['generated_agreement']:.1%} | {row['tokens_before_first_difference']:.0f} "
        f"| {row['share_packed_after_generation']:.1%} / {row['share_packed_of_all_reads']:.1%} | {row['bits_a_packed_value']:.2f} "
        f"| {row['bytes_a_row']:,} |"
    )


if __name__ == "__main__":
    main()
