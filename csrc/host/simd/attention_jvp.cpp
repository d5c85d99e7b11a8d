#include "attention.h"
#include "kernels.h"
#include "log2.h"

// Attention and its tangent in one pass over the keys, as Lu & Song 2024, "Simplifying, Stabilizing and Scaling
// Continuous-Time Consistency Models", derive it (appendix). The logits S = scale Q K^T have the tangents
// S_t = scale (Q_t K^T + Q K_t^T), and with m, for each query the mean of S_t under the weights P,
//     out_t = P V_t + (P o (S_t - m)) V.
// m is subtracted before the product, not after it: where one key has nearly all the weight, the difference of the two
// would be what rounding left of them. It is the mean over the keys seen so far; as it moves, out_t is corrected.

namespace ditfast::host::DITFAST_ISA {
namespace {

constexpr float kInfinity = __builtin_inff();

// One head, and what of it a task keeps as words. Both products of a tangent are one product over a sum of twice the
// length, for which their operands lie next to each other.
template <class T>
struct Head {
    using W = typename WordsOf<T>::type;

    std::int64_t tokens, dim, inner, stride_v;  // inner: words along d
    float factor;                               // of the logits
    float scale;
    float* k;                   // [key][k, k_t], words along d
    float* query;               // [q_t, q][query], words along d
    float* values;              // of each block of keys [v_t, v][c], words along keys
    float* operands;            // [weight, weight * (logit_t - mean)][query], words along keys
    float *weights, *logits_t;  // [key][query]; where a word is one number, the weights are operands as they are
    float *out, *out_t;         // [c][query]

    Head(const AttentionProblem& p, Scratch& scratch)
        : tokens(p.tokens),
          dim(p.head_dim),
          inner(words(p.head_dim, W::kNumbers)),
          stride_v(padded(p.head_dim)),
          factor(p.scale * kLogit<T>),
          scale(p.scale) {
        const std::int64_t keys = smaller(kKeys, tokens);
        k = scratch.take(2 * tokens * inner);
        query = scratch.take(2 * inner * kPanel);
        values = scratch.take(2 * words(tokens, W::kNumbers) * stride_v);
        operands = scratch.take(2 * words(keys, W::kNumbers) * kPanel);
        weights = W::kNumbers == 1 ? operands : scratch.take(keys * kPanel);
        logits_t = scratch.take(keys * kPanel);
        out = scratch.take(dim * kPanel);
        out_t = scratch.take(dim * kPanel);
    }

    float* values_of(std::int64_t first) const { return values + 2 * first / W::kNumbers * stride_v; }
};

// The softmax of a panel of queries over the keys seen so far.
struct Softmax {
    Vec maximum[kColumns], sum[kColumns];
    Vec mean[kColumns];  // of the logits' tangents, by the weights, to rounding
    Vec rest[kColumns];  // the sum of weight * (tangent - mean), which is what rounding left in it

