#include "host/isa.h"
#include "tensor.h"

namespace ditfast::every_kernel {

void check_gelu() {
    constexpr std::int64_t kShapes[][2] = {{0, 8}, {1, 1}, {5, 7}, {130, 40}, {1, 16500}};  // rows, width
    for (const auto& shape : kShapes) {
        const std::int64_t rows = shape[0], width = shape[1];
        for (DType dtype : kDTypes) {
            for (bool at_end : {false, true}) {
                const Place place{at_end, 0};
                Tensor pre(place, dtype, 1, rows, width), dout(place, dtype, 1, rows, width);
                Tensor act(place, dtype, 1, rows, width), dpre(place, dtype, 1, rows, width);
                Tensor dbias(place, dtype, 1, 1, width);
                pre.fill(1);
                check_call("gelu_forward", {&act}, [&](int threads) {
                    host::kernels().gelu_forward(
                        {dtype, rows, width, pre.data(), act.data(), nullptr, nullptr}, threads);
                });
                Tensor pre_t(place, dtype, 1, rows, width), act_t(place, dtype, 1, rows, width);
                pre_t.fill(3);
                check_call("gelu_jvp", {&act, &act_t}, [&](int threads) {
                    host::kernels().gelu_jvp(
                        {dtype, rows * width, pre.data(), pre_t.data(), act.data(), act_t.data()}, threads);
                });
                const auto backward = [&](void* kept) {
                    return [&, kept](int threads) {
                        dpre.fill(2);
                        const host::Gelu call{dtype, rows,        width,       pre.data(),
                                              kept,  dpre.data(), dbias.data()};
                        host::kernels().gelu_backward(call, threads);
                    };
                };
                check_call("gelu_backward", {&dpre, &dbias}, backward(nullptr));
                check_call("gelu_backward with the activation", {&dpre, &dbias, &act}, backward(act.data()));
            }
        }
    }
}

}  // namespace ditfast::every_kernel
