#include "attention.h"
#include "kernels.h"

namespace ditfast::host::DITFAST_ISA {
namespace {

constexpr std::int64_t kQueries = 256;  // per block
static_assert(kQueries % kPanel == 0, "a block is made of whole panels");
constexpr int kRowsOfFew = kMostColumns == 5 ? 4 : 6;

template <int kCount>
struct Count {
    static constexpr int value = kCount;
};

// One head, and a task's scratch for it: words as the five products read them, and gradients in float32.
template <class T>
struct Head {
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

    Head(const AttentionProblem& p, Scratch& scratch)
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

// Weights and dlogits of some keys and the panel of queries that starts at `column` of the block.
template <int kRows, class T>
void weights_and_dlogits(const Head<T>& head, const Valid& valid, std::int64_t first, std::int64_t key,
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
            weight[i][j] = valid(j, weight_of<T>(c[i][j] * factor - lse));
            W::store_numbers(head.weights + (key + i) * row_words, column + j * kLanes, weight[i][j]);
        }
    }
    multiply_along_d<T>(rows_of(head.v), head.dout_panels + panel * inner, inner, c);
    for (int j = 0; j < kColumns; ++j) {
        const Vec delta = load(head.delta + panel + j * kLanes);
        for (int i = 0; i < kRows; ++i) {
            c[i][j] = valid(j, weight[i][j] * scale * (c[i][j] - delta));
            W::store_numbers(head.dlogits + (key + i) * row_words, column + j * kLanes, c[i][j]);
        }
        for (int i = 0; i < kRows; i += W::kNumbers) {
            const Vec second = W::kNumbers == 2 && i + 1 < kRows ? c[i + 1 < kRows ? i + 1 : i][j] : Vec{};
            store(head.dlogits_along_keys + (key + i) / W::kNumbers * kPanel + j * kLanes, W::join(c[i][j], second));
        }
    }
}

// Adds a block of keys to a panel's dq.
template <class T>
void panel_pass(const Head<T>& head, std::int64_t first, std::int64_t keys, std::int64_t panel) {
    using W = typename WordsOf<T>::type;
    const std::int64_t column = panel % kQueries;
    const Valid valid(head.tokens - panel);
    std::int64_t key = 0;
    for (; key + 4 <= keys; key += 4) weights_and_dlogits<4>(head, valid, first, key, panel, column);
    for (; key + 2 <= keys; key += 2) weights_and_dlogits<2>(head, valid, first, key, panel, column);
    if (key < keys) weights_and_dlogits<1>(head, valid, first, key, panel, column);
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
    const float* lse = call.lse + (b * p.heads + h) * p.tokens;
    for (std::int64_t n = 0; n < (p.tokens + kPanel - 1) / kPanel * kPanel; ++n) {
        head.lse[n] = n < p.tokens ? lse[n] * kLogit<T> : 0.0f;
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
