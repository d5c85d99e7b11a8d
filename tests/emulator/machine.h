#pragma once

#include <cstdint>
#include <cstring>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "fiber.h"

// One block of CUDA threads on the host, each a fiber. Wrong programs stop with a message that names the
// place: access out of bounds, misaligned or to what was never written, a race, a copy read before it was
// waited for, lanes of a warp at different instructions, a barrier that not all threads reach.

namespace ditfast::emulator {

// Where in the kernel's source a wrapper was called.
struct Place {
    const char* file;
    int line;

    static Place here(const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
        return {file, line};
    }
};

struct Region {  // of global memory
    const char* name;
    std::uintptr_t begin;
    std::size_t bytes;
    bool writable;
    std::vector<bool> written;  // for each byte
};

// The history of a word of shared memory. Two accesses by different threads are ordered only if a barrier
// lies between them, that is, if their epochs differ.
struct Word {
    static constexpr int kNobody = -1, kSeveral = -2;
    int writer = kNobody, writer_epoch = -1;
    int reader = kNobody, reader_epoch = -1;
    int copier = kNobody;  // the thread whose copy to here is in flight
    Place written_at{};
};

class Machine {
  public:
    Machine(std::vector<Region> regions, int threads, int shared_bytes);

    // Runs one block; throws std::runtime_error.
    void run(int block, const std::function<void()>& kernel);

    int thread() const { return current_; }
    int lane() const { return current_ % 32; }
    int threads() const { return static_cast<int>(threads_.size()); }
    int block() const { return block_; }

    void sync_block();

    // The last lane of a warp to arrive runs `all` on the 32 addresses of inputs and of outputs.
    using Collective = std::function<void(void* const* in, void* const* out)>;
    void collective(const char* name, void* in, void* out, const Collective& all);

    template <class V>
    V load_global(const void* from, Place place) {
        check_global(from, sizeof(V), false, place);
        V value;
        std::memcpy(&value, from, sizeof value);
        return value;
    }

    template <class V>
    void store_global(void* to, V value, Place place) {
        check_global(to, sizeof(V), true, place);
        std::memcpy(to, &value, sizeof value);
    }

    template <class V>
    V load_shared(std::uint32_t from, Place place) {
        note_read(from, sizeof(V), place);
        V value;
        std::memcpy(&value, shared_.data() + from, sizeof value);
        return value;
    }

    template <class V>
    void store_shared(std::uint32_t to, V value, Place place) {
        note_write(to, sizeof(V), place);
        std::memcpy(shared_.data() + to, &value, sizeof value);
    }

    void copy(std::uint32_t to, const void* from, int bytes, bool read, Place place);
    void commit_copies();
    void wait_for_copies(int pending);

  private:
    struct Copy {
        std::uint32_t to;
        int bytes;
        unsigned char data[16];
        Place place;
    };
    struct Thread {
        std::unique_ptr<Fiber> fiber;
        bool in_barrier = false;
        std::vector<std::vector<Copy>> groups;  // committed and in flight, oldest first
        std::vector<Copy> open;                 // not yet committed
    };
    struct Warp {
        const char* name = nullptr;  // of the current collective
        int arrived = 0;
        int done = 0;  // collectives
        void* in[32];
        void* out[32];
    };

    void run_warp(int warp);
    void check_global(const void* address, std::size_t bytes, bool write, Place place);
    Word& checked_word(std::uint32_t address, std::size_t bytes, std::size_t offset, Place place);
    void note_read(std::uint32_t from, std::size_t bytes, Place place);
    void note_write(std::uint32_t to, std::size_t bytes, Place place);
    void check_order(const Word& word, const char* what, Place place);
    void land(const std::vector<Copy>& group);
    [[noreturn]] void fail(const std::string& what, Place place) const;

    std::vector<Region> regions_;
    std::vector<unsigned char> shared_;
    std::vector<Word> words_;
    std::vector<Thread> threads_;
    std::vector<Warp> warps_;
    int block_ = 0;
    int current_ = 0;
    int epoch_ = 0;
};

// The machine that is running.
Machine& machine();

}  // namespace ditfast::emulator

namespace ditfast::ptx {
using emulator::Place;
}
