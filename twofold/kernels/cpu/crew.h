// Crew: the threads that run one stage together. Each thread calls the stage; `take` deals out the stage's pieces of work,
// so that a thread the system has put aside holds nobody up. How pieces fall to threads never touches a result.
#pragma once
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <cstdlib>

struct alignas(64) Tickets {
  static constexpr int COUNTERS = 30;
  std::atomic<int64_t> next{0};
  std::atomic<int32_t> done[COUNTERS] = {};  // for stages whose pieces have parts: how many of each are finished
};

// Memory of one thread, kept from call to call.
class Scratch {
 public:
  ~Scratch() { std::free(memory_); }
  template <class T>
  T* need(size_t count) {
    const size_t bytes = (count * sizeof(T) + 63) / 64 * 64;
    if (bytes > size_) {
      std::free(memory_);
      memory_ = std::aligned_alloc(64, bytes);
      size_ = memory_ ? bytes : 0;
      if (!memory_) std::abort();  // nothing sensible is left to do in the middle of a step
    }
    return static_cast<T*>(memory_);
  }

 private:
  void* memory_ = nullptr;
  size_t size_ = 0;
};

struct Crew {
  int thread, threads;
  Tickets* tickets;
  Scratch* scratch;

  // The next piece of work of this stage: 0, 1, 2 ... across all threads.
  int64_t take() { return tickets->next.fetch_add(1, std::memory_order_relaxed); }
};

inline int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }
