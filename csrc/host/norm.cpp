#include "norm.h"

#include <algorithm>
#include <cmath>

#include "isa.h"
#include "threads.h"

namespace ditfast::host {
namespace {

constexpr std::int64_t kElements = 1 << 17;  // of a task

struct Job {
    DType dtype;
    double (*sum_of_squares)(DType dtype, const void* data, std::int64_t n);
    const Span* parts;
    double* sums;  // of each part's squares
};

std::vector<Span> split(DType dtype, const std::vector<Span>& tensors) {
    const std::int64_t size = dtype == DType::kFloat32 ? 4 : 2;
    std::vector<Span> parts;
    for (const Span& tensor : tensors) {
        for (std::int64_t first = 0; first < tensor.elements; first += kElements) {
            const char* data = static_cast<const char*>(tensor.data) + first * size;
            parts.push_back({data, std::min(kElements, tensor.elements - first)});
        }
    }
    return parts;
}

}  // namespace

double norm(DType dtype, const std::vector<Span>& tensors, int threads) {
    const std::vector<Span> parts = split(dtype, tensors);
    std::vector<double> sums(parts.size());
    const Job job{dtype, kernels().sum_of_squares, parts.data(), sums.data()};
    const auto task = [](const void* context, std::int64_t i, float*) {
        const Job& job = *static_cast<const Job*>(context);
        job.sums[i] = job.sum_of_squares(job.dtype, job.parts[i].data, job.parts[i].elements);
    };
    run_tasks(static_cast<std::int64_t>(parts.size()), threads, 0, task, &job);
    double sum = 0;
    for (double each : sums) sum += each;
    return std::sqrt(sum);
}

}  // namespace ditfast::host
