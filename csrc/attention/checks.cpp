#include "checks.h"

#include <cmath>
#include <limits>
#include <stdexcept>

namespace ditfast {
namespace {

constexpr std::int64_t kMaxHeadDim = 256;

[[noreturn]] void fail(const std::string& name, const std::string& rule, const std::string& value) {
    throw std::invalid_argument("attention: " + name + " must be " + rule + ", got " + value);
}

void check_at_least(const char* name, std::int64_t value, std::int64_t minimum) {
    if (value < minimum) fail(name, "at least " + std::to_string(minimum), std::to_string(value));
}

void check_problem(const AttentionProblem& p) {
    check_at_least("batch", p.batch, 0);
    check_at_least("tokens", p.tokens, 0);
    check_at_least("heads", p.heads, 0);
    if (p.head_dim < 1 || p.head_dim > kMaxHeadDim) {
        fail("head_dim", "in 1.." + std::to_string(kMaxHeadDim), std::to_string(p.head_dim));
    }
    check_at_least("stride_b", p.stride_b, 0);
    check_at_least("stride_n", p.stride_n, 0);
    if (!std::isfinite(p.scale)) fail("scale", "finite", std::to_string(p.scale));
}

// torch gives an empty tensor a null pointer.
void check_pointer(const char* name, const void* pointer, const AttentionProblem& p) {
    if (pointer == nullptr && !p.empty()) fail(name, "a pointer to a non-empty tensor", "null");
}

// The CUDA kernels copy 16 bytes at a time.
constexpr std::uintptr_t kAlignment = 16;
constexpr std::int64_t kElementsPerCopy = 8;

void check_aligned(const char* name, const void* pointer, std::uintptr_t alignment = kAlignment) {
    const auto address = reinterpret_cast<std::uintptr_t>(pointer);
    if (address % alignment == 0) return;
    fail(name, std::to_string(alignment) + "-byte aligned", std::to_string(address));
}

void check_aligned_stride(const char* name, std::int64_t stride) {
    if (stride % kElementsPerCopy != 0) fail(name, "a multiple of 8 (16 bytes)", std::to_string(stride));
}

// The kernels count tokens, blocks and the elements of a row in 32 bits.
void check_fits_int(const char* name, std::int64_t value) {
    constexpr std::int64_t kMost = std::numeric_limits<int>::max() / 2;
    if (value > kMost) fail(name, "at most " + std::to_string(kMost), std::to_string(value));
}

void check_cuda_problem(const AttentionProblem& p) {
    if (p.dtype == DType::kFloat32) fail("dtype", "bfloat16 or float16", "'float32'");
    if (p.head_dim != 64 && p.head_dim != 72) fail("head_dim", "64 or 72", std::to_string(p.head_dim));
    if (!(p.scale > 0)) fail("scale", "above 0", std::to_string(p.scale));
    check_aligned_stride("stride_b", p.stride_b);
    check_aligned_stride("stride_n", p.stride_n);
    check_fits_int("stride_n", p.stride_n);
    check_fits_int("tokens", p.tokens);
    check_fits_int("batch", p.batch);
    check_fits_int("heads", p.heads);
    check_fits_int("3 * heads * head_dim", 3 * p.heads * p.head_dim);
    check_fits_int("batch * heads", p.batch * p.heads);
    const std::int64_t groups = p.tokens / 64 + 1;  // more than either kernel uses per head
    if (p.batch * p.heads > std::numeric_limits<int>::max() / 2 / groups) {
        fail("batch * heads * tokens", "less than 2^36",
             std::to_string(p.batch * p.heads) + " * " + std::to_string(p.tokens));
    }
}

}  // namespace

DType parse_dtype(const std::string& name) {
    if (name == "float32") return DType::kFloat32;
    if (name == "bfloat16") return DType::kBFloat16;
    if (name == "float16") return DType::kFloat16;
    fail("dtype", "float32, bfloat16 or float16", "'" + name + "'");
}

void check(const AttentionForward& call) {
    check_problem(call.problem);
    check_pointer("qkv", call.qkv, call.problem);
    check_pointer("out", call.out, call.problem);
    check_pointer("lse", call.lse, call.problem);
}

void check(const AttentionJvp& call) {
    check(call.forward);
    check_at_least("qkv_t_stride_b", call.qkv_t_stride_b, 0);
    check_at_least("qkv_t_stride_n", call.qkv_t_stride_n, 0);
    check_pointer("qkv_t", call.qkv_t, call.forward.problem);
    check_pointer("out_t", call.out_t, call.forward.problem);
}

void check(const AttentionBackward& call) {
    check_problem(call.problem);
    check_at_least("dout_stride_b", call.dout_stride_b, 0);
    check_at_least("dout_stride_n", call.dout_stride_n, 0);
    check_at_least("dout_stride_c", call.dout_stride_c, 0);
    check_pointer("dout", call.dout, call.problem);
    check_pointer("qkv", call.qkv, call.problem);
    check_pointer("out", call.out, call.problem);
    check_pointer("lse", call.lse, call.problem);
    check_pointer("dqkv", call.dqkv, call.problem);
}

void check_cuda(const AttentionForward& call) {
    check(call);
    check_cuda_problem(call.problem);
    check_aligned("qkv", call.qkv);
    check_aligned("out", call.out);
    check_aligned("lse", call.lse, alignof(float));
}

void check_cuda(const AttentionBackward& call) {
    check(call);
    check_cuda_problem(call.problem);
    check_aligned_stride("dout_stride_b", call.dout_stride_b);
    check_aligned_stride("dout_stride_n", call.dout_stride_n);
    check_fits_int("dout_stride_n", call.dout_stride_n);
    check_aligned("dout", call.dout);
    check_aligned("qkv", call.qkv);
    check_aligned("out", call.out);
    check_aligned("lse", call.lse, alignof(float));
    check_aligned("dqkv", call.dqkv);
    check_aligned("dbias", call.dbias, alignof(float));
}

void check_threads(int threads) { check_at_least("threads", threads, 1); }

}  // namespace ditfast
