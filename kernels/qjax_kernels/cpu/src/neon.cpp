// AArch64 with the dot product instructions.
#if defined(__aarch64__)
#include <arm_neon.h>

#include <cstdint>

#define QJAX_L 4
#define QJAX_FLOAT_ROWS 4
#define QJAX_INT_ROWS 4
#define QJAX_FEW 2
#define QJAX_DOT4
namespace {
constexpr bool kSigned8 = true;  // bytes are taken less 128: their center is 0 then
typedef int32_t VI4 __attribute__((vector_size(16)));
typedef uint32_t VU4 __attribute__((vector_size(16)));

template <int BITS>
inline VI4 dot4(VI4 acc, VU4 w, int32_t x) {
  if constexpr (BITS == 8) w ^= 0x80808080u;
  return (VI4)vdotq_s32((int32x4_t)acc, (int8x16_t)w, vreinterpretq_s8_s32(vdupq_n_s32(x)));
}
}  // namespace
#include "generic.inc"

namespace qjax_cpu {
const Isa* neon() {
  static const Isa isa{"neon", 1, generic_bytes, generic_prepare, generic_run};
  return &isa;
}
}  // namespace qjax_cpu
#else
#include "common.h"
namespace qjax_cpu {
const Isa* neon() { return nullptr; }
}  // namespace qjax_cpu
#endif
