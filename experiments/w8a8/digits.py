"""A residual convolutional network on scikit-learn's digits: W8A8, and W4A8 with and without the rewrites. See README.md."""

import argparse
import functools
import json
import platform
import tempfile
import time
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from sklearn.datasets import load_digits
from sklearn.model_selection import StratifiedKFold

import qjax
from qjax.evaluation import paired_bootstrap
from qjax.graph import equalize, fold_batch_norm

CLASSES, BATCH, CALIBRATION = 10, 64, 256
INT8, TENSOR4, CHANNEL4 = qjax.int8(), qjax.int4(per="tensor"), qjax.int4()
ENTROPY = qjax.static(qjax.uint8(), qjax.entropy())
MINMAX = qjax.static(qjax.uint8())


class Block(nn.Module):
    """Two convolutions with batch norm and a way past them, a 1x1 convolution where the size changes."""

    features: int
    stride: int

    @nn.compact
    def __call__(self, x, train):
        norm = partial(nn.BatchNorm, use_running_average=not train, momentum=0.9)
        conv = partial(nn.Conv, self.features, use_bias=False)
        y = nn.relu(norm(name="norm1")(conv((3, 3), strides=self.stride, name="conv1")(x)))
        y = norm(name="norm2")(conv((3, 3), name="conv2")(y))
        if self.stride > 1:
            x = norm(name="norm")(conv((1, 1), strides=self.stride, name="shortcut")(x))
        return nn.relu(x + y)


class Net(nn.Module):
    """8 x 8 pixels; 12 channels, then 24 on a quarter of the places; the mean over the places; a dense layer."""

    width: int = 12

    @nn.compact
    def __call__(self, images, train=False):
        x = nn.Conv(self.width, (3, 3), use_bias=False, name="stem")(images)
        x = nn.relu(nn.BatchNorm(use_running_average=not train, momentum=0.9, name="norm")(x))
        x = Block(self.width, 1, name="block1")(x, train)
        x = Block(2 * self.width, 2, name="block2")(x, train)
        return nn.Dense(CLASSES, name="head")(x.mean((1, 2)))


MODEL = Net()


def apply(variables, images):
    """The network in use, on its stored statistics."""
    return MODEL.apply(variables, images)


def batch(key, images, labels):
    """Images of a step, every one moved by at most one pixel, and their labels."""
    pick, move = jax.random.split(key)
    chosen = jax.random.randint(pick, (BATCH,), 0, len(images))
    moves = jax.random.randint(move, (BATCH, 2), 0, 3)
    wide = jnp.pad(images[chosen], ((0, 0), (1, 1), (1, 1), (0, 0)))
    return jax.vmap(lambda image, at: jax.lax.dynamic_slice(image, (at[0], at[1], 0), images.shape[1:]))(wide, moves), labels[chosen]


def training(steps):
    """How a network trains, two functions: AdamW, one cosine of the learning rate."""
    optimizer = optax.adamw(optax.cosine_decay_schedule(4e-3, steps), weight_decay=1e-3)

    def begin(key, images):
        variables = MODEL.init(key, images[:1])
        return variables["params"], variables["batch_stats"], optimizer.init(variables["params"])

    def step(carry, key, images, labels):
        params, stats, state = carry
        x, wanted = batch(key, images, labels)

        def loss(params):
            logits, new = MODEL.apply({"params": params, "batch_stats": stats}, x, train=True, mutable=["batch_stats"])
            return optax.softmax_cross_entropy_with_integer_labels(logits, wanted).mean(), new["batch_stats"]

        grads, stats = jax.grad(loss, has_aux=True)(params)
        updates, state = optimizer.update(grads, state, params)
        return optax.apply_updates(params, updates), stats, state

    return begin, step


