"""Quantization-aware training of the shipped language model against the best rounding after training. See README.md."""

import argparse
import functools
import json
import pathlib
import platform
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax

import qjax
from qjax.evaluation import paired_bootstrap, token_losses
from qjax.models import Llama, books_llama

sys.path.append(str(pathlib.Path(__file__).parent.parent / "text"))

from batches import batches_of, cross_entropy, split

TEXTS = pathlib.Path(__file__).parent.parent / "text"
KEEP = (qjax.Rule("*embed*", weight=None),)
INT8 = qjax.dynamic(qjax.int8())
SPECS = {"W4A8 g32": (qjax.int4(group_size=32), INT8), "W3": (qjax.int3(group_size=64), None), "W2": (qjax.int2(group_size=64), None)}
METHODS = {"rounding": None, "rounding, range search": qjax.rtn(mse=True), "GPTQ": qjax.gptq(), "AutoRound": qjax.autoround()}
FURTHER, CONTROL = "float, distilled", "of the distilled float"  # rows of the control
TRAINS = {"straight-through": qjax.ste(), "learned steps": qjax.lsq("mse")}


def policy(name, method=None, train=None):
    """The rules of a row: all linear layers but the tied embedding."""
    weight, activation = SPECS[name]
    return qjax.Policy([*KEEP, qjax.Rule("*", weight=weight, activation=activation, method=method, train=train)])


def trained(apply, params, quant, fq, data, rate, teacher=None, mix=0.0):
    """Parameters and state after one pass over the batches: AdamW and a cosine; learned steps at a rate of their own.

    With a teacher the loss is the divergence from its distribution, with `mix` times the cross entropy.
    """
    steps = len(data)
    ramp = optax.warmup_cosine_decay_schedule(0.0, rate, steps // 20, steps)
    kinds = {"weights": optax.adamw(ramp, weight_decay=0.0), "learned": optax.adam(optax.cosine_decay_schedule(rate / 10, steps)),
             "fixed": optax.set_to_zero()}  # fmt: skip
    marks = jax.tree.map(lambda _: "weights", params), fq.labels(quant) if fq is not None else {}
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.multi_transform(kinds, marks))

    def loss(both, tokens):
        logits = apply(both[0], tokens) if fq is None else fq(both[0], tokens, quant=both[1])
        if teacher is None:
            return cross_entropy(logits, tokens)
        wanted = jax.nn.log_softmax(apply(teacher, tokens).astype(jnp.float32))
        apart = (jnp.exp(wanted) * (wanted - jax.nn.log_softmax(logits.astype(jnp.float32)))).sum(-1).mean()
        return apart + mix * cross_entropy(logits, tokens) if mix else apart

    @functools.partial(jax.jit, donate_argnums=0)
    def step(carry, tokens):
        grads = jax.grad(loss)(carry[0], tokens)
        updates, state = optimizer.update(grads, carry[1], carry[0])
        return optax.apply_updates(carry[0], updates), state

    both = jax.tree.map(jnp.copy, (params, quant))
    carry = both, optimizer.init(both)
    for tokens in data:
        carry = step(carry, tokens)
    return carry[0]


def measure(options):
    """The mean loss of each held-out window, by row."""
    checkpoint = books_llama()
    apply = Llama(checkpoint.config).apply
    start = {"params": jax.tree.map(lambda a: a.astype(jnp.float32), checkpoint.params)}
    seen, held = split(checkpoint.tokenizer, sorted(TEXTS.glob("*.txt")))
    held = held[: options.windows] if options.windows else held
    data = batches_of(seen, options.steps, options.batch)
    losses, seconds, began = {}, {}, time.perf_counter()

    def mark(name, fn, params, since):
        losses[name] = np.asarray(token_losses(fn, params, held), np.float64).mean(1)
        seconds[name] = round(time.perf_counter() - since, 1)
        print(f"{name}: {np.exp(losses[name].mean()):.3f}, {seconds[name]} s, {time.perf_counter() - began:.0f} s in all", flush=True)

    mark("float, before", apply, start, time.perf_counter())
    since = time.perf_counter()
    tuned, _ = trained(apply, start, {}, None, data, options.float_rate)
    mark("float", apply, tuned, since)
    further, first = None, start if options.taught else tuned
    # The control of distilled rows: the same training, from the same beginning, without rounding.
    if options.mix and (options.taught or {*options.begin} - {"shipped"}):
        since = time.perf_counter()
        further, _ = trained(apply, first, {}, None, data, options.rate, tuned, options.mix)
        mark(FURTHER, apply, further, since)
    calibration = [data[i, :8] for i in range(min(16, len(data)))]
    for name in options.rows or SPECS:
        found = {}
        for method in options.methods or METHODS:
            since = time.perf_counter()
            found[method] = qjax.quantize(apply, tuned, policy(name, METHODS[method]), calibration).params
            mark(f"{name}, {method}", qjax.quantized(apply), found[method], since)
            if further is not None:
                since = time.perf_counter()
                packed = qjax.quantize(apply, further, policy(name, METHODS[method]), calibration).params
                mark(f"{name}, {method} {CONTROL}", qjax.quantized(apply), packed, since)
        for kind in options.trains or TRAINS:
            fq = qjax.fake_quant(apply, policy(name, train=TRAINS[kind]))
            for source, params, method in beginnings(options, start, tuned):
                since, key = time.perf_counter(), jax.random.key(0)
                if method is None:
                    quant = fq.init(key, params, data[0])
                elif kind == "learned steps":
                    packed = found.get(method)
                    if options.taught or packed is None:
                        packed = qjax.quantize(apply, params, policy(name, METHODS[method]), calibration).params
                    params, quant = fq.from_packed(key, packed, data[0], params=params)
                else:
                    continue  # straight-through scales are those of the weights, not the ones that a method found
                params, quant = trained(apply, params, quant, fq, data, options.rate, tuned if source else None, options.mix)
                result = qjax.convert(fq, params, data[0], quant=quant)
                mark(f"{name}, QAT {kind}{source}", qjax.quantized(apply), result.params, since)
    return losses, seconds


