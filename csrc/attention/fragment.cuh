#pragma once

#include "plan.h"
#include "ptx.h"

// A warp's fragments in registers. Lane i holds rows i / 4 and i / 4 + 8 of 16 and, of every 8 columns, the
// two from 2 * (i % 4) on: the layout of mma's operands and results.

namespace ditfast {

using Bits16 = std::uint16_t;

DITFAST_DEVICE int lane_row(int lane = ptx::lane()) { return lane / 4; }
DITFAST_DEVICE int lane_column(int lane = ptx::lane()) { return 2 * (lane % 4); }

DITFAST_DEVICE float quad_max(float x) {
    x = fmaxf(x, ptx::shuffle_xor(x, 1));
    return fmaxf(x, ptx::shuffle_xor(x, 2));
}

DITFAST_DEVICE float quad_sum(float x) {
    x += ptx::shuffle_xor(x, 1);
    return x + ptx::shuffle_xor(x, 2);
}

// Over the lanes with the same columns.
DITFAST_DEVICE float column_sum(float x) {
    x += ptx::shuffle_xor(x, 4);
    x += ptx::shuffle_xor(x, 8);
    return x + ptx::shuffle_xor(x, 16);
}

// (N, D) of one head in global memory.
template <class Element>
struct Matrix {
    Element* data;
    int stride;

    DITFAST_DEVICE Element* row(int i) const { return data + std::int64_t{i} * stride; }
};

// 16 rows of D columns as the left operand of mma: steps of 16 columns, and one of 8 for D = 72.
template <int D>
struct LeftOperand {
    std::uint32_t k16[D / 16][4];
    std::uint32_t k8[2];
};

template <int D>
DITFAST_DEVICE void load(LeftOperand<D>& a, Matrix<const Bits16> m, int first, int tokens) {
    const int lane = ptx::lane_again();
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        const int row = first + lane_row(lane) + 8 * half;
        const bool inside = row < tokens;  // rows past the last token count as zero
        const Bits16* from = m.row(inside ? row : 0) + lane_column(lane);
#pragma unroll
        for (int step = 0; step < D / 16; ++step) {
            a.k16[step][half] = inside ? ptx::load_word(from + 16 * step) : 0u;
            a.k16[step][half + 2] = inside ? ptx::load_word(from + 16 * step + 8) : 0u;
        }
        if constexpr (D % 16 == 8) a.k8[half] = inside ? ptx::load_word(from + D - 8) : 0u;
    }
}

// c (16, 16) = a b^T, with the 16 rows of b in shared memory.
template <class T, int D>
DITFAST_DEVICE void multiply_rows(float (&c)[2][4], const LeftOperand<D>& a, std::uint32_t b) {
#pragma unroll
    for (int i = 0; i < 4; ++i) c[0][i] = c[1][i] = 0.0f;
    // Order of matrices: rows 0..7, columns 0..7 and 8..15, then rows 8..15.
    const std::uint32_t rows = b + (ptx::lane() / 16 * 8 + ptx::lane() % 8) * kPitch + ptx::lane() / 8 % 2 * 16;
#pragma unroll
    for (int step = 0; step < D / 16; ++step) {
        std::uint32_t m[4];
        ptx::load_matrices(m, rows + step * 32);
        ptx::mma<T>(c[0], a.k16[step], m[0], m[1]);
        ptx::mma<T>(c[1], a.k16[step], m[2], m[3]);
    }
    if constexpr (D % 16 == 8) {
        std::uint32_t m[2];
        ptx::load_matrices(m, b + ptx::lane() % 16 * kPitch + D / 16 * 32);
        ptx::mma<T>(c[0], a.k8, m[0]);
        ptx::mma<T>(c[1], a.k8, m[1]);
    }
}

// c (16, D) += a (16, 16) b, with the 16 rows of b in shared memory.
template <class T, int D>
DITFAST_DEVICE void add_product(float (&c)[D / 8][4], const std::uint32_t (&a)[4], std::uint32_t b) {
    // Order of matrices: columns 0..7, rows 0..7 and 8..15, then columns 8..15.
    const std::uint32_t rows = b + ptx::lane() % 16 * kPitch;
#pragma unroll
    for (int pair = 0; pair < D / 16; ++pair) {
        std::uint32_t m[4];
        ptx::load_transposed(m, rows + pair * 32 + ptx::lane() / 16 * 16);
        ptx::mma<T>(c[2 * pair], a, m[0], m[1]);
        ptx::mma<T>(c[2 * pair + 1], a, m[2], m[3]);
    }
    if constexpr (D % 16 == 8) {
        std::uint32_t m[2];
        ptx::load_transposed(m, rows + D / 16 * 32);
        ptx::mma<T>(c[D / 8 - 1], a, m[0], m[1]);
    }
}

// A result (16, 16) as the left operand of the next product.
template <class T>
DITFAST_DEVICE void to_left_operand(std::uint32_t (&a)[4], const float (&c)[2][4]) {
#pragma unroll
    for (int i = 0; i < 4; ++i) a[i] = ptx::pack<T>(c[i / 2][i % 2 * 2], c[i / 2][i % 2 * 2 + 1]);
}

template <int D>
DITFAST_DEVICE void clear(float (&c)[D / 8][4]) {
#pragma unroll
    for (int n = 0; n < D / 8; ++n) {
#pragma unroll
        for (int i = 0; i < 4; ++i) c[n][i] = 0.0f;
    }
}

// factor * c, with one factor per row of the lane. Adjacent lanes swap halves of two column groups, so that
// each stores 8 bytes and a quad 32 contiguous ones.
template <class T, int D>
DITFAST_DEVICE void store(Matrix<Bits16> m, int first, int tokens, const float (&c)[D / 8][4],
                          const float (&factor)[2]) {
    const int lane = ptx::lane_again(), odd = lane % 2;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        const auto packed = [&](int n) {
            const float (&x)[4] = c[n];
            return ptx::pack<T>(x[2 * half] * factor[half], x[2 * half + 1] * factor[half]);
        };
        std::uint32_t words[D / 8];
#pragma unroll
        for (int n = 0; n + 1 < D / 8; n += 2) {
            const std::uint32_t low = packed(n), high = packed(n + 1);
            const std::uint32_t other = ptx::shuffle_xor(odd ? low : high, 1);
            words[n] = odd ? other : low;
            words[n + 1] = odd ? high : other;
        }
        if constexpr (D % 16 == 8) words[D / 8 - 1] = packed(D / 8 - 1);

        const int row = first + lane_row(lane) + 8 * half;
        if (row >= tokens) continue;
        Bits16* to = m.row(row) + lane_column(lane);
#pragma unroll
        for (int n = 0; n + 1 < D / 8; n += 2) {
            ptx::store_words(to + 8 * (n + odd) - 2 * odd, words[n], words[n + 1]);
        }
        if constexpr (D % 16 == 8) ptx::store_word(to + D - 8, words[D / 8 - 1]);
    }
}

}  // namespace ditfast
