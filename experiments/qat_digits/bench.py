"""Quantization-aware training of a convolutional network on scikit-learn's digits, all networks at once. See README.md."""

import argparse
import json
import pathlib
import platform
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
from sklearn.datasets import load_digits
from sklearn.model_selection import StratifiedKFold

import qjax
from qjax.evaluation import paired_bootstrap

sys.path.append(str(pathlib.Path(__file__).parent.parent / "w8a8"))
from digits import apply, folded, train

BATCH, CALIBRATION = 64, 256


def positive(bits):
    """Activations behind a ReLU: no sign, no zero point; the range with the least squared error."""
    return qjax.static(qjax.integer(bits, signed=False, symmetric=True, scale_rule="full"), qjax.mse())


def rules(weight, activation, ends=True):
    """One kind of rule for all layers; the first and the last stay at 8 bits where the others have less."""
    outer = [qjax.Rule("stem/kernel", weight=qjax.int8(), activation=positive(8), train=qjax.lsq("mse")),
             qjax.Rule("head/kernel", weight=qjax.int8(), activation=positive(8), train=qjax.lsq("mse"))] if ends else []  # fmt: skip
    return [*outer, qjax.Rule("*", weight=weight, activation=activation, train=qjax.lsq("mse"))]


ROWS = {
    "W8A8": rules(qjax.int8(), positive(8), ends=False),
    "W4A4": rules(qjax.int4(), positive(4)),
    "W3A3": rules(qjax.int3(), positive(3)),
    "W2A2": rules(qjax.int2(), positive(2)),
    "W1": [*rules(qjax.int8(), positive(8))[:2], qjax.Rule("*", weight=qjax.binary(per="channel"))],
}


