"""Trains the second model of the comparison, and loads it: an NNX decoder unlike the shipped Llama. See README.md.

Layers scanned over a stack, layer norms with biases, learned positions, GELU without a gate, biases on every linear layer, six heads on
two key/value heads, an untied head, and width 384 = 3 * 128.

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
from qjax.evaluation import batches, encode, perplexity, perplexity_of, token_losses, windows
from qjax.models import books_llama

HERE = pathlib.Path(__file__).parent
WEIGHTS = HERE / "weights" / "second.safetensors"
BOOKS = ("pride", "greatexp", "wells")
TRAIN, STOP = 0.84, 0.88  # shares of each book that end the training part and the part that stops it; the rest is held out
STEPS = 1200
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

    def __call__(self, x, drop):
        first, second = jax.random.split(drop.key) if drop.rate else (None, None)
        x = x + dropout(self.out(self.attention(self.attention_norm(x))), drop.rate, first)
        return x + dropout(self.down(nnx.gelu(self.up(self.mlp_norm(x)))), drop.rate, second)

    def attention(self, x):
        (batch, length, _), groups = x.shape, self.config.kv_heads
        q = self.query(x).reshape(batch, length, groups, self.config.heads // groups, -1)
        k, v = (make(x).reshape(batch, length, groups, -1) for make in (self.key, self.value))
        scores = jnp.einsum("btghd,bsgd->bghts", q, k).astype(jnp.float32) / q.shape[-1] ** 0.5
        scores = jnp.where(jnp.tril(jnp.ones((length, length), bool)), scores, jnp.finfo(jnp.float32).min)
        mixed = jnp.einsum("bghts,bsgd->btghd", jax.nn.softmax(scores).astype(x.dtype), v)
        return mixed.reshape(batch, length, -1)


class Drop(NamedTuple):
    """How much of what every layer adds is dropped, and the key to draw by; nothing in evaluation."""

    rate: float = 0.0
    key: Any = None


def dropout(x, rate, key):
    """Zeros a share of `x` and scales the rest up."""
    return x if not rate else jnp.where(jax.random.bernoulli(key, 1 - rate, x.shape), x / (1 - rate), 0)


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

    def __call__(self, tokens, drop=Drop()):  # noqa: B008 (frozen)
        x = self.embed(tokens) + self.positions(jnp.arange(tokens.shape[1]))[None]
        keys = None
        if drop.rate:
            first, *rest = jax.random.split(drop.key, self.config.layers + 1)
            x, keys = dropout(x, drop.rate, first), jnp.stack(rest)
        step = nnx.scan(lambda x, layer, key: layer(x, Drop(drop.rate, key)), in_axes=(nnx.Carry, 0, 0), out_axes=nnx.Carry)
        return self.head(self.norm(step(x, self.layers, keys)))


class Texts(NamedTuple):
    """Token ids: of training a list by book, of the others windows of the context's length."""

    train: list[np.ndarray]
    stop: np.ndarray
    heldout: np.ndarray


