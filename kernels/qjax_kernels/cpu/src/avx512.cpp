// AVX-512 with VNNI.
#if defined(__x86_64__)
#define QJAX_FLOAT_ROWS 16
#define QJAX_INT_ROWS 16
#define QJAX_FEW 4
#include "vectors512.inc"
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
