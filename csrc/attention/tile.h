#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "number.h"

namespace ditfast {

// A small row-major fp32 matrix.
class Tile {
  public:
    Tile(std::int64_t rows, std::int64_t cols) : cols_(cols), data_(static_cast<std::size_t>(rows * cols)) {}

    float* operator[](std::int64_t row) { return data_.data() + row * cols_; }
    const float* operator[](std::int64_t row) const { return data_.data() + row * cols_; }
    void clear() { std::fill(data_.begin(), data_.end(), 0.0f); }

  private:
    std::int64_t cols_;
    std::vector<float> data_;
};

// A strided matrix in the caller's memory, one row per token.
template <class T>
struct Rows {
    T* data;
    std::int64_t stride_row;
    std::int64_t stride_col;

    T& at(std::int64_t row, std::int64_t col) const { return data[row * stride_row + col * stride_col]; }
};

template <class T>
void load(Tile& tile, const Rows<const T>& from, std::int64_t first, std::int64_t rows, std::int64_t cols) {
    for (std::int64_t r = 0; r < rows; ++r) {
        for (std::int64_t c = 0; c < cols; ++c) tile[r][c] = to_float(from.at(first + r, c));
    }
}

template <class T>
void load_transposed(Tile& tile, const Rows<const T>& from, std::int64_t first, std::int64_t rows,
                     std::int64_t cols) {
    for (std::int64_t r = 0; r < rows; ++r) {
        for (std::int64_t c = 0; c < cols; ++c) tile[c][r] = to_float(from.at(first + r, c));
    }
}

template <class T>
void store(const Tile& tile, const Rows<T>& to, std::int64_t first, std::int64_t rows, std::int64_t cols) {
    for (std::int64_t r = 0; r < rows; ++r) {
        for (std::int64_t c = 0; c < cols; ++c) to.at(first + r, c) = from_float<T>(tile[r][c]);
    }
}

// y += a * x. No term is skipped, so that 0 * inf gives NaN, as in a plain matrix product.
inline void add_scaled(float* __restrict y, float a, const float* __restrict x, std::int64_t size) {
    for (std::int64_t i = 0; i < size; ++i) y[i] += a * x[i];
}

// c (rows, cols) += a (rows, inner) b (inner, cols)
inline void add_product(Tile& c, const Tile& a, const Tile& b, std::int64_t rows, std::int64_t inner,
                        std::int64_t cols) {
    for (std::int64_t r = 0; r < rows; ++r) {
        for (std::int64_t i = 0; i < inner; ++i) add_scaled(c[r], a[r][i], b[i], cols);
    }
}

// c (rows, cols) += a^T b, with a (inner, rows) and b (inner, cols)
inline void add_transposed_product(Tile& c, const Tile& a, const Tile& b, std::int64_t rows,
                                   std::int64_t inner, std::int64_t cols) {
    for (std::int64_t i = 0; i < inner; ++i) {
        for (std::int64_t r = 0; r < rows; ++r) add_scaled(c[r], a[i][r], b[i], cols);
    }
}

}  // namespace ditfast
