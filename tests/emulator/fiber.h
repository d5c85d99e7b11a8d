#pragma once

#include <setjmp.h>
#include <ucontext.h>

#include <exception>
#include <functional>
#include <vector>

// A function with its own stack, which runs until it yields.

namespace ditfast::emulator {

class Fiber {
  public:
    explicit Fiber(std::function<void()> body) : body_(std::move(body)), stack_(kStackBytes) {}

    // Continues until the body yields or ends; rethrows what it throws.
    void resume() {
        if (_setjmp(caller_) == 0) {
            if (started_) _longjmp(here_, 1);
            started_ = true;
            start();
        }
        if (error_) std::rethrow_exception(error_);
    }

    // Call it in the body.
    void yield() {
        if (_setjmp(here_) == 0) _longjmp(caller_, 1);
    }

    bool ended() const { return ended_; }

  private:
    static constexpr std::size_t kStackBytes = 128 << 10;

    // ucontext makes the stack; setjmp switches, because it makes no system call.
    void start() {
        ucontext_t context, unused;
        getcontext(&context);
        context.uc_stack.ss_sp = stack_.data();
        context.uc_stack.ss_size = stack_.size();
        context.uc_link = nullptr;
        entering_ = this;
        makecontext(&context, enter, 0);
        swapcontext(&unused, &context);
    }

    static void enter() {
        Fiber& self = *entering_;
        try {
            self.body_();
        } catch (...) {
            self.error_ = std::current_exception();
        }
        self.ended_ = true;
        _longjmp(self.caller_, 1);
    }

    static inline Fiber* entering_ = nullptr;
    std::function<void()> body_;
    std::vector<char> stack_;
    std::exception_ptr error_;
    jmp_buf caller_, here_;
    bool started_ = false;
    bool ended_ = false;
};

}  // namespace ditfast::emulator
