#pragma once

#include "vec.h"

namespace ditfast::host::DITFAST_ISA {

constexpr float kZeroExponent = -127.0f;

// 2^x for x in [-126, 126]; zero at kZeroExponent, NaN for NaN, anything elsewhere. Relative error: 1 ulp of float32 if
// T is float, else 4 ulp, far below the rounding to 16 bits.
template <class T>
inline Vec exp2(Vec x) {
    // Adding this leaves round(x) + 127, a float32 exponent, in the lowest bits.
    constexpr float kShift = 0x1.8p23f + 127.0f;
    const Vec shifted = x + kShift;
    const Vec f = x - (shifted - kShift);  // -0.5 .. 0.5
    // Minimax polynomials of 2^f there (Lawson's iteration, relative error).
    Vec p;
    if constexpr (sizeof(T) == sizeof(float)) {
        p = 1.534581242e-4f * f + 1.339993090e-3f;
        p = p * f + 9.618489071e-3f;
    } else {
        p = 1.327647245e-3f * f + 9.675540961e-3f;
    }
    if constexpr (sizeof(T) == sizeof(float)) {
        p = p * f + 5.550328642e-2f;
        p = p * f + 2.402264625e-1f;
        p = p * f + 6.931471825e-1f;
    } else {
        p = p * f + 5.550713092e-2f;
        p = p * f + 2.402212024e-1f;
        p = p * f + 6.931469440e-1f;
    }
    p = p * f + 1.0f;
    return p * vec_of(bits_of(shifted) << 23);
}

}  // namespace ditfast::host::DITFAST_ISA
