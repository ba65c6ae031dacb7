"""Instructions of single warps, as MLIR: what a kernel writes that loads weights straight into the registers of the tensor cores.

A kernel is a function of a `Warps` and of addresses; numbers are `Int` (32 bits, unsigned, they wrap), `Long` (addresses) and `Real`
(float32) with the usual operators. Tests hand it a machine of the same methods whose numbers are NumPy arrays, one entry a thread.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp
from jax.experimental.mosaic.gpu import utils as mgpu_utils
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm, scf


def _type(name: str) -> Any:
    return ir.Type.parse(name)


def _integer(value: int, kind: str) -> ir.Value:
    bits = 32 if kind == "i32" else 64
    return arith.constant(_type(kind), ir.IntegerAttr.get(_type(kind), value - 2**bits if value >= 2 ** (bits - 1) else value))


class _Number:
    """A value in a register."""

    kind = ""

    def __init__(self, value: Any):
        self.value = value

    def _pair(self, other: Any) -> tuple[Any, Any]:
        return self.value, other.value if isinstance(other, _Number) else self.constant(other)

    @classmethod
    def constant(cls, value: Any) -> Any:
        return _integer(value, cls.kind)


class Int(_Number):
    """32 bits."""

    kind = "i32"

    @staticmethod
    def of_index(value: Any) -> Int:
        """One of MLIR's `index`."""
        return Int(arith.index_castui(_type("i32"), value))

    def __add__(self, other: Any) -> Int:
        return Int(arith.addi(*self._pair(other)))

    def __sub__(self, other: Any) -> Int:
        return Int(arith.subi(*self._pair(other)))

    def __mul__(self, other: Any) -> Int:
        return Int(arith.muli(*self._pair(other)))

    def __floordiv__(self, other: Any) -> Int:
        return Int(arith.divui(*self._pair(other)))

    def __mod__(self, other: Any) -> Int:
        return Int(arith.remui(*self._pair(other)))

    def __and__(self, other: Any) -> Int:
        return Int(arith.andi(*self._pair(other)))

    def __or__(self, other: Any) -> Int:
        return Int(arith.ori(*self._pair(other)))

    def __xor__(self, other: Any) -> Int:
        return Int(arith.xori(*self._pair(other)))

    def __lshift__(self, other: Any) -> Int:
        return Int(arith.shli(*self._pair(other)))

    def __rshift__(self, other: Any) -> Int:
        return Int(arith.shrui(*self._pair(other)))

    def __lt__(self, other: Any) -> Any:
        return arith.cmpi(arith.CmpIPredicate.ult, *self._pair(other))

    def __eq__(self, other: Any) -> Any:  # type: ignore[override]
        return arith.cmpi(arith.CmpIPredicate.eq, *self._pair(other))

    __hash__ = None  # type: ignore[assignment]


class Long(_Number):
    """An address in device memory."""

    kind = "i64"

    def __add__(self, other: Any) -> Long:
        value = arith.extui(_type("i64"), other.value) if isinstance(other, Int) else self._pair(other)[1]
        return Long(arith.addi(self.value, value))

    def times(self, index: Int, stride: int) -> Long:
        """The address `index` times `stride` bytes further on."""
        return Long(arith.addi(self.value, arith.muli(arith.extui(_type("i64"), index.value), _integer(stride, "i64"))))


class Real(_Number):
    """float32."""

    kind = "f32"

    @classmethod
    def constant(cls, value: Any) -> Any:
        return arith.constant(_type("f32"), ir.FloatAttr.get(_type("f32"), float(value)))

    def __add__(self, other: Any) -> Real:
        return Real(arith.addf(*self._pair(other)))

    def __mul__(self, other: Any) -> Real:
        return Real(arith.mulf(*self._pair(other)))


def device_address(reference: Any) -> Long:
    """Where a reference to device memory begins."""
    return Long(llvm.ptrtoint(_type("i64"), mgpu_utils.memref_ptr(reference)))


def shared_address(reference: Any) -> Int:
    """Where a reference to shared memory begins."""
    return Int(llvm.ptrtoint(_type("i32"), mgpu_utils.memref_ptr(reference)))


