// What the emulator of csrc/device/emulated.h must compute, and what it must complain about. Takes the name of one case.
#include <cstdio>
#include <functional>
#include <map>
#include <random>
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

// ---------------------------------------------------------------- good kernels

HLIP_KERNEL(1024) transpose(const float* x, float* y) {
  const int row = warp_index(), column = lane_index();
  const int64_t tile = block_index() * 1024;
  shared_store(4 * (33 * row + column), global_load<float>(x + tile + 32 * row + column));
  block_sync();
  global_store(y + tile + 32 * row + column, shared_load<float>(4 * (33 * column + row)));
}

void transposition() {
  std::vector<float> x(2 * 1024), y(x.size());
  for (size_t i = 0; i < x.size(); ++i) x[i] = static_cast<float>(i);
  for (uint64_t seed = 0; seed < kSeeds; ++seed) {
    expect_writes(y.data(), y.size() * sizeof(float), "y");
    emulate(2, 1024, 4 * 33 * 32, seed, [&] { transpose(x.data(), y.data()); });
    check_writes();
    forget_writes();
    for (int i = 0; i < 2048; ++i) require(y[i] == x[i / 1024 * 1024 + i % 32 * 32 + i / 32 % 32], "wrong transposition");
  }
}

template <typename T>
void product() {
  std::mt19937 random(7);
  std::normal_distribution<float> normal;
  T a[16][16], b[16][8];
  float c[16][8], result[16][8] = {};
  for (auto& row : a) for (T& v : row) v = from_float<T>(normal(random));
  for (auto& row : b) for (T& v : row) v = from_float<T>(normal(random));
  for (auto& row : c) for (float& v : row) v = normal(random);
  emulate(1, 32, 0, 1, [&] {
    const int g = lane_index() / 4, t = 2 * (lane_index() % 4);
    const auto of_a = [&](int row, int k) { return pack2<T>(to_float(a[row][k]), to_float(a[row][k + 1])); };
    const auto of_b = [&](int k) { return pack2<T>(to_float(b[k][g]), to_float(b[k + 1][g])); };
    const uint32_t left[4] = {of_a(g, t), of_a(g + 8, t), of_a(g, t + 8), of_a(g + 8, t + 8)};
    float sums[4] = {c[g][t], c[g][t + 1], c[g + 8][t], c[g + 8][t + 1]};
    multiply_add<T>(sums, left, of_b(t), of_b(t + 8));
    for (int i = 0; i < 4; ++i) result[g + i / 2 * 8][t + i % 2] = sums[i];
  });
  for (int i = 0; i < 16; ++i) {
    for (int j = 0; j < 8; ++j) {
      double sum = c[i][j];
      for (int k = 0; k < 16; ++k) sum += double{to_float(a[i][k])} * double{to_float(b[k][j])};
      require(std::fabs(sum - double{result[i][j]}) < 1e-5, "wrong product");
    }
  }
}

// Rows are given from the last to the first, so that lanes and places in memory differ.
void load(bool transposed) {
  const auto element = [](int matrix, int row, int column) { return static_cast<uint32_t>(matrix << 8 | row << 4 | column); };
  for (uint64_t seed = 0; seed < kSeeds; ++seed) {
    emulate(1, 64, 512, seed, [&] {
      const int lane = lane_index();
      const Shared row = 16 * (31 - lane);
      if (warp_index() == 0) {
        uint4 v;
        uint32_t* const words[] = {&v.x, &v.y, &v.z, &v.w};
        for (int i = 0; i < 4; ++i) {
          *words[i] = element(lane / 8, lane % 8, 2 * i) | element(lane / 8, lane % 8, 2 * i + 1) << 16;
        }
        shared_store(row, v);
      }
      block_sync();
      uint32_t m[4];
      if (transposed) {
        load_matrices_transposed(m, row);
      } else {
        load_matrices(m, row);
      }
      for (int i = 0; i < 4; ++i) {
        const int across = 2 * (lane % 4), along = lane / 4;
        const uint32_t low = transposed ? element(i, across, along) : element(i, along, across);
        const uint32_t high = transposed ? element(i, across + 1, along) : element(i, along, across + 1);
        require(m[i] == (low | high << 16), "wrong matrices");
      }
    });
  }
}

void shuffle() {
  for (uint64_t seed = 0; seed < kSeeds; ++seed) {
    emulate(3, 96, 0, seed, [] {
      for (int mask = 0; mask < 32; ++mask) {
        const int got = shuffle_xor(1000 * warp_index() + lane_index(), mask);
        require(got == 1000 * warp_index() + (lane_index() ^ mask), "wrong lane");
      }
      float sum = static_cast<float>(lane_index());
      for (int mask = 16; mask > 0; mask /= 2) sum += shuffle_xor(sum, mask);
      require(sum == 496, "wrong sum");
    });
  }
}

