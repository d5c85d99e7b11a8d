#pragma once

#include "attention.h"
#include "kernels.h"

// What attention's backward computes per key and query: the weights again, and the gradient of the logits.

namespace ditfast::host::DITFAST_ISA {

constexpr std::int64_t kQueries = 256;  // per block
static_assert(kQueries % kPanel == 0, "a block is made of whole panels");

// One head, and a task's scratch for it: words as the five products read them, and gradients in float32.
template <class T>
struct BackwardHead {
    using W = typename WordsOf<T>::type;

    std::int64_t tokens, dim, stride;  // stride: between rows of d
    float scale;
    Words k, v;
    float *copied_k, *copied_v, *q_columns, *k_columns, *dout_columns;
    float *maximum, *inverse, *delta;               // per query, padded to whole panels
    float *q_panels, *dout_panels;                  // [panel][d][query]
    float *weights, *dlogits, *dlogits_along_keys;  // [key][query] of a block; words along queries, along keys
    float* dweights;                                // [key][query] of a panel, in the memory of dlogits_along_keys
    float *dq, *dk, *dv, *dout_rows;                // dq: [panel][c][query]
    float *dq_sums, *dout_sums;

    BackwardHead(const AttentionProblem& p, Scratch& scratch)
        : tokens(p.tokens), dim(p.head_dim), stride(padded(p.head_dim)), scale(p.scale), k{}, v{} {
        const std::int64_t keys = smaller(kKeys, tokens), in_panels = (tokens + kPanel - 1) / kPanel * kPanel;
        const std::int64_t columns = words(tokens, W::kNumbers) * stride;
        for (float** part : parts(copied_k, copied_v).all) *part = scratch.take(left_words_size(tokens, dim));
        for (float** part : parts(q_columns, k_columns, dout_columns).all) *part = scratch.take(columns);
        for (float** part : parts(maximum, inverse, delta).all) *part = scratch.take(in_panels);
        for (float** part : parts(q_panels, dout_panels).all) *part = scratch.take(words(dim, W::kNumbers) * in_panels);
        for (float** part : parts(weights, dlogits).all) *part = scratch.take(keys * kQueries / W::kNumbers);
        dlogits_along_keys = dweights = scratch.take(keys * kPanel);
        dq = scratch.take(in_panels * dim);
        for (float** part : parts(dk, dv).all) *part = scratch.take(keys * stride);
        dout_rows = scratch.take(tokens * dim);
        for (float** part : parts(dq_sums, dout_sums).all) *part = scratch.take(stride);
    }

  private:
    template <class... P>
    struct Parts {
        float** all[sizeof...(P)];
    };
    template <class... P>
    static Parts<P...> parts(P&... each) {
        return {{&each...}};
    }
};

// Zeroes the lanes of a panel past the last query, which must not reach the sums over queries.
struct Valid {
    Bits lanes[kColumns];

    explicit Valid(std::int64_t queries) {
        for (std::int64_t i = 0; i < kPanel; ++i) {
            lanes[i / kLanes][i % kLanes] = i < queries ? ~0u : 0u;
        }
    }

