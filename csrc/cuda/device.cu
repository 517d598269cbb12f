// Questions about the driver, for `curvkern env` and for error messages.
#include "../common.cuh"

namespace curvkern::cuda {

int device_count(Status* status) {
  int count = 0;
  *status = cudaGetDeviceCount(&count);
  return count;
}

const char* status_name(Status status) { return cudaGetErrorName(static_cast<cudaError_t>(status)); }
const char* status_text(Status status) { return cudaGetErrorString(static_cast<cudaError_t>(status)); }

}  // namespace curvkern::cuda
