#pragma once

namespace ditfast::host {

// GOMP_parallel, which every OpenMP runtime on Linux provides: runs body(data) on `threads` threads.
using ParallelRegion = void (*)(void (*body)(void*), void* data, unsigned threads, unsigned flags);

// GOMP_parallel of the OpenMP runtime that torch uses. Null if torch is not loaded, and in a forked child, where the
// runtime would wait for threads that no longer exist.
ParallelRegion openmp_region();

}  // namespace ditfast::host
