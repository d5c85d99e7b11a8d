#pragma once

#include <cmath>
#include <cstdint>

#include "attention/number.h"
#include "machine.h"

#define DITFAST_DEVICE inline
#define DITFAST_KERNEL(threads, blocks) void

// The wrappers of csrc/attention/ptx.h for the machine in machine.h. Layouts of mma and ldmatrix are from the
// PTX ISA, sections "Matrix Fragments for mma.m16n8k16", "... m16n8k8" and "ldmatrix".

namespace ditfast::ptx {

using emulator::machine;

struct Words4 {
    std::uint32_t word[4];
};

struct Floats2 {
    float first, second;
};

inline int thread() { return machine().thread(); }
inline int lane() { return machine().lane(); }
inline int warp() { return machine().thread() / 32; }
inline int warps() { return machine().threads() / 32; }
inline int threads() { return machine().threads(); }
inline int block() { return machine().block(); }
inline int opaque(int value) { return value; }
inline int lane_again() { return lane(); }
inline void sync_block() { machine().sync_block(); }

template <class V>
V shuffle_xor(V value, int mask) {
    V result;
    machine().collective("shuffle", &value, &result, [mask](void* const* in, void* const* out) {
        for (int i = 0; i < 32; ++i) *static_cast<V*>(out[i]) = *static_cast<V*>(in[i ^ mask]);
    });
    return result;
}

// Global memory. Error messages name `from` or `to` and the place of the call.

inline std::uint32_t load_word(const std::uint16_t* from, Place place = Place::here()) {
    return machine().load_global<std::uint32_t>(from, place);
}

inline float load_float(const float* from, Place place = Place::here()) {
    return machine().load_global<float>(from, place);
}

inline void store_word(std::uint16_t* to, std::uint32_t value, Place place = Place::here()) {
    machine().store_global(to, value, place);
}

inline void store_words(std::uint16_t* to, std::uint32_t first, std::uint32_t second,
                        Place place = Place::here()) {
    machine().store_global(to, std::uint64_t{second} << 32 | first, place);
}

inline void store_float(float* to, float value, Place place = Place::here()) {
    machine().store_global(to, value, place);
}

// Shared memory.

inline std::uint32_t shared_memory() { return 0; }

inline Words4 load_shared_words(std::uint32_t from, Place place = Place::here()) {
    return machine().load_shared<Words4>(from, place);
}

inline Floats2 load_shared_floats(std::uint32_t from, Place place = Place::here()) {
    return machine().load_shared<Floats2>(from, place);
}

inline float load_shared_float(std::uint32_t from, Place place = Place::here()) {
    return machine().load_shared<float>(from, place);
}

inline void store_shared_float(std::uint32_t to, float value, Place place = Place::here()) {
    machine().store_shared(to, value, place);
}

inline void copy_16_bytes(std::uint32_t to, const void* from, bool read, Place place = Place::here()) {
    machine().copy(to, from, 16, read, place);
}

inline void copy_4_bytes(std::uint32_t to, const void* from, bool read, Place place = Place::here()) {
    machine().copy(to, from, 4, read, place);
}

inline void commit_copies() { machine().commit_copies(); }

template <int Pending>
void wait_for_copies() {
    machine().wait_for_copies(Pending);
}

// Lane i reads row i % 8 of matrix i / 8. Then it gets, of each matrix, columns 2 * (i % 4) and the next of
// row i / 4; transposed, rows 2 * (i % 4) and the next of column i / 4.
template <int Count>
void load_matrices(std::uint32_t (&m)[Count], std::uint32_t row, bool transposed, Place place) {
    struct Row {
        std::uint16_t column[8];
    };
    Row mine{};
    if (machine().lane() < 8 * Count) mine = machine().load_shared<Row>(row, place);
    machine().collective(transposed ? "ldmatrix.trans" : "ldmatrix", &mine, m,
                         [transposed](void* const* in, void* const* out) {
                             const auto at = [in](int matrix, int r, int c) -> std::uint32_t {
                                 return static_cast<Row*>(in[matrix * 8 + r])->column[c];
                             };
                             for (int i = 0; i < 32; ++i) {
                                 for (int k = 0; k < Count; ++k) {
                                     const int x = i / 4, y = i % 4 * 2;
                                     static_cast<std::uint32_t*>(out[i])[k] =
                                         transposed ? at(k, y, x) | at(k, y + 1, x) << 16
                                                    : at(k, x, y) | at(k, x, y + 1) << 16;
                                 }
                             }
                         });
}

inline void load_matrices(std::uint32_t (&m)[4], std::uint32_t row, Place place = Place::here()) {
    load_matrices<4>(m, row, false, place);
}

inline void load_matrices(std::uint32_t (&m)[2], std::uint32_t row, Place place = Place::here()) {
    load_matrices<2>(m, row, false, place);
}

inline void load_transposed(std::uint32_t (&m)[4], std::uint32_t row, Place place = Place::here()) {
    load_matrices<4>(m, row, true, place);
}

inline void load_transposed(std::uint32_t (&m)[2], std::uint32_t row, Place place = Place::here()) {
    load_matrices<2>(m, row, true, place);
}

template <class T>
float element(std::uint32_t word, int index) {
    return to_float(T{static_cast<std::uint16_t>(word >> 16 * index)});
}

// One lane's operands: a, then b, then c.
template <int K>
struct MmaLane {
    std::uint32_t a[K / 4];
    std::uint32_t b[K / 8];
    float c[4];
};

// Register r of a holds two columns from 2 * (i % 4) + 8 * (r / 2) of row i / 4 + 8 * (r % 2); register r of b
// two rows from 2 * (i % 4) + 8 * r of column i / 4; c[r] is row i / 4 + 8 * (r / 2), column 2 * (i % 4) +
// r % 2.
template <class T, int K>
void multiply(void* const* in, void* const* out) {
    float a[16][K], b[K][8];
    for (int i = 0; i < 32; ++i) {
        const auto& lane = *static_cast<const MmaLane<K>*>(in[i]);
        const int row = i / 4, pair = i % 4 * 2;
        for (int e = 0; e < 2; ++e) {
            for (int r = 0; r < K / 4; ++r) {
                a[row + r % 2 * 8][pair + e + r / 2 * 8] = element<T>(lane.a[r], e);
            }
            for (int r = 0; r < K / 8; ++r) b[pair + e + r * 8][row] = element<T>(lane.b[r], e);
        }
    }
    for (int i = 0; i < 32; ++i) {
        for (int r = 0; r < 4; ++r) {
            float sum = static_cast<const MmaLane<K>*>(in[i])->c[r];
            for (int k = 0; k < K; ++k) sum += a[i / 4 + r / 2 * 8][k] * b[k][i % 4 * 2 + r % 2];
            static_cast<float*>(out[i])[r] = sum;
        }
    }
}

template <class T>
void mma(float (&c)[4], const std::uint32_t (&a)[4], std::uint32_t b0, std::uint32_t b1) {
    MmaLane<16> lane{{a[0], a[1], a[2], a[3]}, {b0, b1}, {c[0], c[1], c[2], c[3]}};
    machine().collective("mma.m16n8k16", &lane, c, multiply<T, 16>);
}

template <class T>
void mma(float (&c)[4], const std::uint32_t (&a)[2], std::uint32_t b0) {
    MmaLane<8> lane{{a[0], a[1]}, {b0}, {c[0], c[1], c[2], c[3]}};
    machine().collective("mma.m16n8k8", &lane, c, multiply<T, 8>);
}

template <class T>
std::uint32_t pack(float first, float second) {
    const std::uint32_t low = from_float<T>(first).bits, high = from_float<T>(second).bits;
    return high << 16 | low;
}

template <class T>
Floats2 unpack(std::uint32_t word) {
    return {element<T>(word, 0), element<T>(word, 1)};
}

inline float exp2(float x) { return std::exp2(x); }
inline float log(float x) { return std::log(x); }

}  // namespace ditfast::ptx
