#include "attention.h"
#include "kernels.h"

// Attention and its tangent in one pass over the keys, derived in the appendix of Lu & Song 2024, "Simplifying,
// Stabilizing and Scaling Continuous-Time Consistency Models". The logits S = scale Q K^T have the tangents
// S_t = scale (Q_t K^T + Q K_t^T), and with m, each query's mean of S_t under the weights P,
//     out_t = P V_t + (P o (S_t - m)) V.
// m is subtracted before the product: if one key has nearly all the weight, subtracting afterwards would leave only
// rounding errors. m is the mean over the keys seen so far; out_t is corrected as it moves.

namespace ditfast::host::DITFAST_ISA {
namespace {

constexpr float kInfinity = __builtin_inff();

// One head, and a task's scratch for it.
template <class T>
struct Head {
    using W = typename WordsOf<T>::type;

    std::int64_t tokens, dim, inner, stride_v;  // inner: words along d
    float scale;
    Words k, k_t;
    float *copied_k, *copied_k_t;
    float *query, *query_t;      // [d][query], words along d
    float *values, *values_t;    // [key][c], words along keys
    float *operand, *operand_t;  // [key][query]: weight, weight * (logit_t - mean), words along keys
    float* weights;              // [key][query]; the same memory as operand if a word is one number
    float* logits_t;             // [key][query]
    float *out, *out_t;          // [c][query]

    Head(const AttentionProblem& p, Scratch& scratch)
        : tokens(p.tokens),
          dim(p.head_dim),
          inner(words(p.head_dim, W::kNumbers)),
          stride_v(padded(p.head_dim)),
          scale(p.scale),
          k{},
          k_t{} {
        const std::int64_t keys = smaller(kKeys, tokens);
        copied_k = scratch.take(left_words_size(tokens, dim));
        copied_k_t = scratch.take(left_words_size(tokens, dim));
        query = scratch.take(inner * kPanel);
        query_t = scratch.take(inner * kPanel);
        values = scratch.take(words(tokens, W::kNumbers) * stride_v);
        values_t = scratch.take(words(tokens, W::kNumbers) * stride_v);
        operand = scratch.take(words(keys, W::kNumbers) * kPanel);
        operand_t = scratch.take(words(keys, W::kNumbers) * kPanel);
        weights = W::kNumbers == 1 ? operand : scratch.take(keys * kPanel);
        logits_t = scratch.take(keys * kPanel);
        out = scratch.take(dim * kPanel);
        out_t = scratch.take(dim * kPanel);
    }
};

// The softmax of a panel of queries over the keys seen so far.
struct Softmax {
    Vec maximum[kColumns], sum[kColumns];
    Vec mean[kColumns];  // weighted mean of the logits' tangents, rounded
    Vec rest[kColumns];  // sum of weight * (tangent - mean): not zero, because the mean is rounded

