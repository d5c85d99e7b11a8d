#include "host/patches.h"

#include "tensor.h"

namespace ditfast::every_kernel {
namespace {

struct Shape {
    std::int64_t batch, channels, grid_h, grid_w, patch;
};

// An image (B, C * height, width), whose rows may have gaps between them, and its patches.
void check_shape(const Shape& s, DType dtype, Place place, bool channels_last) {
    const std::int64_t height = s.grid_h * s.patch, width = s.grid_w * s.patch;
    Tensor image(place, dtype, s.batch, s.channels * height, width);
    Tensor tokens(place, dtype, s.batch, s.grid_h * s.grid_w, s.channels * s.patch * s.patch);
    const host::Patches call{dtype == DType::kFloat32 ? 4 : 2,
                             s.batch,
                             s.channels,
                             s.grid_h,
                             s.grid_w,
                             s.patch,
                             channels_last,
                             image.data(),
                             image.stride_b(),
                             height * image.stride_n(),
                             image.stride_n(),
                             1,
                             tokens.data(),
                             tokens.stride_b(),
                             tokens.stride_n()};
    image.fill(1);
    const std::vector<unsigned char> before = image.bytes();
    check_call("patchify", {&tokens}, [&](int threads) { host::patchify(call, threads); });
    check_call("unpatchify", {&image}, [&](int threads) { host::unpatchify(call, threads); });
    expect(image.bytes() == before, "unpatchify does not undo patchify");
}

}  // namespace

void check_patches() {
    constexpr Shape kShapes[] = {{0, 3, 2, 2, 2}, {1, 1, 1, 1, 1}, {2, 3, 2, 5, 4}, {3, 4, 33, 31, 2}};
    for (const Shape& shape : kShapes) {
        for (DType dtype : {DType::kFloat32, DType::kBFloat16}) {
            for (Place place : kPlaces) {
                for (bool channels_last : {false, true}) check_shape(shape, dtype, place, channels_last);
            }
        }
    }
}

}  // namespace ditfast::every_kernel
