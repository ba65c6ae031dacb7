"""Time from call to compiled program: interpreted int8, the same by hand, and float. See README.md."""

import gc
import json
import platform
import statistics
import sys
import time

import jax
import jax.numpy as jnp
from programs import by_hand, codes_and_scales, init, instructions, plain

import qjax


def measure(fn, *args):
    """Traces, lowers and compiles from nothing."""
    jax.clear_caches()
    gc.collect()
    start = time.perf_counter()
    lowered = jax.jit(fn).lower(*args)
    middle = time.perf_counter()
    compiled = lowered.compile()
    return middle - start, time.perf_counter() - middle, instructions(compiled)


def main(repeats=9):
    params, tokens = init(jax.random.key(0)), jnp.zeros((1, 64), jnp.int32)
    policy = qjax.Policy([qjax.Rule("embed", weight=None), qjax.Rule("*", weight=qjax.int8())])
    packed = qjax.quantize(plain, params, policy, calibration=[tokens]).params
    programs = {
        "float": (lambda *a: plain(*a), params),
        "int8 by hand": (lambda *a: by_hand(*a), codes_and_scales(packed)),
        "int8 interpreted": (lambda *a: qjax.quantized(plain)(*a), packed),
    }
    times = {name: [] for name in programs}
    for turn in range(repeats):  # in turns, each first as often as last
        names = list(programs)
        for name in names[turn % 3 :] + names[: turn % 3]:
            fn, p = programs[name]
            times[name].append(measure(fn, p, tokens))
    rows = {
        name: {
            "trace and lower s": statistics.median(t[0] for t in ts),
            "compile s": statistics.median(t[1] for t in ts),
            "together s": statistics.median(t[0] + t[1] for t in ts),
            "HLO instructions": ts[0][2],
        }
        for name, ts in times.items()
    }
    ratio = rows["int8 interpreted"]["together s"] / rows["int8 by hand"]["together s"]
    print(json.dumps({"rows": rows, "interpreted / by hand": round(ratio, 3), "jax": jax.__version__,
                      "python": platform.python_version(), "repeats": repeats}, indent=1))  # fmt: skip


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
