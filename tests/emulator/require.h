// What the cases of self_test.cpp demand.
#pragma once

#include <cstdio>
#include <functional>
#include <string>

#include "device/device.cuh"

namespace hlip {
namespace {

constexpr uint64_t kSeeds = 5;  // orders in which threads are resumed

void require(bool condition, const std::string& what) {
  if (!condition) throw std::logic_error(what);
}

// Runs `work`, which must fail with a message that has all of `parts` in it.
void require_error(std::initializer_list<std::string> parts, const std::function<void()>& work) {
  std::string message;
  try {
    work();
  } catch (const std::runtime_error& error) {
    message = error.what();
  }
  require(!message.empty(), "no error");
  std::puts(message.c_str());
  for (const std::string& part : parts) require(message.find(part) != std::string::npos, "no \"" + part + "\" in: " + message);
}

// The same for a kernel, whatever the order of threads, and once more as it leaves the emulator: usable.
template <typename Kernel>
void require_kernel_error(std::initializer_list<std::string> parts, int threads, uint32_t shared_bytes, Kernel kernel) {
  for (uint64_t seed = 0; seed < kSeeds; ++seed) {
    require_error(parts, [&] { emulate(2, threads, shared_bytes, seed, kernel); });
    int sum = 0;
    emulate(2, threads, 4 * threads, seed, [&] {
      shared_store(4 * thread_index(), thread_index());
      block_sync();
      sum += shared_load<int>(4 * (threads - 1 - thread_index()));
    });
    require(sum == threads * (threads - 1), "the emulator does not work after an error");
  }
}

}  // namespace
}  // namespace hlip
