"""Time of a training step through rounding over the float step, on the shipped model; with --peer beside qwix. See README.md."""

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
from qjax.models import Llama, books_llama, calibration_lines

INT8 = qjax.dynamic(qjax.int8())
SPECS = {
    "W8": (qjax.int8(), None),
    "W8A8": (qjax.int8(), INT8),
    "W4A8": (qjax.int4(), INT8),
    "W4A8 g32": (qjax.int4(group_size=32), INT8),
    "W8A8, learned steps": (qjax.int8(), qjax.static(qjax.int8())),
}
PEER = {"W8": ("int8", None), "W8A8": ("int8", "int8"), "W4A8": ("int4", "int8")}


def step_of(apply, params, tokens, quant=None):
    """A compiled step of Adam on parameters (and state), and its arguments."""
    optimizer = optax.adam(1e-4)

    def loss(both, tokens):
        logits = apply(both[0], tokens) if quant is None else apply(both[0], tokens, quant=both[1])
        return optax.softmax_cross_entropy_with_integer_labels(logits[:, :-1], tokens[:, 1:]).mean()

    def step(both, state, tokens):
        value, grads = jax.value_and_grad(loss)(both, tokens)
        updates, state = optimizer.update(grads, state, both)
        return optax.apply_updates(both, updates), state, value

    both = (params, quant)
    return jax.jit(step).lower(both, optimizer.init(both), tokens).compile(), (both, optimizer.init(both), tokens)


def peers(model, params, tokens, names):
    """qwix's QtProvider on the same module."""
    import qwix

    found = {}
    for name in names:
        if name in PEER:
            weight, act = PEER[name]
            rules = [qwix.QtRule(module_path=".*proj.*", weight_qtype=weight, act_qtype=act)]
            module = qwix.quantize_model(model, qwix.QtProvider(rules))
            found[f"qwix {name}"] = step_of(module.apply, params, tokens)
    return found


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--peer", action="store_true", help="Beside qwix 0.1.8, which must be installed.")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--turns", type=int, default=9)
    parser.add_argument("--rows", nargs="*", default=list(SPECS), choices=list(SPECS))
    parser.add_argument("--json")
    options = parser.parse_args()
    checkpoint = books_llama()
    model, params = Llama(checkpoint.config), {"params": checkpoint.params}
    ids = checkpoint.tokenizer.encode(" ".join(calibration_lines())).ids[: options.batch * options.length]
    tokens = jnp.asarray(np.asarray(ids, np.int32).reshape(options.batch, options.length))
    steps = {"float": step_of(model.apply, params, tokens)}
    for name in options.rows:
        weight, act = SPECS[name]
        train = qjax.lsq() if "learned" in name else None
        rules = [qjax.Rule("*embed*", weight=None), qjax.Rule("*", weight=weight, activation=act, train=train)]
        for forward in ("float", "integer") if act is not None and "g32" not in name else ("float",):
            fq = qjax.fake_quant(model.apply, qjax.Policy(rules), forward)
            quant = fq.init(jax.random.key(0), params, tokens) if train else None
            steps[name + f", {forward} forward" * (act is not None)] = step_of(fq, params, tokens, quant)
    if options.peer:
        steps |= peers(model, params, tokens, options.rows)
    seconds, busy = {name: [] for name in steps}, {name: [] for name in steps}
    for turn in range(options.turns + 1):
        for name, (run, arguments) in steps.items():
            began, before = time.perf_counter(), time.process_time()
            jax.block_until_ready(run(*arguments))
            if turn:
                seconds[name].append(time.perf_counter() - began)
                busy[name].append(time.process_time() - before)
    print(f"jax {jax.__version__}, {jax.devices()[0].device_kind}, {platform.machine()}, batch {options.batch} x {options.length}\n")
    print("| step | ms, least | ms, median | over float: least | median of turns | processor time, median |\n|---|---|---|---|---|---|")
    for name, times in seconds.items():
        ratio = np.median(np.asarray(times) / np.asarray(seconds["float"]))
        least = min(times) / min(seconds["float"])
        spent = np.median(np.asarray(busy[name]) / np.asarray(busy["float"]))
        print(f"| {name} | {1000 * min(times):.0f} | {1000 * np.median(times):.0f} | {least:.2f} | {ratio:.2f} | {spent:.2f} |")
    if options.json:
        pathlib.Path(options.json).write_text(json.dumps(seconds))


if __name__ == "__main__":
    main()
