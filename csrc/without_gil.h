#pragma once

#include <Python.h>

#include <exception>
#include <type_traits>

namespace ditfast {

// The function, to be called without Python's global lock. Not by pybind11's guard: once the interpreter ends, taking
// the lock back ends the thread, which unwinds its stack, and must not do so from a destructor.
template <class Result, class... Args>
auto without_gil(Result (*function)(Args...)) {
    return [function](Args... args) -> Result {
        PyThreadState* const state = PyEval_SaveThread();
        try {
            if constexpr (std::is_void_v<Result>) {
                function(args...);
                PyEval_RestoreThread(state);
            } else {
                const Result result = function(args...);
                PyEval_RestoreThread(state);
                return result;
            }
        } catch (const std::exception&) {
            PyEval_RestoreThread(state);
            throw;
        }
    };
}

}  // namespace ditfast
