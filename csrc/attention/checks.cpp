#include "checks.h"

#include <cmath>
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

void check_threads(int threads) { check_at_least("threads", threads, 1); }

}  // namespace ditfast
