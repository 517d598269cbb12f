// pybind11: integers to pointers, status to exception; nothing else. Lists of tensors: pairs.h.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <stdexcept>
#include <string>
#include <type_traits>
#include <vector>

#include "launch.h"
#include "pairs.h"

namespace py = pybind11;

namespace curvkern {
namespace {

// What Python passes for a launcher's argument: an address for a pointer, a number for an enum, the rest as it is.
template <class T>
using Raw = std::conditional_t<std::is_pointer_v<T>, uintptr_t, std::conditional_t<std::is_enum_v<T>, int32_t, T>>;

template <class T>
T cook(Raw<T> raw) {
  if constexpr (std::is_pointer_v<T>) return reinterpret_cast<T>(raw);
  else return static_cast<T>(raw);
}

void check(const std::string& op, Status status) {
  if (status == kOk) return;
  if (status == kUnsupportedDType)
    throw std::invalid_argument(op + ": unsupported dtype code; this binary knows float32, float16 and bfloat16");
#ifdef CURVKERN_CUDA
  throw std::runtime_error(op + ": " + cuda::status_name(status) + " (" + cuda::status_text(status) + ")");
#else
  throw std::runtime_error(op + ": native status " + std::to_string(status));
#endif
}

template <class... Args>
void def(py::module_& m, const char* op, const char* kind, Status (*launcher)(Args...)) {
  m.def((std::string(op) + kind).c_str(), [op, launcher](Raw<Args>... args) {
    Status status;
    {
      py::gil_scoped_release release;
      status = launcher(cook<Args>(args)...);
    }
    check(op, status);
  });
}

enum class Isa { kGeneric, kAvx2, kAvx512 };

Isa best_isa() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("fma"))
    return Isa::kAvx512;
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return Isa::kAvx2;
#endif
  return Isa::kGeneric;
}

#if defined(__x86_64__)
template <class F>
F* pick(F* generic, F* avx2, F* avx512) {
  const Isa isa = best_isa();
  return isa == Isa::kAvx512 ? avx512 : isa == Isa::kAvx2 ? avx2 : generic;
}
#define CPU(op) def(m, #op, "_cpu", pick(&cpu::generic::op, &cpu::avx2::op, &cpu::avx512::op))
#else
#define CPU(op) def(m, #op, "_cpu", &cpu::generic::op)
#endif

#ifdef CURVKERN_CUDA
#define CUDA(op) def(m, #op, "_cuda", &cuda::op)
#else
#define CUDA(op)
#endif

}  // namespace
}  // namespace curvkern

PYBIND11_MODULE(_C, m) {
  using namespace curvkern;
  m.attr("ABI") = kAbi;
  m.attr("ROLLBACK_BLOCK") = kRollbackBlock;
  m.attr("SELECT_SCRATCH") = kSelectScratch;
  m.attr("MIX_CHUNK") = kMixChunk;
  m.attr("MIX_WAYS") = kMixWays;
  m.attr("VECTORS_CHUNK") = kVectorsChunk;
  m.attr("CPU_ISA") = best_isa() == Isa::kAvx512 ? "avx512" : best_isa() == Isa::kAvx2 ? "avx2" : "generic";
#ifdef CURVKERN_CUDA
  m.attr("CUDA_ARCHS") = CURVKERN_CUDA_ARCHS;
  m.attr("CUDA_VERSION") = CURVKERN_CUDA_VERSION;
  m.def("device_count", [] {
    Status status = kOk;
    const int count = cuda::device_count(&status);
    check("device_count", status);
    return count;
  });
#else
  m.attr("CUDA_ARCHS") = "";
  m.attr("CUDA_VERSION") = "";
#endif

  m.def("large_pages", [](uintptr_t data, int64_t bytes) { cpu::large_pages(reinterpret_cast<void*>(data), bytes); });
  pairs::bind(m);
  CPU(rollback);
  CUDA(rollback);
  CPU(rollback_ties);
  CUDA(rollback_ties);
  CPU(blend);
  CUDA(blend);
  CPU(select_histogram);
  CUDA(select_histogram);
  CPU(select_blocks);
  CPU(fisher);
  CPU(change);
  CPU(column_sumsq);
  CPU(obs);
  CPU(rademacher);
  CPU(hutchinson);
  CPU(hutchinson_tiles);
  CPU(gnb_diag);
  CPU(token_loss);
  CPU(token_grad);
  CPU(perturb_squares);
  CPU(perturb);
  CPU(mix_linear);
  CPU(mix_dots);
  CPU(mix_ties);
  CPU(mix_dare);
  CPU(mix_dare_sums);
  CPU(vectors_sums);
  CPU(vectors_axpby);
  CPU(vectors_lerp);
}
