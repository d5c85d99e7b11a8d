#include "kernels.h"
#include "vec.h"

// The square of a float32 is exact in float64, and these sums are added up in one order: all instruction sets give the
// same bits.

namespace ditfast::host::DITFAST_ISA {
namespace {

constexpr int kSums = 32;
constexpr int kVectors = kSums / kLanes;

template <class T>
inline void add_squares(const T* x, Wide (&sums)[2 * kVectors]) {
    for (int v = 0; v < kVectors; ++v) {
        const Vec values = load(x + v * kLanes);
        const Wide lower = widen_half<0>(values), upper = widen_half<1>(values);
        sums[2 * v] += lower * lower;
        sums[2 * v + 1] += upper * upper;
    }
}

template <class T>
double sum(const T* x, std::int64_t n) {
    Wide vectors[2 * kVectors] = {};
    std::int64_t i = 0;
    for (; i + kSums <= n; i += kSums) add_squares(x + i, vectors);
    T rest[kSums] = {};
    std::memcpy(rest, x + i, static_cast<std::size_t>(n - i) * sizeof(T));
    add_squares(rest, vectors);
    double sums[kSums];
    std::memcpy(sums, vectors, sizeof sums);
    for (int half = kSums / 2; half > 0; half /= 2) {
        for (int k = 0; k < half; ++k) sums[k] += sums[k + half];
    }
    return sums[0];
}

}  // namespace

double sum_of_squares(DType dtype, const void* data, std::int64_t n) {
    double found = 0;
    with_type(dtype, [&](auto zero) { found = sum(static_cast<const decltype(zero)*>(data), n); });
    return found;
}

}  // namespace ditfast::host::DITFAST_ISA
