#pragma once

#include <Python.h>

#include <exception>
#include <type_traits>

namespace ditfast {

// Wraps a function to be called without the GIL. pybind11's guard will not do: once the interpreter has shut
// down, reacquiring the lock ends the thread and unwinds its stack, which must not happen in a destructor.
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
