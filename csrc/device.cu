#include "device.h"

namespace ditfast {
namespace {

__global__ void probe_kernel() {}

cudaError_t run_probe(int device) {
    if (const cudaError_t error = cudaSetDevice(device)) return error;
    probe_kernel<<<1, 1>>>();
    if (const cudaError_t error = cudaGetLastError()) return error;
    return cudaDeviceSynchronize();
}

}  // namespace

std::string cuda_probe(int device) {
    int current = 0;
    cudaError_t error = cudaGetDevice(&current);
    if (error == cudaSuccess) {
        error = run_probe(device);
        cudaSetDevice(current);
    }
    cudaGetLastError();  // an error left behind would surface in the caller's next launch
    return error == cudaSuccess ? "" : cudaGetErrorString(error);
}

}  // namespace ditfast
