#pragma once

#include <cstdint>

#include "../attention/params.h"

// Arguments of the CPU kernels. Every instruction set compiles this header, so it contains no code.

namespace ditfast::host {

// (B, N, D) with D contiguous; strides in elements. Null if the call has no such tensor.
struct Tokens {
    void* data;
    std::int64_t stride_b;
    std::int64_t stride_n;
};

// (B, D) with D contiguous, or (D,) with stride_b = 0. Null if the call has no such tensor.
struct Vectors {
    void* data;
    DType dtype;
    std::int64_t stride_b;
};

struct RowsProblem {
    DType stream;  // dtype of the residual stream
    DType branch;  // dtype of what a Linear reads or writes
    std::int64_t batch;
    std::int64_t tokens;
    std::int64_t dim;
};

// x_new = x + gate * (y + bias) if y is given; h = LN(x_new) * (1 + scale) + shift if h is given.
struct RowsForward {
    RowsProblem problem;
    float eps;
    Tokens x, y;
    Vectors gate, bias, shift, scale;
    Tokens x_new, h;
    float* mean;  // (B, N), of x_new
    float* rstd;
};

// The same, plus the tangents of the outputs. A null input tangent counts as zero.
struct RowsJvp {
    RowsForward forward;
    Tokens x_t, y_t;
    Vectors gate_t, bias_t, shift_t, scale_t;
    Tokens x_new_t, h_t;
};

// The gradients: of the norm if dh is given, of the residual if y is given.
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
    const void* pre;  // (rows, width); every tensor here is contiguous
    void* act;        // backward: null unless wanted
    void* dact;       // backward: overwritten with the gradient of pre
    void* dbias;      // (width,): its sum over rows
};

struct GeluJvp {
    DType dtype;
    std::int64_t elements;
    const void* pre;  // every tensor here is contiguous
    const void* pre_t;
    void* act;
    void* act_t;
};

// One of the strides is 1.
struct Matrix {
    const float* data;
    std::int64_t stride_row;
    std::int64_t stride_inner;  // along what a product sums over
};

// c = a b^T + bias, and act is GELU of that; one of them may be null. None of the sizes is zero.
struct Gemm {
    std::int64_t rows, columns, inner;
    Matrix a;           // (rows, inner)
    Matrix b;           // (columns, inner)
    const float* bias;  // (columns,) or null
    float* c;           // (rows, columns), contiguous
    float* act;
};

}  // namespace ditfast::host
