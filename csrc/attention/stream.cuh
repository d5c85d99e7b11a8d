#pragma once

#include "fragment.cuh"
#include "params.h"

// How operands reach a block: a head's location in global memory, and its tiles, copied into shared memory
// ahead of use.

namespace ditfast {

constexpr float kLog2E = 1.4426950408889634f;

enum class Part { kQuery, kKey, kValue };

// The head of one sample that a block works on. Construct it anew for each use: values derived from it would
// otherwise hold registers between uses.
struct Head {
    int heads;
    int b;
    int h;

    DITFAST_DEVICE Head(const AttentionProblem& p, int blocks_per_head) : heads(static_cast<int>(p.heads)) {
        const int index = ptx::opaque(ptx::block()) / blocks_per_head;
        b = index / heads;
        h = index % heads;
    }

    // Of qkv (B, N, 3, H, d), its last three dimensions contiguous.
    template <int D>
    DITFAST_DEVICE Matrix<const Bits16> input(const void* qkv, const AttentionProblem& p, Part part) const {
        const int column = (static_cast<int>(part) * heads + h) * D;
        return {static_cast<const Bits16*>(qkv) + b * p.stride_b + column, static_cast<int>(p.stride_n)};
    }

    // Of dqkv (B, N, 3, H, d), contiguous.
    template <int D>
    DITFAST_DEVICE Matrix<Bits16> gradient(const AttentionBackward& call, Part part) const {
        const int width = 3 * heads * D, column = (static_cast<int>(part) * heads + h) * D;
        return {static_cast<Bits16*>(call.dqkv) + b * call.problem.tokens * width + column, width};
    }

    // Of the row of dbias (rows, 3, H, d), contiguous, for one of a sample's `groups`.
    template <int D>
    DITFAST_DEVICE float* dbias(const AttentionBackward& call, int group, int groups) const {
        return call.dbias + (std::int64_t{b} * groups + group) * 3 * heads * D + h * D;
    }

    // Of dout (B, N, H, d), its last two dimensions contiguous.
    template <int D>
    DITFAST_DEVICE Matrix<const Bits16> dout(const AttentionBackward& call) const {
        return {static_cast<const Bits16*>(call.dout) + b * call.dout_stride_b + h * D,
                static_cast<int>(call.dout_stride_n)};
    }

    // Of out (B, N, H, d), contiguous.
    template <int D, class Element>
    DITFAST_DEVICE Matrix<Element> output(Element* out, const AttentionProblem& p) const {
        const int width = heads * D;
        return {out + b * p.tokens * width + h * D, width};
    }

    // Of (B, H, N), contiguous.
    template <class Element>
    DITFAST_DEVICE Element* vector(Element* data, const AttentionProblem& p) const {
        return data + (std::int64_t{b} * heads + h) * p.tokens;
    }
};

// The block's threads copy one tile; rows past the last token become zero.
template <int D>
DITFAST_DEVICE void copy_tile(std::uint32_t to, Matrix<const Bits16> from, int tile, int tokens) {
    constexpr int kChunks = D / 8;  // of 16 bytes, per row

    // opaque: keeps no addresses in registers between tiles
    for (int i = ptx::opaque(ptx::thread()); i < kTile * kChunks; i += ptx::threads()) {
        const int row = tile * kTile + i / kChunks;
        const bool inside = row < tokens;
        const Bits16* source = from.row(inside ? row : 0) + i % kChunks * 8;
        ptx::copy_16_bytes(to + i / kChunks * kPitch + i % kChunks * 16, source, inside);
    }
}

// Two matrices of one head, tile by tile, in as many slots as plan.h allows.
template <int D>
struct TileStream {
    Matrix<const Bits16> first;
    Matrix<const Bits16> second;
    int tokens;
    std::uint32_t ring;

    DITFAST_DEVICE int slot(int tile) const { return tile_count(tokens) <= kResidentTiles ? tile : tile % kRingTiles; }
    DITFAST_DEVICE std::uint32_t first_tile(int tile) const { return ring + slot(tile) * 2 * kTileBytes; }
    DITFAST_DEVICE std::uint32_t second_tile(int tile) const { return first_tile(tile) + kTileBytes; }

    DITFAST_DEVICE void copy(int tile) const {
        if (tile >= tile_count(tokens)) return;
        copy_first(tile);
        copy_second(tile);
    }

    DITFAST_DEVICE void copy_first(int tile) const { copy_tile<D>(first_tile(tile), first, tile, tokens); }
    DITFAST_DEVICE void copy_second(int tile) const { copy_tile<D>(second_tile(tile), second, tile, tokens); }

    DITFAST_DEVICE void start() const {
        copy(0);
        ptx::commit_copies();
        copy(1);
        ptx::commit_copies();
    }

    // Makes a tile readable. After the barrier every warp has also finished the previous tile, whose slot
    // takes the next copy. Groups are committed even if empty, because waiting counts them.
    DITFAST_DEVICE void advance(int tile) const {
        ptx::wait_for_copies<1>();
        ptx::sync_block();
        copy(tile + 2);
        ptx::commit_copies();
    }
};

// The rows of a warp: groups of 16 * warps rows, assigned round-robin to the blocks of a head.
struct RowGroups {
    int part;
    int parts;
    int tokens;

    DITFAST_DEVICE int rows() const { return ptx::warps() * kWarpRows; }
    DITFAST_DEVICE int begin() const { return part * rows(); }
    DITFAST_DEVICE int step() const { return parts * rows(); }
    DITFAST_DEVICE int count() const { return (tokens - 1) / rows() + 1; }
    DITFAST_DEVICE bool is_first(int group) const { return group < step(); }
    DITFAST_DEVICE int warp_offset() const { return ptx::warp() * kWarpRows; }
};

}  // namespace ditfast
