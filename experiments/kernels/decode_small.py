"""What one decode step of the shipped small model costs, packed against float: the overhead of a call. See README.md.

All kinds take turns in one process, a step each; medians.
"""

import argparse
import json
import pathlib
import time
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import qjax
from qjax.models import Llama, books_llama, init_cache, prepacked

GOAL = 1.1  # times the float step, at most
WEIGHTS: dict[str, Any] = {
    "float32": None,
    "int8": qjax.int8(),
    "int4 g64": qjax.int4(group_size=64),
    "int8 + int8 activations": qjax.int8(),
}


class Decoding:
    """A model of one kind of weights in the middle of a text; calling it decodes a token and gives the seconds of that."""

    def __init__(self, kind: str, config: Any, params: Any, length: int):
        model, self.length = Llama(config), length
        self.params, apply = {"params": params}, model.apply
        if WEIGHTS[kind] is not None:
            act = qjax.dynamic(qjax.int8()) if "activations" in kind else None
            rules = [qjax.Rule("*embed*", weight=None), qjax.Rule("*", weight=WEIGHTS[kind], activation=act)]
            packed = qjax.quantize(model.apply, self.params, qjax.Policy(rules), calibration=[jnp.ones((1, 4), jnp.int32)]).params
            self.params, apply = prepacked(model, packed), qjax.quantized(model.apply)
        self.step = jax.jit(partial(_step, apply), donate_argnums=2)
        self.token, self.cache, self.position = jnp.ones((1, 1), jnp.int32), init_cache(config, 1, length), 0
        self()

    def __call__(self) -> float:
        start = time.perf_counter()
        self.token, self.cache = self.step(self.params, self.token, self.cache, jnp.int32(self.position))
        jax.block_until_ready(self.token)
        self.position = (self.position + 1) % self.length
        return time.perf_counter() - start


def _step(apply: Any, params: Any, token: jax.Array, cache: Any, position: jax.Array) -> tuple[jax.Array, Any]:
    logits, cache = apply(params, token, cache, position)
    return jnp.argmax(logits[:, -1:], axis=-1).astype(jnp.int32), cache


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--turns", type=int, default=400)
    parser.add_argument("--length", type=int, default=256, help="tokens that the cache has room for")
    parser.add_argument("--json", type=pathlib.Path, help="file for the medians")
    args = parser.parse_args()
    checkpoint = books_llama()
    sides = {kind: Decoding(kind, checkpoint.config, checkpoint.params, args.length) for kind in WEIGHTS}
    times: dict[str, list[float]] = {kind: [] for kind in sides}
    for _ in range(args.turns):
        for kind, side in sides.items():
            times[kind].append(side())
    found = {kind: float(np.median(t)) for kind, t in times.items()}
    print("| weights | a step, us | times float32 |\n|---|---|---|")
    for kind, seconds in found.items():
        share = seconds / found["float32"]
        mark = "" if kind == "float32" else " ✓" if share <= GOAL else f" (> {GOAL:g})"
        print(f"| {kind} | {seconds * 1e6:.0f} | {share:.2f}x{mark} |")
    if args.json:
        args.json.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
