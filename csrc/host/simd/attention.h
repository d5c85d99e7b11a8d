#pragma once

#include "exp2.h"
#include "pack.h"
#include "parallel.h"

// What forward and backward of attention share. Logits are transposed: a row is a key, a lane a query. So the softmax
// runs down the rows without a step across lanes, and rows of K and V are broadcast from where they lie.

namespace ditfast::host::DITFAST_ISA {

constexpr float kLog2E = 1.4426950408889634f;
constexpr std::int64_t kKeys = 256;  // of a block

// In what logits are counted: powers of two, which saves a step before the exponential. In float32 powers of e, so
// that the difference of two large logits is taken before anything is rounded but they.
template <class T>
constexpr float kLogit = sizeof(T) == sizeof(float) ? 1.0f : kLog2E;

// exp2 takes a difference of logits times this.
template <class T>
constexpr float kExponent = kLog2E / kLogit<T>;

// The weight of a key, from the difference of two logits, the larger of them behind it.
template <class T>
inline Vec weight_of(Vec difference) {
    return exp2<T>(at_least(difference * kExponent<T>, splat(kZeroExponent)));
}

// A head of packed (B, N, 3, H, d); part: 0 for q, 1 for k, 2 for v.
template <class T>
inline Rows<T> head_of(const AttentionProblem& p, const void* qkv, int part, std::int64_t b, std::int64_t h) {
    const T* data = static_cast<const T*>(qkv);
    return {data + b * p.stride_b + (part * p.heads + h) * p.head_dim, p.stride_n};
}

// A walk through a task's scratch.
class Scratch {
  public:
    explicit Scratch(float* memory) : memory_(memory) {}

    float* take(std::int64_t floats) {
        float* const taken = memory_ ? memory_ + used_ : nullptr;  // null: to measure alone
        used_ += padded(floats);
        return taken;
    }

    std::int64_t used() const { return used_; }

  private:
    float* memory_;
    std::int64_t used_ = 0;
};

template <class F>
inline void for_each_head(const AttentionProblem& p, int threads, std::int64_t scratch_floats, const F& body) {
    if (p.batch == 0 || p.tokens == 0 || p.heads == 0) return;
    parallel(p.batch * p.heads, threads, scratch_floats, [&](std::int64_t task, float* memory) {
        body(task / p.heads, task % p.heads, memory);
    });
}

}  // namespace ditfast::host::DITFAST_ISA
