#pragma once

#include "../threads.h"
#include "vec.h"

namespace ditfast::host::DITFAST_ISA {

// Runs body(i, scratch) for i in [0, count), split over the threads.
template <class Body>
inline void parallel(std::int64_t count, int threads, std::int64_t scratch_floats, const Body& body) {
    const Task task = [](const void* context, std::int64_t i, float* scratch) {
        (*static_cast<const Body*>(context))(i, scratch);
    };
    run_tasks(count, threads, static_cast<std::size_t>(scratch_floats), task, &body);
}

// Adds up rows of partial sums in order: to[i] = sum over r of partial[r * stride + i].
inline Vec sum_rows(const float* partial, std::int64_t rows, std::int64_t stride) {
    Vec sum{};
    for (std::int64_t r = 0; r < rows; ++r) sum += load(partial + r * stride);
    return sum;
}

// Rows per chunk; a chunk yields one row of partial sums. Depends on the problem, never on the threads.
inline std::int64_t chunk_rows(std::int64_t rows, std::int64_t most_chunks) {
    return larger(32, (rows + most_chunks - 1) / most_chunks);
}

}  // namespace ditfast::host::DITFAST_ISA
