"""W4A16 and W8A8 on a TPU: quality and speed of the shipped model through the kernels, and of its products, beside bfloat16.

    python experiments/tpu/bench.py

Without a TPU it says so and prints the static estimate of the same products instead.
"""

import argparse
import dataclasses
import functools

import jax
import jax.numpy as jnp
from qjax_kernels.request import Device, Request, Weight
from qjax_kernels.tpu.chips import CHIPS
from qjax_kernels.tpu.cost import estimate
from qjax_kernels.tpu.int8 import int8
from qjax_kernels.tpu.int8 import why_not as why_not_int8
from qjax_kernels.tpu.weight_only import weight_only

import qjax
from qjax.evaluation import encode, measure_speed, perplexity, windows
from qjax.models import Llama, books_llama, heldout_text
from qjax.runtime.device import device_of

GROUP = 128


WAYS = {
    "W4A16 g128": {"weight": qjax.int4(group_size=GROUP)},
    "W8A8": {"weight": qjax.int8(), "activation": qjax.dynamic(qjax.int8())},
}


def found_chip() -> str | None:
    """The generation of the first device, None where no kernel is written for it."""
    device = device_of(jax.devices()[0])
    return device.chip if device.platform == "tpu" and device.chip in CHIPS else None


def whole_model(count: int = 32, repeats: int = 50) -> list[str]:
    """A line a way: the shipped model's perplexity on `count` windows of held-out text, the time of eight of them and of 16 single tokens.

    Through `qjax.prepack` and `qjax.quantized` on the first device, whatever it is; the kernels are those that the report names.
    """
    shipped = books_llama(jnp.bfloat16)
    apply, params = Llama(shipped.config, dtype=jnp.bfloat16).apply, {"params": shipped.params}
    text = windows(encode(shipped.tokenizer, heldout_text()))[:count]
    prefill, decode = jnp.asarray(text[:8]), jnp.asarray(text[0, :16, None])

    def taken(fn, params) -> tuple[float, float, float]:
        times = (measure_speed(fn, params, tokens, repeats=repeats).median_seconds for tokens in (prefill, decode))
        return perplexity(fn, params, text), *times

    lost, *base = taken(apply, params)
    lines = [f"shipped model, bfloat16: perplexity {lost:.3f}, prefill {base[0] * 1e3:.3f} ms, decode {base[1] * 1e3:.3f} ms"]
    for name, how in WAYS.items():
        policy = qjax.Policy([qjax.Rule("*embed*", weight=None), qjax.Rule("*", **how)])
        result = qjax.quantize(apply, params, policy, calibration=[prefill])
        kernels = ", ".join(dict.fromkeys(row.kernel for row in result.report.rows if row.spec))
        lost, *times = taken(qjax.quantized(apply), qjax.prepack(apply)(result.params, prefill))
        speed = ", ".join(f"{what} {was / now:.2f}x" for what, was, now in zip(("prefill", "decode"), base, times, strict=True))
        lines.append(f"shipped model, {name}: perplexity {lost:.3f}, {speed} bfloat16, by {kernels}")
    return lines


def weights() -> dict[str, jax.Array]:
    """Matrices (K, N) of the shipped model, one of each shape."""
    leaves = jax.tree_util.tree_leaves_with_path(books_llama().params)
    matrices = {jax.tree_util.keystr(path): jnp.asarray(leaf) for path, leaf in leaves if leaf.ndim >= 2}
    first = {leaf.shape[-2:]: (name, leaf.reshape(-1, *leaf.shape[-2:])[0]) for name, leaf in reversed(matrices.items())}
    return dict(first.values())


def rounded(w: jax.Array, bits: int, group: int) -> tuple[jax.Array, jax.Array]:
    """Symmetric codes (K, N) and scales (groups, N) by the largest magnitude."""
    k, n = w.shape
    padded = jnp.pad(w.astype(jnp.float32), ((0, -k % group), (0, 0))).reshape(-1, group, n)
    scale = jnp.maximum(jnp.abs(padded).max(axis=1), 1e-30) / (2 ** (bits - 1) - 0.5)
    codes = jnp.clip(jnp.round(padded / scale[:, None]), -(2 ** (bits - 1)), 2 ** (bits - 1) - 1).reshape(-1, n)[:k]
    return codes.astype(jnp.int4 if bits == 4 else jnp.int8), scale


def measured(chip: str, rows: int, repeats: int = 50) -> list[str]:
    """A line a product: relative error and speed against bfloat16, on the device."""
    lines = []
    for name, w in weights().items():
        k, n = w.shape
        x = jax.random.normal(jax.random.key(0), (rows, k), jnp.bfloat16)
        exact = jnp.dot(x.astype(jnp.float32), w.astype(jnp.float32), precision="highest")
        base = measure_speed(jnp.dot, x, w.astype(jnp.bfloat16), repeats=repeats).median_seconds
        runs = {"W4A16 g128": (functools.partial(weight_only, group=GROUP, chip=chip), *rounded(w, 4, GROUP))}
        if CHIPS[chip].int8:
            runs["W8A8"] = (functools.partial(int8, group=k, chip=chip), *rounded(w, 8, k))
        for kernel, (function, codes, scale) in runs.items():
            error = jnp.linalg.norm(function(x, codes, scale).astype(jnp.float32) - exact) / jnp.linalg.norm(exact)
            speed = base / measure_speed(function, x, codes, scale, repeats=repeats).median_seconds
            lines.append(f"{name} {rows}x{n}x{k} {kernel}: error {error:.4f}, {speed:.2f}x bfloat16")
    return lines


def static(rows: int) -> list[str]:
    """A line a product and generation: the estimate, from counts alone."""
    lines = []
    shapes = [(4096, 4096), (14336, 4096), *(w.shape[::-1] for w in weights().values())]
    for chip in CHIPS:
        for n, k in shapes:
            request = Request(Device("tpu", chip), rows, n, k, Weight("int", 4, GROUP))
            text = f"{chip} {rows}x{n}x{k}: bf16 {estimate(request, 'bf16').seconds * 1e6:.1f} us, "
            text += f"W4A16 {estimate(request).seconds * 1e6:.1f} us"
            integer = dataclasses.replace(request, weight=Weight("int", 8), activation="int8")
            text += f", W8A8 {estimate(integer).seconds * 1e6:.1f} us" if not why_not_int8(integer) else ""
            lines.append(text)
    return lines


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, nargs="+", default=[16, 1024], help="rows of x: decode and prefill")
    given = parser.parse_args(arguments)
    chip = found_chip()
    print(f"on {jax.devices()[0].device_kind}" if chip else "no TPU of a known generation here: estimates from counts, not measurements")
    if chip:
        print("\n".join(whole_model()))
    for rows in given.rows:
        print("\n".join(measured(chip, rows) if chip else static(rows)))


if __name__ == "__main__":
    main()
