#pragma once

namespace ditfast::host {

// GOMP_parallel, which every OpenMP runtime of Linux has: runs body(data) on so many threads.
using ParallelRegion = void (*)(void (*body)(void*), void* data, unsigned threads, unsigned flags);

// That of the OpenMP runtime that torch uses, if torch is loaded and this is not the child of a fork: there the
// runtime waits for threads that do not exist. Else null.
ParallelRegion openmp_region();

}  // namespace ditfast::host