def read_texts(length):
    """Cuts each book into its three parts and encodes them with the tokenizer that comes with qjax.

    The first halves of the books' held-out windows come before all second halves: so each half of the whole is of all books.
    """
    tokenizer, train, stop, first, second = books_llama().tokenizer, [], [], [], []
    for book in BOOKS:
        text = (HERE / "text" / f"{book}.txt").read_text(encoding="utf-8")
        ends = [text.index("\n", int(share * len(text))) + 1 for share in (TRAIN, STOP)]
        train.append(np.concatenate([[1], encode(tokenizer, text[: ends[0]])]).astype(np.int32))
        stop.append(windows(encode(tokenizer, text[ends[0] : ends[1]]), length))
        held = windows(encode(tokenizer, text[ends[1] :]), length)
        first.append(held[: len(held) // 2])
        second.append(held[len(held) // 2 :])
    return Texts(train, np.concatenate(stop), np.concatenate([*first, *second]))


def calibration(train, length, count=128):
    """Windows of training text, evenly spaced over all books."""
    rows = np.concatenate([windows(ids, length, start_id=None) for ids in train])
    return rows[np.linspace(0, len(rows) - 1, count).astype(int)]


def unigram_perplexity(train, heldout, vocabulary):
    """Perplexity of the token counts of the training text, plus one each."""
    counts = np.bincount(np.concatenate(train), minlength=vocabulary) + 1
    return perplexity_of(-np.log(counts / counts.sum())[heldout[:, 1:]])


def fit(config, texts, steps, batch, seed, rate, every=50):
    """Trains; returns the parameters that were best on the part that stops, and a line for each look at it."""
    model = Decoder(config, nnx.Rngs(seed))
    graph, params = nnx.split(model)
    schedule = optax.warmup_cosine_decay_schedule(0.0, 1e-3, max(steps // 15, 1), steps, 1e-4)
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(schedule, b2=0.95, weight_decay=0.1))
    apply = qjax.nnx.function(model)
    ids, rng = jnp.asarray(np.concatenate(texts.train)), np.random.default_rng(seed)

    @jax.jit
    def step(params, state, starts, key):
        tokens = ids[starts[:, None] + jnp.arange(config.context + 1)]

        def loss(params):
            logits = nnx.merge(graph, params)(tokens[:, :-1], Drop(rate, key))
            return optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:]).mean()

        value, gradient = jax.value_and_grad(loss)(params)
        updates, state = optimizer.update(gradient, state, params)
        return optax.apply_updates(params, updates), state, value

    state, best, log, keys = optimizer.init(params), (np.inf, params), [], jax.random.split(jax.random.key(seed), steps)
    started = time.perf_counter()
    for number in range(1, steps + 1):
        starts = rng.integers(0, len(ids) - config.context, batch)
        params, state, value = step(params, state, jnp.asarray(starts), keys[number - 1])
        if number % every and number != steps:
            continue
        score = perplexity(apply, params, texts.stop)
        best = min(best, (score, params), key=lambda pair: pair[0])
        log.append(f"step {number:5d}  loss {float(value):.3f}  stopping part {score:.2f}  {time.perf_counter() - started:.0f} s")
        print(log[-1], flush=True)
    return best[1], log


def save(params, path):
    """Writes the parameters, rounded to bfloat16 as checkpoints come."""
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({".".join(map(str, key)): leaf[...].astype(jnp.bfloat16) for key, leaf in nnx.to_flat_state(params)}, str(path))


class Second(NamedTuple):
    """What `load_second` gives, in the order of `qjax.quantize`.

    Attributes:
      apply: pure function of (params, tokens (B, 256)) to logits (B, 256, 4096).
      params: the module's state, float32 of the stored bfloat16.
      batches: 16 calibration batches of 8 windows of training text.
      heldout: (N, 256) windows that training and stopping never saw; each half is of all books.
    """

    apply: Any
    params: Any
    batches: list[jax.Array]
    heldout: np.ndarray


def load(path, dtype, config):
    """(apply, params) of stored weights; the module is made of shapes alone."""
    if not pathlib.Path(path).exists():
        raise FileNotFoundError(f"`path` {path} is not there: run `python second_model.py` first, on a GPU if there is one")
    stored = load_file(str(path))
    graph, shapes = nnx.split(nnx.eval_shape(lambda: Decoder(config, nnx.Rngs(0), dtype)))
    flat = [(key, leaf.replace(stored[".".join(map(str, key))].astype(dtype))) for key, leaf in nnx.to_flat_state(shapes)]
    params = nnx.from_flat_state(flat)
    return qjax.nnx.function(nnx.merge(graph, params)), params


def load_second(path=WEIGHTS, dtype=jnp.float32, config=Config()):
    """Loads the trained model and its texts.

    Args:
      path: what training wrote.
      dtype: float32 or bfloat16, of parameters and products.
      config: the sizes it was trained with.

    Returns:
      See `Second`.

    Raises:
      FileNotFoundError: it was not trained yet.
    """
    apply, params = load(path, dtype, config)
    texts = read_texts(config.context)
    data = [jnp.asarray(rows) for rows in batches(calibration(texts.train, config.context), 8)]
    return Second(apply, params, data, texts.heldout)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--batch", type=int, default=32, help="windows a step")
    parser.add_argument("--dropout", type=float, default=0.2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--weights", type=pathlib.Path, default=WEIGHTS)
    parser.add_argument("--evaluate", action="store_true", help="do not train")
    parser.add_argument("--windows", type=int, help="held-out windows to measure on; all by default")
    options = parser.parse_args()
    if options.weights == WEIGHTS and options.steps < STEPS:
        parser.error(
            f"`--steps` {options.steps} is a trial: name another file by `--weights`, so that it does not replace what is compared"
        )
    config = Config()
    texts = read_texts(config.context)
    if not options.evaluate:
        params, _ = fit(config, texts, options.steps, options.batch, options.seed, options.dropout)
        save(params, options.weights)
    second = load_second(options.weights)
    heldout = second.heldout[: options.windows]
    seen = token_losses(second.apply, second.params, np.concatenate([np.asarray(b) for b in second.batches])[: options.windows])
    size, tokens = sum(x.size for x in jax.tree.leaves(second.params)), sum(map(len, texts.train))
    print(f"{size:,} parameters, {tokens:,} tokens of training text, jax {jax.__version__}, {jax.devices()[0].device_kind}")
    print("| text | windows | perplexity |\n|---|---|---|")
    print(f"| training (calibration windows) | {len(seen)} | {perplexity_of(seen):.2f} |")
    print(f"| held out | {len(heldout)} | {perplexity(second.apply, second.params, heldout):.2f} |")
    print(f"| held out, by unigram counts | {len(heldout)} | {unigram_perplexity(texts.train, heldout, config.vocabulary):.2f} |")


if __name__ == "__main__":
    main()
