#include "kernels.h"
#include "rows.h"

namespace ditfast::host::DITFAST_ISA {
namespace {

enum Sum { kShift, kScale, kGate, kStream, kSums };  // over tokens, of dh, dh * normal, dx * (y + bias), dx

// A task's float32 rows, each padded to whole vectors. Passed by value: through a reference, the pointers would be
// reloaded after every store.
struct Scratch {
    float *gate, *bias, *scale1, *weighted, *normal;  // of the sample; of one row: dh * scale1 and the norm

    static std::int64_t size(std::int64_t dim) { return 5 * padded(dim); }

    Scratch(float* at, std::int64_t dim) {
        float** const parts[] = {&gate, &bias, &scale1, &weighted, &normal};
        for (float** part : parts) {
            *part = at;
            at += padded(dim);
        }
    }
};

struct Means {
    Vec of_weighted, of_weighted_normal;
};

inline void add_to(float* sum, Vec x) { store(sum, load(sum) + x); }

// First pass over a row: adds to the sums of dshift and dscale, and returns the means that dx needs.
template <class Stream, class Branch>
Means norm_pass(const RowsBackward& call, Scratch s, float* sums, std::int64_t b, std::int64_t n) {
    const std::int64_t dim = call.problem.dim, stride = padded(dim);
    const Branch* dh = row_of<Branch>(call.dh, b, n);
    const Stream* x = row_of<Stream>(call.x_new, b, n);
    const float mean = call.mean[b * call.problem.tokens + n], rstd = call.rstd[b * call.problem.tokens + n];
    Vec of_weighted{}, of_weighted_normal{};
    for_each_vector(dim, [&](std::int64_t i, auto extent) {
        const Vec d = load(dh + i, extent), normal = keep((load(x + i, extent) - mean) * rstd, extent);
        add_to(sums + kShift * stride + i, d);
        add_to(sums + kScale * stride + i, d * normal);
        const Vec weighted = d * load(s.scale1 + i);
        of_weighted += weighted;
        of_weighted_normal += weighted * normal;
        store(s.weighted + i, weighted);
        store(s.normal + i, normal);
    });
    const float size = static_cast<float>(dim);
    return {splat(sum_lanes(of_weighted) / size), splat(sum_lanes(of_weighted_normal) / size)};
}

template <class Stream, class Branch, bool kResidual, bool kNorm>
void backward_row(const RowsBackward& call, Scratch s, float* sums, std::int64_t b, std::int64_t n) {
    const std::int64_t dim = call.problem.dim, stride = padded(dim);
    Means means{};
    float rstd = 0.0f;
    if constexpr (kNorm) {
        means = norm_pass<Stream, Branch>(call, s, sums, b, n);
        rstd = call.rstd[b * call.problem.tokens + n];
    }
    const Stream* dx_new = call.dx_new.data ? row_of<Stream>(call.dx_new, b, n) : nullptr;
    const Branch* y = row_of<Branch>(call.y, b, n);
    Stream* dx = row_of<Stream>(call.dx, b, n);
    Branch* dy = row_of<Branch>(call.dy, b, n);
    const bool has_bias = call.dbias.data != nullptr;
    for_each_vector(dim, [&](std::int64_t i, auto extent) {
        Vec d{};
        if constexpr (kResidual) d = load(dx_new + i, extent);
        if constexpr (kNorm) {
            const Vec g = load(s.weighted + i) - means.of_weighted;
            d += rstd * keep(g - load(s.normal + i) * means.of_weighted_normal, extent);
            store(dx + i, d, extent);
        }
        if constexpr (kResidual) {
            store(dy + i, d * load(s.gate + i), extent);
            add_to(sums + kGate * stride + i, d * (load(y + i, extent) + load(s.bias + i)));
            if (has_bias) add_to(sums + kStream * stride + i, d);
        }
    });
}

// Adds up the chunks in order, for some of the columns of every sample.
void finish(const RowsBackward& call, const float* partial, std::int64_t chunks, std::int64_t first,
            std::int64_t columns) {
    const RowsProblem& p = call.problem;
    const std::int64_t stride = padded(p.dim), row = kSums * stride;
    const auto write = [&](const Vectors& to, std::int64_t b, std::int64_t i, Vec x, auto extent) {
        with_type(to.dtype, [&](auto zero) { store(reinterpret_cast<decltype(zero)*>(row_of(to, b)) + i, x, extent); });
    };
    for_each_vector(columns, [&](std::int64_t offset, auto extent) {
        const std::int64_t i = first + offset;
        Vec dbias{};
        for (std::int64_t b = 0; b < p.batch; ++b) {
            const auto sum = [&](Sum which) {
                return sum_rows(partial + b * chunks * row + which * stride + i, chunks, row);
            };
            if (call.dshift.data) write(call.dshift, b, i, sum(kShift), extent);
            if (call.dscale.data) write(call.dscale, b, i, sum(kScale), extent);
            if (call.dgate.data) write(call.dgate, b, i, sum(kGate), extent);
            if (!call.dbias.data) continue;
            with_type(call.gate.dtype, [&](auto zero) {
                const auto* gate = reinterpret_cast<const decltype(zero)*>(row_of(call.gate, b));
                dbias += load(gate + i, extent) * sum(kStream);
            });
        }
        if (call.dbias.data) write(call.dbias, 0, i, dbias, extent);
    });
}

template <class Stream, class Branch, bool kResidual, bool kNorm>
void backward(const RowsBackward& call, int threads) {
    const RowsProblem& p = call.problem;
    const std::int64_t stride = padded(p.dim), chunk = chunk_rows(p.tokens, 16);
    const std::int64_t chunks = (p.tokens + chunk - 1) / chunk;  // per sample
    float* partial = workspace(static_cast<std::size_t>(p.batch * chunks * kSums * stride));
    parallel(p.batch * chunks, threads, Scratch::size(p.dim), [&](std::int64_t task, float* memory) {
        const std::int64_t b = task / chunks, first = task % chunks * chunk;
        const Scratch scratch(memory, p.dim);
        if (kResidual) {
            widen_sample(call.gate, b, p.dim, scratch.gate);
            widen_sample(call.bias, b, p.dim, scratch.bias);
        }
        if (kNorm) {
            widen_sample(call.scale, b, p.dim, scratch.scale1);
            for (std::int64_t i = 0; i < p.dim; i += kLanes) {
                store(scratch.scale1 + i, 1.0f + load(scratch.scale1 + i));
            }
        }
        float* sums = partial + task * kSums * stride;
        std::memset(sums, 0, static_cast<std::size_t>(kSums * stride) * sizeof(float));
        for (std::int64_t n = first; n < smaller(p.tokens, first + chunk); ++n) {
            backward_row<Stream, Branch, kResidual, kNorm>(call, scratch, sums, b, n);
        }
    });
    constexpr std::int64_t kColumns = 128;
    parallel((p.dim + kColumns - 1) / kColumns, threads, 0, [&](std::int64_t task, float*) {
        const std::int64_t first = task * kColumns;
        finish(call, partial, chunks, first, smaller(kColumns, p.dim - first));
    });
}

}  // namespace

void rows_backward(const RowsBackward& call, int threads) {
    with_types(call.problem, [&](auto stream, auto branch) {
        using S = decltype(stream);
        using B = decltype(branch);
        if (!call.y.data) return backward<S, B, false, true>(call, threads);
        if (!call.dh.data) return backward<S, B, true, false>(call, threads);
        backward<S, B, true, true>(call, threads);
    });
}

}  // namespace ditfast::host::DITFAST_ISA
