"""Quantizing holds the float parameters, the packed ones and one group of sites; never a second float copy."""

import json
import subprocess
import sys

import pytest

SCRIPT = """
import json, sys
import jax, jax.numpy as jnp
import qjax
from qjax.evaluation import peak_resident_bytes, resident_bytes, tree_bytes

LAYERS, WIDTH, FEED = 24, 512, 4096

def fn(p, x):
    for layer in p:
        x = x + jnp.tanh(x @ layer["up"]) @ layer["down"]
    return x

keys = jax.random.split(jax.random.key(0), LAYERS)
make = jax.jit(lambda k: {"up": jax.random.normal(k, (WIDTH, FEED)) * .02, "down": jax.random.normal(k, (FEED, WIDTH)) * .02})
params = jax.block_until_ready([make(k) for k in keys])
x = jax.random.normal(jax.random.key(1), (64, WIDTH))
method = {"rtn": None, "gptq": qjax.gptq()}[sys.argv[1]]
# "down" is rounded: its Hessian of 4096 x 4096 would be as large as 8 weights and hide what is measured.
# The method takes ten of the layers, which is as good as all: what counts is what one holds when it is done.
policy = qjax.Policy([qjax.Rule("*/down", weight=qjax.int4()), qjax.Rule("[0-9]/up", weight=qjax.int4(group_size=128), method=method),
                      qjax.Rule("*", weight=qjax.int4(group_size=128))])
warm = qjax.quantize(fn, params[:1], qjax.Policy(policy.rules[:2]), calibration=[x])  # compilation has its own memory
jax.block_until_ready(jax.tree.leaves(warm.params))
before = resident_bytes()
result = qjax.quantize(fn, params, policy, calibration=[x])
print(json.dumps({"float": tree_bytes(params), "packed": tree_bytes(result.params), "before": before, "peak": peak_resident_bytes()}))
"""


@pytest.mark.slow
@pytest.mark.parametrize("method", ["rtn", "gptq"])
def test_peak_memory(method):
    out = subprocess.run([sys.executable, "-c", SCRIPT, method], capture_output=True, text=True, check=True).stdout
    seen = json.loads(out.strip().splitlines()[-1])
    assert seen["packed"] < 0.14 * seen["float"]
    # One group is a weight of 8 MB in a handful of float32 forms, and the programs that are compiled on the way. A second float
    # copy would be 48 such weights: what is allowed beside the packed parameters is the memory of 22.
    group = 22 * seen["float"] / 48
    assert seen["peak"] - seen["before"] < seen["packed"] + group, {k: f"{v / 1e6:.0f} MB" for k, v in seen.items()}