void copies() {
  alignas(16) float x[4 * 64];
  for (int i = 0; i < 256; ++i) x[i] = static_cast<float>(i);
  for (uint64_t seed = 0; seed < kSeeds; ++seed) {
    emulate(2, 64, 1024, seed, [&] {
      const int t = thread_index();
      shared_store(16 * t, make_float4(-1, -1, -1, -1));
      const bool really = t % 3 != 0;
      copy_async_16(16 * t, really ? x + 4 * t : nullptr, really);
      copy_async_wait();
      const float own = shared_load<float>(16 * t + 4);
      require(own == (really ? x[4 * t + 1] : 0.0f), "wrong copy of its own");
      block_sync();
      const int other = 63 - t;
      const float4 v = shared_load<float4>(16 * other);
      require(v.w == (other % 3 != 0 ? x[4 * other + 3] : 0.0f), "wrong copy");
    });
  }
}

// Of 4 bytes: one word each, and the words beside it may be used meanwhile.
void copies_of_words() {
  float x[2 * 64];
  for (int i = 0; i < 128; ++i) x[i] = static_cast<float>(i + 1);
  for (uint64_t seed = 0; seed < kSeeds; ++seed) {
    emulate(2, 64, 3 * 256, seed, [&] {
      const int t = thread_index();
      for (int i = 0; i < 3; ++i) shared_store(12 * t + 4 * i, -1.0f - i);
      const bool really = t % 3 != 0;
      copy_async_4(12 * t + 4, really ? x + 2 * t + 1 : nullptr, really);
      require(shared_load<float>(12 * t) == -1 && shared_load<float>(12 * t + 8) == -3, "a copy to the words beside");
      shared_store(12 * t + 8, 7.0f);
      copy_async_wait();
      const float copied = really ? x[2 * t + 1] : 0.0f;
      require(shared_load<float>(12 * t + 4) == copied, "wrong copy of its own");
      block_sync();
      const int other = 63 - t;
      require(shared_load<float>(12 * other) == -1 && shared_load<float>(12 * other + 8) == 7, "wrong words beside");
      require(shared_load<float>(12 * other + 4) == (other % 3 != 0 ? x[2 * other + 1] : 0.0f), "wrong copy");
    });
  }
}

// Copies of both sizes side by side, again and again to the same places.
void copies_again() {
  alignas(16) float x[32][8];
  for (uint64_t seed = 0; seed < kSeeds; ++seed) {
    emulate(1, 32, 32 * 32, seed, [&] {
      const int t = thread_index();
      for (int round = 0; round < 3; ++round) {
        for (int i = 0; i < 8; ++i) x[t][i] = static_cast<float>(100 * t + 10 * round + i);
        copy_async_16(32 * t, x[t], true);
        for (int i = 4; i < 8; ++i) copy_async_4(32 * t + 4 * i, x[t] + i, i != 5);
        copy_async_wait();
        for (int i = 0; i < 8; ++i) require(shared_load<float>(32 * t + 4 * i) == (i == 5 ? 0.0f : x[t][i]), "wrong copy");
      }
    });
  }
}

void grid() {
  for (int blocks : {3, 1, 2}) {
    int seen = 0;
    emulate(blocks, 64, 0, 1, [&] {
      require(block_count() == blocks && block_index() < blocks, "wrong number of blocks");
      seen += static_cast<int>(block_index()) + 1;
    });
    require(seen == 64 * blocks * (blocks + 1) / 2, "not every block");
  }
}

void any() {
  emulate(2, 64, 0, 1, [] {
    require(!block_any(false), "any of none");
    for (int who = 0; who < 64; ++who) require(block_any(thread_index() == who), "any of one");
    require(!block_any(false), "any of none, after");
  });
}

// Sharing within a warp needs no more than warp_sync, and reads by many warps followed by a barrier no more than that.
void ordered() {
  for (uint64_t seed = 0; seed < kSeeds; ++seed) {
    emulate(2, 64, 256, seed, [] {
      const int t = thread_index();
      for (int step = 0; step < 3; ++step) {
        shared_store(4 * t, t + step);
        warp_sync();
        require(shared_load<int>(4 * (t ^ 1)) == (t ^ 1) + step, "wrong neighbour");
        warp_sync();
      }
      block_sync();
      require(shared_load<int>(0) == 2 && shared_load<int>(4 * 40) == 42, "wrong value of another warp");
      block_sync();
      shared_store(4 * (63 - t), 0);
    });
  }
}

