// The short-segment attention kernels, run by the emulator: what tests/emulated_attention.py calls through ctypes.
#include <algorithm>
#include <cstdio>

#include "short_attention/choice.cuh"

namespace {

using namespace hlip;

// Runs one kernel over all its blocks, with every output element to be written exactly once. Returns 0, or 1 with the reason.
template <typename Arguments, typename Choose>
int run(const Arguments& a, const Extent& extent, uint64_t seed, char* reason, size_t size, Choose choose) {
  try {
    const bool found = choose([&](auto kernel, const auto& arguments, const Launch& launch) {
      // Blocks that take one piece of work after the other: so few that most take several.
      const int64_t few = 1 + static_cast<int64_t>(seed % 3);
      const int64_t blocks = launch.resident > 0 ? std::min(launch.items, few) : launch.items;
      emulate(blocks, launch.threads, static_cast<uint32_t>(launch.bytes), seed, [&] { kernel(arguments); });
    });
    if (!found) throw std::runtime_error("no kernel for " + std::to_string(extent.packs) + " packs");
    check_writes();
  } catch (const std::exception& error) {
    std::snprintf(reason, size, "%s", error.what());
    forget_writes();
    return 1;
  }
  forget_writes();
  return 0;
}

}  // namespace

extern "C" int short_forward(int half, const ForwardArguments* a, const Extent* extent, uint64_t seed, char* reason, size_t size) {
  const size_t elements = static_cast<size_t>(a->num_rows * a->heads);
  expect_writes(a->out, elements * HLIP_HEAD_DIM * 2, "out");
  expect_writes(a->lse, elements * 4, "lse");
  return run(*a, *extent, seed, reason, size, [&](auto launch) {
    return half ? choose_forward<__half, HLIP_HEAD_DIM>(*a, *extent, launch)
                : choose_forward<__nv_bfloat16, HLIP_HEAD_DIM>(*a, *extent, launch);
  });
}

extern "C" int short_backward(int half, const BackwardArguments* a, const Extent* extent, uint64_t seed, char* reason, size_t size) {
  const size_t bytes = static_cast<size_t>(a->num_rows * a->heads) * HLIP_HEAD_DIM * 2;
  expect_writes(a->dq, bytes, "dq");
  expect_writes(a->dk, bytes, "dk");
  expect_writes(a->dv, bytes, "dv");
  return run(*a, *extent, seed, reason, size, [&](auto launch) {
    return half ? choose_backward<__half, HLIP_HEAD_DIM>(*a, *extent, launch)
                : choose_backward<__nv_bfloat16, HLIP_HEAD_DIM>(*a, *extent, launch);
  });
}
