// A CUDA device guard that does nothing, for fake tensors on a build of torch without CUDA. Never for real ones.
#include <c10/core/impl/DeviceGuardImplInterface.h>

extern "C" int register_cuda_guard() {
  static c10::impl::NoOpDeviceGuardImpl<c10::DeviceType::CUDA> guard;
  auto& slot = c10::impl::device_guard_impl_registry[static_cast<size_t>(c10::DeviceType::CUDA)];
  const c10::impl::DeviceGuardImplInterface* empty = nullptr;
  return slot.compare_exchange_strong(empty, &guard) ? 0 : 1;
}
