#include "openmp.h"

#include <atomic>

#if defined(__linux__)
#include <dlfcn.h>
#include <link.h>
#include <pthread.h>

#include <cstring>
#include <string>
#endif

namespace ditfast::host {

#if defined(__linux__)
namespace {

std::atomic<bool> is_forked{false};
// registered at load time: torch may start its threads, and the process may fork, before our first call
const int watching = pthread_atfork(nullptr, nullptr, [] { is_forked = true; });

int find_torch(dl_phdr_info* library, std::size_t, void* path) {
    const char* slash = std::strrchr(library->dlpi_name, '/');
    const char* name = slash ? slash + 1 : library->dlpi_name;
    if (std::strncmp(name, "libtorch_cpu.so", 15) != 0) return 0;
    *static_cast<std::string*>(path) = library->dlpi_name;
    return 1;
}

// torch's wheels ship OpenMP under different sonames, and a process may hold several runtimes. Looking the symbol
// up from libtorch_cpu finds the one that torch is linked with.
ParallelRegion find_region() {
    std::string path;
    dl_iterate_phdr(find_torch, &path);
    if (path.empty()) return nullptr;
    void* torch = dlopen(path.c_str(), RTLD_LAZY | RTLD_NOLOAD);
    return torch ? reinterpret_cast<ParallelRegion>(dlsym(torch, "GOMP_parallel")) : nullptr;
}

}  // namespace

ParallelRegion openmp_region() {
    static std::atomic<ParallelRegion> found{nullptr};
    if (watching != 0 || is_forked.load(std::memory_order_relaxed)) return nullptr;
    ParallelRegion region = found.load(std::memory_order_relaxed);
    if (region == nullptr) found = region = find_region();  // retried until torch is loaded
    return region;
}

#else

ParallelRegion openmp_region() { return nullptr; }

#endif

}  // namespace ditfast::host
