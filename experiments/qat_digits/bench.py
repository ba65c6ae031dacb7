"""Quantization-aware training of a convolutional network on scikit-learn's digits, all networks at once. See README.md."""

import argparse
import dataclasses
import json
import pathlib
import platform
import sys
import tempfile
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
from digits import apply, batch, folded, training

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

METHODS = {"GPTQ": qjax.gptq(), "AutoRound": qjax.autoround()}


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


def trained(begin, step, steps, keys, *fixed):
    """Runs `step(carry, key, *fixed)` of all networks at once. Called in a loop: on a CPU convolutions are slow inside of a scan."""
    carry = jax.jit(jax.vmap(begin))(keys, *fixed)
    run = jax.jit(jax.vmap(lambda carry, key, i, *fixed: step(carry, jax.random.fold_in(key, i), *fixed), (0, 0, None, *[0] * len(fixed))),
                  donate_argnums=0)  # fmt: skip
    for i in range(steps):
        carry = run(carry, keys, i, *fixed)
    return carry


def tuning(fq, steps, distill):
    """How a network trains on through rounding, two functions: Adam, one cosine; learned scales and ranges beside the weights."""
    rate = optax.cosine_decay_schedule(1e-3, steps)

    def optimizer(variables, quant):
        marks = (
            {name: jax.tree.map(lambda _, g=name == "params": "all" if g else "none", tree) for name, tree in variables.items()},
            jax.tree.map({"learned": "all", "fixed": "none"}.get, fq.labels(quant)) if fq is not None else {},
        )
        return optax.multi_transform({"all": optax.adam(rate), "none": optax.set_to_zero()}, marks)

    def begin(key, variables, quant, teacher, images, labels):
        del key, teacher, images, labels
        return (variables, quant), optimizer(variables, quant).init((variables, quant))

    def step(carry, key, variables, quant, teacher, images, labels):
        x, wanted = batch(key, images, labels)

        def loss(both):
            logits = apply(both[0], x) if fq is None else fq(both[0], x, quant=both[1])
            if distill:
                return optax.kl_divergence(jax.nn.log_softmax(logits), jax.nn.softmax(apply(teacher, x))).mean()
            return optax.softmax_cross_entropy_with_integer_labels(logits, wanted).mean()

        updates, state = optimizer(variables, quant).update(jax.grad(loss)(carry[0]), carry[1], carry[0])
        return optax.apply_updates(carry[0], updates), state

    return begin, step


def rounded(kind, floats, images, seen, method):
    """Every network quantized after training by a method: its packed variables, stacked."""
    policy = qjax.Policy([dataclasses.replace(rule, method=method, train=None) for rule in kind])
    done = []
    for number in range(len(seen)):
        variables = jax.tree.map(lambda a, n=number: a[n], floats)
        done.append(qjax.quantize(apply, variables, policy, [images[seen[number, :CALIBRATION]]]).params)
    return jax.tree.map(lambda *a: jnp.stack(a), *done)


def measure(options):
    """Right answers (images, seeds) of each row, and what was checked of the packed networks."""
    images, labels, seen, unseen, owners = data(options.seeds, options.folds, options.images)
    keys = jax.random.split(jax.random.key(0), len(owners))
    began = time.perf_counter()
    mine, wanted = images[seen], labels[seen]
    steps = options.epochs * (seen.shape[1] // BATCH)
    begin, step = training(steps)
    params, stats, _ = trained(lambda key, images, labels: begin(key, images), step, steps, keys, mine, wanted)
    floats = {"params": params, "batch_stats": stats}
    apart = [folded(jax.tree.map(lambda a, n=n: a[n], floats), images[seen[n, :BATCH]]) for n in range(len(owners))]
    floats = jax.tree.map(lambda *a: jnp.stack([jnp.asarray(x, jnp.float32) for x in a]), *apart)
    print(f"float networks: {time.perf_counter() - began:.0f} s", flush=True)
    right, checks = {}, {}

    def mark(name, logits):
        answers = np.zeros((len(images), options.seeds), bool)
        for number, others in enumerate(owners):
            answers[others, number // options.folds] = np.asarray(logits[number]).argmax(-1)[: len(others)] == np.asarray(labels)[others]
        right[name] = answers.copy()
        print(f"{name}: {100 * answers.mean():.2f} %, {time.perf_counter() - began:.0f} s", flush=True)

    mark("float", jax.jit(jax.vmap(lambda v, at: apply(v, images[at])))(floats, unseen))
    steps = options.tuning * (seen.shape[1] // BATCH)
    (on, _), _ = trained(*tuning(None, steps, False), steps, keys, floats, {}, floats, mine, wanted)
    mark("float, trained on", jax.jit(jax.vmap(lambda v, at: apply(v, images[at])))(on, unseen))
    rows = {name: kind for name, kind in ROWS.items() if not options.rows or name in options.rows}
    for name, kind in rows.items():
        fq = qjax.fake_quant(apply, qjax.Policy(kind))
        look = jax.jit(jax.vmap(lambda v, q, at, fq=fq: fq(v, images[at], quant=q)))
        quant = jax.jit(jax.vmap(lambda key, v, at, fq=fq: fq.init(key, v, images[at[:CALIBRATION]])))(keys, floats, seen)
        mark(f"{name}, rounding", look(floats, quant, unseen))
        for how in ("", ", distilled") if name in options.distill else ("",):
            (variables, state), _ = trained(*tuning(fq, steps, bool(how)), steps, keys, floats, quant, floats, mine, wanted)
            logits = look(variables, state, unseen)
            mark(f"{name}, QAT{how}", logits)
        checks[name] = packed_check(fq, jax.tree.map(lambda a: a[0], (variables, state)), images[unseen[0]], logits[0])
    for name, kind in rows.items():
        for method in () if name == "W1" else options.methods:
            packed = rounded(kind, floats, images, seen, METHODS[method])
            mark(f"{name}, {method}", jax.jit(jax.vmap(lambda v, at: qjax.quantized(apply)(v, images[at])))(packed, unseen))
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
    parser.add_argument("--epochs", type=int, default=16, help="Of the float networks.")
    parser.add_argument("--tuning", type=int, default=8, help="Epochs of each training through rounding.")
    parser.add_argument("--methods", nargs="*", default=["GPTQ"], choices=list(METHODS), help="After training, beside rounding.")
    parser.add_argument("--distill", nargs="*", default=["W2A2"], help="Rows that are trained on the float network's answers, too.")
    parser.add_argument("--rows", nargs="*", help="Only these of W8A8, W4A4, W3A3, W2A2, W1.")
    parser.add_argument("--json", help="Write the numbers here, too.")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as cache:
        # What was compiled to quantize the first network serves the others.
        jax.config.update("jax_compilation_cache_dir", cache)
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
        right, checks = measure(options)
    print(f"\njax {jax.__version__}, {jax.devices()[0].device_kind}, {platform.machine()}, {options.seeds} x {options.folds} networks")
    show(right, checks)
    if options.json:
        numbers = {name: {"right": int(mine.sum()), "of": mine.size} for name, mine in right.items()}
        pathlib.Path(options.json).write_text(json.dumps({"right": numbers, "packed": checks}, indent=1))


if __name__ == "__main__":
    main()
