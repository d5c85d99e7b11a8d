#include "build_config.h"

#include <sstream>

// CMakeLists.txt defines the DITFAST_ macros for this file.

namespace ditfast {
namespace {

std::vector<std::string> split(const std::string& text, char separator) {
    std::vector<std::string> items;
    std::istringstream stream(text);
    for (std::string item; std::getline(stream, item, separator);) items.push_back(item);
    return items;
}

}  // namespace

BuildConfig build_config() {
    const std::string cuda = DITFAST_CUDA_VERSION;
    return {
        DITFAST_VERSION,
        DITFAST_COMPILER,
        DITFAST_BUILD_TYPE,
        cuda.empty() ? std::nullopt : std::make_optional(cuda),
        split(DITFAST_CUDA_TARGETS, ','),
    };
}

}  // namespace ditfast
