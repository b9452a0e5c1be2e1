// Products of many rows, in fp16: a file of its own, since its kernels take long to compile.
#include "cuda/linear_tiles_launch.cuh"

namespace eet_patch::cuda {

template cudaError_t launch_linear_tiles<__half>(const LinearArgs&, int, TilePair, cudaStream_t);
}  // namespace eet_patch::cuda
