#include "pool.h"

#include <condition_variable>
#include <mutex>
#include <thread>

#if defined(__unix__) || defined(__APPLE__)
#include <pthread.h>
#endif

namespace ditfast::host {
namespace {

class Pool {
  public:
    void run(void (*body)(void*), void* data, int threads) {
        const std::unique_lock<std::mutex> turn(in_use_, std::try_to_lock);
        if (!turn.owns_lock()) return body(data);
        {
            const std::lock_guard<std::mutex> lock(mutex_);
            for (; size_ < threads - 1; ++size_) std::thread(&Pool::serve, this).detach();
            body_ = body;
            data_ = data;
            wanted_ = threads - 1;
        }
        wake_.notify_all();
        body(data);
        std::unique_lock<std::mutex> lock(mutex_);
        wanted_ = 0;  // threads that have not started are no longer needed
        done_.wait(lock, [this] { return busy_ == 0; });
    }

  private:
    void serve() {
        std::unique_lock<std::mutex> lock(mutex_);
        for (;;) {
            wake_.wait(lock, [this] { return wanted_ > 0; });
            --wanted_;
            ++busy_;
            lock.unlock();
            body_(data_);
            lock.lock();
            if (--busy_ == 0) done_.notify_one();
        }
    }

    std::mutex in_use_, mutex_;
    std::condition_variable wake_, done_;
    void (*body_)(void*) = nullptr;
    void* data_ = nullptr;
    int size_ = 0, wanted_ = 0, busy_ = 0;
};

// Never destroyed: its threads may still be running when the process exits.
Pool* pool = nullptr;
std::once_flag made;

void make_pool() { pool = new Pool; }

}  // namespace

void run_on_pool(void (*body)(void*), void* data, int threads) {
    std::call_once(made, [] {
        make_pool();
#if defined(__unix__) || defined(__APPLE__)
        pthread_atfork(nullptr, nullptr, make_pool);  // a forked child has none of its parent's threads
#endif
    });
    pool->run(body, data, threads);
}

}  // namespace ditfast::host
