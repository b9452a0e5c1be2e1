// Threads of one op: a parallel region entered once, the rank inside it, barriers and static shares of the work.
#pragma once

#include <omp.h>

#include "cpu/arch_ops.h"

namespace eet_patch {
namespace cpu {
namespace EET_CPU_ARCH {

struct Range {
  int64_t begin, end;
};

struct Team {
  int rank, size;

  // A team of one may run inside somebody else's region, whose barrier isn't ours to enter.
  void barrier() const {
    if (size > 1) {
#pragma omp barrier
    }
  }

  // Share of [0, count): contiguous, cut at multiples of `grain`, the same for every run with this team size.
  Range share(int64_t count, int64_t grain = 1) const {
    const int64_t grains = (count + grain - 1) / grain;
    const int64_t begin = grains * rank / size * grain, end = grains * (rank + 1) / size * grain;
    return {begin < count ? begin : count, end < count ? end : count};
  }
};

// Runs body(team) on up to num_threads threads; the runtime may give fewer, so the team knows the true number.
template <typename Body>
void parallel(int num_threads, const Body& body) {
  if (num_threads <= 1) {
    body(Team{0, 1});
    return;
  }
#pragma omp parallel num_threads(num_threads)
  body(Team{omp_get_thread_num(), omp_get_num_threads()});
}

// Fork and join cost about 2 us: work below this many elementary steps (multiply-adds, or elements times their passes)
// is done by the caller alone.
constexpr int64_t kSerialWork = 16 * 1024;

inline int threads_for(int64_t work, const Context& context) {
  return work < kSerialWork ? 1 : context.num_threads;
}

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
inline int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }
inline int64_t min64(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t max64(int64_t a, int64_t b) { return a > b ? a : b; }

}  // namespace EET_CPU_ARCH
}  // namespace cpu
}  // namespace eet_patch
