#include "machine.h"

#include <algorithm>
#include <sstream>
#include <stdexcept>

namespace ditfast::emulator {
namespace {

Machine* running = nullptr;

std::string base_name(const char* path) {
    const std::string text = path == nullptr ? "?" : path;
    return text.substr(text.find_last_of('/') + 1);
}

std::string describe(Place place) { return base_name(place.file) + ":" + std::to_string(place.line); }

}  // namespace

Machine& machine() { return *running; }

Machine::Machine(std::vector<Region> regions, int threads, int shared_bytes)
    : regions_(std::move(regions)),
      shared_(shared_bytes),
      words_(shared_bytes / 4),
      threads_(threads),
      warps_(threads / 32) {
    for (Region& region : regions_) region.written.assign(region.writable ? region.bytes : 0, false);
}

void Machine::fail(const std::string& what, Place place) const {
    std::ostringstream text;
    text << describe(place) << ": block " << block_ << ", thread " << current_ << ": " << what;
    throw std::runtime_error(text.str());
}

void Machine::run(int block, const std::function<void()>& kernel) {
    running = this;
    block_ = block;
    epoch_ = 0;
    std::fill(shared_.begin(), shared_.end(), 0xff);  // NaN in every type
    std::fill(words_.begin(), words_.end(), Word{});
    for (Thread& t : threads_) {
        t = Thread{};
        t.fiber = std::make_unique<Fiber>(kernel);
    }
    for (bool running_threads = true; running_threads; ++epoch_) {
        for (int warp = 0; warp < static_cast<int>(warps_.size()); ++warp) run_warp(warp);
        int waiting = 0;
        for (Thread& t : threads_) {
            waiting += t.in_barrier;
            t.in_barrier = false;
        }
        if (waiting != 0 && waiting != threads()) fail("a barrier that not all threads reach", {});
        running_threads = waiting != 0;
    }
    for (const Word& word : words_) {
        if (word.copier != Word::kNobody) fail("a copy that nobody waits for", {});
    }
}

// Runs the lanes in turn until each has ended or waits at a barrier.
void Machine::run_warp(int warp) {
    for (bool progress = true; progress;) {
        progress = false;
        bool blocked = false;
        const int done = warps_[warp].done;
        for (int i = 32 * warp; i < 32 * warp + 32; ++i) {
            Thread& t = threads_[i];
            if (t.fiber->ended() || t.in_barrier) continue;
            current_ = i;
            t.fiber->resume();
            blocked |= !t.fiber->ended() && !t.in_barrier;
        }
        progress = blocked && warps_[warp].done != done;
        if (blocked && !progress) {
            fail(std::string(warps_[warp].name) + " that not all lanes reach", {});
        }
    }
}

void Machine::sync_block() {
    threads_[current_].in_barrier = true;
    threads_[current_].fiber->yield();
}

void Machine::collective(const char* name, void* in, void* out, const Collective& all) {
    Warp& warp = warps_[current_ / 32];
    if (warp.arrived == 0) warp.name = name;
    if (std::strcmp(warp.name, name) != 0) {
        fail(std::string(name) + " where other lanes are at " + warp.name, {});
    }
    warp.in[lane()] = in;
    warp.out[lane()] = out;
    if (++warp.arrived == 32) {
        all(warp.in, warp.out);
        warp.arrived = 0;
        ++warp.done;
        return;
    }
    for (const int done = warp.done; warp.done == done;) threads_[current_].fiber->yield();
}

void Machine::check_global(const void* address, std::size_t bytes, bool write, Place place) {
    const auto at = reinterpret_cast<std::uintptr_t>(address);
    if (at % bytes != 0) fail("misaligned access to global memory", place);
    for (Region& region : regions_) {
        if (at < region.begin || at + bytes > region.begin + region.bytes) continue;
        if (!write) return;
        const std::size_t offset = at - region.begin;
        if (!region.writable) fail(std::string("write to the input ") + region.name, place);
        if (region.written[offset]) fail(std::string("second write to an element of ") + region.name, place);
        for (std::size_t i = 0; i < bytes; ++i) region.written[offset + i] = true;
        return;
    }
    fail(write ? "write outside global memory" : "read outside global memory", place);
}

Word& Machine::checked_word(std::uint32_t address, std::size_t bytes, std::size_t offset, Place place) {
    if (address % bytes != 0) fail("misaligned access to shared memory", place);
    if (address + bytes > shared_.size()) {
        fail(
            "access to shared memory at " + std::to_string(address) + " of " + std::to_string(shared_.size()),
            place);
    }
    Word& word = words_[(address + offset) / 4];
    if (word.copier != Word::kNobody) {
        fail("access to shared memory while thread " + std::to_string(word.copier) + " copies to it", place);
    }
    return word;
}

void Machine::note_read(std::uint32_t from, std::size_t bytes, Place place) {
    for (std::size_t i = 0; i < bytes; i += 4) {
        Word& word = checked_word(from, bytes, i, place);
        if (word.writer == Word::kNobody) fail("read of shared memory that was never written", place);
        if (word.writer != current_ && word.writer_epoch == epoch_) {
            fail("race: thread " + std::to_string(word.writer) + " wrote this at " +
                     describe(word.written_at) + " and no barrier is in between",
                 place);
        }
        const bool again = word.reader_epoch == epoch_ && word.reader != current_;
        word.reader = again ? Word::kSeveral : current_;
        word.reader_epoch = epoch_;
    }
}

void Machine::check_order(const Word& word, const char* what, Place place) {
    if (word.writer_epoch == epoch_ && word.writer != current_) {
        fail(std::string("race: ") + what + " over what thread " + std::to_string(word.writer) + " wrote",
             place);
    }
    if (word.reader_epoch == epoch_ && word.reader != current_) {
        fail(std::string("race: ") + what + " over what another thread reads", place);
    }
}

void Machine::note_write(std::uint32_t to, std::size_t bytes, Place place) {
    for (std::size_t i = 0; i < bytes; i += 4) {
        Word& word = checked_word(to, bytes, i, place);
        check_order(word, "write", place);
        word.writer = current_;
        word.writer_epoch = epoch_;
        word.written_at = place;
    }
}

void Machine::copy(std::uint32_t to, const void* from, int bytes, bool read, Place place) {
    Copy copy{to, bytes, {}, place};
    if (read) {
        check_global(from, bytes, false, place);
        std::memcpy(copy.data, from, bytes);
    }
    for (int i = 0; i < bytes; i += 4) {
        Word& word = checked_word(to, bytes, i, place);
        check_order(word, "copy", place);
        word.copier = current_;
    }
    threads_[current_].open.push_back(copy);
}

void Machine::commit_copies() {
    Thread& t = threads_[current_];
    t.groups.push_back(std::move(t.open));
    t.open.clear();
}

void Machine::wait_for_copies(int pending) {
    auto& groups = threads_[current_].groups;
    while (static_cast<int>(groups.size()) > pending) {
        land(groups.front());
        groups.erase(groups.begin());
    }
}

void Machine::land(const std::vector<Copy>& group) {
    for (const Copy& copy : group) {
        std::memcpy(shared_.data() + copy.to, copy.data, copy.bytes);
        for (int i = 0; i < copy.bytes; i += 4) {
            Word& word = words_[(copy.to + i) / 4];
            word.copier = Word::kNobody;
            word.writer = current_;
            word.writer_epoch = epoch_;
            word.written_at = copy.place;
        }
    }
}

}  // namespace ditfast::emulator
