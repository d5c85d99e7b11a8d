#include <string>
#include <vector>

#include "attention/backward.cuh"
#include "attention/forward.cuh"
#include "attention/plan.h"
#include "attention/probe.cuh"
#include "machine.h"

// The attention kernels on the emulated machine, called through ctypes. Each returns an error message, or "".

namespace ditfast {
namespace {

using emulator::Machine;
using emulator::Region;

template <class Body>
const char* message_of(const Body& body) {
    static std::string message;
    message.clear();
    try {
        body();
    } catch (const std::exception& error) {
        message = error.what();
    }
    return message.c_str();
}

template <class Kernel, class Call>
void run(Kernel kernel, const Call& call, const Plan& plan, std::vector<Region> regions) {
    Machine machine(std::move(regions), 32 * plan.warps, plan.shared_bytes);
    for (std::int64_t block = 0; block < plan.blocks; ++block) {
        machine.run(static_cast<int>(block), [&] { kernel(call, plan.parts); });
    }
}

// Runs body(zero, d) with the problem's element type and head dim as constants.
template <class Body>
void specialize(const AttentionProblem& p, const Body& body) {
    const auto with = [&](auto zero) {
        if (p.head_dim == 72) body(zero, std::integral_constant<int, 72>{});
        if (p.head_dim == 64) body(zero, std::integral_constant<int, 64>{});
    };
    if (p.dtype == DType::kBFloat16) with(BFloat16{});
#ifndef DITFAST_BFLOAT16_ONLY
    if (p.dtype == DType::kFloat16) with(Float16{});
#endif
}

struct Bytes {  // of each tensor
    std::int64_t qkv, out, lse, dout, dqkv, dbias;
};

template <class Pointer>
Region region(const char* name, Pointer pointer, std::int64_t bytes, bool writable) {
    return {name, reinterpret_cast<std::uintptr_t>(pointer), static_cast<std::size_t>(bytes), writable, {}};
}

}  // namespace
}  // namespace ditfast

using namespace ditfast;

extern "C" const char* emulate_forward(const AttentionForward* call, const Bytes* bytes,
                                       int multiprocessors) {
    return message_of([&] {
        specialize(call->problem, [&](auto zero, auto d) {
            run(attention_forward<decltype(zero), decltype(d)::value>, *call,
                plan_forward(call->problem, multiprocessors),
                {region("qkv", call->qkv, bytes->qkv, false), region("out", call->out, bytes->out, true),
                 region("lse", call->lse, bytes->lse, true)});
        });
    });
}

extern "C" const char* emulate_backward(const AttentionBackward* call, const Bytes* bytes,
                                        int multiprocessors) {
    return message_of([&] {
        specialize(call->problem, [&](auto zero, auto d) {
            run(attention_backward<decltype(zero), decltype(d)::value>, *call,
                plan_backward(call->problem, multiprocessors),
                {region("qkv", call->qkv, bytes->qkv, false), region("out", call->out, bytes->out, false),
                 region("lse", call->lse, bytes->lse, false), region("dout", call->dout, bytes->dout, false),
                 region("dqkv", call->dqkv, bytes->dqkv, true),
                 region("dbias", call->dbias, bytes->dbias, true)});
        });
    });
}

extern "C" void plan(const AttentionProblem* problem, int multiprocessors, int backward, std::int64_t* out) {
    const Plan plan =
        backward ? plan_backward(*problem, multiprocessors) : plan_forward(*problem, multiprocessors);
    out[0] = plan.warps;
    out[1] = plan.parts;
    out[2] = plan.blocks;
    out[3] = plan.shared_bytes;
}

extern "C" std::int64_t groups(std::int64_t tokens) { return backward_groups(tokens); }

extern "C" const char* probe(const std::uint16_t* matrices, const std::uint16_t* operands,
                             std::uint16_t* out) {
    return message_of([&] {
        Machine machine({region("matrices", matrices, 4 * 8 * 8 * 2, false),
                         region("operands", operands, 2 * 32 * kProbeOperands * 4, false),
                         region("out", out, 32 * kProbeResults * 4, true)},
                        32, 32 * 16);
        machine.run(0, [&] { probe_layouts(matrices, operands, out); });
    });
}
