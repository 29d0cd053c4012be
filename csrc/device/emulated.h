// The host's side of device.cuh: runs a kernel's source under g++, one thread block after the other, and checks what a GPU
// would not: races in shared memory, reads of what nobody wrote, collectives that not all lanes reach, outputs written twice.
//
// Every CUDA thread is a fiber with a stack of its own. It runs until it has to wait for others (a barrier or a warp
// collective); the last to arrive does the work for all. Fibers that may go on do so in an order drawn from a seed, so that
// a missing barrier tends to show in the results too. All of it lives in one OS thread and in one global: emulate() one
// kernel at a time. A kernel should own nothing that needs destroying: after an error its fibers are never resumed.
//
// Every error is a std::runtime_error that names block, threads, source lines and, for shared memory, byte offsets.
#pragma once

#include <cuda_runtime.h>
#include <sys/mman.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <exception>
#include <memory>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

#include "../element.cuh"

#if defined(__SANITIZE_ADDRESS__)
#define HLIP_EMULATED_ASAN 1
#elif defined(__has_feature)
#if __has_feature(address_sanitizer)
#define HLIP_EMULATED_ASAN 1
#endif
#endif
#ifdef HLIP_EMULATED_ASAN
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

#define HLIP_DEVICE inline
#define HLIP_KERNEL(threads) void

// swapcontext asks the kernel for the signal mask each time, which would be most of what a collective costs.
#if defined(__x86_64__) && defined(__linux__) && !defined(HLIP_EMULATED_UCONTEXT)
#define HLIP_EMULATED_SWAP 1
// Leaves the callee-saved registers on this stack, its pointer in *save, and goes on with what `load` has.
extern "C" void hlip_swap_stacks(void** save, void* load);
asm(R"(
.pushsection .text
.weak hlip_swap_stacks
.type hlip_swap_stacks, @function
hlip_swap_stacks:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size hlip_swap_stacks, . - hlip_swap_stacks
.popsection
)");
#else
#include <ucontext.h>
#endif

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
enum class Wait { kNothing, kExited, kBlockSync, kBlockAny, kWarpSync, kShuffle, kLoad, kLoadTransposed, kHalf, kBFloat16 };
constexpr Wait kFirstAligned = Wait::kLoad;

struct Copy {  // a cp.async under way
  Shared to;
  unsigned char data[16];
};

struct Fiber {
  char* stack = nullptr;
  size_t size = 0;
  void* fake_stack = nullptr;  // AddressSanitizer's
#ifdef HLIP_EMULATED_SWAP
  void* top = nullptr;
#else
  ucontext_t context;
#endif
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

constexpr int kMostThreads = 1024;
constexpr size_t kStack = 256 * 1024, kGuard = 64 * 1024;  // whole pages, of any usual size

struct Machine {
  int64_t block = 0;
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
  Fiber runner;
  Fiber* previous = nullptr;
  char* stacks = nullptr;
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
  static const char* const kNames[] = {"", "", "block_sync", "block_any", "warp_sync", "shuffle_xor", "load_matrices",
                                       "load_matrices_transposed", "multiply_add<half>", "multiply_add<bfloat16>"};
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

inline void arrived_in_fiber(Fiber& self) {  // the first thing after every switch
#ifdef HLIP_EMULATED_ASAN
  const void* bottom;
  size_t size;
  __sanitizer_finish_switch_fiber(self.fake_stack, &bottom, &size);
  if (machine.previous != &machine.runner) return;
  machine.runner.stack = static_cast<char*>(const_cast<void*>(bottom));  // how a fiber learns where to switch back to
  machine.runner.size = size;
#else
  (void)self;
#endif
}

inline void switch_fiber(Fiber& from, Fiber& to) {
  machine.previous = &from;
#ifdef HLIP_EMULATED_ASAN
  __sanitizer_start_switch_fiber(&from.fake_stack, to.stack, to.size);
#endif
#ifdef HLIP_EMULATED_SWAP
  hlip_swap_stacks(&from.top, to.top);
#else
  swapcontext(&from.context, &to.context);
#endif
  arrived_in_fiber(from);
}

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
    if (m.order.empty()) return m.runner;
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
      switch_fiber(m.thread[t].fiber, m.runner);
    } else {
      pause();
    }
  }
}

