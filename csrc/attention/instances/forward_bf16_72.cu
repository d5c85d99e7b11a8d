#include "../forward.cuh"
#include "../kernels.h"

template <>
const void* ditfast::forward_kernel<ditfast::BFloat16, 72>() {
    return reinterpret_cast<const void*>(attention_forward<BFloat16, 72>);
}
