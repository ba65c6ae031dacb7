"""Trains the second model of the comparison, and loads it: an NNX decoder unlike the shipped Llama. See README.md.

Layers scanned over a stack, layer norms with biases, learned positions, GELU without a gate, biases on every linear layer, six heads on
two key/value heads, an untied head, and width 384 = 3 * 128. It learns the shipped model's distribution from text that the shipped model
makes, every window seen once: so it cannot overfit, and it never saw a word of the text that is calibrated and measured on.

    python second_model.py                     # trains and writes weights/second.safetensors
    python second_model.py --evaluate          # loads it and prints its perplexities
"""

import argparse
import dataclasses
import pathlib
import time
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from safetensors.flax import load_file, save_file

import qjax
from qjax.evaluation import calibration_windows, divergence, encode, perplexity, windows
from qjax.models import Llama, books_llama, calibration_lines, heldout_text
from qjax.models.generate import generate
from qjax.models.llama import init_cache

HERE = pathlib.Path(__file__).parent
WEIGHTS = HERE / "weights" / "second.safetensors"
STEPS = 4000
START = 1  # the token every window begins with
KEEP = (qjax.Rule("*embedding", weight=None), qjax.Rule("head*", weight=None))  # as of the shipped model: only the layers


@dataclasses.dataclass(frozen=True)
class Config:
    """Sizes: every linear layer takes groups of 128 and none of its axes is a power of two, but the two key/value heads' 128."""

    vocabulary: int = 4096
    width: int = 384
    layers: int = 4
    heads: int = 6
    kv_heads: int = 2
    hidden: int = 1152
    context: int = 256


