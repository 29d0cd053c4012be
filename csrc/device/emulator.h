// The machine that kernels run on under g++: one thread block after the other, with checks of what a GPU would not check:
// races in shared memory, reads of what nobody wrote, collectives that not all lanes reach, outputs written twice.
// What kernels call is in emulated.h.
//
// Every CUDA thread is a fiber with a stack of its own. It runs until it has to wait for others (a barrier or a warp
// collective); the last to arrive does the work for all. Fibers that may go on do so in an order drawn from a seed, so that
// a missing barrier tends to show in the results too. All of it lives in one OS thread and in one global: emulate() one
// kernel at a time. A kernel should own nothing that needs destroying: after an error its fibers are never resumed.
//
// Every error is a std::runtime_error that names block, threads, source lines and, for shared memory, byte offsets.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <exception>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "fiber.h"

namespace hlip {

using Shared = uint32_t;  // bytes from the start of the block's dynamic shared memory

namespace emulation {

// A place in the kernel's source. As a default argument, here() is the caller's.
struct Site {
  const char* file = "";
  int line = 0;
  static constexpr Site here(const char* file = __builtin_FILE(), int line = __builtin_LINE()) { return {file, line}; }
};

// What a thread waits in. The last four are instructions that all lanes must execute at one place in the program (.aligned).
enum class Wait { kNothing, kExited, kBlockSync, kBlockAny, kWarpSync, kShuffle, kUniform, kWarpAny, kLoad, kLoadTransposed, kHalf, kBFloat16 };
constexpr Wait kFirstAligned = Wait::kLoad;

struct Copy {  // a cp.async under way
  Shared to;
  uint32_t bytes;
  unsigned char data[16];
};

struct Thread {
  Fiber fiber;
  Wait wait = Wait::kNothing;
  Site site;
  std::vector<Copy> copies;
};

struct Warp {
  Wait wait;
  Site site;
  int arrived = 0;
  uint32_t epoch = 0;  // grows at each warp_sync
  void* arguments[32];
};

// Who touched a 4-byte word of shared memory. Of the reads since the last block barrier and the last write, it is enough to
// know the lanes of one warp (since that warp's last warp_sync), and one thread of another: a write races with one of these
// whenever it races with any.
struct Word {
  uint32_t write_epoch = 0, write_warp_epoch = 0;
  uint32_t read_epoch = 0, read_warp_epoch = 0, read_lanes = 0;
  int16_t writer = -1, copier = -1;  // copier: has a copy to here under way
  int16_t read_warp = -1, read_other = -1;
  Site write_site, read_site;  // of the latest
};

struct Output {
  unsigned char* base;
  size_t bytes;
  std::string name;
  std::vector<uint8_t> writes;  // of each 2 bytes, saturated
};

struct alignas(128) Line {
  unsigned char bytes[128];
};

struct Machine {
  int64_t block = 0, blocks = 0;
  int current = -1, threads = 0, finished = 0;
  uint32_t shared_bytes = 0;
  uint64_t random = 0;
  bool broken = true;  // fibers were left in the middle of something, or never made

  std::vector<Thread> thread;
  std::vector<Warp> warp;
  std::vector<Line> shared;
  std::vector<Word> words;
  std::vector<Output> outputs;
  uint32_t epoch = 0, first_epoch = 0;  // grows at each block barrier and each new block; the block's first

  int block_arrived = 0;
  Wait block_wait = Wait::kNothing;
  bool any_so_far = false, any = false;

