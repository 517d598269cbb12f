// The one place with threads. Spawned per call: no pool to keep, nothing that a fork could break.
#include <thread>

#include "cpu.h"

namespace curvkern::cpu {

namespace {
constexpr int kMaxThreads = 256;
}

void parallel_pieces(int64_t n, int64_t grain, int threads, void (*body)(void*, int64_t, int64_t), void* context) {
  if (n <= 0) return;
  const int64_t grains = (n + grain - 1) / grain;
  int64_t pieces = threads < 1 ? 1 : (threads > kMaxThreads ? kMaxThreads : threads);
  if (pieces > grains) pieces = grains;
  const auto start = [&](int64_t piece) { return piece >= pieces ? n : (grains * piece / pieces) * grain; };
  std::thread workers[kMaxThreads];
  int64_t started = 0;
  for (int64_t piece = 1; piece < pieces; ++piece, ++started) {
    try {
      workers[started] = std::thread(body, context, start(piece), start(piece + 1));
    } catch (...) {  // no thread to be had: the caller does the rest
      break;
    }
  }
  body(context, 0, start(1));
  if (started + 1 < pieces) body(context, start(started + 1), n);
  for (int64_t i = 0; i < started; ++i) workers[i].join();
}

}  // namespace curvkern::cpu
