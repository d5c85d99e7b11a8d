#pragma once

#include <pybind11/pybind11.h>

namespace ditfast::host {

// Adds the functions of the CPU kernels to the extension.
void bind(pybind11::module_& m);

}  // namespace ditfast::host