def data(seeds, folds, limit):
    """Images and labels; for each of seeds x folds networks the images it sees, (networks, seen), and those it does not, to one size."""
    digits = load_digits()
    images, labels = (digits.images[..., None] / 16.0).astype(np.float32)[:limit], digits.target.astype(np.int32)[:limit]
    seen, unseen, owners = [], [], []
    for seed in range(seeds):
        for mine, others in StratifiedKFold(folds, shuffle=True, random_state=seed).split(images, labels):
            seen.append(mine[: len(images) * (folds - 1) // folds])
            unseen.append(np.resize(others, -(-len(images) // folds)))
            owners.append(others)
    return jnp.asarray(images), jnp.asarray(labels), jnp.asarray(np.stack(seen)), jnp.asarray(np.stack(unseen)), owners


def trainer(fq, epochs, distill):
    """(key, variables, state, teacher, images, labels) -> trained variables and state: Adam, one cosine, images moved by up to a pixel."""

    def run(key, variables, quant, teacher, images, labels):
        steps = epochs * (len(images) // BATCH)
        rate = optax.cosine_decay_schedule(1e-3, steps)
        groups = ({"params": "all", "batch_stats": "none"}, {"learned": "all", "fixed": "none"})
        marks = (
            {name: jax.tree.map(lambda _, g=groups[0][name]: g, tree) for name, tree in variables.items()},
            jax.tree.map(groups[1].get, fq.labels(quant)) if fq is not None else {},
        )
        optimizer = optax.multi_transform({"all": optax.adam(rate), "none": optax.set_to_zero()}, marks)

        def step(carry, key):
            pick, move = jax.random.split(key)
            chosen = jax.random.randint(pick, (BATCH,), 0, len(images))
            moves = jax.random.randint(move, (BATCH, 2), 0, 3)
            wide = jnp.pad(images[chosen], ((0, 0), (1, 1), (1, 1), (0, 0)))
            x = jax.vmap(lambda image, at: jax.lax.dynamic_slice(image, (at[0], at[1], 0), images.shape[1:]))(wide, moves)

            def loss(both):
                logits = apply(both[0], x) if fq is None else fq(both[0], x, quant=both[1])
                if distill:
                    return optax.kl_divergence(jax.nn.log_softmax(logits), jax.nn.softmax(apply(teacher, x))).mean()
                return optax.softmax_cross_entropy_with_integer_labels(logits, labels[chosen]).mean()

            updates, state = optimizer.update(jax.grad(loss)(carry[0]), carry[1], carry[0])
            return (optax.apply_updates(carry[0], updates), state), None

        both = (variables, quant)
        (both, _), _ = jax.lax.scan(step, (both, optimizer.init(both)), jax.random.split(key, steps))
        return both

    return run


def measure(options):
    """Right answers (images, seeds) of each row, and what was checked of the packed networks."""
    images, labels, seen, unseen, owners = data(options.seeds, options.folds, options.images)
    keys = jax.random.split(jax.random.key(0), len(owners))
    began = time.perf_counter()
    floats = jax.jit(jax.vmap(lambda key, at: train(key, images[at], labels[at], options.epochs)))(keys, seen)
    apart = [folded(jax.tree.map(lambda a, n=n: a[n], floats), images[seen[n, :BATCH]]) for n in range(len(owners))]
    floats = jax.tree.map(lambda *a: jnp.stack([jnp.asarray(x, jnp.float32) for x in a]), *apart)
    print(f"float networks: {time.perf_counter() - began:.0f} s", flush=True)
    right, checks = {}, {}

    def mark(name, logits):
        answers = np.zeros((len(images), options.seeds), bool)
        for number, others in enumerate(owners):
            answers[others, number // options.folds] = np.asarray(logits[number]).argmax(-1)[: len(others)] == np.asarray(labels)[others]
        right[name] = answers
        print(f"{name}: {100 * answers.mean():.2f} %, {time.perf_counter() - began:.0f} s", flush=True)

    mark("float", jax.jit(jax.vmap(lambda v, at: apply(v, images[at])))(floats, unseen))
    go_on = jax.jit(jax.vmap(lambda key, v, at: trainer(None, options.epochs, False)(key, v, {}, v, images[at], labels[at])[0]))
    mark("float, trained on", jax.jit(jax.vmap(lambda v, at: apply(v, images[at])))(go_on(keys, floats, seen), unseen))
    for name, kind in ROWS.items():
        if options.rows and name not in options.rows:
            continue
        fq = qjax.fake_quant(apply, qjax.Policy(kind))
        look = jax.jit(jax.vmap(lambda v, q, at, fq=fq: fq(v, images[at], quant=q)))
        quant = jax.jit(jax.vmap(lambda key, v, at, fq=fq: fq.init(key, v, images[at[:CALIBRATION]])))(keys, floats, seen)
        mark(f"{name}, after training", look(floats, quant, unseen))
        for how in ("", ", distilled"):
            run = trainer(fq, options.epochs, bool(how))
            fit = jax.jit(jax.vmap(lambda key, v, q, at, run=run: run(key, v, q, v, images[at], labels[at])))
            variables, trained = fit(keys, floats, quant, seen)
            logits = look(variables, trained, unseen)
            mark(f"{name}, QAT{how}", logits)
        checks[name] = packed_check(fq, jax.tree.map(lambda a: a[0], (variables, trained)), images[unseen[0]], logits[0])
    return right, checks


def packed_check(fq, both, images, logits):
    """Of one packed network: its bytes, and the answers that differ from the fake-quantized one's."""
    result = qjax.convert(fq, both[0], images, quant=both[1])
    got = jax.jit(qjax.quantized(apply))(result.params, images)
    other = int((got.argmax(-1) != logits.argmax(-1)).sum())
    return {"bytes": result.report.nbytes, "float_bytes": result.report.float_nbytes, "other answers": other}


def show(right, checks):
    """Prints the table; the interval is 95 % of a bootstrap over images, paired with float."""
    print("\n| | accuracy | to float | interval |\n|---|---|---|---|")
    for name, mine in right.items():
        interval = paired_bootstrap(100.0 * right["float"].mean(1), 100.0 * mine.mean(1))
        moved = "| |" if name == "float" else f"| {interval.difference:+.2f} % | {interval.low:+.2f} .. {interval.high:+.2f} % |"
        print(f"| {name} | {100 * mine.mean():.2f} % {moved}")
    print("\n" + json.dumps(checks))


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--folds", type=int, default=5)
    parser.add_argument("--images", type=int, help="The first images only; all by default.")
    parser.add_argument("--epochs", type=int, default=20, help="Of the float networks, and again of each training through rounding.")
    parser.add_argument("--rows", nargs="*", help="Only these of W8A8, W4A4, W3A3, W2A2, W1.")
    parser.add_argument("--json", help="Write the numbers here, too.")
    options = parser.parse_args()
    right, checks = measure(options)
    print(f"\njax {jax.__version__}, {jax.devices()[0].device_kind}, {platform.machine()}, {options.seeds} x {options.folds} networks")
    show(right, checks)
    if options.json:
        numbers = {name: {"right": int(mine.sum()), "of": mine.size} for name, mine in right.items()}
        pathlib.Path(options.json).write_text(json.dumps({"right": numbers, "packed": checks}, indent=1))


if __name__ == "__main__":
    main()
