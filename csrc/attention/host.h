#pragma once

#include "params.h"

// Attention on the CPU, to be read: the plain twin of the CUDA kernels. Results do not depend on
// the number of threads.

namespace ditfast {

void attention_forward_host(const AttentionForward& call, int threads);
void attention_backward_host(const AttentionBackward& call, int threads);

}  // namespace ditfast
