#include "host/isa.h"
#include "tensor.h"

namespace ditfast::every_kernel {
namespace {

struct Shape {
    std::int64_t rows, columns, inner;
};

// (rows, inner), of which either inner or the rows lie next to each other.
struct Operand {
    Tensor tensor;
    bool is_turned;

    Operand(Place place, std::int64_t rows, std::int64_t inner, bool is_turned)
        : tensor(place, DType::kFloat32, 1, is_turned ? inner : rows, is_turned ? rows : inner),
          is_turned(is_turned) {
        tensor.fill(is_turned ? 1 : 2);
    }

    host::Matrix matrix() const {
        const std::int64_t far = tensor.stride_n();
        return {tensor.floats(), is_turned ? 1 : far, is_turned ? far : 1};
    }
};

void check_shape(const Shape& s, Place place) {
    const Place dense{place.at_end, 0};
    Tensor bias(dense, DType::kFloat32, 1, 1, s.columns), c(dense, DType::kFloat32, 1, s.rows, s.columns);
    Tensor act(dense, DType::kFloat32, 1, s.rows, s.columns);
    bias.fill(3);
    for (bool a_turned : {false, true}) {
        for (bool b_turned : {false, true}) {
            const Operand a(place, s.rows, s.inner, a_turned), b(place, s.columns, s.inner, b_turned);
            for (const float* some_bias :
                 {static_cast<const float*>(nullptr), static_cast<const float*>(bias.floats())}) {
                host::Gemm call{s.rows,     s.columns, s.inner,    a.matrix(),
                                b.matrix(), some_bias, c.floats(), nullptr};
                const auto run = [&](int threads) { host::kernels().gemm(call, threads); };
                check_call("gemm", {&c}, run);
                call.act = act.floats();
                check_call("gemm with GELU", {&c, &act}, run);
                call.c = nullptr;
                check_call("gemm of GELU alone", {&act}, run);
            }
        }
    }
}

}  // namespace

void check_gemm() {
    constexpr Shape kShapes[] = {{1, 1, 1}, {5, 7, 3}, {97, 33, 260}, {30, 400, 20}, {200, 9, 1}};
    int turn = 0;
    for (const Shape& shape : kShapes) {
        for (int place = 0; place < 3; ++place) check_shape(shape, place_of(turn++));
    }
}

}  // namespace ditfast::every_kernel
