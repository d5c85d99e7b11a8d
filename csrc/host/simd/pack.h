#pragma once

#include "product.h"
#include "transpose.h"

// One head of a tensor, N rows of d elements, packed as words in the order that the products read. Padding is zero.

namespace ditfast::host::DITFAST_ISA {

template <class T>
struct Rows {
    const T* data;
    std::int64_t stride;

    const T* operator[](std::int64_t row) const { return data + row * stride; }
};

inline std::int64_t words(std::int64_t numbers, std::int64_t in_a_word) {
    return (numbers + in_a_word - 1) / in_a_word;
}

// `extent` words along d of one row, starting at word `first`.
template <class W, class T, class Extent>
inline Vec row_words(const T* row, std::int64_t d, std::int64_t first, Extent extent) {
    if constexpr (W::kNumbers == 1) {
        return load(row + first, extent);
    } else {
        const std::int64_t numbers = d - 2 * first;
        if (numbers >= 2 * kLanes) return read_as<Vec>(row + 2 * first);
        // an odd last number gets its own word, padded with zero
        const Vec pairs =
            numbers > 1 ? read_part(reinterpret_cast<const float*>(row) + first, Part{numbers / 2}) : Vec{};
        if (numbers % 2 == 0) return pairs;
        Bits all = bits_of(pairs);
        all[numbers / 2] = row[d - 1].bits;
        return vec_of(all);
    }
}

// to[k][n]: word k along d of row `first` + n, for a panel of rows.
template <class W, class T>
inline void pack_panel(const Rows<T>& from, std::int64_t first, std::int64_t n, std::int64_t d, float* to) {
    const std::int64_t rows = smaller(kPanel, n - first);
    for (std::int64_t block = 0; block < kPanel; block += kLanes) {
        for_each_vector(words(d, W::kNumbers), [&](std::int64_t k, auto extent) {
            Vec square[kLanes] = {};
            for (std::int64_t i = 0; i < smaller(kLanes, rows - block); ++i) {
                square[i] = row_words<W>(from[first + block + i], d, k, extent);
            }
            transpose(square);
            const std::int64_t used = smaller(kLanes, words(d, W::kNumbers) - k);
            for (std::int64_t i = 0; i < used; ++i) store(to + (k + i) * kPanel + block, square[i]);
        });
    }
}

// to[k][c]: word k along the rows of column c. k advances by `stride` floats, a multiple of kLanes.
template <class W, class T>
inline void pack_columns(const Rows<T>& from, std::int64_t n, std::int64_t d, float* to, std::int64_t stride) {
    for (std::int64_t k = 0; k < words(n, W::kNumbers); ++k) {
        for_each_vector(d, [&](std::int64_t c, auto extent) {
            const Vec first = load(from[k * W::kNumbers] + c, extent);
            if constexpr (W::kNumbers == 1) return store(to + k * stride + c, first);
            const bool has_second = 2 * k + 1 < n;
            // bfloat16 is the upper half of float32
            const Bits second = has_second ? bits_of(load(from[2 * k + 1] + c, extent)) : Bits{};
            store(to + k * stride + c, vec_of((bits_of(first) >> 16) | second));
        });
    }
}

// Words along d as the left operand of a product, copied to `to`: read in place, each row lies on another page, which
// costs a tenth of the product.
template <class W, class T>
inline Words left_words(const Rows<T>& from, std::int64_t n, std::int64_t d, float* to) {
    const std::int64_t stride = padded(words(d, W::kNumbers));
    for (std::int64_t r = 0; r < n; ++r) {
        for_each_vector(words(d, W::kNumbers), [&](std::int64_t k, auto extent) {
            store(to + r * stride + k, row_words<W>(from[r], d, k, extent));
        });
    }
    return {to, stride, 1};
}

inline std::int64_t left_words_size(std::int64_t n, std::int64_t d) { return n * padded(d); }

// The reverse: from[c][n], a panel of columns, becomes rows `first` + n of `to`, each times factor[n].
template <class T>
inline void store_panel(const float* from, const Vec (&factor)[kColumns], T* to, std::int64_t stride,
                        std::int64_t first, std::int64_t n, std::int64_t d, float* sums) {
    for (std::int64_t block = 0; block < smaller(kPanel, n - first); block += kLanes) {
        for_each_vector(d, [&](std::int64_t c, auto extent) {
            Vec square[kLanes] = {};
            for (std::int64_t i = 0; i < smaller(kLanes, d - c); ++i) {
                square[i] = load(from + (c + i) * kPanel + block) * factor[block / kLanes];
            }
            transpose(square);
            Vec sum = sums ? load(sums + c) : Vec{};
            for (std::int64_t i = 0; i < smaller(kLanes, n - first - block); ++i) {
                store(to + (first + block + i) * stride + c, square[i], extent);
                sum += square[i];
            }
            if (sums) store(sums + c, sum);
        });
    }
}

}  // namespace ditfast::host::DITFAST_ISA
