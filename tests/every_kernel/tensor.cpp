#include "tensor.h"

#include <sys/mman.h>
#include <unistd.h>

#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <cstring>

#include "host/isa.h"

namespace ditfast::every_kernel {
namespace {

std::int64_t size_of(DType dtype) { return dtype == DType::kFloat32 ? 4 : 2; }

// The bits of x in dtype; x is a multiple of 1/64 in [-2, 2].
std::uint32_t bits_in(DType dtype, float x) {
    std::uint32_t bits;
    std::memcpy(&bits, &x, sizeof bits);
    if (dtype == DType::kFloat32) return bits;
    if (dtype == DType::kBFloat16) return bits >> 16;
    const std::uint32_t sign = bits >> 16 & 0x8000u, magnitude = bits & 0x7fffffffu;
    return magnitude == 0 ? sign : sign | (magnitude - (112u << 23)) >> 13;
}

bool is_nan(DType dtype, const unsigned char* element) {
    std::uint32_t bits = 0;
    std::memcpy(&bits, element, static_cast<std::size_t>(size_of(dtype)));
    if (dtype == DType::kFloat32) return (bits & 0x7fffffffu) > 0x7f800000u;
    return (bits & 0x7fffu) > (dtype == DType::kBFloat16 ? 0x7f80u : 0x7c00u);
}

}  // namespace

Tensor::Tensor(Place place, DType dtype, std::int64_t b, std::int64_t n, std::int64_t d)
    : dtype_(dtype), b_(b), n_(n), d_(d), gap_(place.gap) {
    const std::size_t page = static_cast<std::size_t>(sysconf(_SC_PAGESIZE));
    const std::size_t used = static_cast<std::size_t>(elements() * size_of(dtype));
    if (used == 0) return;  // torch gives an empty tensor a null pointer
    const std::size_t inside = (used + page - 1) / page * page;
    size_of_pages_ = inside + 2 * page;
    void* pages = mmap(nullptr, size_of_pages_, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    expect(pages != MAP_FAILED, "mmap failed");
    pages_ = static_cast<unsigned char*>(pages);
    expect(mprotect(pages_ + page, inside, PROT_READ | PROT_WRITE) == 0, "mprotect failed");
    data_ = pages_ + page + (place.at_end ? inside - used : 0);
}

Tensor::~Tensor() {
    if (pages_ != nullptr) munmap(pages_, size_of_pages_);
}

// The last row has no gap after it.
std::int64_t Tensor::elements() const { return b_ * n_ * d_ == 0 ? 0 : b_ * n_ * stride_n() - gap_; }

void Tensor::fill(std::uint32_t seed) {
    poison();
    const std::int64_t size = size_of(dtype_);
    for (std::int64_t i = 0; i < elements(); ++i) {
        seed = seed * 1664525u + 1013904223u;
        const std::uint32_t bits =
            bits_in(dtype_, static_cast<float>(static_cast<int>(seed >> 24) - 128) / 64.0f);
        if (!is_gap(i))
            std::memcpy(static_cast<unsigned char*>(data_) + i * size, &bits, static_cast<std::size_t>(size));
    }
}

void Tensor::poison() {
    if (data_ != nullptr) std::memset(data_, 0xff, static_cast<std::size_t>(elements() * size_of(dtype_)));
}

bool Tensor::is_whole() const {
    const unsigned char* at = static_cast<const unsigned char*>(data_);
    for (std::int64_t i = 0; i < elements(); ++i, at += size_of(dtype_)) {
        if (is_nan(dtype_, at) != is_gap(i)) return false;
    }
    return true;
}

std::vector<unsigned char> Tensor::bytes() const {
    const unsigned char* first = static_cast<const unsigned char*>(data_);
    return {first, first + elements() * size_of(dtype_)};
}

void expect(bool condition, const std::string& what) {
    if (condition) return;
    std::fprintf(stderr, "every_kernel: %s (%s)\n", what.c_str(), host::isa().c_str());
    std::_Exit(1);
}

void check_call(const std::string& what, const std::vector<Tensor*>& outputs,
                const std::function<void(int)>& call) {
    static std::atomic<int> turn{0};
    std::vector<std::vector<unsigned char>> first;
    for (int threads : {1, 2 + turn++ % 3}) {
        for (Tensor* output : outputs) output->poison();
        call(threads);
        for (std::size_t i = 0; i < outputs.size(); ++i) {
            const std::string which = what + ", output " + std::to_string(i);
            expect(outputs[i]->is_whole(), which + " is incomplete, or a gap was written");
            if (threads == 1) first.push_back(outputs[i]->bytes());
            expect(outputs[i]->bytes() == first[i], which + " depends on the number of threads");
        }
    }
}

}  // namespace ditfast::every_kernel
