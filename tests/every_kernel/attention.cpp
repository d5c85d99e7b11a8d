#include "host/isa.h"
#include "tensor.h"

namespace ditfast::every_kernel {
namespace {

struct Shape {
    std::int64_t batch, tokens, heads, dim;
};

// The layout of dout: rows of channels, rows of tokens, or one expanded element.
enum class Layout { kRows, kColumns, kExpanded };

void set_dout(AttentionBackward& call, const Tensor& dout, Layout layout) {
    const std::int64_t one = layout == Layout::kColumns ? 1 : 0,
                       far = layout == Layout::kExpanded ? 0 : dout.stride_n();
    call.dout = dout.data();
    call.dout_stride_b = layout == Layout::kExpanded ? 0 : dout.stride_b();
    call.dout_stride_n = one ? 1 : far;
    call.dout_stride_c = one ? far : layout == Layout::kExpanded ? 0 : 1;
}

void check_shape(const Shape& s, DType dtype, Place place) {
    const std::int64_t width = s.heads * s.dim;
    const Place dense{place.at_end, 0};
    Tensor qkv(place, dtype, s.batch, s.tokens, 3 * width);
    Tensor out(dense, dtype, s.batch, s.tokens, width),
        lse(dense, DType::kFloat32, s.batch, 2 * s.heads, s.tokens);
    Tensor dqkv(dense, dtype, s.batch, s.tokens, 3 * width),
        dbias(dense, DType::kFloat32, s.batch, 1, 3 * width);
    Tensor rows(place, dtype, s.batch, s.tokens, width), columns(place, dtype, s.batch, width, s.tokens);
    qkv.fill(1), rows.fill(2), columns.fill(3);

    const AttentionProblem problem{dtype, s.batch,        s.tokens,       s.heads,
                                   s.dim, qkv.stride_b(), qkv.stride_n(), 0.25f};
    check_call("attention_forward", {&out, &lse}, [&](int threads) {
        host::kernels().attention_forward({problem, qkv.data(), out.data(), lse.floats()}, threads);
    });
    Tensor qkv_t(place, dtype, s.batch, s.tokens, 3 * width), out_t(dense, dtype, s.batch, s.tokens, width);
    qkv_t.fill(4);
    check_call("attention_jvp", {&out, &lse, &out_t}, [&](int threads) {
        const AttentionForward call{problem, qkv.data(), out.data(), lse.floats()};
        host::kernels().attention_jvp({call, qkv_t.data(), out_t.data(), qkv_t.stride_b(), qkv_t.stride_n()},
                                      threads);
    });
    for (Layout layout : {Layout::kRows, Layout::kColumns, Layout::kExpanded}) {
        AttentionBackward call{problem,     nullptr, qkv.data(), out.data(), lse.floats(),
                               dqkv.data(), nullptr, 0,          0,          0};
        set_dout(call, layout == Layout::kColumns ? columns : rows, layout);
        const auto run = [&](int threads) { host::kernels().attention_backward(call, threads); };
        check_call("attention_backward", {&dqkv}, run);
        call.dbias = dbias.floats();
        check_call("attention_backward with dbias", {&dqkv, &dbias}, run);
    }
}

}  // namespace

void check_attention() {
    constexpr Shape kShapes[] = {{1, 1, 1, 1},   {0, 4, 2, 8},   {2, 0, 1, 8},   {2, 7, 3, 5},
                                 {2, 77, 3, 24}, {1, 65, 2, 72}, {1, 9, 1, 256}, {1, 260, 1, 3}};
    int turn = 0;
    for (const Shape& shape : kShapes) {
        for (DType dtype : kDTypes) {
            check_shape(shape, dtype, place_of(turn++));
        }
    }
}

}  // namespace ditfast::every_kernel
