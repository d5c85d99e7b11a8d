#include "attention_dlogits.h"

namespace ditfast::host::DITFAST_ISA {
namespace {

constexpr int kRowsOfFew = kMostColumns == 5 ? 4 : 6;

template <int kCount>
struct Count {
    static constexpr int value = kCount;
};

template <class T>
using Head = BackwardHead<T>;

// The rows of dout of one head; a copy if their elements are not contiguous.
template <class T>
Rows<T> dout_of(const AttentionBackward& call, std::int64_t b, std::int64_t h, float* copy) {
    const AttentionProblem& p = call.problem;
    const T* from = static_cast<const T*>(call.dout) + b * call.dout_stride_b + h * p.head_dim * call.dout_stride_c;
    if (call.dout_stride_c == 1) return {from, call.dout_stride_n};
    T* to = reinterpret_cast<T*>(copy);
    for (std::int64_t n = 0; n < p.tokens; ++n) {
        for (std::int64_t c = 0; c < p.head_dim; ++c) {
            to[n * p.head_dim + c] = from[n * call.dout_stride_n + c * call.dout_stride_c];
        }
    }
    return {to, p.head_dim};
}

// delta: the dot product of each row of dout and out, equal to that of weights and dweights. dout_sums: over rows.
template <class T>
void inner_products(const Head<T>& head, const Rows<T>& dout, const Rows<T>& out) {
    float* const sums = head.dout_sums;
    for (std::int64_t n = 0; n < head.tokens; ++n) {
        Vec product{};
        for_each_vector(head.dim, [&](std::int64_t c, auto extent) {
            const Vec row = load(dout[n] + c, extent);
            product += row * load(out[n] + c, extent);
            store(sums + c, load(sums + c) + row);
        });
        head.delta[n] = sum_lanes(product);
    }
}

// Adds a block of keys to a panel's dq.
template <class T>
void panel_pass(const Head<T>& head, std::int64_t first, std::int64_t keys, std::int64_t panel) {
    using W = typename WordsOf<T>::type;
    const std::int64_t column = panel % kQueries;
    const Valid valid(head.tokens - panel);
    Vec mean[kColumns] = {};
    std::int64_t key = 0;
    for (; key + 4 <= keys; key += 4) weights_and_dlogits<4>(head, valid, first, key, panel, column, mean);
    for (; key + 2 <= keys; key += 2) weights_and_dlogits<2>(head, valid, first, key, panel, column, mean);
    if (key < keys) weights_and_dlogits<1>(head, valid, first, key, panel, column, mean);
    if (corrects_delta(head)) correct_dlogits(head, valid, column, mean);
    float* const dq = head.dq + panel * head.dim;
    const Words k{head.k_columns + first / W::kNumbers * head.stride, 1, head.stride};
    multiply_panel<W>(kPiece<T>, k, head.dlogits_along_keys, head.dim, words(keys, W::kNumbers), dq,
                      [&](std::int64_t at, int) { return first == 0 ? Vec{} : load(dq + at); });
}

// to[key][c] += left[key][query] right[query][c] over a block of queries, for kCols vectors of columns.
template <class T, int kCols>
void add_rows(const float* left, const float* right, std::int64_t stride, std::int64_t keys, std::int64_t queries,
              bool is_first, float* to) {
    using W = typename WordsOf<T>::type;
    const auto finish = [&](std::int64_t row, auto& c, std::int64_t first_word) {
#pragma GCC unroll 6
        for (auto& line : c) {
            for (int j = 0; j < kCols; ++j) {
                float* at = to + row * stride + j * kLanes;
                store(at, is_first && first_word == 0 ? line[j] : load(at) + line[j]);
            }
            ++row;
        }
    };
    const Words a{left, kQueries / W::kNumbers, 1};
    multiply_in_pieces<W, kRowsOfFew, kCols>(kPiece<T>, a, right, stride, keys, words(queries, W::kNumbers), finish);
}

// add_rows for all columns, a few vectors at a time.
template <class T>
void add_product(const Head<T>& head, const float* left, const float* columns, std::int64_t first_query,
                 std::int64_t keys, float* to) {
    using W = typename WordsOf<T>::type;
    const std::int64_t vectors = head.stride / kLanes, parts = (vectors + kMostColumns - 1) / kMostColumns;
    const std::int64_t width = (vectors + parts - 1) / parts;
    const std::int64_t queries = smaller(kQueries, head.tokens - first_query);
    for (std::int64_t done = 0; done < vectors; done += width) {
        const float* right = columns + first_query / W::kNumbers * head.stride + done * kLanes;
        const auto run = [&](auto cols) {
            constexpr int kCols = decltype(cols)::value;
            add_rows<T, kCols>(left, right, head.stride, keys, queries, first_query == 0, to + done * kLanes);
        };
        const std::int64_t cols = smaller(width, vectors - done);
        if (cols == 1) {
            run(Count<1>{});
        } else if (cols == 2) {
            run(Count<2>{});
        } else if (cols == 3) {
            run(Count<(kMostColumns < 3 ? kMostColumns : 3)>{});
        } else if (cols == 4) {
            run(Count<(kMostColumns < 4 ? kMostColumns : 4)>{});
        } else {
            run(Count<kMostColumns>{});
        }
    }
}

template <class T>
void store_rows(const float* from, std::int64_t stride, const T* head, std::int64_t stride_to, std::int64_t first,
                std::int64_t rows, std::int64_t d) {
    for (std::int64_t r = 0; r < rows; ++r) {
        T* to = const_cast<T*>(head) + (first + r) * stride_to;
        for_each_vector(d, [&](std::int64_t c, auto extent) { store(to + c, load(from + r * stride + c), extent); });
    }
}

template <class T>
void prepare(Head<T>& head, const AttentionBackward& call, const Rows<T>& q, const Rows<T>& dout, std::int64_t b,
             std::int64_t h) {
    using W = typename WordsOf<T>::type;
    const AttentionProblem& p = call.problem;
    const Rows<T> k = head_of<T>(p, call.qkv, 1, b, h);
    head.k = left_words<W>(k, p.tokens, p.head_dim, head.copied_k);
    head.v = left_words<W>(head_of<T>(p, call.qkv, 2, b, h), p.tokens, p.head_dim, head.copied_v);
    pack_columns<W>(q, p.tokens, p.head_dim, head.q_columns, head.stride);
    pack_columns<W>(k, p.tokens, p.head_dim, head.k_columns, head.stride);
    pack_columns<W>(dout, p.tokens, p.head_dim, head.dout_columns, head.stride);
    for (std::int64_t panel = 0; panel < p.tokens; panel += kPanel) {
        const std::int64_t at = panel * words(p.head_dim, W::kNumbers);
        pack_panel<W>(q, panel, p.tokens, p.head_dim, head.q_panels + at);
        pack_panel<W>(dout, panel, p.tokens, p.head_dim, head.dout_panels + at);
    }
    const T* out = static_cast<const T*>(call.out) + (b * p.tokens * p.heads + h) * p.head_dim;
    for (std::int64_t c = 0; c < head.stride; ++c) head.dq_sums[c] = head.dout_sums[c] = 0.0f;
    inner_products(head, dout, {out, p.heads * p.head_dim});
    const float *maximum = call.lse + (b * 2 * p.heads + h) * p.tokens, *inverse = maximum + p.heads * p.tokens;
    for (std::int64_t n = 0; n < (p.tokens + kPanel - 1) / kPanel * kPanel; ++n) {
        head.maximum[n] = n < p.tokens ? maximum[n] : 0.0f;
        head.inverse[n] = n < p.tokens ? inverse[n] : 0.0f;
        if (n >= p.tokens) head.delta[n] = 0.0f;
    }
}

template <class T>
void backward_head(const AttentionBackward& call, std::int64_t b, std::int64_t h, float* memory) {
    const AttentionProblem& p = call.problem;
    Scratch scratch(memory);
    Head<T> head(p, scratch);
    const Rows<T> q = head_of<T>(p, call.qkv, 0, b, h), dout = dout_of<T>(call, b, h, head.dout_rows);
    prepare(head, call, q, dout, b, h);
    const std::int64_t stride_n = 3 * p.heads * p.head_dim;
    const AttentionProblem packed{p.dtype, p.batch, p.tokens, p.heads, p.head_dim, p.tokens * stride_n, stride_n, 0};
    for (std::int64_t first = 0; first < p.tokens; first += kKeys) {
        const std::int64_t keys = smaller(kKeys, p.tokens - first);
        for (std::int64_t block = 0; block < p.tokens; block += kQueries) {
            for (std::int64_t panel = block; panel < smaller(block + kQueries, p.tokens); panel += kPanel) {
                panel_pass(head, first, keys, panel);
            }
            add_product(head, head.weights, head.dout_columns, block, keys, head.dv);
            add_product(head, head.dlogits, head.q_columns, block, keys, head.dk);
        }
        store_rows(head.dk, head.stride, head_of<T>(packed, call.dqkv, 1, b, h).data, stride_n, first, keys, head.dim);
        store_rows(head.dv, head.stride, head_of<T>(packed, call.dqkv, 2, b, h).data, stride_n, first, keys, head.dim);
    }
    Vec ones[kColumns];
    for (Vec& one : ones) one = splat(1.0f);
    T* dq = const_cast<T*>(head_of<T>(packed, call.dqkv, 0, b, h).data);
    for (std::int64_t panel = 0; panel < p.tokens; panel += kPanel) {
        store_panel(head.dq + panel * head.dim, ones, dq, stride_n, panel, p.tokens, head.dim, head.dq_sums);
    }
    if (call.dbias == nullptr) return;
    // rows of the weights sum to one, so dv sums to what dout sums to; rows of dlogits sum to zero, so dk does, too
    float* row = call.dbias + (b * 3 * p.heads + h) * p.head_dim;
    for (std::int64_t c = 0; c < p.head_dim; ++c) {
        row[c] = head.dq_sums[c];
        row[p.heads * p.head_dim + c] = 0.0f;
        row[2 * p.heads * p.head_dim + c] = head.dout_sums[c];
    }
}

void clear_sums_over_nothing(const AttentionBackward& call) {
    const AttentionProblem& p = call.problem;
    if (p.tokens > 0 || !call.dbias) return;
    for (std::int64_t i = 0; i < p.batch * 3 * p.heads * p.head_dim; ++i) call.dbias[i] = 0.0f;
}

template <class T>
void backward(const AttentionBackward& call, int threads) {
    Scratch measure(nullptr);
    const Head<T> sizes(call.problem, measure);
    clear_sums_over_nothing(call);
    for_each_head(call.problem, threads, measure.used(),
                  [&](std::int64_t b, std::int64_t h, float* memory) { backward_head<T>(call, b, h, memory); });
}

}  // namespace

void attention_backward(const AttentionBackward& call, int threads) {
    with_type(call.problem.dtype, [&](auto zero) { backward<decltype(zero)>(call, threads); });
}

}  // namespace ditfast::host::DITFAST_ISA
