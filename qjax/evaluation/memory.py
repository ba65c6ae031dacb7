"""Bytes: of trees of arrays, of this process, of a compiled program."""

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np


@dataclass(frozen=True)
class ProgramMemory:
    """Bytes of a compiled program on one device, as XLA planned them.

    Attributes:
      argument_bytes: all inputs.
      output_bytes: all outputs.
      alias_bytes: outputs that reuse donated inputs, counted in both of the above.
      temporary_bytes: scratch; a float copy of a packed weight would show here.
      code_bytes: the program itself.
    """

    argument_bytes: int
    output_bytes: int
    alias_bytes: int
    temporary_bytes: int
    code_bytes: int

    @property
    def total_bytes(self) -> int:
        """Peak of the program: inputs, outputs (shared ones once) and scratch."""
        return self.argument_bytes + self.output_bytes - self.alias_bytes + self.temporary_bytes


def tree_bytes(tree: Any) -> int:
    """Bytes of all arrays of a tree, packed containers counted by the arrays they are made of.

    Args:
      tree: any pytree of arrays, ShapeDtypeStructs, numbers, and registered containers of them such as QTensor.

    Returns:
      The sum of size * itemsize over the leaves. An array that occurs twice counts once; a sharded array counts by its
      logical size; sub-byte dtypes (int4) count a byte an element, as they are held on a CPU.

    Raises:
      TypeError: a leaf is not an array or a number.

    Example:
      >>> tree_bytes({"w": np.zeros((4, 8), np.float32), "b": np.zeros(8, np.int8)})
      136
    """
    seen: dict[int, Any] = {}  # keeps the leaves alive, so that their ids stay theirs
    for leaf in jax.tree.leaves(tree):
        if not isinstance(leaf, (jax.Array, jax.ShapeDtypeStruct, np.ndarray, np.generic, bool, int, float, complex)):
            raise TypeError(f"`tree` holds a {type(leaf).__name__}: only arrays and numbers have bytes, remove it")
        seen.setdefault(id(leaf), leaf)
    return sum(_leaf_bytes(leaf) for leaf in seen.values())


def compiled_memory(fn: Callable[..., Any], *args: Any) -> ProgramMemory:
    """Compiles a function for its arguments and reads XLA's plan of its memory; nothing is run.

    Args:
      fn: a function of arrays, jitted or not; a jitted one keeps its donations.
      *args: its arguments, arrays or ShapeDtypeStructs.

    Returns:
      The plan.

    Raises:
      ValueError: the backend does not tell.

    Example:
      >>> import jax.numpy as jnp
      >>> compiled_memory(lambda x: x + 1, jnp.zeros(16, jnp.float32)).argument_bytes
      64
    """
    lowered = fn.lower(*args) if hasattr(fn, "lower") else jax.jit(fn).lower(*args)
    plan = lowered.compile().memory_analysis()
    if plan is None:
        raise ValueError(f"`fn`: the backend {jax.default_backend()!r} gives no memory plan: measure on another one")
    return ProgramMemory(
        argument_bytes=plan.argument_size_in_bytes,
        output_bytes=plan.output_size_in_bytes,
        alias_bytes=plan.alias_size_in_bytes,
        temporary_bytes=plan.temp_size_in_bytes,
        code_bytes=plan.generated_code_size_in_bytes,
    )


def resident_bytes() -> int:
    """Bytes of main memory that this process holds now (Linux).

    Returns:
      The resident set size.

    Raises:
      OSError: the system has no /proc.
    """
    return _proc_status("VmRSS")


def peak_resident_bytes() -> int:
    """Most bytes of main memory that this process held so far; the kernel counts it to about a megabyte.

    Returns:
      The peak of the resident set size.

    Raises:
      OSError: the system tells neither by /proc nor by getrusage.
    """
    if sys.platform == "linux":
        return _proc_status("VmHWM")
    if sys.platform == "darwin":
        import resource  # not on Windows

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # bytes there, kilobytes on Linux
    raise OSError(f"the peak of resident memory cannot be read on {sys.platform}: measure on Linux or macOS")


def _proc_status(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        name, _, value = line.partition(":")
        if name == field:
            return int(value.split()[0]) * 1024
    raise OSError(f"/proc/self/status has no {field}: measure on another Linux")


def _leaf_bytes(leaf: Any) -> int:
    if isinstance(leaf, jax.ShapeDtypeStruct):
        return leaf.size * np.dtype(leaf.dtype).itemsize
    return leaf.nbytes if hasattr(leaf, "nbytes") else np.asarray(leaf).nbytes
