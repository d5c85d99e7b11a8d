#include "kernels.h"
#include "rows.h"

// Primal and tangent in one pass over each row. With normal = (x_new - mean) * rstd and centred_t = x_new_t minus its
// mean, the tangent of normal is rstd * (centred_t - normal * mean(normal * centred_t)).

namespace ditfast::host::DITFAST_ISA {
namespace {

constexpr std::int64_t kRows = 16;  // per task

// A task's float32 rows, each padded to whole vectors: the vectors of its sample and one row of x_new, with their
// tangents. Passed by value: through a reference, the pointers would be reloaded after every store.
struct Scratch {
    float *gate, *bias, *shift, *scale1, *row;  // scale1 = 1 + scale
    float *gate_t, *bias_t, *shift_t, *scale_t, *row_t;

    static std::int64_t size(std::int64_t dim) { return 10 * padded(dim); }

    Scratch(float* at, std::int64_t dim) {
        float** const parts[] = {&gate, &bias, &shift, &scale1, &row, &gate_t, &bias_t, &shift_t, &scale_t, &row_t};
        for (float** part : parts) {
            *part = at;
            at += padded(dim);
        }
    }
};

template <bool kResidual, bool kNorm>
void fill(const Scratch& s, const RowsJvp& call, std::int64_t b) {
    const RowsForward& f = call.forward;
    const std::int64_t dim = f.problem.dim;
    if (kResidual) {
        widen_sample(f.gate, b, dim, s.gate);
        widen_sample(f.bias, b, dim, s.bias);
        widen_sample(call.gate_t, b, dim, s.gate_t);
        widen_sample(call.bias_t, b, dim, s.bias_t);
    }
    if (kNorm) {
        widen_sample(f.shift, b, dim, s.shift);
        widen_sample(f.scale, b, dim, s.scale1);
        for (std::int64_t i = 0; i < dim; i += kLanes) store(s.scale1 + i, 1.0f + load(s.scale1 + i));
        widen_sample(call.shift_t, b, dim, s.shift_t);
        widen_sample(call.scale_t, b, dim, s.scale_t);
    }
}

template <class T, class Extent>
inline Vec load_or_zero(const T* row, std::int64_t i, Extent extent) {
    return row ? load(row + i, extent) : Vec{};
}

struct Sums {
    Vec of_row, of_row_t;
};

// Writes x_new and its tangent; for a norm, which reads them as stored, also puts both in the scratch as float32.
template <class Stream, class Branch, bool kResidual, bool kNorm>
Sums residual(const RowsJvp& call, Scratch s, std::int64_t b, std::int64_t n) {
    const RowsForward& f = call.forward;
    const Stream* x = row_of<Stream>(f.x, b, n);
    const Stream* x_t = row_of<Stream>(call.x_t, b, n);
    const Branch* y = row_of<Branch>(f.y, b, n);
    const Branch* y_t = row_of<Branch>(call.y_t, b, n);
    Stream* x_new = row_of<Stream>(f.x_new, b, n);
    Stream* x_new_t = row_of<Stream>(call.x_new_t, b, n);
    Sums sums{};
    for_each_vector(f.problem.dim, [&](std::int64_t i, auto extent) {
        Vec value = load(x + i, extent), tangent = load_or_zero(x_t, i, extent);
        if constexpr (kResidual) {
            const Vec gate = load(s.gate + i), biased = load(y + i, extent) + load(s.bias + i);
            const Vec biased_t = load_or_zero(y_t, i, extent) + load(s.bias_t + i);
            const auto stored = narrow(x_new, gate * biased + value);
            const auto stored_t = narrow(x_new_t, load(s.gate_t + i) * biased + (gate * biased_t + tangent));
            store_narrow(x_new + i, stored, extent);
            store_narrow(x_new_t + i, stored_t, extent);
            value = keep(widen(x_new, stored), extent);
            tangent = keep(widen(x_new_t, stored_t), extent);
        }
        if constexpr (kNorm) {
            store(s.row + i, value);
            store(s.row_t + i, tangent);
            sums.of_row += value;
            sums.of_row_t += tangent;
        }
    });
    return sums;
}

// h and its tangent, mean and rstd, from the rows in the scratch.
template <class Branch>
void norm(const RowsJvp& call, Scratch s, Sums sums, std::int64_t b, std::int64_t n) {
    const RowsForward& f = call.forward;
    const std::int64_t dim = f.problem.dim, row = b * f.problem.tokens + n;
    const float size = static_cast<float>(dim);
    const float mean = sum_lanes(sums.of_row) / size, mean_t = sum_lanes(sums.of_row_t) / size;
    Vec squares{}, products{};
    for_each_vector(dim, [&](std::int64_t i, auto extent) {
        const Vec centred = keep(load(s.row + i) - mean, extent);
        squares += centred * centred;
        products += centred * (load(s.row_t + i) - mean_t);
    });
    const float rstd = 1.0f / __builtin_sqrtf(sum_lanes(squares) / size + f.eps);
    const float along = sum_lanes(products) / size * rstd;  // mean of normal * centred_t
    f.mean[row] = mean;
    f.rstd[row] = rstd;
    Branch* h = row_of<Branch>(f.h, b, n);
    Branch* h_t = row_of<Branch>(call.h_t, b, n);
    for_each_vector(dim, [&](std::int64_t i, auto extent) {
        const Vec normal = (load(s.row + i) - mean) * rstd, scale1 = load(s.scale1 + i);
        const Vec normal_t = ((load(s.row_t + i) - mean_t) - normal * along) * rstd;
        store(h + i, normal * scale1 + load(s.shift + i), extent);
        store(h_t + i, normal_t * scale1 + (normal * load(s.scale_t + i) + load(s.shift_t + i)), extent);
    });
}

template <class Stream, class Branch, bool kResidual, bool kNorm>
void jvp(const RowsJvp& call, int threads) {
    const RowsProblem& p = call.forward.problem;
    const std::int64_t tasks = (p.tokens + kRows - 1) / kRows;  // per sample
    parallel(p.batch * tasks, threads, Scratch::size(p.dim), [&](std::int64_t task, float* memory) {
        const std::int64_t b = task / tasks, first = task % tasks * kRows;
        const Scratch scratch(memory, p.dim);
        fill<kResidual, kNorm>(scratch, call, b);
        for (std::int64_t n = first; n < smaller(p.tokens, first + kRows); ++n) {
            const Sums sums = residual<Stream, Branch, kResidual, kNorm>(call, scratch, b, n);
            if constexpr (kNorm) norm<Branch>(call, scratch, sums, b, n);
        }
    });
}

}  // namespace

void rows_jvp(const RowsJvp& call, int threads) {
    with_types(call.forward.problem, [&](auto stream, auto branch) {
        using S = decltype(stream);
        using B = decltype(branch);
        if (!call.forward.y.data) return jvp<S, B, false, true>(call, threads);
        if (!call.forward.h.data) return jvp<S, B, true, false>(call, threads);
        jvp<S, B, true, true>(call, threads);
    });
}

}  // namespace ditfast::host::DITFAST_ISA
