#pragma once

#include <algorithm>
#include <cstdint>

#include "params.h"

#ifdef __CUDACC__
#define DITFAST_HOST_DEVICE __host__ __device__
#else
#define DITFAST_HOST_DEVICE
#endif

// How the CUDA kernels lie over a problem: blocks, warps and shared memory.

namespace ditfast {

constexpr int kTile = 64;    // tokens that enter shared memory together
constexpr int kPitch = 144;  // bytes of a row there: 8 rows start in 8 different bank groups
constexpr int kTileBytes = kTile * kPitch;
constexpr int kResidentTiles = 4;  // so many tiles stay in shared memory once read
constexpr int kRingTiles = 3;      // more go through a ring: one in use, two under way
constexpr int kWarpRows = 16;      // tokens whose results a warp holds in registers
// Warps of a block, at most: so many registers does each need that two such blocks fill a multiprocessor.
constexpr int kForwardWarps = 8;
constexpr int kBackwardWarps = 6;
// Sums over the rows of a warp, of dq and of dout, for each column.
constexpr int kSumBytes = kBackwardWarps * 2 * 72 * int{sizeof(float)};

DITFAST_HOST_DEVICE constexpr int tile_count(int tokens) { return (tokens - 1) / kTile + 1; }

DITFAST_HOST_DEVICE constexpr int slot_count(int tokens) {
    const int tiles = tile_count(tokens);
    return tiles <= kResidentTiles ? tiles : kRingTiles;
}

// Two matrices are streamed.
DITFAST_HOST_DEVICE constexpr int ring_bytes(int tokens) { return slot_count(tokens) * 2 * kTileBytes; }

// The first tile of out lies in the place of a third tile of the stream, or behind the two that there are.
DITFAST_HOST_DEVICE constexpr int first_out_bytes(int tokens) {
    return slot_count(tokens) < 3 ? kTileBytes : 0;
}

constexpr int forward_shared_bytes(int tokens) { return ring_bytes(tokens); }

// Behind the ring the blocks of dk and dv add out and 2 floats for each token, those of dq sums over rows.
constexpr int backward_shared_bytes(int tokens) {
    const int statistics = slot_count(tokens) * kTile * 2 * int{sizeof(float)};
    return ring_bytes(tokens) + std::max(first_out_bytes(tokens) + statistics, kSumBytes);
}

inline int backward_warps(std::int64_t tokens) { return tokens <= 128 ? 4 : kBackwardWarps; }

// Groups of rows in a sample: each is the work of a block's warps at one time.
inline std::int64_t backward_groups(std::int64_t tokens) {
    return (tokens - 1) / (kWarpRows * backward_warps(tokens)) + 1;
}

struct Plan {
    int warps;            // of one block; together they hold 16 * warps rows
    int parts;            // blocks that share the rows of one head
    std::int64_t blocks;  // of the grid
    int shared_bytes;
};

// `roles` blocks do different work on the same rows. Where tiles stay resident, one block takes all rows of a
// head, unless that left multiprocessors idle; else it takes as many as its warps hold.
inline Plan make_plan(const AttentionProblem& p, int warps, int roles, int shared_bytes,
                      int multiprocessors) {
    const int tokens = static_cast<int>(p.tokens);
    const std::int64_t groups = (tokens - 1) / (kWarpRows * warps) + 1;
    const std::int64_t heads = p.batch * p.heads * roles;
    const std::int64_t wanted = (2 * multiprocessors - 1) / heads + 1;
    const bool resident = tile_count(tokens) <= kResidentTiles;
    const std::int64_t parts = resident ? std::min(groups, wanted) : groups;
    return {warps, static_cast<int>(parts), heads * parts, shared_bytes};
}

// A tile of rows for each block where every such block has a multiprocessor to itself: it copies as much as a
// larger one, and computes half. The backward cannot choose: rows of dbias depend on the tokens alone.
inline int forward_warps(const AttentionProblem& p, int multiprocessors) {
    const std::int64_t tiles = tile_count(static_cast<int>(p.tokens));
    return tiles == 1 || p.batch * p.heads * tiles <= multiprocessors ? kTile / kWarpRows : kForwardWarps;
}

inline Plan plan_forward(const AttentionProblem& p, int multiprocessors) {
    return make_plan(p, forward_warps(p, multiprocessors), 1,
                     forward_shared_bytes(static_cast<int>(p.tokens)), multiprocessors);
}

inline Plan plan_backward(const AttentionProblem& p, int multiprocessors) {
    const int tokens = static_cast<int>(p.tokens);
    return make_plan(p, backward_warps(tokens), 2, backward_shared_bytes(tokens),
                     multiprocessors);
}

}  // namespace ditfast
