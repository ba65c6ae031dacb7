"""GPTQ of the whole shipped model beside gptqmodel's hooks and solver, in one process, in turns. See README.md."""

import argparse
import json
import platform
import statistics
import time

import jax
import jax.numpy as jnp
from peer import CompileClock, Peer

import qjax
from qjax.evaluation import batches, calibration_windows, encode, perplexity, windows
from qjax.models import Llama, books_llama, calibration_lines, heldout_text

WAYS = {"paper": qjax.gptq(mse=False), "range search": qjax.gptq()}


def ours(model, params, data, spec, method):
    """Seconds to quantize, and the packed parameters. A new function each time: nothing is remembered between runs."""
    policy = qjax.Policy([qjax.Rule("*embed*", weight=None), qjax.Rule("*", weight=spec, method=method)])
    start = time.perf_counter()
    result = qjax.quantize(lambda *a: model.apply(*a), params, policy, calibration=data)
    return time.perf_counter() - start, result.params


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--ways", nargs="+", choices=list(WAYS), default=list(WAYS), help="of finding the ranges")
    parser.add_argument("--peer", action="store_true", help="time gptqmodel too (needs torch, transformers, gptqmodel)")
    parser.add_argument("--perplexity", action="store_true", help="the table of perplexities too")
    arguments = parser.parse_args()
    checkpoint = books_llama()
    model, params = Llama(checkpoint.config), {"params": checkpoint.params}
    tokens = calibration_windows(checkpoint.tokenizer, calibration_lines())
    data = [jnp.asarray(b) for b in batches(tokens, 8)]
    clock, peer_times = CompileClock(), []
    times = {name: [] for name in arguments.ways}
    peer = Peer(tokens) if arguments.peer else None
    spec = qjax.int4(group_size=128)
    for _ in range(arguments.repeats):  # in turns
        for name, each in times.items():
            jax.clear_caches()
            clock.read()
            each.append((ours(model, params, data, spec, WAYS[name])[0], clock.read()))
        if peer is not None:
            peer_times.append(peer.run(4))
    seconds = {
        f"qjax, {name}": {
            "all": round(statistics.median(a for a, _ in pairs), 2),
            "of that tracing, lowering and compiling": round(statistics.median(b for _, b in pairs), 2),
            "without": round(statistics.median(a - b for a, b in pairs), 2),
        }
        for name, pairs in times.items()
    }
    if peer is not None:
        seconds["gptqmodel"] = {k: round(statistics.median(t[k] for t in peer_times), 2) for k in peer_times[0]}
    document = {"seconds": seconds, "versions": {"jax": jax.__version__, "python": platform.python_version()}}
    if arguments.perplexity:
        document["perplexity"] = table(model, params, data, checkpoint)
    print(json.dumps(document, indent=1))


def table(model, params, data, checkpoint):
    """Perplexity of every row of the reference table, by the same protocol."""
    text = windows(encode(checkpoint.tokenizer, heldout_text()))
    rows = {
        "float32": None,
        "int8 rtn": (qjax.int8(), None),
        "int4 g128 rtn": (qjax.int4(group_size=128), None),
        "int4 channel rtn": (qjax.int4(), None),
        "int3 g128 rtn": (qjax.int3(group_size=128), None),
        "int3 g64 rtn": (qjax.int3(group_size=64), None),
        "int2 g64 rtn": (qjax.int2(group_size=64), None),
    }
    kinds = {
        "gptq, paper": qjax.gptq(mse=False),
        "gptq, paper, act-order": qjax.gptq(act_order=True, mse=False),
        "gptq, paper, act-order, static groups": qjax.gptq(act_order=True, static_groups=True, mse=False),
        "gptq": qjax.gptq(),
        "gptq, act-order": qjax.gptq(act_order=True),
        "gptq, act-order, static groups": qjax.gptq(act_order=True, static_groups=True),
    }
    specs = {
        "int4 g128": qjax.int4(group_size=128),
        "int3 g128": qjax.int3(group_size=128),
        "int2 g64": qjax.int2(group_size=64),
    }
    for name, spec in specs.items():
        rows |= {f"{name} {kind}": (spec, method) for kind, method in kinds.items()}
    run = qjax.quantized(model.apply)
    out = {}
    for name, row in rows.items():
        tree = params if row is None else ours(model, params, data, *row)[1]
        out[name] = round(perplexity(run, tree, text), 4)
        print(name, out[name], flush=True)
    return out


if __name__ == "__main__":
    main()
