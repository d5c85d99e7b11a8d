#pragma once

#include <cstdint>
#include <string>

#include "params.h"

// Attention on a GPU. Each call launches one kernel on the stream and returns without allocating or waiting,
// so a CUDA graph can capture it. CUDA errors are thrown as std::runtime_error.

namespace ditfast {

// Why the kernels cannot run on a device, or an empty string.
std::string cuda_attention_supported(int device);

// The stream is a cudaStream_t.
void attention_forward_cuda(const AttentionForward& call, int device, std::uintptr_t stream);
void attention_backward_cuda(const AttentionBackward& call, int device, std::uintptr_t stream);

// This GPU's layouts of mma and ldmatrix; see probe.cuh.
void attention_probe(const std::uint16_t* matrices, const std::uint16_t* operands, std::uint16_t* out, int device,
                     std::uintptr_t stream);

}  // namespace ditfast
