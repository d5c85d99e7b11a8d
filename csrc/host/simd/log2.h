#pragma once

#include "vec.h"

namespace ditfast::host::DITFAST_ISA {

// log2 of x, a normal number; -inf of zero, NaN of NaN. 2 ulp of float32 or of 1, whichever is larger.
inline Vec log2(Vec x) {
    const Bits offset = bits_of(x) - 0x3f3504f3u;  // bits of sqrt(1/2): m is in [sqrt(1/2), sqrt(2))
    const Mask exponent = reinterpret_cast<Mask>(offset) >> 23;
    const Vec m = vec_of((offset & 0x007fffffu) + 0x3f3504f3u);
    const Vec t = (m - 1.0f) / (m + 1.0f), square = t * t;
    Vec series = square * (1.0f / 9) + 1.0f / 7;  // ln m = 2 artanh t
    series = series * square + 1.0f / 5;
    series = series * square + 1.0f / 3;
    series = series * square * t + t;
    const Vec result = series * (2 * 1.4426950408889634f) + __builtin_convertvector(exponent, Vec);
    return x > 0.0f ? result : (x == 0.0f ? splat(-__builtin_inff()) : x);
}

}  // namespace ditfast::host::DITFAST_ISA
