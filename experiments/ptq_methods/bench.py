"""Every post-training method at 4, 3 and 2 bits on a trained language model, a process for each cell. See README.md."""

import argparse
import concurrent.futures
import json
import os
import pathlib
import platform
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import recipes
import second_model

import qjax
from qjax.evaluation import batches, calibration_windows, divergence, encode, token_losses, windows
from qjax.evaluation.memory import peak_resident_bytes
from qjax.models import Llama, books_llama, calibration_lines, heldout_text

HERE = pathlib.Path(__file__).parent
sys.path.append(str(HERE.parent / "gptq_model"))
from peer import CompileClock  # noqa: E402

COMPILING = "/jax/core/compile/backend_compile_duration"  # or reading what was compiled before; traces of calls within calls overlap


def texts(count):
    """Of both models: 16 calibration batches of 8 windows, and the held-out windows, or the first `count`."""
    tokenizer = books_llama().tokenizer
    data = [jnp.asarray(b) for b in batches(calibration_windows(tokenizer, calibration_lines()), 8)]
    return data, windows(encode(tokenizer, heldout_text()))[:count]


def shipped():
    """Of the model that comes with qjax: the function, float parameters, rules for what stays float, and two patterns.

    The patterns are of the layers that get an on-line rotation, and of the scope of attention.
    """
    checkpoint = books_llama()
    return Llama(checkpoint.config).apply, {"params": checkpoint.params}, (qjax.Rule("*embed*", weight=None),), "*down_proj*", "*"


def second():
    """The same of the second model."""
    return *second_model.load_second(), second_model.KEEP, "*down*", "*"


MODELS = {"shipped": shipped, "second": second}


def peak_bytes():
    """The most bytes that were in use so far: of the device, or of the process where the device's memory is the process's."""
    stats = jax.devices()[0].memory_stats()
    return int(stats["peak_bytes_in_use"]) if stats and "peak_bytes_in_use" in stats else peak_resident_bytes()