@partial(jax.jit, static_argnames="epochs")
def train(key, images, labels, epochs):
    """Trains one network."""
    start, loop = jax.random.split(key)
    steps = epochs * (len(images) // BATCH)
    begin, step = training(steps)
    run = jax.lax.scan(lambda carry, key: (step(carry, key, images, labels), None), begin(start, images), jax.random.split(loop, steps))
    (params, stats, _), _ = run
    return {"params": params, "batch_stats": stats}


def folded(variables, images, equalized=False):
    """The same function with its batch norms in the convolutions, and with equal ranges between layers if asked."""
    program = qjax.trace(apply, variables, images)
    leaves, tree = jax.tree.flatten(variables)
    leaves = fold_batch_norm(program, leaves, [images]).params
    if equalized:
        leaves = equalize(program, leaves, [images]).params
    return jax.tree.unflatten(tree, leaves)


def quantize(variables, data, weight, activation, prepare=None, correct=False):
    """Returns quantized variables."""
    variables = variables if prepare is None else prepare(variables, data[0])
    policy = qjax.Policy([qjax.Rule("*", weight=weight, activation=activation)])
    result = qjax.quantize(apply, variables, policy, calibration=data)
    if correct:
        result = qjax.correct_bias(apply, variables, result, data)
    return result.params


def rows() -> dict[str, Any]:
    """name -> how the float variables become those of the row."""
    both = functools.partial(folded, equalized=True)
    table = {
        "float": lambda variables, data: variables,
        "W8A8 static entropy": partial(quantize, weight=INT8, activation=ENTROPY),
        "W8A8 static entropy, symmetric": partial(quantize, weight=INT8, activation=qjax.static(INT8, qjax.entropy())),
        "W8A8 static min-max": partial(quantize, weight=INT8, activation=MINMAX),
        "W8A8 static min-max, symmetric": partial(quantize, weight=INT8, activation=qjax.static(INT8)),
        "W8A8 dynamic": partial(quantize, weight=INT8, activation=qjax.dynamic(INT8)),
    }
    for name, weight in (("tensor", TENSOR4), ("channel", CHANNEL4)):
        settings: dict[str, Any] = {"weight": weight, "activation": ENTROPY}
        table |= {
            f"W4A8 per {name}": partial(quantize, prepare=folded, **settings),
            f"W4A8 per {name}, equalized": partial(quantize, prepare=both, **settings),
            f"W4A8 per {name}, biases corrected": partial(quantize, prepare=folded, correct=True, **settings),
            f"W4A8 per {name}, both": partial(quantize, prepare=both, correct=True, **settings),
        }
    return table


def measure(table, seeds, folds, limit, epochs):
    """(images, seeds) of what each row gets right, every image by the network that did not see it; and seconds."""
    digits = load_digits()
    images, labels = (digits.images[..., None] / 16.0).astype(np.float32)[:limit], digits.target.astype(np.int32)[:limit]
    right = {name: np.zeros((len(images), seeds), bool) for name in table}
    seconds = dict.fromkeys(("training", *table), 0.0)
    run = jax.jit(qjax.quantized(apply))
    for seed in range(seeds):
        split = StratifiedKFold(folds, shuffle=True, random_state=seed).split(images, labels)
        for fold, (seen, unseen) in enumerate(split):
            # One program for all folds: their sizes differ by one image.
            seen = seen[: len(images) * (folds - 1) // folds]
            began = time.perf_counter()
            key = jax.random.fold_in(jax.random.key(seed), fold)
            variables = jax.block_until_ready(train(key, images[seen], labels[seen], epochs))
            seconds["training"] += time.perf_counter() - began
            data = [jnp.asarray(images[seen[:CALIBRATION]])]
            for name, how in table.items():
                began = time.perf_counter()
                logits = np.asarray(run(how(variables, data), jnp.asarray(np.resize(images[unseen], (-(-len(images) // folds), 8, 8, 1)))))
                right[name][unseen, seed] = logits.argmax(-1)[: len(unseen)] == labels[unseen]
                seconds[name] += time.perf_counter() - began
            print(f"seed {seed} fold {fold}: " + ", ".join(f"{n} {r[unseen, seed].mean():.4f}" for n, r in right.items()), flush=True)
    return right, seconds


def show(right, seconds, networks):
    """Prints the table; the interval is 95 % of a bootstrap over images, paired with float."""
    print("\n| | accuracy | difference to float | interval | s a network |\n|---|---|---|---|---|")
    for name, mine in right.items():
        ends = "" if name == "float" else "{0.low:+.3f} .. {0.high:+.3f} %"
        interval = paired_bootstrap(100.0 * right["float"].mean(1), 100.0 * mine.mean(1))
        moved = "" if name == "float" else f"{interval.difference:+.3f} %"
        print(f"| {name} | {100 * mine.mean():.3f} % | {moved} | {ends.format(interval)} | {seconds[name] / networks:.1f} |")
    print(f"\ntraining: {seconds['training'] / networks:.1f} s a network")


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--folds", type=int, default=5)
    parser.add_argument("--images", type=int, help="The first images only; all by default.")
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--rows", nargs="*", help="Only rows whose name holds one of these; float is always there.")
    parser.add_argument("--json", help="Write the numbers here, too.")
    options = parser.parse_args()
    table = {k: how for k, how in rows().items() if k == "float" or not options.rows or any(part in k for part in options.rows)}
    with tempfile.TemporaryDirectory() as cache:
        # Every network has the same shapes: what was compiled for the first serves the others.
        jax.config.update("jax_compilation_cache_dir", cache)
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
        right, seconds = measure(table, options.seeds, options.folds, options.images, options.epochs)
    print(f"\njax {jax.__version__}, {platform.machine()}, {platform.system()}, {options.seeds} x {options.folds} networks")
    show(right, seconds, options.seeds * options.folds)
    if options.json:
        numbers = {name: {"right": int(mine.sum()), "of": mine.size, "seconds": seconds[name]} for name, mine in right.items()}
        with open(options.json, "w") as file:
            json.dump(numbers, file, indent=1)


if __name__ == "__main__":
    main()
