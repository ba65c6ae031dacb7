"""Sums that one thread block begins and another ends, handed over through device memory."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.mosaic.gpu import utils as mgpu_utils
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import vector

from .mosaic import Layout
from .schedule import Piece, Schedule
from .warps import Int, Long, Real, Warps, device_address

STRETCH = 64  # columns of a sum that are in registers beside it
THREADS = 128  # of a warpgroup
SIGN = 0x53A8B16E5D41F2C7  # says that a sum is there


def room(schedule: Schedule | None, members: int, warpgroups: int, shape: tuple[int, int], dtype) -> tuple[jax.ShapeDtypeStruct, ...]:
    """What a launch gives besides its result: signs, and one part (R, C) of each warpgroup; nothing where no tile is cut.

    Nothing is put there before: memory that a kernel were given zeroed would be an operand, which it must not change, and which products of
    the same shape in one program would share. Signs are random words of 64 bits; who has seen one clears it, so that what a launch leaves
    is never taken for one by the next, and other memory holds them by a chance of 2^-64.
    """
    if schedule is None or not schedule.shared:
        return ()
    places = (schedule.groups, members, warpgroups)
    return jax.ShapeDtypeStruct((*places, 2), jnp.int32), jax.ShapeDtypeStruct((*places, *reversed(shape)), dtype)


@dataclasses.dataclass(frozen=True, eq=False)
class Parts:
    """Where they lie.

    Attributes:
      memory: signs (groups, members, warpgroups, 2) int32 and sums (groups, members, warpgroups, C, R), both in device memory (`room`); or
        nothing where no tile is cut. A sum is handed over once, to one block.
      member: number of the block in its group.
      warpgroup: that computes.
      interpreted: blocks run one after another, and none has to wait.
    """

    memory: Sequence
    member: Any
    warpgroup: Any
    interpreted: bool

    def end(self, piece: Piece, group: Any, schedule: Schedule, total: jax.Array, finish: Callable) -> None:
        """Hands a sum over, or takes those of others and finishes it.

        Args:
          piece: whose sum it is.
          group: of this block.
          schedule: of the pieces.
          total: the sum (R, C).
          finish: as `ring` takes it.
        """
        if not schedule.shared:
            finish(piece, lambda start, size: total[:, start : start + size])
            return

        def hand_over() -> None:
            for start in range(0, total.shape[1], STRETCH):
                part = total[:, start : start + STRETCH]
                self._write(self._place(group, start, part.shape[1]), part)
            self._tell(group)

        def take() -> None:
            @pl.loop(piece.begun, group)
            def _(other):
                self._await(other)

            def columns(start: int, size: int) -> jax.Array:
                def add(other, part):
                    return part + self._read(self._place(other, start, size), part.dtype)

                return lax.fori_loop(piece.begun, group, add, total[:, start : start + size])

            finish(piece, columns)

        lax.cond(piece.last == schedule.stages, take, hand_over)

    def _place(self, group: Any, start: int, size: int) -> Any:
        """Where columns of a part lie, as so many rows."""
        return self.memory[1].at[group, self.member, self.warpgroup, pl.ds(start, size)]

    def _write(self, place: Any, part: jax.Array) -> None:
        """Each thread writes its own numbers, four at once, beside those of its neighbours: nobody else reads them."""
        if self.interpreted:
            place[...] = part.T
            return

        @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), Layout.WGMMA))
        def write(_, target, own):
            w, at = Warps(), _thread_place(target)
            words = words_of(w, own)
            for i in range(0, len(words), 4):
                w.store_words(at + i * 4 * THREADS, *words[i : i + 4])

        write(place, plgpu.layout_cast(part, Layout.WGMMA))  # pyright: ignore[reportCallIssue]

    def _read(self, place: Any, dtype: Any) -> jax.Array:
        """What the same thread of another block wrote."""
        size, rows = place.shape
        if self.interpreted:
            return place[...].T
        kind = plgpu.ShapeDtypeStruct((rows, size), dtype, layout=Layout.WGMMA)

        @plgpu.inline_mgpu(arg_types=(plgpu.RefType(),), return_type=kind)
        def read(_, source):
            w, at = Warps(), _thread_place(source)
            return array_of(w, lambda i: w.load_shared_by_all(at + i * 4 * THREADS, 4), (rows, size), dtype)

        return read(place)  # pyright: ignore[reportCallIssue]

    def _tell(self, group: Any) -> None:
        if self.interpreted:
            return

        @plgpu.inline_mgpu(arg_types=(plgpu.RefType(),))
        def tell(_, sign):
            mgpu_utils.warpgroup_barrier()  # all threads have written
            with _one_thread():
                Warps().show(device_address(sign), SIGN)

        tell(self.memory[0].at[group, self.member, self.warpgroup])  # pyright: ignore[reportCallIssue]

    def _await(self, group: Any) -> None:
        if self.interpreted:
            return

        @plgpu.inline_mgpu(arg_types=(plgpu.RefType(),))
        def await_(_, sign):
            with _one_thread():
                Warps().await_sign(device_address(sign), SIGN)
            mgpu_utils.warpgroup_barrier()

        await_(self.memory[0].at[group, self.member, self.warpgroup])  # pyright: ignore[reportCallIssue]


def _one_thread() -> Any:
    """What one thread of the warpgroup runs.

    Mosaic's `single_thread` notes in a global variable of Python that it was entered: another thread that lowers a kernel meanwhile would
    leave the choice out, and all 128 would write a sign, or wait for it.
    """
    return mgpu_utils.when(mgpu_utils.single_thread_predicate(mgpu_utils.ThreadSubset.WARPGROUP))


def _thread_place(reference: Any) -> Long:
    """Where the numbers of a thread of a warpgroup begin: sixteen bytes behind those of the thread before."""
    return device_address(reference) + thread() * 16


def thread() -> Int:
    """The number of a thread in its warpgroup."""
    return Int(mgpu_utils.thread_idx()) % THREADS


def words_of(w: Warps, array: mgpu.FragmentedArray) -> list[Int]:
    """The numbers of a thread, four bytes each, of an array (R, C) that lies as sums of the tensor cores do."""
    values = [vector.extract(register, [], [i]) for _, register in np.ndenumerate(array.registers) for i in range(2)]
    return [w.as_integer(Real(value)) if array.mlir_dtype == ir.F32Type.get() else Int(value) for value in values]


def array_of(w: Warps, load: Callable[[int], list[Int]], shape: tuple[int, int], dtype: Any) -> mgpu.FragmentedArray:
    """The array whose words are those of `words_of`: `load` gives four, from one on."""
    registers = np.empty(mgpu.WGMMA_LAYOUT.registers_shape(shape), dtype=object)
    words = [word for i in range(0, 2 * registers.size, 4) for word in load(i)]
    values = [w.as_real(word).value if dtype == jnp.float32 else word.value for word in words]
    pair = ir.VectorType.get((2,), values[0].type)
    for i, index in enumerate(np.ndindex(registers.shape)):
        registers[index] = vector.from_elements(pair, values[2 * i : 2 * i + 2])
    return mgpu.FragmentedArray(_registers=registers, _layout=mgpu.WGMMA_LAYOUT, _is_signed=None if dtype == jnp.float32 else True)