    Softmax() {
        for (int j = 0; j < kColumns; ++j) {
            maximum[j] = splat(-kInfinity);
            sum[j] = mean[j] = rest[j] = Vec{};
        }
    }
};

// What a block of keys makes of the sums before it: those of weights times correction, once the mean is raised by step.
struct Update {
    Vec correction[kColumns], step[kColumns];
};

template <class T>
void pack_keys(const Head<T>& head, const Rows<T>& k, const Rows<T>& k_t) {
    using W = typename WordsOf<T>::type;
    for (std::int64_t n = 0; n < head.tokens; ++n) {
        float* const row = head.k + n * 2 * head.inner;
        for_each_vector(head.inner, [&](std::int64_t i, auto extent) {
            store(row + i, row_words<W>(k[n], head.dim, i, extent), extent);
            store(row + head.inner + i, row_words<W>(k_t[n], head.dim, i, extent), extent);
        });
    }
}

template <class T>
void pack_values(const Head<T>& head, const Rows<T>& v, const Rows<T>& v_t) {
    using W = typename WordsOf<T>::type;
    for (std::int64_t first = 0; first < head.tokens; first += kKeys) {
        const std::int64_t keys = smaller(kKeys, head.tokens - first);
        float* const to = head.values_of(first);
        pack_columns<W>(Rows<T>{v_t[first], v_t.stride}, keys, head.dim, to, head.stride_v);
        pack_columns<W>(Rows<T>{v[first], v.stride}, keys, head.dim,
                        to + words(keys, W::kNumbers) * head.stride_v, head.stride_v);
    }
}

// Logits, in the place of the weights, with their maxima, and the logits' tangents.
template <class T>
void logits_of(const Head<T>& head, std::int64_t first, std::int64_t keys, Softmax& softmax) {
    using W = typename WordsOf<T>::type;
    const Words k{head.k + first * 2 * head.inner, 2 * head.inner, 1};
    float* const logits = head.weights;
    const float factor = head.factor;
    multiply_rows<W, 6, kColumns>(k, head.query + head.inner * kPanel, kPanel, keys, head.inner,
                                  [&](std::int64_t row, auto& c) {
        for (auto& line : c) {
            for (int j = 0; j < kColumns; ++j) {
                const Vec logit = line[j] * factor;
                softmax.maximum[j] = at_least(logit, softmax.maximum[j]);
                store(logits + row * kPanel + j * kLanes, logit);
            }
            ++row;
        }
    });
    float* const logits_t = head.logits_t;
    const float scale = head.scale;
    multiply_rows<W, 6, kColumns>(k, head.query, kPanel, keys, 2 * head.inner, [&](std::int64_t row, auto& c) {
        for (auto& line : c) {
            for (int j = 0; j < kColumns; ++j) store(logits_t + row * kPanel + j * kLanes, line[j] * scale);
            ++row;
        }
    });
}

// Weights exp(logit - maximum) in the place of the logits. Returns the sum of weight * (tangent - mean).
template <class T>
Vec weights_of(float* logit, const float* logit_t, std::int64_t keys, Vec maximum, Vec mean, Vec& sum) {
    using W = typename WordsOf<T>::type;
    // where every logit is -inf, subtracting it would give inf - inf
    const Vec origin = (maximum == -kInfinity) ? Vec{} : maximum;
    Vec moment{};
    const auto weight = [&](std::int64_t key) {
        const Vec w = weight_of<T>(load(logit + key * kPanel) - origin);
        store(logit + key * kPanel, w);
        moment += w * (load(logit_t + key * kPanel) - mean);
        return w;
    };
    for (std::int64_t key = 0; key < keys; key += W::kNumbers) {
        const Vec first = weight(key);
        const Vec second = W::kNumbers == 2 && key + 1 < keys ? weight(key + 1) : Vec{};
        sum += W::kNumbers == 2 ? first + second : first;
    }
    return moment;
}

// The operands of the second products. Returns the sum of weight * (tangent - mean).
template <class T>
Vec operands_of(const float* weight, const float* logit_t, std::int64_t keys, Vec mean, float* to) {
    using W = typename WordsOf<T>::type;
    const std::int64_t second_half = words(keys, W::kNumbers) * kPanel;
    Vec rest{};
    const auto times_tangent = [&](std::int64_t key, Vec w) {
        const Vec product = w * (load(logit_t + key * kPanel) - mean);
        rest += product;
        return product;
    };
    for (std::int64_t key = 0; key < keys; key += W::kNumbers, to += kPanel) {
        const bool has_second = W::kNumbers == 2 && key + 1 < keys;
        const Vec first = load(weight + key * kPanel);
        const Vec second = has_second ? load(weight + (key + 1) * kPanel) : Vec{};
        if (W::kNumbers == 2) store(to, W::join(first, second));
        store(to + second_half,
              W::join(times_tangent(key, first), has_second ? times_tangent(key + 1, second) : Vec{}));
    }
    return rest;
}

template <class T>
Update soften(const Head<T>& head, std::int64_t keys, const Softmax& before, Softmax& softmax) {
    Update update;
    for (int j = 0; j < kColumns; ++j) {
        const Vec shift = before.maximum[j] - softmax.maximum[j];
        const Vec correction = weight_of<T>(before.maximum[j] == -kInfinity ? before.maximum[j] : shift);
        float* const weight = head.weights + j * kLanes;
        const float* const logit_t = head.logits_t + j * kLanes;
        const Vec sum_before = before.sum[j] * correction;
        Vec sum = sum_before;
        const Vec moment = weights_of<T>(weight, logit_t, keys, softmax.maximum[j], before.mean[j], sum);
        const Vec step = sum > 0.0f ? moment / sum : Vec{};
        const Vec mean = before.mean[j] + step;
        const Vec rest = operands_of<T>(weight, logit_t, keys, mean, head.operands + j * kLanes);
        softmax.sum[j] = sum;
        softmax.mean[j] = mean;
        softmax.rest[j] = before.rest[j] * correction - step * sum_before + rest;
        update.correction[j] = correction;
        update.step[j] = step;
    }
    return update;
}

// out_t, then out, of which out_t needs what was there before.
template <class T>
void accumulate(const Head<T>& head, std::int64_t first, std::int64_t keys, const Update& update) {
    using W = typename WordsOf<T>::type;
    const std::int64_t inner = words(keys, W::kNumbers);
    const Words v_t{head.values_of(first), 1, head.stride_v}, v{v_t.data + inner * head.stride_v, 1, head.stride_v};
    multiply_rows<W, 6, kColumns>(v_t, head.operands, kPanel, head.dim, 2 * inner, [&](std::int64_t row, auto& c) {
        for (auto& line : c) {
            for (int j = 0; j < kColumns; ++j) {
                const std::int64_t at = row * kPanel + j * kLanes;
                if (first > 0) {
                    const Vec moved = load(head.out_t + at) - update.step[j] * load(head.out + at);
                    line[j] = moved * update.correction[j] + line[j];
                }
                store(head.out_t + at, line[j]);
            }
            ++row;
        }
    });
    multiply_rows<W, 6, kColumns>(v, head.operands, kPanel, head.dim, inner, [&](std::int64_t row, auto& c) {
        for (auto& line : c) {
            for (int j = 0; j < kColumns; ++j) {
                float* to = head.out + row * kPanel + j * kLanes;
                store(to, first == 0 ? line[j] : load(to) * update.correction[j] + line[j]);
            }
            ++row;
        }
    });
}

template <class T>
void store_results(const Head<T>& head, const AttentionJvp& call, const Softmax& softmax, std::int64_t panel,
                   std::int64_t b, std::int64_t h) {
    const AttentionProblem& p = call.forward.problem;
    Vec inverse[kColumns];
    float lse[kPanel];
    for (int j = 0; j < kColumns; ++j) {
        inverse[j] = 1.0f / softmax.sum[j];
        store(lse + j * kLanes, (softmax.maximum[j] + log2(softmax.sum[j]) / kExponent<T>) / kLogit<T>);
        const Vec rest = softmax.rest[j] * inverse[j];
        for (std::int64_t at = j * kLanes; at < head.dim * kPanel; at += kPanel) {
            store(head.out_t + at, load(head.out_t + at) - rest * load(head.out + at));
        }
    }
    const std::int64_t queries = smaller(kPanel, head.tokens - panel), stride = p.heads * p.head_dim;
    std::memcpy(call.forward.lse + (b * p.heads + h) * p.tokens + panel, lse, static_cast<std::size_t>(queries) * 4);
    const auto write = [&](const float* from, void* to) {
        T* rows = static_cast<T*>(to) + (b * p.tokens * p.heads + h) * p.head_dim;
        store_panel(from, inverse, rows, stride, panel, p.tokens, p.head_dim, nullptr);
    };
    write(head.out, call.forward.out);
    write(head.out_t, call.out_t);
}

template <class T>
void jvp_head(const AttentionJvp& call, std::int64_t b, std::int64_t h, float* memory) {
    using W = typename WordsOf<T>::type;
    const AttentionProblem& p = call.forward.problem;
    AttentionProblem of_tangent = p;
    of_tangent.stride_b = call.qkv_t_stride_b;
    of_tangent.stride_n = call.qkv_t_stride_n;
    const auto primal = [&](int part) { return head_of<T>(p, call.forward.qkv, part, b, h); };
    const auto tangent = [&](int part) { return head_of<T>(of_tangent, call.qkv_t, part, b, h); };
    Scratch scratch(memory);
    const Head<T> head(p, scratch);
    pack_keys(head, primal(1), tangent(1));
    pack_values(head, primal(2), tangent(2));
    for (std::int64_t panel = 0; panel < p.tokens; panel += kPanel) {
        pack_panel<W>(tangent(0), panel, p.tokens, p.head_dim, head.query);
        pack_panel<W>(primal(0), panel, p.tokens, p.head_dim, head.query + head.inner * kPanel);
        Softmax softmax;
        for (std::int64_t first = 0; first < p.tokens; first += kKeys) {
            const std::int64_t keys = smaller(kKeys, p.tokens - first);
            const Softmax before = softmax;
            logits_of(head, first, keys, softmax);
            accumulate(head, first, keys, soften(head, keys, before, softmax));
        }
        store_results(head, call, softmax, panel, b, h);
    }
}

template <class T>
void jvp(const AttentionJvp& call, int threads) {
    Scratch measure(nullptr);
    const Head<T> sizes(call.forward.problem, measure);
    for_each_head(call.forward.problem, threads, measure.used(), [&](std::int64_t b, std::int64_t h, float* memory) {
        jvp_head<T>(call, b, h, memory);
    });
}

}  // namespace

void attention_jvp(const AttentionJvp& call, int threads) {
    with_type(call.forward.problem.dtype, [&](auto zero) { jvp<decltype(zero)>(call, threads); });
}

}  // namespace ditfast::host::DITFAST_ISA
