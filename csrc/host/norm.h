#pragma once

#include <cstdint>
#include <vector>

#include "../attention/params.h"

namespace ditfast::host {

// A tensor without gaps, or a part of one.
struct Span {
    const void* data;
    std::int64_t elements;
};

// The L2 norm of all of them together, in float64: the same bits for any number of threads and instruction set.
double norm(DType dtype, const std::vector<Span>& tensors, int threads);

}  // namespace ditfast::host