class Warps:
    """The instructions of one thread block, written where they are called.

    A block may be cut into parts that know nothing of each other: `thread`, `block` and `barrier` are then those of the part, and `part`
    says which of its block it is.
    """

    def __init__(self, parts: int = 1, warps: int = 0) -> None:
        """All of a block; or one of its `parts`, of so many `warps` each."""
        self.thread = Int(mgpu_utils.thread_idx())
        self._group = self.thread >> 7  # of four warps
        self.block = Int(self._asm("mov.u32 $0, %ctaid.x;", "i32", "=r"))
        self.part, self._parts, self._threads = self.integer(0), parts, 32 * warps
        if parts > 1:
            self.part = self.thread // self._threads
            self.thread, self.block = self.thread % self._threads, self.block * parts + self.part

    def integer(self, value: int) -> Int:
        """A constant."""
        return Int(_integer(value, "i32"))

    def real(self, value: float) -> Real:
        """A constant."""
        return Real(Real.constant(value))

    def both(self, a: Any, b: Any) -> Any:
        """Two conditions."""
        return arith.andi(a, b)

    def minimum(self, a: Int, b: Any) -> Int:
        """The smaller, without a sign."""
        return Int(arith.minui(*a._pair(b)))

    def maximum(self, a: Int, b: Any) -> Int:
        """The larger, without a sign."""
        return Int(arith.maxui(*a._pair(b)))

    def where(self, condition: Any, a: Any, b: Any) -> Any:
        """a or b."""
        return type(a)(arith.select(condition, a.value, b.value))

    def as_real(self, a: Int) -> Real:
        """The float32 of these bits."""
        return Real(arith.bitcast(_type("f32"), a.value))

    def to_real(self, a: Int) -> Real:
        """A signed whole number as float32."""
        return Real(arith.sitofp(_type("f32"), a.value))

    def as_integer(self, a: Real) -> Int:
        """The bits of this float32."""
        return Int(arith.bitcast(_type("i32"), a.value))

    def fma(self, a: Real, b: Real, c: Real) -> Real:
        """a b + c, rounded once."""
        return Real(self._asm("fma.rn.f32 $0, $1, $2, $3;", "f32", "=f,f,f,f", a, b, c))

    def permute(self, a: Int, b: Int, selector: int) -> Int:
        """Four bytes of the eight of a and b, by the nibbles of the selector."""
        return Int(self._asm(f"prmt.b32 $0, $1, $2, {selector};", "i32", "=r,r,r", a, b))

    def larger_halves(self, a: Int, b: Int) -> Int:
        """The larger of the upper and of the lower 16 bits."""
        return Int(self._asm("max.u16x2 $0, $1, $2;", "i32", "=r,r,r", a, b))

    def warp_maximum(self, a: Int) -> Int:
        """The largest of a warp, in all of its threads."""
        return Int(self._asm("redux.sync.max.u32 $0, $1, 0xffffffff;", "i32", "=r,r", a, effects=True))

    def warp_sum(self, a: Real) -> Real:
        """The sum over a warp, in all of its threads, always in the same order."""
        for distance in (16, 8, 4, 2, 1):
            a = a + self.neighbour(a, distance)
        return a

    def neighbour(self, a: Real, distance: int) -> Real:
        """What the thread has whose number in the warp differs in this bit."""
        text = f"shfl.sync.bfly.b32 $0, $1, {distance}, 31, 0xffffffff;"
        return Real(self._asm(text, "f32", "=f,f", a, effects=True))

    def of_four(self, a: Int, number: int) -> Int:
        """What the thread with this number has, of the four to which a thread belongs."""
        kept, most = 0b11100, 31  # bits of the number of a lane that stay its own; the last lane
        text = f"shfl.sync.idx.b32 $0, $1, {number}, {kept << 8 | most}, 0xffffffff;"
        return Int(self._asm(text, "i32", "=r,r", a, effects=True))

    def larger(self, a: Real, b: Real) -> Real:
        """The larger, NaN where one is."""
        return Real(self._asm("max.NaN.f32 $0, $1, $2;", "f32", "=f,f,f", a, b))

    def power(self, a: Real) -> Real:
        """2^a, within 2 units of the last place."""
        return Real(self._asm("ex2.approx.f32 $0, $1;", "f32", "=f,f", a))

    def divided(self, a: Real, b: Real) -> Real:
        """a / b, rounded to nearest."""
        return Real(self._asm("div.rn.f32 $0, $1, $2;", "f32", "=f,f,f", a, b))

    def packed_e4m3(self, a: Real, b: Real) -> Int:
        """Two numbers as e4m3, ties to even, those beyond 448 as 448, a in the lowest byte."""
        text = "{.reg .b16 h; cvt.rn.satfinite.e4m3x2.f32 h, $2, $1; cvt.u32.u16 $0, h;}"
        return Int(self._asm(text, "i32", "=r,f,f", a, b))

    def inverse(self, a: Real) -> Real:
        """1 / a, to the last bit."""
        return Real(self._asm("rcp.approx.f32 $0, $1;", "f32", "=f,f", a))

    def rounded(self, a: Real) -> Real:
        """The nearest bfloat16, ties to even, as float32."""
        return self.as_real(self.packed(a, a) << 16)

    def packed(self, a: Real, b: Real) -> Int:
        """Two numbers as bfloat16, a in the lower 16 bits."""
        return Int(self._asm("cvt.rn.bf16x2.f32 $0, $2, $1;", "i32", "=r,f,f", a, b))

    def inverse_root(self, a: Real) -> Real:
        """1 / sqrt(a), to the last bit but one."""
        return Real(self._asm("rsqrt.approx.f32 $0, $1;", "f32", "=f,f", a))

    def logistic(self, a: Real) -> Real:
        """1 / (1 + exp(-a)); 0 where exp overflows. Its relative error is that of float32 times |a|."""
        return self.inverse(self.power(a * -1.4426950408889634) + 1.0)

    def half_as_real(self, a: Int, dtype: Any) -> Real:
        """The float32 of the lower 16 bits, which are a bfloat16 or float16."""
        if dtype == jnp.bfloat16:
            return self.as_real(a << 16)
        return Real(self._asm("{.reg .b16 l, h; mov.b32 {l, h}, $1; cvt.f32.f16 $0, l;}", "f32", "=f,r", a))

    def load(self, address: Long, words: int) -> list[Int]:
        """1, 2 or 4 words that nobody writes during the launch, which are not read again: past the first-level cache."""
        return self._load(f"ld.global.nc.L1::no_allocate.L2::128B{self._vector(words)}.b32", "l", address, words)

    def load_shared_by_all(self, address: Long, words: int) -> list[Int]:
        """As `load`, of words that other blocks read too."""
        return self._load(f"ld.global{self._vector(words)}.b32", "l", address, words)

    def load_half(self, address: Long) -> Int:
        """16 bits."""
        text = "{.reg .b16 h; ld.global.b16 h, [$1]; cvt.u32.u16 $0, h;}"
        return Int(self._asm(text, "i32", "=r,l", address, effects=True))

    def store_bfloat16(self, address: Long, value: Real) -> None:
        """Rounds to nearest even."""
        self._asm("{.reg .b16 h; cvt.rn.bf16.f32 h, $1; st.global.b16 [$0], h;}", None, "l,f,~{memory}", address, value, effects=True)

    def store_real(self, address: Long, value: Real) -> None:
        """A float32."""
        self._asm("st.global.f32 [$0], $1;", None, "l,f,~{memory}", address, value, effects=True)

    def store_words(self, address: Long, *words: Any) -> None:
        """2 or 4 words of 32 bits."""
        named = ", ".join(f"${i + 1}" for i in range(len(words)))
        kinds = ",".join("f" if isinstance(word, Real) else "r" for word in words)
        text = f"st.global{self._vector(len(words))}.b32 [$0], {{{named}}};"
        self._asm(text, None, f"l,{kinds},~{{memory}}", address, *words, effects=True)

    def load_shared(self, offset: Int, words: int) -> list[Int]:
        """1, 2 or 4 words of shared memory."""
        return self._load(f"ld.shared{self._vector(words)}.b32", "r", offset, words)

    def store_shared(self, offset: Int, *values: Any) -> None:
        """1, 2 or 4 words to shared memory."""
        named = ", ".join(f"${i + 1}" for i in range(len(values)))
        kinds = ",".join("f" if isinstance(value, Real) else "r" for value in values)
        text = f"st.shared{self._vector(len(values))}.b32 [$0], {{{named}}};"
        self._asm(text, None, f"r,{kinds},~{{memory}}", offset, *values, effects=True)

    def of_neighbour(self, offset: Int, block: Int) -> Int:
        """Where a place of shared memory is in a block of the cluster, for `store_neighbour`."""
        return Int(self._asm("mapa.shared::cluster.u32 $0, $1, $2;", "i32", "=r,r,r", offset, block))

    def store_neighbour(self, address: Int, *words: Int) -> None:
        """4 words to the shared memory of a block of the cluster, which has them after `meet_cluster`."""
        named = ", ".join(f"${i + 1}" for i in range(len(words)))
        text = f"st.shared::cluster{self._vector(len(words))}.b32 [$0], {{{named}}};"
        self._asm(text, None, f"r{',r' * len(words)},~{{memory}}", address, *words, effects=True)

    def meet_cluster(self) -> None:
        """Waits for all threads of the cluster, and for what they wrote before."""
        self._asm("barrier.cluster.arrive.release; barrier.cluster.wait.acquire;", None, "~{memory}", effects=True)

    def product(self, a: Sequence[Int], b: Sequence[Int], c: Sequence[Int]) -> list[Int]:
        """c + a b of 16 x 32 by 32 x 8 signed bytes (mma.m16n8k32)."""
        result = _type("!llvm.struct<(i32, i32, i32, i32)>")
        text = ("mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {$0, $1, $2, $3}, {$4, $5, $6, $7}, {$8, $9}, "
                "{$10, $11, $12, $13};")  # fmt: skip
        found = self._asm(text, result, "=r,=r,=r,=r" + ",r" * 10, *a, *b, *c)
        return [Int(llvm.extractvalue(_type("i32"), found, [i])) for i in range(4)]

    def group_products(self, left: Sequence[Sequence[Int]], right: Int, columns: int) -> list[Int]:
        """The sum of products of 64 x 32 by 32 x columns signed bytes (wgmma.m64nNk32), by four warps of sixteen rows each.

        Args:
          left: operands A, each as `product` takes it.
          right: where operands B begin in shared memory, one behind the other. In each the first 16 k of all columns lie side by side, 16
            bytes a column, then the others (the layout without a swizzle).
          columns: 8, 16, 24 or 32.

        Returns:
          Four sums for every eight columns, as `product` gives them.
        """
        count, begin = columns // 2, ((right & 0x3FFFF) >> 4) | (columns << 16)  # how far it is to the other k, in units of 16 bytes
        sums = ", ".join(f"${i}" for i in range(count))
        lines = ["{.reg .pred no, yes; .reg .b32 a; .reg .b64 d; setp.ne.b32 no, 0, 0; setp.eq.b32 yes, 0, 0; wgmma.fence.sync.aligned;"]
        for i in range(len(left)):
            own = ", ".join(f"${count + 4 * i + j}" for j in range(4))
            lines += [
                f"add.u32 a, ${count + 4 * len(left)}, {i * columns * 32 >> 4}; mov.b64 d, {{a, 8}};",  # eight columns are 8 units
                f"wgmma.mma_async.sync.aligned.m64n{columns}k32.s32.s8.s8 {{{sums}}}, {{{own}}}, d, {'yes' if i else 'no'};",
            ]
        lines.append("wgmma.commit_group.sync.aligned; wgmma.wait_group.sync.aligned 0;}")
        result = _type(f"!llvm.struct<({', '.join(['i32'] * count)})>")
        constraints = ",".join(["=r"] * count + ["r"] * (4 * len(left) + 1))
        found = self._asm(" ".join(lines), result, constraints, *(word for words in left for word in words), begin, effects=True)
        return [Int(llvm.extractvalue(_type("i32"), found, [i])) for i in range(count)]

    def meet_tensor_cores(self) -> None:
        """Waits for the four warps that multiply together; what they wrote to shared memory is there for the tensor cores."""
        self._asm("fence.proxy.async.shared::cta; bar.sync $0, 128;", None, "r,~{memory}", self._group + 8, effects=True)

    def barrier(self) -> None:
        """Waits for all threads of the block, and for what they wrote to shared memory."""
        if self._parts == 1:
            self._asm("bar.sync 0;", None, "~{memory}", effects=True)
        else:
            self._asm(f"bar.sync $0, {self._threads};", None, "r,~{memory}", self.part + 1, effects=True)

    def warp_barrier(self) -> None:
        """Waits for the threads of the warp, and for what they wrote to shared memory."""
        self._asm("bar.warp.sync 0xffffffff;", None, "~{memory}", effects=True)

    def arrive(self, counter: Long) -> None:
        """Adds 1 to a word of device memory; who sees it (`await_count`) sees all that this block wrote before its last barrier."""
        self._asm("red.release.gpu.global.add.u32 [$0], 1;", None, "l,~{memory}", counter, effects=True)

    def count_in(self, counter: Long) -> Int:
        """Adds 1 to a word of device memory, and gives what it was; it orders nothing else."""
        return Int(self._asm("atom.add.relaxed.gpu.global.u32 $0, [$1], 1;", "i32", "=r,l,~{memory}", counter, effects=True))

    def await_count(self, counter: Long, count: Int) -> None:
        """Waits until a word of device memory has reached a count. After seconds the launch ends with an error: it never hangs."""
        self._await("u32", "ge.u32 p, v, $1", "mov.u32 n, 0", "l,r", counter, count)

    def show(self, address: Long, sign: int) -> None:
        """Writes 64 bits; who sees them (`await_sign`) sees all that was written before the last barrier of this thread."""
        self._asm(f"st.release.gpu.global.b64 [$0], {sign};", None, "l,~{memory}", address, effects=True)

    def await_sign(self, address: Long, sign: int) -> None:
        """Waits for 64 bits and clears them. After seconds the launch ends with an error: it never hangs."""
        self._await("b64", f"eq.s64 p, v, {sign}", "st.relaxed.gpu.global.b64 [$0], 0", "l", address)

    def store_word(self, address: Long, value: Int) -> None:
        """32 bits."""
        self._asm("st.global.b32 [$0], $1;", None, "l,r,~{memory}", address, value, effects=True)

    def await_before(self) -> None:
        """Waits for the launch before this one."""
        self._asm("griddepcontrol.wait;", None, "~{memory}", effects=True)

    def let_next_begin(self) -> None:
        """The launch behind this one may begin."""
        self._asm("griddepcontrol.launch_dependents;", None, "", effects=True)

    def loop(self, count: Int, carry: Any, body: Callable[[Int, Any], Any]) -> Any:
        """carry = body(i, carry) for i below a count that all threads share; carries are lists of numbers."""
        flat = [number.value for number in carry]
        kinds = [type(number) for number in carry]
        each = scf.ForOp(_integer(0, "i32"), count.value, _integer(1, "i32"), flat)
        with ir.InsertionPoint(each.body):
            inner = [kind(value) for kind, value in zip(kinds, each.inner_iter_args, strict=True)]
            scf.YieldOp([number.value for number in body(Int(each.induction_variable), inner)])
        return [kind(value) for kind, value in zip(kinds, each.results, strict=True)]

    def when(self, condition: Any, body: Callable[[], None]) -> None:
        """Runs where the condition holds."""
        chosen = scf.IfOp(condition)
        with ir.InsertionPoint(chosen.then_block):
            body()
            scf.YieldOp([])

    def only_where(self, condition: Any, body: Callable[[], list[Int]], count: int) -> list[Int]:
        """`count` words that the body gives where the condition holds; elsewhere 0."""
        zero = _integer(0, "i32")
        chosen = scf.IfOp(condition, [_type("i32")] * count, has_else=True)
        with ir.InsertionPoint(chosen.then_block):
            scf.YieldOp([word.value for word in body()])
        with ir.InsertionPoint(chosen.else_block):  # pyright: ignore[reportArgumentType, reportCallIssue]
            scf.YieldOp([zero] * count)
        return [Int(value) for value in chosen.results]

    def _await(self, kind: str, met: str, then: str, constraints: str, *operands: Any) -> None:
        """Reads a value v of device memory until a condition on it holds, for seconds at most, then does something."""
        text = (f"{{.reg .pred p; .reg .{kind} v; .reg .u32 n; mov.u32 n, 0; WAIT: ld.acquire.gpu.global.{kind} v, [$0]; setp.{met}; "
                f"@p bra MET; add.u32 n, n, 1; setp.lt.u32 p, n, 0x1000000; @p bra WAIT; trap; MET: {then};}}")  # fmt: skip
        self._asm(text, None, f"{constraints},~{{memory}}", *operands, effects=True)

    def _vector(self, words: int) -> str:
        return "" if words == 1 else f".v{words}"

    def _load(self, instruction: str, kind: str, address: Any, words: int) -> list[Int]:
        if words == 1:
            return [Int(self._asm(f"{instruction} $0, [$1];", "i32", f"=r,{kind}", address, effects=True))]
        named, kinds = ", ".join(f"${i}" for i in range(words)), ",".join(["=r"] * words)
        result = _type(f"!llvm.struct<({', '.join(['i32'] * words)})>")
        found = self._asm(f"{instruction} {{{named}}}, [${words}];", result, f"{kinds},{kind}", address, effects=True)
        return [Int(llvm.extractvalue(_type("i32"), found, [i])) for i in range(words)]

    def _asm(self, text: str, result: Any, constraints: str, *operands: Any, effects: bool = False) -> Any:
        kind = _type("!llvm.void") if result is None else _type(result) if isinstance(result, str) else result
        given = [operand.value for operand in operands]
        return llvm.inline_asm(kind, given, text, constraints, has_side_effects=effects)
