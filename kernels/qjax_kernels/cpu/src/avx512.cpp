// AVX-512 with VNNI.
#if defined(__x86_64__)
#include <immintrin.h>

#include <cstdint>

#define QJAX_L 16
#define QJAX_FLOAT_ROWS 16
#define QJAX_INT_ROWS 16
#define QJAX_FEW 4
#define QJAX_LOOKUP
#define QJAX_DOT4
namespace {
constexpr bool kSigned8 = false;
typedef float VF16 __attribute__((vector_size(64)));
typedef int32_t VI16 __attribute__((vector_size(64)));
typedef uint32_t VU16 __attribute__((vector_size(64)));

inline VF16 lookup(VU16 index, const float* table) { return (VF16)_mm512_permutexvar_ps((__m512i)index, _mm512_loadu_ps(table)); }

template <int BITS>
inline VI16 dot4(VI16 acc, VU16 w, int32_t x) {
  return (VI16)_mm512_dpbusd_epi32((__m512i)acc, (__m512i)w, _mm512_set1_epi32(x));
}
}  // namespace
#include "generic.inc"

namespace qjax_cpu {
const Isa* avx512_vnni() {
  static const Isa isa{"avx512_vnni", 1, generic_bytes, generic_prepare, generic_run};
  return &isa;
}
}  // namespace qjax_cpu
#else
#include "common.h"
namespace qjax_cpu {
const Isa* avx512_vnni() { return nullptr; }
}  // namespace qjax_cpu
#endif
