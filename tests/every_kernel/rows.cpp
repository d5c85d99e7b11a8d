#include "host/isa.h"
#include "tensor.h"

namespace ditfast::every_kernel {
namespace {

struct Shape {
    std::int64_t batch, tokens, dim;
};

struct Case {
    Shape shape;
    Place place;
    DType stream, branch, modulation;
    bool has_residual, has_norm, has_bias;
};

// All tensors of forward and backward, whether or not a call uses them.
struct Tensors {
    Tensor x, y, gate, bias, shift, scale;
    Tensor x_new, h, mean, rstd;
    Tensor dx_new, dh, dx, dy, dgate, dshift, dscale, dbias;

    explicit Tensors(const Case& c)
        : x(rows(c, c.stream)),
          y(rows(c, c.branch)),
          gate(vectors(c)),
          bias(vector(c)),
          shift(vectors(c)),
          scale(vectors(c)),
          x_new(rows(c, c.stream)),
          h(rows(c, c.branch)),
          mean(statistics(c)),
          rstd(statistics(c)),
          dx_new(rows(c, c.stream)),
          dh(rows(c, c.branch)),
          dx(rows(c, c.stream)),
          dy(rows(c, c.branch)),
          dgate(vectors(c)),
          dshift(vectors(c)),
          dscale(vectors(c)),
          dbias(vector(c)) {
        std::uint32_t seed = 1;
        for (Tensor* each : {&x, &y, &gate, &bias, &shift, &scale, &dx_new, &dh}) each->fill(seed++);
    }

  private:
    static Tensor rows(const Case& c, DType dtype) {
        return Tensor(c.place, dtype, c.shape.batch, c.shape.tokens, c.shape.dim);
    }
    static Tensor vectors(const Case& c) {
        return Tensor(c.place, c.modulation, c.shape.batch, 1, c.shape.dim);
    }
    static Tensor vector(const Case& c) { return Tensor(c.place, c.modulation, 1, 1, c.shape.dim); }
    static Tensor statistics(const Case& c) {
        return Tensor({c.place.at_end, 0}, DType::kFloat32, c.shape.batch, 1, c.shape.tokens);
    }
};

host::RowsProblem problem(const Case& c) {
    return {c.stream, c.branch, c.shape.batch, c.shape.tokens, c.shape.dim};
}

Tokens tokens_if(bool has, const Tensor& t) { return has ? t.tokens() : kNoTokens; }
Vectors vectors_if(bool has, const Tensor& t) { return has ? t.vectors() : kNoVectors; }

// (D,) for all samples
Vectors shared_if(bool has, const Tensor& t) {
    const Vectors v = vectors_if(has, t);
    return {v.data, v.dtype, 0};
}

std::vector<Tensor*> chosen(const std::vector<std::pair<bool, Tensor*>>& all) {
    std::vector<Tensor*> result;
    for (const auto& [has, tensor] : all) {
        if (has) result.push_back(tensor);
    }
    return result;
}

void check_case(const Case& c) {
    Tensors t(c);
    const bool residual = c.has_residual, norm = c.has_norm, bias = c.has_bias;
    const host::RowsForward forward{
        problem(c),
        1e-6f,
        t.x.tokens(),
        tokens_if(residual, t.y),
        vectors_if(residual, t.gate),
        shared_if(bias, t.bias),
        vectors_if(norm, t.shift),
        vectors_if(norm, t.scale),
        tokens_if(residual, t.x_new),
        tokens_if(norm, t.h),
        norm ? t.mean.floats() : nullptr,
        norm ? t.rstd.floats() : nullptr,
    };
    check_call("rows_forward", chosen({{residual, &t.x_new}, {norm, &t.h}, {norm, &t.mean}, {norm, &t.rstd}}),
               [&](int threads) { host::kernels().rows_forward(forward, threads); });
    Tensors tangents(c);  // same shapes and values as the primals
    const host::RowsJvp jvp{
        forward,
        tangents.x.tokens(),
        tokens_if(residual, tangents.y),
        vectors_if(residual, tangents.gate),
        shared_if(bias, tangents.bias),
        vectors_if(norm, tangents.shift),
        kNoVectors,
        tokens_if(residual, tangents.x_new),
        tokens_if(norm, tangents.h),
    };
    check_call("rows_jvp",
               chosen({{residual, &t.x_new}, {norm, &t.h}, {residual, &tangents.x_new}, {norm, &tangents.h}}),
               [&](int threads) { host::kernels().rows_jvp(jvp, threads); });
    const host::RowsBackward backward{
        problem(c),
        tokens_if(residual, t.dx_new),
        tokens_if(norm, t.dh),
        norm ? (residual ? t.x_new : t.x).tokens() : kNoTokens,
        tokens_if(residual, t.y),
        vectors_if(residual, t.gate),
        shared_if(bias, t.bias),
        vectors_if(norm, t.scale),
        forward.mean,
        forward.rstd,
        tokens_if(norm, t.dx),
        tokens_if(residual, t.dy),
        vectors_if(residual, t.dgate),
        vectors_if(norm, t.dshift),
        vectors_if(norm, t.dscale),
        shared_if(bias, t.dbias),
    };
    check_call("rows_backward",
               chosen({{norm, &t.dx},
                       {residual, &t.dy},
                       {residual, &t.dgate},
                       {norm, &t.dshift},
                       {norm, &t.dscale},
                       {bias, &t.dbias}}),
               [&](int threads) { host::kernels().rows_backward(backward, threads); });
}

}  // namespace

void check_rows() {
    constexpr Shape kShapes[] = {{1, 1, 1},   {0, 5, 8},   {2, 0, 8},   {3, 2, 15},
                                 {2, 77, 40}, {1, 530, 3}, {2, 33, 130}};
    constexpr bool kParts[][3] = {
        {false, true, false}, {true, false, false}, {true, false, true}, {true, true, true}};
    int turn = 0;
    for (const Shape& shape : kShapes) {
        for (DType stream : kDTypes) {
            for (DType branch : kDTypes) {
                const DType modulation = shape.dim % 2 ? branch : stream;
                for (const auto& [residual, norm, bias] : kParts) {
                    check_case({shape, place_of(turn++), stream, branch, modulation, residual, norm, bias});
                }
            }
        }
    }
}

}  // namespace ditfast::every_kernel
