#include "../isa.h"
#include "kernels.h"

namespace ditfast::host::DITFAST_ISA {

extern const Kernels kernel_table;  // without this, the const would have internal linkage
const Kernels kernel_table = {
    attention_forward, attention_backward, attention_jvp, gelu_forward,   gelu_backward, gelu_jvp, gemm,
    rows_forward,      rows_backward,      rows_jvp,      sum_of_squares,
};

}  // namespace ditfast::host::DITFAST_ISA
