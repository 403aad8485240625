// The library's doors: run a program of stages on a team of threads.
#include <pthread.h>

#include <mutex>

#include "team.h"

#define TF_EXPORT extern "C" __attribute__((visibility("default")))

namespace {

// The process's one team, made at first use and remade when another size is asked for. Left behind at exit and in a
// forked child, where its threads do not exist.
Team* team = nullptr;
std::mutex* team_mutex = new std::mutex;

void forget_team() {
  team = nullptr;
  team_mutex = new std::mutex;
}

Team& team_of(int threads) {
  static const int once = pthread_atfork(nullptr, nullptr, forget_team);
  (void)once;
  if (team && team->size() != threads) {
    delete team;
    team = nullptr;
  }
  if (!team) team = new Team(threads);
  return *team;
}

}  // namespace

// Runs `count` stages, each after the one before is done. A second caller while the team is busy works alone: the same
// bits, only slower. Nothing is thrown and nothing returned; arguments were checked where the program was written.
TF_EXPORT void tf_run(const Stage* stages, int32_t count, int32_t threads) {
  std::mutex* mutex = team_mutex;
  std::unique_lock<std::mutex> lock(*mutex, std::defer_lock);
  if (threads > 1 && lock.try_lock()) return team_of(threads).run(stages, count);
  for (int32_t i = 0; i < count; i++) {
    Door door;
    run_stage(stages[i], door, 1);
  }
}

extern "C" __attribute__((visibility("default"))) const int32_t tf_size_Step = sizeof(Step);

// Which instructions this library was built for.
TF_EXPORT const char* tf_instructions() {
#if defined(__AVX512F__)
  return "avx512";
#elif defined(__AVX2__) && defined(__FMA__)
  return "avx2";
#else
  return "portable";
#endif
}