    Softmax() {
        for (int j = 0; j < kColumns; ++j) {
            maximum[j] = splat(-kInfinity);
            sum[j] = mean[j] = rest[j] = Vec{};
        }
    }
};

// What a block of keys does to the earlier sums: the mean grows by step, then weights are multiplied by correction.
struct Update {
    Vec correction[kColumns], step[kColumns];
};

// Writes the logits to where the weights will be, updates their maxima, and writes the logits' tangents, unscaled. The
// two sums of products stay apart: in a joint sum, the smaller's terms would be rounded to the larger's ulp.
template <class T>
void all_logits_of(const Head<T>& head, std::int64_t first, std::int64_t keys, Softmax& softmax) {
    using W = typename WordsOf<T>::type;
    const auto from = [&](const Words& k) { return Words{k.data + first * k.stride_row, k.stride_row, 1}; };
    float* const logits_t = head.logits_t;
    const std::int64_t piece = piece_of_row<T>(head.tokens);
    logits_of<T>(piece, from(head.k), head.query, keys, head.dim, head.scale * kLogit<T>, head.weights,
                 softmax.maximum);
    multiply_panel<W>(piece, from(head.k), head.query_t, keys, head.inner, logits_t,
                      [](std::int64_t, int) { return Vec{}; });
    multiply_panel<W>(piece, from(head.k_t), head.query, keys, head.inner, logits_t,
                      [&](std::int64_t at, int) { return load(logits_t + at); });
}

// Replaces the logits with weights exp(logit - maximum). Returns the sum of weight * (tangent - mean).
template <class T>
Vec weights_of(const Head<T>& head, std::int64_t column, std::int64_t keys, Vec maximum, Vec mean, Vec& sum) {
    using W = typename WordsOf<T>::type;
    float *logit = head.weights + column, *logit_t = head.logits_t + column;
    // if every logit is -inf, subtracting the maximum would give inf - inf
    const Vec origin = (maximum == -kInfinity) ? Vec{} : maximum;
    Vec moment{};
    const auto weight = [&](std::int64_t key, Vec& part_of_moment) {
        const Vec w = weight_of<T>(load(logit + key * kPanel) - origin);
        store(logit + key * kPanel, w);
        part_of_moment += w * (load(logit_t + key * kPanel) * head.scale - mean);
        return w;
    };
    for (std::int64_t done = 0; done < keys; done += kPiece<T>) {
        Vec part{}, part_of_moment{};
        for (std::int64_t key = done; key < smaller(done + kPiece<T>, keys); key += W::kNumbers) {
            const Vec first = weight(key, part_of_moment);
            const Vec second = W::kNumbers == 2 && key + 1 < keys ? weight(key + 1, part_of_moment) : Vec{};
            part += W::kNumbers == 2 ? first + second : first;
        }
        sum += part;
        moment += part_of_moment;
    }
    return moment;
}

// Writes one column of the second products' operands. Returns the sum of weight * (tangent - mean).
template <class T>
Vec operands_of(const Head<T>& head, std::int64_t column, std::int64_t keys, Vec mean) {
    using W = typename WordsOf<T>::type;
    const float *weight = head.weights + column, *logit_t = head.logits_t + column;
    Vec rest{};
    const auto times_tangent = [&](std::int64_t key, Vec w) {
        const Vec product = w * (load(logit_t + key * kPanel) * head.scale - mean);
        rest += product;
        return product;
    };
    for (std::int64_t key = 0; key < keys; key += W::kNumbers, column += kPanel) {
        const bool has_second = W::kNumbers == 2 && key + 1 < keys;
        const Vec first = load(weight + key * kPanel);
        const Vec second = has_second ? load(weight + (key + 1) * kPanel) : Vec{};
        if (W::kNumbers == 2) store(head.operand + column, W::join(first, second));
        const Vec first_t = times_tangent(key, first);
        store(head.operand_t + column, W::join(first_t, has_second ? times_tangent(key + 1, second) : Vec{}));
    }
    return rest;
}

template <class T>
Update soften(const Head<T>& head, std::int64_t keys, const Softmax& before, Softmax& softmax) {
    Update update;
    for (int j = 0; j < kColumns; ++j) {
        const Vec shift = before.maximum[j] - softmax.maximum[j];
        const Vec correction = weight_of<T>(before.maximum[j] == -kInfinity ? before.maximum[j] : shift);
        const Vec sum_before = before.sum[j] * correction;
        Vec sum = sum_before;
        const Vec moment = weights_of(head, j * kLanes, keys, softmax.maximum[j], before.mean[j], sum);
        const Vec step = sum > 0.0f ? moment / sum : Vec{};
        const Vec mean = before.mean[j] + step;
        const Vec rest = operands_of(head, j * kLanes, keys, mean);
        softmax.sum[j] = sum;
        softmax.mean[j] = mean;
        softmax.rest[j] = before.rest[j] * correction - step * sum_before + rest;
        update.correction[j] = correction;
        update.step[j] = step;
    }
    return update;
}

// Adds a block of keys to out_t, which needs the previous out, and then to out.
template <class T>
void accumulate(const Head<T>& head, std::int64_t first, std::int64_t keys, const Update& update) {
    using W = typename WordsOf<T>::type;
    const std::int64_t offset = first / W::kNumbers * head.stride_v, inner = words(keys, W::kNumbers);
    const Words v{head.values + offset, 1, head.stride_v}, v_t{head.values_t + offset, 1, head.stride_v};
    float *const out = head.out, *const out_t = head.out_t;
    multiply_panel<W>(kPiece<T>, v_t, head.operand, head.dim, inner, out_t, [&](std::int64_t at, int j) {
        if (first == 0) return Vec{};
        return (load(out_t + at) - update.step[j] * load(out + at)) * update.correction[j];
    });
    multiply_panel<W>(kPiece<T>, v, head.operand_t, head.dim, inner, out_t,
                      [&](std::int64_t at, int) { return load(out_t + at); });
    add_values<T>(v, head.operand, keys, head.dim, first == 0, update.correction, out);
}

template <class T>
void store_results(const Head<T>& head, const AttentionJvp& call, const Softmax& softmax, std::int64_t panel,
                   std::int64_t b, std::int64_t h) {
    const AttentionProblem& p = call.forward.problem;
    Vec inverse[kColumns];
    for (int j = 0; j < kColumns; ++j) {
        inverse[j] = 1.0f / softmax.sum[j];
        const Vec rest = softmax.rest[j] * inverse[j];
        for (std::int64_t at = j * kLanes; at < head.dim * kPanel; at += kPanel) {
            store(head.out_t + at, load(head.out_t + at) - rest * load(head.out + at));
        }
    }
    store_lse(call.forward, panel, b, h, softmax.maximum, inverse);
    const auto write = [&](const float* from, void* to) {
        T* rows = static_cast<T*>(to) + (b * p.tokens * p.heads + h) * p.head_dim;
        store_panel(from, inverse, rows, p.heads * p.head_dim, panel, p.tokens, p.head_dim, nullptr);
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
    Head<T> head(p, scratch);
    head.k = left_words<W>(primal(1), p.tokens, p.head_dim, head.copied_k);
    head.k_t = left_words<W>(tangent(1), p.tokens, p.head_dim, head.copied_k_t);
    pack_columns<W>(primal(2), p.tokens, p.head_dim, head.values, head.stride_v);
    pack_columns<W>(tangent(2), p.tokens, p.head_dim, head.values_t, head.stride_v);
    for (std::int64_t panel = 0; panel < p.tokens; panel += kPanel) {
        pack_panel<W>(primal(0), panel, p.tokens, p.head_dim, head.query);
        pack_panel<W>(tangent(0), panel, p.tokens, p.head_dim, head.query_t);
        Softmax softmax;
        for (std::int64_t first = 0; first < p.tokens; first += kKeys) {
            const std::int64_t keys = smaller(kKeys, p.tokens - first);
            const Softmax before = softmax;
            all_logits_of(head, first, keys, softmax);
            accumulate(head, first, keys, soften(head, keys, before, softmax));
        }
        store_results(head, call, softmax, panel, b, h);
    }
}

template <class T>
void jvp(const AttentionJvp& call, int threads) {
    Scratch measure(nullptr);
    const Head<T> sizes(call.forward.problem, measure);
    for_each_head(call.forward.problem, threads, measure.used(),
                  [&](std::int64_t b, std::int64_t h, float* memory) { jvp_head<T>(call, b, h, memory); });
}

}  // namespace

void attention_jvp(const AttentionJvp& call, int threads) {
    with_type(call.forward.problem.dtype, [&](auto zero) { jvp<decltype(zero)>(call, threads); });
}

}  // namespace ditfast::host::DITFAST_ISA
