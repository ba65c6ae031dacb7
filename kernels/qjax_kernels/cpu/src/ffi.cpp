// The custom call that XLA makes, and what the loader asks of the library.
#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <initializer_list>
#include <new>
#include <string>
#include <vector>

#include "common.h"
#include "parallel.h"
#include "xla/ffi/api/ffi.h"
#if defined(__x86_64__) && defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace ffi = xla::ffi;
using namespace qjax_cpu;

namespace {

// Tile registers are for processes that ask for them.
bool tiles_allowed() {
#if defined(__x86_64__) && defined(__linux__)
  static const bool allowed = syscall(SYS_arch_prctl, 0x1023 /* ARCH_REQ_XCOMP_PERM */, 18 /* tile data */) == 0;
  return allowed;
#else
  return false;
#endif
}

#if defined(__x86_64__)
// Whether a bit of cpuid is set, for sets that the compiler's own test does not know everywhere.
bool leaf7(int reg, int bit) {
  unsigned a = 7, b = 0, c = 0, d = 0;
  __asm__ volatile("cpuid" : "+a"(a), "=b"(b), "+c"(c), "=d"(d));
  return ((reg == 1 ? b : reg == 2 ? c : d) >> bit) & 1;
}
#endif

// The instruction sets by number: 1 plain, 2 avx2, 3 avx512_vnni, 4 amx, 5 neon; null where this machine has none such.
const Isa* isa_of(int number) {
#if defined(__x86_64__)
  const bool has_avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool has_512 = has_avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                       __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vnni");
  if (number == 1) return plain();
  if (number == 2 && has_avx2) return avx2();
  if (number == 3 && has_512) return avx512_vnni();
  if (number == 4 && has_512 && leaf7(3, 24) && leaf7(3, 25) && leaf7(3, 22) && tiles_allowed()) return amx();
  return nullptr;
#else
  if (number == 1) return plain();
  return number == 5 ? neon() : nullptr;
#endif
}

const Isa* best() {
  static const Isa* isa = [] {
    for (int number : {5, 4, 3, 2})
      if (const Isa* one = isa_of(number)) return one;
    return plain();
  }();
  return isa;
}

uint16_t to_bf16(float f) {
  uint32_t u;
  std::memcpy(&u, &f, 4);
  if ((u & 0x7fffffffu) > 0x7f800000u) return uint16_t((u >> 16) | 0x40);
  return uint16_t((u + 0x7fff + ((u >> 16) & 1)) >> 16);
}

struct Buffer {
  explicit Buffer(size_t bytes) : data(static_cast<char*>(::operator new(bytes + 64, std::align_val_t(64)))) {}
  ~Buffer() { ::operator delete(data, std::align_val_t(64)); }
  Buffer(const Buffer&) = delete;
  char* data;
};

size_t aligned(size_t n) { return (n + 63) / 64 * 64; }

ffi::Error refuse(const std::string& why) { return ffi::Error::InvalidArgument("qjax_kernels.cpu: " + why); }

bool is(const ffi::AnyBuffer& b, ffi::DataType type, std::initializer_list<int64_t> dims) {
  if (b.element_type() != type || b.dimensions().size() != dims.size()) return false;
  size_t i = 0;
  for (int64_t d : dims)
    if (b.dimensions()[i++] != d) return false;
  return true;
}

// One expert's rows.
struct Part {
  Weight w;
  Rows r;
  int64_t row0;  // its first row in x and y
};

struct Attributes {
  int64_t version, bits, k, n, group, isa, integer;
  float divisor;
  int64_t low, high;
};

ffi::Error product(ffi::ThreadPool pool, ffi::AnyBuffer x, ffi::AnyBuffer given, ffi::AnyBuffer codes, ffi::AnyBuffer scales,
                   ffi::AnyBuffer zeros, ffi::AnyBuffer table, ffi::AnyBuffer sizes, ffi::Result<ffi::AnyBuffer> y, const Attributes& a) {
  if (a.version != kLayoutVersion)
    return refuse("weights of layout version " + std::to_string(a.version) + ", and this library reads version " + std::to_string(kLayoutVersion) + ": prepack them again");
  if (a.bits != 2 && a.bits != 3 && a.bits != 4 && a.bits != 8) return refuse("no kernel for " + std::to_string(a.bits) + " bits");
  if (a.k <= 0 || a.n <= 0 || a.group <= 0) return refuse("`k`, `n` and `group` must be positive");
  const Isa* isa = a.isa == 0 ? best() : isa_of(int(a.isa));
  if (!isa) return refuse("this machine does not have the instruction set that was forced");

  Weight w{};
  w.bits = int(a.bits);
  w.center = 1 << (w.bits - 1);
  w.k = a.k;
  w.group = a.group;
  w.groups = (a.k + a.group - 1) / a.group;
  w.group_padded = a.group <= 32 ? 32 : (a.group + 63) / 64 * 64;
  w.blocks = (a.n + kLanes - 1) / kLanes;
  if (a.integer && w.group > kMaxIntegerGroup) return refuse("an int32 sum over a group of " + std::to_string(w.group) + " could overflow");
  if (codes.dimensions().size() != 5) return refuse("`codes` must be (parts, blocks, units, bits, 64)");
  const int64_t parts = codes.dimensions()[0];
  if (!is(codes, ffi::U8, {parts, w.blocks, w.units(), a.bits, 64})) return refuse("`codes` do not have the shape of the layout");
  if (!is(scales, ffi::F32, {parts, w.blocks, w.groups, kLanes})) return refuse("`scales` do not have the shape of the layout");
  if (zeros.element_count() == 0)
    w.zero = Zero::kNone;
  else if (is(zeros, ffi::S32, {parts, w.blocks, w.groups, kLanes}))
    w.zero = Zero::kInt;
  else if (is(zeros, ffi::F32, {parts, w.blocks, w.groups, kLanes}))
    w.zero = Zero::kFloat;
  else
    return refuse("`zeros` do not have the shape of the layout");
  float values[16];
  w.codebook = table.element_count() != 0;
  if (w.codebook && (!is(table, ffi::F32, {16}) || w.bits == 8 || a.integer)) return refuse("a codebook has 16 float32 values, codes of at most 4 bits and float rows");
  for (int i = 0; i < 16; ++i) values[i] = w.codebook ? table.typed_data<float>()[i] : float(i - w.center);
  w.table = values;

  const bool ragged = sizes.element_count() != 0;
  const auto dims = x.dimensions();
  const size_t rank = ragged ? 2 : 3;
  if (dims.size() != rank || dims[rank - 1] != a.k || (!ragged && dims[0] != parts)) return refuse("`x` must be (parts, M, K), or (rows, K) beside sizes");
  if (ragged && !is(sizes, ffi::S32, {parts})) return refuse("`sizes` must be int32 (parts,)");
  const int64_t all = ragged ? dims[0] : dims[0] * dims[1];
  Dtype dtype;
  if (x.element_type() == ffi::F32)
    dtype = Dtype::kF32;
  else if (x.element_type() == ffi::BF16)
    dtype = Dtype::kBF16;
  else if (x.element_type() == ffi::S8 && a.integer)
    dtype = Dtype::kS8;
  else
    return refuse("`x` must be float32 or bfloat16, or int8 codes of an integer product");
  if (dtype == Dtype::kS8 && (given.element_type() != ffi::F32 || int64_t(given.element_count()) != all)) return refuse("int8 rows need a float32 scale each");
  const auto out = y->dimensions();
  if (out.size() != rank || out[rank - 1] != a.n || int64_t(y->element_count()) != all * a.n) return refuse("`y` does not have the shape of the product");
  if (y->element_type() != ffi::F32 && y->element_type() != ffi::BF16) return refuse("`y` must be float32 or bfloat16");
  const bool half = y->element_type() == ffi::BF16;
  const int64_t threads = pool.num_threads();

  std::vector<Part> list;
  int64_t row = 0;
  for (int64_t p = 0; p < parts; ++p) {
    int64_t count = ragged ? sizes.typed_data<int32_t>()[p] : dims[1];
    if (count < 0 || count > all - row) return refuse("`sizes` must not be negative, nor their sum greater than the rows of `x`");
    Part part{w, {}, row};
    part.w.codes = codes.typed_data<uint8_t>() + p * w.blocks * w.block_bytes();
    part.w.scales = scales.typed_data<float>() + p * w.blocks * w.groups * kLanes;
    part.w.zeros = w.zero == Zero::kNone ? nullptr : static_cast<const char*>(zeros.untyped_data()) + 4 * p * w.blocks * w.groups * kLanes;
    part.r.dtype = dtype;
    part.r.integer = a.integer != 0;
    part.r.x = static_cast<const char*>(x.untyped_data()) + row * a.k * (dtype == Dtype::kF32 ? 4 : dtype == Dtype::kBF16 ? 2 : 1);
    part.r.given = dtype == Dtype::kS8 ? given.typed_data<float>() + row : nullptr;
    part.r.divisor = a.divisor;
    part.r.low = int(a.low);
    part.r.high = int(a.high);
    part.r.count = count;
    if (count > 0) list.push_back(part);
    row += count;
  }
  if (row < all) std::memset(static_cast<char*>(y->untyped_data()) + row * a.n * (half ? 2 : 4), 0, (all - row) * a.n * (half ? 2 : 4));
  if (list.empty()) return ffi::Error::Success();

  size_t bytes = 0;
  for (Part& part : list) bytes += aligned(isa->bytes(w, part.r)) + 2 * aligned(4 * part.r.count * w.groups) + aligned(4 * part.r.count);
  Buffer scratch(bytes);
  char* at = scratch.data;
  struct Task {
    int32_t part;
    int64_t b0, b1, r0, r1;
  };
  std::vector<Task> preparations, tasks;
  const int64_t tile = isa->row_tile, all_blocks = w.blocks * int64_t(list.size());
  int64_t left = all_blocks;
  for (size_t p = 0; p < list.size(); ++p) {
    Rows& r = list[p].r;
    r.data = at, at += aligned(isa->bytes(w, r));
    r.fsums = reinterpret_cast<float*>(at), at += aligned(4 * r.count * w.groups);
    r.isums = reinterpret_cast<int32_t*>(at), at += aligned(4 * r.count * w.groups);
    r.scales = reinterpret_cast<float*>(at), at += aligned(4 * r.count);
    const int64_t rows_each = r.count <= 4 ? r.count : tile > 4 ? tile : 4;
    for (int64_t m = 0; m < r.count; m += rows_each) preparations.push_back({int32_t(p), 0, 0, m, std::min(r.count, m + rows_each)});
    // Where rows are few, pieces are long at first and get shorter: long ones stream, short ones at the end leave no thread waiting for
    // another, nor for one that woke late. Where they are many, each piece has enough work to decode codes for, and there are enough of them.
    const int64_t chunk = r.count <= 16 ? r.count : std::min<int64_t>(r.count, 128);
    const int64_t even = std::min<int64_t>(16, all_blocks / (8 * threads));
    for (int64_t b = 0, blocks; b < w.blocks; b += blocks, left -= blocks) {
      blocks = r.count <= 16 ? std::min<int64_t>(64, left / (2 * threads)) : even;
      blocks = std::min(std::max<int64_t>(4, blocks / 4 * 4), w.blocks - b);
      for (int64_t m = 0; m < r.count; m += chunk) tasks.push_back({int32_t(p), b, b + blocks, m, std::min(r.count, m + chunk)});
    }
  }
  parallel_for(pool, threads, int64_t(preparations.size()), [&](int64_t i) {
    const Task& t = preparations[i];
    isa->prepare(list[t.part].w, list[t.part].r, t.r0, t.r1);
  });
  parallel_for(pool, threads, int64_t(tasks.size()), [&](int64_t i) {
    const Task& t = tasks[i];
    const Part& part = list[t.part];
    const int64_t rows = t.r1 - t.r0;
    Buffer acc((t.b1 - t.b0) * rows * kLanes * sizeof(float));
    float* sums = reinterpret_cast<float*>(acc.data);
    isa->run(part.w, part.r, t.b0, t.b1, t.r0, t.r1, sums);
    for (int64_t b = t.b0; b < t.b1; ++b) {
      const int64_t n0 = b * kLanes, width = std::min<int64_t>(kLanes, a.n - n0);
      for (int64_t m = 0; m < rows; ++m) {
        const float* from = sums + ((b - t.b0) * rows + m) * kLanes;
        const float scale = part.r.scales[t.r0 + m];
        const int64_t to = (part.row0 + t.r0 + m) * a.n + n0;
        if (half)
          for (int64_t j = 0; j < width; ++j) static_cast<uint16_t*>(y->untyped_data())[to + j] = to_bf16(from[j] * scale);
        else
          for (int64_t j = 0; j < width; ++j) static_cast<float*>(y->untyped_data())[to + j] = from[j] * scale;
      }
    }
  });
  return ffi::Error::Success();
}

ffi::Error call(ffi::ThreadPool pool, ffi::AnyBuffer x, ffi::AnyBuffer given, ffi::AnyBuffer codes, ffi::AnyBuffer scales, ffi::AnyBuffer zeros,
                ffi::AnyBuffer table, ffi::AnyBuffer sizes, ffi::Result<ffi::AnyBuffer> y, int64_t version, int64_t bits, int64_t k, int64_t n,
                int64_t group, int64_t isa, int64_t integer, float divisor, int64_t low, int64_t high) {
  return product(pool, x, given, codes, scales, zeros, table, sizes, y, Attributes{version, bits, k, n, group, isa, integer, divisor, low, high});
}

}  // namespace

#define QJAX_EXPORT __attribute__((visibility("default")))

extern "C" {
QJAX_EXPORT XLA_FFI_Error* qjax_cpu_matmul(XLA_FFI_CallFrame* frame);
QJAX_EXPORT int qjax_cpu_api_major() { return XLA_FFI_API_MAJOR; }
QJAX_EXPORT int qjax_cpu_api_minor() { return XLA_FFI_API_MINOR; }
QJAX_EXPORT int qjax_cpu_layout_version() { return kLayoutVersion; }
QJAX_EXPORT int qjax_cpu_has(int isa) { return isa_of(isa) != nullptr; }
}

XLA_FFI_DEFINE_HANDLER_SYMBOL(qjax_cpu_matmul, call,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Ret<ffi::AnyBuffer>()
                                  .Attr<int64_t>("version")
                                  .Attr<int64_t>("bits")
                                  .Attr<int64_t>("k")
                                  .Attr<int64_t>("n")
                                  .Attr<int64_t>("group")
                                  .Attr<int64_t>("isa")
                                  .Attr<int64_t>("integer")
                                  .Attr<float>("divisor")
                                  .Attr<int64_t>("low")
                                  .Attr<int64_t>("high"));
