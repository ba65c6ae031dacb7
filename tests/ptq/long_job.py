"""A small job of rescaling and GPTQ on scanned layers, as a program that is killed after some step."""

import os
import signal
import sys

import jax
import jax.numpy as jnp
from jax import lax

import qjax
from tests.program.cases import normal

LAYERS, D, HIDDEN = 2, 16, 16  # one shape: a solver to compile


def fn(p, x):
    def block(x, layer):
        h = x * lax.rsqrt(jnp.mean(jnp.square(x), -1, keepdims=True) + 1e-6) * layer["norm"]
        return x + jax.nn.silu(h @ layer["gate"]) * (h @ layer["up"]) @ layer["down"], None

    return lax.scan(block, x, p["layers"])[0] @ p["head"]


PARAMS = jax.tree.map(
    lambda w: w.astype(jnp.bfloat16),
    {
        "layers": {
            "norm": 1 + jnp.abs(normal(LAYERS, D)),
            "gate": normal(LAYERS, D, HIDDEN, seed=1),
            "up": normal(LAYERS, D, HIDDEN, seed=2),
            "down": normal(LAYERS, HIDDEN, D, seed=3),
        },
        "head": normal(D, D, seed=4),
    },
)
GPTQ = qjax.gptq(act_order=True, mse=False)
POLICY = qjax.Policy(
    [
        qjax.Rule("head", weight=qjax.int8(), activation=qjax.static(qjax.int8())),
        qjax.Rule("*", weight=qjax.int4(group_size=8), method=qjax.awq(grid=4, then=GPTQ)),
    ]
)
DATA = [normal(2, 9, D, seed=100 + i, dtype=jnp.bfloat16) for i in range(3)]
# The second one has no pass but GPTQ's own.
JOBS = {"rescaled": POLICY, "plain": qjax.Policy([qjax.Rule("layers/*", weight=qjax.int4(group_size=8), method=GPTQ)])}


def main(job, folder, phase, step):
    def killed(event):
        if event.phase == phase and event.done == int(step):
            os.kill(os.getpid(), signal.SIGKILL)

    qjax.quantize(fn, PARAMS, JOBS[job], DATA, resume=folder, progress=killed)


if __name__ == "__main__":
    main(*sys.argv[1:])
