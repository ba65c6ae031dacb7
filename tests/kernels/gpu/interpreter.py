"""Mosaic GPU kernels on a CPU: the interpreter of jax, taught what it lacks (an operand of the tensor cores that lies in registers)."""

import contextlib
import inspect

import jax
import numpy as np
from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks, jaxpr_interpret, params


def interpreter(detect_races: bool = False):
    """What a kernel takes as `interpret`."""
    return params.InterpretGPUParams(detect_races=detect_races)


def _from_registers(original):
    """The interpreter's multiply-add, for a left operand that is an array and no reference."""
    takes = inspect.signature(original).parameters

    def wgmma(**kwargs):
        left = np.asarray(kwargs["a_allocation_key_as_array"])
        if left.ndim != 2:
            return original(**kwargs)
        key = gpu_callbacks.HostAllocationKey.from_array
        memory = gpu_callbacks._get_shared_memory()
        assert "acc_allocation_key_as_array" in takes

        def read(name):
            own = key(kwargs[f"{name}_allocation_key_as_array"])
            transforms = jax.tree.map(int, gpu_callbacks._remove_noop_transforms(kwargs[f"{name}_transforms"]))
            window = memory.access(own, transforms)
            info = gpu_callbacks.memory.GPULoggingInfo(kwargs["mesh_location"], kwargs["thread"], kwargs.get("source_info"))
            return own, window, info, memory.get_buffer_content(own, window, kwargs["thread"], logging_info=info)[0]

        *_, right = read("b")
        own, window, info, total = read("acc")
        total = total + np.matmul(left.astype(total.dtype), right.astype(total.dtype))
        memory.store_buffer_content(own, window, total, kwargs["thread"], logging_info=info)
        return kwargs["token"]

    return wgmma


@contextlib.contextmanager
def register_operands():
    """Within it the interpreter takes operands of the tensor cores out of registers; put back as it was afterwards."""
    original, resolve = gpu_callbacks.wgmma, jaxpr_interpret.resolve_ref

    def resolve_ref(aval, value, transforms):
        if not transforms and getattr(aval, "ndim", 0) == 2 and not hasattr(aval, "inner_aval"):
            return value, ()
        return resolve(aval, value, transforms)

    gpu_callbacks.wgmma, jaxpr_interpret.resolve_ref = _from_registers(original), resolve_ref
    try:
        yield
    finally:
        gpu_callbacks.wgmma, jaxpr_interpret.resolve_ref = original, resolve
