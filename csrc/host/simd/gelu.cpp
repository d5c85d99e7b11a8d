#include "gelu.h"
#include "kernels.h"
#include "parallel.h"

namespace ditfast::host::DITFAST_ISA {
namespace {

constexpr std::int64_t kElements = 1 << 14;  // per task

template <class T>
void forward(const Gelu& call, int threads) {
    const std::int64_t size = call.rows * call.width;
    parallel((size + kElements - 1) / kElements, threads, 0, [&](std::int64_t task, float*) {
        const std::int64_t first = task * kElements;
        const T* pre = static_cast<const T*>(call.pre) + first;
        T* act = static_cast<T*>(call.act) + first;
        for_each_vector(smaller(kElements, size - first), [&](std::int64_t i, auto extent) {
            const Vec x = load(pre + i, extent);
            store(act + i, gelu<T>(x), extent);
        });
    });
}

template <class T>
void jvp(const GeluJvp& call, int threads) {
    parallel((call.elements + kElements - 1) / kElements, threads, 0, [&](std::int64_t task, float*) {
        const std::int64_t first = task * kElements;
        const T* pre = static_cast<const T*>(call.pre) + first;
        const T* pre_t = static_cast<const T*>(call.pre_t) + first;
        T* act = static_cast<T*>(call.act) + first;
        T* act_t = static_cast<T*>(call.act_t) + first;
        for_each_vector(smaller(kElements, call.elements - first), [&](std::int64_t i, auto extent) {
            const Vec x = load(pre + i, extent);
            const Sigmoid sigmoid = sigmoid_of<T>(x);
            store(act + i, x * sigmoid.value, extent);
            store(act_t + i, load(pre_t + i, extent) * derivative(x, sigmoid), extent);
        });
    });
}

template <class T, bool kKeepAct>
void backward_row(const T* pre, T* dact, T* act, float* sums, std::int64_t width) {
    for_each_vector(width, [&](std::int64_t i, auto extent) {
        const Vec x = load(pre + i, extent);
        const Sigmoid sigmoid = sigmoid_of<T>(x);
        if (kKeepAct) store(act + i, x * sigmoid.value, extent);
        const Vec dpre = load(dact + i, extent) * derivative(x, sigmoid);
        store(dact + i, dpre, extent);
        store(sums + i, load(sums + i) + dpre);  // padded
    });
}

template <class T, bool kKeepAct>
void backward(const Gelu& call, int threads) {
    const std::int64_t width = call.width, stride = padded(width);
    const std::int64_t chunk = chunk_rows(call.rows, 64), chunks = (call.rows + chunk - 1) / chunk;
    float* partial = workspace(static_cast<std::size_t>(chunks * stride));
    parallel(chunks, threads, 0, [&](std::int64_t task, float*) {
        float* sums = partial + task * stride;
        std::memset(sums, 0, static_cast<std::size_t>(stride) * sizeof(float));
        for (std::int64_t r = task * chunk; r < smaller(call.rows, (task + 1) * chunk); ++r) {
            T* act = kKeepAct ? static_cast<T*>(call.act) + r * width : nullptr;
            backward_row<T, kKeepAct>(static_cast<const T*>(call.pre) + r * width,
                                      static_cast<T*>(call.dact) + r * width, act, sums, width);
        }
    });
    constexpr std::int64_t kColumns = 512;
    parallel((width + kColumns - 1) / kColumns, threads, 0, [&](std::int64_t task, float*) {
        const std::int64_t first = task * kColumns;
        for_each_vector(smaller(kColumns, width - first), [&](std::int64_t i, auto extent) {
            store(static_cast<T*>(call.dbias) + first + i, sum_rows(partial + first + i, chunks, stride), extent);
        });
    });
}

}  // namespace

void gelu_forward(const Gelu& call, int threads) {
    with_type(call.dtype, [&](auto zero) { forward<decltype(zero)>(call, threads); });
}

void gelu_backward(const Gelu& call, int threads) {
    with_type(call.dtype, [&](auto zero) {
        if (call.act) return backward<decltype(zero), true>(call, threads);
        backward<decltype(zero), false>(call, threads);
    });
}

void gelu_jvp(const GeluJvp& call, int threads) {
    with_type(call.dtype, [&](auto zero) { jvp<decltype(zero)>(call, threads); });
}

}  // namespace ditfast::host::DITFAST_ISA
