#pragma once

#include <cstdint>

namespace ditfast {

enum class DType { kFloat32, kBFloat16, kFloat16 };

// B, N, H, d, and the packed input qkv (B, N, 3, H, d). Its last three dimensions are contiguous; the other
// two have any stride, in elements.
struct AttentionProblem {
    DType dtype;
    std::int64_t batch;
    std::int64_t tokens;
    std::int64_t heads;
    std::int64_t head_dim;
    std::int64_t stride_b;
    std::int64_t stride_n;
    float scale;

    bool empty() const { return batch == 0 || tokens == 0 || heads == 0; }
};

struct AttentionForward {
    AttentionProblem problem;
    const void* qkv;  // (B, N, 3, H, d)
    void* out;        // (B, N, H, d), contiguous
    // (B, H, N), contiguous: log of the sum over keys of exp(scale * q.k). The host's is (B, 2 * H, N), in two parts:
    // see store_lse.
    float* lse;
};

struct AttentionJvp {
    AttentionForward forward;
    const void* qkv_t;  // the tangent of qkv, with its own strides
    void* out_t;        // (B, N, H, d), contiguous: the tangent of out
    std::int64_t qkv_t_stride_b;
    std::int64_t qkv_t_stride_n;
};

struct AttentionBackward {
    AttentionProblem problem;
    const void* dout;  // (B, N, H * d), any strides, zero for an expanded gradient
    const void* qkv;   // (B, N, 3, H, d)
    const void* out;   // (B, N, H, d), contiguous
    const float* lse;  // of forward
    void* dqkv;        // (B, N, 3, H, d), contiguous
    // (rows, 3, H, d), contiguous, or null: rows that add up to the gradient of a bias on qkv, i.e. dqkv
    // summed over B and N. The host writes one per sample, a GPU more (plan.h).
    float* dbias;
    std::int64_t dout_stride_b;
    std::int64_t dout_stride_n;
    std::int64_t dout_stride_c;
};

}  // namespace ditfast
