// Good kernels: the emulator of csrc/device/emulated.h must compute the right results.
#pragma once

#include <random>

#include "require.h"

namespace hlip {
namespace {

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

void uniform_values() {
  for (uint64_t seed = 0; seed < kSeeds; ++seed) {
    emulate(2, 64, 0, seed, [] { require(uniform(7 + warp_index()) == 7 + warp_index(), "another value"); });
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

}  // namespace
}  // namespace hlip
