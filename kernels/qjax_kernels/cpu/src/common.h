// What the instruction sets share: the layout of packed weights, prepared rows, and the table of functions that each one fills.
//
// Layout (version 1). Rows n of a weight (N, K) stand in blocks of 16, one row to a 32-bit lane; its k in units of 32. Each group of
// `group` k is padded to `group_padded`, a multiple of 32 (of 64 where it is longer than 32). A unit holds `bits` vectors of 64 bytes:
//   8 bits  vector v, byte b of a lane: k = 4 v + b
//   4 bits  vector v, byte b: k = 8 v + b in the low nibble, 8 v + 4 + b in the high one
//   2 bits  vector v (0, 1), byte b: the low two bits of each nibble are the 4-bit vector 2 v, the high two bits 2 v + 1
//   3 bits  two vectors as for 2 bits, and a third: bit i of each nibble is bit 2 of the 4-bit vector i
// Codes are unsigned: a signed one is stored plus 2^(bits - 1), the `center`. Padding is any code, for rows x are padded with zeros.
// Scales and zero points (blocks, groups, 16); a zero point counts from the center.
#pragma once
#include <cstddef>
#include <cstdint>

namespace qjax_cpu {

constexpr int kLayoutVersion = 1;
constexpr int kLanes = 16;
constexpr int kUnit = 32;
constexpr int64_t kMaxIntegerGroup = 32768;  // 255 * 128 * 32768 < 2^31: an int32 sum over a group cannot overflow

enum class Zero : int { kNone = 0, kInt = 1, kFloat = 2 };
enum class Dtype : int { kF32 = 0, kBF16 = 1, kS8 = 2 };

struct Weight {
  const uint8_t* codes;   // (blocks, units, bits, 64)
  const float* scales;    // (blocks, groups, 16)
  const void* zeros;      // (blocks, groups, 16) int32 or float, or null
  const float* table;     // 16 values: of a codebook, or of codes less the center
  Zero zero;
  bool codebook;
  int bits;
  int center;
  int64_t blocks;
  int64_t groups;
  int64_t group;          // as the caller counts
  int64_t group_padded;
  int64_t k;
  int64_t units() const { return groups * group_padded / kUnit; }
  int64_t k_padded() const { return groups * group_padded; }
  int64_t block_bytes() const { return units() * bits * 64; }
};

// Rows of x as an instruction set wants them. `data` is its own affair; sums are those of the rows over each group.
struct Rows {
  Dtype dtype;            // of x
  bool integer;           // codes, not floats
  const void* x;          // (count, k) as given
  const float* given;     // scales of given codes, or null
  float divisor;          // scale = max |x| / divisor
  int low, high;          // where codes end
  int64_t count;
  void* data;
  float* fsums;           // (count, groups)
  int32_t* isums;         // (count, groups)
  float* scales;          // (count)
};

struct Isa {
  const char* name;
  int64_t row_tile;                                              // rows that are prepared together
  size_t (*bytes)(const Weight&, const Rows&);                   // of `data`
  void (*prepare)(const Weight&, const Rows&, int64_t, int64_t);  // rows [r0, r1), r0 a multiple of row_tile
  // acc (b1 - b0, r1 - r0, 16): the products of blocks [b0, b1) and rows [r0, r1), before the scales of the rows.
  void (*run)(const Weight&, const Rows&, int64_t b0, int64_t b1, int64_t r0, int64_t r1, float* acc);
};

const Isa* plain();
const Isa* avx2();
const Isa* avx512_vnni();
const Isa* amx();
const Isa* neon();

}  // namespace qjax_cpu
