#pragma once

#include <cstddef>
#include <cstdint>

namespace ditfast::host {

// One of many tasks; scratch is the worker's own memory, 64-byte aligned, not cleared.
using Task = void (*)(const void* context, std::int64_t index, float* scratch);

// Runs task(context, i, scratch) for i in [0, count) on up to `threads` threads, the caller's among them: those of
// torch's OpenMP runtime, which have just run a GEMM and are awake, else those of a pool that sleeps when idle.
// Who runs a task is not fixed, so results may not depend on it. Throws std::bad_alloc before any task has begun.
void run_tasks(std::int64_t count, int threads, std::size_t scratch_floats, Task task, const void* context);

// Memory of the calling thread that is kept between calls: a fresh block of this size would cost page faults.
float* workspace(std::size_t floats);

// "openmp" or "pool": what runs the tasks of this process.
const char* thread_runtime();

}  // namespace ditfast::host
