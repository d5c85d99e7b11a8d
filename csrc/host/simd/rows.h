#pragma once

#include "parallel.h"

// Shared by the row kernels: the address of a row, and the vectors of its sample.

namespace ditfast::host::DITFAST_ISA {

template <class T>
inline T* row_of(const Tokens& t, std::int64_t b, std::int64_t n) {
    return static_cast<T*>(t.data) + b * t.stride_b + n * t.stride_n;
}

inline std::int64_t size_of(DType dtype) { return dtype == DType::kFloat32 ? 4 : 2; }

inline char* row_of(const Vectors& v, std::int64_t b) {
    return v.data ? static_cast<char*>(v.data) + b * v.stride_b * size_of(v.dtype) : nullptr;
}

// The vector of sample b in float32, zeros if there is none.
inline void widen_sample(const Vectors& v, std::int64_t b, std::int64_t dim, float* to) {
    widen_row(row_of(v, b), v.dtype, dim, to);
}

// Calls f(T{}, U{}) with the element types of stream and branch.
template <class F>
inline void with_types(const RowsProblem& p, const F& f) {
    with_type(p.stream, [&](auto stream) { with_type(p.branch, [&](auto branch) { f(stream, branch); }); });
}

}  // namespace ditfast::host::DITFAST_ISA
