#pragma once

#include "exp2.h"
#include "pack.h"
#include "parallel.h"

// Shared by attention's kernels. Logits are transposed: a row is a key, a lane a query. So the softmax runs down the
// rows without crossing lanes, and rows of K and V are broadcast from where they are.

namespace ditfast::host::DITFAST_ISA {

constexpr float kLog2E = 1.4426950408889634f;
constexpr std::int64_t kKeys = 256;  // per block

// Words summed in one register, over keys or queries. For 16-bit types, a sum over a whole block loses less than
// rounding the result.
template <class T>
constexpr std::int64_t kPiece = sizeof(T) == sizeof(float) ? 128 : 256;
constexpr std::int64_t kFewKeys = 16;

// The same over d, where a second piece is expensive, except for few keys; plain PyTorch sums most exactly there.
template <class T>
inline std::int64_t piece_of_row(std::int64_t tokens) {
    if (sizeof(T) != sizeof(float)) return 256;
    return tokens <= kFewKeys ? 16 : 96;
}

// The unit of logits: base 2, which saves a step before the exponential. In float32 base e: a factor of log2(e) would
// round two large logits before they are subtracted.
template <class T>
constexpr float kLogit = sizeof(T) == sizeof(float) ? 1.0f : kLog2E;

// From a difference of logits to the argument of exp2.
template <class T>
constexpr float kExponent = kLog2E / kLogit<T>;

// The weight of a key, from its logit minus one that is at least as large.
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

// Hands out a task's scratch piece by piece.
class Scratch {
  public:
    explicit Scratch(float* memory) : memory_(memory) {}

    float* take(std::int64_t floats) {
        float* const taken = memory_ ? memory_ + used_ : nullptr;  // null: only measures
        used_ += padded(floats);
        return taken;
    }

    std::int64_t used() const { return used_; }

  private:
    float* memory_;
    std::int64_t used_ = 0;
};

// For a panel: to = before(offset, column) + a b; `before` is called for each vector, with its offset in the panel.
template <class W, class Before>
inline void multiply_panel(std::int64_t piece, Words a, const float* b, std::int64_t rows, std::int64_t inner,
                           float* to, const Before& before) {
    const auto finish = [&](std::int64_t row, auto& c, std::int64_t first_word) {
#pragma GCC unroll 6
        for (auto& line : c) {
            for (int j = 0; j < kColumns; ++j) {
                const std::int64_t at = row * kPanel + j * kLanes;
                store(to + at, (first_word == 0 ? before(at, j) : load(to + at)) + line[j]);
            }
            ++row;
        }
    };
    multiply_in_pieces<W, 6, kColumns>(piece, a, b, kPanel, rows, inner, finish);
}

// logits[key][query] of some keys and a panel of queries; updates the maxima.
template <class T>
inline void logits_of(std::int64_t piece, Words k, const float* query, std::int64_t keys, std::int64_t dim,
                      float factor, float* logits, Vec (&maximum)[kColumns]) {
    using W = typename WordsOf<T>::type;
    const std::int64_t inner = words(dim, W::kNumbers);
    const auto finish = [&](std::int64_t row, auto& c, std::int64_t first_word) {
        const bool is_whole = first_word + piece >= inner;
#pragma GCC unroll 6
        for (auto& line : c) {
            for (int j = 0; j < kColumns; ++j) {
                float* to = logits + row * kPanel + j * kLanes;
                Vec logit = first_word == 0 ? line[j] : load(to) + line[j];
                if (is_whole) {
                    logit *= factor;
                    maximum[j] = at_least(logit, maximum[j]);
                }
                store(to, logit);
            }
            ++row;
        }
    };
    multiply_in_pieces<W, 6, kColumns>(piece, k, query, kPanel, keys, inner, finish);
}

// out[c][query] = out * correction + values^T weights; the first block of keys overwrites out.
template <class T>
inline void add_values(Words values, const float* weights, std::int64_t keys, std::int64_t dim, bool is_first,
                       const Vec (&correction)[kColumns], float* out) {
    using W = typename WordsOf<T>::type;
    multiply_panel<W>(kPiece<T>, values, weights, dim, words(keys, W::kNumbers), out,
                      [&](std::int64_t at, int j) { return is_first ? Vec{} : load(out + at) * correction[j]; });
}

// Stores the log-sum-exp of a panel of queries in two parts: the largest logits and, H rows further on, 1 / the sums of
// exp(logit - largest). In one part, rounded, it would move all weights of a query alike when backward makes them
// again.
inline void store_lse(const AttentionForward& call, std::int64_t panel, std::int64_t b, std::int64_t h,
                      const Vec (&maximum)[kColumns], const Vec (&inverse)[kColumns]) {
    const AttentionProblem& p = call.problem;
    float* const to = call.lse + (b * 2 * p.heads + h) * p.tokens + panel;
    const auto bytes = static_cast<std::size_t>(smaller(kPanel, p.tokens - panel)) * sizeof(float);
    std::memcpy(to, maximum, bytes);
    std::memcpy(to + p.heads * p.tokens, inverse, bytes);
}

template <class F>
inline void for_each_head(const AttentionProblem& p, int threads, std::int64_t scratch_floats, const F& body) {
    if (p.batch == 0 || p.tokens == 0 || p.heads == 0) return;
    parallel(p.batch * p.heads, threads, scratch_floats,
             [&](std::int64_t task, float* memory) { body(task / p.heads, task % p.heads, memory); });
}

}  // namespace ditfast::host::DITFAST_ISA
