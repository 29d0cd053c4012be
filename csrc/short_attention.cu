// Launches the short-segment attention kernels of one head dim: compiled once for each, with HLIP_HEAD_DIM.
#include "dispatch.cuh"
#include "short_attention_choice.cuh"

#ifndef HLIP_HEAD_DIM
#error "compile this file with -DHLIP_HEAD_DIM=<head dim>"
#endif

namespace hlip {
namespace {

[[noreturn]] void fail(const char* what, const char* reason, const Extent& extent, int64_t heads, int threads, int64_t bytes) {
  throw std::runtime_error(std::string("hlip: CUDA kernel ") + what + " failed: " + reason + " (head dim " +
                           std::to_string(HLIP_HEAD_DIM) + ", " + std::to_string(heads) + " heads, " + std::to_string(extent.blocks) +
                           " packs of at most " + std::to_string(extent.rows) + " rows seeing at most " + std::to_string(extent.keys) +
                           "; blocks of " + std::to_string(threads) + " threads with " + std::to_string(bytes) +
                           " bytes of shared memory)");
}

template <typename Arguments, typename Choose>
void launch(const char* what, Target target, Type type, const Arguments& a, const Extent& extent, Choose choose) {
  if (target.on_host) fail(what, "it runs on GPUs only (tests emulate it: tests/emulated_attention.py)", extent, a.heads, 0, 0);
  if (extent.blocks * a.heads == 0) return;
  if (extent.blocks * a.heads > 0x7fffffff) fail(what, "too many blocks for one launch", extent, a.heads, 0, 0);
  const auto run = [&](auto kernel, const Arguments& arguments, int threads, int64_t bytes) {
    // More than 48 KB must be asked for; the answer says if the card has that much.
    cudaError_t status = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(bytes));
    if (status == cudaSuccess) {
      kernel<<<static_cast<unsigned>(extent.blocks * a.heads), threads, bytes, reinterpret_cast<cudaStream_t>(target.stream)>>>(arguments);
      status = cudaGetLastError();
    }
    if (status != cudaSuccess) fail(what, cudaGetErrorString(status), extent, a.heads, threads, bytes);
  };
  bool found = false;
  if (type == Type::kFloat16) found = choose(TypeTag<__half>{}, run);
  if (type == Type::kBFloat16) found = choose(TypeTag<__nv_bfloat16>{}, run);
  if (!found) fail(what, "there is none for this", extent, a.heads, 0, 0);
}

}  // namespace

template <>
void short_forward<HLIP_HEAD_DIM>(Target target, Type type, const ForwardArguments& a, const Extent& extent) {
  launch("short_attention_forward", target, type, a, extent, [&](auto tag, auto run) {
    return choose_forward<typename decltype(tag)::type, HLIP_HEAD_DIM>(a, extent, run);
  });
}

template <>
void short_backward<HLIP_HEAD_DIM>(Target target, Type type, const BackwardArguments& a, const Extent& extent) {
  launch("short_attention_backward", target, type, a, extent, [&](auto tag, auto run) {
    return choose_backward<typename decltype(tag)::type, HLIP_HEAD_DIM>(a, extent, run);
  });
}

}  // namespace hlip
