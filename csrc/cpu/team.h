// Threads of one op: a parallel region entered once, the rank inside it, barriers and static shares
// of the work.
#pragma once

#include <omp.h>
#include <sched.h>

#include "cpu/arch_ops.h"

namespace eet_patch {
namespace cpu {
namespace EET_CPU_ARCH {

struct Range {
  int64_t begin, end;
};

// Barrier of a team: spins for about 30 us, then yields. libgomp's own spins for milliseconds
// before it sleeps, which on a busy machine costs a scheduler slice at each of the up to seven
// barriers of a composite.
struct BarrierState {
  alignas(64) int arrived = 0;
  alignas(64) int generation = 0;

  void wait(int size) {
    const int mine = __atomic_load_n(&generation, __ATOMIC_ACQUIRE);
    if (__atomic_add_fetch(&arrived, 1, __ATOMIC_ACQ_REL) == size) {
      __atomic_store_n(&arrived, 0, __ATOMIC_RELAXED);
      __atomic_store_n(&generation, mine + 1, __ATOMIC_RELEASE);
      return;
    }
    for (int spins = 0; __atomic_load_n(&generation, __ATOMIC_ACQUIRE) == mine; ++spins) {
      if (spins >= kSpins) {
        sched_yield();
        continue;
      }
#if defined(EET_CPU_X86)
      __builtin_ia32_pause();
#endif
    }
  }
  static constexpr int kSpins = 2000;
};

struct Team {
  int rank, size;
  BarrierState* state;

  void barrier() const {
    if (size > 1) state->wait(size);
  }

  // Share of [0, count): contiguous, cut at multiples of `grain`, the same for every run with this
  // team size.
  Range share(int64_t count, int64_t grain = 1) const {
    const int64_t grains = (count + grain - 1) / grain;
    const int64_t begin = grains * rank / size * grain, end = grains * (rank + 1) / size * grain;
    return {begin < count ? begin : count, end < count ? end : count};
  }
};

// Runs body(team) on up to num_threads threads; the runtime may give fewer, so the team knows the
// true number.
template <typename Body>
void parallel(int num_threads, const Body& body) {
  if (num_threads <= 1) {
    body(Team{0, 1, nullptr});
    return;
  }
  BarrierState state;
#pragma omp parallel num_threads(num_threads)
  {
    const Team team{omp_get_thread_num(), omp_get_num_threads(), &state};
    body(team);
    team.barrier();  // so that the region's own barrier finds everybody there
  }
}

// Fork and join cost about 2 us: a thread is worth waking for this many elementary steps
// (multiply-adds, or elements times their passes), and twice as many make the first region.
constexpr int64_t kWorkPerThread = 8 * 1024;

inline int threads_for(int64_t work, const Context& context) {
  const int64_t useful = work / kWorkPerThread;
  return useful < 2 ? 1 : useful < context.num_threads ? int(useful) : context.num_threads;
}

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
inline int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }
inline int64_t min64(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t max64(int64_t a, int64_t b) { return a > b ? a : b; }

}  // namespace EET_CPU_ARCH
}  // namespace cpu
}  // namespace eet_patch
