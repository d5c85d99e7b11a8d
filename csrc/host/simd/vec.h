#pragma once

#include <cstdint>
#include <cstring>

#include "../calls.h"

#if defined(__AVX__)
#include <immintrin.h>
#endif

// Vectors of float32, as wide as the instruction set's, built on the vector extensions of GCC and Clang; intrinsics do
// what the extensions cannot. Everything is in the instruction set's namespace, so that the linker cannot mix variants.

namespace ditfast::host::DITFAST_ISA {

#if defined(__AVX512F__)
constexpr int kLanes = 16;
#elif defined(__AVX__)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif

typedef float Vec __attribute__((vector_size(4 * kLanes)));
typedef double Wide __attribute__((vector_size(4 * kLanes)));        // half as many, of float64
typedef std::int32_t Mask __attribute__((vector_size(4 * kLanes)));  // lanes of all ones or of zero
typedef std::uint32_t Bits __attribute__((vector_size(4 * kLanes)));
typedef std::uint16_t Halves __attribute__((vector_size(2 * kLanes)));

struct BFloat16 {
    std::uint16_t bits;
};

struct Float16 {
    std::uint16_t bits;
};

inline Vec splat(float x) { return x - Vec{}; }
inline Bits splat_bits(std::uint32_t x) { return x + Bits{}; }
inline Bits bits_of(Vec x) { return reinterpret_cast<Bits>(x); }
inline Vec vec_of(Bits x) { return reinterpret_cast<Vec>(x); }

template <class To, class From>
inline To read_as(const From* from) {
    To to;
    std::memcpy(&to, from, sizeof to);
    return to;
}

// The larger of the two, or x if it is NaN: a bound must not hide NaN.
inline Vec at_least(Vec x, Vec bound) {
#if defined(__AVX512F__)
    return _mm512_max_ps(bound, x);
#elif defined(__AVX__)
    return _mm256_max_ps(bound, x);
#else
    return bound > x ? bound : x;
#endif
}

inline Vec at_most(Vec x, Vec bound) {
#if defined(__AVX512F__)
    return _mm512_min_ps(bound, x);
#elif defined(__AVX__)
    return _mm256_min_ps(bound, x);
#else
    return bound < x ? bound : x;
#endif
}

// x as it is rounded: the compiler may otherwise contract a product and the sum that takes it, which rounds only once.
inline Vec uncontracted(Vec x) {
#if defined(__x86_64__)
    __asm__("" : "+v"(x));
#elif defined(__aarch64__)
    __asm__("" : "+w"(x));
#endif
    return x;
}

// 1 / x to 2 ulp, for normal x whose reciprocal is normal.
inline Vec reciprocal(Vec x) {
#if defined(__AVX512F__)
    const Vec r = _mm512_rcp14_ps(x);
    return r * (2.0f - x * r);
#else
    return 1.0f / x;
#endif
}

inline float sum_lanes(Vec x) {
#if defined(__AVX512F__)
    return _mm512_reduce_add_ps(x);
#else
    float sums[4] = {};
    for (int i = 0; i < kLanes; ++i) sums[i % 4] += x[i];
    return (sums[0] + sums[2]) + (sums[1] + sums[3]);
#endif
}

// One half of x in float64.
template <int kHalf>
inline Wide widen_half(Vec x) {
#if defined(__AVX512F__)
    return _mm512_cvtps_pd(_mm512_extractf32x8_ps(x, kHalf));
#elif defined(__AVX__)
    return _mm256_cvtps_pd(_mm256_extractf128_ps(x, kHalf));
#else
    Wide wide;
    for (int i = 0; i < kLanes / 2; ++i) wide[i] = x[kHalf * kLanes / 2 + i];
    return wide;
#endif
}

inline Bits extend(Halves x) {
#if defined(__AVX512F__)
    return reinterpret_cast<Bits>(_mm512_cvtepu16_epi32(reinterpret_cast<__m256i>(x)));
#elif defined(__AVX2__)
    return reinterpret_cast<Bits>(_mm256_cvtepu16_epi32(reinterpret_cast<__m128i>(x)));
#else
    return __builtin_convertvector(x, Bits);
#endif
}

// The lower halves.
inline Halves truncate(Bits x) {
#if defined(__AVX512F__)
    return reinterpret_cast<Halves>(_mm512_cvtepi32_epi16(reinterpret_cast<__m512i>(x)));
#else
    return __builtin_convertvector(x, Halves);
#endif
}

// ---- loads: always to float32

inline Vec widen(const float*, Vec x) { return x; }
inline Vec widen(const BFloat16*, Halves x) { return vec_of(extend(x) << 16); }

inline Vec widen(const Float16*, Halves x) {
#if defined(__AVX512F__)
    return _mm512_cvtph_ps(reinterpret_cast<__m256i>(x));
#elif defined(__F16C__)
    return _mm256_cvtph_ps(reinterpret_cast<__m128i>(x));
#else
    const Bits wide = extend(x);
    const Bits magnitude = (wide & 0x7fffu) << 13, sign = (wide & 0x8000u) << 16;
    const Bits finite = bits_of(vec_of(magnitude) * 0x1p112f);  // the exponent's bias grows from 15 to 127
    const Bits special = magnitude | 0x7f800000u;               // infinity, NaN
    return vec_of(sign | ((magnitude >= 0x0f800000u) ? special : finite));
#endif
}

template <class T>
struct Raw {
    typedef Halves type;
};
template <>
struct Raw<float> {
    typedef Vec type;
};

// ---- stores: rounded to nearest, ties to even; subnormals, infinities and NaN are kept

inline Vec narrow(const float*, Vec x) { return x; }

inline Halves narrow_in_integers(Vec x) {
    const Bits bits = bits_of(x);
    const Bits rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    const Bits nan = (bits >> 16) | 0x0040u;  // rounding could carry it into infinity
    return truncate((x != x) ? nan : rounded);
}

inline Halves narrow(const BFloat16*, Vec x) {
#if defined(__AVX512BF16__)
    // the instruction flushes subnormals to zero
    if (__builtin_expect(_mm512_fpclass_ps_mask(x, 0x20) != 0, 0)) return narrow_in_integers(x);
    return reinterpret_cast<Halves>(_mm512_cvtneps_pbh(x));
#else
    return narrow_in_integers(x);
#endif
}

inline Halves narrow(const Float16*, Vec x) {
#if defined(__AVX512F__)
    return reinterpret_cast<Halves>(_mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
#elif defined(__F16C__)
    return reinterpret_cast<Halves>(_mm256_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
#else
    const Bits bits = bits_of(x), sign = (bits >> 16) & 0x8000u, magnitude = bits & 0x7fffffffu;
    const Bits normal = (magnitude - (112u << 23) + 0x0fffu + ((magnitude >> 13) & 1u)) >> 13;
    // next to 0.5, one float32 ulp is exactly 2^-24, float16's smallest
    const Bits subnormal = bits_of(vec_of(magnitude) + 0.5f) - 0x3f000000u;
    Bits rounded = magnitude < 0x38800000u ? subnormal : normal;
    rounded = magnitude >= 0x47800000u ? splat_bits(0x7c00u) : rounded;  // 2^16 and above
    rounded = magnitude > 0x7f800000u ? splat_bits(0x7e00u) : rounded;   // NaN
    return truncate(sign | rounded);
#endif
}

// ---- whole vectors, and partial ones at the end of a row

struct Whole {};

struct Part {
    std::int64_t lanes;  // 1 .. kLanes - 1
};

template <class T>
inline Vec load(const T* from, Whole = {}) {
    return widen(from, read_as<typename Raw<T>::type>(from));
}

template <class T, class R>
inline void store_narrow(T* to, R raw, Whole) {
    std::memcpy(to, &raw, sizeof raw);
}

#if defined(__AVX512F__)
inline __mmask16 mask_of(Part part) { return static_cast<__mmask16>((1u << part.lanes) - 1u); }
inline Vec read_part(const float* from, Part part) { return _mm512_maskz_loadu_ps(mask_of(part), from); }
inline void store_narrow(float* to, Vec raw, Part part) { _mm512_mask_storeu_ps(to, mask_of(part), raw); }

template <class T>
inline Halves read_part(const T* from, Part part) {
    return reinterpret_cast<Halves>(_mm256_maskz_loadu_epi16(mask_of(part), from));
}

template <class T>
inline void store_narrow(T* to, Halves raw, Part part) {
    _mm256_mask_storeu_epi16(to, mask_of(part), reinterpret_cast<__m256i>(raw));
}
#else
template <class T>
inline typename Raw<T>::type read_part(const T* from, Part part) {
    typename Raw<T>::type raw{};
    std::memcpy(&raw, from, static_cast<std::size_t>(part.lanes) * sizeof(T));
    return raw;
}

template <class T, class R>
inline void store_narrow(T* to, R raw, Part part) {
    std::memcpy(to, &raw, static_cast<std::size_t>(part.lanes) * sizeof(T));
}
#endif

template <class T>
inline void store(T* to, Vec x, Whole = {}) {
    store_narrow(to, narrow(to, x), Whole{});
}

template <class T>
inline void store(T* to, Vec x, Part part) {
    store_narrow(to, narrow(to, x), part);
}

// The lanes past the part are zero.
template <class T>
inline Vec load(const T* from, Part part) {
    return widen(from, read_part(from, part));
}

inline Vec keep(Vec x, Whole) { return x; }

// x with zeros past the part.
inline Vec keep(Vec x, Part part) {
#if defined(__AVX512F__)
    return _mm512_maskz_mov_ps(mask_of(part), x);
#else
    Vec kept{};
    std::memcpy(&kept, &x, static_cast<std::size_t>(part.lanes) * sizeof(float));
    return kept;
#endif
}

// Calls body(i, extent) for each vector of a row of n elements; the last may be a part.
template <class Body>
inline void for_each_vector(std::int64_t n, const Body& body) {
    std::int64_t i = 0;
    for (; i + kLanes <= n; i += kLanes) body(i, Whole{});
    if (i < n) body(i, Part{n - i});
}

// n rounded up to whole vectors: the size of a float32 row that is read and written in whole vectors.
inline std::int64_t padded(std::int64_t n) { return (n + kLanes - 1) / kLanes * kLanes; }

inline std::int64_t smaller(std::int64_t a, std::int64_t b) { return a < b ? a : b; }
inline std::int64_t larger(std::int64_t a, std::int64_t b) { return a < b ? b : a; }

// Calls f(T{}) with the element type T of a dtype.
template <class F>
inline void with_type(DType dtype, const F& f) {
    switch (dtype) {
        case DType::kFloat32:
            return f(float{});
        case DType::kBFloat16:
            return f(BFloat16{});
        case DType::kFloat16:
            return f(Float16{});
    }
}

// A row in float32, padded with zeros; absent rows are all zero.
inline void widen_row(const void* from, DType dtype, std::int64_t n, float* to) {
    with_type(dtype, [&](auto zero) {
        const auto* typed = static_cast<const decltype(zero)*>(from);
        for_each_vector(n, [&](std::int64_t i, auto extent) { store(to + i, from ? load(typed + i, extent) : Vec{}); });
    });
}

}  // namespace ditfast::host::DITFAST_ISA
