// Drives the team of threads and the library's door under ThreadSanitizer: programs in a row with a barrier between their
// stages, threads that sleep in between, callers side by side, another number of threads, a forked child. The first argument
// is how many programs; a second asks for a race, to see that one is seen.
#include <sys/wait.h>
#include <unistd.h>

#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <thread>
#include <vector>

#include "stages.h"

extern "C" void tf_run(const Stage* stages, int32_t count, int32_t threads);

namespace {

constexpr int PIECES = 37;

// A stage that needs the one before to be done: each piece adds up what all pieces of the last stage wrote. Plain numbers,
// so that a missing barrier is a race.
struct Sum {
  const long* from;
  long* to;
};

void run_sum(const void* args, Crew& crew) {
  const Sum& it = *static_cast<const Sum*>(args);
  for (int64_t i; (i = crew.take()) < PIECES;) {
    long* room = crew.scratch->need<long>(PIECES + i);
    long sum = 0;
    for (int j = 0; j < PIECES; j++) sum += room[j] = it.from[j];
    it.to[i] = sum % 1000 + i;
  }
}

// What ThreadSanitizer must see: every thread adds to one number.
void run_race(const void* args, Crew&) { ++*static_cast<long*>(const_cast<void*>(args)); }

void must(bool good, const char* what) {
  if (good) return;
  std::fprintf(stderr, "wrong: %s\n", what);
  std::exit(1);
}

// A program of `count` stages on `threads` threads, and what one thread makes of it.
void program(int count, int threads) {
  std::vector<long> memory((count + 1) * PIECES), truth((count + 1) * PIECES);
  for (int i = 0; i < PIECES; i++) memory[i] = truth[i] = i;
  std::vector<Sum> sums(count);
  std::vector<Stage> stages(count);
  for (int s = 0; s < count; s++) {
    sums[s] = {&memory[s * PIECES], &memory[(s + 1) * PIECES]};
    stages[s] = {run_sum, &sums[s]};
    long sum = 0;
    for (int j = 0; j < PIECES; j++) sum += truth[s * PIECES + j];
    for (int i = 0; i < PIECES; i++) truth[(s + 1) * PIECES + i] = sum % 1000 + i;
  }
  tf_run(stages.data(), count, threads);
  must(memory == truth, "a program's result");
}

void in_a_row(int programs, int threads) {
  for (int i = 0; i < programs; i++) {
    program(i % 9, threads);
    if (i % 40 == 0) std::this_thread::sleep_for(std::chrono::milliseconds(5));  // long enough to fall asleep
  }
}

void side_by_side(int programs) {
  std::vector<std::thread> callers;
  for (int threads : {4, 4, 2, 3, 1}) callers.emplace_back([=] { in_a_row(programs, threads); });
  for (std::thread& caller : callers) caller.join();
}

void in_a_child() {
  const pid_t child = fork();
  if (child == 0) {
    in_a_row(20, 3);
    _exit(0);
  }
  int status = 1;
  must(waitpid(child, &status, 0) == child && status == 0, "a forked child");
}

}  // namespace

int main(int count, char** options) {
  const int programs = count > 1 ? std::atoi(options[1]) : 200;
  if (count > 2) {
    long number = 0;
    const Stage race{run_race, &number};
    tf_run(&race, 1, 4);
  }
  in_a_row(programs, 4);
  for (int threads : {1, 2, 4, 3, 8}) in_a_row(programs / 10, threads);
  side_by_side(programs / 2);
  in_a_child();
  in_a_row(programs / 10, 2);
  std::puts("done");
}
