#include "patches.h"

#include <stdexcept>
#include <string>

#include "threads.h"

namespace ditfast::host {
namespace {

// One row of patches of one sample. It only moves elements, which newer instruction sets hardly speed up.
template <class Element, bool kToTokens>
void move_row(const Patches& call, std::int64_t b, std::int64_t y) {
    const std::int64_t p = call.patch, step = call.channels_last ? call.channels : 1;  // from one pixel to the next
    for (std::int64_t c = 0; c < call.channels; ++c) {
        for (std::int64_t ph = 0; ph < p; ++ph) {
            Element* pixel =
                static_cast<Element*>(call.image) + b * call.image_b + c * call.image_c + (y * p + ph) * call.image_h;
            const std::int64_t place = call.channels_last ? ph * p * call.channels + c : (c * p + ph) * p;
            Element* token =
                static_cast<Element*>(call.tokens) + b * call.tokens_b + y * call.grid_w * call.tokens_n + place;
            for (std::int64_t x = 0; x < call.grid_w; ++x, token += call.tokens_n) {
                for (std::int64_t pw = 0; pw < p; ++pw, pixel += call.image_w) {
                    if (kToTokens) {
                        token[pw * step] = *pixel;
                    } else {
                        *pixel = token[pw * step];
                    }
                }
            }
        }
    }
}

template <bool kToTokens>
void move(const Patches& call, int threads) {
    if (call.element_size != 2 && call.element_size != 4) {
        throw std::invalid_argument("elements must have 2 or 4 bytes, got " + std::to_string(call.element_size));
    }
    const auto task = [](const void* context, std::int64_t i, float*) {
        const Patches& patches = *static_cast<const Patches*>(context);
        const std::int64_t b = i / patches.grid_h, y = i % patches.grid_h;
        if (patches.element_size == 4) return move_row<std::uint32_t, kToTokens>(patches, b, y);
        move_row<std::uint16_t, kToTokens>(patches, b, y);
    };
    constexpr std::int64_t kWorthAThread = 1 << 15;  // elements
    const std::int64_t row = call.channels * call.patch * call.patch * call.grid_w;
    const std::int64_t rows = call.batch * call.grid_h;
    run_tasks(rows, rows * row < kWorthAThread ? 1 : threads, 0, task, &call);
}

}  // namespace

void patchify(const Patches& call, int threads) { move<true>(call, threads); }
void unpatchify(const Patches& call, int threads) { move<false>(call, threads); }

}  // namespace ditfast::host