template <typename T>
void elements() {
  const auto same = [](float2 got, float x, float y) { return got.x == x && got.y == y; };
  require(same(unpack2<T>(pack2<T>(1.5f, -2.0f)), 1.5f, -2.0f), "pair in the wrong order");
  require((pack2<T>(1.0f, 0.0f) & 0xffff) != 0 && pack2<T>(1.0f, 0.0f) >> 16 == 0, "first not in the low half");
  const float half_step = std::is_same_v<T, __half> ? 1.0f / 2048 : 1.0f / 256;  // a tie goes to the even neighbour
  require(same(unpack2<T>(pack2<T>(1 + half_step, 1 + 3 * half_step)), 1, 1 + 4 * half_step), "not rounded to nearest even");
  require(std::isnan(unpack2<T>(pack2<T>(NAN, 0)).x) && std::isinf(unpack2<T>(pack2<T>(0, INFINITY)).y), "not finite");
}

void functions() {
  require(exp2_fast(3) == 8 && exp2_fast(-INFINITY) == 0 && exp2_fast(-130) == 0 && std::isnan(exp2_fast(NAN)), "exp2");
  require(log2_fast(8) == 3 && log2_fast(0) == -INFINITY && log2_fast(1e-40f) == -INFINITY, "log2");
  require(std::isnan(log2_fast(-1)) && std::isnan(log2_fast(NAN)), "log2 of what has none");
}

void big_frames() {
  emulate(1, 64, 0, 1, [] {
    volatile char frame[200 * 1024];
    frame[0] = static_cast<char>(lane_index());
    frame[sizeof(frame) - 1] = 1;
    require(shuffle_xor(static_cast<int>(frame[0]), 1) == (lane_index() ^ 1) && frame[sizeof(frame) - 1] == 1, "wrong frame");
  });
}

// The same seed resumes threads in the same order, another one in another.
void order() {
  const auto trace = [](uint64_t seed) {
    std::vector<int> seen;
    emulate(1, 64, 0, seed, [&] {
      for (int i = 0; i < 3; ++i) {
        seen.push_back(thread_index());
        block_sync();
      }
    });
    return seen;
  };
  require(trace(1) == trace(1) && trace(1) != trace(2), "order does not follow the seed");
}

// ---------------------------------------------------------------- bad kernels

void race_between_warps() {
  require_kernel_error({"block 0", "race", "shared byte", "warp 0", "warp 1", "wrote", "self_test.cpp:"}, 64, 256, [] {
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
  require_kernel_error({"divergence in warp 1", "warp_sync at self_test.cpp:", "shuffle_xor at self_test.cpp:"}, 64, 0, [] {
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

void lane_exits_before_collective() {
  require_kernel_error({"deadlock", "threads 0-3,5-31 wait in shuffle_xor at self_test.cpp:", "threads 4 exited"}, 32, 0, [] {
    if (lane_index() != 4) shuffle_xor(1, 1);
  });
}

void barrier_not_reached_by_all() {
  require_kernel_error({"deadlock", "threads 0-31 exited", "threads 32-63 wait in block_sync at self_test.cpp:"}, 64, 0, [] {
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

#define CASE(name) {#name, name}
const std::map<std::string, std::function<void()>> kCases = {
    CASE(transposition),
    {"product_half", product<__half>},
    {"product_bfloat16", product<__nv_bfloat16>},
    {"matrices", [] { load(false); }},
    {"matrices_transposed", [] { load(true); }},
    CASE(shuffle),
    CASE(copies),
    CASE(copies_of_words),
    CASE(copies_again),
    CASE(grid),
    CASE(any),
    CASE(ordered),
    {"elements_half", elements<__half>},
    {"elements_bfloat16", elements<__nv_bfloat16>},
    CASE(functions),
    CASE(big_frames),
    CASE(order),
    CASE(race_between_warps),
    CASE(race_of_write_after_read),
    CASE(race_of_writes),
    CASE(race_within_a_warp),
    CASE(race_within_a_warp_of_write_after_read),
    CASE(race_of_matrix_load),
    CASE(race_with_copy),
    CASE(race_of_copy_after_read),
    CASE(read_before_copy_wait),
    CASE(read_before_copy_of_a_word_wait),
    CASE(races_with_copy_of_a_word),
    CASE(write_before_copy_wait),
    CASE(copy_never_waited_for),
    CASE(unwritten),
    CASE(unwritten_since_the_block_started),
    CASE(out_of_range),
    CASE(misaligned),
    CASE(written_twice),
    CASE(not_written),
    CASE(written_outside),
    CASE(different_collectives),
    CASE(different_places_of_one_collective),
    CASE(lane_exits_before_collective),
    CASE(barrier_not_reached_by_all),
    CASE(different_barriers),
    CASE(wrong_number_of_threads),
    CASE(exception_of_a_kernel),
};

}  // namespace
}  // namespace hlip

int main(int count, char** arguments) {
  const auto found = hlip::kCases.find(count == 2 ? arguments[1] : "");
  if (found == hlip::kCases.end()) {
    for (const auto& [name, run] : hlip::kCases) std::puts(name.c_str());
    return 2;
  }
  try {
    found->second();
  } catch (const std::exception& error) {
    std::printf("FAILED: %s\n", error.what());
    return 1;
  }
  return 0;
}
