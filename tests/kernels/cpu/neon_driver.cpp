// A product of one packed weight by the kernels for AArch64, without jax: numbers and arrays come in by standard input, float32 sums go out.
// Built and run by test_neon.py, in an emulator where the machine is another one.
#include <cstdio>
#include <cstdlib>
#include <new>
#include <vector>

#include "common.h"

using namespace qjax_cpu;

namespace {
template <class T>
T* read(int64_t count) {
  T* a = static_cast<T*>(::operator new(count * sizeof(T) + 64, std::align_val_t(64)));
  if (int64_t(std::fread(a, sizeof(T), count, stdin)) != count) std::exit(2);
  return a;
}
}  // namespace

int main() {
  const int64_t* n = read<int64_t>(11);  // bits, k, n, group, zero, codebook, integer, low, high, rows, units of 16 bits a number of x
  const float divisor = *read<float>(1);
  Weight w{};
  w.bits = int(n[0]), w.center = 1 << (w.bits - 1), w.k = n[1], w.group = n[3];
  w.groups = (w.k + w.group - 1) / w.group;
  w.group_padded = w.group <= 32 ? 32 : (w.group + 63) / 64 * 64;
  w.blocks = (n[2] + kLanes - 1) / kLanes;
  w.zero = Zero(n[4]), w.codebook = n[5] != 0;
  w.codes = read<uint8_t>(w.blocks * w.block_bytes());
  w.scales = read<float>(w.blocks * w.groups * kLanes);
  if (w.zero != Zero::kNone) w.zeros = read<int32_t>(w.blocks * w.groups * kLanes);
  w.table = read<float>(16);
  Rows r{};
  r.integer = n[6] != 0, r.low = int(n[7]), r.high = int(n[8]), r.count = n[9], r.divisor = divisor;
  r.dtype = n[10] == 2 ? Dtype::kF32 : Dtype::kBF16;
  r.x = read<uint16_t>(r.count * w.k * n[10]);
  const Isa* isa = neon();
  if (!isa) return 3;
  std::vector<float> fsums(r.count * w.groups), scales(r.count, 1.0f), sums(w.blocks * r.count * kLanes);
  std::vector<int32_t> isums(r.count * w.groups);
  r.fsums = fsums.data(), r.isums = isums.data(), r.scales = scales.data();
  r.data = ::operator new(isa->bytes(w, r) + 64, std::align_val_t(64));
  isa->prepare(w, r, 0, r.count);
  isa->run(w, r, 0, w.blocks, 0, r.count, sums.data());
  for (int64_t m = 0; m < r.count; ++m)
    for (int64_t j = 0; j < n[2]; ++j) {
      const float y = sums[((j / kLanes) * r.count + m) * kLanes + j % kLanes] * scales[m];
      std::fwrite(&y, 4, 1, stdout);
    }
  return 0;
}
