#pragma once

#include "stream.cuh"

// out = softmax(scale * q k^T) v, and the log-sum-exp of each row. A warp holds 16 queries and loops over
// tiles of keys and values with an online softmax.

namespace ditfast {

template <class T, int D>
struct ForwardRows {
    LeftOperand<D> query;
    float out[D / 8][4];
    float maximum[2];  // of the logits before scaling, for each of the lane's rows
    float sum[2];      // over the lane's own columns

    DITFAST_DEVICE void start(Matrix<const Bits16> queries, int first, int tokens) {
        load(query, queries, first, tokens);
        clear<D>(out);
        for (int half = 0; half < 2; ++half) {
            maximum[half] = -INFINITY;
            sum[half] = 0.0f;
        }
    }

    DITFAST_DEVICE void step(std::uint32_t keys, std::uint32_t values, int count, float scale_log2) {
        float s[kTile / 16][2][4];  // (16, 64)
#pragma unroll
        for (int j = 0; j < kTile / 16; ++j) {
            multiply_rows<T, D>(s[j], query, keys + j * 16 * kPitch);
        }
        if (count < kTile) mask(s, count);
#pragma unroll
        for (int half = 0; half < 2; ++half) soften(s, half, scale_log2);
#pragma unroll
        for (int j = 0; j < kTile / 16; ++j) {
            std::uint32_t weights[4];
            to_left_operand<T>(weights, s[j]);
            add_product<T, D>(out, weights, values + j * 16 * kPitch);
        }
    }

    // Keys past the last token are zero in shared memory, and a logit of zero could be the largest.
    static DITFAST_DEVICE void mask(float (&s)[kTile / 16][2][4], int count) {
#pragma unroll
        for (int i = 0; i < kTile / 2; ++i) {
            const int key = i / 8 * 16 + i / 4 % 2 * 8 + lane_column() + i % 2;
            if (key >= count) s[i / 8][i / 4 % 2][i % 4] = -INFINITY;
        }
    }

    // Turn a row's logits into weights relative to the largest so far, and rescale what was accumulated
    // relative to the previous largest.
    DITFAST_DEVICE void soften(float (&s)[kTile / 16][2][4], int half, float scale_log2) {
        float largest = maximum[half];
#pragma unroll
        for (int i = 0; i < kTile / 4; ++i) {
            largest = fmaxf(largest, s[i / 4][i / 2 % 2][2 * half + i % 2]);
        }
        largest = quad_max(largest);
        // If every logit is -inf, subtracting the largest would give -inf + inf.
        const float origin = largest == -INFINITY ? 0.0f : largest * scale_log2;
        const float correction = ptx::exp2(maximum[half] * scale_log2 - origin);
        maximum[half] = largest;
        sum[half] *= correction;
#pragma unroll
        for (int i = 0; i < kTile / 4; ++i) {
            float& x = s[i / 4][i / 2 % 2][2 * half + i % 2];
            x = ptx::exp2(fmaf(x, scale_log2, -origin));
            sum[half] += x;
        }
#pragma unroll
        for (int n = 0; n < D / 8; ++n) {
            out[n][2 * half] *= correction;
            out[n][2 * half + 1] *= correction;
        }
    }

    DITFAST_DEVICE void finish(Matrix<Bits16> outs, float* lse, int first, int tokens, float scale) {
        const int lane = ptx::lane_again();
        float factor[2];
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const float total = quad_sum(sum[half]);
            const int row = first + lane_row(lane) + 8 * half;
            factor[half] = 1.0f / total;
            if (lane_column(lane) == 0 && row < tokens) {
                ptx::store_float(lse + row, maximum[half] * scale + ptx::log(total));
            }
        }
        store<T, D>(outs, first, tokens, out, factor);
    }
};

template <class T, int D>
DITFAST_KERNEL(32 * kForwardWarps, 2)
attention_forward(AttentionForward call, int parts) {
    const AttentionProblem& p = call.problem;
    const int tokens = static_cast<int>(p.tokens);
    const RowGroups groups{ptx::block() % parts, parts, tokens};
    const TileStream<D> stream = [&] {
        const Head head(p, parts);
        return TileStream<D>{head.input<D>(call.qkv, p, Part::kKey), head.input<D>(call.qkv, p, Part::kValue), tokens,
                             ptx::shared_memory()};
    }();
    stream.start();
    for (int group = groups.begin(); group < tokens; group += groups.step()) {
        const int first = group + groups.warp_offset();
        ForwardRows<T, D> rows;
        rows.start(Head(p, parts).input<D>(call.qkv, p, Part::kQuery), first, tokens);
#pragma unroll 1
        for (int tile = 0; tile < tile_count(tokens); ++tile) {
            if (groups.is_first(group)) stream.advance(tile);
            if (first >= tokens) continue;
            rows.step(stream.first_tile(tile), stream.second_tile(tile), tokens - tile * kTile, p.scale * kLog2E);
        }
        const Head head(p, parts);
        rows.finish(head.output<D>(static_cast<Bits16*>(call.out), p), head.vector(call.lse, p), first, tokens,
                    p.scale);
    }
}

}  // namespace ditfast
