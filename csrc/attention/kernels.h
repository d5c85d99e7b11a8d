#pragma once

// Addresses of the compiled kernels, one in each file of instances/.

namespace ditfast {

template <class T, int D>
const void* forward_kernel();

template <class T, int D>
const void* backward_kernel();

}  // namespace ditfast
