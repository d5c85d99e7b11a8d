#pragma once

#include <algorithm>
#include <cstdint>
#include <future>
#include <vector>

namespace ditfast {

// Runs body(i) for i in [0, count) on up to `threads` threads, the caller's among them. Rethrows
// the first exception of a body.
template <class Body>
void parallel_for(std::int64_t count, int threads, const Body& body) {
    const std::int64_t workers = std::min<std::int64_t>(count, threads);
    const auto work = [&body, count, workers](std::int64_t worker) {
        for (std::int64_t i = worker; i < count; i += workers) body(i);
    };
    std::vector<std::future<void>> others;
    for (std::int64_t worker = 1; worker < workers; ++worker) {
        others.push_back(std::async(std::launch::async, work, worker));
    }
    if (workers > 0) work(0);
    for (auto& other : others) other.get();
}

}  // namespace ditfast
