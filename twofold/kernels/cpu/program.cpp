// The library's doors: run a program of stages on a team of threads.
#include <pthread.h>

#include <memory>
#include <mutex>

#include "stages.h"
#include "team.h"

#define TF_EXPORT extern "C" __attribute__((visibility("default")))

namespace {

void run_one(const Stage& stage, Crew& crew) {
  switch (stage.kind) {
    case Kind::embed: return run(*static_cast<const Embed*>(stage.args), crew);
    case Kind::norm: return run(*static_cast<const Norm*>(stage.args), crew);
    case Kind::add: return run(*static_cast<const Add*>(stage.args), crew);
    case Kind::pointwise: return run(*static_cast<const Pointwise*>(stage.args), crew);
    case Kind::gather: return run(*static_cast<const Gather*>(stage.args), crew);
    case Kind::linear: return run(*static_cast<const Linear*>(stage.args), crew);
    case Kind::heads: return run(*static_cast<const Heads*>(stage.args), crew);
    case Kind::attention: return run(*static_cast<const Attention*>(stage.args), crew);
    case Kind::quantize: return run(*static_cast<const Quantize*>(stage.args), crew);
    case Kind::quantized_linear: return run(*static_cast<const QuantizedLinear*>(stage.args), crew);
    case Kind::quantized_embed: return run(*static_cast<const QuantizedEmbed*>(stage.args), crew);
    case Kind::route: return run(*static_cast<const Route*>(stage.args), crew);
    case Kind::deal: return run(*static_cast<const Deal*>(stage.args), crew);
    case Kind::grouped: return run(*static_cast<const Grouped*>(stage.args), crew);
    case Kind::combine: return run(*static_cast<const Combine*>(stage.args), crew);
    case Kind::gate: return run(*static_cast<const Gate*>(stage.args), crew);
  }
}

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

thread_local Scratch scratch;

}  // namespace

// Runs `count` stages, each after the one before is done. A second caller while the team is busy works alone: the same
// bits, only slower. Nothing is thrown and nothing returned; arguments were checked where the program was written.
TF_EXPORT void tf_run(const Stage* stages, int32_t count, int32_t threads) {
  std::unique_ptr<Tickets[]> tickets(new Tickets[count > 0 ? count : 1]);
  std::mutex* mutex = team_mutex;
  std::unique_lock<std::mutex> lock(*mutex, std::defer_lock);
  if (threads > 1 && lock.try_lock()) {
    Team& crew_team = team_of(threads);
    auto work = [&](int thread) {
      for (int32_t i = 0; i < count; i++) {
        Crew crew{thread, threads, &tickets[i], &scratch};
        run_one(stages[i], crew);
        crew_team.barrier();
      }
    };
    crew_team.run(work);
    return;
  }
  for (int32_t i = 0; i < count; i++) {
    Crew crew{0, 1, &tickets[i], &scratch};
    run_one(stages[i], crew);
  }
}

// Sizes of the structs, in the order of Kind, then those inside them: the Python side compares its own.
TF_EXPORT int32_t tf_sizes(int32_t* sizes, int32_t room) {
  const int32_t found[] = {
      sizeof(Embed), sizeof(Norm), sizeof(Add), sizeof(Pointwise), sizeof(Gather), sizeof(Linear), sizeof(Heads),
      sizeof(Attention), sizeof(Quantize), sizeof(QuantizedLinear), sizeof(QuantizedEmbed), sizeof(Route), sizeof(Deal),
      sizeof(Grouped), sizeof(Combine), sizeof(Gate),
      sizeof(Step), sizeof(Cache), sizeof(Numbers), sizeof(Panels), sizeof(Rounded), sizeof(Matrix)};
  const int32_t count = sizeof found / sizeof *found;
  for (int32_t i = 0; i < count && i < room; i++) sizes[i] = found[i];
  return count;
}

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
