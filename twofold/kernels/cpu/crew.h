// Crew: the threads that run one stage together. Each thread calls the stage; `take` deals out the stage's pieces of work,
// so that a thread the system has put aside holds nobody up. How pieces fall to threads never touches a result.
#pragma once
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <utility>

// The way into a stage and the tickets to its pieces, in one number, so that whoever comes in holds a ticket at once:
//
//   closed (1 bit) | how many are inside (15 bits) | the next ticket (48 bits)
class alignas(64) Door {
 public:
  static constexpr int COUNTERS = 30;
  static constexpr int64_t NO_TICKET = -1;
  std::atomic<int32_t> done[COUNTERS] = {};  // for stages whose pieces have parts: how many of each are finished

  // One more inside, and its first ticket; none where the door is closed.
  int64_t enter() {
    const int64_t was = state_.fetch_add(INSIDE + 1, std::memory_order_acquire);
    return was < 0 ? NO_TICKET : was & (INSIDE - 1);
  }

  int64_t take() { return state_.fetch_add(1, std::memory_order_relaxed) & (INSIDE - 1); }

  // One less inside, by a thread that knows that all pieces are taken. The last one closes the door, and is told so.
  bool leave() {
    int64_t left = state_.fetch_sub(INSIDE, std::memory_order_acq_rel) - INSIDE;
    return left < INSIDE && state_.compare_exchange_strong(left, CLOSED, std::memory_order_acq_rel);
  }

 private:
  static constexpr int64_t INSIDE = int64_t(1) << 48, CLOSED = INT64_MIN;
  std::atomic<int64_t> state_{0};
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
  int threads;
  Door* door;
  Scratch* scratch;
  int64_t ticket;  // from the door, not yet used

  // The next piece of work of this stage: 0, 1, 2 ... across all threads. Stages take until there are no more.
  int64_t take() { return ticket == Door::NO_TICKET ? door->take() : std::exchange(ticket, Door::NO_TICKET); }
};

inline int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }
