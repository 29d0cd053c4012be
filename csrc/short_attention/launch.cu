// Launches the short-segment attention kernels of one head dim: compiled once for each, with HLIP_HEAD_DIM.
#include <algorithm>

#include "../dispatch.cuh"
#include "choice.cuh"

#ifndef HLIP_HEAD_DIM
#error "compile this file with -DHLIP_HEAD_DIM=<head dim>"
#endif

namespace hlip {
namespace {

[[noreturn]] void fail(const char* what, const char* reason, const Extent& extent, int64_t heads, int threads, int64_t bytes) {
  throw std::runtime_error(std::string("hlip: CUDA kernel ") + what + " failed: " + reason + " (head dim " +
                           std::to_string(HLIP_HEAD_DIM) + ", " + std::to_string(heads) + " heads, " + std::to_string(extent.packs) +
                           " packs of at most " + std::to_string(extent.rows) + " rows, " + std::to_string(extent.alone) +
                           " of them of one segment; blocks of " + std::to_string(threads) + " threads with " + std::to_string(bytes) +
                           " bytes of shared memory)");
}

cudaError_t attribute(cudaDeviceAttr name, int& value) {
  int device = 0;
  const cudaError_t status = cudaGetDevice(&device);
  return status == cudaSuccess ? cudaDeviceGetAttribute(&value, name, device) : status;
}

// Lets launches of a kernel have `bytes` of dynamic shared memory; beyond 48 KB that must be asked for. It asks for all that the card
// gives a block (none of these kernels has static shared memory): the limit is one for all threads of the process, and another's
// launch may come between this and the launch that it is for, so nobody may lower it.
template <typename Kernel>
cudaError_t allow_shared(Kernel kernel, int64_t bytes) {
  int most = 0;
  const cudaError_t status = attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, most);
  if (status != cudaSuccess) return status;
  return bytes <= most ? cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, most) : cudaErrorInvalidValue;
}

template <typename Arguments, typename Choose>
void run_on(const char* what, Target target, Type type, const Arguments& a, const Extent& extent, Choose choose) {
  if (target.on_host) fail(what, "it runs on GPUs only (tests emulate it: tests/emulated_attention.py)", extent, a.heads, 0, 0);
  if (extent.packs * a.heads == 0) return;
  if (extent.packs * a.heads > 0x7fffffff) fail(what, "too many blocks for one launch", extent, a.heads, 0, 0);
  const auto run = [&](auto kernel, const auto& arguments, const Launch& launch) {
    cudaError_t status = allow_shared(kernel, launch.bytes);
    int64_t blocks = launch.items;
    if (status == cudaSuccess && launch.resident > 0) {
      int count = 0;
      status = attribute(cudaDevAttrMultiProcessorCount, count);
      blocks = std::min<int64_t>(blocks, int64_t{count} * launch.resident);
    }
    if (status == cudaSuccess) {
      kernel<<<static_cast<unsigned>(blocks), launch.threads, launch.bytes, reinterpret_cast<cudaStream_t>(target.stream)>>>(arguments);
      status = cudaGetLastError();
    }
    if (status == cudaSuccess) return;
    cudaGetLastError();  // forgets it, or the next launch would be told of it
    fail(launch.kernel, cudaGetErrorString(status), extent, a.heads, launch.threads, launch.bytes);
  };
  bool found = false;
  if (type == Type::kFloat16) found = choose(TypeTag<__half>{}, run);
  if (type == Type::kBFloat16) found = choose(TypeTag<__nv_bfloat16>{}, run);
  if (!found) fail(what, "there is none for this", extent, a.heads, 0, 0);
}

}  // namespace

template <>
void short_forward<HLIP_HEAD_DIM>(Target target, Type type, const ForwardArguments& a, const Extent& extent) {
  run_on("short_attention_forward", target, type, a, extent, [&](auto tag, auto run) {
    return choose_forward<typename decltype(tag)::type, HLIP_HEAD_DIM>(a, extent, run);
  });
}

template <>
void short_backward<HLIP_HEAD_DIM>(Target target, Type type, const BackwardArguments& a, const Extent& extent) {
  run_on("short_attention_backward", target, type, a, extent, [&](auto tag, auto run) {
    return choose_backward<typename decltype(tag)::type, HLIP_HEAD_DIM>(a, extent, run);
  });
}

}  // namespace hlip
