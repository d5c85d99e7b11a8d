#pragma once

#include "ptx.h"

// What ldmatrix and mma deliver to each lane, for comparison with the tests' emulator.

namespace ditfast {

constexpr int kProbeOperands = 6;  // words per lane and type: a[4], b[2]
constexpr int kProbeResults = 28;  // words per lane

template <class T>
DITFAST_DEVICE void probe_mma(const std::uint16_t* operands, std::uint16_t* out) {
    const auto operand = [&](int i) { return ptx::load_word(operands + 2 * i); };
    const std::uint32_t a[4] = {operand(0), operand(1), operand(2), operand(3)};
    const std::uint32_t half[2] = {a[0], a[1]};
    float k16[4] = {1.0f, 2.0f, 3.0f, 4.0f}, k8[4] = {1.0f, 2.0f, 3.0f, 4.0f};
    ptx::mma<T>(k16, a, operand(4), operand(5));
    ptx::mma<T>(k8, half, operand(4));
    for (int i = 0; i < 4; ++i) {
        ptx::store_word(out + 2 * i, ptx::pack<T>(k16[i], 0.0f));
        ptx::store_word(out + 2 * (4 + i), ptx::pack<T>(k8[i], 0.0f));
    }
}

// matrices (4, 8, 8), operands (2 types, 32 lanes, kProbeOperands words), out (32 lanes, kProbeResults
// words).
DITFAST_KERNEL(32, 1)
probe_layouts(const std::uint16_t* matrices, const std::uint16_t* operands, std::uint16_t* out) {
    const int lane = ptx::lane();
    const std::uint32_t row = ptx::shared_memory() + lane * 16;
    ptx::copy_16_bytes(row, matrices + lane * 8, true);
    ptx::commit_copies();
    ptx::wait_for_copies<0>();
    ptx::sync_block();
    std::uint32_t four[4], two[2], four_transposed[4], two_transposed[2];
    ptx::load_matrices(four, row);
    ptx::load_matrices(two, row);
    ptx::load_transposed(four_transposed, row);
    ptx::load_transposed(two_transposed, row);
    out += 2 * lane * kProbeResults;
    for (int i = 0; i < 4; ++i) {
        ptx::store_word(out + 2 * i, four[i]);
        ptx::store_word(out + 2 * (4 + i), four_transposed[i]);
    }
    for (int i = 0; i < 2; ++i) {
        ptx::store_word(out + 2 * (8 + i), two[i]);
        ptx::store_word(out + 2 * (10 + i), two_transposed[i]);
    }
    probe_mma<BFloat16>(operands + 2 * lane * kProbeOperands, out + 2 * 12);
    probe_mma<Float16>(operands + 2 * (32 + lane) * kProbeOperands, out + 2 * 20);
}

}  // namespace ditfast
