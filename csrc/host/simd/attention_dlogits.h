#pragma once

#include "attention.h"
#include "kernels.h"

// What attention's backward computes per key and query: the weights again, and the gradient of the logits.

namespace ditfast::host::DITFAST_ISA {

constexpr std::int64_t kQueries = 256;  // per block
static_assert(kQueries % kPanel == 0, "a block is made of whole panels");
constexpr std::int64_t kFewKeys = 16;

// One head, and a task's scratch for it: words as the five products read them, and gradients in float32.
template <class T>
struct BackwardHead {
    using W = typename WordsOf<T>::type;

    std::int64_t tokens, dim, stride;  // stride: between rows of d
    float scale;
    Words k, v;
    float *copied_k, *copied_v, *q_columns, *k_columns, *dout_columns;
    float *lse, *delta;                             // per query, padded to whole panels
    float *q_panels, *dout_panels;                  // [panel][d][query]
    float *weights, *dlogits, *dlogits_along_keys;  // [key][query] of a block; words along queries, along keys
    float *dq, *dk, *dv, *dout_rows;                // dq: [panel][c][query]
    float *dq_sums, *dout_sums;

    BackwardHead(const AttentionProblem& p, Scratch& scratch)
        : tokens(p.tokens), dim(p.head_dim), stride(padded(p.head_dim)), scale(p.scale), k{}, v{} {
        const std::int64_t keys = smaller(kKeys, tokens), in_panels = (tokens + kPanel - 1) / kPanel * kPanel;
        const std::int64_t columns = words(tokens, W::kNumbers) * stride;
        for (float** part : parts(copied_k, copied_v).all) *part = scratch.take(left_words_size(tokens, dim));
        for (float** part : parts(q_columns, k_columns, dout_columns).all) *part = scratch.take(columns);
        for (float** part : parts(lse, delta).all) *part = scratch.take(in_panels);
        for (float** part : parts(q_panels, dout_panels).all) *part = scratch.take(words(dim, W::kNumbers) * in_panels);
        for (float** part : parts(weights, dlogits).all) *part = scratch.take(keys * kQueries / W::kNumbers);
        dlogits_along_keys = scratch.take(words(keys, W::kNumbers) * kPanel);
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

// c = a b for a panel of queries, summed over d exactly as in forward, whose log-sum-exp is made of these logits.
template <class T, int kRows>
inline void multiply_along_d(Words a, const float* b, std::int64_t inner, Vec (&c)[kRows][kColumns]) {
    using W = typename WordsOf<T>::type;
    multiply<W>(a, b, kPanel, smaller(inner, kPieceOfRow<T>), c);
    for (std::int64_t first = kPieceOfRow<T>; first < inner; first += kPieceOfRow<T>) {
        Vec part[kRows][kColumns];
        multiply<W>({a.data + first, a.stride_row, 1}, b + first * kPanel, kPanel,
                    smaller(inner - first, kPieceOfRow<T>), part);
        for (int i = 0; i < kRows; ++i) {
            for (int j = 0; j < kColumns; ++j) c[i][j] += part[i][j];
        }
    }
}

// Whether delta is left to `dlogits_of_few_keys`.
template <class T>
inline bool has_few_keys(const BackwardHead<T>& head) {
    return sizeof(T) == sizeof(float) && head.tokens <= kFewKeys;
}

// Weights and dlogits of some keys and the panel of queries that starts at `column` of the block; of few keys, in the
// place of dlogits, dweights.
template <int kRows, class T>
void weights_and_dlogits(const BackwardHead<T>& head, const Valid& valid, std::int64_t first, std::int64_t key,
                         std::int64_t panel, std::int64_t column) {
    using W = typename WordsOf<T>::type;
    const std::int64_t inner = words(head.dim, W::kNumbers), row_words = kQueries / W::kNumbers;
    const auto rows_of = [&](const Words& words) {
        return Words{words.data + (first + key) * words.stride_row, words.stride_row, 1};
    };
    // a softmax over one key is constant; subtracting delta would only nearly cancel
    const float scale = head.tokens == 1 ? 0.0f : head.scale;
    Vec weight[kRows][kColumns], c[kRows][kColumns];
    multiply_along_d<T>(rows_of(head.k), head.q_panels + panel * inner, inner, c);
    const float factor = head.scale * kLogit<T>;
    for (int j = 0; j < kColumns; ++j) {
        const Vec lse = load(head.lse + panel + j * kLanes);
        for (int i = 0; i < kRows; ++i) {
            const Vec logit = c[i][j] * factor;
            weight[i][j] = valid(j, weight_of<T>((sizeof(T) == sizeof(float) ? uncontracted(logit) : logit) - lse));
            W::store_numbers(head.weights + (key + i) * row_words, column + j * kLanes, weight[i][j]);
        }
    }
    multiply_along_d<T>(rows_of(head.v), head.dout_panels + panel * inner, inner, c);
    const bool is_done = !has_few_keys(head);
    for (int j = 0; j < kColumns; ++j) {
        const Vec delta = load(head.delta + panel + j * kLanes);
        for (int i = 0; i < kRows; ++i) {
            if (is_done) c[i][j] = valid(j, weight[i][j] * scale * (c[i][j] - delta));
            W::store_numbers(head.dlogits + (key + i) * row_words, column + j * kLanes, c[i][j]);
        }
        for (int i = 0; i < kRows; i += W::kNumbers) {
            const Vec second = W::kNumbers == 2 && i + 1 < kRows ? c[i + 1 < kRows ? i + 1 : i][j] : Vec{};
            store(head.dlogits_along_keys + (key + i) / W::kNumbers * kPanel + j * kLanes, W::join(c[i][j], second));
        }
    }
}

// dlogits of all keys in the place of dweights. Of few keys one easily has nearly all the weight, and its dweight less
// delta, from dout and out, would be what rounding left of two sums in different orders. So delta is the mean of these
// very dweights here, and both are taken from the heaviest key's.
template <class T>
void dlogits_of_few_keys(const BackwardHead<T>& head, const Valid& valid, std::int64_t column) {
    for (int j = 0; j < kColumns; ++j) {
        const float* weights = head.weights + column + j * kLanes;
        float *dlogits = head.dlogits + column + j * kLanes, *along_keys = head.dlogits_along_keys + j * kLanes;
        Vec largest = load(weights), origin = load(dlogits);
        for (std::int64_t key = 1; key < head.tokens; ++key) {
            const Vec weight = load(weights + key * kQueries);
            origin = weight > largest ? load(dlogits + key * kQueries) : origin;
            largest = at_least(weight, largest);
        }
        Vec sum{}, moment{};
        for (std::int64_t key = 0; key < head.tokens; ++key) {
            const Vec weight = load(weights + key * kQueries);
            sum += weight;
            moment += weight * (load(dlogits + key * kQueries) - origin);
        }
        const Vec delta = moment / sum;
        for (std::int64_t key = 0; key < head.tokens; ++key) {
            const Vec weight = load(weights + key * kQueries), dweight = load(dlogits + key * kQueries) - origin;
            const Vec dlogit = valid(j, weight * head.scale * (dweight - delta));
            store(dlogits + key * kQueries, dlogit);
            store(along_keys + key * kPanel, dlogit);
        }
    }
}

}  // namespace ditfast::host::DITFAST_ISA
