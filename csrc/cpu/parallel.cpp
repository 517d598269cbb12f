// What is asked of the system, threads and pages: torch's own OpenMP team where there is one, threads of a call's own
// elsewhere.
//
// After an operation of torch its OpenMP threads go on spinning for milliseconds, each on a core: threads beside them
// would get half of it. The runtime is looked up among the symbols of the process, so that nothing links to it.
#include <dlfcn.h>
#include <pthread.h>
#include <sys/mman.h>

#include <thread>

#include "cpu.h"

namespace curvkern::cpu {

namespace {
constexpr int kMaxThreads = 256;

// [0, n) in pieces that start at multiples of grain.
struct Work {
  int64_t n, grain, grains, pieces;
  void (*body)(void*, int64_t, int64_t);
  void* context;

  int64_t start(int64_t piece) const { return piece >= pieces ? n : (grains * piece / pieces) * grain; }
  void run(int64_t piece) const { body(context, start(piece), start(piece + 1)); }
};

// The entry points that GCC's code calls; LLVM's runtime has them too.
struct Team {
  void (*parallel)(void (*)(void*), void*, unsigned, unsigned);
  int (*thread)();
  int (*threads)();
};

// The team's threads are not in a forked child. Asked for when the library is loaded: a team may be older than our
// first call.
bool forked = false;
const int watching = pthread_atfork(nullptr, nullptr, [] { forked = true; });

Team find_team() {
  const auto find = [](auto& entry, const char* name) {
    entry = reinterpret_cast<__typeof__(entry)>(dlsym(RTLD_DEFAULT, name));
    return entry != nullptr;
  };
  Team team{};
  if (!find(team.parallel, "GOMP_parallel") || !find(team.thread, "omp_get_thread_num") ||
      !find(team.threads, "omp_get_num_threads"))
    team.parallel = nullptr;
  return team;
}

const Team& team() {
  static const Team found = find_team();  // at the first call: torch has been loaded by then
  return found;
}

// A team may be smaller than was asked for, as inside another parallel region.
void run_as_member(void* data) {
  const Work& work = *static_cast<const Work*>(data);
  for (int64_t piece = team().thread(); piece < work.pieces; piece += team().threads()) work.run(piece);
}

void run_on_own_threads(const Work& work) {
  std::thread workers[kMaxThreads];
  int64_t started = 1;
  for (; started < work.pieces; ++started) {
    try {
      workers[started] = std::thread([&work, started] { work.run(started); });
    } catch (...) {  // no thread to be had: the caller does the rest
      break;
    }
  }
  work.run(0);
  for (int64_t piece = started; piece < work.pieces; ++piece) work.run(piece);
  for (int64_t piece = 1; piece < started; ++piece) workers[piece].join();
}
}  // namespace

void parallel_pieces(int64_t n, int64_t grain, int threads, void (*body)(void*, int64_t, int64_t), void* context) {
  if (n <= 0) return;
  const int64_t grains = (n + grain - 1) / grain;
  int64_t pieces = threads < 1 ? 1 : (threads > kMaxThreads ? kMaxThreads : threads);
  if (pieces > grains) pieces = grains;
  Work work{n, grain, grains, pieces, body, context};
  if (pieces == 1) work.run(0);
  else if (!forked && watching == 0 && team().parallel)
    team().parallel(run_as_member, &work, static_cast<unsigned>(pieces), 0);
  else run_on_own_threads(work);
}

void large_pages(void* data, int64_t bytes) {
#ifdef MADV_HUGEPAGE
  constexpr uintptr_t kPage = 1 << 21;
  const uintptr_t from = reinterpret_cast<uintptr_t>(data), first = (from + kPage - 1) / kPage * kPage;
  const uintptr_t end = (from + bytes) / kPage * kPage;
  if (first < end) madvise(reinterpret_cast<void*>(first), end - first, MADV_HUGEPAGE);  // a wish: refusal is no error
#endif
}

}  // namespace curvkern::cpu
