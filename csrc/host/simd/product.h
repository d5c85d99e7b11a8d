#pragma once

#include "vec.h"

// Products of small matrices in registers: c = a b, from broadcast words of a and vectors of columns of b. Along the
// summed dimension, a word holds one float32, or two bfloat16 if the tensors are bfloat16 and the CPU can multiply
// such pairs.

namespace ditfast::host::DITFAST_ISA {

#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int kColumns = 4;      // vectors per panel: 32 registers hold 6 rows of them
constexpr int kMostColumns = 5;  // maximum, for products with few rows at a time
#else
constexpr int kColumns = 2;
constexpr int kMostColumns = 2;
#endif
constexpr std::int64_t kPanel = kColumns * kLanes;

struct Singles {
    static constexpr std::int64_t kNumbers = 1;  // per word

    static Vec multiply_add(Vec c, Vec a, Vec b) { return c + a * b; }
    static Vec join(Vec x, Vec) { return x; }

    // Stores x from number `first` of a row of words on.
    static void store_numbers(float* row, std::int64_t first, Vec x) { store(row + first, x); }
    static Vec load_numbers(const float* row, std::int64_t first) { return load(row + first); }
};

#if defined(__AVX512BF16__)
struct Pairs {
    static constexpr std::int64_t kNumbers = 2;

    static Vec multiply_add(Vec c, Vec a, Vec b) {
        return _mm512_dpbf16_ps(c, reinterpret_cast<__m512bh>(a), reinterpret_cast<__m512bh>(b));
    }

    // Words made of a first and a second number each.
    static Vec join(Vec first, Vec second) {
        const Bits low = extend(reinterpret_cast<Halves>(_mm512_cvtneps_pbh(first)));
        const Bits high = extend(reinterpret_cast<Halves>(_mm512_cvtneps_pbh(second)));
        return vec_of(low | (high << 16));
    }

    static void store_numbers(float* row, std::int64_t first, Vec x) {
        const __m256bh numbers = _mm512_cvtneps_pbh(x);
        std::memcpy(reinterpret_cast<BFloat16*>(row) + first, &numbers, sizeof numbers);
    }

    static Vec load_numbers(const float* row, std::int64_t first) {
        return load(reinterpret_cast<const BFloat16*>(row) + first);
    }
};
#endif

template <class T>
struct WordsOf {
    typedef Singles type;
};
#if defined(__AVX512BF16__)
template <>
struct WordsOf<BFloat16> {
    typedef Pairs type;
};
#endif

// A matrix of words; strides in words.
struct Words {
    const float* data;
    std::int64_t stride_row;
    std::int64_t stride_inner;  // along the summed dimension
};

template <class W, int kRows, int kCols>
inline __attribute__((always_inline)) void multiply(Words a, const float* b, std::int64_t stride_b, std::int64_t inner,
                                                    Vec (&c)[kRows][kCols]) {
    for (auto& row : c) {
        for (Vec& x : row) x = Vec{};
    }
    for (std::int64_t k = 0; k < inner; ++k) {
        Vec columns[kCols];
        for (int j = 0; j < kCols; ++j) columns[j] = load(b + k * stride_b + j * kLanes);
        for (int i = 0; i < kRows; ++i) {
            const Vec word = splat(a.data[i * a.stride_row + k * a.stride_inner]);
            for (int j = 0; j < kCols; ++j) c[i][j] = W::multiply_add(c[i][j], word, columns[j]);
        }
    }
}

// Calls finish(row, c) for the rows of c = a b, several at a time; c is an array of that many rows. Rows come in even
// numbers, as words of two numbers need, except for an odd last one. Inlined, with the loops of `finish` unrolled: an
// array that is passed on or indexed by a variable leaves the registers.
template <class W, int kRows, int kCols, class Finish>
inline __attribute__((always_inline)) void multiply_rows(Words a, const float* b, std::int64_t stride_b,
                                                         std::int64_t rows, std::int64_t inner, const Finish& finish) {
    std::int64_t row = 0;
    const auto run = [&](auto& c) {
        multiply<W>({a.data + row * a.stride_row, a.stride_row, a.stride_inner}, b, stride_b, inner, c);
        finish(row, c);
    };
    for (; row + kRows <= rows; row += kRows) {
        Vec c[kRows][kCols];
        run(c);
    }
    for (; row + 4 <= rows; row += 4) {
        Vec c[4][kCols];
        run(c);
    }
    for (; row + 2 <= rows; row += 2) {
        Vec c[2][kCols];
        run(c);
    }
    if (row < rows) {
        Vec c[1][kCols];
        run(c);
    }
}

// The same with the sum in pieces of `piece` words, which finish(row, c, first) adds up; `first` is where the piece
// starts. The rounding error of a sum grows with the number of terms added in one register.
template <class W, int kRows, int kCols, class Finish>
inline __attribute__((always_inline)) void multiply_in_pieces(std::int64_t piece, Words a, const float* b,
                                                              std::int64_t stride_b, std::int64_t rows,
                                                              std::int64_t inner, const Finish& finish) {
    for (std::int64_t first = 0; first < inner; first += piece) {
        const Words part{a.data + first * a.stride_inner, a.stride_row, a.stride_inner};
        multiply_rows<W, kRows, kCols>(part, b + first * stride_b, stride_b, rows, smaller(piece, inner - first),
                                       [&](std::int64_t row, auto& c) { finish(row, c, first); });
    }
}

}  // namespace ditfast::host::DITFAST_ISA
