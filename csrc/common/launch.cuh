// Launching: choice of the element type, programmatic dependent launch, clusters, and errors as
// values.
#pragma once

#include <cuda_runtime.h>

#include <algorithm>
#include <utility>

#include "common/convert.cuh"
#include "ops.h"

namespace eet_patch::cuda {

struct LaunchConfig {
  dim3 grid, block;
  cudaStream_t stream = nullptr;
  size_t shared_bytes = 0;
  // Of any launch of the kernel, where its launches differ: threads may launch it at the same time.
  size_t most_shared_bytes = 0;
  // The kernel before this one on the stream is ours and of the same call, so this one may start
  // before it ends; it reads nothing that the other wrote, and writes nothing, before
  // wait_for_predecessor().
  bool chained = false;
  int cluster_size = 1;
};

// Queries are cheap (no synchronisation) and need no state of ours.
inline int device_attribute(cudaDeviceAttr attribute) {
  int device = 0, value = 0;
  if (cudaGetDevice(&device) != cudaSuccess ||
      cudaDeviceGetAttribute(&value, attribute, device) != cudaSuccess) {
    (void)cudaGetLastError();
    return 0;
  }
  return value;
}

// The compute capability, major, that host code may count on in the kernels: the device's, but no
// more than the extension was built for. A Hopper chip that runs the PTX of an older one has
// kernels without clusters, bulk copies and waits for a predecessor.
inline int kernel_capability() {
#ifdef __CUDA_ARCH_LIST__
  constexpr int kArchs[] = {__CUDA_ARCH_LIST__};  // ascending, as 800, 900
  constexpr int kNewest = kArchs[sizeof(kArchs) / sizeof(kArchs[0]) - 1] / 100;
#else
  constexpr int kNewest = 8;
#endif
  const int device = device_attribute(cudaDevAttrComputeCapabilityMajor);
  return device < kNewest ? device : kNewest;
}

// Compiled for sm_90a and running there: __CUDA_ARCH_LIST__ doesn't tell 90 from 90a, so that the
// build must not hold plain 90 (setup.py never does).
inline bool has_warpgroup_products() {
  return kernel_capability() == 9 && device_attribute(cudaDevAttrComputeCapabilityMajor) == 9 &&
         device_attribute(cudaDevAttrComputeCapabilityMinor) == 0;
}

// Returns the launch's own error and clears it, so that the next op does not report it as its own.
template <typename... Parameters, typename... Arguments>
cudaError_t launch(const LaunchConfig& config, void (*kernel)(Parameters...),
                   Arguments&&... arguments) {
  constexpr size_t kDefaultSharedBytes =
      40 * 1024;  // 48 KB a block unless asked for more, less the static arrays' share
  cudaError_t error = cudaSuccess;
  const size_t most = std::max(config.shared_bytes, config.most_shared_bytes);
  if (most > kDefaultSharedBytes) {
    error =
        cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel),
                             cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(most));
  }
  if (error == cudaSuccess) {
    cudaLaunchConfig_t launch_config = {};
    launch_config.gridDim = config.grid;
    launch_config.blockDim = config.block;
    launch_config.dynamicSmemBytes = config.shared_bytes;
    launch_config.stream = config.stream;
    cudaLaunchAttribute attributes[2];
    unsigned count = 0;
    if (config.chained && kernel_capability() >= 9) {
      attributes[count].id = cudaLaunchAttributeProgrammaticStreamSerialization;
      attributes[count++].val.programmaticStreamSerializationAllowed = 1;
    }
    if (config.cluster_size > 1) {
      attributes[count].id = cudaLaunchAttributeClusterDimension;
      attributes[count].val.clusterDim.x = config.cluster_size;
      attributes[count].val.clusterDim.y = 1;
      attributes[count++].val.clusterDim.z = 1;
    }
    launch_config.attrs = attributes;
    launch_config.numAttrs = count;
    error = cudaLaunchKernelEx(&launch_config, kernel, std::forward<Arguments>(arguments)...);
  }
  if (error != cudaSuccess) (void)cudaGetLastError();
  return error;
}

inline Status to_status(cudaError_t error) { return Status{static_cast<int>(error)}; }
inline cudaStream_t stream_of(const Context& context) {
  return static_cast<cudaStream_t>(context.stream);
}
inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
inline int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }
inline int64_t element_size(DType dtype) { return dtype == DType::kFloat32 ? 4 : 2; }
constexpr int64_t kWorkspaceAlignment = 256;
inline int64_t workspace_part(int64_t bytes) { return round_up(bytes, kWorkspaceAlignment); }

// Calls function(T()) with the element type of `dtype`.
template <typename Function>
cudaError_t dispatch_dtype(DType dtype, Function&& function) {
  switch (dtype) {
    case DType::kFloat32:
      return function(float());
    case DType::kFloat16:
      return function(__half());
    case DType::kBFloat16:
      return function(__nv_bfloat16());
  }
  return cudaErrorInvalidValue;
}

// Both do nothing unless the launch asked for programmatic dependent launch. Every thread calls
// them, in this order.
__device__ __forceinline__ void release_dependents() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}
__device__ __forceinline__ void wait_for_predecessor() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

}  // namespace eet_patch::cuda
