// Drives the team of threads and the library's door under ThreadSanitizer: programs in a row, each stage needing the one
// before; threads that sleep in between, threads that are put aside, callers side by side, other numbers of threads, forked
// children. The first argument is how many programs; a second asks for a race, to see that one is seen.
#include <pthread.h>
#include <signal.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <ctime>
#include <memory>
#include <thread>
#include <vector>

#include "stages.h"

extern "C" void tf_run(const Stage* stages, int32_t count, int32_t threads);

namespace {

constexpr int NUMBERS = 37, PARTS = 3;

void must(bool good, const char* what) {
  if (good) return;
  std::fprintf(stderr, "wrong: %s\n", what);
  std::exit(1);
}

// A stage that needs the one before to be done: each number is made of all those of the last stage. Plain numbers, so that
// a missing order is a race, and on the heap, so that a thread that comes too late touches what was freed.
struct Sum {
  const long* from;
  long* to;
  int pieces;
  long* parts;  // where given, each piece has PARTS parts, and whoever finishes the last adds them up
};

long sum_of(const long* from, int part, int parts) {
  long sum = 0;
  for (int j = NUMBERS * part / parts; j < NUMBERS * (part + 1) / parts; j++) sum += from[j];
  return sum;
}

void write_piece(const Sum& it, int64_t piece, long sum) {
  for (int64_t i = NUMBERS * piece / it.pieces; i < NUMBERS * (piece + 1) / it.pieces; i++) it.to[i] = sum % 1000 + i;
}

void run_sum(const void* args, Crew& crew) {
  const Sum& it = *static_cast<const Sum*>(args);
  for (int64_t i; (i = crew.take()) < it.pieces;) {
    long* room = crew.scratch->need<long>(NUMBERS + i);
    std::copy_n(it.from, NUMBERS, room);
    write_piece(it, i, sum_of(room, 0, 1));
  }
}

void run_sum_in_parts(const void* args, Crew& crew) {
  const Sum& it = *static_cast<const Sum*>(args);
  for (int64_t i; (i = crew.take()) < it.pieces * PARTS;) {
    long* parts = it.parts + i / PARTS * PARTS;
    parts[i % PARTS] = sum_of(it.from, int(i % PARTS), PARTS);
    if (crew.door->done[i / PARTS].fetch_add(1, std::memory_order_acq_rel) != PARTS - 1) continue;
    long sum = 0;
    for (int p = 0; p < PARTS; p++) sum += parts[p];
    write_piece(it, i / PARTS, sum);
  }
}

void run_sum_by_one(const void* args, Crew& crew) {
  if (crew.take() == 0) write_piece(*static_cast<const Sum*>(args), 0, sum_of(static_cast<const Sum*>(args)->from, 0, 1));
}

void run_nothing(const void*, Crew&) {}

void run_no_pieces(const void* args, Crew& crew) {
  const Sum& it = *static_cast<const Sum*>(args);
  must(crew.take() >= 0 && it.pieces == 0, "a stage without pieces");
}

// What ThreadSanitizer must see: two threads in one stage, and both add to one number.
struct Race {
  std::atomic<int> here{0};
  long number = 0;
};

void run_race(const void* args, Crew&) {
  Race& it = *static_cast<Race*>(const_cast<void*>(args));
  it.here.fetch_add(1, std::memory_order_relaxed);
  while (it.here.load(std::memory_order_relaxed) < 2) std::this_thread::yield();
  ++it.number;
}

// A program of `count` stages of all kinds on `threads` threads, and what one thread makes of it.
void program(int count, int threads) {
  std::vector<long> memory((count + 1) * NUMBERS), truth((count + 1) * NUMBERS), parts(count * NUMBERS * PARTS);
  for (int i = 0; i < NUMBERS; i++) memory[i] = truth[i] = i;
  std::vector<Sum> sums(count + 1);
  std::vector<Stage> stages;
  for (int s = 0; s < count; s++) {
    const int pieces = s % 4 == 0 ? NUMBERS : s % 4 == 1 ? 2 : s % 4 == 2 ? 11 : 1;
    sums[s] = {&memory[s * NUMBERS], &memory[(s + 1) * NUMBERS], pieces, &parts[s * NUMBERS * PARTS]};
    stages.push_back({s % 4 == 2 ? run_sum_in_parts : s % 4 == 3 ? run_sum_by_one : run_sum, &sums[s]});
    if (s % 3 == 1) stages.push_back({run_no_pieces, &sums[count]});
    if (s % 5 == 2) stages.push_back({run_nothing, nullptr});
    const long sum = sum_of(&truth[s * NUMBERS], 0, 1);
    for (int i = 0; i < NUMBERS; i++) truth[(s + 1) * NUMBERS + i] = sum % 1000 + i;
  }
  tf_run(stages.data(), int32_t(stages.size()), threads);
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

// ---------------------------------------------------------------------------------------------- threads put aside
// As the system does it to a thread when others want its processor: a signal's handler does not return for a while.
constexpr int TEAM = 4;
std::atomic<int> aside{0};
std::atomic<bool> back{false};

void stay_away(int) {
  const int kept = errno;
  const timespec moment{0, 1'000'000};
  aside++;
  for (int i = 0; i < 10'000 && !back; i++) nanosleep(&moment, nullptr);
  aside--;
  errno = kept;
}

// All threads of the team in one stage: who they are.
struct Call {
  std::atomic<int> here{0};
  std::atomic<bool> called{false};
  pthread_t who[TEAM], caller = pthread_self();
};

void run_call(const void* args, Crew&) {
  Call& it = *static_cast<Call*>(const_cast<void*>(args));
  it.who[it.here++] = pthread_self();
  while (it.here < TEAM) std::this_thread::yield();
}

void put_aside(const Call& call) {
  for (pthread_t thread : call.who)
    if (!pthread_equal(thread, pthread_self())) pthread_kill(thread, SIGUSR1);
  while (aside < TEAM - 1) std::this_thread::yield();
}

void come_back() {
  back = true;
  while (aside > 0) std::this_thread::yield();
  back = false;
}

// The others do their pieces when the caller has one; it puts them aside when they wait for it.
void run_wait(const void* args, Crew& crew) {
  Call& call = *static_cast<Call*>(const_cast<void*>(args));
  while (crew.take() < TEAM) {
    if (!pthread_equal(call.caller, pthread_self())) {
      while (!call.called) std::this_thread::yield();
    } else if (!call.called.exchange(true)) {
      std::this_thread::sleep_for(std::chrono::milliseconds(50));
      put_aside(call);
    }
  }
}

void without_the_others(int programs) {
  struct sigaction action {};
  action.sa_handler = stay_away;
  sigaction(SIGUSR1, &action, nullptr);
  const auto call = std::make_unique<Call>();
  const Stage all{run_call, call.get()};
  tf_run(&all, 1, TEAM);
  for (bool asleep : {false, true}) {
    if (asleep) std::this_thread::sleep_for(std::chrono::milliseconds(50));
    put_aside(*call);
    in_a_row(programs, TEAM);
    in_a_child();
    must(aside == TEAM - 1, "programs that end while the others are away");
    come_back();
    in_a_row(programs, TEAM);
  }
  const Stage wait{run_wait, call.get()};
  tf_run(&wait, 1, TEAM);
  in_a_row(programs, TEAM);  // while they still hold the last program
  come_back();
  in_a_row(programs, TEAM);
}

}  // namespace

int main(int count, char** options) {
  const int programs = count > 1 ? std::atoi(options[1]) : 200;
  if (count > 2) {
    Race race;
    const Stage stage{run_race, &race};
    tf_run(&stage, 1, 2);
  }
  in_a_row(programs, 4);
  for (int threads : {1, 2, 4, 3, 8}) in_a_row(programs / 10, threads);
  for (int i = 0; i < programs / 2; i++) program(3, 2 + i % 3);
  without_the_others(programs / 5);
  side_by_side(programs / 2);
  in_a_child();
  in_a_row(programs / 10, 2);
  std::puts("done");
}
