"""Mosaic GPU kernels on a CPU: the interpreter of jax, taught what it lacks (an operand of the tensor cores that lies in registers).

The interpreter of jax 0.10 does not know transposed operands: kernels are interpreted from 0.11 on. Races are not looked for: that of
0.12 finds one in every `emit_pipeline` whose blocks are read into registers, also in one of jax alone, when the next copy fills a stage.
"""

import contextlib
import dataclasses

import numpy as np
from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks, jaxpr_interpret, params


def interpreter():
    """What a kernel takes as `interpret`."""
    return params.InterpretGPUParams(detect_races=False)


@dataclasses.dataclass(frozen=True, eq=False)
class _Registers:
    """An operand that stands where the interpreter expects the key of a buffer."""

    value: np.ndarray


class _Keys:
    """Keys of buffers, where a matrix is its own key."""

    def __init__(self, keys) -> None:
        self.keys = keys

    def __getattr__(self, name):
        return getattr(self.keys, name)

    def __call__(self, *args, **kwargs):
        return self.keys(*args, **kwargs)

    def from_array(self, array):
        array = np.asarray(array)
        return _Registers(array) if array.ndim == 2 else self.keys.from_array(array)


class _Memory:
    """Shared memory, where the content of a matrix is itself."""

    def __init__(self, memory) -> None:
        self.memory = memory

    def __getattr__(self, name):
        return getattr(self.memory, name)

    def access(self, key, transforms):
        return () if isinstance(key, _Registers) else self.memory.access(key, transforms)

    def get_buffer_content(self, key, *args, **kwargs):
        # Codes of eight bits are multiplied in the type of the sums, as the tensor cores do.
        return (key.value, None, None) if isinstance(key, _Registers) else self.memory.get_buffer_content(key, *args, **kwargs)


@contextlib.contextmanager
def register_operands():
    """Within it the interpreter takes operands of the tensor cores out of registers; all is put back afterwards."""
    keys, memory = gpu_callbacks.HostAllocationKey, gpu_callbacks._get_shared_memory
    resolve = jaxpr_interpret.resolve_ref

    def resolve_ref(aval, value, transforms):
        if not transforms and getattr(aval, "ndim", 0) == 2 and not hasattr(aval, "inner_aval"):
            return value, ()
        return resolve(aval, value, transforms)

    gpu_callbacks.HostAllocationKey = _Keys(keys)
    gpu_callbacks._get_shared_memory = lambda *args: _Memory(memory(*args))
    jaxpr_interpret.resolve_ref = resolve_ref
    try:
        yield
    finally:
        gpu_callbacks.HostAllocationKey, gpu_callbacks._get_shared_memory = keys, memory
        jaxpr_interpret.resolve_ref = resolve
