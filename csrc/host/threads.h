#pragma once

#include <cstddef>
#include <cstdint>

namespace ditfast::host {

// One of many tasks. scratch belongs to the worker: 64-byte aligned, uninitialized.
using Task = void (*)(const void* context, std::int64_t index, float* scratch);

// Runs task(context, i, scratch) for i in [0, count) on up to `threads` threads including the caller's: on torch's
// OpenMP threads, which are awake right after a GEMM, or else on a pool that sleeps when idle. Any thread may run any
// task, so results must not depend on the assignment. std::bad_alloc is thrown before any task starts.
void run_tasks(std::int64_t count, int threads, std::size_t scratch_floats, Task task, const void* context);

// Memory of the calling thread, kept between calls: a fresh block of this size would cost page faults.
float* workspace(std::size_t floats);

// What runs this process's tasks: "openmp" or "pool".
const char* thread_runtime();

}  // namespace ditfast::host
