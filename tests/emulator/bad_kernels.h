// Bad kernels: the emulator of csrc/device/emulated.h must complain, and say of what.
#pragma once

#include "require.h"

namespace hlip {
namespace {

void race_between_warps() {
  require_kernel_error({"block 0", "race", "shared byte", "warp 0", "warp 1", "wrote", "bad_kernels.h:"}, 64, 256, [] {
    shared_store(4 * thread_index(), 1);
    warp_sync();
    // Its own, or one that the other warp writes.
    shared_load<int>(4 * (thread_index() == 0 ? 33 : thread_index() == 33 ? 0 : thread_index()));
  });
}

void race_of_write_after_read() {
  require_kernel_error({"race", "shared byte 0 ", "writes", "read"}, 96, 4, [] {
    if (thread_index() == 0) shared_store(0, 1);
    block_sync();
    shared_load<int>(0);  // by all three warps
    block_any(false);     // a barrier
    shared_load<int>(0);
    warp_sync();
    for (int i = 0; i < 8; ++i) shuffle_xor(i, 1);  // lets the others read first: the write is what must be found
    if (thread_index() == 40) shared_store(0, 2);
  });
}

void race_of_writes() {
  require_kernel_error({"race", "shared byte 8 ", "writes", "wrote"}, 64, 16, [] {
    if (lane_index() == 5) shared_store(8, warp_index());
  });
}

void race_within_a_warp() {
  require_kernel_error({"race", "warp 0", "no barrier between"}, 32, 128, [] {
    shared_store(4 * lane_index(), 1);
    const int mask = shuffle_xor(1, 1);  // orders nothing in memory
    shared_load<int>(4 * (lane_index() ^ mask));
  });
}

void race_within_a_warp_of_write_after_read() {
  require_kernel_error({"race", "writes", "read"}, 32, 128, [] {
    shared_store(4 * lane_index(), 1);
    warp_sync();
    shared_load<int>(4 * (lane_index() ^ 1));
    shuffle_xor(1, 1);
    shared_store(4 * lane_index(), 2);
  });
}

void race_of_matrix_load() {
  require_kernel_error({"race", "reads", "wrote"}, 32, 512, [] {
    shared_store(16 * lane_index(), make_uint4(1, 2, 3, 4));
    uint32_t m[4];
    load_matrices(m, 16 * (lane_index() ^ 8));
  });
}

void race_with_copy() {
  alignas(16) float x[4] = {};
  require_kernel_error({"race", "reads", "wrote"}, 32, 32, [&] {
    if (lane_index() == 0) copy_async_16(16, x, true);
    copy_async_wait();
    shuffle_xor(0, 1);
    if (lane_index() == 1) shared_load<float>(20);
  });
}

// The copy may land at any time after it was issued: the barrier comes too late.
void race_of_copy_after_read() {
  alignas(16) float x[4] = {};
  require_kernel_error({"race", "thread 0", "copies to", "thread 1", "read"}, 32, 16, [&] {
    if (lane_index() == 0) shared_store(0, make_float4(1, 2, 3, 4));
    warp_sync();
    if (lane_index() == 1) shared_load<float>(4);
    shuffle_xor(0, 1);
    if (lane_index() == 0) copy_async_16(0, x, true);
    warp_sync();
    copy_async_wait();
  });
}

void read_before_copy_wait() {
  alignas(16) float x[4] = {};
  require_kernel_error({"copy under way", "reads shared byte 0 ", "a copy of thread 0 ", "not been waited for"}, 32, 512, [&] {
    copy_async_16(16 * lane_index(), x, true);
    if (lane_index() == 7) copy_async_wait();  // waits for its own alone
    warp_sync();
    if (lane_index() == 7) shared_load<float>(16 * 7);
    if (lane_index() == 7) shared_load<float>(0);
    warp_sync();
    copy_async_wait();
  });
}

void read_before_copy_of_a_word_wait() {
  alignas(16) float x[4] = {};
  require_kernel_error({"copy under way", "thread 5 ", "reads shared byte 4 ", "where a copy of thread 5 "}, 32, 16, [&] {
    if (lane_index() == 5) shared_store(0, make_float4(1, 2, 3, 4));
    if (lane_index() == 5) copy_async_4(4, x, true);
    if (lane_index() == 5) shared_load<float4>(0);
    copy_async_wait();
  });
  require_kernel_error({"copy under way", "thread 6 ", "copies to shared byte 8 ", "where a copy of thread 5 "}, 32, 16, [&] {
    if (lane_index() == 5) copy_async_4(8, x, true);
    warp_sync();
    if (lane_index() == 6) copy_async_16(0, x, true);
    copy_async_wait();
  });
}

void write_before_copy_wait() {
  alignas(16) float x[4] = {};
  require_kernel_error({"copy under way", "writes shared byte 4 "}, 32, 16, [&] {
    if (lane_index() == 0) copy_async_16(0, x, true);
    warp_sync();
    if (lane_index() == 0) shared_store(4, 1);
    copy_async_wait();
  });
}

void races_with_copy_of_a_word() {
  alignas(16) float x[4] = {};
  require_kernel_error({"race", "thread 1 ", "reads shared byte 20 ", "thread 0 ", "wrote"}, 32, 32, [&] {
    if (lane_index() == 0) copy_async_4(20, x, true);
    copy_async_wait();
    shuffle_xor(0, 1);
    if (lane_index() == 1) shared_load<float>(20);
  });
  require_kernel_error({"race", "thread 0 ", "copies to shared byte 4 ", "thread 1 ", "read"}, 32, 16, [&] {
    if (lane_index() == 0) shared_store(0, make_float4(1, 2, 3, 4));
    warp_sync();
    if (lane_index() == 1) shared_load<float>(4);
    shuffle_xor(0, 1);
    if (lane_index() == 0) copy_async_4(8, x, true);  // a word that nobody reads
    if (lane_index() == 0) copy_async_4(4, x, true);
    warp_sync();
    copy_async_wait();
  });
}

void copy_never_waited_for() {
  alignas(16) float x[4] = {};
  require_kernel_error({"thread 3 (warp 0, lane 3) exited without copy_async_wait"}, 32, 16, [&] {
    if (lane_index() == 3) copy_async_16(0, x, true);
  });
  require_kernel_error({"thread 3 (warp 0, lane 3) exited without copy_async_wait"}, 32, 16, [&] {
    if (lane_index() == 3) copy_async_4(0, x, false);
  });
}

void unwritten() {
  require_kernel_error({"block 0", "uninitialised", "thread 9 ", "shared byte 12 "}, 32, 16, [] {
    if (lane_index() == 9) shared_load<int>(12);
  });
}

void unwritten_since_the_block_started() {
  require_kernel_error({"block 1", "uninitialised"}, 32, 128, [] {
    if (block_index() == 0) shared_store(4 * lane_index(), 1);
    shared_load<int>(4 * lane_index());
  });
}

void out_of_range() {
  require_kernel_error({"out of range", "thread 31 ", "reads shared byte 120 ", "8 bytes of 124"}, 32, 124, [] {
    if (lane_index() < 31) shared_store(4 * lane_index(), 1);
    warp_sync();
    if (lane_index() == 31) shared_load<float2>(120);
  });
  require_kernel_error({"out of range", "writes shared byte 4294967292 "}, 32, 128, [] { shared_store(0 - Shared{4}, 1); });
  require_kernel_error({"out of range", "copies to shared byte 128 "}, 32, 128, [] { copy_async_16(128, nullptr, false); });
  require_kernel_error({"out of range", "copies to shared byte 128 ", "4 bytes of 128"}, 32, 128, [] {
    copy_async_4(4 * (lane_index() + 1), nullptr, false);
    copy_async_wait();
  });
  require_kernel_error({"out of range", "reads shared byte 512 "}, 32, 512, [] {
    shared_store(16 * lane_index(), make_uint4(1, 2, 3, 4));
    warp_sync();
    uint32_t m[4];
    load_matrices_transposed(m, 16 * lane_index() + 16 * (lane_index() == 31));
  });
}

void misaligned() {
  alignas(16) static float x[64] = {};
  require_kernel_error({"misaligned", "writes shared byte 4 ", "8 bytes"}, 32, 128, [] { shared_store(4, make_float2(1, 2)); });
  require_kernel_error({"misaligned", "reads 16 bytes of global memory"}, 32, 0, [] { global_load<float4>(x + 2); });
  require_kernel_error({"misaligned", "copies 16 bytes of global memory"}, 32, 512, [] {
    copy_async_16(16 * lane_index(), x + 1, true);
    copy_async_wait();
  });
  require_kernel_error({"misaligned", "thread 9 ", "copies to shared byte 38 ", "4 bytes"}, 32, 128, [] {
    copy_async_4(4 * lane_index() + 2 * (lane_index() == 9), x, true);
    copy_async_wait();
  });
  require_kernel_error({"misaligned", "thread 9 ", "copies 4 bytes of global memory"}, 32, 128, [] {
    copy_async_4(4 * lane_index(), reinterpret_cast<const char*>(x + lane_index()) + 2 * (lane_index() == 9), true);
    copy_async_wait();
  });
  expect_writes(x, sizeof(x), "x");
  require_kernel_error({"misaligned", "writes 8 bytes of global"}, 32, 0, [] { global_store(x + 1, make_float2(1, 2)); });
  forget_writes();
}

void written_twice() {
  float y[32];
  expect_writes(y, sizeof(y), "grad_q");
  emulate(1, 32, 0, 1, [&] { global_store(y + lane_index() % 31, 1.0f); });
  require_error({"element 0 ", "grad_q", "written 2 times"}, [] { check_writes(); });
  forget_writes();
}

void not_written() {
  uint16_t y[32];
  expect_writes(y, sizeof(y), "out");
  emulate(1, 32, 0, 1, [&] {
    if (lane_index() != 5) global_store(y + lane_index(), uint16_t{1});
  });
  require_error({"element 5 ", "out", "written 0 times"}, [] { check_writes(); });
  forget_writes();
}

void written_outside() {
  float y[33];
  expect_writes(y, 32 * sizeof(float), "y");
  require_kernel_error({"out of range", "thread 0 ", "global memory"}, 32, 0, [&] {
    if (lane_index() == 0) global_store(y + 32, 1.0f);
  });
  forget_writes();
}

void different_collectives() {
  require_kernel_error({"divergence in warp 1", "warp_sync at bad_kernels.h:", "shuffle_xor at bad_kernels.h:"}, 64, 0, [] {
    if (thread_index() >= 48) {
      warp_sync();
    } else {
      shuffle_xor(1, 1);
    }
  });
}

void different_places_of_one_collective() {
  require_kernel_error({"divergence in warp 0", "multiply_add<half> at"}, 32, 0, [] {
    float c[4] = {};
    const uint32_t a[4] = {};
    if (lane_index() % 2 == 0) {
      multiply_add<__half>(c, a, 0, 0);
    } else {
      multiply_add<__half>(c, a, 0, 0);
    }
  });
}

void value_that_is_not_uniform() {
  require_kernel_error({"not uniform", "lane 9 has 1 and lane 0 0", "at bad_kernels.h:"}, 32, 0, [] { uniform(lane_index() == 9); });
}

void lane_exits_before_collective() {
  require_kernel_error({"deadlock", "threads 0-3,5-31 wait in shuffle_xor at bad_kernels.h:", "threads 4 exited"}, 32, 0, [] {
    if (lane_index() != 4) shuffle_xor(1, 1);
  });
}

void barrier_not_reached_by_all() {
  require_kernel_error({"deadlock", "threads 0-31 exited", "threads 32-63 wait in block_sync at bad_kernels.h:"}, 64, 0, [] {
    if (warp_index() == 1) block_sync();
  });
  require_kernel_error({"deadlock", "threads 0 wait in block_sync", "threads 1-31 wait in warp_sync"}, 32, 0, [] {
    if (lane_index() == 0) block_sync();
    warp_sync();
    if (lane_index() != 0) block_sync();
  });
}

void different_barriers() {
  require_kernel_error({"divergence in the block", "block_sync at", "block_any at"}, 64, 0, [] {
    if (warp_index() == 0) {
      block_sync();
    } else {
      block_any(true);
    }
  });
}

void wrong_number_of_threads() {
  require_error({"48 threads"}, [] { emulate(1, 48, 0, 0, [] {}); });
  require_error({"2048 threads"}, [] { emulate(1, 2048, 0, 0, [] {}); });
}

void exception_of_a_kernel() {
  require_kernel_error({"mine"}, 64, 0, [] {
    block_sync();
    if (thread_index() == 33) throw std::runtime_error("mine");
    block_sync();
  });
}

}  // namespace
}  // namespace hlip
