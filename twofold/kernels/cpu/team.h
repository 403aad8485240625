// Team: threads that are woken once for a whole program and go through its stages together. Nobody waits for a thread that
// holds no piece of work: one that the system has put aside finds, when it is back, how far the others came without it.
//
//   stage   0        1        2          3      4
//   door    closed   closed   2 inside   -      -          open_ = 2: where whoever comes now begins
//
//   come in    one more inside, and a first ticket; or the door is closed: the stage is done
//   run        pieces, until there are none: whoever is back from it knows that all are taken
//   go out     one less inside; the last one closes the door (all pieces are done) and moves open_ on
//   wait       until open_ has moved on
//
// Order: all comings and goings of a door are one chain of read-modify-writes, so the thread that closes it has seen what all
// others wrote inside; open_ hands that on to whoever reads it before coming in to the next stage.
//
// The caller returns when the last door is closed. A late worker may still hold the Program then: that has its own copy of
// the stages, and what they point to is touched inside an open door only. Programs are kept, and written anew when nobody
// holds them. A worker holds one and then looks whether it is still the current one; a caller takes it away and then looks
// whether it is held: in one order of all these steps (sequential consistency), one of the two sees the other.
#pragma once
#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

#include "stages.h"

// A thread's share of a stage that it may be the only one at; whether this finished the stage.
bool run_stage(const Stage& stage, Door& door, int threads);

// Stages on their way, and the door of each.
class Program {
 public:
  std::atomic<int> holders{0};

  // For a program that nobody holds.
  void write(const Stage* stages, int32_t count);

  // Takes part until the last door is closed.
  void walk(int threads);

 private:
  int32_t wait_past(int32_t stage) const;

  std::vector<Stage> stages_;
  std::unique_ptr<Door[]> doors_;
  alignas(64) std::atomic<int32_t> open_{0};
};

class Team {
 public:
  explicit Team(int threads);
  ~Team();
  Team(const Team&) = delete;

  // Runs the stages, each after the one before is done, and returns when the last is. One caller at a time.
  void run(const Stage* stages, int32_t count);

  int size() const { return size_; }

 private:
  // Where a worker sleeps between programs: each has its own, so that nobody is woken through somebody who is put aside.
  struct Bed {
    std::atomic<bool> taken{false};
    std::mutex mutex;
    std::condition_variable wake;
  };

  void live(Bed& bed);
  void sleep(Bed& bed, uint32_t seen);
  void wake_all();
  Program& free_program();

  const int size_;
  const std::unique_ptr<Program[]> programs_;  // as many as threads: each worker holds one at most
  const std::unique_ptr<Bed[]> beds_;
  alignas(64) std::atomic<uint32_t> turn_{0};  // counts programs; workers wait for the next
  std::atomic<Program*> current_{nullptr};
  std::atomic<bool> over_{false};
  std::vector<std::thread> workers_;
};