class Layer(nnx.Module):
    """x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, config, dtype, rngs):
        size = config.width // config.heads
        linear = partial(nnx.Linear, dtype=dtype, kernel_init=nnx.initializers.normal(0.02), rngs=rngs)
        deep = nnx.initializers.normal(0.02 / (2 * config.layers) ** 0.5)
        self.config = config
        self.attention_norm, self.mlp_norm = (nnx.LayerNorm(config.width, dtype=dtype, rngs=rngs) for _ in range(2))
        self.query, self.out = linear(config.width, config.width), linear(config.width, config.width, kernel_init=deep)
        self.key, self.value = (linear(config.width, config.kv_heads * size) for _ in range(2))
        self.up, self.down = linear(config.width, config.hidden), linear(config.hidden, config.width, kernel_init=deep)

    def __call__(self, x):
        x = x + self.out(self.attention(self.attention_norm(x)))
        return x + self.down(nnx.gelu(self.up(self.mlp_norm(x))))

    def attention(self, x):
        (batch, length, _), groups = x.shape, self.config.kv_heads
        q = self.query(x).reshape(batch, length, groups, self.config.heads // groups, -1)
        k, v = (make(x).reshape(batch, length, groups, -1) for make in (self.key, self.value))
        scores = jnp.einsum("btghd,bsgd->bghts", q, k).astype(jnp.float32) / q.shape[-1] ** 0.5
        scores = jnp.where(jnp.tril(jnp.ones((length, length), bool)), scores, jnp.finfo(jnp.float32).min)
        mixed = jnp.einsum("bghts,bsgd->btghd", jax.nn.softmax(scores).astype(x.dtype), v)
        return mixed.reshape(batch, length, -1)


class Decoder(nnx.Module):
    """The model: tokens (B, T) to logits (B, T, V)."""

    def __init__(self, config, rngs, dtype=jnp.float32):
        embed = partial(nnx.Embed, features=config.width, dtype=dtype, embedding_init=nnx.initializers.normal(0.02), rngs=rngs)
        self.config = config
        self.embed, self.positions = embed(config.vocabulary), embed(config.context)
        self.layers = nnx.vmap(lambda rngs: Layer(config, dtype, rngs))(rngs.split(config.layers))
        self.norm = nnx.LayerNorm(config.width, dtype=dtype, rngs=rngs)
        unembed = partial(nnx.Linear, use_bias=False, kernel_init=nnx.initializers.normal(0.02), dtype=dtype, rngs=rngs)
        self.head = unembed(config.width, config.vocabulary)

    def __call__(self, tokens):
        x = self.embed(tokens) + self.positions(jnp.arange(tokens.shape[1]))[None]
        step = nnx.scan(lambda x, layer: layer(x), in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
        return self.head(self.norm(step(x, self.layers)))


class Teacher(NamedTuple):
    """The shipped model: `logits` of (params, tokens), and `windows` of (key, count): (count, context) tokens of text that it makes."""

    logits: Any
    params: Any
    windows: Any


def teacher(context):
    """The shipped model as the source of text and of distributions."""
    checkpoint = books_llama()
    model, params = Llama(checkpoint.config), {"params": checkpoint.params}

    def made(key, count):
        prompts, cache = np.full((count, 1), START, np.int32), partial(init_cache, checkpoint.config)
        how = {"init_cache": cache, "context_length": context, "temperature": 1.0, "key": key}
        return generate(model.apply, params, prompts, context - 1, **how).tokens

    return Teacher(model.apply, params, made)


def fit(config, source, steps, batch, seed, chunk=32):
    """Trains on distributions of the next token: chunks of so many steps, each on text of its own."""
    model = Decoder(config, nnx.Rngs(seed))
    graph, params = nnx.split(model)
    schedule = optax.warmup_cosine_decay_schedule(0.0, 1.5e-3, max(steps // 15, 1), steps, 3e-5)
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(schedule, b2=0.95, weight_decay=0.1))

    @jax.jit
    def step(params, state, tokens):
        target = jax.nn.softmax(source.logits(source.params, tokens))

        def loss(params):
            return optax.softmax_cross_entropy(nnx.merge(graph, params)(tokens), target).mean()

        value, gradient = jax.value_and_grad(loss)(params)
        updates, state = optimizer.update(gradient, state, params)
        return optax.apply_updates(params, updates), state, value

    state, started, value = optimizer.init(params), time.perf_counter(), np.nan
    for number in range(0, steps, chunk):
        text = source.windows(jax.random.fold_in(jax.random.key(seed), number), batch * min(chunk, steps - number))
        for rows in np.split(text, len(text) // batch):
            params, state, value = step(params, state, jnp.asarray(rows))
        if number // chunk % 10 == 0:
            print(f"step {number + len(text) // batch:5d}  loss {float(value):.3f}  {time.perf_counter() - started:.0f} s", flush=True)
    return params


def save(params, path):
    """Writes the parameters, rounded to bfloat16 as checkpoints come."""
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({".".join(map(str, key)): leaf[...].astype(jnp.bfloat16) for key, leaf in nnx.to_flat_state(params)}, str(path))


def load_second(path=WEIGHTS, dtype=jnp.float32, config=Config()):
    """Loads the trained model.

    Args:
      path: what training wrote.
      dtype: float32 or bfloat16, of parameters and products.
      config: the sizes it was trained with.

    Returns:
      The pure function of (params, tokens (B, 256)) to logits (B, 256, 4096), and the module's state: the stored bfloat16 as `dtype`.

    Raises:
      FileNotFoundError: it was not trained yet.
    """
    if not pathlib.Path(path).exists():
        raise FileNotFoundError(f"`path` {path} is not there: run `python second_model.py` first, on a GPU if there is one")
    stored = load_file(str(path))
    graph, shapes = nnx.split(nnx.eval_shape(lambda: Decoder(config, nnx.Rngs(0), dtype)))
    flat = [(key, leaf.replace(stored[".".join(map(str, key))].astype(dtype))) for key, leaf in nnx.to_flat_state(shapes)]
    params = nnx.from_flat_state(flat)
    return qjax.nnx.function(nnx.merge(graph, params)), params


def print_quality(count, path):
    """Perplexities of the stored weights and of their teacher, on the text that is measured on and on the one calibrated on."""
    checkpoint, source, (apply, params) = books_llama(), teacher(Config().context), load_second(path)
    texts = {
        "held out": windows(encode(checkpoint.tokenizer, heldout_text()))[:count],
        "calibration": calibration_windows(checkpoint.tokenizer, calibration_lines())[:count],
        "made by the teacher, new": source.windows(jax.random.key(12345), 128),
    }
    print(f"{sum(x.size for x in jax.tree.leaves(params)):,} parameters, jax {jax.__version__}, {jax.devices()[0].device_kind}")
    print("| text | windows | perplexity | its teacher's | divergence from it |\n|---|---|---|---|---|")
    for name, text in texts.items():
        moved = divergence(source.logits, source.params, apply, params, text).mean_kl
        ours, theirs = perplexity(apply, params, text), perplexity(source.logits, source.params, text)
        print(f"| {name} | {len(text)} | {ours:.2f} | {theirs:.2f} | {moved:.3f} |")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--batch", type=int, default=64, help="windows a step")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--weights", type=pathlib.Path, default=WEIGHTS)
    parser.add_argument("--evaluate", action="store_true", help="do not train")
    parser.add_argument("--windows", type=int, help="windows to measure on; all by default")
    options = parser.parse_args()
    if options.weights == WEIGHTS and options.steps < STEPS and not options.evaluate:
        parser.error(
            f"`--steps` {options.steps} is a trial: name another file by `--weights`, so that it does not replace what is compared"
        )
    if not options.evaluate:
        save(fit(Config(), teacher(Config().context), options.steps, options.batch, options.seed), options.weights)
    print_quality(options.windows, options.weights)


if __name__ == "__main__":
    main()
