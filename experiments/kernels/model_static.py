"""Compiles whole quantized models through `qjax.quantized` for a device that is not there, and names the kernels in the compiled program.

    python experiments/kernels/model_static.py --target v6e
    python experiments/kernels/model_static.py --target h200

The model that comes with the package, with its weights, and one layer with the shapes of a 7B model, from shapes alone; four-bit weights by
groups, and eight bits on both sides; for TPUs experts that share a list of rows, an on-line rotation in front of a product, and decode
steps with packed caches, which are updated in place, too. Needs what the extra `aot` installs. A target is a
machine to compile for: nothing runs.
"""

import argparse
import collections
import dataclasses
import functools
import json
import os
import pathlib
import re
import sysconfig
import time

TOOLS = pathlib.Path(sysconfig.get_path("purelib")) / "nvidia" / "cu13" / "bin"
os.environ.update(JAX_PLATFORMS="cpu", TPU_SKIP_MDS_QUERY="1", TPU_WORKER_HOSTNAMES="localhost")
os.environ.update(ALLOW_MULTIPLE_LIBTPU_LOAD="1", PATH=f"{TOOLS}:{os.environ['PATH']}")

import jax  # noqa: E402  (the variables above are read when jax starts)
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402
from jax.experimental import topologies  # noqa: E402
from jax.sharding import Mesh, NamedSharding, PartitionSpec  # noqa: E402

import qjax  # noqa: E402
from qjax.models import Llama, LlamaConfig, books_llama, init_cache  # noqa: E402

DESCRIPTIONS = pathlib.Path(__file__).parents[2] / "tests" / "kernels" / "aot"
TARGETS = {
    "v6e": qjax.Device("tpu", "v6e"),
    "h200": qjax.Device("cuda", "sm_90a", 132),
    "a100": qjax.Device("cuda", "sm_80", 108),
}
SPECS = {
    "W4A16": {"weight": qjax.int4(group_size=128)},
    "W8A8": {"weight": qjax.int8(), "activation": qjax.dynamic(qjax.int8())},
}
LAYER = LlamaConfig(
    vocab_size=512, hidden_size=4096, intermediate_size=11008, num_hidden_layers=1, num_attention_heads=32, num_key_value_heads=32,
    head_dim=128, max_position_embeddings=4096, tie_word_embeddings=True,
)  # fmt: skip
CASES = (("shipped", "W4A16"), ("7B layer, decode", "W4A16"), ("7B layer, prefill", "W8A8"))
ON_TPUS = (("experts", "W4A16"), ("rotated", "W8A8"))  # there are no such kernels for GPUs
CACHES = (("shipped", "KV8"), ("shipped", "KV4"), ("7B layer", "KV8"), ("7B layer", "KV4"))
CACHE_SPECS = {"KV8": qjax.kv_cache(qjax.int8()), "KV4": qjax.kv_cache(qjax.uint4())}
KERNELS = (
    "weight_only", "rounded_product_int8", "experts", "rotate_and_quantize", "codes_product", "decode_attention", "hopper_weight_only",
    "hopper_direct", "hopper_digits", "hopper_eight_bit",
)  # fmt: skip


def sharding(target: str) -> NamedSharding:
    """One device of the target."""
    if target == "v6e":
        topology = topologies.get_topology_desc("v6e:2x2", platform="tpu")
    else:
        config = (DESCRIPTIONS / f"{target}.txtpb").read_text()
        topology = topologies.get_topology_desc(platform="cuda", topology="1x1x1", target_config=config)
    return NamedSharding(Mesh(np.array(topology.devices[:1]), ("x",)), PartitionSpec())


def models() -> dict:
    """(function, parameters or their shapes, shapes of its inputs) by name."""
    shipped = books_llama(jnp.bfloat16)
    large = Llama(LAYER, dtype=jnp.bfloat16, param_dtype=jnp.bfloat16)
    shapes = jax.eval_shape(large.init, jax.random.key(0), jnp.zeros((1, 1), jnp.int32))["params"]
    eight, rows = {"kernel": jax.ShapeDtypeStruct((8, 4096, 11008), jnp.bfloat16)}, jax.ShapeDtypeStruct((64, 4096), jnp.bfloat16)

    def of(model: Llama):
        return lambda params, tokens: model.apply({"params": params}, tokens)

    def tokens(*shape: int) -> tuple[jax.ShapeDtypeStruct]:
        return (jax.ShapeDtypeStruct(shape, jnp.int32),)

    return {
        "shipped": (of(Llama(shipped.config, dtype=jnp.bfloat16)), shipped.params, tokens(1, 16)),
        "7B layer, decode": (of(large), shapes, tokens(16, 1)),
        "7B layer, prefill": (of(large), shapes, tokens(1, 128)),
        "experts": (
            lambda params, x, sizes: jax.lax.ragged_dot(x, params["kernel"], sizes),
            eight,
            (rows, jax.ShapeDtypeStruct((8,), jnp.int32)),
        ),
        "rotated": (lambda params, x: x @ params["kernel"], {"kernel": jax.ShapeDtypeStruct((4096, 11008), jnp.bfloat16)}, (rows,)),
    }


