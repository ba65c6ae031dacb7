"""Kernels as they go to the compiler, and what they say of themselves there."""

import re

import jax
import jax.numpy as jnp
from jax._src.interpreters import mlir
from jaxlib.mlir import ir
from qjax_kernels.gpu.eight_bit import eight_bit_matmul
from qjax_kernels.gpu.tiles import Direct, Tiles
from qjax_kernels.gpu.weight_only import weight_only_matmul


def lowered(bits: int | None, m: int, n: int, k: int, tiles: Tiles | Direct, group: int = 128, scale=jnp.bfloat16) -> list[str]:
    """The kernels of a product, as they go to the compiler, without names of files."""
    shape = jax.ShapeDtypeStruct
    x, codes = shape((m, k), jnp.bfloat16), shape((n, k), jnp.int4 if bits == 4 else jnp.int8)
    if bits is None:
        function, scales = lambda x, w, s: eight_bit_matmul(x, w, s, tiles=tiles), shape((n, 1), jnp.bfloat16)
    else:
        function = lambda x, w, s: weight_only_matmul(x, w, s, group_size=group, tiles=tiles)  # noqa: E731
        scales = shape((n, k // group), scale)
    module = jax.jit(function).trace(x, codes, scales).lower(lowering_platforms=("cuda",)).compiler_ir()
    found: list[str] = []

    def visit(operation) -> ir.WalkResult:
        if operation.name == "stablehlo.custom_call" and "mhlo.backend_config" in operation.attributes:
            context = mlir.make_ir_context()
            context.allow_unregistered_dialects = True
            with context:
                kernel = ir.Module.parse(ir.StringAttr(operation.attributes["mhlo.backend_config"]["module"]).value_bytes)
                text = str(kernel.operation.get_asm(enable_debug_info=False))
            found.append(re.sub(r'mosaic_gpu.dump_basename( = "\w*")?', "", text))
        return ir.WalkResult.ADVANCE

    assert module is not None
    module.operation.walk(visit)
    return found


def shared_memory(kernel: str) -> int:
    """Bytes that a thread block asks for."""
    return _constant(kernel, _launch(kernel)[-1])


def cluster(kernel: str) -> int:
    """Thread blocks of a cluster."""
    sizes = _launch(kernel)[7:-1]  # behind a token, the grid and the block
    return _constant(kernel, sizes[0]) if sizes else 1


def _launch(kernel: str) -> list[str]:
    found = re.search(r'gpu.launch"\(([^)]*)\)', kernel)
    assert found
    return found.group(1).split(", ")


def _constant(kernel: str, name: str) -> int:
    found = re.search(re.escape(name) + r" = ([^\n]*)", kernel)
    assert found
    value = re.search(r"value = (-?\d+)", found.group(1))
    if value:
        return int(value.group(1))
    source = re.search(r"\((%\w+)", found.group(1))
    assert source
    return _constant(kernel, source.group(1))
