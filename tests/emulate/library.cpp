// Resident kernels with the host side of their launches, as they are, for torch: on the emulated machine, behind a
// stand-in for the CUDA runtime (library.py). KERNELS: the file of csrc/cuda that is built.
#include "../../csrc/cuda/launch.h"

#define CUDA CPU                      // the key that the kernels are registered for
#undef STABLE_TORCH_LIBRARY_FRAGMENT  // what is defined there is so already where a library was built with CUDA
#define STABLE_TORCH_LIBRARY_FRAGMENT(ns, m) \
    [[maybe_unused]] static void defines(torch::stable::detail::StableLibrary& m)

#ifdef LIMITS_ARE_KNOWN
#define CompositeExplicitAutograd PrivateUse1  // which nobody asks
#endif

#include KERNELS

// What the host side takes from torch. A tensor on the CPU is on device -1.
extern "C" {
AOTITorchError aoti_torch_create_device_guard(int32_t, DeviceGuardHandle*) { return 0; }
AOTITorchError aoti_torch_delete_device_guard(DeviceGuardHandle) { return 0; }
AOTI_TORCH_EXPORT AOTITorchError aoti_torch_get_current_cuda_stream(int32_t, void** stream) {
    *stream = nullptr;
    return 0;
}
}
static const bool there = stand_in::machine().devices.insert({-1, {}}).second;
