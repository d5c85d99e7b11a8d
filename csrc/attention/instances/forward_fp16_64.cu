#include "../forward.cuh"
#include "../kernels.h"

template <>
const void* ditfast::forward_kernel<ditfast::Float16, 64>() {
    return reinterpret_cast<const void*>(attention_forward<Float16, 64>);
}