def packed(forward, params, inputs, spec: str, rotated: bool = False):
    """Quantized parameters; of shapes their shapes."""
    if all(isinstance(a, jax.Array) for a in jax.tree.leaves(params)):
        policy = qjax.Policy([qjax.Rule("*/kernel", **SPECS[spec]), qjax.Rule("*", weight=None)])
        return qjax.quantize(forward, params, policy, calibration=[tuple(jnp.zeros(a.shape, a.dtype) for a in inputs)]).params

    def leaf(path, a):
        if path[-1].key != "kernel":
            return a
        stacked = tuple(range(a.ndim - 2))
        q = jax.eval_shape(functools.partial(qjax.core.quantize, spec=SPECS[spec]["weight"], axes=(-2,), stacked=stacked), a)
        rotation = qjax.core.OnlineRotation() if rotated else None
        return dataclasses.replace(q, act=SPECS[spec].get("activation"), rotation=rotation)

    return jax.tree_util.tree_map_with_path(leaf, params)


def row(name: str, spec: str, target: str) -> dict:
    """What the compiled program holds: kernels by name, bytes of temporaries, and of the largest float weight."""
    start = time.monotonic()
    forward, params, inputs = models()[name]
    device, there = TARGETS[target], sharding(target)
    laid = jax.eval_shape(qjax.prepack(forward, device=device), packed(forward, params, inputs, spec, name == "rotated"), *inputs)
    given = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=there), (laid, *inputs))
    program, kernels = compiled(forward, given, device)
    return {
        "model": name,
        "spec": spec,
        "target": target,
        "kernels": kernels,
        "temporaries": program.memory_analysis().temp_size_in_bytes,
        "float_weight": 2 * max(a.size for a in jax.tree.leaves(params)),
        "seconds": round(time.monotonic() - start, 1),
    }


def compiled(forward, given, device, donated: tuple[int, ...] = ()):
    """A program through `qjax.quantized`, and how many times which kernels are in it."""
    lowered = jax.jit(qjax.quantized(forward, device=device), donate_argnums=donated).trace(*given)
    program = lowered.lower(lowering_platforms=(device.platform,)).compile()
    calls = [line for line in program.as_text().splitlines() if "custom-call(" in line]
    found = collections.Counter(name for line in calls for name in re.findall(rf"\b({'|'.join(KERNELS)})\b", line)[:1])
    return program, dict(found)


def cached_row(name: str, spec: str, target: str) -> dict:
    """The same of a decode step with four-bit weights and a packed cache: what a float copy of it would take, and its own bytes."""
    start = time.monotonic()
    _, params, _ = models()["shipped" if name == "shipped" else "7B layer, decode"]
    model = Llama(books_llama(jnp.bfloat16).config if name == "shipped" else LAYER, dtype=jnp.bfloat16, param_dtype=jnp.bfloat16)
    device, there, batch = TARGETS[target], sharding(target), 16 if name == "shipped" else 4

    def forward(params, tokens, cache, position):
        return model.apply({"params": params}, tokens, cache, position)

    policy = qjax.Policy([qjax.Rule("*", cache=CACHE_SPECS[spec])])
    shapes = jax.eval_shape(lambda: init_cache(model.config, batch, model.config.max_position_embeddings, jnp.bfloat16))
    token, position = jax.ShapeDtypeStruct((batch, 1), jnp.int32), jax.ShapeDtypeStruct((), jnp.int32)
    params = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), params)
    weights = packed(forward, params, (token, shapes, position), "W4A16")
    laid = jax.eval_shape(qjax.prepack(forward, device=device), weights, token, shapes, position)
    cache = jax.eval_shape(qjax.quantized_cache(forward, policy), laid, token, shapes, position)
    given = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=there), (laid, token, cache, position))
    program, kernels = compiled(forward, given, device, (2,))
    memory = program.memory_analysis()
    return {
        "model": f"{name}, decode",
        "spec": spec,
        "target": target,
        "kernels": kernels,
        "temporaries": memory.temp_size_in_bytes,
        "float_cache": 2 * sum(a.size for a in jax.tree.leaves(shapes)),
        "packed_cache": sum(a.size * a.dtype.itemsize for a in jax.tree.leaves(cache)),
        "updated_in_place": memory.alias_size_in_bytes,
        "seconds": round(time.monotonic() - start, 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--target", choices=list(TARGETS), required=True, help="what to compile for")
    parser.add_argument("--write", type=pathlib.Path, help="the JSON of the rows")
    given = parser.parse_args()
    found = []
    on_tpu = TARGETS[given.target].platform == "tpu"
    for name, spec in (*CASES, *ON_TPUS) if on_tpu else CASES:
        found.append(row(name, spec, given.target))
        print(json.dumps(found[-1]), flush=True)
    for name, spec in CACHES if on_tpu else ():
        found.append(cached_row(name, spec, given.target))
        print(json.dumps(found[-1]), flush=True)
    if given.write:
        given.write.write_text(json.dumps(found))


if __name__ == "__main__":
    main()
