#pragma once

#include "stream.cuh"

// dv = p^T dout and dk = scale * ds^T q, with p and ds as in backward_dq.cuh. A warp holds 16 keys and loops
// over tiles of queries and dout, computing p and ds transposed: rows are keys, columns queries.

namespace ditfast {

// Per query of a tile, in shared memory: its log-sum-exp to base 2, and delta = dout . out.
template <class T, int D>
struct QueryStatistics {
    Matrix<const Bits16> out;
    const float* lse;
    int tokens;
    std::uint32_t floats;  // [slot][2][kTile]

    DITFAST_DEVICE std::uint32_t lse_log2(int slot) const { return floats + slot * 2 * kTile * 4; }
    DITFAST_DEVICE std::uint32_t delta(int slot) const { return lse_log2(slot) + kTile * 4; }

    DITFAST_DEVICE void copy_lse(int tile, int slot) const {
        for (int i = ptx::thread(); i < kTile; i += ptx::threads()) {
            const int row = tile * kTile + i;
            const bool inside = row < tokens;
            ptx::copy_4_bytes(lse_log2(slot) + 4 * i, lse + (inside ? row : 0), inside);
        }
    }

    // Four lanes per row.
    DITFAST_DEVICE void compute(int tile, int slot, std::uint32_t dout_tile, std::uint32_t out_tile) const {
#pragma unroll 1
        for (int row = ptx::warp() * 8 + ptx::lane() / 4; row < kTile; row += ptx::warps() * 8) {
            float sum = 0.0f;
            for (int chunk = ptx::lane() % 4; chunk < D / 8; chunk += 4) {
                sum += inner_product(dout_tile + row * kPitch + chunk * 16, out_tile + row * kPitch + chunk * 16);
            }
            sum = quad_sum(sum);
            if (ptx::lane() % 4 != 0) continue;
            const std::uint32_t at = lse_log2(slot) + 4 * row;
            // A query past the end gets zero weight: exp2(0 - inf).
            const bool inside = tile * kTile + row < tokens;
            ptx::store_shared_float(at, inside ? ptx::load_shared_float(at) * kLog2E : INFINITY);
            ptx::store_shared_float(delta(slot) + 4 * row, sum);
        }
    }

    static DITFAST_DEVICE float inner_product(std::uint32_t a, std::uint32_t b) {
        const ptx::Words4 x = ptx::load_shared_words(a), y = ptx::load_shared_words(b);
        float sum = 0.0f;
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const ptx::Floats2 u = ptx::unpack<T>(x.word[i]), v = ptx::unpack<T>(y.word[i]);
            sum = fmaf(u.first, v.first, fmaf(u.second, v.second, sum));
        }
        return sum;
    }
};

template <class T, int D>
struct KeyGradient {
    LeftOperand<D> key;
    LeftOperand<D> value;
    float dkey[D / 8][4];
    float dvalue[D / 8][4];

    DITFAST_DEVICE void start(Matrix<const Bits16> keys, Matrix<const Bits16> values, int first, int tokens) {
        load(key, keys, first, tokens);
        load(value, values, first, tokens);
        clear<D>(dkey);
        clear<D>(dvalue);
    }

    // 16 queries: their rows in shared memory, and their statistics.
    DITFAST_DEVICE void step(std::uint32_t queries, std::uint32_t douts, std::uint32_t lse_log2, std::uint32_t delta,
                             float scale_log2) {
        float p[2][4], ds[2][4];  // (16, 16)
        multiply_rows<T, D>(p, key, queries);
        multiply_rows<T, D>(ds, value, douts);
#pragma unroll
        for (int n = 0; n < 2; ++n) {
            const std::uint32_t column = (8 * n + lane_column()) * 4;
            const ptx::Floats2 lse = ptx::load_shared_floats(lse_log2 + column);
            const ptx::Floats2 mean = ptx::load_shared_floats(delta + column);
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                p[n][i] = ptx::exp2(fmaf(p[n][i], scale_log2, -(i % 2 ? lse.second : lse.first)));
                ds[n][i] = p[n][i] * (ds[n][i] - (i % 2 ? mean.second : mean.first));
            }
        }
        std::uint32_t left[4];
        to_left_operand<T>(left, p);
        add_product<T, D>(dvalue, left, douts);
        to_left_operand<T>(left, ds);
        add_product<T, D>(dkey, left, queries);
    }

    DITFAST_DEVICE void finish(Matrix<Bits16> dkeys, Matrix<Bits16> dvalues, int first, int tokens, float scale) const {
        store<T, D>(dkeys, first, tokens, dkey, {scale, scale});
        store<T, D>(dvalues, first, tokens, dvalue, {1.0f, 1.0f});
    }
};

