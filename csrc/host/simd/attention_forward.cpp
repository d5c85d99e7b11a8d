#include "attention.h"
#include "kernels.h"

namespace ditfast::host::DITFAST_ISA {
namespace {

constexpr float kInfinity = __builtin_inff();

// One head, and a task's scratch for it.
template <class T>
struct Head {
    using W = typename WordsOf<T>::type;

    std::int64_t tokens, dim, stride_v;
    float factor;  // of the logits
    Words k;
    float *copied_k, *query, *values, *logits, *weights, *out;

    Head(const AttentionProblem& p, Scratch& scratch)
        : tokens(p.tokens), dim(p.head_dim), stride_v(padded(p.head_dim)), factor(p.scale * kLogit<T>), k{} {
        const std::int64_t keys = smaller(kKeys, tokens);
        copied_k = scratch.take(left_words_size(tokens, dim));
        query = scratch.take(words(dim, W::kNumbers) * kPanel);
        values = scratch.take(words(tokens, W::kNumbers) * stride_v);
        logits = scratch.take(keys * kPanel);
        weights = scratch.take(words(keys, W::kNumbers) * kPanel);
        out = scratch.take(dim * kPanel);
    }
};

// The softmax of a panel of queries over the keys seen so far.
struct Softmax {
    Vec maximum[kColumns], sum[kColumns];

    Softmax() {
        for (int j = 0; j < kColumns; ++j) {
            maximum[j] = splat(-kInfinity);
            sum[j] = Vec{};
        }
    }
};

// weights: exp(logit - maximum) in words along keys; adds them to the sums.
template <class T>
void weights_of(const Head<T>& head, std::int64_t keys, Softmax& softmax) {
    using W = typename WordsOf<T>::type;
    for (int j = 0; j < kColumns; ++j) {
        // if every logit is -inf, subtracting the maximum would give inf - inf
        const Vec maximum = softmax.maximum[j];
        const Vec origin = (maximum == -kInfinity) ? Vec{} : maximum;
        const float* logit = head.logits + j * kLanes;
        float* to = head.weights + j * kLanes;
        const auto weight = [&](std::int64_t key) { return weight_of<T>(load(logit + key * kPanel) - origin); };
        for (std::int64_t done = 0; done < keys; done += kPiece<T>) {
            Vec sum{};
            for (std::int64_t key = done; key < smaller(done + kPiece<T>, keys); key += W::kNumbers, to += kPanel) {
                const Vec first = weight(key);
                const Vec second = W::kNumbers == 2 && key + 1 < keys ? weight(key + 1) : Vec{};
                sum += W::kNumbers == 2 ? first + second : first;
                store(to, W::join(first, second));
            }
            softmax.sum[j] += sum;
        }
    }
}

template <class T>
void forward_panel(const Head<T>& head, const AttentionForward& call, std::int64_t panel, std::int64_t b,
                   std::int64_t h) {
    using W = typename WordsOf<T>::type;
    const AttentionProblem& p = call.problem;
    Softmax softmax;
    for (std::int64_t first = 0; first < head.tokens; first += kKeys) {
        const std::int64_t keys = smaller(kKeys, head.tokens - first);
        const Softmax before = softmax;
        const Words k{head.k.data + first * head.k.stride_row, head.k.stride_row, 1};
        logits_of<T>(piece_of_row<T>(head.tokens), k, head.query, keys, head.dim, head.factor, head.logits,
                     softmax.maximum);
        Vec correction[kColumns];
        for (int j = 0; j < kColumns; ++j) {
            const Vec shift = before.maximum[j] - softmax.maximum[j];
            correction[j] = weight_of<T>(before.maximum[j] == -kInfinity ? before.maximum[j] : shift);
            softmax.sum[j] *= correction[j];
        }
        weights_of(head, keys, softmax);
        const Words values{head.values + first / W::kNumbers * head.stride_v, 1, head.stride_v};
        add_values<T>(values, head.weights, keys, head.dim, first == 0, correction, head.out);
    }
    Vec inverse[kColumns];
    for (int j = 0; j < kColumns; ++j) inverse[j] = 1.0f / softmax.sum[j];
    store_lse(call, panel, b, h, softmax.maximum, inverse);
    T* out = static_cast<T*>(call.out) + (b * p.tokens * p.heads + h) * p.head_dim;
    store_panel(head.out, inverse, out, p.heads * p.head_dim, panel, p.tokens, p.head_dim, nullptr);
}

template <class T>
void forward(const AttentionForward& call, int threads) {
    using W = typename WordsOf<T>::type;
    const AttentionProblem& p = call.problem;
    const std::int64_t panels = (p.tokens + kPanel - 1) / kPanel, heads = p.batch * p.heads;
    if (panels == 0 || heads == 0) return;
    // with more threads than heads, the panels of a head are split; which thread computes a panel does not matter
    const std::int64_t parts = smaller(panels, larger(1, threads / heads));
    Scratch measure(nullptr);
    Head<T> sizes(p, measure);
    parallel(heads * parts, threads, measure.used(), [&](std::int64_t task, float* memory) {
        const std::int64_t b = task / parts / p.heads, h = task / parts % p.heads, part = task % parts;
        Scratch scratch(memory);
        Head<T> head(p, scratch);
        const Rows<T> q = head_of<T>(p, call.qkv, 0, b, h);
        head.k = left_words<W>(head_of<T>(p, call.qkv, 1, b, h), p.tokens, p.head_dim, head.copied_k);
        pack_columns<W>(head_of<T>(p, call.qkv, 2, b, h), p.tokens, p.head_dim, head.values, head.stride_v);
        for (std::int64_t i = panels * part / parts; i < panels * (part + 1) / parts; ++i) {
            pack_panel<W>(q, i * kPanel, p.tokens, p.head_dim, head.query);
            forward_panel(head, call, i * kPanel, b, h);
        }
    });
}

}  // namespace

void attention_forward(const AttentionForward& call, int threads) {
    with_type(call.problem.dtype, [&](auto zero) { forward<decltype(zero)>(call, threads); });
}

}  // namespace ditfast::host::DITFAST_ISA
