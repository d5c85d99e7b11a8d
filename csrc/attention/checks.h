#pragma once

#include <string>

#include "params.h"

namespace ditfast {

// Each throws std::invalid_argument with the name of the argument, the rule and the value.
DType parse_dtype(const std::string& name);
void check(const AttentionForward& call);
void check(const AttentionJvp& call);
void check(const AttentionBackward& call);
void check_threads(int threads);

// Additional requirements of the CUDA kernels.
void check_cuda(const AttentionForward& call);
void check_cuda(const AttentionBackward& call);

}  // namespace ditfast
