"""Time the GPTQ solver against gptqmodel's and qwix's on one layer, in one process, in turns. See README.md."""

import argparse
import contextlib
import importlib.metadata
import importlib.util
import io
import os
import statistics
import time

import jax
import jax.numpy as jnp
import numpy as np

from qjax.core import int4
from qjax.ptq.gptq_solver import GPTQOptions, solve

GROUP = 128
SPEC = int4(group_size=GROUP)


def layer(size: int) -> tuple[np.ndarray, np.ndarray]:
    """A weight (N, K) and the Hessian 2/n sum x x^T of correlated inputs, float32."""
    rng = np.random.default_rng(0)
    mix = np.eye(size, dtype=np.float32) + 2 * rng.standard_normal((size, size), np.float32) / np.float32(size**0.5)
    x = rng.standard_normal((2 * size, size), np.float32) @ mix
    return rng.standard_normal((size, size), np.float32), 2 / len(x) * x.T @ x


def output_error(w: np.ndarray, w_hat: np.ndarray, hessian: np.ndarray) -> float:
    """trace(D H D^T) / trace(W H W^T)."""
    d = w_hat - w
    return float(np.sum((d @ hessian) * d) / np.sum((w @ hessian) * w))


def ours(w: np.ndarray, hessian: np.ndarray, options: GPTQOptions):
    """(a call to be timed, a function from its result to the dequantized weight)."""
    w_, hessian_ = jnp.asarray(w), jnp.asarray(hessian)

    def run():
        return jax.block_until_ready(solve(w_, hessian_, SPEC, options))

    def decode(s):
        w_hat = np.asarray(s.codes) * np.repeat(np.asarray(s.scale), GROUP, axis=1)
        return w_hat if s.perm is None else w_hat[:, np.argsort(s.perm)]

    return run, decode


def gptqmodel(w: np.ndarray, hessian: np.ndarray, options: GPTQOptions):
    """The same of gptqmodel. Every call needs a fresh object: it changes the Hessian. Only its solver is timed."""
    import torch
    from gptqmodel.quantization import QuantizeConfig
    from gptqmodel.quantization.gptq import GPTQ

    def run():
        module = torch.nn.Linear(*w.shape[::-1], bias=False)
        module.weight.data = torch.from_numpy(w.copy())
        config = QuantizeConfig(
            bits=4, group_size=GROUP, desc_act=options.act_order, static_groups=options.static_groups, sym=True,
            damp_percent=options.damping, act_group_aware=False, mse=2.4 if options.mse else 0.0,
        )  # fmt: skip
        solver = GPTQ(module, config)
        solver.fallback = None
        solver.quantizer.configure(perchannel=True)
        solver.H, solver.nsamples = torch.from_numpy(hessian.copy()), 2 * len(hessian)
        start = time.perf_counter()
        with contextlib.redirect_stdout(io.StringIO()), torch.inference_mode():
            result = solver.quantize(blocksize=options.block_size)
        run.seconds = time.perf_counter() - start
        return result

    return run, lambda result: result[0].float().numpy()


def qwix(w: np.ndarray, hessian: np.ndarray, jit: bool):
    from qwix._src.core import qarray
    from qwix.contrib import gptq_core

    how = qarray.HowToQuantize(qtype=jnp.int4, channelwise_axes=(0,), tiled_axes={1: GROUP})
    call = lambda w, h: gptq_core.quantize_weight(w, h, how)[0]  # noqa: E731
    w_, hessian_ = jnp.asarray(w), jnp.asarray(hessian)

    def run():
        return jax.block_until_ready((jax.jit(call) if jit else call)(w_, hessian_))

    return run, lambda result: np.asarray(qarray.dequantize(result))


def seconds(run) -> tuple[float, object]:
    start = time.perf_counter()
    result = run()
    return getattr(run, "seconds", time.perf_counter() - start), result


def in_turns(contestants: dict, repeats: int) -> dict[str, list[float]]:
    times = {name: [] for name in contestants}
    for _ in range(repeats):
        for name, (run, _) in contestants.items():
            times[name].append(seconds(run)[0])
    return times


def warm(size: int, repeats: int, options: GPTQOptions) -> None:
    w, hessian = layer(size)
    contestants = {"qjax": ours(w, hessian, options)}
    if importlib.util.find_spec("gptqmodel"):
        contestants["gptqmodel"] = gptqmodel(w, hessian, options)
    print(f"\n{size} x {size}, {SPEC}, Hessian given, {options}")
    for name, (run, decode) in contestants.items():
        first, result = seconds(run)
        error = output_error(w, decode(result), hessian)
        print(f"  {name:10s} first call {first:6.2f} s, relative output error {error:.6f}")
    for name, times in in_turns(contestants, repeats).items():
        print(f"  {name:10s} median {statistics.median(times):6.3f} s, {min(times):.3f} .. {max(times):.3f}, n={repeats}")


def cold(size: int, repeats: int) -> None:
    """First calls: nothing compiled before."""
    w, hessian = layer(size)
    contestants = {"qjax": ours(w, hessian, GPTQOptions())}
    if importlib.util.find_spec("qwix"):
        contestants["qwix"] = qwix(w, hessian, jit=False)
        contestants["qwix, jit"] = qwix(w, hessian, jit=True)
    print(f"\n{size} x {size}, {SPEC}, first call, compilation included")
    times = {name: [] for name in contestants}
    for _ in range(repeats):
        for name, (run, decode) in contestants.items():
            jax.clear_caches()
            took, result = seconds(run)
            times[name].append(took)
            error = output_error(w, decode(result), hessian)
            print(f"  {name:10s} {took:6.2f} s, relative output error {error:.6f}", flush=True)
    for name, values in times.items():
        print(f"  {name:10s} median {statistics.median(values):6.2f} s, {min(values):.2f} .. {max(values):.2f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", type=int, default=4096, help="of the warm comparison with gptqmodel")
    parser.add_argument("--small", type=int, default=512, help="of the cold comparison with qwix")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--cold-repeats", type=int, default=3)
    parser.add_argument("--all", action="store_true", help="act-order and range search too")
    args = parser.parse_args()
    found = [p for p in ("jax", "jaxlib", "torch", "gptqmodel", "qwix", "numpy") if importlib.util.find_spec(p)]
    print(", ".join(f"{p} {importlib.metadata.version(p)}" for p in found))
    print(f"{os.cpu_count()} CPUs, load before {os.getloadavg()[0]:.2f}")
    cold(args.small, args.cold_repeats)
    warm(args.size, args.repeats, GPTQOptions())
    if args.all:
        warm(args.size, args.repeats, GPTQOptions(act_order=True))
        warm(args.size, args.repeats, GPTQOptions(act_order=True, static_groups=True))
        warm(args.size, 3, GPTQOptions(mse=True))
    print(f"load after {os.getloadavg()[0]:.2f}")


if __name__ == "__main__":
    main()
