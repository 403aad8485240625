#include "team.h"

#include "simd.h"

namespace {

constexpr int SPINS_IN_STEP = 4000;   // turns of the waiting loop: about 50 microseconds
constexpr int SPINS_BETWEEN = 20000;  // about 300 microseconds, the time between two steps of a small model

thread_local Scratch scratch;

}  // namespace

bool run_stage(const Stage& stage, Door& door, int threads) {
  const int64_t ticket = door.enter();
  if (ticket == Door::NO_TICKET) return false;
  Crew crew{threads, &door, &scratch, ticket};
  stage.run(stage.args, crew);
  return door.leave();
}

void Program::write(const Stage* stages, int32_t count) {
  stages_.assign(stages, stages + count);
  doors_.reset(new Door[count]);
  open_.store(0, std::memory_order_relaxed);
}

void Program::walk(int threads) {
  const int32_t count = int32_t(stages_.size());
  for (int32_t i = open_.load(std::memory_order_acquire); i < count; i = wait_past(i))
    if (run_stage(stages_[i], doors_[i], threads)) open_.store(i + 1, std::memory_order_release);
}

int32_t Program::wait_past(int32_t stage) const {
  for (int spins = 0;; spins++) {
    const int32_t open = open_.load(std::memory_order_acquire);
    if (open > stage) return open;
    if (spins < SPINS_IN_STEP) pause_thread();
    else std::this_thread::yield();
  }
}

Team::Team(int threads) : size_(threads), programs_(new Program[threads]), beds_(new Bed[threads]) {
  for (int i = 1; i < threads; i++) workers_.emplace_back([this, i] { live(beds_[i]); });
}

Team::~Team() {
  over_ = true;
  wake_all();
  for (std::thread& worker : workers_) worker.join();
}

void Team::run(const Stage* stages, int32_t count) {
  Program& program = free_program();
  program.write(stages, count);
  current_.store(&program);
  wake_all();
  program.walk(size_);
  current_.store(nullptr);
}

// Called while no program is the current one; a worker that is about to look at the last one holds it for a moment only.
Program& Team::free_program() {
  for (int i = 0;; i = (i + 1) % size_)
    if (programs_[i].holders.load() == 0) return programs_[i];
}

void Team::wake_all() {
  turn_.fetch_add(1);  // after this a worker that is about to sleep sees the new turn, or its bed is seen taken below
  for (int i = 1; i < size_; i++) {
    Bed& bed = beds_[i];
    if (!bed.taken.load() || !bed.taken.exchange(false)) continue;
    std::lock_guard<std::mutex> lock(bed.mutex);
    bed.wake.notify_one();
  }
}

void Team::sleep(Bed& bed, uint32_t seen) {
  std::unique_lock<std::mutex> lock(bed.mutex);
  for (;;) {
    bed.taken.store(true);  // each time: a late waker of the program before may have cleared it
    if (turn_.load() != seen) break;
    bed.wake.wait(lock);
  }
  bed.taken.store(false);
}

void Team::live(Bed& bed) {
  for (uint32_t seen = 0;;) {
    for (int spins = 0; turn_.load(std::memory_order_acquire) == seen && spins < SPINS_BETWEEN; spins++) pause_thread();
    if (turn_.load(std::memory_order_acquire) == seen) sleep(bed, seen);
    seen = turn_.load();
    if (over_) return;
    Program* program = current_.load();
    if (!program) continue;
    program->holders.fetch_add(1);
    if (current_.load() == program) program->walk(size_);
    program->holders.fetch_sub(1);
  }
}