// The tiles of queries and dout with their statistics. A tile of out is needed only until delta is known,
// which is one tile ahead. So out borrows the slot that the same tile's queries fill next, and takes no extra
// memory. Tile 0's queries are loaded at once, so its out borrows the slot of tile 2, or follows a shorter
// head.
template <class T, int D>
struct QueryStream {
    TileStream<D> tiles;
    QueryStatistics<T, D> statistics;

    DITFAST_DEVICE QueryStream(const AttentionBackward& call, const Head& head, int tokens)
        : tiles{head.input<D>(call.qkv, call.problem, Part::kQuery), head.dout<D>(call), tokens, ptx::shared_memory()},
          statistics{head.output<D>(static_cast<const Bits16*>(call.out), call.problem),
                     head.vector(call.lse, call.problem), tokens,
                     tiles.ring + ring_bytes(tokens) + first_out_bytes(tokens)} {}

    DITFAST_DEVICE bool exists(int tile) const { return tile < tile_count(tiles.tokens); }

    DITFAST_DEVICE std::uint32_t out_tile(int tile) const {
        return tiles.first_tile(tile > 0 ? tile : exists(1) ? 2 : 1);
    }

    // The inputs of delta.
    DITFAST_DEVICE void copy_outs(int tile) const {
        if (!exists(tile)) return;
        tiles.copy_second(tile);
        copy_tile<D>(out_tile(tile), statistics.out, tile, tiles.tokens);
        statistics.copy_lse(tile, tiles.slot(tile));
    }

    DITFAST_DEVICE void compute(int tile) const {
        if (exists(tile)) {
            statistics.compute(tile, tiles.slot(tile), tiles.second_tile(tile), out_tile(tile));
        }
    }

    DITFAST_DEVICE void start() const {
        tiles.copy_first(0);
        copy_outs(0);
        copy_outs(1);
        ptx::commit_copies();
    }

    // As in TileStream. After the second barrier delta is known and the slot of out is free.
    DITFAST_DEVICE void advance(int tile) const {
        ptx::wait_for_copies<0>();
        ptx::sync_block();
        if (tile == 0) compute(0);
        compute(tile + 1);
        ptx::sync_block();
        if (exists(tile + 1)) tiles.copy_first(tile + 1);
        copy_outs(tile + 2);
        ptx::commit_copies();
    }
};

template <class T, int D>
DITFAST_DEVICE void backward_dkdv(const AttentionBackward& call, const RowGroups& groups) {
    const AttentionProblem& p = call.problem;
    const int tokens = groups.tokens, blocks_per_head = 2 * groups.parts;
    const QueryStream<T, D> stream(call, Head(p, blocks_per_head), tokens);
    stream.start();
    for (int group = groups.begin(); group < tokens; group += groups.step()) {
        const int first = group + groups.warp_offset();
        KeyGradient<T, D> rows;
        const Head head(p, blocks_per_head);
        rows.start(head.input<D>(call.qkv, p, Part::kKey), head.input<D>(call.qkv, p, Part::kValue), first, tokens);
#pragma unroll 1
        for (int tile = 0; tile < tile_count(tokens); ++tile) {
            if (groups.is_first(group)) stream.advance(tile);
            if (first >= tokens) continue;
            const int slot = stream.tiles.slot(tile);
#pragma unroll 1
            for (int row = 0; row < kTile; row += 16) {
                rows.step(stream.tiles.first_tile(tile) + row * kPitch, stream.tiles.second_tile(tile) + row * kPitch,
                          stream.statistics.lse_log2(slot) + row * 4, stream.statistics.delta(slot) + row * 4,
                          p.scale * kLog2E);
            }
        }
        const Head again(p, blocks_per_head);
        rows.finish(again.gradient<D>(call, Part::kKey), again.gradient<D>(call, Part::kValue), first, tokens, p.scale);
    }
}

}  // namespace ditfast
