#pragma once

#include "../calls.h"

// The kernels of one instruction set. CMakeLists.txt defines DITFAST_ISA as its name.

namespace ditfast::host::DITFAST_ISA {

void attention_forward(const AttentionForward& call, int threads);
void attention_backward(const AttentionBackward& call, int threads);
void attention_jvp(const AttentionJvp& call, int threads);
void gelu_forward(const Gelu& call, int threads);
void gelu_backward(const Gelu& call, int threads);
void gelu_jvp(const GeluJvp& call, int threads);
void gemm(const Gemm& call, int threads);
void rows_forward(const RowsForward& call, int threads);
void rows_backward(const RowsBackward& call, int threads);
void rows_jvp(const RowsJvp& call, int threads);
double sum_of_squares(DType dtype, const void* data, std::int64_t n);

}  // namespace ditfast::host::DITFAST_ISA
