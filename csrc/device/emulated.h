// The host's side of device.cuh: what kernels call, done by the machine of emulator.h.
#pragma once

#include <cuda_runtime.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <memory>
#include <string>
#include <type_traits>

#include "../element.cuh"
#include "emulator.h"

#define HLIP_DEVICE inline
#define HLIP_KERNEL(...) void

namespace hlip {

namespace emulation {

// ---------------------------------------------------------------- the work of collectives

struct LoadArguments {
  uint32_t* matrices;
  uint32_t row;
};

inline void load_all_lanes(void** arguments, bool transposed, Site site) {
  uint16_t rows[32][8];
  for (int lane = 0; lane < 32; ++lane) {
    const Shared row = static_cast<LoadArguments*>(arguments[lane])->row;
    note_read(row, 16, machine.current / 32 * 32 + lane, site);
    std::memcpy(rows[lane], shared_data(row), 16);
  }
  for (int lane = 0; lane < 32; ++lane) {
    const int across = 2 * (lane % 4), along = lane / 4;
    for (int matrix = 0; matrix < 4; ++matrix) {
      const auto* m = rows + 8 * matrix;
      const uint32_t low = transposed ? m[across][along] : m[along][across];
      const uint32_t high = transposed ? m[across + 1][along] : m[along][across + 1];
      static_cast<LoadArguments*>(arguments[lane])->matrices[matrix] = low | high << 16;
    }
  }
}

struct ProductArguments {
  float* c;
  const uint32_t* a;
  uint32_t b[2];
};

template <typename T>
const float* float_of_bits() {  // of all 65536 elements: the conversion on the host is slow
  static const std::unique_ptr<float[]> table = [] {
    std::unique_ptr<float[]> values(new float[65536]);
    for (int bits = 0; bits < 65536; ++bits) {
      const uint16_t narrow = static_cast<uint16_t>(bits);
      T element;
      std::memcpy(static_cast<void*>(&element), &narrow, 2);
      values[bits] = to_float(element);
    }
    return values;
  }();
  return table.get();
}

// The 16 products of each element are summed in float32, in order, and the sum is added to c.
template <typename T>
#if defined(__GNUC__)
__attribute__((no_sanitize("address", "undefined")))  // it touches nothing but 32 lanes' arguments, a thousand times
#endif
void
multiply_all_lanes(void** arguments) {
  typedef float Row __attribute__((vector_size(32)));  // one row of b or c
  const float* const value = float_of_bits<T>();
  float a[16][16];
  union {
    Row row[16];
    float at[16][8];
  } b, c;
  for (int lane = 0; lane < 32; ++lane) {
    const auto& mine = *static_cast<ProductArguments*>(arguments[lane]);
    const int g = lane / 4, pair = 2 * (lane % 4);
    for (int i = 0; i < 4; ++i) {
      for (int e = 0; e < 2; ++e) a[g + i % 2 * 8][pair + i / 2 * 8 + e] = value[mine.a[i] >> (16 * e) & 0xffff];
    }
    for (int i = 0; i < 4; ++i) b.at[pair + i / 2 * 8 + i % 2][g] = value[mine.b[i / 2] >> (16 * (i % 2)) & 0xffff];
  }
  for (int m = 0; m < 16; ++m) {
    Row sum = a[m][0] * b.row[0];
    for (int k = 1; k < 16; ++k) sum += a[m][k] * b.row[k];
    c.row[m] = sum;
  }
  for (int lane = 0; lane < 32; ++lane) {
    float* const mine = static_cast<ProductArguments*>(arguments[lane])->c;
    for (int i = 0; i < 4; ++i) mine[i] += c.at[lane / 4 + i / 2 * 8][2 * (lane % 4) + i % 2];
  }
}

template <typename V>
void check_global(const void* address, const char* does, Site site) {
  static_assert(std::is_trivially_copyable_v<V> && (sizeof(V) == 2 || sizeof(V) == 4 || sizeof(V) == 8 || sizeof(V) == 16));
  if (reinterpret_cast<uintptr_t>(address) % sizeof(V) == 0) return;
  fail("misaligned: " + show_thread(machine.current) + " " + does + " " + std::to_string(sizeof(V)) +
       " bytes of global memory at " + show(site) + ", at an address that is not a multiple of that");
}

template <typename V>
constexpr bool kSharedType = std::is_trivially_copyable_v<V> && (sizeof(V) == 4 || sizeof(V) == 8 || sizeof(V) == 16);

}  // namespace emulation

// ---------------------------------------------------------------- what kernels call

HLIP_DEVICE int thread_index() { return emulation::machine.current; }
HLIP_DEVICE int thread_index_anew() { return thread_index(); }  // for a compiler that counts registers; see cuda.cuh
HLIP_DEVICE int lane_index() { return emulation::machine.current % 32; }
HLIP_DEVICE int warp_index() { return emulation::machine.current / 32; }
HLIP_DEVICE int64_t block_index() { return emulation::machine.block; }
HLIP_DEVICE int64_t block_count() { return emulation::machine.blocks; }

template <typename V>
HLIP_DEVICE V shared_load(Shared at, emulation::Site site = emulation::Site::here()) {
  static_assert(emulation::kSharedType<V>);
  emulation::note_read(at, sizeof(V), thread_index(), site);
  V value;
  std::memcpy(static_cast<void*>(&value), emulation::shared_data(at), sizeof(V));
  return value;
}

template <typename V>
HLIP_DEVICE void shared_store(Shared at, V value, emulation::Site site = emulation::Site::here()) {
  static_assert(emulation::kSharedType<V>);
  const int t = thread_index();
  emulation::check_place(at, sizeof(V), t, site, "writes");
  for (uint32_t i = at / 4; i < (at + sizeof(V)) / 4; ++i) {
    emulation::Word& word = emulation::machine.words[i];
    emulation::check_write(word, t, site, "writes", i);
    emulation::record_write(word, t, site);
  }
  std::memcpy(emulation::shared_data(at), &value, sizeof(V));
}

// The source is read here, so that a bad address is reported here; the destination changes in copy_async_wait.
template <typename V>
HLIP_DEVICE void copy_async(Shared to, const void* from, bool really, emulation::Site site) {
  const int t = thread_index();
  emulation::check_place(to, sizeof(V), t, site, "copies to");
  for (uint32_t i = to / 4; i < (to + sizeof(V)) / 4; ++i) {
    emulation::Word& word = emulation::machine.words[i];
    emulation::check_write(word, t, site, "copies to", i);
    word.copier = static_cast<int16_t>(t);
    word.write_site = site;
  }
  emulation::Copy copy{to, sizeof(V), {}};
  emulation::check_global<V>(from, "copies", site);
  if (really) std::memcpy(copy.data, from, sizeof(V));
  emulation::machine.thread[t].copies.push_back(copy);
}

HLIP_DEVICE void copy_async_16(Shared to, const void* from, bool really, emulation::Site site = emulation::Site::here()) {
  copy_async<uint4>(to, from, really, site);
}

HLIP_DEVICE void copy_async_4(Shared to, const void* from, bool really, emulation::Site site = emulation::Site::here()) {
  copy_async<float>(to, from, really, site);
}

HLIP_DEVICE void copy_async_wait() {
  const int t = thread_index();
  auto& copies = emulation::machine.thread[t].copies;
  for (const emulation::Copy& copy : copies) {
    for (uint32_t i = copy.to / 4; i < (copy.to + copy.bytes) / 4; ++i) {
      emulation::Word& word = emulation::machine.words[i];
      word.copier = -1;
      emulation::record_write(word, t, word.write_site);
    }
    std::memcpy(emulation::shared_data(copy.to), copy.data, copy.bytes);
  }
  copies.clear();
}

HLIP_DEVICE void block_sync(emulation::Site site = emulation::Site::here()) {
  emulation::block_barrier(emulation::Wait::kBlockSync, site, false);
}

HLIP_DEVICE bool block_any(bool condition, emulation::Site site = emulation::Site::here()) {
  return emulation::block_barrier(emulation::Wait::kBlockAny, site, condition);
}

HLIP_DEVICE void warp_sync(emulation::Site site = emulation::Site::here()) {
  emulation::warp_collective(emulation::Wait::kWarpSync, site, nullptr,
                             [](void**) { ++emulation::machine.warp[warp_index()].epoch; });
}

template <typename V>
HLIP_DEVICE V global_load(const void* from, emulation::Site site = emulation::Site::here()) {
  emulation::check_global<V>(from, "reads", site);
  V value;
  std::memcpy(static_cast<void*>(&value), from, sizeof(V));
  return value;
}

template <typename V>
HLIP_DEVICE void global_store(void* to, V value, emulation::Site site = emulation::Site::here()) {
  emulation::check_global<V>(to, "writes", site);
  const uintptr_t at = reinterpret_cast<uintptr_t>(to);
  for (emulation::Output& output : emulation::machine.outputs) {
    const uintptr_t base = reinterpret_cast<uintptr_t>(output.base);
    if (at < base || at + sizeof(V) > base + output.bytes) continue;
    uint8_t* const writes = output.writes.data() + (at - base) / 2;
    for (size_t i = 0; i < sizeof(V) / 2; ++i) writes[i] = static_cast<uint8_t>(writes[i] + (writes[i] < 255));
    std::memcpy(to, &value, sizeof(V));
    return;
  }
  emulation::fail("out of range: " + emulation::show_thread(thread_index()) + " writes " + std::to_string(sizeof(V)) +
                  " bytes of global memory at " + emulation::show(site) + ", not inside an array it may write");
}

template <typename V>
HLIP_DEVICE V shuffle_xor(V value, int mask, emulation::Site site = emulation::Site::here()) {
  static_assert(std::is_trivially_copyable_v<V> && sizeof(V) == 4);
  struct Arguments {
    V value, result;
    int mask;
  } mine{value, value, mask};
  if (mask < 0 || mask > 31) {
    emulation::fail(emulation::show_thread(thread_index()) + " shuffles with mask " + std::to_string(mask) + " at " +
                    emulation::show(site));
  }
  emulation::warp_collective(emulation::Wait::kShuffle, site, &mine, [](void** lanes) {
    for (int lane = 0; lane < 32; ++lane) {
      auto* const to = static_cast<Arguments*>(lanes[lane]);
      to->result = static_cast<Arguments*>(lanes[lane ^ to->mask])->value;
    }
  });
  return mine.result;
}

HLIP_DEVICE int uniform(int value, emulation::Site site = emulation::Site::here()) {
  emulation::warp_collective(emulation::Wait::kUniform, site, &value, [site](void** lanes) {
    for (int lane = 1; lane < 32; ++lane) {
      const int first = *static_cast<int*>(lanes[0]), other = *static_cast<int*>(lanes[lane]);
      if (other == first) continue;
      emulation::fail("not uniform: lane " + std::to_string(lane) + " has " + std::to_string(other) + " and lane 0 " +
                      std::to_string(first) + " at " + emulation::show(site));
    }
  });
  return value;
}

HLIP_DEVICE bool warp_any(bool condition, emulation::Site site = emulation::Site::here()) {
  emulation::warp_collective(emulation::Wait::kWarpAny, site, &condition, [](void** lanes) {
    const bool any = std::any_of(lanes, lanes + 32, [](const void* lane) { return *static_cast<const bool*>(lane); });
    for (int lane = 0; lane < 32; ++lane) *static_cast<bool*>(lanes[lane]) = any;
  });
  return condition;
}

HLIP_DEVICE uint32_t shared_address(Shared at) { return at; }

HLIP_DEVICE void load_matrices(uint32_t (&m)[4], uint32_t row, emulation::Site site = emulation::Site::here()) {
  emulation::LoadArguments mine{m, row};
  emulation::warp_collective(emulation::Wait::kLoad, site, &mine,
                             [site](void** lanes) { emulation::load_all_lanes(lanes, false, site); });
}

HLIP_DEVICE void load_matrices_transposed(uint32_t (&m)[4], uint32_t row, emulation::Site site = emulation::Site::here()) {
  emulation::LoadArguments mine{m, row};
  emulation::warp_collective(emulation::Wait::kLoadTransposed, site, &mine,
                             [site](void** lanes) { emulation::load_all_lanes(lanes, true, site); });
}

template <typename T>
HLIP_DEVICE void multiply_add(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1,
                              emulation::Site site = emulation::Site::here()) {
  constexpr bool kHalf = std::is_same_v<T, __half>;
  static_assert(kHalf || std::is_same_v<T, __nv_bfloat16>);
  emulation::ProductArguments mine{c, a, {b0, b1}};
  emulation::warp_collective(kHalf ? emulation::Wait::kHalf : emulation::Wait::kBFloat16, site, &mine,
                             emulation::multiply_all_lanes<T>);
}

template <typename V>
HLIP_DEVICE void forget(V&) {}  // for a compiler that counts registers; see cuda.cuh

// Subnormal arguments and results are zeros, as with .ftz.
HLIP_DEVICE float exp2_fast(float x) {
  const float y = std::exp2(x);
  return y < 1.17549435e-38f ? 0.0f : y;
}
HLIP_DEVICE float reciprocal_fast(float x) { return 1.0f / (std::fabs(x) < 1.17549435e-38f ? std::copysign(0.0f, x) : x); }
HLIP_DEVICE float log2_fast(float x) { return std::log2(std::fabs(x) < 1.17549435e-38f ? 0.0f : x); }

template <typename T>
HLIP_DEVICE uint32_t pack2(float low, float high) {
  const T pair[2] = {from_float<T>(low), from_float<T>(high)};
  uint32_t bits;
  std::memcpy(&bits, static_cast<const void*>(pair), 4);
  return bits;
}

template <typename T>
HLIP_DEVICE float2 unpack2(uint32_t pair) {
  const float* const value = emulation::float_of_bits<T>();
  return make_float2(value[pair & 0xffff], value[pair >> 16]);
}

}  // namespace hlip
