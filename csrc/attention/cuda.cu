#include "cuda.h"

#include <mutex>
#include <set>
#include <stdexcept>
#include <utility>

#include "kernels.h"
#include "number.h"
#include "plan.h"
#include "probe.cuh"

namespace ditfast {
namespace {

constexpr int kMinimumMajor = 8;  // compute capability

struct Kernel {
    const char* name;
    const void* function;
    int most_shared_bytes;
};

void require(cudaError_t error, const std::string& what) {
    if (error == cudaSuccess) return;
    cudaGetLastError();  // an error left behind would surface in the caller's next launch
    throw std::runtime_error(what + ": " + cudaGetErrorString(error));
}

class DeviceGuard {
  public:
    explicit DeviceGuard(int device) {
        require(cudaGetDevice(&previous_), "attention: cudaGetDevice");
        require(cudaSetDevice(device), "attention: cudaSetDevice(" + std::to_string(device) + ")");
    }
    ~DeviceGuard() { cudaSetDevice(previous_); }
    DeviceGuard(const DeviceGuard&) = delete;
    DeviceGuard& operator=(const DeviceGuard&) = delete;

  private:
    int previous_ = 0;
};

int multiprocessors(int device) {
    int count = 0;
    require(cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device),
            "attention: cudaDeviceGetAttribute");
    return count;
}

// Once per kernel and device. Not a stream operation, so allowed during graph capture.
void allow_shared_memory(const Kernel& kernel, int device) {
    static std::mutex mutex;
    static std::set<std::pair<const void*, int>> allowed;
    const std::lock_guard<std::mutex> lock(mutex);
    if (allowed.count({kernel.function, device})) return;
    const auto set = [&](cudaFuncAttribute attribute, int value) {
        require(cudaFuncSetAttribute(kernel.function, attribute, value),
                std::string(kernel.name) + ": cudaFuncSetAttribute");
    };
    set(cudaFuncAttributeMaxDynamicSharedMemorySize, kernel.most_shared_bytes);
    // L1 shares this memory: by default the driver may leave room for only one block.
    set(cudaFuncAttributePreferredSharedMemoryCarveout, cudaSharedmemCarveoutMaxShared);
    allowed.insert({kernel.function, device});
}

template <class Call>
void launch(const Kernel& kernel, Call call, Plan plan, int device, std::uintptr_t stream) {
    allow_shared_memory(kernel, device);
    void* arguments[] = {&call, &plan.parts};
    require(cudaLaunchKernel(kernel.function, dim3(static_cast<unsigned>(plan.blocks)),
                             dim3(static_cast<unsigned>(32 * plan.warps)), arguments, plan.shared_bytes,
                             reinterpret_cast<cudaStream_t>(stream)),
            kernel.name);
}

template <class T>
const void* forward_function(std::int64_t head_dim) {
    return head_dim == 64 ? forward_kernel<T, 64>() : forward_kernel<T, 72>();
}

template <class T>
const void* backward_function(std::int64_t head_dim) {
    return head_dim == 64 ? backward_kernel<T, 64>() : backward_kernel<T, 72>();
}

Kernel select_forward(const AttentionProblem& p) {
    const bool bf16 = p.dtype == DType::kBFloat16;
    return {"attention_forward", bf16 ? forward_function<BFloat16>(p.head_dim) : forward_function<Float16>(p.head_dim),
            forward_shared_bytes(kTile * kResidentTiles)};
}

Kernel select_backward(const AttentionProblem& p) {
    const bool bf16 = p.dtype == DType::kBFloat16;
    return {"attention_backward",
            bf16 ? backward_function<BFloat16>(p.head_dim) : backward_function<Float16>(p.head_dim),
            backward_shared_bytes(kTile * kResidentTiles)};
}

// Throws if the kernels cannot run, with the reason.
void require_support(int device) {
    int major = 0, minor = 0;
    require(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device), "CUDA");
    require(cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device), "CUDA");
    if (major < kMinimumMajor) {
        throw std::runtime_error("compute capability " + std::to_string(major) + "." + std::to_string(minor) +
                                 " is below " + std::to_string(kMinimumMajor) + ".0");
    }
    const DeviceGuard guard(device);
    cudaFuncAttributes attributes;
    require(cudaFuncGetAttributes(&attributes, backward_kernel<BFloat16, 72>()), "CUDA");
}

}  // namespace

std::string cuda_attention_supported(int device) {
    try {
        require_support(device);
    } catch (const std::runtime_error& reason) {
        return reason.what();
    }
    return "";
}

void attention_forward_cuda(const AttentionForward& call, int device, std::uintptr_t stream) {
    if (call.problem.empty()) return;
    const DeviceGuard guard(device);
    launch(select_forward(call.problem), call, plan_forward(call.problem, multiprocessors(device)), device, stream);
}

void attention_backward_cuda(const AttentionBackward& call, int device, std::uintptr_t stream) {
    if (call.problem.empty()) return;
    const DeviceGuard guard(device);
    launch(select_backward(call.problem), call, plan_backward(call.problem, multiprocessors(device)), device, stream);
}

void attention_probe(const std::uint16_t* matrices, const std::uint16_t* operands, std::uint16_t* out, int device,
                     std::uintptr_t stream) {
    const DeviceGuard guard(device);
    void* arguments[] = {&matrices, &operands, &out};
    require(cudaLaunchKernel(reinterpret_cast<const void*>(probe_layouts), dim3(1), dim3(32), arguments, 32 * 16,
                             reinterpret_cast<cudaStream_t>(stream)),
            "probe_layouts");
}

}  // namespace ditfast
