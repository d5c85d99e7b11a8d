#pragma once

#include "stream.cuh"

// dq = scale * ds k with ds = p * (dp - delta), p the weights, dp = dout v^T and delta = rowsum(dout * out).
// A warp holds 16 queries and loops over tiles of keys and values.
//
// The gradient of a bias on qkv, dqkv summed over tokens, is computed only here, before rounding. Rows of p
// sum to one, so the sum of dv = p^T dout is that of dout. Rows of ds sum to zero, and so does dk = scale *
// ds^T q.

namespace ditfast {

template <class T, int D>
struct QueryGradient {
    LeftOperand<D> query;
    LeftOperand<D> dout;
    float dquery[D / 8][4];
    float lse_log2[2];  // for each of the lane's rows
    float delta[2];

    DITFAST_DEVICE void start(Matrix<const Bits16> queries, Matrix<const Bits16> douts, Matrix<const Bits16> outs,
                              const float* lse, int first, int tokens) {
        load(query, queries, first, tokens);
        load(dout, douts, first, tokens);
        LeftOperand<D> out;
        load(out, outs, first, tokens);
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const int row = first + lane_row(ptx::lane_again()) + 8 * half;
            lse_log2[half] = row < tokens ? ptx::load_float(lse + row) * kLog2E : 0.0f;
            delta[half] = quad_sum(inner_product(dout, out, half));
        }
        clear<D>(dquery);
    }

    // The lane's part of the inner product of two rows.
    static DITFAST_DEVICE float inner_product(const LeftOperand<D>& a, const LeftOperand<D>& b, int half) {
        float sum = 0.0f;
        const auto add = [&](std::uint32_t x, std::uint32_t y) {
            const ptx::Floats2 u = ptx::unpack<T>(x), v = ptx::unpack<T>(y);
            sum = fmaf(u.first, v.first, fmaf(u.second, v.second, sum));
        };
#pragma unroll
        for (int step = 0; step < D / 16; ++step) {
            add(a.k16[step][half], b.k16[step][half]);
            add(a.k16[step][half + 2], b.k16[step][half + 2]);
        }
        if constexpr (D % 16 == 8) add(a.k8[half], b.k8[half]);
        return sum;
    }

    // `keys` and `values` are 16 rows, `count` of them valid.
    DITFAST_DEVICE void step(std::uint32_t keys, std::uint32_t values, int count, float scale_log2) {
        float s[2][4], ds[2][4];  // (16, 16)
        multiply_rows<T, D>(s, query, keys);
        multiply_rows<T, D>(ds, dout, values);
#pragma unroll
        for (int i = 0; i < 8; ++i) {
            const int half = i / 2 % 2;
            const bool inside = i / 4 * 8 + lane_column() + i % 2 < count;
            const float weight = ptx::exp2(fmaf(s[i / 4][i % 4], scale_log2, -lse_log2[half]));
            // A key past the end has a logit of zero, hence possibly an infinite weight.
            ds[i / 4][i % 4] = inside ? weight * (ds[i / 4][i % 4] - delta[half]) : 0.0f;
        }
        std::uint32_t left[4];
        to_left_operand<T>(left, ds);
        add_product<T, D>(dquery, left, keys);
    }

    // Stores the sums of dq, then of dout, over the warp's rows to its part of shared memory. Rows past the
    // last token add nothing: their q, dout and hence ds are zero.
    DITFAST_DEVICE void sum_columns(std::uint32_t sums, float scale) const {
        const int lane = ptx::lane_again();
        const std::uint32_t to = sums + ptx::opaque(ptx::warp()) * 2 * D * 4 + lane_column(lane) * 4;
#pragma unroll
        for (int n = 0; n < D / 8; ++n) {
            const std::uint32_t* words = n < D / 16 * 2 ? dout.k16[n / 2] + n % 2 * 2 : dout.k8;
            const ptx::Floats2 u = ptx::unpack<T>(words[0]), v = ptx::unpack<T>(words[1]);
            const float first = column_sum(dquery[n][0] + dquery[n][2]) * scale;
            const float second = column_sum(dquery[n][1] + dquery[n][3]) * scale;
            const float dout_first = column_sum(u.first + v.first);
            const float dout_second = column_sum(u.second + v.second);
            if (lane >= 4) continue;
            const std::uint32_t at = to + 8 * n * 4;
            ptx::store_shared_float(at, first);
            ptx::store_shared_float(at + 4, second);
            ptx::store_shared_float(at + D * 4, dout_first);
            ptx::store_shared_float(at + D * 4 + 4, dout_second);
        }
    }

    DITFAST_DEVICE void finish(Matrix<Bits16> dqueries, int first, int tokens, float scale) const {
        store<T, D>(dqueries, first, tokens, dquery, {scale, scale});
    }
};

// A row of dbias from the sums that each warp left in shared memory.
template <int D>
DITFAST_DEVICE void store_dbias(float* row, int heads, std::uint32_t sums) {
    for (int i = ptx::opaque(ptx::thread()); i < 3 * D; i += ptx::threads()) {
        const int part = i / D, column = i % D;
        float sum = 0.0f;
        if (part != static_cast<int>(Part::kKey)) {
            const std::uint32_t from = sums + (part / 2 * D + column) * 4;
            for (int warp = 0; warp < ptx::warps(); ++warp) {
                sum += ptx::load_shared_float(from + warp * 2 * D * 4);
            }
        }
        ptx::store_float(row + part * heads * D + column, sum);
    }
}

template <class T, int D>
DITFAST_DEVICE void backward_dq(const AttentionBackward& call, const RowGroups& groups) {
    const AttentionProblem& p = call.problem;
    const int tokens = groups.tokens, blocks_per_head = 2 * groups.parts;
    const TileStream<D> stream = [&] {
        const Head head(p, blocks_per_head);
        return TileStream<D>{head.input<D>(call.qkv, p, Part::kKey), head.input<D>(call.qkv, p, Part::kValue), tokens,
                             ptx::shared_memory()};
    }();
    stream.start();
    for (int group = groups.begin(); group < tokens; group += groups.step()) {
        const int first = group + groups.warp_offset();
        QueryGradient<T, D> rows;
        const Head head(p, blocks_per_head);
        rows.start(head.input<D>(call.qkv, p, Part::kQuery), head.dout<D>(call),
                   head.output<D>(static_cast<const Bits16*>(call.out), p), head.vector(call.lse, p), first, tokens);
#pragma unroll 1
        for (int tile = 0; tile < tile_count(tokens); ++tile) {
            if (groups.is_first(group)) stream.advance(tile);
            if (first >= tokens) continue;
#pragma unroll 1
            for (int row = 0; row < kTile; row += 16) {
                rows.step(stream.first_tile(tile) + row * kPitch, stream.second_tile(tile) + row * kPitch,
                          tokens - tile * kTile - row, p.scale * kLog2E);
            }
        }
        static_assert(kBackwardWarps * 2 * D * sizeof(float) <= kSumBytes);
        const std::uint32_t sums = stream.ring + ring_bytes(tokens);
        if (call.dbias != nullptr) rows.sum_columns(sums, p.scale);
        rows.finish(Head(p, blocks_per_head).gradient<D>(call, Part::kQuery), first, tokens, p.scale);
        if (call.dbias == nullptr) continue;
        ptx::sync_block();
        const Head again(p, blocks_per_head);
        store_dbias<D>(again.dbias<D>(call, group / groups.rows(), groups.count()), again.heads, sums);
        ptx::sync_block();  // until all have read, no warp may write its next sums
    }
}

}  // namespace ditfast
