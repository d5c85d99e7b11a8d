#include "host.h"

#include <cmath>
#include <limits>

#include "../parallel_for.h"
#include "tile.h"

namespace ditfast {
namespace {

constexpr std::int64_t kBlock = 64;  // queries, or keys, held in fp32 at once
constexpr float kInfinity = std::numeric_limits<float>::infinity();

enum Part { kQuery, kKey, kValue };

// One head of a packed (B, N, 3, H, d) tensor: (N, d).
template <class T>
Rows<T> packed_head(T* data, const AttentionProblem& p, std::int64_t stride_b, std::int64_t stride_n,
                    Part part, std::int64_t b, std::int64_t h) {
    return {data + b * stride_b + (part * p.heads + h) * p.head_dim, stride_n, 1};
}

// One head of a contiguous (B, N, H, d) tensor: (N, d).
template <class T>
Rows<T> head_of(T* data, const AttentionProblem& p, std::int64_t b, std::int64_t h) {
    const std::int64_t stride_n = p.heads * p.head_dim;
    return {data + b * p.tokens * stride_n + h * p.head_dim, stride_n, 1};
}

// The softmax of one query's row over the keys seen so far.
struct OnlineSoftmax {
    float maximum = -kInfinity;
    float sum = 0.0f;

    // Turns logits into weights relative to the new maximum; returns the factor that brings what
    // was accumulated under the old maximum in line.
    float update(float* row, std::int64_t keys) {
        const float previous = maximum;
        for (std::int64_t j = 0; j < keys; ++j) maximum = std::max(maximum, row[j]);
        // While every logit is -inf, subtracting the maximum would give inf - inf.
        const float origin = maximum == -kInfinity ? 0.0f : maximum;
        const float correction = std::exp(previous - origin);
        sum *= correction;
        for (std::int64_t j = 0; j < keys; ++j) {
            row[j] = std::exp(row[j] - origin);
            sum += row[j];
        }
        return correction;
    }

