#pragma once

#ifdef DITFAST_EMULATE
#include "emulated_ptx.h"  // the same wrappers for the host, in tests/emulator
#else

#include <cstdint>
#include <type_traits>

#include "number.h"

#define DITFAST_DEVICE __device__ __forceinline__
#define DITFAST_KERNEL(threads, blocks) __global__ void __launch_bounds__(threads, blocks)

// Every instruction that touches memory or needs the whole warp. Shared memory addresses are 32-bit. Assembly
// that reads or writes memory is volatile, so it stays in program order.

namespace ditfast::ptx {

struct Words4 {
    std::uint32_t word[4];
};

struct Floats2 {
    float first, second;
};

DITFAST_DEVICE int thread() { return static_cast<int>(threadIdx.x); }
DITFAST_DEVICE int lane() { return static_cast<int>(threadIdx.x % 32); }
DITFAST_DEVICE int warp() { return static_cast<int>(threadIdx.x / 32); }
DITFAST_DEVICE int warps() { return static_cast<int>(blockDim.x / 32); }
DITFAST_DEVICE int threads() { return static_cast<int>(blockDim.x); }
DITFAST_DEVICE int block() { return static_cast<int>(blockIdx.x); }

// Hides a value's origin from the compiler, which would otherwise compute addresses from it early and hold
// them in registers.
template <class V>
DITFAST_DEVICE V opaque(V value) {
    asm volatile("" : "+r"(value));
    return value;
}

DITFAST_DEVICE int lane_again() { return opaque(threadIdx.x) % 32; }

DITFAST_DEVICE void sync_block() { __syncthreads(); }

DITFAST_DEVICE std::uint32_t shuffle_xor(std::uint32_t value, int mask) {
    return __shfl_xor_sync(0xffffffffu, value, mask);
}

DITFAST_DEVICE float shuffle_xor(float value, int mask) { return __shfl_xor_sync(0xffffffffu, value, mask); }

// Global memory.

DITFAST_DEVICE std::uint32_t load_word(const std::uint16_t* from) {
    return __ldg(reinterpret_cast<const std::uint32_t*>(from));
}

DITFAST_DEVICE float load_float(const float* from) { return __ldg(from); }

DITFAST_DEVICE void store_word(std::uint16_t* to, std::uint32_t value) {
    *reinterpret_cast<std::uint32_t*>(to) = value;
}

DITFAST_DEVICE void store_words(std::uint16_t* to, std::uint32_t first, std::uint32_t second) {
    *reinterpret_cast<uint2*>(to) = make_uint2(first, second);
}

DITFAST_DEVICE void store_float(float* to, float value) { *to = value; }

// Shared memory.

DITFAST_DEVICE std::uint32_t shared_memory() {
    extern __shared__ __align__(16) unsigned char memory[];
    return static_cast<std::uint32_t>(__cvta_generic_to_shared(memory));
}

DITFAST_DEVICE Words4 load_shared_words(std::uint32_t from) {
    Words4 v;
    asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(v.word[0]), "=r"(v.word[1]), "=r"(v.word[2]), "=r"(v.word[3])
                 : "r"(from));
    return v;
}

DITFAST_DEVICE Floats2 load_shared_floats(std::uint32_t from) {
    Floats2 v;
    asm volatile("ld.shared.v2.f32 {%0, %1}, [%2];" : "=f"(v.first), "=f"(v.second) : "r"(from));
    return v;
}

DITFAST_DEVICE float load_shared_float(std::uint32_t from) {
    float value;
    asm volatile("ld.shared.f32 %0, [%1];" : "=f"(value) : "r"(from));
    return value;
}

DITFAST_DEVICE void store_shared_float(std::uint32_t to, float value) {
    asm volatile("st.shared.f32 [%0], %1;" ::"r"(to), "f"(value) : "memory");
}

// Asynchronous copies from global to shared memory; bytes not read are written as zeros.

DITFAST_DEVICE void copy_16_bytes(std::uint32_t to, const void* from, bool read) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(read ? 16 : 0) : "memory");
}

