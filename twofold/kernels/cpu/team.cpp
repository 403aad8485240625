#include "team.h"

#include "simd.h"

namespace {
constexpr int SPINS_IN_STEP = 4000;    // turns of the waiting loop: about 50 microseconds
constexpr int SPINS_BETWEEN = 20000;   // about 300 microseconds, the time between two steps of a small model
}  // namespace

Team::Team(int threads) : size_(threads) {
  for (int i = 1; i < threads; i++) workers_.emplace_back([this, i] { live(i); });
}

Team::~Team() {
  {
    std::lock_guard<std::mutex> lock(mutex_);
    over_ = true;
    turn_.fetch_add(1);
  }
  wake_.notify_all();
  for (std::thread& worker : workers_) worker.join();
}

void Team::start(Call call, void* work) {
  call_ = call, work_ = work;
  busy_.store(size_ - 1, std::memory_order_relaxed);
  turn_.fetch_add(1);  // after this a worker that is about to sleep sees the new turn, or is counted below
  if (sleepers_.load() > 0) {
    std::lock_guard<std::mutex> lock(mutex_);
    wake_.notify_all();
  }
}

void Team::wait_done() {
  for (int spins = 0; busy_.load(std::memory_order_acquire); spins++) {
    if (spins < SPINS_IN_STEP) pause_thread();
    else std::this_thread::yield();
  }
}

void Team::live(int thread) {
  for (uint32_t seen = 0;;) {
    for (int spins = 0; turn_.load(std::memory_order_acquire) == seen && spins < SPINS_BETWEEN; spins++) pause_thread();
    if (turn_.load(std::memory_order_acquire) == seen) {
      std::unique_lock<std::mutex> lock(mutex_);
      sleepers_.fetch_add(1);
      wake_.wait(lock, [&] { return turn_.load() != seen; });
      sleepers_.fetch_sub(1);
    }
    seen++;
    if (over_) return;
    call_(work_, thread);
    busy_.fetch_sub(1, std::memory_order_release);
  }
}

void Team::barrier() {
  if (size_ == 1) return;
  const uint32_t before = passed_.load(std::memory_order_relaxed);
  if (arrived_.fetch_add(1, std::memory_order_acq_rel) == size_ - 1) {
    arrived_.store(0, std::memory_order_relaxed);
    passed_.store(before + 1, std::memory_order_release);
    return;
  }
  for (int spins = 0; passed_.load(std::memory_order_acquire) == before; spins++) {
    if (spins < SPINS_IN_STEP) pause_thread();
    else std::this_thread::yield();
  }
}
