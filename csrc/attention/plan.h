#pragma once

#include <algorithm>
#include <cstdint>

#include "params.h"

#ifdef __CUDACC__
#define DITFAST_HOST_DEVICE __host__ __device__
#else
#define DITFAST_HOST_DEVICE
#endif

// How the CUDA kernels map to a problem: blocks, warps and shared memory.

namespace ditfast {

constexpr int kTile = 64;    // tokens loaded into shared memory together
constexpr int kPitch = 144;  // bytes per row there: 8 rows start in 8 different bank groups
constexpr int kTileBytes = kTile * kPitch;
constexpr int kResidentTiles = 4;  // up to this many tiles stay in shared memory once loaded
constexpr int kRingTiles = 3;      // more go through a ring: one in use, two in flight
constexpr int kWarpRows = 16;      // tokens whose results a warp holds in registers
// Maximum warps per block: each needs so many registers that two such blocks fill a multiprocessor.
constexpr int kForwardWarps = 8;
constexpr int kBackwardWarps = 6;
// Per-column sums of dq and dout over the rows of a warp.
constexpr int kSumBytes = kBackwardWarps * 2 * 72 * int{sizeof(float)};

DITFAST_HOST_DEVICE constexpr int tile_count(int tokens) { return (tokens - 1) / kTile + 1; }

DITFAST_HOST_DEVICE constexpr int slot_count(int tokens) {
    const int tiles = tile_count(tokens);
    return tiles <= kResidentTiles ? tiles : kRingTiles;
}

// Two matrices are streamed.
DITFAST_HOST_DEVICE constexpr int ring_bytes(int tokens) { return slot_count(tokens) * 2 * kTileBytes; }

// The first tile of out occupies the stream's third slot, or follows the two slots if there are only two.
DITFAST_HOST_DEVICE constexpr int first_out_bytes(int tokens) { return slot_count(tokens) < 3 ? kTileBytes : 0; }

constexpr int forward_shared_bytes(int tokens) { return ring_bytes(tokens); }

// After the ring, blocks for dk and dv add out and 2 floats per token, those for dq sums over rows.
constexpr int backward_shared_bytes(int tokens) {
    const int statistics = slot_count(tokens) * kTile * 2 * int{sizeof(float)};
    return ring_bytes(tokens) + std::max(first_out_bytes(tokens) + statistics, kSumBytes);
}

inline int backward_warps(std::int64_t tokens) { return tokens <= 128 ? 4 : kBackwardWarps; }

// Groups of rows in a sample: a block's warps process one at a time.
inline std::int64_t backward_groups(std::int64_t tokens) {
    return (tokens - 1) / (kWarpRows * backward_warps(tokens)) + 1;
}

struct Plan {
    int warps;            // per block; together they hold 16 * warps rows
    int parts;            // blocks that share the rows of one head
    std::int64_t blocks;  // of the grid
    int shared_bytes;
};

// `roles` blocks do different work on the same rows. If tiles stay resident, one block takes all rows of a
// head, unless that leaves multiprocessors idle; otherwise it takes as many as its warps hold.
inline Plan make_plan(const AttentionProblem& p, int warps, int roles, int shared_bytes, int multiprocessors) {
    const int tokens = static_cast<int>(p.tokens);
    const std::int64_t groups = (tokens - 1) / (kWarpRows * warps) + 1;
    const std::int64_t heads = p.batch * p.heads * roles;
    const std::int64_t wanted = (2 * multiprocessors - 1) / heads + 1;
    const bool resident = tile_count(tokens) <= kResidentTiles;
    const std::int64_t parts = resident ? std::min(groups, wanted) : groups;
    return {warps, static_cast<int>(parts), heads * parts, shared_bytes};
}

// One tile of rows per block if every such block gets a multiprocessor to itself: it copies as much as a
// larger one and computes half. Backward has no choice: rows of dbias depend on the tokens alone.
inline int forward_warps(const AttentionProblem& p, int multiprocessors) {
    const std::int64_t tiles = tile_count(static_cast<int>(p.tokens));
    return tiles == 1 || p.batch * p.heads * tiles <= multiprocessors ? kTile / kWarpRows : kForwardWarps;
}

inline Plan plan_forward(const AttentionProblem& p, int multiprocessors) {
    return make_plan(p, forward_warps(p, multiprocessors), 1, forward_shared_bytes(static_cast<int>(p.tokens)),
                     multiprocessors);
}

inline Plan plan_backward(const AttentionProblem& p, int multiprocessors) {
    const int tokens = static_cast<int>(p.tokens);
    return make_plan(p, backward_warps(tokens), 2, backward_shared_bytes(tokens), multiprocessors);
}

}  // namespace ditfast
