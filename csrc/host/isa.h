#pragma once

#include <string>
#include <vector>

#include "calls.h"

namespace ditfast::host {

// The kernels compiled for one instruction set.
struct Kernels {
    void (*attention_forward)(const AttentionForward& call, int threads);
    void (*attention_backward)(const AttentionBackward& call, int threads);
    void (*attention_jvp)(const AttentionJvp& call, int threads);
    void (*gelu_forward)(const Gelu& call, int threads);
    void (*gelu_backward)(const Gelu& call, int threads);
    void (*gelu_jvp)(const GeluJvp& call, int threads);
    void (*gemm)(const Gemm& call, int threads);
    void (*rows_forward)(const RowsForward& call, int threads);
    void (*rows_backward)(const RowsBackward& call, int threads);
    void (*rows_jvp)(const RowsJvp& call, int threads);
    double (*sum_of_squares)(DType dtype, const void* data, std::int64_t n);  // of float64, on the caller's thread
};

// Instruction sets of this build that run on this CPU, best last.
std::vector<std::string> isas();

// The one in use: the best, unless the environment variable DITFAST_ISA or use_isa selects another.
std::string isa();

// Whether the CPU has AMX for bfloat16. No kernel here uses it, but other libraries' GEMMs do.
bool has_amx();

// Throws std::invalid_argument if name is not one of isas().
void use_isa(const std::string& name);

// The kernels of the instruction set in use. Throws std::runtime_error if this CPU runs none of the build's.
const Kernels& kernels();

}  // namespace ditfast::host
