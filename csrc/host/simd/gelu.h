#pragma once

#include "exp2.h"

// gelu(x) = x * sigmoid(z) with z = 2 * sqrt(2/pi) * (x + 0.044715 x^3). Unlike 1 + tanh, this does not cancel for
// negative x.

namespace ditfast::host::DITFAST_ISA {

constexpr float kSlopeAtZero = 1.5957691216057308f;  // dz/dx at x = 0
constexpr float kCubic = 0.044715f;
constexpr float kLog2E = 1.4426950408889634f;
constexpr float kEnd = 10.0f;  // where exp(z) leaves float32

struct Sigmoid {
    Vec value;
    Vec rest;  // 1 - value, without cancellation
};

inline Vec within_ends(Vec x) { return at_most(at_least(x, splat(-kEnd)), splat(kEnd)); }

// To the left of -kEnd it is zero, so that gelu(-infinity) is NaN as in PyTorch.
template <class T>
inline Sigmoid sigmoid_of(Vec x) {
    const Vec inner = within_ends(x), square = inner * inner;
    const Vec e = exp2<T>(inner * (square * (-kSlopeAtZero * kCubic * kLog2E) - kSlopeAtZero * kLog2E));  // exp(-z)
    const Vec value = x < splat(-kEnd) ? splat(0.0f) : reciprocal(1.0f + e);
    return {value, e * value};
}

// The derivative of gelu: 0 and 1 beyond the ends, where x itself would multiply what is left of the sigmoid; NaN at
// infinity, as in PyTorch.
inline Vec derivative(Vec x, Sigmoid sigmoid) {
    const Vec inner = within_ends(x);
    const Vec slope = inner * inner * (3 * kCubic * kSlopeAtZero) + kSlopeAtZero;  // dz/dx
    return sigmoid.rest * (inner * sigmoid.value * slope) + (sigmoid.value + (x - x));
}

template <class T>
inline Vec gelu(Vec x) {
    return x * sigmoid_of<T>(x).value;
}

}  // namespace ditfast::host::DITFAST_ISA
