"""The machine of `qjax_kernels.gpu.warps` in NumPy: every number is an array with one entry a thread, all threads go in step.

Memory is one array of bytes for each address space. Reading or writing outside of an array is an error, and so is reading shared
memory that nobody wrote.
"""

import concurrent.futures
import threading
import time

import ml_dtypes
import numpy as np

REGION = 1 << 40  # of addresses: one for every array
LOCK = threading.Lock()  # of what is atomic


class Simulator:
    """The instructions of one thread block."""

    def __init__(self, block: int, threads: int, arrays: list[np.ndarray], shared: int):
        self.threads, self.active = threads, np.ones(threads, bool)
        self.thread, self.block = np.arange(threads, dtype=np.uint32), np.uint32(block)
        self.arrays = [array.reshape(-1).view(np.uint8) for array in arrays]
        self.shared, self.written = np.zeros(shared, np.uint8), np.zeros(shared, bool)
        # Behind how many barriers each byte was written and read last, and by which warp (several: -2).
        self.barriers, self.touched = 0, {kind: (np.full(shared, -1), np.full(shared, -1)) for kind in ("written", "read")}
        # Which thread wrote each byte last, and behind how many barriers of its warp: others of the warp read it behind the next.
        self.warp_barriers, self.author = np.zeros(threads // 32, int), (np.full(shared, -1), np.full(shared, -1))
        # The same of four warps: of which each byte was written and read last (several: -2), and behind how many barriers of theirs.
        self.group_barriers = np.zeros(max(threads // 128, 1), int)
        self.grouped = {kind: (np.full(shared, -1), np.full(shared, -1)) for kind in ("written", "read")}
        self.stored = np.full(threads // 32, -1)  # behind how many barriers each warp wrote to device memory last
        self.met = None  # behind how many barriers which warp has seen that others wrote
        # Behind how many barriers of its warp each wrote to device memory last, and saw a sign of others.
        self.put, self.seen = np.full(threads // 32, -1), np.full(threads // 32, -1)
        self.loads = 0  # bytes of device memory, past the first-level cache

    def addresses(self) -> list:
        return [Address(np.full(self.threads, (i + 1) * REGION, np.int64)) for i in range(len(self.arrays))]

    def integer(self, value):
        return np.full(self.threads, value, np.uint32)

    def real(self, value):
        return np.full(self.threads, value, np.float32)

    def both(self, a, b):
        return a & b

    def minimum(self, a, b):
        return np.minimum(a, np.uint32(b))

    def maximum(self, a, b):
        return np.maximum(a, np.uint32(b))

    def where(self, condition, a, b):
        return np.where(condition, a, b)

    def as_real(self, a):
        return a.view(np.float32)

    def to_real(self, a):
        return a.view(np.int32).astype(np.float32)

    def as_integer(self, a):
        return a.view(np.uint32)

    def fma(self, a, b, c):
        return (a.astype(np.float64) * b + c).astype(np.float32)

    def permute(self, a, b, selector):
        both = np.stack([a, b], -1).view(np.uint8)
        return np.stack([both[:, selector >> 4 * i & 7] for i in range(4)], -1).view(np.uint32)[:, 0]

    def larger_halves(self, a, b):
        return np.maximum(a.view(np.uint16), b.view(np.uint16)).view(np.uint32)

    def warp_maximum(self, a):
        return np.repeat(a.reshape(-1, 32).max(1), 32)

    def warp_sum(self, a):
        for distance in (16, 8, 4, 2, 1):
            a = a + self.neighbour(a, distance)
        return a

    def neighbour(self, a, distance):
        assert self.active.reshape(-1, 32).all(1).sum() * 32 == self.active.sum(), "whole warps exchange"
        return a[np.arange(self.threads) ^ distance]

    def of_four(self, a, number):
        assert self.active.reshape(-1, 32).all(1).sum() * 32 == self.active.sum(), "whole warps exchange"
        return a[np.arange(self.threads) // 4 * 4 + number]

    def larger(self, a, b):
        return np.maximum(a, b)

    def power(self, a):
        return np.exp2(a.astype(np.float64)).astype(np.float32)

    def divided(self, a, b):
        return (a / b).astype(np.float32)

    def packed_e4m3(self, a, b):
        each = np.clip(np.stack([a, b], -1), -448, 448).astype(ml_dtypes.float8_e4m3fn).view(np.uint16)[:, 0]
        return each.astype(np.uint32)

    def inverse(self, a):
        return (1 / np.where(self.active, a, 1).astype(np.float64)).astype(np.float32)

    def rounded(self, a):
        return a.astype(ml_dtypes.bfloat16).astype(np.float32)

    def packed(self, a, b):
        return np.stack([a, b], -1).astype(ml_dtypes.bfloat16).view(np.uint32)[:, 0]

    def inverse_root(self, a):
        return (1 / np.sqrt(a, dtype=np.float32)).astype(np.float32)

    def logistic(self, a):
        return (1 / (1 + np.exp(-a.astype(np.float64)))).astype(np.float32)

    def half_as_real(self, a, dtype):
        return a.astype(np.uint16).view(dtype).astype(np.float32)

    def load(self, address, words):
        self.loads += 4 * words * int(self.active.sum())
        return self._global(address, words)

    def load_shared_by_all(self, address, words):
        self._behind_a_barrier()
        return self._global(address, words)

    def _behind_a_barrier(self):
        own = self.thread[self.active] >> 5
        assert (self.seen[own] < self.warp_barriers[own]).all(), "what other blocks wrote is read without a barrier of the warp"
        others = self.met is not None and ((self.thread[self.active] >> 5) != self.met[1]).any()
        assert not others or self.met[0] < self.barriers, "what other blocks wrote is read without a barrier"

    def load_half(self, address):
        self._behind_a_barrier()
        return self._bytes(address, 2).view(np.uint16)[:, 0].astype(np.uint32)

    def store_bfloat16(self, address, value):
        self._put(address, value.astype(ml_dtypes.bfloat16).reshape(-1, 1).view(np.uint8))

    def store_real(self, address, value):
        self._put(address, value.reshape(-1, 1).view(np.uint8))

    def store_words(self, address, *words):
        self._put(address, np.stack([word.view(np.uint32) for word in words], -1).view(np.uint8))

    def load_shared(self, offset, words):
        at = self._at(offset, 4 * words)[self.active]
        assert self.written[at].all(), "shared memory is read before it is written"
        self._touch("read", "written", at)
        thread, (author, when) = self.thread[self.active].astype(int)[:, None], (part[at] for part in self.author)
        same = (author != thread) & (author >> 5 == thread >> 5)
        early = same & (when == self.warp_barriers[thread >> 5])
        assert not early.any(), "a thread reads what another of its warp wrote without a barrier"
        found = np.zeros((self.threads, 4 * words), np.uint8)
        found[self.active] = self.shared[at]
        return list(found.view(np.uint32).T.copy())

    def store_shared(self, offset, *values):
        self._share(offset, np.stack([value.view(np.uint32) for value in values], -1).view(np.uint8))

    def product(self, a, b, c):
        """By the layouts of the PTX manual, mma.m16n8k32 of .s8: operand A by rows, operand B by columns."""
        lane = np.arange(32)
        row, t = lane >> 2, lane & 3
        left, right = np.zeros((self.threads // 32, 16, 32), np.int64), np.zeros((self.threads // 32, 32, 8), np.int64)
        parts = [each.reshape(-1, 32, 1).view(np.int8) for each in (*a, *b)]
        for i in range(4):
            for register, (down, along) in enumerate(((0, 0), (8, 0), (0, 16), (8, 16))):
                left[:, row + down, along + 4 * t + i] = parts[register][:, :, i]
            for register, along in enumerate((0, 16)):
                right[:, along + 4 * t + i, row] = parts[4 + register][:, :, i]
        total = left @ right
        start = [each.view(np.int32) for each in c]
        found = [total[:, row + 8 * (r // 2), 2 * t + r % 2].reshape(-1) + start[r] for r in range(4)]
        return [each.astype(np.int32).view(np.uint32) for each in found]

    def group_products(self, left, right, columns):
        """By the layouts of the PTX manual, wgmma.m64nNk32 of .s8: operand A in registers, B in shared memory without a swizzle."""
        assert self.active.all() and self.threads % 128 == 0, "warps multiply together inside of a branch"
        sums = [[self.integer(0)] * 4 for _ in range(columns // 8)]
        lane, group = self.thread & 31, self.thread >> 7
        for number, words in enumerate(left):
            base = right.astype(np.int64) + number * columns * 32
            for eight in range(columns // 8):
                pair = []
                for stretch in (0, 1):
                    at = base + stretch * columns * 16 + eight * 128 + (lane >> 2) * 16 + (lane & 3) * 4
                    at = at[:, None] + np.arange(4)
                    assert self.written[at].all(), "shared memory is read before it is written"
                    assert not self._late("written", at, group[:, None]).any(), "the tensor cores read what was written without a barrier"
                    pair.append(self.shared[at].view(np.uint32)[:, 0])
                sums[eight] = self.product(words, pair, sums[eight])
        return [each for four in sums for each in four]

    def meet_tensor_cores(self):
        whole = self.active.reshape(-1, 128)
        assert (whole.all(1) | ~whole.any(1)).all(), "a barrier inside of a branch of four warps"
        self.group_barriers[whole.all(1)] += 1
        self.warp_barriers[np.repeat(whole.all(1), 4)] += 1

    def barrier(self):
        assert self.active.all(), "a barrier inside of a branch"
        self.barriers += 1
        self.group_barriers += 1
        self.warp_barriers += 1

    def warp_barrier(self):
        whole = self.active.reshape(-1, 32)
        assert (whole.all(1) | ~whole.any(1)).all(), "a barrier inside of a branch of a warp"
        self.warp_barriers[whole.all(1)] += 1

    def arrive(self, counter):
        own = self.thread[self.active] >> 5
        assert (np.delete(self.stored, own) < self.barriers).all(), "what other warps wrote is announced without a barrier"
        self.count_in(counter)

    def count_in(self, counter):
        assert self.active.sum() == 1, "one thread counts for its block"
        with LOCK:
            before = self._global(counter, 1)[0]
            self._put(counter, (before + np.uint32(1)).view(np.uint8).reshape(-1, 4))
        return np.where(self.active, before, np.uint32(0))

    def await_count(self, counter, count):
        end = time.monotonic() + 60
        while (self._global(counter, 1)[0] < count)[self.active].any():
            assert time.monotonic() < end, "blocks wait for one that does not come"
            time.sleep(1e-3)
        self.met = self.barriers, (self.thread[self.active] >> 5).item()

    def show(self, address, sign):
        own = self.thread[self.active] >> 5
        assert len(np.unique(own)) == len(own), "one thread announces what its warp wrote"
        assert (self.put[own] < self.warp_barriers[own]).all(), "what a warp wrote is announced without a barrier"
        array, at = self._place(address, 8)
        with LOCK:
            array[at] = np.array([sign], np.uint64).view(np.uint8)

    def await_sign(self, address, sign):
        array, at = self._place(address, 8)
        end = time.monotonic() + 60
        while (array[at].view(np.uint64) != np.uint64(sign)).any():
            assert time.monotonic() < end, "blocks wait for one that does not come"
            time.sleep(1e-3)
        array[at] = 0
        own = np.unique(self.thread[self.active] >> 5)
        self.seen[own] = self.warp_barriers[own]

    def store_word(self, address, value):
        self._put(address, value.view(np.uint8).reshape(-1, 4))

    def await_before(self):
        self.barrier()

    def let_next_begin(self):
        self.barrier()

    def loop(self, count, carry, body):
        for i in range(int(np.unique(count).item())):
            carry = body(self.integer(i), carry)
        return carry

    def when(self, condition, body):
        outside = self.active
        self.active = outside & condition
        if self.active.any():
            body()
        self.active = outside

    def only_where(self, condition, body, count):
        outside = self.active
        self.active = outside & condition
        found = body() if self.active.any() else self.integer(0)[None].repeat(count, 0)
        assert len(found) == count
        self.active = outside
        return [np.where(condition, word, np.uint32(0)) for word in found]

    def _at(self, offset, size):
        assert not (offset[self.active] % min(size, 16)).any(), "misaligned"
        return offset.astype(np.int64)[:, None] + np.arange(size)

    def _share(self, offset, values):
        at = self._at(offset, values.shape[1])[self.active]
        self._touch("written", "read", at)
        self.shared[at], self.written[at] = values[self.active], True
        thread = np.broadcast_to(self.thread[self.active].astype(int)[:, None], at.shape)
        self.author[0][at], self.author[1][at] = thread, self.warp_barriers[thread >> 5]

    def _touch(self, what, other, at):
        """Notes who reads or writes; what another warp did the other way since the last barrier is a race."""
        warp = np.broadcast_to((self.thread[self.active] >> 5).astype(int)[:, None], at.shape)
        when, who = (part[at] for part in self.touched[other])
        late = (when == self.barriers) & (who != warp) & self._late(other, at, warp >> 2)
        assert not late.any(), f"shared memory is {what} by one warp and {other} by another without a barrier"
        when, who = self.touched[what]
        several = (when[at] == self.barriers) & (who[at] != warp)
        # Warps that touch a byte in one instruction are several, too: the least and the largest of them differ.
        who[at] = warp
        least = who.copy()
        least[at[::-1]] = warp[::-1]
        who[at] = np.where(several | (least[at] != who[at]), -2, who[at])
        groups, counts = self.grouped[what]
        groups[at] = np.where((when[at] == self.barriers) & (groups[at] != warp >> 2), -2, warp >> 2)
        counts[at] = self.group_barriers[warp >> 2]
        when[at] = self.barriers

    def _late(self, what, at, group):
        """Whether bytes were touched behind the last barrier of the block, and, by the same four warps, behind the last one of these."""
        groups, counts = (part[at] for part in self.grouped[what])
        return (self.touched[what][0][at] == self.barriers) & ((groups != group) | (counts == self.group_barriers[group]))

    def _global(self, address, words):
        return list(self._bytes(address, 4 * words).view(np.uint32).T.copy())

    def _bytes(self, address, size):
        array, at = self._place(address, size)
        found = np.zeros((self.threads, size), np.uint8)
        found[self.active] = array[at]
        return found

    def _put(self, address, values):
        own = self.thread[self.active] >> 5
        self.stored[own], self.put[own] = self.barriers, self.warp_barriers[own]
        array, at = self._place(address, values.shape[1])
        array[at] = values[self.active]

    def _place(self, address, size):
        places = address.value[self.active]
        number = np.unique(places // REGION).item()
        at = places % REGION
        assert not (at % min(size, 16)).any(), "misaligned"
        assert at.max() + size <= len(self.arrays[number - 1]), "behind the end of the array"
        return self.arrays[number - 1], at[:, None] + np.arange(size)


class Address:
    """A number of 64 bits a thread."""

    def __init__(self, value):
        self.value = value

    def __add__(self, other):
        return Address(self.value + np.asarray(other, np.int64))

    def times(self, index, stride):
        return Address(self.value + np.asarray(index, np.int64) * stride)


def launch(body, blocks: int, threads: int, arrays: list[np.ndarray], shared: int) -> list[Simulator]:
    """Runs the blocks side by side, each on shared memory of its own: they may wait for each other."""

    def run(block):
        machine = Simulator(block, threads, arrays, shared)
        with np.errstate(over="ignore", invalid="ignore"):
            body(machine, machine.integer(0), *machine.addresses())
        return machine

    with concurrent.futures.ThreadPoolExecutor(blocks) as pool:
        return list(pool.map(run, range(blocks)))
