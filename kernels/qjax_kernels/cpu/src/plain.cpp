// Any processor: what the compiler makes of vectors of four lanes without special flags.
#define QJAX_L 4
#define QJAX_FLOAT_ROWS 2
#define QJAX_INT_ROWS 2
#define QJAX_FEW 1
#include "generic.inc"

namespace qjax_cpu {
const Isa* plain() {
  static const Isa isa{"plain", 1, generic_bytes, generic_prepare, generic_run};
  return &isa;
}
}  // namespace qjax_cpu
