#include "threads.h"

#include <atomic>
#include <cstdlib>
#include <new>

#include "openmp.h"
#include "pool.h"

namespace ditfast::host {
namespace {

// A 64-byte aligned buffer that only grows.
class Buffer {
  public:
    ~Buffer() { std::free(data_); }

    float* reserve(std::size_t floats) {
        if (floats > size_) {
            std::free(data_);
            size_ = (floats + 15) / 16 * 16;
            data_ = static_cast<float*>(std::aligned_alloc(64, size_ * sizeof(float)));
            if (data_ == nullptr) {
                size_ = 0;
                throw std::bad_alloc();
            }
        }
        return data_;
    }

  private:
    float* data_ = nullptr;
    std::size_t size_ = 0;
};

thread_local Buffer scratch_of_thread;
thread_local Buffer workspace_of_thread;

struct Job {
    std::int64_t count;
    std::size_t scratch_floats;
    Task task;
    const void* context;
    std::atomic<std::int64_t> next{0};
};

void work(void* data) {
    Job& job = *static_cast<Job*>(data);
    float* scratch;
    try {
        scratch = scratch_of_thread.reserve(job.scratch_floats);
    } catch (const std::bad_alloc&) {
        return;  // the caller already has its scratch and runs the tasks that this thread does not
    }
    for (std::int64_t i; (i = job.next.fetch_add(1, std::memory_order_relaxed)) < job.count;) {
        job.task(job.context, i, scratch);
    }
}

}  // namespace

void run_tasks(std::int64_t count, int threads, std::size_t scratch_floats, Task task, const void* context) {
    if (count <= 0) return;
    scratch_of_thread.reserve(scratch_floats);
    Job job{count, scratch_floats, task, context};
    const int workers = count < threads ? static_cast<int>(count) : threads;
    if (workers <= 1) return work(&job);
    if (const ParallelRegion region = openmp_region()) {
        region(work, &job, static_cast<unsigned>(workers), 0);
    } else {
        run_on_pool(work, &job, workers);
    }
}

float* workspace(std::size_t floats) { return workspace_of_thread.reserve(floats); }

const char* thread_runtime() { return openmp_region() ? "openmp" : "pool"; }

}  // namespace ditfast::host