  std::vector<int> order, ready;  // this round's threads, and the next's
  size_t position = 0;
  std::exception_ptr error;
  void (*call)(void*) = nullptr;
  void* body = nullptr;
};

inline Machine machine;

// ---------------------------------------------------------------- errors

inline std::string show(Site site) {
  const char* name = std::strrchr(site.file, '/');
  return std::string(name ? name + 1 : site.file) + ":" + std::to_string(site.line);
}

inline std::string show_thread(int t) {
  return "thread " + std::to_string(t) + " (warp " + std::to_string(t / 32) + ", lane " + std::to_string(t % 32) + ")";
}

[[noreturn]] inline void fail(const std::string& what) {
  throw std::runtime_error("hlip emulator: block " + std::to_string(machine.block) + ": " + what);
}

// "threads 0-31 wait in block_sync at x.cuh:7; threads 32-63 exited", for threads [first, last).
inline std::string show_waits(int first, int last) {
  static const char* const kNames[] = {"", "", "block_sync", "block_any", "warp_sync", "shuffle_xor", "uniform", "warp_any",
                                       "load_matrices", "load_matrices_transposed", "multiply_add<half>", "multiply_add<bfloat16>"};
  std::vector<std::pair<std::string, std::string>> groups;  // what they do, who they are
  for (int from = first, to; from < last; from = to) {
    const auto describe = [](const Thread& t) -> std::string {
      if (t.wait == Wait::kNothing) return "can go on";
      if (t.wait == Wait::kExited) return "exited";
      return std::string("wait in ") + kNames[static_cast<int>(t.wait)] + " at " + show(t.site);
    };
    const std::string what = describe(machine.thread[from]);
    for (to = from + 1; to < last && describe(machine.thread[to]) == what;) ++to;
    const std::string who = std::to_string(from) + (to - from > 1 ? "-" + std::to_string(to - 1) : "");
    auto group = std::find_if(groups.begin(), groups.end(), [&](const auto& g) { return g.first == what; });
    if (group == groups.end()) {
      groups.emplace_back(what, who);
    } else {
      group->second += "," + who;
    }
  }
  std::string all;
  for (const auto& [what, who] : groups) all += (all.empty() ? "threads " : "; threads ") + who + " " + what;
  return all;
}

// ---------------------------------------------------------------- fibers

// The next thread of this round; a new round, in a new order, when it is over; the runner when nobody can go on.
inline Fiber& next_fiber() {
  Machine& m = machine;
  if (m.position == m.order.size()) {
    m.order.swap(m.ready);
    m.ready.clear();
    m.position = 0;
    for (size_t left = m.order.size(); left > 1; --left) {
      m.random ^= m.random << 13;  // Marsaglia's xorshift
      m.random ^= m.random >> 7;
      m.random ^= m.random << 17;
      std::swap(m.order[left - 1], m.order[((m.random >> 32) * left) >> 32]);
    }
    if (m.order.empty()) return fibers.runner;
  }
  m.current = m.order[m.position++];
  return m.thread[m.current].fiber;
}

inline void pause() {
  Fiber& self = machine.thread[machine.current].fiber;
  Fiber& next = next_fiber();
  if (&next != &self) switch_fiber(self, next);
}

// What a fiber does: the same thread of one block after the other.
inline void fiber_main() {
  Machine& m = machine;
  const int t = m.current;
  arrived_in_fiber(m.thread[t].fiber);
  for (;;) {
    try {
      m.call(m.body);
      if (!m.thread[t].copies.empty()) fail(show_thread(t) + " exited without copy_async_wait for its copies");
      m.thread[t].wait = Wait::kExited;
      ++m.finished;
    } catch (...) {
      m.error = std::current_exception();
    }
    if (m.error) {  // no switch inside the handler: the exceptions being handled are the OS thread's
      switch_fiber(m.thread[t].fiber, fibers.runner);
    } else {
      pause();
    }
  }
}

inline void prepare(int threads, uint32_t shared_bytes, uint64_t seed) {
  Machine& m = machine;
  if (threads < 32 || threads > kMostThreads || threads % 32 != 0) {
    throw std::runtime_error("hlip emulator: " + std::to_string(threads) + " threads are not a multiple of 32 up to 1024");
  }
  if (fibers.stacks == nullptr) {
    make_stacks();
    m.thread.resize(kMostThreads);
    m.warp.resize(kMostThreads / 32);
  }
  if (m.broken) {
    for (Thread& thread : m.thread) {
      thread.copies.clear();
      thread.fiber.size = 0;
    }
    for (Warp& warp : m.warp) warp.arrived = 0;
    m.words.clear();
    m.block_arrived = 0;
    m.any_so_far = false;
    m.error = nullptr;
  }
  for (int t = 0; t < threads; ++t) {
    if (m.thread[t].fiber.size == 0) make_fiber(m.thread[t].fiber, t, &fiber_main);
  }
  m.threads = threads;
  m.shared_bytes = shared_bytes;
  m.random = (seed + 1) * 0x9e3779b97f4a7c15u;
  if (m.random == 0) m.random = 1;
  if (m.shared.size() * sizeof(Line) < shared_bytes) m.shared.resize((shared_bytes + sizeof(Line) - 1) / sizeof(Line));
  if (m.words.size() * 4 < shared_bytes) m.words.resize((shared_bytes + 3) / 4);
  m.broken = true;  // until the end is reached
}

inline void run_block(int64_t block) {
  Machine& m = machine;
  m.block = block;
  m.first_epoch = ++m.epoch;
  m.finished = 0;
  m.order.clear();
  m.ready.clear();
  m.position = 0;
  for (int t = 0; t < m.threads; ++t) {
    m.thread[t].wait = Wait::kNothing;
    m.ready.push_back(t);
  }
  switch_fiber(fibers.runner, next_fiber());
  if (m.error) std::rethrow_exception(std::exchange(m.error, nullptr));
  if (m.finished < m.threads) fail("deadlock: " + show_waits(0, m.threads));
}

// ---------------------------------------------------------------- shared memory

inline unsigned char* shared_data(Shared at) { return machine.shared[0].bytes + at; }

inline std::string show_access(int t, Site site, const char* does, uint32_t at) {
  return show_thread(t) + " " + does + " shared byte " + std::to_string(at) + " at " + show(site);
}

inline void check_place(Shared at, uint32_t bytes, int t, Site site, const char* does) {
  if (uint64_t{at} + bytes > machine.shared_bytes) {
    fail("out of range: " + show_access(t, site, does, at) + ": " + std::to_string(bytes) + " bytes of " +
         std::to_string(machine.shared_bytes));
  }
  if (at % bytes != 0) fail("misaligned: " + show_access(t, site, does, at) + ": " + std::to_string(bytes) + " bytes");
}

[[noreturn]] inline void fail_race(int t, Site site, const char* does, uint32_t word, int other, const char* did, Site before) {
  fail("race: " + show_access(t, site, does, 4 * word) + ", which " + show_thread(other) + " " + did + " at " + show(before) +
       ", with no barrier between");
}

inline void check_copies(const Word& w, int t, Site site, const char* does, uint32_t word) {
  if (w.copier < 0) return;
  fail("copy under way: " + show_access(t, site, does, 4 * word) + ", where a copy of " + show_thread(w.copier) +
       " at " + show(w.write_site) + " has not been waited for");
}

inline void check_last_write(const Word& w, int t, Site site, const char* does, uint32_t word) {
  if (w.write_epoch != machine.epoch || w.writer == t) return;
  if (w.writer / 32 == t / 32 && w.write_warp_epoch != machine.warp[t / 32].epoch) return;
  fail_race(t, site, does, word, w.writer, "wrote", w.write_site);
}

inline void note_read(Shared at, uint32_t bytes, int t, Site site) {
  Machine& m = machine;
  check_place(at, bytes, t, site, "reads");
  const int warp = t / 32;
  const uint32_t warp_epoch = m.warp[warp].epoch;
  Word* const words = m.words.data();
  for (uint32_t i = at / 4; i < (at + bytes) / 4; ++i) {
    Word& w = words[i];
    check_copies(w, t, site, "reads", i);
    if (w.write_epoch < m.first_epoch) fail("uninitialised: " + show_access(t, site, "reads", 4 * i) + ", which nobody wrote");
    check_last_write(w, t, site, "reads", i);
    if (w.read_epoch != m.epoch) {
      w.read_epoch = m.epoch;
      w.read_warp = static_cast<int16_t>(warp);
      w.read_warp_epoch = warp_epoch;
      w.read_lanes = 0;
      w.read_other = -1;
    }
    if (w.read_warp == warp) {
      if (w.read_warp_epoch != warp_epoch) w.read_lanes = 0;
      w.read_warp_epoch = warp_epoch;
      w.read_lanes |= 1u << (t % 32);
    } else {
      w.read_other = static_cast<int16_t>(t);
    }
    w.read_site = site;
  }
}

inline void check_write(const Word& w, int t, Site site, const char* does, uint32_t word) {
  check_copies(w, t, site, does, word);
  check_last_write(w, t, site, does, word);
  if (w.read_epoch != machine.epoch) return;
  int reader = w.read_other;
  if (w.read_warp != t / 32) {
    reader = w.read_warp * 32 + __builtin_ctz(w.read_lanes);
  } else if (w.read_other < 0 && w.read_warp_epoch == machine.warp[t / 32].epoch) {
    const uint32_t others = w.read_lanes & ~(1u << (t % 32));
    if (others) reader = w.read_warp * 32 + __builtin_ctz(others);
  }
  if (reader >= 0) fail_race(t, site, does, word, reader, "read", w.read_site);
}

inline void record_write(Word& w, int t, Site site) {
  w.write_epoch = machine.epoch;
  w.write_warp_epoch = machine.warp[t / 32].epoch;
  w.writer = static_cast<int16_t>(t);
  w.write_site = site;
  w.read_epoch = 0;  // those reads came before this write: whatever is ordered after it is ordered after them
}

// ---------------------------------------------------------------- waiting for others

// Leaves `arguments` for the last lane of the warp to arrive, which does work(arguments of all lanes).
template <typename Work>
void warp_collective(Wait wait, Site site, void* arguments, Work work) {
  Machine& m = machine;
  const int t = m.current, first = t / 32 * 32;
  Warp& warp = m.warp[t / 32];
  m.thread[t].wait = wait;
  m.thread[t].site = site;
  if (warp.arrived == 0) {
    warp.wait = wait;
    warp.site = site;
  }
  const bool same_file = warp.site.file == site.file || std::strcmp(warp.site.file, site.file) == 0;
  const bool elsewhere = wait >= kFirstAligned && !(same_file && warp.site.line == site.line);
  if (warp.wait != wait || elsewhere) {
    fail("divergence in warp " + std::to_string(t / 32) + ": " + show_waits(first, first + 32));
  }
  warp.arguments[t % 32] = arguments;
  if (++warp.arrived < 32) return pause();
  warp.arrived = 0;
  work(warp.arguments);
  for (int other = first; other < first + 32; ++other) {
    m.thread[other].wait = Wait::kNothing;
    if (other != t) m.ready.push_back(other);
  }
}

inline bool block_barrier(Wait wait, Site site, bool condition) {
  Machine& m = machine;
  m.thread[m.current].wait = wait;
  m.thread[m.current].site = site;
  if (m.block_arrived == 0) m.block_wait = wait;
  if (m.block_wait != wait) fail("divergence in the block: " + show_waits(0, m.threads));
  m.any_so_far |= condition;
  if (++m.block_arrived < m.threads) {
    pause();
    return m.any;  // nobody can change it before all are at the next barrier
  }
  m.block_arrived = 0;
  m.any = std::exchange(m.any_so_far, false);
  ++m.epoch;
  for (int other = 0; other < m.threads; ++other) {
    m.thread[other].wait = Wait::kNothing;
    if (other != m.current) m.ready.push_back(other);
  }
  return m.any;
}

}  // namespace emulation

// ---------------------------------------------------------------- what tests call

// Runs blocks 0 to blocks - 1; body() is the kernel's call, made once by every thread.
template <typename Body>
void emulate(int64_t blocks, int threads, uint32_t shared_bytes, uint64_t seed, Body body) {
  emulation::Machine& m = emulation::machine;
  emulation::prepare(threads, shared_bytes, seed);
  m.call = [](void* f) { (*static_cast<Body*>(f))(); };
  m.body = &body;
  m.blocks = blocks;
  for (int64_t block = 0; block < blocks; ++block) emulation::run_block(block);
  m.broken = false;
}

// From here on kernels may write this array (and no other that is not named so), each 2 bytes of it exactly once.
inline void expect_writes(void* base, size_t bytes, const char* name) {
  emulation::machine.outputs.push_back({static_cast<unsigned char*>(base), bytes, name, std::vector<uint8_t>(bytes / 2)});
}

inline void check_writes() {
  for (const emulation::Output& output : emulation::machine.outputs) {
    for (size_t i = 0; i < output.writes.size(); ++i) {
      if (output.writes[i] == 1) continue;
      throw std::runtime_error("hlip emulator: element " + std::to_string(i) + " (of 2 bytes) of " + output.name +
                               " was written " + std::to_string(output.writes[i]) + " times, not once");
    }
  }
}

inline void forget_writes() { emulation::machine.outputs.clear(); }

}  // namespace hlip
