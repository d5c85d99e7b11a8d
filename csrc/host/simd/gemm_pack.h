#pragma once

#include "transpose.h"

// The operands of a large product in the order in which its tiles read them. `inner` is what is summed over.

namespace ditfast::host::DITFAST_ISA {

#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int kTileRows = 12, kTileColumns = 2;  // 24 sums, 2 columns and a factor in 32 registers
#else
constexpr int kTileRows = 6, kTileColumns = 2;
#endif
constexpr std::int64_t kTileWidth = kTileColumns * kLanes;
constexpr std::int64_t kPiece = 256;               // of inner, in one chain of additions
constexpr std::int64_t kLeftStride = kPiece + 16;  // not a power of two, which would crowd a few sets of the cache

inline std::int64_t ceil_div(std::int64_t a, std::int64_t b) { return (a + b - 1) / b; }

// The part of a matrix from one row and one inner index on.
inline Matrix part_of(const Matrix& m, std::int64_t row, std::int64_t inner) {
    return {m.data + row * m.stride_row + inner * m.stride_inner, m.stride_row, m.stride_inner};
}

// to[k][kTileWidth]: a panel of rows, zeros for those that are missing.
inline void pack_right(const Matrix& from, std::int64_t rows, std::int64_t inner, float* to) {
    if (from.stride_inner != 1) {
        for (std::int64_t k = 0; k < inner; ++k) {
            for (std::int64_t block = 0; block < kTileWidth; block += kLanes) {
                const float* row = from.data + k * from.stride_inner + block;
                const std::int64_t lanes = rows - block;
                const Vec x = lanes >= kLanes ? load(row) : lanes > 0 ? load(row, Part{lanes}) : Vec{};
                store(to + k * kTileWidth + block, x);
            }
        }
        return;
    }
    constexpr std::int64_t kAhead = 32;  // floats: so many rows at a time are more than the CPU would fetch by itself
    for_each_vector(inner, [&](std::int64_t k, auto extent) {
        for (std::int64_t block = 0; block < kTileWidth; block += kLanes) {
            Vec square[kLanes] = {};
            for (std::int64_t i = 0; i < smaller(kLanes, rows - block); ++i) {
                const float* row = from.data + (block + i) * from.stride_row + k;
                __builtin_prefetch(row + kAhead);
                square[i] = load(row, extent);
            }
            transpose(square);
            for (std::int64_t i = 0; i < smaller(kLanes, inner - k); ++i) {
                store(to + (k + i) * kTileWidth + block, square[i]);
            }
        }
    });
}

// A copy of kTileRows rows whose inner elements lie next to each other: to[row][kLeftStride].
inline void copy_rows(const Matrix& from, std::int64_t rows, std::int64_t inner, float* to) {
    for (std::int64_t row = 0; row < kTileRows; ++row) {
        for_each_vector(inner, [&](std::int64_t k, auto extent) {
            store(to + row * kLeftStride + k, row < rows ? load(from.data + row * from.stride_row + k, extent) : Vec{});
        });
    }
}

// A copy of kTileRows rows that lie next to each other: to[k][kTileRows], and up to a vector behind.
inline void copy_columns(const Matrix& from, std::int64_t rows, std::int64_t inner, float* to) {
    for (std::int64_t k = 0; k < inner; ++k) {
        for (std::int64_t row = 0; row < kTileRows; row += kLanes) {
            const float* first = from.data + k * from.stride_inner + row;
            const std::int64_t lanes = smaller(kTileRows, rows) - row;
            const Vec x = lanes >= kLanes ? load(first) : lanes > 0 ? load(first, Part{lanes}) : Vec{};
            store(to + k * kTileRows + row, x);  // the next k overwrites what is too much
        }
    }
}

// The cache lines of a rectangle that is used soon, fetched some at a time.
class Ahead {
  public:
    Ahead() = default;
    Ahead(const Matrix& m, std::int64_t rows, std::int64_t inner) : row_(m.data) {
        const bool is_dense = m.stride_inner == 1;
        stride_ = is_dense ? m.stride_row : m.stride_inner;
        length_ = is_dense ? inner : rows;
        count_ = ceil_div(length_, kLine) * (is_dense ? rows : inner);
    }

    std::int64_t count() const { return count_; }

    void fetch(std::int64_t count) {
        for (count = smaller(count, count_); count > 0; --count, --count_) {
            __builtin_prefetch(row_ + at_, 0, 2);
            at_ += kLine;
            if (at_ < length_) continue;
            at_ = 0;
            row_ += stride_;
        }
    }

  private:
    static constexpr std::int64_t kLine = 16;
    const float* row_ = nullptr;
    std::int64_t stride_ = 0, length_ = 0, count_ = 0, at_ = 0;
};

}  // namespace ditfast::host::DITFAST_ISA