    Vec operator()(int j, Vec x) const { return vec_of(bits_of(x) & lanes[j]); }
};

// c = a b for a panel of queries, summed over d exactly as in forward, whose maxima are of these logits.
template <class T, int kRows>
inline void multiply_along_d(std::int64_t piece, Words a, const float* b, std::int64_t inner,
                             Vec (&c)[kRows][kColumns]) {
    using W = typename WordsOf<T>::type;
    multiply<W>(a, b, kPanel, smaller(inner, piece), c);
    for (std::int64_t first = piece; first < inner; first += piece) {
        Vec part[kRows][kColumns];
        multiply<W>({a.data + first, a.stride_row, 1}, b + first * kPanel, kPanel, smaller(inner - first, piece), part);
        for (int i = 0; i < kRows; ++i) {
            for (int j = 0; j < kColumns; ++j) c[i][j] += part[i][j];
        }
    }
}

// delta comes from dout and out. Where one key has nearly all the weight, its dweight less delta is what rounding left
// of two sums in different orders, and too large by far. So delta is corrected to the mean of these very dweights, if
// all keys are at hand, which takes another pass over them; for 16-bit types, rounding hides it but with few keys.
template <class T>
inline bool corrects_delta(const BackwardHead<T>& head) {
    return head.tokens <= (sizeof(T) == sizeof(float) ? kKeys : kFewKeys);
}

// Weights and dlogits of some keys and the panel of queries that starts at `column` of the block. If delta is yet to be
// corrected: in the place of dlogits dweights less delta, whose weighted mean is added to `mean`.
template <int kRows, class T>
void weights_and_dlogits(const BackwardHead<T>& head, const Valid& valid, std::int64_t first, std::int64_t key,
                         std::int64_t panel, std::int64_t column, Vec (&mean)[kColumns]) {
    using W = typename WordsOf<T>::type;
    const std::int64_t inner = words(head.dim, W::kNumbers), row_words = kQueries / W::kNumbers;
    const std::int64_t piece = piece_of_row<T>(head.tokens);
    const auto rows_of = [&](const Words& words) {
        return Words{words.data + (first + key) * words.stride_row, words.stride_row, 1};
    };
    Vec weight[kRows][kColumns], c[kRows][kColumns];
    multiply_along_d<T>(piece, rows_of(head.k), head.q_panels + panel * inner, inner, c);
    const float factor = head.scale * kLogit<T>;
    for (int j = 0; j < kColumns; ++j) {
        const Vec maximum = load(head.maximum + panel + j * kLanes), inverse = load(head.inverse + panel + j * kLanes);
        for (int i = 0; i < kRows; ++i) {
            const Vec logit = uncontracted(c[i][j] * factor);
            weight[i][j] = valid(j, weight_of<T>(logit - maximum) * inverse);
            W::store_numbers(head.weights + (key + i) * row_words, column + j * kLanes, weight[i][j]);
        }
    }
    multiply_along_d<T>(piece, rows_of(head.v), head.dout_panels + panel * inner, inner, c);
    const bool is_corrected = corrects_delta(head);
    for (int j = 0; j < kColumns; ++j) {
        const Vec delta = load(head.delta + panel + j * kLanes);
        for (int i = 0; i < kRows; ++i) {
            c[i][j] -= delta;
            if (is_corrected) {
                mean[j] += weight[i][j] * c[i][j];
                store(head.dweights + (key + i) * kPanel + j * kLanes, c[i][j]);
            } else {
                c[i][j] = valid(j, weight[i][j] * head.scale * c[i][j]);
                W::store_numbers(head.dlogits + (key + i) * row_words, column + j * kLanes, c[i][j]);
            }
        }
        for (int i = 0; i < kRows && !is_corrected; i += W::kNumbers) {
            const Vec second = W::kNumbers == 2 && i + 1 < kRows ? c[i + 1 < kRows ? i + 1 : i][j] : Vec{};
            store(head.dlogits_along_keys + (key + i) / W::kNumbers * kPanel + j * kLanes, W::join(c[i][j], second));
        }
    }
}

// dlogits of all keys from their dweights less delta, less the mean of these.
template <class T>
void correct_dlogits(const BackwardHead<T>& head, const Valid& valid, std::int64_t column,
                     const Vec (&mean)[kColumns]) {
    using W = typename WordsOf<T>::type;
    const std::int64_t row_words = kQueries / W::kNumbers;
    const auto dlogit = [&](std::int64_t key, int j) {
        if (key == head.tokens) return Vec{};
        const std::int64_t row = key * row_words, at = column + j * kLanes;
        const Vec weight = W::load_numbers(head.weights + row, at);
        const Vec rest = load(head.dweights + key * kPanel + j * kLanes) - mean[j];
        const Vec result = valid(j, weight * head.scale * rest);
        W::store_numbers(head.dlogits + row, at, result);
        return result;
    };
    for (std::int64_t key = 0; key < head.tokens; key += W::kNumbers) {
        for (int j = 0; j < kColumns; ++j) {
            const Vec first = dlogit(key, j), second = W::kNumbers == 2 ? dlogit(key + 1, j) : Vec{};
            store(head.dlogits_along_keys + key / W::kNumbers * kPanel + j * kLanes, W::join(first, second));
        }
    }
}

}  // namespace ditfast::host::DITFAST_ISA
