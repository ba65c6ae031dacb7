"""Batch norms folded inside the step, against training without folding and folding before training. See README.md."""

import argparse
import platform
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
from bench import BATCH, CALIBRATION, data, packed_check, positive, rules, show, trained
from digits import MODEL, apply, batch, folded, training

import qjax

SPECS = {
    "W4A4, per tensor": (qjax.int4(per="tensor"), positive(4)),
    "W2A4, per tensor": (qjax.int2(per="tensor"), positive(4)),
    "W2A4, per channel": (qjax.int2(), positive(4)),
}


def on_batch(variables, images):
    """The network in training: (logits, what changed)."""
    return MODEL.apply(variables, images, train=True, mutable=["batch_stats"])


def stored(variables, images):
    """The network on its stored statistics, which stay."""
    return apply(variables, images), {}


def tuning(fq, fn, steps):
    """How a network trains on through rounding, two functions: Adam, one cosine; `fn` is one of the two above."""
    rate = optax.cosine_decay_schedule(1e-3, steps)
    step_fq = qjax.fake_quant(fn, fq.policy, folds=fq.folds)

    def optimizer(variables, quant):
        marks = (
            {name: jax.tree.map(lambda _, g=name == "params": "all" if g else "none", tree) for name, tree in variables.items()},
            jax.tree.map({"learned": "all", "fixed": "none"}.get, fq.labels(quant)),
        )
        return optax.multi_transform({"all": optax.adam(rate), "none": optax.set_to_zero()}, marks)

    def begin(key, variables, quant, images, labels):
        del key, images, labels
        return (variables, quant), optimizer(variables, quant).init((variables, quant))

    def step(carry, key, variables, quant, images, labels):
        x, wanted = batch(key, images, labels)

        def loss(both):
            logits, changed = step_fq(both[0], x, quant=both[1])
            return optax.softmax_cross_entropy_with_integer_labels(logits, wanted).mean(), changed

        grads, changed = jax.grad(loss, has_aux=True)(carry[0])
        updates, state = optimizer(variables, quant).update(grads, carry[1], carry[0])
        moved, learned = optax.apply_updates(carry[0], updates)
        return ({**moved, **changed}, learned), state

    return begin, step


def each(f, tree, networks):
    """`f` of each network, stacked."""
    done = [f(jax.tree.map(lambda a, n=n: a[n], tree), n) for n in range(networks)]
    return jax.tree.map(lambda *a: jnp.stack([jnp.asarray(x, jnp.float32) for x in a]), *done)


def measure(options):
    """Right answers (images, seeds) of each row, and what was checked of the packed networks."""
    images, labels, seen, unseen, owners = data(options.seeds, options.folds, None)
    networks, keys, began = len(owners), jax.random.split(jax.random.key(0), len(owners)), time.perf_counter()
    mine, wanted = images[seen], labels[seen]
    right, checks = {}, {}

    def mark(name, logits):
        answers = np.zeros((len(images), options.seeds), bool)
        for number, others in enumerate(owners):
            answers[others, number // options.folds] = np.asarray(logits[number]).argmax(-1)[: len(others)] == np.asarray(labels)[others]
        right[name] = answers
        print(f"{name}: {100 * answers.mean():.2f} %, {time.perf_counter() - began:.0f} s", flush=True)

    steps = options.epochs * (seen.shape[1] // BATCH)
    begin, step = training(steps)
    params, stats, _ = trained(lambda key, images, labels: begin(key, images), step, steps, keys, mine, wanted)
    floats = {"params": params, "batch_stats": stats}
    before = each(lambda v, n: folded(v, images[seen[n, :BATCH]]), floats, networks)
    mark("float", jax.jit(jax.vmap(lambda v, at: apply(v, images[at])))(floats, unseen))
    folds = qjax.batch_norm_folds(apply, jax.tree.map(lambda a: a[0], floats), images[:1])
    steps = options.tuning * (seen.shape[1] // BATCH)
    for name, (weight, activation) in SPECS.items():
        policy = qjax.Policy(rules(weight, activation))
        arms = {
            "not folded": (floats, on_batch, None),
            "folded in the step": (floats, on_batch, folds),
            "folded in the step, statistics frozen": (floats, stored, folds),
            "folded before training": (before, stored, None),
        }
        for arm, (start, fn, folding) in arms.items():
            fq = qjax.fake_quant(apply, policy, folds=folding)
            begun = jax.jit(jax.vmap(lambda key, v, at, fq=fq: fq.init(key, v, images[at[:CALIBRATION]])))
            look = jax.jit(jax.vmap(lambda v, q, at, fq=fq: fq(v, images[at], quant=q)))
            quant = begun(keys, start, seen)
            mark(f"{name}, rounding, {arm}", look(start, quant, unseen))
            (variables, state), _ = trained(*tuning(fq, fn, steps), steps, keys, start, quant, mine, wanted)
            logits = look(variables, state, unseen)
            mark(f"{name}, QAT, {arm}", logits)
            if folding is None and fn is on_batch and "tensor" in name:  # scales a channel fold exactly: s becomes f s
                after = each(lambda v, n: folded(v, images[seen[n, :BATCH]]), variables, networks)
                mark(f"{name}, QAT, not folded, then folded and rounded anew", look(after, begun(keys, after, seen), unseen))
            if folding is not None:
                checks[f"{name}, {arm}"] = packed_check(fq, jax.tree.map(lambda a: a[0], (variables, state)), images[unseen[0]], logits[0])
    return right, checks


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--folds", type=int, default=2)
    parser.add_argument("--epochs", type=int, default=16, help="Of the float networks.")
    parser.add_argument("--tuning", type=int, default=8, help="Epochs of each training through rounding.")
    options = parser.parse_args()
    right, checks = measure(options)
    print(f"\njax {jax.__version__}, {jax.devices()[0].device_kind}, {platform.machine()}, {options.seeds} x {options.folds} networks")
    show(right, checks)


if __name__ == "__main__":
    main()
