#pragma once

#include <string>

namespace ditfast {

// Runs an empty kernel of this binary on a device and waits for it. Returns why it failed, or an empty
// string.
std::string cuda_probe(int device);

}  // namespace ditfast
