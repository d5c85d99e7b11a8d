#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <string>

#include "attention/checks.h"
#include "attention/cuda.h"
#include "attention/plan.h"
#include "build_config.h"
#include "device.h"
#include "host/binding.h"
#include "host/isa.h"
#include "without_gil.h"

// Tensors arrive as addresses, sizes and strides in elements, so that one binary works with every version of
// torch.

namespace py = pybind11;
using namespace py::literals;

namespace ditfast {
namespace {

using Address = std::uintptr_t;

template <class T>
T* pointer(Address address) {
    return reinterpret_cast<T*>(address);
}

void forward_host(Address qkv, Address out, Address lse, const std::string& dtype, std::int64_t batch,
                  std::int64_t tokens, std::int64_t heads, std::int64_t head_dim, std::int64_t stride_b,
                  std::int64_t stride_n, float scale, int threads) {
    const AttentionForward call{
        {parse_dtype(dtype), batch, tokens, heads, head_dim, stride_b, stride_n, scale},
        pointer<void>(qkv),
        pointer<void>(out),
        pointer<float>(lse),
    };
    check(call);
    check_threads(threads);
    host::kernels().attention_forward(call, threads);
}

void jvp_host(Address qkv, Address qkv_t, Address out, Address lse, Address out_t, const std::string& dtype,
              std::int64_t batch, std::int64_t tokens, std::int64_t heads, std::int64_t head_dim, std::int64_t stride_b,
              std::int64_t stride_n, std::int64_t qkv_t_stride_b, std::int64_t qkv_t_stride_n, float scale,
              int threads) {
    const AttentionJvp call{
        {
            {parse_dtype(dtype), batch, tokens, heads, head_dim, stride_b, stride_n, scale},
            pointer<void>(qkv),
            pointer<void>(out),
            pointer<float>(lse),
        },
        pointer<void>(qkv_t),
        pointer<void>(out_t),
        qkv_t_stride_b,
        qkv_t_stride_n,
    };
    check(call);
    check_threads(threads);
    host::kernels().attention_jvp(call, threads);
}

void backward_host(Address dout, Address qkv, Address out, Address lse, Address dqkv, Address dbias,
                   const std::string& dtype, std::int64_t batch, std::int64_t tokens, std::int64_t heads,
                   std::int64_t head_dim, std::int64_t stride_b, std::int64_t stride_n, std::int64_t dout_stride_b,
                   std::int64_t dout_stride_n, std::int64_t dout_stride_c, float scale, int threads) {
    const AttentionBackward call{
        {parse_dtype(dtype), batch, tokens, heads, head_dim, stride_b, stride_n, scale},
        pointer<void>(dout),
        pointer<void>(qkv),
        pointer<void>(out),
        pointer<float>(lse),
        pointer<void>(dqkv),
        pointer<float>(dbias),
        dout_stride_b,
        dout_stride_n,
        dout_stride_c,
    };
    check(call);
    check_threads(threads);
    host::kernels().attention_backward(call, threads);
}

void forward_cuda(Address qkv, Address out, Address lse, const std::string& dtype, std::int64_t batch,
                  std::int64_t tokens, std::int64_t heads, std::int64_t head_dim, std::int64_t stride_b,
                  std::int64_t stride_n, float scale, int device, Address stream) {
    const AttentionForward call{
        {parse_dtype(dtype), batch, tokens, heads, head_dim, stride_b, stride_n, scale},
        pointer<void>(qkv),
        pointer<void>(out),
        pointer<float>(lse),
    };
    check_cuda(call);
    attention_forward_cuda(call, device, stream);
}

void backward_cuda(Address dout, Address qkv, Address out, Address lse, Address dqkv, Address dbias,
                   const std::string& dtype, std::int64_t batch, std::int64_t tokens, std::int64_t heads,
                   std::int64_t head_dim, std::int64_t stride_b, std::int64_t stride_n, std::int64_t dout_stride_b,
                   std::int64_t dout_stride_n, float scale, int device, Address stream) {
    const AttentionBackward call{
        {parse_dtype(dtype), batch, tokens, heads, head_dim, stride_b, stride_n, scale},
        pointer<void>(dout),
        pointer<void>(qkv),
        pointer<void>(out),
        pointer<float>(lse),
        pointer<void>(dqkv),
        pointer<float>(dbias),
        dout_stride_b,
        dout_stride_n,
        1,
    };
    check_cuda(call);
    attention_backward_cuda(call, device, stream);
}

void probe(Address matrices, Address operands, Address out, int device, Address stream) {
    attention_probe(pointer<std::uint16_t>(matrices), pointer<std::uint16_t>(operands), pointer<std::uint16_t>(out),
                    device, stream);
}

py::dict config() {
    const BuildConfig config = build_config();
    return py::dict("version"_a = config.version, "compiler"_a = config.compiler, "build_type"_a = config.build_type,
                    "cuda"_a = config.cuda, "architectures"_a = config.architectures);
}

}  // namespace
}  // namespace ditfast

