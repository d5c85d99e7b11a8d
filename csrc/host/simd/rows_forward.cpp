#include "kernels.h"
#include "rows.h"

namespace ditfast::host::DITFAST_ISA {
namespace {

constexpr std::int64_t kRows = 16;  // per task

// A task's float32 rows, each padded to whole vectors: the vectors of its sample, and one row of x_new. Passed by
// value: through a reference, the pointers would be reloaded after every store.
struct Scratch {
    float *gate, *bias, *shift, *scale1, *row;  // scale1 = 1 + scale

    static std::int64_t size(std::int64_t dim) { return 5 * padded(dim); }

    Scratch(float* at, std::int64_t dim) {
        float** const parts[] = {&gate, &bias, &shift, &scale1, &row};
        for (float** part : parts) {
            *part = at;
            at += padded(dim);
        }
    }
};

template <bool kResidual, bool kNorm>
void fill(const Scratch& s, const RowsForward& call, std::int64_t b) {
    const std::int64_t dim = call.problem.dim;
    if (kResidual) {
        widen_sample(call.gate, b, dim, s.gate);
        widen_sample(call.bias, b, dim, s.bias);
    }
    if (kNorm) {
        widen_sample(call.shift, b, dim, s.shift);
        widen_sample(call.scale, b, dim, s.scale1);
        for (std::int64_t i = 0; i < dim; i += kLanes) store(s.scale1 + i, 1.0f + load(s.scale1 + i));
    }
}

struct Statistics {
    float mean, rstd;
};

// Of a float32 row, in two passes.
inline Statistics statistics(const float* row, Vec sum, std::int64_t dim, float eps) {
    const float mean = sum_lanes(sum) / static_cast<float>(dim);
    Vec squares{};
    for_each_vector(dim, [&](std::int64_t i, auto extent) {
        const Vec centred = keep(load(row + i) - mean, extent);
        squares += centred * centred;
    });
    return {mean, 1.0f / __builtin_sqrtf(sum_lanes(squares) / static_cast<float>(dim) + eps)};
}

template <class Stream, class Branch, bool kResidual, bool kNorm>
void forward_row(const RowsForward& call, Scratch s, std::int64_t b, std::int64_t n) {
    const std::int64_t dim = call.problem.dim;
    const Stream* x = row_of<Stream>(call.x, b, n);
    Vec sum{};
    if constexpr (kResidual) {
        const Branch* y = row_of<Branch>(call.y, b, n);
        Stream* x_new = row_of<Stream>(call.x_new, b, n);
        for_each_vector(dim, [&](std::int64_t i, auto extent) {
            const Vec biased = load(y + i, extent) + load(s.bias + i);
            const auto stored = narrow(x_new, load(s.gate + i) * biased + load(x + i, extent));
            store_narrow(x_new + i, stored, extent);
            if constexpr (!kNorm) return;
            const Vec value = keep(widen(x_new, stored), extent);  // x_new is normalized as stored
            store(s.row + i, value);
            sum += value;
        });
    } else {
        for_each_vector(dim, [&](std::int64_t i, auto extent) {
            const Vec value = load(x + i, extent);
            store(s.row + i, value);
            sum += value;
        });
    }
    if constexpr (kNorm) {
        const Statistics stats = statistics(s.row, sum, dim, call.eps);
        call.mean[b * call.problem.tokens + n] = stats.mean;
        call.rstd[b * call.problem.tokens + n] = stats.rstd;
        Branch* h = row_of<Branch>(call.h, b, n);
        for_each_vector(dim, [&](std::int64_t i, auto extent) {
            const Vec normal = (load(s.row + i) - stats.mean) * stats.rstd;
            store(h + i, normal * load(s.scale1 + i) + load(s.shift + i), extent);
        });
    }
}

template <class Stream, class Branch, bool kResidual, bool kNorm>
void forward(const RowsForward& call, int threads) {
    const RowsProblem& p = call.problem;
    const std::int64_t tasks = (p.tokens + kRows - 1) / kRows;  // per sample
    parallel(p.batch * tasks, threads, Scratch::size(p.dim), [&](std::int64_t task, float* memory) {
        const std::int64_t b = task / tasks, first = task % tasks * kRows;
        const Scratch scratch(memory, p.dim);
        fill<kResidual, kNorm>(scratch, call, b);
        for (std::int64_t n = first; n < smaller(p.tokens, first + kRows); ++n) {
            forward_row<Stream, Branch, kResidual, kNorm>(call, scratch, b, n);
        }
    });
}

}  // namespace

void rows_forward(const RowsForward& call, int threads) {
    with_types(call.problem, [&](auto stream, auto branch) {
        using S = decltype(stream);
        using B = decltype(branch);
        if (!call.y.data) return forward<S, B, false, true>(call, threads);
        if (!call.h.data) return forward<S, B, true, false>(call, threads);
        forward<S, B, true, true>(call, threads);
    });
}

}  // namespace ditfast::host::DITFAST_ISA
