"""How long products take on every kernel that takes them, for `qjax tune` and `qjax bench`."""

from __future__ import annotations

import dataclasses
import itertools
import math
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from qjax_kernels.request import Request

from qjax.core import ActSpec, QTensor, Spec, quantize
from qjax.runtime.kernels import XLA, Runtime
from qjax.runtime.prepack import prepack
from qjax.runtime.quantized import quantized

_COLD = 1 << 28  # bytes of weights that are gone through in turn: more than caches hold
_COPIES = 24


@dataclasses.dataclass(frozen=True)
class Timing:
    """Median seconds of one product x (rows, K) w (N, K)^T.

    Attributes:
      request: what was asked.
      seconds: by the name of a kernel, "xla" and "float", XLA with the weight in the dtype of x.
    """

    request: Request
    seconds: dict[str, float]

    @property
    def fastest(self) -> str:
        """Of the kernels and XLA with the packed weight."""
        return min((name for name in self.seconds if name != "float"), key=self.seconds.__getitem__)


def time_product(
    spec: Spec, act: ActSpec | None, request: Request, runtime: Runtime, *, seconds: float = 0.3, cold: bool = True
) -> Timing:
    """Measures a product on every kernel that takes it, on XLA, and with a float weight; in turns, medians.

    Args:
      spec: of the weight.
      act: of the activations, or None.
      request: the product; one part.
      runtime: the kernels.
      seconds: to spend on each.
      cold: go through so many copies of the weight that none stays in a cache.

    Returns:
      A `Timing`.
    """
    names = [k.name for k in runtime.kernels if request.activation in k.activations and not k.why_not(request)]
    x = jax.random.normal(jax.random.key(0), (request.m, request.k), request.dtype)
    w = jax.random.normal(jax.random.key(1), (request.k, request.n), request.dtype)
    q = dataclasses.replace(quantize(w, spec, (0,)), act=act)
    runs = {name: _Turn(name, x, q, runtime, cold) for name in (*names, XLA)}
    runs["float"] = _Turn("float", x, w, runtime, cold)
    times: dict[str, list[float]] = {name: [] for name in runs}
    until = time.perf_counter() + seconds * len(runs)
    while time.perf_counter() < until or len(times[XLA]) < 3:
        for name, run in runs.items():
            times[name].append(run())
    return Timing(request, {name: float(np.median(found)) for name, found in times.items()})


class _Turn:
    """One way to compute the product, compiled, with its copies of the weight."""

    def __init__(self, name: str, x: jax.Array, w: Any, runtime: Runtime, cold: bool):
        how: dict[str, Any] = {"kernel": name, "device": runtime.device, "kernels": runtime.kernels}
        fn = _product if name == "float" else quantized(_product, **how)
        w = prepack(_product, **how)(w, x) if isinstance(w, QTensor) and name != XLA else w
        size = sum(a.nbytes for a in jax.tree.leaves(w))
        copies = max(1, min(_COPIES, math.ceil(_COLD / size))) if cold else 1
        self.weights = itertools.cycle([w, *(jax.tree.map(jnp.copy, w) for _ in range(copies - 1))])
        self.x, self.run = x, jax.jit(fn)
        jax.block_until_ready(self.run(w, x))

    def __call__(self) -> float:
        w = next(self.weights)
        started = time.perf_counter()
        jax.block_until_ready(self.run(w, self.x))
        return time.perf_counter() - started


def _product(w: Any, x: jax.Array) -> jax.Array:
    return x @ w
