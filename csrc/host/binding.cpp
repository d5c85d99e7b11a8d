#include "binding.h"

#include <pybind11/stl.h>

#include <optional>
#include <stdexcept>
#include <tuple>

#include "../without_gil.h"
#include "isa.h"
#include "norm.h"
#include "patches.h"
#include "threads.h"

// Nothing is validated here: ditfast/ops has compared all tensors with their sizes. Arguments are positional, which is
// the cheapest way to pass this many.

namespace py = pybind11;
using namespace py::literals;

namespace ditfast::host {
namespace {

using Address = std::uintptr_t;
using TokensArgument = std::optional<std::tuple<Address, std::int64_t, std::int64_t>>;  // strides of B, N
using VectorsArgument = std::optional<std::tuple<Address, int, std::int64_t>>;          // dtype, stride of B

void* pointer(Address address) { return reinterpret_cast<void*>(address); }

DType dtype(int code) {
    if (code < 0 || code > 2) throw std::invalid_argument("dtype must be 0..2, got " + std::to_string(code));
    return static_cast<DType>(code);
}

Tokens tokens(const TokensArgument& t) {
    return t ? Tokens{pointer(std::get<0>(*t)), std::get<1>(*t), std::get<2>(*t)} : Tokens{nullptr, 0, 0};
}

Vectors vectors(const VectorsArgument& v) {
    if (!v) return {nullptr, DType::kFloat32, 0};
    return {pointer(std::get<0>(*v)), dtype(std::get<1>(*v)), std::get<2>(*v)};
}

RowsProblem rows_problem(int stream, int branch, std::tuple<std::int64_t, std::int64_t, std::int64_t> shape) {
    return {dtype(stream), dtype(branch), std::get<0>(shape), std::get<1>(shape), std::get<2>(shape)};
}

void gelu_forward_(int type, std::int64_t rows, std::int64_t width, Address pre, Address act, int threads) {
    kernels().gelu_forward({dtype(type), rows, width, pointer(pre), pointer(act), nullptr, nullptr}, threads);
}

void gelu_backward_(int type, std::int64_t rows, std::int64_t width, Address pre, Address act, Address dact,
                    Address dbias, int threads) {
    const Gelu call{dtype(type), rows, width, pointer(pre), pointer(act), pointer(dact), pointer(dbias)};
    kernels().gelu_backward(call, threads);
}

void gelu_jvp_(int type, std::int64_t elements, Address pre, Address pre_t, Address act, Address act_t, int threads) {
    kernels().gelu_jvp({dtype(type), elements, pointer(pre), pointer(pre_t), pointer(act), pointer(act_t)}, threads);
}

using MatrixArgument = std::tuple<Address, std::int64_t, std::int64_t>;  // strides of its rows, along inner

Matrix matrix(const MatrixArgument& m) {
    return {static_cast<const float*>(pointer(std::get<0>(m))), std::get<1>(m), std::get<2>(m)};
}

void gemm_(std::tuple<std::int64_t, std::int64_t, std::int64_t> size, const MatrixArgument& a, const MatrixArgument& b,
           Address bias, Address c, Address act, int threads) {
    const auto [rows, columns, inner] = size;
    const Gemm call{rows,
                    columns,
                    inner,
                    matrix(a),
                    matrix(b),
                    static_cast<const float*>(pointer(bias)),
                    static_cast<float*>(pointer(c)),
                    static_cast<float*>(pointer(act))};
    kernels().gemm(call, threads);
}

void rows_forward_(int stream, int branch, std::tuple<std::int64_t, std::int64_t, std::int64_t> shape, float eps,
                   const TokensArgument& x, const TokensArgument& y, const VectorsArgument& gate,
                   const VectorsArgument& bias, const VectorsArgument& shift, const VectorsArgument& scale,
                   const TokensArgument& x_new, const TokensArgument& h, Address mean, Address rstd, int threads) {
    const RowsForward call{
        rows_problem(stream, branch, shape),
        eps,
        tokens(x),
        tokens(y),
        vectors(gate),
        vectors(bias),
        vectors(shift),
        vectors(scale),
        tokens(x_new),
        tokens(h),
        static_cast<float*>(pointer(mean)),
        static_cast<float*>(pointer(rstd)),
    };
    kernels().rows_forward(call, threads);
}

void rows_jvp_(int stream, int branch, std::tuple<std::int64_t, std::int64_t, std::int64_t> shape, float eps,
               const TokensArgument& x, const TokensArgument& y, const VectorsArgument& gate,
               const VectorsArgument& bias, const VectorsArgument& shift, const VectorsArgument& scale,
               const TokensArgument& x_new, const TokensArgument& h, Address mean, Address rstd,
               const TokensArgument& x_t, const TokensArgument& y_t, const VectorsArgument& gate_t,
               const VectorsArgument& bias_t, const VectorsArgument& shift_t, const VectorsArgument& scale_t,
               const TokensArgument& x_new_t, const TokensArgument& h_t, int threads) {
    const RowsJvp call{
        {
            rows_problem(stream, branch, shape),
            eps,
            tokens(x),
            tokens(y),
            vectors(gate),
            vectors(bias),
            vectors(shift),
            vectors(scale),
            tokens(x_new),
            tokens(h),
            static_cast<float*>(pointer(mean)),
            static_cast<float*>(pointer(rstd)),
        },
        tokens(x_t),
        tokens(y_t),
        vectors(gate_t),
        vectors(bias_t),
        vectors(shift_t),
        vectors(scale_t),
        tokens(x_new_t),
        tokens(h_t),
    };
    kernels().rows_jvp(call, threads);
}

void rows_backward_(int stream, int branch, std::tuple<std::int64_t, std::int64_t, std::int64_t> shape,
                    const TokensArgument& dx_new, const TokensArgument& dh, const TokensArgument& x_new,
                    const TokensArgument& y, const VectorsArgument& gate, const VectorsArgument& bias,
                    const VectorsArgument& scale, Address mean, Address rstd, const TokensArgument& dx,
                    const TokensArgument& dy, const VectorsArgument& dgate, const VectorsArgument& dshift,
                    const VectorsArgument& dscale, const VectorsArgument& dbias, int threads) {
    const RowsBackward call{
        rows_problem(stream, branch, shape),
        tokens(dx_new),
        tokens(dh),
        tokens(x_new),
        tokens(y),
        vectors(gate),
        vectors(bias),
        vectors(scale),
        static_cast<const float*>(pointer(mean)),
        static_cast<const float*>(pointer(rstd)),
        tokens(dx),
        tokens(dy),
        vectors(dgate),
        vectors(dshift),
        vectors(dscale),
        vectors(dbias),
    };
    kernels().rows_backward(call, threads);
}

double norm_(int type, const std::vector<Address>& tensors, const std::vector<std::int64_t>& elements, int threads) {
    std::vector<Span> spans;
    for (std::size_t i = 0; i < tensors.size(); ++i) spans.push_back({pointer(tensors[i]), elements[i]});
    return norm(dtype(type), spans, threads);
}

using Two = std::tuple<std::int64_t, std::int64_t>;
using Five = std::tuple<std::int64_t, std::int64_t, std::int64_t, std::int64_t, std::int64_t>;
using Four = std::tuple<std::int64_t, std::int64_t, std::int64_t, std::int64_t>;

Patches patches(int element_size, Five size, bool channels_last, Address image, Four image_strides, Address tokens,
                Two token_strides) {
    const auto [batch, channels, grid_h, grid_w, patch] = size;
    const auto [image_b, image_c, image_h, image_w] = image_strides;
    const auto [tokens_b, tokens_n] = token_strides;
    return {element_size, batch,   channels, grid_h,  grid_w,          patch,    channels_last, pointer(image),
            image_b,      image_c, image_h,  image_w, pointer(tokens), tokens_b, tokens_n};
}

void patchify_(int element_size, Five size, bool channels_last, Address image, Four image_strides, Address tokens_,
               Two token_strides, int threads) {
    patchify(patches(element_size, size, channels_last, image, image_strides, tokens_, token_strides), threads);
}

void unpatchify_(int element_size, Five size, bool channels_last, Address image, Four image_strides, Address tokens_,
                 Two token_strides, int threads) {
    unpatchify(patches(element_size, size, channels_last, image, image_strides, tokens_, token_strides), threads);
}

}  // namespace

void bind(py::module_& m) {
    isa();  // throws, and so fails the import, if DITFAST_ISA names one that cannot run
    m.def("isa", &isa, "The instruction set whose CPU kernels are in use.");
    m.def("isas", &isas, "Instruction sets of this build that run on this CPU, best last.");
    m.def("has_amx", &has_amx, "Whether the CPU has AMX for bfloat16, which these kernels do not use.");
    m.def("use_isa", &use_isa, "name"_a, "Switch to the CPU kernels of another instruction set.");
    m.def("thread_runtime", &thread_runtime, "Where CPU kernels run: on torch's 'openmp' threads or the 'pool'.");
    m.def("gelu_forward", without_gil(gelu_forward_), "dtype, M, F, pre, act, threads");
    m.def("gelu_backward", without_gil(gelu_backward_), "dtype, M, F, pre, act or 0, dact, dbias, threads");
    m.def("gelu_jvp", without_gil(gelu_jvp_), "dtype, M * F, pre, pre_t, act, act_t, threads");
    m.def("gemm", without_gil(gemm_), "(rows, columns, inner), a, b, bias or 0, c or 0, act or 0, threads");
    m.def("norm", without_gil(norm_), "dtype, addresses of tensors, their numbers of elements, threads");
    const char* const patch_arguments =
        "bytes per element, (B, C, gh, gw, p), channels_last, image, image strides, tokens, (stride_b, stride_n), "
        "threads";
    m.def("patchify", without_gil(patchify_), patch_arguments);
    m.def("unpatchify", without_gil(unpatchify_), patch_arguments);
    m.def("rows_forward", without_gil(rows_forward_),
          "stream, branch, (B, N, D), eps, x, y, gate, bias, shift, scale, x_new, h, mean, rstd, threads");
    m.def(
        "rows_jvp", without_gil(rows_jvp_),
        "stream, branch, (B, N, D), eps, x, y, gate, bias, shift, scale, x_new, h, mean, rstd, the tangents x_t, y_t, "
        "gate_t, bias_t, shift_t, scale_t, x_new_t, h_t, threads");
    m.def("rows_backward", without_gil(rows_backward_),
          "stream, branch, (B, N, D), dx_new, dh, x_new, y, gate, bias, scale, mean, rstd, dx, dy, dgate, dshift, "
          "dscale, dbias, threads");
}

}  // namespace ditfast::host