inline void make_fiber(int t) {
  Fiber& fiber = machine.thread[t].fiber;
  fiber.stack = machine.stacks + t * (kGuard + kStack) + kGuard;
  fiber.size = kStack;
  fiber.fake_stack = nullptr;
#ifdef HLIP_EMULATED_ASAN
  __asan_unpoison_memory_region(fiber.stack, fiber.size);  // frames of a fiber that was given up
#endif
#ifdef HLIP_EMULATED_SWAP
  // Six registers, then where to go, then the return address of that: none. Aligned as if fiber_main had been called.
  void** top = reinterpret_cast<void**>(fiber.stack + fiber.size) - 8;
  std::fill(top, top + 8, nullptr);
  top[6] = reinterpret_cast<void*>(&fiber_main);
  fiber.top = top;
#else
  getcontext(&fiber.context);
  fiber.context.uc_stack.ss_sp = fiber.stack;
  fiber.context.uc_stack.ss_size = fiber.size;
  fiber.context.uc_link = nullptr;
  makecontext(&fiber.context, &fiber_main, 0);
#endif
}

inline void prepare(int threads, uint32_t shared_bytes, uint64_t seed) {
  Machine& m = machine;
  if (threads < 32 || threads > kMostThreads || threads % 32 != 0) {
    throw std::runtime_error("hlip emulator: " + std::to_string(threads) + " threads are not a multiple of 32 up to 1024");
  }
  if (m.stacks == nullptr) {
    const int flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE;
    void* const memory = mmap(nullptr, kMostThreads * (kGuard + kStack), PROT_READ | PROT_WRITE, flags, -1, 0);
    if (memory == MAP_FAILED) throw std::runtime_error("hlip emulator: no memory for stacks");
    m.stacks = static_cast<char*>(memory);
    for (int t = 0; t < kMostThreads; ++t) mprotect(m.stacks + t * (kGuard + kStack), kGuard, PROT_NONE);
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
    if (m.thread[t].fiber.size == 0) make_fiber(t);
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
  switch_fiber(m.runner, next_fiber());
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
  fail("copy under way: " + show_access(t, site, does, 4 * word) + ", where a copy_async_16 of " + show_thread(w.copier) +
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

// ---------------------------------------------------------------- the work of collectives

struct LoadArguments {
  uint32_t* matrices;
  Shared row;
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
HLIP_DEVICE int lane_index() { return emulation::machine.current % 32; }
HLIP_DEVICE int warp_index() { return emulation::machine.current / 32; }
HLIP_DEVICE int64_t block_index() { return emulation::machine.block; }

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
HLIP_DEVICE void copy_async_16(Shared to, const void* from, bool really, emulation::Site site = emulation::Site::here()) {
  const int t = thread_index();
  emulation::check_place(to, 16, t, site, "copies to");
  for (uint32_t i = to / 4; i < to / 4 + 4; ++i) {
    emulation::Word& word = emulation::machine.words[i];
    emulation::check_write(word, t, site, "copies to", i);
    word.copier = static_cast<int16_t>(t);
    word.write_site = site;
  }
  emulation::Copy copy{to, {}};
  emulation::check_global<uint4>(from, "copies", site);
  if (really) std::memcpy(copy.data, from, 16);
  emulation::machine.thread[t].copies.push_back(copy);
}

HLIP_DEVICE void copy_async_wait() {
  const int t = thread_index();
  auto& copies = emulation::machine.thread[t].copies;
  for (const emulation::Copy& copy : copies) {
    for (uint32_t i = copy.to / 4; i < copy.to / 4 + 4; ++i) {
      emulation::Word& word = emulation::machine.words[i];
      word.copier = -1;
      emulation::record_write(word, t, word.write_site);
    }
    std::memcpy(emulation::shared_data(copy.to), copy.data, 16);
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

HLIP_DEVICE void load_matrices(uint32_t (&m)[4], Shared row, emulation::Site site = emulation::Site::here()) {
  emulation::LoadArguments mine{m, row};
  emulation::warp_collective(emulation::Wait::kLoad, site, &mine,
                             [site](void** lanes) { emulation::load_all_lanes(lanes, false, site); });
}

HLIP_DEVICE void load_matrices_transposed(uint32_t (&m)[4], Shared row, emulation::Site site = emulation::Site::here()) {
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

// Subnormal arguments and results are zeros, as with .ftz.
HLIP_DEVICE float exp2_fast(float x) {
  const float y = std::exp2(x);
  return y < 1.17549435e-38f ? 0.0f : y;
}
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

// ---------------------------------------------------------------- what tests call

// Runs blocks 0 to blocks - 1; body() is the kernel's call, made once by every thread.
template <typename Body>
void emulate(int64_t blocks, int threads, uint32_t shared_bytes, uint64_t seed, Body body) {
  emulation::Machine& m = emulation::machine;
  emulation::prepare(threads, shared_bytes, seed);
  m.call = [](void* f) { (*static_cast<Body*>(f))(); };
  m.body = &body;
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
