#pragma once

#include "exp2.h"

// gelu(x) = x * sigmoid(z) with z = 2 * sqrt(2/pi) * (x + 0.044715 x^3). Unlike 1 + tanh, this does not cancel for
// negative x.

namespace ditfast::host::DITFAST_ISA {

constexpr float kSlopeAtZero = 1.5957691216057308f;  // dz/dx at x = 0
constexpr float kCubic = 0.044715f;
constexpr float kLog2E = 1.4426950408889634f;

struct Sigmoid {
    Vec value;
    Vec rest;  // 1 - value, without cancellation
};

template <class T>
inline Sigmoid sigmoid_of(Vec x, Vec square) {
    Vec z = x * (square * (-kSlopeAtZero * kCubic * kLog2E) - kSlopeAtZero * kLog2E);
    z = at_most(at_least(z, splat(-126.0f)), splat(126.0f));
    const Vec e = exp2<T>(z);  // exp(-z), finite: infinity times a sigmoid of zero would be NaN
    const Vec value = reciprocal(1.0f + e);
    return {value, e * value};
}

template <class T>
inline Vec gelu(Vec x) {
    return x * sigmoid_of<T>(x, x * x).value;
}

}  // namespace ditfast::host::DITFAST_ISA
