// Team: threads that are woken once for a whole program, and meet at a barrier after each stage.
//
// A waiting thread spins for a while, since the next stage is microseconds away, then yields its processor, and between
// programs goes to sleep. OpenMP's teams spin for as long as they are told whatever the machine is doing; here a
// neighbour's process costs a time slice and no more.
#pragma once
#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <mutex>
#include <thread>
#include <vector>

class Team {
 public:
  explicit Team(int threads);
  ~Team();
  Team(const Team&) = delete;

  // Calls work(thread) on every thread, the caller's being thread 0; returns when all are done.
  template <class Work>
  void run(Work& work) {
    start([](void* it, int thread) { (*static_cast<Work*>(it))(thread); }, &work);
    work(0);
    wait_done();
  }

  // Every thread of the team arrives before any leaves.
  void barrier();

  int size() const { return size_; }

 private:
  using Call = void (*)(void*, int);
  void start(Call call, void* work);
  void wait_done();
  void live(int thread);

  const int size_;
  Call call_ = nullptr;
  void* work_ = nullptr;
  alignas(64) std::atomic<uint32_t> turn_{0};  // counts programs; workers wait for the next
  alignas(64) std::atomic<int> sleepers_{0};
  alignas(64) std::atomic<int> busy_{0};
  alignas(64) std::atomic<int> arrived_{0};
  alignas(64) std::atomic<uint32_t> passed_{0};
  std::atomic<bool> over_{false};
  std::mutex mutex_;
  std::condition_variable wake_;
  std::vector<std::thread> workers_;
};
