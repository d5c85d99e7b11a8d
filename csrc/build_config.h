#pragma once

#include <optional>
#include <string>
#include <vector>

namespace ditfast {

struct BuildConfig {
    std::string version;
    std::string compiler;
    std::string build_type;
    std::optional<std::string> cuda;  // the toolkit's version, if the device code was built
    std::vector<std::string> architectures;
};

BuildConfig build_config();

}  // namespace ditfast
