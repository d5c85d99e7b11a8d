#pragma once

#include <string>
#include <vector>

#include "calls.h"

namespace ditfast::host {

// The kernels as they are compiled for one instruction set.
struct Kernels {
    void (*attention_forward)(const AttentionForward& call, int threads);
    void (*attention_backward)(const AttentionBackward& call, int threads);
    void (*attention_jvp)(const AttentionJvp& call, int threads);
    void (*gelu_forward)(const Gelu& call, int threads);
    void (*gelu_backward)(const Gelu& call, int threads);
    void (*gelu_jvp)(const GeluJvp& call, int threads);
    void (*rows_forward)(const RowsForward& call, int threads);
    void (*rows_backward)(const RowsBackward& call, int threads);
    void (*rows_jvp)(const RowsJvp& call, int threads);
};

// Instruction sets of this build that run on this CPU, the best last.
std::vector<std::string> isas();

// The one in use: the best, unless the environment variable DITFAST_ISA or use_isa names another.
std::string isa();

// Whether the CPU has AMX for bfloat16, which no kernel here uses, but GEMMs of others do.
bool has_amx();

// Throws std::invalid_argument if it is none of isas().
void use_isa(const std::string& name);

// Of the instruction set in use. Throws std::runtime_error where no instruction set of this build runs.
const Kernels& kernels();

}  // namespace ditfast::host
