// What every kernel here asks for: threads, memory, and to be compiled for one kind of processor.

#pragma once

#include <dlfcn.h>

#include <algorithm>
#include <cstdint>
#include <memory>
#include <new>
#include <thread>
#include <vector>

#define INLINE static inline __attribute__((always_inline))  // into functions for one kind of processor each

namespace {

constexpr int kLine = 16;  // floats of a cache line

typedef void (*Work)(void*);

// On the threads of torch, where its OpenMP is GNU's or takes its calls: while they spin, others would wait for a core.
inline void on_threads(Work work, void* task, int threads, bool pool) {
  typedef void (*Parallel)(Work, void*, unsigned, unsigned);
  static const Parallel parallel = reinterpret_cast<Parallel>(dlsym(RTLD_DEFAULT, "GOMP_parallel"));
  if (threads == 1) return work(task);
  if (pool && parallel) return parallel(work, task, threads, 0);
  std::vector<std::thread> others;
  try {
    for (int i = 1; i < threads; ++i) others.emplace_back(work, task);
  } catch (...) {  // those that could be started have to do
  }
  work(task);
  for (std::thread& other : others) other.join();
}

inline int worth(int threads, int64_t work, int64_t share) {
  return int(std::max<int64_t>(1, std::min<int64_t>(threads, work / share)));
}

inline int64_t whole_lines(int64_t floats) { return (floats + kLine - 1) / kLine * kLine; }

// Kept from call to call: new memory costs as much time as what goes into it.
struct Memory {
  struct Free {
    void operator()(float* floats) const { ::operator delete(floats, std::align_val_t(64)); }
  };
  std::unique_ptr<float, Free> floats;
  int64_t size = 0;

  bool holds(int64_t wanted) {
    if (wanted <= size) return true;
    size = 0;
    floats.reset();
    floats.reset(static_cast<float*>(::operator new(wanted * sizeof(float), std::align_val_t(64), std::nothrow)));
    if (floats) size = wanted;
    return size > 0;
  }
};

// The bytes of the widest registers that this processor has.
inline int widest_register() {
#if defined(__x86_64__)
  if (__builtin_cpu_supports("avx512f")) return 64;
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return 32;
#endif
  return 16;
}

}  // namespace
