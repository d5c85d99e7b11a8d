#pragma once

#include <cstdint>
#include <cstring>

// The 16-bit floating-point types as plain bits, portable to compilers that lack them.
// Rounding is to nearest, ties to even; subnormals, infinities and NaN are kept.

namespace ditfast {

struct BFloat16 {
    std::uint16_t bits;
};

struct Float16 {
    std::uint16_t bits;
};

inline std::uint32_t float_bits(float value) {
    std::uint32_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    return bits;
}

inline float bits_float(std::uint32_t bits) {
    float value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
}

inline float to_float(float value) { return value; }

inline float to_float(BFloat16 value) { return bits_float(std::uint32_t{value.bits} << 16); }

inline float to_float(Float16 value) {
    const std::uint32_t sign = (value.bits & 0x8000u) << 16;
    const std::uint32_t exponent = value.bits & 0x7c00u;
    const std::uint32_t mantissa = value.bits & 0x03ffu;
    if (exponent == 0x7c00u) return bits_float(sign | 0x7f800000u | (mantissa << 13));
    if (exponent == 0) {  // zero or subnormal: a multiple of 2^-24
        const float magnitude = static_cast<float>(mantissa) * bits_float(0x33800000u);
        return bits_float(sign | float_bits(magnitude));
    }
    // The exponent's bias grows from 15 to 127.
    return bits_float(sign | (((exponent | mantissa) << 13) + (112u << 23)));
}

template <class T>
T from_float(float value);

template <>
inline float from_float<float>(float value) {
    return value;
}

template <>
inline BFloat16 from_float<BFloat16>(float value) {
    const std::uint32_t bits = float_bits(value);
    if ((bits & 0x7fffffffu) > 0x7f800000u) {  // NaN: rounding could turn it into infinity
        return {static_cast<std::uint16_t>((bits >> 16) | 0x0040u)};
    }
    const std::uint32_t half = 0x7fffu + ((bits >> 16) & 1u);
    return {static_cast<std::uint16_t>((bits + half) >> 16)};
}

inline std::uint32_t round_to_float16(std::uint32_t magnitude) {
    if (magnitude > 0x7f800000u) return 0x7e00u;   // NaN
    if (magnitude >= 0x47800000u) return 0x7c00u;  // 2^16 and above
    if (magnitude < 0x38800000u) {                 // subnormal: next to 0.5, one fp32 ulp is exactly 2^-24
        return float_bits(bits_float(magnitude) + 0.5f) - float_bits(0.5f);
    }
    const std::uint32_t half = 0x0fffu + ((magnitude >> 13) & 1u);
    return (magnitude - (112u << 23) + half) >> 13;
}

template <>
inline Float16 from_float<Float16>(float value) {
    const std::uint32_t bits = float_bits(value);
    const std::uint32_t sign = (bits >> 16) & 0x8000u;
    return {static_cast<std::uint16_t>(sign | round_to_float16(bits & 0x7fffffffu))};
}

}  // namespace ditfast
