#pragma once

#include <cstdint>

namespace ditfast::host {

// A copy between an image (B, C, gh * p, gw * p) and its patches (B, gh * gw, C * p * p), whose last dimension is
// contiguous. Strides are in elements.
struct Patches {
    int element_size;  // 2 or 4 bytes
    std::int64_t batch, channels, grid_h, grid_w, patch;
    bool channels_last;  // the order inside a patch: (ph, pw, c), not (c, ph, pw)
    void* image;
    std::int64_t image_b, image_c, image_h, image_w;
    void* tokens;
    std::int64_t tokens_b, tokens_n;
};

void patchify(const Patches& call, int threads);
void unpatchify(const Patches& call, int threads);

}  // namespace ditfast::host
