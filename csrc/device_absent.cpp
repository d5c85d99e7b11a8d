#include "device.h"

namespace ditfast {

std::string cuda_probe(int) { return "built without CUDA"; }

}  // namespace ditfast
