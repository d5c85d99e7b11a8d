#pragma once

#include <cstdint>

#include "../attention/params.h"

// What is asked of the kernels on the CPU. This header is compiled for every instruction set: it holds no code.

namespace ditfast::host {

// (B, N, D) of which D is dense; strides count elements. Null where the call has no such tensor.
struct Tokens {
    void* data;
    std::int64_t stride_b;
    std::int64_t stride_n;
};

// (B, D) of which D is dense, or (D,) with a stride of zero; null where the call has none.
struct Vectors {
    void* data;
    DType dtype;
    std::int64_t stride_b;
};

struct RowsProblem {
    DType stream;  // dtype of the residual stream
    DType branch;  // of what a Linear writes or reads
    std::int64_t batch;
    std::int64_t tokens;
    std::int64_t dim;
};

// x_new = x + gate * (y + bias), where there is y; h = LN(x_new) * (1 + scale) + shift, where there is h.
struct RowsForward {
    RowsProblem problem;
    float eps;
    Tokens x, y;
    Vectors gate, bias, shift, scale;
    Tokens x_new, h;
    float* mean;  // (B, N), of x_new
    float* rstd;
};

// All that, and the tangents of what it writes. A null tangent of an input is zero.
struct RowsJvp {
    RowsForward forward;
    Tokens x_t, y_t;
    Vectors gate_t, bias_t, shift_t, scale_t;
    Tokens x_new_t, h_t;
};

// The gradients of all that, where there is dh those of the norm, where there is y those of the residual.
struct RowsBackward {
    RowsProblem problem;
    Tokens dx_new, dh, x_new, y;
    Vectors gate, bias, scale;
    const float* mean;
    const float* rstd;
    Tokens dx, dy;
    Vectors dgate, dshift, dscale, dbias;
};

struct Gelu {
    DType dtype;
    std::int64_t rows;
    std::int64_t width;
    const void* pre;  // (rows, width), contiguous, as all of these
    void* act;        // null where a backward is not asked for it
    void* dact;       // backward: becomes the gradient of pre
    void* dbias;      // (width,): the sum of that over the rows
};

struct GeluJvp {
    DType dtype;
    std::int64_t elements;
    const void* pre;  // contiguous, as all of these
    const void* pre_t;
    void* act;
    void* act_t;
};

}  // namespace ditfast::host