def beginnings(options, start, tuned):
    """(what it is called, float parameters, the method that rounds them first or None): the shipped weights, trained by cross entropy, or
    `taught` by the trained float model from the first step on; or the trained float model, on its own distribution.
    """
    for name in options.begin:
        method = name if name in METHODS else None
        rounded = f", from {method}" if method else ""
        if options.taught:
            yield f", taught from the shipped weights{rounded}", start, method
        elif name == "shipped":
            yield "", start, None
        else:
            yield f", distilled{rounded}", tuned, method


def show(losses):
    """Prints the tables: the best PTQ of a spec is chosen on every other window, everything is reported on those between."""
    second = {name: each[1::2] for name, each in losses.items()}  # the halves would be different books
    ppl = {name: float(np.exp(each.mean())) for name, each in second.items()}
    print(f"\nfloat before: {ppl['float, before']:.3f}; float, trained on the same batches: {ppl['float']:.3f}")
    if FURTHER in ppl:
        print(f"float, distilled as the rows are: {ppl[FURTHER]:.3f}")
    for spec in SPECS:
        names = [name for name in losses if name.startswith(f"{spec}, ")]
        rounded = [name for name in names if "QAT" not in name and CONTROL not in name]
        if not rounded:
            continue
        best = min(rounded, key=lambda name: losses[name][::2].mean())
        lost, control = ppl[best] - ppl["float"], ppl.get(f"{best} {CONTROL}")
        print(f"\n## {spec}: the best after training is {best.removeprefix(f'{spec}, ')}\n")
        print("| | perplexity | of the lost perplexity recovered | ratio to the best after training |\n|---|---|---|---|")
        for name in names:
            won = ""
            if "QAT" in name:
                won = f"{100 * (1 - (ppl[name] - ppl['float']) / lost):.0f} %"
                if control is not None:
                    won += f"; beside the distilled float and its rounding {100 * (control - ppl[name]) / (control - ppl[FURTHER]):.0f} %"
            interval = paired_bootstrap(second[best], second[name])
            ratio = f"{np.exp(interval.low):.4f} .. {np.exp(interval.high):.4f}" if name != best else ""
            print(f"| {name.removeprefix(f'{spec}, ')} | {ppl[name]:.3f} | {won} | {ratio} |")


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=300, help="Of the float model and of each training through rounding.")
    parser.add_argument("--batch", type=int, default=16, help="Windows of 256 tokens.")
    parser.add_argument("--rate", type=float, default=5e-4, help="Of training through rounding.")
    parser.add_argument("--float-rate", type=float, default=5e-4, help="Of the float model: a trained one gets worse in few fast steps.")
    parser.add_argument("--windows", type=int, help="The first held-out windows only; all by default.")
    parser.add_argument("--rows", nargs="*", choices=list(SPECS))
    parser.add_argument("--methods", nargs="*", choices=list(METHODS), help="After training.")
    parser.add_argument("--trains", nargs="*", choices=list(TRAINS))
    parser.add_argument("--begin", nargs="*", choices=["shipped", "float", *METHODS], default=["shipped"],
                        help="What is trained: the shipped weights, the trained float model, or what a method made of it.")  # fmt: skip
    parser.add_argument("--taught", action="store_true",
                        help="Train the shipped weights (or what a method made of them) on the float model's distribution.")  # fmt: skip
    parser.add_argument("--mix", type=float, default=0.0, help="How much cross entropy is added to a divergence from the teacher.")
    parser.add_argument("--read", nargs="*", default=[], help="Print the tables of numbers that were written before.")
    parser.add_argument("--json", help="Write the numbers here, too.")
    options = parser.parse_args()
    if options.taught and "float" in options.begin:
        parser.error("--taught trains the shipped weights: leave float out of --begin")
    if options.read:
        for path in options.read:
            show({name: np.asarray(each) for name, each in json.loads(pathlib.Path(path).read_text())["losses"].items()})
        return
    losses, seconds = measure(options)
    where = f"{jax.devices()[0].device_kind}, {platform.machine()}"
    print(f"\njax {jax.__version__}, {where}, {options.steps} steps of {options.batch} windows")
    show(losses)
    if options.json:
        text = json.dumps({"losses": {name: each.tolist() for name, each in losses.items()}, "seconds": seconds})
        pathlib.Path(options.json).write_text(text)


if __name__ == "__main__":
    main()
