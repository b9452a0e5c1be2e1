// What the files of bindings share: addresses, the device of a launch, and errors as exceptions.
#pragma once

#include <pybind11/pybind11.h>

#include <atomic>
#include <cstdint>
#include <stdexcept>
#include <string>
#include <tuple>

#include "ops.h"

#ifdef EET_WITH_CUDA
#include <cuda_runtime.h>
#endif

namespace py = pybind11;

namespace eet_patch {

using Address = uintptr_t;
using Triple = std::tuple<int64_t, int64_t, int64_t>;
using AddressTriple = std::tuple<Address, Address, Address>;
// address, kind, batch stride, head stride, query stride, key stride
using MaskTuple = std::tuple<Address, int, int64_t, int64_t, int64_t, int64_t>;

inline void* ptr(Address address) { return reinterpret_cast<void*>(address); }
inline const int64_t* index_ptr(Address address) {
  return reinterpret_cast<const int64_t*>(address);
}

inline const int32_t* short_index_ptr(Address address) {
  return reinterpret_cast<const int32_t*>(address);
}

inline HeadStrides strides(const Triple& t) {
  return {std::get<0>(t), std::get<1>(t), std::get<2>(t)};
}

inline AttentionMask attention_mask(const MaskTuple& t) {
  AttentionMask mask;
  mask.data = ptr(std::get<0>(t));
  mask.kind = static_cast<MaskKind>(std::get<1>(t));
  mask.batch_stride = std::get<2>(t);
  mask.head_stride = std::get<3>(t);
  mask.query_stride = std::get<4>(t);
  mask.key_stride = std::get<5>(t);
  return mask;
}

inline void fill(const void* (&to)[3], const AddressTriple& from) {
  to[0] = ptr(std::get<0>(from));
  to[1] = ptr(std::get<1>(from));
  to[2] = ptr(std::get<2>(from));
}

inline void raise(const char* op, const Status& status) {
  if (status.ok()) return;
  const std::string name = std::string("eet_patch.") + op + ": ";
  if (status.code == Status::kBadIndex)
    throw py::index_error(name + "index out of range of its table");
  if (status.code == Status::kUnsupported) {
    throw py::value_error(name + "these sizes are not supported on this device");
  }
#ifdef EET_WITH_CUDA
  const auto error = static_cast<cudaError_t>(status.code);
  throw std::runtime_error(name + "CUDA error " + std::to_string(status.code) + " (" +
                           cudaGetErrorName(error) + "): " + cudaGetErrorString(error));
#else
  throw std::runtime_error(name + "failed with code " + std::to_string(status.code));
#endif
}

// Selects `device` for the launch and puts the caller's choice back.
class DeviceGuard {
 public:
  explicit DeviceGuard(int device) {
#ifdef EET_WITH_CUDA
    if (device < 0) return;
    error_ = cudaGetDevice(&previous_);
    if (error_ == cudaSuccess && previous_ != device) {
      error_ = cudaSetDevice(device);
      changed_ = error_ == cudaSuccess;
    }
#else
    (void)device;
#endif
  }
  ~DeviceGuard() {
#ifdef EET_WITH_CUDA
    if (changed_) cudaSetDevice(previous_);
#endif
  }
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;
  int error() const { return error_; }

 private:
#ifdef EET_WITH_CUDA
  cudaError_t error_ = cudaSuccess;
  int previous_ = 0;
  bool changed_ = false;
#else
  int error_ = 0;
#endif
};

// The OpenMP threads of a process don't exist in a child that it forked, and a parallel region
// there would wait for them for ever: a forked child computes on one thread.
inline std::atomic<bool> in_forked_child{false};

template <typename Args>
using Op = Status (*)(const Args&, const Context&);

template <typename Args>
inline void run(const char* name, Op<Args> on_cpu, Op<Args> on_cuda, const Args& args, int device,
                Address stream, int num_threads) {
  Status status;
  {
    py::gil_scoped_release release;
    const Context context{ptr(stream), in_forked_child ? 1 : num_threads};
    if (device < 0) {
      status = on_cpu(args, context);
    } else if (on_cuda == nullptr) {
      status.code = Status::kUnsupported;
    } else {
      const DeviceGuard guard(device);
      status.code = guard.error();
      if (status.ok()) status = on_cuda(args, context);
    }
  }
  raise(name, status);
}

#ifdef EET_WITH_CUDA
#define EET_CUDA_OP(op) &cuda::op
#define EET_ON_DEVICE(call) (device < 0 ? cpu::call : cuda::call)
#else
#define EET_CUDA_OP(op) static_cast<decltype(&cpu::op)>(nullptr)
#define EET_ON_DEVICE(call) (cpu::call)
#endif
#define EET_RUN(op) run(#op, &cpu::op, EET_CUDA_OP(op), args, device, stream, num_threads)

// Every file of bindings adds its own functions.
void bind_decode(py::module_& m);
void bind_select(py::module_& m);
void bind_packing(py::module_& m);

}  // namespace eet_patch