DITFAST_DEVICE void copy_4_bytes(std::uint32_t to, const void* from, bool read) {
    asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(to), "l"(from), "r"(read ? 4 : 0) : "memory");
}

DITFAST_DEVICE void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Waits until at most `Pending` of this thread's committed groups are in flight.
template <int Pending>
DITFAST_DEVICE void wait_for_copies() {
    asm volatile("cp.async.wait_group %0;" ::"n"(Pending) : "memory");
}

// ldmatrix: matrices of 8 rows of 16 bytes; lane i gives the address of row i % 8 of matrix i / 8.

DITFAST_DEVICE void load_matrices(std::uint32_t (&m)[4], std::uint32_t row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(m[0]), "=r"(m[1]), "=r"(m[2]), "=r"(m[3])
                 : "r"(row));
}

DITFAST_DEVICE void load_matrices(std::uint32_t (&m)[2], std::uint32_t row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0, %1}, [%2];" : "=r"(m[0]), "=r"(m[1]) : "r"(row));
}

DITFAST_DEVICE void load_transposed(std::uint32_t (&m)[4], std::uint32_t row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(m[0]), "=r"(m[1]), "=r"(m[2]), "=r"(m[3])
                 : "r"(row));
}

DITFAST_DEVICE void load_transposed(std::uint32_t (&m)[2], std::uint32_t row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0, %1}, [%2];" : "=r"(m[0]), "=r"(m[1]) : "r"(row));
}

// c (16, 8) += a (16, 16 or 8) b (16 or 8, 8), products and sums in fp32.

#define DITFAST_MMA_K16(type)                                                  \
    asm("mma.sync.aligned.m16n8k16.row.col.f32." type "." type                 \
        ".f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};" \
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])                       \
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1))

#define DITFAST_MMA_K8(type)                                       \
    asm("mma.sync.aligned.m16n8k8.row.col.f32." type "." type      \
        ".f32 {%0, %1, %2, %3}, {%4, %5}, {%6}, {%0, %1, %2, %3};" \
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])           \
        : "r"(a[0]), "r"(a[1]), "r"(b0))

template <class T>
DITFAST_DEVICE void mma(float (&c)[4], const std::uint32_t (&a)[4], std::uint32_t b0, std::uint32_t b1) {
    if constexpr (std::is_same_v<T, BFloat16>) {
        DITFAST_MMA_K16("bf16");
    } else {
        DITFAST_MMA_K16("f16");
    }
}

template <class T>
DITFAST_DEVICE void mma(float (&c)[4], const std::uint32_t (&a)[2], std::uint32_t b0) {
    if constexpr (std::is_same_v<T, BFloat16>) {
        DITFAST_MMA_K8("bf16");
    } else {
        DITFAST_MMA_K8("f16");
    }
}

#undef DITFAST_MMA_K16
#undef DITFAST_MMA_K8

// Numbers. A word holds two 16-bit numbers, the first in its low half.

template <class T>
DITFAST_DEVICE std::uint32_t pack(float first, float second) {
    std::uint32_t word;
    if constexpr (std::is_same_v<T, BFloat16>) {
        asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(second), "f"(first));
    } else {
        asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(second), "f"(first));
    }
    return word;
}

template <class T>
DITFAST_DEVICE Floats2 unpack(std::uint32_t word) {
    if constexpr (std::is_same_v<T, BFloat16>) {
        return {__uint_as_float(word << 16), __uint_as_float(word & 0xffff0000u)};
    } else {
        Floats2 v;
        asm("{.reg .b16 low, high; mov.b32 {low, high}, %2; cvt.f32.f16 %0, low; cvt.f32.f16 %1, high;}"
            : "=f"(v.first), "=f"(v.second)
            : "r"(word));
        return v;
    }
}

DITFAST_DEVICE float exp2(float x) {
    float value;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(value) : "f"(x));
    return value;
}

DITFAST_DEVICE float log(float x) { return logf(x); }

}  // namespace ditfast::ptx

#endif