def run_cell(model, key, count=None):
    """Quantizes and measures one cell, or the float model for the key "float"."""
    (apply, params, keep, online, scope), (data, text) = MODELS[model](), texts(count)
    record = {"model": model, "key": key, "jax": jax.__version__, "device": jax.devices()[0].device_kind}
    if key == "float":
        losses = token_losses(apply, params, text)
        return record | {"losses": window_means(losses)}
    recipe = next(r for r in recipes.every() if r.key == key)
    jax.block_until_ready((params, data))
    before, clock, started = peak_bytes(), CompileClock(COMPILING), time.perf_counter()
    fn, source = apply, params
    if recipe.rotated:
        made = qjax.rewrite(apply, params, data[:1], [qjax.rotation(key=jax.random.key(0), every=True)], untie=True)
        fn, source = made.fn, made.params
    policy = qjax.Policy([*keep, *rules(recipe, online, scope)])
    result = qjax.quantize(fn, source, policy, calibration=data)
    seconds, compiling, peak = time.perf_counter() - started, clock.seconds, peak_bytes()
    fn = qjax.quantized(fn, sites=result.sites)
    losses = token_losses(fn, result.params, text)
    moved = divergence(apply, params, fn, result.params, text[len(text) // 2 :])
    rows = [row for row in result.report.rows if row.spec and row.what == "parameter"]
    weights = sum(int(np.prod(row.shape)) for row in rows)
    return record | {
        "bits": recipe.bits,
        "size": recipe.size,
        "method": recipe.name,
        "spec": str(recipe.spec),
        "how": recipe.method.name,
        "bits_per_weight": 8 * sum(row.nbytes for row in rows) / weights,
        "kl": moved.mean_kl,
        "kls": window_means(moved.kl),
        "seconds": seconds,
        "compile_seconds": compiling,
        "peak_bytes": peak,
        "peak_bytes_before": before,
        "notes": sorted({note for row in rows for note in row.notes}),
        "losses": window_means(losses),
    }


def rules(recipe, online, scope):
    """The rules of a recipe, in order."""
    found = []
    for number, operands in enumerate(recipe.products):
        rotation = qjax.online_rotation() if recipe.online and number == 0 else None
        found.append(qjax.Rule(f"{scope}:dot_general.{number}", activation=operands, method=rotation))
    if recipe.online:
        found.append(qjax.Rule(online, weight=recipe.spec, activation=recipe.activation, method=qjax.online_rotation(recipe.method)))
    return [*found, qjax.Rule("*", weight=recipe.spec, activation=recipe.activation, method=recipe.method)]


def window_means(losses):
    """The mean of each window: all that perplexity, divergence and their bootstraps need."""
    return np.asarray(losses, np.float64).mean(axis=1).tolist()


def run_in_a_process(model, key, cache, count):
    """A fresh process, so that the peak of memory is its own; programs that cells share are compiled once."""
    environment = os.environ | {"JAX_COMPILATION_CACHE_DIR": cache, "XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
    command = [sys.executable, __file__, "--model", model, "--cell", key, *(["--windows", str(count)] if count else [])]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode:
        return {"model": model, "key": key, "error": done.stderr.strip().splitlines()[-1:] or ["no message"]}
    return json.loads(done.stdout.splitlines()[-1])


def run_here(model, key, count):
    """A cell in this process, which read its programs for the cells before: of no worth for seconds and memory, so without them."""
    try:
        record = run_cell(model, key, count)
    except (ValueError, TypeError, RuntimeError) as error:
        return {"model": model, "key": key, "error": [str(error)]}
    return {name: value for name, value in record.items() if name not in ("seconds", "compile_seconds", "peak_bytes", "peak_bytes_before")}


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", choices=list(MODELS), help="One of the two; both by default.")
    parser.add_argument("--only", nargs="*", default=[], help="Only cells whose key holds one of these.")
    parser.add_argument("--jobs", type=int, default=1, help="Processes at a time.")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="Start no new cell after this.")
    parser.add_argument("--json", default=str(HERE / "results.json"), help="Where records go; cells that are there are not run again.")
    parser.add_argument("--cache", default=str(HERE / "weights" / "compiled"), help="Folder of compiled programs.")
    parser.add_argument("--windows", type=int, help="The first held-out windows only, for a try; all by default.")
    parser.add_argument("--here", action="store_true", help="All cells in this process, without seconds and memory: for a busy machine.")
    parser.add_argument("--cell", help="Run one cell in this process and print its record.")
    options = parser.parse_args()
    if options.cell:
        print(json.dumps(run_cell(options.model, options.cell, options.windows)))
        return
    path, started = pathlib.Path(options.json), time.monotonic()
    records = json.loads(path.read_text()) if path.exists() else []
    done = {(r["model"], r["key"]) for r in records if "error" not in r}
    keys = ["float", *(r.key for r in recipes.every() if not options.only or any(part in r.key for part in options.only))]
    wanted = [(m, k) for m in MODELS for k in keys if options.model in (None, m) and (m, k) not in done]
    print(f"{len(wanted)} cells, Python {platform.python_version()}, {platform.machine()}", flush=True)

    def work(cell):
        late = time.monotonic() - started > 60 * options.minutes
        if late:
            return None
        return run_here(*cell, options.windows) if options.here else run_in_a_process(*cell, options.cache, options.windows)

    with concurrent.futures.ThreadPoolExecutor(1 if options.here else options.jobs) as pool:
        for future in concurrent.futures.as_completed([pool.submit(work, cell) for cell in wanted]):
            record = future.result()
            if record is None:
                continue
            records = [r for r in records if (r["model"], r["key"]) != (record["model"], record["key"])] + [record]
            path.write_text(json.dumps(records))
            shown = record.get("error") or f"{np.exp(np.mean(record['losses'])):.3f} in {record.get('seconds', 0):.1f} s"
            print(f"{time.monotonic() - started:6.0f} s  {record['model']} {record['key']}: {shown}", flush=True)


if __name__ == "__main__":
    main()