PYBIND11_MODULE(_C, m) {
    using ditfast::without_gil;

    m.doc() = "ditfast's C++ and CUDA code. Internal: ditfast.ops checks the tensors.";
    m.def("build_config", &ditfast::config, "How this extension was built.");
    m.def("cuda_probe", without_gil(ditfast::cuda_probe), "device"_a,
          "Run an empty kernel on a device; return why it could not, or ''.");
    m.def("attention_forward_host", without_gil(ditfast::forward_host), py::kw_only(), "qkv"_a, "out"_a, "lse"_a,
          "dtype"_a, "batch"_a, "tokens"_a, "heads"_a, "head_dim"_a, "stride_b"_a, "stride_n"_a, "scale"_a, "threads"_a,
          "qkv (B, N, 3, H, d) -> out (B, N, H * d), lse (B, 2 * H, N): the largest logits, 1 / the sums of exp.");
    m.def("attention_jvp_host", without_gil(ditfast::jvp_host), py::kw_only(), "qkv"_a, "qkv_t"_a, "out"_a, "lse"_a,
          "out_t"_a, "dtype"_a, "batch"_a, "tokens"_a, "heads"_a, "head_dim"_a, "stride_b"_a, "stride_n"_a,
          "qkv_t_stride_b"_a, "qkv_t_stride_n"_a, "scale"_a, "threads"_a,
          "Like attention_forward_host; also computes the tangent of out from that of qkv.");
    m.def("attention_backward_host", without_gil(ditfast::backward_host), py::kw_only(), "dout"_a, "qkv"_a, "out"_a,
          "lse"_a, "dqkv"_a, "dbias"_a = ditfast::Address{0}, "dtype"_a, "batch"_a, "tokens"_a, "heads"_a, "head_dim"_a,
          "stride_b"_a, "stride_n"_a, "dout_stride_b"_a, "dout_stride_n"_a, "dout_stride_c"_a, "scale"_a, "threads"_a,
          "dout (B, N, H * d), qkv, out, lse -> dqkv (B, N, 3, H, d); if dbias (B, 3, H, d) is given, "
          "also the sums of dqkv over N.");
    m.def("attention_forward_cuda", without_gil(ditfast::forward_cuda), py::kw_only(), "qkv"_a, "out"_a, "lse"_a,
          "dtype"_a, "batch"_a, "tokens"_a, "heads"_a, "head_dim"_a, "stride_b"_a, "stride_n"_a, "scale"_a, "device"_a,
          "stream"_a, "Like attention_forward_host, on a GPU stream.");
    m.def("attention_backward_cuda", without_gil(ditfast::backward_cuda), py::kw_only(), "dout"_a, "qkv"_a, "out"_a,
          "lse"_a, "dqkv"_a, "dbias"_a = ditfast::Address{0}, "dtype"_a, "batch"_a, "tokens"_a, "heads"_a, "head_dim"_a,
          "stride_b"_a, "stride_n"_a, "dout_stride_b"_a, "dout_stride_n"_a, "scale"_a, "device"_a, "stream"_a,
          "Like attention_backward_host, on a GPU stream. The channels of dout have unit stride; "
          "dbias is (B * attention_backward_groups(tokens), 3, H, d).");
    m.def("attention_backward_groups", &ditfast::backward_groups, "tokens"_a,
          "Rows of dbias that attention_backward_cuda writes for each sample.");
    m.def("cuda_attention_supported", without_gil(ditfast::cuda_attention_supported), "device"_a,
          "Why the CUDA attention kernels cannot run on a device, or ''.");
    ditfast::host::bind(m);
    m.def("attention_probe", without_gil(ditfast::probe), py::kw_only(), "matrices"_a, "operands"_a, "out"_a,
          "device"_a, "stream"_a, "Record the layouts of mma and ldmatrix.");
}
