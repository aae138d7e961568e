// cuda/ops.cpp as it stands, for CPU tensors and the emulated kernel: its checks and allocations run without a GPU.
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

namespace torch::stable::accelerator {
struct NoGuard {
  explicit NoGuard(DeviceIndex) {}
};
}  // namespace torch::stable::accelerator

extern "C" AOTITorchError aoti_torch_get_current_cuda_stream(int32_t, void** ret_stream) {
  *ret_stream = nullptr;
  return AOTI_TORCH_SUCCESS;
}

#define CUDA CPU
#define is_cuda is_cpu
#define DeviceGuard NoGuard
#include "../cuda/ops.cpp"