    float log_sum_exp() const { return maximum + std::log(sum); }
};

void scale_by(float* values, float factor, std::int64_t size) {
    for (std::int64_t i = 0; i < size; ++i) values[i] *= factor;
}

void divide_by(float* values, float divisor, std::int64_t size) {
    for (std::int64_t i = 0; i < size; ++i) values[i] /= divisor;
}

template <class T>
void forward_head(const AttentionForward& call, std::int64_t b, std::int64_t h) {
    const AttentionProblem& p = call.problem;
    const std::int64_t d = p.head_dim;
    const auto input = [&](Part part) {
        return packed_head(static_cast<const T*>(call.qkv), p, p.stride_b, p.stride_n, part, b, h);
    };
    const auto out = head_of(static_cast<T*>(call.out), p, b, h);
    float* lse = call.lse + (b * p.heads + h) * p.tokens;

    Tile q(kBlock, d), k_t(d, kBlock), v(kBlock, d), weights(kBlock, kBlock), acc(kBlock, d);
    for (std::int64_t first = 0; first < p.tokens; first += kBlock) {
        const std::int64_t queries = std::min(kBlock, p.tokens - first);
        std::vector<OnlineSoftmax> softmax(static_cast<std::size_t>(queries));
        load(q, input(kQuery), first, queries, d);
        acc.clear();
        for (std::int64_t first_key = 0; first_key < p.tokens; first_key += kBlock) {
            const std::int64_t keys = std::min(kBlock, p.tokens - first_key);
            load_transposed(k_t, input(kKey), first_key, keys, d);
            load(v, input(kValue), first_key, keys, d);
            weights.clear();
            add_product(weights, q, k_t, queries, d, keys);
            for (std::int64_t i = 0; i < queries; ++i) {
                scale_by(weights[i], p.scale, keys);
                scale_by(acc[i], softmax[i].update(weights[i], keys), d);
            }
            add_product(acc, weights, v, queries, keys, d);
        }
        for (std::int64_t i = 0; i < queries; ++i) {
            divide_by(acc[i], softmax[i].sum, d);
            lse[first + i] = softmax[i].log_sum_exp();
        }
        store(acc, out, first, queries, d);
    }
}

// delta (N,): the inner product of each row of dout and out, which is that of weights and dweights.
template <class T>
std::vector<float> row_dot(const Rows<const T>& dout, const Rows<const T>& out, std::int64_t rows,
                           std::int64_t cols) {
    std::vector<float> delta(static_cast<std::size_t>(rows));
    for (std::int64_t r = 0; r < rows; ++r) {
        for (std::int64_t c = 0; c < cols; ++c) {
            delta[r] += to_float(dout.at(r, c)) * to_float(out.at(r, c));
        }
    }
    return delta;
}

// One row of logits q.k becomes weights, and one row of dweights becomes the gradient of q.k.
void softmax_backward(float* weights, float* dweights, float lse, float delta, float scale,
                      std::int64_t keys) {
    for (std::int64_t j = 0; j < keys; ++j) {
        weights[j] = std::exp(scale * weights[j] - lse);
        dweights[j] = weights[j] * (dweights[j] - delta) * scale;
    }
}

// Of dqkv summed over the tokens of a head. Rows of the weights sum to one and those of dlogits to zero, so
// the sum of dv is that of dout and that of dk is zero.
template <class T>
void store_dbias(float* row, const AttentionProblem& p, const std::vector<Tile>& dq,
                 const Rows<const T>& dout) {
    for (std::int64_t c = 0; c < p.head_dim; ++c) {
        float of_q = 0.0f, of_v = 0.0f;
        for (std::int64_t r = 0; r < p.tokens; ++r) {
            of_q += dq[r / kBlock][r % kBlock][c];
            of_v += to_float(dout.at(r, c));
        }
        const std::int64_t stride = p.heads * p.head_dim;
        row[c] = of_q;
        row[stride + c] = 0.0f;
        row[2 * stride + c] = of_v;
    }
}

template <class T>
void backward_head(const AttentionBackward& call, std::int64_t b, std::int64_t h) {
    const AttentionProblem& p = call.problem;
    const std::int64_t d = p.head_dim;
    const auto input = [&](Part part) {
        return packed_head(static_cast<const T*>(call.qkv), p, p.stride_b, p.stride_n, part, b, h);
    };
    const auto gradient = [&](Part part) {
        const std::int64_t stride_n = 3 * p.heads * d;
        return packed_head(static_cast<T*>(call.dqkv), p, p.tokens * stride_n, stride_n, part, b, h);
    };
    const std::int64_t dout_offset = b * call.dout_stride_b + h * d * call.dout_stride_c;
    const Rows<const T> dout_rows{static_cast<const T*>(call.dout) + dout_offset, call.dout_stride_n,
                                  call.dout_stride_c};
    const float* lse = call.lse + (b * p.heads + h) * p.tokens;
    const std::vector<float> delta =
        row_dot(dout_rows, head_of(static_cast<const T*>(call.out), p, b, h), p.tokens, d);

    Tile q(kBlock, d), dout(kBlock, d), k(kBlock, d), k_t(d, kBlock), v_t(d, kBlock);
    Tile dk(kBlock, d), dv(kBlock, d), weights(kBlock, kBlock), dlogits(kBlock, kBlock);
    std::vector<Tile> dq(static_cast<std::size_t>((p.tokens + kBlock - 1) / kBlock), Tile(kBlock, d));
    for (std::int64_t first_key = 0; first_key < p.tokens; first_key += kBlock) {
        const std::int64_t keys = std::min(kBlock, p.tokens - first_key);
        load(k, input(kKey), first_key, keys, d);
        load_transposed(k_t, input(kKey), first_key, keys, d);
        load_transposed(v_t, input(kValue), first_key, keys, d);
        dk.clear();
        dv.clear();
        for (std::int64_t first = 0; first < p.tokens; first += kBlock) {
            const std::int64_t queries = std::min(kBlock, p.tokens - first);
            load(q, input(kQuery), first, queries, d);
            load(dout, dout_rows, first, queries, d);
            weights.clear();
            add_product(weights, q, k_t, queries, d, keys);
            dlogits.clear();
            add_product(dlogits, dout, v_t, queries, d, keys);
            for (std::int64_t i = 0; i < queries; ++i) {
                softmax_backward(weights[i], dlogits[i], lse[first + i], delta[first + i], p.scale, keys);
            }
            add_transposed_product(dv, weights, dout, keys, queries, d);
            add_transposed_product(dk, dlogits, q, keys, queries, d);
            add_product(dq[first / kBlock], dlogits, k, queries, keys, d);
        }
        store(dk, gradient(kKey), first_key, keys, d);
        store(dv, gradient(kValue), first_key, keys, d);
    }
    for (std::int64_t first = 0; first < p.tokens; first += kBlock) {
        store(dq[first / kBlock], gradient(kQuery), first, std::min(kBlock, p.tokens - first), d);
    }
    if (call.dbias != nullptr) store_dbias(call.dbias + (b * 3 * p.heads + h) * d, p, dq, dout_rows);
}

// Runs body(zero, b, h) for every head; the type of `zero` is that of the elements.
template <class Body>
void for_each_head(const AttentionProblem& p, int threads, const Body& body) {
    if (p.empty()) return;
    parallel_for(p.batch * p.heads, threads, [&](std::int64_t index) {
        const std::int64_t b = index / p.heads;
        const std::int64_t h = index % p.heads;
        switch (p.dtype) {
            case DType::kFloat32:
                return body(float{}, b, h);
            case DType::kBFloat16:
                return body(BFloat16{}, b, h);
            case DType::kFloat16:
                return body(Float16{}, b, h);
        }
    });
}

}  // namespace

void attention_forward_host(const AttentionForward& call, int threads) {
    for_each_head(call.problem, threads, [&](auto zero, std::int64_t b, std::int64_t h) {
        forward_head<decltype(zero)>(call, b, h);
    });
}

void attention_backward_host(const AttentionBackward& call, int threads) {
    for_each_head(call.problem, threads, [&](auto zero, std::int64_t b, std::int64_t h) {
        backward_head<decltype(zero)>(call, b, h);
    });
}

}  // namespace ditfast
