#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <string>
#include <vector>

#include "host/calls.h"

namespace ditfast::every_kernel {

using host::Tokens;
using host::Vectors;

constexpr DType kDTypes[] = {DType::kFloat32, DType::kBFloat16, DType::kFloat16};

// The place of a tensor: directly after or before an inaccessible page, with `gap` elements between rows that
// a call must not change.
struct Place {
    bool at_end;
    std::int64_t gap;
};

constexpr Place kPlaces[] = {{true, 0}, {false, 0}, {true, 3}, {false, 1}};

// The place for a turn. Loops of two, three or four steps within the turns meet all places.
inline Place place_of(int turn) { return kPlaces[(turn + turn / 4 + turn / 12) % 4]; }

// (B, N, D) with D contiguous.
class Tensor {
  public:
    Tensor(Place place, DType dtype, std::int64_t b, std::int64_t n, std::int64_t d);
    ~Tensor();
    Tensor(const Tensor&) = delete;

    void fill(std::uint32_t seed);  // numbers in [-2, 2] that every dtype can represent
    void poison();                  // with NaN
    bool is_whole() const;          // no element is NaN, and all gaps still are
    std::vector<unsigned char> bytes() const;

    void* data() const { return data_; }
    float* floats() const { return static_cast<float*>(data_); }
    Tokens tokens() const { return {data_, stride_b(), stride_n()}; }
    Vectors vectors() const { return {data_, dtype_, stride_b()}; }  // where N is 1
    std::int64_t stride_b() const { return n_ * stride_n(); }
    std::int64_t stride_n() const { return d_ + gap_; }

  private:
    bool is_gap(std::int64_t element) const { return element % stride_n() >= d_; }
    std::int64_t elements() const;

    DType dtype_;
    std::int64_t b_, n_, d_, gap_;
    void* data_ = nullptr;
    unsigned char* pages_ = nullptr;
    std::size_t size_of_pages_ = 0;
};

inline const Tokens kNoTokens{nullptr, 0, 0};
inline const Vectors kNoVectors{nullptr, DType::kFloat32, 0};

// Ends the program unless `condition`.
void expect(bool condition, const std::string& what);

// call(threads) must write all outputs, nothing else, and the same bits on one thread as on two, three or four.
void check_call(const std::string& what, const std::vector<Tensor*>& outputs,
                const std::function<void(int)>& call);

// Each calls its kernels in the current instruction set, on every combination of shapes, dtypes and places.
void check_attention();
void check_gelu();
void check_gemm();
void check_norm();
void check_patches();
void check_rows();

}  // namespace ditfast::every_kernel
