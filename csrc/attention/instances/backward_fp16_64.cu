#include "../backward.cuh"
#include "../kernels.h"

template <>
const void* ditfast::backward_kernel<ditfast::Float16, 64>() {
    return reinterpret_cast<const void*>(attention_backward<Float16, 64>);
}
