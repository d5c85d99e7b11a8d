#include <stdexcept>

#include "cuda.h"

namespace ditfast {
namespace {

constexpr char kReason[] = "built without CUDA";

}  // namespace

std::string cuda_attention_supported(int) { return kReason; }

void attention_forward_cuda(const AttentionForward&, int, std::uintptr_t) { throw std::runtime_error(kReason); }

void attention_backward_cuda(const AttentionBackward&, int, std::uintptr_t) { throw std::runtime_error(kReason); }

void attention_probe(const std::uint16_t*, const std::uint16_t*, std::uint16_t*, int, std::uintptr_t) {
    throw std::runtime_error(kReason);
}

}  // namespace ditfast
