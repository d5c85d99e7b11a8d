#pragma once

#include "vec.h"

namespace ditfast::host::DITFAST_ISA {

// Rows become columns.
inline void transpose(Vec (&rows)[kLanes]) {
#if defined(__AVX512F__)
    Vec pairs[16];
    const auto quads = [](Vec a, Vec b) {
        return _mm512_castpd_ps(_mm512_unpacklo_pd(_mm512_castps_pd(a), _mm512_castps_pd(b)));
    };
    const auto other_quads = [](Vec a, Vec b) {
        return _mm512_castpd_ps(_mm512_unpackhi_pd(_mm512_castps_pd(a), _mm512_castps_pd(b)));
    };
    for (int i = 0; i < 16; i += 2) {
        pairs[i] = _mm512_unpacklo_ps(rows[i], rows[i + 1]);
        pairs[i + 1] = _mm512_unpackhi_ps(rows[i], rows[i + 1]);
    }
    for (int i = 0; i < 16; i += 4) {
        rows[i] = quads(pairs[i], pairs[i + 2]);
        rows[i + 1] = other_quads(pairs[i], pairs[i + 2]);
        rows[i + 2] = quads(pairs[i + 1], pairs[i + 3]);
        rows[i + 3] = other_quads(pairs[i + 1], pairs[i + 3]);
    }
    for (int i = 0; i < 4; ++i) {
        pairs[i] = _mm512_shuffle_f32x4(rows[i], rows[i + 4], 0x88);
        pairs[i + 4] = _mm512_shuffle_f32x4(rows[i], rows[i + 4], 0xdd);
        pairs[i + 8] = _mm512_shuffle_f32x4(rows[i + 8], rows[i + 12], 0x88);
        pairs[i + 12] = _mm512_shuffle_f32x4(rows[i + 8], rows[i + 12], 0xdd);
    }
    for (int i = 0; i < 4; ++i) {
        rows[i] = _mm512_shuffle_f32x4(pairs[i], pairs[i + 8], 0x88);
        rows[i + 4] = _mm512_shuffle_f32x4(pairs[i + 4], pairs[i + 12], 0x88);
        rows[i + 8] = _mm512_shuffle_f32x4(pairs[i], pairs[i + 8], 0xdd);
        rows[i + 12] = _mm512_shuffle_f32x4(pairs[i + 4], pairs[i + 12], 0xdd);
    }
#else
    float columns[kLanes][kLanes];
    for (int r = 0; r < kLanes; ++r) {
        for (int c = 0; c < kLanes; ++c) columns[c][r] = rows[r][c];
    }
    std::memcpy(rows, columns, sizeof columns);
#endif
}

}  // namespace ditfast::host::DITFAST_ISA
