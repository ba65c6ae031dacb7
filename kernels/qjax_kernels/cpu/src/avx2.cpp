// AVX2 and FMA.
#if defined(__x86_64__)
#include <immintrin.h>

#include <cstdint>

#define QJAX_L 8
#define QJAX_FLOAT_ROWS 6
#define QJAX_INT_ROWS 4
#define QJAX_FEW 2
#define QJAX_LOOKUP
#define QJAX_DOT4
namespace {
constexpr bool kSigned8 = false;
typedef float VF8 __attribute__((vector_size(32)));
typedef int32_t VI8 __attribute__((vector_size(32)));
typedef uint32_t VU8 __attribute__((vector_size(32)));

inline VF8 lookup(VU8 index, const float* table) {
  const __m256i i = (__m256i)index;
  const __m256 low = _mm256_permutevar8x32_ps(_mm256_loadu_ps(table), i), high = _mm256_permutevar8x32_ps(_mm256_loadu_ps(table + 8), i);
  return (VF8)_mm256_blendv_ps(low, high, _mm256_castsi256_ps(_mm256_slli_epi32(i, 28)));
}

// Pairs of products of bytes are added with saturation at 16 bits, which nibbles never reach; so bytes are taken as two nibbles.
template <int BITS>
inline VI8 dot4(VI8 acc, VU8 w, int32_t x) {
  const __m256i xs = _mm256_set1_epi32(x), one = _mm256_set1_epi16(1);
  __m256i sum;
  if constexpr (BITS == 8) {
    const __m256i mask = _mm256_set1_epi8(15);
    const __m256i low = _mm256_maddubs_epi16(_mm256_and_si256((__m256i)w, mask), xs);
    const __m256i high = _mm256_maddubs_epi16(_mm256_and_si256(_mm256_srli_epi32((__m256i)w, 4), mask), xs);
    sum = _mm256_add_epi32(_mm256_madd_epi16(low, one), _mm256_madd_epi16(high, _mm256_set1_epi16(16)));
  } else {
    sum = _mm256_madd_epi16(_mm256_maddubs_epi16((__m256i)w, xs), one);
  }
  return acc + (VI8)sum;
}
}  // namespace
#include "generic.inc"

namespace qjax_cpu {
const Isa* avx2() {
  static const Isa isa{"avx2", 1, generic_bytes, generic_prepare, generic_run};
  return &isa;
}
}  // namespace qjax_cpu
#else
#include "common.h"
namespace qjax_cpu {
const Isa* avx2() { return nullptr; }
}  // namespace qjax_cpu
#endif
